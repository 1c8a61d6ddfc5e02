"""What people are told: when, what it says, and how it gets to them.

The first part moves a fake clock over real runs; the second goes through the command line, with a
real mail server, real programs and a real web server for the pings.
"""

import fcntl
import json
import os
import re
import resource
import shlex
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from email import message_from_bytes, policy
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROGRAM, Site, wait_for
from smtp_server import MailSink
from test_policy import CRASH, START, Installation, crash, works

import bgtasks

DAY = 86400
ME = "notify_email = me@example.org"
SPOOL = "email_asynchronous = 1"  # what is to be sent stays in the outbox, to be looked at


# -- which end of a run is news


KNOWN = ("", "failing", "paused", "interrupted", "hanging", "missed")
ENDS = [
    # outcome, by hand, paused with it, failures before, what it is if people know of no trouble
    ("done", False, False, 0, "success"),
    ("done", True, False, 0, ""),
    ("nothing", False, False, 0, "success"),
    ("more", False, False, 0, ""),
    ("failed", False, False, 0, ""),
    ("failed", False, False, 1, "failing"),
    ("failed", False, False, 7, "failing"),
    ("failed", True, False, 7, ""),
    ("timed_out", False, False, 1, "failing"),
    ("timed_out", False, False, 0, ""),
    ("failed", False, True, 7, "paused"),
    ("interrupted", False, True, 0, "paused"),
    ("failed", True, True, 7, ""),
    ("interrupted", False, False, 0, "interrupted"),
    ("interrupted", True, False, 0, ""),
    ("killed", False, False, 0, ""),
]
EVERYTHING = ("failure", "recovery", "success")


def a_task(**settings):
    nothing = {"notify": None, "notify_on": None, "notify_after": None}
    return bgtasks.Task("a", "a.sh", settings={**nothing, **settings})


def some_settings(**settings):
    values = {"notify_email": ("me@example.org",), "notify_on": EVERYTHING, "notify_after": 2}
    return SimpleNamespace(**{**values, "notify_command": "", **settings})


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(("outcome", "by_hand", "paused", "before", "kind"), ENDS)
def test_each_end_of_a_run_is_news_of_one_kind(known, outcome, by_hand, paused, before, kind):
    row = {"told": known, "consecutive_failures": before}
    end = {"outcome": outcome, "by_hand": by_hand}
    follows = {"paused_note": "failed 8 times in a row"} if paused else {}
    if known and outcome in ("done", "nothing", "more"):
        kind = "recovered"
    assert bgtasks.kind_of_end(a_task(), row, end, follows, some_settings()) == kind


def test_the_number_of_failures_of_a_task_wins_over_that_of_all():
    row, end = {"told": "", "consecutive_failures": 2}, {"outcome": "failed", "by_hand": False}
    task = a_task(notify_after=4)
    assert bgtasks.kind_of_end(task, row, end, {}, some_settings()) == ""
    row["consecutive_failures"] = 3
    assert bgtasks.kind_of_end(task, row, end, {}, some_settings()) == "failing"


TROUBLES = ("failing", "paused", "interrupted", "hanging", "missed")


def told(kind, known="", ago=0.0, task=None, **settings):
    row = {"told": known, "told_at": START - ago if known else None}
    found = bgtasks.notices_of(task or a_task(), row, kind, START, some_settings(**settings))
    return [notice["kind"] for notice in found]


@pytest.mark.parametrize("kind", [*TROUBLES, "new", "recovered", "success"])
@pytest.mark.parametrize("known", KNOWN)
def test_a_trouble_is_told_once_and_again_after_a_day(kind, known):
    again = "still failing" if kind == "failing" else kind
    same = kind == known
    assert told(kind, known, 3600) == [] if same else [kind]
    assert told(kind, known, DAY - 700) == ([] if same else [kind])
    assert told(kind, known, DAY) == ([again] if same else [kind])
    assert told(kind, known, 9 * DAY) == ([again] if same else [kind])


@pytest.mark.parametrize("kind", [*TROUBLES, "new", "recovered", "success"])
def test_nobody_is_told_what_nobody_wants_to_hear(kind):
    word = {"recovered": "recovery", "success": "success"}.get(kind, "failure")
    others = tuple(sorted(set(EVERYTHING) - {word}))
    assert told(kind, notify_on=others) == []
    assert told(kind, notify_on=(word,)) == [kind]
    assert told(kind, task=a_task(notify_on=list(others))) == []
    assert told(kind, task=a_task(notify_on=[word]), notify_on=others) == [kind]
    assert told(kind, notify_email=()) == []
    assert told(kind, task=a_task(notify=[])) == []
    assert told(kind, notify_email=(), task=a_task(notify=["you@example.org"])) == [kind]
    assert told(kind, notify_email=(), notify_command="tell") == [kind]


# -- when, by the clock


@pytest.fixture
def place(site):
    place = Installation(site)
    site.params.write_text(f"node = here\ntimezone = UTC\n{ME}\n{SPOOL}\n")
    yield place
    place.store.close()


def news(place):
    """What people are to be told since the last look; it then counts as told."""
    found = place.store.notices()
    place.store.forget_notices(found[-1]["id"] if found else 0)
    return [f"{notice['task']} {notice['kind']}" for notice in found]


def after(place, seconds, **settings):
    """A wake-up some seconds later, and its news."""
    place.wake(seconds, **settings)
    return news(place)


def hourly(place, body="", **settings):
    """Let the task `a` have this body; it is hourly and not tried again in between."""
    place.site.shell("a", body, schedule="every 1 h", **{"retries": 0, **settings})


@pytest.fixture
def known(place):
    """An installation whose task `a` ran and worked, of which people know."""
    hourly(place)
    assert after(place, 0) == ["a new"]
    return place


def by_hand(place, name="a"):
    runner = bgtasks.Runner(place.settings(), place.store, place.clock, "hand", place.tell)
    return runner.run_by_hand(name)["outcome"]


def test_a_task_that_fails_is_told_once_then_once_a_day_then_that_it_works_again(known):
    hourly(known, "exit 1")
    assert after(known, 3600) == ["a failing"]
    assert [after(known, DAY / 6) for _ in range(5)] == [[]] * 5
    assert after(known, DAY / 6) == ["a still failing"]
    assert [after(known, DAY / 6) for _ in range(5)] == [[]] * 5
    assert after(known, DAY / 6) == ["a still failing"]
    hourly(known)
    assert after(known, 3600) == ["a recovered"]
    assert after(known, 3600) == []
    hourly(known, "exit 1")
    assert after(known, 3600) == ["a failing"]


def test_a_daily_task_that_fails_a_little_earlier_is_told_each_day_all_the_same(known):
    hourly(known, "exit 1")
    assert after(known, 3600) == ["a failing"]
    assert after(known, DAY - 5) == ["a still failing"]


def test_notify_after_3_tells_the_third_failure_in_a_row(known):
    hourly(known, "exit 1", notify_after=3)
    assert [after(known, 3600) for _ in range(4)] == [[], [], ["a failing"], []]
    hourly(known, notify_after=3)
    assert after(known, 3600) == ["a recovered"]


def test_with_notify_after_3_two_failures_and_a_success_are_no_news(known):
    for body in ("exit 1", "exit 1", "", "exit 1", "exit 1", ""):
        hourly(known, body)
        assert after(known, 3600, notify_after="3") == []


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("failure, recovery", ["failing", "", "recovered", ""]),
        ("failure", ["failing", "", "", ""]),
        ("recovery", ["", "", "recovered", ""]),
        ("success", ["", "", "success", "success"]),
        ("failure, success", ["failing", "", "success", "success"]),
        ("failure, recovery, success", ["failing", "", "recovered", "success"]),
    ],
)
@pytest.mark.parametrize("where", ["for all", "of the task"])
def test_notify_on_says_what_people_hear(known, wanted, told, where):
    own = {"notify_on": wanted.split(", ")} if where == "of the task" else {}
    for_all = {"notify_on": "success" if own else wanted}
    heard = []
    for body in ("exit 1", "exit 1", "", ""):
        hourly(known, body, **own)
        heard += after(known, 3600, **for_all) or ["a "]
    assert heard == [f"a {kind}" for kind in told]


