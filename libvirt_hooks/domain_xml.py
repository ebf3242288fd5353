"""
Parses the few facts we need out of libvirt's domain XML (https://libvirt.org/formatdomain.html).

The XML comes from libvirt, through the hook, but is treated as untrusted: a document type (and so entities) is
rejected, and size and number of elements are bounded. Standard library only, like the whole package. Used by natd.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import ClassVar
from xml.etree import ElementTree as ET  # made safe by _Builder and check_parser
from xml.parsers import expat

MAX_XML = 4 * 1024 * 1024
"""Bytes; real ones have a few thousand."""
MAX_ELEMENTS = 50_000
MAX_TEXT = 4096
"""Characters of one fact."""

SAFE_EXPAT = (2, 4, 1)
"""The first expat that bounds entity expansion (CVE-2013-0340)."""

METADATA_NAMESPACE = "urn:virt-ports:1"
"""
Namespace of our element in ``<metadata>``, as written by
``virsh metadata VM urn:virt-ports:1 --key vp --set '<ports floor="256"/>'``.
"""
MAX_METADATA = 16
"""Attributes of that element that are read; more are ignored."""
MAX_METADATA_TEXT = 128
"""Characters of one attribute; longer values are cut."""

AGENT_CHANNEL = "org.qemu.guest_agent.0"
"""Name of the channel by which libvirt finds a guest agent (qemuFindAgentConfig, src/qemu/qemu_domain.c)."""

MAX_FORWARDS = 256
"""Elements ``<forward>`` in it that are read; more are ignored."""

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class DomainXMLError(ValueError):
    """The XML is not that of a domain, or is not safe to parse; the text says why."""

    code: ClassVar[str] = "domain-xml"


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """One network interface of a domain."""

    type: str
    """``network``, ``bridge``, ``ethernet``, ``direct``, ``user`` …"""
    source: str | None
    """The bridge if the XML names one (libvirt resolves networks to bridges at ``start``), else the network."""
    mac: str | None
    """Lower case with colons. The guest may send from others."""
    target: str | None
    """Name of the tap on the host; None before ``start``, and for types that have none."""


@dataclasses.dataclass(frozen=True, slots=True)
class DomainFacts:
    """The facts of one domain."""

    uuid: str
    """Lower case with dashes."""
    name: str
    id: int | None
    """libvirt's ID of a running domain; None while it does not run, and in some hook calls."""
    type: str
    """``kvm``, ``qemu`` …"""
    interfaces: tuple[Interface, ...]
    """In the order of the XML."""
    has_agent_channel: bool = False
    """Whether it has a channel to a QEMU guest agent; one that is plugged in later is in the live XML only."""
    ports_metadata: tuple[tuple[str, str], ...] = ()
    """Names and values of the attributes of our element in ``<metadata>``, unparsed."""
    forwards_metadata: tuple[tuple[tuple[str, str], ...], ...] = ()
    """The same of each element ``<forward>`` in it, in the order of the XML."""


def parse(xml: bytes) -> DomainFacts:
    """
    Parse a domain's XML; unknown elements are ignored.

    :raise DomainXMLError: When it is not well-formed, has a document type, is too large, is not a ``<domain>``, or
        lacks a type, a name, or a UUID in libvirt's form.
    """
    if len(xml) > MAX_XML:
        raise DomainXMLError(f"the domain XML is longer than {MAX_XML} bytes")
    root = _tree(xml)
    if root.tag != "domain":
        raise DomainXMLError(f"not the XML of a domain: its root is <{root.tag[:64]}>")
    return DomainFacts(
        uuid=_uuid(root),
        name=_required("<name>", root.findtext("name")),
        id=_domain_id(root.get("id")),
        type=_required("type attribute", root.get("type")),
        interfaces=tuple(_interface(element) for element in root.iterfind("devices/interface")),
        has_agent_channel=any(
            target.get("name") == AGENT_CHANNEL for target in root.iterfind("devices/channel/target")
        ),
        ports_metadata=_ours(root.find(_PORTS)),
        forwards_metadata=tuple(_ours(each) for each in itertools.islice(root.iterfind(_FORWARD), MAX_FORWARDS)),
    )


