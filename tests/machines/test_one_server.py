"""
A server in its operator's hands: the tutorial word by word, then everything that happens to a server, then uninstalled.

One machine of each release, and the tests in this order: each finds the machine as the one before has left it. Nothing
here has a time limit that an emulated machine could miss.
"""

from __future__ import annotations

import itertools
import json
import shlex
import time

import pytest

from tests.docs.transcript import Step, read
from tests.machines.debian import REPOSITORY
from tests.machines.guests import Guest
from tests.machines.leftovers import State, state
from tests.machines.machine import Machine
from tests.machines.operating import Held, ask, assert_works, await_in_order
from tests.machines.waiting import LIMIT_S

pytestmark = [pytest.mark.machines, pytest.mark.timeout(2 * LIMIT_S)]

PAGE = REPOSITORY / "docs/tutorial/one-server.md"
STEPS = read(PAGE)
FIRST, LAST = "Install the package", "Uninstall"
CONNECTIONS = 400
"""How many the tutorial opens."""
SMALL_MACHINE = {"conntrack", "clock"}
"""Checks of the doctor that warn of a machine with 2 GiB, and without a time service, which it does not reach."""
ROW_OF_RESTARTS = (
    *("cpmd", "natd", "libvirtd", "cpmd", "natd"),
    *("cpmd", "libvirtd", "natd", "cpmd"),
)
"""The shortest in which all six orders of three are: half as many restarts as one after the other."""
_WELL = ("ok", "not applicable")
_ASKS = ("list", "show", "status", "whois", "explain", "history", "node list", "pool list", "pool show")


@pytest.fixture(scope="session")
def web1(machine: Machine) -> Guest:
    """The reader's VM."""
    return Guest(machine, "web1", 1)


def tutorial(steps: list[Step]) -> pytest.MarkDecorator:
    """Run a test with each of the steps."""
    return pytest.mark.parametrize("step", steps, ids=str)


@pytest.fixture(scope="session")
def before(machine: Machine) -> State:
    """The machine before anything was installed."""
    return state(machine)


def test_machine_boots(machine: Machine) -> None:
    assert machine.run("ps -o comm= -p 1") == "systemd\n"
    assert machine.run("systemctl --failed --plain --no-legend") == ""


def test_the_reader_has_what_the_tutorial_asks_for(machine: Machine, web1: Guest) -> None:
    machine.run("tar -C /root -xf /dev/vdb")
    machine.run("virsh net-start default && virsh net-autostart default")
    web1.define()


def test_the_machine_is_looked_at_before(before: State) -> None:
    assert all(before.values())


@tutorial([step for step in STEPS if step.chapter == FIRST])
def test_tutorial_begins(machine: Machine, web1: Guest, step: Step) -> None:
    follow(machine, web1, step)


def test_doctor_sees_nothing_in_the_way(machine: Machine) -> None:
    found = doctor(machine)
    assert {check for check, result in found.items() if result not in _WELL} == SMALL_MACHINE
    assert found["hook"] == "not applicable"


@tutorial([step for step in STEPS if step.chapter not in (FIRST, LAST)])
def test_tutorial(machine: Machine, web1: Guest, step: Step) -> None:
    follow(machine, web1, step)


def test_the_vm_has_its_ports_and_everything_works(machine: Machine, web1: Guest) -> None:
    assert_works(machine, web1)


def test_vm_grew_without_a_lost_connection(machine: Machine, web1: Guest) -> None:
    """The server sees all connections that the tutorial has opened, each from a port of the VM."""
    peers = machine.internet.await_peers(CONNECTIONS)
    assert len(peers) >= CONNECTIONS
    held = [(part["first_port"], part["last_port"]) for part in ask(machine, f"domains/{web1.name}")["allocations"]]
    assert not [peer for peer in peers if not any(first <= peer.port <= last for first, last in held)]


def test_hook_runs_under_the_profile_of_apparmor(machine: Machine) -> None:
    """With on-failure=refuse a VM would not start, did the hook not run or not reach natd. Its guest never executes."""
    assert machine.run("cat /sys/module/apparmor/parameters/enabled") == "Y\n"
    assert "(enforce)" in machine.run("cat /proc/$(pidof libvirtd)/attr/current")
    db1 = Guest(machine, "db1", 2)
    db1.define()
    machine.run(
        "cp /etc/virt-ports/hook.conf /root/ && printf 'on-failure=refuse\\ndeadline=60\\n' >>/etc/virt-ports/hook.conf"
    )
    machine.run("virsh start db1 --paused && cp /root/hook.conf /etc/virt-ports/")
    assert "DENIED" not in machine.run("journalctl -k -o cat -g apparmor | grep -F virt-ports || true")
    assert {vm["name"] for vm in ask(machine, "domains")} == {"web1", "db1"}
    machine.run("virsh destroy db1 && virsh undefine db1")
    await_in_order(machine)


