import os
import subprocess
import sys
from pathlib import Path

import pytest

import bgtasks
from bgtasks import ConfigError, read_settings

PROGRAM = Path(bgtasks.__file__)


def settings(tmp_path, text="", **arguments):
    path = tmp_path / "cron.params"
    path.write_text(text)
    path.chmod(0o600)
    return read_settings(arguments, str(tmp_path / "bgtasks.py"))


def refusal(tmp_path, text="", **arguments):
    with pytest.raises(ConfigError) as refused:
        settings(tmp_path, text, **arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_defaults_lie_beside_the_script(tmp_path):
    found = read_settings({}, str(tmp_path / "bgtasks.py"))
    assert found.tasks_dir == str(tmp_path / "tasks.d")
    assert found.state_dir == str(tmp_path / "state")
    assert (found.cron_max_execution_time, found.cron_sleep, found.max_parallel) == (600, 2, 1)
    assert found.node == os.uname().nodename
    assert (found.verbose, found.timezone, found.task) == (False, "", ())


def test_relative_paths_lie_beside_the_first_param_file(tmp_path):
    (tmp_path / "a").mkdir()
    first, second = tmp_path / "a" / "one", tmp_path / "two"
    first.write_text("cron_sleep = 3\nverbose = 1\n")
    second.write_text("tasks_dir = x/../y\ncron_sleep = 4\n")
    found = read_settings({"param_file": f"{first},{second}"}, "/nowhere/bgtasks.py")
    assert found.tasks_dir == str(tmp_path / "a" / "y")
    assert (found.cron_sleep, found.verbose) == (4, True)


def test_packages_beside_the_script_are_found_after_all_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before, lib = [*sys.path], tmp_path / "lib"
    read_settings({}, str(tmp_path / "bgtasks.py"))
    assert sys.path == before
    lib.mkdir()
    for _ in range(2):  # as the web side does, for each request
        read_settings({}, str(tmp_path / "bgtasks.py"))
    assert sys.path == [*before, str(lib)]
    lib.chmod(0o777)
    sys.path.remove(str(lib))
    with pytest.raises(bgtasks.RefusedError, match=f"^{lib}: .*; chmod go-w {lib}$"):
        read_settings({}, str(tmp_path / "bgtasks.py"))
    assert sys.path == before


def test_an_argument_wins_and_the_last_of_equal_keys(tmp_path):
    found = settings(tmp_path, "cron_sleep = 3\ncron_sleep = 4\nmax_parallel = 2", max_parallel="5")
    assert (found.cron_sleep, found.max_parallel) == (4, 5)


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_booleans(tmp_path, text):
    assert settings(tmp_path, f"verbose = {text}").verbose is True
    assert settings(tmp_path, "verbose = off").verbose is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cron_max_execution_tiem = 5", ["unknown key", "'cron_max_execution_time'"]),
        ("size_min = 20", ["unknown key 'size_min'"]),
        ("cron_sleep = 1_000", ["1 to 3600"]),
        ("cron_sleep = ٣", ["1 to 3600"]),
        ("cron_sleep = 1e3", ["1 to 3600"]),
        ("cron_sleep = 0x10", ["1 to 3600"]),
        ("cron_sleep = nan", ["1 to 3600"]),
        ("cron_sleep = " + "9" * 5000, ["1 to 3600"]),
        ("cron_sleep = -1", ["1 to 3600"]),
        ("cron_sleep = 0", ["1 to 3600"]),
        ("cron_max_execution_time = 86401", ["0 to 86400"]),
        ("max_parallel = 65", ["1 to 64"]),
        ("email_asynchronous = 2", ["1, 0, true"]),
        ("notify_email = me@example.org, me you@example.org", ["'me you@example.org'", "no mail"]),
        ("notify_email = -oQ/tmp", ["'-oQ/tmp'", "no mail"]),
        ("notify_on = failures", ["failure, recovery and success"]),
        ("notify_after = 0", ["1 to 1000"]),
        ("notify_command = sh -c 'echo", ["words as a shell does", "No closing quotation"]),
        ("smtp_security = ssl", ["starttls, tls or none"]),
        ("smtp_port = 65536", ["0 to 65535"]),
        ("web_token = " + "x" * 31, ["at least 32 characters", "secrets.token_urlsafe"]),
        ("web_max_execution_time = 0", ["1 to 3600"]),
        ("verbose = maybe", ["1, 0, true"]),
        ("tasks_dir = ~/tasks", ["written out"]),
        ("node = a\tb", ["one line"]),
        ("timezone = Europe/Berln", ["no zone", "Europe/Berlin"]),
        ("tasks_dir = state/tasks.d", ["apart"]),
        ("state_dir = tasks.d", ["apart"]),
        ("task = a", ["only an argument"]),
        ("param_file = x", ["only an argument"]),
        ("task.a = 5", ["unknown key 'task.a'"]),
        ("task..x = 5", ["unknown key"]),
        ("auth_pwd = " + "[" * 100, []),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_with_file_and_line(tmp_path, text, words):
    if not words:
        assert settings(tmp_path, text).auth_pwd == "[" * 100
        return
    refused = refusal(tmp_path, "\n" + text)
    if "apart" not in words:
        assert refused.startswith(f"{tmp_path}/cron.params:2: ")
    assert all(word in refused for word in words), refused


def test_a_refused_secret_is_not_shown(tmp_path):
    assert "hush" not in refusal(tmp_path, 'auth_pwd = "hush\x07hush"')


def test_a_refused_argument_is_named(tmp_path):
    assert refusal(tmp_path, cron_sleep="x").startswith("--cron_sleep: cron_sleep 'x' must be")


@pytest.mark.parametrize("files", ["", ","])
def test_param_file_must_name_a_file(tmp_path, files):
    assert "--param_file=PATH" in refusal(tmp_path, param_file=files)


def test_a_missing_param_file_is_refused_with_the_way_out(tmp_path):
    refused = refusal(tmp_path, param_file=str(tmp_path / "nope"))
    assert "cron.params.distrib" in refused
    assert str(tmp_path / "nope") in refused
    assert "cannot be read" in refusal(tmp_path, param_file="a\0b")


def test_an_installed_module_asks_for_a_param_file(tmp_path):
    home = tmp_path / "site-packages"
    home.mkdir()
    with pytest.raises(ConfigError, match="--param_file"):
        read_settings({}, str(home / "bgtasks.py"))


def test_overrides_are_kept_by_task_with_their_place(tmp_path):
    found = settings(tmp_path, "task.a.schedule = daily 03:30\ntask.a.options.keep = 3")
    first, second = found.overrides["a"]
    assert (first.path, first.value) == ("schedule", "daily 03:30")
    assert (second.path, second.where) == ("options.keep", f"{tmp_path}/cron.params:2")


def test_secrets_of_six_characters_and_more_are_to_be_masked(tmp_path):
    text = "auth_pwd = sesame\ntask.a.options.api_key = abcdefgh\nnode = longer-name"
    assert settings(tmp_path, text).secrets == ("sesame", "abcdefgh")
    assert settings(tmp_path, "auth_pwd = short").secrets == ()


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("auth_pwd", True),
        ("SMTP_PASSWORD", True),
        ("task.a.options.dsn", True),
        ("task.keys.schedule", False),
        ("cron_sleep", False),
    ],
)
def test_a_secret_is_known_by_its_name(key, secret):
    assert bgtasks.is_secret(key) is secret


