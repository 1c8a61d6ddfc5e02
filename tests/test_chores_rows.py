"""purge_rows of contrib/tasks, on SQLite and on real servers."""

import os
import sqlite3
import sys
import threading
import time
from contextlib import ExitStack, closing

import pytest
import sql_servers
import trustme
from chores import (
    Chore,
    context,
    defaults_in,
    defaults_of,
    example,
    load,
    place,
    refused,
)

pytestmark = pytest.mark.unmeasured
purge_rows = load("purge_rows")
DAY = 86400
ODD = "we\"ird `na'me; DROP %s 100% TABLE x"
SERVERS = [  # what needs the same server runs side by side with the rest, but starts it once
    pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in ("postgresql", "mysql")
]


def moment(days):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() - days * DAY))


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Let only those fail who wait for ever: this machine may stand still for some time."""
    for name in ("PATIENCE", "CONNECT_SECONDS", "LONGEST"):
        monkeypatch.setattr(purge_rows, name, 120)


@pytest.fixture(scope="session")
def servers():
    """Start a server, five hours west of here, when the first test asks for it."""
    with ExitStack() as stack:
        started = {}

        def server(kind):
            why = sql_servers.missing(kind)
            if why and not os.environ.get("CI"):
                pytest.skip(why)
            assert not why, why
            if kind not in started:
                started[kind] = stack.enter_context(sql_servers.running(kind))
                started[kind].create("app")
                with closing(started[kind].connect(user="test")) as connection:
                    connection.cursor().execute(WEST[kind])
            return started[kind]

        yield server


WEST = {
    "mysql": "SET GLOBAL time_zone = '-05:00'",
    "postgresql": "ALTER DATABASE postgres SET timezone = 'Etc/GMT+5'",
}


@pytest.fixture
def here(servers, tmp_path):
    """Return what connects to a database of each kind."""
    with ExitStack() as opened:

        def here(kind):
            server = None if kind == "sqlite" else servers(kind)
            return opened.enter_context(closing(Here(kind, server, tmp_path / "app ü?%41.db")))

        yield here


@pytest.fixture(params=["sqlite", *SERVERS])
def table(request, here):
    return here(request.param)


@pytest.fixture
def sqlite(here):
    return here("sqlite")


@pytest.fixture(params=SERVERS)
def served(request, here):
    return here(request.param)


class Here:
    """A database of a test, through its own driver."""

    def __init__(self, kind, server, file):
        self.kind, self.server, self.file = kind, server, file
        self.quote = '"' if kind == "postgresql" else "`"
        self.mark = "?" if kind == "sqlite" else "%s"
        self.options = {"database": self.address(), "column": "made_at", "older_than": "30 d"}
        self.connection = self.connect()

    def address(self, user="test"):
        if self.kind == "sqlite":
            return str(self.file)
        return self.server.url("app" if self.kind == "mysql" else "public", user)

    def connect(self):
        if self.kind == "sqlite":
            return sqlite3.connect(self.file, timeout=120, isolation_level=None)
        return self.server.connect("app" if self.kind == "mysql" else "public", user="test")

    def close(self):
        self.connection.close()

    def sql(self, text, *values):
        cursor = self.connection.cursor()
        cursor.execute(text, values) if values else cursor.execute(text)
        return cursor.fetchall() if cursor.description else []

    def make(self, name="log", kind=None, key="id integer PRIMARY KEY", more=""):
        """Make a table; what was in it is gone."""
        name = self.name(name)
        if kind is None:
            kind = "datetime" if self.kind == "mysql" else "timestamp"
        self.sql(f"DROP TABLE IF EXISTS {name}")
        self.sql(f"CREATE TABLE {name} ({key}, made_at {kind} NULL, status varchar(20)){more}")
        return self

    def name(self, name):
        return self.quote + name.replace(self.quote, self.quote * 2) + self.quote

    def put(self, *moments, name="log", status="done", first=1):
        for number, made_at in enumerate(moments, start=first):
            into = self.name(name) if self.mark == "?" else self.name(name).replace("%", "%%")
            values = f"VALUES ({self.mark}, {self.mark}, {self.mark})"
            self.sql(f"INSERT INTO {into} {values}", number, made_at, status)

    def left(self, name="log"):
        return [row[0] for row in self.sql(f"SELECT id FROM {self.name(name)} ORDER BY id")]

    def purge(self, seconds=600, maximum=None, table="log", **options):
        """Run the task here; return its result and the context."""
        options = {**self.options, "table": table, **options}
        task = context(place(), options, seconds, maximum)
        return purge_rows.run(task), task


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
    units = {"seconds": 1, "milliseconds": 1000}
    old, young = (int(time.time() - days * DAY) for days in (31, 29))
    others = [old * unit for unit in units.values() if unit != units[stored_as]]
    days = [2_460_000]  # the Julian ones; all of these would be old if they were believed
    table.make(kind="bigint").put(old * units[stored_as], young * units[stored_as])
    table.put(0, -1, None, *others, *days, first=3)
    assert table.purge(stored_as=stored_as)[1].volume == 1
    assert table.left() == [2, 3, 4, 5, 6, 7]


def test_a_condition_may_stand_beside_it(table):
    table.make().put(moment(31), status="done")
    table.put(moment(31), status="100% open", first=2)
    table.put(moment(1), status="done", first=3)
    where = "status = 'done' OR status LIKE '%done' -- not the open ones"
    assert table.purge(where=where)[1].volume == 1
    assert table.left() == [2, 3]


def test_names_are_quoted(table):
    table.make(ODD).put(moment(31), moment(1), name=ODD)
    column = f"`%(x)s '{table.quote}"
    quoted = table.name(column)
    table.sql(f"ALTER TABLE {table.name(ODD)} RENAME COLUMN made_at TO {quoted}")
    table.purge(table=ODD, column=column)
    assert table.left(ODD) == [2]
    table.sql(f"DROP TABLE {table.name(ODD)}")


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
    [{"table": "nowhere"}, {"column": "nothing"}, {"where": "a b c"}, {"where": "1=1; --"}],
)
def test_what_the_database_says_is_one_line(table, wrong):
    table.make().put(moment(31))
    with pytest.raises(purge_rows.DatabaseError) as caught:
        table.purge(**wrong)
    text = str(caught.value)
    assert text.startswith(f"{table.options['database']}, {wrong.get('table', 'log')}: ")
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


def test_a_condition_cannot_make_young_rows_old(table):
    table.make().put(moment(1))
    with pytest.raises(ValueError, match="options.where: has parentheses that do not match"):
        table.purge(where="1=1) OR (1=1")
    for where in ("status = 'done' OR 1=1", "'(' <> ')' OR 1=1 --"):
        table.purge(where=where)
    assert table.left() == [1]


def test_somebody_who_holds_the_rows_is_not_waited_for_long(table, monkeypatch):
    table.make().put(moment(31))
    with closing(table.connect()) as other:
        cursor = other.cursor()
        cursor.execute({"sqlite": "BEGIN IMMEDIATE"}.get(table.kind, "BEGIN"))
        cursor.execute("UPDATE log SET status = 'held'")
        with monkeypatch.context() as patched:
            patched.setattr(purge_rows, "PATIENCE", 1)
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


def test_sqlite_knows_a_date_when_it_sees_one(sqlite):
    table = sqlite.make(kind="")
    day, second = moment(31)[:10], moment(31)
    gone = [day, second, f"{day}T10:00Z", f"{second}.123456", f"{second}.1+14:00"]
    hour = moment(30 - 1 / 24)  # an hour too young; in the far west it was the day before
    stay = ["", "never", "20.01.2026", 0, 1, int(time.time()), b"\xff", "0000-00-00 00:00:00"]
    stay += [moment(29), f"{day} or so", f"{day} 25:00", "2000", "now", None]
    stay += [time.strftime("%Y-%m-%dT%H:%M-10:00", time.gmtime(time.time() - 30 * DAY - 9 * 3600))]
    table.put(*stay, hour, hour.replace(" ", "T"))
    table.put(*gone, first=101)
    assert table.purge()[1].volume == len(gone)
    assert table.left() == list(range(1, len(stay) + 3))
    assert table.purge(stored_as="seconds")[1].volume == 0


def test_sqlite_tables_without_rowid(sqlite):
    for key in ("PRIMARY KEY (id)", "PRIMARY KEY (id, part)"):
        sqlite.sql("DROP TABLE IF EXISTS log")
        columns = "id integer, part integer DEFAULT 1, made_at text"
        sqlite.sql(f"CREATE TABLE log ({columns}, {key}) WITHOUT ROWID")
        sqlite.sql("INSERT INTO log (id, made_at) VALUES (1, ?), (2, ?)", moment(31), moment(1))
        sqlite.purge(rows_at_once=1)
        assert sqlite.left() == [2]


def test_a_wrong_path_is_not_created_and_a_view_is_refused(sqlite, tmp_path):
    table = sqlite.make()
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


@pytest.mark.xdist_group("postgresql")
def test_postgresql_partitions(here):
    table = here("postgresql")
    table.sql("DROP TABLE IF EXISTS log")
    table.sql("CREATE TABLE log (id integer, made_at timestamptz) PARTITION BY LIST (id)")
    for number in (1, 2):
        table.sql(f"CREATE TABLE part_{number} PARTITION OF log FOR VALUES IN ({number})")
    table.sql("INSERT INTO log VALUES (1, now() - interval '31 d'), (1, now()), (2, now())")
    table.sql("INSERT INTO log VALUES (2, now() - interval '31 d')")
    table.purge(rows_at_once=1)
    assert table.left() == [1, 2]
    for number in (1, 2):  # the first of each partition stand at the same place, and go together
        table.sql(
            f"INSERT INTO log SELECT {number}, now() - interval '31 d' FROM generate_series(1, 3)"
        )
    table.sql("VACUUM FULL log")
    assert table.purge(maximum=1)[1].volume in (1, 2)
    table.sql("DROP TABLE log")


@pytest.mark.parametrize("kind", ["text", "integer"])
def test_servers_refuse_a_column_that_holds_no_times(served, kind):
    table = served.make(kind=kind)
    table.put("1" if kind == "text" else 1)
    with pytest.raises((purge_rows.DatabaseError, ValueError)) as caught:
        table.purge()
    assert "holds no times" in str(caught.value) or "operator" in str(caught.value)
    assert table.left() == [1]


def test_servers_refuse_a_time_that_is_said_to_be_a_number(served):
    table = served.make()
    table.put(moment(31))
    with pytest.raises((purge_rows.DatabaseError, ValueError)) as caught:
        table.purge(stored_as="seconds")
    assert "holds no numbers" in str(caught.value) or "operator" in str(caught.value)


@pytest.fixture
def east():
    """For a while, this machine lives three hours east."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TZ", "East-3")
        time.tzset()
        yield
    time.tzset()


