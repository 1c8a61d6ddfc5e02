"""The example task that fetches mail, against a real mail server."""

import imaplib
import importlib.util
import json
import os
import poplib
import random
import shutil
import signal
import stat
import textwrap
import time
from pathlib import Path

import imap_server
import pytest
from conftest import PROGRAM, wait_for
from imap_server import ODD_USERS, PASSWORD, PLAIN, UNNAMED
from smtp_server import free_port

import bgtasks

pytestmark = pytest.mark.unmeasured

FILE = PROGRAM.parent / "contrib" / "tasks" / "fetch_mail.py"


def load():
    found = importlib.util.spec_from_file_location("fetch_mail", FILE)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


fetch_mail = load()


@pytest.fixture(scope="module")
def server():
    why = imap_server.missing()
    if why and not os.environ.get("CI"):
        pytest.skip(why)
    assert not why, why
    with imap_server.running() as running:
        yield running


class Fetch:
    """The task in an installation of its own, and the mailbox that it fetches from."""

    def __init__(self, site, mailbox):
        self.site, self.mailbox, self.server = site, mailbox, mailbox.server
        self.maildir = site.folder / "maildir"
        self.taken = site.folder / "taken"
        self.taken.mkdir()
        self.install()
        self.set(maildir=self.maildir)

    def install(self, more=""):
        """Put the task into tasks.d, with more code at its end if a test needs that."""
        self.site.write("fetch_mail.py", FILE.read_text() + textwrap.dedent(more))

    def set(self, settings="", **options):
        """Write the param file: plain IMAP on this machine, unless options say otherwise."""
        protocol = options.get("protocol", "imap")
        encrypted = options.get("security") == "tls"
        options = {
            "host": "127.0.0.1",
            "port": self.server.ports[protocol + "s" * encrypted],
            "security": "none",
            "ca_file": self.server.ca_file,
            "user": self.mailbox.user,
            "password": PASSWORD,
            **({"then": "delete"} if protocol == "pop3" else {}),
            **options,
        }
        lines = [f"task.fetch_mail.options.{key} = {value}\n" for key, value in options.items()]
        self.site.params.write_text("".join(["node = here\n", settings, *lines]))
        self.site.params.chmod(0o600)

    def program(self, body):
        """Return a program that keeps what it is given, and then does what a test says."""
        path = self.site.folder / "program"
        script = f"""\
        #!/bin/sh
        cd {self.taken} && cat >"$FETCH_MAIL_ID" && echo "$FETCH_MAIL_ID" >>{self.site.ledger}
        {body}
        """
        path.write_text(textwrap.dedent(script))
        path.chmod(0o755)
        return path

    def run(self):
        """Run the task, and return what is known of the run."""
        self.said = self.site.run("run", "fetch_mail", "--force")
        return self.last()

    def last(self):
        return self.site.rows("SELECT * FROM run ORDER BY id DESC LIMIT 1")[0]

    def outcome(self):
        return self.run()["outcome"]

    def state(self):
        return json.loads(self.site.rows("SELECT state FROM task")[0]["state"])

    def failure(self):
        """Return why the run failed, without how far it was."""
        found = self.run()
        assert found["outcome"] == "failed", found
        assert PASSWORD not in self.said.stdout + self.said.stderr + json.dumps(found)
        return found["reason"].partition(", after progress")[0]

    def delivered(self):
        files = [*(self.maildir / "new").iterdir(), *(self.maildir / "cur").iterdir()]
        return [path.read_bytes() for path in sorted(files, key=lambda path: path.name)]

    def given(self):
        """Return the messages that the program was given, with repeats."""
        return [(self.taken / name).read_bytes() for name in self.order()]

    def order(self):
        return self.site.ledger.read_text().split() if self.site.ledger.exists() else []


@pytest.fixture
def fetch(site, server):
    return Fetch(site, server.mailbox())


def letters(count, first=0):
    return [b"Subject: %d\r\n\r\nhello\r\n" % number for number in range(first, first + count)]


# -- IMAP


