"""What a guest's agent says: through libvirt's channel, through a socket, and in the files that are read by it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from qga_agent import agent_libvirt, agent_socket
from qga_agent.guest_agent import (
    AgentError,
    InvalidReply,
    parse_snmp,
    parse_sockstat,
    printable_line,
    read_figures,
)
from tests.fuzz.mutation import Material

_T = TypeVar("_T")

_SOCKSTAT: Final = b"sockets: used 294\nTCP: inuse 41 orphan 0 tw 2 alloc 60 mem 3\nUDP: inuse 7 mem 2\n"
_SNMP: Final = b"Tcp: RtoAlgorithm RtoMin ActiveOpens CurrEstab\nTcp: 1 200 95 5\nUdp: InDatagrams\nUdp: 3\n"
_INTERFACES: Final = [
    {"name": "lo", "hardware-address": "00:00:00:00:00:00", "statistics": {}},
    {
        "name": "eth0",
        "hardware-address": "52:54:00:12:34:56",
        "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": "10.0.0.1", "prefix": 24}],
        "statistics": {"rx-packets": 5, "rx-bytes": 800, "tx-packets": 7, "tx-bytes": 900, "rx-errs": 0},
    },
]


def _returning(value: object) -> bytes:
    return json.dumps({"return": value}).encode()


def _file(content: bytes) -> bytes:
    return _returning({"count": len(content), "buf-b64": base64.b64encode(content).decode(), "eof": True})


_TOKENS: Final = (
    *rb'''{ } [ ] [[[[ {"return": : , " null true -1 1e400 1.0 18446744073709551616 NaN "\ud800" "\u0000"'''.split(),
    *b""""id":"__qmp#00001" "eof":true "count": "buf-b64":"AAAA" "statistics":{} "name": CurrEstab""".split(),
    *b"""{"error":{"class":"GenericError","desc":"x"}} {"event":"X","data":{}}""".split(),
    b"\n",
    b"\xff",
    b"TCP: inuse ",
    b"Tcp: ",
)

_GOOD: Final = {
    "guest-network-get-interfaces": _returning(_INTERFACES).decode(),
    "guest-file-open": _returning(7).decode(),
    "guest-file-read": _file(_SOCKSTAT + _SNMP).decode(),
    "guest-file-close": _returning({}).decode(),
}

REPLIES: Final = Material([_returning(_INTERFACES), _file(_SOCKSTAT + _SNMP), _returning(7), b'{"return":{}}'], _TOKENS)
FIGURES: Final = Material([_SOCKSTAT, _SNMP], _TOKENS)
LINES: Final = Material(
    [
        b'{"return": 5, "id": "__qmp#00000"}\n{"return": {}, "id": "__qmp#00001"}\n',
        _returning(_INTERFACES) + b"\n",
        b'{"error": {"class": "CommandNotFound", "desc": "The command x has not been found"}}\n',
    ],
    _TOKENS,
)


class _Agent:
    """Gives one reply to one command, and good ones to all others, as they come through libvirt."""

    def __init__(self, command: str, reply: str) -> None:
        self._replies = _GOOD | {command: reply}

    async def execute(self, command: str, _arguments: Mapping[str, object] | None = None) -> object:
        return agent_libvirt._return_value(self._replies[command])


def understands_reply(data: bytes) -> bool:
    """Read a guest's figures from an agent that says this to one command."""
    reply = data.decode("utf-8", "surrogateescape")
    understood = [_has_figures(_Agent(command, reply)) for command in _GOOD]
    return any(understood)


def _has_figures(agent: _Agent) -> bool:
    try:
        figures = _finish(read_figures(agent))
    except AgentError as error:
        str(error).encode("utf-8", "surrogateescape")
        return False
    assert figures.connections is None or 0 <= figures.connections < 2**31
    return True


def understands_figures(data: bytes) -> bool:
    """Read both files."""
    understood = [_number(parse, data) for parse in (parse_sockstat, parse_snmp)]
    assert printable_line(data.decode("utf-8", "replace")).isprintable()
    return any(understood)


def _number(parse: Callable[[bytes], int], data: bytes) -> bool:
    try:
        return 0 <= parse(data) < 2**31
    except InvalidReply:
        return False


def _finish(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    raise AssertionError("it waits")


_loops: list[asyncio.Runner] = []


def understands_lines(data: bytes) -> bool:
    """Ask an agent behind a socket, which writes this and hangs up."""
    if not _loops:
        _loops.append(asyncio.Runner())
    return _loops[0].run(_ask(data))


async def _ask(data: bytes) -> bool:
    ours, theirs = socket.socketpair()
    client = agent_socket._Client()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        await client.connect(ours)
        with contextlib.suppress(BlockingIOError):
            theirs.send(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            await agent_socket._execute(client, "guest-ping", None)
        except AgentError as error:
            str(error).encode()
            return False
        finally:
            with contextlib.suppress(Exception):
                await client.disconnect()
    return True
