# /// script
# [tool.bgtasks]
# description = "Remove files that are too old, too many, or take too much space"
# schedule = "every 1 h"
# timeout = "2 h"
#
# [tool.bgtasks.options]
# folder = ""            # /srv/app/uploads/unfinished
# patterns = ["*"]       # names of the files; one that begins with a dot needs a pattern that does
# recursive = false      # also in the folders below
# older_than = ""        # "30 d", "12 h" or "90 min" since a file was last written
# keep_files = 0         # only the newest so many stay; 0: any number
# keep_mb = 0            # only the newest that take so many MB together stay; 0: any size
# dry_run = false        # true: say what would be removed, and remove nothing
# ///
"""Purge a folder of garbage: copy or link this file into tasks.d, and set the options.

A file goes if any of the three limits says so. Only plain files go: links, folders, sockets and the
like stay. No link is followed, also none that takes the place of a folder while this runs, and
nothing is entered that is mounted, or hidden. A file that was written to since it was looked at
stays.

Folders are refused where a mistake would be a disaster: the system's, homes and what contains them,
mount points, and those of this installation.

Files are removed while the folder is read, so a run that is cut short or killed has done its part,
and a folder of any size needs little memory: it remembers only what keep_files and keep_mb keep.
"""

from __future__ import annotations

import errno
import heapq
import os
import pwd
import random
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Callable, NamedTuple

# nothing follows a link; what is opened is a folder
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
PASSED = FOLDER | getattr(os, "O_PATH", os.O_RDONLY)  # one on the way may be closed to readers
MOUNTS = "/proc/self/mountinfo"
SECONDS = {"min": 60, "h": 3600, "d": 86400}
# these with all that is in them
SYSTEM = """
/bin /boot /dev /etc /lib /lib32 /lib64 /libx32 /proc /run /sbin /sys /usr /Applications /Library
/System
""".split()
# and these with what is right in them, such as /var/log
SHARED = "/ /home /var /var/lib /var/spool /Users /private/var".split()


def run(task: Any) -> str | None:
    options = read_options(task.options)
    folder = os.path.realpath(options.folder)
    program = sys.modules[type(task).__module__].__file__ or ""
    why = why_not(folder, (os.getcwd(), task.state_dir), (program, __file__, sys.prefix))
    if why:
        raise ValueError(f"options.folder: {folder} {why}; name a folder of nothing but garbage")
    with opened_from("/", folder.split("/")[1:]) as root:
        purge = Purge(task, options._replace(folder=folder), root)
        for file in task.each(garbage(purge.files(), options, time.time())):
            purge.remove(file)
    return purge.result()


class File(NamedTuple):
    """A plain file as it was found; the oldest is the smallest."""

    changed: int  # nanoseconds
    size: int
    folders: tuple[str, ...]  # from the root of the purge down
    name: str
    inode: int


def garbage(files: Iterable[File], options: Options, now: float) -> Iterator[File]:
    """Yield what goes, as soon as it is certain: whatever else is found, there are newer ones."""
    seconds = read_seconds(options.older_than)
    limit = File(int((now - seconds) * 1e9) if seconds else -sys.maxsize, 0, (), "", 0)
    kept: list[File] = []
    size = 0
    for file in files:
        if file < limit:
            yield file
        elif options.keep_files or options.keep_mb:
            heapq.heappush(kept, file)
            size += file.size
            while is_too_much(len(kept), size, options):
                limit = heapq.heappop(kept)  # what is older goes too, in whatever order it is found
                size -= limit.size
                yield limit


def is_too_much(count: int, size: int, options: Options) -> bool:
    """Tell whether the oldest must go; the newest file stays, however large it is."""
    too_many = 0 < options.keep_files < count
    return too_many or (count > 1 and 0 < options.keep_mb * 1_000_000 < size)


# --- the folder: every name is looked up in a folder that is open, so that nothing can be swapped


