"""purge_files, rotate_logs and disk_space of contrib/tasks, on real files."""

import gzip
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from chores import (
    README,
    Chore,
    age,
    context,
    defaults_in,
    defaults_of,
    example,
    load,
    make,
    needs,
    place,
    refused,
    room_for,
    run_shell,
)
from conftest import PROGRAM, somebody_else, wait_for

import bgtasks

pytestmark = pytest.mark.unmeasured
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
purge_files = load("purge_files")


# -- purge_files


@pytest.fixture
def garbage(tmp_path):
    folder = tmp_path / "garbage"
    folder.mkdir()
    return folder


def purge(folder, seconds=600, maximum=None, **options):
    """Run the task here; return its result and the context."""
    task = context(place(), {"folder": str(folder), **options}, seconds, maximum)
    return purge_files.run(task), task


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_old_files_go_and_young_ones_stay(garbage):
    make(garbage / "old", 3)
    make(garbage / "young", 1)
    result, task = purge(garbage, older_than="2 d")
    assert (result, task.volume) == ("1 files with 0.0 MB removed", 1)
    assert left(garbage) == ["young"]
    assert purge(garbage, older_than="2 d")[0] == task.NOTHING


@pytest.mark.parametrize(("text", "stay"), [("90 min", 1), ("2 h", 2), ("100d", 3)])
def test_an_age_has_a_unit(garbage, text, stay):
    for hours in (1, 1.75, 48):
        make(garbage / str(hours), hours / 24)
    purge(garbage, older_than=text)
    assert len(left(garbage)) == stay


def test_only_the_newest_files_stay(garbage):
    for days in (5, 1, 4, 2, 3):
        make(garbage / str(days), days)
    purge(garbage, keep_files=2)
    assert left(garbage) == ["1", "2"]


def test_only_the_newest_files_that_fit_stay(garbage):
    for days in range(1, 6):
        make(garbage / str(days), days, "x" * 400_000)
    assert purge(garbage, keep_mb=1)[0] == "3 files with 1.2 MB removed"
    assert left(garbage) == ["1", "2"]


def test_the_newest_file_stays_however_large_it_is(garbage):
    make(garbage / "old", 1, "x" * 10)
    make(garbage / "large", 0, "x" * 2_000_000)
    purge(garbage, keep_mb=1)
    assert left(garbage) == ["large"]


def test_the_same_files_go_in_whatever_order_they_are_found():
    options = purge_files.Options(keep_mb=1, older_than="9 d")
    sizes = {1: 300_000, 2: 600_000, 3: 600_000, 4: 1_000, 9: 1}
    files = [purge_files.File(-days, size, (), "", 0) for days, size in sizes.items()]
    for order in itertools.permutations(files):
        gone = purge_files.garbage(order, options, 9 * 86400 - 9e-9)
        assert sorted(-file.changed for file in gone) == [3, 4, 9]


def test_files_of_the_future_are_the_newest(garbage):
    """As after a clock was set back."""
    for days in (-400, -1, 1):
        make(garbage / str(days), days)
    purge(garbage, older_than="1 min", keep_files=1)
    assert left(garbage) == ["-400"]


def test_another_name_of_a_file_stays(garbage):
    make(garbage / "old", 9)
    os.link(garbage / "old", garbage.parent / "other")
    purge(garbage, older_than="1 d")
    assert (left(garbage), left(garbage.parent)) == ([], ["other"])


def test_any_of_the_limits_is_enough(garbage):
    for days in (1, 2, 30):
        make(garbage / str(days), days)
    purge(garbage, older_than="20 d", keep_files=1)
    assert left(garbage) == ["1"]


def test_folders_below_are_purged_only_if_asked(garbage):
    (garbage / "below" / "deep").mkdir(parents=True)
    make(garbage / "below" / "deep" / "old", 9)
    assert purge(garbage, older_than="1 d")[0] == "nothing"
    purge(garbage, older_than="1 d", recursive=True)
    assert left(garbage) == []
    assert (garbage / "below" / "deep").is_dir()


def test_only_names_that_match_go_and_hidden_ones_only_by_their_own_pattern(garbage):
    (garbage / ".git").mkdir()
    for name in ("a.part", "a.jpg", ".htaccess", ".x.part", ".git/old.part"):
        make(garbage / name, 9)
    purge(garbage, older_than="1 d", patterns=["*.part", "nothing"], recursive=True)
    assert left(garbage) == [".git/old.part", ".htaccess", ".x.part", "a.jpg"]
    purge(garbage, older_than="1 d", patterns=[".*.part"])
    assert left(garbage) == [".git/old.part", ".htaccess", "a.jpg"]


