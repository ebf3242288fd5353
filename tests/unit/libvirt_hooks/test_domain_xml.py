"""Facts parsed from domain XML, and everything that is rejected."""

from __future__ import annotations

import random
import re
from pathlib import Path
from xml.parsers import expat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libvirt_hooks import domain_xml
from libvirt_hooks.domain_xml import DomainXMLError, Interface, parse
from tests.unit.libvirt_hooks import samples

MINIMAL = f"<domain type='kvm'><name>a</name><uuid>{samples.UUID}</uuid>%s</domain>"

BOMB = (
    "<!DOCTYPE domain [<!ENTITY a0 'dos'>"
    + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10))
    + "]><domain type='kvm'><name>&a9;</name></domain>"
)


class TestFacts:
    def test_a_running_domain(self) -> None:
        facts = parse(samples.DOMAIN)
        assert (facts.uuid, facts.name, facts.id, facts.type) == (samples.UUID, "web-1", 7, "qemu")
        assert facts.interfaces == (
            Interface("network", "virbr0", "52:54:00:ab:00:01", "vnet0"),
            Interface("bridge", "br1", "52:54:00:ab:00:02", "vnet1"),
        )

    def test_before_start_there_is_no_tap_and_a_network_is_only_named(self) -> None:
        xml = MINIMAL % "<devices><interface type='network'><source network='default'/></interface></devices>"
        facts = parse(xml.encode())
        assert facts.id is None
        assert facts.interfaces == (Interface("network", "default", None, None),)

    def test_a_domain_without_interfaces(self) -> None:
        assert parse((MINIMAL % "").encode()).interfaces == ()

    @pytest.mark.parametrize(
        ("element", "wanted"),
        [
            ("<interface/>", Interface("", None, None, None)),
            ("<interface type='user'/>", Interface("user", None, None, None)),
            ("<interface type='direct'><source dev='eth0' mode='bridge'/><target dev='macvtap0'/></interface>",
             Interface("direct", None, None, "macvtap0")),
            ("<interface type='bridge'><mac address='rubbish'/><target dev=''/></interface>",
             Interface("bridge", None, None, None)),
        ],
    )  # fmt: skip
    def test_other_interfaces_are_reported_as_they_are(self, element: str, wanted: Interface) -> None:
        assert parse((MINIMAL % f"<devices>{element}</devices>").encode()).interfaces == (wanted,)

    @pytest.mark.parametrize(
        ("element", "wanted"),
        [
            ("<channel type='unix'><target name='org.qemu.guest_agent.0' state='disconnected'/></channel>", True),
            ("<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>", False),
            ("<channel type='unix'/>", False),
            ("<target name='org.qemu.guest_agent.0'/>", False),
        ],
    )
    def test_the_channel_of_a_guest_agent(self, element: str, *, wanted: bool) -> None:
        assert parse((MINIMAL % f"<devices>{element}</devices>").encode()).has_agent_channel is wanted

    @pytest.mark.parametrize("number", ["", "-1", "x", "99999999999999", "1 "])
    def test_an_invalid_id_is_ignored(self, number: str) -> None:
        xml = (MINIMAL % "").replace("<domain ", f"<domain id='{number}' ")
        assert parse(xml.encode()).id is None

    def test_upper_case_uuids_become_lower_case(self) -> None:
        xml = (MINIMAL % "").replace(samples.UUID, f"\n{samples.UUID.upper()}\n")
        assert parse(xml.encode()).uuid == samples.UUID

    def test_names_in_any_script(self) -> None:
        assert parse((MINIMAL % "").replace("<name>a<", "<name>вм-один &lt;1&gt;<").encode()).name == "вм-один <1>"


class TestPortsMetadata:
    def test_as_virsh_metadata_writes_it(self) -> None:
        # virsh metadata VM urn:virt-ports:1 --key vp --set '<ports floor="256" drain-limit="none"/>'
        xml = MINIMAL % (
            "<metadata><app:x xmlns:app='urn:x' floor='1'/>"
            '<vp:ports xmlns:vp="urn:virt-ports:1" floor="256" drain-limit="none"/></metadata>'
        )
        assert parse(xml.encode()).ports_metadata == (("floor", "256"), ("drain-limit", "none"))

    @pytest.mark.parametrize(
        "metadata",
        [
            "",
            "<metadata/>",
            "<metadata><ports floor='256'/></metadata>",
            "<metadata><vp:ports xmlns:vp='urn:virt-ports:2' floor='256'/></metadata>",
            "<metadata><a><vp:ports xmlns:vp='urn:virt-ports:1' floor='256'/></a></metadata>",
            "<metadata><vp:ports xmlns:vp='urn:virt-ports:1' vp:floor='256'/></metadata>",
        ],
    )
    def test_other_metadata_is_ignored(self, metadata: str) -> None:
        assert parse((MINIMAL % metadata).encode()).ports_metadata == ()

    def test_number_and_length_of_attributes_are_bounded(self) -> None:
        many = " ".join(f"a{number}='{'x' * 1000}'" for number in range(1000))
        found = parse((MINIMAL % f"<metadata><ports xmlns='urn:virt-ports:1' {many}/></metadata>").encode())
        assert len(found.ports_metadata) == domain_xml.MAX_METADATA
        assert {len(value) for _, value in found.ports_metadata} == {domain_xml.MAX_METADATA_TEXT}

    def test_forwards_are_children_of_it_and_bounded(self) -> None:
        forwards = "<forward port='2222' to='22' protocol='tcp'/><other port='1'/>" + "<forward port='1'/>" * 1000
        found = parse((MINIMAL % f"<metadata><ports xmlns='urn:virt-ports:1'>{forwards}</ports></metadata>").encode())
        assert found.forwards_metadata[0] == (("port", "2222"), ("to", "22"), ("protocol", "tcp"))
        assert len(found.forwards_metadata) == domain_xml.MAX_FORWARDS


