"""
``virt-ports restore``: puts a backup of the ledger in the place of the present one, while cpmd is stopped.

Tested in ``tests/unit/cpm/cli/test_copies.py``.
"""

from __future__ import annotations

from pathlib import Path

from cpm.cli import parsing

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.cli.documents import RestoreDocument

_EXAMPLES = """\
  systemctl stop cpmd
  virt-ports restore /backup/ledger-monday.db
  virt-ports restore --accept      instead: the ledger that is in place, old or empty
  systemctl start cpmd"""

_ABOUT = """\
When cpmd starts with a restored ledger, it first waits for all edges, and for
at least the hold-down. `virt-ports status` says for whom; fence a node that will
not come back, also if it was fenced before: restoring ends all fences, since
such a node may have been back. Then cpmd takes in what the nodes' kernels hold,
so that no connection is cut and no port gets a second owner, and goes on as
usual. Until then no range changes, and VMs that start get no ports.

The former ledger is kept beside the new one as LEDGER.before-restore-N. Only
that one has the journal from the backup on."""

VERB = parsing.Verb(144, "put a backup of the ledger in place", about=_ABOUT, examples=_EXAMPLES)

_NEXT = """\
Start cpmd. It takes in what the nodes hold; `virt-ports status` says what it
waits for.
"""


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("file", metavar="FILE", nargs="?", help="backup to put in place")
    source.add_argument("--accept", action="store_true", help="take the ledger that is in place, whatever it is")
    add_config(verb)


def add_config(verb: parsing.Parser) -> None:
    """Add the option that names the ledger."""
    verb.add_argument("--config", metavar="FILE", default="/etc/virt-ports/cpmd.toml",
                      help="settings of cpmd, which name the ledger (default: %(default)s)")  # fmt: skip


def ledger_of(args: argparse.Namespace) -> Path:
    """
    Return the path of the ledger.

    :raise ConfigError: When the settings cannot be read.
    """
    from cpm import settings

    return Path(settings.load(Path(args.config)).ledger.path)


def run(args: argparse.Namespace) -> int:
    """Put the backup in place, or accept the ledger that is."""
    from cpm.cli import progress
    from cpm.ledger import copies
    from cpm.service import clock

    facts: RestoreDocument
    path = ledger_of(args)
    if args.accept:
        copies.accept(path, clock.wall())
        facts = {"ledger": str(path), "former": None}
        return parsing.print_answer(args, facts, lambda: f"{path} is taken as it is. {_NEXT}")
    with progress.line() as say:
        former = copies.restore(path, Path(args.file), clock.wall(), say)
    facts = {"ledger": str(path), "former": str(former) if former is not None else None}
    kept = f"the former one is {former}" if former is not None else "there was none before"
    return parsing.print_answer(args, facts, lambda: f"{path} is {args.file} now; {kept}. {_NEXT}")
