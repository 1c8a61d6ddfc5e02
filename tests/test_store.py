import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import closing

import pytest
from conftest import somebody_else
from hypothesis import settings as hypothesis_settings
from hypothesis import stateful
from hypothesis import strategies as st

import bgtasks
from bgtasks import BusyError, DataError, RefusedError, StorageError, Store, Task, open_store

NOW = 1_767_225_600.0
SETTINGS = {"enabled": True, "order": 100, "group": "default", "schedule": "every 1 min"}


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def store(state):
    store = open_store(str(state))
    yield store
    store.close()


def add(store, name, next_run_at=NOW, **values):
    planned = {"schedule": "s", "always": False, "anchor_at": 0, "next_run_at": next_run_at}
    task = Task(name, f"{name}.sh", "print", f"{name}.sh", ("sh",), {**SETTINGS, **values})
    store.write_task(task, planned)


def claim(store, task, slot=NOW, **values):
    return store.claim(
        {
            "task": task,
            "slot": slot,
            "next_run_at": None if slot is None else slot + 60,
            "extra_at": None,
            "planned_at": slot or NOW,
            "deadline_at": NOW + 600,
            "trigger": "cli",
            "live": os.urandom(4).hex(),
            "node": "here",
            "steps": 0,
            "missed_slots": 0,
            "last_started_at": None,
            "now": NOW,
            **values,
        }
    )


def end(outcome="done", **values):
    nothing = dict.fromkeys(("volume", "exit_code", "peak_kib"))
    texts = dict.fromkeys(("reason", "message", "output"), "")
    return {
        **nothing,
        **texts,
        "outcome": outcome,
        "seconds": 2.0,
        "overran": False,
        "now": NOW + 5,
        **values,
    }


def finish(store, run, ended=None, **follows):
    return store.finish(run, ended or end(), follows)


def pause(store, name, by="x", until=None, note=""):
    bgtasks.pause(store, name, by, NOW, until, note)


def columns(store, task, *names):
    row = store.task(task)
    return tuple(row[name] for name in names)


# -- the file


def test_modes_keep_others_out_whatever_the_umask(state):
    before = os.umask(0)
    try:
        open_store(str(state)).close()
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in [state, *state.rglob("*")]}
    assert found.pop("bgtasks.db-journal", 0o600) == 0o600
    assert found == {
        "state": 0o700,
        "runs": 0o700,
        "locks": 0o700,
        "bgtasks.db": 0o600,
    }


def test_it_is_a_full_synchronous_persistent_journal(store):
    assert store.row("PRAGMA journal_mode")["journal_mode"] == "persist"
    assert store.row("PRAGMA synchronous")["synchronous"] == 2
    assert store.row("PRAGMA user_version")["user_version"] == len(bgtasks.MIGRATIONS)


def refused(path, error, words):
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(error, match=words) as caught:
        open_store(str(path.parent))
    assert str(path) in str(caught.value)
    assert before is None or path.read_bytes() == before


def change(path, sql):
    with sqlite3.connect(path) as db:
        db.execute(sql)
    db.close()


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("PRAGMA user_version = 99", "newer bgtasks"),
        ("PRAGMA application_id = 7", "another program"),
    ],
)
def test_newer_and_foreign_files_are_refused(state, sql, words):
    open_store(str(state)).close()
    change(state / "bgtasks.db", sql)
    refused(state / "bgtasks.db", DataError, words)


def test_a_database_of_another_program_is_refused(state):
    state.mkdir(mode=0o700)
    change(state / "bgtasks.db", "CREATE TABLE x (y)")
    refused(state / "bgtasks.db", DataError, "another program")


@pytest.mark.parametrize(
    "content", [b"hello, world\n" * 100, b"\xff\xd8\xff\xe0" * 500], ids=["text", "jpeg"]
)
def test_what_is_no_database_is_refused(state, content):
    state.mkdir(mode=0o700)
    (state / "bgtasks.db").write_bytes(content)
    refused(state / "bgtasks.db", DataError, "damaged")


