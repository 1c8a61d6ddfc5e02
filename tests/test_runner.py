"""Wake-ups: what they start, in which order, and how they get along with each other."""

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, FakeClock, Site, far_away, somebody_else, wait_for

import bgtasks


def note(site, *names, then="", **settings):
    """Tasks that write their name into the ledger when they start, and then do some more."""
    for name in names:
        site.shell(
            name, f"echo {name} >>{site.ledger}\n{then}", **{"schedule": "every 1 d", **settings}
        )


def noted(site):
    if not site.ledger.exists():
        return []
    return site.ledger.read_text().split()


def begin(site, *args):
    """A wake-up that goes on; return it when the first task is at work."""
    runner = site.start(*args)
    wait_for(lambda: noted(site))
    return runner


def stop(runner):
    """Tell a wake-up that has done enough to stop."""
    runner.terminate()
    assert runner.wait(60) == -signal.SIGTERM


def outcomes(site, task):
    rows = site.rows("SELECT outcome FROM run WHERE task = ? ORDER BY id", task)
    return [row["outcome"] for row in rows]


# -- what is due, in which order


def test_new_tasks_with_every_are_due_at_once_and_fixed_times_are_not(site):
    note(site, "every")
    note(site, "daily", schedule=far_away())
    note(site, "manual", schedule="manual")
    note(site, "off", enabled=False)
    done = site.wake()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert noted(site) == ["every"]
    site.wake()
    assert noted(site) == ["every"]


def test_the_order_of_due_tasks(site):
    note(site, "c_first", order=1)
    note(site, "a_late")
    note(site, "b_later")
    site.shell("a_failed", f"echo a_failed >>{site.ledger}; exit 1", order=0)
    site.wake()
    site.make_due()
    site.change("UPDATE task SET next_run_at = next_run_at - 100 WHERE name = 'b_later'")
    site.change("UPDATE task SET not_before = NULL")
    site.ledger.unlink()
    site.wake()
    assert noted(site) == ["c_first", "b_later", "a_late", "a_failed"]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--task=a,b"], ["a", "b"]),
        (["--exclude_task=a"], ["b", "c"]),
        (["--group=g"], ["c"]),
        (["--exclude_group=g,x"], ["a", "b"]),
        (["--task=a,c", "--exclude_group=g"], ["a"]),
        (["--cron_limit=2"], ["a", "b"]),
    ],
)
def test_a_wake_up_chooses_by_task_and_group(site, flags, wanted):
    note(site, "a", "b")
    note(site, "c", group="g")
    site.wake(*flags)
    assert noted(site) == wanted


def test_always_runs_once_in_every_wake_up(site):
    note(site, "a", schedule="always")
    site.wake()
    note(site, "b", schedule="every 1 s")
    runner = site.start("--cron_max_execution_time=600", "--cron_sleep=1")
    wait_for(lambda: noted(site).count("b") >= 3)
    stop(runner)
    assert noted(site).count("a") == 2


def test_missed_slots_collapse_into_one_run(site):
    note(site, "a", schedule="every 1 d")
    site.wake()
    site.change("UPDATE task SET next_run_at = next_run_at - 864000")
    site.wake()
    site.wake()
    assert noted(site) == ["a", "a"]
    assert site.rows("SELECT next_run_at FROM task")[0]["next_run_at"] > time.time()


def test_more_is_repeated_at_once_behind_the_others_if_time_is_left(site):
    body = f"""
    import time
    with open({str(site.ledger)!r}, "a") as ledger:
        ledger.write("again\\n")
    time.sleep(0.2)
    return task.MORE
    """
    site.python("again", body, schedule="every 1 d", order=1)
    note(site, "b")
    runner = site.start("--cron_max_execution_time=600", "--cron_sleep=1")
    wait_for(lambda: noted(site).count("again") > 3)
    stop(runner)
    assert noted(site)[:3] == ["again", "b", "again"]
    triggers = {row["trigger"] for row in site.rows("SELECT trigger FROM run WHERE slot IS NULL")}
    assert triggers == {"repeat"}


