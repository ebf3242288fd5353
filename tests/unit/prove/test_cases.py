"""Stories that were shrunk to a few events, each of which failed before what it shows was mended."""

from __future__ import annotations

import pytest

from prove.machine import Broken
from prove.runner import run
from prove.story import Event, Kind, Story
from prove.world import World

ALL = 11
"""As the number of messages: more than there are."""


def story(*events: Event, site: str = "apart", externals: int = 1, late: str = "") -> Story:
    return Story(1, externals, events, site, late)


STORIES = {
    "a VM restarted beside its lost host, on a machine that is an edge as well": story(
        Event(Kind.START, "both2", 5),
        Event(Kind.DELIVER_UP, "both1"),
        Event(Kind.BREAK, "both2", n=list(Broken).index(Broken.GONE)),
        Event(Kind.START, "both1", 5),
        site="both",
    ),
    "a ledger restored twice, the clock set back between": story(
        Event(Kind.BACKUP),
        Event(Kind.RESTORE),
        Event(Kind.CLOCK),
        Event(Kind.SETTLE),
        *(Event(Kind.CONNECT, "edge2") for _ in range(3)),
        Event(Kind.DELIVER_UP, "edge2", n=7),
        Event(Kind.RESTORE, n=10),
    ),
    "a VM to be moved to other ports while a restored ledger waits": story(
        Event(Kind.START, "both2", 1),
        Event(Kind.SETTLE),
        Event(Kind.RESIZE, vm=1),
        Event(Kind.RESTORE, n=8),
        Event(Kind.RELOCATE, vm=1),
        site="both",
    ),
    "a natd that begins anew on a host that is an edge, and whose first change is refused": story(
        *(Event(Kind.START, "both1", 1), Event(Kind.SETTLE), Event(Kind.KILL_NATD, "both1")),
        *(Event(Kind.STOP, "both1", 1), Event(Kind.START, "both1", 1), Event(Kind.REFUSE, "both1")),
        *(Event(Kind.START_NATD, "both1"), Event(Kind.SETTLE), Event(Kind.OPEN, vm=1)),
        site="both",
    ),
    "a VM that ends while the disk does not work, before the edges know its first range": story(
        *(Event(Kind.KILL_NATD, "host1"), Event(Kind.START, "host1", 1), Event(Kind.KILL_CPMD)),
        *(Event(Kind.START_NATD, "host1"), Event(Kind.START_CPMD), Event(Kind.CONNECT, "host1")),
        *(Event(Kind.SETTLE), Event(Kind.DISK_FULL, vm=1), Event(Kind.STOP, "host1", 1), Event(Kind.SETTLE)),
        *(Event(Kind.START, "host1", 1), Event(Kind.CONNECT, "host1"), Event(Kind.SETTLE), Event(Kind.OPEN, vm=1)),
    ),
    "a VM that takes back what drains, once the disk is not full any more": story(
        *(Event(Kind.START, "both1", 4), Event(Kind.SETTLE), Event(Kind.KILL_NATD, "both1", n=1)),
        *(Event(Kind.STOP, "both1", 4), Event(Kind.SETTLE), Event(Kind.START, "both1", 4)),
        *(Event(Kind.DISK_FULL, vm=4), Event(Kind.START_NATD, "both1"), Event(Kind.KERNEL, "both1")),
        *(Event(Kind.OPEN, vm=4), Event(Kind.CONNECT, "both1"), Event(Kind.SETTLE), Event(Kind.PASS, n=6)),
        *(Event(Kind.SETTLE), Event(Kind.PRESENT, "both1"), Event(Kind.SETTLE)),
        site="both",
    ),
    "a session that ends while a VM takes back ports of which it still uses some": story(
        *(Event(Kind.START, "host1", 2), Event(Kind.SETTLE), Event(Kind.OPEN, vm=2, n=1)),
        *(Event(Kind.FLUSH, "host1"), Event(Kind.RESIZE, vm=2), Event(Kind.RESIZE, vm=2, n=4)),
        Event(Kind.KILL_NATD, "host1"),
    ),
    "a cpmd that ends while a VM that is back takes back all its ports": story(
        *(Event(Kind.START, "host1", 2), Event(Kind.SETTLE), Event(Kind.STOP, "host1", 2)),
        *(Event(Kind.KILL_NATD, "host1", ALL), Event(Kind.START, "host1", 2), Event(Kind.START_NATD, "host1")),
        *(Event(Kind.KERNEL, "host1"), Event(Kind.OPEN, vm=2), Event(Kind.DELIVER_UP, "host1")),
        *(Event(Kind.DISK_FULL, vm=2), Event(Kind.CONNECT, "host1"), Event(Kind.SETTLE), Event(Kind.KILL_CPMD)),
    ),
    "a machine that hangs and is fenced with a VM whose ports nobody has confirmed, when there is no other": story(
        *(
            Event(Kind.POWER_OFF, "both2"),
            Event(Kind.SETTLE),
            Event(Kind.FENCE, "both1"),
            Event(Kind.BREAK, "both1", n=1),
        ),
        *(Event(Kind.START, "both1", 1), Event(Kind.DELIVER_UP, "both1"), Event(Kind.PASS, n=10)),
        Event(Kind.FENCE, "both1"),
        site="both",
    ),
    "an edge that refuses the VM of which no other kernel has anything any more": story(
        *(Event(Kind.REFUSE, "edge2", n=7), Event(Kind.LOSE_AT_NODE, "edge2"), Event(Kind.SETTLE)),
        *(Event(Kind.START, "host1", 2), Event(Kind.PASS, n=9), Event(Kind.SETTLE), Event(Kind.CONNECT, "edge2")),
        *(Event(Kind.POWER_OFF, "edge1"), Event(Kind.DELIVER_UP, "edge2", n=1), Event(Kind.FENCE, "edge1")),
        *(Event(Kind.SETTLE), Event(Kind.OPEN, vm=2)),
    ),
    "a VM that is back on a host whose kernel would not let go of it, and whose natd begins anew": story(
        *(
            Event(Kind.LIBVIRT, "host1"),
            Event(Kind.START, "host1", 1),
            Event(Kind.SETTLE),
            Event(Kind.REFUSE, "host1", n=2),
        ),
        *(Event(Kind.KILL_CPMD, n=5), Event(Kind.KILL_NATD, "host1", n=6), Event(Kind.COPY, "host2", 1)),
        *(Event(Kind.STOP, "host1", 1, 2), Event(Kind.SETTLE), Event(Kind.START_CPMD), Event(Kind.SETTLE)),
        *(Event(Kind.CONNECT, "host1"), Event(Kind.SETTLE), Event(Kind.START_NATD, "host1")),
        *(Event(Kind.START, "host1", 1), Event(Kind.SETTLE), Event(Kind.HOLD_ALL, vm=1)),
    ),
    "a VM that stops while it migrates, and is back where it was before that was heard": story(
        *(Event(Kind.START, "both1", 1), Event(Kind.MIGRATE, "both2", 1), Event(Kind.SETTLE), Event(Kind.STOP, vm=1)),
        *(Event(Kind.KILL_NATD, "both1", 1), Event(Kind.START, "both1", 1), Event(Kind.START_NATD, "both1")),
        *(Event(Kind.KERNEL, "both1"), Event(Kind.OPEN, vm=1), Event(Kind.DELIVER_UP, "both1", 1)),
        *(Event(Kind.CONNECT, "both1"), Event(Kind.DELIVER_UP, "both1", 1)),
        site="both",
        externals=2,
    ),
    "a VM that is back on its former host, whose kernel would not let go of it, when edges send to another": story(
        *(
            Event(Kind.LIBVIRT, "host1"),
            Event(Kind.START, "host1", 1),
            Event(Kind.SETTLE),
            Event(Kind.REFUSE, "host1", 1, 2),
        ),
        *(Event(Kind.KILL_CPMD, n=5), Event(Kind.KILL_NATD, "host1", n=6), Event(Kind.COPY, "host2", 1)),
        *(Event(Kind.STOP, vm=1), Event(Kind.SETTLE), Event(Kind.SETTLE), Event(Kind.START_CPMD)),
        *(Event(Kind.CONNECT, "host1"), Event(Kind.CONNECT, "host1"), Event(Kind.STOP, vm=1), Event(Kind.SETTLE)),
        *(Event(Kind.START_NATD, "host1"), Event(Kind.CONNECT, "host1"), Event(Kind.START, "host1", 1)),
        *(Event(Kind.SETTLE), Event(Kind.HOLD_ALL, vm=1)),
    ),
    "a VM that stops on two hosts at once while the only edge is fenced, and has a session still": story(
        *(Event(Kind.REBOOT_MANAGER), Event(Kind.DELIVER_DOWN, "edge1", 1), Event(Kind.START, "host1", 1)),
        *(Event(Kind.START_CPMD), Event(Kind.CONNECT, "edge1", 1), Event(Kind.DELIVER_UP, "edge1", 1)),
        *(Event(Kind.LIBVIRT, "host1", 1), Event(Kind.DELIVER_DOWN, "host1", 1), Event(Kind.STOP_UNSEEN, "host1", 1)),
        *(Event(Kind.PASS, n=8), Event(Kind.START, "host2", 1), Event(Kind.CONNECT, "host1", 1)),
        *(Event(Kind.POWER_OFF, "edge1", 1), Event(Kind.FENCE, "edge1", 1), Event(Kind.PARTITION, "edge1", 1)),
        *(Event(Kind.SETTLE), Event(Kind.CONNECT, "edge1", 1), Event(Kind.CONNECT, "edge1", 1)),
        *(Event(Kind.MIGRATE, "host1", 1), Event(Kind.STOP, "host1", 1), Event(Kind.SETTLE)),
        late="edge2",
    ),
    "a natd that begins without libvirt on a machine whose ruleset was flushed": story(
        *(Event(Kind.LIBVIRT, "both1"), Event(Kind.START, "both1", 5), Event(Kind.SETTLE), Event(Kind.RESIZE, vm=5)),
        *(Event(Kind.OPEN, vm=5), Event(Kind.KILL_NATD, "both1"), Event(Kind.FLUSH, "both1")),
        Event(Kind.START_NATD, "both2"),
        site="both",
    ),
    "a host that hangs and is fenced while a restored ledger waits": story(
        *(Event(Kind.BREAK, "host2", n=4), Event(Kind.START, "host2", 2), Event(Kind.RESTORE, n=2)),
        *(Event(Kind.DELIVER_DOWN, "host2"), Event(Kind.CONNECT, "host1"), Event(Kind.DELIVER_UP, "host1")),
        Event(Kind.FENCE, "host1"),
    ),
    "an operator who gives ports by an old copy before any edge has shown that it is one": story(
        *(Event(Kind.START, "host1", 1), Event(Kind.SETTLE), Event(Kind.BACKUP)),
        *(Event(Kind.START, "host1", 2), Event(Kind.SETTLE), Event(Kind.RESTORE, n=1), Event(Kind.RESIZE, vm=1, n=10)),
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_it_goes_well(name: str) -> None:
    assert run(STORIES[name]).violation == ""


def test_a_connection_of_a_vm_beside_another_one_is_judged_as_that_of_a_vm_of_its_own() -> None:
    begun: list[tuple[str, bool]] = []

    def tell(world: World, event: Event) -> None:
        begun[:] = [(flow.host, flow.domain == flow.guest) for flow in world.judge.all_flows]

    pass_s = (Event(Kind.PASS, n=7), Event(Kind.PASS, n=7), Event(Kind.SETTLE))
    events = (
        *(Event(Kind.START, "both1", 1), Event(Kind.SETTLE), Event(Kind.OPEN, vm=1)),
        *(Event(Kind.PARTITION, "both1"), Event(Kind.LOSE_AT_MANAGER, "both1"), Event(Kind.COPY, "both2", 1)),
        *(Event(Kind.SETTLE), Event(Kind.PRESENT, "both2"), *pass_s, Event(Kind.OPEN, vm=1), Event(Kind.SETTLE)),
    )
    assert run(story(*events, site="both"), tell).violation == ""
    assert sorted(begun) == [("both1", True), ("both2", False)]


def test_a_second_machine_and_a_second_natd_are_refused_while_the_first_goes_on() -> None:
    events = (
        *(Event(Kind.START, "host1", 1), Event(Kind.SETTLE), Event(Kind.OPEN, vm=1)),
        *(Event(Kind.IMPOSTOR, name, n=n) for name in ("host1", "edge1") for n in (0, 1)),
        Event(Kind.SETTLE),
    )
    assert run(story(*events)).violation == ""


@pytest.mark.parametrize("how", range(len(Broken)))
@pytest.mark.parametrize("node", ["host1", "edge1"])
def test_what_is_broken_holds_up_nobody_else(node: str, how: int) -> None:
    events = (Event(Kind.BREAK, node, n=how), Event(Kind.START, "host2", 1), Event(Kind.SETTLE))
    assert run(story(*events)).violation == ""
