"""The tasks for queues, thresholds, statistics and counters, on real databases."""

import email
import email.policy
import gc
import importlib.util
import inspect
import json
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
import zoneinfo
from contextlib import ExitStack, closing
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest
import sql_servers
from conftest import PROGRAM, FakeClock, wait_for
from sql_servers import PASSWORD

import bgtasks

pytestmark = pytest.mark.unmeasured

TASKS = PROGRAM.parent / "contrib" / "tasks"
SERVERS = ["postgresql", "mysql"]
KINDS = ["sqlite", *SERVERS]


def load(name):
    found = importlib.util.spec_from_file_location(f"figures_{name}", TASKS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


queue_worker = load("queue_worker")
check_thresholds = load("check_thresholds")
simple_stats = load("simple_stats")
event_counter = load("event_counter")
test_task = load("test_task")
test_task.__test__ = False


# -- databases


class Base:
    """An empty database on one of the three."""

    def __init__(self, kind, address, connect, server=None):
        self.kind, self.address, self.connect, self.server = kind, address, connect, server

    def do(self, sql, *values):
        """Run a statement and return its rows, if it has any."""
        with closing(self.connect()) as db, closing(db.cursor()) as cursor:
            cursor.execute(sql if self.kind == "sqlite" else sql.replace("?", "%s"), values)
            return list(cursor.fetchall()) if cursor.description else []

    def script(self, text):
        for sql in filter(None, map(str.strip, text.split(";"))):
            self.do(sql)


@pytest.fixture(scope="module")
def servers():
    """Start a server when the first test asks for it."""
    with ExitStack() as stack:
        started = {}

        def server(kind):
            why = sql_servers.missing(kind)
            if why and not os.environ.get("CI"):
                pytest.skip(why)
            assert not why, why
            if kind not in started:
                started[kind] = stack.enter_context(sql_servers.running(kind))
            return started[kind]

        yield server


@pytest.fixture
def new_base(servers):
    folder = tempfile.TemporaryDirectory(prefix="sql", dir=sql_servers.MEMORY)

    def make(kind):
        name = f"base{os.urandom(4).hex()}"
        if kind == "sqlite":
            path = Path(folder.name) / f"{name} ?#%.db"
            sqlite3.connect(path).close()
            return Base(kind, str(path), lambda: sqlite3.connect(path, isolation_level=None))
        server = servers(kind)
        server.create(name)
        return Base(kind, server.url(name), lambda: server.connect(name, user="test"), server)

    with folder:
        yield make


@pytest.fixture(scope="module", params=KINDS)  # of the module, so that a server starts once
def kind(request):
    return request.param


@pytest.fixture
def base(new_base, kind):
    return new_base(kind)


@pytest.fixture
def sqlite(new_base):
    return new_base("sqlite")


# -- tasks


def context(tmp_path, options, *, clock=None, **given):
    """Return what a task is handed, with a clock that a test may move."""
    clock = clock or FakeClock()
    facts = {
        "task": "figures",
        "run": 1,
        "slot": clock.now(),
        "deadline": clock.now() + 3600,
        "last_success": None,
        "node": "here",
        "state_dir": str(tmp_path),
        "maximum": None,
        "options": options,
        "settings": {},
        "state": {},
    }
    live = tmp_path / f"live{os.urandom(4).hex()}"
    brief = SimpleNamespace(
        given={**facts, **given}, live=str(live), deadline=clock.monotonic() + 3600
    )
    return bgtasks.TaskContext(brief, clock)


class Installed:
    """One of the tasks in an installation."""

    def __init__(self, site, name, more=""):
        self.site, self.name = site, name
        site.write(f"{name}.py", (TASKS / f"{name}.py").read_text() + more)

    def set(self, settings="", **options):
        """Write the param file; a value is quoted, as an address of a database may hold a #."""
        lines = [f'task.{self.name}.options.{key} = "{value}"\n' for key, value in options.items()]
        self.site.params.write_text("".join(["node = here\n", settings, *lines]))
        self.site.params.chmod(0o600)

    def run(self):
        self.said = self.site.run("run", self.name, "--force")
        return self.site.rows("SELECT * FROM run ORDER BY id DESC LIMIT 1")[0]

    def outcome(self):
        return self.run()["outcome"]

    def failure(self):
        found = self.run()
        assert found["outcome"] == "failed", found
        assert PASSWORD not in self.said.stdout + self.said.stderr + json.dumps(found)
        return found["reason"].partition(", after progress")[0]


def program(folder, body, name="program"):
    path = folder / name
    path.write_text(f"#!/bin/sh\ncd {folder}\n{textwrap.dedent(body)}\n")
    path.chmod(0o755)
    return str(path)


def dying(folder, **steps):
    """Return code that kills its process after one of these functions, if a file of its name is
    there."""
    lines = [f"{step} = dying({step}, {str(folder / when)!r})" for when, step in steps.items()]
    return DYING + "\n".join(lines) + "\n"


DYING = """

def dying(function, path):
    def wrapped(*args):
        found = function(*args)
        if os.path.exists(path):
            os.unlink(path)
            os.kill(os.getpid(), 9)
        return found
    return wrapped

"""


def readme(start, language="sql"):
    """Return the block of the README that begins with this line."""
    text = (TASKS / "README.md").read_text()
    blocks = text.split(f"```{language}\n")[1:]
    (found,) = [block.partition("```")[0] for block in blocks if block.lstrip().startswith(start)]
    return textwrap.dedent(found)


FILES = ["queue_worker", "check_thresholds", "simple_stats", "event_counter", "test_task"]


@pytest.mark.parametrize("name", FILES)
def test_each_option_stands_with_its_default_in_the_file_and_in_the_readme(name):
    found = bgtasks.read_raw(str(TASKS / f"{name}.py"))[0]
    defaults = sys.modules[f"figures_{name}"].Options()._asdict()
    assert found["options"] == json.loads(json.dumps(defaults, default=dict))
    text = (TASKS / "README.md").read_text().partition(f"## {name}.py")[2].partition("\n## ")[0]
    for key in defaults:
        assert f"| `{key}" in text or f", `{key}`" in text, key


SHARED = {
    "queue_worker": "connect driver one_line is_database has_password is_name",
    "check_thresholds": "connect driver one_line is_database has_password",
    "event_counter": "connect driver one_line is_database has_password is_name "
    "Database main collected write chart Frame grid scale shown",
}


def test_what_stands_in_several_files_is_the_same():
    for name, functions in SHARED.items():
        for function in functions.split():
            ours, theirs = (
                inspect.getsource(getattr(sys.modules[f"figures_{file}"], function))
                for file in (name, "simple_stats")
            )
            assert ours == theirs, (name, function)


# -- queue_worker

QUEUE = "ALTER TABLE queue ADD COLUMN status"


class Waiting:
    """A queue with rows, and its worker in this process."""

    def __init__(self, base, tmp_path, **options):
        self.base, self.folder = base, tmp_path
        base.do("CREATE TABLE queue (id INTEGER PRIMARY KEY, what VARCHAR(100))")
        base.script(readme(QUEUE))
        self.options = {"database": base.address, **options}
        self.take_with(options.pop("program", "cat >>handed; echo >>handed"))

    def take_with(self, body):
        self.options["program"] = [program(self.folder, body)]

    def put(self, *ids):
        for number in ids:
            self.base.do("INSERT INTO queue (id, what) VALUES (?, ?)", number, f"row {number}")

    def work(self, **given):
        self.task = context(self.folder, self.options, **given)
        return queue_worker.run(self.task)

    def rows(self):
        return self.base.do("SELECT id, status, attempts, last_error FROM queue ORDER BY id")

    def handed(self):
        path = self.folder / "handed"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def now(self):
        return self.base.do(f"SELECT {queue_worker.NOW[self.base.kind]}")[0][0]

    def due(self):
        self.base.do("UPDATE queue SET planned_at = 0 WHERE status IN ('planned', 'running')")


@pytest.fixture
def waiting(base, tmp_path):
    return Waiting(base, tmp_path)


@pytest.fixture
def small(sqlite, tmp_path):
    return Waiting(sqlite, tmp_path)


def test_each_row_is_handed_over_once(site, waiting):
    worker = Installed(site, "queue_worker")
    worker.set(**{**waiting.options, "program": waiting.options["program"][0]})
    waiting.put(3, 1, 2)
    found = worker.run()
    assert (found["outcome"], found["volume"]) == ("done", 3), worker.said
    assert found["message"] == "3 done, 0 to be tried again"
    assert [(row["id"], row["what"], row["attempts"]) for row in waiting.handed()] == [
        (number, f"row {number}", 1) for number in (1, 2, 3)
    ]
    assert waiting.rows() == [(number, "done", 1, None) for number in (1, 2, 3)]
    assert worker.outcome() == "nothing"


def test_the_queue_of_the_readme(site, small):
    worker = Installed(site, "queue_worker")
    text = params("task.queue_worker", small.base.address)
    site.params.write_text(text.replace("/srv/app/handle_row", small.options["program"][0]))
    small.put(5)
    assert worker.outcome() == "done", worker.said
    again = re.search("`(UPDATE queue [^`]*)`", (TASKS / "README.md").read_text())[1]
    small.base.do(again)
    assert small.rows() == [(5, "planned", 0, None)]
    assert worker.outcome() == "done", worker.said
    assert [row["id"] for row in small.handed()] == [5, 5]


def test_a_row_that_fails_comes_again_after_growing_gaps(waiting):
    waiting.take_with("echo 'no room' >&2; exit 3")
    waiting.options.update(max_retries=2, retry_delay=100)
    waiting.put(1)
    for attempt, delay in ((1, 100), (2, 200)):
        before = waiting.now()
        waiting.work()
        assert waiting.task.message == "0 done, 1 to be tried again"
        error = "the program ended with 3: no room"
        assert waiting.rows() == [(1, "planned", attempt, error)]
        ((planned_at,),) = waiting.base.do("SELECT planned_at FROM queue")
        assert before + delay <= planned_at <= waiting.now() + delay
        assert waiting.work() == "nothing"
        waiting.due()
    with pytest.raises(
        queue_worker.QueueError, match="1 given up in queue; the last: 1: .* no room"
    ):
        waiting.work()
    assert waiting.rows()[0][:3] == (1, "error", 3)
    waiting.due()
    assert waiting.work() == "nothing"


def test_a_row_that_fails_stops_no_other(small):
    small.take_with("read row; case $row in *'row 1'*) exit 1; esac; echo $row >>handed")
    small.options["max_retries"] = 0
    small.put(1, 2, 3)
    with pytest.raises(queue_worker.QueueError):
        small.work()
    assert [row["id"] for row in small.handed()] == [2, 3]
    assert small.task.volume == 2


def test_a_row_that_worked_at_last_has_no_error(small):
    small.take_with("test -e ready")
    small.put(1)
    small.work()
    (small.folder / "ready").touch()
    small.due()
    small.work()
    assert small.rows() == [(1, "done", 2, None)]


def test_a_row_left_behind_by_a_crash_is_taken_again(site, small):
    worker = Installed(site, "queue_worker")
    small.take_with("echo $$ >begun; [ -e again ] || exec sleep 600; cat >>handed")
    worker.set(**{**small.options, "program": small.options["program"][0]})
    small.put(1)
    running = site.start("run", "queue_worker")
    pid = int(wait_for(lambda: (small.folder / "begun").exists() and begun(small), 60))
    os.killpg(os.getpgid(pid), signal.SIGKILL)
    running.wait(60)
    assert small.rows() == [(1, "running", 1, None)]
    assert worker.outcome() == "nothing"  # for others cannot know yet that it is dead
    ((until,),) = small.base.do("SELECT planned_at FROM queue")
    assert until <= small.now() + 60 + queue_worker.LEFT_BEHIND_SECONDS
    small.due()
    (small.folder / "again").touch()
    assert worker.outcome() == "done", worker.said
    assert small.rows() == [(1, "done", 2, None)]


def begun(small):
    return (small.folder / "begun").read_text().strip()


def test_a_row_that_takes_each_worker_down_is_given_up(small):
    small.put(1)
    small.base.do("UPDATE queue SET status = 'running', attempts = 6")
    with pytest.raises(queue_worker.QueueError, match="was begun 6 times, and left behind by a cr"):
        small.work()
    assert small.rows()[0][:3] == (1, "error", 6)
    assert small.handed() == []


def test_workers_never_take_the_same_row(site, waiting):
    ids = list(range(1, 7))
    waiting.put(*ids)
    waiting.take_with('echo "$QUEUE_WORKER_ID $BGTASKS_TASK" >>taken')
    site.write("queue_worker.py", (TASKS / "queue_worker.py").read_text())
    options = bgtasks_toml(waiting.options)
    site.params.write_text("node = here\n")
    names = ["first", "second"]
    for name in names:
        text = f'schedule = "manual"\nscript = "queue_worker.py"\n[options]\n{options}'
        site.write(f"{name}.toml", text)
    running = [site.start("run", name) for name in names]
    assert [each.wait(120) for each in running] == [0, 0], site.said.read_text()
    taken = [line.split() for line in (waiting.folder / "taken").read_text().splitlines()]
    assert sorted(int(number) for number, _ in taken) == ids
    assert {row[1:] for row in waiting.rows()} == {("done", 1, None)}


def bgtasks_toml(options):
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())


