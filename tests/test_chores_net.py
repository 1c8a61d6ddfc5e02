"""What contrib/tasks does over the network, against real servers on this machine."""

import datetime as dt
import hashlib
import http.server
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import trustme
from chores import (
    FOLDER,
    README,
    Chore,
    context,
    defaults_in,
    defaults_of,
    example,
    load,
    needs,
    place,
    refused,
    room_for,
    run_shell,
)
from conftest import wait_for
from imap_server import free_ports

pytestmark = pytest.mark.unmeasured
certificate_expiry, url_check, fetch_feed = map(
    load, ("certificate_expiry", "url_check", "fetch_feed")
)


class Site(http.server.ThreadingHTTPServer):
    """A web site that answers as a test says, and notes what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.asked = {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        """Who asked has hung up, as it should."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        status, headers, body = self.server.pages.get(self.path, (404, {}, b"not here"))
        etag = headers.get("ETag")
        if etag and etag == self.headers["If-None-Match"]:
            status, body = 304, b""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        for part in [body] if isinstance(body, bytes) else body():
            self.wfile.write(part)

    def log_message(self, *_):
        pass


@contextmanager
def serving(secured=None):
    with Site() as site:
        if secured:
            site.socket = secured.wrap_socket(site.socket, server_side=True)
            site.url = f"https://localhost:{site.server_address[1]}"
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            site.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Let only those fail who wait for ever: this machine may stand still for some time."""
    for module in (certificate_expiry, fetch_feed):
        monkeypatch.setattr(module, "NETWORK_SECONDS", 120)


@pytest.fixture
def web():
    with serving() as site:
        yield site


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("ca") / "ca"
    authority.cert_pem.write_to_path(path)
    return str(path)


def in_days(days):
    return dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=days, hours=1)


def certificate(authority, days=90, name="localhost"):
    first = in_days(min(0, days) - 10)
    return authority.issue_cert(name, not_before=first, not_after=in_days(days))


def secured(certificate):
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(found)
    return found


@pytest.fixture
def secure_web(authority):
    with serving(secured(certificate(authority))) as site:
        yield site


def here(module, state=None, maximum=None, **options):
    """Run a task here; return its result and the context."""
    task = context(place(), options, maximum=maximum, state=state)
    return module.run(task), task


def refusal(module, error, **options):
    with pytest.raises(error) as caught:
        here(module, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- certificate_expiry


def expiry(**options):
    return here(certificate_expiry, **options)[0]


def expiring(**options):
    return refusal(certificate_expiry, certificate_expiry.CertificateError, **options)


def test_a_server_shows_its_certificate(secure_web, ca_file):
    host = secure_web.url.partition("//")[2]
    assert expiry(hosts=[host], ca_file=ca_file) == f"next: {host} in 90 days"
    said = expiring(hosts=[host], ca_file=ca_file, days=91)
    assert said == f"1 of 1: {host} expires in 90 days"


def test_a_server_that_is_not_trusted_is_a_problem(authority, secure_web, ca_file):
    port = secure_web.server_address[1]
    unable = "unable to get local issuer certificate"
    assert unable in expiring(hosts=[f"localhost:{port}"])
    other = expiring(hosts=[f"127.0.0.1:{port}"], ca_file=ca_file)
    assert "certificate is not valid for '127.0.0.1'" in other
    with serving(secured(certificate(authority, days=-3))) as expired:
        host = expired.url.partition("//")[2]
        assert expiring(hosts=[host], ca_file=ca_file).endswith("certificate has expired")


def test_a_server_that_does_not_answer_stops_no_other(secure_web, ca_file, web):
    (port,) = free_ports(1)
    plain = web.url.partition("//")[2]
    host = secure_web.url.partition("//")[2]
    said = expiring(hosts=[f"localhost:{port}", plain, host], ca_file=ca_file, days=100)
    assert said.startswith(f"3 of 3: localhost:{port}: Connection refused; {plain}: ")
    assert said.endswith(f"{host} expires in 90 days")


@contextmanager
def answering(talk):
    """Serve one who connects, by a function of the connection."""

    def serve():
        with suppress(OSError), listening.accept()[0] as connection:
            talk(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def drip(connection):
    """Begin a handshake that never ends, though each byte of it comes in time."""
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while True:
        connection.sendall(b"\x02")
        time.sleep(0.05)


def test_a_server_that_is_slow_or_hangs_up_is_named(monkeypatch):
    with answering(lambda connection: connection.recv(1)) as host:
        assert expiring(hosts=[host]).startswith(f"1 of 1: {host}: ")
    monkeypatch.setattr(certificate_expiry, "NETWORK_SECONDS", 1)
    with answering(drip) as host:
        assert expiring(hosts=[host]) == f"1 of 1: {host}: did not answer within 1 s"


@pytest.mark.parametrize("module", [certificate_expiry, url_check, fetch_feed])
def test_an_alarm_that_came_between_two_reads_comes_again(module):
    code = f"""
