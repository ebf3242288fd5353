"""
The host role: which VM a packet belongs to, and which ports it may use.

In nftables' notation::

    table bridge virtports {
      map taps { type iface_index : verdict; elements = { "vnet0" comment "web 1" : goto vm-1 } }
      chain identify { type filter hook prerouting priority -300; iif vmap @taps }
      chain vm-1 { meta mark set meta mark & ~MASK | (FLAG | 1) }
    }
    table ip virtports {
      ct timeout managed-udp-120 { protocol udp; … }    # and managed-icmp-60, managed-tcp-…
      map bindings { type mark : interval ipv4_addr . inet_service; counter; }
      set budgets { type mark; limit rate …; elements = { 0x40010000 limit rate over 1/day burst 64 packets … } }
      set deferred { type mark; limit rate …; elements = { 0x40010000 limit rate over 1/day burst 240 packets … } }
      set capped { type mark; counter; }
      set refused { type mark . inet_proto . ipv4_addr . inet_service; flags timeout; }
      chain exemption { type filter hook prerouting priority mangle;
        ct mark & FLAG == FLAG return
        meta mark & FLAG != FLAG return
        ip daddr @exempt meta mark set meta mark & ~MASK return
        ct state established,related ct mark & FLAG == 0 meta mark set meta mark & ~MASK return
        ct state new jump newcomers }
      chain newcomers {
        meta mark & MASK . meta l4proto . ip daddr . th dport @refused meta mark & MASK @capped reject with icmp 13
        … likewise for ICMP queries, that have no port
        ct status & confirmed == 0 meta mark & MASK @deferred queue num 7414 bypass }
      chain translate { type nat hook postrouting priority srcnat - 10;
        meta mark & FLAG == FLAG oifname @uplinks jump begun }
      chain begun {
        ct mark set ct mark | FLAG
        ct timeout set "managed-udp-120" …
        meta mark & MASK @budgets log group 7414 queue-threshold 1
        snat ip to meta mark & MASK map @bindings }
      chain guard { type filter hook postrouting priority 200;
        meta mark & FLAG != FLAG return
        ct status snat ip saddr POOL return
        oifname @uplinks counter drop }
      chain errors { type route hook output priority mangle;
        meta l4proto icmp ct state related ct mark & FLAG == FLAG meta mark set meta mark | FLAG }
    }

- One chain a VM: merging a value into some bits of a mark takes constants on kernels before 6.13, and other bits belong
  to others.
- The tap tells which VM it is; nothing in the packet is trusted for that. It is the interface's index that counts: a
  tap of another VM that gets the name of a former one, while no natd is there to see it, is nobody's.
- Connections that were there before we cared for the VM go on the way they went (last rule of ``exemption``): they
  lack our bit in the connection mark, which ``begun`` gives every connection of ours. An entry that is made in
  connection tracking for a VM that moved here must carry that bit.
- ``guard`` runs after source NAT and before an edge on the same machine rewrites addresses (300): a packet of a VM
  that was not translated is never let out, whatever source address it claims, so no private address leaks and no port
  that is not the VM's is used: not even by a guest that forges another VM's internal address, nor under this host's own
  address by somebody else's masquerade when the VM has no ports.
- The nat chain sees the first packet of a connection only, so what matches ``budgets`` is a connection that begins
  after as many as the budget allowed; it goes on like any other (``docs/design/0003-arrivals.md``).
- ``deferred`` lets as many connections begin as there are ports for; those that follow wait in natd's queue, before
  they have a port, until the VM has a larger range. Without a natd that listens they go on as they would without it.
- ``refused`` holds the destinations for which a VM at its cap has no port left. natd adds them after counting, and
  elements that it does not renew time out, so that no failure of natd can keep a VM from connecting. ``capped`` decides
  in the end: it changes with the VM's ports, in the same transaction.
- A ``ct timeout`` object has its seconds in its name. Other seconds are another object, and the rules of ``begun`` are
  exchanged; the former object stays until the table goes, since removing it would give the connections that use it
  back to the system's timeouts (``nf_ct_untimeout``).
- An ICMP error that this host itself sends about a packet for a VM (too large, no such guest) goes through the edges,
  as the VM's packets do: only they can translate the packet that it quotes (``errors``).

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from cpm.protocol.intent import HostIntent, VmIntent
from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.timeouts import Timeouts
from natctl.model.entries import Destination, HostEntry, HostSettings, Path, Queueing
from natctl.ruleset import labels
from natctl.ruleset.common import (
    ADDRESS,
    INTERFACE_INDEX,
    MARK,
    OUTPUT,
    PORT,
    POSTROUTING,
    PREROUTING,
    PROTOCOL,
    address_in,
    element_label,
    filtering,
    in_network,
    interface_elements,
    interfaces,
    network_elements,
    networks,
    pool_of,
    port_word,
    protocol,
    rule,
    to_interface,
)
from natctl.ruleset.expressions import (
    DESTINATION,
    FIRST,
    FOURTH,
    NETWORK,
    SECOND,
    SOURCE,
    THIRD,
    TRANSPORT,
    bitwise,
    compare,
    counter,
    ct,
    ct_timeout,
    extension_queue_to,
    log_to,
    map_lookup,
    meta,
    native_u32,
    payload,
    queue_to,
    refuse,
    set_ct,
    set_lookup,
    set_meta,
    source_nat,
    verdict_lookup,
)
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import (
    CT_TIMEOUTS,
    DROP,
    RETURN,
    VM_CHAIN,
    Chain,
    CtTimeout,
    Element,
    Expression,
    Family,
    Fragment,
    Holdings,
    Hook,
    Place,
    Reading,
    Rule,
    Ruleset,
    SetSpec,
    by_identity,
    jump,
)

TAPS: Final[Place] = (Family.BRIDGE, "taps")
BINDINGS: Final[Place] = (Family.IPV4, "bindings")
BUDGETS: Final[Place] = (Family.IPV4, "budgets")
DEFERRED: Final[Place] = (Family.IPV4, "deferred")
CAPPED: Final[Place] = (Family.IPV4, "capped")
REFUSED: Final[Place] = (Family.IPV4, "refused")
"""Expiring, see :data:`~natctl.ruleset.values.EXPIRING`."""
UPLINKS: Final[Place] = (Family.IPV4, "uplinks")
EXEMPT: Final[Place] = (Family.IPV4, "exempt")
BEGUN: Final[Place] = (Family.IPV4, "begun")

UNTRANSLATED: Final = "untranslated"
"""Name of the counter of packets that were managed but not translated, and dropped."""

_ICMP, _TCP, _UDP = 1, 6, 17
_TCP_OPENING, _TCP_ESTABLISHED, _TCP_TIME_WAIT, _TCP_CLOSE = 0, 2, 6, 7
"""Places in the list of TCP's states that :func:`_ct_timeouts` names."""
_PROHIBITED = 13
"""ICMP type 3 code 13: communication administratively prohibited (RFC 5508 REQ-8)."""
_LARGEST_BUDGET = 65535
_RELATED = native_u32(4)
_ESTABLISHED_OR_RELATED = native_u32(2 | 4)
_NEW = native_u32(8)
_CONFIRMED = native_u32(8)
"""``ct status confirmed``: IPS_CONFIRMED."""
_SOURCE_TRANSLATED = native_u32(0x10)
"""``ct status snat``: IPS_SRC_NAT."""