def test_of_two_who_saw_a_row_one_gets_it(waiting):
    waiting.put(1)
    options = queue_worker.read_options(waiting.options)
    first, second = queue_worker.Queue(options), queue_worker.Queue(options)
    (row,) = first.candidates()
    taken = first.take(row)
    assert first.content(taken)["what"] == "row 1"
    assert second.take(row) is None
    assert list(second.candidates()) == []
    assert first.note(taken, "done", "")
    assert not second.note(taken, "error", "too late")
    assert waiting.rows() == [(1, "done", 1, None)]


def test_who_took_too_long_changes_nothing(small, capsys):
    """Another worker has taken the row meanwhile, as it counted as left behind."""
    small.put(1)
    other = "UPDATE queue SET attempts = 2, planned_at = planned_at + 1"
    small.take_with(
        f"{sys.executable} -c \"import sqlite3; db = sqlite3.connect('{small.base.address}'); "
        f"db.execute('{other}'); db.commit()\""
    )
    assert small.work() == "nothing"
    assert "1: was changed meanwhile, and is left as it is" in capsys.readouterr().out
    assert small.rows() == [(1, "running", 2, None)]


def test_a_row_that_is_gone_is_no_problem(small):
    small.put(1)
    queue = queue_worker.Queue(queue_worker.read_options(small.options))
    (row,) = queue.candidates()
    small.base.do("DELETE FROM queue")
    assert queue.take(row) is None


def test_a_result_is_noted_though_the_database_was_away(small, monkeypatch, capsys):
    away = f"{small.base.address}.away"
    small.take_with(f"mv '{small.base.address}' '{away}'")
    small.put(1)
    slept = []

    def sleep(seconds):  # the gap is over when the database is back
        slept.append(seconds)
        if len(slept) == 2:
            os.rename(away, small.base.address)

    monkeypatch.setattr(queue_worker, "time", SimpleNamespace(sleep=sleep))
    small.work()
    assert small.rows() == [(1, "done", 1, None)]
    assert slept == [1, 5]
    assert "unable to open database file; tried again in 5 s" in capsys.readouterr().out


def test_a_program_that_hangs_is_ended(small):
    small.options.update(program_timeout=1, max_retries=50)
    small.take_with("echo slow >&2; exec sleep 600")
    small.put(1)

    def ended():  # a machine that stood still lets it begin too late to say anything
        small.due()
        small.work()
        ((_, status, _, why),) = small.rows()
        assert status == "planned"
        return why == "the program did not end within 1 s: slow"

    wait_for(ended)


@pytest.mark.parametrize("body", ["exit 0", "exec <&-; exit 0"])
def test_a_program_need_not_read(small, body):
    small.take_with(body)
    small.base.do("INSERT INTO queue (id, what) VALUES (1, ?)", "x" * 1_000_000)
    small.work()
    assert small.rows() == [(1, "done", 1, None)]


def test_a_program_that_cannot_start_is_named(small):
    (small.folder / "program").write_text("no program")
    small.put(1)
    small.work()
    assert "the program did not start: [Errno 8] Exec format error" in small.rows()[0][3]


def test_only_the_end_of_a_long_error_is_kept(small):
    small.take_with(
        "head -c 3000000 /dev/zero | tr '\\0' x >&2; printf '\\377\\0the end' >&2; exit 1"
    )
    small.put(1)
    small.work()
    error = small.rows()[0][3]
    assert error.endswith("x\ufffdthe end")
    assert len(error) < 1100


ODD = {
    "sqlite": ["x'00ff'", "NULL", "1.5", "CAST(x'ff41' AS TEXT)", "9223372036854775807"],
    "postgresql": ["'\\x00ff'::bytea", "NULL", "1.5", "DATE '2026-01-02'", "'{1,2}'::int[]"],
    "mysql": ["x'00ff'", "NULL", "1.5", "DATE '2026-01-02'", "'ü😀'"],
}
READ = {
    "sqlite": [{"base64": "AP8="}, None, 1.5, "\ufffdA", 9223372036854775807],
    "postgresql": [{"base64": "AP8="}, None, "1.5", "2026-01-02", [1, 2]],
    "mysql": [{"base64": "AP8="}, None, "1.5", "2026-01-02", "ü😀"],
}


def test_any_content_reaches_the_program_as_json(base, tmp_path):
    columns = ", ".join(f"{value} AS c{number}" for number, value in enumerate(ODD[base.kind]))
    text = "'it''s \n\t\"odd\" \\\\ $(x) ;--'"
    base.do(f"CREATE TABLE queue AS SELECT 1 AS id, {columns}, {text} AS what")
    base.script(readme(QUEUE))
    worker = context(
        tmp_path, {"database": base.address, "program": [program(tmp_path, "cat >row")]}
    )
    queue_worker.run(worker)
    found = json.loads((tmp_path / "row").read_text())
    assert [found[f"c{number}"] for number in range(5)] == READ[base.kind]
    assert found["what"].startswith('it\'s \n\t"odd" ')


def test_ids_and_names_may_be_any(base, tmp_path):
    mark = "`" if base.kind == "mysql" else '"'
    table, column = f"{mark}order{mark}", f"{mark}Key{mark}"
    base.do(f"CREATE TABLE {table} ({column} VARCHAR(50) PRIMARY KEY)")
    base.script(readme(QUEUE).replace("queue_planned", "planned").replace("queue", table))
    base.do(f"INSERT INTO {table} ({column}) VALUES (?), (?)", "-rf '; --", "a\nb%s?")
    options = {"table": "order", "id_column": "Key", "program": [program(tmp_path, "cat >>rows")]}
    queue_worker.run(context(tmp_path, {"database": base.address, **options}))
    assert base.do(f"SELECT status, attempts FROM {table}") == [("done", 1)] * 2


def test_at_the_deadline_it_stops_between_two_rows(site, small):
    worker = Installed(site, "queue_worker")
    small.put(1, 2)
    small.take_with(f"cat >>handed; echo >>handed; echo 4000 >{site.movable_clock()}")
    worker.set(**{**small.options, "program": small.options["program"][0]})
    found = worker.run()
    assert (found["outcome"], found["volume"]) == ("more", 1), worker.said
    assert [row[1] for row in small.rows()] == ["done", "planned"]


def test_a_run_keeps_to_its_maximum(small):
    small.put(1, 2, 3)
    small.work(maximum=2)
    assert [row[1] for row in small.rows()] == ["done", "done", "planned"]


