"""The fake libvirtd behaves as a real one does; tests/e2e/test_fakes.py runs the same checks against that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cpm.protocol.model import DomainUUID
from qga_agent.domain_events import DomainEvent
from qga_agent.libvirt_stats import Connection
from tests.fakes.conformance.libvirtd import CHECKS, Libvirtd
from tests.fakes.libvirt import FakeLibvirtd


class Fake:
    """The fake as the checks take it."""

    def __init__(self) -> None:
        self._libvirtd = FakeLibvirtd()

    def open(self, on_event: Callable[[DomainEvent], None], on_close: Callable[[str], None]) -> Connection:
        return self._libvirtd.open("fake:///", on_event, on_close)

    def start(self, name: str) -> DomainUUID:
        return self._libvirtd.start(name)

    def destroy(self, name: str) -> None:
        self._libvirtd.destroy(name)

    def kill(self) -> None:
        self._libvirtd.kill()

    def revive(self) -> None:
        self._libvirtd.is_up = True


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_behaves_as_libvirtd(check: Callable[[Libvirtd], None]) -> None:
    check(Fake())