def test_messages_go_into_a_maildir_and_are_marked_as_seen(fetch):
    fetch.mailbox.put(*letters(12))
    found = fetch.run()
    assert (found["outcome"], found["volume"]) == ("done", 12), fetch.said
    assert found["message"] == "12 handed over"
    assert fetch.delivered() == letters(12)
    assert sorted(fetch.mailbox.seen()) == sorted(letters(12))
    assert fetch.outcome() == "nothing"
    fetch.mailbox.put(*letters(1, first=50))
    assert fetch.outcome() == "done"
    assert fetch.delivered() == [*letters(12), *letters(1, first=50)]


@pytest.mark.parametrize("host", ["127.0.0.1", PLAIN], ids=["extensions", "none"])
@pytest.mark.parametrize("then", ["delete", "move"])
def test_messages_leave_the_folder(fetch, host, then):
    fetch.mailbox.make_folder("Done")
    fetch.mailbox.put(*letters(3))
    move = {"move_to": "Done"} if then == "move" else {}
    fetch.set(maildir=fetch.maildir, host=host, security="tls", then=then, **move)
    assert fetch.outcome() == "done", fetch.said
    assert fetch.delivered() == letters(3)
    assert fetch.mailbox.messages() == []
    assert sorted(fetch.mailbox.messages("Done")) == (letters(3) if then == "move" else [])
    assert fetch.outcome() == "nothing"


def test_what_others_marked_as_deleted_is_left_alone(fetch):
    fetch.mailbox.put(*letters(1))
    (file,) = fetch.mailbox.files()
    file.rename(fetch.mailbox.path / "cur" / f"{file.name}:2,T")
    fetch.mailbox.put(*letters(1, first=1))
    fetch.set(maildir=fetch.maildir, then="delete")
    assert fetch.outcome() == "done", fetch.said
    assert fetch.delivered() == letters(1, first=1)
    assert fetch.mailbox.messages() == letters(1)


def test_a_folder_has_the_name_that_people_see(fetch):
    fetch.mailbox.make_folder("B&APw-ro &- Co")
    fetch.mailbox.put(*letters(2), folder="B&APw-ro &- Co")
    fetch.set(maildir=fetch.maildir, folder="Büro & Co", then="move", move_to="INBOX")
    assert fetch.outcome() == "done", fetch.said
    assert fetch.delivered() == sorted(fetch.mailbox.messages()) == letters(2)


def test_names_are_written_as_imap_wants_them():
    assert fetch_mail.written('a"b\\c') == '"a\\"b\\\\c"'
    assert fetch_mail.written("~peter/mail/台北/日本語") == '"~peter/mail/&U,BTFw-/&ZeVnLIqe-"'


def test_a_user_may_have_any_name(site, server):
    fetch = Fetch(site, server.mailbox(ODD_USERS[0]))
    fetch.mailbox.put(*letters(1))
    assert fetch.outcome() == "done", fetch.said
    fetch.mailbox.put(*letters(1, first=1))
    fetch.set(maildir=fetch.maildir, protocol="pop3")
    assert fetch.outcome() == "done", fetch.said


def test_a_server_may_know_nothing_but_login(site, server):
    fetch = Fetch(site, server.mailbox(ODD_USERS[1]))
    fetch.install("""
        connected = Imap._connected

        def without_plain(self):
            server = connected(self)
            server.capabilities, server.debug = ("IMAP4REV1",), 4
            return server

        Imap._connected = without_plain
    """)
    fetch.mailbox.put(*letters(1))
    assert fetch.outcome() == "done", fetch.said
    assert " LOGIN " in fetch.said.stdout + fetch.said.stderr
    assert PASSWORD not in fetch.said.stdout + fetch.said.stderr


def test_a_message_that_the_server_cannot_read_stops_no_other(fetch):
    fetch.mailbox.put(*letters(3))
    fetch.mailbox.files()[1].chmod(0)
    for _ in range(2):  # this server hangs up at such a message; then that one comes last
        assert "Internal error" in fetch.failure()
    assert fetch.delivered() == [letters(3)[0], letters(3)[2]]


def test_a_message_that_somebody_else_deletes_is_no_problem(fetch):
    fetch.mailbox.put(*letters(3))
    gone = fetch.mailbox.files()[1].name
    program = fetch.program(f"rm -f {fetch.mailbox.path}/*/{gone}*")
    fetch.set(program=program)
    found = fetch.run()
    assert (found["outcome"], found["volume"]) == ("done", 2), fetch.said
    assert fetch.given() == [letters(3)[0], letters(3)[2]]


