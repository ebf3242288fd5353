"""
The thread that reads the journal, so that a long history delays no decision.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from cpm.ledger import JournalReader

_P = ParamSpec("_P")
_T = TypeVar("_T")


class JournalThread:
    """
    Reads the journal in a thread of its own.

    :param reader: Used by that thread only.
    """

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="journal")

    async def read(self, work: Callable[Concatenate[JournalReader, _P], _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """
        Call a function with the reader in the thread; return its result.

        :raise VirtPortsError: The error of the function.
        """
        call = lambda: work(self._reader, *args, **kwargs)  # noqa: E731
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def stop(self) -> None:
        """Wait for calls in progress, then stop the thread."""
        self._executor.shutdown()
