"""What ``virt-ports top`` knows, and how the user looks at it: lists, reports and keys in. Pure."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from cpm.api.views import DomainView, MeasurementView, ReportView
from cpm.protocol.model import DomainUUID

TREND: Final = 30
"""Measurements of a VM that are kept for its trend."""
MOST_FILTER: Final = 200
"""Characters of a filter."""

UP, DOWN, PAGE_UP, PAGE_DOWN, HOME, END = "up", "down", "page-up", "page-down", "home", "end"
ENTER, ESCAPE, BACKSPACE = "enter", "escape", "backspace"
_MOVES: Final = (UP, DOWN, PAGE_UP, PAGE_DOWN, HOME, END)


@dataclasses.dataclass(slots=True)
class Row:
    """One VM: as it is listed, and its last measurement."""

    vm: DomainView
    measured: MeasurementView | None = None
    trend: deque[int] = dataclasses.field(default_factory=lambda: deque(maxlen=TREND))
    """Its last numbers of ports in use, the oldest first."""

    @property
    def in_use(self) -> int | None:
        """Ports in use, of the active range; None: not measured."""
        fresh = self.measured.ports_in_use if self.measured is not None else None
        return fresh if fresh is not None else self.vm.ports_in_use

    @property
    def size(self) -> int:
        """Ports of the active range."""
        if self.vm.first_port is None or self.vm.last_port is None:
            return 0
        return self.vm.last_port - self.vm.first_port + 1

    @property
    def held(self) -> int:
        """All its ports; an older manager tells those of the active range only."""
        return max(self.vm.ports_held, self.size)

    @property
    def share(self) -> float:
        """Ports in use as a share of the active range."""
        return (self.in_use or 0) / self.size if self.size else 0.0


def _rate(name: str) -> Callable[[Row], float]:
    return lambda row: getattr(row.measured, name, None) or 0.0


COLUMNS: Final[dict[str, Callable[[Row], Any]]] = {
    "NAME": lambda row: row.vm.name,
    "NODE": lambda row: row.vm.node,
    "STATE": lambda row: row.vm.state,
    "USED": lambda row: row.in_use if row.in_use is not None else -1,
    "HELD": lambda row: row.held,
    "CAP": lambda row: row.vm.cap or 0,
    "%": lambda row: row.share,
    "NEW/S": _rate("new_connections_per_s"),
    "PKT/S": _rate("packets_per_s"),
    "MBIT/S": _rate("megabits_per_s"),
}
"""What rows can be sorted by."""
_TEXTS: Final = ("NAME", "NODE", "STATE")


class Model:
    """
    The state of the view. Inputs are ``on_…``; everything else only looks.

    :param sort: One of :data:`COLUMNS`.
    :param pattern: Only VMs in whose name, UUID, node or state this occurs.
    """

    def __init__(self, sort: str = "USED", pattern: str = "") -> None:
        self.rows: dict[str, Row] = {}
        self.sort = sort
        self.is_reversed = False
        self.pattern = pattern
        self.typed: str | None = None
        """The filter while it is typed; None: keys are commands."""
        self.is_paused = False
        self.is_help = False
        self.is_done = False
        self.lost = ""
        """Why there is nothing new; empty: the manager answers."""
        self.at: float | None = None
        """UTC seconds of the last report."""
        self.selected: DomainUUID | None = None
        """UUID of the VM on which the cursor is."""

    # What comes from the manager

    def on_list(self, vms: list[DomainView]) -> None:
        """Take the list of VMs: those that are not in it are gone."""
        self.lost = ""
        if self.is_paused:
            return
        known = self.rows
        self.rows = {}
        for vm in vms:
            row = self.rows[vm.uuid] = known.get(vm.uuid) or Row(vm)
            row.vm = vm

    def on_report(self, report: ReportView) -> None:
        """Take the measurements of one host."""
        if self.is_paused:
            return
        self.at = report.at
        for measured in report.vms:
            if (row := self.rows.get(measured.uuid)) is not None and row.vm.node == report.node:
                row.measured = measured
                if measured.ports_in_use is not None:
                    row.trend.append(measured.ports_in_use)

    def on_lost(self, why: str) -> None:
        """Take that the manager does not answer; what was known stays."""
        self.lost = why

    # What comes from the user

    def on_key(self, key: str, page: int) -> None:
        """
        Take a key: one of the names above, or a character.

        :param page: VMs on the screen.
        """
        if self.typed is not None:
            self._on_typed(key)
        elif self.is_help:
            self.is_help, self.is_done = False, key == "q"
        elif key in _MOVES:
            self._move(key, page)
        else:
            self._on_command(key)

    def _on_command(self, key: str) -> None:
        names = list(COLUMNS)
        match key:
            case "q":
                self.is_done = True
            case "h" | "?":
                self.is_help = True
            case " ":
                self.is_paused = not self.is_paused
            case "<" | ">":
                step = 1 if key == ">" else -1
                self.sort, self.is_reversed = names[(names.index(self.sort) + step) % len(names)], False
            case "r" | "R":
                self.is_reversed = not self.is_reversed
            case "/":
                self.typed = self.pattern
            case "escape":
                self.pattern = ""

    def _on_typed(self, key: str) -> None:
        assert self.typed is not None
        if key == ENTER:
            self.pattern, self.typed = self.typed, None
        elif key == ESCAPE:
            self.typed = None
        elif key == BACKSPACE:
            self.typed = self.typed[:-1]
        elif len(key) == 1 and key.isprintable() and len(self.typed) < MOST_FILTER:
            self.typed += key

    def _move(self, key: str, page: int) -> None:
        order = [row.vm.uuid for row in self.shown()]
        if not order:
            return
        at = order.index(self.selected) if self.selected in order else 0
        steps = {UP: -1, DOWN: 1, PAGE_UP: -page, PAGE_DOWN: page, HOME: -len(order), END: len(order)}
        self.selected = order[max(0, min(len(order) - 1, at + steps[key]))]

    # Looking

    def shown(self) -> list[Row]:
        """Return the rows that are asked for, in their order: texts ascend, numbers descend, unless reversed."""
        value = COLUMNS[self.sort]
        rows = sorted(self._fitting(), key=lambda row: (row.vm.name, row.vm.uuid))
        return sorted(rows, key=value, reverse=(self.sort not in _TEXTS) != self.is_reversed)

    def _fitting(self) -> Iterator[Row]:
        wanted = (self.pattern if self.typed is None else self.typed).casefold()
        for row in self.rows.values():
            vm = row.vm
            if not wanted or any(wanted in text.casefold() for text in (vm.name, vm.uuid, vm.node, vm.state)):
                yield row

    def page(self, height: int) -> tuple[list[Row], int | None]:
        """Return the rows that fit on a screen, with the selected one, and the place of that one among them."""
        rows = self.shown()
        places = {row.vm.uuid: number for number, row in enumerate(rows)} if self.selected is not None else {}
        at = places.get(self.selected) if self.selected is not None else None
        first = 0 if at is None or height <= 0 else max(0, min(at - height // 2, len(rows) - height))
        return rows[first : first + max(height, 0)], None if at is None else at - first
