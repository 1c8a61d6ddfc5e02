# /// script
# [tool.bgtasks]
# description = "Hand each new entry of an RSS or Atom feed to a program, or append it to a file"
# schedule = "every 30 min"
# timeout = "30 min"
#
# [tool.bgtasks.options]
# url = ""               # https://example.org/feed.xml
# program = []           # gets an entry as JSON on stdin, its id in FETCH_FEED_ID; exit 0: taken
# program_timeout = 60   # seconds for one entry
# file = ""              # instead of a program: a file that gets a line of JSON for each entry
# largest = 10000000     # bytes; a larger feed is refused
# ca_file = ""           # certificate of a private CA; empty: those that this machine trusts
# ///
"""Fetch a feed: copy or link this file into tasks.d, and set the options.

It asks for the feed only if that has changed (ETag, Last-Modified), and knows what it has handed
over by the entries' identities, in its state. The oldest comes first. An entry is an object with
feed, id, title, link, date and summary, as texts; what the feed leaves out is empty.

An entry that cannot be handed over stops no other, comes again in the next run, and lets this run
fail at its end. One is handed over twice only if the task is killed between handing it over and
noting that, about a second, or if the program did its work but did not exit with 0.

A feed comes from somewhere: entities are refused (they can read files, or grow without end), and so
is what is nested too deeply, too large, or too slow. Nothing in an entry is executed or followed.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple
from xml.etree import ElementTree as ET
from xml.parsers import expat

NETWORK_SECONDS = 60
DEEPEST = 100  # elements in each other
MOST_PARTS = 300_000  # elements and attributes: each needs some 300 bytes
MOST = 2000  # entries of a feed that are looked at, from its top: keeps the state small
REMEMBERED = 1000  # entries that it no longer shows
ATOM, RSS_1 = "{http://www.w3.org/2005/Atom}", "{http://purl.org/rss/1.0/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"
ROOTS = ("rss", f"{RDF}RDF", f"{ATOM}feed")
ENTRIES = ("channel/item", f"{RSS_1}item", f"{ATOM}entry")  # not those that hold each other


class FeedError(Exception):
    """The feed cannot be used, or an entry cannot be handed over."""


def run(task: Any) -> str | None:
    options = read_options(task.options)
    known = recall(task.state, options.url)
    answer = fetch(options, known)
    if answer is None:
        return task.NOTHING
    entries = parse(answer.content, options.url)
    seen = set(known["seen"])
    new = [entry for entry in reversed(entries) if mark(entry) not in seen]
    problems = hand_over_all(task, new, options)
    if problems:
        raise FeedError(f"{len(problems)} of {len(new)} entries stay; the last: {problems[-1]}")
    if task.volume == len(new):  # else the next run would be told that nothing has changed
        known.update(etag=answer.etag, modified=answer.modified)
    forget(known, {mark(entry) for entry in entries})
    return f"{task.volume} new entries" if new else task.NOTHING


def recall(state: dict[str, Any], url: str) -> dict[str, Any]:
    """Return what is known of the feed; of another one nothing but the entries is of use."""
    if state.get("url") != url:
        state.update(url=url, etag="", modified="")
    state.setdefault("seen", [])
    return state


def forget(known: dict[str, Any], shown: set[str]) -> None:
    """Forget the oldest of the entries that the feed no longer shows; it may show some again."""
    others = [entry for entry in known["seen"] if entry not in shown]
    known["seen"] = others[-REMEMBERED:] + [entry for entry in known["seen"] if entry in shown]


def mark(entry: Mapping[str, str]) -> str:
    """Return what the state remembers of an entry."""
    return hashlib.sha256(entry["id"].encode("utf-8", "replace")).hexdigest()[:16]


def hand_over_all(task: Any, new: list[dict[str, str]], options: Options) -> list[str]:
    """Hand the entries over, note which, and return what is wrong with those that stay."""
    problems = []
    for number, entry in enumerate(task.each(new), start=1):
        try:
            if options.file:
                append(options.file, entry)
            else:
                give(entry, options)
            task.state["seen"].append(mark(entry))
            task.add_volume(1)
        except FeedError as error:
            problems.append(f"{entry['id'][:200]!r}: {error}")
            print(problems[-1])
        task.progress(number, len(new))
    return problems


# --- the network


class Answer(NamedTuple):
    """A feed as the server sent it, and how to ask whether it has changed."""

    content: bytes
    etag: str
    modified: str


def fetch(options: Options, known: Mapping[str, str]) -> Answer | None:
    """Return the feed, or None if it has not changed."""
    asked = {"If-None-Match": known["etag"], "If-Modified-Since": known["modified"]}
    headers = {key: value for key, value in asked.items() if value}
    headers.update({"User-Agent": "bgtasks fetch_feed", "Accept-Encoding": "identity"})
    request = urllib.request.Request(options.url, headers=headers)  # noqa: S310 - checked
    context = ssl.create_default_context(cafile=options.ca_file or None)
    https = urllib.request.HTTPSHandler(context=context)
    try:
        with (
            within(NETWORK_SECONDS),
            urllib.request.build_opener(https, Web()).open(request) as got,
        ):
            content = got.read(options.largest + 1)
            found = Answer(content, plain(got.headers["ETag"]), plain(got.headers["Last-Modified"]))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.NOT_MODIFIED:
            return None
        raise FeedError(f"{options.url} answered {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise FeedError(f"{options.url}: {reason(error)}") from None
    if len(content) > options.largest:
        raise FeedError(f"{options.url} has more than {options.largest} bytes (options.largest)")
    return found


def plain(header: str | None) -> str:
    """Return a header as it can be sent back; Python refuses to send some of what it takes."""
    return header if header and re.fullmatch("[ -~]{1,500}", header) else ""


class Web(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the web only; Python would also go to an FTP server."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        del code, msg, headers
        fp.close()  # else all of its body would be read, which may have no end
        if not newurl.startswith("https://" if req.type == "https" else ("http://", "https://")):
            raise ValueError(f"leads to {newurl[:200]}, which is less safe")
        return urllib.request.Request(newurl, headers=dict(req.headers))  # noqa: S310 - checked

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # as of Python 3.11


def reason(error: Exception) -> str:
    """Return what went wrong, on one line; urllib wraps it."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, ssl.SSLCertVerificationError):
        return inner.verify_message
    text = (isinstance(inner, OSError) and inner.strerror) or str(inner) or type(inner).__name__
    return " ".join(text.split())


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


