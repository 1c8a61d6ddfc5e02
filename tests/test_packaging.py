"""Each way to install it, in an environment with nothing in it: afterwards it runs tasks.

The packages are downloaded once, by hash, and installed from that folder."""

import ast
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import PROGRAM, Site
from rooms import lacking, readme

import bgtasks

pytestmark = pytest.mark.unmeasured

ROOT = PROGRAM.parent
ZIPAPP = ROOT / "contrib" / "zipapp"
SOURCE = PROGRAM.read_text()
HAS_TOML = sys.version_info >= (3, 11)
FULL = os.environ.get("BGTASKS_FULL") == "1"
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"


def tool(name):
    """Return a program that installs, beside this Python or of the environment of the tests."""
    places = (Path(sys.executable).parent, ROOT / ".venv" / "bin", os.environ["PATH"])
    found = shutil.which(name, path=":".join(str(place) for place in places))
    return found or lacking(f"{name} is missing: pip install {name}")


def call(command, env, **options):
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    done = subprocess.run([str(word) for word in command], env=env, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def made_once(tmp_path_factory, name, make):
    """Return a folder that one of the processes of these tests has filled for all of them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            shutil.rmtree(base / f"{name}.new", ignore_errors=True)
            (base / f"{name}.new").mkdir()
            make(base / f"{name}.new")
            (base / f"{name}.new").rename(base / name)
    return base / name


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Return a folder with what is pinned for the zipapp, and what builds a wheel."""
    return made_once(tmp_path_factory, "wheels", fetch)


def fetch(folder):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    pure = ["--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none"]
    pinned = [*pure, "--python-version=3.9", "--require-hashes"]
    for what in ([*pinned, "-r", ZIPAPP / "requirements.txt"], ["flit_core<5", "pip<26"]):
        if subprocess.run([*command, *what], timeout=300, check=False).returncode:
            lacking("packages cannot be fetched from the index")


@pytest.fixture
def bare(tmp_path, wheels):
    """Return an environment that knows nothing but where the packages lie."""
    (tmp_path / "uv.toml").write_text(f'no-index = true\nfind-links = ["{wheels}"]\n')
    found = {
        "PATH": "/usr/bin:/bin",
        "HOME": tmp_path / "home",
        "LC_ALL": "C.UTF-8",
        "PIP_NO_INDEX": 1,
        "PIP_FIND_LINKS": wheels,
        "PIP_DISABLE_PIP_VERSION_CHECK": 1,
        "UV_CONFIG_FILE": tmp_path / "uv.toml",
        "UV_PYTHON": sys.executable,
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_TOOL_DIR": tmp_path / "tools",
        "UV_TOOL_BIN_DIR": tmp_path / "bin",
        "PIPX_HOME": tmp_path / "pipx",
        "PIPX_BIN_DIR": tmp_path / "bin",
        "PIPX_DEFAULT_PYTHON": sys.executable,
    }
    return {key: str(value) for key, value in found.items()}


@pytest.fixture
def empty_python(tmp_path):
    """Return a Python without any package, not even pip."""
    venv.create(tmp_path / "venv", with_pip=False)
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture
def app(tmp_path):
    """Return an installation that lacks only the program."""
    (tmp_path / "app").mkdir()
    site = Site(tmp_path / "app")
    site.params.unlink()
    site.shell("hello", 'echo "$BGTASKS_TASK" >>../ledger', schedule="always")
    site.python("cron", "open('../ledger', 'a').write('cron\\n')", schedule="*/10 * * * *")
    return site


def tasks_of(app, command, env):
    """Wake it from elsewhere, and return what then is said of each task."""
    call([*command, "--cron_max_execution_time=0"], env, cwd="/")
    assert app.ledger.read_text() == "hello\n"
    rows = bgtasks.json.loads(call([*command, "status", "--json"], env, cwd="/"))["tasks"]
    return {row["name"]: row for row in rows}


def runs_all(app, command, env):
    """Look at what is promised of a whole installation: tasks run, cron's expressions are read."""
    tasks = tasks_of(app, command, env)
    assert (tasks["hello"]["last_outcome"], tasks["cron"]["state"]) == ("done", "active")
    call([*command, "run", "cron"], env, cwd="/")
    assert app.ledger.read_text() == "hello\ncron\n"
    return True


def wakes_by_its_crontab_line(app, command, env):
    line = call([*command, "install"], env, cwd="/")
    assert line.startswith("*/5 * * * * ")
    words = line[len("*/5 * * * * ") :].rpartition(" # ")[0]
    app.ledger.unlink(missing_ok=True)
    call(["/bin/sh", "-c", f"{words} --cron_max_execution_time=0"], {"PATH": "/usr/bin:/bin"})
    assert "hello" in app.ledger.read_text()
    return True


# -- one file


def test_a_plain_copy_needs_nothing_but_says_what_would_help(app, bare, empty_python):
    shutil.copy(PROGRAM, app.folder)
    command = [empty_python, app.folder / "bgtasks.py"]
    if not HAS_TOML:
        rows = bgtasks.json.loads(call([*command, "status", "--json"], bare, cwd="/"))["tasks"]
        assert {row["reason"].partition(": ")[2] for row in rows} == {
            "needs tomli: pip install tomli"
        }
        return
    tasks = tasks_of(app, command, bare)
    _, *words = readme("zipapp", "python3 bgtasks.py").split()
    assert "hello" in call([empty_python, *words], bare, cwd=app.folder)
    assert tasks["hello"]["last_outcome"] == "done"
    assert tasks["cron"]["reason"].endswith("needs croniter: pip install croniter")
    assert wakes_by_its_crontab_line(app, command, bare)


def pip(python, words):
    """Return a command of a README that begins with `pip`, for a Python that has none."""
    name, *words = words.split()
    assert name == "pip"
    return [sys.executable, "-m", "pip", "--python", python, *words, "--quiet"]


def test_packages_may_lie_in_a_folder_beside_it(app, bare, empty_python):
    shutil.copy(PROGRAM, app.folder)
    shutil.copy(ROOT / "contrib" / "web" / "bgtasks_web.py", app.folder)
    call(pip(empty_python, readme("zipapp", "--target lib")), bare, cwd=app.folder)
    command = [empty_python, app.folder / "bgtasks.py"]
    assert runs_all(app, command, bare)
    assert wakes_by_its_crontab_line(app, command, bare)
    app.python("uses", "import dateutil.rrule", schedule="manual")
    call([*command, "run", "uses"], bare)
    page = app.folder / "page.html"  # the web side has an entry of its own
    call([empty_python, app.folder / "bgtasks_web.py", f"--html={page}"], bare, cwd="/")
    assert "needs croniter" not in page.read_text()
    (app.folder / "lib").chmod(0o777)
    done = subprocess.run([*command, "status"], env=bare, capture_output=True, check=False)
    assert (done.returncode, b"chmod go-w" in done.stderr) == (77, True)


def test_uv_runs_the_file_with_what_its_block_names(app, bare):
    uv, copy = tool("uv"), shutil.copy(PROGRAM, app.folder)
    assert runs_all(app, [uv, "run", "--quiet", copy], bare)
    assert wakes_by_its_crontab_line(app, [uv, "run", "--quiet", copy], bare)
    program, *words = readme("zipapp", "uv run").split()
    assert program == "uv"
    assert "hello" in call([uv, *words], bare, cwd=app.folder)
    line = re.search(r"`cd /srv/app && \S+/(uv .*?)`", (ZIPAPP / "README.md").read_text())[1]
    app.ledger.unlink()
    call([uv, *line.split()[1:], "--cron_max_execution_time=0"], bare, cwd=app.folder)
    assert app.ledger.read_text() == "hello\n"


def test_its_block_names_what_the_package_names():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.MULTILINE | re.DOTALL)[1]
    project = (ROOT / "pyproject.toml").read_text()
    for line in block.replace("# ", "").splitlines():
        assert f"\n{line}\n" in project


