# /// script
# [tool.bgtasks]
# description = "Take so long, and end like that: to try out schedules, deadlines and notifications"
# schedule = "manual"
#
# [tool.bgtasks.options]
# seconds = 5            # how long it works
# steps = 5              # in so many items; between two of them it looks at its deadline
# outcomes = ["done"]    # how it ends; of several, one run takes the first, the next one the second
# ///
"""End as the options say: copy or link this file into tasks.d.

The outcomes are `done`, `nothing`, `more` and `failed`, and what else may befall a task: `exit` (it
ends in the middle, without a word), `crash` (a signal ends it) and `hang` (it looks at no deadline,
until its timeout ends it).
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

OUTCOMES = ("done", "nothing", "more", "failed", "exit", "crash", "hang")


class TestError(Exception):
    """It was to fail."""

    __test__ = False  # for pytest, which takes it for tests


def run(task: Any) -> str | None:
    options = read_options(task.options)
    turn = task.state.get("turn", 0)
    outcome = options.outcomes[turn % len(options.outcomes)]
    task.state["turn"] = (turn + 1) % len(options.outcomes)
    task.save()  # a crash must not repeat for ever
    print(f"run {task.run} takes {options.seconds} s and is to be: {outcome}", flush=True)
    for step in task.each(range(options.steps)):
        time.sleep(options.seconds / options.steps)
        task.add_volume(1)
        task.progress(step + 1, options.steps)
    return end(task, outcome)


def end(task: Any, outcome: str) -> str | None:
    if outcome == "exit":
        os._exit(0)
    if outcome == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    while outcome == "hang":
        time.sleep(3600)
    if outcome == "failed":
        raise TestError("as options.outcomes wants it")
    task.message = f"{task.volume} steps"
    return {"nothing": task.NOTHING, "more": task.MORE}.get(outcome)


# --- options


class Options(NamedTuple):
    """The options with their defaults, for who leaves some of them out."""

    seconds: int = 5
    steps: int = 5
    outcomes: tuple[str, ...] = ("done",)


RULES: tuple[tuple[str, Callable[[Options], object], str], ...] = (
    ("seconds", lambda o: 0 <= o.seconds <= 86400, "must be from 0 to 86400"),
    ("steps", lambda o: 1 <= o.steps <= 100_000, "must be from 1 to 100000"),
    (
        "outcomes",
        lambda o: o.outcomes and set(o.outcomes) <= set(OUTCOMES),
        f"must be a list of some of {', '.join(OUTCOMES)}",
    ),
)


def read_options(given: dict[str, Any]) -> Options:
    """Return the options. Raises ValueError that says what is wrong with one of them."""
    options = Options(**{key: read_option(key, value) for key, value in given.items()})
    for key, holds, rule in RULES:
        if not holds(options):
            raise ValueError(f"options.{key}: {rule}")
    return options


def read_option(key: str, value: Any) -> Any:
    """Return a value as the type of its default: what a .toml leaves out is set as text."""
    if key not in Options._fields:
        raise ValueError(f"options.{key}: is unknown; there are {', '.join(Options._fields)}")
    if key == "outcomes":
        words = re.split(r"\s*,\s*", value) if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"options.{key}: must be a list of texts")
        return tuple(words)
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):
        value = int(value)
    if type(value) is not int:
        raise ValueError(f"options.{key}: must be a whole number")
    return value