def test_only_plain_files_go_and_links_are_not_followed(garbage, monkeypatch):
    outside = garbage.parent / "outside"
    outside.mkdir()
    make(outside / "precious", 9)
    (garbage / "link").symlink_to(outside / "precious")
    (garbage / "folder").symlink_to(outside)
    os.mkfifo(garbage / "fifo")
    with socket.socket(socket.AF_UNIX) as listening, monkeypatch.context() as patched:
        patched.chdir(garbage)  # the path of a socket must be short
        listening.bind("socket")
    for name in os.listdir(garbage):
        os.utime(garbage / name, (0, 0), follow_symlinks=False)
    assert purge(garbage, older_than="1 d", recursive=True)[0] == "nothing"
    assert sorted(os.listdir(garbage)) == ["fifo", "folder", "link", "socket"]
    assert left(outside) == ["precious"]


def test_a_folder_that_a_link_replaces_is_not_entered(garbage):
    outside = garbage.parent / "outside"
    outside.mkdir()
    (garbage / "sub").mkdir()
    make(outside / "file", 9)
    make(garbage / "sub" / "file", 9)
    task = context(garbage.parent, {"folder": str(garbage), "older_than": "1 d"})
    options = purge_files.read_options({**task.options, "recursive": True})
    with purge_files.opened_from("/", str(garbage).split("/")[1:]) as root:
        looked = purge_files.Purge(task, options, root)
        (file,) = looked.files()
        (garbage / "sub").rename(garbage / "moved")
        (garbage / "sub").symlink_to(outside)
        os.utime(outside / "file", ns=(file.changed, file.changed))
        looked.remove(file._replace(inode=(outside / "file").stat().st_ino))
        with pytest.raises(OSError, match="'sub/file': Not a directory"):
            looked.result()
        assert list(looked.files()) == [file._replace(folders=("moved",))]
    assert left(outside) == ["file"]
    with pytest.raises(OSError):
        purge_files.opened_from("/", str(garbage / "sub").split("/")[1:]).__enter__()


def test_a_file_that_was_written_to_meanwhile_stays(garbage):
    make(garbage / "again", 9)
    task = context(garbage.parent, {})
    options = purge_files.Options(folder=str(garbage))
    with purge_files.opened_from("/", str(garbage).split("/")[1:]) as root:
        looked = purge_files.Purge(task, options, root)
        (file,) = looked.files()
        (garbage / "again").write_text("new")
        looked.remove(file)
        looked.remove(file._replace(name="gone"))
    assert looked.result() == task.NOTHING
    assert left(garbage) == ["again"]


HOSTILE = [
    b"new\nline",
    b"-rf",
    b"\xff\xfe",
    b" ",
    b"*",
    b"x" * 255,
    "ü\u202e".encode(),
    b"a'\"$(id)",
]


def test_names_may_be_hostile(garbage, capsys):
    deep = os.fsencode(garbage)
    for name in HOSTILE:
        path = os.path.join(deep, name)
        with open(path, "w"):
            os.utime(path, (0, 0))
    purge(garbage, older_than="1 d")
    assert os.listdir(garbage) == []
    assert len(capsys.readouterr().out.splitlines()) == len(HOSTILE)


def test_a_tree_may_be_deeper_than_a_path_can_be_long(garbage):
    fd = os.open(garbage, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d" * 100, dir_fd=fd)
        above, fd = fd, os.open("d" * 100, os.O_RDONLY, dir_fd=fd)
        os.close(above)
    os.close(os.open("old", os.O_CREAT, dir_fd=fd))
    os.utime("old", (0, 0), dir_fd=fd)
    assert purge(garbage, older_than="1 d", recursive=True)[1].volume == 1
    assert os.listdir(fd) == []
    os.close(fd)


def test_a_dry_run_removes_nothing_and_says_what_would_go(garbage, capsys):
    make(garbage / "old", 9)
    result, task = purge(garbage, older_than="1 d", dry_run=True)
    assert (result, task.volume) == ("1 files with 0.0 MB would be removed", 0)
    assert capsys.readouterr().out == "would remove 'old'\n"
    assert left(garbage) == ["old"]


@root_only
def test_a_dry_run_names_just_what_the_real_one_removes(capsys):
    garbage = place()
    for name in ("mine", "theirs", "sticky", ".hidden"):
        (garbage / name).mkdir()
        for number in range(4):
            make(garbage / name / f"{number}.part", 9 - number, "x" * 1000 * number)
    for path in (garbage, *garbage.glob("mine/**/*"), garbage / "mine"):
        os.chown(path, 65534, 65534)
    (garbage / "sticky").chmod(0o1777)
    (garbage / "mine" / "link").symlink_to("0.part")
    options = {"older_than": "8 d", "keep_files": 3, "recursive": True}
    told = []
    for dry_run in (True, False):
        with somebody_else(), pytest.raises(OSError, match=r"\d files .* problems"):
            purge(garbage, **options, dry_run=dry_run)
        said = capsys.readouterr().out.replace("would remove", "removed")
        said = said.replace("Operation not permitted", "Permission denied")  # if it is sticky
        told.append(sorted(said.splitlines()))
    assert told[0] == told[1]
    assert {line.partition("/")[0] for line in told[0]} == {"'sticky", "'theirs", "removed 'mine"}
    assert "removed 'mine/0.part'" in told[0]


def test_at_the_deadline_it_stops_and_says_that_there_is_more(garbage):
    make(garbage / "old", 9)
    result, task = purge(garbage, seconds=0, older_than="1 d")
    assert result == task.MORE
    assert left(garbage) == ["old"]


def test_it_removes_at_most_so_many(garbage):
    for number in range(5):
        make(garbage / str(number), 9)
    assert purge(garbage, maximum=2, older_than="1 d")[1].volume == 2
    assert len(left(garbage)) == 3


@root_only
def test_what_cannot_be_removed_fails_the_run_and_stops_no_other():
    garbage = place()
    for name in ("mine", "theirs"):
        (garbage / name).mkdir()
        make(garbage / name / "old", 9)
    for path in (garbage, garbage / "mine", garbage / "mine" / "old"):
        os.chown(path, 65534, 65534)
    (garbage / "locked").mkdir(mode=0o700)
    with somebody_else(), pytest.raises(OSError, match=r"1 files .* 2 problems, the last: '"):
        purge(garbage, older_than="1 d", recursive=True)
    assert left(garbage) == ["theirs/old"]


def refusal(path, **options):
    with pytest.raises(ValueError) as caught:
        purge(path, older_than="1 d", dry_run=True, **options)
    return str(caught.value)


DANGEROUS = """
/ /home /home/me /etc /usr /var /tmp /root /bin /usr/bin /usr/local/bin /var/log /var/lib
/var/lib/dpkg /etc/ssl /proc /proc/self /dev/shm /run/lock /usr/share/doc /var/tmp
/var/../var/log /./home //etc
""".split()


def test_dangerous_roots_are_refused(tmp_path):
    for path in DANGEROUS:
        assert purge_files.why_not(os.path.realpath(path), (), ()), path
    (tmp_path / "link").symlink_to("/")
    for path in (
        "/",
        "//etc",
        f"{tmp_path}/../../../../../../../../etc",
        tmp_path / "link/usr/lib",
    ):
        assert "belongs to the system; name a folder of nothing but garbage" in refusal(path)


def test_a_system_folder_is_known_by_what_it_is(monkeypatch, garbage):
    """A mount, or a disk that takes /ETC for /etc, gives it another name."""
    (garbage / "below").mkdir()
    (garbage.parent / "etc").symlink_to(garbage)
    monkeypatch.setattr(purge_files, "SYSTEM", [str(garbage.parent / "etc")])
    for path in (garbage, garbage / "below"):
        assert "belongs to the system" in refusal(path)


def test_a_home_and_what_contains_it_are_refused(tmp_path, monkeypatch):
    home = tmp_path / "homes" / "me"
    home.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "homes")
    monkeypatch.setenv("HOME", str(tmp_path / "link" / "me"))
    for path in (home, home.parent, tmp_path / "link", tmp_path / "link" / "me"):
        assert "is a home, or contains one" in refusal(path)
    (home / "garbage").mkdir()
    assert purge(home / "garbage", older_than="1 d")[0] == "nothing"


def test_the_installation_is_refused(site, monkeypatch):
    monkeypatch.chdir(site.tasks)
    inside = site.state / "backups"
    inside.mkdir(parents=True)
    task = context(site.folder, {"older_than": "1 d", "dry_run": True})
    program = os.path.dirname(bgtasks.__file__)
    code = [program, os.path.dirname(purge_files.__file__), os.path.realpath(sys.prefix)]
    for folder in (site.folder, site.tasks, site.state, inside, *code):
        task.options["folder"] = str(folder)
        with pytest.raises(ValueError, match="this installation|belongs to the system"):
            purge_files.run(task)
    (site.folder / "garbage").mkdir()
    task.options["folder"] = str(site.folder / "garbage")
    assert purge_files.run(task) == task.NOTHING


def test_what_is_mounted_is_refused_and_not_entered(garbage, tmp_path, monkeypatch):
    own = [point for point in purge_files.mounted() if os.path.isdir(point)]
    assert all(purge_files.why_not(point, (), ()) for point in own)
    mount = garbage / "a disk"  # of the same file system, as `mount --bind` does it
    mount.mkdir()
    for folder in (garbage, mount):
        make(folder / "old", 9)
    (tmp_path / "mounts").write_text(f"28 1 254:0 / {garbage}/a\\040disk rw - ext4 /dev/vda rw\n")
    monkeypatch.setattr(purge_files, "MOUNTS", str(tmp_path / "mounts"))
    assert "is where a file system is mounted" in refusal(mount)
    purge(garbage, older_than="1 d", recursive=True)
    assert left(garbage) == ["a disk/old"]


@root_only
def test_a_folder_on_the_way_may_be_closed_to_readers():
    closed = place()
    (closed / "garbage").mkdir()
    make(closed / "garbage" / "old", 9)
    closed.chmod(0o711)
    os.chown(closed / "garbage", 65534, 65534)
    with somebody_else():
        assert purge(closed / "garbage", older_than="1 d")[1].volume == 1


def test_it_works_as_a_task_with_an_example_of_the_readme(site):
    uploads = site.folder / "uploads"
    uploads.mkdir()
    make(uploads / "old.part", 3)
    make(uploads / "new.part")
    Chore(site, "purge_files.py")
    changes = {"/srv/app/uploads": uploads}
    site.write("purge_uploads.toml", example("purge_uploads.toml", changes))
    command = re.search(r"python3 bgtasks.py (run purge_uploads .*)", README)[1]
    said = site.run(*command.split())
    assert "would remove 'old.part'" in said.stdout
    assert left(uploads) == ["new.part", "old.part"]
    said = site.run("run", "purge_uploads")
    assert said.returncode == 0, said
    assert left(uploads) == ["new.part"]


def test_options_may_stand_in_the_param_file(site):
    unfinished = site.folder / "unfinished"
    unfinished.mkdir()
    make(unfinished / "old", 3)
    Chore(site, "purge_files.py")
    lines = re.findall(r"(?m)^    (task\.purge_files\.options\..*)$", README)
    assert len(lines) == 2
    text = "\n".join(lines).replace("/srv/app/uploads/unfinished", str(unfinished))
    site.params.write_text(text)
    assert site.run("run", "purge_files").returncode == 0
    assert os.listdir(unfinished) == []


def test_killed_in_mid_work_it_has_done_its_part(site):
    garbage = site.folder / "garbage"
    garbage.mkdir()
    for number in range(300):
        make(garbage / str(number), 9)
    chore = Chore(site, "purge_files.py")
    path = site.tasks / "purge_files.py"
    path.write_text(path.read_text() + KILLED)
    chore.set(folder=garbage, older_than="1 d")
    assert chore.run()["volume"] == 100  # counted in hundreds
    assert len(os.listdir(garbage)) == 130
    path.write_text(path.read_text().replace("== 170", "== -1"))
    assert chore.run()["volume"] == 130
    assert os.listdir(garbage) == []


KILLED = """
import signal
unlink, removed = os.unlink, []
def counted(*args, **options):
    unlink(*args, **options)
    removed.append(args)
    if len(removed) == 170:
        os.kill(os.getpid(), signal.SIGKILL)
os.unlink = counted
"""

GOOD_PURGE = {"folder": "/tmp", "older_than": "1 d"}


BAD_PURGE_FILES = [
    ("folder", {"folder": ""}),
    ("folder", {"folder": "tmp"}),
    ("folder", {"folder": "."}),
    ("folder", {"folder": "~"}),
    ("folder", {"folder": "/does/not/exist"}),
    ("folder", {"folder": "/etc/passwd"}),
    ("folder", {"folder": "/tmp\n"}),
    ("folder", {"folder": 3}),
    ("patterns", {"patterns": []}),
    ("patterns", {"patterns": [""]}),
    ("patterns", {"patterns": ["a/b"]}),
    ("patterns", {"patterns": [3]}),
    ("older_than", {"older_than": "30"}),
    ("older_than", {"older_than": "0 d"}),
    ("older_than", {"older_than": "-1 d"}),
    ("older_than", {"older_than": ""}),
    ("keep_files", {"keep_files": -1}),
    ("keep_files", {"keep_files": True}),
    ("keep_mb", {"keep_mb": "many"}),
    ("dry_run", {"dry_run": "maybe"}),
    ("recursive", {"recursive": 1}),
    ("foldr", {"foldr": "/tmp"}),
]


def test_a_bad_option_of_purge_files_is_one_clear_line():
    for key, options in BAD_PURGE_FILES:
        assert refused(purge_files, GOOD_PURGE, options) == key, options


def test_what_a_toml_leaves_out_is_set_as_text():
    given = {"keep_files": "3", "dry_run": "yes", "patterns": "*.a, *.b", "recursive": "False"}
    found = purge_files.read_options({**GOOD_PURGE, **given})
    assert (found.keep_files, found.dry_run, found.recursive) == (3, True, False)
    assert found.patterns == ("*.a", "*.b")


# -- rotate_logs

rotate_logs = load("rotate_logs")


@pytest.fixture
def logs(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def rotate(folder, state=None, seconds=600, **options):
    """Rotate here what is older than a minute, unless options say otherwise."""
    given = {"files": [f"{folder}/*.log"], "older_than": "1 min", **options}
    seen = {"seen": {str(path): 0 for path in folder.iterdir()}}
    task = context(place(), given, seconds, state=seen if state is None else state)
    return rotate_logs.run(task), task


def content(folder, name="a.log"):
    """Return all that was ever written to a log, from its files."""
    whole = b""
    for path in [*rotate_logs.rotated(str(folder / name)), str(folder / name)]:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            whole += file.read()
    return whole


@pytest.mark.parametrize("method", ["rename", "copytruncate"])
def test_a_log_is_rotated_and_compressed(logs, method):
    (logs / "a.log").write_text("one\n")
    (logs / "a.log").chmod(0o640)
    (logs / "empty.log").write_text("")
    result, task = rotate(logs, method=method)
    assert result == "1 of 2 logs rotated"
    names = sorted(path.name for path in logs.iterdir())
    assert re.fullmatch(r"a.log a.log-\d{8}-\d{6}.gz empty.log", " ".join(names))
    assert {path.stat().st_mode & 0o777 for path in logs.glob("a*")} == {0o640}
    assert (logs / "a.log").read_text() == ""
    assert content(logs) == b"one\n"
    assert rotate(logs, method=method)[0] == task.NOTHING


def test_the_last_rotated_logs_are_kept(logs):
    for number in range(5):
        (logs / "a.log").write_text(f"{number}\n")
        rotate(logs, keep=3)
    assert content(logs) == b"2\n3\n4\n"


def test_a_log_is_rotated_by_size_or_by_age(logs):
    (logs / "small.log").write_text("x")
    (logs / "large.log").write_bytes(b"x" * 1_000_001)
    fresh = {"seen": {}}
    assert rotate(logs, fresh, larger_than_mb=1, older_than="")[0] == "1 of 2 logs rotated"
    assert (logs / "small.log").read_text() == "x"
    result, task = rotate(logs, fresh, older_than="1 d")
    assert result == task.NOTHING
    day_ago = {"seen": {str(logs / "small.log"): time.time() - 86000}}  # a run may begin earlier
    assert rotate(logs, day_ago, older_than="1 d")[0] == "1 of 2 logs rotated"


def test_after_a_clock_was_set_back_what_is_rotated_now_is_the_newest(logs):
    (logs / "a.log-20990101-000000.gz").write_bytes(gzip.compress(b"of the future\n"))
    (logs / "a.log").write_text("one\n")
    state = {"seen": {str(logs / "a.log"): time.time() + 1e8}}
    task = rotate(logs, state, keep=1)[1]
    assert task.volume == 0
    state["seen"][str(logs / "a.log")] = task.state["seen"][str(logs / "a.log")] - 86400
    rotate(logs, state, keep=1)
    assert content(logs) == b"one\n"


def test_rotated_logs_of_other_logs_are_left_alone(logs):
    others = ["b.log-20200101-000000", "a.log-20200101-000000.txt", "a.log-2020", "x-a.log"]
    for name in others:
        (logs / name).write_text(name)
    (logs / "a.log").write_text("one\n")
    rotate(logs, files=[str(logs / "a.log")], keep=1)
    assert [(logs / name).read_text() for name in others] == others


WRITER = """
import os, signal, sys, time
path, how, pid_file = sys.argv[1:]
lines = 0
def opened():
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
log = opened()
wanted, told = False, []  # both are looked at between two lines only
def again(*_):
    global wanted
    wanted = True
signal.signal(signal.SIGHUP, again)
signal.signal(signal.SIGTERM, lambda *_: told.append("to end"))
with open(pid_file, "w") as file:
    file.write(str(os.getpid()))
while not told:
    if wanted and how == "reopens" and lines % 50 == 0:  # it takes its time
        os.close(log)
        log, wanted = opened(), False
    os.write(log, b"line %d\\n" % lines)
    lines += 1
    time.sleep(0.0005)
print(lines)
"""


@pytest.fixture
def writer(logs):
    """Start a program that writes line after line; ended, it says how many."""
    processes = []

    def start(how):
        command = [sys.executable, "-c", WRITER, logs / "a.log", how, logs / "pid"]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        wait_for(lambda: (logs / "a.log").exists() and (logs / "a.log").stat().st_size, 60)
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def grown(logs):
    """Wait until there is something new in the log."""
    wait_for(lambda: (logs / "a.log").stat().st_size > 100, 60)


def ended(process):
    process.terminate()
    return b"".join(b"line %d\n" % number for number in range(int(process.communicate()[0])))


def test_no_line_is_lost_while_a_program_writes(logs, writer, monkeypatch):
    monkeypatch.setattr(rotate_logs, "PATIENCE", 60)
    process = writer("reopens")
    for _ in range(4):
        grown(logs)
        rotate(logs, pid_file=str(logs / "pid"), keep=100)
    wanted = ended(process)
    rotate(logs, keep=100)
    assert content(logs) == wanted
    assert len(rotate_logs.rotated(str(logs / "a.log"))) >= 5


def test_what_is_still_written_to_is_neither_compressed_nor_removed(logs, writer):
    process = writer("never reopens")
    rotate(logs)  # nobody tells the program
    (first,) = rotate_logs.rotated(str(logs / "a.log"))
    assert not first.endswith(".gz")
    (logs / "a.log").write_text("line of another program\n")
    with pytest.raises(rotate_logs.LogError, match="1 problems, .* set pid_file or command"):
        rotate(logs, keep=1)
    wanted = ended(process)
    assert content(logs) == wanted + b"line of another program\n"
    rotate(logs, keep=1)
    assert len(rotate_logs.rotated(str(logs / "a.log"))) == 1


def test_without_leases_the_last_line_tells(logs, monkeypatch):
    monkeypatch.delattr(rotate_logs.fcntl, "F_SETLEASE")
    path = logs / "a.log-20200101-000000"
    path.write_text("x")
    assert rotate_logs.is_written(str(path))
    age(path, 1)
    assert not rotate_logs.is_written(str(path))


def test_copied_and_truncated_no_line_comes_twice_and_the_writer_goes_on(logs, writer):
    process = writer("never reopens")
    for _ in range(3):
        grown(logs)
        rotate(logs, method="copytruncate", keep=100)
    grown(logs)
    wanted = ended(process).splitlines()
    found = content(logs).splitlines()
    assert len(found) == len(set(found))
    assert set(found) <= set(wanted)
    assert found[-1] == wanted[-1]
    assert b"\0" not in content(logs)


def test_a_command_is_run_only_if_somebody_still_writes(logs, capsys, monkeypatch):
    command = ["sh", "-c", f"echo told >>{logs}/told"]
    (logs / "a.log").write_text("one\n")
    rotate(logs, command=command)
    assert not (logs / "told").exists()
    with open(logs / "a.log", "a") as file:
        file.write("two\n")
        file.flush()
        monkeypatch.setattr(rotate_logs, "PATIENCE", 0)
        rotate(logs, command=command)
        assert (logs / "told").read_text() == "told\n"
    last = rotate_logs.rotated(str(logs / "a.log"))[-1]
    with open(last, "a"), pytest.raises(rotate_logs.LogError, match="2 problems"):
        rotate(logs, command=["sh", "-c", "exit 3"])
    assert "exit status 3" in capsys.readouterr().out


def test_a_strange_pid_file_is_named(logs):
    for text in ("", "1", "0", "-1", "x", "12 13", "9999999999"):
        (logs / "pid").write_text(text)
        with open(logs / "a.log", "w") as file:
            file.write("x")
            file.flush()
            with pytest.raises(rotate_logs.LogError, match="does not hold the number of a process"):
                rotate(logs, pid_file=str(logs / "pid"))
    assert content(logs) == b"x" * 7


def test_links_and_folders_are_named_and_stop_no_other(logs):
    (logs / "precious").write_text("keep me")
    (logs / "a.log").write_text("one\n")
    (logs / "link.log").symlink_to(logs / "precious")
    (logs / "sub.log").mkdir()
    with pytest.raises(rotate_logs.LogError, match="2 problems, the last: .* is no plain file"):
        rotate(logs)
    assert (logs / "precious").read_text() == "keep me"
    assert content(logs) == b"one\n"


@root_only
def test_root_does_not_rotate_where_others_can_write(logs):
    (logs / "a.log").write_text("one\n")
    logs.chmod(0o777)
    with pytest.raises(rotate_logs.LogError, match="others can write to"):
        rotate(logs)
    assert (logs / "a.log").read_text() == "one\n"


@root_only
def test_the_log_of_another_user_is_not_replaced_by_one_of_ours():
    logs = place()
    (logs / "a.log").write_text("one\n")
    (logs / "a.log").chmod(0o666)
    os.chown(logs, 65534, 65534)
    with somebody_else():
        with pytest.raises(rotate_logs.LogError, match="belongs to another user"):
            rotate(logs)
        assert rotate(logs, method="copytruncate")[1].volume == 1
    assert (logs / "a.log").stat().st_uid == 0
    assert content(logs) == b"one\n"


def test_names_of_logs_may_be_hostile(logs):
    for name in HOSTILE:
        with open(os.path.join(os.fsencode(logs), name[:200] + b".log"), "w") as file:
            file.write("x")
    assert rotate(logs)[0] == f"{len(HOSTILE)} of {len(HOSTILE)} logs rotated"
    assert len(os.listdir(logs)) == 2 * len(HOSTILE)
    assert sum(name.endswith(".gz") for name in os.listdir(logs)) == len(HOSTILE)


@pytest.mark.parametrize("method", ["rename", "copytruncate"])
def test_a_full_disk_loses_nothing(logs, method):
    wanted = os.urandom(250_000)
    (logs / "a.log").write_bytes(wanted)
    with room_for(100_000), pytest.raises(rotate_logs.LogError, match="File too large"):
        rotate(logs, method=method)
    assert content(logs) == wanted
    assert not list(logs.glob("*.unfinished"))
    rotate(logs, method=method)
    assert content(logs) == wanted
    assert (logs / "a.log").read_bytes() == b""


STEPS = ["rename", "fsync", "unlink", "ftruncate", "fchmod", "utime"]


@pytest.mark.parametrize("method", ["rename", "copytruncate"])
def test_killed_between_any_two_steps_it_loses_nothing(logs, method):
    """Each round is killed one step later, until one gets through."""
    for step in range(40):
        (logs / "a.log-20200101-000000").write_text("0\n")
        (logs / "a.log").write_text("1\n")
        pid = os.fork()
        if pid == 0:
            try:
                kill_at(step)
                rotate(logs, method=method)
                os._exit(0)
            finally:  # it must not go on as a second process of the tests
                os._exit(1)
        killed = os.waitpid(pid, 0)[1]
        assert killed in (0, signal.SIGKILL)
        (logs / "a.log").touch()  # as its writer would
        assert set(content(logs).splitlines()) == {b"0", b"1"}, step
        rotate(logs, method=method, state={"seen": {}})  # the next run tidies up
        lines = content(logs).splitlines()
        assert lines == [b"0", b"1"] or (method == "copytruncate" and lines == [b"0", b"1", b"1"])
        if not killed:
            break
        for path in logs.iterdir():
            path.unlink()
    assert step > 5
    assert lines == [b"0", b"1"]


def kill_at(step):
    """Let this process die before its step of that number."""
    left = [step]

    def counted(function):
        def call(*args, **options):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **options)

        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def test_rotate_logs_works_as_a_task_with_an_example_of_the_readme(site, logs):
    (logs / "app.log").write_bytes(b"x" * 11_000_000)
    Chore(site, "rotate_logs.py")
    changes = {"/srv/app/log": logs, "/srv/app/app.pid": logs / "pid"}
    site.write("rotate_app.toml", example("rotate_app.toml", changes))
    said = site.run("run", "rotate_app")
    assert "1 of 1 logs rotated" in said.stdout + said.stderr, said
    assert len(list(logs.glob("app.log-*.gz"))) == 1


def test_a_log_that_is_not_there_is_said(logs):
    with pytest.raises(ValueError, match="options.files: there is no such file; mend the paths"):
        rotate(logs)


GOOD_LOGS = {"files": ["/srv/app/log/*.log"], "older_than": "1 d"}


BAD_ROTATE_LOGS = [
    ("files", {"files": []}),
    ("files", {"files": ["log/a.log"]}),
    ("method", {"method": "copy"}),
    ("older_than", {"older_than": "daily"}),
    ("older_than", {"older_than": ""}),
    ("keep", {"keep": 0}),
    ("pid_file", {"pid_file": "app.pid"}),
    ("pid_file", {"method": "copytruncate", "pid_file": "/run/app.pid"}),
    ("signal", {"signal": "KILL"}),
    ("command", {"command": ["/does/not/exist"]}),
]


def test_a_bad_option_of_rotate_logs_is_one_clear_line():
    for key, options in BAD_ROTATE_LOGS:
        assert refused(rotate_logs, GOOD_LOGS, options) == key, options


# -- disk_space


def disk(folder, **options):
    defaults = {"paths": "", "limits": "", "min_free_percent": 0, "min_free_inodes_percent": 0}
    return run_shell("disk_space.sh", folder, **{**defaults, **options})


def test_disks_with_room_are_well(tmp_path):
    code, said, report = disk(tmp_path, paths="/ /tmp", limits=" /=1K ,/tmp=0%")
    assert code == 0
    assert len(re.findall(r"(?m)^/\S*: \d+ % free$", said)) == 5
    assert re.fullmatch(r"least free: \d+ %", report["message"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_free_percent": 101}, "less than 101 % free: "),
        ({"min_free_inodes_percent": 101, "paths": "/dev/shm"}, "less than 101 % of the inodes"),
        ({"limits": "/=9999T"}, "less than 9999T free: /"),
        ({"limits": "/tmp=1K, /dev/shm=9999T"}, "less than 9999T free: /dev/shm"),
        ({"paths": "/does/not/exist"}, "/does/not/exist: cannot be asked; mend the path"),
        ({"paths": "-rf"}, "-rf: cannot be asked; mend the path"),
        ({"limits": "/*=1K"}, "/*: cannot be asked; mend the path"),
    ],
)
def test_a_disk_that_is_nearly_full_fails(tmp_path, options, words):
    code, said, report = disk(tmp_path, **options)
    assert (code, words in said) == (1, True), said
    assert "message" in report


BAD_DISK_SPACE = [
    ("min_free_percent", "5 %"),
    ("min_free_percent", "-1"),
    ("min_free_inodes_percent", "few"),
    ("limits", "/srv"),
    ("limits", "/srv=10"),
    ("limits", "/srv=100%"),
    ("limits", "=10%"),
    ("limits", "/srv=ten%"),
]


def test_a_bad_option_of_disk_space_is_one_clear_line(tmp_path):
    for key, value in BAD_DISK_SPACE:
        code, said, _ = disk(tmp_path, **{key: value})
        assert code == 1
        assert said.splitlines()[-1].startswith(f"options.{key}: ")
    assert disk(tmp_path, limits="/=0%,")[0] == 0  # what ends with a comma is meant well


DF = """#!/bin/sh
case "$*" in
*-i*) echo "Filesystem      Inodes IUsed IFree IUse% Mounted on"
    echo "a name              100    97     3   97% $4" ;;
*) echo "Filesystem     1024-blocks      Used  Available Capacity Mounted on"
    echo "a name           5000000000 4500000000  300000000      94% $4" ;;
esac
"""


@pytest.mark.parametrize("shell", ["dash", "busybox"])
def test_a_disk_is_measured_as_df_does_it_whatever_it_is_called(tmp_path, shell):
    """A part of this one is for root only, so that less than a tenth is free for others."""
    programs = place()
    (programs / "df").write_text(DF)
    (programs / "df").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    options = {"path": path, "shell": [*needs(shell), *(["sh"] if shell == "busybox" else [])]}
    disks = {"limits": "/a disk=6%, /b=287G", "min_free_percent": 6, "min_free_inodes_percent": 4}
    code, said, report = disk(tmp_path, **disks, **options)
    assert code == 1
    assert "/a disk: 6 % free\n" in said
    assert "of the inodes free: /a disk" in said
    assert "less than 287G free: /b" in said
    assert said.count("less than") == 4  # with the inodes of three places
    assert report["message"] == "least free: 6 %"
    assert "less than 7 % free: " in disk(tmp_path, min_free_percent=7, **options)[1]


def test_it_takes_the_place_of_the_shipped_one(site):
    shutil.copy(PROGRAM.parent / "tasks.d" / "disk_space.sh", site.tasks)
    assert site.run("run", "disk_space").returncode == 0
    chore = Chore(site, "disk_space.sh")
    line = re.search(r"(?m)^    task.disk_space.options.limits = (.*)$", README)[1]
    limits = line.strip('"').replace("/srv=10%", "/=1K").replace("/var/backups=20G", "/tmp=1K")
    chore.set(limits=limits, min_free_percent=0, min_free_inodes_percent=0)
    assert chore.outcome() == "done", chore.said


# -- all of them


@pytest.mark.parametrize("name", ["purge_files", "rotate_logs"])
def test_the_options_in_the_file_are_the_defaults(name):
    assert defaults_in(f"{name}.py") == defaults_of(load(name))
