"""The fake natd against natd's own hook server: the same bytes for the same request, whatever either is sent."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from cpm.protocol.errors import ConfigError
from libvirt_hooks.domain_xml import DomainFacts
from libvirt_hooks.protocol import HookOperation
from natctl import hook_server
from natctl.hook_server import HookServer
from tests.fakes.conformance.hook_socket import EXCHANGES, GOOD, Exchange, exchange
from tests.fakes.hook_natd import ANSWERS, Answer, FakeNatd
from tests.unit.libvirt_hooks.samples import DOMAIN

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


def test_all_is_answered_under_the_event_loop_that_natd_uses(tmp_path: Path) -> None:
    """uvloop's transports are of other classes, and begin and end to read at other times."""

    async def every_exchange() -> None:
        async with real(tmp_path / "natd.sock", Answer.PARSE):
            for case in EXCHANGES.values():
                answer = await asyncio.to_thread(exchange, tmp_path / "natd.sock", case.pieces, hangs_up=case.hangs_up)
                assert answer.startswith(case.answer)
        await test_callers_and_what_is_read_at_once_are_limited(tmp_path, monkeypatch)

    with pytest.MonkeyPatch.context() as monkeypatch, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(every_exchange())


async def test_a_hook_that_is_killed_is_forgotten(tmp_path: Path) -> None:
    asked: list[int] = []
    server = HookServer(tmp_path / "natd.sock", lambda number, *_: asked.append(number))
    await server.start()
    try:
        for request in (GOOD, GOOD[:-1]):
            _, writer = await asyncio.open_unix_connection(tmp_path / "natd.sock")
            writer.write(request)
            await writer.drain()
            while not server._callers:
                await asyncio.sleep(0)
            writer.transport.abort()
            while request == GOOD and not asked:
                await asyncio.sleep(0)
            server.answer(0, "", "too late")
            while server._callers:
                await asyncio.sleep(0)
        assert (asked, len(server._reading), server._asking) == ([0], 0, {})
    finally:
        await server.stop()


async def test_a_request_that_does_not_come_to_its_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook_server, "READ_TIMEOUT_S", 0.05)
    async with real(tmp_path / "natd.sock", Answer.PARSE):
        answer = await asyncio.to_thread(exchange, tmp_path / "natd.sock", (GOOD[:-1],))
    assert answer == b"error protocol the request is incomplete\n"


@pytest.mark.parametrize("pieces", [(GOOD,), (b"GET / HTTP/1.1\r\n",), (GOOD[:-1],)])
@pytest.mark.parametrize("answer", [*ANSWERS, Answer.PARSE])
async def test_both_answer_in_the_same_words(tmp_path: Path, answer: Answer, pieces: tuple[bytes, ...]) -> None:
    answers = []
    for served in (fake, real):
        path = tmp_path / served.__name__
        async with served(path, answer):
            answers.append(await asyncio.to_thread(exchange, path, pieces, hangs_up=True))
    assert answers[0] == answers[1]


async def test_callers_and_what_is_read_at_once_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook_server, "MOST_CALLERS", 3)
    monkeypatch.setattr(hook_server, "MOST_READING", 2)
    server = hook_server.HookServer(tmp_path / "natd.sock", lambda number, *_: server.answer(number, "", "done"))
    await server.start()
    try:
        slow = [await asyncio.open_unix_connection(tmp_path / "natd.sock") for _ in range(3)]
        for _, writer in slow:
            writer.write(b"qemu 1 ")
            await writer.drain()
        while len(server._callers) < 3:
            await asyncio.sleep(0)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "natd.sock")
        assert (await reader.read()).startswith(b"error busy natd serves 3 calls")
        writer.close()
        # The third is read when one of the others has said all.
        assert len(server._reading) == 2
        for reader, writer in slow:
            writer.write(b"start begin 3 0 %d\nweb%s" % (len(DOMAIN), DOMAIN))
            assert await asyncio.wait_for(reader.read(), 60) == b"ok done\n"
            writer.close()
    finally:
        await server.stop()


async def _start(path: Path) -> None:
    server = HookServer(path, lambda *_: None)
    await server.start()
    await server.stop()


@pytest.mark.parametrize("mode", [0o770, 0o757, 0o1777])
async def test_natd_does_not_listen_where_another_user_can(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=r"listen\.socket: users besides root can write to .*/run, and answer"):
        await _start(folder / "natd.sock")
    assert list(folder.iterdir()) == []
    folder.chmod(0o755)
    await _start(folder / "natd.sock")


async def test_natd_does_not_listen_where_another_user_can_put_another_directory(tmp_path: Path) -> None:
    above = tmp_path / "shared"
    (above / "natd").mkdir(parents=True, mode=0o700)
    (tmp_path / "link").symlink_to(above / "natd")
    for mode, is_refused in ((0o777, True), (0o1777, False), (0o755, False)):
        above.chmod(mode)
        for path in (above / "natd" / "natd.sock", tmp_path / "link" / "natd.sock"):
            with pytest.raises(ConfigError) if is_refused else contextlib.nullcontext():
                await _start(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a directory to another user")
async def test_natd_does_not_listen_in_a_directory_of_another_user(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError):
        await _start(folder / "natd.sock")
