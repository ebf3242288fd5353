"""``virt-ports pki``: certificates for manager and nodes. Tested in ``tests/unit/cpm/install/test_pki.py``."""

from __future__ import annotations

from pathlib import Path

from cpm.cli import parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.cli.documents import CertificateDocument
    from cpm.install.pki import Authority, Issued

_ABOUT = """\
A certificate authority for manager and nodes only, in one folder on one machine,
best the manager's. A certificate proves a name and nothing else; what a node may
be is approved with `virt-ports node approve`. `renew` without names renews what
ends within 60 days and keeps the keys. Copy new files to their machines: natd and
cpmd take them over within ten seconds, or at once by `systemctl reload`, and no
session ends."""

_EXAMPLES = """\
  virt-ports pki init
  virt-ports pki issue 172.30.0.2      the manager, by the address in --manager
  virt-ports pki issue host1           a node, by its name
  virt-ports pki list
  virt-ports pki renew                 all that end soon"""

VERB = parsing.Verb(153, "make certificates for manager and nodes", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    actions = verb.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    init = parsing.add_action(actions, "init", "make the certificate authority")
    issue = parsing.add_action(actions, "issue", "issue certificates with new keys")
    issue.add_argument("names", metavar="NAME", nargs="+", help="a node's name, or the manager's IPv4 address")
    renew = parsing.add_action(actions, "renew", "issue certificates again, with the keys that they have")
    renew.add_argument("names", metavar="NAME", nargs="*", help="default: all that end within 60 days")
    listing = parsing.add_action(actions, "list", "list the certificates and when they end")
    listing.add_argument("patterns", metavar="PATTERN", nargs="*", help="only those with such names: 'host*'")
    listing.add_argument("--sort", metavar="KEY", choices=("ends", "name"), default="ends",
                         help="ends, name (default: ends); what ends first comes first")  # fmt: skip
    listing.add_argument("--limit", metavar="N", type=parsing.count_from_1, help="at most N lines")
    listing.add_argument("--after", metavar="NAME", help="only what comes after it; with --sort name")
    for action in (init, issue, renew, listing):
        action.add_argument("--folder", metavar="DIR", type=Path, default=Path("/etc/virt-ports/pki"),
                            help="folder of the authority (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Carry out the action and print the certificates that it is about."""
    from cpm.install import pki
    from cpm.protocol.errors import ExitCode, InvalidRequest

    authority = pki.Authority(args.folder)
    try:
        done = _done(args, authority)
    except OSError as error:
        raise InvalidRequest(f"cannot use {args.folder}: {error.strerror}; run this as root") from error
    done, more = _page(args, done) if args.action == "list" else (done, "")
    code = parsing.print_answer(args, [_document(each) for each in done], lambda: _table(done) + more)
    is_incomplete = args.action == "renew" and any(each.fault for each in done)
    return ExitCode.REFUSED if is_incomplete else code


def _page(args: argparse.Namespace, issued: list[Issued]) -> tuple[list[Issued], str]:
    """Return those that are asked for, and the line about the next page."""
    from cpm.api.parameters import Patterns
    from cpm.protocol.errors import InvalidRequest

    wanted, is_by_name = Patterns(args.patterns), args.sort == "name"
    if args.after is not None and not is_by_name:
        raise InvalidRequest("--after goes with the order of names only; add --sort name")
    # They come in the order in which they end.
    found = [each for each in issued if wanted.fit(each.name) and (args.after is None or each.name > args.after)]
    if is_by_name:
        found.sort(key=lambda each: each.name)
    found, more = parsing.page_of(found, args.limit, lambda each: each.name)
    return found[: args.limit], more if is_by_name else ""


def _done(args: argparse.Namespace, authority: Authority) -> list[Issued]:
    if args.action == "init":
        return [authority.create(parsing.now(args))]
    if args.action == "issue":
        # All or none.
        for name in args.names:
            authority.check_free(name)
        return [authority.issue(name, parsing.now(args)) for name in args.names]
    if args.action == "renew":
        if args.names:
            return [authority.renew(name, parsing.now(args)) for name in args.names]
        unread = [each for each in authority.issued() if each.fault]
        return [*unread, *(authority.renew(each.name, parsing.now(args)) for each in authority.due(parsing.now(args)))]
    return authority.issued()


def _document(issued: Issued) -> CertificateDocument:
    certificate, key = str(issued.certificate), str(issued.key)
    return {"name": issued.name, "certificate": certificate, "key": key, "ends": issued.ends, "fault": issued.fault}


def _table(issued: list[Issued]) -> str:
    rows = [
        (each.name, "?" if each.ends is None else render.moment(each.ends), str(each.certificate), str(each.key))
        for each in issued
    ]
    faults = "".join(f"{each.fault}\n" for each in issued if each.fault)
    return render.table(("Name", "Ends", "Certificate", "Key"), rows) + faults
