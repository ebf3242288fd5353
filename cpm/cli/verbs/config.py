"""``virt-ports config``: settings files. Tested in ``tests/unit/cpm/cli/test_config.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from cpm.cli import asking, parsing, render
from cpm.protocol.errors import ConfigError, ExitCode, InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.api.views import SettingsView, SettingView
    from cpm.cli.documents import SettingsFileDocument

FOLDER = Path("/etc/virt-ports")

HEADER = ("Key", "In force", "In the file", "Followed")

_ABOUT = """\
Settings are in /etc/virt-ports: those of the manager in cpmd.toml, those of a
host or edge in natd.toml."""

_CHECK_ABOUT = """\
A file is checked as its daemon would: unknown keys, wrong values, values that
contradict each other. The daemons need not run. Without FILE: the files of this
machine."""

_DIFF_ABOUT = """\
The manager compares the file that it was started with to what is in force. The
last column says how a change comes into force: by 'virt-ports config reload', or
only when cpmd is restarted. Neither disturbs traffic."""

_RELOAD_ABOUT = """\
Shows the differences, asks, and makes the manager follow those that need no
restart; so does 'systemctl reload cpmd', without a question. A file with a
mistake changes nothing. Ranges that VMs have stay as they are and follow new
limits with their next changes.

natd reads natd.toml when it starts: 'systemctl restart natd' disturbs no
traffic."""

_EXAMPLES = """\
  virt-ports config check                      before a restart
  virt-ports config check ./cpmd.toml          a file that is not in place yet
  virt-ports config diff                       what is not in force yet?
  virt-ports config reload"""

VERB = parsing.Verb(135, "check settings files, and make the manager follow them", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    actions = verb.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    check = parsing.add_action(actions, "check", "check settings files", about=_CHECK_ABOUT)
    check.add_argument("files", metavar="FILE", nargs="*", type=Path, help="cpmd.toml or natd.toml, wherever it is")
    check.add_argument("--for", dest="daemon", choices=("cpmd", "natd"),
                       help="whose settings a file of another name has")  # fmt: skip
    parsing.add_action(actions, "diff", "show which settings of cpmd.toml are not in force", about=_DIFF_ABOUT)
    reload = parsing.add_action(actions, "reload", "make the manager follow cpmd.toml", about=_RELOAD_ABOUT)
    reload.add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """Carry out one action."""
    if args.action == "check":
        return _check(args)
    from cpm.api.operations import RELOAD, SETTINGS
    from cpm.api.requests import ReloadRequest

    manager = parsing.client(args)
    view = manager.call(SETTINGS)
    if args.action == "diff":
        return parsing.print_answer(args, view, lambda: _table(view))
    if view.changes and not args.yes:
        _confirm(view)
    view = manager.call(RELOAD, ReloadRequest(view.digest))
    return parsing.print_answer(args, view, lambda: _done(view))


def _check(args: argparse.Namespace) -> int:
    """Check all files, and report every one that is wrong."""
    results = [(file, _problem(file, args.daemon)) for file in args.files or _files_here()]
    document: list[SettingsFileDocument] = [
        {"file": str(file), "problem": problem or None} for file, problem in results
    ]
    parsing.print_answer(
        args, document, lambda: "".join(f"{problem or f'{file}: no mistakes'}\n" for file, problem in results)
    )
    return ExitCode.REFUSED if any(problem for _, problem in results) else ExitCode.DONE


def _files_here() -> Iterator[Path]:
    files = [file for daemon in ("cpmd", "natd") if (file := FOLDER / f"{daemon}.toml").exists()]
    if not files:
        raise ConfigError(str(FOLDER), "", "no settings here; run `virt-ports install`, or name a file")
    yield from files


def _problem(file: Path, daemon: str | None) -> str:
    """
    Return what is wrong with a file, empty: nothing.

    :raise InvalidRequest: When its name does not tell whose it is.
    """
    whose = daemon or file.name.removesuffix(".new").removesuffix(".toml")
    if whose not in ("cpmd", "natd"):
        raise InvalidRequest(f"whose settings are in {file}? Add --for cpmd or --for natd")
    try:
        _loader(whose)(file)
    except ConfigError as error:
        return str(error)
    return ""


def _loader(daemon: str) -> Callable[[Path], object]:
    """Return the function by which a daemon reads its settings. The manager's programs import nothing of natd's."""
    from importlib.metadata import entry_points

    (point,) = entry_points(group="virt_ports.settings", name=daemon)
    load: Callable[[Path], object] = point.load()
    return load


def _confirm(view: SettingsView) -> None:
    asking.confirm(
        _table(view),
        f"follow {view.file} as far as that needs no restart",
        otherwise="the settings in force stay as they are; run the command again and answer y",
        without_terminal="look at `virt-ports config diff`, then add --yes",
    )


def _table(view: SettingsView) -> str:
    if not view.changes:
        return f"everything in {view.file} is in force\n"
    return render.table(HEADER, map(_row, view.changes))


def _row(setting: SettingView) -> tuple[str, ...]:
    how = "after a restart of cpmd" if setting.needs_restart else "by a reload"
    return setting.key, setting.in_force, setting.in_file, how


def _done(view: SettingsView) -> str:
    followed = [each.key for each in view.changes if not each.needs_restart]
    late = [each.key for each in view.changes if each.needs_restart]
    lines = [f"in force now: {', '.join(followed)}" if followed else "nothing to follow"]
    if late:
        lines.append(f"after `systemctl restart cpmd`: {', '.join(late)}")
    return "".join(f"{line}\n" for line in lines)
