# /// script
# [tool.bgtasks]
# description = "Read and reset the counters of an application"
# schedule = "every 1 h"
#
# [tool.bgtasks.options]
# database = ""          # path of an SQLite file, or postgresql://user@host/name, or mysql://...
# password = ""          # not here: task.event_counter.options.password = ... in the param file
# counters = "event_counter" # the table in which the application counts
# name_column = "name"
# value_column = "value"
# names = []             # which counters; empty: all of them
# table = "statistic"    # made if it is not there: taken_at, name, value
# ///
"""Read and reset counters: copy or link this file into tasks.d, and set the options.

The application adds to a number in a table each time something happens. In one transaction, with
the table of the counters locked for that moment, each number is written into a time series and set
to 0: no event is lost or counted twice, however this is killed and whoever counts meanwhile. Rows
of the same name, such as one for each server, are added up.

By hand it draws what was counted: python3 event_counter.py --plot chart.svg /srv/app/app.db
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

CONNECT_SECONDS = 30
MYSQL_OPTIONS = {"unix_socket", "ssl_ca"}  # what may follow ? in mysql://...
TYPES: dict[type[object], str] = {str: "text in quotes", tuple: "a list of texts"}
NAME_TYPE = {
    "sqlite": "VARCHAR(100)",
    "postgresql": "VARCHAR(100)",
    "mysql": "VARCHAR(100) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",  # else `a` and `A` are one
}
SERIES = """
    CREATE TABLE IF NOT EXISTS {table} (
        taken_at BIGINT NOT NULL, -- Unix seconds
        name NAME_TYPE NOT NULL,
        value DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (name, taken_at)
    )
