"""
``virt-ports backup``: a consistent copy of the ledger, while cpmd runs.

Tested in ``tests/unit/cpm/cli/test_copies.py``.
"""

from __future__ import annotations

from pathlib import Path

from cpm.cli import parsing
from cpm.cli.verbs import restore

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.cli.documents import BackupDocument

_EXAMPLES = """\
  virt-ports backup /backup/ledger-monday.db
  virt-ports backup "/backup/ledger-$(date +%F).db"      every day, from a timer"""

_ABOUT = """\
The copy is of one moment and complete. Put it back with `virt-ports restore`
only: cpmd refuses one that was merely copied into place. An existing file is
not replaced."""

VERB = parsing.Verb(142, "write a copy of the ledger to a file", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("file", metavar="FILE", help="file to write")
    restore.add_config(verb)


def run(args: argparse.Namespace) -> int:
    """Write the backup."""
    from cpm.cli import progress
    from cpm.ledger import copies
    from cpm.service import clock

    path, target = restore.ledger_of(args), Path(args.file)
    with progress.line() as say:
        copies.back_up(path, target, clock.wall(), say)
    facts: BackupDocument = {"file": str(target), "bytes": target.stat().st_size, "ledger": str(path)}
    return parsing.print_answer(args, facts, lambda: f"{target}: {facts['bytes']} bytes, a copy of {path}\n")
