"""10,000 generated messages to every socket of running daemons: a clear error, no crash, no change."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import string
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest

from cpm.protocol.messages import PROTOCOL
from lab.daemons import CPMD, DaemonSettings, natd_of
from lab.lab import Lab
from lab.traffic import connect, sink
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import assert_agree, facts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

COUNT = 10_000
AT_ONCE = 16
NOISE = "noise"
"""Prefix of node names that no node has; as hosts they get no VM in their snapshots."""
UUID = "0f2d3f0e-6d4b-4f6b-9f57-0c8c5a1f7a11"
XML = f"<domain type='qemu'><name>x</name><uuid>{UUID}</uuid><devices/></domain>"
_BUDGET = re.compile(r"burst \d+ packets")

SETTINGS = DaemonSettings(cpmd={"pool": {"initial": 256, "floor": 256}}, natd={})
"""At the floor from the start, so that idle guests keep their ports."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("g"), SETTINGS) as site:
        site.add_guest("a", "host1")
        site.add_guest("b", "host2")
        yield site


@pytest.fixture(autouse=True)
def _nothing_changes(lab: Lab) -> Iterator[None]:
    before = everything(lab)
    yield
    assert everything(lab) == before
    assert_agree(lab)
    with sink(lab):
        assert connect(lab.guest("a"), 20, "-c", "-R").ok == 20


def everything(lab: Lab) -> dict[str, object]:
    """Return all that must be unchanged afterwards: VMs, nodes, pool, journal, kernels, processes."""
    still = ("name", "uuid", "node", "external_address", "first_port", "last_port", "state")
    return {
        "vms": [[vm[key] for key in still] for vm in facts(lab, "list", "--all")],
        "nodes": [
            [node["name"], node["connected"], node["synced"]]
            for node in facts(lab, "node", "list")
            if not node["name"].startswith(NOISE)
        ],
        "pool": facts(lab, "pool", "list"),
        "journal": facts(lab, "events"),
        # Arrival budgets are renewed as connections come and go; those before each test of ours still end.
        "kernels": {node: _BUDGET.sub("", lab.run(node, "nft", "-s", "list", "ruleset")) for node in lab.site.nodes},
        "processes": [lab.daemons.process(daemon) for daemon in (CPMD, *map(natd_of, lab.site.nodes))],
    }


def junk(chance: random.Random) -> bytes:
    """Return random bytes, some of them from alphabets that parsers know."""
    alphabet = chance.choice([bytes(range(256)), string.printable.encode(), b'{}[]",:0123456789 \n\\u', b"\0\xff\n "])
    return bytes(chance.choices(alphabet, k=chance.choice([0, 1, 7, 60, 500, 9000])))


def damaged(chance: random.Random, good: bytes) -> bytes:
    """Return a valid message cut short, with bytes inserted or changed, or junk."""
    way, at = chance.randrange(5), chance.randrange(1, len(good))
    if way == 0:
        return good[:at]
    if way == 1:
        return good[:at] + b"\xff\xfe" + good[at:]
    if way == 2:
        return good[:at] + b"\0" * chance.randrange(1, 9) + good[at + 1 :]
    if way == 3:
        return junk(chance) + b"\xff"
    return b"[" * chance.choice([1, 100, 100_000]) + good


def invalid_value(chance: random.Random) -> Any:
    """Return a JSON value that is valid for no field."""
    return chance.choice(
        [None, True, -1, 1e308, 2**70, "", "\ud7ff\0", "203.0.113", [], [[]], {}, {"first": 9, "last": 1}, ["x"] * 500]
    )


HELLO = {
    "type": "hello", "protocol": PROTOCOL, "node": NOISE, "roles": ["host"], "underlay": "172.30.0.99",
    "version": "0", "epoch": 0, "domains": [],
}  # fmt: skip
# Without optional fields: one with a damaged name would only be unknown, and so ignored.
NODE_MESSAGES: list[dict[str, Any]] = [
    {"type": "attach", "domain": UUID, "name": "x"},
    {"type": "detach", "domain": UUID, "reason": "x"},
    {"type": "present", "domains": []},
    {"type": "applied", "epoch": 1, "generation": 1},
    {"type": "rejected", "epoch": 1, "generation": 1, "code": "x", "message": "x"},
    {"type": "report", "generation": 1, "period_s": 1.0, "vms": []},
    HELLO,
]


def wrong_node_message(chance: random.Random) -> bytes:
    """Return a node's message with a field missing or of the wrong type, or that is not JSON."""
    good = chance.choice(NODE_MESSAGES)
    key = chance.choice(list(good))
    way = chance.randrange(3)
    if way == 0:
        return json.dumps({name: value for name, value in good.items() if name != key}).encode()
    if way == 1:
        return json.dumps(good | {key: {"x": []}}).encode()
    return damaged(chance, json.dumps(good).encode())