def test_more_rows_than_one_look_finds(small, monkeypatch):
    monkeypatch.setattr(queue_worker, "LOOKED_AT", 2)
    small.take_with("exit 0")
    small.put(*range(5))
    small.base.do("UPDATE queue SET status = 'running', attempts = 6 WHERE id < 2")
    with pytest.raises(queue_worker.QueueError, match="2 given up"):
        small.work()
    assert [row[1] for row in small.rows()] == ["error"] * 2 + ["done"] * 3


STEPS = {
    "looked": "Queue._look",
    "taken": "Queue.take",
    "read": "Queue.content",
    "called": "call",
    "noted": "Queue.note",
}


@pytest.mark.parametrize(
    ("when", "handed"),
    [("looked", 1), ("taken", 1), ("read", 1), ("called", 2), ("noted", 1)],
)
def test_killed_between_any_two_steps_no_row_is_lost(site, small, when, handed):
    """Twice it comes only if the program had ended, and this was not yet noted."""
    worker = Installed(site, "queue_worker", dying(site.folder, **STEPS))
    small.put(1, 2)
    worker.set(**{**small.options, "program": small.options["program"][0]})
    (site.folder / when).touch()
    assert "SIGKILL" in worker.failure()
    small.due()
    assert worker.outcome() == "done", worker.said
    assert [row[:2] for row in small.rows()] == [(1, "done"), (2, "done")]
    assert [row["id"] for row in small.handed()] == [1] * handed + [2]


def test_a_row_that_no_driver_can_read_stops_no_other(new_base, tmp_path):
    waiting = Waiting(new_base("postgresql"), tmp_path, max_retries=0)
    waiting.put(1, 2)
    waiting.base.do("ALTER TABLE queue ADD COLUMN until DATE")
    waiting.base.do("UPDATE queue SET until = 'infinity' WHERE id = 1")
    with pytest.raises(queue_worker.QueueError, match="1: the row cannot be read: .*date too lar"):
        waiting.work()
    assert [row[:3] for row in waiting.rows()] == [(1, "error", 1), (2, "done", 1)]


def test_an_id_of_several_rows_is_given_up(small):
    small.put(1, 2, 3)
    small.options.update(id_column="what", max_retries=0)
    small.base.do("UPDATE queue SET what = 'same' WHERE id < 3")
    with pytest.raises(queue_worker.QueueError, match="1 given up .* same: 2 rows have this what"):
        small.work()
    assert [row[1] for row in small.rows()] == ["error", "error", "done"]
    assert [row["id"] for row in small.handed()] == [3]


def test_fewer_attempts_than_none_are_more_tries(small):
    small.put(1)
    small.base.do("UPDATE queue SET attempts = -3")
    small.take_with("exit 1")
    small.work()
    assert small.rows()[0][:3] == (1, "planned", -2)


