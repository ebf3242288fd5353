"""Reading what the programs of chaos wrote."""

from __future__ import annotations

from pathlib import Path

from chaos.observations import Leak, Span, Use, parse, read

RECORDS = (
    {"kind": "gap", "guest": 3, "flow": "tcp0", "begin": 1.0, "end": 2.5},
    {"kind": "cut", "guest": 3, "flow": "tcp1", "begin": 1.0, "end": 2.0, "opened": 0.5, "why": "reset"},
    {"kind": "short", "guest": 3, "begin": 4.0, "end": 4.1, "why": ""},
    {"kind": "moved", "guest": 3, "flow": "udp", "at": 5.0, "before": "a:1", "after": "a:2"},
    {"kind": "wrong", "at": 6.0, "guest": 3, "text": "b'x'"},
    {"kind": "flow", "guest": 3, "flow": "tcp0", "begin": 0.0, "end": 9.0, "rounds": 9, "worst": 1.5},
    {"kind": "owner", "address": "203.0.113.1", "port": 2000, "sender": 3, "begin": 1.0, "end": 2.0, "protocol": "tcp"},
    {
        "kind": "leak",
        "where": "host1-un",
        "source": "10.10.0.10",
        "destination": "192.0.2.2",
        "protocol": "tcp",
        "begin": 1.0,
        "end": 2.0,
        "packets": 4,
    },
    {"kind": "lag", "guest": -1, "begin": 1.0, "end": 2.0},
    {"kind": "seen", "packets": 100, "missed": 2},
)


def test_every_record_becomes_a_value() -> None:
    found = parse(RECORDS)
    assert found.gaps == (Span(3, "tcp0", 1.0, 2.5),)
    assert found.gaps[0].seconds == 1.5
    assert found.cuts == (Span(3, "tcp1", 1.0, 2.0, "reset"),)
    assert found.opened == (Span(3, "short", 4.0, 4.1),)
    assert found.wrong == (Span(3, "wrong", 6.0, 6.0, "b'x'"), Span(3, "udp", 5.0, 5.0, "came from a:1, then from a:2"))
    assert found.worst == {(3, "tcp0", 0.0): 1.5}
    assert found.uses == (Use("203.0.113.1", 2000, 3, 1.0, 2.0),)
    assert found.leaks == (Leak("host1-un", "10.10.0.10", "192.0.2.2", 1.0, 2.0, 4),)
    assert found.lags == (Span(-1, "lag", 1.0, 2.0),)
    assert (found.packets, found.missed) == ((100,), 2)


def test_half_a_line_of_a_program_that_was_killed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "guest001.jsonl").write_text('{"kind": "short", "guest": 1, "begin": 1.0, "end": 2.0}\n{"kind": "sho')
    assert read(tmp_path).opened == (Span(1, "short", 1.0, 2.0),)
