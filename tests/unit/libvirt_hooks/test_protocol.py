"""The request parser: whole requests, requests in pieces, and damaged ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from libvirt_hooks import protocol
from libvirt_hooks.protocol import HookOperation, HookProtocolError, HookRequest, RequestParser
from tests.fakes.hook_request import encode, parse_request, request_bytes

RAW = st.binary(max_size=200).map(lambda data: data.decode("utf-8", "surrogateescape"))
REQUESTS = st.builds(
    HookRequest,
    operation=st.sampled_from(HookOperation),
    suboperation=st.one_of(st.just("-"), st.from_regex(r"\A[A-Za-z]{1,16}\Z")),
    name=RAW,
    extra=RAW,
    xml=st.binary(max_size=2000),
)


def feed_pieces(data: bytes, cuts: list[int]) -> HookRequest | None:
    parser = RequestParser()
    request = None
    ends = [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in zip([0, *ends], ends, strict=False):
        assert request is None or start == end == len(data)
        request = parser.feed(data[start:end])
    return request


class TestParse:
    @given(REQUESTS)
    def test_what_the_hook_sends_is_parsed(self, request_: HookRequest) -> None:
        assert parse_request(encode(request_)) == request_

    @given(REQUESTS, st.lists(st.integers(0, 5000), max_size=8))
    def test_pieces_make_no_difference(self, request_: HookRequest, cuts: list[int]) -> None:
        assert feed_pieces(encode(request_), cuts) == request_

    @given(REQUESTS, st.integers(0, 5000))
    def test_every_beginning_needs_more(self, request_: HookRequest, cut: int) -> None:
        data = encode(request_)
        assert parse_request(data[: cut % len(data)]) is None

    @given(REQUESTS, st.binary(min_size=1, max_size=50))
    def test_more_than_announced_is_an_error(self, request_: HookRequest, more: bytes) -> None:
        with pytest.raises(HookProtocolError, match=f"^{len(more)} bytes too many"):
            parse_request(encode(request_) + more)

    @given(st.binary(max_size=400))
    @example(b"")
    def test_any_bytes_are_a_request_or_unfinished_or_an_error(self, data: bytes) -> None:
        try:
            request = parse_request(data)
        except HookProtocolError:
            return
        assert request is None or encode(request) == data

    def test_ten_thousand_damaged_requests(self) -> None:
        rng = random.Random(20260703)
        whole = request_bytes(xml=b"<domain/>" * 20)
        refused = 0
        for _ in range(10_000):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(60)] = rng.randrange(256)
            try:
                parse_request(bytes(data))
            except HookProtocolError:
                refused += 1
        assert refused > 1_000


class TestLimits:
    @pytest.mark.parametrize(
        "header",
        [
            b"qemu 1 start begin 1 1 1 \n",
            b"qemu 1 start begin 1 1\n",
            b"qemu 1 start begin -1 1 1\n",
            b"qemu 1 start begin +1 1 1\n",
            b"qemu 1 start begin 1_0 1 1\n",
            b"qemu 1 start begin 01 1 1\n",
            "qemu 1 start begin ١ 1 1\n".encode(),
            b"qemu 1 explode begin 1 1 1\n",
            b"qemu 2 start begin 1 1 1\n",
            b"lxc 1 start begin 1 1 1\n",
            b"QEMU 1 START begin 1 1 1\n",
            b"qemu 1 start be-gin 1 1 1\n",
            b"qemu 1 start begin 4097 1 1\n",
            b"qemu 1 start begin 1 4097 1\n",
            b"qemu 1 start begin 1 1 4194305\n",
            b"qemu 1 start begin 1 1 999999999999999999999\n",
            b"qemu 1 start begin 1 1 1\r\n",
            b"\n",
            b"GET / HTTP/1.1\r\n",
        ],
    )
    def test_wrong_headers(self, header: bytes) -> None:
        with pytest.raises(HookProtocolError):
            parse_request(header)

    def test_a_header_that_does_not_end(self) -> None:
        parser = RequestParser()
        assert parser.feed(b"q" * (protocol.MAX_HEADER - 1)) is None
        with pytest.raises(HookProtocolError, match="no header line"):
            parser.feed(b"q")

    def test_the_longest_header_fits(self) -> None:
        header = b"qemu 1 reconnect %s 4096 4096 4194304\n" % (b"x" * 16)
        assert len(header) < protocol.MAX_HEADER
        assert parse_request(header) is None

    def test_a_later_version_is_rejected_with_a_remedy(self) -> None:
        with pytest.raises(HookProtocolError, match="install its hook"):
            parse_request(b"qemu 2 start begin 0 0 0\n")


class TestAnswers:
    @given(st.text())
    def test_one_line_that_fits(self, text: str) -> None:
        for line in (protocol.ok_answer(text), protocol.error_answer("refuse", text)):
            assert line.endswith(b"\n")
            assert len(line) <= protocol.MAX_ANSWER
            assert len(line.decode().splitlines()) == 1

    def test_long_texts_are_cut_between_characters(self) -> None:
        line = protocol.ok_answer("ü" * protocol.MAX_ANSWER)
        assert len(line) in (protocol.MAX_ANSWER - 1, protocol.MAX_ANSWER)
        assert set(line.decode()) == {*"ok ü\n"}

    def test_a_name_with_any_bytes_can_be_answered(self) -> None:
        assert protocol.ok_answer("a\udcffb") == b"ok a\\udcffb\n"

    @pytest.mark.parametrize("code", ["", "two words", "Refuse", "a\nb"])
    def test_a_code_is_one_word(self, code: str) -> None:
        with pytest.raises(ValueError, match="not a code"):
            protocol.error_answer(code, "text")
