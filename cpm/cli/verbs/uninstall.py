"""
``virt-ports uninstall``: gives kernel and files of this machine back as they were before.

Tested in ``tests/unit/cpm/install/test_removal.py`` and ``tests/netns/test_withdrawal.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

from cpm.cli import asking, parsing, render
from cpm.protocol.errors import Conflict, ExitCode, InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.cli.documents import RemovedFileDocument, UninstallDocument
    from cpm.install.removal import Removal
    from natctl.withdrawal import Held

_ABOUT = """\
Removes what `virt-ports install` wrote, the state of natd and cpmd with the
ledger, and from the kernel our tables, routes and rule; settings that natd
changed since this machine has booted are set back, unless somebody changed them
since, or other rules of this machine need them. It says all of that first, and
asks. natd and cpmd must not run: it ends no process itself.

The ledger and natd's state go from where cpmd.toml and natd.toml have them. The
key of `virt-ports pki` stays: it cannot be made again.

Connections of VMs that our rules translate end; VMs go on running. Files that
you edited stay, but for the hook, which moves to /etc/virt-ports/hook.edited.
The programs themselves stay: apt or pipx removes them."""

_EXAMPLES = """\
  virt-ports uninstall --dry-run       only print what it would do
  systemctl disable --now natd cpmd
  virt-ports backup /root/ledger.db    a copy of who had which port when
  virt-ports uninstall
  apt purge virt-ports                 or: pipx uninstall virt-ports"""

VERB = parsing.Verb(151, "give kernel and files of this machine back as they were", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    option = verb.add_argument
    option("--yes", action="store_true", help="do not ask")
    option("--keep-ledger", action="store_true", help="leave /var/lib/virt-ports, which says who had which port when")
    option("--edited", action="store_true", help="remove files that you edited, too")
    option("--root", metavar="DIR", type=Path, default=Path("/"), help="files of an image mounted here; no kernel")
    option("--dry-run", action="store_true", help="change nothing, print what would be done")


def run(args: argparse.Namespace) -> int:
    """Uninstall, or print what would be done."""
    from cpm.install import places, removal
    from cpm.install.plan import HOOK

    is_here = args.root.resolve() == Path("/")
    if is_here and os.geteuid() != 0:
        raise InvalidRequest("only root can look into this machine's kernel and change it; use sudo")
    written = places.read(args.root)
    held = _held(str(written.cpmd_socket), dry_run=args.dry_run) if is_here else None
    removals = removal.plan(args.root, written, keep_ledger=args.keep_ledger, with_edited=args.edited)
    steps = _steps(is_here=is_here)
    if args.dry_run:
        _report(args, held, removals, steps, would=True)
        return ExitCode.DONE
    if not args.yes:
        facts = "".join(f"{line}\n" for line in _lines(held, removals, would=True))
        asking.confirm(facts, "Go on", otherwise="nothing was changed", without_terminal="use --yes")
    hook_first = [each for each in removals if each.path == HOOK]
    removal.carry_out(args.root, hook_first)
    if held is not None:
        from natctl import withdrawal

        withdrawal.withdraw(held)
    removal.carry_out(args.root, [each for each in removals if each not in hook_first], written.folders)
    _report(args, held, removals, steps, would=False)
    return ExitCode.DONE


def _held(cpmd_socket: str, *, dry_run: bool) -> Held:
    """
    Look at the kernel.

    :raise Conflict: When a daemon runs, which would put back what is removed.
    """
    from natctl import withdrawal

    config = withdrawal.config()
    if not dry_run and (withdrawal.is_running(config) or withdrawal.is_listening(cpmd_socket)):
        raise Conflict("natd or cpmd runs; run `systemctl disable --now natd cpmd` first. VMs and connections go on")
    return withdrawal.look(config)


def _steps(*, is_here: bool) -> list[str]:
    steps = ["systemctl daemon-reload"] if is_here else []
    return [*steps, "userdel virt-ports, if no file of that user is left elsewhere",
            "apt purge virt-ports, or pipx uninstall virt-ports: removes the programs"]  # fmt: skip


def _lines(held: Held | None, removals: list[Removal], *, would: bool) -> list[str]:
    from cpm.install.removal import Fate

    verb = {fate: f"would {fate.value}" if would else done for fate, done in
            ((Fate.REMOVE, "removed"), (Fate.KEEP, "kept"), (Fate.MOVE, "moved"))}  # fmt: skip
    lines = [f"{verb[each.fate]} {each.path}" + (f": {each.why}" if each.why else "") for each in removals]
    if held is not None:
        lines += [f"{'would give back' if would else 'gave back'} {line}" for line in held.lines()]
        lines += [f"kept {line}" for line in held.kept]
        if held.connections:
            vms = f"{len(held.connections)} VM{'s' if len(held.connections) > 1 else ''}"
            cut = f"connections of {vms}, which these rules translate; VMs that run go on running"
            lines.append(f"{'would cut' if would else 'cut'} the {cut}")
    return lines or ["nothing of virt-ports is here"]


def _report(
    args: argparse.Namespace, held: Held | None, removals: list[Removal], steps: list[str], *, would: bool
) -> None:
    if parsing.wants_json(args):
        files: list[RemovedFileDocument] = [
            {"path": str(each.path), "action": each.fate.value, "why": each.why} for each in removals
        ]
        kernel = list(held.lines()) if held is not None else []
        cut = len(held.connections) if held is not None else 0
        document: UninstallDocument = {
            "dry_run": would, "files": files, "kernel": kernel, "vms_cut": cut, "remaining": steps,
        }  # fmt: skip
        render.emit_document(document)
        return
    lines = _lines(held, removals, would=would)
    lines += ["", "Left to do by hand:", *(f"  {number}. {step}" for number, step in enumerate(steps, 1))]
    render.emit("\n".join(lines) + "\n")
