"""
Which machine this is, so that the manager can tell it from another one with the same name.

Tested in ``tests/unit/natctl/test_machine_identity.py``.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Final

SOURCES: Final = (Path("/sys/class/dmi/id/product_uuid"), Path("/etc/machine-id"))
"""The first that can be read counts. The firmware's is the same after a new installation, and another one where the
disk is a copy of another machine's."""

_PURPOSE: Final = b"virt-ports node"


def of_this_machine(sources: tuple[Path, ...] = SOURCES) -> str:
    """Return 16 hexadecimal digits that are the same after a restart; empty: nothing says which machine this is."""
    for source in sources:
        try:
            text = source.read_text(encoding="ascii").strip().lower()
        except (OSError, ValueError):
            continue
        if text:
            # The number itself is confidential (machine-id(5)).
            return hmac.new(_PURPOSE, text.encode(), hashlib.sha256).hexdigest()[:16]
    return ""
