"""
What the kernel evaluates of a ruleset for one packet: which expressions, and lookups in which kinds of sets.

Only what packets of TCP meet is known here; anything else is an error, so that no cost goes uncounted.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from natctl.ruleset.values import Element, Family, Ruleset, SetSpec, Verdict

ACCEPTED, DROPPED = "accept", "drop"

_VERDICT_REGISTER: Final = 0
_ALIASES: Final = {1: 8}
"""Register 1 of sixteen bytes begins where register 8 of four bytes is."""
_RETURN, _GOTO, _JUMP, _ACCEPT, _DROP = -5, -4, -3, 1, 0
_META = {3: "mark", 4: "iif", 6: "iifname", 7: "oifname", 8: "iiftype", 16: "l4proto", 19: "pkttype"}
_CT = {0: "state", 1: "direction", 2: "status", 3: "mark"}
_COSTLESS = frozenset({"counter", "notrack", "objref", "dynset", "log"})


def u32(value: int) -> bytes:
    """Return a number as meta and ct keep it."""
    return value.to_bytes(4, sys.byteorder)


@dataclasses.dataclass
class Packet:
    """A TCP packet, and what the kernel knows of it."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    meta: dict[str, bytes] = dataclasses.field(default_factory=dict)
    ct: Mapping[str, bytes] | None = None
    sender: bytes = bytes(6)

    def __post_init__(self) -> None:
        defaults = {"mark": bytes(4), "iiftype": (1).to_bytes(2, sys.byteorder), "l4proto": b"\6", "pkttype": b"\0"}
        self.meta = defaults | self.meta
        self.headers = {
            0: bytearray(bytes(6) + self.sender + b"\x08\0"),
            1: bytearray(bytes((0x45,)) + bytes(8) + b"\6\0\0" + self.source + self.destination),
            2: bytearray(struct.pack(">HH", self.source_port, self.destination_port) + bytes(16)),
        }


@dataclasses.dataclass
class Cost:
    """What was evaluated."""

    chains: int = 0
    """Base chains."""
    rules: int = 0
    expressions: int = 0
    lookups: Counter[str] = dataclasses.field(default_factory=Counter)
    """By kind of set: ``hash``, ``tree`` (intervals of a single field), ``ranges`` (concatenated intervals)."""

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """Base chains, rules, expressions; lookups in hash tables, trees and ranges."""
        found = self.lookups
        return self.chains, self.rules, self.expressions, found["hash"], found["tree"], found["ranges"]


