"""Which timeouts are allowed, and which take precedence."""

from __future__ import annotations

import pytest
from msgspec import structs

from cpm.protocol.errors import ConfigError
from cpm.protocol.timeouts import MAXIMUM_S, MINIMUM, Timeouts, TimeoutsTable


def test_the_defaults_are_allowed_and_the_minimum_is_that_of_its_source() -> None:
    defaults = structs.asdict(Timeouts())
    TimeoutsTable(**defaults).check("file", "table")
    assert {key: defaults[key] for key in MINIMUM} == {key: seconds for key, (seconds, _) in MINIMUM.items()}
    assert (MINIMUM["tcp_established_s"], MINIMUM["udp_s"]) == ((7440, "RFC 5382 REQ-5"), (120, "RFC 4787 REQ-5"))
    assert (MINIMUM["tcp_transitory_s"], MINIMUM["icmp_s"]) == ((240, "RFC 5382 REQ-5"), (60, "RFC 5508 REQ-2"))
    assert MINIMUM["dns_s"][0] == 30


def test_the_table_has_a_key_for_every_timeout() -> None:
    assert Timeouts.__struct_fields__ == TimeoutsTable.__struct_fields__


def test_each_key_of_the_table_overrides_its_timeout() -> None:
    pool = TimeoutsTable(udp_s=300, icmp_s=90).override(Timeouts())
    assert pool == Timeouts(udp_s=300, icmp_s=90)
    assert TimeoutsTable(udp_s=120, tcp_reset_s=1).override(pool) == Timeouts(udp_s=120, icmp_s=90, tcp_reset_s=1)
    assert TimeoutsTable().override(pool) == pool


@pytest.mark.parametrize(("table", "words"), [
    (TimeoutsTable(udp_s=119),
     "udp_s: 119 s is below the 120 s of RFC 4787 REQ-5; use 120 or more, or remove the line"),
    (TimeoutsTable(tcp_established_s=7439),
     "tcp_established_s: 7439 s is below the 7,440 s of RFC 5382 REQ-5; use 7440 or more, or remove the line"),
    (TimeoutsTable(tcp_transitory_s=239),
     "tcp_transitory_s: 239 s is below the 240 s of RFC 5382 REQ-5; use 240 or more, or remove the line"),
    (TimeoutsTable(icmp_s=59),
     "icmp_s: 59 s is below the 60 s of RFC 5508 REQ-2; use 60 or more, or remove the line"),
    (TimeoutsTable(dns_s=29),
     ("dns_s: 29 s is below the 30 s of the longest wait of a resolver, resolv.conf(5); "
      "use 30 or more, or remove the line")),
    (TimeoutsTable(tcp_time_wait_s=0), "tcp_time_wait_s: use 1 or more, or remove the line"),
    (TimeoutsTable(tcp_reset_s=-1), "tcp_reset_s: use 1 or more, or remove the line"),
    (TimeoutsTable(udp_s=MAXIMUM_S + 1),
     "udp_s: the kernel cannot wait for 2147484 s; use 2147483 or less"),
])  # fmt: skip
def test_an_error_names_file_key_source_and_remedy(table: TimeoutsTable, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        table.check("cpmd.toml", "pool.timeouts")
    assert str(error.value) == f"cpmd.toml: pool.timeouts.{words}"


def test_a_table_says_after_how_long_ended_connections_are_forgotten() -> None:
    assert TimeoutsTable(udp_s=300).ended_s is None
    assert TimeoutsTable(tcp_time_wait_s=60).ended_s == 60
    assert TimeoutsTable(tcp_time_wait_s=60, tcp_reset_s=1).ended_s == 1
