"""natd.toml: what is taken and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm.protocol.errors import ConfigError
from cpm.protocol.timeouts import TimeoutsTable
from natctl import settings

START = """
underlay_address = "172.30.0.11"
roles = ["host"]
[host]
uplinks = ["eth0"]
"""


def loaded(tmp_path: Path, more: str = "") -> settings.Settings:
    file = tmp_path / "natd.toml"
    file.write_text(START + more)
    return settings.load(file)


def test_timeouts_are_left_to_the_manager_unless_said_otherwise(tmp_path: Path) -> None:
    host = loaded(tmp_path).kernel().host
    assert host is not None
    assert host.timeouts == TimeoutsTable()
    assert host.log_group == 7414
    assert host.queue == 7414


def test_longer_timeouts_are_taken_and_a_shorter_time_wait(tmp_path: Path) -> None:
    said = loaded(tmp_path, "[host.timeouts]\nudp_s = 300\ntcp_established_s = 86400\ntcp_time_wait_s = 30\n")
    host = said.kernel().host
    assert host is not None
    assert host.timeouts == TimeoutsTable(udp_s=300, tcp_established_s=86400, tcp_time_wait_s=30)


@pytest.mark.parametrize("line", [
    "tcp_established_s = 7439", "tcp_transitory_s = 239", "udp_s = 119", "icmp_s = 59", "tcp_time_wait_s = 0",
    "tcp_reset_s = 0", "dns_s = 29", "sctp_s = 100",
])  # fmt: skip
def test_timeouts_below_the_floor_and_unknown_keys_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, f"[host.timeouts]\n{line}\n")
    assert caught.value.file == str(tmp_path / "natd.toml")
    assert caught.value.key == f"host.timeouts.{line.partition(' = ')[0]}"


@pytest.mark.parametrize("key", ["log_group", "queue"])
@pytest.mark.parametrize("number", [-1, 65536])
def test_an_nflog_group_or_a_queue_out_of_range_is_refused(tmp_path: Path, key: str, number: int) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, f"{key} = {number}\n")
    assert caught.value.key == f"host.{key}"
