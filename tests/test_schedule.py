import bisect
import calendar
import importlib.util
import os
import random
import subprocess
import sys
import time
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bgtasks
from bgtasks import MissingPackageError, TaskError, Zone, parse_schedule, schedule_notes

needs_croniter = pytest.mark.skipif(
    importlib.util.find_spec("croniter") is None, reason="croniter is not installed"
)
UTC = Zone("UTC")
BERLIN = Zone("Europe/Berlin")
DAY = 86400


def at(text, zone="UTC"):
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp())


def shown(moment, zone=UTC):
    return None if moment is None else str(zone.local(moment))


def upcoming(text, start, count, zone=UTC, **more):
    schedule, found, moment = parse_schedule(text, zone, **more), [], start
    for _ in range(count):
        moment = schedule.next_after(moment)
        found.append(shown(moment, zone))
    return found


# --- An oracle of Debian's cron, minute by minute, that shares nothing with the code under test ---

NAMES = {name.lower(): i for i, name in enumerate(calendar.month_abbr)}
NAMES.update({name.lower(): (i + 1) % 7 for i, name in enumerate(calendar.day_abbr)})


def oracle_values(field, low, high):
    values = set()
    for part in field.lower().split(","):
        span, _, step = part.partition("/")
        if span == "*":
            first, last = low, high
        elif "-" in span:
            first, last = (int(NAMES.get(word, word)) for word in span.split("-"))
            last += 7 if span.endswith("sun") and first else 0
        else:
            first = int(NAMES.get(span, span))
            last = high if step else first
        values.update(v for v in range(first, last + 1) if (v - first) % int(step or 1) == 0)
    return values


def oracle_day_of_month(field, day):
    last = calendar.monthrange(day.year, day.month)[1]
    if field.endswith("W"):
        wanted = date(day.year, day.month, min(int(field[:-1]), last))
        in_month = (wanted + timedelta(d) for d in (0, -1, 1, -2, 2))
        return day == next(d for d in in_month if d.weekday() < 5 and d.month == day.month)
    numbers = [part for part in field.split(",") if part != "L"]
    found = oracle_values(",".join(numbers), 1, 31) if numbers else set()
    return day.day in found or (len(numbers) < len(field.split(",")) and day.day == last)


def oracle_day_of_week(field, day):
    if "#" not in field and "L" not in field:
        return day.isoweekday() % 7 in {v % 7 for v in oracle_values(field, 0, 6)}
    for part in field.split(","):
        if part.startswith("L"):
            last = calendar.monthrange(day.year, day.month)[1]
            if day.isoweekday() % 7 == int(part[1:]) % 7 and day.day + 7 > last:
                return True
        else:
            name, nth = part.split("#")
            weekday = int(NAMES.get(name, name)) % 7
            if day.isoweekday() % 7 == weekday and (day.day - 1) // 7 + 1 == int(nth):
                return True
    return False


def oracle_day(expression, day):
    _, _, month_days, months, weekdays = expression.split()
    if day.month not in oracle_values(months, 1, 12):
        return False
    by_month, by_week = oracle_day_of_month(month_days, day), oracle_day_of_week(weekdays, day)
    if month_days.startswith("*") or weekdays.startswith("*"):
        return by_month and by_week
    return by_month or by_week


