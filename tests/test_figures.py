"""The tasks for queues, thresholds, statistics and counters, on real databases."""

import gc
import importlib.util
import json
import os
import random
import signal
import sqlite3
import sys
import textwrap
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import sql_servers
from conftest import PROGRAM, FakeClock, wait_for
from sql_servers import PASSWORD

import bgtasks

pytestmark = [pytest.mark.unmeasured, pytest.mark.xdist_group("figures")]

TASKS = PROGRAM.parent / "contrib" / "tasks"
KINDS = ("sqlite", "postgresql", "mysql")


def load(name):
    found = importlib.util.spec_from_file_location(f"figures_{name}", TASKS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


queue_worker = load("queue_worker")


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
def new_base(servers, tmp_path):
    def make(kind):
        name = f"base{os.urandom(4).hex()}"
        if kind == "sqlite":
            path = tmp_path / f"{name} ?#%.db"
            sqlite3.connect(path).close()
            return Base(kind, str(path), lambda: sqlite3.connect(path, isolation_level=None))
        server = servers(kind)
        server.create(name)
        return Base(kind, server.url(name), lambda: server.connect(name, user="test"), server)

    return make


@pytest.fixture(params=KINDS)
def base(request, new_base):
    return new_base(request.param)


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

    def __init__(self, site, name):
        self.site, self.name = site, name
        site.write(f"{name}.py", (TASKS / f"{name}.py").read_text())

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


def readme(start, language="sql"):
    """Return the block of the README that begins with this line."""
    text = (TASKS / "README.md").read_text()
    blocks = text.split(f"```{language}\n")[1:]
    (found,) = [block.partition("```")[0] for block in blocks if block.lstrip().startswith(start)]
    return textwrap.dedent(found)


FILES = ["queue_worker"]


@pytest.mark.parametrize("name", FILES)
def test_the_options_in_the_file_are_the_defaults(name):
    found = bgtasks.read_raw(str(TASKS / f"{name}.py"))[0]
    defaults = sys.modules[f"figures_{name}"].Options()._asdict()
    assert found["options"] == json.loads(json.dumps(defaults))


@pytest.mark.parametrize("name", FILES)
def test_the_readme_has_each_option(name):
    text = (TASKS / "README.md").read_text().partition(f"## {name}.py")[2].partition("\n## ")[0]
    for key in sys.modules[f"figures_{name}"].Options._fields:
        assert f"| `{key}" in text or f", `{key}`" in text, key


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


def test_a_row_left_behind_by_a_crash_is_taken_again(site, waiting):
    worker = Installed(site, "queue_worker")
    waiting.take_with("echo $$ >begun; [ -e again ] || exec sleep 600; cat >>handed")
    worker.set(**{**waiting.options, "program": waiting.options["program"][0]})
    waiting.put(1)
    running = site.start("run", "queue_worker")
    pid = int(wait_for(lambda: (waiting.folder / "begun").exists() and begun(waiting), 60))
    os.killpg(os.getpgid(pid), signal.SIGKILL)
    running.wait(60)
    assert waiting.rows() == [(1, "running", 1, None)]
    assert worker.outcome() == "nothing"  # for others cannot know yet that it is dead
    ((until,),) = waiting.base.do("SELECT planned_at FROM queue")
    assert until <= waiting.now() + 60 + queue_worker.LEFT_BEHIND_SECONDS
    waiting.due()
    (waiting.folder / "again").touch()
    assert worker.outcome() == "done", worker.said
    assert waiting.rows() == [(1, "done", 2, None)]


def begun(waiting):
    return (waiting.folder / "begun").read_text().strip()


def test_a_row_that_takes_each_worker_down_is_given_up(small):
    small.put(1)
    small.base.do("UPDATE queue SET status = 'running', attempts = 6")
    with pytest.raises(queue_worker.QueueError, match="was begun 6 times, and left behind by a cr"):
        small.work()
    assert small.rows()[0][:3] == (1, "error", 6)
    assert small.handed() == []


def test_workers_never_take_the_same_row(site, waiting):
    ids = list(range(1, 21))
    waiting.put(*ids)
    waiting.take_with('echo "$QUEUE_WORKER_ID $BGTASKS_TASK" >>taken')
    site.write("queue_worker.py", (TASKS / "queue_worker.py").read_text())
    options = bgtasks_toml(waiting.options)
    site.params.write_text("node = here\n")
    names = ["first", "second", "third"]
    for name in names:
        text = f'schedule = "manual"\nscript = "queue_worker.py"\n[options]\n{options}'
        site.write(f"{name}.toml", text)
    running = [site.start("run", name) for name in names]
    assert [each.wait(120) for each in running] == [0, 0, 0], site.said.read_text()
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
    taken, content = first.take(row)
    assert content["what"] == "row 1"
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
    monkeypatch.setattr(queue_worker, "NOTING_GAPS", (0.05,) * 1200)
    away = f"{small.base.address}.away"
    small.take_with(f"mv '{small.base.address}' '{away}'")
    small.put(1)
    worker = threading.Thread(target=small.work)
    worker.start()
    said = ""
    while "tried again" not in said:
        said += capsys.readouterr().out
        time.sleep(0.02)
    os.rename(away, small.base.address)
    worker.join(60)
    assert small.rows() == [(1, "done", 1, None)]


def test_a_program_that_hangs_is_ended(small):
    small.options["program_timeout"] = 1
    small.take_with("echo slow >&2; exec sleep 600")
    small.put(1)
    small.work()
    assert small.rows() == [(1, "planned", 1, "the program did not end within 1 s: slow")]


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
    small.put(*range(8))
    small.take_with("cat >>handed; echo >>handed; sleep 0.4")
    settings = "task.queue_worker.deadline = 2\n"
    worker.set(settings, **{**small.options, "program": small.options["program"][0]})
    found = worker.run()
    assert found["outcome"] == "more", worker.said
    assert 1 <= found["volume"] == len(small.handed()) <= 6
    statuses = [row[1] for row in small.rows()]
    assert statuses.count("done") == found["volume"]
    assert statuses.count("planned") == 8 - found["volume"]


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


def test_kills_at_any_moment_lose_no_row(site, small):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    worker = Installed(site, "queue_worker")
    small.put(*range(30))
    small.take_with(
        "echo begin $QUEUE_WORKER_ID >>log; echo $$ >begun; echo end $QUEUE_WORKER_ID >>log"
    )
    small.options["max_retries"] = 50
    worker.set(**{**small.options, "program": small.options["program"][0]})
    log, killed = small.folder / "log", 0
    log.touch()
    for _ in range(5):
        wanted = log.read_text().count("\n") + chance.randrange(1, 9)
        running = site.start("run", "queue_worker", "--force")
        while running.poll() is None and log.read_text().count("\n") < wanted:
            time.sleep(0.001)
        group = group_of_the_task(site)
        if group:
            os.killpg(group, signal.SIGKILL)
            killed += 1
        running.wait(60)
        small.due()
    assert killed >= 3
    assert worker.outcome() in ("done", "nothing"), worker.said
    assert {row[1] for row in small.rows()} == {"done"}
    lines = log.read_text().splitlines()
    assert {line.split()[1] for line in lines if line.startswith("end")} == set(map(str, range(30)))
    assert sum(line.startswith("begin") for line in lines) <= 30 + killed


def group_of_the_task(site):
    for path in (site.state / "runs").glob("*.keeper"):
        for line in path.read_text().splitlines():
            note = json.loads(line) if line.endswith("}") else {}
            if "group" in note and Path(f"/proc/{note['group'][0]}").exists():
                return note["group"][0]
    return None


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_password_is_used_and_never_shown(site, new_base, kind):
    base = new_base(kind)
    base.do("CREATE TABLE queue (id INTEGER PRIMARY KEY)")
    base.script(readme(QUEUE))
    worker = Installed(site, "queue_worker")
    options = {"database": base.address.replace("//test@", "//locked@"), "program": "cat"}
    worker.set(**options, password=PASSWORD)
    assert worker.outcome() == "nothing", worker.said
    worker.set(**options, password=PASSWORD + "wrong")
    reason = worker.failure()
    assert reason.startswith("DatabaseError: options.database: ")
    assert "locked" in reason


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # PyMySQL, when it is refused
@pytest.mark.parametrize("kind", KINDS)
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


def complaint(module, options):
    with pytest.raises(ValueError) as caught:
        module.read_options(options)
    text = str(caught.value)
    assert "\n" not in text
    assert "12345678" not in text
    return text


@pytest.mark.parametrize(("key", "options"), BAD_QUEUE)
def test_a_bad_option_of_queue_worker_is_one_clear_line(key, options):
    assert complaint(queue_worker, {**GOOD_QUEUE, **options}).startswith(f"options.{key}: ")


def test_queue_worker_without_options_says_what_it_needs(site):
    worker = Installed(site, "queue_worker")
    assert worker.failure().startswith("ValueError: options.database: must be the path of an SQ")
