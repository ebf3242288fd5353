"""What a host says that is not so: of its VMs, of their connections, of what its kernel holds."""

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
    Presence,
    Present,
    Report,
)
from cpm.protocol.model import DomainUUID, PortRange
from prove.judge import BLOCK
from prove.machine import Machine

LIES = 9
FALSE_HELLO = 8
"""The lie that is told in the next first message of a session."""


def tell(n: int, uuid: DomainUUID, machine: Machine, manager: Manager | None) -> NodeMessage:
    """
    Return a message of a host that lies.

    :param n: Which lie.
    :param uuid: The VM that it is about; perhaps another host's.
    """
    assert machine.node is not None
    guess = PortRange(1024, 1024 + 4 * BLOCK - 1)
    mine = machine.node.guests().get(uuid)
    ports = mine.ports if mine is not None and mine.ports is not None else guess
    generation = 1_000_000
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
        case 5 if not machine.is_edge:
            # An edge that confirms what is not so can give any port to anybody; edges are what others are kept out by.
            return Applied(manager.epoch if manager is not None else 1, generation)
        case 6:
            return Report(generation, 1.0, (Measured(uuid, 0.0, 0.0, 0, 0.0, everywhere),))
        case _:
            return Need(uuid, ports, 65535, 1e9)


def hello(truth: Hello, uuid: DomainUUID) -> Hello:
    """Return a first message that claims a VM, with ports that are perhaps another one's, and names no other."""
    guess = Held(uuid, int(IPv4Address("100.64.0.1")), 0, (HeldRange(0, 1024, 1024 + 4 * BLOCK - 1),))
    return msgspec.structs.replace(truth, domains=(Presence(uuid, "mine"),), host_holds=(guess,))
