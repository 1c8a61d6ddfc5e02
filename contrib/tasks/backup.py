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

A backup first notes what there is, then packs that in parts, reads each part back, and only then
gives the archive its name. Each of these goes on in the next run if the deadline comes or the task
is killed; what is unfinished lies in the folder .TASK.unfinished of the target. If the disk gets
full, or reads back something else, that is removed, and archives that are there stay untouched.

What cannot be read lets the run fail at its end; the rest is kept, as TASK-TIME.incomplete.tar.gz.
A file that begins as a SQLite database does is copied through SQLite, so the copy is whole while
others write to it. Symbolic links are stored, not followed, but for the paths themselves. Sockets,
pipes and devices are left out. Not stored: extended attributes and ACLs; hard links in a zip.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import functools
import grp
import gzip
import hashlib
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
from datetime import datetime, timezone
from typing import Any, BinaryIO, Callable, NamedTuple
from urllib.parse import quote

PART_SECONDS = 60.0  # what a kill may cost
PART_FILES = 100_000  # their names are kept in memory until the part ends
LATE_SECONDS = 86400.0  # an archive that nobody worked at for so long is begun anew
LOCKED_SECONDS = 60.0  # how long a database may be locked
SMALL_BYTES = 8 << 20  # a file up to this size is taken at one moment
CHUNK = 1 << 18
PAGES, MOST_RESTARTS = 2000, 3
SAMPLES = 200
DATABASE = b"SQLite format 3\0"
BESIDE_DATABASE = re.compile("(.*)-(wal|shm|journal)", re.DOTALL)
SPECIAL = {stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe"}
TYPES = {str: "text in quotes", int: "a whole number", tuple: "a list of texts"}

Entry = (
    tuple  # name, kind, size and digest of what was packed, and what later files must know of it
)


class BackupError(Exception):
    """The run fails; its text is for people."""


def run(task: Any) -> str | None:
    options = read_options(task.options)
    try:
        with workplace(options.target, task.name) as folder:
            cursor = made(task, folder, options)
            if cursor is None:
                return task.MORE
            archive = publish(cursor, options)
            discard(task.state, folder)
    except OSError as error:
        raise BackupError(refusal(options.target, error)) from error
    return finish(task, archive, cursor, options)


def made(task: Any, folder: str, options: Options) -> Cursor | None:
    """Make the archive, or go on with it; return None if the deadline came."""
    try:
        cursor = went_before(task, folder, options) or begin(task, folder, options)
        cursor = pack(task, cursor, options)
        if cursor.packed < cursor.files:
            return None
        cursor = verify(task, cursor, FORMATS[options.format])
    except Exception:
        discard(task.state, folder)
        raise
    return cursor if cursor.checked == cursor.parts else None


def refusal(target: str, error: OSError) -> str:
    return f"{target}: {error.strerror or error}"


def finish(task: Any, archive: str, cursor: Cursor, options: Options) -> str:
    removed = rotate(task.name, archive, options)
    if cursor.problems:
        text = f"{archive} is incomplete, {cursor.problems} could not be read; the last: "
        raise BackupError(text + cursor.problem)
    what = f"{archive}: {cursor.files} files and folders, {readable(cursor.size)}"
    changed = f", {cursor.changed} changed while they were read" if cursor.changed else ""
    return f"{what}{changed}; {removed} older removed"


def shown(path: str) -> str:
    """Return a path as it can be printed."""
    return path if path.isprintable() else ascii(path)


def readable(size: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{size:.0f} B"


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


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    ("paths", lambda o: o.paths, 'is empty; name what to back up, such as ["/srv/app"]'),
    ("paths", lambda o: all(map(os.path.isabs, o.paths)), "must be paths from the root on"),
    (
        "paths",
        lambda o: "/" not in map(os.path.realpath, o.paths),
        "must not be /, which holds the files of the kernel; name the folders in it",
    ),
    ("target", lambda o: o.target, "is empty; name the folder for the archives"),
    ("target", lambda o: os.path.isabs(o.target), "must be a path from the root on"),
    (
        "target",
        lambda o: os.path.isdir(o.target),
        "is no folder; mount its disk, or make it with mkdir -m 700",
    ),
    (
        "target",
        lambda o: os.access(o.target, os.W_OK | os.X_OK),
        "cannot be written to; give it to the user who runs this",
    ),
    (
        "target",
        lambda o: not any(lies_in(path, o.target) for path in o.paths),
        "must not hold what is backed up; name another folder",
    ),
    ("format", lambda o: o.format in FORMATS, 'must be "tar.gz" or "zip"'),
    ("keep_last", lambda o: o.keep_last > 0, "must be at least 1"),
)


def lies_in(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def read_options(given: dict[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    options = Options(**{key: read_option(key, value) for key, value in given.items()})
    for key, holds, rule in RULES:
        if not holds(options):
            raise ValueError(f"options.{key}: {rule}")
    return options


def read_option(key: str, value: Any) -> Any:
    """Return a value as the type of its default: what a .toml leaves out is set as text."""
    if key not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    kind = type(Options._field_defaults[key])
    if kind is int and isinstance(value, str) and re.fullmatch("[0-9]+", value):
        value = int(value)
    elif kind is tuple and isinstance(value, str):
        value = tuple(re.split(r"\s*,\s*", value))
    elif isinstance(value, list):
        value = tuple(value)
    texts = value if kind is tuple else ()
    if type(value) is not kind or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if kind is int and value < 0:
        raise ValueError(f"options.{key}: must not be negative")
    return value


# --- the folder of what is unfinished, and how far it is


class Cursor(NamedTuple):
    """How far an archive is. What its files hold beyond that does not count."""

    folder: str
    archive: str  # its name, without what comes behind the time
    wanted: str  # the options that it was begun with
    at: float  # when somebody last worked at it
    files: int
    packed: int = 0
    size: int = 0  # bytes of the archive
    journal: int = 0  # and of its journal
    parts: int = 0
    checked: int = 0
    problems: int = 0
    problem: str = ""
    changed: int = 0


@contextlib.contextmanager
def workplace(target: str, name: str) -> Iterator[str]:
    """Hold the folder for what is unfinished; two installations may have one target."""
    folder = os.path.join(target, f".{name}.unfinished")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise BackupError(f"{folder}: is not a folder of ours; remove it")
    with open(os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = "another one is at work there; give each installation a target of its own"
            raise BackupError(f"{folder}: {text}") from None
        except OSError as error:  # some network disks have no locks
            print(f"{folder}.lock: {error.strerror}")
        yield folder


def wanted(options: Options) -> str:
    what = (options.paths, options.target, options.exclude, options.format)
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def went_before(task: Any, folder: str, options: Options) -> Cursor | None:
    """Return the cursor of what an earlier run left unfinished, if that can be continued."""
    try:
        cursor = Cursor(**task.state["unfinished"])
    except (KeyError, TypeError):  # there is none, or it is of another version
        return None
    if (cursor.folder, cursor.wanted) != (folder, wanted(options)):
        discard(task.state, cursor.folder)
        return None
    fresh = time.time() - cursor.at < LATE_SECONDS
    return cursor if fresh and all(map(is_there, *unfinished_files(cursor))) else None


def unfinished_files(cursor: Cursor) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names = [os.path.join(cursor.folder, name) for name in ("list", "archive", "journal")]
    return tuple(names), (1, cursor.size, cursor.journal)


def is_there(path: str, size: int) -> bool:
    return (os.path.getsize(path) if os.path.exists(path) else 0) >= size


def save(task: Any, cursor: Cursor) -> Cursor:
    cursor = cursor._replace(at=time.time())
    task.state["unfinished"] = cursor._asdict()
    return cursor


def discard(state: dict[str, Any], folder: str) -> None:
    state.pop("unfinished", None)
    shutil.rmtree(folder, ignore_errors=True)


def begin(task: Any, folder: str, options: Options) -> Cursor:
    """Note what is to be packed, and look whether there is room for it."""
    discard(task.state, folder)
    os.mkdir(folder, 0o700)
    name = os.path.join(folder, "list")
    problems: list[str] = []
    files, total = 0, 0
    with open(name, "w", encoding="ascii") as file:
        for path, size in everything(options, problems):
            file.write(json.dumps([path, size]) + "\n")
            files, total = files + 1, total + size
    for problem in problems:
        print(problem)
    if not files:
        raise BackupError(f"there is nothing to back up; the last problem: {problems[-1]}")
    need = estimate(name, total) + 200 * files
    require_space(options.target, need, options)
    first = {"problems": len(problems), "problem": problems[-1] if problems else ""}
    archive = new_name(task.name, options)
    return save(task, Cursor(folder, archive, wanted(options), 0.0, files, **first))


def new_name(name: str, options: Options) -> str:
    now = int(time.time())
    while True:
        archive = name + time.strftime("-%Y%m%dT%H%M%SZ", time.gmtime(now))
        if not any(file.startswith(archive) for file in os.listdir(options.target)):
            return archive
        now += 1


def require_space(target: str, need: float, options: Options) -> None:
    disk = os.statvfs(target)
    free = disk.f_bavail * disk.f_frsize
    if free - need < options.min_free_mib << 20:
        text = f"this needs about {readable(need)} of the {readable(free)} that are free, and "
        text += f"{options.min_free_mib} MiB must stay free (min_free_mib); make room"
        raise BackupError(f"options.target: {target}: {text}")


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


def sample(path: str, at: int) -> bytes:
    try:
        with opened(path) as file:
            return os.pread(file.fileno(), 1 << 16, at)
    except OSError:  # is said when its turn comes
        return b""


def listed(name: str, first: int = 0) -> Iterator[tuple[str, int]]:
    with open(name, encoding="ascii") as file:
        for line in itertools.islice(file, first, None):
            path, size = json.loads(line)
            yield path, size


# --- what there is to pack


def everything(options: Options, problems: list[str]) -> Iterator[tuple[str, int]]:
    """Yield each path to pack and its size, in an order that is always the same."""
    roots = sorted({os.path.realpath(path) for path in options.paths})
    excluded = exclusion(options.exclude)
    target = os.path.realpath(options.target)
    for root in roots:
        if any(root != other and lies_in(root, other) for other in roots):
            continue
        found = False
        for path, status in walk(root, lambda path: path == target or excluded(path), problems):
            found = found or not stat.S_ISDIR(status.st_mode)
            yield path, status.st_size if stat.S_ISREG(status.st_mode) else 0
        if not found:
            problems.append(f"{shown(root)}: is not there, or holds no file; is its disk mounted?")


def walk(
    root: str, excluded: Callable[[str], object], problems: list[str]
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
                problems.append(f"{shown(path)}: {error.strerror}")


def exclusion(patterns: Iterable[str]) -> Callable[[str], object]:
    """Return what tells an excluded path: patterns with a slash are whole paths, others names."""
    alternatives = [
        ("" if "/" in pattern else "(?s:.*/)") + fnmatch.translate(pattern.rstrip("/"))
        for pattern in patterns
    ]
    return re.compile("|".join(alternatives) or r"(?!)").match


# --- pack


def pack(task: Any, cursor: Cursor, options: Options) -> Cursor:
    """Pack until all is packed or the deadline comes; each part counts when it is on the disk."""
    if cursor.packed == cursor.files:
        return cursor
    with contextlib.closing(Packer(task, cursor, options)) as packer:
        for path, _ in task.each(listed(os.path.join(cursor.folder, "list"), cursor.packed)):
            packer.add(path)
        packer.end_part()
        return packer.cursor


class Packer:
    """Adds paths to the archive, and notes in its journal what each part of it holds."""

    def __init__(self, task: Any, cursor: Cursor, options: Options) -> None:
        self.cursor, self._task, self._options = cursor, task, options
        self._reserve = options.min_free_mib << 20
        path = os.path.join(cursor.folder, "journal")
        self._journal = open_at(path, cursor.journal, self._reserve)
        self._known: dict[str, str] = {}  # by what later files must know of a member: its name
        for _, _, entries in journal(path):
            self._know(entries)
        self._begin_part()

    def close(self) -> None:
        if self._archive is not None:
            self._archive.abandon()
        self._journal.close()

    def _know(self, entries: Iterable[Entry]) -> None:
        self._known.update((key, name) for name, _, _, _, key in entries if key)

    def _begin_part(self) -> None:
        path = os.path.join(self.cursor.folder, "archive")
        kind = FORMATS[self._options.format]
        self._archive: TarGz | Zip | None = kind(path, self.cursor.size, self._reserve)
        self._entries: list[Entry] = []
        self._end = time.monotonic() + PART_SECONDS

    def end_part(self) -> None:
        last = self.cursor.packed == self.cursor.files
        size = self._archive.close(last=last)
        self._archive = None
        if self._entries or last:
            self._note(size)
        save(self._task, self.cursor)

    def _note(self, size: int) -> None:
        text = json.dumps([self.cursor.size, size, self._entries])
        self._journal.write(text.encode() + b"\n")
        sync(self._journal)
        self.cursor = self.cursor._replace(size=size, journal=self._journal.tell())
        self._count(parts=1)
        self._task.add_volume(len(self._entries))

    def add(self, path: str) -> None:
        self._entries += self._add(path)
        self._count(packed=1)
        if self.cursor.packed % 100 == 0:
            self._task.progress(self.cursor.packed, self.cursor.files)
        full = time.monotonic() > self._end or len(self._entries) >= PART_FILES
        if full and self.cursor.packed < self.cursor.files:
            self.end_part()
            self._begin_part()

    def _count(self, **more: int) -> None:
        have = self.cursor._asdict()
        self.cursor = self.cursor._replace(**{key: have[key] + more[key] for key in more})

    def _add(self, path: str) -> list[Entry]:
        """Add one path; return what was added."""
        entry = None
        try:
            entry = self._added(path, os.lstat(path))
        except FileNotFoundError:
            print(f"{shown(path)}: is gone meanwhile")
        except OSError as error:
            self._complain(path, str(error.strerror))
        if entry is not None:
            self._know([entry])
        return [] if entry is None else [entry]

    def _complain(self, path: str, what: str) -> None:
        text = f"{shown(path)}: {what}"
        print(text)
        self._count(problems=1)
        self.cursor = self.cursor._replace(problem=text[-500:])

    def _added(self, path: str, status: os.stat_result) -> Entry | None:
        kind = stat.S_IFMT(status.st_mode)
        member = member_of(path, status)
        if not self._archive.can_hold(member.name):
            self._complain(path, 'its name is not UTF-8, which only format = "tar.gz" can hold')
        elif kind == stat.S_IFREG:
            return None if self._is_in_a_copy(path) else self._added_file(path)
        elif kind == stat.S_IFDIR:
            return self._stored(member)
        elif kind == stat.S_IFLNK:
            member.linkname = os.readlink(path)
            return self._stored(member)
        else:
            print(f"{shown(path)}: left out, {SPECIAL.get(kind, 'a device')}")
        return None

    def _is_in_a_copy(self, path: str) -> bool:
        found = BESIDE_DATABASE.fullmatch(path)
        return found is not None and f"database {found[1]}" in self._known

    def _added_file(self, path: str) -> Entry:
        with opened(path) as file:
            if os.pread(file.fileno(), len(DATABASE), 0) == DATABASE and self._copied(path):
                return self._added_copy(path, os.fstat(file.fileno()))
            content = Content(file)
            key = link_key(content.status) if self._archive.has_links else ""
            member = member_of(path, content.status, content.size)
            if key in self._known:
                member.type, member.size, member.linkname = tarfile.LNKTYPE, 0, self._known[key]
                return self._stored(member)
            entry = self._stored(member, content)
            sound = self._look_at(path, content)
            return (*entry[:4], key if sound else "")

    def _look_at(self, path: str, content: Content) -> bool:
        """Tell whether a file was read as it is."""
        if content.error:
            self._complain(path, f"{content.error}; in the archive it ends with zeros")
        elif content.changed:
            print(f"{shown(path)}: changed while it was read")
            self._count(changed=1)
        return not (content.error or content.changed)

    def _copied(self, path: str) -> bool:
        """Copy a database to a place of ours; False if only its bare file can be had."""
        copy = os.path.join(self.cursor.folder, "copy")
        require_space(self._options.target, os.path.getsize(path), self._options)
        try:
            found = copy_database(path, copy)
        except sqlite3.Error as error:
            self._complain(path, f"SQLite cannot copy it ({error}); its bare file is packed")
            return False
        if found:
            self._complain(path, f"the database is damaged: {found}")
        return True

    def _added_copy(self, path: str, status: os.stat_result) -> Entry:
        copy = os.path.join(self.cursor.folder, "copy")
        with opened(copy) as file:
            content = Content(file)
            entry = self._stored(member_of(path, status, content.size), content)
        os.unlink(copy)
        return (*entry[:4], f"database {path}")

    def _stored(self, member: tarfile.TarInfo, content: Content | None = None) -> Entry:
        self._archive.add(member, content)
        return (*described(member, content.digest() if content else ""), "")


def described(member: tarfile.TarInfo, digest: str) -> Entry:
    """Return what must be equal when a member is read back."""
    return (member.name, member.type.decode(), member.size, digest or member.linkname)


def member_of(path: str, status: os.stat_result, size: int = 0) -> tarfile.TarInfo:
    types = {stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}
    member = tarfile.TarInfo(path.lstrip("/"))
    member.type = types.get(stat.S_IFMT(status.st_mode), tarfile.REGTYPE)
    member.mode, member.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
    member.uid, member.gid, member.size = status.st_uid, status.st_gid, size
    member.uname, member.gname = user_name(status.st_uid), group_name(status.st_gid)
    return member


@functools.cache
def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


@functools.cache
def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""


def link_key(status: os.stat_result) -> str:
    """Return what all names of a file have in common, while nobody changes it."""
    if status.st_nlink == 1:
        return ""
    return " ".join(map(str, (status.st_dev, status.st_ino, *version(status), status.st_ctime_ns)))


def version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def opened(path: str) -> BinaryIO:
    """Open a plain file; should somebody have put a pipe or a link there, neither waits."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    file = open(fd, "rb")  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "is no plain file any more")
    return file


class Content:
    """The bytes of a file: as many as it had when it was opened, whatever happens to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._fd, self._file = file.fileno(), file
        self.status = os.fstat(self._fd)
        if self.status.st_size <= SMALL_BYTES:
            self._take()
        self.size = self._left = self.status.st_size
        self._digest, self.error = hashlib.sha256(), ""

    def _take(self) -> None:
        """Read a small file at once, again if somebody wrote to it meanwhile."""
        for _ in range(3):
            self.status = os.fstat(self._fd)
            content = os.pread(self._fd, self.status.st_size, 0)
            if not self.changed and len(content) == self.status.st_size:
                break
        self._file = io.BytesIO(content)

    @property
    def changed(self) -> bool:
        return version(os.fstat(self._fd)) != version(self.status)

    def read(self, size: int = -1) -> bytes:
        """Return what is wanted, zeros in place of what is missing: its size is told already."""
        wanted = self._left if size < 0 else min(size, self._left)
        content = b"" if self.error else self._read(wanted)
        content = content.ljust(wanted, b"\0")
        self._left -= wanted
        self._digest.update(content)
        return content

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = str(error.strerror)
            return b""

    def digest(self) -> str:
        return self._digest.hexdigest()


# --- SQLite


class RestartedError(Exception):
    """Others write so often that copying in steps begins again and again."""


def copy_database(path: str, copy: str) -> str:
    """Copy a database while others use it; return what is wrong with it, if anything.

    First in steps, between which others can write. If they do, it begins again; after some times
    it is copied in one step. With a write-ahead log nobody has to wait for that one either."""
    try:
        return copied(path, copy, PAGES)
    except RestartedError:
        return copied(path, copy, -1)


def copied(path: str, copy: str, pages: int) -> str:
    for name in (copy, f"{copy}-wal", f"{copy}-shm", f"{copy}-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    uri = f"file:{quote(os.fsencode(path))}?mode=rw"
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(
            contextlib.closing(sqlite3.connect(uri, timeout=1.0, uri=True))
        )
        target = stack.enter_context(contextlib.closing(sqlite3.connect(copy)))
        source.backup(target, pages=pages, progress=patience(pages))
        return damage(target)


def patience(pages: int) -> Callable[[int, int, int], None]:
    """Return what watches a copy, and raises if it gets nowhere."""
    end, least, restarts = time.monotonic() + LOCKED_SECONDS, 1 << 62, 0

    def watch(status: int, remaining: int, _total: int) -> None:
        nonlocal end, least, restarts
        if status & 0xFF in (5, 6):  # SQLITE_BUSY and SQLITE_LOCKED have names only since 3.11
            if time.monotonic() > end:
                raise sqlite3.OperationalError(f"locked for {LOCKED_SECONDS:.0f} s")
            return
        restarts += remaining > least
        end, least = time.monotonic() + LOCKED_SECONDS, remaining
        if restarts > MOST_RESTARTS and pages > 0:
            raise RestartedError

    return watch


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

    reserve, failed = 0, False

    def write(self, data: Any) -> int:
        if self.failed:  # what is left in the buffers of others need not be said once more
            return len(data)
        try:
            disk = os.fstatvfs(self.fileno())
            if disk.f_bavail * disk.f_frsize < self.reserve:
                raise OSError(errno.ENOSPC, "the disk is full but for min_free_mib")
            return super().write(data) or 0
        except OSError as error:
            self.failed = True
            folder = os.path.dirname(os.path.dirname(os.fsdecode(self.name)))
            raise BackupError(refusal(folder, error)) from None


def open_at(path: str, size: int, reserve: int) -> io.BufferedRandom:
    """Open a file of ours behind its first ``size`` bytes, and cut off what follows."""
    output = Output(path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o600))
    output.reserve = reserve
    file = io.BufferedRandom(output, CHUNK)
    file.truncate(size)
    file.seek(size)
    return file


def sync(file: io.BufferedRandom) -> None:
    file.flush()
    os.fsync(file.fileno())


class TarGz:
    """A tar whose parts are gzip files of their own: one behind the other they are one again."""

    has_links = True

    def __init__(self, path: str, size: int, reserve: int) -> None:
        self._file = open_at(path, size, reserve)
        self._gzip = gzip.GzipFile("", "wb", 6, self._file, 0)
        self._tar = tarfile.TarFile(
            mode="w", fileobj=self._gzip, format=tarfile.PAX_FORMAT, encoding="utf-8"
        )
        self._tar.copybufsize = CHUNK

    def can_hold(self, _name: str) -> bool:
        return True

    def add(self, member: tarfile.TarInfo, content: Content | None) -> None:
        self._tar.addfile(member, content)
        self._tar.members.clear()  # else a million files would fill the memory

    def close(self, *, last: bool) -> int:
        """Put the part onto the disk, and return the size up to its end."""
        if last:
            self._tar.close()  # writes the mark that ends a tar
        self._gzip.close()
        sync(self._file)
        with self._file:
            return self._file.tell()

    def abandon(self) -> None:
        self._file.raw.failed = True  # what is left in buffers is written nowhere
        self._gzip.close()
        self._file.close()

    @staticmethod
    def members(path: str, start: int, end: int) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
        with open(path, "rb") as file:
            unpacked = gzip.GzipFile("", "rb", fileobj=Window(file, start, end))
            with tarfile.open(fileobj=unpacked, mode="r|", encoding="utf-8") as tar:
                while (member := tar.next()) is not None:
                    yield member, tar.extractfile(member) if member.isreg() else io.BytesIO()
                    tar.members.clear()
            while unpacked.read(CHUNK):  # its checksum stands at its end
                pass


class Window:
    """Some bytes of a file, as if there were no others."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        file.seek(start)
        self._file, self._left = file, end - start

    def read(self, size: int) -> bytes:
        found = self._file.read(min(size, self._left))
        self._left -= len(found)
        return found


class Zip:
    """A zip. Each part ends with a directory of all so far; the last of these is what counts."""

    has_links = False

    def __init__(self, path: str, size: int, reserve: int) -> None:
        self._file = open_at(path, size, reserve)
        self._zip = zipfile.ZipFile(self._file, "a", zipfile.ZIP_DEFLATED)
        self._zip.start_dir = size  # the directory that is there stays, in case of a kill

    def can_hold(self, name: str) -> bool:
        try:
            return bool(name.encode())
        except UnicodeEncodeError:
            return False

    def add(self, member: tarfile.TarInfo, content: Content | None) -> None:
        source = content or io.BytesIO(os.fsencode(member.linkname))
        with self._zip.open(zip_info(member), "w") as file:
            shutil.copyfileobj(source, file, CHUNK)

    def close(self, *, last: bool) -> int:  # noqa: ARG002 - each end is as good as the last
        """Put the part onto the disk, and return the size up to its end."""
        self._zip.close()
        sync(self._file)
        with self._file:
            return self._file.seek(0, os.SEEK_END)

    def abandon(self) -> None:
        self._file.raw.failed = True  # what is left in buffers is written nowhere
        self._zip.fp = None
        self._file.close()

    @staticmethod
    def members(path: str, start: int, end: int) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if start <= info.header_offset < end:
                    with archive.open(info) as content:
                        yield tar_info(info, content), content


def zip_info(member: tarfile.TarInfo) -> zipfile.ZipInfo:
    made = time.localtime(member.mtime)[:6]
    made = min(max(made, (1980, 1, 1, 0, 0, 0)), (2107, 12, 31, 23, 59, 59))
    info = zipfile.ZipInfo(member.name + "/" * member.isdir(), made)
    kinds = {tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK}
    info.external_attr = (kinds.get(member.type, stat.S_IFREG) | member.mode) << 16
    info.external_attr |= 0x10 * member.isdir()  # what MS-DOS calls a folder
    info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, member.size
    return info


def tar_info(info: zipfile.ZipInfo, content: BinaryIO) -> tarfile.TarInfo:
    mode = info.external_attr >> 16
    types = {stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}
    member = tarfile.TarInfo(info.filename.rstrip("/"))
    member.type = types.get(stat.S_IFMT(mode), tarfile.REGTYPE)
    member.mode, member.mtime = stat.S_IMODE(mode), int(time.mktime((*info.date_time, 0, 0, -1)))
    if member.issym():
        member.linkname = os.fsdecode(content.read())
    member.size = info.file_size if member.isreg() else 0
    return member


FORMATS: dict[str, type[TarGz | Zip]] = {"tar.gz": TarGz, "zip": Zip}


# --- verify, and give the archive its name


def journal(path: str) -> Iterator[tuple[int, int, list[Entry]]]:
    with open(path, encoding="ascii") as file:
        for line in file:
            start, end, entries = json.loads(line)
            yield start, end, [tuple(entry) for entry in entries]


def verify(task: Any, cursor: Cursor, kind: type[TarGz | Zip]) -> Cursor:
    """Read the archive back, and compare each member with what was packed."""
    parts = journal(os.path.join(cursor.folder, "journal"))
    for start, end, entries in task.each(itertools.islice(parts, cursor.checked, None)):
        found = read_back(kind, os.path.join(cursor.folder, "archive"), start, end)
        if found != [entry[:4] for entry in entries]:
            raise BackupError(f"{cursor.archive}: reads back differently; is the disk sound?")
        cursor = save(task, cursor._replace(checked=cursor.checked + 1))
    return cursor


def read_back(kind: type[TarGz | Zip], path: str, start: int, end: int) -> list[Entry]:
    forget_cached(path)
    found = []
    try:
        for member, content in kind.members(path, start, end):
            found.append(described(member, digest(content) if member.isreg() else ""))
    except Exception as error:
        raise BackupError(f"{path}: cannot be read back ({error}); is the disk sound?") from error
    return found


def forget_cached(path: str) -> None:
    """Let what is read come from the disk, where the system knows how."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digest(content: BinaryIO) -> str:
    found = hashlib.sha256()
    while data := content.read(CHUNK):
        found.update(data)
    return found.hexdigest()


def publish(cursor: Cursor, options: Options) -> str:
    """Give an archive that is whole its name, and return that."""
    unfinished = os.path.join(cursor.folder, "archive")
    archive = f"{cursor.archive}{'.incomplete' * bool(cursor.problems)}.{options.format}"
    if os.path.getsize(unfinished) != cursor.size:
        raise BackupError(f"{unfinished}: somebody else has changed it")
    os.rename(unfinished, os.path.join(options.target, archive))
    fd = os.open(options.target, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return archive


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
    archives = archives_of(name, os.listdir(options.target))
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


def restore(archive: str, folder: str) -> int:
    """Unpack into a new folder; return how many members were left out."""
    if not hasattr(tarfile, "data_filter"):
        raise BackupError("this Python cannot restore safely; update it: at least to 3.9.17")
    kinds = [kind for suffix, kind in FORMATS.items() if archive.endswith(f".{suffix}")]
    if not kinds:
        raise BackupError(f"{archive}: is no archive, by its name; .tar.gz and .zip can be read")
    size = os.path.getsize(archive)
    os.mkdir(folder, 0o700)
    left_out = 0
    for member, content in kinds[0].members(archive, 0, size):
        try:
            unpack(member, content, folder)
        except tarfile.FilterError as error:
            link = f" -> {shown(member.linkname)}" if member.issym() else ""
            print(f"left out: {shown(member.name)}{link} ({type(error).__name__})", file=sys.stderr)
            left_out += 1
    return left_out


def unpack(member: tarfile.TarInfo, content: BinaryIO, folder: str) -> None:
    """Put one member into the folder; the filter raises if it, or what it links to, is outside."""
    safe = tarfile.data_filter(member, folder)
    path = os.path.join(folder, safe.name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if safe.isdir():
        os.makedirs(path, exist_ok=True)
    elif safe.issym():
        os.symlink(safe.linkname, path)
    elif safe.islnk():
        os.link(os.path.join(folder, safe.linkname), path, follow_symlinks=False)
    else:
        with open(path, "xb") as file:  # never through a link that is there
            shutil.copyfileobj(content, file, CHUNK)
        os.chmod(path, safe.mode or 0o600)
        os.utime(path, (safe.mtime, safe.mtime))


def main(words: list[str]) -> int:
    if len(words) != 3 or words[0] != "restore":
        print("usage: python3 backup.py restore ARCHIVE FOLDER", file=sys.stderr)
        return 64
    os.umask(0o077)
    try:
        left_out = restore(*words[1:])
    except (
        OSError,
        EOFError,
        BackupError,
        zlib.error,
        tarfile.TarError,
        zipfile.BadZipFile,
    ) as error:
        print(f"{words[1]}: {error}", file=sys.stderr)
        return 1
    print(f"{words[2]}: restored, {left_out} left out")
    return int(left_out > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
