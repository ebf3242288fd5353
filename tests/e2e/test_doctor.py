"""The doctor on whole sites: it finds nothing on a healthy one, and what is broken on purpose."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest

from lab.daemons import CPMD, PROGRAMS, natd_of
from lab.lab import Lab
from lab.node import HOOK
from lab.sites import CLUSTER, SINGLE
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import eventually, facts

pytestmark = pytest.mark.e2e

SERVER = "server"
OF_THE_MACHINE_UNDER_IT = {"clock"}
"""Whether a time service runs is a matter of the machine that runs the tests."""
FINE = ("ok", "not applicable")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("d"), site=SINGLE) as site:
        yield site


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    with running(unique_name("e"), site=CLUSTER) as site:
        yield site


def command(site: Lab, node: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    sources = ["--natd-config", str(site.daemons.configuration(natd_of(node)))]
    sources += ["--socket", str(site.socket if node == site.site.manager.name else site.state / "none.sock")]
    cpmd = site.daemons.configuration(CPMD) if node == site.site.manager.name else site.state / "none.toml"
    argv = site.command(node, PROGRAMS / "virt-ports", *words, *sources, "--cpmd-config", str(cpmd))
    return subprocess.run(argv, capture_output=True, check=False)


def findings(site: Lab, node: str) -> dict[str, dict[str, Any]]:
    """Return what the doctor finds on a machine; its exit code must fit."""
    done = command(site, node, "doctor", "-o", "json")
    document = json.loads(done.stdout or b"null")
    assert document is not None, done.stderr.decode()
    codes = {"ok": 0, "warning": 1, "could not tell": 1, "problem": 2}
    assert done.returncode == codes[document["result"]]
    return {each["check"]: each for each in document["findings"]}


def trouble(site: Lab, node: str) -> dict[str, dict[str, Any]]:
    return {
        name: each for name, each in findings(site, node).items()
        if each["result"] not in FINE and name not in OF_THE_MACHINE_UNDER_IT
    }  # fmt: skip


def test_nothing_is_wrong_with_a_healthy_server(lab: Lab) -> None:
    lab.add_guest("a", SERVER)
    try:
        assert trouble(lab, SERVER) == {}
        found = findings(lab, SERVER)
        made = ("hook", "hook-runs", "hook-rights", "daemons", "libvirt", "manager", "nodes", "ways", "ruleset",
                "forward-filters", "conntrack", "permissions", "disk", "pool-address")  # fmt: skip
        assert {name: found[name]["result"] for name in made} == dict.fromkeys(made, "ok")
        assert found["pool-address"]["facts"]["own"] == ["203.0.113.2"]
        (node,) = facts(lab, "node", "list")
        assert node["version"] == found["versions"]["facts"]["cpmd"] == found["versions"]["facts"]["installed"]
    finally:
        lab.remove_guest("a")


@pytest.mark.parametrize("node", ["host1", "edge1"])
def test_nothing_is_wrong_with_a_healthy_host_and_edge(cluster: Lab, node: str) -> None:
    assert eventually(lambda: trouble(cluster, node) == {}), trouble(cluster, node)
    found = findings(cluster, node)
    assert (found["certificates"]["result"], found["manager-connection"]["result"]) == ("ok", "ok")
    assert found["clock"]["facts"]["manager ahead by"] == 0.0


def test_a_manager_that_is_away(cluster: Lab) -> None:
    cluster.daemons.end(CPMD)
    try:
        (only,) = trouble(cluster, "edge1").values()
        assert (only["check"], "Connection refused" in only["troubles"][0]["what"]) == ("manager-connection", True)
    finally:
        cluster.daemons.start(CPMD)
        assert eventually(lambda: all(each["connected"] for each in facts(cluster, "node", "list")))


def test_a_natd_that_ended(lab: Lab) -> None:
    lab.daemons.end(natd_of(SERVER), signal.SIGKILL)
    try:
        found = trouble(lab, SERVER)
        assert found["daemons"]["troubles"][0]["what"] == "natd does not run"
        assert eventually(lambda: "nodes" in trouble(lab, SERVER))
    finally:
        lab.daemons.start(natd_of(SERVER))
        assert eventually(lambda: trouble(lab, SERVER) == {})


def test_a_report_of_a_server_with_a_vm(lab: Lab) -> None:
    guest = lab.add_guest("treasure", SERVER)
    try:
        plain = report(lab)
        # A VM of a test before may have ports that still rest.
        (vm,) = (each for each in json.loads(plain["manager/vms.json"]) if each["name"] == "treasure")
        assert "treasure" in json.dumps(json.loads(plain["kernel/ours.json"])["hosts_vms"])
        assert json.loads(plain["kernel/ours.json"])["chains"]
        hidden = "\n".join(report(lab, "--anonymous").values())
        for secret in ("treasure", SERVER + '"', "203.0.113", vm["uuid"]):
            assert secret not in hidden, secret
    finally:
        lab.remove_guest(guest.name)


def test_a_hook_that_does_not_run(lab: Lab) -> None:
    """The last one: to libvirtd the hook is new afterwards."""
    hook = lab.hosts[SERVER].directory / HOOK.relative_to("/")
    original = hook.read_text()
    try:
        hook.write_text("#!/no/such/interpreter\n")
        found = trouble(lab, SERVER)
        assert {"hook", "hook-runs"} <= set(found)
        assert "does not run" in found["hook-runs"]["troubles"][0]["what"]
        hook.chmod(0o644)
        assert trouble(lab, SERVER)["hook"]["troubles"][0]["remedy"] == f"chmod 755 {HOOK}"
        hook.unlink()
        assert "virt-ports install" in trouble(lab, SERVER)["hook"]["troubles"][0]["remedy"]
    finally:
        hook.write_text(original)
        hook.chmod(0o755)
    assert set(trouble(lab, SERVER)) == {"hook-seen"}


def report(lab: Lab, *options: str) -> dict[str, str]:
    done = command(lab, SERVER, "report", "--file", "-", *options)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr.startswith(b"checks")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        files = {each.name.partition("/")[2]: archive.extractfile(each) for each in archive}
        return {name: file.read().decode() for name, file in files.items() if file is not None}
