"""The commands of people: why did it run, why not, and what now."""

import fcntl
import getpass
import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
import zoneinfo
from contextlib import closing
from pathlib import Path

import pytest
from conftest import FakeClock, wait_for

import bgtasks

START = 1_767_225_600.0


def refused(site, code, *args, **options):
    done = site.run(*args, **options)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stderr


def explain(site, *args):
    done = site.run("explain", *args)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


# -- explain


@pytest.fixture
def look(site):
    """Explain a task on a clock that stands still, in this process, as a list of sentences."""
    site.params.write_text("node = here\ntimezone = UTC\n")
    clock = FakeClock(START)
    clock.wait = lambda seconds, readable=(): bgtasks.Clock.wait(clock, min(seconds, 5), readable)
    settings = bgtasks.read_settings(
        {"param_file": str(site.params), "cron_max_execution_time": "0"}, "x"
    )
    store = bgtasks.open_store(str(site.state))

    def wake(seconds=0, trigger="cli", **changes):
        clock.advance(seconds)
        mine = settings._replace(values={**settings.values, **changes})
        bgtasks.Runner(mine, store, clock, trigger, lambda *_: None).wake_up()

    def sentences(name="a", at=None):
        now = clock.now()
        task = next(t for t in bgtasks.task_rows(settings, store, now) if t["name"] == name)
        return bgtasks.explain(settings, store, task, now, now if at is None else at)["sentences"]

    sentences.wake, sentences.clock, sentences.store = wake, clock, store
    yield sentences
    store.close()


def test_a_task_that_no_wake_up_has_seen(site, look):
    site.shell("a", "")
    assert look() == ["task a is active", "no wake-up has seen it yet"]


def test_due_slot_runs_and_wake_ups_are_named(site, look):
    site.shell("a", "", schedule="every 1 h")
    look.wake()
    look.wake(1800)
    text = "; ".join(look())
    assert "its schedule is 'every 1 h'" in text
    assert "its last slot was" in text
    assert "its next one is" in text
    assert "run 1 started" in text
    assert "and ended after 0.0 s: done" in text
    assert "started run 1" in text
    assert text.endswith("did not start it: it was not due")


def test_of_a_broken_task_only_that_is_said(site, look):
    site.write("a.sh", "echo")
    look.wake()
    said = look()
    assert said[0].startswith("task a is broken: ")
    assert said[1:] == ["it never ran"]


def test_who_did_something_to_a_task_is_said_and_other_runs_by_hand_are_not(site, look):
    site.shell("a", "", schedule="every 1 h")
    site.shell("b", "", schedule="manual")
    look.wake()
    look.clock.advance(60)
    bgtasks.pause(look.store, "a", "ann", look.clock.now(), None, "moving")
    look.wake(60, trigger="hand")
    said = look()
    assert "ann 00:01:00 (60 s ago): paused; moving" in " ".join(said)
    assert len([text for text in said if text.startswith("the wake-up")]) == 1


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        (
            {"window": "10:00-11:00"},
            {},
            "it was outside its window 10:00-11:00, opens 2026-01-01T10",
        ),
        ({"nodes": ["web1"]}, {}, "it runs on web1; what changes it: nodes ="),
        ({"wakeup": ["web"]}, {}, "it is started by web only"),
        ({"after": ["b"]}, {}, "it waits for b"),
        ({}, {"exclude_task": ("a",)}, "the wake-up had other work: --exclude_task=a"),
        ({}, {"exclude_group": ("default",)}, "--exclude_group=default"),
        ({"order": 200}, {"cron_limit": 1}, "as many as cron_limit allows"),
        ({"enabled": False}, {}, "task a is disabled"),
    ],
)
def test_each_reason_not_to_start(site, look, settings, changes, words):
    site.shell("a", "", schedule="every 1 h", **settings)
    site.shell("b", "exit 1", schedule="every 1 h")
    look.wake(**changes)
    text = "; ".join(look())
    assert words in text
    if "disabled" not in words:
        assert "in 1 wake-up, last" in text
        assert "did not start it: " in text