def test_what_a_program_says_is_kept_in_the_log(small, capfd):
    small.take_with("echo printed; echo warning >&2")
    small.put(1)
    small.work()
    said = capfd.readouterr().out
    assert "printed" in said
    assert "queue 1: warning" in said
    assert small.rows() == [(1, "done", 1, None)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # PyMySQL, when it is refused
@pytest.mark.parametrize("kind", SERVERS, scope="module")
def test_a_password_is_used_and_never_shown(waiting):
    waiting.put(1)
    address = waiting.base.address.replace("//test@", "//locked@")
    waiting.options.update(database=address, password=PASSWORD + "wrong")
    with pytest.raises(queue_worker.DatabaseError, match=r"^options\.database: .*locked") as caught:
        waiting.work()
    assert PASSWORD not in str(caught.value)
    waiting.options["password"] = PASSWORD
    waiting.work()
    assert waiting.rows() == [(1, "done", 1, None)]
    del caught
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # PyMySQL, when it is refused
def test_what_the_database_says_is_one_line(small, new_base, kind):
    base = new_base(kind)
    small.options["database"] = base.address
    for wrong in (base.address, base.address.replace("base", "none")):
        small.options["database"] = wrong
        with pytest.raises(queue_worker.DatabaseError, match=r"^options\.database: .*") as caught:
            small.work()
        assert "\n" not in str(caught.value)
    if kind == "sqlite":
        assert not os.path.exists(wrong)
    del caught
    gc.collect()


@pytest.mark.parametrize(("scheme", "package"), [("postgresql", "psycopg"), ("mysql", "PyMySQL")])
def test_a_missing_driver_is_named(small, monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package.lower(), None)
    small.options["database"] = f"{scheme}://me@localhost/app"
    with pytest.raises(queue_worker.DatabaseError, match=f"pip install '{package}"):
        small.work()


GOOD_QUEUE = {"database": "/srv/app.db", "program": ["cat"]}
BAD_QUEUE = [
    ("database", {"database": ""}),
    ("database", {"database": "app.db"}),
    ("database", {"database": "oracle://me@host/app"}),
    ("database", {"database": "mysql://me@host/"}),
    ("database", {"database": "mysql://me@host:x/app"}),
    ("database", {"database": "mysql://me@host/app?local_infile=1"}),
    ("database", {"database": "mysql://me:12345678@host/app"}),
    ("database", {"database": "postgresql://me@host/app?password=12345678"}),
    ("database", {"database": "postgresql://[me/app"}),
    ("database", {"database": "/a\nb"}),
    ("password", {"password": 12345678}),
    ("table", {"table": ""}),
    ("table", {"table": "a; DROP TABLE b"}),
    ("id_column", {"id_column": 'a"b'}),
    ("program", {"program": []}),
    ("program", {"program": ["/does/not/exist"]}),
    ("program", {"program": ["cat", 3]}),
    ("program_timeout", {"program_timeout": 0}),
    ("max_retries", {"max_retries": "many"}),
    ("retry_delay", {"retry_delay": 0}),
    ("tabel", {"tabel": "x"}),
]


# -- check_thresholds

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
HOUR = 3600


def at(text, zone=BERLIN):
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def worked(start, end, *hours, holidays=(), zone=BERLIN):
    """Return the working hours between two local times."""
    options = check_thresholds.Options(hours=hours, holidays=holidays)
    first, last = at(start, zone), at(end, zone)
    return check_thresholds.Calendar(options, zone, first, last).worked(first, last) / HOUR


ALWAYS, OFFICE = "mon-sun 00:00-24:00", "mon-fri 08:00-17:00"
WORKED = [
    (9, "2026-03-02", "2026-03-03", [OFFICE]),
    (2, "2026-03-06 16:00", "2026-03-09 09:00", [OFFICE]),  # over a weekend
    (0, "2026-03-07", "2026-03-08", [OFFICE]),
    (0, "2026-03-09 09:00", "2026-03-06 16:00", [OFFICE]),
    (1.5, "2026-03-02 08:15", "2026-03-02 09:45", [OFFICE]),
    (8, "2026-03-02", "2026-03-03", ["mon 08:00-12:00", "mon 13:00-17:00"]),
    (9, "2026-03-02", "2026-03-03", [OFFICE, "mon 09:00-12:00", "mon-tue 11:00-17:00"]),
    (3, "2026-03-07", "2026-03-09", ["sat 09:00-12:00"]),
    (8, "2026-03-07", "2026-03-09", ["sat 22:00-06:00"]),  # into the next day
    (2, "2026-03-08 04:00", "2026-03-09", ["sat 22:00-06:00"]),
    (24, "2026-03-07", "2026-03-09", ["sat 00:00-00:00"]),
    (27, "2026-03-02", "2026-03-09", ["fri-mon 08:00-14:45"]),  # mon, fri, sat, sun
    (168, "2026-03-02", "2026-03-09", [ALWAYS]),
    (23, "2026-03-29", "2026-03-30", [ALWAYS]),  # the clock is set forward
    (25, "2026-10-25", "2026-10-26", [ALWAYS]),  # and back
    (7, "2026-03-28 12:00", "2026-03-29 12:00", ["sat 22:00-06:00"]),
    (9, "2026-10-24 12:00", "2026-10-25 12:00", ["sat 22:00-06:00"]),
    (2, "2026-03-29", "2026-03-30", ["sun 02:30-05:00"]),  # 02:30 is skipped
    (2, "2026-03-29", "2026-03-30", ["sun 00:00-02:30"]),
    (3.5, "2026-10-25", "2026-10-26", ["sun 00:00-02:30"]),  # 02:30 comes twice
    (3.5, "2026-10-25", "2026-10-26", ["sun 02:30-05:00"]),
]


@pytest.mark.parametrize(("hours", "start", "end", "spans"), WORKED)
def test_working_hours(hours, start, end, spans):
    assert worked(start, end, *spans) == hours


def test_holidays():
    week = ("2026-12-21", "2026-12-28", OFFICE)
    assert worked(*week) == 45
    assert worked(*week, holidays=["12-25"]) == 36
    assert worked(*week, holidays=["2026-12-24", "12-25", "2025-12-23"]) == 27
    assert worked("2028-02-28", "2028-03-02", ALWAYS, holidays=["02-29"]) == 48


def test_a_day_that_a_zone_skipped():
    zone = zoneinfo.ZoneInfo("Pacific/Apia")  # no 30 December
    assert worked("2011-12-29", "2012-01-01", ALWAYS, zone=zone) == 48
    assert worked("2011-12-29", "2012-01-01", "fri 08:00-17:00", zone=zone) == 0


@pytest.mark.parametrize("seed", range(4))
def test_working_time_is_what_a_clock_on_the_wall_shows(seed):
    chance = random.Random(seed)
    zone = zoneinfo.ZoneInfo(chance.choice(["Europe/Berlin", "America/St_Johns", "Asia/Kathmandu"]))
    hours = [
        f"{chance.choice(check_thresholds.DAYS)}-{chance.choice(check_thresholds.DAYS)} "
        f"{chance.randrange(4, 12):02}:30-{chance.randrange(12, 24):02}:00"
        for _ in range(2)
    ]
    start = at(chance.choice(["2026-03-06", "2026-10-23", "2026-10-30"]), zone)
    end = start + 5 * 24 * HOUR
    options = check_thresholds.Options(hours=hours, holidays=["10-26"])
    calendar = check_thresholds.Calendar(options, zone, start, end)
    spans = [check_thresholds.read_span(text) for text in hours]
    for step in range(0, 5 * 24 * HOUR, 15 * 60):
        local = datetime.fromtimestamp(start + step, zone)
        minute = local.hour * 60 + local.minute
        open_now = any(
            local.weekday() in span.days and span.start <= minute < span.end for span in spans
        )
        wanted = 15 * 60 if open_now and f"{local:%m-%d}" != "10-26" else 0
        assert calendar.worked(start + step, start + step + 15 * 60) == wanted, (hours, local)


class Desk:
    """A help desk with tickets, and the check in this process."""

    def __init__(self, base, tmp_path, **options):
        self.base, self.folder, self.outbox = base, tmp_path, tmp_path / "outbox"
        moment = {"sqlite": "TEXT", "postgresql": "TIMESTAMPTZ", "mysql": "DATETIME"}[base.kind]
        base.do(
            f"CREATE TABLE ticket (id INTEGER, title VARCHAR(200), started {moment}, seconds INT)"
        )
        self.options = {
            "database": base.address,
            "query": "SELECT * FROM ticket",
            "timezone": "Europe/Berlin",
            "stored_timezone": "UTC",
            "mail_to": ["desk@example.org"],
            **options,
        }

    def put(self, number, started, hours, title="printer"):
        stored = datetime.fromtimestamp(at(started), timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        stored += "+00" * (self.base.kind == "postgresql")
        values = (number, title, stored, hours * HOUR)
        self.base.do("INSERT INTO ticket VALUES (?, ?, ?, ?)", *values)

    def check(self, now, **given):
        settings = {"outbox": str(self.outbox), "timezone": ""}
        self.task = context(self.folder, self.options, settings=settings, **given)
        return check_thresholds.check(self.task, at(now))

    def escalated(self, now):
        """Return who was told of what in a check: address -> lines."""
        before = set(self.names())
        self.check(now)
        mails = [read_mail(self.outbox / name) for name in set(self.names()) - before]
        return {mail["To"]: re.findall(r"\d+ % [^\r\n]*", mail.get_content()) for mail in mails}

    def names(self):
        return sorted(os.listdir(self.outbox)) if self.outbox.exists() else []


def read_mail(path):
    return email.message_from_bytes(path.read_bytes(), policy=email.policy.default)


@pytest.fixture
def desk(base, tmp_path):
    return Desk(base, tmp_path)


@pytest.fixture
def one_desk(sqlite, tmp_path):
    return Desk(sqlite, tmp_path)


def test_each_limit_escalates_once(desk):
    desk.put(7, "2026-03-02 09:00", 8)
    assert desk.check("2026-03-02 12:59") == "nothing"
    assert desk.escalated("2026-03-02 13:00") == {"desk@example.org": ["50 % 7: printer"]}
    assert desk.task.message == "1 escalated"
    assert desk.check("2026-03-02 13:01") == "nothing"
    assert desk.escalated("2026-03-02 15:30") == {"desk@example.org": ["75 % 7: printer"]}
    assert desk.escalated("2026-03-02 17:00") == {"desk@example.org": ["100 % 7: printer"]}
    assert desk.check("2027-03-02 17:00") == "nothing"
    assert all(name.endswith(".eml") and name[0] != "." for name in desk.names())


def test_a_late_check_tells_only_the_highest_limit_of_each(one_desk):
    one_desk.put(1, "2026-03-02 09:00", 8)
    one_desk.put(2, "2026-03-02 09:00", 1)
    lines = one_desk.escalated("2026-03-02 13:00")
    assert lines == {"desk@example.org": ["100 % 2: printer", "50 % 1: printer"]}
    (name,) = one_desk.names()
    text = read_mail(one_desk.outbox / name)
    assert text["Subject"] == "100 %: 2, and 1 more"
    assert "4 h 00 min of 1 h 00 min, since 2026-03-02 09:00" in text.get_content()
    assert one_desk.check("2026-03-02 13:01") == "nothing"


def test_another_start_is_another_clock(one_desk):
    one_desk.put(1, "2026-03-02 09:00", 1)
    one_desk.check("2026-03-02 12:00")
    one_desk.base.do("UPDATE ticket SET started = '2026-03-03 09:00:00'")
    assert one_desk.check("2026-03-03 10:00") == "nothing"
    assert one_desk.escalated("2026-03-03 10:30") == {"desk@example.org": ["50 % 1: printer"]}


def test_what_left_the_query_is_forgotten_after_90_days(one_desk):
    ledger, there = one_desk.folder / "figures.escalated.db", one_desk.options["query"]
    one_desk.put(1, "2026-03-02 09:00", 1)
    one_desk.check("2026-03-02 12:00")
    one_desk.check("2026-11-30 12:00")
    for now, query, left in (
        ("2026-12-01 12:00", f"{there} WHERE id = 2", 3),
        ("2027-02-27 12:00", there, 3),  # it is back, and the same
        ("2027-05-20 12:00", f"{there} WHERE id = 2", 3),
        ("2027-06-01 12:00", f"{there} WHERE id = 2", 0),
    ):
        one_desk.options["query"] = query
        assert one_desk.check(now) == "nothing"
        with closing(sqlite3.connect(ledger)) as db:
            assert db.execute("SELECT COUNT(*) FROM escalated").fetchone() == (left,)


def test_pauses_do_not_count(one_desk):
    one_desk.options.update(pauses="SELECT * FROM pause", hours=[OFFICE])
    one_desk.base.do("CREATE TABLE pause (id, started, ended)")
    one_desk.put(1, "2026-03-02 08:00", 10)
    pauses = [
        ("2026-03-02 06:00", "2026-03-02 09:30"),  # 30 min of it after the start
        ("2026-03-02 09:00+00:00", "2026-03-02T09:30:00Z"),
        ("2026-03-02 09:00", "2026-03-02 09:30"),  # the same
        ("2026-03-02 10:00", "2026-03-02 10:00"),
        ("2026-03-02 18:00", "2026-03-02 23:00"),  # nobody works then
        (at("2026-03-03 08:30"), str(at("2026-03-03 08:45"))),
        ("2026-03-03 08:00", None),
    ]
    one_desk.base.do("UPDATE ticket SET started = '2026-03-02 09:00'")  # 10:00 in Berlin
    for pause in pauses:
        one_desk.base.do("INSERT INTO pause VALUES (1, ?, ?)", *pause)
    one_desk.check("2026-03-02 10:00")
    items = read_items(one_desk, "2026-03-03 12:00")
    # 10:00-17:00 without 10:00-10:30, and 08:00-09:00 without 08:30-08:45; since 09:00 it stands
    assert items[0].elapsed == (6.5 + 0.75) * HOUR
    assert read_items(one_desk, "2026-04-03 12:00")[0].elapsed == (6.5 + 0.75) * HOUR


def read_items(desk, now):
    options = check_thresholds.read_options(desk.options)
    items, problems = check_thresholds.read_items(options, BERLIN, at(now))
    assert problems == []
    return items


def test_seconds_in_pauses_may_be_stored_as_a_sum(one_desk):
    one_desk.options["query"] = "SELECT *, 5400.0 AS paused FROM ticket"
    one_desk.put(1, "2026-03-02 08:00", 10)
    assert read_items(one_desk, "2026-03-02 12:00")[0].elapsed == 2.5 * HOUR
    assert read_items(one_desk, "2026-03-02 09:00")[0].elapsed == 0


def test_a_moment_may_be_the_target(desk):
    day = "CAST('2026-03-06' AS DATE)" if desk.base.kind != "sqlite" else "'2026-03-06'"
    desk.options.update(query=f"SELECT id, started, {day} AS due FROM ticket", hours=[OFFICE])
    desk.options["stored_timezone"] = "Europe/Berlin"
    desk.put(1, "2026-03-04 01:00", 0)
    (item,) = read_items(desk, "2026-03-05 12:30")
    assert (item.total, item.elapsed) == (18 * HOUR, 13.5 * HOUR)


STORED = [
    (1772442000, "2026-03-02 10:00"),
    ("1772442000", "2026-03-02 10:00"),
    (1772442000.0, "2026-03-02 10:00"),
    ("2026-03-02 10:00:00", "2026-03-02 10:00"),
    ("2026-03-02T09:00:00Z", "2026-03-02 10:00"),
    ("2026-03-02 04:00:00-05:00", "2026-03-02 10:00"),
    ("2026-03-02", "2026-03-02 00:00"),
    (date(2026, 3, 2), "2026-03-02 00:00"),
    (datetime(2026, 3, 2, 9, tzinfo=timezone.utc), "2026-03-02 10:00"),
    ("2026-10-25 02:30", "2026-10-25 02:30"),
]


def test_moments_are_read_as_databases_store_them():
    for stored, wanted in STORED:
        assert check_thresholds.moment(stored, BERLIN) == at(wanted), stored


BAD_ROWS = [  # id, started, seconds
    "NULL, 0, 1",
    "1, NULL, 1",
    "1, 'soon', 1",
    "1, x'ff', 1",
    "1, 9e999, 1",
    "1, '0000-00-00 00:00:00', 1",
    "1, '0001-01-01', 1",  # what some write instead of NULL
    "1, 1772442000000, 1",  # milliseconds
    "1, -1e300, 1",
    "1, 0, NULL",
    "1, 0, 'many'",
]


def test_rows_that_cannot_be_read_stop_no_other(one_desk, capsys):
    one_desk.put(5, "2026-03-02 09:00", 1)
    rows = " UNION ALL SELECT ".join(BAD_ROWS)
    one_desk.options["query"] = f"SELECT id, started, seconds FROM ticket UNION ALL SELECT {rows}"
    with pytest.raises(check_thresholds.ItemError, match="^11 could not be handled; the last: 1: "):
        one_desk.check("2026-03-02 12:00")
    assert len(one_desk.names()) == 1
    assert one_desk.task.volume == 3
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 11
    assert "1: started 1772442000000, which is more than 100 years away" in said


def test_a_due_time_far_away_costs_no_eternity(one_desk):
    one_desk.options["query"] = """
        SELECT 1 AS id, '1930-01-01' AS started, '9999-12-31 23:59:59' AS due
        UNION ALL SELECT 2, 0, -1e300
    """
    assert one_desk.escalated("2026-03-02 12:00") == {"desk@example.org": ["100 % 2"]}


@pytest.mark.parametrize("seconds", [0, -1, -1e9])
def test_a_target_of_nothing_is_reached_when_the_clock_begins(one_desk, seconds):
    started = at("2026-03-02 12:00")
    one_desk.options["query"] = f"SELECT 1 AS id, {started} AS started, {seconds} AS seconds"
    assert one_desk.check("2026-03-02 11:59") == "nothing"
    assert one_desk.escalated("2026-03-02 12:00") == {"desk@example.org": ["100 % 1"]}
    assert one_desk.check("2026-03-09 12:00") == "nothing"


def test_a_due_time_before_any_working_hour_is_not_reached_early(one_desk):
    one_desk.options.update(hours=[OFFICE], stored_timezone="", pauses="SELECT * FROM pause")
    one_desk.base.do("CREATE TABLE pause (id, started, ended)")
    one_desk.options["query"] = (
        "SELECT 1 AS id, '2026-03-06 18:00' AS started, '2026-03-08 18:00' AS due"
    )
    assert one_desk.check("2026-03-07 17:59") == "nothing"  # a saturday
    assert one_desk.escalated("2026-03-07 18:00") == {"desk@example.org": ["50 % 1"]}
    one_desk.base.do("INSERT INTO pause VALUES (1, '2026-03-07 18:00', '2026-03-08 18:00')")
    assert one_desk.check("2026-03-08 18:00") == "nothing"
    assert one_desk.escalated("2026-03-09 18:00") == {"desk@example.org": ["100 % 1"]}


def test_two_clocks_of_one_id_are_both_told(one_desk):
    one_desk.put(1, "2026-03-02 09:00", 1)
    one_desk.put(1, "2026-03-02 09:15", 1, "again")
    lines = one_desk.escalated("2026-03-02 12:00")
    assert lines == {"desk@example.org": ["100 % 1: printer", "100 % 1: again"]}


def test_a_due_time_before_the_start_is_reached(one_desk):
    one_desk.options["query"] = "SELECT 1 AS id, '2026-03-02' AS started, '2026-03-01' AS due"
    assert one_desk.escalated("2026-03-02 12:00") == {"desk@example.org": ["100 % 1"]}


def test_who_is_told_may_stand_in_the_row(one_desk):
    one_desk.put(1, "2026-03-02 09:00", 1, "to anna")
    one_desk.put(2, "2026-03-02 09:00", 1, "to both")
    one_desk.put(3, "2026-03-02 09:00", 1, "to nobody")
    one_desk.options["query"] = """
        SELECT *, CASE id WHEN 1 THEN 'anna@example.org'
            WHEN 2 THEN 'bert@example.org; anna@example.org'
            ELSE 'no address\r\nBcc: x@y' END AS mail_to FROM ticket
    """
    assert one_desk.escalated("2026-03-02 12:00") == {
        "anna@example.org": ["100 % 1: to anna", "100 % 2: to both"],
        "bert@example.org": ["100 % 2: to both"],
        "desk@example.org": ["100 % 3: to nobody"],
    }


NO_ADDRESSES = ["ä@example.org", "-f@x", "a@[x", "#\x7f@[", "=?utf-8?q?x?=@b", "a@b@c"]


def test_what_no_mail_can_be_sent_to_is_no_address(one_desk):
    for number, odd in enumerate(NO_ADDRESSES):
        one_desk.put(number, "2026-03-02 09:00", 1, odd)
        with pytest.raises(ValueError, match="must be a list of addresses"):
            check_thresholds.read_options({**one_desk.options, "mail_to": [odd]})
    one_desk.options["query"] = "SELECT *, title AS mail_to FROM ticket"
    assert list(one_desk.escalated("2026-03-02 12:00")) == ["desk@example.org"]


def test_no_text_of_the_database_becomes_part_of_the_header(one_desk):
    title = "a\r\n.\r\nBcc: x@example.org\r\n\r\n\x00\x1b[2Jü😀" + "x" * 10_000
    one_desk.options["query"] = "SELECT title AS id, title, 0 AS started, 1 AS seconds FROM ticket"
    one_desk.put(1, "2026-03-02 09:00", 1, title)
    one_desk.check("2026-03-02 12:00")
    (name,) = one_desk.names()
    content = (one_desk.outbox / name).read_bytes()
    mail = read_mail(one_desk.outbox / name)
    assert sorted(mail.keys()) == sorted(
        ["To", "Subject", "Content-Type", "Content-Transfer-Encoding", "MIME-Version"]
    )
    assert mail["Subject"].startswith("100 %: a . Bcc: x@example.org [2Jü😀x")
    assert bgtasks.read_mail(content, 0, {"node": "here", "mail_from": ()}).recipients == (
        "desk@example.org",
    )
    assert max(map(len, content.splitlines())) < 998


def test_a_query_cannot_change_anything(new_base, tmp_path, kind):
    desk = Desk(new_base(kind), tmp_path)
    desk.put(1, "2026-03-02 09:00", 1)
    desk.options["query"] = "DELETE FROM ticket"
    with pytest.raises(check_thresholds.DatabaseError, match=r"options\.query: .*(?i:read.?only)"):
        desk.check("2026-03-02 12:00")
    assert len(desk.base.do("SELECT * FROM ticket")) == 1


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT", "options.query: incomplete input"),
        ("SELECT 1 AS id", "options.query: yields no column started, but id"),
        ("SELECT 1 AS id, 2 AS started", "options.query: yields neither a column seconds nor due"),
    ],
)
def test_a_query_that_yields_too_little_is_named(one_desk, query, said):
    one_desk.options["query"] = query
    with pytest.raises(check_thresholds.DatabaseError) as caught:
        one_desk.check("2026-03-02 12:00")
    assert str(caught.value) == said


