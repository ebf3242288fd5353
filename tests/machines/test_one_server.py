"""
A server in its operator's hands: the tutorial word by word, then everything that happens to a server, then uninstalled.

One machine of each release, and the tests in this order: each finds the machine as the one before has left it. Nothing
here has a time limit that an emulated machine could miss.
"""

from __future__ import annotations

import itertools
import shlex
import time

import pytest

from lab.vm import RealGuest
from tests.machines.guests import guest
from tests.machines.image import REPOSITORY
from tests.machines.leftovers import State, state
from tests.machines.machine import Machine
from tests.machines.operating import Held, ask, assert_works, await_in_order
from tests.machines.transcript import Step, read

pytestmark = [pytest.mark.machines, pytest.mark.timeout(1800)]

PAGE = REPOSITORY / "docs/tutorial/one-server.md"
STEPS = read(PAGE)
LAST = "Uninstall"
CONNECTIONS = 400
"""How many the tutorial opens."""
_ASKS = ("list", "show", "status", "whois", "explain", "history", "node list", "pool list", "pool show")


@pytest.fixture(scope="session")
def web1(machine: Machine) -> RealGuest:
    """The reader's VM."""
    return guest(machine, "web1", 1)


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


def test_the_reader_has_what_the_tutorial_asks_for(machine: Machine, web1: RealGuest) -> None:
    machine.run("tar -C /root --strip-components=1 -xf /dev/vdb packages")
    machine.run("virsh net-start default && virsh net-autostart default")
    web1.define()


def test_the_machine_is_looked_at_before(before: State) -> None:
    assert all(before.values())


@tutorial([step for step in STEPS if step.chapter != LAST])
def test_tutorial(machine: Machine, web1: RealGuest, step: Step) -> None:
    follow(machine, web1, step)


def test_the_vm_has_its_ports_and_everything_works(machine: Machine, web1: RealGuest) -> None:
    web1.wait_ready(timeout_s=900.0)
    assert_works(machine, web1)


def test_vm_grew_without_a_lost_connection(machine: Machine, web1: RealGuest) -> None:
    """The server sees all connections that the tutorial has opened, each from a port of the VM."""
    peers = machine.internet.await_peers(CONNECTIONS)
    assert len(peers) >= CONNECTIONS
    held = [(part["first_port"], part["last_port"]) for part in ask(machine, f"domains/{web1.name}")["ranges"]]
    assert not [peer for peer in peers if not any(first <= peer.port <= last for first, last in held)]


def test_hook_runs_under_the_profile_of_apparmor(machine: Machine) -> None:
    """With on-failure=refuse a VM would not start, did the hook not run or not reach natd. Its guest never executes."""
    assert machine.run("cat /sys/module/apparmor/parameters/enabled") == "Y\n"
    assert "(enforce)" in machine.run("cat /proc/$(pidof libvirtd)/attr/current")
    db1 = guest(machine, "db1", 2)
    db1.define()
    machine.run(
        "cp /etc/virt-ports/hook.conf /root/ && printf 'on-failure=refuse\\ndeadline=60\\n' >>/etc/virt-ports/hook.conf"
    )
    machine.run("virsh start db1 --paused && cp /root/hook.conf /etc/virt-ports/")
    assert "DENIED" not in machine.run("journalctl -k -o cat -g apparmor | grep -F virt-ports || true")
    assert {vm["name"] for vm in ask(machine, "domains")} == {"web1", "db1"}
    machine.run("virsh destroy db1 && virsh undefine db1")
    await_in_order(machine)


@pytest.fixture(scope="session")
def held(machine: Machine, web1: RealGuest) -> Held:
    """Connections that stay open from here until the machine reboots."""
    return Held(machine, web1)


@pytest.mark.parametrize("order", list(itertools.permutations(("cpmd", "natd", "libvirtd"))), ids="-".join)
def test_restart_in_every_order(machine: Machine, web1: RealGuest, held: Held, order: tuple[str, ...]) -> None:
    for service in order:
        machine.run(f"systemctl restart {service}")
    assert_works(machine, web1)


