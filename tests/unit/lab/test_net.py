from __future__ import annotations

import pytest

from lab import net
from lab.errors import LabError
from lab.guest import tap_name


def test_no_two_ports_of_a_segment_have_the_same_address() -> None:
    addresses = [port.address for machine in net.MACHINES for port in machine.ports]
    assert len(set(addresses)) == len(addresses)


def test_names_of_interfaces_fit_the_kernel() -> None:
    for machine in net.MACHINES:
        for port in machine.ports:
            assert len(port.device) <= 15
            assert len(f"{machine.name}-{port.device[:2]}") <= 15


@pytest.mark.parametrize("name", ["", "a-b", "Lab", "thirteen-long", "a/b", "a b", "ä"])
def test_names_that_no_lab_can_have(name: str) -> None:
    with pytest.raises(LabError, match="use 1 to 12"):
        net.check_lab_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a/b", "..", "a b", "x" * 49, "host1", "switch"])
def test_names_that_no_guest_can_have(name: str) -> None:
    with pytest.raises(LabError, match=r"use up to|choose another"):
        net.check_guest_name(name)


def test_taps_have_short_names_of_their_own() -> None:
    names = ["a", "x" * 12, "x" * 13, "x" * 48, "x" * 47 + "y"]
    taps = [tap_name(name) for name in names]
    assert len(set(taps)) == len(names)
    assert all(len(tap) <= 15 for tap in taps)
    assert taps[0] == "lg-a"
