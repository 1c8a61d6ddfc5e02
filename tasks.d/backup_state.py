# /// script
# [tool.bgtasks]
# description = "Keep the last backups of the state"
# schedule = "daily 03:30"
# timeout = "30 min"
# options = { keep = 7, folder = "backups" }
# ///
"""A Python task: bgtasks imports nothing of it and calls run(task) in a process of its own.

Restore a backup while no runner is at work: remove state/bgtasks.db-journal, and copy it to
state/bgtasks.db. Its own run is in it without an end; the next wake-up calls it interrupted.
"""

import os
import sqlite3
import time
from contextlib import closing


def run(task):
    folder = os.path.join(task.state_dir, task.options["folder"])
    os.makedirs(folder, mode=0o700, exist_ok=True)
    name = time.strftime("bgtasks-%Y%m%d-%H%M%S.db", time.gmtime())
    unfinished = os.path.join(folder, "unfinished")
    copy(task, os.path.join(task.state_dir, "bgtasks.db"), unfinished)
    os.replace(unfinished, os.path.join(folder, name))  # a backup appears whole, or not at all
    task.add_volume(1)
    removed = remove_all_but(task.options["keep"], folder)
    return f"{name} written, {removed} older removed"


def copy(task, source, target):
    """SQLite's own backup is consistent while others write: never copy the bare file."""
    if os.path.exists(target):
        os.unlink(target)

    def progress(_status, remaining, total):
        task.progress(total - remaining, total)
        if task.should_stop:
            raise TimeoutError("the deadline came before the copy was complete")

    with closing(sqlite3.connect(source)) as from_db, closing(sqlite3.connect(target)) as to_db:
        from_db.backup(to_db, pages=1000, progress=progress)
        found = to_db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise ValueError(f"the copy is damaged: {found}")


def remove_all_but(keep, folder):
    backups = sorted(name for name in os.listdir(folder) if name.startswith("bgtasks-"))
    old = backups[: -max(1, keep)]
    for name in old:
        os.unlink(os.path.join(folder, name))
    return len(old)
