"""
The journal of systemd, by libsystemd (sd-journal(3)); no process is started. Tested in
``tests/netns/test_journal.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

_RELOADED: Final = "7b05ebc668384222baa8881179cfda54"
"""MESSAGE_ID with which systemd says that a unit was reloaded (SD_MESSAGE_UNIT_RELOADED)."""
_LOCAL_ONLY: Final = 1  # SD_JOURNAL_LOCAL_ONLY


class Entry(NamedTuple):
    """An entry; its time in UTC seconds."""

    at: float
    message: str


@functools.cache
def _library() -> Any | None:
    try:
        return ctypes.CDLL("libsystemd.so.0")
    except OSError:
        return None


def newest(matches: Sequence[Sequence[str]], most: int) -> list[Entry]:
    """
    Return the newest entries that match, oldest first; nothing where there is no journal, or it may not be read.

    :param matches: Alternatives, each of which is a list of ``FIELD=value`` that must all be there.
    :param most: How many at most.
    """
    library = _library()
    if library is None:
        return []
    handle = ctypes.c_void_p()
    if library.sd_journal_open(ctypes.byref(handle), _LOCAL_ONLY) < 0:
        return []
    try:
        for alternative in matches:
            for match in alternative:
                library.sd_journal_add_match(handle, match.encode(), ctypes.c_size_t(0))
            library.sd_journal_add_disjunction(handle)
        library.sd_journal_seek_tail(handle)
        return list(_backwards(library, handle, most))[::-1]
    finally:
        library.sd_journal_close(handle)


def _backwards(library: Any, handle: ctypes.c_void_p, most: int) -> Iterator[Entry]:
    for _ in range(most):
        if library.sd_journal_previous(handle) <= 0:
            return
        at, data, size = ctypes.c_uint64(), ctypes.c_void_p(), ctypes.c_size_t()
        library.sd_journal_get_realtime_usec(handle, ctypes.byref(at))
        if library.sd_journal_get_data(handle, b"MESSAGE", ctypes.byref(data), ctypes.byref(size)) < 0:
            continue
        field = ctypes.string_at(data.value, size.value) if data.value else b""
        yield Entry(at.value / 1e6, field.removeprefix(b"MESSAGE=").decode("utf-8", "replace"))


def last_reload(daemon: str) -> float | None:
    """Return when systemd last reloaded a daemon, UTC seconds; None: not known."""
    unit = f"{daemon}.service"
    found: list[Entry] = []
    with contextlib.suppress(AttributeError, ValueError):
        found = newest([[f"MESSAGE_ID={_RELOADED}", f"UNIT={unit}"]], 1)
    return found[-1].at if found else None
