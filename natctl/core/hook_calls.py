"""
Tells whether libvirt called our hook when it started a VM.

libvirt does not report a hook that it cannot see or may not execute (SELinux, AppArmor, ``noexec``, no reload after the
install), and the VM then gets its ports late each time.
"""

from __future__ import annotations

from typing import Final

from cpm.protocol.model import DomainUUID
from libvirt_hooks.protocol import HookOperation

_STARTS: Final = frozenset({"booted", "migrated", "restored"})
"""Details of libvirt's event ``started`` before which it calls the hook with ``start``."""
_LIMIT: Final = 4096
"""VMs remembered: a start that fails after the hook's call is never followed by the event."""


class HookCalls:
    """Calls of the hook with ``start`` that libvirt's event ``started`` has not yet followed."""

    def __init__(self) -> None:
        self._calls: dict[DomainUUID, int] = {}

    def on_hook(self, uuid: DomainUUID, operation: HookOperation) -> None:
        """Record a call of the hook."""
        if operation is HookOperation.START:
            self._calls[uuid] = self._calls.pop(uuid, 0) + 1
            if len(self._calls) > _LIMIT:
                del self._calls[next(iter(self._calls))]

    def on_started(self, uuid: DomainUUID, name: str, detail: str) -> str:
        """
        Compare libvirt's event ``started`` with the hook's calls.

        :param detail: As in :class:`~qga_agent.domain_events.DomainStarted`.
        :return: A warning when the hook was not called; an empty string when it was.
        """
        if detail not in _STARTS:
            return ""
        calls = self._calls.pop(uuid, 0)
        if calls > 1:
            self._calls[uuid] = calls - 1
        if calls:
            return ""
        return (
            f"VM {name} was started without a call of the libvirt hook, so its ports came late; `virt-ports install` "
            "says whether the hook runs; otherwise libvirtd needs a reload, or SELinux or AppArmor forbid it the hook"
        )