def base(settings: HostSettings, path: Path | None) -> Ruleset:
    """Return tables, chains and sets of the host role, without any VM."""
    marks = Marks.of_mask(settings.mark_mask)
    ct_timeouts = _ct_timeouts(settings.timeouts.override((path and path.timeouts) or Timeouts()))
    chains = {
        (Family.BRIDGE, "identify"): _identify(),
        (Family.IPV4, "exemption"): _exemption(marks),
        (Family.IPV4, "newcomers"): _newcomers(marks, settings),
        (Family.IPV4, "translate"): _translate(marks),
        (Family.IPV4, "guard"): _guard(marks, pool_of(path)),
        BEGUN: _begun(marks, [name for _, name in ct_timeouts], settings.log_group),
        (Family.IPV4, "errors"): _errors(marks),
    }
    sets = {
        TAPS: SetSpec("taps", (INTERFACE_INDEX,), verdicts=True),
        BINDINGS: SetSpec("bindings", (MARK,), data=(ADDRESS, PORT), data_interval=True, counter=True),
        BUDGETS: SetSpec("budgets", (MARK,), budgets=True),
        DEFERRED: SetSpec("deferred", (MARK,), deferring=True),
        CAPPED: SetSpec("capped", (MARK,), counter=True),
        REFUSED: SetSpec("refused", (MARK, PROTOCOL, ADDRESS, PORT), expiring=True),
        UPLINKS: interfaces("uplinks"),
        EXEMPT: networks("exempt"),
    }
    elements = {
        TAPS: {},
        BINDINGS: {},
        BUDGETS: {},
        DEFERRED: {},
        CAPPED: {},
        REFUSED: {},
        UPLINKS: by_identity(interface_elements(settings.uplinks)),
        EXEMPT: by_identity(network_elements(settings.exempt)),
    }
    return Ruleset(chains, sets, elements, ct_timeouts)


