"""A real Prometheus scrapes a real cpmd, and our alerts are raised there and clear: on loopback, without root."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cpm.protocol.messages import Attach
from cpm.protocol.model import DomainUUID
from tests.fakes.cpmd import connected_node
from tests.promtool import PROMETHEUS
from tests.unit.monitoring.test_alerts import RULES

PATIENCE_S = 90.0
VM = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vpt-"))
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def running(argv: list[str | Path], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def running_cpmd(directory: Path, port: int) -> Iterator[str]:
    """Yield the path of its socket."""
    path, config = str(directory / "cpmd.sock"), directory / "cpmd.toml"
    config.write_text(
        f'[listen]\nsocket = "{path}"\n[ledger]\npath = "{directory / "ledger.db"}"\n'
        f'[metrics]\naddress = "127.0.0.1:{port}"\n'
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(directory / "notify"))
        ready.settimeout(PATIENCE_S)
        argv: list[str | Path] = [sys.executable, "-m", "cpm.daemon", "--config", config]
        with running(argv, directory / "cpmd.log", NOTIFY_SOCKET=str(directory / "notify")):
            assert ready.recv(4096).startswith(b"READY=1")
            yield path


class Prometheus:
    """A Prometheus; the alerts that it has now."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url

    async def alerts(self) -> dict[str, dict[str, Any]]:
        try:
            async with self._http.get(f"{self._url}/api/v1/alerts") as answer:
                alerts = (await answer.json())["data"]["alerts"] if answer.status == 200 else []
        except aiohttp.ClientError:
            alerts = []
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}

    async def value(self, expression: str) -> float | None:
        async with self._http.get(f"{self._url}/api/v1/query", params={"query": expression}) as answer:
            found = (await answer.json())["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    async def until(self, name: str, *, is_raised: bool) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            while (name in (alerts := await self.alerts())) is not is_raised:
                await asyncio.sleep(0.2)
        return alerts.get(name, {})


@contextlib.asynccontextmanager
async def running_prometheus(directory: Path, target: int) -> AsyncIterator[Prometheus]:
    """Run one that scrapes every second, with our rules, whose waiting times are shortened."""
    rules = re.sub(r"^( +for:) .*$", r"\1 1s", RULES.read_text(), flags=re.M)
    (directory / "rules.yaml").write_text(rules)
    (directory / "prometheus.yaml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        "rule_files: [rules.yaml]\n"
        "scrape_configs:\n"
        f'  - {{job_name: cpmd, static_configs: [{{targets: ["127.0.0.1:{target}"]}}]}}\n'
    )
    port = free_port()
    argv: list[str | Path] = [
        PROMETHEUS,
        f"--config.file={directory / 'prometheus.yaml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with running(argv, directory / "prometheus.log"):
        async with aiohttp.ClientSession() as http:
            yield Prometheus(http, f"http://127.0.0.1:{port}")


@pytest.mark.timeout(400)
async def test_alerts_are_raised_and_clear(directory: Path) -> None:
    port = free_port()
    async with running_prometheus(directory, port) as prometheus:
        await prometheus.until("VirtPortsManagerDown", is_raised=True)
        with running_cpmd(directory, port) as path:
            await prometheus.until("VirtPortsManagerDown", is_raised=False)
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as http:
                await _lacks_ports(prometheus, http)
                await _goes_away(prometheus, http)
            assert await prometheus.value("up") == 1
            assert await prometheus.value("process_resident_memory_bytes") is not None


async def _lacks_ports(prometheus: Prometheus, http: aiohttp.ClientSession) -> None:
    """A VM starts while there is no address; then one is added."""
    async with connected_node(http, "host1", "172.30.0.11") as node:
        await node.say(Attach(VM, "web1"))
        raised = await prometheus.until("VirtPortsDomainsLackPorts", is_raised=True)
        assert raised["labels"]["severity"] == "critical"
        assert raised["annotations"]["summary"] == "1 VMs do not get the ports that they want"
        async with http.post("http://localhost/v1/pool", data=b'{"addresses":["203.0.113.1"]}') as answer:
            assert answer.status == 200
        await prometheus.until("VirtPortsDomainsLackPorts", is_raised=False)
        assert await prometheus.value('virt_ports_domain_range_ports{name="web1"}') == 256


async def _goes_away(prometheus: Prometheus, http: aiohttp.ClientSession) -> None:
    """The node was away since its session ended; the operator fences it, and it comes back."""
    raised = await prometheus.until("VirtPortsNodeAway", is_raised=True)
    assert raised["labels"]["node"] == "host1"
    async with http.post("http://localhost/v1/nodes/host1/fence") as answer:
        assert answer.status == 200, await answer.text()
    await prometheus.until("VirtPortsNodeFenced", is_raised=True)
    await prometheus.until("VirtPortsNodeAway", is_raised=False)
    async with connected_node(http, "host1", "172.30.0.11"):
        await prometheus.until("VirtPortsNodeFenced", is_raised=False)
