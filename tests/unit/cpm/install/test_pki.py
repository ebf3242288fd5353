"""`virt-ports pki`: certificates that manager and nodes believe, and only those."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.api import server, session
from cpm.cli import main
from cpm.install.pki import CA_DAYS, DAYS, Authority
from cpm.protocol.errors import Conflict, ExitCode, InvalidRequest, NotFound
from cpm.service import files

NOW = time.time()
DAY = 86400


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "pki")
    made.create(NOW)
    return made


def handshake(folder: Path, manager: str, node: str, ca: str = "ca") -> tuple[str, str]:
    """Connect as natd does to a server as cpmd's; return what each says of it, an empty string when it went well."""
    listening = server.tls_context(*(str(folder / file) for file in (f"{manager}.pem", f"{manager}.key", "ca.pem")))
    asking = session.tls_context(*(str(folder / file) for file in (f"{node}.pem", f"{node}.key", f"{ca}.pem")))
    here, there = socket.socketpair()
    said = ["", ""]

    def serve() -> None:
        try:
            with listening.wrap_socket(there, server_side=True) as tls:
                certificate = tls.getpeercert() or {}
                tls.sendall(str(dict(certificate["subjectAltName"])["DNS"]).encode())  # type: ignore[arg-type]
        except (OSError, ssl.SSLError) as error:
            said[0] = str(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with asking.wrap_socket(here, server_hostname="127.0.0.1") as tls:
            said[1] = tls.recv(100).decode()
    except (OSError, ssl.SSLError) as error:
        said[1] = str(error)
    thread.join()
    return said[0], said[1]


def test_manager_and_node_believe_each_other(authority: Authority, tmp_path: Path) -> None:
    authority.issue("127.0.0.1", NOW)
    authority.issue("host1", NOW)
    assert handshake(tmp_path / "pki", "127.0.0.1", "host1") == ("", "host1")


def test_a_node_does_not_believe_a_node_as_the_manager(authority: Authority, tmp_path: Path) -> None:
    authority.issue("host2", NOW)
    authority.issue("host1", NOW)
    _, said = handshake(tmp_path / "pki", "host2", "host1")
    assert "IP address mismatch" in said


def test_an_ended_certificate_is_refused_and_a_renewed_one_is_not(authority: Authority, tmp_path: Path) -> None:
    authority.issue("127.0.0.1", NOW)
    before = authority.issue("host1", NOW - (DAYS + 1) * DAY)
    key = before.key.read_bytes()
    assert "expired" in handshake(tmp_path / "pki", "127.0.0.1", "host1")[0]
    assert [each.name for each in authority.due(NOW)] == ["host1"]
    authority.renew("host1", NOW)
    assert handshake(tmp_path / "pki", "127.0.0.1", "host1") == ("", "host1")
    assert before.key.read_bytes() == key
    assert authority.due(NOW) == []


def test_keys_are_for_root_only(authority: Authority, tmp_path: Path) -> None:
    authority.issue("host1", NOW)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "pki").iterdir()}
    assert modes == {"ca.key": 0o600, "ca.pem": 0o644, "host1.key": 0o600, "host1.pem": 0o644}
    assert stat.S_IMODE((tmp_path / "pki").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "name", ["", "ca", "../host1", "host/1", "a b", "*", "host1.", "-x", "x" * 64, "host\n1", "::1", "a." * 127 + "a"]
)
def test_other_names_are_refused(authority: Authority, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="use a node's name"):
        authority.issue(name, NOW)
    assert {path.name for path in (tmp_path / "pki").iterdir()} == {"ca.key", "ca.pem"}


def test_what_is_there_is_not_replaced(authority: Authority, tmp_path: Path) -> None:
    authority.issue("host1", NOW)
    before = {path.name: path.read_bytes() for path in (tmp_path / "pki").iterdir()}
    with pytest.raises(Conflict, match="pki renew host1"):
        authority.issue("host1", NOW)
    with pytest.raises(Conflict, match="already"):
        authority.create(NOW)
    assert {path.name: path.read_bytes() for path in (tmp_path / "pki").iterdir()} == before


def test_without_an_authority(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="pki init"):
        Authority(tmp_path / "none").issue("host1", NOW)
    with pytest.raises(NotFound, match="pki init"):
        Authority(tmp_path / "none").issued()


def test_no_certificate_outlives_its_authority(authority: Authority) -> None:
    ca, late = authority.issued()[0], NOW + (CA_DAYS - 10) * DAY
    assert (authority.issue("host1", late).ends or 0) <= (ca.ends or 0)
    with pytest.raises(Conflict, match="has ended"):
        authority.issue("host2", NOW + CA_DAYS * DAY)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path / "pki"), "-o", "json"]
    for words in (["init"], ["issue", "172.30.0.2", "host1"], ["renew"]):
        assert main.execute(["pki", *words, *folder], now=NOW) == 0
    capsys.readouterr()
    assert main.execute(["pki", "list", *folder], now=NOW) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["172.30.0.2", "host1", "ca"]
    assert main.execute(["pki", "list", *folder[:2]], now=NOW) == 0
    assert "host1.pem" in capsys.readouterr().out
    assert main.execute(["pki", "issue", "host1", *folder], now=NOW) == ExitCode.REFUSED


