"""A daemon as a program: its command line, its settings, its signals, its exit code."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import uvloop

from cpm.protocol.errors import ConfigError, VirtPortsError
from cpm.service import logs, notify

log = logging.getLogger(__name__)


class Service(Protocol):
    """A composition root."""

    async def start(self) -> None:
        """
        Begin to serve.

        :raise VirtPortsError: When that cannot be.
        :raise OSError: When that cannot be.
        """

    async def wait_failed(self) -> None:
        """Wait until a loop that was meant to run for ever ended."""

    async def stop(self) -> None:
        """End in order."""


class Settings(Protocol):
    """What every daemon's settings have."""

    @property
    def log_level(self) -> str:
        """Least level that is logged."""


_Settings = TypeVar("_Settings", bound=Settings)


def version() -> str:
    """Return the installed version."""
    return importlib.metadata.version("virt-ports")


async def serve(service: Service) -> int:
    """Run until told to stop (0) or until a loop failed (1)."""
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    await service.start()
    notify.notify("READY=1")
    ends = [asyncio.ensure_future(end) for end in (asked.wait(), service.wait_failed())]  # noqa: TID251
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    notify.notify("STOPPING=1")
    await service.stop()
    return 0 if asked.is_set() else 1


def run(
    parser: argparse.ArgumentParser,
    default: Path,
    load: Callable[[Path], _Settings],
    build: Callable[[_Settings], Service],
    arguments: Sequence[str] | None,
) -> int:
    """
    Be the program.

    :param parser: Has the program's name and description; gets the options that all daemons have.
    :param default: Where the settings usually are.
    :param load: Reads settings, raising :class:`ConfigError`.
    :param build: Makes the service of them, inside the event loop.
    :param arguments: The command line, or None for the process's own.
    :return: 0 when told to stop, 1 when it could not start or a loop failed, 2 when the settings are wrong.
    """
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help="settings (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="check the settings and exit")
    parser.add_argument("--version", action="version", version=f"{parser.prog} {version()}")
    options = parser.parse_args(arguments)
    try:
        settings = load(options.config)
    except ConfigError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    if options.check:
        return 0
    logs.set_up(parser.prog, settings.log_level)

    async def main() -> int:
        return await serve(build(settings))

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())
    except (VirtPortsError, OSError) as error:
        log.critical("cannot start: %s", error)
        return 1
