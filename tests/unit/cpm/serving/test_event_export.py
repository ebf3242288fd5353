"""Entries of the journal reach real sockets, a file and a real HTTP server, each once it is there, and none is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cpm.core.manager import Manager
from cpm.ledger import JournalReader
from cpm.protocol.errors import ConfigError
from cpm.protocol.messages import Attach, Detach
from cpm.protocol.model import AllocationState, Role
from cpm.serving import event_export, event_sinks
from cpm.serving.event_export import JOURNAL, NODES, EventExport, Position, Record, exports, metrics
from cpm.serving.event_sinks import sinks
from cpm.serving.journal_thread import JournalThread
from cpm.settings import EventsSettings, load
from tests.fakes import cpmd
from tests.promtool import check_metrics
from tests.unit.cpm.records.test_ipfix import decoded
from tests.unit.cpm.records.test_syslog import MESSAGE
from tests.unit.cpm.serving.sites import DB, OTHER, WEB, Site

HOUR = 3600.0

PATIENCE_S = 60.0


class Exporting:
    """One place that is told the entries of a site's journal, from the beginning on."""

    def __init__(self, site: Site, folder: Path, settings: EventsSettings, record: Record = JOURNAL) -> None:
        self._thread = JournalThread(site.ledger.reader())
        (sink,) = sinks(settings, has_ports=record is JOURNAL)
        self.export = EventExport(sink, folder, self._thread, lambda: site.loop.next_commit, record)
        self._task = asyncio.create_task(self.export.run())

    @property
    def is_over(self) -> bool:
        return self._task.done()

    async def end(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._thread.stop()


@contextlib.asynccontextmanager
async def exporting(site: Site, folder: Path, record: Record = JOURNAL, **settings: Any) -> AsyncIterator[EventExport]:
    """Tell it all entries, since its position says that it has none yet."""
    exporting = Exporting(site, folder, EventsSettings(**settings), record)
    try:
        yield exporting.export
    finally:
        await exporting.end()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Positions at the begin of the journal for every place."""
    for name in ("syslog", "ipfix", "file", "webhook"):
        Position(tmp_path / "events" / f"{name}.position").write(0)
        Position(tmp_path / "events" / f"{name}-nodes.position").write(0)
    return tmp_path / "events"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_export, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(event_export, "LONGEST_PAUSE_S", 0.1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def newest(site: Site) -> int:
    with site.ledger.reader() as reader:
        return reader.latest_seq()


async def another(site: Site) -> None:
    """Something happens: a VM starts or ends."""
    if AllocationState.ACTIVE in site.states(DB):
        await site.say(Detach(DB, "shutdown"))
    else:
        await site.say(Attach(DB, "db"))


async def test_the_machines_own_syslog_gets_messages_of_rfc_5424(site: Site, folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        log.setblocking(False)
        async with exporting(site, folder, syslog=f"unix://{tmp_path / 'log'}"):
            loop = asyncio.get_running_loop()
            got = [await asyncio.wait_for(loop.sock_recv(log, 65536), PATIENCE_S) for _ in range(newest(site))]
    found = [MESSAGE.fullmatch(message) for message in got]
    assert all(found)
    assert [match[6] for match in found if match] == [b"reserved", b"active"]


async def test_a_syslog_that_is_away_gets_everything_when_it_is_back(site: Site, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    async with exporting(site, folder, syslog=f"unix://{path}") as export:
        await until(lambda: export.counts.failures >= 2)
        assert export.counts.is_failing
        assert 'virt_ports_events_failing{to="syslog"} 1' in "".join(metrics([export]))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.bind(str(path))
            await until(lambda: export.counts.delivered == newest(site))
            assert not export.counts.is_failing
            assert b" reserved [" in log.recv(65536)


async def test_a_full_local_queue_delays_and_loses_nothing(site: Site, folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        filler.setblocking(False)
        filler.connect(str(tmp_path / "log"))
        with filler, contextlib.suppress(BlockingIOError):
            while True:
                filler.send(b"full")
        async with exporting(site, folder, syslog=f"unix://{tmp_path / 'log'}") as export:
            await asyncio.sleep(0.1)
            assert export.counts.delivered == 0
            got: list[bytes] = []
            log.setblocking(False)
            while len(got) < newest(site):
                with contextlib.suppress(BlockingIOError):
                    got += [message for message in [log.recv(65536)] if message != b"full"]
                await asyncio.sleep(0)
            assert [b" reserved [" in got[0], b" active [" in got[1]] == [True, True]


async def test_syslog_over_tcp_counts_octets_and_connects_again(site: Site, folder: Path) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                size = int(await reader.readuntil(b" "))
                got.put_nowait(await reader.readexactly(size))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with exporting(site, folder, syslog=f"tcp://127.0.0.1:{port}") as export:
        first = [await asyncio.wait_for(got.get(), PATIENCE_S) for _ in range(newest(site))]
        assert all(map(MESSAGE.fullmatch, first))
        writers[0].close()
        await asyncio.sleep(0.1)
        await another(site)
        assert b'name="db"' in await asyncio.wait_for(got.get(), PATIENCE_S)
        await until(lambda: export.counts.delivered == newest(site))
        assert len(writers) == 2
    for writer in writers:
        writer.close()
    server.close()


async def test_an_ipfix_collector_is_told_who_gets_ports(site: Site, folder: Path, tmp_path: Path) -> None:
    await another(site)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector:
        collector.bind(("127.0.0.1", 0))
        collector.setblocking(False)
        address = f"127.0.0.1:{collector.getsockname()[1]}"
        async with exporting(site, folder, ipfix=address, ipfix_domain=5):
            message = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(collector, 65536), PATIENCE_S)
    (row,) = decoded([message], tmp_path)
    assert row[0] == "16,16"
    assert row[7] == f"{WEB},{DB}"
    assert row[10] == "5"


async def test_an_ipfix_collector_over_tcp_gets_the_template_once_a_connection(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    connections: list[list[bytes]] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        connections.append([])
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(4)
                connections[-1].append(head + await reader.readexactly(int.from_bytes(head[2:]) - 4))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with exporting(site, folder, ipfix=f"tcp://127.0.0.1:{port}", ipfix_domain=5) as export:
        await until(lambda: export.counts.delivered == newest(site) and len(connections[0]) == 2)
        await another(site)
        await until(lambda: len(connections[0]) == 3)
        writers[0].close()
        await asyncio.sleep(0.1)
        await site.add(OTHER)
        await another(site)
        await another(site)
        await until(lambda: len(connections) == 2 and len(connections[1]) >= 2)
    for writer in writers:
        writer.close()
    server.close()
    for messages in connections:
        sets = [int.from_bytes(message[16:18]) for message in messages]
        assert sets == [2, *[256] * (len(messages) - 1)], "the template first, and once"
        assert int.from_bytes(messages[1][8:12]) == 0, "each connection counts its own records"
    rows = decoded(connections[0], tmp_path)
    assert [row[0] for row in rows] == ["", "16", "16"]
    assert rows[2][7] == DB


async def test_what_becomes_of_nodes_is_told_too(site: Site, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    await site.approve("edge9", "172.30.0.29", Role.EDGE)
    async with exporting(site, folder, NODES, file=str(path)) as export:
        assert export.name == "file-nodes"
        await until(lambda: b"edge9" in (path.read_bytes() if path.exists() else b""))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    [line] = [line for line in lines if line["node"] == "edge9"]
    assert (line["record"], line["event"], line["why"]) == ("nodes", "approved", "as edge at 172.30.0.29")
    assert [each["seq"] for each in lines] == [*range(1, len(lines) + 1)]


async def test_syslog_gets_nodes_as_messages_of_rfc_5424(site: Site, folder: Path, tmp_path: Path) -> None:
    await site.approve("edge9", "172.30.0.29", Role.EDGE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        log.setblocking(False)
        async with exporting(site, folder, NODES, syslog=f"unix://{tmp_path / 'log'}"):
            message = b""
            while b"edge9" not in message:
                message = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(log, 65536), PATIENCE_S)
    found = MESSAGE.fullmatch(message)
    assert found is not None
    assert found[6] == b"approved"
    assert message.endswith(b"] node edge9: approved: as edge at 172.30.0.29")


async def test_that_the_clock_was_set_is_told_once_with_its_place_in_the_journal(tmp_path: Path) -> None:
    file, log_path = tmp_path / "events.jsonl", tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(log_path))
        log.setblocking(False)
        places = EventsSettings(file=str(file), syslog=f"unix://{log_path}", state=str(tmp_path / "state"))
        async with cpmd.running(events=places) as running, running.node("host1", "172.30.0.11") as node:
            await running.ask("POST", "/v1/pool", b'{"addresses":["203.0.113.1"]}')
            await until(lambda: len([*(tmp_path / "state").glob("*-clock.position")]) == 2)
            await node.say(Attach(WEB, "web"))
            await until(lambda: file.exists() and file.read_text().count('"uuid"') == 2)
            for by_s in (HOUR, -2 * HOUR):
                running.time.set_by_s += by_s
                await running.cpmd.decisions.do(Manager.tick)
            await until(lambda: file.read_text().count('"clock"') == 2)
            message = b""
            while b"clock-set" not in message:
                message = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(log, 65536), PATIENCE_S)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = [line for line in lines if line.get("record") == "clock"]
    assert [(each["seq"], each["event"], each["by_s"]) for each in found] == [
        (1, "clock-set", HOUR), (2, "clock-set", -2 * HOUR),
    ]  # fmt: skip
    assert {each["after"] for each in found} == {2}, "the last entry of the journal"
    assert found[0]["at"] == cpmd.NOW + HOUR
    match = MESSAGE.fullmatch(message)
    assert match is not None
    assert match[6] == b"clock-set"
    assert message.endswith(b"] manager's clock forward 3600.0 s")


def test_each_record_has_sinks_and_a_position_of_its_own(tmp_path: Path) -> None:
    settings = EventsSettings(syslog="unix:///dev/log", ipfix="127.0.0.1:4739", file="/x", webhook="http://x")
    others = ("syslog", "file", "webhook")
    found = [each.name for each in exports(settings, tmp_path, None, asyncio.Event)]  # type: ignore[arg-type]
    assert found == ["syslog", "ipfix", "file", "webhook", *(f"{name}-nodes" for name in others),
                     *(f"{name}-clock" for name in others)]  # fmt: skip


async def test_a_file_gets_each_line_whole_and_once(site: Site, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    async with exporting(site, folder, file=str(path)) as export:
        await until(lambda: export.counts.delivered == newest(site))
        path.rename(tmp_path / "rotated")
        await another(site)
        await until(lambda: export.counts.delivered == newest(site))
    text = (tmp_path / "rotated").read_text() + path.read_text()
    assert [json.loads(line)["seq"] for line in text.splitlines()] == [*range(1, newest(site) + 1)]
    assert path.stat().st_mode & 0o777 == 0o640


async def test_a_file_that_is_a_link_is_not_written_to(site: Site, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    async with exporting(site, folder, file=str(tmp_path / "link")) as export:
        await until(lambda: export.counts.failures)
    assert (tmp_path / "target").read_text() == ""


@pytest.mark.parametrize("is_read", [False, True])
async def test_a_pipe_is_not_written_to_and_holds_up_no_end_of_cpmd(
    site: Site, folder: Path, tmp_path: Path, *, is_read: bool
) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK) if is_read else None
    async with exporting(site, folder, file=str(tmp_path / "pipe")) as export:
        try:
            async with asyncio.timeout(10):
                await until(lambda: export.counts.failures)
        finally:
            os.close(reader if reader is not None else os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK))


class Hooked:
    """An HTTP server that is told entries; it can answer otherwise than it should."""

    def __init__(self) -> None:
        self.status = 204
        self.posts: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.taken: list[int] = []
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def _post(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.posts.append(body)
        self.headers.append(request.headers)
        if self.status == 0 and request.transport is not None:
            request.transport.abort()
        elif 200 <= self.status < 300:
            self.taken += [event["seq"] for event in body["events"] if "record" not in event]
        return web.Response(status=self.status or 200, headers={"Location": "/elsewhere"})

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/hook", self._post)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()


async def test_a_webhook_that_fails_and_comes_back_gets_every_entry_once(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret\n")
    hooked = Hooked()
    await hooked.start()
    settings: dict[str, Any] = {
        "webhook": f"http://127.0.0.1:{hooked.port}/hook",
        "webhook_token_file": str(tmp_path / "token"),
    }
    async with exporting(site, folder, **settings) as export:
        await until(lambda: hooked.taken == [*range(1, newest(site) + 1)])
        assert hooked.headers[0]["Authorization"] == "Bearer secret"
        assert hooked.posts[0]["events"][0]["event"] == "reserved"
        for status in (503, 400, 302, 0):
            hooked.status, failures = status, export.counts.failures
            await another(site)
            await until(lambda: export.counts.failures >= failures + 2)  # noqa: B023 - awaited here
        await hooked.stop()
        failures = export.counts.failures
        await another(site)
        await until(lambda: export.counts.failures > failures)
        hooked.status = 200
        await hooked.start()
        await until(lambda: export.counts.delivered == newest(site))
    assert hooked.taken == [*range(1, newest(site) + 1)]
    assert "/elsewhere" not in str(hooked.posts)
    await hooked.stop()


@pytest.mark.parametrize(
    "settings",
    [
        {"webhook": "http://127.0.0.1:1/", "webhook_token_file": "TOKEN"},  # which is not a text
        {"webhook": "http://user:secret@[::1"},
        {"syslog": "udp://a..b:514"},
        {"syslog": "tcp://a..b:514"},
        {"ipfix": "a..b:4739"},
        {"file": "/a\0b"},
    ],
)
async def test_nothing_that_a_place_has_ends_the_export_and_the_manager(
    site: Site, folder: Path, tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe\0")
    settings = {key: str(tmp_path / "token") if value == "TOKEN" else value for key, value in settings.items()}
    exporting = Exporting(site, folder, EventsSettings(**settings))
    await until(lambda: exporting.export.counts.failures >= 3 or exporting.is_over)
    assert not exporting.is_over
    assert caplog.text.count("cannot deliver events") == 1
    assert "secret" not in caplog.text
    await exporting.end()


async def test_after_a_restart_it_goes_on_where_it_stopped(site: Site, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    async with exporting(site, folder, file=str(path)) as export:
        await until(lambda: export.counts.delivered == newest(site))
    await another(site)
    await site.add(OTHER)
    async with exporting(site, folder, file=str(path)) as export:
        await until(lambda: export.counts.delivered)
        assert export.counts.lost == 0
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [*range(1, newest(site) + 1)]


@pytest.mark.parametrize("position", [None, "rubbish", "999999", ""])
async def test_without_a_position_in_this_ledger_it_begins_with_what_is_new(
    site: Site, folder: Path, tmp_path: Path, position: str | None
) -> None:
    kept, path, before = folder / "file.position", tmp_path / "events.jsonl", newest(site)
    kept.write_text(position) if position is not None else kept.unlink()
    async with exporting(site, folder, file=str(path)) as export:
        await until(lambda: re.fullmatch(rf"{before}\n", kept.read_text() if kept.exists() else ""))
        await another(site)
        await until(lambda: export.counts.delivered)
    assert json.loads(path.read_text().splitlines()[0])["seq"] == before + 1


async def test_what_the_journal_no_longer_has_is_counted(
    site: Site, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = JournalReader.events
    monkeypatch.setattr(JournalReader, "events", lambda self, seq, limit: whole(self, max(seq, 1), limit))
    async with exporting(site, folder, file=str(tmp_path / "events.jsonl")) as export:
        await until(lambda: export.counts.delivered)
        assert (export.counts.lost, export.counts.delivered) == (1, newest(site) - 1)
        text = "".join(metrics([export]))
    assert 'virt_ports_events_lost_total{to="file"} 1' in text
    assert check_metrics(text) == ""


async def test_a_place_that_hangs_holds_up_nothing_else(site: Site, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        async with exporting(site, folder, syslog=f"tcp://127.0.0.1:{deaf.getsockname()[1]}"):
            await asyncio.wait_for(site.loop.do(Manager.tick), PATIENCE_S)
            await another(site)
    assert event_sinks.LIMIT_S <= 30


async def test_cpmd_delivers_to_all_places_that_are_set(tmp_path: Path) -> None:
    hooked, file = Hooked(), tmp_path / "events.jsonl"
    await hooked.start()
    places = EventsSettings(
        file=str(file), webhook=f"http://127.0.0.1:{hooked.port}/hook", state=str(tmp_path / "state")
    )
    async with cpmd.running(events=places) as running, running.node("host1", "172.30.0.11") as node:
        await running.ask("POST", "/v1/pool", b'{"addresses":["203.0.113.1"]}')
        await until(lambda: len([*(tmp_path / "state").glob("*.position")]) == 6)
        await node.say(Attach(WEB, "web"))
        await until(lambda: hooked.taken == [1, 2] and file.exists() and file.read_text().count('"uuid"') == 2)
        # A position is written after its delivery, beside its former file.
        written = [tmp_path / "state" / f"{place}.position" for place in ("file", "webhook")]
        await until(lambda: [path.read_text() for path in written] == ["2\n", "2\n"])
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "file-clock.position", "file-nodes.position", "file.position",
        "webhook-clock.position", "webhook-nodes.position", "webhook.position",
    ]  # fmt: skip
    await hooked.stop()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('syslog = "udp://host"', "events.syslog"),
        ('syslog = "/dev/log"', "events.syslog"),
        ('ipfix = "collector"', "events.ipfix"),
        ('webhook = "ftp://x"', "events.webhook"),
        ('file = "events.jsonl"', "events.file"),
        ("ipfix_domain = 4294967296", "events.ipfix_domain"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, text: str, key: str) -> None:
    file = tmp_path / "cpmd.toml"
    file.write_text(f"[events]\n{text}\n")
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert raised.value.key == key