@pytest.mark.parametrize(("words", "names"), [
    (["host*"], ["host1", "host2"]),
    (["ca", "host2"], ["host2", "ca"]),
    (["--sort", "name"], ["ca", "host1", "host2"]),
    (["--limit", "1"], ["host1"]),
    (["--sort", "name", "--limit", "1", "--after", "ca"], ["host1"]),
])  # fmt: skip
def test_a_list_filters_and_pages(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], names: list[str]
) -> None:
    authority.issue("host1", NOW)
    authority.issue("host2", NOW + DAY)
    folder = ["--folder", str(tmp_path / "pki")]
    assert main.execute(["pki", "list", *words, *folder, "-o", "json"], now=NOW) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == names


def test_a_page_says_how_to_get_the_next_one(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority.issue("host1", NOW)
    folder = ["--folder", str(tmp_path / "pki")]
    assert main.execute(["pki", "list", "--sort", "name", "--limit", "1", *folder], now=NOW) == 0
    assert capsys.readouterr().out.endswith("There are more: add --after ca\n")
    assert main.execute(["pki", "list", "--after", "ca", *folder], now=NOW) == ExitCode.USAGE
    assert "add --sort name" in capsys.readouterr().err


@pytest.mark.parametrize("step", range(1, 5))
def test_what_was_killed_half_way_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Whichever file was the last: `init` and `issue` can be typed again, and nothing misleads."""
    folder, write, written = tmp_path / "pki", files.replace, 0

    def write_and_die(path: Path, content: bytes, mode: int) -> None:
        nonlocal written
        written += 1
        if written == step:
            raise KeyboardInterrupt
        write(path, content, mode)

    with monkeypatch.context() as patched:
        patched.setattr(files, "replace", write_and_die)
        with contextlib.suppress(KeyboardInterrupt):
            Authority(folder).create(NOW)
            Authority(folder).issue("host1", NOW)
    if not (folder / "ca.pem").exists():
        with pytest.raises(NotFound, match="pki init"):
            Authority(folder).issue("host1", NOW)
        Authority(folder).create(NOW)
    if not (folder / "host1.pem").exists():
        Authority(folder).issue("host1", NOW)
    Authority(folder).issue("127.0.0.1", NOW)
    assert handshake(folder, "127.0.0.1", "host1") == ("", "host1")
    with pytest.raises(Conflict):
        Authority(folder).create(NOW)


def test_a_certificate_that_cannot_be_read_stops_neither_list_nor_renewal(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pki"
    authority.issue("host1", NOW)
    (folder / "broken.pem").write_text("half")
    other = Authority(tmp_path / "other")
    other.create(NOW)
    shutil.copy(other.issue("host9", NOW).certificate, folder)
    late = NOW + (DAYS - 1) * DAY
    words = ["--folder", str(folder), "-o", "json"]
    assert main.execute(["pki", "list", *words], now=late) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert [*listed] == ["broken", "host9", "host1", "ca"]
    assert "no certificate that can be read" in listed["broken"]["fault"]
    assert "not of this authority" in listed["host9"]["fault"]
    assert listed["host1"]["fault"] == ""
    assert main.execute(["pki", "list", *words[:2]], now=late) == 0
    assert "broken.pem is no certificate that can be read" in capsys.readouterr().out
    assert main.execute(["pki", "renew", *words], now=late) == ExitCode.REFUSED, "a script is to notice"
    renewed = {each["name"]: each["ends"] for each in json.loads(capsys.readouterr().out)}
    assert renewed["host1"] > listed["host1"]["ends"]
    assert renewed["host9"] is None, "what another authority signed is not signed unasked"


def test_a_key_that_was_moved_to_its_machine_is_not_needed_to_renew(authority: Authority, tmp_path: Path) -> None:
    issued = authority.issue("host1", NOW)
    key = issued.key.rename(tmp_path / "moved.key")
    with pytest.raises(Conflict, match="pki renew host1"):
        authority.issue("host1", NOW)
    authority.issue("127.0.0.1", NOW)
    before = issued.certificate.read_bytes()
    authority.renew("host1", NOW)
    assert issued.certificate.read_bytes() != before
    key.rename(issued.key)
    assert handshake(tmp_path / "pki", "127.0.0.1", "host1") == ("", "host1")


def test_an_authority_without_its_key_or_with_another_one_says_so(authority: Authority, tmp_path: Path) -> None:
    key = tmp_path / "pki" / "ca.key"
    key.rename(tmp_path / "safe")
    with pytest.raises(NotFound, match="put the authority's key back"):
        authority.issue("host1", NOW)
    with pytest.raises(Conflict, match="already"):
        authority.create(NOW)
    Authority(tmp_path / "other").create(NOW)
    shutil.copy(tmp_path / "other" / "ca.key", key)
    with pytest.raises(InvalidRequest, match="not the key of"):
        authority.issue("host1", NOW)
    assert not (tmp_path / "pki" / "host1.pem").exists()


def test_several_are_issued_together_or_none(tmp_path: Path) -> None:
    folder = ["--folder", str(tmp_path / "pki")]
    assert main.execute(["pki", "init", *folder], now=NOW) == 0
    assert main.execute(["pki", "issue", "host1", *folder], now=NOW) == 0
    assert main.execute(["pki", "issue", "host2", "host1", *folder], now=NOW) == ExitCode.REFUSED
    assert not (tmp_path / "pki" / "host2.pem").exists()


def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    Authority(tmp_path / "pki").create(NOW)

    def refuse(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read everything
    assert main.execute(["pki", "list", "--folder", str(tmp_path / "pki")], now=NOW) != 0
    assert "run this as root" in capsys.readouterr().err
