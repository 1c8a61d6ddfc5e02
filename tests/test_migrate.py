"""Moving in from cron and four systems, and out to cron, systemd and Kubernetes.

Oracles: crontab(1), sh, mysqldump, a real server, systemd-analyze, the schema of Kubernetes, and
for minutes the oracle of test_schedule, croniter, and Magento's rules written down once more.

With many more examples: BGTASKS_FULL=1 python -m pytest tests/test_migrate.py"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import migrate_tables
import pytest
import sql_servers
from conftest import PROGRAM
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_schedule import needs_croniter, oracle_fires

import bgtasks

pytestmark = pytest.mark.unmeasured
FOLDER = PROGRAM.parent / "contrib" / "migrate"
README = (FOLDER / "README.md").read_text()
sys.path.insert(0, str(FOLDER))
import crontabs  # noqa: E402 - it lies beside the program, as its users have it
import drafts  # noqa: E402
import leaving  # noqa: E402
import migrate as program_code  # noqa: E402
import systems  # noqa: E402

FULL = bool(os.environ.get("BGTASKS_FULL"))
PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin"
UTC = bgtasks.Zone("UTC")
WEEKS = 14 * 86400
MONDAY = 1_771_804_800  # 2026-02-23: two weeks with the end of a month


def program(name):
    """Return where a program lies. Elsewhere it may be missing, on CI it may not."""
    found = shutil.which(name, path=PATHS)
    if not found and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed")
    assert found, f"{name} is not installed"
    return found


def package(name):
    if not importlib.util.find_spec(name) and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def migrate(*args, code=0, **options):
    """Run the program: here, which spares seconds, or as a process if that needs options."""
    words = list(map(str, args))
    if options:
        command = [sys.executable, str(FOLDER / "migrate.py"), *words]
        done = subprocess.run(command, check=False, capture_output=True, timeout=120, **options)
    else:
        streams = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in "12"]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                ended = program_code.main(words)
            except SystemExit as error:  # by argparse
                ended = error.code
        done = subprocess.CompletedProcess(words, ended, *(s.buffer.getvalue() for s in streams))
    assert done.returncode == code, done
    return done


def said(done):
    return done.stdout.decode("utf-8", "backslashreplace")


def move_in(folder, table, what="crontab"):
    """Write a table, let its tasks be written, and return the new installation."""
    path = folder / "table"
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    done = migrate(what, path, "--to", folder / "new")
    return Moved(folder / "new", said(done))


class Moved:
    """An installation that was written."""

    def __init__(self, folder, report):
        self.folder, self.report = folder, report
        self.params = folder / "cron.params"
        self.tasks = folder / "tasks.d"
        if not self.params.exists():
            self.params.touch(mode=0o600)

    def bgtasks(self, *args, **options):
        command = [sys.executable, str(PROGRAM), f"--param_file={self.params}", *args]
        return subprocess.run(command, capture_output=True, check=False, timeout=120, **options)

    def task(self, name):
        return self.all()[name].settings

    def all(self):
        given = bgtasks.read_settings({"param_file": str(self.params)}, str(PROGRAM))
        return {task.name: task for task in bgtasks.discover(given, {})[0]}

    def run(self, name, **env):
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder), **env}
        done = self.bgtasks("run", name, "--force", env=env)
        return done.returncode, done.stdout


def minutes(text, start=MONDAY, seconds=WEEKS, zone=UTC):
    """Return the minutes at which bgtasks starts a schedule."""
    schedule, moment, found = bgtasks.parse_schedule(text, zone), start - 1, []
    while (moment := schedule.next_after(moment)) is not None and moment < start + seconds:
        found.append(int(moment))
    return found


# --- Crontabs


@needs_croniter
@pytest.mark.parametrize(
    "line",
    [
        "*/5 * * * *",
        "0,30 8-18/2 * * mon-fri",
        "5 4 * * sun",
        "30 4 1,15 * 5",
        "30 4 */2 * 5",
        "0 0 * * 7",
        "0 0 * * 5-7",
        "15 14 1 * *",
        "0 0 3-9 MAR Tue",
        "10-50/20 23 * 1-12/2 *",
        "007 03 2 03 *",
        "0 9 * * 0-6/3",
    ],
)
def test_a_line_fires_at_the_same_minutes_as_in_cron(tmp_path, line):
    span = [(utc, utc) for utc in range(MONDAY // 60, (MONDAY + WEEKS) // 60)]
    expected = oracle_fires(line.lower(), span)
    moved = move_in(tmp_path, f"{line} true\n")
    assert minutes(moved.task("command")["schedule"]) == expected
    assert expected


def crontab_takes(folder, text):
    """Tell whether Debian's crontab takes a table; -n only looks."""
    path = folder / "looked_at"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    command = [program("crontab"), "-n", str(path)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode in (0, 1), done
    return done.returncode == 0


FIELD = st.text("0123456789*/-,;x", min_size=1, max_size=6) | st.sampled_from(
    ["*", "*/7", "0", "mon", "Sun-tue", "jan", "MAR-5", "7", "31", "60", "5/10", "1,2,3-9/3", "@"]
)


@needs_croniter
def test_what_crontab_takes_is_written_as_it_is_or_paused(tmp_path):
    program("crontab")

    @given(st.lists(FIELD, min_size=5, max_size=5))
    @settings(max_examples=600 if FULL else 60)
    def look(fields):
        times = " ".join(fields)
        haul = crontabs.read_crontab("t", f"{times} true\n".encode(), user_column=False)
        if fields[0].startswith("@") or not crontab_takes(tmp_path, f"{times} true\n"):
            return
        (draft,) = haul.drafts
        schedule = draft.settings["schedule"]
        assert schedule == times or (schedule, draft.settings["enabled"]) == ("manual", False)
        assert schedule == times or f"is written as paused: {times}: schedule" in draft.notes[0]

    look()


@pytest.mark.parametrize(
    "line",
    ["60 * * * * x", "* * * * x", "* * * * * * x", "@noon x", "x", "0 0 31 2 * x", "0 0 * * 5-1 x"],
)
def test_what_never_ran_in_cron_is_named_and_does_not_run(tmp_path, line):
    moved = move_in(tmp_path, f"0 0 * * * true\n{line}\n")
    others = [task for name, task in moved.all().items() if name != "command"]
    assert not [task for task in others if task.error or task.settings["enabled"]]
    assert (
        re.search("table, line 2: .*; not carried over\n", moved.report)
        if not others
        else (f"    is written as paused: {line[:-2]}: schedule" in moved.report)
    )


COMMANDS = {  # the line, and what cron gives to sh: command and stdin (do_command.c)
    rb"""echo "it's" 'a "b"' $(echo \$HOME) `echo \\\\`""": (
        rb"""echo "it's" 'a "b"' $(echo \$HOME) `echo \\`""",
        b"",
    ),
    rb"date +\%Y-\%m; echo 100\%": (b"date +%Y-%m; echo 100%", b""),
    rb"cat%first%%third \% \n %": (b"cat", b"first\n\nthird % \\n \n"),
    rb"cat; echo end%INPUT%INPUT_%$HOME `no`": (b"cat; echo end", b"INPUT\nINPUT_\n$HOME `no`\n"),
    b"echo \xc3\xbc \xe4\xff \xf0\x9f\x98\x80\t.": (
        b"echo \xc3\xbc \xe4\xff \xf0\x9f\x98\x80\t.",
        b"",
    ),
    b"echo a # not said": (b"echo a # not said", b""),
    b"echo end\\": (b"echo end\\", b""),
    b"# nothing": (b"# nothing", b""),
    b"echo 'two  blanks'  ": (b"echo 'two  blanks'  ", b""),
    b"pwd; exit 7": (b"pwd; exit 7", b""),
    b"echo one; sh -c 'exit 3' && echo two": (b"echo one; sh -c 'exit 3' && echo two", b""),
    b"printf '%s' \"$SAID\"": (b"printf '", b's\' "$SAID"\n'),
    b'"$SAY" a; echo $SAID': (b'"$SAY" a; echo $SAID', b""),
    b"echo x\r": (b"echo x\r", b""),
}


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_commands_arrive_byte_for_byte(tmp_path, shell):
    head = f"SHELL={shell}\nSAY=echo\nSAID = \" two  'words' \\\\ \" \n"
    lines = b"".join(b"0 0 * * * " + line + b"\n" for line in COMMANDS)
    moved = move_in(tmp_path, head.encode() + lines)
    names = [
        re.search(r", line \d+: (\w+),", line)[1]
        for line in moved.report.splitlines()[: len(COMMANDS)]
    ]
    env = {"HOME": str(moved.folder), "SAY": "echo", "SAID": " two  'words' \\\\ "}
    for name, (line, (command, data)) in zip(names, COMMANDS.items()):
        content = next(moved.tasks.glob(f"{name}.*")).read_bytes()
        assert command in content, line
        # what sh does with the command, and what the task does, by bgtasks
        done = subprocess.run(
            [shell, "-c", command],
            input=data,
            capture_output=True,
            cwd=moved.folder,
            env={"PATH": os.environ["PATH"], **env},
            check=False,
        )
        started = [str(moved.tasks / f"{name}.sh")]
        ours = subprocess.run(
            started,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=moved.tasks,
            env={"PATH": os.environ["PATH"], **env},
            check=False,
        )
        assert (ours.stdout, ours.returncode) == (done.stdout, done.returncode), line


@needs_croniter
def test_a_moved_task_runs(tmp_path):
    moved = move_in(
        tmp_path, 'NAME = my  value\n# Say it\n0 0 * * * pwd; echo "$NAME"; cat; exit 3%in%put\n'
    )
    assert moved.bgtasks("lint").returncode == 0
    code, out = moved.run("say_it")
    assert out == f"{moved.folder}\nmy  value\nin\nput\n".encode()
    assert code == 1
    assert moved.task("say_it")["description"] == "Say it"


@needs_croniter
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_a_wake_up_runs_what_cron_would_have_run(site, tmp_path, shell):
    """Same shell, same folder, same input, same environment: cron's, and what the table adds."""
    by_cron = {"HOME": str(tmp_path), "LOGNAME": "me", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}
    table = f"SHELL={shell}\nPATH=/usr/sbin:/usr/bin:/bin\nMAILTO=\"\"\nX=$HOME 'a' \\\n"
    seen = "pwd; cat; env; readlink /proc/$$/exe"
    moved = move_in(tmp_path, f"{table}* * * * * ({seen}) >seen%in \\%put%\n")
    (task,) = moved.tasks.iterdir()
    shutil.copy(task, site.tasks)
    ahead = site.movable_clock()
    for seconds in ("0", "61"):
        ahead.write_text(seconds)
        subprocess.run(
            site.command("--cron_max_execution_time=0"), env=by_cron, check=True, timeout=120
        )
    given = {"SHELL": shell, "PATH": "/usr/sbin:/usr/bin:/bin", "MAILTO": "", "X": "$HOME 'a' \\"}
    folder, data, *lines, program_file = (tmp_path / "seen").read_text().splitlines()
    assert (folder, data) == (str(tmp_path), "in %put")
    assert program_file == os.path.realpath(shell)
    env = dict(line.split("=", 1) for line in lines)
    own = {key for key in env if key.startswith("BGTASKS_")} | {"_", "PWD", "OLDPWD", "SHLVL"}
    own.add("LC_CTYPE")  # Python sets it for itself where no language is set (PEP 538)
    assert {key: env[key] for key in env if key not in own} == {**by_cron, **given}


@given(
    st.lists(st.sampled_from([b"\\", b"%", b"a", b" ", b"'", b"\xff"]), max_size=12).map(b"".join)
)
def test_any_command_goes_out_as_it_came_in(line):
    command, data = crontabs.cron_input(line)
    assert crontabs.cron_input(leaving.as_cron_text(command, data)) == (command, data)


@needs_croniter
def test_another_shell_gets_the_command_as_one_word(tmp_path):
    shell = tmp_path / "my shell"
    shell.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    shell.chmod(0o755)
    moved = move_in(tmp_path, f'SHELL={shell}\n0 0 * * * it\'s "1" \\% a\\\n')
    assert moved.run("it")[1] == b'<-c><it\'s "1" % a\\>\n'
    assert moved.task("it")["env"]["SHELL"] == str(shell)


@needs_croniter
def test_secrets_of_a_crontab_stand_in_the_param_file_only(tmp_path):
    moved = move_in(tmp_path, "DB_PASSWORD='s3 \"hush'\n0 0 * * * test ${#DB_PASSWORD} = 8\n")
    for path in [moved.folder, *moved.folder.rglob("*")]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
        if path.is_file() and path != moved.params:
            assert "hush" not in path.read_text(), path
    assert moved.run("DB_PASSWORD")[0] == 0
    shown = said(migrate("crontab", tmp_path / "table", "--dry_run"))
    assert "task.DB_PASSWORD.env.DB_PASSWORD = ...\n" in shown
    assert "hush" not in shown


def test_what_cannot_be_carried_over_is_said(tmp_path):
    table = (
        "MAILTO=a b@c\nBGTASKS_TASK=x\nCRON_TZ=Nowhere/Land\nX_TOKEN='it\"s'\nOLD=\xe4\n"
        "@reboot up\n0 0 * * * cat%# /// script\n"
    ).encode("latin-1")
    moved = move_in(tmp_path, table)
    assert list(moved.all()) == ["up"]
    for text in (
        "MAILTO is not carried over: 'a b@c' is no mail address",
        "BGTASKS_TASK is not carried over: such names belong to bgtasks",
        "CRON_TZ is not carried over: timezone: unknown zone 'Nowhere/Land'",
        "OLD is not carried over: it is not UTF-8",
        "table, line 6: up, manual\n    BGTASKS_TASK",
        "    @reboot: bgtasks starts nothing at boot",
        "table, line 7: has a line '# /// script', which begins the settings of a task",
    ):
        assert text in moved.report
    assert moved.task("up")["env"]["X_TOKEN"] == 'it"s'


@needs_croniter
def test_a_zone_for_the_schedule_is_kept(tmp_path):
    moved = move_in(tmp_path, "CRON_TZ=Asia/Tokyo\n30 7 * * mon true\n")
    assert moved.task("command")["timezone"] == "Asia/Tokyo"
    assert "Debian's cron does not" in moved.report


@pytest.mark.parametrize(
    ("table", "notify"),
    [
        ("MAILTO=root\n", ["root"]),
        ("MAILTO=a@b.c, d\n", ["a@b.c", "d"]),
        ('MAILTO=""\n', []),
        ("", None),
    ],
)
def test_who_was_mailed_is_told(tmp_path, table, notify):
    moved = move_in(tmp_path, f"{table}@daily true\n")
    assert moved.task("command")["notify"] == notify


def test_names_are_valid_and_no_two_are_the_same(tmp_path):
    commands = [
        "/x/Backup.sh",
        "/y/backup.sh a",
        "./README.sh",
        "con",
        "-v",
        "ü",
        "cd /srv && php cron.php",
    ]
    commands += [
        "/a/" + "x" * 90,
        "/b/" + "x" * 90,
        "_hidden.sh",
        "FOO=1 nice -n 5 ./a.b.c",
        "run.old",
    ]
    moved = move_in(tmp_path, "".join(f"@daily {command}\n" for command in commands))
    files = sorted(path.name for path in moved.tasks.iterdir())
    assert len(files) == len({file.lower() for file in files}) == len(commands)
    assert not [file for file in files if bgtasks.ignored_because(file)]
    assert {"Backup.sh", "backup_2.sh", "task_README.sh", "task_con.sh", "cron.sh"} <= set(files)
    assert moved.bgtasks("lint").returncode == 0


def test_the_tables_of_cron_d_name_a_user(tmp_path):
    folder = tmp_path / "cron.d"
    folder.mkdir()
    (folder / "app").write_text(
        "PATH=/bin\n@hourly\twww-data\techo  a\n0 3 * * * root * b\n0 3 * * * ../x c\n"
        "# Clean up\n0 4 * * * www-data rm x\n"
    )
    (folder / "app.dpkg-old").write_text("* * * * * root old\n")
    done = migrate("system_crontab", *sorted(folder.iterdir()), "--to", tmp_path / "new")
    files = {
        str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*") if p.is_file()
    }
    assert files == {
        "MIGRATED.txt",
        "root/tasks.d/command.sh",
        "www-data/tasks.d/clean_up.sh",
        "www-data/tasks.d/command.sh",
    }
    assert "app.dpkg-old: is left out: cron reads no file of this name" in said(done)
    assert "line 4: bad username '../x', which cron refuses too; not carried over" in said(done)
    assert "folder www-data: an installation for this user; chown -R www-data it" in said(done)
    assert b"\necho  a\n" in (tmp_path / "new/www-data/tasks.d/command.sh").read_bytes()


@needs_croniter
def test_an_anacrontab(tmp_path):
    table = (
        "SHELL=/bin/bash\nMAILTO=root\nSTART_HOURS_RANGE=6-22\nRANDOM_DELAY=10\n\n# all\n"
        "1 5 cron.daily echo %daily; \\\npwd\n7\t10\tcron.weekly\ttrue\n@monthly 15 m true\n"
        "@weekly 0 w true\nx y z\n"
    )
    if shutil.which("anacron", path=PATHS):
        (tmp_path / "t").write_text(table.replace("@weekly 0 w true\nx y z\n", ""))
        subprocess.run([program("anacron"), "-T", "-t", tmp_path / "t"], check=True)
    moved = move_in(tmp_path, table, "anacrontab")
    assert moved.run("cron_daily")[1] == b"%daily\n/\n"
    tasks = {name: task.settings for name, task in moved.all().items()}
    assert {name: tasks[name]["schedule"] for name in tasks} == {
        "cron_daily": "every 1 d",
        "cron_weekly": "every 7 d",
        "m": "0 6 1 * *",
        "w": "every 7 d",
    }
    assert [tasks[name]["order"] for name in tasks] == [5, 10, 15, 0]
    assert tasks["w"]["window"] == "06:00-22:00"
    assert "its delay of 5 min is carried over as its order" in moved.report
    assert "all tasks: RANDOM_DELAY is not carried over" in moved.report
    assert "is not understood; not carried over: anacron skips it" in moved.report


# --- The folder


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "t").write_text("@daily true\n")
    for name in ("file", "full", "link"):
        target = tmp_path / name
        if name == "file":
            target.write_text("mine")
        elif name == "link":
            target.symlink_to(tmp_path / "full")
        else:
            target.mkdir()
            (target / "kept").write_text("mine")
        done = migrate("crontab", tmp_path / "t", "--to", target, code=1)
        assert b"is there and not empty; nothing is overwritten: name a new folder\n" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    migrate("crontab", tmp_path / "t", "--to", tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "link", "t"]


