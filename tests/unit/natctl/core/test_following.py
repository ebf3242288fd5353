"""Whom a node follows; with managers around it in ``tests/unit/site/test_continuity.py``."""

from cpm.protocol.messages import Delta, Follows, Refused, Welcome
from cpm.protocol.model import DomainUUID
from natctl.core.following import Following
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