def test_only_a_whole_message_is_taken_for_one():
    head = b"1 (UID 7 BODY[] {5}"
    flags = rb"3 (FLAGS (\Seen))"
    assert fetch_mail.body([flags, (head, b"hello"), b")"]) == b"hello"
    assert fetch_mail.body([(b"1 (BODY[] {5}", b"hello"), b" UID 7)"]) == b"hello"
    assert fetch_mail.body([b'1 (UID 7 BODY[] "")']) == b""
    assert fetch_mail.body([None]) is None
    assert fetch_mail.body([flags]) is None
    for answer in (b"1 (UID 7 BODY[] NIL)", b'1 (UID 7 BODY[] "hello")'):
        with pytest.raises(fetch_mail.MessageError, match="did not hand it out"):
            fetch_mail.body([answer])


# -- POP3


@pytest.mark.parametrize("security", ["none", "starttls", "tls"])
@pytest.mark.parametrize("protocol", ["imap", "pop3"])
def test_both_protocols_with_and_without_tls(fetch, protocol, security):
    fetch.mailbox.put(*letters(12))
    fetch.set(maildir=fetch.maildir, protocol=protocol, security=security, then="delete")
    found = fetch.run()
    assert (found["outcome"], found["volume"]) == ("done", 12), fetch.said
    assert sorted(fetch.delivered()) == sorted(letters(12))
    assert fetch.mailbox.messages() == []
    assert fetch.outcome() == "nothing"


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
def test_what_was_handed_over_when_the_connection_broke_is_only_marked_later(fetch, protocol):
    fetch.mailbox.put(*letters(6))
    broken = fetch.site.folder / "broken"
    third = f"[ $(wc -l <{fetch.site.ledger}) != 3 ]"
    wait = f"echo >{broken}; while [ -e {broken} ]; do sleep 0.02; done"
    program = fetch.program(f"{third} || {{ {wait}; }}")
    fetch.set(program=program, protocol=protocol, then="delete")
    running = fetch.site.start("run", "fetch_mail")
    wait_for(broken.exists)
    fetch.server.break_connections(protocol)
    broken.unlink()
    assert running.wait(60) == 1
    found = fetch.last()
    assert found["reason"].startswith("ServerError: 127.0.0.1, port "), found
    assert len(fetch.mailbox.messages()) == (4 if protocol == "imap" else 6)
    fetch.outcome()
    assert fetch.outcome() == "nothing", fetch.said
    assert sorted(fetch.given()) == letters(6)
    assert fetch.mailbox.messages() == []


def test_pop3_forgets_what_it_deleted(fetch):
    fetch.mailbox.put(*letters(3))
    fetch.set(program=fetch.program("! grep -q 'Subject: 1' $FETCH_MAIL_ID"), protocol="pop3")
    assert "1 of 3" in fetch.failure()
    assert fetch.state()["handled"] == []
    assert len(fetch.state()["unfinished"]) == 1


# -- programs


def test_a_program_gets_the_message_and_its_identity(fetch):
    fetch.mailbox.put(*letters(2))
    fetch.set(program=f"{fetch.program('env; echo arguments: $*')}, one, two words")
    assert fetch.outcome() == "done", fetch.said
    assert fetch.given() == letters(2)
    assert len(set(fetch.order())) == 2
    assert "arguments: one two words" in fetch.said.stdout
    assert PASSWORD not in fetch.said.stdout
    assert "PASSWORD" not in fetch.said.stdout


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
def test_a_message_that_is_refused_stops_no_other_and_stays(fetch, protocol):
    fetch.mailbox.put(*letters(5))
    body = "if grep -q 'Subject: [13]' $FETCH_MAIL_ID; then exit 9; fi"
    fetch.set(program=fetch.program(body), protocol=protocol, then="delete")
    reason = fetch.failure()
    assert reason.startswith("MessageError: 2 of 5 messages stay in the mailbox; the last: ")
    assert reason.endswith("the program ended with 9")
    assert sorted(fetch.mailbox.messages()) == [letters(5)[1], letters(5)[3]]
    assert fetch.last()["volume"] == 3
    fetch.set(program=fetch.program(""), protocol=protocol, then="delete")
    assert fetch.outcome() == "done"
    assert fetch.mailbox.messages() == []