# --- the feed


def parse(content: bytes, url: str) -> list[dict[str, str]]:
    """Return the entries of a feed, in its order; of equal ones the first."""
    try:
        refuse_hostile(content)
        root = ET.fromstring(content)  # noqa: S314 - nothing hostile is left
    except (expat.ExpatError, ET.ParseError, LookupError, ValueError) as error:
        raise FeedError(f"{url} is no feed: {error}") from None
    if root.tag not in ROOTS:
        raise FeedError(f"{url} is no feed: it begins with {root.tag[:100]!r}")
    items = [item for place in ENTRIES for item in root.findall(place)]
    found = [read_entry(item, url) for item in items[:MOST]]
    return list({mark(entry): entry for entry in reversed(found)}.values())[::-1]


def refuse_hostile(content: bytes) -> None:
    """Raise ValueError if a document declares entities, or would become too large or deep."""
    depth = parts = 0

    def refuse(*_: object) -> None:
        raise ValueError("it declares entities")

    def deeper(_: str, attributes: Mapping[str, str]) -> None:
        nonlocal depth, parts
        depth += 1
        parts += 1 + len(attributes)
        if depth > DEEPEST:
            raise ValueError(f"it nests more than {DEEPEST} elements")
        if parts > MOST_PARTS:
            raise ValueError(f"it has more than {MOST_PARTS} elements and attributes")

    def higher(_: str) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = deeper, higher
    parser.Parse(content, True)  # noqa: FBT003 - takes no name


def read_entry(item: ET.Element, url: str) -> dict[str, str]:
    entry = {
        "feed": url,
        "id": text_of(item, "guid", f"{ATOM}id") or item.get(f"{RDF}about", ""),
        "title": text_of(item, "title", f"{ATOM}title", f"{RSS_1}title"),
        "link": text_of(item, "link", f"{RSS_1}link") or link_of(item),
        "date": text_of(item, "pubDate", f"{ATOM}updated", f"{ATOM}published", f"{DC}date"),
        "summary": text_of(
            item, "description", f"{ATOM}summary", f"{ATOM}content", f"{RSS_1}description"
        ),
    }
    whole = hashlib.sha256(json.dumps(entry).encode()).hexdigest()
    return {**entry, "id": entry["id"] or entry["link"] or whole}


def text_of(item: ET.Element, *tags: str) -> str:
    """Return the text of the first of these that has one, with that of the elements in it."""
    texts = ("".join(found.itertext()).strip() for tag in tags for found in item.findall(tag))
    return next(filter(None, texts), "")


def link_of(item: ET.Element) -> str:
    links = item.findall(f"{ATOM}link")
    found = [link.get("href", "") for link in links if link.get("rel", "alternate") == "alternate"]
    return next(iter(found), "")


# --- where entries go


def give(entry: Mapping[str, str], options: Options) -> None:
    # a name in the environment can hold no NUL, and not without end
    known_as = re.sub(r"[^!-~]", "_", entry["id"])[:1000]
    env = {**os.environ, "FETCH_FEED_ID": known_as}
    content, seconds = json.dumps(entry).encode(), options.program_timeout
    try:
        subprocess.run(options.program, input=content, env=env, timeout=seconds, check=True)
    except subprocess.CalledProcessError as error:
        raise FeedError(f"the program ended with {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise FeedError(f"the program did not end within {seconds} s") from None
    except OSError as error:
        raise FeedError(f"the program did not start: {error.strerror}") from None


def append(path: str, entry: Mapping[str, str]) -> None:
    """Append a whole line, or nothing; what a machine that went down left is no part of it."""
    line = json.dumps(entry).encode() + b"\n"
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with open(fd, "rb+", buffering=0) as file:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            try:
                write_all(file, [b"\n" if torn else b"", line])
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, size)
                raise
    except OSError as error:
        raise FeedError(f"{path}: {error.strerror}") from None


def write_all(file: Any, parts: Iterable[bytes]) -> None:
    content = b"".join(parts)
    while content:
        content = content[file.write(content) :]


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    url: str = ""
    program: tuple[str, ...] = ()
    program_timeout: int = 60
    file: str = ""
    largest: int = 10_000_000
    ca_file: str = ""


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    ("url", lambda o: o.url, "is empty; set the address of the feed"),
    (
        "url",
        lambda o: re.fullmatch("https?://[!-~]+", o.url),
        "must begin with https:// or http://, and hold no blank or umlaut; write them as %20",
    ),
    ("program", lambda o: o.program or o.file, "is empty; set it, or file"),
    ("program", lambda o: not (o.program and o.file), "must be empty if file is set"),
    (
        "program",
        lambda o: not o.program or shutil.which(o.program[0]),
        "is not there or cannot be started; give its whole path",
    ),
    ("program_timeout", lambda o: o.program_timeout > 0, "must be at least 1 second"),
    ("file", lambda o: not o.file or os.path.isabs(o.file), "must be a path from the root on"),
    ("largest", lambda o: o.largest > 0, "must be at least 1 byte"),
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
