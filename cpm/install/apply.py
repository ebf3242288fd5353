"""
Carries out an install on a file system: writes each file completely or not at all, and keeps the manifest.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from cpm.install.plan import MANIFEST, Action, FileOutcome, Target, decide
from cpm.protocol.errors import ConfigError
from cpm.service import files

_FORMAT = 1


class Installer:
    """
    Installs files below a directory.

    :param root: ``/``, or the directory in which an image is mounted.
    :param dry_run: True: write nothing.
    :param reason_not_to_run: Executes a file as libvirt would, and returns why it does not run, with a remedy; an empty
        string when it runs. None: not asked, because the files are for another machine.
    """

    def __init__(
        self, root: Path, *, dry_run: bool = False, reason_not_to_run: Callable[[Path], str] | None = None
    ) -> None:
        self._root = root
        self._dry_run = dry_run
        self._reason_not_to_run = reason_not_to_run if not dry_run else None

    def install(self, targets: Iterable[Target], roles: Iterable[str]) -> list[FileOutcome]:
        """
        Write the targets; files that were edited stay as they are.

        Idempotent. When it fails half-way, every file written so far is complete, and the next run continues.

        :param roles: Roles of this machine, for the manifest.
        :return: The outcome for each target, in their order.
        :raise ConfigError: When a file cannot be read or written; it names the file.
        """
        manifest = self._manifest()

        def keep() -> None:
            self._write(Target(MANIFEST, manifest_text(manifest.files, roles)), MANIFEST, 0o644)

        done = [self._install(target, manifest.files, keep) for target in targets]
        keep()
        return done

    def refresh(self, targets: Iterable[Target]) -> list[FileOutcome]:
        """
        Bring what an earlier install wrote, and is still there, up to this version; write nothing else.

        :return: As for :meth:`install`, for the targets of the earlier install only.
        :raise ConfigError: As for :meth:`install`.
        """
        manifest = self._manifest()
        written = [each for each in targets if str(each.path) in manifest.files and self._read(each.path) is not None]
        return self.install(written, manifest.roles) if written else []

    def former_roles(self) -> frozenset[str]:
        """Return the roles of the install before; none: there was none. :raise ConfigError: As for :meth:`install`."""
        return self._manifest().roles

    def _install(self, target: Target, files: dict[str, str], keep: Callable[[], None]) -> FileOutcome:
        packaged = self._read(target.packaged) if target.packaged is not None else None
        action = decide(target, self._read(target.path), files.get(str(target.path)), packaged)
        if action is Action.CREATE:
            # Listed before it is there: were this process killed in between, no uninstall would find it.
            files[str(target.path)] = target.sha256
            keep()
        outcome = self._carry_out(action, target)
        if outcome.action in (Action.TAKE_AWAY, Action.REMOVE):
            files.pop(str(target.path), None)
        elif outcome.action not in (Action.KEEP, Action.PACKAGED):
            files[str(target.path)] = target.sha256
        return outcome

    def _carry_out(self, action: Action, target: Target) -> FileOutcome:
        if target.staging is not None:
            self._remove_leftovers(target)
        if action is Action.KEEP:
            self._write(target, target.beside, 0o644)
            return FileOutcome(target.path, action, beside=target.beside)
        try:
            if action in (Action.CREATE, Action.UPDATE):
                self._write(target, target.path, target.mode)
            elif action is Action.REMOVE:
                self._remove(target.path)
            self._remove(target.beside)
            self._show_to_run(target, self._real(target.path))
        except _DoesNotRun as error:
            # The file of an earlier install, if it is still there, fails in the same way or has not been tried.
            self._remove(target.path)
            return FileOutcome(target.path, Action.TAKE_AWAY, why=str(error))
        in_effect = action in (Action.PACKAGED, Action.REMOVE)
        return FileOutcome(target.path, action, beside=target.packaged if in_effect else None)

    def _show_to_run(self, target: Target, real: Path) -> None:
        if target.is_executed and self._reason_not_to_run is not None and (why := self._reason_not_to_run(real)):
            raise _DoesNotRun(why)

    def _manifest(self) -> Manifest:
        content = self._read(MANIFEST)
        return Manifest({}, frozenset()) if content is None else read_manifest(content)

    def _read(self, path: PurePosixPath) -> bytes | None:
        try:
            return self._real(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(str(path), "", f"cannot read: {error.strerror}; make it a readable file") from error

    def _write(self, target: Target, path: PurePosixPath, mode: int) -> None:
        """Write the target's text to ``path``; what is executed is shown to run before it is there."""
        if self._dry_run:
            return

        def check(staged: Path) -> None:
            if path == target.path:
                self._show_to_run(target, staged)

        real, folder = self._real(path), self._real(target.work_folder / path.name).parent
        try:
            for parent in (real.parent, folder):
                parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            files.replace(real, target.text.encode(), mode, folder=folder, check=check)
        except OSError as error:
            raise ConfigError(str(path), "", f"cannot write: {_explanation(error, folder)}") from error

    def _remove(self, path: PurePosixPath) -> None:
        if not self._dry_run:
            with contextlib.suppress(FileNotFoundError):
                self._real(path).unlink()

    def _remove_leftovers(self, target: Target) -> None:
        """Remove what an install that was killed, or one of an earlier version, left in a folder that is executed."""
        name = target.path.name
        folder = self._real(target.path).parent
        if not self._dry_run and folder.is_dir():
            for path in (*folder.glob(f".{name}.????????"), folder / f"{name}.new"):
                path.unlink(missing_ok=True)

    def _real(self, path: PurePosixPath) -> Path:
        return inside(self._root, path)


def inside(root: Path, path: PurePosixPath) -> Path:
    """
    Return where a file of the machine below ``root`` is.

    :raise ConfigError: When it is not below it: an image may have symbolic links to this machine's own files.
    """
    real = root / path.relative_to("/")
    if not real.parent.resolve().is_relative_to(root.resolve()):
        raise ConfigError(str(path), "", f"a symbolic link in the path leads out of {root}; remove it first")
    return real


class _DoesNotRun(Exception):
    """A file that libvirt would execute does not run; says why."""


def _explanation(error: OSError, folder: Path) -> str:
    if error.errno == errno.EXDEV:
        return f"it is not on the file system of {folder}; mount both together, then run this again"
    return f"{error.strerror}; then run this again"


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What earlier installs wrote."""

    files: dict[str, str]
    """Digest of the content by path."""
    roles: frozenset[str]


def read_manifest(content: bytes) -> Manifest:
    """
    Parse a manifest.

    :raise ConfigError: When it is none.
    """
    try:
        document = json.loads(content)
        files = {str(path): str(sha256) for path, sha256 in document["files"].items()}
        return Manifest(files, frozenset(map(str, document["roles"])))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        remedy = "not a manifest of virt-ports; move it away: existing files then count as edited"
        raise ConfigError(str(MANIFEST), "", remedy) from None


def manifest_text(files: dict[str, str], roles: Iterable[str]) -> str:
    """Return a manifest that :func:`read_manifest` reads."""
    return json.dumps({"format": _FORMAT, "roles": sorted(roles), "files": files}, indent=2) + "\n"
