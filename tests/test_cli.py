import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime

import pytest
from conftest import PROGRAM, FakeClock, far_away, import_what_comes_late, wait_for

import bgtasks

RUN_KEYS = ["id", "task", "planned_at", "started_at", "ended_at", "outcome", "reason", "volume"]
RUN_KEYS += ["message", "exit_code", "trigger", "node"]
TASK_KEYS = {"name", "state", "reason", "schedule", "next_run_at", "running", "progress"}
TASK_KEYS |= {"last_started_at", "last_ended_at", "last_outcome", "runs", "failures"}
TASK_KEYS |= {"consecutive_failures", "last_seconds", "min_seconds", "average_seconds"}
TASK_KEYS |= {"max_seconds", "volume", "description", "group", "deferred", "retry_at"}
TASK_KEYS |= {"usual_seconds", "total_seconds", "overran_seconds", "last_success_at"}
TASK_KEYS |= {"paused_until", "unacknowledged"}


def how_long(site):
    """How long the task `a` took the last time, in words."""
    return bgtasks.duration(site.status("a")["last_seconds"])


def refused(site, code, *args):
    done = site.run(*args)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.startswith("bgtasks: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


# -- usage


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stat"], "no option --stat (did you mean"),
        (["--verbos"], "did you mean 'verbose'?"),
        (["--json"], "no option --json"),
        (["stats"], "no command 'stats' (did you mean 'status'?)"),
        (["history", "--count"], "--count needs a value"),
        (["history", "--count", "0"], "--count: must be a whole number from 1"),
        (["--cron_sleep"], "--cron_sleep needs a value: --cron_sleep=..."),
        (["--task.a.schedule"], "needs a value"),
        (["show"], "show needs one TASK"),
        (["show", "a", "b"], "show needs one TASK"),
        (["history", "a", "b"], "history needs one TASK at most"),
        (["log"], "log needs one TASK or RUN"),
        (["run"], "run needs one TASK"),
        (["next", "x y"], "5 fields"),
        (["next", "every 1 h", "--timezone", "Nowhere"], "unknown zone 'Nowhere'"),
        (["next", "every 1 h", "--from", "soon"], "ISO 8601"),
        (["pause"], "needs one TASK, or --all"),
        (["pause", "a", "--all"], "needs one TASK, or --all"),
        (["pause", "a", "--for", "soon"], "10 min"),
    ],
    ids=" ".join,
)
def test_usage_errors_are_64_and_one_line(site, args, words):
    site.shell("a", "")
    assert words in refused(site, 64, *args)


def test_an_argument_that_is_no_text_is_refused_and_shown(site):
    done = subprocess.run([*site.command(), b"st\xff"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        64,
        "bgtasks: argument 'st\\\\udcff': is not valid UTF-8\n",
    )


def test_help_and_version(site):
    text = site.run("--help").stdout
    assert "--cron_max_execution_time=600" in text
    assert all(f"  {command}" in text or f" {command} " in text for command in bgtasks.COMMANDS)
    assert site.run("--version").stdout == f"bgtasks {bgtasks.__version__}\n"
    assert site.run("history", "--help").returncode == 0


@pytest.mark.parametrize("command", ["show", "history", "log", "run", "pause", "resume"])
def test_an_unknown_task_is_66_with_the_nearest_name(site, command):
    site.shell("backup", "")
    assert "no task 'bakcup' (did you mean 'backup'?)" in refused(site, 66, command, "bakcup")


def test_a_run_that_is_not_there_is_66(site):
    site.shell("a", "")
    assert "no run of '99'" in refused(site, 66, "log", "99")
    assert "no run of 'a'" in refused(site, 66, "log", "a")


# -- the wake-up


def test_it_is_silent_when_all_is_well(site):
    site.shell("a", "echo loud")
    done = site.wake()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verbose_says_each_start_and_end_as_it_happens_and_the_status(site):
    reports = "echo message=fine >>$BGTASKS_REPORT; echo volume=3 >>$BGTASKS_REPORT"
    site.shell("a", f"{site.hold}; {reports}")
    runner = site.start("--verbose", "--cron_max_execution_time=0")
    wait_for(lambda: "a: run 1 starts (planned " in site.said.read_text())
    assert "a: done" not in site.said.read_text()
    site.release()
    assert runner.wait() == 0
    text = site.said.read_text()
    assert f"a: done after {how_long(site)}: volume 3; fine" in text
    assert "running as root" in text
    assert "TASK" in text
    assert text.index("a: done") < text.index("TASK")


def test_dry_run_says_what_would_start_and_starts_nothing(site):
    site.shell("a", f"touch {site.ledger}", order=2)
    site.shell("b", "", order=1)
    done = site.wake("--dry_run")
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == [
        "would start b",
        "would start a",
    ]
    assert not site.ledger.exists()
    assert site.rows("SELECT * FROM run") == []


def test_a_key_of_the_param_file_can_be_given_as_a_flag(site):
    site.shell("a", "")
    site.wake("--node=there", "--task.a.order=7")
    assert site.last("a")["node"] == "there"
    assert site.rows('SELECT "order" FROM task') == [{"order": 7}]


def files(site):
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in site.state.rglob("*")
        if path.is_file()
    }


