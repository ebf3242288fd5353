"""
Disks of the machines: Debian with its own kernel and everything that tests need, because machines have no internet.

Made once for each release in ``/var/tmp/virt-ports-machines`` (``$DEBIAN_MACHINES``), under a name with the digest of
the recipe, and never written to afterwards: each machine writes to an overlay.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CACHE = Path(os.environ.get("DEBIAN_MACHINES", "/var/tmp/virt-ports-machines"))
RELEASES = ("bookworm", "trixie")
"""Debian 12 and 13."""

_HERE = Path(__file__).parent
_RECIPE = tuple(_HERE / name for name in ("chroot.sh", "furnish.sh", "packages", "image.py"))
_FREE_MIB = 4096
"""Room on a disk for what tests write."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a machine boots from."""

    release: str
    disk: Path
    """An ext4 file system, without a partition table."""
    kernel: Path
    initrd: Path


def image(release: str) -> Image:
    """
    Return the image of a release, making it first when the recipe has changed or never ran here.

    Needs root, mmdebstrap and the network, and takes about three minutes.

    :raise subprocess.CalledProcessError: When a tool fails; what it said is on standard error.
    """
    target = CACHE / f"{release}-{_digest()}"
    if not target.exists():
        _build(release, target)
    return Image(release, target / "disk", target / "vmlinuz", target / "initrd")


def _digest() -> str:
    digest = hashlib.sha256()
    for path in _RECIPE:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(release: str, target: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=CACHE, prefix=f"building-{release}-"))
    try:
        root, result = scratch / release, scratch / "result"
        result.mkdir()
        environment = os.environ | {"DEBIAN_ROOTS": str(scratch), "DEBIAN_PACKAGES": ",".join(packages())}
        command = [str(_HERE / "chroot.sh"), release, "tests/machines/furnish.sh"]
        log = scratch / "log"
        with log.open("w") as output:
            done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
        if done.returncode:
            sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:]))
            done.check_returncode()
        for name, file in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
            shutil.copy(max((root / "boot").glob(file)), result / name)
        _make_disk(root, result / "disk")
        for old in CACHE.glob(f"{release}-*"):
            shutil.rmtree(old)
        result.rename(target)
    finally:
        shutil.rmtree(scratch)


def packages() -> list[str]:
    """Return the Debian packages that a machine has installed."""
    lines = (_HERE / "packages").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _make_disk(root: Path, disk: Path) -> None:
    used = subprocess.run(["du", "-sm", root], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[0]
    # No journal to replay, no checks by date; the file is sparse.
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1"]
    subprocess.run(["mke2fs", *options, "-d", root, disk, f"{int(used) + _FREE_MIB}M"], check=True)


if __name__ == "__main__":
    # Both at once: much of the time is spent waiting for the network and for dpkg.
    with ThreadPoolExecutor() as pool:
        for made in pool.map(image, RELEASES):
            print(made.disk)