def test_paused_back_off_broken_running_and_maintenance_are_reasons(site, look):
    site.shell("a", "exit 1", schedule="every 1 min")
    look.wake()
    look.wake(10)
    site.shell("b", "", schedule="every 1 min")
    look.wake(1)
    bgtasks.pause(look.store, "b", "ann", look.clock.now(), None, "deploy")
    look.wake(60)
    assert "it was paused by ann; deploy; what changes it: resume b" in "; ".join(look("b"))
    site.write("c.py", "x = (")
    look.wake(1)
    assert "task c is broken: c.py: has no schedule" in "; ".join(look("c"))
    (site.folder / "maintenance").write_text("")
    site.shell("d", "", schedule="every 1 min")
    look.wake(1)
    assert "the maintenance flag was there" in "; ".join(look("d"))


def test_back_off_is_explained(site):
    site.shell("a", "exit 1")
    site.wake()
    text = explain(site, "a")
    assert re.search(r"Now: it is held back until \S+, after 1 failure in a row;", text)
    assert "clear a, or run a --force" in text


def test_busy_since_is_explained(site):
    site.shell("a", f"touch {site.ledger}; {site.hold}", schedule="every 1 s")
    runner = site.start("--cron_max_execution_time=600")
    wait_for(site.ledger.exists)
    site.make_due("a")
    assert "is at work" in explain(site, "a")
    site.wake("--exclude_task=x")
    text = explain(site, "a")
    assert "its last run was still at work since" in text
    assert "wait for it, or kill a" in text
    site.run("kill", "a")
    runner.terminate()
    runner.wait(timeout=60)


def test_too_little_time_is_explained(site):
    site.shell("a", "", schedule="every 1 d")
    site.wake()
    site.change("UPDATE run SET ended_at = started_at + 40, deadline_at = started_at + 600")
    site.make_due()
    assert site.run("--cron_max_execution_time=2").returncode == 0
    text = explain(site, "a")
    assert re.search(r"too little time was left: it needs 40 s, \d(\.\d)? s were left", text)
    assert site.status("a")["deferred"] == 1


def test_the_limit_of_parallel_tasks_is_explained(site):
    site.shell("a", f"touch {site.ledger}; {site.hold}", schedule="every 1 d", order=1)
    site.shell("b", "", schedule="every 1 d")
    runner = site.start("--cron_max_execution_time=1")
    wait_for(site.ledger.exists)
    wait_for(lambda: not bgtasks.is_locked(str(site.state / "locks" / "wakeup.lock")))
    site.release()
    assert runner.wait(timeout=60) == 0
    assert "others were at work until the end" in explain(site, "b")


def test_nobody_woke_the_runner_is_said(site, look):
    site.shell("a", "", schedule="every 1 h")
    look.wake()
    look.clock.advance(3 * 3600)
    assert look()[-1].startswith("nobody woke the runner since")
    assert look()[-1].endswith("install --write")


def test_a_busy_wake_up_is_told(site):
    site.shell("a", f"touch {site.ledger}; {site.hold}", schedule="every 1 d")
    runner = site.start("--cron_max_execution_time=600")
    wait_for(site.ledger.exists)
    site.run("--cron_max_execution_time=0")
    assert "left at once, as another was at work" in explain(site, "a")
    runner.terminate()
    runner.wait(timeout=60)


def test_a_moment_of_the_past_is_explained_by_what_was_known_then(site, look):
    site.shell("a", "", schedule="every 1 h")
    look.wake()
    look.wake(3600, exclude_task=("a",))
    look.wake(3600)
    then = look("a", START + 3700)
    text = "; ".join(then)
    assert "run 1 started" in text
    assert "run 2" not in text
    assert "the wake-up had other work" in text
    assert look("a", START - 10)[-2:] == [
        "it never ran",
        "nobody woke the runner yet; what changes it: install --write",
    ]


def test_missed_slots_are_told(site, look):
    site.shell("a", "", schedule="every 1 h")
    site.shell("b", "", schedule="every 1 h", missed_after="10 min")
    look.wake()
    look.wake(5 * 3600 + 1800)
    assert "also for 4 missed slots, and ended" in "; ".join(look())
    assert "was missed: was 4 h late" in "; ".join(look("b"))


def test_explain_takes_a_moment_and_speaks_json(site):
    site.shell("a", "")
    site.wake()
    found = json.loads(site.run("explain", "a", "--json").stdout)
    assert set(found) == {"task", "at", "slot", "sentences", "runs", "reasons"}
    assert explain(site, "a", "--at", "2020-01-01T00:00")
    assert "--at" in refused(site, 64, "explain", "a", "--at", "soon")
    assert "did you mean 'a'" in refused(site, 66, "explain", "aa")


