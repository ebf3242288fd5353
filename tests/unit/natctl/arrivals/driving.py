"""Drives the controller of arrivals for one VM, in virtual time."""

from __future__ import annotations

from ipaddress import IPv4Address

from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import Need
from cpm.protocol.model import DomainUUID, PortRange
from natctl.arrivals.controller import Arrivals
from natctl.model.commands import ArrivalCommand, CountPorts, Send
from natctl.model.entries import Destination, HostEntry
from natctl.model.port_use import Filling
from tests.fakes.intents import host_entry

VM = DomainUUID("11111111-1111-4111-8111-111111111111")
OTHER = DomainUUID("22222222-2222-4222-8222-222222222222")
INTERNAL = IPv4Address("100.64.0.1")
FLOOR = PortRange(20000, 20255)
DOUBLE = PortRange(20000, 20511)
THERE = Destination(6, IPv4Address("192.0.2.2"), 443)
AT = 1000.0


def watching(ports: PortRange = FLOOR, *, at_cap: bool = False) -> Arrivals:
    arrivals = Arrivals()
    arrivals.on_connected()
    give(arrivals, ports, AT, at_cap=at_cap)
    return arrivals


def a_vm(ports: PortRange, *, at_cap: bool = False, domain: DomainUUID = VM) -> HostIntent:
    return HostIntent(domain, "web", INTERNAL, ports, at_cap=at_cap)


def entry(ports: PortRange, budget: int | None, defer_after: int | None = None) -> HostEntry:
    return host_entry(VM, "web", 1, INTERNAL, ports, budget=budget, defer_after=defer_after)


def give(arrivals: Arrivals, ports: PortRange, at: float, *, at_cap: bool = False) -> None:
    """The VM gets these ports, and the kernel does as it is told."""
    arrivals.on_vm(a_vm(ports, at_cap=at_cap), at)
    hold(arrivals, at)


def hold(arrivals: Arrivals, at: float) -> list[ArrivalCommand]:
    """The kernel holds the present budget."""
    return arrivals.on_programmed(entry(FLOOR, arrivals.budget(VM)), at)


def need(command: ArrivalCommand) -> Need:
    """The command asks the manager for more ports: return what it says."""
    assert isinstance(command, Send)
    assert isinstance(command.message, Need)
    return command.message


def asks(commands: list[ArrivalCommand]) -> bool:
    return any(isinstance(command, Send) for command in commands)


def count(ports: PortRange = FLOOR, *, at_cap: bool = False) -> CountPorts:
    return CountPorts(VM, INTERNAL, ports, at_cap)


def evenly(in_use: int) -> Filling:
    """So many ports of FLOOR are in use, everywhere as many."""
    return Filling(in_use, in_use / FLOOR.size)


def armed(arrivals: Arrivals) -> int:
    value = arrivals.budget(VM)
    assert value is not None
    return value