async def concurrently(work: Callable[[random.Random, int], Any], seed: int) -> None:
    """Run ``work`` ten thousand times in concurrent tasks; each gets its task's number."""

    async def share(number: int) -> None:
        chance = random.Random(seed * AT_ONCE + number)
        for _ in range(COUNT // AT_ONCE):
            await work(chance, number)

    await asyncio.gather(*(share(number) for number in range(AT_ONCE)))


async def test_hook_socket(lab: Lab) -> None:
    path = str(lab.hosts["host1"].agent_socket)
    good = f"qemu 1 started begin 1 1 {len(XML)}\nx-{XML}".encode()

    async def call(chance: random.Random, number: int) -> None:
        message = damaged(chance, good) if chance.random() < 0.7 else junk(chance)
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(message)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 30)
            # What only spoilt the name, which may be anything, is a good request of a VM without interfaces.
            assert answer.startswith((b"error ", b"ok no interface of ours")), (message[:200], answer)
            assert answer.endswith(b"\n")
        except ConnectionError:
            pass  # it answered and went before it had read all of it
        finally:
            writer.close()

    await concurrently(call, 1)


async def test_operators_socket(lab: Lab) -> None:
    paths = ["/v1/domains", "/v1/whois", "/v1/pool", "/v1/nodes", "/v1/events", "/v1/status", "/metrics", "/v1/session"]
    connector = aiohttp.UnixConnector(path=str(lab.socket), limit=AT_ONCE)
    async with aiohttp.ClientSession("http://cpmd", connector=connector) as session:

        async def ask(chance: random.Random, number: int) -> None:
            way = chance.randrange(5)
            if way == 0:
                request = session.post("/v1/pool", data=wrong_pool(chance))
            elif way == 1:
                word = "".join(chance.choices(string.punctuation + string.ascii_letters + "\u00e9\u4e2d", k=9))
                noun = chance.choice(["domains", "nodes", "pool", "x"])
                request = session.request(
                    chance.choice(["GET", "PUT", "PATCH"]),
                    f"/v1/{noun}/" + word.replace("/", "%2F").replace("?", "").replace("#", ""),
                )
            elif way == 2:
                query = {
                    "address": str(invalid_value(chance)),
                    "port": str(invalid_value(chance)),
                    "at": chance.choice(["nan", "inf", "-1e400", "x"]),
                }
                request = session.get("/v1/whois", params=query)
            elif way == 3:
                request = session.get("/v1/events", params={"limit": chance.choice(["-1", "1e9", "x", "9" * 400])})
            else:
                request = session.request(
                    chance.choice(["PUT", "PATCH", "DELETE", "POST"]),
                    chance.choice(paths),
                    data=damaged(chance, b'{"addresses": []}'),
                )
            async with request as response:
                body = await response.read()
                assert 400 <= response.status < 500, (response.url, response.status, body[:300])
                error = json.loads(body)
                assert error["code"]
                assert error["message"]

        await concurrently(ask, 2)


def wrong_pool(chance: random.Random) -> bytes:
    good: dict[str, Any] = {"addresses": ["203.0.113.9"], "reserved": [{"first": 5000, "last": 5001}]}
    if chance.random() < 0.5:
        return damaged(chance, json.dumps(good).encode())
    key = chance.choice(list(good))
    return json.dumps(good | {key: chance.choice([1, "x", [1], [{}], {"a": 1}, [["203.0.113.9"]]])}).encode()


def test_operators_socket_with_what_is_not_http(lab: Lab) -> None:
    chance = random.Random(3)
    for _ in range(COUNT // 10):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(30)
            raw.connect(str(lab.socket))
            try:
                raw.sendall(junk(chance) + b"\r\n\r\n")
                raw.shutdown(socket.SHUT_WR)
                answer = raw.recv(65536)
            except ConnectionError:
                continue
            assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer


async def test_node_sessions(lab: Lab) -> None:
    for number in range(AT_ONCE):
        name = f"{NOISE}{number}"
        lab.operate("node", "approve", name, "--role", "host", "--underlay", f"172.30.0.{100 + number}")
    connector = aiohttp.UnixConnector(path=str(lab.socket), limit=0)
    async with aiohttp.ClientSession("http://cpmd", connector=connector) as session:

        async def say(chance: random.Random, number: int) -> None:
            async with session.ws_connect("/v1/session", timeout=aiohttp.ClientWSTimeout(ws_close=30)) as node:
                if chance.random() < 0.1:
                    mine = {"node": f"{NOISE}{number}", "underlay": f"172.30.0.{100 + number}"}
                    await node.send_str(json.dumps(HELLO | mine))
                await node.send_bytes(wrong_node_message(chance))
                while (message := await node.receive(30)).type is aiohttp.WSMsgType.BINARY:
                    assert json.loads(message.data)["type"] in {"welcome", "snapshot", "delta"}
                assert node.close_code == 1008, (message, node.close_code)
                assert message.extra

        await concurrently(say, 4)


async def test_tls_door_without_certificate(lab: Lab) -> None:
    done = lab.run(
        "host1", "python3", "-c",
        "import socket\n"
        "for n in range(200):\n"
        "    s = socket.create_connection(('172.30.0.2', 7414), 10)\n"
        "    s.sendall(bytes([n % 256]) * (n * 13 + 1))\n"
        "    s.shutdown(socket.SHUT_WR)\n"
        "    try:\n"
        "        while s.recv(4096): pass\n"
        "    except ConnectionError: pass\n"
        "    s.close()\n"
        "print('done')",
    )  # fmt: skip
    assert done == "done\n"
