import os
import subprocess
import sys

import pytest
from conftest import PROGRAM, settings_block

import bgtasks
from bgtasks import Override


@pytest.fixture
def look(site):
    """Look at tasks.d; what was seen before is given as `known`."""

    def look(known=None, overrides=None, **values):
        found = bgtasks.read_settings({"param_file": str(site.params)}, str(site.folder / "x"))
        found = found._replace(
            overrides=overrides or {},
            values={**found.values, "tasks_dir": str(site.tasks), **values},
        )
        changed, gone, ignored = bgtasks.discover(found, known or {})
        return {task.name: task for task in changed}, gone, ignored

    return look


def known(tasks):
    script = {t.name: t.script if t.file.endswith(".toml") else "" for t in tasks.values()}
    return {
        t.name: {"file": t.file, "script": script[t.name], "fingerprint": t.fingerprint}
        for t in tasks.values()
    }


def one(look, **options):
    tasks, _, _ = look(**options)
    (task,) = tasks.values()
    return task


def broken(look, **options):
    error = one(look, **options).error
    assert error
    assert "\n" not in error
    return error


BLOCK = settings_block(schedule="every 1 h")


# -- three forms


def test_a_python_file_with_run_is_called(site, look):
    site.write("a.py", f"{BLOCK}\nraise SystemExit\ndef run(task): pass\n")
    task = one(look)
    assert (task.name, task.script, task.argv, task.error) == ("a", "a.py", (), "")


@pytest.mark.parametrize("signature", ["task", "task, x=1", "task, /", "*, x=1", "", "a, b", "*a"])
def test_run_takes_one_argument(site, look, signature):
    site.write("a.py", f"{BLOCK}\ndef run({signature}): pass\n")
    if signature.startswith("task"):
        assert one(look).error == ""
    else:
        assert broken(look).startswith("a.py:5: must be written as: def run(task):")


def test_an_async_run_is_refused(site, look):
    site.write("a.py", f"{BLOCK}\nasync def run(task): pass\n")
    assert "a.py:5:" in broken(look)


def test_a_python_file_without_run_is_executed_by_the_same_interpreter(site, look):
    path = site.write("a.py", f"{BLOCK}\nif 1:\n    def run(task): pass\n")
    assert one(look).argv == (sys.executable, str(path))


@pytest.mark.parametrize(
    ("file", "first", "mode", "argv"),
    [
        ("a.sh", "#!/bin/sh", 0o755, ("@",)),
        ("a.sh", "#!/bin/sh -e", 0o644, ("/bin/sh", "-e", "@")),
        ("a.sh", "", 0o644, ("sh", "@")),
        ("a.sh", "", 0o755, ("sh", "@")),
        ("a.pl", "", 0o644, ("perl", "@")),
        ("a.R", "", 0o644, ("Rscript", "@")),
        ("a", "#!/usr/bin/env perl", 0o644, ("/usr/bin/env", "perl", "@")),
        ("a", "", 0o755, ("@",)),
        ("a.php", "<?php", 0o644, ("php", "@")),
    ],
)
def test_how_a_program_is_started(site, look, file, first, mode, argv):
    path = site.write(file, f"{first}\n{BLOCK}\n", mode)
    assert one(look).argv == tuple(str(path) if word == "@" else word for word in argv)


def test_what_cannot_be_started_is_broken(site, look):
    site.write("a.xyz", f"{BLOCK}\n")
    assert "chmod +x" in broken(look)


def test_a_definition_names_a_command(site, look):
    site.write("a.toml", 'schedule = "manual"\ncommand = ["echo", "a b"]\n')
    task = one(look)
    assert (task.argv, task.script) == (("echo", "a b"), "")


def test_two_definitions_share_a_script_which_is_no_task(site, look):
    path = site.write("both.sh", "#!/bin/sh\n", 0o755)
    for name in ("a", "b"):
        site.write(f"{name}.toml", 'schedule = "manual"\nscript = "both.sh"\n')
    tasks, _, _ = look()
    assert sorted(tasks) == ["a", "b"]
    assert tasks["a"].argv == (str(path),)
    assert look(known(tasks)) == ({}, [], {})
    path.write_text("#!/bin/sh\n# changed\n")
    assert sorted(look(known(tasks))[0]) == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "command = []",
        'command = "x"',
        "command = [1]",
        'command = ["x"]\nscript = "y"',
        "script = 1",
    ],
)
def test_a_definition_needs_one_command_or_script(site, look, text):
    site.write("a.toml", f'schedule = "manual"\n{text}\n')
    assert "needs either command" in broken(look)


