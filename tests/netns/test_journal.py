"""The journal is read as a real journald, in a mount namespace of its own, has written it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

JOURNALD = Path("/lib/systemd/systemd-journald")
SCRIPT = """\
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal
"$1" >&2 & journald=$!
trap 'kill $journald' EXIT
for _ in $(seq 100); do [ -S /run/systemd/journal/socket ] && break; sleep 0.1; done
"$2" -c "$3"
"""
PROGRAM = textwrap.dedent("""\
    import json, socket, time
    from machine_doctor.readers import journal

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        def send(**fields):
            text = "".join(f"{key}={value}\\n" for key, value in fields.items())
            out.sendto(text.encode(), "/run/systemd/journal/socket")

        send(MESSAGE="Reloaded", MESSAGE_ID="7b05ebc668384222baa8881179cfda54", UNIT="libvirtd.service")
        for number in range(5):
            send(MESSAGE=f"hello {number}", UNIT="natd.service")
        send(MESSAGE="x" * 5000, UNIT="cpmd.service")
    ours = [["_SYSTEMD_UNIT=natd.service"], ["UNIT=natd.service"]]
    for _ in range(100):
        long = journal.newest([["UNIT=cpmd.service"]], 3)
        if long:
            break
        time.sleep(0.1)
    print(json.dumps({
        "reloaded_ago": time.time() - (journal.last_reload("libvirtd") or 0),
        "newest": [each.message for each in journal.newest(ours, 3)],
        "all": len(journal.newest(ours, 100)),
        "long": [len(each.message) for each in long],
        "other": journal.newest([["UNIT=none.service"]], 3),
        "never": journal.last_reload("virtqemud"),
    }))
    """)


@pytest.mark.skipif(not JOURNALD.exists(), reason="systemd is not installed")
def test_a_journal_is_read() -> None:
    command = ["unshare", "--mount", "bash", "-c", SCRIPT, "bash", str(JOURNALD), sys.executable, PROGRAM]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 <= found.pop("reloaded_ago") < 60
    assert found == {
        "newest": ["hello 2", "hello 3", "hello 4"], "all": 5, "long": [5000], "other": [], "never": None,
    }  # fmt: skip