ZONED = {"mysql": ("datetime", "timestamp"), "postgresql": ("timestamp", "timestamptz")}


@pytest.mark.parametrize("stored_as", ["utc", "local"])
@pytest.mark.parametrize("zoned", [True, False])
def test_times_are_those_of_their_zone_also_where_the_server_lives_elsewhere(
    served, east, stored_as, zoned
):
    """Of two rows, one is an hour older than the limit, and one younger."""
    served.make(kind=ZONED[served.kind][zoned])
    utc = {"mysql": "SET time_zone = '+00:00'", "postgresql": "SET TIME ZONE 'UTC'"}
    served.sql(utc[served.kind])
    hours = 3 if stored_as == "local" and not zoned else 0  # a time with a zone is what it is
    served.put(*(moment(30 - (hours + other) / 24) for other in (-1, 1)))
    served.purge(stored_as=stored_as)
    assert served.left() == [2]


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


@pytest.mark.parametrize(("kind", "name"), [("postgresql", "psycopg"), ("mysql", "PyMySQL")])
def test_a_missing_driver_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, kind, name):
    monkeypatch.setitem(sys.modules, name.lower(), None)
    options = {**GOOD, "database": f"{kind}://me@localhost/app"}
    wanted = rf"^options.database: needs {name.lower()}: .* -m pip install '{name}"
    with pytest.raises(purge_rows.DatabaseError, match=wanted):
        purge_rows.run(context(tmp_path, options))


