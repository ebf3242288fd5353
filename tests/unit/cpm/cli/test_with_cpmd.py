"""The command line against a real cpmd in its own process, and a node that confirms everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from cpm.protocol.messages import (
    Attach,
    Detach,
    Measured,
    Report,
)
from cpm.protocol.model import DomainUUID, Wishes
from tests.fakes.cpmd import Node, connected_node
from tests.unit.cpm.cli.conftest import DB, WEB, Result

_PATIENCE_S = 60.0


class Manager(NamedTuple):
    process: subprocess.Popen[bytes]
    socket_path: str


@pytest.fixture
def cpmd() -> Iterator[Manager]:
    """Start cpmd and wait for READY=1."""
    directory = Path(tempfile.mkdtemp(prefix="vpt-"))
    path, config = str(directory / "cpmd.sock"), directory / "cpmd.toml"
    config.write_text(f'[listen]\nsocket = "{path}"\n[ledger]\npath = "{directory / "ledger.db"}"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(directory / "notify"))
        ready.settimeout(_PATIENCE_S)
        process = subprocess.Popen(
            [sys.executable, "-m", "cpm.daemon", "--config", str(config)],
            env={**os.environ, "NOTIFY_SOCKET": str(directory / "notify")},
        )
        try:
            assert ready.recv(4096).startswith(b"READY=1")
            yield Manager(process, path)
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(directory)


async def virt_ports(cpmd: Manager, *words: str) -> Result:
    process = await _start(cpmd, *words)
    out, err = await asyncio.wait_for(process.communicate(), _PATIENCE_S)
    assert process.returncode is not None
    return Result(process.returncode, out.decode(), err.decode())


async def _start(cpmd: Manager, *words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cpm.cli.main", *words, env={**os.environ, "VIRT_PORTS_SOCKET": cpmd.socket_path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def connected(cpmd: Manager, name: str) -> AsyncIterator[Node]:
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(cpmd.socket_path)) as http,
        connected_node(http, name, "172.30.0.11") as node,
    ):
        yield node


class Follower:
    """``virt-ports events --follow``, by which the test waits for events."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def until(self, event: str, uuid: DomainUUID) -> dict[str, Any]:
        assert self.process.stdout is not None
        while True:
            line = await asyncio.wait_for(self.process.stdout.readline(), _PATIENCE_S)
            assert line, "the stream ended"
            seen: dict[str, Any] = json.loads(line)
            if (seen["event"], seen["uuid"]) == (event, uuid):
                return seen


async def test_every_verb_follows_the_life_of_a_vm(cpmd: Manager) -> None:
    added = await virt_ports(cpmd, "pool", "add", "203.0.113.1", "--reserved", "5060", "-o", "json")
    assert [address["reserved"] for address in added.json] == [[{"first": 5060, "last": 5060}]]
    assert added.json[0]["ports_total"] == 65535 - 1024  # 1024-65535 without 5060
    follower = Follower(await _start(cpmd, "events", "--follow", "-o", "json"))

    async with connected(cpmd, "host1") as node:
        await node.say(Attach(WEB, "web1"))
        active = await follower.until("active", WEB)
        measured = Measured(WEB, packets_per_s=500.0, megabits_per_s=10.0, ports_in_use=17)
        await node.say(Report(node.generation, 1.0, (measured,)))
        await node.say(Attach(DB, "db"))
        await follower.until("active", DB)
        await _sees(cpmd, active)
        await _is_refused(cpmd, active)

        await _moves_and_changes_size(cpmd, follower)
        await _says_what_it_shall_have(cpmd, node)

        await node.say(Detach(WEB, "shutdown"))
        await follower.until("held", WEB)
        assert [vm["name"] for vm in (await virt_ports(cpmd, "list", "-o", "json")).json] == ["db"]
        everything = (await virt_ports(cpmd, "list", "--all", "-o", "json")).json
        assert {vm["name"]: vm["state"] for vm in everything} == {"db": "active", "web1": "gone"}
        entries = (await virt_ports(cpmd, "history", "web1", "-o", "json")).json
        assert [line["event"] for line in entries][:2] == ["reserved", "active"]
        assert entries[-1]["event"] == "held"

    cpmd.process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(follower.process.communicate(), _PATIENCE_S)
    assert follower.process.returncode == 3
    assert json.loads(err)["code"] == "unreachable"
    assert cpmd.process.wait(_PATIENCE_S) == 0
    gone = await virt_ports(cpmd, "list")
    assert (gone.code, gone.out) == (3, "")


