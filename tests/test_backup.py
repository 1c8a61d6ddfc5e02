"""The example task that backs up, with real files, databases, kills and limits of the kernel.

A kill at every second step, and more archives that are damaged:

BGTASKS_FULL=1 python -m pytest tests/test_backup.py
"""

import contextlib
import gzip
import importlib.util
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROGRAM, FakeClock, somebody_else, wait_for
from hypothesis import given
from hypothesis import strategies as some

import bgtasks

pytestmark = pytest.mark.unmeasured
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

FILE = PROGRAM.parent / "contrib" / "tasks" / "backup.py"
PAGE = (FILE.parent / "README.md").read_text()
SECTION = PAGE[PAGE.index("## backup.py") :].split("\n## ")[0]
FORMATS = ["tar.gz", "zip"]
FOREVER = 10**9
FULL = bool(os.environ.get("BGTASKS_FULL"))


def load():
    found = importlib.util.spec_from_file_location("backup", FILE)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


backup = load()


class Ticking(FakeClock):
    """Each look at it takes a second."""

    def monotonic(self):
        self.advance(1)
        return super().monotonic()


class Backup:
    """The task without the processes around it; its state lasts from run to run."""

    def __init__(self, folder, target=None):
        self.folder = folder
        self.source, self.target = folder / "source", target or folder / "target"
        self.source.mkdir(parents=True)
        self.target.mkdir(exist_ok=True)
        self.options = {"paths": [str(self.source)], "target": str(self.target), "min_free_mib": 0}
        self.state = {}

    def write(self, name, content="x"):
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def context(self, looks=FOREVER, **options):
        given = dict.fromkeys(("last_success", "maximum"))
        given.update(task="backup", run=1, slot=0.0, deadline=0.0, node="here", settings={})
        given.update(state_dir=str(self.folder), state=self.state)
        given["options"] = {**self.options, **options}
        clock = Ticking()
        live = str(self.folder / "live")
        task = bgtasks.Task("backup", "backup.py")
        brief = bgtasks.Brief(task, live, (0, ""), "", 0.0, clock.ticks + looks, {}, given)
        return bgtasks.TaskContext(brief, clock)

    def run(self, looks=FOREVER, **options):
        """Run until the clock was looked at so often; return what the task said."""
        context = self.context(looks, **options)
        try:
            return backup.run(context)
        finally:
            self.state = json.loads(json.dumps(context.state))
            self.volume = context.volume

    def whole(self, **options):
        """Run to the end, and return the archive that this made."""
        before = set(self.archives())
        self.said = self.run(**options)
        (made,) = set(self.archives()) - before
        return made

    def archives(self):
        return sorted(path for path in self.target.iterdir() if not path.name.startswith("."))

    @property
    def unfinished(self):
        return self.target / ".backup.unfinished"

    def restored(self, archive):
        """Restore as the page says; return the folder that has what was in the source."""
        folder = Path(f"{archive}.restored")
        self.restore = restore(archive, folder)
        (self.folder / "restored").mkdir(exist_ok=True)
        place = self.folder / "restored" / str(len(os.listdir(self.folder / "restored")))
        if folder.exists():
            folder.rename(place)
        return Path(f"{place}{self.source}")