def test_every_reason_has_a_sentence_and_a_way_out():
    source = Path(bgtasks.__file__).read_text()
    used = set(re.findall(r'_skip(?:_queue)?\((?:row\["name"\], )?"([a-z-]+)"', source))
    assert {"time", "parallel", "stopped"} <= used <= set(bgtasks.REASONS)
    for reason, (text, way_out) in bgtasks.REASONS.items():
        assert text.format(task="t", detail="d")
        assert way_out.format(task="t", detail="d"), reason


# -- doctor


def doctor(site, *args, code=1, **options):
    done = site.run("doctor", *args, **options)
    assert done.returncode == code, done
    return done.stdout


def test_never_woken_is_the_first_thing_said(site):
    site.shell("a", "")
    assert "CRITICAL  wake-ups" in doctor(site).splitlines()[0]


def with_crontab(site, lines):
    """A crontab command of our own, as the machine may have none."""
    tool = site.folder / "bin" / "crontab"
    tool.parent.mkdir(exist_ok=True)
    kept = site.folder / "crontab.txt"
    kept.write_text(lines)
    tool.write_text(f'#!/bin/sh\n[ "$1" = -l ] && exec cat {kept}\nexec cat >{kept}\n')
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}"}, kept


def test_the_crontab_is_read(site):
    site.shell("a", "")
    site.wake()
    line = "*/5 * * * * python3 /x/bgtasks.py"
    for lines, words in [
        ("", "your crontab has no line with bgtasks"),
        (f"#{line}\n", "your crontab has no line with bgtasks"),
        (f"{line}\n{line}\n", "2 lines wake it; crontab -e, keep one"),
        (f"{line} --auth_pwd=x\n", "others see --auth_pwd in ps"),
    ]:
        env, _ = with_crontab(site, lines)
        assert words in doctor(site, env=env)
    (found,) = bgtasks.judge_crontab(None, "bgtasks.py")  # as where there is no such command
    assert (found.level, found.text) == (0, "cannot be read here; something else must wake it")
    env, _ = with_crontab(site, f"{line} --group=a\n{line} --exclude_group=a\n")
    assert not re.search(r"^\w+ +crontab ", doctor(site, env=env), re.MULTILINE)


def wakeups(site, *moments, user="root", stays=0):
    site.change("DELETE FROM wakeup")
    for moment in moments:
        site.change(
            "INSERT INTO wakeup (started_at, ended_at, trigger, user, node, selection, result,"
            " started, failed) VALUES (?, ?, 'cli', ?, 'here', '', 'worked', 0, 0)",
            moment,
            moment + stays,
            user,
        )


def test_no_crontab_line_is_missed_while_something_else_wakes_it(site):
    """As /etc/cron.d, a timer of systemd or the web do."""
    site.shell("a", "", schedule="every 1 d")
    env, _ = with_crontab(site, "")
    site.wake()
    now = time.time()
    for moments, level in [((300,), 1), ((600, 300), 0), ((90_000, 86_400), 1), ((86_400, 300), 1)]:
        wakeups(site, *(now - ago for ago in moments))
        found = json.loads(doctor(site, "--json", env=env))
        assert [f["level"] for f in found if f["about"] == "crontab"] == [level], moments
    wakeups(site, now - 600, now - 300)
    site.change("UPDATE wakeup SET trigger = 'hand'")
    assert "WARNING   crontab" in doctor(site, env=env)


def test_how_often_and_by_whom_it_is_woken(site):
    site.shell("a", "", schedule="every 1 d")
    site.wake()
    now = time.time()
    wakeups(site, *(now - 300 * i for i in range(10, 0, -1)))
    assert re.search(r"every 5 min, longest gap 5 min, by root@here \(cli\)", doctor(site))
    wakeups(site, now - 7200, now - 7000)
    assert "CRITICAL  wake-ups" in doctor(site)
    site.change("UPDATE wakeup SET user = 'bob' WHERE id = (SELECT max(id) FROM wakeup)")
    assert "different users wake it" in doctor(site)


