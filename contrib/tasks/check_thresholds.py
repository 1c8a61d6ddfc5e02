# /// script
# [tool.bgtasks]
# description = "Tell when a ticket has used so much of its time"
# schedule = "every 5 min"
# settings = ["outbox", "timezone"]
#
# [tool.bgtasks.options]
# database = ""          # path of an SQLite file, or postgresql://user@host/name, or mysql://...
# password = ""          # not here: task.check_thresholds.options.password = ... in the param file
# query = ""             # yields id, started, and seconds or due
# pauses = ""            # a second query, if there are any: yields id, started, ended
# limits = [50, 75, 100] # percent of the time
# hours = ["mon-sun 00:00-24:00"] # in which the clock goes, such as "mon-fri 08:00-17:00"
# holidays = []          # on which it stands still: "2026-04-03", or each year "12-25"
# timezone = ""          # of these; empty: the setting timezone
# stored_timezone = ""   # of times that are stored without one, often "UTC"; empty: the same
# mail_to = []           # who is told
# command = []           # instead of mail: a program that gets each crossing as JSON on stdin
# command_timeout = 60   # seconds
# ///
"""Escalate once when a limit is crossed: copy or link this file into tasks.d, and set the options.

The query yields a row for each item whose clock runs, with these columns, and others as you like:

* id: text or number that names the item and the limit, such as `TTR of ticket 12`.
* started: when its clock began. Where this changes, it is another clock, and escalates anew.
* seconds: of working time until 100 %. Or due: the moment of 100 %, had there been no pauses.
* paused (may be missing): seconds of working time that were spent in pauses.
* title, mail_to (may be missing): what the mail says; who gets it instead of options.mail_to.

The second query yields the pauses: id, started, ended; NULL if it goes on. Both ways can be mixed.
Moments are Unix seconds, or dates and times. Queries are asked where nothing can be written.

A mail lists all that crossed a limit since the last run, each with its highest limit. It is written
hidden into the outbox, then noted as sent, then shown: whenever this is killed, a crossing is
mailed once. A command is called for each limit in turn; killed between its exit and the note, it is
called again. What was escalated is remembered in NAME.escalated.db in the state folder.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import itertools
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import zoneinfo
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any, NamedTuple, Optional
from urllib.parse import parse_qsl, quote, unquote, urlsplit

CONNECT_SECONDS = 30
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = 86400
FARTHEST = 100 * 365 * DAY  # a clock that is due in the year 9999 need not be counted day by day
REMEMBERED = 90 * DAY  # after an item has left the query
ADDRESS = r"(?a)(?!-)[\w.!#$%&'*+/=^`{|}~-]+@[\w.-]+"  # what a mail can be sent to without SMTPUTF8
TYPES = {str: "text in quotes", int: "a whole number", tuple: "a list"}
MYSQL_OPTIONS = {"unix_socket", "ssl_ca"}  # what may follow ? in mysql://...
READ_ONLY = {
    "sqlite": "PRAGMA query_only = 1",
    "postgresql": "SET default_transaction_read_only = on",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
}
Zone = Optional[dt.tzinfo]  # None is the machine's own


class DatabaseError(Exception):
    """The database cannot be used, or does not yield what is needed; the run ends."""


class OutboxError(Exception):
    """The outbox takes no mail; nothing is noted, so the next run tries again."""


class ItemError(Exception):
    """An item cannot be judged or escalated; the others go on."""


def run(task: Any) -> str | None:
    return check(task, time.time())


def check(task: Any, now: float) -> str | None:
    options = read_options(task.options)
    if not {"outbox", "timezone"} <= task.settings.keys():  # of a .toml without them
        raise ValueError('settings: must be ["outbox", "timezone"], as in check_thresholds.py')
    zone = read_zone(options.timezone or task.settings["timezone"])
    items, problems = read_items(options, zone, now)
    path = os.path.join(task.state_dir, f"{task.name}.escalated.db")
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            new, more = escalate(task, Ledger(db, task, now), items, options, zone)
    except sqlite3.Error as error:
        damaged = type(error) is sqlite3.DatabaseError  # others, such as a full disk, pass
        text = "; remove it, and all is escalated anew" if damaged else ""
        raise DatabaseError(f"{path}: {error}{text}") from None
    problems += more
    if problems:
        raise ItemError(f"{len(problems)} could not be handled; the last: {problems[-1]}")
    task.message = f"{task.volume} escalated" if new else ""
    return None if new else task.NOTHING


def escalate(
    task: Any, ledger: Ledger, items: list[Item], options: Options, zone: Zone
) -> tuple[int, list[str]]:
    """Return how many limits were crossed anew, and what is wrong with some."""
    problems: list[str] = []
    ledger.show_mails()  # of a run that was killed
    new = ledger.new_ones(crossings(items, options.limits))
    if options.command:
        problems = call_each(task, ledger, new, options)
    elif new:
        mail_all(ledger, new, options, zone)
        task.add_volume(len(new))
    ledger.forget(items)
    return len(new), problems


# --- what the queries yield


class Clock(NamedTuple):
    """An item as it is stored. All moments are Unix seconds."""

    row: dict[str, Any]
    started: float
    due: float | None
    seconds: float
    pauses: list[tuple[float, float]]


def read_clocks(options: Options, zone: Zone, now: float) -> tuple[list[Clock], list[str]]:
    """Return the items, and what is wrong with those that cannot be read."""
    rows, pauses = asked(options)
    stored = read_zone(options.stored_timezone) if options.stored_timezone else zone
    clocks, problems = [], []
    for row in rows:
        try:
            clocks.append(read_clock(row, pauses.get(str(row["id"]), []), stored, now))
        except ItemError as error:
            problems.append(f"{row['id']}: {error}")
            print(problems[-1])
    return clocks, problems


def asked(options: Options) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return the rows of the first query, and those of the second by their id."""
    pauses: dict[str, list[dict[str, Any]]] = {}
    with contextlib.closing(Database(options.database, options.password)) as db:
        db.rows("database", READ_ONLY[urlsplit(options.database).scheme or "sqlite"])
        rows = yielded(db, "query", options.query, {"id", "started"})
        if rows and not {"seconds", "due"} & rows[0].keys():
            raise DatabaseError("options.query: yields neither a column seconds nor due")
        if options.pauses:
            for row in yielded(db, "pauses", options.pauses, {"id", "started", "ended"}):
                pauses.setdefault(str(row["id"]), []).append(row)
    return rows, pauses


