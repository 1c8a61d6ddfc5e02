# /// script
# [tool.bgtasks]
# description = "Rotate logs that are too large or too old, where there is no logrotate"
# schedule = "daily 03:45"
# timeout = "2 h"
#
# [tool.bgtasks.options]
# files = []             # ["/srv/app/log/*.log"]
# method = "rename"      # or "copytruncate", for a program that cannot be told to open its log anew
# larger_than_mb = 0     # 0: of any size
# older_than = ""        # "1 d", "12 h" or "90 min" since it was last rotated; empty: of any age
# keep = 7               # rotated logs of each log
# compress = true
# pid_file = ""          # of the program that writes: it gets the signal
# signal = "HUP"
# command = []           # or what tells it: ["systemctl", "reload", "nginx"]
# ///
"""Rotate logs: copy or link this file into tasks.d, and set the options.

A log is rotated if it is not empty and one of the limits says so. It becomes NAME-YYYYMMDD-HHMMSS
(UTC), and then .gz. With "rename" no line is ever lost: who writes to the log goes on writing to
the file that was renamed until it is told to open its log anew; and that file is neither compressed
nor removed before nobody writes to it, in a later run if need be. That is asked of the system (a
lease, as Linux has it), or else taken from the time of the last line.

"copytruncate" copies the log, and empties it when all is copied. What is written in the instant
between these two is lost; who writes must append, as most do.

Killed at any moment, it leaves each line in a file. Lines stay there twice only if it is killed
between copying and emptying.
"""

from __future__ import annotations

import calendar
import contextlib
import errno
import fcntl
import glob
import gzip
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from typing import Any, BinaryIO, Callable, NamedTuple

ROTATED = re.compile(r"(?s)(.+)-([0-9]{8}-[0-9]{6})(\.gz)?")
STAMP = "%Y%m%d-%H%M%S"
SECONDS = {"min": 60, "h": 3600, "d": 86400}
SLACK = 0.95  # so that a run that begins a moment earlier than yesterday's does not miss a day
QUIET = 600  # seconds without a new line, where the system does not tell who has a file open
PATIENCE = 5  # seconds for who writes to open its log anew
COMMAND_SECONDS = 60
CHUNK = 1 << 20


class LogError(Exception):
    """A log cannot be rotated; it stays as it is, and the others go on."""


def run(task: Any) -> str | None:
    options = read_options(task.options)
    if hasattr(signal, "SIGIO"):  # comes if a file is opened in the instant it is asked about
        signal.signal(signal.SIGIO, signal.SIG_IGN)
    logs = found(options)
    if not logs:
        raise ValueError("options.files: there is no such file; mend the paths")
    problems = Problems()
    logs = safe(logs, problems)
    before = {path for log in logs for path in rotated(log)}
    rotate_due(task, logs, options, problems)
    tell(logs, options, problems)
    for log in task.each(logs):
        with problems.of(log):
            tidy(log, options, before)
    if problems.lines:
        raise LogError(f"{len(problems.lines)} problems, the last: {problems.lines[-1]}")
    return f"{task.volume} of {len(logs)} logs rotated" if task.volume else task.NOTHING


def found(options: Options) -> list[str]:
    """Return the logs, also those of which only rotated files are there."""
    paths = set()
    for pattern in options.files:
        paths |= {path for path in glob.glob(pattern) if not ROTATED.fullmatch(path)}
        paths |= {m[1] for path in glob.glob(pattern + "-*") if (m := ROTATED.fullmatch(path))}
    return sorted(path for path in paths if not path.endswith((".gz", ".unfinished")))


def rotated(log: str) -> list[str]:
    """Return the rotated files of a log, oldest first."""
    paths = glob.glob(glob.escape(log) + "-*")
    return sorted(path for path in paths if (m := ROTATED.fullmatch(path)) and m[1] == log)


def safe(logs: list[str], problems: Problems) -> list[str]:
    """Leave out those where root could be misled, as others can replace a file by a link."""
    kept = []
    for log in logs:
        with problems.of(log):
            status = os.stat(os.path.dirname(log))
            if os.geteuid() == 0 and (status.st_uid != 0 or status.st_mode & 0o022):
                raise LogError("others can write to its folder; let its owner rotate it, not root")
            kept.append(log)
    return kept