def test_more_waits_for_the_next_wake_up_if_that_looks_only_once(site):
    site.python("a", "return task.MORE", schedule="every 1 d")
    site.wake()
    assert outcomes(site, "a") == ["more"]
    site.wake()
    assert outcomes(site, "a") == ["more", "more"]


def test_a_wake_up_that_looks_once_ends_however_soon_tasks_are_due_again(site):
    note(site, "slow", then="sleep 3", order=1)
    note(site, "often", schedule="every 1 s")
    site.python("more", "return task.MORE", schedule="every 1 d")
    site.wake("--cron_sleep=1")
    assert noted(site) == ["slow", "often"]
    assert outcomes(site, "more") == ["more"]


@pytest.mark.parametrize(("choice", "runs"), [("wait", 1), ("again", 2)])
def test_after_an_interruption_a_task_waits_or_runs_again(site, choice, runs):
    site.shell("a", "kill -9 0", schedule="every 1 d", on_interrupt=choice)
    site.wake()
    site.change("UPDATE run SET ended_at = NULL, outcome = 'running'")
    site.change("UPDATE task SET not_before = NULL, extra_at = NULL, extra_trigger = NULL")
    site.wake()
    assert outcomes(site, "a")[0] == "interrupted"
    assert len(outcomes(site, "a")) == runs


# -- changes


def test_a_changed_schedule_takes_effect_at_the_next_look(site):
    note(site, "a", schedule=far_away())
    site.wake()
    note(site, "a", schedule="every 1 h")
    site.wake()
    due = site.rows("SELECT next_run_at FROM task")[0]["next_run_at"]
    assert 0 < due - time.time() <= 3600
    note(site, "a", schedule="manual")
    site.wake()
    assert site.rows("SELECT next_run_at FROM task")[0]["next_run_at"] is None


def test_a_changed_period_goes_on_from_the_last_slot(site):
    note(site, "a", schedule="every 1 h")
    site.wake()
    slot = site.rows("SELECT slot FROM run")[0]["slot"]
    note(site, "a", schedule="every 10 min")
    site.wake()
    assert site.rows("SELECT next_run_at FROM task")[0]["next_run_at"] == slot + 600


def test_a_file_that_is_gone_keeps_its_history_and_comes_back_as_it_was(site):
    note(site, "a")
    site.wake()
    site.run("pause", "a")
    path = site.tasks / "a.sh"
    path.rename(site.folder / "a.sh")
    site.make_due("a")
    site.wake()
    assert site.status("a")["state"] == "missing"
    shutil.move(site.folder / "a.sh", path)
    site.wake()
    assert (site.status("a")["state"], site.status("a")["runs"]) == ("paused", 1)
    assert noted(site) == ["a"]


def test_one_bad_file_never_stops_another(site):
    site.python("bad", "(")
    note(site, "good")
    done = site.wake("--verbose")
    assert done.returncode == 0
    assert "bad: broken: bad.py:" in done.stdout
    assert noted(site) == ["good"]