def test_by_hand_a_failure_is_not_told_but_a_recovery_is(known):
    hourly(known, "exit 1", notify_on=["failure", "recovery", "success"])
    assert by_hand(known) == "failed"
    assert news(known) == []
    assert after(known, 3600) == ["a failing"]
    hourly(known, notify_on=["failure", "recovery", "success"])
    assert by_hand(known) == "done"
    assert news(known) == ["a recovered"]
    assert by_hand(known) == "done"
    assert news(known) == []


def test_a_new_file_is_told_when_it_first_runs_but_not_by_hand(place):
    works(place, "a", schedule="manual")
    works(place, "b", schedule="daily 01:00")
    assert after(place, 0) == []
    assert by_hand(place) == "done"
    assert news(place) == []
    assert after(place, 3600) == ["b new"]
    assert after(place, DAY) == []


def test_a_task_that_bgtasks_pauses_is_told(known):
    hourly(known, "exit 1", pause_after_failures=2)
    assert after(known, 3600) == ["a failing"]
    assert after(known, 3600) == ["a paused"]
    assert after(known, 3600) == []
    hourly(known, pause_after_failures=2)
    assert after(known, 3600) == []
    assert by_hand(known) == "done"
    assert news(known) == ["a recovered"]


def test_after_resume_or_clear_the_same_trouble_is_news_again(known):
    hourly(known, "exit 1", pause_after_failures=1)
    assert after(known, 3600) == ["a paused"]
    bgtasks.resume(known.store, "a", "ann", known.clock.now())
    assert after(known, 3600) == ["a paused"]
    bgtasks.resume(known.store, "a", "ann", known.clock.now())
    hourly(known, "exit 1")
    assert after(known, 3600) == ["a failing"]
    with known.store:
        bgtasks.forgive(known.store, "a", known.clock.now())
    assert after(known, 3600) == ["a failing"]
    assert after(known, 3600) == []


def test_a_task_that_is_interrupted_is_told_once_until_it_works_again(known):
    hourly(known, CRASH)
    heard = []
    for _ in range(2):
        crash(known, 3600)
        heard += news(known)
    assert heard == ["a interrupted"]
    hourly(known)
    assert after(known, 3600) == ["a recovered"]


def test_a_missed_slot_is_told(place):
    works(place, schedule="daily 03:30", missed_after="1 h")
    assert after(place, 0) == []
    assert after(place, 5 * 3600) == ["a missed"]
    assert after(place, DAY - 3600) == ["a new", "a recovered"]


def test_troubles_that_take_turns_are_not_a_mail_per_run(known):
    heard = []
    for turn in range(6):
        hourly(known, CRASH if turn % 2 else "exit 1")
        crash(known, 3600, max_interruptions="0")
        heard += news(known)
    assert heard == ["a failing", "a interrupted"]
    hourly(known)
    assert after(known, 3600) == ["a recovered"]


def test_nothing_is_noted_if_nobody_listens_until_somebody_does(known):
    hourly(known, "exit 1")
    for _ in range(2):
        known.wake(3600, notify_email="")
    assert known.store.notices() == []
    assert known.task("a")["told"] == ""
    assert after(known, 3600) == ["a failing"]
    hourly(known, notify=[])
    assert after(known, 3600) == []
    hourly(known, "exit 1", notify=[])
    assert after(known, 3600) == []


@pytest.fixture
def hanging(known):
    """The task `a`, that usually takes 4 minutes, with 5 to its deadline, at work in a process."""
    release = known.site.folder / "release"
    hourly(known, f"echo half way; until test -e {release}; do sleep 0.05; done", deadline="5 min")
    known.store.execute("UPDATE run SET ended_at = started_at + 240")
    known.site.make_due("a")
    running = known.site.start("--cron_max_execution_time=0")
    try:
        wait_for(lambda: known.store.open_runs() and known.site.log("a").endswith("half way\n"))
        yield known
    finally:
        release.touch()
        running.wait(60)


def looked(place, moment):
    """What another wake-up tells that looks at this moment."""
    place.clock.moment = moment
    bgtasks.Runner(place.settings(), place.store, place.clock, "cli", place.tell).settle()
    return news(place)


def test_a_task_that_hangs_is_told_past_its_deadline_its_usual_time_and_10_minutes(hanging):
    news(hanging)
    (run,) = hanging.store.open_runs()
    hangs_at = run["started_at"] + 300 + 240 + 600
    assert looked(hanging, hangs_at - 1) == []
    assert looked(hanging, hangs_at + 1) == ["a hanging"]
    assert looked(hanging, hangs_at + 3600) == []
    assert looked(hanging, hangs_at + DAY + 1) == ["a hanging"]
    (hanging.site.folder / "release").touch()
    wait_for(lambda: not hanging.store.open_runs())
    assert news(hanging) == ["a recovered"]


def test_the_mail_of_a_task_that_hangs_shows_what_it_printed_so_far(hanging):
    news(hanging)
    (run,) = hanging.store.open_runs()
    hanging.clock.moment = run["started_at"] + 1200
    bgtasks.Runner(hanging.settings(), hanging.store, hanging.clock, "cli", hanging.tell).settle()
    (mail,) = delivered(hanging)
    assert mail["Subject"] == "[bgtasks here] a hangs"
    lines = mail.get_content().splitlines()
    since = bgtasks.iso(run["started_at"])
    assert lines[0] == f"a hangs; is at work since {since}, past its deadline"
    assert "  | half way" in lines


# -- what it says


def outbox(place):
    folder = place.site.folder / "outbox"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def delivered(place, **settings):
    """Let the end of a wake-up deliver; return the mails, which then are gone."""
    bgtasks.Notifier(place.settings(**settings), place.store, place.clock).close()
    mails = []
    for file in outbox(place):
        if file.suffix == ".eml":
            mails.append(message_from_bytes(file.read_bytes(), policy=policy.default))
            file.unlink()
    return mails


def text_after(place, seconds, **settings):
    """The text of the only mail of a wake-up, as lines."""
    place.wake(seconds, **settings)
    (mail,) = delivered(place, **settings)
    return mail.get_content().splitlines()


def test_it_says_what_since_when_how_often_and_what_was_printed(known):
    begin = known.clock.now() + 3600
    hourly(known, "echo first; echo 'no space left'; exit 3", notify_after=2)
    known.wake(3600)
    lines = text_after(known, 3600)
    assert lines[:4] == [
        "a began to fail; exit code 3",
        f"  at: {bgtasks.iso(begin + 3600)}",
        f"  since: {bgtasks.iso(begin)}",
        f"  last success: {bgtasks.iso(begin - 3600)}",
    ]
    assert "  failures in a row: 2" in lines
    place = lines.index("  the last it printed:")
    assert lines[place + 1 : place + 4] == ["  | first", "  | no space left", "  to look further:"]
    commands = [shlex.split(line)[3:] for line in lines[place + 4 : place + 7]]
    run = str(known.store.history("a", 1)[0]["id"])
    assert commands == [["explain", "a"], ["log", run], ["clear", "a"]]


def test_a_recovery_says_no_more_than_it_knows(known):
    hourly(known, "exit 1")
    text_after(known, 3600)
    hourly(known, "echo message=42 files >>$BGTASKS_REPORT")
    lines = text_after(known, 3600)
    assert lines[0] == "a works again; 42 files"
    assert [line for line in lines if "row" in line or "since" in line] == []
    assert "clear" not in " ".join(lines)


def test_a_pause_says_why_and_how_to_resume(known):
    hourly(known, "exit 1", pause_after_failures=1)
    lines = text_after(known, 3600)
    assert lines[0] == "a was paused; failed 1 times in a row"
    assert any(line.endswith(f"--param_file={known.site.params} resume a") for line in lines)