def test_a_dry_run_writes_nothing(tmp_path):
    done = migrate("crontab", "-", "--dry_run", input=b"@daily echo \xff\n", cwd=tmp_path)
    assert not os.listdir(tmp_path)
    assert "--- tasks.d/command.sh\n#!/bin/sh\n" in said(done)
    assert "\necho \\xff\n" in said(done)


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    (tmp_path / "nul").write_bytes(b"@daily a\0b\n")
    (tmp_path / "t").write_text("@daily true\n")
    for args, text in (
        (("crontab", tmp_path / "none", "--dry_run"), "none: cannot be read (No such file"),
        (("crontab", tmp_path, "--dry_run"), "cannot be read (Is a directory)"),
        (("crontab", tmp_path / "nul", "--dry_run"), "nul: holds a NUL byte, so it is no crontab"),
        (("crontab", tmp_path / "t", "--to", tmp_path / "no/new"), "cannot be written (No such"),
        (("crontab", tmp_path / "t", "--to", tmp_path / "t/new"), "cannot be written (Not a dir"),
        (("anacrontab", "--dry_run"), "anacrontab needs one source"),
        (
            ("glpi", tmp_path / "t", "--dry_run"),
            "--root is missing: the folder of glpi, with front/",
        ),
        (("glpi", tmp_path / "t", "--root=/x", "--dry_run"), "has no table glpi_crontasks"),
        (("to_kubernetes", "--dry_run"), "--image is missing"),
        (("to_crontab", tmp_path / "t", "--dry_run"), "reads an installation, no file"),
        (("to_crontab", "--param_file=/none", "--dry_run"), "/none: "),
    ):
        done = migrate(*args, code=1)
        assert done.stderr.count(b"\n") == 1
        assert text.encode() in done.stderr, done.stderr
    migrate("crontab", tmp_path / "t", code=2)


