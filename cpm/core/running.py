"""
The host of each VM that runs, and the VMs of each host.

Pure, and kept in memory only: hosts say it again in each session. Tested in ``tests/unit/cpm/core/test_running.py``.
"""

from __future__ import annotations

from collections.abc import KeysView, Mapping, MutableSet
from types import MappingProxyType
from typing import Final

from cpm.protocol.model import DomainUUID, NodeName

_NONE: Final[Mapping[DomainUUID, None]] = MappingProxyType({})


class RunningVMs:
    """
    Where VMs run. A host without session is believed as it was, until it is fenced.

    :param changed: Gets every VM whose host changes here, since nodes may need an update then.
    """

    def __init__(self, changed: MutableSet[DomainUUID]) -> None:
        self._changed = changed
        self._hosts: dict[DomainUUID, NodeName] = {}
        self._on: dict[NodeName, dict[DomainUUID, None]] = {}

    @property
    def hosts(self) -> Mapping[DomainUUID, NodeName]:
        """The host of each VM that runs, always as of now."""
        return self._hosts

    def on(self, node: NodeName) -> KeysView[DomainUUID]:
        """Return the VMs that run on a host, in the order in which they came."""
        return self._on.get(node, _NONE).keys()

    def put(self, uuid: DomainUUID, node: NodeName) -> None:
        """Record that a VM runs on a host, and on no other."""
        if self._hosts.get(uuid) != node:
            self.remove(uuid)
            self._hosts[uuid] = node
            self._on.setdefault(node, {})[uuid] = None
            self._changed.add(uuid)

    def remove(self, uuid: DomainUUID) -> None:
        """Record that a VM runs nowhere."""
        if (node := self._hosts.pop(uuid, None)) is not None:
            del self._on[node][uuid]
            self._changed.add(uuid)
