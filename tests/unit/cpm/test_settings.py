"""cpmd.toml: what is taken and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm import settings
from cpm.protocol.errors import ConfigError
from cpm.protocol.timeouts import Timeouts


def loaded(tmp_path: Path, text: str) -> settings.Settings:
    file = tmp_path / "cpmd.toml"
    file.write_text(text)
    return settings.load(file)


def test_timeouts_are_the_rfcs_floors_unless_said_otherwise(tmp_path: Path) -> None:
    assert loaded(tmp_path, "").timeouts() == Timeouts()


def test_the_pool_says_how_long(tmp_path: Path) -> None:
    said = loaded(tmp_path, "[pool.timeouts]\nudp_s = 300\ntcp_time_wait_s = 30\n")
    assert said.timeouts() == Timeouts(udp_s=300, tcp_time_wait_s=30)


@pytest.mark.parametrize(("line", "key", "remedy"), [
    # In full in test_timeouts.
    ("udp_s = 119", "udp_s", "119 s is below"),
    ("sctp_s = 9", "sctp_s", "no such key; correct its spelling or remove it"),
    ('icmp_s = "long"', "icmp_s", "expected `int`, got `str`; correct the value"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, line: str, key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, f"[pool.timeouts]\n{line}\n")
    assert (caught.value.file, caught.value.key) == (str(tmp_path / "cpmd.toml"), f"pool.timeouts.{key}")
    assert caught.value.remedy.startswith(remedy)
