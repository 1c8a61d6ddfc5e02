"""Many wake-ups at the same moment, and wake-ups that are killed: nothing twice, nothing lost.

The short form runs with the other tests. All of it:
BGTASKS_FULL=1 python -m pytest -s tests/test_chaos.py
"""

import collections
import os
import random
import subprocess
import sys
import time

import pytest
from conftest import PROGRAM, wait_for

pytestmark = pytest.mark.unmeasured

FULL = bool(os.environ.get("BGTASKS_FULL"))
ROUNDS, MANY, KILLS = (20, 200, 300) if FULL else (2, 60, 24)


def add_tasks(site, count):
    """Tasks, one half Python and one half shell, that write start and end into a ledger."""
    ledger = str(site.ledger)
    python = f"""
    import os, random, time
    fd = os.open({ledger!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"start {{task.run}} {{task.name}}\\n".encode())
    time.sleep(random.random() * 0.2 if task.options.get("slow") else 0)
    os.write(fd, f"end {{task.run}} {{task.name}}\\n".encode())
    """
    shell = f"""
    echo "start $BGTASKS_RUN $BGTASKS_TASK" >>{ledger}
    sleep ${{BGTASKS_OPTION_SLOW:-0}}
    echo "end $BGTASKS_RUN $BGTASKS_TASK" >>{ledger}
    """
    for i in range(count):
        write, body = (site.python, python) if i % 2 else (site.shell, shell)
        write(f"t{i:03}", body, schedule="every 1 d", options={"slow": 0.1} if count < 10 else {})


def ledger(site):
    lines = site.ledger.read_text().splitlines() if site.ledger.exists() else []
    found = collections.defaultdict(list)
    for line in lines:
        what, run, _ = line.split()
        found[what].append(int(run))
    return found


def herd(site, count, program=PROGRAM, patience=120.0):
    """Start wake-ups at the same moment; none takes the runner lock of another."""
    readable, writable = os.pipe()
    code = f"""
import sys
sys.path[0] = {str(program.parent)!r}
import {program.stem} as bgtasks
bgtasks.Store.__init__.__defaults__ = ({patience},)  # on a busy machine it is a long queue
sys.exit(bgtasks.main())
"""
    shell = ["sh", "-c", 'read go; exec "$@"', "sh", sys.executable, "-c", code]
    wake = [*shell, f"--param_file={site.params}", "--cron_max_execution_time=0"]
    pipes = {
        "stdin": readable,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    started = [subprocess.Popen([*wake, f"--exclude_task=none{i}"], **pipes) for i in range(count)]
    os.write(writable, b"go\n" * count)
    os.close(writable)
    os.close(readable)
    return [(process.communicate()[0], process.returncode) for process in started]


def settled(site):
    """Wake it once more; tell if no run is open any longer."""
    assert site.wake().returncode == 0
    return not site.rows("SELECT * FROM run WHERE ended_at IS NULL")


def whole(site):
    assert site.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]


@pytest.mark.parametrize(("rounds", "tasks"), [(ROUNDS, 24), (1, MANY)], ids=["rounds", "many"])
def test_fifty_wake_ups_at_once_start_every_slot_once(site, rounds, tasks):
    add_tasks(site, tasks)
    for number in range(rounds):
        if number:
            site.make_due()
        assert set(herd(site, 50)) == {("", 0)}
        runs = site.rows("SELECT task, slot, outcome FROM run")
        assert {run["outcome"] for run in runs} == {"done"}
        assert len({(run["task"], run["slot"]) for run in runs}) == len(runs)
        assert len(runs) == len(ledger(site)["start"]) == tasks * (number + 1)
        whole(site)
    assert os.listdir(site.state / "runs") == []


def test_this_test_bites(site):
    source = PROGRAM.read_text()
    for before, after in (
        ("CREATE UNIQUE INDEX run_open", "CREATE INDEX run_open"),
        ("CREATE UNIQUE INDEX run_slot", "CREATE INDEX run_slot"),
        ("AND (:slot IS NULL OR next_run_at = :slot)", ""),
    ):
        assert source.count(before) == 1
        source = source.replace(before, after)
    broken = site.folder / "broken.py"
    broken.write_text(source)
    add_tasks(site, 24)
    herd(site, 20, broken, patience=10.0)
    assert len(site.rows("SELECT * FROM run")) > 24


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def kill(pid):
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        pass


@pytest.mark.parametrize("victims", ["runner", "both", "keeper"])
def test_what_is_killed_at_any_moment_loses_nothing_and_repeats_nothing(site, victims):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    add_tasks(site, 6)
    site.params.write_text("node = here\nmax_interruptions = 0\n")
    site.wake()
    for _ in range(KILLS // 3):
        site.make_due()
        runner = site.start("--cron_max_execution_time=0", "--max_parallel=3")
        time.sleep(0.05 + chance.random() * 0.5)
        keepers = children(runner.pid)
        if victims != "keeper":
            runner.kill()
        for keeper in keepers if victims != "runner" else ():
            kill(keeper)
        assert runner.wait() in (0, -9)
        whole(site)
    assert site.said.read_text() == ""
    wait_for(lambda: settled(site))
    runs = {run["id"]: run for run in site.rows("SELECT * FROM run")}
    written = ledger(site)
    slots = [(run["task"], run["slot"]) for run in runs.values()]
    assert len(set(slots)) == len(slots)
    assert set(written["start"]) <= set(runs)
    assert len(written["start"]) == len(set(written["start"]))
    ended = set(written["end"])
    assert [
        run for run in runs.values() if run["outcome"] == "interrupted" and run["id"] in ended
    ] == []
    assert [
        run for run in runs.values() if run["outcome"] == "done" and run["id"] not in ended
    ] == []
    site.make_due()
    before = len(runs)
    assert site.wake().returncode == 0
    assert len(site.rows("SELECT * FROM run")) == before + 6
    assert os.listdir(site.state / "runs") == []
    if FULL:
        print(victims, collections.Counter(run["outcome"] for run in runs.values()))
