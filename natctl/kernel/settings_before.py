"""
Keeps what kernel settings were before natd first changed them, so that `virt-ports uninstall` can set them back.

The file lies in natd's directory in ``/run``: like the settings themselves, it does not outlive the machine.

Tested in ``tests/netns/test_withdrawal.py``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from cpm.service import files

FILE: Final = "settings-before.json"


class Setting(NamedTuple):
    """A setting that natd changed."""

    before: str
    """What it was before the first change."""
    ours: str
    """What natd wrote last."""


class SettingsBefore:
    """
    The settings, by path below ``/proc/sys/net/ipv4``.

    :param file: Where they are kept; None: nowhere.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file

    def note(self, path: str, before: str, ours: str) -> None:
        """Keep one that is about to be changed. Where that is not possible, the change is made all the same."""
        self.note_all({path: Setting(before, ours)})

    def note_all(self, changes: Mapping[str, Setting]) -> None:
        """Keep some that are about to be changed together; else as :meth:`note`."""
        if self._file is None:
            return
        known = dict(self.read())
        for path, change in changes.items():
            known[path] = Setting(known[path].before if path in known else change.before, change.ours)
        with contextlib.suppress(OSError):
            self._write(self._file, known)

    def read(self) -> Mapping[str, Setting]:
        """Return what is kept; what cannot be read was never noted."""
        if self._file is None:
            return {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return {str(path): Setting(str(before), str(ours)) for path, (before, ours) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}

    @staticmethod
    def _write(file: Path, known: Mapping[str, Setting]) -> None:
        files.replace(file, json.dumps(known).encode(), 0o600)
