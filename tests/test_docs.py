"""What README and shipped files say is what the program does."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from conftest import PROGRAM

import bgtasks

pytestmark = pytest.mark.unmeasured

ROOT = PROGRAM.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def copy():
    """A fresh copy of what is shipped, with nothing around it."""
    folder = Path(tempfile.mkdtemp())
    shutil.copy(PROGRAM, folder)
    shutil.copytree(ROOT / "tasks.d", folder / "tasks.d")
    yield folder
    shutil.rmtree(folder)


def run(folder, *args):
    command = [sys.executable, str(folder / "bgtasks.py"), *args]
    environ = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, check=False
    )


def test_the_first_command_of_the_readme_runs_what_is_shipped(copy):
    line = next(line for line in README.splitlines() if line.startswith("    python3 bgtasks.py"))
    done = run(copy, *line.split()[2:])
    assert (done.returncode, done.stderr) == (0, "")
    assert "disk_space: done after" in done.stdout
    assert "uptime: done after" in done.stdout
    assert not re.search(r"broken|failed after", done.stdout)


def test_every_shipped_task_works(copy):
    assert run(copy, "lint").returncode == 0
    for task in ("backup_state", "disk_space", "uptime"):
        done = run(copy, "run", task)
        assert done.returncode == 0, done.stderr
    backups = os.listdir(copy / "state" / "backups")
    assert len(backups) == 1
    with closing(bgtasks.Store(str(copy / "state" / "backups" / backups[0]))) as backup:
        assert backup.task("uptime")["runs"] == 0


def test_the_backup_keeps_only_the_last_ones(copy):
    folder = copy / "state" / "backups"
    run(copy, "run", "uptime")
    folder.mkdir()
    (folder / "unfinished").write_text("left by a crash")
    for i in range(9):
        (folder / f"bgtasks-2000010{i}-000000.db").write_text("")
    done = run(copy, "run", "backup_state")
    assert done.stderr.endswith("written, 3 older removed\n")
    assert len(os.listdir(folder)) == 7


def test_a_full_disk_fails_the_check_with_one_line(copy):
    done = run(copy, "run", "disk_space", "--task.disk_space.options.min_free_percent=101")
    assert done.returncode == 1
    assert "less than 101 % free:" in done.stdout


def test_the_task_of_the_readme_works(copy):
    text = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    text = "\n".join(line[3:] for line in text.split("\n"))
    uploads = copy / "uploads"
    uploads.mkdir()
    for name, age in (("old.part", 0), ("new.part", None), ("old.jpg", 0)):
        (uploads / name).write_text("")
        if age is not None:
            os.utime(uploads / name, (age, age))
    task = copy / "tasks.d" / "purge_uploads.py"
    task.write_text(text.replace("/srv/app/uploads", str(uploads)))
    done = run(copy, "run", "purge_uploads")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(uploads)) == ["new.part", "old.jpg"]


@pytest.mark.parametrize("name", sorted(bgtasks.TASK_SETTINGS))
def test_every_setting_of_a_task_is_in_the_readme(name):
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", sorted(set(bgtasks.COMMANDS) - {""}))
def test_every_command_is_in_readme_and_help(name):
    assert re.search(rf"`[^`]*\b{name}\b", README)
    assert re.search(rf"^  {name} |, {name} ", bgtasks.HELP, re.MULTILINE)


def test_every_exit_code_is_in_the_readme():
    codes = {value for name, value in vars(bgtasks).items() if name.startswith("EXIT_")}
    codes |= {error.exit_code for error in vars(bgtasks).values() if hasattr(error, "exit_code")}
    table = README[README.index("| exit code") :].split("\n\n")[0]
    assert codes <= {int(number) for number in re.findall(r"\b\d+\b", table)}


def test_every_schedule_of_the_readme_is_read():
    table = README[README.index("### Schedules") :].split("\n\n")[1]
    texts = [
        text
        for row in table.splitlines()[2:]
        for text in re.findall(r"`([^`]*)`", row.split("|")[1])
    ]
    assert len(texts) > 10
    for text in texts:
        if "*" in text or "@" in text:
            pytest.importorskip("croniter", reason="croniter is not installed")
        value = text.strip("[]").replace('"', "").split(", ") if "[" in text else text
        bgtasks.parse_schedule(value, bgtasks.Zone("UTC"))


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) < 250
