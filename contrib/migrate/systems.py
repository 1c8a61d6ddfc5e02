"""The task tables of iTop, GLPI, Magento and privacyIDEA into drafts of tasks.

a dump by mysqldump, a SQLite file, or mysql:DATABASE -> rows -> drafts, whose commands are the
systems' own
"""

from __future__ import annotations

import glob
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from functools import partial
from typing import Any, Callable, NamedTuple
from xml.etree import ElementTree as ET

from drafts import (
    ALIASES,
    FIELDS,
    Draft,
    Haul,
    MigrateError,
    bgtasks,
    every,
    open_source,
    quoted,
    settle_schedule,
    settle_zone,
)

# --- Expressions ----------------------------------------------------------------------------------
# Magento, and croniter in privacyIDEA, read the five fields unlike cron. In: an expression. Out:
# text that bgtasks reads as the same minutes; empty if they never come: so people switch tasks off.


def one_value(text: str, field: bgtasks.Field) -> int:
    names = field.names.split() if field.high in (6, 12) else []
    if text[:3] in names:
        return names.index(text[:3]) + field.low
    if not (text.isascii() and text.isdigit()):
        raise MigrateError(f"{field.name}: {text!r} is not understood")
    return int(text)


def magento_values(text: str, field: bgtasks.Field, *, is_one: bool) -> set[int]:
    """Return what a field matches. Steps count from 0: in Magento 1 always, else only for *."""
    found: set[int] = set()
    every_value = range(field.low, field.high + 1)
    for part in text.lower().split(","):
        base, slash, step_text = part.partition("/")
        first_text, dash, last_text = base.partition("-")
        if slash and not (step_text.isdigit() and int(step_text)):
            raise MigrateError(f"{field.name}: {part!r} is not understood")
        step = int(step_text or 1)
        first = 0 if base == "*" else one_value(first_text, field)
        last = field.high if base == "*" or (slash and not dash and not is_one) else first
        last = one_value(last_text, field) if dash else last
        origin = 0 if is_one else first
        found.update(v for v in every_value if first <= v <= last and (v - origin) % step == 0)
    return found


def as_list(values: set[int], field: bgtasks.Field) -> str:
    """Return values as a field that does not begin with `*`, unless all are there."""
    words, rest = [], sorted(values)
    if len(rest) == field.high - field.low + 1:
        return "*"
    while rest:
        length = next((n for n in range(len(rest)) if rest[n] != rest[0] + n), len(rest))
        length = length if length > 2 else 1
        run, rest = rest[:length], rest[length:]
        words.append(f"{run[0]}-{run[-1]}" if length > 2 else str(run[0]))
    return ",".join(words)


