"""cpmd.toml: valid and invalid settings."""

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


def test_timeouts_default_to_the_minimum_of_the_rfcs(tmp_path: Path) -> None:
    assert loaded(tmp_path, "").timeouts() == Timeouts()


def test_the_pool_sets_the_timeouts(tmp_path: Path) -> None:
    given = loaded(tmp_path, "[pool.timeouts]\nudp_s = 300\ntcp_time_wait_s = 30\n")
    assert given.timeouts() == Timeouts(udp_s=300, tcp_time_wait_s=30)


@pytest.mark.parametrize(("line", "words"), [
    ("udp_s = 119", r"cpmd\.toml: pool\.timeouts\.udp_s: 119 s is below the 120 s of RFC 4787 REQ-5; use 120 or more"),
    ("sctp_s = 9", r"cpmd\.toml: pool\.timeouts\.sctp_s: no such key"),
    ('icmp_s = "long"', r"cpmd\.toml: pool\.timeouts\.icmp_s: expected `int`, got `str`; correct the value"),
])  # fmt: skip
def test_invalid_settings_are_refused(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loaded(tmp_path, f"[pool.timeouts]\n{line}\n")
