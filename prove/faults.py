"""
Mendings that are taken back, one by one, to show that stories find what each of them mended.

How is in :mod:`prove.reverting`. ``docs/reference/proof.md`` has the table of them; ``python -m prove.table`` makes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prove import reverting
from prove.story import Kind

Revert = Callable[[], contextlib.AbstractContextManager[None]]
LATER_KINDS: Final = frozenset(
    {Kind.APPROVE, Kind.BACKUP, Kind.BREAK, Kind.COPY, Kind.IMPOSTOR, Kind.LIE, Kind.RESTORE}
)
"""Kinds that stories did not have at first. Without them some faults are found sooner."""
NEWEST_KINDS: Final = frozenset({Kind.EDGE_LIES, Kind.RELOAD})
"""Kinds that the seeds of most faults do not have: with them, a seed is another story."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What was wrong before a mending."""

    commit: str
    """That mended it; empty: it was right from the first version on."""
    seed: int
    """Of a story that finds it."""
    revert: Revert
    """Puts it back; its docstring says what it was."""
    without: frozenset[Kind] = NEWEST_KINDS
    """Kinds of events that the story does without."""

    @property
    def what(self) -> str:
        """A sentence."""
        return " ".join((self.revert.__doc__ or "").split())


FAULTS: Final[Mapping[str, Fault]] = {
    "fence-stays": Fault("b3db1dd", 136, reverting.fence_stays),
    "former-life": Fault("8dbd8dc", 65, reverting.former_life),
    "reserved-taken-away": Fault("465174b", 157, reverting.reserved_taken_away),
    "uncommitted-step": Fault("362f557", 300, reverting.uncommitted_step),
    "back-not-asked": Fault("7751c7c", 180, reverting.back_not_asked),
    "announced": Fault("071f28a", 161, reverting.announced),
    "unplugged-is-gone": Fault("d235629", 110, reverting.unplugged_is_gone),
    "waiting-not-forgotten": Fault("62fe327", 1306, reverting.waiting_not_forgotten),
    "arrived-is-gone": Fault("2039faf", 1886, reverting.arrived_is_gone),
    "edge-waited-for-ever": Fault("340db5b", 17, reverting.edge_waited_for_ever),
    "connected-edges-only": Fault("340db5b", 96, reverting.connected_edges_only),
    "any-machine": Fault("a59ca98", 38, reverting.any_machine),
    "second-natd": Fault("a59ca98", 18, reverting.second_natd),
    "not-taken-in": Fault("7dabc15", 74, reverting.not_taken_in),
    "not-waited-for": Fault("7dabc15", 74, reverting.not_waited_for),
    "no-twins": Fault("703934b", 1236, reverting.no_twins),
    "no-twins-at-edges": Fault("", 1236, reverting.no_twins_at_edges),
    "leaps-by-clock": Fault("", 7495, reverting.leaps_by_clock),
    "former-generation": Fault("7c809f8", 2, reverting.former_generation, LATER_KINDS | NEWEST_KINDS),
    "replaced-not-held": Fault("56f9180", 1461, reverting.replaced_not_held, LATER_KINDS | NEWEST_KINDS),
    "wall-clock": Fault("d504fc5", 323, reverting.wall_clock, LATER_KINDS | NEWEST_KINDS),
    "changed-after-hello": Fault("467b4ec", 7, reverting.changed_after_hello),
    "edge-not-known": Fault("d8bdf06", 1000830, reverting.edge_not_known),
    "given-up-handed-out": Fault("ea4835a", 1001586, reverting.given_up_handed_out),
    "refusing-edge-serves": Fault("ea4835a", 1001329, reverting.refusing_edge_serves),
    "welcome-dropped": Fault("b07e5b3", 526, reverting.welcome_dropped, frozenset()),
    "taken-back-let-go": Fault("ea4835a", 1002307, reverting.taken_back_let_go),
    "contradicting-edges": Fault("af1a0f7", 2001794, reverting.contradicting_edges, frozenset()),
    "copy-catches-up": Fault("dc61db2", 2001674, reverting.copy_catches_up, frozenset()),
    "fenced-told-first": Fault("416da65", 3000476, reverting.fenced_told_first, frozenset()),
    "fenced-deltas-first": Fault("b0ffc5e", 3005002, reverting.fenced_deltas_first, frozenset()),
    "fenced-while-restoring": Fault("e51b7f8", 3011474, reverting.fenced_while_restoring, frozenset()),
    "former-life-adopted": Fault("cefec58", 10447, reverting.former_life_adopted, frozenset()),
    "list-of-before": Fault("cefec58", 202828, reverting.list_of_before, frozenset()),
    "twin-not-named": Fault("4c19135", 2295, reverting.twin_not_named),
    "twin-not-restored": Fault("4c19135", 6535, reverting.twin_not_restored),
    "fences-restored": Fault("e3f16c5", 1000675, reverting.fences_restored, frozenset()),
    "fenced-destination": Fault("e3f16c5", 4018348, reverting.fenced_destination, frozenset()),
    "forward-before-ranges": Fault("7b25864", 4020175, reverting.forward_before_ranges, frozenset()),
    "no-counts": Fault("", 50, reverting.no_counts),
    "away-not-asked": Fault("", 3, reverting.away_not_asked),
    "no-hold-down": Fault("", 33, reverting.no_hold_down),
}
"""By name."""


@contextlib.contextmanager
def reverted(name: str) -> Iterator[None]:
    """Take one mending back; an empty name: none."""
    with FAULTS[name].revert() if name else contextlib.nullcontext():
        yield