def restore(archive, folder):
    """Follow the command of the page."""
    words = shell_lines("restore")[0].split()
    assert words[1:] == [
        "/srv/bgtasks/tasks.d/backup.py",
        "restore",
        "/mnt/backup/backup-20260131T023000Z.tar.gz",
        "/srv/restored",
    ]
    command = [sys.executable, str(FILE), words[2], str(archive), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def shell_lines(word):
    return [line.strip() for line in SECTION.splitlines() if line[:4] == "    " and word in line]


@pytest.fixture
def saved(tmp_path):
    return Backup(tmp_path)


def contents(folder):
    """Return all that lies in a folder: what it is, and what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        what = os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
        if isinstance(what, bytes) and what.startswith(b"SQLite format 3\0"):
            what = what[100:]  # before that stands who wrote it last
        found[os.fsencode(path.relative_to(folder))] = what
    return found


def names(archive):
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as found:
            return found.namelist()
    with tarfile.open(archive) as tar:
        return tar.getnames()


def fill(saved, count=12):
    """Make so many files in three folders."""
    for number in range(count):
        saved.write(f"{number % 3}/{number:03}", os.urandom(3000))


# -- what goes in comes out


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_restored_is_what_was_there(saved, form):
    for name in ("plain", "-rf", "new\nline", "l" * 255, "ümläut", "back\\slash", "a b/c d"):
        saved.write(name, f"this is {name}")
    saved.write("empty", "")
    saved.write("large", random.Random(1).randbytes(3 << 19))
    (saved.source / "no files").mkdir()
    (saved.source / "link").symlink_to("plain")
    (saved.source / "loop").symlink_to(".")
    (saved.source / "broken").symlink_to("nothing here")
    saved.write("script").chmod(0o750)
    os.utime(saved.source / "script", (1e9, 1e9))
    archive = saved.whole(format=form)
    assert archive.name.endswith(form)
    assert re.search(r"Z\.\S+: 16 files and folders, 1\.\d MiB; 0 older removed", saved.said)
    folder = saved.restored(archive)
    assert saved.restore.returncode == 0, saved.restore
    assert contents(folder) == contents(saved.source)
    status = (folder / "script").stat()
    assert (status.st_mode & 0o777, status.st_mtime) == (0o750, 1e9)
    assert saved.state == {}
    assert saved.volume == 16


def test_names_need_not_be_utf_8(saved):
    odd = os.fsencode(saved.source) + b"/\xff\xfe"
    with open(odd, "wb") as file:
        file.write(b"odd")
    Path(os.fsdecode(odd) + "2").symlink_to(os.fsdecode(b"\xfd"))
    archive = saved.whole()
    assert contents(saved.restored(archive)) == contents(saved.source)
    saved.write("other")
    with pytest.raises(backup.BackupError, match="2 could not be read; .*name is not UTF-8, which"):
        saved.run(format="zip")
    (incomplete,) = saved.target.glob("*.incomplete.zip")
    assert names(incomplete)[-1].endswith("/other")


def test_hard_links_are_one_file_again(saved):
    first = saved.write("a", "same")
    for name in ("b", "c"):
        os.link(first, saved.source / name)
    folder = saved.restored(saved.whole())
    assert len({os.stat(folder / name).st_ino for name in "abc"}) == 1
    assert contents(folder) == contents(saved.source)
    assert contents(saved.restored(saved.whole(format="zip"))) == contents(saved.source)


def test_holes_take_no_room_in_the_archive(saved):
    with open(saved.source / "sparse", "wb") as file:
        file.truncate(12 << 20)
        file.seek(6 << 20)
        file.write(b"data")
    archive = saved.whole()
    assert archive.stat().st_size < 1 << 16
    assert contents(saved.restored(archive)) == contents(saved.source)


def test_what_is_no_file_is_left_out_and_said(saved, capsys, monkeypatch):
    saved.write("file")
    os.mkfifo(saved.source / "pipe")
    monkeypatch.chdir(saved.source)  # the path of a socket must be short
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind("socket")
        archive = saved.whole()
    said = capsys.readouterr().out
    assert "/pipe: left out, it is a socket, a pipe or a device\n" in said
    assert "/socket: left out, it is a socket, a pipe or a device\n" in said
    assert [os.path.basename(name) for name in names(archive)] == ["source", "file"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_usual_programs_can_read_it(saved, form, monkeypatch):
    monkeypatch.setattr(backup, "PART_SECONDS", -1)  # many parts
    fill(saved)
    saved.write("äöü")
    archive = saved.whole(format=form)
    folder = saved.folder / "elsewhere"
    folder.mkdir()
    commands = [f"tar -xpzf {archive} -C {folder}", f"gzip -t {archive}"]
    if form == "zip":
        commands = [f"{sys.executable} -m zipfile -e {archive} {folder}"]
        commands += [f"unzip -tq {archive}"] if shutil.which("unzip") else []
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
    assert contents(Path(f"{folder}{saved.source}")) == contents(saved.source)


@pytest.mark.parametrize("form", FORMATS)
def test_nobody_else_can_read_an_archive_or_what_is_restored(saved, form):
    saved.write("secret")
    os.umask(0)
    archive = saved.whole(format=form)
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    restore(archive, saved.folder / "restored")
    assert stat.S_IMODE((saved.folder / "restored").stat().st_mode) == 0o700


def test_paths_are_followed_and_counted_once(saved):
    saved.write("file")
    link = saved.folder / "current"
    link.symlink_to(saved.source)
    paths = [str(link), str(saved.source), str(saved.source / "file")]
    assert len(names(saved.whole(paths=paths))) == 2


def test_the_target_is_not_backed_up(saved):
    saved.write("file")
    target = saved.source / "backups"
    target.mkdir()
    for _ in range(2):
        saved.run(target=str(target))
    first, second = target.glob("backup-*")
    assert names(first) == names(second) == [f"{saved.source}{file}"[1:] for file in ("", "/file")]


def test_what_is_excluded_may_be_named_by_a_link(saved):
    """As an application does that has its releases in folders, and a link to the current one."""
    for name in ("releases/1/log/x", "releases/1/app", "releases/1/shared"):
        saved.write(name)
    (saved.source / "current").symlink_to("releases/1")
    path = f"{saved.source}/current"
    found = names(saved.whole(paths=[path], exclude=[f"{path}/log/*", f"{path}/shared"]))
    assert [name.split("/releases/1")[1] for name in found] == ["", "/app", "/log"]


def test_what_is_excluded_is_not_there(saved):
    for name in ("keep", "a.tmp", "cache/x", "deep/cache/y", "deep/keep", "log/a", "log/b/c"):
        saved.write(name)
    exclude = ["*.tmp", "cache", f"{saved.source}/log/*", f"{saved.source}/nothing/"]
    found = [name.split("/source")[1] for name in names(saved.whole(exclude=exclude))]
    assert found == ["", "/deep", "/deep/keep", "/keep", "/log"]


# -- databases


def ledger(path, mode):
    """A database in which all amounts sum up to 0 whenever nobody is in the middle of something."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute(f"PRAGMA journal_mode = {mode}")
    database.execute("CREATE TABLE amount (id INTEGER PRIMARY KEY, value INTEGER, filler TEXT)")
    rows = [(number, 0, "x" * 500) for number in range(4000)]
    database.execute("BEGIN")
    database.executemany("INSERT INTO amount VALUES (?, ?, ?)", rows)
    database.execute("COMMIT")
    return database


def book(path, stopping, booked):
    """Move amounts between rows that lie far apart, until told to stop."""
    chance = random.Random(7)
    database = sqlite3.connect(path, isolation_level=None, timeout=120)
    database.execute("PRAGMA synchronous = OFF")
    while not stopping.is_set():
        a, b = chance.sample(range(4000), 2)
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE amount SET value = value + 1 WHERE id = ?", [a])
        database.execute("UPDATE amount SET value = value - 1 WHERE id = ?", [b])
        database.execute("COMMIT")
        booked.append(1)
    database.close()


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_database_is_whole_while_others_write_to_it(saved, mode, monkeypatch):
    monkeypatch.setattr(backup, "PAGES", 20)  # so that it begins again, as a large one does,
    monkeypatch.setattr(backup, "STEPS_SECONDS", 0.3)  # until that takes too long
    path = saved.source / "app.db"
    database = ledger(path, mode)
    stopping, booked = threading.Event(), []
    writer = threading.Thread(target=book, args=(path, stopping, booked))
    writer.start()
    try:
        wait_for(lambda: len(booked) > 20, 60)
        archive = saved.whole()
    finally:
        stopping.set()
        writer.join()
        database.close()
    assert "app.db-" not in " ".join(names(archive))
    with contextlib.closing(sqlite3.connect(saved.restored(archive) / "app.db")) as copy:
        assert copy.execute("SELECT count(*), sum(value) FROM amount").fetchone() == (4000, 0)
        assert copy.execute("SELECT sum(abs(value)) FROM amount").fetchone()[0] > 0
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_is_only_in_the_write_ahead_log_is_in_the_backup(saved):
    path = saved.source / "app.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = wal")
        database.execute("CREATE TABLE t (x)")
        database.execute("INSERT INTO t VALUES (1)")
        database.commit()
        assert (saved.source / "app.db-wal").exists()
        archive = saved.whole()
    assert names(archive)[1:] == [f"{path}"[1:]]
    with contextlib.closing(sqlite3.connect(saved.restored(archive) / "app.db")) as copy:
        assert copy.execute("SELECT x FROM t").fetchall() == [(1,)]