def test_a_definition_whose_script_is_not_there_is_broken(site, look):
    site.write("a.toml", 'schedule = "manual"\nscript = "../nope.sh"\n')
    assert broken(look) == "a.toml: cannot be read (No such file or directory)"


def test_command_belongs_into_a_definition(site, look):
    site.shell("a", "", command=["x"])
    assert "no setting 'command'" in broken(look)


# -- the block


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("file", ["a.sh", "a.pl", "a.php", "a.py"])
def test_the_block_is_found_in_any_language(site, look, file, end):
    head = "<?php\n" if file == "a.php" else "#!/bin/x\n"
    text = f"{head}{BLOCK}\n".replace("\n", end)
    (site.tasks / file).write_bytes(text.encode())
    assert one(look).settings["schedule"] == "every 1 h"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo", ["a.sh: has no schedule"]),
        ("# /// script\n# ///", ["has no schedule"]),
        (f"{BLOCK}\n{BLOCK}", ["a.sh:6:", "second block"]),
        ("# /// script\n# x = 1", ["a.sh:4:", "ends with '# ///'"]),
        ("# /// script\n#x = 1\n# ///", ["a.sh:3:", "begins with '# '"]),
        ("# /// script\n# [tool.bgtasks]\n# schedule = \n# ///", ["a.sh:4: Invalid value"]),
        ("# /// script\n# tool = 1\n# ///", ["a.sh:2:", "table"]),
        ("# /// script\n# [tool]\n# bgtasks = 1\n# ///", ["a.sh:2:", "table"]),
        ("# /// script\n# [tool.bgtasks\n# ///", ["a.sh:3:"]),
    ],
    ids=range(9),
)
def test_a_bad_block_is_named_with_its_line(site, look, text, words):
    site.write("a.sh", f"#!/bin/sh\n{text}\n", 0o755)
    found = broken(look)
    assert all(word in found for word in words), found


def test_a_block_without_end_at_the_end_of_the_file_is_named(site, look):
    site.write("a.sh", "#!/bin/sh\n# /// script\n# x = 1", 0o755)
    assert broken(look).startswith("a.sh:2: the block")


def test_a_definition_that_cannot_be_read_is_broken(site, look):
    site.write("a.toml", "x = \n")
    assert broken(look).startswith("a.toml:1: ")


def test_settings_must_be_utf_8(site, look):
    (site.tasks / "a.sh").write_bytes(b"#!/bin/sh\n# /// script\n# x = 1\n# y = '\xff'\n# ///\n")
    assert broken(look) == "a.sh:4: settings must be UTF-8"


def test_a_program_with_no_text_in_it_has_no_schedule(site, look):
    (site.tasks / "a").write_bytes(bytes(range(256)) * 10)
    assert "has no schedule" in broken(look)


@pytest.mark.parametrize(
    ("text", "line"),
    [("def run(task):\n  x = (", 6), ("x = '\0'", 0), ("(" * 5000, 0), ("-" * 99999 + "1", 0)],
    ids=range(4),
)
def test_a_syntax_error_is_named_with_its_line(site, look, text, line):
    site.write("a.py", f"{BLOCK}\n{text}\n")
    assert broken(look).startswith(f"a.py:{line or ''}")


