"""sd_notify(3): reports the state of a daemon to systemd, if systemd started it."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """
    Send ``READY=1``, ``STATUS=…``, ``WATCHDOG=1`` or ``STOPPING=1``; do nothing without a service manager.

    :param state: Newline-separated assignments, see sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            # The service manager is not there; the daemon works without it.
            return


def watchdog_period() -> float | None:
    """Return the seconds between two ``WATCHDOG=1``, half of systemd's timeout; None: systemd expects none."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2_000_000 if usec.isdigit() and int(usec) > 0 else None
