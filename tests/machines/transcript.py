"""
Code blocks of a page as a transcript: commands, and what they print.

Only blocks that begin with a line of three backticks and ``console`` are read. A line with a prompt,
``root@srv1:~/directory# COMMAND``, is a command: the prompt says on which machine and in which directory. The lines up
to the next prompt are what it prints:

- Runs of white space are equal, and so are lines below headers, so that widths of columns are no matter.
- ``...`` stands for anything in a line, and on a line of its own for any lines, also none.
- A number is any number, if the line of the page has the same number of them: which ports a VM gets differs. Addresses
  and versions with dots are no numbers.
- A line that ends in ``[y/N] y`` is a question, and the answer that is typed.
- After a command without any such line, nothing is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_PROMPT = re.compile(r"^root@(?P<machine>\w+):(?P<directory>\S*)# (?P<command>.+)$")
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


def read(page: Path) -> list[Step]:
    """Return the commands of a page in their order."""
    steps: list[Step] = []
    for chapter, block in _blocks(page.read_text()):
        for line in block:
            if found := _PROMPT.match(line):
                steps.append(Step(chapter, found["machine"], found["directory"], found["command"], ()))
            elif steps:
                steps[-1] = replace(steps[-1], printed=(*steps[-1].printed, line))
    return steps


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    chapter = ""
    block: list[str] | None = None
    for line in text.splitlines():
        if block is None and line.startswith("#"):
            chapter = line.lstrip("# ")
        if line == "```console":
            block = []
        elif line == "```" and block is not None:
            yield chapter, block
            block = None
        elif block is not None:
            block.append(line)


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
    pieces = _NUMBER.split(text)
    return r"\d+".join(map(re.escape, pieces))


def _lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.strip()]


def _squeeze(line: str) -> str:
    return re.sub(r"-{3,}", "---", " ".join(line.split()))
