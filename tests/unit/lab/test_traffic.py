from __future__ import annotations

import subprocess
import time
from collections import Counter
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.image import RECIPE
from lab.traffic import Tally, sink_records


def test_the_last_line_is_read_whatever_comes_before() -> None:
    tally = Tally.parse(
        "ok=3 waiting=1 fail=0\n"
        "ok=4 fail=1 refused=0 timeout=1 noport=0 other=0 late=2 secs=5.250 "
        "extmin=1024 extmax=1100 extports=4 alive=3 dead=1\n"
    )
    assert (tally.ok, tally.timeout, tally.late, tally.secs, tally.extmax, tally.dead) == (4, 1, 2, 5.25, 1100, 1)


def test_output_that_ends_early_is_no_tally() -> None:
    with pytest.raises(LabError, match="did not get to its end"):
        Tally.parse("listening\n")


@pytest.fixture(scope="module")
def conngen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("conngen") / "conngen"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, RECIPE / "conngen.c"], check=True)
    return program


@pytest.mark.parametrize("options", [(), ("-u",), ("-c", "-R"), ("-k",), ("-r", "400"), ("-r", "400", "-b", "20")])
def test_conngen_reaches_its_own_server(conngen: Path, options: tuple[str, ...]) -> None:
    port = "20807"
    # A private network namespace of an own user namespace: no root, and no port of this machine.
    script = f"""
        ip link set lo up; {conngen} -l {port} > /dev/null & server=$!
        until {conngen} -c 127.0.0.1 {port} 1 > /dev/null; do :; done
        {conngen} {" ".join(options)} 127.0.0.1 {port} 50; status=$?
        kill $server; exit $status
    """
    done = subprocess.run(["unshare", "-rn", "sh", "-c", script], capture_output=True, text=True, check=False)
    tally = Tally.parse(done.stdout)
    assert done.returncode == 0
    assert (tally.ok, tally.fail, tally.alive) == (50, 0, 50 if "-k" in options else 0)
    assert tally.extports >= 1


def test_conngen_writes_down_who_was_connected(conngen: Path, tmp_path: Path) -> None:
    port, records = "20807", tmp_path / "records"
    begin = time.time()
    script = f"""
        ip link set lo up; {conngen} -l {port} -w {records} > /dev/null & server=$!
        until {conngen} -n warmup -c 127.0.0.1 {port} 1 > /dev/null; do :; done
        {conngen} -n one -c -R 127.0.0.1 {port} 50 && {conngen} -n two -e 0.01 -k -t 0.1 127.0.0.1 {port} 5
        {conngen} -n three -t -1 -C 127.0.0.1 {port} 2 > {tmp_path}/three & three=$!
        until grep -q 'ok=2 waiting=0' {tmp_path}/three; do sleep 0.05; done
        kill $server; wait $server; kill $three; wait
    """
    done = subprocess.run(["unshare", "-rn", "sh", "-c", script], capture_output=True, text=True, check=False)
    one, two = (Tally.parse(line) for line in done.stdout.splitlines())
    assert (one.ok, one.late, two.ok, two.alive, two.dead) == (50, 0, 5, 5, 0)
    found = sink_records(records)
    assert Counter(record.name for record in found if record.name != "warmup") == {"one": 50, "two": 5, "three": 2}
    assert all(begin < record.begin <= record.end < time.time() for record in found)
    assert {record.peer for record in found} == {IPv4Address("127.0.0.1")}
    assert one.extmin == min(record.port for record in found if record.name == "one")


def test_conngen_counts_refused_connections(conngen: Path) -> None:
    script = f"ip link set lo up; {conngen} 127.0.0.1 20807 5"
    done = subprocess.run(["unshare", "-rn", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert Tally.parse(done.stdout).refused == 5
