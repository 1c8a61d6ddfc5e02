"""What the tests of contrib/tasks share: a task in an installation, and a task in this process."""

import atexit
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PROGRAM, FakeClock

import bgtasks

PLACES = tempfile.mkdtemp()  # short paths that other users can reach
os.chmod(PLACES, 0o1777)
atexit.register(shutil.rmtree, PLACES, ignore_errors=True)
FOLDER = PROGRAM.parent / "contrib" / "tasks"
README = (FOLDER / "README.md").read_text()


def place():
    """Return a new folder."""
    return Path(tempfile.mkdtemp(dir=PLACES))


def load(name):
    found = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def context(folder, options, seconds=600, maximum=None, state=None):
    """Return what a task is handed, on a clock that stands still."""
    clock = FakeClock()
    given = {
        "task": "chore",
        "run": 1,
        "slot": clock.now(),
        "deadline": clock.now() + seconds,
        "last_success": None,
        "node": "here",
        "state_dir": str(folder / "state"),
        "maximum": maximum,
        "options": options,
        "settings": {},
        "state": state or {},
    }
    task = bgtasks.Task("chore", "chore.py", settings={})
    deadline = clock.monotonic() + seconds
    me = (os.getpid(), "")
    brief = bgtasks.Brief(task, str(folder / "live"), me, str(folder), 0.0, deadline, {}, given)
    return bgtasks.TaskContext(brief, clock)


def refused(module, good, options):
    """Return what is said of bad options; it is one line about one of them."""
    with pytest.raises(ValueError) as caught:
        module.read_options({**good, **options})
    text = str(caught.value)
    assert re.match(r"options\.\w+: ", text)
    assert "\n" not in text
    return text.split(": ", maxsplit=1)[0].partition(".")[2]


def defaults_in(name):
    return bgtasks.read_raw(str(FOLDER / name))[0].get("options", {})


def defaults_of(module):
    found = module.Options()._asdict()
    return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


class Chore:
    """A task of contrib/tasks in an installation of its own."""

    def __init__(self, site, file):
        self.site, self.name = site, file.partition(".")[0]
        shutil.copy(FOLDER / file, site.tasks)
        self.set()

    def set(self, settings="", **options):
        lines = [f"task.{self.name}.options.{key} = {text(v)}\n" for key, v in options.items()]
        self.site.params.write_text("".join(["node = here\n", settings, *lines]))
        self.site.params.chmod(0o600)

    def run(self, **options):
        """Run it, and return what is known of the run."""
        self.said = self.site.run("run", self.name, "--force", **options)
        return self.site.rows("SELECT * FROM run ORDER BY id DESC LIMIT 1")[0]

    def outcome(self):
        return self.run()["outcome"]

    def failure(self):
        """Return why the run failed, without how far it was."""
        found = self.run()
        assert found["outcome"] == "failed", (found, self.said)
        return found["reason"].partition(", after progress")[0]

    def state(self):
        return json.loads(self.site.rows("SELECT state FROM task")[0]["state"])


def text(value):
    if isinstance(value, (list, tuple)):
        return '"' + ", ".join(str(item) for item in value) + '"'
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def install(site, files):
    """Put the files of an example of the README, with its own names, into an installation."""
    for file, content in files.items():
        site.write(file, content)


def example(file, changes):
    """Return an example of the README, with the paths and ports that a test needs instead."""
    found = re.search(rf"`{re.escape(file)}`:\n\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md shows no {file}"
    content = found[1]
    for before, after in changes.items():
        assert before in content, before
        content = content.replace(before, str(after))
    return content


def needs(*programs):
    """Skip where a program is missing, but not in the gate."""
    paths = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
    found = [shutil.which(program, path=paths) for program in programs]
    if not all(found):
        missing = [program for program, path in zip(programs, found) if not path]
        assert not os.environ.get("CI"), f"{missing} missing"
        pytest.skip(f"{missing} missing")
    return found


def age(path, days):
    moment = time.time() - days * 86400
    os.utime(path, (moment, moment))


def make(path, days=0, content="x"):
    Path(path).write_text(content)
    age(path, days)
    return path


@contextmanager
def room_for(size):
    """For a while, no file can become larger than that, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_shell(script, folder, path=None, state=None, shell=(), **options):
    """Run a script as bgtasks does; return its exit code, what it said, and its report."""
    report, given = folder / "report", folder / "input"
    report.write_text("")
    given.write_text(json.dumps({"options": options, "state": state or {}}, default=str))
    env = {f"BGTASKS_OPTION_{key.upper()}": str(value) for key, value in options.items()}
    env.update(PATH=path or os.environ["PATH"], BGTASKS_REPORT=report, BGTASKS_INPUT=given)
    env.update(BGTASKS_STATE_DIR=str(folder), HOME=str(folder))
    said = subprocess.run(
        [*shell, FOLDER / script], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    lines = dict(line.partition("=")[::2] for line in report.read_text().splitlines())
    return said.returncode, (said.stdout + said.stderr).strip(), lines
