from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from typing import Any, NamedTuple

import pytest

from cpm.api.views import DomainView
from cpm.cli import main
from cpm.protocol.model import DomainUUID, NodeName
from cpm.protocol.walltime import UtcSeconds
from tests.fakes import canned_manager
from tests.fakes.canned_manager import CannedManager

NOW = UtcSeconds(1763879880.0)  # 2025-11-23T06:38:00Z
WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")
DB = DomainUUID("0c2b4d5e-1111-4222-8333-444455556666")
EXTERNAL = IPv4Address("203.0.113.1")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Result]


@pytest.fixture
def manager() -> Iterator[CannedManager]:
    with canned_manager.running() as fake:
        yield fake


@pytest.fixture
def virt_ports(manager: CannedManager, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command against the fake, as if typed."""
    monkeypatch.setenv("VIRT_PORTS_SOCKET", manager.path)

    def run(*words: str) -> Result:
        code = main.execute(words, now=NOW)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A zone that is not UTC, and changes its offset."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


def domain(name: str = "web1", uuid: DomainUUID = WEB, **changes: Any) -> DomainView:
    facts: dict[str, Any] = {
        "node": NodeName("host1"), "external_address": EXTERNAL, "first_port": 20000, "last_port": 20255,
        "ports_in_use": 17, "state": "active", **changes,
    }  # fmt: skip
    return DomainView(name=name, uuid=uuid, **facts)
