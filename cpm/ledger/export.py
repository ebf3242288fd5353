"""
Files with entries of the journal that the ledger no longer keeps: JSON lines, compressed by gzip.

The format is documented in ``docs/reference/journal.md``. Tested in ``tests/unit/cpm/ledger/test_archive.py``.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
from collections.abc import Iterable
from pathlib import Path

from cpm.core.journal import JournalEntry
from cpm.protocol.ledger_errors import LedgerError
from cpm.records.lines import json_line
from cpm.service import files


def write(folder: Path, entries: Iterable[JournalEntry]) -> Path:
    """
    Write entries to a new file in a folder and return its path once the file is on disk.

    It gets its name, ``journal-FIRST-LAST.jsonl.gz`` with the least and the greatest ``seq``, when it is complete. A
    file of that name is not replaced; the new one gets another number behind it.

    :raise LedgerError: When it cannot be written. Then there is no file.
    """
    part = folder / ".part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        least, greatest = _write_part(part, entries)
        path = _give_name(part, folder, f"journal-{least}-{greatest}")
        files.sync_folder(folder)
    except OSError as error:
        raise LedgerError(
            f"cannot export the journal to {folder}: {error.strerror or error}, so nothing of it is deleted; free "
            "space there, or set [journal] export in cpmd.toml to another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def _write_part(part: Path, entries: Iterable[JournalEntry]) -> tuple[int, int]:
    seqs: list[int] = []
    with part.open("wb") as file:
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
            for entry in entries:
                packed.write(json_line(entry))
                seqs = [min([*seqs, entry.seq]), max([*seqs, entry.seq])]
        files.sync(file)
    return seqs[0], seqs[1]


def _give_name(part: Path, folder: Path, name: str) -> Path:
    for number in itertools.count():
        path = folder / f"{name}{f'-{number}' if number else ''}.jsonl.gz"
        try:
            # Unlike a renaming, a link replaces nothing.
            path.hardlink_to(part)
        except FileExistsError:
            continue
        return path
    raise AssertionError
