"""What the parts of the bench measure with: made-up fleets, what nft shows, calls of the hook, the ledger's rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import burst, figures, hook, ledger, nft
from bench.fleet import fleet
from lab.errors import LabError
from libvirt_hooks import domain_xml


def test_a_part_for_every_figure() -> None:
    assert set(bench.PARTS) == set(figures.KEYS)


def test_no_two_vms_of_a_fleet_share_a_port() -> None:
    vms = fleet(2_500)
    ranges = sorted((each.external, each.ports) for vm in vms.edge.values() for each in vm.ranges)
    assert len(ranges) == len(vms.edge) == len(vms.host) == 2_500
    for (external, ports), (other_external, others) in itertools.pairwise(ranges):
        assert external != other_external or not ports.overlaps(others)
    assert {external for external, _ in ranges} == vms.path.externals


def test_a_vm_without_its_ports_keeps_its_place() -> None:
    entry = fleet(10).edge_vm(3, ranges=False)
    assert (entry.ranges, entry.internal, entry.via) == ((), *_where(3))


def _where(number: int) -> tuple[object, object]:
    entry = fleet(10).edge_vm(number, ranges=True)
    return entry.internal, entry.via


LISTING = """table ip virtports {
	map outbound-1 {
		type ipv4_addr . inet_service : ipv4_addr
		elements = { 100.64.0.1 . 1024-33791 comment "vm0" : 203.0.113.1,
			     100.64.0.2 . 1024-1087 comment "vm1" : 203.0.113.2 }
	}
	map inbound-203.0.113.2 {
		elements = { 1024-1087 comment "vm1" : 100.64.0.2 }
	}
}
"""  # noqa: E101 - as nft indents it


def test_changes_are_read_off_what_nft_lists(tmp_path: Path) -> None:
    path = tmp_path / "listing"
    path.write_text(LISTING)
    ranges = nft.ranges_in(path)["vm1"]
    assert nft.as_text("delete", "vm1", ranges) == (
        "delete element ip virtports outbound-1 { 100.64.0.2 . 1024-1087 }\n"
        "delete element ip virtports inbound-203.0.113.2 { 1024-1087 }\n"
    )
    assert nft.as_text("add", "vm1", ranges) == (
        'add element ip virtports outbound-1 { 100.64.0.2 . 1024-1087 comment "vm1" : 203.0.113.2 }\n'
        'add element ip virtports inbound-203.0.113.2 { 1024-1087 comment "vm1" : 100.64.0.2 }\n'
    )


def test_every_call_of_the_hook_is_for_another_vm_with_an_interface_of_its_own() -> None:
    seen = set()
    for number in range(300):
        argv, xml = hook.call(number)
        facts = domain_xml.parse(xml.encode())
        assert argv[1:] == [facts.name, "start", "begin", "-"]
        [interface] = facts.interfaces
        assert interface.target == hook.tap(number)
        seen.add((facts.uuid, interface.target))
    assert len(seen) == 300


def test_an_interface_has_no_name_yet_when_libvirt_prepares_a_start() -> None:
    argv, xml = hook.call(7, "prepare")
    assert argv[1:] == ["bench7", "prepare", "begin", "-"]
    assert [interface.target for interface in domain_xml.parse(xml.encode()).interfaces] == [None]


def test_the_ledger_part_gives_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "TRANSACTIONS", 20)
    monkeypatch.setattr(ledger, "RUNS", 2)
    found = ledger.measure(lambda text: None)
    assert set(found.figures) == set(figures.KEYS["ledger"])
    assert all(value > 0 for value in found.figures.values())
    assert [len(values) for values in found.runs.values()] == [2, 2]


def test_syns_that_were_sent_again_are_read_off_netstat() -> None:
    netstat = "TcpExt: SyncookiesSent TCPSynRetrans TCPOrigDataSent\nTcpExt: 3 171 9\nIpExt: InNoRoutes\nIpExt: 0\n"
    assert burst.syn_retransmissions(netstat) == 171
    with pytest.raises(LabError, match="TCPSynRetrans"):
        burst.syn_retransmissions("TcpExt: SyncookiesSent\nTcpExt: 3\n")


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench.main(["everything"])
    assert refused.value.code == 2
    assert "there is no part everything" in capsys.readouterr().err
