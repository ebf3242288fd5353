"""sd_notify(3): tell the service manager how we are, if there is one."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """
    Send ``READY=1``, ``STATUS=…``, ``WATCHDOG=1`` or ``STOPPING=1``; quietly nothing where nobody listens.

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
            # The manager that started us is gone; we serve on.
            return


def watchdog_period() -> float | None:
    """Return how often to send ``WATCHDOG=1``, in seconds: half of what was asked for; None when it was not."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2_000_000 if usec.isdigit() and int(usec) > 0 else None
