"""
Commands of the pages that are not run on a reader's machine as they are, and why. There is no other list.

A command is run unless it is here, and a pattern that fits no command fails a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final

ELSEWHERE: Final[Mapping[str, str]] = {
    # Install
    "apt install *": "needs Debian's mirror, or the package: tests/machines/package.sh and the tutorial install it",
    "PIPX_HOME=*": "needs PyPI: tests/machines/package.sh two_roads installs the wheel with pipx",
    "python3 -m venv /opt/virt-ports": "of use only with the next two",
    "/opt/virt-ports/bin/pip install .": "needs PyPI: `make setup` installs the tree with pip",
    "ln -s /opt/virt-ports/bin/virt-ports /usr/local/bin/": "of use only after that",
    "make programs": "`make setup` does it before any test",
    "apt purge virt-ports*": "there is no package: tests/machines/package.sh purges it",
    # Certificates
    "setfacl *": "needs Debian's package acl",
    "certtool *": "needs libvirt's authority: tests/unit/cpm/api/test_libvirt_pki.py makes one and runs them",
    "cat > client.info *": "the same",
    # Guests
    "cat /run/virt-ports.json": "inside a guest: tests/e2e/test_guest_agents.py",
    "natpmpc*": "inside a guest: tests/netns/test_port_control.py",
    "qemu-system-x86_64 ...*": "a part of a command: tests/e2e/bare_qemu.py starts such a QEMU",
    # Long
    "make demo": "CI runs it",
    "make test": "runs this test",
    "make chaos *": "minutes: CI runs it",
    "make prove SEEDS=1000": "minutes: CI runs it with 3,000",
    "make prove MINUTES=3": "minutes",
    # Other machines, other software
    "ssh *": "needs another machine",
    "iptables *": "needs the chains of Docker or of a firewall: tests/netns/test_forward_filters.py",
    "nft insert *": "the same",
}
"""By pattern of the command: why it is not run."""

CHANGED: Final[Mapping[str, tuple[str, str]]] = {
    "virt-ports record day.csv --for 86400": ("virt-ports record day.csv --for 3", "it takes a day"),
    "virt-ports record day.csv --for 86400 && virt-ports simulate day.csv": (
        "virt-ports record day.csv --for 3 && virt-ports simulate day.csv",
        "the same",
    ),
    "virt-ports record monday.csv --for 3600": ("virt-ports record monday.csv --for 3", "it takes an hour"),
    "virt-ports record - | head -100": ("virt-ports record - | head -4", "it takes a minute"),
    "virt-ports top -b -n 60 -o json": ("virt-ports top -b -n 2 -o json", "it takes a minute"),
    ".venv/bin/python -m prove --seeds 200 --fault away-not-asked --without 'edge lies' reload": (
        ".venv/bin/python -m prove --seeds 2 --seed 2 --fault away-not-asked --without 'edge lies' reload",
        "it takes minutes",
    ),
}
"""By command: what is run in its place, and why."""

ENDLESS: Final = ("virt-ports events --follow*", "virt-ports top", "virt-ports top --sort new/s --filter web")
"""Patterns of commands that end when somebody ends them."""

FINDS: Final[Mapping[str, frozenset[int]]] = {
    "*virt-ports doctor*": frozenset({0, 1, 2}),
    ".venv/bin/python -m prove *--fault*": frozenset({1}),
    "virt-ports record - | head*": frozenset({0, 141}),
    "virt-ports forward add web2 22 --port 2222": frozenset({1}),
}
"""By pattern: exit statuses of a command that does what it should, where these say what was found."""

ASKS: Final[Mapping[str, str]] = {
    "virt-ports node approve *": "y\n",
    "virt-ports uninstall": "y\n",
    "virt-ports config reload": "y\n",
    "virt-ports install": "host,edge,manager\n",
}
"""Patterns of commands that ask on a terminal, and what is answered."""


def answers_to(command: str) -> str | None:
    """Return what is typed while a command runs; None: it does not ask."""
    return next((answers for pattern, answers in ASKS.items() if fnmatchcase(command, pattern)), None)


def why_not(command: str) -> str | None:
    """Return why a command is not run; None: it is."""
    return next((why for pattern, why in ELSEWHERE.items() if fnmatchcase(command, pattern)), None)


def is_endless(command: str) -> bool:
    """Say whether somebody has to end a command."""
    return any(fnmatchcase(command, each) for each in ENDLESS)


def may_exit(command: str, status: int) -> bool:
    """Say whether a command that does what the page says may have this exit status."""
    found = next((statuses for pattern, statuses in FINDS.items() if fnmatchcase(command, pattern)), frozenset({0}))
    # The program that gives it a terminal ends by the signal, or after it.
    return status in found or (is_endless(command) and status == 130)
