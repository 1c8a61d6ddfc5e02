"""A page of Markdown as a story: its examples are run from top to bottom, as a reader would.

Each story has a folder of its own with a fresh copy of what is shipped, and an environment with
nothing in it but PATH and HOME. All absolute paths of a page lead into this folder, so that it
changes nothing of the machine; `/srv/app` is where its commands are typed.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from typing import NamedTuple

from conftest import PROGRAM

import bgtasks

ROOT = PROGRAM.parent
SHIPPED = ("bgtasks.py", "cron.params.distrib", "contrib")
PLACES = """etc/cron.d etc/logrotate.d etc/nagios4/conf.d etc/sudoers.d etc/systemd/system
    usr/bin usr/local/sbin home/Library/LaunchAgents var/lib/prometheus/node-exporter""".split()
# where a path begins that is not one of what every machine has, and a story does not change
ABSOLUTE = re.compile(r"(?<![^\s\"'=>])(?=/(?!dev/|bin/|usr/bin/(?!python3))\w)")
FENCE = re.compile(r"( *)```(\w*)")
ITEM = re.compile(r" *([*-]|\d+\.) ")
CRONTAB = re.compile(r"(?:[\d*/,-]+ +){5}(?P<command>.*)")
SETTING = re.compile(r"[a-z][\w.]* = |#")
# a crontab that keeps its table in a file: that of the machine is left alone
CRONTAB_PROGRAM = """#!/bin/sh
table="$HOME/crontab"
case $1 in
    -l) [ -e "$table" ] || { echo "no crontab" >&2; exit 1; }; exec cat "$table" ;;
    *) exec cat >"$table" ;;
