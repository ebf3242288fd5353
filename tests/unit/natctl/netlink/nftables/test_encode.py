"""Golden messages, each beside the ``nft`` command that it means."""

from __future__ import annotations

import struct
import sys
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import NLM_F_ACK

from cpm.protocol.model import DomainUUID, PortRange
from natctl.model.entries import HostSettings
from natctl.netlink.message import attribute_map, attribute_payloads
from natctl.netlink.nftables import encode, schema
from natctl.netlink.nftables.elements import packed_element
from natctl.ruleset import expressions as nft
from natctl.ruleset import host_maps, labels, plan
from natctl.ruleset.common import (
    ADDRESS,
    PORT,
    TYPEOF_MARK,
    TYPEOF_ZONE,
    interface_key,
    network_elements,
    port_word,
    rule,
)
from natctl.ruleset.plan import (
    AddChain,
    AddCtTimeout,
    AddElements,
    AddRules,
    AddSet,
    AddTable,
    DeleteChain,
    DeleteElements,
    DeleteTable,
    FlushChain,
    FlushSet,
    Operation,
)
from natctl.ruleset.values import DROP, Chain, CtTimeout, Element, Family, Hook, SetSpec
from tests.fakes.intents import host_entry
from tests.unit.natctl.netlink.nftables.generated import elements

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes below are of a little-endian machine")

IP = Family.IPV4
RANGE = Element(
    bytes((100, 64, 0, 1)) + port_word(2000),
    bytes((100, 64, 0, 1)) + port_word(2063),
    bytes((203, 0, 113, 1)),
    userdata=labels.pack("web"),
)
TABLE = "0e000100 76697274 706f7274 73000000"
OUTBOUND = "0d000200 6f757462 6f756e64 00000000"

