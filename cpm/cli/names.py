"""
``virt-ports __complete SHELL KIND PREFIX``: names for the completion of shells, one a line.

A key press waits for it, so it imports little, waits for cpmd half a second at most, and prints nothing when anything
goes wrong. Tested in ``tests/unit/cpm/cli/test_completion.py``.
"""

from __future__ import annotations

from cpm.api.client import Reader
from cpm.api.operations import LIST_NODES, LIST_POOL, LIST_VMS
from cpm.cli import render
from cpm.protocol.errors import VirtPortsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, Final

    from cpm.api.operations import Operation

_WAIT_S: Final = 0.5
_MOST: Final = 200
"""Names that are offered."""
_KINDS: Final[dict[str, tuple[Operation[Any], str]]] = {
    "vms": (LIST_VMS, "name"), "nodes": (LIST_NODES, "name"), "addresses": (LIST_POOL, "address"),
}  # fmt: skip
_PLAIN: Final = "_@%+=:,./-"
"""Besides letters and digits, what means nothing to bash."""


def run(words: Sequence[str], socket_path: str) -> int:
    """
    Print the names that begin with a prefix.

    :param words: Shell (``bash``: names are quoted for it; any other quotes them itself), kind, and the prefix.
    :return: 0, whatever happens.
    """
    try:
        shell, kind, prefix = (*words, "")[:3]
        wanted = _unquoted(prefix) if shell == "bash" else prefix
        for name in _names(kind, wanted, socket_path):
            render.emit_exact((_quoted(name) if shell == "bash" else name) + "\n")
    except (VirtPortsError, OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return 0


def _names(kind: str, prefix: str, socket_path: str) -> Iterator[str]:
    operation, key = _KINDS[kind]
    pattern = prefix.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") + "*"
    answer = Reader(socket_path, timeout_s=_WAIT_S).call(operation, match=pattern, limit=_MOST)
    names = {str(getattr(each, key)) for each in answer}
    # What is not printable would be a key for the shell, or two names.
    yield from sorted(name for name in names if name.startswith(prefix) and name.isprintable())[:_MOST]


def _quoted(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in _PLAIN else f"\\{letter}" for letter in name)


def _unquoted(word: str) -> str:
    """Return a word without the backslashes that quote the letters behind them."""
    letters = iter(word)
    return "".join(next(letters, letter) if letter == "\\" else letter for letter in letters)
