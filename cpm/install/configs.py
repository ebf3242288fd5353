"""
The texts of the initial configuration files. Pure.

A setting with its default value is written as a comment: the file shows what can be set, and a later version may still
change the default.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import IPv4Network

from cpm.install.choices import DEFAULT_POOL, EDGE, HOST, Choices

CPMD = """\
# cpmd, the manager of virt-ports. Commented settings show their defaults. After a change: systemctl restart cpmd
# External addresses are not set here; add them with `virt-ports pool add ADDRESS`.

# log_level = "info"

[listen]
# For virt-ports, and for natd on this machine. Users who can open it (group virt-ports) may ask.
# socket = "/run/virt-ports/cpmd.sock"
# Only root may change anything, and members of this group.
# admin_group = ""
# Another socket on which nobody may change anything, for programs that only ask.
# read_socket = ""

# For nodes on other machines: TLS with client certificates. Set all four. The key must be readable for the group
# virt-ports (chgrp virt-ports, chmod 0640). Use a CA for this purpose only: every certificate it signs may connect
# under its name, and then gets what `virt-ports node approve` allows that name.
# address = "172.30.0.2:7414"
# certificate = "/etc/virt-ports/tls/manager.pem"
# key = "/etc/virt-ports/tls/manager.key"
# ca = "/etc/virt-ports/tls/ca.pem"

[ledger]
# path = "/var/lib/virt-ports/ledger.db"

[pool]
# Ports: ranges are whole blocks; a VM starts with `initial`, and never has fewer than `floor` nor more than `cap`.
# block = 64
# initial = 256
# floor = 64
# cap = 32768
# Seconds between the end of a range and its next owner (RFC 6888 REQ-8).
# hold_down_s = 120.0
# Internal addresses, one per VM, used between hosts and edges (RFC 6598). They must not be used in your network.
{internal}

[pool.timeouts]
# Idle seconds after which hosts forget a connection of a VM. Except for tcp_time_wait_s and tcp_reset_s these are the
# minimum: of RFC 5382, 4787 and 5508, and for dns_s (UDP to port 53) the longest time that a resolver waits.
# [host.timeouts] in a host's natd.toml takes precedence.
# tcp_established_s = 7440
# tcp_transitory_s = 240
# tcp_time_wait_s = 120
# tcp_reset_s = 10
# udp_s = 120
# icmp_s = 60
# dns_s = 30

[nodes]
# What a host may have unless `virt-ports node approve` says another number: VMs, and ports of its VMs in all.
# max_vms = 1000
# max_ports = 1000000

[scaling]
# true: the specification's rule to the letter, without guards.
# literal = false

[scaling.guards]
# Seconds between two growth steps of a VM, and between its last resize and its next reduction.
# grow_cool_down_s = 5.0
# shrink_cool_down_s = 30.0
"""

HOOK = """\
# The libvirt hook of virt-ports. Read at every call. Commented settings show their defaults.

# Socket of natd.
# socket=/run/virt-ports-natd/natd.sock

# Seconds for one call of the hook; libvirt waits that long.
# deadline=2

# When natd does not answer in time: `start` the VM (logged; natd gives it its ports later) or `refuse` to start it.
# on-failure=start
"""

_NATD = """\
# natd, the NAT component of virt-ports on this machine. Commented settings show their defaults.
# After a change: systemctl restart natd (connections of VMs are not affected).

# Name of this machine for the manager; with https it must be in the certificate.
name = {name}
roles = {roles}
# This machine's address in the network between hosts and edges.
{underlay_address}
# log_level = "info"

[manager]
url = {url}
{tls}
[listen]
# For the libvirt hook; the same path is in hook.conf.
# socket = "/run/virt-ports-natd/natd.sock"
"""

_HOST = """
[host]
# Interfaces through which packets of VMs leave: to the edges, or to the internet if this machine is its own edge.
uplinks = {uplinks}
# Only VMs with an interface on one of these bridges are managed; empty: any bridge.
# bridges = []
# Bits of the packet mark that virt-ports uses; change them if other software uses the same.
# mark_mask = 0x7fff0000
# Destinations that are neither translated nor routed to the edges: your own networks.
# exempt = ["10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/4", \
"255.255.255.255/32"]
# libvirt = "qemu:///system"
"""

_EDGE = """
[edge]
# Interfaces to the internet.
uplinks = {uplinks}
# Interfaces to the hosts; empty if this machine is the only host.
underlay = {underlay}
# What is forwarded between the two: "all", or "vms": only what VMs send and get.
{forward}
"""

_MONITOR = """
[monitor]
# Seconds between two measurements of all VMs.
# period_s = 1.0
"""

_GUESTS = """\
# Seconds between two visits to the guest agent of a VM; 0: guest agents are not used.
# guest_period_s = 10.0

[guests]
# File in the guest with its external address and ports; "": none.
# announce_file = "/run/virt-ports.json"
# true: set net.ipv4.ip_local_port_range in guests, so that they use source ports of their range.
# announce_local_port_range = false
# Agents of VMs that libvirt does not run, for example "/run/virt-ports/agents/{uuid}.sock".
# agent_sockets = ""
"""

_TLS = """\
certificate = "/etc/virt-ports/tls/node.pem"
key = "/etc/virt-ports/tls/node.key"
ca = "/etc/virt-ports/tls/ca.pem"
"""


def cpmd_toml(internal: IPv4Network | None = DEFAULT_POOL) -> str:
    """Return an initial cpmd.toml. :param internal: The internal pool; None: the operator has to choose."""
    line = f'internal = "{internal or DEFAULT_POOL}"'
    return CPMD.replace("{internal}", f"# {line}" if internal in (None, DEFAULT_POOL) else line)


def hook_conf() -> str:
    """Return an initial hook.conf."""
    return HOOK


def natd_toml(choices: Choices) -> str:
    """Return an initial natd.toml; unknown settings are left empty, and natd refuses to start without them."""
    address = choices.underlay_address
    text = _NATD.format(
        name=_quote(choices.name),
        roles=_list(sorted(choices.roles & {HOST, EDGE})),
        underlay_address=f'underlay_address = "{address}"' if address else '# underlay_address = "ADDRESS"',
        url=_quote(choices.manager_url),
        tls=_TLS if choices.manager_url.startswith("https://") else "",
    )
    if HOST in choices.roles:
        text += _HOST.format(uplinks=_list(choices.host_uplinks))
    if EDGE in choices.roles:
        uplinks = filter(None, [choices.uplink])
        forward = '# forward = "all"' if choices.forward == "all" else f"forward = {_quote(choices.forward)}"
        text += _EDGE.format(uplinks=_list(uplinks), underlay=_list(choices.edge_underlay), forward=forward)
    text += _MONITOR
    return text + _GUESTS if HOST in choices.roles else text


def open_questions(choices: Choices) -> list[str]:
    """Return the settings of natd.toml that the operator has to fill in, with their meaning."""
    questions = []
    if choices.underlay_address is None:
        questions.append("underlay_address: this machine's address in the network between hosts and edges")
    if HOST in choices.roles and not choices.host_uplinks:
        questions.append("host.uplinks: interfaces through which packets of VMs leave")
    if EDGE in choices.roles and not choices.uplink:
        questions.append("edge.uplinks: interfaces to the internet")
    if choices.roles & {HOST, EDGE} == {EDGE} and not choices.edge_underlay:
        questions.append("edge.underlay: interfaces to the hosts")
    return questions


def _quote(text: str) -> str:
    return json.dumps(text)  # a JSON string is a TOML string


def _list(words: Iterable[str]) -> str:
    return json.dumps(list(words))
