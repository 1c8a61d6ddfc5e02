"""What the users of such systems complain of, each as a story through the command line.

The complaints are those of two tables: the 30 most wanted or most hated things of similar programs
(`test_peers_NN`), and the 25 most telling ones of the four systems that this program follows
(`test_seeds_NN`). NN is the row.

Not answered by this version, and so without a test:

    peers 30   a console that flashes on Windows: it does not run there yet

Answered in part, and tested as far: of late runs one or none can be had, but not all (peers 2);
whatever the machine says of itself changes nothing, but it is one kind of machine (seeds 8).
"""

import http.client
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlencode

import pytest
from conftest import PROGRAM, wait_for
from smtp_server import MailSink

pytestmark = pytest.mark.unmeasured

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


TOKEN = "a-secret-that-nobody-guesses-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@contextmanager
def served(site, **params):
    """The web side, copied beside the program; yields what asks it: (status, headers, text)."""
    for file in (PROGRAM, PROGRAM.parent / "contrib" / "web" / "bgtasks_web.py"):
        shutil.copy(file, site.folder)
    site.params.write_text("".join(f"{key} = {value}\n" for key, value in params.items()))
    site.params.chmod(0o600)
    command = [sys.executable, str(site.folder / "bgtasks_web.py"), "--port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    where = re.match("http://(.*)/ ", server.stdout.readline())[1]

    def ask(method, path, form=None, **headers):
        there = http.client.HTTPConnection(where, timeout=60)
        there.request(method, path, form and urlencode(form), {**(FORM if form else {}), **headers})
        reply = there.getresponse()
        found = reply.status, dict(reply.headers), reply.read().decode()
        there.close()
        return found

    ask.where = where
    with server:
        yield ask
        server.kill()


def note(site, name, more="", **settings):
    """A task that writes its name into the ledger, and then does some more."""
    body = f"echo {name} >>{site.ledger}\n{more}"
    return site.shell(name, body, **{"schedule": "every 1 d", **settings})


def noted(site):
    return site.ledger.read_text().split() if site.ledger.exists() else []


def outcomes(site, *task):
    """The outcomes of all runs, newest first."""
    return [run["outcome"] for run in site.json("history", *task, "--count", "1000")]


def explained(site, task, *args):
    return " ".join(site.run("explain", task, *args).stdout.split())


def findings(site, command, **options):
    """What `doctor` or `check` complains of, by what it is about."""
    found = json.loads(site.run(command, "--json", **options).stdout)
    found = found if command == "doctor" else found["findings"]
    return {item["about"]: f"{item['text']}; {item['way_out']}" for item in found if item["level"]}


def used():
    """The seconds of the processors that ended children took: what else runs must not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def away(moment):
    """The seconds from now to a moment in JSON."""
    return datetime.fromisoformat(moment).timestamp() - time.time()


def hold(site, name, stay=0, **settings):
    """Start a runner with a task whose first run hangs; return the runner and the task's PID."""
    pid = site.folder / "pid"
    once = f"mkdir {site.folder}/once 2>&- || exit 0; echo $$ >{pid}.new; mv {pid}.new {pid}"
    note(site, name, f"{once}; exec sleep 600", **settings)
    runner = site.start(f"--cron_max_execution_time={stay}")
    wait_for(pid.exists)
    return runner, int(pid.read_text())


def power_cut(site, name="a", **settings):
    """Kill a run together with its keeper and its runner, so that nobody can clean up."""
    runner, task = hold(site, name, **settings)
    keeper, group = os.getsid(task), os.getpgid(task)
    assert os.getpgid(0) not in (keeper, group)
    runner.kill()
    os.kill(keeper, signal.SIGKILL)
    os.killpg(group, signal.SIGKILL)
    runner.wait()
    wait_for(lambda: not site.status(name)["running"])


def at_once(site, flags, environ=None):
    """Start wake-ups at the same moment, one for each flag; return their exit codes and words."""
    gate = ["/bin/sh", "-c", 'read go; exec "$@"', "sh"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    commands = [gate + site.command("--cron_max_execution_time=0", flag) for flag in flags]
    calls = [subprocess.Popen(command, env=environ, text=True, **pipes) for command in commands]
    for call in calls:
        call.stdin.write("go\n")
        call.stdin.flush()
    said = [call.communicate(timeout=120)[0] for call in calls]
    return {(call.returncode, text) for call, text in zip(calls, said)}


def old_runs(site, count, days, outcome="done"):
    """Copy the last run many times, as if that had been so many days ago."""
    site.change(
        """
        WITH RECURSIVE number(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM number WHERE i < ?1)
        INSERT INTO run (task, steps, planned_at, started_at, deadline_at, ended_at, outcome,
                         trigger, node, live)
        SELECT task, steps, planned_at - ?2, started_at - ?2, deadline_at - ?2, ended_at - ?2, ?3,
               trigger, node, ?3 || i
        FROM number, (SELECT * FROM run ORDER BY id DESC LIMIT 1)
        """,
        count,
        days * 86400,
        outcome,
    )


def own_crontab(site, text=""):
    """An environment with a `crontab` that keeps its table in a file: some machines have none."""
    folder, table = site.folder / "bin", site.folder / "crontab"
    folder.mkdir()
    table.write_text(text)
    program = folder / "crontab"
    program.write_text(f'#!/bin/sh\n[ "$1" = -l ] && exec cat {table}\nexec cat >{table}\n')
    program.chmod(0o755)
    return table, {"PATH": f"{folder}:{os.environ['PATH']}"}


# -- the 30 of similar programs


def test_peers_01_a_crash_leaves_the_lock_and_the_task_never_runs_again(site):
    """A crash leaves the lock, so the task stays away for hours or for ever."""
    power_cut(site)
    assert site.status("a")["last_outcome"] == "interrupted"
    site.make_due()
    assert site.wake().returncode == 0
    assert outcomes(site, "a") == ["done", "interrupted"]
    assert noted(site) == ["a", "a"]


def test_peers_02_missed_runs_some_want_one_late_run_some_none(site):
    """After a gap each task should choose: run late, or not if it is too late."""
    note(site, "late", schedule="every 1 h")
    note(site, "never_late", schedule="every 1 h", missed_after="10 min")
    site.wake()
    site.change("UPDATE task SET next_run_at = next_run_at - 86400")
    site.wake()
    site.wake()
    assert sorted(noted(site)) == ["late", "late", "never_late"]
    assert outcomes(site, "late") == ["done", "done"]
    assert outcomes(site, "never_late") == ["missed", "done"]
    assert "also for 23 missed slots" in explained(site, "late")


def test_peers_02_a_task_that_takes_longer_than_its_interval_never_runs_again(site):
    """A run that outlasted its own next slot was always skipped as too late."""
    note(site, "a", "sleep 1.2", schedule="every 1 s")
    site.wake()
    site.wake()
    assert outcomes(site, "a") == ["done", "done"]


def test_peers_03_it_does_not_work_because_cron_was_never_set_up(site):
    """What does not work is mostly that nobody wakes it."""
    note(site, "a")
    assert "never woken" in site.run("status").stdout
    assert findings(site, "doctor")["wake-ups"] == "nobody has ever woken it; install --write"
    assert site.run("doctor").returncode == 1
    assert site.run("check").returncode == 2
    site.wake()
    assert "wake-ups" not in findings(site, "doctor")


def test_peers_03_it_is_woken_too_rarely_for_what_is_asked(site):
    """Woken every 15 minutes, a task that wants every 5 is always late."""
    note(site, "often", schedule="every 5 min")
    note(site, "rarely", schedule="every 1 h")
    for _ in range(3):
        site.wake()
        site.change("UPDATE wakeup SET started_at = started_at - 900, ended_at = ended_at - 900")
    found = findings(site, "doctor")
    assert "is asked every 5 min" in found["often"]
    assert "for 15 min" in found["often"]
    assert "rarely" not in found


def test_peers_04_one_bad_task_schedule_or_config_line_stops_all(site):
    """One file that cannot be read, and nothing at all runs any more."""
    note(site, "good")
    site.python("syntax", "x = )")
    note(site, "schedule", schedule="every 0 min")
    note(site, "key", shedule="every 1 h")
    note(site, "line")
    site.params.write_text("node = here\ntask.line.ordre = 5\n")
    assert site.wake().returncode == 0
    assert noted(site) == ["good"]
    broken = {task["name"]: task["reason"] for task in site.json("status")["tasks"][:4]}
    assert sorted(broken) == ["key", "line", "schedule", "syntax"]
    assert broken["syntax"].startswith("syntax.py:6: ")
    assert broken["line"].startswith(f"{site.params}:2: ")


def test_peers_04_a_bad_config_line_is_told_as_a_fault_of_the_task_file(site):
    """The reason names a file that is right, and not the line that is wrong."""
    note(site, "good")
    note(site, "line")
    site.params.write_text("node = here\ntask.line.schedule = sometimes\n")
    site.wake()
    assert noted(site) == ["good"]
    assert site.status("line")["reason"].startswith(f"{site.params}:2: ")


def test_peers_04_a_date_that_never_comes_stops_all(site):
    """30 February passes as valid, and then the scheduler dies of it."""
    pytest.importorskip("croniter", reason="croniter is not installed")
    note(site, "good")
    note(site, "never", schedule="0 0 30 2 *")
    assert site.wake().returncode == 0
    assert noted(site) == ["good"]
    assert site.status("never")["state"] == "broken"


def test_peers_05_files_are_silently_ignored(site):
    """A dot in the name, no x bit, a bad expression: it does not run, and nobody says so."""
    note(site, "no_x_bit").chmod(0o644)
    for file in ("data.base.sh", "a.sh~", "README.md", ".hidden.sh"):
        site.write(file, f"#!/bin/sh\necho {file} >>{site.ledger}\n", 0o755)
    site.write("without.sh", "#!/bin/sh\n", 0o755)
    note(site, "typo", schedule="dayly 03:30")
    site.wake()
    assert noted(site) == ["no_x_bit"]
    found = {task["name"]: (task["state"], task["reason"]) for task in site.json("status")["tasks"]}
    ignored = {name for name, (state, reason) in found.items() if state == "ignored" and reason}
    assert ignored == {"data.base.sh", "a.sh~", "README.md", ".hidden.sh"}
    assert found["without"][0] == found["typo"][0] == "broken"
    assert set(found) == ignored | {"no_x_bit", "without", "typo"}


def test_peers_06_a_time_limit_is_needed(site, stalls):
    """Nothing ends a run that never ends by itself."""
    note(site, "a", "sleep 60", timeout=1)
    started = time.time()
    assert site.run("run", "a").returncode == 124
    assert time.time() - started >= 1
    assert stalls.since(started) < 10
    assert site.last("a")["outcome"] == "timed_out"
    assert "timeout" in site.last("a")["reason"]


def test_peers_07_the_timeout_kills_the_child_and_its_children_live_on(site, stalls):
    """The shell is gone, what it started works on, and its open pipe blocks the runner."""
    tick = f"for i in $(seq 600); do echo $i >>{site.ledger}; echo $i; sleep 0.1; done"
    ticks = f"until [ -s {site.ledger} ]; do sleep 0.1; done"
    late = f"echo 1000 >{site.movable_clock()}"
    site.shell("a", f"(trap '' TERM; {tick}) & {ticks}; {late}; sleep 60", timeout=1000)
    started = time.time()
    assert site.run("run", "a").returncode == 124
    assert stalls.since(started) < 10
    before = len(noted(site))
    time.sleep(0.5)
    assert len(noted(site)) == before > 0


def test_peers_07_or_a_mail_sender_that_should_live_on_is_cut_off(site):
    """The reverse wish: what went into a session of its own is none of the runner's business."""
    mailer = f"touch {site.folder}/begun; {site.hold}; echo sent >>{site.ledger}"
    begun = f"until [ -e {site.folder}/begun ]; do sleep 0.02; done"
    site.shell("a", f"setsid sh -c '{mailer}' & {begun}")
    site.wake()
    assert noted(site) == []
    assert outcomes(site, "a") == ["done"]
    assert "which was let live" in site.last("a")["reason"]
    site.release()
    wait_for(lambda: noted(site) == ["sent"])


def test_peers_08_one_slow_task_starves_the_rest(site):
    """Everything waits until the slow one is done."""
    note(site, "slow", site.hold, order=1, deadline=1)
    note(site, "fast")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(lambda: noted(site) == ["slow", "fast"])
    assert site.status("slow")["running"] is True
    assert site.run("kill", "slow").returncode == 0
    assert runner.wait(60) == 0


def test_peers_09_two_ways_to_wake_it_run_the_same_task_together(site):
    """System cron and a second line or a web visit start the same task at once."""
    for name in ("a", "b", "c"):
        note(site, name)
    ways = ["--verbose=0", "--group=default", "--task=a,b,c", "--exclude_task=d", "--cron_limit=9"]
    assert at_once(site, ways) == {(0, "")}
    assert sorted(noted(site)) == ["a", "b", "c"]
    assert outcomes(site) == ["done"] * 3


def test_peers_09_nobody_says_that_the_crontab_line_is_there_twice(site):
    """A doubled crontab line goes unseen for years."""
    note(site, "a")
    site.wake()
    line = "*/5 * * * * python3 /srv/bgtasks.py\n"
    table, env = own_crontab(site, line)
    assert "crontab" not in findings(site, "doctor", env=env)
    table.write_text(line * 2)
    assert findings(site, "doctor", env=env)["crontab"].startswith("2 lines wake it")


def test_peers_10_a_lease_shorter_than_the_task_starts_it_twice(site):
    """The lease ran out while the task was still at work, so it was started again, and again."""
    runner, _ = hold(site, "a", deadline=1)
    site.change("UPDATE run SET started_at = started_at - 9e5, deadline_at = deadline_at - 9e5")
    site.change("UPDATE task SET last_started_at = last_started_at - 9e5")
    for _ in range(2):
        site.make_due()
        assert site.wake("--group=default").returncode == 0
    assert noted(site) == ["a"]
    assert site.status("a")["running"] is True
    assert "its last run was still at work" in explained(site, "a")
    site.run("kill", "a")
    runner.wait(60)
    assert outcomes(site) == ["killed"]


def test_peers_11_a_mail_for_every_failure_until_people_mute_them_all(site):
    """Every run that fails sends a mail, and nobody says when it works again."""
    site.first = "bgtasks.SEND_SECONDS = 60"
    with MailSink() as sink:
        site.params.write_text(f"node = here\nnotify_email = me@example.org\n{sink.params()}")
        note(site, "new")
        site.wake()
        fails = site.folder / "fails"
        fails.touch()
        note(site, "a", f"echo no room; [ ! -e {fails} ]", retries=0, retry_delay=1)
        for _ in range(4):
            site.change("UPDATE task SET not_before = NULL")
            site.wake()
            site.make_due("a")
        assert outcomes(site, "a")[:3] == ["failed"] * 3
        fails.unlink()
        site.change("UPDATE task SET not_before = NULL")
        site.wake()
    texts = [content.decode() for _, _, content in sink.mails]
    assert len(texts) == 3
    assert "new ran for the first time" in texts[0]
    assert "a began to fail; exit code 1" in texts[1]
    assert "no room" in texts[1]
    assert "a works again" in texts[2]


def test_peers_12_an_automatic_switch_off_comes_as_a_surprise(site):
    """Suddenly it is delayed or off, without warning, reason or a way back."""
    note(site, "a", "exit 3", pause_after_failures=4)
    site.wake()
    site.run("run", "a", "--force")
    found = site.status("a")
    assert "failed 2 times in a row; is paused at 4; next try not before" in found["reason"]
    assert 0 < away(found["retry_at"]) <= 60
    site.run("clear", "a")
    assert (site.status("a")["retry_at"], site.status("a")["reason"]) == (None, "")
    for _ in range(4):
        site.run("run", "a", "--force")
    assert site.status("a")["state"] == "paused"
    assert site.status("a")["reason"] == "by bgtasks; failed 4 times in a row"
    site.run("resume", "a")
    assert site.status("a")["state"] == "active"


def test_peers_13_see_what_runs_now_stop_it_start_it(site):
    """There is no way to see, stop or start a task."""
    runner, _ = hold(site, "a")
    assert site.status("a")["running"] is True
    assert "running" in site.run("status").stdout
    done = site.run("kill", "a")
    assert (done.returncode, done.stdout) == (0, "a: run 1 killed\n")
    runner.wait(60)
    assert (site.status("a")["running"], site.last("a")["outcome"]) == (False, "killed")
    assert site.run("run", "a").returncode == 0
    assert noted(site) == ["a", "a"]


def test_peers_14_pause_all_during_a_deploy_and_see_that_it_is_paused(site):
    """The list does not show the pause, and paused runs look as if they were done."""
    note(site, "a")
    note(site, "b")
    assert site.run("pause", "--all", "--for", "2h", "--note", "deploy").returncode == 0
    site.wake()
    assert (noted(site), site.json("history")) == ([], [])
    for found in site.json("status")["tasks"]:
        assert (found["state"], found["reason"][-8:]) == ("paused", "; deploy")
        assert 7100 < away(found["paused_until"]) <= 7200
    assert "it was paused by " in explained(site, "a")
    site.run("resume", "a")
    site.change("UPDATE task SET paused_until = paused_until - 7201 WHERE name = 'b'")
    site.wake()
    assert noted(site) == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "flags", "words"),
    [
        ({"enabled": False}, [], "it is disabled; what changes it: enabled = true"),
        ({"nodes": ["there"]}, [], "it runs on there; what changes it: nodes = "),
        ({"wakeup": ["web"]}, [], "it is started by web only"),
        ({"after": ["b"]}, [], "it waits for b; what changes it: run these first"),
        ({}, ["--exclude_task=a"], "the wake-up had other work: --exclude_task=a"),
        ({}, ["--maintenance_flag=tasks.d"], "the maintenance flag was there"),
        ({}, ["--cron_limit=1"], "the wake-up had started as many as cron_limit allows"),
    ],
    ids=["disabled", "node", "wakeup", "after", "selection", "maintenance", "limit"],
)
def test_peers_15_tell_me_why_it_did_not_run(site, settings, flags, words):
    """It did not run, and nothing says why."""
    note(site, "a", order=2, **settings)
    site.shell("b", "exit 1", order=1)
    site.wake(*flags)
    assert noted(site) == []
    assert words in explained(site, "a")


