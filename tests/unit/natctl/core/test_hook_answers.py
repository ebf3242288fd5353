"""What a node does when the kernel holds the ports for which a hook waits."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import PROTOCOL, Applied, Attach, Delta, NodeMessage, PathState, Snapshot, Welcome
from cpm.protocol.model import DomainUUID, NodeName, PortRange, Role
from natctl.core.domains import RunningDomain, Tap
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.model.commands import Answer, Program, Prune, Replace, Send

VM = DomainUUID("11111111-1111-4111-8111-111111111111")
INTENT = HostIntent(VM, "web", IPv4Address("100.64.0.1"), PortRange(20000, 20255))
AT = 1000.0


def test_the_hook_is_answered_first_and_after_one_message_each_way() -> None:
    node = Node(Identity(NodeName("host1"), frozenset({Role.HOST}), IPv4Address("172.30.0.11"), "test"), 7)
    node.on_connected(AT)
    node.on_message(Welcome(PROTOCOL, 1, "test"), AT)
    node.on_message(Snapshot(1, 1, PathState(IPv4Network("100.64.0.0/10"))), AT)
    assert any(isinstance(command, Replace) for command in node.take())
    node.on_kernel_programmed(AT)
    node.take()

    node.on_domain_starting(0, RunningDomain(VM, "web", frozenset({Tap("vnet0", 9)})), AT)
    assert [type(message) for message in sent(node)] == [Attach]
    node.on_message(Delta(1, 2, host=(INTENT,)), AT)
    (program,) = node.take()
    assert isinstance(program, Program)
    node.on_kernel_programmed(AT)
    commands = node.take()
    assert commands[0] == Answer(0, "", "ports 20000-20255")
    assert Send(Applied(1, 2)) in commands
    assert Prune(INTENT.internal) in commands


def sent(node: Node) -> list[NodeMessage]:
    return [command.message for command in node.take() if isinstance(command, Send)]