class TestRefused:
    @pytest.mark.parametrize(
        ("xml", "because"),
        [
            ("", "not well-formed"),
            ("<domain", "not well-formed"),
            ("<network/>", "root is <network>"),
            ("<d:domain xmlns:d='urn:x'/>", "root is <{urn:x}domain>"),
            ("<domain/>", "no <uuid>"),
            (f"<domain type='kvm'><uuid>{samples.UUID}</uuid></domain>", "no <name>"),
            (f"<domain><name>a</name><uuid>{samples.UUID}</uuid></domain>", "no type attribute"),
            ("<domain type='kvm'><name>a</name><uuid>4dea22b3</uuid></domain>", "<uuid> that is none"),
            (f"<domain type='kvm'><uuid>{samples.UUID}</uuid><name>{'n' * 5000}</name></domain>", "more than 4096"),
            (f"<!DOCTYPE domain>{MINIMAL % ''}", "document type"),
            (BOMB, "document type"),
            ("<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain>&x;</domain>", "document type"),
            ("<domain>&undefined;</domain>", "undefined entity"),
            ("<?xml version='1.0' encoding='no-such'?><domain/>", "unknown encoding"),
            ("<?xml version='1.0' encoding='utf-7'?><domain/>", "not well-formed"),
            ("<?xml version='1.0' encoding='hex'?><domain/>", "not well-formed"),
            ("<a>" * 50_001, "more than 50000 elements"),
        ],
    )
    def test_the_error_names_the_fault(self, xml: str, because: str) -> None:
        with pytest.raises(DomainXMLError) as caught:
            parse(xml.encode())
        assert because in str(caught.value)
        assert len(str(caught.value)) < 300

    def test_a_document_that_is_too_long(self) -> None:
        with pytest.raises(DomainXMLError, match="longer than"):
            parse(samples.DOMAIN + b" " * domain_xml.MAX_XML)

    @given(st.binary(max_size=300))
    def test_random_bytes(self, data: bytes) -> None:
        with pytest.raises(DomainXMLError):
            parse(data)

    def test_ten_thousand_damaged_documents(self) -> None:
        rng = random.Random(20260704)
        refused = 0
        for _ in range(10_000):
            try:
                facts = parse(samples.stdin(rng))
                assert len(facts.uuid) == 36
            except DomainXMLError:
                refused += 1
        assert refused > 5_000


class TestParser:
    def test_the_installed_expat_is_safe(self) -> None:
        domain_xml.check_parser()

    def test_an_old_expat_is_rejected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(expat, "version_info", (2, 4, 0))
        with pytest.raises(DomainXMLError, match=r"install expat 2\.4\.1 or later"):
            domain_xml.check_parser()


class TestPlain:
    """What libvirt writes is read by the parser's own builder, in a third of the time."""

    def test_what_libvirt_writes_is_plain(self) -> None:
        assert domain_xml._is_plain(samples.DOMAIN)

    @given(st.text(st.characters(codec="utf-8"), max_size=60))
    def test_both_builders_read_the_same(self, text: str) -> None:
        xml = samples.DOMAIN.replace(b"web-1", text.encode())
        outcomes = []
        for document in (xml, b"<!-- -->" + xml):
            try:
                outcomes.append(str(parse(document)))
            except DomainXMLError as error:
                outcomes.append(str(error).partition(":")[0])
        assert outcomes[0] == outcomes[1]

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
    def test_a_document_type_in_another_encoding_is_seen(self, encoding: str) -> None:
        document = f"<?xml version='1.0'?><!DOCTYPE domain>{MINIMAL % ''}".encode(encoding)
        assert not domain_xml._is_plain(document)
        with pytest.raises(DomainXMLError):
            parse(document)


def test_the_xml_of_the_page_about_proxmox() -> None:
    page = Path(__file__).parents[3] / "docs/how-to/proxmox.md"
    (xml,) = re.findall(r'xml="(<domain.*?</domain>)"', page.read_text(), re.DOTALL)
    xml = xml.replace("${1}", "100").replace("$1", "100").replace("$name", "web").replace("$uuid", samples.UUID)
    facts = parse(xml.encode())
    assert (facts.uuid, facts.name, facts.id) == (samples.UUID, "web", 100)
    assert facts.interfaces == (Interface("bridge", "vmbr1", None, "tap100i0"),)