def test_status_only_works_beside_a_runner_changes_nothing_and_leaves_at_once(site, stalls):
    body = f"echo progress=2/10 >>$BGTASKS_REPORT; touch {site.ledger}; {site.hold}"
    site.shell("a", body)
    runner = site.start("--cron_max_execution_time=0")
    wait_for(site.ledger.exists)
    wait_for(lambda: site.rows("SELECT * FROM wakeup"))  # the last it writes while it waits
    before = files(site)
    started = time.time()
    done = site.run("--status_only=1")
    assert stalls.since(started) < 2.5
    assert files(site) == before
    assert done.returncode == 0
    assert "running; 2/10" in done.stdout
    found = site.status("a")
    assert (found["running"], found["progress"], found["last_outcome"]) == (True, "2/10", "running")
    assert site.run("log", "a").stdout == ""
    site.release()
    assert runner.wait() == 0


def test_a_look_before_the_first_wake_up_makes_no_file(site):
    site.shell("a", "", description="what it is")
    for args in (
        ["status"],
        ["history"],
        ["show", "a"],
        ["next", "a"],
        ["lint"],
        ["--status_only"],
    ):
        assert site.run(*args).returncode == 0, args
    assert not site.state.exists()
    assert site.json("history") == []
    assert site.status("a")["description"] == "what it is"
    assert "never woken" in site.run("status").stdout


# -- what is shown


def test_status_as_json(site):
    site.shell("a", "exit 1", description="d")
    site.write("b.txt", "")
    site.wake()
    site.write("c.py", "x = (")
    found = site.json("status")
    assert list(found) == ["version", "generated_at", "node", "maintenance", "last_wakeup", "tasks"]
    assert [task["state"] for task in found["tasks"]] == ["broken", "active", "ignored"]
    assert all(set(task) == TASK_KEYS for task in found["tasks"])
    a = found["tasks"][1]
    for key in ("next_run_at", "last_started_at", "last_ended_at"):
        assert datetime.fromisoformat(a[key]).tzinfo is not None
    assert (a["last_outcome"], a["runs"], a["failures"], a["consecutive_failures"]) == (
        "failed",
        1,
        1,
        1,
    )
    assert 0 < a["min_seconds"] == a["average_seconds"] == a["max_seconds"] == a["last_seconds"] < 5
    assert found["tasks"][0]["next_run_at"] is None
    assert found["last_wakeup"]["result"] == "worked"


def test_an_override_of_a_task_that_is_not_there_is_said_in_the_status(site):
    site.shell("backup", "")
    site.params.write_text("task.backup.order = 1\ntask.bakcup.order = 5\n")
    text = site.run("status").stdout
    assert f"{site.params}:2: there is no task 'bakcup' (did you mean 'backup'?)\n" in text
    assert text.startswith("running as root")


