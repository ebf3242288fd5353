"""Domain XML, and both directions of the hook's protocol."""

from __future__ import annotations

import itertools
import re
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol import codec
from cpm.protocol.model import NodeName, Role
from libvirt_hooks import domain_xml, protocol, qemu
from libvirt_hooks.domain_xml import DomainXMLError
from libvirt_hooks.protocol import HookOperation, HookProtocolError, HookRequest, RequestParser
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.domain_watch import DomainWatch
from natctl.model.commands import Answer, Program, Replace, Send
from natctl.settings import GuestsTable, HostTable
from tests.fuzz.mutation import Material
from tests.unit.libvirt_hooks.samples import DOMAIN

_BOMB: Final = (
    b'<!DOCTYPE d [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(
        b'<!ENTITY %c "&%c;&%c;&%c;&%c;&%c;">' % ((after,) + (before,) * 5)
        for before, after in zip(b"abcdefghij", b"bcdefghijk", strict=True)
    )
    + b"]>"
)
_WISHES: Final = DOMAIN.replace(
    b"<metadata>", b"<metadata><vp:ports xmlns:vp='urn:virt-ports:1' floor='256' cap='4096' weight='10' policy='x'/>"
)
_XML_TOKENS: Final = (
    _BOMB,
    *b"&k; &a; &#0; &#x10FFFF; <![CDATA[ ]]> <!-- --> <domain> </domain> <devices> </devices> </interface>".split(),
    *b"<a> </a>".split(),
    *b"<uuid> </uuid> <name> </name> id='99999999999' ' \" < > &".split(),
    b"<!DOCTYPE domain SYSTEM '/etc/passwd'>",
    b"<?xml version='1.0' encoding='utf-16'?>",
    b"<?xml version='1.0' encoding='rot13'?>",
    b"<?xml encoding='utf-7'?>",
    b"<interface type='bridge'>",
    b"<a b='c' b='d'/>",
    b" xmlns='urn:x'",
    b" xmlns:vp='urn:virt-ports:1'",
    b"<vp:ports floor='1'/>",
    b"<source bridge='br0'/>",
    b"<target dev='vnet9'/>",
    b"<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
)
DOMAINS: Final = Material([DOMAIN, _WISHES, b"<?xml version='1.0' encoding='UTF-8'?>" + DOMAIN], _XML_TOKENS)

_REQUESTS: Final = [
    b"qemu 1 %s %s 5 1 %d\nweb-1-%s" % (operation.value.encode(), suboperation, len(DOMAIN), DOMAIN)
    for operation in HookOperation
    for suboperation in (b"begin", b"end")
] + [b"qemu 1 release end 3 0 0\nweb", b"qemu 1 started - 2 4 0\n\xff\xfexxxx"]
REQUESTS: Final = Material(
    _REQUESTS,
    (
        b"qemu",
        b" ",
        b"\n",
        b"1",
        b"2",
        b"-",
        b"4096",
        b"4194304",
        b"4194305",
        b"99999999",
        b"00",
        b"begin",
        *(operation.value.encode() for operation in HookOperation),
        *_XML_TOKENS[:3],
    ),
)

ANSWERS: Final = Material(
    [b"ok 20000-20063\n", b"ok \n", b"error refuse no port is free\n", b"error protocol x\n"],
    (b"ok", b"error", b"refuse", b" ", b"\n", b"x" * 4096),
)


def understands_domain(data: bytes) -> bool:
    """Parse domain XML."""
    try:
        facts = domain_xml.parse(data)
    except DomainXMLError:
        return False
    assert re.fullmatch(r"[0-9a-f-]{36}", facts.uuid)
    assert 0 < len(facts.name) <= domain_xml.MAX_TEXT
    assert 0 < len(facts.type) <= domain_xml.MAX_TEXT
    assert facts.id is None or 0 <= facts.id < 10**10
    for interface in facts.interfaces:
        texts = (interface.type, interface.source, interface.mac, interface.target)
        assert all(text is None or len(text) <= domain_xml.MAX_TEXT for text in texts)
    assert len(facts.ports_metadata) <= domain_xml.MAX_METADATA
    assert all(len(value) <= domain_xml.MAX_METADATA_TEXT for pair in facts.ports_metadata for value in pair)
    return True


def understands_request(data: bytes) -> bool:
    """Parse a request in two pieces, and the domain XML in it; then answer with what it says."""
    half = len(data) // 2
    parser = RequestParser()
    try:
        request = parser.feed(data[:half])
        if request is None or half < len(data):
            request = parser.feed(data[half:])
    except HookProtocolError as error:
        _check_answer(protocol.error_answer("protocol", str(error)))
        return False
    if request is None:
        return False
    _check_request(request)
    if understands_domain(request.xml):
        _follow(request)
    return True


_LIFE: Final = 400
"""Requests that one node gets before another one takes its place."""
_watches: Final[list[DomainWatch]] = []
_followed: Final = itertools.count()


def _follow(request: HookRequest) -> None:
    """Have a node do what the hook says; what it then tells the manager can be decoded."""
    number = next(_followed)
    if not _watches or number % _LIFE == 0:
        _watches[:] = [_watch()]
    _watches[0].on_hook(number, request.operation, domain_xml.parse(request.xml))


def _watch() -> DomainWatch:
    node = Node(Identity(NodeName("host1"), frozenset({Role.HOST}), IPv4Address("172.30.0.11"), "0"), 0x7FFF)
    node.on_kernel_found([], None, {}, 0.0)
    node.on_connected(0.0)

    def carry_out() -> None:
        for command in node.take():
            if isinstance(command, Send):
                assert codec.decode_node_message(codec.encode(command.message)) == command.message
            elif isinstance(command, Answer):
                _check_answer(protocol.error_answer(command.code or "ok", command.text))
            elif isinstance(command, (Program, Replace)):
                node.on_kernel_programmed(0.0)

    host = HostTable(frozenset({"eth1"}))
    return DomainWatch(node, carry_out, lambda *_: None, host, GuestsTable(), None, None)


def _check_request(request: HookRequest) -> None:
    assert max(map(len, (request.name, request.extra))) <= protocol.MAX_NAME
    assert len(request.xml) <= protocol.MAX_XML
    _check_answer(protocol.ok_answer(request.name))
    _check_answer(protocol.error_answer("refuse", request.extra))


def _check_answer(answer: bytes) -> None:
    assert len(answer) <= protocol.MAX_ANSWER
    assert answer.endswith(b"\n")
    assert answer.count(b"\n") == 1
    answer.decode()


def understands_answer(data: bytes) -> bool:
    """Read natd's answer, as the hook does, and say it."""
    try:
        reason, is_answer = qemu.refusal_reason(data.partition(b"\n")[0].decode("utf-8", "replace")), True
    except qemu.Failure as failure:
        reason, is_answer = str(failure), False
    assert qemu.printable(reason, 800).isprintable()
    return is_answer