def test_peers_16_validate_a_schedule_and_preview_the_next_runs(site):
    """One learns at night whether the schedule means what one thought."""
    note(site, "good")
    note(site, "bad", schedule="dayly 03:30")
    done = site.run("lint")
    assert (done.returncode, "good.sh: ok" in done.stdout) == (1, True)
    assert "bad.sh: broken: " in done.stdout
    args = ["--from", "2026-01-01T00:00:00Z", "--timezone", "UTC", "--count", "2"]
    assert site.json("next", "weekdays 07:00,19:00", *args) == [
        "2026-01-01T07:00:00+00:00",
        "2026-01-01T19:00:00+00:00",
    ]
    assert site.run("next", "daily 25:00").returncode == 64
    assert len(site.json("next", "good")) == 5
    assert not site.ledger.exists()


@pytest.mark.parametrize(
    ("zone", "at", "before", "moments"),
    [
        ("Europe/Berlin", "02:30", "2026-03-28T12:00", ["29T03:00:00+02:00", "30T02:30:00+02:00"]),
        ("Europe/Berlin", "02:30", "2026-10-24T12:00", ["25T02:30:00+02:00", "26T02:30:00+01:00"]),
        ("America/New_York", "02:30", "2026-03-07T12:00", ["08T03:00:00-04:00", "09T02:30"]),
        ("America/New_York", "01:30", "2026-10-31T12:00", ["01T01:30:00-04:00", "02T01:30"]),
        ("Australia/Lord_Howe", "02:15", "2026-10-03T12:00", ["04T02:30:00+11:00", "05T02:15"]),
    ],
)
def test_peers_17_summer_time_skips_doubles_or_shifts_a_run(site, zone, at, before, moments):
    """On the night the clocks change it is skipped, runs twice, or is an hour off from then on."""
    args = ["--timezone", zone, "--from", before, "--count"]
    found = [moment[8:] for moment in site.json("next", f"daily {at}", *args, "2")]
    assert all(moment.startswith(start) for moment, start in zip(found, moments)), found
    every = [datetime.fromisoformat(m) for m in site.json("next", "every 1 h", *args, "36")]
    assert {(late - early).total_seconds() for early, late in zip(every, every[1:])} == {3600}