def test_a_file_that_was_emptied_is_refused_but_an_unfinished_one_is_made(state):
    open_store(str(state)).close()
    (state / "bgtasks.db").write_bytes(b"")
    refused(state / "bgtasks.db", DataError, "is empty, but was not before")
    (state / "runs").rmdir()
    open_store(str(state)).close()


def test_damage_is_found(state, store):
    for i in range(200):
        add(store, f"task{i}")
    store.check_integrity()
    store.close()
    content = bytearray((state / "bgtasks.db").read_bytes())
    content[4096 * 3 : 4096 * 3 + 200] = b"\xff" * 200
    (state / "bgtasks.db").write_bytes(content)
    damaged = Store(str(state / "bgtasks.db"))
    with closing(damaged), pytest.raises(DataError, match="damaged"):
        damaged.check_integrity()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_refused(state, link):
    open_store(str(state)).close()
    (state / "bgtasks.db").rename(state / "real")
    link(state / "real", state / "bgtasks.db")
    refused(state / "bgtasks.db", RefusedError, "link")


def test_a_state_dir_that_is_a_file_or_has_no_parent_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(bgtasks.ConfigError, match="is no folder"):
        open_store(str(tmp_path / "file"))
    with pytest.raises(bgtasks.CreateError, match="cannot be made"):
        open_store(str(tmp_path / "nope" / "state"))


def test_an_old_sqlite_is_refused_with_both_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 7, 17))
    with pytest.raises(bgtasks.UnavailableError, match=r"3\.26"):
        open_store(str(tmp_path / "state"))


@pytest.mark.parametrize(
    ("number", "error"),
    [("EACCES", RefusedError), ("ENOSPC", StorageError), ("EMFILE", bgtasks.ProcessError)],
)
def test_what_keeps_a_file_from_being_made_has_its_own_code(number, error):
    import errno

    assert isinstance(bgtasks.cannot_create("x", OSError(getattr(errno, number), "why")), error)


def test_a_file_taken_away_or_replaced_while_in_use_is_noticed(state, store):
    store.rows("SELECT 1")
    store.close()
    (state / "bgtasks.db").rename(state / "away")
    with pytest.raises(StorageError, match="gone"):
        store.rows("SELECT 1")
    (state / "bgtasks.db").write_bytes((state / "away").read_bytes())
    with pytest.raises(StorageError, match="replaced"):
        store.rows("SELECT 1")


@pytest.mark.parametrize("how", ["gone", "replaced"])
def test_a_write_into_a_file_that_was_taken_away_is_an_error(state, store, how):
    store.tasks()
    (state / "bgtasks.db").rename(state / "away")
    if how == "replaced":
        (state / "bgtasks.db").write_bytes(b"")
    with pytest.raises(StorageError, match="taken away"):
        add(store, "a")


def test_a_file_that_may_not_be_written_is_refused():
    folder = tempfile.mkdtemp()
    store = open_store(os.path.join(folder, "state"))
    store.close()
    for path in (folder, os.path.join(folder, "state")):
        os.chmod(path, 0o755)
    with somebody_else(), pytest.raises(RefusedError, match="cannot be written"):
        store.tasks()
    shutil.rmtree(folder)


def test_a_locked_file_is_busy(state, store):
    other = Store(str(state / "bgtasks.db"), timeout=0.05)
    with closing(other), store, pytest.raises(BusyError, match="in use"):
        add(other, "a")


def test_no_descriptor_left_is_told_from_no_permission(store, monkeypatch):
    def fail(*_):
        raise OSError(24, "Too many open files")

    store.rows("SELECT 1")
    monkeypatch.setattr(os, "open", fail)
    error = store._explained(sqlite3.OperationalError("unable to open database file"))
    assert isinstance(error, bgtasks.ProcessError)


def test_a_bug_in_our_sql_stays_raw(store):
    with pytest.raises(sqlite3.OperationalError, match="syntax error"):
        store.rows("SELEKT 1")