# -- settings


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("deadline", "10 min", 600.0),
        ("timeout", 90, 90.0),
        ("timeout", 1.5, 1.5),
        ("memory_limit", "64 MiB", 64 << 20),
        ("output_limit", 1024, 1024),
        ("order", -5, -5),
        ("enabled", False, False),
        ("maximum", 3, 3),
        ("settings", ["node"], ["node"]),
        ("env", {"A": "b"}, {"A": "b"}),
        ("on_interrupt", "again", "again"),
        ("schedule", ["every 1 h", "daily 03:30"], ["every 1 h", "daily 03:30"]),
        ("timezone", "Europe/Berlin", "Europe/Berlin"),
        ("nodes", "web1, web2", ["web1", "web2"]),
        ("nodes", ["web1"], ["web1"]),
        ("window", "22:00-06:00", "22:00-06:00"),
        ("missed_after", "2 h", 7200.0),
        ("retry_delay", 5, 5.0),
    ],
)
def test_accepted_settings(site, look, key, value, kept):
    text = bgtasks.json.dumps(value).replace('{"A": "b"}', '{A = "b"}')
    schedule = "" if key == "schedule" else 'schedule = "manual"\n'
    site.write("a.toml", f'{schedule}command = ["x"]\n{key} = {text}\n')
    assert one(look).settings[key] == kept


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("deadlin = 1", "no setting 'deadlin' (did you mean 'deadline'?)"),
        ("deadline = 0", "from 1 second to 366 days"),
        ('timeout = "5 parsecs"', "10 min"),
        ("timeout = true", "from 1 second"),
        ("timeout = [1]", "timeout: "),
        ("order = 1.5", "whole number"),
        ("order = 10000000", "from -1000000 to 1000000"),
        ("enabled = 1", "true or false"),
        ("nice = 20", "from 0 to 19"),
        ('memory_limit = "64 MB"', "KiB, MiB, GiB"),
        ("output_limit = 5", "from 1024"),
        ('settings = ["nod"]', "no parameter 'nod' (did you mean 'node'?)"),
        ('settings = "node"', "a list"),
        ("env = {A = 1}", "must be text"),
        ('env = {BGTASKS_RUN = "1"}', "without BGTASKS_"),
        ("options = 1", "a table"),
        ('on_interrupt = "x"', "wait, again"),
        ('window = "22:00"', "a.toml: window: '22:00'; write it as 22:00-06:00"),
        ('window = "22:00-25:00"', "window: time '25:00'"),
        ("wakeup = []", '"cli" and "web"'),
        ('wakeup = ["hand"]', '"cli" and "web"'),
        ("after = 1", "after: must be a list"),
        ("retries = -1", "from 0 to 1000"),
        ('missed_after = "0 s"', "from 1 second"),
        ("description = 1", "text in quotes"),
        ('timezone = "Europe/Berln"', "Europe/Berlin"),
    ],
)
def test_refused_settings(site, look, text, words):
    site.write("a.toml", f'schedule = "manual"\ncommand = ["x"]\n{text}\n')
    assert words in broken(look)


def test_a_bad_schedule_names_the_file(site, look):
    site.shell("a", "", schedule="every 0 min")
    assert broken(look).startswith("a.sh: schedule: ")


@pytest.mark.parametrize(("module", "package"), [("croniter", "croniter"), ("tomllib", "tomli")])
def test_a_missing_package_breaks_only_who_needs_it_and_heals(
    site, look, monkeypatch, module, package
):
    if module == "tomllib" and sys.version_info < (3, 11):
        module = "tomli"
    site.shell("a", "", schedule="*/5 * * * *")
    monkeypatch.setitem(sys.modules, module, None)
    tasks, _, _ = look()
    assert tasks["a"].error.endswith(f"needs {package}: pip install {package}")
    assert tasks["a"].fingerprint == ""
    monkeypatch.undo()
    pytest.importorskip("croniter", reason="croniter is not installed")
    assert look(known(tasks))[0]["a"].error == ""


# -- overrides from the param file


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("schedule", "*/10 * * * *", "*/10 * * * *"),
        ("options.keep", "14", 14),
        ("options.name", "14", "14"),
        ("options.on", "no", False),
        ("options.list", "a, b", ["a", "b"]),
        ("options.new", "5", "5"),
        ("timeout", "2 h", 7200.0),
        ("deadline", "2 min", 120.0),
        ("deadline", "30", 30.0),
        ("enabled", "off", False),
        ("order", "-3", -3),
        ("settings", "node", ["node"]),
        ("env.A", "x", "x"),
    ],
)
def test_an_override_takes_the_type_of_what_it_replaces(site, look, path, text, value):
    if "*" in text:
        pytest.importorskip("croniter", reason="croniter is not installed")
    options = '{keep = 7, name = "x", on = true, list = ["c"]}'
    site.write("a.toml", f'schedule = "manual"\ncommand = ["x"]\noptions = {options}\n')
    found = one(look, overrides={"a": (Override(path, text, "p:3"),)}).settings
    for key in path.split("."):
        found = found[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("shedule", "x", "no setting 'shedule' (did you mean 'schedule'?)"),
        ("options", "x", "no setting 'options'"),
        ("schedule.x", "x", "no setting"),
        ("options.keep", "many", "whole number"),
        ("options.on", "maybe", "1, 0, true"),
        ("options.keep.deep", "1", ""),
        ("timeout", "soon", "10 min"),
    ],
)
def test_a_bad_override_names_file_and_line(site, look, path, text, words):
    site.write("a.toml", 'schedule = "manual"\ncommand = ["x"]\noptions = {keep = 7, on = true}\n')
    options = {"overrides": {"a": (Override(path, text, "p:3"),)}}
    if words:
        assert broken(look, **options).startswith("p:3: ")
        assert words in broken(look, **options)
    else:
        assert one(look, **options).settings["options"]["keep.deep"] == "1"


