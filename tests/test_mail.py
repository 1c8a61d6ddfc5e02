"""Mails: the outbox, the task that sends what lies there, and `sendmail`.

Against a real SMTP server on loopback, with real files and processes that are really killed. The
short form runs with the other tests. All of it:
BGTASKS_FULL=1 python -m pytest -s tests/test_mail.py
"""

import collections
import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from email import message_from_bytes, policy
from email.header import decode_header, make_header
from email.utils import parseaddr
from pathlib import Path

import pytest
from conftest import PROGRAM, somebody_else, wait_for
from smtp_server import MailSink, free_port, silent_server

import bgtasks

FULL = bool(os.environ.get("BGTASKS_FULL"))
MESSAGES, KILLS = (1000, 50) if FULL else (150, 10)
SEND_MAIL = PROGRAM.parent / "tasks.d" / "send_mail.py"
ME, YOU, SHE, HE = "me@example.org", "you@example.org", "she@example.org", "he@example.org"
LOGIN = ("me", "opensesame7")
NOW = 1_767_225_600.0
DAYS = 86400
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def mail(to=YOU, text="hello", **fields):
    fields = {"From": ME, "To": to, "Subject": "test", **fields}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\n".join([*lines, "", text, ""]).encode()


class Office:
    """An installation that sends mails."""

    def __init__(self, site):
        self.site, self.outbox = site, site.folder / "outbox"
        self.failed = self.outbox / "failed"
        self.tries = self.outbox / ".tries.json"
        self.outbox.mkdir(0o700)
        shutil.copy(SEND_MAIL, site.tasks)
        self.configure()
        self._count = 0

    def configure(self, *lines):
        self.site.params.write_text("\n".join(["node = here", *lines, ""]))
        self.site.params.chmod(0o600)

    def put(self, content, name="", age=60.0):
        """Put a mail into the outbox as any application may; each is younger than the last."""
        self._count += 1
        path = self.outbox / (name or f"{self._count:05}")
        hidden = self.outbox / f".{self._count}"
        hidden.write_bytes(content)
        self.set_age(hidden, age - self._count / 1000)
        hidden.rename(path)
        return path

    @staticmethod
    def set_age(path, seconds):
        moment = time.time() - seconds
        os.utime(path, (moment, moment), follow_symlinks=False)

    def send(self):
        """Let the task run once, whatever came before; return the run."""
        self.said = self.site.run("run", "send_mail", "--force")
        (run,) = self.site.rows("SELECT * FROM run ORDER BY id DESC LIMIT 1")
        return run

    def sent(self, number, **expected):
        """Let the task run, and see how it ended."""
        run = self.send()
        expected = {"outcome": "done", "volume": number, "message": "", **expected}
        assert {key: run[key] for key in expected} == expected, self.said.stderr
        return run

    def has_nothing_to_send(self):
        self.sent(None, outcome="nothing")

    def left(self):
        """The names of what lies in the outbox and was not given up."""
        hidden = (".", "failed")
        return sorted(e.name for e in self.outbox.iterdir() if not e.name.startswith(hidden))

    def given_up(self):
        """What was given up: name -> the answer beside it."""
        files = self.failed.iterdir() if self.failed.exists() else ()
        names = {path.name for path in files}
        mails = {name for name in names if not name.endswith(".answer")}
        assert names == mails | {f"{name}.answer" for name in mails}
        return {name: (self.failed / f"{name}.answer").read_text().strip() for name in mails}

    def known(self):
        return json.loads(self.tries.read_text())

    def pass_time(self, seconds, **changes):
        """Let the tries have been noted so much earlier."""
        known = self.known()
        for each in known.values():
            each.update(changes, next_at=each["next_at"] - seconds)
        self.tries.write_text(json.dumps(known))

    def sendmail(self, *args, **options):
        """What a program gets that calls sendmail; ``input`` is text or bytes."""
        text = options.pop("input", b"")
        text = text.encode() if isinstance(text, str) else text
        done = self.site.run("sendmail", *args, input=text, text=False, **options)
        assert done.stdout.count(b"\n") <= 1
        assert done.stderr.count(b"\n") <= 1, done.stderr.decode()
        return done.returncode, (done.stdout + done.stderr).decode().strip()

    def posted(self, *args, **options):
        """The mail that a call of sendmail puts into the outbox, as it would be sent."""
        assert self.sendmail(*args, **options) == (0, "")
        (name,) = self.left()
        path = self.outbox / name
        assert (path.stat().st_mode & 0o777, self.outbox.stat().st_mode & 0o777) == (0o600, 0o700)
        return read(path.read_bytes())


@pytest.fixture
def office(site):
    return Office(site)


@pytest.fixture
def sink(office):
    with MailSink() as sink:
        office.configure(sink.params())
        yield sink


def read(content, **params):
    return bgtasks.read_mail(content, NOW, {"mail_from": (), "node": "here", **params})


def parsed(content):
    return message_from_bytes(content, policy=policy.default)


def subjects(sink):
    return [parsed(content)["Subject"] for _, _, content in sink.mails]


def server_params(sink=None, **params):
    """Settings for a MailServer in the process of the tests."""
    lines = sink.params().splitlines() if sink else ["smtp_port = 0"]
    values = dict(line.split(" = ", 1) for line in lines)
    values = {key.strip(): value.strip() for key, value in values.items()}
    found = {"node": "here", "mail_from": (), "smtp_host": "", "smtp_user": "", **values, **params}
    return {**found, "smtp_port": int(found["smtp_port"])}


# -- what lies in the outbox is sent


def test_mails_are_sent_in_the_order_of_arrival_over_one_connection(office, sink):
    for number, name in enumerate("caebd"):
        office.put(mail(Subject=str(number)), name)
    office.sent(5)
    assert subjects(sink) == ["0", "1", "2", "3", "4"]
    assert {(sender, to) for sender, to, _ in sink.mails} == {(ME, (YOU,))}
    assert sink.connections == 1
    assert office.left() == []
    assert office.given_up() == {}
    office.has_nothing_to_send()
    assert sink.connections == 1


def test_without_an_outbox_there_is_nothing_to_do(office, sink):
    office.outbox.rmdir()
    office.has_nothing_to_send()
    assert not office.outbox.exists()


def test_any_program_may_write_a_file_and_rename_it(office, sink):
    script = 'printf "To: %s\\nSubject: from a shell\\n\\nhello\\n" you@example.org >.a && mv .a a'
    subprocess.run(["sh", "-c", script], cwd=office.outbox, check=True)
    office.sent(1)
    ((sender, to, content),) = sink.mails
    assert (sender, to) == ("bgtasks@here", (YOU,))
    assert content.endswith(b"\r\n\r\nhello\r\n")
    message = parsed(content)
    assert message["From"] == "bgtasks@here"
    assert abs(message["Date"].datetime.timestamp() - time.time()) < 60
    assert re.fullmatch(r"<[0-9a-f]{32}@bgtasks>", message["Message-ID"])


def test_the_task_runs_every_minute_by_itself(office, sink):
    office.put(mail())
    assert office.site.wake().returncode == 0
    assert len(sink.mails) == 1
    assert office.site.status("send_mail")["schedule"] == "every 1 min"


def test_nothing_younger_than_outbox_delay_is_sent(office, sink):
    office.configure(sink.params(), "outbox_delay = 5 min")
    young = office.put(mail(Subject="young"), age=200)
    office.put(mail(Subject="old"), age=400)
    office.sent(1)
    assert subjects(sink) == ["old"]
    office.set_age(young, 400)
    office.sent(1)
    assert subjects(sink) == ["old", "young"]


