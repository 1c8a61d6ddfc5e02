"""What follows from how runs went: tries, pauses, waiting, and what is kept of it.

The wake-ups are real ones in this process, with real runs; only the clock stands still until a test
moves it.
"""

import random
from datetime import datetime, timezone

import pytest
from conftest import FakeClock, wait_for

import bgtasks

START = 1_767_225_600.0  # 2026-01-01T00:00:00Z, a Thursday


class StillClock(FakeClock):
    """Time moves only when a test moves it; waiting is real."""

    def wait(self, seconds, readable=()):
        return bgtasks.Clock.wait(self, min(seconds, 5.0), readable)


class Installation:
    def __init__(self, site):
        self.site, self.clock, self.told = site, StillClock(START), []
        self.store = bgtasks.open_store(str(site.state))
        site.params.write_text("node = here\ntimezone = UTC\n")

    def settings(self, **settings):
        given = {"param_file": str(self.site.params), "cron_max_execution_time": "0"}
        return bgtasks.read_settings({**given, **settings}, "x")

    def tell(self, kind, facts):
        if kind != "progress":
            self.told.append((kind, facts))

    def wake(self, seconds=0, trigger="cli", **settings):
        """Move the clock by this much, and wake it for one look."""
        self.clock.advance(seconds)
        runner = bgtasks.Runner(
            self.settings(**settings), self.store, self.clock, trigger, self.tell
        )
        runner.wake_up()
        return runner

    def task(self, name):
        return self.store.task(name)

    def outcomes(self, name):
        return [run["outcome"] for run in reversed(self.store.history(name, 1000))]

    def triggers(self, name):
        return [run["trigger"] for run in reversed(self.store.history(name, 1000))]

    def reasons(self, name):
        return [(skip["reason"], skip["count"]) for skip in self.store.skips(name)]

    def status(self, name):
        rows = bgtasks.task_rows(self.settings(), self.store, self.clock.now())
        return next(row for row in rows if row["name"] == name)


@pytest.fixture
def place(site):
    place = Installation(site)
    yield place
    place.store.close()


def fails(place, name="a", schedule="every 1 d", **settings):
    place.site.shell(name, "exit 1", schedule=schedule, **settings)


def works(place, name="a", schedule="every 1 d", **settings):
    place.site.shell(name, "", schedule=schedule, **settings)


# -- failures


def tried(place, minutes):
    """The minutes at which `a` was started, woken every minute."""
    found = []
    for minute in range(minutes):
        before = len(place.outcomes("a"))
        place.wake(60 if minute else 0)
        if len(place.outcomes("a")) > before:
            found.append(minute)
    return found


def test_a_nightly_task_is_tried_again_after_one_two_and_four_minutes_then_next_night(place):
    fails(place)
    assert tried(place, 60) == [0, 1, 3, 7]
    assert place.triggers("a") == ["cli", "retry", "retry", "retry"]
    assert place.task("a")["next_run_at"] == START + 86400
    place.wake(86400 - 3540)
    assert place.outcomes("a") == ["failed"] * 5


def test_a_task_of_every_minute_does_not_hammer(place):
    fails(place, schedule="every 1 min")
    # 1, 2, 4, ... 32 minutes, then an hour at most
    assert tried(place, 200) == [0, 1, 3, 7, 15, 31, 63, 123, 183]


def test_the_pauses_between_tries_follow_retry_delay_and_end_at_an_hour(place):
    fails(place, schedule="every 1 min", retry_delay="20 min", retries=1)
    place.wake()
    assert place.task("a")["not_before"] == START + 1200
    place.wake(1200)
    assert place.task("a")["not_before"] == START + 1200 + 2400
    assert place.task("a")["extra_at"] is None
    place.wake(2400)
    assert place.task("a")["not_before"] == START + 3600 + 3600
    fails(place, "slow", retry_delay="3 h")
    place.wake()
    assert place.task("slow")["not_before"] == place.clock.now() + 3 * 3600