def test_an_override_is_seen_at_the_next_look(site, look):
    site.shell("a", "")
    before = known(look()[0])
    after = look(before, overrides={"a": (Override("order", "1", "p:1"),)})[0]
    assert after["a"].settings["order"] == 1


# -- names


@pytest.mark.parametrize("files", [("a.sh", "a.py"), ("a.sh", "A.pl")])
def test_two_files_of_the_same_name_are_both_broken(site, look, files):
    for file in files:
        site.write(file, f"{BLOCK}\n", 0o755)
    tasks, _, _ = look()
    assert {task.error for task in tasks.values()} == {
        f"same name: {', '.join(sorted(files))}; rename one"
    }


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (".hidden.sh", "begins with ."),
        ("_common.py", "begins with _"),
        ("#a.sh#", "begins with #"),
        ("a.sh~", "editor"),
        ("a.sh.bak", "editor"),
        ("a.sh.swp", "editor"),
        ("a.sh.filepart", "upload"),
        ("a.sh.dpkg-new", "package manager"),
        ("README", "no program"),
        ("notes.md", "no program"),
        ("a b.sh", "letters, digits"),
        ("a.b.sh", "letters, digits"),
        ("-x.py", "letters, digits"),
        ("ä.py", "letters, digits"),
        ("x" * 65 + ".py", "letters, digits"),
        ("con.py", "Windows"),
        ("LPT1.sh", "Windows"),
    ],
)
def test_ignored_files_are_shown_with_the_reason(site, look, file, words):
    site.write(file, f"{BLOCK}\n")
    tasks, _, ignored = look()
    assert not tasks
    assert words in ignored[file]


def test_a_folder_is_ignored_and_a_link_that_leads_nowhere_broken(site, look):
    (site.tasks / "folder").mkdir()
    (site.tasks / "a.sh").symlink_to("nowhere")
    tasks, _, ignored = look()
    assert ignored == {"folder": "a folder"}
    assert tasks["a"].error == "a.sh: cannot be read (No such file or directory)"


# -- safety


def test_a_file_that_others_can_write_is_broken(site, look):
    site.shell("a", "").chmod(0o777)
    assert "chmod go-w" in broken(look)


def test_a_file_of_somebody_else_is_broken(site, look):
    os.chown(site.shell("a", ""), 4321, 0)
    assert "chown" in broken(look)


def test_a_link_is_judged_by_what_it_leads_to(site, look, tmp_path):
    folder = tmp_path / "else"
    folder.mkdir()
    target = folder / "x.sh"
    target.write_text(f"#!/bin/sh\n{BLOCK}\n")
    (site.tasks / "a.sh").symlink_to(target)
    assert one(look).error == ""
    folder.chmod(0o777)
    assert str(folder) in broken(look)


def test_a_fifo_is_broken_at_once(site, look):
    os.mkfifo(site.tasks / "a.sh")
    assert broken(look) == "a.sh: is no plain file"


# -- what did not change is not read again


def test_a_changed_file_is_read_again_and_a_gone_one_is_named(site, look):
    path = site.shell("a", "")
    site.shell("b", "")
    before = known(look()[0])
    assert look(before) == ({}, [], {})
    path.write_text(path.read_text() + "# more\n")
    assert list(look(before)[0]) == ["a"]
    path.chmod(0o700)
    before.update(known(look()[0]))
    (site.tasks / "b.sh").rename(site.tasks / "c.sh")
    changed, gone, _ = look(before)
    assert (list(changed), gone) == (["c"], ["b"])


def test_an_unchanged_folder_costs_one_scandir_and_opens_no_file(site):
    for i in range(5):
        site.shell(f"t{i}", "", schedule="daily 03:30")
    site.wake()
    code = f"""
import sys, collections
sys.path.insert(0, {str(PROGRAM.parent)!r})
import bgtasks
seen = collections.Counter()
def hook(event, args):
    if event in ("open", "os.scandir", "compile") and {str(site.tasks)!r} in str(args[:2]):
        seen[event] += 1
sys.addaudithook(hook)
code = bgtasks.main(["--param_file={site.params}", "--cron_max_execution_time=0"])
print(code, dict(seen))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 {'os.scandir': 1}\n"


def test_a_folder_that_is_not_there_is_a_config_error(site, look):
    with pytest.raises(bgtasks.ConfigError, match="nope"):
        look(tasks_dir=str(site.folder / "nope"))
