"""Crontabs and anacrontabs into drafts of tasks.

By https://manpages.debian.org/crontab.5, and where that is silent, by what cron's entry.c, env.c
and do_command.c do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from drafts import (
    ALIASES,
    Draft,
    Haul,
    MigrateError,
    bgtasks,
    every,
    name_for,
    quoted,
    settle_schedule,
    settle_zone,
)

# --- Lines ----------------------------------------------------------------------------------------
# In: the bytes of a table. Out: drafts, whose scripts hold the commands byte for byte.

ASSIGNMENT = re.compile(
    rb"""[ \t]*(?:'([^'=]+)'|"([^"=]+)"|([^\s='"][^\s=]*))\s*=\s*"""
    rb"""(?:'([^']*)'\s*|"([^"]*)"\s*|(|[^'"\s]|[^'"\s].*\S)\s*)"""
)
WAKES = re.compile(rb"(^|[\s/])(-m\s+bgtasks|bgtasks\.pyz?)(\s|$)")
POSIX_SHELLS = (b"sh", b"dash", b"bash", b"ksh", b"mksh", b"zsh", b"ash")
MARK = b"# moved in from "
HOME_LINE = b'cd "${HOME:?}" || exit\n'
REBOOT = (
    "@reboot: bgtasks starts nothing at boot; the task waits to be asked. For that, keep a line in"
    " a crontab: @reboot cd FOLDER && python3 bgtasks.py run NAME"
)