@pytest.mark.parametrize("damaged", [b"\xff" * 4096, b""])
def test_a_damaged_database_is_kept_and_said(saved, damaged):
    path = saved.source / "app.db"
    ledger(path, "delete").close()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + damaged + content[8192 if damaged else 1 << 20 :])
    with pytest.raises(backup.BackupError, match=r"app\.db: (the database is damaged|SQLite ca)"):
        saved.run()
    (archive,) = saved.archives()
    assert archive.name.endswith(".incomplete.tar.gz")
    assert len(names(archive)) == 2


def test_a_database_that_only_its_application_can_read_is_no_damage(saved):
    path = saved.source / "app.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.create_collation("mine", lambda a, b: (a > b) - (a < b))
        database.create_function("odd", 1, lambda x: x, deterministic=True)
        database.execute("CREATE TABLE t (x TEXT COLLATE mine, y, CHECK (odd(y) > 0))")
        database.execute("CREATE INDEX i ON t (x)")
        database.execute("INSERT INTO t VALUES ('a', 1), ('b', 2)")
        database.commit()
    with contextlib.closing(sqlite3.connect(saved.restored(saved.whole()) / "app.db")) as copy:
        assert copy.execute("SELECT y FROM t").fetchall() == [(1,), (2,)]


def test_a_database_that_stays_locked_is_packed_as_it_is_with_what_lies_beside(saved, monkeypatch):
    monkeypatch.setattr(backup, "LOCKED_SECONDS", 0)
    path = saved.source / "app.db"
    ledger(path, "delete").close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        database.execute("UPDATE amount SET value = 1")
        with pytest.raises(backup.BackupError, match="locked for 0 s.; its bare file is packed"):
            saved.run()
    found = [os.path.basename(name) for name in names(saved.archives()[0])]
    assert found == ["source", "app.db", "app.db-journal"]


# -- files that move


@pytest.mark.parametrize("change", ["shrinks", "grows"])
def test_a_file_keeps_the_size_that_was_told(saved, change):
    size = 1 << 20
    path = saved.write("log", b"x" * size)
    with open(path, "rb", buffering=0) as file:
        content = backup.Content(file)
        read = content.read(10)
        os.truncate(path, 100 if change == "shrinks" else 2 * size)
        while more := content.read(1 << 18):
            read += more
        assert backup.version(os.stat(path)) != backup.version(content.before)
    assert read[:10] == b"x" * 10
    assert len(read) == content.size == size
    assert read.endswith(b"\0" if change == "shrinks" else b"x")


def test_a_file_that_fails_in_the_middle_keeps_its_size_too(saved):
    path = saved.write("large", b"x" * (1 << 20))
    with open(os.open(path, os.O_WRONLY), "rb") as file:
        content = backup.Content(file)
        assert content.read() == bytes(content.size)
        assert content.error == "Bad file descriptor"


def test_a_file_that_changes_is_said_and_no_failure(saved, monkeypatch, capsys):
    path = saved.write("log", "one\n")
    taken = backup.Content.read

    def read(content, size=-1):
        with open(path, "a") as log:
            log.write("more\n")
        return taken(content, size)

    monkeypatch.setattr(backup.Content, "read", read)
    assert saved.restored(saved.whole()).joinpath("log").read_text() == "one\n"
    assert ", 1 changed while they were read; 0 older" in saved.said
    assert f"{path}: changed while it was read" in capsys.readouterr().out


def test_what_lies_behind_a_link_that_took_the_place_of_a_folder_is_not_packed(saved, capsys):
    for name in ("a/file", "b/file", "b/deep/file", "z"):
        saved.write(name, "ours")
    outside = saved.folder / "outside"
    (outside / "deep").mkdir(parents=True)
    for name in ("file", "deep/file"):
        (outside / name).write_text("theirs")
    assert saved.run(looks=1) == "more"
    for name in ("a", "b"):
        shutil.rmtree(saved.source / name)
    (saved.source / "a").symlink_to("../outside")
    (saved.source / "b").write_text("now a file")
    folder = saved.restored(saved.whole())
    assert capsys.readouterr().out.count("is gone meanwhile") == 4
    assert (folder / "b").read_text() == "now a file"
    assert sorted(os.listdir(folder)) == ["a", "b", "z"]
    assert os.readlink(folder / "a") == "../outside"
    assert saved.restore.returncode == 0


def test_files_that_go_between_listing_and_packing_are_no_failure(saved, capsys):
    fill(saved)
    assert saved.run(looks=1) == "more"
    (saved.source / "0" / "003").unlink()
    shutil.rmtree(saved.source / "2")
    archive = saved.whole()
    assert contents(saved.restored(archive)) == contents(saved.source)
    assert capsys.readouterr().out.count("is gone meanwhile") == 6


@contextlib.contextmanager
def somebody_who_cannot_read(saved):
    """Be somebody else, to whom modes mean something, and who may write to the target."""
    if os.geteuid() != 0:
        yield
        return
    saved.target.chmod(0o777)
    of_tests = ("pytest-", "popen-")  # never /tmp
    above = [path for path in saved.folder.parents if path.name.startswith(of_tests)]
    modes = {path: path.stat().st_mode for path in above}
    for path in (saved.folder, *above):
        path.chmod(0o755)
    (saved.folder / "live.report").touch()
    (saved.folder / "live.report").chmod(0o666)
    try:
        with somebody_else():
            yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@only_root