def test_a_password_is_used_and_not_shown(served):
    served.make().put(moment(31))
    locked = served.address("locked")
    with pytest.raises(purge_rows.DatabaseError, match="^options.database: ") as caught:
        served.purge(database=locked, password="locked")
    assert "***" in str(caught.value)
    assert "locked" not in str(caught.value)
    assert "\n" not in str(caught.value)
    served.purge(database=locked, password=sql_servers.PASSWORD)
    assert served.left() == []


@pytest.mark.xdist_group("mysql")
def test_with_a_ca_the_server_must_prove_its_name(servers, tmp_path):
    servers("mysql")  # it says what is missing
    authority, ca_file, other = trustme.CA(), tmp_path / "ca", tmp_path / "other"
    authority.cert_pem.write_to_path(ca_file)
    trustme.CA().cert_pem.write_to_path(other)
    with sql_servers.running("mysql", authority.issue_cert("db.example.org")) as server:
        server.create("app")
        with closing(Here("mysql", server, None)) as table:
            table.make().put(moment(31))
            address = table.options["database"]
            named = address.replace("@localhost", "@db.example.org")
            for wrong, why in (
                (f"{address}&ssl_ca={ca_file}", "certificate is not valid for 'localhost'"),
                (f"{named}&ssl_ca={other}", "certificate verify failed"),
                (f"{named}&ssl_ca={tmp_path}/gone", "gone is no file; mend the path"),
                (f"{named}&ssl_ca=", "is no file; mend the path"),
            ):
                with pytest.raises(purge_rows.DatabaseError, match=why):
                    table.purge(database=wrong)
            assert table.left() == [1]
            table.purge(database=f"{named}&ssl_ca={ca_file}")
            assert table.left() == []


