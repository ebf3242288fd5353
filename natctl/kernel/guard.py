"""
The guard: a program at the egress of an edge's uplinks that lets no internal address out.

It is there for the moment in which the rules of nftables are not, because somebody flushed them: what the fast path
does not do would leave untranslated. So it must not depend on them.

Tested by ``tests/netns/test_fast_path.py``.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Network
from typing import Final

from cpm.protocol.errors import KernelError
from natctl.bpf.loading import Loaded, NoObject
from natctl.kernel.attached import Attached
from natctl.model.entries import EdgeSettings, FastPathUse
from natctl.netlink.classifiers import Side
from natctl.netlink.links import read_links
from natctl.netlink.socket import Socket

PROGRAM: Final = "guard"
_SETTINGS: Final = struct.Struct("=4s4sII")


class Guard:
    """
    The program; nothing before the first :meth:`ensure`.

    :param settings: The edge role; None: this machine does not have it.
    """

    def __init__(self, settings: EdgeSettings | None) -> None:
        self._settings = settings
        self._attached = Attached(Side.EGRESS, PROGRAM)
        self._pool: IPv4Network | None = None
        self._loaded: Loaded | None = None
        self._dropped_before = 0

    def ensure(self, rtnl: Socket, pool: IPv4Network, *, shares_pool: bool) -> tuple[str, ...]:
        """
        Have it at all uplinks; at none where this machine or its neighbours have addresses of the pool themselves.

        Without an object file, or when the kernel refuses to load it, there is none.

        :return: What others had changed, one line each.
        :raise KernelError: When a program cannot be removed although it must be.
        """
        settings = self._settings
        if settings is None or settings.fast_path is FastPathUse.OFF or shares_pool:
            self.withdraw(rtnl)
            return ()
        links = [link for link in read_links(rtnl).values() if link.name in settings.uplinks]
        former = self._loaded
        try:
            if former is None or self._pool != pool:
                self._load(pool)
            assert self._loaded is not None
            missing = self._attached.put(rtnl, links, self._loaded)
        except (KernelError, NoObject, ValueError):
            self.withdraw(rtnl)
            return ()
        self._attached.remove_from_rest(rtnl, {link.number for link in links})
        return tuple(f"the guard at {name} was missing" for name in missing) if self._loaded is former else ()

    @property
    def dropped(self) -> int:
        """
        How many packets it has dropped since this natd started.

        :raise KernelError: When it cannot be read.
        """
        return self._dropped_before + (self._loaded.total("dropped") if self._loaded is not None else 0)

    def withdraw(self, rtnl: Socket) -> None:
        """Remove it from all interfaces. :raise KernelError: When the kernel refuses."""
        self._attached.remove_from_rest(rtnl, ())
        self.close()

    def close(self) -> None:
        """Let go of it; the kernel keeps what it runs."""
        if self._loaded is not None:
            self._dropped_before = self.dropped
            self._loaded.close()
        self._loaded = None

    def _load(self, pool: IPv4Network) -> None:
        settings = _SETTINGS.pack(pool.network_address.packed, pool.netmask.packed, 1, 0)
        loaded = Loaded(PROGRAM, settings, {})
        self.close()
        self._loaded, self._pool = loaded, pool
