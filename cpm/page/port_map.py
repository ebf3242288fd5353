"""
The map of one external address: all 65,536 ports in 32 rows of 2,048, as shapes for SVG.

A VM's ports have the VM's colour; what they are used for is shown by a pattern above it, so that it can be told without
seeing colours. Ports 0 to 1023, which no VM gets, are the first half of the first row.

Pure; tested in ``tests/unit/cpm/page/test_port_map.py``.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from msgspec import Struct

from cpm.api.views import AddressDetail
from cpm.protocol.bounds import FIRST_PORT, LAST_PORT
from cpm.protocol.model import AllocationState, DomainUUID

ROW: Final = 2048
"""Ports of a row."""
ROWS: Final = (LAST_PORT + 1) // ROW
WIDTH: Final = 1024
"""Of the map, in units of SVG; a port is half a unit."""
ROW_HEIGHT: Final = 14
HEIGHT: Final = ROWS * ROW_HEIGHT
COLOURS: Final = 8
"""Colours of VMs in the style sheet."""

STATES: Final = {
    AllocationState.ACTIVE: "active",
    AllocationState.RESERVED: "starting",
    AllocationState.DRAINING: "draining",
    AllocationState.HELD: "held",
}
"""What the states of a range are called on the page: there, *reserved* are ports that no VM gets."""


class Area(Struct, frozen=True, gc=False):
    """The ports of one range. A page has many: the garbage collector need not look at them."""

    path: str
    """The shape, as SVG's ``d``."""
    colour: int
    first: int
    last: int
    state: str
    name: str
    uuid: DomainUUID
    node: str


@dataclasses.dataclass(frozen=True, slots=True)
class PortMap:
    """The map of one address."""

    areas: tuple[Area, ...]
    patterns: tuple[tuple[str, str], ...]
    """State, and the shape of all ranges in it that is drawn above them; active ranges have none."""
    system: str
    """The shape of ports 0 to 1023."""
    kept: str
    """The shape of ports that no VM gets: reserved by the operator, or used by an edge itself."""


def port_map(address: AddressDetail) -> PortMap:
    """Return the map of an address."""
    areas = tuple(
        Area(
            shape(each.first_port, each.last_port),
            colour(each.uuid),
            each.first_port,
            each.last_port,
            STATES[each.state],
            each.name,
            each.uuid,
            each.node,
        )
        for each in address.ranges
    )
    patterns = (
        (state, "".join(area.path for area in areas if area.state == state))
        for state in STATES.values()
        if state != "active"
    )
    kept = [(each.first, each.last) for each in address.reserved]
    kept += ((each.first_port, each.last_port) for each in address.own)
    return PortMap(
        areas,
        tuple((state, path) for state, path in patterns if path),
        shape(0, FIRST_PORT - 1),
        shapes((max(first, FIRST_PORT), last) for first, last in kept if last >= FIRST_PORT),
    )


def colour(uuid: DomainUUID) -> int:
    """Return the number of a VM's colour: always the same, on all addresses, and one that others have, too."""
    return zlib.crc32(uuid.encode()) % COLOURS


def shapes(ranges: Iterable[tuple[int, int]]) -> str:
    """Return one shape for several ranges."""
    return "".join(shape(first, last) for first, last in ranges)


def shape(first: int, last: int) -> str:
    """Return the shape of a range: up to three rectangles, as it begins and ends within rows."""
    return "".join(_rectangles(first, last + 1))


def _rectangles(begin: int, end: int) -> Iterator[str]:
    first_row, last_row = begin // ROW, (end - 1) // ROW
    if first_row == last_row:
        yield _rectangle(begin % ROW, end - first_row * ROW, first_row, 1)
        return
    if begin % ROW:
        yield _rectangle(begin % ROW, ROW, first_row, 1)
        first_row += 1
    if end % ROW:
        last_row -= 1
    if last_row >= first_row:
        yield _rectangle(0, ROW, first_row, last_row - first_row + 1)
    if end % ROW:
        yield _rectangle(0, end % ROW, last_row + 1, 1)


def _rectangle(left: int, right: int, row: int, rows: int) -> str:
    scale = WIDTH / ROW
    return f"M{left * scale:g} {row * ROW_HEIGHT}H{right * scale:g}v{rows * ROW_HEIGHT}H{left * scale:g}z"