def test_restart_of_the_network_of_the_guests_log_and_locks(machine: Machine, web1: RealGuest, held: Held) -> None:
    machine.run("systemctl restart virtlogd systemd-journald systemd-udevd")
    assert_works(machine, web1)


def test_nft_flush_ruleset(machine: Machine, web1: RealGuest, held: Held) -> None:
    machine.run("nft flush ruleset")
    machine.eventually("nft list table ip virtports >/dev/null")
    # libvirt's rules have gone as well, and are made by it alone.
    machine.run("systemctl restart libvirtd")
    assert_works(machine, web1)


def test_firewalld_beside_it(machine: Machine, web1: RealGuest, held: Held) -> None:
    machine.run("systemctl start firewalld")
    # As on each machine with firewalld: libvirt tells it which zone its bridge is in when it starts.
    machine.run("systemctl restart libvirtd")
    assert_works(machine, web1)
    machine.run("systemctl stop firewalld && systemctl restart libvirtd")
    assert_works(machine, web1)


def test_ufw_beside_it(machine: Machine, web1: RealGuest, held: Held) -> None:
    machine.run("ufw allow ssh && ufw --force enable && systemctl restart libvirtd")
    assert_works(machine, web1)
    machine.run("ufw --force disable && systemctl restart libvirtd")
    assert_works(machine, web1)


def test_docker_beside_it(machine: Machine, web1: RealGuest, held: Held) -> None:
    machine.run("systemctl start docker")
    assert_works(machine, web1)
    machine.run("systemctl stop docker.socket docker containerd")
    assert_works(machine, web1)


def test_upgrade(machine: Machine, web1: RealGuest, held: Held) -> None:
    machine.run("apt-get install -y /root/newer/virt-ports_*.deb")
    assert "newer" in machine.run("dpkg-query -W -f '${Version}' virt-ports")
    assert_works(machine, web1)


def test_nothing_cut_a_connection(held: Held) -> None:
    for tally in held.finish():
        assert (tally.ok, tally.alive, tally.dead) == (Held.COUNT, Held.COUNT, 0)


def test_reboot(machine: Machine, web1: RealGuest) -> None:
    """VMs that start with the machine have their ports without anybody's doing."""
    machine.run(f"virsh autostart {web1.name}")
    machine.reboot()
    machine.eventually(f"virsh domstate {web1.name} | grep -q running")
    assert machine.run("systemctl --failed --plain --no-legend") == ""
    assert_works(machine, None)
    machine.run(f"nft list map ip virtports bindings | grep -qF {web1.name}")


@tutorial([step for step in STEPS if step.chapter == LAST])
def test_tutorial_to_its_end(machine: Machine, web1: RealGuest, step: Step) -> None:
    follow(machine, web1, step)


def test_nothing_is_left(machine: Machine, web1: RealGuest, before: State) -> None:
    machine.run(f"virsh undefine {web1.name}")
    assert state(machine) == before


def follow(machine: Machine, web1: RealGuest, step: Step) -> None:
    """Do one step of the tutorial, and compare what is printed."""
    if step.machine == web1.name:
        web1.wait_ready(timeout_s=900.0)
        # The agent waits until nobody has its pipes open any more.
        web1.shell(f"( {step.command} ) >/tmp/printed 2>&1 </dev/null", timeout_s=900.0)
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
        if (done.status == 0 and fits) or not is_question(step.command) or time.monotonic() > begin + 300:
            break
        time.sleep(2.0)
    assert done.status == 0, done
    assert fits, f"{done}\nbut {PAGE.name} shows:\n" + "\n".join(step.printed)
    print(done)


def is_question(command: str) -> bool:
    """Whether a command changes nothing."""
    return any(command.startswith(f"virt-ports {verb}") for verb in _ASKS)
