#!/usr/bin/env python3
"""The web side of bgtasks: wake it by a request, look at it, act. Copy it beside bgtasks.py.

`application` is a WSGI application; `python3 bgtasks_web.py [--port=8080] [--KEY=VALUE ...]` serves
it on loopback for a look, `python3 bgtasks_web.py --html=FILE` writes the status page as one file.
Nothing answers until the param file holds a `web_token`, or an administrator is registered.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import hmac
import html
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import bgtasks

PROGRAM, VERSION = bgtasks.__file__, bgtasks.__version__
MOST_BODY, MOST_QUERY, MOST_COOKIE = 4096, 1024, 8192  # other applications leave cookies too
SESSION_SECONDS, FREE_GUESSES, MOST_WAIT = 12 * 3600, 5, 900.0
SHORTEST_INTERVAL = 20.0  # seconds between two wake-ups
RANGES = {"6h": 6, "1d": 24, "3d": 72, "7d": 168}  # hours shown before now, and after
MOST_DRAWN, MOST_SLOTS, MOST_COUNTED = 3000, 60, 1000
GOOD = ("done", "nothing", "more", "running")
ACTIONS = {"request": "requested", "pause": "paused", "resume": "resumed", "clear": "cleared"}
ALWAYS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")


# -- requests and answers


class Answer(Exception):  # noqa: N818 - any answer may be raised, not only errors
    """What goes back to the browser."""

    def __init__(self, status: str, body: bytes = b"", kind: str = "", **headers: str) -> None:
        super().__init__(status)
        self.status, self.body, self.kind = status, body, kind or "text/html; charset=utf-8"
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


def said(status: str, found: object = None, **headers: str) -> Answer:
    """Return an answer in JSON; without anything found it says its own status."""
    body = json.dumps({"error": status[4:]} if found is None else found).encode() + b"\n"
    return Answer(status, body, "application/json", **headers)


class Request(NamedTuple):
    """A request within its limits."""

    method: str
    path: tuple[str, ...]  # its parts
    query: Mapping[str, str]
    form: Mapping[str, str]
    headers: Mapping[str, str]  # authorization, cookie
    address: str
    base: str  # where the application lies on the server, without a slash at the end
    secure: bool


def _text(environ: Mapping[str, Any], key: str) -> str:
    """Return as text what WSGI hands over byte by byte; what is no UTF-8 is replaced."""
    return str(environ.get(key, "")).encode("latin-1", "replace").decode("utf-8", "replace")


def read_request(environ: Mapping[str, Any]) -> Request:
    """Return what was asked for. Raises Answer where it is beyond all limits."""
    method, path = _text(environ, "REQUEST_METHOD"), _text(environ, "PATH_INFO")
    query, address = _text(environ, "QUERY_STRING"), _text(environ, "REMOTE_ADDR")[:64]
    headers = {key: _text(environ, f"HTTP_{key}") for key in ("AUTHORIZATION", "COOKIE")}
    if max(len(path), len(query)) > MOST_QUERY or len(headers["COOKIE"]) > MOST_COOKIE:
        raise said("431 Request Header Fields Too Large")
    parts = tuple(part for part in path.split("/") if part)
    base = quote("/" + _text(environ, "SCRIPT_NAME").strip("/")).rstrip("/")  # never //host
    secure = environ["wsgi.url_scheme"] == "https"
    body = _body(environ).decode("utf-8", "replace") if method == "POST" else ""
    try:
        return Request(method, parts, _pairs(query), _pairs(body), headers, address, base, secure)
    except ValueError as error:  # too many of them
        raise said("400 Bad Request", {"error": f"fields: {error}"}) from None


def _body(environ: Mapping[str, Any]) -> bytes:
    length = str(environ.get("CONTENT_LENGTH") or "0")
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise said("400 Bad Request")
    if int(length) > MOST_BODY:
        raise said("413 Content Too Large")
    return bytes(environ["wsgi.input"].read(int(length))) if int(length) else b""


def _pairs(text: str) -> dict[str, str]:
    return {key: values[-1] for key, values in parse_qs(text, max_num_fields=50).items()}


def want(method: str, request: Request) -> bool:
    """Return True, or raise 405 for a request by another method."""
    if request.method != method:
        raise said("405 Method Not Allowed", Allow=method)
    return True


# -- who asks


class Site(NamedTuple):
    """The installation as it is at one request."""

    settings: bgtasks.Settings
    store: bgtasks.Store
    clock: bgtasks.Clock
    arguments: Mapping[str, str]


def refuse_guesser(site: Site, address: str, *, count: bool) -> None:
    """Raise 429 for an address, or a crowd, that guessed wrong too often; count one guess more.
    In one transaction, so that of a thousand requests at once only the free ones get on."""
    now = site.clock.now()
    with site.store if count else nullcontext():
        for name, free in ((f"wrong:{address}", FREE_GUESSES), ("wrong", 20 * FREE_GUESSES)):
            guesses, last = json.loads(site.store.fact(name) or "[0, 0]")
            wait = min(2.0 ** min(guesses - free, 20), MOST_WAIT) if guesses >= free else 0.0
            if 0 <= now - last < wait:
                raise said("429 Too Many Requests", Retry_After=str(int(last + wait - now) + 1))
            value = json.dumps([1 if now - last > 2 * MOST_WAIT else guesses + 1, now])
            if count:
                site.store.put("fact", {"name": name, "value": value}, "name")


def has_password(site: Site, address: str, login: str, password: str) -> bool:
    """Tell if a login is that of an administrator; a wrong one is noted."""
    path = os.path.join(site.settings.state_dir, "locks", "login.lock")
    with open(bgtasks.append_to(path), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: each takes 16 MiB
        right = bgtasks.is_login(site.store.admins(), login, password)
    if not right:
        what = f"wrong login {bgtasks.shortened(login)!r}"
        site.store.note_event("", f"web {address}", site.clock.now(), what)
    return right


def require_token(site: Site, request: Request) -> None:
    """Raise 401 for whoever does not know the token, 429 for a guesser."""
    kind, _, given = request.headers["AUTHORIZATION"].partition(" ")
    if kind.lower() == "bearer" and 0 < len(given) <= MOST_QUERY:
        refuse_guesser(site, request.address, count=False)
        token = site.settings.web_token
        ours, theirs = (hashlib.sha256(text.encode()).digest() for text in (token, given.strip()))
        if hmac.compare_digest(ours, theirs) and token:  # takes as long whatever is wrong
            return
        refuse_guesser(site, request.address, count=True)
    raise said("401 Unauthorized", WWW_Authenticate='Bearer realm="bgtasks"')


def signed(site: Site, text: str) -> str:
    """Return a signature by a key that is made once and kept in the state."""
    key = site.store.fact("web_secret")
    if not key:
        with site.store:  # of two that make one at once, the second takes that of the first
            key = site.store.fact("web_secret") or secrets.token_hex(32)
            site.store.put("fact", {"name": "web_secret", "value": key}, "name")
    return hmac.new(bytes.fromhex(key), text.encode("utf-8", "replace"), "sha256").hexdigest()


def sealed(site: Site, text: str, login: str) -> str:
    """Return the signature of a session; logging out and a new password end all of a login's."""
    known, left = site.store.admins().get(login), site.store.fact(f"logout:{login}")
    return signed(site, f"{text} {known} {left}")


