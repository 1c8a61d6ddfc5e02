"""Every command and every example of README, docs and contrib does what the page says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from conftest import PROGRAM
from smtp_server import MailSink
from story import ROOT, Story, blocks_of

import bgtasks

pytestmark = pytest.mark.unmeasured

README = (ROOT / "README.md").read_text()
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
CONTRIB = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "contrib").rglob("README.md"))
PAGES = ["README.md", *DOCS, *CONTRIB]

# Pages whose examples need servers, databases, dates or root: which tests run them.
ELSEWHERE = {
    "contrib/migrate": ("test_migrate.py",),
    "contrib/tasks": ("test_backup.py", "test_chores_files.py", "test_figures.py"),
}
# What cannot be run here: how such a line begins, and why.
NOT_RUN = {
    "crontab line ->": "a picture",
    "python3 tests/run.py": "runs these tests",
    "python3 contrib/bench/bench.py": "takes ten minutes, and other work spoils what it measures",
    "curl ": "asks a web server of the reader; test_web_servers.py has some",
    "[Service]": "a part of a unit; test_web_servers.py has whole ones",
    "User=": "the same",
    "WorkingDirectory=": "the same",
    "ExecStart=": "the same",
    "KillMode=": "the same",
    "schtasks.exe ": "a program of Windows",
    "powershell ": "a program of Windows",
    "docker ": "needs a Docker daemon",
    "install -d -o www-data ": "needs root and this user; test_install.py has both",
    "launchctl ": "a program of macOS",
    "bgtasks-textfile ": "reads as the owner of /srv/app, and he may not; test_install.py runs it",
    "loginctl ": "needs systemd at work",
    "systemctl ": "needs systemd at work; test_install.py enables the units in a folder",
    "logrotate ": "not on every machine; test_install.py runs it",
    "promtool ": "not on every machine; test_install.py runs it",
    "contrib/monitoring/healthchecks.sh ": "asks a server; test_install.py has one",
    "python3 contrib/zipapp/build.py": "needs a package index; test_packaging.py has one",
    "scp ": "needs a second machine",
    "pip install ": "needs a package index; test_packaging.py has one",
    "uv run ": "the same",
}
ANSWERS = {"admin add anna": "correct horse\n"}


def blocks(page):
    return blocks_of((ROOT / page).read_text(), page)


def needs_croniter(page):
    texts = [block.text for block in blocks(page) if block.kind in ("file", "command")]
    return any(re.search(r"[\d*] \* \* [\w*]", text) for text in texts)


def furnish(story):
    """Give a story the system that its page comes from: its dump, and where it lies."""
    import migrate_tables

    (story.folder / "dump").write_text(migrate_tables.TABLES + migrate_tables.ROWS)
    story.program("mysqldump", f"#!/bin/sh\nexec cat {story.folder}/dump\n")
    for path in ("var/www/itop/approot.inc.php", "var/www/glpi/front/cron.php", "srv/shop/app/x"):
        (story.folder / path).parent.mkdir(parents=True)
        (story.folder / path).touch()


STORIES = [page for page in PAGES if blocks(page) and os.path.dirname(page) not in ELSEWHERE]


@pytest.mark.parametrize("page", STORIES)
def test_a_page_does_what_it_says(page, tmp_path):
    if needs_croniter(page):
        pytest.importorskip("croniter", reason="croniter is not installed")
    has_tasks = page in ("README.md", "docs/upgrade-and-backup.md")
    story = Story(tmp_path, not_run=NOT_RUN, answers=ANSWERS, with_tasks=has_tasks)
    if "coming-from-" in page:
        furnish(story)
    with MailSink() as sink:
        where = " ".join(f"--{line.replace(' = ', '=')}" for line in sink.params().splitlines())
        story.ends = {"sendmail --now you@example.org": f" {where}"}
        story.run(blocks(page))


STORY = """\
Save it as `tasks.d/a.sh`:

```sh
#!/bin/sh
# /// script
# [tool.bgtasks]
# schedule = "every 6 h"
# ///
echo hello
```

```sh
python3 bgtasks.py run a
```