def test_a_message_that_is_refused_keeps_no_other_waiting(fetch):
    fetch.mailbox.put(*letters(3))
    program = fetch.program("! grep -q 'Subject: 0' $FETCH_MAIL_ID")
    fetch.set("task.fetch_mail.maximum = 1\n", program=program)
    assert [fetch.outcome() for _ in range(4)] == ["failed", "done", "done", "failed"]
    assert fetch.given() == [letters(3)[number] for number in (0, 1, 2, 0)]


def test_what_is_no_longer_in_the_mailbox_is_forgotten(fetch):
    fetch.mailbox.put(*letters(1))
    fetch.set(program="false")
    assert fetch.failure().endswith("the program ended with 1")
    assert len(fetch.state()["unfinished"]) == 1
    fetch.mailbox.files()[0].unlink()
    assert fetch.outcome() == "nothing"
    assert fetch.state() == {"handled": [], "unfinished": []}


def test_a_program_that_hangs_is_ended(fetch):
    fetch.mailbox.put(*letters(2))
    body = "if grep -q 'Subject: 0' $FETCH_MAIL_ID; then exec sleep 60; fi"
    fetch.set(program=fetch.program(body), program_timeout=5)
    assert fetch.failure().endswith("the program did not end within 5 s")
    assert fetch.mailbox.seen() == letters(2)[1:]


def test_a_program_need_not_read(fetch):
    fetch.mailbox.put(b"x" * 1_000_000)
    fetch.set(program="true")
    assert fetch.outcome() == "done", fetch.said


def test_a_program_that_cannot_start_is_named(fetch):
    fetch.mailbox.put(*letters(1))
    path = fetch.site.folder / "bad"
    path.write_text("no program")
    path.chmod(0o755)
    fetch.set(program=path)
    assert fetch.failure().endswith("the program did not start: Exec format error")


# -- kills and deadlines

KILL_BEFORE_MARKING = """
    import signal

    def mark(self, message, had=Imap.mark if "{protocol}" == "imap" else Pop3.mark):
        if not os.path.exists("{killed}"):
            open("{killed}", "w").close()
            os.killpg(0, signal.SIGKILL)
        had(self, message)

    Imap.mark = Pop3.mark = mark
"""


@pytest.mark.parametrize("reader", [False, True], ids=["new", "read"])
@pytest.mark.parametrize("protocol", ["imap", "pop3"])
def test_a_message_is_not_delivered_twice_though_the_task_was_killed(fetch, protocol, reader):
    killed = fetch.site.folder / "killed"
    fetch.install(KILL_BEFORE_MARKING.format(protocol=protocol, killed=killed))
    fetch.mailbox.put(*letters(3))
    fetch.set(maildir=fetch.maildir, protocol=protocol, then="delete")
    assert "SIGKILL" in fetch.failure()
    assert fetch.delivered() == letters(1)
    (file,) = (fetch.maildir / "new").iterdir()
    if reader:
        file.rename(fetch.maildir / "cur" / f"{file.name}:2,S")
    assert len(fetch.mailbox.messages()) == 3
    assert fetch.outcome() == "done", fetch.said
    assert sorted(fetch.delivered()) == letters(3)
    assert fetch.mailbox.messages() == []


def test_a_program_can_tell_what_it_was_given_twice(fetch):
    fetch.install(KILL_BEFORE_MARKING.format(protocol="imap", killed=fetch.site.folder / "killed"))
    fetch.mailbox.put(*letters(1))
    fetch.set(program=fetch.program(""))
    assert "SIGKILL" in fetch.failure()
    assert fetch.outcome() == "done"
    first, second = fetch.order()
    assert first == second


def group_of_the_task(site):
    for path in (site.state / "runs").glob("*.keeper"):
        for line in path.read_text().splitlines():
            note = json.loads(line) if line.endswith("}") else {}
            if "group" in note:
                return note["group"][0]
    return None


# once there are so many, each takes a second, so that whoever kills comes in time
SLOW_AFTER = """
    import time

    def hand_over(*args, had=hand_over):
        had(*args)
        time.sleep(len(os.listdir("{maildir}/new")) >= int(open("{limit}").read()))
"""


