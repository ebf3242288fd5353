"""What end-to-end tests observe: virt-ports' output, the kernels' state, and connections that send all the time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from lab import net, witness
from lab.lab import Lab
from lab.net import EDGE, HOST
from lab.shell import CLEAN_ENVIRONMENT
from lab.traffic import PORT
from lab.witness import Ports

_T = TypeVar("_T")

ECHO_CLIENT = Path(__file__).with_name("echo_client.py")


def eventually(look: Callable[[], _T], timeout_s: float = 40.0) -> _T:
    """Call ``look`` until its result is true, and return that; after the timeout, the last result."""
    deadline = time.monotonic() + timeout_s
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return seen


def facts(lab: Lab, *arguments: str) -> Any:
    """Return the JSON output of a ``virt-ports`` command."""
    return json.loads(lab.operate(*arguments, "-o", "json"))


def vm_of(lab: Lab, name: str) -> dict[str, Any] | None:
    """Return a VM as ``virt-ports list`` shows it; None when it does not."""
    return next((vm for vm in facts(lab, "list") if vm["name"] == name), None)


def active(lab: Lab, name: str) -> Ports | None:
    """Return the ports that a VM's new connections get, as ``virt-ports list`` shows them."""
    vm = vm_of(lab, name)
    return None if vm is None or vm["first_port"] is None else _external(vm)


def states(lab: Lab, name: str) -> dict[str, list[Ports]]:
    """Return everything a VM holds, by state."""
    held: dict[str, list[Ports]] = {}
    for allocation in facts(lab, "show", name)["allocations"]:
        held.setdefault(allocation["state"], []).append(_external(allocation))
    return held


def disagreements(lab: Lab) -> list[str]:
    """Return where kernels and ledger differ: every VM of the ledger, every element of all hosts and edges."""
    wanted: dict[tuple[str, str], dict[str, tuple[Ports, ...]]]
    wanted = {(role, node): {} for role in (HOST, EDGE) for node in lab.site.with_role(role)}
    for vm in facts(lab, "list", "--all"):
        held, internal = states(lab, vm["uuid"]), IPv4Address(facts(lab, "show", vm["uuid"])["internal_address"])
        for ports in held.get("active", ()):
            wanted[HOST, vm["node"]][vm["name"]] = (dataclasses.replace(ports, address=internal),)
        mapped = [ports for state in ("reserved", "active", "draining") for ports in held.get(state, ())]
        forwards = facts(lab, "show", vm["uuid"])["forwards"]
        mapped += [_external(forward) for forward in forwards if forward["state"] in ("starting", "active")]
        if mapped:
            for edge in lab.site.edges:
                wanted[EDGE, edge][vm["name"]] = witness.join_neighbours(mapped)
    found = [
        ((EDGE, edge), look(lab, edge))
        for edge in lab.site.edges
        for look in (witness.inbound_ranges, witness.outbound_ranges)
    ]
    found += [
        ((HOST, host), {vm: (ports,) for vm, ports in witness.host_ranges(lab, host).items()})
        for host in lab.site.hosts
    ]
    return [
        f"{role} {node} holds {has}, the ledger says {wanted[role, node]}"
        for (role, node), has in found
        if has != wanted[role, node]
    ]


def assert_agree(lab: Lab) -> None:
    """Wait until every node has confirmed everything, and kernels and ledger agree."""
    assert eventually(lambda: _in_step(lab) >= set(lab.site.nodes)), _in_step(lab)
    assert eventually(lambda: not disagreements(lab)), disagreements(lab)


@dataclasses.dataclass(frozen=True)
class Talk:
    """The result of talking connections."""

    connections: int
    broken: list[str]
    least_rounds: int
    ports: list[int]


class Talking:
    """Connections of a guest that talk until :meth:`finish`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def finish(self) -> Talk:
        """Stop them and return what became of them."""
        self._process.terminate()
        output, _ = self._process.communicate(timeout=30)
        return Talk(**json.loads(output.splitlines()[-1]))


@contextlib.contextmanager
def talking(lab: Lab, guest: str, count: int, period_s: float = 0.05) -> Iterator[Talking]:
    """Open connections from a light guest to the sink that talk all the time, or every few seconds."""
    words = (sys.executable, ECHO_CLIENT, str(net.INTERNET_ADDRESS), str(PORT), str(count), str(period_s))
    command = lab.command(guest, *words)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=CLEAN_ENVIRONMENT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield Talking(process)
        finally:
            process.kill()


def _in_step(lab: Lab) -> set[str]:
    return {node["name"] for node in facts(lab, "node", "list") if node["connected"] and node["synced"]}


def _external(view: dict[str, Any]) -> Ports:
    return Ports(IPv4Address(view["external_address"]), view["first_port"], view["last_port"])