def session(site: Site, request: Request) -> tuple[str, str] | None:
    """Return the login of a session and its CSRF token, None without a valid session."""
    form = r"(?:^|;) *bgtasks=(((?:[0-9a-f]{2})+)\.([0-9]{1,12})\.[0-9a-f]{16})\.([0-9a-f]{64})\b"
    found = re.search(form, request.headers["COOKIE"])
    text, login, until, signature = found.groups() if found else ("", "", "0", "")
    name = bytes.fromhex(login).decode("utf-8", "replace")
    if not hmac.compare_digest(sealed(site, text, name), signature):
        return None
    if name not in site.store.admins() or int(until) < site.clock.now():
        return None
    return name, signed(site, f"csrf {text}")


# -- waking


def wake(site: Site, every: float = SHORTEST_INTERVAL) -> Answer:
    """Start a runner, unless one is at work or was within ``every`` s: its stdin is that lock."""
    path = os.path.join(site.settings.state_dir, "locks", "web.lock")
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    with open(lock, "w"):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return said("202 Accepted", {"started": False, "reason": "a runner is at work"})
        woken, now = os.fstat(lock), site.clock.now()
        if woken.st_size and 0 <= now - woken.st_mtime < every:
            return said("202 Accepted", {"started": False, "reason": "a runner was here just now"})
        python, out = sys.executable or "", subprocess.DEVNULL
        if not os.path.basename(python).startswith("python"):  # a server that embeds one
            python = os.path.join(sys.exec_prefix, "bin", "python3")
        argv = [python, os.path.realpath(__file__), f"--wake={signed(site, 'wake')}"]
        argv += [f"--{key}={value}" for key, value in site.arguments.items()]
        if site.settings.web_inline:
            argv += [f"--cron_max_execution_time={site.settings.web_max_execution_time}"]
        runner = subprocess.Popen(argv, stdin=lock, stdout=out, stderr=out, start_new_session=True)
        os.pwrite(lock, b"woken\n", 0)  # only now: one that could not start keeps nobody waiting
    if site.settings.web_inline:
        with suppress(subprocess.TimeoutExpired):  # a task that overruns goes on by itself
            runner.wait(site.settings.web_max_execution_time + 5)
    # who waits for it, so that it is no zombie; under CGI it outlives us, and init does
    with suppress(RuntimeError):  # without a thread the next Popen sees to it
        threading.Thread(target=runner.wait, daemon=True).start()
    return said("202 Accepted", {"started": True})


class WokenRunner(bgtasks.Runner):
    """A runner that gives back the lock on its stdin before it waits for what overran."""

    def _drain(self) -> None:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        super()._drain()


def run_ordered(order: str, settings: bgtasks.Settings) -> int:
    """Be the runner, if the application has ordered it; else whoever wakes must log in."""
    clock = bgtasks.Clock()
    with closing(bgtasks.Store(os.path.join(settings.state_dir, "bgtasks.db"))) as store:
        if not hmac.compare_digest(signed(Site(settings, store, clock, {}), "wake"), order):
            return 77
    with closing(bgtasks.open_for_work(settings, clock, trusted=True)) as store:
        notifier = bgtasks.Notifier(settings, store, clock)
        WokenRunner(settings, store, clock, "web", notifier.tell).wake_up()
        notifier.close()
    return 0


