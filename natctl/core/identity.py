"""
What a node says of itself. Pure.

Tested in ``tests/unit/site/test_membership.py``.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address

from cpm.protocol.holdings import Held
from cpm.protocol.messages import PROTOCOL, Hello, Present
from cpm.protocol.model import NodeName, Role
from cpm.protocol.own_ports import OwnAddress
from natctl.model.remembered import Remembered


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """How this node introduces itself to the manager."""

    name: NodeName
    roles: frozenset[Role]
    underlay: IPv4Address
    version: str
    machine: str = ""
    """As in ``Hello``."""
    instance: str = ""
    ended_timeout_s: int | None = None

    def hello(
        self,
        remembered: Remembered,
        present: Present,
        own: tuple[OwnAddress, ...],
        host_holds: tuple[Held, ...],
        edge_holds: tuple[Held, ...],
    ) -> Hello:
        """
        Return the first message of a session.

        :param remembered: Whom the node follows.
        :param present: The VMs that run here.
        :param own: The ports that it uses itself.
        :param host_holds: What its kernel holds as a host's.
        :param edge_holds: The same as an edge's.
        """
        return Hello(
            PROTOCOL,
            self.name,
            self.roles,
            self.underlay,
            self.version,
            remembered.epoch,
            present.domains,
            own,
            host_holds,
            edge_holds,
            machine=self.machine,
            instance=self.instance,
            follows=remembered.follows,
            ended_timeout_s=self.ended_timeout_s,
            is_partial=present.is_partial,
        )