def test_woken_too_seldom_for_a_task_is_named(site):
    site.shell("often", "", schedule="every 2 min")
    site.shell("seldom", "", schedule="every 1 h")
    site.wake()
    now = time.time()
    wakeups(site, *(now - 300 * i for i in range(10, 0, -1)))
    text = doctor(site)
    assert re.search(r"often +is asked every 2 min, but idle for 5 min", text)
    assert not re.search(r"^\w+ +seldom ", text, re.MULTILINE)
    wakeups(site, *(now - 300 * i for i in range(10, 0, -1)), stays=299)
    assert "is asked every" not in doctor(site)


def test_what_is_missing_unsafe_or_doubled_is_said(site):
    site.shell("a", "", schedule="every 1 d")
    site.wake()
    site.params.write_text("node = here\ncron_sleep = 3\ncron_sleep = 4\n")
    assert f"{site.params}:3: cron_sleep wins over the one in {site.params}:2" in doctor(site)
    site.tasks.chmod(0o777)
    assert re.search(r"CRITICAL +state +\S*tasks.d: folder of tasks can be written", doctor(site))
    site.tasks.chmod(0o755)
    site.change("INSERT INTO fact VALUES ('steps', '2')")
    assert "was set back 2 times" in doctor(site)
    assert "runs as root" in doctor(site)


def test_a_missing_package_is_named_with_who_needs_it():
    tasks = [
        {"name": n, "reason": f"{n}.sh: schedule: needs croniter: pip install croniter"}
        for n in "ab"
    ]
    (found,) = bgtasks.judge_packages([*tasks, {"name": "c", "reason": ""}])
    assert found.text == "croniter is missing; it is needed by a, b"
    assert found.way_out == "pip install croniter"