@only_root
def test_peers_18_cron_as_root_leaves_files_of_root_behind(site):
    """Woken by root once, the application can no longer write its own files."""
    note(site, "a")
    os.chown(site.folder, 65534, 65534)
    done = site.wake()
    assert done.returncode == 77
    assert "you are root; run it as " in done.stderr
    assert not site.state.exists()
    assert noted(site) == []


def test_peers_19_it_works_by_hand_but_not_from_cron(site):
    """Other folder, other interpreter, other environment."""
    body = """
    import os, sys
    print(os.getcwd(), sys.executable, sys.stdin.read(), os.umask(0), sys.path)
    print({key: text for key, text in os.environ.items() if "BGTASKS" not in key})
    """
    site.python("a", body, env={"PATH": "/opt/app/bin:/usr/bin"})
    hand = {"VIRTUAL_ENV": "/mine", "EDITOR": "vi", "BASH_ENV": "/mine"}
    assert site.run("run", "a", env=hand, cwd=site.folder, input="x").returncode == 0
    kept = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR")
    cron = {key: os.environ[key] for key in os.environ if key in kept or key[:3] in ("LC_", "COV")}
    command = site.command("--cron_max_execution_time=0")
    subprocess.run(command, env={"PATH": "/usr/bin:/bin", **cron}, cwd="/", check=True)
    assert outcomes(site, "a") == ["done", "done"]
    assert site.log(1) == site.log(2)
    assert "/opt/app/bin" in site.log(1)


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_peers_19_a_module_is_found_by_hand_but_not_from_cron(site, kind):
    """PYTHONPATH is set in one's own shell only; what fails from cron must fail by hand too."""
    (site.folder / "mine").mkdir()
    (site.folder / "mine" / "helpful.py").write_text("")
    site.python("a", "import helpful", schedule="every 1 d")
    site.wake()
    assert site.last("a")["reason"] == "ModuleNotFoundError: No module named 'helpful'"
    hand = {"PYTHONPATH": str(site.folder / "mine") if kind == "absolute" else "mine"}
    assert site.run("run", "a", "--force", env=hand, cwd=site.folder).returncode == 1


