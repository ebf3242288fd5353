"""What a request changes of the operator's wishes. The changes themselves: tests/unit/cpm/api/recording.py."""

from __future__ import annotations

from cpm.api.views import WishesRequest
from cpm.commands.vms import updated
from cpm.protocol.model import Wishes


def test_what_is_left_out_stays_and_null_withdraws() -> None:
    before = Wishes(floor=64, cap=512, weight=7)
    assert updated(before, WishesRequest()) == before
    assert updated(before, WishesRequest(cap=None, weight=9)) == Wishes(floor=64, weight=9)
