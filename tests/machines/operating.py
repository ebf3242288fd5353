"""What an operator sees on a machine, and what its users feel: compared after everything that happens to it."""

from __future__ import annotations

import json
import shlex
import time
from ipaddress import IPv4Address
from typing import Any

from lab.errors import LabError
from lab.traffic import Tally
from tests.machines.guests import Guest
from tests.machines.internet import MACHINE, PORT, SERVER, Peer
from tests.machines.machine import Failed, Machine
from tests.machines.waiting import LIMIT_S

_ANSWER_S = 300
"""Seconds that the load generator waits for an answer from the internet."""
_CONNGEN = "/root/conngen"
_SOCKET = "/run/virt-ports/cpmd.sock"


def ask(machine: Machine, path: str) -> Any:
    """
    Ask the manager by its socket; `virt-ports`, which asks the same, needs five emulated seconds to start.

    :raise Failed: When nobody answers, or with an error.
    """
    return json.loads(machine.run(f"curl -sS --fail-with-body --unix-socket {_SOCKET} http://localhost/v1/{path}"))


def await_in_order(machine: Machine) -> None:
    """
    Wait until the node is connected and has confirmed everything, and VMs have ports.

    :raise Failed: When that takes too long.
    """
    deadline = time.monotonic() + LIMIT_S
    while wrong := _out_of_order(machine):
        if time.monotonic() > deadline:
            raise Failed(f"not within {LIMIT_S:g} s: {wrong}")
        time.sleep(1.0)


def _out_of_order(machine: Machine) -> str:
    try:
        nodes, vms = ask(machine, "nodes"), ask(machine, "domains")
    except Failed as error:
        return str(error)
    if any(not (node["connected"] and node["synced"]) for node in nodes):
        return f"nodes: {nodes}"
    return f"VMs: {vms}" if any(vm["state"] != "active" for vm in vms) else ""


def assert_works(machine: Machine, vm: Guest | None) -> None:
    """
    Everything works: the machine's services, its own connections, and the VM's, which leave from the VM's ports.

    :param vm: None: no VM runs.
    """
    # libvirt's own rules refuse what VMs send until libvirtd, after its start, has put them all back; then it answers.
    machine.run("virsh -q uri")
    await_in_order(machine)
    assert machine.run("systemctl show --property NRestarts --value cpmd natd").split() == ["0", "0"], "one has crashed"
    own = _connect_from(machine, 10)
    assert (own.ok, own.fail) == (10, 0), own
    assert machine.internet.banner(MACHINE, 22).startswith("SSH-"), "nobody can log in any more"
    held = _ranges(machine)
    assert not any(first <= own.extmin <= last or first <= own.extmax <= last for first, last in held), (own, held)
    if vm is not None:
        _assert_vm_works(machine, vm)


def _assert_vm_works(machine: Machine, vm: Guest) -> None:
    for options in ("-R -c", "-u"):
        # It may grow or shrink meanwhile.
        ranges = _ranges(machine)
        tally = connect(vm, f"{options} -T {_ANSWER_S}", 10)
        assert (tally.ok, tally.fail) == (10, 0), tally
        ranges += _ranges(machine)
        assert any(first <= tally.extmin <= tally.extmax <= last for first, last in ranges), (tally, ranges)
    assert " 1 received" in vm.shell(f"ping -c 1 -W {_ANSWER_S} {SERVER}")


def _ranges(machine: Machine) -> list[tuple[int, int]]:
    vms = ask(machine, "domains")
    assert all(IPv4Address(vm["external_address"]) == MACHINE for vm in vms)
    return [(vm["first_port"], vm["last_port"]) for vm in vms]


def connect(vm: Guest, options: str, count: int) -> Tally:
    """Open connections from a VM to the server. :return: What became of them."""
    return Tally.parse(vm.shell(f"{_CONNGEN} {options} {SERVER} {PORT} {count} || [ $? -eq 2 ]"))


def _connect_from(machine: Machine, count: int) -> Tally:
    return Tally.parse(machine.run(f"{_CONNGEN} -T {_ANSWER_S} -R -c {SERVER} {PORT} {count} || [ $? -eq 2 ]"))


class Held:
    """Connections of the VM and of the machine itself that stay open while things happen, with a byte now and then."""

    COUNT = 20

    def __init__(self, machine: Machine, vm: Guest) -> None:
        self._machine = machine
        before = set(machine.internet.peers())
        load = f"exec {_CONNGEN} -T {_ANSWER_S} -e 5 -k -t -1 {SERVER} {PORT} {self.COUNT}"
        for unit, options in (("held-vm", f"-p NetworkNamespacePath=/run/netns/{vm.name}"), ("held-own", "")):
            output = f"-p StandardOutput=truncate:/root/{unit}"
            machine.run(f"systemd-run --quiet --unit {unit} {output} {options} sh -c {shlex.quote(load)}")
        deadline = time.monotonic() + LIMIT_S
        while len(set(machine.internet.peers()) - before) < 2 * self.COUNT:
            assert time.monotonic() < deadline, "the connections that are to be held do not come about"
            time.sleep(1.0)
        self._peers = set(machine.internet.peers())

    def cut(self) -> set[Peer]:
        """Return those of then that the server has no more, among them those that the tutorial has opened."""
        return self._peers - set(self._machine.internet.peers())

    def finish(self) -> tuple[Tally, Tally]:
        """Send a byte through each, close them, and return what became of the VM's and of the machine's."""
        self._machine.run("systemctl kill -s TERM --kill-whom=main held-vm held-own")
        return self._tally("held-vm"), self._tally("held-own")

    def _tally(self, unit: str) -> Tally:
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                return Tally.parse(self._machine.run(f"cat /root/{unit}"))
            except LabError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