def test_at_most_maximum_are_sent_in_a_run(office, sink):
    office.configure(sink.params(), "task.send_mail.maximum = 2")
    for number in range(5):
        office.put(mail(Subject=str(number)))
    for number in (2, 2, 1):
        office.sent(number)
    assert subjects(sink) == ["0", "1", "2", "3", "4"]
    assert sink.connections == 3


def test_between_two_messages_it_looks_at_its_deadline(office, sink):
    office.configure(sink.params(), "task.send_mail.deadline = 1000 s")
    ahead = office.site.movable_clock()
    sink.data_answer = lambda *_: "" if len(sink.mails) < 2 else late()

    def late():
        ahead.write_text("1000")
        return ""

    for _ in range(10):
        office.put(mail())
    office.sent(3, outcome="more", message="")
    assert len(office.left()) == 7


def test_unfinished_files_folders_and_what_is_for_notify_command_are_left_alone(office, sink):
    office.configure(sink.params(), "notify_command = false")  # it fails, so what it gets stays
    names = (".a", "a.tmp", "a.part", "bgtasks-1.json", "folder/a")
    (office.outbox / "folder").mkdir()
    for name in names:
        office.put(mail(), name)
    office.has_nothing_to_send()
    assert {path for path in names if (office.outbox / path).exists()} == set(names)
    office.put(mail(), "bgtasks-1.eml")
    office.sent(1)


def test_with_email_asynchronous_a_notice_goes_into_the_outbox_and_not_over_the_net(office, sink):
    office.configure(sink.params(), "email_asynchronous = 1", f"notify_email = {YOU}")
    office.site.shell("a", "exit 1", schedule="every 1 d")
    assert office.site.wake("--task=a").returncode == 0
    assert sink.connections == 0
    assert len(office.left()) == 1
    office.sent(1)
    assert "a began to fail" in subjects(sink)[0]


def test_a_mail_that_somebody_else_sends_meanwhile_is_left_alone(office, sink):
    path = office.put(mail(Subject="taken"))
    office.put(mail(Subject="free"))
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        office.sent(1, message="1 not sent")
    assert subjects(sink) == ["free"]
    office.sent(1)
    assert subjects(sink) == ["free", "taken"]


def test_a_mail_that_is_gone_when_its_turn_comes_is_no_error(office, sink):
    paths = [office.put(mail(Subject=str(number))) for number in range(3)]
    sink.data_answer = lambda *_: paths[1].unlink(missing_ok=True)
    office.sent(2, message="1 not sent")
    assert subjects(sink) == ["0", "2"]
    assert office.given_up() == {}


def test_a_mail_that_was_sent_while_it_was_opened_is_not_sent_again(office, monkeypatch):
    path, flock = office.put(mail()), fcntl.flock

    def just_removed(fd, how):
        path.unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", just_removed)
    assert bgtasks.take_mail(str(path)) is None


# -- what the server answers


REFUSALS = ("sender", "recipient", "data")


def refuse(sink, where, answer):
    sink.sender_answer = answer if where == "sender" else ""
    sink.answers = {YOU: answer} if where == "recipient" else {}
    sink.data_answer = answer if where == "data" else ""


@pytest.mark.parametrize("where", REFUSALS)
def test_what_is_refused_for_good_is_moved_to_failed_with_the_answer(office, sink, where):
    refuse(sink, where, "550 5.1.1 not here")
    content = mail()
    office.put(content, "first")
    office.put(mail(), "second")
    office.sent(0, message="2 not sent")
    answer = f"{YOU}: 550 5.1.1 not here"
    assert office.given_up() == {"first": answer, "second": answer}
    assert (office.failed / "first").read_bytes() == content
    assert office.failed.stat().st_mode & 0o777 == 0o700
    assert (office.left(), office.known()) == ([], {})
    assert sink.connections == 1
    refuse(sink, "", "")
    (office.failed / "first").rename(office.outbox / "first")
    office.sent(1)


@pytest.mark.parametrize("where", REFUSALS)
def test_what_is_refused_for_now_stays_and_is_sent_later(office, sink, where):
    refuse(sink, where, "451 4.7.1 greylisted")
    office.put(mail(Subject="first"), "first")
    office.sent(0, message="1 not sent")
    assert office.left() == ["first"]
    assert office.given_up() == {}
    assert office.known()["first"]["answer"] == f"{YOU}: 451 4.7.1 greylisted"
    refuse(sink, "", "")
    office.put(mail(Subject="second"))
    office.sent(1)
    assert subjects(sink) == ["second"]
    office.pass_time(310)
    office.sent(1)
    assert subjects(sink) == ["second", "first"]
    assert (office.left(), office.known()) == ([], {})


def test_the_gaps_between_the_tries_grow_from_5_minutes_to_4_hours_for_4_days(office, sink):
    sink.answers[YOU] = "451 later"
    path, gaps = office.put(mail(), "a"), []
    for number in (0, 1, 2, 4, 5, 6, 30):
        if number:
            office.pass_time(gaps[-1] * 60 - 100)
            office.has_nothing_to_send()  # not yet
            office.pass_time(200, number=number)
        before = time.time()
        office.sent(0, message="1 not sent")
        assert office.known()["a"]["number"] == number + 1
        gaps.append(round((office.known()["a"]["next_at"] - before) / 60))
    assert gaps == [5, 10, 20, 80, 160, 240, 240]
    for age, left in ((4 * DAYS - 60, ["a"]), (4 * DAYS + 60, [])):
        office.set_age(path, age)
        office.pass_time(4 * 3600 + 10)
        office.sent(0, message="1 not sent")
        assert office.left() == left
    assert office.given_up() == {"a": f"{YOU}: 451 later"}
    assert office.known() == {}


def test_of_several_recipients_each_gets_it_once_or_is_answered_for(office, sink):
    """One takes it, one refuses for now, and one for good."""
    sink.answers = {SHE: "451 later", HE: "550 no such user"}
    content = mail(f"{YOU}, {SHE}", Cc=HE)
    office.put(content, "a")
    office.sent(0, message="1 not sent")
    assert sink.recipients() == [(YOU,)]
    assert office.left() == ["a"]
    assert office.given_up() == {"a": f"{HE}: 550 no such user"}
    assert (office.failed / "a").read_bytes() == content
    office.pass_time(310)
    office.sent(0, message="1 not sent")
    assert sink.recipients() == [(YOU,)]
    assert list(office.given_up()) == ["a"]
    sink.answers = {}
    office.pass_time(610)
    office.sent(1)
    assert sink.recipients() == [(YOU,), (SHE,)]
    assert sink.mails[0][2] == sink.mails[1][2]
    assert list(office.given_up()) == ["a"]


def test_of_several_recipients_only_one_who_refuses_for_good_is_answered_for(office, sink):
    sink.answers = {HE: "550 no such user"}
    office.put(mail(f"{YOU}, {HE}"), "a")
    office.sent(0, message="1 not sent")
    assert sink.recipients() == [(YOU,)]
    assert office.given_up() == {"a": f"{HE}: 550 no such user"}
    assert office.left() == []


@pytest.mark.parametrize("first", [YOU, HE])
def test_a_server_that_leaves_between_two_recipients_has_taken_nothing(office, sink, first):
    sink.answers = {SHE: "421 too busy", **({HE: "550 no such user"} if first == HE else {})}
    office.put(mail(f"{first}, {SHE}, x@example.org"), "a")
    office.sent(0, message="1 not sent")
    assert sink.mails == []
    assert office.left() == ["a"]
    rest = {YOU, SHE, "x@example.org"} - ({YOU} if first == HE else set())
    assert set(office.known()["a"]["rest"]) == rest
    sink.answers = {}
    office.pass_time(310)
    office.sent(1)
    assert {to for tos in sink.recipients() for to in tos} == rest
    assert list(office.given_up()) == ["a"] * (first == HE)


