"""
Which function answers which operation, and what it is given besides the arguments of the request.

=========================  ================================  =====================================================
registered with            what it may name as arguments     what it does
=========================  ================================  =====================================================
:func:`query`              ``manager``, ``now``, ``about``   returns the answer; changes nothing
:func:`journal_query`      ``journal``, ``now``              returns the answer; runs in the journal's thread
:func:`change`             ``manager``, ``now``              changes the manager; returns the query that answers,
                                                             which is asked once the change is durable
:func:`stream`             ``feeds``                         returns what yields the lines of the answer
=========================  ================================  =====================================================

``now`` is UTC seconds; ``about`` is :class:`cpm.queries.status.About`, ``feeds`` :class:`cpm.serving.streams.Feeds`.
A function names what it needs; the parameters of its operation, and ``body`` where there is one, it names all.

Tested in tests/unit/cpm/api/test_operations.py.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import pkgutil
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, Final, ParamSpec, TypeVar

from cpm.api.operations import OPERATIONS, Operation
from cpm.core.manager import Manager

_P = ParamSpec("_P")
_A = TypeVar("_A")


class Kind(enum.Enum):
    """How a handler is run; the value is what it may be given besides the arguments of the request."""

    QUERY = frozenset(("manager", "now", "about"))
    JOURNAL_QUERY = frozenset(("journal", "now"))
    CHANGE = frozenset(("manager", "now"))
    STREAM = frozenset(("feeds",))


@dataclasses.dataclass(frozen=True, slots=True)
class Handler:
    """A function that answers an operation."""

    kind: Kind
    function: Callable[..., Any]
    names: frozenset[str]
    """Of its arguments."""

    def call(self, available: Mapping[str, Any]) -> Any:
        """Call the function with those of the available values that it names."""
        return self.function(**{name: available[name] for name in self.names})


_handlers: Final[dict[Operation[Any], Handler]] = {}


def query(operation: Operation[_A]) -> Callable[[Callable[_P, _A]], Callable[_P, _A]]:
    """Register the function that answers an operation and changes nothing."""
    return lambda function: _register(operation, Kind.QUERY, function)


def journal_query(operation: Operation[_A]) -> Callable[[Callable[_P, _A]], Callable[_P, _A]]:
    """Register the function that answers an operation from the journal."""
    return lambda function: _register(operation, Kind.JOURNAL_QUERY, function)


def change(
    operation: Operation[_A],
) -> Callable[[Callable[_P, Callable[[Manager], _A]]], Callable[_P, Callable[[Manager], _A]]]:
    """Register the function that makes a change and returns the query that answers it."""
    return lambda function: _register(operation, Kind.CHANGE, function)


def stream(
    operation: Operation[_A],
) -> Callable[[Callable[_P, AsyncIterator[_A]]], Callable[_P, AsyncIterator[_A]]]:
    """Register the function that returns the lines of a streamed answer."""
    return lambda function: _register(operation, Kind.STREAM, function)


def _register(operation: Operation[Any], kind: Kind, function: Callable[_P, _A]) -> Callable[_P, _A]:
    names = frozenset(inspect.signature(function).parameters)
    missing, unknown = operation.arguments - names, names - operation.arguments - kind.value
    if missing or unknown:
        raise TypeError(f"{function.__qualname__} answers {operation}: missing {missing}, unknown {unknown}")
    if operation in _handlers or operation.streams != (kind is Kind.STREAM):
        raise TypeError(f"{function.__qualname__} cannot answer {operation}: {kind}, {_handlers.get(operation)}")
    _handlers[operation] = Handler(kind, function, names)
    return function


def load(packages: Iterable[ModuleType]) -> Mapping[Operation[Any], Handler]:
    """
    Import the modules of the packages; return the handlers that they register.

    :raise LookupError: When an operation has none.
    """
    for package in packages:
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    if missing := [str(operation) for operation in OPERATIONS if operation not in _handlers]:
        raise LookupError(f"no handler for {', '.join(missing)}")
    return MappingProxyType(_handlers)