def test_a_schedule_that_lost_its_package_makes_the_task_broken(site):
    pytest.importorskip("croniter", reason="croniter is not installed")
    note(site, "a", schedule="*/5 * * * *")
    site.wake()
    site.make_due()
    code = f"""
import sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
sys.modules["croniter"] = None
import bgtasks
bgtasks.main(["--param_file={site.params}", "--cron_max_execution_time=0"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "needs croniter" in site.rows("SELECT error FROM task")[0]["error"]
    assert noted(site) == []


# -- several at a time, and what hangs


def test_parallel_runs_are_limited(site):
    all_began = f"until [ $(wc -l <{site.ledger}) -ge 3 ]; do sleep 0.05; done"
    note(site, "a", "b", "c", then=all_began, timeout=60)
    site.wake("--max_parallel=3")
    together = site.rows("SELECT * FROM run")
    assert max(run["started_at"] for run in together) < min(run["ended_at"] for run in together)
    site.make_due()
    site.wake()
    first, second, third = site.rows("SELECT * FROM run ORDER BY started_at")[3:]
    assert first["ended_at"] <= second["started_at"]
    assert second["ended_at"] <= third["started_at"]


def test_a_run_that_overran_no_longer_counts(site):
    note(site, "a", then=f"until grep -q b {site.ledger}; do sleep 0.05; done", order=1, deadline=1)
    note(site, "b")
    site.wake()
    rows = {row["task"]: row for row in site.rows("SELECT * FROM run")}
    assert rows["a"]["started_at"] + 0.9 < rows["b"]["started_at"] < rows["a"]["ended_at"]
    (row,) = site.rows("SELECT last_overran, last_seconds FROM task WHERE name = 'a'")
    assert row["last_overran"] == (row["last_seconds"] > 6)  # a little is nothing


def test_the_usual_duration_sets_how_long_others_wait(site):
    settings = bgtasks.read_settings({"param_file": str(site.params)}, "x")
    note(site, "a")
    site.wake()
    site.change("UPDATE run SET started_at = ended_at - 100")
    store, clock = bgtasks.open_store(str(site.state)), FakeClock(time.time())
    runner = bgtasks.Runner(settings, store, clock, "hand", lambda *_: None)
    runner.start(store.task("a"))
    (started,) = runner.running.values()
    assert 190 < started.counts_until - clock.ticks <= 200
    wait_for(runner._reap)
    store.close()


def test_a_wake_up_whose_time_is_up_waits_for_its_keepers_but_frees_the_others(site):
    note(site, "slow", then=site.hold)
    runner = begin(site, "--cron_max_execution_time=1")
    wait_for(lambda: not bgtasks.is_locked(str(site.state / "locks" / "wakeup.lock")))
    note(site, "other")
    assert site.wake().returncode == 0
    assert noted(site) == ["slow", "other"]
    assert runner.poll() is None
    site.release()
    assert runner.wait(60) == 0
    assert outcomes(site, "slow") == ["done"]


def test_a_second_runner_leaves_at_once_and_is_recorded_as_busy(site, stalls):
    note(site, "a", then=site.hold)
    runner = begin(site, "--cron_max_execution_time=600")
    started = time.time()
    done = site.run("--verbose")
    assert (done.returncode, stalls.since(started) < 5) == (0, True)
    assert "another runner is at work" in done.stdout
    assert site.json("status")["last_wakeup"]["result"] == "busy"
    stop(runner)


def test_cron_lines_as_regular_as_the_runners_time_miss_no_turn(site):
    note(site, "a", schedule="every 1 s")
    first = begin(site, "--cron_max_execution_time=4", "--cron_sleep=1")
    second = site.start("--cron_max_execution_time=7", "--cron_sleep=1")
    assert (first.wait(60), second.wait(60)) == (0, 0)
    results = site.rows("SELECT result, started FROM wakeup ORDER BY id")
    assert [row["result"] for row in results] == ["worked", "worked"]
    assert all(row["started"] for row in results)


def test_two_groups_woken_at_the_same_time_work_side_by_side(site):
    note(site, "slow", then=site.hold, group="slow")
    note(site, "fast", group="fast")
    slow = begin(site, "--group=slow", "--cron_max_execution_time=0")
    assert site.wake("--group=fast").returncode == 0
    assert noted(site) == ["slow", "fast"]
    assert slow.poll() is None
    site.release()
    assert slow.wait(60) == 0


def test_a_task_due_while_a_runner_waits_does_not_wait_for_its_next_look(site):
    """How exactly it starts on time shows on a simulated clock: see test_policy."""
    note(site, "a", schedule="every 1 s")
    runner = site.start("--cron_max_execution_time=600", "--cron_sleep=60")
    wait_for(lambda: len(noted(site)) >= 5, 100)
    stop(runner)


def test_a_new_file_and_a_pause_are_seen_while_a_runner_waits(site):
    note(site, "b", schedule="every 1 s")
    runner = begin(site, "--cron_max_execution_time=600", "--cron_sleep=1")
    note(site, "a", schedule="every 1 s")
    wait_for(lambda: noted(site).count("a") >= 2)
    site.run("pause", "a")
    count, others = noted(site).count("a"), noted(site).count("b")
    wait_for(lambda: noted(site).count("b") >= others + 3)
    assert noted(site).count("a") <= count + 1
    stop(runner)


# -- being stopped, and not starting


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_runner_that_is_told_to_stop_ends_its_runs_and_dies_of_the_signal(site, number):
    note(site, "a", then=site.hold)
    note(site, "b")
    runner = begin(site)
    runner.send_signal(number)
    assert runner.wait(60) == -number
    assert outcomes(site, "a") == ["interrupted"]
    assert noted(site) == ["a"]
    assert site.last("a")["reason"] == "the runner was told to stop"


def test_told_twice_it_waits_no_longer(site):
    site.first = "bgtasks.GRACE_SECONDS = 600"
    site.shell("a", f"trap 'echo told >>{site.ledger}' TERM; echo a >>{site.ledger}; {site.hold}")
    runner = begin(site)
    runner.terminate()
    wait_for(lambda: "told" in noted(site))
    assert runner.poll() is None
    stop(runner)
    assert outcomes(site, "a") == ["interrupted"]


def test_a_task_that_ends_well_when_asked_is_done(site):
    body = f"trap 'exit 0' TERM; echo a >>{site.ledger}; while :; do sleep 0.1; done"
    site.shell("a", body, schedule="every 1 d")
    site.first = "bgtasks.GRACE_SECONDS = 600"
    stop(begin(site))
    assert outcomes(site, "a") == ["done"]


def test_nothing_starts_in_maintenance(site):
    note(site, "a", order=1)
    site.shell(
        "b", f"echo b >>{site.ledger}; touch {site.folder}/maintenance", schedule="every 1 d"
    )
    note(site, "c", order=200)
    assert site.wake().returncode == 0
    assert noted(site) == ["a", "b"]
    assert site.json("status")["maintenance"] is True
    site.wake()
    assert noted(site) == ["a", "b"]
    assert site.json("status")["last_wakeup"]["result"] == "maintenance"
    assert "MAINTENANCE" in site.run("status").stdout
    (site.folder / "maintenance").unlink()
    site.wake()
    assert noted(site) == ["a", "b", "c"]


def test_no_wake_up_nests_in_another(site):
    call = shlex.join(site.command())
    site.shell("a", f"{call} --cron_max_execution_time=0; echo code $?", schedule="every 1 d")
    site.wake()
    assert "code 75" in site.log("a")


def test_a_crash_before_the_claim_leaves_files_that_are_swept(site):
    note(site, "a")
    site.wake()
    (site.state / "runs" / "0123.out").write_text("")
    (site.state / "runs" / "4567.report").write_text("")
    site.wake()
    assert os.listdir(site.state / "runs") == []


# -- users


def give(folder, uid):
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, uid, uid, follow_symlinks=False)


@pytest.fixture
def theirs():
    """An installation that belongs to somebody else, where others may come."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copy(PROGRAM, folder / "bgtasks.py")
    site = Site(folder)
    note(site, "a")
    give(folder, 65534)
    yield site
    shutil.rmtree(folder)