def yielded(db: Database, key: str, sql: str, needed: set[str]) -> list[dict[str, Any]]:
    rows = [{name.lower(): value for name, value in row.items()} for row in db.rows(key, sql)]
    for name in sorted(needed - rows[0].keys()) if rows else ():
        raise DatabaseError(f"options.{key}: yields no column {name}, but {', '.join(rows[0])}")
    return rows


def read_clock(row: dict[str, Any], pauses: list[dict[str, Any]], zone: Zone, now: float) -> Clock:
    if row["id"] is None:
        raise ItemError("has no id")
    started, due = moment(row["started"], zone), row.get("due")
    if abs(started - now) > FARTHEST:  # milliseconds, or the 0001-01-01 of who stores no NULL
        raise ItemError(f"started {row['started']}, which is more than 100 years away")
    return Clock(
        row,
        started,
        None if due is None else min(max(moment(due, zone), now - FARTHEST), now + FARTHEST),
        number(row.get("seconds"), "seconds (nor due)") if due is None else 0.0,
        [
            (moment(pause["started"], zone), now if end is None else moment(end, zone))
            for pause in pauses
            for end in [pause["ended"]]
        ],
    )


def number(value: Any, name: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise ItemError(f"has no {name}, but {value!r}") from None
    if not math.isfinite(found):
        raise ItemError(f"has no {name}, but {value!r}")
    return found


def moment(value: Any, zone: Zone) -> float:
    """Return the Unix seconds that a database means by what it stores."""
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime.combine(value, dt.time())
    if isinstance(value, str) and not re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value):
        with contextlib.suppress(ValueError):  # else it is said below
            value = dt.datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value.strip()))
    if isinstance(value, dt.datetime):
        with contextlib.suppress(ValueError, OverflowError):
            return (value if value.tzinfo else value.replace(tzinfo=zone)).timestamp()
    return number(value, "moment that can be read")


