"""What monitoring reads: the line of a Nagios plugin, and the text format of Prometheus."""

import re
import sqlite3
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

import bgtasks

HOSTILE = 'a|b="c\\'
FIGURE = re.compile(r"^([a-z_]+)=(\d+)(s?);;;0;$")


def check(site, code, *args):
    """Run the check and return its text and its figures, read by the plugin guidelines."""
    done = site.run("check", *args)
    assert (done.returncode, done.stderr) == (code, ""), done
    line = done.stdout
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert line.isascii()
    assert line[:-1].isprintable()
    assert line.count("|") <= 1
    text, _, figures = line[:-1].partition("|")
    word = re.match(r"BGTASKS (OK|WARNING|CRITICAL|UNKNOWN) - .", text)[1]
    assert word == ("OK", "WARNING", "CRITICAL", "UNKNOWN")[code]
    found = [FIGURE.match(figure) for figure in figures.split()]
    assert all(found)
    return text, {match[1]: int(match[2]) for match in found}


def test_all_is_well(site):
    site.shell("a", "")
    site.wake()
    text, figures = check(site, 0)
    assert text == "BGTASKS OK - 1 task"
    assert (figures["active"], figures["failing"], figures["broken"]) == (1, 0, 0)
    assert figures["wakeup_age"] < 60


def test_never_woken_is_critical(site):
    site.shell("a", "")
    assert "nobody has ever woken it" in check(site, 2)[0]


def test_a_late_wake_up_is_a_warning_and_then_critical(site):
    site.shell("a", "", schedule="manual")
    site.wake()
    for seconds, code in ((1000, 1), (7200, 2)):
        moment = time.time() - seconds
        site.change("UPDATE wakeup SET started_at = ?, ended_at = ?", moment, moment)
        text, figures = check(site, code)
        assert "wake-ups: last" in text
        assert seconds <= figures["wakeup_age"] < seconds + 60


def test_the_worst_task_is_named_and_the_others_counted(site):
    site.shell("warned", "exit 1")
    site.write("broken.py", "x = (")
    site.wake()
    text, figures = check(site, 2)
    assert text.startswith("BGTASKS CRITICAL - broken: broken: broken.py: ")
    assert text.endswith("(and 1 more)")
    assert (figures["broken"], figures["failing"]) == (1, 1)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (
            "last_outcome = 'failed', consecutive_failures = 1, not_before = 9e9",
            1,
            "failed, 1 in a row",
        ),
        (
            "last_outcome = 'failed', consecutive_failures = 4, not_before = 9e9",
            2,
            "failed, 4 in a row",
        ),
        ("next_run_at = 1000", 1, "due for"),
        ("paused_at = 1, paused_by = 'bgtasks', paused_note = 'why'", 2, "paused by bgtasks; why"),
        ("paused_at = 1, paused_by = 'ann', paused_note = 'why'", 0, "1 task"),
    ],
)
def test_failing_overdue_and_paused(site, change, code, words):
    site.shell("a", "", schedule="every 1 d")
    site.wake()
    site.change(f"UPDATE task SET {change}")
    assert words in check(site, code)[0]


def test_interrupted_and_not_acknowledged_is_a_warning_until_cleared(site):
    site.shell("a", "", schedule="every 1 d")
    site.wake()
    site.change("UPDATE run SET outcome = 'interrupted'")
    assert "a: 1 run interrupted" in check(site, 1)[0]
    site.run("clear", "a")
    check(site, 0)


def test_a_hanging_task_is_critical(site):
    site.shell("a", f"touch {site.ledger}; sleep 60", schedule="manual")
    import subprocess

    from conftest import wait_for

    process = subprocess.Popen(site.command("run", "a"))
    wait_for(site.ledger.exists)
    site.change("UPDATE run SET deadline_at = started_at - 3600")
    assert "past its deadline" in check(site, 2)[0]
    site.run("kill", "a")
    process.wait()


def test_every_failure_of_the_check_itself_is_3_with_one_valid_line(site):
    site.params.write_text("nonsense = 1\n")
    assert "unknown key" in check(site, 3)[0]
    site.params.write_text("node = here\n")
    site.shell("a", "")
    site.wake()
    (site.state / "bgtasks.db").write_text("no database at all, but long enough to be read" * 99)
    assert "is damaged" in check(site, 3)[0]
    (site.state / "bgtasks.db").unlink()
    db = sqlite3.connect(site.state / "bgtasks.db")
    db.execute('CREATE TABLE "a|b" (x)')
    db.close()
    assert "another program" in check(site, 3)[0]


def test_hostile_messages_make_no_second_line_or_figure(site):
    site.shell("a", "")
    site.wake()
    reason = "x|y=1;;;\n<b>\x1b[2J\u202e é " + "long " * 200
    site.change("UPDATE task SET error = ?", reason)
    text, _ = check(site, 2)
    assert "x/y=1;;;\\n<b>\\x1b[2J\\u202e \\xe9 long" in text
    assert len(text) < 400


def test_check_speaks_json(site):
    site.shell("a", "")
    site.wake()
    found = site.json("check")
    assert set(found) == {"level", "line", "findings"}


# -- Prometheus


def families(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


def metrics(site):
    done = site.run("metrics")
    assert (done.returncode, done.stderr) == (0, "")
    return families(done.stdout)


def value(found, name, **labels):
    (sample,) = [s for s in found[name].samples if labels.items() <= s.labels.items()]
    return sample.value


def test_the_parser_of_prometheus_reads_the_metrics(site):
    site.shell("a", "echo volume=7 >>$BGTASKS_REPORT", schedule="every 1 h")
    site.shell("b", "exit 1", schedule="every 1 h")
    site.wake()
    found = metrics(site)
    assert value(found, "bgtasks_task_runs", task="a") == 1
    assert value(found, "bgtasks_task_failures", task="b") == 1
    assert value(found, "bgtasks_task_volume", task="a") == 7
    assert value(found, "bgtasks_task_state", task="a", state="active") == 1
    assert value(found, "bgtasks_task_state", task="a", state="broken") == 0
    assert (
        abs(value(found, "bgtasks_task_last_success_timestamp_seconds", task="a") - time.time())
        < 60
    )
    assert abs(value(found, "bgtasks_last_wakeup_timestamp_seconds") - time.time()) < 60
    assert value(found, "bgtasks_info", version=bgtasks.__version__) == 1
    labels = [s.labels for s in found["bgtasks_task_last_success_timestamp_seconds"].samples]
    assert labels == [{"task": "a"}]  # b has none


def test_names_follow_the_rules_of_prometheus(site):
    site.shell("a", "")
    site.wake()
    for name, family in metrics(site).items():
        assert re.fullmatch(r"bgtasks_[a-z_]+", name)
        assert family.documentation
        assert family.type in ("gauge", "counter")
        assert (family.type == "counter") == all(s.name.endswith("_total") for s in family.samples)
        assert not re.search(r"_(ms|minutes|kb|count)\b", name)


def test_hostile_names_are_escaped():
    row = {**bgtasks.NO_TASK, "name": HOSTILE + "\n", "state": "active", "runs": 3}
    found = {"maintenance": False, "last_wakeup": None, "tasks": [row]}
    read = families("\n".join(bgtasks.metric_lines(found)) + "\n")
    assert value(read, "bgtasks_task_runs", task=HOSTILE + "\\n") == 3


def test_metrics_before_the_first_wake_up(site):
    site.shell("a", "")
    assert value(metrics(site), "bgtasks_task_runs", task="a") == 0
    assert "tasks" in site.json("metrics")