esac
"""


class Block(NamedTuple):
    page: str
    line: int
    language: str  # of a fence; empty: none was named, or it is indented
    text: str
    before: str  # the paragraph above

    @property
    def where(self):
        return f"{self.page}:{self.line}"

    @property
    def lines(self):
        return self.text.splitlines()

    @property
    def file(self):
        """The last file that the paragraph above names."""
        named = re.findall(r"`([\w./-]+\.\w+)`", self.before)
        assert named, f"{self.where}: the sentence above names no file"
        return named[-1]

    @property
    def kind(self):
        if self.language not in ("", "sh") or self.text.startswith("#!"):
            return self.language if self.language in ("text", "cron") else "file"
        if CRONTAB.match(self.text):
            return "cron"
        return "file" if all(map(SETTING.match, filter(None, self.lines))) else "command"


def blocks_of(text, page):
    """Return all blocks of code: those between fences, and those that are indented."""
    found, before, number = [], "", 0
    lines = text.splitlines()
    in_item = False
    while number < len(lines):
        line = lines[number]
        fence = FENCE.match(line)
        is_after_blank = number == 0 or not lines[number - 1].strip()
        if (line.strip() and not line.startswith(" ") and is_after_blank) or ITEM.match(line):
            in_item = bool(ITEM.match(line))
        indent = len(fence[1]) if fence else 6 if in_item else 4
        start = number + bool(fence)
        if fence:
            end = next(i for i in range(start, len(lines)) if lines[i].strip() == "```")
        elif is_after_blank and line.startswith(" " * indent):
            goes_on = (i for i in range(start, len(lines)) if not lines[i].startswith(" " * indent))
            end = next(goes_on, len(lines))
        else:
            if line.strip():
                before = line if is_after_blank or ITEM.match(line) else f"{before} {line}"
            number += 1
            continue
        code = textwrap.dedent("".join(f"{line}\n" for line in lines[start:end]))
        found.append(Block(page, number + 1, fence[2] if fence else "", code, before))
        number, before = end + bool(fence), ""
    return found


class Story:
    """A folder in which a page is run.

    `not_run` is how lines begin that cannot be run here; `ends` is what is appended to a command
    that has this text, and `answers` what it finds on its stdin."""

    def __init__(self, folder, *, not_run=(), ends=None, answers=None, with_tasks=False):
        self.folder, self.app, self.home = folder, folder / "srv" / "app", folder / "home"
        self.not_run, self.ends, self.answers = not_run, ends or {}, answers or {}
        self.said, self.is_unknown = None, False  # what the last command printed
        for name in ("srv/app", *PLACES):
            (folder / name).mkdir(parents=True)
        for name in (*SHIPPED, *["tasks.d"] * with_tasks):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.app / name)
        (self.app / "tasks.d").mkdir(exist_ok=True)
        # a shim, as a link to the interpreter of an environment loses the environment
        self.program("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        self.program("crontab", CRONTAB_PROGRAM)

    def program(self, name, text):
        path = self.folder / "usr/bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def here(self, text):
        """Return what a page says with the places of this story."""
        return ABSOLUTE.sub(str(self.folder), text)

    def there(self, text):
        """Return what was printed as a page would show it: there, www-data works on web1."""
        lines = [line for line in text.splitlines() if "as root" not in line]
        text = "\n".join(lines).replace(sys.executable, "/usr/bin/python3")
        text = text.replace(str(self.folder.resolve()), "").replace(str(self.folder), "")
        text = re.sub(rf"(?<![/\w]){bgtasks.user_name(os.geteuid())}\b", "www-data", text)
        return re.sub(rf"(on |@){re.escape(platform.node())}\b", r"\1web1", text)

    def run(self, blocks):
        for block in blocks:
            getattr(self, f"_{block.kind}")(block)

    def _file(self, block):
        path = self.app / self.here(block.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_params = path.name == "cron.params" and path.exists()
        with open(path, "a" if is_params else "w") as file:
            file.write(self.here(block.text))

    def _cron(self, block):
        """Do once what cron would do every time, but stay no longer than needed."""
        for line in block.lines:
            command = CRONTAB.match(line)
            assert command, f"{block.where}: {line!r} is no line of a crontab"
            self._shell(block, f"{command['command']} --cron_max_execution_time=0\n")

    def _command(self, block):
        lines = [line for line in block.lines if not line.startswith(tuple(self.not_run))]
        self.is_unknown = not lines
        if lines:
            self._shell(block, "\n".join(lines))

    def _shell(self, block, text):
        for start, end in self.ends.items():
            text = text + end if start in text else text
        answer = next((said for start, said in self.answers.items() if start in text), "")
        path = f"{self.folder}/usr/bin:{self.folder}/usr/local/sbin:/usr/local/bin:/usr/bin:/bin"
        done = subprocess.run(
            ["/bin/sh", "-e", "-c", self.here(text)],
            cwd=self.app,
            env={"PATH": path, "HOME": str(self.home)},
            input=answer,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.said = self.there(done.stdout)
        told = re.search(r"\bends? with (\d+)", block.before)
        expected = int(told[1]) if told else 0
        assert done.returncode == expected, f"{block.where}: exit {done.returncode}\n{self.said}"

    def _text(self, block):
        if not self.is_unknown:
            assert self.said is not None, f"{block.where}: nothing was run that could say this"
            parts = [re.escape(masked(part)) for part in block.text.split("...")]
            found = re.fullmatch(r"\s*" + ".*?".join(parts) + r"\s*", masked(self.said), re.DOTALL)
            assert found, f"{block.where}: it says\n{self.said}"


def masked(text):
    """Return text in which moments, times taken and sizes look alike, and blanks do not count."""
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?([+-]\d\d:\d\d)?", "MOMENT", text)
    text = re.sub(r"\b(\d{8}-\d{6}|\d{10}\.\d+)\b", "MOMENT", text)
    text = re.sub(r"\b\d\d:\d\d:\d\d\b", "MOMENT", text)
    text = re.sub(r"\b(?<!every )[\d.]+ (ms|s|min|h|d)\b", "SPAN", text)
    text = re.sub(r"\b\d+ ([KMG]iB|%)", r"SIZE", text)
    text = re.sub(r"\b\d+s;", "SPAN;", text)
    return " ".join(text.split())
