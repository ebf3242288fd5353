"""coturn's STUN server and its ``turnutils_natdiscovery`` (RFC 5780), each in some namespace."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.netns.waiting import wait_until

IS_INSTALLED = shutil.which("turnutils_natdiscovery") is not None
OPEN = {"Endpoint Independent Mapping", "Endpoint Independent Filtering", "hairpinning"}
"""What a full-cone VM is to be, in the program's words."""
CLOSED = {"Endpoint Independent Mapping", "Address and Port Dependent Filtering"}


@contextlib.contextmanager
def stun_server(enter: Sequence[str], addresses: Sequence[str], folder: Path) -> Iterator[None]:
    """
    Run a STUN server with the two addresses that discovery needs.

    :param enter: Words that put a command where the server shall run.
    """
    words = ["turnserver", "-n", "--stun-only", "--no-cli", "-m", "1", "--log-file", "stdout"]
    words += [word for address in addresses for word in ("-L", address)]
    words += ["--pidfile", str(folder / "pid"), "--db", str(folder / "db")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*enter, *words], stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: _run([*enter, "ss", "-Hlun"]).count(":3478") >= len(addresses))
            yield
        finally:
            server.terminate()
            server.wait()


def discovered(enter: Sequence[str], server: str) -> set[str]:
    """Return what the program finds of the NAT before the place where it runs, in its own words."""
    found = set()
    for option in ("-m", "-f", "-H"):
        said = _run([*enter, "turnutils_natdiscovery", option, server])
        lines = (line for line in said.splitlines() if line.startswith("NAT with "))
        found |= {line.removeprefix("NAT with ").rstrip("!") for line in lines}
        found |= {"hairpinning"} if "Received a request (maybe a successful hairpinning)" in said else set()
    return found


def _run(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout
