"""Requests as bytes: written by the hook's own code, and read whole by natd's parser."""

from __future__ import annotations

from libvirt_hooks import qemu
from libvirt_hooks.protocol import HookOperation, HookRequest, RequestParser


def request_bytes(
    operation: HookOperation = HookOperation.START,
    suboperation: str = "begin",
    name: str = "web-1",
    extra: str = "-",
    xml: bytes = b"",
) -> bytes:
    """Return what the hook sends when libvirt calls it so."""
    return qemu.build_request(["virt-ports", name, operation, suboperation, extra], xml)


def encode(request: HookRequest) -> bytes:
    """Return the bytes from which natd parses the request."""
    return request_bytes(request.operation, request.suboperation, request.name, request.extra, request.xml)


def parse_request(data: bytes) -> HookRequest | None:
    """Parse all bytes received so far, as :meth:`RequestParser.feed` does."""
    return RequestParser().feed(data)