# -- acting, and the web service


def act(site: Site, name: str, action: str, by: str, form: Mapping[str, str]) -> str:
    """Do something to a task as somebody; return what was done. Raises Answer."""
    store, now, until = site.store, site.clock.now(), None
    if action not in (*ACTIONS, "kill") or not store.task(name):
        raise said("404 Not Found")
    if action == "pause":
        try:
            until = now + bgtasks.read_duration(form["for"]) if form.get("for") else None
        except ValueError as error:
            raise said("400 Bad Request", {"error": f"for: {error}"}) from None
        bgtasks.pause(store, name, by, now, until, bgtasks.shortened(form.get("note", ""), 200))
    elif action == "kill":
        if not bgtasks.ask_to_end(site.settings, store, name, by, now):
            raise said("409 Conflict", {"error": "it is not running"})
    else:
        getattr(bgtasks, action)(store, name, by, now)
    return ACTIONS.get(action, "told to end")


def api(site: Site, request: Request) -> Answer:
    """Answer the web service: the keys are those of the commands."""
    parts = request.path[1:]
    require_token(site, request)
    if len(parts) == 2 and want("POST", request):
        done = act(site, *parts, "web token", request.form)
        return said("200 OK", {"task": parts[0], "done": done})
    if parts == ("status",) and want("GET", request):
        return said("200 OK", bgtasks.status(site.settings, site.store, site.clock))
    if parts == ("history",) and want("GET", request):
        count = request.query.get("count", "20")
        if not (count.isascii() and count.isdigit() and 0 < int(count) <= MOST_COUNTED):
            raise said("400 Bad Request", {"error": f"count: 1 to {MOST_COUNTED}"})
        runs = site.store.history(request.query.get("task"), int(count))
        return said("200 OK", [bgtasks.run_row(run) for run in runs])
    raise said("404 Not Found")


# -- pages


def h(value: object) -> str:
    """Return text as it may stand in HTML, with all that steers something made visible."""
    return html.escape(bgtasks.visible(str(value)))


STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --dim: #57606a; --line: #d0d7de;
  --card: #f6f8fa; --good: #1a7f37; --bad: #cf222e; --warn: #8a5300;
  --link: #0550ae; --more: #6639ba }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --fg: #e6edf3; --dim: #9da7b3;
  --line: #3d444d; --card: #161b22; --good: #3fb950; --bad: #ff7b72; --warn: #d29922;
  --link: #79b8ff; --more: #bc8cff } }
* { box-sizing: border-box } p, ul { margin: .4rem 0 } a { color: var(--link) }
body { margin: 0; background: var(--bg); color: var(--fg); font: 15px/1.45 system-ui, sans-serif }
header, main { max-width: 75rem; margin: auto; padding: .7rem 1rem; align-items: center }
header { display: flex; flex-wrap: wrap; gap: 1rem; border-bottom: 1px solid var(--line) }
h1 { font-size: 1.25rem; margin: 0 } h2 { font-size: 1.05rem; margin: 1.4rem 0 .4rem }
.dim, .find span, ::placeholder { color: var(--dim); opacity: 1 }
.good { color: var(--good) } .warn { color: var(--warn) } .bad { color: var(--bad) }
table { border-collapse: collapse; width: 100% } th { color: var(--dim); font-weight: 600 }
th, td { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left }
td { vertical-align: top; white-space: nowrap }
.find { list-style: none; padding: 0; overflow-wrap: anywhere }
.find li { margin: .3rem 0; padding: .3rem .6rem; border-left: 4px solid var(--warn) }
.find .l2 { border-color: var(--bad) } .find li, pre, button, input { background: var(--card) }
pre { padding: .75rem; max-height: 32rem; overflow: auto; white-space: pre-wrap }
button, input { padding: .25rem .7rem; border: 1px solid var(--dim); border-radius: .3rem }
button, input { color: var(--fg); font: inherit } pre { overflow-wrap: anywhere }
header form, .acts, .acts form { display: inline-flex; flex-wrap: wrap; gap: .5rem }
.scroll { overflow-x: auto } td:last-child { white-space: normal; min-width: 12rem }
:focus-visible { outline: 3px solid var(--link); outline-offset: 1px }
.stale { outline: .3rem solid var(--bad); outline-offset: -.3rem }
.stale header { background: var(--bad); :not(button) { color: var(--bg) } }
.stale header .dim::after { content: " - out of date" } .lanes { display: flex }
.skip { position: absolute; left: -99rem } .skip:focus { position: static }
.lanes svg { flex: none; width: 980px } .scroll:focus-visible, pre { outline-offset: -3px }
.lanes ol { position: sticky; left: 0; flex: none; width: min(10rem, 27vw); margin: 0; z-index: 1;
  padding: 22px 0 0; background: var(--bg); list-style: none; font: 13px/24px sans-serif }
