"""A changed settings file is followed while sessions go on; a wrong one changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm import settings
from cpm.api.requests import ReloadRequest
from cpm.core.changes import NoteAct
from cpm.core.journal import Act
from cpm.core.manager import Manager
from cpm.protocol.errors import ConfigError, Conflict
from cpm.protocol.ledger_errors import LedgerUnwritable
from cpm.protocol.messages import Attach, Snapshot
from cpm.protocol.model import AllocationState
from cpm.serving import live_settings
from cpm.serving.live_settings import LiveSettings
from cpm.settings import Settings
from tests.unit.cpm.serving.sites import DB, WEB, Site

FILE = "[pool]\ninitial = 256\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "cpmd.toml"
    file.write_text(FILE)
    return file


@pytest.fixture
def live(site: Site, file: Path) -> LiveSettings:
    return LiveSettings(file, settings.load(file), lambda after: site.loop.use(after.rules()))


async def test_the_next_vm_starts_by_the_new_rules_and_others_keep_what_they_have(
    site: Site, file: Path, live: LiveSettings
) -> None:
    before = site.loop.manager.fleet.of(WEB)
    file.write_text("[pool]\ninitial = 512\nblock = 128\n")
    live.reload()
    assert not site.connection.is_closed
    (snapshot,) = await site.apply()  # of which nothing is new to the host
    assert isinstance(snapshot, Snapshot)
    assert [vm.ports for vm in snapshot.host] == [each.ports for each in before]
    await site.say(Attach(DB, "db"))
    (started,) = site.loop.manager.fleet.of(DB)
    assert (started.state, started.ports.size) == (AllocationState.ACTIVE, 512)
    assert site.loop.manager.fleet.of(WEB) == before
    assert [each.key for each in live.compare().differences] == ["pool.block"]  # not yet followed


async def test_hosts_are_told_other_timeouts(site: Site, file: Path, live: LiveSettings) -> None:
    file.write_text("[pool.timeouts]\nudp_s = 400\n")
    live.reload()
    (snapshot,) = await site.apply()
    assert isinstance(snapshot, Snapshot)
    assert snapshot.path.timeouts is not None
    assert snapshot.path.timeouts.udp_s == 400


async def test_a_shorter_hold_down_is_followed_by_the_invariants_too(
    site: Site, file: Path, live: LiveSettings
) -> None:
    assert site.loop._invariants.hold_down_s == 120.0
    file.write_text("[pool]\nhold_down_s = 300\n")
    live.reload()
    assert site.loop._invariants.hold_down_s == 300.0
    assert site.loop.manager.rules.hold_down_s == 300.0


@pytest.mark.parametrize("text", ["[pool]\ninitial = 1\n", "[pool", "[pool]\nfloor = 'x'\n"])
async def test_a_file_with_a_mistake_changes_nothing(
    site: Site, file: Path, live: LiveSettings, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager, in_force = site.loop.manager, live.in_force
    file.write_text(text)
    live.reload()
    assert "the settings stay as they were" in caplog.text
    assert (site.loop.manager, live.in_force) == (manager, in_force)
    with pytest.raises(ConfigError):
        live_settings.reload(live, ReloadRequest())


def test_an_operator_gets_the_file_that_he_has_seen(file: Path) -> None:
    followed: list[Settings] = []
    live = LiveSettings(file, Settings(), followed.append)
    file.write_text("[pool]\ninitial = 512\n[listen]\nread_socket = '/run/x'\n")
    seen = live_settings.differences(live)
    assert [(each.key, each.in_force, each.in_file, each.needs_restart) for each in seen.changes] == [
        ("listen.read_socket", '""', '"/run/x"', True),
        ("pool.initial", "256", "512", False),
    ]
    file.write_text("[pool]\ninitial = 1024\n")
    with pytest.raises(Conflict, match="has changed since you saw"):
        live_settings.reload(live, ReloadRequest(seen.digest))
    assert followed == []


async def test_nothing_is_followed_before_it_is_recorded_who_asked(site: Site, file: Path, live: LiveSettings) -> None:
    file.write_text("[pool]\ninitial = 512\n")
    site.fill()

    def change(manager: Manager, now: float) -> object:
        answer = live_settings.reload(live, ReloadRequest())
        manager.fleet.record(NoteAct(Act(0, "root", 1, "POST /v1/settings/reload", "")))
        return answer

    with pytest.raises(LedgerUnwritable):
        await site.loop.do(change, is_change=True)
    assert live.in_force.pool.initial == 256
    assert site.loop.manager.rules.initial == 256


def test_what_cannot_be_followed_is_a_difference_still(file: Path) -> None:
    def fail(_after: Settings) -> None:
        raise LedgerUnwritable("disk full")

    live = LiveSettings(file, Settings(), fail)
    file.write_text("[pool]\ninitial = 512\n")
    with pytest.raises(LedgerUnwritable):
        live.follow(live.compare())
    assert live.in_force.pool.initial == 256
    assert [each.key for each in live.compare().differences] == ["pool.initial"]


def test_a_webhook_is_shown_and_logged_without_what_lets_anybody_in(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    live = LiveSettings(file, Settings(), lambda _: None)
    for url in ("https://user:secret@hooks.example/secret?key=secret", "https://hooks.example?secret#secret"):
        file.write_text(f'[events]\nwebhook = "{url}"\n')
        (shown,) = live_settings.differences(live).changes
        assert (shown.in_force, shown.in_file) == ('""', '"https://hooks.example/…"')
        live.reload()
    assert "events.webhook" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("level", ["verbose", "", "10"])
def test_a_level_that_is_none_is_a_mistake(file: Path, level: str) -> None:
    """Python's logging would raise an error of its own, when half of the file has been followed."""
    file.write_text(f'log_level = "{level}"\n')
    with pytest.raises(ConfigError, match="log_level"):
        settings.load(file)
