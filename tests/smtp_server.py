"""A real SMTP server for tests, in a thread: it takes mails, or misbehaves as it is told to.

What it does can be set at any time, while it runs.
"""

import asyncio
import contextlib
import random
import socket
import ssl
import tempfile
from functools import cache
from pathlib import Path

import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult

LOOPBACK = "127.0.0.1"


@cache
def authority():
    return trustme.CA()


@cache
def server_context(name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(name).configure_cert(context)
    return context


def _answer(answer, *about):
    return answer(*about) if callable(answer) else answer


class _Session(SMTP):
    """One connection."""

    def __init__(self, sink, **options):
        super().__init__(sink, **options)
        self._sink, self._taken = sink, 0
        self._auth_required = sink.login is not None  # as an argument it warns without STARTTLS

    def connection_made(self, transport):
        super().connection_made(transport)
        self._sink.open.add(self)

    def connection_lost(self, error):
        self._sink.open.discard(self)
        super().connection_lost(error)

    async def _handle_client(self):
        self._sink.connections += 1
        await asyncio.sleep(self._sink.greeting_seconds)
        if self._sink.greeting:
            await self.push(self._sink.greeting)
            self.transport.close()
            return
        await super()._handle_client()

    async def push(self, status):
        await super().push(status)
        if status[:3] in ("421", b"421") and self.transport:
            self.transport.close()

    async def smtp_DATA(self, arg):  # noqa: N802 - its name
        if self._sink.drops_in_data:
            self._sink.drops_in_data -= 1
            await self.push("354 go ahead")
            await self._reader.readuntil(b"\r\n")
            self.hang_up()
            return
        await super().smtp_DATA(arg)
        if self._taken == self._sink.drop_after > 0:
            self.hang_up()

    def taken(self):
        self._taken += 1

    def hang_up(self):
        if self.transport:
            (self._original_transport or self.transport).abort()


class _Controller(Controller):
    def factory(self):
        return _Session(self.handler, loop=self.loop, **self.SMTP_kwargs)

    def _trigger_server(self):
        self._factory_invoker()  # as a first connection would, which is none that counts


class MailSink:
    """An SMTP server on loopback, from `with MailSink() as sink:` until the end of the block."""

    def __init__(self, tls="none", login=None, *, name=LOOPBACK, smtputf8=True, eight_bit=True):
        """``tls``: none, starttls or tls. ``login``: who may send, (user, password), or None.

        ``name`` stands in the certificate; the others are extensions it says it knows."""
        self.tls, self.login, self.eight_bit = tls, login, eight_bit
        self.mails = []  # what was taken: (mail_from, rcpt_tos, content), in order of arrival
        self.connections = 0  # those that came as far as the greeting
        self.logins = []  # what was tried: (user, password, whether it was right)
        self.open = set()
        self.greeting = ""  # said instead of 220; then it hangs up
        self.greeting_seconds = 0.0
        self.sender_answer = ""  # to MAIL FROM, "451 later"; or a function of the address
        self.answers = {}  # to RCPT TO: recipient -> "550 no such user"
        self.data_answer = ""  # to the end of DATA; or a function of (mail_from, rcpt_tos, content)
        self.data_seconds = 0.0  # before it answers to the end of DATA; or a function
        self.drops_in_data = 0  # how many times it hangs up in the middle of DATA
        self.drops_unanswered = 0  # how many mails it takes and hangs up before it says so
        self.drop_after = 0  # mails after which it hangs up a connection
        context = server_context(name) if tls != "none" else None
        self._options = {
            "ready_timeout": 60,
            "hostname": LOOPBACK,
            "port": 0,
            "server_hostname": "sink.test",
            "enable_SMTPUTF8": smtputf8,
            "data_size_limit": 1 << 30,
            "authenticator": self._authenticate,
            "auth_require_tls": tls == "starttls",
            "ssl_context": context if tls == "tls" else None,
            "tls_context": context if tls == "starttls" else None,
            "require_starttls": tls == "starttls",
        }

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="sink")
        self.ca_file = Path(self._folder.name) / "ca.pem"
        authority().cert_pem.write_to_path(str(self.ca_file))
        self._controller = _Controller(self, **self._options)
        self._controller.start()
        self.port = self._controller.server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_):
        self._controller.loop.call_soon_threadsafe(self._hang_up)
        self._controller.stop()
        self._folder.cleanup()

    def _hang_up(self):
        for session in tuple(self.open):
            session.hang_up()

    def params(self):
        """Return lines for a param file."""
        user, password = self.login or ("", "")
        lines = [
            f"smtp_host = {LOOPBACK}",
            f"smtp_port = {self.port}",
            f"smtp_security = {self.tls}",
            f"smtp_user = {user}",
            f"smtp_pwd = {password}",
            f"smtp_ca_file = {self.ca_file}",
        ]
        return "".join(f"{line}\n" for line in lines)

    def recipients(self):
        """Return who got each mail."""
        return [rcpt_tos for _, rcpt_tos, _ in self.mails]

    def _authenticate(self, server, session, envelope, mechanism, data):
        given = (data.login.decode(), data.password.decode())
        self.logins.append((*given, given == self.login))
        return AuthResult(success=given == self.login, handled=given == self.login)

    # -- what aiosmtpd calls

    async def handle_EHLO(self, server, session, envelope, host_name, responses):  # noqa: N802 - its name
        session.host_name = host_name
        return [line for line in responses if self.eight_bit or "8BITMIME" not in line]

    async def handle_MAIL(self, server, session, envelope, address, options):  # noqa: N802 - its name
        answer = _answer(self.sender_answer, address)
        if answer:
            return answer
        if not self.eight_bit and "BODY=8BITMIME" in options:
            return "555 BODY=8BITMIME is not known"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(self, server, session, envelope, address, options):  # noqa: N802 - its name
        if address in self.answers:
            return self.answers[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):  # noqa: N802 - its name
        mail = (envelope.mail_from, tuple(envelope.rcpt_tos), bytes(envelope.content))
        await asyncio.sleep(_answer(self.data_seconds))
        answer = _answer(self.data_answer, *mail)
        if answer:
            return answer
        self.mails.append(mail)
        server.taken()
        if self.drops_unanswered:
            self.drops_unanswered -= 1
            server.hang_up()
            raise asyncio.CancelledError
        return f"250 OK, taken as number {len(self.mails)}"


@contextlib.contextmanager
def silent_server():
    """A port that takes connections and never says a word; yields its number."""
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        listening.listen()
        yield listening.getsockname()[1]


def free_ports(count):
    """Return ports where nobody listens, and of which the kernel gives none away meanwhile."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    below, chance = int(given.split()[0]), random.SystemRandom()
    with contextlib.ExitStack() as stack:
        found = []
        while len(found) < count:
            nobody = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                nobody.bind(("", chance.randrange(below // 2, below)))
                found.append(nobody.getsockname()[1])
        return found


def free_port():
    return free_ports(1)[0]