"""
MOST_NAME = 100
WIDTH, HEIGHT = 960, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 20, 40  # around the lines
DAY = 86400
# of Okabe and Ito, which all eyes can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
READ = "SELECT {column}, {value} FROM {table}"
RESET = "UPDATE {table} SET {value} = 0"
MOST_ROWS = 10_000  # of counters
LOCK_SECONDS = 10  # who counts waits behind us, while we wait for somebody's long transaction
BEFORE = {
    "sqlite": (),
    "postgresql": ("SET lock_timeout = '{seconds}s'",),
    "mysql": (
        "SET SESSION innodb_lock_wait_timeout = {seconds}",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",  # of the next: no new row in between
    ),
}


class DatabaseError(Exception):
    """The database cannot be used, or holds what is no number; nothing was changed."""


class CounterError(Exception):
    """A named counter is not there; the others were read."""


def run(task: Any) -> str | None:
    return collect(task, int(time.time()))


def collect(task: Any, now: int) -> str | None:
    options = read_options(task.options)
    with contextlib.closing(Database(options.database, options.password)) as db:
        db.make_series(options.table)
        refuse_unsafe(db, options)
        for sql in BEFORE[db.kind]:
            db.done(sql.format(seconds=LOCK_SECONDS))
        with db.transaction():
            counts = read_and_reset(db, options)
            for name, value in counts.items():
                keep(db, options.table, name, value, now)
    task.add_volume(len(counts))
    for name in options.names:
        if name not in counts:
            raise CounterError(f"options.names: {options.counters} has no counter {name!r}")
    task.message = f"{sum(counts.values()):.10g} events in {len(counts)} counters"
    return None if counts else task.NOTHING


def refuse_unsafe(db: Database, options: Options) -> None:
    """Tables of MyISAM and others know no transactions: what is counted meanwhile would be lost."""
    if db.kind != "mysql":
        return
    for name in (options.counters, options.table):
        schema, _, table = name.rpartition(".")
        sql = """
            SELECT table_name FROM information_schema.tables
            WHERE table_schema = COALESCE(NULLIF(?, ''), DATABASE()) AND table_name = ?
                AND engine <> 'InnoDB'
        """
        if db.rows(sql, schema, table):
            raise DatabaseError(f"{name}: has no transactions; ALTER TABLE {name} ENGINE=InnoDB")


def read_and_reset(db: Database, options: Options) -> dict[str, float]:
    names = {
        "table": options.counters,
        "column": options.name_column,
        "value": options.value_column,
    }
    if db.kind == "postgresql":
        db.done("LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE", **names)
    counts: dict[str, float] = {}
    for name in options.names or [None]:
        which, values = ("", ()) if name is None else (" WHERE {column} = ?", (name,))
        lock = " FOR UPDATE" if db.kind == "mysql" else ""
        rows = db.rows(READ + which + lock, *values, **names)
        if len(rows) > MOST_ROWS:
            raise DatabaseError(f"{options.counters}: has more than {MOST_ROWS} rows")
        for found, value in rows:
            key = name or named("", found)
            counts[key] = counts.get(key, 0.0) + number(value, f"{options.counters} {found}")
        db.done(RESET + which, *values, **names)
    return counts


def named(start: str, label: object) -> str:
    """Return the name of a figure; MySQL has texts that come as bytes."""
    text = label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)
    return (start + text)[:MOST_NAME].replace("\0", " ")


def number(value: Any, where: str) -> float:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(float(value or 0)):
            return float(value or 0)
    raise DatabaseError(f"{where}: must hold a number, not {str(value)[:100]!r}")


def keep(db: Database, table: str, name: str, value: float, now: int) -> None:
    """Note a count; if another run noted one in this second, they are added."""
    sql = "SELECT value FROM {table} WHERE name = ? AND taken_at = ?"
    noted = sum(row[0] for row in db.rows(sql, name, now, table=table))
    db.done("DELETE FROM {table} WHERE name = ? AND taken_at = ?", name, now, table=table)
    sql = "INSERT INTO {table} (taken_at, name, value) VALUES (?, ?, ?)"
    db.done(sql, now, name, value + noted, table=table)


# --- the database


class Database:
    """A connection; a `?` in a statement stands for a value."""

    def __init__(self, address: str, password: str, where: str = "options.database") -> None:
        self.kind, self._where = urlsplit(address).scheme or "sqlite", where
        with one_line(where, Exception):  # each driver has its own
            self._db = connect(address, password)
        self.close = self._db.close

    def done(self, sql: str, *values: object, where: str = "", **names: str) -> Any:
        """Run a statement, and return its cursor. Names stand in {} in it; without any of them and
        without values it runs as it is."""
        if names:
            sql = sql.format(**{key: self._name(text) for key, text in names.items()})
        if values and self.kind != "sqlite":
            sql = sql.replace("?", "%s")
        with one_line(where or self._where, self._db.Error):
            cursor = self._db.cursor()
            cursor.execute(sql, *([values] if values else []))
            return cursor

    def rows(self, sql: str, *values: object, where: str = "", **names: str) -> list[Any]:
        cursor = self.done(sql, *values, where=where, **names)
        with one_line(where or self._where, self._db.Error):
            found = cursor.fetchmany(MOST_ROWS + 1) if cursor.description else []
            return [tuple(row) for row in found]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Let all statements in it count, or none."""
        self.done("BEGIN IMMEDIATE" if self.kind == "sqlite" else "BEGIN")
        try:
            yield
            self.done("COMMIT")
        except BaseException:
            with contextlib.suppress(DatabaseError):  # a lost connection rolls back by itself
                self.done("ROLLBACK")
            raise

    def make_series(self, table: str) -> None:
        """Make the table of the figures if it is not there: not all users may make one."""
        try:
            self.done("SELECT taken_at, name, value FROM {table} WHERE 1 = 0", table=table)
        except DatabaseError:
            self.done(SERIES.replace("NAME_TYPE", NAME_TYPE[self.kind]), table=table)

    def _name(self, text: str) -> str:
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
    counters: str = "event_counter"
    name_column: str = "name"
    value_column: str = "value"
    names: tuple[str, ...] = ()
    table: str = "statistic"


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


NAME = "must be a name of letters, digits and _"
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
    ("counters", lambda o: is_name(o.counters), NAME),
    ("name_column", lambda o: is_name(o.name_column), NAME),
    ("value_column", lambda o: is_name(o.value_column), NAME),
    (
        "names",
        lambda o: all(0 < len(name) <= MOST_NAME for name in o.names),
        "must be a list of names",
    ),
    ("table", lambda o: is_name(o.table), NAME),
    ("table", lambda o: o.table != o.counters, "must be another one than options.counters"),
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
    kind: type[object] = type(Options._field_defaults[key])
    if kind is tuple and isinstance(value, str):
        value = tuple(re.split(r"\s*,\s*", value))
    elif isinstance(value, list):
        value = tuple(value)
    texts = value if kind is tuple else (value,) if kind is str else ()
    if type(value) is not kind or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if any(re.search(r"[\0\r\n]", text) for text in texts):
        raise ValueError(f"options.{key}: must stand on one line; remove what breaks it")
    return value


# --- by hand: a chart of what was collected

COLLECTED = """
    SELECT name, taken_at, value FROM {table} WHERE taken_at >= ? ORDER BY name, taken_at
"""
Points = list[tuple[float, float]]