def test_it_works_as_a_task_with_an_example_of_the_readme(site, sqlite):
    table = sqlite
    table.sql("CREATE TABLE message (id integer, sent_at text, status text)")
    table.sql("INSERT INTO message VALUES (1, ?, 'sent'), (2, ?, 'open')", moment(91), moment(91))
    Chore(site, "purge_rows.py")
    changes = {"/srv/app/app.db": table.file}
    site.write("purge_messages.toml", example("purge_messages.toml", changes))
    said = site.run("run", "purge_messages", "--task.purge_messages.options.dry_run=1")
    assert "1 rows would be removed" in said.stderr + said.stdout
    assert site.run("run", "purge_messages").returncode == 0
    assert table.left("message") == [2]


def test_the_options_in_the_file_are_the_defaults():
    assert defaults_in("purge_rows.py") == defaults_of(purge_rows)


GOOD = {"database": __file__, "table": "log", "column": "made_at", "older_than": "30 d"}


BAD = [
    ("database", {"database": ""}),
    ("database", {"database": "app.db"}),
    ("database", {"database": "/does/not/exist.db"}),
    ("database", {"database": "oracle://me@host/app"}),
    ("database", {"database": "mysql://me@host/"}),
    ("database", {"database": "postgresql://me@host"}),
    ("database", {"database": "mysql://me@host:x/app"}),
    ("database", {"database": "postgresql://me@host:65536/app"}),
    ("database", {"database": "mysql://me@host/app?local_infile=1"}),
    ("database", {"database": "mysql://me:12345678@host/app"}),
    ("database", {"database": "postgresql://me@host/app?password=12345678"}),
    ("password", {"password": 12345678}),
    ("kind", {"kind": "mysql"}),
    ("table", {"table": ""}),
    ("column", {"column": ""}),
    ("stored_as", {"stored_as": "text"}),
    ("older_than", {"older_than": ""}),
    ("older_than", {"older_than": "0 d"}),
    ("rows_at_once", {"rows_at_once": 0}),
    ("where", {"where": "a\nb"}),
    ("where", {"where": "a = 1) OR (b = 2"}),
]


def test_a_bad_option_is_one_clear_line():
    for key, options in BAD:
        assert refused(purge_rows, GOOD, options) == key, options