class Evaluation:
    """
    Evaluates chains of one ruleset for packets.

    :param fib: What ``fib`` loads: 4 bytes. The default is that there is a route, and to no address of the machine.
    """

    def __init__(self, rules: Ruleset, fib: bytes = u32(1)) -> None:
        self._rules = rules
        self._route = fib

    def pass_hook(self, packet: Packet, family: Family, hook: int, cost: Cost, kind: str = "filter") -> str:
        """Pass all base chains of a hook, in order. :return: The verdict."""
        chains = [
            chain
            for place, chain in self._rules.chains.items()
            if place[0] is family and chain.hook is not None and (chain.hook.kind, chain.hook.number) == (kind, hook)
        ]
        for chain in sorted(chains, key=lambda chain: chain.hook.priority if chain.hook else 0):
            cost.chains += 1
            if self._chain(packet, family, chain.name, cost) == DROPPED:
                return DROPPED
        return ACCEPTED

    def _chain(self, packet: Packet, family: Family, name: str, cost: Cost) -> str | None:
        for each in self._rules.chains[family, name].rules:
            cost.rules += 1
            verdict = self._rule(packet, family, each.expressions, cost)
            if verdict is None:
                continue
            if verdict.code in {_ACCEPT, _DROP}:
                return ACCEPTED if verdict.code == _ACCEPT else DROPPED
            if verdict.code == _RETURN:
                return None
            ended = self._chain(packet, family, verdict.chain, cost)
            if ended is not None or verdict.code == _GOTO:
                return ended
        return None

    def _rule(self, packet: Packet, family: Family, expressions: Iterable[Any], cost: Cost) -> Verdict | None:
        registers: dict[int, Any] = {}
        for kind, attributes in expressions:
            cost.expressions += 1
            prefix = f"NFTA_{kind.upper()}_"
            values = {key.removeprefix(prefix): value for key, value in attributes}
            for key in values.keys() & {"SREG", "DREG"}:
                values[key] = _ALIASES.get(values[key], values[key])
            if kind in _COSTLESS:
                continue
            if not getattr(self, f"_{kind}")(packet, registers, values, family, cost):
                return None
            if (verdict := registers.get(_VERDICT_REGISTER)) is not None:
                assert isinstance(verdict, Verdict)
                return verdict
        return None

    def _meta(self, packet: Packet, registers: dict[int, Any], values: Any, *_: Any) -> bool:
        name = _META[values["KEY"]]
        if "SREG" in values:
            packet.meta[name] = registers[values["SREG"]]
        elif name not in packet.meta:
            return False
        else:
            registers[values["DREG"]] = packet.meta[name]
        return True

    def _ct(self, packet: Packet, registers: dict[int, Any], values: Any, *_: Any) -> bool:
        if "SREG" in values:
            return True
        if packet.ct is None:
            return False
        registers[values["DREG"]] = packet.ct[_CT[values["KEY"]]]
        return True

    def _payload(self, packet: Packet, registers: dict[int, Any], values: Any, *_: Any) -> bool:
        header, at = packet.headers[values["BASE"]], values["OFFSET"]
        if "SREG" in values:
            header[at : at + values["LEN"]] = registers[values["SREG"]][: values["LEN"]]
        else:
            registers[values["DREG"]] = bytes(header[at : at + values["LEN"]])
        return True

    def _bitwise(self, _: Packet, registers: dict[int, Any], values: Any, *__: Any) -> bool:
        held, mask, xor = registers[values["SREG"]], values["MASK"], values["XOR"]
        registers[values["DREG"]] = bytes((a & b) ^ c for a, b, c in zip(held, mask, xor, strict=True))
        return True

    def _cmp(self, _: Packet, registers: dict[int, Any], values: Any, *__: Any) -> bool:
        held, data = registers[values["SREG"]][: len(values["DATA"])], values["DATA"]
        return bool({0: held == data, 1: held != data, 3: held <= data, 5: held >= data}[values["OP"]])

    def _fib(self, _: Packet, registers: dict[int, Any], values: Any, *__: Any) -> bool:
        registers[values["DREG"]] = self._route
        return True

    def _nat(self, _: Packet, registers: dict[int, Any], *__: Any) -> bool:
        registers[_VERDICT_REGISTER] = Verdict(_ACCEPT)
        return True

    def _immediate(self, _: Packet, registers: dict[int, Any], values: Any, *__: Any) -> bool:
        registers[values["DREG"]] = values["DATA"]
        return True

    def _lookup(self, _: Packet, registers: dict[int, Any], values: Any, family: Family, cost: Cost) -> bool:
        spec = self._rules.sets[family, values["SET"]]
        cost.lookups["hash" if not spec.interval else "ranges" if len(spec.key) > 1 else "tree"] += 1
        parts = [registers[values["SREG"] + slot] for slot in range(len(spec.key))]
        found = _find(spec, self._rules.elements.get((family, spec.name), {}).values(), parts)
        if "FLAGS" in values:
            return found is None
        if found is None:
            return False
        if "DREG" in values:
            registers[values["DREG"]] = Verdict(_GOTO, found.chain) if spec.verdicts else found.data
        return True


def _find(spec: SetSpec, elements: Iterable[Element], parts: list[Any]) -> Element | None:
    key = b"".join(part.ljust(-(-len(part) // 4) * 4, b"\0") if len(parts) > 1 else part for part in parts)
    if not spec.interval:
        held = (each for each in elements if each.key == key and each.limit is None and each.budget is None)
        return next(held, None)
    if len(parts) == 1:
        below = max(
            (each for each in elements if each.key <= key),
            key=lambda each: (each.key, not each.interval_end),
            default=None,
        )
        return None if below is None or below.interval_end else below
    inside = (
        all(each.key[at : at + 4] <= key[at : at + 4] <= each.key_end[at : at + 4] for at in range(0, len(key), 4))
        for each in elements
    )
    return next((each for each, matches in zip(elements, inside, strict=True) if matches), None)
