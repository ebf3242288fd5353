"""Checks of certificates and permissions. Tested in ``tests/unit/machine_doctor/test_checks_of_services.py``."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Final

from machine_doctor.checks.registry import check, once_installed
from machine_doctor.facts import CertificateFacts, Facts, known
from machine_doctor.findings import CannotTell, NotApplicable, Trouble, Verdict, problem, warning

_DAY_S: Final = 86400.0
_SOON_DAYS, _VERY_SOON_DAYS = 30, 7


@check(
    "certificates",
    "certificates are valid, name the node or manager, and fit their keys and CA",
    matters="natd and cpmd refuse each other: the node gets no changes",
    remedy="issue a new certificate with the right name; natd and cpmd take it over by themselves",
)
def certificates(facts: Facts) -> Verdict:
    """Judge the certificates that natd.toml and cpmd.toml name."""
    found = known(facts.certificates)
    if not found:
        raise NotApplicable("natd and cpmd here use no certificates")
    troubles = [trouble for each in found for trouble in _of(each, facts)]
    shown = {each.file: f"{', '.join(each.names) or 'no names'}" + _left(each, facts.now) for each in found}
    return Verdict(dict(shown), tuple(troubles))


def _left(certificate: CertificateFacts, now: float) -> str:
    return "" if certificate.ends is None else f", {(certificate.ends - now) / _DAY_S:.0f} days left"


def _of(certificate: CertificateFacts, facts: Facts) -> Iterator[Trouble]:
    daemon = "natd" if certificate.kind == "node" else "cpmd"
    renew = f"issue a new one for the same name into {certificate.file}; {daemon} takes it over by itself"
    if certificate.wrong:
        yield problem(f"{certificate.file}: {certificate.wrong}", renew)
        return
    for what, ends in (("certificate", certificate.ends), ("CA", certificate.ca_ends)):
        if ends is not None and ends - facts.now < _SOON_DAYS * _DAY_S:
            days = (ends - facts.now) / _DAY_S
            soon = problem if days < _VERY_SOON_DAYS else warning
            yield soon(f"the {what} of {certificate.file} ends in {days:.0f} days", renew)
    name = facts.setup.name
    if certificate.kind == "node" and certificate.names and name not in certificate.names:
        names = ", ".join(certificate.names)
        yield problem(
            f"{certificate.file} is for {names}, and this node's name is {name}",
            f"set name in natd.toml to the name in the certificate, or issue one for {name}; restart natd",
        )


@check(
    "permissions",
    "keys, sockets and the ledger are closed to other users",
    matters="another user reads a private key, or listens where libvirt's hook asks which VMs may start",
    remedy="`chmod` and `chown` as the finding says",
)
def permissions(facts: Facts) -> Verdict:
    """Judge modes and owners."""
    once_installed(facts)
    if not facts.files:
        raise CannotTell(f"cannot look at {', '.join(facts.unseen)}" if facts.unseen else "there are no such files yet")
    return Verdict(
        {"looked at": [each.path for each in facts.files], "could not be looked at": list(facts.unseen)},
        tuple(_open(facts)),
    )


def _open(facts: Facts) -> Iterator[Trouble]:
    setup = facts.setup
    of_root = (setup.natd.manager.key,) if setup.natd is not None else ()
    keys = {
        *of_root,
        *((setup.cpmd.listen.key, setup.cpmd.events.webhook_token_file) if setup.cpmd is not None else ()),
    }
    natd_socket = setup.natd.listen.socket if setup.natd is not None else ""
    cpmd_socket = setup.cpmd.listen.socket if setup.cpmd is not None else ""
    ledger = setup.cpmd.ledger.path if setup.cpmd is not None else ""
    for each in facts.files:
        mode = stat.S_IMODE(each.mode)
        shown = f"{each.path} (mode {mode:o}, owner {each.owner})"
        # cpmd is not root, and may get its key by its group, or by an ACL, whose mask is shown in place of the group.
        if each.path in keys and mode & (0o077 if each.path in of_root else 0o027):
            yield problem(f"other users can read or write the secret in {shown}", f"chmod 600 {each.path}")
        elif natd_socket.startswith(f"{each.path}/") and (each.uid or mode & 0o022):
            yield problem(
                f"others than root can put a socket into {shown}, and libvirt's hook believes it",
                f"chown root:root {each.path} && chmod 700 {each.path}",
            )
        elif each.path == natd_socket and mode & 0o077:
            yield warning(f"other users can ask natd as libvirt's hook does, at {shown}", f"chmod 600 {each.path}")
        elif cpmd_socket.startswith(f"{each.path}/") and mode & 0o022:
            yield problem(
                f"others can put a socket in the place of cpmd's into {shown}: `virt-ports` and natd believe it",
                f"chmod 750 {each.path}",
            )
        elif each.path == cpmd_socket and mode & 0o007:
            yield warning(f"every user can ask cpmd, at {shown}", f"chmod o-rwx {each.path}")
        elif each.path == ledger and mode & 0o007:
            yield warning(f"every user can read the ledger {shown}", f"chmod o-rwx {each.path}")