def both_days(days: set[int], weekdays: set[int]) -> tuple[str, str]:
    """Return day of month and day of week so that both must match; cron can say that of few."""
    day, weekday = as_list(days, FIELDS[2]), as_list(weekdays, FIELDS[4])
    if "*" in (day, weekday):
        return day, weekday
    for step in range(2, 32):
        if days == set(range(1, 32, step)):
            return f"*/{step}", weekday
    weeks = sorted({(number - 1) // 7 for number in days})
    whole = {week * 7 + number for week in weeks for number in range(1, 8)}
    if days != whole or weeks[-1] > 3:
        raise MigrateError(
            "both its day of month and day of week must match: no schedule says that"
        )
    return "*", ",".join(f"{w}#{week + 1}" for w in sorted(weekdays) for week in weeks)


def read_magento_expression(text: str, *, is_one: bool) -> str:
    words = text.split()
    if text in (*ALIASES, "always"):
        return text
    if len(words) != 5:
        raise MigrateError(f"{text!r} has not 5 fields")
    values = [magento_values(word, f, is_one=is_one) for word, f in zip(words, FIELDS)]
    if not all(values):
        return ""
    return in_cron_words(words, values, both_days(values[2], values[4]))


def numbers_of(found: Sequence[Any], field: bgtasks.Field) -> set[int]:
    """Return what croniter made of a field; a Sunday can be 7 there."""
    if found == ["*"]:
        return set(range(field.low, field.high + 1))
    return {int(value) % 7 if field.high == 6 else int(value) for value in found}


def read_croniter_expression(text: str) -> str:
    """Return what croniter reads: either day is enough, unless one is a *, and */2 is none."""
    try:
        from croniter import croniter
    except ImportError:
        text = "the schedules of privacyIDEA need croniter: pip install croniter"
        raise MigrateError(text) from None
    words = text.split()
    if text in ALIASES or re.search(r"[#lw]", re.sub("jul|wed", "", text.lower())):
        return " ".join(words)  # croniter's own signs, which bgtasks has from it too
    try:
        lists = croniter.expand(text)[0]
    except ValueError as error:
        raise MigrateError(str(error)) from None
    if len(lists) != 5:
        raise MigrateError(f"{text!r} has not 5 fields")
    values = [numbers_of(found, field) for found, field in zip(lists, FIELDS)]
    days = [as_list(values[place], FIELDS[place]) for place in (2, 4)]
    if "*" in days and ["*"] not in (lists[2], lists[4]):
        days = ["*", "*"]  # either is enough, and one always matches
    return in_cron_words(words, values, days)


def in_cron_words(words: Sequence[str], values: Sequence[set[int]], days: Sequence[str]) -> str:
    result = [as_list(found, field) for found, field in zip(values, FIELDS)]
    result[2], result[4] = days
    for place, field in enumerate(FIELDS[:2]):  # with a * it follows real time at clock changes
        is_step = re.fullmatch(r"\*/0*[1-9]\d*", words[place])
        if is_step and values[place] == set(field.span(words[place])):
            result[place] = words[place]
    return " ".join(result)


def settle_expression(draft: Draft, text: str, read: Callable[[str], str]) -> None:
    try:
        settle_schedule(draft, read(text))
    except MigrateError as error:
        draft.pause(str(error))
        return
    if draft.settings["schedule"] not in ("manual", " ".join(text.split())):
        draft.notes.append(f"{text!r} is written as cron says it, for the same minutes")


# --- Tables ---------------------------------------------------------------------------------------
# In: a dump by mysqldump, a SQLite file, or `mysql:DATABASE`. Out: rows of text by table. Tables
# may have a prefix. A dump is read once, as it comes: it may be large, and a pipe.

HEAD = re.compile(
    rb"\s*(CREATE TABLE|INSERT|REPLACE|COPY)(?: IF NOT EXISTS)?(?:\s+IGNORE)?(?:\s+INTO)?\s+"
    rb"(?:[`\"]?[\w$-]+[`\"]?\.)?[`\"]?([\w$-]+)[`\"]?",
    re.IGNORECASE,
)
COLUMN = re.compile(
    rb"^\s*(?!(?:PRIMARY|UNIQUE|FULLTEXT|KEY|INDEX|CONSTRAINT|FOREIGN|CHECK)\b)[`\"]?(\w+)[`\"]?\s",
    re.MULTILINE,
)
TOKEN = re.compile(
    rb"\s*(?:([(),;])|(NULL)|(?:_\w+\s*|[bBnN])?'([^'\\]*(?:(?:\\.|'')[^'\\]*)*)'"
    rb"|0x([0-9A-Fa-f]+)|([-+.\w]+))",
    re.DOTALL,
)
ESCAPES = {b"0": b"\0", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"Z": b"\x1a"}

Row = Mapping[str, Any]
Keys = Mapping[
    str, tuple[str, ...]
]  # the wanted tables: by which columns their rows are told apart


class Rows:
    """What was read: rows by table and key; the last of equal ones stays."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.found: dict[str, dict[tuple[Any, ...], Row]] = {}

    def base(self, name: str) -> str:
        """Return which wanted table this is, or nothing: a prefix may stand before it."""
        return next((base for base in self.keys if name.lower().endswith(base)), "")

    def add(self, table: str, row: Row) -> None:
        found = self.found.setdefault(table, {})
        key = tuple(row.get(column) for column in self.keys[self.base(table)])
        found[key if any(key) else (len(found),)] = row

    def of(self, base: str, source: str) -> list[Row]:
        names = [name for name in self.found if self.base(name) == base]
        names = [name for name in names if name.lower() == base] or names
        if len(names) > 1:
            raise MigrateError(f"{source}: {' and '.join(names)} look alike; dump only one of them")
        if not names and base == next(iter(self.keys)):
            text = f"has no table {base}; is it a whole dump by mysqldump, and of that database?"
            raise MigrateError(f"{source}: {text}")
        return list(self.found[names[0]].values()) if names else []


def unescaped(text: bytes) -> str:
    def plain(found: re.Match[bytes]) -> bytes:
        return ESCAPES.get(found[1], found[1]) if found[1] else b"'"

    return re.sub(rb"\\(.)|''", plain, text, flags=re.DOTALL).decode("utf-8", "replace")


def statements(dump: Iterable[bytes], rows: Rows) -> Iterator[tuple[bytes, str, bytes]]:
    r"""Return the statements about wanted tables: what they do, the table, and the rest.

    A dump writes a newline within a text as \n, so that a statement ends where a line does."""
    head, text = None, list[bytes]()
    for line in dump:
        if head is None:
            head = HEAD.match(line)
            if not head or not rows.base(head[2].decode()):
                head = None
                continue
        text.append(line[head.end() :] if not text else line)
        if line.rstrip().endswith(b";"):
            yield head[1].upper(), head[2].decode(), b"".join(text)
            head, text = None, []
    if head:
        raise MigrateError(f"the dump ends within table {head[2].decode()}; make it again")


def values_of(text: bytes, table: str) -> Iterator[list[str | None]]:
    """Return the rows of an INSERT statement."""
    row: list[str | None] | None = None
    at, end = 0, len(text.rstrip())
    while at < end:
        token = TOKEN.match(text, at)
        if not token:
            raise MigrateError(f"table {table}: {text[at : at + 40]!r} is not understood")
        at = token.end()
        sign, null, string, digits, word = token.groups()
        if sign == b"(":
            row = []
        elif sign == b")" and row is not None:
            yield row
            row = None
        elif row is None or sign:
            continue
        elif string is not None:
            row.append(unescaped(string))
        elif digits:
            row.append(bytes.fromhex(digits.decode()).decode("utf-8", "replace"))
        else:
            row.append(None if null else word.decode())


def read_dump(dump: Iterable[bytes], rows: Rows) -> None:
    columns: dict[str, list[str]] = {}
    for what, table, text in statements(dump, rows):
        if what == b"CREATE TABLE" and table in columns:
            raise MigrateError(f"table {table}: is in the dump twice; dump only one database")
        if what == b"CREATE TABLE":
            rows.found.setdefault(table, {})
            columns[table] = [name.decode() for name in COLUMN.findall(text)]
            continue
        if what == b"COPY":
            raise MigrateError("is a dump by pg_dump, which is not read here: write them by hand")
        listed, *values = re.split(rb"\bVALUES\b", text, maxsplit=1, flags=re.IGNORECASE)
        names = re.findall(r"\w+", listed.decode("utf-8", "replace")) or columns.get(table)
        if not names or not values:
            raise MigrateError(
                f"table {table}: the dump does not name its columns; make a whole one by mysqldump"
            )
        for row in values_of(values[0], table):
            if len(row) != len(names):
                raise MigrateError(f"table {table}: a row has {len(row)} of {len(names)} columns")
            rows.add(table, dict(zip(names, row)))


def read_live(db: Any, names: Iterable[str], rows: Rows, quote: str) -> None:
    """Read the wanted tables of an open database, as text, which is what dumps hold."""
    for table in filter(rows.base, names):
        rows.found.setdefault(table, {})
        cursor = db.cursor()
        cursor.execute(f"SELECT * FROM {quote}{table}{quote}")  # noqa: S608 - the database named it
        columns = [column[0] for column in cursor.description]
        for values in cursor:
            texts = [None if value is None else str(value) for value in values]
            rows.add(table, dict(zip(columns, texts)))


def read_sqlite(path: str, rows: Rows) -> None:
    name = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    try:
        with closing(sqlite3.connect(f"file:{name}?mode=ro", uri=True)) as db:
            found = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            read_live(db, [row[0] for row in found], rows, '"')
    except sqlite3.Error as error:
        raise MigrateError(f"{path}: cannot be read ({error})") from None


def read_mysql(database: str, defaults_file: str, rows: Rows) -> None:
    try:
        import pymysql
        from pymysql.cursors import SSCursor
    except ImportError:
        text = "needs PyMySQL: pip install pymysql; or give it a dump, made with mysqldump"
        raise MigrateError(text) from None
    path = os.path.expanduser(defaults_file or "~/.my.cnf")
    if not os.path.isfile(path):
        raise MigrateError(f"{path}: is missing; it names host, user and password under [client]")
    options = {"read_default_file": path, "charset": "utf8mb4", "cursorclass": SSCursor}
    try:
        with closing(pymysql.connect(database=database, **options)) as db:
            with closing(db.cursor()) as cursor:
                cursor.execute("SHOW TABLES")
                names = [row[0] for row in cursor.fetchall()]
            read_live(db, names, rows, "`")
    except (pymysql.Error, OSError) as error:
        raise MigrateError(f"mysql:{database}: {error.args[-1]}") from None


def read_tables(source: str, defaults_file: str, keys: Keys) -> Rows:
    rows = Rows(keys)
    if source.startswith("mysql:"):
        read_mysql(source[len("mysql:") :], defaults_file, rows)
        return rows
    with open_source(source) as file:
        if source != "-" and file.peek(16).startswith(b"SQLite format 3\0"):
            read_sqlite(source, rows)
        else:
            read_dump(file, rows)
    return rows


# --- The four systems -----------------------------------------------------------------------------
# In: rows, and where the system lies. Out: drafts whose command is the system's own.


def number(text: str | None) -> int:
    return int({"True": "1", "False": "0"}.get(text or "0", text or "0"))


ITOP_PERIODS = {  # as GetPeriodicity() of the shipped processes says
    "ExecAsyncTask": "every 2 s",
    "CheckStopWatchThresholds": "every 10 s",
    "InlineImageGC": "every 1 s",
    "SessionGC": "every 1 min",
    "ObsolescenceDateUpdater": "every 10 min",
    "BulkExportResultGC": "every 1 d",
}
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
ITOP_SCRIPT = r"""<?php
// Runs one background process of iTop, as its webservices/cron.php does. Options of the task: where
// iTop lies, the class, and the login of an administrator, in whose name it works.
[$root, $class, $user] = array_map(
    function ($name) { return (string) getenv("BGTASKS_OPTION_$name"); }, ['ROOT', 'CLASS', 'USER']
);
if (!is_file("$root/approot.inc.php")) {
    fwrite(STDERR, "option root: there is no approot.inc.php in '$root'; name iTop's folder\n");
    exit(1);
}
require_once "$root/approot.inc.php";
foreach (['READONLY_MODE_FILE', 'MAINTENANCE_MODE_FILE'] as $name) {
    if (defined($name) && file_exists(constant($name))) {
        file_put_contents(getenv('BGTASKS_REPORT'), "result=nothing\n", FILE_APPEND);
        exit("iTop is in maintenance\n");
    }
}
require_once APPROOT.'/application/application.inc.php';
require_once APPROOT.'/core/background.inc.php';
require_once APPROOT.'/application/startup.inc.php';
set_time_limit(0);
$context = new ContextTag(ContextTag::TAG_CRON);
if (!UserRights::Login($user)) {
    fwrite(STDERR, "option user: iTop has no user '$user'; name one of its administrators\n");
    exit(1);
}
CMDBObject::SetCurrentChangeFromParams("Background task ($class)");
$process = new $class();
$taskContext = new ContextTag("CRON:Task:$class");
echo $process->Process((int) getenv('BGTASKS_DEADLINE')), "\n";
"""


def read_itop(rows: Mapping[str, list[Row]], root: str) -> Haul:
    haul = Haul(extra={"itop_process.php": ITOP_SCRIPT})
    for row in rows["priv_backgroundtask"]:
        name = row["class_name"] or ""
        if row["status"] == "removed":
            haul.remarks.append(f"class {name}: iTop has it no more; not carried over")
            continue
        options = {"root": root, "class": name, "user": "admin"}
        about = {"description": f"iTop: {name}", "script": "itop_process.php", "options": options}
        draft = Draft(f"class {name}", name.rpartition("\\")[2], about)
        haul.drafts.append(draft)
        if (row["next_run_date"] or "").startswith("3000-"):
            draft.pause("it is switched off in iTop's configuration (enabled)")
            continue
        draft.settings["schedule"] = itop_schedule(draft, row)
        if row["status"] == "paused":
            draft.settings["enabled"] = False
    haul.remarks += [
        'options.user is "admin": if that is no administrator of iTop, name one',
        "take webservices/cron.php out of the crontab first: else both run the tasks",
    ]
    return haul


def itop_schedule(draft: Draft, row: Row) -> str:
    """Return how often a process runs: its table says only from when to when, and how often."""
    runs, planned = number(row["total_exec_count"]), row["next_run_date"] or ""
    if row["class_name"] in ITOP_PERIODS:
        return ITOP_PERIODS[row["class_name"]]
    try:
        first, last = (
            datetime.fromisoformat(row[key]) for key in ("first_run_date", "latest_run_date")
        )
        gap = (last - first).total_seconds() / max(1, runs - 1)
    except (TypeError, ValueError):  # it never ran
        gap = 0.0
    known = [step for step in STEPS if step <= gap * 1.05]
    if runs < 3 or not known:
        draft.notes.append("its table does not say how often it runs; look for GetPeriodicity()")
        return "manual"
    if known[-1] == 86400 and len(planned) == 19:
        draft.notes.append(
            "days and time are a guess: they stand in iTop's configuration (week_days, time)"
        )
        return f"daily {planned[11:16]}"
    draft.notes.append(
        f"by its {runs} runs, it comes {every(known[-1])}; look for GetPeriodicity()"
    )
    return every(known[-1])


def read_glpi(rows: Mapping[str, list[Row]], root: str) -> Haul:
    haul = Haul()
    names = [row["name"] for row in rows["glpi_crontasks"]]
    for row in rows["glpi_crontasks"]:
        name, itemtype = row["name"], row["itemtype"] or ""
        doubled = names.count(name) > 1
        draft = Draft(f"{itemtype}::{name}", f"{itemtype}_{name}" if doubled else name, {})
        draft.settings = {
            "description": f"GLPI: {itemtype}::{name}",
            "order": 200 if "plugin" in itemtype.lower() else 100,  # its own tasks come first
            "command": ["php", os.path.join(root, "front", "cron.php"), "--force", name],
        }
        if doubled:
            draft.notes.append(f"GLPI starts each task {name} by this name: see which one it takes")
        seconds = number(row["frequency"])
        settle_schedule(draft, every(seconds) if seconds > 0 else "")
        glpi_limits(draft, row)
        haul.drafts.append(draft)
    haul.remarks += [
        "take front/cron.php out of the crontab, and set the tasks to CLI: else both run them",
        "front/cron.php ends with 0 even if a task failed: see GLPI's own log for that",
        "a task that files/_cron/*.lock stops in GLPI goes on here: --force does not look at them",
        "all are due at once when they are new, whenever they ran last in GLPI",
    ]
    return haul


def glpi_limits(draft: Draft, row: Row) -> None:
    opens, closes = number(row["hourmin"]), number(row["hourmax"])
    if number(row["state"]) == 0:
        draft.settings["enabled"] = False
    if opens == closes:
        draft.pause(f"its hours are {opens} to {closes}, in which GLPI never starts it")
    elif (opens, closes) != (0, 24):
        draft.settings["window"] = f"{opens % 24:02}:00-{closes:02}:00"
    if number(row["param"]) > 0:
        draft.settings["maximum"] = number(row["param"])
        draft.notes.append("maximum is for show: GLPI reads it (param) from its own table")
    days = number(row["logs_lifetime"])
    draft.settings["history_lifetime"] = f"{min(days, 366) if days > 0 else 366} d"
    if not 0 < days <= 366:
        draft.notes.append("its history is kept for 366 days, the most there is")
    if not number(row["allowmode"]) & 2:
        draft.settings["enabled"] = False
        draft.notes.append(
            "is paused: its CLI mode is not allowed (allowmode), so --force does nothing"
        )
    if number(row["state"]) == 2:
        draft.notes.append(
            "GLPI says that it runs, and starts it no more if it does not: bin/console task:unlock"
        )


Job = dict[str, str]  # what is known of a task of Magento, by the path below crontab/jobs/CODE


ZONE = "general/locale/timezone"
AOE_FIELDS = ("is_active", "groups", "description", "parameters", "on_success")


def read_magento(rows: Mapping[str, list[Row]], root: str) -> Haul:
    """Return the tasks of Magento: expressions stand in XML files and in the configuration."""
    haul, jobs = Haul(), magento_jobs(root)
    config = {
        row["path"]: row["value"].strip()
        for row in rows["core_config_data"]
        if row.get("scope", "default") == "default" and row["value"]
    }
    for path, value in config.items():
        found = re.fullmatch(r"crontab/(?:([\w-]+)/)?jobs/([^/]+)/(.+)", path)
        if found:
            jobs.setdefault(found[2], {"groups": found[1] or ""})[found[3]] = value
    for row in rows["cron_schedule"]:
        jobs.setdefault(row["job_code"] or "", {})
    jobs.pop("", None)
    is_one = os.path.isfile(os.path.join(root, "app", "Mage.php"))
    is_one = is_one or any(path.startswith("crontab/jobs/") for path in config)
    for code, job in sorted(jobs.items()):
        haul.drafts.append(magento_task(code, job, config, root, is_one=is_one))
    program = magento_command("", root, is_one=is_one)[0]
    haul.remarks += [
        "take bin/magento cron:run (or cron.sh) out of the crontab first: else both run the tasks",
        f"tasks are started one by one through {program}, which must be installed",
    ]
    if ZONE not in config:
        haul.remarks.append(f"{ZONE} is not set: schedules are read in the machine's zone")
    return haul


def magento_jobs(root: str) -> dict[str, Job]:
    """Return what the XML files of the modules say."""
    jobs: dict[str, Job] = {}
    places = ("vendor/*/*/etc/crontab.xml", "app/code/*/*/etc/crontab.xml")
    for place in (*places, "app/code/*/*/*/etc/config.xml"):
        for path in sorted(glob.glob(f"{glob.escape(root)}/{place}")):
            try:
                tree = ET.parse(path).getroot()  # noqa: S314 - a file of the shop
            except (ET.ParseError, OSError) as error:
                raise MigrateError(f"{path}: cannot be read ({error})") from None
            for code, job in jobs_of(tree):
                jobs.setdefault(code, {}).update(job)
    return jobs


def jobs_of(tree: ET.Element) -> Iterator[tuple[str, Job]]:
    """Return the tasks of a file of Magento 2, or 1 with the fields of Aoe_Scheduler."""
    for group in tree.iter("group"):
        for job in group.iter("job"):
            found = {"groups": group.get("id", "")}
            found["schedule/cron_expr"] = (job.findtext("schedule") or "").strip()
            found["schedule/config_path"] = (job.findtext("config_path") or "").strip()
            yield job.get("name", ""), found
    for job in [*tree.findall("crontab/jobs/*"), *tree.findall("default/crontab/jobs/*")]:
        paths = ("schedule/cron_expr", "schedule/config_path", *AOE_FIELDS)
        yield job.tag, {path: text.strip() for path in paths if (text := job.findtext(path))}


def magento_command(code: str, root: str, *, is_one: bool) -> list[str]:
    scheduler = os.path.join(root, "shell", "scheduler.php")
    if os.path.isfile(scheduler):  # Aoe_Scheduler
        return ["php", scheduler, "--action", "runNow", "--code", code]
    program = "n98-magerun" if is_one else "n98-magerun2"
    return [program, f"--root-dir={root}", "sys:cron:run", code]


def magento_task(
    code: str, job: Job, config: Mapping[str, str], root: str, *, is_one: bool
) -> Draft:
    draft = Draft(f"job {code}", code, {"command": magento_command(code, root, is_one=is_one)})
    draft.settings["description"] = f"Magento: {job.get('description') or code}"
    settle_zone(draft, config.get(ZONE, ""), ZONE)
    text = config.get(job.get("schedule/config_path", "")) or job.get("schedule/cron_expr", "")
    if text:
        settle_expression(draft, text, partial(read_magento_expression, is_one=is_one))
    else:
        draft.pause("its schedule was not found; it stands in a crontab.xml, below --root or not")
    disabled = re.split(r"\s*,\s*", config.get("system/cron/disabled_crons", ""))
    if job.get("is_active", "1").lower() in ("0", "false") or code in disabled:
        draft.settings["enabled"] = False
    first, *others = re.split(r"\s*,\s*", job.get("groups") or "default")
    draft.settings["group"] = first
    if others:
        draft.notes.append(f"is in one group here, and no more in {', '.join(others)}")
    if "parameters" in job:
        draft.settings["options"] = {"parameters": job["parameters"]}
        draft.notes.append("its parameters are for show: Magento reads its own")
    if "on_success" in job:
        text = f"on_success {job['on_success']}: write after = [...] into those tasks"
        draft.notes.append(f"{text}; a task with a schedule then waits for both")
    return draft


PRIVACYIDEA_SCRIPT = b"""\
# privacyidea-cron ends with 0 even if the task failed, so what it says counts
said=$(COMMAND 2>&1) || { code=$?; printf '%s\\n' "$said"; exit "$code"; }
printf '%s\\n' "$said"
case $said in
    *"exited successfully"*) ;;
    *) exit 1 ;;