class Problems:
    """What is wrong with some of the logs; the others go on."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextlib.contextmanager
    def of(self, what: str) -> Any:
        try:
            yield
        except (OSError, LogError, subprocess.SubprocessError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.lines.append(f"{what!r}: {said}")
            print(self.lines[-1])


# --- rotating


def rotate_due(task: Any, logs: list[str], options: Options, problems: Problems) -> None:
    """Rotate the logs that are due; note when each was seen first, or rotated last."""
    now = time.time()
    seen = task.state.get("seen", {})
    # one from the future is that of a clock that has been set back since
    seen = task.state["seen"] = {log: min(now, seen.get(log, now)) for log in logs}
    for log in task.each(logs):
        with problems.of(log):
            for path in glob.glob(glob.escape(log) + "-*.unfinished"):  # of a run that was killed
                os.unlink(path)
            if os.path.lexists(log) and is_due(log, options, now - seen[log]):
                rotate(log, options.method, now)
                seen[log] = now
                task.add_volume(1)


def is_due(log: str, options: Options, age: float) -> bool:
    status = os.lstat(log)
    if not stat.S_ISREG(status.st_mode):
        raise LogError("is no plain file; name the file itself")
    large = 0 < options.larger_than_mb * 1_000_000 < status.st_size
    return bool(status.st_size) and (large or 0 < read_seconds(options.older_than) * SLACK <= age)


def rotate(log: str, method: str, now: float) -> None:
    target = f"{log}-{new_stamp(log, now)}"
    if method == "rename":
        rename(log, target)
    else:
        copy_and_truncate(log, target)
    print(f"rotated {log!r}")


def new_stamp(log: str, now: float) -> str:
    """Return a stamp later than those there are; else, after a clock was set back, it would go."""
    stamps = [match[2] for path in rotated(log) if (match := ROTATED.fullmatch(path))]
    with contextlib.suppress(ValueError):  # there is none, or one that is no time
        now = max(now, calendar.timegm(time.strptime(max(stamps, default=""), STAMP)) + 1)
    return time.strftime(STAMP, time.gmtime(now))


def rename(log: str, target: str) -> None:
    """Put an empty log into the place of this one."""
    status = os.lstat(log)
    if os.geteuid() not in (0, status.st_uid):  # the new one would be ours, and its writer shut out
        raise LogError('belongs to another user; let that one rotate it, or set "copytruncate"')
    os.rename(log, target)
    with contextlib.suppress(FileExistsError):  # who writes to it was faster
        create(log, status).close()
    sync(os.path.dirname(log))


def create(path: str, like: os.stat_result) -> BinaryIO:
    """Create a file with the owner and rights of another one."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    if os.geteuid() == 0:
        os.fchown(fd, like.st_uid, like.st_gid)
    os.fchmod(fd, stat.S_IMODE(like.st_mode))
    return os.fdopen(fd, "wb")


def copy_and_truncate(log: str, target: str) -> None:
    unfinished = f"{target}.unfinished"
    fd = os.open(log, os.O_RDWR | os.O_NOFOLLOW)
    with (
        open(fd, "rb+", buffering=0) as source,
        removed_if_failed(unfinished),
        create(unfinished, os.fstat(fd)) as copy,
    ):
        shutil.copyfileobj(source, copy, CHUNK)
        save(copy)
        os.rename(unfinished, target)
        while data := source.read(CHUNK):  # what was written meanwhile
            copy.write(data)
            copy.flush()
        os.ftruncate(fd, 0)
        save(copy)
    sync(os.path.dirname(log))


@contextlib.contextmanager
def removed_if_failed(path: str) -> Any:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def save(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync(folder: str) -> None:
    """See that the names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- who writes to a rotated log is told to open its log anew


def tell(logs: list[str], options: Options, problems: Problems) -> None:
    """Tell who writes, if somebody still writes to a rotated log, and wait until nobody does."""
    if not (options.pid_file or options.command):
        return
    with problems.of(options.pid_file or options.command[0]):
        written = [path for log in logs for path in rotated(log) if is_written(path)]
        if not written:
            return
        if options.pid_file:
            send(options.pid_file, getattr(signal, f"SIG{options.signal}"))
        if options.command:
            subprocess.run(options.command, timeout=COMMAND_SECONDS, check=True)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and any(is_written(path) for path in written):
            time.sleep(0.05)


def send(pid_file: str, number: int) -> None:
    """Send a signal to the process that a file names; without the file it does not run."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(pid_file, encoding="ascii", errors="replace") as file:
            text = file.read(100).strip()
        if not re.fullmatch("[1-9][0-9]{0,8}", text) or int(text) == 1:
            raise LogError("does not hold the number of a process")
        os.kill(int(text), number)


def is_written(path: str) -> bool:
    """Tell whether somebody has a file open for writing, or may have."""
    if path.endswith(".gz"):
        return False
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)  # refused while somebody has it
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    except (OSError, AttributeError) as error:  # the latter where there are no leases
        if getattr(error, "errno", 0) == errno.EAGAIN:
            return True
        return abs(time.time() - os.fstat(fd).st_mtime) < QUIET
    finally:
        os.close(fd)


