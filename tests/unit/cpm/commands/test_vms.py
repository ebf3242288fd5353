"""What a request changes of the operator's wishes. The changes themselves: tests/unit/cpm/api/recording.py."""

from __future__ import annotations

from cpm.api.requests import WishesRequest
from cpm.commands.vms import merge_wishes
from cpm.protocol.model import Wishes


def test_a_missing_key_keeps_a_wish_and_null_withdraws_it() -> None:
    before = Wishes(floor=64, cap=512, weight=7)
    assert merge_wishes(before, WishesRequest()) == before
    assert merge_wishes(before, WishesRequest(cap=None, weight=9)) == Wishes(floor=64, weight=9)
