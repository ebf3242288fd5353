"""
The end of a story: the faults stop, time passes, and then everything is in use or released.

What must be so at last: every VM that runs has ports, or is refused with a reason; nothing is reserved or leaving for
ever; every kernel holds exactly what the ledger says; no port is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from cpm.core.manager import Manager
from cpm.core.twins import twin_of
from cpm.protocol.model import Allocation, AllocationState, DomainUUID, NodeName
from prove.judge import BLOCK, Block, Violation, blocks
from prove.network import ALL_VMS, BLOCKS
from prove.story import EDGES, HOSTS, NODES
from prove.world import World
from qga_agent.domain_list import Phase

ROUNDS_S: Final = (2.0, 2.0, 2.0, 2.0, 2.0, 31.0, 6.0, 2.0, 2.0, 31.0, *(6.0, 2.0, 2.0, 31.0) * 6)
"""Seconds of each round; in some of them hold-downs pass."""
WITH_FLOWS: Final = 1
"""The round after which the connections that are left end."""
LONGEST_S: Final = 60.0
"""Seconds for which a range may be on its way at last, the hold-down included."""
SOONEST: Final = 5
"""The round after which everything can be in use or released."""


def finish(world: World) -> None:
    """
    Stop the faults, let time pass, and look.

    :raise Violation: When something does not come to an end, or what must never be seen was seen on the way.
    """
    stop_faults(world)
    for number, seconds in enumerate(ROUNDS_S):
        go_on(world, seconds, presence=number % 4 == 0)
        if number == WITH_FLOWS:
            for uuid in ALL_VMS:
                world.close_flows(uuid)
        if number >= SOONEST and not any(True for _ in complaints(world, longest_s=0.0)):
            return
    # Ranges may move for as long as VMs run, but none of them may be on its way for long.
    if found := "; ".join(complaints(world, longest_s=LONGEST_S)):
        raise Violation(f"{sum(ROUNDS_S):.0f} s after the last fault: {found}")


def stop_faults(world: World) -> None:
    """Everything that is broken is mended; migrations come to their end."""
    cpmd = world.cpmd
    cpmd.fuse, cpmd.fails = None, 0
    world.cut_off.clear()
    world.mend()


def go_on(world: World, seconds: float, *, presence: bool) -> None:
    """Some seconds of ordinary life."""
    for name in NODES:
        world.connect(name)
    world.settle()
    world.pass_time(seconds)
    if presence:
        for name in NODES:
            world.machines[name].ensure(world.now)
    for name in HOSTS:
        world.machines[name].measure(0, world.now)
    world.settle()


def complaints(world: World, *, longest_s: float) -> Iterator[str]:
    """
    Yield what is not as it must be at last.

    :param longest_s: Seconds for which a range may be on its way.
    """
    manager = world.cpmd.manager
    if manager is None:
        yield "cpmd does not run"
        return
    rows = [row for vm in manager.fleet.vms for row in manager.fleet.of(vm)]
    for row in rows:
        if (
            row.state is not AllocationState.ACTIVE
            and (age_s := world.cpmd.ledger_now(world.now) - row.since) >= longest_s
        ):
            yield f"{_row(row)} is {row.state} since {age_s:.0f} s"
    yield from _vms(world, manager, [row for row in rows if row.state is AllocationState.ACTIVE])
    yield from _kernels(world, rows)
    free = sum(manager.fleet.space.usage(address).free for address in world.externals)
    kept = sum(each.ports.size for of_node in manager.fleet.own_ports.values() for each in of_node)
    if not kept and free + sum(row.ports.size for row in rows) != BLOCKS * BLOCK:
        yield f"{free} ports are free"


_COMMON: Final = {twin_of(uuid, NodeName(host)): uuid for uuid in ALL_VMS for host in HOSTS}
"""What hosts call the twins that there may be."""


def _vms(world: World, manager: Manager, rows: list[Allocation]) -> Iterator[str]:
    by_name = {_COMMON.get(row.domain, row.domain): row for row in rows}
    waiting = {_COMMON.get(uuid, uuid) for uuid in manager.waiting}
    for uuid in ALL_VMS:
        names = [n for n in world.where(uuid) if world.machines[n].guests[uuid].phase is Phase.HERE]
        row = by_name.get(uuid)
        if names and row is None and uuid not in waiting:
            yield f"vm{uuid[-1:]} runs on {names[0]} and has no ports"
        if names and row is not None and row.node != names[0]:
            yield f"vm{uuid[-1:]} runs on {names[0]} and {_row(row)} is {row.node}'s"
        if not names and (row is not None or uuid in manager.fleet.vms):
            yield f"vm{uuid[-1:]} runs nowhere and is known"
        if not names and uuid in manager.waiting:
            yield f"vm{uuid[-1:]} runs nowhere and waits"


def _kernels(world: World, rows: list[Allocation]) -> Iterator[str]:
    active = [row for row in rows if row.state is AllocationState.ACTIVE]
    for name in HOSTS:
        kernel = world.machines[name].kernel
        mine = {_COMMON.get(row.domain, row.domain): row.ports for row in active if row.node == name}
        held = {uuid: entry.intent.ports for uuid, entry in kernel.host.items()}
        if held != mine:
            yield f"{name}'s kernel hands out {_short(held)} instead of {_short(mine)}"
        for uuid, guest in world.machines[name].guests.items():
            entry = kernel.host.get(uuid)
            if entry is not None and entry.taps != {tap.number for tap in guest.taps}:
                yield f"{name}'s kernel has other interfaces of vm{uuid[-1:]}"
    wanted: dict[DomainUUID, set[Block]] = {}
    for row in rows:
        if row.state is not AllocationState.HELD:
            wanted.setdefault(row.domain, set()).update(blocks(row.external, row.ports))
    for name in EDGES:
        mapped = world.judge.held_at(name)
        if mapped != wanted:
            yield f"{name}'s kernel maps {_short(mapped)} instead of {_short(wanted)}"


def _row(row: Allocation) -> str:
    return f"vm{row.domain[-1:]}'s {row.external}:{row.ports}"


def _short(held: Mapping[DomainUUID, object]) -> str:
    return ", ".join(f"vm{uuid[-1:]} {_plain(what)}" for uuid, what in sorted(held.items())) or "nothing"


def _plain(what: object) -> str:
    if isinstance(what, (set, frozenset)):
        return "+".join(f"{external}:{first}" for external, first in sorted(what))
    return str(what)
