"""The tasks of an installation as a crontab, as systemd timers, or as Kubernetes CronJobs.

Task -> Leaving: a command, and moments -> text of the target, and what is lost on the way
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Callable

from crontabs import HOME_LINE, MARK, assignment, cron_input
from drafts import ALIASES, FIELDS, Files, MigrateError, bgtasks, quoted, said_of_tasks

DAY_NAMES = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
WAKE_UP = "*/5 * * * *"  # how often the crontab line of the README wakes


@dataclass
class Leaving:
    """A task that goes: how it is started there, and what it loses."""

    name: str
    settings: Mapping[str, Any]
    zone: str
    spread: bytes  # the seed of H
    by_run: list[str]  # the words of `bgtasks.py run NAME`
    argv: list[str]  # the words that start it directly
    by_bgtasks: bool
    line: tuple[str, int, bytes] | None = None  # once a line of a crontab: file, number, command
    reboot: bool = False
    paused: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def command(self) -> list[str]:
        return self.by_run if self.by_bgtasks else self.argv

    @property
    def texts(self) -> list[str]:
        text = self.settings["schedule"]
        return [" ".join(part.split()) for part in ([text] if isinstance(text, str) else text)]

    @property
    def env(self) -> Mapping[str, str]:
        """What its command finds in its environment; through bgtasks it has it from there."""
        return {} if self.by_bgtasks else self.settings["env"]

    @property
    def secrets(self) -> list[str]:
        return [key for key in self.env if bgtasks.is_secret(key)]

    @property
    def limit(self) -> int:
        """Its timeout in whole seconds, as targets read it."""
        return int(max(1, round(self.settings["timeout"])))


# --- Reading an installation ----------------------------------------------------------------------


def installation(param_file: str) -> tuple[bgtasks.Settings, list[Leaving], list[str]]:
    """Return its settings, the tasks that go, and what is said of the others."""
    given = {"param_file": param_file} if param_file else {}
    settings = bgtasks.read_settings(given, os.path.realpath(bgtasks.__file__))
    tasks = {task.name: task for task in bgtasks.discover(settings, {})[0]}
    tasks.update({task.name: task for task in bgtasks.with_after_errors(tasks.values())})
    paused, remarks, found = paused_tasks(settings.state_dir), list[str](), list[Leaving]()
    for name, task in sorted(tasks.items()):
        if task.error:
            remarks.append(f"{name}: is broken and left out: {task.error}")
            continue
        found.append(leaving(settings, task))
        found[-1].paused = name in paused or not task.settings["enabled"]
    return settings, found, remarks


def paused_tasks(state_dir: str) -> set[str]:
    path = os.path.join(state_dir, "bgtasks.db")
    if not os.path.exists(path):
        return set()
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    sql = "SELECT name FROM task WHERE paused_at > 0 AND coalesce(paused_until, :now) >= :now"
    try:
        with closing(sqlite3.connect(f"file:{name}?mode=ro", uri=True)) as db:
            return {row[0] for row in db.execute(sql, {"now": time.time()})}
    except sqlite3.Error as error:
        raise MigrateError(f"{path}: cannot be read ({error})") from None


def leaving(settings: bgtasks.Settings, task: bgtasks.Task) -> Leaving:
    """Return how a task goes: called directly, if it does without bgtasks."""
    zone = task.settings["timezone"] or settings.timezone
    content = b""
    if task.script:
        content = bgtasks.read_checked(os.path.join(settings.tasks_dir, task.script))
    params = [f"--param_file={','.join(settings.files)}"] if settings.files else []
    by_run = ["python3", os.path.realpath(bgtasks.__file__), *params, "run", task.name]
    needs_it = not task.argv or task.settings["options"] or task.settings["settings"]
    found = Leaving(
        task.name,
        task.settings,
        zone,
        f"{settings.node}/{task.name}".encode(),
        by_run,
        ["python3" if word == sys.executable else word for word in task.argv],
        bool(needs_it) or b"BGTASKS_" in content,
    )
    if task.file.endswith(".sh") and not found.by_bgtasks:
        read_line(found, content)
    return found


def read_line(found: Leaving, content: bytes) -> None:
    """Tell whether a script is still what migrate.py made of a line of a crontab."""
    _, mark, rest = content.partition(b"\n" + MARK)
    where, _, script = rest.partition(b"\n")
    place = re.fullmatch(rb"(.*), line (\d+)( @reboot)?", where)
    if not mark or not place or not script.startswith(HOME_LINE):
        return
    command, data = script[len(HOME_LINE) :], b""
    given = re.match(rb"exec <<'(INPUT_*)'\n(.*?\n)\1\n", command, re.DOTALL)
    if given:
        command, data = command[given.end() :], given[2]
    command = command[:-1] if command.endswith(b"\n") else command
    shell = found.env.get("SHELL", "/bin/sh")
    one_word = b"exec " + quoted(os.fsencode(shell)) + b" '-c' "
    if command.startswith(one_word):
        command = os.fsencode(shlex.split(os.fsdecode(command[len(one_word) :]))[0])
    elif not content.startswith(b"#!" + os.fsencode(shell) + b"\n"):
        return
    line = as_cron_text(command, data)
    if cron_input(line) == (command, data) and b"\n" not in line and line == line.lstrip(b" \t"):
        found.line = (os.fsdecode(place[1]), int(place[2]), line)
        found.reboot = bool(place[3])


def as_cron_text(command: bytes, data: bytes = b"") -> bytes:
    """Return command and input as they stand in a crontab: the opposite of cron_input()."""
    followed = rb"\\(?=\\|%|\Z)" if data else rb"\\(?=\\|%)"
    text = re.sub(followed, rb"\\\\", command).replace(b"%", b"\\%")
    if data:
        shorter = data[:-1]  # cron ends the last line by itself
        data = shorter if shorter and not shorter.endswith(b"\n") else data
        text += b"%" + data.replace(b"%", b"\\%").replace(b"\n", b"%")
    return text


# --- Schedules out --------------------------------------------------------------------------------


READ_BY_ALL = re.compile(r"\*(/\d+)?|\d+(-\d+(/\d+)?)?")


def five_fields(text: str, spread: bytes) -> list[str]:
    """Return a cron expression as lists that each cron reads, Sunday being 0."""
    words = text.lower().split()
    if any(re.search(r"[#lw]", re.sub("jul|wed", "", word)) for word in words):
        raise MigrateError(f"{text}: L, W and # are not known there; write its days by hand")
    plain = [f.plain(word) for f, word in zip(FIELDS, words)]
    if any(word.startswith("h") for word in words):
        from croniter import croniter

        lists = croniter.expand(" ".join(plain), hash_id=spread)[0]
        plain = [",".join(map(str, values)) for values in lists]
    for place, word in enumerate(words):  # all but names, `5/10`, and a Sunday that is 7
        if all(map(READ_BY_ALL.fullmatch, word.split(","))) and not (place == 4 and "7" in word):
            plain[place] = word
    return plain


def times_of(text: str) -> list[list[str]]:
    """Return `daily 07:00,19:30` and its like as lines of five fields, one for each minute."""
    days, _, times = text.lower().partition(" ")
    week = {"daily": "*", "weekdays": "1-5", "weekends": "0,6"}.get(days, "")
    by_minute: dict[int, list[str]] = {}
    for part in sorted(times.replace(" ", "").split(",")):
        by_minute.setdefault(int(part[3:]), []).append(str(int(part[:2])))
    week = week or FIELDS[4].plain(days)
    return [[str(minute), ",".join(hours), "*", "*", week] for minute, hours in by_minute.items()]


def period_of(text: str) -> int:
    return int(bgtasks.parse_schedule(text, bgtasks.Zone("UTC")).periods[0])


def grid(seconds: int) -> tuple[list[str], bool]:
    """Return a period as lines of five fields, and whether they keep it exactly."""
    minutes = max(1, round(seconds / 60))
    exact = minutes * 60 == seconds
    if 1440 % minutes == 0:
        if minutes < 60 and 60 % minutes == 0:
            return ["* * * * *" if minutes == 1 else f"*/{minutes} * * * *"], exact
        by_minute: dict[int, list[str]] = {}
        for moment in range(0, 1440, minutes):
            by_minute.setdefault(moment % 60, []).append(str(moment // 60))
        hours = {"24": "*"}
        return [
            f"{minute} {hours.get(str(len(found)), ','.join(found))} * * *"
            for minute, found in by_minute.items()
        ], exact
    if minutes < 60:
        return [f"*/{minutes} * * * *"], False
    if minutes < 1440:
        return [f"0 */{max(2, round(minutes / 60))} * * *"], False
    days = round(minutes / 1440)
    if days == 7:
        return ["0 0 * * 0"], minutes == 7 * 1440
    if days < 29:
        return [f"0 0 */{days} * *"], False
    return [f"0 0 1 */{min(12, round(days / 30))} *"], False


def cron_lines(task: Leaving) -> list[str]:
    """Return when a task starts as lines of five fields or names; none if only when asked."""
    lines: list[str] = []
    for text in task.texts:
        if text.lower() == "always":
            lines.append(WAKE_UP)
            task.notes.append("always: it started in each wake-up, now every 5 minutes")
        elif text.lower().startswith("every"):
            found, exact = grid(period_of(text))
            lines += found
            if not exact:
                task.notes.append(
                    f"{text}: cron has no such period; it comes at {', '.join(found)}"
                )
        elif text.lower() in ALIASES:
            lines.append(text.lower())
        elif text.lower() != "manual":
            lines += fields_or_none(task, text)
    return lines


def fields_or_none(task: Leaving, text: str) -> list[str]:
    try:
        if ":" in text:
            return [" ".join(line) for line in times_of(text)]
        return [" ".join(five_fields(text, task.spread))]
    except MigrateError as error:
        task.notes.append(str(error))
        return []


# --- What is lost ---------------------------------------------------------------------------------

LOST = {
    "window": "window {}: it starts outside of it too",
    "after": "after {}: it waits for nobody, and is not started by them",
    "deadline": "deadline {}: nobody asks it to stop in time",
    "timeout": "timeout {}: nobody ends it when it hangs",
    "retries": "retries {}: that many tries before the next slot do not happen",
    "pause_after_failures": "pause_after_failures {}: it goes on failing",
    "missed_after": "missed_after {}: how late a start may be is not looked at",
    "on_interrupt": "on_interrupt {}: it waits for its next slot",
    "maximum": "maximum {}: it is not told how many items to treat",
    "nice": "nice {}",
    "memory_limit": "memory_limit {}",
    "output_limit": "output_limit {}: its output is not cut",
    "nodes": "nodes {}: see to it that only these machines start it",
    "order": "order {}: tasks that are due together start together",
    "notify": "notify {}: nobody is told when it fails",
    "ping": "ping {}: nobody is called; watch over it by other means",
}
# what `bgtasks.py run` still does, and what each target can do itself
BY_BGTASKS = {
    *("deadline", "timeout", "pause_after_failures", "maximum", "nice", "memory_limit"),
    *("output_limit", "notify", "ping"),
}
KEPT = {
    "to_crontab": {"nice"},
    "to_systemd": {"timeout", "nice", "memory_limit"},
    "to_kubernetes": {"timeout", "retries", "memory_limit", "missed_after"},
}
GENERAL = {
    "to_crontab": (
        "a slot in which the machine is off is lost, a task that is slow runs twice at a time",
        "a failed run waits for its next slot; what is printed is mailed, and not kept",
    ),
    "to_systemd": (
        "a failed run waits for its next slot; see it by systemctl --failed and journalctl -u",
        "when the clocks change, systemd's rule holds: it skips what falls into the gap",
    ),
    "to_kubernetes": (
        "the image must hold the tasks at the same paths, and what they use",
        "a pod begins anew: mount a volume where a task keeps something, bgtasks' state too",
        "nobody is told of a failure, but by what watches over the cluster",
    ),
}


def note_losses(task: Leaving, target: str) -> None:
    """Say what a task has set and loses; what it has by default is said once, of all."""
    kept = KEPT[target] | (BY_BGTASKS if task.by_bgtasks else set())
    kept = kept | {"notify"} if task.line and target == "to_crontab" else kept  # MAILTO again
    if task.by_bgtasks and task.settings["window"]:
        task.notes.append(
            f"window {task.settings['window']}: a start outside of it is refused (exit code 75),"
            " and is not made up for when it opens"
        )
        kept = kept | {"window"}
    for key, text in LOST.items():
        value = task.settings[key]
        if key not in kept and value != bgtasks.TASK_SETTINGS[key][1] and value:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            shown = f"{value:.15g} s" if isinstance(value, float) else shown
            task.notes.append(text.format(shown))


# --- Targets --------------------------------------------------------------------------------------
# In: tasks. Out: files by name.


MOST_COMMAND = 998  # bytes that Debian's cron takes


def to_crontab(settings: bgtasks.Settings, tasks: Sequence[Leaving], _: str) -> dict[str, bytes]:
    """Return one table. Lines that came from a crontab stand last, below their variables."""
    lines: list[bytes] = []
    below: list[bytes] = []
    env: dict[str, str] = {}
    for task in sorted(tasks, key=lambda t: t.line or ("", 0, b"")):
        given = [pair for pair in task.env.items() if env.get(pair[0]) != pair[1]]
        assigned = [os.fsencode(f"{key}={cron_value(value)}") for key, value in given]
        is_exact = [assignment(line) for line in assigned] == given and b"\n" not in b"".join(
            assigned
        )
        if task.line and is_exact and not set(env) - set(task.env):  # nothing is ever unset
            env.update(task.env)
            below += [*assigned, *crontab_lines(task, task.line[2])]
        else:
            lines += crontab_lines(task, crontab_command(settings, task))
    return {"crontab": b"".join(line + b"\n" for line in lines + below)}


def cron_value(value: str) -> str:
    if value and value == value.strip() and value[0] not in "\"'":
        return value
    return f"'{value}'" if '"' in value else f'"{value}"'


def crontab_lines(task: Leaving, command: bytes) -> list[bytes]:
    times = ["@reboot"] if task.reboot else cron_lines(task)
    told = task.settings["description"]
    about = [os.fsencode(f"# {bgtasks.visible(told)}")] if told and told[:5] != "From " else []
    is_fit = b"\n" not in command and len(command) <= MOST_COMMAND
    if not is_fit:
        task.notes.append("cron takes no command like this: its line is a comment; use a script")
    if not times:
        task.notes.append("only starts when it is asked to: its line is a comment")
    if task.zone and "CRON_TZ" not in task.env:
        task.notes.append(f"timezone {task.zone}: cron reads the line in the machine's zone")
    off = b"# paused: " if task.paused else b"" if times and is_fit else b"# by hand: "
    command = command.replace(b"\n", b"\\n")
    return about + [off + time.encode() + b" " * bool(time) + command for time in times or [""]]


def crontab_command(settings: bgtasks.Settings, task: Leaving) -> bytes:
    """Return a line's command; what is secret must not stand in it, as all can see it in `ps`."""
    task.by_bgtasks = task.by_bgtasks or bool(task.secrets)
    words = task.command
    if task.settings["nice"] and not task.by_bgtasks:
        words = ["nice", "-n", str(task.settings["nice"]), *words]
    if task.env:
        words = ["env", *(f"{key}={value}" for key, value in task.env.items()), *words]
    text = f"cd {shlex.quote(settings.tasks_dir)} && {shlex.join(words)}"
    return as_cron_text(os.fsencode(text))


