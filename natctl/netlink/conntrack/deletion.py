"""
Deletes connections: those of a VM that is gone, or of ports that it lost, and those that began before their VM was
managed.

Entries are deleted by tuple, identifier and zone, so that a newer connection with the same tuple stays.

Source: ``ctnetlink_del_conntrack`` in net/netfilter/nf_conntrack_netlink.c.

Tested in ``tests/unit/natctl/netlink/test_conntrack.py``.
"""

from __future__ import annotations

import errno
import functools
import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from typing import Final

from pyroute2.netlink import NLA_F_NESTED, NLM_F_ACK

from cpm.protocol.errors import KernelError
from cpm.protocol.model import PortRange
from natctl.model.flow import ICMP, Flow
from natctl.netlink.conntrack.entries import (
    CTA_ID,
    CTA_IP_V4_DST,
    CTA_IP_V4_SRC,
    CTA_PROTO_DST_PORT,
    CTA_PROTO_ICMP_ID,
    CTA_PROTO_NUM,
    CTA_PROTO_SRC_PORT,
    CTA_STATUS,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
    CTA_TUPLE_ZONE,
    CTA_ZONE,
    DELETE,
    GET,
    Entry,
    list_request,
    open_socket,
    replies_to,
    sent_to,
    spans,
)
from natctl.netlink.message import NFGENMSG_BYTES, Request, attribute, nested, netfilter_message, network_number
from natctl.netlink.socket import Socket, until_complete

_SEEN_REPLY, _SOURCE_TRANSLATED = 0x02, 0x10  # IPS_SEEN_REPLY, IPS_SRC_NAT
_CTA_PROTO_ICMP_TYPE, _CTA_PROTO_ICMP_CODE = 5, 6
_PORT_NUMBERS = (CTA_PROTO_SRC_PORT, 2), (CTA_PROTO_DST_PORT, 2)
_ICMP_NUMBERS = (_CTA_PROTO_ICMP_TYPE, 1), (_CTA_PROTO_ICMP_CODE, 1), (CTA_PROTO_ICMP_ID, 2)
"""Type and size of the attributes of :attr:`~natctl.model.flow.Flow.numbers`."""

_DELETE_ROUNDS: Final = 3
_DELETE_BATCH: Final = 64


def delete_connections(internal: IPv4Address) -> int:
    """
    Delete every connection of a VM, of any protocol, whoever began it; blocks the calling thread.

    Only for a VM that has ended. Deletes by tuple and identifier, so that a newer connection with the same tuple stays.

    :return: How many were deleted.
    :raise KernelError: When the kernel refuses or does not answer; some may be deleted then, and calling again is safe.
    """
    with open_socket(f"delete the connections of {internal}") as ct:
        return delete_all(ct, internal)


def delete_unanswered(ct: Socket, flows: Iterable[Flow]) -> int:
    """
    Delete the connections that began with these packets, unless somebody has answered or translated them.

    An answer that comes in the microseconds between the look and the deletion is not seen.

    :param flows: In the direction of the first packet.
    :return: How many were deleted.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    found = (_find_unanswered(ct, flow) for flow in sorted(set(flows)))
    handles = [handle for handle in found if handle is not None]
    return _delete(ct, handles) if handles else 0


def delete_all(ct: Socket, internal: IPv4Address, held: Sequence[PortRange] = ()) -> int:
    """
    Delete the connections, of any protocol, whose replies go to this internal address, or that were begun with it.

    :param held: Leave out those on ports of these ranges.
    :return: How many were deleted.
    :raise KernelError: When the kernel refuses or does not answer; calling again is safe.
    """
    # Repeat until a dump is empty: one can miss entries while the kernel resizes its table. A VM that is gone, or lacks
    # these ports, creates no new ones; the limit is for a caller that is wrong about that.
    deleted = 0
    for wanted in (replies_to(internal), sent_to(internal)):
        for _ in range(_DELETE_ROUNDS):
            handles = until_complete(functools.partial(_handles, ct, wanted, internal, held))
            if not handles:
                break
            batches = (handles[at : at + _DELETE_BATCH] for at in range(0, len(handles), _DELETE_BATCH))
            deleted += sum(_delete(ct, batch) for batch in batches)
    return deleted


def _find_unanswered(ct: Socket, flow: Flow) -> bytes | None:
    """Return what identifies the connection of this flow; None when there is none, or it is answered or translated."""
    try:
        body = ct.ask(netfilter_message(GET, 0, socket.AF_INET, original_of(flow)))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    parts = spans(body, NFGENMSG_BYTES, len(body))
    status = parts.get(CTA_STATUS)
    if status is None or status[1] - status[0] != 4 or not {CTA_TUPLE_ORIG, CTA_ID} <= parts.keys():
        return None
    is_unanswered = network_number(body[slice(*status)]) & (_SEEN_REPLY | _SOURCE_TRANSLATED) == 0
    return _handle(body, parts) if is_unanswered else None


def original_of(flow: Flow) -> bytes:
    """Pack the tuple of a flow as a connection's original direction, with its zone."""
    addresses = attribute(CTA_IP_V4_SRC, flow.source.packed) + attribute(CTA_IP_V4_DST, flow.destination.packed)
    kinds = _ICMP_NUMBERS if flow.protocol == ICMP else _PORT_NUMBERS
    numbers = (
        attribute(kind, value.to_bytes(size, "big")) for (kind, size), value in zip(kinds, flow.numbers, strict=True)
    )
    parts = [
        nested(CTA_TUPLE_IP, addresses),
        nested(CTA_TUPLE_PROTO, attribute(CTA_PROTO_NUM, bytes((flow.protocol,))), *numbers),
    ]
    if flow.zone:
        parts.append(attribute(CTA_TUPLE_ZONE, flow.zone.to_bytes(2, "big")))
    return nested(CTA_TUPLE_ORIG, *parts)


def _handles(ct: Socket, wanted: bytes, internal: IPv4Address, held: Sequence[PortRange]) -> list[bytes]:
    entries = ((buffer, Entry.decode(buffer, *ends)) for buffer, *ends in ct.dump(list_request(wanted)))
    handles = []
    for buffer, entry in entries:
        # Check the address again: kernels before 5.8 ignore the filter, and these entries will be deleted.
        ports = [port for address, port in entry.ends if address == int(internal)] if entry is not None else []
        if entry is not None and ports and not (held and any(port is None or _is_held(port, held) for port in ports)):
            handles.append(_handle(buffer, entry.parts))
    return handles


def _handle(buffer: bytes, parts: Mapping[int, tuple[int, int]]) -> bytes:
    """
    Pack what finds exactly this entry again.

    That is the original tuple as the kernel gave it, whatever the protocol, the identifier and the zone.
    """
    nests = {CTA_TUPLE_ORIG: NLA_F_NESTED}
    wanted = (kind for kind in (CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE) if kind in parts)
    return b"".join(attribute(kind | nests.get(kind, 0), buffer[slice(*parts[kind])]) for kind in wanted)


def _is_held(port: int, held: Sequence[PortRange]) -> bool:
    return any(port in ports for ports in held)


def _delete(ct: Socket, handles: list[bytes]) -> int:
    """
    Delete entries; it is no error if one is gone already.

    :return: How many were deleted.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    requests = [
        Request(netfilter_message(DELETE, NLM_F_ACK, socket.AF_INET, handle), "delete a connection")
        for handle in handles
    ]
    answers = ct.try_each(requests)
    refused = [answer for answer in answers if answer not in (0, errno.ENOENT)]
    if refused:
        raise ct.error(refused[0] or errno.EIO)
    return answers.count(0)
