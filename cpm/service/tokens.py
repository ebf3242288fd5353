"""
Tokens in files: what a program shows to another one to be let in.

Tested in ``tests/unit/cpm/api/test_scraping.py`` and ``tests/unit/cpm/serving/test_event_export.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MOST: Final = 4096
"""Bytes of a token at most."""


def read(path: str) -> str:
    """
    Return the token in a file; blanks around it do not count.

    :raise OSError: When the file cannot be read, or has none.
    """
    with Path(path).open(encoding="ascii", errors="replace") as file:
        token = file.read(MOST).strip()
    if not token or not token.isascii() or not token.isprintable():
        raise OSError(0, f"{path} has no token in its first line")
    return token
