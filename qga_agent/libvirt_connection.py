"""
One connection to libvirt, blocking: the only module that touches the binding.

The binding is imported with the first connection, since natd also runs on an edge without libvirt. What libvirt does
that shapes this module (tried with 9.0):

- Events need an event loop of libvirt's, one per process, registered before the first connection: a thread runs the
  default one for ever. Callbacks come in that thread.
- Every error is printed to standard error unless a handler is registered.
- A connection that broke never recovers; every further call fails.
- Keep-alive notices a libvirtd that hangs and closes the connection, which also ends the call that is stuck in it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import METADATA_NAMESPACE, DomainFacts, DomainXMLError, parse
from qga_agent.domain_events import (
    DeviceAdded,
    DeviceRemoved,
    DomainEvent,
    agent_event,
    lifecycle_event,
    metadata_event,
)
from qga_agent.guest_agent import AgentAbsent, AgentRefused, AgentSilent, AgentTrouble, quoted
from qga_agent.samples import InterfaceCounters

logger = logging.getLogger(__name__)

KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
"""A libvirtd that has not answered for interval * (count + 1) seconds is given up."""

_REMEDY = "is libvirtd running? natd tries again by itself"


class ConnectionBroken(Unreachable):
    """The connection is of no use any more."""


class LibvirtConnection:
    """
    An open connection with its event registrations. Every method may block for as long as libvirt likes.

    :param uri: As virsh takes it.
    :param on_event: Called for each event, in libvirt's thread.
    :param on_close: Called once with the reason when the connection breaks, in libvirt's thread.
    :raise Unreachable: When there is no libvirt here, or it does not let us in.
    """

    def __init__(self, uri: str, on_event: Callable[[DomainEvent], None], on_close: Callable[[str], None]) -> None:
        self._uri = uri
        self._libvirt = _binding(uri)
        with self._explained():
            self._connection = self._libvirt.open(uri)
        try:
            with self._explained():
                self._listen(on_event, on_close)
        except Unreachable:
            self.close()
            raise

    def statistics(self) -> dict[str, InterfaceCounters]:
        """
        Return the counters of all interfaces of all active domains, by tap, in one call.

        :raise ConnectionBroken: When the connection is lost.
        :raise Unreachable: When libvirt refuses.
        """
        of_active = self._libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
        no_waiting = self._libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT  # for a domain somebody else works on
        with self._explained():
            every = self._connection.getAllDomainStats(self._libvirt.VIR_DOMAIN_STATS_INTERFACE, of_active | no_waiting)
        return {tap: counters for _, each in every for tap, counters in interface_counters(each).items()}

    def domains(self) -> tuple[DomainFacts, ...]:
        """
        Return the domains that run here or are paused.

        :raise ConnectionBroken: When the connection is lost.
        :raise Unreachable: When libvirt refuses.
        """
        with self._explained():
            active = self._connection.listAllDomains(self._libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            found = [self._facts(domain) for domain in active]
        return tuple(facts for facts in found if facts is not None)

    def agent(self, uuid: DomainUUID) -> LibvirtAgentChannel:
        """
        Return the way to a domain's guest agent.

        :raise AgentAbsent: When no such domain runs here.
        :raise AgentSilent: When libvirt cannot say.
        """
        try:
            return LibvirtAgentChannel(self._libvirt, self._connection.lookupByUUIDString(uuid))
        except self._libvirt.libvirtError as error:
            if error.get_error_code() == self._libvirt.VIR_ERR_NO_DOMAIN:
                raise AgentAbsent("libvirt has no such VM") from error
            raise AgentSilent(f"libvirt: {quoted(error.get_error_message() or error)}") from error

    def close(self) -> None:
        """Give the connection back; whether that succeeds matters to nobody."""
        with contextlib.suppress(self._libvirt.libvirtError):
            self._connection.unregisterCloseCallback()
        with contextlib.suppress(self._libvirt.libvirtError):
            self._connection.close()

    def _listen(self, on_event: Callable[[DomainEvent], None], on_close: Callable[[str], None]) -> None:
        libvirt, connection = self._libvirt, self._connection
        connection.registerCloseCallback(lambda _, reason, __: on_close(_close_reason(reason)), None)
        with contextlib.suppress(libvirt.libvirtError):  # drivers within our process (test:///default) have none
            connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)

        def lifecycle(_: object, domain: Any, event: int, detail: int, __: object) -> None:
            told = lifecycle_event(DomainUUID(domain.UUIDString()), domain.name(), event, detail)
            if told is not None:
                on_event(told)

        def plugged(kind: type[DeviceAdded | DeviceRemoved], _: object, domain: Any, alias: str, __: object) -> None:
            on_event(kind(DomainUUID(domain.UUIDString()), alias))

        def described(_: object, domain: Any, kind: int, namespace: str | None, __: object) -> None:
            told = metadata_event(DomainUUID(domain.UUIDString()), kind, namespace, METADATA_NAMESPACE)
            if told is not None:
                on_event(told)

        def spoken_to(_: object, domain: Any, state: int, __: int, ___: object) -> None:
            told = agent_event(DomainUUID(domain.UUIDString()), state)
            if told is not None:
                on_event(told)

        for event, callback in (
            (libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, spoken_to),
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, functools.partial(plugged, DeviceAdded)),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, functools.partial(plugged, DeviceRemoved)),
            (libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, described),
        ):
            connection.domainEventRegisterAny(None, event, callback, None)

    def _facts(self, domain: Any) -> DomainFacts | None:
        """Read one domain; None when it ended meanwhile."""
        try:
            return parse(domain.XMLDesc(0).encode())
        except DomainXMLError as error:
            logger.warning("passing over a domain of libvirt's: %s", error)
        except self._libvirt.libvirtError as error:
            if error.get_error_code() != self._libvirt.VIR_ERR_NO_DOMAIN:
                raise
        return None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._libvirt.libvirtError as error:
            detail = error.get_error_message() or str(error)
            broken = not self._is_alive()
            raise (ConnectionBroken if broken else Unreachable)(self._uri, detail, _REMEDY) from error

    def _is_alive(self) -> bool:
        """Ask the client's end of the connection, not libvirtd."""
        try:
            return bool(self._connection.isAlive())
        except (AttributeError, self._libvirt.libvirtError):  # never opened, or beyond asking
            return False


