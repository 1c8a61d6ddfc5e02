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

import contextlib
import json
import os
import time

import bgtasks

FIRST_GAP, LONGEST_GAP = 300.0, 4 * 3600.0
NEW = {"number": 0, "next_at": 0, "rest": (), "answer": "", "never": "", "inode": None}


def run(task):
    outbox, now = task.settings["outbox"], time.time()
    tries = Tries(outbox)
    names = waiting(outbox, now, task.settings["outbox_delay"])
    names = [name for name in names if not now < tries.next_at(name) <= now + LONGEST_GAP]
    if not names:
        return task.NOTHING
    tries.save()  # where nothing can be written, what was sent would stay and be sent again
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


def waiting(outbox, now, delay):
    """Return the names of the mails that lie there for ``delay`` seconds or longer, oldest first.

    One that seems to come later than now was put there before the clock was set back."""
    found = []
    for entry in os.scandir(outbox) if os.path.isdir(outbox) else ():
        if entry.name.startswith(".") and entry.is_file() and is_old(entry.path):
            os.unlink(entry.path)  # who wrote it has died long ago
        notice = entry.name.startswith(bgtasks.OURS) and entry.name.endswith(".json")
        unfinished = entry.name.startswith(".") or entry.name.endswith((".tmp", ".part"))
        if not notice and not unfinished and not entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):  # somebody else has sent it meanwhile
                found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
    return [name for arrived, name in sorted(found) if abs(now - arrived / 1e9) >= delay]


def send(server, path, params, tries):
    """Send one mail, and note who refused it; tell whether all have taken it."""
    name = os.path.basename(path)
    tries.give_up_in_part(path)
    refused = bgtasks.send_file(server, path, params, tries.rest(name))
    if not refused:
        return refused is not None
    later = {address: answer for address, answer in refused.items() if answer[0] < 500}
    never = {address: answer for address, answer in refused.items() if answer[0] >= 500}
    if later and not is_old(path):
        tries.note(name, later, never)
        tries.give_up_in_part(path)
    else:
        bgtasks.give_up(path, bgtasks.answers(refused))
    return False


def give_up_old(outbox, names, answer):
    """Move what the server could not be asked about for days out of the way."""
    for name in names:
        path = os.path.join(outbox, name)
        if is_old(path):
            bgtasks.give_up(path, answer)


def is_old(path):
    """Tell whether a mail has waited for so long that it is given up; not if it is gone."""
    try:
        return time.time() - os.lstat(path).st_mtime > bgtasks.OLDEST_MAIL_SECONDS
    except FileNotFoundError:
        return False


class Tries:
    """What was refused for now: how often, by whom, and when it is tried again; a file by name.

    Another file that has got the same name is another mail, so the inode is noted too."""

    def __init__(self, outbox):
        self._outbox = outbox
        self._path = os.path.join(outbox, ".tries.json")
        try:
            with open(self._path) as file:
                self._known = {name: {**NEW, **known} for name, known in json.load(file).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # damaged: all are tried again
            self._known = {}

    def _of(self, name):
        known = self._known.get(name, NEW)
        return known if known is not NEW and known["inode"] == self._inode(name) else NEW

    def _inode(self, name):
        try:
            return os.lstat(os.path.join(self._outbox, name)).st_ino
        except FileNotFoundError:
            return None

    def next_at(self, name):
        return self._of(name)["next_at"]

    def rest(self, name):
        """Return who has not taken a mail yet; nobody if it is new."""
        return tuple(self._of(name)["rest"])

    def note(self, name, later, never):
        """Note who is tried again; at once, so that who has taken it does not get it again."""
        number = self._of(name)["number"] + 1
        next_at = time.time() + min(FIRST_GAP * 2.0 ** (number - 1), LONGEST_GAP)
        known = {"number": number, "next_at": next_at, "rest": list(later)}
        known.update(answer=bgtasks.answers(later), never=bgtasks.answers(never))
        self._known[name] = {**known, "inode": self._inode(name)}
        self.save()

    def give_up_in_part(self, path):
        """Put a copy into `failed` for those who refused a mail for good, while others may take it.

        It was noted before, so that it is made even if this is killed in between."""
        known = self._of(os.path.basename(path))
        if known["never"]:
            bgtasks.give_up(path, known["never"], copy=True)
            known["never"] = ""
            self.save()

    def save(self, keep=None):
        """Write it whole, or not at all; without what is no longer in the outbox."""
        if keep is not None:
            self._known = {name: known for name, known in self._known.items() if name in keep}
        with open(self._path + ".new", "w") as file:
            json.dump(self._known, file)
        os.replace(self._path + ".new", self._path)
