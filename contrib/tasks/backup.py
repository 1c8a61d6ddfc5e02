# /// script
# [tool.bgtasks]
# description = "Back up folders, files and SQLite databases into an archive"
# schedule = "daily 02:30"
# timeout = "12 h"
# retries = 0              # a run that fails may have written an archive: of what could be read
# on_interrupt = "again"
# nice = 10
#
# [tool.bgtasks.options]
# paths = []               # folders and files: ["/srv/app", "/etc/app.conf"]
# target = ""              # folder for the archives, best on another disk; it must be there
# exclude = []             # names such as "*.tmp" or "cache", and whole paths: "/srv/app/log/*"
# format = "tar.gz"        # or "zip"
# keep_last = 7            # so many of the newest archives stay,
# keep_daily = 0           # and the newest one of each of so many days, weeks, months and years
# keep_weekly = 0
# keep_monthly = 0
# keep_yearly = 0
# min_free_mib = 1024      # so much stays free on the disk of the target
# ///
"""Back up: copy or link this file into tasks.d, and set the options. Restore into a new folder:

    python3 backup.py restore ARCHIVE FOLDER

A backup first notes what there is, then packs that in parts, reads all of it back, and only then
gives the archive its name. If the deadline comes, or the task is killed, the next run goes on; what
is unfinished lies in the folder .TASK.unfinished of the target. If the disk gets full, or what it
holds cannot be read back, that is removed, and archives that are there stay untouched.

What cannot be read lets the run fail at its end; the rest is kept, as TASK-TIME.incomplete.tar.gz.
A file that begins as a SQLite database does is copied through SQLite, so the copy is whole while
others write to it. Symbolic links are stored, not followed, but for the paths themselves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import functools
import grp
import gzip
import io
import itertools
import json
import os
import pwd
import re
import shutil
import sqlite3
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import IO, Any, Callable, NamedTuple
from urllib.parse import quote

PART_SECONDS = 60.0  # what a kill may cost
LATE_SECONDS = 86400.0  # an archive that nobody worked at for so long is begun anew
STEPS_SECONDS = 60.0  # how long a database is copied in steps
LOCKED_SECONDS = 60.0  # and how long it may be locked
CHUNK = 1 << 18
PAGES = 2000
SAMPLES = 200
EMPTY = io.BytesIO()
DATABASE = b"SQLite format 3\0"
BESIDE_DATABASE = re.compile("(.*)-(wal|shm|journal)", re.DOTALL)
KINDS = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
}
Complain = Callable[[str, str], None]
TYPES = {str: "text in quotes", int: "a whole number", tuple: "a list of texts"}


class BackupError(Exception):
    """The run fails; its text is for people."""


def run(task: Any) -> Any:
    options = read_options(task.options)
    try:
        with workplace(task, options.target) as folder:
            cursor = made(task, folder, options)
    except OSError as error:
        raise BackupError(f"{options.target}: {error.strerror or error}") from error
    return finish(task, cursor, options) if cursor else task.MORE


def made(task: Any, folder: str, options: Options) -> Cursor | None:
    """Make the archive, or go on with it; return None if the deadline came."""
    try:
        cursor = went_before(task, folder, options) or begin(task, folder, options)
        cursor = pack(task, cursor, options)
        if cursor.packed < cursor.files:
            return None
        verify(cursor, FORMATS[options.format])
        publish(cursor, options)
    except Exception:
        discard(task, folder)
        raise
    discard(task, folder)
    return cursor


def finish(task: Any, cursor: Cursor, options: Options) -> str:
    archive = cursor.published(options.format)
    removed = rotate(task.name, archive, options)
    if cursor.problems:
        text = f"{archive} is incomplete, {cursor.problems} could not be read; the last: "
        raise BackupError(text + cursor.problem)
    what = f"{archive}: {cursor.files} files and folders, {mib(cursor.size)}"
    changed = f", {cursor.changed} changed while they were read" if cursor.changed else ""
    return f"{what}{changed}; {removed} older removed"


def shown(path: str) -> str:
    """Return a path as it can be printed."""
    return path if path.isprintable() else ascii(path)


def mib(size: float) -> str:
    return f"{size / (1 << 20):.1f} MiB"


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    paths: tuple[str, ...] = ()
    target: str = ""
    exclude: tuple[str, ...] = ()
    format: str = "tar.gz"
    keep_last: int = 7
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0
    min_free_mib: int = 1024


def read_options(given: dict[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    options = Options(**{key: read_option(key, value) for key, value in given.items()})
    for key, holds, rule in rules(options):
        if not holds:
            raise ValueError(f"options.{key}: {rule}")
    return options


def read_option(key: str, value: Any) -> Any:
    """Return a value as the type of its default: what a .toml leaves out is set as text."""
    if key not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    kind = type(Options._field_defaults[key])
    if kind is int and isinstance(value, str) and re.fullmatch("[0-9]+", value):
        value = int(value)
    elif kind is tuple and isinstance(value, (str, list)):
        value = tuple(re.split(r"\s*,\s*", value) if isinstance(value, str) else value)
    texts = value if kind is tuple else ()
    if type(value) is not kind or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if kind is int and value < 0:
        raise ValueError(f"options.{key}: must not be negative")
    return value


def rules(given: Options) -> Iterator[tuple[str, object, str]]:
    """Yield what must hold, the next only if those before do."""
    paths, target, roots = given.paths, given.target, list(map(os.path.realpath, given.paths))
    yield "paths", paths, 'is empty; name what to back up, such as ["/srv/app"]'
    yield "paths", all(map(os.path.isabs, paths)), "must be paths from the root on"
    yield "paths", "/" not in roots, "must not be /, which holds the kernel's files; name folders"
    yield "target", target, "is empty; name the folder for the archives"
    yield "target", os.path.isabs(target), "must be a path from the root on"
    yield "target", os.path.isdir(target), "is no folder; mount its disk, or make it: mkdir -m 700"
    may_write = os.access(target, os.W_OK | os.X_OK)
    yield "target", may_write, "cannot be written to; give it to the user who runs this"
    apart = not any(lies_in(path, os.path.realpath(target)) for path in roots)
    yield "target", apart, "must not hold what is backed up; name another folder"
    names = all(text[0] == "/" or "/" not in text[:-1] for text in given.exclude)
    yield "exclude", names, "must be names such as *.tmp, and paths from the root on"
    yield "format", given.format in FORMATS, 'must be "tar.gz" or "zip"'
    yield "keep_last", given.keep_last > 0, "must be at least 1"


def lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


# --- the folder of what is unfinished, and how far it is


class Cursor(SimpleNamespace):
    """How far an archive is. What its files hold beyond that does not count."""

    folder: str
    archive: str  # its name, without what comes behind the time
    wanted: str  # the options that it was begun with: the first four
    at: float = 0.0  # when somebody last worked at it
    files: int = 0
    packed: int = 0
    size: int = 0  # bytes of the archive
    members: int = 0
    problems: int = 0
    problem: str = ""
    changed: int = 0

    def path(self, what: str) -> str:
        """Return where the `list`, the `packed` archive, or a `copy` of a database lies."""
        return os.path.join(self.folder, f"{self.archive}.{what}")

    def complain(self, path: str, what: str) -> None:
        text = f"{shown(path)}: {what}"
        print(text)
        self.problems, self.problem = self.problems + 1, text[-500:]

    def published(self, suffix: str) -> str:
        return f"{self.archive}{'.incomplete' * bool(self.problems)}.{suffix}"


@contextlib.contextmanager
def workplace(task: Any, target: str) -> Iterator[str]:
    """Hold the folder for what is unfinished. A second installation would remove our archives."""
    folder = os.path.join(target, f".{task.name}.unfinished")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise BackupError(f"{folder}: is not a folder of ours; remove it")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(f"{folder}.lock", flags, 0o600), "r+") as lock:
        apart = "give each installation a target of its own"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(f"{folder}: another one is at work there; {apart}") from None
        except OSError as error:  # some network disks have no locks
            print(f"{folder}.lock: {error.strerror}")
        owner = f"{task.node}:{task.state_dir}"
        other = lock.read() or owner
        if other != owner:
            raise BackupError(f"{folder}.lock: is of {shown(other)}; {apart}, or remove this file")
        lock.seek(0)
        lock.write(owner)
        lock.flush()
        yield folder


def went_before(task: Any, folder: str, options: Options) -> Cursor | None:
    """Return the cursor of what an earlier run left unfinished, if that can be continued."""
    with contextlib.suppress(KeyError, AttributeError, FileNotFoundError):
        cursor = Cursor(**task.state["unfinished"])
        there = os.path.getsize(cursor.path("packed")) if cursor.packed else 0
        late = abs(time.time() - cursor.at) > LATE_SECONDS
        same = (cursor.folder, cursor.wanted) == (folder, json.dumps(options[:4]))
        if same and not late and there >= cursor.size and os.path.exists(cursor.path("list")):
            return cursor
        discard(task, cursor.folder)
    return None


def save(task: Any, cursor: Cursor) -> None:
    cursor.at = time.time()
    task.state["unfinished"] = dict(vars(cursor))


def discard(task: Any, folder: str) -> None:
    task.state.pop("unfinished", None)
    shutil.rmtree(folder, ignore_errors=True)


def begin(task: Any, folder: str, options: Options) -> Cursor:
    """Note what is to be packed, and look whether there is room for it."""
    discard(task, folder)
    os.mkdir(folder, 0o700)
    cursor = Cursor(folder=folder, archive=new_name(task.name, options))
    cursor.wanted = json.dumps(options[:4])
    total = 0
    with open(cursor.path("list"), "w", encoding="ascii") as file:
        for path, size in everything(options, cursor.complain):
            file.write(json.dumps([path, size]) + "\n")
            cursor.files, total = cursor.files + 1, total + size
    if not cursor.files:
        raise BackupError(f"there is nothing to back up; the last problem: {cursor.problem}")
    require_space(options, estimate(cursor.path("list"), total) + 200 * cursor.files)
    save(task, cursor)
    return cursor


def new_name(name: str, options: Options) -> str:
    now = int(time.time())
    while True:
        archive = name + time.strftime("-%Y%m%dT%H%M%SZ", time.gmtime(now))
        if not any(file.startswith(archive) for file in os.listdir(options.target)):
            return archive
        now += 1


def require_space(options: Options, need: float) -> None:
    disk = os.statvfs(options.target)
    free = disk.f_bavail * disk.f_frsize
    if free - need < options.min_free_mib << 20:
        text = f"this needs about {mib(need)} of the {mib(free)} that are free, and "
        text += f"{options.min_free_mib} MiB must stay free (min_free_mib); make room"
        raise BackupError(f"options.target: {options.target}: {text}")


def estimate(name: str, total: int) -> float:
    """Return what the files may take when packed, by samples spread evenly over all their bytes."""
    step = max(1, total // SAMPLES)
    position, sample_at, raw, packed = 0, step // 2, 0, 0
    for path, size in listed(name):
        while sample_at < position + size:
            data = sample(path, sample_at - position)
            raw, packed = raw + len(data), packed + len(zlib.compress(data))
            sample_at += step
        position += size
    return 1.1 * total * (min(1.0, packed / raw) if raw else 1.0)


def sample(path: str, at: int, size: int = 1 << 16) -> bytes:
    try:
        with opened(path) as file:
            return os.pread(file.fileno(), size, at)
    except OSError:  # is said when its turn comes
        return b""


# --- what there is to pack


def listed(name: str, begin: int = 0) -> Iterator[tuple[str, int]]:
    with open(name, encoding="ascii") as file:
        for line in itertools.islice(file, begin, None):
            path, size = json.loads(line)
            yield path, size


def everything(options: Options, complain: Complain) -> Iterator[tuple[str, int]]:
    """Yield each path to pack and its size, in an order that is always the same."""
    roots = sorted({os.path.realpath(path) for path in options.paths})
    excluded = exclusion(options.exclude)
    target = os.path.realpath(options.target)
    for root in roots:
        if any(root != other and lies_in(root, other) for other in roots):
            continue
        files = 0
        for path, status in walk(root, lambda path: path == target or excluded(path), complain):
            files += not stat.S_ISDIR(status.st_mode)
            yield path, status.st_size if stat.S_ISREG(status.st_mode) else 0
        if not files:
            complain(root, "is not there, or holds no file; is its disk mounted?")


def walk(
    root: str, excluded: Callable[[str], object], complain: Complain
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield a path and all below it; a folder before what is in it, links not followed."""
    paths = [root]
    while paths:
        path = paths.pop()
        try:
            status = os.lstat(path)
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                inside = (os.path.join(path, name) for name in sorted(os.listdir(path))[::-1])
                paths += [path for path in inside if not excluded(path)]
        except OSError as error:
            if not isinstance(error, FileNotFoundError):  # gone meanwhile
                complain(path, str(error.strerror))


