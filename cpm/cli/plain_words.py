"""
Reads plain command lines without :mod:`argparse`, which takes as long to import and set up as a bare Python to start.

A verb declares its arguments once, with the methods of an argparse parser; :class:`Declared` has those methods, too,
and notes what is declared. :func:`read` understands words for which there is only one meaning: options written out,
each with its value, and all positional words together. Whatever else there is, a mistake, ``--help``, ``-ojson``, is
left to argparse, so its texts and its rules are the only ones.

Tested in tests/unit/cpm/cli/test_plain_words.py, which compares both.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, Final


class NotPlainError(Exception):
    """Only argparse knows what is meant."""


class Words:
    """What was understood, in attributes, as in a namespace of argparse."""


class Declared:
    """What a verb, or an action of one, declares."""

    NOT_GIVEN: Final = object()
    """As a default: of an option that only counts when it is given."""

    def __init__(self) -> None:
        self.options: dict[str, _Argument] = {}
        """By each of its names."""
        self.positionals: list[_Argument] = []
        self.chosen_by = ""
        """The attribute that has the chosen action; empty: there are none."""
        self.actions: dict[str, Declared] = {}

    def add_argument(self, *names: str, **facts: Any) -> None:
        """Note an option or a positional argument."""
        argument = _Argument(names, **facts)
        if argument.is_option:
            self.options.update(dict.fromkeys(names, argument))
        else:
            self.positionals.append(argument)

    def add_argument_group(self, _title: str) -> Declared:
        """Note what is in the group: it only matters for the help."""
        return self

    def add_mutually_exclusive_group(self, **_: Any) -> Declared:
        """Leave it to argparse."""
        raise NotPlainError

    def add_subparsers(self, *, dest: str, **_: Any) -> Declared:
        """Note that one of several actions has to be chosen."""
        self.chosen_by = dest
        return self

    def add_parser(self, name: str, **_: Any) -> Declared:
        """Note an action."""
        self.actions[name] = Declared()
        return self.actions[name]

    def read(self, words: Sequence[str], known: Words) -> Sequence[str]:
        """
        Put what the words say into attributes.

        :return: The words after the name of a chosen action, with it.
        :raise NotPlainError: When argparse has to say what they mean.
        """
        for argument in (*self.options.values(), *self.positionals):
            if argument.default is not Declared.NOT_GIVEN:
                setattr(known, argument.dest, argument.default)
        place, positional = 0, []
        is_open = True
        while place < len(words):
            word = words[place]
            if not word.startswith("-"):
                if self.chosen_by:
                    return words[place:]
                if not is_open:
                    raise NotPlainError
                positional.append(word)
                place += 1
                continue
            is_open = not positional
            place = self._read_option(words, place, known)
        if self.chosen_by:
            raise NotPlainError
        self._read_positionals(positional, known)
        return ()

    def _read_option(self, words: Sequence[str], place: int, known: Words) -> int:
        """Read the option at a place; return the place after it."""
        name, equals, value = words[place].partition("=")
        argument = self.options.get(name)
        if argument is None or (equals and (value == "--" or not name.startswith("--"))):
            raise NotPlainError
        if argument.action == "store_true":
            if equals:
                raise NotPlainError
            setattr(known, argument.dest, True)
            return place + 1
        place += 1
        if not equals:
            if place == len(words) or words[place].startswith("-"):
                raise NotPlainError
            value = words[place]
            place += 1
        converted = argument.converted(value)
        if argument.action == "append":
            converted = [*(getattr(known, argument.dest, None) or ()), converted]
        setattr(known, argument.dest, converted)
        return place

    def _read_positionals(self, words: list[str], known: Words) -> None:
        for argument in self.positionals:
            if argument.nargs is None:
                if not words:
                    raise NotPlainError
                setattr(known, argument.dest, argument.converted(words.pop(0)))
            else:
                if argument is not self.positionals[-1] or (argument.nargs == "+" and not words):
                    raise NotPlainError
                setattr(known, argument.dest, [argument.converted(word) for word in words])
                words = []
        if words:
            raise NotPlainError


class _Argument:
    """One argument, as it is declared; what is not noted only matters for the help."""

    def __init__(
        self,
        names: tuple[str, ...],
        action: str = "store",
        nargs: str | None = None,
        default: Any = None,
        type: Callable[[str], Any] | None = None,  # noqa: A002 - as argparse calls it
        choices: Iterable[Any] | None = None,
        dest: str | None = None,
        **_: Any,
    ) -> None:
        self.is_option = names[0].startswith("-")
        if action not in ("store", "store_true", "append") or nargs not in (None, "*", "+"):
            raise NotPlainError
        if nargs is not None and (self.is_option or default is not None):
            raise NotPlainError
        if type is not None and isinstance(default, str):
            raise NotPlainError  # argparse would convert it
        longest = next((name for name in names if name.startswith("--")), names[0])
        self.dest = dest or longest.lstrip("-").replace("-", "_") if self.is_option else names[0]
        self.action = action
        self.nargs = nargs
        self.default = False if action == "store_true" else default
        self._type = type
        self._choices = None if choices is None else tuple(choices)

    def converted(self, text: str) -> Any:
        """
        Return a value.

        :raise NotPlainError: When the text is none.
        """
        try:
            value = text if self._type is None else self._type(text)
        except Exception:  # argparse says which ones are mistakes of the user
            raise NotPlainError from None
        if self._choices is not None and value not in self._choices:
            raise NotPlainError
        return value


def read(words: Sequence[str], root: Declared, verb: Callable[[str], Declared | None]) -> Words:
    """
    Return what a command line says.

    :param words: Those after ``virt-ports``.
    :param root: The options that may stand before the verb.
    :param verb: Returns what a verb declares; None: there is no such verb.
    :raise NotPlainError: When argparse has to say what they mean.
    """
    known = Words()
    root.chosen_by = "verb"
    level, rest = root, words
    while rest := level.read(rest, known):
        setattr(known, level.chosen_by, rest[0])
        chosen = verb(rest[0]) if level is root else level.actions.get(rest[0])
        if chosen is None:
            raise NotPlainError
        level, rest = chosen, rest[1:]
    return known
