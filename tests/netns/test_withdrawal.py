"""`virt-ports uninstall` in a namespace: everything that anybody can see of the kernel is as it was before."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

import pytest

from natctl import settings, withdrawal
from natctl.kernel import sysctl
from natctl.kernel.settings_before import FILE, Setting, SettingsBefore
from tests.fakes.intents import with_intent
from tests.netns.machine import Machine
from tests.netns.test_kernel import AT_EDGE, HOSTED, ONE, PATH

pytestmark = pytest.mark.netns
_T = TypeVar("_T")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with contextlib.closing(Machine()) as made:
        # As on a machine that was never a router; strict filters, and a short memory for pings.
        made.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv4.conf.eth1.rp_filter=1",
                           "net.ipv4.conf.eth0.rp_filter=1", "net.netfilter.nf_conntrack_icmp_timeout=30")  # fmt: skip
        made.nft("add table ip theirs")
        yield made


def inside(machine: Machine, work: Callable[[], _T]) -> _T:
    """Call it in the machine's namespace."""

    def enter_and_work() -> _T:
        machine.namespace.enter()
        return work()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(enter_and_work).result()


def everything(machine: Machine) -> dict[str, str]:
    run = machine.namespace.run
    seen = dict(zip(("ruleset", "routes", "rules", "ours"), machine.everything(), strict=True))
    lines = run("sysctl", "-a", "--pattern", r"^net\.").splitlines()
    # What counts, and not what is set.
    seen["settings"] = "\n".join(line for line in sorted(lines) if "nf_conntrack_count" not in line)
    # Not those of IPv6, which the kernel adds by itself while links come up.
    seen["all routes"] = run("ip", "-4", "route", "show", "table", "all")
    seen["rules of IPv6"] = run("ip", "-6", "rule")
    seen["links"] = run("ip", "-br", "link")
    return seen


def config(folder: Path) -> settings.Settings:
    path = folder / "natd.toml"
    path.write_text(f"""
        name = "m"
        roles = ["host"]
        underlay_address = "172.30.0.21"
        [manager]
        url = "unix:///run/none"
        [listen]
        socket = "{folder}/natd.sock"
        [host]
        uplinks = ["eth1"]
    """)
    return settings.load(path)


def program(machine: Machine, folder: Path) -> None:
    machine.restart_natd(SettingsBefore(folder / FILE))
    machine.replace({ONE: HOSTED}, AT_EDGE, PATH)


def test_everything_is_as_before(machine: Machine, tmp_path: Path) -> None:
    before = everything(machine)
    program(machine, tmp_path)
    assert everything(machine) != before
    held = inside(machine, lambda: withdrawal.look(config(tmp_path)))
    lines = list(held.lines())
    assert {"table ip virtports", "table bridge virtports", "net.ipv4.ip_forward from 1 to 0"} <= set(lines)
    assert "net.ipv4.conf.eth1.rp_filter from 2 to 1" in lines
    inside(machine, lambda: withdrawal.withdraw(held))
    assert everything(machine) == before
    after = inside(machine, lambda: withdrawal.look(config(tmp_path)))
    assert list(after.lines()) == []


def test_settings_have_the_names_that_sysctl_takes(machine: Machine, tmp_path: Path) -> None:
    program(machine, tmp_path)
    lines = inside(machine, lambda: list(withdrawal.look(config(tmp_path)).lines()))
    found = [line.split() for line in lines if line.startswith("net.")]
    assert "net.netfilter.nf_conntrack_icmp_timeout" in [words[0] for words in found]
    for name, _, now, _, _ in found:
        assert machine.namespace.run("sysctl", "-n", name).strip() == now


def test_a_dot_in_the_name_of_an_interface_is_a_slash_for_sysctl(machine: Machine) -> None:
    machine.namespace.run("ip", "link", "add", "eth0.7", "type", "veth", "peer", "name", "other")
    path = "conf/eth0.7/rp_filter"
    name = sysctl.key(path)
    assert name == "net.ipv4.conf.eth0/7.rp_filter"
    assert machine.namespace.run("sysctl", "-n", name).strip() == inside(machine, lambda: sysctl.read(path))


def test_the_connections_that_are_cut_leave_the_kernel(machine: Machine, tmp_path: Path) -> None:
    """Otherwise they would be those of whichever VM has the internal address after another installation."""
    program(machine, tmp_path)
    for internal, port, mark in (("100.64.0.5", "61000", "0x40000000"), ("192.0.2.9", "61001", "0")):
        flow = ("-p", "udp", "-s", "10.10.0.2", "-d", "192.0.2.1", "--sport", port, "--dport", "80")
        machine.namespace.run(
            "conntrack", "-I", "--timeout", "600", *flow, "--src-nat", f"{internal}:{port}", "--mark", mark
        )
    held = inside(machine, lambda: withdrawal.look(config(tmp_path)))
    assert held.connections == {IPv4Address("100.64.0.5")}
    inside(machine, lambda: withdrawal.withdraw(held))
    (left,) = machine.namespace.run("conntrack", "-L").splitlines()
    assert "192.0.2.9" in left


def test_what_comes_from_a_vms_tap_is_routed_again(machine: Machine, tmp_path: Path) -> None:
    machine.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    machine.namespace.ip("link add vmbr0 type bridge", "tuntap add vnet9 mode tap", "link set vnet9 master vmbr0")
    number = int(machine.namespace.run("cat", "/sys/class/net/vnet9/ifindex"))
    machine.restart_natd(SettingsBefore(tmp_path / FILE))
    machine.replace({ONE: with_intent(HOSTED, taps=frozenset({number}))}, AT_EDGE, PATH)
    key = "net.ipv4.conf.vnet9.forwarding"
    assert machine.namespace.run("sysctl", "-n", key) == "0\n"
    held = inside(machine, lambda: withdrawal.look(config(tmp_path)))
    assert f"{key} from 0 to 1" in list(held.lines())
    inside(machine, lambda: withdrawal.withdraw(held))
    assert machine.namespace.run("sysctl", "-n", key) == "1\n"