@pytest.mark.parametrize("form", FORMATS)
def test_what_cannot_be_read_is_named_and_the_rest_is_kept(saved, form, capsys):
    fill(saved, 3)
    saved.write("secret").chmod(0)
    saved.write("closed/inside").parent.chmod(0)
    with somebody_who_cannot_read(saved), pytest.raises(backup.BackupError) as caught:
        saved.run(format=form)
    (archive,) = saved.archives()
    assert archive.name.endswith(f".incomplete.{form}")
    last = f"the last: {saved.source}/secret: Permission denied"
    assert str(caught.value) == f"{archive.name} is incomplete, 2 could not be read; {last}"
    assert f"{saved.source}/closed: Permission denied\n" in capsys.readouterr().out
    here = contents(saved.source)
    for name in (b"secret", b"closed/inside"):
        del here[name]
    assert contents(saved.restored(archive)) == here


@pytest.mark.parametrize("kind", ["empty", "missing"])
def test_a_path_without_files_is_taken_for_an_unmounted_disk(saved, kind):
    fill(saved)
    path = saved.folder / "mnt"
    if kind == "empty":
        path.mkdir()
    with pytest.raises(backup.BackupError, match="mnt: is not there, or holds no file; is its"):
        saved.run(paths=[str(path), str(saved.source)])
    (archive,) = saved.archives()
    assert archive.name.endswith(".incomplete.tar.gz")
    assert contents(saved.restored(archive)) == contents(saved.source)


def test_if_no_path_is_there_nothing_is_made(saved):
    with pytest.raises(backup.BackupError, match="there is nothing to back up; the last problem: "):
        saved.run(paths=[str(saved.folder / "gone")])
    assert saved.archives() == []
    assert not saved.unfinished.exists()


# -- deadlines, kills, full disks


@pytest.mark.parametrize("form", FORMATS)
def test_it_goes_on_where_the_deadline_came(saved, form, monkeypatch):
    fill(saved, 20)
    os.link(saved.source / "0" / "000", saved.source / "zzz")  # a later run packs it once more
    ledger(saved.source / "1" / "app.db", "wal").close()
    monkeypatch.setattr(backup, "PART_SECONDS", -1)
    runs, packed = [], 0
    while (said := saved.run(looks=16, format=form)) == "more":
        runs.append(saved.volume)
        packed += saved.volume
        assert saved.archives() == []
        assert len(runs) < 50
    assert len(runs) > 4
    assert packed + saved.volume == 26
    assert ": 26 files and folders," in said
    (archive,) = saved.archives()
    assert contents(saved.restored(archive)) == contents(saved.source)
    assert not saved.unfinished.exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_kill_at_any_step_loses_no_archive_and_leaves_no_broken_one(saved, form):
    fill(saved, 4)
    saved.write("large", os.urandom(2 * backup.CHUNK))  # so that it is killed within a part, too
    ledger(saved.source / "app.db", "delete").close()
    first = saved.whole(format=form)
    wanted = contents(saved.source)
    before = first.read_bytes()
    ended = False
    for step in itertools.count(3, 2 if FULL else 25):
        for state in ({}, None):  # one that begins, and one that goes on
            saved.state = json.loads((saved.folder / "state").read_text()) if state is None else {}
            pid = os.fork()
            if not pid:
                die_at(saved, step, form)
            _, status = os.waitpid(pid, 0)
            assert first.read_bytes() == before
            for archive in set(saved.archives()) - {first}:
                with open(archive, "rb") as file:
                    assert is_whole(file, form)
                archive.unlink()
            ended = ended or (state == {} and os.WIFEXITED(status))
        if ended:
            break
    assert step > 20
    assert contents(saved.restored(first)) == wanted


def die_at(saved, steps, form):
    """In a process of its own: run, and die at this step; its state is noted as the runner does."""
    backup.PART_SECONDS = -1

    def step():
        nonlocal steps
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, arguments):
        where = " ".join(map(str, arguments[:2]))
        if event.startswith(("open", "os.", "shutil.", "sqlite3.")) and str(saved.target) in where:
            step()

    write = backup.Output.write

    def write_and_step(file, data):
        size = write(file, data)
        step()
        return size

    backup.Output.write = write_and_step

    note = saved.folder / "state"
    note.write_text(json.dumps(saved.state))
    save = backup.save

    def save_and_note(task, cursor):
        cursor = save(task, cursor)
        note.write_text(json.dumps(task.state))
        return cursor

    backup.save = save_and_note
    sys.addaudithook(watch)
    saved.run(format=form)
    steps = FOREVER
    note.write_text("{}")
    os._exit(0)


def is_whole(file, form):
    if form == "zip":
        return zipfile.ZipFile(file).testzip() is None
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(file.read()))) as tar:
        return len(tar.getmembers()) > 5


def group_of_the_task(site):
    """Return the process group of the task while it runs."""
    for path in (site.state / "runs").glob("*.keeper"):
        for line in path.read_text().splitlines():
            note = json.loads(line) if line.endswith("}") else {}
            if "group" in note:
                return note["group"][0]
    return None


