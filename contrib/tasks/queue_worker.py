# /// script
# [tool.bgtasks]
# description = "Hand the rows of an application's queue to a program, one by one"
# schedule = "every 1 min"
#
# [tool.bgtasks.options]
# database = ""          # path of an SQLite file, or postgresql://user@host/name, or mysql://...
# password = ""          # not here: task.queue_worker.options.password = ... in the param file
# table = "queue"
# id_column = "id"       # what tells one row from the others
# program = []           # gets a row as JSON on stdin; exit 0: done
# program_timeout = 60   # seconds for one row
# max_retries = 5        # tries after the first; then the row is given up
# retry_delay = 60       # seconds before the second try; doubles with each, up to a day
# ///
"""Drain a table of an application: copy or link this file into tasks.d, and set the options.

Besides its id and whatever the application keeps in it, the table has these columns, NOT NULL but
for the last (contrib/tasks/README.md has the statements):

* status: `planned`, `running`, `done` or `error` (given up). The application writes `planned`.
* planned_at: Unix seconds before which a row is left alone. Of a running row: the moment from which
  it counts as left behind by a crash, and is taken again.
* attempts: how often it was begun; 0 at first.
* last_error: why the last try failed.

A row is taken by one UPDATE that only succeeds if nobody else has taken it since it was looked at,
so any number of workers, on any number of machines, share a table. All times are those of the
database's clock. While a program works, no connection to the database is held.

A row is handed to the program once if all goes well. It comes again if the program failed, and if
it ended well but this could not be noted: the worker was killed, or could not reach the database,
in that moment. Another one takes it from a machine that stood still for more than a minute. So let
the program look at the id. A program whose time is up is killed, but not what it started: that may
go on until the run ends.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LOOKED_AT = 100  # rows in one look; what others take meanwhile costs one UPDATE each
LEFT_BEHIND_SECONDS = 60  # after its timeout a program is surely dead: bgtasks ends it with its run
LONGEST_DELAY = 86400
NOTING_GAPS = (1, 5, 20)  # seconds; together less than LEFT_BEHIND_SECONDS
MOST_ERROR_CHARACTERS = 1000
CONNECT_SECONDS = 30
TYPES = {str: "text in quotes", int: "a whole number", tuple: "a list of texts"}
MYSQL_OPTIONS = {"unix_socket", "ssl_ca"}  # what may follow ? in mysql://...
NOW = {
    "sqlite": "CAST(strftime('%s', 'now') AS INTEGER)",
    "postgresql": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS BIGINT)",
    "mysql": "UNIX_TIMESTAMP()",
}


class DatabaseError(Exception):
    """The database cannot be used; the run ends."""


class QueueError(Exception):
    """Rows were given up; said once all others had their turn."""


class RowError(Exception):
    """The program did not take a row."""


def run(task: Any) -> str | None:
    options = read_options(task.options)
    queue = Queue(options)
    counts = {"done": 0, "planned": 0, "error": 0}
    problem = ""
    for row in task.each(queue.candidates()):
        status, why = handle(queue, row, options)
        if not status:
            continue
        counts[status] += 1
        task.add_volume(int(status == "done"))
        task.progress(sum(counts.values()))
        if why:
            print(f"{options.table} {row.id}: {why}", flush=True)
        if status == "error":
            problem = f"{row.id}: {why}"
    if problem:
        raise QueueError(f"{counts['error']} given up in {options.table}; the last: {problem}")
    if any(counts.values()):
        task.message = f"{counts['done']} done, {counts['planned']} to be tried again"
    return None if any(counts.values()) else task.NOTHING


def handle(queue: Queue, row: Row, options: Options) -> tuple[str, str]:
    """Return the new status of a row, "" if it is somebody else's now, and why it is not done."""
    if row.status == "running" and row.attempts > options.max_retries:
        why = f"was begun {row.attempts} times, and left behind by a crash"
        return ("error" if queue.note(row, "error", why) else ""), why
    taken = queue.take(row)
    if not taken:
        return "", ""
    try:
        call(options, taken, queue.content(taken))
        status, why = "done", ""
    except RowError as error:
        status, why = ("planned" if taken.attempts <= options.max_retries else "error"), str(error)
    if queue.note_surely(taken, status, why):
        return status, why
    print(f"{options.table} {row.id}: was changed meanwhile, and is left as it is", flush=True)
    return "", ""


