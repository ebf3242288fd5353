"""
One scaling pass over 10,000 VMs in the manager: cpmd's work each period, when all hosts report.

The real :class:`cpm.core.manager.Manager` with 10,000 active VMs on 20 hosts and two edges that confirm everything at
once; no network and no ledger. A pass is one report from every host, and taking what follows. In most VMs nothing
changes, as in any second; some sit above or below their range, so that the pass has decisions in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from typing import Final

from bench.figures import Measured, median
from cpm.core.journal import LedgerState
from cpm.core.manager import Manager
from cpm.core.membership import ApprovalRequest
from cpm.protocol.messages import PROTOCOL, Applied, Attach, Delta, Hello, Report, Snapshot
from cpm.protocol.messages import Measured as MeasuredVM
from cpm.protocol.model import AllocationId, AllocationState, DomainUUID, ExternalAddress, NodeName, Role
from cpm.settings import Settings

VMS: Final = 10_000
HOSTS: Final = 20
RUNS: Final = 30
WARM_UP: Final = 5
BUSY_SHARE: Final = 100
"""One VM in this many has a nearly full range."""

_EXTERNAL = int(IPv4Address("203.0.113.0"))
_UNDERLAY = int(IPv4Address("172.30.0.10"))


def measure(say: Callable[[str], None]) -> Measured:
    """Measure."""
    fleet = Fleet(VMS)
    runs = [fleet.pass_ms() for _ in range(WARM_UP + RUNS)][WARM_UP:]
    say(f"one pass over {VMS} VMs: median {median(runs):.0f} ms, {fleet.changes} changes in all")
    return Measured({"tick_ms_10k": median(runs)}, {"tick_ms": runs})


class Fleet:
    """A manager with active VMs, and nodes that confirm whatever they are told."""

    def __init__(self, vms: int, addresses: int | None = None) -> None:
        count = -(-vms // 100) if addresses is None else addresses
        pool = tuple(ExternalAddress(IPv4Address(_EXTERNAL + n)) for n in range(count))
        state = LedgerState(0, (), (), pool, (), AllocationId(1))
        self.now = 1_000_000.0
        self.changes = 0
        self.manager = Manager(state, Settings().rules(), 1, self.now)
        self._generations: dict[NodeName, int] = {}
        self._vms = [DomainUUID(f"00000000-0000-0000-0000-{number:012d}") for number in range(vms)]
        self._hosts = [NodeName(f"host{number}") for number in range(HOSTS)]
        for number, name in enumerate((NodeName("edge1"), NodeName("edge2"), *self._hosts)):
            role = Role.EDGE if name.startswith("edge") else Role.HOST
            underlay = IPv4Address(_UNDERLAY + number)
            approval = ApprovalRequest(roles=frozenset({role}), underlay=underlay)
            self.manager.membership.approve(name, approval, self.now)
            self.manager.on_hello(Hello(PROTOCOL, name, frozenset({role}), underlay, "0", 0, ()), "0", self.now)
        self._settle()
        for number, uuid in enumerate(self._vms):
            host = self._hosts[number % HOSTS]
            self.manager.on_message(host, Attach(uuid, f"vm{number}"), self.now)
        self._settle()
        sizes = [self.manager.fleet.one(uuid, AllocationState.ACTIVE) for uuid in self._vms]
        if not all(sizes):
            raise RuntimeError(f"only {sum(map(bool, sizes))} of {vms} VMs have an active range")

    def pass_ms(self) -> float:
        """Have every host report once, and take the outcome. :return: Milliseconds of the manager's own time."""
        self.now += 1.0
        reports = list(self._reports())
        gc.collect()
        begin = time.perf_counter()
        for host, report in reports:
            self.manager.on_message(host, report, self.now)
        outcome = self.manager.take(self.now)
        elapsed = time.perf_counter() - begin
        self.changes += len(outcome.changes)
        self._confirm(outcome.messages)
        self._settle()
        return elapsed * 1000

    def _reports(self) -> Iterator[tuple[NodeName, Report]]:
        for at, host in enumerate(self._hosts):
            vms = tuple(self._measured(number) for number in range(at, len(self._vms), HOSTS))
            yield host, Report(self._generations[host], 1.0, vms)

    def _measured(self, number: int) -> MeasuredVM:
        active = self.manager.fleet.one(self._vms[number], AllocationState.ACTIVE)
        size = active.ports.size if active is not None else 0
        kind = (number // HOSTS) % BUSY_SHARE
        # Which VMs are busy changes with time, so that every pass resizes some.
        busy = kind == int(self.now) % BUSY_SHARE
        in_use = int(size * 0.96) if busy else int(size * 0.55)
        return MeasuredVM(self._vms[number], 400.0, 5.0, in_use, 12.0)

    def _settle(self) -> None:
        while messages := (outcome := self.manager.take(self.now)).messages:
            self.changes += len(outcome.changes)
            self._confirm(messages)

    def _confirm(self, messages: object) -> None:
        assert isinstance(messages, tuple)
        for name, message in messages:
            if isinstance(message, (Snapshot, Delta)):
                self._generations[name] = message.generation
                self.manager.on_message(name, Applied(1, message.generation), self.now)
