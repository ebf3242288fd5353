"""Situations in which libvirt cannot pass a command to a guest agent, and the error that is made of each."""

from __future__ import annotations

import dataclasses

import libvirt

from qga_agent.guest_agent import AgentAbsent, AgentError, AgentRefused, AgentSilent


@dataclasses.dataclass(frozen=True)
class AgentFailure:
    """libvirt's error (9.0) for ``qemuAgentCommand``."""

    code: int
    message: str
    """A part of it."""
    error: type[AgentError]
    waits: bool = False
    """Whether it comes only when libvirt's timeout has passed."""


FAILURES = {
    "no channel": AgentFailure(libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, "QEMU guest agent is not configured", AgentAbsent),
    "no agent": AgentFailure(libvirt.VIR_ERR_AGENT_UNRESPONSIVE, "QEMU guest agent is not connected", AgentAbsent),
    "frozen": AgentFailure(
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE, "Guest agent not available for now", AgentSilent, waits=True
    ),
    "paused": AgentFailure(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running", AgentAbsent),
    "shut off": AgentFailure(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running", AgentAbsent),
    "unknown": AgentFailure(libvirt.VIR_ERR_NO_DOMAIN, "Domain not found", AgentAbsent),
    "refused": AgentFailure(
        libvirt.VIR_ERR_INTERNAL_ERROR, "unable to execute QEMU agent command 'guest-", AgentRefused
    ),
}
