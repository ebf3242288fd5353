"""
``virt-ports report``: an archive for a bug report, without secrets.

Tested in ``tests/unit/cpm/cli/test_doctor.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cpm.cli import parsing, render
from cpm.cli.verbs import doctor
from cpm.protocol.errors import ConfigError, ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.cli.documents import ReportDocument

_ABOUT = """\
Collects into one archive what a bug report needs: versions, the findings of
`virt-ports doctor`, the configuration (read, not copied: no comments, and what
may be a secret is masked), what cpmd says of VMs, nodes and events if it
answers, what our tables, routes and rules hold, kernel settings, and the end of
the journals of natd, cpmd and libvirt. No private key, no ledger. It changes
nothing but writes the archive, which only you can read. Look into it before
you send it. Run it as root: another user cannot read everything."""

_EXAMPLES = """\
  virt-ports report                       writes virt-ports-report-….tar.gz here
  virt-ports report --anonymous           with other names for VMs, nodes, addresses
  virt-ports report --file - | tar -tz    to stdout"""

VERB = parsing.Verb(154, "collect an archive for a bug report, without secrets", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("--anonymous", action="store_true",
                      help="other names for VMs, nodes and addresses, the same everywhere; no journals")  # fmt: skip
    verb.add_argument("--file", metavar="FILE", help="archive to write (default: a new one here); -: stdout")
    doctor.add_sources(verb)


def run(args: argparse.Namespace) -> int:
    """Collect, write, and print where."""
    from machine_doctor import bundle

    stamp = render.moment(parsing.now(args))[:19].replace(":", "").replace("-", "").replace("T", "-")
    folder = f"virt-ports-report-{'anonymous-' if args.anonymous else ''}{stamp}"
    members = bundle.collect(doctor.sources(args), _say, is_anonymous=args.anonymous)
    if args.file == "-":
        bundle.write(members, sys.stdout.buffer, parsing.now(args), folder)
        return ExitCode.DONE
    path = Path(args.file or f"{folder}.tar.gz")
    try:
        with bundle.create(path) as file:
            count = bundle.write(members, file, parsing.now(args), folder)
    except FileExistsError:
        raise ConfigError(str(path), "", "exists already; give --file another name") from None
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot write: {error.strerror}; give --file another name") from error
    facts: ReportDocument = {"file": str(path), "files": count, "bytes": path.stat().st_size}
    return parsing.print_answer(args, facts, lambda: f"{path}\n")


def _say(step: str) -> None:
    render.emit(f"{step} …\n", sys.stderr)
