"""
Constructors of expressions, each with its notation in ``nft``.

Registers are the kernel's: 1 holds sixteen bytes and overlaps the 4-byte registers 8 to 11 (``NFT_REG32_00`` …), so
a key of an address and a port is loaded into 1 and 9, as ``nft`` does.

Tested in ``tests/unit/natctl/netlink/nftables/test_encode.py``.
"""

from __future__ import annotations

import functools
import struct
import sys
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.model import PortRange
from natctl.ruleset.values import Expression, Opaque, Value, Verdict

FIRST: Final = 1
"""Register of the first, or only, part of a key."""
SECOND: Final = 9
"""Register of the second part of a key."""
THIRD: Final = 10
FOURTH: Final = 11
FIFTH: Final = 2
"""Register of what stands behind a key of four parts: 2 overlaps the 4-byte registers 12 to 15."""
SIXTH: Final = 13
VERDICT_REGISTER: Final = 0

LINK: Final = 0
NETWORK: Final = 1
TRANSPORT: Final = 2

LINK_DESTINATION: Final = 0
"""Offset of the destination address in an Ethernet header."""
LINK_SOURCE: Final = 6
"""Offset of the source address in an Ethernet header."""
SOURCE: Final = 12
"""Offset of the source address in an IPv4 header."""
DESTINATION: Final = 16
"""Offset of the destination address in an IPv4 header."""
_CHECKSUM: Final = 10
"""Offset of the checksum in an IPv4 header."""
QUOTED: Final = 8
"""Transport offset of the header that an ICMP error quotes."""

NO_INTERFACE: Final = 1 << 30
"""No interface has an index with this bit: the kernel counts from 1."""

_META = {"mark": 3, "iif": 4, "iifname": 6, "oifname": 7, "iiftype": 8, "l4proto": 16, "pkttype": 19}
_CT = {"state": 0, "direction": 1, "status": 2, "mark": 3}
_CT_ZONE, _ORIGINAL = 17, 0
_FIB_SOURCE, _FIB_DESTINATION, _FIB_BY_INPUT, _FIB_PRESENT, _FIB_INTERFACE = 1, 2, 8, 32, 1
_CT_SOURCE, _CT_DESTINATION, _CT_SOURCE_PORT, _CT_DESTINATION_PORT = 19, 20, 11, 12
_ADD_TO_SET, _UPDATE_SET = 0, 1
_COMPARISON = {"==": 0, "!=": 1, "<=": 3, ">=": 5}


def _expression(kind: str, **attributes: Value) -> Expression:
    prefix = f"NFTA_{kind.upper()}_"
    return Expression(kind, tuple((prefix + name.upper(), value) for name, value in attributes.items()))


def native_u32(value: int) -> bytes:
    """Return 32 bits in the byte order of this machine, as packet and connection marks are kept."""
    return value.to_bytes(4, sys.byteorder)


def native_u16(value: int) -> bytes:
    """Return 16 bits in the byte order of this machine."""
    return value.to_bytes(2, sys.byteorder)


def meta(what: str, register: int = FIRST) -> Expression:
    """``meta mark``, ``iifname`` …"""
    return _expression("meta", dreg=register, key=_META[what])


def set_meta(what: str, register: int = FIRST) -> Expression:
    """``meta mark set …``"""
    return _expression("meta", key=_META[what], sreg=register)


def ct(what: str, register: int = FIRST) -> Expression:
    """``ct state``, ``ct mark``"""
    return _expression("ct", dreg=register, key=_CT[what])


def set_ct(what: str, register: int = FIRST) -> Expression:
    """``ct mark set …``"""
    return _expression("ct", key=_CT[what], sreg=register)


def set_zone(register: int = FIRST) -> Expression:
    """``ct original zone set …``: for a packet that connection tracking has not seen yet."""
    return _expression("ct", key=_CT_ZONE, direction=_ORIGINAL, sreg=register)


def distinct_interface(register: int = FIRST) -> tuple[Expression, Expression]:
    """
    ``iif | 1073741824``: an interface's index with a bit that no index has.

    ``nft`` prints an index that an interface has as that interface's name, and refuses to load a name that no interface
    has (yet); other numbers it prints and reads as numbers.
    """
    bit = native_u32(NO_INTERFACE)
    return meta("iif", register), bitwise(native_u32(NO_INTERFACE ^ 0xFFFFFFFF), bit, register)


def ct_zone(register: int = FIRST) -> Expression:
    """``ct original zone``: two bytes in the order of this machine."""
    return _expression("ct", dreg=register, key=_CT_ZONE, direction=_ORIGINAL)


def ct_address(end: str, direction: int, register: int = FIRST) -> Expression:
    """``ct original ip saddr``, ``ct reply ip daddr`` …; of a connection of IPv4. The direction is 0 or 1 for reply."""
    key = _CT_SOURCE if end == "source" else _CT_DESTINATION
    return _expression("ct", dreg=register, key=key, direction=direction)


