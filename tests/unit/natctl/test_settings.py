from __future__ import annotations

from pathlib import Path

import pytest

from cpm.errors import ConfigError
from natctl.settings import GuestsTable, load

HOST = 'underlay_address = "172.30.0.11"\nroles = ["host"]\n[host]\nuplinks = ["eth0"]\n'


def test_guests_are_visited_and_told_unless_said_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "natd.toml"
    file.write_text(HOST)
    settings = load(file)
    assert settings.monitor.guest_period_s == 10
    assert settings.guests == GuestsTable("/run/virt-ports.json", False, "", 1)
    file.write_text(f'{HOST}[monitor]\nguest_period_s = 0\n[guests]\nagent_sockets = "/run/agents/{{uuid}}.sock"\n')
    assert load(file).monitor.guest_period_s == 0
    assert load(file).guests.agent_sockets == "/run/agents/{uuid}.sock"


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ('[guests]\nagent_sockets = "/run/agent.sock"', "guests.agent_sockets"),
        ("[guests]\nagent_timeout_s = -1", "guests.agent_timeout_s"),
        ("[guests]\nagent_timeout_s = 1.5", "guests.agent_timeout_s"),
        ("[monitor]\nguest_period_s = -1", "monitor.guest_period_s"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(tmp_path: Path, lines: str, key: str) -> None:
    file = tmp_path / "natd.toml"
    file.write_text(f"{HOST}{lines}\n")
    with pytest.raises(ConfigError) as error:
        load(file)
    assert error.value.key == key
