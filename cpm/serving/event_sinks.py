"""
The places that entries of the journal are told to: syslog, an IPFIX collector, a file, a webhook.

Each delivers some entries or raises :class:`OSError`; who calls tries again with the same ones, so a place may get an
entry twice, and knows it by its ``seq``. Tested in ``tests/unit/cpm/serving/test_event_export.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from cpm.api.webhook import Webhook
from cpm.core.journal import ClockEntry, JournalEntry, NodeEntry
from cpm.records import ipfix, lines, syslog
from cpm.service import clock
from cpm.service.metrics.settings import split_address
from cpm.settings import EventsSettings

LIMIT_S: Final = 10.0
"""Seconds in which a place has to take what it is sent."""
FULL_S: Final = 0.01
"""Seconds between two attempts to send to a local socket whose queue is full."""


Entry = JournalEntry | NodeEntry | ClockEntry
"""Of the journal, of the record of nodes, or that the clock was set."""


class Sink(Protocol):
    """A place."""

    name: str
    """For logs, metrics, and the file with its position."""

    async def deliver(self, entries: Sequence[Entry]) -> None:
        """
        Deliver entries, in order.

        :raise OSError: When not all of them were taken, as far as can be known.
        """

    async def close(self) -> None:
        """Close it."""


def sinks(settings: EventsSettings, *, has_ports: bool = True) -> Iterator[Sink]:
    """
    Yield those that are set.

    :param has_ports: They are to be told of ports: the others are not for that alone.
    """
    scheme, _, rest = settings.syslog.partition("://")
    if scheme == "tcp":
        yield SyslogStream(*split_address("cpmd.toml", "events.syslog", rest))
    elif scheme:
        yield SyslogDatagrams(rest if scheme == "unix" else split_address("cpmd.toml", "events.syslog", rest))
    if settings.ipfix and has_ports:
        scheme, _, rest = settings.ipfix.rpartition("://")
        kind = IpfixStream if scheme == "tcp" else IpfixCollector
        yield kind(*split_address("cpmd.toml", "events.ipfix", rest), settings.ipfix_domain)
    if settings.file:
        yield LinesFile(Path(settings.file))
    if settings.webhook:
        yield WebhookSink(Webhook(settings.webhook, settings.webhook_token_file, settings.webhook_ca))


class Datagrams:
    """
    Sends datagrams to one place; an error, also of an earlier datagram, closes the socket.

    :param to: Path of a unix socket, or address and port.
    """

    def __init__(self, to: str | tuple[str, int]) -> None:
        self._to = to
        self._socket: socket.socket | None = None

    async def send(self, datagram: bytes) -> None:
        """:raise OSError: When there is nobody, or a local queue stays full."""
        if self._socket is None:
            self._socket = await self._open()
        time = asyncio.get_running_loop().time
        until = time() + LIMIT_S
        while True:
            try:
                self._socket.send(datagram)
            except (BlockingIOError, InterruptedError):
                if time() >= until:
                    raise
                await asyncio.sleep(FULL_S)
            except OSError:
                self.close()
                raise
            else:
                return

    async def _open(self) -> socket.socket:
        if isinstance(self._to, str):
            family, address = socket.AF_UNIX, self._to
        else:
            # Names take a thread; addresses do not.
            found = await asyncio.get_running_loop().getaddrinfo(*self._to, type=socket.SOCK_DGRAM)
            family, address = found[0][0], found[0][4]  # type: ignore[assignment]
        opened = socket.socket(family, socket.SOCK_DGRAM)
        try:
            opened.settimeout(0.0)
            opened.connect(address)
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class SyslogDatagrams:
    """Syslog by datagrams: the machine's own, or RFC 5426."""

    name = "syslog"

    def __init__(self, to: str | tuple[str, int]) -> None:
        self._datagrams = Datagrams(to)

    async def deliver(self, entries: Sequence[Entry]) -> None:  # noqa: D102 - as the protocol's
        host = socket.gethostname()
        for entry in entries:
            await self._datagrams.send(syslog.message(entry, host))

    async def close(self) -> None:  # noqa: D102
        self._datagrams.close()