def test_history_as_json_newest_first(site):
    site.shell("a", "exit 3")
    site.shell("b", "")
    site.wake()
    site.run("run", "a", "--force")
    found = site.json("history")
    assert [(run["id"], run["task"], run["trigger"]) for run in found] == [
        (3, "a", "hand"),
        (2, "b", "cli"),
        (1, "a", "cli"),
    ]
    assert list(found[0]) == RUN_KEYS
    assert (found[0]["exit_code"], found[0]["outcome"]) == (3, "failed")
    assert len(site.json("history", "--count=2")) == 2
    assert [run["id"] for run in site.json("history", "a")] == [3, 1]
    text = site.run("history", "a").stdout
    assert text.splitlines()[0].split() == [
        "RUN",
        "TASK",
        "STARTED",
        "TOOK",
        "OUTCOME",
        "VOLUME",
        "TRIGGER",
        "ABOUT",
    ]
    assert "exit code 3" in text


def test_show_says_all_of_one_task(site):
    site.shell("a", "", description="d")
    site.wake()
    assert set(site.json("show", "a")) == TASK_KEYS
    assert "description           d\n" in site.run("show", "a").stdout


def test_paused_disabled_and_missing_are_shown_with_their_reasons(site):
    for name in ("a", "b", "c"):
        site.shell(name, "", enabled=name != "b")
    site.wake()
    assert site.run("pause", "a", "--for", "2h", "--note", "a\x1bb").returncode == 0
    (site.tasks / "c.sh").unlink()
    found = {task["name"]: (task["state"], task["reason"]) for task in site.json("status")["tasks"]}
    assert found["a"][0] == "paused"
    assert found["a"][1].startswith("by root until ")
    assert found["a"][1].endswith("; a\\x1bb")
    assert found["b"] == ("disabled", "enabled = false")
    assert found["c"] == ("missing", "its file is gone from tasks.d")
    assert site.run("resume", "--all").returncode == 0
    assert site.status("a")["state"] == "active"
    assert site.run("pause", "--all").returncode == 0
    assert site.status("a")["reason"] == "by root"


def test_log_shows_what_a_run_printed_also_while_it_runs(site):
    site.shell("a", f"echo one; touch {site.ledger}; {site.hold}; printf two")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(site.ledger.exists)
    assert site.log("a") == "one\n"
    site.release()
    runner.wait()
    assert site.log(1) == "one\ntwo\n"


# -- run TASK


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("echo hi", 0),
        ("echo hi; exit 3", 1),
        ("echo hi; echo 1000 >{ahead}; sleep 60", 124),
        ("echo hi; kill -9 $$", 137),
    ],
)
def test_run_shows_the_output_and_how_it_ended(site, body, code):
    body = body.format(ahead=site.movable_clock())
    site.shell("a", body, schedule="daily 03:30", timeout=1000)
    done = site.run("run", "a")
    assert (done.returncode, done.stdout) == (code, "hi\n")
    assert done.stderr.startswith("bgtasks: a: ")


def test_run_is_refused_while_it_runs_or_is_paused_and_broken_tasks_are_66(site):
    site.shell("a", f"touch {site.ledger}; {site.hold}")
    site.write("b.py", "x = (")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(site.ledger.exists)
    assert "is running already" in refused(site, 75, "run", "a")
    site.release()
    runner.wait()
    site.run("pause", "a")
    assert "a: paused: by root; resume a" in refused(site, 75, "run", "a")
    assert "b: broken: b.py" in refused(site, 66, "run", "b")


def test_run_works_on_what_is_disabled_and_keeps_the_plan(site):
    site.shell("a", "", schedule=far_away(), enabled=False)
    assert site.run("run", "a").returncode == 0
    site.shell("a", "", schedule=far_away())
    site.wake()
    due = site.status("a")["next_run_at"]
    site.run("run", "a")
    assert site.status("a")["next_run_at"] == due


def test_run_dies_of_the_signal_that_stopped_it(site):
    site.shell("a", f"touch {site.ledger}; sleep 60")
    runner = subprocess.Popen(site.command("run", "a"), stderr=subprocess.DEVNULL)
    wait_for(site.ledger.exists)
    runner.send_signal(signal.SIGINT)
    assert runner.wait() == -signal.SIGINT
    assert site.last("a")["outcome"] == "interrupted"


