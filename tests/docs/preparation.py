"""What a page takes for granted before one of its commands, made so on a reader's machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.docs.machine import REPOSITORY
from tests.docs.pages import EXAMPLES
from tests.docs.reader import Preparation, Reader
from tests.docs.transcript import read

DOCS: Final = REPOSITORY / "docs"
BARE: Final = frozenset({"install.md", "prove.md", "README.md"})
"""Pages that do not begin with a site."""


def _asks(name: str) -> Preparation:
    """Have a node that nobody has approved ask to be one."""

    async def prepare(reader: Reader) -> None:
        reader.machines[name].switch_on()
        await reader.until(f"virt-ports node list | grep -q '{name} .*waiting for approval'")

    return prepare


def _joined(*names: str) -> Preparation:
    async def prepare(reader: Reader) -> None:
        await reader.join(*names)

    return prepare


def _scrapped(name: str) -> Preparation:
    """Switch a node off for good, as far as `node fence`."""

    async def prepare(reader: Reader) -> None:
        await reader.join(name)
        await _off(name)(reader)
        await reader.need(f"virt-ports node fence {name}")

    return prepare


def _off(name: str) -> Preparation:
    async def prepare(reader: Reader) -> None:
        await reader.machines[name].switch_off()
        await reader.until(f"virt-ports node list --state away | grep -q {name}")

    return prepare


def _typed(*commands: str) -> Preparation:
    async def prepare(reader: Reader) -> None:
        await reader.need(*commands)

    return prepare


async def _dead_host(reader: Reader) -> None:
    await reader.join("host2")
    await _off("host2")(reader)


async def _lost(reader: Reader) -> None:
    """Lose the ledger, and have all nodes ask anew."""
    await reader.need("systemctl stop cpmd", "rm -r /var/lib/virt-ports/*")


async def _server_listens(reader: Reader) -> None:
    """Wait as long as a reader needs to type: the server was started in the background."""
    await reader.until("ip netns exec vp-internet ss -Hltn | grep -q :8080")


BEFORE: Final[Mapping[tuple[str, str], Preparation]] = {
    ("README.md", ".venv/bin/python -m lab exec a conngen -R -t 30 192.0.2.2 8080 500"): _server_listens,
    ("automate.md", "virt-ports node list"): _asks("srv1"),
    (EXAMPLES, "virt-ports backup /backup/ledger-monday.db"): _typed("mkdir /backup"),
    (EXAMPLES, "virt-ports config check ./cpmd.toml"): _typed("cp /etc/virt-ports/cpmd.toml ."),
    (EXAMPLES, "virt-ports node approve host3"): _asks("host3"),
    (EXAMPLES, "virt-ports set web2 pool=mail"): _typed("virt-ports pool add 203.0.113.8 --pool mail"),
    (EXAMPLES, "virt-ports node remove host2"): _scrapped("host2"),
    (EXAMPLES, "virt-ports node fence host2"): _dead_host,
    ("journal.md", read(DOCS / "reference/journal.md")[0].command): _typed(
        "virt-ports export --file journal-1-3.jsonl", "gzip journal-1-3.jsonl"
    ),
    ("operate.md", "virt-ports pool show 203.0.113.10"): _typed("virt-ports pool add 203.0.113.10"),
    ("operate.md", "virt-ports node approve host3"): _asks("host3"),
    ("operate.md", "virt-ports node remove host2"): _scrapped("host2"),
    ("operate.md", "virt-ports node fence host2"): _dead_host,
    ("operate.md", "systemctl start cpmd && systemctl stop cpmd"): _lost,
    ("operate.md", 'virt-ports backup "/var/backups/virt-ports/ledger-$(date +%F).db"'): _typed(
        "install -d -m 0700 /var/backups/virt-ports"
    ),
    ("operate.md", "systemctl stop cpmd"): _typed(
        "mv /var/backups/virt-ports/ledger-*.db /var/backups/virt-ports/ledger-2026-11-28.db"
    ),
    ("operate.md", "virt-ports node approve edge1        # one after the other, all of them"): _asks("edge1"),
    ("monitoring.md", "cd /var/lib/prometheus/node-exporter"): _typed("mkdir -p /var/lib/prometheus/node-exporter"),
    ("install.md", "virt-ports node approve srv1       # the machine's name, as the step prints it"): _typed(
        "for i in $(seq 300); do virt-ports node list | grep -q 'srv1 .*waiting' && break; sleep 0.1; done"
    ),
    ("install.md", "virt-ports node approve host1"): _asks("host1"),
    ("status-page.md", "w3m http://127.0.0.1:7480/"): _typed(
        "printf '[page]\\naddress = \"127.0.0.1:7480\"\\n' >> /etc/virt-ports/cpmd.toml", "systemctl restart cpmd"
    ),
}
"""By page and command."""
