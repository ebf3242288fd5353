"""The site of a run: a lab with few ports, guests that talk, the server they talk to, and the witnesses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chaos.judge import Life
from chaos.observations import CONTROL
from lab import net
from lab.daemons import DaemonSettings
from lab.errors import LabError
from lab.lab import Lab
from lab.shell import CLEAN_ENVIRONMENT, inside, ip_batch
from lab.sites import CLUSTER

PROGRAMS = Path(__file__).parent / "programs"
HOLD_DOWN_S = 5.0
FLOOR = 256
SLOTS = 14
LIVES = 400
"""VMs that one run may start; the server has a port for each."""
SETTINGS = DaemonSettings(
    cpmd={
        "pool": {"initial": FLOOR, "floor": FLOOR, "cap": 2048, "hold_down_s": HOLD_DOWN_S, "compact_s": 1.0},
        "scaling.guards": {"shrink_cool_down_s": 5.0, "shrink_after_samples": 3},
    },
    natd={},
    # Connections that are over are forgotten soon, so that ports change hands within the run.
    hosts={"host.timeouts": {"tcp_reset_s": 1, "tcp_time_wait_s": 1}},
)
_READY_S = 30.0
_NICE = -5
"""Traffic and witnesses come after the daemons and before everything else on a busy machine."""


class Site:
    """
    A lab that is up, with its guests and programs.

    :param folder: Where the programs write.
    """

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.lives: list[Life] = []
        self._talkers: dict[int, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()

    def prepare(self, slots: int) -> None:
        """Shrink the pool, give the hosts a default gateway that is not ours, start programs and guests."""
        # Few ports, so that they change hands.
        self.lab.operate("pool", "add", "203.0.113.1-203.0.113.2", "--reserved", "8192-65535")
        self.lab.operate("pool", "remove", "203.0.113.3-203.0.113.4")
        for host in CLUSTER.hosts:
            ip_batch([default_route(host)], self.lab.namespace(host))
        log = self.folder / "server.jsonl"
        self._start("internet", "server.py", log, 9000, 9000 + LIVES)
        nets = "203.0.113.0/24,192.0.2.0/24,198.51.100.0/24"
        self._start("internet", "sniffer.py", self.folder / "owners.jsonl", "owners", f"uplink={nets}")
        self._start(net.SWITCH, "sniffer.py", self.folder / "sources.jsonl", "sources", *_allowed_sources())
        self._talk("router", CONTROL)
        for slot in range(1, slots + 1):
            self.start_guest(slot, CLUSTER.hosts[slot % 2])

    def start_guest(self, slot: int, host: str) -> None:
        """Start the next VM of a slot, and its traffic."""
        with self._lock:
            number = 1 + len(self.lives)
            self.lives.append(Life(number, slot, host, time.monotonic()))
        if number > LIVES:
            raise LabError(f"no more than {LIVES} VMs can be started in one run; make it shorter")
        self.lab.add_guest(guest_name(number), host)
        self._talk(guest_name(number), number)

    def stop_guest(self, slot: int) -> None:
        """End the traffic of a slot's VM as a power failure does, and the VM."""
        life = self.life(slot)
        self._end(self._talkers.pop(life.number), signal.SIGKILL)
        self.lab.remove_guest(guest_name(life.number))
        with self._lock:
            self.lives[life.number - 1] = Life(life.number, slot, life.host, life.began, time.monotonic())

    def life(self, slot: int) -> Life:
        """Return the VM of a slot that runs, or ran last."""
        return next(life for life in reversed(self.lives) if life.slot == slot)

    def living(self) -> list[Life]:
        """Return the VMs that run."""
        return [life for life in self.lives if life.ended == float("inf")]

    def signal_talker(self, slot: int, number: signal.Signals) -> None:
        """Send a signal to the traffic of a slot."""
        self._talkers[self.life(slot).number].send_signal(number)

    def finish(self) -> None:
        """End the traffic, then the witnesses; each writes what it has not yet written."""
        for talker in self._talkers.values():
            talker.send_signal(signal.SIGTERM)
        for talker in self._talkers.values():
            self._wait(talker, 70.0)
        time.sleep(0.5)
        self._stack.close()

    def kill(self) -> None:
        """End everything that was started here at once."""
        for talker in self._talkers.values():
            self._end(talker, signal.SIGKILL)
        self._stack.close()

    def facts(self, *arguments: str) -> Any:
        """Return the JSON output of a ``virt-ports`` command."""
        return json.loads(self.lab.operate(*arguments, "-o", "json"))

    @contextlib.contextmanager
    def program(self, node: str, name: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """Run one of the programs on a machine or in a guest."""
        words = [*inside(self.lab.namespace(node)), sys.executable, "-I", str(PROGRAMS / name), *map(str, arguments)]
        with (
            (self.folder / "programs.log").open("a") as log,
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, env=CLEAN_ENVIRONMENT) as process,
        ):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
                Path(f"/proc/{process.pid}/autogroup").write_text(f"{_NICE}")
            try:
                yield process
            finally:
                self._end(process, signal.SIGTERM)

    def _start(self, node: str, name: str, *arguments: object) -> None:
        process = self._stack.enter_context(self.program(node, name, *arguments))
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise LabError(f"{name} does not start on {node}; see {self.folder}/programs.log")

    def _talk(self, node: str, number: int) -> None:
        log = self.folder / f"guest{number:03}.jsonl"
        words = (log, number, net.INTERNET_ADDRESS)
        self._talkers[number] = self._stack.enter_context(self.program(node, "talker.py", *words))

    def _wait(self, process: subprocess.Popen[str], timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)

    def _end(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        if process.poll() is None:
            process.send_signal(number)
            self._wait(process, 10.0)
        if process.poll() is None:
            process.kill()
            process.wait()


def guest_name(number: int) -> str:
    """Return the name of the VM with this number."""
    return f"g{number:03}"


def default_route(node: str) -> str:
    """
    Return the ``ip`` command for the default route of a machine that is not ours.

    That of hosts leads to the manager, which forwards nothing: what a host sends there untranslated is seen.
    """
    gateway = CLUSTER.machine(node).gateway or CLUSTER.manager.node_address
    return f"route replace default via {gateway}"


def _allowed_sources() -> Sequence[str]:
    # Answers for which there is no route follow the default route; their source is the server, not a VM.
    server = f"{net.INTERNET_ADDRESS}/32"
    hosts = [
        f"{host}-un={CLUSTER.machine(host).address('underlay')}/32,{server},100.64.0.0/10" for host in CLUSTER.hosts
    ]
    # What an edge itself sends to the manager leaves there while the network of the hosts is down.
    edges = [
        f"{edge}-up={CLUSTER.machine(edge).address('uplink')}/32,{CLUSTER.machine(edge).address('underlay')}/32"
        f",{server},203.0.113.0/24"
        for edge in CLUSTER.edges
    ]
    return hosts + edges


def wait_settled(site: Site, timeout_s: float = 30.0) -> list[str]:
    """Wait until every node has confirmed everything and every VM has ports; return what is not so after that."""
    deadline = time.monotonic() + timeout_s
    while (found := _unsettled(site)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _unsettled(site: Site) -> list[str]:
    try:
        nodes, vms = site.facts("node", "list"), site.facts("list")
    except LabError as error:
        return [str(error)]
    found = [f"{node['name']} is not in step" for node in nodes if not (node["connected"] and node["synced"])]
    found += [f"{node['name']}: {warning}" for node in nodes for warning in node["warnings"]]
    states = {vm["name"]: vm["state"] for vm in vms}
    active = {name for name, state in states.items() if state == "active"}
    names = {guest_name(life.number) for life in site.living()}
    found += [f"{name} is {states.get(name, 'not listed')}" for name in sorted(names - active)]
    found += [f"{name} is gone and listed as active" for name in sorted(active - names)]
    found += [f"{part} does not run" for part in site.lab.broken_parts()]
    return found
