"""
What is understood is believed: messages and requests with numbers at their bounds are given to a real manager and a
real node. Neither may raise anything that is not documented, nor refuse something when a part of it is done.
"""

from __future__ import annotations

import contextlib
import typing
import zlib
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

from msgspec import structs

from cpm import commands, queries, serving
from cpm.api import handlers, operations
from cpm.api.handlers import Kind
from cpm.api.operations import OPERATIONS
from cpm.core.manager import Manager, Outcome
from cpm.core.membership import ApprovalRequest
from cpm.ledger import SqliteLedger
from cpm.protocol import codec
from cpm.protocol.bounds import MAX_GENERATION
from cpm.protocol.errors import InvalidRequest, VirtPortsError
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Delta,
    Hello,
    ManagerMessage,
    Need,
    NodeMessage,
    Report,
    Snapshot,
    Welcome,
)
from cpm.protocol.model import AllocationState, DomainUUID, ExternalAddress, NodeName, PortRange, Role
from cpm.protocol.timeouts import Timeouts
from cpm.protocol.walltime import WallTime
from cpm.queries.status import About
from cpm.serving.live_settings import LiveSettings
from cpm.settings import Settings
from natctl.core.domains import RunningDomain, Tap
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.model.commands import Program, Replace
from qga_agent.samples import Rates
from tests.fuzz.structured import Structured

UUIDS: Final = tuple(DomainUUID(f"00000000-0000-0000-0000-{number:012x}") for number in range(6))
_NODES: Final = {
    NodeName("host1"): (Role.HOST, IPv4Address("172.30.0.11")),
    NodeName("host2"): (Role.HOST, IPv4Address("172.30.0.12")),
    NodeName("edge1"): (Role.EDGE, IPv4Address("172.30.0.21")),
    NodeName("one"): (None, IPv4Address("172.30.0.31")),
}
_EXTERNALS: Final = tuple(IPv4Address(f"203.0.113.{number}") for number in (1, 2, 3))
_RANGES: Final = (
    *(PortRange(first, first + 63) for first in range(1024, 1600, 64)),
    *(PortRange(first, first + 255) for first in range(1024, 2600, 256)),
    PortRange(0, 0), PortRange(0, 65535), PortRange(65535, 65535), PortRange(1024, 65535),
)  # fmt: skip
_KNOWN: Final[dict[Any, tuple[Any, ...]]] = {
    DomainUUID: UUIDS,
    NodeName: tuple(_NODES),
    IPv4Address: (*_EXTERNALS, *(underlay for _, underlay in _NODES.values()), IPv4Address(0), IPv4Address(2**32 - 1)),
    IPv4Network: (IPv4Network("100.64.0.0/10"),),
    PortRange: _RANGES,
}
_LIFE: Final = 400
"""Inputs that one manager or node gets before another one takes its place: what holds everything takes nothing."""

FROM_NODES: Final = Structured(typing.get_args(NodeMessage), _KNOWN, codec.encode(Applied(1, 1)))
FROM_MANAGERS: Final = Structured(
    typing.get_args(ManagerMessage),
    _KNOWN | {Timeouts: (Timeouts(), None)},
    codec.encode(Welcome(PROTOCOL, MAX_GENERATION, "0")),
)
_CHANGES: Final = tuple(operation for operation in OPERATIONS if operation.changes)
REQUESTS: Final = Structured(
    [operation.body or bool for operation in _CHANGES],
    _KNOWN,
    b'%d {"addresses":[]}' % _CHANGES.index(operations.ADD_TO_POOL),
    lambda position: b"%d " % position,
)


