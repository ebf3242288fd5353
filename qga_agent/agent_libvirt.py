"""
Guest agents through libvirt's channel, which libvirt keeps to itself: all their users go through it.

libvirt's calls block, so each visit has a thread; a call that overruns its time occupies that thread, and the guest,
until libvirt lets go of it.
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
from qga_agent.guest_agent import MOST_REPLY_BYTES, AgentSilent, AgentTrouble, GuestLies
from qga_agent.libvirt_stats import AgentChannel
from qga_agent.worker import Worker

_T = TypeVar("_T")

_MARGIN_S = 2.0
"""Longer than libvirt waits for the agent: what libvirt itself, and a busy machine, may take."""
_LIBVIRTS_OWN_S = 5
"""Seconds libvirt waits for a frozen agent to come back in step unless told otherwise."""
_STOPPING_S = 1.5
"""Longest that a daemon which stops waits for a visit to be left in good order."""


class Libvirt(Protocol):
    """What we need of libvirt; see :meth:`qga_agent.libvirt_stats.LibvirtMonitor.agent`."""

    async def agent(self, uuid: DomainUUID, worker: Worker, timeout_s: float) -> AgentChannel:
        """Return the way to a domain's guest agent."""


class LibvirtAgents:
    """
    The agents of libvirt's domains.

    :param libvirt: Where to ask for them.
    :param timeout_s: Seconds libvirt waits for one answer; 1 and more.
    :param insist: Whether to say so to libvirt for the length of each visit. Otherwise an agent that is frozen holds a
        visit up as long as is set for the domain (``virsh guest-agent-timeout``), 5 s if nothing is.
    """

    def __init__(self, libvirt: Libvirt, timeout_s: int = 1, *, insist: bool = True) -> None:
        self._libvirt = libvirt
        self._timeout_s = timeout_s
        self._insist = insist
        self._workers: list[Worker] = []
        self._made = 0

    @contextlib.asynccontextmanager
    async def visit(self, domain: DomainUUID) -> AsyncIterator[LibvirtAgent]:
        """See :meth:`qga_agent.guest_agent.Agents.visit`."""
        worker = self._workers.pop() if self._workers else self._new_worker()
        agent = LibvirtAgent(self._libvirt, domain, worker, self._timeout_s, insist=self._insist)
        limit_s = None
        try:
            yield agent
        except asyncio.CancelledError:
            limit_s = _STOPPING_S
            raise
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await agent.leave()
                    self._workers.append(worker)

    def close(self) -> None:
        """Let the threads of no visit end."""
        while self._workers:
            self._workers.pop().close()

    def _new_worker(self) -> Worker:
        self._made += 1
        return Worker(f"guest agents {self._made}")


class LibvirtAgent:
    """One visit to a domain's agent."""

    def __init__(self, libvirt: Libvirt, domain: DomainUUID, worker: Worker, timeout_s: int, *, insist: bool) -> None:
        self._libvirt = libvirt
        self._domain = domain
        self._worker = worker
        self._timeout_s = timeout_s
        self._insist = insist
        self._limit_s = (timeout_s if insist else max(timeout_s, _LIBVIRTS_OWN_S)) + _MARGIN_S
        self._channel: AgentChannel | None = None

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """See :meth:`qga_agent.guest_agent.Agent.execute`."""
        message = {"execute": command} if arguments is None else {"execute": command, "arguments": arguments}
        channel = self._channel or await self._open()
        return _returned(await self._call(lambda: channel.command(json.dumps(message), self._timeout_s)))

    async def leave(self) -> None:
        """Let libvirt wait as long as it did before, and wait for a call that is still under way."""
        await self._worker.free()
        if (channel := self._channel) is not None and self._insist:
            with contextlib.suppress(AgentTrouble):
                await self._call(lambda: channel.wait_at_most(None))
            await self._worker.free()

    async def _open(self) -> AgentChannel:
        channel = await _explained(lambda: self._libvirt.agent(self._domain, self._worker, self._limit_s))
        if self._insist:
            await self._call(lambda: channel.wait_at_most(self._timeout_s))
        self._channel = channel
        return channel

    async def _call(self, function: Callable[[], _T]) -> _T:
        return await _explained(lambda: self._worker.call(function, self._limit_s))


async def _explained(call: Callable[[], Awaitable[_T]]) -> _T:
    try:
        return await call()
    except TimeoutError as error:
        raise AgentSilent("libvirt did not answer in time") from error
    except Unreachable as error:
        raise AgentSilent(f"libvirt is away: {error.detail}") from error


def _returned(text: str) -> object:
    """Take the value out of an answer as libvirt passes it on. :raise GuestLies: When there is none."""
    if len(text) > MOST_REPLY_BYTES:
        raise GuestLies(f"an answer of {len(text)} characters")
    try:
        answer = msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise GuestLies("an answer that is not JSON") from error
    if not isinstance(answer, dict) or "return" not in answer:
        raise GuestLies("an answer without a result")
    return answer["return"]
