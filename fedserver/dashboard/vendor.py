"""The two browser libraries of the dashboard, fetched once by ``npm pack`` and checked by SHA-512.

``python -m fedserver.dashboard.vendor`` puts them into ``static/vendor``; ``make venv`` runs it, and a
wheel carries what it found there. Pages load nothing from anywhere else.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).resolve().parent / "static" / "vendor"


class VendorError(Exception):
    """A library could not be fetched; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A package of the npm registry: its version, the tarball's SHA-512, and what is taken of it."""

    name: str
    version: str
    sha512: str
    files: tuple[tuple[str, str], ...]


PACKAGES = (
    Package(
        "htmx.org",
        "2.0.11",
        "Thx/WtpeOQqSrqBCw/A1cwGJGg4UrVa3+sW0GmrM3p4gJgO89ecH4qtbnyzDDWFvBTqjnIMCgELTNt636dtamA==",
        (("dist/htmx.min.js", "htmx.min.js"), ("LICENSE", "htmx.LICENSE")),
    ),
    Package(
        "uplot",
        "1.6.32",
        "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        (
            ("dist/uPlot.iife.min.js", "uplot.min.js"),
            ("dist/uPlot.min.css", "uplot.min.css"),
            ("LICENSE", "uplot.LICENSE"),
        ),
    ),
)


def missing(packages: Sequence[Package] = PACKAGES, folder: Path = VENDOR) -> list[str]:
    """Files that a page needs and the folder does not hold."""
    names = [target for package in packages for _, target in package.files]
    return [name for name in names if not (folder / name).is_file()]


def fetch(packages: Sequence[Package] = PACKAGES, folder: Path = VENDOR) -> list[Path]:
    """Fetch what is not there in the pinned version; returns what was written.

    Raises:
        VendorError: npm is missing, refuses, or delivers other bytes than those that are pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for package in packages:
        stamp = folder / f".{package.name}-{package.version}"
        if stamp.is_file() and not missing([package], folder):
            continue
        contents = _files(package)
        for name, data in contents.items():
            target = folder / name
            target.write_bytes(data)
            written.append(target)
        for old in folder.glob(f".{package.name}-*"):
            old.unlink()
        stamp.touch()
    return written


def _files(package: Package) -> dict[str, bytes]:
    npm = shutil.which("npm")
    if npm is None:
        raise VendorError(
            f"npm is needed once, to fetch {package.name}: install it (apt-get install npm), then run"
            " python -m fedserver.dashboard.vendor"
        )
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [npm, "pack", f"{package.name}@{package.version}", "--silent", "--ignore-scripts"],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        tarballs = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not tarballs:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise VendorError(f"npm could not fetch {package.name}@{package.version}: {lines[-1]}")
        data = tarballs[0].read_bytes()
        digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
        if digest != package.sha512:
            raise VendorError(
                f"{package.name}@{package.version} is not what was pinned: its SHA-512 is {digest}"
            )
        with tarfile.open(tarballs[0]) as archive:
            return {target: _member(archive, source) for source, target in package.files}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/{name}")
    assert file is not None, name
    return file.read()


def main() -> None:
    """Fetch, and say what was done; one line on stderr and exit code 1 where it cannot be."""
    try:
        written = fetch()
    except VendorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    for path in written:
        print(f"fetched {path.name}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
