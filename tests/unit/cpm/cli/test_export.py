"""``virt-ports export`` against a real cpmd with a ledger: formats, times, and who had ports before."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cpm.core.journal import JournalEvent
from cpm.protocol.messages import Attach, Detach
from cpm.protocol.model import AllocationId, AllocationState, DomainUUID
from cpm.records import lines
from cpm.serving.archive_stream import Before
from tests.fakes import cpmd
from tests.fakes.cpmd import NOW, Site
from tests.unit.cpm.records.entries import entry
from tests.unit.cpm.records.test_ipfix import decoded

WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")
DB = DomainUUID("0c2b4d5e-1111-4222-8333-444455556666")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """``web1`` starts, and an hour later ``db``; then ``web1`` ends."""
    async with cpmd.running() as site:
        await site.ask("POST", "/v1/pool", b'{"addresses":["203.0.113.1"]}')
        async with site.node("host1", "172.30.0.11") as node:
            await node.say(Attach(WEB, "web1"))
            await is_active(site, WEB)
            site.time.passed_s = 3600.0
            await node.say(Attach(DB, "db"))
            await is_active(site, DB)
            await node.say(Detach(WEB, "shutdown"))
            while '"state":"held"' not in (await site.ask("GET", f"/v1/domains/{WEB}")).body:
                await asyncio.sleep(0.005)
            yield site


async def is_active(site: Site, uuid: DomainUUID) -> None:
    while '"active"' not in (await site.ask("GET", f"/v1/domains/{uuid}")).body:
        await asyncio.sleep(0.005)


async def export(site: Site, *words: str, code: int = 0) -> bytes:
    argv = [sys.executable, "-m", "cpm.cli.main", "export", "--socket", site.path, *words]
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == code, err
    return out if code == 0 else err


def steps(text: bytes) -> list[tuple[str, str]]:
    return [(line["name"], line["event"]) for line in map(json.loads, text.splitlines())]


async def test_all_of_the_journal_in_its_order(site: Site) -> None:
    text = await export(site)
    assert steps(text) == [
        *(("web1", "reserved"), ("web1", "active"), ("db", "reserved"), ("db", "active")),
        *(("web1", "draining"), ("web1", "held")),
    ]
    assert tuple(json.loads(text.splitlines()[0])) == lines.FIELDS


async def test_a_time_begins_with_those_who_had_ports_then(site: Site) -> None:
    later = await export(site, "--from", str(NOW + 1800))
    assert steps(later)[0] == ("web1", "active")
    assert steps(later)[1:] == [("db", "reserved"), ("db", "active"), ("web1", "draining"), ("web1", "held")]
    early = await export(site, "--from", str(NOW - 60), "--to", str(NOW + 1800))
    assert steps(early) == [("web1", "reserved"), ("web1", "active")]
    between = await export(site, "--from", str(NOW + 100), "--to", str(NOW + 200))
    assert steps(between) == [("web1", "active")]


async def test_one_address_or_vm(site: Site) -> None:
    assert set(steps(await export(site, "--vm", "db"))) == {("db", "reserved"), ("db", "active")}
    assert steps(await export(site, "--vm", WEB))[0] == ("web1", "reserved")
    assert await export(site, "--address", "203.0.113.2") == b""


async def test_csv_has_the_same_lines(site: Site) -> None:
    rows = list(csv.DictReader(io.StringIO((await export(site, "--format", "csv")).decode())))
    plain = [json.loads(line) for line in (await export(site)).splitlines()]
    assert [row["uuid"] for row in rows] == [line["uuid"] for line in plain]
    assert [int(row["first_port"]) for row in rows] == [line["first_port"] for line in plain]


async def test_ipfix_says_who_gets_ports_and_who_had_them_before(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "all.ipfix"
    await export(site, "--format", "ipfix", "--from", str(NOW + 1800), "--file", str(file))
    ((event, _, post, start, end, *_, user, _, _, _),) = decoded([file.read_bytes()], tmp_path)
    assert event == "16,16"
    assert post == "203.0.113.1,203.0.113.1"
    assert (start, end) == ("1024,1280", "1279,1535")
    assert user == f"{WEB},{DB}"


async def test_a_file_that_exists_is_not_replaced_and_a_failed_one_does_not_stay(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "export.jsonl"
    file.write_text("precious")
    assert b"exists already" in await export(site, "--file", str(file), code=2)
    assert file.read_text() == "precious"
    other = tmp_path / "other.jsonl"
    assert b"exchange" in await export(site, "--from", "-1h", "--to", "-2h", "--file", str(other), code=2)
    assert not other.exists()
    assert b"not a time" in await export(site, "--from", "yesterday-ish", code=2)


def test_before_a_time_the_last_word_about_each_range_counts() -> None:
    before = Before()
    for seq, event in enumerate((
        JournalEvent.RESERVED, JournalEvent.ACTIVE, JournalEvent.EXHAUSTED, JournalEvent.RESIZED, JournalEvent.TRIMMED,
    )):  # fmt: skip
        before.on_entry(entry(event, seq=seq))
    assert [(each.seq, each.event) for each in before.entries()] == [(3, JournalEvent.RESIZED)]
    other = entry(JournalEvent.HELD, seq=9, allocation=AllocationId(4), state=AllocationState.HELD)
    before.on_entry(other)
    before.on_entry(entry(JournalEvent.FREED, seq=10))
    assert before.entries() == [other]