def test_a_table_may_have_any_name_and_hold_anything(tmp_path):
    for number, name in enumerate([b"-to", b"new\nline", b"\xff\xfe", b"a" * 250, b"\xc3\xbc '\""]):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write(
                b"# \xff \x1b[31m \x7f\n\xff=\xff\nMAILTO=\xff\nCRON_TZ=\xff\n@daily \xff;true\n"
            )
        done = migrate("crontab", os.fsdecode(path), "--to", tmp_path / str(number))
        assert b"\x1b" not in done.stdout
        moved = Moved(tmp_path / str(number), said(done))
        assert moved.bgtasks("lint").returncode == 0
        assert b"\n\xff;true\n" in next(moved.tasks.iterdir()).read_bytes()


def test_the_line_that_wakes_bgtasks_is_no_task(tmp_path):
    lines = "*/5 * * * * cd /srv/app && /usr/bin/python3 -m bgtasks # 1\n"
    lines += "@reboot python3 /srv/bgtasks.py run x\n@daily /srv/bgtasks.py.backup.sh\n"
    moved = move_in(tmp_path, lines)
    assert len(moved.all()) == 1
    assert moved.report.count("wakes bgtasks itself; not carried over") == 2


def test_who_kills_it_can_start_again(tmp_path):
    """A line of Python stops it in the middle of writing, and there it is killed."""
    (tmp_path / "t").write_text("".join(f"@daily echo {n}\n" for n in range(50)))
    code = (
        f"import os, signal, sys\nsys.path.insert(0, {str(FOLDER)!r})\nimport migrate\n"
        "left, sync = iter(range(20)), os.fsync\n"
        "def fsync(fd):\n    sync(fd)\n    next(left, None) is None and os.kill(os.getpid(), 9)\n"
        "os.fsync = fsync\nmigrate.main()\n"
    )
    command = [sys.executable, "-c", code, "crontab", tmp_path / "t", "--to", tmp_path / "new"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    migrate("crontab", tmp_path / "t", "--to", tmp_path / "new")
    assert len(os.listdir(tmp_path / "new/tasks.d")) == 50


def test_an_output_that_takes_nothing_is_one_line(tmp_path):
    (tmp_path / "t").write_text("@daily true\n" * 9000)
    command = [sys.executable, str(FOLDER / "migrate.py"), "crontab", tmp_path / "t", "--dry_run"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    said_of_it = b"migrate.py: the output cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, said_of_it)
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.stdout.close()
    assert (reader.wait(60), reader.stderr.read()) == (1, b"")
    reader.stderr.close()


def test_an_empty_table_is_an_empty_installation(tmp_path):
    moved = move_in(tmp_path, "")
    assert moved.report == "0 tasks found\n"


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """The kernel takes no more than 20 kB of a file, as a full disk or a quota does."""
    (tmp_path / "t").write_text(f"@daily true\n@daily echo {'x' * 30_000}\n")
    code = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2)\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\nimport migrate\nsys.exit(migrate.main())\n"
    )
    command = [sys.executable, "-c", code, "crontab", tmp_path / "t", "--to", tmp_path / "new"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"new: cannot be written (File too large)" in done.stderr
    assert os.listdir(tmp_path) == ["t"]


def test_a_large_table_is_read_in_time(tmp_path):
    lines = "".join(f"{n % 60} {n % 24} * * * /srv/bin/job_{n}.sh --x\n" for n in range(2000))
    (tmp_path / "t").write_text(lines)
    assert said(migrate("crontab", tmp_path / "t", "--dry_run")).endswith(
        "cron: pip install croniter\n"
    )


# --- Task tables


ROOTS = {
    "itop": "/var/www/itop",
    "glpi": "/var/www/glpi",
    "magento": "/srv/shop",
    "privacyidea": "",
}


@contextmanager
def database(folder):
    """A MariaDB with the tables of the four systems; yields how clients reach it."""
    reason = sql_servers.missing("mysql")
    if reason and not os.environ.get("CI"):
        pytest.skip(reason)
    with sql_servers.running("mysql") as server:
        server.create("old")
        login = folder / "my.cnf"
        login.write_text(f"[client]\nuser = root\nsocket = {server.socket}\n")
        client = [program("mariadb"), f"--defaults-file={login}", "--default-character-set=utf8mb4"]
        tables = migrate_tables.TABLES + migrate_tables.ROWS
        subprocess.run([*client, "old"], input=tables.encode(), check=True)
        yield login


def test_a_dump_and_the_database_say_the_same(tmp_path_factory):
    folder = tmp_path_factory.mktemp("db")
    with database(folder) as login:
        dump = [program("mysqldump"), f"--defaults-file={login}", "old"]
        for number, options in enumerate(
            ([], ["--complete-insert", "--hex-blob"], ["--skip-extended-insert"])
        ):
            done = subprocess.run([*dump, *options], capture_output=True, check=True)
            (folder / f"{number}.sql").write_bytes(done.stdout)
        for system, root in ROOTS.items():
            live = planned(system, "mysql:old", str(login), root)
            assert len(live.content) > 3
            for path in (*(folder / f"{number}.sql" for number in range(3)), handmade(folder)):
                assert planned(system, str(path), "", root) == live
        refused = ["mysql:none", f"--defaults_file={login}", "--root=/x", "--dry_run"]
        assert (
            b"mysql:none: Unknown database 'none'"
            in migrate("glpi", *refused, code=1, cwd=folder).stderr
        )
    gone = ["mysql:old", f"--defaults_file={login}", "--root=/x", "--dry_run"]
    gone = migrate("glpi", *gone, code=1, cwd=folder)
    assert gone.stderr.startswith(b"migrate.py: mysql:old: Can't connect")
    missing = ["mysql:old", f"--defaults_file={folder}/none", "--root=/x", "--dry_run"]
    assert (
        b"is missing; it names host, user and password" in migrate("glpi", *missing, code=1).stderr
    )


def planned(system, source, login, root):
    return drafts.files_of(systems.read_system(system, source, login, root))


def handmade(folder):
    """A dump as a person may write it: its rows are not yet what a server made of them."""
    path = folder / "handmade.sql"
    rows = re.sub(
        r"(?m)^INSERT INTO `glpi_crontasks`",
        "INSERT IGNORE INTO old.`glpi_crontasks`",
        migrate_tables.ROWS,
    )
    path.write_text(migrate_tables.TABLES + rows)
    return path


def move_system(folder, system, *args):
    done = migrate(
        system, handmade(folder), f"--root={ROOTS[system]}", "--to", folder / "new", *args
    )
    moved = Moved(folder / "new", said(done))
    lint = moved.bgtasks("lint")
    assert lint.returncode == 0, lint.stdout
    return moved


def test_itop(tmp_path):
    moved = move_system(tmp_path, "itop")
    tasks = moved.all()
    assert {
        name: (task.settings["schedule"], task.settings["enabled"]) for name, task in tasks.items()
    } == {
        "ExecAsyncTask": ("every 2 s", True),
        "BackupExec": ("daily 23:30", True),
        "Sync": ("every 10 min", False),
        "SwitchedOff": ("manual", False),
        "NeverRan": ("manual", True),
    }
    options = {"root": "/var/www/itop", "class": "Vendor\\Sync", "user": "admin"}
    assert tasks["Sync"].settings["options"] == options
    for text in (
        "class Gone: iTop has it no more; not carried over",
        "by its 60 runs, it comes every 10 min; look for GetPeriodicity()",
        "days and time are a guess",
        "its table does not say how often it runs",
        "it is switched off in iTop's configuration",
    ):
        assert text in moved.report


ITOP = {
    "approot.inc.php": "<?php const APPROOT = __DIR__.'/', READONLY_MODE_FILE = __DIR__.'/ro';",
    "application/application.inc.php": "<?php function said() { return 'application'; }",
    "core/background.inc.php": "<?php interface iProcess { public function Process($limit); }",
    "application/startup.inc.php": """<?php
        class ContextTag {
            const TAG_CRON = 'CRON';
            public function __construct($tag) { echo "$tag\n"; }
        }
        class UserRights { static function Login($user) { return $user === 'admin'; } }
        class CMDBObject { static function SetCurrentChangeFromParams($text) { echo "$text\n"; } }
        class NeverRan implements iProcess {
            public function Process($limit) { return $limit > time() ? 'in time' : 'late'; }
        }
    """,
}


def test_a_process_of_itop_runs(tmp_path, monkeypatch):
    """The files and classes of iTop that its own cron.php uses, without what they do."""
    program("php")
    root = tmp_path / "itop"
    for name, text in ITOP.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setitem(ROOTS, "itop", root)
    moved = move_system(tmp_path, "itop")
    code, out = moved.run("NeverRan")
    assert (code, out.decode()) == (
        0,
        "CRON\nBackground task (NeverRan)\nCRON:Task:NeverRan\nin time\n",
    )
    assert moved.run("Sync")[0] == 1  # there is no such class
    (root / "ro").touch()
    assert b"in maintenance" in moved.run("NeverRan")[1]
    shutil.rmtree(root)
    assert b"option root: there is no approot.inc.php in '" in moved.run("NeverRan")[1]


def test_glpi(tmp_path):
    moved = move_system(tmp_path, "glpi")
    tasks = {name: task.settings for name, task in moved.all().items()}
    assert {name: tasks[name]["schedule"] for name in tasks} == {
        "queuednotification": "every 1 min",
        "cartridge": "every 1 d",
        "alertnotclosed": "every 12 h",
        "closeticket": "manual",
        "telemetry": "every 30 d",
        "CleanSoftwareCron_cleanorphans": "every 7 d",
        "PluginFooTask_cleanorphans": "every 90 s",
    }
    assert [name for name in tasks if not tasks[name]["enabled"]] == [
        *("cartridge", "closeticket", "telemetry")
    ]
    assert tasks["alertnotclosed"]["window"] == "22:00-06:00"
    assert tasks["queuednotification"]["maximum"] == 50
    assert tasks["telemetry"]["history_lifetime"] == 10 * 86400
    assert tasks["PluginFooTask_cleanorphans"]["order"] > tasks["cartridge"]["order"]
    command = moved.all()["alertnotclosed"].argv
    assert command == ("php", "/var/www/glpi/front/cron.php", "--force", "alertnotclosed")
    assert "its hours are 8 to 8, in which GLPI never starts it" in moved.report
    assert "its history is kept for 366 days" in moved.report
    assert "is paused: its CLI mode is not allowed (allowmode)" in moved.report
    assert "GLPI says that it runs, and starts it no more if it does not" in moved.report
    assert not tasks["telemetry"]["enabled"]


@needs_croniter
def test_magento(tmp_path, monkeypatch):
    root = tmp_path / "shop"
    (root / "vendor/a/b/etc").mkdir(parents=True)
    (root / "vendor/a/b/etc/crontab.xml").write_text(
        '<config><group id="index"><job name="reindex" instance="X"><schedule>0 1-5/2 * * *'
        '</schedule></job><job name="backup"><config_path>backup/schedule/expr</config_path></job>'
        '<job name="sitemap_generate"><schedule>1 1 1 1 1</schedule></job></group></config>'
    )
    monkeypatch.setitem(ROOTS, "magento", root)
    moved = move_system(tmp_path, "magento")
    tasks = {name: task.settings for name, task in moved.all().items()}
    assert {name: tasks[name]["schedule"] for name in tasks} == {
        "as_it_is": "*/5 * * * *",
        "backup": "15 3 * * 1-5",
        "first_monday": "5 4 * * 1#1",
        "friday_13": "manual",
        "off": "manual",
        "only_seen": "manual",
        "reindex": "0 1,3,5 * * *",
        "sitemap_generate": "0 0 2,4,6,8,10,12,14,16,18,20,22,24,26,28,30 * *",
    }
    disabled = [name for name in tasks if not tasks[name]["enabled"]]
    assert disabled == ["friday_13", "off", "only_seen"]
    assert tasks["reindex"]["group"] == "index"
    assert tasks["sitemap_generate"]["group"] == "index"
    assert tasks["backup"]["timezone"] == "Europe/Berlin"
    assert moved.all()["backup"].argv[:1] == ("n98-magerun2",)
    assert "both its day of month and day of week must match: no schedule says that" in moved.report
    (root / "vendor/a/b/etc/crontab.xml").write_text("<config>")
    broken = migrate("magento", handmade(tmp_path), f"--root={root}", "--dry_run", code=1)
    assert b"crontab.xml: cannot be read (no element found" in broken.stderr


AOE = """<config><crontab><jobs>
<log_clean><schedule><cron_expr>always</cron_expr></schedule><groups>one, two</groups></log_clean>
<no><schedule><cron_expr>1 2 * * *</cron_expr></schedule><is_active>0</is_active></no>
<on><schedule><cron_expr>1 2 * * *</cron_expr></schedule><is_active>0</is_active></on>
<stopped><schedule><cron_expr>1 2 * * *</cron_expr></schedule></stopped>
</jobs></crontab><default><crontab><jobs><told><description>Tell it</description>
<schedule><config_path>told/when</config_path><cron_expr>1 2 * * *</cron_expr></schedule>
<parameters>{"a": 1}</parameters><on_success>on</on_success></told></jobs></crontab></default>
</config>"""
AOE_ROWS = """INSERT INTO `shop_core_config_data` VALUES
(91,'default',0,'crontab/jobs/on/is_active','1'),(92,'default',0,'told/when','3 4 * * *'),
(93,'default',0,'system/cron/disabled_crons','other, stopped'),
(94,'default',0,'general/locale/timezone','Nowhere/Land');
"""


@needs_croniter
def test_magento_1_with_its_scheduler(tmp_path, monkeypatch):
    root = tmp_path / "shop"
    for name in ("app/Mage.php", "shell/scheduler.php", "app/code/core/Mage/Log/etc/config.xml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(AOE)
    monkeypatch.setitem(ROOTS, "magento", root)
    monkeypatch.setattr(migrate_tables, "ROWS", migrate_tables.ROWS + AOE_ROWS)
    moved = move_system(tmp_path, "magento")
    tasks = {name: task.settings for name, task in moved.all().items()}
    assert tasks["log_clean"]["schedule"] == "always"
    assert tasks["log_clean"]["group"] == "one"
    assert "is in one group here, and no more in two" in moved.report
    scheduler = ("php", f"{root}/shell/scheduler.php", "--action", "runNow", "--code", "log_clean")
    assert moved.all()["log_clean"].argv == scheduler
    on = {name: tasks[name]["enabled"] for name in ("no", "on", "stopped", "told")}
    assert on == {"no": False, "on": True, "stopped": False, "told": True}
    assert tasks["no"]["schedule"] == "1 2 * * *"
    assert tasks["told"]["description"] == "Magento: Tell it"
    assert tasks["told"]["schedule"] == "3 4 * * *"
    assert tasks["told"]["options"] == {"parameters": '{"a": 1}'}
    assert not tasks["told"]["timezone"]
    assert "general/locale/timezone is not carried over: timezone: unknown zone" in moved.report
    assert "on_success on: write after = [...] into those tasks" in moved.report


def magento_field(field, value, one):
    """Magento's rules once more: steps count from 0 (Magento 1), or from where a range begins."""
    for part in field.split(","):
        base, slash, step = part.partition("/")
        low, _, high = base.replace("*", "0-60").partition("-")
        high = high or ("60" if slash and not one else low)
        origin = 0 if one else int(low)
        if int(low) <= value <= int(high) and (value - origin) % int(step or 1) == 0:
            return True
    return False


def magento_minutes(text, first, days, one):
    minute, hour, day, month, weekday = text.split()
    found = []
    for date in (first + timedelta(days=n) for n in range(days)):
        pairs = ((day, date.day), (month, date.month), (weekday, date.isoweekday() % 7))
        if all(magento_field(field, value, one) for field, value in pairs):
            hours = [h for h in range(24) if magento_field(hour, h, one)]
            minutes = [m for m in range(60) if magento_field(minute, m, one)]
            found += [int(date.timestamp()) + h * 3600 + m * 60 for h in hours for m in minutes]
    return found


PARTS = st.tuples(
    st.sampled_from(["*", "*/2", "*/7", "0", "5", "1-5", "2-6/2", "3,5", "1/3"]),
    st.sampled_from(["*", "*/5", "3", "0-23/6", "22,23"]),
    st.sampled_from(["*", "*/2", "1-7", "8-14", "2", "1-31", "8-21"]),
    st.sampled_from(["*", "3", "*/3", "1-3"]),
    st.sampled_from(["*", "1", "1-5", "*/2", "0,6", "7"]),
)


@needs_croniter
@given(PARTS, st.booleans())
@settings(max_examples=40)
def test_expressions_of_magento_fire_at_the_same_minutes(fields, one):
    text, first = " ".join(fields), datetime(2026, 2, 25, tzinfo=timezone.utc)
    expected = magento_minutes(text, first, 8, one)
    try:
        ours = systems.read_magento_expression(text, is_one=one)
    except drafts.MigrateError:
        assert "*" not in (fields[2], fields[4])
        return
    assert (minutes(ours, int(first.timestamp()), 8 * 86400) if ours else []) == expected, ours


CRONITER_PARTS = "* */2 1-5 5-1 3 0 2/2 1,4 */1 6-3/2 sun 7 mar".split()


@needs_croniter
@given(st.lists(st.sampled_from(CRONITER_PARTS), min_size=5, max_size=5))
@settings(max_examples=40)
def test_expressions_of_privacyidea_fire_at_the_same_minutes(fields):
    from croniter import croniter

    text, start = " ".join(fields), 1_771_804_800.0
    try:
        times = croniter(text, start - 1)
        expected = [int(times.get_next(float)) for _ in range(30)]
    except ValueError:  # it is no expression, or never comes
        return
    ours, found = systems.read_croniter_expression(text), [start - 1]
    schedule = bgtasks.parse_schedule(ours, UTC)
    while len(found) <= len(expected):
        found.append(schedule.next_after(found[-1]))
    assert found[1:] == expected, ours


@needs_croniter
def test_privacyidea(tmp_path):
    moved = move_system(tmp_path, "privacyidea")
    tasks = {name: task.settings for name, task in moved.all().items()}
    assert {name: (tasks[name]["schedule"], tasks[name]["order"]) for name in tasks} == {
        "count_tokens": ("0 6 * * 1-5", 1),
        "Z_hler": ("*/10 * 1,3,5,7,9,11,13,15,17,19,21,23,25,27,29,31 * 5", 5),
        "impossible": ("manual", 0),
        "it_s": ("0 0-2,22,23 * * 0", 0),
    }
    assert [name for name in tasks if not tasks[name]["enabled"]] == ["Z_hler", "impossible"]
    assert tasks["count_tokens"]["nodes"] == ["pinode1", "pinode2"]
    assert tasks["count_tokens"]["retries"] == 3
    assert tasks["Z_hler"]["retries"] == 0
    assert tasks["Z_hler"]["options"] == {"event_counter": 'a "b"', "api_key": "s3cret-value"}
    assert "s3cret" not in "".join(path.read_text() for path in moved.tasks.iterdir())


@pytest.mark.parametrize(
    ("says", "code"), [("Task exited successfully. Noting", 0), ("did not run", 1)]
)
def test_a_task_of_privacyidea_fails_if_it_says_so(tmp_path, monkeypatch, says, code):
    monkeypatch.setitem(ROOTS, "privacyidea", tmp_path / "opt")
    tool = tmp_path / "opt/bin/privacyidea-cron"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\necho "<$1 $2 $3>" "{says}"\n')
    tool.chmod(0o755)
    moved = move_system(tmp_path, "privacyidea")
    assert moved.run("it_s") == (code, f"<run_manually -t it's> {says}\n".encode())


def test_sqlite_says_the_same_as_a_dump(tmp_path):
    path = tmp_path / "pi.sqlite"
    with sqlite3.connect(path) as db:
        for table in ("periodictask", "periodictaskoption"):
            text = re.search(rf"(?s)CREATE TABLE `{table}` \(.*?\n\)", migrate_tables.TABLES)[0]
            db.execute(text)
            db.execute(re.search(rf"(?s)INSERT INTO `{table}` .*?;\n", migrate_tables.ROWS)[0])
        (tmp_path / "pi.sql").write_text("\n".join(db.iterdump()))
    db.close()
    before = path.read_bytes()
    ours = said(migrate("privacyidea", path, "--dry_run"))
    assert ours == said(migrate("privacyidea", tmp_path / "pi.sql", "--dry_run"))
    assert ours == said(migrate("privacyidea", handmade(tmp_path), "--dry_run"))
    assert path.read_bytes() == before
    path.write_bytes(before[:4096] + b"x" * 4096)
    assert (
        b"pi.sqlite: cannot be read (" in migrate("privacyidea", path, "--dry_run", code=1).stderr
    )


def test_a_dump_may_name_its_columns_without_quotes(tmp_path):
    path = handmade(tmp_path)
    quoted_names = planned("itop", str(path), "", "/x")
    path.write_text(path.read_text().replace("`", ""))
    assert planned("itop", str(path), "", "/x") == quoted_names


HOSTILE = st.text(max_size=9) | st.text("\n\r\x00\x0b\x85\u2028'\"`$#/ \\\\;%a", max_size=9)
HOSTILE |= st.sampled_from(["a\r\n# /// script\r\n", "\n# ///\nx", "# /// script", "$(x)`x`"])


@needs_croniter
@given(HOSTILE, st.sampled_from(["", "api_key", "a b"]), HOSTILE, HOSTILE)
@example("a", "", "b", "\0")
@settings(max_examples=600 if FULL else 30)
def test_no_text_of_a_table_is_more_than_text(tmp_path_factory, name, before, key, value):
    folder, key = tmp_path_factory.mktemp("hostile"), before + key
    row = {"id": "1", "name": name, "active": "1", "interval": "@hourly", "nodes": name}
    row |= {"ordering": "7", "taskmodule": name}
    option = {"periodictask_id": "1", "key": key, "value": value}
    rows = {"periodictask": [row], "periodictaskoption": [option]}
    files = drafts.files_of(systems.read_privacyidea(rows, str(folder)))
    assert not [line for line in files.report if not line.isprintable()]
    paths = [path for path in files.content if path != "cron.params"]
    if "\0" in name or not paths:
        text = "# /// script" if "# /// script" in name else "holds a NUL byte"
        assert text in "".join(files.report)
        return
    drafts.write_folder(str(folder / "new"), files.content)
    moved = Moved(folder / "new", "")
    (task,) = moved.all().values()
    assert (task.error, task.settings["order"]) == ("", 7)
    kept = {} if "is not carried over" in "".join(files.report) else {key: value}
    assert task.settings["options"] == kept
    assert "\0" not in "".join([name, *kept, *kept.values()])  # no process can be given one
    (folder / "bin").mkdir()
    (folder / "bin/privacyidea-cron").write_text('#!/bin/sh\nprintf %s. "$3"\n')
    (folder / "bin/privacyidea-cron").chmod(0o755)
    done = subprocess.run(task.argv, cwd=folder, capture_output=True, check=False)
    assert done.stdout.decode() == f"{name}.\n"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s[: s.index("'closeticket'")], "the dump ends within table glpi_crontasks"),
        (lambda s: s.replace("86400,10,0", "86400,?,0"), 'table glpi_crontasks: b"?,0,1,3,0,24'),
        (lambda s: s.replace("86400,10,0", "86400,0"), "a row has 11 of 12 columns"),
        (lambda s: "COPY public.glpi_crontasks (id) FROM stdin;\n" + s, "is a dump by pg_dump"),
        (lambda s: s + s, "table glpi_crontasks: is in the dump twice; dump only one database"),
        (lambda s: s.replace("`frequency`", "`often`"), "the tables are not those of a glpi"),
        (lambda s: s.replace("86400,10,0", "'x',10,0"), "the tables are not those of a glpi"),
        (
            lambda s: (
                s
                + s.replace("glpi_crontasks`", "a_glpi_crontasks`").replace("TABLE `", "TABLE `b_")
            ),
            "",
        ),
    ],
)
def test_a_bad_dump_is_one_line(tmp_path, change, text):
    path = handmade(tmp_path)
    path.write_text(change(path.read_text()))
    done = migrate("glpi", path, "--root=/x", "--dry_run", code=1 if text else 0)
    assert text in done.stderr.decode()
    assert done.stderr.count(b"\n") == (1 if text else 0)


