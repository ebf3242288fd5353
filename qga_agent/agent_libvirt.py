"""
Guest agents through libvirt's channel. libvirt keeps the channel open itself, and all users of an agent go through it.

libvirt's calls block, so each visit has a thread of its own; a call that overruns its timeout occupies that thread, and
the guest, until libvirt returns. How long libvirt waits for an agent that is frozen (5 s by default,
``virsh guest-agent-timeout``) is a property of the domain that holds for every user of that agent, also after natd
has died: it is left as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import msgspec

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from qga_agent.guest_agent import MAX_REPLY_BYTES, AgentSilent, InvalidReply
from qga_agent.libvirt_stats import AgentChannel
from qga_agent.worker import Worker

_T = TypeVar("_T")

_MARGIN_S = 2.0
"""Added to the seconds libvirt waits for the agent: what libvirt itself may take on a busy machine."""
_LIBVIRT_DEFAULT_S = 5
"""Seconds libvirt waits for a frozen agent to answer ``guest-sync``, whatever the command's timeout, unless the domain
has another setting."""


class ChannelSource(Protocol):
    """Opens channels; see :meth:`qga_agent.libvirt_stats.LibvirtMonitor.agent_channel`."""

    async def agent_channel(self, uuid: DomainUUID, worker: Worker, timeout_s: float) -> AgentChannel:
        """Return the channel to a domain's guest agent."""


class LibvirtAgents:
    """
    The agents of libvirt's domains.

    :param libvirt: Where to get their channels.
    :param timeout_s: Seconds libvirt waits for the reply to one command, once the agent answers at all; at least 1.
    """

    def __init__(self, libvirt: ChannelSource, timeout_s: int = 1) -> None:
        self._libvirt = libvirt
        self._timeout_s = timeout_s
        self._idle_workers: list[Worker] = []
        self._worker_count = 0

    @contextlib.asynccontextmanager
    async def visit(self, domain: DomainUUID) -> AsyncIterator[LibvirtAgent]:
        """See :meth:`qga_agent.guest_agent.Agents.visit`."""
        worker = self._idle_workers.pop() if self._idle_workers else self._new_worker()
        is_stopping = False
        try:
            yield LibvirtAgent(self._libvirt, domain, worker, self._timeout_s)
        except asyncio.CancelledError:
            is_stopping = True  # a call that still runs ends with the process
            raise
        finally:
            if not is_stopping:
                await worker.wait_until_free()
                self._idle_workers.append(worker)

    def close(self) -> None:
        """End the idle threads."""
        while self._idle_workers:
            self._idle_workers.pop().close()

    def _new_worker(self) -> Worker:
        self._worker_count += 1
        return Worker(f"guest agents {self._worker_count}")


class LibvirtAgent:
    """One visit to a domain's agent."""

    def __init__(self, libvirt: ChannelSource, domain: DomainUUID, worker: Worker, timeout_s: int) -> None:
        self._libvirt = libvirt
        self._domain = domain
        self._worker = worker
        self._timeout_s = timeout_s
        self._limit_s = max(timeout_s, _LIBVIRT_DEFAULT_S) + _MARGIN_S
        self._channel: AgentChannel | None = None

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """See :meth:`qga_agent.guest_agent.Agent.execute`."""
        message = {"execute": command} if arguments is None else {"execute": command, "arguments": arguments}
        channel = self._channel or await self._open_channel()
        return _return_value(await self._call(lambda: channel.command(json.dumps(message), self._timeout_s)))

    async def _open_channel(self) -> AgentChannel:
        self._channel = await _translate_errors(
            lambda: self._libvirt.agent_channel(self._domain, self._worker, self._limit_s)
        )
        return self._channel

    async def _call(self, function: Callable[[], _T]) -> _T:
        return await _translate_errors(lambda: self._worker.call(function, self._limit_s))


async def _translate_errors(call: Callable[[], Awaitable[_T]]) -> _T:
    try:
        return await call()
    except TimeoutError as error:
        raise AgentSilent("libvirt did not answer in time") from error
    except Unreachable as error:
        raise AgentSilent(f"libvirt is unreachable: {error.detail}") from error


def _return_value(reply: str) -> object:
    """Return the value of ``return`` in a reply as libvirt passes it on. :raise InvalidReply: When there is none."""
    if len(reply) > MAX_REPLY_BYTES:
        raise InvalidReply(f"a reply of {len(reply)} characters")
    try:
        decoded = msgspec.json.decode(reply)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidReply("a reply that is not JSON") from error
    if not isinstance(decoded, dict) or "return" not in decoded:
        raise InvalidReply("a reply without a return value")
    return decoded["return"]
