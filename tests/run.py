"""Install what the tests need into .venv and run them, with coverage: python3 tests/run.py.

Arguments go to pytest; with any, coverage is measured but not judged. BGTASKS_VENV names another
folder for the environment.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def python_of(folder):
    """Return the interpreter of an environment that has what the tests need."""
    python = folder / "bin" / "python"
    if not python.exists():
        try:
            venv.create(folder, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError, ImportError):
            sys.exit("tests/run.py: cannot make a venv; on Debian: apt-get install python3-venv")
    mark = folder / "installed"
    wanted = (HERE / "pyproject.toml").read_text()
    if not mark.exists() or mark.read_text() != wanted:
        command = [python, "-m", "pip", "install", "--quiet", "--editable", f"{HERE}[test]"]
        subprocess.run(command, check=True)
        mark.write_text(wanted)
    return str(python)


def main():
    python = python_of(Path(os.environ.get("BGTASKS_VENV", HERE / ".venv")))
    if sys.argv[1:] == ["--only-install"]:
        return 0
    coverage = [python, "-m", "coverage"]
    subprocess.run([*coverage, "erase"], cwd=HERE, check=True)
    arguments = sys.argv[1:] or ["-n", "4", "--dist", "worksteal"]
    tests = subprocess.run([*coverage, "run", "-m", "pytest", *arguments], cwd=HERE, check=False)
    subprocess.run([*coverage, "combine", "--quiet"], cwd=HERE, check=False)
    report = subprocess.run([*coverage, "report"], cwd=HERE, check=False)
    return tests.returncode or (0 if sys.argv[1:] else report.returncode)


if __name__ == "__main__":
    raise SystemExit(main())
