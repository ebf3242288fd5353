"""
The host role: connections that a VM began before it was managed, and that nobody has answered.

Such a connection has no port of the VM's, and cannot get one any more: the nat chains see the first packet only. Each
further packet finds the same entry, which therefore never times out, and is dropped by ``guard``. So ``guard`` reports
the packet, natd deletes the entry (:func:`natctl.netlink.conntrack.delete_unanswered`), and the next packet begins a
new connection, translated like any other. In nftables' notation::

    table ip virtports {
      set older { type mark; size 65536; flags dynamic,timeout; timeout 1m; limit rate 20/second burst 20 packets }
      chain outgoing { …
        ct status snat meta mark set meta mark & ~MASK return }
      chain guard { …
        ct status confirmed jump stuck
        counter drop }
      chain stuck {
        ct status seen-reply,snat return
        ct original zone 0 add @older { meta mark & MASK } log group 7415
        ct original zone != 0 add @older { meta mark & MASK } log prefix "zone" group 7415 }
    }

- The first packet of a connection is not confirmed here yet, so what is reported is a connection that is older than
  the packet, and that no packet of the VM can revive. What leads here otherwise (no ports, a route that leads past the
  uplinks) is dropped before it is confirmed, and leaves no entry.
- A connection that somebody answered goes on as it went, and so does one that somebody else translated (the host's
  masquerade), answered or not: ``outgoing``.
- ``older`` lets each VM report so many packets a second: a guest with many such connections neither keeps natd busy
  nor takes the turn of another VM.
- The report has the packet's headers and says whether its entry is in the VM's zone, or in none. So a guest that claims
  a neighbour's source address can have no entry deleted but the one that its packet was in: of no VM with a zone
  (:mod:`natctl.ruleset.zones`), answered and translated by nobody, and not to this host or to an exempt destination. An
  answer that comes after all finds its way by its destination, as it did before, since nothing was translated.

Tested in ``tests/netns/test_older.py`` and ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

from typing import Final

from natctl.ruleset.common import MARK, owner, rule
from natctl.ruleset.connections import CONFIRMED, SEEN_REPLY, SOURCE_TRANSLATED, has_status
from natctl.ruleset.expressions import FIRST, add_to_set, compare, ct_zone, log_to
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import RETURN, Chain, Family, Place, Rule, SetSpec, jump

OLDER: Final[Place] = (Family.IPV4, "older")
"""Expiring, see :data:`~natctl.ruleset.values.EXPIRING`."""

IN_ZONE: Final = "zone"
"""Prefix of a report about a connection in the VM's own zone."""

_REPORTS_PER_S: Final = 20
_FORGET_S, _MOST_VMS = 60, 65536


SETS: Final[dict[Place, SetSpec]] = {
    OLDER: SetSpec("older", (MARK,), learning_s=_FORGET_S, room=_MOST_VMS, per_s=_REPORTS_PER_S)
}


def find_stuck() -> Rule:
    """Return the rule that finds, among the packets that ``guard`` drops, those which an older entry holds up."""
    return rule(has_status(CONFIRMED), jump("stuck"), comment="began before our care")


def chain(marks: Marks, log_group: int) -> Chain:
    """Return the chain that reports them; natd finds the entry by the packet's headers and its zone."""
    pace = (*owner(marks), add_to_set("older", FIRST))
    rules = (
        rule(has_status(SEEN_REPLY | SOURCE_TRANSLATED), RETURN),
        rule(ct_zone(), compare(bytes(2)), pace, log_to(log_group)),
        rule(ct_zone(), compare(bytes(2), "!="), pace, log_to(log_group, IN_ZONE)),
    )
    return Chain("stuck", None, rules)
