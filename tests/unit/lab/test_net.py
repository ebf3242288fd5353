from __future__ import annotations

import pytest

from lab import net
from lab.errors import LabError
from lab.guest import tap_name
from lab.sites import CLUSTER


@pytest.mark.parametrize("name", ["host3", "switch", ""])
def test_a_machine_that_the_site_does_not_have(name: str) -> None:
    with pytest.raises(LabError, match="choose one of manager, host1"):
        CLUSTER.machine(name)


def test_an_address_on_a_segment_that_the_machine_is_not_plugged_into() -> None:
    with pytest.raises(LabError, match="host1 is not plugged into uplink"):
        CLUSTER.machine("host1").address("uplink")


@pytest.mark.parametrize("name", ["", "a-b", "Lab", "thirteen-long", "a/b", "a b", "ä"])
def test_names_that_no_lab_can_have(name: str) -> None:
    with pytest.raises(LabError, match="use 1 to 12"):
        net.check_lab_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a/b", "..", "a b", "x" * 49, "host1", "switch"])
def test_names_that_no_guest_can_have(name: str) -> None:
    with pytest.raises(LabError, match=r"use up to|choose another"):
        net.check_guest_name(name, CLUSTER)


def test_taps_have_short_names_of_their_own() -> None:
    names = ["a", "x" * 12, "x" * 13, "x" * 48, "x" * 47 + "y"]
    taps = [tap_name(name) for name in names]
    assert len(set(taps)) == len(names)
    assert all(len(tap) <= 15 for tap in taps)
    assert taps[0] == "lg-a"