def ct_port(end: str, direction: int, register: int = FIRST) -> Expression:
    """``ct original proto-src`` …: a port to ``nft`` only in a rule that has compared the protocol."""
    key = _CT_SOURCE_PORT if end == "source" else _CT_DESTINATION_PORT
    return _expression("ct", dreg=register, key=key, direction=direction)


def add_to_map(name: str, key: int, data: int) -> Expression:
    """``add @NAME { … : … }``: an element that the key has stays as it is, and times out when it would have."""
    return _expression("dynset", set_name=name, op=_ADD_TO_SET, sreg_key=key, sreg_data=data)


def update_map(name: str, key: int, data: int, lives_ms: int) -> Expression:
    """``update @NAME { … timeout … : … }``: likewise, but its time begins anew."""
    return _expression("dynset", set_name=name, op=_UPDATE_SET, sreg_key=key, sreg_data=data, timeout=lives_ms)


def update_set(name: str, key: int, lives_ms: int) -> Expression:
    """``update @NAME { … timeout … }``"""
    return _expression("dynset", set_name=name, op=_UPDATE_SET, sreg_key=key, timeout=lives_ms)


def add_to_set(name: str, key: int) -> Expression:
    """``add @NAME { … }``: matches when the set has room and the element's own expression, if any, matches."""
    return _expression("dynset", set_name=name, op=_ADD_TO_SET, sreg_key=key)


@functools.lru_cache(1024)
def payload(base: int, offset: int, length: int, register: int = FIRST) -> Expression:
    """``ip daddr``, ``th sport``, ``@th,32,16``"""
    return _expression("payload", dreg=register, base=base, offset=offset, len=length)


@functools.lru_cache(64)
def write_address(offset: int, register: int = FIRST) -> Expression:
    """``ip saddr set …``: the header's checksum, and that of TCP, UDP and UDP-Lite, follow."""
    return _expression(
        "payload",
        sreg=register,
        base=NETWORK,
        offset=offset,
        len=4,
        csum_type=1,
        csum_offset=10,
        csum_flags=frozenset({"NFT_PAYLOAD_L4CSUM_PSEUDOHDR"}),
    )


@functools.cache
def copy_address(source: tuple[int, int], target: tuple[int, int]) -> tuple[Expression, ...]:
    """
    ``@th,160,16 set @nh,128,16 @th,176,16 set @nh,144,16``: copy an address, and mend the checksum of the header in
    which it is written, that of the packet or the one that an ICMP error quotes (at transport offset 8).

    The checksum of an ICMP error over both stays right by itself: the two changes cancel. In halves, because ``nft``
    writes no address to a place for which it has no name. It neither prints nor reads that a checksum is to be mended:
    where a saved ruleset is loaded, errors have a wrong one, and are lost, until natd starts.

    :param source: Base, and offset in bytes.
    :param target: The same.
    """
    return tuple(part for half in (0, 2) for part in _copy(source[0], source[1] + half, target[0], target[1] + half))


def _copy(source_base: int, source: int, base: int, offset: int) -> tuple[Expression, Expression]:
    checksum = _CHECKSUM if base == NETWORK else QUOTED + _CHECKSUM
    write = _expression("payload", sreg=FIRST, base=base, offset=offset, len=2, csum_type=1, csum_offset=checksum)
    return payload(source_base, source, 2), write


def compare(data: bytes, comparison: str = "==", register: int = FIRST) -> Expression:
    """``… == DATA``"""
    return _expression("cmp", sreg=register, op=_COMPARISON[comparison], data=data)


def bitwise(mask: bytes, xor: bytes | None = None, register: int = FIRST) -> Expression:
    """``… & MASK ^ XOR``"""
    return _expression(
        "bitwise", sreg=register, dreg=register, len=len(mask), mask=mask, xor=bytes(len(mask)) if xor is None else xor
    )


def set_lookup(name: str, register: int = FIRST, *, negated: bool = False) -> Expression:
    """``… @NAME``, ``… != @NAME``"""
    flags = {"flags": frozenset({"NFT_LOOKUP_F_INV"})} if negated else {}
    return _expression("lookup", set=name, sreg=register, **flags)


@functools.lru_cache(1024)
def map_lookup(name: str, register: int = FIRST, into: int = FIRST) -> Expression:
    """``… map @NAME``; the rule ends here when the map has no such key."""
    return _expression("lookup", set=name, sreg=register, dreg=into)


def verdict_lookup(name: str, register: int = FIRST) -> Expression:
    """``… vmap @NAME``"""
    return _expression("lookup", set=name, sreg=register, dreg=VERDICT_REGISTER)


@functools.lru_cache(1024)
def verdict(code: Verdict) -> Expression:
    """``accept``, ``drop``, ``jump NAME``"""
    return _expression("immediate", dreg=VERDICT_REGISTER, data=code)


def literal(data: bytes, register: int = FIRST) -> Expression:
    """Load constant data."""
    return _expression("immediate", dreg=register, data=data)


