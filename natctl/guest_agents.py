"""
The way to the guest agents of this host's VMs, as the settings say: sockets, libvirt, or both.

Tested in ``tests/e2e/test_guest_agents.py``.
"""

from __future__ import annotations

from cpm.service import clock
from natctl.settings import Settings
from qga_agent.agent_libvirt import LibvirtAgents
from qga_agent.agent_socket import SocketAgents
from qga_agent.libvirt_stats import LibvirtMonitor
from qga_agent.visitor import Visitor


def visitor(settings: Settings, libvirt: LibvirtMonitor | None) -> Visitor | None:
    """
    Return what asks guest agents; None: nothing is to be asked, or there is no way to ask.

    :param libvirt: A way to agents that libvirt serves.
    """
    guests, period_s = settings.guests, settings.monitor.guest_period_s
    if not period_s or (libvirt is None and not guests.agent_sockets):
        return None
    timeout_s = guests.agent_timeout_s or 1
    return Visitor(
        period_s,
        clock.now,
        clock.wall_at,
        file=guests.announce_file,
        sockets=SocketAgents(guests.agent_sockets, timeout_s) if guests.agent_sockets else None,
        libvirt=LibvirtAgents(libvirt, timeout_s) if libvirt is not None else None,
    )
