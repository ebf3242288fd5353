"""
Guests of a machine: VMs of its libvirt, with hooks, tap and QEMU, whose processor halts at once.

A guest that QEMU emulates in an emulated machine needs many minutes for what a test asks of it, and even a firmware
that finds nothing to boot takes a fifth of the machine's time. So the VM's firmware is a halt, and a network namespace
of the machine speaks in its place: with the VM's hardware address, through the VM's tap. The namespace's packets are
received from the tap as if QEMU had sent them, and what the bridge sends to the tap goes to the namespace. virt-ports
and libvirt see a VM and its tap; only the tap's counters differ, which stay at zero.
"""

from __future__ import annotations

import shlex

from tests.machines.machine import Machine

_MEMORY_MIB = 64
_NETWORK = "default"
_GATEWAY = "192.168.122.1"
_FIRMWARE = "/var/lib/libvirt/images/halt.rom"
"""64 KiB, of which the processor executes, after its reset: cli; hlt; and again."""
_WRITE_FIRMWARE = f"{{ head -c 65520 /dev/zero; printf '\\xfa\\xf4\\xeb\\xfc'; head -c 12 /dev/zero; }} >{_FIRMWARE}"


class Guest:
    """
    One VM in libvirt's default network.

    :param number: Makes it unique, in 1..99.
    """

    def __init__(self, machine: Machine, name: str, number: int) -> None:
        self.name = name
        self._machine = machine
        self._uuid = f"00000000-0000-4000-8000-{number:012x}"
        self._mac = f"52:54:00:00:01:{number:02x}"
        # libvirt's DHCP deals out from 2 on, and asks before.
        self._address = f"192.168.122.{100 + number}"

    def define(self) -> None:
        """Define the VM, shut off. :raise Failed: When libvirt refuses it."""
        self._machine.run(_WRITE_FIRMWARE)
        self._machine.run("virsh -q define /dev/stdin", self._xml())

    def plug_in(self) -> None:
        """Connect the namespace to the tap of the running VM. :raise Failed: When the VM does not run."""
        self._machine.run(_PLUG_IN.format(name=self.name, mac=self._mac, address=self._address, gateway=_GATEWAY))

    def log_out(self) -> None:
        """End what runs in the namespace, so that its connections end as those of a guest that shuts down."""
        self._machine.run(f"ip netns pids {self.name} | xargs -r kill -9")

    def unplug(self) -> None:
        """Remove the namespace and end what runs in it; the VM has ended."""
        self._machine.run(_UNPLUG.format(name=self.name))

    def shell(self, command: str) -> str:
        """Run a shell command as if in the guest. :return: What it printed. :raise Failed: When it fails."""
        return self._machine.run(f"nsenter --net=/run/netns/{self.name} bash -c {shlex.quote(command)}")

    def type(self, command: str) -> None:
        """Type a command into a shell of the guest that stays open. It is not waited for."""
        # The agent waits until nobody has its pipes open any more.
        self.shell(f"( {command}; sleep infinity ) >/dev/null 2>&1 </dev/null &")

    def _xml(self) -> str:
        return f"""\
<domain type='qemu'>
  <name>{self.name}</name>
  <uuid>{self._uuid}</uuid>
  <memory unit='MiB'>{_MEMORY_MIB}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><loader type='rom'>{_FIRMWARE}</loader></os>
  <features><acpi/><tcg><tb-cache unit='MiB'>32</tb-cache></tcg></features>
  <cpu mode='custom' match='exact'><model fallback='allow'>qemu64</model></cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <interface type='network'>
      <source network='{_NETWORK}'/>
      <mac address='{self._mac}'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>
    <memballoon model='none'/>
    <audio id='1' type='none'/>
  </devices>
</domain>
"""


_PLUG_IN = """\
set -e
tap=$(virsh -q domiflist {name} | awk '{{ print $1 }}')
ip netns add {name}
ip link add lg-{name} type veth peer name eth0 address {mac} netns {name}
nsenter --net=/run/netns/{name} sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
sysctl -qw net.ipv6.conf.lg-{name}.disable_ipv6=1
ip -n {name} link set lo up
ip -n {name} addr add {address}/24 dev eth0
ip -n {name} link set eth0 up
ip link set lg-{name} up
ip -n {name} route add default via {gateway}
tc qdisc add dev lg-{name} clsact
tc qdisc replace dev "$tap" root handle 1: prio
tc filter add dev lg-{name} ingress matchall action mirred ingress redirect dev "$tap"
tc filter add dev "$tap" parent 1: matchall action mirred egress redirect dev lg-{name}
"""

_UNPLUG = """\
ip netns pids {name} | xargs -r kill -9
ip link del lg-{name}
ip netns del {name}
"""
