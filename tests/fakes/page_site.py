"""
A small site with a status page on which there is something to see: VMs of all states, and an hour of their past.

Everything is real but the machines: cpmd, its ledger, the page's listener. To look at it with a browser::

    python -m tests.fakes.page_site 7480
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import sys
from collections.abc import AsyncIterator, Sequence
from ipaddress import IPv4Address

from cpm.core.manager import Manager
from cpm.protocol.messages import Attach, Detach, Draining, Measured, Report
from cpm.protocol.model import AllocationState, DomainUUID, PortRange, Role
from cpm.protocol.own_ports import OwnAddress, OwnRange, OwnUse
from cpm.settings import PageSettings
from tests.fakes import cpmd
from tests.fakes.cpmd import Node, Site

STEP_S = 15.0
NAMES = (
    "web1", "web2", "web3", "mail", "build1", "build2", "build3", "proxy-eu", "proxy-us", "dns1", "dns2", "db",
    "crawler", "monitoring", "gitlab", "runner-01", "runner-02", "runner-03", "vpn", "wiki", "shop", "search", "voip",
    "backup",
)  # fmt: skip
HOSTILE = "<script>alert(1)</script>"
BIDI = "invoice\u202egnp.exe"
LONG = "a" * 200


@dataclasses.dataclass(slots=True)
class Guest:
    """A VM, and how many ports it uses."""

    uuid: DomainUUID
    name: str
    base: int
    swing: int
    period_s: float

    def used(self, at_s: float) -> int:
        return max(0, round(self.base + self.swing * math.sin(2 * math.pi * at_s / self.period_s)))


@dataclasses.dataclass(slots=True)
class PageSite:
    """The running site."""

    site: Site
    url: str
    hosts: Sequence[tuple[Node, list[Guest]]]
    edge2: contextlib.AsyncExitStack

    async def pass_time(self, steps: int) -> None:
        """Let hosts report once a step, and note points of the curves."""
        assert self.site.cpmd.pages is not None
        for _ in range(steps):
            self.site.time.passed_s += STEP_S
            for node, guests in self.hosts:
                await node.say(Report(node.generation, 1.0, tuple(self._measured(guest) for guest in guests)))
            await self.site.settle()
            await self.tick()
            await self.site.cpmd.pages.sample()

    async def lose_edge(self) -> None:
        await self.edge2.aclose()
        while "edge2" in self.site.cpmd.decisions.manager.sessions:
            await asyncio.sleep(0.01)

    async def tick(self) -> None:
        """Have the manager do what is due by now, and nodes confirm it."""
        await self.site.cpmd.decisions.do(Manager.tick)
        await self.site.settle()

    def _measured(self, guest: Guest) -> Measured:
        """Return what a host says of a VM; older connections end within about two minutes."""
        fleet, now = self.site.cpmd.decisions.manager.fleet, self.site.time.now()
        used = guest.used(self.site.time.passed_s)
        draining = tuple(
            Draining(each.ports, max(0, 40 - int(now - each.since) // 3))
            for each in fleet.of(guest.uuid)
            if each.state is AllocationState.DRAINING
        )
        return Measured(guest.uuid, 4.0 * used, 0.02 * used, used, used / 60, draining)

    async def stop_vm(self, name: str) -> None:
        [(node, guests, guest)] = [(n, gs, g) for n, gs in self.hosts for g in gs if g.name == name]
        guests.remove(guest)
        await node.say(Detach(guest.uuid, "shut down"))
        await self.tick()


@contextlib.asynccontextmanager
async def running(
    names: Sequence[str] = NAMES, addresses: int = 3, port: int = 0, page_names: tuple[str, ...] = ()
) -> AsyncIterator[PageSite]:
    """Run cpmd with a page, two hosts with VMs, and two edges."""
    settings = PageSettings(address=f"127.0.0.1:{port}", names=page_names)
    pool = ",".join(f'"203.0.113.{number + 1}"' for number in range(addresses))
    body = f'{{"addresses":[{pool}],"reserved":[{{"first":5060,"last":5060}},{{"first":8000,"last":8191}}]}}'
    own = (OwnAddress(IPv4Address("203.0.113.2"), (OwnRange(PortRange(32768, 36863), OwnUse.EPHEMERAL),)),)
    async with (
        cpmd.running(page=settings, edge_wait_s=1.0, edge_grace_s=2.0) as site,
        contextlib.AsyncExitStack() as stack,
    ):
        await site.ask("POST", "/v1/pool", body.encode())
        edge, host = frozenset((Role.EDGE,)), frozenset((Role.HOST,))
        await stack.enter_async_context(site.node("edge1", "172.30.0.21", edge, own))
        hosts = [await stack.enter_async_context(site.node(f"kvm{n}", f"172.30.0.1{n}", host)) for n in (1, 2)]
        edge2 = await stack.enter_async_context(contextlib.AsyncExitStack())
        await edge2.enter_async_context(site.node("edge2", "172.30.0.22", edge))
        guests: list[list[Guest]] = [[], []]
        for number, name in enumerate(names):
            uuid = DomainUUID(f"{number * 7919 + 16:08x}-5a31-4f7e-9c11-0000000000{number % 100:02d}")
            size = 30 + 37 * (number * number % 23) * (1 + (number % 4) ** 2)
            guests[number % 2].append(Guest(uuid, name, size, size * 2 // 3, 900.0 + 240 * (number % 5)))
            await hosts[number % 2].say(Attach(uuid, name))
        await site.settle()
        while len(site.cpmd.decisions.manager.present) < len(names):
            await asyncio.sleep(0.01)
        while site.cpmd.page is None or site.cpmd.page.address is None:
            await asyncio.sleep(0.01)
        url = "http://{}:{}/".format(*site.cpmd.page.address)
        yield PageSite(site, url, list(zip(hosts, guests, strict=True)), edge2)


async def live_an_hour(shown: PageSite) -> None:
    """Let something happen: VMs end, others get other ports, an edge is lost."""
    await shown.pass_time(230)
    for name in ("runner-01", "wiki"):
        await shown.stop_vm(name)
    await shown.pass_time(4)
    await shown.lose_edge()
    await shown.pass_time(2)
    await shown.stop_vm("runner-02")
    for name in ("gitlab", "vpn", "dns1"):
        await shown.site.ask("POST", f"/v1/domains/{name}/relocate")
    await shown.tick()
    await shown.pass_time(1)


async def _show(port: int) -> None:
    async with running(port=port) as shown:
        await live_an_hour(shown)
        print(shown.url, flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_show(int(sys.argv[1])))
