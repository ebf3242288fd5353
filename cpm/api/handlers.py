"""
Registers the function that answers each operation. Besides the arguments of the request it gets:

=========================  ================================  =====================================================
registered with            arguments it may name             what the function does
=========================  ================================  =====================================================
:func:`query`              ``manager``, ``now``, ``about``,  returns the answer; changes nothing
                           ``live``
:func:`journal_query`      ``journal``, ``now``, ``wall``    returns the answer; runs in the journal's thread
:func:`change`             ``manager``, ``now``, ``live``    changes the manager; returns the query that answers,
                                                             which is run once the change is durable
:func:`stream`             ``feeds``                         returns an iterator over the lines of the answer
=========================  ================================  =====================================================

``now`` is ledger time (:mod:`cpm.core.timeline`), ``wall`` what the wall clock shows, ``about``
:class:`cpm.queries.status.About`, ``feeds`` :class:`cpm.serving.streams.Feeds`,
``live`` :class:`cpm.serving.live_settings.LiveSettings`.
A function may leave out those that it does not need, but none of the parameters of its operation, ``body`` included.

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
    """How a handler is run; the value has the arguments that it may name besides those of the request."""

    QUERY = frozenset(("manager", "now", "about", "live"))
    JOURNAL_QUERY = frozenset(("journal", "now", "wall"))
    CHANGE = frozenset(("manager", "now", "live"))
    STREAM = frozenset(("feeds",))


@dataclasses.dataclass(frozen=True, slots=True)
class Handler:
    """A function that answers an operation."""

    kind: Kind
    function: Callable[..., Any]
    names: frozenset[str]
    """Names of its arguments."""

    def call(self, available: Mapping[str, Any]) -> Any:
        """
        Call the function with those of the available values that it names.

        :raise VirtPortsError: The error of the function.
        """
        return self.function(**{name: available[name] for name in self.names})


_handlers: Final[dict[Operation[Any], Handler]] = {}


def query(operation: Operation[_A]) -> Callable[[Callable[_P, _A]], Callable[_P, _A]]:
    """
    Register the function that answers an operation and changes nothing.

    :raise TypeError: When its arguments do not fit the operation, or the operation has a handler already.
    """
    return lambda function: _register(operation, Kind.QUERY, function)


def journal_query(operation: Operation[_A]) -> Callable[[Callable[_P, _A]], Callable[_P, _A]]:
    """
    Register the function that answers an operation from the journal.

    :raise TypeError: As for :func:`query`.
    """
    return lambda function: _register(operation, Kind.JOURNAL_QUERY, function)


def change(
    operation: Operation[_A],
) -> Callable[[Callable[_P, Callable[[Manager], _A]]], Callable[_P, Callable[[Manager], _A]]]:
    """
    Register the function that makes a change and returns the query that answers the operation.

    :raise TypeError: As for :func:`query`.
    """
    return lambda function: _register(operation, Kind.CHANGE, function)


def stream(
    operation: Operation[_A],
) -> Callable[[Callable[_P, AsyncIterator[_A]]], Callable[_P, AsyncIterator[_A]]]:
    """
    Register the function that returns the lines of a streamed answer.

    :raise TypeError: As for :func:`query`.
    """
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


def registered(operation: Operation[Any]) -> Handler:
    """
    Return the handler of one operation.

    :raise KeyError: When none is registered.
    """
    return _handlers[operation]


def load(packages: Iterable[ModuleType]) -> Mapping[Operation[Any], Handler]:
    """
    Import the modules of the packages; return the handlers that they register.

    :raise LookupError: When an operation has no handler.
    """
    for package in packages:
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    if missing := [str(operation) for operation in OPERATIONS if operation not in _handlers]:
        raise LookupError(f"no handler for {', '.join(missing)}")
    return MappingProxyType(_handlers)