def test_doctor_says_that_all_is_well(machine: Machine) -> None:
    found = doctor(machine)
    assert {check for check, result in found.items() if result not in _WELL} == SMALL_MACHINE
    on_the_machine = {"hook", "hook-runs", "hook-seen", "apparmor", "units", "daemons", "libvirt"}
    in_the_kernel = {"ruleset", "forward-filters", "nodes"}
    assert {found[check] for check in on_the_machine | in_the_kernel} == {"ok"}
    assert found["networkd"] == "not applicable"


def test_doctor_finds_units_and_a_hook_that_are_not_in_use(machine: Machine) -> None:
    machine.run("systemctl disable natd && touch /etc/libvirt/hooks/qemu.d/virt-ports")
    found = doctor(machine)
    assert (found["units"], found["hook-seen"]) == ("warning", "warning")
    machine.run("systemctl enable natd && systemctl try-reload-or-restart libvirtd")
    found = doctor(machine)
    assert (found["units"], found["hook-seen"]) == ("ok", "ok")


def test_report_has_what_a_bug_report_needs(machine: Machine) -> None:
    machine.run("virt-ports report --file /root/report.tar.gz")
    names = machine.run("tar -tzf /root/report.tar.gz && rm /root/report.tar.gz").splitlines()
    needed = ("doctor.json", "journal/natd.txt", "journal/libvirtd.txt", "manager/vms.json", "kernel/ours.json")
    assert {each for each in needed if any(name.endswith(each) for name in names)} == set(needed)


@pytest.fixture(scope="session")
def held(machine: Machine, web1: Guest) -> Held:
    """Connections that stay open from here until the machine reboots."""
    return Held(machine, web1)


def test_row_of_restarts_has_every_order() -> None:
    rows = {ROW_OF_RESTARTS[first : first + 3] for first in range(len(ROW_OF_RESTARTS) - 2)}
    assert rows >= set(itertools.permutations(("cpmd", "natd", "libvirtd")))


@pytest.mark.parametrize("number", range(len(ROW_OF_RESTARTS)), ids=lambda n: f"{n}-{ROW_OF_RESTARTS[n]}")
def test_restart_in_every_order(machine: Machine, web1: Guest, held: Held, number: int) -> None:
    machine.run(f"systemctl restart {ROW_OF_RESTARTS[number]}")
    if number >= 2:
        assert_works(machine, web1)


def test_reload(machine: Machine, web1: Guest, held: Held) -> None:
    """The same processes go on; cpmd follows its file, and natd says that it takes a restart."""
    pids = main_pids(machine)
    machine.run("cd /etc/virt-ports && cp -p cpmd.toml natd.toml /root/ && sed -i '1i log_level = \"debug\"' *d.toml")
    assert [each["key"] for each in ask(machine, "settings")["changes"]] == ["log_level"]
    machine.run("systemctl reload cpmd natd")
    machine.eventually("journalctl -u natd -o cat | grep -F 'restart natd to follow it'")
    machine.eventually("journalctl -u cpmd -o cat | grep -F 'log_level is '")
    assert ask(machine, "settings")["changes"] == []
    machine.run("cp -p /root/{cpmd,natd}.toml /etc/virt-ports/ && systemctl reload cpmd natd")
    assert_works(machine, web1)
    assert main_pids(machine) == pids


def test_restart_of_what_is_below(machine: Machine, web1: Guest, held: Held) -> None:
    """Not of dbus, which nothing survives, nor of libvirt-guests, which shuts VMs down."""
    machine.run("systemctl restart virtlogd systemd-journald systemd-udevd systemd-logind apparmor ssh")
    machine.run("systemctl daemon-reexec")
    assert_works(machine, web1)


def test_restart_of_the_network(machine: Machine, web1: Guest, held: Held) -> None:
    """Takes the uplink down, with its address and its routes."""
    machine.run("systemctl restart networking")
    assert_works(machine, web1)


def test_nft_flush_ruleset(machine: Machine, web1: Guest, held: Held) -> None:
    machine.run("nft flush ruleset")
    machine.eventually("nft list table ip virtports >/dev/null")
    # libvirt's rules have gone as well, and are made by it alone.
    machine.run("systemctl restart libvirtd")
    assert_works(machine, web1)


def test_firewalld_beside_it(machine: Machine, web1: Guest, held: Held) -> None:
    machine.run("systemctl start firewalld")
    # As on each machine with firewalld: libvirt tells it which zone its bridge is in when it starts.
    machine.run("systemctl restart libvirtd")
    assert_works(machine, web1)
    machine.run("systemctl stop firewalld && systemctl restart libvirtd")
    assert_works(machine, web1)