class _Site:
    """A manager with its ledger, and nodes that confirm whatever they are sent."""

    def __init__(self) -> None:
        self.left = _LIFE
        self.now = 0.0
        self.ledger = SqliteLedger(":memory:")
        rules = Settings().rules()
        self.manager = Manager(self.ledger.load(), rules, self.ledger.next_epoch(), self.now)
        self.manager.pool.add_addresses([ExternalAddress(each) for each in _EXTERNALS[:2]], self.now)
        for name, (role, underlay) in _NODES.items():
            roles = frozenset({role} if role is not None else Role)
            self.manager.membership.approve(name, ApprovalRequest(roles=roles, underlay=underlay), self.now)
            self._connect(name)
        for number, uuid in enumerate(UUIDS[:4]):
            self.manager.on_message(NodeName(f"host{number % 2 + 1}"), Attach(uuid, f"vm-{number}"), self.now)
        self.settle()

    def _connect(self, name: NodeName) -> None:
        role, underlay = _NODES[name]
        roles = frozenset({role} if role is not None else Role)
        with contextlib.suppress(VirtPortsError):
            self.manager.on_hello(Hello(PROTOCOL, name, roles, underlay, "0", 0, ()), "0", self.now)

    def tell(self, name: NodeName, message: NodeMessage) -> bool:
        """:return: Whether the manager took it."""
        if name not in self.manager.sessions:
            self._connect(name)
        if isinstance(message, Hello):
            return self.act(lambda: self.manager.on_hello(message, "0", self.now))
        if name not in self.manager.sessions:
            return False
        return self.act(lambda: self.manager.on_message(name, message, self.now))

    def aimed(self, name: NodeName, message: NodeMessage, bits: int) -> tuple[NodeName, NodeMessage]:
        """Return a message as the host of a VM may send it that knows its present ports; seldom as it is."""
        if bits & 7 == 0:
            return name, message
        if isinstance(message, Need) and (vm := self.manager.fleet.vms.get(message.domain)) is not None:
            active = self.manager.fleet.one(vm.uuid, AllocationState.ACTIVE)
            return vm.node, structs.replace(message, ports=active.ports if active is not None else message.ports)
        if isinstance(message, Report):
            name = NodeName(f"host{1 + (bits >> 3 & 1)}")
            session = self.manager.sessions.get(name)
            return name, structs.replace(message, generation=session.generation if session is not None else 0)
        return name, message

    def act(self, act: Callable[[], object]) -> bool:
        """:return: Whether it was not refused."""
        recorded = self.manager.fleet.recorded
        try:
            act()
        except VirtPortsError as error:
            self._check_refusal(error, recorded)
            return False
        return True

    def _check_refusal(self, error: VirtPortsError, recorded: int) -> None:
        str(error).encode("utf-8", "surrogatepass")
        assert self.manager.fleet.recorded == recorded, f"refused when a part was done: {error!r}"

    def settle(self) -> None:
        """Commit what follows, and have the nodes confirm it."""
        for _ in range(50):
            outcome = self._commit()
            if not outcome.messages:
                return
            for name, message in outcome.messages:
                assert codec.decode_manager_message(codec.encode(message)) == message
                if isinstance(message, (Snapshot, Delta)) and name in self.manager.sessions:
                    self.manager.on_message(name, Applied(message.epoch, message.generation), self.now)
        raise AssertionError("it never settles")

    def _commit(self) -> Outcome:
        outcome = self.manager.take(self.now)
        self.ledger.commit(outcome.changes, self.now)
        for name in outcome.ended:
            self.manager.on_session_end(name, self.now)
        return outcome

    def go_on(self, data: bytes) -> None:
        """Let time pass, and now and then tell operators everything."""
        self.left -= 1
        self.now += (0.0, 0.1, 1.0, 130.0)[zlib.crc32(data) >> 8 & 3]
        if self.left % 4:
            # Inputs that arrive together are decided together.
            return
        self.manager.tick(self.now)
        self.settle()
        if self.left % 100 == 0:
            for operation in OPERATIONS:
                self._ask(operation)

    def _ask(self, operation: operations.Operation[Any]) -> None:
        handler = _handlers()[operation]
        if handler.kind is not Kind.QUERY:
            return
        for name in UUIDS if operation.parameters else UUIDS[:1]:
            given = {"manager": self.manager, "now": self.now, "about": _ABOUT, "live": _LIVE}
            optional = (each for each in operation.parameters if each.name not in ("name", "address", "port"))
            given |= {each.name: each.read_all(()) for each in optional}
            given |= {"all": True, "name": name, "address": _EXTERNALS[0], "limit": 10}
            with contextlib.suppress(VirtPortsError):
                answer = handler.call(given)
                if operation is operations.METRICS:
                    assert answer.body
                else:
                    codec.decode(operation.answer, codec.encode(answer))


_ABOUT: Final = About("0", WallTime.of(0.0), "ledger.db")
_LIVE: Final = LiveSettings(Path("/dev/null"), Settings(), lambda _: None)
"""Of a file without a line."""
_loaded: list[Any] = []


