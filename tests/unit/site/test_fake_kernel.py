"""The fake kernel of a site in virtual time, against the table that the real one passes in tests/netns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes.conformance.kernel import CHECKS, Make
from tests.fakes.kernel import FakeKernel


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_behaves_as_a_kernel(check: Callable[[Make], None]) -> None:
    check(FakeKernel)
