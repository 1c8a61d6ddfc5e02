"""The file keeps its shape: sections in order, no upward reach, walls, short functions."""

import ast
import re
import statistics
import subprocess
import symtable
import sys

from conftest import PROGRAM

SOURCE = PROGRAM.read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# --- (.+?) -+$")
SECTIONS = [
    "Errors and exit codes",
    "Clock",
    "Param file",
    "Settings",
    "Schedule",
    "Tasks",
    "Store",
    "Keeper",
    "Runner",
    "Notifications",
    "Reports",
    "Command line",
]
MOST_LINES = 6_000
SLOW = {"argparse", "json", "subprocess", "dataclasses", "pathlib", "logging", "tomllib", "typing"}
SLOW |= {"re", "enum", "signal", "traceback", "zoneinfo", "croniter", "tomli", "difflib", "ast"}


def section_of(lineno):
    found = [m[1] for line in LINES[:lineno] if (m := BANNER.match(line))]
    return SECTIONS.index(found[-1]) if found else -1


def definitions():
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node
        elif isinstance(node, ast.AnnAssign):
            yield node.target.id, node


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def length(function):
    return function.end_lineno - function.lineno + 1


def globals_used(table):
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
    return names.union(*(globals_used(child) for child in table.get_children()))


def test_sections_are_in_order_and_say_what_goes_in_and_out():
    assert [m[1] for line in LINES if (m := BANNER.match(line))] == SECTIONS
    banners = [i for i, line in enumerate(LINES) if BANNER.match(line)]
    assert all(LINES[i + 1].startswith("# ") and len(LINES[i]) == 100 for i in banners)


def test_a_section_uses_only_sections_above_it():
    where = {name: section_of(node.lineno) for name, node in definitions()}
    tables = symtable.symtable(SOURCE, str(PROGRAM), "exec").get_children()
    upward = [
        f"{table.get_name()} uses {used}"
        for table in tables
        if table.get_name() in where
        for used in globals_used(table)
        if where.get(used, -1) > where[table.get_name()]
    ]
    assert upward == []


def test_functions_are_short():
    lengths = [length(function) for function in functions()]
    assert max(lengths) <= 50
    assert statistics.median(lengths) < 10


def test_the_file_keeps_its_size():
    # a promise about size is only real if a test holds it; to go beyond is a decision
    assert len(LINES) < MOST_LINES


def stray(found, *sections):
    """Lines of the nodes that do not stand in one of the sections."""
    allowed = {SECTIONS.index(section) for section in sections}
    return [node.lineno for node in found if section_of(node.lineno) not in allowed]


def calls(*names):
    return [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
    ]


def test_sql_is_only_in_the_store():
    verbs = re.compile(r"^\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|PRAGMA|BEGIN)\b")
    texts = [n for n in ast.walk(TREE) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    sql = [node for node in texts if verbs.match(node.value)]
    assert sql
    assert stray(sql, "Store") == []


def test_only_the_clock_asks_for_the_time():
    asked = calls("time.time", "time.monotonic", "time.sleep", "datetime.now", "select.select")
    assert asked
    assert stray(asked, "Clock") == []


def test_only_the_command_line_prints_or_exits():
    assert stray(calls("print"), "Command line") == []
    assert stray(calls("os._exit"), "Keeper") == []
    assert stray(calls("SystemExit"), "Keeper", "Command line") == []
    assert [n.lineno for n in calls("sys.exit") if section_of(n.lineno) >= 0] == []


def test_every_transaction_takes_the_write_lock_first():
    assert re.findall(r"\bBEGIN\b(?! IMMEDIATE)", SOURCE) == []
    assert "executescript" not in SOURCE


def test_nothing_slow_is_imported_at_the_top():
    def names(node):
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names}
        return {node.module} if isinstance(node, ast.ImportFrom) else set()

    assert set().union(*(names(node) for node in TREE.body)) & SLOW == set()


def test_a_wake_up_with_nothing_due_imports_nothing_slow(site):
    site.python("a", "pass", schedule="daily 03:30")
    site.wake()
    code = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import bgtasks\n"
        f"code = bgtasks.main(['--param_file={site.params}', '--cron_max_execution_time=0'])\n"
        f"print(code, sorted({SLOW!r} & set(sys.modules)))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "0 []\n"