def fragment(settings: HostSettings, entry: HostEntry) -> Fragment:
    """
    Return what one VM adds; :func:`entries_in` reads it back.

    :raise ValueError: When its index does not fit the mark mask.
    """
    mark, vm = Marks.of_mask(settings.mark_mask).of(entry.index), entry.intent
    chain = _vm_chain(settings, entry, mark)
    label = element_label(vm.name, vm.domain)
    elements: list[tuple[Place, Element]] = [
        (TAPS, Element(native_u32(tap), chain=chain.name, userdata=label)) for tap in sorted(entry.taps)
    ]
    if vm.ports is not None:
        first, last = (vm.internal.packed + port_word(port) for port in (vm.ports.first, vm.ports.last))
        elements.append((BINDINGS, Element(native_u32(mark), data=first + last, userdata=label)))
        if entry.budget is not None:
            elements.append(
                (BUDGETS, Element(native_u32(mark), userdata=label, budget=min(entry.budget, _LARGEST_BUDGET)))
            )
        if entry.defer_after is not None:
            defer_after = min(entry.defer_after, _LARGEST_BUDGET)
            elements.append((DEFERRED, Element(native_u32(mark), userdata=label, defer_after=defer_after)))
        if vm.at_cap:
            elements.append((CAPPED, Element(native_u32(mark), userdata=label)))
    return Fragment((((Family.BRIDGE, chain.name), chain),), tuple(elements))


def entries_in(settings: HostSettings, reading: Reading) -> dict[DomainUUID, HostEntry]:
    """Return the VMs whose fragments are in the kernel; what makes no sense is left out."""
    marks = Marks.of_mask(settings.mark_mask)
    taps: dict[str, list[int]] = {}
    for element in reading.holdings.elements.get(TAPS, {}).values():
        if len(element.key) == INTERFACE_INDEX.length:  # an older natd's are names: libvirt's list has the taps
            taps.setdefault(element.chain, []).append(int.from_bytes(element.key, sys.byteorder))
    by_index = {
        place: {
            marks.index_in(int.from_bytes(element.key, sys.byteorder)): element
            for element in reading.holdings.elements.get(place, {}).values()
        }
        for place in (BINDINGS, BUDGETS, DEFERRED, CAPPED)
    }
    found: dict[DomainUUID, HostEntry] = {}
    for chain, userdata in reading.vm_rules.items():
        number, owner = chain.removeprefix(VM_CHAIN), _vm_in(userdata)
        if owner is not None and number.isdecimal():
            elements = {place: held[int(number)] for place, held in by_index.items() if int(number) in held}
            found[owner.domain] = _entry(int(number), owner, taps.get(chain, ()), elements)
    return found


def _entry(index: int, owner: VmIntent, taps: Iterable[int], elements: Mapping[Place, Element]) -> HostEntry:
    ports, internal = None, owner.internal
    if (binding := elements.get(BINDINGS)) is not None:
        internal = IPv4Address(binding.data[:4])
        ports = PortRange(int.from_bytes(binding.data[4:6], "big"), int.from_bytes(binding.data[12:14], "big"))
    return HostEntry(
        HostIntent(owner.domain, owner.name, internal, ports, at_cap=CAPPED in elements),
        index,
        frozenset(taps),
        budget=elements[BUDGETS].budget if BUDGETS in elements else None,
        defer_after=elements[DEFERRED].defer_after if DEFERRED in elements else None,
    )


def _vm_in(userdata: bytes) -> VmIntent | None:
    """Read the user data of the rule in a VM's chain; None when it is not ours."""
    domain, _, internal = labels.tag_of(userdata).partition(" ")
    try:
        return VmIntent(DomainUUID(domain), labels.comment_of(userdata), IPv4Address(internal))
    except ValueError:
        return None


