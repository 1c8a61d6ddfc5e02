#!/usr/bin/env python3
"""What bgtasks costs, as ratios: python3 contrib/bench/bench.py [--short] [SECTION ...].

Sections: idle, runs, late, memory, clean, mail. Y is `python3 -c "import sqlite3"` of the same
interpreter, run in turn with what is measured. Medians. Every installation is made by the program
itself in a temporary folder; only long histories are written by SQL.
"""

import importlib.util
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "bgtasks.py"
PYTHON = os.environ.get("BENCH_PYTHON", "/usr/bin/python3")
SHORT = "--short" in sys.argv
TIMES = 9 if SHORT else 31
ONE_LOOK = "--cron_max_execution_time=0"


def block(schedule: str) -> str:
    return f'# /// script\n# [tool.bgtasks]\n# schedule = "{schedule}"\n# ///\n'


class Site:
    """An installation with compiled code, in a folder of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "tasks.d").mkdir()
        shutil.copy(PROGRAM, self.folder)
        subprocess.run(
            [PYTHON, "-m", "compileall", "-q", "bgtasks.py"], cwd=self.folder, check=True
        )

    def __enter__(self) -> "Site":  # noqa: PYI034 - Self is newer than Python 3.9
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def add(self, count: int, schedule: str, body: str = "pass", form: str = "py") -> None:
        for i in range(count):
            path = self.folder / "tasks.d" / f"t{i:04}.{form}"
            if form == "py":
                path.write_text(f"{block(schedule)}def run(task):\n    {body}\n")
            else:
                path.write_text(f"#!/bin/sh\n{block(schedule)}{body}\n")
                path.chmod(0o755)

    def command(self, *args: str, module: bool = True) -> list[str]:
        return [PYTHON, *(["-m", "bgtasks"] if module else ["bgtasks.py"]), *args]

    def wake(self, *args: str) -> None:
        subprocess.run(self.command(*args), cwd=self.folder, check=True)

    def add_history(self, count: int, output: str = "") -> None:
        rows: list[tuple[object, ...]] = [
            (f"t{i % 100:04}", i, i, i + 60, i + 1, f"x{i}", output) for i in range(count)
        ]
        self.sql(HISTORY, rows)

    def sql(
        self, text: str, rows: "list[tuple[object, ...]] | None" = None
    ) -> "list[tuple[float]]":
        db = sqlite3.connect(self.folder / "state" / "bgtasks.db")
        found = db.executemany(text, rows) if rows else db.execute(text)
        result = found.fetchall()
        db.commit()
        db.close()
        return result


HISTORY = (
    "INSERT INTO run (task, steps, planned_at, started_at, deadline_at, ended_at, outcome, trigger,"
    " node, live, output) VALUES (?, 0, ?, ?, ?, ?, 'done', 'cli', 'here', ?, ?)"
)


def once(command: "list[str]", folder: Path) -> float:
    """Return the seconds of one process."""
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    return time.perf_counter() - began


def in_turn(folder: Path, *commands: "list[str]") -> "list[float]":
    """Return the medians of the seconds of commands that are run in turn."""
    found: list[list[float]] = [[] for _ in commands]
    for i in range(TIMES + 1):
        for measured, command in zip(found, commands):
            seconds = once(command, folder)
            if i:  # the first round warms up
                measured.append(seconds)
    return [statistics.median(measured) for measured in found]


def peak(command: "list[str]", folder: Path) -> int:
    """Return the peak memory of one process in KiB.

    A small process starts it: what a process had before exec() counts as its own peak."""
    code = (
        "import os, sys\n"
        "pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)\n"
        "print(os.wait4(pid, 0)[2].ru_maxrss)"
    )
    small = [PYTHON, "-I", "-S", "-c", code, *command]
    done = subprocess.run(small, cwd=folder, check=True, capture_output=True, text=True)
    return int(done.stdout)


def row(what: str, value: str, target: str) -> None:
    print(f"{what:<58}{value:>14}  {target}", flush=True)


YARDSTICK = [PYTHON, "-c", "import sqlite3"]


def idle() -> None:
    for count, target in ((100, "at most 2.0 Y"), (1000, "at most 2.5 Y")):
        with Site() as site:
            site.add(count, "daily 03:30")
            site.wake(ONE_LOOK)
            module, script = site.command(ONE_LOOK), site.command(ONE_LOOK, module=False)
            y, m, s = in_turn(site.folder, YARDSTICK, module, script)
            row(f"idle wake-up, {count} tasks, python3 -m bgtasks", f"{m / y:.2f} Y", target)
            row(
                f"  peak memory, {count} tasks",
                f"{peak(module, site.folder) / 1024:.1f} MiB",
                "at most 16 MiB",
            )
            if count == 100:
                row(
                    "idle wake-up, 100 tasks, python3 bgtasks.py", f"{s / y:.2f} Y", "at most 3.0 Y"
                )
                history(site, module)


def history(site: Site, command: "list[str]") -> None:
    with Site() as other:
        other.add(100, "daily 03:30")
        other.wake(ONE_LOOK)
        other.add_history(100_000)
        ratios = []
        for _ in range(TIMES):
            without = once(command, site.folder)
            ratios.append(once(command, other.folder) / without)
        row("  with 100,000 runs of history / without", f"{statistics.median(ratios):.2f}", "1.1")


def floors(folder: Path) -> "tuple[float, float, float]":
    """Return the seconds of a durable commit, of a fork, and of fork and exec of a shell."""
    db = sqlite3.connect(folder / "floor.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = PERSIST")
    db.execute("CREATE TABLE t (x)")
    commits, forks, shells = [], [], []
    for _ in range(200):
        began = time.perf_counter()
        db.execute("INSERT INTO t VALUES (1)")
        commits.append(time.perf_counter() - began)
        began = time.perf_counter()
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        forks.append(time.perf_counter() - began)
        began = time.perf_counter()
        pid = os.fork()
        if not pid:
            os.execv("/bin/sh", ["sh", "-c", ":"])
        os.waitpid(pid, 0)
        shells.append(time.perf_counter() - began)
    db.close()
    return statistics.median(commits), statistics.median(forks), statistics.median(shells)


def runs() -> None:
    per_task: dict[str, list[float]] = {"py": [], "sh": []}
    for form, measured in per_task.items():
        with Site() as site:
            commit, fork, shell = floors(site.folder)
            site.add(200, "every 1 d", "pass" if form == "py" else ":", form)
            for _ in range(2 if SHORT else 5):
                site.wake(ONE_LOOK)
                began, ended = site.sql(
                    "SELECT started_at, ended_at FROM wakeup ORDER BY id DESC LIMIT 1"
                )[0]
                measured.append((ended - began) / 200 * 1000)
                site.sql("UPDATE task SET next_run_at = ?", [(int(time.time()) - 61,)])
                time.sleep(1)
    py, sh = statistics.median(per_task["py"]), statistics.median(per_task["sh"])
    row("200 due Python tasks, each", f"{py:.1f} ms", "at most 6 ms")
    target = shell * 1000 + 6
    row("200 due shell tasks, each", f"{sh:.1f} ms", f"at most {target:.1f} ms (fork + exec + 6)")
    row("  a commit with synchronous=FULL", f"{commit * 1000:.2f} ms", "two for each run")
    row(
        "  fork and wait / fork, exec of sh and wait",
        f"{fork * 1000:.2f} ms",
        f"{shell * 1000:.2f} ms",
    )


def late() -> None:
    seconds = 20 if SHORT else 201
    with Site() as site:
        site.add(1, "every 1 s", "import time; return str(time.time() - task.slot)")
        site.wake(f"--cron_max_execution_time={seconds}")
        found = sorted(float(m[0]) * 1000 for m in site.sql("SELECT message FROM run WHERE id > 2"))
        row(
            f"start after the slot, median of {len(found)}",
            f"{statistics.median(found):.1f} ms",
            "",
        )
        worst = found[int(len(found) * 0.99)]
        row("  99th percentile", f"{worst:.1f} ms", "at most 30 ms")
    with Site() as site:
        site.add(50, "every 10 s", "import time; return str(time.time() - task.slot)")
        site.wake("--cron_max_execution_time=25")
        last = "SELECT max(message + 0) FROM run WHERE id > 50 GROUP BY slot"
        found = [float(m[0]) * 1000 for m in site.sql(last)]
        row("the last of 50 due at the same moment", f"{statistics.median(found):.0f} ms", "400 ms")


def memory() -> None:
    goal = 1000 if SHORT else 5000
    with Site() as site:
        site.add(1, "every 1 d", "return task.MORE")
        wake = [PYTHON, "-m", "bgtasks", "--cron_max_execution_time=600"]
        runner = subprocess.Popen(wake, cwd=site.folder)
        sizes: dict[int, int] = {}
        while goal not in sizes:
            time.sleep(0.2)
            done = int(
                (site.sql("SELECT coalesce(max(id), 0) FROM run") if ready(site) else [(0,)])[0][0]
            )
            for mark in (500, goal):
                if done >= mark and mark not in sizes:
                    status = Path(f"/proc/{runner.pid}/status").read_text()
                    sizes[mark] = int(status.split("VmRSS:")[1].split()[0])
        runner.terminate()
        runner.wait()
        ratio = sizes[goal] / sizes[500]
        row(f"memory of a runner after {goal:,} runs / after 500", f"{ratio:.2f}", "at most 1.10")


def clean() -> None:
    """Measure the longest transaction of cleaning a long history, and how fast it goes."""
    count = 20_000 if SHORT else 1_000_000
    with Site() as site:
        site.add(100, "daily 03:30")
        site.wake(ONE_LOOK)
        site.add_history(count, "x" * 500)
        spec = importlib.util.spec_from_file_location("bgtasks", PROGRAM)
        assert spec
        assert spec.loader
        bgtasks = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bgtasks)
        store = bgtasks.Store(str(site.folder / "state" / "bgtasks.db"))
        held: list[float] = []
        began_at, cursor, gone = time.perf_counter(), 0, 0
        marks: dict[str, float] = {}

        def trace(sql: str) -> None:
            if sql.startswith("BEGIN"):
                marks["began"] = time.perf_counter()

        store.rows("SELECT 1")
        store._connection.set_trace_callback(trace)  # noqa: SLF001 - what is measured
        while time.perf_counter() - began_at < (2 if SHORT else 60):
            cursor, removed = store.clean(cursor, lambda _: 0.0, time.time())
            if "began" in marks:
                held.append((time.perf_counter() - marks.pop("began")) * 1000)
            gone += removed
            if not cursor:
                break
        seconds = time.perf_counter() - began_at
        store.close()
        held.sort()
        row(f"cleaning {count:,} runs: longest transaction", f"{held[-1]:.1f} ms", "at most 50 ms")
        row("  median of", f"{held[len(held) // 2]:.2f} ms", f"{gone / seconds:,.0f} runs a second")


# A mail server that takes all it is given, on a port of its own that it prints.
SINK = """
import socketserver, sys
class Session(socketserver.StreamRequestHandler):
    def say(self, text): self.wfile.write(text + b"\\r\\n")
    def handle(self):
        self.say(b"220 sink")
        for line in self.rfile:
            word = line[:4].upper()
            if word == b"DATA":
                self.say(b"354 go on")
                while self.rfile.readline() != b".\\r\\n": pass
            self.say(b"221 bye" if word == b"QUIT" else b"250 taken")
            if word == b"QUIT": return
