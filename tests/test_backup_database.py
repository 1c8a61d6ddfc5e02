"""The example task that dumps databases, against a real MariaDB and a real PostgreSQL.

More that only real servers can show, and what they show of the rest:

BGTASKS_FULL=1 python -m pytest tests/test_backup_database.py
"""

import contextlib
import gzip
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import PROGRAM, Site, wait_for

import bgtasks

pytestmark = pytest.mark.unmeasured

FILE = PROGRAM.parent / "contrib" / "tasks" / "backup_database.sh"
PAGE = (FILE.parent / "README.md").read_text()
SECTION = PAGE[PAGE.index("## backup_database.sh") :].split("\n## ")[0]
PASSWORD = "horse-7-battery"
TABLES = """
CREATE TABLE amount (id INTEGER PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE note (id INTEGER PRIMARY KEY, content VARCHAR(100));
CREATE VIEW rich AS SELECT id FROM amount WHERE value > 0;
INSERT INTO note VALUES (1, 'naïve 日本語 😀 ''quoted'' \\n');
INSERT INTO amount VALUES (0, 0), (1, 0), (2, 0), (3, 0);
"""
ROUTINE = {
    "mariadb": "CREATE PROCEDURE answer() SELECT 42;",
    "postgresql": "CREATE FUNCTION answer() RETURNS int LANGUAGE sql AS 'SELECT 42';",
}
ASKED = {"mariadb": "CALL answer()", "postgresql": "SELECT answer()"}


def lines(word):
    """Return the lines of code of the page that hold a word."""
    return [line.strip() for line in SECTION.splitlines() if line[:4] == "    " and word in line]


def granted(name):
    """Return what the page says that the user needs, for a database of this name."""
    found = [re.sub("--.*", "", line) for line in lines("GRANT")]
    wanted = [line for line in found if ("pg_" in line) == (name == "postgresql")]
    assert wanted
    return "\n".join(wanted)


# -- servers


def programs(folder, *names):
    found = [shutil.which(name, path=f"{folder}:{os.environ['PATH']}:/usr/sbin") for name in names]
    why = f"one of these is not installed: {', '.join(names)}"
    if None in found and not os.environ.get("CI"):
        pytest.skip(why)
    assert None not in found, why
    return found


