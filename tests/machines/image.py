"""Disks of the machines: Debian with its own kernel and all that tests need, because machines have no internet."""

from __future__ import annotations

import functools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.machines import debian

RELEASES = ("bookworm", "trixie")
"""Debian 12 and 13."""

_HERE = Path(__file__).parent
_RECIPE = tuple(_HERE / name for name in ("furnish.sh", "packages", "image.py"))
_FREE_MIB = 4096
"""Room on a disk for what tests write."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a machine boots from."""

    release: str
    disk: Path
    """An ext4 file system, without a partition table. Each machine writes to an overlay."""
    kernel: Path
    initrd: Path


def image(release: str) -> Image:
    """
    Return the image of a release, made in about three minutes when it is not there.

    :raise subprocess.CalledProcessError: As :func:`debian.furnish` does.
    """
    folder = debian.kept(release, _RECIPE, functools.partial(_make, release))
    return Image(release, folder / "disk", folder / "vmlinuz", folder / "initrd")


def _make(release: str, scratch: Path, result: Path) -> None:
    root = debian.furnish(release, _HERE, scratch)
    for name, file in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        shutil.copy(max((root / "boot").glob(file)), result / name)
    used = subprocess.run(["du", "-sm", root], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[0]
    # No journal to replay, no checks by date; the file is sparse.
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1"]
    subprocess.run(["mke2fs", *options, "-d", root, result / "disk", f"{int(used) + _FREE_MIB}M"], check=True)


if __name__ == "__main__":
    # Both at once: much of the time is spent waiting for the network and for dpkg.
    with ThreadPoolExecutor() as pool:
        for made in pool.map(image, RELEASES):
            print(made.disk)