def calendars(task: Leaving) -> list[str]:
    """Return the lines of a timer."""
    lines: list[str] = []
    zone = f" {task.zone}" if task.zone else ""
    for text in task.texts:
        if text.lower().startswith("every"):
            lines += ["OnActiveSec=0", f"OnUnitActiveSec={period_of(text)}"]
        elif text.lower() != "manual":
            plain = {**ALIASES, "always": WAKE_UP}.get(text.lower(), text)
            found = fields_or_none(task, plain)
            lines += [f"OnCalendar={when}{zone}" for line in found for when in calendar(line)]
    return lines


def calendar(line: str) -> list[str]:
    """Return five fields as systemd writes them; there, both kinds of day must match."""
    words = line.split()
    minute, hour, day, month, weekday = (f.plain(word) for f, word in zip(FIELDS, words))
    names = (
        ",".join(DAY_NAMES[int(number)] for number in weekday.split(",")) if weekday != "*" else ""
    )
    time = f"{hour}:{minute}:00"
    if "*" not in (words[2][0], words[4][0]):  # either of them
        return [f"*-{month}-{day} {time}", f"{names} *-{month}-* {time}"]
    return [f"{names} *-{month}-{day} {time}".strip()]


def to_systemd(settings: bgtasks.Settings, tasks: Sequence[Leaving], _: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    owner = os.stat(settings.tasks_dir).st_uid
    for task in tasks:
        unit, times = f"bgtasks-{task.name}", calendars(task)
        if task.secrets:
            values = "".join(f"{key}={env_word(task.env[key])}\n" for key in task.secrets)
            files[f"{unit}.env"] = os.fsencode(values)
            task.notes.append(f"secrets: put {unit}.env into /etc/bgtasks, readable by root only")
        files[f"{unit}.service"] = os.fsencode(service(settings, task, unit, owner))
        about = unit_text(task.settings["description"] or task.name)
        persistent = "Persistent=true\n" if any("OnCal" in line for line in times) else ""
        if times:
            lines = "".join(f"{line}\n" for line in times)
            files[f"{unit}.timer"] = os.fsencode(
                f"[Unit]\nDescription={about}\n\n[Timer]\n{lines}{persistent}AccuracySec=1s\n\n"
                "[Install]\nWantedBy=timers.target\n"
            )
            if "OnCalendar" in lines and task.settings["missed_after"]:
                task.notes.append("missed_after: a start that is late is made up for, however late")
        else:
            task.notes.append(f"has no timer: start it by systemctl start {unit}.service")
        if task.paused:
            task.notes.append(f"is paused: leave {unit}.timer disabled")
        if "always" in task.texts:
            task.notes.append("always: it started in each wake-up, now every 5 minutes")
    return files


def service(settings: bgtasks.Settings, task: Leaving, unit: str, owner: int) -> str:
    values = task.settings
    lines = [f"WorkingDirectory={unit_text(settings.tasks_dir)}"]
    lines.append(f"User={bgtasks.user_name(owner)}")  # only then there is a HOME
    for key, value in task.env.items():
        if key not in task.secrets:
            lines.append(f"Environment={unit_word(f'{key}={value}')}")
    if task.secrets:
        lines.append(f"EnvironmentFile=/etc/bgtasks/{unit}.env")
    words = [task.command[0], *(word.replace("$", "$$") for word in task.command[1:])]
    lines.append(f"ExecStart={' '.join(map(unit_word, words))}")
    lines.append(f"TimeoutStartSec={task.limit}")
    if not task.by_bgtasks:
        lines += [f"Nice={values['nice']}"] * bool(values["nice"])
        lines += [f"MemoryMax={values['memory_limit']}"] * bool(values["memory_limit"])
    about = unit_text(values["description"] or task.name)
    body = "".join(f"{line}\n" for line in lines)
    return f"[Unit]\nDescription={about}\n\n[Service]\nType=oneshot\n{body}"


def unit_text(text: str) -> str:
    return bgtasks.visible(text).replace("%", "%%").rstrip("\\")


def unit_word(text: str) -> str:
    """Return a word of a unit file in quotes; see systemd.syntax(7)."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return '"' + text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


def env_word(text: str) -> str:
    """Return a value of an EnvironmentFile in quotes; there, % and $ mean nothing."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def to_kubernetes(
    settings: bgtasks.Settings, tasks: Sequence[Leaving], image: str
) -> dict[str, bytes]:
    if not image:
        raise MigrateError("--image is missing: the image that holds this installation")
    files: dict[str, bytes] = {}
    taken: set[str] = set()
    for task in tasks:
        times = cron_lines(task)
        name, *numbered = job_names(task.name, len(times), taken)
        if task.reboot or not times:
            task.notes.append(
                "only starts when it is asked to: it is suspended, with a schedule for show"
            )
        for job_name, schedule in zip(numbered or [name], times or ["@yearly"]):
            job = cron_job(settings, task, image, job_name, schedule, name)
            job["spec"]["suspend"] = task.paused or not times
            files[f"{job_name}.yaml"] = "".join(yaml(job)).encode()
        if len(times) > 1:
            task.notes.append(f"is {len(times)} CronJobs, which can run at the same time")
        for line in times:
            day, weekday = [*line.split(), *"*****"][2:5:2]
            if "*" not in (day, weekday) and "*" in (day[0], weekday[0]):
                task.notes.append(
                    f"{line}: Kubernetes starts it if one of the days matches, not both"
                )
        if task.paused:
            task.notes.append("is paused: suspended")
        if task.secrets:
            given = " ".join(f"--from-file={key}=FILE" for key in task.secrets)
            task.notes.append(f"secret: kubectl create secret generic {name} {given}")
    return files


