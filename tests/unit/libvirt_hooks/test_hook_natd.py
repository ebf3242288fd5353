"""The fake natd against natd's own hook server: the same bytes for the same request, whatever either is sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from libvirt_hooks.domain_xml import DomainFacts
from libvirt_hooks.protocol import HookOperation
from natctl.hook_server import HookServer
from tests.fakes.conformance.hook_socket import EXCHANGES, GOOD, Exchange, exchange
from tests.fakes.hook_natd import ANSWERS, Answer, FakeNatd

Served = Callable[[Path, Answer], contextlib.AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def fake(path: Path, answer: Answer) -> AsyncIterator[None]:
    with FakeNatd(path, answer):
        yield


@contextlib.asynccontextmanager
async def real(path: Path, answer: Answer) -> AsyncIterator[None]:
    """natd's server; what its node would answer is the test's choice."""

    def on_request(number: int, _: HookOperation, facts: DomainFacts) -> None:
        server.answer(number, *ANSWERS.get(answer, ("", facts.name)))

    server = HookServer(path, on_request)
    await server.start()
    try:
        yield
    finally:
        await server.stop()


@pytest.mark.parametrize("served", [fake, real])
@pytest.mark.parametrize("case", EXCHANGES.values(), ids=EXCHANGES)
async def test_what_is_sent_is_answered(tmp_path: Path, served: Served, case: Exchange) -> None:
    async with served(tmp_path / "natd.sock", Answer.PARSE):
        answer = await asyncio.to_thread(exchange, tmp_path / "natd.sock", case.pieces, hangs_up=case.hangs_up)
    assert answer.startswith(case.answer)
    assert answer.endswith(b"\n")
    assert answer.count(b"\n") == 1


@pytest.mark.parametrize("pieces", [(GOOD,), (b"GET / HTTP/1.1\r\n",), (GOOD[:-1],)])
@pytest.mark.parametrize("answer", [*ANSWERS, Answer.PARSE])
async def test_both_answer_in_the_same_words(tmp_path: Path, answer: Answer, pieces: tuple[bytes, ...]) -> None:
    answers = []
    for served in (fake, real):
        path = tmp_path / served.__name__
        async with served(path, answer):
            answers.append(await asyncio.to_thread(exchange, path, pieces, hangs_up=True))
    assert answers[0] == answers[1]