def test_a_missed_slot_says_how_late_it_was_and_names_the_history(place):
    works(place, schedule="daily 03:30", missed_after="1 h")
    place.wake()
    lines = text_after(place, 5 * 3600)
    assert lines[0] == "a missed its slot; was 90 min late, more than missed_after allows"
    assert any(line.endswith(" history a") for line in lines)


def test_an_interruption_says_so(known):
    hourly(known, CRASH)
    crash(known, 3600)
    (mail,) = delivered(known)
    assert mail["Subject"] == "[bgtasks here] a was interrupted"
    assert mail.get_content().startswith("a was interrupted; its processes vanished before it")


def test_a_new_file_says_its_name(place):
    works(place)
    lines = text_after(place, 0)
    assert lines[0] == "a ran for the first time; a.sh, a new file"


def changes(lines):
    (found,) = [line for line in lines if "since it last worked" in line] or [""]
    return found.partition(": ")[2]


def test_it_says_nothing_of_changes_if_nothing_changed(place):
    flag = place.site.folder / "flag"
    hourly(place, f"test ! -e {flag}")
    place.wake()
    delivered(place)
    flag.touch()
    assert changes(text_after(place, 3600)) == ""
    said = bgtasks.explain(
        place.settings(), place.store, place.status("a"), place.clock.now(), place.clock.now()
    )
    assert "since it last worked there changed: nothing known" in said["sentences"]


def test_it_says_which_of_task_file_settings_and_param_file_changed(place):
    flag = place.site.folder / "flag"
    place.site.python("a", f"import os; assert not os.path.exists({str(flag)!r})", retries=0)
    place.wake()
    delivered(place)
    flag.touch()
    place.site.python("a", f"import os\nassert not os.path.exists({str(flag)!r})", retries=0)
    assert changes(text_after(place, 3600)) == "its file"
    place.site.python("a", f"import os\nassert not os.path.exists({str(flag)!r})", retries=1)
    assert changes(text_after(place, DAY)) == "its file, its settings"
    os.utime(place.site.params, (1, 1))
    assert changes(text_after(place, DAY)) == "its file, its settings, the param file"


def test_the_file_of_a_program_that_changed_is_named_once(place):
    script = place.site.shell("a", "", schedule="every 1 h", retries=0)
    os.utime(script, (1, 1))
    place.wake()
    delivered(place)
    place.site.shell("a", "exit 1", schedule="every 1 h", retries=0)
    assert changes(text_after(place, 3600)) == "its file"


@pytest.mark.parametrize(
    ("key", "good", "said"),
    [
        ("the program", "/usr/bin/python3.9 of 2020-01-01", "the program (/usr/bin/python3.9 of "),
        ("bgtasks", "0.1 on Python 3.8.1", "bgtasks (0.1 on Python 3.8.1 -> "),
        ("the user", "www-data", "the user (www-data -> "),
        ("the node", "there", "the node (there -> here)"),
        ("the boot of the machine", ["1-2-3"], "the boot of the machine"),
        ("free disk", 1 << 40, "free disk (1099511627776 -> "),
    ],
)
def test_it_says_which_of_the_circumstances_changed(known, key, good, said):
    flag = known.site.folder / "flag"
    body = f"import os; assert not os.path.exists({str(flag)!r})"
    (known.site.tasks / "a.sh").unlink()
    known.site.python("a", body, schedule="every 1 h", retries=0)
    known.wake(3600)
    remembered = {**json.loads(known.task("a")["good"]), key: good}
    known.store.change("a", good=json.dumps(remembered))
    flag.touch()
    delivered(known)
    assert changes(text_after(known, 3600)).startswith(said)


def test_what_may_have_changed_is_not_guessed_where_nothing_was_remembered():
    now = {"the node": "here", "free disk": 1}
    assert bgtasks.changes_since({}, now) == []
    assert bgtasks.changes_since({"free disk": 50}, now) == ["free disk (50 -> 1 MiB)"]
    assert bgtasks.changes_since({"free disk": 1}, {"free disk": 1}) == []
    assert bgtasks.changes_since({"free disk": 1000}, {"free disk": 501}) == []
    assert bgtasks.changes_since({"free disk": 1000}, {"free disk": 499}) != []


def test_a_program_or_param_file_that_is_gone_is_a_change_not_an_error(place):
    task = bgtasks.Task("a", "a", argv=("no-such-program", "x"))
    settings = place.settings()._replace(files=("/no/such/file",))
    found = bgtasks.circumstances(task, settings)
    assert found["the program"].endswith("no-such-program of None")
    assert found["the param file"] == [None]
    assert bgtasks.circumstances(task._replace(argv=("sh",)), settings)["the program"][0] == "/"


def test_explain_says_what_changed_since_it_last_worked(site):
    site.shell("a", "", schedule="every 1 d")
    site.wake()
    site.params.write_text("node = there\n")
    site.shell("a", "exit 1", schedule="every 1 d")
    site.make_due("a")
    site.wake()
    said = " ".join(site.run("explain", "a").stdout.split())
    assert "Since it last worked there changed: its file" in said
    assert "the param file, " in said
    assert "the node (here -> there)." in said


def test_the_shown_changes_of_a_mail_and_explain_are_the_same(known):
    hourly(known, "exit 1")
    shown = changes(text_after(known, 3600))
    now = known.clock.now()
    said = bgtasks.explain(known.settings(), known.store, known.status("a"), now, now)["sentences"]
    assert f"since it last worked there changed: {shown}" in said


HOSTILE = r"""
printf 'plain\n\033[31mred\033[0m\rover\n'
printf 'From here\n.\n\nSubject: forged\r\n\r\nbody\n'
printf 'null \000 bell \007 \302\205 end\n'
printf 'bad \377\376 bytes, \303\244\342\202\254\360\237\230\200\n'
printf 'right \342\200\256 to left\ttab\n'
printf 'message=done \033[2J \302\233 \r\nX-Header: forged\n' >>$BGTASKS_REPORT
"""


def test_control_characters_and_bad_bytes_of_a_task_are_visible_and_steer_nothing(known):
    hourly(known, HOSTILE + "exit 1")
    known.wake(3600)
    (mail,) = delivered(known)
    text = mail.get_content()
    shown = [line[4:] for line in text.splitlines() if line.startswith("  | ")]
    assert shown == [
        "plain",
        r"\x1b[31mred\x1b[0m",
        "over",
        "From here",
        ".",
        "",
        "Subject: forged",
        "",
        "body",
        r"null \x00 bell \x07 ",
        " end",
        r"bad \xff\xfe bytes, ä€😀",
        r"right \u202e to left tab",
    ]
    assert all(line.isprintable() for line in text.splitlines())
    assert list(mail.keys()) == [
        *("From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted"),
        *("Content-Type", "Content-Transfer-Encoding", "MIME-Version"),
    ]


def test_a_hostile_message_is_one_visible_line(known):
    hourly(known, "exit 1")
    delivered(known)
    known.wake(3600)
    delivered(known)
    hourly(known, HOSTILE)
    lines = text_after(known, 3600)
    assert lines[0].startswith(r"a works again; done \x1b[2J \x9b")
    assert all(line.isprintable() for line in lines)
    hourly(known, "exit 1")
    text_after(known, 3600)
    hourly(known, "printf 'message=%0300000d\\n' 7 >>$BGTASKS_REPORT")
    assert len(text_after(known, 3600)[0]) < 1100


@pytest.mark.parametrize(
    "node", ["a b", "ä€😀", "x" * 300, "<a@b>, c: d", '"quoted\\"', ".", "..", "-"]
)
def test_any_name_of_the_machine_gives_a_correct_mail(known, node):
    hourly(known, "exit 1")
    known.wake(3600, node=node)
    (mail,) = delivered(known, node=node)
    kept = "[bgtasks " + node if len(node) < 99 else "[bgtasks xxxxxxxx"
    assert " ".join(str(mail["Subject"]).split()).startswith(kept)
    assert len(str(mail["Subject"])) <= 200
    (sender,) = mail["From"].addresses
    assert re.fullmatch(r"bgtasks@[A-Za-z0-9.-]+", str(mail["From"]))
    assert sender.username == "bgtasks"
    assert re.fullmatch(r"<[0-9a-f]{24}@[A-Za-z0-9.-]+>", str(mail["Message-ID"]))
    assert mail["To"] == "me@example.org"
    assert mail.defects == []