esac
"""


def read_privacyidea(rows: Mapping[str, list[Row]], root: str) -> Haul:
    haul = Haul()
    program = os.path.join(root, "bin", "privacyidea-cron") if root else "privacyidea-cron"
    options: dict[str, dict[str, str]] = {}
    for row in rows["periodictaskoption"]:
        options.setdefault(row["periodictask_id"], {})[row["key"]] = row["value"] or ""
    for row in rows["periodictask"]:
        draft = Draft(f"task {row['name']}", row["name"], {})
        draft.settings = {
            "description": f"privacyIDEA: {row['name']} ({row['taskmodule']})",
            "order": number(row["ordering"]),
            "nodes": [node.strip() for node in (row["nodes"] or "").split(",")],
            "options": options.get(row["id"], {}),
        }
        words = (program, "run_manually", "-t", row["name"])
        command = b" ".join(quoted(word.encode()) for word in words)
        draft.script = PRIVACYIDEA_SCRIPT.replace(b"COMMAND", command)
        settle_expression(draft, (row["interval"] or "").strip(), read_croniter_expression)
        privacyidea_rest(draft, row)
        haul.drafts.append(draft)
    haul.remarks += [
        "take privacyidea-cron run_scheduled out of the crontab first: else both run the tasks",
        "nodes are names of privacyIDEA; set node in the param file of each machine to the same",
    ]
    return haul


def privacyidea_rest(draft: Draft, row: Row) -> None:
    if not number(row["active"]):
        draft.settings["enabled"] = False
    if number(row.get("retry_if_failed", "1")):
        draft.notes.append(
            "a failure is tried again 3 times before the next slot, and not for ever"
        )
    else:
        draft.settings["retries"] = 0
    if draft.settings["options"]:
        draft.notes.append("its options are for show: privacyIDEA reads them from its own table")
    if not any(draft.settings["nodes"]):
        del draft.settings["nodes"]


class System(NamedTuple):
    keys: Keys
    read: Callable[[Mapping[str, list[Row]], str], Haul]
    holds: str  # what lies in --root; empty: it need not be given


SYSTEMS = {
    "itop": System({"priv_backgroundtask": ("id",)}, read_itop, "approot.inc.php"),
    "glpi": System({"glpi_crontasks": ("id",)}, read_glpi, "front/cron.php"),
    "magento": System(
        {"cron_schedule": ("job_code",), "core_config_data": ("scope", "path")}, read_magento, "app"
    ),
    "privacyidea": System(
        {"periodictask": ("id",), "periodictaskoption": ("id",)}, read_privacyidea, ""
    ),
}


def read_system(name: str, source: str, defaults_file: str, root: str) -> Haul:
    system = SYSTEMS[name]
    if system.holds and not root:
        raise MigrateError(f"--root is missing: the folder of {name}, with {system.holds} in it")
    rows = read_tables(source, defaults_file, system.keys)
    found = {base: rows.of(base, source) for base in system.keys}
    try:
        return system.read(found, os.path.abspath(root) if root else "")
    except (KeyError, ValueError) as error:
        text = f"the tables are not those of a {name} that is known here ({error!r})"
        raise MigrateError(f"{source}: {text}") from None
