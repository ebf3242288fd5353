"""One emulated machine that runs pytest and ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.kernels.image import Image, pack
from tests.machines.debian import CACHE, REPOSITORY

_LIMIT_S = 3600
"""A machine that has not ended by then hangs. pytest's own limits come long before."""
_PROCESSOR = "Nehalem"
"""Without AVX, which is slow in emulation and which glibc uses wherever it finds it."""
_FAST = "mitigations=off init_on_alloc=0 no_timer_check tsc=reliable nowatchdog rcupdate.rcu_expedited=1"
"""The time stamp counter, or each look at the clock would be a call to QEMU; and no waiting for what is idle anyway."""


class Ended(Exception):
    """A machine ended, or hung, without a status of pytest; what it printed last is in the text."""


def run(image: Image, arguments: Sequence[str]) -> int:
    """
    Boot a machine with the repository as it is here, committed or not, and run pytest in it.

    What pytest prints goes to standard output as it comes.

    :return: pytest's exit status.
    :raise Ended: When the machine has none to tell.
    """
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f"running-kernel-{image.release}-") as name:
        scratch = Path(name)
        _start(image, arguments, scratch)
        status = (scratch / "status").read_text().strip() if (scratch / "status").exists() else ""
        if not status:
            said = (scratch / "console").read_text(errors="replace").splitlines()[-120:]
            raise Ended(f"the machine of {image.release} ended without a result:\n" + "\n".join(said))
        return int(status)


def _start(image: Image, arguments: Sequence[str], scratch: Path) -> None:
    """Run the machine until it ends; its console and the status are in files of these names then."""
    initrd = scratch / "initrd"
    shutil.copy(image.root, initrd)
    pack(_source(arguments, scratch / "source"), initrd)
    serial = (f"file:{scratch}/console", "stdio", f"file:{scratch}/status")
    command = (
        *("qemu-system-x86_64", "-accel", "tcg,thread=single,tb-size=512", "-cpu", _PROCESSOR, "-smp", "2", "-m", "2G"),
        *("-nodefaults", "-display", "none", "-no-reboot", "-kernel", str(image.kernel), "-initrd", str(initrd)),
        *("-append", f"console=ttyS0 quiet panic=-1 {_FAST}"),
        *(part for each in serial for part in ("-serial", each)),
    )
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        print(f"the machine did not end within {_LIMIT_S} s", file=sys.stderr)


def _source(arguments: Sequence[str], folder: Path) -> Path:
    """Fill a folder with what is added to the image's root: the repository, the first process and its arguments."""
    source = folder / "src"
    source.mkdir(parents=True)
    listing = ("git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z", "-co", "--exclude-standard")
    listed = subprocess.run(listing, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    names = [name for name in listed.split("\0") if name and (REPOSITORY / name).exists()]
    # Built and not in the repository.
    names += [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("natctl/**/*.bpf.o")]
    copy = ("cp", "--parents", "--no-dereference", "--preserve=mode,timestamps", "-t", str(source))
    subprocess.run(("xargs", "-0", *copy), cwd=REPOSITORY, check=True, input="\0".join(names), text=True)
    shutil.copy(Path(__file__).parent / "init", folder / "init")
    (folder / "arguments").write_text("".join(f"{argument}\n" for argument in arguments))
    return folder