# --- rotated logs are compressed, and the oldest removed


def tidy(log: str, options: Options, before: set[str]) -> None:
    """Compress and remove what nobody writes to any more."""
    written = [path for path in rotated(log) if is_written(path)]
    for path in rotated(log)[: -options.keep]:
        if path not in written:
            os.unlink(path)
            print(f"removed {path!r}")
    for path in rotated(log) if options.compress else ():
        if path not in written and not path.endswith(".gz"):
            compress(path)
    if before.intersection(written):
        text = "is still written to; set pid_file or command"
        raise LogError(f'{text}, or method = "copytruncate" if its writer cannot open a log anew')


def compress(path: str) -> None:
    unfinished = f"{path}.unfinished"
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(fd, "rb") as source, removed_if_failed(unfinished):
        with create(unfinished, os.fstat(fd)) as file:
            with gzip.GzipFile(os.path.basename(path), "wb", 6, file, os.fstat(fd).st_mtime) as out:
                shutil.copyfileobj(source, out, CHUNK)
            save(file)
        if is_written(path) or os.fstat(fd).st_size != source.tell():
            os.unlink(unfinished)
            return
        times = os.fstat(fd)
        os.utime(unfinished, ns=(times.st_atime_ns, times.st_mtime_ns))
        os.rename(unfinished, f"{path}.gz")
    sync(os.path.dirname(path))
    os.unlink(path)


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    files: tuple[str, ...] = ()
    method: str = "rename"
    larger_than_mb: int = 0
    older_than: str = ""
    keep: int = 7
    compress: bool = True
    pid_file: str = ""
    signal: str = "HUP"
    command: tuple[str, ...] = ()


def read_seconds(text: str) -> int:
    """Return the seconds of a time such as "30 d"; 0 if it is none."""
    match = re.fullmatch("([0-9]{1,6}) ?(min|h|d)", text)
    return int(match[1]) * SECONDS[match[2]] if match else 0


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    ("files", lambda o: o.files, 'is empty; name the logs: ["/srv/app/log/*.log"]'),
    ("files", lambda o: all(map(os.path.isabs, o.files)), "must be paths from the root on"),
    (
        "method",
        lambda o: o.method in ("rename", "copytruncate"),
        'must be "rename" or "copytruncate"',
    ),
    (
        "older_than",
        lambda o: not o.older_than or read_seconds(o.older_than),
        'must be a time such as "1 d", "12 h" or "90 min"',
    ),
    (
        "older_than",
        lambda o: o.older_than or o.larger_than_mb,
        "is empty, and so nothing says when; set it or larger_than_mb",
    ),
    ("keep", lambda o: o.keep > 0, "must be at least 1"),
    (
        "pid_file",
        lambda o: not o.pid_file or os.path.isabs(o.pid_file),
        "must be a path from the root on",
    ),
    (
        "pid_file",
        lambda o: o.method == "rename" or not (o.pid_file or o.command),
        'must be empty, and command too, with method = "copytruncate": nobody needs to be told',
    ),
    (
        "signal",
        lambda o: o.signal in ("HUP", "USR1", "USR2", "WINCH"),
        'must be "HUP", "USR1", "USR2" or "WINCH"',
    ),
    (
        "command",
        lambda o: not o.command or shutil.which(o.command[0]),
        "is not there or cannot be started; give its whole path",
    ),
)


# --- options: these lines are the same in each task of this folder, so that each works alone

TYPES = {
    str: "text in quotes",
    int: "a whole number from 0 on",
    bool: "true or false",
    tuple: "a list of texts",
}
BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def read_options(given: Mapping[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    options = Options(**{key: read_option(key, value) for key, value in given.items()})
    for key, holds, rule in RULES:
        if not holds(options):
            raise ValueError(f"options.{key}: {rule}")
    return options


def read_option(key: str, value: Any) -> Any:
    """Return a value as the type of its default."""
    if key not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    kind = type(Options._field_defaults[key])
    value = of_type(kind, value)
    texts = value if kind is tuple else (value,)
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if kind is tuple and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if any(isinstance(text, str) and re.search(r"[\0\r\n]", text) for text in texts):
        raise ValueError(f"options.{key}: must stand on one line; remove what breaks it")
    return value


def of_type(kind: type, value: Any) -> Any:
    """Turn what the param file sets as text, because a .toml left it out, into the type wanted."""
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str) or kind is str:
        return value
    if kind is tuple:
        return tuple(re.split(r"\s*,\s*", value)) if value else ()
    if kind is bool:
        return BOOLEANS.get(value.lower(), value)
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else value
