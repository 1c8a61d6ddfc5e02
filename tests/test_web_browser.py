"""The status page as people meet it: the real server, looked at with a real browser."""

import contextlib
import functools
import http.server
import importlib
import importlib.util
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, Site, wait_for

AXE = importlib.util.find_spec("axe_playwright_python")  # it ships axe.min.js; not imported
NEEDED = {
    "selenium": importlib.util.find_spec("selenium"),
    "axe-playwright-python": AXE,
    "chromium": shutil.which("chromium"),
    "chromedriver": shutil.which("chromedriver"),
}
MISSING = [name for name, found in NEEDED.items() if not found]
if MISSING and not os.environ.get("CI"):
    pytest.skip(f"no {', '.join(MISSING)} here", allow_module_level=True)
assert not MISSING, f"CI must have {', '.join(MISSING)}"
webdriver = importlib.import_module("selenium.webdriver")
CSS = "css selector"
TAB, ENTER = "\ue004", "\ue007"

pytestmark = pytest.mark.unmeasured
PASSWORD = "correct horse battery"
OUTCOMES = "done nothing more failed timed_out killed interrupted missed".split()
LOOKS = ("light", "dark", "phone")
HISTORY = """INSERT INTO run (task, steps, planned_at, started_at, deadline_at, ended_at, outcome,
 trigger, node, live, output) VALUES (?1, 0, ?2, ?2, ?2 + 60, ?3, ?4, 'cli', 'here', ?5, ?6)"""
# what a page does by time, it does when a test says so; files keep their own time
CLOCK = """(() => {if (location.pathname.endsWith('/status.html')) return;
const later = window.setTimeout.bind(window), jobs = [];
let now = Date.now();
Date.now = () => now;
AbortSignal.timeout = () => new AbortController().signal;  // a stall is no answer that is missing
const job = (what, ms, again) => jobs.push({what, at: now + ms, ms: again}) && 0;  // 0: no timer
window.setTimeout = (what, ms) => ms >= 1000 ? job(what, ms) : later(what, ms);
window.setInterval = (what, ms) => job(what, ms, ms);
window.pass = async seconds => {
  while (seconds-- > 0) {
    now += 1000;
    for (const job of jobs.filter(job => job.at <= now)) {
      if (job.ms) job.at += job.ms; else jobs.splice(jobs.indexOf(job), 1);
      job.what();
    }
    while (!jobs.some(job => !job.ms)) await new Promise(done => later(done, 5));  // it asks
  }
}})()"""