def test_a_success_ends_the_back_off_and_the_counting(place):
    fails(place)
    place.wake()
    works(place)
    place.wake(60)
    row = place.task("a")
    assert place.outcomes("a") == ["failed", "done"]
    assert (row["consecutive_failures"], row["not_before"], row["extra_at"]) == (0, None, None)


def test_a_changed_file_is_tried_at_its_next_moment_without_waiting(place):
    fails(place, schedule="every 1 min")
    for _ in range(3):
        place.wake(240)
    assert place.task("a")["not_before"] > place.clock.now() + 120
    works(place, schedule="every 1 min")
    place.wake(60)
    assert place.outcomes("a")[-1] == "done"


@pytest.mark.parametrize(("result", "outcome"), [("more", "more"), ("nothing", "nothing")])
def test_more_and_nothing_are_no_failures(place, result, outcome):
    place.site.shell("a", f"echo result={result} >>$BGTASKS_REPORT")
    place.wake()
    row = place.task("a")
    assert place.outcomes("a")[0] == outcome
    assert (row["failures"], row["consecutive_failures"], row["not_before"]) == (0, 0, None)


def test_a_failure_by_hand_is_counted_but_not_tried_again(place):
    fails(place, schedule="manual")
    place.wake()
    runner = bgtasks.Runner(place.settings(), place.store, place.clock, "hand", place.tell)
    assert runner.run_by_hand("a")["outcome"] == "failed"
    row = place.task("a")
    assert (row["consecutive_failures"], row["not_before"], row["extra_at"]) == (1, None, None)


def test_a_success_by_hand_makes_the_pending_try_needless(place):
    fails(place)
    place.wake()
    assert place.task("a")["extra_trigger"] == "retry"
    works(place)
    runner = bgtasks.Runner(place.settings(), place.store, place.clock, "hand", place.tell)
    assert runner.run_by_hand("a")["outcome"] == "done"
    row = place.task("a")
    assert (row["extra_at"], row["extra_trigger"], row["not_before"]) == (None, None, None)


def test_a_failure_after_progress_is_told_apart(place):
    place.site.shell("a", "echo volume=3 >>$BGTASKS_REPORT; exit 2")
    place.site.shell("b", "echo progress=1/4 >>$BGTASKS_REPORT; exit 2")
    place.site.shell("c", "exit 2")
    place.wake()
    reasons = [place.store.history(name, 1)[0]["reason"] for name in "abc"]
    assert reasons == [
        "exit code 2, after progress: 3",
        "exit code 2, after progress: 1/4",
        "exit code 2",
    ]


def test_it_is_paused_after_so_many_failures_with_a_warning_at_half(place):
    fails(place, schedule="every 1 min", pause_after_failures=4, retry_delay=1)
    for _ in range(6):
        place.wake(600)
    assert place.outcomes("a") == ["failed"] * 4
    told = [(kind, facts) for kind, facts in place.told if kind in ("warning", "paused")]
    assert [kind for kind, _ in told] == ["warning", "paused"]
    assert told[0][1] == {"task": "a", "number": 2, "most": 4}
    status = place.status("a")
    assert (status["state"], status["reason"]) == (
        "paused",
        "by bgtasks; failed 4 times in a row",
    )
    assert [event["what"] for event in place.store.events("a", 9)] == [
        "paused; failed 4 times in a row"
    ]
    assert place.reasons("a")[0] == ("paused", 2)


def test_resume_forgets_what_was_counted(place):
    fails(place, schedule="every 1 min", pause_after_failures=2, retry_delay=1)
    for _ in range(3):
        place.wake(600)
    bgtasks.resume(place.store, "a", "ann", place.clock.now())
    place.wake(600)
    assert place.outcomes("a") == ["failed"] * 3
    assert place.status("a")["state"] == "active"
    assert "is paused at 2" in place.status("a")["reason"]


