#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["croniter >=6", "tomli >=2; python_version < '3.11'"]
# ///
"""Run all background tasks of a small installation, woken by one crontab line.

    param file + arguments -> Settings -> tasks.d -> Task -> Schedule -> Store -> Runner -> Keeper
    -> Store -> reports

The sections stand in the order of that walk, and each uses only what stands above it: errors and
exit codes, clock, param file, settings, schedule, tasks, store, keeper, runner, reports, command
line. Only the Store knows SQL; only the Clock asks the machine for the time; only the command line
and the keeper's processes print or exit.

What may be relied on: the command line, its exit codes and JSON keys (they are only added to), the
param file, and the contract with tasks. The Python names in this file may change.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):  # noqa: UP036  # pragma: no cover (an old Python must read one line)
    sys.stderr.write("bgtasks: needs Python 3.9 or newer, this is " + sys.version.split()[0] + "\n")
    sys.exit(69)

import errno
import os
import sqlite3
import stat
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime, timezone
from functools import cache, lru_cache, partial

__version__ = "0.1.0"

# A wake-up that finds nothing due must cost next to nothing, and every import counts: `typing`,
# `re` or `json` each take about half as long as Python's own start: imported on first use.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import ast
    import difflib
    import faulthandler
    import fcntl
    import getopt
    import getpass
    import grp
    import hashlib
    import hmac
    import json
    import pwd
    import re
    import resource
    import select
    import shlex
    import shutil
    import signal
    import smtplib
    import ssl
    import subprocess
    import threading
    import traceback
    import zlib
    import zoneinfo
    from typing import Any, NamedTuple, NoReturn
else:
    Any = object

    class _Later:
        """A module that is imported when something of it is first used."""

        def __init__(self, name):  # noqa: ANN001, ANN204 - not seen by type checkers
            self._name = name

        def __getattr__(self, attribute):  # noqa: ANN001, ANN204 - not seen by type checkers
            module = globals()[self._name] = __import__(self._name)
            return getattr(module, attribute)

    for _name in (
        "ast difflib faulthandler fcntl getopt getpass grp hashlib hmac json pwd re resource select"
        " shlex shutil signal smtplib ssl subprocess threading traceback zlib zoneinfo"
    ).split():
        globals()[_name] = _Later(_name)

    class _Value(type):
        """Stands in for `typing.NamedTuple`: the annotations of a class become its fields."""

        def __new__(cls, name, bases, body):  # noqa: ANN001, ANN204 - not seen by type checkers
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body.get("__annotations__", {})
            defaults = [body.pop(field) for field in fields if field in body]
            base = namedtuple(name, fields, defaults=defaults)  # noqa: PYI024 - what it stands in for
            return type(name, (base,), {**body, "__slots__": ()})

    class NamedTuple(metaclass=_Value):
        pass


# --- Errors and exit codes ------------------------------------------------------------------------
# What can go wrong, and the exit code that says so (the names of sysexits.h; the README has the
# table). An error raised here is one the reader can mend: one line, without a traceback.

EXIT_OK, EXIT_FAILED, EXIT_BUG, EXIT_SYSTEM, EXIT_IO, EXIT_TIMED_OUT = 0, 1, 70, 71, 74, 124


class BgtasksError(Exception):
    """Something the reader of the message can mend; shown as one line."""

    exit_code = EXIT_BUG


def _kind(name: str, exit_code: int) -> type[BgtasksError]:
    return type(name, (BgtasksError,), {"exit_code": exit_code})


UsageError = _kind("UsageError", 64)
DataError = _kind("DataError", 65)  # the state is damaged, or not ours
NoTaskError = _kind("NoTaskError", 66)
UnavailableError = _kind("UnavailableError", 69)
ProcessError = _kind("ProcessError", EXIT_SYSTEM)  # no process, descriptor or memory to be had
CreateError = _kind("CreateError", 73)
StorageError = _kind("StorageError", EXIT_IO)  # the disk is full or failed, or the file was taken
BusyError = _kind("BusyError", 75)
RefusedError = _kind("RefusedError", 77)  # the wrong user, or others could decide what runs
ConfigError = _kind("ConfigError", 78)


class TaskError(BgtasksError):
    """A task file or schedule cannot be used; kept as the reason why the task is broken."""


class MissingPackageError(TaskError):
    """A package that this task needs is not installed; it may be there at the next look."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name that is like ``name``, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def visible(text: str) -> str:
    """Return ``text`` with everything that could steer a terminal or forge a line made visible."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def shortened(text: str, width: int = 80) -> str:
    """Return ``text`` on one visible line of at most ``width`` characters."""
    text = visible(text)
    return text if len(text) <= width else text[: width - 3] + "..."


# --- Clock ----------------------------------------------------------------------------------------
# The only place that asks the machine for the time. Wall time (Unix seconds) answers "is it due";
# every budget, deadline and duration runs on the monotonic clock, which nobody can set.


class Clock:
    """The machine's time; tests hand in one of their own."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        """Return seconds that only ever grow, the same for all processes since the boot."""
        return time.monotonic()

    def wait(self, seconds: float, readable: Sequence[int] = ()) -> bool:
        """Wait at most ``seconds`` until a descriptor of ``readable`` can be read; tell if so."""
        return bool(select.select(readable, (), (), max(0.0, seconds))[0])


def iso(moment: float | None, zone: Any = None) -> str | None:
    """Return Unix seconds as ISO 8601 with offset, in the machine's zone if ``zone`` is None.

    None for None, and for what no calendar has."""
    if moment is None:
        return None
    try:
        at = datetime.fromtimestamp(moment, timezone.utc)
        return at.astimezone(zone).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None


# --- Param file -----------------------------------------------------------------------------------
# A path goes in, its `key = value` lines with their numbers come out. Nothing here knows which keys
# there are. Files that somebody else could have written are refused, here and for tasks.

PARAM_FILE_BYTES = 1 << 20


class Param(NamedTuple):
    where: str  # file:line
    key: str
    value: str


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def refuse_unsafe(info: os.stat_result, path: str, what: str) -> None:
    """Raise RefusedError if others can write what ``info`` was read of, or own it.

    The rule of sudo, sshd and logrotate: it belongs to root or to us, and nobody else may write it,
    but for the group that has no member but us."""
    if sys.platform == "win32":
        return
    mode, me, owner = stat.S_IMODE(info.st_mode), os.geteuid(), info.st_uid
    if owner not in (0, me):
        who, name = user_name(me), user_name(owner)
        way_out = f"run it as {name} (sudo -u {name} ...), or chown {who} {path}"
        raise RefusedError(f"{path}: {what} belongs to {name}, you are {who}; {way_out}")
    if mode & 0o002 or (mode & 0o020 and not _is_private_group(info.st_gid, me)):
        raise RefusedError(f"{path}: {what} can be written by others ({mode:o}); chmod go-w {path}")


def _is_private_group(gid: int, uid: int) -> bool:
    """Tell whether a group was made for a user alone: of the same name, without other members."""
    if gid == 0:
        return True
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    alone = set(group.gr_mem) <= {user.pw_name}
    return user.pw_gid == gid and group.gr_name == user.pw_name and alone


def refuse_unsafe_parents(path: str) -> None:
    """Raise RefusedError if somebody else could put another file in the place of a real path."""
    if sys.platform == "win32":
        return
    folder = os.path.dirname(path)
    while True:
        info = os.stat(folder)
        if not info.st_mode & stat.S_ISVTX or info.st_uid not in (0, os.geteuid()):
            refuse_unsafe(info, folder, "folder")
        if folder == os.path.dirname(folder):
            return
        folder = os.path.dirname(folder)


def read_safe(path: str, what: str, at_most: int) -> tuple[bytes, os.stat_result]:
    """Return the content of a plain file that nobody else could have written, and its `stat`.

    The check is made on the descriptor that is read, so nobody can swap the file in between.
    Raises RefusedError, OSError, or ValueError if it is no plain file."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("is no plain file")
        refuse_unsafe(info, path, what)
        refuse_unsafe_parents(os.path.realpath(path))
        return os.read(fd, at_most), info
    finally:
        os.close(fd)


def read_param_file(path: str, is_secret: Callable[[str], bool]) -> list[Param]:
    """Return the lines of a param file. Raises ConfigError, or RefusedError if it is not safe."""
    try:
        content, info = read_safe(path, "param file", PARAM_FILE_BYTES)
    except PermissionError:
        raise RefusedError(f"{path}: you may not read it; run it as its owner") from None
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        way_out = "copy cron.params.distrib there, or name another with --param_file"
        raise ConfigError(f"{path}: cannot be read ({what}); {way_out}") from None
    if len(content) == PARAM_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than 1 MiB; name another with --param_file")
    params = parse_params(content, path)
    if sys.platform != "win32" and info.st_mode & 0o077:
        for param in params:
            if param.value and is_secret(param.key):
                raise RefusedError(f"{param.where}: others can read {param.key}; chmod 600 {path}")
    return params


def parse_params(content: bytes, path: str = "cron.params") -> list[Param]:
    """Return the ``key = value`` lines; the value ends at a comment, quotes keep everything."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise ConfigError(f"{path}: byte {content.index(0)} is NUL; save it as UTF-8") from None
    params: list[Param] = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip() and line.lstrip()[0] != "#":
            key, equals, value = line.strip().partition("=")
            where = f"{path}:{number}"
            if not equals or not key.strip():
                raise ConfigError(f"{where}: {shortened(line, 60)!r} is not a line: key = value")
            params.append(Param(where, key.strip(), _value(value.strip(), where)))
    return params


def _value(text: str, where: str) -> str:
    if text[:1] in ('"', "'"):
        value, closing, rest = text[1:].partition(text[0])
        if not closing or (rest.strip() and rest.strip()[0] != "#"):
            raise ConfigError(f"{where}: a quoted value ends with {text[0]} and nothing after it")
        return value
    value, comment, _ = text.partition("#")
    if comment and value and not value[-1].isspace():
        raise ConfigError(f"{where}: '#' touches the value; quote it, or put a blank before '#'")
    return value.strip()


# --- Settings -------------------------------------------------------------------------------------
# Param files and arguments go in; one checked value comes out. The table OPTIONS is the only place
# where a setting exists: it makes keys, flags, help and cron.params.distrib.

SECRET_WORDS = ("pwd", "pass", "token", "secret", "key", "dsn")
SHORTEST_MASKED = 6
SMTP_PORTS = {"starttls": 587, "tls": 465, "none": 25}
NEWS = {"failure", "recovery", "success"}  # what somebody may want to hear of a task
# what a mail address may consist of, outside quotes: RFC 5321 and 6531
ADDRESS = frozenset(range(33, 256)) - set(b'"(),:;<>[\\]\x7f')


def read_plain(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be text on one line")
    return text


def read_path(text: str) -> str:
    if not read_plain(text) or text[0] == "~":
        raise ValueError("must be a path, written out in full ('~' and '$' mean nothing here)")
    return text


def read_boolean(text: str) -> bool:
    if text.lower() not in ("1", "0", "true", "false", "yes", "no", "on", "off"):
        raise ValueError("must be 1, 0, true, false, yes, no, on or off")
    return text.lower() in ("1", "true", "yes", "on")


def read_number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) <= 9
        if not digits or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return read


