"""What the server says when it ends a session."""

from __future__ import annotations

import pytest

from cpm.api.server import _reason
from cpm.protocol.errors import InvalidRequest


@pytest.mark.parametrize("pad", range(4))
def test_a_reason_fits_a_close_frame_and_ends_in_a_whole_character(pad: int) -> None:
    reason = _reason(InvalidRequest("x" * pad + "\N{EURO SIGN}" * 100))
    assert 120 < len(reason) <= 123
    assert set(reason.decode()) <= {"x", "\N{EURO SIGN}"}