def test_rows_that_cannot_be_read_are_explained(store):
    with pytest.raises(sqlite3.OperationalError):
        store.rows("SELECT json_extract(x, '$') FROM (SELECT 1 AS x UNION ALL SELECT '{')")


def test_a_path_may_hold_what_an_uri_does_not(tmp_path):
    store = open_store(str(tmp_path / "a %?#b"))
    add(store, "x")
    store.close()
    assert (tmp_path / "a %?#b" / "bgtasks.db").stat().st_size > 0


def test_an_empty_store_in_memory_stands_for_one_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    store = Store(":memory:")
    assert store.tasks() == []
    assert store.last_seen() == 0.0
    store.close()
    assert os.listdir(tmp_path) == ["runs"]


def test_a_file_of_an_older_version_is_migrated_and_keeps_what_it_holds(state):
    state.mkdir()
    db = sqlite3.connect(state / "bgtasks.db")
    db.executescript(bgtasks.MIGRATIONS[0])
    db.execute(f"PRAGMA application_id = {bgtasks.APPLICATION_ID}")
    db.execute("PRAGMA user_version = 1")
    columns = 'name, file, script, fingerprint, definition, error, enabled, "order", "group"'
    definition = '["", ["true"], {"schedule": "every 1 min", "timezone": ""}]'
    db.execute(
        f"INSERT INTO task ({columns}) VALUES ('a', 'a', '', 'x', '{definition}', '', 1, 1, 'g')"
    )
    db.commit()
    db.close()
    with closing(open_store(str(state))) as store:
        version = store.row("PRAGMA user_version")["user_version"]
        assert version == len(bgtasks.MIGRATIONS)
        row = store.task("a")
        assert (row["fingerprint"], row["interruptions"]) == ("x", 0)
        # settings that the older version did not know have their defaults
        assert bgtasks.task_from(row).settings["retries"] == 3


def test_fifty_processes_make_the_schema_once(state):
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(bgtasks.__file__)!r})\n"
        f"import bgtasks; sys.stdin.read(); bgtasks.open_store({str(state)!r}).close()"
    )
    command = [sys.executable, "-c", code]
    readable, writable = os.pipe()
    started = [subprocess.Popen(command, stdin=readable, stderr=subprocess.PIPE) for _ in range(20)]
    os.close(readable)
    os.close(writable)
    assert [process.communicate()[1] for process in started] == [b""] * 20


# -- what the schema refuses


@pytest.mark.parametrize(
    "values",
    [
        {"outcome": "'odd'"},
        {"outcome": "'done'"},
        {"ended_at": "5"},
        {"outcome": "'done'", "ended_at": "0"},
        {"task": "NULL"},
        {"started_at": "NULL"},
    ],
    ids=str,
)
def test_impossible_runs_are_refused(store, values):
    row = {"task": "'a'", "steps": 0, "planned_at": 1, "started_at": 1, "deadline_at": 2}
    row.update({"trigger": "'cli'", "node": "'here'", "live": "'x'", **values})
    with pytest.raises(sqlite3.IntegrityError):
        store.execute(
            f"INSERT INTO run ({', '.join(row)}) VALUES ({', '.join(map(str, row.values()))})"
        )


def test_runs_since_a_moment_are_those_that_were_at_work_after_it_but_not_too_many(store):
    columns = "task, steps, planned_at, started_at, deadline_at, trigger, node, live"
    for number, ended, outcome in ((1, 5, "done"), (2, 9, "failed"), (3, None, "running")):
        store.execute(
            f"INSERT INTO run ({columns}, ended_at, outcome)"
            " VALUES ('a', 0, ?1, ?1, 99, 'cli', 'here', ?1, ?2, ?3)",
            (number, ended, outcome),
        )
    assert [run["started_at"] for run in store.runs_since(9, 10)] == [2, 3]
    assert [run["started_at"] for run in store.runs_since(0, 2)] == [2, 3]
    assert "output" not in store.runs_since(0, 1)[0]