def refusal(settings: HostSettings, index: int, where: Destination, timeout_ms: int) -> Element:
    """Return the element by which a VM's new connections to this destination are refused until it times out."""
    mark = native_u32(Marks.of_mask(settings.mark_mask).of(index))
    key = mark + bytes((where.protocol, 0, 0, 0)) + where.address.packed + port_word(where.port)
    return Element(key, timeout_ms=timeout_ms)


def timeouts_in(holdings: Holdings) -> Timeouts | None:
    """Return the timeouts that new connections get; None: there is nothing of ours."""
    rules = holdings.chains[BEGUN].rules if BEGUN in holdings.chains else ()
    in_force = {
        timeout.protocol: timeout.seconds
        for (_, name), timeout in holdings.ct_timeouts.items()
        if timeout is not None and _set_timeout(name).digest in rules
    }
    if in_force.keys() != {_TCP, _UDP, _ICMP}:
        return None
    tcp = in_force[_TCP]
    return Timeouts(
        tcp_established_s=tcp[_TCP_ESTABLISHED],
        tcp_transitory_s=tcp[_TCP_OPENING],
        tcp_time_wait_s=tcp[_TCP_TIME_WAIT],
        tcp_reset_s=tcp[_TCP_CLOSE],
        udp_s=in_force[_UDP][0],
        icmp_s=in_force[_ICMP][0],
    )


def _identify() -> Chain:
    return Chain("identify", Hook("filter", PREROUTING, -300), (rule(meta("iif"), verdict_lookup("taps")),))


def _vm_chain(settings: HostSettings, entry: HostEntry, mark: int) -> Chain:
    merge = bitwise(native_u32(settings.mark_mask ^ 0xFFFFFFFF), native_u32(mark))
    marking = Rule(
        (meta("mark"), merge, set_meta("mark")), entry.intent.name, f"{entry.intent.domain} {entry.intent.internal}"
    )
    return Chain(f"{VM_CHAIN}{entry.index}", None, (marking,))


def _is_managed(marks: Marks) -> tuple[Expression, ...]:
    flag = native_u32(marks.flag)
    return meta("mark"), bitwise(flag), compare(flag)


def _is_not_managed(marks: Marks) -> tuple[Expression, ...]:
    flag = native_u32(marks.flag)
    return meta("mark"), bitwise(flag), compare(flag, "!=")


def _owner(marks: Marks) -> tuple[Expression, ...]:
    return meta("mark"), bitwise(native_u32(marks.mask))


def _ct_timeouts(timeouts: Timeouts) -> dict[Place, CtTimeout]:
    transitory, established = timeouts.tcp_transitory_s, timeouts.tcp_established_s
    # SYN sent, SYN received, established, FIN wait, close wait, last ACK, time wait, close, second SYN sent, and the
    # two for retransmitted and for unacknowledged data: a connection is no less established for that.
    tcp = (
        transitory,
        transitory,
        established,
        transitory,
        transitory,
        transitory,
        timeouts.tcp_time_wait_s,
        timeouts.tcp_reset_s,
        transitory,
        established,
        established,
    )
    by_name = {
        f"tcp-{established}-{transitory}-{timeouts.tcp_time_wait_s}-{timeouts.tcp_reset_s}": CtTimeout(_TCP, tcp),
        f"udp-{timeouts.udp_s}": CtTimeout(_UDP, (timeouts.udp_s, timeouts.udp_s)),
        f"icmp-{timeouts.icmp_s}": CtTimeout(_ICMP, (timeouts.icmp_s,)),
    }
    return {(Family.IPV4, CT_TIMEOUTS + name): timeout for name, timeout in by_name.items()}


def _exemption(marks: Marks) -> Chain:
    forget = (meta("mark"), bitwise(native_u32(marks.mask ^ 0xFFFFFFFF)), set_meta("mark"))
    is_older = (ct("state"), bitwise(_ESTABLISHED_OR_RELATED), compare(bytes(4), "!="))
    is_not_ours = (ct("mark"), bitwise(native_u32(marks.flag)), compare(bytes(4)))
    is_ours = (ct("mark"), bitwise(native_u32(marks.flag)), compare(native_u32(marks.flag)))
    rules = (
        rule(is_ours, RETURN, comment="decided when it began"),
        rule(_is_not_managed(marks), RETURN),
        rule(address_in(DESTINATION, "exempt"), forget, RETURN, comment="not translated, not sent to edges"),
        rule(is_older, is_not_ours, forget, RETURN, comment="older than our care: goes on as it went"),
        rule(_is_new(), jump("newcomers")),
    )
    return Chain("exemption", filtering(PREROUTING, -150), rules)


