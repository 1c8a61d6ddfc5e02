"""purge_rows of contrib/tasks, on SQLite and on real servers."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from chores import (
    Chore,
    context,
    defaults_in,
    defaults_of,
    example,
    load,
    needs,
    needs_module,
    place,
    refused,
)
from conftest import wait_for
from imap_server import free_ports

pytestmark = [pytest.mark.unmeasured, pytest.mark.xdist_group("databases")]  # started once
purge_rows = load("purge_rows")
DAY = 86400
READY = re.compile("ready (to accept|for) connections")
ODD = "we\"ird `na'me; DROP TABLE x --"


def moment(days):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() - days * DAY))


@pytest.fixture(params=["sqlite", "postgresql", "mysql"])
def table(request, here):
    """A table of each database, and the options that reach it."""
    return here(request.param, request.getfixturevalue(request.param))


@pytest.fixture
def here():
    with ExitStack() as opened:
        yield lambda kind, options: opened.enter_context(closing(Here(kind, options)))


class Here:
    """A database of a test, through its own driver."""

    def __init__(self, kind, options):
        self.kind = kind
        self.quote = '"' if kind == "postgresql" else "`"
        self.mark = "?" if kind == "sqlite" else "%s"
        self.options = {"kind": kind, "column": "made_at", "older_than": "30 d", **options}
        self.connection = self.connect()

    def connect(self):
        if self.kind == "sqlite":
            return sqlite3.connect(self.options["database"], isolation_level=None)
        given = {key: self.options[key] for key in ("host", "port", "user", "password")}
        if self.kind == "postgresql":
            return needs_module("psycopg").connect(
                dbname=self.options["database"], autocommit=True, **given
            )
        socket = {"unix_socket": given.pop("host"), "database": self.options["database"]}
        return needs_module("pymysql").connect(autocommit=True, **given, **socket)

    def close(self):
        self.connection.close()

    def sql(self, text, *values):
        cursor = self.connection.cursor()
        cursor.execute(text, values)
        return cursor.fetchall() if cursor.description else []

    def make(self, name="log", kind="timestamp", key="id integer PRIMARY KEY", more=""):
        """Make a table; what was in it is gone."""
        name = self.name(name)
        if self.kind == "mysql":
            kind = {"timestamp": "datetime"}.get(kind, kind)
        self.sql(f"DROP TABLE IF EXISTS {name}")
        self.sql(f"CREATE TABLE {name} ({key}, made_at {kind} NULL, status varchar(20)){more}")
        return self

    def name(self, name):
        return self.quote + name.replace(self.quote, self.quote * 2) + self.quote

    def put(self, *moments, name="log", status="done", first=1):
        for number, made_at in enumerate(moments, start=first):
            values = f"VALUES ({self.mark}, {self.mark}, {self.mark})"
            self.sql(f"INSERT INTO {self.name(name)} {values}", number, made_at, status)

    def left(self, name="log"):
        return [row[0] for row in self.sql(f"SELECT id FROM {self.name(name)} ORDER BY id")]

    def purge(self, seconds=600, maximum=None, table="log", **options):
        """Run the task here; return its result and the context."""
        options = {**self.options, "table": table, **options}
        task = context(place(), options, seconds, maximum)
        return purge_rows.run(task), task


@pytest.fixture
def sqlite(tmp_path):
    path = tmp_path / "app ü?%41.db"
    sqlite3.connect(path).close()
    return {"database": str(path)}


def as_user(name):
    """Return the user as whom a server runs, which must not be root."""
    return {"user": name} if os.geteuid() == 0 else {}


@contextmanager
def server(command, options, folder, ends_by):
    said = folder / "said"
    with open(said, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)
    try:
        wait_for(lambda: READY.search(said.read_text()) or process.poll() is not None, 240)
        assert process.poll() is None, said.read_text()
        yield
    finally:
        process.send_signal(ends_by)  # PostgreSQL ends at once, whoever is still connected
        process.wait(240)


def postgres_programs():
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    if not newest:
        assert not os.environ.get("CI"), "PostgreSQL is missing"
        pytest.skip("PostgreSQL is missing")
    return newest[-1]


@pytest.fixture(scope="module")
def postgresql():
    programs = postgres_programs()
    with tempfile.TemporaryDirectory() as name:
        folder, (port,) = Path(name), free_ports(1)
        options = as_user("postgres")
        if options:
            subprocess.run(["chown", "postgres", folder], check=True)
        data = folder / "data"
        command = [programs / "initdb", "-D", data, "-U", "me", "-A", "trust", "-N"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **options)
        found = {"host": name, "port": port, "user": "me", "password": "", "database": "postgres"}
        command = [programs / "postgres", "-D", data, "-p", str(port), "-k", name, "-F"]
        command += ["-c", "listen_addresses=", "-c", "timezone=America/New_York"]
        with server(command, {"cwd": folder, **options}, folder, signal.SIGINT):
            yield found


@pytest.fixture(scope="module")
def mysql():
    (mariadbd,) = needs("mariadbd")
    with tempfile.TemporaryDirectory() as name:
        folder, options = Path(name), as_user("mysql")
        if options:
            subprocess.run(["chown", "mysql", folder], check=True)
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={name}/data"]
        install += ["--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(install, check=True, capture_output=True, cwd=folder, **options)
        found = {
            "host": f"{name}/s",
            "port": 0,
            "user": "root",
            "password": "",
            "database": "mysql",
        }
        command = [mariadbd, "--no-defaults", f"--datadir={name}/data", f"--socket={name}/s"]
        command += [
            "--skip-networking",
            "--default-time-zone=-05:00",
            "--innodb-flush-method=fsync",
        ]
        command += [
            "--innodb-use-native-aio=0",
            "--innodb-buffer-pool-size=16M",
            f"--pid-file={name}/pid",
        ]
        with server(command, {"cwd": folder, **options}, folder, signal.SIGTERM):
            with closing(Here("mysql", found)) as first:
                first.sql("CREATE DATABASE app")
            yield {**found, "database": "app"}


# -- the same with each database


def test_old_rows_go_and_young_ones_stay(table):
    table.make().put(moment(31), moment(29), None, moment(400), moment(-1))
    result, task = table.purge()
    assert (result, task.message, task.volume) == (None, "2 rows removed", 2)
    assert table.left() == [2, 3, 5]
    assert table.purge()[0] == task.NOTHING


def test_rows_go_a_few_at_a_time(table):
    table.make().put(*[moment(31)] * 23, moment(1))
    assert table.purge(rows_at_once=5)[1].volume == 23
    assert table.left() == [24]


@pytest.mark.parametrize("stored_as", ["seconds", "milliseconds"])
def test_moments_may_be_numbers(table, stored_as):
    unit = {"seconds": 1, "milliseconds": 1000}[stored_as]
    days = [int(time.time() - days * DAY) * unit for days in (31, 29)]
    table.make(kind="bigint").put(*days, 0, -1, None)
    assert table.purge(stored_as=stored_as)[1].volume == 1
    assert table.left() == [2, 3, 4, 5]


def test_a_condition_may_stand_beside_it(table):
    table.make().put(moment(31), status="done")
    table.put(moment(31), status="100% open", first=2)
    table.put(moment(1), status="done", first=3)
    where = "status = 'done' OR status LIKE '%done' -- not the open ones"
    assert table.purge(where=where)[1].volume == 1
    assert table.left() == [2, 3]


def test_names_are_quoted(table):
    name = ODD.replace(" --", "")  # MySQL allows no blank at the end, PostgreSQL 63 bytes
    table.make(name).put(moment(31), moment(1), name=name)
    table.purge(table=name)
    assert table.left(name) == [2]


def test_a_schema_can_be_named(table):
    schema = {"sqlite": "main", "postgresql": "public", "mysql": "app"}[table.kind]
    table.make().put(moment(31))
    table.purge(schema=schema)
    assert table.left() == []


def test_at_the_deadline_it_stops_between_two_bites(table):
    table.make().put(moment(31), moment(31))
    result, task = table.purge(seconds=0)
    assert (result, table.left()) == (task.MORE, [1, 2])


def test_it_removes_at_most_so_many(table):
    table.make().put(*[moment(31)] * 9)
    assert table.purge(maximum=5, rows_at_once=2)[1].volume == 5
    assert len(table.left()) == 4


def test_a_dry_run_counts(table):
    table.make().put(moment(31), moment(31), moment(1))
    assert table.purge(dry_run=True)[0] == "2 rows would be removed"
    assert table.left() == [1, 2, 3]


@pytest.mark.parametrize(
    "wrong",
    [{"table": "nowhere"}, {"column": "nothing"}, {"where": "a b c"}, {"where": "1) OR (1=1; --"}],
)
def test_what_the_database_says_is_one_line(table, wrong):
    table.make().put(moment(31))
    with pytest.raises(purge_rows.DatabaseError) as caught:
        table.purge(**wrong)
    text = str(caught.value)
    assert text.startswith(f"{table.kind}, {table.options['database']}, ")
    assert "\n" not in text
    assert table.left() == [1]


def test_rows_that_others_need_stay_and_are_named(table):
    table.sql("DROP TABLE IF EXISTS child")
    table.make().put(moment(31))
    more = " ENGINE=InnoDB" if table.kind == "mysql" else ""
    table.sql(
        f"CREATE TABLE child (log_id integer, FOREIGN KEY (log_id) REFERENCES log (id)){more}"
    )
    table.sql("INSERT INTO child VALUES (1)")
    with pytest.raises(purge_rows.DatabaseError, match=r"(?i)foreign key"):
        table.purge()
    table.sql("DROP TABLE child")
    assert table.left() == [1]


def test_somebody_who_holds_the_rows_is_not_waited_for_long(table, monkeypatch):
    monkeypatch.setattr(purge_rows, "PATIENCE", 1)
    table.make().put(moment(31))
    with closing(table.connect()) as other:
        cursor = other.cursor()
        cursor.execute({"sqlite": "BEGIN IMMEDIATE"}.get(table.kind, "BEGIN"))
        cursor.execute("UPDATE log SET status = 'held'")
        with pytest.raises(purge_rows.DatabaseError, match=r"(?i)lock"):
            table.purge()
        cursor.execute("ROLLBACK")
    assert table.purge()[1].volume == 1


def test_others_write_while_it_works(table):
    table.make().put(moment(31))
    many = ", ".join(f"({n}, '{moment(31)}', 'x')" for n in range(2, 301))
    table.sql(f"INSERT INTO log VALUES {many}")
    written, failed = [], []

    def write():
        with closing(table.connect()) as other:
            for number in range(10_001, 10_021):
                try:
                    other.cursor().execute(
                        f"INSERT INTO log VALUES ({number}, '{moment(0)}', 'new')"
                    )
                    written.append(number)
                except Exception as error:  # noqa: BLE001 - shown below
                    failed.append(error)

    writing = threading.Thread(target=write)
    writing.start()
    table.purge(rows_at_once=10)
    writing.join()
    assert failed == []
    assert table.left() == written


def test_rows_are_removed_without_a_primary_key(table):
    table.make(key="id integer").put(moment(31), moment(31), moment(1))
    table.sql("UPDATE log SET id = 7")
    table.purge(rows_at_once=1)
    assert table.left() == [7]


# -- one of them only


def test_sqlite_knows_a_date_when_it_sees_one(here, sqlite):
    table = here("sqlite", sqlite).make(kind="")
    table.put("", "never", "20.01.2026", 0, 1, int(time.time()), b"\xff", moment(31)[:10])
    table.put(moment(31).replace(" ", "T") + "Z", "0000-00-00 00:00:00", moment(29), first=9)
    table.purge()
    assert table.left() == [1, 2, 3, 4, 5, 6, 7, 10, 11]
    table.purge(stored_as="seconds")
    assert table.left() == [1, 2, 3, 4, 5, 6, 7, 10, 11]


def test_sqlite_tables_without_rowid(here, sqlite):
    key = "id integer, part integer DEFAULT 1"
    table = here("sqlite", sqlite)
    table.make(key="id integer PRIMARY KEY", more=" WITHOUT ROWID").put(moment(31), moment(1))
    table.purge(rows_at_once=1)
    assert table.left() == [2]
    table.sql("DROP TABLE log")
    table.sql(
        f"CREATE TABLE log ({key}, made_at text, PRIMARY KEY (id, part)) WITHOUT ROWID",
    )
    table.sql("INSERT INTO log (id, made_at) VALUES (1, ?), (2, ?)", moment(31), moment(1))
    table.purge()
    assert table.left() == [2]


def test_a_wrong_path_is_not_created_and_a_view_is_refused(here, sqlite, tmp_path):
    table = here("sqlite", sqlite).make()
    with pytest.raises(ValueError, match=r"options.database: is no file"):
        table.purge(database=str(tmp_path / "nowhere.db"))
    assert not (tmp_path / "nowhere.db").exists()
    (tmp_path / "text").write_text("hello, this is no database" * 100)
    with pytest.raises(purge_rows.DatabaseError, match="not a database"):
        table.purge(database=str(tmp_path / "text"))
    table.put(moment(31))
    table.sql("CREATE VIEW seen AS SELECT * FROM log")
    with pytest.raises(purge_rows.DatabaseError, match="view"):
        table.purge(table="seen")
    assert table.left() == [1]


def test_postgresql_partitions(here, postgresql):
    table = here("postgresql", postgresql)
    table.sql("DROP TABLE IF EXISTS log")
    table.sql("CREATE TABLE log (id integer, made_at timestamptz) PARTITION BY LIST (id)")
    for number in (1, 2):
        table.sql(f"CREATE TABLE part_{number} PARTITION OF log FOR VALUES IN ({number})")
    table.sql("INSERT INTO log VALUES (1, now() - interval '31 d'), (1, now()), (2, now())")
    table.sql("INSERT INTO log VALUES (2, now() - interval '31 d')")
    table.purge(rows_at_once=1)
    assert table.left() == [1, 2]
    table.sql("DROP TABLE log")


@pytest.mark.parametrize("kind", ["text", "integer"])
def test_postgresql_and_mysql_refuse_a_column_that_holds_no_times(here, postgresql, mysql, kind):
    for name, options in (("postgresql", postgresql), ("mysql", mysql)):
        table = here(name, options).make(kind=kind)
        table.put("1" if kind == "text" else 1)
        with pytest.raises((purge_rows.DatabaseError, ValueError)) as caught:
            table.purge()
        assert "type" in str(caught.value) or "operator" in str(caught.value)
        assert table.left() == [1]


def test_mysql_refuses_a_time_that_is_said_to_be_a_number(here, mysql):
    table = here("mysql", mysql).make()
    with pytest.raises(ValueError, match=r"options.column: is of type datetime"):
        table.purge(stored_as="seconds")


@pytest.mark.parametrize("hours", [5, -5])
@pytest.mark.parametrize("kind", ["timestamp", "datetime"])
def test_times_without_a_zone_are_utc_also_where_the_server_lives_elsewhere(
    here, postgresql, mysql, kind, hours
):
    """Both servers live five hours west; a row is an hour older or younger than the limit."""
    for name, options in (("postgresql", postgresql), ("mysql", mysql)):
        table = here(name, options)
        if name == "postgresql":
            table.make(kind="timestamptz" if kind == "timestamp" else "timestamp")
            table.sql("SET TIME ZONE 'UTC'")
        else:
            table.sql("DROP TABLE IF EXISTS log")
            table.sql(f"CREATE TABLE log (id integer, made_at {kind} NULL, status text)")
            table.sql("SET time_zone = '+00:00'")
        table.put(moment(30 + hours / 24 / 5))
        table.purge()
        assert table.left() == ([] if hours > 0 else [1])


def test_a_long_bite_is_followed_by_a_smaller_one(tmp_path):
    class Slow:
        asked = []  # noqa: RUF012 - of this test

        def remove(self, at_most):
            self.asked.append(at_most)
            time.sleep(0.02)
            return at_most if len(self.asked) < 5 else 0

    task = context(tmp_path, {})
    long, purge_rows.LONG = purge_rows.LONG, 0.01
    try:
        purge_rows.purge(task, Slow(), 100)
    finally:
        purge_rows.LONG = long
    assert Slow.asked == [100, 50, 25, 12, 6]


@pytest.mark.parametrize(("kind", "name"), [("postgresql", "psycopg"), ("mysql", "pymysql")])
def test_a_missing_driver_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, kind, name):
    monkeypatch.setitem(sys.modules, name, None)
    options = {**GOOD, "kind": kind, "database": "app"}
    with pytest.raises(ValueError, match=rf"options.kind: needs {name}: .* -m pip install '{name}"):
        purge_rows.run(context(tmp_path, options))


def test_a_password_is_not_shown():
    options = purge_rows.Options(kind="mysql", database="app", table="log", password="horse")
    assert purge_rows.said(Exception("no\n horse"), options) == "mysql, app, log: no ***"


def test_it_works_as_a_task_with_an_example_of_the_readme(here, site, sqlite):
    table = here("sqlite", sqlite)
    table.sql("CREATE TABLE message (id integer, sent_at text, status text)")
    table.sql("INSERT INTO message VALUES (1, ?, 'sent'), (2, ?, 'open')", moment(91), moment(91))
    Chore(site, "purge_rows.py")
    changes = {"/srv/app/app.db": sqlite["database"]}
    site.write("purge_messages.toml", example("purge_messages.toml", changes))
    said = site.run("run", "purge_messages", "--task.purge_messages.options.dry_run=1")
    assert "1 rows would be removed" in said.stderr + said.stdout
    assert site.run("run", "purge_messages").returncode == 0
    assert table.left("message") == [2]


def test_the_options_in_the_file_are_the_defaults():
    assert defaults_in("purge_rows.py") == defaults_of(purge_rows)


GOOD = {"database": __file__, "table": "log", "column": "made_at", "older_than": "30 d"}


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("kind", {"kind": "oracle"}),
        ("database", {"database": ""}),
        ("port", {"port": 65536}),
        ("ca_file", {"ca_file": "/does/not/exist"}),
        ("table", {"table": ""}),
        ("column", {"column": ""}),
        ("stored_as", {"stored_as": "text"}),
        ("older_than", {"older_than": ""}),
        ("older_than", {"older_than": "0 d"}),
        ("rows_at_once", {"rows_at_once": 0}),
        ("where", {"where": "a\nb"}),
    ],
)
def test_a_bad_option_of_purge_rows_is_one_clear_line(key, options):
    assert refused(purge_rows, GOOD, options) == key