def test_a_network_disk_and_a_full_one_are_told(site, monkeypatch):
    settings = bgtasks.read_settings({"param_file": str(site.params)}, "x")
    monkeypatch.setattr(bgtasks, "file_system", lambda _: "nfs4")
    full = type("Usage", (), {"free": 5 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    monkeypatch.setattr(zoneinfo, "available_timezones", set)
    store = bgtasks.Store(":memory:")
    found = [(f.about, f.level, f.text) for f in bgtasks.judge_place(settings, store)]
    store.close()
    assert ("disk", 2, f"{site.state} lies on a network disk (nfs4)") in found
    assert ("disk", 2, "5 MiB free") in found
    assert ("zones", 1, "this machine has no time zones") in found


def test_the_file_system_of_a_path_is_known():
    assert bgtasks.file_system("/proc/self") == "proc"


def test_a_healthy_installation_has_nothing_to_complain_of_but_root(site):
    site.shell("a", "", schedule="every 1 h")
    site.wake()
    env, _ = with_crontab(site, "*/5 * * * * python3 /x/bgtasks.py\n")
    found = json.loads(doctor(site, "--json", env=env))
    assert [f["about"] for f in found if f["level"]] == ["user"]


def test_doctor_speaks_json_and_changes_nothing(site):
    site.shell("a", "")
    found = json.loads(doctor(site, "--json"))
    assert set(found[0]) == {"level", "about", "text", "way_out"}
    assert not site.state.exists()


# -- run, request, kill, clear


def test_run_shows_the_output_as_it_comes_and_masks_secrets(site):
    site.params.write_text("auth_pwd = geheim99\n")
    site.params.chmod(0o600)
    go = site.folder / "go"
    site.shell("a", f"echo first geheim99; while [ ! -e {go} ]; do sleep 0.1; done; echo second")
    process = subprocess.Popen(site.command("run", "a"), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "first ***\n"
    go.write_text("")
    assert process.communicate(timeout=60)[0] == "second\n"
    assert process.returncode == 0


def test_run_says_the_tasks_own_code_and_shows_an_unfinished_line(site):
    site.shell("a", "printf unfinished; exit 7")
    done = site.run("run", "a")
    assert (done.returncode, done.stdout) == (1, "unfinished\n")
    assert done.stderr == "bgtasks: a: failed: exit code 7\n"


@pytest.mark.parametrize("held", ["paused", "back-off", "window"])
def test_force_goes_past_what_holds_a_task_back(site, held):
    hour = time.gmtime().tm_hour
    window = (
        f"{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00" if held == "window" else "00:00-24:00"
    )
    site.params.write_text("node = here\ntimezone = UTC\n")
    site.shell("a", "", schedule="manual", window=window)
    site.wake()
    if held == "paused":
        site.run("pause", "a")
    if held == "back-off":
        site.change("UPDATE task SET not_before = ?, consecutive_failures = 2", time.time() + 999)
    way_out = "resume a" if held == "paused" else "run a --force"
    assert re.search(rf"^bgtasks: a: {held}: .*{way_out}$", refused(site, 75, "run", "a").strip())
    assert site.run("run", "a", "--force").returncode == 0


def test_not_even_force_goes_past_a_run_that_is_at_work(site):
    site.shell("a", f"touch {site.ledger}; {site.hold}", schedule="manual")
    process = subprocess.Popen(site.command("run", "a"))
    wait_for(site.ledger.exists)
    assert "is running already" in refused(site, 75, "run", "a", "--force")
    assert site.run("kill", "a").returncode == 0
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_a_requested_task_runs_at_the_next_look(site):
    site.shell("a", "", schedule="manual")
    site.wake()
    assert site.run("request", "a").returncode == 0
    site.wake()
    assert site.last("a")["trigger"] == "request"
    site.wake()
    assert len(site.json("history")) == 1
    assert "did you mean 'a'" in refused(site, 66, "request", "aa")


def test_kill_ends_a_run_and_says_who_did(site):
    body = f"""
    import time
    try:
        open({str(site.ledger)!r}, "w").close()
        time.sleep(60)
    finally:
        time.sleep(0.5)  # it cleans up, and is waited for
    """
    site.first = "bgtasks.GRACE_SECONDS = 600"
    site.python("a", body, schedule="every 1 d", retries=3)
    runner = site.start("--cron_max_execution_time=600")
    wait_for(site.ledger.exists)
    done = site.run("kill", "a")
    assert (done.returncode, done.stdout) == (0, "a: run 1 killed\n")
    run = site.last("a")
    assert (run["outcome"], run["reason"]) == ("killed", "killed by root")
    # the runner has seen the end of its keeper too
    wait_for(lambda: not Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text())
    assert site.status("a")["retry_at"] is None
    assert "is not running" in refused(site, 66, "kill", "a")
    runner.terminate()
    runner.wait(timeout=60)


def test_kill_ends_a_run_whose_keeper_is_gone(site):
    site.first = "bgtasks.GRACE_SECONDS = 2"
    site.shell("a", f"trap '' TERM; touch {site.ledger}; exec sleep 60", schedule="manual")
    process = subprocess.Popen(site.command("run", "a"))
    wait_for(site.ledger.exists)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (file,) = (site.state / "runs").glob("*.keeper")
    keeper = json.loads(file.read_text().splitlines()[0])["keeper"][0]
    os.kill(keeper, signal.SIGKILL)
    done = site.run("kill", "a")
    assert (done.stdout, done.stderr) == ("a: run 1 killed\n", "")


def test_clear_acknowledges_and_ends_the_back_off(site):
    site.shell("a", "exit 1", schedule="every 1 d")
    site.wake()
    site.change("UPDATE run SET outcome = 'interrupted'")
    assert site.status("a")["unacknowledged"] == 1
    assert site.status("a")["retry_at"] is not None
    assert site.run("clear", "a").returncode == 0
    task = site.status("a")
    assert (task["unacknowledged"], task["retry_at"], task["consecutive_failures"]) == (0, None, 0)
    assert site.rows("SELECT extra_at FROM task") == [{"extra_at": None}]
    events = site.rows("SELECT by, what FROM event")
    assert events == [{"by": "root", "what": "cleared"}]


def test_follow_shows_a_run_until_it_ends(site):
    go = site.folder / "go"
    wait = f"while [ ! -e {go} ]; do sleep 0.1; done"
    site.shell("a", f"echo one; {wait}; echo two; {site.hold}")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(lambda: list(site.folder.glob("state/runs/*.keeper")))
    process = subprocess.Popen(
        site.command("log", "a", "--follow"), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "one\n"
    go.write_text("")
    assert process.stdout.readline() == "two\n"
    assert process.poll() is None
    site.release()
    assert process.communicate(timeout=60)[0] == ""
    assert runner.wait(timeout=60) == 0
    assert site.run("log", "a", "--follow").stdout == "one\ntwo\n"


def test_follow_shows_what_a_run_printed_last_though_its_output_was_removed(site):
    site.shell("a", f"echo one; {site.hold}; echo two")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(lambda: list(site.folder.glob("state/runs/*.keeper")))
    site.first = "bgtasks.Clock.wait = lambda *_: bgtasks.time.sleep(2)"  # it looks more rarely
    command = site.command("log", "a", "--follow")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "one\n"
    site.release()
    assert runner.wait(timeout=60) == 0
    assert process.communicate(timeout=60)[0] == "two\n"


@pytest.mark.parametrize("flags", [(), ("--follow",)])
def test_log_shows_what_a_run_printed_that_ends_while_it_looks(site, flags):
    site.shell("a", f"echo one; {site.hold}; echo two")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(lambda: list(site.folder.glob("state/runs/*.keeper")))
    site.first = f"""
import time
from pathlib import Path
named, folder = bgtasks._run_named, Path({str(site.folder)!r})
def stalls(*args):
    run = named(*args)
    (folder / "looked").touch()
    while not (folder / "over").exists():
        time.sleep(0.01)
    return run
bgtasks._run_named = stalls
"""
    process = subprocess.Popen(site.command("log", "a", *flags), stdout=subprocess.PIPE, text=True)
    wait_for((site.folder / "looked").exists)
    site.release()
    assert runner.wait(timeout=60) == 0
    (site.folder / "over").touch()
    assert process.communicate(timeout=60)[0] == "one\ntwo\n"


# -- new and install


@pytest.mark.parametrize("language", sorted(bgtasks.SAMPLES))
def test_a_new_sample_is_fine_as_it_is(site, language):
    done = site.run("new", "sample", "--language", language)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.split(":")[0])
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert site.run("lint").stdout == f"{path.name}: ok\n"
    if language not in ("php", "ruby"):
        assert site.run("run", "sample").returncode == 0
    assert "cannot be made" in refused(site, 73, "new", "sample", "--language", language)


def test_new_refuses_what_is_no_name_or_language(site):
    assert "cannot be a task" in refused(site, 64, "new", "../x")
    assert "allowed are python" in refused(site, 64, "new", "x", "--language=basic")


def test_the_crontab_line_has_absolute_paths_and_is_written_once(site):
    env, kept = with_crontab(site, "MAILTO=me\n0 1 * * * other\n")
    line = site.run("install", env=env).stdout
    assert line == (
        f"*/5 * * * * cd {os.path.dirname(os.path.realpath(bgtasks.__file__))} &&"
        f" {sys.executable} -m bgtasks --param_file={site.params} # bgtasks {site.state}\n"
    )
    assert kept.read_text() == "MAILTO=me\n0 1 * * * other\n"
    for _ in range(2):
        assert site.run("install", "--write", env=env).returncode == 0
    assert kept.read_text() == f"MAILTO=me\n0 1 * * * other\n{line}"
    words = line.split(" # ")[0].split(None, 5)[5]
    done = subprocess.run(f"{words} --status_only", shell=True, capture_output=True, check=False)
    assert done.returncode == 0


def test_without_crontab_install_says_what_to_do(site):
    empty = site.folder / "empty"
    empty.mkdir()
    assert "no crontab command" in refused(site, 69, "install", "--write", env={"PATH": str(empty)})
    env, _ = with_crontab(site, "")
    (site.folder / "bin" / "crontab").write_text(
        "#!/bin/sh\n[ $1 = -l ] || { echo no >&2; exit 1; }\n"
    )
    assert "crontab: no" in refused(site, 77, "install", "--write", env=env)


# -- administrators


@pytest.fixture
def guarded(site):
    """An installation with an administrator."""
    site.shell("a", "", schedule="manual")
    done = site.run("admin", "add", "ann", input="correct horse\n")
    assert done.returncode == 0, done.stderr
    return site


def test_once_there_is_an_administrator_nobody_else_may(guarded):
    site = guarded
    wake, new, install = "--cron_max_execution_time=0", ["new", "b"], ["install", "--write"]
    for args in ([wake], ["run", "a"], ["pause", "a"], ["admin", "list"], new, install):
        assert "needs auth_user" in refused(site, 77, *args)
        wrong = refused(site, 77, *args, "--auth_user=ann", "--auth_pwd=wrong horse")
        assert "those of no administrator" in wrong
        site.change("UPDATE fact SET value = '0' WHERE name = 'wrong_logins'")
    assert site.run("status").returncode == 0
    site.params.write_text("auth_user = ann\nauth_pwd = correct horse\n")
    site.params.chmod(0o600)
    assert site.wake().returncode == 0
    assert site.run("run", "a").returncode == 0
    assert site.run("admin", "list").stdout == "ann\n"
    assert site.json("admin", "list") == ["ann"]
    assert site.run("admin", "remove", "ann").returncode == 0
    site.params.write_text("node = here\n")
    assert site.wake().returncode == 0
    whats = [row["what"] for row in site.rows("SELECT what FROM event WHERE task = ''")]
    assert whats[0] == "administrator ann registered"
    assert "wrong login 'ann'" in whats
    assert whats[-1] == "administrator ann removed"


def test_passwords_are_stored_as_scrypt_with_parameters(guarded):
    (row,) = guarded.rows("SELECT * FROM admin")
    kind, n, r, p, salt, key = row["hash"].split("$")
    assert (kind, n, r, p) == ("scrypt", "16384", "8", "5")
    assert (len(salt), len(key)) == (32, 128)
    assert "horse" not in str(row)


def test_wrong_logins_are_slowed_and_an_unknown_user_costs_the_same(site):
    settings = bgtasks.read_settings({"param_file": str(site.params)}, "x")
    store, clock, waits = bgtasks.open_store(str(site.state)), FakeClock(START), []
    clock.wait = lambda seconds, readable=(): waits.append(seconds)
    admins = {"ann": bgtasks.hashed("correct horse")}

    def login(user, pwd):
        mine = settings._replace(values={**settings.values, "auth_user": user, "auth_pwd": pwd})
        bgtasks.authenticate(mine, store, admins, clock)

    for user in ("ann", "bob", "ann", "ann", "bob", "ann"):
        with pytest.raises(bgtasks.RefusedError, match="no administrator"):
            login(user, "wrong")
    assert waits == [0.25, 0.5, 1.0]
    login("ann", "correct horse")
    login("ann", "correct horse")
    assert waits == [0.25, 0.5, 1.0, 2.0]
    seconds = {"ann": [], "bob": []}
    for user in ("ann", "bob") * 3:
        store.put("fact", {"name": "wrong_logins", "value": "0"}, "name")
        began = time.process_time()  # of the processor: what else runs must not count
        with pytest.raises(bgtasks.RefusedError):
            login(user, "wrong")
        seconds[user].append(time.process_time() - began)
    assert 0.5 < min(seconds["ann"]) / min(seconds["bob"]) < 2
    store.close()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["add"], 64, "admin needs add LOGIN"),
        (["list", "ann"], 64, "admin needs add LOGIN"),
        (["drop", "ann"], 64, "admin needs add LOGIN"),
        (["remove", "bob"], 66, "no administrator 'bob'"),
        (["add", "bob"], 64, "at least 8 characters"),
    ],
)
def test_wrong_use_of_admin(site, args, code, words):
    assert words in refused(site, code, "admin", *args, input="short\n")


