"""One machine in a namespace, and natd's kernel on it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID
from natctl.kernel.settings_before import SettingsBefore
from natctl.model.entries import Change, EdgeSettings, HostEntry, HostSettings, Path, Settings
from natctl.ruleset.readback import KernelState
from tests.netns.topology import KernelIn, Namespace
from tests.netns.waiting import wait_until

BOTH_ROLES = Settings(HostSettings(frozenset({"eth1"})), EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"})))


class Machine:
    """A namespace with the two interfaces that the settings name, and a kernel; close it when done."""

    def __init__(self, settings: Settings = BOTH_ROLES) -> None:
        self._settings = settings
        self.namespace = Namespace("machine")
        self.namespace.ip(
            "link add eth0 type veth peer name far0",
            "link add eth1 type veth peer name far1",
            "addr add 172.30.0.21/24 dev eth0",
            *(f"link set {name} up" for name in ("eth0", "far0", "eth1", "far1")),
        )
        # The kernel tells, and `ip route` shows, a while later that a link works.
        wait_until(lambda: self.namespace.run("ip", "-o", "link", "show", "up").count("state UP") == 4)
        self._kernels: list[KernelIn] = []
        self.restart_natd()

    def restart_natd(self, noted: SettingsBefore | None = None) -> None:
        """Go on with the kernel of a daemon that has just started."""
        self._kernels.append(KernelIn(self.namespace, self._settings, noted))
        self._kernel = self._kernels[-1]

    @property
    def kernel(self) -> KernelIn:
        """The kernel of the daemon that was started last."""
        return self._kernel

    def observe(self) -> KernelState:
        return self._kernel.observe()

    def replace(
        self, host: Mapping[DomainUUID, HostEntry], edge: Mapping[DomainUUID, EdgeIntent], path: Path
    ) -> tuple[str, ...]:
        return self._kernel.replace(host, edge, path)

    def change(self, change: Change) -> None:
        self._kernel.change(change)

    def ensure(self) -> tuple[str, ...]:
        return self._kernel.ensure()

    def remove(self) -> None:
        self._kernel.remove()

    def nft(self, *words: str) -> str:
        return self.namespace.run("nft", *words)

    def flush(self) -> None:
        """Remove all tables, as somebody else may."""
        self.nft("flush", "ruleset")

    def everything(self) -> tuple[str, str, str, str]:
        """Return all that somebody could see of us, as the tools show it."""
        ip = self.namespace.run
        # A table that was made anew is listed last.
        listed = "".join(sorted(self.nft("list", "ruleset").split("table ")))
        # What times out is renewed, and counts down meanwhile.
        listed = re.sub(r" expires \S+", "", listed)
        return listed, ip("ip", "route"), ip("ip", "rule"), ip("ip", "route", "show", "table", "all", "proto", "74")

    def close(self) -> None:
        for kernel in self._kernels:
            kernel.close()
        self.namespace.close()
