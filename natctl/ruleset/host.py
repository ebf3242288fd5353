"""
The host role: whose packet it is, and which ports it may use.

In nftables' notation::

    table bridge virtports {
      map taps { type ifname : verdict; elements = { "vnet0" comment "web 1" : goto vm-1 } }
      chain identify { type filter hook prerouting priority -300; iifname vmap @taps }
      chain vm-1 { meta mark set meta mark & ~MASK | (FLAG | 1) }
    }
    table ip virtports {
      map bindings { type mark : interval ipv4_addr . inet_service; counter; }
      chain exemption { type filter hook prerouting priority mangle;
        ct mark & FLAG == FLAG return
        meta mark & FLAG == FLAG ip daddr @exempt meta mark set meta mark & ~MASK
        meta mark & FLAG == FLAG ct state established,related ct mark & FLAG == 0 meta mark set meta mark & ~MASK }
      chain translate { type nat hook postrouting priority srcnat - 10;
        oifname @uplinks snat ip to meta mark & MASK map @bindings }
      chain guard { type filter hook postrouting priority 200;
        meta mark & FLAG == FLAG ct state new oifname @uplinks ct mark set ct mark | FLAG
        meta mark & FLAG == FLAG ct status snat ip saddr @internals return
        meta mark & FLAG == FLAG oifname @uplinks counter drop }
      chain errors { type route hook output priority mangle;
        meta l4proto icmp ct state related ct mark & FLAG == FLAG meta mark set meta mark | FLAG }
    }

- One chain a VM: merging a value into some bits of a mark takes constants on kernels before 6.13, and other bits belong
  to others.
- The identity is the tap; nothing in the packet is believed.
- Connections that were there before we cared for the VM go on the way they went (last rule of ``exemption``): they
  lack our bit in the connection mark, which ``guard`` gives every connection of ours. An entry that is made in
  connection tracking for a VM that moved here must carry that bit.
- ``guard`` runs after source NAT and before an edge on the same machine rewrites addresses (300): a packet of a VM
  that was not translated is never let out, whatever source address it claims, so no private address leaks and no port
  that is not the VM's is used: not even by a guest that forges another VM's internal address, nor under this host's own
  address by somebody else's masquerade when the VM has no ports.
- What this host itself has to say about a packet for a VM (too large, no such guest) goes the VM's way, not its own:
  only the edges can make it fit to be seen outside (``errors``).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from cpm.model import DomainUUID, PortRange
from natctl.desired import HostEntry, HostSettings, Path
from natctl.ruleset import labels
from natctl.ruleset.common import (
    ADDRESS,
    INTERFACE,
    INTERNALS,
    MARK,
    OUTPUT,
    PORT,
    POSTROUTING,
    PREROUTING,
    address_in,
    described,
    filtering,
    interface_elements,
    interface_key,
    interfaces,
    network_elements,
    networks,
    port_word,
    protocol,
    rule,
    to_interface,
)
from natctl.ruleset.expressions import (
    DESTINATION,
    SOURCE,
    compare,
    counter,
    ct,
    mapped,
    masked,
    meta,
    set_ct,
    set_meta,
    source_nat,
    verdict_of,
    word,
)
from natctl.ruleset.values import (
    DROP,
    RETURN,
    VM_CHAIN,
    Chain,
    Element,
    Expression,
    Family,
    Fragment,
    Hook,
    Place,
    Rule,
    Ruleset,
    SetSpec,
    indexed,
)

TAPS: Final[Place] = (Family.BRIDGE, "taps")
BINDINGS: Final[Place] = (Family.IPV4, "bindings")
UPLINKS: Final[Place] = (Family.IPV4, "uplinks")
EXEMPT: Final[Place] = (Family.IPV4, "exempt")

UNTRANSLATED: Final = "untranslated"
"""Name of the counter of packets that were managed but not translated, and dropped."""

_ICMP = 1
_RELATED = word(4)
_ESTABLISHED_OR_RELATED = word(2 | 4)
_NEW = word(8)
_SOURCE_TRANSLATED = word(0x10)
"""``ct status snat``: IPS_SRC_NAT."""


class Marks(NamedTuple):
    """
    How a packet mark says whose the packet is: the highest bit of the mask says that somebody's, the others whose.

    :raise ValueError: By :meth:`of_mask`, when the bits are not contiguous or fewer than 4.
    """

    mask: int
    flag: int
    shift: int

    @classmethod
    def of_mask(cls, mask: int) -> Marks:
        """Read the settings' mask."""
        shift = max(0, (mask & -mask).bit_length() - 1)
        bits = (mask >> shift).bit_length()
        if not 0 < mask <= 0xFFFFFFFF or mask >> shift != (1 << bits) - 1 or bits < 4:
            raise ValueError(f"not a mark mask: {mask:#x}; use at least 4 bits side by side, for example 0x7fff0000")
        return cls(mask, 1 << (shift + bits - 1), shift)

    @property
    def highest_index(self) -> int:
        """The largest index that fits."""
        return (self.mask ^ self.flag) >> self.shift

    def of(self, index: int) -> int:
        """
        Return the mark, within the mask, of the VM with that index.

        :raise ValueError: When the index does not fit.
        """
        if not 1 <= index <= self.highest_index:
            raise ValueError(f"index {index} does not fit the mark mask {self.mask:#x}; widen host.mark_mask")
        return self.flag | index << self.shift

    def index_in(self, mark: int) -> int:
        """Return the index that the mark carries."""
        return (mark & self.mask ^ self.flag) >> self.shift


