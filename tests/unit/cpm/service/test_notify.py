"""What systemd is told, and what it asks for in the environment."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cpm.service import notify


@pytest.fixture
def systemd() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.settimeout(5)
    return made


def test_systemd_is_told_at_its_socket(systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify.notify("READY=1")
        assert systemd.recv(100) == b"READY=1"


def test_an_at_sign_stands_for_an_abstract_socket(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"vp-notify-{os.getpid()}"
    with systemd:
        systemd.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify.notify("WATCHDOG=1")
        assert systemd.recv(100) == b"WATCHDOG=1"


def test_without_systemd_or_when_it_is_gone_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify.notify("READY=1")


@pytest.mark.parametrize(
    ("microseconds", "period_s"), [("30000000", 15.0), ("1", 5e-7), ("0", None), ("soon", None), ("", None)]
)
def test_the_watchdog_is_fed_twice_in_its_timeout(
    microseconds: str, period_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    assert notify.watchdog_period() == period_s
