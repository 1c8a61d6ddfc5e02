"""The shell completions offer what the program has, and nothing else."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import PROGRAM

import bgtasks

pytestmark = pytest.mark.unmeasured

FOLDER = PROGRAM.parent / "contrib" / "completion"
BASH = FOLDER / "bgtasks.bash"
ZSH = FOLDER / "_bgtasks"
ZSH_TEXT = ZSH.read_text()
COMMANDS = sorted(set(bgtasks.COMMANDS) - {""})
SWITCHES = {f"--{o.key}" for o in bgtasks.OPTIONS if o.read is bgtasks.read_boolean}
SETTINGS = SWITCHES | {f"--{o.key}=" for o in bgtasks.OPTIONS if f"--{o.key}" not in SWITCHES}
SCRIPT = """
. "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_bgtasks
[ ${#COMPREPLY[@]} = 0 ] || printf '%s\\n' "${COMPREPLY[@]}"
"""

with_bash = pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
with_zsh = pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")


def bash(script, *args, path="", env=None, cwd=None):
    found = [path, os.path.dirname(sys.executable), os.environ["PATH"]]
    env = {**os.environ, "PATH": os.pathsep.join(filter(None, found)), **(env or {})}
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", str(BASH), *args],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        cwd=cwd,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def offered(*words, program=PROGRAM, script=SCRIPT, **options):
    """What bash offers for the last of these words; it takes `--a=b` for three."""
    parts = [part for word in words[:-1] for part in re.split("(=)", word) if part]
    parts += [part for part in re.split("(=)", words[-1]) if part] or [""]
    return bash(script, str(program), *parts, **options)


def tasks_of(site):
    """Two tasks; beside them what must not be offered, and must not be run by a shell."""
    ran = site.folder / "ran"
    site.shell("backup", f"touch {ran}", group="nightly")
    site.python("mail", f"open({str(ran)!r}, 'w')", group="$(touch ran)")
    site.write("$(touch ran).sh", "")
    return f"--param_file={site.params}"


# -- bash


@with_bash
def test_the_first_word_is_a_command():
    assert sorted(offered("")) == COMMANDS
    assert offered("sta") == ["status"]
    assert sorted(offered("--verbose", "--node=a", "")) == COMMANDS


@with_bash
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_flags_of_a_command_and_the_settings_are_offered_after_it(command):
    flags = {f"--{flag}" for flag in bgtasks.COMMANDS[command][1]}
    settings = SETTINGS - {f"{flag}=" for flag in flags}
    found = offered(*[command] * bool(command), "--")
    assert sorted(found) == sorted({"--help", "--version", *flags, *settings})


@with_bash
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if re.search(rf"\b{c} \[?TASK\b", bgtasks.HELP)]
)
def test_names_of_tasks_are_offered_once(site, command):
    setting = tasks_of(site)
    assert sorted(offered(setting, command, "")) == ["backup", "mail"]
    assert offered(setting, command, "ba") == ["backup"]
    assert offered(setting, "--task.mail.schedule=manual", command, "ba") == ["backup"]
    flags = sorted(f"--{flag}" for flag in bgtasks.COMMANDS[command][1])
    assert sorted(offered(setting, command, "backup", "")) == flags
    assert sorted(os.listdir(site.folder)) == ["cron.params", "tasks.d"]  # nothing ran


@with_bash
@pytest.mark.parametrize(
    ("command", "flag"),
    [(c, f) for c in COMMANDS for f in bgtasks.COMMANDS[c][1] if f not in bgtasks.BARE_FLAGS],
)
def test_the_value_of_a_flag_is_no_task(site, command, flag):
    setting = tasks_of(site)
    values = list(bgtasks.SAMPLES) if flag == "language" else []
    assert offered(setting, command, f"--{flag}", "") == values
    assert offered(setting, command, f"--{flag}=") == values
    if command != "new":
        assert offered(setting, command, f"--{flag}", "1", "ba") == ["backup"]


@with_bash
def test_languages_follow_a_name():
    assert offered("new", "") == []
    assert offered("new", "x", "") == ["--language"]
    assert offered("new", "x", "--language", "") == list(bgtasks.SAMPLES)
    assert offered("new", "x", "--language=p") == ["python", "perl", "php"]


@with_bash
def test_what_admin_does():
    assert offered("admin", "") == ["add", "remove", "list"]
    assert offered("admin", "remove", "a") == []


@with_bash
def test_names_in_settings(site):
    setting = tasks_of(site)
    assert sorted(offered(setting, "--task=")) == ["backup", "mail"]
    assert offered(setting, "--exclude_task=mail,b") == ["mail,backup"]
    assert offered(setting, "--group=") == ["nightly"]
    assert offered(setting, "--exclude_group=n") == ["nightly"]
    unsplit = "COMP_WORDBREAKS=' '" + SCRIPT
    assert offered(setting, "--task=ma", script=unsplit) == ["--task=mail"]


@with_bash
def test_files_and_folders(tmp_path):
    (tmp_path / "a b").write_text("")
    (tmp_path / "a.d").mkdir()
    assert sorted(offered("lint", "a", cwd=tmp_path)) == ["a b", "a.d"]
    assert sorted(offered(f"--param_file={tmp_path}/a")) == [f"{tmp_path}/a b", f"{tmp_path}/a.d"]
    assert offered("--param_file=x,a.", cwd=tmp_path) == ["x,a.d"]
    assert offered("lint", "a\\ ", cwd=tmp_path) == ["a b"]
    assert offered("--tasks_dir=a", cwd=tmp_path) == ["a.d"]


@with_bash
def test_it_says_nothing_when_the_program_fails(site):
    assert offered(f"--param_file={site.folder}/none", "show", "") == []
    assert offered("show", "", program=site.folder / "bgtasks.py") == []


@with_bash
@pytest.mark.parametrize("program", ["bgtasks", "bgtasks.py", "./bgtasks.py", "~/bgtasks.py"])
def test_the_program_may_be_named_in_many_ways(site, program):
    setting = tasks_of(site)
    folder = site.folder / "bin"
    folder.mkdir()
    for name in ("bgtasks", "bgtasks.py"):
        (folder / name).symlink_to(PROGRAM)
    there = {"path": str(folder), "cwd": folder, "env": {"HOME": str(folder)}}
    assert offered(setting, "show", "b", program=program, **there) == ["backup"]


@with_bash
def test_bash_knows_both_names():
    lines = bash('. "$1"; complete -p bgtasks bgtasks.py')
    assert lines == ["complete -F _bgtasks bgtasks", "complete -F _bgtasks bgtasks.py"]


# -- zsh


@with_zsh
def test_zsh_reads_its_file():
    done = subprocess.run(["zsh", "-n", str(ZSH)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_zsh_file_is_for_both_names():
    assert ZSH_TEXT.startswith("#compdef bgtasks bgtasks.py\n#")


def test_the_zsh_file_has_every_command():
    described = re.search(r"^  commands=\(\n(.*?)^  \)", ZSH_TEXT, re.DOTALL | re.MULTILINE)[1]
    assert sorted(re.findall(r"^    '(\w+):", described, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_zsh_file_has_every_flag(command):
    branch = re.search(rf"^        {command}\)(.*?);;", ZSH_TEXT, re.DOTALL | re.MULTILINE)[1]
    flags = bgtasks.COMMANDS[command][1]
    wanted = {f"--{flag}" + "=" * (flag not in bgtasks.BARE_FLAGS) for flag in flags}
    assert set(re.findall(r"--\w+=?", branch)) == wanted
    names = re.search(rf"\b{command} \[?TASK\b", bgtasks.HELP)
    assert ("$task" in branch) == bool(names)


def test_the_zsh_file_has_every_setting():
    listed = re.search(r"^  settings=\(\n(.*?)^  \)", ZSH_TEXT, re.DOTALL | re.MULTILINE)[1]
    keys = [option.key for option in bgtasks.OPTIONS]
    assert re.findall(r"^    '--(\w+)", listed, re.MULTILINE) == [*keys, "help", "version"]


def test_the_zsh_file_has_every_language():
    assert f"({' '.join(bgtasks.SAMPLES)})" in ZSH_TEXT
