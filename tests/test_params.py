import os

import pytest
from conftest import somebody_else
from hypothesis import given
from hypothesis import strategies as st

import bgtasks
from bgtasks import ConfigError, RefusedError, parse_params, read_param_file

SEED = b"""\
# This is a parameter file
#
# If a parameter is given both in the file and in the arguments,
# then the value given as argument is retained
#

# Authentication
auth_user = qwertyuiop
auth_pwd = ded!catedL0g1n

# My web service
size_min = 20 # Megabytes
time_limit = 40 # Minutes
"""


def parsed(content):
    return {param.key: param.value for param in parse_params(content)}


def test_the_example_of_the_seed_parses_to_exactly_its_values():
    assert parsed(SEED) == {
        "auth_user": "qwertyuiop",
        "auth_pwd": "ded!catedL0g1n",
        "size_min": "20",
        "time_limit": "40",
    }


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"k=abc==", "abc=="),
        (b"k = a = b", "a = b"),
        (b"k = 'pa#ss'", "pa#ss"),
        (b'k = "pa#ss" # said', "pa#ss"),
        (b"k = 50%x!$HOME", "50%x!$HOME"),
        (b"\xef\xbb\xbfk = v\r\n", "v"),
        (b"\tk\t=\tv\t# c", "v"),
        (b"k =", ""),
        (b"k = # nothing", ""),
        (b"k = it's", "it's"),
        ("k = grün".encode(), "grün"),
        (b"k = 1\nk = 2", "2"),
    ],
    ids=str,
)
def test_accepted(content, value):
    assert parsed(content) == {"k": value}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = 1\nk = pa#ss", ["p:2:", "quote"]),
        (b"k = 0 9 * * 5#3", ["p:1:", "quote"]),
        (b"\n\nwhat", ["p:3:", "'what'", "key = value"]),
        (b"= v", ["p:1:", "key = value"]),
        (b"k = 'open", ["p:1:", "quoted"]),
        (b"k = 'a' b", ["p:1:", "quoted"]),
        (b"k = v\xff", ["p: byte 5", "UTF-8"]),
        ("k = v".encode("utf-16"), ["byte 0", "UTF-8"]),
        (b"k = \0", ["byte 4", "NUL"]),
    ],
    ids=str,
)
def test_refused_with_file_line_and_way_out(content, words):
    with pytest.raises(ConfigError) as refused:
        parse_params(content, "p")
    text = str(refused.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@given(st.dictionaries(st.from_regex(r"\A[a-z_]{1,8}\Z"), st.text(st.characters(codec="utf-8"))))
def test_what_is_written_is_read_back(values):
    values = {k: "".join(v.split()).replace('"', "").replace("\0", "") for k, v in values.items()}
    text = "".join(f'{key} = "{value}"\n' for key, value in values.items())
    assert parsed(text.encode()) == values


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_give_params_or_an_error_that_says_where(content):
    try:
        params = parse_params(content, "file")
    except ConfigError as error:
        assert str(error).startswith("file:")
    else:
        assert all(1 <= int(p.where.split(":")[1]) <= content.count(b"\n") + 1 for p in params)


def file(tmp_path, text="k = v\n", mode=0o600):
    path = tmp_path / "p"
    path.write_text(text)
    path.chmod(mode)
    return path


def refusal(path, error=RefusedError):
    with pytest.raises(error) as refused:
        read_param_file(str(path), bgtasks.is_secret)
    assert str(path) in str(refused.value)
    return str(refused.value)


def test_a_file_that_others_can_write_is_refused(tmp_path):
    assert "chmod go-w" in refusal(file(tmp_path, mode=0o666))
    assert "chmod go-w" in refusal(file(tmp_path, mode=0o662))


def test_a_group_without_other_members_may_write():
    assert bgtasks._is_private_group(0, 0)
    assert not bgtasks._is_private_group(1, 0)
    assert not bgtasks._is_private_group(54321, 0)
    assert not bgtasks._is_private_group(54321, 54321)


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    path = file(tmp_path, "a = 1\nauth_pwd = x\n", 0o640)
    assert refusal(path) == f"{path}:2: others can read auth_pwd; chmod 600 {path}"
    path.chmod(0o600)
    assert len(read_param_file(str(path), bgtasks.is_secret)) == 2
    path.write_text("auth_pwd =\n")
    path.chmod(0o644)
    assert read_param_file(str(path), bgtasks.is_secret)[0].value == ""


def test_a_folder_that_others_can_write_is_refused_unless_it_is_sticky(tmp_path):
    path = file(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(RefusedError, match=f"{tmp_path}.*chmod go-w"):
        read_param_file(str(path), bgtasks.is_secret)
    tmp_path.chmod(0o1777)
    assert read_param_file(str(path), bgtasks.is_secret)


def test_a_file_of_somebody_else_is_refused_also_behind_a_link(tmp_path):
    path = file(tmp_path)
    os.chown(path, 4321, 0)
    assert "chown" in refusal(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert "chown" in refusal(link)


@pytest.mark.parametrize("what", ["folder", "fifo", "zero", "missing", "huge"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path, what):
    path = tmp_path / "p"
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "zero":
        path = "/dev/zero"
    elif what == "huge":
        path.write_bytes(b"#" * (1 << 20) + b"\n")
    refusal(path, ConfigError)


def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = file(tmp_path, mode=0o600)
    with somebody_else():
        assert "you may not read it" in refusal(path)