def base(settings: HostSettings, path: Path | None) -> Ruleset:
    """Return tables, chains and sets of the host role, without any VM."""
    marks = Marks.of_mask(settings.mark_mask)
    chains = {
        (Family.BRIDGE, "identify"): _identify(),
        (Family.IPV4, "exemption"): _exemption(marks),
        (Family.IPV4, "translate"): _translate(marks),
        (Family.IPV4, "guard"): _guard(marks),
        (Family.IPV4, "errors"): _errors(marks),
    }
    sets = {
        TAPS: SetSpec("taps", (INTERFACE,), verdicts=True),
        BINDINGS: SetSpec("bindings", (MARK,), data=(ADDRESS, PORT), data_interval=True, counter=True),
        UPLINKS: interfaces("uplinks"),
        EXEMPT: networks("exempt"),
        INTERNALS: networks("internals"),
    }
    elements = {
        TAPS: {},
        BINDINGS: {},
        UPLINKS: indexed(interface_elements(settings.uplinks)),
        EXEMPT: indexed(network_elements(settings.exempt)),
        INTERNALS: indexed(network_elements([path.internal_pool] if path else [])),
    }
    return Ruleset(chains, sets, elements)


def fragment(settings: HostSettings, entry: HostEntry) -> Fragment:
    """
    Return what one VM adds.

    :raise ValueError: When its index does not fit the mark mask.
    """
    mark = Marks.of_mask(settings.mark_mask).of(entry.index)
    chain = _vm_chain(settings, entry, mark)
    label = described(entry.name, entry.domain)
    elements: list[tuple[Place, Element]] = [
        (TAPS, Element(interface_key(tap), chain=chain.name, userdata=label)) for tap in sorted(entry.taps)
    ]
    if entry.ports is not None:
        data = (
            entry.internal.packed + port_word(entry.ports.first) + entry.internal.packed + port_word(entry.ports.last)
        )
        elements.append((BINDINGS, Element(word(mark), data=data, userdata=label)))
    return Fragment((((Family.BRIDGE, chain.name), chain),), tuple(elements))


class Identity(NamedTuple):
    """What the chain of a VM says about it."""

    domain: DomainUUID
    name: str
    internal: IPv4Address


def identity(userdata: bytes) -> Identity | None:
    """Read the user data of the rule in a VM's chain; None when it is not ours."""
    domain, _, internal = labels.tag_of(userdata).partition(" ")
    try:
        return Identity(DomainUUID(domain), labels.comment_of(userdata), IPv4Address(internal))
    except ValueError:
        return None


