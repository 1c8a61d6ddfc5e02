#!/usr/bin/env python3
"""Move into bgtasks from cron, anacron, iTop, GLPI, Magento or privacyIDEA, and out of it again.

    crontab, anacrontab, task table -> Draft -> task files, and what they do not carry over
    an installation -> Leaving -> crontab, systemd timers, Kubernetes CronJobs, and what is lost

Nothing is changed where the tasks come from, and nothing is overwritten: all files go into a folder
that must be new or empty, and appear there together or not at all. The files beside this one belong
to it; it needs bgtasks.py, beside it or up to two folders above. Its README says more.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Callable

from crontabs import read_anacrontab, read_crontab
from drafts import Files, Haul, MigrateError, bgtasks, deliver, files_of, open_source
from leaving import TARGETS, leave
from systems import SYSTEMS, read_system


def from_crontabs(call: argparse.Namespace, *, user_column: bool) -> Haul:
    haul = Haul()
    for path in call.sources or ["-"]:
        name = os.path.basename(path)
        in_folder = os.path.basename(os.path.dirname(os.path.abspath(path))) == "cron.d"
        if user_column and in_folder and not re.fullmatch("[A-Za-z0-9_-]+", name):
            haul.remarks.append(f"{path}: is left out: cron reads no file of this name")
            continue
        with open_source(path) as file:
            shown = "crontab" if path == "-" else path
            found = read_crontab(shown, file.read(), user_column=user_column)
        haul.drafts += found.drafts
        haul.remarks += found.remarks
    return haul


def from_anacrontab(call: argparse.Namespace) -> Haul:
    path = one_source(call)
    with open_source(path) as file:
        return read_anacrontab(path, file.read())


def from_system(call: argparse.Namespace) -> Haul:
    return read_system(call.what, one_source(call), call.defaults_file, call.root)


def one_source(call: argparse.Namespace) -> str:
    if len(call.sources) != 1:
        raise MigrateError(f"{call.what} needs one source; see --help")
    return str(call.sources[0])


def to_target(call: argparse.Namespace) -> Files:
    if call.sources:
        raise MigrateError(f"{call.what} reads an installation, no file: name its --param_file")
    return leave(call.what, call.param_file, call.image)


SOURCES: Mapping[str, Callable[[argparse.Namespace], Haul]] = {
    "crontab": lambda call: from_crontabs(call, user_column=False),
    "system_crontab": lambda call: from_crontabs(call, user_column=True),
    "anacrontab": from_anacrontab,
    **dict.fromkeys(SYSTEMS, from_system),
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="migrate.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("what", choices=[*SOURCES, *TARGETS], help="where the tasks come from, or go to")
    add("sources", nargs="*", help="crontabs (- is stdin); a dump, a SQLite file, mysql:DATABASE")
    add("--root", default="", help="the folder in which the system lies")
    add("--defaults_file", default="", help="login for mysql:DATABASE (~/.my.cnf)")
    add("--param_file", default="", help="of the installation that is left")
    add("--image", default="", help="in which Kubernetes finds the installation")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--to", help="the folder to be written: new, or empty")
    group.add_argument("--dry_run", action="store_true", help="only print what would be written")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    os.umask(0o077)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    call = arguments().parse_args(argv)
    try:
        files = to_target(call) if call.what in TARGETS else files_of(SOURCES[call.what](call))
        deliver(files, call.to)
        sys.stdout.flush()
    except (MigrateError, bgtasks.BgtasksError) as error:
        print(f"migrate.py: {bgtasks.visible(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:  # of the output: all else is a MigrateError
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left must not fail at the end
        if not isinstance(error, BrokenPipeError):
            print(f"migrate.py: the output cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
