"""
Compares a kernel with what it was programmed with, without holding up changes.

Tested by ``tests/netns/test_changes.py``.
"""

from __future__ import annotations

from natctl import ruleset
from natctl.kernel.belief import Belief, lasts, postponed_collection
from natctl.kernel.programmed import Programmed
from natctl.netlink import routes
from natctl.netlink.changes import Subject
from natctl.netlink.nftables import read
from natctl.ruleset import plan, routing
from natctl.ruleset.values import with_fragments


def differs(kernel: Programmed, subjects: Subject) -> bool:
    """
    Return whether the kernel seems to hold something else than we believe; changes go on meanwhile.

    :param subjects: What to compare.
    :raise KernelError: When it cannot be read.
    """
    belief, sockets = kernel.belief, kernel.sockets()
    if belief is None:
        return False
    pool = belief.desired.path.internal_pool
    if Subject.ADDRESSES in subjects and kernel.pool_uses.may_differ(sockets.rt_checks, pool):
        return True
    if Subject.ADDRESSES in subjects and kernel.own.may_differ(sockets.rt_checks):
        return True
    if Subject.LINKS in subjects and kernel.gateways(sockets.rt_checks) != kernel.settings.gateways:
        return True
    if kernel.do_own_targets_differ(belief) or _do_tables_differ(kernel, belief):
        return True
    return bool(subjects & Subject.ROUTES) and _do_routes_differ(kernel, belief)


def _do_tables_differ(kernel: Programmed, belief: Belief) -> bool:
    sockets, changes_made = kernel.sockets(), kernel.changes_made
    if (touches := sockets.changes.touches()) == belief.touches:
        return False
    reading = read.read_tables(sockets.nft_checks, kernel.state_of_tables)
    base = ruleset.base(kernel.settings, belief.desired.path, belief.layout)
    with postponed_collection():
        fragments = [*belief.fragments(), *kernel.senders.fragments()]
        difference = plan.difference(with_fragments(base, fragments), reading.holdings)
    if difference.operations or kernel.changes_made != changes_made:
        return True
    belief.touches = touches
    return False


def _do_routes_differ(kernel: Programmed, belief: Belief) -> bool:
    before = kernel.routing_of(belief.desired)
    now = routes.read(kernel.sockets().rt_checks)
    earlier = routing.steps(before, now)
    return lasts(earlier, earlier) and lasts(earlier, routing.steps(kernel.routing_of(belief.desired), now))