class Server:
    """A server in a folder of its own, reached by a socket in it only."""

    def __init__(self, folder):
        self.folder = folder
        root = os.geteuid() == 0
        self.user = pwd.getpwnam("nobody") if root else pwd.getpwuid(os.geteuid())
        os.chown(folder, self.user.pw_uid, self.user.pw_gid)
        self.rights = {"user": self.user.pw_uid, "group": self.user.pw_gid} if root else {}
        self.install()
        self.process = self.start(*self.command())

    def start(self, *command):
        with open(self.folder / "said", "a") as said:
            return subprocess.Popen(
                command, cwd=self.folder, stdout=said, stderr=said, **self.rights
            )

    def answers(self):
        assert self.process.poll() is None, (self.folder / "said").read_text()
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.ask("SELECT 1") == "1"

    def stop(self):
        self.process.send_signal(signal.SIGINT if self.name == "postgresql" else signal.SIGTERM)
        self.process.wait(120)

    def client(self, database=""):
        return [*self.as_admin, *([database] if database else [])]

    def ask(self, sql, database=""):
        done = subprocess.run(
            self.client(database), input=sql, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()


class MariaDb(Server):
    name = "mariadb"

    def install(self):
        install, self.program, client, _ = programs(
            "", "mariadb-install-db", "mariadbd", "mariadb", "mariadb-dump"
        )
        normal = ["--auth-root-authentication-method=normal", "--skip-test-db", "--no-defaults"]
        self.start(install, *normal, f"--datadir={self.folder}/data").wait(120)
        self.socket = self.folder / "socket"
        options = f"[client]\nsocket={self.socket}\nuser=root\ndefault-character-set=utf8mb4\n"
        (self.folder / "admin.cnf").write_text(options)
        self.as_admin = [client, f"--defaults-file={self.folder}/admin.cnf", "-Nn"]

    def command(self):
        small = ["--innodb-buffer-pool-size=8M", "--innodb-flush-log-at-trx-commit=0"]
        small += ["--skip-networking", "--innodb-log-file-size=8M", "--max-connections=20"]
        places = [f"--datadir={self.folder}/data", f"--socket={self.socket}"]
        places += [f"--tmpdir={self.folder}", "--innodb-flush-method=nosync"]
        return [self.program, "--no-defaults", *small, *places]

    def make_user(self):
        self.ask("CREATE DATABASE shop CHARACTER SET utf8mb4")
        self.ask(f"CREATE USER backup@localhost IDENTIFIED BY '{PASSWORD}'")
        self.ask(granted(self.name))

    def defaults(self, password=PASSWORD):
        return f"[client]\nsocket={self.socket}\nuser=backup\npassword={password}\n"

    def lock(self, database):
        return self.client(database), "LOCK TABLES amount WRITE; SELECT 'locked';\n"

    def restore_line(self):
        (line,) = lines("| mariadb")
        return line.replace("/root/admin.cnf", f"{self.folder}/admin.cnf")


class PostgreSql(Server):
    name = "postgresql"

    def install(self):
        place = max(Path("/usr/lib/postgresql").glob("*/bin"), default="")
        initdb, self.program, client, _ = programs(place, "initdb", "postgres", "psql", "pg_dump")
        (self.folder / "password").write_text(PASSWORD)
        self.start(
            *(initdb, "-D", self.folder / "data", "-U", "root", "--no-sync", "-E", "UTF8"),
            *("--locale=C", "--auth=scram-sha-256", f"--pwfile={self.folder}/password"),
        ).wait(120)
        service = f"[client]\nhost={self.folder}\nuser=root\npassword={PASSWORD}\n"
        (self.folder / "admin.cnf").write_text(service)
        self.env = {"PGSERVICEFILE": str(self.folder / "admin.cnf"), "PGSERVICE": "client"}
        words = [f"{key}={value}" for key, value in self.env.items()]
        self.as_admin = ["env", *words, client, "-XqAtv", "ON_ERROR_STOP=1"]

    def command(self):
        options = ["fsync=off", "listen_addresses=", f"unix_socket_directories={self.folder}"]
        settings = [word for option in options for word in ("-c", option)]
        return [self.program, "-D", self.folder / "data", *settings]

    def client(self, database=""):
        return super().client(database or "postgres")

    def make_user(self):
        self.ask("CREATE DATABASE shop")
        self.ask(f"CREATE USER backup PASSWORD '{PASSWORD}'")
        self.ask(granted(self.name))

    def defaults(self, password=PASSWORD):
        return f"[client]\nhost={self.folder}\nuser=backup\npassword={password}\n"

    def lock(self, database):
        return self.client(database), "BEGIN; LOCK TABLE amount; SELECT 'locked';\n"

    def restore_line(self):
        (line,) = lines("| psql")
        words = " ".join(f"{key}={value}" for key, value in self.env.items())
        return line.replace("| psql", f"| {words} psql -qX")


@contextlib.contextmanager
def started(kind):
    folder = Path(tempfile.mkdtemp())  # short, because the path of a socket must be
    folder.chmod(0o755)
    try:
        server = kind(folder)
        try:
            wait_for(server.answers, 120)
            server.make_user()
            server.ask(TABLES + ROUTINE[server.name], "shop")
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


# -- the task


class Dumps:
    """The task in an installation of its own."""

    def __init__(self, site):
        self.site = site
        self.target = site.folder / "dumps"
        self.target.mkdir()
        self.defaults = site.folder / "backup.cnf"
        self.write_defaults("[client]\n")
        shutil.copy(FILE, site.tasks)
        self.env = {}

    def write_defaults(self, text):
        self.defaults.write_text(text)
        self.defaults.chmod(0o600)

    def set(self, settings="", **options):
        options = {
            "server": "mariadb",
            "databases": "shop",
            "defaults_file": self.defaults,
            "target": self.target,
            "min_free_mib": 0,
            **options,
        }
        text = "".join(
            f"task.backup_database.options.{key} = {value}\n" for key, value in options.items()
        )
        self.site.params.write_text(f"node = here\n{text}{settings}")

    def use(self, server):
        self.write_defaults(server.defaults())
        self.set(server=server.name)

    def use_program(self, body):
        """Let a program of a test be what dumps: `$database` is the name of the database."""
        folder = self.site.folder / "bin"
        folder.mkdir(exist_ok=True)
        script = f"#!/bin/sh\nfor database; do :; done\n{body}\n"
        (folder / "mariadb-dump").write_text(script)
        (folder / "mariadb-dump").chmod(0o755)
        return f"task.backup_database.env.PATH = {folder}:{os.environ['PATH']}\n"

    def run(self):
        self.said = self.site.run("run", "backup_database", "--force")
        return self.site.last("backup_database")

    def outcome(self):
        return self.run()["outcome"]

    def log(self):
        return self.said.stdout + self.said.stderr

    def files(self):
        """Return the dumps, and what else lies there but for marks of the owner."""
        return sorted(name for name in os.listdir(self.target) if not name.endswith(".owner"))

    def text(self):
        (file,) = self.target.glob("*.gz")
        return gzip.decompress(file.read_bytes()).decode()

    def dumped(self):
        return [re.sub(r"\d{8}T\d{6}Z", "TIME", name) for name in self.files()]


@pytest.fixture
def dumps(site):
    return Dumps(site)


SHOP = "backup_database.shop-TIME.sql.gz"
DUMP = 'echo "data of $database"; echo "-- Dump completed on 2026-01-31"'


def what_is_dumped_can_be_restored_as_the_page_says(real, server):
    found = real.run()
    assert (found["outcome"], found["volume"]) == ("done", 1), real.log()
    assert found["message"] == "1 of 1 dumped"
    assert real.dumped() == [SHOP]
    (file,) = real.target.glob("*.gz")
    assert file.stat().st_mode & 0o777 == 0o600
    assert real.target.stat().st_mode & 0o777 == 0o755  # as it was
    server.ask("CREATE DATABASE shop_restored")
    line = server.restore_line()
    assert "/mnt/backup/backup_database.shop-20260131T020000Z.sql.gz" in line
    line = line.replace("/mnt/backup/backup_database.shop-20260131T020000Z.sql.gz", str(file))
    subprocess.run(["sh", "-c", line], check=True, capture_output=True)
    for sql in ("SELECT * FROM note", "SELECT count(*) FROM amount", ASKED[server.name]):
        assert server.ask(sql, "shop_restored") == server.ask(sql, "shop")
    assert "😀" in server.ask("SELECT content FROM note", "shop_restored")
    assert server.ask("SELECT count(*) FROM rich", "shop_restored") == server.ask(
        "SELECT count(*) FROM rich", "shop"
    )
    server.ask("DROP DATABASE shop_restored")


def book(server, stopping, booked):
    """Move amounts from row to row in transactions, until told to stop."""
    with subprocess.Popen(
        server.client("shop"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as client:
        while not stopping.is_set():
            for number in range(20):
                a, b = number % 4, (number + 1) % 4
                client.stdin.write(
                    f"BEGIN; UPDATE amount SET value = value + 1 WHERE id = {a};\n"
                    f"UPDATE amount SET value = value - 1 WHERE id = {b}; COMMIT;\n"
                )
            client.stdin.flush()
            booked.append(1)
        client.stdin.close()
        client.wait(60)


def a_dump_is_of_one_moment_while_others_write(real, server):
    stopping, booked = threading.Event(), []
    writer = threading.Thread(target=book, args=(server, stopping, booked))
    writer.start()
    try:
        wait_for(lambda: len(booked) > 2, 60)
        assert real.outcome() == "done", real.log()
    finally:
        stopping.set()
        writer.join()
    text = real.text()
    rows = re.findall(r"\((\d),(-?\d+)\)|^(\d)\t(-?\d+)$", text, re.MULTILINE)
    values = [int(row[1] or row[3]) for row in rows]
    assert len(values) == 4
    assert sum(values) == 0


@contextlib.contextmanager
def waiting_dump(dumps, server):
    """Start the task while somebody has locked a table; yield when the dump program waits."""
    command, sql = server.lock("shop")
    dumper = {"mariadb": "mariadb-dump", "postgresql": "pg_dump"}[server.name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as locking:
        locking.stdin.write(sql)
        assert locking.stdout.readline() == "locked\n"
        running = dumps.site.start("run", "backup_database", "--force")
        try:
            yield running, wait_for(lambda: below(running.pid, dumper), 60)
        finally:
            locking.stdin.close()
            running.wait(120)


def below(pid, name):
    """Return the processes below this one, if one of them runs a program of this name."""
    table = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    found, names = {pid}, {}
    for row in sorted(rows, key=lambda row: int(row[0])):
        if int(row[1]) in found and len(row) == 3:
            found.add(int(row[0]))
            names[int(row[0])] = row[2]
    wanted = [pid for pid, args in names.items() if os.path.basename(args.split()[0]) == name]
    return (found, wanted[0]) if wanted else None


def the_password_is_in_no_argument_and_no_environment(real, server):
    with waiting_dump(real, server) as (_, (pids, dumper)):
        texts = [
            Path(f"/proc/{pid}/{what}").read_bytes()
            for pid in pids
            for what in ("cmdline", "environ")
        ]
        arguments = Path(f"/proc/{dumper}/cmdline").read_bytes()
    assert b"shop" in arguments
    assert len(texts) >= 6
    assert not any(PASSWORD.encode() in text for text in texts)
    assert real.site.last("backup_database")["outcome"] == "done"
    everything = b"".join(
        path.read_bytes() for path in real.site.state.rglob("*") if path.is_file()
    )
    assert PASSWORD.encode() not in everything


def a_dump_that_is_killed_is_no_dump(real, server, victim="dump"):
    assert real.outcome() == "done"
    before = real.files()
    with waiting_dump(real, server) as (running, (_, dumper)):
        pid = dumper if victim == "dump" else wait_for(lambda: below(running.pid, "gzip"))[1]
        os.kill(pid, signal.SIGKILL)
    found = real.site.last("backup_database")
    assert found["outcome"] == "failed"
    assert "shop: the dump failed (" in real.site.log("backup_database")
    assert real.files() == before


def one_database_that_fails_stops_no_other(real, server):
    real.set(server=server.name, databases="nowhere shop")
    found = real.run()
    assert (found["outcome"], found["volume"]) == ("failed", 1)
    assert "nowhere: the dump failed" in real.log()
    assert "not backed up: nowhere" in real.log()
    assert real.dumped() == [SHOP]


def a_wrong_password_is_said_and_leaves_nothing(real, server):
    real.write_defaults(server.defaults("wrong-horse"))
    assert real.outcome() == "failed"
    assert re.search("Access denied|authentication failed", real.log())
    assert "wrong-horse" not in real.log()
    assert real.files() == []


def a_dump_whose_gzip_is_killed_is_no_dump(real, server):
    a_dump_that_is_killed_is_no_dump(real, server, "gzip")


def a_user_of_too_few_rights_is_said_and_leaves_nothing(real, server):
    server.ask("CREATE DATABASE closed")
    server.ask("CREATE TABLE own (id INTEGER)", "closed")
    server.ask(
        "REVOKE pg_read_all_data FROM backup" if server.name == "postgresql" else "DO 1", "closed"
    )
    real.set(server=server.name, databases="closed")
    assert real.outcome() == "failed"
    assert re.search("Access denied|permission denied", real.log())
    assert real.files() == []


# each in an installation of its own, but with one server, which takes seconds to make; what can be
# seen without a real server is left to the full form
STORY = [
    what_is_dumped_can_be_restored_as_the_page_says,
    a_dump_is_of_one_moment_while_others_write,
    the_password_is_in_no_argument_and_no_environment,
    a_dump_that_is_killed_is_no_dump,
]
if os.environ.get("BGTASKS_FULL"):
    STORY += [
        a_wrong_password_is_said_and_leaves_nothing,
        a_dump_whose_gzip_is_killed_is_no_dump,
        one_database_that_fails_stops_no_other,
        a_user_of_too_few_rights_is_said_and_leaves_nothing,
    ]


@pytest.mark.parametrize("kind", [MariaDb, PostgreSql])
def test_a_real_server_is_dumped(kind, tmp_path):
    with started(kind) as server:
        for promise in STORY:
            folder = tmp_path / promise.__name__
            folder.mkdir()
            real = Dumps(Site(folder))
            real.use(server)
            promise(real, server)


# -- whatever the dump program does


BROKEN = [
    "echo half; exit 0",
    "echo half; exit 3",
    f"{DUMP}; exit 3",
    f"{DUMP}; kill -9 $$",
    "exit 0",
    "kill -9 $PPID",
]


def test_only_a_whole_dump_is_kept(dumps):
    dumps.set(dumps.use_program(DUMP))
    assert dumps.outcome() == "done", dumps.log()
    before = dumps.files()
    for body in BROKEN:
        dumps.set(dumps.use_program(body))
        assert dumps.run()["outcome"] == "failed", body
        assert re.search("shop: the dump (failed|is not complete)", dumps.log()), body
        assert dumps.files() == before


def test_only_the_last_ones_stay_and_only_of_this_database(dumps):
    old = [f"backup_database.shop-202601{day:02}T020000Z.sql.gz" for day in range(1, 6)]
    others = ["backup_database.shop-old-20260101T020000Z.sql.gz", "notes", old[0] + ".part"]
    others += ["backup_database.wiki-20260101T020000Z.sql.gz", "backup_database.shop-2.sql.gz"]
    for name in (*old, *others):
        (dumps.target / name).write_text("")
    dumps.set(dumps.use_program("exit 1"), keep=2)
    assert dumps.outcome() == "failed"
    assert dumps.files() == sorted([*old, *others])
    dumps.set(dumps.use_program(DUMP), keep=2)
    assert dumps.outcome() == "done"
    left = set(dumps.files()) - set(others)
    assert len(left) == 2
    assert old[-1] in left


def test_the_deadline_leaves_databases_to_the_next_run(dumps):
    late = "while [ $(date +%s) -lt $BGTASKS_DEADLINE ]; do sleep 0.1; done"
    program = dumps.use_program(f'{late}; echo "$database" >>{dumps.site.ledger}; {DUMP}')
    dumps.set(f"task.backup_database.deadline = 1\n{program}", databases="a b c")
    assert [dumps.outcome() for _ in range(3)] == ["more", "more", "done"]
    assert dumps.site.ledger.read_text().split() == ["a", "b", "c"]
    assert dumps.outcome() == "more"  # from the first one on again
    assert dumps.site.ledger.read_text().split() == ["a", "b", "c", "a"]


def test_after_a_failure_all_have_their_turn_again(dumps):
    late = "while [ $(date +%s) -lt $BGTASKS_DEADLINE ]; do sleep 0.1; done"
    program = dumps.use_program(f'{late}; echo "$database" >>{dumps.site.ledger}; exit 1')
    dumps.set(f"task.backup_database.deadline = 1\n{program}", databases="a b")
    assert [dumps.outcome() for _ in range(2)] == ["failed", "failed"]
    assert dumps.site.ledger.read_text().split() == ["a", "a"]


def test_a_dump_never_fills_the_disk(dumps):
    """A `df` of the test says how much is free, and the limit is the kernel's: ulimit -f."""
    df = dumps.site.folder / "bin" / "df"
    dumps.set(dumps.use_program(DUMP))
    df.write_text("#!/bin/sh\necho header; echo disk 9999 0 5120 0% /mnt\n")  # 5 MiB
    df.chmod(0o755)
    assert dumps.outcome() == "done", dumps.log()
    before = dumps.files()
    for free, size in ((0, 8), (3, 4)):
        program = dumps.use_program(f"head -c {size}000000 /dev/urandom; {DUMP}")
        dumps.set(program, min_free_mib=free)
        assert dumps.outcome() == "failed"
        assert "shop: the dump failed" in dumps.log()
        assert dumps.files() == before
    dumps.set(program, min_free_mib=0)
    assert dumps.outcome() == "done", dumps.log()
    dumps.set(program, min_free_mib=5)
    assert dumps.outcome() == "failed"
    assert f"shop: less than 5 MiB (min_free_mib) are free in {dumps.target}" in dumps.log()


def test_no_two_installations_share_a_target(dumps):
    dumps.set(dumps.use_program(DUMP))
    assert dumps.outcome() == "done", dumps.log()
    before = dumps.files()
    mark = dumps.target / ".backup_database.owner"
    assert mark.read_text() == f"here:{dumps.site.state}\n"
    mark.write_text("elsewhere:/srv/bgtasks/state\n")
    assert dumps.outcome() == "failed"
    assert f"{mark}: is of elsewhere:/srv/bgtasks/state; give each" in dumps.log()
    assert dumps.files() == before
    mark.unlink()
    assert dumps.outcome() == "done", dumps.log()


def test_the_dump_of_mysql_itself_can_be_restored_into_a_server_in_use(dumps):
    """Its `mysqldump` would also dump the state of its replication."""
    words = dumps.site.folder / "words"
    for version, expected in (("8.4.3 (MySQL Community Server)", True), ("10.19 MariaDB", False)):
        dumps.set(dumps.use_program(DUMP), server="mysql")
        program = dumps.site.folder / "bin" / "mysqldump"
        asked = f'case $1 in --version) echo "mysqldump Ver {version}"; exit;; esac'
        program.write_text(f'#!/bin/sh\n{asked}\necho "$*" >{words}\n{DUMP}\n')
        program.chmod(0o755)
        assert dumps.outcome() == "done", dumps.log()
        assert ("--set-gtid-purged=OFF" in words.read_text()) == expected


def test_what_a_killed_run_left_is_replaced(dumps):
    (dumps.target / ".backup_database.part").write_text("half a dump")
    dumps.set(dumps.use_program(DUMP))
    assert dumps.outcome() == "done"
    assert dumps.dumped() == [SHOP]
    assert dumps.text().startswith("data of shop\n")


BAD = {
    "databases": ["", "shop;ls", "-shop", "../shop", "shop $HOME", "'shop'", "shop *", 'a"b'],
    "defaults_file": ["", "/does/not/exist", "/"],
    "target": ["", "dumps", "/does/not/exist"],
    "server": ["oracle"],
    "keep": ["0", "", "-1", "many", "7 days", "99999999999"],
    "min_free_mib": ["", "1 GiB"],
}


@pytest.mark.parametrize("key", sorted(BAD))
def test_a_bad_option_is_one_clear_line_and_nothing_is_done(tmp_path, key):
    for value in BAD[key]:
        assert_refused(tmp_path, key, {key: value})


def assert_refused(folder, key, wrong, mode=0o600):
    """Start the script without a runner around it."""
    defaults, target, report = (folder / name for name in ("my.cnf", "dumps", "report"))
    defaults.write_text("[client]\n")
    defaults.chmod(mode)
    target.mkdir(exist_ok=True)
    options = bgtasks.read_raw(str(FILE))[0]["options"]
    options.update({"databases": "shop", "defaults_file": str(defaults), "target": str(target)})
    options.update(wrong)
    env = {f"BGTASKS_OPTION_{name.upper()}": str(options[name]) for name in options}
    env.update(BGTASKS_TASK="x", BGTASKS_REPORT=str(report), BGTASKS_INPUT="/dev/null")
    env.update(BGTASKS_NODE="here", BGTASKS_STATE_DIR="/srv/state", PATH=os.environ["PATH"])
    done = subprocess.run([FILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, wrong
    assert re.fullmatch(rf"options\.{key}: .+\n", done.stderr), wrong
    assert os.listdir(target) == []
    assert not report.exists()
    return done.stderr


def test_a_copy_without_options_says_what_to_set(site):
    shutil.copy(FILE, site.tasks)
    assert site.run("run", "backup_database").returncode == 1
    assert "options.databases: is empty; name the databases" in site.log("backup_database")


def test_a_defaults_file_that_others_can_read_is_refused(tmp_path):
    for mode in (0o640, 0o604, 0o666):
        said = assert_refused(tmp_path, "defaults_file", {}, mode)
        assert "my.cnf can be read by others; chmod 600 it" in said


def test_two_servers_lie_side_by_side(dumps):
    dumps.set(dumps.use_program(DUMP))
    (dumps.site.tasks / "backup_wiki.sh").symlink_to("backup_database.sh")
    text = dumps.site.params.read_text()
    own = text.replace("backup_database", "backup_wiki").replace("= shop", "= wiki")
    dumps.site.params.write_text(text + own.replace("node = here\n", ""))
    assert dumps.outcome() == "done"
    assert dumps.site.run("run", "backup_wiki").returncode == 0
    assert dumps.dumped() == [SHOP, "backup_wiki.wiki-TIME.sql.gz"]


def test_the_page_and_the_file_agree():
    options = bgtasks.read_raw(str(FILE))[0]["options"]
    assert [key for key in options if f"| `{key}` |" in SECTION] == list(options)
    examples = [line.split(" = ")[0] for line in lines("task.backup_database.options.")]
    assert {name.rpartition(".")[2] for name in examples} <= set(options)


def test_the_example_of_the_page_works(dumps):
    text = "\n".join(lines("task.backup_database."))
    text = text.replace("/srv/bgtasks/backup.cnf", str(dumps.defaults))
    text = text.replace("/mnt/backup", str(dumps.target))
    dumps.set(dumps.use_program(DUMP) + text)
    assert dumps.outcome() == "done", dumps.log()
    assert dumps.dumped() == [SHOP, SHOP.replace("shop", "wiki")]


@pytest.mark.parametrize("shell", ["dash", "bash --posix", "busybox sh"])
def test_any_shell_can_read_it(shell):
    if not shutil.which(shell.split()[0]) and not os.environ.get("CI"):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([*shell.split(), "-n", str(FILE)], check=True)


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck")
    if not program and not os.environ.get("CI"):
        pytest.skip("shellcheck is not installed")
    assert program, "shellcheck is not installed"
    subprocess.run([program, str(FILE)], check=True)