def test_ufw_beside_it(machine: Machine, web1: Guest, held: Held) -> None:
    machine.run("ufw allow ssh && ufw --force enable && systemctl restart libvirtd")
    assert_works(machine, web1)
    machine.run("ufw --force disable && systemctl restart libvirtd")
    assert_works(machine, web1)


def test_networkd_beside_it(machine: Machine, web1: Guest, held: Held) -> None:
    """It removes what it did not make of routes and rules when it starts; doctor says how to keep it from that."""
    machine.run("systemctl start systemd-networkd")
    assert_works(machine, web1)
    assert doctor(machine)["networkd"] == "warning"
    machine.run("systemctl stop systemd-networkd.socket systemd-networkd")
    assert_works(machine, web1)


def test_docker_beside_it(machine: Machine, web1: Guest, held: Held) -> None:
    machine.run("systemctl start docker")
    assert_works(machine, web1)
    machine.run("systemctl stop docker.socket docker containerd")
    assert_works(machine, web1)


def test_upgrade(machine: Machine, web1: Guest, held: Held) -> None:
    pids = main_pids(machine)
    machine.run("apt-get install -y /root/newer/virt-ports_*.deb")
    assert set(main_pids(machine)).isdisjoint({*pids, "0"})
    assert "newer" in machine.run("dpkg-query -W -f '${Version}' virt-ports")
    assert_works(machine, web1)


def test_nothing_cut_a_connection(held: Held) -> None:
    assert not held.cut()
    for tally in held.finish():
        assert (tally.ok, tally.alive, tally.dead) == (Held.COUNT, Held.COUNT, 0)


def test_reboot(machine: Machine, web1: Guest) -> None:
    """VMs that start with the machine have their ports without anybody's doing."""
    # The server would take a connection from a port for one that it still has.
    web1.log_out()
    machine.internet.await_none()
    # Nothing has booted in it that could shut down, for which libvirt-guests would wait five minutes.
    machine.run(f"virsh autostart {web1.name} && virsh destroy {web1.name}")
    web1.unplug()
    machine.reboot()
    machine.eventually(f"virsh domstate {web1.name} | grep -q running")
    assert machine.run("systemctl --failed --plain --no-legend") == ""
    web1.plug_in()
    assert_works(machine, web1)
    machine.run(f"nft list map ip virtports bindings | grep -qF {web1.name}")


@tutorial([step for step in STEPS if step.chapter == LAST])
def test_tutorial_to_its_end(machine: Machine, web1: Guest, step: Step) -> None:
    follow(machine, web1, step)


def test_nothing_is_left(machine: Machine, web1: Guest, before: State) -> None:
    machine.run(f"virsh undefine {web1.name}")
    assert state(machine) == before


def follow(machine: Machine, web1: Guest, step: Step) -> None:
    """Do one step of the tutorial, and compare what is printed."""
    if step.machine == web1.name:
        web1.type(step.command)
        return
    begin = time.monotonic()
    while True:
        command = f"cd {step.directory} && {step.command}"
        if step.answers:
            # It is asked on a terminal only.
            command = f"script --quiet --return --echo never --command {shlex.quote(command)} /dev/null"
        done = machine.attempt(command, step.answers)
        fits = step.is_printed_by(done.output)
        # A reader asks again, too, until the machine has done what it was told.
        if (done.status == 0 and fits) or not is_question(step.command) or time.monotonic() > begin + LIMIT_S:
            break
        time.sleep(2.0)
    assert done.status == 0, done
    assert fits, f"{done}\nbut {PAGE.name} shows:\n" + "\n".join(step.printed)
    print(done)
    if step.command == f"virsh start {web1.name}":
        web1.plug_in()
    if step.command == f"virsh shutdown {web1.name}":
        # Nothing has booted in it that could.
        machine.run(f"virsh destroy {web1.name}")
        web1.unplug()


def main_pids(machine: Machine) -> list[str]:
    """Return the process numbers of cpmd and natd; one that does not run has 0."""
    return machine.run("systemctl show --property MainPID --value cpmd natd").split()


def is_question(command: str) -> bool:
    """Whether a command changes nothing."""
    return any(command.startswith(f"virt-ports {verb}") for verb in _ASKS)


def doctor(machine: Machine) -> dict[str, str]:
    """Return the results of `virt-ports doctor`, by check."""
    done = machine.attempt("virt-ports doctor -o json")
    print(done)
    return {found["check"]: found["result"] for found in json.loads(done.output)["findings"]}
