"""
The network tests under the kernels of Debian 12 (6.1) and 13 (6.12), in their own machines.

All of them run once in each machine; here is one check for each of their modules, which quotes what failed there.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from tests.machines.guest_agent import Done
from tests.machines.image import REPOSITORY
from tests.machines.machine import Machine

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(3600)]

MODULES = sorted(path.stem for path in (REPOSITORY / "tests/netns").glob("test_*.py"))
KERNELS = {"bookworm": "6.1.", "trixie": "6.12."}
_RUN = (
    "cd /src && CI=true .venv/bin/python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider "
    "-o timeout=1200 -o junit_family=xunit1 --junitxml=/root/results.xml tests/netns"
)


@dataclass
class Results:
    """What became of the tests in one machine."""

    kernel: str
    pytest: Done
    passed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Names by module."""
    failed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Names with what pytest says, by module."""


@pytest.fixture(scope="session")
def results(machine: Machine) -> Results:
    """Run the tests in the machine."""
    machine.run("tar -C /src -xf /dev/vdb && rm -f /root/results.xml")
    # A namespace begins with the modules that the machine has loaded, as on a machine that has run for a while.
    machine.run("modprobe -a tun br_netfilter")
    done = machine.attempt(_RUN, timeout_s=3000.0)
    print(done.output)
    found = Results(machine.run("uname -r"), done)
    for case in ElementTree.fromstring(machine.run("cat /root/results.xml")).iter("testcase"):
        module = case.get("classname", "").split(".")[2]
        bad = [part for part in case if part.tag in ("failure", "error")]
        (found.failed if bad else found.passed)[module].append(
            "\n".join([case.get("name", ""), *(part.text or "" for part in bad)])
        )
    return found


def test_the_machine_has_its_releases_own_kernel(machine: Machine, results: Results) -> None:
    assert results.kernel.startswith(KERNELS[machine.release])
    assert results.pytest.status in (0, 1), results.pytest


@pytest.mark.parametrize("module", MODULES)
def test_network(results: Results, module: str) -> None:
    assert not results.failed[module], "\n".join(results.failed[module])
    assert results.passed[module], results.pytest
