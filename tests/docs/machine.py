"""
A reader's machine: this one, copied on write, in mount, network, process and host name namespaces of its own.

Whatever a command writes goes to memory and is gone with the machine; its network has two interfaces that lead nowhere.
The kernel, the programs and the tree of this repository are those of the machine that runs the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
NAME = "srv1"
LIMIT_S = 600.0
"""For a page."""

_BOOT = """
set -eu
there=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$there"
mkdir "$there"/upper "$there"/work "$there"/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$there/upper,workdir=$there/work" "$there/root"
cd "$there/root"
for mounted in "$@"; do mkdir -p ".$mounted"; mount --bind "$mounted" ".$mounted"; done
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 tmpfs run
mkdir run/before
pivot_root . run/before
umount -l /run/before
rmdir /run/before
hostname "$NAME"
for link in "eth0 203.0.113.10/24" "eth1 172.30.0.2/24"; do
    set -- $link
    ip link add "$1" type veth peer name "$1-far"
    ip link set "$1-far" up
    ip link set "$1" up
    ip address add "$2" dev "$1"
done
ip link set lo up
ip route add default via 203.0.113.1
cd /root
exec "$PYTHON" -m tests.docs "$PAGE"
"""


@dataclass(frozen=True, slots=True)
class Done:
    """
    A command that was run.

    :param status: Its exit status.
    :param output: Standard output and error, as they came.
    """

    command: str
    status: int
    output: str


def follow(page: str) -> list[Done]:
    """
    Boot a machine, run the commands of a page on it, and return what became of them, in their order.

    :param page: A key of :data:`tests.docs.pages.PAGES`.
    :raise AssertionError: When the machine, or what a command needs on it, does not come about; it says why.
    """
    root = Path("/").stat().st_dev
    elsewhere = [str(path) for path in (REPOSITORY, Path(sys.prefix)) if path.stat().st_dev != root]
    with tempfile.TemporaryDirectory(prefix="reader-") as there, tempfile.TemporaryFile("w+") as said:
        ran = subprocess.run(
            ["timeout", "-k", "5", str(LIMIT_S),
             "unshare", "--mount", "--propagation=private", "--net", "--pid", "--uts", "--fork", "--kill-child=KILL",
             "bash", "-c", _BOOT, "bash", there, *elsewhere],
            env={**os.environ, "PYTHON": sys.executable, "PAGE": page, "NAME": NAME,
                 "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True, check=False,
        )  # fmt: skip
        said.seek(0)
        assert ran.returncode == 0, f"{page}: {said.read()[-4000:]}"
    return [Done(**json.loads(line)) for line in ran.stdout.splitlines()]
