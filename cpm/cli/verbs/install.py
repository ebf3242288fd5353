"""
``virt-ports install``: puts units, hook and an initial configuration on a machine.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address
from pathlib import Path, PurePosixPath

from cpm.cli import asking, parsing, render
from cpm.protocol.errors import ConfigError, ExitCode, InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.cli.documents import InstallDocument, InstalledFileDocument
    from cpm.install.choices import Choices
    from cpm.install.plan import FileOutcome

_ABOUT = """\
Writes systemd units, the user and directory they need, the libvirt hook (role
host) and an initial configuration in /etc/virt-ports, and prints what it did
and what is left to do by hand. It starts nothing but the hook, once, to see that
libvirt can run it: a hook that does not run is taken away again. Existing
configuration and edited files stay as they are: the new text is put beside them
as FILE.new. Running it again changes nothing.

Without --role it asks, on a terminal, for what it cannot find out itself."""

_EXAMPLES = """\
  virt-ports install                                     asks what it has to know
  virt-ports install --role host,edge,manager            everything on one machine
  virt-ports install --role host --manager https://172.30.0.2:7414
  virt-ports install --role edge --manager https://172.30.0.2:7414 --underlay eth1
  virt-ports install --role host,edge,manager --dry-run  only print what it would do"""

VERB = parsing.Verb(
    150, "put units, hook and an initial configuration on this machine", about=_ABOUT, examples=_EXAMPLES
)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    option = verb.add_argument
    what = verb.add_mutually_exclusive_group()
    what.add_argument("--role", metavar="ROLES",
                      help="host (runs VMs), edge (connects to the internet), manager; several with commas (default: "
                      "asks)")  # fmt: skip
    what.add_argument(
        "--refresh", action="store_true", help="only bring units and hook of an earlier install up to this version"
    )
    option("--manager", metavar="URL", help="URL of cpmd: https://ADDRESS:PORT (default: on this machine)")
    option("--name", help="name of this machine for the manager (default: its host name)")
    option("--uplink", metavar="INTERFACE", help="interface to the internet (default: that of the default route)")
    option("--underlay", metavar="INTERFACE", help="interface between hosts and edges (default: none)")
    option("--underlay-address", metavar="ADDRESS", type=_address,
           help="this machine's address between hosts and edges (default: that of the interface)")  # fmt: skip
    option("--internal-pool", metavar="NETWORK",
           help="internal addresses of VMs (default: 100.64.0.0/10, or a part that is free here)")  # fmt: skip
    option("--forward", choices=("all", "vms"), default="all",
           help="what an edge forwards: everything, or only VMs' packets (default: all)")  # fmt: skip
    option("--bindir", metavar="DIR", help="directory of cpmd and natd (default: that of this program)")
    option("--root", metavar="DIR", type=Path, default=Path("/"), help="install into an image mounted here")
    option("--dry-run", action="store_true", help="write nothing, print what would be done")


def run(args: argparse.Namespace) -> int:
    """Install, or print what would be done."""
    from cpm.install import apply, choices, hook_check, plan, steps

    _check_rights(args.root, dry_run=args.dry_run)
    programs = _programs(args)
    # Another machine's interpreters are not these.
    check = hook_check.reason_not_to_run if args.root.resolve() == Path("/") else None
    installer = apply.Installer(args.root, dry_run=args.dry_run, reason_not_to_run=check)
    if args.refresh:
        done = installer.refresh(plan.program_files(frozenset(choices.ROLES), programs))
        _report(args, done, steps.after_refresh(done))
    else:
        wanted = _choices(args, installer.former_roles())
        done = installer.install(plan.targets(wanted, programs), wanted.roles)
        _report(args, done, steps.after_install(wanted, done))
    is_complete = all(one.action is not plan.Action.TAKE_AWAY for one in done)
    return ExitCode.DONE if is_complete else ExitCode.REFUSED


def _choices(args: argparse.Namespace, former: frozenset[str]) -> Choices:
    """
    Return the choices: from options, answers, and facts about this machine.

    :raise InvalidRequest: When an option is invalid, or one is missing and nobody can be asked.
    """
    from cpm.install import choices, machine, questions

    facts = machine.detect()
    given = questions.Given(
        choices.parse_roles(args.role) if args.role is not None else None,
        args.manager,
        args.uplink,
        args.underlay,
        choices.parse_pool(args.internal_pool, facts) if args.internal_pool else None,
    )
    if given.roles is None:
        if not asking.has_terminal():
            raise InvalidRequest("there is no terminal to ask on; give --role, for example --role host,edge,manager")
        given = questions.ask_missing(given, facts, former, asking.answer)
    assert given.roles is not None
    return choices.complete(
        facts,
        given.roles,
        name=args.name,
        manager=given.manager,
        uplink=given.uplink,
        underlay=given.underlay,
        underlay_address=args.underlay_address,
        internal_pool=given.internal_pool,
        forward=args.forward,
    )


def _report(args: argparse.Namespace, done: list[FileOutcome], steps: list[str]) -> None:
    if parsing.wants_json(args):
        files = [_document(one) for one in done]
        document: InstallDocument = {"dry_run": args.dry_run, "files": files, "remaining": steps}
        render.emit_document(document)
        return
    lines = [_sentence(one, dry_run=args.dry_run) for one in done]
    if steps:
        lines += ["", "Left to do by hand:", *(f"  {number}. {step}" for number, step in enumerate(steps, 1))]
    render.emit("\n".join(lines) + "\n")


def _document(one: FileOutcome) -> InstalledFileDocument:
    return {"path": str(one.path), "action": one.action.value, "why": one.why}


def _sentence(one: FileOutcome, *, dry_run: bool) -> str:
    from cpm.install.plan import Action

    would = "would " if dry_run else ""
    words = {
        Action.CREATE: f"{would}create" if dry_run else "created",
        Action.UPDATE: f"{would}update" if dry_run else "updated",
        Action.LEAVE: "unchanged",
        Action.KEEP: f"{would}keep" if dry_run else "kept",
        Action.PACKAGED: "not needed",
        Action.REMOVE: f"{would}remove" if dry_run else "removed",
        Action.TAKE_AWAY: "NOT installed",
    }
    if one.why:
        return f"{words[one.action]} {one.path}: {one.why}; then run this again. VMs start without it meanwhile"
    if one.action in (Action.PACKAGED, Action.REMOVE):
        return f"{words[one.action]} {one.path}: the package has brought {one.beside}"
    beside = f" ({would}put the new text beside it, {_short(one)})" if one.beside else ""
    return f"{words[one.action]} {one.path}{beside}"


def _short(one: FileOutcome) -> str:
    """Return the name of the new text's file, with its folder when that is another one."""
    assert one.beside is not None
    return one.beside.name if one.beside.parent == one.path.parent else str(one.beside)