# --- working time


class Span(NamedTuple):
    """Working hours that begin on these weekdays; an end beyond 24:00 lies on the next day."""

    days: frozenset[int]
    start: int  # minutes after midnight
    end: int


def read_span(text: str) -> Span:
    """Read `mon-fri 08:00-17:00` or `sun 22:00-06:00`."""
    days, clock = "|".join(DAYS), r"([01]\d|2[0-4]):([0-5]\d)"
    found = re.fullmatch(rf"({days})(?:-({days}))?\s+{clock}-{clock}", text.strip().lower())
    if not found:
        raise ValueError(f'{text!r} is not like "mon-fri 08:00-17:00"')
    first, last = DAYS.index(found[1]), DAYS.index(found[2] or found[1])
    start, end = (int(found[at]) * 60 + int(found[at + 1]) for at in (3, 5))
    if start >= 1440 or end > 1440:
        raise ValueError(f"{text!r} has a time after 24:00")
    weekdays = frozenset((first + step) % 7 for step in range((last - first) % 7 + 1))
    return Span(weekdays, start, end if end > start else end + 1440)


def read_holiday(text: str) -> str:
    """Read `2026-04-03` or `12-25`."""
    if not re.fullmatch(r"(\d{4}-)?\d\d-\d\d", text):
        raise ValueError(f'{text!r} is not like "2026-04-03" or "12-25"')
    dt.date.fromisoformat(text if len(text) > 5 else f"2000-{text}")
    return text


class Calendar:
    """Working time between two moments, as intervals and what was worked before each."""

    def __init__(self, options: Options, zone: Zone, first: float, last: float) -> None:
        self._spans = [read_span(text) for text in options.hours]
        self._holidays = frozenset(options.holidays)
        self._zone = zone
        intervals = merged(self._intervals(first, last))
        self._starts = [start for start, _ in intervals]
        self._ends = [end for _, end in intervals]
        lengths = (end - start for start, end in intervals)
        self._before = list(itertools.accumulate(lengths, initial=0.0))

    def _intervals(self, first: float, last: float) -> Iterator[tuple[float, float]]:
        day = dt.datetime.fromtimestamp(first - 2 * DAY, self._zone).date()
        end = dt.datetime.fromtimestamp(last + 2 * DAY, self._zone).date()
        while day <= end:
            text = day.isoformat()
            if text not in self._holidays and text[5:] not in self._holidays:
                midnight = dt.datetime.combine(day, dt.time())
                for span in self._spans:
                    if day.weekday() in span.days:
                        yield self._moments(midnight, span)
            day += dt.timedelta(days=1)

    def _moments(self, midnight: dt.datetime, span: Span) -> tuple[float, float]:
        start, end = (midnight + dt.timedelta(minutes=at) for at in span[1:])
        return instant(start, self._zone, 0), instant(end, self._zone, 1)

    def worked(self, start: float, end: float) -> float:
        return self._until(end) - self._until(start) if end > start else 0.0

    def _until(self, moment: float) -> float:
        at = bisect_right(self._starts, moment) - 1
        return self._before[at] + min(moment, self._ends[at]) - self._starts[at] if at >= 0 else 0.0


def instant(local: dt.datetime, zone: Zone, fold: int) -> float:
    """Return when a clock on the wall shows this: of two times the first (fold 0) or the last.

    One that the clock skips is where it goes on."""
    while True:
        found = local.replace(tzinfo=zone, fold=fold).timestamp()
        if dt.datetime.fromtimestamp(found, zone).replace(tzinfo=None, fold=0) == local:
            return found
        local += dt.timedelta(minutes=1)


def merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the intervals in order, with those joined that overlap or touch."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


# --- how much of its time each item has used


