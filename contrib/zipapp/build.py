#!/usr/bin/env python3
"""Make bgtasks.pyz, one file with all that bgtasks needs: python3 contrib/zipapp/build.py [FILE].

The same sources give the same bytes, on every machine and Python: packages are pinned by hash in
requirements.txt, and the archive has a fixed order, fixed times and modes, and is not compressed
(compressors differ). Needs pip and a package index, or PIP_FIND_LINKS and PIP_NO_INDEX.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OLDEST = "3.9"  # the Python that must find a fitting wheel
NEW_YEAR_1980 = (1980, 1, 1, 0, 0, 0)  # the first moment that an archive can name


def main(words: list[str]) -> int:
    """Build the file and say what came out."""
    if len(words) > 1 or any(word.startswith("-") for word in words):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 64
    target = Path(words[0] if words else "bgtasks.pyz")
    with tempfile.TemporaryDirectory() as folder:
        if not fetch(folder):
            return 69
        files = {**own_files(), **packaged(sorted(Path(folder).glob("*.whl")))}
    try:
        write(files, target)
    except OSError as error:
        print(f"build.py: {target}: {error.strerror}", file=sys.stderr)
        return 73
    print(f"{target}: {target.stat().st_size} bytes, {len(files)} files")
    return 0


def fetch(folder: str) -> bool:
    """Download the pinned wheels, those without compiled code; pip checks their hashes."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
    command += ["--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none"]
    command += [f"--python-version={OLDEST}", "--requirement", str(HERE / "requirements.txt")]
    done = subprocess.run(command, check=False)
    if done.returncode:
        print("build.py: pip could not fetch the packages, see above", file=sys.stderr)
    return done.returncode == 0


def own_files() -> dict[str, bytes]:
    places = (ROOT / "bgtasks.py", ROOT / "LICENSE", HERE / "__main__.py")
    return {path.name: path.read_bytes() for path in places}


def packaged(wheels: list[Path]) -> dict[str, bytes]:
    """Return the files of the wheels, licenses too, without the packages' own tests."""
    files: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not name.endswith("/") and "tests" not in name.split("/"):
                    files[name] = archive.read(name)
    return files


def write(files: dict[str, bytes], target: Path) -> None:
    """Write the archive beside its place, and put it there whole."""
    fd, unfinished = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(fd, "wb") as file:
            file.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in sorted(files):
                    entry = zipfile.ZipInfo(name, NEW_YEAR_1980)
                    entry.create_system = 3  # Unix, wherever it is built
                    entry.external_attr = 0o100644 << 16
                    archive.writestr(entry, files[name])
        os.chmod(unfinished, 0o755)  # noqa: S103 - a program that all may start, as each in /usr/bin
        os.replace(unfinished, target)
    except BaseException:
        os.unlink(unfinished)
        raise


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