def test_peers_20_no_record_of_what_fired(site):
    """306 runs within minutes, and no log of any."""
    site.shell("a", "echo said; echo message=fine >>$BGTASKS_REPORT", schedule="every 1 d")
    site.shell("b", "exit 3", schedule="every 1 d")
    site.wake()
    site.run("run", "a")
    found = site.json("history")
    assert [(run["task"], run["trigger"], run["outcome"], run["exit_code"]) for run in found] == [
        ("a", "hand", "done", 0),
        ("b", "cli", "failed", 3),
        ("a", "cli", "done", 0),
    ]
    assert all(run["started_at"] <= run["ended_at"] for run in found)
    assert all(-60 < away(run[key]) <= 0 for run in found for key in ("started_at", "ended_at"))
    assert (found[0]["message"], site.log(1)) == ("fine", "said\n")


def test_peers_21_the_history_eats_the_disk(site):
    """The table grows to gigabytes, and the cleaning cannot keep up."""
    site.first = "bgtasks.CLEANING_SECONDS = 60"
    note(site, "a")
    site.wake()
    old_runs(site, 30, days=40, outcome="failed")
    old_runs(site, 1000, days=41)
    for _ in range(2):
        site.make_due()
        site.wake()
    found = outcomes(site, "a")
    assert (len(found) < 60, found.count("failed")) == (True, 30)
    days = 60 * 86400
    site.change("UPDATE run SET started_at = started_at - ?1, ended_at = ended_at - ?1", days)
    site.make_due()
    site.wake()
    assert len(outcomes(site, "a")) == 20


def test_peers_22_huge_output_and_its_end_is_what_one_wants(site):
    """Only the first part is kept, but the error stands at the end."""
    site.shell("a", "echo begin; yes 0123456789 | head -c 5000000; echo; echo the error; exit 1")
    site.wake()
    text = site.log("a")
    assert text.startswith("begin\n")
    assert text.endswith("\nthe error\n")
    assert re.search(r"\[\.\.\. \d+ bytes cut \.\.\.\]", text)
    assert len(text) < 100_000


