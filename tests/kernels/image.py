"""
What a machine of `make test-kernels` boots: the release's own kernel, and of its Debian what the tests need.

All of it is one initramfs, so the machine needs neither a disk nor a driver for one, and boots in seconds.
"""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.machines import debian

_HERE = Path(__file__).parent
_RECIPE = (*(_HERE / name for name in ("furnish.sh", "packages", "image.py")), debian.REPOSITORY / "requirements.lock")


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel, and an archive of the root that it begins with."""

    release: str
    kernel: Path
    root: Path
    """A cpio archive, not compressed: an emulated processor reads it faster than it could unpack it."""


def image(release: str) -> Image:
    """
    Return the image of a release, made in about two minutes when it is not there.

    :raise subprocess.CalledProcessError: As :func:`debian.furnish` does.
    """
    folder = debian.kept(f"kernel-{release}", _RECIPE, functools.partial(_make, release))
    return Image(release, folder / "vmlinuz", folder / "root.cpio")


def _make(release: str, scratch: Path, result: Path) -> None:
    root = debian.furnish(release, _HERE, scratch)
    (root / "vmlinuz").rename(result / "vmlinuz")
    pack(root, result / "root.cpio")


def pack(folder: Path, into: Path) -> None:
    """Append all that is in a folder to a file, as an archive that the kernel unpacks. :raise CalledProcessError:"""
    names = subprocess.run(["find", ".", "-xdev", "-print0"], cwd=folder, check=True, stdout=subprocess.PIPE).stdout
    command = ["cpio", "--create", "--null", "--quiet", "--format=newc", "--owner=0:0"]
    with into.open("ab") as output:
        subprocess.run(command, cwd=folder, check=True, input=names, stdout=output)
