"""
The end of a story: the faults stop, time passes, and then everything is in use or released.

What must be so at last: every VM that runs has ports, or is refused with a reason; nothing is reserved or leaving for
ever; every kernel holds exactly what the ledger says; no port is lost.

A machine that is broken for good stays so at first: what waits for nothing else is excused. Then the operator switches
it off and fences it, which is the documented remedy, and nothing is excused any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from cpm.core.manager import Manager
from cpm.core.twins import twin_of
from cpm.protocol.model import Allocation, AllocationState, DomainUUID, NodeName, PortRange
from prove.judge import BLOCK, Block, Violation, blocks
from prove.machine import Machine
from prove.network import ALL_VMS, BLOCKS
from prove.sites import SITES
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
    if broken := world.broken:
        _come_to_rest(world, f"with {broken} broken")
        world.give_up(broken)
    _come_to_rest(world, "after the last fault")


def _come_to_rest(world: World, when: str) -> None:
    for number, seconds in enumerate(ROUNDS_S):
        go_on(world, seconds, presence=number % 4 == 0)
        if number == WITH_FLOWS:
            for uuid in ALL_VMS:
                world.close_flows(uuid)
        if number >= SOONEST and not any(True for _ in complaints(world, longest_s=0.0)):
            return
        if number % SOONEST == 1 and world.has_old_copy and world.cpmd.manager is not None:
            # Nodes say so, and cpmd does.
            world.accept()
    # Ranges may move for as long as VMs run, but none of them may be on its way for long.
    if found := "; ".join(complaints(world, longest_s=LONGEST_S)):
        raise Violation(f"{sum(ROUNDS_S):.0f} s {when}: {found}")


def stop_faults(world: World) -> None:
    """Everything that is broken is mended; migrations come to their end."""
    cpmd = world.cpmd
    cpmd.fuse, cpmd.fails = None, 0
    world.cut_off.clear()
    world.mend()
    for name in sorted(world.liars):
        # What natd has said in a session and what the manager has heard in it is not the same.
        world.lose_session(name)


def go_on(world: World, seconds: float, *, presence: bool) -> None:
    """Some seconds of ordinary life."""
    world.approve_all()
    for uuid in ALL_VMS:
        # One that is kept stays a VM's that runs nowhere; and it was refused as long as the ledger waited for nodes.
        world.end_forwards(uuid, every=True)
    for name in world.nodes:
        world.connect(name)
    world.settle()
    world.pass_time(seconds)
    if presence:
        for name in world.nodes:
            world.machines[name].ensure(world.now)
    for name in world.hosts:
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
    if manager.restoring is not None:
        if world.broken not in manager.restoring.missing() or world.machines[world.broken].is_on:
            yield f"the restored ledger waits for {manager.restoring.waits_for(world.cpmd.ledger_now(world.now))}"
        return
    yield from manager.refused.sentences.values()
    rows = [row for vm in manager.fleet.vms for row in manager.fleet.all_of(vm)]
    yield from (each for row in rows for each in _on_its_way(world, manager, row, longest_s))
    active = [row for row in rows if row.state is AllocationState.ACTIVE and row.forward is None]
    yield from _vms(world, manager, active)
    yield from _kernels(world, rows)
    free = sum(manager.fleet.space.usage(address).free for address in world.externals)
    kept = sum(each.ports.size for of_node in manager.fleet.own_ports.values() for each in of_node)
    if not kept and free + sum(row.ports.size for row in rows) != BLOCKS * BLOCK:
        yield f"{free} ports are free"


def _on_its_way(world: World, manager: Manager, row: Allocation, longest_s: float) -> Iterator[str]:
    now = world.cpmd.ledger_now(world.now)
    age_s = now - row.since
    if row.state is AllocationState.ACTIVE or age_s < longest_s:
        return
    waits_for = (row.node,) if row.state is AllocationState.RESERVED else manager.lacking(row, now)[1]
    if not _excuses(world, *waits_for):
        yield f"{_row(row)} is {row.state} since {age_s:.0f} s"


def _excuses(world: World, *names: str) -> bool:
    """Return whether what waits for these machines waits for nothing but one that is broken and not fenced yet."""
    broken = world.broken
    return bool(broken) and not world.is_given_up and set(names) == {broken}


_NAMES: Final = {name for site in SITES.values() for name in site}
_COMMON: Final = {twin_of(uuid, NodeName(name)): uuid for uuid in ALL_VMS for name in _NAMES}
"""What hosts call the twins that there may be."""


def _vms(world: World, manager: Manager, rows: list[Allocation]) -> Iterator[str]:
    waiting = {_COMMON.get(uuid, uuid) for uuid in manager.waiting}
    for uuid in ALL_VMS:
        names = [n for n in world.where(uuid) if world.machines[n].guests[uuid].phase is Phase.HERE]
        of_vm = [row for row in rows if _COMMON.get(row.domain, row.domain) == uuid and not _excuses(world, row.node)]
        if names and not _excuses(world, names[0]):
            if not of_vm and uuid not in waiting:
                yield f"vm{uuid[-1:]} runs on {names[0]} and has no ports"
            elsewhere = (row for row in of_vm if row.node != names[0])
            yield from (f"vm{uuid[-1:]} runs on {names[0]} and {_row(row)} is {row.node}'s" for row in elsewhere)
        vm = manager.fleet.vms.get(uuid)
        is_forgotten = vm is None or bool(manager.fleet.all_of(uuid)) or _excuses(world, vm.node)
        if not names and (of_vm or not is_forgotten):
            yield f"vm{uuid[-1:]} runs nowhere and is known"


def _kernels(world: World, rows: list[Allocation]) -> Iterator[str]:
    active = [row for row in rows if row.state is AllocationState.ACTIVE and row.forward is None]
    for name in world.hosts:
        if name == world.broken:
            continue
        kernel = world.machines[name].kernel
        mine: dict[DomainUUID, PortRange | None] = dict.fromkeys(_denied(world.machines[name]))
        mine |= {_COMMON.get(row.domain, row.domain): row.ports for row in active if row.node == name}
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
    for name in world.edges:
        mapped = world.judge.held_at(name)
        if mapped != wanted and name != world.broken:
            yield f"{name}'s kernel maps {_short(mapped)} instead of {_short(wanted)}"


def _denied(machine: Machine) -> Iterator[DomainUUID]:
    """Yield the VMs that send nothing on this host unless they have ports."""
    charge = machine.remembered.charge
    return (uuid for uuid in machine.guests if charge is not None and uuid not in charge.older)


def _row(row: Allocation) -> str:
    return f"vm{row.domain[-1:]}'s {row.external}:{row.ports}"


def _short(held: Mapping[DomainUUID, object]) -> str:
    return ", ".join(f"vm{uuid[-1:]} {_plain(what)}" for uuid, what in sorted(held.items())) or "nothing"


def _plain(what: object) -> str:
    if isinstance(what, (set, frozenset)):
        return "+".join(f"{external}:{first}" for external, first in sorted(what))
    return str(what)
