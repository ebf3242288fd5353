"""
The verbs of ``virt-ports``: one module per verb, with the verb's name.

Tested in tests/unit/cpm/cli: test_verbs.py for most, test_record.py, test_simulate.py, and ../install/test_install.py.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType


def names() -> tuple[str, ...]:
    """Return the verbs, in order of name."""
    files = sorted(os.listdir(__path__[0]))  # noqa: PTH208 - importing pathlib costs 10 ms
    return tuple(file.removesuffix(".py") for file in files if file.endswith(".py") and file != "__init__.py")


def module(verb: str) -> ModuleType:
    """Return the module of a verb."""
    found: ModuleType = getattr(__import__(__name__, fromlist=[verb]), verb)
    return found