def log_to(group: int, prefix: str = "") -> Expression:
    """``log prefix "PREFIX" group GROUP queue-threshold 1``: no verdict, and each packet is reported at once."""
    named: dict[str, Value] = {"prefix": prefix} if prefix else {}
    return _expression("log", **named, group=group, qthreshold=1)


def queue_to(number: int) -> Expression:
    """``queue num NUMBER bypass``: the packet waits for a program's verdict; when no program listens it goes on."""
    return _expression("queue", num=number, total=1, flags=1)


def extension_queue_to(number: int) -> Expression:
    """Likewise by the extension that iptables uses: ``struct xt_NFQ_info_v3``, queue, how many of them, flags."""
    info = struct.pack("=HHH2x", number, 1, 1)
    return _expression("target", name="NFQUEUE", rev=3, info=Opaque(info))


def ct_timeout(name: str) -> Expression:
    """``ct timeout set "NAME"``; only for a connection that is not confirmed yet, and of the object's protocol."""
    return _expression("objref", imm_type=7, imm_name=name)


def refuse(code: int) -> Expression:
    """``reject with icmp …``: drop the packet and answer it with type 3 and this code."""
    return _expression("reject", type=0, icmp_code=code)


def intercept(port: int) -> tuple[Expression, Expression]:
    """``tproxy to :PORT``"""
    load = _expression("immediate", dreg=FIRST, data=port.to_bytes(2, "big"))
    return load, _expression("tproxy", family=2, reg_port=FIRST)


def counter() -> Expression:
    """``counter``"""
    return Expression("counter")


def notrack() -> Expression:
    """``notrack``"""
    return Expression("notrack")


def next_number(modulus: int, register: int = FIRST) -> Expression:
    """``numgen inc mod MODULUS``: 0 and up, then from the beginning; 4 bytes in the order of this machine."""
    values = (("NFTA_NG_DREG", register), ("NFTA_NG_MODULUS", modulus), ("NFTA_NG_TYPE", 0), ("NFTA_NG_OFFSET", 0))
    return Expression("numgen", values)


def destination_kind(register: int = FIRST) -> Expression:
    """``fib daddr type``: the route's type (``RTN_*``), 4 bytes in the order of this machine."""
    return _expression("fib", dreg=register, result=3, flags=2)


def source_kind(register: int = FIRST) -> Expression:
    """``fib saddr type``, as :func:`destination_kind`."""
    return _expression("fib", dreg=register, result=3, flags=1)


def source_is_elsewhere(register: int = FIRST) -> tuple[Expression, Expression]:
    """``fib saddr . iif oif missing``: packets to this source would leave by another interface, or by none."""
    return _has_no_route(_FIB_SOURCE | _FIB_BY_INPUT, register)


def leads_nowhere(register: int = FIRST) -> tuple[Expression, Expression]:
    """``fib daddr oif missing``: no route to the destination, or an unreachable one, or one to the machine itself."""
    return _has_no_route(_FIB_DESTINATION, register)


def _has_no_route(flags: int, register: int) -> tuple[Expression, Expression]:
    load = _expression("fib", dreg=register, result=_FIB_INTERFACE, flags=flags | _FIB_PRESENT)
    return load, compare(bytes(4), register=register)


def source_nat() -> Expression:
    """``snat ip to …`` from registers: address, port, last address, last port, four bytes each."""
    return _expression(
        "nat",
        type=0,
        family=2,
        reg_addr_min=8,
        reg_addr_max=10,
        reg_proto_min=9,
        reg_proto_max=11,
        flags=frozenset({"NF_NAT_RANGE_MAP_IPS", "NF_NAT_RANGE_PROTO_SPECIFIED"}),
    )


def nat_to(end: str) -> Expression:
    """``snat ip to …``, ``dnat ip to …`` an address and a port from registers."""
    return _expression(
        "nat",
        type=0 if end == "source" else 1,
        family=2,
        reg_addr_min=FIRST,
        reg_proto_min=SECOND,
        flags=frozenset({"NF_NAT_RANGE_MAP_IPS", "NF_NAT_RANGE_PROTO_SPECIFIED"}),
    )


def source_nat_to(address: IPv4Address, ports: PortRange | None) -> tuple[Expression, ...]:
    """``snat to ADDRESS:FIRST-LAST``, or without ports; with ports the rule must have compared the protocol."""
    if ports is None:
        return literal(address.packed), _expression("nat", type=0, family=2, reg_addr_min=FIRST)
    ends = (port.to_bytes(2, "big") for port in (ports.first, ports.last))
    load = (literal(data, register) for register, data in enumerate((address.packed, *ends), FIRST))
    return *load, _expression(
        "nat",
        type=0,
        family=2,
        reg_addr_min=FIRST,
        reg_proto_min=FIRST + 1,
        reg_proto_max=FIRST + 2,
        flags=frozenset({"NF_NAT_RANGE_PROTO_SPECIFIED"}),
    )
