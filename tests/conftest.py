"""What the tests share: a clock they move, and an installation of their own with real processes."""

import importlib
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import bgtasks

PROGRAM = Path(bgtasks.__file__).resolve()
# as the console script does: a script would be compiled anew for each of some thousand processes
START = f"import sys; sys.path[0] = {str(PROGRAM.parent)!r}; import bgtasks"
# a clock that is ahead by the seconds that stand in a file
MOVED = """
def moved(read):
    def told(clock):
        try:
            with open({path!r}) as file:
                return read(clock) + sum(map(float, file.read().split()))
        except FileNotFoundError:
            return read(clock)
    return told
for name in ("now", "monotonic"):
    setattr(bgtasks.Clock, name, moved(getattr(bgtasks.Clock, name)))
"""


# on a busy machine an example may take its time, and so may thinking of one
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


class FakeClock(bgtasks.Clock):
    """Time moves only when a test, or a wait, moves it; the wall clock can be set apart."""

    def __init__(self, moment=1_767_225_600.0):  # 2026-01-01T00:00:00Z
        self.moment = moment
        self.ticks = 1000.0

    def now(self):
        return self.moment

    def monotonic(self):
        return self.ticks

    def wait(self, seconds, readable=()):
        ready = super().wait(0, readable)
        self.advance(max(0.0, seconds))
        return ready

    def advance(self, seconds):
        self.moment += seconds
        self.ticks += seconds


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def settings_block(**settings):
    lines = [f"{key} = {toml(value)}" for key, value in settings.items()]
    return "\n".join(
        ["# /// script", "# [tool.bgtasks]", *(f"# {line}" for line in lines), "# ///"]
    )


class Site:
    """An installation in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.tasks = folder / "tasks.d"
        self.tasks.mkdir()
        self.params = folder / "cron.params"
        self.params.write_text("node = here\n")
        self.ledger = folder / "ledger"
        self.said = folder / "said"
        self.slots = set()
        self.started = []
        self.first = ""  # what its processes do first: code that knows `bgtasks`

    @property
    def state(self):
        return self.folder / "state"

    @property
    def hold(self):
        """What a shell script says to go on until its test says `site.release()`."""
        return f"until [ -e {self.folder}/released ]; do sleep 0.05; done"

    def release(self):
        (self.folder / "released").touch()

    def movable_clock(self):
        """Let its processes take the time from a clock that this file moves: by the numbers in it.

        So what waits for an end of time, as a timeout, needs neither much time nor a fast machine.
        """
        path = self.folder / "ahead"
        self.first = MOVED.format(path=str(path))
        return path

    def write(self, file, text, mode=0o644):
        path = self.tasks / file
        path.write_text(text)
        path.chmod(mode)
        return path

    def python(self, name, body, schedule="every 1 min", **settings):
        """A task whose `run(task)` has this body."""
        block = settings_block(schedule=schedule, **settings)
        body = textwrap.indent(textwrap.dedent(body), "    ")
        return self.write(f"{name}.py", f"{block}\ndef run(task):\n{body}\n")

    def shell(self, name, body, schedule="every 1 min", **settings):
        block = settings_block(schedule=schedule, **settings)
        return self.write(f"{name}.sh", f"#!/bin/sh\n{block}\n{textwrap.dedent(body)}\n", 0o755)

    def command(self, *args):
        code = f"{START}\n{self.first}\nsys.exit(bgtasks.main())"
        return [sys.executable, "-c", code, f"--param_file={self.params}", *args]

    def run(self, *args, env=None, **options):
        options = {"timeout": 120, "capture_output": True, "text": True, **options}
        return subprocess.run(
            self.command(*args), env={**os.environ, **(env or {})}, check=False, **options
        )

    def wake(self, *args, **options):
        """One look: run what is due and leave."""
        return self.run("--cron_max_execution_time=0", *args, **options)

    def start(self, *args):
        """A wake-up that goes on; what it says is in `said`."""
        with open(self.said, "a") as said:
            self.started.append(subprocess.Popen(self.command(*args), stdout=said, stderr=said))
        return self.started[-1]

    def json(self, *args):
        done = self.run(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def status(self, task):
        return next(row for row in self.json("status")["tasks"] if row["name"] == task)

    def last(self, task):
        """The last run of a task, as the history shows it."""
        return self.json("history", task, "--count", "1")[0]

    def log(self, what):
        return self.run("log", str(what)).stdout

    def rows(self, sql, *values):
        with sqlite3.connect(self.state / "bgtasks.db", timeout=60) as db:
            db.row_factory = sqlite3.Row
            found = [dict(row) for row in db.execute(sql, values)]
        db.close()
        return found

    def change(self, sql, *values):
        with sqlite3.connect(self.state / "bgtasks.db", timeout=60) as db:
            db.execute(sql, values)
        db.close()

    def make_due(self, *tasks):
        """Let the next slot of these tasks (or of all) be a minute ago, and a new one."""
        names = tasks or [row["name"] for row in self.rows("SELECT name FROM task")]
        slot = int(time.time()) - 60
        while slot % 60 == 0 or slot in self.slots:
            slot -= 1
        self.slots.add(slot)
        for name in names:
            self.change("UPDATE task SET next_run_at = ? WHERE name = ?", slot, name)


@pytest.fixture(autouse=True)
def measured(request, monkeypatch):
    """Coverage costs each process 0.1 s, so what only repeats other tests goes without."""
    tracer = sys.gettrace()  # to stop and start it would patch `os.fork` once more each time
    if request.node.get_closest_marker("unmeasured"):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.fixture(autouse=True)
def umask():
    """What runs in the process of the tests may set its own."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def import_what_comes_late():
    """Who becomes somebody else needs this first: Python's own files may be out of reach then."""
    modules = "_strptime ctypes email.message email.policy email.utils getpass grp http.client pwd"
    modules += " resource select shlex smtplib ssl traceback urllib.request zlib zoneinfo"
    encodings = ("ascii", "cp437", "idna", "latin_1", "utf_8_sig")
    for name in (*modules.split(), *(f"encodings.{name}" for name in encodings)):
        importlib.import_module(name)


@contextmanager
def somebody_else(uid=65534):
    """For a while, this process has the rights of another user."""
    import_what_comes_late()
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def far_away():
    """A daily schedule whose next turn is half a day from now: it comes in no test by chance."""
    return f"daily {time.strftime('%H:%M', time.localtime(time.time() + 43200))}"


class Stalls:
    """When this machine stood still, as a virtual one does while others have its processors."""

    def __init__(self):
        self._found, self._over = [], threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self):
        before = time.time()
        while not self._over.wait(0.05):
            now = time.time()
            if now - before > 0.15:
                self._found.append((before + 0.05, now))
            before = now

    def seconds(self, begin, end):
        """Return the seconds from one moment to another, but for those in which it stood still."""
        lost = (min(end, until) - max(begin, since) for since, until in self._found)
        return end - begin - sum(seconds for seconds in lost if seconds > 0)

    def since(self, begin):
        return self.seconds(begin, time.time())


@pytest.fixture
def stalls():
    with Stalls() as stalls:
        yield stalls


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.release()
    for process in site.started:  # still at work only if its test failed; it shall not fail others
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(condition, seconds=60.0):
    """Wait until the condition holds and return what it gave."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {condition}")