@pytest.mark.parametrize("where", REFUSALS)
def test_after_421_the_next_mail_is_sent_over_a_new_connection(office, sink, where):
    office.put(mail(From=HE), "first")
    office.put(mail(SHE), "second")
    closing = "421 closing"
    sink.answers = {YOU: closing} if where == "recipient" else {}
    sink.sender_answer = lambda sender: closing if (sender, where) == (HE, "sender") else ""
    sink.data_answer = lambda sender, *_: closing if (sender, where) == (HE, "data") else ""
    office.sent(1, message="1 not sent")
    assert sink.recipients() == [(SHE,)]
    assert office.left() == ["first"]
    assert office.known()["first"]["answer"] == f"{YOU}: 421 closing"
    assert sink.connections == 2


def test_a_connection_dropped_in_the_middle_of_a_mail_is_made_anew_for_the_next(office, sink):
    for name in ("first", "second", "third"):
        office.put(mail(Subject=name), name)
    sink.drops_in_data = 1
    office.sent(2, message="1 not sent")
    assert subjects(sink) == ["second", "third"]
    assert sink.connections == 2
    assert "the connection broke" in office.known()["first"]["answer"]
    office.pass_time(310)
    office.sent(1)
    assert subjects(sink) == ["second", "third", "first"]


def test_a_server_that_takes_few_mails_a_connection_gets_all_in_the_end(office, sink):
    sink.drop_after = 2
    for number in range(7):
        office.put(mail(Subject=str(number)))
    while office.left():
        office.send()
        office.pass_time(310)
    assert sorted(subjects(sink)) == ["0", "1", "2", "3", "4", "5", "6"]
    assert office.given_up() == {}


def test_a_mail_that_was_taken_without_an_answer_is_sent_twice_as_smtp_has_it(office, sink):
    """The only window: nobody can know whether a server took what it did not answer."""
    sink.drops_unanswered = 1
    office.put(mail(), "a")
    office.sent(0, message="1 not sent")
    assert office.left() == ["a"]
    office.pass_time(310)
    office.sent(1)
    ((_, _, first), (_, _, second)) = sink.mails
    assert first == second  # with the same Message-ID, so that mail programs show one


def test_without_a_server_the_run_fails_with_one_line_and_all_mails_stay(office):
    port = free_port()
    office.configure("smtp_host = 127.0.0.1", f"smtp_port = {port}", "smtp_security = none")
    office.put(mail(), "a")
    office.put(mail(), "b")
    run = office.sent(None, outcome="failed")
    assert re.fullmatch(
        rf"MailServerError: mail server 127.0.0.1:{port}: .*Connection refused; "
        r"check smtp_host and the other settings smtp_...",
        run["reason"],
    )
    assert office.left() == ["a", "b"]
    assert office.known() == {}


def test_what_no_server_could_be_asked_about_for_4_days_is_given_up(office):
    port = free_port()
    office.configure("smtp_host = 127.0.0.1", f"smtp_port = {port}", "smtp_security = none")
    office.put(mail(), "a", age=4 * DAYS + 60)
    office.put(mail(), "b", age=4 * DAYS - 60)
    office.sent(None, outcome="failed")
    assert office.left() == ["b"]
    assert list(office.given_up()) == ["a"]
    assert office.given_up()["a"].startswith(f"mail server 127.0.0.1:{port}: ")


def test_a_server_that_goes_away_in_the_middle_of_a_run_is_said(office):
    with MailSink() as sink:
        office.configure(sink.params())
        sink.data_answer = lambda *_: setattr(sink, "greeting", "554 go away")
        sink.drop_after = 1
        for name in "abc":
            office.put(mail(), name)
        run = office.send()
    assert run["outcome"] == "failed"
    assert "go away" in run["reason"]
    assert run["reason"].endswith("after progress: 2/3")
    assert len(sink.mails) == 1
    assert office.left() == ["b", "c"]
    assert list(office.known()) == ["b"]


@pytest.mark.parametrize("when", ["greeting", "answer"])
def test_a_server_that_hangs_is_left_after_a_while(office, when, stalls):
    path = office.put(mail())
    with MailSink() as sink, silent_server() as port:
        params = server_params(sink, **({"smtp_port": port} if when == "greeting" else {}))
        sink.data_seconds = 600
        server, before = bgtasks.MailServer(params, 0.3), time.time()
        if when == "greeting":
            with pytest.raises(bgtasks.MailServerError, match=r"127.0.0.1:\d+: .*timed out; check"):
                bgtasks.send_file(server, str(path), params)
        else:
            refused = bgtasks.send_file(server, str(path), params)
            assert re.fullmatch(r"the connection broke \(.*timed out\)", refused[YOU][1])
            assert refused[YOU][0] == 421
        server.close()
        assert stalls.since(before) < 2
    assert path.exists()


@pytest.mark.skipif(not FULL, reason="takes more than a minute")
def test_a_server_that_hangs_costs_a_run_half_a_minute_for_a_mail(office, sink):
    sink.data_seconds = 60
    office.put(mail(), "a")
    run = office.sent(0, message="1 not sent")
    assert 29 < run["ended_at"] - run["started_at"] < 33
    with silent_server() as port:
        office.configure(sink.params(), f"smtp_port = {port}")
        office.put(mail(), "b")
        run = office.sent(None, outcome="failed")
        assert 29 < run["ended_at"] - run["started_at"] < 33
    assert office.left() == ["a", "b"]


def test_the_goodbye_of_a_server_that_has_left_is_not_waited_for(office, sink):
    server = bgtasks.MailServer(server_params(sink))
    sink.drop_after = 1
    assert server.send(read(mail())) == {}
    assert server.said == "250 OK, taken as number 1"
    server.close()
    server.close()


def test_a_server_that_does_not_know_8bitmime_gets_the_bytes_all_the_same(office):
    with MailSink(eight_bit=False) as sink:
        server = bgtasks.MailServer(server_params(sink))
        assert server.send(read(mail(text="grüße"))) == {}
        server.close()
    assert sink.mails[0][2].endswith("\r\n\r\ngrüße\r\n".encode())


# -- what was noted of the tries


@pytest.mark.parametrize("damage", ["", "{", "[]", "7", '{"a": 7}', '{"a": {}}', '{"a": null}'])
def test_damaged_notes_of_the_tries_lose_no_mail(office, sink, damage):
    office.tries.write_text(damage)
    office.put(mail(), "a")
    office.sent(1)
    assert office.known() == {}


def test_after_the_clock_was_set_back_no_mail_waits_for_it(office, sink):
    office.configure(sink.params(), "outbox_delay = 5 min")
    sink.answers[YOU] = "451 later"
    path = office.put(mail(), "a", age=400)
    office.sent(0, message="1 not sent")
    office.pass_time(-5 * 3600)
    office.set_age(path, 400 - 5 * 3600)
    sink.answers = {}
    office.sent(1)


def test_another_mail_under_the_name_of_one_that_was_refused_is_another_mail(office, sink):
    sink.answers = {SHE: "451 later"}
    office.put(mail(f"{YOU}, {SHE}", Subject="old"), "a")
    office.sent(0, message="1 not sent")
    sink.answers = {}
    office.put(mail(f"{HE}, {YOU}", Subject="new"), "a")
    office.sent(1)
    assert [(*to, parsed(content)["Subject"]) for _, to, content in sink.mails] == [
        (YOU, "old"),
        (HE, YOU, "new"),
    ]


