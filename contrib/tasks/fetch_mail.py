# /// script
# [tool.bgtasks]
# description = "Hand the messages of a mailbox to a program, or put them into a Maildir"
# schedule = "every 5 min"
# timeout = "30 min"
#
# [tool.bgtasks.options]
# protocol = "imap"      # or "pop3"
# host = ""              # imap.example.org
# port = 0               # 0: the usual one of the protocol
# security = "tls"       # or "starttls"; "none" only on this machine
# ca_file = ""           # certificate of a private CA; empty: those that this machine trusts
# user = ""
# password = ""          # not here: task.fetch_mail.options.password = ... in the param file
# folder = "INBOX"       # only IMAP
# then = "seen"          # or "delete", or "move" to the folder move_to; POP3 can only delete
# move_to = ""
# program = []           # gets a message on stdin and its identity in FETCH_MAIL_ID; exit 0: taken
# program_timeout = 60   # seconds for one message
# maildir = ""           # instead of a program: the path of a Maildir
# largest = 52428800     # bytes; a larger message is left in place
# ///
"""Fetch mail by IMAP or POP3: copy or link this file into tasks.d, and set the options.

A message is marked, moved or deleted only after it was handed over. One that cannot be handed over
stays, stops no other, comes last in the next run, and lets the run fail at its end. While it stays,
runs become rarer, as those of each task that fails. Messages are handed over as the server sends
them, lines ending in CRLF; nothing in them is read.

A message is handed over once, but for these cases:

* The task was killed, or the machine went down, after a message was handed over and before that was
  noted. With IMAP this is the moment until it is marked; with POP3 about a second, or the whole run
  if the machine went down. A Maildir knows it again, unless it was moved out or removed meanwhile;
  a program can tell by FETCH_MAIL_ID.
* The program did its work, but then did not exit with 0 in time.
* Between handing over and marking, host, port, user or folder was changed, or the server gave its
  messages new numbers.

Deleting with IMAP marks and then removes: killed in between, a message stays, marked as deleted,
and is not fetched again. Without UIDPLUS it also removes what others have marked as deleted in that
folder. Without MOVE, "move" copies and then deletes: killed in between, the copy comes twice.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import imaplib
import os
import poplib
import re
import shutil
import ssl
import subprocess
from typing import Any, Callable, NamedTuple
from urllib.parse import quote

NETWORK_SECONDS = 30.0
MOST_IN_A_RUN = 1000  # keeps small what the state must remember
PORTS = {"imap": (143, 993), "pop3": (110, 995)}  # the second: TLS from the start
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
TYPES = {str: "text in quotes", int: "a whole number", tuple: "a list of texts"}


class ServerError(Exception):
    """The mailbox cannot be used; the run ends."""


class MessageError(Exception):
    """A message cannot be handed over or marked; it stays, and the others go on."""


def run(task: Any) -> str | None:
    options = read_options(task.options)
    deliver = Maildir(options.maildir) if options.maildir else Program(options)
    mailbox = Imap(options) if options.protocol == "imap" else Pop3(options)
    with contextlib.closing(mailbox):
        waiting = mailbox.waiting()
        recall(task.state, waiting)
        try:
            tried, problems = hand_over_all(task, mailbox, waiting, deliver)
            mailbox.settle()
        finally:
            forget(task.state, "handled", mailbox.settled)
    if problems:
        text = f"{len(problems)} of {tried} messages stay in the mailbox; the last: {problems[-1]}"
        raise MessageError(text)
    return result(task, tried, len(waiting))


def result(task: Any, tried: int, waiting: int) -> str | None:
    if not waiting:
        return task.NOTHING
    task.message = f"{task.volume} handed over"
    return task.MORE if tried == MOST_IN_A_RUN < waiting else None


def hand_over_all(
    task: Any, mailbox: Imap | Pop3, waiting: list[str], deliver: Maildir | Program
) -> tuple[int, list[str]]:
    """Return how many messages were tried, and what is wrong with those that stay."""
    tried, problems, late = 0, [], set(task.state["unfinished"])
    order = sorted(waiting, key=late.__contains__)[:MOST_IN_A_RUN]
    for tried, message in enumerate(task.each(order), start=1):
        remember(task.state, "unfinished", message)
        try:
            hand_over(task, mailbox, message, deliver)
            forget(task.state, "unfinished", [message])
        except MessageError as error:
            problems.append(f"{message}: {error}")
            print(problems[-1])
        task.progress(tried, len(order))
    return tried, problems


def hand_over(task: Any, mailbox: Imap | Pop3, message: str, deliver: Maildir | Program) -> None:
    if message not in task.state["handled"]:
        content = mailbox.fetch(message)
        if content is None:  # somebody else deleted it meanwhile
            return
        deliver(message, content)
        remember(task.state, "handled", message)
        task.add_volume(1)
    mailbox.mark(message)


# --- what the next run must know: which messages were handed over but are not marked for good, and
# which were begun but not finished. The last come last, so that none keeps the others waiting.


def recall(state: dict[str, Any], waiting: list[str]) -> None:
    """Forget what is no longer in the mailbox."""
    there = set(waiting)
    for key in ("handled", "unfinished"):
        state[key] = [message for message in state.get(key, ()) if message in there]


def remember(state: dict[str, Any], key: str, message: str) -> None:
    forget(state, key, [message])
    state[key] = [*state[key], message][-2 * MOST_IN_A_RUN :]


def forget(state: dict[str, Any], key: str, messages: list[str]) -> None:
    state[key] = [message for message in state[key] if message not in messages]


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    protocol: str = "imap"
    host: str = ""
    port: int = 0
    security: str = "tls"
    ca_file: str = ""
    user: str = ""
    password: str = ""
    folder: str = "INBOX"
    then: str = "seen"
    move_to: str = ""
    program: tuple[str, ...] = ()
    program_timeout: int = 60
    maildir: str = ""
    largest: int = 50 << 20


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    ("protocol", lambda o: o.protocol in ("imap", "pop3"), 'must be "imap" or "pop3"'),
    ("host", lambda o: o.host, "is empty; name the mail server"),
    ("port", lambda o: 0 <= o.port < 65536, "must be from 0 (the usual one) to 65535"),
    (
        "security",
        lambda o: o.security in ("tls", "starttls", "none"),
        'must be "tls", "starttls" or "none"',
    ),
    (
        "security",
        lambda o: o.security != "none" or o.host in THIS_MACHINE,
        'would send the password in the clear; set it to "tls" or "starttls"',
    ),
    ("ca_file", lambda o: not o.ca_file or os.path.isfile(o.ca_file), "is no file; mend the path"),
    ("user", lambda o: o.user, "is empty; name who logs in"),
    ("password", lambda o: o.password, "is empty; set it in the param file, and chmod 600 that"),
    ("folder", lambda o: o.folder, 'is empty; set it to "INBOX"'),
    ("then", lambda o: o.then in ("seen", "delete", "move"), 'must be "seen", "delete" or "move"'),
    (
        "then",
        lambda o: o.protocol == "imap" or o.then == "delete",
        'must be "delete" with POP3, which can do nothing else; or use IMAP',
    ),
    (
        "move_to",
        lambda o: bool(o.move_to) == (o.then == "move") and o.move_to != o.folder,
        'must name another folder if then = "move", and be empty otherwise',
    ),
    ("program", lambda o: o.program or o.maildir, "is empty; set it, or maildir"),
    ("program", lambda o: not (o.program and o.maildir), "must be empty if maildir is set"),
    (
        "program",
        lambda o: not o.program or shutil.which(o.program[0]),
        "is not there or cannot be started; give its whole path",
    ),
    ("program_timeout", lambda o: o.program_timeout > 0, "must be at least 1 second"),
    (
        "maildir",
        lambda o: not o.maildir or os.path.isabs(o.maildir),
        "must be a path from the root on, such as /srv/mail/support",
    ),
    ("largest", lambda o: o.largest > 0, "must be at least 1 byte"),
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


# --- where messages go: called with the identity of a message and its bytes, raises MessageError


class Program:
    """A program that reads one message from stdin."""

    def __init__(self, options: Options) -> None:
        self._command, self._seconds = options.program, options.program_timeout

    def __call__(self, message: str, content: bytes) -> None:
        env = {**os.environ, "FETCH_MAIL_ID": message}
        try:
            subprocess.run(self._command, input=content, env=env, timeout=self._seconds, check=True)
        except subprocess.CalledProcessError as error:
            raise MessageError(f"the program ended with {error.returncode}") from None
        except subprocess.TimeoutExpired:
            raise MessageError(f"the program did not end within {self._seconds} s") from None
        except OSError as error:
            raise MessageError(f"the program did not start: {error.strerror}") from None


class Maildir:
    """A folder as https://cr.yp.to/proto/maildir.html has it."""

    def __init__(self, path: str) -> None:
        self._path = path
        for part in ("", "tmp", "new", "cur"):
            os.makedirs(os.path.join(path, part), mode=0o700, exist_ok=True)
        names = [name for part in ("new", "cur") for name in os.listdir(os.path.join(path, part))]
        self._there = {name.partition(":")[0] for name in names}  # what follows it is flags

    def __call__(self, message: str, content: bytes) -> None:
        # with the content in the name, no other message is ever taken for one that is there, even
        # if a server gives a number a second time
        name = f"{message}.{hashlib.sha256(content).hexdigest()[:16]}"
        if name in self._there:
            return
        try:
            self._put(name, content)
        except OSError as error:
            raise MessageError(f"{self._path}: {error.strerror}") from None

    def _put(self, name: str, content: bytes) -> None:
        unfinished, new = os.path.join(self._path, "tmp", name), os.path.join(self._path, "new")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)  # of a run that was killed
        try:
            write(unfinished, content)
            os.rename(unfinished, os.path.join(new, name))
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        sync(new)