def kill_when_it_has(fetch, count):
    """Start the task, and kill it when so many messages are in the Maildir; tell if it was."""
    (fetch.site.folder / "limit").write_text(str(count + 8))
    running = fetch.site.start("run", "fetch_mail", "--force")
    while running.poll() is None and len(os.listdir(fetch.maildir / "new")) < count:
        time.sleep(0.001)
    group = group_of_the_task(fetch.site)
    try:
        if group:
            os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        group = None
    running.wait(60)
    return bool(group)


@pytest.mark.parametrize(
    ("protocol", "then"), [("imap", "seen"), ("imap", "delete"), ("pop3", "delete")]
)
def test_kills_at_any_moment_lose_nothing_and_repeat_nothing(fetch, protocol, then):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    wanted = letters(100)
    fetch.mailbox.put(*wanted)
    fetch.set(maildir=fetch.maildir, protocol=protocol, then=then)
    fetch_mail.Maildir(str(fetch.maildir))
    limit = fetch.site.folder / "limit"
    fetch.install(SLOW_AFTER.format(maildir=fetch.maildir, limit=limit))
    killed = [
        kill_when_it_has(fetch, len(fetch.delivered()) + chance.randrange(1, 14)) for _ in range(6)
    ]
    assert sum(killed) >= 4
    limit.write_text("1000")
    assert fetch.outcome() in ("done", "nothing"), fetch.said
    assert sorted(fetch.delivered()) == sorted(wanted)
    done = "S" if then == "seen" else "T"  # killed before it was removed
    assert {file.name[-1] for file in fetch.mailbox.files()} <= {done}


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
def test_at_the_deadline_it_stops_between_two_messages(fetch, protocol):
    fetch.mailbox.put(*letters(8))
    late = f"echo 1000 >{fetch.site.movable_clock()}"
    program = fetch.program(f"[ $(wc -l <{fetch.site.ledger}) != 3 ] || {late}")
    fetch.set(
        "task.fetch_mail.deadline = 1000\n", program=program, protocol=protocol, then="delete"
    )
    found = fetch.run()
    assert found["outcome"] == "more", fetch.said
    assert len(fetch.mailbox.messages()) == 5
    assert found["volume"] == len(fetch.order()) == 3
    fetch.set(program=fetch.program(""), protocol=protocol, then="delete")
    assert fetch.outcome() == "done"
    assert sorted(fetch.given()) == letters(8)


def test_a_run_takes_so_many_messages_and_says_that_there_are_more(fetch):
    fetch.install("MOST_IN_A_RUN = 3")
    fetch.mailbox.put(*letters(7))
    assert [fetch.outcome() for _ in range(4)] == ["more", "more", "done", "nothing"]
    assert fetch.delivered() == letters(7)


# -- bad messages

MALFORMED = {
    "NUL": b"Subject: nul\0\r\n\r\n\0\r\n",
    "empty": b"",
    "no headers": b"\r\n\r\nonly a body\r\n",
    "no body": b"Subject: x\r\n",
    "8 bit": bytes(range(1, 10)) + bytes(range(128, 256)) + b"\r\n",
    "encodings": b"Subject: =?utf-99?Q?\xff?=\r\nContent-Type: multipart/x; boundary\r\n\r\n--\r\n",
    "dots": b"Subject: dots\r\n\r\n.\r\n..\r\n.x\r\n",
    "From": b"From me@here Thu Jan  1\r\n\r\nFrom x\r\n",
    "one line of 5 MB": b"Subject: " + b"y" * 5_000_000 + b"\r\n",
    "many lines": b"x\r\n" * 100_000,
    "other line ends": b"Subject: x\r\n\r\na\rb\r\n",
}


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
def test_malformed_messages_arrive_as_they_are(fetch, protocol):
    fetch.mailbox.put(*MALFORMED.values())
    fetch.set(maildir=fetch.maildir, protocol=protocol, then="delete")
    assert fetch.outcome() == "done", fetch.said
    wanted = set(MALFORMED.values())
    if protocol == "pop3":  # ends each message with a line
        wanted = wanted - {b""} | {b"\r\n"}
    else:  # has no NUL, and the server shows it as 0x80
        wanted = {message.replace(b"\0", b"\x80") for message in wanted}
    assert set(fetch.delivered()) == wanted
    assert len(fetch.delivered()) == len(wanted)


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
def test_a_message_that_is_too_large_is_left_in_place(fetch, protocol):
    large = b"Subject: large\r\n\r\n" + b"x" * 100_000 + b"\r\n"
    fetch.mailbox.put(large, *letters(2))
    fetch.set(maildir=fetch.maildir, protocol=protocol, then="delete", largest=50_000)
    reason = fetch.failure()
    assert "1 of 3 messages" in reason
    assert reason.endswith("bytes, more than options.largest")
    assert fetch.mailbox.messages() == [large]
    assert sorted(fetch.delivered()) == letters(2)