def test_killed_in_an_installation_it_goes_on(site):
    source, target = site.folder / "source", site.folder / "target"
    source.mkdir()
    target.mkdir()
    for number in range(60):
        (source / f"{number:02}").write_bytes(os.urandom(20_000))
    wait = "while os.path.exists(os.environ['HOLD']) and self.cursor.packed > 30: time.sleep(0.01)"
    hold = f"""
PART_SECONDS = -1
add = Packer._add

def held(self, path):
    import time
    if self.cursor.packed == 10:
        time.sleep(1.1)  # each second what is done is noted
    {wait}
    return add(self, path)

Packer._add = held
"""
    held = site.folder / "hold"
    held.write_text("")
    site.write("backup.py", FILE.read_text() + hold)
    configure(site, "backup", paths=source, target=target)
    with open(site.params, "a") as params:
        params.write(f"task.backup.env.HOLD = {held}\n")
    running = site.start("run", "backup")
    unfinished = target / ".backup.unfinished"
    wait_for(lambda: any(f.stat().st_size > 30 * 20_000 for f in unfinished.glob("*.packed")), 60)
    os.killpg(wait_for(lambda: group_of_the_task(site), 60), signal.SIGKILL)
    running.wait(60)
    held.unlink()
    assert len(list(target.glob("backup-*"))) == 0
    done = site.run("run", "backup", "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = target.glob("backup-*")
    assert len(names(made)) == 61
    assert site.last("backup")["volume"] <= 51


def test_at_a_signal_it_stops_quietly_and_goes_on_later(saved, monkeypatch):
    fill(saved)
    monkeypatch.setattr(backup, "PART_SECONDS", -1)
    add, added = backup.Packer._add, []

    def add_some(packer, path):
        added.append(path)
        if len(added) == 9:
            raise SystemExit(143)
        return add(packer, path)

    monkeypatch.setattr(backup.Packer, "_add", add_some)
    with pytest.raises(SystemExit):
        saved.run()
    assert saved.state["unfinished"]["packed"] == 8
    archive = saved.whole()
    assert len(added) == 9 + 16 - 8
    assert contents(saved.restored(archive)) == contents(saved.source)


def test_what_nobody_worked_at_for_a_day_is_begun_anew(saved):
    fill(saved)
    assert saved.run(looks=9) == "more"
    saved.state["unfinished"]["at"] -= 86401
    saved.write("3/new")
    assert contents(saved.restored(saved.whole())) == contents(saved.source)


@pytest.mark.parametrize("lost", ["packed", "list", "all"])
def test_what_is_unfinished_may_be_lost(saved, lost):
    fill(saved)
    assert saved.run(looks=9) == "more"
    if lost == "all":
        shutil.rmtree(saved.unfinished)
    else:
        (lost_file,) = saved.unfinished.glob(f"*.{lost}")
        lost_file.unlink()
    assert contents(saved.restored(saved.whole())) == contents(saved.source)


def test_other_options_begin_anew_and_leave_nothing_behind(saved):
    fill(saved)
    assert saved.run(looks=9) == "more"
    other = saved.folder / "other"
    other.mkdir()
    assert "16 files" in saved.run(target=str(other), exclude=["nothing"])
    assert not saved.unfinished.exists()
    assert saved.archives() == []
    assert len(list(other.glob("backup-*"))) == 1


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_what_reads_back_differently_is_thrown_away(saved, form, place, monkeypatch):
    fill(saved)
    old = saved.whole(format=form)
    verify = backup.verify

    def damage(cursor, kind):
        path = Path(cursor.path("packed"))
        content = bytearray(path.read_bytes())
        content[int(len(content) * place)] ^= 1
        path.write_bytes(content)
        return verify(cursor, kind)

    monkeypatch.setattr(backup, "verify", damage)
    with pytest.raises(backup.BackupError, match="is the disk sound"):
        saved.run(format=form)
    monkeypatch.undo()
    assert saved.archives() == [old]
    assert not saved.unfinished.exists()
    assert saved.state == {}
    saved.whole(format=form)


def test_without_room_it_does_not_begin(saved):
    saved.write("large", os.urandom(3 << 20))
    disk = os.statvfs(saved.target)
    too_much = disk.f_blocks * disk.f_frsize >> 20
    with pytest.raises(backup.BackupError) as caught:
        saved.run(min_free_mib=too_much)
    need = r"this needs about 3\.\d MiB of the \d+\.\d MiB that are free, and "
    need += rf"{too_much} MiB must stay free \(min_free_mib\); make room"
    assert re.fullmatch(f"options.target: {saved.target}: {need}", str(caught.value))
    assert os.listdir(saved.target) == [".backup.unfinished.lock"]
    assert saved.state == {}


def test_what_packs_well_needs_little_room(saved):
    saved.write("large", b"x" * (40 << 20))
    saved.write("other", os.urandom(1 << 20))
    cursor = backup.Cursor(folder=str(saved.folder), archive="x")
    options = backup.Options(paths=(str(saved.source),), target=str(saved.target))
    with open(cursor.path("list"), "w") as file:
        listed = backup.everything(options, pytest.fail)
        file.writelines(json.dumps([path, size]) + "\n" for path, size in listed)
    found = backup.estimate(cursor.path("list"), 41 << 20)
    assert 1 << 19 < found < 4 << 20


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("file", ["large", "app.db", "many"])
def test_a_disk_that_gets_full_keeps_its_archives_and_nothing_else(saved, form, file):
    """The limit of the kernel for the size of a file stands for that of a disk."""
    saved.write("small")
    saved.run(format=form)
    old = sorted(os.listdir(saved.target))
    if file == "app.db":
        ledger(saved.source / file, "delete").close()
    else:
        for number in range(1 if file == "large" else 100):
            saved.write(f"{file}{number}", os.urandom((3 << 20) // (1 if file == "large" else 100)))
    pid = os.fork()
    if not pid:
        backup.PART_SECONDS = -1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20,) * 2)
        said = "it did not fail"
        try:
            saved.run(format=form)
        except backup.BackupError as error:
            said = str(error)
        (saved.folder / "said").write_text(f"{said}\n{saved.state}")
        os._exit(0)
    os.waitpid(pid, 0)
    said = (saved.folder / "said").read_text()
    left = set(os.listdir(saved.target)) - set(old)
    if file == "app.db":  # the copy does not fit, but what is packed does
        assert "app.db: SQLite cannot copy it (" in said
        assert [re.sub(r"\d{8}T\d{6}", "", name) for name in left] == [
            f"backup-Z.incomplete.{form}"
        ]
    else:
        assert said == f"{saved.target}: File too large\n{{}}"
        assert left == set()


def test_so_much_stays_free_while_it_packs(saved, monkeypatch):
    saved.write("large", os.urandom(3 << 20))

    def free(fd):
        return SimpleNamespace(f_frsize=1, f_bavail=(5 << 20) - os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fstatvfs", free)
    with pytest.raises(backup.BackupError, match="full but for min_free_mib$"):
        saved.run(min_free_mib=3)
    saved.run(min_free_mib=1)


def test_two_installations_do_not_share_a_target(saved):
    """Each would remove the archives of the other."""
    fill(saved)
    saved.whole()
    other = Backup(saved.folder / "elsewhere", saved.target)
    other.write("file")
    with pytest.raises(backup.BackupError) as caught:
        other.run(keep_last=1)
    lock = f"{saved.unfinished}.lock"
    text = f"{lock}: is of here:{saved.folder}; give each installation a target of its own, or "
    assert str(caught.value) == f"{text}remove this file"
    assert len(saved.archives()) == 1
    os.unlink(lock)
    other.run()
    assert len(saved.archives()) == 2


def test_two_at_once_do_not_meet(saved):
    fill(saved)
    with (
        backup.workplace(saved.context(), str(saved.target)),
        pytest.raises(backup.BackupError, match="another one is at work there; give each"),
    ):
        saved.run()
    saved.whole()


@only_root
def test_a_folder_of_somebody_else_is_refused(saved):
    fill(saved)
    os.mkdir(saved.unfinished)
    os.chown(saved.unfinished, 65534, 65534)
    with pytest.raises(backup.BackupError, match="is not a folder of ours; remove it"):
        saved.run()
    os.rmdir(saved.unfinished)
    saved.unfinished.symlink_to(saved.source)
    with pytest.raises(backup.BackupError, match="is not a folder of ours; remove it"):
        saved.run()
    assert len(list(saved.source.iterdir())) == 3


# -- rotation


def archive_at(moment, *, complete=True):
    return moment.strftime("backup-%Y%m%dT%H%M%SZ") + ".incomplete" * (not complete) + ".tar.gz"


def kept(files, **options):
    wanted = backup.Options(**{"keep_last": 1, **options})
    return sorted(
        found.file for found in backup.to_keep(backup.archives_of("backup", files), wanted)
    )


DAYS = [datetime(2026, 1, 1, 2, 30, tzinfo=timezone.utc) + timedelta(days=n) for n in range(800)]


def test_grandfather_father_and_son_stay():
    files = [archive_at(day) for day in DAYS[:425]]  # up to 1 March 2027, a Monday
    found = kept(files, keep_last=2, keep_daily=3, keep_weekly=3, keep_monthly=4, keep_yearly=2)
    days = ["20261231", "20270131", "20270221", "20270227", "20270228", "20270301"]
    assert found == [f"backup-{day}T023000Z.tar.gz" for day in days]


def test_only_the_last_ones_stay():
    files = [archive_at(day) for day in DAYS[:20]]
    assert kept(files, keep_last=7) == files[-7:]
    assert kept(files[:3], keep_last=7) == files[:3]


def test_incomplete_ones_never_push_out_the_last_complete_one():
    files = [
        archive_at(DAYS[0]),
        archive_at(DAYS[1]),
        *(archive_at(day, complete=False) for day in DAYS[2:30]),
    ]
    assert kept(files, keep_last=3) == sorted([files[1], *files[-3:]])
    # nor one of the same week: Thursday to Sunday, then Monday and Tuesday
    assert kept(files[:6], keep_weekly=2) == sorted([files[1], files[5]])


dates = some.integers(0, 4 * 10**9).map(
    lambda seconds: datetime.fromtimestamp(seconds, timezone.utc)
)
numbers = some.integers(0, 5)


@given(
    some.lists(
        some.tuples(dates, some.booleans()), min_size=1, max_size=40, unique_by=lambda a: a[0]
    ),
    some.integers(1, 9),
    some.tuples(numbers, numbers, numbers, numbers),
)
def test_whatever_is_asked_for_the_newest_and_the_last_complete_one_stay(archives, last, periods):
    keys = ("keep_daily", "keep_weekly", "keep_monthly", "keep_yearly")
    found = kept(
        [archive_at(each[0], complete=each[1]) for each in archives],
        keep_last=last,
        **dict(zip(keys, periods)),
    )
    archives.sort()
    assert {archive_at(each[0], complete=each[1]) for each in archives[-last:]} <= set(found)
    complete = [each for each in archives if each[1]]
    assert not complete or archive_at(complete[-1][0]) in found
    assert len(found) <= last + 1 + sum(periods)


def test_rotation_touches_its_own_archives_only(saved):
    fill(saved)
    old = [archive_at(day) for day in DAYS[:5]]
    others = [
        "backup-20260101T023000Z.tar.gz.part",
        "backup-2026.tar.gz",
        "notes",
        "other-" + old[0],
    ]
    others += ["backup-db-20260101T023000Z.tar.gz", "backup-20261301T023000Z.zip", ".hidden"]
    for name in (*old, *others):
        (saved.target / name).write_text("")
    made = saved.whole(keep_last=3)
    assert saved.said.endswith("; 3 older removed")
    left = set(os.listdir(saved.target)) - {".backup.unfinished.lock"}
    assert left == {*old[-2:], *others, made.name}


def test_a_clock_that_was_wrong_pushes_out_nothing(saved):
    """The age of archives from the future is not known, so nobody counts or removes them."""
    fill(saved)
    good = [archive_at(day) for day in DAYS[:2]]
    future = [archive_at(day.replace(year=2099)) for day in DAYS[:9]]
    for name in (*good, *future):
        (saved.target / name).write_text("")
    with pytest.raises(backup.BackupError, match="incomplete"):
        saved.run(keep_last=1, paths=[str(saved.source), str(saved.folder / "gone")])
    left = {path.name for path in saved.archives()}
    assert left > {good[1], *future}
    assert good[0] not in left
    assert len(left) == 2 + len(future)


def test_an_archive_from_the_future_does_not_push_out_the_new_one(saved):
    fill(saved)
    future = archive_at(datetime(2099, 1, 1, tzinfo=timezone.utc))
    (saved.target / future).write_text("")
    saved.run(keep_last=1)
    assert len(saved.archives()) == 2


def test_nothing_is_removed_if_the_backup_fails(saved):
    old = [archive_at(day) for day in DAYS[:9]]
    for name in old:
        (saved.target / name).write_text("")
    with pytest.raises(backup.BackupError, match="there is nothing to back up"):
        saved.run(paths=[str(saved.folder / "gone")])
    assert [path.name for path in saved.archives()] == old


# -- restore


def evil_tar(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            member.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"evil"))


FILE_KIND, LINK = tarfile.REGTYPE, tarfile.SYMTYPE
EVIL = [
    [("../evil", FILE_KIND, "")],
    [("a/../../evil", FILE_KIND, "")],
    [("link", LINK, "/")],
    [("link", LINK, "..")],
    [("a", LINK, "."), ("a/b", LINK, "../.."), ("a/b/evil", FILE_KIND, "")],
    [("hard", tarfile.LNKTYPE, "../outside")],
    [("hard", tarfile.LNKTYPE, "/etc/passwd")],
    [("link", LINK, "inside"), ("link/evil", FILE_KIND, "")],
    [("link", LINK, "."), ("hard", tarfile.LNKTYPE, "link/good")],
    [("good", FILE_KIND, "")],
    [("good/below", FILE_KIND, "")],
    [("n" * 300, FILE_KIND, "")],
    [("device", tarfile.CHRTYPE, "")],
    [("pipe", tarfile.FIFOTYPE, "")],
]


@pytest.mark.parametrize("members", EVIL)
def test_nothing_is_restored_outside_of_the_folder(tmp_path, members):
    (tmp_path / "outside").write_text("as it was")
    archive = tmp_path / "evil.tar.gz"
    evil_tar(archive, ("good", FILE_KIND, ""), *members, ("last", FILE_KIND, ""))
    done = restore(archive, tmp_path / "in" / ".." / "restored")
    assert done.returncode == 1
    done = restore(archive, tmp_path / "restored")
    assert "left out: " in done.stderr
    assert (tmp_path / "restored" / "last").read_text() == "evil"
    assert sorted(os.listdir(tmp_path)) == ["evil.tar.gz", "outside", "restored"]
    assert (tmp_path / "outside").read_text() == "as it was"
    for path in (tmp_path / "restored").rglob("*"):
        assert path.resolve().is_relative_to(tmp_path / "restored")


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python has none")
def test_where_tarfile_has_no_filter_ours_does_the_same(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    names = ("a", "/a", "b/../a", "../a", "b/../../a", "/../a", "link/a")
    targets = ("", "a", "../a", "b/../../a", "/etc", "link/../../a")
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)
    for name, target, kind, mode in itertools.product(names, targets, kinds, (0o6777, 0o66)):

        def told(safe):
            member = tarfile.TarInfo(name)  # noqa: B023 - it is called at once
            member.type, member.mode, member.linkname = kind, mode, target  # noqa: B023
            try:
                found = safe(member, str(folder))
            except (tarfile.FilterError, OSError) as error:
                return getattr(error, "strerror", type(error).__name__)
            return found.name, found.mode if found.isreg() else 0

        assert told(backup.data_filter) == told(tarfile.data_filter), (name, target, kind)


def test_links_that_the_filter_of_tarfile_takes_for_harmless_lead_nowhere(tmp_path):
    """CVE-2025-4517: a path that is too long for the system was not looked at to its end."""
    (tmp_path / "outside").write_text("as it was")
    archive = tmp_path / "evil.tar.gz"
    folder, steps, path, members = "d" * 247, "abcdefghijklmnop", "", []
    for step in steps:
        members += [(f"{path}{folder}", tarfile.DIRTYPE, ""), (f"{path}{step}", LINK, folder)]
        path += f"{folder}/"
    long_link = f"{'/'.join(steps)}/{'l' * 254}"
    members += [(long_link, LINK, "../" * len(steps)), ("escape", LINK, f"{long_link}/..")]
    members += [("hard", tarfile.LNKTYPE, "escape/outside"), ("escape/outside", FILE_KIND, "")]
    evil_tar(archive, *members, ("escape/new", FILE_KIND, ""), ("last", FILE_KIND, ""))
    done = restore(archive, tmp_path / "restored")
    assert "lies behind a link" in done.stderr
    assert (tmp_path / "restored" / "last").read_text() == "evil"
    assert sorted(os.listdir(tmp_path)) == ["evil.tar.gz", "outside", "restored"]
    assert (tmp_path / "outside").read_text() == "as it was"
    assert (tmp_path / "outside").stat().st_nlink == 1


def test_a_zip_writes_nothing_outside_of_the_folder_either(tmp_path):
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("good", "good")
        made.writestr("../../evil", "evil")
        made.writestr("/absolute", "evil")
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, "../outside")
        made.writestr("link/evil", "evil")
    done = restore(archive, tmp_path / "restored")
    assert done.stderr.count("left out: ") == 2, done
    assert sorted(os.listdir(tmp_path)) == ["evil.zip", "restored"]
    assert sorted(os.listdir(tmp_path / "restored")) == ["absolute", "good", "link"]