def test_names_of_columns_may_be_written_in_capitals(one_desk):
    one_desk.options["query"] = "SELECT 1 AS ID, 0 AS Started, 1 AS SECONDS"
    assert one_desk.escalated("2026-03-02 12:00") == {"desk@example.org": ["100 % 1"]}


def test_a_query_may_hold_what_a_driver_might_take_for_a_placeholder(desk):
    desk.put(1, "2026-03-02 09:00", 1, "100 %s?")
    desk.options["query"] = "SELECT * FROM ticket WHERE title LIKE '%s?'"
    assert desk.escalated("2026-03-02 12:00") == {"desk@example.org": ["100 % 1: 100 %s?"]}


def test_a_command_is_called_for_each_limit_in_turn(one_desk):
    body = "cat >>calls; echo >>calls; ! [ -e broken ]"
    one_desk.options.update(mail_to=[], command=[program(one_desk.folder, body)])
    one_desk.put(1, "2026-03-02 09:00", 8)
    one_desk.put(2, "2026-03-02 09:00", 100)
    (one_desk.folder / "broken").touch()
    said = "^1 could not be handled; the last: 1: the command ended with 1$"
    with pytest.raises(check_thresholds.ItemError, match=said):
        one_desk.check("2026-03-02 16:00")
    (one_desk.folder / "broken").unlink()
    one_desk.check("2026-03-02 16:00")
    calls = [json.loads(line) for line in (one_desk.folder / "calls").read_text().splitlines()]
    assert [call["limit"] for call in calls] == [50, 50, 75]
    assert (calls[0]["elapsed"], calls[0]["total"]) == (7 * HOUR, 8 * HOUR)
    assert calls[0]["columns"]["title"] == "printer"
    assert one_desk.check("2026-03-02 16:00") == "nothing"


def test_a_run_calls_no_more_commands_than_its_maximum(one_desk):
    one_desk.options.update(mail_to=[], command=[program(one_desk.folder, "cat >>calls")])
    one_desk.put(1, "2026-03-02 09:00", 1)
    assert one_desk.check("2026-03-02 16:00", maximum=2) is None
    assert one_desk.task.volume == 2
    assert one_desk.check("2026-03-02 16:00") is None
    assert one_desk.task.volume == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [("exec sleep 600", "did not end within 1 s"), (None, "did not start: Exec for")],
)
def test_a_command_that_hangs_or_is_none_is_named(one_desk, body, said):
    path = program(one_desk.folder, body or "")
    if not body:
        Path(path).write_text("no program")
    one_desk.options.update(mail_to=[], command=[path], command_timeout=1, limits=[100])
    one_desk.put(1, "2026-03-02 09:00", 1)
    with pytest.raises(check_thresholds.ItemError, match=f"1: the command {said}"):
        one_desk.check("2026-03-02 16:00")


def install_desk(site, desk, more=""):
    Installed(site, "check_thresholds", more)
    site.write("desk_times.toml", desk_toml(desk))


def desk_toml(desk):
    return (
        'schedule = "manual"\nscript = "check_thresholds.py"\nsettings = ["outbox", "timezone"]\n'
        f"[options]\n{bgtasks_toml(desk.options)}"
    )


MAILED = {"hidden": "Ledger.hide_mail", "noted": "Ledger.note", "shown": "os.rename"}


@pytest.mark.parametrize("when", MAILED)
def test_however_it_is_killed_each_crossing_is_mailed_once(site, one_desk, when):
    install_desk(site, one_desk, dying(site.folder, **MAILED))
    one_desk.put(1, "2026-03-02 09:00", 1)
    (site.folder / when).touch()
    assert site.run("run", "desk_times").returncode != 0
    outbox = site.folder / "outbox"
    assert site.run("run", "desk_times", "--force").returncode == 0
    (name,) = os.listdir(outbox)
    assert not name.startswith(".")
    assert "100 % 1: printer" in read_mail(outbox / name).get_content()
    assert (site.state / "desk_times.escalated.db").exists()


