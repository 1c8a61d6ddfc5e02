# /// script
# [tool.bgtasks]
# description = "Remove old rows of a table, a few at a time"
# schedule = "daily 03:15"
# timeout = "6 h"
#
# [tool.bgtasks.options]
# database = ""          # path of an SQLite file, or postgresql://user@host/name, or mysql://...
# password = ""          # not here: task.purge_rows.options.password = ... in the param file
# schema = ""            # empty: where the database looks by itself
# table = ""
# column = ""            # tells when a row became old; it should have an index
# stored_as = "utc"      # or "local": what times without a zone mean; or "seconds", "milliseconds"
# older_than = ""        # "90 d", "12 h" or "90 min"
# where = ""             # what must also hold, in SQL: status = 'sent'
# rows_at_once = 500
# dry_run = false        # true: say how many rows would go, and remove nothing
# ///
"""Purge a table of old rows: copy or link this file into tasks.d, and set the options.

A few rows are removed at a time, each time in a transaction of its own; one that took long is
followed by a smaller one. After each the database rests for as long as it worked, so that others
have their turn. Killed at any moment, it has removed what it had removed.

A row stays if its moment is missing, or is one that means "never": zero, empty, before 1973-03-03.
So seconds that are taken for milliseconds, or days for seconds, are "never", and do not all go.
With SQLite, where any column holds anything, it also stays if it holds no date that SQLite knows,
or no number with "seconds" and "milliseconds".
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LONG = 0.5  # seconds for a transaction; then the next one is smaller
PATIENCE = 5  # seconds to wait for a lock that somebody else holds
CONNECT_SECONDS = 10
LONGEST = 60  # seconds until a server gives up a statement
NEVER = datetime.fromtimestamp(100_000_000, timezone.utc)  # before it there is no time
SECONDS = {"min": 60, "h": 3600, "d": 86400}
UNITS = {"seconds": 1, "milliseconds": 1000}
MYSQL_DATES = (7, 10, 12)  # in its protocol: timestamp, date, datetime
MYSQL_NUMBERS = (0, 1, 2, 3, 4, 5, 8, 9, 246)
MYSQL_OPTIONS = {"unix_socket", "ssl_ca"}  # what may follow ? in mysql://...


class DatabaseError(Exception):
    """What the database or its driver said."""


def run(task: Any) -> str | None:
    options = read_options(task.options)
    kind = urlsplit(options.database).scheme or "sqlite"
    try:
        with contextlib.closing(KINDS[kind](options, time.time())) as table:
            table.connect()
            if options.dry_run:
                return f"{table.count()} rows would be removed"
            return purge(task, table, options.rows_at_once)
    except DatabaseError as error:
        raise DatabaseError(hidden(str(error), options.password)) from None


def purge(task: Any, table: Table, most: int) -> str | None:
    """Remove rows until there are no more, or the deadline comes."""
    count = most
    while not task.should_stop:
        count = min(count, most, (task.maximum or sys.maxsize) - task.volume)
        began = time.monotonic()
        gone = table.remove(count)
        task.add_volume(gone)
        if gone < count or task.volume >= (task.maximum or sys.maxsize):
            task.message = f"{task.volume} rows removed"
            return None if task.volume else task.NOTHING
        took = time.monotonic() - began
        count = max(1, count // 2) if took > LONG else count * 2
        time.sleep(min(took, task.time_left))
    return task.MORE


def hidden(text: str, password: str) -> str:
    return text.replace(password, "***") if password else text


# --- tables


class Table:
    """The old rows of a table; a subclass knows its database."""

    connection: Any = None
    mark = "%s"
    quotes = '"'

    def __init__(self, options: Options, now: float) -> None:
        self.options = options
        self.name = ".".join(self.quoted(part) for part in (options.schema, options.table) if part)
        self.column = self.quoted(options.column)
        last = last_moment(options, now)
        self.values, self.zone = limits(options, last), last.isoformat()[-6:]
        self.condition = f"{self.column} >= {self.mark} AND {self.column} < {self.mark}"
        if options.where:  # on lines of its own, as it may end with a comment
            self.condition += f" AND (\n{self.literal(options.where)}\n)"

    def quoted(self, name: str) -> str:
        return self.quotes + self.literal(name).replace(self.quotes, self.quotes * 2) + self.quotes

    def literal(self, sql: str) -> str:
        """Return SQL in which nothing is taken for the place of a value."""
        return sql if self.mark == "?" else sql.replace("%", "%%")

    def connect(self) -> None:
        with one_line("options.database", Exception):  # each driver has its own
            self.connection = connect(self.options.database, self.options.password, LONGEST)
        with self._said():
            self.prepare()

    def _said(self) -> contextlib.AbstractContextManager[None]:
        return one_line(f"{self.options.database}, {self.options.table}", self.connection.Error)

    def prepare(self) -> None:
        """See that times are read as they are meant, and no lock is waited for long."""

    def execute(self, sql: str, times: int = 1) -> Any:
        """Run a statement in which the condition stands so many times."""
        with self._said():
            cursor = self.connection.cursor()
            cursor.execute(sql, self.values * times)
            return cursor

    def count(self) -> int:
        sql = f"SELECT count(*) FROM {self.name} WHERE {self.condition}"  # noqa: S608 - quoted
        return int(self.execute(sql).fetchone()[0])

    def remove(self, at_most: int) -> int:
        """Remove so many of the rows; each database has its own way to say that."""
        sql = f"DELETE FROM {self.name} WHERE {self.condition} LIMIT {at_most}"  # noqa: S608 - quoted
        return int(self.execute(sql).rowcount)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()


class Sqlite(Table):
    """A file. Backticks, as with double quotes a wrong name would be taken for a text."""

    mark = "?"
    quotes = "`"

    def prepare(self) -> None:
        self.connection.execute(f"PRAGMA busy_timeout = {PATIENCE * 1000}")
        self.connection.execute("PRAGMA foreign_keys = ON")
        if self.options.stored_as in UNITS:
            self.condition += f" AND typeof({self.column}) IN ('integer', 'real')"
        else:
            digits = "[0-9][0-9]"
            self.condition += f" AND {self.column} GLOB '{digits}{digits}-{digits}-{digits}*'"
            self.condition += f" AND datetime({self.column}) < '{self.values[1]}'"
        self._key = self._find_key()

    def _find_key(self) -> str:
        try:
            self.connection.execute(f"SELECT rowid FROM {self.name} LIMIT 0")  # noqa: S608 - quoted
            return "rowid"
        except sqlite3.OperationalError as error:
            if "rowid" not in str(error):
                raise
        found = self.connection.execute(f"PRAGMA table_info({self.quoted(self.options.table)})")
        return ", ".join(self.quoted(row[1]) for row in found if row[5])

    def remove(self, at_most: int) -> int:
        name, key = self.name, self._key
        some = f"SELECT {key} FROM {name} WHERE {self.condition} LIMIT {at_most}"  # noqa: S608 - quoted
        sql = f"DELETE FROM {name} WHERE ({key}) IN ({some}) AND {self.condition}"  # noqa: S608 - quoted
        return int(self.execute(sql, times=2).rowcount)


class Postgresql(Table):
    """PostgreSQL. It compares no text and no number with a time, and says so."""

    def prepare(self) -> None:
        self.connection.execute(f"SET lock_timeout = '{PATIENCE}s'")
        self.connection.execute(f"SET statement_timeout = '{LONGEST}s'")
        self.connection.execute(f"SET TIME ZONE INTERVAL '{self.zone}' HOUR TO MINUTE")

    def remove(self, at_most: int) -> int:
        """A place is that of one row only within a partition, so the condition stands twice."""
        name = self.name
        some = f"SELECT ctid FROM {name} WHERE {self.condition} LIMIT {at_most}"  # noqa: S608 - quoted
        sql = f"DELETE FROM {name} WHERE ctid = ANY(ARRAY({some})) AND {self.condition}"  # noqa: S608 - quoted
        return int(self.execute(sql, times=2).rowcount)


class Mysql(Table):
    """MySQL and MariaDB. They compare anything with anything, so the type is looked at."""

    quotes = "`"

    def prepare(self) -> None:
        with self.connection.cursor() as cursor:
            # without it, rows that are only looked at would be locked too
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {PATIENCE}")
            cursor.execute(f"SET SESSION lock_wait_timeout = {PATIENCE}")
            cursor.execute(f"SET SESSION time_zone = '{self.zone}'")
            self._refuse_other_type(cursor)

    def _refuse_other_type(self, cursor: Any) -> None:
        cursor.execute(f"SELECT {self.column} FROM {self.name} LIMIT 0", ())  # noqa: S608 - quoted
        numbers = self.options.stored_as in UNITS
        if cursor.description[0][1] not in (MYSQL_NUMBERS if numbers else MYSQL_DATES):
            text = f"holds no {'numbers' if numbers else 'times'}; set stored_as to what it holds"
            raise ValueError(f"options.column: {text}")


KINDS: dict[str, type[Table]] = {"sqlite": Sqlite, "postgresql": Postgresql, "mysql": Mysql}


def last_moment(options: Options, now: float) -> datetime:
    """Return the first moment of a row that is not old, in the zone of the rows."""
    last = datetime.fromtimestamp(int(now), timezone.utc)
    last -= timedelta(seconds=read_seconds(options.older_than))
    return last.astimezone() if options.stored_as == "local" else last


def limits(options: Options, last: datetime) -> tuple[Any, Any]:
    """Return the first moment of an old row, and of one that is not, as the column holds them."""
    if options.stored_as in UNITS:
        unit = UNITS[options.stored_as]
        return int(NEVER.timestamp()) * unit, int(last.timestamp()) * unit
    first, last = (moment.astimezone(last.tzinfo).replace(tzinfo=None) for moment in (NEVER, last))
    return (str(first), str(last)) if options.database.startswith("/") else (first, last)


# --- the database


@contextlib.contextmanager
def one_line(where: str, errors: type[Exception]) -> Iterator[None]:
    """Say on one line what a driver says on several."""
    try:
        yield
    except errors as error:
        text = " ".join(str(error.args[-1] if error.args else error).split())
        raise DatabaseError(f"{where}: {text}") from None


def connect(address: str, password: str, answer_seconds: int | None = None) -> Any:
    """Return a connection in which each statement commits by itself; MySQL may be given seconds
    for an answer, as it has no limit of its own for a statement."""
    url = urlsplit(address)
    if url.scheme == "postgresql":
        psycopg, secret = driver("psycopg"), {"password": password} if password else {}
        return psycopg.connect(address, autocommit=True, connect_timeout=CONNECT_SECONDS, **secret)
    if url.scheme == "mysql":
        more = dict(parse_qsl(url.query, keep_blank_values=True))
        if "ssl_ca" in more and not os.path.isfile(more["ssl_ca"]):
            raise RuntimeError(f"ssl_ca: {more['ssl_ca']} is no file; mend the path")
        return driver("pymysql").connect(
            host=url.hostname or "localhost",
            port=url.port or 3306,
            user=unquote(url.username or ""),
            password=password,
            database=unquote(url.path[1:]),
            autocommit=True,
            connect_timeout=CONNECT_SECONDS,
            read_timeout=answer_seconds,
            unix_socket=more.get("unix_socket"),
            ssl={"ca": more["ssl_ca"]} if "ssl_ca" in more else None,  # checks the name, too
        )
    uri = f"file:{quote(address)}?mode=rw"  # a wrong path makes no new file
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=CONNECT_SECONDS)
    db.text_factory = lambda content: content.decode("utf-8", "replace")
    return db


def driver(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = {"psycopg": "psycopg[binary]", "pymysql": "PyMySQL"}[module]
        text = f"needs {module}: {sys.executable} -m pip install '{package}'"
        raise RuntimeError(text) from None


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    database: str = ""
    password: str = ""
    schema: str = ""
    table: str = ""
    column: str = ""
    stored_as: str = "utc"
    older_than: str = ""
    where: str = ""
    rows_at_once: int = 500
    dry_run: bool = False


def is_database(address: str) -> bool:
    """Tell whether this is a path from the root on, or a URL with nothing in it that is unknown."""
    try:
        url = urlsplit(address)
        known = {"postgresql": True, "mysql": dict(parse_qsl(url.query)).keys() <= MYSQL_OPTIONS}
        return address.startswith("/") or bool(
            known.get(url.scheme) and url.path[1:] and url.port != 0
        )
    except ValueError:
        return False


def has_password(address: str) -> bool:
    url = urlsplit(address)
    return url.password is not None or "password" in dict(parse_qsl(url.query))


def read_seconds(text: str) -> int:
    """Return the seconds of a time such as "30 d"; 0 if it is none."""
    found = re.fullmatch("([0-9]{1,5}) ?(min|h|d)", text)
    return int(found[1]) * SECONDS[found[2]] if found else 0


def is_closed(sql: str) -> bool:
    """Tell whether a condition stays within the parentheses that are put around it."""
    depth = 0
    for sign in re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "", sql):
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            return False
    return depth == 0


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    (
        "database",
        lambda o: is_database(o.database),
        "must be the path of an SQLite file, postgresql://user@host/name or mysql://user@host/name",
    ),
    (
        "database",
        lambda o: not has_password(o.database),
        "must not hold the password, which others could see; set options.password",
    ),
    (
        "database",
        lambda o: urlsplit(o.database).scheme or os.path.isfile(o.database),
        "is no file; mend the path",
    ),
    ("table", lambda o: o.table, "is empty; name the table"),
    ("column", lambda o: o.column, "is empty; name the column that tells when a row became old"),
    (
        "stored_as",
        lambda o: o.stored_as in ("utc", "local", *UNITS),
        'must be "utc", "local", "seconds" or "milliseconds"',
    ),
    (
        "older_than",
        lambda o: read_seconds(o.older_than),
        'must be a time such as "90 d", "12 h" or "90 min"',
    ),
    ("where", lambda o: is_closed(o.where), "has parentheses that do not match; mend it"),
    (
        "rows_at_once",
        lambda o: 0 < o.rows_at_once <= 100_000,
        "must be from 1 to 100000; 500 is a good number",
    ),
)


# --- options: these lines are the same in each task of this folder, so that each works alone

TYPES = {
    str: "text in quotes",
    int: "a whole number from 0 on",
    bool: "true or false",
    tuple: "a list of texts",
}
BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def read_options(given: Mapping[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    options = Options(**{key: read_option(key, value) for key, value in given.items()})
    for key, holds, rule in RULES:
        if not holds(options):
            raise ValueError(f"options.{key}: {rule}")
    return options


def read_option(key: str, value: Any) -> Any:
    """Return a value as the type of its default."""
    if key not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    kind = type(Options._field_defaults[key])
    value = of_type(kind, value)
    texts = value if kind is tuple else (value,)
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if kind is tuple and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if any(isinstance(text, str) and re.search(r"[\0\r\n]", text) for text in texts):
        raise ValueError(f"options.{key}: must stand on one line; remove what breaks it")
    return value


def of_type(kind: type, value: Any) -> Any:
    """Turn what the param file sets as text, because a .toml left it out, into the type wanted."""
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str) or kind is str:
        return value
    if kind is tuple:
        return tuple(re.split(r"\s*,\s*", value)) if value else ()
    if kind is bool:
        return BOOLEANS.get(value.lower(), value)
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else value