def _handlers() -> Any:
    if not _loaded:
        _loaded.append(handlers.load((queries, commands, serving)))
    return _loaded[0]


_sites: list[_Site] = []
_machines: list[_Machine] = []


def _site() -> _Site:
    if not _sites or _sites[0].left <= 0:
        if _sites:
            _sites.pop().ledger.close()
        _sites.append(_Site())
    return _sites[0]


def begin() -> None:
    """Begin with another site and another node: what comes does not depend on what was read before."""
    while _sites:
        _sites.pop().ledger.close()
    _machines.clear()


def _given_up_on_failure(work: Callable[[], bool]) -> bool:
    """Do it; after a failure the next input begins with another site."""
    try:
        return work()
    except BaseException:
        begin()
        raise


def believes_node_message(data: bytes) -> bool:
    """Have a manager follow a node's message."""
    message = codec.decode_node_message(data)
    assert codec.decode_node_message(codec.encode(message)) == message
    names = tuple(_NODES)

    def follow() -> bool:
        site = _site()
        taken = site.tell(*site.aimed(names[zlib.crc32(data) % len(names)], message, zlib.crc32(data) >> 16))
        site.go_on(data)
        return taken

    return _given_up_on_failure(follow)


def believes_request(data: bytes) -> bool:
    """Have a manager follow an operator's request."""
    position, _, body = data.partition(b" ")
    operation = _CHANGES[int(position)]
    given: dict[str, Any] = {}
    if operation.body is not None:
        try:
            given["body"] = codec.decode(operation.body, body)
        except InvalidRequest:
            return False
    names = (*UUIDS, *_NODES, "vm-0", "vm-1", "nobody")
    given["name"] = names[zlib.crc32(data) % len(names)]

    def follow() -> bool:
        site = _site()

        def act() -> None:
            query = _handlers()[operation].call({"manager": site.manager, "now": site.now, "live": _LIVE, **given})
            codec.decode(operation.answer, codec.encode(query(site.manager)))

        taken = site.act(act)
        site.go_on(data)
        return taken

    return _given_up_on_failure(follow)


class _Machine:
    """A node whose kernel takes whatever it is told."""

    def __init__(self) -> None:
        self.left = _LIFE
        self.now = 0.0
        identity = Identity(NodeName("one"), frozenset(Role), IPv4Address("172.30.0.31"), "0")
        self.node = Node(identity, 0x7FFF, has_libvirt=True)
        self.node.on_kernel_found([], None, {1: "lo"}, self.now)
        self.node.on_connected(self.now)
        self.node.on_message(Welcome(PROTOCOL, 1, "0"), self.now)
        for number, uuid in enumerate(UUIDS[:4], 2):
            vm = RunningDomain(uuid, f"vm-{number}", frozenset({Tap(f"vnet{number}", number)}))
            self.node.on_domain_starting(number, vm, self.now)

    def go_on(self, data: bytes) -> None:
        self.left -= 1
        self.now += (0.0, 0.1, 1.0, 130.0)[zlib.crc32(data) >> 8 & 3]
        self.node.on_tick(self.now)
        rates = dict.fromkeys(UUIDS[:4], Rates(1.0, 1.0))
        self.node.reports.send(1.0, rates, None, self.node.in_force, {})
        for _ in range(50):
            sent = self.node.take()
            for command in sent:
                if hasattr(command, "message"):
                    assert codec.decode_node_message(codec.encode(command.message)) == command.message
            if not any(isinstance(command, (Program, Replace)) for command in sent):
                return
            self.node.on_kernel_programmed(self.now)
        raise AssertionError("it never settles")


def believes_manager_message(data: bytes) -> bool:
    """Have a node follow a manager's message; most are of the manager that it follows already."""
    message = codec.decode_manager_message(data)
    assert codec.decode_manager_message(codec.encode(message)) == message
    if not _machines or _machines[0].left <= 0:
        _machines[:] = [_Machine()]
    machine = _machines[0]
    if zlib.crc32(data) & 7 and not isinstance(message, Welcome):
        message = structs.replace(message, epoch=machine.node.epoch)
    try:
        machine.node.on_message(message, machine.now)
    except VirtPortsError:
        # Of an older epoch, as any is after the greatest, or of one that has not said which ledger it has.
        _machines.clear()
        return False
    except BaseException:
        _machines.clear()
        raise
    machine.go_on(data)
    return True
