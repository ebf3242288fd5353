"""
Generates the completions of bash, zsh and fish from the parsers, with shtab (a dependency of developers only)::

    python -m cpm.cli.completion share

They are static; names of VMs, nodes and addresses are asked of cpmd (:mod:`cpm.cli.names`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import shtab

from cpm.cli.main import NAMES as WORD
from cpm.cli.parser import build
from cpm.cli.verbs import doctor

FILES: Final = {
    "bash": "bash-completion/completions/virt-ports",
    "zsh": "zsh/site-functions/_virt-ports",
    "fish": "fish/vendor_completions.d/virt-ports.fish",
}
"""Where each shell looks, below a ``share`` folder."""

_BASH: Final = f"""\
_virt_ports_names() {{
  "${{COMP_WORDS[0]}}" {WORD} bash "$1" "$2" 2>/dev/null
}}
_virt_ports_vms() {{ _virt_ports_names vms "$1"; }}
_virt_ports_nodes() {{ _virt_ports_names nodes "$1"; }}
_virt_ports_addresses() {{ _virt_ports_names addresses "$1"; }}
"""

_ZSH: Final = f"""\
_virt_ports_names() {{
  local -a names
  names=(${{(f)"$(virt-ports {WORD} zsh "$1" "$PREFIX" 2>/dev/null)"}})
  compadd -a names
}}
_virt_ports_vms() {{ _virt_ports_names vms }}
_virt_ports_nodes() {{ _virt_ports_names nodes }}
_virt_ports_addresses() {{ _virt_ports_names addresses }}
"""

_BY_METAVAR: Final = {"VM": "vms", "NODE": "nodes", "ADDRESS": "addresses"}
_PATTERNS: Final = {
    "list": "vms",
    "events": "vms",
    "node list": "nodes",
    "node events": "nodes",
    "pool list": "addresses",
    "pool show": "vms",
}
_FILES: Final = ("FILE", "PATH", "CERTIFICATE", "KEY")
_FOLDERS: Final = ("DIR", "DIRECTORY", "FOLDER")


def script(shell: str) -> str:
    """
    Return the script of one shell.

    :param shell: One of :data:`FILES`.
    """
    parser = build()
    for each in parsers(parser):
        _mark(each)
    return str(shtab.complete(parser, shell, preamble={"bash": _BASH, "zsh": _ZSH}.get(shell, ""))).rstrip() + "\n"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser and, in the order of the help, those of its verbs and their actions."""
    yield parser
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to walk its parsers
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for verb in action.choices.values():
                yield from parsers(verb)


def _mark(parser: argparse.ArgumentParser) -> None:
    """Say of the arguments of one verb what completes them."""
    verb = parser.prog.partition(" ")[2]
    for action in parser._actions:  # noqa: SLF001
        metavar = str(action.metavar or "")
        kind = _PATTERNS.get(verb) if metavar == "PATTERN" and action.dest in ("patterns", "vm") else None
        kind = "nodes" if metavar == "PATTERN" and action.dest == "node" else kind or _BY_METAVAR.get(metavar)
        how: Any = None
        if kind is not None:
            fish = f"(virt-ports {WORD} fish {kind} (commandline -ct) 2>/dev/null)"
            how = {"bash": f"_virt_ports_{kind}", "zsh": f"_virt_ports_{kind}", "fish": fish}
        elif metavar == "CHECK":
            action.choices = doctor.check_names()
        elif metavar in _FILES:
            how = shtab.FILE
        elif metavar in _FOLDERS:
            how = shtab.DIRECTORY
        if how is not None and action.choices is None:
            action.complete = how  # type: ignore[attr-defined]


def write(share: Path) -> None:
    """Write the scripts of all shells below a folder."""
    for shell, name in FILES.items():
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        (share / name).write_text(script(shell))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