```text
hello
bgtasks: a: done
```

The next one ends with 66:

    python3 bgtasks.py run b
"""


def test_a_story_can_be_told(tmp_path):
    Story(tmp_path).run(blocks_of(STORY, "page"))


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("text\nhello", "text\ngood bye", "page:16: it says"),
        ("done\n", "done after 0.1 s\n", "page:16: it says"),
        ("run a", "run c", "page:12: exit 66"),
        ("bgtasks.py run a", "bgtasks.py start a", "page:12: exit 64"),
        ("ends with 66", "ends with 65", "page:23: exit 66"),
        ("ends with 66", "is wrong", "page:23: exit 66"),
        ("`tasks.d/a.sh`", "so", "page:3: the sentence above names no file"),
        ("every 6 h", "every 6 hoors", "page:12: exit"),
    ],
)
def test_a_page_that_is_wrong_is_found(tmp_path, old, new, what):
    assert old in STORY
    with pytest.raises(AssertionError, match=re.escape(what)):
        Story(tmp_path).run(blocks_of(STORY.replace(old, new), "page"))


def test_output_without_a_command_is_found(tmp_path):
    with pytest.raises(AssertionError, match="page:1: nothing was run"):
        Story(tmp_path).run(blocks_of("```text\nhello\n```\n", "page"))


PLACES = """
    echo mine >/etc/cron.d/never
    install -m 755 bgtasks.py /usr/local/sbin/never
    cat '/etc/cron.d/never' "/srv/app/tasks.d/../../../etc/cron.d/never"
"""


def test_a_story_changes_nothing_of_the_machine(tmp_path):
    story = Story(tmp_path)
    story.run(blocks_of(PLACES, "page"))
    assert story.said.split() == ["mine", "mine"]
    assert (tmp_path / "usr/local/sbin/never").exists()
    assert not any(os.path.exists(f"{place}/never") for place in ("/etc/cron.d", "/usr/local/sbin"))


def test_an_example_that_is_not_run_has_a_reason_that_is_needed():
    lines = [line for page in STORIES for block in blocks(page) for line in block.lines]
    unused = [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)]
    assert not unused


@pytest.mark.parametrize("folder", ELSEWHERE)
def test_a_page_that_is_run_elsewhere_is(folder):
    assert blocks(f"{folder}/README.md")
    for file in ELSEWHERE[folder]:
        assert "README" in (ROOT / "tests" / file).read_text()


def test_the_page_about_windows_says_what_the_program_says():
    code = "import sys; sys.platform = 'win32'; import bgtasks; sys.exit(bgtasks.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    page = (ROOT / "docs" / "windows.md").read_text()
    assert done.stderr.strip() in page
    assert f"ends with {done.returncode}" in page


def sentences(page):
    return re.sub(r"(?s)```.*?```", "", (ROOT / page).read_text())


def anchors(page):
    """Return the names that GitHub gives to the headings of a page."""
    heads = re.findall(r"(?m)^#+ (.*)$", sentences(page))
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", sentences(page)):
        path, _, anchor = link.partition("#")
        target = os.path.relpath(ROOT / os.path.dirname(page) / path, ROOT) if path else page
        if "://" in path:
            continue
        assert (ROOT / target).exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_within_a_sentence_is_one(page):
    for code in re.findall(r"`([^`]+)`", sentences(page)):
        _, program, command = code.partition("bgtasks.py ")
        if program:
            bgtasks.split_arguments(shlex.split(re.split("[|<>]", command)[0]))


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_every_setting_within_a_sentence_is_one(page):
    known = {option.key for option in bgtasks.OPTIONS}
    known |= {*bgtasks.TASK_SETTINGS, "command", "script", "key"}
    found = re.findall(r"`(?:task\.\w+\.)?([a-z_]+) = ", sentences(page))
    assert set(found) <= known


def test_the_list_of_questions_has_every_page():
    questions = (ROOT / "docs" / "README.md").read_text()
    pages = {os.path.basename(page) for page in DOCS} - {"README.md"}
    assert not [page for page in pages if f"({page})" not in questions]
    assert "(docs/README.md)" in README


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