# -- the zipapp


@pytest.fixture(scope="module")
def pyz(tmp_path_factory, wheels):
    return built(tmp_path_factory.mktemp("pyz") / "bgtasks.pyz", wheels)


def built(target, wheels, python=sys.executable):
    command = [python, ZIPAPP / "build.py", target]
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    call(command, env)
    return target


def pythons():
    """Return an interpreter of the oldest, a middle and the newest version of this machine."""
    found = [next(iter(PYENV.glob(f"3.{minor}.*/bin/python")), None) for minor in range(9, 16)]
    found = [python for python in found if python]
    return found[:: max(1, (len(found) - 1) // 2)] if found else [Path(sys.executable)]


@pytest.mark.parametrize("python", pythons(), ids=lambda path: path.parent.parent.name)
def test_one_file_runs_everywhere_without_pip(app, bare, pyz, python):
    shutil.copy(pyz, app.folder)
    # not even what that Python has installed
    assert runs_all(app, [python, "-I", "-S", app.folder / "bgtasks.pyz"], bare)


def test_it_is_the_same_byte_for_byte_whoever_builds_it(tmp_path, pyz, wheels):
    first = hashlib.sha256(pyz.read_bytes()).hexdigest()
    another = next(p for p in [pythons()[-1], Path(sys.executable)] if has_pip(p))
    os.umask(0o077)
    again = built(tmp_path / "bgtasks.pyz", wheels, another)
    assert hashlib.sha256(again.read_bytes()).hexdigest() == first
    assert again.stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path) == ["bgtasks.pyz"]


def has_pip(python):
    command = [python, "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_it_holds_the_program_as_it_is_and_the_licenses_of_all(pyz):
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
        assert archive.read("bgtasks.py").decode() == SOURCE
    assert names == sorted(names)
    assert not [name for name in names if "/tests/" in name or name.endswith((".so", ".pyc"))]
    pins = (ZIPAPP / "requirements.txt").read_text()
    for package in re.findall(r"^([a-z-]+)==", pins, re.MULTILINE):
        folder = re.compile(rf"{package.replace('-', '_')}-[\d.]+\.dist-info/.*LICENSE")
        assert any(folder.match(name) for name in names), package


def test_it_is_built_as_the_readme_says(tmp_path, wheels):
    for place in ("bgtasks.py", "LICENSE", "contrib/zipapp"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / place).is_dir() else shutil.copy
        copy(ROOT / place, tmp_path / place)
    python, *words = readme("zipapp", "build.py").split()
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    said = call([sys.executable, *words], env, cwd=tmp_path)
    assert re.fullmatch(r"bgtasks.pyz: \d+ bytes, \d+ files\n", said)
    assert python == "python3"
    assert (tmp_path / "bgtasks.pyz").exists()


def test_a_changed_package_is_refused(tmp_path, wheels):
    forged = tmp_path / "forged"
    shutil.copytree(wheels, forged)
    with zipfile.ZipFile(next(forged.glob("croniter-*")), "a") as archive:
        archive.writestr("croniter/evil.py", "")
    done = subprocess.run(
        [sys.executable, ZIPAPP / "build.py", tmp_path / "bgtasks.pyz"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(forged)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 69
    assert done.stderr.endswith("build.py: pip could not fetch the packages, see above\n")
    assert not (tmp_path / "bgtasks.pyz").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 64, "Make bgtasks.pyz"),
        (["one", "two"], 64, "Make bgtasks.pyz"),
        (["/nowhere/bgtasks.pyz"], 73, "No such file or directory"),
        (["/dev/full/bgtasks.pyz"], 73, "Not a directory"),
    ],
)
def test_build_says_what_is_wrong(wheels, words, code, said):
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    command = [sys.executable, ZIPAPP / "build.py", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, said in done.stderr) == (code, True)


def test_places_are_beside_the_file_also_through_a_link_and_a_relative_path(app, bare, pyz):
    shutil.copy(pyz, app.folder)
    link = app.folder.parent / "bgtasks"
    link.symlink_to(app.folder / "bgtasks.pyz")
    link.chmod(0o755)
    assert runs_all(app, [sys.executable, link], bare)
    app.ledger.unlink()
    call([sys.executable, "bgtasks.pyz", "run", "cron"], bare, cwd=app.folder)
    assert app.ledger.read_text() == "cron\n"
    assert sorted(os.listdir(app.folder)) == ["bgtasks.pyz", "ledger", "state", "tasks.d"]
    (app.folder / "lib").mkdir()
    (app.folder / "lib" / "driver.py").write_text("")
    app.python("uses", "import driver", schedule="manual")
    call([sys.executable, link, "run", "uses"], bare)


def test_it_is_a_program_of_its_own(app, bare, pyz):
    shutil.copy(pyz, app.folder)
    where = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    said = call([app.folder / "bgtasks.pyz", "--version"], {**bare, "PATH": where})
    assert said == f"bgtasks {bgtasks.__version__}\n"


def test_the_zipapp_wakes_by_its_crontab_line(app, bare, empty_python, pyz):
    shutil.copy(pyz, app.folder)
    assert wakes_by_its_crontab_line(app, [empty_python, app.folder / "bgtasks.pyz"], bare)


def test_what_goes_wrong_in_the_zipapp_is_shown_with_its_lines(app, bare, pyz):
    shutil.copy(pyz, app.folder)
    app.python("bad", "raise ValueError('at night')", schedule="manual")
    command = [sys.executable, app.folder / "bgtasks.pyz"]
    done = subprocess.run([*command, "run", "bad"], env=bare, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"ValueError: at night" in done.stdout


def test_an_old_python_reads_one_line():
    ast.parse((ZIPAPP / "__main__.py").read_text(), feature_version=(3, 4))
    for python in PYENV.glob("[23].[2-8]*/bin/python"):
        command = [python, ZIPAPP / "__main__.py"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 69
        assert re.fullmatch(r"bgtasks: needs Python 3.9 or newer, this is [\d.]+\n", done.stderr)


# -- as a package


def test_pip_installs_it(app, bare, empty_python):
    call(pip(empty_python, readme("zipapp", "pip install .")), bare, cwd=ROOT)
    assert works_as_a_package(app, bare, empty_python.parent / "bgtasks")


@pytest.mark.parametrize("words", [("uv", "tool"), ("pipx",)], ids=" ".join)
def test_a_tool_installs_it(app, bare, words):
    call([tool(words[0]), *words[1:], "install", "."], bare, cwd=ROOT)
    assert works_as_a_package(app, bare, Path(bare["UV_TOOL_BIN_DIR"]) / "bgtasks")


def works_as_a_package(app, env, program):
    """A module has no folder of its own, so it asks where the tasks lie."""
    done = subprocess.run([program, "status"], env=env, capture_output=True, check=False)
    assert (done.returncode, b"--param_file=PATH" in done.stderr) == (78, True)
    app.params.write_text("node = here\n")
    command = [program, f"--param_file={app.params}"]
    return runs_all(app, command, env) and wakes_by_its_crontab_line(app, command, env)


@pytest.fixture(scope="module")
def dist(tmp_path_factory, wheels):
    """Return the folder with what `python3 -m build` makes."""
    build = [sys.executable, "-m", "build"]
    if not importlib.util.find_spec("build"):
        build = [tool("pyproject-build")]
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}

    def make(folder):
        call([*build, "--outdir", folder], env, cwd=ROOT)

    return made_once(tmp_path_factory, "dist", make)


def test_the_wheel_is_the_one_module(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"bgtasks-{bgtasks.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(about).decode()
    assert names == {"bgtasks.py"}
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    needed = [line.split()[1] for line in needed if "extra ==" not in line]
    assert [re.split("[^a-z]", name)[0] for name in needed] == ["croniter", "tomli"]
    assert "Requires-Python: >=3.9" in metadata


def test_the_sdist_holds_all_that_is_kept(dist):
    done = subprocess.run(
        ["git", "ls-files", "bgtasks.py", "tests", "contrib", "tasks.d", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("no git here that could name what is kept")
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    assert set(done.stdout.split()) - there == set()


def test_tests_run_from_the_sdist_alone(dist, tmp_path):
    (sdist,) = dist.glob("*.tar.gz")
    call(["tar", "-xzf", sdist, "-C", tmp_path], os.environ)
    folder = tmp_path / sdist.name[: -len(".tar.gz")]
    # in their short forms, else this test would go on in itself
    not_theirs = ("COVE", "PYTE", "BGTA")
    env = {key: value for key, value in os.environ.items() if key[:4] not in not_theirs}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if FULL:  # all of them
        assert " passed" in call([*command, "-n", "4"], env, cwd=folder, timeout=7200)
    # each file is read, and some of the tests run
    few = ["-k", "test_docs and (shipped or first_command) or test_layout and sections"]
    said = call([*command, *few], env, cwd=folder)
    assert re.search(r"\b[4-9] passed, (\d skipped, )?\d{3,} deselected", said)
    where = "import bgtasks; print(bgtasks.__file__)"
    said = call([sys.executable, "-c", where], env, cwd=folder)
    assert said == f"{folder / 'bgtasks.py'}\n"
