"""The web side under real servers: each answers at once, and what it starts outlives it.

The entries and snippets of contrib/web are loaded as they are, with paths and limits filled in."""

import fcntl
import grp
import http.client
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from conftest import PROGRAM, Site, wait_for
from imap_server import free_ports

import bgtasks

pytestmark = pytest.mark.unmeasured
WEB = PROGRAM.parent / "contrib" / "web"
TOKEN = "wake-0123456789-0123456789-0123456789"
PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin"
APACHE, NGINX = shutil.which("apache2", path=PATHS), shutil.which("nginx", path=PATHS)
MODULES = Path("/usr/lib/apache2/modules")
LIMIT = 5  # seconds that each server gives a request, where that is the subject
LONG = 20 if os.environ.get("BGTASKS_FULL") else 8  # and that a task takes which outlives it
PATIENCE = 300  # where it is not
PRIVATE = {
    "cron.params": f"web_token = {TOKEN}",
    "cron.params~": "an editor's copy",
    "other.params": "smtp_pwd",
    "state/bgtasks.db": "SQLite format 3",
    "tasks.d/patient.sh": "sleep",
    "outbox/mail": "a mail that waits",
    "bgtasks.py": "import",
}
APACHE_CONFIG = """
ServerRoot {folder}
ServerName localhost
Listen 127.0.0.1:{port}
PidFile {run}/pid
DefaultRuntimeDir {run}
ErrorLog {folder}/said
Timeout {limit}
DocumentRoot {folder}
{modules}
TypesConfig /dev/null
<IfModule cgid_module>
    ScriptSock {run}/cgi
</IfModule>
<IfModule wsgi_module>
    WSGISocketPrefix {run}/wsgi
</IfModule>
<Directory {folder}>
    AllowOverride AuthConfig FileInfo Options
    Require all granted
</Directory>
Alias /other {folder}/bgtasks
{snippet}
"""
NGINX_CONFIG = """
daemon off;
{user}
pid {run}/pid;
error_log {folder}/said;
events {{}}
http {{
    access_log off;
    {places}
    server {{
        listen 127.0.0.1:{port};
        root {folder};
        location /other/ {{
            alias {folder}/bgtasks/;
        }}
        {snippet}
    }}
}}
"""


def filled(file, **values):
    """Return a file of contrib/web with other values for what stands there."""
    text = (WEB / file).read_text()
    for found, wanted in values.items():
        assert found in text, f"{file} does not say {found}"
        text = text.replace(found, str(wanted))
    return text


