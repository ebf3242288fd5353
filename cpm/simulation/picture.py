"""Draws ports held and ports used over time as SVG, one panel per policy. Pure: results in, text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from cpm.simulation.compare import Result
from cpm.simulation.replay import Point

WIDTH: Final = 860
PANEL: Final = 150
_LEFT, _RIGHT, _TOP, _GAP, _BOTTOM = 70, 150, 56, 34, 40
_POINTS: Final = 400
"""Points drawn; more would be finer than a pixel."""

_HELD, _USED, _INK, _SOFT, _FAINT = "#2f6db5", "#e08a1e", "#22272e", "#5c6670", "#d5d9de"


def draw(results: Sequence[Result], title: str) -> str:
    """
    Return the picture as SVG. All panels have the same axes, so that they can be compared.

    :raise ValueError: When there is no result, or one has no points.
    """
    if not results or not all(result.outcome.points for result in results):
        raise ValueError("nothing to draw")
    top = _round_up(max(result.outcome.peak_held for result in results))
    seconds = max(result.outcome.points[-1].at for result in results)
    height = _TOP + len(results) * (PANEL + _GAP) + _BOTTOM - _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f'<g font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
        *_legend(),
    ]
    for number, result in enumerate(results):
        parts += _panel(result, _TOP + number * (PANEL + _GAP), top, seconds)
    parts += [*_time_axis(height - _BOTTOM, seconds), "</g>", "</svg>"]
    return "\n".join(parts) + "\n"


def _legend() -> list[str]:
    return [
        f'<rect x="{_LEFT}" y="34" width="12" height="10" fill="{_HELD}" fill-opacity="0.35" stroke="{_HELD}"/>',
        f'<text x="{_LEFT + 18}" y="43">ports held</text>',
        f'<rect x="{_LEFT + 100}" y="34" width="12" height="10" fill="{_USED}"/>',
        f'<text x="{_LEFT + 118}" y="43">ports used</text>',
    ]


def _panel(result: Result, y: int, top: float, seconds: float) -> list[str]:
    outcome, bottom, right = result.outcome, y + PANEL, WIDTH - _RIGHT
    parts = []
    for share in (0.0, 0.5, 1.0):
        line = bottom - share * PANEL
        parts.append(f'<line x1="{_LEFT}" y1="{line:g}" x2="{right}" y2="{line:g}" stroke="{_FAINT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{line + 4:g}" text-anchor="end">{_short(top * share)}</text>')
    parts.append(f'<text x="{_LEFT - 8}" y="{y + 19}" text-anchor="end" fill="{_SOFT}">ports</text>')
    points = _thin(outcome.points)
    held = [(point.at, float(point.held)) for point in points]
    used = [(point.at, float(point.used)) for point in points]
    parts += [
        f'<path d="{_area(held, bottom, top, seconds)}" fill="{_HELD}" fill-opacity="0.35" stroke="{_HELD}"/>',
        f'<path d="{_area(used, bottom, top, seconds)}" fill="{_USED}"/>',
        f'<text x="{right + 12}" y="{y + 14}" font-weight="bold">{escape(outcome.policy)}</text>',
    ]
    facts = [f"{outcome.held_per_used:.2f} held per used", f"{outcome.refused:,} refused", f"{outcome.grown:,} growths"]
    if result.vms_per_address is not None:
        facts.insert(0, f"{result.vms_per_address:.0f} VMs per address")
    parts += [f'<text x="{right + 12}" y="{y + 34 + 17 * row}">{fact}</text>' for row, fact in enumerate(facts)]
    return parts


def _time_axis(y: int, seconds: float) -> list[str]:
    unit, word = (3600.0, "hours") if seconds > 7200 else (60.0, "minutes") if seconds > 180 else (1.0, "seconds")
    parts = []
    for tick in range(5):
        at = seconds * tick / 4
        x = _LEFT + (WIDTH - _RIGHT - _LEFT) * tick / 4
        parts.append(f'<text x="{x:g}" y="{y + 18}" text-anchor="middle">{at / unit:.3g}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT + 24}" y="{y + 18}" fill="{_SOFT}">{word}</text>')
    return parts


def _area(points: Sequence[tuple[float, float]], bottom: int, top: float, seconds: float) -> str:
    width = WIDTH - _RIGHT - _LEFT
    corners = [(_LEFT + width * at / seconds, bottom - PANEL * value / top) for at, value in points]
    line = " ".join(f"L{x:.1f} {y:.1f}" for x, y in corners)
    return f"M{corners[0][0]:.1f} {bottom} {line} L{corners[-1][0]:.1f} {bottom} Z"


def _thin(points: Sequence[Point]) -> list[Point]:
    """Return at most :data:`_POINTS` points; of several that become one, the point with the most ports held."""
    share = math.ceil(len(points) / _POINTS)
    return [max(points[at : at + share], key=lambda point: point.held) for at in range(0, len(points), share)]


def _round_up(value: int) -> float:
    """Return a round number that is not less."""
    scale = 10.0 ** math.floor(math.log10(max(value, 1)))
    return next(step * scale for step in (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10) if step * scale >= value)


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
