"""Whom a node follows; with managers around it in ``tests/unit/site/test_continuity.py``."""

from ipaddress import IPv4Network

import pytest

from cpm.protocol.messages import Delta, Follows, ManagerMessage, PathState, Refused, Snapshot, Welcome
from cpm.protocol.model import DomainUUID, NodeName
from natctl.core.following import Following, NotWelcomed
from natctl.model.remembered import NOTHING, Remembered


def test_what_has_to_outlive_the_machine_is_ledger_epoch_and_run() -> None:
    following = Following(NOTHING)
    following.on_message(Welcome(4, 3, "0", "ledger", "run"))
    first = following.remembered
    assert first == Remembered(3, Follows("ledger", "run", 0))
    assert first.has_durable_change(NOTHING)
    following.on_message(Delta(3, 2, grants=17))
    assert following.told == Follows("ledger", "run", 17)
    assert not following.remembered.has_durable_change(first)
    following.on_message(Delta(3, 3, grants=16))
    following.on_message(Refused(3, DomainUUID("u"), "code", "text"))
    assert following.told.grants == 17


def test_a_later_run_of_the_same_ledger_is_followed() -> None:
    following = Following(Remembered(3, Follows("ledger", "run", 17)))
    following.on_message(Welcome(4, 4, "0", "ledger", "next"))
    assert following.remembered == Remembered(4, Follows("ledger", "next", 17))


@pytest.mark.parametrize(
    "message",
    [
        Refused(4, DomainUUID("u"), "code", "text"),
        Delta(4, 1, grants=20),
        Snapshot(4, 1, PathState(IPv4Network("100.64.0.0/10")), grants=20),
    ],
    ids=lambda message: type(message).__name__,
)
def test_nobody_is_followed_before_its_welcome(message: ManagerMessage) -> None:
    before = Remembered(3, Follows("ledger", "run", 17))
    following = Following(before)
    with pytest.raises(NotWelcomed, match="epoch 4"):
        following.on_message(message)
    assert following.remembered == before
    following.on_message(Welcome(4, 4, "0", "ledger", "next"))
    following.on_message(message)
    assert (following.epoch, following.told.run) == (4, "next")


def test_a_node_keeps_which_edges_there_are_until_it_is_told_of_others_also_with_another_ledger() -> None:
    pool, edges = IPv4Network("100.64.0.0/10"), (NodeName("edge1"), NodeName("edge2"))
    following = Following(Remembered())
    following.on_message(Welcome(4, 3, "0", "ledger", "run"))
    following.on_message(Snapshot(3, 1, PathState(pool, edge_names=edges), grants=20))
    following.on_message(Snapshot(3, 2, PathState(pool)))
    assert following.told == Follows("ledger", "run", 20, edges), "a manager that names none is an older one"
    following.on_message(Welcome(4, 9, "0", "other", "next", adopts=True))
    assert following.told == Follows("other", "next", 0, edges)
    following.on_message(Snapshot(9, 1, PathState(pool, edge_names=edges[:1])))
    assert following.told.edges == edges[:1]