async def test_record_writes_the_reports_of_hosts(cpmd: Manager) -> None:
    await virt_ports(cpmd, "pool", "add", "203.0.113.1")
    recording = await _start(cpmd, "record", "-")
    assert recording.stdout is not None
    assert (await recording.stdout.readline()).startswith(b"# virt-ports trace 1")
    assert await recording.stdout.readline() == b"time,vm,opened,closed,packets,bytes\n"
    async with connected(cpmd, "host1") as node:
        await node.say(Attach(WEB, "web1"))
        measured = Measured(WEB, packets_per_s=500.0, megabits_per_s=8.0, ports_in_use=17, new_connections_per_s=3.0)
        line = asyncio.create_task(recording.stdout.readline())
        # Report until the recording, which begins at an unknown moment, has received one.
        while not (await asyncio.wait({line}, timeout=0.1))[0]:
            await node.say(Report(node.generation, 1.0, (measured,)))
        assert line.result() == b"0,web1,17,0,500,1000000\n"
        await node.say(Report(node.generation, 1.0, (measured,)))
        again = await asyncio.wait_for(recording.stdout.readline(), _PATIENCE_S)
        assert again.split(b",", 1)[1] in (b"web1,3,3,500,1000000\n", b"web1,17,0,500,1000000\n")
        recording.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(recording.communicate(), _PATIENCE_S)
        assert recording.returncode == 0
        assert b"lines of 1 VMs" in err


async def _sees(cpmd: Manager, active: dict[str, Any]) -> None:
    """All verbs show the same facts about a running VM."""
    web = next(vm for vm in (await virt_ports(cpmd, "list", "-o", "json")).json if vm["name"] == "web1")
    place = {key: active[key] for key in ("external_address", "first_port", "last_port")}
    assert web == {
        "name": "web1", "uuid": WEB, "node": "host1", "state": "active", "problem": "", "ports_in_use": 17,
        "leaving": "", "ports_held": 256, "cap": 32768,
        **place,
    }  # fmt: skip
    shown = (await virt_ports(cpmd, "show", WEB.upper(), "-o", "json")).json
    assert {**shown, **web} == shown
    assert [(each["first_port"], each["state"]) for each in shown["allocations"]] == [(web["first_port"], "active")]
    owner = (
        await virt_ports(cpmd, "whois", "203.0.113.1", str(web["last_port"]), "--protocol", "tcp", "-o", "json")
    ).json
    assert (owner["name"], owner["uuid"], owner["state"]) == ("web1", WEB, "active")
    (node,) = (await virt_ports(cpmd, "node", "list", "-o", "json")).json
    assert (node["name"], node["roles"], node["connected"], node["domains"]) == ("host1", ["edge", "host"], True, 2)
    status = (await virt_ports(cpmd, "status", "-o", "json")).json
    assert (status["domains"], status["nodes"], status["nodes_connected"]) == (2, 1, 1)
    table = (await virt_ports(cpmd, "list")).out.splitlines()
    assert [line.split()[0] for line in table[2:-1]] == ["db", "web1"]


async def _moves_and_changes_size(cpmd: Manager, follower: Follower) -> None:
    """A change is decided at once, and done once the node has confirmed it."""
    moved = (await virt_ports(cpmd, "relocate", "web1", "-o", "json")).json
    assert sorted(each["state"] for each in moved["allocations"]) == ["active", "reserved"]
    here = await follower.until("active", WEB)
    grown = (await virt_ports(cpmd, "resize", "web1", "300", "-o", "json")).json["allocations"]
    # Rounded to whole blocks, in place: only the new ports are reserved.
    assert (64, "reserved") in [(each["last_port"] - each["first_port"] + 1, each["state"]) for each in grown]
    there = await follower.until("resized", WEB)
    assert (there["first_port"], there["last_port"]) == (here["first_port"], here["last_port"] + 64)