def exclusion(patterns: Iterable[str]) -> Callable[[str], object]:
    """Return what tells an excluded path: patterns with a slash are whole paths, others names."""
    alternatives = []
    for pattern in patterns:
        folder, name = os.path.split(pattern.rstrip("/"))
        whole = os.path.join(os.path.realpath(folder), name)  # as the paths are: without links
        alternatives.append(fnmatch.translate(whole if folder else f"*/{name}"))
    return re.compile("|".join(alternatives) or r"(?!)").match


# --- pack


def pack(task: Any, cursor: Cursor, options: Options) -> Cursor:
    """Pack until all is packed or the deadline comes; each part counts when it is on the disk."""
    if cursor.packed == cursor.files:
        return cursor
    with contextlib.closing(Packer(task, cursor, options)) as packer:
        for path, _ in task.each(listed(cursor.path("list"), cursor.packed)):
            packer.add(path)
        packer.end_part()
        return packer.cursor


class Packer:
    """Adds paths to the archive."""

    def __init__(self, task: Any, cursor: Cursor, options: Options) -> None:
        self.cursor, self._task, self._options = cursor, task, options
        self._names: dict[Any, str] = {}  # the first one that was packed of files with several
        self._begin_part()

    def close(self) -> None:
        with contextlib.suppress(BackupError, ValueError):  # what was not ended does not count
            self._archive.close(last=False)

    def _begin_part(self) -> None:
        reserve = self._options.min_free_mib << 20
        file = open_at(self.cursor.path("packed"), self.cursor.size, reserve)
        self._archive = FORMATS[self._options.format](file)
        self._members, self._end = 0, time.monotonic() + PART_SECONDS

    def end_part(self) -> None:
        last = self.cursor.packed == self.cursor.files
        size = self._archive.close(last=last)
        if self._members or last:
            self.cursor.size = size
            self.cursor.members += self._members
            self._task.add_volume(self._members)
        save(self._task, self.cursor)

    def add(self, path: str) -> None:
        try:
            self._add(path)
        except (FileNotFoundError, NotADirectoryError):
            print(f"{shown(path)}: is gone meanwhile")
        except UnicodeEncodeError:
            self.cursor.complain(
                path, 'its name is not UTF-8, which only format = "tar.gz" can hold'
            )
        except OSError as error:
            self.cursor.complain(path, str(error.strerror))
        self.cursor.packed += 1
        if self.cursor.packed % 100 == 0:
            self._task.progress(self.cursor.packed, self.cursor.files)
        if time.monotonic() > self._end and self.cursor.packed < self.cursor.files:
            self.end_part()
            self._begin_part()

    def _add(self, path: str) -> None:
        folder = os.path.dirname(path)
        if os.path.realpath(folder) != folder:  # what lies behind a link was not asked for
            raise FileNotFoundError
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            self._add_file(path)
        elif kind in KINDS:
            member = member_of(path, status)
            member.linkname = os.readlink(path) if member.issym() else ""
            self._store(member)
        else:
            print(f"{shown(path)}: left out, it is a socket, a pipe or a device")

    def _add_file(self, path: str) -> None:
        beside = BESIDE_DATABASE.fullmatch(path)
        if is_database(path):
            self._add_database(path)
        elif not (beside and is_database(beside[1])):  # else it was packed with that
            self._add_content(path, path)

    def _add_database(self, path: str) -> None:
        folder = self.cursor.path("copy")
        copy = os.path.join(folder, "database")
        require_space(self._options, os.path.getsize(path))
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder, 0o700)
        try:
            damage = copy_database(path, copy)
        except sqlite3.Error as error:
            shutil.rmtree(folder)  # what follows may need its room
            self.cursor.complain(path, f"SQLite cannot copy it ({error}); its bare file is packed")
            for name in filter(os.path.lexists, (path, f"{path}-wal", f"{path}-journal")):
                self._add_content(name, name)
            return
        if damage:
            self.cursor.complain(path, f"the database is damaged: {damage}")
        self._add_content(path, copy)
        shutil.rmtree(folder)

    def _add_content(self, path: str, source: str) -> None:
        with opened(source) as file:
            content = Content(file)
            member = member_of(path, os.lstat(path), content.size)
            several = self._archive.has_links and content.before.st_nlink > 1
            key = version(content.before) if several else None
            if key in self._names:
                member.type, member.size, member.linkname = tarfile.LNKTYPE, 0, self._names[key]
            self._store(member, content)
            changed = version(os.fstat(file.fileno())) != version(content.before)
        if content.error:
            self.cursor.complain(path, f"{content.error}; in the archive it ends with zeros")
        elif changed:
            print(f"{shown(path)}: changed while it was read")
            self.cursor.changed += 1
        elif key:
            self._names.setdefault(key, member.name)

    def _store(self, member: tarfile.TarInfo, content: Content | None = None) -> None:
        self._archive.add(member, content)
        self._members += 1


