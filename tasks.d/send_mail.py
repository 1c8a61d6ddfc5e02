# /// script
# [tool.bgtasks]
# description = "Send the mails that wait in the outbox"
# schedule = "every 1 min"
# maximum = 1000
# timeout = "30 min"
# history_lifetime = "1 d"
# settings = [
#   "outbox", "outbox_delay", "mail_from", "node", "smtp_host", "smtp_port", "smtp_security",
#   "smtp_user", "smtp_pwd", "smtp_ca_file", "sendmail_path",
# ]
# ///
"""Sends what bgtasks and other applications have put into the outbox, the oldest first.

An application puts a mail there as one file (RFC 5322), written under a name that begins with a dot
and then renamed; or it calls `bgtasks.py sendmail`. A mail that is refused for now is tried again
after 5, 10, 20 minutes ... at most 4 hours, for 4 days; one that is refused for good is moved to
`failed`, with the server's answer beside it.

No mail is lost, whenever this is killed. One is sent twice only if it is killed in the instant
between the server's answer and the removal of the file; SMTP itself has that gap (RFC 1047).
"""

import json
import os
import time

import bgtasks

FIRST_GAP, LONGEST_GAP = 300.0, 4 * 3600.0


def run(task):
    outbox, now = task.settings["outbox"], time.time()
    tries = Tries(outbox)
    names = waiting(outbox, now - task.settings["outbox_delay"])
    names = [name for name in names if tries.next_at(name) <= now]
    if not names:
        return task.NOTHING
    server = bgtasks.MailServer(task.settings)
    refused = 0
    try:
        for number, name in enumerate(task.each(names)):
            sent = send(server, os.path.join(outbox, name), task.settings, tries)
            task.add_volume(sent)
            refused += not sent
            task.progress(number + 1, len(names))
    except bgtasks.MailServerError as error:
        give_up_old(outbox, names, str(error))
        raise
    finally:
        server.close()
        tries.save(keep=set(os.listdir(outbox)))
    return f"{refused} not sent" if refused else None


def waiting(outbox, until):
    """Return the names of the mails that lie there since ``until`` or longer, the oldest first."""
    found = []
    for entry in os.scandir(outbox) if os.path.isdir(outbox) else ():
        notice = entry.name.startswith(bgtasks.OURS) and entry.name.endswith(".json")
        unfinished = entry.name.startswith(".") or entry.name.endswith((".tmp", ".part"))
        if not notice and not unfinished and not entry.is_dir(follow_symlinks=False):
            found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
    return [name for arrived, name in sorted(found) if arrived <= until * 1e9]


def send(server, path, params, tries):
    """Send one mail, and note who refused it; tell whether all have taken it."""
    name = os.path.basename(path)
    refused = bgtasks.send_file(server, path, params, tries.rest(name))
    if not refused:
        return refused is not None
    later = {address: answer for address, answer in refused.items() if answer[0] < 500}
    never = {address: answer for address, answer in refused.items() if answer[0] >= 500}
    if later and time.time() - os.stat(path).st_mtime < bgtasks.OLDEST_MAIL_SECONDS:
        if never:
            bgtasks.give_up(path, bgtasks.answers(never), copy=True)
        tries.note(name, later)
    else:
        bgtasks.give_up(path, bgtasks.answers(refused))
    return False


def give_up_old(outbox, names, answer):
    """Move what the server could not be asked about for days out of the way."""
    for name in names:
        path = os.path.join(outbox, name)
        try:
            old = time.time() - os.lstat(path).st_mtime > bgtasks.OLDEST_MAIL_SECONDS
        except FileNotFoundError:
            continue
        if old:
            bgtasks.give_up(path, answer)


class Tries:
    """What was refused for now: how often, by whom, and when it is tried again; a file by name."""

    def __init__(self, outbox):
        self._path = os.path.join(outbox, ".tries.json")
        try:
            with open(self._path) as file:
                self._known = json.load(file)
        except (OSError, ValueError):
            self._known = {}

    def next_at(self, name):
        return self._known.get(name, {}).get("next_at", 0)

    def rest(self, name):
        """Return who has not taken a mail yet; nobody if it is new."""
        return tuple(self._known.get(name, {}).get("rest", ()))

    def note(self, name, refused):
        number = self._known.get(name, {}).get("number", 0) + 1
        next_at = time.time() + min(FIRST_GAP * 2.0 ** (number - 1), LONGEST_GAP)
        known = {"number": number, "next_at": next_at, "rest": list(refused)}
        self._known[name] = {**known, "answer": bgtasks.answers(refused)}
        self.save()  # at once, so that who has taken it does not get it again

    def save(self, keep=None):
        """Write it whole, or not at all; without what is no longer in the outbox."""
        if keep is not None:
            self._known = {name: known for name, known in self._known.items() if name in keep}
        if self._known or os.path.exists(self._path):
            with open(self._path + ".new", "w") as file:
                json.dump(self._known, file)
            os.replace(self._path + ".new", self._path)