def test_after_a_restart_of_natd_the_first_values_count(machine: Machine, tmp_path: Path) -> None:
    before = everything(machine)
    program(machine, tmp_path)
    machine.namespace.run("sysctl", "-qw", "net.ipv4.conf.eth1.rp_filter=1")
    program(machine, tmp_path)
    inside(machine, lambda: withdrawal.withdraw(withdrawal.look(config(tmp_path))))
    assert everything(machine) == before


def test_what_others_changed_since_stays(machine: Machine, tmp_path: Path) -> None:
    program(machine, tmp_path)
    machine.namespace.run("sysctl", "-qw", "net.ipv4.conf.eth1.rp_filter=0")
    held = inside(machine, lambda: withdrawal.look(config(tmp_path)))
    assert not any("eth1.rp_filter" in line for line in held.lines())


def test_forwarding_stays_on_where_others_forward(machine: Machine, tmp_path: Path) -> None:
    """libvirt's networks need it, and libvirt sets it only when it starts one: VMs would lose their way for good."""
    program(machine, tmp_path)
    machine.nft("add chain ip theirs forward { type filter hook forward priority 0; }")
    held = inside(machine, lambda: withdrawal.look(config(tmp_path)))
    assert held.kept == ("net.ipv4.ip_forward stays 1: other rules forward packets (ip theirs)",)
    inside(machine, lambda: withdrawal.withdraw(held))
    assert machine.namespace.run("sysctl", "-n", "net.ipv4.ip_forward").strip() == "1"


def test_forwarding_stays_on_where_rules_of_iptables_legacy_forward(machine: Machine, tmp_path: Path) -> None:
    """nftables does not show them."""
    program(machine, tmp_path)
    machine.namespace.run("iptables-legacy", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    held = inside(machine, lambda: withdrawal.look(config(tmp_path)))
    assert held.kept == ("net.ipv4.ip_forward stays 1: other rules forward packets (iptables-legacy nat)",)


def test_what_the_kernel_sets_with_forwarding_is_as_before(machine: Machine, tmp_path: Path) -> None:
    """Redirects are refused on hardened machines, and an interface may forward where the machine does not."""
    hardened = ("net.ipv4.conf.all.accept_redirects=0", "net.ipv4.conf.far0.forwarding=1")
    machine.namespace.run("sysctl", "-qw", *hardened)
    before = everything(machine)
    program(machine, tmp_path)
    inside(machine, lambda: withdrawal.withdraw(withdrawal.look(config(tmp_path))))
    assert everything(machine) == before


def test_what_others_set_while_the_machine_forwards_stays(machine: Machine, tmp_path: Path) -> None:
    program(machine, tmp_path)
    run = machine.namespace.run
    run("sysctl", "-qw", "net.ipv4.conf.all.accept_redirects=1", "net.ipv4.conf.far1.forwarding=0")
    inside(machine, lambda: withdrawal.withdraw(withdrawal.look(config(tmp_path))))
    settings_ = run("sysctl", "-n", "net.ipv4.conf.all.accept_redirects", "net.ipv4.conf.far1.forwarding",
                    "net.ipv4.ip_forward")  # fmt: skip
    assert settings_.split() == ["1", "0", "0"]


def test_without_anything_of_ours_nothing_is_found(machine: Machine, tmp_path: Path) -> None:
    held = inside(machine, lambda: withdrawal.look(None))
    assert (held.tables, list(held.lines()), held.connections) == ((), [], frozenset[IPv4Address]())


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": ["1"]}', "null"])
def test_a_damaged_note_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert dict(SettingsBefore(tmp_path / FILE).read()) == {}


def test_a_note_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    SettingsBefore(tmp_path / "gone" / FILE).note("ip_forward", "0", "1")
    noted = SettingsBefore(tmp_path / FILE)
    noted.note("ip_forward", "0", "1")
    noted.note("ip_forward", "1", "2")
    assert noted.read() == {"ip_forward": Setting("0", "2")}
    assert json.loads((tmp_path / FILE).read_text()) == {"ip_forward": ["0", "2"]}


def test_a_daemon_that_runs_is_noticed(tmp_path: Path) -> None:
    import socket

    assert not withdrawal.is_listening(str(tmp_path / "natd.sock"))
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(tmp_path / "natd.sock"))
        assert not withdrawal.is_listening(str(tmp_path / "natd.sock"))
        daemon.listen()
        assert withdrawal.is_running(config(tmp_path))


def test_a_ledger_on_a_disk_of_its_own_is_deleted_and_the_disk_stays_mounted(tmp_path: Path) -> None:
    folder = tmp_path / "var/lib/virt-ports"
    folder.mkdir(parents=True)
    (tmp_path / "etc/virt-ports").mkdir(parents=True)
    (tmp_path / "etc/virt-ports/install.json").write_text('{"files": {}, "roles": []}')
    script = f"""
        mount -t tmpfs none {folder} && echo ledger >{folder}/ledger.db || exit 3
        {sys.executable} -c "import sys; from cpm.cli.main import main; sys.exit(main())" \
            uninstall --yes --root {tmp_path} || exit 4
        mountpoint -q {folder} && test -z "$(ls -A {folder})"
    """
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "etc/virt-ports").exists()
