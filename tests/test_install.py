"""What wakes it, holds it and shows it: each file of contrib is used as it is, by the real program.

In a room of its own the installation lies at /srv/app, as these files say."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, wait_for
from rooms import App, Room, lacking, program

pytestmark = pytest.mark.unmeasured
ROOT = PROGRAM.parent
CONTRIB = ROOT / "contrib"
CRON = CONTRIB / "cron"
CRON_D = (CRON / "bgtasks").read_text()
FULL = os.environ.get("BGTASKS_FULL") == "1"
PATIENCE = 90.0


def readme_commands(folder):
    """Return the commands that the README of a folder shows, to be run as they are."""
    text = (CONTRIB / folder / "README.md").read_text()
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


@pytest.fixture
def room():
    room = Room()
    yield room
    room.close()


@pytest.fixture
def app(room):
    return App(room)


# -- cron


def test_crontabs_are_taken_by_crontab_itself(tmp_path):
    crontab = program("crontab", "cron")
    known = subprocess.getoutput(f"{crontab} -h")  # Debian's checks by -n, newer ones by -T
    check = [crontab, "-T" if re.search(r"\s-T\s", known) else "-n"]
    for file in (CRON / "crontab.example", tmp_path / "bgtasks"):
        (tmp_path / "bgtasks").write_text(CRON_D.replace("  www-data", ""))  # crontab takes no user
        done = subprocess.run([*check, file], capture_output=True, text=True, check=False)
        assert (done.returncode, "rror" in done.stderr) == (0, False)
    (tmp_path / "bad").write_text("*/5 * * * cd\n")
    assert subprocess.run([*check, tmp_path / "bad"], capture_output=True, check=False).returncode


def start_cron(room, prepare):
    """Start Debian's cron; its clock shows 3 s before a moment that the crontabs name."""
    crontabs, _ = room.put("/var/spool/cron/crontabs"), room.put("/run")
    crontabs.chmod(0o1730)
    (room.folder / "none").write_text("")
    room.put("/etc/crontab", room.folder / "none")
    fake = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    env = {"FAKETIME": f"{297 - time.time() % 300:+.3f}", "LD_PRELOAD": str(fake)}
    if not FULL and not fake:
        lacking("the library of faketime is missing: apt-get install faketime")
    command = ["sh", "-c", f"{prepare}\nexec {program('cron')} -f -L 15"]
    room.start(command, env={} if FULL else env, cwd=ROOT)


@pytest.mark.parametrize("way", ["account", "root"])
def test_the_real_cron_wakes_it_and_the_task_runs(room, app, way):
    app.shell("hello", 'echo "$(id -un) $(nice) $PATH" >>../ledger', schedule="always")
    app.give()
    room.put("/etc/cron.d")
    commands = readme_commands("cron")
    prepare = commands[0].replace("crontab -", "crontab -u www-data -")
    prepare = commands[1] if way == "root" else prepare
    if FULL:  # a minute of real time instead of a shifted clock
        prepare += "\nsed -i 's/^[*].5 /* /' /etc/cron.d/* /var/spool/cron/crontabs/* || true"
    start_cron(room, prepare)
    said = wait_for(lambda: app.ledger.exists() and app.ledger.read_text(), PATIENCE)
    who, nice, path = said.splitlines()[0].split(" ")
    assert (who, nice) == ("www-data", "10")
    assert path.startswith("/usr/local/sbin:")
    wait_for(lambda: '"done"' in app.say("status", "--json").stdout, PATIENCE)