class Item(NamedTuple):
    id: str
    started: float
    total: float  # seconds of working time until 100 %
    elapsed: float
    columns: dict[str, Any]

    def key(self) -> tuple[str, float]:
        return self.id, self.started


class Crossing(NamedTuple):
    item: Item
    limit: int  # percent

    def key(self) -> tuple[str, float, int]:
        return (*self.item.key(), self.limit)


def read_items(options: Options, zone: Zone, now: float) -> tuple[list[Item], list[str]]:
    """Return the items, and what is wrong with those that cannot be judged."""
    clocks, problems = read_clocks(options, zone, now)
    moments = [now, *(clock.started for clock in clocks)]
    moments += [clock.due for clock in clocks if clock.due is not None]
    calendar = Calendar(options, zone, min(moments), max(moments))
    items = []
    for clock in clocks:
        try:
            if clock.started <= now:  # else it has not begun
                items.append(judged(clock, calendar, now))
        except ItemError as error:
            problems.append(f"{clock.row['id']}: {error}")
            print(problems[-1])
    return items, problems


def judged(clock: Clock, calendar: Calendar, now: float) -> Item:
    start, due, spent = clock.started, clock.due, calendar.worked
    if due is not None and not spent(start, due):  # no working hours until then: each second counts
        spent = passed
    elapsed = spent(start, now) - number(clock.row.get("paused") or 0, "number in paused")
    for begun, ended in merged(clock.pauses):
        elapsed -= spent(max(begun, start), min(ended, now))
    total = clock.seconds if due is None else spent(start, due)
    return Item(str(clock.row["id"]), start, total, max(0.0, elapsed), clock.row)


def passed(start: float, end: float) -> float:
    return max(0.0, end - start)


def crossings(items: list[Item], limits: tuple[int, ...]) -> list[Crossing]:
    """Return each limit that an item has reached, its lowest first."""
    return [
        Crossing(item, limit)
        for item in items
        for limit in sorted(limits)
        if item.elapsed * 100 >= item.total * limit
    ]


# --- what was escalated


class Ledger:
    """An SQLite file that remembers what was escalated, and which mails are not shown yet."""

    def __init__(self, db: sqlite3.Connection, task: Any, now: float) -> None:
        self._db, self._task, self._now = db, task.name, now
        self._outbox = task.settings["outbox"]
        self._db.execute("""
            CREATE TABLE IF NOT EXISTS escalated (
                id TEXT NOT NULL, started REAL NOT NULL, percent INTEGER NOT NULL,
                seen REAL NOT NULL, -- when it was in the query, to a day
                PRIMARY KEY (id, started, percent)
            )
        """)
        self._db.execute("CREATE TABLE IF NOT EXISTS mail (name TEXT PRIMARY KEY)")

    def new_ones(self, crossings: list[Crossing]) -> list[Crossing]:
        sql = "SELECT 1 FROM escalated WHERE id = ? AND started = ? AND percent = ?"
        each = {crossing.key(): crossing for crossing in crossings}  # a query may yield one twice
        return [each[key] for key in each if not self._db.execute(sql, key).fetchone()]

    def note(self, crossings: list[Crossing], mails: list[str]) -> None:
        if mails:
            sync(self._outbox)
        rows = [(*crossing.key(), self._now) for crossing in crossings]
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT INTO escalated VALUES (?, ?, ?, ?)", rows)
        self._db.executemany("INSERT INTO mail VALUES (?)", [(name,) for name in mails])
        self._db.execute("COMMIT")

    def hide_mail(self, content: bytes) -> str:
        """Write a mail, and return the name under which it is to be shown."""
        name = f"{self._task}.{os.urandom(8).hex()}.eml"  # no name of a task holds a dot
        hidden = self._place(f".{name}")
        try:
            os.makedirs(self._outbox, mode=0o700, exist_ok=True)
            fd = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(hidden)
            raise OutboxError(f"{self._outbox}: {error.strerror}") from None
        return name

    def show_mails(self) -> None:
        """Show what was noted, and remove what a run wrote that was killed before it could note."""
        names = [name for (name,) in self._db.execute("SELECT name FROM mail")]
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it was shown, and maybe sent
                os.rename(self._place(f".{name}"), self._place(name))
        if names:
            sync(self._outbox)
            self._db.execute("DELETE FROM mail")
        for name in os.listdir(self._outbox) if os.path.isdir(self._outbox) else ():
            if name.startswith(f".{self._task}.") and name.endswith(".eml"):
                os.unlink(self._place(name))

    def _place(self, name: str) -> str:
        return os.path.join(self._outbox, name)

    def forget(self, items: list[Item]) -> None:
        """Forget what has long left the query, and note what is still in it."""
        sql = "UPDATE escalated SET seen = ? WHERE id = ? AND started = ? AND seen < ?"
        rows = [(self._now, *item.key(), self._now - DAY) for item in items]
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(sql, rows)
        self._db.execute("DELETE FROM escalated WHERE seen < ?", (self._now - REMEMBERED,))
        self._db.execute("COMMIT")


