"""
One monitoring pass of natd over 200 VMs on a host, as each second, without sending the report.

The VMs are light guests' taps: 200 veth links on a bridge, in a namespace of their own, and the host's kernel holds all
200 (their ranges, identities and budgets). A pass is natd's own ``_measure``: the counters of all taps, rates, the
kernel's counters of connections begun, a dump of the connection table, the report, and the check of every VM's
arrivals. There are no connections, but the kernel walks its whole table all the same. With more than 100 VMs the
counters come from the kernel's list of interfaces and not from libvirt, so there is no libvirt here.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterator

from bench.figures import Measured, median
from bench.fleet import HOST as FLEETS_HOST
from bench.fleet import fleet
from bench.worker import Worker, answer_lines
from cpm.protocol.model import Role
from lab import net
from lab.errors import LabError
from lab.shell import inside, ip_batch
from natctl.daemon import Natd
from natctl.netlink.links import list_names
from natctl.settings import HostTable, Settings

VMS = 200
RUNS = 50
WARM_UP = 5

_NAMESPACE = "bench-stats"


def measure(say: Callable[[str], None]) -> Measured:
    """Measure in a namespace that is removed afterwards."""
    with _taps(VMS), Worker(inside(_NAMESPACE)) as loader, Worker(inside(_NAMESPACE), "bench.stats") as worker:
        loader.call("load", "host", VMS)
        runs = worker.call("passes", WARM_UP + RUNS)[WARM_UP:]
    say(f"one pass over {VMS} VMs: median {median(runs):.1f} ms")
    return Measured({"stats_ms_200": median(runs)}, {"stats_ms": runs})


@contextlib.contextmanager
def _taps(count: int) -> Iterator[None]:
    """Make a host's bridge with this many guest interfaces; nothing is connected to their other ends."""
    net.delete_with_processes([_NAMESPACE])
    try:
        ip_batch([f"netns add {_NAMESPACE}"])
        taps = [tap for entry in fleet(count).host.values() for tap in entry.taps]
        ip_batch(
            [
                *(f"link add {bridge} up type bridge" for bridge in ("underlay", "vmbr0")),
                f"addr add {FLEETS_HOST}/24 dev underlay",
            ],
            _NAMESPACE,
        )
        ip_batch((f"link add tap{index} index {index} type veth peer name peer-{index}" for index in taps), _NAMESPACE)
        ip_batch((f"link set tap{index} master vmbr0 up" for index in taps), _NAMESPACE)
        yield
    finally:
        net.delete_with_processes([_NAMESPACE])


class _Natd(Natd):
    """natd without manager, libvirt and timers; it measures when told to."""

    async def found(self) -> int:
        """Adopt the kernel's entries, as after a restart. :return: Number of VMs whose interfaces were found."""
        held = await self._kernel.observe()
        self._node.on_kernel_found(held.host.values(), held.path, list_names(), time.time())
        return len(self._node.taps())

    async def pass_ms(self) -> float:
        """Run one monitoring pass. :return: Milliseconds."""
        gc.collect()
        begin = time.perf_counter()
        await self._measure()
        return (time.perf_counter() - begin) * 1000


async def _passes(count: int) -> list[float]:
    settings = Settings(
        FLEETS_HOST,
        name="host1",
        roles=frozenset({Role.HOST}),
        host=HostTable(frozenset({"underlay"}), libvirt=None),
    )
    natd = _Natd(settings)
    if (found := await natd.found()) != VMS:
        raise LabError(f"natd found {found} of {VMS} VMs")
    return [await natd.pass_ms() for _ in range(count)]


if __name__ == "__main__":
    answer_lines(lambda name, arguments: asyncio.run(_passes(*arguments)))
