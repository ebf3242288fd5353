"""
The settings of a running cpmd: compares the file with what is in force, and follows it.

Tested in tests/unit/cpm/serving/test_live_settings.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from cpm import settings
from cpm.api import handlers, operations
from cpm.api.requests import ReloadRequest
from cpm.api.views import SettingsView, SettingView
from cpm.core.manager import Manager
from cpm.protocol.errors import ConfigError, Conflict
from cpm.settings import Difference, Settings

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """What a file says, compared with the settings in force."""

    file: Path
    digest: str
    """SHA-256 of its text."""
    settings: Settings
    differences: tuple[Difference, ...]

    def view(self) -> SettingsView:
        """Return it for operators."""
        changes = (SettingView(each.key, *_texts(each), each.needs_restart) for each in self.differences)
        return SettingsView(str(self.file), self.digest, tuple(changes))


class LiveSettings:
    """
    The settings in force.

    :param file: Where they come from.
    :param in_force: What it said at the start.
    :param apply: Makes the service follow other settings, which differ only in what needs no restart.
    """

    def __init__(self, file: Path, in_force: Settings, apply: Callable[[Settings], None]) -> None:
        self._file = file
        self.in_force = in_force
        self._apply = apply

    def compare(self) -> Comparison:
        """
        Read the file, and compare it with what is in force.

        :raise ConfigError: When the file cannot be read, or something in it is wrong.
        """
        before = _digest(self._file)
        found = settings.load(self._file)
        if _digest(self._file) != before:
            raise ConfigError(str(self._file), "", "it changed while it was read; try again")
        return Comparison(self._file, before, found, tuple(settings.differences(self.in_force, found)))

    def follow(self, comparison: Comparison) -> None:
        """Follow the file as far as that needs no restart."""
        after = settings.follow(self.in_force, comparison.settings)
        if after != self.in_force:
            self._apply(after)
        # Not before: what could not be followed is a difference still.
        self.in_force = after
        for each in comparison.differences:
            late = ", once cpmd is restarted" if each.needs_restart else ""
            before, now = _texts(each)
            log.info("%s: %s is %s now%s (was %s)", self._file, each.key, now, late, before)

    def reload(self) -> None:
        """Follow the file, or log what is wrong with it and go on as before."""
        try:
            self.follow(self.compare())
        except ConfigError as error:
            log.error("the settings stay as they were: %s", error)


@handlers.query(operations.SETTINGS)
def differences(live: LiveSettings) -> SettingsView:
    """
    Return which settings the file has that are not in force.

    :raise ConfigError: When the file is wrong.
    """
    return live.compare().view()


@handlers.change(operations.RELOAD)
def reload(live: LiveSettings, body: ReloadRequest) -> Callable[[Manager], SettingsView]:
    """
    Follow the file, once it is recorded who asked for it.

    :raise ConfigError: When the file is wrong.
    :raise Conflict: When it is not the one that the operator has seen.
    """
    comparison = live.compare()
    if body.digest is not None and body.digest != comparison.digest:
        raise Conflict(f"{comparison.file} has changed since you saw the differences; look at them again")

    def answer(_: Manager) -> SettingsView:
        live.follow(comparison)
        return comparison.view()

    return answer


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(str(file), "", f"cannot read: {error.strerror}; make it readable for cpmd") from error


def _texts(difference: Difference) -> tuple[str, str]:
    """Return the values of before and after. Who may read settings and logs need not be who may read the file."""
    hide = _without_secrets if difference.key in settings.SECRET else _text
    return hide(difference.before), hide(difference.after)


def _without_secrets(value: object) -> str:
    """Return which server a URL is of: user, password, path and query may each let anybody in who knows them."""
    scheme, found, rest = str(value).partition("://")
    host = rest.partition("/")[0].partition("?")[0].partition("#")[0].rpartition("@")[2]
    return _text(f"{scheme}://{host}/…" if found else value)


def _text(value: object) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()