class Web(Site):
    """An installation with its server, in the one browser of this module."""

    def __init__(self, folder, driver):
        folder.mkdir(exist_ok=True)
        super().__init__(folder)
        self.driver, self.cookie, self.look = driver, None, "light"
        for file in (PROGRAM, PROGRAM.parent / "contrib" / "web" / "bgtasks_web.py"):
            shutil.copy(file, folder)
        # what is measured is the program in the repository, and not this copy
        self.env = {k: v for k, v in os.environ.items() if k != "COVERAGE_PROCESS_CONFIG"}
        self.params.write_text("node = here\ncron_max_execution_time = 0\n")
        self.started = []

    def script(self, *args):
        return [sys.executable, str(self.folder / "bgtasks_web.py"), *args]

    def serve(self):
        """Register an administrator and start the server; log in."""
        assert self.run("admin", "add", "root", input=f"{PASSWORD}\n").returncode == 0
        with open(self.folder / "errors", "w") as errors:
            self.server = subprocess.Popen(
                self.script("--port=0"), env=self.env, stdout=subprocess.PIPE, stderr=errors
            )
        self.url = self.server.stdout.readline().split()[0].decode().rstrip("/")
        self.log_in()
        self.cookie = self.driver.get_cookie("bgtasks")["value"]
        return self

    def work(self):
        """Start a runner that stays as long as its tasks."""
        self.started.append(self.start("--max_parallel=3"))

    def close(self):
        if hasattr(self, "server"):
            self.server.kill()
            self.server.wait()
            self.server.stdout.close()
        (self.folder / "stop").touch()  # the tasks look for it
        for process in self.started:
            process.wait(60)
        wait_for(lambda: not self.woken())

    def woken(self):
        """What the server has started, and what that has."""
        own, found = os.path.join(self.folder, "").encode(), []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes()
                found += [path] * (own in words and b"--wake=" in words)
        return found

    def log_in(self, password=PASSWORD):
        self.open("/")
        self.one("input[name=user]").send_keys("root")
        self.one("input[name=password]").send_keys(password)
        self.click("main button")

    def open(self, path="/", look=None):
        """Load a page of this installation as who is logged in."""
        show(self.driver, look or self.look)
        self.driver.delete_all_cookies()
        if self.cookie:
            cookie = {"name": "bgtasks", "value": self.cookie, "url": self.url}
            self.cdp("Network.setCookie", httpOnly=True, sameSite="Strict", **cookie)
        self.driver.get(self.url + path)

    def cdp(self, command, **values):
        return self.driver.execute_cdp_cmd(command, values)

    def js(self, text, *values):
        return self.driver.execute_script(text, *values)

    def one(self, css):
        return self.driver.find_element(CSS, css)

    def all(self, css):
        return self.driver.find_elements(CSS, css)

    @property
    def text(self):
        return self.one("body").text

    def click(self, css):
        """Click what leads to another page, and wait until that is there."""
        old = self.one("html")
        self.one(css).click()
        self.arrive(old)

    def follow(self, text):
        old = self.one("html")
        self.driver.find_element("link text", text).click()
        self.arrive(old)

    def arrive(self, old):
        wait_for(lambda: gone(old) and self.js("return document.readyState") == "complete")

    def pass_time(self, seconds):
        """Let seconds pass for the page, which asks the server for what is new as often as ever."""
        self.driver.execute_async_script(
            "const done = arguments[1]; window.pass(arguments[0]).then(() => done())", seconds
        )

    def wait_a_second(self):
        """Wait until the server would say another second than the page that was loaded."""
        made = int(self.one("body").get_attribute("data-made"))
        wait_for(lambda: time.time() > made + 1.5)

    def press(self, text, css="main"):
        """Click the button with this text."""
        [button] = [found for found in self.all(f"{css} button") if found.text == text]
        old = self.one("html")
        button.click()
        self.arrive(old)

    def tab(self):
        """Press Tab; return what has the focus then: its name, its text, its outline."""
        webdriver.ActionChains(self.driver, duration=0).send_keys(TAB).perform()
        return self.js(
            """const e = document.activeElement, style = getComputedStyle(e);
            return [e.closest('.run') ? 'mark' : e.tagName.toLowerCase(),
                    e.getAttribute('aria-label') || e.textContent,
                    style.outlineStyle != 'none' && parseFloat(style.outlineWidth) >= 2]"""
        )


def gone(element):
    try:
        element.is_enabled()
    except Exception:  # noqa: BLE001 - stale, or the page is between two documents
        return True
    return False


def show(driver, look):
    """Let the browser be wide and light, wide and dark, or as narrow as a phone."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if look == "dark" else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    width = 390 if look == "phone" else 1200
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": look == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def violations(driver):
    """Return what axe-core has to say against the page that is shown."""
    driver.execute_script((Path(AXE.origin).parent / "axe.min.js").read_text())
    found = driver.execute_async_script(
        """const done = arguments[0];
        axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations.map(
            v => [v.id, v.help, ...v.nodes.slice(0, 3).map(n => n.html + n.failureSummary)])))"""
    )
    return ["\n".join(parts) for parts in found]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = NEEDED["chromium"]
    words = "headless=new no-sandbox disable-gpu disable-dev-shm-usage hide-scrollbars"
    for word in words.split():
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(NEEDED["chromedriver"])
    )
    driver.set_script_timeout(300)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CLOCK})
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def console(driver):
    """Nothing is said in the console; a refused script or style would be."""
    yield
    said = [entry for entry in driver.get_log("browser") if entry["source"] != "network"]
    assert said == []


def add_runs(web, rows):
    with sqlite3.connect(web.state / "bgtasks.db", timeout=60) as db:
        db.executemany(HISTORY, rows)
    db.close()


@pytest.fixture(scope="module")
def empty(driver, tmp_path_factory):
    """No task at all."""
    with contextlib.closing(Web(tmp_path_factory.mktemp("empty"), driver)) as web:
        web.wake()
        yield web.serve()


SLOW = """
    import pathlib, time
    here = pathlib.Path(task.options["folder"])
    print("begins <b>bold</b>", flush=True)
    while not (here / "stop").exists():
        done = here / "done"
        task.progress(int(done.read_text()) if done.exists() else 3, 10)
        time.sleep(0.1)
