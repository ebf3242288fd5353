"""What a real natd tells Prometheus of a real kernel: connected, programmed, mended after others flushed its tables."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.private_namespace import private_namespace, run
from tests.promtool import check_metrics

pytestmark = pytest.mark.netns

PATIENCE_S = 60.0


@contextlib.contextmanager
def daemon(program: str, directory: Path, settings: str) -> Iterator[None]:
    """Run one, from its READY=1 on."""
    (directory / f"{program}.toml").write_text(settings)
    module = {"cpmd": "cpm.daemon", "natd": "natctl.daemon"}[program]
    argv: list[str | Path] = [sys.executable, "-m", module, "--config", directory / f"{program}.toml"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (directory / f"{program}.log").open("wb") as log:
        ready.bind(str(directory / f"{program}.notify"))
        ready.settimeout(PATIENCE_S)
        environment = {**os.environ, "NOTIFY_SOCKET": str(directory / f"{program}.notify")}
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
        try:
            assert ready.recv(4096).startswith(b"READY=1"), (directory / f"{program}.log").read_text()
            yield
        finally:
            process.terminate()
            process.wait(30)


def scrape(port: int) -> str:
    end = time.monotonic() + PATIENCE_S
    while True:
        # A daemon is ready before it listens for Prometheus.
        with contextlib.suppress(urllib.error.URLError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
                text: str = answer.read().decode()
            return text
        assert time.monotonic() < end
        time.sleep(0.05)


def value(port: int, series: str) -> float:
    found = re.findall(rf"^{re.escape(series)} (\S+)$", scrape(port), re.M)
    return float(found[0]) if found else 0.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vpt-"))
    yield path
    shutil.rmtree(path)


def test_natd_tells_what_happens_in_its_kernel(directory: Path) -> None:
    cpmd = (
        f'[listen]\nsocket = "{directory}/cpmd.sock"\n[ledger]\npath = "{directory}/ledger.db"\n'
        '[metrics]\naddress = "127.0.0.1:9417"\n'
    )
    natd = (
        f'underlay_address = "172.30.0.11"\nname = "host1"\nstate = "{directory}/state"\n'
        f'[manager]\nurl = "unix://{directory}/cpmd.sock"\n[listen]\nsocket = "{directory}/natd.sock"\n'
        '[host]\nuplinks = ["up0"]\nlibvirt = ""\n[edge]\nuplinks = ["up0"]\n[monitor]\nensure_s = 0.5\n'
        '[metrics]\naddress = "127.0.0.1:9418"\n'
    )
    with private_namespace():
        run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "far0")
        run("ip", "addr", "add", "172.30.0.11/24", "dev", "up0")
        run("ip", "link", "set", "up0", "up")
        with daemon("cpmd", directory, cpmd), daemon("natd", directory, natd):
            # Nobody has approved it: it is refused as soon as it has said who it is.
            until(lambda: value(9418, "virt_ports_natd_manager_connected") == 0)
            machine = ["--role", "host", "--role", "edge", "--underlay", "172.30.0.11"]
            words = ["node", "approve", "host1", *machine, "--socket", str(directory / "cpmd.sock")]
            run(sys.executable, "-m", "cpm.cli.main", *words)
            until(lambda: value(9418, "virt_ports_natd_manager_connected") == 1)
            until(lambda: value(9418, 'virt_ports_natd_programming_seconds_count{of="all"}') >= 1)
            until(lambda: value(9417, 'virt_ports_node_connected{node="host1"}') == 1)
            assert value(9418, "virt_ports_natd_conntrack_entries_limit") > 0
            before = value(9418, "virt_ports_natd_kernel_repairs_total")
            run("nft", "flush", "ruleset")
            until(lambda: value(9418, "virt_ports_natd_kernel_repairs_total") > before)
            assert "virtports" in run("nft", "list", "tables"), "it was mended"
            assert check_metrics(scrape(9418)) == ""
            assert check_metrics(scrape(9417)) == ""
