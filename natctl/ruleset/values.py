"""
Tables, chains, rules, sets and elements of nftables as values; and what a kernel holds of them.

Names of expressions and their attributes are the kernel's own (``include/uapi/linux/netfilter/nf_tables.h``), so that
the values can be read beside its source. How they are encoded is the business of :mod:`natctl.netlink.nftables`.

Tested in ``tests/unit/natctl/ruleset/test_plan.py``.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

TABLE = "virtports"
"""Name of our one table in each family. Nothing outside tables of this name is ever touched."""

VM_CHAIN = "vm-"
"""Prefix of the chains that belong to one VM; they come and go without the rest of the table."""

HOST_CHAIN = "host-"
"""Prefix of the chains that belong to one host each, at an edge; they come and go likewise."""

CT_TIMEOUTS = "managed-"
"""Prefix of our ``ct timeout`` objects; one that no rule names any more stays for the connections that use it."""


class Family(enum.IntEnum):
    """The two protocol families that we have a table in."""

    IPV4 = 2
    BRIDGE = 7

    # It is in the key of every set and chain, and an enumeration's own hash is computed in Python each time.
    __hash__ = int.__hash__

    def __str__(self) -> str:
        return "ip" if self is Family.IPV4 else "bridge"


class Verdict(NamedTuple):
    """A verdict: ``NF_*`` or ``NFT_*`` code, and a chain for jump and goto."""

    code: int
    chain: str = ""


ACCEPT = Verdict(1)
DROP = Verdict(0)
RETURN = Verdict(-5)


def jump(chain: str) -> Verdict:
    """Go through that chain and come back."""
    return Verdict(-3, chain)


def goto(chain: str) -> Verdict:
    """Go through that chain and do not come back."""
    return Verdict(-4, chain)


class Opaque(NamedTuple):
    """The bytes of a kernel structure, sent unchanged."""

    data: bytes


Value = int | str | bytes | frozenset[str] | Verdict | Opaque


class Expression(NamedTuple):
    """One expression of a rule; bytes are literal data, a set of names are flags."""

    kind: str
    attributes: tuple[tuple[str, Value], ...] = ()


class Rule(NamedTuple):
    """
    One rule.

    The digest is kept with the rule in the kernel, so that a rule that somebody replaced, or that an older version of
    natd made, is recognized without reading expressions back.
    """

    expressions: tuple[Expression, ...]
    comment: str = ""
    tag: str = ""
    """The subject of the rule or of its counter, for natd only; not shown by ``nft``."""

    @property
    def digest(self) -> bytes:
        """Eight bytes that change with anything in the rule."""
        return _digest_of_rule(self)


class Hook(NamedTuple):
    """Where a base chain is called from."""

    kind: str
    number: int
    priority: int


class Chain(NamedTuple):
    """A chain with its rules, in order; without a hook it is only jumped to."""

    name: str
    hook: Hook | None
    rules: tuple[Rule, ...]

    @property
    def signature(self) -> ChainSignature:
        """The parts of it that can be read back from the kernel."""
        return ChainSignature(self.hook, tuple(rule.digest for rule in self.rules))


class ChainSignature(NamedTuple):
    """A chain as the kernel shows it: an unknown rule has the empty digest."""

    hook: Hook | None
    rules: tuple[bytes, ...]


class Field(NamedTuple):
    """A data type of nftables: number in ``nft describe``'s list, length in bytes, and whether it is in host order."""

    number: int
    length: int
    host_order: bool = False
    expression: bytes = b""
    """
    For ``typeof``: the expression that has this type, as ``nft`` describes it in a set's user data. Of a key, all
    fields have one or none.
    """


class Limit(NamedTuple):
    """In an element: what passes before it matches."""

    rate: int
    """Packets in ``per_s`` seconds."""
    per_s: int
    burst: int
    """Packets at once, 1 and up."""
    most: int | None = None
    """After that also so many connections, counted by the kernel (``ct count``); None: matches are counted instead."""


class SetSpec(NamedTuple):
    """A set, or with data a map; several key fields make a concatenation."""

    name: str
    key: tuple[Field, ...]
    data: tuple[Field, ...] = ()
    verdicts: bool = False
    """The data are verdicts."""
    interval: bool = False
    data_interval: bool = False
    """The data are a pair of ends."""
    counter: bool = False
    """Every element counts."""
    budgets: bool = False
    """Every element lets some packets pass before it matches, see :attr:`Element.budget`."""
    deferring: bool = False
    """Every element lets some packets pass before it matches all that follow."""
    limiting: Limit | None = None
    """Every element has a limit of this kind; the numbers do not matter."""
    expiring: bool = False
    """Elements time out, see :data:`EXPIRING`."""
    learning_s: int = 0
    """Rules add elements, which time out after so many seconds; 0: they do not."""
    room: int = 0
    """Elements it holds at most; 0: any number. With a limit the kernel makes the quickest kind of hash table."""
    per_s: int = 0
    """Every element matches so many packets a second at most; 0: any number."""

    @property
    def digest(self) -> bytes:
        """Eight bytes that change with anything in the specification."""
        return _digest(_plain(self))