def sync(folder: str) -> None:
    """See that the names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- escalation


def mail_all(ledger: Ledger, new: list[Crossing], options: Options, zone: Zone) -> None:
    highest = {crossing.item.key(): crossing for crossing in new}  # the last of an item
    listed: dict[str, list[Crossing]] = {}
    for crossing in sorted(highest.values(), key=lambda crossing: -crossing.limit):
        for address in addresses(crossing.item, options):
            listed.setdefault(address, []).append(crossing)
    mails = [mail(address, those, zone) for address, those in listed.items()]
    ledger.note(new, [ledger.hide_mail(content) for content in mails])
    ledger.show_mails()


def addresses(item: Item, options: Options) -> list[str]:
    """Return who is told of an item: whom it names itself, if these can be addresses."""
    named = re.findall(r"[^,;\s]+", str(item.columns.get("mail_to") or ""))
    good = named and all(re.fullmatch(ADDRESS, address) for address in named)
    return list(dict.fromkeys(named if good else options.mail_to))


def mail(address: str, crossings: list[Crossing], zone: Zone) -> bytes:
    first = crossings[0]
    message = EmailMessage()
    message["To"] = address
    more = f", and {len(crossings) - 1} more" if len(crossings) > 1 else ""
    message["Subject"] = shown(f"{first.limit} %: {first.item.id}", 100) + more
    lines = [line for crossing in crossings for line in described(crossing, zone)]
    message.set_content("\n".join(["So much of its time is used:", "", *lines]))
    return message.as_bytes(policy=SMTP)


def described(crossing: Crossing, zone: Zone) -> Iterator[str]:
    item = crossing.item
    title = f": {item.columns['title']}" if item.columns.get("title") else ""
    yield shown(f"{crossing.limit} % {item.id}{title}", 500)
    started = dt.datetime.fromtimestamp(item.started, zone)
    yield f"    {duration(item.elapsed)} of {duration(item.total)}, since {started:%Y-%m-%d %H:%M}"
    yield ""


def shown(text: str, most: int) -> str:
    """Return a text from the database as one line that a mail can hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:most]


def duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes:02} min"


def call_each(task: Any, ledger: Ledger, new: list[Crossing], options: Options) -> list[str]:
    """Hand each crossing to the command; a limit waits for the one before it."""
    problems: dict[str, str] = {}
    for done, crossing in enumerate(task.each(new), start=1):
        if crossing.item.id in problems:
            continue
        try:
            call(crossing, options)
            ledger.note([crossing], [])
            task.add_volume(1)
        except ItemError as error:
            problems[crossing.item.id] = f"{crossing.item.id}: {error}"
            print(problems[crossing.item.id], flush=True)
        task.progress(done, len(new))
    return list(problems.values())