def _is_new() -> tuple[Expression, ...]:
    return ct("state"), bitwise(_NEW), compare(bytes(4), "!=")


def _newcomers(marks: Marks, settings: HostSettings) -> Chain:
    destination = payload(NETWORK, DESTINATION, 4, THIRD)
    ported = (*_owner(marks), meta("l4proto", SECOND), destination, payload(TRANSPORT, 2, 2, FOURTH))
    portless = (*_owner(marks), meta("l4proto", SECOND), destination, payload(TRANSPORT, 1, 1, FOURTH))
    # A query's code is 0, and stands where the others have their port.
    is_capped = (*_owner(marks), set_lookup("capped"))
    words = "no port is left for it"
    rules = (
        rule(ported, set_lookup("refused", FIRST), is_capped, refuse(_PROHIBITED), comment=words),
        rule(protocol(_ICMP), portless, set_lookup("refused", FIRST), is_capped, refuse(_PROHIBITED), comment=words),
        *_deferral(marks, settings),
    )
    return Chain("newcomers", None, rules)


def _deferral(marks: Marks, settings: HostSettings) -> tuple[Rule, ...]:
    if settings.queueing is Queueing.NONE:
        return ()
    # A connection that is not answered yet is still "new" for connection tracking, but has its port already.
    is_first = (ct("status"), bitwise(_CONFIRMED), compare(bytes(4)))
    queue = queue_to if settings.queueing is Queueing.NATIVE else extension_queue_to
    words = "waits until the VM has more ports"
    return (rule(is_first, *_owner(marks), set_lookup("deferred"), queue(settings.queue), comment=words),)


def _translate(marks: Marks) -> Chain:
    # Looking an interface up by its name takes longest: once.
    return Chain(
        "translate", Hook("nat", POSTROUTING, 90), (rule(_is_managed(marks), to_interface("uplinks"), jump("begun")),)
    )


def _begun(marks: Marks, timeouts: Iterable[str], log_group: int) -> Chain:
    remember = (ct("mark"), bitwise(native_u32(marks.flag ^ 0xFFFFFFFF), native_u32(marks.flag)), set_ct("mark"))
    spent = (*_owner(marks), set_lookup("budgets"))
    rules = (
        rule(remember, comment="the connection is ours"),
        *map(_set_timeout, timeouts),
        rule(spent, log_to(log_group), comment="an arrival budget is used up"),
        rule(_owner(marks), map_lookup("bindings"), source_nat(), comment="a port of the VM's own range"),
    )
    return Chain("begun", None, rules)


def _guard(marks: Marks, pool: IPv4Network) -> Chain:
    translated = (ct("status"), bitwise(_SOURCE_TRANSLATED), compare(bytes(4), "!="))
    leaves = to_interface("uplinks")
    rules = (
        # Every packet passes here: those of no VM, and all replies, are let through first.
        rule(_is_not_managed(marks), RETURN),
        # What may leave, not what may not: a packet that connection tracking calls invalid has no status.
        rule(translated, in_network(SOURCE, pool), RETURN),
        rule(leaves, counter(), DROP, comment="never leaves untranslated", tag=UNTRANSLATED),
    )
    return Chain("guard", filtering(POSTROUTING, 200), rules)


def _set_timeout(name: str) -> Rule:
    return rule(ct_timeout(name))


def _errors(marks: Marks) -> Chain:
    flag = native_u32(marks.flag)
    is_related = (ct("state"), bitwise(_RELATED), compare(bytes(4), "!="))
    is_ours = (ct("mark"), bitwise(flag), compare(flag))
    manage = (meta("mark"), bitwise(native_u32(marks.flag ^ 0xFFFFFFFF), flag), set_meta("mark"))
    own_errors = rule(
        protocol(_ICMP), is_related, is_ours, manage, comment="what we say about a VM's packet goes its way"
    )
    return Chain("errors", Hook("route", OUTPUT, -150), (own_errors,))