def test_a_password_is_asked_for_twice_on_a_terminal(monkeypatch):
    answers = ["long enough", "long enough", "long enough", "other enough"]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(getpass, "getpass", lambda _: answers.pop(0))
    assert bgtasks._new_password() == "long enough"
    with pytest.raises(bgtasks.UsageError, match="differ"):
        bgtasks._new_password()


# -- status --watch


@pytest.mark.filterwarnings("ignore:.*use of forkpty.*:DeprecationWarning")
@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_watch_draws_only_what_changed_and_leaves_with_q_or_ctrl_c(site, key):
    site.shell("first", "", description="one")
    site.shell("second", "", description="two")
    site.write("notes.md", "")
    site.wake()
    pid, fd = pty.fork()
    if pid == 0:  # pragma: no cover - becomes the program
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        command = site.command("status", "--watch")
        os.execv(command[0], command)
    drawn = [b""]

    def more():
        if select.select([fd], [], [], 0)[0]:
            drawn[0] += os.read(fd, 4096)
        return drawn[0]

    wait_for(lambda: b"second" in more() and b"notes.md" in more())
    drawn[0] = b""
    site.change("UPDATE task SET paused_at = 1, paused_by = 'ann' WHERE name = 'second'")
    wait_for(lambda: b"by ann" in more())
    assert b"notes.md" not in drawn[0]  # as nothing in its line has changed
    assert all(len(part) < 100 + 20 for part in drawn[0].decode().split("\x1b["))
    os.write(fd, key)
    status = os.waitpid(pid, 0)[1]
    os.close(fd)
    assert status == 0