# --- the program


def call(options: Options, row: Row, content: dict[str, Any]) -> None:
    """Hand a row to the program. Raises RowError if it does not exit with 0 in time."""
    text = json.dumps(content, default=as_json, ensure_ascii=False).encode("utf-8", "replace")
    env = {**os.environ, "QUEUE_WORKER_ID": str(row.id)}
    with tempfile.TemporaryFile() as said:
        try:
            subprocess.run(
                options.program,
                input=text,
                stderr=said,
                env=env,
                timeout=options.program_timeout,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            raise RowError(f"the program ended with {error.returncode}{tail(said)}") from None
        except subprocess.TimeoutExpired:
            seconds = options.program_timeout
            raise RowError(f"the program did not end within {seconds} s{tail(said)}") from None
        except (OSError, ValueError) as error:  # ValueError: NUL in an id
            raise RowError(f"the program did not start: {error}") from None
        if tail(said):
            print(f"{options.table} {row.id}{tail(said)}", flush=True)


def as_json(value: object) -> object:
    """Return what JSON has no type for: bytes in base64, dates and decimal numbers as text."""
    if isinstance(value, (bytes, memoryview)):
        return {"base64": base64.b64encode(value).decode()}
    return str(value)


def tail(said: Any) -> str:
    """Return the end of what the program said on stderr."""
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - 4 * MOST_ERROR_CHARACTERS))
    text = " ".join(said.read().decode("utf-8", "replace").replace("\0", "").split())
    return f": {text[-MOST_ERROR_CHARACTERS:]}" if text else ""


# --- the table


class Row(NamedTuple):
    """What tells who has a row: each change of status makes another one."""

    id: Any
    status: str
    attempts: int
    planned_at: int


class Queue:
    """The rows of the table. What changes one names all of Row: who comes late changes nothing."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._changed = 0

    def _opened(self) -> contextlib.closing[Database]:
        return contextlib.closing(Database(self._options.database, self._options.password))

    def _rows(self, db: Database, sql: str, *values: object) -> list[dict[str, Any]]:
        return db.rows(sql.format(**self._names(db)), *values)

    def _names(self, db: Database) -> dict[str, str]:
        table, id_column = db.name(self._options.table), db.name(self._options.id_column)
        return {"table": table, "id": id_column, "now": NOW[db.kind]}

    def candidates(self) -> Iterator[Row]:
        """Yield rows that look free, until a look finds none that it could change."""
        before = -1
        while before < self._changed:
            before = self._changed
            yield from self._look()

    def _look(self) -> list[Row]:
        sql = """
            SELECT {id} AS id, status, attempts, planned_at FROM {table}
            WHERE status IN ('planned', 'running') AND planned_at <= {now}
            ORDER BY planned_at, {id} LIMIT ?
        """
        with self._opened() as db:
            return [Row(**row) for row in self._rows(db, sql, LOOKED_AT)]

    def take(self, row: Row) -> Row | None:
        """Make a row ours, or return None if it is somebody else's."""
        seconds = self._options.program_timeout + LEFT_BEHIND_SECONDS
        with self._opened() as db:
            taken = Row(row.id, "running", row.attempts + 1, self._moment(db, seconds))
            return taken if self._change(db, row, taken) else None

    def content(self, row: Row) -> dict[str, Any]:
        """Return all columns of a row. Raises RowError if a driver has no value for one of them."""
        try:
            with self._opened() as db:
                found = self._rows(db, "SELECT * FROM {table} WHERE {id} = ?", row.id)
        except DatabaseError as error:
            raise RowError(f"the row cannot be read: {error}") from None
        if len(found) != 1:
            raise RowError(f"{len(found)} rows have this {self._options.id_column}")
        return found[0]

    def _moment(self, db: Database, seconds: int) -> int:
        """Return the Unix seconds that the database's clock will show in so many seconds."""
        return int(db.rows(f"SELECT {NOW[db.kind]} + ? AS moment", seconds)[0]["moment"])

    def _change(self, db: Database, old: Row, new: Row, *errors: str | None) -> bool:
        sql = """
            UPDATE {table} SET status = ?, attempts = ?, planned_at = ?{error}
            WHERE {id} = ? AND status = ? AND attempts = ? AND planned_at = ?
        """
        sql = sql.format(error=", last_error = ?" if errors else "", **self._names(db))
        changed = db.change(sql, *new[1:], *errors, *old)
        self._changed += changed
        return bool(changed)

    def note_surely(self, row: Row, status: str, why: str) -> bool:
        """Note a result though the database is away for a moment: the work is done."""
        for gap in NOTING_GAPS:
            try:
                return self.note(row, status, why)
            except DatabaseError as error:
                print(f"{error}; tried again in {gap} s", flush=True)
                time.sleep(gap)
        return self.note(row, status, why)

    def note(self, row: Row, status: str, why: str) -> bool:
        """Write down how a row ended; return False if it is somebody else's now."""
        doubled = self._options.retry_delay << max(0, min(row.attempts - 1, 30))
        delay = min(doubled, LONGEST_DELAY)
        with self._opened() as db:
            moment = self._moment(db, delay if status == "planned" else 0)
            return self._change(db, row, Row(row.id, status, row.attempts, moment), why or None)