def as_user(site, *args, uid=65534, before=()):
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *before]
    command = [*drop, "/usr/bin/python3", str(site.folder / "bgtasks.py"), *args]
    env = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd="/")


def wake_as(site, *args, **options):
    return as_user(site, "--cron_max_execution_time=0", *args, **options)


def test_it_works_as_another_user_and_root_is_refused_then(theirs):
    done = wake_as(theirs)
    assert (done.returncode, done.stderr) == (0, "")
    assert noted(theirs) == ["a"]
    done = theirs.wake()
    assert done.returncode == 77
    assert "belongs to nobody, you are root; run it as nobody (sudo -u nobody" in done.stderr


def test_root_makes_no_state_in_a_folder_of_somebody_else(theirs):
    assert theirs.wake().returncode == 77
    assert not theirs.state.exists()


def test_another_user_is_refused_and_learns_nothing(theirs):
    give(theirs.folder, 0)
    theirs.params.chmod(0o644)
    assert theirs.wake().returncode == 0
    done = wake_as(theirs)
    assert done.returncode == 77
    assert "belongs to root, you are nobody" in done.stderr
    assert as_user(theirs, "status").returncode == 77


def test_who_has_no_name_works(theirs):
    give(theirs.folder, 54321)
    done = wake_as(theirs, uid=54321)
    assert (done.returncode, done.stderr) == (0, "")
    assert theirs.rows("SELECT user FROM wakeup") == [{"user": "uid 54321"}]