server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Session)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
BARE = """
import os, smtplib, sys
server = smtplib.SMTP("127.0.0.1", int(sys.argv[1]), "here")
for name in sorted(os.listdir("outbox")):
    with open("outbox/" + name, "rb") as file:
        server.sendmail("a@example.org", ["b@example.org"], file.read())
    if sys.argv[2] == "remove":
        os.unlink("outbox/" + name)
server.quit()
"""


def mail() -> None:
    """Measure the sending of many mails of 10 kB beside a bare loop over one connection."""
    count = 100 if SHORT else 1000
    text = "From: a@example.org\nTo: b@example.org\nSubject: x\n\n" + "0123456789 " * 900 + "\n"
    sink = subprocess.Popen([PYTHON, "-c", SINK], stdout=subprocess.PIPE, text=True)
    assert sink.stdout
    port = sink.stdout.readline().strip()
    with Site() as site:
        shutil.copy(PROGRAM.parent / "tasks.d" / "send_mail.py", site.folder / "tasks.d")
        where = ["--smtp_host=127.0.0.1", f"--smtp_port={port}", "--smtp_security=none"]
        outbox = site.folder / "outbox"
        ours = site.command("run", "send_mail", "--force", "--verbose=0", *where)

        def sending(command: list[str], *, on_disk: bool) -> float:
            shutil.rmtree(outbox, ignore_errors=True)
            outbox.mkdir()
            for i in range(count):
                (outbox / f"{i:04}.eml").write_text(text)
            if on_disk:  # ext4 takes 0.1 ms more to remove a file that has reached the disk
                os.sync()
            began = time.perf_counter()
            subprocess.run(command, cwd=site.folder, check=True, stderr=subprocess.DEVNULL)
            return time.perf_counter() - began

        for how, on_disk, limit in (("keep", False, "at most 1.5"), ("remove", True, "")):
            bare = [PYTHON, "-c", BARE, port, how]
            pairs = [
                (sending(bare, on_disk=on_disk), sending(ours, on_disk=on_disk))
                for _ in range(TIMES // 3)
            ]
            loop, sent = map(statistics.median, zip(*pairs))
            what = "a bare smtplib loop" if limit else "one that removes them, on disk"
            row(f"{count} mails of 10 kB / {what}", f"{sent / loop:.2f}", limit)
            row("  each", f"{sent / count * 1000:.2f} ms", f"bare {loop / count * 1000:.2f} ms")
    sink.kill()


def ready(site: Site) -> bool:
    return (site.folder / "state" / "runs").exists()


def main() -> None:
    sections = {"idle": idle, "runs": runs, "late": late, "memory": memory, "clean": clean}
    sections["mail"] = mail
    chosen = [name for name in sys.argv[1:] if name in sections] or list(sections)
    version = subprocess.run([PYTHON, "--version"], capture_output=True, text=True, check=True)
    print(f"{version.stdout.strip()}, {os.cpu_count()} processors; Y = {' '.join(YARDSTICK)}")
    for name in chosen:
        sections[name]()


if __name__ == "__main__":
    main()