.lanes li { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
svg text { fill: var(--fg); font-size: 12px } svg .dim { fill: var(--dim) }
.lane { stroke: var(--line) } .planned { stroke: var(--dim) } .more { fill: var(--more) }
.now { stroke: var(--bad); stroke-width: 2 } .killed, .missed { fill: none; stroke: var(--warn) }
.done, .nothing { fill: var(--good) } .failed, .timed_out, .interrupted { fill: var(--bad) }
.running { fill: var(--link) } .run:is(:hover, :focus) .tip { display: block }
.tip { display: none; paint-order: stroke; stroke: var(--bg); stroke-width: 5px }
.run:is(:hover, :focus) :not(text) { stroke: var(--fg); stroke-width: 2 }
.key { width: 16px; height: 16px; vertical-align: -3px } .chart { max-width: 720px }
@media (max-width: 40rem) { :is(th, td):nth-child(n + 5):not(:last-child) { display: none } }
"""
# The page draws itself anew in place, and turns red when it is older than it promises.
SCRIPT = """
const page = document.body, every = () => page.dataset.every * 1000;
let fresh = document.forms.length ? Date.now() : page.dataset.made * 1000;  // that is a file

function draw(old, now) {  // what did not change keeps focus, selection and place
  if (old.isEqualNode(now)) return;
  if (now.data?.startsWith(old.data)) return old.appendData(now.data.slice(old.data.length));
  if (old.nodeName !== now.nodeName || now.data) return old.replaceWith(now);
  for (const name of old.getAttributeNames()) now.hasAttribute(name) || old.removeAttribute(name);
  for (const { name, value } of now.attributes) old.setAttribute(name, value);
  const were = [...old.childNodes], are = [...now.childNodes];
  were.slice(are.length).forEach(node => node.remove());
  are.forEach((node, i) => were[i] ? draw(were[i], node) : old.append(node));
}

async function again() {
  try {
    const answer = await fetch(location.href, { signal: AbortSignal.timeout(3 * every()) });
    if (!answer.ok) throw answer;
    const text = (await answer.text()).replace(/^.*?<body/s, "<body");
    const now = new DOMParser().parseFromString(text, "text/html").body;
    const focus = document.activeElement, href = focus.getAttribute("href");
    const near = focus.closest(".scroll") || page;
    for (const part of ["header", "main"]) draw(page.querySelector(part), now.querySelector(part));
    page.dataset.every = now.dataset.every;
    fresh = Date.now();
    if (href && document.activeElement.getAttribute("href") !== href)
      near.querySelector(`a[href="${href}"]`)?.focus({ preventScroll: true });
  } catch { }  // no such page: the server is gone, and this one turns red
  setTimeout(again, every());
}
for (const lanes of page.querySelectorAll(".lanes"))
  lanes.scrollLeft = (lanes.scrollWidth - lanes.clientWidth) / 2;
setTimeout(location.protocol === "file:" ? () => location.reload() : again, every());
setInterval(() => page.classList.toggle("stale", Date.now() - fresh > 3 * every()), 1000);
"""
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title} - bgtasks</title>
<style nonce="{page.nonce}">{style}</style><noscript><meta http-equiv="refresh" content="{every}0">
</noscript></head><body data-every="{every}" data-made="{now:.0f}">
<a class="skip" href="#content">To the content</a>
<header><h1>{home}</h1><span class="dim">as of {made}</span>{menu}</header>
<main id="content">{content}</main>
<script nonce="{page.nonce}">{script}</script></body></html>
"""


class Page(NamedTuple):
    """What a page is made of besides its content."""

    site: Site
    base: str
    login: str
    csrf: str
    nonce: str

    def answer(self, title: str, content: str, every: int = 999, status: str = "200 OK") -> Answer:
        """Return the whole page; every so many seconds it is drawn anew."""
        now, known = self.site.clock.now(), bool(self.login)
        home = f'<a href="{self.base}/">bgtasks</a>' if known else "bgtasks"
        menu = self.button("/wake", "Wake") + self.button("/logout", "Log out")
        values = {"title": h(title), "home": home, "menu": menu * known, "content": content}
        values.update(style=STYLE, script=SCRIPT, made=h(bgtasks.iso(now)))
        text = PAGE.format(page=self, every=every, now=now, **values)
        nonce = f"'nonce-{self.nonce}'"
        policy = f"default-src 'none'; style-src {nonce}; script-src {nonce}; connect-src 'self'; "
        policy += "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        return Answer(status, text.encode(), Content_Security_Policy=policy)

    def link(self, kind: str, what: object, content: str = "", more: str = "") -> str:
        """Return a link; in a static file it would lead nowhere, there is only what it shows."""
        content = content or h(what)
        if self.login:
            return f'<a href="{self.base}/{kind}/{quote(str(what))}"{more}>{content}</a>'
        return f'<g tabindex="0" role="img"{more}>{content}</g>' if more else content

    def button(self, path: str, text: str, fields: str = "") -> str:
        fields += f'<input type="hidden" name="csrf" value="{self.csrf}"><button>{h(text)}</button>'
        return f'<form method="post" action="{self.base}{path}">{fields}</form> '


def login_page(page: Page, wrong: str = "") -> Answer:
    content = f"""<h2>Log in</h2>{f'<p class="bad" role="alert">{h(wrong)}</p>' * bool(wrong)}
<form method="post" action="{page.base}/login">
<p><label>Administrator<br><input name="user" autocomplete="username" required></label></p>
<p><label>Password<br><input name="password" type="password" autocomplete="current-password"
required></label></p><button>Log in</button></form>"""
    return page.answer("Log in", content, status="401 Unauthorized" if wrong else "200 OK")


def scrolled(label: str, what: str, more: str = "") -> str:
    """Return what may be wider than the screen, to be moved by keyboard too."""
    return f'<div class="scroll{more}" tabindex="0" role="region" aria-label="{label}">{what}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    shown = f"<table><thead><tr>{text}</tr></thead><tbody>{body}</tbody></table>"
    return scrolled(f"Table: {head[0]}", shown)


def outcome(text: str | None) -> str:
    """Return an outcome with a sign beside its colour."""
    signs = {"done": "&#10003;", "nothing": "&#183;", "more": "&#8594;", "running": "&#9654;"}
    kind = "good" if text in GOOD else "bad"
    return f'<span class="{kind}">{signs.get(text, "&#10007;")} {h(text)}</span>' if text else ""


def status_page(page: Page, query: Mapping[str, str]) -> Answer:
    """Return the page for a look: is it alive, what is wrong, what runs, what comes."""
    site, now = page.site, page.site.clock.now()
    found = bgtasks.status(site.settings, site.store, site.clock)
    shown = [task for task in found["tasks"] if task["state"] != "ignored"]
    running = [task for task in shown if task["running"]]
    known = sorted((t["next_run_at"], t["name"]) for t in shown if t["next_run_at"])[:5]
    coming = ", ".join(f"{page.link('task', n)} {h(bgtasks.when(at, now))}" for at, n in known)
    span = query["range"] if query.get("range") in RANGES else "6h"
    links = {key: f'<a href="{page.base}/?range={key}">{key}</a>' for key in RANGES}
    ranges = " ".join({**links, span: f"<strong>{span}</strong>"}.values()) * bool(page.login)
    head = ("Task", "State", "Outcome", "Next", "Last", "Took", "Runs", "Failed", "About")
    cells = (_task_cells(page, task, now) for task in found["tasks"])
    content = (
        f"{_alive(page, found, now)}{_running(page, running, now)}"
        f"<h2>What comes next</h2><p>{coming or 'Nothing is planned.'}</p>"
        f"<h2>Timeline</h2><p>{ranges}</p>{timeline(page, shown, RANGES[span] * 3600.0, now)}"
        f'<h2 id="tasks">Tasks</h2>{table(head, cells)}'
    )
    return page.answer("Status", content, every=(5 if running else 30) if page.login else 300)


def _alive(page: Page, found: Mapping[str, Any], now: float) -> str:
    last, woken, items = found["last_wakeup"], "Never woken.", ""
    if last:
        moment = bgtasks.when(last["started_at"], now)
        woken = f"Last wake-up {moment} by {last['user']}, {last['result']}."
    names = {task["name"] for task in found["tasks"] if task["state"] != "ignored"}
    wrong = [*bgtasks.judge_tasks(found["tasks"], now)]
    wrong += bgtasks.judge_wakeups(page.site.settings, page.site.store, now)
    for level, about, text, way in sorted(wrong, key=lambda f: (-f.level, f.about)):
        who = page.link("task", about) if about in names else h(about)
        what = f"<strong>{('', 'Warning', 'Critical')[level]}: {who}</strong> {h(text)}"
        items += f'<li class="l{level}">{what} <span>&#8594; {h(way)}</span></li>' * bool(level)
    paused = '<p class="warn"><strong>Maintenance: nothing starts.</strong></p>'
    woken = f"<p>{h(found['node'])}, bgtasks {VERSION}. {h(woken)}</p>"
    verdict = f'<ul class="find">{items}</ul>' if items else '<p class="good">All is well.</p>'
    return f"{woken}{paused * bool(found['maintenance'])}<h2>What is wrong</h2>{verdict}"


def _running(page: Page, running: Sequence[Mapping[str, Any]], now: float) -> str:
    rows, bar = "", r'\g<0> <progress value="\1" max="\2" aria-label="progress"></progress>'
    for task in running:
        since = h(bgtasks.when(task["last_started_at"], now))
        done = re.sub("([0-9]{1,15})/([1-9][0-9]{0,14})", bar, h(task["progress"] or ""))
        rows += f"<li>{page.link('task', task['name'])} since {since} {done}</li>"
    return f"<h2>At work now</h2>{f'<ul>{rows}</ul>' if rows else '<p>Nothing.</p>'}"


def _task_cells(page: Page, task: Mapping[str, Any], now: float) -> Sequence[str]:
    name, state = task["name"], task["state"]
    word = f'<b class="warn">{state}</b>' if state in ("broken", "missing", "paused") else state
    moments = [h(bgtasks.when(task[key], now)) for key in ("next_run_at", "last_started_at")]
    first = [h(name) if state == "ignored" else page.link("task", name), word]
    last = [bgtasks.duration(task["last_seconds"]), task["runs"] or "", task["failures"] or ""]
    last.append(task["reason"] or task["description"])
    return [*first, outcome(task["last_outcome"]), *moments, *map(h, last)]


# -- pictures, drawn on the server

# of the outcomes, around 0, 0, so that colour is not the only sign
PATHS = """done:M-2-6h4v12h-4z nothing:M-4-1h8v2h-8z more:M-3-6l7,6l-7,6z killed:M-4-4h8v8h-8z
running:M-5-6h10l-10,12h10z failed:M-6-6h3l3,4l3-4h3l-4,6l4,6h-3l-3-4l-3,4h-3l4-6z planned:M0-4v8
timed_out:M0-7l6,12h-12z interrupted:M0-7l6,7l-6,7l-6-7z missed:M-4,0a4,4,0,1,1,0,.1z"""
SHAPES: dict[str, str] = dict(re.findall(r"(\w+):(\S+)", PATHS))


def timeline(page: Page, tasks: Sequence[Mapping[str, Any]], around: float, now: float) -> str:
    """Return an SVG of the runs in the seconds before now, and of the slots after it."""
    left, right, begin, height = 8, 972, now - around, 30 + 24 * len(tasks)
    lanes = {task["name"]: 34 + i * 24 for i, task in enumerate(tasks)}

    def x(moment: float) -> float:
        return round(left + (right - left) * (max(moment, begin) - begin) / (2 * around), 1)

    path = "".join(f"M{left} {y}H{right}" for y in lanes.values())
    parts = [f'<path class="lane" d="{path}"/><path class="now" d="M{x(now)} 16V{height}"/>']
    for i, anchor in enumerate(("start", *["middle"] * 5, "end")):
        moment = begin + i * around / 3
        text = datetime.fromtimestamp(moment).astimezone().strftime("%a %H:%M")
        place = f'x="{x(moment)}" y="12" text-anchor="{anchor}"'
        parts.append(f'<text class="dim" {place}>{text}</text>')
    for row in page.site.store.tasks():
        if row["name"] in lanes and row["file"] and row["enabled"] and not row["error"]:
            slots, y = _slots(page.site, row, now + around), lanes[row["name"]]
            path = "".join(f"M{x(moment)} {y - 4}v8" for moment in slots)
            path += f"m0-4H{right}" * (len(slots) == MOST_SLOTS)  # and so on
            parts.append(f'<path class="planned" d="{path}"/>' * bool(path))
    runs = page.site.store.runs_since(begin, MOST_DRAWN)
    for run in sorted(runs, key=lambda run: run["outcome"] not in GOOD):  # what failed is on top
        if run["task"] in lanes:
            at, y = x(run["started_at"]), lanes[run["task"]]
            parts.append(_run_mark(page, run, y, at, x(run["ended_at"] or now) - at, now))
    names = "".join(f'<li title="{h(name)}">{h(name)}</li>' for name in lanes)
    start = f'<svg viewBox="0 0 980 {height}" role="group" aria-label="Runs and planned slots">'
    drawn = scrolled("Timeline", f"<ol>{names}</ol>{start}{''.join(parts)}</svg>", " lanes")
    note = f"<p>Only the newest {MOST_DRAWN} runs are drawn.</p>" * (len(runs) == MOST_DRAWN)
    start = '<svg class="key" viewBox="-8 -8 16 16" aria-hidden="true"><path class='
    keys = " ".join(f'{start}"{k}" d="{d}"/></svg>&#160;{k}' for k, d in SHAPES.items())
    past = '<a class="skip" href="#tasks">Past the timeline</a>'
    return f'{past}{drawn}{note}<p class="dim">{keys}</p>'


def _run_mark(page: Page, run: bgtasks.Row, y: int, at: float, wide: float, now: float) -> str:
    kind, took = run["outcome"], bgtasks.duration((run["ended_at"] or now) - run["started_at"])
    moment, side = bgtasks.when(bgtasks.iso(run["started_at"]), now), "end" if at > 490 else "start"
    label = h(f"{run['task']}: {kind}, {moment}, {took}")
    bar = f'<rect class="{kind}" x="{at}" y="{y - 3}" width="{wide:.1f}" height="6"/>' * (wide > 3)
    mark = f'<path class="{kind}" transform="translate({at} {y})" d="{SHAPES[kind]}"/>'
    tip = f'<text class="tip" x="{at}" y="{y - 9}" text-anchor="{side}">{label}</text>'
    return page.link("run", run["id"], bar + mark + tip, f' class="run" aria-label="{label}"')


def _slots(site: Site, row: bgtasks.Row, until: float) -> list[float]:
    """Return the next slots of a task, up to a limit."""
    settings, moment, found = bgtasks.task_from(row).settings, row["next_run_at"], list[float]()
    schedule = bgtasks.schedule_of(settings, site.settings, row["name"], row["anchor_at"])
    while moment is not None and moment <= until and len(found) < MOST_SLOTS:
        found.append(moment)
        moment = schedule.next_after(moment)
    return found


def durations(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a small chart of how long the last runs took, the newest at the right."""
    known = [(run, run["ended_at"] - run["started_at"]) for run in runs[::-1] if run["ended_at"]]
    longest = max((seconds for _, seconds in known), default=0.0) or 1.0
    paths = (f"M{i * 12} 60V{58 - 56 * s / longest:.0f}h9V60z" for i, (_, s) in enumerate(known))
    bars = "".join(f'<path class="{run["outcome"]}" d="{p}"/>' for (run, _), p in zip(known, paths))
    label = f"The last {len(known)} runs, the newest last, at most {bgtasks.duration(longest)}"
    start = f'<svg class="chart" viewBox="0 0 720 60" role="img" aria-label="{label}">'
    return f'<p class="dim">{label}</p>{start}{bars}</svg>'


def task_page(page: Page, name: str) -> Answer:
    site, now = page.site, page.site.clock.now()
    rows = bgtasks.task_rows(site.settings, site.store, now)
    task = next((row for row in rows if row["name"] == name), None)
    if task is None:
        raise said("404 Not Found")
    said_of = bgtasks.explain(site.settings, site.store, task, now, now)["sentences"]
    runs = site.store.history(name, 60)
    here = f"/task/{quote(name)}"
    note = '<label>for <input name="for" size="6" placeholder="2 h"></label> '
    acts = page.button(f"{here}/request", "Run at the next look")
    acts += page.button(f"{here}/pause", "Pause", note) * (task["state"] != "paused")
    acts += page.button(f"{here}/resume", "Resume") * (task["state"] == "paused")
    acts += page.button(f"{here}/kill", "End its run") * task["running"]
    acts += page.button(f"{here}/clear", "Seen: clear")
    why = "".join(f"<li>{h(text[:1].upper())}{h(text[1:])}.</li>" for text in said_of)
    content = (
        f"<h2>{h(name)}</h2><p>{h(task['description'])}</p><div class='acts'>{acts}</div>"
        f"{_running(page, [task], now) if task['running'] else ''}"
        f"<h2>Why it ran, or did not</h2><ul>{why}</ul>"
        f"<h2>How long it took</h2>{durations(runs)}<h2>History</h2>{_history(page, runs, now)}"
    )
    return page.answer(name, content, every=5 if task["running"] else 30)


def _history(page: Page, runs: Sequence[Mapping[str, Any]], now: float) -> str:
    rows: list[Sequence[str]] = []
    for run in runs:
        started = bgtasks.when(bgtasks.iso(run["started_at"]), now)
        took = bgtasks.duration(run["ended_at"] - run["started_at"]) if run["ended_at"] else ""
        volume = "" if run["volume"] is None else run["volume"]
        first = (page.link("run", run["id"]), h(started), h(took), outcome(run["outcome"]))
        about = bgtasks.joined(run["reason"], run["message"])
        rows.append((*first, h(volume), h(run["trigger"]), h(about)))
    head = ("Run", "Started", "Took", "Outcome", "Volume", "Trigger", "About")
    return table(head, rows)


def run_page(page: Page, number: str) -> Answer:
    site, now = page.site, page.site.clock.now()
    run = site.store.run(int(number)) if re.fullmatch("[0-9]{1,18}", number) else None
    if not run:
        raise said("404 Not Found")
    output, every = run["output"], 999
    if run["outcome"] == bgtasks.RUNNING:
        live = os.path.join(site.settings.state_dir, "runs", run["live"])
        output, every = bgtasks.read_output(live, site.settings.secrets), 5
    text = "\n".join(bgtasks.visible(line) for line in output.expandtabs().splitlines())
    content = (
        f"<h2>Run {run['id']} of {page.link('task', run['task'])}</h2>{_history(page, [run], now)}"
        f'<h2>What it printed</h2><pre tabindex="0">{html.escape(text) or "nothing"}</pre>'
    )
    return page.answer(f"Run {run['id']}", content, every=every)


# -- paths


def pages(site: Site, request: Request) -> Answer:
    """Answer what a browser asks for; without a session that is the login."""
    found, now = session(site, request), site.clock.now()
    login, csrf = found or ("", "")
    page = Page(site, request.base, login, csrf, secrets.token_urlsafe(16))
    path, home = request.path, request.base + "/"
    if path == ("login",) and request.method == "POST":
        refuse_guesser(site, request.address, count=True)
        user, password = (request.form.get(key, "") for key in ("user", "password"))
        if not has_password(site, request.address, user, password):
            return login_page(page, "This is not the login of an administrator.")
        forget = "UPDATE fact SET value = '[0, 0]' WHERE name IN (?, ?)"
        site.store.execute(forget, (f"wrong:{request.address}", "wrong"))
        text = f"{user.encode().hex()}.{now + SESSION_SECONDS:.0f}.{secrets.token_hex(8)}"
        cookie = f"bgtasks={text}.{sealed(site, text, user)}; Path={home}; HttpOnly"
        cookie += "; SameSite=Strict" + "; Secure" * request.secure
        return Answer("303 See Other", Location=home, Set_Cookie=cookie)
    if found is None:
        return login_page(page, "You are not logged in." * (request.method == "POST"))
    if request.method == "POST":
        given = request.form.get("csrf", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, csrf.encode()):
            raise said("403 Forbidden", {"error": "the form is too old; load the page again"})
        if path == ("wake",):
            wake(site)
        elif path == ("logout",):
            site.store.put("fact", {"name": f"logout:{login}", "value": str(now)}, "name")
        elif len(path) == 3 and path[0] == "task":
            act(site, path[1], path[2], f"web {login}", request.form)
            home += f"task/{quote(path[1])}"
        else:
            raise said("404 Not Found")
        return Answer("303 See Other", Location=home)
    if path in ((), ("login",)):
        return status_page(page, request.query)
    kinds = {"task": task_page, "run": run_page}
    if len(path) == 2 and path[0] in kinds:
        return kinds[path[0]](page, path[1])
    raise said("404 Not Found")


def answered(site: Site, request: Request) -> Answer:
    method, path = request.method, request.path
    if path == ("pixel.gif",) and method == "GET" and site.settings.web_pixel:
        wake(site, max(SHORTEST_INTERVAL, site.settings.web_interval))
        return Answer("200 OK", GIF, "image/gif")
    if not (site.settings.web_token or site.store.admins()):  # nobody could show who he is
        raise said("404 Not Found")
    if method not in ("GET", "POST"):
        raise said("405 Method Not Allowed", Allow="POST" if path[:1] == ("wake",) else "GET, POST")
    if path[:1] == ("wake",) and "csrf" not in request.form:
        if method == "GET" and len(path) == 2 and site.settings.web_allow_get:
            request = request._replace(headers={"AUTHORIZATION": f"Bearer {path[1]}"})
        elif want("POST", request) and len(path) > 1:
            raise said("404 Not Found")
        require_token(site, request)
        return wake(site)
    if path[:1] == ("api",):
        return api(site, request)
    if path == ("metrics",) and want("GET", request):
        require_token(site, request)
        lines = bgtasks.metric_lines(bgtasks.status(site.settings, site.store, site.clock))
        return Answer("200 OK", "\n".join([*lines, ""]).encode(), "text/plain; version=0.0.4")
    if path == ("pixel.gif",) or not site.store.admins():
        raise said("404 Not Found")
    return pages(site, request)


class Application:
    """The WSGI application (PEP 3333) for the installation that ``arguments`` name."""

    def __init__(self, **arguments: str) -> None:
        file = os.environ.get("BGTASKS_PARAM_FILE", "")
        self._arguments = {**({"param_file": file} if file else {}), **arguments}

    def __call__(self, environ: Mapping[str, Any], start: Callable[..., Any]) -> list[bytes]:
        try:
            answer = self._answer(environ)
        except Answer as raised:
            answer = raised
        except Exception:  # noqa: BLE001 - who asks learns not why; the server's log does
            traceback.print_exc()
            answer = said("503 Service Unavailable", Retry_After="30")
        headers = {"Content-Type": answer.kind, "Content-Length": str(len(answer.body))}
        start(answer.status, list({**ALWAYS, **headers, **answer.headers}.items()))
        return [b"" if environ.get("REQUEST_METHOD") == "HEAD" else answer.body]

    def _answer(self, environ: Mapping[str, Any]) -> Answer:
        settings, clock = bgtasks.read_settings(self._arguments, PROGRAM), bgtasks.Clock()
        bgtasks.refuse_wrong_user(settings.state_dir)
        path = os.path.join(settings.state_dir, "bgtasks.db")
        if not os.path.exists(path):
            if not (settings.web_token or settings.web_pixel):
                raise said("404 Not Found")
            bgtasks.open_store(settings.state_dir).close()  # the web is all that ever wakes it
        with closing(bgtasks.Store(path, timeout=1.0)) as store:
            site = Site(settings, store, clock, self._arguments)
            return answered(site, read_request(environ))


application = Application()


def write_page(file: str, settings: bgtasks.Settings) -> int:
    """Write the status page as one static file, for hosts that only serve files."""
    with closing(bgtasks.open_for_reading(settings)) as store:
        site = Site(settings, store, bgtasks.Clock(), {})
        answer = status_page(Page(site, "", "", "", "page"), {})
    with open(f"{file}.new", "wb") as written:
        written.write(answer.body)
    os.replace(f"{file}.new", file)
    return 0


def serve(port: int, arguments: Mapping[str, str]) -> int:
    from wsgiref import simple_server

    simple_server.ServerHandler.server_software = "bgtasks"  # not the version of Python
    with simple_server.make_server("127.0.0.1", port, Application(**arguments)) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        # wsgiref takes an exception within a request for one of the application, and goes on
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        server.serve_forever()
    return 0


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, exit_on_error=False)
    parser.add_argument("--port", type=int, default=8080, help="where (8080)")
    parser.add_argument("--html", metavar="FILE", help="write the status page as one file instead")
    parser.add_argument("--wake", help=argparse.SUPPRESS)
    try:
        given, rest = parser.parse_known_args(words)
        arguments = bgtasks.split_arguments(rest)[3]
        settings = bgtasks.read_settings(arguments, PROGRAM)
        if given.wake:
            os.umask(0o077)
            return run_ordered(given.wake, settings)
        return write_page(given.html, settings) if given.html else serve(given.port, arguments)
    except (bgtasks.BgtasksError, argparse.ArgumentError, OSError) as error:
        print(f"bgtasks_web: {bgtasks.visible(str(error))}", file=sys.stderr)
        return getattr(error, "exit_code", 74 if isinstance(error, OSError) else 64)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