def test_a_large_dump_is_read_in_time_and_in_little_memory(tmp_path):
    """300 MB: tables that nobody asks for, and a row for each start of Magento's."""
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2)\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\nimport migrate\nsys.exit(migrate.main())\n"
    )
    command = [sys.executable, "-c", code, "magento", "-", "--root=/x", "--dry_run"]
    feed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = b"INSERT INTO `x` VALUES (1,'" + b"x" * 1_000_000 + b"');\n"
    rows = ",".join(f"({n},'job{n % 9}','ok','{'m' * 200}')" for n in range(4000))
    with feed.stdin as pipe:
        pipe.write(
            b"CREATE TABLE `cron_schedule` (\n`id` int,\n`job_code` text,\n`s` int,\n`m` text);\n"
        )
        for _ in range(100):
            pipe.write(other * 2)
        for _ in range(10):
            pipe.write(f"INSERT INTO `cron_schedule` VALUES {rows};\n".encode())
    assert b"\n9 tasks found\n" in feed.stdout.read()
    assert feed.wait(60) == 0
    feed.stdout.close()


# --- Out again


TABLE = """\
PATH=/usr/local/bin:/usr/bin:/bin
MAILTO=me@example.org
*/5 * * * * cd /srv/app && ./bin/sync --all >/dev/null
30 4 1,15 * 5 echo "50\\% of $(date +\\%s)" 'it''s'; cat%Joe,%100\\% you?
@reboot /usr/bin/true
SHELL=/bin/bash
API_TOKEN=s3-cret
@daily backup --token "$API_TOKEN"\\
5 4 * * 0 echo \\. ; cd
MAILTO=""
0 22 * * 1-5 mail -s "It's 10pm" joe%Joe,%%Where are your kids?
"""


