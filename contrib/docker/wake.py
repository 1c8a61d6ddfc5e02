#!/usr/bin/env python3
"""Be process 1 of a container: wake bgtasks every 5 minutes, pass on a stop, reap orphans.

Arguments go to bgtasks, e.g. --cron_max_execution_time=60. Told to stop (SIGTERM, SIGINT) it stops
the wake-ups, which end their tasks and record it; then what is left, and itself. A wake-up that
cannot work at all, as with a bad param file, ends it with its code, so that the container shows it.
"""

from __future__ import annotations

import os
import signal
import sys
import time

HOME = os.path.dirname(os.path.abspath(__file__))  # bgtasks.py lies here too
INTERVAL = 300.0  # as a crontab line has it: the next wake-up takes over where one ends
PATIENCE = 20.0  # tasks get 10 s to end
STOPS = (signal.SIGTERM, signal.SIGINT)
AWAITED = (*STOPS, signal.SIGCHLD)
FOR_GOOD = (64, 65, 69, 70, 77, 78)  # usage, state, versions, a bug, rights, settings


def main(arguments: list[str]) -> int:
    """Wake it until told to stop; return the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)  # they wait until they are asked for
    os.chdir(HOME)
    wake_ups: set[int] = set()
    next_at = time.monotonic()
    while True:
        if time.monotonic() >= next_at:
            wake_ups.add(wake(arguments))
            next_at = max(next_at + INTERVAL, time.monotonic())
        came = signal.sigtimedwait(AWAITED, max(0.0, next_at - time.monotonic()))
        failed = reap(wake_ups)
        if failed or (came and came.si_signo in STOPS):
            stop(wake_ups)
            return failed


def wake(arguments: list[str]) -> int:
    """Start a wake-up, as a module that stays compiled; return its process."""
    command = [sys.executable, "-m", "bgtasks", *arguments]
    return os.posix_spawn(sys.executable, command, os.environ, setsigmask=[])


def reap(wake_ups: set[int]) -> int:
    """Take the ends of all children, orphans too; return the code of a wake-up that was refused."""
    refused = 0
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # there is none
            return refused
        if not pid:
            return refused
        if pid in wake_ups:
            wake_ups.remove(pid)
            code = os.waitstatus_to_exitcode(status)
            refused = code if code in FOR_GOOD else refused


def stop(wake_ups: set[int]) -> None:
    """End the wake-ups, which end their tasks; then what outlived a wake-up that was killed."""
    for pid in wake_ups:
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE
    wait_for_children(wake_ups, until)
    for pid in adopted():
        os.kill(pid, signal.SIGTERM)
    wait_for_children(None, until)


def adopted() -> list[int]:
    """Return our children: now they are the keepers of runs whose wake-up was killed.

    Not their tasks: a keeper ends its task itself, and then knows why it ended."""
    found: list[int] = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        found += [pid] * (parent == os.getpid())
    return found


def wait_for_children(those: set[int] | None, until: float) -> None:
    """Reap until those (None: all) are gone, or the time is up."""
    while time.monotonic() < until and (those is None or those):
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            (those or set()).discard(pid)
        else:
            signal.sigtimedwait([signal.SIGCHLD], 0.2)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