@pytest.mark.parametrize(("when", "calls"), [("called", 2), ("noted", 1)])
def test_killed_before_the_note_a_command_is_called_again(site, one_desk, when, calls):
    install = dying(site.folder, called="call", noted="Ledger.note")
    body = "cat >>calls; echo >>calls"
    one_desk.options.update(mail_to=[], limits=[100], command=[program(one_desk.folder, body)])
    install_desk(site, one_desk, install)
    one_desk.put(1, "2026-03-02 09:00", 1)
    (site.folder / when).touch()
    assert site.run("run", "desk_times").returncode != 0
    for _ in range(2):
        assert site.run("run", "desk_times", "--force").returncode == 0
    assert (one_desk.folder / "calls").read_text().count("\n") == calls


def test_the_outbox_is_sent_by_bgtasks(site, one_desk):
    install_desk(site, one_desk)
    one_desk.put(1, "2026-03-02 09:00", 1)
    assert site.run("run", "desk_times").returncode == 0
    (path,) = (site.folder / "outbox").iterdir()
    sent = bgtasks.read_mail(path.read_bytes(), time.time(), {"node": "here", "mail_from": ()})
    assert (sent.sender, sent.recipients) == ("bgtasks@here", ("desk@example.org",))
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_noted_if_the_outbox_takes_no_mail(one_desk):
    one_desk.put(1, "2026-03-02 09:00", 1)
    one_desk.outbox.write_text("no folder")
    with pytest.raises(check_thresholds.OutboxError, match=f"^{one_desk.outbox}: File exists$"):
        one_desk.check("2026-03-02 12:00")
    one_desk.outbox.unlink()
    assert one_desk.escalated("2026-03-02 12:00") == {"desk@example.org": ["100 % 1: printer"]}


def test_a_full_disk_leaves_nothing_half(one_desk):
    one_desk.check("2026-03-02 09:00")  # makes the memory
    one_desk.put(1, "2026-03-02 09:00", 1, "x" * 200)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(check_thresholds.OutboxError, match="File too large"):
            one_desk.check("2026-03-02 12:00")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert one_desk.names() == []
    one_desk.check("2026-03-02 12:00")
    assert len(one_desk.names()) == 1


def test_a_memory_that_cannot_be_used_is_named(one_desk):
    ledger = one_desk.folder / "figures.escalated.db"
    ledger.write_text("no database" * 100)
    one_desk.put(1, "2026-03-02 09:00", 1)
    said = f"^{ledger}: file is not a database; remove it, and all is escalated anew$"
    with pytest.raises(check_thresholds.DatabaseError, match=said):
        one_desk.check("2026-03-02 12:00")
    assert one_desk.names() == []
    ledger.unlink()
    one_desk.check("2026-03-02 12:00")


def test_a_toml_without_settings_says_what_it_needs(site, one_desk):
    install_desk(site, one_desk)
    path = site.tasks / "desk_times.toml"
    path.write_text(re.sub("settings = .*", "", path.read_text()))
    site.run("run", "desk_times")
    assert 'must be ["outbox", "timezone"]' in site.last("desk_times")["reason"]


def test_the_desk_of_the_readme(site, tmp_path, sqlite):
    sqlite.do("CREATE TABLE ticket (id INTEGER, title, created, owner, solved)")
    sqlite.do("CREATE TABLE pending (ticket, begun, ended)")
    ago = datetime.now(timezone.utc) - timedelta(days=21)
    new = datetime.now(timezone.utc) + timedelta(seconds=5)
    for number, created, owner, solved in (
        (1, ago, None, None),
        (2, ago, "anna", None),
        (3, ago, None, "2026-01-01"),
        (4, new, None, None),
        (5, ago, "anna", None),
    ):
        values = (number, f"title {number}", created.isoformat(), owner, solved)
        sqlite.do("INSERT INTO ticket VALUES (?, ?, ?, ?, ?)", *values)
    sqlite.do("INSERT INTO pending VALUES (5, ?, NULL)", ago.isoformat())
    site.write("check_thresholds.py", (TASKS / "check_thresholds.py").read_text())
    text = readme("schedule", "toml").replace("/srv/desk/desk.db", sqlite.address)
    site.write("desk_times.toml", text)
    done = site.run("run", "desk_times")
    assert done.returncode == 0, done.stderr
    (path,) = (site.folder / "outbox").iterdir()
    lines = re.findall(r"\d+ % [^\r\n]*", read_mail(path).get_content())
    assert sorted(lines) == [
        "100 % TTO of ticket 1: title 1",
        "100 % TTO of ticket 3: title 3",
        "100 % TTR of ticket 1: title 1",
        "100 % TTR of ticket 2: title 2",
    ]


GOOD_DESK = {"database": "/srv/app.db", "query": "SELECT 1", "mail_to": ["me@example.org"]}
BAD_DESK = [
    ("database", {"database": ""}),
    ("database", {"database": "mysql://me:12345678@host/app"}),
    ("query", {"query": " "}),
    ("query", {"query": "a\0b"}),
    ("limits", {"limits": []}),
    ("limits", {"limits": [0]}),
    ("limits", {"limits": ["half"]}),
    ("limits", {"limits": [True]}),
    ("limits", {"limits": 50}),
    *(
        ("hours", {"hours": [hours]})
        for hours in ("", "08:00-17:00", "mon 8-17", "mon 08:00-24:30", "mon 24:00-08:00", "mon-")
    ),
    ("hours", {"hours": []}),
    ("hours", {"hours": [OFFICE, "mon,tue 08:00-17:00"]}),
    *(("holidays", {"holidays": [day]}) for day in ("", "25.12.", "12-32", "2026-02-29", "02-30")),
    ("timezone", {"timezone": "Europe/Berlni"}),
    ("stored_timezone", {"stored_timezone": "UCT+1"}),
    ("mail_to", {"mail_to": []}),
    ("mail_to", {"mail_to": ["me"]}),
    ("mail_to", {"mail_to": ["a@b\r\nBcc: c@d"]}),
    ("command", {"command": ["cat"]}),
    ("command", {"mail_to": [], "command": ["/does/not/exist"]}),
    ("command_timeout", {"command_timeout": 0}),
    ("limit", {"limit": [50]}),
]


def test_options_of_check_thresholds_may_come_as_text():
    given = {"limits": "80, 100", "hours": f"{OFFICE}, sat 09:00-12:00", "command_timeout": "5"}
    options = check_thresholds.read_options({**GOOD_DESK, **given})
    assert options.limits == (80, 100)
    assert options.hours == (OFFICE, "sat 09:00-12:00")
    assert options.command_timeout == 5


# -- simple_stats


class Figures:
    """A database with figures, and what samples them in this process."""

    def __init__(self, base, tmp_path, module, **options):
        self.base, self.folder, self.module = base, tmp_path, module
        self.options = {"database": base.address, **options}
        self.state = {}

    def take(self, now=1_772_442_000, **given):
        self.task = context(self.folder, self.options, state=self.state, **given)
        try:
            return getattr(self.module, "sample" if self.module is simple_stats else "collect")(
                self.task, now
            )
        finally:
            self.state = self.task.state

    def series(self):
        return self.base.do("SELECT name, taken_at, value FROM statistic ORDER BY taken_at, name")


@pytest.fixture
def stats(base, tmp_path):
    base.do("CREATE TABLE users (status VARCHAR(20), points INTEGER)")
    for row in (("open", 1), ("open", 2), ("Open", 5), ("ü %s?", None)):
        base.do("INSERT INTO users VALUES (?, ?)", *row)
    return Figures(base, tmp_path, simple_stats, queries={"users": "SELECT COUNT(*) FROM users"})


@pytest.fixture
def few_stats(sqlite, tmp_path):
    return Figures(sqlite, tmp_path, simple_stats, queries={"one": "SELECT 1"})


def test_figures_become_a_time_series(stats):
    stats.take(1000)
    stats.base.do("DELETE FROM users WHERE points = 5")
    stats.take(2000)
    assert stats.series() == [("users", 1000, 4.0), ("users", 2000, 3.0)]
    stats.take(2000)  # once more in this second
    assert len(stats.series()) == 2
    assert (stats.task.volume, stats.task.message) == (1, "1 figures")


def test_a_query_may_yield_labels_and_numbers(stats):
    group = "BINARY status" if stats.base.kind == "mysql" else "status"
    stats.options["queries"] = {
        "of": f"SELECT {group}, SUM(points) / 2.0 FROM users WHERE 1 = 1 GROUP BY {group}"
    }
    stats.take()
    found = [(name, float(value)) for name, _, value in stats.series()]
    assert sorted(found) == [("of.Open", 2.5), ("of.open", 1.5)]  # SUM of nothing is NULL


def test_figures_may_be_kept_elsewhere(stats, tmp_path):
    stats.options["store"] = str(tmp_path / "new store.db")
    stats.take()
    with closing(sqlite3.connect(stats.options["store"])) as db:
        assert db.execute("SELECT name, value FROM statistic").fetchall() == [("users", 4.0)]
    with pytest.raises(Exception, match="statistic"):
        stats.series()


def test_a_store_in_no_folder_is_named(few_stats):
    few_stats.options["store"] = "/does/not/exist.db"
    said = "^options.store: /does/not/exist.db: No such file or directory$"
    with pytest.raises(simple_stats.DatabaseError, match=said):
        few_stats.take()


BAD_QUERIES = {
    "broken": "SELEC 1",
    "three": "SELECT 1, 2, 3",
    "two": "SELECT 1 UNION ALL SELECT 2",
    "text": "SELECT 'many'",
    "none": "CREATE TABLE made (id INTEGER)",
    "gone": "DELETE FROM users",
    "missing": "SELECT COUNT(*) FROM nowhere",
}


def test_a_query_that_fails_stops_no_other_and_changes_nothing(stats):
    stats.options["queries"] = {**BAD_QUERIES, "zero": "SELECT 0", "null": "SELECT NULL"}
    with pytest.raises(
        simple_stats.QueryError, match=r"^7 of 9 failed; options\.queries\.two: mus"
    ):
        stats.take()
    assert [(name, value) for name, _, value in stats.series()] == [("zero", 0.0)]
    assert stats.base.do("SELECT COUNT(*) FROM users") == [(4,)]
    assert stats.state["asked"] == []