def test_restoring_overwrites_nothing_and_says_what_is_wrong(saved):
    fill(saved)
    archive = saved.whole()
    there = restore(archive, saved.source)
    assert (there.returncode, there.stderr.count("File exists")) == (1, 1)
    cut = saved.folder / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-1000])
    done = restore(cut, saved.folder / "new")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{cut}: ")
    assert "Traceback" not in done.stderr
    assert "is no archive, by its name" in restore(saved.source, saved.folder / "other").stderr
    usage = subprocess.run([sys.executable, FILE], capture_output=True, text=True, check=False)
    assert (usage.returncode, usage.stderr[:6]) == (64, "usage:")


def test_a_link_out_of_the_folder_is_named_and_the_rest_is_there(saved):
    saved.write("releases/1/app", "app")
    (saved.source / "current").symlink_to(saved.source / "releases" / "1")
    folder = saved.restored(saved.whole())
    assert saved.restore.returncode == 1
    target = f"{saved.source}/releases/1"
    name = f"{saved.source}/current"[1:]
    assert saved.restore.stderr == f"left out: {name} -> {target} (AbsoluteLinkError)\n"
    assert saved.restore.stdout.endswith(": restored, 1 left out\n")
    assert (folder / "releases/1/app").read_text() == "app"


@pytest.mark.parametrize("form", FORMATS)
def test_an_archive_that_lost_its_last_part_is_thrown_away(saved, form, monkeypatch):
    """What is left is an archive without a fault, but for the number of its members."""
    fill(saved)
    assert saved.run(looks=9, format=form) == "more"
    size, verify = saved.state["unfinished"]["size"], backup.verify

    def lose(cursor, kind):
        os.truncate(cursor.path("packed"), size)
        verify(cursor, kind)

    monkeypatch.setattr(backup, "verify", lose)
    with pytest.raises(backup.BackupError, match="has [1-9] of 16 members; is the disk sound"):
        saved.run(format=form)
    assert saved.archives() == []


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_archive_is_one_clear_line(saved, form):
    saved.write("plain", "x" * 3000)
    saved.write("noise", random.Random(2).randbytes(30_000))
    content = saved.whole(format=form).read_bytes()
    chance = random.Random(3)
    archive = saved.folder / f"damaged.{form}"
    for number in range(400 if FULL else 30):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 20])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        archive.write_bytes(
            damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])]
        )
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = backup.main(["restore", str(archive), str(saved.folder / f"to{number}")])
        lines = said.getvalue().splitlines()
        assert code in (0, 1)
        assert (code == 0) == (lines == [])
        if code and not lines[-1].startswith("left out: "):
            assert lines[-1].startswith(f"{archive}: "), lines


