"""
What a machine of `make test-kernels` boots: the release's own kernel, and of its Debian what the tests need.

All of it is one initramfs, so the machine needs neither a disk nor a driver for one, and boots in seconds. Made once
for each release in ``/var/tmp/virt-ports-machines`` (``$DEBIAN_MACHINES``), under a name with the digest of the recipe.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.machines.image import CACHE, REPOSITORY

_HERE = Path(__file__).parent
_RECIPE = (
    *(_HERE / name for name in ("furnish.sh", "packages", "image.py")),
    *(REPOSITORY / name for name in ("tests/machines/chroot.sh", "requirements.lock")),
)


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel, and an archive of the root that it begins with."""

    release: str
    kernel: Path
    root: Path
    """A cpio archive, not compressed: an emulated processor reads it faster than it could unpack it."""


def image(release: str) -> Image:
    """
    Return the image of a release, making it first when the recipe has changed or never ran here.

    Needs root, mmdebstrap and the network, and takes about two minutes.

    :raise subprocess.CalledProcessError: When a tool fails; what it said is on standard error.
    """
    target = CACHE / f"kernel-{release}-{_digest()}"
    if not target.exists():
        _build(release, target)
    return Image(release, target / "vmlinuz", target / "root.cpio")


def _digest() -> str:
    digest = hashlib.sha256()
    for path in _RECIPE:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(release: str, target: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=CACHE, prefix=f"building-kernel-{release}-"))
    try:
        root, result = scratch / release, scratch / "result"
        result.mkdir()
        _furnish(release, scratch)
        (root / "vmlinuz").rename(result / "vmlinuz")
        pack(root, result / "root.cpio")
        for old in CACHE.glob(f"kernel-{release}-*"):
            shutil.rmtree(old)
        result.rename(target)
    finally:
        shutil.rmtree(scratch)


def _furnish(release: str, roots: Path) -> None:
    lines = (_HERE / "packages").read_text().splitlines()
    packages = ",".join(line for line in lines if line and not line.startswith("#"))
    environment = os.environ | {"DEBIAN_ROOTS": str(roots), "DEBIAN_PACKAGES": packages}
    command = [str(REPOSITORY / "tests/machines/chroot.sh"), release, "tests/kernels/furnish.sh"]
    log = roots / "log"
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:]))
        done.check_returncode()


def pack(folder: Path, into: Path) -> None:
    """Append all that is in a folder to a file, as an archive that the kernel unpacks. :raise CalledProcessError:"""
    names = subprocess.run(["find", ".", "-xdev", "-print0"], cwd=folder, check=True, stdout=subprocess.PIPE).stdout
    command = ["cpio", "--create", "--null", "--quiet", "--format=newc", "--owner=0:0"]
    with into.open("ab") as output:
        subprocess.run(command, cwd=folder, check=True, input=names, stdout=output)