def test_a_task_is_paused_by_somebody_and_an_extra_start_has_a_trigger(store):
    add(store, "a")
    for change in ("paused_at = 1", "extra_at = 1"):
        with pytest.raises(sqlite3.IntegrityError):
            store.execute(f"UPDATE task SET {change}")


# -- claims


def test_a_slot_is_claimed_once_and_the_task_moves_on(store):
    add(store, "a")
    assert claim(store, "a") == 1
    assert columns(store, "a", "next_run_at", "last_slot", "runs") == (NOW + 60, NOW, 1)
    assert claim(store, "a") is None
    assert [run["outcome"] for run in store.open_runs()] == ["running"]


def test_a_task_with_an_open_run_is_not_claimed_for_its_next_slot(store):
    add(store, "a")
    claim(store, "a")
    assert claim(store, "a", NOW + 60) is None
    assert columns(store, "a", "next_run_at", "runs") == (NOW + 60, 1)


def test_a_slot_that_was_started_before_is_not_due_for_ever(store):
    add(store, "a")
    finish(store, claim(store, "a"), end())
    store.execute("UPDATE task SET next_run_at = ?", (NOW,))
    assert claim(store, "a") is None
    assert columns(store, "a", "next_run_at", "runs") == (NOW + 60, 1)


def test_after_the_clock_was_set_back_the_same_slot_is_another(store):
    add(store, "a")
    finish(store, claim(store, "a"), end())
    store.execute("UPDATE task SET next_run_at = ?", (NOW,))
    assert claim(store, "a", steps=1) == 2


@pytest.mark.parametrize(
    "change",
    [
        "enabled = 0",
        "error = 'x'",
        "file = ''",
        "paused_at = 1, paused_by = 'x'",
        "next_run_at = 5",
    ],
)
def test_what_changed_since_it_was_read_is_not_started(store, change):
    add(store, "a")
    store.execute(f"UPDATE task SET {change}")
    assert claim(store, "a") is None
    assert store.open_runs() == []


def test_by_hand_a_task_that_is_disabled_is_started(store):
    add(store, "a", enabled=False)
    assert claim(store, "a") is None
    assert claim(store, "a", None, trigger="hand") == 1
    assert columns(store, "a", "next_run_at") == (NOW,)


def test_an_extra_start_is_claimed_once_and_a_slot_swallows_it(store):
    add(store, "a", NOW + 60)
    again = {"extra_at": NOW + 5, "extra_trigger": "repeat"}
    finish(store, claim(store, "a", None, trigger="hand"), end("more"), **again)
    assert columns(store, "a", "extra_at", "extra_trigger") == (NOW + 5, "repeat")
    assert claim(store, "a", None, extra_at=NOW) is None
    finish(store, claim(store, "a", None, extra_at=NOW + 5), end("more"), **again)
    finish(store, claim(store, "a", NOW + 60), end())
    assert columns(store, "a", "extra_at", "extra_trigger") == (None, None)


def test_what_could_not_be_started_is_given_back_as_it_was(store):
    add(store, "a")
    live = {"live": "x", "task": "a", "slot": NOW, "extra_at": None, "trigger": "cli"}
    claim(store, "a", live="x")
    store.give_back(live)
    assert columns(store, "a", "next_run_at", "runs", "extra_at") == (NOW, 0, None)
    assert store.history("a", 5) == []
    assert claim(store, "a") == 2


def test_a_slot_is_missed_once(store):
    add(store, "a")
    values = {"task": "a", "slot": NOW, "next_run_at": NOW + 60, "planned_at": NOW, "now": NOW + 9}
    values.update(steps=0, reason="late", trigger="cli", node="here", missed_slots=0, live="x")
    store.miss(values)
    store.miss({**values, "live": "y"})
    (run,) = store.history("a", 9)
    assert (run["outcome"], run["reason"], run["ended_at"]) == ("missed", "late", NOW + 9)
    assert columns(store, "a", "next_run_at", "runs") == (NOW + 60, 0)