class Pings(BaseHTTPRequestHandler):
    """A dead-man URL: it remembers what was called."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.taken.append((self.path, body.decode()))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


def test_peers_23_a_dead_man_url_is_called_at_start_and_end(site):
    """It takes a wrapper for each task until the monitoring service hears of its runs."""
    site.first = "bgtasks.PING_SECONDS = 60"
    with HTTPServer(("127.0.0.1", 0), Pings) as server:
        server.taken = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/1-2-3?rid=7"
        note(site, "a", f"echo copied; [ ! -e {site.folder}/fails ]", ping=url)
        site.wake()
        (site.folder / "fails").touch()
        site.make_due("a")
        site.wake()
        server.shutdown()
    paths = ["/1-2-3/start?rid=7", "/1-2-3?rid=7", "/1-2-3/start?rid=7", "/1-2-3/fail?rid=7"]
    assert sorted(path for path, _ in server.taken) == sorted(paths)
    assert {body for path, body in server.taken if "start" not in path} == {"copied\n"}
    assert outcomes(site) == ["failed", "done"]


def test_peers_24_the_monitor_check_itself_breaks_or_hides_the_cause(site):
    """The check dies with a trace, or is red and does not say of what."""
    note(site, "good")
    site.shell("bad", "exit 3", schedule="every 1 d")
    site.wake()
    done = site.run("check")
    assert (done.returncode, done.stderr) == (1, "")
    assert re.fullmatch(r"BGTASKS WARNING - bad: failed, 1 in a row\|.*failing=1;.*\n", done.stdout)
    (site.state / "bgtasks.db").write_bytes(b"no database" * 999)
    for break_more in (lambda: None, lambda: site.params.write_text("nonsense\n")):
        break_more()
        done = site.run("check")
        assert (done.returncode, done.stdout.count("\n"), done.stderr) == (3, 1, "")
        assert done.stdout.startswith(f"BGTASKS UNKNOWN - {site.folder}/")


def wait_and_note(site, name):
    """A task that is at work until the test lets it end."""
    wait = f"while [ ! -e {site.folder}/go ]; do sleep 0.1; done"
    site.shell(name, f"{wait}; echo {name} >>{site.ledger}", schedule="every 1 d")


def test_peers_25_shared_hosting_has_only_url_cron_with_30_seconds(site):
    """A service calls a secret address, and gives up after 30 s; whoever guesses it may too."""
    wait_and_note(site, "long")
    with served(site, web_token=TOKEN, cron_max_execution_time=0) as ask:
        assert ask("GET", f"/wake/{TOKEN}")[0] == 405  # only where it was switched on
    with served(site, web_token=TOKEN, web_allow_get=1, cron_max_execution_time=0) as ask:
        assert [ask("GET", f"/wake/{TOKEN[:-1]}{n}")[0] for n in range(9)] == [401] * 5 + [429] * 4
        assert noted(site) == []
        site.change("DELETE FROM fact WHERE name LIKE 'wrong%'")
        status, _, text = ask("GET", f"/wake/{TOKEN}")
        assert (status, json.loads(text), noted(site)) == (202, {"started": True}, [])
        (site.folder / "go").touch()
        wait_for(lambda: noted(site) == ["long"])
    done = wait_for(lambda: next((run for run in site.json("history") if run["ended_at"]), None))
    assert (done["outcome"], done["trigger"]) == ("done", "web")
    site.params.write_text("web_token = too-short\n")
    assert "web_token must have at least 32 characters" in site.run("--status_only").stderr


def test_peers_26_web_dashboards_get_hacked(site):
    """It listens on every address without a password, and runs what a stranger sends."""
    site.shell("a", f"echo '<script>steal()</script>' | tee -a {site.ledger}", schedule="manual")
    with served(site) as ask:
        assert ask.where.startswith("127.0.0.1:")
        for path in ("/", "/wake", "/api/status", "/task/a", "/login", "/../cron.params"):
            assert ask("GET", path)[::2] == (404, '{"error": "Not Found"}\n')
    assert site.run("admin", "add", "ann", input="long enough\n").returncode == 0
    with served(site, auth_user="ann", auth_pwd="long enough", cron_max_execution_time=0) as ask:
        for method in ("GET", "POST"):
            assert "Log in" in ask(method, "/task/a/request")[2]
        assert noted(site) == []
        assert site.run("run", "a").returncode == 0
        login = {"user": "ann", "password": "long enough"}
        status, headers, _ = ask("POST", "/login", login)
        cookie = {"Cookie": headers["Set-Cookie"].partition(";")[0]}
        assert (status, "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]) == (303, True)
        number = site.last("a")["id"]
        page = ask("GET", f"/run/{number}", **cookie)
        assert "&lt;script&gt;steal()" in page[2]
        assert "<script>steal()" not in page[2]
        assert page[1]["Content-Security-Policy"].startswith("default-src 'none'")
        assert ask("POST", "/task/a/request", {"csrf": "0" * 64}, **cookie)[0] == 403
    assert site.status("a")["runs"] == 1


def test_peers_27_the_database_is_locked_and_the_result_is_lost(site):
    """Another program holds the file, and how the run ended is gone."""
    note(site, "a", f"echo result; echo volume=7 >>$BGTASKS_REPORT; {site.hold}")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(site.ledger.exists)
    other = sqlite3.connect(site.state / "bgtasks.db", isolation_level=None, timeout=60)
    other.execute("BEGIN EXCLUSIVE")
    site.release()
    assert runner.wait(120) == 75
    assert "in use by another program for too long; try again" in site.said.read_text()
    other.execute("ROLLBACK")
    other.close()
    assert site.wake().returncode == 0
    found = site.last("a")
    assert (found["outcome"], found["volume"], site.log(1)) == ("done", 7, "result\n")
    assert outcomes(site) == ["done"]
    assert noted(site) == ["a"]


def test_peers_28_heavy_work_only_off_peak(site):
    """Heavy work should wait for the night; a window that never fits should be told."""
    hour = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
    opens, closes = hour + timedelta(hours=3), hour + timedelta(hours=5)
    window = f"{opens:%H:%M}-{closes:%H:%M}"
    note(site, "heavy", window=window, timezone="UTC")
    note(site, "never", schedule="daily 12:00", window="22:00-06:00")
    site.wake()
    assert noted(site) == []
    assert f"it was outside its window {window}, opens " in explained(site, "heavy")
    assert datetime.fromisoformat(site.status("heavy")["next_run_at"]) == opens
    assert site.status("never")["state"] == "broken"
    assert "window" in site.status("never")["reason"]
    assert site.run("run", "heavy").returncode == 75
    assert site.run("run", "heavy", "--force").returncode == 0


def test_peers_28_everything_starts_at_the_full_hour(site):
    """All machines and all tasks start at the same minute."""
    pytest.importorskip("croniter", reason="croniter is not installed")
    for name in ("a", "b", "c", "d"):
        note(site, name, schedule="H H * * *")
    since = "--from=2026-01-01T00:00:00Z"
    moments = {name: site.json("next", name, since)[0] for name in ("a", "b", "c", "d")}
    assert len({moment[11:16] for moment in moments.values()}) > 1
    site.wake()
    assert {name: site.json("next", name, since)[0] for name in moments} == moments
    there = {name: site.json("next", name, since, "--node=there")[0] for name in moments}
    assert there != moments


def test_peers_29_an_upgrade_resets_what_the_admin_chose(site):
    """After an update the schedule is the shipped one again, and the pause is gone."""
    note(site, "a", options={"days": 2})
    site.params.write_text("task.a.schedule = every 7 h\ntask.a.options.days = 9\n")
    note(site, "b")
    site.wake()
    site.run("pause", "b")
    note(site, "a", f"echo $BGTASKS_OPTION_DAYS >>{site.ledger}", options={"days": 3})
    note(site, "b", "true", schedule="every 2 h")
    site.make_due()
    site.wake()
    assert noted(site) == ["a", "b", "a", "9"]
    assert (site.status("a")["schedule"], site.status("b")["state"]) == ("every 7 h", "paused")


def test_peers_29_each_upgrade_adds_the_crontab_line_again(site):
    """The block in the crontab doubles with each release."""
    table, env = own_crontab(site, "MAILTO=me\n0 1 * * * backup\n")
    note(site, "a")
    for _ in range(3):
        assert site.run("install", "--write", env=env).returncode == 0
    lines = table.read_text().splitlines()
    assert lines[:2] == ["MAILTO=me", "0 1 * * * backup"]
    assert [line[:12] for line in lines[2:]] == ["*/5 * * * * "]
    assert "crontab" not in findings(site, "doctor", env=env)
    site.params.write_text("cron_max_execution_time = 0\n")
    subprocess.run(["sh", "-c", lines[2][12:]], cwd="/", check=True)
    assert noted(site) == ["a"]


# -- the 25 of the systems that this program follows


def test_seeds_01_a_task_stays_running_after_a_crash(site):
    """It stays "Running" for ever, and people reset it by hand for years."""
    power_cut(site)
    found = site.status("a")
    assert (found["running"], found["last_outcome"]) == (False, "interrupted")
    site.wake()
    assert "vanished before it ended" in site.last("a")["reason"]
    assert site.run("run", "a").returncode == 0
    assert site.status("a")["reason"] == "1 interrupted, not yet cleared"


def test_seeds_02_a_hung_first_task_starves_all_later_ones(site):
    """The first one hangs in every wake-up, and the others never get their turn."""
    late = f"echo 1000 >>{site.movable_clock()}"
    note(site, "a", f"{late}; sleep 60", order=1, timeout=1000)
    note(site, "b")
    note(site, "c")
    for _ in range(2):
        assert site.wake().returncode == 0
        site.make_due()
        site.change("UPDATE task SET not_before = NULL")
    assert noted(site) == ["a", "b", "c", "b", "c", "a"]
    assert outcomes(site, "a") == ["timed_out", "timed_out"]


def test_seeds_02_a_first_task_that_takes_its_runner_down_starves_all_later_ones(site):
    """It takes the whole process down, is first again at the next wake-up, and so on."""
    site.params.write_text("max_interruptions = 2\n")
    note(site, "a", site.hold, order=1)
    note(site, "b")
    for wanted in (["a"], ["a", "b", "a"]):
        runner = site.start("--cron_max_execution_time=0")
        wait_for(lambda wanted=wanted: noted(site) == wanted)
        runner.kill()
        runner.wait()
        site.release()
        wait_for(lambda: not site.status("a")["running"])
        (site.folder / "released").unlink()
        site.make_due("a")
    site.wake()
    assert noted(site) == ["a", "b", "a"]
    assert (site.status("a")["state"], site.status("b")["last_outcome"]) == ("paused", "done")
    assert "went down 2 times in a row" in site.status("a")["reason"]


def test_seeds_03_one_long_task_blocks_every_small_one(site):
    """Ten minutes of import, and no mail goes out meanwhile: "cannot get the lock"."""
    note(site, "long", site.hold, group="slow")
    note(site, "small")
    runner = site.start("--group=slow", "--cron_max_execution_time=0")
    wait_for(lambda: noted(site) == ["long"])
    assert site.wake("--exclude_group=slow").returncode == 0
    assert noted(site) == ["long", "small"]
    assert site.status("long")["running"] is True
    site.run("kill", "long")
    runner.wait(60)


def test_seeds_04_the_same_task_runs_twice_at_once(site):
    """The second start does not see the first one."""
    runner, _ = hold(site, "a")
    done = site.run("run", "a", "--force")
    assert (done.returncode, "is running already" in done.stderr) == (75, True)
    site.run("request", "a")
    assert site.wake("--task=a").returncode == 0
    assert noted(site) == ["a"]
    site.run("kill", "a")
    runner.wait(60)
    site.wake()
    assert noted(site) == ["a", "a"]


def test_seeds_05_overlapping_calls_pile_up_until_the_memory_is_gone(site, stalls):
    """Each minute one more process that waits for the first."""
    runner, _ = hold(site, "a", stay=600)
    started = time.time()
    later = [site.start() for _ in range(5)]
    assert [call.wait(60) for call in later] == [0] * 5
    assert stalls.since(started) < 10
    assert site.said.read_text() == ""
    assert (runner.poll(), noted(site)) == (None, ["a"])
    runner.terminate()
    runner.wait(60)


def test_seeds_06_duplicate_rows_for_one_minute(site):
    """The same minute is planned several times, and then done several times."""
    for name in ("a", "b", "c"):
        note(site, name)
    for _ in range(2):
        assert at_once(site, [f"--exclude_task=none{i}" for i in range(10)]) == {(0, "")}
        site.make_due()
    found = [(run["task"], run["planned_at"]) for run in site.json("history")]
    assert sorted(noted(site)) == ["a", "a", "b", "b", "c", "c"]
    assert (len(found), len(set(found))) == (6, 6)


def test_seeds_07_after_one_crash_the_pending_table_grows_without_end(site):
    """What was planned is never done, and the table makes everything slow."""
    power_cut(site, schedule="every 1 h")
    site.change("UPDATE task SET next_run_at = next_run_at - 7 * 86400")
    site.wake()
    site.wake()
    assert outcomes(site) == ["done", "interrupted"]
    assert re.search(r"also for 16\d missed slots", explained(site, "a"))
    assert 0 < away(site.status("a")["next_run_at"]) <= 3600


def test_seeds_08_mails_are_sent_twice_as_the_guard_guessed_the_platform_wrong(site):
    """Where the system was not the expected one, the guard was off and mails went out twice."""
    for box in ("in", "out", "sent"):
        body = f"with open({str(site.ledger)!r}, 'a') as mails: mails.write('{box}\\n')"
        site.python(box, body, schedule="every 1 d")
    env = {**os.environ, "OS": "Windows_NT", "OSTYPE": "msys", "PATH": "/nowhere", "HOME": "/"}
    assert at_once(site, [f"--exclude_task=none{i}" for i in range(10)], env) == {(0, "")}
    assert sorted(noted(site)) == ["in", "out", "sent"]


def test_seeds_09_it_fails_silently_with_its_output_thrown_away(site):
    """`>/dev/null 2>&1` in the crontab, and a fatal error leaves no trace at all."""
    site.shell("a", "kill -SEGV $$", schedule="every 1 d")
    nowhere = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    site.wake(**nowhere)
    assert (site.last("a")["outcome"], site.last("a")["reason"]) == ("failed", "ended by SIGSEGV")
    assert "a" in findings(site, "check")
    (site.folder / "maintenance").touch()
    site.wake(**nowhere)
    assert site.json("status")["last_wakeup"]["result"] == "maintenance"


def test_seeds_09_it_fails_silently_when_it_cannot_work_at_all(site):
    """Nothing runs, the exit code is 0, and nothing is printed."""
    note(site, "a")
    site.params.write_text("node = here\nnoode = there\n")
    done = site.wake()
    assert done.returncode == 78
    assert re.fullmatch(rf"bgtasks: {site.params}:2: .*'node'.*\n", done.stderr)
    site.params.write_text("")
    site.tasks.rename(site.folder / "elsewhere")
    done = site.wake()
    assert (done.returncode, "cannot read the folder of tasks" in done.stderr) == (78, True)


def test_seeds_10_is_cron_working_at_all(site):
    """Tasks are shown as due, the log says nothing, and nobody knows if cron works."""
    note(site, "a", schedule="every 10 min")
    site.wake()
    found = site.json("status")["last_wakeup"]
    assert (found["trigger"], found["node"], found["result"]) == ("cli", "here", "worked")
    assert (-60 < away(found["started_at"]) < 0, bool(found["user"])) == (True, True)
    assert site.run("check").returncode == 0
    site.change("UPDATE wakeup SET started_at = started_at - 7200, ended_at = ended_at - 7200")
    site.change("UPDATE task SET next_run_at = next_run_at - 7200")
    assert site.run("check").returncode == 2
    assert findings(site, "doctor")["wake-ups"].startswith("last 2 h ago")
    assert "a" in findings(site, "doctor")
    assert "Nobody woke the runner since" in explained(site, "a")


def test_seeds_11_living_tasks_are_reported_gone(site):
    """A PID that is not found, or a high age, and a task at work is called dead."""
    pid = site.folder / "pid"
    note(site, "a", f"echo $$ >{pid}.new; mv {pid}.new {pid}; {site.hold}; exit 3")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(pid.exists)
    runner.kill()
    os.kill(os.getsid(int(pid.read_text())), signal.SIGKILL)
    runner.wait()
    site.change("UPDATE run SET started_at = started_at - 9e5, deadline_at = deadline_at - 9e5")
    site.wake()
    assert (site.status("a")["running"], outcomes(site)) == (True, ["running"])
    site.release()
    wait_for(lambda: not site.status("a")["running"])
    site.wake()
    assert (outcomes(site), site.last("a")["exit_code"]) == (["failed"], 3)


def test_seeds_11_rows_that_were_never_executed_stay_running(site):
    """A row says "running", but there is no process and never was one."""
    note(site, "a")
    site.wake()
    site.change("UPDATE run SET ended_at = NULL, outcome = 'running', live = 'none'")
    assert site.status("a")["running"] is False
    site.make_due()
    site.wake()
    assert outcomes(site) == ["done", "interrupted"]


@pytest.mark.parametrize("machine", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def test_seeds_12_wrong_hour_wrong_weekday_doubled_offset(site, machine):
    """Where machine and application have different zones, it starts at the wrong time."""
    note(site, "a", schedule="mon,thu 03:30", timezone="Europe/Berlin")
    args = ["next", "a", "--from", "2026-01-01T04:00:00+01:00", "--count", "104"]
    found = json.loads(site.run(*args, "--json", env={"TZ": machine}).stdout)
    moments = [datetime.fromisoformat(text) for text in found]
    assert {(m.hour, m.minute) for m in moments} == {(3, 30)}
    assert {m.isoweekday() for m in moments} == {1, 4}
    assert (found[0], found[-1]) == ("2026-01-05T03:30:00+01:00", "2026-12-31T03:30:00+01:00")
    site.wake(env={"TZ": machine})
    due = datetime.fromisoformat(site.status("a")["next_run_at"]).timestamp()
    assert due == datetime.fromisoformat(site.json("next", "a")[0]).timestamp()


def test_seeds_13_the_clock_of_the_database_differs_from_that_of_the_application(site):
    """The database says noon, the application two o'clock: due again at once, or not for hours."""
    note(site, "a", schedule="every 1 h")
    zones = ("Pacific/Kiritimati", "Pacific/Pago_Pago", "UTC")
    for zone in zones:
        assert site.wake(env={"TZ": zone}).returncode == 0
    assert noted(site) == ["a"]
    for zone in zones:
        done = site.run("status", "--json", env={"TZ": zone})
        (found,) = json.loads(done.stdout)["tasks"]
        assert -60 < away(found["last_started_at"]) < 0
        assert 3500 < away(found["next_run_at"]) <= 3600