async def _says_what_it_shall_have(cpmd: Manager, node: Node) -> None:
    """The XML takes precedence over `set`, and that over the pool; `show` and `explain` print the origin."""
    await node.say(Attach(WEB, "web1", wishes=Wishes(cap=4096, nonsense=("weight 'x': it is not a whole number",))))
    shown = (await virt_ports(cpmd, "set", "web1", "floor=128", "cap=512", "drain-limit=none", "-o", "json")).json
    assert {wish["key"]: (wish["value"], wish["origin"]) for wish in shown["wishes"]} == {
        "floor": (128, "set"),
        "cap": (4096, "metadata"),
        "weight": (100, "pool"),
        "policy": ("specification", "pool"),
        "drain-limit": (None, "set"),
        "connections": (65536, "pool"),
        "connection-rate": (1000, "pool"),
        "filtering": ("address-and-port-dependent", "pool"),
        "pcp": (0, "pool"),
        "pool": ("default", "pool"),
        "address": (None, "pool"),
    }
    assert "Ignored:" in (await virt_ports(cpmd, "show", "web1")).out
    unset = (await virt_ports(cpmd, "set", "web1", "--unset", "floor", "-o", "json")).json
    assert (unset["floor"], unset["cap"]) == (64, 4096)
    refused = await virt_ports(cpmd, "set", "web1", "floor=9", "cap=8")
    assert (refused.code, refused.err) == (2, "error: floor 9 is above cap 8; lower the floor or raise the cap\n")
    explained = await virt_ports(cpmd, "explain", "web1")
    assert explained.out.startswith("web1 has ")
    assert "cap 4096 (metadata)" in explained.out
    whole = (await virt_ports(cpmd, "explain", "web1", "-o", "json")).json
    assert (whole["asked"], whole["pool_short"]) == (256, False)
    assert [holder["name"] for holder in whole["holders"]] == ["web1", "db"]


async def _is_refused(cpmd: Manager, active: dict[str, Any]) -> None:
    """An impossible request has its exit code and the sentence of the manager, and changes nothing."""
    for words, sentence in (
        (("show", "web2"), "error: no VM 'web2'; "),
        (("history", "web2"), "error: no VM 'web2'; "),
        (("whois", "203.0.113.1", "65535"), "error: no VM that held '203.0.113.1 port 65535'; "),
        (("whois", "203.0.113.1", str(active["first_port"]), "--at", "-1d"), "error: no VM that held "),
        (("resize", "web2", "64"), "error: no VM 'web2'; "),
        (("relocate", "web2"), "error: no VM 'web2'; "),
        (("pool", "remove", "203.0.113.1"), "error: cannot remove 203.0.113.1: "),
        (("pool", "remove", "203.0.113.9"), "error: no "),
        (("node", "fence", "host1"), "error: host1 is connected"),
        (("node", "fence", "host9"), "error: no node 'host9'; see `virt-ports node list`"),
    ):
        refused = await virt_ports(cpmd, *words)
        assert (refused.code, refused.out) == (1, ""), words
        assert refused.err.startswith(sentence), words


async def test_a_running_manager_follows_its_file(cpmd: Manager) -> None:
    file = Path(cpmd.socket_path).parent / "cpmd.toml"
    text = file.read_text()
    file.write_text(f"{text}[pool]\ninitial = 512\nblock = 128\n")
    differing = await virt_ports(cpmd, "config", "diff", "-o", "json")
    assert [(each["key"], each["needs_restart"]) for each in differing.json["changes"]] == [
        ("pool.block", True),
        ("pool.initial", False),
    ]
    followed = await virt_ports(cpmd, "config", "reload", "--yes")
    assert followed.out == "in force now: pool.initial\nafter `systemctl restart cpmd`: pool.block\n"
    (act,) = (await virt_ports(cpmd, "audit", "-o", "json")).json
    assert act["request"] == "POST /v1/settings/reload"

    file.write_text("[pool")
    cpmd.process.send_signal(signal.SIGHUP)  # as `systemctl reload` does
    wrong = await virt_ports(cpmd, "config", "diff")
    assert (wrong.code, "not TOML" in wrong.err) == (1, True)
    file.write_text(f"{text}[pool]\ninitial = 1024\n")
    cpmd.process.send_signal(signal.SIGHUP)
    async with asyncio.timeout(_PATIENCE_S):
        while (await virt_ports(cpmd, "config", "diff", "-o", "json")).json["changes"]:
            await asyncio.sleep(0.05)
