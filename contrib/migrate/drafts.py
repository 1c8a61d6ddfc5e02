"""What all parts of migrate.py share: a task that is to be written, and the folder of files.

Draft -> tasks.d/NAME.sh or NAME.toml, a param file for what is secret, and what is to be known
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[1:1] = [HERE, os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]
try:
    import bgtasks as bgtasks  # noqa: PLC0414 - the files beside this one have it from here
except ImportError:
    raise SystemExit(
        "migrate.py: needs bgtasks.py; copy it into the folder of migrate.py"
    ) from None


class MigrateError(Exception):
    """Nothing can be done; the text says why, and the way out."""


@dataclass
class Draft:
    """A task to be written: a script of the shell, or settings that hold how it is started."""

    where: str  # "crontab, line 12"
    name: str  # as it would be called if no other task were
    settings: dict[str, Any]
    script: bytes = b""
    interpreter: bytes = b"/bin/sh"
    folder: str = ""  # the user, if the source names one
    notes: list[str] = field(default_factory=list)

    def pause(self, why: str) -> None:
        """Write it without a schedule, so that somebody must look at it."""
        self.settings.update(schedule="manual", enabled=False)
        self.notes.append(f"is written as paused: {why}")


@dataclass
class Haul:
    """All that was found: tasks, what is said of the whole, and files that tasks need."""

    drafts: list[Draft] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)


# --- Schedules ------------------------------------------------------------------------------------

ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
FIELDS = (
    bgtasks.Field("minute", 0, 59),
    bgtasks.Field("hour", 0, 23),
    bgtasks.Field("day-of-month", 1, 31),
    bgtasks.Field("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    bgtasks.Field("day-of-week", 0, 6, "sun mon tue wed thu fri sat"),
)


def every(seconds: int) -> str:
    """Return the text of a period, in the largest unit that fits."""
    sizes = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    return next(f"every {seconds // n} {unit}" for unit, n in sizes if seconds % n == 0)


def settle_zone(draft: Draft, name: str, source: str) -> bool:
    """Give a task its zone, and tell whether it has one; one that is unknown is named."""
    try:
        bgtasks.Zone(name)
    except bgtasks.TaskError as error:
        draft.notes.append(f"{source} is not carried over: {error}")
        return False
    draft.settings["timezone"] = name
    return bool(name)


def settle_schedule(draft: Draft, text: str) -> None:
    """Give a task its schedule if bgtasks can read it; else it is written as paused."""
    draft.settings["schedule"] = text
    try:
        if not text:
            raise bgtasks.TaskError("its schedule never comes, so it was never started")
        bgtasks.parse_schedule(text, bgtasks.Zone(draft.settings.get("timezone", "")), spread="x")
    except bgtasks.MissingPackageError:
        pass  # said once, at the end
    except bgtasks.TaskError as error:
        draft.pause(f"{text}: {error}" if text else str(error))


# --- Names and text -------------------------------------------------------------------------------

SKIPPED = set(
    "cd env nice ionice flock timeout exec test sudo php python python2 python3 perl ruby node sh"
    " bash dash sleep command run-parts if then fi true false echo printf usr bin and or".split()
)
SCRIPT_SUFFIX = re.compile(r"\.(sh|bash|py|pl|php|rb|js|phar|cgi)$")


def name_for(command: str) -> str:
    """Return what a command is about, as a person would call it."""
    after_cd = False
    for word in re.findall(r"[^\s;&|<>()\"'`$!{}\[\]]+", command):
        base = SCRIPT_SUFFIX.sub("", os.path.basename(word.rstrip("/")))
        skipped = base in SKIPPED or word[0] in "-+%" or "=" in word or after_cd
        skipped = skipped or not re.search("[A-Za-z]{2}", base) or base.endswith((".lock", ".pid"))
        if not skipped:
            return base
        after_cd = word == "cd"
    return "command"


def unique_name(wanted: str, suffix: str, taken: dict[str, int]) -> str:
    """Return a valid name of a task that no other has, upper and lower case being the same."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", wanted).strip("_-")[:56] or "task"
    if bgtasks.ignored_because(stem + suffix):
        stem = f"task_{stem}"
    name, count = stem, taken.get(stem.lower(), 1)
    while name.lower() in taken:
        count += 1
        name = f"{stem}_{count}"
    taken[stem.lower()] = count  # where to go on for the next of this name
    taken[name.lower()] = 1
    return name


