"""
``virt-ports export``: who had which ports in a time, for archives and for answers to the authorities.

Tested in ``tests/unit/cpm/cli/test_export.py``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from cpm.cli import parsing, render, times
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.ledger_errors import LedgerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.api.views import RecordView
    from cpm.records.ipfix import Block

_EXAMPLES = """\
  virt-ports export --from 2026-10-01 --to 2026-11-01 --file october.jsonl
  virt-ports export --from -2h --format csv             for a spreadsheet
  virt-ports export --address 203.0.113.1 --from 2026-11-23T06:00Z --to 2026-11-23T07:00Z
  virt-ports export --format ipfix --file all.ipfix     for an IPFIX tool (RFC 5655)"""

_ABOUT = """\
The first lines say who had ports when the time began, the others what happened
in it. TIME is as for `virt-ports whois`. With --format ipfix there are only
blocks of ports that a VM gets and gives back (RFC 8158). The fields of jsonl and
csv are those of the journal's files."""

VERB = parsing.Verb(115, "write the journal of a time to a file", about=_ABOUT, examples=_EXAMPLES)

FORMATS = ("jsonl", "csv", "ipfix")
READ_S = 600.0
"""Seconds in which the manager has to say something."""
SAID_EVERY = 200
"""Entries between two words about progress."""
TOGETHER = 1000
"""Records of which IPFIX messages are made at once."""


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("--from", metavar="TIME", dest="begin", help="begin (default: all that the journal has)")
    verb.add_argument("--to", metavar="TIME", dest="end", help="end (default: now)")
    verb.add_argument("--address", metavar="ADDRESS", help="only this external address")
    verb.add_argument("--vm", metavar="VM", help="only VMs of that name or UUID")
    verb.add_argument("--format", choices=FORMATS, default="jsonl", help="default: %(default)s")
    verb.add_argument("--file", metavar="FILE", help="a new file (default: standard output)")


def run(args: argparse.Namespace) -> int:
    """Write the export."""
    from cpm.api.operations import EXPORT
    from cpm.cli import progress

    begin, end = _moment(args.begin, parsing.now(args)), _moment(args.end, parsing.now(args))
    client = parsing.client(args)
    # Before the first line, the manager may have to read a year.
    client.timeout_s = READ_S
    stream = client.stream(EXPORT, begin=begin, end=end)
    with progress.line(fills_stdout=args.file is None) as say, _output(args.file) as file:
        say("the manager reads its journal")
        records = (each for each in _counted(stream, say) if _is_asked_for(args, each))
        for chunk in _FORMATS[args.format](records, begin):
            file.write(chunk)
    return 0


def _counted(records: Iterable[RecordView], say: Callable[[str], None]) -> Iterator[RecordView]:
    """Yield the records, and say how many there were and until when."""
    for number, each in enumerate(records, 1):
        if number % SAID_EVERY == 0:
            say(f"{number} entries, until {render.moment(each.at)}")
        yield each


def _moment(text: str | None, now: float) -> float | None:
    try:
        return times.parse(text, now) if text is not None else None
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _is_asked_for(args: argparse.Namespace, record: RecordView) -> bool:
    has_address = args.address is None or str(record.external) == args.address
    return has_address and (args.vm is None or args.vm in (record.name, record.uuid))


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[BinaryIO]:
    """Yield standard output or a new file; a file that could not be completed is removed."""
    from cpm.service import files

    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    try:
        with target.open("xb") as file:
            try:
                yield file
                # Whoever keeps it may delete what it is a copy of.
                files.sync(file)
            except BaseException:
                target.unlink()
                raise
    except FileExistsError as error:
        raise InvalidRequest(f"{target} exists already; give the export another name") from error
    except OSError as error:
        raise LedgerError(f"cannot write {target}: {error.strerror}; choose another folder") from error


def _jsonl(records: Iterable[RecordView], _: float | None) -> Iterator[bytes]:
    from cpm.protocol import codec

    for record in records:
        yield codec.encode(record) + b"\n"


def _csv(records: Iterable[RecordView], _: float | None) -> Iterator[bytes]:
    from msgspec import structs

    from cpm.records import lines

    yield lines.csv_header().encode()
    for record in records:
        yield lines.csv_line(structs.asdict(record)).encode()


def _ipfix(records: Iterable[RecordView], begin: float | None) -> Iterator[bytes]:
    from cpm.records.ipfix import Exporter
    from cpm.service import clock

    exporter, blocks = Exporter(0), _blocks(records, begin)
    while part := list(islice(blocks, TOGETHER)):
        yield from exporter.messages(part, clock.wall().seconds)


def _blocks(records: Iterable[RecordView], begin: float | None) -> Iterator[Block]:
    from cpm.core.journal import JournalEvent
    from cpm.records import ipfix

    for each in records:
        event = ipfix.event_of(JournalEvent(each.event))
        if begin is not None and each.at < begin:
            # Who had ports already: there is no entry of the time for them.
            event = ipfix.ALLOCATED
        if event is not None:
            addresses = each.internal, each.external
            yield ipfix.Block(int(each.at * 1000), event, *addresses, each.first_port, each.last_port, each.uuid)


_FORMATS = {"jsonl": _jsonl, "csv": _csv, "ipfix": _ipfix}