# --- the database


class Database:
    """A connection; a `?` in a statement stands for a value."""

    def __init__(self, address: str, password: str) -> None:
        self.kind = urlsplit(address).scheme or "sqlite"
        with one_line("options.database", Exception):  # each driver has its own
            self._db = connect(address, password)
        self.close = self._db.close

    def _done(self, sql: str, values: tuple[object, ...]) -> Any:
        cursor = self._db.cursor()
        cursor.execute(sql if self.kind == "sqlite" else sql.replace("?", "%s"), values)
        return cursor

    def rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        with one_line("options.database", self._db.Error):
            cursor = self._done(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row)) for row in cursor.fetchall()]

    def change(self, sql: str, *values: object) -> int:
        with one_line("options.database", self._db.Error):
            return int(self._done(sql, values).rowcount)

    def name(self, text: str) -> str:
        """Return a table or column as it stands in SQL; read_options() has checked its letters."""
        mark = "`" if self.kind == "mysql" else '"'
        return ".".join(f"{mark}{part}{mark}" for part in text.split("."))


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
    table: str = "queue"
    id_column: str = "id"
    program: tuple[str, ...] = ()
    program_timeout: int = 60
    max_retries: int = 5
    retry_delay: int = 60


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


def is_name(text: str) -> bool:
    return bool(re.fullmatch(r"\w+(\.\w+)*", text))


RULES = (
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
    ("table", lambda o: is_name(o.table), "must be a name of letters, digits and _"),
    ("id_column", lambda o: is_name(o.id_column), "must be a name of letters, digits and _"),
    ("program", lambda o: o.program, "is empty; name the program that a row is handed to"),
    (
        "program",
        lambda o: shutil.which(o.program[0]),
        "is not there or cannot be started; give its whole path",
    ),
    ("program_timeout", lambda o: o.program_timeout > 0, "must be at least 1 second"),
    ("max_retries", lambda o: o.max_retries >= 0, "must be 0 or more"),
    ("retry_delay", lambda o: o.retry_delay > 0, "must be at least 1 second"),
)


def read_options(given: dict[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    options = Options(**{key: read_option(key, value) for key, value in given.items()})
    for key, holds, rule in RULES:
        if not holds(options):
            raise ValueError(f"options.{key}: {rule}")
    return options


def read_option(key: str, value: Any) -> Any:
    """Return a value as the type of its default: what a .toml leaves out is set as text."""
    if key not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    kind = type(Options._field_defaults[key])
    if kind is int and isinstance(value, str) and re.fullmatch("[0-9]+", value):
        value = int(value)
    elif kind is tuple and isinstance(value, str):
        value = tuple(re.split(r"\s*,\s*", value))
    elif isinstance(value, list):
        value = tuple(value)
    texts = value if kind is tuple else (value,) if kind is str else ()
    if type(value) is not kind or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if any(re.search(r"[\0\r\n]", text) for text in texts):
        raise ValueError(f"options.{key}: must stand on one line; remove what breaks it")
    return value