def entry_of(index: int, who: Identity, taps: Iterable[str], binding: Element | None) -> HostEntry:
    """Return the entry whose fragment was found in the kernel."""
    ports = None
    internal = who.internal
    if binding is not None:
        internal = IPv4Address(binding.data[:4])
        ports = PortRange(int.from_bytes(binding.data[4:6], "big"), int.from_bytes(binding.data[12:14], "big"))
    return HostEntry(who.domain, who.name, index, internal, ports, frozenset(taps))


def _identify() -> Chain:
    return Chain("identify", Hook("filter", PREROUTING, -300), (rule(meta("iifname"), verdict_of("taps")),))


def _vm_chain(settings: HostSettings, entry: HostEntry, mark: int) -> Chain:
    merge = masked(word(settings.mark_mask ^ 0xFFFFFFFF), word(mark))
    marking = Rule((meta("mark"), merge, set_meta("mark")), entry.name, f"{entry.domain} {entry.internal}")
    return Chain(f"{VM_CHAIN}{entry.index}", None, (marking,))


def _is_managed(marks: Marks) -> tuple[Expression, ...]:
    flag = word(marks.flag)
    return meta("mark"), masked(flag), compare(flag)


def _exemption(marks: Marks) -> Chain:
    forget = (meta("mark"), masked(word(marks.mask ^ 0xFFFFFFFF)), set_meta("mark"))
    is_older = (ct("state"), masked(_ESTABLISHED_OR_RELATED), compare(bytes(4), "!="))
    is_not_ours = (ct("mark"), masked(word(marks.flag)), compare(bytes(4)))
    is_ours = (ct("mark"), masked(word(marks.flag)), compare(word(marks.flag)))
    rules = (
        rule(is_ours, RETURN, comment="decided when it began"),
        rule(
            _is_managed(marks), address_in(DESTINATION, "exempt"), forget, comment="not translated, not sent to edges"
        ),
        rule(_is_managed(marks), is_older, is_not_ours, forget, comment="older than our care: goes on as it went"),
    )
    return Chain("exemption", filtering(PREROUTING, -150), rules)


def _translate(marks: Marks) -> Chain:
    whose = (meta("mark"), masked(word(marks.mask)), mapped("bindings"))
    translating = rule(to_interface("uplinks"), whose, source_nat(), comment="a port of the VM's own range")
    return Chain("translate", Hook("nat", POSTROUTING, 90), (translating,))


def _guard(marks: Marks) -> Chain:
    flag = word(marks.flag)
    managed, leaves = _is_managed(marks), to_interface("uplinks")
    is_new = (ct("state"), masked(_NEW), compare(bytes(4), "!="))
    remember = (ct("mark"), masked(word(marks.flag ^ 0xFFFFFFFF), flag), set_ct("mark"))
    translated = (ct("status"), masked(_SOURCE_TRANSLATED), compare(bytes(4), "!="))
    # Every packet comes through here, and looking an interface up by its name takes longest: once a connection.
    rules = (
        rule(managed, is_new, leaves, remember, comment="the connection is ours"),
        # What may leave, not what may not: a packet that connection tracking calls invalid has no status.
        rule(managed, translated, address_in(SOURCE, "internals"), RETURN),
        rule(managed, leaves, counter(), DROP, comment="never leaves untranslated", tag=UNTRANSLATED),
    )
    return Chain("guard", filtering(POSTROUTING, 200), rules)


def _errors(marks: Marks) -> Chain:
    flag = word(marks.flag)
    is_related = (ct("state"), masked(_RELATED), compare(bytes(4), "!="))
    is_ours = (ct("mark"), masked(flag), compare(flag))
    manage = (meta("mark"), masked(word(marks.flag ^ 0xFFFFFFFF), flag), set_meta("mark"))
    said = rule(protocol(_ICMP), is_related, is_ours, manage, comment="what we say about a VM's packet goes its way")
    return Chain("errors", Hook("route", OUTPUT, -150), (said,))