GOLDEN: dict[str, tuple[Operation, str]] = {
    "add table ip virtports": (
        AddTable(IP),
        f"24000000 000a0506 00000000 00000000 02000000 {TABLE}",
    ),
    "delete table bridge virtports": (
        DeleteTable(Family.BRIDGE),
        f"24000000 020a0500 00000000 00000000 07000000 {TABLE}",
    ),
    "add chain ip virtports translate { type nat hook postrouting priority 90; policy accept; }": (
        AddChain(IP, Chain("translate", Hook("nat", 4, 90), ())),
        (
            f"58000000 030a0506 00000000 00000000 02000000 {TABLE} 0e000300 7472616e 736c6174 65000000"
            " 14000400 08000100 00000004 08000200 0000005a 08000700 6e617400 08000500 00000001"
        ),
    ),
    "delete chain bridge virtports vm-1": (
        DeleteChain(Family.BRIDGE, "vm-1"),
        f"30000000 050a0500 00000000 00000000 07000000 {TABLE} 09000300 766d2d31 00000000",
    ),
    "flush chain bridge virtports vm-1": (
        FlushChain(Family.BRIDGE, "vm-1"),
        f"30000000 080a0500 00000000 00000000 07000000 {TABLE} 09000200 766d2d31 00000000",
    ),
    "add rule ip virtports send oifname @outside drop": (
        AddRules(IP, Chain("send", None, (rule(nft.meta("oifname"), nft.set_lookup("outside"), DROP),))),
        (
            f"c0000000 060a050c 00000000 00000000 02000000 {TABLE} 09000200 73656e64 00000000 80000480"
            " 24000100 09000100 6d657461 00000000 14000200 08000100 00000001 08000200 00000007"
            " 28000100 0b000100 6c6f6f6b 75700000 18000200 0c000100 6f757473 69646500 08000200 00000001"
            " 30000100 0e000100 696d6d65 64696174 65000000 1c000200 08000100 00000000"
            " 10000200 0c000200 08000100 00000000 0e000700 7e080000 00000000 00000000"
        ),
    ),
    "add map ip virtports outbound { type ipv4_addr . inet_service : ipv4_addr; flags interval; }": (
        AddSet(IP, SetSpec("outbound", (ADDRESS, PORT), data=(ADDRESS,), interval=True)),
        (
            f"a0000000 090a0506 00000000 00000000 02000000 {TABLE} {OUTBOUND} 08000300 0000008c 08000400 000001cd"
            " 08000500 00000008 08000a00 00000001 08000600 00000007 08000700 00000004"
            " 20000900 1c000200 0c000100 08000100 00000004 0c000100 08000100 00000002"
            " 1a000d00 00040200 00000104 02000000 7e080000 00000000 00000000"
        ),
    ),
    "add set ip virtports externals { type ipv4_addr; size 16; }": (
        AddSet(IP, SetSpec("externals", (ADDRESS,), room=16)),
        (
            f"74000000 090a0506 00000000 00000000 02000000 {TABLE} 0e000200 65787465 726e616c 73000000"
            " 08000300 00000000 08000400 00000007 08000500 00000004 08000a00 00000001 0c000900 08000100 00000010"
            " 14000d00 00040200 00007e08 00000000 00000000"
        ),
    ),
    'add element ip virtports outbound { 100.64.0.1 . 2000-2063 comment "web" : 203.0.113.1 }': (
        AddElements((IP, "outbound"), (RANGE,)),
        (
            f"74000000 0c0a0506 00000000 00000000 02000000 {TABLE} {OUTBOUND} 40000380 3c000180"
            " 10000180 0c000100 64400001 07d00000 10000a80 0c000100 64400001 080f0000"
            " 0c000280 08000100 cb007101 0a000600 00047765 62000000"
        ),
    ),
    "delete element ip virtports outbound { 100.64.0.1 . 2000-2063 }": (
        DeleteElements((IP, "outbound"), (RANGE,)),
        (
            f"5c000000 0e0a0500 00000000 00000000 02000000 {TABLE} {OUTBOUND} 28000380 24000180"
            " 10000180 0c000100 64400001 07d00000 10000a80 0c000100 64400001 080f0000"
        ),
    ),
    'add element bridge virtports taps { "vnet0" : goto vm-1 }': (
        AddElements((Family.BRIDGE, "taps"), (Element(interface_key("vnet0"), chain="vm-1"),)),
        (
            f"6c000000 0c0a0506 00000000 00000000 07000000 {TABLE} 09000200 74617073 00000000 3c000380 38000180"
            " 18000180 14000100 766e6574 30000000 00000000 00000000"
            " 1c000280 18000280 08000100 fffffffc 09000200 766d2d31 00000000"
        ),
    ),
    "add ct timeout ip virtports managed-udp { protocol udp; policy = { unreplied : 120, replied : 120 }; }": (
        AddCtTimeout((IP, "managed-udp"), CtTimeout(17, (120, 120))),
        (
            f"64000000 120a0506 00000000 00000000 02000000 {TABLE} 10000200 6d616e61 6765642d 75647000"
            " 08000300 00000007 28000480 06000100 00020000 05000200 11000000"
            " 14000380 08000100 00000078 08000200 00000078"
        ),
    ),
    "flush set ip virtports refused": (
        FlushSet((IP, "refused")),
        f"30000000 0e0a0500 00000000 00000000 02000000 {TABLE} 0c000200 72656675 73656400",
    ),
    (
        "add element ip virtports budgets"
        " { 0x40010000 limit rate over 1/day burst 64 packets limit rate 50/second burst 1 packets }"
    ): (
        AddElements((IP, "budgets"), (Element(bytes.fromhex("00000140"), budget=64),)),
        (
            f"d0000000 0c0a0506 00000000 00000000 02000000 {TABLE} 0c000200 62756467 65747300 a0000380 9c000180"
            " 0c000180 08000100 00000140 8c000b80"
            " 44000180 0a000100 6c696d69 74000000 34000280 0c000100 00000000 00000001 0c000200 00000000 00015180"
            " 08000300 00000040 08000400 00000000 08000500 00000001"
            " 44000180 0a000100 6c696d69 74000000 34000280 0c000100 00000000 00000032 0c000200 00000000 00000001"
            " 08000300 00000001 08000400 00000000 08000500 00000000"
        ),
    ),
    # As nft --debug=mnl shows it, and as iptables-nft sends it.
    "add rule ip virtports newcomers queue num 7414 bypass": (
        AddRules(IP, Chain("newcomers", None, (rule(nft.queue_to(7414)),))),
        (
            f"74000000 060a050c 00000000 00000000 02000000 {TABLE} 0e000200 6e657763 6f6d6572 73000000 30000480"
            " 2c000100 0a000100 71756575 65000000 1c000200 06000100 1cf60000 06000200 00010000 06000300 00010000"
            " 0e000700 7e080000 00000000 00000000"
        ),
    ),
    "-j NFQUEUE --queue-num 7414 --queue-bypass": (
        AddRules(IP, Chain("newcomers", None, (rule(nft.extension_queue_to(7414)),))),
        (
            f"7c000000 060a050c 00000000 00000000 02000000 {TABLE} 0e000200 6e657763 6f6d6572 73000000 38000480"
            " 34000100 0b000100 74617267 65740000 24000200 0c000100 4e465155 45554500 08000200 00000003"
            " 0c000300 f61c0100 01000000 0e000700 7e080000 00000000 00000000"
        ),
    ),
    "add element ip virtports deferred { 0x40010000 limit rate over 1/day burst 192 packets }": (
        AddElements((IP, "deferred"), (Element(bytes.fromhex("00000140"), defer_after=192),)),
        (
            f"8c000000 0c0a0506 00000000 00000000 02000000 {TABLE} 0d000200 64656665 72726564 00000000"
            " 58000380 54000180 0c000180 08000100 00000140 44000780 0a000100 6c696d69 74000000 34000280"
            " 0c000100 00000000 00000001 0c000200 00000000 00015180 08000300 000000c0 08000400 00000000"
            " 08000500 00000001"
        ),
    ),
    "add element ip virtports exempt { 10.0.0.0/8 }": (
        AddElements((IP, "exempt"), network_elements([IPv4Network("10.0.0.0/8")])),
        (
            f"74000000 0c0a0506 00000000 00000000 02000000 {TABLE} 0b000200 6578656d 70740000 44000380"
            " 18000180 0c000180 08000100 00000000 08000300 00000001 10000180 0c000180 08000100 0a000000"
            " 18000180 0c000180 08000100 0b000000 08000300 00000001"
        ),
    ),
}


