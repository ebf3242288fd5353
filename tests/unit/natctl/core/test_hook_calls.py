"""Whether libvirt called the hook for a VM that it started."""

from __future__ import annotations

import pytest

from cpm.protocol.model import DomainUUID
from libvirt_hooks.protocol import HookOperation
from natctl.core.hook_calls import HookCalls

VM = DomainUUID("11111111-1111-4111-8111-111111111111")
OTHER = DomainUUID("22222222-2222-4222-8222-222222222222")


def started(calls: HookCalls, uuid: DomainUUID = VM, detail: str = "booted") -> str:
    return calls.on_started(uuid, "web", detail)


def test_a_start_with_its_hook_is_silent() -> None:
    calls = HookCalls()
    for operation in (HookOperation.PREPARE, HookOperation.START, HookOperation.STARTED):
        calls.on_hook(VM, operation)
    assert started(calls) == ""


@pytest.mark.parametrize("detail", ["booted", "migrated", "restored"])
def test_a_start_without_is_named_with_its_remedies(detail: str) -> None:
    warning = started(HookCalls(), detail=detail)
    assert "VM web was started without a call" in warning
    for remedy in ("virt-ports install", "reload", "SELinux", "AppArmor"):
        assert remedy in warning


def test_each_start_needs_a_call_of_its_own() -> None:
    calls = HookCalls()
    calls.on_hook(VM, HookOperation.START)
    assert started(calls, OTHER)
    assert started(calls) == ""
    assert started(calls)


def test_events_may_come_late() -> None:
    calls = HookCalls()
    for operation in (HookOperation.START, HookOperation.RELEASE, HookOperation.START):
        calls.on_hook(VM, operation)
    assert (started(calls), started(calls)) == ("", "")
    assert started(calls)


@pytest.mark.parametrize("detail", ["wakeup", "from-snapshot", "77"])
def test_events_before_which_libvirt_need_not_call_it(detail: str) -> None:
    assert started(HookCalls(), detail=detail) == ""


def test_starts_that_fail_are_forgotten_in_the_end() -> None:
    calls = HookCalls()
    for number in range(5000):
        calls.on_hook(DomainUUID(f"00000000-0000-4000-8000-{number:012}"), HookOperation.START)
    assert len(calls._calls) == 4096