def test_strict_ends_with_1_if_a_run_failed(site):
    site.shell("a", "exit 1")
    assert site.wake("--strict").returncode == 1
    assert site.wake("--strict").returncode == 0


# -- interruptions


# it ends its keeper, then its own group: nobody is left to say how it ended
CRASH = "kill -9 $(ps -o ppid= -p $PPID); kill -9 0"


def crash(place, seconds=0, **settings):
    """A wake-up, and then wait until the kernel has cleared away what was killed."""
    runner = place.wake(seconds, **settings)
    wait_for(lambda: runner.settle() or not place.store.open_runs())


def test_interrupted_three_times_in_a_row_it_is_paused_and_the_others_go_on(place):
    place.site.shell("a", CRASH)
    works(place, "b", schedule="every 1 min")
    for _ in range(5):
        crash(place, 60)
    assert place.outcomes("a") == ["interrupted"] * 3
    assert place.outcomes("b") == ["done"] * 5
    assert place.status("a")["reason"].startswith(
        "by bgtasks; its runs, or their runners, went down 3 times in a row"
    )
    assert place.status("a")["unacknowledged"] == 3


def test_max_interruptions_0_pauses_nothing(place):
    place.site.shell("a", CRASH)
    for _ in range(4):
        crash(place, 60, max_interruptions="0")
    assert place.status("a")["state"] == "active"
    assert place.task("a")["interruptions"] == 4


def test_what_crashed_goes_last_and_alone(place):
    ledger = place.site.ledger
    place.site.shell("a", CRASH, order=1)
    for name in ("b", "c"):
        place.site.shell(name, f"sleep 0.2; echo {name} >>{ledger}", order=9)
    crash(place)
    place.site.shell("a", f"cat {ledger} >{place.site.said}; sleep 0.2; echo a >>{ledger}", order=1)
    ledger.write_text("")
    place.wake(60, max_parallel="3")
    assert sorted(place.site.said.read_text().split()) == ["b", "c"]  # both had ended
    assert ledger.read_text().split()[-1] == "a"
    assert place.task("a")["interruptions"] == 0


def test_a_task_that_takes_its_runner_down_is_held_back_though_it_ends_well(site):
    # its parent is the keeper, whose parent is the runner
    site.shell("a", "kill -9 $(ps -o ppid= -p $(ps -o ppid= -p $PPID))", schedule="every 1 d")
    assert site.wake().returncode == -9
    assert site.wake().returncode == 0
    assert site.rows("SELECT interruptions FROM task") == [{"interruptions": 1}]
    assert site.last("a")["outcome"] == "done"


def test_killed_is_never_tried_again(place):
    row = {"consecutive_failures": 0, "interruptions": 1, "extra_trigger": None, "paused_at": None}
    end = {"outcome": "killed", "crashed": False, "state": None, "next_run_at": None, "now": START}
    works(place)
    place.wake()
    task = bgtasks.task_from(place.task("a"))
    follows = bgtasks.what_follows(task, row, {**end, "by_hand": False}, 3, lambda _: None)
    assert follows == {"interruptions": 0}


# -- late and missed


def test_missed_slots_become_one_run_that_says_how_many(place):
    works(place, schedule="every 1 h")
    place.wake()
    place.wake(5 * 3600)
    assert place.outcomes("a") == ["done", "done"]
    assert place.store.history("a", 1)[0]["missed_slots"] == 4
    works(place, "b", schedule="daily 03:30")
    place.wake()
    place.wake(3 * 86400)
    assert place.store.history("b", 1)[0]["missed_slots"] == 2


def test_missed_after_records_it_and_waits_for_the_next(place):
    works(place, schedule="daily 03:30", missed_after="1 h")
    place.wake()
    place.wake(5 * 3600)  # 05:00
    assert place.outcomes("a") == ["missed"]
    run = place.store.history("a", 1)[0]
    assert "missed_after" in run["reason"]
    assert run["planned_at"] == START + 3.5 * 3600
    place.wake(0)
    place.wake(86400 - 3600)  # 04:00, half an hour late
    assert place.outcomes("a") == ["missed", "done"]
    assert place.task("a")["runs"] == 1
    assert ("missed", "a") in [(kind, facts["task"]) for kind, facts in place.told]