def main(arguments: list[str]) -> int:
    import argparse

    words = argparse.ArgumentParser(
        description="Draw what was collected.",
        epilog="The password of a server is taken from the variable DATABASE_PASSWORD.",
    )
    words.add_argument("--plot", metavar="FILE", required=True, help="the chart to write, an SVG")
    words.add_argument("--days", type=float, default=30.0, help="how far back (30)")
    words.add_argument("--table", default="statistic", help="where the figures are (statistic)")
    words.add_argument("database", help="path, postgresql://user@host/name or mysql://...")
    words.add_argument("name", nargs="*", help="which figures (all)")
    given = words.parse_args(arguments)
    try:
        if not is_name(given.table) or not 0 < given.days <= 36500:
            raise DatabaseError("--table must be a name, and --days more than 0, at most 36500")
        until = time.time()
        series = collected(given, until - given.days * DAY)
        write(given.plot, chart(series, until - given.days * DAY, until))
    except (DatabaseError, OSError) as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0


def collected(given: Any, since: float) -> dict[str, Points]:
    """Return the points of each figure, oldest first."""
    is_url = re.match("[a-z]+://", given.database)
    address = given.database if is_url else os.path.abspath(given.database)
    if not is_database(address):
        raise DatabaseError(f"{address}: is no path and no address of a database")
    password = os.environ.get("DATABASE_PASSWORD", "")
    series: dict[str, Points] = {name: [] for name in given.name}
    with contextlib.closing(Database(address, password, given.database)) as db:
        for name, taken_at, value in db.done(COLLECTED, int(since), table=given.table).fetchall():
            if not given.name or name in series:
                series.setdefault(name, []).append((float(taken_at), float(value)))
    for name in [name for name in series if not series[name]]:
        raise DatabaseError(f"{given.database}: has no figure {name!r} of that time")
    return series


def write(path: str, text: str) -> None:
    """Write a file whole or not at all: a web server may be showing it."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # to replace /dev/null would be bad
        raise OSError(f"{path}: is no file; name one that is to hold the chart")
    unfinished = f"{path}.{os.getpid()}.new"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


class Frame(NamedTuple):
    """Where a moment and a value stand in the picture."""

    since: float
    until: float
    bottom: float
    top: float

    def x(self, moment: float) -> float:
        share = (moment - self.since) / (self.until - self.since)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def thinned(points: Points, since: float, until: float) -> Points:
    """Return at most a bar for each three pixels: the sum of those that fall on it."""
    columns: dict[int, Points] = {}
    for moment, value in points:
        column = int((moment - since) / (until - since) * WIDTH / 3)
        columns.setdefault(column, []).append((moment, value))
    return [(those[-1][0], sum(value for _, value in those)) for those in columns.values()]


def drawn(points: Points, zero: float, colour: str) -> str:
    """Return bars that stand on the line of zero."""
    path = "".join(f"M{x} {zero}V{y}" for x, y in points)
    return f'<path d="{path}" stroke="{colour}" stroke-width="3" stroke-opacity="0.8"/>'


def summary(values: list[float]) -> str:
    return f"{sum(values):,.6g} in all, at most {max(values):,.6g} at a time"


def chart(series: dict[str, Points], since: float, until: float) -> str:
    """Return an SVG."""
    fewer = {name: thinned(points, since, until) for name, points in series.items()}
    values = [value for points in fewer.values() for _, value in points]
    marks = scale(min([0.0, *values]), max([0.0, *values]))
    frame = Frame(since, until, marks[0], marks[-1])
    height = HEIGHT + 20 * len(series) + 10
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    look = 'role="img" font-family="sans-serif" font-size="12"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>',
        f"<title>{shown(', '.join(series) or 'nothing was collected')}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *grid(frame, marks),
    ]
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(frame.x(moment), frame.y(value)) for moment, value in fewer[name]]
        lines.append(drawn(places, frame.y(0.0), colour))
        y, facts = HEIGHT + 20 * number, summary([value for _, value in points])
        lines.append(f'<rect x="{LEFT}" y="{y - 9}" width="16" height="10" fill="{colour}"/>')
        lines.append(f'<text x="{LEFT + 24}" y="{y}">{shown(name)}: {facts}</text>')
    return "\n".join([*lines, "</svg>", ""])


def grid(frame: Frame, marks: list[float]) -> Iterator[str]:
    for value in marks:
        y = frame.y(value)
        yield f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#dddddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:,.10g}</text>'
    for step in range(7):
        moment = frame.since + step * (frame.until - frame.since) / 6
        stamp = time.strftime("%m-%d %H:%M", time.localtime(moment))
        place = f'x="{frame.x(moment)}" y="{HEIGHT - BOTTOM + 20}"'
        anchor = "end" if step == 6 else "middle"
        yield f'<text {place} text-anchor="{anchor}">{stamp}</text>'


def scale(low: float, high: float) -> list[float]:
    """Return round values from below the lowest to above the highest."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [number * step for number in range(first, last + 1)]


def shown(text: str) -> str:
    """Return a text as XML can hold it."""
    return escape("".join(c if c.isprintable() else " " for c in text))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
