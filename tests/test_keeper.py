"""One run, from its start to its end, by real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, wait_for

import bgtasks


def run(site, *args, **options):
    """Run the task `a` by hand, and return its row in the history."""
    site.run("run", "a", *args, **options)
    return site.last("a")


def seconds_of(site):
    """How long the last run took."""
    (run,) = site.rows("SELECT ended_at - started_at AS seconds FROM run ORDER BY id DESC LIMIT 1")
    return run["seconds"]


def python(site, body, **settings):
    site.python("a", body, schedule="manual", **settings)
    return run(site)


def shell(site, body, **settings):
    site.shell("a", body, schedule="manual", **settings)
    return run(site)


# -- the contract


def test_a_python_task_learns_all_there_is_to_know(site):
    site.params.write_text("node = here\ncron_sleep = 7\n")
    before, began = time.time(), time.monotonic()
    python(
        site,
        """
        import json
        print(json.dumps({
            "name": task.name, "run": task.run, "node": task.node, "maximum": task.maximum,
            "options": task.options, "settings": task.settings, "state_dir": task.state_dir,
            "left": task.time_left, "deadline": task.deadline, "slot": task.slot,
            "success": task.last_success, "stop": task.should_stop, "state": task.state,
        }))
        """,
        options={"keep": 7},
        settings=["cron_sleep"],
        maximum=5,
        deadline=100,
    )
    found = json.loads(site.log("a"))
    assert (found["name"], found["run"], found["node"], found["maximum"]) == ("a", 1, "here", 5)
    assert (found["options"], found["settings"]) == ({"keep": 7}, {"cron_sleep": 7})
    assert found["state_dir"] == str(site.state)
    assert 100 - (time.monotonic() - began) < found["left"] <= 100
    assert abs(found["deadline"] - found["slot"] - 100) < 0.001
    assert before <= found["slot"] <= time.time()
    assert (found["success"], found["stop"], found["state"]) == (None, False, {})


ENVIRONMENT = (
    "TASK",
    "RUN",
    "NODE",
    "MAXIMUM",
    "OPTION_KEEP",
    "OPTION_ON",
    "OPTION_LIST",
    "STATE_DIR",
)


def test_a_program_learns_the_same_from_its_environment(site):
    options = {"keep": 7, "on": True, "list": [1], "api_key": "sesame"}
    body = "env | grep ^BGTASKS_ | sort; echo; cat $BGTASKS_INPUT"
    shell(site, body, options=options, settings=["node"], maximum=5, env={"EXTRA": "x"})
    text, given = site.log("a").split("\n\n")
    found = dict(line[len("BGTASKS_") :].split("=", 1) for line in text.splitlines())
    wanted = ["a", "1", "here", "5", "7", "true", "[1]", str(site.state)]
    assert [found[name] for name in ENVIRONMENT] == wanted
    assert found["LAST_SUCCESS"] == ""
    assert 0 < int(found["DEADLINE"]) - time.time() <= 600
    assert "sesame" not in text
    given = json.loads(given)
    assert given["options"] == options
    assert given["settings"] == {"node": "here"}
    run(site)
    assert int(site.log("a").split("BGTASKS_LAST_SUCCESS=")[1].split()[0]) <= time.time()


def test_the_environment_is_built_new(site):
    hostile = {
        "PYTHONPATH": "/evil",
        "LD_LIBRARY_PATH": "/evil",
        "BASH_ENV": "/evil",
        "LC_ALL": "C",
    }
    site.shell("a", "env", schedule="manual", env={"EXTRA": "x"})
    run(site, env=hostile)
    names = {line.split("=")[0] for line in site.log("a").splitlines()}
    assert not names & {"PYTHONPATH", "LD_LIBRARY_PATH", "BASH_ENV"}
    assert {"PATH", "LC_ALL", "EXTRA"} <= names


REPORT = """
volume=3
progress=1/2
volume=12
message=all well
result=nothing
state={"cursor": 5}
"""


@pytest.mark.parametrize("language", ["sh", "perl", "python"])
def test_what_a_task_reports(site, language):
    if language == "sh":
        found = shell(site, f"cat >>$BGTASKS_REPORT <<'X'\n{REPORT}\nX")
    elif language == "perl":
        block = "# /// script\n# [tool.bgtasks]\n# schedule = 'manual'\n# ///\n"
        body = "open(R, '>>', $ENV{BGTASKS_REPORT}); print R <<'X';\n" + REPORT + "X\nclose R;\n"
        site.write("a.pl", f"#!/usr/bin/env perl\n{block}{body}", 0o644)
        found = run(site)
    else:
        body = """
        task.progress(1, 2)
        task.add_volume(3)
        task.add_volume(9)
        task.message = "all well"
        task.state["cursor"] = 5
        return task.NOTHING
        """
        found = python(site, body)
    assert (found["volume"], found["message"], found["outcome"]) == (12, "all well", "nothing")
    assert site.rows("SELECT state FROM task")[0]["state"] == '{"cursor": 5}'


@pytest.mark.parametrize("more", [0, 1, 9, 10])
def test_of_a_long_report_only_whole_lines_are_read(tmp_path, more):
    lines = b"volume=1\n" * 100_000 + b"progress="
    kept, size = b"message=x\n" + lines, bgtasks.REPORT_BYTES + more
    (tmp_path / "x.report").write_bytes(kept.ljust(size, b"."))
    found = bgtasks.read_report(str(tmp_path / "x"))
    assert list(found) == ["message"] * (not more) + ["volume", "progress"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("volum=3", "must begin with volume"),
        ("volume=many", "whole number"),
        ("result=odd", "done, nothing or more"),
        ("state=5", "JSON object"),
        ("state={", "report"),
        ("gibberish", "gibberish"),
        ("next_run=soon", "ISO 8601"),
        ("next_run=5", "not in the future"),
        ("next_run=99999999999999", "not in the future"),
    ],
)
def test_a_bad_report_line_is_complained_of_and_changes_nothing(site, line, words):
    found = shell(site, f"echo '{line}' >>$BGTASKS_REPORT")
    assert found["outcome"] == "done"
    assert words in found["reason"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("$(($(date +%s) + 500))", 500), ("$(date -u -d '+500 sec' +%FT%TZ)", 500)],
)
def test_a_task_may_say_when_it_wants_to_run_next(site, text, seconds):
    site.shell("a", f'echo "next_run={text}" >>$BGTASKS_REPORT')
    before = int(time.time())
    site.wake()
    due = site.rows("SELECT next_run_at FROM task")[0]["next_run_at"]
    assert before <= due - seconds <= time.time()


def test_a_python_task_may_give_a_local_time(site):
    body = """
    import datetime
    task.next_run = datetime.datetime.now().replace(microsecond=0) + datetime.timedelta(hours=2)
    """
    before = int(time.time())
    python(site, body)
    due = site.rows("SELECT next_run_at FROM task")[0]["next_run_at"]
    assert before <= due - 7200 <= time.time()


def test_the_last_state_counts_however_the_run_ends(site):
    found = python(site, "task.state['n'] = 1\nraise ValueError('no')")
    assert (found["outcome"], found["reason"]) == ("failed", "ValueError: no")
    assert site.rows("SELECT state FROM task")[0]["state"] == '{"n": 1}'
    site.python("a", "print(task.state)\ntask.state['n'] = {1}", schedule="manual")
    assert "state=Object of type set" in run(site)["reason"]
    assert site.log("a") == "{'n': 1}\n"


def test_each_ends_by_itself_at_the_deadline_and_goes_on_with_its_state(site):
    ahead = site.movable_clock()
    body = f"""
    import itertools
    for i in task.each(itertools.count(task.state.get("n", -1) + 1)):
        task.state["n"] = i
        task.progress(i)
        if i % 4 == 3:
            with open({str(ahead)!r}, "a") as file:
                file.write("1000\\n")
    """
    for number in (3, 7):
        found = python(site, body, deadline=1000, timeout=5000)
        assert found["outcome"] == "more"
        assert json.loads(site.rows("SELECT state FROM task")[0]["state"])["n"] == number


def test_each_keeps_to_the_maximum(site):
    body = "for x in task.each(range(10)):\n    task.add_volume()\nreturn 'ok'"
    found = python(site, body, maximum=4)
    assert (found["volume"], found["outcome"], found["message"]) == (4, "done", "ok")


# -- how it ends


@pytest.mark.parametrize(
    ("body", "outcome", "code", "reason"),
    [
        ("pass", "done", 0, ""),
        ("return task.MORE", "more", 0, ""),
        ("return task.NOTHING", "nothing", 0, ""),
        ("raise SystemExit", "done", 0, ""),
        ("raise SystemExit('text')", "failed", 1, "text"),
        ("raise SystemExit(256)", "failed", 256, "exit code 256"),
        ("raise KeyboardInterrupt", "failed", 1, "KeyboardInterrupt: "),
        ("1/0", "failed", 1, "ZeroDivisionError: division by zero"),
        ("import os; os._exit(0)", "failed", 0, "ended without reporting (os._exit)"),
        ("import os; os._exit(3)", "failed", 3, "exit code 3"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "failed",
            -9,
            "ended by SIGKILL (maybe out of memory)",
        ),
        ("import os; os.kill(os.getpid(), 40)", "failed", -40, "ended by signal 40"),
        ("import faulthandler; faulthandler._sigsegv()", "failed", -11, "ended by SIGSEGV"),
        (
            "class E(Exception):\n  def __str__(self): 1/0\nraise E",
            "failed",
            1,
            "E: <unprintable E>",
        ),
    ],
)
def test_how_a_python_task_ends(site, body, outcome, code, reason):
    found = python(site, body)
    assert (found["outcome"], found["exit_code"], found["reason"]) == (outcome, code, reason)


def test_what_run_returns_is_the_message_unless_there_is_one(site):
    assert python(site, "return {1: 2}")["message"] == "{1: 2}"
    assert python(site, "task.message = 'mine'\nreturn 'other'")["message"] == "mine"


def test_a_failed_python_task_shows_its_trace_with_the_line(site):
    python(site, "x = 5\nraise ValueError(x)")
    assert f'File "{site.tasks / "a.py"}", line 7, in run\n    raise ValueError(x)' in site.log("a")


def test_threads_are_waited_for(site):
    body = """
    import threading, time
    threading.Thread(target=lambda: (time.sleep(0.3), print("late"))).start()
    """
    python(site, body)
    assert site.log("a") == "late\n"


def test_a_python_task_can_import_what_lies_beside_it_but_hides_nothing(site):
    site.write("_common.py", "VALUE = 42\n")
    site.write("json.py", "raise ImportError('hijacked')\n")
    found = python(site, "import _common, json\nreturn str(_common.VALUE)")
    assert found["message"] == "42"


@pytest.mark.parametrize(
    ("body", "outcome", "code", "reason"),
    [
        ("exit 0", "done", 0, ""),
        ("exit 3", "failed", 3, "exit code 3"),
        ("kill -SEGV $$", "failed", -11, "ended by SIGSEGV"),
        ("echo result=more >>$BGTASKS_REPORT; exit 1", "failed", 1, "exit code 1"),
    ],
)
def test_how_a_program_ends(site, body, outcome, code, reason):
    found = shell(site, body)
    assert (found["outcome"], found["exit_code"], found["reason"]) == (outcome, code, reason)


def test_a_program_that_cannot_be_started_says_why(site):
    site.write("a.toml", 'schedule = "manual"\ncommand = ["no-such-program"]\n')
    found = run(site)
    assert found["outcome"] == "failed"
    assert found["reason"] == "could not start no-such-program: No such file or directory"


def test_a_runner_that_is_slow_to_let_go_is_no_process_left_behind(site):
    """On a busy machine a run may be over before its runner closes its copy of the lock."""
    site.write("a.toml", 'schedule = "every 1 d"\ncommand = ["no-such-program"]\n')
    code = f"""