def oracle_fires(expression, minutes):
    """Return what cron does in ``minutes``: pairs of a UTC minute and the local minute it shows."""
    minute_field, hour_field = expression.split()[:2]
    days = {local // 1440 for _, local in minutes}
    times = [
        hour * 60 + minute
        for hour in oracle_values(hour_field, 0, 23)
        for minute in oracle_values(minute_field, 0, 59)
    ]
    matching = {
        day * 1440 + minute
        for day in range(min(days), max(days) + 1)
        if oracle_day(expression, date(1970, 1, 1) + timedelta(day))
        for minute in times
    }
    if minute_field.startswith("*") or hour_field.startswith("*"):
        return [utc * 60 for utc, local in minutes if local in matching]
    fires, virtual = [], minutes[0][1] - 1
    for utc, local in minutes:
        ahead = local - virtual
        if -180 < ahead - 1 < 0:  # set back by less than 3 hours: wait until time caught up
            continue
        due = range(virtual + 1, local + 1) if 1 <= ahead <= 181 else (local,)
        if any(minute in matching for minute in due):
            fires.append(utc * 60)
        virtual = local
    return fires


def minutes_around(zone, moment, hours=20):
    tz = ZoneInfo(zone)
    found = []
    for utc in range(moment // 60 - hours * 60, moment // 60 + hours * 60):
        local = datetime.fromtimestamp(utc * 60, tz)
        found.append((utc, utc + int(local.utcoffset().total_seconds()) // 60))
    return found


def transitions(zone, first="2024-01-01", last="2028-01-01"):
    tz = ZoneInfo(zone)

    def offset(moment):
        return datetime.fromtimestamp(moment, tz).utcoffset()

    found = []
    for start in range(at(first), at(last), DAY):
        low, high = start, start + DAY
        if offset(low) != offset(high):
            while high - low > 60:
                middle = (low + high) // 120 * 60
                low, high = (middle, high) if offset(middle) == offset(low) else (low, middle)
            found.append(high)
    return found


ZONES = [
    "Europe/Berlin",
    "America/New_York",
    "America/St_Johns",
    "America/Havana",
    "America/Santiago",
    "Africa/Cairo",
    "Africa/Casablanca",
    "Asia/Beirut",
    "Asia/Gaza",
    "Antarctica/Troll",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
    "Pacific/Easter",
]
SPECIAL = [  # a missing day, jumps of exactly three hours both ways, two hours back
    ("Pacific/Apia", "2011-12-01", "2012-01-31"),
    ("Pacific/Kwajalein", "1993-08-01", "1993-09-01"),
    ("Antarctica/Casey", "2020-01-01", "2023-12-31"),
    ("Antarctica/Vostok", "2023-01-01", "2023-12-31"),
]
EXPRESSIONS = [
    "* * * * *",
    "*/15 2 * * *",
    "*/20 * * * *",
    "30 */2 * * *",
    "15 * * * 0,6",
    "0 * * * *",
    "30 2 * * *",
    "0,30 2 * * *",
    "5-55/10 1-3 * * *",
    "0 0 * * *",
    "30 0,23 * * *",
    "59 1,2 * * *",
    "0 3 * * sun",
    "45 2 L * *",
    "30 2 1-7 * sun",
    "30 2 */2 * sun",
    "15 2 * mar,oct,nov,apr sat-sun",
    "30 2 * * 0#2,0#5,L0,L5",
    "20 2 15W * *",
    "0-59 0-23 * * *",
]
BUILT_IN = {
    "daily 02:30": "30 2 * * *",
    "daily 00:00,02:00,23:30": None,
    "sun,mon 02:30": "30 2 * * sun,mon",
    "fri-sun 00:30": "30 0 * * 5-7",
    "weekdays 01:00": "0 1 * * 1-5",
    "weekends 02:15": "15 2 * * 0,6",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
}


def windows():
    for zone in ZONES:
        for moment in transitions(zone):
            yield zone, moment
        yield zone, at("2025-06-15")
    for zone, first, last in SPECIAL:
        for moment in transitions(zone, first, last):
            yield zone, moment


def differences(schedule, fires, minutes, seed):
    """Return where the schedule and the oracle differ, iterated and from random moments."""
    begin, end = minutes[0][0] * 60, minutes[-1][0] * 60 + 60
    middle = (begin + end) // 2
    moment = begin - 1 if len(fires) < 100 else middle - 3600
    expected = fires[bisect.bisect(fires, moment) :][:140]
    found = []
    for fire in expected:
        answer = schedule.next_after(moment)
        if answer != fire:
            found.append((moment, answer, fire))
        moment = fire
    numbers = random.Random(seed)
    for moment in [numbers.uniform(middle - 5 * 3600, middle + 5 * 3600) for _ in range(6)]:
        rest = fires[bisect.bisect(fires, moment) :]
        answer = schedule.next_after(moment)
        if answer != rest[0] if rest else answer < end:
            found.append((moment, answer, rest[:1]))
    return found


def compare(pairs, zones_and_moments, make_zone=Zone):
    found, compared = [], 0
    for zone, moment in zones_and_moments:
        minutes = minutes_around(zone, moment)
        for text, expression in pairs:
            schedule = parse_schedule(text, make_zone(zone))
            fires = oracle_fires(expression, minutes)
            compared += len(fires)
            for difference in differences(schedule, fires, minutes, f"{zone} {text} {moment}"):
                found.append((zone, text, *difference))
    return found, compared


@needs_croniter
def test_cron_expressions_follow_debian_cron_through_every_clock_change():
    found, compared = compare([(e, e) for e in EXPRESSIONS], windows())
    assert compared > 100_000
    assert found == []


def test_built_in_forms_follow_debian_cron_through_every_clock_change():
    found, compared = compare([(t, e) for t, e in BUILT_IN.items() if e], windows())
    assert compared > 700
    assert found == []


@needs_croniter
@pytest.mark.skipif(not hasattr(time, "tzset"), reason="this system has no tzset")
def test_the_zone_of_the_machine_follows_the_same_rule(monkeypatch):
    def machine(zone):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        return Zone("")

    pairs = [(e, e) for e in ("30 */2 * * *", "0,30 2 * * *", "*/15 2 * * *", "0 0 * * *")]
    try:
        found, compared = compare([*pairs, ("daily 02:30", "30 2 * * *")], windows(), machine)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert compared > 700
    assert found == []


DAY_EXPRESSIONS = [
    "0 0 1,15 * mon",
    "0 0 */2 * mon",
    "0 0 1-31/7 * */3",
    "0 0 13 * 5",
    "0 0 L * *",
    "0 0 15,L * 3",
    "0 0 29,30,31 * *",
    "0 0 31 4,6,7 *",
    "0 0 31 2 1",
    "0 0 29 2 *",
    "0 0 29 2 */2",
    "0 0 15W * *",
    "0 0 1W * *",
    "0 0 31W * *",
    "0 0 15W * 2",
    "0 0 15W * */2",
    "0 0 15 * 5#2",
    "0 0 */5 * 5#2",
    "0 0 * * 5#2,1#4",
    "0 0 * * mon#1,L5",
    "0 0 * * L0",
    "0 0 1 * L5",
    "0 0 * jan-mar,oct/2 tue-thu",
    "0 0 * */5 7",
    "0 0 10/9 * *",
    "0 0 5-5 3-3 *",
    "0 0 15,* * 1",
    "0 0 *,15 * 1",
    "0 0 * * 6-7",
    "0 0 * * 5/1",
    "0 0 1-31 * 1",
    "0 0 */99 * *",
    "0 0 * feb 1#5",
]


@needs_croniter
@pytest.mark.parametrize("expression", DAY_EXPRESSIONS)
def test_days_are_those_of_the_oracle(expression):
    start = date(2094, 12, 31)
    days = [start + timedelta(n) for n in range(1, 4000)]
    expected = [str(d) + " 00:00:00" for d in days if oracle_day(expression, d)][:150]
    assert upcoming(expression, at("2094-12-31T12:00"), len(expected)) == expected


@needs_croniter
def test_29_february_is_found_across_the_year_2100():
    assert upcoming("0 0 29 2 *", at("2095-01-01"), 2) == [
        "2096-02-29 00:00:00",
        "2104-02-29 00:00:00",
    ]


@needs_croniter
def test_a_date_40_years_away_is_found_in_50_ms():
    schedule = parse_schedule("30 2 */28 2 1#5", BERLIN)
    begin = time.process_time()
    assert shown(schedule.next_after(at("2072-03-01")), BERLIN) == "2112-02-29 02:30:00"
    assert time.process_time() - begin < 0.05


SPRING = at("2026-03-29T00:00", "Europe/Berlin")  # 02:00 becomes 03:00, the 29th
AUTUMN = at("2026-10-25T00:00", "Europe/Berlin")  # 03:00 becomes 02:00, the 25th


def test_a_fixed_time_in_the_gap_comes_once_right_after_it():
    assert upcoming("daily 02:00,02:30", SPRING, 3, BERLIN) == [
        "2026-03-29 03:00:00",
        "2026-03-30 02:00:00",
        "2026-03-30 02:30:00",
    ]


def test_a_fixed_time_in_the_fold_comes_the_first_time_only():
    schedule = parse_schedule("daily 02:30", BERLIN)
    first, second = BERLIN.moments(datetime.fromisoformat("2026-10-25T02:30"))
    tomorrow = BERLIN.moments(datetime.fromisoformat("2026-10-26T02:30"))[0]
    assert second - first == 3600
    assert schedule.next_after(AUTUMN) == first
    for moment in (first, second - 1, second - 0.5, second, second + 1, second + 1800):
        assert schedule.next_after(moment) == tomorrow


@needs_croniter
def test_a_wildcard_expression_follows_real_time_through_the_fold():
    schedule = parse_schedule("30 */2 * * *", BERLIN)
    first, second = BERLIN.moments(datetime.fromisoformat("2026-10-25T02:30"))
    assert schedule.next_after(first) == second
    assert shown(schedule.next_after(second), BERLIN) == "2026-10-25 04:30:00"


@needs_croniter
def test_a_wildcard_expression_in_the_gap_is_skipped():
    assert upcoming("*/15 2 * * *", SPRING, 1, BERLIN) == ["2026-03-30 02:00:00"]


def test_a_skipped_day_is_a_correction():
    apia = Zone("Pacific/Apia")
    assert upcoming("daily 12:00", at("2011-12-29T01:00", "Pacific/Apia"), 2, apia) == [
        "2011-12-29 12:00:00",
        "2011-12-31 12:00:00",
    ]


# --- Zones ----------------------------------------------------------------------------------------


def test_a_zone_answers_no_moment_in_a_gap_and_two_in_a_fold():
    assert BERLIN.moments(datetime.fromisoformat("2026-03-29T02:30")) == []
    assert len(BERLIN.moments(datetime.fromisoformat("2026-10-25T02:30"))) == 2
    assert BERLIN.moments(datetime.fromisoformat("2026-06-01")) == [
        at("2026-06-01", "Europe/Berlin")
    ]
    assert UTC.local(0) == datetime.fromisoformat("1970-01-01")


def test_the_machine_zone_has_no_tzinfo():
    assert Zone("").tzinfo is None
    assert Zone("").moments(Zone("").local(1_700_000_000)) == [1_700_000_000.0]


@pytest.mark.parametrize(
    "name",
    ["Foo", "Europe", "../etc/passwd", "/etc/passwd", "Europe/Berlin\0", "\ud800", "x" * 5000, " "],
    ids=["name", "folder", "parent", "absolute", "nul", "surrogate", "long", "blank"],
)
def test_an_unknown_zone_is_refused(name):
    with pytest.raises(TaskError, match=r"^timezone: unknown zone") as refused:
        Zone(name)
    assert len(str(refused.value)) < 200


def test_an_unknown_zone_names_the_nearest_one():
    with pytest.raises(TaskError, match=r"did you mean 'Europe/Berlin'"):
        Zone("Europe/Berln")


def run_bare(code):
    """Run ``code`` without site-packages, so without croniter and tzdata, and without zones."""
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=Path(bgtasks.__file__).parent,
        env={**os.environ, "PYTHONTZPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_machine_without_zones_is_told_what_to_install():
    code = (
        "import bgtasks\n"
        "try: bgtasks.Zone('Europe/Berlin')\n"
        "except bgtasks.TaskError as error: print(error)"
    )
    assert run_bare(code) == "timezone: unknown zone 'Europe/Berlin': pip install tzdata\n"


# --- What is read ---------------------------------------------------------------------------------

FIELD_REFUSED = [
    ("60 * * * *", "minute"),
    ("* 24 * * *", "hour"),
    ("* * 0 * *", "day of month"),
    ("* * 32 * *", "day of month"),
    ("* * * 13 *", "month"),
    ("* * * 0 *", "month"),
    ("* * * * 8", "day of week"),
    ("*/0 * * * *", "minute"),
    ("* */-1 * * *", "hour"),
    ("* 5-1 * * *", "hour"),
    ("* * * * fri-tue", "day of week"),
    ("1,,2 * * * *", "minute"),
    ("1, * * * *", "minute"),
    ("* 1-2-3 * * *", "hour"),
    ("1.5 * * * *", "minute"),
    ("0x5 * * * *", "minute"),
    ("* -1 * * *", "hour"),
    ("+1 * * * *", "minute"),
    ("R * * * *", "minute"),
    ("* * ? * *", "day of month"),
    ("* * LW * *", "day of month"),
    ("1/ * * * *", "minute"),
    ("*/1_0 * * * *", "minute"),
    ("** * * * *", "minute"),
    ("* * * foo *", "month"),
    ("jan * * * *", "minute"),
    ("9" * 240 + " * * * *", "minute"),
    ("* * 31 2 *", "day of month"),
    ("0 0 30 2 *", "day of month"),
    ("0 0 30,31 feb *", "day of month"),
    ("0 0 31 4,6 *", "day of month"),
    ("0 0 31 2 */2", "day of month"),
    ("fob,mon 03:00", "day of week"),
    ("1,2 03:00", "day of week"),
    ("fri-mon 03:00", "day of week"),
    ("h 03:00", "day of week"),
    ("daily,mon 03:00", "day of week"),
]
REFUSED = [
    ("", "is not 1 to 256"),
    (" ", "is not 1 to 256"),
    ([], "is not 1 to 256"),
    (["daily 03:30", ""], "is not 1 to 256"),
    ("9" * 5000 + " * * * *", "is not 1 to 256"),
    (",".join(["1"] * 10_000) + " * * * *", "is not 1 to 256"),
    ("٣ * * * *", "is not 1 to 256"),
    ("every ٣ min", "is not 1 to 256"),
    ("0 5 * * *\n", "is not 1 to 256"),
    ("0 5 * * *\n0 6 * * *", "is not 1 to 256"),
    ("0 5 * * \0", "is not 1 to 256"),
    ("0 5\u00a0* * *", "is not 1 to 256"),
    ("* * * *", "5 fields"),
    ("* * * * * *", "5 fields"),
    ("0 1, 2 * * *", "5 fields"),
    ("* * * * * * *", "5 fields"),
    ("0 5 * * * # nightly", "5 fields"),
    ("nightly", "5 fields"),
    ("@reboot", "@hourly"),
    ("@every 5m", "@hourly"),
    ("every", "1 s to 366 d"),
    ("every 0 min", "1 s to 366 d"),
    ("every -5 min", "1 s to 366 d"),
    ("every 1.5 h", "1 s to 366 d"),
    ("every 367 d", "1 s to 366 d"),
    ("every 5", "1 s to 366 d"),
    ("every min", "1 s to 366 d"),
    ("every 5 months", "1 s to 366 d"),
    ("every 5 m", "1 s to 366 d"),
    ("everything", "1 s to 366 d"),
    ("every " + "9" * 240 + " s", "1 s to 366 d"),
    ("daily", "00:00 to 23:59"),
    ("daily 29:59", "00:00 to 23:59"),
    ("daily 24:00", "00:00 to 23:59"),
    ("daily 12:60", "00:00 to 23:59"),
    ("daily 3:3", "00:00 to 23:59"),
    ("daily 3:30", "00:00 to 23:59"),
    ("daily 03:30:00", "00:00 to 23:59"),
    ("daily 03.30", "00:00 to 23:59"),
    ("daily 03:30,", "00:00 to 23:59"),
    ("daily -1:30", "00:00 to 23:59"),
    ("weekends", "00:00 to 23:59"),
    ("daily at 03:30", "00:00 to 23:59"),
]


@pytest.mark.parametrize(
    ("text", "said"),
    REFUSED + [(text, f"schedule: {field}: ") for text, field in FIELD_REFUSED],
    ids=lambda value: bgtasks.shortened(str(value), 24),
)
def test_it_refuses_in_10_ms_and_says_what_is_allowed(text, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "croniter", None)  # and needs no croniter to do so
    costs = []
    for _ in range(3):
        begin = time.process_time()
        with pytest.raises(TaskError) as refused:
            parse_schedule(text, UTC)
        costs.append(time.process_time() - begin)
    assert not isinstance(refused.value, MissingPackageError)
    assert str(refused.value).startswith("schedule: ")
    assert said in str(refused.value)
    assert "allowed" in str(refused.value) or "never comes" in str(refused.value)
    assert len(str(refused.value)) < 300
    assert min(costs) < 0.01


@needs_croniter
@pytest.mark.parametrize(
    "text",
    [
        "0 0 32W * *",
        "0 0 15W,16 * *",
        "0 0 * * 5#6",
        "0 0 * * 5#2,1",
        "0 0 * * L9",
        "H/0 * * * *",
        "H(5-1) * * * *",
        "H(0-99) * * * *",
        "H,5 * * * *",
        "hello * * * *",
        "0 0 */31 * 1#2",
        "0 0 31W,1 2 *",
    ],
)
def test_it_passes_on_what_croniter_refuses(text):
    with pytest.raises(TaskError, match=r"^schedule: '.*': croniter: ") as refused:
        parse_schedule(text, UTC, spread="node task")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "canonical", "first"),
    [
        ("every 15 min", "every 15 min", "2026-01-01 00:00:00"),
        ("Every 015minutes", "every 15 min", "2026-01-01 00:00:00"),
        ("every 1 second", "every 1 s", "2026-01-01 00:00:00"),
        ("every 30sec", "every 30 s", "2026-01-01 00:00:00"),
        ("every 2 h", "every 2 h", "2026-01-01 00:00:00"),
        ("every 366 days", "every 366 d", "2026-01-01 00:00:00"),
        ("every 2 weeks", "every 2 w", "2026-01-01 00:00:00"),
        ("daily 03:30", "daily 03:30", "2026-01-01 03:30:00"),
        (" daily\t 19:00, 03:30 ", "daily 19:00,03:30", "2026-01-01 03:30:00"),
        ("mon, thu 03:30", "mon,thu 03:30", "2026-01-01 03:30:00"),
        ("MON-FRI 07:00", "MON-FRI 07:00", "2026-01-01 07:00:00"),
        ("sat-sun,mon 07:00", "sat-sun,mon 07:00", "2026-01-03 07:00:00"),
        ("weekends 00:00", "weekends 00:00", "2026-01-03 00:00:00"),
        ("@daily", "@daily", "2026-01-02 00:00:00"),
        ("@weekly", "@weekly", "2026-01-04 00:00:00"),
        ("@midnight", "@midnight", "2026-01-02 00:00:00"),
        (["daily 03:30", "every 2 h"], "daily 03:30, every 2 h", "2026-01-01 00:00:00"),
        (["daily 03:30", "sun 01:00"], "daily 03:30, sun 01:00", "2026-01-01 03:30:00"),
        ("manual", "manual", None),
        ("Always", "Always", None),
        (["always", "daily 03:30"], "always, daily 03:30", "2026-01-01 03:30:00"),
    ],
    ids=str,
)
def test_it_reads_the_built_in_forms(text, canonical, first):
    schedule = parse_schedule(text, UTC)
    assert schedule.text == canonical
    assert shown(schedule.first(at("2026-01-01"))) == first
    assert schedule.always == ("always" in canonical.lower())


@needs_croniter
@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("*/99 * * * *", "2026-01-01 01:00:00"),
        ("0 0 29 2 *", "2028-02-29 00:00:00"),
        ("0 0 L FEB *", "2026-02-28 00:00:00"),
        ("0\t5  * * MON", "2026-01-05 05:00:00"),
        ("0 0 * * 7", "2026-01-04 00:00:00"),
        ("59/15 5-5 * * *", "2026-01-01 05:59:00"),
        ("0 0 31 2 5#1", "2026-02-06 00:00:00"),
        ("@hourly", "2026-01-01 01:00:00"),
        ("@monthly", "2026-02-01 00:00:00"),
        ("@yearly", "2027-01-01 00:00:00"),
        ("@annually", "2027-01-01 00:00:00"),
        (["0 5 * * *", "every 2 d", "daily 03:00"], "2026-01-01 00:00:00"),
    ],
    ids=str,
)
def test_it_reads_cron_expressions(text, first):
    assert shown(parse_schedule(text, UTC, spread="a").first(at("2026-01-01"))) == first


@needs_croniter
@pytest.mark.parametrize("text", ["H * * * *", "H/15 3 * * *", "H(1-10) H(2-4) * * *", "0 0 * * H"])
def test_h_is_what_croniter_makes_of_it(text):
    from croniter import croniter

    for spread in ("web1 backup", "web2 backup", "ü", ""):
        schedule, moment = parse_schedule(text, UTC, spread=spread), at("2026-01-01")
        wanted = croniter(text, float(moment), hash_id=spread.encode())
        for _ in range(6):
            moment = schedule.next_after(moment)
            assert moment == wanted.get_next(float)


@needs_croniter
def test_h_alone_chooses_a_day_that_every_month_has():
    for spread in map(str, range(60)):
        days = upcoming("0 0 H * *", at("2026-01-01") - 1, 12, spread=spread)
        assert len({day[8:] for day in days}) == 1
        assert len({day[5:7] for day in days}) == 12


BOTH = "both must match, because one begins with *"


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("*/15 * * * *", []),
        ("*/99 * * * *", ["*/99 is larger than the field: the same as 0"]),
        ("0 0 */31 * *", ["*/31 is larger than the field: the same as 1"]),
        (
            "0 0 13 * 5",
            ["day of month and day of week are both set: either matches (Debian's cron)"],
        ),
        (
            ["0 0 */2 * 1", "daily 03:00"],
            ["day of month and day of week are both set: " + BOTH],
        ),
        ("every 15 min", []),
        ("@daily", []),
    ],
    ids=str,
)
def test_notes_tell_what_may_surprise(text, notes):
    assert schedule_notes(text) == notes


