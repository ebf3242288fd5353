"""
The files in which natd keeps whom its node follows (:mod:`natctl.core.following`).

``follows.json`` outlives the machine: it is replaced as a whole, and on disk before natd goes on. It also says which
VMs may send nothing without ports (:mod:`natctl.core.default_deny`). ``grants`` changes with every range, and is of use
only as long as the kernel holds what it is about: it is overwritten in place.

Tested in ``tests/unit/natctl/test_remembering.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import EdgeNames, Follows
from cpm.service import files
from natctl.model.remembered import Charge, Remembered


class RememberedFiles:
    """
    The files.

    :param folder: Made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._grants: int | None = None

    def read(self) -> Remembered:
        """Return what is on disk. What is not there, or not readable, was never seen."""
        try:
            found = json.loads((self._folder / "follows.json").read_text())
            epoch, ledger, run = int(found["epoch"]), str(found["ledger"]), str(found["run"])
            codec.encode((epoch, ledger, run))
        except (OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            return Remembered()
        grants = 0
        with contextlib.suppress(OSError, ValueError):
            grants = int((self._folder / "grants").read_text())
        follows = Follows(ledger, run, max(0, grants), _edges(found.get("edges")))
        return Remembered(epoch, follows, _charge(found.get("charge")))

    def write(self, now: Remembered, *, is_durable: bool) -> None:
        """
        Keep this.

        :param is_durable: Also after a power failure.
        :raise OSError: When it cannot be written.
        """
        if is_durable:
            follows = now.follows
            said = {"epoch": now.epoch, "ledger": follows.ledger, "run": follows.run, "edges": follows.edges}
            self._folder.mkdir(parents=True, exist_ok=True)
            files.replace(self._folder / "follows.json", codec.encode({**said, "charge": now.charge}), 0o600)
        if self._grants is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._grants = os.open(self._folder / "grants", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # One write of the same length as before, so that no reader finds half of it.
        os.pwrite(self._grants, f"{now.follows.grants:020d}".encode(), 0)

    def close(self) -> None:
        """Close the file that stays open. May be called more than once."""
        if self._grants is not None:
            os.close(self._grants)
            self._grants = None


def _edges(found: object) -> EdgeNames:
    with contextlib.suppress(InvalidRequest):
        return codec.decode(EdgeNames, json.dumps(found or ()))
    return ()


def _charge(found: object) -> Charge | None:
    if found is None:
        return None
    with contextlib.suppress(InvalidRequest):
        return codec.decode(Charge, json.dumps(found))
    return None
