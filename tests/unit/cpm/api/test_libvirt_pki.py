"""
libvirt's own certificates, made by certtool with the templates of libvirt's documentation (docs/kbase/tlscerts.rst), in
the places where libvirt has them: manager and nodes take them as they are.
"""

from __future__ import annotations

import re
import ssl
import subprocess
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cpm.api import server, session
from cpm.protocol import codec
from cpm.protocol.messages import PROTOCOL, Hello, Welcome
from cpm.protocol.model import NodeName, Role
from machine_doctor.readers import tls
from tests.fakes import cpmd

PAGE = Path(__file__).parents[4] / "docs" / "how-to" / "certificates.md"
NODE, ADDRESS = NodeName("host1"), IPv4Address("172.30.0.11")

CA = "cn = Name of your organization\nca\ncert_signing_key\n"
SERVER = """organization = Name of your organization
cn = compute1.libvirt.org
dns_name = compute1
dns_name = compute1.libvirt.org
ip_address = 10.0.0.74
ip_address = 127.0.0.1
ip_address = 2001:cafe::74
tls_www_server
signing_key
"""
CLIENT = """country = GB
state = London
locality = London
organization = Libvirt Project
cn = host1
tls_www_client
signing_key
"""


def certtool(*words: str | Path) -> str:
    done = subprocess.run(["certtool", *words], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def etc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What /etc has then."""
    etc = tmp_path_factory.mktemp("etc")
    private, work = etc / "pki/libvirt/private", etc / "work"
    for folder in (etc / "pki/CA", private, work):
        folder.mkdir(parents=True)
    (work / "cakey.pem").write_text(certtool("--generate-privkey"))
    (work / "ca.info").write_text(CA)
    ca = etc / "pki/CA/cacert.pem"
    certtool("--generate-self-signed", "--load-privkey", work / "cakey.pem", "--template", work / "ca.info",
             "--outfile", ca)  # fmt: skip
    for name, template in (("server", SERVER), ("client", CLIENT)):
        (private / f"{name}key.pem").write_text(certtool("--generate-privkey"))
        (work / f"{name}.info").write_text(template)
        certtool("--generate-certificate", "--load-privkey", private / f"{name}key.pem", "--load-ca-certificate", ca,
                 "--load-ca-privkey", work / "cakey.pem", "--template", work / f"{name}.info",
                 "--outfile", etc / f"pki/libvirt/{name}cert.pem")  # fmt: skip
    return etc


def of_libvirt(etc: Path, name: str) -> tuple[str, str, str]:
    libvirt = etc / "pki/libvirt"
    return str(libvirt / f"{name}cert.pem"), str(libvirt / f"private/{name}key.pem"), str(etc / "pki/CA/cacert.pem")


async def answer(site: cpmd.Site, port: int, context: ssl.SSLContext, name: str) -> object:
    """Return the manager's first message to a node; the reason when it sends none."""
    url = f"https://127.0.0.1:{port}/v1/session"
    async with aiohttp.ClientSession() as http, http.ws_connect(url, ssl=context) as socket:
        hello = Hello(PROTOCOL, NodeName(name), frozenset({Role.HOST}), ADDRESS, "0", 0, ())
        await socket.send_bytes(codec.encode(hello))
        frame = await socket.receive(60)
        if frame.type is aiohttp.WSMsgType.BINARY:
            return codec.decode_manager_message(frame.data)
        return str(frame.extra or frame.data)


@pytest.mark.parametrize(
    "flags", [ssl.VerifyFlags(0), ssl.VERIFY_X509_STRICT], ids=["as Python 3.11", "as Python 3.13"]
)
async def test_manager_and_node_take_them_as_they_are(etc: Path, flags: ssl.VerifyFlags) -> None:
    ours, theirs = server.tls_context(*of_libvirt(etc, "server")), session.tls_context(*of_libvirt(etc, "client"))
    for context in (ours, theirs):
        context.verify_flags |= flags
    async with cpmd.running() as site:
        await site.approve(NODE, str(ADDRESS), frozenset({Role.HOST}))
        port = await site.listen_tls(ours)
        assert isinstance(await answer(site, port, theirs, "host1"), Welcome)
        said = await answer(site, port, theirs, "host2")
        assert "is for host1" in str(said), "its own name only"


async def test_a_certificate_of_a_server_is_refused_as_a_nodes(etc: Path) -> None:
    async with cpmd.running() as site:
        port = await site.listen_tls(server.tls_context(*of_libvirt(etc, "server")))
        with pytest.raises(aiohttp.ClientError):
            await answer(site, port, session.tls_context(*of_libvirt(etc, "server")), "compute1")


def test_the_doctor_finds_nothing_wrong_with_them(etc: Path) -> None:
    assert tls.examine("manager", *of_libvirt(etc, "server")).wrong == ""
    node = tls.examine("node", *of_libvirt(etc, "client"))
    assert (node.wrong, node.names) == ("", ("host1",))
    assert "unsuitable certificate purpose" in tls.examine("node", *of_libvirt(etc, "server")).wrong


def test_the_page_makes_such_a_certificate(etc: Path, tmp_path: Path) -> None:
    """Its commands, where the authority is."""
    (commands,) = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    for name, source in (("cakey.pem", etc / "work/cakey.pem"), ("cacert.pem", etc / "pki/CA/cacert.pem")):
        (tmp_path / name).write_bytes(source.read_bytes())
    script = "".join(line.removeprefix("$ ") for line in commands.splitlines(keepends=True))
    subprocess.run(["sh", "-euc", script], cwd=tmp_path, check=True, capture_output=True, timeout=100)
    facts = tls.examine("node", *(str(tmp_path / f) for f in ("clientcert.pem", "clientkey.pem", "cacert.pem")))
    assert (facts.wrong, facts.names) == ("", ("host1",))


@pytest.mark.parametrize(("certificate", "names"), [
    ({"subject": ((("commonName", "host1"),),), "subjectAltName": (("DNS", "host2"),)}, {"host2"}),
    ({"subject": ((("commonName", "host1"),),), "subjectAltName": (("IP Address", "10.0.0.1"),)}, set()),
    ({"subject": ((("organizationName", "x"),), (("commonName", "host1"),))}, {"host1"}),
    ({"subject": ((("organizationName", "host1"),),)}, set()),
    ({}, set()),
])  # fmt: skip
def test_a_common_name_counts_only_where_there_is_no_alternative(certificate: dict[str, Any], names: set[str]) -> None:
    assert server.names_in(certificate) == names


def test_the_page_names_the_places_of_libvirt() -> None:
    text = PAGE.read_text()
    for name in ("CA/cacert.pem", "libvirt/servercert.pem", "libvirt/private/serverkey.pem", "libvirt/clientcert.pem",
                 "libvirt/private/clientkey.pem"):  # fmt: skip
        assert f"/etc/pki/{name}" in text
