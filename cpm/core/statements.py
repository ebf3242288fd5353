"""
What a node has said in its session, as one hello that would say all of it.

When a manager has to be built anew from the ledger, the sessions go on: the new one is told for each node what this
keeps. So an input that makes one manager fail costs no other node its session. Measurements and warnings are not kept:
hosts repeat them every second. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cpm.protocol.messages import Attach, Detach, Hello, NodeMessage, OwnPorts, Presence, Present
from cpm.protocol.model import DomainUUID


class Statements:
    """
    The last that a node said of itself and of its VMs.

    :param hello: Its first message.
    """

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        self._domains: dict[DomainUUID, Presence] = {each.domain: each for each in hello.domains}
        self._incoming: dict[DomainUUID, Attach] = {}
        self.detached = 0
        """How many VMs it has said to be gone."""

    def on_message(self, message: NodeMessage) -> None:
        """Keep what a message that was followed says."""
        match message:
            case Attach(incoming=True):
                self._incoming[message.domain] = message
            case Attach(domain, name, wishes=wishes):
                self._incoming.pop(domain, None)
                known = self._domains.get(domain)
                wishes = known.wishes if wishes is None and known is not None else wishes
                self._domains[domain] = Presence(domain, name, wishes)
            case Detach(domain):
                self.detached += 1
                self._incoming.pop(domain, None)
                self._domains.pop(domain, None)
            case Present(domains, is_partial=is_partial):
                self._domains = {each.domain: each for each in domains}
                self._hello = msgspec.structs.replace(self._hello, is_partial=is_partial)
            case OwnPorts(addresses):
                self._hello = msgspec.structs.replace(self._hello, own=addresses)

    @property
    def hello(self) -> Hello:
        """The node's first message, if it were sent now."""
        return msgspec.structs.replace(self._hello, domains=tuple(self._domains.values()))

    def incoming(self) -> Iterator[Attach]:
        """Yield what it said of VMs that migrate to it."""
        yield from self._incoming.values()