# -- windows, groups, nodes, after


def test_a_slot_outside_the_window_waits_until_it_opens(place):
    works(place, schedule="every 1 d", window="22:00-06:00")
    place.wake(12 * 3600)  # noon
    assert place.outcomes("a") == []
    assert place.status("a")["next_run_at"] == bgtasks.iso(START + 22 * 3600)
    place.wake(10 * 3600 - 1)
    assert place.outcomes("a") == []
    place.wake(1)
    assert place.outcomes("a") == ["done"]
    assert place.reasons("a") == [("window", 2)]


@pytest.mark.parametrize(
    ("window", "hours"),
    [
        ("22:00-06:00", {22, 23, *range(6)}),
        ("08:00-18:00", set(range(8, 18))),
        ("07:00-07:00", set(range(24))),
        ("18:00-24:00", set(range(18, 24))),
    ],
)
def test_the_hours_of_a_window(window, hours):
    found = bgtasks.parse_window(window)
    zone = bgtasks.Zone("UTC")
    assert {
        h for h in range(24) if found.opens(zone, START + h * 3600) == START + h * 3600
    } == hours


def test_a_window_opens_right_after_a_gap_of_the_clock():
    zone = bgtasks.Zone("Europe/Berlin")
    noon = datetime(2026, 3, 28, 12, tzinfo=timezone.utc).timestamp()
    opens = bgtasks.parse_window("02:30-04:00").opens(zone, noon)
    assert bgtasks.iso(opens, zone.tzinfo) == "2026-03-29T03:00:00+02:00"


@pytest.mark.parametrize(
    ("schedule", "window"),
    [("daily 03:30", "08:00-18:00"), ("mon,thu 07:00,19:00", "08:00-18:30")],
)
def test_a_window_that_the_schedule_never_meets_is_broken(place, schedule, window):
    works(place, schedule=schedule, window=window)
    place.wake()
    reason = place.status("a")["reason"]
    assert reason.startswith(f"a.sh: window: {window} never meets the schedule")


@pytest.mark.parametrize(
    ("schedule", "window"),
    [
        ("daily 03:30", "03:30-03:31"),
        ("every 1 d", "08:00-18:00"),
        ("always", "08:00-18:00"),
        (["daily 03:30", "every 2 h"], "08:00-18:00"),
    ],
)
def test_a_window_that_the_schedule_meets_is_fine(place, schedule, window):
    works(place, schedule=schedule, window=window)
    place.wake()
    assert place.status("a")["state"] == "active"


def test_other_nodes_groups_and_ways_to_wake_leave_it_due(place):
    works(place, "node", nodes=["web1", "web2"])
    works(place, "web", wakeup=["web"])
    works(place, "group", group="g")
    works(place, "here", nodes="here")
    works(place, "each", nodes="each")
    place.wake(exclude_group="g")
    assert [place.outcomes(name) for name in ("node", "web", "group")] == [[], [], []]
    assert [place.outcomes(name) for name in ("here", "each")] == [["done"], ["done"]]
    assert [place.reasons(name)[0][0] for name in ("node", "web", "group")] == [
        "node",
        "wakeup",
        "selection",
    ]
    place.wake(1, trigger="web", node="web2")
    assert [place.outcomes(name) for name in ("node", "web", "group")] == [["done"]] * 3


def test_manual_with_after_starts_when_all_have_succeeded(place):
    fails(place, "one", schedule="every 1 h", retries=0)
    works(place, "two", schedule="every 1 h")
    works(place, "last", schedule="manual", after=["one", "two"])
    place.wake()
    place.wake(1)
    assert place.outcomes("last") == []
    works(place, "one", schedule="every 1 h")
    place.wake(3600)
    place.wake(1)
    assert (place.outcomes("last"), place.triggers("last")) == (["done"], ["after"])
    place.wake(1)
    assert place.outcomes("last") == ["done"]
    place.wake(3600)
    place.wake(1)
    assert place.outcomes("last") == ["done"] * 2