def test_a_state_that_may_not_be_written_is_refused(theirs):
    assert wake_as(theirs).returncode == 0
    (theirs.state / "bgtasks.db").chmod(0o400)
    done = wake_as(theirs)
    assert done.returncode == 77
    assert "bgtasks.db: cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unsafe_folder_stops_the_wake_up(site):
    note(site, "a")
    site.tasks.chmod(0o777)
    done = site.wake()
    assert done.returncode == 77
    assert f"chmod go-w {site.tasks}" in done.stderr
    assert noted(site) == []


def test_no_process_to_be_had_gives_the_claim_back(theirs):
    wake_as(theirs, "--exclude_task=a")
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NPROC, (0, 0));"
    before = ["/usr/bin/python3", "-c", limit + "os.execv(sys.argv[1], sys.argv[1:])"]
    done = wake_as(theirs, before=before)
    assert done.returncode == 71
    assert "cannot start a process" in done.stderr
    assert theirs.rows("SELECT * FROM run") == []
    wake_as(theirs)
    assert noted(theirs) == ["a"]


# -- the clock

CLOCK = """
import os, sys
sys.path.insert(0, {program!r})
import bgtasks
class Set(bgtasks.Clock):
    def now(self):
        with open({offset!r}) as file:
            return super().now() + float(file.read())
sys.exit(bgtasks.main(sys.argv[1:], Set()))
"""


def runner_with_a_clock(site, *args):
    offset = site.folder / "offset"
    offset.write_text("0")
    code = CLOCK.format(program=str(PROGRAM.parent), offset=str(offset))
    command = [sys.executable, "-c", code, f"--param_file={site.params}", "--cron_sleep=1", *args]
    runner = subprocess.Popen(command)

    def set_clock(seconds):
        (site.folder / "new").write_text(str(seconds))
        os.replace(site.folder / "new", offset)

    return runner, set_clock


def test_the_clock_set_back_an_hour_brings_no_silence_and_no_repetition(site):
    note(site, "often", schedule="every 2 s")
    note(site, "fixed", schedule=f"daily {time.strftime('%H:%M', time.gmtime())}", timezone="UTC")
    runner, set_clock = runner_with_a_clock(site, "--cron_max_execution_time=600")
    wait_for(lambda: "often" in noted(site))
    site.change("UPDATE task SET next_run_at = next_run_at - 86400 WHERE name = 'fixed'")
    wait_for(lambda: "fixed" in noted(site))
    before, began = noted(site).count("often"), time.monotonic()
    set_clock(-3600)
    wait_for(lambda: noted(site).count("often") - before >= 3)
    stop(runner)
    assert noted(site).count("often") - before <= (time.monotonic() - began) / 2 + 2
    assert noted(site).count("fixed") == 1


def test_the_clock_set_a_week_ahead_brings_no_burst(site):
    note(site, "often", schedule="every 2 s")
    note(site, "daily", schedule=far_away())
    runner, set_clock = runner_with_a_clock(site, "--cron_max_execution_time=600")
    wait_for(lambda: "often" in noted(site))
    before, began = noted(site).count("often"), time.monotonic()
    set_clock(7 * 86400)
    wait_for(lambda: noted(site).count("often") - before >= 3 and "daily" in noted(site))
    stop(runner)
    assert noted(site).count("often") - before <= (time.monotonic() - began) / 2 + 2
    assert noted(site).count("daily") == 1
    # and back again: the next wake-up goes on in real time
    site.wake("--verbose")
    due = site.rows("SELECT next_run_at FROM task WHERE name = 'often'")[0]["next_run_at"]
    assert due - time.time() < 5


def test_moments_that_a_task_may_give():
    zone = bgtasks.Zone("Europe/Berlin")
    now = 1_767_225_600.0
    assert bgtasks.read_moment("1767225700.5", zone, now) == 1_767_225_700
    assert bgtasks.read_moment("2026-01-02T00:00:00Z", zone, now) == now + 86400
    assert bgtasks.read_moment("2026-01-02T00:00:00", zone, now) == now + 82800
    with pytest.raises(ValueError, match="not in the future"):
        bgtasks.read_moment("2026-03-29T02:30:00", zone, now)


