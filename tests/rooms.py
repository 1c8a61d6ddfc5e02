"""Rooms: this machine with some of its paths replaced, for programs that know no other paths."""

import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PROGRAM, Site

CONTRIB = PROGRAM.parent / "contrib"
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def lacking(text):
    """A machine may lack what a test needs, but not the one that judges."""
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


def program(name, package="", pip=""):
    """Return the path of a program, beside the interpreter or of the machine."""
    beside = os.path.dirname(sys.executable)
    way_out = f"pip install {pip}" if pip else f"apt-get install {package or name}"
    return shutil.which(name, path=f"{beside}:{PATHS}") or lacking(f"{name} is missing: {way_out}")


def shown(folder):
    """Return the commands that the README of a folder of contrib shows."""
    text = (CONTRIB / folder / "README.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return [line.partition("  #")[0].strip() for line in [*lines, *"".join(blocks).splitlines()]]


def readme(folder, words):
    """Return the one command with these words that a README shows, to be run as it is."""
    (command,) = (command for command in shown(folder) if words in command)
    return command


class Room:
    """Processes with mounts of their own: what is in a folder of the test lies at a real path.

    They see no other processes, and all end with the first. Commands that name files of the
    repository do so from its folder (`cwd=ROOT`): it may lie where a room has something else."""

    def __init__(self):
        if os.geteuid() or not shutil.which("unshare"):
            lacking("needs root and unshare, for mounts of its own")
        self.folder = Path(tempfile.mkdtemp(prefix="room-"))
        self.folder.chmod(0o755)
        self.script = []
        self.processes = []

    def put(self, place, what=None):
        """Let a file or folder (a new one, if none is named) be at a place where something is."""
        if what is None:
            what = self.folder / place.strip("/").replace("/", "-")
            what.mkdir()
        self.script.append(f"mount --bind {shlex.quote(str(what))} {shlex.quote(str(place))}")
        return Path(what)

    def make(self, place):
        """Let there be an empty folder where no other is needed; return it."""
        parent = str(Path(place).parent)
        if f"mount -t tmpfs room {parent}" not in self.script:
            self.script.append(f"mount -t tmpfs room {parent}")
        self.script.append(f"mkdir {place}")
        return self.put(place)

    def command(self, command, user=""):
        words = command
        if not isinstance(command, str):
            words = f"exec {shlex.join(str(word) for word in command)}"
        if user:
            switch = ["exec", "setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
            # another user: the kernel forgets that it shall end with its parent
            words = shlex.join([*switch, "--pdeathsig=KILL", "sh", "-c", words])
        script = "\n".join(["set -e", *self.script, f"exec sh -c {shlex.quote(words)}"])
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--ipc"]
        return [*unshare, "sh", "-c", script]

    def run(self, command, user="", **options):
        options = {"timeout": 120, "capture_output": True, "text": True, **options}
        env = {"PATH": PATHS, "LC_ALL": "C.UTF-8", **options.pop("env", {})}
        return subprocess.run(self.command(command, user), env=env, check=False, **options)

    def start(self, command, user="", **options):
        env = {"PATH": PATHS, "LC_ALL": "C.UTF-8", **options.pop("env", {})}
        said = open(self.folder / "said", "ab")  # noqa: SIM115 - as long as the process lives
        options = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said, **options}
        process = subprocess.Popen(self.command(command, user), env=env, **options)
        said.close()
        self.processes.append(process)
        return process

    @staticmethod
    def first(process):
        """Return the process that is number 1 in the room. Raises OSError if there is none."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if not children:
            raise ProcessLookupError("it is not there yet, or not any more")
        return int(children[0])

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                with suppress(OSError):  # it ends just now
                    os.kill(self.first(process), signal.SIGKILL)
                process.kill()
            process.wait()
        shutil.rmtree(self.folder)


class App(Site):
    """An installation that lies at /srv/app in a room, and belongs to the user of a web server."""

    def __init__(self, room, user="www-data"):
        super().__init__(room.make("/srv/app"))
        self.room, self.user = room, user
        shutil.copy(PROGRAM, self.folder)
        self.params.write_text("node = here\ncron_max_execution_time = 0\n")

    def give(self):
        found = pwd.getpwnam(self.user)
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, found.pw_uid, found.pw_gid, follow_symlinks=False)

    def say(self, *words):
        """What a command of bgtasks says in the room."""
        command = ["/usr/bin/python3", "/srv/app/bgtasks.py", *words]
        return self.room.run(command, self.user)