# -- ends and what is counted


def test_an_end_is_written_once(store):
    add(store, "a")
    run = claim(store, "a")
    assert finish(store, run, end(message="first"))["message"] == "first"
    assert finish(store, run, end("failed", message="late")) is None
    assert store.run(run)["message"] == "first"
    assert columns(store, "a", "failures", "last_outcome") == (0, "done")


def test_what_is_counted(store):
    add(store, "a")
    for i, (outcome, seconds) in enumerate(
        [("done", 2.0), ("failed", 4.0), ("timed_out", 6.0), ("killed", 1.0), ("interrupted", None)]
    ):
        run = claim(store, "a", NOW + 60 * i)
        finish(store, run, end(outcome, seconds=seconds, volume=i))
    counted = ("runs", "ended", "failures", "consecutive_failures", "volume")
    assert columns(store, "a", *counted) == (5, 4, 2, 2, 10)
    times = ("min_seconds", "max_seconds", "total_seconds", "last_seconds", "last_outcome")
    assert columns(store, "a", *times) == (1.0, 6.0, 13.0, 1.0, "interrupted")
    finish(store, claim(store, "a", NOW + 300), end("more"))
    assert columns(store, "a", "consecutive_failures", "last_success_at") == (0, NOW)


def test_state_and_next_run_are_kept_only_if_reported(store):
    add(store, "a")
    finish(store, claim(store, "a"), state='{"n": 1}', next_run_at=NOW + 999)
    assert columns(store, "a", "state", "next_run_at") == ('{"n": 1}', NOW + 999)
    finish(store, claim(store, "a", NOW + 999), end())
    assert columns(store, "a", "state", "next_run_at") == ('{"n": 1}', NOW + 1059)


def test_the_usual_duration_is_the_90th_percentile_of_the_last_20(store):
    add(store, "a")
    assert store.usual_seconds("a") is None
    for i in range(30):
        finish(store, claim(store, "a", NOW + 60 * i), end(seconds=float(i)))
    finish(store, claim(store, "a", NOW + 1800), end("more", seconds=500.0))
    finish(store, claim(store, "a", NOW + 1860), end(seconds=601.0))
    assert store.usual_seconds("a") == 28.0


def test_due_and_the_next_slot(store):
    add(store, "due", NOW - 5)
    add(store, "later", NOW + 7)
    add(store, "off", NOW - 5, enabled=False)
    add(store, "paused", NOW - 5)
    pause(store, "paused", until=NOW + 60)
    add(store, "manual", None)
    add(store, "retry", NOW + 600)
    store.change("retry", extra_at=NOW + 3, extra_trigger="retry", not_before=NOW + 5)
    assert {row["name"] for row in store.due(NOW)} == {"due", "off", "paused"}
    assert store.next_due(NOW) == NOW + 5
    assert store.next_due(NOW + 5) == NOW + 7
    assert store.next_due(NOW + 600) is None
    assert {row["name"] for row in store.due(NOW + 60)} == {
        "due",
        "off",
        "later",
        "paused",
        "retry",
    }


def test_pause_and_resume_are_noted(store):
    add(store, "a")
    pause(store, "a", "ann", note="why")
    assert claim(store, "a") is None
    bgtasks.resume(store, "a", "bob", NOW + 1)
    assert claim(store, "a") == 1
    events = [(event["by"], event["what"]) for event in store.events("a", 9)]
    assert events == [("bob", "resumed"), ("ann", "paused; why")]


def test_a_plan_is_moved_only_if_nobody_else_did(store):
    add(store, "a")
    store.plan("a", NOW - 60, NOW - 1)
    assert columns(store, "a", "next_run_at") == (NOW,)
    store.plan("a", NOW - 60, NOW)
    assert columns(store, "a", "next_run_at") == (NOW - 60,)