# --- Every, and what was started ------------------------------------------------------------------

NOW = at("2026-01-01T10:07:31") + 0.25


def test_every_stands_on_its_grid_whatever_the_wake_ups_do():
    schedule = parse_schedule("every 15 min", UTC)
    schedule = schedule._replace(anchor=schedule.anchor_for(NOW))
    assert shown(schedule.first(NOW)) == "2026-01-01 10:07:00"
    moment, numbers = NOW, random.Random(4)
    for _ in range(500):
        planned = schedule.next_after(moment)
        assert moment < planned <= moment + 900
        assert (planned - schedule.anchor) % 900 == 0
        moment = planned + numbers.uniform(0, 60)
    assert schedule.next_after(NOW + 50 * DAY) - (NOW + 50 * DAY) <= 900  # one, not 4,800


def test_every_goes_on_before_its_anchor_when_the_clock_was_set_back():
    schedule = parse_schedule("every 2 h", UTC, anchor=NOW // 60 * 60)
    assert shown(schedule.next_after(NOW - DAY)) == "2025-12-31 12:07:00"
    assert shown(schedule.next_after(NOW - DAY, started=NOW)) == "2025-12-31 12:07:00"


@pytest.mark.parametrize(
    ("text", "second"),
    [("every 1 min", 0), ("every 90 s", 31), ("every 30 s", 31), (["every 7 s", "every 1 h"], 0)],
    ids=str,
)
def test_a_grid_of_minutes_begins_on_a_minute(text, second):
    assert parse_schedule(text, UTC).anchor_for(NOW) == NOW // 60 * 60 + second


def test_a_wake_up_that_comes_a_second_early_misses_nothing():
    schedule = parse_schedule("every 1 min", UTC)
    schedule = schedule._replace(anchor=schedule.anchor_for(at("2026-01-01T10:00:01")))
    assert schedule.next_after(at("2026-01-01T10:00:01")) == at("2026-01-01T10:01:00")


FIVE = at("2026-01-01T05:00")


@pytest.mark.parametrize(
    ("text", "back", "expected"),
    [
        ("daily 05:00", 2 * 3600, "2026-01-02 05:00:00"),
        ("daily 05:00", 3 * 3600, "2026-01-02 05:00:00"),
        ("daily 05:00", 3 * 3600 + 1, "2026-01-01 05:00:00"),
        ("every 1 h", 2 * 3600, "2026-01-01 04:00:00"),
        pytest.param("0 5 * * *", 2 * 3600, "2026-01-02 05:00:00", marks=needs_croniter),
        pytest.param("0 * * * *", 2 * 3600, "2026-01-01 04:00:00", marks=needs_croniter),
        pytest.param("*/30 5 * * *", 2 * 3600, "2026-01-01 05:00:00", marks=needs_croniter),
        (["daily 05:00", "every 1 h"], 2 * 3600, "2026-01-01 04:00:00"),
    ],
    ids=str,
)
def test_fixed_times_are_not_repeated_when_the_clock_was_set_back(text, back, expected):
    schedule = parse_schedule(text, UTC)
    assert shown(schedule.next_after(FIVE - back, started=FIVE)) == expected
    assert schedule.next_after(FIVE, started=FIVE - DAY) == schedule.next_after(FIVE)


# --- For all schedules ----------------------------------------------------------------------------

BUILT_IN_TEXTS = ["every 7 s", "every 15 min", "every 2 w", *BUILT_IN]
CRON_TEXTS = [*EXPRESSIONS, *DAY_EXPRESSIONS, "H H * * *", "@hourly", "@monthly"]
ALL_TEXTS = BUILT_IN_TEXTS + CRON_TEXTS * (importlib.util.find_spec("croniter") is not None)
PARSED = {
    (text, zone): parse_schedule(text, Zone(zone), anchor=5.0, spread="x")
    for text in ALL_TEXTS
    for zone in ["", "UTC", *ZONES, *(zone for zone, _, _ in SPECIAL)]
}
MOMENTS = st.integers(at("1990-01-01"), at("2090-01-01")) | st.floats(
    at("2011-12-28"), at("2012-01-02"), allow_nan=False
)


@settings(max_examples=600)
@given(st.sampled_from(list(PARSED)), MOMENTS, st.integers(0, 3 * DAY))
def test_the_next_moment_is_later_never_goes_back_and_stays(which, moment, more):
    schedule = PARSED[which]
    first = schedule.next_after(moment)
    assert first > moment
    assert first == int(first)
    assert schedule.next_after(moment + more) >= first
    middle = (moment + first) / 2
    assert schedule.next_after(middle) == first or middle == first
    assert schedule.next_after(moment) == first


def answer_or_error(text):
    try:
        return parse_schedule(text, UTC, spread="x").next_after(NOW), ""
    except TaskError as error:
        return None, str(error)


@settings(max_examples=600)
@given(st.text("0123456789*/-,LWH#() :.monfrievydailhs@", max_size=24) | st.text(max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text):
    for candidate in (text, f"{text} 3 * * *", f"0 0 {text} * *", f"0 0 * * {text}"):
        answer, said = answer_or_error(candidate)
        assert answer is None or answer > NOW
        assert said.isprintable()


@needs_croniter
def test_an_answer_takes_less_than_50_ms():
    worst = {}
    for which, schedule in PARSED.items():
        costs = []
        for moment in (at("2026-01-01"), SPRING, AUTUMN):
            begin = time.process_time()
            schedule.next_after(moment)
            costs.append(time.process_time() - begin)
        worst[min(costs)] = which
    assert max(worst) < 0.05, worst[max(worst)]


# --- Without croniter -----------------------------------------------------------------------------


def test_without_croniter_only_cron_expressions_are_missing_something(monkeypatch):
    monkeypatch.setitem(sys.modules, "croniter", None)
    for text in ("0 5 * * *", "@hourly", "@monthly", ["daily 05:00", "*/5 * * * *"]):
        with pytest.raises(MissingPackageError, match="needs croniter: pip install croniter"):
            parse_schedule(text, UTC)
    for text in BUILT_IN_TEXTS:
        assert parse_schedule(text, UTC).first(NOW) is not None


def test_built_in_forms_import_neither_croniter_nor_re():
    code = (
        "import sys, bgtasks; zone = bgtasks.Zone('');"
        "bgtasks.parse_schedule(['daily 03:30', 'every 5 min'], zone).next_after(1e9);"
        "print(sorted({'croniter', 're', 'zoneinfo'} & set(sys.modules)))"
    )
    assert run_bare(code) == "[]\n"
