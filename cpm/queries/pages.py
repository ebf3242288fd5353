"""
Parts of lists: what was asked for of all there is, in an order, and a page of it. Pure.

A page goes on after a place, not after a number of entries: what comes and goes moves nothing from one page to
another, and what is there all the time is on exactly one page. That needs an order that does not change, which only
names and addresses have ([design/0032](../../docs/design/0032-lists-in-pages.md)).

Tested in ``tests/unit/cpm/queries/test_pages.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any, TypeVar

from cpm.api.words import hyphenated
from cpm.protocol.errors import InvalidRequest

_T = TypeVar("_T")


def check_order(sort: str, default: str, after: object) -> None:
    """:raise InvalidRequest: When a page is to follow another one in an order that changes."""
    if after is not None and sort != default:
        raise InvalidRequest(f"after goes with the order of {default} only; leave out sort={sort}, or ask with limit")


def is_one_of(state: str, states: Set[str]) -> bool:
    """Return whether a state is among those asked for; none of them: every one is."""
    return not states or hyphenated([state])[0] in states


def page(entries: Iterable[_T], key: Callable[[_T], Any], limit: int | None) -> list[_T]:
    """Return the first entries in order of a key; None: all."""
    return sorted(entries, key=key)[:limit]