def test_the_machine_allows_what_these_tests_need():
    assert os.geteuid() == 0, "run them as root: some drop to another user"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64


# -- in this process: what ends by a signal leaves no measure of its coverage


@pytest.fixture
def runner(site, clock):
    """A runner on a fake clock, with a task that is due now and one that never is."""
    note(site, "a", schedule="every 1 h")
    note(site, "manual", schedule="manual")
    arguments = {"param_file": str(site.params), "cron_max_execution_time": "0"}
    store = bgtasks.open_store(str(site.state))
    told = []
    settings = bgtasks.read_settings(arguments, "x")
    runner = bgtasks.Runner(settings, store, clock, "cli", lambda kind, _: told.append(kind))
    runner.told = told
    yield runner
    store.close()


def test_a_runner_that_was_told_to_stop_starts_nothing(site, runner):
    runner.stop_signal = signal.SIGTERM
    runner._work()
    assert runner.store.tasks() == []
    assert noted(site) == []


def test_a_signal_to_stop_is_passed_on_to_the_keepers(runner):
    child = subprocess.Popen(["sleep", "60"])
    signals = runner._catch_signals()
    try:
        runner.running = {child.pid: None}
        runner.queue = [{"name": "a"}]
        os.kill(os.getpid(), signal.SIGHUP)
        runner._take_signals()
    finally:
        signals.close()
    assert child.wait(60) == -signal.SIGTERM
    assert (runner.stop_signal, runner.queue) == (signal.SIGHUP, [])


def test_the_clock_set_back_plans_anew_what_follows_real_time(runner, clock):
    runner.look()
    before = runner.store.task("a")["next_run_at"]
    clock.moment -= 7200
    runner.look()
    assert runner.told == ["clock"]
    planned = runner.store.task("a")["next_run_at"]
    assert clock.moment < planned <= clock.moment + 3600
    assert (before - planned) % 3600 == 0
    assert runner.store.task("manual")["next_run_at"] is None
    assert runner.store.fact("steps") == "1"


def test_a_claim_without_process_is_given_back(site, runner, monkeypatch):
    def fail():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    runner.look()
    monkeypatch.setattr(os, "fork", fail)
    assert runner.start(runner.queue[0]) is None
    runner._drain()
    assert (runner.told, runner.queue) == (["trouble"], [])
    assert runner.store.open_runs() == []
    assert os.listdir(site.state / "runs") == []
    assert len(runner.store.due(runner.clock.now())) == 1


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path, clock):
    with pytest.raises(bgtasks.CreateError):
        bgtasks.take_runner_lock(str(tmp_path), None, clock)


@pytest.mark.parametrize(
    ("left", "frees", "waits"),
    [
        (5, 1, True),
        (1, 3, True),
        (1, 5.9, True),
        (5.1, 1, False),
        (1, 6.1, False),
        (None, 1, False),
    ],
)
def test_a_runner_near_its_end_or_a_little_late_is_waited_for(tmp_path, clock, left, frees, waits):
    """It has ``left`` seconds to its end, and leaves in as many as ``frees``."""
    path, leaves_at = str(tmp_path / "lock"), clock.ticks + frees
    held = [bgtasks.take_runner_lock(path, left and clock.ticks + left, clock)]

    def wait(seconds):
        clock.advance(seconds)
        if held and clock.ticks >= leaves_at:
            os.close(held.pop())

    clock.wait = wait
    taken = bgtasks.take_runner_lock(path, None, clock)
    assert (taken is not None) == waits
    for fd in [taken] * waits + held:
        os.close(fd)


def test_only_the_owner_of_the_state_may_work(tmp_path):
    os.chown(tmp_path, 4321, 4321)
    with pytest.raises(bgtasks.RefusedError, match="belongs to uid 4321, you are root"):
        bgtasks.refuse_wrong_user(str(tmp_path))
    with somebody_else(), pytest.raises(bgtasks.RefusedError, match="setuid"):
        bgtasks.refuse_wrong_user(str(tmp_path))


def test_no_folder_of_tasks_is_a_config_error(site):
    shutil.rmtree(site.tasks)
    done = site.wake()
    assert done.returncode == 78
    assert f"{site.tasks}: cannot read the folder of tasks" in done.stderr
