"""natd's own kernel, against the table that the fake one of a site in virtual time passes in tests/unit/site."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from natctl.model.entries import Settings
from tests.fakes.conformance.kernel import CHECKS, Make
from tests.netns.machine import Machine

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_kernel_behaves_as_its_fake(check: Callable[[Make], None]) -> None:
    machines: list[Machine] = []
    with contextlib.ExitStack() as stack:

        def make(settings: Settings) -> Machine:
            machines.append(stack.enter_context(contextlib.closing(Machine(settings))))
            return machines[-1]

        check(make)
        for machine in machines:
            assert machine.ensure() == ()