@needs_croniter
def test_a_crontab_goes_out_as_it_came_in(tmp_path):
    moved = move_in(tmp_path, TABLE)
    migrate("to_crontab", f"--param_file={moved.params}", "--to", tmp_path / "out")
    assert (tmp_path / "out/crontab").read_text() == TABLE
    assert crontab_takes(tmp_path, TABLE)
    assert moved.bgtasks("pause", "sync").returncode == 0
    shown = said(migrate("to_crontab", f"--param_file={moved.params}", "--dry_run"))
    assert "\n# paused: */5 * * * * cd /srv/app && ./bin/sync --all >/dev/null\n" in shown


SPAN = (MONDAY + 3 * 86400, 4 * 86400)  # over the end of a month


@needs_croniter
def test_what_no_table_of_cron_can_hold_is_a_comment_in_it(tmp_path):
    moved = move_in(tmp_path, "A=1\n0 0 * * * first\n0 1 * * * second\n0 2 * * * third\n")
    for name, value in (("first", "1\n* * * * * x"), ("second", "'\" ")):
        path = moved.tasks / f"{name}.sh"
        path.write_text(path.read_text().replace('"A" = "1"', f'"A" = {json.dumps(value)}'))
    long = "x" * 990
    (moved.tasks / "long.toml").write_text(f'schedule = "daily 03:00"\ncommand = ["{long}"]\n')
    migrate("to_crontab", f"--param_file={moved.params}", "--to", tmp_path / "out")
    table = (tmp_path / "out/crontab").read_text()
    assert crontab_takes(tmp_path, table), table
    cd = f"cd {moved.tasks} && "
    expected = [
        f"# by hand: 0 0 * * * {cd}env 'A=1\\n* * * * * x' {moved.tasks}/first.sh",
        f"0 1 * * * {cd}env 'A='\"'\"'\" ' {moved.tasks}/second.sh",
        f"# by hand: 0 3 * * * {cd}{long}",
        "A=1",
        "0 2 * * * third",
    ]
    assert sorted(table.splitlines()) == sorted(expected)


