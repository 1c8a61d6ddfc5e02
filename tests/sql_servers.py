"""Real database servers for tests, on Unix sockets in a folder of their own, without root's rights.

Both keep their data unsafe and fast, in memory if there is a place. Their folder goes with them.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "opensesame7"
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin"
DRIVER = "psycopg[binary]"
MARIADB = shutil.which("mariadbd", path=PATHS)
POSTGRESQL = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


def missing(kind):
    """Return why there is no such server here, or nothing."""
    driver, package = {"mysql": ("pymysql", "PyMySQL"), "postgresql": ("psycopg", DRIVER)}[kind]
    if not importlib.util.find_spec(driver):
        return f"needs a driver: pip install '{package}'"
    if kind == "mysql" and not (MARIADB and shutil.which("mariadb-install-db", path=PATHS)):
        return "needs MariaDB: apt-get install mariadb-server"
    if kind == "postgresql" and not (POSTGRESQL and (POSTGRESQL / "initdb").exists()):
        return "needs PostgreSQL: apt-get install postgresql"
    return ""


def rights():
    """Return what lets a child run as somebody else than root, which both servers refuse."""
    if os.geteuid():
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class Server:
    """A server in a folder. It has the user `test`, and `locked`, who needs PASSWORD."""

    def __init__(self, folder):
        self.folder, self.data = folder, folder / "data"
        self.process = None
        if not os.geteuid():
            os.chown(folder, rights()["user"], rights()["group"])

    def install(self, *command):
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=self.folder, **rights()
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        with open(self.folder / "said", "a") as said:
            self.process = subprocess.Popen(
                self.command(), stdout=said, stderr=said, cwd=self.folder, **rights()
            )
        end = time.monotonic() + 60
        while self.ready not in self.said():  # a try to connect too early leaks a socket
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.05)

    def said(self):
        return (self.folder / "said").read_text(errors="replace")

    def stop(self):
        self.process.send_signal(self.end)
        self.process.wait(60)


class MariaDB(Server):
    ready = "ready for connections"
    end = signal.SIGTERM

    @property
    def socket(self):
        return self.folder / "socket"

    def url(self, name="test", user="test"):
        return f"mysql://{user}@localhost/{name}?unix_socket={self.socket}"

    def connect(self, name=None, user="root", **more):
        import pymysql

        return pymysql.connect(
            unix_socket=str(self.socket), user=user, database=name, autocommit=True, **more
        )

    def command(self):
        return [
            *(MARIADB, "--no-defaults", f"--datadir={self.data}", f"--socket={self.socket}"),
            *("--skip-networking", f"--pid-file={self.folder}/pid", "--innodb-buffer-pool-size=8M"),
            *("--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync"),
            *("--innodb-log-file-size=4M", f"--tmpdir={self.folder}", *self.secured),
        ]

    secured = ()

    def secure(self, certificate):
        """Let it offer TLS, also on its socket, when it starts."""
        for name, blob in (
            ("cert", certificate.cert_chain_pems[0]),
            ("key", certificate.private_key_pem),
        ):
            blob.write_to_path(self.folder / name)
            (self.folder / name).chmod(0o644)  # a folder that nobody else can enter
        self.secured = (f"--ssl-cert={self.folder}/cert", f"--ssl-key={self.folder}/key")

    def prepare(self):
        options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        self.install(
            *("mariadb-install-db", "--no-defaults", f"--datadir={self.data}", *options),
            *("--skip-name-resolve", "--innodb-flush-method=nosync", f"--tmpdir={self.folder}"),
        )
        self.start()
        with self.connect() as db:
            for sql in (
                "CREATE USER test@localhost",
                "GRANT ALL ON *.* TO test@localhost",
                f"CREATE USER locked@localhost IDENTIFIED BY '{PASSWORD}'",
                "GRANT ALL ON *.* TO locked@localhost",
            ):
                db.cursor().execute(sql)

    def create(self, name):
        with self.connect() as db:
            db.cursor().execute(f"CREATE DATABASE {name}")


class PostgreSQL(Server):
    ready = "ready to accept connections"
    end = signal.SIGINT  # it does not wait for who is still connected

    def url(self, name="public", user="test"):
        """Return the address of a schema: one is made much faster than a database."""
        place = f"host={self.folder}&options=-csearch_path%3D{name}"
        return f"postgresql://{user}@/postgres?{place}"

    def connect(self, name="public", user="test", **more):
        import psycopg

        return psycopg.connect(self.url(name, user), autocommit=True, **more)

    def command(self):
        safety = ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
        settings = ["listen_addresses=", f"unix_socket_directories={self.folder}", *safety]
        options = [word for setting in settings for word in ("-c", setting)]
        return [str(POSTGRESQL / "postgres"), "-D", str(self.data), *options]

    def prepare(self):
        command = [str(POSTGRESQL / "initdb"), "-D", str(self.data), "-U", "test", "-A", "trust"]
        self.install(*command, "--no-sync", "--no-locale", "-E", "UTF8")
        hba = "local all locked scram-sha-256\nlocal all all trust\n"
        (self.data / "pg_hba.conf").write_text(hba)
        self.start()
        with self.connect() as db:
            db.execute(f"CREATE ROLE locked LOGIN SUPERUSER PASSWORD '{PASSWORD}'")

    def create(self, name):
        with self.connect() as db:
            db.execute(f"CREATE SCHEMA {name}")


@contextmanager
def running(kind, certificate=None):
    with tempfile.TemporaryDirectory(prefix="sql", dir=MEMORY) as folder:
        server = {"mysql": MariaDB, "postgresql": PostgreSQL}[kind](Path(folder))
        if certificate:
            server.secure(certificate)
        try:
            server.prepare()
            yield server
        finally:
            if server.process and server.process.poll() is None:
                server.stop()