@only_root
def test_seeds_14_files_of_root_break_the_web_application(site):
    """One start as root by mistake, and the web server can no longer write."""
    note(site, "a")
    site.wake()
    places = [site.state, *site.state.rglob("*")]
    for path in places:
        os.chown(path, 65534, 65534)
    site.make_due()
    for args in (["--cron_max_execution_time=0"], ["run", "a"], ["pause", "a"], ["request", "a"]):
        done = site.run(*args)
        assert done.returncode == 77, args
        assert "belongs to " in done.stderr
    assert {path.stat().st_uid for path in [site.state, *site.state.rglob("*")]} == {65534}
    assert noted(site) == ["a"]


def test_seeds_15_a_failing_task_is_retried_for_ever_or_never(site):
    """It fails at every wake-up for ever, or is not tried again before tomorrow."""
    note(site, "a", "exit 1", retries=2, retry_delay=1)
    started = time.time()
    runner = site.start("--cron_max_execution_time=600", "--cron_sleep=1")
    wait_for(lambda: noted(site) == ["a"] * 3)
    assert time.time() - started > 3
    wait_for(lambda: not site.status("a")["running"])
    runner.terminate()
    runner.wait(60)
    assert [run["trigger"] for run in site.json("history")] == ["retry", "retry", "cli"]
    assert away(site.status("a")["next_run_at"]) > 80_000
    site.wake()
    assert len(site.json("history")) == 3