# -- options, and the task in an installation


BAD = [
    ("paths", {"paths": []}),
    ("paths", {"paths": ["relative"]}),
    ("paths", {"paths": ["/"]}),
    ("paths", {"paths": [""]}),
    ("paths", {"paths": [3]}),
    ("paths", {"paths": ""}),
    ("target", {"target": ""}),
    ("target", {"target": "backups"}),
    ("target", {"target": "/does/not/exist"}),
    ("target", {"target": "/etc/passwd"}),
    ("target", {"target": "/", "paths": ["/etc"]}),
    ("format", {"format": "tar"}),
    ("keep_last", {"keep_last": 0}),
    ("keep_last", {"keep_last": "many"}),
    ("keep_last", {"keep_last": True}),
    ("keep_weekly", {"keep_weekly": -1}),
    ("min_free_mib", {"min_free_mib": "-5"}),
    ("exclude", {"exclude": 3}),
    ("exclude", {"exclude": ["log/*"]}),
    ("kep_last", {"kep_last": 3}),
]


@pytest.mark.parametrize(("key", "options"), BAD)
def test_a_bad_option_is_one_clear_line_and_nothing_is_done(saved, key, options):
    with pytest.raises(ValueError) as caught:
        saved.run(**options)
    assert str(caught.value).startswith(f"options.{key}: ")
    assert "\n" not in str(caught.value)
    assert os.listdir(saved.target) == []


