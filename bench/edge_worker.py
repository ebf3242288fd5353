"""``python -m bench.edge_worker``: changes and loads of an edge, with and without fast path, for :mod:`bench.edge`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Final
from unittest import mock

import msgspec

from bench.fleet import BIG, FIRST_EXTERNAL, fleet
from bench.worker import answer_lines
from cpm.protocol.intent import ExternalRange
from cpm.protocol.model import PortRange
from lab.errors import LabError
from natctl.kernel.fast_path import FastPath
from natctl.kernel.kernel import Kernel
from natctl.model.entries import Change, FastPathUse, Settings

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
    calls = {"changes_us": changes_us, "loads_ms": loads_ms}
    answer_lines(lambda name, arguments: calls[name](*arguments))