def member_of(path: str, status: os.stat_result, size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path.lstrip("/"))
    member.type = KINDS.get(stat.S_IFMT(status.st_mode), tarfile.FIFOTYPE)
    member.mode, member.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
    member.uid, member.gid, member.size = status.st_uid, status.st_gid, size
    member.uname = name_of(pwd.getpwuid, status.st_uid)
    member.gname = name_of(grp.getgrgid, status.st_gid)
    return member


@functools.cache
def name_of(look_up: Callable[[int], Any], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return ""


def opened(path: str) -> IO[bytes]:
    """Open a plain file; should somebody have put a pipe or a link there, neither waits."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    file = open(fd, "rb")  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise OSError(0, "is no plain file any more")
    return file


def is_database(path: str) -> bool:
    return sample(path, 0, len(DATABASE)) == DATABASE


class Content:
    """The bytes of a file: as many as it had when it was opened, whatever happens to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.before = file, os.fstat(file.fileno())
        self.size = self._left = self.before.st_size
        self.error = ""

    def read(self, size: int = -1) -> bytes:
        """Return what is wanted, zeros in place of what is missing: its size is told already."""
        wanted = self._left if size < 0 else min(size, self._left)
        try:
            content = b"" if self.error else self._file.read(wanted)
        except OSError as error:
            self.error, content = str(error.strerror), b""
        self._left -= wanted
        return content.ljust(wanted, b"\0")


def version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# --- SQLite


def copy_database(path: str, copy: str) -> str:
    """Copy a database while others use it; return what is wrong with it, if anything.

    First in steps, between which others can write. If they do, it begins again; after some time
    it is copied in one step. With a write-ahead log nobody has to wait for that one either."""
    with contextlib.suppress(TimeoutError):
        return copied(path, copy, PAGES)
    return copied(path, copy, -1)


def copied(path: str, copy: str, pages: int) -> str:
    begin = time.monotonic()

    def watch(status: int, _remaining: int, _total: int) -> None:
        seconds, locked = time.monotonic() - begin, status & 0xFF in (5, 6)  # SQLITE_BUSY, _LOCKED
        if locked and seconds > LOCKED_SECONDS:
            raise sqlite3.OperationalError(f"locked for {LOCKED_SECONDS:.0f} s")
        if pages > 0 and seconds > STEPS_SECONDS:
            raise TimeoutError

    uri = f"file:{quote(os.fsencode(path))}?mode=rw"
    with contextlib.closing(sqlite3.connect(copy)) as target:
        with contextlib.closing(sqlite3.connect(uri, timeout=1.0, uri=True)) as source:
            source.backup(target, pages=pages, progress=watch)
        return damage(target)


def damage(database: sqlite3.Connection) -> str:
    """Return what is wrong with the structure of a database; its own rules are not ours."""
    database.execute("PRAGMA ignore_check_constraints = ON")
    try:
        found = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        # its functions and the orders of its texts may be known only to its application
        return "" if str(error).startswith(("unknown function", "no such")) else str(error)
    return "" if found == "ok" or found.startswith("NULL value in ") else found


# --- archives. Each is written in parts, that can be read one by one: to begin after `size` bytes
# leaves all before them as it is.


class Output(io.FileIO):
    """A file that raises BackupError if it cannot be written: any other error is of the source."""

    reserve = 0

    def write(self, data: Any) -> int:
        try:
            disk = os.fstatvfs(self.fileno())
            if disk.f_bavail * disk.f_frsize < self.reserve:
                raise OSError(errno.ENOSPC, "the disk is full but for min_free_mib")
            return super().write(data) or 0
        except OSError as error:
            folder = os.path.dirname(os.path.dirname(os.fsdecode(self.name)))
            raise BackupError(f"{folder}: {error.strerror}") from None


def open_at(path: str, size: int, reserve: int) -> io.BufferedRandom:
    """Open a file of ours behind its first ``size`` bytes, and cut off what follows."""
    output = Output(path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o600))
    output.reserve = reserve
    output.truncate(size)
    file = io.BufferedRandom(output, CHUNK)
    file.seek(size)
    return file


