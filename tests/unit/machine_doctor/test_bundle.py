"""The archive has what it should, and nothing that is secret, whatever is in the files that it is made from."""

from __future__ import annotations

import io
import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cpm.api.views import DomainView
from cpm.protocol.model import DomainUUID, NodeName
from machine_doctor import bundle
from machine_doctor.bundle import Member
from machine_doctor.examination import Sources
from machine_doctor.readers import journal
from tests.fakes import canned_manager
from tests.fakes.canned_manager import CannedManager
from tests.unit.machine_doctor import healthy

SECRET = "hunter2-1c0ffee"  # in every place from which it must not come
PEM = f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n"
UUID = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")

NATD = f"""\
# {SECRET}
underlay_address = "172.30.0.11"
name = "host1"
roles = ["host"]
[manager]
url = "https://operator:{SECRET}@172.30.0.2:7414/?token={SECRET}"
certificate = "FOLDER/node.crt"
key = "FOLDER/node.key"
ca = "FOLDER/ca.crt"
[host]
uplinks = ["eth1"]
[webhook]
secret = "{SECRET}"
url = "{SECRET}"
[more]
api_token = "{SECRET}"
passwords = ["{SECRET}"]
list = [{{ auth = "{SECRET}" }}]
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """A machine whose every file has the secret in it."""
    for name in ("node.key", "cpmd.key", "node.crt", "ca.crt", "ledger.db", "token"):
        (tmp_path / name).write_text(PEM)
    (tmp_path / "natd.toml").write_text(NATD.replace("FOLDER", str(tmp_path)))
    (tmp_path / "cpmd.toml").write_text(
        f'# {SECRET}\n[listen]\naddress = "172.30.0.2:7414"\nkey = "{tmp_path}/cpmd.key"\n'
        f'[ledger]\npath = "{tmp_path}/ledger.db"\n[events]\nwebhook = "https://x/{SECRET}"\n'
        f'webhook_token_file = "{tmp_path}/token"\n'
    )
    (tmp_path / "hook.conf").write_text(f"# {SECRET}\nsocket=/run/x.sock\npassword={SECRET}\n")
    monkeypatch.setattr(bundle, "_HOOK_CONF", tmp_path / "hook.conf")
    said = [journal.Entry(1.5, f"connected to https://u:{SECRET}@host/a?key={SECRET}"), journal.Entry(2.5, PEM)]
    monkeypatch.setattr(journal, "newest", lambda matches, most: said if "natd" in matches[0][0] else [])
    return Sources(str(tmp_path / "none.sock"), tmp_path / "natd.toml", tmp_path / "cpmd.toml")


def collected(sources: Sources, **options: Any) -> dict[str, str]:
    return {member.name: member.content for member in bundle.collect(sources, lambda _: None, **options)}


@pytest.mark.parametrize("is_anonymous", [False, True])
def test_no_secret_is_in_it(sources: Sources, is_anonymous: bool) -> None:
    found = collected(sources, is_anonymous=is_anonymous)
    assert {name for name, content in found.items() if SECRET in content or "PRIVATE KEY" in content} == set()
    natd = json.loads(found["configuration/natd.json"])
    assert (natd["manager"]["key"], natd["webhook"], natd["host"]) == ("(masked)", "(masked)", {"uplinks": ["eth1"]})
    assert natd["manager"]["url"].startswith("https://(masked)@")
    assert json.loads(found["configuration/hook.json"]) == {"socket": "/run/x.sock", "password": "(masked)"}


def test_a_file_that_is_not_toml_is_not_copied(sources: Sources) -> None:
    sources.natd.write_text(f'key = "{SECRET}\n')
    found = collected(sources)
    assert not any(SECRET in content for content in found.values())
    assert json.loads(found["configuration/natd.json"]) == {"error": f"{sources.natd} is not TOML"}


def test_what_is_in_it(sources: Sources) -> None:
    found = collected(sources)
    assert set(found) == {
        "doctor.json", "machine.json", "manager/status.json", "configuration/natd.json", "configuration/cpmd.json",
        "configuration/hook.json", "kernel/ours.json", "kernel/others.json", "journal/natd.txt",
    }  # fmt: skip
    assert "no such socket" in json.loads(found["manager/status.json"])["error"]
    assert json.loads(found["doctor.json"])["findings"][0]["check"] == "settings"
    assert json.loads(found["machine.json"])["virt-ports"]
    assert found["journal/natd.txt"].startswith("1.500 connected to https://(masked)@host/a?(masked)\n")


@pytest.fixture
def manager() -> Any:
    with canned_manager.running() as fake:
        yield fake


def answering(manager: CannedManager, sources: Sources) -> Sources:
    vm = DomainView("web-prod", UUID, NodeName("rack7"), healthy.OWN, 20000, 20255, 17, "active")
    manager.on("GET /v1/status", canned_manager.view(healthy.status()))
    manager.on("GET /v1/domains?all=1", canned_manager.view([vm]))
    manager.on("GET /v1/nodes", canned_manager.view([healthy.node(name=NodeName("rack7"))]))
    manager.on("GET /v1/pool", canned_manager.view([healthy.address()]))
    manager.on("GET /v1/node-events?limit=1000", canned_manager.view([]))
    manager.on("GET /v1/events?limit=1000", canned_manager.lines([]))
    return sources._replace(socket=manager.path)


def test_the_managers_answers_are_in_it(manager: CannedManager, sources: Sources) -> None:
    found = collected(answering(manager, sources))
    assert json.loads(found["manager/vms.json"])[0]["name"] == "web-prod"
    assert {name.partition("/")[2] for name in found if name.startswith("manager/")} == {
        "status.json", "vms.json", "nodes.json", "pool.json", "node-events.json", "events.json",
    }  # fmt: skip


def test_names_and_addresses_are_replaced_the_same_everywhere(manager: CannedManager, sources: Sources) -> None:
    found = collected(answering(manager, sources), is_anonymous=True)
    everything = "\n".join(found.values())
    for original in ("web-prod", "rack7", "host1", "203.0.113", "172.30.0", str(UUID)):
        assert original not in everything, original
    vms, nodes = json.loads(found["manager/vms.json"]), json.loads(found["manager/nodes.json"])
    assert vms[0]["node"] == nodes[0]["name"]
    assert vms[0]["external_address"] == nodes[0]["underlay"]
    assert not any(name.startswith("journal/") for name in found)


def test_the_archive_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.tar.gz"
    with bundle.create(path) as file:
        assert bundle.write(iter([Member("a/b.json", "{}\n"), Member("c", "é")]), file, 1763879880.7, "report") == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as archive:
        assert [(each.name, each.mtime) for each in archive] == [
            ("report/a/b.json", 1763879880),
            ("report/c", 1763879880),
        ]
        (entry,) = (archive.extractfile(each) for each in archive if each.name == "report/c")
        assert entry is not None
        assert entry.read().decode() == "é"
    with pytest.raises(FileExistsError):
        bundle.create(path)


def test_it_can_be_written_to_a_stream_that_cannot_seek() -> None:
    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            Pipe.data += bytes(data)
            return len(data)

    assert bundle.write(iter([Member("a", "x")]), Pipe(), 0.0, "r") == 1
    with tarfile.open(fileobj=io.BytesIO(Pipe.data)) as archive:
        assert archive.getnames() == ["r/a"]


def test_versions_of_packages_that_matter(tmp_path: Path) -> None:
    status = tmp_path / "status"
    installed = "Status: install ok installed"
    status.write_text(
        f"Package: libvirt-daemon\n{installed}\nVersion: 9.0\n\nPackage: vim\n{installed}\nVersion: 1\n\n"
        "Package: qemu-utils\nStatus: deinstall ok config-files\nVersion: 7\n"
    )
    assert dict(bundle._packages(status)) == {"libvirt-daemon": "9.0"}
    assert dict(bundle._packages(tmp_path / "none")) == {}
