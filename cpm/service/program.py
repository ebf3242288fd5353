"""Runs a daemon: command line, settings, signals, exit code. Tested in ``tests/unit/cpm/cli/test_with_cpmd.py``."""

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
from cpm.protocol.escaping import escaped
from cpm.service import launch, logs, notify

log = logging.getLogger(__name__)


class Service(Protocol):
    """The composition root of a daemon, as :func:`run` needs it."""

    async def start(self) -> None:
        """
        Start; return when ready to serve.

        :raise VirtPortsError: When it cannot start.
        :raise OSError: When it cannot start.
        """

    async def wait_failed(self) -> None:
        """Return when a task that should never end has ended."""

    def on_hangup(self) -> None:
        """Follow changed settings, or say why not: SIGHUP asks for it."""

    async def stop(self) -> None:
        """Stop serving and release everything."""


class Settings(Protocol):
    """The settings that every daemon has."""

    @property
    def log_level(self) -> str:
        """Lowest level that is logged."""


_Settings = TypeVar("_Settings", bound=Settings)


def version() -> str:
    """Return the installed version."""
    return importlib.metadata.version("virt-ports")


async def serve(service: Service) -> int:
    """
    Run until SIGTERM or SIGINT (return 0), or until a task failed (return 1).

    :raise VirtPortsError: When the service cannot start.
    :raise OSError: When the service cannot start.
    """
    stop_signal = asyncio.Event()
    on_signal = asyncio.get_running_loop().add_signal_handler
    for number in (signal.SIGTERM, signal.SIGINT):
        on_signal(number, stop_signal.set)
    on_signal(signal.SIGHUP, launch.note_hangup)
    await service.start()
    on_signal(signal.SIGHUP, service.on_hangup)
    if launch.take_hangup():
        # What it is about may have changed after it was read.
        service.on_hangup()
    notify.notify("READY=1")
    ends = [asyncio.ensure_future(end) for end in (stop_signal.wait(), service.wait_failed())]  # noqa: TID251
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    notify.notify("STOPPING=1")
    await service.stop()
    return 0 if stop_signal.is_set() else 1


def run(
    parser: argparse.ArgumentParser,
    default: Path,
    load: Callable[[Path], _Settings],
    build: Callable[[_Settings, Path], Service],
    arguments: Sequence[str] | None,
) -> int:
    """
    Run the daemon.

    :param parser: Has the program's name and description; the options of all daemons are added to it.
    :param default: Default path of the settings.
    :param load: Reads the settings; may raise :class:`ConfigError`.
    :param build: Creates the service from the settings and their file, inside the event loop.
    :param arguments: The command line; None: that of the process.
    :return: Exit code: 0 after SIGTERM or SIGINT, 1 when it could not start or a task failed, 2 when the settings are
        wrong.
    """
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help="settings (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="check the settings and exit")
    parser.add_argument("--version", action="version", version=f"{parser.prog} {version()}")
    options = parser.parse_args(arguments)
    launch.hold_signals()
    try:
        settings = load(options.config)
    except ConfigError as error:
        sys.stderr.write(f"{parser.prog}: {escaped(str(error))}\n")
        return 2
    if options.check:
        return 0
    logs.set_up(parser.prog, settings.log_level)

    async def main() -> int:
        return await serve(build(settings, options.config))

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())
    except (VirtPortsError, OSError) as error:
        log.critical("cannot start: %s", error)
        return 1
