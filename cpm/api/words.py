"""
The words that requests choose by and answers have: states and events.

Tested in tests/unit/cpm/queries/test_pages.py.
"""

from __future__ import annotations

from cpm.protocol.event_kinds import JOURNAL, NODES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from cpm.api.views import NodeView

VM_STATES: Final = (
    "active", "starting", "growing", "waiting", "claimed", "misrouted", "unreachable", "gone", "not managed",
)  # fmt: skip
RANGE_STATES: Final = ("reserved", "active", "draining", "held")
ROLES: Final = ("host", "edge")
"""Of nodes."""
NODE_STATES: Final = (
    "connected", "away", "fenced", "out of service", "not answering", "waiting for approval", "revoked",
)  # fmt: skip
FORWARD_STATES: Final = ("starting", "active", "resting", "leaving")
EVENT_NAMES: Final = tuple(kind.name for kind in JOURNAL)
"""Those of the journal."""
NODE_EVENT_NAMES: Final = tuple(kind.name for kind in NODES)


def hyphenated(words: Iterable[str]) -> tuple[str, ...]:
    """Return states or events as they are written in a request: without spaces."""
    return tuple(word.replace(" ", "-") for word in words)


def node_state(view: NodeView) -> str:
    """Return the state of a node in a word or two, one of :data:`NODE_STATES`."""
    if view.fenced:
        return "fenced"
    if view.asks is not None and not view.connected:
        return "waiting for approval"
    if view.approval is None:
        return "revoked"
    if not view.connected:
        return "away"
    if not view.in_service:
        return "out of service"
    return "connected" if view.answering else "not answering"
