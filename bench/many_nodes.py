"""
``python -m bench.many_nodes DIRECTORY HOSTS VMS``: the nodes of a whole site in one process, for :mod:`bench.scale`.

Each node is the real :class:`cpm.api.session.Session` over TLS with a certificate of its own; behind it is no kernel:
every snapshot and delta is confirmed at once. Once told to, each host reports once a second, at a moment of its own.
Every number of a report changes with every report. What a VM does is no matter of its range's size: most use a number
of ports that moves slowly; now and then one becomes busy for a minute and idle for the next, and its range grows and
shrinks again: about one resize an hour for a VM, in the first minute as in the tenth.

Driven over stdin and stdout as :mod:`bench.worker` says.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import msgspec

from cpm.api.session import Session, tls_context
from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Delta,
    Draining,
    Hello,
    ManagerMessage,
    Measured,
    Presence,
    Present,
    Report,
    Snapshot,
    Welcome,
)
from cpm.protocol.model import DomainUUID, NodeName, Role

PORT: Final = 17414
PRESENT_S: Final = 5
"""Reports between two lists of all VMs, as natd sends them unless configured otherwise."""
COUNTER: Final = "reports"
"""The reason of dropped packets under which a host says how many reports it has sent."""
BUSY_S: Final = 60.0
IDLE_S: Final = 60.0
CYCLE_S: Final = 5 * 3600.0
"""Seconds between the busy minutes of one VM: its range then grows two or three times, and shrinks as often."""
PORTS: Final = 256
"""What a VM starts with unless configured otherwise; what it uses is a part of it."""

_UNDERLAY: Final = int(IPv4Address("172.16.0.10"))


def hellos(hosts: int, vms: int) -> Iterator[Hello]:
    """
    Yield the first message of two edges and of every host.

    :param vms: On each host.
    """
    for number in range(hosts + 2):
        is_edge = number < 2
        name = f"edge{number + 1}" if is_edge else f"host{number - 1}"
        role, underlay = Role.EDGE if is_edge else Role.HOST, IPv4Address(_UNDERLAY + number)
        domains = () if is_edge else tuple(_presence(number, vm) for vm in range(vms))
        yield Hello(PROTOCOL, NodeName(name), frozenset({role}), underlay, "bench", 0, domains)


def _presence(host: int, vm: int) -> Presence:
    return Presence(DomainUUID(f"00000000-0000-4000-{host:04x}-{vm:012x}"), f"vm{host}-{vm}")


class _Guest:
    """What one VM does, in numbers."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._phase = chance.random() * CYCLE_S
        self._share = chance.uniform(0.1, 0.4)

    def measure(self, intent: HostIntent, at: float) -> Measured:
        """:param at: Seconds."""
        chance, moment = self._chance, (at + self._phase) % CYCLE_S
        share, packets = self._share + 0.03 * math.sin((at + self._phase) / 60), 600.0
        if moment < BUSY_S:
            share, packets = 0.75, 2500.0
        elif moment < BUSY_S + IDLE_S:
            share, packets = 0.05, 50.0
        size = intent.ports.size if intent.ports is not None else 0
        in_use = min(size, int(PORTS * max(0.0, share + chance.uniform(-0.02, 0.02))))
        packets *= chance.uniform(0.8, 1.2)
        draining = tuple(Draining(ports, 0) for ports in intent.draining)
        return Measured(intent.domain, packets, packets / 90.0, in_use, chance.uniform(5.0, 40.0), draining)


class _Node:
    """One node, as :class:`cpm.api.session.Listener`."""

    def __init__(self, hello: Hello, directory: Path, chance: random.Random) -> None:
        self._hello = hello
        certificate, key, ca = (str(directory / name) for name in (f"{hello.node}.crt", f"{hello.node}.key", "ca.crt"))
        context = tls_context(certificate, key, ca)
        self._session = Session(f"https://127.0.0.1:{PORT}", self, lambda: context, chance.random)
        self._epoch = hello.epoch
        self._chance = chance
        self._generation = 0
        self.intents: dict[DomainUUID, HostIntent] = {}
        self._guests = {presence.domain: _Guest(chance) for presence in hello.domains}
        self.changes = 0
        """Deltas."""

    @property
    def is_host(self) -> bool:
        return Role.HOST in self._hello.roles

    async def run(self) -> None:
        await self._session.run()

    async def report(self, begin: asyncio.Event) -> None:
        """Report once a second, for ever, from a moment of its own on."""
        await begin.wait()
        loop = asyncio.get_running_loop()
        at, number = loop.time() + self._chance.random(), 0
        while True:
            await asyncio.sleep(max(0.0, at - loop.time()))
            if self._generation:
                vms = tuple(self._guests[uuid].measure(intent, at) for uuid, intent in self.intents.items())
                self._session.send(Report(self._generation, 1.0, vms, {COUNTER: number}))
                if number % PRESENT_S == 0:
                    self._session.send(Present(self._hello.domains))
            at, number = at + 1.0, number + 1

    def on_connected(self) -> None:
        self._session.send(msgspec.structs.replace(self._hello, epoch=self._epoch))

    def on_message(self, message: ManagerMessage) -> None:
        match message:
            case Welcome(epoch=epoch):
                self._epoch = epoch
            case Snapshot():
                self.intents = {vm.domain: vm for vm in message.host}
                self._apply(message)
            case Delta():
                self.changes += 1
                self.intents.update((vm.domain, vm) for vm in message.host)
                for uuid in message.host_gone:
                    self.intents.pop(uuid, None)
                self._apply(message)

    def on_disconnected(self, reason: str) -> None:
        self._generation = 0

    def _apply(self, message: Snapshot | Delta) -> None:
        self._generation = message.generation
        self._session.send(Applied(message.epoch, message.generation))


async def _main(directory: Path, hosts: int, vms: int) -> None:
    chance, begin = random.Random(1), asyncio.Event()
    nodes = [_Node(hello, directory, chance) for hello in hellos(hosts, vms)]
    tasks = [asyncio.create_task(node.run()) for node in nodes]
    tasks += [asyncio.create_task(node.report(begin)) for node in nodes if node.is_host]
    calls: dict[str, Callable[[], int | None]] = {
        "report": begin.set,
        "changes": lambda: nodes[0].changes,
        "ports": lambda: sum(vm.ports is not None for node in nodes for vm in node.intents.values()),
    }
    while line := await asyncio.to_thread(sys.stdin.readline):
        (name,) = json.loads(line)
        print(json.dumps(calls[name]()), flush=True)
    del tasks


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