# -- what is wrong is said in one line


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
def test_a_wrong_password_is_said_and_not_shown(fetch, protocol):
    fetch.set(maildir=fetch.maildir, protocol=protocol, password="wrong-horse")
    port = fetch.server.ports[protocol]
    reason = fetch.failure()
    assert reason.startswith(f"ServerError: 127.0.0.1, port {port}: ")
    assert "Authentication failed" in reason
    assert "wrong-horse" not in fetch.said.stdout + fetch.said.stderr + reason


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
@pytest.mark.parametrize("security", ["tls", "starttls"])
def test_a_certificate_of_an_unknown_authority_is_refused(fetch, protocol, security):
    options = {"maildir": fetch.maildir, "protocol": protocol, "security": security}
    fetch.set(**options, ca_file="")
    assert "CERTIFICATE_VERIFY_FAILED" in fetch.failure()


def test_a_password_that_a_server_repeats_is_not_shown():
    options = fetch_mail.read_options({**GOOD, "password": "wrong-horse"})
    error = imaplib.IMAP4.error("BAD unknown command: LOGIN me wrong-horse")
    assert fetch_mail.said(error, options).endswith("BAD unknown command: LOGIN me ***")
    assert fetch_mail.said(OSError(), options).endswith(": OSError")


def test_an_answer_is_told_from_a_connection_that_broke():
    answers = (imaplib.IMAP4.error("NO"), poplib.error_proto(b"-ERR no such message"))
    broken = (imaplib.IMAP4.abort("EOF"), poplib.error_proto("-ERR EOF"), TimeoutError("timed out"))
    assert [fetch_mail.is_refusal(error) for error in answers] == [True, True]
    assert [fetch_mail.is_refusal(error) for error in broken] == [False, False, False]


def test_a_certificate_for_another_name_is_refused(fetch):
    fetch.set(maildir=fetch.maildir, security="tls", host=UNNAMED)
    assert f"certificate is not valid for '{UNNAMED}'" in fetch.failure()


def test_a_server_that_is_not_there_is_named(fetch):
    port = free_port()
    fetch.set(maildir=fetch.maildir, port=port)
    assert fetch.failure() == f"ServerError: 127.0.0.1, port {port}: Connection refused"


def test_a_server_without_tls_is_not_logged_in_to(fetch):
    fetch.set(maildir=fetch.maildir, security="tls", port=fetch.server.ports["imap"])
    assert "WRONG_VERSION_NUMBER" in fetch.failure()


@pytest.mark.parametrize("options", [{"folder": "Nowhere"}, {"then": "move", "move_to": "Nowhere"}])
def test_a_folder_that_is_not_there_is_said_before_anything_is_handed_over(fetch, options):
    fetch.mailbox.put(*letters(1))
    fetch.set(maildir=fetch.maildir, **options)
    assert "doesn't exist" in fetch.failure()
    assert fetch.delivered() == []


GOOD = {"host": "localhost", "user": "me", "password": "x", "maildir": "/srv/mail"}
BAD = [
    ("protocol", {"protocol": "smtp"}),
    ("host", {"host": ""}),
    ("host", {"host": "a\r\nb"}),
    ("port", {"port": 65536}),
    ("port", {"port": "imap"}),
    ("port", {"port": True}),
    ("security", {"security": "ssl"}),
    ("security", {"security": "none", "host": "imap.example.org"}),
    ("ca_file", {"ca_file": "/does/not/exist"}),
    ("user", {"user": ""}),
    ("password", {"password": ""}),
    ("password", {"password": 12345678}),
    ("folder", {"folder": ""}),
    ("then", {"then": "keep"}),
    ("then", {"protocol": "pop3"}),
    ("then", {"protocol": "pop3", "then": "move", "move_to": "Done"}),
    ("move_to", {"then": "move"}),
    ("move_to", {"then": "move", "move_to": "INBOX"}),
    ("move_to", {"move_to": "Done"}),
    ("program", {"program": ["cat"]}),
    ("program", {"maildir": ""}),
    ("program", {"maildir": "", "program": ["/does/not/exist"]}),
    ("program", {"maildir": "", "program": ""}),
    ("program", {"maildir": "", "program": ["cat", 3]}),
    ("program_timeout", {"program_timeout": 0}),
    ("maildir", {"maildir": "mail"}),
    ("largest", {"largest": 0}),
    ("hots", {"hots": "x"}),
]


