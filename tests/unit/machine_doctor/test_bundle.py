"""The archive has what it should, and nothing that is secret, whatever is in the files that it is made from."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

import cpm.settings
import natctl.settings
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


# Every kind of secret that a site has, each with a text of its own, so that a leak says which it was.

PLANTED = {
    kind: f"{kind}-{number * 7919:06x}c0ffee"
    for number, kind in enumerate((
        "listen-key", "page-key", "metrics-key", "node-key", "webhook-user", "webhook-password", "webhook-path",
        "webhook-query", "webhook-token", "url-password", "libvirt-password", "comment", "journal-password",
        "journal-bearer", "journal-header", "journal-json", "journal-pem",
    ), 17)
}  # fmt: skip
HOOK_URL = "https://{webhook-user}:{webhook-password}@hooks.example.net/services/{webhook-path}?t={webhook-query}"


def planted(text: str) -> str:
    for kind, secret in PLANTED.items():
        text = text.replace(f"{{{kind}}}", secret)
    return text


def pem(kind: str, name: str = "PRIVATE KEY") -> str:
    return planted(f"-----BEGIN {name}-----\n{{{kind}}}\n-----END {name}-----\n")


SAID = (
    f"cannot deliver events to webhook: Cannot connect to {HOOK_URL}",
    "the server at https://hooks.example.net/services/{webhook-path} answers 500",
    "posting with {webhook-token}",
    "qemu: -spice password={journal-password},port=5900",
    "GET / Authorization: Bearer {journal-header}",
    "sent Bearer {journal-bearer} to the proxy",
    '{"api_token": "{journal-json}"}',
    "cannot read {folder}/page.key: Permission denied",
    "-----BEGIN EC PRIVATE KEY-----",
    "{journal-pem}",
    "-----END EC PRIVATE KEY-----",
    "the line after it",
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """A machine with TLS keys, tokens, a webhook with credentials, and programs that talk too much."""
    for name in ("listen", "page", "metrics", "node"):
        (tmp_path / f"{name}.key").write_text(pem(f"{name}-key"))
    (tmp_path / "token").write_text(planted("{webhook-token}\n"))
    (tmp_path / "cpmd.toml").write_text(planted(
        f'''# {{comment}}
[listen]
address = "172.30.0.2:7414"
certificate = "{tmp_path}/listen.pem"
key = "{tmp_path}/listen.key"
ca = "{tmp_path}/ca.pem"
[metrics]
address = "127.0.0.1:9417"
certificate = "{tmp_path}/metrics.pem"
key = "{tmp_path}/metrics.key"
[page]
certificate = "{tmp_path}/page.pem"
key = "{tmp_path}/page.key"
[events]
webhook = "{HOOK_URL}"
webhook_token_file = "{tmp_path}/token"
'''
    ))  # fmt: skip
    (tmp_path / "natd.toml").write_text(planted(
        f'''underlay_address = "172.30.0.11"
roles = ["host"]
[manager]
url = "https://operator:{{url-password}}@172.30.0.2:7414"
certificate = "{tmp_path}/node.pem"
key = "{tmp_path}/node.key"
[host]
uplinks = ["eth1"]
libvirt = "qemu+tcp://root:{{libvirt-password}}@localhost/system"
'''
    ))  # fmt: skip
    monkeypatch.setattr(bundle, "_HOOK_CONF", tmp_path / "hook.conf")
    said = [journal.Entry(at, planted(text.replace("{folder}", str(tmp_path)))) for at, text in enumerate(SAID)]
    monkeypatch.setattr(journal, "newest", lambda matches, most: said)
    return Sources(str(tmp_path / "none.sock"), tmp_path / "natd.toml", tmp_path / "cpmd.toml")


@pytest.mark.parametrize("is_anonymous", [False, True])
def test_no_secret_of_any_kind_is_in_it(site: Sources, is_anonymous: bool) -> None:
    found = collected(site, is_anonymous=is_anonymous)
    leaks = {(kind, name) for kind, secret in PLANTED.items() for name, text in found.items() if secret in text}
    assert leaks == set()
    assert any(name.startswith("journal/") for name in found) != is_anonymous


def test_what_is_said_around_a_secret_stays(site: Sources) -> None:
    said = collected(site)["journal/cpmd.txt"]
    for words in (
        "cannot deliver events to webhook",
        "answers 500",
        "port=5900",
        "Permission denied",
        "the line after it",
    ):
        assert words in said
    assert str(site.cpmd.parent / "page.key") in said, "where a key is kept is no secret"


NOT_SECRET = {
    "cpmd": {
        "listen.socket", "listen.read_socket", "listen.admin_group", "listen.address", "listen.certificate",
        "listen.ca", "ledger.path", "journal.export", "pool.pairing", "scaling.policy", "metrics.address",
        "metrics.certificate", "metrics.client_ca", "page.address", "page.certificate", "page.client_ca",
        "page.names", "events.syslog", "events.ipfix", "events.file", "events.state", "log_level",
    },
    "natd": {
        "name", "manager.url", "manager.certificate", "manager.ca", "listen.socket", "host.uplinks", "host.bridges",
        "host.libvirt", "edge.uplinks", "edge.underlay", "monitor.source",
        "guests.announce_file", "guests.agent_sockets", "metrics.address", "metrics.certificate", "metrics.client_ca",
        "state", "log_level",
    },
}  # fmt: skip
"""Settings that are texts and may be read by anyone; passwords in their URLs are masked all the same."""


def texts(kind: Any, path: str = "") -> Iterator[str]:
    """Yield the settings that hold a text."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        inner = [each for each in (*typing.get_args(hint), hint) if isinstance(each, type) and issubclass(each, Struct)]
        if inner:
            yield from texts(inner[0], f"{path}{name}.")
        elif "str" in str(hint):
            yield f"{path}{name}"


@pytest.mark.parametrize(("daemon", "kind"), [("cpmd", cpm.settings.Settings), ("natd", natctl.settings.Settings)])
def test_a_setting_that_may_be_secret_is_masked(daemon: str, kind: Any) -> None:
    masked = {path for path in texts(kind) if bundle._SECRET.search(path.rpartition(".")[2])}
    assert set(texts(kind)) - masked == NOT_SECRET[daemon], "a new setting: is it a secret? Then name it so"
    assert masked >= {"metrics.key", "metrics.token_file"}