def decoded(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def assignment(line: bytes) -> tuple[str, str] | None:
    found = ASSIGNMENT.fullmatch(line)
    if not found:
        return None
    name, value = (group for group in found.groups() if group is not None)
    return decoded(name), decoded(value)


def cron_input(rest: bytes) -> tuple[bytes, bytes]:
    r"""Return command and standard input: `%` begins it and is its newline, `\%` is a `%`.

    In the command, cron also makes one backslash of two."""
    command, at = b"", 0
    while at < len(rest):
        pair = rest[at : at + 2]
        if pair in (b"\\%", b"\\\\"):
            command, at = command + pair[1:], at + 2
        elif pair[:1] == b"%":
            text = re.sub(rb"(\\?)%", lambda f: b"%" if f[1] else b"\n", rest[at + 1 :])
            return command, text + b"\n" if text and not text.endswith(b"\n") else text
        else:
            length = 2 if pair[:1] == b"\\" else 1
            command, at = command + pair[:length], at + length
    return command, b""


def read_crontab(path: str, content: bytes, *, user_column: bool) -> Haul:
    """Return the tasks of a crontab; ``user_column`` as in /etc/crontab and /etc/cron.d."""
    haul, env, about = Haul(), dict[str, str](), ""
    if b"\0" in content:
        raise MigrateError(f"{path}: holds a NUL byte, so it is no crontab")
    if content and not content.endswith(b"\n"):
        haul.remarks.append(f"{path}: its last line has no end, and cron reads no such crontab")
    for number, line in enumerate(content.split(b"\n"), start=1):
        where, text = f"{path}, line {number}", line.lstrip(b" \t")
        pair = assignment(line)
        if not text.strip() or text.startswith(b"#"):
            about = bgtasks.visible(text.decode("utf-8", "replace").strip("# \t\r"))
        elif pair:
            env.pop(pair[0], None)
            env[pair[0]] = pair[1]
        else:
            try:
                draft = cron_line(where, text, env, user_column=user_column)
                describe(draft, about, path)
                haul.drafts.append(draft)
            except MigrateError as error:
                haul.remarks.append(f"{where}: {error}; not carried over")
            about = ""
    return haul


def describe(draft: Draft, about: str, path: str) -> None:
    """Take the comment above a line for what it is about, if it is no line and no heading."""
    told = about if re.match(r"(?!m\s+h\s+dom)[^\d*@]", about) else ""
    file = bgtasks.visible(os.fsencode(os.path.basename(path)).decode("utf-8", "replace"))
    draft.settings["description"] = told[:200] or f"From {file}"
    if 0 < len(told) <= 30:
        draft.name = told.lower()


def cron_line(where: str, text: bytes, env: Mapping[str, str], *, user_column: bool) -> Draft:
    count = (1 if text.startswith(b"@") else 5) + user_column
    *words, rest = [*re.split(rb"[ \t]+", text, maxsplit=count), *[b""] * count][: count + 1]
    times = [decoded(word) for word in words]
    user = times.pop() if user_column else ""
    schedule = " ".join(times)
    if user_column and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*\$?", user):
        raise MigrateError(f"bad username {user!r}, which cron refuses too")
    if rest.startswith(b"*") and not user_column:
        raise MigrateError("there is a field too many, which cron refuses too")
    if WAKES.search(rest):
        raise MigrateError("wakes bgtasks itself")
    command, data = cron_input(rest)
    if not command:
        raise MigrateError("has no command, so cron does nothing")
    draft = Draft(where, name_for(decoded(command)), {}, folder=user)
    add_environment(draft, env)
    if schedule == "@reboot":
        draft.settings["schedule"] = "manual"
        draft.notes.append(REBOOT)
    else:
        settle_schedule(draft, schedule)
    if rest.endswith(b"\r"):
        draft.notes.append("ends with a carriage return, as the crontab has it: a mistake?")
    draft.script = cron_script(draft, HOME_LINE, command, data)
    return draft


def add_environment(draft: Draft, env: Mapping[str, str]) -> None:
    """Hand on the variables of a table, and what some of them mean to cron."""
    draft.settings["env"] = {k: v for k, v in env.items() if not k.startswith("BGTASKS_")}
    for name in set(env) - set(draft.settings["env"]):
        draft.notes.append(f"{name} is not carried over: such names belong to bgtasks")
    zone = env.get("CRON_TZ", "")
    if settle_zone(draft, zone, "CRON_TZ"):
        draft.notes.append(
            f"CRON_TZ={zone}: the schedule is read in this zone, as cronie does; Debian's cron"
            " does not: if the line ran there, remove timezone"
        )
    if "MAILTO" in env:
        add_receivers(draft, env["MAILTO"])


def add_receivers(draft: Draft, text: str) -> None:
    try:
        told = list(bgtasks.read_addresses(text))
    except ValueError as error:
        draft.notes.append(f"MAILTO is not carried over: {error}")
        return
    draft.settings["notify"] = told
    if told:
        draft.notes.append(
            f"MAILTO={text}: cron mailed all that was printed; {', '.join(told)} is told when the"
            " task begins to fail, and when it works again"
        )


def cron_script(draft: Draft, start: bytes, command: bytes, data: bytes) -> bytes:
    """Return what the script does: the folder, the input, and the command as it is."""
    mark = b"INPUT"
    while mark in data.split(b"\n"):
        mark += b"_"
    boot = " @reboot" if REBOOT in draft.notes else ""
    script = MARK + f"{bgtasks.visible(draft.where)}{boot}\n".encode("utf-8", "replace") + start
    if data:
        script += b"exec <<'" + mark + b"'\n" + data + mark + b"\n"
    shell = draft.settings["env"].get("SHELL", "/bin/sh").encode("utf-8", "surrogateescape")
    is_known = os.path.basename(shell) in POSIX_SHELLS and re.fullmatch(rb"/[\w./+-]{1,100}", shell)
    # at the end of a file, shells do not agree what a last backslash is
    if not is_known or re.search(rb"(?<!\\)(\\\\)*\\\Z", command):
        return script + b"exec " + b" ".join(map(quoted, (shell, b"-c", command))) + b"\n"
    draft.interpreter = shell
    return script + command + b"\n"


# --- Anacron --------------------------------------------------------------------------------------


def read_anacrontab(path: str, content: bytes) -> Haul:
    """Return the tasks of an anacrontab: days, delay, name, command."""
    haul, env = Haul(), dict[str, str]()
    for number, line in enumerate(content.replace(b"\\\n", b"").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        pair = re.fullmatch(rb"[ \t]*([^ \t=#]+)[ \t]*=(.*)", line)
        job = re.fullmatch(
            rb"[ \t]*(\d{1,6}|@\w+)[ \t]+(\d{1,6})[ \t]+([^ \t/]+)[ \t]+([^ \t].*)", line
        )
        if pair:
            env[decoded(pair[1])] = decoded(pair[2])
        elif job:
            haul.drafts.append(anacron_task(where, env, *job.groups()))
        elif line.strip() and not line.lstrip(b" \t").startswith(b"#"):
            haul.remarks.append(f"{where}: is not understood; not carried over: anacron skips it")
    return haul


def anacron_task(
    where: str, env: Mapping[str, str], period: bytes, delay: bytes, name: bytes, command: bytes
) -> Draft:
    about = f"anacron's {bgtasks.visible(name.decode('utf-8', 'replace'))}"
    draft = Draft(where, decoded(name), {"description": about})
    # anacron starts /bin/sh whatever SHELL says; its own two variables are no concern of commands
    kept = {
        k: v for k, v in env.items() if k not in ("CRON_TZ", "RANDOM_DELAY", "START_HOURS_RANGE")
    }
    add_environment(draft, kept)
    draft.settings["order"] = min(int(delay), 1_000_000)
    if int(delay):
        draft.notes.append(
            f"its delay of {int(delay)} min is carried over as its order: one task runs at a time"
        )
    hours = re.fullmatch(r"(\d\d?)-(\d\d?)", env.get("START_HOURS_RANGE", ""))
    if hours and int(hours[1]) < 24 and int(hours[2]) <= 24:
        draft.settings["window"] = f"{int(hours[1]):02}:00-{int(hours[2]):02}:00"
    if env.get("RANDOM_DELAY", "0") != "0":
        draft.notes.append(
            "RANDOM_DELAY is not carried over: only a cron expression can spread, by H"
        )
    text = {"@daily": "1", "@weekly": "7"}.get(decoded(period), decoded(period))
    if hours and text in ("@monthly", "@yearly", "@annually"):  # midnight is not in the window
        text = ALIASES[text].replace("0 0", f"0 {int(hours[1])}", 1)
    if text.isdigit():
        text = every(int(text) * 86400) if int(text) else "always"
    settle_schedule(draft, text)
    shell = draft.settings["env"].pop("SHELL", None)
    draft.script = cron_script(draft, b"cd / || exit\n", command, b"")
    if shell is not None:
        draft.settings["env"]["SHELL"] = shell
    return draft
