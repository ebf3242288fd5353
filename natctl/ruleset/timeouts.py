"""
The timeouts of managed connections: ``ct timeout`` objects, for TCP, for UDP, and for DNS over UDP.

``nft`` reads no such object for ICMP, although it prints one: the timeout of ICMP queries is a setting of the machine
(:mod:`natctl.kernel.sysctl`), and the name of UDP's object says it, too, so that it can be read back.

A ``ct timeout`` object has its seconds in its name. Other seconds are another object, and the rules of ``begun`` are
exchanged; the former object stays until the table goes, since removing it would give the connections that use it
back to the system's timeouts (``nf_ct_untimeout``).

In nftables' notation, the last that matches counts (``nft_ct_timeout_obj_eval``)::

    ct timeout set "managed-tcp-7440-240-120-10"
    ct timeout set "managed-udp-120-icmp-60"
    udp dport 53 ct timeout set "managed-dns-30"

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

from typing import Final

from cpm.protocol.timeouts import Timeouts
from natctl.model.entries import HostSettings, Path
from natctl.model.flow import TCP, UDP
from natctl.ruleset.common import protocol, rule
from natctl.ruleset.expressions import TRANSPORT, compare, ct_timeout, payload
from natctl.ruleset.values import CT_TIMEOUTS, CtTimeout, Expression, Family, Holdings, Place, Rule

BEGUN: Final[Place] = (Family.IPV4, "begun")
"""The chain that gives new connections their timeouts."""

_AND_ICMP = "-icmp-"
_TCP_OPENING, _TCP_ESTABLISHED, _TCP_TIME_WAIT, _TCP_CLOSE = 0, 2, 6, 7
"""Places in the list of TCP's states that :func:`objects` names."""
_DNS_PORT = 53
_DNS: Final = f"{CT_TIMEOUTS}dns-"


def objects(timeouts: Timeouts) -> dict[Place, CtTimeout]:
    """Return the ``ct timeout`` objects for these timeouts, in the order of their rules."""
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
        f"tcp-{established}-{transitory}-{timeouts.tcp_time_wait_s}-{timeouts.tcp_reset_s}": CtTimeout(TCP, tcp),
        f"udp-{timeouts.udp_s}{_AND_ICMP}{timeouts.icmp_s}": CtTimeout(UDP, (timeouts.udp_s, timeouts.udp_s)),
        f"dns-{timeouts.dns_s}": CtTimeout(UDP, (timeouts.dns_s, timeouts.dns_s)),
    }
    return {(Family.IPV4, CT_TIMEOUTS + name): timeout for name, timeout in by_name.items()}


def in_effect(settings: HostSettings, path: Path | None) -> Timeouts:
    """Return the timeouts of this host's VMs: its own settings, else the pool's."""
    return settings.timeouts.override((path and path.timeouts) or Timeouts())


def rule_of(name: str) -> Rule:
    """Return the rule that gives a connection the timeouts of this object, if it is one that the object is for."""
    return rule(_to_dns(), ct_timeout(name)) if name.startswith(_DNS) else rule(ct_timeout(name))


def timeouts_in(holdings: Holdings) -> Timeouts | None:
    """Return the timeouts that new connections get; None: there is nothing of ours."""
    rules = holdings.chains[BEGUN].rules if BEGUN in holdings.chains else ()
    in_force = {
        (timeout.protocol, name.startswith(_DNS)): (name, timeout.seconds)
        for (_, name), timeout in holdings.ct_timeouts.items()
        if timeout is not None and rule_of(name).digest in rules
    }
    if not in_force.keys() >= {(TCP, False), (UDP, False)}:
        return None
    (_, tcp), (name, udp) = in_force[TCP, False], in_force[UDP, False]
    icmp_s = name.partition(_AND_ICMP)[2]
    if not icmp_s.isdecimal():
        return None
    # An older natd had no rule for DNS: its successor begins with the default.
    _, dns = in_force.get((UDP, True), ("", (Timeouts().dns_s,)))
    return Timeouts(
        tcp_established_s=tcp[_TCP_ESTABLISHED],
        tcp_transitory_s=tcp[_TCP_OPENING],
        tcp_time_wait_s=tcp[_TCP_TIME_WAIT],
        tcp_reset_s=tcp[_TCP_CLOSE],
        udp_s=udp[0],
        icmp_s=int(icmp_s),
        dns_s=dns[0],
    )


def _to_dns() -> tuple[Expression, ...]:
    """``udp dport 53``"""
    return *protocol(UDP), payload(TRANSPORT, 2, 2), compare(_DNS_PORT.to_bytes(2, "big"))