def test_a_path_that_is_no_text_breaks_no_mail(known):
    folder = known.site.folder / os.fsdecode(b"caf\xe9\n")
    folder.mkdir()
    params = folder / "cron.params"
    params.write_text(known.site.params.read_text())
    hourly(known, "exit 1")
    known.wake(3600)
    settings = known.settings()._replace(files=(str(params),))
    bgtasks.Notifier(settings, known.store, known.clock).close()
    (file,) = outbox(known)
    text = message_from_bytes(file.read_bytes(), policy=policy.default).get_content()
    assert r"caf\udce9\n" in text
    assert len(text.splitlines()) == text.count("\n")


def test_a_log_of_100_mb_becomes_a_mail_of_its_last_lines(site):
    configure(site, ME, SPOOL)
    line = "x" * 999
    site.shell(
        "a", f"yes {line} | head -c 100000000; echo; echo the end; exit 1", schedule="every 1 d"
    )
    site.wake()
    (file,) = (site.folder / "outbox").iterdir()
    content = file.read_bytes()
    assert len(content) < 20_000
    shown = message_from_bytes(content, policy=policy.default).get_content().splitlines()
    shown = [line[4:] for line in shown if line.startswith("  | ")]
    assert shown[-1] == "the end"
    assert len(shown) <= 40  # of both events: that it is new, and that it fails
    assert max(map(len, shown)) == 200


def test_the_same_address_twice_is_told_once(known):
    hourly(known, "exit 1", notify=["me@example.org", "you@example.org", "me@example.org"])
    known.wake(3600)
    mails = delivered(known)
    assert sorted(mail["To"] for mail in mails) == ["me@example.org", "you@example.org"]
    assert [mail.get_content().count("began to fail") for mail in mails] == [1, 1]


def test_a_task_that_began_to_fail_twice_before_a_mail_is_one_task(known):
    for body in ("exit 1", "", "exit 1"):
        hourly(known, body)
        known.wake(3600)
    (mail,) = delivered(known)
    assert "tasks began" not in mail["Subject"]
    assert mail.get_content().startswith("a began to fail; exit code 1\n")


def test_the_worst_comes_first(known):
    works(known, "b", schedule="every 1 h")
    hourly(known, "exit 1")
    known.wake(3600)
    (mail,) = delivered(known)
    assert mail["Subject"] == "[bgtasks here] a began to fail, b ran for the first time"


def test_addresses_beyond_ascii_are_written_as_they_are(known):
    hourly(known, "exit 1", notify=["jörg@exämple.org"])
    known.wake(3600)
    delivered(known)
    known.store.note_notices([{"at": START, "task": "a", "run": None, "kind": "new", "about": ""}])
    bgtasks.Notifier(known.settings(), known.store, known.clock).close()
    (file,) = outbox(known)
    assert "\nTo: jörg@exämple.org\n".encode() in file.read_bytes()
    mail = bgtasks.read_mail(file.read_bytes(), START, known.settings().values)
    assert mail.recipients == ("jörg@exämple.org",)


# -- keeping it until it is sent


def test_a_wake_up_that_stays_tells_people_every_10_minutes(known):
    hourly(known, "exit 1")
    notifier = bgtasks.Notifier(known.settings(), known.store, known.clock)
    known.wake(3600)
    notifier = bgtasks.Notifier(known.settings(), known.store, known.clock)
    known.clock.advance(600)
    notifier.tell("progress", {"runs": []})
    assert outbox(known) == []
    known.clock.advance(1)
    notifier.tell("progress", {"runs": []})
    assert [file.suffix for file in outbox(known)] == [".eml"]
    assert known.store.notices() == []


def test_a_broken_file_found_by_a_wake_up_that_stays_disturbs_nothing(known):
    """It is told within a transaction, in which nothing may be delivered."""
    hourly(known, "exit 1")
    known.wake(3600)
    settings = known.settings(email_asynchronous="0", sendmail_path="/bin/true")
    notifier = bgtasks.Notifier(settings, known.store, known.clock)
    runner = bgtasks.Runner(settings, known.store, known.clock, "cli", notifier.tell)
    known.site.shell("b", "", schedule="never ever")
    known.clock.advance(700)
    runner.read_folder()
    notifier.close()
    assert known.status("b")["state"] == "broken"
    assert known.task("b")["error"]
    assert outbox(known) == []
    assert known.store.notices() == []


@pytest.mark.parametrize("what", ["a file", "a link to nowhere"])
def test_what_cannot_be_put_into_the_outbox_stays_for_the_next_wake_up(known, what):
    folder = known.site.folder / "outbox"
    delivered(known)
    if what == "a file":
        folder.write_text("")
    else:
        folder.symlink_to("nowhere")
    hourly(known, "exit 1")
    known.wake(3600)
    notifier = bgtasks.Notifier(known.settings(), known.store, known.clock)
    notifier.close()
    assert [notice["kind"] for notice in known.store.notices()] == ["failing"]
    folder.unlink()
    (mail,) = delivered(known)
    assert "began to fail" in mail["Subject"]
    assert known.store.notices() == []


def test_of_several_mails_none_is_left_if_one_cannot_be_written(known, monkeypatch):
    """Else whoever comes first would get it again with each wake-up."""
    delivered(known)
    hourly(known, "exit 1", notify=["me@example.org", "you@example.org"])
    known.wake(3600)
    post, written = bgtasks.post, []

    def full_at_the_second(*args):
        if written:
            raise bgtasks.CreateError("the disk is full")
        written.append(post(*args))
        return written[-1]

    monkeypatch.setattr(bgtasks, "post", full_at_the_second)
    assert delivered(known) == []
    assert len(written) == 1
    monkeypatch.undo()
    assert len(delivered(known)) == 2


def test_doctor_tells_that_nobody_can_be_told(site):
    configure(site, ME)
    site.shell("a", "exit 1", schedule="every 1 d")
    (site.folder / "outbox").write_text("")
    assert site.wake().returncode == 0
    said = " ".join(site.run("doctor").stdout.split())
    assert f"{site.folder / 'outbox'} cannot be written: nobody hears of anything" in said


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(bgtasks.BgtasksError):
            bgtasks.post(str(tmp_path / "outbox"), b"x" * 10_000, START)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "outbox").iterdir()) == []


def test_a_lock_that_cannot_be_had_delays_the_news_only(known):
    hourly(known, "exit 1")
    known.wake(3600)
    lock = known.site.state / "locks" / "notices.lock"
    lock.mkdir()
    assert delivered(known) == []
    lock.rmdir()
    assert len(delivered(known)) == 1