import os, sys, time
sys.path[0] = {str(PROGRAM.parent)!r}
import bgtasks
runner, fork = os.getpid(), bgtasks.fork
def slow(body):
    pid = fork(body)
    time.sleep(1.5 * (os.getpid() == runner))
    return pid
bgtasks.fork = slow
bgtasks.main(["--param_file={site.params}", "--cron_max_execution_time=0"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    reason = "could not start no-such-program: No such file or directory"
    assert site.last("a")["reason"] == reason


def test_a_program_that_became_unsafe_is_not_started(site):
    folder = site.folder / "else"
    folder.mkdir()
    path = site.shell("a", "echo ran")
    path.rename(folder / "a.sh")
    path.symlink_to(folder / "a.sh")
    site.wake()
    folder.chmod(0o777)  # what `stat` says of the file is the same
    assert "can be written by others" in run(site)["reason"]


# -- what hangs, leaves things behind or is killed


TIMEOUT = 8  # each must have begun by then, also where ten begin at once on a busy machine
HANGS = {  # how long each takes beyond its timeout: 10 s, if it has to be killed
    "ignores_term": ("sh", "trap '' TERM; while :; do sleep 1; done", 10),
    "hangs_in_c": ("py", "import hashlib\nhashlib.pbkdf2_hmac('sha512', b'x', b'y', 10**9)", 10),
    "stops_itself": ("sh", "kill -STOP $$", 0),
    "sleeps": ("py", "import time\ntime.sleep(99)", 0),
    "grandchild": ("sh", "sleep 99 & sleep 99", 0),
}


def test_what_hangs_is_ended_on_time_and_everything_else_runs_meanwhile(site, stalls):
    for name, (language, body, _) in HANGS.items():
        write = site.shell if language == "sh" else site.python
        write(name, body, schedule="every 1 d", order=1, deadline=1, timeout=TIMEOUT)
    for i in range(5):
        site.shell(f"other{i}", "exit 0", schedule="every 1 d")
    started = time.time()
    done = site.wake()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stalls.since(started) < 40
    for name, (_, _, seconds) in HANGS.items():
        found = site.rows("SELECT * FROM run WHERE task = ?", name)[0]
        took = found["ended_at"] - found["started_at"]
        assert found["outcome"] == "timed_out", name
        assert seconds - 0.5 < took - TIMEOUT, (name, took)
        took = stalls.seconds(found["started_at"], found["ended_at"])
        assert took - TIMEOUT < seconds + 8, (name, took)
    hung_until = min(
        row["ended_at"] for row in site.rows("SELECT * FROM run WHERE task = 'ignores_term'")
    )
    for i in range(5):
        found = site.rows("SELECT * FROM run WHERE task = ?", f"other{i}")[0]
        assert found["outcome"] == "done"
        assert found["started_at"] < hung_until + 8
    assert f'File "{site.tasks / "sleeps.py"}", line 10 in run' in site.log("sleeps")


def test_a_timed_out_python_task_cleans_up(site):
    ahead = site.movable_clock()
    body = f"""
    import time
    try:
        with open({str(ahead)!r}, "w") as file:
            file.write("1000")
        time.sleep(99)
    finally:
        print("clean")
    """
    site.first += "bgtasks.GRACE_SECONDS = 600"
    python(site, body, timeout=1000)
    assert "clean" in site.log("a")
    assert site.last("a")["outcome"] == "timed_out"


def test_a_daemon_in_its_group_is_ended_and_named(site):
    found = shell(site, "sleep 77 & until grep -q sleep /proc/$!/comm; do :; done; echo started")
    assert seconds_of(site) < 8
    assert found["outcome"] == "done"
    assert "left behind: " in found["reason"]
    assert "(sleep)" in found["reason"]


def test_a_daemon_that_left_its_group_keeps_no_run_open(site):
    apart = f"echo $$ >>{site.ledger}; {site.hold}"
    found = shell(site, f"setsid sh -c '{apart}' & until [ -s {site.ledger} ]; do sleep 0.02; done")
    assert found["outcome"] == "done"
    assert "session of its own" in found["reason"]
    assert site.status("a")["running"] is False
    assert run(site)["outcome"] == "done"


def test_much_output_is_kept_head_and_tail_and_the_disk_is_spared(site):
    body = "echo begin; yes 0123456789 | head -c 50000000; echo; echo end"
    found = shell(site, body, output_limit="1 MiB")
    text = site.log("a")
    assert found["outcome"] == "done"
    assert len(text) < 100_000
    assert text.startswith("begin\n")
    assert text.endswith("end\n")
    assert "bytes cut ...]" in text


def test_binary_output_is_stored_and_shown_escaped(site):
    shell(site, r"printf 'a\000b\377c\033[2J\n\tx'")
    assert site.log("a") == "a\\x00b\\xffc\\x1b[2J\n        x\n"


def test_secrets_are_masked_in_all_that_is_kept(site):
    site.params.write_text("node = here\nauth_pwd = sesame-open\n")
    site.params.chmod(0o600)
    body = "echo sesame-open; echo message=sesame-open >>$BGTASKS_REPORT"
    found = shell(site, body)
    assert (site.log("a"), found["message"]) == ("***\n", "***")
    assert b"sesame-open" not in (site.state / "bgtasks.db").read_bytes()
    (site.tasks / "a.sh").unlink()
    assert python(site, "raise ValueError('sesame-open')")["reason"] == "ValueError: ***"


def test_limits_and_a_task_inherits_nothing(site):
    body = """
    import os, resource, sys
    print(os.nice(0), resource.getrlimit(resource.RLIMIT_AS)[0], sys.stdin.read(), os.getcwd())
    print(os.getpgid(0) == os.getpid(), oct(os.umask(0)))
    for n in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{n}"):
            print(os.readlink(f"/proc/self/fd/{n}"))
    """
    found = python(site, body, nice=3, memory_limit="1 GiB")
    assert found["outcome"] == "done", site.log("a")
    nice = str(min(19, os.nice(0) + 3))
    assert site.log("a").splitlines()[0].split() == [nice, str(1 << 30), str(site.tasks)]
    assert site.log("a").splitlines()[1] == "True 0o77"
    assert "bgtasks.db" not in site.log("a")
    assert "locks" not in site.log("a")


def test_a_program_inherits_only_the_standard_descriptors(site):
    shell(site, "ls -l /proc/$$/fd | grep -c 'bgtasks.db\\|locks/'; cat; exit 0")
    assert site.log("a") == "0\n"


def test_too_little_memory_fails_the_task_alone(site):
    found = python(site, "x = bytearray(1 << 30)", memory_limit="200 MiB")
    assert (found["outcome"], found["reason"].split(":")[0]) == ("failed", "MemoryError")


def test_a_kill_before_the_keeper_has_said_who_it_is_is_not_lost(site):
    site.first = """
keep = bgtasks.keep
def late(brief, *rest):
    bgtasks.note(bgtasks.append_to(brief.live + ".keeper"), killed="ann")
    return keep(brief, *rest)
bgtasks.keep, bgtasks.GRACE_SECONDS = late, 0.5
"""
    site.shell("a", site.hold, schedule="every 1 d")
    site.wake()
    assert (site.last("a")["outcome"], site.last("a")["reason"]) == ("killed", "killed by ann")


KEEPER, TASK = 1, 2


@pytest.mark.parametrize("language", ["sh", "py"])
@pytest.mark.parametrize(
    ("generation", "step"),
    [
        (KEEPER, "os.setsid"),
        (KEEPER, "signal.set_wakeup_fd"),
        (KEEPER, "signal.signal"),
        (KEEPER, "signal.pthread_sigmask"),
        (KEEPER, "os.getpid"),
        (TASK, "os.setpgid"),
        (TASK, "signal.set_wakeup_fd"),
        (TASK, "signal.pthread_sigmask"),
    ],
)
def test_a_stop_is_not_lost_on_a_process_that_begins(site, generation, step, language):
    """A new process stands still at a step, and its runner is told to stop meanwhile."""
    site.first = f"""
import functools, os, signal, time
runner, folder, own_pid = os.getpid(), {str(site.folder)!r}, os.getpid
def stalls(true, *args, **named):
    generation = [own_pid(), os.getppid(), runner].index(runner)
    if generation == {generation} and not os.path.exists(folder + "/stalled"):
        open(folder + "/stalled", "w").close()
        while not os.path.exists(folder + "/told"):
            time.sleep(0.01)
    return true(*args, **named)
{step} = functools.partial(stalls, {step})
bgtasks.GRACE_SECONDS = 600
"""
    if language == "sh":
        site.shell("a", site.hold, schedule="every 1 d")
    else:
        site.python("a", "import time\nwhile True:\n    time.sleep(1)", schedule="every 1 d")
    runner = site.start("--cron_max_execution_time=0")
    wait_for((site.folder / "stalled").exists)
    runner.terminate()
    time.sleep(0.5)  # the signal goes its way, which nothing shows
    (site.folder / "told").touch()
    runner.wait(timeout=60)
    assert site.last("a")["outcome"] == "interrupted"


# -- keepers that are killed


def keeper_of(runner):
    path = Path(f"/proc/{runner.pid}/task/{runner.pid}/children")
    return int(wait_for(lambda: path.read_text().split())[0])


def begin(site, *tasks):
    runner = site.start("--cron_max_execution_time=0")
    wait_for(
        lambda: site.ledger.exists() and len(site.ledger.read_text().splitlines()) >= len(tasks)
    )
    return runner, keeper_of(runner)


@pytest.mark.parametrize("language", ["sh", "py"])
@pytest.mark.parametrize("victims", ["keeper", "both"])
def test_the_true_end_is_known_though_its_keeper_was_killed(site, language, victims):
    if language == "sh":
        site.shell("a", f"echo x >>{site.ledger}; {site.hold}; exit 3", schedule="every 1 d")
    else:
        body = f"""
        import pathlib, subprocess
        pathlib.Path({str(site.ledger)!r}).write_text("x")
        subprocess.run(["sh", "-c", {site.hold!r}])
        raise SystemExit(3)
        """
        site.python("a", body, schedule="every 1 d")
    runner, keeper = begin(site, "a")
    if victims == "both":
        runner.kill()
    os.kill(keeper, signal.SIGKILL)
    runner.wait()
    assert site.status("a")["running"] is True
    site.make_due()
    site.wake()
    assert len(site.rows("SELECT * FROM run")) == 1
    site.release()
    wait_for(lambda: not site.status("a")["running"])
    assert site.status("a")["last_outcome"] == "failed"
    site.wake("--exclude_task=a")
    assert (site.last("a")["outcome"], site.last("a")["exit_code"]) == ("failed", 3)


def test_a_task_that_writes_elsewhere_is_seen_without_its_keeper(site):
    log = site.folder / "log"
    body = f"exec >{log} 2>&1; echo x >>{site.ledger}; {site.hold}"
    site.shell("a", body, schedule="every 1 d")
    runner, keeper = begin(site, "a")
    os.kill(keeper, signal.SIGKILL)
    runner.wait()
    site.make_due()
    site.wake()
    assert site.status("a")["running"] is True
    assert len(site.rows("SELECT * FROM run")) == 1


def test_what_was_killed_whole_is_interrupted(site):
    site.shell("a", f"echo $$ >>{site.ledger}; exec sleep 60", schedule="every 1 d")
    runner, keeper = begin(site, "a")
    runner.kill()
    group = os.getpgid(int(site.ledger.read_text()))
    os.kill(keeper, signal.SIGKILL)
    os.killpg(group, signal.SIGKILL)
    runner.wait()
    wait_for(lambda: site.status("a")["last_outcome"] == "interrupted")
    assert site.rows("SELECT outcome FROM run") == [{"outcome": "running"}]
    site.wake()
    assert "vanished" in site.last("a")["reason"]


def test_a_run_past_its_timeout_without_keeper_is_ended_by_who_finds_it(site):
    ahead = site.movable_clock()
    site.shell("a", f"trap '' TERM; echo x >>{site.ledger}; sleep 60", timeout=1000)
    runner, keeper = begin(site, "a")
    runner.kill()
    os.kill(keeper, signal.SIGKILL)
    runner.wait()
    ahead.write_text("1000")
    site.first += "bgtasks.GRACE_SECONDS = 1"
    done = site.wake("--verbose")
    assert "past its timeout" in done.stdout
    site.wake()
    assert site.last("a")["outcome"] == "timed_out"


# -- small parts


def test_signals_arrive_as_numbers():
    signals = bgtasks.Signals(signal.SIGUSR1)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert list(signals.taken()) == [signal.SIGUSR1]
        assert signals.taken() == b""
    finally:
        signals.close()


def test_files_that_are_gone_are_nothing(tmp_path):
    live = str(tmp_path / "x")
    assert bgtasks.read_notes(live) == {}
    assert bgtasks.read_report(live) == {}
    assert bgtasks.read_output(live, ()) == ""
    assert bgtasks.is_locked(live) is False
    bgtasks.remove_live_files(live)


def test_files_of_a_run_that_cannot_be_made_are_an_error(tmp_path):
    with pytest.raises(bgtasks.CreateError, match=str(tmp_path)):
        bgtasks.new_live_files(str(tmp_path))


def test_an_unfinished_note_is_none(tmp_path):
    (tmp_path / "x.keeper").write_bytes(b'{"began": 1}\n{"end": "", "sta')
    assert bgtasks.read_notes(str(tmp_path / "x")) == {"began": 1}


def test_a_number_given_to_another_process_is_told_apart():
    leader = subprocess.Popen(["sleep", "60"], start_new_session=True)
    group, boot = leader.pid, bgtasks.boot_id()
    assert bgtasks.identity(group).startswith(f"{boot}:")
    assert bgtasks.identity(99999999) == ""
    assert bgtasks.group_members(group) == [f"{group} (sleep)"]
    assert bgtasks.group_members(99999999) == []
    assert bgtasks.task_lives({"group": [group, bgtasks.identity(group)]})
    assert not bgtasks.task_lives({"group": [group, f"{boot}:1"]})
    assert not bgtasks.task_lives({"group": [group, "another boot:1"]})
    assert not bgtasks.task_lives({})
    bgtasks.signal_group(99999999, signal.SIGTERM)
    bgtasks.signal_group(group, signal.SIGTERM)
    assert leader.wait(timeout=60) == -signal.SIGTERM


def test_perl_and_setsid_are_there():
    assert shutil.which("perl")
    assert subprocess.run(["setsid", "true"], check=False).returncode == 0
    assert sys.platform == "linux"


def test_each_ends_with_its_items(site):
    assert python(site, "return str([x for x in task.each([1, 2])])")["message"] == "[1, 2]"


def test_a_child_of_ours_that_fails_leaves_with_a_trace(site):
    code = (
        f"import os, sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import bgtasks\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(bgtasks.fork(lambda: 1 // 0), 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "70\n"
    assert "ZeroDivisionError" in done.stderr
    assert not site.state.exists()


def test_what_was_ended_with_its_runner_is_interrupted():
    ended = {"end": "interrupted", "status": -15}
    assert bgtasks._judge(ended, {}) == ("interrupted", "the runner was told to stop")
    assert bgtasks._judge({**ended, "exit": 0}, {}) == ("done", "")


def test_a_signal_that_came_before_the_program_reaches_it(site):
    settings = {key: default for key, (_, default) in bgtasks.TASK_SETTINGS.items()}
    task = bgtasks.Task("a", "a.toml", argv=("sleep", "60"), settings=settings)
    env = {"PATH": os.environ["PATH"]}
    brief = bgtasks.Brief(task, str(site.folder / "x"), (0, ""), str(site.tasks), 0, 0, env, {})

    def body():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)
        return int(bgtasks._run_program(brief, 2) != (-signal.SIGTERM, ""))

    assert os.waitpid(bgtasks.fork(body), 0)[1] == 0


def test_what_lies_beside_the_program_is_found_whatever_the_callers_path_is(site):
    site.python("a", "import bgtasks", schedule="manual")
    for path in ("", str(PROGRAM.parent)):
        assert site.run("run", "a", env={"PYTHONPATH": path}).returncode == 0


def test_a_python_task_gets_a_closed_pipe_as_an_error_as_python_has_it(site):
    site.python(
        "a",
        """
        import os
        readable, writable = os.pipe()
        os.close(readable)
        try:
            os.write(writable, b"x")
        except BrokenPipeError:
            return "told"
        """,
    )
    site.wake()
    assert (site.last("a")["outcome"], site.last("a")["message"]) == ("done", "told")
