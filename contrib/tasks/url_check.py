# /// script
# [tool.bgtasks]
# description = "Fail while a web page does not answer as it should"
# schedule = "every 5 min"
# timeout = "10 min"
# retries = 1
#
# [tool.bgtasks.options]
# urls = []              # ["https://example.org/"]
# status = 200
# text = ""              # must be in the first megabyte of the answer
# seconds = 10           # for the whole answer, with all redirects
# redirects = 5          # followed at most; 0: the first answer counts, set status to 301
# ca_file = ""           # certificate of a private CA; empty: those that this machine trusts
# ///
"""Look at web pages: copy or link this file into tasks.d, and set the options.

For pages that must answer differently, use a .toml for each. A certificate that is not trusted is a
problem, and so is a redirect from https to http. To hear of it only when it fails for some time,
set `notify_after`.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple

MOST = 1_000_000  # bytes in which the text is looked for


class CheckError(Exception):
    """A page does not answer as it should."""


def run(task: Any) -> str:
    options = read_options(task.options)
    problems, slowest = [], 0.0
    for number, url in enumerate(task.each(options.urls), start=1):
        began = time.monotonic()
        try:
            check(url, options)
        except (CheckError, OSError, ValueError, LookupError, http.client.HTTPException) as error:
            problems.append(f"{url}: {reason(error)}")
        took = time.monotonic() - began
        slowest = max(slowest, took)
        print(f"{url}: {took:.2f} s")
        task.add_volume(1)
        task.progress(number, len(options.urls))
    if problems:
        raise CheckError(f"{len(problems)} of {len(options.urls)}: {'; '.join(problems)}")
    return f"{task.volume} as they should be, the slowest in {slowest:.2f} s"


def reason(error: Exception) -> str:
    """Return what went wrong, on one line; urllib wraps it."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, ssl.SSLCertVerificationError):
        return inner.verify_message
    text = (isinstance(inner, OSError) and inner.strerror) or str(inner) or type(inner).__name__
    return " ".join(text.split())


def check(url: str, options: Options) -> None:
    context = ssl.create_default_context(cafile=options.ca_file or None)
    https = urllib.request.HTTPSHandler(context=context)
    opener = urllib.request.build_opener(https, Redirects(options.redirects))
    opener.addheaders = [("User-Agent", "bgtasks url_check")]
    with within(options.seconds), answered(opener, url) as answer:
        if answer.status != options.status:
            raise CheckError(f"answered {answer.status}, not {options.status}")
        content = answer.read(MOST)
        text = content.decode(answer.headers.get_content_charset("utf-8"), "replace")
    if options.text not in text:
        raise CheckError("does not hold the text")


def answered(opener: urllib.request.OpenerDirector, url: str) -> Any:
    """Return the answer; one that says that something is wrong is an answer, too."""
    try:
        return opener.open(url)
    except urllib.error.HTTPError as answer:
        return answer


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows so many redirects, by any of their codes, and none to where it is less safe."""

    max_redirections = max_repeats = 100  # counted here

    def __init__(self, most: int) -> None:
        self._left = most

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        del code, msg, headers
        self._left -= 1
        if self._left < 0:
            return None
        fp.close()  # else all of its body would be read, which may have no end
        if not newurl.startswith("https://" if req.type == "https" else ("http://", "https://")):
            raise CheckError(f"leads to {newurl[:200]}, which is less safe")
        return urllib.request.Request(newurl, headers=dict(req.headers))  # noqa: S310 - checked

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # as of Python 3.11


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


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    urls: tuple[str, ...] = ()
    status: int = 200
    text: str = ""
    seconds: int = 10
    redirects: int = 5
    ca_file: str = ""


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    ("urls", lambda o: o.urls, "is empty; name the pages to look at"),
    (
        "urls",
        lambda o: all(re.fullmatch("https?://[!-~]+", url) for url in o.urls),
        "must begin with https:// or http://, and hold no blank or umlaut; write them as %20",
    ),
    ("status", lambda o: 100 <= o.status < 600, "must be from 100 to 599"),
    ("seconds", lambda o: 0 < o.seconds <= 600, "must be from 1 to 600"),
    ("redirects", lambda o: o.redirects <= 20, "must be at most 20"),
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
