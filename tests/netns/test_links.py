"""Interfaces that come and go, on the real kernel."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest

from natctl.netlink.links import LinkAdded, LinkEvent, LinkRemoved, Resync, is_bridge_port, list_links, watch_links
from natctl.netlink.socket import ROUTE, Socket
from tests.netns.private_namespace import private_namespace, run

pytestmark = pytest.mark.netns


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with private_namespace():
        yield


def ip(command: str) -> None:
    run("ip", *command.split())


async def following(events: AsyncIterator[LinkEvent], count: int) -> list[LinkEvent]:
    return [await asyncio.wait_for(anext(events), 10) for _ in range(count)]


def test_every_interface_is_listed_with_its_bridge() -> None:
    ip("link add vpbr0 type bridge")
    ip("link add vnet0 type veth peer name vp-a")
    ip("link set vnet0 master vpbr0")
    ip("tuntap add vnet1 mode tap")
    assert list_links() == {"lo": None, "vpbr0": None, "vnet0": "vpbr0", "vp-a": None, "vnet1": None}


def test_a_tap_is_on_a_linux_bridge_or_not() -> None:
    ip("link add vpbr0 type bridge")
    for name in ("vnet0", "vnet1"):
        ip(f"tuntap add {name} mode tap")
    index = socket.if_nametoindex("vnet0")
    with Socket(ROUTE, "ask for a bridge") as rtnl:
        assert not is_bridge_port(rtnl, index)
        ip("link set vnet0 master vpbr0")
        assert is_bridge_port(rtnl, index)
        assert not is_bridge_port(rtnl, socket.if_nametoindex("vnet1"))
        assert not is_bridge_port(rtnl, socket.if_nametoindex("vpbr0"))
        ip("link set vnet0 nomaster")
        assert not is_bridge_port(rtnl, index)


def test_five_hundred_interfaces_are_listed() -> None:
    run("ip", "-batch", "-", text="".join(f"tuntap add vnet{at} mode tap\n" for at in range(500)))
    assert set(list_links()) == {"lo"} | {f"vnet{at}" for at in range(500)}


async def test_the_first_event_lists_all_interfaces() -> None:
    ip("tuntap add vnet0 mode tap")
    async with aclosing(watch_links()) as events:
        assert await following(events, 1) == [Resync({"lo": None, "vnet0": None})]


async def test_coming_and_going_is_told_once_each() -> None:
    async with aclosing(watch_links()) as events:
        await following(events, 1)
        ip("link add vpbr0 type bridge")
        ip("tuntap add vnet7 mode tap")
        ip("link set vnet7 master vpbr0 up")
        ip("link set vnet7 down")
        ip("link set vnet7 nomaster")  # for which the kernel says RTM_DELLINK, of the bridge's family
        ip("link set vnet7 master vpbr0")
        ip("tuntap del vnet7 mode tap")
        ip("link del vpbr0")
        assert await following(events, 4) == [
            LinkAdded("vpbr0"),
            LinkAdded("vnet7"),
            LinkRemoved("vnet7"),
            LinkRemoved("vpbr0"),
        ]


async def test_a_renamed_interface_is_added_and_removed() -> None:
    async with aclosing(watch_links()) as events:
        await following(events, 1)
        ip("tuntap add vp-a mode tap")
        ip("link set vp-a name vnet3")
        assert await following(events, 3) == [LinkAdded("vp-a"), LinkAdded("vnet3"), LinkRemoved("vp-a")]


async def test_an_interface_that_moves_to_another_namespace_is_gone_here() -> None:
    async with aclosing(watch_links()) as events:
        await following(events, 1)
        ip("link add vnet4 type veth peer name vp-b")
        assert set(await following(events, 2)) == {LinkAdded("vnet4"), LinkAdded("vp-b")}
        run("sh", "-c", 'unshare --net sleep 30 & child=$!; '
            'until [ "$(readlink /proc/$child/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do :; done; '
            "ip link set vp-b netns $child; kill $child")  # fmt: skip
        assert await following(events, 1) == [LinkRemoved("vp-b")]


class SmallSocket(socket.socket):
    """Has room for a message or two, the kernel's minimum, unless more is asked for later."""

    def bind(self, address: object, /) -> None:
        super().bind(address)  # type: ignore[arg-type]
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)


async def test_after_an_overflow_all_interfaces_are_listed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with aclosing(watch_links()) as events:
        with monkeypatch.context() as system:
            system.setattr(socket, "socket", SmallSocket)
            assert await following(events, 1) == [Resync({"lo": None})]
        run(
            "ip",
            "-batch",
            "-",
            text="".join(f"tuntap add vnet{at} mode tap\n" for at in range(50)) + "link del vnet0\n",
        )
        seen: set[str] = set()
        async for event in events:
            match event:
                case Resync(now):
                    seen = set(now)
                    break
                case LinkAdded(name):
                    seen.add(name)
                case LinkRemoved(name):
                    seen.discard(name)
        assert seen == {"lo"} | {f"vnet{at}" for at in range(1, 50)}
        ip("link del vnet49")
        assert await following(events, 1) == [LinkRemoved("vnet49")]
