"""A full disk: the commit is refused in words, nothing of it is there, and the ledger goes on when there is room."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]

FILLER = """
import json, sqlite3, sys
from contextlib import closing, suppress
from pathlib import Path
from cpm.core.changes import PutAddress, PutNode, PutVM
from cpm.protocol.ledger_errors import LedgerError
from cpm.ledger import SqliteLedger
from tests.unit.cpm.ledger.words import A, add, external, node, vm

place = Path(sys.argv[1])
ledger = SqliteLedger(place / "ledger.db")
ledger.commit([PutNode(node("host1")), PutAddress(external(A)), PutVM(vm("x"))], 0.0)


def fill_up():
    with (place / "ballast").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def held(number):
    return add(number, "x", f"{1024 + number}-{1024 + number}", "held")


refused = None
fill_up()
number = 0
while refused is None and number < 20000:
    number += 1
    before = ledger.load()
    try:
        ledger.commit([held(number)], float(number))
    except LedgerError as error:
        refused = str(error)
unchanged = ledger.load() == before
(place / "ballast").unlink()
ledger.commit([held(number)], float(number))  # begins a transaction: none was left open
allocations = [each.id for each in ledger.load().allocations]
ledger.close()
with closing(sqlite3.connect(place / "ledger.db")) as check:
    integrity = check.execute("PRAGMA integrity_check").fetchall()
with SqliteLedger(place / "ledger.db") as again:
    same = [each.id for each in again.load().allocations] == allocations
print(json.dumps({"refused": refused, "unchanged": unchanged, "same": same,
                  "complete": allocations == list(range(1, number + 1)), "integrity": integrity}))
"""


def test_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    mount_and_fill = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    result = subprocess.run(
        [
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-ec",
            mount_and_fill,
            "sh",
            tmp_path,
            sys.executable,
            FILLER,
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert "free space on the filesystem of" in told.pop("refused")
    assert told == {
        "unchanged": True,
        "same": True,
        "complete": True,
        "integrity": [["ok"]],
    }
