"""
The time that an operator waits for ``virt-ports list`` with 1,000 VMs, compared with a Python that does nothing.

The real manager with 1,000 VMs of :mod:`bench.tick` behind the real server on a unix socket, which runs in a thread of
this process; the command is a process of its own, with this interpreter, in an environment like that of the Debian
package, by the script that the package has: the import hook of a developer's ``pip install -e``, which takes longer
than Python to start, is not in it. It is started alternately with bare Python, in the same way.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import venv
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from bench.figures import Measured, median, paired_ratio
from bench.hook import BARE_PYTHON
from bench.tick import Fleet
from bench.worker import spawn_ms
from cpm.api import handlers, server
from cpm.api.access import Access, Peer
from cpm.api.operations import Operation
from cpm.api.server import NodeConnection
from cpm.protocol.errors import VirtPortsError
from cpm.protocol.messages import Hello, NodeMessage
from cpm.protocol.model import NodeName
from cpm.queries import vms  # noqa: F401 - registers what answers

VMS: Final = 1000
RUNS: Final = 30
WARM_UP: Final = 3
SCRIPT: Final = """\
# -*- coding: utf-8 -*-
import sys
from cpm.cli.main import main
if __name__ == '__main__':
    sys.exit(main())
"""
"""What debian/rules leaves of the script that pip makes, below its first line."""


def measure(say: Callable[[str], None]) -> Measured:
    """Measure."""
    fleet = Fleet(VMS)
    fleet.pass_ms()
    with tempfile.TemporaryDirectory(prefix="bench-cli-") as folder:
        path = Path(folder) / "cpmd.sock"
        loop = asyncio.new_event_loop()
        serving = threading.Thread(target=loop.run_forever, name="server")
        serving.start()
        real = server.Server(_Answers(fleet), _NoNodes())
        try:
            asyncio.run_coroutine_threadsafe(real.listen_unix(path, Access()), loop).result()
            runs = _runs(path, _environment(Path(folder) / "environment"))
        finally:
            asyncio.run_coroutine_threadsafe(real.stop(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            serving.join()
            loop.close()
    say(f"list {median(runs['cli_list_ms']):.0f} ms, bare python {median(runs['cli_python_ms']):.1f} ms")
    return Measured({"cli_ratio": paired_ratio(runs["cli_list_ms"], runs["cli_python_ms"])}, runs)


def _environment(folder: Path) -> str:
    """Make a virtual environment with the libraries of this one and the code of this tree; return the command."""
    venv.EnvBuilder(symlinks=True).create(folder)
    [packages] = (folder / "lib").glob("python3*/site-packages")
    found = [Path(__file__).parents[1], *(path for path in sys.path if path.endswith("site-packages"))]
    (packages / "bench.pth").write_text("".join(f"{path}\n" for path in found))
    command = folder / "bin/virt-ports"
    command.write_text(f"#!{folder}/bin/python\n{SCRIPT}")
    command.chmod(0o755)
    return str(command)


def _runs(path: Path, virt_ports: str) -> dict[str, list[float]]:
    runs: dict[str, list[float]] = {"cli_list_ms": [], "cli_python_ms": []}
    command = [virt_ports, "--socket", str(path), "list"]
    environment = {"PATH": os.environ["PATH"]}
    for _ in range(WARM_UP + RUNS):
        runs["cli_list_ms"].append(spawn_ms(command, "", environment))
        runs["cli_python_ms"].append(spawn_ms(BARE_PYTHON, "", environment))
    return {name: values[WARM_UP:] for name, values in runs.items()}


class _Answers:
    """Answers queries about a fleet, with the product's own functions."""

    def __init__(self, fleet: Fleet) -> None:
        self._available = {"manager": fleet.manager, "now": fleet.now}

    async def answer(self, operation: Operation[Any], arguments: Mapping[str, Any], peer: Peer) -> object:
        """Return the answer."""
        return handlers.registered(operation).call({**self._available, **arguments})

    def stream(self, operation: Operation[Any], arguments: Mapping[str, Any]) -> AsyncIterator[object]:
        """Refuse: nothing is streamed here."""
        raise NotImplementedError


class _NoNodes:
    """There are no nodes' sessions."""

    async def on_connected(self, hello: Hello, connection: NodeConnection) -> None: ...

    async def on_message(self, node: NodeName, connection: NodeConnection, message: NodeMessage) -> None: ...

    def on_fault(self, node: NodeName, error: VirtPortsError) -> None: ...

    async def on_disconnected(self, node: NodeName, connection: NodeConnection) -> None: ...
