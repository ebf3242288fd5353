"""How many connections a VM may begin: its limit holds whatever happens, and one far below it is renewed in time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from natctl.arrivals.allowance import LEAST_PROMISE, ConnectionLimit, TableRoom
from natctl.model.entries import Allowance

AMPLE = TableRoom(1 << 30, [0])


def limited(limit: int = 65536) -> ConnectionLimit:
    made = ConnectionLimit()
    made.on_limit(limit)
    return made


def allowed(limit: ConnectionLimit) -> Allowance:
    assert limit.allowance is not None
    return limit.allowance


def test_a_new_vm_may_begin_what_its_limit_allows_and_no_more() -> None:
    first, more = allowed(limited())
    assert 0.8 * 65536 < first + more <= 65536


def test_without_a_limit_there_is_no_allowance() -> None:
    unlimited = ConnectionLimit()
    assert not unlimited.on_counted(10**6, AMPLE, 10**6, 0)
    assert unlimited.allowance is None
    made = limited()
    made.on_limit(None)
    assert made.allowance is None


def test_a_vm_far_below_its_limit_is_renewed_before_its_connections_are_counted() -> None:
    """Its connections are short: 100 begin each second, 1,000 are there."""
    made, begun, renewals, used = limited(), 0, 0, 0
    for _ in range(10_000):
        begun, used = begun + 100, used + 100
        assert used < allowed(made).first
        if made.on_counted(1000, AMPLE, begun, 0):
            renewals, used = renewals + 1, 0
    assert 10 < renewals < 200


def test_a_vm_at_its_limit_gets_nothing_and_its_kernel_is_left_alone() -> None:
    made = limited(1000)
    assert made.on_counted(1000, AMPLE, 1000, 0)
    assert allowed(made) == Allowance(1, 0)
    assert not any(made.on_counted(1000, AMPLE, 1000, refused) for refused in range(10))


def test_an_allowance_that_was_used_for_nothing_is_renewed() -> None:
    """Tokens were taken by packets that never became connections."""
    made = limited(1000)
    before = allowed(made)
    assert made.on_counted(3, AMPLE, 3, 5)
    assert allowed(made) != before
    assert not made.on_counted(3, AMPLE, 3, 5)


def test_what_natd_found_in_the_kernel_stays_until_a_count() -> None:
    found = ConnectionLimit(Allowance(5000, 5000))
    found.on_limit(65536)
    assert found.allowance == Allowance(5000, 5000)
    assert found.on_counted(10, AMPLE, 10, 0)
    assert allowed(found).first > 20_000


def test_a_lower_limit_is_in_force_at_once() -> None:
    made = limited()
    made.on_counted(500, AMPLE, 500, 0)
    made.on_limit(1024)
    assert sum(allowed(made)) <= 1024 - 500


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 1)), max_size=60), st.integers(1024, 20_000))
def test_whatever_a_vm_does_it_never_has_more_than_its_limit(steps: list[tuple[int, float]], limit: int) -> None:
    """The kernel as it is: tokens first, then as many connections as it counts."""
    made, present, counted, begun, tokens, refused = limited(limit), 0, 0, 0, 0, 0
    tokens = allowed(made).first
    for wanted, kept in steps:
        free = min(wanted, tokens)
        counting = min(wanted - free, max(0, allowed(made).more - counted))
        tokens, counted = tokens - free, counted + counting
        present, begun = present + free + counting, begun + free + counting
        refused += wanted - free - counting
        # A token is the least that the kernel can be given.
        assert present <= limit + len(steps)
        ended = int(present * (1 - kept))
        present, counted = present - ended, max(0, counted - ended)
        if made.on_counted(present, AMPLE, begun, refused):
            tokens, counted = allowed(made).first, 0


class _Kernel:
    """The kernel as it is: tokens first, then as many connections as it counts."""

    def __init__(self, allowance: Allowance) -> None:
        self.present = self.begun = self.refused = 0
        self.program(allowance)

    def program(self, allowance: Allowance) -> None:
        """Hold another allowance: what was used of the former one is forgotten."""
        self._tokens, self._more, self._counted = allowance.first, allowance.more, 0

    def attempt(self, wanted: int) -> int:
        """Begin as many of these connections as the allowance lets; return how many began."""
        free = min(wanted, self._tokens)
        counting = min(wanted - free, max(0, self._more - self._counted))
        self._tokens, self._counted = self._tokens - free, self._counted + counting
        self.present, self.begun = self.present + free + counting, self.begun + free + counting
        self.refused += wanted - free - counting
        return free + counting

    def end(self, kept: float) -> None:
        """End connections, those that were counted first; so the kernel lets most begin."""
        ended = int(self.present * (1 - kept))
        self.present, self._counted = self.present - ended, max(0, self._counted - ended)


@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 30_000), st.floats(0, 1)), max_size=60),
    st.integers(1024, 20_000),
)
def test_what_begins_between_a_count_and_its_allowance_bounds_what_exceeds_a_limit(
    steps: list[tuple[int, int, float]], limit: int
) -> None:
    """With L the limit, C the count and b what begins meanwhile: L, or b - (L - C) / 8 more; and less than twice L."""
    made = limited(limit)
    kernel = _Kernel(allowed(made))
    for wanted, meanwhile, kept in steps:
        kernel.attempt(wanted)
        assert kernel.present < 2 * limit
        kernel.end(kept)
        count, begun, refused = kernel.present, kernel.begun, kernel.refused
        between = kernel.attempt(meanwhile)
        if not made.on_counted(count, AMPLE, begun, refused):
            continue
        kernel.program(allowed(made))
        kernel.attempt(100_000)
        # A token is the least that the kernel can be given.
        excess = max(0.0, between - (limit - count) / 8) if count < limit else count - limit + between
        assert kernel.present <= limit + excess + 1
        assert kernel.present < 2 * limit


def test_a_full_table_leaves_each_vm_its_part() -> None:
    """Half of what is not the machine's is promised in equal parts, the other half goes to whoever needs it."""
    size, quiet = 262_144, [10] * 9
    hogs: list[int] = [0] * 20
    for _ in range(300):
        room = TableRoom(size, [*hogs, *quiet])
        # One after the other, as they are counted.
        for at in range(len(hogs)):
            hogs[at] = max(hogs[at], room.limit(65536, hogs[at]))
            room = TableRoom(size, [*hogs, *quiet])
    room = TableRoom(size, [*hogs, *quiet])
    assert room.limit(65536, 10) >= room.promised == (size - size // 8) // 2 // 29
    assert sum(hogs) + 9 * room.promised <= size - size // 8


def test_in_an_ample_table_one_vm_may_have_its_whole_limit() -> None:
    room = TableRoom(262_144, [40_000, 10, 10])
    assert room.limit(65536, 40_000) > 55_000
    assert TableRoom(262_144, [60_000, 10, 10]).limit(65536, 60_000) == 65536


def test_a_table_too_small_for_its_vms_is_named() -> None:
    assert TableRoom(262_144, [0] * 100).warning(262_144) == ""
    text = TableRoom(262_144, [0] * 300).warning(262_144)
    assert "262144 entries" in text
    assert "raise net.netfilter.nf_conntrack_max" in text
    assert TableRoom(262_144, [0] * 300).promised < LEAST_PROMISE
