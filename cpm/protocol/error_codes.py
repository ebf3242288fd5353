"""
The class of each error's code, for clients and for the reference.

Tested in ``tests/unit/cpm/protocol/test_errors.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cpm.protocol import errors, ledger_errors
from cpm.protocol.errors import VirtPortsError

_MODULES = (errors.__name__, ledger_errors.__name__)


def family(kind: type[VirtPortsError] = VirtPortsError) -> Iterator[type[VirtPortsError]]:
    """Yield a class of errors and all below it that these modules declare, parents first."""
    yield kind
    for each in kind.__subclasses__():
        if each.__module__ in _MODULES:
            yield from family(each)


CODES: Final = {kind.code: kind for kind in family()}
"""The class of each code."""