def call(crossing: Crossing, options: Options) -> None:
    item = crossing.item
    facts = {"id": item.id, "limit": crossing.limit, "elapsed": item.elapsed, "total": item.total}
    text = json.dumps({**facts, "columns": item.columns}, default=str).encode()
    try:
        subprocess.run(options.command, input=text, timeout=options.command_timeout, check=True)
    except subprocess.CalledProcessError as error:
        raise ItemError(f"the command ended with {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise ItemError(f"the command did not end within {options.command_timeout} s") from None
    except OSError as error:
        raise ItemError(f"the command did not start: {error.strerror}") from None


# --- the database


class Database:
    """A connection."""

    def __init__(self, address: str, password: str) -> None:
        with one_line("options.database", Exception):  # each driver has its own
            self._db = connect(address, password)
        self.close = self._db.close

    def rows(self, key: str, sql: str) -> list[dict[str, Any]]:
        with one_line(f"options.{key}", self._db.Error):
            cursor = self._db.cursor()
            cursor.execute(sql)
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row)) for row in cursor.fetchall()] if names else []


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
    query: str = ""
    pauses: str = ""
    limits: tuple[int, ...] = (50, 75, 100)
    hours: tuple[str, ...] = ("mon-sun 00:00-24:00",)
    holidays: tuple[str, ...] = ()
    timezone: str = ""
    stored_timezone: str = ""
    mail_to: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    command_timeout: int = 60


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


def read_zone(name: str) -> Zone:
    """Return a zone by its name; None is the machine's own."""
    try:
        return zoneinfo.ZoneInfo(name) if name else None
    except (KeyError, ValueError, OSError):
        text = f"options.timezone: {name!r} is no zone of this machine; maybe: pip install tzdata"
        raise ValueError(text) from None


def is_read(read: Callable[[str], object], texts: Iterable[str]) -> bool:
    """Tell whether these can all be read."""
    try:
        return all(read(text) for text in texts)
    except ValueError:
        return False


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
    ("query", lambda o: o.query.strip(), "is empty; it must yield id, started, seconds or due"),
    ("limits", lambda o: o.limits and min(o.limits) > 0, "must be percents, such as 50, 75, 100"),
    (
        "hours",
        lambda o: o.hours and is_read(read_span, o.hours),
        'must be a list of hours, each like "mon-fri 08:00-17:00"',
    ),
    (
        "holidays",
        lambda o: is_read(read_holiday, o.holidays),
        'must be a list of days, each like "2026-04-03" or "12-25"',
    ),
    (
        "stored_timezone",
        lambda o: is_read(lambda name: not name or read_zone(name), [o.stored_timezone]),
        'must be a zone of this machine, such as "UTC"',
    ),
    (
        "mail_to",
        lambda o: all(re.fullmatch(ADDRESS, address) for address in o.mail_to),
        "must be a list of addresses, each like you@example.org",
    ),
    ("mail_to", lambda o: o.mail_to or o.command, "is empty; set it, or command"),
    ("command", lambda o: not (o.command and o.mail_to), "must be empty if mail_to is set"),
    (
        "command",
        lambda o: not o.command or shutil.which(o.command[0]),
        "is not there or cannot be started; give its whole path",
    ),
    ("command_timeout", lambda o: o.command_timeout > 0, "must be at least 1 second"),
)


def read_options(given: dict[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    options = Options(**{key: read_option(key, value) for key, value in given.items()})
    read_zone(options.timezone)
    for key, holds, rule in RULES:
        if not holds(options):
            raise ValueError(f"options.{key}: {rule}")
    return options


def read_option(key: str, value: Any) -> Any:
    """Return a value as the type of its default: what a .toml leaves out is set as text."""
    if key not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    kind = type(Options._field_defaults[key])
    if kind is tuple and isinstance(value, str):
        value = re.split(r"\s*,\s*", value)
    inner = int if kind is int or key == "limits" else str
    values = value if isinstance(value, list) else [value]
    values = [
        int(each)
        if inner is int and isinstance(each, str) and re.fullmatch("[0-9]+", each)
        else each
        for each in values
    ]
    if isinstance(value, list) != (kind is tuple) or not all(
        type(each) is inner for each in values
    ):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if inner is str and any("\0" in each for each in values):
        raise ValueError(f"options.{key}: must not hold a NUL; remove it")
    return tuple(values) if kind is tuple else values[0]
