"""
Carries out an install on a file system: writes each file completely or not at all, and keeps the manifest.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from cpm.install.plan import MANIFEST, Action, Target, decide
from cpm.protocol.errors import ConfigError

_FORMAT = 1


@dataclasses.dataclass(frozen=True, slots=True)
class FileOutcome:
    """The action for one file: carried out, or in a dry run planned."""

    path: PurePosixPath
    action: Action


class Installer:
    """
    Installs files below a directory.

    :param root: ``/``, or the directory in which an image is mounted.
    :param dry_run: True: write nothing.
    """

    def __init__(self, root: Path, *, dry_run: bool = False) -> None:
        self._root = root
        self._dry_run = dry_run

    def install(self, targets: Iterable[Target], roles: Iterable[str]) -> list[FileOutcome]:
        """
        Write the targets; files that were edited stay as they are.

        Idempotent. When it fails half-way, every file written so far is complete, and the next run continues.

        :param roles: Roles of this machine, for the manifest.
        :return: The outcome for each target, in their order.
        :raise ConfigError: When a file cannot be read or written; it names the file.
        """
        manifest = self._manifest()
        done = []
        for target in targets:
            written = manifest.get(str(target.path))
            action = decide(target, self._read(target.path), written)
            self._carry_out(action, target)
            if action is not Action.KEEP:
                manifest[str(target.path)] = target.sha256
            done.append(FileOutcome(target.path, action))
        self._write(MANIFEST, _manifest_text(manifest, roles), 0o644)
        return done

    def _carry_out(self, action: Action, target: Target) -> None:
        beside = target.path.with_name(f"{target.path.name}.new")
        if action in (Action.CREATE, Action.UPDATE):
            self._write(target.path, target.text, target.mode)
        elif action is Action.KEEP:
            self._write(beside, target.text, 0o644)
        if action is not Action.KEEP:
            self._remove(beside)

    def _manifest(self) -> dict[str, str]:
        content = self._read(MANIFEST)
        if content is None:
            return {}
        try:
            return {str(path): str(sha256) for path, sha256 in json.loads(content)["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            remedy = "not a manifest of virt-ports; move it away: existing files then count as edited"
            raise ConfigError(str(MANIFEST), "", remedy) from None

    def _read(self, path: PurePosixPath) -> bytes | None:
        try:
            return self._real(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(str(path), "", f"cannot read: {error.strerror}; make it a readable file") from error

    def _write(self, path: PurePosixPath, text: str, mode: int) -> None:
        if self._dry_run:
            return
        real = self._real(path)
        try:
            real.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _replace(real, text.encode(), mode)
        except OSError as error:
            raise ConfigError(str(path), "", f"cannot write: {error.strerror}; then run this again") from error

    def _remove(self, path: PurePosixPath) -> None:
        if not self._dry_run:
            with contextlib.suppress(FileNotFoundError):
                self._real(path).unlink()

    def _real(self, path: PurePosixPath) -> Path:
        real = self._root / path.relative_to("/")
        if not real.parent.resolve().is_relative_to(self._root.resolve()):
            raise ConfigError(str(path), "", f"a symbolic link in the path leads out of {self._root}; remove it first")
        return real


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a temporary file and rename it: readers see the old or the new file, also after a crash."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _manifest_text(files: dict[str, str], roles: Iterable[str]) -> str:
    return json.dumps({"format": _FORMAT, "roles": sorted(roles), "files": files}, indent=2) + "\n"