def test_a_target_that_takes_nothing_is_named(saved):
    fill(saved)
    with pytest.raises(backup.BackupError, match="^/proc: No such file or directory$"):
        saved.run(target="/proc")


def test_the_options_in_the_file_are_the_defaults():
    found = bgtasks.read_raw(str(FILE))[0]["options"]
    assert found == {**backup.Options()._asdict(), "paths": [], "exclude": []}
    table = PAGE[PAGE.index("## backup.py") :].split("\n## ")[0]
    assert [key for key in found if f"| `{key}` |" in table] == list(found)


def configure(site, task, **options):
    with open(site.params, "a") as params:
        options = {"min_free_mib": 0, **options}
        params.writelines(f"task.{task}.options.{key} = {options[key]}\n" for key in options)


def test_a_copy_without_options_says_what_to_set(site):
    site.write("backup.py", FILE.read_text())
    done = site.run("run", "backup")
    assert done.returncode == 1
    reason = site.last("backup")["reason"]
    assert reason.startswith("ValueError: options.paths: is empty; name what to back up, such as")


def test_two_configurations_lie_side_by_side(site):
    site.write("backup.py", FILE.read_text())
    (link,) = [line.strip() for line in PAGE.splitlines() if line.startswith("    ln -s ")]
    subprocess.run(link.replace("/srv/bgtasks/tasks.d", str(site.tasks)).split(), check=True)
    target = site.folder / "target"
    target.mkdir()
    for name in ("backup", "backup_etc"):
        source = site.folder / name
        source.mkdir()
        (source / "file").write_text(name)
        configure(site, name, paths=source, target=target, keep_last=1)
    for _ in range(2):
        done = site.wake()
        assert done.returncode == 0, done.stderr
        for name in ("backup", "backup_etc"):
            assert site.run("run", name, "--force").returncode == 0
    found = sorted(path.name for path in target.iterdir() if not path.name.startswith("."))
    assert [re.sub(r"\d{8}T\d{6}", "", name) for name in found] == [
        "backup-Z.tar.gz",
        "backup_etc-Z.tar.gz",
    ]
    assert site.last("backup")["outcome"] == "done"
    assert site.last("backup")["volume"] == 2


def test_the_example_of_the_page_works(site):
    lines = [line for line in shell_lines("task.backup") if " = " in line]
    assert len(lines) >= 5
    places = {"/srv/app": site.folder / "app", "/mnt/backup": site.folder / "mnt"}
    text = "\n".join(lines)
    for name, place in places.items():
        place.mkdir()
        text = text.replace(name, str(place))
    (places["/srv/app"] / "file").write_text("here")
    site.params.write_text(f"node = here\n{text}\n")
    site.write("backup.py", FILE.read_text())
    done = site.run("run", "backup")
    assert done.returncode == 0, done.stderr
    (archive,) = places["/mnt/backup"].glob("backup-*")
    for line in shell_lines("tar "):
        folder = site.folder / f"by-tar-{len(os.listdir(site.folder))}"
        command = line.replace("/mnt/backup/backup-20260131T023000Z.tar.gz", str(archive))
        command = command.replace("/srv/restored", str(folder))
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    assert (folder / str(places["/srv/app"])[1:] / "file").read_text() == "here"