def ended(file: io.BufferedRandom) -> int:
    """Put a file onto the disk, close it, and return its size."""
    with file:
        file.flush()
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


class TarGz:
    """A tar whose parts are gzip files of their own: one behind the other they are one again."""

    has_links = True

    def __init__(self, file: io.BufferedRandom) -> None:
        self._file = file
        self._gzip = gzip.GzipFile("", "wb", 6, file, 0)
        self._tar = tarfile.TarFile(
            mode="w", fileobj=self._gzip, format=tarfile.PAX_FORMAT, encoding="utf-8"
        )
        self._tar.copybufsize = CHUNK  # type: ignore[attr-defined]

    def add(self, member: tarfile.TarInfo, content: Content | None) -> None:
        self._tar.addfile(member, content if member.isreg() else None)
        self._tar.members.clear()  # type: ignore[attr-defined] # a million files fill the memory

    def close(self, *, last: bool) -> int:
        """End the part, and return the size up to there."""
        with contextlib.closing(self._file), contextlib.closing(self._gzip):
            if last:
                self._tar.close()  # writes the mark that ends a tar
            self._gzip.close()
            return ended(self._file)

    @staticmethod
    def members(path: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
        with (
            gzip.open(path) as file,
            tarfile.open(fileobj=file, mode="r|", encoding="utf-8") as tar,
        ):
            while (member := tar.next()) is not None:
                yield member, (member.isreg() and tar.extractfile(member)) or EMPTY
                tar.members.clear()  # type: ignore[attr-defined]
            while file.read(CHUNK):  # its checksum stands at its end
                pass


class Zip:
    """A zip. Each part ends with a directory of all so far; the last of these is what counts."""

    has_links = False

    def __init__(self, file: io.BufferedRandom) -> None:
        self._file = file
        size = file.tell()
        self._zip = zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED)
        self._zip.start_dir = size  # the directory that is there stays, in case of a kill

    def add(self, member: tarfile.TarInfo, content: Content | None) -> None:
        source = content or io.BytesIO(os.fsencode(member.linkname))
        with self._zip.open(zip_info(member), "w") as file:
            shutil.copyfileobj(source, file, CHUNK)

    def close(self, *, last: bool) -> int:  # noqa: ARG002 - each end is as good as the last
        """End the part, and return the size up to there."""
        with contextlib.closing(self._file):
            self._zip.close()
            return ended(self._file)

    @staticmethod
    def members(path: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as content:
                    yield tar_info(info, content), content


def zip_info(member: tarfile.TarInfo) -> zipfile.ZipInfo:
    made = time.localtime(min(max(member.mtime, 315619200), 4354732800))[:6]  # 1980 to 2107
    info = zipfile.ZipInfo(member.name + "/" * member.isdir(), made)
    kind = next(kind for kind, type_ in KINDS.items() if type_ == member.type)
    info.external_attr = (kind | member.mode) << 16
    info.external_attr |= 0x10 * member.isdir()  # what MS-DOS calls a folder
    info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, member.size
    return info


def tar_info(info: zipfile.ZipInfo, content: IO[bytes]) -> tarfile.TarInfo:
    mode = info.external_attr >> 16
    member = tarfile.TarInfo(info.filename.rstrip("/"))
    member.type = KINDS.get(stat.S_IFMT(mode), tarfile.REGTYPE)
    member.mode, member.mtime = stat.S_IMODE(mode), int(time.mktime((*info.date_time, 0, 0, -1)))
    if member.issym():
        member.linkname = os.fsdecode(content.read())
    member.size = info.file_size if member.isreg() else 0
    return member


FORMATS: dict[str, type[TarGz | Zip]] = {"tar.gz": TarGz, "zip": Zip}


# --- verify, and give the archive its name


def verify(cursor: Cursor, kind: type[TarGz | Zip]) -> None:
    """Read the archive back from the disk; what it holds stands beside its checksums."""
    path, found = cursor.path("packed"), 0
    try:
        with open(path, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for _, content in kind.members(path):
            found += 1
            while content.read(CHUNK):
                pass
    except Exception as error:
        raise BackupError(f"{path}: cannot be read back ({error}); is the disk sound?") from error
    if found != cursor.members:
        raise BackupError(f"{path}: has {found} of {cursor.members} members; is the disk sound?")


def publish(cursor: Cursor, options: Options) -> None:
    """Give an archive that is whole its name."""
    os.rename(cursor.path("packed"), os.path.join(options.target, cursor.published(options.format)))
    fd = os.open(options.target, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- rotate


class Archive(NamedTuple):
    """An archive in the target. Sorted, those that are better to keep come last."""

    complete: bool
    made: datetime
    file: str


PERIODS = (
    ("keep_daily", "%Y-%m-%d"),
    ("keep_weekly", "%G-%V"),
    ("keep_monthly", "%Y-%m"),
    ("keep_yearly", "%Y"),
)


def rotate(name: str, archive: str, options: Options) -> int:
    """Remove what need not be kept, but never the archive just made; return how many."""
    (newest,) = archives_of(name, [archive])
    archives = archives_of(name, os.listdir(options.target))
    # what seems to be made later shows that the clock went wrong, and nobody knows its age
    future = newest.made + timedelta(days=1)
    archives = [found for found in archives if found.made < future]
    stay = {archive, *(kept.file for kept in to_keep(archives, options))}
    old = [found.file for found in archives if found.file not in stay]
    for file in old:
        try:
            os.unlink(os.path.join(options.target, file))
        except OSError as error:
            text = f"{archive} is made, but {file} cannot be removed: {error.strerror}"
            raise BackupError(text) from None
        print(f"{file}: removed")
    return len(old)


def archives_of(name: str, files: Iterable[str]) -> list[Archive]:
    form = re.compile(
        re.escape(name) + r"-([0-9]{8}T[0-9]{6})Z(\.incomplete)?\.(tar\.gz|zip)", re.ASCII
    )
    found = []
    for match in filter(None, map(form.fullmatch, files)):
        with contextlib.suppress(ValueError):  # no time, so not ours
            made = datetime.strptime(match[1], "%Y%m%dT%H%M%S").replace(tzinfo=timezone.utc)
            found.append(Archive(not match[2], made, match[0]))
    return found


def to_keep(archives: list[Archive], options: Options) -> set[Archive]:
    """Return what stays: the last ones, the last complete one, and one of each period.

    That is the newest of its period, but one that is incomplete only if there is no other."""
    by_time = sorted(archives, key=lambda archive: archive.made)
    keep = {*by_time[-options.keep_last :], *sorted(archives)[-1:]}
    for key, form in PERIODS:
        best = {archive.made.strftime(form): archive for archive in sorted(archives)}
        number = getattr(options, key)
        keep.update(best[period] for period in sorted(best)[-number or len(best) :])
    return keep


# --- restore


FATAL = (None, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def restore(archive: str, folder: str) -> int:
    """Unpack into a new folder; return how many members were left out."""
    kinds = [kind for suffix, kind in FORMATS.items() if archive.endswith(f".{suffix}")]
    if not kinds:
        raise BackupError("is no archive, by its name; .tar.gz and .zip can be read")
    os.mkdir(folder, 0o700)
    left_out = 0
    for member, content in kinds[0].members(archive):
        try:
            unpack(member, content, folder)
        except (getattr(tarfile, "FilterError", OSError), OSError) as error:
            if getattr(error, "errno", 0) in FATAL:
                raise
            reason = getattr(error, "strerror", type(error).__name__)
            link = f" -> {shown(member.linkname)}" if member.linkname else ""
            print(f"left out: {shown(member.name)}{link} ({reason})", file=sys.stderr)
            left_out += 1
    return left_out


def data_filter(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Do what tarfile's own does, which Pythons before 3.9.17, 3.10.12 and 3.11.4 do not have."""
    name = member.name.lstrip("/")
    refuse_outside(folder, name, "OutsideDestinationError")
    if member.islnk() or member.issym():
        if os.path.isabs(member.linkname):
            raise OSError(errno.EPERM, "AbsoluteLinkError")
        beside = os.path.dirname(name) if member.issym() else ""
        target = os.path.join(beside, member.linkname)
        refuse_outside(folder, target, "LinkOutsideDestinationError")
    elif not (member.isreg() or member.isdir()):
        raise OSError(errno.EPERM, "SpecialFileError")
    runs = 0o755 if member.mode & 0o100 else 0o644
    member.name, member.mode = name, member.mode & runs | 0o600
    return member


def refuse_outside(folder: str, name: str, reason: str) -> None:
    if not lies_in(os.path.realpath(os.path.join(folder, name)), os.path.realpath(folder)):
        raise OSError(errno.EPERM, reason)


def unpack(member: tarfile.TarInfo, content: IO[bytes], folder: str) -> None:
    """Put one member into the folder; the filter raises if it, or what it links to, is outside."""
    safe = getattr(tarfile, "data_filter", data_filter)(member, folder)
    path = os.path.join(folder, safe.name)
    refuse_links(folder, safe.name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if safe.isdir():
        os.makedirs(path, exist_ok=True)
    elif safe.issym():
        os.symlink(safe.linkname, path)
    elif safe.islnk():
        refuse_links(folder, safe.linkname)
        os.link(os.path.join(folder, safe.linkname), path, follow_symlinks=False)
    else:
        with open(path, "xb") as file:  # never through a link that is there
            shutil.copyfileobj(content, file, CHUNK)
        os.chmod(path, safe.mode or 0o600)
        os.utime(path, (safe.mtime, safe.mtime))


def refuse_links(folder: str, name: str) -> None:
    """A backup has nothing behind a link. So no link, whatever the filter says of it, leads out."""
    while name := os.path.dirname(name):
        if os.path.islink(os.path.join(folder, name)):
            raise OSError(errno.ENOTDIR, "lies behind a link")


def main(words: list[str]) -> int:
    if len(words) != 3 or words[0] != "restore":
        print("usage: python3 backup.py restore ARCHIVE FOLDER", file=sys.stderr)
        return 64
    os.umask(0o077)
    try:
        left_out = restore(*words[1:])
    except Exception as error:  # noqa: BLE001 - a damaged archive may raise anything
        print(f"{words[1]}: {error}", file=sys.stderr)
        return 1
    print(f"{words[2]}: restored, {left_out} left out")
    return int(left_out > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