class LibvirtAgentChannel:
    """
    The agent channel of one domain. Every method may block for as long as libvirt likes.

    How long libvirt waits for a frozen agent is a property of the domain, which every other user of its agent has to do
    with, too: :meth:`wait_at_most` should be taken back.
    """

    def __init__(self, libvirt: Any, domain: Any) -> None:
        self._libvirt = libvirt
        self._domain = domain

    def wait_at_most(self, seconds: int | None) -> None:
        """
        Have libvirt wait so long for an agent's answer; None: as long as it does of its own accord.

        A timeout that is passed with a command is not enough: 5 s for an agent that is found frozen stay 5 s.
        :raise AgentTrouble: When it does not take that.
        """
        own = self._libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK
        try:
            self._domain.agentSetResponseTimeout(own if seconds is None else seconds, 0)
        except self._libvirt.libvirtError as error:
            raise self._trouble(error, waited=False) from error

    def command(self, text: str, timeout_s: int) -> str:
        """
        Have the agent execute a command and return its answer; both are JSON.

        :raise AgentAbsent: When there is no agent, or the domain does not run.
        :raise AgentSilent: When it did not answer in time, or libvirt is away.
        :raise AgentRefused: When the agent answered with an error.
        """
        import libvirt_qemu

        begin = time.monotonic()
        try:
            return str(libvirt_qemu.qemuAgentCommand(self._domain, text, timeout_s, 0))
        except self._libvirt.libvirtError as error:
            raise self._trouble(error, waited=time.monotonic() - begin > timeout_s / 2) from error

    def _trouble(self, error: Any, *, waited: bool) -> AgentTrouble:
        """Say what an error of libvirt's means; one code stands for both nobody there and no answer."""
        libvirt, code = self._libvirt, error.get_error_code()
        why = quoted(error.get_error_message() or error)
        if code in (libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, libvirt.VIR_ERR_NO_SUPPORT):
            return AgentAbsent("the VM has no channel for it")
        if code in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
            return AgentAbsent("the VM does not run")
        if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE and not waited:
            return AgentAbsent("no agent runs in the VM")
        if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
            return AgentSilent("no answer in time")
        # The agent's own error names the command, in every language; other internal errors are libvirt's, for
        # example "client socket is closed".
        internal = code == libvirt.VIR_ERR_INTERNAL_ERROR and "'guest-" in why
        if internal or code == getattr(libvirt, "VIR_ERR_AGENT_COMMAND_FAILED", None):
            return AgentRefused(why)
        return AgentSilent(why)


def interface_counters(statistics: Mapping[str, Any]) -> dict[str, InterfaceCounters]:
    """
    Read the interfaces of one domain out of its part of libvirt's bulk statistics (``net.N.…``), by tap.

    libvirt gives a tap's counters as the guest sees them. An interface without a name or a counter is left out.
    """
    found: dict[str, InterfaceCounters] = {}
    for number in range(statistics.get("net.count", 0)):
        prefix = f"net.{number}."
        name = statistics.get(prefix + "name")
        figures = [statistics.get(prefix + figure) for figure in ("rx.pkts", "rx.bytes", "tx.pkts", "tx.bytes")]
        counted = [figure for figure in figures if isinstance(figure, int)]
        if name and len(counted) == len(figures):
            found[name] = InterfaceCounters(*counted)
    return found


_CLOSE_REASONS = ("an error", "libvirtd closed it", "no answer to keep-alive", "we closed it")


def _close_reason(reason: int) -> str:
    """Say what a number of virConnectCloseReason means."""
    return _CLOSE_REASONS[reason] if 0 <= reason < len(_CLOSE_REASONS) else f"reason {reason}"


def _binding(uri: str) -> Any:
    """
    Return the binding, silenced and with its event loop running.

    :raise Unreachable: When it is not installed.
    """
    try:
        return _prepared()
    except ImportError as error:
        raise Unreachable(uri, f"no libvirt binding: {error}", "install python3-libvirt, or libvirt-python") from error


@functools.cache
def _prepared() -> Any:
    import libvirt

    libvirt.registerErrorHandler(lambda _, __: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError as error:
                logger.warning("libvirt's event loop stumbled: %s", error)
                time.sleep(1)

    threading.Thread(target=run, name="libvirt events", daemon=True).start()
    return libvirt
