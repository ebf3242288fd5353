"""
One blocking connection to libvirt: the only module that calls its Python binding.

The binding is imported with the first connection, since natd also runs on an edge without libvirt. The following
properties of libvirt (observed with 9.0) shape this module:

- Events need libvirt's own event loop, one per process, registered before the first connection is opened: a thread runs
  the default one forever. Callbacks run in that thread.
- Every error is printed to standard error unless a handler is registered.
- A broken connection never recovers; every further call on it fails.
- Keep-alive detects a libvirtd that hangs and closes the connection, which also ends a call that is stuck in it.
- Closing frees the connection under a call that another thread still makes on it, and the process crashes.
- Two threads with calls on one connection crash the process, too, when the first one's call ends without an answer: its
  stack is written to afterwards (CVE-2024-4418). So each thread has a connection of its own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Any

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import METADATA_NAMESPACE, DomainXMLError, parse
from qga_agent.domain_events import (
    DeviceAdded,
    DeviceRemoved,
    DomainEvent,
    agent_event,
    lifecycle_event,
    metadata_event,
)
from qga_agent.domain_list import ListedDomain, phase_of
from qga_agent.guest_agent import AgentAbsent, AgentError, AgentRefused, AgentSilent, printable_line
from qga_agent.samples import InterfaceCounters

logger = logging.getLogger(__name__)

KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
"""The connection is closed when libvirtd has not answered for interval * (count + 1) seconds."""

_REMEDY = "is libvirtd running? natd tries again by itself"


class ConnectionBroken(Unreachable):
    """The connection broke; open a new one."""


class LibvirtConnection:
    """
    An open connection with its event callbacks, and one for each other thread that calls. Every method may block
    without limit.

    :param uri: As virsh takes it.
    :param on_event: Called for each event, in libvirt's thread.
    :param on_close: Called once with the reason when the connection breaks, in libvirt's thread.
    :raise Unreachable: When no libvirtd answers, it denies access, or the binding is not installed.
    """

    def __init__(self, uri: str, on_event: Callable[[DomainEvent], None], on_close: Callable[[str], None]) -> None:
        self._uri = uri
        self._libvirt = _binding(uri)
        self._threads: dict[int, Any] = {}
        self._threads_lock = threading.Lock()
        self._calls_lock = threading.Lock()
        self._calls = 0
        self._is_closing = False
        with self._translate_errors():
            self._connection = self._threads[threading.get_ident()] = self._libvirt.open(uri)
        try:
            with self._translate_errors():
                self._register_callbacks(on_event, on_close)
        except Unreachable:
            self.close()
            raise

    def statistics(self) -> dict[str, InterfaceCounters]:
        """
        Return the counters of all interfaces of all active domains, by tap, in one call.

        :raise ConnectionBroken: When the connection is lost.
        :raise Unreachable: When libvirt refuses.
        """
        active = self._libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
        no_wait = self._libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT  # skip a domain that is locked
        with self._translate_errors():
            connection = self._connection_of_thread()
            records = connection.getAllDomainStats(self._libvirt.VIR_DOMAIN_STATS_INTERFACE, active | no_wait)
        return {tap: counters for _, record in records for tap, counters in interface_counters(record).items()}

    def domains(self) -> tuple[ListedDomain, ...]:
        """
        Return the domains that run here or are paused; blocks while a hook runs for any of them.

        :raise ConnectionBroken: When the connection is lost.
        :raise Unreachable: When libvirt refuses.
        """
        active = self._libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
        no_wait = self._libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
        with self._translate_errors():
            connection = self._connection_of_thread()
            # One call for the states of all: they belong together, and a job on a domain does not delay it.
            records = connection.getAllDomainStats(self._libvirt.VIR_DOMAIN_STATS_STATE, active | no_wait)
            every = [
                self._listed(domain, record.get("state.state", 0), record.get("state.reason", 0))
                for domain, record in records
            ]
        return tuple(listed for listed in every if listed is not None)

    def domain(self, uuid: DomainUUID) -> ListedDomain | None:
        """
        Return one domain; blocks while a hook runs for it, and for no other. None: it does not run here.

        :raise ConnectionBroken: When the connection is lost.
        :raise Unreachable: When libvirt refuses.
        """
        try:
            with self._translate_errors():
                domain = self._connection_of_thread().lookupByUUIDString(uuid)
                state, reason = domain.state(0)
                if state == self._libvirt.VIR_DOMAIN_SHUTOFF:
                    return None
                listed = self._listed(domain, state, reason)
        except Unreachable as error:
            if self._is_no_domain(error.__cause__):
                return None
            raise
        return listed

    def leases(self, uuid: DomainUUID) -> tuple[IPv4Address, ...]:
        """
        Return the IPv4 addresses that libvirt's own networks have leased to a domain, the latest first; none: it has
        none, or does not run here.

        :raise ConnectionBroken: When the connection is lost.
        :raise Unreachable: When libvirt refuses.
        """
        try:
            with self._translate_errors():
                domain = self._connection_of_thread().lookupByUUIDString(uuid)
                every = domain.interfaceAddresses(self._libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE)
        except Unreachable as error:
            if isinstance(error, ConnectionBroken):
                raise
            # Not running any more, or a network of which libvirt knows no leases.
            return ()
        found = (each["addr"] for interface in every.values() for each in interface["addrs"] or () if each["type"] == 0)
        return tuple(dict.fromkeys(IPv4Address(text) for text in found))

    def agent_channel(self, uuid: DomainUUID) -> LibvirtAgentChannel:
        """
        Return the channel to a domain's guest agent, for use in this thread.

        :raise AgentAbsent: When no such domain runs here.
        :raise AgentSilent: When libvirt cannot be asked.
        """
        try:
            with self._under_way():
                return LibvirtAgentChannel(self._libvirt, self._connection_of_thread().lookupByUUIDString(uuid))
        except self._libvirt.libvirtError as error:
            if self._is_no_domain(error):
                raise AgentAbsent("libvirt has no such VM") from error
            raise AgentSilent(f"libvirt: {printable_line(error.get_error_message() or error)}") from error
        except ConnectionBroken as error:
            raise AgentSilent(f"libvirt: {error.detail}") from error

    def close(self) -> None:
        """Close the connection as soon as no call is under way on it, and refuse calls; errors are ignored."""
        with self._calls_lock:
            if self._is_closing:
                return
            self._is_closing = True
            is_free = not self._calls
        if is_free:
            self._close_now()

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """Keep the connection from being freed during a call. :raise ConnectionBroken: When it is closed already."""
        with self._calls_lock:
            if self._is_closing:
                raise ConnectionBroken(self._uri, "the connection is closed", _REMEDY)
            self._calls += 1
        try:
            yield
        finally:
            with self._calls_lock:
                self._calls -= 1
                is_last = self._is_closing and not self._calls
            if is_last:
                self._close_now()

    def _close_now(self) -> None:
        with contextlib.suppress(self._libvirt.libvirtError):
            self._connection.unregisterCloseCallback()
        with self._threads_lock:
            connections = list(self._threads.values())
        for connection in connections:
            with contextlib.suppress(self._libvirt.libvirtError):
                connection.close()

    def _connection_of_thread(self) -> Any:
        # Besides, libvirtd serves few calls of one connection at a time (max_client_requests, 5), and frozen agents
        # would hold as many for seconds.
        thread = threading.get_ident()
        with self._threads_lock:
            connection = self._threads.get(thread)
        if connection is not None and (connection is self._connection or _is_alive(self._libvirt, connection)):
            return connection
        connection = self._libvirt.open(self._uri)
        self._keep_alive(connection)
        with self._threads_lock:
            self._threads[thread] = connection
        return connection

    def _keep_alive(self, connection: Any) -> None:
        with contextlib.suppress(self._libvirt.libvirtError):  # drivers within this process (test:///default) have none
            connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)

    def _register_callbacks(self, on_event: Callable[[DomainEvent], None], on_close: Callable[[str], None]) -> None:
        libvirt, connection = self._libvirt, self._connection
        connection.registerCloseCallback(lambda _, reason, __: on_close(_close_reason(reason)), None)
        self._keep_alive(connection)

        def on_lifecycle(_: object, domain: Any, event: int, detail: int, __: object) -> None:
            translated = lifecycle_event(DomainUUID(domain.UUIDString()), domain.name(), event, detail)
            if translated is not None:
                on_event(translated)

        def on_device(kind: type[DeviceAdded | DeviceRemoved], _: object, domain: Any, alias: str, __: object) -> None:
            on_event(kind(DomainUUID(domain.UUIDString()), alias))

        def on_metadata(_: object, domain: Any, kind: int, namespace: str | None, __: object) -> None:
            translated = metadata_event(DomainUUID(domain.UUIDString()), kind, namespace, METADATA_NAMESPACE)
            if translated is not None:
                on_event(translated)

        def on_agent_state(_: object, domain: Any, state: int, __: int, ___: object) -> None:
            translated = agent_event(DomainUUID(domain.UUIDString()), state)
            if translated is not None:
                on_event(translated)

        for event, callback in (
            (libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, on_agent_state),
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, functools.partial(on_device, DeviceAdded)),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, functools.partial(on_device, DeviceRemoved)),
            (libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, on_metadata),
        ):
            connection.domainEventRegisterAny(None, event, callback, None)

    def _listed(self, domain: Any, state: int, reason: int) -> ListedDomain | None:
        """Return one domain of the list; None when it ended meanwhile."""
        facts = None
        try:
            facts = parse(domain.XMLDesc(0).encode())
        except DomainXMLError as error:
            logger.warning("ignoring the XML of a domain: %s", error)
        except self._libvirt.libvirtError as error:
            if self._is_no_domain(error):
                return None
            if not self._is_alive():
                raise
            # One domain that libvirt cannot describe says nothing about the others, and it still runs.
            logger.warning("cannot read the XML of a domain: %s", error)
        return ListedDomain(DomainUUID(domain.UUIDString()), phase_of(state, reason), facts)

    def _is_no_domain(self, error: Any) -> bool:
        is_libvirts = isinstance(error, self._libvirt.libvirtError)
        return is_libvirts and bool(error.get_error_code() == self._libvirt.VIR_ERR_NO_DOMAIN)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        with self._under_way():
            try:
                yield
            except self._libvirt.libvirtError as error:
                detail = error.get_error_message() or str(error)
                broken = not self._is_alive()
                raise (ConnectionBroken if broken else Unreachable)(self._uri, detail, _REMEDY) from error

    def _is_alive(self) -> bool:
        """Return whether the client side of the connection is open; asks nothing of libvirtd."""
        try:
            return _is_alive(self._libvirt, self._connection)
        except AttributeError:  # never opened
            return False


class LibvirtAgentChannel:
    """The agent channel of one domain. Every method may block without limit."""

    def __init__(self, libvirt: Any, domain: Any) -> None:
        self._libvirt = libvirt
        self._domain = domain

    def command(self, text: str, timeout_s: int) -> str:
        """
        Have the agent execute a command and return its reply; both are JSON.

        :raise AgentAbsent: When there is no agent, or the domain does not run.
        :raise AgentSilent: When it did not answer in time, or libvirt is unreachable.
        :raise AgentRefused: When the agent answered with an error.
        """
        import libvirt_qemu

        begin = time.monotonic()
        try:
            return str(libvirt_qemu.qemuAgentCommand(self._domain, text, timeout_s, 0))
        except self._libvirt.libvirtError as error:
            raise self._agent_error(error, timed_out=time.monotonic() - begin > timeout_s / 2) from error

    def _agent_error(self, error: Any, *, timed_out: bool) -> AgentError:
        """Translate an error of libvirt; one of its codes stands for both no agent and no answer in time."""
        libvirt, code = self._libvirt, error.get_error_code()
        reason = printable_line(error.get_error_message() or error)
        if code in (libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, libvirt.VIR_ERR_NO_SUPPORT):
            return AgentAbsent("the VM has no agent channel")
        if code in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
            return AgentAbsent("the VM does not run")
        if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE and not timed_out:
            return AgentAbsent("no agent runs in the VM")
        if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
            return AgentSilent("no answer in time")
        # An error of the agent itself names the command, in every language; other internal errors are libvirt's own,
        # for example "client socket is closed".
        internal = code == libvirt.VIR_ERR_INTERNAL_ERROR and "'guest-" in reason
        if internal or code == getattr(libvirt, "VIR_ERR_AGENT_COMMAND_FAILED", None):
            return AgentRefused(reason)
        return AgentSilent(reason)


def _is_alive(libvirt: Any, connection: Any) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:  # already closed
        return False


def interface_counters(statistics: Mapping[str, Any]) -> dict[str, InterfaceCounters]:
    """
    Parse one domain's record of libvirt's bulk statistics (``net.N.…``). :return: The counters by tap.

    libvirt counts a tap from the guest's side. An interface without a name, or with a counter missing, is left out.
    """
    parsed: dict[str, InterfaceCounters] = {}
    for number in range(statistics.get("net.count", 0)):
        prefix = f"net.{number}."
        name = statistics.get(prefix + "name")
        values = [statistics.get(prefix + counter) for counter in ("rx.pkts", "rx.bytes", "tx.pkts", "tx.bytes")]
        counters = [value for value in values if isinstance(value, int)]
        if name and len(counters) == len(values):
            parsed[name] = InterfaceCounters(*counters)
    return parsed


_CLOSE_REASONS = ("an error", "libvirtd closed it", "no answer to keep-alive", "we closed it")


def _close_reason(reason: int) -> str:
    """Return the name of a virConnectCloseReason."""
    return _CLOSE_REASONS[reason] if 0 <= reason < len(_CLOSE_REASONS) else f"reason {reason}"


def _binding(uri: str) -> Any:
    """
    Return the binding, printing no errors and with its event loop running.

    :raise Unreachable: When it is not installed.
    """
    try:
        return _load_binding()
    except ImportError as error:
        raise Unreachable(uri, f"no libvirt binding: {error}", "install python3-libvirt, or libvirt-python") from error


@functools.cache
def _load_binding() -> Any:
    import libvirt

    libvirt.registerErrorHandler(lambda _, __: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError as error:
                logger.warning("error in libvirt's event loop: %s", error)
                time.sleep(1)

    threading.Thread(target=run, name="libvirt events", daemon=True).start()
    return libvirt
