"""
Roots of a Debian release, and what machines boot of them.

Each is made once, in ``/var/tmp/virt-ports-machines`` (``$DEBIAN_MACHINES``), under a name with the digest of its
recipe, and never written to afterwards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CACHE = Path(os.environ.get("DEBIAN_MACHINES", "/var/tmp/virt-ports-machines"))

_CHROOT = Path(__file__).parent / "chroot.sh"


def kept(name: str, recipe: Iterable[Path], make: Callable[[Path, Path], None]) -> Path:
    """
    Return the folder of something that is kept, making it first when its recipe has changed or never ran here.

    :param recipe: Files on which it depends, beside those that make every root.
    :param make: Gets a folder for what it needs on the way, and the one that is kept.
    """
    digest = hashlib.sha256()
    for path in (_CHROOT, Path(__file__), *recipe):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=CACHE, prefix=f"building-{name}-"))
    try:
        result = scratch / "result"
        result.mkdir()
        make(scratch, result)
        for old in CACHE.glob(f"{name}-*"):
            shutil.rmtree(old)
        result.rename(target)
    finally:
        shutil.rmtree(scratch)
    return target


def furnish(release: str, recipe: Path, scratch: Path) -> Path:
    """
    Return the root of a release, with the ``packages`` that a folder of the repository lists, after its ``furnish.sh``.

    Needs root, mmdebstrap and the network.

    :raise subprocess.CalledProcessError: When a tool fails; what it said is on standard error.
    """
    lines = (recipe / "packages").read_text().splitlines()
    packages = ",".join(line for line in lines if line and not line.startswith("#"))
    environment = os.environ | {"DEBIAN_ROOTS": str(scratch), "DEBIAN_PACKAGES": packages}
    command = [str(_CHROOT), release, str((recipe / "furnish.sh").relative_to(REPOSITORY))]
    log = scratch / "log"
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:]))
        done.check_returncode()
    return scratch / release