"""


def with_three_tasks(web):
    """One that works as long as it may, one that failed, one with a run of each outcome."""
    web.python("slow", SLOW, "every 1 h", options={"folder": str(web.folder)})
    web.shell("bad", "exit 1", "every 1 h", description="Fails, always")
    web.shell("good", "exit 0", "every 20 min", description="Works & <i>more</i>")
    web.wake("--status_only")
    web.wake("--maintenance_flag=tasks.d")
    web.change("UPDATE task SET consecutive_failures = 5, last_outcome = 'failed' WHERE name='bad'")
    now = time.time()
    runs = [("good", now - 1800 * (i + 1), kind) for i, kind in enumerate(OUTCOMES)]
    runs += [("good", now - 5 * 86400, "done"), ("bad", now - 600, "failed")]
    rows = [(n, at, at + 90, kind, f"x{i}", f"said {kind}") for i, (n, at, kind) in enumerate(runs)]
    add_runs(web, rows)
    web.change("UPDATE task SET next_run_at = ?", int(now) + 2700)
    web.make_due("slow")
    web.work()
    wait_for(lambda: web.status("slow")["progress"])
    return web.serve()


@pytest.fixture(scope="module")
def three(driver, tmp_path_factory):
    with contextlib.closing(Web(tmp_path_factory.mktemp("three"), driver)) as web:
        yield with_three_tasks(web)


@pytest.fixture(scope="module")
def many(driver, tmp_path_factory):
    """200 tasks, and 100,000 runs in the history."""
    with contextlib.closing(Web(tmp_path_factory.mktemp("many"), driver)) as web:
        for i in range(200):
            web.shell(f"t{i:03}", "exit 0", "every 10 min")
        web.wake("--status_only")
        web.wake("--maintenance_flag=tasks.d")
        begin = time.time() - 120 * 86400
        moments = [begin + i * 103.6 for i in range(100_000)]
        kinds = ["done"] * 30 + OUTCOMES
        rows = [
            (f"t{i % 200:03}", at, at + 5, kinds[i % 38], f"x{i}", "")
            for i, at in enumerate(moments)
        ]
        add_runs(web, rows)
        yield web.serve()


@pytest.fixture
def web(driver, tmp_path):
    """An installation for a test that changes something."""
    web = Web(tmp_path / "own", driver)
    yield web
    web.cdp("Emulation.setScriptExecutionDisabled", value=False)
    web.close()


def last_run(web, task="good"):
    return web.rows("SELECT max(id) id FROM run WHERE task = ?", task)[0]["id"]


# -- who may look


def test_a_wrong_password_says_so_a_right_one_opens_and_logging_out_closes(empty):
    empty.open("/")
    elsewhere, empty.cookie = empty.cookie, None
    empty.log_in("wrong")
    assert empty.one("[role=alert]").text == "This is not the login of an administrator."
    assert "What is wrong" not in empty.text
    empty.log_in()
    assert "What is wrong" in empty.text
    empty.press("Log out", "header")
    assert "Administrator" in empty.text
    empty.driver.get(empty.url + "/")
    assert "What is wrong" not in empty.text
    empty.cookie = elsewhere
    empty.open("/")
    assert "Administrator" in empty.text
    empty.cookie = None
    empty.log_in()
    empty.cookie = empty.driver.get_cookie("bgtasks")["value"]


# -- what is shown


def test_without_tasks_it_says_so(empty):
    empty.open()
    assert re.search(r"Last wake-up \d\d:\d\d:\d\d \(.* ago\) by .*, worked\.", empty.text)
    assert "Nothing is planned." in empty.text
    assert "Nothing." in empty.text
    assert not empty.all(".run")


def test_what_is_wrong_stands_worst_first(three):
    three.open()
    found = [item.text for item in three.all(".find li")]
    assert [text.split(" ")[:2] for text in found] == [["Critical:", "bad"], ["Warning:", "good"]]
    three.click(".find li a")
    assert three.driver.current_url == three.url + "/task/bad"


def test_what_runs_has_a_bar_and_what_comes_next_is_in_order(three):
    three.open()
    assert "slow since" in three.text
    bar = three.one("progress")
    assert (bar.get_attribute("value"), bar.get_attribute("max")) == ("3", "10")
    coming = three.js(
        """const head = [...document.querySelectorAll('h2')].find(h =>
        h.textContent == 'What comes next'); return head.nextElementSibling.textContent"""
    )
    assert re.fullmatch(r"bad .*\(in .* min\), good .*, slow .*", coming)
    rows = {row.text.split(" ")[0]: row.text for row in three.all("tbody tr")}
    assert set(rows) == {"bad", "good", "slow"}
    assert "✗ failed" in rows["bad"]
    assert "▶ running" in rows["slow"]


def test_each_outcome_has_its_own_colour_and_shape_in_the_lane_of_its_task(three):
    three.open()
    lanes = [item.text for item in three.all(".lanes li")]
    assert sorted(lanes) == ["bad", "good", "slow"]
    marks = three.js(
        """return [...document.querySelectorAll('.run')].map(run => {
        const path = run.querySelector('path'), style = getComputedStyle(path);
        return [run.getAttribute('aria-label').split(',')[0], path.getAttribute('d'),
                style.fill + style.stroke, /translate\\([\\d.]+ (\\d+)/.exec(
                path.getAttribute('transform'))[1]]})"""
    )
    found = {name.partition(": ")[2]: mark for name, *mark in marks}
    assert set(found) == {*OUTCOMES, "running"}
    assert len({shape for shape, _, _ in found.values()}) == 9
    assert len({colour for _, colour, _ in found.values()}) >= 4
    places = {name.partition(": ")[0]: int(y) for name, _, _, y in marks}
    assert places == {name: 34 + 24 * i for i, name in enumerate(lanes)}
    keys = set(three.one(".scroll + p.dim").text.split())
    assert keys == {*OUTCOMES, "running", "planned"}
    assert len(three.all(".lanes path.planned")) == 3
    now = three.one("path.now").rect
    assert abs(now["x"] - three.one(".lanes svg").rect["x"] - 490) < 2
    assert "out of date" not in three.text


def test_details_of_a_run_show_on_hover_and_on_keyboard_focus(three):
    three.open()
    first, second = three.all(".run")[:2]
    tips = three.all(".run .tip")
    assert not tips[0].is_displayed()
    webdriver.ActionChains(three.driver).move_to_element(first.find_element(CSS, "path")).perform()
    wait_for(tips[0].is_displayed)
    assert first.get_attribute("aria-label") == tips[0].text
    three.js("arguments[0].focus()", second)
    wait_for(tips[1].is_displayed)
    assert re.fullmatch(r"\w+: \w+, .* \(.* ago\), .*", tips[1].text)


def test_a_range_shows_more_of_the_past(three):
    three.open()
    assert len(three.all(".run")) == 10
    for key in ("1d", "3d", "7d"):
        three.follow(key)
        assert key in three.driver.current_url
        assert key in [strong.text for strong in three.all("main strong")]
    assert len(three.all(".run")) == 11


def test_200_tasks_with_100000_runs_are_drawn_and_loaded_fast(many):
    many.open("/?range=7d")
    assert len(many.all(".lanes li")) == 200
    assert 2900 < len(many.all(".run")) <= 3000
    assert "Only the newest 3000 runs are drawn." in many.text
    assert len(many.all("tbody tr")) == 200
    took = []
    while not took or (min(took) >= 3000 and len(took) < 10):  # the machine may have stood still
        many.open("/?range=7d")
        times = many.js("return performance.getEntriesByType('navigation')[0].toJSON()")
        took.append(times["responseEnd"] - times["requestStart"])
    assert min(took) < 3000  # the bench has the exact promise


def test_a_task_has_its_history_its_durations_and_why_it_ran(three):
    three.open("/task/good")
    assert len(three.all("tbody tr")) == 9
    assert len(three.all(".chart path")) == 9
    chart = three.one(".chart").get_attribute("aria-label")
    assert chart == "The last 9 runs, the newest last, at most 90 s"
    assert "Task good is active: 1 interrupted, not yet cleared." in three.text
    assert "Its schedule is 'every 20 min'." in three.text
    assert "Works & <i>more</i>" in three.text
    three.open("/task/slow")
    assert three.one("progress").get_attribute("value") == "3"


def test_a_run_shows_what_it_printed_even_while_it_is_at_work(three):
    three.open("/task/good")
    three.follow(str(last_run(three)))
    assert three.one("pre").text.startswith("said ")
    three.open(f"/run/{last_run(three, 'slow')}")
    assert three.one("pre").text == "begins <b>bold</b>"


# -- acting


def test_each_button_does_what_it_says_and_the_log_has_who(web):
    web.python("slow", SLOW, "manual", options={"folder": str(web.folder)})
    web.wake()
    web.serve()
    web.open("/task/slow")
    web.one("input[name=for]").send_keys("2 h")
    web.press("Pause")
    assert "Resume" in web.one("main").text
    until = web.rows("SELECT paused_until FROM task")[0]["paused_until"]
    assert 7000 < until - time.time() <= 7200
    assert web.status("slow")["state"] == "paused"
    web.press("Resume")
    assert web.status("slow")["state"] == "active"
    web.press("Run at the next look")
    assert web.rows("SELECT extra_trigger FROM task WHERE extra_at IS NOT NULL")
    web.press("Wake", "header")
    wait_for(lambda: web.status("slow")["running"])
    web.open("/task/slow")
    web.press("End its run")
    wait_for(lambda: web.status("slow")["last_outcome"] == "killed")
    web.change("UPDATE task SET consecutive_failures = 4")
    web.open("/task/slow")
    web.press("Seen: clear")
    assert web.status("slow")["consecutive_failures"] == 0
    said = web.rows("SELECT by, what FROM event WHERE task = 'slow' AND by LIKE 'web%' ORDER BY id")
    assert {row["by"] for row in said} == {"web root"}
    words = [row["what"].split(" ")[0] for row in said]
    assert words == ["paused", "resumed", "requested", "killed", "cleared"]


def test_without_scripts_people_log_in_and_act_and_the_page_loads_itself_anew(web):
    web.shell("good", "exit 0", "every 1 h")
    web.wake()
    web.cdp("Emulation.setScriptExecutionDisabled", value=True)
    web.serve()
    web.open()
    refresh = web.one("noscript meta[http-equiv=refresh], meta[http-equiv=refresh]")
    assert int(refresh.get_attribute("content")) >= 30
    web.open("/task/good")
    web.press("Pause")
    assert web.status("good")["state"] == "paused"
    web.press("Resume")
    assert web.status("good")["state"] == "active"


# -- it keeps itself new


def test_it_shows_what_is_new_and_keeps_focus_scrolling_and_selection(web):
    web.look = "phone"
    with_three_tasks(web)
    web.open()
    screen = {"width": 280, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    web.cdp("Emulation.setDeviceMetricsOverride", **screen)  # so narrow that all must scroll
    assert web.one("body").get_attribute("data-every") == "5"
    web.js(
        """window.mark = 'same'; const table = document.querySelector('table');
        table.parentElement.scrollLeft = 40; document.querySelector('.lanes').scrollLeft = 55;
        table.querySelector('a[href$="/task/good"]').focus({preventScroll: true});
        window.scrollTo(0, 99);
        getSelection().selectAllChildren(document.querySelector('.find .l2 strong'))"""
    )
    before = web.js("return document.querySelector('header .dim').textContent")
    (web.folder / "done").write_text("7")
    wait_for(lambda: "7/10" in web.status("slow")["progress"])
    web.wait_a_second()
    web.pass_time(4)
    assert web.one("progress").get_attribute("value") == "3"
    web.pass_time(1)
    assert web.one("progress").get_attribute("value") == "7"
    state = web.js(
        """return [window.mark, document.activeElement.getAttribute('href'),
        document.activeElement.closest('table') != null, window.scrollY,
        document.querySelector('table').parentElement.scrollLeft,
        document.querySelector('.lanes').scrollLeft, getSelection().toString()]"""
    )
    assert state == ["same", "/task/good", True, 99, 40, 55, "Critical: bad"]
    assert web.js("return document.querySelector('header .dim').textContent") != before
    (web.folder / "stop").touch()
    wait_for(lambda: not web.status("slow")["running"])
    web.pass_time(5)
    assert not web.all("progress")
    assert web.one("body").get_attribute("data-every") == "30"
    assert web.js("return window.mark") == "same"
    assert not web.all(".stale")


def test_it_turns_red_when_the_server_is_gone_and_not_before(web):
    with_three_tasks(web)
    web.open()
    plain = web.js("return getComputedStyle(document.querySelector('header')).backgroundColor")
    before = web.one("header .dim").text
    web.wait_a_second()
    web.pass_time(60)
    assert web.one("header .dim").text != before
    assert not web.all(".stale")
    web.server.kill()
    web.server.wait()
    web.pass_time(15)
    assert not web.all(".stale")
    web.pass_time(1)
    assert web.all("body.stale")  # more than three times 5 s after the last answer
    header = "const style = getComputedStyle(document.querySelector('header'), arguments[0]);"
    assert web.js(f"{header} return style.backgroundColor") != plain
    said = web.js(
        "return getComputedStyle(document.querySelector('header .dim'),'::after').content"
    )
    assert "out of date" in said
    assert violations(web.driver) == []


# -- for everybody


def test_dark_has_other_colours(three):
    look = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    three.open(look="dark")
    dark = three.js(look)
    three.open()
    assert not set(dark) & set(three.js(look))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("page", ["login", "empty", "three", "many", "task", "run"])
def test_axe_finds_nothing_and_a_phone_need_not_scroll_sideways(request, page, look):
    web = request.getfixturevalue(page if page in ("empty", "many") else "three")
    path = {"task": "/task/slow", "run": f"/run/{page == 'run' and last_run(web)}"}.get(page, "/")
    cookie = web.cookie
    web.cookie = None if page == "login" else cookie
    web.open(path, look)
    web.cookie = cookie
    assert violations(web.driver) == []
    assert web.js("return document.scrollingElement.scrollWidth <= innerWidth")
    if look == "phone" and page == "many":
        box = "const box = document.querySelector('table').parentElement;"
        assert web.js(f"{box} return getComputedStyle(box).overflowX") == "auto"


def test_all_can_be_reached_by_keyboard_and_the_focus_is_seen(three):
    three.open()
    found = [three.tab()]
    assert found[0][:2] == ["a", "To the content"]
    assert three.one(".skip").is_displayed()
    while found[-1][0] != "body" and len(found) < 100:
        found.append(three.tab())
    found.pop()
    assert all(outlined for _, _, outlined in found), found
    kinds = [kind for kind, _, _ in found]
    texts = [text for _, text, _ in found]
    assert kinds.count("mark") == 10
    assert {"bgtasks", "Wake", "Log out", "1d", "7d", "Past the timeline", "Timeline"} <= set(texts)
    assert texts.count("good") >= 2
    three.open()
    while (found := three.tab())[0] != "mark":
        assert found[0] != "body"
    webdriver.ActionChains(three.driver).send_keys(ENTER).perform()
    wait_for(lambda: "/run/" in three.driver.current_url)


# -- one static file


@pytest.fixture
def static(three, tmp_path):
    """The page as a file, by a path and by a web server that only serves files."""
    file = tmp_path / "status.html"
    subprocess.run(three.script(f"--html={file}"), check=True, env=three.env, timeout=60)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield file, [file.as_uri(), f"http://127.0.0.1:{server.server_port}/status.html"]
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_the_static_file_shows_the_same_without_a_link_that_leads_nowhere(three, static):
    three.open()
    heads = [head.text for head in three.all("h2")]
    for address in static[1]:
        three.driver.get(address)
        assert [head.text for head in three.all("h2")] == heads
        assert len(three.all(".run")) == 10
        targets = [link.get_attribute("href").partition("#") for link in three.all("a[href]")]
        assert {page for page, _, _ in targets} == {address}
        assert all(three.all(f"#{name}") for _, _, name in targets)
        assert not three.all("form, button, [src], link")
        for look in LOOKS:
            show(three.driver, look)
            assert violations(three.driver) == []
        assert not three.all(".stale")


def test_the_static_file_turns_red_when_nobody_writes_it_anew(three, static):
    file, addresses = static
    old = re.sub(r'data-made="\d+"', f'data-made="{time.time() - 7200:.0f}"', file.read_text())
    file.write_text(old)
    for address in addresses:
        three.driver.get(address)
        wait_for(lambda: three.all("body.stale"))
