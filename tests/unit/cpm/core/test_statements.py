"""What a node said in its session, as one hello."""

from __future__ import annotations

from ipaddress import IPv4Address

from cpm.core.statements import Statements
from cpm.protocol.messages import PROTOCOL, Attach, Detach, Hello, OwnPorts, Presence, Present
from cpm.protocol.model import DomainUUID, NodeName, Role, Wishes
from cpm.protocol.own_ports import OwnAddress

A, B, C = (DomainUUID(f"00000000-0000-0000-0000-00000000000{n}") for n in "abc")
UNDERLAY = IPv4Address("172.30.0.11")
HELLO = Hello(PROTOCOL, NodeName("host1"), frozenset(Role), UNDERLAY, "0", 0, (Presence(A, "a", Wishes(cap=64)),))


def said(*messages: Attach | Detach | Present | OwnPorts) -> Statements:
    statements = Statements(HELLO)
    for message in messages:
        statements.on_message(message)
    return statements


def test_starts_and_ends_are_in_the_hello() -> None:
    hello = said(Attach(B, "b"), Attach(A, "renamed"), Attach(C, "c"), Detach(C, "shut down")).hello
    assert hello.domains == (Presence(A, "renamed", Wishes(cap=64)), Presence(B, "b"))
    assert (hello.node, hello.roles, hello.underlay) == (HELLO.node, HELLO.roles, HELLO.underlay)


def test_a_list_replaces_what_was_known() -> None:
    assert said(Attach(B, "b"), Present((Presence(C, "c"),))).hello.domains == (Presence(C, "c"),)


def test_a_list_is_partial_until_one_is_not() -> None:
    assert said(Present((), is_partial=True), Attach(B, "b")).hello.is_partial
    assert not said(Present((), is_partial=True), Present(())).hello.is_partial


def test_a_migration_is_kept_until_it_arrives_or_is_given_up() -> None:
    incoming = Attach(B, "b", incoming=True)
    assert list(said(incoming).incoming()) == [incoming]
    assert said(incoming).hello.domains == HELLO.domains
    assert list(said(incoming, Attach(B, "b")).incoming()) == []
    assert list(said(incoming, Detach(B, "failed")).incoming()) == []


def test_own_ports_are_those_said_last() -> None:
    own = (OwnAddress(IPv4Address("203.0.113.1"), ()),)
    assert said(OwnPorts(own)).hello.own == own