def test_too_many_rows_are_no_figure(few_stats):
    sql = (
        "WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000000) SELECT i, i FROM n"
    )
    few_stats.options["queries"] = {"many": sql, "one": "SELECT 1"}
    with pytest.raises(simple_stats.QueryError, match="1 of 2 .* yields more than 1000 rows"):
        few_stats.take()
    assert [name for name, _, _ in few_stats.series()] == ["one"]


def test_after_a_deadline_it_goes_on_with_the_next_query(few_stats):
    few_stats.options["queries"] = dict.fromkeys("abcde", "SELECT 1")
    few_stats.take(1, maximum=2)
    few_stats.take(2, maximum=2)
    assert few_stats.state == {"asked": ["a", "b", "c", "d"]}
    few_stats.options["queries"].pop("b")
    few_stats.take(3, maximum=2)
    few_stats.take(4, maximum=2)
    assert [name for name, _, _ in few_stats.series()] == list("abcdeac")


def test_an_earlier_figure_is_kept_if_a_later_one_kills_it(site, sqlite):
    stats = Installed(site, "simple_stats")
    path = site.tasks / "simple_stats.py"
    path.write_text(path.read_text().replace("            asked.append(name)", KILL_AFTER_ONE))
    options = {"queries.a": "SELECT 1", "queries.b": "SELECT 2", "store": site.folder / "s.db"}
    stats.set(database=sqlite.address, **options)
    assert "SIGKILL" in stats.failure()
    with closing(sqlite3.connect(site.folder / "s.db")) as db:
        assert db.execute("SELECT name, value FROM statistic").fetchall() == [("a", 1.0)]


KILL_AFTER_ONE = "            os.kill(os.getpid(), 9)"