def test_seeds_16_the_history_grows_and_its_retention_setting_does_nothing(site):
    """The setting is there, but nothing is ever removed."""
    site.first = "bgtasks.CLEANING_SECONDS = 60"
    site.params.write_text("history_success_lifetime = 2 d\nverbose = 1\n")
    note(site, "a")
    note(site, "b", history_lifetime="9 d")
    for name in ("a", "b"):
        site.wake(f"--task={name}")
        old_runs(site, 100, days=3, outcome="done" if name == "a" else "nothing")
    site.make_due()
    site.wake()
    assert len(outcomes(site, "a")) < 25
    assert len(outcomes(site, "b")) == 102
    found = {path.name for path in site.state.rglob("*") if path.is_file()}
    assert {name for name in found if not name.endswith(".lock")} <= {
        "bgtasks.db",
        "bgtasks.db-journal",
    }


def test_seeds_17_the_list_is_unusable_with_many_rows(site):
    """With a year of history the page takes minutes, or does not load."""
    for i in range(50):
        note(site, f"t{i}")
    site.wake()
    old_runs(site, 50_000, days=1)
    for args in (["status"], ["history"], ["history", "t3"], ["check"], ["explain", "t49"]):
        before = used()
        lines = site.run(*args).stdout.splitlines()
        assert used() - before < 3, args
        assert 0 < len(lines) < 60


def test_seeds_18_one_task_cannot_be_run_from_the_shell(site):
    """There is no way to run one, or it runs five times, and its failure stays hidden."""
    note(site, "a", "echo hello; exit 4")
    note(site, "b")
    done = site.run("run", "a")
    assert (done.returncode, done.stdout) == (1, "hello\n")
    assert "exit code 4" in done.stderr
    assert noted(site) == ["a"]
    assert len(site.json("history")) == 1


