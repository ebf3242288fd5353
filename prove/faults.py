"""
Mendings that are taken back, one by one, to show that stories find what each of them mended.

Each is a change of one or two functions while a context is open. It fails when what it changes is no longer there, so
it cannot go stale unseen. ``docs/reference/proof.md`` has the table of them; ``python -m prove.table`` makes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from cpm.core.changes import PutNode
from cpm.core.manager import Manager
from cpm.core.presence import VMPresence
from cpm.core.rollout import desired_state, steps
from cpm.core.rollout.steps import Rollout
from cpm.protocol.model import AllocationState
from cpm.serving.ledger_clock import LedgerClock
from cpm.serving.node_sessions import NodeConnections
from natctl.core.ended import Ended
from natctl.core.following import Following, NotWelcomed
from natctl.core.node import Node
from natctl.core.programming import InForce, Programming
from natctl.model.remembered import Remembered

Revert = Callable[[], contextlib.AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What was wrong before a mending."""

    what: str
    """A sentence."""
    commit: str
    """That mended it; empty: it was right from the first version on."""
    seed: int
    """Of a story that finds it."""
    revert: Revert


@contextlib.contextmanager
def _changed(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _fence_stays() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        def on_hello(self: Manager, hello: Any, *rest: Any) -> None:
            known = self.fleet.nodes.get(hello.node)
            original(self, hello, *rest)
            if known is not None and known.fenced:
                self.fleet.record(PutNode(dataclasses.replace(self.fleet.nodes[hello.node], fenced=True)))

        return on_hello

    def make_is_fenced(_: Any) -> Any:
        def is_fenced(self: Rollout, name: Any) -> bool:
            return self._fleet.nodes[name].fenced and name not in self._node_syncs

        return is_fenced

    return _both(_changed(Manager, "on_hello", make), _changed(Rollout, "_is_fenced", make_is_fenced))


def _former_generation() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        def drop_generations(self: Programming) -> None:
            generation = self._in_force.generation
            original(self)
            self._in_force = InForce(self._in_force.session, generation)

        return drop_generations

    def make_report(original: Any) -> Any:
        def report(
            self: Node, period_s: Any, rates: Any, use: Any, in_force: InForce, *rest: Any, **named: Any
        ) -> None:
            original(self, period_s, rates, use, InForce(self.in_force.session, in_force.generation), *rest, **named)

        return report

    return _both(_changed(Programming, "drop_generations", make), _changed(Node, "report", make_report))


def _reserved_taken_away() -> contextlib.AbstractContextManager[None]:
    return _changed(Rollout, "on_host_uses", lambda _: lambda self, reserved: None)


def _uncommitted_step() -> contextlib.AbstractContextManager[None]:
    def go_on_from(self: Manager, former: Manager) -> None:
        for number in former._rollout.in_use_unconfirmed:
            mine = self.fleet.allocation(number)
            if mine is not None and mine.state is AllocationState.RESERVED:
                self._rollout.on_host_uses(number)

    return _changed(Manager, "go_on_from", lambda _: go_on_from)


def _replaced_not_held() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        def host_vm(fleet: Any, vm: Any, *rest: Any) -> Any:
            intent = original(fleet, vm, *rest)
            active = fleet.one(vm.uuid, AllocationState.ACTIVE)
            if intent is None or active is None:
                return intent
            rest_of = tuple(ports for ports in intent.draining if ports != active.ports)
            return type(intent)(
                **{name: getattr(intent, name) for name in intent.__struct_fields__} | {"draining": rest_of}
            )

        return host_vm

    return _changed(desired_state, "host_vm", make)


def _wall_clock() -> contextlib.AbstractContextManager[None]:
    def compare(self: LedgerClock, manager: Manager) -> float:
        return self.now()

    def now(self: LedgerClock) -> float:
        from cpm.service import clock

        return clock.wall().seconds

    return _both(_changed(LedgerClock, "compare", lambda _: compare), _changed(LedgerClock, "now", lambda _: now))


def _former_life() -> contextlib.AbstractContextManager[None]:
    return _changed(Ended, "of_this_life", lambda _: lambda self, vms, detached: tuple(vms))


def _announced() -> contextlib.AbstractContextManager[None]:
    return _changed(VMPresence, "_runs_elsewhere", lambda _: lambda self, vm, node: False)


def _unplugged_is_gone() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        def init(self: Node, identity: Any, marks: int, *, has_libvirt: bool = False) -> None:
            original(self, identity, marks, has_libvirt=False)

        return init

    return _changed(Node, "__init__", make)


def _no_counts() -> contextlib.AbstractContextManager[None]:
    return _changed(steps, "IDLE_REPORTS", lambda _: 0)


def _away_not_asked() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        def lacks(self: Rollout, leaving: Any, now: float) -> Any:
            since, missing = original(self, leaving, now)
            return since, tuple(name for name in missing if name in self._node_syncs)

        return lacks

    return _changed(Rollout, "lacks", make)


def _welcome_dropped() -> contextlib.AbstractContextManager[None]:
    def make_resume(original: Any) -> Any:
        def resume(self: NodeConnections, manager: Manager, now: float) -> Any:
            for session in self._sessions.values():
                session.welcome = None
            return original(self, manager, now)

        return resume

    def make_on_message(original: Any) -> Any:
        def on_message(self: Following, message: Any) -> None:
            try:
                original(self, message)
            except NotWelcomed:
                self.remembered = Remembered(message.epoch, self.told)

        return on_message

    return _both(_changed(NodeConnections, "resume", make_resume), _changed(Following, "on_message", make_on_message))


def _back_not_asked() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        def lacks(self: Rollout, leaving: Any, now: float) -> Any:
            since, missing = original(self, leaving, now)
            if leaving.state is AllocationState.HELD:
                missing = tuple(name for name in missing if name in self._fleet.edges)
            return since, missing

        return lacks

    return _changed(Rollout, "lacks", make)


def _no_hold_down() -> contextlib.AbstractContextManager[None]:
    return _changed(Rollout, "_hold_down_end", lambda _: lambda self, held: held.since)


@contextlib.contextmanager
def _both(
    one: contextlib.AbstractContextManager[None], other: contextlib.AbstractContextManager[None]
) -> Iterator[None]:
    with one, other:
        yield


FAULTS: Final[Mapping[str, Fault]] = {
    "fence-stays": Fault(
        "A fence that nobody took back was applied again at every later loss of the node's session.",
        "b3db1dd",
        1642,
        _fence_stays,
    ),
    "former-generation": Fault(
        "A report counted under a generation of a former session was believed: a range with a connection was held.",
        "7c809f8",
        119,
        _former_generation,
    ),
    "former-life": Fault(
        "A VM that stopped and started again used a range that was meant for its former life, and lost it.",
        "8dbd8dc",
        119,
        _former_life,
    ),
    "reserved-taken-away": Fault(
        "A range that was reserved when cpmd died was taken from a host that used it already.",
        "465174b",
        11,
        _reserved_taken_away,
    ),
    "uncommitted-step": Fault(
        "A host lost a range whose confirmation could not be committed.",
        "362f557",
        728372904,
        _uncommitted_step,
    ),
    "replaced-not-held": Fault(
        "A queued deletion of stale entries took the connections of a range that was just being replaced.",
        "56f9180",
        1921,
        _replaced_not_held,
    ),
    "welcome-dropped": Fault(
        "A node's Welcome was lost when the manager started over, and it was refused for good as another cpmd's.",
        "b07e5b3",
        201176,
        _welcome_dropped,
    ),
    "back-not-asked": Fault(
        "Ports of a host that was back after a fence were to be free before its kernel held them no more.",
        "7751c7c",
        200204,
        _back_not_asked,
    ),
    "wall-clock": Fault(
        "A step of the wall clock ended hold-downs, or prolonged them by an hour.",
        "d504fc5",
        31,
        _wall_clock,
    ),
    "announced": Fault(
        "A VM moved when another host announced it, not when its own let go.",
        "071f28a",
        38,
        _announced,
    ),
    "unplugged-is-gone": Fault(
        "A VM whose only interface is unplugged for a moment was taken for gone.",
        "d235629",
        20,
        _unplugged_is_gone,
    ),
    "no-counts": Fault(
        "A draining range is held without waiting until its connections have ended.",
        "",
        9,
        _no_counts,
    ),
    "away-not-asked": Fault(
        "A port goes to its next owner while an edge that is away still maps it.",
        "",
        3,
        _away_not_asked,
    ),
    "no-hold-down": Fault(
        "A port goes to its next owner as soon as it is not in use.",
        "",
        33,
        _no_hold_down,
    ),
}
"""By name."""


@contextlib.contextmanager
def reverted(name: str) -> Iterator[None]:
    """Take one mending back; an empty name: none."""
    with FAULTS[name].revert() if name else contextlib.nullcontext():
        yield