def test_two_runners_that_deliver_at_once_tell_it_once(known):
    hourly(known, "exit 1")
    known.wake(3600)
    lock = known.site.state / "locks" / "notices.lock"
    with open(lock, "a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = known.site.start("--cron_max_execution_time=0", "--task=none")
        wait_for(lambda: str(lock) in opened(second.pid))
        assert second.poll() is None
        assert outbox(known) == []
        assert news(known) == ["a failing"]  # as the first one does once it has written its mails
    assert second.wait(60) == 0
    assert outbox(known) == []
    assert known.site.said.read_text() == ""


def opened(pid):
    """The files that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(os.readlink(link))
    return found


def test_what_a_killed_runner_had_recorded_the_next_wake_up_tells(site):
    configure(site, ME, SPOOL)
    site.wake()
    site.shell("a", "exit 1", schedule="every 1 d")
    runner = site.start("--cron_max_execution_time=600")
    wait_for(lambda: site.rows("SELECT * FROM notice WHERE kind = 'failing'"))
    runner.kill()
    assert runner.wait(60) == -9
    assert not (site.folder / "outbox").exists()
    assert site.wake().returncode == 0
    (file,) = (site.folder / "outbox").iterdir()
    assert b"began to fail" in file.read_bytes()
    assert site.rows("SELECT * FROM notice") == []
    site.wake()
    assert len(list((site.folder / "outbox").iterdir())) == 1


# -- through the command line


def configure(site, *lines):
    site.params.write_text("\n".join(["node = here", *lines, ""]))
    site.params.chmod(0o600)


def again(site, *names):
    """Let tasks be due at the next wake-up, whatever came before."""
    site.change("UPDATE task SET not_before = NULL, extra_at = NULL, extra_trigger = NULL")
    site.make_due(*names)


def waiting(site, suffix=".eml"):
    folder = site.folder / "outbox"
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.name[0] != "." and file.suffix == suffix)


def quiet_wake(site, *args, **options):
    done = site.wake(*args, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def parsed(sink):
    return [message_from_bytes(bytes(each[2]), policy=policy.default) for each in sink.mails]


@pytest.fixture
def patient(site, monkeypatch):
    """On a busy machine mails and pings may take their time; what hangs has tests of its own."""
    site.first = PATIENT
    monkeypatch.setattr(bgtasks, "PING_SECONDS", 60)
    monkeypatch.setattr(bgtasks, "SEND_SECONDS", 60)


PATIENT = "bgtasks.PING_SECONDS = bgtasks.SEND_SECONDS = 60"


@pytest.fixture
def sink(patient):
    with MailSink() as sink:
        yield sink


def fails_once(site, sink, *lines, **settings):
    """A task that fails for the first time, of which the server gets a mail; return its message."""
    configure(site, ME, *lines, sink.params())
    site.shell("a", "exit 1", schedule="every 1 d", **settings)
    quiet_wake(site)
    (mail,) = parsed(sink)
    return mail


def test_two_tasks_that_fail_in_one_wake_up_are_one_mail_with_that_as_its_first_sentence(
    site, sink
):
    configure(site, ME, sink.params())
    for name in ("a", "b"):
        site.shell(name, f"echo I am {name}; exit 1", schedule="every 1 d")
    site.shell("c", "", schedule="every 1 d")
    quiet_wake(site)
    (mail,) = parsed(sink)
    text = "2 tasks began to fail: a, b"
    assert mail["Subject"] == f"[bgtasks here] {text}"
    lines = mail.get_content().splitlines()
    assert lines[:2] == [f"{text}, in the same wake-up: look for what they share.", ""]
    heads = [line for line in lines[1:] if line and line[0] != " "]
    us = bgtasks.user_name(os.geteuid())
    assert heads == [
        *(f"{name} began to fail; exit code 1" for name in "ab"),
        *(f"{name} ran for the first time; {name}.sh, a new file" for name in "abc"),
        f"bgtasks {bgtasks.__version__} on here, as {us}, state in {site.state}",
    ]
    assert "  | I am a" in lines
    assert "  | I am b" in lines
    assert waiting(site) == []
    again(site)
    quiet_wake(site)
    assert len(sink.mails) == 1


def test_each_address_gets_its_own_mail_about_its_own_tasks(site, sink):
    configure(site, "notify_email = me@example.org, you@example.org", sink.params())
    site.shell("a", "exit 1", schedule="every 1 d")
    site.shell("b", "exit 1", schedule="every 1 d", notify="me@example.org")
    site.shell("c", "exit 1", schedule="every 1 d", notify=["other@example.org"])
    site.shell("d", "exit 1", schedule="every 1 d", notify=[])
    quiet_wake(site)
    assert {
        rcpt_tos: subject(mail) for (_, rcpt_tos, _), mail in zip(sink.mails, parsed(sink))
    } == {
        ("me@example.org",): "2 tasks began to fail: a, b",
        ("you@example.org",): "a began to fail, a ran for the first time",
        ("other@example.org",): "c began to fail, c ran for the first time",
    }
    assert len(sink.mails) == 3
    assert sorted(mail["To"] for mail in parsed(sink)) == sorted(
        rcpt_tos[0] for _, rcpt_tos, _ in sink.mails
    )


def subject(mail):
    return mail["Subject"].replace("[bgtasks here] ", "")


def test_a_mail_as_it_arrives_is_plain_text_with_the_headers_it_needs(site, sink):
    before = int(time.time())
    configure(site, ME, "mail_from = robot@example.org", sink.params())
    long = "ä " * 90 + "end = \t"
    site.shell("a", f"printf '%s\\n' '{long}' '=3D' '' ' trailing  '; exit 1", schedule="every 1 d")
    quiet_wake(site)
    ((sender, recipients, content),) = sink.mails
    assert (sender, recipients) == ("robot@example.org", ("me@example.org",))
    assert content.isascii()
    assert max(map(len, content.split(b"\r\n"))) <= 78
    assert b"\n" not in content.replace(b"\r\n", b"")
    (mail,) = parsed(sink)
    assert mail.defects == []
    assert (mail["From"], mail["To"]) == ("robot@example.org", "me@example.org")
    assert mail["Auto-Submitted"] == "auto-generated"
    assert before <= parsedate_to_datetime(mail["Date"]).timestamp() <= time.time()
    assert re.fullmatch(r"<[0-9a-f]{24}@here>", mail["Message-ID"])
    assert mail["MIME-Version"] == "1.0"
    assert mail["Content-Type"] == 'text/plain; charset="utf-8"'
    assert mail["Content-Transfer-Encoding"] == "quoted-printable"
    lines = mail.get_content().splitlines()
    begin = lines.index("  the last it printed:") + 1
    shown = [f"  | {long.expandtabs()}", "  | =3D", "  | ", "  |  trailing  "]
    assert lines[begin : begin + 4] == shown


def test_no_two_mails_have_the_same_message_id(site, sink):
    fails_once(site, sink, "notify_on = failure, recovery, success")
    site.shell("a", "", schedule="every 1 d")
    for _ in range(2):
        again(site)
        quiet_wake(site)
    assert len({mail["Message-ID"] for mail in parsed(sink)}) == 3
    assert [subject(mail) for mail in parsed(sink)][1:] == ["a works again", "a succeeded"]


def test_the_commands_it_shows_work_when_a_shell_gets_them(tmp_path, sink):
    folder = tmp_path / 'it\'s $HOME & "here"'
    folder.mkdir()
    site = Site(folder)
    mail = fails_once(site, sink, pause_after_failures=1)
    lines = mail.get_content().splitlines()
    commands = lines[lines.index("  to look further:") + 1 :][:3]
    said = []
    for command in commands:
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, cwd="/", check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
    assert "task a is paused: by bgtasks" in " ".join(said[0].lower().split())
    assert said[1:] == ["", ""]
    assert site.status("a")["state"] == "active"


def test_secrets_are_masked_in_output_reason_and_message(site, sink):
    configure(site, ME, sink.params(), "auth_pwd = opensesame7", SUCCESS)
    site.shell("a", "echo the key is opensesame7; exit 1", schedule="every 1 d")
    site.python("b", "raise RuntimeError('not opensesame7')", schedule="every 1 d")
    site.shell("c", "echo message=opensesame7 >>$BGTASKS_REPORT", schedule="every 1 d")
    quiet_wake(site)
    again(site, "c")
    quiet_wake(site)
    assert len(sink.mails) == 2
    texts = "".join(mail.get_content() for mail in parsed(sink)).replace("\r", "")
    assert "opensesame7" not in texts + str(sink.mails)
    assert "  | the key is ***\n" in texts
    assert "b began to fail; RuntimeError: not ***" in texts
    assert "c succeeded; ***\n" in texts


SUCCESS = "notify_on = failure, recovery, success"


def test_with_email_asynchronous_the_wake_up_leaves_mails_to_the_task_send_mail(site, sink):
    configure(site, ME, SPOOL, sink.params())
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert sink.mails == []
    assert sink.connections == 0
    assert len(waiting(site)) == 1
    source = PROGRAM.parent / "tasks.d" / "send_mail.py"
    site.write("send_mail.py", source.read_text())
    quiet_wake(site, env={"PYTHONPATH": str(PROGRAM.parent)})
    assert site.last("send_mail")["outcome"] == "done"
    assert [subject(mail) for mail in parsed(sink)] == ["a began to fail, a ran for the first time"]


def test_a_server_that_is_away_costs_nothing_and_gets_the_mail_later(site, sink):
    configure(site, ME, sink.params(), "smtp_port = 1")
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert len(waiting(site)) == 1
    configure(site, ME, sink.params())
    quiet_wake(site)
    assert len(sink.mails) == 1
    assert waiting(site) == []


def test_what_is_refused_for_now_is_sent_by_the_next_wake_up(site, sink):
    sink.answers["me@example.org"] = "451 greylisted, try again"
    configure(site, ME, sink.params())
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert len(waiting(site)) == 1
    sink.answers.clear()
    quiet_wake(site)
    assert len(sink.mails) == 1
    assert waiting(site) == []


def test_what_is_refused_for_good_lies_in_failed_with_the_answer(site, sink):
    sink.answers["me@example.org"] = "550 no such user here"
    configure(site, ME, sink.params())
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert waiting(site) == []
    mail, answer = sorted((site.folder / "outbox" / "failed").iterdir())
    assert answer.name == mail.name + ".answer"
    assert answer.read_text() == "me@example.org: 550 no such user here\n"
    assert b"began to fail" in mail.read_bytes()
    doctor = site.run("doctor").stdout
    assert "1 mail could not be sent" in " ".join(doctor.split())


def settings_of(site, **settings):
    return bgtasks.read_settings({"param_file": str(site.params), **settings}, "x")


def test_a_notice_that_nobody_takes_for_4_days_is_given_up(site, clock):
    configure(site, ME, SPOOL, "smtp_host = 127.0.0.1", "smtp_port = 1", "smtp_security = none")
    site.shell("a", "exit 1", schedule="every 1 d")
    site.wake()
    (mail,) = waiting(site)
    for seconds, left in ((4 * DAY - 60, 1), (4 * DAY + 60, 0)):
        clock.moment = mail.stat().st_mtime + seconds if left else clock.moment + 120
        assert bgtasks.send_own_mails(settings_of(site), clock) == 0
        assert len(waiting(site)) == left
    (answer,) = (site.folder / "outbox" / "failed").glob("*.answer")
    assert re.match(r"not sent: 421 mail server 127\.0\.0\.1:1: .*refused", answer.read_text())


def test_a_server_that_cannot_be_reached_is_asked_once_not_for_each_mail(site, clock, sink):
    configure(site, ME, sink.params())
    sink.greeting = "554 not you"
    folder = str(site.folder / "outbox")
    for _ in range(3):
        bgtasks.post(folder, b"To: me@example.org\n\nhello\n", START, bgtasks.OURS)
    bgtasks.send_own_mails(settings_of(site), clock)
    assert sink.connections == 1
    assert len(waiting(site)) == 3
    sink.greeting = ""
    bgtasks.send_own_mails(settings_of(site), clock)
    assert sink.connections == 2
    assert len(sink.mails) == 3


def test_one_bad_file_among_the_notices_keeps_no_other_from_being_sent(site, clock, sink):
    configure(site, ME, sink.params())
    folder = site.folder / "outbox"
    folder.mkdir()
    (folder / "bgtasks-0.eml").symlink_to("nowhere")
    (folder / "bgtasks-1.eml").write_text("no mail at all")
    (folder / "bgtasks-2.eml").write_text("To: me@example.org\n\nhello\n")
    (folder / ".bgtasks-3.eml").write_text("To: me@example.org\n\nunfinished\n")
    (folder / "bgtasks-4.eml.part").write_text("To: me@example.org\n\nof somebody else\n")
    bgtasks.send_own_mails(settings_of(site), clock)
    assert len(sink.mails) == 1
    assert waiting(site) == []
    failed = [path.name for path in (folder / "failed").glob("*.answer")]
    assert sorted(failed) == ["bgtasks-0.eml.answer", "bgtasks-1.eml.answer"]


def test_a_mail_that_is_just_being_sent_is_left_alone(site, clock, sink):
    configure(site, ME, sink.params())
    name = bgtasks.post(
        str(site.folder / "outbox"), b"To: me@example.org\n\nhello\n", START, bgtasks.OURS
    )
    held = bgtasks.take_mail(str(site.folder / "outbox" / name))
    bgtasks.send_own_mails(settings_of(site), clock)
    assert sink.mails == []
    os.close(held)
    bgtasks.send_own_mails(settings_of(site), clock)
    assert len(sink.mails) == 1


def test_the_local_sendmail_program_gets_sender_recipient_and_mail(site, patient):
    program = site.write(
        "sendmail", f'#!/bin/sh\necho "$@" >{site.said}; cat >{site.ledger}\n', 0o755
    )
    program = program.rename(site.folder / "sendmail")
    configure(site, ME, f"sendmail_path = {program}")
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert site.said.read_text() == "-i -f bgtasks@here -- me@example.org\n"
    content = site.ledger.read_bytes()
    assert b"\r" not in content
    mail = message_from_bytes(content, policy=policy.default)
    assert subject(mail) == "a began to fail, a ran for the first time"
    assert waiting(site) == []


@pytest.mark.parametrize(("code", "place"), [(67, "failed"), (75, "")])
def test_a_sendmail_program_that_refuses_keeps_the_mail(site, patient, code, place):
    program = site.folder / "sendmail"
    program.write_text(f"#!/bin/sh\necho unknown >&2; exit {code}\n")
    program.chmod(0o755)
    configure(site, ME, f"sendmail_path = {program}")
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert len(list((site.folder / "outbox" / place).glob("*.eml"))) == 1
    assert len(waiting(site)) == (not place)


def test_a_sendmail_program_that_does_not_even_read_a_large_mail_has_refused_it(site, patient):
    program = site.folder / "sendmail"
    program.write_text("#!/bin/sh\nexec <&-\nsleep 0.2\nexit 67\n")
    program.chmod(0o755)
    configure(site, ME, f"sendmail_path = {program}")
    for name in "abcd":
        site.shell(name, f"yes {'ä' * 300} | head -n 20; exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert waiting(site) == []
    mail, answer = sorted((site.folder / "outbox" / "failed").iterdir())
    assert mail.stat().st_size > 1 << 16
    assert "554 exit code 67" in answer.read_text()


def test_a_server_that_hangs_up_amid_a_mail_gets_the_others_and_later_this_one(site, sink):
    configure(site, "notify_email = me@example.org, you@example.org", sink.params())
    sink.drops_in_data = 1
    for name in "abcd":
        site.shell(name, f"yes {'ä' * 300} | head -n 20; exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert len(sink.mails) == 1
    assert len(waiting(site)) == 1
    quiet_wake(site)
    assert sorted(sink.recipients()) == [("me@example.org",), ("you@example.org",)]
    assert waiting(site) == []


# -- what hangs


@contextmanager
def listening(serve):
    """A port whose connections each get a thread that serves them, however badly; its number."""
    threads, connections = [], []

    def work(connection):
        with suppress(OSError):
            serve(connection)

    def accept():
        with suppress(OSError):
            while True:
                connections.append(server.accept()[0])
                threads.append(threading.Thread(target=work, args=(connections[-1],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield server.getsockname()[1]
        finally:
            for each in [server, *connections]:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            threads[0].join()
            for thread in threads[1:]:
                thread.join()
            for each in connections:
                each.close()


def dripping(connection):
    """Say one character after the other, for ever: no single read takes long."""
    while True:
        connection.sendall(b"2")
        time.sleep(0.5)


def silent(connection):
    while connection.recv(4096):
        pass


def test_what_hangs_costs_a_wake_up_at_most_10_seconds_and_no_run_anything(tmp_path, sink, stalls):
    """The mail server, the pinged one and notify_command hang all at once; SIGALRM is ignored.

    It hangs in two ways, at two places, at the same time."""
    with listening(silent) as first, listening(dripping) as second:
        ports = {"silent": first, "dripping": second}
        sites = [Site(folder) for folder in map(tmp_path.joinpath, ports) if not folder.mkdir()]
        running = [start_with_what_hangs(site, ports[site.folder.name]) for site in sites]
        for each in running:
            assert each.communicate(timeout=120) == (b"", b"")
            assert each.returncode == 0
    left = time.time()
    for site in sites:
        runs = site.rows("SELECT * FROM run ORDER BY task")
        assert [run["outcome"] for run in runs] == ["failed", "done"]
        assert max(stalls.seconds(run["started_at"], run["ended_at"]) for run in runs) < 2
        assert stalls.seconds(max(run["ended_at"] for run in runs), left) < 13
        assert stalls.seconds(*sorted(run["started_at"] for run in runs)) < 3
        assert [len(waiting(site, suffix)) for suffix in (".eml", ".json")] == [1, 1]
        sink.mails.clear()
        site.first = PATIENT
        configure(site, ME, sink.params())
        quiet_wake(site)
        assert [subject(mail) for mail in parsed(sink)] == [
            "a began to fail, a ran for the first time, b ran for the first time"
        ]
        assert waiting(site) == waiting(site, ".json") == []


def start_with_what_hangs(site, port):
    smtp = f"smtp_host = 127.0.0.1\nsmtp_port = {port}\nsmtp_security = none"
    configure(site, ME, smtp, "notify_command = sleep 1000")
    url = f"http://127.0.0.1:{port}/"
    site.shell("a", "exit 1", schedule="every 1 d", ping=url, order=1)
    site.shell("b", "", schedule="every 1 d", ping=url, order=2)
    command = ["sh", "-c", 'trap "" ALRM; exec "$@"', "sh"]
    command += site.command("--cron_max_execution_time=0")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_what_hangs_is_left_in_time_to_look_after_what_is_old(site, clock, monkeypatch, stalls):
    """The wait for the server ends before the kernel ends the whole sender."""
    monkeypatch.setattr(bgtasks, "SEND_SECONDS", 2.5)
    with listening(silent) as port:
        smtp = f"smtp_host = 127.0.0.1\nsmtp_port = {port}\nsmtp_security = none"
        configure(site, ME, smtp, "notify_command = sleep 1000")
        for suffix in ("eml", "json"):
            folder = str(site.folder / "outbox")
            bgtasks.post(folder, b"To: me@example.org\n\n{}", START, bgtasks.OURS, suffix)
        clock.moment = began = time.time()
        assert bgtasks.send_own_mails(settings_of(site), clock) == 0
        assert bgtasks.run_notify_command(settings_of(site), clock) == 0
        assert stalls.since(began) < 5
        assert [len(waiting(site, suffix)) for suffix in (".eml", ".json")] == [1, 1]
        clock.advance(5 * DAY)
        assert bgtasks.send_own_mails(settings_of(site), clock) == 0
        assert bgtasks.run_notify_command(settings_of(site), clock) == 0
        assert waiting(site) == waiting(site, ".json") == []
        (answer,) = (site.folder / "outbox" / "failed").glob("*.answer")
        assert "timed out" in answer.read_text()


def test_what_a_sender_started_ends_with_it_if_the_kernel_had_to_end_it(site):
    """Else it would keep the document to itself for as long as it hangs."""
    program = site.folder / "listener.sh"
    program.write_text("#!/bin/sh\nkill -ALRM $PPID\nsleep 1000\n")  # as the kernel does
    program.chmod(0o755)
    configure(site, f"notify_command = {program}")
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    (file,) = waiting(site, ".json")
    os.close(wait_for(lambda: bgtasks.take_mail(str(file))))


def test_a_system_without_a_free_process_keeps_what_is_to_be_sent(known, monkeypatch):
    hourly(known, "exit 1", ping="http://127.0.0.1:1/")
    known.wake(3600)
    settings = known.settings(email_asynchronous="0", notify_command="true")
    notifier = bgtasks.Notifier(settings, known.store, known.clock)

    def refused(_seconds, _body):
        raise BlockingIOError("no process")

    monkeypatch.setattr(bgtasks, "fork_apart", refused)
    notifier.tell("start", {"task": "a", "run": 1, "ping": "http://127.0.0.1:1/"})
    notifier.close()
    assert sorted(file.suffix for file in outbox(known)) == [".eml", ".json"]
    monkeypatch.undo()
    bgtasks.Notifier(known.settings(notify_command="true"), known.store, known.clock).close()
    assert [file.suffix for file in outbox(known)] == [".eml"]


def test_ended_senders_are_reaped_as_it_goes(known):
    url = "http://127.0.0.1:1/"
    notifier = bgtasks.Notifier(known.settings(), known.store, known.clock)
    for number in range(4):
        notifier.tell("start", {"task": "a", "run": number, "ping": url})
        wait_for(lambda: bgtasks.process_stat(notifier._senders[-1])[1] == "Z")
    assert len(notifier._senders) == 1
    notifier.close()


# -- notify_command


@pytest.fixture
def listener(site, patient):
    """A site whose notify_command puts each document into the ledger, a line each."""
    program = site.folder / "listener.sh"
    program.write_text(f"#!/bin/sh\n(cat; echo) >>{site.ledger}\nexit $1\n")
    program.chmod(0o755)
    return lambda code=0, *lines: configure(site, f"notify_command = {program} {code}", *lines)


def documents(site):
    return [json.loads(line) for line in site.ledger.read_text().split("\n") if line]


def test_notify_command_gets_a_json_document_on_its_stdin(site, listener):
    listener()
    site.shell("a", "printf 'it is ä\\377\\033\\n'; exit 1", schedule="every 1 d")
    site.shell("b", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    (found,) = documents(site)
    assert found["version"] == bgtasks.__version__
    assert found["node"] == "here"
    assert found["subject"] == "2 tasks began to fail: a, b"
    assert [(event["task"], event["event"]) for event in found["events"]] == [
        *(("a", "failing"), ("b", "failing"), ("a", "new"), ("b", "new"))
    ]
    event = found["events"][0]
    assert event["text"] == "a began to fail"
    assert event["about"] == "exit code 1"
    assert event["outcome"] == "failed"
    assert event["failures_in_a_row"] == 1
    assert event["last_success_at"] is None
    assert event["changed"] == []
    assert event["output"] == [r"it is ä\xff\x1b"]
    assert len(event["look_further"]) == 3
    assert event["run"] == site.last("a")["id"]
    assert waiting(site, ".json") == []
    assert waiting(site) == []


def test_a_notify_command_that_fails_gets_the_document_again_and_in_order(site, listener):
    listener(1)
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    site.shell("b", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert [found["subject"][:15] for found in documents(site)] == ["a began to fail"] * 2
    assert len(waiting(site, ".json")) == 2
    site.ledger.unlink()
    listener(0)
    quiet_wake(site)
    assert [found["subject"][0] for found in documents(site)] == ["a", "b"]
    assert waiting(site, ".json") == []


def test_a_notify_command_that_is_gone_or_was_removed_leaves_nothing_for_ever(site, clock):
    configure(site, "notify_command = /no/such/program")
    site.shell("a", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    (file,) = waiting(site, ".json")
    clock.moment = file.stat().st_mtime + 4 * DAY - 60
    bgtasks.run_notify_command(settings_of(site), clock)
    assert waiting(site, ".json") == [file]
    clock.advance(120)
    bgtasks.run_notify_command(settings_of(site), clock)
    assert waiting(site, ".json") == []
    site.shell("b", "exit 1", schedule="every 1 d")
    quiet_wake(site)
    assert len(waiting(site, ".json")) == 1
    configure(site)
    quiet_wake(site)
    assert waiting(site, ".json") == []


def test_a_document_that_somebody_reads_or_that_is_no_file_stops_no_other(site, clock, listener):
    listener()
    folder = site.folder / "outbox"
    names = [
        bgtasks.post(
            str(folder), b'{"number": %d}\n' % number, START + number, bgtasks.OURS, "json"
        )
        for number in range(2)
    ]
    held = bgtasks.take_mail(str(folder / names[0]))
    (folder / "bgtasks-0.json").symlink_to("nowhere")
    bgtasks.run_notify_command(settings_of(site), clock)
    assert documents(site) == [{"number": 1}]
    os.close(held)
    bgtasks.run_notify_command(settings_of(site), clock)
    assert documents(site) == [{"number": 1}, {"number": 0}]


# -- pings


class Beacon:
    """A real HTTP server that remembers how it was pinged: method, path with query, and body."""

    def __init__(self, answer=200):
        self.answer, self.before, self.location, self.pings = answer, {}, "", []

    def __enter__(self):
        beacon = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                beacon.before.get(self.path, int)()
                beacon.pings.append((self.command, self.path, body))
                moved = beacon.location and "moved" not in self.path
                self.send_response(302 if moved else beacon.answer)
                if moved:
                    self.send_header("Location", beacon.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST  # noqa: N815 - named by http.server

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}/uuid"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def paths(self):
        return [path for _, path, _ in self.pings]


@pytest.fixture
def beacon(patient):
    with Beacon() as beacon:
        yield beacon


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ("echo all is well", "/uuid"),
        ("echo oh no; exit 1", "/uuid/fail"),
        ("echo result=nothing >>$BGTASKS_REPORT", "/uuid"),
        ("echo result=more >>$BGTASKS_REPORT; echo message=x >>$BGTASKS_REPORT", "/uuid"),
    ],
)
def test_a_run_pings_its_start_and_how_it_ended_with_the_end_of_its_output(
    site, beacon, body, path
):
    site.shell("a", body, schedule="every 1 d", ping=beacon.url)
    quiet_wake(site)
    assert beacon.pings[0] == ("POST", "/uuid/start", b"")
    assert beacon.pings[1] == ("POST", path, site.log("a").encode())
    assert len(beacon.pings) == 2


def test_only_the_last_10_kb_of_the_output_go_with_a_ping_secrets_masked(site, beacon):
    configure(site, "auth_pwd = opensesame7")
    body = "yes 0123456789 | head -c 300000; echo; echo opensesame7 ä"
    site.shell("a", body, schedule="every 1 d", ping=beacon.url)
    quiet_wake(site)
    sent = beacon.pings[1][2]
    assert len(sent) == 10_000
    assert sent.endswith("\n*** ä\n".encode())


def test_a_run_by_hand_and_one_that_was_left_behind_ping_too(site, beacon):
    site.shell("a", "exit 1", schedule="manual", ping=beacon.url)
    assert site.run("run", "a").returncode == 1
    assert beacon.paths() == ["/uuid/start", "/uuid/fail"]
    beacon.pings.clear()
    site.shell("b", CRASH, schedule="every 1 d", ping=beacon.url)
    site.wake()
    wait_for(lambda: site.wake() and len(beacon.pings) == 2)
    assert beacon.paths() == ["/uuid/start", "/uuid/fail"]


def test_the_ping_of_an_end_never_overtakes_that_of_its_start(site, beacon):
    """Else whoever listens waits for the end of a run that ended; but no run waits for a ping."""

    def when_it_has_ended():
        wait_for(lambda: site.rows("SELECT * FROM run WHERE ended_at IS NOT NULL"), 30)
        time.sleep(0.5)  # in which it could be overtaken

    beacon.before["/uuid/start"] = when_it_has_ended
    site.shell("a", "", schedule="every 1 d", ping=beacon.url)
    quiet_wake(site)
    assert beacon.paths() == ["/uuid/start", "/uuid"]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/uuid?create=1", "/uuid/start?create=1"),
        ("/uuid/?create=1&x=%2F", "/uuid/start?create=1&x=%2F"),
        ("/uuid/", "/uuid/start"),
        ("", "/start"),
        ("/a/b;c#part", "/a/b;c/start"),
    ],
)
def test_a_ping_goes_below_the_path_and_keeps_the_query(beacon, given, path):
    assert bgtasks.ping(f"http://{beacon.host}{given}", "/start", b"") == 0
    assert beacon.paths() == [path]


def test_a_server_that_answers_500_changes_nothing_of_the_run(site):
    with Beacon(500) as beacon:
        site.shell("a", "", schedule="every 1 d", ping=beacon.url)
        quiet_wake(site, "--strict")
    assert beacon.paths() == ["/uuid/start", "/uuid"]
    assert site.last("a")["outcome"] == "done"
    assert site.last("a")["reason"] == ""


@pytest.mark.parametrize("port", [1, 0])
def test_a_server_that_is_not_there_or_says_nonsense_fails_the_ping_only(port):
    def nonsense(connection):
        connection.recv(4096)
        connection.sendall(b"\xff\xfe no HTTP at all\r\n\r\n")

    with listening(nonsense) as other:
        assert bgtasks.ping(f"http://127.0.0.1:{port or other}/", "", b"") == 1


def test_a_redirect_within_the_same_server_is_followed(beacon):
    beacon.location = "/moved/here"
    assert bgtasks.ping(beacon.url, "/start", b"body") == 0
    assert beacon.paths() == ["/uuid/start", "/moved/here"]


@pytest.mark.parametrize("location", ["http://{other}/x", "//{other}/x", "file:///etc/passwd"])
def test_a_redirect_to_another_host_is_not_followed(beacon, location):
    with Beacon() as other:
        beacon.location = location.format(other=other.host)
        assert bgtasks.ping(beacon.url, "", b"body") == 1
    assert beacon.paths() == ["/uuid"]
    assert other.pings == []


@pytest.mark.parametrize(
    ("old", "new", "followed"),
    [
        ("http://example.org/a", "https://example.org/a", True),
        ("http://example.org/a", "https://EXAMPLE.org/b?c", True),
        ("https://example.org/a", "http://example.org/a", False),
        ("http://example.org/a", "https://example.org.evil/a", False),
        ("http://example.org/a", "https://example.org@evil/a", False),
        ("http://example.org/a", "https://example.org:8443/a", False),
        ("http://example.org/a", "http://example.org:22/a", False),
        ("http://example.org:80/a", "ftp://example.org:80/a", False),
    ],
)
def test_a_redirect_may_lead_to_https_of_the_same_host_but_nowhere_else(old, new, followed):
    assert bgtasks.may_follow(old, new) == followed


BAD_URLS = [
    "ftp://example.org/x",
    "file:///etc/passwd",
    "example.org/uuid",
    "https://",
    "https:///uuid",
    "https://?x=1",
    "https://:443/x",
    "https://example.org/a b",
    "https://example.org/a\nb",
    "https://example.org/\x1b",
    "https://example.org:no/x",
    "https://me:secret@example.org/x",
    "https://example.org/ü",
    "https://[::1/x",
    7,
]
GOOD_URLS = ["http://[::1]:8000/x?y=1#z", "https://xn--exmple-cua.org/%C3%BC"]


def test_a_bad_url_to_ping_is_refused_when_the_file_is_read(site):
    for number, url in enumerate([*BAD_URLS, *GOOD_URLS]):
        site.shell(f"task{number}", "", ping=url)
    found = {row["name"]: row for row in site.json("status")["tasks"]}
    for number in range(len(BAD_URLS)):
        row = found[f"task{number}"]
        assert (BAD_URLS[number], row["state"]) == (BAD_URLS[number], "broken")
        assert row["reason"].startswith(f"task{number}.sh: ping: must be ")
        assert row["reason"].isprintable()
    assert [row["state"] for row in found.values()].count("active") == len(GOOD_URLS)


def test_an_idle_wake_up_sends_nothing_and_makes_no_outbox(site, sink, beacon):
    configure(site, ME, sink.params())
    site.shell("a", "", schedule="daily 03:30", ping=beacon.url)
    quiet_wake(site)
    site.change("UPDATE task SET next_run_at = ?", int(time.time()) + DAY)
    quiet_wake(site)
    assert (sink.connections, beacon.pings) == (0, [])
    assert not (site.folder / "outbox").exists()
