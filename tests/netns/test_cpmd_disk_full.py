"""A real cpmd on a real file system that is full: it refuses what is new, keeps what is there, and recovers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]


def test_a_full_disk_costs_no_session_and_no_range(tmp_path: Path) -> None:
    mount_and_run = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -m tests.netns.full_disk_story "$1"'
    in_own_mounts = ["unshare", "-m", "--propagation", "private", "sh", "-ec", mount_and_run]
    result = subprocess.run(
        [*in_own_mounts, "sh", tmp_path, sys.executable],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "change": [507, "ledger-full"],
        "start": ["ledger-full", True],
        "status": True,
        "old": "active",
        "later": "active",
        "change later": [200, ""],
        "while locked": "ledger-unwritable",
        "unlocked": "active",
        "sessions": [1, False],
    }
