"""cpmd.toml: valid and invalid settings."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import msgspec
import pytest

from cpm import settings
from cpm.core.sizing import Bounds, Demand, ScalingState, decide, default_policy, policy_named
from cpm.protocol.bounds import LAST_PORT
from cpm.protocol.errors import ConfigError
from cpm.protocol.model import DomainUUID
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


WEB = DomainUUID("00000000-0000-0000-0000-000000000001")
_GUARDS = [
    each.name
    for each in msgspec.structs.fields(settings.GuardTable)
    if isinstance(each.default, (int, float)) and not isinstance(each.default, bool)
]


@pytest.mark.parametrize("number", ["1e308", "4611686018427387904", "1000.0", "65535"])
@pytest.mark.parametrize("guard", _GUARDS)
def test_a_guard_of_the_largest_number_is_refused_or_decides(tmp_path: Path, guard: str, number: str) -> None:
    try:
        guards = loaded(tmp_path, f"[scaling.guards]\n{guard} = {number}\n").scaling.guard_settings()
    except ConfigError:
        return
    for in_use in (0, 1024):
        demand = Demand(domain=WEB, current=1024, ports_in_use=in_use, packets_per_s=5e3, exhausted=in_use == 1024)
        decision, _ = decide(policy_named(default_policy()), demand, ScalingState(), Bounds(), guards, 100.0)
        assert 0 < decision.target <= LAST_PORT


def test_every_setting_of_cpmd_needs_a_restart_unless_it_is_followed() -> None:
    before = settings.Settings()
    after = settings.Settings(
        listen=settings.ListenSettings(socket="/run/other.sock"),
        pool=settings.PoolSettings(block=128, initial=512, internal=IPv4Network("100.64.0.0/16")),
        scaling=settings.ScalingSettings(policy="grow-only", guards=settings.GuardTable(headroom_ports=32)),
        journal=settings.JournalSettings(keep_days=30, export="/srv"),
        log_level="debug",
    )
    found = {each.key: each.needs_restart for each in settings.differences(before, after)}
    assert found == {
        "listen.socket": True,
        "journal.keep_days": False,
        "journal.export": True,
        "pool.block": True,
        "pool.initial": False,
        "pool.internal": True,
        "scaling.policy": False,
        "scaling.guards.headroom_ports": False,
        "log_level": False,
    }
    in_force = settings.follow(before, after)
    assert {each.key for each in settings.differences(in_force, after)} == {
        key for key, is_late in found.items() if is_late
    }
    assert (in_force.pool.initial, in_force.scaling.guards.headroom_ports) == (512, 32)
    assert in_force.rules().block == before.rules().block