def test_a_slot_with_after_waits_for_the_others(place):
    fails(place, "one", schedule="every 1 h", retries=0)
    works(place, "last", schedule="every 1 h", after=["one"])
    place.wake()
    assert place.outcomes("last") == []
    assert place.reasons("last") == [("after", 1)]
    works(place, "one", schedule="every 1 h")
    place.wake(3600)
    place.wake(1)
    assert place.outcomes("last") == ["done"]


def test_a_circle_and_an_unknown_name_are_broken_and_heal(place):
    works(place, "a", schedule="manual", after=["b"])
    works(place, "b", schedule="manual", after=["c"])
    works(place, "c", schedule="manual", after=["a", "bb"])
    place.wake()
    assert [place.status(name)["state"] for name in "abc"] == ["broken"] * 3
    assert "is a circle" in place.status("a")["reason"]
    assert "after: there is no task 'bb' (did you mean 'b'?)" in place.status("c")["reason"]
    works(place, "c", schedule="manual")
    assert [place.status(name)["state"] for name in "abc"] == ["active"] * 3
    place.wake(1)
    assert [place.status(name)["state"] for name in "abc"] == ["active"] * 3
    assert [place.task(name)["error"] for name in "abc"] == [""] * 3


def test_a_requested_run_does_not_wait_for_others(place):
    works(place, "one", schedule="manual")
    works(place, "last", schedule="every 1 d", after=["one"])
    place.wake()
    place.store.change("last", extra_at=place.clock.now(), extra_trigger="request")
    place.wake(1)
    assert place.outcomes("last") == ["done"]


# -- what did not start, and why


def test_reasons_are_counted_once_a_wake_up_and_begin_anew_after_a_run(place):
    works(place, schedule="every 1 h")
    place.wake(exclude_task="a")
    place.wake(10, exclude_task="a")
    place.wake(10)
    place.wake(3600, exclude_task="a")
    found = [(s["reason"], s["count"], s["first_at"] - START) for s in place.store.skips("a")]
    assert found == [("selection", 1, 3620.0), ("selection", 2, 0.0)]


def test_limits_and_maintenance_are_reasons(place):
    works(place, "a")
    works(place, "b")
    (place.site.folder / "maintenance").write_text("")
    place.wake()
    assert place.reasons("a") == place.reasons("b") == [("maintenance", 1)]
    (place.site.folder / "maintenance").unlink()
    place.wake(cron_limit="1")
    assert place.reasons("b") == [("limit", 1), ("maintenance", 1)]


def test_a_wake_up_with_nothing_due_writes_no_reason(place):
    works(place, schedule="daily 03:30")
    place.wake()
    assert place.store.rows("SELECT * FROM skip") == []


# -- will it fit


class SimulatedClock(FakeClock):
    """Jumps to what comes first: the end of the wait, or of a run."""

    def __init__(self):
        super().__init__(START)
        self.ends = {}

    def wait(self, seconds, readable=()):
        first = min(self.ends.values(), default=self.ticks + seconds)
        self.advance(max(0.0, min(seconds, first - self.ticks)))
        return False


class SimulatedRunner(bgtasks.Runner):
    """A real runner, but for its keepers: its runs take time on the simulated clock only."""

    def _start_keeper(self, brief, output):
        seconds, code = self.draw(brief.task.name)
        pid = 10_000_000 + brief.given["run"]
        self.clock.ends[pid] = self.clock.ticks + seconds
        notes = bgtasks.append_to(brief.live + ".keeper")
        bgtasks.note(notes, end="", status=code, exit=code, seconds=seconds)
        bgtasks.os.close(notes)
        return pid

    def _ended_keepers(self):
        ended = [pid for pid in self.running if self.clock.ends[pid] <= self.clock.ticks]
        for pid in ended:
            del self.clock.ends[pid]
        return ended