import signal, sys, time
sys.path.insert(0, {str(FOLDER)!r})
from {module.__name__} import within
with within(1):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    signal.sigwait([signal.SIGALRM])  # nobody saw it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    time.sleep(120)
"""
    done = subprocess.run(
        [sys.executable, "-Bc", code], capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("TimeoutError: did not answer within 1 s\n")


def test_certificates_in_files(authority, tmp_path):
    blob = certificate(authority, 30)
    pem = blob.cert_chain_pems[0].bytes()
    (tmp_path / "one.pem").write_bytes(blob.private_key_pem.bytes() + pem)
    (tmp_path / "one.der").write_bytes(ssl.PEM_cert_to_DER_cert(pem.decode()))
    late = certificate(authority, 300).cert_chain_pems[0].bytes()
    (tmp_path / "two.pem").write_bytes(late + pem + late)
    files = [str(tmp_path / "one.*"), str(tmp_path / "two.pem")]
    assert expiry(files=files).endswith(" in 30 days")
    assert expiring(files=files, days=31).count("expires in 30 days") == 3
    assert expiry(files=files[:1], days=29).endswith(" in 30 days")


@pytest.mark.parametrize("moment", ["491231235959", "500101000000", "20491231235959"])
def test_years_have_two_digits_or_four(moment):
    tag = certificate_expiry.UTC_TIME if len(moment) == 12 else certificate_expiry.GENERALIZED_TIME
    year = time.gmtime(certificate_expiry.moment(tag, f"{moment}Z")).tm_year
    assert year == (1950 if moment.startswith("50") else 2049)


def test_the_end_is_what_openssl_reads(authority):
    for days in (1, 10_000, 40_000):  # the last beyond 2050, in four digits
        pem = certificate(authority, days).cert_chain_pems[0].bytes()
        command = [*needs("openssl"), "x509", "-noout", "-enddate"]
        said = subprocess.run(command, input=pem, capture_output=True, check=True).stdout.decode()
        wanted = ssl.cert_time_to_seconds(said.strip().partition("=")[2])
        (der,) = certificate_expiry.certificates(pem)
        assert certificate_expiry.not_after(der) == wanted


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"0", b"0\x84\xff\xff\xff\xff", b"\x30" * 5000, b"0\x80", b"\x30\x02\x30\x00"],
)
def test_a_file_that_holds_no_certificate_is_named(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert "holds " in expiring(files=[str(tmp_path / "x")])


def test_a_damaged_or_missing_file_stops_no_other(authority, tmp_path):
    pem = certificate(authority, 1).cert_chain_pems[0].bytes()
    (tmp_path / "a").write_bytes(pem.replace(b"M", b"N", 2))
    (tmp_path / "b").write_bytes(b"-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----")
    (tmp_path / "c").write_bytes(pem)
    said = expiring(files=[str(tmp_path / name) for name in ("a", "b", "gone", "c")])
    assert said.startswith("4 of 4: ")
    assert "gone: No such file or directory" in said
    assert said.endswith("c expires in 1 days")


def test_any_cut_of_a_certificate_is_said_to_be_damaged(authority):
    der = ssl.PEM_cert_to_DER_cert(certificate(authority).cert_chain_pems[0].bytes().decode())
    for length in range(1, len(der)):
        with pytest.raises(ValueError, match="is damaged"):
            certificate_expiry.not_after(der[:length])


# -- url_check


def checking(web, *paths, **options):
    urls = [web.url + path for path in paths or ("/",)]
    return here(url_check, **{"urls": urls, "seconds": 60, **options})[0]


def check_fails(web, *paths, **options):
    urls = [web.url + path for path in paths or ("/",)]
    options = {"urls": urls, "seconds": 60, **options}
    return refusal(url_check, url_check.CheckError, **options).replace(web.url, "")


def test_a_page_answers_as_it_should(web):
    web.pages["/"] = (
        200,
        {"Content-Type": "text/html; charset=latin-1"},
        "Grüße".encode("latin-1"),
    )
    assert re.fullmatch(
        r"1 as they should be, the slowest in \d+\.\d\d s", checking(web, text="Grüße")
    )
    assert check_fails(web, text="Hello") == "1 of 1: /: does not hold the text"


def test_each_problem_is_named(web):
    web.pages["/"] = (200, {}, b"")
    web.pages["/odd"] = (200, {"Content-Type": "text/html; charset=nonsense"}, b"x")
    web.pages["/broken"] = (500, {}, b"")
    said = check_fails(web, "/", "/broken", "/odd", "/gone")
    assert said.startswith("3 of 4: /broken: answered 500, not 200; /odd: unknown encoding")
    assert said.endswith("/gone: answered 404, not 200")
    assert checking(web, "/gone", status=404)


def test_redirects_are_followed_so_many_times(web):
    for number in range(3):
        code = (301, 307, 308)[number]
        web.pages[f"/{number}"] = (code, {"Location": f"/{number + 1}"}, b"")
    web.pages["/3"] = (200, {}, b"here")
    web.pages["/round"] = (302, {"Location": "/round"}, b"")
    assert checking(web, "/0", redirects=3, text="here")
    assert check_fails(web, "/0", redirects=2) == "1 of 1: /0: answered 308, not 200"
    assert checking(web, "/0", redirects=0, status=301)
    assert check_fails(web, "/round") == "1 of 1: /round: answered 302, not 200"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "gopher://x"])
def test_a_redirect_leads_only_to_the_web(web, target):
    web.pages["/"] = (302, {"Location": target}, b"")
    assert check_fails(web)


def test_a_redirect_from_https_to_http_is_a_problem(web, secure_web, ca_file):
    secure_web.pages["/"] = (301, {"Location": f"{web.url}/x"}, b"")
    said = check_fails(secure_web, ca_file=ca_file)
    assert said == f"1 of 1: /: leads to {web.url}/x, which is less safe"
    assert web.asked == []


def test_a_certificate_that_is_not_trusted_is_a_problem(secure_web, ca_file):
    secure_web.pages["/"] = (200, {}, b"")
    assert checking(secure_web, ca_file=ca_file)
    assert "unable to get local issuer certificate" in check_fails(secure_web)


def drops():
    while True:
        yield b"."
        time.sleep(0.05)


def flood():
    while True:
        yield b"." * 65536


def test_an_answer_without_end_is_not_read_to_its_end(web):
    web.pages["/"] = (302, {"Location": "/flood"}, flood)
    web.pages["/flood"] = (200, {}, flood)
    assert checking(web, text="...")


def test_an_answer_that_comes_drop_by_drop_is_not_waited_for(web):
    web.pages["/"] = (200, {}, drops)
    assert check_fails(web, seconds=1) == "1 of 1: /: did not answer within 1 s"


def test_who_does_not_answer_at_all_is_named():
    (port,) = free_ports(1)
    said = refusal(url_check, url_check.CheckError, urls=[f"http://127.0.0.1:{port}/"], seconds=60)
    assert said.endswith("Connection refused")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/"]
        said = refusal(url_check, url_check.CheckError, urls=urls, seconds=1)
    assert said.endswith("did not answer within 1 s")


# -- fetch_feed

RSS = """<?xml version="1.0" encoding="ISO-8859-1"?>
<rss version="2.0"><channel><title>News</title>{}</channel></rss>"""
ITEM = (
    "<item><title>N\xfcmber {0}</title><link>https://example.org/{0}</link><guid>id-{0}</guid>"
    "<pubDate>Sat, 31 Jan 2026 12:00:00 GMT</pubDate><description>&lt;b&gt;</description></item>"
)
ATOM = """<feed xmlns="http://www.w3.org/2005/Atom"><title>x</title><entry><id>urn:1</id>
<title type="xhtml">a <b>b</b></title><link rel="self" href="s"/><link href="https://a/"/>
<updated>2026-01-31T12:00:00Z</updated><summary>s</summary></entry></feed>"""
RDF = """<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns="http://purl.org/rss/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/">
<channel/>
<item rdf:about="urn:2"><title>t</title><link>l</link><dc:date>d</dc:date></item></rdf:RDF>"""


def rss(*numbers):
    return RSS.format("".join(map(ITEM.format, numbers))).encode("latin-1")


class Feed:
    """A feed on a web site, and the task that fetches it, run after run."""

    def __init__(self, web, folder):
        self.web, self.file, self.known = web, folder / "entries", {}
        self.options = {"url": web.url + "/feed", "file": str(self.file)}

    def put(self, body, **headers):
        tag = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        self.web.pages["/feed"] = (200, {**tag, **headers}, body)

    def fetch(self, **options):
        result, task = here(fetch_feed, state=self.known, **{**self.options, **options})
        self.known = json.loads(json.dumps(task.state))
        return result

    def fails(self, **options):
        task = context(place(), {**self.options, **options}, state=self.known)
        with pytest.raises(fetch_feed.FeedError) as caught:
            fetch_feed.run(task)
        self.known = json.loads(json.dumps(task.state))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def entries(self):
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines]

    def ids(self):
        return [entry["id"] for entry in self.entries()]


@pytest.fixture
def feed(web, tmp_path):
    return Feed(web, tmp_path)


def test_new_entries_come_once_the_oldest_first(feed):
    feed.put(rss(2, 1))
    assert feed.fetch() == "2 new entries"
    assert feed.fetch() == "nothing"
    assert feed.web.asked[1][1]["If-None-Match"] == feed.known["etag"] != ""
    feed.put(rss(3, 2, 1))
    assert feed.fetch() == "1 new entries"
    assert feed.ids() == ["id-1", "id-2", "id-3"]
    assert feed.entries()[0] == {
        "feed": feed.options["url"],
        "id": "id-1",
        "title": "Nümber 1",
        "link": "https://example.org/1",
        "date": "Sat, 31 Jan 2026 12:00:00 GMT",
        "summary": "<b>",
    }


def test_a_feed_may_know_only_when_it_changed(feed):
    feed.web.pages["/feed"] = (200, {"Last-Modified": "Sat, 31 Jan 2026 12:00:00 GMT"}, rss(1))
    feed.fetch()
    assert feed.fetch() == "nothing"
    assert feed.web.asked[1][1]["If-Modified-Since"] == "Sat, 31 Jan 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (ATOM, {"id": "urn:1", "title": "a b", "link": "https://a/", "summary": "s"}),
        (RDF, {"id": "urn:2", "title": "t", "link": "l", "date": "d"}),
        (RSS.format("<item><link>only</link></item>"), {"id": "only", "title": ""}),
        (RSS.format("<item><title>a\nb</title></item>" * 2), {"title": "a\nb", "link": ""}),
    ],
)
def test_feeds_of_other_kinds(feed, text, wanted):
    feed.put(text.encode())
    assert feed.fetch() == "1 new entries"
    (entry,) = feed.entries()
    assert {key: entry[key] for key in wanted} == wanted
    assert entry["id"]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + RSS.format("<item>&b;</item>")[44:]
FILE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><rss><item><title>&a;</title></item></rss>'
PARAMETER = '<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1/">%a;]><rss/>'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (BOMB, "it declares entities"),
        (FILE, "it declares entities"),
        (PARAMETER, "it declares entities"),
        ("<rss>" + "<a>" * 200_000, "it nests more than 100 elements"),
        ("<rss>" + "<a b=''/>" * 75_000 + "<a/>" * 150_000, "more than 300000 elements and attr"),
        ("<html><body/></html>", "it begins with 'html'"),
        ("", "no element found"),
        ("<rss>", "no element found"),
        ("<rss>\0</rss>", "not well-formed"),
        ("hello", "syntax error"),
        ('<?xml version="1.0" encoding="nonsense"?><rss/>', "unknown encoding"),
        ("<rss>" + " " * 200_000 + "</rss>", "has more than 100000 bytes (options.largest)"),
    ],
    ids=range(12),
)
def test_a_hostile_feed_is_refused_in_one_line(feed, body, words):
    feed.put(body.encode())
    said = feed.fails(largest=100_000 if " " * 100_000 in body else 2_000_000)
    assert said.startswith(feed.options["url"])
    assert words in said
    assert feed.entries() == []
    feed.put(rss(1))
    assert feed.fetch() == "1 new entries"


def test_entries_in_entries_are_not_looked_at(feed):
    """Else a text within all of them would be read as often, and become many times as large."""
    nested = "<item><title><guid>{}</guid>" * 40 + "</title></item>" * 40
    feed.put(RSS.format(nested.format(*range(40))).encode())
    assert feed.fetch() == "1 new entries"


def test_a_document_type_without_entities_is_harmless(feed):
    feed.put(
        b'<!DOCTYPE rss SYSTEM "http://127.0.0.1:9/rss.dtd">'
        + rss(1).decode("latin-1").partition("?>")[2].encode()
    )
    feed.fetch()
    assert feed.ids() == ["id-1"]


@pytest.mark.parametrize("headers", [{"ETag": "a\r\n b"}, {"Last-Modified": "\xfc" * 9}])
def test_strange_headers_are_not_sent_back(feed, headers):
    feed.web.pages["/feed"] = (200, headers, rss(1))
    feed.fetch()
    assert feed.fetch() == "nothing"


def test_a_server_that_fails_is_named_and_nothing_is_forgotten(feed):
    feed.put(rss(1))
    feed.fetch()
    feed.web.pages["/feed"] = (503, {}, b"")
    assert feed.fails() == f"{feed.options['url']} answered 503"
    feed.web.pages["/feed"] = (302, {"Location": "file:///etc/passwd"}, b"")
    assert feed.fails()
    feed.put(rss(2, 1))
    assert feed.fetch() == "1 new entries"


def test_a_slow_feed_is_not_waited_for(feed, monkeypatch):
    monkeypatch.setattr(fetch_feed, "NETWORK_SECONDS", 1)
    feed.web.pages["/feed"] = (200, {}, drops)
    assert feed.fails().endswith("did not answer within 1 s")


def test_entries_go_to_a_program_and_what_it_refuses_comes_again(feed, tmp_path):
    script = 'cat >"$1/$FETCH_FEED_ID"; test "$FETCH_FEED_ID" != id-2 || test -e "$1/open"'
    options = {"file": "", "program": ["sh", "-c", script, "sh", str(tmp_path)]}
    feed.put(rss(3, 2, 1))
    assert (
        feed.fails(**options) == "1 of 3 entries stay; the last: 'id-2': the program ended with 1"
    )
    assert json.loads((tmp_path / "id-3").read_text())["title"] == "Nümber 3"
    (tmp_path / "id-1").unlink()
    (tmp_path / "open").touch()
    assert feed.fetch(**options) == "1 new entries"
    assert not (tmp_path / "id-1").exists()
    assert feed.fetch(**options) == "nothing"


@pytest.mark.parametrize("entry", ["a\0b", "-rf", "../../x", "ü" * 5000, "x\ny"])
def test_identities_may_be_hostile(feed, tmp_path, entry):
    feed.put(RSS.format("<item><guid>{}</guid></item>").format(entry.replace("\0", "")).encode())
    program = ["sh", "-c", f'printf %s "$FETCH_FEED_ID" >{tmp_path}/id']
    body = feed.web.pages["/feed"][2].replace(b"ISO-8859-1", b"utf-8")
    feed.put(body)
    assert feed.fetch(file="", program=program) == "1 new entries"
    assert re.fullmatch(r"[!-~]{1,1000}", (tmp_path / "id").read_text())


def test_a_program_that_hangs_or_does_not_start_stops_no_other(feed):
    feed.put(rss(1))
    assert "did not end within 1 s" in feed.fails(
        file="", program=["sleep", "60"], program_timeout=1
    )
    feed.file.write_text("#!/does/not/exist\n")
    feed.file.chmod(0o755)
    assert "did not start: " in feed.fails(file="", program=[str(feed.file)])


def test_at_the_deadline_it_stops_and_goes_on_in_the_next_run(feed):
    feed.put(rss(3, 2, 1))
    assert feed.fetch(maximum=2) == "2 new entries"
    assert feed.fetch() == "1 new entries"  # though the feed has not changed
    assert feed.ids() == ["id-1", "id-2", "id-3"]


def test_a_line_that_was_torn_is_no_part_of_the_next_one(feed):
    feed.file.write_text('{"id": "torn')
    feed.put(rss(1))
    feed.fetch()
    lines = feed.file.read_text().splitlines()
    assert [lines[0], json.loads(lines[1])["id"]] == ['{"id": "torn', "id-1"]


def test_a_full_disk_leaves_whole_lines_and_comes_again(feed):
    feed.put(rss(*range(100, 0, -1)))
    there = []
    for _ in range(2):
        with room_for(8192):
            assert "File too large" in feed.fails()
        there += feed.ids()
        feed.file.unlink()
    assert len(there) == len(set(there)) > 50
    feed.fetch()
    assert {*there, *feed.ids()} == {f"id-{number}" for number in range(1, 101)}


def test_killed_it_repeats_at_most_what_it_had_not_noted(site, web):
    web.pages["/feed"] = (200, {}, rss(*range(30, 0, -1)))
    chore = Chore(site, "fetch_feed.py")
    program = site.folder / "program"
    program.write_text(
        f"#!/bin/sh\necho $FETCH_FEED_ID >>{site.ledger}\n"
        "sleep 0.1; test $FETCH_FEED_ID != id-20 || test -e $0.killed || "
        "{ : >$0.killed; kill -9 $PPID; }\n"
    )
    program.chmod(0o755)
    chore.set(url=f"{web.url}/feed", program=str(program))
    chore.run()
    wait_for(lambda: chore.outcome() in ("done", "nothing"), 60)
    ids = site.ledger.read_text().split()
    assert set(ids) == {f"id-{number}" for number in range(1, 31)}
    assert len(ids) < 30 + 20  # about a second of them


# -- heartbeat and self_update_check, in shell


def test_shell_is_clean():
    scripts = [FOLDER / name for name in ("disk_space.sh", "heartbeat.sh", "self_update_check.sh")]
    command = [*needs("shellcheck"), "-s", "sh", *scripts]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


@pytest.fixture
def only(tmp_path):
    """Return a PATH with nothing but these programs."""

    def only(*programs):
        folder = place()
        for program, path in zip(programs, needs(*programs)):
            (folder / program).symlink_to(path)
        return str(folder)

    return only


@pytest.mark.parametrize("program", ["curl", "wget"])
def test_a_heartbeat_is_sent_and_its_url_is_no_argument(web, tmp_path, only, program):
    web.pages["/ping/a%20b?x=1&y=$(2)'"] = (200, {}, b"OK")
    url = f"{web.url}/ping/a%20b?x=1&y=$(2)'"
    code, said, report = run_shell("heartbeat.sh", tmp_path, only(program), url=url)
    assert (code, said, report) == (0, "", {"volume": "1"})
    assert len(web.asked) == 1
    assert not re.search(r"(curl|wget) .*\$url", (FOLDER / "heartbeat.sh").read_text())


@pytest.mark.parametrize("program", ["curl", "wget"])
def test_a_heartbeat_goes_where_the_service_has_moved(web, tmp_path, only, program):
    web.pages["/ping"] = (301, {"Location": "/moved"}, b"")
    web.pages["/moved"] = (200, {}, b"OK")
    code, said, _ = run_shell("heartbeat.sh", tmp_path, only(program), url=web.url + "/ping")
    assert (code, said, web.asked[-1][0]) == (0, "", "/moved")


@pytest.mark.parametrize("program", ["curl", "wget"])
def test_a_heartbeat_that_does_not_arrive_fails(web, tmp_path, only, program):
    code, said, _ = run_shell("heartbeat.sh", tmp_path, only(program), url=web.url + "/gone")
    assert code == 1
    assert said.endswith(")")
    assert "the call did not arrive" in said


def test_a_heartbeat_needs_curl_or_wget(tmp_path):
    code, said, _ = run_shell("heartbeat.sh", tmp_path, str(tmp_path), url="https://example.org")
    assert (code, said) == (1, "needs curl or wget; install one of them")


BAD_URLS = ["", "ftp://x/", "file:///etc/passwd", "x", 'https://x/"', "https://a b/", "https://ü/"]
BAD_URLS += ["https://x/\nurl=y", "https://x\\", "-o/tmp/x"]


@pytest.mark.parametrize("shell", ["dash", "busybox"])
def test_a_bad_url_is_one_clear_line(tmp_path, shell):
    command = [*needs(shell), *(["sh"] if shell == "busybox" else [])]
    for file in ("heartbeat.sh", "self_update_check.sh"):
        for url in BAD_URLS:
            code, said, _ = run_shell(file, tmp_path, shell=command, url=url, file=__file__)
            assert (code, bool(re.fullmatch(r"options\.url: [^\n]*", said))) == (1, True), url


class Update:
    """A file that is installed, and what lies at its URL."""

    def __init__(self, web, folder):
        self.web, self.folder, self.known = web, folder, {}
        self.shells = [needs("dash"), [*needs("busybox"), "sh"]]  # in turn
        self.file = folder / "tool.py"
        self.file.write_text("version 1")
        self.put("version 1")

    def put(self, text, etag="{}"):
        tag = etag.format(hashlib.md5(text.encode()).hexdigest())
        self.web.pages["/tool.py"] = (200, {"ETag": tag} if tag else {}, text.encode())

    def check(self, **options):
        options = {"url": self.web.url + "/tool.py", "file": self.file, **options}
        self.shells.append(self.shells.pop(0))
        code, said, report = run_shell(
            "self_update_check.sh", self.folder, state=self.known, shell=self.shells[0], **options
        )
        self.known = json.loads(report.get("state", "{}")) or self.known
        return code, said


@pytest.fixture
def update(web, tmp_path):
    needs("curl")
    return Update(web, tmp_path)


@pytest.mark.parametrize("etag", ['"{}"', 'W/"{}"', "", "{}", '"\xfc{}"', '"a"'])
def test_another_version_is_told_until_it_is_installed(update, etag):
    update.put("version 1", etag)
    assert update.check() == (0, "")
    update.put("version 2", etag.replace("a", "b"))
    for _ in range(2):
        code, said = update.check()
        assert code == 1
        assert said.endswith("/tool.py; look at it, and install it")
    update.file.write_text("version 2")
    assert update.check() == (0, "")
    assert update.file.read_text() == "version 2"


@pytest.mark.parametrize("etag", ['"{}"', 'W/"{}"'])
def test_what_has_not_changed_is_not_downloaded_again(update, etag):
    update.put("version 1", etag)
    update.check()
    update.check()
    sent = update.web.pages["/tool.py"][1]["ETag"]
    assert [headers.get("If-None-Match") for _, headers in update.web.asked] == [None, sent]


def test_what_is_known_of_one_url_is_not_believed_of_another(update):
    update.check()
    update.web.pages["/other"] = (200, update.web.pages["/tool.py"][1], b"version 9")
    assert update.check(url=update.web.url + "/other")[0] == 1


def test_a_redirect_does_not_lead_astray(update, secure_web, ca_file):
    """Its ETag is not that of the file, and it does not lead from https to http."""
    moved = {"Location": "/tool.py", "ETag": '"of the redirect"'}
    update.web.pages["/moved"] = (302, moved, b"")
    update.put("version 1", "")
    url = update.web.url + "/moved"
    assert update.check(url=url) == (0, "")
    update.put("version 2", "")
    assert update.check(url=url)[0] == 1
    secure_web.pages["/"] = (302, {"Location": update.web.url + "/tool.py"}, b"")
    update.file.write_text("version 2")
    assert "cannot be read" in update.check(url=secure_web.url + "/", ca_file=ca_file)[1]


def test_a_version_that_cannot_be_read_is_said(update):
    (port,) = free_ports(1)
    assert "cannot be read" in update.check(url=f"http://127.0.0.1:{port}/")[1]
    assert "cannot be read" in update.check(url=update.web.url + "/gone")[1]
    assert update.check(file="")[1].startswith("options.file: is empty")
    assert update.check(file="/does/not/exist")[1].startswith("options.file: /does/not/exist can")
    assert update.check(file="/tmp")[1] == "options.file: /tmp is a folder; name a file"
    assert update.check() == (0, "")


# -- as tasks, with the examples of the README


def test_the_examples_of_the_readme_work(site, web, secure_web, ca_file, authority, tmp_path):
    needs("curl")
    for file in ("certificate_expiry.py", "url_check.py", "fetch_feed.py"):
        text = (FOLDER / file).read_text().replace("NETWORK_SECONDS = ", "NETWORK_SECONDS = 10 * ")
        site.write(file, text)
    for file in ("heartbeat.sh", "self_update_check.sh"):
        shutil.copy(FOLDER / file, site.tasks)
    pem = tmp_path / "cert.pem"
    certificate(authority).cert_chain_pems[0].write_to_path(pem)
    host = secure_web.url.partition("//")[2]
    web.pages.update(
        {"/feed.xml": (200, {}, rss(1)), "/": (200, {}, b"Welcome"), "/ping": (200, {}, b"")}
    )
    web.pages["/tool.py"] = (200, {}, pem.read_bytes())
    changes = {
        "certificates.toml": {
            '"example.org"': f'"{host}"',
            "/etc/letsencrypt/live/*/cert.pem": pem,
            "daily 08:30": "every 1 h",
            "days = 21": f'days = 21\nca_file = "{ca_file}"',
        },
        "front_page.toml": {
            "https://example.org": web.url,
            'text = "Welcome"': 'text = "Welcome", seconds = 100',
        },
        "news.toml": {"https://example.org": web.url, "/srv/app": site.folder},
        "alive.toml": {"https://hc-ping.com/your-uuid": f"{web.url}/ping"},
        "tool_is_new.toml": {
            "daily 07:10": "every 1 h",
            "https://example.org": web.url,
            "/srv/app/tool.py": pem,
        },
    }
    for file, replaced in changes.items():
        site.write(file, example(file, replaced))
    assert site.run("lint").returncode == 0
    said = site.wake()
    assert said.returncode == 0, said
    found = {row["name"]: row["last_outcome"] for row in site.rows("SELECT * FROM task")}
    assert {found[file.partition(".")[0]] for file in changes} == {"done"}, found
    assert (site.folder / "news.jsonl").read_text().count("\n") == 1


# -- options


def test_the_options_in_the_files_are_the_defaults():
    for module in (certificate_expiry, url_check, fetch_feed):
        assert defaults_in(f"{module.__name__}.py") == defaults_of(module)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.[ps][yh]")))
def test_every_option_is_in_the_readme(name):
    section = README.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    table = section.partition("\n| option |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    named = [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(defaults_in(name)) != []


@pytest.mark.parametrize(
    ("files", "start", "end"),
    [
        (5, "# --- options: these lines", "\0"),
        (2, "@contextmanager\ndef within", "\n# ---"),
        (5, "@contextlib.contextmanager\ndef one_line", "\n# ---"),
        (5, "MYSQL_OPTIONS = ", "\n"),
        (5, "def is_database(address", "\n\n\n"),
        (5, "def has_password", "\n\n\n"),
        (5, "must be the path of an SQLite file", '"'),
        (5, "must not hold the password", "options."),
    ],
)
def test_what_is_the_same_in_each_file_stays_the_same(files, start, end):
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.py"))]
    found = [t.partition(start)[2].partition(end)[0] for t in texts if start in t]
    assert len(found) >= files
    assert len(set(found)) == 1


GOOD = {
    certificate_expiry: {"hosts": ["example.org"]},
    url_check: {"urls": ["https://example.org/"]},
    fetch_feed: {"url": "https://example.org/", "file": "/srv/app/news"},
}


BAD = [
    (certificate_expiry, "hosts", {"hosts": []}),
    (certificate_expiry, "hosts", {"hosts": ["https://example.org"]}),
    (certificate_expiry, "hosts", {"hosts": ["example.org:99999"]}),
    (certificate_expiry, "files", {"files": ["cert.pem"]}),
    (certificate_expiry, "days", {"days": "soon"}),
    (certificate_expiry, "ca_file", {"ca_file": "/does/not/exist"}),
    (url_check, "urls", {"urls": []}),
    (url_check, "urls", {"urls": ["file:///etc/passwd"]}),
    (url_check, "urls", {"urls": ["https://a b"]}),
    (url_check, "status", {"status": 99}),
    (url_check, "seconds", {"seconds": 0}),
    (url_check, "redirects", {"redirects": 21}),
    (fetch_feed, "url", {"url": ""}),
    (fetch_feed, "url", {"url": "feed://x"}),
    (fetch_feed, "program", {"file": ""}),
    (fetch_feed, "program", {"program": ["cat"]}),
    (fetch_feed, "program", {"file": "", "program": ["/does/not/exist"]}),
    (fetch_feed, "program_timeout", {"program_timeout": 0}),
    (fetch_feed, "file", {"file": "news"}),
    (fetch_feed, "largest", {"largest": 0}),
]


def test_a_bad_option_is_one_clear_line():
    for module, key, options in BAD:
        assert refused(module, GOOD[module], options) == key, options
