"""
The time that our hook adds to a VM's start: the whole process, compared with a Python that does nothing.

The operation is ``start`` of an unknown VM, with the XML of libvirt 9.0, whose interface exists already. It includes
the shell and Python of the hook, natd on the host, cpmd's decision and its durable commit, one edge's kernel, the
host's kernel, a second commit, and the answer back to the hook. The two processes are started alternately, in the same
way, inside the host, so that the figures include neither entering it nor the start of the bench.

libvirt itself calls ``prepare`` first, which waits for nothing, then makes the taps, and calls ``start`` and
``started``. The three calls of another VM are measured together, in libvirt's order and with its pause: what a start
really waits.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable

from bench.figures import Measured, median, ratio
from bench.site import HOST, site, start_all
from bench.worker import Worker
from lab.daemons import DaemonSettings
from lab.errors import LabError
from lab.lab import Lab
from lab.node import BRIDGE, HOOK, NETWORK
from lab.shell import ip_batch

RUNS = 50
WARM_UP = 5
VMS = 2 * (WARM_UP + RUNS)
OPERATIONS = ("prepare", "start", "started")
PAUSES_S = {"prepare": 0.01, "start": 0.05}
"""
From the end of a call until libvirt makes the next one. Its requests came 18 to 28 ms after the answer to ``prepare``,
of which some 8 are an ended Python and a new one, and 361 to 443 ms after that to ``start``, in which it starts QEMU
(libvirt 9.0, 12 starts, real-time priority). It is less here, so that the bench does not take longer than it has to.
"""
REST_S = 0.05
SETTINGS = DaemonSettings(cpmd={"pool": {"initial": 256}}, natd={})
BARE_PYTHON = ["/usr/bin/python3", "-I", "-S", "-c", "pass"]


def measure(say: Callable[[str], None]) -> Measured:
    """Measure in a lab of its own."""
    with site(SETTINGS) as lab:
        start_all(lab)
        _make_taps(lab)
        with Worker(lab.hosts[HOST].enter()) as worker:
            runs = _runs(worker)
        _check(lab)
    say(f"hook {median(runs['hook_start_ms']):.1f} ms, bare python {median(runs['python_ms']):.1f} ms")
    calls, pythons = median(runs["hook_calls_ms"]), median(runs["pythons_ms"])
    say(f"prepare, start and started {calls:.1f} ms, three bare pythons {pythons:.1f} ms")
    return Measured(
        {
            "hook_start_ms_p50": median(runs["hook_start_ms"]),
            "python_ms_p50": median(runs["python_ms"]),
            "hook_ratio": ratio(runs["hook_start_ms"], runs["python_ms"]),
            "hook_calls_ratio": ratio(runs["hook_calls_ms"], runs["pythons_ms"]),
        },
        runs,
    )


def _runs(worker: Worker) -> dict[str, list[float]]:
    runs: dict[str, list[float]] = {"hook_start_ms": [], "python_ms": [], "hook_calls_ms": [], "pythons_ms": []}
    for number in range(0, VMS, 2):
        argv, xml = call(number)
        runs["hook_start_ms"].append(worker.call("spawn", argv, xml))
        runs["python_ms"].append(worker.call("spawn", BARE_PYTHON, xml))
        # The kernel attaches programs to the former VM's tap meanwhile, and answers nothing about interfaces for 14 ms.
        time.sleep(REST_S)
        calls, pythons = 0.0, 0.0
        for operation in OPERATIONS:
            argv, xml = call(number + 1, operation)
            calls += worker.call("spawn", argv, xml)
            pythons += worker.call("spawn", BARE_PYTHON, xml)
            time.sleep(PAUSES_S.get(operation, 0.0))
        runs["hook_calls_ms"].append(calls)
        runs["pythons_ms"].append(pythons)
    return {name: values[WARM_UP:] for name, values in runs.items()}


def _make_taps(lab: Lab) -> None:
    taps = [tap(number) for number in range(VMS)]
    namespace = lab.hosts[HOST].namespace
    ip_batch((f"tuntap add dev {name} mode tap" for name in taps), namespace)
    ip_batch((f"link set {name} master {BRIDGE} up" for name in taps), namespace)


def _check(lab: Lab) -> None:
    """:raise LabError: When not every VM got its ports."""
    active = [vm for vm in json.loads(lab.operate("list", "-o", "json")) if vm["first_port"]]
    if len(active) != VMS:
        raise LabError(f"{len(active)} of {VMS} VMs have ports; see the logs in {lab.state}")


def tap(number: int) -> str:
    """Return the name of a VM's interface."""
    return f"vnet{number}"


def call(number: int, operation: str = "start") -> tuple[list[str], str]:
    """Return command line and XML of one call, as libvirt 9.0 gives them for a small guest that starts."""
    name = f"bench{number}"
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, name)
    mac = f"52:54:00:be:{number // 256:02x}:{number % 256:02x}"
    port = uuid.uuid5(identity, "port")
    target = f"<target dev='{tap(number)}'/>" if operation != "prepare" else ""
    xml = f"""<domain type='qemu' id='{number + 1}'>
  <name>{name}</name>
  <uuid>{identity}</uuid>
  <memory unit='KiB'>98304</memory>
  <currentMemory unit='KiB'>98304</currentMemory>
  <vcpu placement='static'>1</vcpu>
  <resource><partition>/machine</partition></resource>
  <os>
    <type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>
    <kernel>/var/lib/libvirt/images/vmlinuz</kernel>
    <initrd>/var/lib/libvirt/images/initrd</initrd>
    <cmdline>console=ttyS0 quiet</cmdline>
    <boot dev='hd'/>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' index='0' model='none'><alias name='usb'/></controller>
    <controller type='pci' index='0' model='pci-root'><alias name='pci.0'/></controller>
    <controller type='virtio-serial' index='0'>
      <alias name='virtio-serial0'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x03' function='0x0'/>
    </controller>
    <interface type='network'>
      <mac address='{mac}'/>
      <source network='{NETWORK}' portid='{port}' bridge='{BRIDGE}'/>
      {target}
      <model type='virtio'/>
      <alias name='net0'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x0'/>
    </interface>
    <serial type='file'>
      <source path='/var/log/libvirt/qemu/{name}-console.log'/>
      <target type='isa-serial' port='0'><model name='isa-serial'/></target>
      <alias name='serial0'/>
    </serial>
    <channel type='unix'>
      <source mode='bind' path='/run/libvirt/qemu/channel/{number + 1}-{name}/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='disconnected'/>
      <alias name='channel0'/>
      <address type='virtio-serial' controller='0' bus='0' port='1'/>
    </channel>
    <memballoon model='none'/>
  </devices>
</domain>
"""
    return [str(HOOK), name, operation, "begin", "-"], xml
