"""
What is fuzzed: each target has real input, and a reader that understands an input or refuses it.

A reader returns whether it understood; it may raise nothing. What it understood is checked: that it is of the promised
types and sizes, so that what makes no sense becomes no fact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from tests.fuzz import believed, files, guests, hooks, kernel, messages, port_control, settings
from tests.fuzz.mutation import Material


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of input."""

    name: str
    material: Material
    understands: Callable[[bytes], bool]
    begin: Callable[[], None] = lambda: None
    """Forgets what was read before, if that matters."""


_ALL: Final = (
    Target("domain-xml", hooks.DOMAINS, hooks.understands_domain),
    Target("hook-request", hooks.REQUESTS, hooks.understands_request),
    Target("hook-answer", hooks.ANSWERS, hooks.understands_answer),
    Target("agent-reply", guests.REPLIES, guests.understands_reply),
    Target("agent-figures", guests.FIGURES, guests.understands_figures),
    Target("agent-socket", guests.LINES, guests.understands_lines),
    Target("guest-packet", kernel.PACKETS, kernel.understands_packet),
    Target("port-control-packet", port_control.PACKETS, port_control.understands_packet),
    Target("port-control", port_control.DATAGRAMS, port_control.understands_datagram, port_control.begin),
    Target("netlink-frames", kernel.FRAMES, kernel.understands_frames),
    Target("conntrack", kernel.CONNECTIONS, kernel.understands_connections),
    Target("links", kernel.LINKS, kernel.understands_links),
    Target("routes", kernel.ROUTES, kernel.understands_routes),
    Target("networks", kernel.NETWORKS, kernel.understands_networks),
    Target("nftables", kernel.TABLES, kernel.understands_tables),
    Target("reports", kernel.REPORTS, kernel.understands_reports),
    Target("news", kernel.NEWS, kernel.understands_news),
    Target("others-chains", kernel.TABLES, kernel.understands_chains_of_others),
    Target("rules", kernel.RULES, kernel.understands_rules),
    Target("sockets", kernel.SOCKETS, kernel.understands_sockets),
    Target("natd-follows", files.FOLLOWS, files.understands_follows),
    Target("settings-before", files.SETTINGS, files.understands_settings),
    Target("event-position", files.POSITIONS, files.understands_position),
    Target("journal-chunk", files.CHUNKS, files.understands_chunk),
    Target("cpmd-toml", settings.CPMD, settings.understands_cpmd),
    Target("natd-toml", settings.NATD, settings.understands_natd),
    Target("node-message", messages.FROM_NODES, messages.understands_node_message),
    Target("manager-message", messages.FROM_MANAGERS, messages.understands_manager_message),
    Target("request-body", messages.BODIES, messages.understands_body),
    Target("parameter", messages.PARAMETERS, messages.understands_parameter),
    Target("operator-answer", messages.ANSWERS, messages.understands_answer),
    Target("session-frames", messages.FRAMES, messages.understands_frames),
    Target("node-believed", believed.FROM_NODES, believed.believes_node_message, believed.begin),
    Target("manager-believed", believed.FROM_MANAGERS, believed.believes_manager_message, believed.begin),
    Target("request-believed", believed.REQUESTS, believed.believes_request, believed.begin),
)

TARGETS: Final = {target.name: target for target in _ALL}