class Stream:
    """
    Sends over TCP; a connection that ended is made anew. What a peer that goes away had not read is lost: TCP does not
    say.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, make: Callable[[bool], bytes]) -> None:
        """
        Send bytes.

        :param make: Returns them; its argument says whether they are the first of a connection.
        :raise OSError: When there is nobody, or it takes nothing in time; the connection is closed then.
        """
        try:
            async with asyncio.timeout(LIMIT_S):
                writer, is_new = await self._connected()
                writer.write(make(is_new))
                await writer.drain()
        except (OSError, TimeoutError) as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise OSError(0, f"it takes nothing within {LIMIT_S:g} s") from error
            raise

    async def _connected(self) -> tuple[asyncio.StreamWriter, bool]:
        if self._reader is not None and self._reader.at_eof():
            await self.close()
        if self._writer is not None:
            return self._writer, False
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1024)
        return self._writer, True

    async def close(self) -> None:
        """Close the connection."""
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class SyslogStream:
    """Syslog over TCP (RFC 6587, octet counting)."""

    name = "syslog"

    def __init__(self, host: str, port: int) -> None:
        self._stream = Stream(host, port)

    async def deliver(self, entries: Sequence[Entry]) -> None:  # noqa: D102
        host = socket.gethostname()
        text = b"".join(syslog.counted(syslog.message(entry, host)) for entry in entries)
        await self._stream.send(lambda _: text)

    async def close(self) -> None:  # noqa: D102
        await self._stream.close()


class IpfixCollector:
    """An IPFIX collector, over UDP: of the journal only who gets and gives back ports, of nodes nothing."""

    name = "ipfix"

    def __init__(self, host: str, port: int, domain: int) -> None:
        self._datagrams = Datagrams((host, port))
        self._exporter = ipfix.Exporter(domain)

    async def deliver(self, entries: Sequence[Entry]) -> None:  # noqa: D102
        blocks = ipfix.blocks(entry for entry in entries if isinstance(entry, JournalEntry))
        for message in self._exporter.messages(blocks, clock.wall().seconds):
            await self._datagrams.send(message)

    async def close(self) -> None:  # noqa: D102
        self._datagrams.close()


class IpfixStream:
    """
    The same over TCP (RFC 7011 section 10.4), which loses nothing while the collector is there.

    Each connection is a transport session of its own: it begins with the template, and its messages count from 0.
    """

    name = "ipfix"

    def __init__(self, host: str, port: int, domain: int) -> None:
        self._stream = Stream(host, port)
        self._domain = domain
        self._exporter: ipfix.Exporter | None = None

    async def deliver(self, entries: Sequence[Entry]) -> None:  # noqa: D102
        blocks = list(ipfix.blocks(entry for entry in entries if isinstance(entry, JournalEntry)))
        if blocks:
            await self._stream.send(lambda is_new: self._messages(blocks, is_new=is_new))

    def _messages(self, blocks: Sequence[ipfix.Block], *, is_new: bool) -> bytes:
        now_s = clock.wall().seconds
        begin = b""
        if is_new or self._exporter is None:
            self._exporter = ipfix.Exporter(self._domain, has_template=False)
            begin = self._exporter.template(now_s)
        return begin + b"".join(self._exporter.messages(blocks, now_s))

    async def close(self) -> None:  # noqa: D102
        await self._stream.close()


class LinesFile:
    """A file of JSON lines; it is opened for each delivery, so that it may be moved away at any time."""

    name = "file"

    def __init__(self, path: Path) -> None:
        self._path = path

    async def deliver(self, entries: Sequence[Entry]) -> None:  # noqa: D102
        await asyncio.to_thread(self._append, b"".join(map(lines.json_line, entries)))

    def _append(self, text: bytes) -> None:
        # O_NONBLOCK: to open a pipe that nobody reads would take for ever, and cpmd waits for its threads when it ends.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, 0o640)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, f"{self._path} is not a regular file")
            size = status.st_size
            if os.write(descriptor, text) != len(text):
                # A full disk: no line is to be there by half.
                os.ftruncate(descriptor, size)
                raise OSError(0, "no space left for all of it")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    async def close(self) -> None:  # noqa: D102
        return


class WebhookSink:
    """An HTTP server: ``{"events": [...]}``, an object of the fields of :mod:`cpm.records.lines` each."""

    name = "webhook"

    def __init__(self, webhook: Webhook) -> None:
        self._webhook = webhook

    async def deliver(self, entries: Sequence[Entry]) -> None:  # noqa: D102
        body = msgspec.json.encode({"events": [lines.told(entry) for entry in entries]})
        await self._webhook.post(body, f"{entries[0].seq}-{entries[-1].seq}")

    async def close(self) -> None:  # noqa: D102
        await self._webhook.close()