def test_the_stats_of_the_readme(site, sqlite, tmp_path):
    sqlite.do("CREATE TABLE users (id INTEGER)")
    sqlite.do("CREATE TABLE orders AS SELECT 'open' AS status UNION ALL SELECT 'paid'")
    Installed(site, "simple_stats")
    text = params("task.simple_stats", sqlite.address)
    site.params.write_text(text.replace("/srv/app/statistic.db", str(tmp_path / "statistic.db")))
    assert site.run("run", "simple_stats").returncode == 0
    assert site.last("simple_stats")["volume"] == 3
    command = readme("python3 tasks.d/simple_stats.py", "sh")
    done = shell(site, command.replace("/srv/app", str(tmp_path)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert texts(site.folder / "chart.svg")[-1] == "users: 0 (from 0 to 0)"


def params(start, address):
    """Return the lines of a param file in the README that set a task."""
    text = (TASKS / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return "\n".join(lines).replace("/srv/app/app.db", f'"{address}"') + "\n"


def shell(site, command):
    return subprocess.run(
        command.replace("python3", sys.executable),
        shell=True,
        cwd=site.folder,
        capture_output=True,
        text=True,
        check=False,
    )


# -- charts

SVG = "{http://www.w3.org/2000/svg}"


def texts(path):
    return [each.text for each in ET.parse(path).getroot().iter(f"{SVG}text")]


def chart(module, series, since=0.0, until=7 * 86400.0):
    return ET.fromstring(module.chart(series, since, until))


def test_a_line_goes_through_its_points():
    root = chart(simple_stats, {"a": [(0.0, 0.0), (302400.0, 50.0), (604800.0, 100.0)]})
    (line,) = root.iter(f"{SVG}polyline")
    assert line.get("points") == "80.0,360.0 510.0,190.0 940.0,20.0"
    numbers = [each.text for each in root.iter(f"{SVG}text") if each.get("text-anchor") == "end"]
    assert numbers[:6] == ["0", "20", "40", "60", "80", "100"]


def test_bars_stand_on_zero_and_add_up_what_shares_their_place():
    root = chart(event_counter, {"a": [(302400.0, 30.0), (302401.0, 20.0), (604800.0, 100.0)]})
    path = next(each for each in root.iter(f"{SVG}path") if each.get("stroke-width") == "3")
    assert path.get("d") == "M510.0 360.0V190.0M940.0 360.0V20.0"
    assert "a: 150 in all, at most 100 at a time" in [each.text for each in root.iter(f"{SVG}text")]


SERIES = [
    {},
    {"one": [(1.0, 5.0)]},
    {"flat": [(1.0, 0.0), (2.0, 0.0)]},
    {"below": [(1.0, -5e12), (2.0, 1e-9)]},
    {"tiny": [(1.0, 1e-300)]},
    {"huge": [(1.0, 1e300), (2.0, -1e300)]},
    {f"<&\"'\x00\x1b{number}": [(1.0, number)] for number in range(30)},
    {"many": [(number / 10, number % 77) for number in range(100_000)]},
]


@pytest.mark.parametrize("module", [simple_stats, event_counter], ids=["lines", "bars"])
def test_any_figures_make_a_chart(module):
    for series in SERIES:
        text = module.chart(series, 0.0, 10_000.0)
        assert len(text) < 100_000
        root = ET.fromstring(text)
        drawn = [each for each in root.iter() if each.get("stroke-width")]
        assert len(drawn) == len(series)
        assert not re.search("nan|inf", text.replace("infinite", ""))


def test_the_words_below_a_chart_know_each_point():
    points = [(number / 10, number % 77) for number in range(100_000)]
    line, bars = (
        module.chart({"many": points}, 0.0, 10_000.0) for module in (simple_stats, event_counter)
    )
    assert "many: 53 (from 0 to 76)" in line
    assert "at most 76 at a time" in bars


def test_a_chart_replaces_the_old_one_whole(few_stats, capsys):
    few_stats.take(int(time.time()))
    path = few_stats.folder / "chart.svg"
    arguments = ["--plot", str(path), few_stats.base.address]
    assert simple_stats.main(arguments) == 0
    before = path.read_text()
    assert texts(path)[-1] == "one: 1 (from 1 to 1)"
    assert simple_stats.main([*arguments, "nobody"]) == 1
    assert "has no figure 'nobody' of that time" in capsys.readouterr().err
    assert path.read_text() == before
    for wrong in (
        *(["--table", "a b"], ["--table", "other"]),
        *(["--days", days] for days in ("0", "nan", "inf", "1e300")),
    ):
        assert simple_stats.main([*arguments, *wrong]) == 1
    os.mkfifo(few_stats.folder / "pipe")  # as /dev/stdout may be one
    assert simple_stats.main(["--plot", str(few_stats.folder / "pipe"), arguments[2]]) == 1
    assert (few_stats.folder / "pipe").is_fifo()
    (few_stats.folder / "link.svg").symlink_to("chart.svg")
    assert simple_stats.main(["--plot", str(few_stats.folder / "link.svg"), arguments[2]]) == 0
    assert (few_stats.folder / "link.svg").is_symlink()
    assert simple_stats.main(["--plot", str(few_stats.folder / "no" / "chart.svg"), arguments[2]])
    assert simple_stats.main(["--plot", "/dev/full/x", "oracle://x"]) == 1
    assert simple_stats.main(["--plot", str(path), "/does/not/exist.db"]) == 1
    assert all(line.count("\n") == 0 for line in capsys.readouterr().err.splitlines())
    assert not os.path.exists("/does")
    assert os.listdir(few_stats.folder).count("chart.svg") == 1
    assert not list(few_stats.folder.glob("*.new"))


@pytest.mark.parametrize("kind", SERVERS, scope="module")
def test_a_chart_from_a_server_with_a_password(new_base, tmp_path, monkeypatch, kind):
    base = new_base(kind)
    stats = Figures(base, tmp_path, simple_stats, queries={"one": "SELECT 1"})
    stats.take(int(time.time()))
    address = base.address.replace("//test@", "//locked@")
    monkeypatch.setenv("DATABASE_PASSWORD", PASSWORD)
    assert simple_stats.main(["--plot", str(tmp_path / "chart.svg"), address]) == 0
    assert texts(tmp_path / "chart.svg")[-1] == "one: 1 (from 1 to 1)"


# -- event_counter


@pytest.fixture
def counter(base, tmp_path):
    made = readme("CREATE TABLE event_counter")
    base.script(made)
    return Figures(base, tmp_path, event_counter)


def test_counters_are_read_and_reset(counter):
    counter.base.do("INSERT INTO event_counter VALUES ('idle', 0), ('Logout', 7)")
    counter.take(1000)
    assert counter.task.message == "8 events in 3 counters"
    counter.base.do("UPDATE event_counter SET value = value + 3 WHERE name = 'idle'")
    counter.take(2000)
    counter.base.do("UPDATE event_counter SET value = value + 4 WHERE name = 'idle'")
    counter.take(2000)  # once more in this second
    found = sorted(counter.series(), key=lambda row: (row[1], row[0]))
    assert found == [
        ("Logout", 1000, 7.0),
        ("idle", 1000, 0.0),
        ("login", 1000, 1.0),
        ("Logout", 2000, 0.0),
        ("idle", 2000, 7.0),
        ("login", 2000, 0.0),
    ]
    assert {value for (value,) in counter.base.do("SELECT value FROM event_counter")} == {0}


def test_rows_of_one_name_are_added_up(base, tmp_path):
    base.do("CREATE TABLE eventcounter (counter_name VARCHAR(80), counter_value INT, node INT)")
    rows = [("a", 1, 1), ("a", 2, 2), ("b", 4, 1), ("c", None, 1)]
    for row in rows:
        base.do("INSERT INTO eventcounter VALUES (?, ?, ?)", *row)
    columns = {"name_column": "counter_name", "value_column": "counter_value"}
    counter = Figures(base, tmp_path, event_counter, counters="eventcounter", **columns)
    counter.take(1000, maximum=None)
    assert counter.series() == [("a", 1000, 3.0), ("b", 1000, 4.0), ("c", 1000, 0.0)]


def test_only_the_named_counters_are_read(counter):
    counter.base.do("INSERT INTO event_counter VALUES ('other', 9)")
    counter.options["names"] = ["login"]
    counter.take(1000)
    assert counter.series() == [("login", 1000, 1.0)]
    other = "SELECT value FROM event_counter WHERE name = 'other'"
    assert counter.base.do(other) == [(9,)]
    counter.options["names"] = ["nobody", "other"]
    with pytest.raises(event_counter.CounterError, match="has no counter 'nobody'"):
        counter.take(2000)
    assert counter.series()[-1] == ("other", 2000, 9.0)  # it stops no other
    assert counter.base.do(other) == [(0,)]


@pytest.mark.parametrize("kind", SERVERS, scope="module")
def test_who_counts_waits_behind_a_long_transaction_for_a_while_only(counter, monkeypatch):
    monkeypatch.setattr(event_counter, "LOCK_SECONDS", 1)
    with closing(counter.base.connect()) as db, closing(db.cursor()) as cursor:
        cursor.execute("BEGIN")
        cursor.execute("UPDATE event_counter SET value = value + 1 WHERE name = 'login'")
        with pytest.raises(event_counter.DatabaseError, match="(?i)timeout"):
            counter.take(1000)
        counter.base.do("INSERT INTO event_counter VALUES ('other', 9)")
        cursor.execute("COMMIT")
    counter.take(2000)
    assert counter.series() == [("login", 2000, 2.0), ("other", 2000, 9.0)]


def test_no_counters_are_nothing(counter):
    counter.base.do("DELETE FROM event_counter")
    assert counter.take() == "nothing"


def test_no_event_is_lost_or_counted_twice(counter):
    """Others count in processes of their own while it reads, and new counters appear."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import sql_servers, sqlite3
from pathlib import Path
folder, name, me = sys.argv[1:]
kinds = {{"mysql": sql_servers.MariaDB, "postgresql": sql_servers.PostgreSQL}}
server = kinds[{counter.base.kind!r}](Path(folder)) if folder else None
connect = server.connect if folder else lambda name, user: sqlite3.connect(name, timeout=60)
db = connect(name, user="test")
db.isolation_level = None
cursor = db.cursor()
for number in range(60):
    try:
        cursor.execute("UPDATE event_counter SET value = value + 1 WHERE name = 'login'")
        if number % 4 == 0:
            sql = f"INSERT INTO event_counter VALUES ('new {{me}} {{number}}', 1)"
            cursor.execute(sql)
    except Exception as error:
        if "eadlock" not in str(error):
            raise
        print("lost")
"""
    server = counter.base.server
    place = ["", counter.base.address]
    if server:
        ((name,),) = counter.base.do(
            "SELECT current_schema()" if counter.base.kind == "postgresql" else "SELECT DATABASE()"
        )
        place = [str(server.folder), name]
    others = [
        subprocess.Popen([sys.executable, "-c", code, *place, str(me)], stdout=subprocess.PIPE)
        for me in range(2)
    ]
    now = 1000
    while any(other.poll() is None for other in others):
        now += 1
        counter.take(now)
    said = [other.communicate()[0] for other in others]
    assert [other.returncode for other in others] == [0, 0]
    counter.take(now + 1)
    assert b"lost" not in b"".join(said)
    assert sum(value for _, _, value in counter.series()) == 1 + 2 * (60 + 15)


def test_killed_in_the_middle_nothing_has_changed(site, counter):
    installed = Installed(site, "event_counter")
    path = site.tasks / "event_counter.py"
    path.write_text(path.read_text() + "\n\ndef keep(*_):\n    os.kill(os.getpid(), 9)\n")
    installed.set(database=counter.base.address)
    assert "SIGKILL" in installed.failure()
    # the server may take a moment to see that its client is dead
    wait_for(lambda: counter.base.do("SELECT value FROM event_counter") == [(1,)], 60)
    assert counter.series() == []
    counter.take(1000)
    assert counter.series() == [("login", 1000, 1.0)]


def test_a_counter_that_holds_no_number_changes_nothing(sqlite, tmp_path):
    sqlite.do("CREATE TABLE event_counter (name, value)")
    sqlite.do("INSERT INTO event_counter VALUES ('a', 5), ('b', 'many')")
    counter = Figures(sqlite, tmp_path, event_counter)
    with pytest.raises(event_counter.DatabaseError, match="event_counter b: must hold a number"):
        counter.take()
    assert sqlite.do("SELECT value FROM event_counter") == [(5,), ("many",)]
    assert counter.series() == []


def test_tables_without_transactions_are_refused(new_base, tmp_path):
    base = new_base("mysql")
    base.script(readme("CREATE TABLE event_counter"))
    counter = Figures(base, tmp_path, event_counter)
    counter.take(1000)
    base.do("UPDATE event_counter SET value = 5")
    for table in ("event_counter", "statistic"):
        base.do(f"ALTER TABLE {table} ENGINE=MyISAM")
        with pytest.raises(event_counter.DatabaseError, match=f"ALTER TABLE {table} ENGINE=InnoDB"):
            counter.take(2000)
        base.do(f"ALTER TABLE {table} ENGINE=InnoDB")
    assert base.do("SELECT value FROM event_counter") == [(5,)]


def test_the_counter_of_the_readme(site, sqlite):
    sqlite.script(readme("CREATE TABLE event_counter"))
    Installed(site, "event_counter")
    site.params.write_text(params("task.event_counter", sqlite.address))
    assert site.run("run", "event_counter").returncode == 0
    command = readme("python3 tasks.d/event_counter.py", "sh")
    done = shell(site, command.replace("/srv/app/app.db", f"'{sqlite.address}'"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert texts(site.folder / "events.svg")[-1] == "login: 1 in all, at most 1 at a time"


GOOD_STATS = {"database": "/srv/app.db", "queries": {"a": "SELECT 1"}}
BAD_STATS = [
    ("database", {"database": "app.db"}),
    ("database", {"database": "mysql://me:12345678@host/app"}),
    ("store", {"store": "s.db"}),
    ("store", {"store": "mysql://me:12345678@host/app"}),
    ("store_password", {"store_password": 12345678}),
    ("table", {"table": "a b"}),
    ("queries", {"queries": {}}),
    ("queries", {"queries": "SELECT 1"}),
    ("queries", {"queries": {"a b": "SELECT 1"}}),
    ("queries.a", {"queries": {"a": 1}}),
    ("queries.b", {"queries.b": 1}),
    ("query", {"query": "SELECT 1"}),
]
GOOD_COUNTER = {"database": "/srv/app.db"}
BAD_COUNTER = [
    ("database", {"database": ""}),
    ("database", {"database": "postgresql://me:12345678@host/app"}),
    ("counters", {"counters": "a;b"}),
    ("name_column", {"name_column": ""}),
    ("value_column", {"value_column": "a b"}),
    ("names", {"names": [""]}),
    ("names", {"names": ["x" * 101]}),
    ("names", {"names": [1]}),
    ("table", {"table": "event_counter"}),
    ("tables", {"tables": "x"}),
]


# -- test_task


class Tried(Installed):
    def __init__(self, site, settings="", **options):
        super().__init__(site, "test_task")
        self.set(settings, **{"seconds": 0, **options})


def test_outcomes_come_in_turn(site):
    tried = Tried(site, outcomes="nothing, failed, crash, exit")
    wanted = ["nothing", "failed", "failed", "failed", "nothing"]
    assert [tried.outcome() for _ in wanted] == wanted
    reasons = [row["reason"] for row in site.rows("SELECT reason FROM run ORDER BY id")]
    assert reasons[1].startswith("TestError: as options.outcomes wants it")
    assert "SIGKILL" in reasons[2]
    assert "os._exit" in reasons[3]


def test_a_test_task_stops_at_its_deadline(site):
    tried = Tried(site, "task.test_task.deadline = 1\n", seconds=60, steps=600)
    found = tried.run()
    assert found["outcome"] == "more"
    assert found["volume"] < 600


def test_one_that_hangs_is_ended_at_its_timeout(site):
    settings = "task.test_task.deadline = 1\ntask.test_task.timeout = 2\n"
    assert Tried(site, settings, outcomes="hang").outcome() == "timed_out"


def test_a_test_task_works_as_it_is(site):
    tried = Installed(site, "test_task")
    tried.set(seconds=1)
    found = tried.run()
    assert (found["outcome"], found["volume"], found["message"]) == ("done", 5, "5 steps")


def test_the_test_task_of_the_readme(site):
    Installed(site, "test_task")
    text = params("task.test_task", "").replace("seconds = 2", "seconds = 0")
    site.params.write_text(text)
    assert site.wake().returncode == 0
    assert site.last("test_task")["outcome"] == "failed"


BAD_TEST = [
    ("seconds", {"seconds": -1}),
    ("seconds", {"seconds": "long"}),
    ("steps", {"steps": 0}),
    ("outcomes", {"outcomes": []}),
    ("outcomes", {"outcomes": "well"}),
    ("outcomes", {"outcomes": [1]}),
    ("outcome", {"outcome": "done"}),
]


# -- bad options

BAD = {
    "queue_worker": (GOOD_QUEUE, BAD_QUEUE),
    "check_thresholds": (GOOD_DESK, BAD_DESK),
    "simple_stats": (GOOD_STATS, BAD_STATS),
    "event_counter": (GOOD_COUNTER, BAD_COUNTER),
    "test_task": ({}, BAD_TEST),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_one_clear_line(name):
    module, (good, bad) = sys.modules[f"figures_{name}"], BAD[name]
    module.read_options(good)
    for key, options in bad:
        with pytest.raises(ValueError, match=rf"^options\.{key}: [^\n]*$") as caught:
            module.read_options({**good, **options})
        assert "12345678" not in str(caught.value)


@pytest.mark.parametrize("name", FILES[:-1])
def test_without_options_it_says_what_it_needs(site, name):
    found = Installed(site, name).failure()
    assert found.startswith("ValueError: options.database: must be the path of an SQLite file")