@contextmanager
def opened_from(start: str | int, folders: Iterable[str]) -> Iterator[int]:
    """Open a folder below another step by step, so that none of them is a link."""
    fd = os.open(start, PASSED) if isinstance(start, str) else os.dup(start)
    try:
        for name, flags in [*((name, PASSED) for name in folders), (".", FOLDER)]:
            above, fd = fd, os.open(name, flags, dir_fd=fd)
            os.close(above)
        yield fd
    finally:
        os.close(fd)


class Purge:
    """One pass over a folder, and what it came to."""

    def __init__(self, task: Any, options: Options, root: int) -> None:
        self._task, self._options, self._root = task, options, root
        self._device, self._mounted = os.fstat(root).st_dev, mounted()
        self._below: list[tuple[str, ...]] = []
        self._count = self._size = self._problems = 0
        self._last_problem = ""

    def files(self) -> Iterator[File]:
        """Yield the files with the right names, until the deadline.

        Folders come in any order: a tree that takes longer than one run is treated in some."""
        self._below = [()]
        while self._below and not self._task.should_stop:
            folders = self._below.pop(random.randrange(len(self._below)))  # noqa: S311 - no secret
            try:
                with opened_from(self._root, folders) as fd, os.scandir(fd) as entries:
                    yield from self._look_at(entries, folders)
            except FileNotFoundError:  # somebody else has removed it meanwhile
                pass
            except OSError as error:
                self._note(folders, error)

    def _look_at(
        self, entries: Iterable[os.DirEntry[str]], folders: tuple[str, ...]
    ) -> Iterator[File]:
        for entry in entries:
            if self._task.should_stop:
                return
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            name = entry.name
            if stat.S_ISDIR(found.st_mode) and self._enters((*folders, name), found.st_dev):
                self._below.append((*folders, name))
            elif stat.S_ISREG(found.st_mode) and is_wanted(name, self._options.patterns):
                yield File(found.st_mtime_ns, found.st_size, folders, name, found.st_ino)

    def _enters(self, path: tuple[str, ...], device: int) -> bool:
        if not self._options.recursive or path[-1][0] == "." or device != self._device:
            return False
        return os.path.join(self._options.folder, *path) not in self._mounted

    def remove(self, file: File) -> None:
        path = (*file.folders, file.name)
        try:
            with opened_from(self._root, file.folders) as fd:
                if not self._is_there(file, fd):
                    return
                if not self._options.dry_run:
                    os.unlink(file.name, dir_fd=fd)
                elif not may_remove(file.name, fd):
                    raise PermissionError(errno.EACCES, "Permission denied")
        except FileNotFoundError:
            return
        except OSError as error:
            self._note(path, error)
            return
        print("would remove" if self._options.dry_run else "removed", shown(path))
        self._count += 1
        self._size += file.size
        self._report(least=100)

    def _report(self, least: int) -> None:
        """Count what was removed; not each file, of which there may be a million."""
        uncounted = self._count - self._task.volume
        if uncounted >= least and not self._options.dry_run:
            self._task.add_volume(uncounted)

    def _is_there(self, file: File, fd: int) -> bool:
        """Tell whether it is the same file, and nobody wrote to it since it was found."""
        found = os.stat(file.name, dir_fd=fd, follow_symlinks=False)
        return (found.st_ino, found.st_mtime_ns) == (file.inode, file.changed)

    def _note(self, path: tuple[str, ...], error: OSError) -> None:
        self._problems += 1
        self._last_problem = f"{shown(path)}: {error.strerror}"
        print(self._last_problem)

    def result(self) -> str | None:
        self._report(least=1)
        done = "would be removed" if self._options.dry_run else "removed"
        text = f"{self._count} files with {self._size / 1e6:.1f} MB {done}"
        if self._problems:
            raise OSError(f"{text}; {self._problems} problems, the last: {self._last_problem}")
        self._task.message = text
        if self._task.should_stop:
            return self._task.MORE
        return text if self._count else self._task.NOTHING


