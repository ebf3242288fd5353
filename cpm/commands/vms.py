"""Changes to one VM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from msgspec import UNSET

from cpm.api import handlers, operations
from cpm.api.requests import ResizeRequest, WishesRequest
from cpm.api.views import DomainDetail
from cpm.core.manager import Manager
from cpm.protocol.model import DomainUUID, Wishes
from cpm.protocol.wishes import KEYS
from cpm.queries import vms

_Answer = Callable[[Manager], DomainDetail]


@handlers.change(operations.SET_WISHES)
def set_wishes(manager: Manager, now: float, name: str, body: WishesRequest) -> _Answer:
    """
    Change the operator's wishes for a VM.

    :raise NotFound: When there is no VM of that name or UUID.
    :raise Ambiguous: When several have that name.
    :raise InvalidRequest: When the wishes contradict each other or are out of bounds.
    """
    vm = vms.find(manager, name)
    manager.set_wishes(vm.uuid, merge_wishes(vm.operator_wishes, body))
    return _detail_query(vm.uuid, now)


@handlers.change(operations.RESIZE)
def resize(manager: Manager, now: float, name: str, body: ResizeRequest) -> _Answer:
    """
    Start to resize a VM's range now.

    :raise NotFound: When there is no VM of that name or UUID.
    :raise Ambiguous: When several have that name.
    :raise Conflict: When it has no active range, or is being resized.
    :raise PortsExhausted: When there is no room for so many ports.
    """
    vm = vms.find(manager, name)
    manager.sizer.resize_to(vm.uuid, body.ports, now)
    return _detail_query(vm.uuid, now)


@handlers.change(operations.RELOCATE)
def relocate(manager: Manager, now: float, name: str) -> _Answer:
    """
    Start to move a VM's range to other ports.

    :raise NotFound: When there is no VM of that name or UUID.
    :raise Ambiguous: When several have that name.
    :raise Conflict: When it has no active range, or is being resized.
    :raise PortsExhausted: When there is no room elsewhere.
    """
    vm = vms.find(manager, name)
    manager.sizer.relocate(vm.uuid, now)
    return _detail_query(vm.uuid, now)


def merge_wishes(wishes: Wishes, request: WishesRequest) -> Wishes:
    """Return the operator's wishes for a VM with the changes of a request."""
    changes = {name: value for name in KEYS.values() if (value := getattr(request, name)) is not UNSET}
    return dataclasses.replace(wishes, **changes)


def _detail_query(uuid: DomainUUID, now: float) -> _Answer:
    return lambda manager: vms.detail(manager, now, uuid)
