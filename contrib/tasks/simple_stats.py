# /// script
# [tool.bgtasks]
# description = "Sample figures of an application into a time series"
# schedule = "every 1 h"
#
# [tool.bgtasks.options]
# database = ""          # path of an SQLite file, or postgresql://user@host/name, or mysql://...
# password = ""          # not here: task.simple_stats.options.password = ... in the param file
# store = ""             # where the figures are kept, as database; empty: there
# store_password = ""
# table = "statistic"    # made if it is not there: taken_at, name, value
# queries = {}           # name = "SELECT COUNT(*) FROM ..."
# ///
"""Sample figures: copy or link this file into tasks.d, and set the options.

A query yields one number, or rows of a label and a number: then the label follows the name and a
dot. Queries are asked where nothing can be written. One that fails stops no other, and lets the run
fail at its end. A run that comes to its deadline goes on with the next query in the next run.

By hand it draws them: python3 simple_stats.py --plot chart.svg --days 30 /srv/app/statistic.db
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
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

CONNECT_SECONDS = 30
MYSQL_OPTIONS = {"unix_socket", "ssl_ca"}  # what may follow ? in mysql://...
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

MOST_ROWS = 1000  # of one query
READ_ONLY = {
    "sqlite": "PRAGMA query_only = 1",
    "postgresql": "SET default_transaction_read_only = on",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
}


class DatabaseError(Exception):
    """A database cannot be used; the run ends."""


class QueryError(Exception):
    """A query failed; the others go on."""


def run(task: Any) -> str | None:
    return sample(task, int(time.time()))


def sample(task: Any, now: int) -> str | None:
    options, problems = read_options(task.options), []
    # what a run asked that came to its deadline
    asked = [name for name in task.state.get("asked", ()) if name in options.queries]
    waiting = [name for name in sorted(options.queries) if name not in asked]
    source = Database(options.database, options.password)
    with contextlib.closing(source) as db, contextlib.closing(store(options)) as kept:
        db.done(READ_ONLY[db.kind])
        kept.make_series(options.table)
        for name in task.each(waiting):
            try:
                figures = read_figures(db, name, options.queries[name])
                keep(kept, options.table, figures, now)
                task.add_volume(len(figures))
            except QueryError as error:
                problems.append(str(error))
                print(error, flush=True)
            asked.append(name)
            task.state["asked"] = asked
    if len(asked) == len(options.queries):
        task.state["asked"] = []
    if problems:
        raise QueryError(f"{len(problems)} of {len(options.queries)} failed; {problems[-1]}")
    task.message = f"{task.volume} figures"
    return None


def store(options: Options) -> Database:
    """Return the database of the figures; a file is made if it is not there, but no folder."""
    if options.store.startswith("/"):
        try:
            open(options.store, "ab").close()
        except OSError as error:
            text = f"options.store: {options.store}: {error.strerror}"
            raise DatabaseError(text) from None
    if options.store:
        return Database(options.store, options.store_password, "options.store")
    return Database(options.database, options.password)


def read_figures(db: Database, name: str, sql: str) -> dict[str, float]:
    """Return what a query yields, by the names under which it is kept."""
    where = f"options.queries.{name}"
    try:
        rows = db.rows(sql, where=where)
    except DatabaseError as error:
        raise QueryError(str(error)) from None
    if len(rows) > MOST_ROWS:
        raise QueryError(f"{where}: yields more than {MOST_ROWS} rows")
    if rows and len(rows[0]) == 2:
        rows = [(named(f"{name}.", label), value) for label, value in rows]
    elif len(rows) == 1 and len(rows[0]) == 1:
        rows = [(name, rows[0][0])]
    elif rows:
        raise QueryError(f"{where}: must yield one number, or rows of a label and a number")
    return {key: number(value, where) for key, value in rows if value is not None}


def named(start: str, label: object) -> str:
    """Return the name of a figure; MySQL has texts that come as bytes."""
    text = label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)
    return (start + text)[:MOST_NAME].replace("\0", " ")


def number(value: Any, where: str) -> float:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(float(value)):
            return float(value)
    raise QueryError(f"{where}: must yield a number, not {str(value)[:100]!r}")


def keep(db: Database, table: str, figures: dict[str, float], now: int) -> None:
    with db.transaction():
        for name, value in figures.items():
            # of another run in this second
            db.done("DELETE FROM {table} WHERE name = ? AND taken_at = ?", name, now, table=table)
            sql = "INSERT INTO {table} (taken_at, name, value) VALUES (?, ?, ?)"
            db.done(sql, now, name, value, table=table)


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
    store: str = ""
    store_password: str = ""
    table: str = "statistic"
    queries: Mapping[str, str] = MappingProxyType({})


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


ADDRESS = (
    "must be the path of an SQLite file, postgresql://user@host/name or mysql://user@host/name"
)
HIDDEN = "must not hold the password, which others could see; set options."
RULES = (
    ("database", lambda o: is_database(o.database), ADDRESS),
    ("database", lambda o: not has_password(o.database), HIDDEN + "password"),
    ("store", lambda o: not o.store or is_database(o.store), ADDRESS),
    ("store", lambda o: not has_password(o.store), HIDDEN + "store_password"),
    ("table", lambda o: is_name(o.table), "must be a name of letters, digits and _"),
    ("queries", lambda o: o.queries, 'is empty; set options.queries.NAME = "SELECT COUNT(*) ..."'),
    (
        "queries",
        lambda o: all(re.fullmatch(r"[\w.-]{1,60}", name) for name in o.queries),
        "must have names of at most 60 letters, digits and . _ -",
    ),
)


def read_options(given: dict[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    queries = given.get("queries", {})
    if not isinstance(queries, dict):
        text = 'options.queries: must be a table, { name = "SELECT COUNT(*) ..." }'
        raise ValueError(text)  # noqa: TRY004 - all bad options are one
    prefix = "queries."  # as the param file sets one of them
    more = {key[len(prefix) :]: given[key] for key in given if key.startswith(prefix)}
    plain = {key: given[key] for key in given if key != "queries" and not key.startswith(prefix)}
    queries = {**queries, **more}
    for key, value in (*plain.items(), *((prefix + key, queries[key]) for key in queries)):
        check_option(key, value)
    options = Options(**plain, queries=queries)
    for key, holds, rule in RULES:
        if not holds(options):
            raise ValueError(f"options.{key}: {rule}")
    return options


def check_option(key: str, value: Any) -> None:
    if key.partition(".")[0] not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"options.{key}: must be text in quotes")


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
    """Return at most a point for each pixel: the mean of those that fall on it."""
    columns: dict[int, Points] = {}
    for moment, value in points:
        column = int((moment - since) / (until - since) * WIDTH)
        columns.setdefault(column, []).append((moment, value))
    return [
        (sum(at for at, _ in those) / len(those), sum(value for _, value in those) / len(those))
        for those in columns.values()
    ]


def drawn(points: Points, _zero: float, colour: str) -> str:
    """Return a line through points of the picture; one alone is a dot."""
    place = " ".join(f"{x},{y}" for x, y in (points if len(points) > 1 else points * 2))
    look = f'fill="none" stroke="{colour}" stroke-width="2" stroke-linecap="round"'
    return f'<polyline points="{place}" {look} stroke-linejoin="round"/>'


def summary(values: list[float]) -> str:
    return f"{values[-1]:,.6g} (from {min(values):,.6g} to {max(values):,.6g})"


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
