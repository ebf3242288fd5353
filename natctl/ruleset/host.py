"""
The host role: which VM a packet belongs to, and which ports it may use.

In nftables' notation::

    table bridge virtports {
      map taps { type iface_index : verdict; elements = { 1073741829 comment "web 1" : goto vm-1 } }
      set gateways { type ether_addr; }
      chain identify { type filter hook prerouting priority -300;
        meta pkttype host iif | 1073741824 vmap @taps
        ether daddr @gateways iif | 1073741824 vmap @taps
        meta mark & FLAG == FLAG meta pkttype != host ether daddr != @gateways meta mark set meta mark & ~MASK }
      chain vm-1 { meta mark set meta mark & ~MASK | (FLAG | 1) }
    }
    table ip virtports {
      ct timeout managed-udp-120-icmp-60 { protocol udp; … }    # and managed-tcp-…
      map bindings { type mark : interval ipv4_addr . inet_service; counter; }
      set budgets { type mark; limit rate …; elements = { 0x40010000 limit rate over 1/day burst 64 packets … } }
      set deferred { type mark; limit rate …; elements = { 0x40010000 limit rate over 1/day burst 240 packets … } }
      set capped { type mark; counter; }
      set rates { type mark; limit rate …; counter; elements = { 0x40010000 limit rate over 1000/second … } }
      set connections { type mark; limit rate …; ct count …;
        elements = { 0x40010000 limit rate over 1/hour burst 28672 packets ct count over 28672 } }
      set limited { type mark; counter; }
      set asking { type mark; }
      set asking-rates { type mark; limit rate …; counter; elements = { 0x40010000 limit rate over 10/second … } }
      set refused { type mark . inet_proto . ipv4_addr . inet_service; flags timeout; }
      set refused-queries { type mark . ipv4_addr; flags timeout; }
      chain exemption { type filter hook prerouting priority mangle + 10;
        meta mark & FLAG == FLAG goto outgoing
        ip saddr POOL iifname != @uplinks iifname != UNDERLAY
          fib saddr . iif oif missing fib saddr type != local counter drop
        ip daddr POOL ct state invalid,new goto unasked }
      chain outgoing {
        ct direction reply goto answers
        ct mark & FLAG == FLAG return
        udp dport 5351 meta mark & MASK @asking jump asks
        ip daddr @exempt meta mark set meta mark & ~MASK return
        ct state established,related meta mark set meta mark & ~MASK return
        ct status snat meta mark set meta mark & ~MASK return
        ct state new fib saddr . iif oif missing counter drop
        ct state new jump newcomers }
      chain asks {
        ip daddr != 192.0.0.9 fib daddr type != local return
        fib saddr . iif oif missing counter drop
        meta mark & MASK @asking-rates drop
        log group 7416 queue-threshold 1 drop }
      chain answers {
        ct mark & FLAG == FLAG iifname != @uplinks meta mark & MASK . ct original ip daddr @internals return
        ct mark & FLAG == FLAG iifname != @uplinks counter drop
        meta mark set meta mark & ~MASK }
      chain newcomers {
        meta mark & MASK . meta l4proto . ip daddr . th dport @refused meta mark & MASK @capped reject with icmp 13
        meta l4proto icmp meta mark & MASK . ip daddr @refused-queries … likewise
        ct status & confirmed != 0 return
        meta mark & MASK @rates drop
        meta mark & MASK @connections meta mark & MASK @limited drop
        meta mark & MASK @deferred queue num 7414 bypass }
      chain translate { type nat hook postrouting priority srcnat - 10;
        meta mark & FLAG == FLAG oifname @uplinks jump begun }
      chain begun {
        ct mark set ct mark | FLAG
        ct timeout set "managed-udp-120-icmp-60" …
        add @origins { @nh,96,16 . @nh,112,16 : meta mark & MASK }
        meta mark & MASK @budgets log group 7414 queue-threshold 1
        meta mark & MASK @full-cone jump mapped
        meta l4proto tcp snat ip to meta mark & MASK map @bindings
        … likewise for each protocol that edges carry }
      chain guard { type filter hook postrouting priority 200;
        meta mark & FLAG != FLAG return
        meta mark & MASK @full-cone jump learn
        ct status snat ip saddr POOL meta mark set meta mark & ~FLAG return
        ct direction reply ct status dnat ct mark & FLAG == FLAG ip saddr POOL meta mark set meta mark & ~FLAG return
        ct status confirmed jump stuck
        counter drop }
      chain errors { type route hook output priority mangle;
        meta l4proto icmp ct state related ct mark & FLAG == FLAG meta mark set meta mark | FLAG }
    }

- One chain a VM: merging a value into some bits of a mark takes constants on kernels before 6.13, and other bits belong
  to others.
- ``taps`` is keyed by the interface's index (5 above) and a bit that no index has, so that a saved ruleset can be
  loaded at boot, when there are no taps yet (:func:`natctl.ruleset.expressions.distinct_interface`).
- ``nft`` takes ``snat`` to a port only behind a match of one protocol. Connections of protocols that edges do not carry
  are not translated, and ``guard`` drops them.
- The tap tells which VM it is; nothing in the packet is trusted for that. It is the interface's index that counts: a
  tap of another VM that gets the name of a former one, while no natd is there to see it, is nobody's. The VM's
  connections are in a conntrack zone of their own (:mod:`natctl.ruleset.zones`, which also fills and reads
  ``origins``).
- Only frames to this machine are a VM's packets to us: those to the bridge's own hardware address, which the bridge
  marks as such before this hook (br_handle_frame, net/bridge/br_input.c), so that nothing has to follow when that
  address changes. Others are bridged, to the router of a LAN for example; with br_netfilter they pass the chains below
  too, and would be translated or dropped if they had a mark: so the one that a program at the tap has given them is
  taken away. ``gateways`` has the addresses of interfaces above a bridge, which differ from its own for macvlans
  (VRRP).
- What is still marked as managed when it leaves has met no rules (:mod:`natctl.kernel.tap_marks`): ``guard`` and
  ``outgoing`` take that bit away from all that may leave.
- A connection whose source is not routed back to the bridge it came from does not begin: its answers would reach
  somebody else, a host of the underlay for example. Nor does a VM take part in the answers of another one's connection.
  Our bits of the mark are removed from all answers: other software that restores marks from connections would have
  packets *to* VMs sent to the edges.
- An unmanaged VM, or anybody else, that claims an internal address would use the ports of the VM that has it: the edges
  see no difference. Such packets come from an interface to which the address is not routed. Addresses of this machine
  itself, which may lie in the pool, are excepted.
- A packet for a VM that is of no connection of the VM's finds the pool's unreachable route. It is dropped before, since
  the host's answer would come from a private address, end a connection that both ends are opening, and tell a scanner
  which ports are in use (RFC 5382 REQ-4).
- Connections that were there before we cared for the VM go on the way they went (in ``outgoing``): they
  lack our bit in the connection mark, which ``begun`` gives every connection of ours. An entry that is made in
  connection tracking for a VM that moved here must carry that bit. Those that nobody has answered or translated begin
  anew (:mod:`natctl.ruleset.older`).
- ``guard`` runs after source NAT and before an edge on the same machine rewrites addresses (300): a packet of a VM
  that was not translated is let out by no interface, whatever source address it claims and whatever route it takes (a
  VPN's, another default route's). So no private address leaks and no port that is not the VM's is used: not even by a
  guest that forges another VM's internal address, nor under this host's own address by somebody else's masquerade when
  the VM has no ports. ``exempt`` is what goes elsewhere.
- The nat chain sees the first packet of a connection only, so what matches ``budgets`` is a connection that begins
  after as many as the budget allowed; it goes on like any other (``docs/design/0003-arrivals.md``).
- ``deferred`` lets as many connections begin as there are ports for; those that follow wait in natd's queue, before
  they have a port, until the VM has a larger range. Without a natd that listens they go on as they would without it.
- ``refused`` holds the destinations for which a VM at its cap has no port left. natd adds them after counting, and
  elements that it does not renew time out, so that no failure of natd can keep a VM from connecting. ``capped`` decides
  in the end: it changes with the VM's ports, in the same transaction.
- ``rates`` and ``connections`` hold the VM's limits. A connection takes a token of either; the kernel counts a VM's
  connections only when the tokens are used up (:mod:`natctl.arrivals.allowance`). ``limited`` counts what is dropped.
- ``asks`` hands what a guest sends to port 5351 of a gateway, PCP and NAT-PMP, to natd with the VM's mark, if its guest
  may ask for ports. What other guests send there goes where it went. Nothing comes back by this way: natd answers out
  of the VM's own interface (:mod:`natctl.port_control.datagrams`).
- An ICMP error that this host itself sends about a packet for a VM (too large, no such guest) goes through the edges,
  as the VM's packets do: only they can translate the packet that it quotes (``errors``).

What is let in from outside is in :mod:`natctl.ruleset.forwards`. :mod:`natctl.ruleset.host_maps` has what a VM adds.

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network
from typing import Final

from natctl.model.entries import HostSettings, Path, Queueing
from natctl.model.flow import ICMP, SCTP, TCP, UDP, UDP_LITE
from natctl.model.port_control import ANYCAST, SERVER_PORT
from natctl.ruleset import forwards, mappings, older, timeouts, zones
from natctl.ruleset.common import (
    ADDRESS,
    HARDWARE,
    INTERFACE_INDEX,
    MARK,
    OUTPUT,
    PORT,
    POSTROUTING,
    PREROUTING,
    PROTOCOL,
    address_in,
    filtering,
    in_network,
    interface_elements,
    interfaces,
    is_managed,
    is_not_from_here,
    is_not_here,
    is_not_managed,
    network_elements,
    networks,
    owner,
    pool_of,
    protocol,
    rule,
    through,
    to_interface,
)
from natctl.ruleset.connections import (
    CONFIRMED,
    ESTABLISHED,
    NEW,
    RELATED,
    REPLY,
    SOURCE_TRANSLATED,
    become_ours,
    forget_vm,
    has_direction,
    has_state,
    has_status,
    is_ours,
    limits,
)
from natctl.ruleset.expressions import (
    DESTINATION,
    FIRST,
    FOURTH,
    LINK,
    LINK_DESTINATION,
    NETWORK,
    SECOND,
    SOURCE,
    THIRD,
    TRANSPORT,
    bitwise,
    compare,
    counter,
    distinct_interface,
    extension_queue_to,
    log_to,
    map_lookup,
    meta,
    native_u32,
    payload,
    queue_to,
    refuse,
    set_lookup,
    set_meta,
    source_is_elsewhere,
    source_nat,
    verdict_lookup,
)
from natctl.ruleset.host_maps import (
    ASKING,
    ASKING_RATES,
    BINDINGS,
    BUDGETS,
    CAPPED,
    CONNECTIONS,
    DEFERRED,
    HOUR_S,
    LIMITED,
    RATES,
    REFUSED,
    REFUSED_QUERIES,
    TAPS,
)
from natctl.ruleset.marks import Marks
from natctl.ruleset.timeouts import BEGUN
from natctl.ruleset.values import (
    DROP,
    RETURN,
    Chain,
    Element,
    Elements,
    Family,
    Hook,
    Limit,
    Place,
    Rule,
    Ruleset,
    SetSpec,
    by_identity,
    goto,
    jump,
)

GATEWAYS: Final[Place] = (Family.BRIDGE, "gateways")
UPLINKS: Final[Place] = (Family.IPV4, "uplinks")
EXEMPT: Final[Place] = (Family.IPV4, "exempt")

UNTRANSLATED: Final = "untranslated"
"""Name of the counter of packets that were managed but not translated, and dropped."""
FORGED_SOURCE: Final = "forged-source"
"""Name of the counter of packets of VMs with a source that is not behind their bridge, or of another connection's
answers; they are dropped."""

_CARRIED = (TCP, UDP, ICMP, SCTP, UDP_LITE)
"""What edges carry."""
_PACKET_HOST = 0
_PROHIBITED = 13
"""ICMP type 3 code 13: communication administratively prohibited (RFC 5508 REQ-8)."""
_AFTER_MANGLE: Final = -140
"""Priority behind ``mangle``, where other software restores marks, and before destination NAT."""
_FORGED_WORDS = "the source leads elsewhere"


def base(
    settings: HostSettings, path: Path | None, underlay: Iterable[str] = (), *, gateways: Iterable[bytes] = ()
) -> Ruleset:
    """
    Return tables, chains and sets of the host role, without any VM.

    :param underlay: Interfaces to other hosts, when this machine has the edge role too.
    :param gateways: See :attr:`~natctl.model.entries.Settings.gateways`.
    """
    marks = Marks.of_mask(settings.mark_mask)
    in_effect = timeouts.in_effect(settings, path)
    ct_timeouts = timeouts.objects(in_effect)
    objects = [name for _, name in ct_timeouts]
    chains = {
        (Family.BRIDGE, "identify"): _identify(marks),
        (Family.IPV4, "exemption"): _exemption(marks, pool_of(path), underlay),
        (Family.IPV4, "outgoing"): _outgoing(marks),
        (Family.IPV4, "asks"): _asks(marks, settings.port_control_log_group),
        (Family.IPV4, "answers"): _answers(marks),
        (Family.IPV4, "newcomers"): _newcomers(marks, settings),
        (Family.IPV4, "translate"): _translate(marks),
        (Family.IPV4, "guard"): _guard(marks, pool_of(path)),
        (Family.IPV4, "stuck"): older.chain(marks, settings.older_log_group),
        BEGUN: _begun(marks, objects, settings.log_group),
        (Family.IPV4, "errors"): _errors(marks),
        **mappings.chains(marks, pool_of(path), in_effect, forwards.begins()),
    }
    sets = {
        TAPS: SetSpec("taps", (INTERFACE_INDEX,), verdicts=True),
        GATEWAYS: SetSpec("gateways", (HARDWARE,)),
        BINDINGS: SetSpec("bindings", (MARK,), data=(ADDRESS, PORT), data_interval=True, counter=True),
        BUDGETS: SetSpec("budgets", (MARK,), budgets=True),
        DEFERRED: SetSpec("deferred", (MARK,), deferring=True),
        CAPPED: SetSpec("capped", (MARK,), counter=True),
        REFUSED: SetSpec("refused", (MARK, PROTOCOL, ADDRESS, PORT), expiring=True),
        REFUSED_QUERIES: SetSpec("refused-queries", (MARK, ADDRESS), expiring=True),
        RATES: SetSpec("rates", (MARK,), limiting=Limit(1, 1, 1)),
        CONNECTIONS: SetSpec("connections", (MARK,), limiting=Limit(1, HOUR_S, 1, 1)),
        LIMITED: SetSpec("limited", (MARK,), counter=True),
        ASKING: SetSpec("asking", (MARK,)),
        ASKING_RATES: SetSpec("asking-rates", (MARK,), limiting=Limit(1, 1, 1)),
        UPLINKS: interfaces("uplinks"),
        EXEMPT: networks("exempt"),
    }
    sets |= zones.SETS | older.SETS | mappings.SETS | forwards.SETS
    elements: dict[Place, Elements] = {place: {} for place in sets} | zones.ELEMENTS
    elements[GATEWAYS] = by_identity(Element(address) for address in sorted(gateways))
    elements[UPLINKS] = by_identity(interface_elements(settings.uplinks))
    elements[EXEMPT] = by_identity(network_elements(settings.exempt))
    chains |= zones.chains(marks) | forwards.chains(marks, objects)
    return Ruleset(chains, sets, elements, ct_timeouts)


def _identify(marks: Marks) -> Chain:
    from_tap = (*distinct_interface(), verdict_lookup("taps"))
    to_bridge = (meta("pkttype"), compare(bytes((_PACKET_HOST,))))
    to_gateway = (payload(LINK, LINK_DESTINATION, 6), set_lookup("gateways"))
    is_bridged = (
        meta("pkttype"),
        compare(bytes((_PACKET_HOST,)), "!="),
        payload(LINK, LINK_DESTINATION, 6),
        set_lookup("gateways", negated=True),
    )
    rules = (
        rule(to_bridge, from_tap, comment="to the bridge itself"),
        rule(to_gateway, from_tap, comment="to an interface above it"),
        rule(is_managed(marks), is_bridged, forget_vm(marks), comment="marked at its tap, and not for this machine"),
    )
    return Chain("identify", Hook("filter", PREROUTING, -300), rules)


def _exemption(marks: Marks, pool: IPv4Network, underlay: Iterable[str]) -> Chain:
    # An edge on this machine may have several ways to a host, of which the route names one.
    not_from_hosts = (part for name in sorted(underlay) for part in through("iifname", name, negated=True))
    not_from_edges = (meta("iifname"), set_lookup("uplinks", negated=True))
    # This machine may have addresses of its own in the pool: what it sends to itself comes back from one of them.
    forged = (
        *in_network(SOURCE, pool),
        *not_from_edges,
        *not_from_hosts,
        *source_is_elsewhere(),
        *is_not_from_here(),
    )
    rules = (
        rule(is_managed(marks), goto("outgoing")),
        rule(forged, counter(), DROP, comment=_FORGED_WORDS, tag=FORGED_SOURCE),
        rule(mappings.is_unasked(pool), goto("unasked"), comment="of no connection"),
    )
    return Chain("exemption", filtering(PREROUTING, _AFTER_MANGLE), rules)


def _outgoing(marks: Marks) -> Chain:
    forget, is_older = forget_vm(marks), has_state(ESTABLISHED | RELATED)
    is_reply = has_direction(REPLY)
    asks = (*protocol(UDP), payload(TRANSPORT, 2, 2), compare(SERVER_PORT.to_bytes(2, "big")))
    rules = (
        rule(is_reply, goto("answers")),
        rule(is_ours(marks), RETURN, comment="decided when it began"),
        rule(*asks, *owner(marks), set_lookup("asking"), jump("asks"), comment="PCP, NAT-PMP"),
        rule(address_in(DESTINATION, "exempt"), forget, RETURN, comment="not translated, not sent to edges"),
        rule(is_older, forget, RETURN, comment="older than our care: goes on as it went"),
        rule(has_status(SOURCE_TRANSLATED), forget, RETURN, comment="translated by others before: goes on as it went"),
        rule(has_state(NEW), source_is_elsewhere(), counter(), DROP, comment=_FORGED_WORDS, tag=FORGED_SOURCE),
        rule(has_state(NEW), jump("newcomers")),
    )
    return Chain("outgoing", None, rules)


def _asks(marks: Marks, log_group: int) -> Chain:
    elsewhere = (payload(NETWORK, DESTINATION, 4), compare(ANYCAST.packed, "!="), *is_not_here())
    rules = (
        rule(elsewhere, RETURN, comment="a server somewhere else"),
        # What is mapped leads to the source: never past the bridge that the request came from.
        rule(source_is_elsewhere(), counter(), DROP, comment=_FORGED_WORDS, tag=FORGED_SOURCE),
        rule(*owner(marks), set_lookup("asking-rates"), DROP, comment="too many requests"),
        rule(log_to(log_group), DROP, comment="natd answers"),
    )
    return Chain("asks", None, rules)


def _answers(marks: Marks) -> Chain:
    # Other software may restore the packet's mark from the connection's; then it came through an uplink.
    from_vm = (*is_ours(marks), meta("iifname"), set_lookup("uplinks", negated=True))
    rules = (
        rule(from_vm, mappings.is_to_its_stranger(marks), RETURN, comment="to whom it let in"),
        rule(from_vm, counter(), DROP, comment=_FORGED_WORDS, tag=FORGED_SOURCE),
        rule(forget_vm(marks), comment="no packet to a VM, and no answer of a VM, is managed"),
    )
    return Chain("answers", None, rules)


def _newcomers(marks: Marks, settings: HostSettings) -> Chain:
    destination = payload(NETWORK, DESTINATION, 4, THIRD)
    ported = (*owner(marks), meta("l4proto", SECOND), destination, payload(TRANSPORT, 2, 2, FOURTH))
    query = (*protocol(ICMP), *owner(marks), payload(NETWORK, DESTINATION, 4, SECOND))
    is_capped = (*owner(marks), set_lookup("capped"))
    words = "no port is left for it"
    rules = (
        rule(ported, set_lookup("refused", FIRST), is_capped, refuse(_PROHIBITED), comment=words),
        rule(query, set_lookup("refused-queries", FIRST), is_capped, refuse(_PROHIBITED), comment=words),
        # A connection that is not answered yet is still "new" for connection tracking, but has its port already.
        rule(has_status(CONFIRMED), RETURN, comment="counted when it began"),
        *limits(marks),
        *_deferral(marks, settings),
    )
    return Chain("newcomers", None, rules)


def _deferral(marks: Marks, settings: HostSettings) -> tuple[Rule, ...]:
    if settings.queueing is Queueing.NONE:
        return ()
    queue = queue_to if settings.queueing is Queueing.NATIVE else extension_queue_to
    words = "waits until the VM has more ports"
    return (rule(*owner(marks), set_lookup("deferred"), queue(settings.queue), comment=words),)


def _translate(marks: Marks) -> Chain:
    # Looking an interface up by its name takes longest: once.
    return Chain(
        "translate", Hook("nat", POSTROUTING, 90), (rule(is_managed(marks), to_interface("uplinks"), jump("begun")),)
    )


def _begun(marks: Marks, names: Iterable[str], log_group: int) -> Chain:
    spent = (*owner(marks), set_lookup("budgets"))
    own = (*owner(marks), map_lookup("bindings"), source_nat())
    rules = (
        become_ours(marks),
        *map(timeouts.rule_of, names),
        zones.learn_origin(marks),
        rule(spent, log_to(log_group), comment="an arrival budget is used up"),
        mappings.jump_to_mapped(marks),
        *(rule(protocol(number), own, comment="a port of the VM's own range") for number in _CARRIED),
    )
    return Chain("begun", None, rules)


def _guard(marks: Marks, pool: IPv4Network) -> Chain:
    vouch_for = (meta("mark"), bitwise(native_u32(marks.flag ^ 0xFFFFFFFF)), set_meta("mark"))
    rules = (
        # Every packet passes here: those of no VM, and all replies, are let through first.
        rule(is_not_managed(marks), RETURN),
        mappings.jump_to_learn(marks),
        # What may leave, not what may not: a packet that connection tracking calls invalid has no status.
        rule(has_status(SOURCE_TRANSLATED), in_network(SOURCE, pool), vouch_for, RETURN),
        rule(mappings.is_answer_to_stranger(marks, pool), vouch_for, RETURN),
        older.find_stuck(),
        rule(counter(), DROP, comment="never leaves untranslated", tag=UNTRANSLATED),
    )
    return Chain("guard", filtering(POSTROUTING, 200), rules)


def _errors(marks: Marks) -> Chain:
    flag = native_u32(marks.flag)
    manage = (meta("mark"), bitwise(native_u32(marks.flag ^ 0xFFFFFFFF), flag), set_meta("mark"))
    why = "what we say about a VM's packet goes its way"
    own_errors = rule(protocol(ICMP), has_state(RELATED), is_ours(marks), manage, comment=why)
    return Chain("errors", Hook("route", OUTPUT, -150), (own_errors,))