class Element(NamedTuple):
    """One element, key and data padded as the kernel keeps them."""

    key: bytes
    key_end: bytes = b""
    data: bytes = b""
    chain: str = ""
    """Where a verdict map sends the packet (goto)."""
    userdata: bytes = b""
    interval_end: bool = False
    """In a set of plain intervals: the first key after the interval."""
    budget: int | None = None
    """In a set with budgets: packets that pass before it matches, and then only so often (:data:`ANNOUNCED_PER_S`)."""
    timeout_ms: int = 0
    """In a set whose elements time out: after how long; 0: never."""
    defer_after: int | None = None
    """In a set that defers: packets that pass before it matches, 1 and up."""
    limit: Limit | None = None
    """In a set that limits."""

    @property
    def identity(self) -> tuple[bytes, bool]:
        """Key and kind of end, by which the kernel tells elements of a set apart."""
        return self.key, self.interval_end


class CtTimeout(NamedTuple):
    """A ``ct timeout`` object: the seconds for each state of the connections of one protocol."""

    protocol: int
    """IP protocol number."""
    seconds: tuple[int, ...]
    """In the order of the kernel's ``enum ctattr_timeout_tcp`` and its like."""


Place = tuple[Family, str]
"""Names a chain, a set or an object."""

EXPIRING: frozenset[Place] = frozenset(
    (Family.IPV4, name)
    for name in ("refused", "refused-queries", "origins", "older", "following", "open-ports", "mappings", "sockets")
)
"""Sets whose elements time out: they are not compared and not restored."""

ANNOUNCED_PER_S = 50
"""Packets a second that an element with a budget matches at most once its budget is used up."""

Elements = Mapping[tuple[bytes, bool], Element]


@dataclasses.dataclass(frozen=True, slots=True)
class Ruleset:
    """What our tables should hold. A family without chains and sets has no table."""

    chains: Mapping[Place, Chain]
    sets: Mapping[Place, SetSpec]
    elements: Mapping[Place, Elements]
    ct_timeouts: Mapping[Place, CtTimeout] = dataclasses.field(default_factory=dict)

    @property
    def holdings(self) -> Holdings:
        """The same as the kernel would show it once applied."""
        return Holdings(
            frozenset(family for family, _ in (*self.chains, *self.sets)),
            {place: chain.signature for place, chain in self.chains.items()},
            {place: spec.digest for place, spec in self.sets.items()},
            self.elements,
            self.ct_timeouts,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Holdings:
    """What our tables hold in the kernel."""

    tables: frozenset[Family] = frozenset()
    chains: Mapping[Place, ChainSignature] = dataclasses.field(default_factory=dict)
    sets: Mapping[Place, bytes] = dataclasses.field(default_factory=dict)
    elements: Mapping[Place, Elements] = dataclasses.field(default_factory=dict)
    ct_timeouts: Mapping[Place, CtTimeout | None] = dataclasses.field(default_factory=dict)
    """None: an object of another kind, not ours."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """One reading of our tables: what they hold, and what they have counted."""

    holdings: Holdings
    generation: int
    """Changes with every transaction of anybody; the same number means that nothing at all was changed."""
    vm_rules: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """User data of the first rule of each VM's chain."""
    drops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Packets by the tag of the rule that counted them."""
    counted: Mapping[Place, Mapping[bytes, int]] = dataclasses.field(default_factory=dict)
    """Packets by set and key, where elements count."""


class Fragment(NamedTuple):
    """The part of the ruleset that belongs to one VM in one role."""

    chains: tuple[tuple[Place, Chain], ...] = ()
    elements: tuple[tuple[Place, Element], ...] = ()


def by_identity(elements: Iterable[Element]) -> dict[tuple[bytes, bool], Element]:
    """Return the elements by key and kind of end, see :attr:`Element.identity`."""
    return {element.identity: element for element in elements}


def with_fragments(base: Ruleset, fragments: Iterable[Fragment]) -> Ruleset:
    """Return the ruleset with the VMs' parts added; of two parts with the same element the later one counts."""
    chains = dict(base.chains)
    elements = {place: dict(held) for place, held in base.elements.items()}
    for fragment in fragments:
        chains.update(fragment.chains)
        for place, element in fragment.elements:
            elements[place][element.key, element.interval_end] = element
    return Ruleset(chains, base.sets, elements, base.ct_timeouts)


@functools.lru_cache(4096)
def _digest_of_rule(rule: Rule) -> bytes:
    return _digest(_plain(rule))


def _digest(plain: object) -> bytes:
    return hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()


def _plain(value: object) -> object:
    # repr() of a set depends on the process's hash seed; everything else here prints the same for ever.
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return tuple(_walk(value))
    return value


def _walk(values: tuple[object, ...]) -> Iterator[object]:
    for value in values:
        yield _plain(value)
