"""natd's metrics: what the daemon counts, and their text. :mod:`cpm.service.metrics.natd` declares them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from cpm.protocol.errors import KernelError
from cpm.service import program
from cpm.service.metrics import natd as declared
from cpm.service.metrics.process import process_metrics
from cpm.service.metrics.values import Histogram
from natctl.core.node import Node
from natctl.kernel import sysctl
from natctl.kernel.kernel import Kernel

OPERATIONS: Final = ("some", "all")
"""What a kernel change is about: some VMs, or everything."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """What holds when the metrics are read."""

    version: str
    node: str
    is_connected: bool
    domains: int
    warnings: int
    dropped: Mapping[str, int]
    port_requests: Mapping[str, int]
    """Guests' requests for ports, by what became of them."""
    entries: int | None
    """Of the connection table; None: not known. Likewise for the limit."""
    entries_limit: int | None
    signal_s: Histogram


def read(name: str, node: Node, kernel: Kernel, dropped: Mapping[str, int]) -> Now:
    """
    Read what holds now.

    :param name: The node's.
    :param dropped: Packets dropped, by reason, as last read.
    """
    return Now(
        version=program.version(),
        node=name,
        is_connected=node.is_connected,
        domains=len(node.known_domains()),
        warnings=len((*kernel.warnings, *node.warnings)),
        dropped=dropped,
        port_requests={"answered": node.port_control.answered, "dropped": node.port_control.dropped},
        entries=sysctl.connection_table_entries(),
        entries_limit=sysctl.connection_table_size(),
        signal_s=node.signal_times.histogram,
    )


class Metrics:
    """What natd counts since it started."""

    def __init__(self) -> None:
        self.repairs = 0
        """Differences in the kernel that were mended."""
        self.connections: int | None = None
        """Connections of VMs, when last counted; None: not counted yet."""
        self._errors: Counter[str] = Counter()
        self._programming_s: dict[tuple[str, ...], Histogram] = {(of,): Histogram() for of in OPERATIONS}
        self._hook_s: dict[tuple[str, ...], Histogram] = {}

    def on_kernel_error(self, error: KernelError) -> None:
        """Count a request that the kernel refused or did not answer."""
        self._errors[errno.errorcode.get(error.errno, "other")] += 1

    def on_hook_answered(self, operation: str, seconds: float) -> None:
        """Count a call of libvirt's hook."""
        self._hook_s.setdefault((operation,), Histogram()).observe(seconds)

    @contextlib.contextmanager
    def programming(self, of: str) -> Iterator[None]:
        """
        Measure a kernel change, also one that fails, which is counted as an error too.

        :param of: One of :data:`OPERATIONS`.
        """
        begin = time.perf_counter()
        try:
            yield
        except KernelError as error:
            self.on_kernel_error(error)
            raise
        finally:
            self._programming_s[(of,)].observe(time.perf_counter() - begin)

    def pieces(self, now: Now) -> Iterator[str]:
        """Yield the text of all metrics."""
        yield declared.BUILD.text([((now.version, now.node), 1)])
        yield declared.CONNECTED.one(now.is_connected)
        yield declared.DOMAINS.one(now.domains)
        yield declared.WARNINGS.one(now.warnings)
        yield declared.DROPPED.text(((reason,), count) for reason, count in sorted(now.dropped.items()))
        yield declared.REPAIRS.one(self.repairs)
        yield declared.ERRORS.text(((name,), count) for name, count in sorted(self._errors.items()))
        yield declared.PORT_REQUESTS.text(((outcome,), count) for outcome, count in sorted(now.port_requests.items()))
        known = (
            (declared.CONNECTIONS, self.connections),
            (declared.ENTRIES, now.entries),
            (declared.ENTRIES_LIMIT, now.entries_limit),
        )
        for metric, value in known:
            if value is not None:
                yield metric.one(value)
        yield declared.PROGRAMMING.histograms(self._programming_s)
        yield declared.HOOKS.histograms(self._hook_s)
        yield declared.SIGNAL.histograms({(): now.signal_s})
        yield process_metrics()