class Server:
    """A real server on a free port of loopback, in front of an installation of its own."""

    base = ""  # where the application lies
    needs = ""
    protects = True  # it has rules for files

    def __init__(self, folder, *, bare=False, limit=PATIENCE):
        self.folder, self.bare, self.limit = folder, bare, limit
        self.run = folder / "run"
        self.user = self.owner()
        self.port, self.inner_port = free_ports(2)
        self.processes = []
        self._install()

    @staticmethod
    def missing():
        return ""

    def owner(self):
        return pwd.getpwuid(os.geteuid())

    def _install(self):
        """Copy what an administrator copies, and let it belong to the user of the server."""
        self.run.mkdir()
        (self.folder / "public.txt").write_text("for all\n")
        folder = self.folder / "bgtasks"
        folder.mkdir()
        for file in (PROGRAM, *(path for path in WEB.iterdir() if path.is_file())):
            shutil.copy(file, folder)
        self.site = Site(folder)
        patient = "touch ../began; until [ -e ../go ] || [ ! -e ../began ]; do sleep 0.1; done"
        self.site.shell("patient", patient, schedule="every 1 d")
        self.site.params.write_text(f"web_token = {TOKEN}\ncron_max_execution_time = 0\n")
        self.site.params.chmod(0o600)

    def give(self):
        """Let all belong to the user of the server."""
        if self.user.pw_uid != os.geteuid():
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, self.user.pw_uid, self.user.pw_gid, follow_symlinks=False)

    def start(self, umask=0o022):
        commands = self.commands()
        (self.folder / "said").touch()
        self.give()
        other = self.user.pw_uid != os.geteuid()
        rights = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "LANG": "C.UTF-8"}
        with open(self.folder / "said", "ab") as said:
            self.processes = [
                subprocess.Popen(
                    command,
                    cwd=self.site.folder,
                    env=env,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                    umask=umask,
                    **(rights if other else {}),
                )
                for command in commands
            ]
        wait_for(self.answers, 120)

    def answers(self):
        assert all(process.poll() is None for process in self.processes), self.said()
        with suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/api/status", TOKEN)[0] == 200
        return False

    def said(self):
        return (self.folder / "said").read_text(errors="replace")

    def ask(self, method, path, token=""):
        """Send a request to the application; return the status and the body."""
        return self.get(f"{self.base}{path}", method, token)

    def get(self, path, method="GET", token=""):
        status, text, _ = self.send(method, path, **bearer(token))
        return status, text

    def send(self, method, path, body=None, **headers):
        body = b"" if method == "POST" and body is None else body
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            connection.request(method, path, body, {"Connection": "close", **headers})
            with closing(connection.getresponse()) as answer:
                return answer.status, answer.read().decode(errors="replace"), answer.headers

    def wake(self):
        began = time.monotonic()
        status, text = self.ask("POST", "/wake", TOKEN)
        took = time.monotonic() - began
        assert (status, json.loads(text)) == (202, {"started": True}), text + self.said()
        return took

    def rest(self):
        """Let no runner be at work, and the last wake-up be a while ago."""
        lock = self.site.state / "locks" / "web.lock"
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(lock, (0, 0))

    def end(self, number=signal.SIGTERM):
        """End it as a service manager does; SIGKILL takes all its processes at once."""
        for process in reversed(self.processes):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            process.send_signal(number)
        for process in self.processes:
            process.wait(60)
        wait_for(self._is_gone)

    def _is_gone(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    def last(self, task):
        """Return the last run of a task; the state itself says, not the server."""
        with suppress(sqlite3.OperationalError):
            db = sqlite3.connect(f"file:{self.site.state}/bgtasks.db?mode=ro", uri=True, timeout=60)
            db.row_factory = sqlite3.Row
            sql = "SELECT * FROM run WHERE task = ? ORDER BY id DESC LIMIT 1"
            rows = db.execute(sql, (task,)).fetchall()
            db.close()
            return dict(rows[0]) if rows else {"outcome": ""}
        return {"outcome": ""}

    def is_running(self, task):
        return self.last(task)["outcome"] == "running"

    def ended(self, task):
        run = self.last(task)
        return run if run["outcome"] not in ("", "running") else None

    def zombies(self):
        """Return the dead that descend from the server and that nobody has waited for."""
        found, ours = dict(processes()), {process.pid for process in self.processes}
        for _ in range(6):
            ours |= {pid for pid, (parent, _) in found.items() if parent in ours}
        return [pid for pid in ours if found.get(pid, (0, ""))[1] == "Z"]

    def close(self):
        (self.site.folder / "go").touch()
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
        for runner in self.runners():
            with suppress(ProcessLookupError):
                os.kill(runner, signal.SIGTERM)
        wait_for(lambda: not self.runners())

    def runners(self):
        """Return the ids of the runners, and of their keepers, that a wake-up has started here."""
        words = [f"{self.site.folder}/bgtasks_web.py".encode(), b"--wake="]
        return [pid for pid, _ in processes() if all(word in command(pid) for word in words)]


def processes():
    """Yield each process with its parent and its state."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                yield int(folder.name), (int(parent), state)


def command(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def bearer(token):
    return {"Authorization": f"Bearer {token}"} if token else {}


class Wsgiref(Server):
    protects = False

    def commands(self):
        return [[sys.executable, "bgtasks_web.py", f"--port={self.port}"]]


class Gunicorn(Server):
    protects = False
    options = ()  # as its configuration says: gthread

    @staticmethod
    def missing():
        return (
            "" if importlib.util.find_spec("gunicorn") else "needs gunicorn: pip install gunicorn"
        )

    def _install(self):
        super()._install()
        addresses = {"127.0.0.1:8001": f"127.0.0.1:{self.bound()}"}
        text = filled(
            "gunicorn.conf.py", **addresses, **{"timeout = 30": f"timeout = {self.limit}"}
        )
        (self.site.folder / "gunicorn.conf.py").write_text(text)

    def bound(self):
        return self.port

    def commands(self):
        return [[sys.executable, "-m", "gunicorn", *self.options]]


class GunicornSync(Gunicorn):
    options = ("--worker-class=sync", "--threads=1")  # with more threads it is another class


class Nginx(Gunicorn):
    base = "/bgtasks"
    protects = True

    @staticmethod
    def missing():
        return Gunicorn.missing() or ("" if NGINX else "needs nginx: apt-get install nginx")

    def bound(self):
        return self.inner_port

    def commands(self):
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        snippet = filled("nginx.conf", **{"127.0.0.1:8001": f"127.0.0.1:{self.inner_port}"})
        text = NGINX_CONFIG.format(
            folder=self.folder,
            run=self.run,
            port=self.port,
            places=" ".join(f"{kind}_temp_path {self.run}/{kind};" for kind in kinds),
            user="user root;" if os.geteuid() == 0 else "",
            snippet="" if self.bare else snippet,
        )
        config = self.folder / "nginx.conf"
        config.write_text(text)
        return [*super().commands(), [NGINX, "-e", str(self.folder / "said"), "-c", str(config)]]


class Apache(Server):
    base = "/bgtasks"
    modules = ("mpm_event", "wsgi")

    @classmethod
    def missing(cls):
        files = [MODULES / f"mod_{name}.so" for name in cls.modules]
        if APACHE and all(file.exists() for file in files):
            return ""
        return "needs Apache: apt-get install apache2 libapache2-mod-wsgi-py3"

    def owner(self):
        """Apache serves no page as root."""
        return pwd.getpwnam("www-data") if os.geteuid() == 0 else super().owner()

    def snippet(self):
        group = grp.getgrgid(self.user.pw_gid).gr_name
        values = {
            "/srv/bgtasks": self.site.folder,
            "user=bgtasks group=bgtasks": f"user={self.user.pw_name} group={group}",
            "threads=4 request-timeout=30": f"threads=1 request-timeout={self.limit}",
        }
        return filled("apache.conf", **values)

    def commands(self):
        used = (*self.modules, "authz_core", "alias", "mime", "setenvif")
        text = APACHE_CONFIG.format(
            folder=self.folder,
            run=self.run,
            port=self.port,
            limit=self.limit,
            modules="\n".join(f"LoadModule {n}_module {MODULES}/mod_{n}.so" for n in used),
            snippet="" if self.bare else self.snippet(),
        )
        config = self.folder / "apache.conf"
        config.write_text(text)
        return [[APACHE, "-f", str(config), "-DFOREGROUND"]]


class ApacheCgi(Apache):
    modules = ("mpm_event", "cgid")


class ApacheHtaccess(Apache):
    """The older kind of Apache that shared hosting knows, where only an .htaccess can be given."""

    base = "/bgtasks/bgtasks.cgi"
    modules = ("mpm_prefork", "cgi")

    def snippet(self):
        shutil.copy(WEB / "htaccess.example", self.site.folder / ".htaccess")
        return ""


KINDS = {
    "wsgiref": Wsgiref,
    "gunicorn-sync": GunicornSync,
    "gunicorn-gthread": Gunicorn,
    "nginx": Nginx,
    "mod_wsgi": Apache,
    "cgi": ApacheCgi,
    "htaccess": ApacheHtaccess,
}
PROTECTED = [kind for kind, server in KINDS.items() if server.protects]


@contextmanager
def installed(kind, **options):
    """Yield a server that can be started; what it leaves goes with its folder."""
    missing = KINDS[kind].missing()
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    folder = Path(tempfile.mkdtemp(prefix="web")).resolve()
    folder.chmod(0o755)
    server = KINDS[kind](folder, **options)
    try:
        yield server
    finally:
        try:
            server.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=KINDS)
def server(request):
    with installed(request.param) as server:
        server.start()
        yield server


@pytest.fixture(scope="module", params=KINDS)
def shared(request):
    """A server that several tests ask; each leaves no runner."""
    with installed(request.param) as server:
        server.start()
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_a_wake_up_is_answered_at_once_and_its_task_outlives_every_limit(kind, record_property):
    with installed(kind, limit=LIMIT) as server:
        server.start()
        took = [server.wake()]
        wait_for(lambda: server.is_running("patient"))
        while min(took) >= 1 and len(took) < 10:  # the machine may have stood still
            server.rest()
            took.append(server.wake())
        record_property("seconds", min(took))
        assert min(took) < 1
        wait_for(lambda: time.time() > server.last("patient")["started_at"] + LONG + 1, LONG + 60)
        assert server.is_running("patient")
        (server.site.folder / "go").touch()
        run = wait_for(lambda: server.ended("patient"))
        assert run["outcome"] == "done"
        assert run["ended_at"] - run["started_at"] >= LONG > LIMIT
        wait_for(lambda: not server.zombies() and not server.runners())
        assert server.ask("GET", "/api/status", TOKEN)[0] == 200


@pytest.mark.parametrize("kind", ["gunicorn-sync", "mod_wsgi", "cgi", "htaccess"])
def test_the_limits_are_real_and_even_a_run_that_a_request_waits_for_outlives_them(kind):
    with installed(kind, limit=LIMIT) as server:
        with server.site.params.open("a") as params:
            params.write("web_inline = 1\nweb_max_execution_time = 600\n")
        server.start()
        with suppress(OSError, http.client.HTTPException):
            assert server.ask("POST", "/wake", TOKEN)[0] in (500, 502, 504)
        wait_for(lambda: server.is_running("patient"))
        (server.site.folder / "go").touch()
        assert wait_for(lambda: server.ended("patient"))["outcome"] == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_survives_the_end_of_its_server(server, number):
    server.wake()
    wait_for(lambda: server.is_running("patient"))
    server.end(number)
    assert server.is_running("patient")
    server.start()
    assert server.is_running("patient")
    (server.site.folder / "go").touch()
    assert wait_for(lambda: server.ended("patient"))["outcome"] == "done"
    status, text = server.ask("GET", "/api/history?task=patient", TOKEN)
    assert (status, [run["outcome"] for run in json.loads(text)]) == (200, ["done"])


def test_the_token_arrives_and_only_the_right_one_counts(shared):
    for token in ("", "x" * 40, TOKEN[:-1]):
        assert shared.ask("POST", "/wake", token)[0] == 401
        assert shared.ask("GET", "/metrics", token)[0] == 401
    assert not shared.runners()
    assert shared.ask("GET", "/metrics", TOKEN)[0] == 200


def test_an_administrator_logs_in_and_no_link_leads_out_of_the_application(shared):
    add = "INSERT INTO admin VALUES (?, ?, ?)"
    shared.site.change(add, "anna", bgtasks.hashed("a long password"), time.time())
    assert shared.send("GET", f"{shared.base}/")[0] == 200
    status, _, headers = shared.send(
        "POST",
        f"{shared.base}/login",
        b"user=anna&password=a+long+password",
        **{"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert (status, headers["Location"]) == (303, f"{shared.base}/")
    assert f"; Path={shared.base}/; HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].partition(";")[0]
    status, text, headers = shared.send("GET", f"{shared.base}/", Cookie=cookie)
    assert (status, "patient" in text) == (200, True)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    links = re.findall(r'(?:href|action)="(/[^"]*)"', text)
    assert len(links) > 2
    assert [link for link in links if not link.startswith(f"{shared.base}/")] == []


def test_a_run_that_a_server_has_started_can_be_ended_through_it(shared):
    shared.wake()
    wait_for((shared.site.folder / "began").exists)
    assert shared.ask("POST", "/api/patient/kill", TOKEN)[0] == 200
    assert wait_for(lambda: shared.ended("patient"))["outcome"] == "killed"
    wait_for(lambda: not shared.runners())


def put_private_files(server):
    (server.site.folder / "outbox").mkdir()
    for file, text in PRIVATE.items():
        path = server.site.folder / file
        if not path.exists():
            path.write_text(text)
    server.give()


@pytest.mark.parametrize("kind", PROTECTED)
def test_the_files_beside_the_application_are_not_served(kind):
    with installed(kind) as server:
        server.start()
        put_private_files(server)
        assert server.get("/public.txt") == (200, "for all\n")
        for file, text in PRIVATE.items():
            assert text in (server.site.folder / file).read_text(errors="replace")
            assert server.get(f"/other/{file}")[0] in (403, 404), file
            for path in (f"/bgtasks/{file}", f"/bgtasks//{file}", f"/bgtasks/%2e/{file}"):
                assert text not in server.get(path)[1], path
        assert server.ask("GET", "/metrics", TOKEN)[0] == 200


@pytest.mark.parametrize("kind", PROTECTED)
def test_without_these_rules_they_would_be_served(kind):
    with installed(kind, bare=True) as server:
        server.base = "/other/cron.params?"
        server.start()
        assert TOKEN in server.get("/other/cron.params")[1]


def cgi_environ(method, path, **more):
    """Return what a web server puts into the environment (RFC 3875)."""
    server = {"SERVER_NAME": "localhost", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1"}
    asked = {"REQUEST_METHOD": method, "PATH_INFO": path, "PATH": "/usr/bin:/bin"}
    return {**server, **asked, **more}


def cgi(server, **more):
    """Return what the CGI program answers to a wake-up, read to its end."""
    env = cgi_environ("POST", "/wake", **more)
    program = [sys.executable, str(server.site.folder / "bgtasks.cgi")]
    options = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(program, env=env, check=True, **options)
    assert done.stderr == ""
    return done.stdout.partition("\n")[0].strip()


@pytest.mark.parametrize("name", ["HTTP_AUTHORIZATION", "REDIRECT_HTTP_AUTHORIZATION"])
def test_a_cgi_client_does_not_wait_for_the_runner_nor_does_that_know_the_token(name):
    with installed("wsgiref") as server:
        assert cgi(server, **{name: "Bearer wrong"}) == "Status: 401 Unauthorized"
        assert cgi(server, **{name: f"Bearer {TOKEN}"}) == "Status: 202 Accepted"
        wait_for(lambda: server.is_running("patient"))
        found = [Path(f"/proc/{pid}/environ").read_bytes() for pid in server.runners()]
        assert found
        assert [environ for environ in found if TOKEN.encode() in environ] == []


AS_PASSENGER_DOES = """
import importlib.util, io, os, wsgiref.handlers

spec = importlib.util.spec_from_file_location("passenger_wsgi", "passenger_wsgi.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
out = io.BytesIO()
handler = wsgiref.handlers.SimpleHandler(io.BytesIO(), out, io.BytesIO(), dict(os.environ))
handler.run(module.application)
print(out.getvalue().decode())
"""


def test_passenger_finds_the_application():
    """As its wsgi-loader.py looks for it (https://github.com/phusion/passenger)."""
    with installed("wsgiref") as server:
        env = cgi_environ("GET", "/metrics", HTTP_AUTHORIZATION=f"Bearer {TOKEN}")
        program = [sys.executable, "-I", "-c", AS_PASSENGER_DOES]
        said = subprocess.check_output(program, cwd=server.site.folder, env=env, text=True)
        assert said.startswith("HTTP/1.0 200 OK\n")
        assert "bgtasks_" in said


def test_what_a_server_makes_is_private_whatever_its_umask():
    with installed("wsgiref") as server:
        server.start(umask=0)
        (server.site.folder / "go").touch()
        server.wake()
        wait_for(lambda: server.ended("patient") and not server.runners())
        found = [server.site.state, *server.site.state.rglob("*")]
        assert [str(path) for path in found if path.stat().st_mode & 0o077] == []