def test_the_last_two_hundred_wake_ups_are_kept(store):
    values = {"ended_at": None, "trigger": "cli", "user": "u", "node": "n", "selection": ""}
    values.update({"result": "worked", "started": 0, "failed": 0})
    for i in range(210):
        number = store.write_wakeup({**values, "started_at": NOW + i})
    assert (
        store.write_wakeup({**values, "id": number, "started_at": NOW, "ended_at": NOW + 999})
        == number
    )
    assert store.rows("SELECT count(*) AS n FROM wakeup")[0]["n"] == 200
    assert store.last_seen() == NOW + 999


def test_nothing_is_open_when_a_transaction_ends(store):
    add(store, "a")
    seen = []
    store._connection.set_trace_callback(seen.append)
    finish(store, claim(store, "a"), end())
    begins = [sql for sql in seen if sql.startswith("BEGIN")]
    assert begins == ["BEGIN IMMEDIATE"] * 2
    assert not store._connection.in_transaction


def test_an_error_rolls_everything_back(store):
    with pytest.raises(ZeroDivisionError), store:
        add(store, "a")
        raise ZeroDivisionError
    assert store.task("a") is None


def test_two_threads_never_claim_the_same_slot(state, store):
    for i in range(20):
        add(store, f"t{i}")
    won = []

    def work():
        mine = Store(str(state / "bgtasks.db"))
        won.extend(f"t{i}" for i in range(20) if claim(mine, f"t{i}"))
        mine.close()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(f"t{i}" for i in range(20))


# -- against a model


class Model(stateful.RuleBasedStateMachine):
    """Whatever happens in whatever order: one open run a task, a slot once, counters that agree."""

    names = st.sampled_from(["a", "b", "c"])

    def __init__(self):
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = open_store(os.path.join(self.folder.name, "state"))
        self.open, self.slots, self.runs = {}, set(), dict.fromkeys("abc", 0)
        for name in "abc":
            add(self.store, name)

    def teardown(self):
        self.store.close()
        self.folder.cleanup()

    @stateful.rule(name=names)
    def claim(self, name):
        row = self.store.task(name)
        slot = row["next_run_at"]
        run = claim(self.store, name, slot)
        possible = name not in self.open and row["paused_at"] is None
        assert (run is not None) == possible
        if run:
            assert (name, slot) not in self.slots
            self.slots.add((name, slot))
            self.open[name] = run
            self.runs[name] += 1

    @stateful.rule(name=names, outcome=st.sampled_from(["done", "failed", "interrupted"]))
    def finish(self, name, outcome):
        run = self.open.pop(name, None)
        if run:
            assert finish(self.store, run, end(outcome))
            assert finish(self.store, run, end("failed")) is None

    @stateful.rule(name=names)
    def pause(self, name):
        pause(self.store, name)

    @stateful.rule(name=names)
    def resume(self, name):
        bgtasks.resume(self.store, name, "x", NOW)

    @stateful.invariant()
    def they_agree(self):
        assert {run["task"]: run["id"] for run in self.store.open_runs()} == self.open
        assert {row["name"]: row["runs"] for row in self.store.tasks()} == self.runs


TestModel = Model.TestCase
TestModel.settings = hypothesis_settings(max_examples=25, stateful_step_count=20)


# -- locks


def in_process(tmp_path, patch):
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(bgtasks.__file__)!r})\n"
        f"import bgtasks, fcntl, errno\n{patch}\n"
        f"store = bgtasks.open_store({str(tmp_path / 'state')!r}); store.close()\n"
        f"try: bgtasks.test_locks({str(tmp_path / 'state')!r}); print('fine')\n"
        f"except bgtasks.ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("", "fine"),
        ("fcntl.flock = lambda *_: None", "do not keep others out"),
        (
            "def no(*_): raise OSError(errno.ENOLCK, 'No locks available')\nfcntl.flock = no",
            "No locks",
        ),
    ],
    ids=["true", "lying", "none"],
)
def test_a_file_system_whose_locks_lie_is_refused(tmp_path, patch, words):
    assert words in in_process(tmp_path, patch)