def _check_rights(root: Path, *, dry_run: bool) -> None:
    if not root.is_dir():
        raise InvalidRequest(f"no directory {root}; give --root the directory where the image is mounted")
    if root.resolve() == Path("/") and not dry_run and os.geteuid() != 0:
        raise InvalidRequest("only root can install on this machine; use sudo, --dry-run, or --root DIR for an image")


def _programs(args: argparse.Namespace) -> PurePosixPath:
    """
    Return the directory of the programs.

    :raise InvalidRequest: When services cannot use programs there.
    :raise ConfigError: When a program is not there.
    """
    from cpm.install import sources

    directory = Path(args.bindir) if args.bindir else sources.program_directory()
    if not directory.is_absolute() or any(character.isspace() or character == "%" for character in str(directory)):
        raise InvalidRequest(f"not usable in a unit: {str(directory)!r}; use an absolute path without blanks and %")
    if directory.is_relative_to("/home") or directory.is_relative_to("/root"):
        raise InvalidRequest(
            f"services cannot use programs in {directory}; install virt-ports elsewhere, for example with "
            "`python3 -m venv /opt/virt-ports && /opt/virt-ports/bin/pip install virt-ports`"
        )
    if args.root.resolve() == Path("/"):
        for program in ("cpmd", "natd"):
            if not (directory / program).is_file():
                raise ConfigError(str(directory / program), "", "is missing; install virt-ports or give --bindir")
    return PurePosixPath(directory)


def _address(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise parsing.not_of_that_type(f"not an IPv4 address: {text!r}") from None