def test_seeds_19_execute_now_runs_with_the_limits_and_user_of_the_web_server(site):
    """What is started by a button runs elsewhere than what cron starts."""
    note(site, "a", "env; ulimit -t", schedule="manual")
    limited = ["sh", "-c", 'ulimit -t 50; exec "$@"', "sh", *site.command("request", "a")]
    env = {**os.environ, "GATEWAY_INTERFACE": "CGI/1.1"}
    assert subprocess.run(limited, env=env, check=False).returncode == 0
    assert noted(site) == []
    site.wake()
    assert noted(site) == ["a"]
    assert (site.last("a")["trigger"], site.last("a")["outcome"]) == ("request", "done")
    assert "GATEWAY_INTERFACE" not in site.log("a")
    assert site.log("a").splitlines()[-1] != "50"
    login = {"auth_user": "ann", "auth_pwd": "long enough"}
    assert site.run("admin", "add", "ann", input="long enough\n").returncode == 0
    with served(site, **login) as ask:
        headers = ask("POST", "/login", {"user": "ann", "password": "long enough"})[1]
        cookie = {"Cookie": headers["Set-Cookie"].partition(";")[0]}
        csrf = re.search('name="csrf" value="(.*?)"', ask("GET", "/task/a", **cookie)[2])[1]
        assert ask("POST", "/task/a/request", {"csrf": csrf}, **cookie)[0] == 303
        assert noted(site) == ["a"]  # the button only asks for it
    site.wake()
    assert noted(site) == ["a", "a"]
    assert site.last("a")["trigger"] == "request"
    assert '"web ann"' in json.dumps(site.rows("SELECT by FROM event WHERE what = 'requested'"))


def test_seeds_20_anybody_may_wake_it(site):
    """Whoever finds the script may start it, as often as he likes."""
    note(site, "a")
    assert site.run("admin", "add", "root", input="long enough\n").returncode == 0
    assert site.wake().returncode == site.run("run", "a").returncode == 77
    assert site.wake("--auth_user=root", "--auth_pwd=guessed it").returncode == 77
    assert noted(site) == []
    site.params.write_text("auth_user = root\nauth_pwd = long enough\n")
    site.params.chmod(0o600)
    assert site.wake().returncode == 0
    assert noted(site) == ["a"]
    site.make_due()
    with served(site, auth_user="root", auth_pwd="long enough") as ask:
        assert [ask("POST", "/wake", **BEARER)[0] for _ in range(7)] == [401] * 5 + [429] * 2
    with served(site, web_token=TOKEN, auth_user="root", auth_pwd="long enough") as ask:
        assert ask("POST", "/wake")[0] == 401
    assert noted(site) == ["a"]


def test_seeds_21_a_call_from_the_web_times_out_and_nobody_knows_how_it_went(site):
    """The caller waits until all work is done, is cut off, and the work with it."""
    wait_and_note(site, "long")
    with served(site, web_token=TOKEN, cron_max_execution_time=0) as ask:
        status, _, text = ask("POST", "/wake", **BEARER)
        assert (status, json.loads(text)) == (202, {"started": True})
        assert "long" not in text
        wait_for(lambda: json.loads(ask("GET", "/api/status", **BEARER)[2])["tasks"][0]["running"])
    assert noted(site) == []
    (site.folder / "go").touch()
    wait_for(lambda: noted(site) == ["long"])  # the server is gone, the work is not
    wait_for(lambda: site.status("long")["last_outcome"] == "done")
    with served(site, web_token=TOKEN) as ask:
        runs = json.loads(ask("GET", "/api/history?task=long", **BEARER)[2])
    assert [(run["outcome"], run["trigger"]) for run in runs] == [("done", "web")]


def test_seeds_22_missed_runs_have_no_reason_and_their_record_is_deleted_at_once(site):
    """It was missed, nobody knows why, and the row is gone before anyone can look."""
    note(site, "a", schedule="every 1 h", missed_after="5 min")
    site.wake()
    site.change("UPDATE task SET next_run_at = next_run_at - 7200")
    for _ in range(3):
        site.wake()
    assert outcomes(site, "a") == ["missed", "done"]
    found = site.last("a")
    assert re.fullmatch(r"was \d+ min late, more than missed_after allows", found["reason"])
    assert away(found["planned_at"]) < -3500 < -60 < away(found["ended_at"])
    assert "was missed: was " in explained(site, "a")


def test_seeds_23_warnings_on_every_normal_lock_miss_hide_real_trouble(site):
    """The log is full of warnings that mean nothing."""
    runner, _ = hold(site, "a", stay=600)
    for _ in range(3):
        done = site.wake()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert site.json("status")["last_wakeup"]["result"] == "busy"
    assert "left at once, as another was at work" in explained(site, "a")
    assert findings(site, "check") == {}
    runner.terminate()
    runner.wait(60)


def test_seeds_23_many_at_a_time_end_in_a_deadlock(site):
    """Cron, a page and a person at the same moment: "deadlock found"."""
    note(site, "a", "sleep 0.2", schedule="always")
    commands = ["--cron_max_execution_time=0", "status", "request a", "pause a", "resume a"]
    calls = [site.start(*command.split()) for command in [*commands * 3, "resume a"]]
    assert [call.wait(120) for call in calls] == [0] * 16
    assert "locked" not in site.said.read_text()
    site.run("resume", "a")
    site.wake()
    assert set(outcomes(site)) == {"done"}


def test_seeds_24_settings_are_changed_but_the_old_plan_still_runs(site):
    """The new schedule counts only after one more run by the old one; disabled ones run."""
    for name in ("edited", "disabled", "overridden", "moved"):
        note(site, name)
    site.wake()
    before = noted(site)
    site.make_due()
    note(site, "edited", schedule="manual")
    note(site, "disabled", enabled=False)
    note(site, "moved", schedule="every 3 h")
    site.params.write_text("task.overridden.enabled = 0\n")
    site.wake()
    assert noted(site) == before
    assert site.status("edited")["next_run_at"] is None
    assert site.status("disabled")["state"] == site.status("overridden")["state"] == "disabled"
    assert away(site.status("moved")["next_run_at"]) <= 3 * 3600


def test_seeds_24_a_task_that_was_paused_in_time_still_runs(site):
    """It was read as active at the start of the wake-up, and so it runs."""
    note(site, "a", site.hold, order=1)
    note(site, "b")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(lambda: noted(site) == ["a"])
    assert site.run("pause", "b").returncode == 0
    site.release()
    assert runner.wait(60) == 0
    assert noted(site) == ["a"]


def test_seeds_25_an_automatic_kill_after_a_fixed_time_does_harm(site):
    """A good run was killed because it took long."""
    note(site, "a", "sleep 1.5", deadline=1)
    site.wake()
    assert outcomes(site, "a") == ["done"]


def test_seeds_25_an_automatic_kill_leaves_locks_behind(site):
    """Killed without a warning, it could not clean up, and never ran again."""
    lock = site.folder / "lock"
    late = f"echo 1000 >>{site.movable_clock()}"
    body = f"trap 'rmdir {lock}; exit 1' TERM; mkdir {lock} || exit 9; {late}; sleep 60 & wait"
    site.first += "bgtasks.GRACE_SECONDS = 600"
    note(site, "a", body, timeout=1000, retries=0)
    for _ in range(2):
        site.wake()
        assert not lock.exists()
        site.make_due()
        site.change("UPDATE task SET not_before = NULL")
    assert outcomes(site, "a") == ["timed_out", "timed_out"]
