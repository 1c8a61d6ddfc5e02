# /// script
# [tool.bgtasks]
# description = "Fail when a certificate is about to expire"
# schedule = "daily 08:30"
# timeout = "10 min"
#
# [tool.bgtasks.options]
# hosts = []             # ["example.org", "mail.example.org:993"]: TLS from the start
# files = []             # ["/etc/letsencrypt/live/*/cert.pem"]: PEM or DER
# days = 21              # fail so many days before
# ca_file = ""           # certificate of a private CA; empty: those that this machine trusts
# ///
"""Watch certificates: copy or link this file into tasks.d, and set the options.

A host is connected to as a browser would do it: a certificate that is not trusted, or is for
another name, is a problem too. Of several certificates in a file the one counts that expires first.
"""

from __future__ import annotations

import base64
import binascii
import calendar
import glob
import os
import re
import signal
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple

NETWORK_SECONDS = 15
LARGEST = 10_000_000  # bytes; a bundle of all that are trusted has 200,000
PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:/\[\]\s]+))(?::([0-9]{1,5}))?")
UTC_TIME, GENERALIZED_TIME = 0x17, 0x18


class CertificateError(Exception):
    """Some certificates expire soon, or cannot be looked at."""


def run(task: Any) -> str:
    options = read_options(task.options)
    items = [*paths(options.files), *options.hosts]
    problems, ends = [], []
    for number, item in enumerate(task.each(items), start=1):
        try:
            left = (expiry(item, options) - time.time()) / 86400
            ends.append((left, item))
            print(f"{item}: {int(left)} days")
            if left < options.days:
                problems.append(f"{item} {said(left)}")
        except (OSError, ValueError) as error:
            problems.append(f"{item}: {reason(error)}")
            print(problems[-1])
        task.add_volume(1)
        task.progress(number, len(items))
    if problems:
        raise CertificateError(f"{len(problems)} of {len(items)}: {'; '.join(problems)}")
    left, item = min(ends, default=(0.0, ""))
    return f"next: {item} in {int(left)} days" if item else ""


def paths(patterns: tuple[str, ...]) -> list[str]:
    """Return the files; a pattern that matches none stays, so that it is named as missing."""
    return [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]


def said(days: float) -> str:
    return f"expires in {int(days)} days" if days >= 0 else f"expired {int(-days)} days ago"


def reason(error: Exception) -> str:
    """Return what is wrong in words; those of OpenSSL come with numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def expiry(item: str, options: Options) -> float:
    """Return when a certificate expires, of a file or a host."""
    if not os.path.isabs(item):
        return not_after(shown_by(item, options.ca_file))
    with open(item, "rb") as file:
        content = file.read(LARGEST)
    return min(not_after(certificate) for certificate in certificates(content))


def shown_by(host: str, ca_file: str) -> bytes:
    match = HOST.fullmatch(host)
    name, port = (match[1] or match[2], int(match[3] or 443)) if match else (host, 443)
    context = ssl.create_default_context(cafile=ca_file or None)
    # a name may have several addresses, and each has its time
    with within(NETWORK_SECONDS), socket.create_connection((name, port), 5) as connection:
        connection.settimeout(None)
        with context.wrap_socket(connection, server_hostname=name) as secured:
            return secured.getpeercert(binary_form=True) or b""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds, also if each byte comes in time."""

    def end(_number: int, _frame: object) -> None:
        raise TimeoutError(f"did not answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    # and again each second: OpenSSL does not see an alarm that comes between two of its reads
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- certificates: Python's own reader shows only those it has verified


def certificates(content: bytes) -> list[bytes]:
    """Return the certificates of a file, as DER."""
    found = PEM.findall(content)
    if not found and content[:1] != b"\x30":
        raise ValueError("holds no certificate")
    try:
        return [base64.b64decode(text) for text in found] or [content]
    except binascii.Error:
        raise ValueError("holds a certificate that is damaged") from None


def not_after(certificate: bytes) -> float:
    """Return the end of a certificate: RFC 5280, section 4.1."""
    try:
        (_, content), *_ = elements(certificate)
        (_, signed), *_ = elements(content)
        fields = [value for tag, value in elements(signed) if tag != 0xA0]  # all but the version
        _, (tag, value) = elements(fields[3])  # after number, algorithm and issuer
        return moment(tag, value.decode("ascii"))
    except (ValueError, IndexError):
        raise ValueError("holds a certificate that is damaged") from None


def elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the parts of what DER encodes, as tag and value."""
    at = 0
    while at < len(content):
        tag, length = content[at], content[at + 1]
        at += 2
        if length >= 0x80:  # in so many bytes
            count = length - 0x80
            length = int.from_bytes(content[at : at + count], "big")
            at += count
        if at + length > len(content):
            raise ValueError("is cut short")
        yield tag, content[at : at + length]
        at += length


def moment(tag: int, text: str) -> float:
    if tag == UTC_TIME:
        text = ("19" if text >= "5" else "20") + text
    elif tag != GENERALIZED_TIME:
        raise ValueError("is no time")
    return calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ"))


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    hosts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    days: int = 21
    ca_file: str = ""


def is_host(text: str) -> bool:
    match = HOST.fullmatch(text)
    return match is not None and 0 < int(match[3] or 443) < 65536


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    ("hosts", lambda o: o.hosts or o.files, "is empty; name hosts or files to look at"),
    (
        "hosts",
        lambda o: all(map(is_host, o.hosts)),
        'must be names such as "example.org", "mail.example.org:993" or "[2001:db8::1]:443"',
    ),
    ("files", lambda o: all(map(os.path.isabs, o.files)), "must be paths from the root on"),
    ("ca_file", lambda o: not o.ca_file or os.path.isfile(o.ca_file), "is no file; mend the path"),
)


# --- options: these lines are the same in each task of this folder, so that each works alone

TYPES = {
    str: "text in quotes",
    int: "a whole number from 0 on",
    bool: "true or false",
    tuple: "a list of texts",
}
BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def read_options(given: Mapping[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    options = Options(**{key: read_option(key, value) for key, value in given.items()})
    for key, holds, rule in RULES:
        if not holds(options):
            raise ValueError(f"options.{key}: {rule}")
    return options


def read_option(key: str, value: Any) -> Any:
    """Return a value as the type of its default."""
    if key not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    kind = type(Options._field_defaults[key])
    value = of_type(kind, value)
    texts = value if kind is tuple else (value,)
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if kind is tuple and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"options.{key}: must be {TYPES[kind]}")
    if any(isinstance(text, str) and re.search(r"[\0\r\n]", text) for text in texts):
        raise ValueError(f"options.{key}: must stand on one line; remove what breaks it")
    return value


def of_type(kind: type, value: Any) -> Any:
    """Turn what the param file sets as text, because a .toml left it out, into the type wanted."""
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str) or kind is str:
        return value
    if kind is tuple:
        return tuple(re.split(r"\s*,\s*", value)) if value else ()
    if kind is bool:
        return BOOLEANS.get(value.lower(), value)
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else value