def job_names(name: str, count: int, taken: set[str]) -> list[str]:
    """Return a name as Kubernetes allows it, of at most 52 letters, and numbered ones for many.

    No other task has one of them; the first also names the task's secrets."""
    base = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")[:44].rstrip("-") or "task"
    stem, turn = base, 1
    while True:
        names = [stem, *(f"{stem}-{number}" for number in range(1, count + 1) if count > 1)]
        if not taken.intersection(names):
            taken.update(names)
            return names
        turn += 1
        stem = f"{base}-{turn}"


def cron_job(
    settings: bgtasks.Settings, task: Leaving, image: str, name: str, schedule: str, secret: str
) -> dict[str, Any]:
    values = task.settings
    env: list[dict[str, Any]] = []
    for key, value in task.env.items():
        reference = {"secretKeyRef": {"name": secret, "key": key}}
        plain = {"value": value.replace("$(", "$$(")}
        env.append({"name": key, **({"valueFrom": reference} if key in task.secrets else plain)})
    container: dict[str, Any] = {
        "name": "task",
        "image": image,
        "command": [word.replace("$(", "$$(") for word in task.command],
        "workingDir": settings.tasks_dir,
    }
    if env:
        container["env"] = env
    if values["memory_limit"] and not task.by_bgtasks:
        container["resources"] = {"limits": {"memory": str(values["memory_limit"])}}
    pod = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": task.limit,
        "containers": [container],
    }
    spec: dict[str, Any] = {"schedule": schedule, "concurrencyPolicy": "Forbid"}
    if task.zone:
        spec["timeZone"] = task.zone
    if values["missed_after"]:
        spec["startingDeadlineSeconds"] = max(10, int(values["missed_after"]))
    spec["jobTemplate"] = {"spec": {"backoffLimit": values["retries"], "template": {"spec": pod}}}
    about = {"bgtasks/description": values["description"] or task.name}
    labels = {"app.kubernetes.io/part-of": "bgtasks"}
    metadata = {"name": name, "labels": labels, "annotations": about}
    return {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata, "spec": spec}


