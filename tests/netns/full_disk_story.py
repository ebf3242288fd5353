"""
What happens to cpmd when the file system of its ledger is full: ``python -m tests.netns.full_disk_story DIRECTORY``.

Prints one JSON object; ``test_cpmd_disk_full.py`` judges it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import sys
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import aiohttp

from cpm import settings
from cpm.daemon import Cpmd
from cpm.protocol import codec
from cpm.protocol.messages import PROTOCOL, Applied, Attach, Delta, Hello, ManagerMessage, Refused, Snapshot, Welcome
from cpm.protocol.model import DomainUUID, NodeName, Role

WEB, DB, LATE = (DomainUUID(f"00000000-0000-0000-0000-00000000000{n}") for n in "123")
PATIENCE_S = 60.0


class Node:
    """A host and edge whose kernel accepts everything at once."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.got: list[ManagerMessage] = []
        self._news = asyncio.Event()

    async def start(self, uuid: DomainUUID) -> None:
        await self.socket.send_bytes(codec.encode(Attach(uuid, f"vm-{uuid[-1]}")))

    async def listen(self) -> None:
        async for frame in self.socket:
            message = codec.decode_manager_message(frame.data)
            self.got.append(message)
            if isinstance(message, (Snapshot, Delta)):
                await self.socket.send_bytes(codec.encode(Applied(message.epoch, message.generation)))
            self._news.set()

    async def refusal(self, uuid: DomainUUID) -> Refused:
        while True:
            for message in self.got:
                if isinstance(message, Refused) and message.domain == uuid:
                    return message
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), PATIENCE_S)


class Site:
    """cpmd, as its operator sees it."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def ask(self, method: str, target: str, body: object = None) -> tuple[int, Any]:
        async with self._http.request(method, f"http://localhost{target}", json=body) as answer:
            return answer.status, json.loads(await answer.text())

    async def add(self, address: str) -> tuple[int, str]:
        status, answer = await self.ask("POST", "/v1/pool", {"addresses": [address]})
        return status, answer["code"] if status >= 400 else ""

    async def until(self, target: str, key: str, value: object) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while (await self.ask("GET", target))[1].get(key) != value:
                await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def node(self) -> AsyncIterator[Node]:
        async with self._http.ws_connect("http://localhost/v1/session") as socket:
            node = Node(socket)
            hello = Hello(PROTOCOL, NodeName("one"), frozenset(Role), IPv4Address("172.30.0.11"), "0", 0, ())
            await socket.send_bytes(codec.encode(hello))
            listening = asyncio.create_task(node.listen())
            yield node
            await socket.close()
            await listening


def fill(ballast: Path) -> None:
    """Use up the file system."""
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def tell(directory: Path) -> dict[str, object]:
    """Fill the file system, try everything, make room again; return what was seen."""
    socket, ballast = directory / "cpmd.sock", directory / "ballast"
    ledger = settings.LedgerSettings(path=str(directory / "ledger.db"))
    cpmd = Cpmd(settings.Settings(listen=settings.ListenSettings(socket=str(socket)), ledger=ledger))
    await cpmd.start()
    seen: dict[str, object] = {}
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as http:
        site = Site(http)
        await site.add("203.0.113.1")
        await site.ask("PUT", "/v1/nodes/one/approval", {"roles": ["edge", "host"], "underlay": "172.30.0.11"})
        async with site.node() as node:
            await node.start(WEB)
            await _active(site, "vm-1")
            fill(ballast)
            # The last pages of the log may be there already.
            for _ in range(100):
                status = await site.add("203.0.113.2")
                if status[0] != 200:
                    break
                await site.ask("POST", "/v1/pool/remove", {"addresses": ["203.0.113.2"]})
            seen["change"] = status
            await node.start(DB)
            refused = await node.refusal(DB)
            seen["start"] = refused.code, "free space on the filesystem of" in refused.message
            _, answer = await site.ask("GET", "/v1/status")
            seen["status"] = "free space on the filesystem of" in answer["ledger_problem"]
            seen["old"] = (await site.ask("GET", "/v1/domains/vm-1"))[1]["domain"]["state"]
            ballast.unlink()
            await site.until("/v1/status", "ledger_problem", "")
            seen["later"] = (await _active(site, "vm-2"))["state"]
            seen["change later"] = await site.add("203.0.113.3")
            with contextlib.closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                await node.start(LATE)
                seen["while locked"] = (await node.refusal(LATE)).code
            seen["unlocked"] = (await _active(site, "vm-3"))["state"]
            seen["sessions"] = sum(isinstance(message, Welcome) for message in node.got), node.socket.closed
    await cpmd.stop()
    return seen


async def _active(site: Site, name: str) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status, answer = await site.ask("GET", f"/v1/domains/{name}")
            if status == 200 and answer["domain"]["state"] == "active":
                return answer["domain"]
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(tell(Path(sys.argv[1])))))
