"""The hook as a real libvirtd starts it, with a socket that answers as the test wants in natd's place."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from cpm.install import apply, choices, machine, plan
from lab.errors import LabError
from lab.lab import Lab
from lab.node import HOOK, LibvirtHost
from libvirt_hooks import domain_xml
from libvirt_hooks.protocol import HookOperation, HookRequest
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import eventually
from tests.fakes.hook_natd import Answer, FakeNatd

pytestmark = pytest.mark.e2e

STARTING = [HookOperation.PREPARE, HookOperation.START, HookOperation.STARTED]
ENDING = [HookOperation.STOPPED, HookOperation.RELEASE]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("h"), with_daemons=False) as site:
        yield site


@pytest.fixture
def host(lab: Lab) -> LibvirtHost:
    return lab.hosts["host1"]


@pytest.fixture
def natd(host: LibvirtHost) -> Iterator[FakeNatd]:
    with FakeNatd(host.agent_socket) as fake:
        yield fake
    host.agent_socket.unlink()


def operations(requests: list[HookRequest]) -> list[HookOperation]:
    return [request.operation for request in requests]


def test_the_operations_of_a_vms_life(lab: Lab, natd: FakeNatd) -> None:
    vm = lab.add_vm("life", "host1")
    try:
        assert operations(natd.requests) == STARTING
        facts = [domain_xml.parse(request.xml) for request in natd.requests]
        assert {(fact.uuid, fact.name, fact.type) for fact in facts} == {(vm.uuid, "life", "qemu")}
        assert [fact.interfaces[0].target is None for fact in facts] == [True, False, False]
    finally:
        lab.remove_vm("life")
    assert operations(natd.requests) == STARTING + ENDING
    assert natd.errors == []


def test_a_refusal_is_what_virsh_shows(lab: Lab, natd: FakeNatd) -> None:
    natd.answer = Answer.REFUSE
    with pytest.raises(LabError, match="virt-ports: VM refused, prepare: no free ports"):
        lab.add_vm("refused", "host1")
    # libvirt calls these after a failed start as well; a refusal there has no effect.
    assert operations(natd.requests) == [HookOperation.PREPARE, *ENDING]


def test_reconnect_never_kills_a_vm(lab: Lab, host: LibvirtHost, natd: FakeNatd) -> None:
    vm = lab.add_vm("survivor", "host1")
    try:
        natd.answer = Answer.REFUSE
        natd.requests.clear()
        host.end_libvirtd(signal.SIGKILL)
        host.start_libvirtd()
        assert vm.state == "running"
        # libvirtd answers before it has found all its domains again.
        assert eventually(lambda: natd.requests)
        assert operations(natd.requests) == [HookOperation.RECONNECT]
        assert vm.state == "running"
    finally:
        lab.remove_vm("survivor")


@pytest.mark.parametrize("answer", [None, Answer.HANG])
def test_a_vm_starts_without_natd(lab: Lab, host: LibvirtHost, answer: Answer | None) -> None:
    if answer is None:
        assert lab.add_vm("alone", "host1").state == "running"
    else:
        with FakeNatd(host.agent_socket, answer) as hanging:
            assert lab.add_vm("alone", "host1").state == "running"
            assert hanging.hung == 3, "natd is told by each of the three calls, of which only the first waits"
        host.agent_socket.unlink()
    lab.remove_vm("alone")


def test_installs_disturb_no_vm(lab: Lab, host: LibvirtHost, natd: FakeNatd) -> None:
    """libvirt executes whatever lies in its hook folder at the moment of a start or of its own start."""
    facts = machine.MachineFacts("host1", "eth0", {})
    hook = plan.targets(choices.complete(facts, frozenset(choices.ROLES)), PurePosixPath("/usr/bin"))[-1]
    assert hook.path == plan.HOOK
    (host.directory / HOOK.relative_to("/")).unlink()
    installed = 0
    is_over = threading.Event()

    def install() -> None:
        nonlocal installed
        while not is_over.is_set():
            installed += 1
            new = dataclasses.replace(hook, text=f"{hook.text}# {installed}\n")
            apply.Installer(host.directory).install([new], ["host"])

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        running_installs = executor.submit(install)
        try:
            vm = lab.add_vm("running", "host1", paused=True)
            for _ in range(12):
                lab.add_vm("starting", "host1", paused=True)
                lab.remove_vm("starting")
            for _ in range(4):
                host.end_libvirtd(signal.SIGKILL)
                host.start_libvirtd()
                assert vm.state == "paused"
        finally:
            is_over.set()
            running_installs.result()
        lab.remove_vm("running")
    assert installed > 100
    assert natd.errors == []