FIELDS = st.tuples(
    st.sampled_from(["*/20", "0", "59", "1-50/7", "5,10-12", "*/30,7", "00"]),
    st.sampled_from(["*", "*/5", "0", "8-18/2", "22,23", "23"]),
    st.sampled_from(["*", "*/2", "1", "28,1-3", "26-27", "01"]),
    st.sampled_from(["*", "2,3", "feb", "MAR-5", "*/2"]),
    st.sampled_from(["*", "7", "0-7/2", "sun", "Mon-fri", "*/2", "1,5"]),
).map(" ".join)
WORDS = st.text("ab %\\'\"$#`;=\t\xe4", max_size=9).map(lambda text: text.lstrip(" \t%*") or "x")
VARIABLES = st.dictionaries(
    st.sampled_from(["A", "PATH_X", "MY_TOKEN", "SHELL_X"]),
    st.text("ab $#=\\%'", max_size=6).map(str.strip)
    | st.sampled_from([" a ", "it's", '"', "'", "a'b", '1"2']),
    max_size=2,
)


@needs_croniter
@given(st.lists(st.tuples(VARIABLES, FIELDS, WORDS), min_size=1, max_size=3))
@settings(max_examples=400 if FULL else 12)
def test_what_went_in_comes_out_and_runs_at_the_same_minutes(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("round")
    text = ""
    for variables, times, command in lines:
        values = (f"{key}={leaving.cron_value(value)}\n" for key, value in variables.items())
        text += f"{''.join(values)}{times} {command}\n"
    before = crontabs.read_crontab("crontab", text.encode(), user_column=False)
    assert len(before.drafts) == len(lines), before.remarks
    drafts.write_folder(str(folder / "in"), drafts.files_of(before).content)
    (folder / "in/cron.params").touch(mode=0o600)
    out = leaving.leave("to_crontab", str(folder / "in/cron.params"), "").content["crontab"]
    assert crontab_takes(folder, out), out
    after = crontabs.read_crontab("crontab", out, user_column=False)
    again = crontabs.read_crontab("crontab", text.encode(), user_column=False)
    span = [(utc, utc) for utc in range(SPAN[0] // 60, sum(SPAN) // 60)]
    for line, old, new in zip(lines, again.drafts, after.drafts):
        assert new.settings["env"] == old.settings["env"]
        assert command_of(new) == command_of(old)
        assert minutes(new.settings["schedule"], *SPAN) == oracle_fires(line[1].lower(), span)


TEXT = st.text(max_size=8) | st.text("\n\r\t\"'\\%$;` a\x00\x1b\u2028=[]", max_size=8)


def unquoted(text):
    """Return the words of a line of a unit as systemd.syntax(7) tells to read them."""
    assert re.fullmatch(r'(?:"(?:[^"\\]|\\.)*" ?)+', text)
    signs = {"n": "\n", "t": "\t", "r": "\r"}
    words = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    words = [re.sub(r"\\(.)", lambda f: signs.get(f[1], f[1]), word) for word in words]
    return [word.replace("%%", "%") for word in words]


@given(TEXT, TEXT, st.lists(TEXT, max_size=3))
@settings(max_examples=2000 if FULL else 60)
def test_no_text_breaks_out_of_a_unit_or_a_cron_job(about, value, words):
    yaml = package("yaml")
    defaults = {key: default for key, (_, default) in bgtasks.TASK_SETTINGS.items()}
    values = {**defaults, "description": about, "env": {"A": value}, "timeout": 86400.0}
    given = {"by_run": [], "argv": ["x", *words], "by_bgtasks": False}
    task = leaving.Leaving("t", {**values, "schedule": "manual"}, "", b"", **given)
    installed = bgtasks.read_settings({}, "/srv/app/bgtasks.py")
    lines = leaving.service(installed, task, "u", 0).split("\n")
    keys = ["[Unit]", "Description", "", "[Service]", "Type", "WorkingDirectory", "User"]
    keys += ["Environment", "ExecStart", "TimeoutStartSec", ""]
    assert [line.partition("=")[0] for line in lines] == keys
    assert unquoted(lines[7][len("Environment=") :]) == [f"A={value}"]
    assert unquoted(lines[8][len("ExecStart=") :]) == ["x", *(w.replace("$", "$$") for w in words)]
    job = leaving.cron_job(installed, task, "i", "t", "@yearly", "t")
    assert yaml.safe_load("".join(leaving.yaml(job))) == job


GREETING = 'it\'s 100% "$HOME" \\'
SECRET = 'hidden 50% "\\n" \\\n`#;\''
SMILE = "grüßt 😀\u2028\x85"


@pytest.fixture
def left(site):
    """An installation with a task of each kind."""
    every = {"schedule": "every 90 min", "window": "22:00-06:00", "deadline": "1 min"}
    site.python("py", "print('py')", **every)
    report = "echo volume=1 >>$BGTASKS_REPORT"
    site.shell("speaks", report, schedule="daily 07:00,19:30", after=["py"])
    site.shell(
        "plain",
        'echo "$GREETING $PWD"',
        schedule=["weekdays 07:15", "*/10 8-9 * * sat,sun"],
        env={"GREETING": GREETING},
        nice=5,
        retries=7,
        notify=["me@example.org"],
        timezone="Europe/Berlin",
    )
    site.write(
        "command.toml",
        'command = ["printf", "<%s>", "a b", "$(x)", "%d"]\nschedule = "@monthly"\n'
        'memory_limit = "64 MiB"\nmissed_after = "1 h"\ntimeout = "10 min"\n',
    )
    env = {"API_KEY": SECRET, "A": "b"}
    site.shell("hidden", 'echo "$API_KEY"', schedule="5/10 4 * * *", env=env, timeout="30 d")
    site.shell("odd", "true", schedule="every 7 min", ping="https://example.org/x")
    site.shell("seconds", "true", schedule="every 30 s", order=5)
    site.shell("asked", "true", schedule="manual", nodes=["a"])
    site.shell("each", "true", schedule="always", pause_after_failures=3, description="SMILE")
    each = site.tasks / "each.sh"
    each.write_text(each.read_text().replace("SMILE", SMILE))
    site.shell("spread", "true", schedule="H H * * *")
    site.shell("last", "true", schedule="0 0 L * *", on_interrupt="again", maximum=3)
    site.shell("stopped", "true", schedule="0 9 13 * fri", enabled=False, output_limit="1 MiB")
    site.shell("both", "true", schedule="0 9 */2 * fri")
    site.shell("broken", "true", schedule="")
    return site


def leave(site, target, *args):
    done = migrate(target, f"--param_file={site.params}", *args, "--to", site.folder / "out")
    return site.folder / "out", said(done)


LOST = {
    "to_crontab": """
        window 22:00-06:00: a start outside of it is refused (exit code 75)
        after py: it waits for nobody, and is not started by them
        retries 7: that many tries before the next slot do not happen
        timezone Europe/Berlin: cron reads the line in the machine's zone
        memory_limit 67108864
        missed_after 3600 s: how late a start may be is not looked at
        timeout 600 s: nobody ends it when it hangs
        every 7 min: cron has no such period; it comes at */7 * * * *
        every 30 s: cron has no such period; it comes at * * * * *
        ping https://example.org/x: nobody is called
        order 5: tasks that are due together start together
        nodes a: see to it that only these machines start it
        always: it started in each wake-up, now every 5 minutes
        pause_after_failures 3: it goes on failing
        0 0 L * *: L, W and # are not known there
        on_interrupt again: it waits for its next slot
        maximum 3: it is not told how many items to treat
        output_limit 1048576: its output is not cut
        notify me@example.org: nobody is told when it fails
        only starts when it is asked to: its line is a comment
        broken: is broken and left out: broken.sh: has no schedule
    """,
    "to_systemd": """
        window 22:00-06:00: a start outside of it is refused (exit code 75)
        after py: it waits for nobody, and is not started by them
        retries 7: that many tries before the next slot do not happen
        secrets: put bgtasks-hidden.env into /etc/bgtasks, readable by root only
        missed_after: a start that is late is made up for, however late
        has no timer: start it by systemctl start bgtasks-asked.service
        is paused: leave bgtasks-stopped.timer disabled
    """,
    "to_kubernetes": """
        after py: it waits for nobody, and is not started by them
        secret: kubectl create secret generic hidden --from-file=API_KEY=FILE
        is 2 CronJobs, which can run at the same time
        nice 5
        0 9 */2 * 5: Kubernetes starts it if one of the days matches, not both
    """,
}


@needs_croniter
@pytest.mark.parametrize("target", LOST)
def test_it_says_what_is_lost(left, target):
    _, report = leave(left, target, "--image=x")
    for line in filter(None, map(str.strip, LOST[target].splitlines())):
        assert line in report, report[-1500:]
    kept = leaving.KEPT[target]
    assert ("memory_limit" in report) == ("memory_limit" not in kept)
    assert ("deadline" in report) is False  # bgtasks run still looks at it


def command_of(draft):
    return draft.script.split(b"\n", 2)[2].removesuffix(b"\n")


def by_sh(site, command):
    env = {"PATH": os.environ["PATH"], "HOME": str(site.folder)}
    return subprocess.run(["/bin/sh", "-c", command], env=env, capture_output=True, check=True)


def first(schedule, count):
    moments = [MONDAY - 1.0]
    while len(moments) <= count:
        moments.append(schedule.next_after(moments[-1]))
    return moments[1:]


@needs_croniter
def test_a_crontab_starts_the_tasks(left, tmp_path):
    folder, _ = leave(left, "to_crontab")
    content = (folder / "crontab").read_bytes()
    assert crontab_takes(tmp_path, content)
    assert b"\n# paused: 0 9 13 * 5 cd " in content
    assert b"\n# by hand: cd " in content
    found, times = {}, {}
    for draft in crontabs.read_crontab("crontab", content, user_column=False).drafts:
        name = re.split(rb"[ /]", command_of(draft))[-1].decode()
        found[name] = command_of(draft)
        times.setdefault(name, []).append(draft.settings["schedule"])
    assert by_sh(left, found["%d"]).stdout == b"<a b><$(x)><%d>"
    by_bgtasks = f"cd {left.tasks} && python3 {PROGRAM} --param_file={left.params} run"
    assert f"\n5,15,25,35,45,55 4 * * * {by_bgtasks} hidden\n".encode() in content
    assert b"hidden 50" not in content  # all can see it in ps
    assert by_sh(left, found["plain.sh"]).stdout.decode() == f"{GREETING} {left.tasks}\n"
    assert f"\n0 0,3,6,9,12,15,18,21 * * * {by_bgtasks} py\n".encode() in content
    together = {
        "plain.sh": ["weekdays 07:15", "*/10 8-9 * * sat,sun"],
        "both.sh": "0 9 */2 * fri",
        "spread.sh": "H H * * *",
    }
    for name, text in together.items():
        schedule = bgtasks.parse_schedule(text, UTC, spread=f"here/{name[:-3]}")
        assert first(bgtasks.parse_schedule(times[name], UTC), 30) == first(schedule, 30), name


@pytest.mark.parametrize("number", [60, 300, 900, 3600, 5400, 7200, 43200, 86400, 7 * 86400])
def test_periods_that_cron_can_keep_are_kept(number):
    lines, exact = leaving.grid(number)
    assert exact
    if importlib.util.find_spec("croniter"):
        start = 1_771_718_400  # a Sunday, at midnight
        seconds = max(2 * 86400, 2 * number)
        assert minutes(lines, start, seconds) == list(range(start, start + seconds, number))


@pytest.mark.parametrize("number", [1, 90, 420, 6000, 5 * 3600, 3 * 86400, 30 * 86400, 366 * 86400])
def test_other_periods_come_about_as_often(number):
    lines, exact = leaving.grid(number)
    assert not exact
    if importlib.util.find_spec("croniter"):
        schedule = bgtasks.parse_schedule(lines, UTC)
        moments = [float(MONDAY)]
        while len(moments) < 40:
            moments.append(schedule.next_after(moments[-1]))
        assert number / 1.7 <= max(60, (moments[-1] - moments[1]) / 38) <= max(60, number * 1.7)


def elapses(analyze, text):
    """Return the first moments at which systemd starts a timer."""
    given = ["--base-time=2026-02-23 00:00:00 UTC", "--iterations=9"]
    env = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}
    command = [analyze, "calendar", *given, text]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found = re.findall(r"(?:elapse|Iteration #\d+|Iter\. #\d+): \w+ (\S+ \S+) UTC", done.stdout)
    found += re.findall(r"\(in UTC\): \w+ (\S+ \S+) UTC", done.stdout)
    return {int(datetime.fromisoformat(f"{at}+00:00").timestamp()) for at in found}


@needs_croniter
def test_timers_are_taken_by_systemd_and_elapse_when_tasks_are_due(left):
    analyze = program("systemd-analyze")
    folder, _ = leave(left, "to_systemd")
    units = sorted(str(path) for path in folder.iterdir() if path.suffix in (".service", ".timer"))
    assert len(units) == 2 * 13 - 2  # without a timer: only when asked, and the last day
    done = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "bgtasks-" in line]
    assert not ours
    assert "hidden 50" not in "".join(Path(unit).read_text() for unit in units)
    tasks = {t.name: t for t in leaving.installation(str(left.params))[1]}
    for name in ("speaks", "plain", "command", "spread", "stopped", "both"):
        lines = re.findall("OnCalendar=(.*)", (folder / f"bgtasks-{name}.timer").read_text())
        found = sorted(set().union(*(elapses(analyze, line) for line in lines)))
        zone = bgtasks.Zone(tasks[name].zone or "UTC")
        schedule = bgtasks.parse_schedule(tasks[name].texts, zone, spread=f"here/{name}")
        assert found[:8] == first(schedule, 8), name


@needs_croniter
def test_secrets_of_a_unit_are_read_as_they_were(left):
    """A program of systemd that reads such files with the same parser says what it found."""
    folder, _ = leave(left, "to_systemd")
    place = left.folder / ".config/environment.d/x.conf"
    place.parent.mkdir(parents=True)
    shutil.copy(folder / "bgtasks-hidden.env", place)
    reader = "/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator"
    if not os.path.exists(reader) and not os.environ.get("CI"):
        pytest.skip("systemd is not installed")
    done = subprocess.run([reader], env={"HOME": str(left.folder)}, capture_output=True, check=True)
    shown = re.search(r'(?m)^API_KEY="(.*)"$', done.stdout.decode())[1]
    assert re.sub(r"\\(.)", lambda sign: {"n": "\n"}.get(sign[1], sign[1]), shown) == SECRET


@needs_croniter
def test_a_command_of_a_unit_is_what_it_was(left):
    """What systemd would start, read by its own rules for quotes."""
    folder, _ = leave(left, "to_systemd")
    service = (folder / "bgtasks-command.service").read_text()
    assert 'ExecStart="printf" "<%%s>" "a b" "$$(x)" "%%d"\n' in service
    assert "TimeoutStartSec=600\n" in service
    assert "MemoryMax=67108864\n" in service
    assert "TimeoutStartSec=2592000\n" in (folder / "bgtasks-hidden.service").read_text()
    plain = (folder / "bgtasks-plain.service").read_text()
    assert 'Environment="GREETING=it\'s 100%% \\"$HOME\\" \\\\"\n' in plain


@needs_croniter
def test_cron_jobs_are_valid(left):
    validate, yaml = package("kubernetes_validate"), package("yaml")
    left.shell("A_name-" + "x" * 57, "true")
    left.shell("a_Name-" + "x" * 56 + "y", "true")
    folder, _ = leave(left, "to_kubernetes", "--image=registry.example.org/app:1")
    jobs = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    assert len(jobs) == 13 + 2 + 3
    for name, job in jobs.items():
        validate.validate(job, validate.latest_version(), strict=True)
        assert job["metadata"]["name"] == name
        assert re.fullmatch("[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", name)
    pod = jobs["command"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["printf", "<%s>", "a b", "$$(x)", "%d"]
    assert pod["containers"][0]["resources"] == {"limits": {"memory": "67108864"}}
    assert pod["activeDeadlineSeconds"] == 600
    assert jobs["command"]["spec"]["startingDeadlineSeconds"] == 3600
    plain = [jobs[name]["spec"] for name in sorted(jobs) if name.startswith("plain")]
    assert [spec["schedule"] for spec in plain] == ["15 7 * * 1-5", "*/10 8-9 * * 0,6"]
    assert {spec["timeZone"] for spec in plain} == {"Europe/Berlin"}
    assert plain[0]["jobTemplate"]["spec"]["backoffLimit"] == 7
    env = plain[0]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert env[0]["value"] == 'it\'s 100% "$HOME" \\'
    hidden = jobs["hidden"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    reference = {"secretKeyRef": {"name": "hidden", "key": "API_KEY"}}
    assert hidden["containers"][0]["env"][0] == {"name": "API_KEY", "valueFrom": reference}
    assert hidden["activeDeadlineSeconds"] == 30 * 86400
    assert jobs["hidden"]["spec"]["schedule"] == "5,15,25,35,45,55 4 * * *"
    assert "hidden 50" not in json.dumps(jobs)
    assert jobs["each"]["metadata"]["annotations"]["bgtasks/description"] == SMILE
    assert jobs["stopped"]["spec"]["suspend"]
    assert jobs["asked"]["spec"]["suspend"]
    assert not jobs["both"]["spec"]["suspend"]


# --- What the README shows


def test_every_command_of_the_readme_works(tmp_path):
    """In a folder with what they name; databases and servers have tests of their own."""
    shutil.copy(PROGRAM, tmp_path)
    shutil.copytree(FOLDER, tmp_path / "contrib/migrate")
    (tmp_path / "tasks.d").mkdir()
    (tmp_path / "dump.sql").write_text(migrate_tables.TABLES + migrate_tables.ROWS)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/crontab").write_text("#!/bin/sh\necho '@daily true'\n")
    (tmp_path / "bin/crontab").chmod(0o755)
    (tmp_path / "anacrontab").write_text("1 5 a true\n")
    (tmp_path / "cron.d").mkdir()
    (tmp_path / "cron.d/x").write_text("@daily root true\n")
    lines = re.findall(r"(?m)^    (.*migrate\.py.*)$", README)
    assert len(lines) >= 9
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = {"cwd": tmp_path, "env": {**os.environ, "PATH": path}, "capture_output": True}
    for line in (line for line in lines if "mysql:" not in line):
        words = ["/bin/sh", "-c", line.replace("/etc/", f"{tmp_path}/")]
        done = subprocess.run(words, check=False, **options)
        assert done.returncode == 0, (line, done.stderr)
        assert not done.stderr


def test_the_example_of_the_readme_is_what_is_written(tmp_path):
    table, written = re.findall(r"(?s)```\n(.*?)```", README)[:2]
    moved = move_in(tmp_path, table)
    (file,) = [path for path in moved.tasks.iterdir() if "nightly" in path.name]
    assert file.read_text().replace(f"{tmp_path}/table", "crontab") == written
