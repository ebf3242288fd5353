"""
Code blocks of a page as a transcript: commands, and what they print.

A block of the kind ``console`` has commands with a prompt, and below each what it prints. The prompt is ``$``, or
``root@srv1:~/directory#``, which says on which machine and in which directory. The lines up to the next prompt:

- Runs of white space are equal, and so are lines below headers, so that widths of columns are no matter.
- ``...`` stands for anything in a line, and on a line of its own for any lines, also none.
- A number is any number, if the line of the page has the same number of them: which ports a VM gets differs. Addresses
  and versions with dots are no numbers. A UUID is any UUID, a time any time.
- A line that ends in ``[y/N] y`` is a question, and the answer that is typed.
- After a command without any such line, nothing is compared.

A block of the kind ``sh`` has commands only. One that continues on further lines (by a backslash, a quote, a
here-document) is one. A block that begins with a comment that is a path, or with ``#!``, shows a file and has none.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_PROMPT = re.compile(r"^(?:\$|root@(?P<machine>\w+):(?P<directory>\S*)#) (?P<command>.+)$")
_FENCE = re.compile(r"^ *```(?P<kind>.*)$")
_FILE = re.compile(r"^# ?(?P<path>/\S+)$|^#!")
_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_TIME = re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\+\d\d:\d\d|Z)")
_QUESTION = re.compile(r"(?P<question>.*\[y/N\]) (?P<answer>\S+)$")
_NUMBER = re.compile(r"(?<![\w.:-])\d+(?![\w.:])|(?<=\d-)\d+(?![\w.:])")


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a page."""

    chapter: str
    machine: str
    directory: str
    command: str
    printed: tuple[str, ...]

    @property
    def answers(self) -> str:
        """What the reader types while the command runs."""
        questions = filter(None, map(_QUESTION.match, self.printed))
        return "".join(f"{question['answer']}\n" for question in questions)

    def is_printed_by(self, output: str) -> bool:
        """Whether the output is what the page shows."""
        if not any(self.printed):
            return True
        return (
            re.fullmatch(_pattern(self.printed), "".join(f"{_squeeze(line)}\n" for line in _lines(output))) is not None
        )

    def __str__(self) -> str:
        return f"{self.chapter}: {self.command}"


@dataclass(frozen=True, slots=True)
class Block:
    """
    Fenced lines of a page.

    :param kind: What stands behind the three backticks.
    """

    chapter: str
    kind: str
    lines: tuple[str, ...]

    @property
    def file(self) -> str:
        """The path of the file that it shows; empty: it shows none, or names none."""
        found = _FILE.match(self.lines[0]) if self.lines else None
        return (found["path"] or "") if found else ""

    @property
    def steps(self) -> list[Step]:
        """Its commands in their order."""
        if self.kind == "console":
            return self._transcript()
        if self.kind == "sh" and not _FILE.match(self.lines[0]):
            return [Step(self.chapter, "", "", command, ()) for command in _commands(self.lines)]
        return []

    def _transcript(self) -> list[Step]:
        steps: list[Step] = []
        for line in self.lines:
            if found := _PROMPT.match(line):
                steps.append(Step(self.chapter, found["machine"] or "", found["directory"] or "", found["command"], ()))
            elif steps and not steps[-1].printed and not _is_complete(steps[-1].command):
                steps[-1] = replace(steps[-1], command=f"{steps[-1].command}\n{line}")
            elif steps:
                steps[-1] = replace(steps[-1], printed=(*steps[-1].printed, line))
        return steps


def read(page: Path) -> list[Step]:
    """Return the commands of a page in their order."""
    return [step for block in blocks(page) for step in block.steps]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    chapter, kind = "", ""
    lines: list[str] | None = None
    for line in page.read_text().splitlines():
        fence = _FENCE.match(line)
        if lines is None:
            if fence is not None:
                kind, lines = fence["kind"], []
            elif line.startswith("#"):
                chapter = line.lstrip("# ")
        elif fence is not None:
            yield Block(chapter, kind, tuple(lines))
            lines = None
        else:
            lines.append(line)


def _commands(lines: Sequence[str]) -> Iterator[str]:
    command = ""
    for line in lines:
        command = f"{command}\n{line}" if command else line
        if command.strip() and _is_complete(command):
            if not command.startswith("#"):
                yield command
            command = ""
    assert not command.strip(), f"no shell takes this as a command: {command}"


def _is_complete(command: str) -> bool:
    """Whether a shell would run it now, and not wait for a further line."""
    if command.endswith("\\"):
        return False
    read_ = subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False)
    return read_.returncode == 0 and not read_.stderr


def _pattern(printed: tuple[str, ...]) -> str:
    return "".join(map(_line_pattern, filter(str.strip, printed)))


def _line_pattern(line: str) -> str:
    if line.strip() == "...":
        return r"(?:.*\n)*?"
    if question := _QUESTION.match(line):
        # What is typed is not printed, and neither is the end of its line.
        return _text_pattern(_squeeze(question["question"])) + r" ?\n?"
    return _text_pattern(_squeeze(line)) + r"\n"


def _text_pattern(line: str) -> str:
    parts = re.split(r"(\.\.\.)", line)
    return "".join(".*?" if part == "..." else _numbers(part) for part in parts)


def _numbers(text: str) -> str:
    """Return a pattern for a text in which each UUID, time and number may be another one."""
    for found, pattern in ((_UUID, r"[0-9a-f-]{36}"), (_TIME, r"\d{4}-\d\d-\d\dT[\d:]+(?:[+-][\d:]+|Z)")):
        if match := found.search(text):
            return _numbers(text[: match.start()]) + pattern + _numbers(text[match.end() :])
    return r"\d+".join(map(re.escape, _NUMBER.split(text)))


def _lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.strip()]


def _squeeze(line: str) -> str:
    return re.sub(r"-{3,}", "---", " ".join(line.split()))