@pytest.mark.parametrize(("key", "options"), BAD)
def test_a_bad_option_is_one_clear_line(key, options):
    with pytest.raises(ValueError) as caught:
        fetch_mail.read_options({**GOOD, **options})
    text = str(caught.value)
    assert text.startswith(f"options.{key}: ")
    assert "\n" not in text
    assert "12345678" not in text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_no_tls_is_needed_on_this_machine(host):
    assert fetch_mail.read_options({**GOOD, "host": host, "security": "none"}).host == host


def test_a_bad_option_is_the_reason_of_the_run(fetch):
    fetch.set(maildir=fetch.maildir, then="keep")
    rule = 'must be "seen", "delete" or "move"'
    assert fetch.failure() == f"ValueError: options.then: {rule}"


def test_the_options_in_the_file_are_the_defaults():
    found = bgtasks.read_raw(str(FILE))[0]
    assert found["options"] == {**fetch_mail.Options()._asdict(), "program": []}


def test_one_script_serves_two_mailboxes(fetch, server):
    fetch.set(maildir=fetch.maildir)
    other = server.mailbox()
    fetch.mailbox.put(*letters(1))
    other.put(*letters(1))
    params = fetch.site.params.read_text()
    for name, user in (("first", fetch.mailbox.user), ("second", other.user)):
        file = 'schedule = "every 5 min"\nscript = "fetch_mail.py"\n'
        fetch.site.write(f"{name}.toml", f'{file}options = {{ user = "{user}" }}\n')
        own = params.replace("fetch_mail", name).replace(fetch.mailbox.user, user)
        fetch.site.params.write_text(own)
        assert fetch.site.run("run", name).returncode == 0
    # equal numbers and equal texts of two mailboxes are two messages
    assert fetch.delivered() == letters(1) * 2


# -- the Maildir itself


def test_nobody_else_can_read_the_maildir(tmp_path):
    path = tmp_path / "maildir"
    fetch_mail.Maildir(str(path))("a", b"hello")
    folders = [path, *(path / part for part in ("tmp", "new", "cur"))]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    (file,) = (path / "new").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(path / "tmp") == []


def test_what_a_killed_run_left_half_written_is_replaced(tmp_path):
    maildir = fetch_mail.Maildir(str(tmp_path))
    maildir("a", b"hello")
    (file,) = (tmp_path / "new").iterdir()
    file.unlink()
    (tmp_path / "tmp" / file.name).write_bytes(b"he")
    fetch_mail.Maildir(str(tmp_path))("a", b"hello")
    assert file.read_bytes() == b"hello"
    assert os.listdir(tmp_path / "tmp") == []


def test_another_message_with_the_same_number_is_another_message(tmp_path):
    for content in (b"one", b"two", b"one"):
        fetch_mail.Maildir(str(tmp_path))("a", content)
    assert len(os.listdir(tmp_path / "new")) == 2


def test_a_maildir_that_takes_no_more_says_so_and_keeps_nothing_half(tmp_path):
    maildir = fetch_mail.Maildir(str(tmp_path))
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(fetch_mail.MessageError, match=f"{tmp_path}: No such file or directory"):
        maildir("a", b"hello")
    assert os.listdir(tmp_path / "tmp") == []


def test_any_uidl_makes_a_name_of_a_file():
    worst = bytes(range(0x21, 0x7F)).replace(b"0", b"")[-70:]
    name = fetch_mail.quote(worst, safe="")
    assert not set("/:,") & set(name)
    assert len(Path("x" * 13 + name + "." + "x" * 16).name) < 255
