"""The kernel of the simulation, against the table that the real one passes in tests/netns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prove.kernels import SimulatedKernel
from tests.fakes.conformance import kernel as conformance
from tests.fakes.conformance.kernel import CHECKS, Make

# Stories have no machine outside the underlay.
SIMULATED = [check for check in CHECKS if "not_in_the_underlay" not in check.__name__]


@pytest.mark.parametrize("check", SIMULATED, ids=lambda check: check.__name__)
def test_it_behaves_as_a_kernel(check: Callable[[Make], None]) -> None:
    check(SimulatedKernel)


def test_what_is_left_out_is_one_check() -> None:
    assert len(SIMULATED) == len(CHECKS) - 1
    assert conformance.__doc__