def is_text(text: str) -> bool:
    """Tell whether it is UTF-8, so that TOML can hold it."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def quoted(word: bytes) -> bytes:
    return b"'" + word.replace(b"'", b"'\"'\"'") + b"'"


def toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{toml(str(key))} = {toml(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str) and "\0" in value:
        raise MigrateError("holds a NUL byte, which no command can be given")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# --- Files ----------------------------------------------------------------------------------------
# In: drafts. Out: tasks.d, a param file for what is secret, and what was said, in a new folder.


class Files(NamedTuple):
    content: dict[str, bytes]  # by path below the folder
    report: list[str]


def take_secrets(draft: Draft, name: str) -> list[str]:
    """Move what is secret out of the settings, into lines of the param file."""
    lines: list[str] = []
    for table in ("env", "options"):
        for key, value in list(draft.settings.get(table, {}).items()):
            shown = bgtasks.visible(ascii(key)[1:-1])
            if not is_text(key + value):
                draft.notes.append(f"{shown} is not carried over: it is not UTF-8")
                del draft.settings[table][key]
            elif bgtasks.is_secret(key) and value:
                del draft.settings[table][key]
                quote = '"' if '"' not in value else "'"
                unfit = re.search(r"[\n\r\0]", value) or quote in value
                if unfit or not re.fullmatch(r"[\w-]+", key):
                    draft.notes.append(f"{shown} is not carried over: no param file can hold it")
                    continue
                lines.append(f"task.{name}.{table}.{key} = {quote}{value}{quote}\n")
                draft.notes.append(f"the value of {shown} is a secret: it stands in cron.params")
    return lines


def task_file(draft: Draft) -> bytes:
    order = ["command", "script", *bgtasks.TASK_SETTINGS]
    settings = {key: draft.settings.get(key, "") for key in order}
    if b"\0" in draft.script:
        raise MigrateError("holds a NUL byte, which no command can be given")
    lines = [f"{key} = {toml(value)}" for key, value in settings.items() if value not in ({}, "")]
    if not draft.script:
        return "".join(f"{line}\n" for line in lines).encode()
    if b"# /// script" in draft.script.replace(b"\r\n", b"\n").split(b"\n"):
        raise MigrateError("has a line '# /// script', which begins the settings of a task")
    block = ["# /// script", "# [tool.bgtasks]", *(f"# {line}" for line in lines), "# ///"]
    return b"#!" + draft.interpreter + b"\n" + "\n".join(block).encode() + b"\n" + draft.script


def files_of(haul: Haul) -> Files:
    """Return the files of a new installation, or of one for each user."""
    content: dict[str, bytes] = {}
    report: list[str] = []
    said: list[tuple[str, list[str]]] = []
    taken: dict[str, dict[str, int]] = {}
    for draft in haul.drafts:
        suffix = ".sh" if draft.script else ".toml"
        name = unique_name(draft.name, suffix, taken.setdefault(draft.folder, {}))
        secrets = take_secrets(draft, name)
        try:
            content[os.path.join(draft.folder, "tasks.d", name + suffix)] = task_file(draft)
        except MigrateError as error:
            report.append(f"{draft.where}: {error}; not carried over: write it by hand")
            continue
        params = os.path.join(draft.folder, "cron.params")
        if secrets:
            content[params] = content.get(params, b"") + "".join(secrets).encode()
        off = "" if draft.settings.get("enabled", True) else ", paused"
        said.append((f"{draft.where}: {name}, {draft.settings['schedule']}{off}", draft.notes))
    for folder in taken:
        for file, text in haul.extra.items():
            content[os.path.join(folder, "tasks.d", file)] = text.encode()
    report += haul.remarks + closing_words(haul, sorted(taken))
    return Files(content, [*said_of_tasks(said), *map(bgtasks.visible, report)])


def said_of_tasks(said: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return what is said of each task; what holds for all of them is said once."""
    of_all = (
        [note for note in said[0][1] if all(note in notes for _, notes in said)] if said else []
    )
    of_all = of_all if len(said) > 1 else []
    lines: list[str] = []
    for about, notes in said:
        lines += [about, *(f"    {note}" for note in notes if note not in of_all)]
    return [bgtasks.visible(line) for line in [*lines, *(f"all tasks: {note}" for note in of_all)]]


def closing_words(haul: Haul, users: Sequence[str]) -> list[str]:
    schedules = [draft.settings["schedule"] for draft in haul.drafts]
    built_in = ("@daily", "@midnight", "@weekly")
    expressions = sum(
        text.count(" ") == 4 or (text in ALIASES and text not in built_in) for text in schedules
    )
    words = [f"{bgtasks.counted(len(haul.drafts), 'task')} found"]
    if expressions:
        text = bgtasks.counted(expressions, "schedule")
        words.append(f"{text} with the five fields of cron: pip install croniter")
    own = "folder {0}: an installation for this user; chown -R {0} it"
    return words + [own.format(user) for user in users if user]


def write_folder(folder: str, files: Mapping[str, bytes]) -> None:
    """Write all files into a new folder, readable by the owner only; all of them, or none.

    They may hold passwords: a table of cron is private too."""
    target = os.path.realpath(folder)
    part = ""
    try:
        if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
            text = "is there and not empty; nothing is overwritten: name a new folder"
            raise MigrateError(f"{folder}: {text}")
        part = tempfile.mkdtemp(prefix=".migrate-", dir=os.path.dirname(target))
        for path, content in files.items():
            place = os.path.join(part, path)
            os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
            mode = 0o700 if content.startswith(b"#!") else 0o600
            with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.rename(part, target)  # only over an empty folder
    except OSError as error:
        raise MigrateError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)


def deliver(files: Files, to: str | None) -> None:
    """Write the files, or show them; say in both cases what is not carried over."""
    if to:
        report = "".join(f"{line}\n" for line in files.report).encode("utf-8", "replace")
        write_folder(to, {**files.content, "MIGRATED.txt": report})
    else:
        for path, content in files.content.items():
            text = content.decode("utf-8", "backslashreplace")
            is_secret = path.endswith(("cron.params", ".env"))
            shown = re.sub(r"(?m)=.*$", "= ...", text) if is_secret else text
            print(f"--- {path}\n{shown}", end="" if text.endswith("\n") else "\n")
        print("--- what is to be known")
    for line in files.report:
        print(line)


@contextlib.contextmanager
def open_source(path: str) -> Iterator[io.BufferedReader]:
    """Open a file, or stdin for `-`."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            yield file
    except OSError as error:
        raise MigrateError(f"{path}: cannot be read ({error.strerror})") from None