def test_an_unknown_attribute_is_an_attribute_error(tmp_path):
    with pytest.raises(AttributeError):
        settings(tmp_path).nothing  # noqa: B018


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("10 min", 600), ("2h", 7200), ("7 days", 604800), ("1 w", 604800), ("5 sec", 5)],
)
def test_durations(text, seconds):
    assert bgtasks.read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "min", "5 m", "-5", "1.5 h", "٣", "5 years", "9" * 10])
def test_refused_durations(text):
    with pytest.raises(ValueError, match="10 min"):
        bgtasks.read_duration(text)


@pytest.mark.parametrize(
    "name", ["UTC", "", "Europe/Berlin", ":Europe/Berlin", "EST5EDT", "CET-1CEST,M3.5.0,M10.5.0/3"]
)
def test_zones_of_the_environment(name):
    bgtasks.refuse_bad_tz({"TZ": name})


@pytest.mark.parametrize("name", ["Foo/Bar", ":", "../../etc/passwd", "Europe"])
def test_refused_zones_of_the_environment(name):
    with pytest.raises(ConfigError, match="^TZ: "):
        bgtasks.refuse_bad_tz({"TZ": name})


def test_the_template_reads_back_to_the_defaults(tmp_path):
    text = bgtasks.distrib()
    lines = [
        line[1:] if line.startswith("#") and " = " in line else line for line in text.split("\n")
    ]
    wanted = [line for line in lines if not line.startswith(("key = ", "task.NAME", " "))]
    assert settings(tmp_path, "\n".join(wanted)).values == settings(tmp_path).values


def test_the_template_in_the_repository_is_the_one_of_the_table():
    assert (PROGRAM.parent / "cron.params.distrib").read_text() == bgtasks.distrib()


def test_every_option_is_in_the_help():
    text = bgtasks.option_help()
    assert all(f"--{option.key}=" in text and option.help in text for option in bgtasks.OPTIONS)


def test_reading_settings_imports_nothing_slow(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import bgtasks\n"
        f"bgtasks.read_settings({{}}, {str(tmp_path / 'x')!r})\n"
        "slow = {'re', 'json', 'typing', 'enum', 'zoneinfo', 'difflib', 'argparse', 'pathlib'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_an_empty_value_means_the_default_and_a_zone_is_kept(tmp_path):
    found = settings(tmp_path, "cron_sleep =\ntimezone = Europe/Berlin")
    assert (found.cron_sleep, found.timezone) == (2, "Europe/Berlin")
