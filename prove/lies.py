"""What a host or an edge says that is not so: of VMs, of their connections, of what its kernel holds."""

from __future__ import annotations

from ipaddress import IPv4Address

import msgspec

from cpm.core.manager import Manager
from cpm.protocol.holdings import Held, HeldRange
from cpm.protocol.messages import (
    Applied,
    Attach,
    Detach,
    Draining,
    Hello,
    Measured,
    Need,
    NodeMessage,
    OwnPorts,
    Presence,
    Present,
    RefusedVM,
    Report,
)
from cpm.protocol.model import DomainUUID, PortRange, Role
from cpm.protocol.own_ports import OwnAddress, OwnRange, OwnUse
from prove.judge import BLOCK
from prove.machine import Machine

LIES = 9
FALSE_HELLO = 8
"""The lie that is told in the next first message of a session."""
_LATER = 1_000_000
"""A generation that is never reached."""


def tell(n: int, uuid: DomainUUID, machine: Machine, manager: Manager | None) -> NodeMessage:
    """
    Return a message of a machine that lies.

    :param n: Which lie.
    :param uuid: The VM that it is about; perhaps another host's.
    """
    assert machine.node is not None
    guess = PortRange(1024, 1024 + 4 * BLOCK - 1)
    mine = machine.node.guests().get(uuid)
    ports = mine.ports if mine is not None and mine.ports is not None else guess
    everywhere = tuple(Draining(PortRange(1024 + n * BLOCK, 1023 + (n + 4) * BLOCK), 0) for n in range(4))
    match n % LIES:
        case 0:
            return Attach(uuid, "mine")
        case 1:
            return Attach(uuid, "mine", incoming=True)
        case 2:
            return Detach(uuid, "gone")
        case 3:
            return Present((Presence(uuid, "mine"),))
        case 4:
            return Present(())
        case 5:
            return Applied(manager.epoch if manager is not None else 1, _LATER)
        case 6:
            return Report(_LATER, 1.0, (Measured(uuid, 0.0, 0.0, 0, 0.0, everywhere),))
        case _:
            return Need(uuid, ports, 65535, 1e9)


def tell_of_edge(n: int, uuid: DomainUUID, machine: Machine, manager: Manager | None) -> NodeMessage:
    """Return a message of a machine that lies, and is an edge and nothing else. Parameters as for :func:`tell`."""
    match n % LIES:
        case 1:
            epoch = manager.epoch if manager is not None else 1
            return Applied(epoch, _LATER, (RefusedVM(uuid, "out of memory"),))
        case 3:
            used = (OwnRange(PortRange(1024, 1024 + 2 * BLOCK), OwnUse.LISTENER),)
            return OwnPorts((OwnAddress(IPv4Address("203.0.113.1"), used),))
        case _:
            # What only hosts may say, and what makes sense of a VM's host only.
            return tell(n, uuid, machine, manager)


def is_confirmation(message: NodeMessage) -> bool:
    """Return whether a lie is that the kernel holds what it does not hold."""
    return isinstance(message, Applied)


def hello(truth: Hello, uuid: DomainUUID) -> Hello:
    """
    Return a first message that claims a VM, with ports that are perhaps another one's, and names no other. An edge
    claims to map them, and nothing else.
    """
    internal, host = int(IPv4Address("100.64.0.1")), int(IPv4Address("172.30.0.11"))
    guess = Held(uuid, internal, 0, (HeldRange(0, 1024, 1024 + 4 * BLOCK - 1),))
    mapped = Held(uuid, internal, host, (HeldRange(int(IPv4Address("203.0.113.1")), 1024, 1024 + BLOCK - 1),))
    claims = (Presence(uuid, "mine"),) if Role.HOST in truth.roles else ()
    return msgspec.structs.replace(truth, domains=claims, host_holds=(guess,), edge_holds=(mapped,))
