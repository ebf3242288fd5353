"""A VM that starts while there is no manager sends nothing: natd's deciding half, on a kernel that just booted."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address

import pytest

from cpm.protocol.messages import PathState
from cpm.protocol.model import NodeName, PortRange, Role
from natctl.core.domains import RunningDomain, Tap
from natctl.core.identity import Identity
from natctl.core.node import Node as NodeCore
from natctl.model.commands import Answer, Program, Replace
from natctl.model.entries import UNASSIGNED, Path
from natctl.model.remembered import Charge, Remembered
from tests.fakes.intents import with_intent
from tests.netns.topology import EXTERNAL, INTERNET, PATIENCE, POOL, VM, KernelIn, Node, Site

pytestmark = pytest.mark.netns

A = PortRange(20000, 20063)
_MASQUERADE = "table ip machine { chain c { type nat hook postrouting priority srcnat; oifname eth1 masquerade; }; }"
_AT = 1000.0


class Scene:
    """A machine that is its own edge and masquerades its guests, a VM, and natd without a manager."""

    def __init__(self, site: Site) -> None:
        self.machine: Node = site.both(11)
        site.spread(self.machine)
        self.machine.namespace.nft(_MASQUERADE)
        self.vm = VM.of(1, site.guest(self.machine), A)
        self.internet = site.internet
        # What a machine must have to masquerade its guests without us.
        self.machine.namespace.sysctl(ip_forward=1)

    def natd(self, charge: Charge | None) -> NodeCore:
        """Return natd's deciding half as it starts: the kernel holds what it holds, and there is no manager."""
        roles = frozenset({Role.HOST, Role.EDGE})
        identity = Identity(NodeName("both"), roles, IPv4Address("172.30.0.11"), "test")
        node = NodeCore(identity, 7, remembered=Remembered(1, charge=charge))
        found = self.machine.kernel.observe()
        node.on_kernel_found(found.host.values(), found.path, self.links, _AT, found.edge.values())
        self.carry_out(node)
        return node

    @property
    def links(self) -> dict[int, str]:
        return {self.vm.guest.tap_index: self.vm.guest.tap}

    def start_vm(self, node: NodeCore) -> list[str]:
        """Start the VM, as libvirt's hook tells of it; return the codes of the answers."""
        taps = frozenset({Tap(self.vm.guest.tap, self.vm.guest.tap_index)})
        node.on_domain_starting(1, RunningDomain(self.vm.domain, "web 1", taps), _AT + 60)
        return self.carry_out(node)

    def carry_out(self, node: NodeCore) -> list[str]:
        answers = []
        while commands := node.take():
            for command in commands:
                if isinstance(command, Program):
                    self.machine.kernel.change(command.change)
                elif isinstance(command, Replace):
                    self.machine.kernel.replace(command.host, command.edge, command.path)
                elif isinstance(command, Answer):
                    answers.append(command.code)
                if isinstance(command, Program | Replace):
                    node.on_kernel_programmed(_AT + 60)
        return answers

    def give_ports(self) -> None:
        """The manager is back."""
        entry, path = self.vm.on_host(), self.machine.kernel.observe().path
        assert path is not None
        at_edge = {self.vm.domain: self.vm.at(self.machine)}
        self.machine.kernel.replace({self.vm.domain: entry}, at_edge, path)

    def restart_natd(self) -> None:
        self.machine.kernel.close()
        self.machine.kernel = KernelIn(self.machine.namespace, self.machine.kernel.settings)


IN_CHARGE = Charge(PathState(POOL))


@pytest.fixture
def scene(site: Site) -> Scene:
    return Scene(site)


def arrived(server: socket.socket) -> bool:
    server.settimeout(0.5)
    try:
        server.recvfrom(10)
    except TimeoutError:
        return False
    return True


def test_a_vm_that_starts_without_a_manager_sends_nothing(scene: Scene) -> None:
    with scene.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        node = scene.natd(IN_CHARGE)
        assert scene.start_vm(node) == ["unreachable"]
        client.sendto(b"?", (INTERNET, 9000))
        assert not arrived(server)
        assert scene.machine.kernel.observe().drops["untranslated"] == 1
        # A natd that is restarted goes on like this, and changes nothing.
        ruleset = scene.machine.namespace.run("nft", "-s", "list", "ruleset")
        scene.restart_natd()
        again = scene.natd(IN_CHARGE)
        scene.start_vm(again)
        assert scene.machine.namespace.run("nft", "-s", "list", "ruleset") == ruleset
        client.sendto(b"?", (INTERNET, 9000))
        assert not arrived(server)
        scene.give_ports()
        client.sendto(b"!", (INTERNET, 9000))
        server.settimeout(PATIENCE)
        assert server.recvfrom(10)[1][1] in A


def test_a_machine_that_has_handed_out_no_port_masquerades_its_guests_as_before(scene: Scene) -> None:
    with scene.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        node = scene.natd(None)
        assert scene.start_vm(node) == ["unreachable"]
        client.sendto(b"?", (INTERNET, 9000))
        server.settimeout(PATIENCE)
        assert server.recvfrom(10)[1][0] == "198.51.100.11"
    assert "virtports" not in scene.machine.namespace.run("nft", "list", "ruleset")


def test_a_connection_that_was_there_before_goes_on(scene: Scene) -> None:
    with (
        scene.internet.listener(INTERNET, 8080) as listener,
        scene.vm.guest.namespace.tcp((INTERNET, 8080)) as client,
        listener.accept()[0] as server,
        scene.internet.udp(INTERNET, 9000) as elsewhere,
        scene.vm.guest.namespace.udp() as new,
    ):
        scene.start_vm(scene.natd(IN_CHARGE))
        new.sendto(b"?", (INTERNET, 9000))
        assert not arrived(elsewhere)
        server.settimeout(PATIENCE)
        client.sendall(b"goes on")
        assert server.recv(10) == b"goes on"


def test_a_managed_connection_survives_that_its_vm_is_denied_for_a_while(scene: Scene) -> None:
    """Somebody removed our tables while no natd and no manager were there: its zone is found when both are back."""
    path = Path(POOL, externals=frozenset({EXTERNAL}))
    starting = with_intent(scene.vm.on_host(), taps=frozenset())
    at_edge = {scene.vm.domain: scene.vm.at(scene.machine)}
    scene.natd(IN_CHARGE)
    for entry in (starting, scene.vm.on_host()):
        scene.machine.kernel.replace({scene.vm.domain: entry}, at_edge, path)
    with (
        scene.internet.listener(INTERNET, 8080) as listener,
        scene.vm.guest.namespace.tcp((INTERNET, 8080)) as client,
        listener.accept()[0] as server,
    ):
        scene.machine.namespace.nft("flush ruleset")
        scene.restart_natd()
        scene.start_vm(scene.natd(IN_CHARGE))
        denied = scene.machine.kernel.observe().host[scene.vm.domain]
        assert (denied.intent.internal, denied.index) == (UNASSIGNED, 1)
        scene.give_ports()
        server.settimeout(PATIENCE)
        client.sendall(b"goes on")
        assert server.recv(10) == b"goes on"