def write(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)


def sync(folder: str) -> None:
    """See that the names in a folder survive a power cut: the server deletes next."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- mailboxes: each has waiting(), fetch(), mark(), settle() and close(), knows its messages by
# their identity, and keeps in `settled` those that are marked for good


def talks(refused: type[Exception]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Raise ``refused`` if the server says no, and ServerError if the connection does not hold."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(self: Imap | Pop3, *args: object) -> Any:
            try:
                return method(self, *args)
            except (OSError, imaplib.IMAP4.error, poplib.error_proto) as error:
                kind = refused if is_refusal(error) else ServerError
                raise kind(said(error, self.options)) from None

        return wrapped

    return decorate


def is_refusal(error: Exception) -> bool:
    """Tell an answer of the server from a connection that broke; poplib has one class for both."""
    if isinstance(error, poplib.error_proto):
        return isinstance(error.args[0], bytes)
    return isinstance(error, imaplib.IMAP4.error) and not isinstance(error, imaplib.IMAP4.abort)


def said(error: Exception, options: Options) -> str:
    """Return who said what, on one line; some servers repeat the password."""
    told = getattr(error, "strerror", None) or next(iter(error.args), type(error).__name__)
    text = told.decode("utf-8", "replace") if isinstance(told, bytes) else str(told)
    text = text.replace(options.password, "***")
    return " ".join(f"{options.host}, port {place(options)['port']}: {text}".split())


def place(options: Options) -> dict[str, Any]:
    port = options.port or PORTS[options.protocol][options.security == "tls"]
    return {"host": options.host, "port": port, "timeout": NETWORK_SECONDS}


def verified(options: Options) -> ssl.SSLContext:
    """Return what checks the server's certificate and name."""
    context = ssl.create_default_context(cafile=options.ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # the default only since Python 3.10
    return context


def account(options: Options) -> str:
    """Return what tells the messages of one mailbox from those of another."""
    server = (options.protocol, options.host, str(place(options)["port"]))
    text = "\0".join((*server, options.user, options.folder))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def refuse_large(size: int, options: Options) -> None:
    if size > options.largest:
        raise MessageError(f"has {size} bytes, more than options.largest")


class Imap:
    """A folder; its messages are known by UIDVALIDITY and UID."""

    @talks(ServerError)
    def __init__(self, options: Options) -> None:
        self.options, self.settled = options, list[str]()
        self._uids: dict[str, str] = {}
        self._server = self._connected()
        self._log_in()
        # many servers name their extensions only after the login, and imaplib asks before it
        self._can = asked(self._server.capability())[-1].decode().upper().split()
        if options.move_to:  # else each message would be handed over, and then stay
            asked(self._server.status(written(options.move_to), "(MESSAGES)"))
        asked(self._server.select(written(options.folder)))
        validity = self._server.response("UIDVALIDITY")[1][-1] or b"0"
        self._prefix = f"{account(options)}.{validity.decode()}"

    def _connected(self) -> imaplib.IMAP4:
        if self.options.security == "tls":
            return imaplib.IMAP4_SSL(**place(self.options), ssl_context=verified(self.options))
        server = imaplib.IMAP4(**place(self.options))
        if self.options.security == "starttls":
            server.starttls(verified(self.options))
        return server

    def _log_in(self) -> None:
        user, password = self.options.user, self.options.password
        if "AUTH=PLAIN" in self._server.capabilities:  # takes what is not ASCII, too
            self._server.authenticate("PLAIN", lambda _: f"\0{user}\0{password}".encode())
        else:
            self._server.login(quoted(user), password)

    @talks(ServerError)
    def waiting(self) -> list[str]:
        """Return the identities of the messages to hand over, oldest first."""
        wanted = ("UNSEEN", "UNDELETED") if self.options.then == "seen" else ("UNDELETED",)
        found = joined(asked(self._server.uid("SEARCH", *wanted)))
        uids = sorted(found.decode().split(), key=int)
        self._uids = {f"{self._prefix}.{uid:0>10}": uid for uid in uids}
        return list(self._uids)

    @talks(MessageError)
    def fetch(self, message: str) -> bytes | None:
        """Return a message, or None if it is gone."""
        size = re.search(rb"RFC822\.SIZE (\d+)", joined(self._look_at(message, "(RFC822.SIZE)")))
        if size is None:
            return None
        refuse_large(int(size[1]), self.options)
        return body(self._look_at(message, "(BODY.PEEK[])"))

    def _look_at(self, message: str, parts: str) -> list[Any]:
        return asked(self._server.uid("FETCH", self._uids[message], parts))

    @talks(MessageError)
    def mark(self, message: str) -> None:
        uid = self._uids[message]
        if self.options.then == "seen":
            self._flag(uid, r"(\Seen)")
        elif self.options.then == "delete":
            self._delete(uid)
        elif "MOVE" in self._can:
            asked(self._server.uid("MOVE", uid, written(self.options.move_to)))
        else:
            asked(self._server.uid("COPY", uid, written(self.options.move_to)))
            self._delete(uid)
        self.settled.append(message)

    def _flag(self, uid: str, flag: str) -> None:
        asked(self._server.uid("STORE", uid, "+FLAGS.SILENT", flag))

    def _delete(self, uid: str) -> None:
        self._flag(uid, r"(\Deleted)")
        if "UIDPLUS" in self._can:
            asked(self._server.uid("EXPUNGE", uid))
        else:
            asked(self._server.expunge())

    def settle(self) -> None:
        """Part from the server; each message was marked for good at once."""
        with contextlib.suppress(OSError, imaplib.IMAP4.error):
            self._server.logout()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # after a logout it is closed
            self._server.shutdown()


def asked(answer: tuple[str, list[Any]]) -> list[Any]:
    """Return what the server answered; raise what it said if it refused."""
    status, data = answer
    if status != "OK":
        raise imaplib.IMAP4.error(data[-1])
    return data


def joined(answer: list[Any]) -> bytes:
    return b" ".join(part for part in answer if isinstance(part, bytes))


def body(answer: list[Any]) -> bytes | None:
    """Return the message in the answer to a FETCH; None if there is none."""
    for part in answer:
        if isinstance(part, tuple) and b"BODY[]" in part[0]:
            return bytes(part[1])
    rest = joined(answer)
    if b"BODY[]" not in rest:
        return None
    if b'BODY[] ""' not in rest:  # NIL: the server has it, but cannot read it
        raise MessageError("the server did not hand it out")
    return b""


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def written(folder: str) -> str:
    """Return the name of a folder as IMAP writes it: RFC 3501, section 5.1.3."""

    def encoded(found: re.Match[str]) -> str:
        text = base64.b64encode(found[0].encode("utf-16-be"), b"+,").decode()
        return f"&{text.rstrip('=')}-"

    return quoted(re.sub(r"[^\x20-\x7e]+", encoded, folder.replace("&", "&-")))


class Pop3:
    """A mailbox; its messages are known by UIDL. What is deleted counts only after QUIT."""

    @talks(ServerError)
    def __init__(self, options: Options) -> None:
        self.options, self.settled = options, list[str]()
        self._numbers: dict[str, int] = {}
        self._sizes: dict[int, bytes] = {}
        self._deleted: list[str] = []
        self._server = self._connected()
        self._server.user(options.user)
        self._server.pass_(options.password)

    def _connected(self) -> poplib.POP3:
        # Python's own limit of 2,048 bytes refuses messages that the net is full of, and poplib has
        # no other way to raise it
        poplib._MAXLINE = self.options.largest + 1024  # type: ignore[attr-defined] # noqa: SLF001
        if self.options.security == "tls":
            return poplib.POP3_SSL(**place(self.options), context=verified(self.options))
        server = poplib.POP3(**place(self.options))
        if self.options.security == "starttls":
            server.stls(verified(self.options))
        return server

    @talks(ServerError)
    def waiting(self) -> list[str]:
        """Return the identities of the messages to hand over, oldest first.

        Two messages may have one UIDL if they are equal; then the other one has its turn next time.
        """
        self._sizes, prefix = pairs(self._server.list()[1]), account(self.options)
        self._numbers = {
            f"{prefix}.{quote(uidl, safe='')}": number
            for number, uidl in pairs(self._server.uidl()[1]).items()
        }
        return list(self._numbers)

    @talks(MessageError)
    def fetch(self, message: str) -> bytes | None:
        number = self._numbers[message]
        refuse_large(int(self._sizes[number].split()[0]), self.options)
        return b"".join(line + b"\r\n" for line in self._server.retr(number)[1])

    @talks(MessageError)
    def mark(self, message: str) -> None:
        self._server.dele(self._numbers[message])
        self._deleted.append(message)

    @talks(ServerError)
    def settle(self) -> None:
        self._server.quit()
        self.settled.extend(self._deleted)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.close()


def pairs(lines: list[bytes]) -> dict[int, bytes]:
    """Return what an answer of POP3 says of each message, by its number."""
    found = (line.partition(b" ") for line in lines)
    return {int(number): text.strip() for number, _, text in found}
