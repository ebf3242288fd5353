"""``python -m bench.edge_worker``: changes and loads of an edge, with and without fast path, for :mod:`bench.edge`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final
from unittest import mock

import msgspec

from bench.fleet import BIG, FIRST_EXTERNAL, fleet
from bench.fleet import crowd as fleet_crowd
from bench.worker import answer_lines
from cpm.protocol.bounds import LAST_PORT
from cpm.protocol.intent import EdgeIntent, ExternalRange
from cpm.protocol.model import DomainUUID, PortRange
from lab.errors import LabError
from natctl.bpf import calls
from natctl.kernel.fast_path import FastPath, _Running
from natctl.kernel.kernel import Kernel
from natctl.model.entries import Change, FastPathUse, Settings
from natctl.netlink.socket import NETFILTER, ROUTE, Socket

PORTS: Final = 256
"""That a change gives or takes."""


def changes_us(use: str, vms: int, count: int) -> list[float]:
    """
    Take 256 ports from the first VM of an edge, and give them back, again and again.

    :param use: Of the fast path, as in natd.toml.
    :return: Microseconds from the beginning of each change until it is followed: by the fast path, if that is in use.
    """
    return asyncio.run(_changes_us(FastPathUse(use), vms, count))


def loads_ms(use: str, vms: int, count: int) -> list[float]:
    """Return the milliseconds in which all VMs come into an edge without any: its fast path, or its nftables."""
    return asyncio.run(_loads_ms(FastPathUse(use), vms, count))


def crowd(vms: int, addresses: int, hosts: int) -> list[float]:
    """
    Load the fast path of an edge without any VM with so many, on so many addresses, and look up each once.

    :return: Seconds that it took, and megabytes of memory that its maps take in the kernel.
    :raise LabError: When it is not in force, or a port has another owner.
    """
    entries, pool = fleet_crowd(vms, addresses, hosts), fleet(1).path.internal_pool
    settings = edge_settings(FastPathUse.AUTO).edge
    fast_path = FastPath(settings)
    with Socket(ROUTE, "attach programs") as rtnl, Socket(NETFILTER, "look at chains") as nft:
        try:
            found = fast_path.look(rtnl, nft)
            begin = time.perf_counter()
            fast_path.ensure(rtnl, found, pool, entries, {})
            spent_s = time.perf_counter() - begin
            if reasons := [at.reason for at in fast_path.states if at.reason]:
                raise LabError(f"the fast path is not in force: {reasons[0]}")
            running = fast_path._running  # noqa: SLF001 - what the program reads
            assert running is not None
            _check_owners(running, entries)
            return [spent_s, sum(map(_kernel_bytes, running.loaded.maps.values())) / 1e6]
        finally:
            fast_path.withdraw(rtnl)


def _check_owners(running: _Running, entries: Mapping[DomainUUID, EdgeIntent]) -> None:
    """Read, as the program does, who owns the first and the last port of each VM, and the port after."""
    loaded, memory = running.loaded, running._memory["owners"]._memory  # noqa: SLF001
    for entry in entries.values():
        for each in entry.ranges:
            slot = int.from_bytes(calls.get(loaded.maps["slots"], each.external.packed, 4), sys.byteorder)
            for port, owns in ((each.ports.first, True), (each.ports.last, True), (each.ports.last + 1, False)):
                at = ((slot - 1) * 65536 + port) * 4
                if port <= LAST_PORT and (memory[at : at + 4] == entry.internal.packed) is not owns:
                    raise LabError(f"port {port} of {each.external} has a wrong owner")


def _kernel_bytes(descriptor: int) -> int:
    words = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split()
    return int(words[words.index("memlock:") + 1])


async def _changes_us(use: FastPathUse, vms: int, count: int) -> list[float]:
    wanted = fleet(vms)
    first = next(iter(wanted.edge.values()))
    shorter = ExternalRange(FIRST_EXTERNAL, PortRange(BIG.first, BIG.last - PORTS))
    both = msgspec.structs.replace(first, ranges=(shorter,)), first
    kernel = Kernel(edge_settings(use))
    found = []
    try:
        await kernel.replace({}, wanted.edge, wanted.path)
        check_in_force(kernel, use)
        with _followed() as moments:
            for turn in range(count):
                begin = time.perf_counter()
                await kernel.change(Change(edge={first.domain: both[turn % 2]}))
                end = time.perf_counter() if use is FastPathUse.OFF else moments.pop()
                found.append((end - begin) * 1e6)
    finally:
        await kernel.remove()
        await kernel.close()
    return found


async def _loads_ms(use: FastPathUse, vms: int, count: int) -> list[float]:
    wanted, found = fleet(vms), []
    for _ in range(count):
        kernel = Kernel(edge_settings(use))
        try:
            with _ensured() as spent:
                begin = time.perf_counter()
                await kernel.replace({}, wanted.edge, wanted.path)
                spent_ms = (time.perf_counter() - begin) * 1000
            check_in_force(kernel, use)
            found.append(spent_ms if use is FastPathUse.OFF else spent[0])
        finally:
            await kernel.remove()
            await kernel.close()
    return found


def edge_settings(use: FastPathUse) -> Settings:
    """Return the settings of a fleet's edge with this use of the fast path."""
    settings = fleet(1).settings("edge")
    assert settings.edge is not None
    return Settings(edge=dataclasses.replace(settings.edge, fast_path=use))


def check_in_force(kernel: Kernel, use: FastPathUse) -> None:
    """:raise LabError: When the fast path is to be used, and is not."""
    if use is FastPathUse.AUTO and (reasons := [at.reason for at in kernel.fast_path if at.reason]):
        raise LabError(f"the fast path is not in force: {reasons[0]}")


@contextlib.contextmanager
def _followed() -> Iterator[list[float]]:
    """Yield a list of the moments in which the tables of the fast path have followed a change."""
    moments: list[float] = []
    changed = FastPath.changed

    @contextlib.contextmanager
    def timed(*arguments: object) -> Iterator[None]:
        with changed(*arguments):  # type: ignore[arg-type]
            moments.append(time.perf_counter())
            yield

    with mock.patch.object(FastPath, "changed", timed):
        yield moments


@contextlib.contextmanager
def _ensured() -> Iterator[list[float]]:
    """Yield a list of the milliseconds that it took to have the fast path in force."""
    spent: list[float] = []
    ensure = FastPath.ensure

    def timed(*arguments: object) -> tuple[str, ...]:
        begin = time.perf_counter()
        found = ensure(*arguments)  # type: ignore[arg-type]
        spent.append((time.perf_counter() - begin) * 1000)
        return found

    with mock.patch.object(FastPath, "ensure", timed):
        yield spent


if __name__ == "__main__":
    answers: dict[str, Callable[..., list[float]]] = {"changes_us": changes_us, "loads_ms": loads_ms, "crowd": crowd}
    answer_lines(lambda name, arguments: answers[name](*arguments))