# -- next and lint


def test_next_moments_of_an_expression(site):
    args = ["next", "mon,thu 03:30", "--from", "2026-03-26T02:30:00Z", "--count", "3"]
    assert site.json(*args, "--timezone", "Europe/Berlin") == [
        "2026-03-30T03:30:00+02:00",
        "2026-04-02T03:30:00+02:00",
        "2026-04-06T03:30:00+02:00",
    ]
    assert site.run("next", "manual").stdout == "never by itself: manual\n"
    every = site.json("next", "every 10 min", "--from", "2026-01-01T00:05:00Z", "--timezone", "UTC")
    assert (len(every), every[0]) == (5, "2026-01-01T00:15:00+00:00")


def test_next_moments_of_a_task(site):
    site.shell("a", "", schedule="daily 03:30", timezone="Asia/Tokyo")
    site.write("b.py", "x = (")
    args = ["next", "a", "--count", "1", "--from", "2026-01-01T00:00:00Z"]
    before = site.json(*args)
    site.wake()
    assert site.json(*args) == before
    assert before[0].endswith("T03:30:00+09:00")
    assert "b: broken" in refused(site, 66, "next", "b")


def test_lint_names_what_is_broken_and_what_may_surprise(site):
    pytest.importorskip("croniter", reason="croniter is not installed")
    site.shell("a", "", schedule="0 3 1 * 1")
    site.write("b.py", f"{'#' * 3}\nx = (")
    site.write("notes.md", "")
    done = site.run("lint")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "a.sh: ok" in lines
    assert any(line.startswith("a.sh: note: day of month and day of week") for line in lines)
    assert any(line.startswith("b.py: broken: ") for line in lines)
    assert "notes.md: ignored: no program" in lines
    assert site.run("lint", str(site.tasks / "a.sh")).returncode == 0
    assert site.run("lint", str(site.tasks / "b.py")).returncode == 1
    assert (
        site.run("lint", str(site.tasks / "notes.md")).stdout == "notes.md: ignored: no program\n"
    )
    assert "there is no file" in refused(site, 66, "lint", "nope.sh")
    assert not site.state.exists()


# -- terminals


def on_terminal(command, columns=80, environ=None, look=None):
    """What a program writes on a terminal of that width; ``look`` sees it as it comes."""
    pid, fd = pty.fork()
    if pid == 0:  # pragma: no cover - becomes the program
        os.environ.update(environ or {})
        os.execv(command[0], command)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    text = b""
    while select.select([fd], [], [], 60)[0]:
        try:
            found = os.read(fd, 4096)
        except OSError:
            break
        if not found:
            break
        text += found
        if look:
            look(text)
    os.waitpid(pid, 0)
    os.close(fd)
    return text.decode()


@pytest.mark.filterwarnings("ignore:.*use of forkpty.*:DeprecationWarning")
@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(site, columns):
    site.shell("a", "exit 1", description="long " * 50)
    site.shell("b" * 64, "", description="long " * 50)
    site.wake()
    for command in ("status", "history", "doctor", "explain a"):
        text = on_terminal(site.command(*command.split()), columns, {"NO_COLOR": "1"})
        assert text
        assert "\x1b" not in text
        assert max(len(line) for line in text.split("\r\n")) <= columns


@pytest.mark.filterwarnings("ignore:.*use of forkpty.*:DeprecationWarning")
def test_colour_only_on_a_terminal(site):
    site.shell("a", "exit 1")
    site.wake()
    assert "\x1b[31ma" in on_terminal(site.command("status"))
    assert "\x1b" not in site.run("status").stdout


@pytest.mark.filterwarnings("ignore:.*use of forkpty.*:DeprecationWarning")
def test_a_long_run_shows_its_progress_on_a_terminal(site):
    site.shell("a", f"echo progress=3/10 >>$BGTASKS_REPORT; {site.hold}")
    command = site.command("--verbose", "--cron_max_execution_time=0")
    text = on_terminal(command, look=lambda text: b"running: a 3/10" in text and site.release())
    assert "running: a 3/10" in text
    assert "\r" in text
    assert f"a: done after {how_long(site)}" in text


