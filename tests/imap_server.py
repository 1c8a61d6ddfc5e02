"""A real mail server for tests: Dovecot as an ordinary process, with a configuration of its own.

It runs without the rights of root, on free ports, and its folder goes with it.
"""

import getpass
import grp
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import trustme
from smtp_server import free_ports

PASSWORD = "opensesame7"
ODD_USERS = ("anna möller", "anna b")
DOVECOT = shutil.which("dovecot", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SERVICES = ("imap", "imaps", "pop3", "pop3s")
PLAIN = "127.0.0.2"  # the same server, with no extensions of IMAP
UNNAMED = "127.0.0.3"  # the same server, but its certificate is not for this address
CONFIG = """
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
listen = 127.0.0.1, {plain}, {unnamed}
protocols = imap pop3
default_internal_user = {user}
default_internal_group = {group}
default_login_user = {user}
default_process_limit = 20
auth_failure_delay = 0
auth_username_chars =
disable_plaintext_auth = no
mail_location = maildir:{folder}/mail/%u
mail_fsync = never
ssl = yes
ssl_cert = <{folder}/certificate
ssl_key = <{folder}/key
passdb {{
  driver = passwd-file
  args = scheme=plain {folder}/users
}}
userdb {{
  driver = static
  args = uid={user} gid={group} home={folder}/home/%u
}}
service anvil {{
  chroot =
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = {imaps}
  }}
}}
service pop3-login {{
  chroot =
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = {pop3s}
  }}
}}
service stats {{
  chroot =
}}
namespace inbox {{
  inbox = yes
  separator = .
}}
local {plain} {{
  imap_capability = IMAP4rev1
}}
"""


def missing():
    """Return why no server can be had here, or nothing."""
    if not DOVECOT or not Path("/usr/lib/dovecot/pop3").exists():
        return "needs Dovecot: apt-get install dovecot-imapd dovecot-pop3d"
    version = subprocess.run([DOVECOT, "--version"], capture_output=True, text=True, check=True)
    if not version.stdout.startswith("2.3."):
        return f"the configuration is for Dovecot 2.3, not {version.stdout.strip()}"
    return ""


class MailServer:
    def __init__(self, folder, user):
        self.folder, self.user = folder, user
        self.ports = dict(zip(SERVICES, free_ports(len(SERVICES))))
        self.authority = trustme.CA()
        self.ca_file = folder / "ca"
        self._users = 0

    def start(self):
        self._write_config()
        with open(self.folder / "said", "w") as said:
            self.process = subprocess.Popen(
                [DOVECOT, "-F", "-c", str(self.folder / "config")],
                stdout=said,
                stderr=said,
                **(_rights_of(self.user) if os.geteuid() == 0 else {}),
            )
        end = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < end, (self.folder / "said").read_text() + self.log()
            time.sleep(0.05)

    def _write_config(self):
        certificate = self.authority.issue_cert("localhost", "127.0.0.1", PLAIN)
        self.authority.cert_pem.write_to_path(str(self.ca_file))
        certificate.private_key_pem.write_to_path(str(self.folder / "key"))
        (self.folder / "certificate").write_bytes(
            b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
        )
        names = (*ODD_USERS, *(f"user{number}" for number in range(1, 200)))
        users = "".join(f"{name}:{{PLAIN}}{PASSWORD}::::::\n" for name in names)
        (self.folder / "users").write_text(users)
        config = CONFIG.format(
            folder=self.folder,
            user=self.user.pw_name,
            group=grp.getgrgid(self.user.pw_gid).gr_name,
            plain=PLAIN,
            unnamed=UNNAMED,
            **self.ports,
        )
        (self.folder / "config").write_text(config)
        (self.folder / "mail").mkdir()
        for path in (self.folder, *self.folder.iterdir()):
            self.give(path)

    def _answers(self):
        try:
            for port in self.ports.values():
                socket.create_connection(("127.0.0.1", port), 10).close()
        except OSError:
            return False
        return True

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def log(self):
        log = self.folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def give(self, path):
        """Let the server own a file."""
        if os.geteuid() == 0:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def break_connections(self, service):
        """End the processes in which this server talks with those who are logged in."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in children.split():
            if Path(f"/proc/{pid}/comm").read_text().strip() == service:
                os.kill(int(pid), signal.SIGKILL)

    def mailbox(self, user=""):
        """Return a mailbox that nobody has used."""
        self._users += 1
        return Mailbox(self, user or f"user{self._users}")


class Mailbox:
    """What lies on the server for one user: its files are written and read as they are."""

    def __init__(self, server, user):
        self.server, self.user = server, user
        self.path = server.folder / "mail" / user
        self._count = 0
        self.make(self.path)

    def make(self, folder):
        for path in (folder, *(folder / part for part in ("tmp", "new", "cur"))):
            path.mkdir()
            self.server.give(path)

    def make_folder(self, name):
        self.make(self.path / f".{name}")
        (self.path / f".{name}" / "maildirfolder").touch()

    def put(self, *messages, folder=""):
        path = self.path / f".{folder}" if folder else self.path
        for message in messages:
            self._count += 1
            name = f"{1_700_000_000 + self._count}.M{self._count:06}P1.here"
            (path / "tmp" / name).write_bytes(message)
            self.server.give(path / "tmp" / name)
            (path / "tmp" / name).rename(path / "new" / name)

    def files(self, folder=""):
        path = self.path / f".{folder}" if folder else self.path
        return sorted((*(path / "new").iterdir(), *(path / "cur").iterdir()))

    def messages(self, folder=""):
        return [path.read_bytes() for path in self.files(folder)]

    def seen(self):
        """Return the messages that are marked as seen."""
        files = self.files()
        return [path.read_bytes() for path in files if "S" in path.name.partition(":2,")[2]]


def _rights_of(user):
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextmanager
def running():
    user = pwd.getpwnam("nobody" if os.geteuid() == 0 else getpass.getuser())
    with tempfile.TemporaryDirectory(prefix="mail") as folder:
        server = MailServer(Path(folder), user)
        server.start()
        try:
            yield server
        finally:
            server.stop()
