"""Wishes in the domain XML, written by the real virsh, through a real libvirtd, its hook and its events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab.lab import Lab
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import eventually, facts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("w")) as site:
        yield site


def becomes(lab: Lab, name: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the VM as ``show`` has it, as soon as a condition holds for it."""
    seen: list[dict[str, Any]] = []

    def look() -> bool:
        seen[:] = [facts(lab, "show", name)]
        return condition(seen[0])

    assert eventually(look, PATIENCE_S), seen
    return seen[0]


def size(view: dict[str, Any]) -> int:
    return 0 if view["first_port"] is None else int(view["last_port"]) - int(view["first_port"]) + 1


def wish(view: dict[str, Any], key: str) -> tuple[object, str]:
    return next((each["value"], each["origin"]) for each in view["wishes"] if each["key"] == key)


def test_metadata_written_by_virsh_applies_to_the_running_vm_and_to_its_next_start(lab: Lab) -> None:
    vm = lab.add_vm("wisher", "host1")
    try:
        becomes(lab, "wisher", lambda view: view["state"] == "active")
        said = "<ports floor='1024' weight='many' drain-limit='none'/>"
        vm.host.virsh("metadata", "wisher", "urn:virt-ports:1", "--key", "vp", "--set", said, "--live", "--config")
        view = becomes(lab, "wisher", lambda view: wish(view, "floor") == (1024, "metadata"))
        assert wish(view, "drain-limit") == (None, "metadata")
        assert view["ignored"] == ["metadata: weight 'many': use a whole number, at most 999999999"]
        becomes(lab, "wisher", lambda view: size(view) == 1024)
        vm.host.virsh("destroy", "wisher")
        becomes(lab, "wisher", lambda view: view["state"] == "gone")
        vm.host.virsh("start", "wisher")
        # The first range is as large as the floor: the hook passed the XML on.
        assert size(facts(lab, "show", "wisher")) == 1024
        vm.host.virsh("metadata", "wisher", "urn:virt-ports:1", "--remove", "--live", "--config")
        becomes(lab, "wisher", lambda view: wish(view, "floor") == (64, "pool"))
    finally:
        lab.remove_vm("wisher")
