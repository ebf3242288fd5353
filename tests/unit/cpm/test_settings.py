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


@pytest.mark.parametrize(("line", "key", "remedy"), [
    # In full in test_timeouts.
    ("udp_s = 119", "udp_s", "119 s is below"),
    ("sctp_s = 9", "sctp_s", "no such key; correct its spelling or remove it"),
    ('icmp_s = "long"', "icmp_s", "expected `int`, got `str`; correct the value"),
])  # fmt: skip
def test_invalid_settings_are_refused(tmp_path: Path, line: str, key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, f"[pool.timeouts]\n{line}\n")
    assert (caught.value.file, caught.value.key) == (str(tmp_path / "cpmd.toml"), f"pool.timeouts.{key}")
    assert caught.value.remedy.startswith(remedy)


def test_the_pool_sets_the_limits_of_connections_and_their_bounds(tmp_path: Path) -> None:
    defaults = loaded(tmp_path, "[pool]\nconnections = 131072\nconnection_rate_cap = 5000\n").defaults()
    assert (defaults.connections, defaults.connection_rate) == (131072, 1000)
    assert defaults.bounds == {"connections": (1024, 1_048_576), "connection_rate": (20, 5000)}
    with pytest.raises(ConfigError, match="must lie between connections_floor"):
        loaded(tmp_path, "[pool]\nconnections = 1000\n")