def test_where_the_tries_cannot_be_noted_nothing_is_sent(office, sink):
    """Else the same mail would be sent each minute."""
    (office.outbox / ".tries.json.new").mkdir()
    office.put(mail(), "a")
    assert office.sent(None, outcome="failed")["reason"].startswith("IsADirectoryError: ")
    assert sink.connections == 0
    assert office.left() == ["a"]


# -- killed at any moment


def messages(count, kilobytes=1):
    body = "\n".join("x" * 75 for _ in range(kilobytes * 1000 // 76))
    return [mail(Message_ID=f"<{number}@test>", text=body) for number in range(count)]


def arrived(sink):
    """How often each mail came, by Message-ID."""
    return collections.Counter(parsed(content)["Message-ID"] for _, _, content in sink.mails)


def child_of(pid):
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    except (OSError, IndexError):
        return 0


def group_of_the_task(runner):
    """The process group of the one run of a runner, once it has one of its own."""
    task = child_of(child_of(runner.pid) or runner.pid)
    try:
        return task if task and os.getpgid(task) == task else 0
    except ProcessLookupError:
        return 0


def test_many_mails_with_a_sender_that_is_killed_again_and_again_all_arrive_once(office, sink):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance, kills, slow_after = random.Random(seed), 0, 0
    sink.data_seconds = lambda: 0.003 if len(sink.mails) <= slow_after else 0.5
    for content in messages(MESSAGES):
        office.put(content)
    while kills < KILLS:
        left, before = len(office.left()), len(sink.mails)
        assert left, f"all were sent before it was killed {KILLS} times"
        until = before + chance.randrange(min(2 * left // (KILLS - kills + 1), left // 2) + 1)
        slow_after = min(until + 2, before + left - 2)  # so that whoever kills comes in time
        runner = office.site.start("run", "send_mail", "--force")
        group = wait_for(lambda runner=runner: group_of_the_task(runner))
        while len(sink.mails) < until and group_of_the_task(runner):
            time.sleep(0.0002)
        time.sleep(chance.random() * 0.004)
        try:
            os.killpg(group, 9)
        except ProcessLookupError:
            pass
        kills += runner.wait() == 128 + 9
    slow_after = MESSAGES + kills
    office.sent(len(office.left()))
    assert office.left() == []
    assert office.given_up() == {}
    times = arrived(sink)
    assert set(times) == {f"<{number}@test>" for number in range(MESSAGES)}
    twice = [name for name, count in times.items() if count > 1]
    print(f"{MESSAGES} mails, killed {kills} times: none lost, {len(twice)} sent twice")
    assert sum(times.values()) - MESSAGES <= kills


STEPS = """
# Send what lies in each of these outboxes, each in a process of its own, which is killed before its
# n-th step; the steps are what Python's audit hooks see of it.
import json, os, runpy, sys
program, send_mail, live, fatal, params, *outboxes = sys.argv[1:]
sys.path.insert(0, os.path.dirname(program))
import bgtasks
bgtasks.read_mail(b"To: a@x", 0.0, {"mail_from": (), "node": "x"})  # imports are no steps
import email.utils, smtplib, shutil
run = runpy.run_path(send_mail)["run"]
given = dict.fromkeys("task run slot deadline last_success node state_dir maximum options".split())
WATCHED = ("open", "os.", "shutil.", "fcntl.", "socket.connect")
for number, outbox in enumerate(outboxes):
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        settings = {**json.loads(params), "outbox": outbox}
        brief = bgtasks.Brief(
            None, live, (0, ""), "", 0.0, float("inf"), {},
            {**given, "state": {}, "settings": settings},
        )
        task = bgtasks.TaskContext(brief, bgtasks.Clock())
        steps = 0
        def watch(event, arguments):
            global steps
            what = " ".join(str(each) for each in arguments[:2])
            # what imports look up elsewhere, and when, is up to Python
            if event.startswith(WATCHED) and ("/" not in what or outbox in what):
                steps += 1
                if fatal == "yes" and steps > number:
                    os.write(writable, f"{event} {what}".encode())
                    steps = -9  # to kill is a step too
                    os.kill(os.getpid(), 9)
        sys.addaudithook(watch)
        run(task)
        os._exit(0)
    os.close(writable)
    with open(readable) as said:
        step = said.read()
    _, status = os.waitpid(pid, 0)
    assert status in (0, 9), status
    print(json.dumps([outbox, step]), flush=True)
"""


def test_killed_between_any_two_steps_it_loses_nothing_and_repeats_only_what_smtp_may(office, sink):
    """Each mail has four recipients: one takes it, one refuses for now, one for good."""
    outboxes, expected = [], []
    for number in range(48):
        office.outbox = office.site.folder / f"outbox{number}"
        office.outbox.mkdir()
        outboxes.append(str(office.outbox))
        names = [f"{who}{number}@example.org" for who in ("takes", "later", "never")]
        sink.answers[names[1]], sink.answers[names[2]] = "451 later", "550 never"
        office.put(mail(", ".join(names), Subject="some"), "some")
        office.put(mail(names[2], Subject="none"), "none")
        office.put(mail(f"single{number}@example.org", Subject="one"), "one")
        expected.append(names)
    params = json.dumps(server_params(sink, outbox_delay=0))

    def run_all(fatal):
        live = str(office.site.folder / "live")
        command = [sys.executable, "-c", STEPS, str(PROGRAM), str(SEND_MAIL), live, fatal, params]
        done = subprocess.run([*command, *outboxes], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(line) for line in done.stdout.splitlines())

    killed_at = run_all("yes")
    assert killed_at[outboxes[-1]] == "", "there are more steps than outboxes"
    run_all("no")
    for outbox in outboxes:
        office.outbox, office.tries = Path(outbox), Path(outbox, ".tries.json")
        if office.left():
            assert office.left() == ["some"]
            office.pass_time(310)
    for name in [name for name in sink.answers if name.startswith("later")]:
        del sink.answers[name]
    run_all("no")

    got = collections.Counter(to for tos in sink.recipients() for to in tos)
    repeated = collections.defaultdict(set)
    for number, (takes, later, never) in enumerate(expected):
        office.outbox = Path(outboxes[number])
        office.failed = office.outbox / "failed"
        assert office.left() == []
        single = f"single{number}@example.org"
        step = killed_at[outboxes[number]].replace(outboxes[number], "")
        for name in (takes, later, single):
            assert got[name] in (1, 2), (step, name)
            repeated[name.partition(str(number))[0]].update([step] * (got[name] - 1))
        assert got[never] == 0
        files = [path for path in office.failed.iterdir() if path.suffix != ".answer"]
        for path in files:
            assert (office.failed / f"{path.name}.answer").read_text() == f"{never}: 550 never\n"
        assert {parsed(path.read_bytes())["Subject"] for path in files} == {"none", "some"}
    # between the answer of the server and the removal of the file, or the note of who has taken it
    assert repeated["single"] == {"os.remove /one -1"}
    assert repeated["takes"] == {
        *("open /.tries.json.new w", "os.rename /.tries.json.new /.tries.json")
    }
    assert repeated["later"] == set()


# -- connections that can be trusted


def try_now(office, sink, *lines):
    """Send the test mail; return the exit code and what it says."""
    office.configure(sink.params(), *lines)
    code, said = office.sendmail("--now", YOU, input="Subject: test\n\nhello\n")
    assert len(sink.mails) == (code == 0)
    return code, said.replace(str(sink.port), "PORT")


@pytest.mark.parametrize("login", [None, LOGIN], ids=["open", "login"])
@pytest.mark.parametrize("tls", ["none", "starttls", "tls"])
def test_the_test_mail_says_what_the_server_answered(office, tls, login):
    with MailSink(tls, login) as sink:
        said = f"sent from bgtasks@here to {YOU}: 250 OK, taken as number 1"
        assert try_now(office, sink) == (0, said)
    assert office.left() == []


@pytest.mark.parametrize("tls", ["starttls", "tls"])
def test_the_task_sends_over_tls_with_a_login(office, tls):
    with MailSink(tls, LOGIN) as sink:
        office.configure(sink.params())
        office.put(mail())
        office.put(mail())
        office.sent(2)
        assert sink.connections == 1


TROUBLE = "bgtasks: mail server 127.0.0.1:PORT: "


@pytest.mark.parametrize("tls", ["starttls", "tls"])
def test_a_server_whose_certificate_nobody_signed_gets_no_mail_and_no_password(office, tls):
    with MailSink(tls, LOGIN) as sink:
        code, said = try_now(office, sink, "smtp_ca_file =")
        assert (code, said[: len(TROUBLE)]) == (75, TROUBLE)
        assert "certificate verify failed" in said
        assert sink.logins == []


@pytest.mark.parametrize("tls", ["starttls", "tls"])
def test_a_server_with_the_certificate_of_another_gets_no_mail_and_no_password(office, tls):
    with MailSink(tls, LOGIN, name="other.example.org") as sink:
        code, said = try_now(office, sink)
        assert (code, said[: len(TROUBLE)]) == (75, TROUBLE)
        assert "certificate is not valid for '127.0.0.1'" in said
        assert sink.logins == []


def test_a_server_that_takes_starttls_away_gets_no_mail_and_no_password(office):
    with MailSink("none", LOGIN) as sink:
        code, said = try_now(office, sink, "smtp_security = starttls")
        assert code == 75
        assert said.startswith(f"{TROUBLE}STARTTLS extension not supported by server.; check")
        assert sink.logins == []


@pytest.mark.parametrize(("tls", "given"), [("none", "tls"), ("tls", "starttls")])
def test_the_wrong_kind_of_security_is_said(office, monkeypatch, tls, given):
    with MailSink(tls) as sink:
        monkeypatch.setattr(bgtasks.smtplib.SMTP, "debuglevel", 0)
        server = bgtasks.MailServer(server_params(sink, smtp_security=given), 0.5)
        with pytest.raises(bgtasks.MailServerError, match="^mail server 127.0.0.1:.*; check smtp"):
            server.send(read(mail()))
        server.close()


@pytest.mark.parametrize("file", ["missing.pem", "cron.params"])
def test_a_ca_file_that_is_none_is_said(office, file):
    with MailSink("tls") as sink:
        code, said = try_now(office, sink, f"smtp_ca_file = {file}")
        assert (code, said[: len(TROUBLE)]) == (75, TROUBLE)


def test_a_wrong_login_fails_the_run_says_so_and_keeps_the_mails(office):
    with MailSink("starttls", LOGIN) as sink:
        office.configure(sink.params(), "smtp_pwd = opensesame8")
        for name in "abc":
            office.put(mail(), name)
        run = office.sent(None, outcome="failed")
        assert re.fullmatch(
            r"MailServerError: mail server 127.0.0.1:\d+: .*Authentication credentials invalid; "
            r"check smtp_host and the other settings smtp_...",
            run["reason"],
        )
        assert sink.logins == [("me", "opensesame8", False)] * len(sink.logins)
        assert sink.connections == 1
        assert "opensesame" not in office.said.stdout + office.said.stderr
        assert try_now(office, sink, "smtp_pwd = opensesame8")[0] == 75
    assert (office.left(), office.given_up()) == (["a", "b", "c"], {})


def test_a_server_that_wants_a_login_first_keeps_the_mails(office):
    with MailSink("starttls", LOGIN) as sink:
        for how in ("starttls", "none"):
            office.configure(sink.params(), "smtp_user =", f"smtp_security = {how}")
            office.put(mail())
            reason = office.sent(None, outcome="failed")["reason"]
            assert re.fullmatch(r"MailServerError: mail server: 530 .*; set smtp_user", reason)
    assert (len(office.left()), office.given_up()) == (2, {})


def test_a_password_is_never_sent_to_another_machine_without_tls(office):
    office.configure(
        "smtp_host = mail.example.org",
        "smtp_security = none",
        "smtp_user = me",
        "smtp_pwd = opensesame7",
    )
    said = "bgtasks: smtp_user needs smtp_security = starttls or tls"
    assert office.sendmail("--now", YOU) == (75, said)


def test_a_host_name_that_is_none_is_said(office):
    office.configure(f"smtp_host = {'a' * 64}.example.org")
    code, said = office.sendmail("--now", YOU)
    assert code == 75
    assert said.startswith(f"bgtasks: mail server {'a' * 64}.example.org:587: ")


# -- hostile and broken files


def hostile_files(office):
    """Files that nobody should put into an outbox, and what is answered for each."""
    secret = office.site.folder / "secret"
    secret.write_bytes(mail(Subject="secret"))
    outbox, no_file = office.outbox, "is no plain file with one name and at most 64 MiB"
    (outbox / "link").symlink_to(secret)
    (outbox / "nowhere").symlink_to("/nowhere")
    os.mkfifo(outbox / "fifo")
    os.link(secret, outbox / "hard link")
    office.put(b"", "empty")
    office.put(b"Subject: hello\n\nhello\n", "nobody")
    office.put(b"To: undisclosed-recipients:;\n\nhello\n", "undisclosed")
    office.put(bytes(range(256)) * 16, "garbage")
    office.put(mail("me@[127.0.0.1]"), "bad address")
    office.put(mail('"two words"@example.org'), "quoted")
    office.put(mail("-oQ/tmp@example.org"), "option")
    office.put(mail("(" * 3000), "deep")
    office.put(mail(subject="\n x" * 1_000_000), "endless")
    office.put(mail(), "new\nline \N{SNOWMAN}")
    office.put(b"\n", "n" * 250)
    with open(outbox / "large", "wb") as file:
        file.write(mail())
        file.truncate((64 << 20) + 1)
    return {
        "link": "Too many levels of symbolic links",
        "nowhere": "Too many levels of symbolic links",
        "fifo": no_file,
        "hard link": no_file,
        "large": no_file,
        "empty": "names nobody to send it to; it needs To, Cc or Bcc",
        "nobody": "names nobody to send it to; it needs To, Cc or Bcc",
        "undisclosed": "names nobody to send it to; it needs To, Cc or Bcc",
        "garbage": "names nobody to send it to; it needs To, Cc or Bcc",
        "bad address": "is no mail address such as me@example.org",
        "quoted": "is no mail address such as me@example.org",
        "option": "is no mail address such as me@example.org",
        "deep": "has an address that nobody can read",
        "endless": "its header is larger than 1 MiB",
        "n" * 250: "names nobody to send it to; it needs To, Cc or Bcc",
    }


def test_a_bad_file_never_stops_the_next(office, sink):
    expected = hostile_files(office)
    for path in office.outbox.iterdir():
        office.set_age(path, 60)
    office.put(mail(Subject="last"), "last", age=1)
    office.sent(2, message=f"{len(expected)} not sent")
    assert sorted(subjects(sink)) == ["last", "test"]
    assert office.left() == []
    answers = office.given_up()
    for name, text in expected.items():
        (answer,) = (
            answers[given] for given in answers if name.startswith(given.rstrip("_")[:200])
        )
        assert text in answer, name
        assert answer.startswith("not sent: 554 "), name
    assert len(answers) == len(expected)
    assert (office.failed / "link").is_symlink()
    assert (office.failed / "fifo").is_fifo()
    assert office.site.run("doctor").returncode == 1


def test_what_fails_twice_under_one_name_is_kept_twice(office, sink):
    for text in ("one", "two"):
        office.put(text.encode(), "a")
        office.sent(0, message="1 not sent")
    assert set(office.given_up()) == {"a", "a_"}
    assert (office.failed / "a").read_text() == "one"


def test_what_was_taken_away_before_it_is_given_up_leaves_no_answer(office):
    bgtasks.give_up(str(office.outbox / "gone"), "550 no")
    bgtasks.give_up(str(office.outbox / "gone"), "550 no", copy=True)
    assert office.given_up() == {}


@only_root
def test_a_file_that_cannot_be_read_is_no_mail(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "a")
        path.write_bytes(mail())
        path.chmod(0o600)
        with (
            somebody_else(),
            pytest.raises(bgtasks.DataError, match=r"cannot be read \(Permission"),
        ):
            bgtasks.take_mail(str(path))


@only_root
def test_what_could_not_be_removed_is_not_sent():
    """Else it would be sent each minute."""
    with tempfile.TemporaryDirectory() as folder, MailSink() as sink:
        os.chmod(folder, 0o755)
        path = Path(folder, "a")
        path.write_bytes(mail())
        params = server_params(sink)
        server = bgtasks.MailServer(params)
        path.chmod(0o644)
        with (
            somebody_else(),
            pytest.raises(bgtasks.RefusedError, match="cannot be removed, so it is"),
        ):
            bgtasks.send_file(server, str(path), params)
        assert sink.connections == 0
        assert bgtasks.send_file(server, str(path), params) == {}
        server.close()


def test_an_outbox_that_is_no_folder_is_empty(office, sink):
    office.configure(sink.params(), "outbox = cron.params")
    office.has_nothing_to_send()


# -- what is sent


def wire(content, **params):
    """What goes over the net: always with CRLF at the end of a line, and nothing else."""
    found = read(content, **params).content
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", found)
    return found


def test_what_is_not_for_others_is_not_sent(office, sink):
    content = (
        b"From someone Thu Jan  1 00:00:00 2026\n"
        b"Return-Path: <x@example.org>\nX-Envelope-From: bounces@example.org\n"
        b"bcc: she@example.org,\n\the@example.org\nTo: you@example.org\nBCC : more@example.org\n"
        b"From: me@example.org\nDate: Thu, 1 Jan 2026 00:00:00 +0000\nMessage-ID: <1@test>\n"
        b"\nBcc: this stays\n"
    )
    office.put(content)
    office.sent(1)
    ((sender, to, sent),) = sink.mails
    assert sender == "bounces@example.org"
    assert to == (YOU, SHE, HE, "more@example.org")
    assert sent == (
        b"To: you@example.org\r\nFrom: me@example.org\r\n"
        b"Date: Thu, 1 Jan 2026 00:00:00 +0000\r\nMessage-ID: <1@test>\r\n"
        b"\r\nBcc: this stays\r\n"
    )


def test_the_envelope_wins_over_the_fields(office):
    content = mail(Cc=SHE, X_Envelope_To=f"{HE}, x@example.org", Sender="list@example.org")
    found = read(content)
    assert (found.sender, found.recipients) == ("list@example.org", (HE, "x@example.org"))
    assert b"X-Envelope" not in found.content
    assert read(mail(X_Envelope_From=HE, Sender=SHE)).sender == HE
    assert read(mail()).sender == ME
    assert read(b"To: a@example.org\n\n").sender == "bgtasks@here"
    assert read(b"To: a@example.org\n\n", mail_from=(SHE, HE)).sender == SHE
    assert read(b"To: a@example.org\n\n", node="a b.ü").sender == "bgtasks@a-b.-"


def test_the_same_recipient_twice_gets_it_once():
    assert read(mail(f"{YOU}, You <{YOU}>", Cc=YOU)).recipients == (YOU,)


@pytest.mark.parametrize(
    "to",
    [
        '"Doe, Jane" <she@example.org>, he@example.org (him, of course), root',
        "<she@example.org>, <he@example.org>, root,",
        "Friends: she@example.org, he@example.org;, root",
        "=?utf-8?q?D=2C?= <she@example.org>,, he@example.org,\n root",
        "she@example.org; he@example.org; root",
    ],
)
def test_recipients_are_found_however_they_are_written(to):
    assert read(mail(to)).recipients == (SHE, HE, "root")


def test_folded_fields_stay_folded_and_are_read_whole():
    content = b"To: you@example.org,\n she@example.org\nSubject: a\n\tb\n c\n\nhello"
    found = read(content)
    assert found.recipients == (YOU, SHE)
    assert b"\r\nSubject: a\r\n\tb\r\n c\r\n" in found.content
    assert parsed(found.content)["Subject"] == "a\tb c"


def test_what_a_mail_lacks_is_the_same_each_time():
    content = b"To: you@example.org\n\nhello"
    first, later = read(content).content, bgtasks.read_mail(content, NOW + 1, server_params())
    assert b"\r\nDate: Thu, 01 Jan 2026 00:00:00 -0000\r\n" in first
    assert first == read(content).content
    assert parsed(first)["Message-ID"] != parsed(later.content)["Message-ID"]


@pytest.mark.parametrize(
    ("content", "body"),
    [
        (b"To: you@example.org\n\nText\n", b"Text\r\n"),
        (b"To: you@example.org\r\n\r\nText\r\n", b"Text\r\n"),
        (b"To: you@example.org\r\rText\r", b"Text\r\n"),
        (b"To: you@example.org\nno field\nText: x\n", b"no field\r\nText: x\r\n"),
        (b"To: you@example.org\nno field: x\n", b"no field: x\r\n"),
        (b"To: you@example.org\n: x\n", b": x\r\n"),
        (b"To: you@example.org\nf\xfc: x\n", b"f\xfc: x\r\n"),
        (b"To: you@example.org", b""),
        (b"To: you@example.org\n", b""),
        (b"To: you@example.org\n\n", b""),
        (b"To: you@example.org\n\n\n\nText", b"\r\n\r\nText"),
    ],
)
def test_head_and_body_are_told_apart(content, body):
    assert wire(content).partition(b"\r\n\r\n")[2] == body


@pytest.mark.parametrize(
    "end", [b"\n.\n", b"\r.\r", b"\r\n.\r\n", b"\n.\r\n", b"\r\n.\n", b"\r.\n"]
)
def test_no_body_can_begin_a_mail_of_its_own(office, sink, end):
    """https://www.postfix.org/smtp-smuggling.html"""
    smuggled = b"MAIL FROM:<evil@example.org>\r\nRCPT TO:<he@example.org>\r\nDATA\r\nevil"
    office.put(mail().rstrip() + end + smuggled + end + b"QUIT" + end)
    office.sent(1)
    ((_, to, content),) = sink.mails
    assert to == (YOU,)
    assert content.count(b"\r\n.\r\n") == 3
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", content)
    assert smuggled in content


def test_lines_that_begin_with_a_dot_keep_it(office, sink):
    text = ".\n..\n.a\n...\n\n. .\nend ."
    office.put(mail(text=text))
    office.sent(1)
    assert sink.mails[0][2].decode().endswith("\r\n\r\n" + text.replace("\n", "\r\n") + "\r\n")


def test_any_bytes_of_a_body_arrive_as_they_are(office, sink):
    chance = random.Random(1)
    body = bytes(range(256)) + b"\n".join(chance.randbytes(500) for _ in range(100)) + b"\0\n"
    office.put(mail(Subject="grüße \N{SNOWMAN}").rstrip() + b"\n" + body)
    office.sent(1)
    ((_, _, content),) = sink.mails
    lines = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    assert content.endswith(b"\r\n".join(lines))
    assert "Subject: grüße \N{SNOWMAN}\r\n".encode() in content


def test_a_mail_of_10_mb_arrives_whole(office, sink):
    body = b"".join(b"%076d\n" % number for number in range(140_000))
    office.put(mail().rstrip() + b"\n" + body)
    office.sent(1)
    assert sink.mails[0][2].endswith(body.replace(b"\n", b"\r\n"))


def test_an_address_beyond_ascii_needs_a_server_that_knows_them(office):
    she = "zoë@exämple.org"
    with MailSink() as sink:
        office.configure(sink.params())
        office.put(mail(she, text="grüße"))
        office.sent(1)
        assert sink.recipients() == [(she,)]
    with MailSink(smtputf8=False) as sink:
        office.configure(sink.params())
        office.put(mail(she), "a")
        office.put(mail())
        office.sent(1, message="1 not sent")
        assert sink.recipients() == [(YOU,)]
    ((name, answer),) = office.given_up().items()
    assert name == "a"
    assert re.fullmatch(rf"{she}: 553 .*SMTPUTF8 not supported by.*", answer)


# -- sendmail


HELLO = "To: you@example.org\nSubject: hello\n\nhello\n"


def test_sendmail_takes_a_mail_for_those_it_names(office):
    found = office.posted(
        YOU, SHE, input="Subject: x\nTo: list@example.org\nBcc: he@example.org\n\nhello"
    )
    assert (found.sender, found.recipients) == ("bgtasks@here", (YOU, SHE))
    assert parsed(found.content)["To"] == "list@example.org"
    assert parsed(found.content)["Bcc"] is None
    assert parsed(found.content).get_content() == "hello"


def test_sendmail_t_takes_a_mail_for_those_whom_the_mail_names(office):
    found = office.posted("-t", "-i", SHE, input=HELLO + ".\nmore\n")
    assert set(found.recipients) == {YOU, SHE}
    assert b"she@" not in found.content
    assert found.content.endswith(b"hello\r\n.\r\nmore\r\n")


def test_sendmail_believes_its_arguments_and_not_what_somebody_put_into_the_mail(office):
    hostile = f"X-Envelope-To: {HE}\nX-Envelope-From: {HE}\n{HELLO}"
    assert office.posted(SHE, input=hostile).recipients == (SHE,)


@pytest.mark.parametrize("dots", [["-i"], ["-oi"], ["-t", "-oi"], ["-ti"], ["-it"], []])
def test_a_dot_on_a_line_ends_a_mail_unless_i_says_otherwise(office, dots):
    found = office.posted(*dots, YOU, input=HELLO + ".\nmore\n.\n")
    assert found.content.endswith(b"more\r\n.\r\n" if dots else b"\r\n\r\nhello\r\n")


def test_dots_that_end_nothing(office):
    found = office.posted(YOU, input=HELLO + "..\n. \na.\n.\r\nmore")
    assert found.content.endswith(b"hello\r\n..\r\n. \r\na.\r\n")


@pytest.mark.parametrize("flags", [["-f", HE], [f"-f{HE}"], ["-r", HE], ["-oi", f"-f{HE}", "-oem"]])
def test_f_names_the_sender_of_the_envelope(office, flags):
    found = office.posted(*flags, YOU, input=f"From: me@example.org\n{HELLO}")
    assert (found.sender, found.recipients) == (HE, (YOU,))
    assert parsed(found.content)["From"] == ME


@pytest.mark.parametrize(
    ("flags", "sender"),
    [
        (["-F", "Zoë\n\rBcc: x@example.org, Jr."], "bgtasks@here"),
        (["-FCronDaemon", "-f", HE], HE),
        (["-F", "Zoë", "-f", "zoë@example.org"], "zoë@example.org"),
    ],
)
def test_capital_f_names_who_it_is_from_unless_the_mail_does(office, flags, sender):
    found = office.posted(*flags, YOU, input=HELLO)
    assert (found.sender, found.recipients) == (sender, (YOU,))
    (field,) = re.findall(rb"(?m)^From: (.*)\r$", found.content)
    name, address = parseaddr(field.decode())
    assert address == sender
    assert str(make_header(decode_header(name))).startswith(("Zoë", "CronDaemon"))
    assert parsed(found.content)["Bcc"] is None
    (path,) = office.outbox.glob("mail-*.eml")
    path.unlink()
    found = office.posted(*flags, YOU, input=f"FROM: {ME}\n{HELLO}")
    assert parsed(found.content).get_all("From") == [ME]


def test_sendmail_takes_what_programs_give_it(office):
    """As cron, PHP, git, mdadm and smartd call it."""
    flags = "-FCronDaemon -i -B8BITMIME -odi -oem -oi -t -bm -v -n -G -U -N never -L cron -f"
    assert office.posted(*flags.split(), HE, input=HELLO).recipients == (YOU,)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["-bs"], "sendmail: -bs: only a mail on stdin is taken (-bm)"),
        (["-bd"], "sendmail: -bd: only a mail on stdin is taken (-bm)"),
        (["-q"], "sendmail: option -q not recognized; see --help"),
        (["-f"], "sendmail: option -f requires argument; see --help"),
        (["-f", "a b"], "sendmail: 'a b' is no mail address such as me@example.org"),
        (["a\nb@example.org"], "sendmail: must be text on one line"),
        (
            ["--", "-x@example.org"],
            "sendmail: '-x@example.org' is no mail address such as me@example.org",
        ),
        (["--later"], "there is no option --later; see --help"),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(office, args, text):
    assert office.sendmail(*args, input=HELLO) == (64, f"bgtasks: {text}")
    assert office.left() == []


def test_after_two_dashes_there_are_only_addresses(office):
    assert office.posted("-oi", "--", YOU, SHE, input="hello").recipients == (YOU, SHE)


def test_nothing_after_two_dashes_is_an_option(office):
    assert office.sendmail("-t", "--", "-fevil@example.org", input=HELLO)[0] == 64


@pytest.mark.parametrize("args", [[], ["-t"]])
def test_a_mail_for_nobody_is_refused_at_once(office, args):
    said = "bgtasks: mail: names nobody to send it to; it needs To, Cc or Bcc"
    assert office.sendmail(*args, input="Subject: x\n\nhello\n") == (65, said)
    assert office.left() == []


def test_a_mail_that_is_too_large_is_refused(office):
    with tempfile.TemporaryFile() as file:
        file.truncate((64 << 20) + 1)
        done = office.site.run("sendmail", "-i", YOU, stdin=file)
    assert (done.returncode, done.stderr) == (65, "bgtasks: mail: is larger than 64 MiB\n")
    assert office.left() == []


def test_what_sendmail_takes_the_task_sends(office, sink):
    office.posted("-t", "-F", "Zoë", "-f", HE, input=HELLO)
    office.sent(1)
    ((sender, to, content),) = sink.mails
    assert (sender, to) == (HE, (YOU,))
    assert parsed(content)["From"].addresses[0].display_name == "Zoë"


@pytest.mark.parametrize("nobody", ["", "<>"])
def test_a_mail_that_wants_no_answer_comes_from_nobody(office, sink, nobody):
    office.sendmail("-i", "-f", nobody, YOU, input=HELLO)
    office.sent(1)
    ((sender, to, content),) = sink.mails
    assert (sender, to) == ("<>", (YOU,))
    assert parsed(content)["From"]


def test_what_a_dead_application_left_half_written_goes_in_the_end(office):
    for name, days in ((".old", 5), (".new", 1)):
        office.put(b"half", name, age=days * 86400)
    office.has_nothing_to_send()
    left = os.listdir(office.outbox)
    assert ".new" in left
    assert ".old" not in left


def test_now_says_who_has_taken_it_and_who_has_not(office, sink):
    sink.answers = {SHE: "550 no such user"}
    code, said = office.sendmail("--now", "-f", ME, YOU, SHE, input="hello")
    sent, _, refused = said.partition("\n")
    assert sent == f"sent from {ME} to {YOU}: 250 OK, taken as number 1"
    assert refused == f"bgtasks: refused: {SHE}: 550 no such user"
    assert code == 69


@pytest.mark.parametrize("where", REFUSALS)
@pytest.mark.parametrize(
    ("answer", "code"), [("550 never", 69), ("451 later", 75), ("421 bye", 75)]
)
def test_now_tells_a_refusal_for_good_from_one_for_now(office, sink, where, answer, code):
    refuse(sink, where, answer)
    said = f"bgtasks: refused: {YOU}: {answer}"
    assert office.sendmail("--now", YOU, input="hello") == (code, said)
    assert office.left() == []


def test_now_cannot_reach_the_server(office):
    port = free_port()
    office.configure("smtp_host = 127.0.0.1", f"smtp_port = {port}")
    code, said = office.sendmail("--now", YOU, input="hello")
    assert code == 75
    assert said.startswith(f"bgtasks: mail server 127.0.0.1:{port}: ")


def test_what_a_server_answers_steers_no_terminal(office, sink):
    sink.data_answer = "550 \x1b[31mred\x07"
    code, said = office.sendmail("--now", YOU, input="hello")
    assert (code, said) == (69, f"bgtasks: refused: {YOU}: 550 \\x1b[31mred\\x07")


def test_an_outbox_that_cannot_be_made_is_said(office):
    office.configure("outbox = cron.params/outbox")
    said = f"bgtasks: {office.site.params}/outbox: cannot be made (Not a directory); check the path"
    assert office.sendmail(YOU, input="hello") == (73, said)


@only_root
def test_an_outbox_of_somebody_else_is_said():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with somebody_else():
            for outbox in (folder, f"{folder}/outbox"):
                with pytest.raises(
                    bgtasks.RefusedError, match=r"\(Permission denied\); check the perm"
                ):
                    bgtasks.post(outbox, mail(), NOW)
        assert os.listdir(folder) == []


# -- the program sendmail


@pytest.fixture
def program(office):
    """A program that notes what it gets and ends as it is told."""
    path, seen = office.site.folder / "mailer", office.site.folder / "seen"
    seen.mkdir()
    office.configure(f"sendmail_path = {path}")

    def write(end="exit 0"):
        lines = [
            "#!/bin/sh",
            f"cd {seen}; n=$(ls | wc -l); printf '%s\\n' \"$@\" >$n.arguments; cat >$n.text",
            f"echo $n.text >>order; {end}",
        ]
        path.write_text("\n".join([*lines, ""]))
        path.chmod(0o755)
        return seen

    return write


def test_without_smtp_host_a_local_program_sends(office, program):
    seen = program()
    content = f"From: {ME}\nTo: {YOU}\nBcc: {SHE}\nDate: x\nMessage-ID: <x>\n\n.\ngrüße\n"
    office.put(content.encode())
    office.sent(1)
    assert (seen / "0.arguments").read_text().split() == ["-i", "-f", ME, "--", YOU, SHE]
    assert (seen / "0.text").read_text() == content.replace(f"Bcc: {SHE}\n", "")
    assert office.left() == []
    said = f"sent from bgtasks@here to {YOU}: taken by {office.site.folder}/mailer"
    assert office.sendmail("--now", YOU, input="hello") == (0, said)


@pytest.mark.parametrize(
    ("end", "answer"),
    [
        ("echo no such user >&2; exit 67", "554 no such user"),
        ("echo data; exit 65", "554 data"),
        ("exit 68", "554 exit code 68"),
        ("echo later >&2; exit 75", "451 later"),
        ("exit 1", "451 exit code 1"),
        ("kill -9 $$", "451 exit code -9"),
        (
            r"printf 'a\nb\033[0m\377%0500d' 1; exit 1",
            "451 a\\nb\\x1b[0m\N{REPLACEMENT CHARACTER}00",
        ),
    ],
)
def test_what_the_program_refuses_is_kept_or_given_up_by_its_exit_code(
    office, program, end, answer
):
    program(end)
    office.put(mail(), "a")
    office.sent(0, message="1 not sent")
    for_good = answer.startswith("554")
    found = office.given_up()["a"] if for_good else office.known()["a"]["answer"]
    assert found.startswith(f"{YOU}: {answer}")
    assert len(found) < 450
    assert office.left() == ([] if for_good else ["a"])
    code, said = office.sendmail("--now", YOU, input="hello")
    assert (code, said.startswith(f"bgtasks: refused: {YOU}: ")) == (69 if for_good else 75, True)


def test_a_program_that_is_not_there_is_said(office, program):
    office.put(mail(), "a")
    path = office.site.folder / "mailer"
    said = f"{path}: No such file or directory; set smtp_host or sendmail_path"
    assert office.sent(None, outcome="failed")["reason"] == f"MailServerError: {said}"
    assert office.sendmail("--now", YOU, input="hello") == (75, f"bgtasks: {said}")
    assert office.left() == ["a"]


def test_a_program_that_hangs_is_ended_and_delays_that_mail_only(office, program, stalls):
    program("exec sleep 60")
    params = server_params(sendmail_path=str(office.site.folder / "mailer"))
    server, before = bgtasks.MailServer(params, 0.3), time.time()
    assert server.send(read(mail())) == {YOU: (451, "took more than 0 s")}
    assert stalls.since(before) < 3
    server.close()


def test_an_address_that_is_too_long_for_a_program_delays_no_other(office, program):
    program()
    office.put(mail("x" * 200_000), "long")
    office.put(mail())
    office.sent(1, message="1 not sent")
    (answer,) = office.given_up().values()
    assert answer.endswith(
        ": 554 [Errno 7] Argument list too long: " + repr(str(office.site.folder / "mailer"))
    )


# -- what the doctor says


def found_by_doctor(office):
    found = json.loads(office.site.run("doctor", "--json").stdout)
    return [(each["level"], each["text"]) for each in found if each["about"] == "mail"]


def test_the_doctor_says_if_nobody_is_told(office):
    text = "nobody is told when a task fails, but where the task itself says whom"
    assert found_by_doctor(office) == [(0, text)]
    office.configure("notify_command = true")
    assert found_by_doctor(office) == []
    office.configure(f"notify_email = {YOU}")
    assert found_by_doctor(office) == []
    office.outbox.rmdir()
    assert found_by_doctor(office) == []


def test_the_doctor_sees_mails_that_wait_for_long(office):
    office.configure(f"notify_email = {YOU}")
    office.put(mail(), age=3500)
    (office.outbox / "failed").mkdir()
    assert found_by_doctor(office) == []
    office.put(mail(), age=3 * 3600)
    office.put(mail(), ".hidden", age=9 * 3600)
    text = f"2 files in {office.outbox}, for 3 h"
    assert found_by_doctor(office) == [(1, text)]


def test_the_doctor_sees_mails_that_were_given_up(office, sink):
    office.configure(sink.params(), f"notify_email = {YOU}")
    office.put(b"nobody")
    office.put(b"nobody")
    office.send()
    assert found_by_doctor(office) == [(1, f"2 mails could not be sent: {office.failed}")]