def test_a_task_due_while_a_runner_waits_starts_on_time(place):
    works(place, schedule="every 7 s")
    settings = place.settings(cron_max_execution_time="60", cron_sleep="60")
    runner = SimulatedRunner(settings, place.store, SimulatedClock(), "cli", place.tell)
    runner.draw = lambda _: (0.5, 0)
    runner.wake_up()
    runs = [
        (run["slot"] - START, run["started_at"] - START) for run in place.store.history("a", 99)
    ]
    assert runs == [(seconds, seconds) for seconds in range(56, -1, -7)]


def simulate(place, budget, interval, days, chance):
    """Return figures of so many days of wake-ups, each of ``budget`` seconds."""
    clock, store = SimulatedClock(), place.store
    means = {}
    for i in range(40):
        means[f"t{i:02}"] = chance.uniform(0.01, 0.75 if i % 8 == 0 else 0.05) * budget
        works(place, f"t{i:02}", schedule=f"every {chance.choice([4, 6, 12, 24])} h")

    def draw(name):
        return means[name] * chance.uniform(0.7, 1.3), int(chance.random() < 0.05)

    settings = place.settings(cron_max_execution_time=str(budget), cron_sleep="60")
    waited, longest, runs, begins = dict.fromkeys(means, 0), 0, 0, START
    while clock.now() < START + days * 86400:
        clock.advance(max(0.0, begins - clock.now()))
        runner = SimulatedRunner(settings, store, clock, "cli", lambda *_: None)
        runner.draw = draw
        due = {
            row["name"]
            for row in store.due(clock.now())
            if not bgtasks.by_hand_held(bgtasks.task_from(row), row, settings, clock.now())
        }
        before = {name: row["runs"] for name, row in ((r["name"], r) for r in store.tasks())}
        runner.wake_up()
        for row in store.tasks():
            name = row["name"]
            if row["runs"] > before.get(name, 0) or name not in due:
                waited[name] = 0
            else:
                waited[name] += 1
            longest = max(longest, waited[name])
        runs += runner.started
        begins += interval * (1 + (clock.now() - begins) // interval)
    deferred = store.rows("SELECT sum(count) AS n FROM skip WHERE reason = 'time'")[0]["n"] or 0
    return runs, deferred, longest


@pytest.mark.unmeasured
@pytest.mark.parametrize(("budget", "interval"), [(60, 300), (300, 300), (600, 600)])
def test_no_task_waits_longer_than_three_wake_ups_beyond_its_turn(place, budget, interval):
    # 30 days in the full form (BGTASKS_FULL=1 python -m pytest -s tests/test_policy.py -k longer)
    seed = random.SystemRandom().randrange(10**6)
    days = 30 if bgtasks.os.environ.get("BGTASKS_FULL") else 2
    runs, deferred, longest = simulate(place, budget, interval, days, random.Random(seed))
    print(
        f"wake-ups of {budget} s, {days} days, 40 tasks, seed {seed}: {runs} runs, "
        f"{deferred} times no time left, longest wait {longest} wake-ups"
    )
    assert runs > days * 40
    assert longest <= 3


def test_a_task_that_was_deferred_three_times_goes_first(place):
    rows = [
        {"name": "a", "deferred": 0, "order": 1},
        {"name": "b", "deferred": 3, "order": 100},
        {"name": "c", "deferred": 0, "order": 1, "interruptions": 1},
        {"name": "d", "deferred": 0, "order": 1, "extra_trigger": "repeat"},
        {"name": "e", "deferred": 0, "order": 0, "last_outcome": "failed"},
    ]
    usual = {"interruptions": 0, "extra_trigger": None, "last_outcome": "done"}
    usual |= {"last_overran": 0, "extra_at": None, "next_run_at": START}
    order = sorted(({**usual, **row} for row in rows), key=bgtasks._turn)
    assert [row["name"] for row in order] == ["b", "a", "e", "d", "c"]


def test_what_fits_no_wake_up_says_so_in_the_status(place):
    works(place, schedule="every 1 d")
    place.wake()
    place.store.execute(
        "UPDATE run SET ended_at = started_at + 400, deadline_at = started_at + 600"
    )
    settings = place.settings(cron_max_execution_time="300")
    rows = bgtasks.task_rows(settings, place.store, place.clock.now())
    assert "longer than a wake-up stays" in rows[0]["reason"]
    assert "longer" not in place.status("a")["reason"]


# -- the history is kept within bounds


def add_runs(place, count, task="a", outcome="done", age_days=1000.0, output=""):
    first = place.store.row("SELECT coalesce(max(id), 0) AS id FROM run")["id"] + 1
    at = START - age_days * 86400
    with place.store:
        for i in range(first, first + count):
            place.store.execute(
                "INSERT INTO run (task, steps, planned_at, started_at, deadline_at, ended_at,"
                " outcome, trigger, node, live, output)"
                " VALUES (?, 0, ?, ?, ?, ?, ?, 'cli', 'here', ?, ?)",
                (task, at, at, at, at, outcome, f"{task}{i}", output),
            )


def clean(place, times=1, **settings):
    runner = bgtasks.Runner(place.settings(**settings), place.store, place.clock, "cli", place.tell)
    for _ in range(times):
        runner._clean()


def ids(place, task="a"):
    return [run["id"] for run in reversed(place.store.history(task, 10**6))]


def test_old_runs_go_but_the_last_twenty_of_a_task_stay(place):
    add_runs(place, 120)
    add_runs(place, 5, "b")
    clean(place)
    assert ids(place) == list(range(101, 121))
    assert len(ids(place, "b")) == 5


def test_failures_are_kept_longer_and_a_task_may_say_how_long(place):
    for outcome in ("done", "failed"):
        add_runs(place, 30, outcome, outcome, age_days=50)
    works(place, "own", history_lifetime="60 d")
    works(place, "short", history_lifetime="1 d")
    place.wake()
    add_runs(place, 30, "own", age_days=50)
    add_runs(place, 30, "short", "failed", age_days=2)
    clean(place, 3)
    assert [len(ids(place, name)) for name in ("done", "failed", "own", "short")] == [
        20,
        30,
        31,
        21,
    ]


def test_cleaning_goes_on_where_it_ended(place):
    add_runs(place, 200, age_days=1)
    add_runs(place, 100, "b")
    clean(place)
    assert int(place.store.fact("cleaned")) == 100
    clean(place, 3)
    assert len(ids(place, "b")) == 20
    assert len(ids(place)) == 200


def test_a_history_that_is_too_large_loses_old_runs_and_then_output(place, monkeypatch):
    add_runs(place, 100, age_days=1, output="x" * 10_000)
    monkeypatch.setattr(bgtasks, "HISTORY_BYTES", 150_000)
    clean(place, 3)
    assert len(ids(place)) == 20
    assert place.store.size() < 150_000 + 50 * 10_000
    kept = [run["output"] for run in place.store.history("a", 20)]
    assert bgtasks.REMOVED in kept


def test_open_runs_are_never_cleaned(place):
    add_runs(place, 60)
    place.store.execute("UPDATE run SET ended_at = NULL, outcome = 'running' WHERE id = 1")
    clean(place)
    assert ids(place)[0] == 1


def test_a_wake_up_cleans_when_it_has_started_something(place):
    add_runs(place, 60)
    works(place, "b", schedule="every 1 d")
    place.wake()
    assert len(ids(place)) == 20
    add_runs(place, 60, "c")
    place.wake(1)
    assert len(ids(place, "c")) == 60


def test_old_reasons_go_with_the_old_history(place):
    works(place, schedule="every 1 h")
    place.wake(exclude_task="a")
    place.wake(200 * 86400)
    assert place.reasons("a") == []