@pytest.mark.parametrize("command", GOLDEN)
def test_a_message_is_what_nft_would_send(command: str) -> None:
    operation, golden = GOLDEN[command]
    begin, member, end = encode.transaction([operation])
    assert _without_digest(operation, member.data).hex(" ", 4) == golden
    # NFNL_MSG_BATCH_BEGIN and _END, for the subsystem nftables.
    assert begin.data.hex(" ", 4) == "14000000 10000100 00000000 00000000 0000000a"
    assert end.data.hex(" ", 4) == "14000000 11000100 00000000 00000000 0000000a"


def _without_digest(operation: Operation, data: bytes) -> bytes:
    """What we write beside rules and sets changes with their description, and means nothing to the kernel."""
    match operation:
        case AddSet(_, spec):
            return data.replace(spec.digest, bytes(8))
        case AddRules(_, chain):
            return data.replace(chain.rules[0].digest, bytes(8))
    return data


def test_only_the_last_member_asks_for_an_answer() -> None:
    operations: list[Operation] = [AddTable(IP), AddTable(Family.BRIDGE)]
    flags = [struct.unpack_from("=H", member.data, 6)[0] & NLM_F_ACK for member in encode.transaction(operations)]
    assert flags == [0, 0, NLM_F_ACK, 0]


def test_many_elements_take_several_messages_of_which_none_is_too_long() -> None:
    elements = tuple(RANGE._replace(key=number.to_bytes(4, "big") + port_word(1)) for number in range(5000))
    _, *members, _ = encode.transaction([AddElements((IP, "outbound"), elements)])
    assert len(members) > 1
    assert all(len(member.data) < 65536 for member in members)
    lists = [attribute_map(member.data, 20)[3] for member in members]
    assert sum(len(list(attribute_payloads(part))) for part in lists) == 5000


@pytest.mark.parametrize("register", range(1, 5))
@given(st.binary(min_size=1, max_size=16))
def test_a_bitwise_expression_is_packed_as_by_pyroute2(register: int, mask: bytes) -> None:
    expression = nft.bitwise(mask, bytes(byte ^ 0x55 for byte in mask), register)
    by_pyroute2 = encode._attributes(schema.rule_msg, (("NFTA_RULE_EXPRESSIONS", [encode._expression(expression)]),))
    assert encode._packed_expression(expression) == by_pyroute2[4:]


def test_a_second_vm_is_packed_without_pyroute2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes take half a millisecond for one expression, and libvirt waits for each VM that starts."""
    settings = HostSettings(frozenset({"eth1"}))

    def pack(number: int) -> None:
        uuid = DomainUUID(f"00000000-0000-4000-8000-{number:012}")
        internal, ports = IPv4Address(f"100.64.0.{number}"), PortRange(20000 + number, 20063 + number)
        entry = host_entry(uuid, f"web {number}", number, internal, ports, frozenset({100 + number}), 64)
        encode.transaction(plan.alteration([], [host_maps.fragment(settings, entry)]).operations)

    pack(1)
    monkeypatch.delattr(encode, "_attributes")
    pack(2)


@given(elements(st.integers(0, 2**40), st.none() | st.integers(1, 65535)))
def test_an_element_can_be_taken_apart_again(element: Element) -> None:
    (item,) = attribute_payloads(packed_element(element))
    parts = attribute_map(item)
    assert attribute_map(parts[1])[1] == element.key
    assert (attribute_map(parts[10])[1] if 10 in parts else b"") == element.key_end
    assert (attribute_map(parts[2])[1] if 2 in parts else b"") == element.data
    assert parts.get(6, b"") == element.userdata
    assert (3 in parts) == element.interval_end
    assert (11 in parts) == (element.budget is not None)
    assert (7 in parts) == (element.defer_after is not None)
    assert int.from_bytes(parts.get(4, b""), "big") == element.timeout_ms


def test_the_type_of_a_zone_is_described_as_nft_does_it() -> None:
    """``map zones { typeof meta mark : ct original zone; }``, as nft 1.0.6 sends it."""
    by_nft = bytes.fromhex(
        "0004 01000000 0104 01000000 030e 0004 09000000 0106 0004 03000000"
        "0414 0004 0c000000 010c 0004 11000000 0104 00000000".replace(" ", "")
    )
    spec = SetSpec("zones", (TYPEOF_MARK,), data=(TYPEOF_ZONE,))
    (_, message, _) = encode.transaction([AddSet(IP, spec)])
    assert by_nft + labels.pack(digest=spec.digest) in message.data