def check_parser() -> None:
    """
    Ensure that Python's XML parser bounds entity expansion; natd calls this once at start.

    :raise DomainXMLError: When expat is older than :data:`SAFE_EXPAT`.
    """
    if expat.version_info < SAFE_EXPAT:
        wanted = ".".join(map(str, SAFE_EXPAT))
        raise DomainXMLError(f"{expat.EXPAT_VERSION} does not bound XML entities; install expat {wanted} or later")


class _Builder(ET.TreeBuilder):
    """Builds the tree and rejects what libvirt never writes: a document type, very many elements."""

    def __init__(self) -> None:
        super().__init__()
        self._elements = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> ET.Element:
        self._elements += 1
        if self._elements > MAX_ELEMENTS:
            raise DomainXMLError(f"the domain XML has more than {MAX_ELEMENTS} elements")
        return super().start(tag, attrs)

    def doctype(self, _name: str, _public: str | None, _system: str | None) -> None:
        raise DomainXMLError("the domain XML has a document type; libvirt writes none")


def _is_plain(xml: bytes) -> bool:
    """
    Return whether XML certainly has nothing that :class:`_Builder` rejects; what libvirt writes is plain.

    Without an XML declaration and a byte order mark it is UTF-8, so that each ``<!`` is seen, with which a document
    type begins.
    """
    return xml.startswith(b"<domain") and b"<!" not in xml and xml.count(b"<") <= MAX_ELEMENTS


def _tree(xml: bytes) -> ET.Element:
    # The parser's own builder takes a third of the time, and libvirt waits.
    target = None if _is_plain(xml) else _Builder()
    parser = ET.XMLParser(target=target)  # noqa: S314 - see _is_plain and _Builder
    try:
        parser.feed(xml)
        root: ET.Element = parser.close()
    except DomainXMLError:
        raise
    except (ET.ParseError, ValueError, LookupError) as error:  # the last two: unknown or unsuitable encodings
        raise DomainXMLError(f"the domain XML is not well-formed: {error}") from None
    return root


def _required(what: str, value: str | None) -> str:
    if not value:
        raise DomainXMLError(f"the domain XML has no {what}")
    if len(value) > MAX_TEXT:
        raise DomainXMLError(f"the domain XML has a {what} of more than {MAX_TEXT} characters")
    return value


def _uuid(root: ET.Element) -> str:
    text = _required("<uuid>", root.findtext("uuid")).strip().lower()
    if not _UUID.fullmatch(text):
        raise DomainXMLError(f"the domain XML has a <uuid> that is none: {text[:64]!r}")
    return text


def _domain_id(text: str | None) -> int | None:
    if text is None or not re.fullmatch(r"[0-9]{1,10}", text):
        return None
    return int(text)


def _interface(element: ET.Element) -> Interface:
    source = element.find("source")
    mac = (_attribute(element.find("mac"), "address") or "").lower()
    return Interface(
        type=element.get("type", "")[:MAX_TEXT],
        source=_attribute(source, "bridge") or _attribute(source, "network"),
        mac=mac if _MAC.fullmatch(mac) else None,
        target=_attribute(element.find("target"), "dev"),
    )


# libvirt keeps one element per namespace.
_PORTS = f"metadata/{{{METADATA_NAMESPACE}}}ports"
_FORWARD = f"{_PORTS}/{{{METADATA_NAMESPACE}}}forward"


def _ours(element: ET.Element | None) -> tuple[tuple[str, str], ...]:
    """Return the attributes of an element of our metadata."""
    attributes = element.attrib.items() if element is not None else ()
    # Attributes in a namespace of their own are not ours.
    return tuple(
        (name, value[:MAX_METADATA_TEXT])
        for name, value in itertools.islice(attributes, MAX_METADATA)
        if "{" not in name and len(name) <= MAX_METADATA_TEXT
    )


def _attribute(element: ET.Element | None, name: str) -> str | None:
    value = None if element is None else element.get(name)
    return value[:MAX_TEXT] if value else None
