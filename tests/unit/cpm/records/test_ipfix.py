"""IPFIX, read by tshark, which is not ours."""

from __future__ import annotations

import subprocess
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cpm.core.journal import JournalEvent
from cpm.records import ipfix
from cpm.records.ipfix import Block, Exporter
from tests.unit.cpm.records.entries import WEB

FIELDS = (
    *("cflow.nat_event", "cflow.srcaddr", "cflow.post_natsource_ipv4_address"),
    *("cflow.port_range_start", "cflow.port_range_end", "cflow.port_range_step_size", "cflow.port_range_num_ports"),
    *("cflow.user_name", "cflow.observation_time_milliseconds", "cflow.sequence", "cflow.od_id"),
)


def block(event: int = ipfix.ALLOCATED, first: int = 1024, last: int = 1279) -> Block:
    addresses = IPv4Address("100.64.0.2"), IPv4Address("203.0.113.1")
    return Block(1763879880250, event, *addresses, first, last, WEB)


def decoded(messages: list[bytes], directory: Path) -> list[list[str]]:
    """Return what tshark reads in UDP packets with these messages: a row a packet, values of records by commas."""
    dump = directory / "dump.txt"
    lines = ["0000 " + " ".join(f"{byte:02x}" for byte in message) for message in messages]
    dump.write_text("\n".join(lines) + "\n")
    capture = directory / "ipfix.pcap"
    subprocess.run(["text2pcap", "-q", "-u", "4739,4739", dump, capture], check=True, capture_output=True)
    options = [word for field in FIELDS for word in ("-e", field)]
    argv: list[str | Path] = [
        "tshark",
        "-r",
        capture,
        "-d",
        "udp.port==4739,cflow",
        "-T",
        "fields",
        "-E",
        "separator=|",
        *options,
    ]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env={"TZ": "UTC", "PATH": "/usr/bin:/bin"})
    return [line.split("|") for line in done.stdout.splitlines()]


def test_tshark_reads_what_was_written(tmp_path: Path) -> None:
    exporter = Exporter(9)
    messages = [*exporter.messages([block(), block(ipfix.RELEASED, 1280, 65535)], 1763879881.9)]
    ((event, source, post, start, end, step, number, user, time, sequence, domain),) = decoded(messages, tmp_path)
    assert event == "16,17"
    assert source == "100.64.0.2,100.64.0.2"
    assert post == "203.0.113.1,203.0.113.1"
    assert (start, end, step, number) == ("1024,1280", "1279,65535", "1,1", "256,64256")
    assert user == f"{WEB},{WEB}"
    assert time.startswith("Nov 23, 2025 06:38:00.25")
    assert (sequence, domain) == ("0", "9")


def test_long_exports_are_several_messages_whose_numbers_count_records(tmp_path: Path) -> None:
    messages = [*Exporter(1).messages([block()] * 45, 1763879881.0)]
    assert [len(message) <= 1400 for message in messages] == [True] * 3
    rows = decoded(messages, tmp_path)
    assert [row[0].count("16") for row in rows] == [20, 20, 5]
    assert [row[9] for row in rows] == ["0", "20", "40"]


def test_each_message_can_be_read_alone(tmp_path: Path) -> None:
    last = [*Exporter(1).messages([block()] * 45, 1763879881.0)][-1]
    assert decoded([last], tmp_path)[0][0] == "16,16,16,16,16"


@pytest.mark.parametrize("event", JournalEvent)
def test_only_what_changes_who_has_ports_is_a_record(event: JournalEvent) -> None:
    expected = {"reserved": 16, "updated": 16, "freed": 17}
    assert ipfix.event_of(event) == expected.get(event.value)


def test_nothing_is_no_message() -> None:
    assert [*Exporter(1).messages([], 0.0)] == []


def test_all_that_rfc_8158_has_as_mandatory_is_in_each_record() -> None:
    """Table 21, for NAT44; of portRangeEnd its text says so, not the table."""
    time, event, source, external, first, last = 323, 230, 8, 225, 361, 362
    assert {time, event, source, external, first, last} <= {number for number, _ in ipfix.ELEMENTS}