def yaml(value: Any, indent: str = "") -> list[str]:
    """Return lines of YAML, in which a text is written as JSON writes it."""
    lines: list[str] = []
    pairs = value.items() if isinstance(value, dict) else (("-", item) for item in value)
    for key, item in pairs:
        head = f"{indent}-" if key == "-" else f"{indent}{key}:"
        if isinstance(item, dict) and key == "-":
            first, *rest = yaml(item, indent + "  ")
            lines += [f"{head} {first[len(indent) + 2 :]}", *rest]
        elif isinstance(item, (dict, list)) and item:
            lines += [f"{head}\n", *yaml(item, indent + "  ")]
        else:
            text = json.dumps(item)
            if isinstance(item, str):  # in YAML, no two escapes make one sign
                text = "".join(
                    c if c < "\x7f" else f"\\U{ord(c):08x}"
                    for c in json.dumps(item, ensure_ascii=False)
                )
            lines.append(f"{head} {text}\n")
    return lines


TARGETS: Mapping[str, Callable[[bgtasks.Settings, Sequence[Leaving], str], dict[str, bytes]]] = {
    "to_crontab": to_crontab,
    "to_systemd": to_systemd,
    "to_kubernetes": to_kubernetes,
}


def leave(target: str, param_file: str, image: str) -> Files:
    """Return the files of a target, and what is lost on the way."""
    settings, tasks, remarks = installation(param_file)
    content = TARGETS[target](settings, tasks, image)
    report: list[tuple[str, list[str]]] = []
    for task in tasks:
        note_losses(task, target)
        how = "through bgtasks" if task.by_bgtasks else "directly"
        report.append((f"{task.name}: {', '.join(task.texts)}, started {how}", task.notes))
    rest = [*remarks, *(f"all tasks: {text}" for text in GENERAL[target])]
    return Files(content, [*said_of_tasks(report), *map(bgtasks.visible, rest)])
