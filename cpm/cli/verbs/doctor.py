"""
``virt-ports doctor``: what is wrong on this machine, with the remedies.

The one verb, with ``report``, that looks at the machine itself; everything behind it is in :mod:`machine_doctor`.
Tested in ``tests/unit/cpm/cli/test_doctor.py``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from cpm.cli import parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.cli.documents import CheckDocument
    from machine_doctor.examination import Sources
    from machine_doctor.findings import Examination, Finding

_ABOUT = """\
Looks at kernel, network, other software, hook, certificates and daemons of this
machine, before or after `virt-ports install`, and prints what is wrong with the
command or setting that mends it. It changes nothing; it executes the libvirt
hook once, with an operation that does nothing, to see that it runs. Run it as
root: another user cannot look at everything, and it says so.

results: ok; warning (it works now, or not for all VMs); problem (VMs do not
start, or lose packets); not applicable; could not tell. What each check looks
at: docs/reference/checks.md, or --list.

exit codes of this verb, as monitoring systems expect them:
  0    all is well
  1    warnings, or checks that could not be made
  2    problems (or, with "error:" on stderr, the arguments are wrong)
  4    internal error"""

_EXAMPLES = """\
  virt-ports doctor
  virt-ports doctor --all                     also what is well
  virt-ports doctor --check conntrack --check certificates
  virt-ports doctor --list                         the checks, and what they look at
  virt-ports doctor -o json | jq '.findings[] | select(.result == "problem")'"""

VERB = parsing.Verb(152, "find out what is wrong on this machine", about=_ABOUT, examples=_EXAMPLES)

_EXIT: Final = {"ok": 0, "warning": 1, "could not tell": 1, "problem": 2}


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    option = verb.add_argument
    option("--check", metavar="CHECK", action="append", default=[], help="make this check only (repeat for more)")
    option("--list", action="store_true", help="list the checks, and make none")
    option("--all", action="store_true", help="print also what is well and what does not apply")
    add_sources(verb)


def check_names() -> list[str]:
    """Return what ``--check`` takes."""
    from machine_doctor import checks

    return [check.name for check in checks.all_checks()]


def add_sources(verb: parsing.Parser) -> None:
    """Add the options that say where the configuration is."""
    verb.add_argument(
        "--natd-config",
        metavar="FILE",
        type=Path,
        default=Path("/etc/virt-ports/natd.toml"),
        help="settings of natd (default: %(default)s)",
    )
    verb.add_argument(
        "--cpmd-config",
        metavar="FILE",
        type=Path,
        default=Path("/etc/virt-ports/cpmd.toml"),
        help="settings of cpmd (default: %(default)s)",
    )


def sources(args: argparse.Namespace) -> Sources:
    """Return where facts come from."""
    from machine_doctor.examination import Sources

    socket = args.socket or os.environ.get(parsing.SOCKET_VARIABLE) or ""
    return Sources(socket, args.natd_config, args.cpmd_config)


def document_type() -> Any:
    """Return the type of what it prints as JSON, for the reference: of the manager's, only this module knows it."""
    from machine_doctor.findings import Examination

    return Examination


def run(args: argparse.Namespace) -> int:
    """Make the checks, or list them."""
    from machine_doctor import examination

    wanted = examination.selected(args.check)
    if args.list:
        rows = [(each.name, each.about) for each in wanted]
        listed: list[CheckDocument] = [{"check": name, "about": about} for name, about in rows]
        return parsing.print_answer(args, listed, lambda: render.table(("Check", "Looks whether"), rows))
    found = examination.examine(examination.gather(sources(args)), wanted)
    parsing.print_answer(args, found, lambda: _text(found, everything=args.all or bool(args.check)))
    return _EXIT[found.result]


def _text(found: Examination, *, everything: bool) -> str:
    lines = [
        f"{found.machine}: {', '.join(found.roles) or 'no role'}; virt-ports {found.version}"
        + ("" if found.is_installed else "; not installed yet: looked at as a server with all roles")
    ]
    for each in found.findings:
        lines += _lines(each, everything=everything)
    return "\n".join((*lines, "", _summary(found))) + "\n"


def _lines(finding: Finding, *, everything: bool) -> list[str]:
    if not everything and finding.result in ("ok", "not applicable"):
        return []
    reason = f": {finding.reason}" if finding.reason else ""
    lines = (
        ["", f"{finding.check}: {finding.result}{reason}"]
        if not everything or finding.troubles
        else [f"{finding.check}: {finding.result}{reason}"]
    )
    for trouble in finding.troubles:
        lines += [f"  {trouble.result}: {trouble.what}", f"    {trouble.remedy}"]
    if everything:
        lines += [f"    {name}: {_fact(value)}" for name, value in finding.facts.items()]
    return lines


def _fact(value: object) -> str:
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else render.cell(value)


def _summary(found: Examination) -> str:
    results = [str(each.result) for each in found.findings]
    counts = {kind: results.count(kind) for kind in dict.fromkeys(("ok", *_EXIT, "not applicable"))}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
