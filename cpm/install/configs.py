"""
The first configuration files, as text. Pure.

A setting that stands at its default is written as a comment: the file shows what can be set, and a better default of a
later version still comes into force.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from cpm.install.choices import EDGE, HOST, Choices

CPMD = """\
# cpmd, the manager of virt-ports. Commented settings show their defaults. After a change: systemctl restart cpmd
# External addresses are not set here but with `virt-ports pool add ADDRESS`.

# log_level = "info"

[listen]
# For virt-ports, and for natd on this machine. Whoever may open it (group virt-ports) may do everything.
# socket = "/run/virt-ports/cpmd.sock"

# For nodes on other machines: TLS with client certificates. Set all four. The key must be readable for the group
# virt-ports (chgrp virt-ports, chmod 0640). Use a CA of its own: whoever it signs may join.
# address = "172.30.0.2:7414"
# certificate = "/etc/virt-ports/tls/manager.pem"
# key = "/etc/virt-ports/tls/manager.key"
# ca = "/etc/virt-ports/tls/ca.pem"

[ledger]
# path = "/var/lib/virt-ports/ledger.db"

[pool]
# Ports: ranges are whole blocks; a VM starts with `initial`, never goes below `floor` nor above `cap`.
# block = 64
# initial = 256
# floor = 64
# cap = 32768
# Seconds a range rests between two owners (RFC 6888 REQ-8).
# hold_down_s = 120.0
# Addresses between hosts and edges, one a VM (RFC 6598). They must not be in use elsewhere in your network.
# internal = "100.64.0.0/10"

[pool.timeouts]
# Seconds for which hosts remember a VM's connection that says nothing more. Except for tcp_time_wait_s and tcp_reset_s
# these are the shortest that RFC 5382, 4787 and 5508 allow. [host.timeouts] in a host's natd.toml is nearer.
# tcp_established_s = 7440
# tcp_transitory_s = 240
# tcp_time_wait_s = 120
# tcp_reset_s = 10
# udp_s = 120
# icmp_s = 60

[scaling]
# True: the specification's rule to the letter, without the guards around it.
# literal = false

[scaling.guards]
# Seconds between two steps of growth of one VM, and between its last resize and its next step down.
# grow_cool_down_s = 5.0
# shrink_cool_down_s = 30.0
"""

HOOK = """\
# The libvirt hook of virt-ports; read at every call. Commented settings show their defaults.

# Where natd listens for it.
# socket=/run/virt-ports/natd.sock

# Seconds for the whole hook; libvirt waits for it.
# deadline=2

# What happens to a VM when natd cannot answer in time: `start` (logged, natd mends it later) or `refuse`.
# on-failure=start
"""

_NATD = """\
# natd, the NAT component of virt-ports on this machine. Commented settings show their defaults.
# After a change: systemctl restart natd (connections of VMs go on meanwhile).

# How the manager knows this machine; with https it must be in the certificate.
name = {name}
roles = {roles}
# This machine's address between hosts and edges.
{underlay_address}
# log_level = "info"

[manager]
url = {url}
{tls}
[listen]
# For the libvirt hook; the same path is in hook.conf.
# socket = "/run/virt-ports/natd.sock"
"""

_HOST = """
[host]
# Interfaces through which VMs' packets leave: towards the edges, or to the internet where this machine is its own edge.
uplinks = {uplinks}
# Only VMs with an interface on one of these bridges are managed; empty: on any bridge.
# bridges = []
# Bits of the packet mark that are ours; change them if other software uses the same ones.
# mark_mask = 0x7fff0000
# Destinations that are neither translated nor sent to the edges: your own networks.
# exempt = ["10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/4", \
"255.255.255.255/32"]
# libvirt = "qemu:///system"
"""

_EDGE = """
[edge]
# Interfaces to the internet.
uplinks = {uplinks}
# Interfaces to the hosts; empty where the only host is this machine.
underlay = {underlay}
"""

_MONITOR = """
[monitor]
# Seconds between two readings of all VMs.
# period_s = 1.0
"""

_GUESTS = """\
# Seconds between two visits to a VM's guest agent; 0: no visits, and guests are told nothing.
# guest_period_s = 10.0

[guests]
# Where a guest finds its external address and ports; "": nowhere.
# announce_file = "/run/virt-ports.json"
# Whether guests shall take their source ports from their range (net.ipv4.ip_local_port_range).
# announce_local_port_range = false
# Agents of VMs that libvirt does not run, for example "/run/virt-ports/agents/{uuid}.sock".
# agent_sockets = ""
"""

_TLS = """\
certificate = "/etc/virt-ports/tls/node.pem"
key = "/etc/virt-ports/tls/node.key"
ca = "/etc/virt-ports/tls/ca.pem"
"""


def cpmd_toml() -> str:
    """Return a first cpmd.toml."""
    return CPMD


def hook_conf() -> str:
    """Return a first hook.conf."""
    return HOOK


def natd_toml(choices: Choices) -> str:
    """Return a first natd.toml; what is not known is left empty, and natd then says what to write."""
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
        text += _EDGE.format(uplinks=_list(uplinks), underlay=_list(choices.edge_underlay))
    text += _MONITOR
    return text + _GUESTS if HOST in choices.roles else text


def open_questions(choices: Choices) -> list[str]:
    """Say which settings of natd.toml only the operator knows."""
    questions = []
    if choices.underlay_address is None:
        questions.append("underlay_address: this machine's address between hosts and edges")
    if HOST in choices.roles and not choices.host_uplinks:
        questions.append("host.uplinks: interfaces through which VMs' packets leave")
    if EDGE in choices.roles and not choices.uplink:
        questions.append("edge.uplinks: interfaces to the internet")
    if choices.roles & {HOST, EDGE} == {EDGE} and not choices.edge_underlay:
        questions.append("edge.underlay: interfaces to the hosts")
    return questions


def _quote(text: str) -> str:
    return json.dumps(text)  # a JSON string is a TOML string


def _list(words: Iterable[str]) -> str:
    return json.dumps(list(words))