def read_duration(text: str) -> float:
    """Return the seconds of ``90``, ``90 s``, ``10 min``, ``2 h``, ``7 d`` or ``2 w``."""
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(digits) :].strip()
    sizes = {"": 1, "s": 1, "sec": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
    sizes.update({"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800})
    size = sizes.get(unit) or sizes.get(unit.rstrip("s"))
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9 and size):
        raise ValueError("must be seconds, or a duration such as '10 min', '2 h', '7 d'")
    return float(int(digits) * size)


def read_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in read_plain(text).split(",") if name.strip())


def read_addresses(text: str) -> tuple[str, ...]:
    addresses = read_names(text)
    for address in addresses:
        local, at, host = address.partition("@")
        odd = address[0] == "-" or not local or bool(at) != bool(host) or "@" in host
        if odd or not ADDRESS.issuperset(address.encode()):
            raise ValueError(f"{shortened(address)!r} is no mail address such as me@example.org")
    return addresses


def read_news(text: str) -> tuple[str, ...]:
    if not set(read_names(text)) <= NEWS:
        raise ValueError("must be a list of failure, recovery and success")
    return read_names(text)


def read_token(text: str) -> str:
    if len(read_plain(text)) < 32:
        raise ValueError(
            "must have at least 32 characters; python3 -c 'import secrets; "
            "print(secrets.token_urlsafe(32))' makes one"
        )
    return text


def read_security(text: str) -> str:
    if text not in SMTP_PORTS:
        raise ValueError("must be starttls, tls or none")
    return text


def read_command(text: str) -> str:
    try:
        shlex.split(read_plain(text))
    except ValueError as error:
        raise ValueError(f"cannot be split into words as a shell does ({error})") from None
    return text


def read_zone(text: str) -> str:
    try:
        zoneinfo.ZoneInfo(text)
    except (KeyError, ValueError, OSError):
        hint = nearest(text[:80], zoneinfo.available_timezones())
        text = f"is no zone of this machine{hint}; without zones: pip install tzdata"
        raise ValueError(text) from None
    return text


class Option(NamedTuple):
    """One setting: how its text is read, its default, and what it is for."""

    key: str
    read: Callable[[str], Any]
    default: str
    help: str
    flag_only: bool = False


OPTIONS = (
    Option(
        "param_file",
        read_names,
        "",
        "param files, comma-separated; the last one wins",
        flag_only=True,
    ),
    Option("auth_user", read_plain, "", "login of an administrator, once one is registered"),
    Option("auth_pwd", read_plain, "", "its password; as an argument others see it in ps"),
    Option("verbose", read_boolean, "0", "say each start and end, and the status afterwards"),
    Option("status_only", read_boolean, "0", "show the status and leave; changes nothing"),
    Option("dry_run", read_boolean, "0", "say what a wake-up would start, and start nothing"),
    Option(
        *("cron_max_execution_time", read_number(0, 86400), "600"),
        "seconds a wake-up stays; 0: look once, run what is due, leave",
    ),
    Option("cron_sleep", read_number(1, 3600), "2", "seconds between two looks for changes"),
    Option("cron_limit", read_number(0, 1_000_000), "0", "most runs a wake-up starts; 0: no limit"),
    Option("max_parallel", read_number(1, 64), "1", "runs at the same time"),
    Option("tasks_dir", read_path, "tasks.d", "folder of the tasks"),
    Option("state_dir", read_path, "state", "folder of the state, on a local disk"),
    Option("maintenance_flag", read_path, "maintenance", "while this file exists nothing starts"),
    Option("strict", read_boolean, "0", "end with 1 if a run of this wake-up failed"),
    Option(
        "max_interruptions", read_number(0, 1000), "3", "crashes in a row that pause a task; 0: no"
    ),
    Option("history_success_lifetime", read_duration, "28 d", "how long good runs are kept"),
    Option("history_failure_lifetime", read_duration, "90 d", "how long other runs are kept"),
    Option("node", read_plain, "", "name of this machine; empty: as the machine calls itself"),
    Option("timezone", read_zone, "", "zone of the schedules, Europe/Berlin; empty: the machine's"),
    Option("notify_email", read_addresses, "", "who is told of tasks that fail, comma-separated"),
    Option("notify_on", read_news, "failure, recovery", "what they are told; also success"),
    Option("notify_after", read_number(1, 1000), "1", "failures in a row after which they are"),
    Option("notify_command", read_command, "", "a program that is told too, as JSON on its stdin"),
    Option("email_asynchronous", read_boolean, "0", "1: leave all mails to the task send_mail"),
    Option("outbox", read_path, "outbox", "folder of the mails that wait to be sent"),
    Option("outbox_delay", read_duration, "0", "how long a mail waits there at least"),
    Option("mail_from", read_addresses, "", "sender of mails; empty: bgtasks@ and the node"),
    Option("smtp_host", read_plain, "", "mail server; empty: the program sendmail_path"),
    Option("smtp_port", read_number(0, 65535), "0", "its port; 0: 587, with tls 465, with none 25"),
    Option("smtp_security", read_security, "starttls", "starttls, tls, or none"),
    Option("smtp_user", read_plain, "", "login at the mail server; empty: without"),
    Option("smtp_pwd", read_plain, "", "its password"),
    Option("smtp_ca_file", read_path, "", "certificates to trust instead of the machine's"),
    Option("sendmail_path", read_path, "/usr/sbin/sendmail", "program that sends a mail"),
    Option("web_token", read_token, "", "secret of at least 32 characters that wakes by the web"),
    Option("web_allow_get", read_boolean, "0", "1: GET /wake/TOKEN wakes too"),
    Option("web_pixel", read_boolean, "0", "1: the image pixel.gif wakes, without a token"),
    Option("web_interval", read_duration, "300", "how often it does at most"),
    Option("web_inline", read_boolean, "0", "1: a wake-up ends within its web request"),
    Option("web_max_execution_time", read_number(1, 3600), "20", "seconds that such a one stays"),
    Option("task", read_names, "", "start only these tasks, comma-separated", flag_only=True),
    Option("exclude_task", read_names, "", "do not start these tasks", flag_only=True),
    Option("group", read_names, "", "start only tasks of these groups", flag_only=True),
    Option("exclude_group", read_names, "", "do not start tasks of these groups", flag_only=True),
)
PATHS = ("tasks_dir", "state_dir", "maintenance_flag", "outbox", "smtp_ca_file", "sendmail_path")


class Override(NamedTuple):
    """A setting of one task, changed without touching its file."""

    path: str  # within the task, such as `schedule` or `options.keep`
    value: str
    where: str


class Settings(NamedTuple):
    """All settings, each as an attribute by its key."""

    values: Mapping[str, Any]
    overrides: Mapping[str, tuple[Override, ...]]  # by task name
    files: tuple[str, ...]  # the param files
    secrets: tuple[str, ...]  # values to mask
    doubled: tuple[str, ...]  # keys that stand twice, with both places

    def __getattr__(self, key: str) -> Any:
        try:
            return self.values[key]
        except KeyError:
            raise AttributeError(key) from None


def is_secret(key: str) -> bool:
    """Tell by its name that a key holds a secret; of an override only what it sets counts."""
    return any(word in key.lower().rpartition(".")[2] for word in SECRET_WORDS)


def read_settings(arguments: Mapping[str, str], script: str) -> Settings:
    """Return the settings of param files and arguments; an argument wins, and the last of equals.

    Relative paths lie beside the first param file, or beside ``script`` if there is none. Raises
    ConfigError with file and line, or RefusedError."""
    home = os.path.dirname(os.path.realpath(script))
    add_packages(os.path.join(home, "lib"))
    named = arguments.get("param_file", "").split(",")
    files = [os.path.abspath(file.strip()) for file in named if file.strip()]
    if "param_file" in arguments and not files:
        raise ConfigError("--param_file: names no file; give --param_file=PATH")
    default = os.path.join(home, "cron.params")
    if not files and os.path.lexists(default):
        files = [default]
    if not files and {"site-packages", "dist-packages"} & set(home.split(os.sep)):
        raise ConfigError("installed as a module: name your param file with --param_file=PATH")
    base = os.path.dirname(files[0]) if files else home
    params = [param for file in files for param in read_param_file(file, is_secret)]
    for param in params:
        if any(option.flag_only and option.key == param.key for option in OPTIONS):
            raise ConfigError(f"{param.where}: {param.key} is only an argument: --{param.key}=...")
    params += [Param(f"--{key}", key, value) for key, value in arguments.items()]
    values, overrides = _read_values(params)
    for key in PATHS:
        path = os.path.normpath(os.path.join(base, values[key]))
        values[key] = path if values[key] else ""
    values["node"] = values["node"] or os.uname().nodename
    tasks, state = values["tasks_dir"] + os.sep, values["state_dir"] + os.sep
    if tasks.startswith(state) or state.startswith(tasks):
        raise ConfigError(f"{state[:-1]}: tasks_dir and state_dir must lie apart; set state_dir")
    found = (param.value for param in params if is_secret(param.key))
    secrets = tuple(value for value in found if len(value) >= SHORTEST_MASKED)
    places: dict[str, str] = {}
    doubled: list[str] = []
    for param in (param for param in params if not param.where.startswith("--")):
        if param.key in places:
            doubled.append(f"{param.where}: {param.key} wins over the one in {places[param.key]}")
        places[param.key] = param.where
    return Settings(values, overrides, tuple(files), secrets, tuple(doubled))


def add_packages(folder: str) -> None:
    """Let packages in ``folder`` be found, after all others; RefusedError if it is unsafe."""
    if os.path.isdir(folder) and folder not in sys.path:
        refuse_unsafe(os.stat(folder), folder, "folder of packages")
        sys.path.append(folder)


def _read_values(
    params: Sequence[Param],
) -> tuple[dict[str, Any], dict[str, tuple[Override, ...]]]:
    options = {option.key: option for option in OPTIONS}
    values: dict[str, Any] = {}
    overrides: dict[str, tuple[Override, ...]] = {}
    for param in params:
        option = options.get(param.key)
        prefix, name, path = (param.key + "..").split(".", 2)
        if prefix == "task" and name and path.strip("."):
            override = Override(path.rstrip("."), param.value, param.where)
            overrides[name] = (*overrides.get(name, ()), override)
        elif option is None:
            hint = nearest(param.key, options)
            raise ConfigError(f"{param.where}: unknown key {shortened(param.key)!r}{hint}")
        elif param.value or not option.default:
            try:
                values[param.key] = option.read(param.value) if param.value else ""
            except ValueError as error:
                shown = "" if is_secret(param.key) else f" {shortened(param.value)!r}"
                raise ConfigError(f"{param.where}: {param.key}{shown} {error}") from None
    for option in OPTIONS:
        if option.key not in values:
            empty = () if option.read is read_names else ""
            values[option.key] = option.read(option.default) if option.default else empty
    return values, overrides


def refuse_bad_tz(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if TZ names no zone: C libraries take UTC then, and say nothing.

    Names and rules such as ``CET-1CEST,M3.5.0,M10.5.0/3`` are those of tzset(3)."""
    name = environ.get("TZ", "UTC")
    if name in ("", "UTC"):
        return
    word = r"([A-Za-z]{3,}|<[A-Za-z0-9+-]{3,}>)"
    rule = rf"{word}[+-]?\d[\d:]*({word}([+-]?\d[\d:]*)?(,[MJ]?[\d./:-]+,[MJ]?[\d./:-]+)?)?"
    try:
        if not re.fullmatch(rule, name):
            zoneinfo.ZoneInfo(name[1:] if name[0] == ":" else name)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"TZ: {shortened(name)!r} is no zone; unset TZ, or name one") from None


def distrib() -> str:
    """Return the text of cron.params.distrib."""
    lines = [
        "# Param file of bgtasks: copy it to cron.params and chmod 600 it.",
        "# key = value; '#' after a blank starts a comment; quote a value that holds '#'.",
        "# Any key can also be given as --key=value, and then that value is retained.",
    ]
    for option in OPTIONS:
        if not option.flag_only:
            lines += ["", f"# {option.help}", f"#{option.key} = {option.default}".rstrip()]
    lines += [
        *("", "# Settings of one task, changed without touching its file:"),
        *("#task.NAME.schedule = */10 * * * *", "#task.NAME.options.keep = 14", ""),
    ]
    return "\n".join(lines)


def option_help() -> str:
    """Return the lines of --help about the settings."""
    rows = [(f"--{o.key}={o.default}", o.help + " (flag only)" * o.flag_only) for o in OPTIONS]
    return "\n".join(f"  {flag:<34}{text}" for flag, text in rows)


# --- Schedule -------------------------------------------------------------------------------------
# In: the text of a schedule, and its zone. Out: planned moments, in whole Unix seconds. It must not
# ask for the time. A reading is what a local clock shows, in seconds as if that were UTC: croniter
# and times of day never meet a zone; walk() alone maps readings to moments.

_DAY = 86400
# Debian's cron(8): a clock set by up to three hours is daylight saving, by more it is corrected.
_CORRECTION = 3 * 3600
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": _DAY, "w": 7 * _DAY}
_LONG = {"sec": "s", "second": "s", "minute": "min", "hour": "h", "day": "d", "week": "w"}
# Not left to croniter, which spreads its own aliases over the day once it has a seed for H.
_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "daily 00:00",
    "@midnight": "daily 00:00",
    "@weekly": "sun 00:00",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_ALLOWED = "allowed are 'every 5 min', 'daily 03:30', 'mon,thu 07:00', cron's 5 fields, 'manual'"


class Zone:
    """A time zone by name; "" is the machine's own. Raises TaskError for an unknown one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tzinfo: Any = None
        if name:
            try:
                self.tzinfo = zoneinfo.ZoneInfo(name)
            except (KeyError, ValueError, OSError):  # OSError: a folder of zones
                known = zoneinfo.available_timezones()
                likely = nearest(name[:80], known) if known else ": pip install tzdata"
                raise TaskError(f"timezone: unknown zone {shortened(name)!r}{likely}") from None

    def local(self, moment: float) -> datetime:
        """Return the naive local time; its `fold` is 1 where the clock shows it again."""
        return datetime.fromtimestamp(moment, self.tzinfo).replace(tzinfo=None)

    def moments(self, local: datetime) -> list[float]:
        """Return when the clock shows ``local``, ascending: never in a gap, twice in a fold."""
        found = {local.replace(tzinfo=self.tzinfo, fold=fold).timestamp() for fold in (0, 1)}
        return sorted(moment for moment in found if self.local(moment) == local)

    def reading(self, moment: int) -> int:
        return int(self.local(moment).replace(tzinfo=timezone.utc).timestamp())

    def change(self, start: int, end: int, offset: int) -> int:
        """Return the first moment after ``start`` with another offset, or one after ``end``."""
        for power in range(19, -1, -1):  # steps of six days, then half of that, and so on
            while start < end and self.reading(start + 2**power) - start - 2**power == offset:
                start += 2**power
        return start + 1


class Rule(NamedTuple):
    """Gives the first reading after a reading, and follows real time or fixed times (see walk)."""

    after: Callable[[int], int]
    realtime: bool


def walk(zone: Zone, rule: Rule, moment: int) -> int:
    """Return the first moment of ``rule`` after ``moment``, by the rule of Debian's cron(8).

    In real time, every matching reading counts. A fixed time that a gap skipped comes right after
    it; in a fold it comes once. Readings are in order only between two changes of the clock.
    """
    local = zone.local(moment)
    if local.fold and not rule.realtime:
        first = int(zone.moments(local)[0])
        if moment - first < _CORRECTION:
            moment = zone.change(first, moment, zone.reading(first) - first) - 1
    reading = asked = planned = zone.reading(moment)
    while True:
        if not asked <= reading < planned:
            asked, planned = reading, rule.after(reading)
        due = moment + planned - reading
        change = zone.change(moment, due, reading - moment)
        if change > due:
            return due
        old, new = reading + change - moment, zone.reading(change)
        if not rule.realtime and planned < new <= old + _CORRECTION:
            return change
        repeated = old - new if not rule.realtime and 0 < old - new < _CORRECTION else 0
        moment, reading = change + repeated - 1, new + repeated - 1


class Schedule(NamedTuple):
    text: str
    zone: Zone
    always: bool
    periods: tuple[int, ...]
    rules: tuple[Rule, ...]
    anchor: float

    def next_after(self, moment: float, started: float | None = None) -> float | None:
        """Return the first planned moment after ``moment``, None if there is none.

        Fixed times up to ``started``, the last slot that was started, do not come again when the
        clock was set back behind it; by more than three hours it was corrected, see cron(8).
        """
        held = moment if started is None or started - moment > _CORRECTION else max(moment, started)
        periods = [self.anchor + ((moment - self.anchor) // p + 1) * p for p in self.periods]
        rules = [walk(self.zone, r, int((moment if r.realtime else held) // 1)) for r in self.rules]
        return min([*periods, *rules], default=None)

    def anchor_for(self, now: float) -> float:
        """Return where the grid of a new task begins: if a period is of minutes, on a minute."""
        step = 60 if any(period % 60 == 0 for period in self.periods) else 1
        return now // step * step

    def missed(self, slot: float, now: float) -> int:
        """Return how many planned moments lie after ``slot``, up to ``now``: the missed ones.

        Of fixed times no more than 1,000 are counted."""
        if not self.rules:
            return sum(
                int((now - self.anchor) // p - (slot - self.anchor) // p) for p in self.periods
            )
        number, moment = 0, self.next_after(slot)
        while moment is not None and moment <= now and number < 1000:
            number, moment = number + 1, self.next_after(moment)
        return number

    def latest(self, moment: float) -> float | None:
        """Return the last planned moment up to ``moment``, None if two years before have none."""
        for seconds in (3600, _DAY, 8 * _DAY, 32 * _DAY, 732 * _DAY):
            found, later = None, self.next_after(moment - seconds)
            while later is not None and later <= moment:
                found, later = later, self.next_after(later)
            if found is not None:
                return found
        return None

    def first(self, now: float) -> float | None:
        """Return when a task that was never seen before is due; with `every`, it is already."""
        return self.anchor_for(now) if self.periods else self.next_after(now)


class Window(NamedTuple):
    """Hours in which a task may start, as minutes of the local day; equal ends: the whole day."""

    start: int
    end: int

    def opens(self, zone: Zone, moment: float) -> float:
        """Return ``moment`` if it lies in the window, else when the window opens next."""
        local = zone.local(moment)
        minutes = local.hour * 60 + local.minute - self.start
        if self.start == self.end or minutes % 1440 < (self.end - self.start) % 1440:
            return moment
        opening = _daily(set(range(7)), f"{self.start // 60:02}:{self.start % 60:02}")
        return walk(zone, Rule(opening, realtime=False), int(moment))


def parse_window(text: str) -> Window:
    """Return the hours of ``22:00-06:00``. Raises TaskError."""
    start, dash, end = (part.strip(" ") for part in text.partition("-"))
    if not dash:
        raise TaskError(f"window: {shortened(text)!r}; write it as 22:00-06:00")
    return Window(_minutes(start, "window"), _minutes("00:00" if end == "24:00" else end, "window"))


def never_meets(schedule: Schedule, window: Window) -> bool:
    """Tell whether no fixed time of a week (at least 60) lies in the window; `every` can wait."""
    if not schedule.rules or schedule.periods or schedule.always:
        return False
    thursday = 1_767_225_600.0
    moment, slots = schedule.next_after(thursday), 0
    while moment is not None and (slots < 60 or moment < thursday + 8 * _DAY):
        if window.opens(schedule.zone, moment) == moment:
            return False
        moment, slots = schedule.next_after(moment), slots + 1
    return True


def parse_schedule(
    text: str | Sequence[str], zone: Zone, anchor: float = 0.0, spread: str = ""
) -> Schedule:
    """Return the schedule: the earliest of several texts; ``spread`` seeds `H`.

    Raises TaskError, or MissingPackageError for a cron expression without croniter.
    """
    texts = _texts(text)
    periods: list[int] = []
    rules: list[Rule] = []
    for i, part in enumerate(texts):
        if part.lower().startswith("every"):
            period, texts[i] = _period(part.lower())
            periods.append(period)
        elif part.lower() not in ("always", "manual"):
            rules.append(_rule(part.lower(), spread.encode(errors="replace")))
    always = any(part.lower() == "always" for part in texts)
    return Schedule(", ".join(texts), zone, always, tuple(periods), tuple(rules), anchor)


def schedule_notes(text: str | Sequence[str]) -> list[str]:
    """Return what may surprise the writer of a valid schedule."""
    notes: list[str] = []
    for words in (part.split() for part in _texts(text) if part.count(" ") == 4):
        for word, field in zip(words, _FIELDS):
            if word.startswith("*/") and _number(word[2:]) > field.high - field.low:
                notes.append(f"{word} is larger than the field: the same as {field.low}")
        day, weekday = words[2], words[4]
        if "*" not in (day, weekday):
            both = "both must match, because one begins with *"
            rule = both if "*" in (day[0], weekday[0]) else "either matches (Debian's cron)"
            notes.append(f"day of month and day of week are both set: {rule}")
    return notes


def _texts(text: str | Sequence[str]) -> list[str]:
    texts = [t.replace("\t", " ").strip(" ") for t in ([text] if isinstance(text, str) else text)]
    if not texts or not all(t.isascii() and t.isprintable() and 0 < len(t) <= 256 for t in texts):
        raise TaskError(f"schedule: {shortened(str(text))!r} is not 1 to 256 letters; {_ALLOWED}")
    return [" ".join(t.split()).replace(", ", "," if ":" in t else ", ") for t in texts]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _period(text: str) -> tuple[int, str]:
    rest = text[len("every") :].strip(" ")
    word = rest.lstrip("0123456789")
    number = _number(rest[: len(rest) - len(word)])
    unit = _LONG.get(word.strip(" ").removesuffix("s"), word.strip(" "))
    if not 1 <= number * _UNITS.get(unit, 0) <= 366 * _DAY:
        raise TaskError(f"schedule: {shortened(text)!r}; allowed is 1 s to 366 d (s, min, h, d, w)")
    return number * _UNITS[unit], f"every {number} {unit}"


def _rule(text: str, seed: bytes) -> Rule:
    if text.startswith("@") and text not in _ALIASES:
        raise TaskError(f"schedule: {shortened(text)!r}; allowed are {', '.join(_ALIASES)}")
    word, _, times = _ALIASES.get(text, text).partition(" ")
    names = {"daily": "sun-sat", "weekdays": "mon-fri", "weekends": "sat-sun"}.get(word, word)
    if ":" not in times and names == word:
        return Rule(_cron(f"{word} {times}".strip(), seed), realtime="*" in (word[0], times[:1]))
    if not set(names.replace("-", ",").split(",")) <= set(_FIELDS[4].names.split()):
        raise _FIELDS[4].refused(word)
    days = {day % 7 for name in names.split(",") for day in _FIELDS[4].span(name)}
    return Rule(_daily(days, times), realtime=False)


def _daily(days: set[int], times: str) -> Callable[[int], int]:
    week: list[int] = []  # seconds after a Thursday's 00:00, as the epoch was
    for text in times.split(","):
        week.extend((day - 4) * _DAY + _minutes(text, "schedule") * 60 for day in days)
    return lambda reading: reading + 1 + min((t - reading - 1) % (7 * _DAY) for t in week)


def _minutes(text: str, what: str) -> int:
    """Return the minutes of the day of a time such as ``07:30``."""
    hour, minute = _number(text[:2]), _number(text[3:])
    if len(text) != 5 or text[2] != ":" or not (0 <= hour < 24 and 0 <= minute < 60):
        raise TaskError(f"{what}: time {shortened(text)!r}; allowed are 00:00 to 23:59")
    return hour * 60 + minute


class Field(NamedTuple):
    name: str
    low: int
    high: int
    names: str = "no names"

    def refused(self, part: str) -> TaskError:
        return TaskError(
            f"schedule: {self.name}: {shortened(part, 40)!r}; allowed are {self.low}-{self.high}, "
            f"lists, rising ranges, steps as */2, H, for days L, 15W, L5, 5#2; {self.names}"
        )

    def value(self, text: str) -> int:
        names = self.names.split()
        number = self.low + names.index(text) if text in names else _number(text)
        if not self.low <= number <= self.high + (self.high == 6):  # both 0 and 7 are Sunday
            raise self.refused(text)
        return number

    def span(self, part: str) -> range:
        base, slash, step = part.partition("/")
        first, dash, last = base.partition("-")
        low = self.low if base == "*" else self.value(first)
        high = self.high if slash or base == "*" else low
        if dash:
            high = 7 if low and last == "sun" else self.value(last)
        by = _number(step) if slash else 1
        if high < low or by < 1:
            raise self.refused(part)
        return range(low, high + 1, by)

    def plain(self, text: str) -> str:
        """Return the field as a list, for all that croniter reads (`5-5` as 0-59) is not cron's."""
        if text.startswith("h"):
            return "h(1-28)" if text == "h" and self.high == 31 else text  # as Jenkins does
        numbers: set[int] = set()
        special: list[str] = []
        for part in text.split(","):
            day = self.high == 31 and (part == "l" or part.strip("w").isdigit() > part.isdigit())
            if day or (self.high == 6 and (part.startswith("l") or "#" in part)):
                special.append(part)
            else:
                numbers.update(n if n <= self.high else self.low for n in self.span(part))
        words = [*map(str, sorted(numbers)), *special]
        return ",".join(words) if len(numbers) <= self.high - self.low else "*"


_FIELDS = (
    Field("minute", 0, 59),
    Field("hour", 0, 23),
    Field("day of month", 1, 31),
    Field("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    Field("day of week", 0, 6, "sun mon tue wed thu fri sat"),
)


def _cron(text: str, seed: bytes) -> Callable[[int], int]:
    words = text.split()
    if len(words) != len(_FIELDS):
        raise TaskError(f"schedule: {shortened(text)!r} has not 5 fields; {_ALLOWED}")
    minute, hour, day, month, weekday = (f.plain(w) for f, w in zip(_FIELDS, words))
    dates = [f"{day} {month} {weekday}"]
    if "*" not in (words[2][0], words[4][0]):  # croniter's own "either" overlooks `#` and W
        dates = [f"{day} {month} *", f"* {month} {weekday}"]
    longest = 29 if month == "2" else 31 - (set(month.split(",")) <= {"2", "4", "6", "9", "11"})
    if day.replace(",", "").isdigit() and int(day.split(",")[0]) > longest:
        dates = dates[1:]
    if not dates:
        raise TaskError(f"schedule: day of month: {day} never comes in month {month}")
    try:
        from croniter import croniter

        crons = [croniter(f"{minute} {hour} {d}", 0, day_or=False, hash_id=seed) for d in dates]
        for cron in crons:
            cron.get_next(float)
    except ImportError:
        raise MissingPackageError("schedule: needs croniter: pip install croniter") from None
    except ValueError as error:  # what croniter raises for everything it does not like
        raise TaskError(f"schedule: {shortened(text)!r}: croniter: {error}") from None
    return lambda reading: int(min(c.get_next(float, start_time=reading) for c in crons))


# --- Tasks ----------------------------------------------------------------------------------------
# The folder tasks.d goes in; what can run, what is broken and what is ignored comes out, with the
# reasons. Nothing here runs a task, and a file that did not change since it was read is not opened.

READ_AT_MOST = 1 << 20
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
IGNORED = {
    "an editor's backup": ("~", ".bak", ".orig", ".old", ".rej", ".save", ".swp", ".swo"),
    "an unfinished upload": (".tmp", ".part", ".filepart", ".crdownload", ".upload"),
    "left by a package manager": (".dpkg-new", ".dpkg-old", ".dpkg-dist", ".rpmnew", ".rpmsave"),
    "no program": (".md", ".rst", ".txt", ".pyc", "readme", "license", "makefile"),
}
RESERVED_NAMES = ("con prn aux nul " + " ".join(f"com{n} lpt{n}" for n in range(10))).split()
INTERPRETERS = {"sh": "sh", "bash": "bash", "pl": "perl", "rb": "ruby", "php": "php"} | (
    {"js": "node", "lua": "lua", "r": "Rscript", "ps1": "pwsh -File"}
)

Row = Mapping[str, Any]  # as the store returns it


class Task(NamedTuple):
    """A file in tasks.d as it was read: what to run, and when. Broken if ``error`` says why."""

    name: str
    file: str
    fingerprint: str = ""
    script: str = ""  # the file that runs; empty for a `command`
    argv: tuple[str, ...] = ()  # how a program is started; empty for a Python task
    settings: Mapping[str, Any] = {}
    error: str = ""


def of_type(kind: type, what: str) -> Callable[[Any], Any]:
    """Return a reader that takes a value of one TOML type only (a boolean is no number)."""

    def read(value: Any) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"must be {what}")
        return value

    return read


read_text = of_type(str, "text in quotes")
read_table = of_type(dict, "a table")
read_list = of_type(list, 'a list such as ["a", "b"]')


def whole_number(low: int, high: int) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not low <= of_type(int, "a whole number")(value) <= high:
            raise ValueError(f"must be from {low} to {high}")
        return value

    return read


def read_seconds(value: Any) -> float:
    seconds = read_duration(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not 1 <= seconds <= 366 * 86400:
        raise ValueError('must be from 1 second to 366 days, such as 90 or "10 min"')
    return float(seconds)


def read_size(value: Any) -> int:
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    if isinstance(value, str):
        number, _, unit = value.partition(" ")
        if unit not in units or not (number.isascii() and number.isdigit()):
            raise ValueError('must be bytes, or a size such as "64 MiB" (KiB, MiB, GiB)')
        value = int(number) * units[unit]
    return int(whole_number(1 << 10, 1 << 50)(value))


def read_words(value: Any) -> list[str]:
    return [str(read_text(item)) for item in read_list(value)]


def read_window(value: Any) -> str:
    parse_window(read_text(value))
    return str(value)


def read_nodes(value: Any) -> list[str]:
    return read_words(value) if isinstance(value, list) else list(read_names(read_text(value)))


def read_wakeups(value: Any) -> list[str]:
    if not value or not set(read_words(value)) <= {"cli", "web"}:
        raise ValueError('must be a list of "cli" and "web"')
    return list(value)


def read_environment(value: Any) -> dict[str, str]:
    for name, text in read_table(value).items():
        if not isinstance(text, str) or "=" in name or name.startswith("BGTASKS_"):
            raise ValueError(f"{shortened(name)}: must be text, under a name without BGTASKS_")
    return dict(value)


def list_or_text(read: Callable[[str], tuple[str, ...]]) -> Callable[[Any], list[str]]:
    """Return a reader that takes a list too, of what ``read`` takes between commas."""
    return lambda v: list(read(v if isinstance(v, str) else ",".join(read_words(v))))


def read_url(value: Any) -> str:
    from urllib.parse import urlsplit

    text: str = read_text(value)
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # in its port, or brackets
        raise ValueError("must be a URL that begins with https:// or http://") from None
    if not good or "@" in parts.netloc or set(text) - set(map(chr, range(33, 127))):
        raise ValueError("must be a URL that begins with https:// or http://, without a login")
    return text


def read_choice(*choices: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return read


def read_setting_names(value: Any) -> list[str]:
    known = [option.key for option in OPTIONS]
    for name in read_words(value):
        if name not in known:
            raise ValueError(f"there is no parameter {shortened(name)!r}{nearest(name, known)}")
    return list(value)


# What a task may say of itself: how the value is read, and what holds when it says nothing.
TASK_SETTINGS: Mapping[str, tuple[Callable[[Any], Any], Any]] = {
    "description": (read_text, ""),
    "schedule": (lambda value: value if isinstance(value, str) else read_words(value), ""),
    "timezone": (read_text, ""),
    "enabled": (of_type(bool, "true or false"), True),
    "order": (whole_number(-1_000_000, 1_000_000), 100),
    "group": (read_text, "default"),
    "deadline": (read_seconds, None),
    "timeout": (read_seconds, 86400.0),
    "on_interrupt": (read_choice("wait", "again"), "wait"),
    "window": (read_window, ""),
    "nodes": (read_nodes, ["one"]),
    "wakeup": (read_wakeups, ["cli", "web"]),
    "after": (read_words, []),
    "missed_after": (read_seconds, None),
    "retries": (whole_number(0, 1000), 3),
    "retry_delay": (read_seconds, 60.0),
    "pause_after_failures": (whole_number(0, 1_000_000), 0),
    "history_lifetime": (read_seconds, None),
    "notify": (list_or_text(read_addresses), None),
    "notify_on": (list_or_text(read_news), None),
    "notify_after": (whole_number(1, 1000), None),
    "ping": (read_url, ""),
    "maximum": (whole_number(1, 1_000_000_000), None),
    "options": (read_table, {}),
    "settings": (read_setting_names, []),
    "nice": (whole_number(0, 19), 0),
    "memory_limit": (read_size, None),
    "output_limit": (read_size, 64 << 20),
    "env": (read_environment, {}),
}


def ignored_because(file: str) -> str:
    """Return why a file of this name is no task, or nothing if it may be one."""
    stem = os.path.splitext(file)[0]
    if file[0] in ".#_":
        return f"its name begins with {file[0]}"
    for reason, endings in IGNORED.items():
        if file.lower().endswith(endings) or stem.lower() in endings:
            return reason
    if stem.lower() in RESERVED_NAMES:
        return "a name that Windows reserves"
    if len(stem) > 64 or stem[0] == "-" or not NAME_CHARACTERS.issuperset(stem):
        return "a task's name has letters, digits, _ and -, at most 64, and does not begin with -"
    return ""


def scan(folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the files that may be tasks with what `stat` says of each, and the ignored ones.

    A file that is saved, replaced, or given other permissions has another `stat` text; a link that
    leads nowhere has an empty one. Raises ConfigError if the folder cannot be read."""
    stats: dict[str, str] = {}
    ignored: dict[str, str] = {}
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        what = f"{folder}: cannot read the folder of tasks ({error.strerror})"
        raise ConfigError(f"{what}; make it, or set tasks_dir") from None
    for entry in entries:
        reason = ignored_because(entry.name) or (entry.is_dir() and "a folder")
        if reason:
            ignored[entry.name] = reason
            continue
        try:
            s = entry.stat()
        except OSError:
            stats[entry.name] = ""
            continue
        stats[entry.name] = (
            f"{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}"
            f":{s.st_mode}:{s.st_uid}:{s.st_gid}"
        )
    return stats, ignored


def discover(
    settings: Settings, known: Mapping[str, Row]
) -> tuple[list[Task], list[str], dict[str, str]]:
    """Return the tasks whose files are new or changed since they were ``known`` (file, script and
    fingerprint by name), the names of those that are gone, and the ignored files with reasons."""
    stats, ignored = scan(settings.tasks_dir)
    scripts: dict[str, str] = {}  # .toml file -> the script that it names
    for file in stats:
        if file.endswith(".toml"):
            old = known.get(file[:-5])
            same = old and old["file"] == file and old["fingerprint"].startswith(stats[file] + ";")
            scripts[file] = (
                old["script"] if old and same else named_script(settings.tasks_dir, file)
            )
    named = set(scripts.values())
    groups: dict[str, list[str]] = {}
    for file in sorted(stats):
        if file not in named:
            groups.setdefault(file.rpartition(".")[0].lower() or file.lower(), []).append(file)
    changed: list[Task] = []
    names: set[str] = set()
    common = f"{__version__};{settings.timezone};{settings.node}"
    for files in groups.values():
        together = ";".join([stats[file] for file in files])
        for file in files:
            name = file.rpartition(".")[0] or file
            names.add(name)
            script_stat = stats.get(scripts.get(file, ""), "")
            overrides = settings.overrides.get(name, "")
            fingerprint = f"{together};{script_stat};{common};{overrides}"
            old = known.get(name)
            if old and old["fingerprint"] == fingerprint:
                continue
            task = Task(name, file, fingerprint)
            if len(files) > 1:
                changed.append(task._replace(error=f"same name: {', '.join(files)}; rename one"))
            else:
                changed.append(read_task(settings, task))
    gone = [name for name, old in known.items() if old["file"] and name not in names]
    return changed, gone, ignored


def named_script(folder: str, file: str) -> str:
    """Return the script that a .toml file names, or nothing."""
    try:
        return str(read_raw(os.path.join(folder, file))[0].get("script", ""))
    except (BgtasksError, OSError):
        return ""  # read_task() meets the same error and keeps it as the reason


def read_task(settings: Settings, task: Task) -> Task:
    """Read the file of a task. What is wrong with it becomes the task's ``error``."""
    try:
        return _read_task(settings, task)
    except MissingPackageError as error:
        # an empty fingerprint is never equal: the package may be there at the next look
        return task._replace(error=shortened(f"{task.file}: {error}", 400), fingerprint="")
    except BgtasksError as error:
        return task._replace(error=shortened(str(error), 400))
    except OSError as error:
        return task._replace(error=f"{task.file}: cannot be read ({error.strerror})")


def _read_task(settings: Settings, task: Task) -> Task:
    path: str = os.path.join(settings.tasks_dir, task.file)
    raw, content = read_raw(path)
    for override in settings.overrides.get(task.name, ()):
        _override(raw, override)
    if not task.file.endswith(".toml"):
        values = _checked(raw, task, settings)
        return task._replace(script=task.file, argv=_argv(path, content), settings=values)
    command, script = raw.pop("command", None), raw.pop("script", None)
    values = _checked(raw, task, settings)
    try:
        if (command is None) == (script is None) or command == []:
            raise ValueError
        if command is not None:
            return task._replace(argv=tuple(read_words(command)), settings=values)
        path = os.path.join(settings.tasks_dir, os.path.basename(str(read_text(script))))
    except ValueError:
        text = 'needs either command = ["program", "argument"] or script = "a file beside it"'
        raise TaskError(f"{task.file}: {text}") from None
    argv = _argv(path, read_checked(path))
    return task._replace(script=os.path.basename(path), argv=argv, settings=values)


def read_checked(path: str) -> bytes:
    """Return the content of a task file. Raises RefusedError, TaskError or OSError."""
    try:
        return read_safe(path, "task", READ_AT_MOST)[0]
    except ValueError as error:
        raise TaskError(f"{os.path.basename(path)}: {error}") from None


def read_raw(path: str) -> tuple[dict[str, Any], bytes]:
    """Return the settings that a file holds, as TOML gives them, and the file's content."""
    content, file = read_checked(path), os.path.basename(path)
    if file.endswith(".toml"):
        return _parse_toml(content, file, 0), content
    first, block = _settings_block(content, file)
    try:
        tool = read_table(_parse_toml(block, file, first).get("tool", {}))
        return read_table(tool.get("bgtasks", {})), content
    except ValueError:
        raise TaskError(f"{file}:{first}: tool.bgtasks must be a table") from None


def _settings_block(content: bytes, file: str) -> tuple[int, bytes]:
    """Return the number of the line before the block and its TOML text (empty if there is none).

    https://packaging.python.org/en/latest/specifications/inline-script-metadata/"""
    first, block, closed = 0, list[bytes](), True
    rule = "the block '# /// script' ends with '# ///', and every line in it begins with '# '"
    for number, line in enumerate(content.replace(b"\r\n", b"\n").split(b"\n"), start=1):
        if line == b"# /// script":
            if first:
                raise TaskError(f"{file}:{number}: a second block '# /// script'; keep one")
            first, closed = number, False
        elif not closed:
            closed = line == b"# ///"
            if line != b"#" and not line.startswith(b"# "):
                raise TaskError(f"{file}:{number}: {rule}")
            block += [] if closed else [line[2:]]
    if not closed:
        raise TaskError(f"{file}:{first}: {rule}")
    return first, b"\n".join(block)


def _parse_toml(text: bytes, file: str, offset: int) -> dict[str, Any]:
    """Parse TOML that stands ``offset`` lines down in ``file``."""
    if not text.strip():
        return {}
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib  # pragma: no cover (Python 3.10 and older)
    except ImportError:
        raise MissingPackageError("needs tomli: pip install tomli") from None
    try:
        return tomllib.loads(text.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line = offset + 1 + text.count(b"\n", 0, error.start)
        raise TaskError(f"{file}:{line}: settings must be UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        what, _, place = str(error).partition(" (at ")
        number = place.partition(",")[0].replace("line ", "")
        line = offset + (int(number) if number.isdigit() else text.count(b"\n") + 1)
        raise TaskError(f"{file}:{line}: {what}") from None


def _override(raw: dict[str, Any], override: Override) -> None:
    """Put an administrator's choice from the param file into the settings of a task."""
    name, _, key = override.path.partition(".")
    if name not in TASK_SETTINGS or bool(key) != (name in ("options", "env")):
        hint = nearest(override.path, TASK_SETTINGS)
        path = shortened(override.path)
        raise TaskError(f"{override.where}: a task has no setting {path!r}{hint}")
    table = raw.setdefault(name, {}) if key else raw
    key = key or name
    try:
        table[key] = _like(table.get(key, TASK_SETTINGS[name][1]), override.value)
    except (ValueError, AttributeError) as error:
        raise TaskError(f"{override.where}: {override.path}: {error}") from None


def _like(value: Any, text: str) -> Any:
    """Return ``text`` as the type of the value it replaces."""
    if isinstance(value, bool):
        return read_boolean(text)
    if isinstance(value, int):
        if not text.isascii() or not text.lstrip("-").isdigit():
            raise ValueError(f"must be a whole number, not {shortened(text)!r}")
        return int(text)
    if isinstance(value, float):
        return read_duration(text)
    if isinstance(value, list):
        return list(read_names(text))
    return int(text) if value is None and text.isascii() and text.isdigit() else text


def _checked(raw: Mapping[str, Any], task: Task, settings: Settings) -> dict[str, Any]:
    """Return all settings of a task, those it does not name with their defaults."""
    for key in raw:
        if key not in TASK_SETTINGS:
            hint = nearest(key, TASK_SETTINGS)
            raise TaskError(f"{task.file}: there is no setting {shortened(key)!r}{hint}")
    overrides = settings.overrides.get(task.name, ())
    places = {override.path.partition(".")[0]: override.where for override in overrides}
    values: dict[str, Any] = {}
    for key, (read, default) in TASK_SETTINGS.items():
        try:
            values[key] = read(raw[key]) if key in raw else default
        except TaskError as error:
            raise TaskError(f"{places.get(key, task.file)}: {error}") from None
        except (ValueError, TypeError) as error:
            raise TaskError(f"{places.get(key, task.file)}: {key}: {error}") from None
    if not values["schedule"]:
        text = '"# /// script", "# [tool.bgtasks]", "# schedule = ...", "# ///"'
        raise TaskError(f"{task.file}: has no schedule; add {text}")
    try:
        schedule = schedule_of(values, settings, task.name)
    except MissingPackageError:
        raise
    except TaskError as error:
        key = str(error).partition(":")[0]
        raise TaskError(f"{places.get(key, task.file)}: {error}") from None
    if values["window"] and never_meets(schedule, parse_window(values["window"])):
        text = f"window: {values['window']} never meets the schedule {schedule.text!r}"
        raise TaskError(f"{places.get('window', task.file)}: {text}; change one of them")
    return values


def with_after_errors(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks that `after` makes broken, or no longer does: an unknown name, a circle."""
    known = {task.name: task for task in tasks if task.file}
    changed: list[Task] = []
    for task in known.values():
        names = task.settings.get("after", ())
        error, seen, rest = "", set[str](), list(names)
        while rest:
            name = rest.pop()
            if name == task.name:
                error = f"{task.file}: after: {', '.join(names)}: is a circle; take a name out"
            elif name not in seen and name in known:
                seen.add(name)
                rest += known[name].settings.get("after", ())
        for name in names:
            if name not in known:
                hint = nearest(name, known)
                error = f"{task.file}: after: there is no task {shortened(name)!r}{hint}"
        ours = task.error.startswith(f"{task.file}: after: ")
        if (ours or not task.error) and error != task.error:
            changed.append(task._replace(error=error))
    return changed


def schedule_of(
    values: Mapping[str, Any], settings: Settings, name: str, anchor: float = 0.0
) -> Schedule:
    """Return the schedule of a task, its grid laid at ``anchor`` (Unix seconds)."""
    zone = Zone(values["timezone"] or settings.timezone)
    return parse_schedule(values["schedule"], zone, anchor, f"{settings.node}/{name}")


def _argv(path: str, content: bytes) -> tuple[str, ...]:
    """Return how the program at ``path`` is started; nothing for a Python task."""
    file = os.path.basename(path)
    suffix = os.path.splitext(file)[1].lower()
    if suffix == ".py":
        return () if _has_run(content, file) else (sys.executable, path)
    shebang = content[:2] == b"#!"
    if os.access(path, os.X_OK) and (shebang or suffix[1:] not in INTERPRETERS):
        return (path,)
    if shebang:  # FTP loses the x bit
        line = content[2:].split(b"\n", 1)[0].decode("utf-8", "surrogateescape")
        return (*line.strip().split(None, 1), path)
    if suffix[1:] in INTERPRETERS:
        return (*INTERPRETERS[suffix[1:]].split(), path)
    raise TaskError(f"{file}: cannot tell how to start it; chmod +x it, or begin it with #!")


def _has_run(content: bytes, file: str) -> bool:
    """Tell whether a Python file has ``def run(task)`` at its top level, without executing it."""
    try:
        tree = ast.parse(content)
    except SyntaxError as error:
        raise TaskError(f"{file}:{error.lineno or 1}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise TaskError(f"{file}: {str(error) or 'is nested too deeply'}") from None
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == "run":
            places = len(node.args.posonlyargs) + len(node.args.args)
            if isinstance(node, ast.AsyncFunctionDef) or places - len(node.args.defaults) != 1:
                raise TaskError(f"{file}:{node.lineno}: must be written as: def run(task):")
            return True
    return False


# --- Store ----------------------------------------------------------------------------------------
# What is remembered, in one SQLite file. All SQL of this program stands here; moments come in as
# Unix seconds, never from SQL. No transaction is open while a task runs or a process is started.

RUNNING, DONE, NOTHING, MORE = "running", "done", "nothing", "more"
FAILED, TIMED_OUT, KILLED, INTERRUPTED = "failed", "timed_out", "killed", "interrupted"
FAILURES = (FAILED, TIMED_OUT)
TROUBLES = ("failing", "still failing", "interrupted", "paused", "hanging", "missed")
APPLICATION_ID = int.from_bytes(b"bgts", "big")
OLDEST_SQLITE = (3, 26)
WAKEUPS_KEPT = 200
HISTORY_BYTES = 100_000_000
REMOVED = "[removed, as the history was too large]\n"

# The length of this tuple is the version of the file (`user_version`). An entry that was released
# is never changed; each is applied in one transaction.
MIGRATIONS = (
    """
    -- what is known of each task; one whose file is gone keeps its row, with an empty `file`
    CREATE TABLE task (
        name TEXT PRIMARY KEY,
        file TEXT NOT NULL, script TEXT NOT NULL,      -- in tasks.d; the script that a .toml names
        fingerprint TEXT NOT NULL,                     -- differs when the file must be read again
        definition TEXT NOT NULL,                      -- how it runs and its settings, JSON
        error TEXT NOT NULL,                           -- why it is broken; empty if it is not
        enabled INTEGER NOT NULL, always INTEGER NOT NULL DEFAULT 0,
        "order" INTEGER NOT NULL, "group" TEXT NOT NULL,
        schedule TEXT NOT NULL DEFAULT '',             -- to notice that it changed
        anchor_at INTEGER NOT NULL DEFAULT 0,          -- where the grid of `every` lies
        next_run_at INTEGER, last_slot INTEGER,        -- the next slot, if one is planned; the last
        extra_at REAL, extra_trigger TEXT,             -- a start that has no slot, and what asked
        paused_at REAL, paused_by TEXT, paused_until REAL, paused_note TEXT,
        runs INTEGER NOT NULL DEFAULT 0,
        ended INTEGER NOT NULL DEFAULT 0,              -- runs whose duration is known
        failures INTEGER NOT NULL DEFAULT 0, consecutive_failures INTEGER NOT NULL DEFAULT 0,
        first_started_at REAL, last_started_at REAL, last_ended_at REAL,
        last_success_at REAL,                          -- the start of the last run that succeeded
        last_outcome TEXT,
        last_overran INTEGER NOT NULL DEFAULT 0,       -- it went on after its deadline
        last_seconds REAL, min_seconds REAL, max_seconds REAL,
        total_seconds REAL NOT NULL DEFAULT 0, volume INTEGER NOT NULL DEFAULT 0,
        state TEXT NOT NULL DEFAULT '{}',              -- the task's own, JSON
        CHECK ((extra_at IS NULL) = (extra_trigger IS NULL)),
        CHECK ((paused_at IS NULL) = (paused_by IS NULL))
    );
    -- a row an execution, from claim to outcome
    CREATE TABLE run (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        task TEXT NOT NULL,
        slot INTEGER,                                  -- only of a first start by schedule
        steps INTEGER NOT NULL,                        -- how often the clock had been set back
        planned_at REAL NOT NULL, started_at REAL NOT NULL, deadline_at REAL NOT NULL,
        ended_at REAL, outcome TEXT NOT NULL DEFAULT 'running',
        reason TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '', volume INTEGER,
        exit_code INTEGER,                             -- negative: ended by that signal
        peak_kib INTEGER, output TEXT NOT NULL DEFAULT '',
        trigger TEXT NOT NULL, node TEXT NOT NULL,
        live TEXT NOT NULL UNIQUE,                     -- the name of its files while it runs
        acknowledged_at REAL,
        CHECK (outcome IN ('running', 'done', 'nothing', 'more', 'failed', 'timed_out', 'killed',
                           'interrupted', 'missed')),
        CHECK ((ended_at IS NULL) = (outcome = 'running')),
        CHECK (ended_at >= started_at)
    );
    -- a task has at most one open run
    CREATE UNIQUE INDEX run_open ON run (task) WHERE ended_at IS NULL;
    -- a slot is started once; after the clock was set back the same moment is another slot
    CREATE UNIQUE INDEX run_slot ON run (task, slot, steps) WHERE slot IS NOT NULL;
    -- the history of a task
    CREATE INDEX run_by_task ON run (task, id);
    -- the last wake-ups; one without an end is at work, or was killed
    CREATE TABLE wakeup (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        started_at REAL NOT NULL, ended_at REAL,
        trigger TEXT NOT NULL, user TEXT NOT NULL, node TEXT NOT NULL, selection TEXT NOT NULL,
        result TEXT NOT NULL CHECK (result IN ('worked', 'busy', 'maintenance')),
        started INTEGER NOT NULL, failed INTEGER NOT NULL
    );
    -- who paused, resumed or changed what
    CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL, task TEXT NOT NULL, by TEXT NOT NULL, what TEXT NOT NULL
    );
    -- 'steps': how often the clock was set back; 'boot': in which the locks were tested
    CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
    """
    ALTER TABLE task ADD COLUMN "after" INTEGER NOT NULL DEFAULT 0;  -- manual, and follows others
    ALTER TABLE task ADD COLUMN not_before REAL;       -- after a failure: the next try
    ALTER TABLE task ADD COLUMN last_good_end_at REAL; -- the end of the last run that succeeded
    ALTER TABLE task ADD COLUMN deferred INTEGER NOT NULL DEFAULT 0;       -- wake-ups without time
    ALTER TABLE task ADD COLUMN interruptions INTEGER NOT NULL DEFAULT 0;  -- crashes in a row
    ALTER TABLE run ADD COLUMN missed_slots INTEGER NOT NULL DEFAULT 0;    -- that it stands for
    -- what was cut short and nobody has seen yet
    CREATE INDEX run_unseen ON run (task) WHERE outcome = 'interrupted' AND acknowledged_at IS NULL;
    -- why a task did not run though it was due: in how many wake-ups, from when to when
    CREATE TABLE skip (
        task TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
        count INTEGER NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL,
        PRIMARY KEY (task, reason, first_at)
    );
    CREATE INDEX event_by_task ON event (task, id);
    -- who may wake it and change something; once there is one, nobody else may
    CREATE TABLE admin (login TEXT PRIMARY KEY, hash TEXT NOT NULL, added_at REAL NOT NULL);
    """,
    """
    ALTER TABLE task ADD COLUMN told TEXT NOT NULL DEFAULT '';    -- the troubles that people know
    ALTER TABLE task ADD COLUMN told_at REAL;
    ALTER TABLE task ADD COLUMN good TEXT NOT NULL DEFAULT '{}';  -- how all was when it worked
    -- what people are still to be told
    CREATE TABLE notice (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL, task TEXT NOT NULL, run INTEGER, kind TEXT NOT NULL, about TEXT NOT NULL
    );
    """,
)
# what its schedule may start at :now
STARTABLE = """file <> '' AND error = '' AND enabled
               AND (paused_at IS NULL OR paused_until <= :now)
               AND coalesce(not_before, 0) <= :now"""


class Store:
    """The state file. Owns the connection, which is never carried over a fork.

    As a context it is one transaction. It takes the write lock first: one that begins by reading
    fails at once if another wrote in between (https://www.sqlite.org/lang_transaction.html)."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        self.path = path
        self._timeout = timeout
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> Store:  # noqa: PYI034 - Self is newer than Python 3.9
        self.execute("BEGIN IMMEDIATE")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.execute("COMMIT")
        finally:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the file, as is done before each fork; the next use opens it again.

        https://www.sqlite.org/howtocorrupt.html section 2.6"""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def execute(self, sql: str, values: Mapping[str, Any] | Sequence[Any] = ()) -> sqlite3.Cursor:
        """Execute one statement. SQLite's errors become ours, but for a refused duplicate."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            return self._connection.execute(sql, values)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise self._explained(error) from None

    def rows(self, sql: str, values: Mapping[str, Any] | Sequence[Any] = ()) -> list[Row]:
        """Return all rows at once: a half-read cursor would block every writer."""
        cursor = self.execute(sql, values)
        try:
            return cursor.fetchall()
        except sqlite3.Error as error:
            raise self._explained(error) from None

    def row(self, sql: str, values: Mapping[str, Any] | Sequence[Any] = ()) -> Row | None:
        return next(iter(self.rows(sql, values)), None)

    def put(self, table: str, values: Mapping[str, Any], key: str = "id") -> int:
        """Insert a row, or change those columns of the row with its key; return its number."""
        columns = [f'"{name}"' for name in values]
        changes = ", ".join(f"{column} = excluded.{column}" for column in columns)
        cursor = self.execute(
            f"INSERT INTO {table} ({', '.join(columns)})"  # noqa: S608 - names of ours
            f" VALUES ({', '.join(':' + name for name in values)})"
            f" ON CONFLICT ({key}) DO UPDATE SET {changes}",
            values,
        )
        return int(values.get("id") or cursor.lastrowid or 0)

    # -- opening

    def _connect(self) -> sqlite3.Connection:
        """Open the file; it must be the same one as before, whole, and ours."""
        if self.path == ":memory:":  # nothing was stored yet, and a look must not make a file
            return self._prepared(sqlite3.connect(self.path, isolation_level=None))
        try:
            info = os.lstat(self.path)
        except OSError as error:
            raise StorageError(f"{self.path}: the state file is gone ({error.strerror})") from None
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise RefusedError(f"{self.path}: is a link or has a second name; use a plain file")
        if self._identity not in (None, (info.st_dev, info.st_ino)):
            raise StorageError(f"{self.path}: was replaced while in use; start again")
        escaped = self.path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        uri, wait = f"file:{escaped}?mode=rw", self._timeout
        db = self._prepared(sqlite3.connect(uri, timeout=wait, isolation_level=None, uri=True))
        self._identity = (info.st_dev, info.st_ino)
        return db

    def _prepared(self, db: sqlite3.Connection) -> sqlite3.Connection:
        try:
            db.row_factory = sqlite3.Row
            if self._identity is None and self._version(db) < len(MIGRATIONS):
                _migrate(db)
            # PERSIST can still record on a full disk and notices a file that was taken away; it is
            # not kept in the file: https://www.sqlite.org/pragma.html#pragma_journal_mode
            for pragma in ("journal_mode = PERSIST", "journal_size_limit = 1048576"):
                db.execute(f"PRAGMA {pragma}")
            db.execute("PRAGMA synchronous = FULL")
        except BaseException:
            db.close()
            raise
        return db

    def _version(self, db: sqlite3.Connection) -> int:
        """Return the version of the file, 0 if it is new. Raises DataError if it is not ours.

        One statement, after a look at the folder: another process may be making the file."""
        used = os.path.isdir(os.path.join(os.path.dirname(self.path), "runs"))
        version, owner, tables = db.execute(
            """
            SELECT (SELECT * FROM pragma_user_version), (SELECT * FROM pragma_application_id),
                   (SELECT count(*) FROM sqlite_master)
            """
        ).fetchone()
        if owner != APPLICATION_ID and (owner or version or tables):
            raise DataError(f"{self.path}: belongs to another program; move it or set state_dir")
        if version > len(MIGRATIONS):
            raise DataError(f"{self.path}: was written by a newer bgtasks; update bgtasks.py")
        if used and not tables and self.path != ":memory:":
            raise DataError(f"{self.path}: is empty, but was not before; restore it from a backup")
        return int(version)

    def _explained(self, error: sqlite3.Error) -> BgtasksError:
        """Return SQLite's error as one that says what to do; a bug in our SQL stays raw."""
        text = str(error)
        if "locked" in text or "busy" in text:
            return BusyError(f"{self.path}: in use by another program for too long; try again")
        if any(
            word in text
            for word in ("not a database", "image is malformed", "malformed database", "corrupt")
        ):
            return DataError(f"{self.path}: is damaged ({text}); restore it from a backup")
        if not self._is_in_place():
            return StorageError(f"{self.path}: was taken away while in use; put it back")
        if "disk is full" in text or "disk I/O error" in text:
            return StorageError(f"{self.path}: cannot write ({text}); make room on the disk")
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as limit:
            return cannot_create(self.path, limit)
        if "readonly" in text or "unable to open" in text:
            return RefusedError(f"{self.path}: cannot be written ({text}); check its permissions")
        raise error

    def _is_in_place(self) -> bool:
        try:
            info = os.lstat(self.path)
        except OSError:
            return False
        return self._identity in (None, (info.st_dev, info.st_ino))

    def check_integrity(self) -> None:
        """Raise DataError if SQLite finds damage in the file."""
        found = self.row("PRAGMA quick_check(1)")
        if not found or found["quick_check"] != "ok":
            raise DataError(f"{self.path}: is damaged; restore it from a backup")

    def fact(self, name: str) -> str:
        """Return a fact that was noted, or empty text."""
        found = self.row("SELECT value FROM fact WHERE name = ?", (name,))
        return str(found["value"]) if found else ""

    # -- tasks

    def known(self) -> dict[str, Row]:
        """Return what is remembered of each task's file, by task name."""
        found = self.rows("SELECT name, file, script, fingerprint FROM task")
        return {row["name"]: row for row in found}

    def task(self, name: str) -> Row | None:
        return self.row("SELECT * FROM task WHERE name = ?", (name,))

    def tasks(self) -> list[Row]:
        return self.rows("SELECT * FROM task")

    def write_task(self, task: Task, planned: Row) -> None:
        """Remember a task as it was read, and the columns that say when it is due."""
        values = {
            "name": task.name,
            "file": task.file,
            "script": task.script if task.file.endswith(".toml") else "",
            "fingerprint": task.fingerprint,
            "definition": json.dumps([task.script, task.argv, task.settings], default=str),
            "error": task.error,
            "enabled": task.settings.get("enabled", True),
            "order": task.settings.get("order", 100),
            "group": task.settings.get("group", "default"),
            "after": bool(task.settings.get("after")) and task.settings["schedule"] == "manual",
        }
        self.put("task", {**values, **planned}, "name")

    def change(self, name: str, **columns: Any) -> None:
        """Set columns of a task."""
        if columns:
            sets = ", ".join(f'"{column}" = :{column}' for column in columns)
            self.execute(f"UPDATE task SET {sets} WHERE name = :name", {**columns, "name": name})  # noqa: S608 - names of ours

    def due(self, now: float) -> list[Row]:
        """Return the tasks that are due or may be, also those that something holds back.

        `running_since` is the start of a task's open run."""
        return self.rows(
            """
            SELECT *, (SELECT started_at FROM run WHERE task = name AND ended_at IS NULL)
                AS running_since
            FROM task
            WHERE (next_run_at <= :now OR extra_at <= :now OR always OR "after") AND file <> ''
            """,
            {"now": now},
        )

    def next_due(self, now: float) -> float | None:
        """Return the next moment after ``now`` at which something may start, or None."""
        found = self.row(
            """
            SELECT min(at) AS at FROM (
                SELECT max(next_run_at, coalesce(not_before, 0)) AS at, * FROM task
                UNION ALL SELECT max(extra_at, coalesce(not_before, 0)) AS at, * FROM task)
            WHERE at > :now AND file <> '' AND error = '' AND enabled
              AND (paused_at IS NULL OR paused_until <= :now)
            """,
            {"now": now},
        )
        return found["at"] if found else None

    def plan(self, name: str, next_run_at: float | None, was: float) -> None:
        """Move the next slot of a task, unless somebody else moved it since it ``was`` read."""
        self.execute(
            "UPDATE task SET next_run_at = ? WHERE name = ? AND next_run_at = ?",
            (next_run_at, name, was),
        )

    def note_event(self, name: str, by: str, now: float, what: str) -> None:
        """Note who did what to a task, or to no task in particular if ``name`` is empty."""
        self.put("event", {"at": now, "task": name, "by": by, "what": what})

    def events(self, name: str, count: int) -> list[Row]:
        """Return what was done to a task, newest first."""
        sql = "SELECT * FROM event WHERE task = ? ORDER BY id DESC LIMIT ?"
        return self.rows(sql, (name, count))

    def skips(self, name: str) -> list[Row]:
        """Return why a task did not run though it was due, the latest reason first."""
        return self.rows("SELECT * FROM skip WHERE task = ? ORDER BY last_at DESC", (name,))

    # -- runs

    def claim(self, claim: Row) -> int | None:
        """Open a run and move the task to its next slot; return the run, or None.

        None means that somebody else has the slot, or has a run of this task open. The condition on
        what was read makes the claim atomic; the unique indexes would refuse a second one anyway.
        """
        try:
            with self:
                moved = self.execute(
                    f"""
                    UPDATE task
                    SET next_run_at =
                            CASE WHEN :slot IS NULL THEN next_run_at ELSE :next_run_at END,
                        deferred = 0, last_slot = coalesce(:slot, last_slot),
                        extra_at = CASE WHEN coalesce(:slot, :extra_at) IS NULL THEN extra_at END,
                        extra_trigger =
                            CASE WHEN coalesce(:slot, :extra_at) IS NULL THEN extra_trigger END,
                        runs = runs + 1, last_started_at = :now, last_outcome = 'running',
                        first_started_at = coalesce(first_started_at, :now)
                    WHERE name = :task
                      AND (:slot IS NULL OR next_run_at = :slot)
                      AND (:extra_at IS NULL OR extra_at = :extra_at)
                      AND (:trigger = 'hand' OR ({STARTABLE}))
                      AND (:trigger <> 'after' OR last_started_at IS :last_started_at)
                    """,  # noqa: S608 - a constant of ours
                    claim,
                )
                if moved.rowcount != 1:
                    return None
                return self.execute(
                    """
                    INSERT INTO run (task, slot, steps, planned_at, started_at, deadline_at,
                                     trigger, node, live, missed_slots)
                    VALUES (:task, :slot, :steps, :planned_at, :now, :deadline_at,
                            :trigger, :node, :live, :missed_slots)
                    """,
                    claim,
                ).lastrowid
        except sqlite3.IntegrityError:
            # a slot that was started before must not be due for ever
            self.execute(
                """
                UPDATE task SET next_run_at = :next_run_at
                WHERE name = :task AND next_run_at = :slot AND EXISTS
                    (SELECT 1 FROM run WHERE task = :task AND slot = :slot AND steps = :steps)
                """,
                claim,
            )
            return None

    def miss(self, claim: Row, notices: Sequence[Row] = ()) -> None:
        """Record that a slot came too late to run, and move the task to its next one."""
        with self:
            moved = self.execute(
                """
                UPDATE task SET next_run_at = :next_run_at, last_slot = :slot
                WHERE name = :task AND next_run_at = :slot
                """,
                claim,
            )
            if moved.rowcount:
                self.execute(
                    """
                    INSERT INTO run (task, slot, steps, planned_at, started_at, deadline_at,
                                     ended_at, outcome, reason, trigger, node, live, missed_slots)
                    VALUES (:task, :slot, :steps, :planned_at, :now, :now, :now, 'missed', :reason,
                            :trigger, :node, :live, :missed_slots)
                    ON CONFLICT DO NOTHING
                    """,
                    claim,
                )
                self.note_notices(notices)

    def give_back(self, claim: Row) -> None:
        """Undo a claim whose run could not be started."""
        with self:
            self.execute("DELETE FROM run WHERE live = :live", claim)
            self.execute(
                """
                UPDATE task
                SET runs = runs - 1, last_outcome = NULL,
                    next_run_at = coalesce(:slot, next_run_at), extra_at = :extra_at,
                    extra_trigger = CASE WHEN :extra_at IS NOT NULL THEN :trigger END
                WHERE name = :task
                """,
                claim,
            )

    def finish(self, run: int, end: Row, follows: Row, notices: Sequence[Row] = ()) -> Row | None:
        """Write down how a run ended; return its row, or None if that was done before.

        ``follows`` are the columns of the task that change with it."""
        values = {**end, "run": run}
        with self:
            changed = self.execute(
                """
                UPDATE run
                SET ended_at = max(started_at, coalesce(started_at + :seconds, :now)),
                    outcome = :outcome, reason = :reason, message = :message, volume = :volume,
                    exit_code = :exit_code, peak_kib = :peak_kib, output = :output
                WHERE id = :run AND ended_at IS NULL
                """,
                values,
            )
            if changed.rowcount != 1:
                return None
            self.execute(
                """
                UPDATE task
                SET last_outcome = :outcome, last_overran = :overran,
                    last_ended_at = (SELECT ended_at FROM run WHERE id = :run),
                    last_success_at = CASE WHEN :outcome IN ('done', 'nothing')
                        THEN last_started_at ELSE last_success_at END,
                    last_good_end_at = CASE WHEN :outcome IN ('done', 'nothing')
                        THEN (SELECT ended_at FROM run WHERE id = :run) ELSE last_good_end_at END,
                    failures = failures + (:outcome IN ('failed', 'timed_out')),
                    consecutive_failures = CASE
                        WHEN :outcome IN ('failed', 'timed_out') THEN consecutive_failures + 1
                        WHEN :outcome IN ('done', 'nothing', 'more') THEN 0
                        ELSE consecutive_failures END,
                    ended = ended + (:seconds IS NOT NULL),
                    last_seconds = coalesce(:seconds, last_seconds),
                    min_seconds = coalesce(min(min_seconds, :seconds), min_seconds, :seconds),
                    max_seconds = coalesce(max(max_seconds, :seconds), max_seconds, :seconds),
                    total_seconds = total_seconds + coalesce(:seconds, 0),
                    volume = volume + coalesce(:volume, 0)
                WHERE name = (SELECT task FROM run WHERE id = :run)
                """,
                values,
            )
            (finished,) = self.rows("SELECT * FROM run WHERE id = ?", (run,))
            self.change(finished["task"], **follows)
            self.note_notices(notices)
            if follows.get("paused_note"):
                what = f"paused; {follows['paused_note']}"
                self.note_event(finished["task"], "bgtasks", values["now"], what)
            return finished

    def runs_since(self, moment: float, count: int) -> list[Row]:
        """Return the newest runs that were at work after a moment, without what they printed."""
        return self.rows(
            """
            SELECT id, task, started_at, ended_at, outcome FROM
                (SELECT * FROM run ORDER BY id DESC LIMIT ?)
            WHERE ended_at IS NULL OR ended_at >= ? ORDER BY id
            """,
            (count, moment),
        )

    def open_runs(self) -> list[Row]:
        return self.rows("SELECT * FROM run WHERE ended_at IS NULL")

    def run(self, run: int) -> Row | None:
        return self.row("SELECT * FROM run WHERE id = ?", (run,))

    def history(self, task: str | None, count: int) -> list[Row]:
        """Return the runs of one task, or of all, newest first."""
        where = "WHERE task = :task" if task is not None else ""
        return self.rows(
            f"SELECT * FROM run {where} ORDER BY id DESC LIMIT :count",  # noqa: S608 - ours
            {"task": task, "count": count},
        )

    def unseen(self) -> dict[str, int]:
        """Return how many runs were interrupted that nobody has acknowledged, by task."""
        found = self.rows(
            """
            SELECT task, count(*) AS number FROM run
            WHERE outcome = 'interrupted' AND acknowledged_at IS NULL GROUP BY task
            """
        )
        return {row["task"]: row["number"] for row in found}

    def acknowledge(self, task: str, now: float) -> None:
        self.execute(
            """
            UPDATE run SET acknowledged_at = ?
            WHERE task = ? AND outcome = 'interrupted' AND acknowledged_at IS NULL
            """,
            (now, task),
        )

    def usual_seconds(self, task: str) -> float | None:
        """Return how long a run usually takes: the 90th percentile of the last 20, or None.

        Runs that ended ``more``, or at their deadline, took what time there was, and do not count.
        """
        found = self.rows(
            """
            SELECT ended_at - started_at AS seconds
            FROM (SELECT * FROM run
                  WHERE task = ? AND outcome IN ('done', 'nothing', 'failed')
                    AND ended_at < deadline_at
                  ORDER BY id DESC LIMIT 20)
            ORDER BY seconds
            """,
            (task,),
        )
        return found[len(found) * 9 // 10]["seconds"] if found else None

    # -- what people are told

    def note_notices(self, notices: Iterable[Row]) -> None:
        """Note what people are to be told, and that they know of the trouble, in a transaction."""
        for notice in notices:
            self.put("notice", notice)
            if notice["kind"] in TROUBLES:
                (known,) = self.rows("SELECT told FROM task WHERE name = ?", (notice["task"],))
                told = {*known["told"].split(), notice["kind"].removeprefix("still ")}
                self.change(notice["task"], told=" ".join(sorted(told)), told_at=notice["at"])

    def notices(self) -> list[Row]:
        """Return what people are still to be told, in the order in which it happened."""
        return self.rows("SELECT * FROM notice ORDER BY id")

    def forget_notices(self, last: int) -> None:
        self.execute("DELETE FROM notice WHERE id <= ?", (last,))

    def trouble_since(self, task: str) -> float | None:
        """Return when the first run after the last good one started, None if it was good."""
        found = self.row(
            """
            SELECT min(started_at) AS at FROM run WHERE task = :task AND id > coalesce(
                (SELECT max(id) FROM run
                 WHERE task = :task AND outcome IN ('done', 'nothing', 'more')), 0)
            """,
            {"task": task},
        )
        return found["at"] if found else None

    # -- wake-ups

    def write_wakeup(
        self, values: Mapping[str, Any], skips: Iterable[Row] = (), deferred: Iterable[str] = ()
    ) -> int:
        """Note a wake-up, or how it went on, and return its number; only the last are kept.

        With it goes why due tasks did not start: a reason counts on since the task last ran."""
        with self:
            number = self.put("wakeup", values)
            self.execute("DELETE FROM wakeup WHERE id <= ?", (number - WAKEUPS_KEPT,))
            for skip in skips:
                longer = self.execute(
                    """
                    UPDATE skip SET count = count + 1, last_at = :last_at, detail = :detail
                    WHERE task = :task AND reason = :reason AND first_at =
                        (SELECT max(first_at) FROM skip WHERE task = :task AND reason = :reason)
                      AND first_at >= coalesce(
                        (SELECT last_started_at FROM task WHERE name = :task), 0)
                    """,
                    skip,
                )
                if not longer.rowcount:
                    self.put("skip", {**skip, "count": 1}, "task, reason, first_at")
            for name in deferred:
                self.execute("UPDATE task SET deferred = deferred + 1 WHERE name = ?", (name,))
            return number

    def wakeups(self, count: int) -> list[Row]:
        """Return the last wake-ups, newest first."""
        return self.rows("SELECT * FROM wakeup ORDER BY id DESC LIMIT ?", (count,))

    def last_seen(self) -> float:
        """Return the latest wall time that the last wake-up noted; 0 if there was none."""
        last = next(iter(self.wakeups(1)), None)
        return max(last["started_at"], last["ended_at"] or 0) if last else 0.0

    def last_wakeup(self) -> Row | None:
        """Return the last wake-up that was not made by hand."""
        sql = "SELECT * FROM wakeup WHERE trigger <> 'hand' ORDER BY id DESC LIMIT 1"
        return self.row(sql)

    # -- administrators

    def admins(self) -> dict[str, str]:
        """Return the password hashes of the administrators, by login."""
        return {row["login"]: row["hash"] for row in self.rows("SELECT * FROM admin")}

    def write_admin(self, login: str, hashed: str, by: str, now: float) -> None:
        """Register an administrator, or give one a new password; without a hash, remove it."""
        with self:
            if hashed:
                self.put("admin", {"login": login, "hash": hashed, "added_at": now}, "login")
            else:
                self.execute("DELETE FROM admin WHERE login = ?", (login,))
            done = "registered" if hashed else "removed"
            self.note_event("", by, now, f"administrator {login} {done}")

    # -- old history

    def size(self) -> int:
        """Return the bytes in use in the file."""
        found = self.row(
            """
            SELECT page_size * (page_count - freelist_count) AS size FROM
                pragma_page_size, pragma_page_count, pragma_freelist_count
            """
        )
        return int(found["size"]) if found else 0

    def clean(self, after: int, lifetime: Callable[[Row], float], now: float) -> tuple[int, int]:
        """Remove a bite of the runs behind number ``after`` that are older than their ``lifetime``.

        Return the last number that was looked at, 0 at the end, and how many were removed. The last
        20 runs of each task stay. If the file is too large, of older ones nothing stays, and of the
        oldest of these no output."""
        found = self.rows(
            """
            SELECT id, task, outcome, ended_at, length(output) AS size,
                (SELECT id FROM run AS young WHERE young.task = run.task
                 ORDER BY id DESC LIMIT 1 OFFSET 19) AS kept_from
            FROM run WHERE id > ? ORDER BY id LIMIT 50
            """,
            (after,),
        )
        large, gone, blank = self.size() > HISTORY_BYTES, list[int](), list[int]()
        for row in (row for row in found if row["ended_at"] is not None):
            if row["id"] < (row["kept_from"] or 0):
                if large or row["ended_at"] + lifetime(row) < now:
                    gone.append(row["id"])
            elif large and row["size"] > len(REMOVED):
                blank.append(row["id"])
        if gone or blank:
            with self:
                for number in gone:
                    self.execute("DELETE FROM run WHERE id = ?", (number,))
                for number in blank:
                    self.execute("UPDATE run SET output = ? WHERE id = ?", (REMOVED, number))
        return found[-1]["id"] if len(found) == 50 else 0, len(gone)

    def end_cleaning(self, cursor: int, skips_before: float) -> None:
        """Note where the next cleaning goes on, and forget old reasons."""
        with self:
            self.put("fact", {"name": "cleaned", "value": str(cursor)}, "name")
            self.execute("DELETE FROM skip WHERE last_at < ?", (skips_before,))


def task_from(row: Row) -> Task:
    """Return a task as the store remembers it; what an older version did not know has defaults."""
    script, argv, settings = json.loads(row["definition"])
    settings = {**{key: default for key, (_, default) in TASK_SETTINGS.items()}, **settings}
    error = row["error"]
    return Task(row["name"], row["file"], row["fingerprint"], script, tuple(argv), settings, error)


def _migrate(db: sqlite3.Connection) -> None:
    db.execute("BEGIN IMMEDIATE")
    version = int(db.execute("PRAGMA user_version").fetchone()[0])  # again, under the lock
    for script in MIGRATIONS[version:]:
        statement = ""
        for line in script.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                db.execute(statement)
                statement = ""
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    db.execute("COMMIT")


def open_store(state_dir: str) -> Store:
    """Open the state, made new if there is none, with modes that keep others out."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise UnavailableError(f"needs SQLite {oldest} or newer, this is {sqlite3.sqlite_version}")
    path = os.path.join(state_dir, "bgtasks.db")
    _make(state_dir, lambda: os.mkdir(state_dir, 0o700))
    if not os.path.isdir(state_dir):
        raise ConfigError(f"{state_dir}: is no folder; set state_dir to one")
    _make(path, lambda: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)))
    store = Store(path)
    store.rows("SELECT 1")
    for folder in (os.path.join(state_dir, "runs"), os.path.join(state_dir, "locks")):
        _make(folder, partial(os.mkdir, folder, 0o700))
    return store


def _make(path: str, make: Callable[[], None]) -> None:
    """Make a file or folder unless it is there."""
    try:
        make()
    except FileExistsError:
        pass
    except OSError as error:
        raise cannot_create(path, error) from None


def cannot_create(path: str, error: OSError) -> BgtasksError:
    """Return the error of a file that could not be made, with the way out."""
    text = f"{path}: cannot be made ({error.strerror})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RefusedError(f"{text}; check the permissions")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
        return StorageError(f"{text}; make room on the disk")
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
        return ProcessError(f"{text}; raise the limit (ulimit)")
    return CreateError(f"{text}; check the path")


# --- Keeper ---------------------------------------------------------------------------------------
# One run goes in; its files under state/runs say how it went. A keeper never opens the store: the
# runner, or a later one, reads what it wrote. Files of a run, by suffix: `.out` output and lock,
# `.keeper` what our processes noted, `.report` what the task reported, `.input` what it may read.

GRACE_SECONDS = 10.0
LEFTOVER_SECONDS = 2.0
HEAD_BYTES, TAIL_BYTES = 16 << 10, 48 << 10
REPORT_BYTES = 1 << 20
SUFFIXES = (".out", ".keeper", ".report", ".input")


class Brief(NamedTuple):
    """All that a keeper is told about its run."""

    task: Task
    live: str  # path of the files of the run, without suffix
    runner: tuple[int, str]  # its process and identity
    tasks_dir: str
    started: float  # on the monotonic clock
    deadline: float  # on the monotonic clock
    env: Mapping[str, str]
    given: Mapping[str, Any]  # what the task may know


def _ignore(_number: int, _frame: object) -> None:
    """Leave a signal to the pipe that Signals made."""


class Signals:
    """Signals that arrived, as numbers from a pipe that wakes whoever waits; they do no more."""

    def __init__(self, *numbers: int) -> None:
        self.readable, self._writable = os.pipe()
        for fd in (self.readable, self._writable):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _ignore) for number in numbers}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # our caller may have blocked them

    def taken(self) -> bytes:
        """Return the numbers of the signals that arrived since the last call."""
        try:
            return os.read(self.readable, 4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.readable)
        os.close(self._writable)


def reset_signals(numbers: Iterable[int] | None = None, blocked: Iterable[int] = ()) -> None:
    """Give signals their default action, all of them if none are named; block only ``blocked``."""
    signal.set_wakeup_fd(-1)
    for number in altered_signals() if numbers is None else numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@cache
def altered_signals() -> list[int]:
    """Return the signals that have another action, by our caller or us; asking each takes long."""
    ours = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    others = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP} - ours
    return [*ours, *(n for n in others if signal.getsignal(n) not in (signal.SIG_DFL, None))]


def signal_name(number: int) -> str:
    names = {int(each): each.name for each in signal.Signals}
    return names.get(number, f"signal {number}")


# -- the files of a run


def new_live_files(state_dir: str) -> tuple[str, int]:
    """Create and lock the output file of a new run; return its path without suffix, and it.

    The lock lives on the open file that keeper and task inherit as stdout and stderr, so the kernel
    keeps it as long as one of them lives: flock(2)."""
    while True:
        live = os.path.join(state_dir, "runs", os.urandom(8).hex())
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND
        try:
            output = os.open(live + ".out", flags, 0o600)
        except OSError as error:
            raise cannot_create(live + ".out", error) from None
        fcntl.flock(output, fcntl.LOCK_EX)
        if os.fstat(output).st_nlink:
            return live, output
        os.close(output)  # pragma: no cover (race: swept between its making and its lock)


def remove_live_files(live: str) -> None:
    for suffix in SUFFIXES:
        remove_file(live + suffix)


def remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def probe_lock(path: str) -> int | None:
    """Return the output file with a shared lock on it, or None while a run holds it.

    Shared, so that two who probe never take each other for a run. Raises FileNotFoundError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def is_locked(path: str) -> bool:
    try:
        fd = probe_lock(path)
    except FileNotFoundError:
        return False
    if fd is not None:
        os.close(fd)
    return fd is None


def test_locks(state_dir: str) -> None:
    """Raise ConfigError if locks on this file system do not keep others out, or do not end."""
    try:
        live, fd = new_live_files(state_dir)
        readable, writable = os.pipe()
        child = fork(lambda: 0 * len(os.read(readable, 1)))
        os.close(fd)  # the child's copy alone must hold the lock now
        held = is_locked(live + ".out")
        os.write(writable, b".")
        os.waitpid(child, 0)
        works = held and not is_locked(live + ".out")
        os.close(readable)
        os.close(writable)
        remove_live_files(live)
    except OSError as error:
        what = f"{state_dir}: cannot lock files there ({error.strerror})"
        raise ConfigError(f"{what}; set state_dir to a folder on a local disk") from None
    if not works:
        what = f"{state_dir}: file locks do not keep others out there"
        raise ConfigError(f"{what}; set state_dir to a folder on a local disk")


def note(notes: int, **facts: Any) -> None:
    """Append what one of our processes knows to `.keeper`; one write, so whole or not at all."""
    os.write(notes, json.dumps(facts).encode() + b"\n")


def read_notes(live: str) -> dict[str, Any]:
    """Return what our processes noted about a run; an unfinished last line is none."""
    notes: dict[str, Any] = {}
    for line in read_bytes(live + ".keeper").splitlines(keepends=True):
        notes.update(json.loads(line) if line.endswith(b"\n") else {})
    return notes


def read_bytes(path: str, at_most: int | None = None) -> bytes:
    """Return a file, of a longer one than that its last whole lines; nothing if it is gone."""
    try:
        with open(path, "rb") as file:
            if at_most and os.fstat(file.fileno()).st_size > at_most:
                file.seek(-at_most - 1, os.SEEK_END)
                file.readline()
            return file.read(at_most)
    except (FileNotFoundError, ProcessLookupError):  # in /proc the latter, between open and read
        return b""


def read_report(live: str) -> dict[str, Any]:
    """Return what a task reported; the last line of each kind counts, a bad one is `complaint`."""
    report: dict[str, Any] = {}
    for line in read_bytes(live + ".report", REPORT_BYTES).decode("utf-8", "replace").splitlines():
        key, _, value = (part.strip() for part in line.partition("="))
        try:
            if line.strip():
                report[key] = _report_value(key, value)
        except ValueError as error:
            report["complaint"] = f"report: {shortened(line, 40)!r} {error}"
    return report


def _report_value(key: str, value: str) -> Any:
    if key == "volume":
        if not (value.isascii() and value.isdigit() and len(value) < 19):
            raise ValueError("must be a whole number")
        return int(value)
    if key == "result" and value not in (DONE, NOTHING, MORE):
        raise ValueError("must be done, nothing or more")
    if key == "state" and not isinstance(json.loads(value), dict):
        raise ValueError("must be a JSON object")
    if key not in ("progress", "message", "result", "next_run", "state"):
        raise ValueError("must begin with volume, progress, message, result, next_run or state")
    return value


def read_output(live: str, secrets: Iterable[str]) -> str:
    """Return head and tail of what a task printed, secrets masked, and how much was cut."""
    try:
        with open(live + ".out", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEAD_BYTES)
            file.seek(max(HEAD_BYTES, size - TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return ""
    cut = size - HEAD_BYTES - TAIL_BYTES
    if cut <= 0:
        return masked(head + tail, secrets)
    return f"{masked(head, secrets)}\n[... {cut} bytes cut ...]\n{masked(tail, secrets)}"


def masked(content: bytes, secrets: Iterable[str]) -> str:
    text = content.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


# -- which processes live


def process_stat(pid: int) -> list[str]:
    """Return name, state, parent, group ... of a process, as proc(5) has them; [] if it is gone."""
    text = read_bytes(f"/proc/{pid}/stat").decode("utf-8", "backslashreplace")
    head, _, tail = text.rpartition(")")
    return [head.partition("(")[2], *tail.split()] if tail else []


def identity(pid: int) -> str:
    """Return what tells a process from a later one with the same number; empty if it has ended."""
    process = process_stat(pid)
    return f"{boot_id()}:{process[20]}" if process and process[1] not in "ZX" else ""


@cache
def boot_id() -> str:
    """Return what tells this boot of the machine from others, or empty text if nothing does."""
    return read_bytes("/proc/sys/kernel/random/boot_id").decode().strip()


def group_members(group: int) -> list[str]:
    """Return the living processes of a process group as ``pid (name)``."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return []
    if not os.path.isdir("/proc/self"):  # pragma: no cover (Linux has it)
        return [f"group {group}"]
    members = [(pid, process_stat(int(pid))) for pid in os.listdir("/proc") if pid.isdigit()]
    return [
        f"{pid} ({process[0]})"
        for pid, process in members
        if process and process[3] == str(group) and process[1] not in "ZX"
    ]


def task_lives(notes: Mapping[str, Any]) -> bool:
    """Tell whether the process group that was noted for a run still has living members.

    A number that was given to another process since is told by its identity; a group keeps its
    number as long as it has members. Another boot has none of them."""
    group, noted = notes.get("group", [0, ""])
    if not group or noted.partition(":")[0] != boot_id():
        return False
    return identity(group) in ("", noted) and bool(group_members(group))


def unless_gone(call: Callable[[int, int], None], pid: int, number: int) -> None:
    try:
        call(pid, number)
    except ProcessLookupError:  # it ended meanwhile
        pass


def signal_group(group: int, number: int) -> None:
    """Send a signal to a process group, then SIGCONT: a stopped process takes only SIGKILL."""
    for each in (number, signal.SIGCONT):
        try:
            os.killpg(group, each)
        except (ProcessLookupError, PermissionError):
            return


# -- the keeper's process


def fork(body: Callable[[], int]) -> int:
    """Fork; the child does ``body`` and leaves with the code it returns. Raises OSError.

    In the child SIGTERM is blocked until it has its own signals, so it is lost at no moment."""
    sys.stdout.flush()
    sys.stderr.flush()
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # else nobody learns how a child ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        pid = os.fork()
        if not pid:
            _leave(body)  # pragma: no cover (measured from the child's own frames on)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _leave(body: Callable[[], int]) -> NoReturn:
    code = EXIT_BUG
    try:
        code = body()
    except BaseException:  # noqa: BLE001 - a child must never run on in its parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


def fork_apart(seconds: int, body: Callable[[], int]) -> int:
    """Fork a process that holds no file of ours, and that the kernel ends after some seconds."""

    def alone() -> int:
        os.setsid()
        reset_signals()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # an error, as everywhere in Python
        _keep_only(os.open(os.devnull, os.O_RDWR))
        signal.alarm(seconds)
        return body()

    return fork(alone)


def keep(brief: Brief, output: int, clock: Clock) -> int:
    """Watch over one run from its start to its end, and note how it ended."""
    os.setsid()
    reset_signals(blocked=[signal.SIGTERM])
    _keep_only(output)
    signals = Signals(signal.SIGCHLD, signal.SIGTERM)
    notes = append_to(brief.live + ".keeper")
    me = os.getpid()
    note(notes, keeper=[me, identity(me)], runner=brief.runner, began=brief.started)
    if "killed" in read_notes(brief.live):  # before anybody could tell us
        os.kill(me, signal.SIGTERM)
    try:
        group = fork(lambda: task_side(brief, notes, clock))
        unless_gone(os.setpgid, group, group)  # as itself does: either may be first
    except OSError as error:  # pragma: no cover (a system that gave one process, but not two)
        note(notes, end="", unstarted=f"could not start: {error.strerror}", seconds=0.0)
        return EXIT_SYSTEM
    verdict, status, peak = _watch(brief, group, signals, clock)
    seconds = clock.monotonic() - brief.started
    left = clear_group(group, LEFTOVER_SECONDS, clock)
    note(notes, end=verdict, status=status, peak=peak, left=left, seconds=seconds)
    for fd in (1, 2):  # what still holds the lock now has left the group
        os.dup2(0, fd)
    path, copy = os.path.realpath(brief.live + ".out"), f"/proc/{brief.runner[0]}/fd/{output}"
    until = clock.monotonic() + 0.5  # the runner closes its copy of the lock just after its fork
    while is_locked(path) and (clock.monotonic() < until or os.path.realpath(copy) == path):
        clock.wait(0.02)
    if is_locked(path):
        note(notes, left=[*left, "a process in a session of its own, which was let live"])
    return EXIT_OK


def _keep_only(output: int) -> None:
    """Put ``output`` on stdout and stderr, nothing on stdin, and close all else."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(fd, target)
    for name in os.listdir("/dev/fd"):
        try:
            if int(name) > 2:
                os.close(int(name))
        except OSError:  # the one that read the folder
            pass


def append_to(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _watch(brief: Brief, group: int, signals: Signals, clock: Clock) -> tuple[str, int, int]:
    """Wait for the task process, and end it when it must; return verdict, status and peak memory.

    The verdict is empty if it ended by itself; the status is negative for a signal; the peak memory
    is in KiB."""
    verdict, pause = "", 0.05
    ends_at = brief.started + float(brief.task.settings["timeout"])
    while True:
        _cut_output(int(brief.task.settings["output_limit"]))
        reaped, status, usage = os.wait4(group, os.WNOHANG)
        if reaped:
            peak = usage.ru_maxrss // (1 if sys.platform == "linux" else 1024)
            return verdict, os.waitstatus_to_exitcode(status), peak
        now = clock.monotonic()
        asked = signal.SIGTERM in signals.taken()
        if now >= ends_at or asked:
            signal_group(group, signal.SIGKILL if verdict else signal.SIGTERM)
            verdict = verdict or (INTERRUPTED if asked else TIMED_OUT)
            ends_at = now + GRACE_SECONDS
        clock.wait(min(pause, ends_at - now), [signals.readable])
        pause = min(1.0, pause * 2)


def _cut_output(limit: int) -> None:
    """Give back the disk that the middle of an output takes which grew over its limit.

    A hole leaves every byte in its place, so nothing written meanwhile is lost: fallocate(2)."""
    info = os.fstat(1)
    if info.st_blocks * 512 <= max(limit, 2 * (HEAD_BYTES + TAIL_BYTES)):
        return
    import ctypes

    place, size = ctypes.c_int64(HEAD_BYTES), ctypes.c_int64(info.st_size - HEAD_BYTES - TAIL_BYTES)
    punch_hole_keep_size = 3
    try:
        failed = ctypes.CDLL(None).fallocate(1, punch_hole_keep_size, place, size)
    except AttributeError:  # pragma: no cover (not Linux)
        failed = -1
    if failed:  # pragma: no cover (a file system without holes: then what came last is lost)
        os.ftruncate(1, HEAD_BYTES)
        os.write(1, b"\n[... cut at output_limit ...]\n")


def clear_group(group: int, seconds: float, clock: Clock) -> list[str]:
    """End what a task process left behind in its group; return what that was."""
    left = group_members(group) if group else []
    if left:
        signal_group(group, signal.SIGTERM)
        until = clock.monotonic() + seconds
        while group_members(group) and clock.monotonic() < until:
            clock.wait(0.02)
        signal_group(group, signal.SIGKILL)
    return left


def end_orphan(live: str, group: int, clock: Clock) -> int:
    """End a run past its timeout whose keeper is dead, and note it in the keeper's place."""
    clear_group(group, GRACE_SECONDS, clock)
    note(append_to(live + ".keeper"), end=TIMED_OUT)
    return EXIT_OK


# -- the task's process


def task_side(brief: Brief, notes: int, clock: Clock) -> int:
    """Be the leader of the task's process group: call ``run(task)``, or start the program.

    It notes the exit itself, so that the true end is known even if the keeper was killed."""
    os.setpgid(0, 0)
    reset_signals((signal.SIGCHLD, signal.SIGTERM))  # the keeper has reset the others
    note(notes, group=[os.getpid(), identity(os.getpid())])
    # by hand as after a wake-up by cron; the first entry is the folder of this file
    caller = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    callers = {os.path.abspath(path) for path in caller if path}
    sys.path[1:] = [path for path in sys.path[1:] if path not in callers]
    os.chdir(brief.tasks_dir)
    code, reason = _run_program(brief, notes) if brief.task.argv else _run_python(brief, clock)
    note(notes, exit=code, reason=reason, seconds=clock.monotonic() - brief.started)
    return code & 0xFF


def _limit(settings: Mapping[str, Any]) -> None:
    os.nice(settings["nice"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if settings["memory_limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_limit"],) * 2)


def _run_program(brief: Brief, notes: int) -> tuple[int, str]:
    # what ends the group must not end the one who notes how the program ended; blocked, it is lost
    # neither on us before the fork nor on the program before it has started
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    pid = fork(lambda: _exec_program(brief, notes))
    if signal.SIGTERM in signal.sigpending():
        os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ""


def _exec_program(brief: Brief, notes: int) -> int:
    reset_signals((signal.SIGTERM,))
    argv = brief.task.argv
    try:
        if brief.task.script:
            path = os.path.join(brief.tasks_dir, brief.task.script)
            refuse_unsafe(os.stat(path), path, "task")
            refuse_unsafe_parents(os.path.realpath(path))
        _limit(brief.task.settings)
        os.execvpe(argv[0], argv, dict(brief.env))
    except (OSError, ValueError, BgtasksError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        note(notes, unstarted=f"could not start {shortened(argv[0])}: {what}")
    return 127


def _run_python(brief: Brief, clock: Clock) -> tuple[int, str]:
    """Call ``run(task)`` of a Python task; return its exit code and, if it failed, the reason."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # so that `finally` and `with` of the task clean up

    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    signal.signal(signal.SIGTERM, end)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python itself does: errors are raised
        signal.signal(ignored, signal.SIG_IGN)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGTERM, file=sys.stderr, chain=True)
    os.environ.clear()
    os.environ.update(brief.env)
    context = TaskContext(brief, clock)
    try:
        _limit(brief.task.settings)
        context.returned(_load(brief)(context))
        _join_threads()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0, ""
        return 1, shortened(str(error.code), 400)
    except BaseException as error:  # noqa: BLE001 - whatever a task raises is how it failed
        traceback.print_exc()
        return 1, shortened(f"{type(error).__name__}: {safe_text(error)}", 400)
    finally:
        context.save()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0, ""


def _load(brief: Brief) -> Callable[[TaskContext], object]:
    """Execute the file of a Python task, the very bytes that passed the check, and return `run`."""
    path = os.path.join(brief.tasks_dir, brief.task.script)
    name = "bgtasks_task_" + brief.task.name.replace("-", "_")
    module = sys.modules[name] = type(sys)(name)
    module.__file__ = path
    sys.modules["bgtasks"] = sys.modules[__name__]  # so that `import bgtasks` reads no second copy
    sys.argv = [path]
    # last, so that a file beside it can be imported but never hides a module of Python
    sys.path.append(brief.tasks_dir)
    exec(compile(read_checked(path), path, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - the task
    run: Callable[[TaskContext], object] = module.run
    return run


def _join_threads() -> None:
    for thread in threading.enumerate() if "threading" in sys.modules else ():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()


def safe_text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a task's own class decides what happens here
        return f"<unprintable {type(value).__name__}>"


class TaskContext:
    """What ``run(task)`` is handed: what it may know, and how it reports."""

    MORE = MORE
    NOTHING = NOTHING

    def __init__(self, brief: Brief, clock: Clock) -> None:
        given = brief.given
        self.name: str = given["task"]
        self.run: int = given["run"]
        self.slot: float = given["slot"]
        self.deadline: float = given["deadline"]
        self.last_success: float | None = given["last_success"]
        self.node: str = given["node"]
        self.state_dir: str = given["state_dir"]
        self.maximum: int | None = given["maximum"]
        self.options: Mapping[str, Any] = given["options"]
        self.settings: Mapping[str, Any] = given["settings"]
        self.state: dict[str, Any] = dict(given["state"])
        self.volume = 0
        self.message = ""
        self.next_run: datetime | float | str | None = None
        self._clock, self._deadline = clock, brief.deadline
        self._report = append_to(brief.live + ".report")
        self._result = ""
        self._saved, self._saved_at = self._state_text(), clock.monotonic()

    @property
    def time_left(self) -> float:
        """Seconds until the deadline; 0 after it."""
        return max(0.0, self._deadline - self._clock.monotonic())

    @property
    def should_stop(self) -> bool:
        return not self.time_left

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items until the deadline (the run then ends as `more`) or the maximum."""
        for treated, item in enumerate(items):
            if self.should_stop:
                self._result = self._result or MORE
                return
            if self.maximum is not None and treated >= self.maximum:
                return
            yield item
            if self._clock.monotonic() - self._saved_at >= 1:
                self._save_state()

    def progress(self, done: int, of: int | None = None) -> None:
        """Say how far it is; shown while it runs."""
        self._write("progress", str(done) if of is None else f"{done}/{of}")

    def add_volume(self, number: int = 1) -> None:
        """Count what was treated; shown in the history."""
        self.volume += number
        self._write("volume", str(self.volume))

    def returned(self, value: object) -> None:
        """Take what ``run(task)`` returned: a result, or text for people."""
        if value is MORE or value is NOTHING:
            self._result = str(value)
        elif value is not None and not self.message:
            self.message = safe_text(value)

    def save(self) -> None:
        """Write what was set but not yet reported."""
        self._save_state()
        for key, value in (("message", self.message), ("result", self._result)):
            if value:
                self._write(key, safe_text(value)[:65536])
        if self.next_run is not None:
            self._write("next_run", safe_text(self.next_run))

    def _save_state(self) -> None:
        self._saved_at = self._clock.monotonic()
        text = self._state_text()
        if text != self._saved:
            self._saved = text
            self._write("state", text)

    def _state_text(self) -> str:
        try:
            return json.dumps(self.state, allow_nan=False)
        except (TypeError, ValueError) as error:
            return str(error)  # no JSON object, so the report complains of it

    def _write(self, key: str, value: str) -> None:
        os.write(self._report, f"{key}={' '.join(value.splitlines())}\n".encode("utf-8", "replace"))


# -- how a run ended


def read_end(
    row: Row, live: str, secrets: Iterable[str], moment: Callable[[str], int]
) -> dict[str, Any] | None:
    """Return how an open run ended, or None while it runs. ``moment`` reads a reported `next_run`.

    The lock is probed first: who held it has written its last note before letting it go. `seconds`
    is None if nobody saw the end."""
    locked = is_locked(live + ".out")
    notes = read_notes(live)
    if "end" not in notes and (locked or task_lives(notes)):
        return None
    report = read_report(live)
    outcome, reason = _judge(notes, report)
    if outcome in FAILURES and report.keys() & {"volume", "progress"}:
        reason += f", after progress: {report.get('progress') or report['volume']}"
    left = f"left behind: {', '.join(notes['left'])}" if notes.get("left") else ""
    reasons = [reason, left, report.get("complaint", "")]
    next_run_at = None
    try:
        next_run_at = moment(report["next_run"]) if "next_run" in report else None
    except ValueError as error:
        reasons.append(f"report: next_run {error}")
    seconds = notes.get("seconds")
    return {
        "outcome": outcome,
        "reason": masked(shortened(joined(*reasons), 1000).encode(), secrets),
        "message": masked(report.get("message", "").encode(), secrets),
        "volume": report.get("volume"),
        "exit_code": notes.get("exit", notes.get("status")),
        "peak_kib": notes.get("peak"),
        "output": read_output(live, secrets),
        "seconds": seconds,
        "state": report.get("state"),
        "next_run_at": next_run_at,
        "crashed": runner_is_gone(notes) or (outcome, notes.get("end", "")) == (INTERRUPTED, ""),
        "overran": seconds is not None and seconds > row["deadline_at"] - row["started_at"] + 5,
    }


def runner_is_gone(notes: Mapping[str, Any]) -> bool:
    """Tell whether the runner that started a run ended before it, as it never does by itself."""
    pid, noted = notes.get("runner", [0, ""])
    return bool(pid) and identity(pid) != noted


def joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def _judge(notes: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[str, str]:
    """Return outcome and reason, from what keeper, task process and task said."""
    verdict, code = notes.get("end", ""), notes.get("exit")
    if verdict == TIMED_OUT:
        return TIMED_OUT, "did not end by its timeout and was ended"
    if "killed" in notes and code != 0:
        return KILLED, f"killed by {notes['killed']}"
    if "unstarted" in notes:
        return FAILED, notes["unstarted"]
    if verdict and code != 0:
        return verdict, "the runner was told to stop"
    if code == 0:
        return report.get("result") or DONE, ""
    if code is None and "end" not in notes:
        return (
            INTERRUPTED,
            "its processes vanished before it ended (killed, or the machine went down)",
        )
    if code is None and notes["status"] == 0:
        return FAILED, "ended without reporting (os._exit)"
    code = notes["status"] if code is None else code
    if code >= 0:
        return FAILED, notes.get("reason") or f"exit code {code}"
    return FAILED, f"ended by {signal_name(-code)}" + " (maybe out of memory)" * (code == -9)


# --- Runner ---------------------------------------------------------------------------------------
# Settings and a store go in, keepers come out: settle what was left behind, read tasks.d, start
# what is due in order, wait. It tells what happens through a callback and prints nothing.

CLEARANCE_SECONDS = 5.0  # a wake-up this close to its end is waited for
CLOCK_STEP_SECONDS = 2.0
MOST_BACK_OFF = 3600.0
MOST_DEFERRED = 3  # wake-ups without time for it, then it goes first
CLEANING_SECONDS = 2.0
HANGING_SECONDS = 600.0  # past its deadline and its usual time: then people are told
REMINDER_SECONDS = 86400.0 - 600.0  # a daily task must not be a minute too early for it
PASSED_ON = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "USER", "LOGNAME", "SHELL", "TMPDIR")

Tell = Callable[[str, Mapping[str, Any]], None]


class Selection(NamedTuple):
    """Which tasks a wake-up may start; empty means all."""

    task: tuple[str, ...]
    exclude_task: tuple[str, ...]
    group: tuple[str, ...]
    exclude_group: tuple[str, ...]

    def takes(self, row: Row) -> bool:
        name, group = row["name"], row["group"]
        wanted = (not self.task or name in self.task) and (not self.group or group in self.group)
        return wanted and name not in self.exclude_task and group not in self.exclude_group

    def text(self) -> str:
        """Return the flags that make this selection, in one fixed order."""
        pairs = zip(self._fields, self)
        return " ".join(f"--{key}={','.join(sorted(names))}" for key, names in pairs if names)


class Started(NamedTuple):
    """A run of this runner."""

    run: int
    task: Task
    live: str
    counts_until: float  # on the monotonic clock; after that it delays nobody
    alone: bool  # nothing else starts beside it


def take_runner_lock(path: str, ends_at: float | None, clock: Clock) -> int | None:
    """Return the lock of a selection, as an open file; None if another runner holds it for long.

    It orders starts and spares work; what makes runs safe is the claim. ``ends_at`` is when it will
    be given back, on the monotonic clock. A holder near that is waited for, so that a crontab line
    as regular as the runner's own time (every 5 min, 600 s) misses no turn."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise cannot_create(path, error) from None
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            text = os.pread(fd, 64, 0)
        left = float(text) - clock.monotonic() if text else float("inf")
        if not -CLEARANCE_SECONDS < left <= CLEARANCE_SECONDS:
            os.close(fd)
            return None
        clock.wait(0.02)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{ends_at:.3f}".encode() if ends_at else b"", 0)
    return fd


def plan_task(task: Task, old: Row | None, settings: Settings, now: float) -> dict[str, Any]:
    """Return the columns that say when a task is due; none if what is planned still holds."""
    if task.error:
        return {}
    values = task.settings
    text = json.dumps([values["schedule"], values["timezone"] or settings.timezone])
    before = old["schedule"] if old else ""
    if before == text:
        return {}
    anchor = schedule_of(values, settings, task.name).anchor_for(now)
    if old and before and old["last_slot"] is not None:
        anchor = old["last_slot"]
    schedule = schedule_of(values, settings, task.name, anchor)
    next_run_at = schedule.next_after(now) if before else schedule.first(now)
    planned = {"schedule": text, "always": schedule.always, "anchor_at": int(anchor)}
    return {**planned, "next_run_at": next_run_at}


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def duration(seconds: float | None) -> str:
    """Return seconds as people say them: ``0.2 s``, ``12 min``, ``3 d``; empty for None."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def read_moment(text: str, zone: Zone, now: float) -> int:
    """Return the Unix seconds of a moment after ``now``: a number, or ISO 8601 (without an offset
    it is local time in ``zone``). Raises ValueError."""
    try:
        if text.isascii() and text.replace(".", "", 1).isdigit():
            moment = float(text)
        else:
            read = datetime.fromisoformat(text.replace("Z", "+00:00"))
            moments = [read.timestamp()] if read.tzinfo else zone.moments(read)
            moment = moments[0] if moments else 0.0
    except (ValueError, OverflowError):
        raise ValueError(f"{shortened(text)!r} is neither Unix seconds nor ISO 8601") from None
    if not now < moment < now + 100 * 366 * 86400:
        raise ValueError(f"{shortened(text)!r} is not in the future")
    return int(moment)


def what_follows(
    task: Task, row: Row, end: Row, most_crashes: int, next_after: Callable[[float], float | None]
) -> dict[str, Any]:
    """Return the columns of a task that change with the end of a run: its next try, or a pause.

    ``row`` is the task before it. ``end["by_hand"]``: somebody watches, and tries again himself."""
    outcome, settings, now = end["outcome"], task.settings, end["now"]
    failures = row["consecutive_failures"] + 1 if outcome in FAILURES else 0
    columns = {key: end[key] for key in ("state", "next_run_at") if end[key] is not None}
    crashed = end["crashed"] and outcome != KILLED
    columns["interruptions"] = row["interruptions"] + 1 if crashed else 0
    if outcome in (DONE, NOTHING, MORE):
        columns.update(not_before=None, told="")
        if row["extra_trigger"] == "retry":
            columns.update(extra_at=None, extra_trigger=None)
    if outcome == MORE:
        columns.update(extra_at=now, extra_trigger="repeat")
    elif outcome == INTERRUPTED and settings["on_interrupt"] == "again":
        columns.update(extra_at=now, extra_trigger="again")
    elif outcome in FAILURES and not end["by_hand"]:
        delay = settings["retry_delay"]
        not_before = now + min(delay * 2.0 ** min(failures - 1, 30), max(delay, MOST_BACK_OFF))
        columns["not_before"] = not_before
        if failures <= settings["retries"]:
            columns.update(extra_at=not_before, extra_trigger="retry")
        elif row["next_run_at"] is not None and row["next_run_at"] < not_before:
            columns["next_run_at"] = next_after(not_before - 1)
    reason = _pause_reason(task, failures, columns["interruptions"], most_crashes)
    if reason and not row["paused_at"]:
        columns.update(paused_at=now, paused_by="bgtasks", paused_note=reason, paused_until=None)
    return columns


def _pause_reason(task: Task, failures: int, crashes: int, most_crashes: int) -> str:
    """Return why a task must be paused after so many failures and crashes in a row, or nothing."""
    if 0 < task.settings["pause_after_failures"] <= failures:
        return f"failed {failures} times in a row"
    if 0 < most_crashes <= crashes:
        return f"its runs, or their runners, went down {crashes} times in a row"
    return ""


def receivers(task: Task, settings: Settings) -> list[str]:
    """Return the addresses that are told of a task: its own, else those of all."""
    own = task.settings["notify"]
    return list(dict.fromkeys(settings.notify_email if own is None else own))


def notices_of(
    task: Task, row: Row, kind: str, now: float, settings: Settings, **more: Any
) -> list[dict[str, Any]]:
    """Return a notice as a list, or an empty one if nobody wants to hear of it (again).

    A trouble is told once, and once more after each day that it lasts."""
    word = {"recovered": "recovery", "success": "success"}.get(kind, "failure")
    heard = receivers(task, settings) or settings.notify_command
    if not heard or word not in (task.settings["notify_on"] or settings.notify_on):
        return []
    if kind in TROUBLES and kind in row["told"].split():
        if now - row["told_at"] < REMINDER_SECONDS:
            return []
        kind = "still failing" if kind == "failing" else kind
    return [{"at": now, "task": task.name, "run": None, "kind": kind, "about": "", **more}]


def kind_of_end(task: Task, row: Row, end: Row, follows: Row, settings: Settings) -> str:
    """Return what people may want to hear of the end of a run, empty if nothing.

    ``row`` is the task before it, ``follows`` what changed with it."""
    outcome, failures = end["outcome"], row["consecutive_failures"]
    wanted = task.settings["notify_on"] or settings.notify_on
    after = task.settings["notify_after"] or settings.notify_after
    failed = failures >= after and "failure" not in wanted  # then people know of nothing
    if outcome in (DONE, NOTHING, MORE) and (row["told"] or failed) and "recovery" in wanted:
        return "recovered"
    if end["by_hand"]:  # who started it is watching
        return ""
    if follows.get("paused_note"):
        return "paused"
    if outcome in FAILURES:
        return "failing" if failures + 1 >= after else ""
    return {DONE: "success", NOTHING: "success", INTERRUPTED: "interrupted"}.get(outcome, "")


def circumstances(task: Task, settings: Settings) -> dict[str, Any]:
    """Return what may decide whether a task works, to see later what changed."""
    disk = os.statvfs(settings.state_dir)
    started = task.argv[0] if task.argv else sys.executable
    program = os.path.realpath((os.sep not in started and shutil.which(started)) or started)
    own = program == os.path.realpath(os.path.join(settings.tasks_dir, task.script))
    return {
        "its file": [task.fingerprint.split(";")[:2]],
        "its settings": [zlib.crc32(json.dumps(task.settings, default=str).encode())],
        "the param file": [_changed_at(file) for file in settings.files],
        **({} if own else {"the program": f"{program} of {iso(_changed_at(program))}"}),
        "bgtasks": f"{__version__} on Python {sys.version.split()[0]}",
        "the user": user_name(os.geteuid()),
        "the node": settings.node,
        "the boot of the machine": [boot_id()],
        "free disk": disk.f_bavail * disk.f_frsize >> 20,
    }


def _changed_at(path: str) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def changes_since(good: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what is other than it was when a task last worked; of free disk only a want."""
    found = [
        f"{key} ({good[key]} -> {value})" if isinstance(value, str) else key
        for key, value in now.items()
        if key in good and key != "free disk" and good[key] != value
    ]
    before, free = good.get("free disk", 0), now["free disk"]
    low = free < min(before, max(before // 2, 100))
    return found + [f"free disk ({before} -> {free} MiB)"] * low


def refuse_wrong_user(state_dir: str) -> None:
    """Raise RefusedError unless we run as the owner of the state, as its files stay theirs.

    A state that is not there yet will be ours; root may make one only where all belongs to root."""
    me = os.geteuid()
    if me != os.getuid():
        raise RefusedError("runs with another user's rights (setuid); start it as the user itself")
    place = state_dir if os.path.exists(state_dir) else os.path.dirname(state_dir)
    owner = os.stat(place).st_uid if os.path.exists(place) else me
    if owner != me and (place == state_dir or me == 0):
        name = user_name(owner)
        text = f"{place}: belongs to {name}, you are {user_name(me)}"
        raise RefusedError(f"{text}; run it as {name} (sudo -u {name} ...)")


def refuse_unsafe_folder(tasks_dir: str) -> None:
    """Raise RefusedError if somebody else could put a task into the folder."""
    if os.path.isdir(tasks_dir):
        refuse_unsafe(os.stat(tasks_dir), tasks_dir, "folder of tasks")
        refuse_unsafe_parents(os.path.realpath(tasks_dir))


def by_hand_held(task: Task, row: Row, settings: Settings, now: float) -> tuple[str, str] | None:
    """Return what holds back also a run by hand (but `--force`): a pause, a back-off, a window."""
    if row["paused_at"] and (row["paused_until"] is None or row["paused_until"] > now):
        until = f" until {iso(row['paused_until'])}" if row["paused_until"] else ""
        return "paused", joined(f"by {row['paused_by']}{until}", row["paused_note"] or "")
    if (row["not_before"] or 0) > now:
        number = row["consecutive_failures"]
        times = counted(number, "failure")
        return "back-off", f"until {iso(row['not_before'])}, after {times} in a row"
    if task.settings["window"]:
        zone = Zone(task.settings["timezone"] or settings.timezone)
        opens = parse_window(task.settings["window"]).opens(zone, now)
        if opens > now:
            return "window", f"{task.settings['window']}, opens {iso(opens, zone.tzinfo)}"
    return None


def pause(store: Store, name: str, by: str, now: float, until: float | None, note: str) -> None:
    """Let a task not start by its schedule, until a moment or until somebody resumes it."""
    with store:
        store.change(name, paused_at=now, paused_by=by, paused_until=until, paused_note=note)
        store.note_event(name, by, now, joined("paused", note))


def ask_to_end(settings: Settings, store: Store, name: str, by: str, now: float) -> Row | None:
    """Tell the keeper of a task's run to end it; return the run, None if none is at work."""
    row = next((row for row in store.open_runs() if row["task"] == name), None)
    live = os.path.join(settings.state_dir, "runs", row["live"]) if row else ""
    if not row or read_end(row, live, (), int) is not None:
        return None
    notes = append_to(live + ".keeper")
    note(notes, killed=by)
    os.close(notes)
    tell_keeper(live, signal.SIGTERM)
    store.note_event(name, by, now, f"killed run {row['id']}")
    return row


def tell_keeper(live: str, number: int) -> bool:
    """Send a signal to the keeper of a run; return whether it lives."""
    keeper, noted = read_notes(live).get("keeper", [0, ""])
    lives = bool(noted) and identity(keeper) == noted
    if lives:
        unless_gone(os.kill, keeper, number)
    return lives


def request(store: Store, name: str, by: str, now: float) -> None:
    """Let the next look of a runner start a task."""
    with store:
        store.change(name, extra_at=now, extra_trigger="request")
        store.note_event(name, by, now, "requested")


def clear(store: Store, name: str, by: str, now: float) -> None:
    """Note that somebody has seen what went wrong with a task; it ends the back-off."""
    with store:
        forgive(store, name, now)
        store.note_event(name, by, now, "cleared")


def resume(store: Store, name: str, by: str, now: float) -> None:
    """Let a paused task start again; what was counted against it is forgotten."""
    with store:
        store.change(
            name, **dict.fromkeys(("paused_at", "paused_by", "paused_until", "paused_note"))
        )
        forgive(store, name, now)
        store.note_event(name, by, now, "resumed")


def forgive(store: Store, name: str, now: float) -> None:
    """Acknowledge what went wrong with a task, and end its back-off."""
    store.acknowledge(name, now)
    forgiven = {"consecutive_failures": 0, "interruptions": 0, "deferred": 0, "not_before": None}
    store.change(name, **forgiven, told="")
    row = store.task(name)
    if row and row["extra_trigger"] == "retry":
        store.change(name, extra_at=None, extra_trigger=None)


class Runner:
    """One wake-up. Owns its keepers until they have ended."""

    def __init__(
        self, settings: Settings, store: Store, clock: Clock, trigger: str, tell: Tell
    ) -> None:
        self.settings, self.store, self.clock = settings, store, clock
        self.trigger, self.tell = trigger, tell
        self.selection = Selection(*(tuple(getattr(settings, key)) for key in Selection._fields))
        self.running: dict[int, Started | None] = {}  # by process id; None: ends an orphan
        self.queue: list[Row] = []
        self.started = self.failed = self.stop_signal = 0
        self.trouble: BgtasksError | None = None
        self._signals: Signals | None = None
        self._always_started: set[str] = set()
        self._skips: dict[tuple[str, str], dict[str, Any]] = {}  # why due tasks did not start
        self._deferred: set[str] = set()
        self._lifetimes: dict[str, Any] = {}  # of the history, by task; None: as the settings say
        self._steps = int(store.fact("steps") or 0)
        self._began_at, began = clock.now(), clock.monotonic()
        self._offset = self._began_at - began
        budget = settings.cron_max_execution_time
        self._ends_at = began + budget if budget else None  # None: looks once
        self._wakeup = 0  # the number of its row, once it has one

    # -- a wake-up

    def wake_up(self) -> None:
        """Do what is due until the time is up, then wait for the keepers still at work."""
        text = self.selection.text()
        name = f"wakeup-{zlib.crc32(text.encode()):08x}.lock" if text else "wakeup.lock"
        path = os.path.join(self.settings.state_dir, "locks", name)
        lock = take_runner_lock(path, self._ends_at, self.clock)
        if lock is None:
            self._write_wakeup("busy", self.clock.now())
            self.tell("busy", {})
            return
        try:
            self._notice_clock(self.store.last_seen())
            self.sweep()
            self._work()
        finally:
            os.close(lock)
        self._drain()
        if self.started:
            self._clean()
        self._write_wakeup("maintenance" if self.in_maintenance() else "worked", self.clock.now())

    def _work(self) -> None:
        look_at = self.clock.monotonic()
        while not self.stop_signal:
            if self.clock.monotonic() >= look_at:
                self.look()
                pause = self.settings.cron_sleep if self._ends_at else float("inf")
                look_at = self.clock.monotonic() + pause
            self._start_due()
            now = self.clock.monotonic()
            if (not self.queue) if self._ends_at is None else now >= self._ends_at:
                self._skip_queue("parallel")
                return
            wake_at = now + self._due_in(now)
            if self._ends_at and not self.queue:
                look_at = min(look_at, wake_at)
            self._wait(min(look_at, wake_at, self._ends_at or wake_at) - now)
            if self._reap() and not self.queue and self._ends_at:
                look_at = now

    def look(self) -> None:
        """Bring everything up to date, and queue what is due."""
        self._notice_clock(0.0)
        self.read_folder()
        self.settle()
        now = self.clock.now()
        self.queue = []
        for row in self.store.due(now):
            if self._is_due(row, now):
                held = self.held_because(row, now)
                if held:
                    self._skip(row["name"], *held)
                else:
                    self.queue.append(row)
        self.queue.sort(key=_turn)

    def _is_due(self, row: Row, now: float) -> bool:
        if row["always"] and row["name"] not in self._always_started:
            return True
        if any(at is not None and at <= now for at in (row["next_run_at"], row["extra_at"])):
            return True
        return bool(row["after"]) and not self._waits_for(task_from(row), row)

    def _waits_for(self, task: Task, row: Row) -> list[str]:
        """Return the tasks of `after` that have not succeeded since this one last started."""
        since = row["last_started_at"] or row["anchor_at"]
        others = ((name, self.store.task(name)) for name in task.settings["after"])
        return [n for n, other in others if not other or (other["last_good_end_at"] or 0) < since]

    def held_because(self, row: Row, now: float) -> tuple[str, str] | None:
        """Return why a task that is due may not start: a word, and details; None if it may."""
        if row["error"] or not row["enabled"]:
            return ("broken", row["error"]) if row["error"] else ("disabled", "")
        task = task_from(row)
        held = by_hand_held(task, row, self.settings, now)
        if held:
            return held
        if not self.selection.takes(row):
            return "selection", self.selection.text()
        if row["running_since"] is not None:
            return "running", f"since {iso(row['running_since'])}"
        if not {"one", "each", self.settings.node} & set(task.settings["nodes"]):
            return "node", f"runs on {', '.join(task.settings['nodes'])}"
        if self.trigger not in task.settings["wakeup"]:
            return "wakeup", f"is started by {', '.join(task.settings['wakeup'])} only"
        waits_for = [] if row["extra_at"] is not None else self._waits_for(task, row)
        return ("after", f"waits for {', '.join(waits_for)}") if waits_for else None

    def _skip(self, name: str, reason: str, detail: str = "") -> None:
        """Remember why a due task did not start; it is written with the wake-up."""
        now = self.clock.now()
        skip = self._skips.setdefault((name, reason), {"first_at": now})
        skip.update(task=name, reason=reason, detail=detail, last_at=now)

    def _skip_queue(self, reason: str) -> None:
        for row in self.queue:
            self._skip(row["name"], reason)
        self.queue.clear()

    def _due_in(self, now: float) -> float:
        """Return the seconds until the next slot, or until a run no longer keeps others waiting."""
        if self.queue:
            until = [run.counts_until - now for run in self.running.values() if run]
            return min((seconds for seconds in until if seconds > 0), default=3600.0)
        due = self.store.next_due(self.clock.now())
        return 3600.0 if due is None else due - self.clock.now()

    def in_maintenance(self) -> bool:
        return os.path.exists(self.settings.maintenance_flag)

    def _start_due(self) -> None:
        limit = self.settings.cron_limit
        while self.queue and not self.stop_signal:
            now = self.clock.monotonic()
            counting = [run for run in self.running.values() if run and run.counts_until > now]
            alone = self.queue[0]["interruptions"] > 0 or any(run.alone for run in counting)
            if len(counting) >= (1 if alone else self.settings.max_parallel):
                return
            if self.in_maintenance() or (limit and self.started >= limit):
                self._skip_queue("maintenance" if self.in_maintenance() else "limit")
                return
            row = self.queue.pop(0)
            if self._fits(row, now):
                self.start(row)
            self._take_signals()

    def _fits(self, row: Row, now: float) -> bool:
        """Tell if a task will usually end in the time left; if it waited often, it goes anyway."""
        usual = self.store.usual_seconds(row["name"]) if self._ends_at else None
        left = max(0.0, (self._ends_at or now) - now)
        if usual is None or usual <= left or row["deferred"] >= MOST_DEFERRED:
            return True
        self._skip(row["name"], "time", f"needs {duration(usual)}, {duration(left)} were left")
        self._deferred.add(row["name"])
        return False

    def _wait(self, seconds: float) -> None:
        signals = self._catch_signals()
        if not self._wakeup:
            self._write_wakeup("worked", None)
        if self.running:
            self.tell("progress", {"runs": [run for run in self.running.values() if run]})
            seconds = min(seconds, 0.1 if self.trigger == "hand" else 1.0)
        self.clock.wait(seconds, [signals.readable])
        self._take_signals()

    def _catch_signals(self) -> Signals:
        if self._signals is None:
            # what Python sets up at the first use, once here instead of in each child
            _ = faulthandler.enable, resource.setrlimit, altered_signals()
            compile("", "", "exec")
            stopping = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            self._signals = Signals(signal.SIGCHLD, *stopping)
        return self._signals

    def _take_signals(self) -> None:
        """See what arrived. Told to stop, it tells the keepers; told again, they wait no longer."""
        for number in self._catch_signals().taken():
            if number != signal.SIGCHLD:
                self.stop_signal = number
                self._skip_queue("stopped")
                for pid in self.running:
                    os.kill(pid, signal.SIGTERM)

    def _drain(self) -> None:
        while self.running:
            self._wait(3600.0)
            self._reap()
        if self._signals:
            self._signals.close()
            self._signals = None

    def _write_wakeup(self, result: str, ended_at: float | None) -> None:
        values = {
            "started_at": self._began_at,
            "ended_at": ended_at,
            "trigger": self.trigger,
            "user": user_name(os.geteuid()),
            "node": self.settings.node,
            "selection": self.selection.text(),
            "result": result,
            "started": self.started,
            "failed": self.failed,
        }
        known = {"id": self._wakeup} if self._wakeup else {}
        if ended_at is None:  # it goes on: a reason counts once for each wake-up
            self._wakeup = self.store.write_wakeup({**values, **known})
        else:
            skips = self._skips.values()
            self._wakeup = self.store.write_wakeup({**values, **known}, skips, self._deferred)

    def _clean(self) -> None:
        """Remove old history, and look through more of it the more was started."""
        now, until = self.clock.now(), self.clock.monotonic() + CLEANING_SECONDS
        cursor, bites = int(self.store.fact("cleaned") or 0), 2 + self.started // 20
        while bites and self.clock.monotonic() < until:
            cursor, gone = self.store.clean(cursor, self._lifetime, now)
            bites = bites if gone and cursor else bites - 1
        self.store.end_cleaning(cursor, now - self.settings.history_failure_lifetime)

    def _lifetime(self, run: Row) -> float:
        """Return how many seconds a run is kept."""
        name, settings = run["task"], self.settings
        if name not in self._lifetimes:
            row = self.store.task(name)
            self._lifetimes[name] = task_from(row).settings["history_lifetime"] if row else None
        good = run["outcome"] in (DONE, NOTHING, MORE)
        usual = settings.history_success_lifetime if good else settings.history_failure_lifetime
        return float(self._lifetimes[name] or usual)

    # -- what was left behind, and what changed

    def read_folder(self) -> None:
        """Bring the task table up to date with tasks.d."""
        changed, gone, _ = discover(self.settings, self.store.known())
        if not changed and not gone:
            return
        now = self.clock.now()
        broken: list[Task] = []
        with self.store:
            for task in changed:
                old = self.store.task(task.name)
                planned = plan_task(task, old, self.settings, now)
                mended = {"not_before": None} if old and old["not_before"] else {}
                self.store.write_task(task, {**planned, **mended})
                broken += [task] * bool(task.error and (not old or old["error"] != task.error))
            for name in gone:
                self.store.change(name, file="", fingerprint="")
            for task in with_after_errors([task_from(row) for row in self.store.tasks()]):
                self.store.change(task.name, error=task.error)
                broken += [task] * bool(task.error)
        for task in broken:  # once the transaction is over: who hears it may use the store
            self.tell("broken", {"task": task.name, "reason": task.error})

    def settle(self) -> None:
        """Write down the ends of runs that other runners left, and end those past their timeout."""
        mine = {run.run for run in self.running.values() if run}
        for row in self.store.open_runs():
            task = task_from(self.store.task(row["task"]) or {})
            live = os.path.join(self.settings.state_dir, "runs", row["live"])
            if row["id"] in mine or not self._finish(row["id"], task, live):
                self._tell_if_hanging(task, row)
                if row["id"] not in mine:
                    self._end_if_overdue(task, live)

    def _tell_if_hanging(self, task: Task, run: Row) -> None:
        late = self.clock.now() - run["deadline_at"] - HANGING_SECONDS
        row = self.store.task(task.name) if late > 0 else None
        if row and late > (self.store.usual_seconds(task.name) or 0):
            about = f"is at work since {iso(run['started_at'])}, past its deadline"
            self._note(task, row, "hanging", run=run["id"], about=about)

    def _note(self, task: Task, row: Row, kind: str, **more: Any) -> None:
        notices = notices_of(task, row, kind, self.clock.now(), self.settings, **more)
        if notices:
            with self.store:
                self.store.note_notices(notices)

    def _end_if_overdue(self, task: Task, live: str) -> None:
        notes = read_notes(live)
        keeper, noted = notes.get("keeper", [0, ""])
        worked = self.clock.monotonic() - notes.get("began", self.clock.monotonic())
        if worked > task.settings["timeout"] and identity(keeper) != noted and "group" in notes:
            self.tell("overdue", {"task": task.name})
            self._catch_signals()
            self.store.close()
            end = partial(end_orphan, live, notes["group"][0], self.clock)
            self.running[fork_apart(60, end)] = None

    def sweep(self) -> None:
        """Remove files of runs that were never opened: their runner died before its claim.

        The lock is held meanwhile, so that nobody begins a run with a file that is being removed.
        """
        folder = os.path.join(self.settings.state_dir, "runs")
        for name in {file.partition(".")[0] for file in os.listdir(folder)}:
            live = os.path.join(folder, name)
            try:
                held = probe_lock(live + ".out")
            except FileNotFoundError:
                held = -1
            if held is not None and all(row["live"] != name for row in self.store.open_runs()):
                remove_live_files(live)
            if held is not None and held >= 0:
                os.close(held)

    def _notice_clock(self, seen: float) -> None:
        """See if the wall clock was set back since the last look, or since it was ``seen``.

        Then what follows real time is planned anew; fixed times that were started are not repeated.
        """
        now = self.clock.now()
        offset = now - self.clock.monotonic()
        back, self._offset = max(self._offset - offset, seen - now), offset
        if back <= CLOCK_STEP_SECONDS:
            return
        self._steps += 1
        self.store.put("fact", {"name": "steps", "value": str(self._steps)}, "name")
        self.tell("clock", {})
        for row in self.store.tasks():
            if row["next_run_at"] is not None and row["file"] and not row["error"]:
                planned = self._schedule(task_from(row), row).next_after(now, row["last_slot"])
                if planned is not None and planned < row["next_run_at"]:
                    self.store.plan(row["name"], planned, row["next_run_at"])

    def _schedule(self, task: Task, row: Row) -> Schedule:
        return schedule_of(task.settings, self.settings, task.name, row["anchor_at"])

    def _tell_more(self, task: Task, row: Row, follows: Row) -> None:
        """Say that a task was paused, or that it is half-way there."""
        most, failures = task.settings["pause_after_failures"], row["consecutive_failures"] + 1
        if follows.get("paused_note"):
            self.tell("paused", {"task": task.name, "reason": follows["paused_note"]})
        elif follows.get("not_before") and most and failures == (most + 1) // 2:
            self.tell("warning", {"task": task.name, "number": failures, "most": most})

    def _next_after(self, task: Task, row: Row, moment: float) -> float | None:
        try:
            return self._schedule(task, row).next_after(moment)
        except TaskError:  # it was broken, or lost its package, while the task ran
            return None

    # -- one run

    def run_by_hand(self, name: str) -> Row | None:
        """Run one task now and return its run; None if it runs already, or could not be started."""
        self.sweep()
        self.settle()
        row = self.store.task(name)
        run = self.start(row) if row else None
        self._drain()
        if run:
            self._write_wakeup("worked", self.clock.now())
        return self.store.run(run) if run else None

    def start(self, row: Row) -> int | None:
        """Claim and start a run; return its number, or None if there is none to start."""
        task = task_from(row)
        try:
            claim = self._claim(task, row)
        except TaskError as error:  # a package that its schedule needs is gone
            self.store.write_task(task._replace(error=str(error), fingerprint=""), {})
            return None
        late, most = claim["now"] - claim["planned_at"], task.settings["missed_after"]
        if claim["slot"] is not None and most is not None and late > most:
            reason = f"was {duration(late)} late, more than missed_after allows"
            notices = notices_of(task, row, "missed", claim["now"], self.settings, about=reason)
            live = os.urandom(8).hex()
            self.store.miss({**claim, "reason": reason, "live": live}, notices)
            self.tell("missed", {"task": task.name, "reason": reason})
            return None
        live, output = new_live_files(self.settings.state_dir)
        try:
            run = self.store.claim({**claim, "live": os.path.basename(live)})
            if run is None:
                remove_live_files(live)
                return None
            brief = self._brief(run, task, row, claim, live)
            self._catch_signals()
            usual = self.store.usual_seconds(task.name)
            self.store.close()
            pid = self._start_keeper(brief, output)
        except OSError as error:
            self._give_back(claim, live, error)
            return None
        finally:
            os.close(output)
        patience = max(60.0, 2 * usual) if usual is not None else float("inf")
        until = min(brief.deadline, brief.started + patience)
        self.running[pid] = Started(run, task, live, until, row["interruptions"] > 0)
        self.started += 1
        self._always_started.add(task.name)
        if not row["runs"] and self.trigger != "hand":
            self._note(task, row, "new", run=run, about=f"{task.file}, a new file")
        facts = {"task": task.name, "run": run, "ping": task.settings["ping"]}
        self.tell("start", {**facts, "planned_at": claim["planned_at"]})
        return run

    def _start_keeper(self, brief: Brief, output: int) -> int:
        return fork(lambda: keep(brief, output, self.clock))

    def _ended_keepers(self) -> list[int]:
        return [pid for pid in self.running if os.waitpid(pid, os.WNOHANG)[0]]

    def _claim(self, task: Task, row: Row) -> dict[str, Any]:
        """Return what to claim: the slot that is due, an extra start, or one with neither."""
        now = self.clock.now()
        by_hand = self.trigger == "hand"
        slot, extra = (
            None if by_hand or at is None or at > now else at
            for at in (row["next_run_at"], row["extra_at"])
        )
        extra = extra if slot is None else None
        schedule = self._schedule(task, row) if slot else None
        follows = slot is None and extra is None and row["after"] and not by_hand
        return {
            "task": task.name,
            "slot": slot,
            "next_run_at": schedule and schedule.next_after(now, slot),
            "missed_slots": schedule.missed(slot, now) if schedule and slot else 0,
            "extra_at": extra,
            "planned_at": slot or extra or now,
            "deadline_at": now + self._deadline_seconds(task),
            "trigger": row["extra_trigger"] if extra else "after" if follows else self.trigger,
            "last_started_at": row["last_started_at"],
            "node": self.settings.node,
            "steps": self._steps,
            "now": now,
        }

    def _deadline_seconds(self, task: Task) -> float:
        if task.settings["deadline"]:
            return float(task.settings["deadline"])
        return max(60.0, self._ends_at - self.clock.monotonic()) if self._ends_at else 600.0

    def _brief(self, run: int, task: Task, row: Row, claim: Row, live: str) -> Brief:
        given = {
            "task": task.name,
            "run": run,
            "slot": claim["planned_at"],
            "deadline": claim["deadline_at"],
            "last_success": row["last_success_at"],
            "node": self.settings.node,
            "state_dir": self.settings.state_dir,
            "maximum": task.settings["maximum"],
            "options": task.settings["options"],
            "settings": {key: getattr(self.settings, key) for key in task.settings["settings"]},
            "state": json.loads(row["state"]),
        }
        with open(append_to(live + ".input"), "w") as file:
            json.dump(given, file)
        began = self.clock.monotonic()
        deadline = began + claim["deadline_at"] - claim["now"]
        env = task_environment(task, live, given)
        me, folder = (os.getpid(), identity(os.getpid())), self.settings.tasks_dir
        return Brief(task, live, me, folder, began, deadline, env, given)

    def _give_back(self, claim: Row, live: str, error: OSError) -> None:
        """Undo a claim, as the system would not give us a process; the next look tries again."""
        self.store.give_back({**claim, "live": os.path.basename(live)})
        remove_live_files(live)
        self.queue.clear()
        self.trouble = ProcessError(f"cannot start a process ({error.strerror}); raise the limit")
        self.tell("trouble", {"reason": str(self.trouble)})

    def _reap(self) -> bool:
        """Write down the runs whose keepers have ended; tell if there were any."""
        ended = self._ended_keepers()
        for run in [self.running.pop(pid) for pid in ended]:
            if run:
                self.tell("progress", {"runs": [run], "ended": True})
                self._finish(run.run, run.task, run.live)
        return bool(ended)

    def _finish(self, run: int, task: Task, live: str) -> bool:
        """Write down the end of a run if it is over; return whether it is."""
        row, now = self.store.run(run), self.clock.now()
        zone = Zone(task.settings["timezone"] or self.settings.timezone)
        secrets = self.settings.secrets
        end = row and read_end(row, live, secrets, lambda text: read_moment(text, zone, now))
        known = self.store.task(task.name)
        if not end or not known or not row:
            return False
        end = {**end, "now": now, "by_hand": row["trigger"] == "hand"}
        next_after = partial(self._next_after, task, known)
        follows = what_follows(task, known, end, self.settings.max_interruptions, next_after)
        if end["outcome"] in (DONE, NOTHING, MORE):
            follows["good"] = json.dumps(circumstances(task, self.settings))
        kind = kind_of_end(task, known, end, follows, self.settings)
        about = follows.get("paused_note") or end["reason"]
        more = {"run": run, "about": about if kind in TROUBLES else end["message"]}
        notices = notices_of(task, known, kind, now, self.settings, **more) if kind else []
        finished = self.store.finish(run, end, follows, notices)
        if finished:
            self.failed += end["outcome"] in FAILURES
            self.tell("end", {**finished, "ping": task.settings["ping"]})
            self._tell_more(task, known, follows)
        remove_live_files(live)
        return True


def _turn(row: Row) -> tuple[int, bool, int, float]:
    """Return the place of a due task in the queue.

    First who waited too often for a wake-up with time enough. Repeats stand behind the others, and
    before them those whose last run failed, overran or took its runner down, so that they delay
    nobody."""
    troubled = row["last_outcome"] not in (None, DONE, NOTHING, MORE) or bool(row["last_overran"])
    due_at = row["extra_at"] if row["next_run_at"] is None else row["next_run_at"]
    last = 2 * (row["interruptions"] > 0) + (row["extra_trigger"] == "repeat")
    return last if row["deferred"] < MOST_DEFERRED else -1, troubled, row["order"], due_at or 0.0


def task_environment(task: Task, live: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of a task: built new, and without secrets."""
    passed = (key for key in os.environ if key in PASSED_ON or key.startswith("LC_"))
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", **{key: os.environ[key] for key in passed}}
    for name, value in task.settings["options"].items():
        if not is_secret(name):
            key = "".join(c if c.isascii() and c.isalnum() else "_" for c in name.upper())
            env[f"BGTASKS_OPTION_{key}"] = value if isinstance(value, str) else json.dumps(value)
    env.update(task.settings["env"])
    for key in ("task", "run", "slot", "deadline", "last_success", "node", "state_dir", "maximum"):
        value = int(given[key]) if isinstance(given[key], float) else given[key]
        env[f"BGTASKS_{key.upper()}"] = "" if value is None else str(value)
    return {**env, "BGTASKS_REPORT": live + ".report", "BGTASKS_INPUT": live + ".input"}


# --- Notifications --------------------------------------------------------------------------------
# What was noted of runs goes in; mails, pings and the input of notify_command come out. What sends
# them are processes of their own that end within seconds: nothing here delays or fails a run, and
# what could not be sent stays in the outbox.

SEND_SECONDS = 10
PING_SECONDS = 5
PINGED_BYTES = 10_000
MOST_MAIL_BYTES = 64 << 20
MOST_HEADER_BYTES = 1 << 20
OLDEST_MAIL_SECONDS = 4 * 86400.0
DELIVERY_SECONDS = 600.0  # a wake-up that stays longer tells people in between
OURS = "bgtasks-"  # how the names of our own notices in the outbox begin

MailServerError = _kind("MailServerError", 75)  # no mail can be sent, whatever it is


class Mail(NamedTuple):
    """A message and its envelope. What is sent has CRLF at the end of each line, and no Bcc."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes


def read_mail(content: bytes, now: float, params: Mapping[str, Any]) -> Mail:
    """Return a message as it is to be sent: RFC 5322. Raises DataError.

    `X-Envelope-From` and `X-Envelope-To` say from and to whom, else the message's own fields do.
    ``now`` dates one that has no date; tried again, a mail of the outbox is the same mail."""
    fields, body = _split_mail(content)
    named: dict[str, list[bytes]] = {}
    for name, text in fields:
        if not (name.startswith("x-envelope-") and name in named):  # that of sendmail stands first
            named.setdefault(name, []).append(text)

    def addresses(*names: str) -> tuple[str, ...]:
        found = [_addresses(text) for name in names for text in named.get(name, ())]
        return tuple(dict.fromkeys(address for some in found for address in some))

    own = own_address(params)
    sender = (*addresses("sender"), *addresses("from"), own)[0]
    if "x-envelope-from" in named:  # `<>` wants no answer: RFC 5321, section 4.5.5
        sender = (*addresses("x-envelope-from"), "")[0]
    recipients = addresses("x-envelope-to") or addresses("to", "cc", "bcc")
    try:
        read_addresses(",".join((sender, *recipients)))
    except ValueError as error:
        raise DataError(f"mail: {error}") from None
    if not recipients:
        raise DataError("mail: names nobody to send it to; it needs To, Cc or Bcc")
    hidden = ("x-envelope-from", "x-envelope-to", "bcc", "return-path")
    lines = [text for name, text in fields if name not in hidden]
    lines += _missing_fields(named, sender or own, now, content)
    return Mail(sender, recipients, b"\r\n".join([*lines, b"", body]))


@lru_cache(32)
def _addresses(field: bytes) -> tuple[str, ...]:
    """Return the addresses in a header field; most senders are the same."""
    from email import utils

    text = field.decode("utf-8", "replace").partition(":")[2].replace("\r\n", "")
    # strict, it takes `a@x, b@x,` for no address at all
    lenient = {"strict": False} if hasattr(utils, "supports_strict_parsing") else {}
    try:
        return tuple(address for _, address in utils.getaddresses([text], **lenient) if address)
    except RecursionError:  # (((((...
        raise DataError("mail: has an address that nobody can read") from None


def _split_mail(content: bytes) -> tuple[list[tuple[str, bytes]], bytes]:
    """Return the header fields of a message, each with its name and its folded lines, and the body.

    A bare CR or LF ends a line like both together, so that no server can see another end than us:
    https://www.postfix.org/smtp-smuggling.html"""
    text = content
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    fields: list[tuple[str, list[bytes]]] = []
    at, body = 0, b""
    end = text.find(b"\n\n", 0, MOST_HEADER_BYTES) + 2
    for line in text[: end if end > 1 else MOST_HEADER_BYTES + 1].splitlines(keepends=True):
        name, colon, _ = line.partition(b":")
        start, at = at, at + len(line)
        if at > MOST_HEADER_BYTES:
            raise DataError("mail: its header is larger than 1 MiB")
        if line[:1] in (b" ", b"\t") and fields:
            fields[-1][1].append(line.rstrip(b"\n"))
        elif colon and name.strip() and all(33 <= c < 127 for c in name.rstrip()):
            fields.append((name.decode().strip().lower(), [line.rstrip(b"\n")]))
        elif not line.startswith(b"From "):  # the mark of an mbox
            body = text[at if line == b"\n" else start :].replace(b"\n", b"\r\n")
            break
    return [(name, b"\r\n".join(lines)) for name, lines in fields], body


def _missing_fields(
    named: Mapping[str, object], sender: str, now: float, content: bytes
) -> Iterator[bytes]:
    if "from" not in named:
        yield f"From: {sender}".encode()
    if "date" not in named:
        from email.utils import formatdate

        yield f"Date: {formatdate(now)}".encode()
    if "message-id" not in named:
        digest = hashlib.sha256(repr(now).encode() + content).hexdigest()
        yield f"Message-ID: <{digest[:32]}@bgtasks>".encode()


def own_host(params: Mapping[str, Any]) -> str:
    """Return the name of this machine as it may stand in a mail address."""
    text = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in params["node"])
    return ".".join(filter(None, text.split("."))) or "localhost"


def own_address(params: Mapping[str, Any]) -> str:
    """Return the address that our own mails come from."""
    return str(params["mail_from"][0] if params["mail_from"] else f"bgtasks@{own_host(params)}")


def post(
    outbox: str, content: bytes, now: float, prefix: str = "mail-", suffix: str = "eml"
) -> str:
    """Put a file into the outbox, durable, and whole or not at all; return its name."""
    name = f"{prefix}{now:.6f}-{os.urandom(6).hex()}.{suffix}"
    hidden = os.path.join(outbox, f".{name}")
    _make(outbox, lambda: os.mkdir(outbox, 0o700))
    try:
        with open(os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(hidden, os.path.join(outbox, name))
        folder = os.open(outbox, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        remove_file(hidden)
        raise cannot_create(hidden, error) from None
    return name


def give_up(path: str, answer: str, *, copy: bool = False) -> None:
    """Move a mail that cannot be sent (or a copy of it) to `failed`, with the answer beside it."""
    folder, name = os.path.split(path)
    folder = os.path.join(folder, "failed")
    _make(folder, lambda: os.mkdir(folder, 0o700))
    target = os.path.join(folder, os.fsdecode(os.fsencode(name)[:200]))  # room for the suffixes
    while os.path.lexists(target):
        target += "_"
    with open(target + ".answer", "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(answer + "\n")
    try:
        if copy:
            shutil.copyfile(path, target)
        else:
            os.rename(path, target)
    except FileNotFoundError:  # somebody else has sent it meanwhile
        os.unlink(target + ".answer")


def take_mail(path: str) -> int | None:
    """Return a file of the outbox, open and locked; None if it is gone or somebody sends it.

    Raises DataError if it is no plain file, as a link could lead to what is no mail."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and info.st_size <= MOST_MAIL_BYTES:
        return fd
    os.close(fd)
    if not info.st_nlink:
        return None
    raise DataError(f"{path}: is no plain file with one name and at most 64 MiB")


class MailServer:
    """Where mails go: an SMTP server, connected when needed, or the local sendmail program."""

    def __init__(self, params: Mapping[str, Any], seconds: float = 30.0) -> None:
        self._params, self._seconds = params, seconds
        self._smtp: Any = None
        self.said = ""  # the answer to the last mail that was taken

    def send(self, mail: Mail) -> Mapping[str, tuple[int, str]]:
        """Send one mail; return the answer for each recipient who was refused, by address.

        Codes from 500 on are for good. Raises MailServerError if it cannot be reached."""
        if not self._params["smtp_host"]:
            return self._pipe(mail)
        self._smtp = self._smtp or self._connect()
        try:
            return {name: _answer(*each) for name, each in self._transact(mail).items()}
        except smtplib.SMTPRecipientsRefused as error:  # after 421 it asked no more
            *_, last = error.recipients.values()
            refused = {to: _answer(*error.recipients.get(to, last)) for to in mail.recipients}
        except smtplib.SMTPResponseException as error:
            code, text = _answer(error.smtp_code, error.smtp_error)
            if code in (530, 538):  # RFC 4954: it wants a login or TLS first, whatever the mail
                raise MailServerError(f"mail server: {code} {text}; set smtp_user") from None
            refused = dict.fromkeys(mail.recipients, (code, text))
        except smtplib.SMTPNotSupportedError as error:
            refused = dict.fromkeys(mail.recipients, (553, str(error)))
        except (smtplib.SMTPException, OSError) as error:
            refused = dict.fromkeys(mail.recipients, (421, f"the connection broke ({error})"))
            self.close()
        if self._smtp and not self._smtp.sock:  # it said 421 and left
            self._smtp = None
        return refused

    def _transact(self, mail: Mail) -> dict[str, tuple[int, bytes]]:
        plain = "".join((mail.sender, *mail.recipients)).isascii()
        eight = not mail.content.isascii() and self._smtp.has_extn("8bitmime")
        options = ["SMTPUTF8"] * (not plain) + ["BODY=8BITMIME"] * eight
        return dict(self._smtp.sendmail(mail.sender, mail.recipients, mail.content, options))

    def _heard(self, reply: tuple[int, bytes]) -> tuple[int, bytes]:
        self.said = f"{reply[0]} {reply[1].decode('utf-8', 'replace')}"
        return reply

    def _connect(self) -> Any:
        host, user, how = (self._params[key] for key in ("smtp_host", "smtp_user", "smtp_security"))
        port = self._params["smtp_port"] or SMTP_PORTS[how]
        here = own_host(self._params)
        if user and how == "none" and host not in ("localhost", "127.0.0.1", "::1"):
            raise MailServerError("smtp_user needs smtp_security = starttls or tls")
        smtp: Any = None
        try:
            trusted: Any = None
            if how != "none":
                trusted = ssl.create_default_context(cafile=self._params["smtp_ca_file"] or None)
            if how == "tls":
                smtp = smtplib.SMTP_SSL(host, port, here, timeout=self._seconds, context=trusted)
            else:
                smtp = smtplib.SMTP(host, port, here, timeout=self._seconds)
            if how == "starttls":
                smtp.starttls(context=trusted)
            if user:
                smtp.login(user, self._params["smtp_pwd"])
            else:
                smtp.ehlo_or_helo_if_needed()
        except (OSError, smtplib.SMTPException, ValueError) as error:
            if smtp is not None:
                smtp.close()
            said = getattr(error, "smtp_error", None)
            text = shortened(_answer(0, said)[1] if said else str(error), 300)
            way_out = "check smtp_host and the other settings smtp_..."
            raise MailServerError(f"mail server {host}:{port}: {text}; {way_out}") from None
        take = smtp.data
        smtp.data = lambda content: self._heard(take(content))  # pyright: ignore[reportUnknownLambdaType] # sendmail() tells no answer
        return smtp

    def _pipe(self, mail: Mail) -> Mapping[str, tuple[int, str]]:
        path, text = self._params["sendmail_path"], mail.content.replace(b"\r\n", b"\n")
        command = [path, "-i", "-f", mail.sender, "--", *mail.recipients]
        try:
            done = subprocess.run(  # noqa: S603 - the program that the param file names
                command, input=text, capture_output=True, timeout=self._seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return dict.fromkeys(mail.recipients, (451, f"took more than {self._seconds:.0f} s"))
        except OSError as error:
            if error.errno == errno.E2BIG:  # too many recipients for the arguments of a program
                return dict.fromkeys(mail.recipients, (554, str(error)))
            way_out = "set smtp_host or sendmail_path"
            raise MailServerError(f"{path}: {error.strerror}; {way_out}") from None
        self.said = f"taken by {path}"
        said = shortened((done.stderr or done.stdout).decode("utf-8", "replace").strip(), 400)
        for_good = done.returncode in (65, 67, 68)  # sysexits.h: data, user and host
        answer = 554 if for_good else 451, said or f"exit code {done.returncode}"
        return dict.fromkeys(mail.recipients, answer) if done.returncode else {}

    def close(self) -> None:
        if self._smtp:
            try:
                self._smtp.quit()
            except (OSError, smtplib.SMTPException):  # it has left already
                pass
            self._smtp = None


def _answer(code: int, text: bytes | str) -> tuple[int, str]:
    return code, text.decode("utf-8", "replace") if isinstance(text, bytes) else text


# -- what a notice says

# What happened to a task, the worst first.
HAPPENED = {
    "failing": "began to fail",
    "paused": "was paused",
    "hanging": "hangs",
    "interrupted": "was interrupted",
    "still failing": "still fails",
    "missed": "missed its slot",
    "recovered": "works again",
    "success": "succeeded",
    "new": "ran for the first time",
}


def notice_facts(settings: Settings, store: Store, notice: Row) -> dict[str, Any]:
    """Return all that can be said of a notice, as notify_command gets it."""
    name, kind = notice["task"], notice["kind"]
    row, run = store.task(name) or {}, store.run(notice["run"] or 0)
    bad = kind in TROUBLES
    since, output = store.trouble_since(name) if bad else None, run["output"] if run else ""
    if run and run["outcome"] == RUNNING:
        live = os.path.join(settings.state_dir, "runs", run["live"])
        output = read_output(live, settings.secrets)
    changed = changes_since(json.loads(row["good"]), circumstances(task_from(row), settings))
    us = [sys.executable, os.path.realpath(__file__)]
    us += [f"--param_file={','.join(settings.files)}"] if settings.files else []
    words = [["explain", name], ["log", str(run["id"])] if run else ["history", name]]
    words += [["resume", name]] if kind == "paused" else [["clear", name]] * bad
    return {
        "task": name,
        "event": kind,
        "text": f"{name} {HAPPENED[kind]}",
        "at": iso(notice["at"]),
        "about": shortened(notice["about"], 1000),
        "run": notice["run"],
        "outcome": run["outcome"] if run else None,
        "since": iso(since),
        "failures_in_a_row": row["consecutive_failures"] if bad else 0,
        "last_success_at": iso(row["last_success_at"]),
        "changed": changed if bad and row["last_success_at"] else [],
        "output": [shortened(line, 200) for line in output.expandtabs().splitlines()[-20:]],
        "look_further": [visible(shlex.join([*us, *word])) for word in words],
    }


def notice_text(facts: Mapping[str, Any]) -> str:
    """Return a notice as a paragraph of a mail."""
    lines = [joined(facts["text"], facts["about"])]
    for words, key in (("at", "at"), ("since", "since"), ("last success", "last_success_at")):
        lines += [f"  {words}: {facts[key]}"] if facts[key] else []
    if facts["failures_in_a_row"]:
        lines.append(f"  failures in a row: {facts['failures_in_a_row']}")
    if facts["changed"]:
        lines.append(f"  changed since it last worked: {', '.join(facts['changed'])}")
    if facts["output"]:
        lines += ["  the last it printed:", *(f"  | {line}" for line in facts["output"])]
    lines += ["  to look further:", *(f"    {command}" for command in facts["look_further"])]
    return "\n".join(lines)


def summary(all_facts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the subject for some notices, and the sentence to begin with if there is one."""
    failing = list(dict.fromkeys(f["task"] for f in all_facts if f["event"] == "failing"))
    if len(failing) > 1:
        text = f"{len(failing)} tasks began to fail: {', '.join(failing)}"
        return text, f"{text}, in the same wake-up: look for what they share.\n\n"
    return ", ".join(dict.fromkeys(facts["text"] for facts in all_facts)), ""


def notice_mail(
    settings: Settings, address: str, all_facts: Sequence[Mapping[str, Any]], now: float
) -> bytes:
    """Return the mail that tells somebody of some notices."""
    from email import policy
    from email.message import EmailMessage
    from email.utils import formatdate

    subject, first = summary(all_facts)
    plain = (address + own_address(settings.values)).isascii()
    message = EmailMessage(policy.default.clone(utf8=not plain))
    message["From"], message["To"] = own_address(settings.values), address
    message["Subject"] = shortened(f"[bgtasks {settings.node}] {subject}", 200)
    message["Date"] = formatdate(now)
    message["Message-ID"] = f"<{os.urandom(12).hex()}@{own_host(settings.values)}>"
    message["Auto-Submitted"] = "auto-generated"
    texts = [notice_text(facts) for facts in all_facts]
    where = f"bgtasks {__version__} on {settings.node}, as {user_name(os.geteuid())}"
    texts.append(visible(f"{where}, state in {settings.state_dir}"))
    text = first + "\n\n".join(texts) + "\n"
    message.set_content(text, cte="quoted-printable")
    return message.as_bytes()


# -- how it gets to people


class Notifier:
    """Lets people hear of a wake-up. Owns the processes that send."""

    def __init__(self, settings: Settings, store: Store, clock: Clock) -> None:
        self._settings, self._store, self._clock = settings, store, clock
        self._senders: list[int] = []
        self._pinged: dict[int, int] = {}  # who pings the start of a run
        self._delivered_at = clock.monotonic()

    def tell(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Take what a runner tells: ping, and deliver what has waited for long."""
        if kind in ("start", "end") and facts["ping"]:
            good = kind == "end" and facts["outcome"] in (DONE, NOTHING, MORE)
            path = "/start" if kind == "start" else "" if good else "/fail"
            body = facts.get("output", "").encode()[-PINGED_BYTES:]
            run, url = facts["run" if kind == "start" else "id"], facts["ping"]
            before = self._pinged.pop(run, 0)  # each ends within seconds

            def in_order() -> int:
                while before and identity(before):  # else it would seem to be at work for ever
                    self._clock.wait(0.02)
                signal.alarm(PING_SECONDS)
                return ping(url, path, body)

            self._start(2 * PING_SECONDS, in_order)
            if kind == "start" and self._senders:
                self._pinged[run] = self._senders[-1]
        if self._clock.monotonic() - self._delivered_at > DELIVERY_SECONDS:
            self.deliver()

    def _start(self, seconds: int, body: Callable[[], int]) -> None:
        self._store.close()
        self._senders = [pid for pid in self._senders if not self._reap(pid, os.WNOHANG)]
        try:
            self._senders.append(fork_apart(seconds, body))
        except OSError:  # there is no process to be had; what is to be sent is kept
            pass

    def deliver(self) -> None:
        """Turn notices into mails and input of notify_command, and send what waits."""
        self._delivered_at = self._clock.monotonic()
        settings = self._settings
        if self._store.notices():
            self._post_notices()
        if not settings.email_asynchronous and own_mails(settings.outbox, ".eml"):
            self._start(SEND_SECONDS, lambda: send_own_mails(settings, self._clock))
        if own_mails(settings.outbox, ".json"):
            self._start(SEND_SECONDS, lambda: run_notify_command(settings, self._clock))

    def _post_notices(self) -> None:
        """Put into the outbox what people are to be told; other runners wait, or would say it too.

        What cannot be written, as the disk is full, say, stays for the next delivery."""
        path = os.path.join(self._settings.state_dir, "locks", "notices.lock")
        try:
            with open(path, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                notices = self._store.notices()
                self._post(notices)
                self._store.forget_notices(notices[-1]["id"] if notices else 0)
        except (BgtasksError, OSError):
            pass

    def _post(self, notices: Sequence[Row]) -> None:
        settings, now = self._settings, self._clock.now()
        by_address: dict[str, list[dict[str, Any]]] = {}
        all_facts = [notice_facts(settings, self._store, notice) for notice in notices]
        all_facts.sort(key=lambda facts: list(HAPPENED).index(facts["event"]))
        for facts in all_facts:
            task = task_from(self._store.task(facts["task"]) or {})
            for address in receivers(task, settings):
                by_address.setdefault(address, []).append(facts)
        files = [(notice_mail(settings, *each, now), "eml") for each in by_address.items()]
        if settings.notify_command:
            found = {"version": __version__, "node": settings.node, "at": iso(now)}
            found.update(subject=summary(all_facts)[0], events=all_facts)
            files.append((json.dumps(found).encode(), "json"))
        names: list[str] = []
        try:
            for content, suffix in files:
                names.append(post(settings.outbox, content, now, OURS, suffix))
        except BgtasksError:  # all or none, else who came first would get it each time
            for name in names:
                remove_file(os.path.join(settings.outbox, name))
            raise

    def close(self) -> None:
        """Wait for what still sends; each ends within seconds."""
        self.deliver()
        self._senders = [pid for pid in self._senders if not self._reap(pid, 0)]

    def _reap(self, pid: int, how: int) -> int:
        ended, status = os.waitpid(pid, how)
        if os.WIFSIGNALED(status):  # the kernel ended it in time, but not what it started
            signal_group(pid, signal.SIGKILL)
        return ended


def own_mails(outbox: str, suffix: str) -> list[str]:
    """Return the names of our own notices in the outbox, oldest first."""
    try:
        names = os.listdir(outbox)
    except OSError:
        return []
    return sorted(name for name in names if name.startswith(OURS) and name.endswith(suffix))


def send_file(
    server: MailServer, path: str, params: Mapping[str, Any], to: tuple[str, ...] = ()
) -> Mapping[str, tuple[int, str]] | None:
    """Send a file of the outbox, while it is locked, and remove it once all have taken it.

    Return who refused it with their answers; None if it is gone or somebody else sends it. ``to``
    are the recipients if not all. Whoever is killed between the server's answer and the removal
    leaves a mail that is sent again: RFC 1047."""
    try:
        fd = take_mail(path)
        if fd is None:
            return None
        with open(fd, "rb") as file:
            if not os.access(os.path.dirname(path), os.W_OK, effective_ids=True):
                raise RefusedError(f"{path}: cannot be removed, so it is not sent either")
            mail = read_mail(file.read(), os.fstat(fd).st_mtime, params)
            refused = server.send(mail._replace(recipients=to or mail.recipients))
            if not refused:
                os.unlink(path)
    except DataError as error:
        return {"not sent": (554, str(error))}
    return refused


def answers(refused: Mapping[str, tuple[int, str]]) -> str:
    return "; ".join(f"{name}: {code} {text}" for name, (code, text) in refused.items())


def send_own_mails(settings: Settings, clock: Clock) -> int:
    """Send the notices in the outbox; those that nobody takes are given up in the end."""
    server, trouble = MailServer(settings.values, SEND_SECONDS - 2), ""
    for name in own_mails(settings.outbox, ".eml"):
        path = os.path.join(settings.outbox, name)
        refused: Mapping[str, tuple[int, str]] = {}
        try:
            refused = {} if trouble else send_file(server, path, settings.values) or {}
        except BgtasksError as error:
            trouble = str(error)
        if trouble or refused:
            refused = refused or {"not sent": (421, trouble)}
            old = clock.now() - os.lstat(path).st_mtime > OLDEST_MAIL_SECONDS
            if old or all(code >= 500 for code, _ in refused.values()):
                give_up(path, answers(refused))
    server.close()
    return EXIT_OK


def run_notify_command(settings: Settings, clock: Clock) -> int:
    """Hand the notices in the outbox to notify_command, and remove those that it took."""
    command = shlex.split(settings.notify_command)
    for name in own_mails(settings.outbox, ".json"):
        path = os.path.join(settings.outbox, name)
        try:
            fd = take_mail(path)
        except DataError as error:
            give_up(path, str(error))
            continue
        if fd is None:
            continue
        with open(fd, "rb") as file:
            old = clock.now() - os.fstat(fd).st_mtime > OLDEST_MAIL_SECONDS
            try:
                code = command and subprocess.call(command, stdin=file, timeout=SEND_SECONDS - 2)  # noqa: S603 - as above
            except (OSError, subprocess.TimeoutExpired):
                code = EXIT_FAILED
            if code and not old:  # the next time, and in this order
                break
            os.unlink(path)
    return EXIT_OK


def may_follow(old: str, new: str) -> bool:
    """Tell whether a redirect stays on the same server, or leads to its https."""
    from urllib.parse import urlsplit

    before, after = urlsplit(old), urlsplit(new)
    return after[:2] == before[:2] or (after[0], after[1].lower()) == ("https", before.hostname)


def ping(url: str, path: str, body: bytes) -> int:
    """Tell a dead-man URL that a run started or ended: https://healthchecks.io/docs/http_api/"""
    import http.client
    import urllib.request
    from urllib.parse import urlsplit

    class SameHost(urllib.request.HTTPRedirectHandler):
        def redirect_request(
            self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
        ) -> Any:
            """Follow a redirect only within the same server; else it counts as an answer."""
            if may_follow(url, newurl):
                return super().redirect_request(req, fp, code, msg, headers, newurl)
            return None

    parts = urlsplit(url)
    where = parts._replace(path=parts.path.rstrip("/") + path).geturl()
    try:
        urllib.request.build_opener(SameHost).open(where, body, timeout=PING_SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException):  # URLError is an OSError
        return EXIT_FAILED
    return EXIT_OK


# --- Reports --------------------------------------------------------------------------------------
# Rows of the store go in; JSON values and text for people come out. Nothing here writes or prints.

WORST_FIRST = ("broken", "missing", "paused", "disabled", "active", "ignored")
NO_TASK: Mapping[str, Any] = {
    **dict.fromkeys("next_run_at progress last_started_at last_ended_at last_success_at".split()),
    **dict.fromkeys("last_outcome last_seconds min_seconds average_seconds max_seconds".split()),
    **dict.fromkeys("total_seconds usual_seconds overran_seconds retry_at paused_until".split()),
    **dict.fromkeys("runs failures consecutive_failures volume unacknowledged deferred".split(), 0),
    **dict.fromkeys("schedule description reason group".split(), ""),
    "running": False,
}


def task_rows(settings: Settings, store: Store, now: float) -> list[dict[str, Any]]:
    """Return every file of tasks.d with what is known of it, as it is now, without writing."""
    rows = {row["name"]: {**row, "task": task_from(row)} for row in store.tasks()}
    changed, gone, ignored = discover(settings, rows)
    for task in changed:
        old = rows.get(task.name)
        planned = plan_task(task, old, settings, now)
        rows[task.name] = {**(old or {"paused_at": None}), **planned, "task": task}
    for name in gone:
        rows[name]["task"] = rows[name]["task"]._replace(file="")
    for run in store.open_runs():
        live = os.path.join(settings.state_dir, "runs", run["live"])
        end = read_end(run, live, settings.secrets, int)
        outcome = end["outcome"] if end else RUNNING
        overran = now - run["deadline_at"] if not end and now > run["deadline_at"] else None
        rows[run["task"]].update(last_outcome=outcome, running=not end, overran_seconds=overran)
        rows[run["task"]]["progress"] = None if end else read_report(live).get("progress")
    for task in with_after_errors([row["task"] for row in rows.values()]):
        rows[task.name]["task"] = task
    unseen = store.unseen()
    found: list[dict[str, Any]] = []
    for name, row in rows.items():
        row["unacknowledged"] = unseen.get(name, 0)
        row["usual_seconds"] = store.usual_seconds(name) if row.get("ended") else None
        found.append(_task_row(row, settings, now))
    for file, reason in ignored.items():
        found.append({**NO_TASK, "name": file, "state": "ignored", "reason": reason})
    return sorted(found, key=lambda row: (WORST_FIRST.index(row["state"]), row["name"].lower()))


def starts_at(task: Task, row: Row, settings: Settings) -> float | None:
    """Return when a task may next start: its slot or extra start, after back-off, in its window."""
    planned = [at for at in (row.get("next_run_at"), row.get("extra_at")) if at is not None]
    if not planned:
        return None
    at = float(max(min(planned), row.get("not_before") or 0.0))
    if not task.settings.get("window"):
        return at
    zone = Zone(task.settings["timezone"] or settings.timezone)
    return parse_window(task.settings["window"]).opens(zone, at)


def attention(task: Task, row: Row, settings: Settings, now: float) -> str:
    """Return what somebody should know of a task that is active, or nothing."""
    failures, most = row.get("consecutive_failures") or 0, task.settings["pause_after_failures"]
    usual, budget = row["usual_seconds"] or 0, settings.cron_max_execution_time
    later, deferred = (row.get("not_before") or 0) > now, row.get("deferred") or 0
    return joined(
        f"failed {failures} times in a row" * (failures > 1),
        f"is paused at {most}" * (0 < most <= 2 * failures),
        f"next try not before {iso(row.get('not_before'))}" * later,
        f"{row['unacknowledged']} interrupted, not yet cleared" * (row["unacknowledged"] > 0),
        f"usually takes {duration(usual)}, longer than a wake-up stays" * (0 < budget < usual),
        f"waited {counted(deferred, 'wake-up')} for time enough" * (deferred > 0),
    )


def _task_row(row: dict[str, Any], settings: Settings, now: float) -> dict[str, Any]:
    task: Task = row["task"]
    state, reason = "active", task.error
    if not task.file:
        state, reason = "missing", "its file is gone from tasks.d"
    elif task.error:
        state = "broken"
    elif row["paused_at"] and (row["paused_until"] is None or row["paused_until"] > now):
        until = f" until {iso(row['paused_until'])}" if row["paused_until"] else ""
        state, reason = "paused", joined(f"by {row['paused_by']}{until}", row["paused_note"])
    elif not task.settings["enabled"]:
        state, reason = "disabled", "enabled = false"
    else:
        reason = attention(task, row, settings, now)
    schedule = task.settings.get("schedule", "")
    known = {key: row[key] for key in NO_TASK if row.get(key) is not None}
    moments = ("last_started_at", "last_ended_at", "last_success_at")
    return {
        "name": task.name,
        "state": state,
        **NO_TASK,
        **known,
        **{key: iso(row.get(key)) for key in moments},
        "next_run_at": iso(starts_at(task, row, settings)) if state == "active" else None,
        "retry_at": iso(row.get("not_before")) if (row.get("not_before") or 0) > now else None,
        "paused_until": iso(row["paused_until"]) if state == "paused" else None,
        "group": task.settings.get("group", ""),
        "reason": reason,
        "schedule": schedule if isinstance(schedule, str) else ", ".join(schedule),
        "average_seconds": row["total_seconds"] / row["ended"] if row.get("ended") else None,
        "description": task.settings.get("description", ""),
    }


def run_row(run: Row) -> dict[str, Any]:
    """Return a run as `history --json` shows it."""
    moments = {key: iso(run[key]) for key in ("planned_at", "started_at", "ended_at")}
    keys = ("outcome", "reason", "volume", "message", "exit_code", "trigger", "node")
    return {"id": run["id"], "task": run["task"], **moments, **{key: run[key] for key in keys}}


def status(settings: Settings, store: Store, clock: Clock) -> dict[str, Any]:
    """Return the whole truth about the installation, as `status --json` shows it."""
    last = store.last_wakeup()
    keys, moments = ("trigger", "user", "node", "selection", "result"), ("started_at", "ended_at")
    return {
        "version": __version__,
        "generated_at": iso(clock.now()),
        "node": settings.node,
        "maintenance": os.path.exists(settings.maintenance_flag),
        "last_wakeup": last
        and {**{key: iso(last[key]) for key in moments}, **{key: last[key] for key in keys}},
        "tasks": task_rows(settings, store, clock.now()),
    }


def when(moment: str | None, now: float) -> str:
    """Return a moment as time (and date if it is not today), and how far off it is."""
    if not moment:
        return ""
    read = datetime.fromisoformat(moment)
    today = read.date() == datetime.fromtimestamp(now, read.tzinfo).date()
    away = read.timestamp() - now
    text = read.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M")
    return f"{text} (in {duration(away)})" if away >= 0 else f"{text} ({duration(-away)} ago)"


def table(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Return aligned lines; with a width, the widest columns are cut until the last has room."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    while width and sum(widths) + 2 * len(widths) > width - 16 and max(widths) > 6:
        widths[widths.index(max(widths))] -= 1
    lines: list[str] = []
    for row in rows:
        cut = [c if len(c) <= w else c[: w - 1] + "~" for c, w in zip(row, widths)]
        cells = [cell.ljust(w) for cell, w in zip(cut, widths)]
        lines.append(shortened("  ".join([*cells, row[-1]]).rstrip(), width or 10_000))
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """Return a paragraph as lines of at most ``width`` characters."""
    lines = [""]
    for word in visible(text).split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def status_lines(found: Mapping[str, Any], now: float, width: int | None) -> list[str]:
    """Return the status as a table for people, worst first."""
    last = found["last_wakeup"]
    woken = "never woken; the README has the crontab line"
    if last:
        woken = f"last wake-up {when(last['started_at'], now)} by {last['user']}, {last['result']}"
    lines = [f"bgtasks {__version__} on {found['node']}, {found['generated_at']}; {woken}"]
    if found["maintenance"]:
        lines.append("MAINTENANCE: nothing starts while the maintenance flag exists")
    rows = [("TASK", "STATE", "NEXT", "LAST", "OUTCOME", "TOOK", "RUNS", "FAILED", "ABOUT")]
    for task in found["tasks"]:
        outcome = task["last_outcome"] or ""
        cells = (
            *(task["name"], task["state"], when(task["next_run_at"], now)),
            *(when(task["last_started_at"], now), joined(outcome, task["progress"] or "")),
            *(duration(task["last_seconds"]), str(task["runs"] or ""), str(task["failures"] or "")),
            task["reason"] or task["description"],
        )
        rows.append(tuple(visible(cell) for cell in cells))  # type: ignore[arg-type] # nine again
    return [shortened(line, width or 10_000) for line in lines] + table(rows, width)


def history_lines(runs: Sequence[Row], now: float, width: int | None) -> list[str]:
    rows = [("RUN", "TASK", "STARTED", "TOOK", "OUTCOME", "VOLUME", "TRIGGER", "ABOUT")]
    for run in runs:
        took = duration(run["ended_at"] - run["started_at"]) if run["ended_at"] else ""
        volume = "" if run["volume"] is None else str(run["volume"])
        about = visible(joined(run["reason"], run["message"]))
        started = when(iso(run["started_at"]), now)
        cells = (str(run["id"]), run["task"], started, took, run["outcome"], volume, run["trigger"])
        rows.append((*cells, about))
    return table(rows, width)


def event_line(kind: str, facts: Mapping[str, Any]) -> str:
    """Return what a runner told, as a line for `--verbose`."""
    if kind == "start":
        return f"{facts['task']}: run {facts['run']} starts (planned {iso(facts['planned_at'])})"
    if kind == "end":
        volume = "" if facts["volume"] is None else f"volume {facts['volume']}"
        about = joined(volume, facts["reason"], facts["message"])
        took = duration(facts["ended_at"] - facts["started_at"])
        return f"{facts['task']}: {facts['outcome']} after {took}" + (about and f": {about}")
    if kind == "progress":
        shown = (
            (run.task.name, read_report(run.live).get("progress", "")) for run in facts["runs"]
        )
        return "running: " + ", ".join(f"{name} {progress}".strip() for name, progress in shown)
    return {
        "broken": "{task}: broken: {reason}",
        "missed": "{task}: missed: {reason}",
        "paused": "{task}: is paused now: {reason}",
        "warning": "{task}: failed {number} times in a row; it is paused at {most}",
        "busy": "another runner is at work; nothing to do here",
        "clock": "the clock was set back; going on in real time",
        "overdue": "{task}: is past its timeout and has lost its keeper; ending it",
        "trouble": "{reason}",
    }[kind].format(**facts)


# -- why did it run, why not

# A reason of Runner.held_because(), as a sentence and with what would change it.
REASONS = {
    "broken": ("its file is broken: {detail}", "mend it, then: lint"),
    "disabled": ("it is disabled", "enabled = true in its file, or task.{task}.enabled = 1"),
    "paused": ("it was paused {detail}", "resume {task}"),
    "back-off": ("it is held back {detail}", "clear {task}, or run {task} --force"),
    "window": (
        "it was outside its window {detail}",
        "window = ... in its file, or run {task} --force",
    ),
    "selection": ("the wake-up had other work: {detail}", "wake it without these flags"),
    "running": ("its last run was still at work {detail}", "wait for it, or kill {task}"),
    "node": ("it {detail}", "nodes = ... in its file, or node = ... in the param file"),
    "wakeup": ("it {detail}", "wakeup = ... in its file"),
    "after": ("it {detail}", "run these first, or after = ... in its file"),
    "time": ("too little time was left: it {detail}", "a larger cron_max_execution_time"),
    "parallel": ("others were at work until the end of the wake-up", "a larger max_parallel"),
    "limit": ("the wake-up had started as many as cron_limit allows", "a larger cron_limit"),
    "maintenance": ("the maintenance flag was there", "remove the file: maintenance_flag"),
    "stopped": ("the runner was told to stop", "wake it again"),
}


def reason_text(skip: Row) -> str:
    text, way_out = (part.format(**skip) for part in REASONS[skip["reason"]])
    return f"{text}; what changes it: {way_out}".replace("  ", " ")


def explain(
    settings: Settings, store: Store, task: Mapping[str, Any], now: float, at: float
) -> dict[str, Any]:
    """Return why a task did or did not run up to the moment ``at``, from what was recorded.

    ``task`` is its status. `sentences` are for people, the rest is what they say."""
    row = store.task(task["name"])
    about = f": {task['reason']}" * bool(task["reason"])
    said = [f"task {task['name']} is {task['state']}{about}"]
    if not row:
        said.append("no wake-up has seen it yet")
        return {"task": task["name"], "at": iso(at), "sentences": said}
    slot = None
    if task["schedule"] and not row["error"]:
        said.append(f"its schedule is {task['schedule']!r}")
        schedule = schedule_of(task_from(row).settings, settings, row["name"], row["anchor_at"])
        slot, following = schedule.latest(at), schedule.next_after(at)
        for words, moment in (("its last slot was", slot), ("its next one is", following)):
            said += [f"{words} {when(iso(moment), now)}"] if moment is not None else []
    runs = [r for r in store.history(row["name"], 20) if r["started_at"] <= at][:3]
    since = min(at - 86400 if slot is None else slot, runs[0]["started_at"] if runs else at)
    said += [_run_text(run, now) for run in reversed(runs)] or ["it never ran"]
    if row["consecutive_failures"] and row["last_success_at"]:
        changed = changes_since(json.loads(row["good"]), circumstances(task_from(row), settings))
        said += [f"since it last worked there changed: {', '.join(changed) or 'nothing known'}"]
    skips = [s for s in store.skips(row["name"]) if s["last_at"] >= since and s["first_at"] <= at]
    for skip in skips:
        times = f"in {counted(skip['count'], 'wake-up')}, last {when(iso(skip['last_at']), now)}"
        said.append(f"{times}, {reason_text(skip)}")
    events = [e for e in store.events(row["name"], 3) if since <= e["at"] <= at]
    said += [f"{e['by']} {when(iso(e['at']), now)}: {e['what']}" for e in reversed(events)]
    known = store.wakeups(WAKEUPS_KEPT)
    wakeups = [w for w in known if w["started_at"] <= at and w["trigger"] != "hand"]
    if not row["error"]:
        said += [_wakeup_text(w, runs, skips, now) for w in reversed(wakeups[:3])]
    if not wakeups or (wakeups[0]["ended_at"] or now) < (slot or at - 86400):
        last = f"since {when(iso(wakeups[0]['ended_at']), now)}" if wakeups else "yet"
        said.append(f"nobody woke the runner {last}; what changes it: install --write")
    return {
        "task": task["name"],
        "at": iso(at),
        "slot": iso(slot),
        "sentences": said,
        "runs": [run_row(run) for run in runs],
        "reasons": [{**s, **{key: iso(s[key]) for key in ("first_at", "last_at")}} for s in skips],
    }


def _run_text(run: Row, now: float) -> str:
    if run["outcome"] == "missed":
        return f"its slot {when(iso(run['planned_at']), now)} was missed: {run['reason']}"
    started = f"run {run['id']} started {when(iso(run['started_at']), now)} by {run['trigger']}"
    if run["outcome"] == RUNNING:
        return f"{started} and is at work"
    if run["missed_slots"]:
        started += f", also for {counted(run['missed_slots'], 'missed slot')},"
    took = duration(run["ended_at"] - run["started_at"])
    return f"{started} and ended after {took}: {joined(run['outcome'], run['reason'])}"


def _wakeup_text(wakeup: Row, runs: Sequence[Row], skips: Sequence[Row], now: float) -> str:
    """Return what a wake-up did with a task, given its runs and the reasons not to run."""
    began, ended = wakeup["started_at"], wakeup["ended_at"] or now
    text = f"the wake-up {when(iso(began), now)} by {wakeup['trigger']} ({wakeup['user']})"
    if wakeup["result"] == "busy":
        return f"{text} left at once, as another was at work"
    here = [str(run["id"]) for run in reversed(runs) if began <= run["started_at"] <= ended]
    if here:
        return f"{text} started run {', '.join(here)}"
    why = [s["reason"] for s in skips if s["first_at"] <= ended and s["last_at"] >= began]
    return f"{text} did not start it: {', '.join(why) or 'it was not due'}"


# -- is all well


class Finding(NamedTuple):
    """What a check found: how bad it is (0 to 2), about what, and the way out if there is one."""

    level: int
    about: str
    text: str
    way_out: str = ""


def gaps_between(wakeups: Sequence[Row]) -> list[float]:
    """Return the seconds between wake-ups in which no runner was at work, in ascending order."""
    gaps: list[float] = []
    until = None
    for wakeup in sorted(wakeups, key=lambda wakeup: float(wakeup["started_at"])):
        if until is not None and wakeup["started_at"] > until:
            gaps.append(wakeup["started_at"] - until)
        until = max(until or 0.0, wakeup["ended_at"] or wakeup["started_at"])
    return sorted(gaps)


def judge_wakeups(settings: Settings, store: Store, now: float) -> Iterator[Finding]:
    """Tell whether the runner is woken at all, how often, by whom, and often enough."""
    wakeups = [wakeup for wakeup in store.wakeups(WAKEUPS_KEPT) if wakeup["trigger"] != "hand"]
    if not wakeups:
        yield Finding(2, "wake-ups", "nobody has ever woken it", "install --write")
        return
    starts = sorted(wakeup["started_at"] for wakeup in wakeups)
    steps = sorted(late - early for early, late in zip(starts, starts[1:]))
    usual = steps[len(steps) // 2] if steps else 300.0
    age = now - (wakeups[0]["ended_at"] or now)
    level = 0 if age < max(600.0, 3 * usual) else 1 if age < max(3600.0, 10 * usual) else 2
    users = sorted({f"{w['user']}@{w['node']} ({w['trigger']})" for w in wakeups})
    text = f"last {duration(age)} ago, {len(wakeups)} known, every {duration(usual)}"
    text += f", longest gap {duration(steps[-1] if steps else None)}" * bool(steps)
    yield Finding(
        level, "wake-ups", f"{text}, by {', '.join(users)}", "install --write" * (level > 0)
    )
    if len({w["user"] for w in wakeups}) > 1:
        yield Finding(1, "wake-ups", "different users wake it", "keep one crontab line")
    gaps = gaps_between(wakeups)
    gap = gaps[len(gaps) // 2] if gaps else 0.0
    for row in store.tasks():
        if gap > 5 and row["file"] and not row["error"] and row["enabled"]:
            schedule = schedule_of(task_from(row).settings, settings, row["name"], row["anchor_at"])
            first = schedule.next_after(now)
            second = None if first is None else schedule.next_after(first)
            if first is not None and second is not None and second - first < 0.9 * gap:
                text = f"is asked every {duration(second - first)}, but idle for {duration(gap)}"
                yield Finding(
                    1, row["name"], text, "wake it more often, or let a wake-up stay longer"
                )


def judge_tasks(tasks: Sequence[Mapping[str, Any]], now: float) -> Iterator[Finding]:
    """Tell what is wrong with the tasks, from their status."""
    for task in tasks:
        name, state, reason = task["name"], task["state"], task["reason"]
        failures = task["consecutive_failures"]
        due = (
            datetime.fromisoformat(task["next_run_at"]).timestamp() if task["next_run_at"] else now
        )
        if state == "broken":
            yield Finding(2, name, f"broken: {reason}", "mend it, then: lint")
        elif state == "missing":
            yield Finding(1, name, reason, "put it back")
        elif state == "paused" and "by bgtasks" in reason:
            yield Finding(2, name, f"paused {reason}", f"log {name}, then: resume {name}")
        elif task["overran_seconds"] is not None and task["overran_seconds"] > 600:
            text = f"is at work {duration(task['overran_seconds'])} past its deadline"
            yield Finding(2, name, text, f"log {name}, kill {name}")
        elif failures and state != "paused":
            level = 2 if failures > 3 or task["retry_at"] is None else 1
            text = f"{task['last_outcome']}, {failures} in a row"
            yield Finding(level, name, text, f"log {name}")
        elif task["unacknowledged"]:
            text = f"{counted(task['unacknowledged'], 'run')} interrupted"
            yield Finding(1, name, text, f"clear {name}")
        elif state == "active" and not task["running"] and due < now - 900:
            yield Finding(1, name, f"due for {duration(now - due)}", f"explain {name}")


def judge_packages(tasks: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Name each package that is missing, and who needs it."""
    needed: dict[str, list[str]] = {}
    for task in tasks:
        if "pip install " in task["reason"]:
            needed.setdefault(task["reason"].rpartition("pip install ")[2], []).append(task["name"])
    for command, names in sorted(needed.items()):
        text = f"{command} is missing; it is needed by {', '.join(names)}"
        yield Finding(2, "packages", text, f"pip install {command}")


def judge_fit(settings: Settings, tasks: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Name the tasks that usually take longer than a wake-up stays."""
    budget = settings.cron_max_execution_time
    for task in tasks:
        if 0 < budget < (task["usual_seconds"] or 0):
            usual, stays = duration(task["usual_seconds"]), duration(budget)
            text = f"usually takes {usual}, a wake-up stays {stays}"
            yield Finding(1, task["name"], text, "a larger cron_max_execution_time")


def judge_place(settings: Settings, store: Store) -> Iterator[Finding]:
    """Tell what is wrong with the machine, the file system and the settings."""
    state, me = settings.state_dir, os.geteuid()
    for places in settings.doubled:
        yield Finding(1, "param file", places, "delete one of the lines")
    if me == 0:
        yield Finding(1, "user", "runs as root", "give it a user of its own")
    try:
        refuse_wrong_user(state)
        refuse_unsafe_folder(settings.tasks_dir)
        if os.path.isdir(os.path.join(state, "runs")):
            test_locks(state)
            store.check_integrity()
        text = f"{state}: locks hold, the file is whole, {store.size() >> 10} KiB"
        yield Finding(0, "state", text)
    except BgtasksError as error:
        yield Finding(2, "state", str(error))
    kind = file_system(state)
    if kind in ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "fuse.sshfs", "fuse.glusterfs"):
        text = f"{state} lies on a network disk ({kind})"
        yield Finding(2, "disk", text, "state_dir on a local disk")
    try:
        free = shutil.disk_usage(state if os.path.isdir(state) else os.path.dirname(state)).free
        level = 2 if free < 20 << 20 else 1 if free < 200 << 20 else 0
        yield Finding(level, "disk", f"{free >> 20} MiB free", "make room" * (level > 0))
    except OSError as error:
        yield Finding(1, "disk", f"{state}: cannot be looked at ({error.strerror})")
    steps = int(store.fact("steps") or 0)
    if steps:
        yield Finding(1, "clock", f"was set back {steps} times", "let NTP keep it")
    if not zoneinfo.available_timezones():
        yield Finding(1, "zones", "this machine has no time zones", "pip install tzdata")


def judge_mail(settings: Settings, now: float) -> Iterator[Finding]:
    """Tell whether somebody would hear of a failure, and whether mails get through."""
    if not settings.notify_email and not settings.notify_command:
        text = "nobody is told when a task fails, but where the task itself says whom"
        yield Finding(0, "mail", text, "notify_email = you@example.org")
    outbox = settings.outbox
    if os.path.lexists(outbox) and not (os.path.isdir(outbox) and os.access(outbox, os.W_OK)):
        text = f"{outbox} cannot be written: nobody hears of anything"
        yield Finding(1, "mail", text, "make it a folder of the user who wakes it")
    entries = _entries(outbox)
    waiting = [entry for entry in entries if entry.name[0] != "." and entry.is_file()]
    try:
        oldest = min((entry.stat().st_mtime for entry in waiting), default=now)
    except FileNotFoundError:  # pragma: no cover (race: one was just sent)
        oldest = now
    if now - oldest > 3600:
        text = f"{counted(len(waiting), 'file')} in {outbox}, for {duration(now - oldest)}"
        yield Finding(1, "mail", text, "log send_mail; echo test | sendmail --now you@example.org")
    failed = os.path.join(outbox, "failed")
    given_up = [entry for entry in _entries(failed) if not entry.name.endswith(".answer")]
    if given_up:
        text = f"{counted(len(given_up), 'mail')} could not be sent: {failed}"
        yield Finding(1, "mail", text, "read the .answer beside it; move it back, or delete it")


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def file_system(path: str) -> str:
    """Return the type of the file system that holds ``path``, empty if nobody says."""
    found = ("", "")
    for line in read_bytes("/proc/mounts").decode("utf-8", "replace").splitlines():
        place, kind = line.split()[1:3]
        inside = f"{path}/".startswith(place.rstrip("/") + "/")
        found = (place, kind) if inside and len(place) >= len(found[0]) else found
    return found[1]


def judge_crontab(crontab: str | None, script: str, lately: int = 0) -> Iterator[Finding]:
    """Tell if the user's crontab wakes ``script``, once. None: it could not be read.

    Without, cron.d, a timer or the web may do: then it was woken ``lately``, and more than once."""
    if crontab is None:
        yield Finding(0, "crontab", "cannot be read here; something else must wake it")
        return
    name = os.path.splitext(os.path.basename(script))[0]
    lines = [line for line in crontab.splitlines() if name in line and line.strip()[:1] != "#"]
    if not lines and lately > 1:
        yield Finding(0, "crontab", f"has no line with {name}, but it is woken by something else")
    elif not lines:
        yield Finding(1, "crontab", f"your crontab has no line with {name}", "install --write")
    plain = [line for line in lines if "group=" not in line and "task=" not in line]
    if len(plain) > 1:
        yield Finding(1, "crontab", f"{len(plain)} lines wake it", "crontab -e, keep one")
    if any("--auth_pwd" in line for line in lines):
        text = "others see --auth_pwd in ps"
        yield Finding(1, "crontab", text, "put auth_pwd into the param file")


def one_line(text: str) -> str:
    """Return text as a Nagios plugin may print it: one line of ASCII, without `|`."""
    return visible(text).replace("|", "/").encode("ascii", "backslashreplace").decode()


def check_line(findings: Sequence[Finding], tasks: Sequence[Mapping[str, Any]], age: float) -> str:
    """Return the line of a Nagios plugin: the worst first, then figures for a graph.

    https://nagios-plugins.org/doc/guidelines.html"""
    bad = sorted((found for found in findings if found.level), key=lambda found: -found.level)
    word = ("OK", "WARNING", "CRITICAL")[bad[0].level if bad else 0]
    text = f"{bad[0].about}: {bad[0].text}" if bad else counted(len(tasks), "task")
    more = f" (and {len(bad) - 1} more)" * (len(bad) > 1)
    count = {name: sum(task["state"] == name for task in tasks) for name in WORST_FIRST[:-1]}
    count["failing"] = sum(task["consecutive_failures"] > 0 for task in tasks)
    count["running"] = sum(task["running"] for task in tasks)
    figures = [f"{name}={number};;;0;" for name, number in count.items()]
    figures.append(f"wakeup_age={age:.0f}s;;;0;")
    return f"BGTASKS {word} - {one_line(shortened(text, 300))}{more}|{' '.join(figures)}"


# Base units, `_total` for what only grows: https://prometheus.io/docs/practices/naming/
METRICS = (
    ("runs_total", "counter", "runs that were started", "runs"),
    ("failures_total", "counter", "runs that failed or timed out", "failures"),
    ("consecutive_failures", "gauge", "failures since the last success", "consecutive_failures"),
    ("volume_total", "counter", "items treated, as the task counts them", "volume"),
    ("running", "gauge", "1 while a run is at work", "running"),
    ("unacknowledged_runs", "gauge", "interrupted runs that nobody has cleared", "unacknowledged"),
    ("last_duration_seconds", "gauge", "how long the last run took", "last_seconds"),
    ("run_seconds_total", "counter", "how long all runs took", "total_seconds"),
    ("last_start_timestamp_seconds", "gauge", "when the last run started", "last_started_at"),
    ("last_success_timestamp_seconds", "gauge", "when the last success started", "last_success_at"),
    ("next_run_timestamp_seconds", "gauge", "when it may run next", "next_run_at"),
)


def metric_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the status in the text format of Prometheus.

    https://prometheus.io/docs/instrumenting/exposition_formats/"""
    tasks = [task for task in found["tasks"] if task["state"] != "ignored"]
    last: Mapping[str, Any] = found["last_wakeup"] or {}
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: Iterable[tuple[str, Any]]) -> None:
        lines.extend([f"# HELP bgtasks_{name} {text}.", f"# TYPE bgtasks_{name} {kind}"])
        for labels, value in samples:
            if value is not None:
                moment = isinstance(value, str)
                number = datetime.fromisoformat(value).timestamp() if moment else float(value)
                lines.append(f"bgtasks_{name}{labels} {number!r}")

    def of(task: Mapping[str, Any], more: str = "") -> str:
        return f'{{task="{label(task["name"])}"{more}}}'

    family("info", "gauge", "the program", [(f'{{version="{__version__}"}}', 1)])
    resting = [("", found["maintenance"])]
    family("maintenance", "gauge", "1 while the maintenance flag exists", resting)
    moment = last.get("ended_at") or last.get("started_at")
    family("last_wakeup_timestamp_seconds", "gauge", "the end of the last wake-up", [("", moment)])
    for name, kind, text, key in METRICS:
        family(f"task_{name}", kind, text, [(of(task), task[key]) for task in tasks])
    states = [
        (of(task, f',state="{state}"'), task["state"] == state)
        for task in tasks
        for state in WORST_FIRST[:-1]
    ]
    family("task_state", "gauge", "1 for the state of the task", states)
    return lines


def label(text: str) -> str:
    return visible(text).replace("\\", "\\\\").replace('"', '\\"')


# --- Command line ---------------------------------------------------------------------------------
# Arguments go in, an exit code comes out. Without a command it is the wake-up. Only here, and in
# the keeper's processes, is anything printed, and only here does the program exit.

HELP = """\
bgtasks: run the background tasks in tasks.d that are due

Wake it from cron, without a command:
  bgtasks.py [--param_file=F] [--verbose] [--status_only] [--dry_run] [--KEY=VALUE ...]
             [--task=N,..] [--exclude_task=N,..] [--group=G,..] [--exclude_group=G,..]

To see (all with --json):
  status [--watch]             every task: its state, next and last run; q leaves --watch
  show TASK                    all that is known of one task
  explain TASK [--at WHEN]     why it ran or did not, e.g. explain backup --at 2026-03-01T03:30
  history [TASK] [--count N]   the last runs, newest first
  log TASK|RUN [--follow]      what a run printed
  next TASK|EXPRESSION [--from ISO] [--count N] [--timezone Z]
                               the next moments, e.g. next "mon,thu 03:30" --count 3
  doctor                       is it woken, often enough, once; is all it needs there; exit 1 if not
  check                        a line for Nagios; exit 0 to 3
  metrics                      text for Prometheus
  lint [FILE]                  check all task files, or one; exit 1 if one is broken

To act:
  run TASK [--force]           here and now; exit 0, 1 (failed) or 124 (timed out); --force goes
                               past a pause, a back-off and the window
  request TASK                 the next look of a runner starts it
  kill TASK                    end its run
  clear TASK|--all             what went wrong was seen; ends the back-off
  pause TASK|--all [--for 2h] [--note TEXT], resume TASK|--all
  new NAME [--language sh]     write a commented sample: python, sh, perl, php, ruby, toml
  install [--write]            the crontab line, e.g. install --write
  admin add|remove|list [LOGIN]  who may wake it and act; the password comes from stdin
  sendmail [-t] [-f FROM] [ADDRESS...] [--now]
                               take a mail on stdin into the outbox; --now sends it and says how:
                               echo test | bgtasks.py sendmail --now me@example.org
  --help, --version

Settings, here as --KEY=VALUE or in the param file as KEY = VALUE:
"""
BARE_FLAGS = ("json", "all", "help", "version", "watch", "follow", "force", "write", "now")


class Invocation(NamedTuple):
    """What the command line asks for."""

    command: str
    words: list[str]
    flags: Mapping[str, str]  # of the command
    settings: Settings
    clock: Clock

    def word(self, what: str) -> str:
        if len(self.words) != 1:
            raise UsageError(f"{self.command} needs one {what}; see --help")
        return self.words[0]

    def count(self, default: int) -> int:
        text = self.flags.get("count", str(default))
        return int(_usage("--count", lambda: read_number(1, 1_000_000)(text)))


def _usage(what: str, read: Callable[[], Any]) -> Any:
    """Return what ``read`` returns; what it refuses is a wrong argument."""
    try:
        return read()
    except (ValueError, TaskError) as error:
        raise UsageError(f"{what}: {error}") from None


def split_arguments(argv: Sequence[str]) -> tuple[str, list[str], dict[str, str], dict[str, str]]:
    """Return command, words, the command's flags, and settings. Raises UsageError."""
    command, words, rest = "", list[str](), list(argv)
    flags: dict[str, str] = {}
    settings: dict[str, str] = {}
    options = {option.key: option for option in OPTIONS}
    while rest:
        word = rest.pop(0)
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise UsageError(f"argument {shortened(word)!r}: is not valid UTF-8")
        key, equals, value = word[2:].partition("=")
        mine = ("help", "version", *COMMANDS[command][1])
        if word == "--":
            words, rest = [*words, *["--"] * (command == "sendmail"), *rest], []
        elif not word.startswith("--"):
            if not command and word not in COMMANDS:
                hint = nearest(word, COMMANDS)
                raise UsageError(f"there is no command {shortened(word)!r}{hint}; see --help")
            words += [word] if command else []
            command = command or word
        elif key in mine:
            if not equals and key not in BARE_FLAGS and not rest:
                raise UsageError(f"--{key} needs a value; see --help")
            flags[key] = value if equals or key in BARE_FLAGS else rest.pop(0)
        elif key not in options and not key.startswith("task."):
            hint = nearest(key, [*options, *mine])
            raise UsageError(f"there is no option --{shortened(key)}{hint}; see --help")
        elif not equals and (key not in options or options[key].read is not read_boolean):
            raise UsageError(f"--{key} needs a value: --{key}=...")
        else:
            settings[key] = value if equals else "1"
    return command, words, flags, settings


def main(argv: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    """Do what the command line asks for and return the exit code (see the table in the README)."""
    _repair_streams()
    os.umask(0o077)
    words = sys.argv[1:] if argv is None else argv
    try:
        code = _main(words, clock or Clock())
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _die_of("SIGPIPE")
    except KeyboardInterrupt:
        return _die_of("SIGINT")
    except Exception as error:  # noqa: BLE001 - the one place where a bug of ours ends
        text, code = _explained(error)
        if next((word for word in words if word[:2] != "--"), "") == "check":
            return print_lines([f"BGTASKS UNKNOWN - {one_line(shortened(text, 300))}"]) + 3
        return _complain(text, code)


def _explained(error: Exception) -> tuple[str, int]:
    """Return what went wrong in one line, and the exit code for it; a bug shows its trace."""
    if isinstance(error, BgtasksError):
        return visible(str(error)), error.exit_code
    if isinstance(error, (OSError, MemoryError)):
        number, file = getattr(error, "errno", errno.ENOMEM), getattr(error, "filename", None)
        limits = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
        text = visible(f"{file or 'output'}: {os.strerror(number or 0)}")
        return text, EXIT_SYSTEM if number in limits else EXIT_IO
    traceback.print_exc()
    versions = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {sys.platform}"
    return f"this is a bug in bgtasks {__version__} ({versions}); report it", EXIT_BUG


def _complain(text: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:  # what could not be written must not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print(f"bgtasks: {text}", file=sys.stderr)
    return code


def _die_of(name: str) -> int:
    """End by the signal itself, so that whoever waits for us sees why."""
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    return 128 + int(number)  # pragma: no cover (the process is gone)


def _repair_streams() -> None:
    """Give descriptors 0 to 2 something if the caller closed them, and streams that never choke."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - lives as long as we do
        else:
            stream.reconfigure(errors="backslashreplace")


def _main(argv: Sequence[str], clock: Clock) -> int:
    command, words, flags, arguments = split_arguments(argv)
    if "help" in flags:
        return print_lines([HELP + option_help()])
    if "version" in flags:
        return print_lines([f"bgtasks {__version__}"])
    if sys.platform == "win32":
        raise UnavailableError("this version runs on Linux and other Unix systems only")
    refuse_bad_tz(os.environ)
    settings = read_settings(arguments, __file__)
    if not command and settings.status_only:
        command = "status"
    return COMMANDS[command][0](Invocation(command, words, flags, settings, clock))


def print_lines(lines: Iterable[str]) -> int:
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    bad = tuple(f" {word} " for word in ("broken", "missing", *FAILURES, INTERRUPTED))
    for line in lines:
        red = colours and any(word in f"{line} " for word in bad)
        print(f"\x1b[31m{line}\x1b[0m" if red else line)
    return EXIT_OK


def print_json(value: Any) -> int:
    return print_lines([json.dumps(value, indent=2)])


def print_found(call: Invocation, value: Any, lines: Iterable[str]) -> int:
    """Print what was found: with --json as it is, else as lines for people."""
    return print_json(value) if "json" in call.flags else print_lines(lines)


def screen_width() -> int | None:
    """Return the columns of the terminal, or None if stdout is none."""
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return None


# N = 2^14, r = 8, p = 5 need 16 MiB: as much as a wake-up itself, and one of OWASP's choices.
SCRYPT = "16384$8$5"
FREE_LOGINS = 3  # wrong ones that are answered at once
MOST_LOGIN_SECONDS = 10.0


def open_for_work(settings: Settings, clock: Clock, *, trusted: bool = False) -> Store:
    """Open the store for a process that may start tasks, after all that must be refused.

    ``trusted``: it has shown already that it may, by other means than a login."""
    if os.environ.get("BGTASKS_RUN"):
        raise BusyError("a task cannot wake bgtasks, nor run a task; give it a schedule instead")
    refuse_wrong_user(settings.state_dir)
    refuse_unsafe_folder(settings.tasks_dir)
    store = open_store(settings.state_dir)
    boot = boot_id() or __version__
    if store.fact("boot") != boot:
        store.close()
        test_locks(settings.state_dir)
        store.check_integrity()
        store.put("fact", {"name": "boot", "value": boot}, "name")
    try:
        if not trusted:
            require_admin(settings, store, clock)
    except BaseException:
        store.close()
        raise
    return store


def hashed(password: str, salt: str = "", parameters: str = SCRYPT) -> str:
    """Return a password as scrypt hash with its parameters: scrypt$N$r$p$salt$hash.

    https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html"""
    n, r, p = (int(number) for number in parameters.split("$"))
    salt = salt or os.urandom(16).hex()
    secret, limit = password.encode("utf-8", "surrogateescape"), 256 * n * r
    key = hashlib.scrypt(secret, salt=bytes.fromhex(salt), n=n, r=r, p=p, maxmem=limit)
    return f"scrypt${parameters}${salt}${key.hex()}"


def is_login(admins: Mapping[str, str], user: str, password: str) -> bool:
    """Tell if a login is that of an administrator; an unknown user costs as much time."""
    known = admins.get(user) or f"scrypt${SCRYPT}${'00' * 16}${'00' * 64}"
    _, n, r, p, salt, _ = known.split("$")
    given = hashed(password, salt, f"{n}${r}${p}")
    return hmac.compare_digest(given, known) and user in admins


def require_admin(settings: Settings, store: Store, clock: Clock) -> None:
    """Raise RefusedError if there are administrators, and the login is that of none."""
    admins = store.admins()
    if admins:
        authenticate(settings, store, admins, clock)


def authenticate(settings: Settings, store: Store, admins: Mapping[str, str], clock: Clock) -> None:
    """Raise RefusedError unless auth_user and auth_pwd are those of an administrator.

    Each wrong login is counted before it is looked at, and those that follow wait first, so that
    many at once do not help either."""
    user, wrong = settings.auth_user, int(store.fact("wrong_logins") or 0)
    store.put("fact", {"name": "wrong_logins", "value": str(wrong + 1)}, "name")
    if wrong >= FREE_LOGINS:
        clock.wait(min(0.25 * 2.0 ** (wrong - FREE_LOGINS), MOST_LOGIN_SECONDS))
    if not is_login(admins, user, settings.auth_pwd):
        store.note_event(
            "", user_name(os.geteuid()), clock.now(), f"wrong login {shortened(user)!r}"
        )
        what = "auth_user and auth_pwd are those of no administrator" if user else "needs auth_user"
        raise RefusedError(f"{what}; set auth_user and auth_pwd in the param file (chmod 600)")
    store.put("fact", {"name": "wrong_logins", "value": "0"}, "name")


def open_for_reading(settings: Settings) -> Store:
    """Open the store for a look that changes nothing; an empty one if nothing was stored yet."""
    path = os.path.join(settings.state_dir, "bgtasks.db")
    if os.path.isdir(settings.state_dir) and not os.access(settings.state_dir, os.R_OK | os.X_OK):
        raise RefusedError(f"{settings.state_dir}: belongs to somebody else; run it as that user")
    return Store(path if os.path.lexists(path) else ":memory:", timeout=2.0)


# -- commands


def wake_up_command(call: Invocation) -> int:
    settings, clock = call.settings, call.clock
    with closing(open_for_work(settings, clock)) as store:
        notifier = Notifier(settings, store, clock)
        runner = Runner(settings, store, clock, "cli", _both(_teller(settings, clock), notifier))
        if settings.dry_run:
            runner.look()
            planned = ((row["name"], row["next_run_at"] or row["extra_at"]) for row in runner.queue)
            return print_lines(f"would start {name}, due {iso(at)}" for name, at in planned)
        runner.wake_up()
        notifier.close()
        if settings.verbose:
            print_status(call, status(settings, store, clock))
    return _left(runner)


def _left(runner: Runner) -> int:
    """Return the exit code of a runner that has left, or end by the signal that stopped it."""
    if runner.stop_signal:
        return _die_of(signal_name(runner.stop_signal))
    if runner.trouble and not runner.started:
        raise runner.trouble
    return EXIT_FAILED if runner.failed and runner.settings.strict else EXIT_OK


def _both(tell: Tell, notifier: Notifier) -> Tell:
    def tell_both(kind: str, facts: Mapping[str, Any]) -> None:
        tell(kind, facts)
        notifier.tell(kind, facts)

    return tell_both


def say_nothing(_kind: str, _facts: Mapping[str, Any]) -> None:
    """Take what a runner tells, for a look."""


def _teller(settings: Settings, clock: Clock) -> Tell:
    """Return what prints the events of a runner: all with `--verbose`, else only trouble."""
    wiped = ""  # what takes a progress line off the terminal

    def tell(kind: str, facts: Mapping[str, Any]) -> None:
        nonlocal wiped
        passing = kind == "progress"
        if kind == "trouble":
            print(f"bgtasks: {facts['reason']}", file=sys.stderr)
        elif settings.verbose and (not passing or sys.stdout.isatty()):
            stamp = time.strftime("%H:%M:%S", time.localtime(clock.now()))
            text = visible(f"{stamp} {event_line(kind, facts)}")
            text = shortened(text, (screen_width() or 80) - 1) if passing else text
            print(wiped + text, end="" if passing else "\n", flush=True)
            wiped = "\r" + " " * len(text) + "\r" if passing else ""

    return tell


def print_status(call: Invocation, found: Mapping[str, Any]) -> int:
    """Print the status, under what an administrator should know of the installation."""
    names = {task["name"] for task in found["tasks"]}
    notes = ["running as root, to whom the state belongs"] if os.geteuid() == 0 else []
    for name, overrides in call.settings.overrides.items():
        if name not in names:
            notes.append(f"{overrides[0].where}: there is no task {name!r}{nearest(name, names)}")
    width = screen_width()
    notes = [shortened(note, width or 10_000) for note in notes]
    return print_lines([*notes, *status_lines(found, call.clock.now(), width)])


def status_command(call: Invocation) -> int:
    if "watch" in call.flags:
        return _watch_status(call)
    with closing(open_for_reading(call.settings)) as store:
        found = status(call.settings, store, call.clock)
    return print_json(found) if "json" in call.flags else print_status(call, found)


def _watch_status(call: Invocation) -> int:
    """Draw the status again every second, only what changed, until somebody presses q or Ctrl-C."""
    import termios
    import tty

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("status --watch needs a terminal; use status --json")
    before, drawn = termios.tcgetattr(0), list[str]()
    tty.setcbreak(0)
    mode = termios.tcgetattr(0)
    mode[3] &= ~termios.ISIG  # Ctrl-C is a key like q, whatever our caller does with its signal
    termios.tcsetattr(0, termios.TCSADRAIN, mode)
    print("\x1b[2J", end="")
    try:
        while True:
            with closing(open_for_reading(call.settings)) as store:
                found = status(call.settings, store, call.clock)
            width, height = os.get_terminal_size(1)
            lines = status_lines(found, call.clock.now(), width)[: height - 1]
            for i, line in enumerate([*lines, *[""] * (len(drawn) - len(lines))]):
                if i >= len(drawn) or drawn[i] != line:
                    print(f"\x1b[{i + 1};1H{line}\x1b[K", end="")
            print(f"\x1b[{len(lines) + 1};1H", end="", flush=True)
            drawn = lines
            if call.clock.wait(1.0, [0]) and os.read(0, 64)[:1] in (b"q", b"Q", b"\x03", b""):
                return EXIT_OK
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _task_named(call: Invocation, store: Store, name: str) -> dict[str, Any]:
    """Return the status of one task. Raises NoTaskError with the nearest name."""
    rows = task_rows(call.settings, store, call.clock.now())
    tasks = {row["name"]: row for row in rows if row["state"] != "ignored"}
    if name not in tasks:
        raise NoTaskError(f"there is no task {shortened(name)!r}{nearest(name, tasks)}")
    return tasks[name]


def show_command(call: Invocation) -> int:
    with closing(open_for_reading(call.settings)) as store:
        task = _task_named(call, store, call.word("TASK"))
    shown = {key: value for key, value in task.items() if value not in (None, "")}
    lines = (f"{key:<22}{visible(str(value))}" for key, value in shown.items())
    return print_found(call, task, lines)


def history_command(call: Invocation) -> int:
    name = call.word("TASK at most") if call.words else None
    with closing(open_for_reading(call.settings)) as store:
        if name is not None and not store.task(name):
            _task_named(call, store, name)
        runs = store.history(name, call.count(20))
    lines = history_lines(runs, call.clock.now(), screen_width())
    return print_found(call, [run_row(run) for run in runs], lines)


def _run_named(call: Invocation, store: Store, word: str) -> Row:
    """Return a run by its number, or the last one of a task. Raises NoTaskError."""
    if word.isascii() and word.isdigit() and len(word) < 19:
        run = store.run(int(word))
    else:
        run = next(iter(store.history(word, 1)), None)
        if not run:
            _task_named(call, store, word)
    if not run:
        raise NoTaskError(f"there is no run of {shortened(word)!r}; see history")
    return run


def log_command(call: Invocation) -> int:
    word = call.word("TASK or RUN")
    with closing(open_for_reading(call.settings)) as store:
        run = _run_named(call, store, word)
        live = os.path.join(call.settings.state_dir, "runs", run["live"])
        try:
            kept = os.open(live + ".out", os.O_RDONLY)  # the file goes when the run ends
        except FileNotFoundError:
            kept = -1
        output = read_output(live, call.settings.secrets)
        run = _run_named(call, store, str(run["id"]))  # it may have ended meanwhile
        running = run["outcome"] == RUNNING
        output = output if running else run["output"]
        if "json" in call.flags:
            return print_json({**run_row(run), "output": output})
        if not running or "follow" not in call.flags:
            return _print_output(output)
        shown, over = Follower(f"/dev/fd/{kept}", call.settings.secrets), False
        while not over:
            over = read_end(run, live, (), int) is not None
            shown.print_new(last=over)
            call.clock.wait(0.0 if over else 0.2)
    return EXIT_OK


class Follower:
    """Prints what a run has printed since the last call; whole lines, as secrets must be whole."""

    def __init__(self, path: str, secrets: Iterable[str]) -> None:
        self._path, self._secrets, self._at = path, secrets, 0

    def print_new(self, *, last: bool) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                content = file.read(1 << 20)
        except FileNotFoundError:
            return
        content = content if last else content[: content.rfind(b"\n") + 1]
        self._at += len(content)
        if content:
            _print_output(masked(content, self._secrets))
            sys.stdout.flush()


def _print_output(text: str) -> int:
    lines = text[:-1].split("\n") if text.endswith("\n") else text.split("\n")
    return print_lines(visible(line.expandtabs()) for line in lines) if text else EXIT_OK


def run_command(call: Invocation) -> int:
    """Run one task here and now; what it prints is shown as it comes."""
    name, settings, clock = call.word("TASK"), call.settings, call.clock
    followers: dict[str, Follower] = {}

    def tell(kind: str, facts: Mapping[str, Any]) -> None:
        for run in facts["runs"] if kind == "progress" else ():
            if run.live not in followers:
                followers[run.live] = Follower(run.live + ".out", settings.secrets)
            followers[run.live].print_new(last="ended" in facts)

    with closing(open_for_work(settings, clock)) as store:
        notifier = Notifier(settings, store, clock)
        runner = Runner(settings, store, clock, "hand", _both(tell, notifier))
        runner.read_folder()
        task, row = _task_named(call, store, name), store.task(name)
        if task["state"] in ("broken", "missing") or not row:
            raise NoTaskError(f"{name}: {task['state']}: {task['reason']}")
        held = by_hand_held(task_from(row), row, settings, clock.now())
        if held and "force" not in call.flags:
            way_out = REASONS[held[0]][1].format(task=name)
            raise BusyError(f"{name}: {held[0]}: {held[1]}; {way_out}")
        run = runner.run_by_hand(name)
        notifier.close()
    if run is None:
        raise runner.trouble or BusyError(f"{name}: is running already; see status")
    return _say_end(run, runner)


def _say_end(run: Row, runner: Runner) -> int:
    code = "" if run["exit_code"] in (None, 0) else f"exit code {run['exit_code']}"
    reason = "" if run["reason"].startswith(code) else code
    about = joined(reason, run["reason"], run["message"])
    text = f"bgtasks: {run['task']}: {run['outcome']}" + (about and f": {about}")
    print(visible(text), file=sys.stderr)
    if run["outcome"] in (DONE, NOTHING, MORE) or runner.stop_signal:
        return _left(runner)
    if run["outcome"] == TIMED_OUT:
        return EXIT_TIMED_OUT
    number = int(run["exit_code"] or 0)
    return 128 - number if number < 0 else EXIT_FAILED


def kill_command(call: Invocation) -> int:
    """End the run of a task: it is asked, then ended; say how it went."""
    name, settings, clock = call.word("TASK"), call.settings, call.clock
    by = user_name(os.geteuid())
    with closing(open_for_work(settings, clock)) as store:
        _task_named(call, store, name)
        row = ask_to_end(settings, store, name, by, clock.now())
        if not row:
            raise NoTaskError(f"{name}: is not running; see status")
        _end_run(row, os.path.join(settings.state_dir, "runs", row["live"]), clock)
        notifier = Notifier(settings, store, clock)
        Runner(settings, store, clock, "hand", notifier.tell).settle()
        notifier.close()
        run = store.run(row["id"]) or row
    print(
        f"{name}: run {run['id']} "
        + ("is still there" if run["outcome"] == RUNNING else run["outcome"])
    )
    return EXIT_FAILED if run["outcome"] == RUNNING else EXIT_OK


def next_command(call: Invocation) -> int:
    """Print the next moments of a task, or of an expression."""
    word, settings, now = call.word("TASK or EXPRESSION"), call.settings, call.clock.now()
    zone_name, text, anchor = call.flags.get("timezone", ""), word, None
    with closing(open_for_reading(settings)) as store:
        tasks = {row["name"]: row for row in task_rows(settings, store, now)}
        row = store.task(word)
    if word in tasks:
        if tasks[word]["state"] == "broken":
            raise NoTaskError(f"{word}: broken: {tasks[word]['reason']}")
        task = task_from(row) if row else _read_by_name(settings, word)
        text, anchor = task.settings["schedule"], row["anchor_at"] if row else None
        zone_name = zone_name or task.settings["timezone"]
    zone = _usage("--timezone", lambda: Zone(zone_name or settings.timezone))
    start = now
    if "from" in call.flags:
        start = _usage("--from", lambda: read_moment(call.flags["from"], zone, 0.0))
    spread = f"{settings.node}/{word}"
    schedule = _usage("next", lambda: parse_schedule(text, zone, 0.0, spread))
    anchor = schedule.anchor_for(start) if anchor is None else anchor
    schedule = parse_schedule(text, zone, anchor, spread)
    moments: list[float] = []
    while len(moments) < call.count(5):
        moment = schedule.next_after(moments[-1] if moments else start)
        if moment is None:
            break
        moments.append(moment)
    shown = [str(iso(moment, zone.tzinfo)) for moment in moments]
    return print_found(call, shown, shown or [f"never by itself: {schedule.text}"])


def _read_by_name(settings: Settings, name: str) -> Task:
    """Return a task that no wake-up has seen yet."""
    return next(task for task in discover(settings, {})[0] if task.name == name)


def lint_command(call: Invocation) -> int:
    """Check the files of tasks.d, or one file there or anywhere; 1 if one is broken."""
    settings = call.settings
    if call.words:
        path = call.word("FILE")
        path = path if os.path.exists(path) else os.path.join(settings.tasks_dir, path)
        if not os.path.exists(path):
            raise NoTaskError(f"there is no file {shortened(call.words[0])!r}")
        folder, only = os.path.split(os.path.abspath(path))
        settings = settings._replace(values={**settings.values, "tasks_dir": folder})
        name = os.path.splitext(only)[0]
        reason = ignored_because(only)
        tasks = [] if reason else [read_task(settings, Task(name, only))]
        ignored = {only: reason} if reason else {}
    else:
        refuse_unsafe_folder(settings.tasks_dir)
        tasks, _, ignored = discover(settings, {})
        changed = {task.name: task for task in with_after_errors(tasks)}
        tasks = [changed.get(task.name, task) for task in tasks]
    rows = [(file, "ignored", reason) for file, reason in ignored.items()]
    for task in tasks:
        rows.append((task.file, "broken" if task.error else "ok", task.error))
        notes = [] if task.error else schedule_notes(task.settings["schedule"])
        rows += [(task.file, "note", text) for text in notes]
    found = [dict(zip(("file", "state", "text"), row)) for row in sorted(rows)]
    print_found(call, found, (visible(": ".join(filter(None, row))) for row in sorted(rows)))
    return EXIT_FAILED if any(task.error for task in tasks) else EXIT_OK


def _end_run(row: Row, live: str, clock: Clock) -> None:
    """Wait until a run is over whose keeper was told to end it, or end it in its place."""
    until = clock.monotonic() + GRACE_SECONDS + 5
    while read_end(row, live, (), int) is None and clock.monotonic() < until:
        if not tell_keeper(live, 0):
            clear_group(read_notes(live).get("group", [0])[0], GRACE_SECONDS, clock)
        clock.wait(0.05)


def explain_command(call: Invocation) -> int:
    """Say why a task ran or did not, up to now or up to --at."""
    now, name = call.clock.now(), call.word("TASK")
    with closing(open_for_reading(call.settings)) as store:
        task = _task_named(call, store, name)
        at = now
        if "at" in call.flags:
            zone = Zone(call.settings.timezone)
            at = float(_usage("--at", lambda: read_moment(call.flags["at"], zone, 0.0)))
        row = store.task(name)
        found = explain(call.settings, store, task, now, at)
        if row and at == now and task["state"] == "active":
            runner = Runner(call.settings, store, call.clock, "cli", say_nothing)
            held = runner.held_because({"running_since": None, **row}, now)
            if held:
                reason = {"task": name, "reason": held[0], "detail": held[1]}
                found["sentences"].append(f"now: {reason_text(reason)}")
    text = " ".join(f"{said[:1].upper()}{said[1:]}." for said in found["sentences"])
    return print_found(call, found, wrapped(text, screen_width() or 100))


def doctor_command(call: Invocation) -> int:
    """Say what is well and what is not, with the way out; 1 if something is not."""
    settings, now = call.settings, call.clock.now()
    with closing(open_for_reading(settings)) as store:
        tasks, known = task_rows(settings, store, now), store.wakeups(WAKEUPS_KEPT)
        lately = sum(w["trigger"] != "hand" and now - w["started_at"] < 10800 for w in known)
        found = [
            *judge_wakeups(settings, store, now),
            *judge_crontab(read_crontab(), os.path.realpath(__file__), lately),
            *judge_tasks(tasks, now),
            *judge_packages(tasks),
            *judge_fit(settings, tasks),
            *judge_mail(settings, now),
            *judge_place(settings, store),
        ]
    words = ("ok", "WARNING", "CRITICAL")
    rows = [
        (words[f.level], f.about, f.text + f"; {f.way_out}" * bool(f.way_out))
        for f in sorted(found, key=lambda f: -f.level)
    ]
    lines = table([tuple(visible(cell) for cell in row) for row in rows], screen_width())
    print_found(call, [finding._asdict() for finding in found], lines)
    return EXIT_FAILED if any(f.level for f in found) else EXIT_OK


def read_crontab() -> str | None:
    """Return the crontab of this user, None if it cannot be read; empty if there is none."""
    try:
        done = subprocess.run(["crontab", "-l"], capture_output=True, timeout=10, check=False)  # noqa: S607 - where it lies differs
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace")


def check_command(call: Invocation) -> int:
    """Print one line as a Nagios plugin does; whatever goes wrong here is UNKNOWN, 3."""
    settings, now = call.settings, call.clock.now()
    with closing(open_for_reading(settings)) as store:
        tasks = [t for t in task_rows(settings, store, now) if t["state"] != "ignored"]
        findings = [*judge_tasks(tasks, now), *judge_wakeups(settings, store, now)]
        age = max(0.0, now - store.last_seen())
    line = check_line(findings, tasks, age if store.path != ":memory:" else 0.0)
    level = max((finding.level for finding in findings), default=0)
    found = {"level": level, "line": line, "findings": [f._asdict() for f in findings]}
    print_found(call, found, [line])
    return level


def metrics_command(call: Invocation) -> int:
    with closing(open_for_reading(call.settings)) as store:
        found = status(call.settings, store, call.clock)
    return print_found(call, found, metric_lines(found))


SENDMAIL_OPTIONS = "tivnGUmf:r:F:B:h:N:O:R:X:V:o:b:L:"  # sendmail(8); most change nothing here


def sendmail_command(call: Invocation) -> int:
    """Take a mail on stdin, as sendmail does, into the outbox; with --now send it and say how."""
    settings, now = call.settings, call.clock.now()
    content = _mail_from_stdin(call.words, settings)
    mail = read_mail(content, now, settings.values)
    if "now" not in call.flags:
        post(settings.outbox, content, now)
        return EXIT_OK
    server = MailServer(settings.values)
    refused = server.send(mail)
    server.close()
    if len(refused) < len(mail.recipients):
        taken = ", ".join(to for to in mail.recipients if to not in refused)
        print_lines([visible(f"sent from {mail.sender} to {taken}: {server.said}")])
    if refused:
        kind = UnavailableError if all(code >= 500 for code, _ in refused.values()) else BusyError
        raise kind(f"refused: {answers(refused)}")
    return EXIT_OK


def _mail_from_stdin(words: Sequence[str], settings: Settings) -> bytes:
    """Return the mail with the fields that sendmail's arguments stand for."""
    try:
        options, addresses = getopt.gnu_getopt(list(words), SENDMAIL_OPTIONS)
    except getopt.GetoptError as error:
        raise UsageError(f"sendmail: {error}; see --help") from None
    given = dict(options)
    if given.get("-b", "m") != "m":
        raise UsageError(f"sendmail: -b{given['-b']}: only a mail on stdin is taken (-bm)")
    sender = given.get("-f", given.get("-r"))
    sender = "" if sender == "<>" else sender
    _usage("sendmail", lambda: read_addresses(",".join(filter(None, [sender, *addresses]))))
    lines = [] if sender is None else [f"X-Envelope-From: <{sender}>"]
    to = "Bcc" if "-t" in given else "X-Envelope-To"
    lines += [f"{to}: {', '.join(addresses)}"] * bool(addresses)
    content = sys.stdin.buffer.read(MOST_MAIL_BYTES + 1)
    if len(content) > MOST_MAIL_BYTES:
        raise DataError("mail: is larger than 64 MiB")
    if "-i" not in given and ("-o", "i") not in options:  # then a dot on a line ends it
        content = re.split(rb"^\.\r?$", content, maxsplit=1, flags=re.MULTILINE)[0]
    if "-F" in given and not any(name == "from" for name, _ in _split_mail(content)[0]):
        from email.utils import formataddr

        address = sender or own_address(settings.values)
        named = formataddr((visible(given["-F"]), "@"))  # as it refuses addresses beyond ASCII
        lines.append(f"From: {address.join(named.rsplit('@', 1))}")
    return "".join(f"{line}\r\n" for line in lines).encode() + content


SAMPLES = {  # by language: suffix, what stands above the settings, what below them
    "python": (
        *(
            "py",
            "",
            "def run(task):\n    for item in task.each([1, 2, 3]):  # until the deadline\n",
        ),
        '        task.add_volume(1)\n    return "what people should know"\n',
    ),
    "sh": (
        *("sh", "#!/bin/sh\n", 'echo "works until $BGTASKS_DEADLINE"\n'),
        'echo "volume=1" >>"$BGTASKS_REPORT"\n',
    ),
    "perl": ("pl", "#!/usr/bin/env perl\n", 'print "works until $ENV{BGTASKS_DEADLINE}\\n";\n'),
    "php": ("php", "#!/usr/bin/env php\n<?php\n", 'echo getenv("BGTASKS_DEADLINE"), "\\n";\n'),
    "ruby": ("rb", "#!/usr/bin/env ruby\n", 'puts "until #{ENV["BGTASKS_DEADLINE"]}"\n'),
    "toml": ("toml", "", 'command = ["echo", "hello"]\n'),
}
SAMPLE_SETTINGS = (
    'description = "Say in one line what it is for"',
    'schedule = "daily 03:30"  # or "every 15 min", "mon,thu 07:00", "*/10 8-18 * * *"',
    '# window = "22:00-06:00"   # hours in which it may start',
    '# timeout = "1 h"          # then it is ended',
    "# options = { days = 7 }   # handed to the task",
)


def new_command(call: Invocation) -> int:
    """Write a commented sample of a task; nothing is overwritten."""
    name, language = call.word("NAME"), call.flags.get("language", "python")
    if language not in SAMPLES:
        raise UsageError(f"--language: {shortened(language)!r}; allowed are {', '.join(SAMPLES)}")
    suffix, head, *body = SAMPLES[language]
    reason = ignored_because(f"{name}.{suffix}")
    if reason:
        raise UsageError(f"{shortened(name)!r} cannot be a task: {reason}")
    refuse_unsafe_folder(call.settings.tasks_dir)
    with closing(open_for_reading(call.settings)) as store:
        require_admin(call.settings, store, call.clock)
    lines: tuple[str, ...] = SAMPLE_SETTINGS
    if suffix != "toml":
        lines = tuple(f"# {line}" for line in ("/// script", "[tool.bgtasks]", *lines, "///"))
    path = os.path.join(call.settings.tasks_dir, f"{name}.{suffix}")
    mode = 0o600 if suffix in ("py", "toml") else 0o700
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise cannot_create(path, error) from None
    with open(fd, "w") as file:
        file.write(head + "\n".join(lines) + "\n" + "".join(body))
    return print_lines([f"{path}: written; change it, then: lint {name}.{suffix}, run {name}"])


def crontab_line(settings: Settings) -> str:
    """Return the line that wakes this installation, with absolute paths only.

    It starts the module, which Python keeps compiled; a script is compiled at each start, and an
    archive has no other way."""
    folder, file = os.path.split(os.path.realpath(__file__))
    stem, suffix = os.path.splitext(file)
    words = [sys.executable, *([file] if suffix == ".pyz" else ["-m", stem])]
    if settings.files:
        words.append(f"--param_file={','.join(settings.files)}")
    command = " ".join(shlex.quote(word) for word in words)
    command = f"cd {shlex.quote(folder)} && {command}".replace("%", "\\%")  # crontab(5)
    return f"*/5 * * * * {command} # bgtasks {settings.state_dir}"


def install_command(call: Invocation) -> int:
    """Print the crontab line, or put it into the user's crontab, once; known by its mark."""
    line = crontab_line(call.settings)
    if "write" not in call.flags:
        return print_lines([line])
    with closing(open_for_reading(call.settings)) as store:
        require_admin(call.settings, store, call.clock)
    crontab = read_crontab()
    if crontab is None:
        raise UnavailableError(f"there is no crontab command here; let something else wake: {line}")
    mark = line.rpartition(" # ")[2]
    kept = [old for old in crontab.splitlines() if not old.endswith(f" # {mark}")]
    text = "\n".join([*kept, line]) + "\n"
    if text != crontab:
        done = subprocess.run(
            ["crontab", "-"],  # noqa: S607 - where it lies differs
            input=text.encode(),
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise RefusedError(f"crontab: {shortened(done.stderr.decode('utf-8', 'replace'), 200)}")
    return print_lines([f"in the crontab of {user_name(os.geteuid())}: {line}"])


def admin_command(call: Invocation) -> int:
    """Register, remove or list administrators; a password is never taken from the arguments."""
    action, login = [*call.words, "", ""][:2]
    if (action, bool(login)) not in (("add", True), ("remove", True), ("list", False)) or len(
        call.words
    ) > 2:
        raise UsageError("admin needs add LOGIN, remove LOGIN, or list; see --help")
    read_plain(login)
    with closing(open_for_work(call.settings, call.clock)) as store:
        if action == "list":
            names = sorted(store.admins())
            return print_found(call, names, names)
        if action == "remove" and login not in store.admins():
            raise NoTaskError(f"there is no administrator {shortened(login)!r}")
        password = _new_password() if action == "add" else ""
        by = user_name(os.geteuid())
        store.write_admin(login, hashed(password) if password else "", by, call.clock.now())
    return EXIT_OK


def _new_password() -> str:
    """Return a password from the terminal, or from the first line of stdin."""
    if sys.stdin.isatty():
        password = getpass.getpass("password: ")
        if password != getpass.getpass("again: "):
            raise UsageError("the two passwords differ; nothing was changed")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if len(password) < 8:
        raise UsageError("a password has at least 8 characters; nothing was changed")
    return password


def pause_command(call: Invocation) -> int:
    now, note, until = call.clock.now(), shortened(call.flags.get("note", ""), 200), None
    if "for" in call.flags:
        until = now + float(_usage("--for", lambda: read_duration(call.flags["for"])))
    return _for_tasks(call, lambda store, name, by, at: pause(store, name, by, at, until, note))


def _for_tasks(call: Invocation, do: Callable[[Store, str, str, float], None]) -> int:
    """Do something to the one task that was named, or to all of them."""
    if bool(call.words) == ("all" in call.flags):
        raise UsageError(f"{call.command} needs one TASK, or --all; see --help")
    with closing(open_for_work(call.settings, call.clock)) as store:
        teller = _teller(call.settings, call.clock)
        Runner(call.settings, store, call.clock, "hand", teller).read_folder()
        names = [row["name"] for row in store.tasks()]
        if call.words:
            names = [_task_named(call, store, call.word("TASK"))["name"]]
        for name in names:
            do(store, name, user_name(os.geteuid()), call.clock.now())
    return EXIT_OK


COMMANDS: Mapping[str, tuple[Callable[[Invocation], int], tuple[str, ...]]] = {
    "": (wake_up_command, ()),
    "status": (status_command, ("json", "watch")),
    "explain": (explain_command, ("at", "json")),
    "doctor": (doctor_command, ("json",)),
    "check": (check_command, ("json",)),
    "metrics": (metrics_command, ("json",)),
    "show": (show_command, ("json",)),
    "history": (history_command, ("count", "json")),
    "log": (log_command, ("follow", "json")),
    "run": (run_command, ("force",)),
    "request": (lambda call: _for_tasks(call, request), ("all",)),
    "sendmail": (sendmail_command, ("now",)),
    "kill": (kill_command, ()),
    "clear": (lambda call: _for_tasks(call, clear), ("all",)),
    "new": (new_command, ("language",)),
    "install": (install_command, ("write",)),
    "admin": (admin_command, ("json",)),
    "next": (next_command, ("from", "count", "timezone", "json")),
    "lint": (lint_command, ("json",)),
    "pause": (pause_command, ("all", "for", "note")),
    "resume": (lambda call: _for_tasks(call, resume), ("all",)),
}


if __name__ == "__main__":
    raise SystemExit(main())
