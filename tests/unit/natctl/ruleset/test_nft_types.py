"""
Every rule is one that ``nft`` prints and reads: it looks up in each set only what is of the set's type to ``nft``.

What is not known to be readable is refused here. ``tests/netns/test_round_trip.py`` asks ``nft`` itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from cpm.protocol.model import DomainUUID, PortRange
from natctl import ruleset
from natctl.model.entries import EdgeSettings, HostSettings, Path, Queueing, Settings
from natctl.ruleset import edge_maps, host_maps, senders
from natctl.ruleset import expressions as nft
from natctl.ruleset.common import ADDRESS, HARDWARE, INTERFACE, INTERFACE_INDEX, MARK, PORT, PROTOCOL, protocol, rule
from natctl.ruleset.values import Expression, Rule, Ruleset, SetSpec, with_fragments
from tests.fakes.intents import edge_intent, host_entry

NUMBER = 4
"""The type of what has no name."""
HOST, EDGE = HostSettings(frozenset({"eth1"})), EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"}))
EXTERNALS = frozenset({IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")})
PATH = Path(IPv4Network("100.64.0.0/10"), externals=EXTERNALS)
VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OWN = {IPv4Address("203.0.113.1"): PortRange(32768, 60999)}
SETTINGS = (
    Settings(HOST),
    Settings(edge=EDGE),
    Settings(HOST, EDGE),
    Settings(HOST, EDGE, shares_pool=True),
    Settings(dataclasses.replace(HOST, queueing=Queueing.NONE)),
    Settings(edge=EDGE, own_targets=OWN, own_picked=tuple(OWN.values()), own_primary=dict.fromkeys(("eth1",), *OWN)),
    Settings(HOST, EDGE, own_targets=OWN, own_picked=(PortRange(1024, 65535),)),
)
META = {3: MARK.number, 4: INTERFACE_INDEX.number, 6: INTERFACE.number, 7: INTERFACE.number, 16: PROTOCOL.number}
META |= {8: NUMBER, 19: NUMBER}  # the kind of an interface, and of a packet: only compared
PLAIN = frozenset(
    {"cmp", "counter", "fib", "immediate", "limit", "log", "notrack", "objref", "queue", "reject", "tproxy"}
)
SLOTS = {1: 0, 8: 0, 9: 1, 10: 2, 11: 3, 2: 4, 13: 5}


class Unreadable(AssertionError):
    """``nft`` cannot print this, or not read what it prints."""


def _payload_type(base: int, offset: int, length: int) -> int:
    if (base, length) == (nft.NETWORK, 4) and offset in {nft.SOURCE, nft.DESTINATION}:
        return ADDRESS.number
    if (base, length) == (nft.TRANSPORT, 2) and offset in {0, 2}:
        return PORT.number
    if (base, length) == (nft.LINK, 6) and offset in {nft.LINK_SOURCE, nft.LINK_DESTINATION}:
        return HARDWARE.number
    return NUMBER


class Reader:
    """Goes through one rule as ``nft`` does; what each register holds is a type, and whether it is masked."""

    def __init__(self, sets: dict[str, SetSpec]) -> None:
        self._sets = sets
        self._held: dict[int, tuple[int, bool]] = {}
        self._protocol: int | None = None

    def read(self, each: Rule) -> None:
        for number, expression in enumerate(each.expressions):
            before = each.expressions[number - 1] if number else None
            self._step(expression, dict(expression.attributes), before)

    def _step(self, expression: Expression, values: dict[str, object], before: Expression | None) -> None:
        match expression.kind:
            case "meta" | "ct" if any(name.endswith("_SREG") for name in values):
                pass
            case "meta":
                self._load(values["NFTA_META_DREG"], META[self._int(values, "NFTA_META_KEY")])
            case "ct":
                self._load(values["NFTA_CT_DREG"], self._ct_type(self._int(values, "NFTA_CT_KEY")))
            case "payload":
                self._payload(values)
            case "numgen":
                self._load(values["NFTA_NG_DREG"], NUMBER)
            case "bitwise":
                slot = self._slot(values["NFTA_BITWISE_SREG"])
                self._held[slot] = (self._held[slot][0], True)
            case "lookup":
                self._lookup(values)
            case "dynset":
                spec = self._sets[str(values["NFTA_DYNSET_SET_NAME"])]
                self._check(spec)
                if (slot := self._slot(values.get("NFTA_DYNSET_SREG_DATA", nft.FIFTH))) == 4:
                    data = [self._held.get(slot + at, (None, False))[0] for at in range(len(spec.data))]
                    assert data == [field.number for field in spec.data], f"{spec.name}: the data are {data}"
            case "nat":
                if self._protocol is None and "NFTA_NAT_REG_PROTO_MIN" in values:
                    raise Unreadable("snat with ports wants a match of one protocol")
            case kind if kind not in PLAIN:
                raise Unreadable(f"{kind}: not known to be readable")
        if expression.kind == "cmp" and before is not None and before == nft.meta("l4proto"):
            self._protocol = bytes(values["NFTA_CMP_DATA"])[0]  # type: ignore[call-overload]

    def _ct_type(self, key: int) -> int:
        if key in {11, 12} and self._protocol not in {6, 17}:
            raise Unreadable("a connection's port is none to nft, unless the rule says of which protocol")
        return {11: PORT.number, 12: PORT.number, 19: ADDRESS.number, 20: ADDRESS.number}.get(key, NUMBER)

    def _payload(self, values: dict[str, object]) -> None:
        base, offset, length = (self._int(values, f"NFTA_PAYLOAD_{name}") for name in ("BASE", "OFFSET", "LEN"))
        found = _payload_type(base, offset, length)
        if base == nft.TRANSPORT and self._protocol == 1:
            raise Unreadable("nft names what it can in a packet that a rule says is ICMP")
        if "NFTA_PAYLOAD_DREG" in values:
            self._load(values["NFTA_PAYLOAD_DREG"], found)
        elif (found == NUMBER and length > 2) or self._held[0][0] != found:
            raise Unreadable("written is a number of at most 16 bits, or the type of the place")

    def _lookup(self, values: dict[str, object]) -> None:
        spec = self._sets[str(values["NFTA_LOOKUP_SET"])]
        self._check(spec)
        if (spec.data or spec.verdicts) and "NFTA_LOOKUP_DREG" not in values:
            raise Unreadable("kernels before 6.7 or so refuse to look up in a map as in a set")
        self._held = {0: (spec.data[0].number, False)} if spec.data else {}

    def _check(self, spec: SetSpec) -> None:
        key = [self._held.get(slot, (None, False))[0] for slot in range(len(spec.key))]
        if key != [field.number for field in spec.key]:
            raise Unreadable(f"{spec.name}: the key is {key} to nft")
        if any(self._held[slot][1] for slot in range(1, len(spec.key))):
            raise Unreadable("only the first part of a key may have a mask")
        if key == [INTERFACE_INDEX.number] and not self._held[0][1]:
            raise Unreadable("nft prints an interface's name and does not load one that is not there")

    def _load(self, register: object, kind: int) -> None:
        self._held[self._slot(register)] = (kind, False)

    @staticmethod
    def _slot(register: object) -> int:
        assert isinstance(register, int)
        return SLOTS[register]

    @staticmethod
    def _int(values: dict[str, object], name: str) -> int:
        value = values[name]
        assert isinstance(value, int)
        return value


def every_ruleset() -> Iterator[tuple[Settings, Ruleset]]:
    """Yield the ruleset of each role, with one VM that uses every optional setting."""
    entry = host_entry(VM, "web", 1, IPv4Address("100.64.0.1"), PortRange(1024, 1087), frozenset({7}), 1, at_cap=True)
    ranges = ((IPv4Address("203.0.113.1"), PortRange(1024, 1087)),)
    for settings in SETTINGS:
        for shards in (1, 4):
            layout = edge_maps.Layout(shards, EXTERNALS, settings.own_targets)
            parts = [host_maps.fragment(settings.host, entry)] if settings.host is not None else []
            if settings.edge is not None:
                parts.append(edge_maps.fragment(edge_intent(VM, "web", entry.intent.internal, None, ranges), layout))
                parts.append(senders.host_fragment(IPv4Address("172.30.0.21"), [bytes(6)]))
            yield settings, with_fragments(ruleset.base(settings, PATH, layout), parts)


def test_every_rule_can_be_read() -> None:
    for _, made in every_ruleset():
        for (family, _), chain in made.chains.items():
            sets = {name: spec for (where, name), spec in made.sets.items() if where == family}
            for each in chain.rules:
                Reader(sets).read(each)


def test_ct_timeouts_are_of_protocols_that_nft_reads() -> None:
    for _, made in every_ruleset():
        assert {timeout.protocol for timeout in made.ct_timeouts.values()} <= {6, 17}


PORTS, NUMBERS, TAPS = (
    SetSpec("p", (PORT,)),
    SetSpec("n", (PORT._replace(number=NUMBER),)),
    SetSpec("t", (INTERFACE_INDEX,)),
)
A_MAP = SetSpec("m", (ADDRESS,), data=(PORT,))
PAIR = SetSpec("c", (ADDRESS, PORT._replace(number=NUMBER)))
ICMP_ID = nft.payload(nft.TRANSPORT, 4, 2)


@pytest.mark.parametrize("unreadable", [
    rule(ICMP_ID, nft.set_lookup("p")),
    rule(nft.payload(nft.TRANSPORT, 2, 2), nft.set_lookup("n")),
    rule(protocol(1), ICMP_ID, nft.set_lookup("n")),
    rule(nft.meta("iif"), nft.set_lookup("t")),
    rule(nft.payload(1, 12, 4), nft.payload(2, 4, 2, nft.SECOND), nft.bitwise(b"\xff\0", None, nft.SECOND),
         nft.set_lookup("c")),
    rule(nft.source_nat()),
    rule(nft.ct_port("source", 0)),
    rule(nft.payload(1, 12, 4), nft.set_lookup("m")),
    rule(nft.extension_queue_to(1)),
    rule(nft.payload(1, 12, 4), nft.write_address(20)),
    rule(Expression("socket")),
])  # fmt: skip
def test_what_nft_cannot_read_is_refused(unreadable: Rule) -> None:
    sets = {spec.name: spec for spec in (PORTS, NUMBERS, TAPS, PAIR, A_MAP)}
    with pytest.raises(Unreadable):
        Reader(sets).read(unreadable)