def test_what_tasks_say_never_steers_the_terminal(site):
    body = "printf 'message=\\033]0;x\\007\\033[2J\\342\\200\\256abc\\n' >>$BGTASKS_REPORT"
    site.shell("a", body)
    outputs = [site.wake("--verbose").stdout]
    outputs += [site.run(*args).stdout for args in (["history"], ["status"], ["show", "a"])]
    text = "".join(outputs)
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\\x1b]0;x\\x07\\x1b[2J\\u202eabc" in text


# -- hostile surroundings


def shell(site, script, *args, **options):
    command = ["sh", "-c", script, "sh", *site.command(*args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_a_reader_that_leaves_is_no_error(site):
    for i in range(300):
        site.shell(f"t{i}", "", schedule="manual")
    command = [
        "bash",
        "-c",
        '"$@" | head -1; exit ${PIPESTATUS[0]}',
        "bash",
        *site.command("status"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_is_74(site, unbuffered):
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = shell(site, '"$@" >/dev/full', "status", env=environ)
    assert (done.returncode, done.stderr) == (74, "bgtasks: output: No space left on device\n")


def test_closed_descriptors_change_nothing(site):
    site.shell("a", f"ls -l /proc/self/fd >{site.ledger}")
    done = shell(site, '"$@" <&- >&- 2>&-', "--cron_max_execution_time=0", "--verbose")
    assert done.returncode == 0
    assert site.last("a")["outcome"] == "done"
    assert "bgtasks.db" not in site.ledger.read_text()


@pytest.mark.parametrize(
    "environ",
    [{"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}],
    ids=str,
)
def test_a_poor_encoding_never_chokes(site, environ):
    site.shell("a", "echo message=grün >>$BGTASKS_REPORT")
    site.wake()
    done = site.run("history", env=environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr" in done.stdout


def test_a_folder_that_was_deleted_under_it_is_no_matter(site):
    site.shell("a", "pwd")
    gone = site.folder / "gone"
    gone.mkdir()
    done = shell(site, f'cd {gone}; rmdir {gone}; "$@"', "--cron_max_execution_time=0")
    assert (done.returncode, done.stderr) == (0, "")
    assert site.log("a") == f"{site.tasks}\n"


@pytest.mark.parametrize("mask", ["000", "777"])
def test_modes_keep_others_out_whatever_the_umask(site, mask):
    site.shell("a", f'stat -c %a "$BGTASKS_INPUT" >>{site.ledger}; touch made; stat -c %a made')
    done = shell(site, f'umask {mask}; "$@"', "--cron_max_execution_time=0")
    assert (done.returncode, done.stderr) == (0, "")
    modes = {path.stat().st_mode & 0o777 for path in site.state.rglob("*")}
    assert modes == {0o700, 0o600}
    assert site.ledger.read_text() == "600\n"


def test_signals_that_the_caller_ignored_are_given_back_to_tasks(site):
    site.shell("a", "exec grep -E 'Sig(Blk|Ign)' /proc/self/status")
    caller = (
        "import os, signal, sys\n"
        "for name in ('SIGPIPE', 'SIGCHLD', 'SIGALRM', 'SIGUSR1'):\n"
        "    signal.signal(getattr(signal, name), signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", caller, *site.command("--cron_max_execution_time=0")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    # glibc's posix_spawn() ignores two signals of its own, which nobody can set
    settable = sum(1 << number - 1 for number in signal.valid_signals())
    masks = [int(line.split()[1], 16) & settable for line in site.log("a").splitlines()]
    assert masks == [0, 0]


@pytest.mark.parametrize(
    ("limit", "value", "code"), [("NOFILE", 8, 71), ("FSIZE", 4096, 74)], ids=["NOFILE", "FSIZE"]
)
def test_a_limit_that_is_too_low_has_its_code(site, limit, value, code):
    site.shell("a", "")
    number = getattr(resource, f"RLIMIT_{limit}")
    caller = (
        "import os, resource, sys\n"
        f"resource.setrlimit({number}, ({value}, {value}))\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", caller, *site.command("--cron_max_execution_time=0")]
    measured = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=measured)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert site.wake().returncode == 0
    site.make_due()
    assert site.wake().returncode == 0
    assert site.last("a")["outcome"] == "done"


def test_a_bad_tz_is_refused(site):
    done = site.run("status", env={"TZ": "Foo/Bar"})
    assert (done.returncode, done.stderr) == (
        78,
        "bgtasks: TZ: 'Foo/Bar' is no zone; unset TZ, or name one\n",
    )


def test_out_of_memory_and_descriptors_have_their_own_code(site, capsys, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(bgtasks, "read_settings", fail)
    assert bgtasks.main(["status"], FakeClock()) == 71
    assert "Cannot allocate memory" in capsys.readouterr().err


def test_a_bug_shows_its_trace_and_the_versions(capsys, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(bgtasks, "read_settings", fail)
    assert bgtasks.main(["status"], FakeClock()) == 70
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert f"this is a bug in bgtasks {bgtasks.__version__} (Python " in text


def test_an_old_python_reads_one_line():
    old = "/usr/bin/python2"
    source = PROGRAM.read_text().split("\n")
    assert "sys.version_info < (3, 9)" in "\n".join(source[:25])
    assert not os.path.exists(old)


# -- small parts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59, "59 s"),
        (150, "2 min"),
        (7200, "2 h"),
        (9e5, "10 d"),
    ],
)
def test_durations_as_people_say_them(seconds, text):
    assert bgtasks.duration(seconds) == text


def test_moments_as_people_say_them():
    now = 1_767_225_600.0
    assert bgtasks.when(None, now) == ""
    assert bgtasks.when("2026-01-01T00:05:00+00:00", now) == "00:05:00 (in 5 min)"
    assert bgtasks.when("2025-12-31T23:59:50+00:00", now) == "2025-12-31 23:59 (10 s ago)"
    assert json.dumps(bgtasks.iso(now, bgtasks.timezone.utc)) == '"2026-01-01T00:00:00+00:00"'


# -- in this process: what ends by a signal leaves no measure of its coverage


@pytest.fixture
def not_dying(monkeypatch):
    """The signals that this process would have ended by."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    before = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGINT)}
    yield sent
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "number"), [(BrokenPipeError, signal.SIGPIPE), (KeyboardInterrupt, signal.SIGINT)]
)
def test_it_dies_of_the_signal_that_ended_it(monkeypatch, not_dying, error, number):
    def fail(*_):
        raise error

    monkeypatch.setattr(bgtasks, "read_settings", fail)
    assert bgtasks.main(["status"], FakeClock()) == 128 + number
    assert not_dying == [number]


def test_a_runner_that_was_stopped_ends_by_its_signal(not_dying):
    class Stopped:
        stop_signal = signal.SIGINT

    assert bgtasks._left(Stopped()) == 130
    assert not_dying == [signal.SIGINT]


def test_no_process_to_be_had_is_71(site, capsys, monkeypatch):
    def fail():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    site.shell("a", "")
    site.wake("--exclude_task=a")
    monkeypatch.setattr(os, "fork", fail)
    arguments = [f"--param_file={site.params}", "--cron_max_execution_time=0"]
    assert bgtasks.main(arguments) == 71
    text = capsys.readouterr().err
    assert text.count("cannot start a process (Resource temporarily unavailable)") == 2


def test_a_state_of_somebody_else_is_not_shown(site):
    site.wake()
    call = bgtasks.read_settings({"param_file": str(site.params)}, "x")
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    os.mkdir(os.path.join(folder, "state"), 0o700)
    call = call._replace(values={**call.values, "state_dir": os.path.join(folder, "state")})
    before = os.getresuid()
    import_what_comes_late()
    os.setresuid(65534, 65534, 0)
    try:
        with pytest.raises(bgtasks.RefusedError, match="belongs to somebody else"):
            bgtasks.open_for_reading(call)
    finally:
        os.setresuid(*before)
    shutil.rmtree(folder)