def may_remove(name: str, fd: int) -> bool:
    """Tell whether a file of a folder could be removed; from a sticky one, only by its owner."""
    folder, file = os.fstat(fd), os.stat(name, dir_fd=fd, follow_symlinks=False)
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, file.st_uid, folder.st_uid):
        return False
    return os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True)


def is_wanted(name: str, patterns: Iterable[str]) -> bool:
    """As in a shell, a name that begins with a dot is hidden: an .htaccess may guard the folder."""
    return any(
        fnmatchcase(name, pattern) and (name[0] != "." or pattern[0] == ".") for pattern in patterns
    )


def shown(path: tuple[str, ...]) -> str:
    """Return a path in quotes; a name may hold anything, also the end of a line."""
    return repr("/".join(path) or ".")


# --- folders that are refused


def why_not(folder: str, data: Iterable[str], code: Iterable[str]) -> str:
    """Return why a folder without links in its path must not be purged, or nothing."""
    if folder == "/" or any(same(os.path.dirname(folder), shared) for shared in SHARED):
        return "belongs to the system"
    if any(same(above, system) for above in folders_of(folder) for system in SYSTEM):
        return "belongs to the system"
    if any(is_in(home, folder) for home in homes()):
        return "is a home, or contains one"
    data = [os.path.realpath(path) for path in data]
    if any(is_in(folder, own) for own in data):
        return "belongs to this installation"
    if any(is_in(own, folder) for own in (*data, *map(os.path.realpath, code))):
        return "contains parts of this installation"
    if os.path.ismount(folder) or folder in mounted():
        return "is where a file system is mounted"
    return ""


def is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def folders_of(path: str) -> Iterator[str]:
    """Yield a path and all folders above it, but not the root."""
    while path != "/":
        yield path
        path = os.path.dirname(path)


def same(folder: str, other: str) -> bool:
    """Tell whether two paths are one folder: by a mount, or where /ETC is /etc, names differ."""
    try:
        return os.path.samefile(folder, other)
    except OSError:
        return folder == other


def homes() -> set[str]:
    """Return all homes without asking for each: that might mount it."""
    paths = {os.path.expanduser("~"), *(user.pw_dir for user in pwd.getpwall())}
    parents = {os.path.dirname(path) for path in paths}
    real = {parent: os.path.realpath(parent) for parent in parents}
    return {os.path.join(real[os.path.dirname(path)], os.path.basename(path)) for path in paths} | {
        os.path.realpath(os.path.expanduser("~"))
    }


def mounted() -> set[str]:
    """Return what Linux knows of mounts; one of a folder beside it shows in no other way."""
    try:
        with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
            points = [line.split()[4] for line in file]
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), p) for p in points}


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    folder: str = ""
    patterns: tuple[str, ...] = ("*",)
    recursive: bool = False
    older_than: str = ""
    keep_files: int = 0
    keep_mb: int = 0
    dry_run: bool = False


def read_seconds(text: str) -> int:
    """Return the seconds of a time such as "30 d"; 0 if it is none."""
    found = re.fullmatch("([0-9]{1,6}) ?(min|h|d)", text)
    return int(found[1]) * SECONDS[found[2]] if found else 0


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    ("folder", lambda o: o.folder, "is empty; name the folder to purge"),
    ("folder", lambda o: os.path.isabs(o.folder), "must be a path from the root on"),
    ("folder", lambda o: os.path.isdir(o.folder), "is no folder; mend the path"),
    ("patterns", lambda o: o.patterns and all(o.patterns), 'is empty; set it to ["*"]'),
    (
        "patterns",
        lambda o: not any("/" in pattern for pattern in o.patterns),
        "must be names of files, without /; set recursive = true for the folders below",
    ),
    (
        "older_than",
        lambda o: not o.older_than or read_seconds(o.older_than),
        'must be a time such as "30 d", "12 h" or "90 min"',
    ),
    (
        "older_than",
        lambda o: o.older_than or o.keep_files or o.keep_mb,
        "is empty, and so nothing says what goes; set it, keep_files or keep_mb",
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