def test_watch_needs_a_terminal(site):
    assert "needs a terminal" in refused(site, 64, "status", "--watch", stdin=subprocess.DEVNULL)


# -- what only shows from inside


def test_a_schedule_without_moments_has_no_last_one():
    assert bgtasks.parse_schedule("manual", bgtasks.Zone("UTC")).latest(START) is None


def test_output_that_is_gone_is_nothing(tmp_path, capsys):
    bgtasks.Follower(str(tmp_path / "x"), ()).print_new(last=True)
    assert capsys.readouterr().out == ""


def test_a_task_that_lost_its_schedule_while_it_ran_has_no_next_moment(site):
    settings = bgtasks.read_settings({"param_file": str(site.params)}, "x")
    with closing(bgtasks.open_store(str(site.state))) as store:
        runner = bgtasks.Runner(settings, store, FakeClock(), "cli", bgtasks.say_nothing)
        task = bgtasks.Task("a", "a.sh", settings={"schedule": "", "timezone": ""})
        assert runner._next_after(task, {"anchor_at": 0}, START) is None
        bgtasks.say_nothing("x", {})


def test_a_signal_to_what_has_ended_is_no_error():
    bgtasks.unless_gone(os.kill, 99999999, signal.SIGTERM)


def test_what_cannot_be_killed_is_said(site, capsys):
    site.shell("a", "", schedule="manual")
    site.run("run", "a")
    site.change("UPDATE run SET ended_at = NULL, outcome = 'running', live = 'x'")
    with open(site.state / "runs" / "x.out", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert bgtasks.main([f"--param_file={site.params}", "kill", "a"], FakeClock()) == 1
    assert capsys.readouterr().out == "a: run 1 is still there\n"


def test_a_missing_task_is_a_warning_and_put_back_the_way_out(site):
    path = site.shell("a", "")
    site.wake()
    path.unlink()
    assert re.search(r"WARNING +a +its file is gone from tasks.d; put it back", doctor(site))


def test_a_task_that_fits_no_wake_up_is_named(site):
    site.shell("a", "")
    site.wake()
    site.change("UPDATE run SET ended_at = started_at + 900, deadline_at = started_at + 1000")
    assert "usually takes 15 min, a wake-up stays 10 min" in doctor(site)


def test_who_is_not_root_is_not_told_so(site, monkeypatch):
    settings = bgtasks.read_settings({"param_file": str(site.params)}, "x")
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with closing(bgtasks.Store(":memory:")) as store:
        assert not [f for f in bgtasks.judge_place(settings, store) if f.about == "user"]


def test_a_disk_that_cannot_be_looked_at_is_told(site):
    given = {"param_file": str(site.params), "state_dir": "/nowhere/at/all"}
    settings = bgtasks.read_settings(given, "x")
    with closing(bgtasks.Store(":memory:")) as store:
        found = [f.text for f in bgtasks.judge_place(settings, store) if f.about == "disk"]
    assert found == ["/nowhere/at/all: cannot be looked at (No such file or directory)"]


def test_install_needs_no_param_file(site):
    settings = bgtasks.read_settings({"param_file": str(site.params)}, "x")
    line = bgtasks.crontab_line(settings._replace(files=()))
    assert line.endswith(f" -m bgtasks # bgtasks {site.state}")


def test_lint_finds_a_file_of_tasks_d_by_its_name_and_a_circle(site):
    site.shell("a", "", after=["b"])
    site.shell("b", "", after=["a"])
    assert site.run("lint", "a.sh").stdout == "a.sh: ok\n"  # which knows only itself
    done = site.run("lint")
    assert done.returncode == 1
    assert done.stdout.count("is a circle") == 2


def test_log_and_lint_speak_json(site):
    site.shell("a", "echo hello")
    site.write("b.md", "")
    site.wake()
    assert site.json("log", "a")["output"] == "hello\n"
    assert site.json("lint") == [
        {"file": "a.sh", "state": "ok", "text": ""},
        {"file": "b.md", "state": "ignored", "text": "no program"},
    ]
