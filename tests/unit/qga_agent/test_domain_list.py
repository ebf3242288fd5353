"""What state and reason of a domain say, by libvirt's own names of the numbers."""

from __future__ import annotations

import libvirt
import pytest

from qga_agent.domain_list import Phase, phase_of

REASONS = [name.removeprefix("VIR_DOMAIN_PAUSED_") for name in dir(libvirt) if name.startswith("VIR_DOMAIN_PAUSED_")]


@pytest.mark.parametrize("reason", REASONS)
def test_only_a_pause_to_start_or_to_migrate_leaves_open_where_the_guest_runs(reason: str) -> None:
    phase = {"MIGRATION": Phase.MIGRATING, "STARTING_UP": Phase.STARTING}.get(reason, Phase.HERE)
    assert phase_of(libvirt.VIR_DOMAIN_PAUSED, getattr(libvirt, f"VIR_DOMAIN_PAUSED_{reason}")) is phase


@pytest.mark.parametrize("state", ["RUNNING", "BLOCKED", "SHUTDOWN", "CRASHED", "PMSUSPENDED"])
def test_in_every_other_state_it_is_here_whatever_the_reason(state: str) -> None:
    for reason in range(16):
        assert phase_of(getattr(libvirt, f"VIR_DOMAIN_{state}"), reason) is Phase.HERE
