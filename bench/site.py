"""A site for a benchmark: a lab of its own with one host and one edge in service, always removed afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from bench.waits import wait_until
from lab.daemons import CPMD, DaemonSettings, natd_of
from lab.lab import Lab
from lab.shell import ip_batch
from lab.sites import CLUSTER

NAME = "bench"
HOST = "host1"
EDGE = "edge1"

_CONNECTED_S = 20.0


@contextlib.contextmanager
def site(settings: DaemonSettings, name: str = NAME) -> Iterator[Lab]:
    """
    Bring a lab up whose daemons are configured and not started, and whose router knows one edge only.

    :param name: Of the lab; two of different names can be up at once.
    :raise LabError: When it does not come up.
    """
    lab = Lab(name, settings=settings, with_daemons=False)
    # Remove the remains of a bench that was killed.
    lab.down()
    try:
        lab.up()
        ip_batch(
            [f"route replace {address}/32 via {CLUSTER.machine(EDGE).address('uplink')}" for address in externals()],
            lab.namespace("router"),
        )
        lab.daemons.prepare()
        _make_failure_show(lab)
        yield lab
    finally:
        lab.down()


def _make_failure_show(lab: Lab) -> None:
    """Make a hook without an answer fail, so that it is not measured as a slow one."""
    conf = lab.hosts[HOST].directory / "etc/virt-ports/hook.conf"
    conf.write_text(conf.read_text().replace("on-failure=start", "on-failure=refuse"))


def start_nodes(lab: Lab) -> None:
    """
    Start natd on the edge and on the host, and wait until cpmd knows what their kernels hold.

    :raise LabError: When one does not get that far.
    """
    for node in (EDGE, HOST):
        lab.approve(node)
        lab.daemons.start(natd_of(node))
    wait_until(
        f"both nodes to be connected and in step (logs in {lab.state})",
        lambda: all(node["connected"] and node["synced"] for node in _nodes(lab)),
        _CONNECTED_S,
    )


def _nodes(lab: Lab) -> list[dict[str, bool]]:
    nodes: list[dict[str, bool]] = json.loads(lab.operate("node", "list", "-o", "json"))
    return nodes if len(nodes) == 2 else [{"connected": False}]


def start_all(lab: Lab) -> None:
    """Start cpmd, add the external addresses, start the nodes. :raise LabError: When one does not get ready."""
    lab.daemons.start(CPMD)
    lab.operate("pool", "add", CLUSTER.pool)
    start_nodes(lab)


def externals() -> tuple[str, ...]:
    """Return the external addresses of every lab."""
    return tuple(str(address) for address in CLUSTER.external_addresses)
