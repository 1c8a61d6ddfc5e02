#!/usr/bin/env python3
"""The web side of bgtasks: wake it by a request, look at it, act. Copy it beside bgtasks.py.

`application` is a WSGI application; `python3 bgtasks_web.py [--port=8080] [--KEY=VALUE ...]` serves
it on loopback for a look, `python3 bgtasks_web.py --html=FILE` writes the status page as one file.
Nothing answers until the param file holds a `web_token` of at least 32 characters, or an
administrator is registered. README.md beside this file has the paths and the entries for hosts.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import html
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import traceback
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import bgtasks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

PROGRAM = bgtasks.__file__
MOST_BODY, MOST_QUERY, MOST_COOKIE = 4096, 1024, 8192  # other applications leave cookies too
SESSION_SECONDS = 12 * 3600
FREE_GUESSES, MOST_WAIT = 5, 900.0
SHORTEST_INTERVAL = 20.0  # seconds between two wake-ups
RANGES = {"6h": 6, "1d": 24, "3d": 72, "7d": 168}  # hours shown before now, and after
MOST_DRAWN = 3000
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
        self.status, self.body, self.kind = status, body, kind or "text/plain; charset=utf-8"
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


def read_request(environ: Mapping[str, Any]) -> Request:
    """Return what was asked for. Raises Answer where it is beyond all limits."""
    method, path = str(environ.get("REQUEST_METHOD", "")), str(environ.get("PATH_INFO", ""))
    query = str(environ.get("QUERY_STRING", ""))
    headers = {key: str(environ.get(f"HTTP_{key}", "")) for key in ("AUTHORIZATION", "COOKIE")}
    if max(len(path), len(query)) > MOST_QUERY or len(headers["COOKIE"]) > MOST_COOKIE:
        raise said("431 Request Header Fields Too Large")
    text = path.encode("latin-1", "replace").decode("utf-8", "replace")
    parts = tuple(part for part in text.split("/") if part)
    address, secure = (
        str(environ.get("REMOTE_ADDR", ""))[:64],
        environ["wsgi.url_scheme"] == "https",
    )
    base = quote(str(environ.get("SCRIPT_NAME", "")).rstrip("/"))
    body = _body(environ).decode("utf-8", "replace") if method == "POST" else ""
    with said_if_bad("fields"):
        return Request(method, parts, _pairs(query), _pairs(body), headers, address, base, secure)


def _body(environ: Mapping[str, Any]) -> bytes:
    length = str(environ.get("CONTENT_LENGTH") or "0")
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise said("400 Bad Request")
    if int(length) > MOST_BODY:
        raise said("413 Content Too Large")
    return bytes(environ["wsgi.input"].read(int(length))) if int(length) else b""


def _pairs(text: str) -> dict[str, str]:
    return {key: values[-1] for key, values in parse_qs(text, max_num_fields=50).items()}


@contextmanager
def said_if_bad(what: str) -> Generator[None, None, None]:
    """Turn a ValueError into a 400 that names what is wrong."""
    try:
        yield
    except ValueError as error:
        raise said("400 Bad Request", {"error": f"{what}: {error}"}) from None


# -- who asks


class Site(NamedTuple):
    """The installation as it is at one request."""

    settings: bgtasks.Settings
    store: bgtasks.Store
    clock: bgtasks.Clock
    arguments: Mapping[str, str]


def count_guess(site: Site, address: str) -> None:
    """Count a guess before it is looked at. Raises 429 for an address, or a crowd, with too many.

    Both in one transaction: of a thousand requests at once no more than the free ones get on."""
    now = site.clock.now()
    with site.store:
        for name, free in ((f"wrong:{address}", FREE_GUESSES), ("wrong", 20 * FREE_GUESSES)):
            count, last = json.loads(site.store.fact(name) or "[0, 0]")
            wait = min(2.0 ** min(count - free, 20), MOST_WAIT) if count >= free else 0.0
            if 0 <= now - last < wait:
                raise said("429 Too Many Requests", Retry_After=str(int(last + wait - now) + 1))
            count = 0 if now - last > 2 * MOST_WAIT else count
            value = json.dumps([count + 1, now])
            site.store.put("fact", {"name": name, "value": value}, "name")


def forget_guesses(site: Site, address: str) -> None:
    with site.store:
        for name in (f"wrong:{address}", "wrong"):
            site.store.put("fact", {"name": name, "value": "[0, 0]"}, "name")


def has_token(site: Site, given: str) -> bool:
    """Tell if a token is ours, in a time that does not depend on what is wrong with it."""
    ours, theirs = (
        hashlib.sha256(text.encode("utf-8", "replace")).digest()
        for text in (site.settings.web_token, given)
    )
    return hmac.compare_digest(ours, theirs) and bool(site.settings.web_token)


def has_password(site: Site, address: str, login: str, password: str) -> bool:
    """Tell if a login is that of an administrator; an unknown one takes as long."""
    admins = site.store.admins()
    known = admins.get(login) or f"scrypt${bgtasks.SCRYPT}${'00' * 16}${'00' * 64}"
    _, n, r, p, salt, _ = known.split("$")
    with open(os.path.join(site.settings.state_dir, "locks", "login.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: each takes 16 MiB
        found = bgtasks.hashed(password, salt, f"{n}${r}${p}")
    if hmac.compare_digest(found, known) and login in admins:
        return True
    what = f"wrong login {bgtasks.shortened(login)!r}"
    site.store.note_event("", f"web {address}", site.clock.now(), what)
    return False


def require_token(site: Site, request: Request) -> None:
    """Raise 401 for whoever does not know the token, 429 for a guesser."""
    kind, _, given = request.headers["AUTHORIZATION"].partition(" ")
    if kind.lower() == "bearer" and 0 < len(given) <= MOST_QUERY:
        count_guess(site, request.address)
        if has_token(site, given.strip()):
            forget_guesses(site, request.address)
            return
    raise said("401 Unauthorized", WWW_Authenticate='Bearer realm="bgtasks"')


def signed(site: Site, text: str) -> str:
    """Return a signature by a key that is made once and kept in the state."""
    key = site.store.fact("web_secret")
    if not key:
        site.store.put("fact", {"name": "web_secret", "value": secrets.token_hex(32)}, "name")
        key = site.store.fact("web_secret")
    return hmac.new(bytes.fromhex(key), text.encode("utf-8", "replace"), "sha256").hexdigest()


def session(site: Site, request: Request) -> tuple[str, str] | None:
    """Return the login of a session and its CSRF token, None without a valid session."""
    cookies = [part.strip() for part in request.headers["COOKIE"].split(";")]
    ours = next((part[8:] for part in cookies if part.startswith("bgtasks=")), "")
    text, _, signature = ours.rpartition(".")
    if not text or not hmac.compare_digest(signed(site, text).encode(), signature.encode()):
        return None
    login, until, _ = text.split(".")
    name = bytes.fromhex(login).decode()
    if int(until) < site.clock.now() or name not in site.store.admins():
        return None
    return name, signed(site, f"csrf {text}")


# -- waking


def wake(site: Site, every: float = SHORTEST_INTERVAL) -> Answer:
    """Start a runner in a session of its own, unless one is at work or was within ``every`` s.

    It inherits the lock that says so, and an order that nobody else can sign."""
    path = os.path.join(site.settings.state_dir, "locks", "web.lock")
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    with open(lock, "w"):
        woken, now = os.fstat(lock), site.clock.now()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return said("202 Accepted", {"started": False, "reason": "a runner is at work"})
        if woken.st_size and 0 <= now - woken.st_mtime < every:
            return said("202 Accepted", {"started": False, "reason": "a runner was here just now"})
        os.pwrite(lock, b"woken\n", 0)
        order, none = f"{now:.0f}", subprocess.DEVNULL
        command = [_python(), os.path.realpath(__file__), f"--wake={order}.{signed(site, order)}"]
        command += [f"--{key}={value}" for key, value in site.arguments.items()]
        runner = subprocess.Popen(
            command, stdin=none, stdout=none, stderr=none, start_new_session=True, pass_fds=[lock]
        )
    if site.settings.web_inline:
        with suppress(subprocess.TimeoutExpired):  # a task that overruns goes on by itself
            runner.wait(site.settings.web_max_execution_time + 5)
    # who waits for it, so that it is no zombie; under CGI it outlives us, and init does
    threading.Thread(target=runner.wait, daemon=True).start()
    return said("202 Accepted", {"started": True})


def _python() -> str:
    """Return the interpreter; a web server that embeds one may call itself that."""
    if os.path.basename(sys.executable or "").startswith("python"):
        return sys.executable
    return os.path.join(sys.exec_prefix, "bin", "python3")


def run_ordered(order: str, arguments: Mapping[str, str]) -> int:
    """Be the runner, if the order was signed within the last minute."""
    settings, clock = bgtasks.read_settings(arguments, PROGRAM), bgtasks.Clock()
    made, _, signature = order.partition(".")
    with closing(bgtasks.Store(os.path.join(settings.state_dir, "bgtasks.db"))) as store:
        right = hmac.compare_digest(signed(Site(settings, store, clock, {}), made), signature)
    if not right or abs(clock.now() - float(made)) > 60:
        return 77
    if settings.web_inline:
        seconds = {"cron_max_execution_time": settings.web_max_execution_time}
        settings = settings._replace(values={**settings.values, **seconds})
    with closing(bgtasks.open_for_work(settings, clock, trusted=True)) as store:
        notifier = bgtasks.Notifier(settings, store, clock)
        bgtasks.Runner(settings, store, clock, "web", notifier.tell).wake_up()
        notifier.close()
    return 0


# -- acting, and the web service


def act(site: Site, name: str, action: str, by: str, form: Mapping[str, str]) -> str:
    """Do something to a task as somebody; return what was done. Raises Answer."""
    store, now, until = site.store, site.clock.now(), None
    if action not in (*ACTIONS, "kill") or not store.task(name):
        raise said("404 Not Found")
    if action == "pause":
        with said_if_bad("for"):
            until = now + bgtasks.read_duration(form["for"]) if form.get("for") else None
        bgtasks.pause(store, name, by, now, until, bgtasks.shortened(form.get("note", ""), 200))
    elif action == "kill":
        if not bgtasks.ask_to_end(site.settings, store, name, by, now):
            raise said("409 Conflict", {"error": "it is not running"})
    else:
        simple = {"resume": bgtasks.resume, "request": bgtasks.request, "clear": bgtasks.clear}
        simple[action](store, name, by, now)
    return ACTIONS.get(action, "told to end")


def api(site: Site, request: Request) -> Answer:
    """Answer the web service: the keys are those of the commands."""
    parts = request.path[1:]
    require_token(site, request)
    if request.method == "POST" and len(parts) == 2:
        done = act(site, *parts, "web token", request.form)
        return said("200 OK", {"task": parts[0], "done": done})
    if request.method != "GET":
        raise said("404 Not Found")
    if parts == ("status",):
        return said("200 OK", bgtasks.status(site.settings, site.store, site.clock))
    if parts == ("history",):
        count = request.query.get("count", "20")
        if not (count.isascii() and count.isdigit() and 0 < int(count[:6]) <= 10_000):
            raise said("400 Bad Request", {"error": "count: 1 to 10000"})
        runs = site.store.history(request.query.get("task"), int(count))
        return said("200 OK", [bgtasks.run_row(run) for run in runs])
    raise said("404 Not Found")


# -- pages


def h(value: object) -> str:
    """Return text as it may stand in HTML, with all that steers something made visible."""
    return html.escape(bgtasks.visible(str(value)))


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#57606a;--line:#d0d7de;--card:#f6f8fa}
:root{--good:#1a7f37;--bad:#cf222e;--warn:#8a5300;--link:#0550ae;--more:#6639ba}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--dim:#9da7b3;--line:#3d444d;
--card:#161b22;--good:#3fb950;--bad:#ff7b72;--warn:#d29922;--link:#79b8ff;--more:#bc8cff}}*{
box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg)}body{
font:16px/1.45 system-ui,sans-serif}header,main,footer{max-width:75rem;margin:auto;padding:1rem}
header{display:flex;gap:1rem;align-items:baseline;flex-wrap:wrap}h1{font-size:1.25rem;margin:0}h2{
font-size:1.05rem;margin:1.5rem 0 .5rem}a{color:var(--link)}.dim,footer{color:var(--dim)}.bad{
color:var(--bad)}.warn{color:var(--warn)}.good{color:var(--good)}.scroll{overflow-x:auto}table{
border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:left}th,td{
border-bottom:1px solid var(--line);vertical-align:top}th{color:var(--dim);font-weight:600}.find{
list-style:none;padding:0}.find li{padding:.4rem .6rem;margin:.3rem 0;background:var(--card)}
.find li{border-left:4px solid var(--warn)}.find .l2{border-color:var(--bad)}progress{width:8rem}
pre{background:var(--card);padding:.75rem;overflow:auto;max-height:32rem;white-space:pre-wrap;
overflow-wrap:anywhere}button,input{font:inherit;padding:.35rem .7rem;border:1px solid var(--dim);
border-radius:.3rem;background:var(--card);color:var(--fg)}form{display:inline}:focus-visible{
outline:3px solid var(--link);outline-offset:1px}.stale{background:var(--bad)}
.stale :is(header,main,footer){background:var(--bg)}.skip{position:absolute;left:-99rem}
.skip:focus{position:static}svg{min-width:44rem;width:100%;display:block}svg text{fill:var(--fg);
font-size:12px}svg .dim{fill:var(--dim)}.lane{stroke:var(--line)}.plan{stroke:var(--dim)}.now{
stroke:var(--bad);stroke-width:2}.done,.nothing{fill:var(--good)}.more{fill:var(--more)}
.failed,.timed_out,.interrupted{fill:var(--bad)}.killed,.missed{fill:none;stroke:var(--warn)}
.running{fill:var(--link)}svg a:hover *,svg a:focus *{stroke:var(--fg);stroke-width:2}
@media(max-width:40rem){.wide{display:none}th,td{padding:.3rem}}
"""
# It draws the page anew in place, and turns it red when what it shows is older than it promises.
SCRIPT = """
const every=Number(document.body.dataset.every)*1000;let fresh=Date.now();
async function again(){try{const r=await fetch(location.href,{credentials:"same-origin"}),
d=new DOMParser().parseFromString(await r.text(),"text/html"),n=d.querySelector("main"),
m=document.querySelector("main"),age=Date.parse(r.headers.get("date"))-d.body.dataset.made*1000;
if(r.ok&&n){if(!(age>3*every))fresh=Date.now();document.querySelector("header .dim").textContent=
d.querySelector("header .dim").textContent;if(!m.contains(document.activeElement)){
m.replaceChildren(...n.childNodes)}}}catch(e){}
document.body.classList.toggle("stale",Date.now()-fresh>3*every)}
setInterval(again,every);
"""
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title} - bgtasks</title>
<style nonce="{page.nonce}">{style}</style>
<noscript><meta http-equiv="refresh" content="{every}"></noscript></head>
<body data-every="{every}" data-made="{now:.0f}">
<a class="skip" href="#content">To the content</a><header><h1><a href="{page.base}/">bgtasks</a>
on {node}</h1><span class="dim">as of {made}</span>{menu}</header>
<main id="content">{content}</main><footer>bgtasks {version}</footer>
<script nonce="{page.nonce}">{script}</script></body></html>
"""
LOGIN = """<h2>Log in</h2>{wrong}<form method="post" action="{base}/login">
<p><label>Administrator <input name="user" autocomplete="username" required></label></p>
<p><label>Password <input name="password" type="password" autocomplete="current-password" required>
</label></p><button>Log in</button></form>
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
        now = self.site.clock.now()
        menu = self.button("/wake", "Wake") + self.button("/logout", "Log out")
        texts = {"node": self.site.settings.node, "made": bgtasks.iso(now), "title": title}
        values = {"page": self, "content": content, "every": every, "now": now, "style": STYLE}
        values.update(script=SCRIPT, version=bgtasks.__version__, menu=menu * bool(self.login))
        text = PAGE.format(**{key: h(value) for key, value in texts.items()}, **values)
        nonce = f"'nonce-{self.nonce}'; "
        policy = (
            f"default-src 'none'; style-src {nonce}script-src {nonce}connect-src 'self'; "
            "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        kind = "text/html; charset=utf-8"
        return Answer(status, text.encode(), kind, Content_Security_Policy=policy)

    def link(self, kind: str, what: object, more: str = "") -> str:
        """Return the start of a link; in a static file it leads nowhere."""
        target = f'href="{self.base}/{kind}/{quote(str(what))}"' if self.login else 'tabindex="0"'
        return f"<a {target}{more}>"

    def button(self, path: str, text: str, fields: str = "") -> str:
        hidden = f'<input type="hidden" name="csrf" value="{self.csrf}">'
        start = f'<form method="post" action="{self.base}{path}">'
        return f"{start}{fields}{hidden}<button>{h(text)}</button></form> "

    def task(self, name: str) -> str:
        return f"{self.link('task', name)}{h(name)}</a>"


def login_page(page: Page, wrong: str = "") -> Answer:
    text = f'<p class="bad" role="alert">{h(wrong)}</p>' * bool(wrong)
    content, status = LOGIN.format(wrong=text, base=page.base), "401 Unauthorized" * bool(wrong)
    return page.answer("Log in", content, status=status or "200 OK")


def scrolled(label: str, content: str) -> str:
    """Return what may be wider than the screen, to be moved by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], wide: Sequence[str] = ()) -> str:
    """Return a table; the columns that are ``wide`` are left out on a narrow screen."""
    kinds = [' class="wide"' if title in wide else "" for title in head]
    text = "".join(f'<th scope="col"{kind}>{h(title)}</th>' for title, kind in zip(head, kinds))
    lines = ["".join(f"<td{k}>{cell}</td>" for cell, k in zip(row, kinds)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
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
    tasks = found["tasks"]
    shown = [task for task in tasks if task["state"] != "ignored"]
    findings = list(bgtasks.judge_tasks(tasks, now))
    findings += bgtasks.judge_wakeups(site.settings, site.store, now)
    running = [task for task in shown if task["running"]]
    span = query["range"] if query.get("range") in RANGES else "6h"
    head = ("Task", "State", "Next", "Last", "Outcome", "Took", "Runs", "Failed", "About")
    cells = (_task_cells(page, task, now) for task in tasks)
    content = (
        f"{_alive(found, findings, now)}{_running(page, running, now)}"
        f"<h2>Timeline</h2>{_ranges(page, span)}{timeline(page, shown, RANGES[span] * 3600.0, now)}"
        f"<h2>Tasks</h2>{table(head, cells, head[5:])}"
    )
    return page.answer("Status", content, every=5 if running else 30)


def _alive(found: Mapping[str, Any], findings: Sequence[bgtasks.Finding], now: float) -> str:
    last, woken = found["last_wakeup"], "It was never woken."
    if last:
        moment = bgtasks.when(last["started_at"], now)
        woken = f"Last wake-up {moment} by {last['user']}, {last['result']}."
    items = ""
    for level, about, text, way_out in sorted((f for f in findings if f.level), reverse=True):
        word = f"<strong>{('', 'Warning', 'Critical')[level]}: {h(about)}</strong> {h(text)}"
        items += f'<li class="l{level}">{word} <span class="dim">{h(way_out)}</span></li>'
    paused = '<p class="warn"><strong>Maintenance: nothing starts.</strong></p>'
    verdict = f'<ul class="find">{items}</ul>' if items else '<p class="good">All is well.</p>'
    return f"<p>{h(woken)}</p>{paused * bool(found['maintenance'])}<h2>What is wrong</h2>{verdict}"


def _running(page: Page, running: Sequence[Mapping[str, Any]], now: float) -> str:
    rows = ""
    for task in running:
        progress = task["progress"] or ""
        known = re.fullmatch(r"([0-9]{1,15})/([1-9][0-9]{0,14})", progress)
        bar = '<progress value="{}" max="{}" aria-label="progress"></progress>'
        bar = bar.format(*known.groups()) if known else ""
        since = h(bgtasks.when(task["last_started_at"], now))
        rows += f"<li>{page.task(task['name'])} since {since} {h(progress)} {bar}</li>"
    return f"<h2>At work now</h2>{f'<ul>{rows}</ul>' if rows else '<p>Nothing.</p>'}"


def _ranges(page: Page, span: str) -> str:
    links = {key: f'<a href="{page.base}/?range={key}">{key}</a>' for key in RANGES}
    links[span] = f"<strong>{span}</strong>"
    return f"<p>{' '.join(links.values())}</p>" * bool(page.login)


def _task_cells(page: Page, task: Mapping[str, Any], now: float) -> Sequence[str]:
    name, state = task["name"], task["state"]
    kind = "warn" if state in ("broken", "missing", "paused") else ""
    moments = [h(bgtasks.when(task[key], now)) for key in ("next_run_at", "last_started_at")]
    first = [h(name) if state == "ignored" else page.task(name), f'<b class="{kind}">{state}</b>']
    last = [bgtasks.duration(task["last_seconds"]), task["runs"] or "", task["failures"] or ""]
    last.append(task["reason"] or task["description"])
    return [*first, *moments, outcome(task["last_outcome"]), *map(h, last)]


# -- pictures, drawn on the server


SHAPES = {  # of the outcomes, so that colour is not the only sign; around 0, 0
    **dict.fromkeys(("done", "running"), "M-2-6h4v12h-4z"),
    "nothing": "M-1-4h2v8h-2z",
    "more": "M-3-6l7 6l-7 6z",
    "failed": "M-6-6h3l3 4l3-4h3l-4 6l4 6h-3l-3-4l-3 4h-3l4-6z",
    "timed_out": "M0-7l6 12h-12z",
    "killed": "M-4-4h8v8h-8z",
    "interrupted": "M0-7l6 7l-6 7l-6-7z",
    "missed": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
}


def timeline(page: Page, tasks: Sequence[Mapping[str, Any]], around: float, now: float) -> str:
    """Return an SVG of the runs in the seconds before now, and of the slots after it."""
    left, width, begin = 170, 1100, now - around
    lanes = {task["name"]: 34 + i * 24 for i, task in enumerate(tasks)}
    height = 30 + 24 * len(lanes)

    def x(moment: float) -> float:
        return round(left + (width - left) * (max(moment, begin) - begin) / (2 * around), 1)

    parts = [_scale(begin, around, height, x)]
    for name, y in lanes.items():
        parts.append(f'<line class="lane" x1="{left}" x2="{width}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="0" y="{y + 4}">{h(bgtasks.shortened(name, 24))}</text>')
    for name, moments in _planned(page.site, now, around).items():
        path = "".join(f"M{x(moment)} {lanes[name] - 4}v8" for moment in moments if name in lanes)
        parts.append(f'<path class="plan" d="{path}"/>' * bool(path))
    runs = page.site.store.runs_since(begin, MOST_DRAWN)
    parts += [_run_mark(page, r, lanes[r["task"]], x, now) for r in runs if r["task"] in lanes]
    note = f"<p>Only the newest {MOST_DRAWN} runs are drawn.</p>" * (len(runs) == MOST_DRAWN)
    start = f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="Timeline of the runs">'
    return f"{scrolled('Timeline', start + ''.join(parts) + '</svg>')}{note}"


def _scale(begin: float, around: float, height: int, x: Callable[[float], float]) -> str:
    parts: list[str] = []
    for i, anchor in enumerate(("start", *["middle"] * 5, "end")):
        moment = begin + i * around / 3
        text = datetime.fromtimestamp(moment).astimezone().strftime("%d %H:%M")
        place = f'x="{x(moment)}" y="12" text-anchor="{anchor}"'
        parts.append(f'<text class="dim" {place}>{text}</text>')
    now = x(begin + around)
    return "".join(parts) + f'<line class="now" x1="{now}" x2="{now}" y1="16" y2="{height}"/>'


def _run_mark(
    page: Page, run: Mapping[str, Any], y: int, x: Callable[[float], float], now: float
) -> str:
    began, ended, kind = run["started_at"], run["ended_at"] or now, run["outcome"]
    at, wide = x(began), round(x(ended) - x(began), 1)
    moment, took = bgtasks.when(bgtasks.iso(began), now), bgtasks.duration(ended - began)
    label = h(f"{run['task']}: {kind}, {moment}, {took}")
    bar = f'<rect class="{kind}" x="{at}" y="{y - 3}" width="{wide}" height="6"/>'
    mark = f'<path class="{kind}" transform="translate({at} {y})" d="{SHAPES[kind]}"/>'
    link = page.link("run", run["id"], f' aria-label="{label}"')
    return f"{link}<title>{label}</title>{bar * (wide > 3)}{mark}</a>"


def _planned(site: Site, now: float, seconds: float) -> dict[str, list[float]]:
    """Return the next slots of each task, at most 60."""
    found: dict[str, list[float]] = {}
    for row in site.store.tasks():
        if not row["file"] or row["error"] or not row["enabled"] or row["next_run_at"] is None:
            continue
        task = bgtasks.task_from(row)
        schedule = bgtasks.schedule_of(task.settings, site.settings, task.name, row["anchor_at"])
        moment: float | None = row["next_run_at"]
        moments = found.setdefault(task.name, [])
        while moment is not None and moment <= now + seconds and len(moments) < 60:
            moments.append(moment)
            moment = schedule.next_after(moment)
    return found


def durations(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a small chart of how long the last runs took, the newest at the right."""
    known = [(run, run["ended_at"] - run["started_at"]) for run in runs[::-1] if run["ended_at"]]
    longest = max((seconds for _, seconds in known), default=0.0) or 1.0
    bars = ""
    for i, (run, seconds) in enumerate(known):
        high, label = max(2, round(58 * seconds / longest)), bgtasks.duration(seconds)
        place = f'x="{i * 12}" y="{60 - high}" width="9" height="{high}"'
        title = f"<title>run {run['id']}: {label}</title>"
        bars += f'<rect class="{run["outcome"]}" {place}>{title}</rect>'
    label = f"How long the last {len(known)} runs took, at most {bgtasks.duration(longest)}"
    return f'<svg viewBox="0 0 720 60" role="img" aria-label="{label}">{bars}</svg>'


def task_page(page: Page, name: str) -> Answer:
    site, now = page.site, page.site.clock.now()
    rows = bgtasks.task_rows(site.settings, site.store, now)
    task = next((row for row in rows if row["name"] == name), None)
    if task is None:
        raise said("404 Not Found")
    why = bgtasks.explain(site.settings, site.store, task, now, now)
    runs = site.store.history(name, 60)
    facts = [(key, h(value)) for key, value in task.items() if value not in (None, "", 0, False)]
    here = f"/task/{quote(name)}"
    note = '<label>for <input name="for" size="6" placeholder="2 h"></label> '
    buttons = [page.button(f"{here}/request", "Run at the next look")]
    buttons += [page.button(f"{here}/resume", "Resume")] * (task["state"] == "paused")
    buttons += [page.button(f"{here}/pause", "Pause", note)] * (task["state"] != "paused")
    buttons += [page.button(f"{here}/kill", "End its run")] * task["running"]
    buttons += [page.button(f"{here}/clear", "Seen: clear")]
    sentences = " ".join(f"{text[:1].upper()}{text[1:]}." for text in why["sentences"])
    content = (
        f"<h2>{h(name)}</h2><p>{h(task['description'])}</p><p>{''.join(buttons)}</p>"
        f"<h2>Why it ran, or did not</h2><p>{h(sentences)}</p>"
        f"<h2>How long it took</h2>{durations(runs)}<h2>History</h2>{_history(page, runs, now)}"
        f"<h2>All that is known</h2>{table(('What', 'Is'), facts)}"
    )
    return page.answer(name, content, every=5 if task["running"] else 30)


def _history(page: Page, runs: Sequence[Mapping[str, Any]], now: float) -> str:
    rows: list[Sequence[str]] = []
    for run in runs:
        took = bgtasks.duration(run["ended_at"] - run["started_at"]) if run["ended_at"] else ""
        link = f"{page.link('run', run['id'])}{run['id']}</a>"
        started = h(bgtasks.when(bgtasks.iso(run["started_at"]), now))
        volume = h("" if run["volume"] is None else run["volume"])
        about, trigger = h(bgtasks.joined(run["reason"], run["message"])), h(run["trigger"])
        rows.append((link, started, h(took), outcome(run["outcome"]), volume, trigger, about))
    head = ("Run", "Started", "Took", "Outcome", "Volume", "Trigger", "About")
    return table(head, rows, ("Volume", "Trigger"))


def run_page(page: Page, number: str) -> Answer:
    site, now = page.site, page.site.clock.now()
    digits = number.isascii() and number.isdigit() and len(number) < 19
    run = site.store.run(int(number)) if digits else None
    if not run:
        raise said("404 Not Found")
    output, every = run["output"], 999
    if run["outcome"] == bgtasks.RUNNING:
        live = os.path.join(site.settings.state_dir, "runs", run["live"])
        output, every = bgtasks.read_output(live, site.settings.secrets), 5
    text = "\n".join(bgtasks.visible(line) for line in output.expandtabs().splitlines())
    content = (
        f"<h2>Run {run['id']} of {page.task(run['task'])}</h2>{_history(page, [run], now)}"
        f'<h2>What it printed</h2><pre tabindex="0">{html.escape(text) or "nothing"}</pre>'
    )
    return page.answer(f"Run {run['id']}", content, every=every)


# -- paths


def pages(site: Site, request: Request) -> Answer:
    """Answer what a browser asks for; without a session that is the login."""
    found = session(site, request)
    login, csrf = found or ("", "")
    page = Page(site, request.base, login, csrf, secrets.token_urlsafe(16))
    path, home = request.path, request.base + "/"
    cookie = f"; Path={home}; HttpOnly; SameSite=Strict" + "; Secure" * request.secure
    if path == ("login",) and request.method == "POST":
        count_guess(site, request.address)
        user, password = (request.form.get(key, "") for key in ("user", "password"))
        if not has_password(site, request.address, user, password):
            return login_page(page, "This is not the login of an administrator.")
        forget_guesses(site, request.address)
        until = int(site.clock.now()) + SESSION_SECONDS
        text = f"{user.encode().hex()}.{until}.{secrets.token_hex(8)}"
        cookie = f"bgtasks={text}.{signed(site, text)}{cookie}"
        return Answer("303 See Other", Location=home, Set_Cookie=cookie)
    if found is None:
        return login_page(page)
    if request.method == "POST":
        given = request.form.get("csrf", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, csrf.encode()):
            text = "the form is too old; go back and load the page again"
            raise said("403 Forbidden", {"error": text})
        if path == ("logout",):
            cookie = f"bgtasks={cookie}; Max-Age=0"
            return Answer("303 See Other", Location=home, Set_Cookie=cookie)
        if path == ("wake",):
            wake(site)
            return Answer("303 See Other", Location=home)
        if len(path) == 3 and path[0] == "task":
            act(site, path[1], path[2], f"web {login}", request.form)
            return Answer("303 See Other", Location=f"{home}task/{quote(path[1])}")
    elif not path:
        return status_page(page, request.query)
    elif len(path) == 2 and path[0] == "task":
        return task_page(page, path[1])
    elif len(path) == 2 and path[0] == "run":
        return run_page(page, path[1])
    raise said("404 Not Found")


def answered(site: Site, request: Request) -> Answer:
    method, path = request.method, request.path
    if path == ("pixel.gif",) and method == "GET" and site.settings.web_pixel:
        wake(site, site.settings.web_interval)
        return Answer("200 OK", GIF, "image/gif")
    if not (site.settings.web_token or site.store.admins()):  # nobody could show who he is
        raise said("404 Not Found")
    if method not in ("GET", "POST"):
        raise said("405 Method Not Allowed", Allow="POST" if path[:1] == ("wake",) else "GET, POST")
    if path[:1] == ("wake",) and "csrf" not in request.form:
        return _wake_asked(site, request)
    if path[:1] == ("api",):
        return api(site, request)
    if path == ("metrics",):
        require_token(site, request)
        lines = bgtasks.metric_lines(bgtasks.status(site.settings, site.store, site.clock))
        return Answer("200 OK", "\n".join([*lines, ""]).encode(), "text/plain; version=0.0.4")
    return pages(site, request)


def _wake_asked(site: Site, request: Request) -> Answer:
    if request.method == "GET":
        if len(request.path) == 1 or not site.settings.web_allow_get:
            raise said("405 Method Not Allowed", Allow="POST")
        request = request._replace(headers={"AUTHORIZATION": f"Bearer {request.path[1]}"})
    elif len(request.path) > 1:
        raise said("404 Not Found")
    require_token(site, request)
    return wake(site)


class Application:
    """The WSGI application (PEP 3333) for the installation that ``arguments`` name."""

    def __init__(self, **arguments: str) -> None:
        file = os.environ.get("BGTASKS_PARAM_FILE", "")
        self._arguments = {**({"param_file": file} if file else {}), **arguments}

    def __call__(
        self, environ: Mapping[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        try:
            answer = self._answer(environ)
        except Answer as raised:
            answer = raised
        except (bgtasks.BgtasksError, OSError, MemoryError):
            answer = said("503 Service Unavailable", Retry_After="30")
        except Exception:  # noqa: BLE001 - whatever is sent must not make it fail, nor learn why
            traceback.print_exc()
            answer = said("503 Service Unavailable", Retry_After="300")
        headers = {"Content-Type": answer.kind, "Content-Length": str(len(answer.body))}
        start_response(answer.status, list({**ALWAYS, **headers, **answer.headers}.items()))
        return [answer.body]

    def _answer(self, environ: Mapping[str, Any]) -> Answer:
        settings, clock = bgtasks.read_settings(self._arguments, PROGRAM), bgtasks.Clock()
        path = os.path.join(settings.state_dir, "bgtasks.db")
        if not os.path.exists(path):
            if not (settings.web_token or settings.web_pixel):
                raise said("404 Not Found")
            bgtasks.open_store(settings.state_dir).close()  # the web is all that ever wakes it
        with closing(bgtasks.Store(path, timeout=1.0)) as store:
            site = Site(settings, store, clock, self._arguments)
            return answered(site, read_request(environ))


application = Application()


def write_page(file: str, arguments: Mapping[str, str]) -> None:
    """Write the status page as one static file, for hosts that only serve files."""
    settings = bgtasks.read_settings(arguments, PROGRAM)
    with closing(bgtasks.open_for_reading(settings)) as store:
        site = Site(settings, store, bgtasks.Clock(), arguments)
        answer = status_page(Page(site, "", "", "", "page"), {})
    with open(f"{file}.new", "wb") as written:
        written.write(answer.body)
    os.replace(f"{file}.new", file)


def main(words: Sequence[str]) -> int:
    options = [word[2:].partition("=") for word in words if word[:2] == "--"]
    given = {key: value for key, _, value in options}
    order, file, port = (given.pop(key, "") for key in ("wake", "html", "port"))
    if order:
        return run_ordered(order, given)
    if file:
        write_page(file, given)
        return 0
    from wsgiref.simple_server import make_server

    with make_server("127.0.0.1", int(port or 8080), Application(**given)) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
