"""The sentences of the errors, in full and in one place: other tests ask for the class and its attributes."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.protocol import errors, ledger_errors
from cpm.protocol.error_codes import CODES
from cpm.protocol.errors import VirtPortsError
from cpm.protocol.walltime import WallTime

SENTENCES: dict[VirtPortsError, str] = {
    VirtPortsError("as given"): "as given",
    errors.InvalidRequest("as given"): "as given",
    errors.Conflict("as given"): "as given",
    errors.Forbidden("as given"): "as given",
    errors.Busy("as given"): "as given",
    ledger_errors.LedgerError("as given"): "as given",
    ledger_errors.LedgerUnwritable("as given"): "as given",
    ledger_errors.LedgerFull("as given"): "as given",
    errors.ConfigError("/etc/x.toml", "pool.cap", "use 64 or more"): "/etc/x.toml: pool.cap: use 64 or more",
    errors.ConfigError("/etc/x.toml", "", "cannot read"): "/etc/x.toml: cannot read",
    errors.NotFound("VM", "web", "see `virt-ports list`"): "no VM 'web'; see `virt-ports list`",
    ledger_errors.JournalNotKept(WallTime.of(0)): "the journal is complete only from 1970-01-01T00:00:00Z on; "
    "older entries are in the files that cpmd exported, see docs/reference/journal.md",
    ledger_errors.JournalGap(WallTime.of(0), WallTime.of(60)): "the journal is lost from 1970-01-01T00:00:00Z until "
    "1970-01-01T00:01:00Z because an earlier ledger was restored; the former ledger, if it is there, is beside the "
    "present one as *.before-restore-*",
    errors.Ambiguous("web", ("u1", "u2")): "2 VMs are named 'web'; use one of the UUIDs u1, u2",
    ledger_errors.LedgerMistrusted(
        "edge1", "it has seen more", "stop cpmd"
    ): "edge1 is refused: it has seen more; stop cpmd",
    ledger_errors.LedgerDoubted("an edge has seen more; restore it"): "an edge has seen more; restore it",
    errors.AddressInUse(IPv4Address("203.0.113.1"), 2): "cannot remove 203.0.113.1: VMs hold 2 ranges on it; "
    "have new connections leave it with `virt-ports pool add 203.0.113.1 --pool leaving`, and wait until its ports are "
    "free, see `virt-ports pool show 203.0.113.1`",
    errors.AddressInUse(IPv4Address("203.0.113.2"), 1): "cannot remove 203.0.113.2: VMs hold 1 range on it; "
    "have new connections leave it with `virt-ports pool add 203.0.113.2 --pool leaving`, and wait until its ports are "
    "free, see `virt-ports pool show 203.0.113.2`",
    errors.AddressOverlaps(
        IPv4Address("100.64.0.1"), "it is in the internal pool", "use another address"
    ): "cannot use 100.64.0.1 as an external address: it is in the internal pool; use another address",
    errors.NotApproved("host1", "is not approved"): "host1 is not approved; "
    "on the manager: virt-ports node approve host1",
    errors.NameInUse("host1", "172.30.0.11", "172.30.0.99"): "172.30.0.11 is connected as host1 and answers, "
    "so 172.30.0.99 is refused; give that machine another name and certificate",
    errors.QuotaReached("host1", "vms", 1000): "host host1 is at its quota of 1000 VMs, leaving ones included; "
    "to raise it: `virt-ports node approve host1 --max-vms N`",
    errors.IllegalStep("held", "expired"): "a range that is held cannot be expired; please report this as a bug",
    errors.PortsInUse(
        IPv4Address("203.0.113.1"), "1024-1279", "web1", "a-b"
    ): "cannot reserve these ports of 203.0.113.1: VM web1 has 1024-1279; give it other "
    "ports, `virt-ports relocate a-b`, and try again when `virt-ports pool show 203.0.113.1` does not "
    "show that range any more",
    errors.PortHeld(
        IPv4Address("203.0.113.1"), "22", "VM web1 (a-b)", "until its forward is removed", "use another port"
    ): "203.0.113.1 22 belongs to VM web1 (a-b) until its forward is removed; use another port",
    errors.Overloading("no_overloading"): "refused, one external port would have two owners (no_overloading); "
    "please report this as a bug",
    errors.PortsExhausted(64, 8, "no run"): "cannot allocate 64 ports: no run (longest free run: 8); "
    "add an address to its pool with `virt-ports pool add`",
    errors.InternalPoolExhausted("10.0.0.0/30"): "no internal address is left in 10.0.0.0/30; "
    "set a larger pool.internal in cpmd.toml",
    ledger_errors.SchemaTooNew(9, 7): "the ledger has schema 9, this version knows 7; "
    "install the newer virt-ports again, or take in a backup made before the upgrade with `virt-ports restore`",
    errors.KernelError("add a route", 101, "Network is unreachable"): "cannot add a route: Network is unreachable "
    "(errno 101); see `nft list ruleset` on this node",
    errors.Unreachable("/run/s", "no such socket", "is cpmd running?"): "cannot reach /run/s: no such socket; "
    "is cpmd running?",
}


def test_every_class_has_its_sentence_here() -> None:
    assert {error.code for error in SENTENCES} == set(CODES)


@pytest.mark.parametrize(("error", "sentence"), SENTENCES.items(), ids=lambda each: getattr(each, "code", ""))
def test_the_sentence_says_what_happened_and_what_to_do(error: VirtPortsError, sentence: str) -> None:
    assert str(error) == sentence
