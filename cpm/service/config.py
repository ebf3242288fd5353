"""Reads settings from TOML files; an error names file, key and remedy."""

from __future__ import annotations

import math
import re
import tomllib
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cpm.protocol.errors import ConfigError

_T = TypeVar("_T")

MAX_LENGTH = 65_536
"""Characters of a file. tomllib takes a time that grows with the square of the length of a dotted key."""


def _convert(kind: type, value: Any) -> Any:
    if kind not in (IPv4Address, IPv4Network):
        raise NotImplementedError(kind.__name__)
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def load(path: Path, kind: type[_T]) -> _T:
    """
    Read a TOML file into a settings struct.

    :param path: The file.
    :param kind: A msgspec struct with ``forbid_unknown_fields``.
    :raise ConfigError: When the file cannot be read, is not TOML, has an unknown key or a wrong value.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MAX_LENGTH:
            raise ConfigError(str(path), "", f"longer than {MAX_LENGTH:,} characters; leave out what is not needed")
        document = tomllib.loads(text, parse_float=_finite)
    except OSError as error:
        raise ConfigError(
            str(path), "", f"cannot read: {error.strerror}; write it or name another with --config"
        ) from error
    except RecursionError as error:
        raise ConfigError(str(path), "", "nested too deeply; write it flatter") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "", f"not TOML: {error}; correct the line it names") from error
    except ValueError as error:
        raise ConfigError(str(path), "", "a number is infinite or has thousands of digits; write another") from error
    try:
        return msgspec.convert(document, kind, dec_hook=_convert, strict=True)
    except (msgspec.ValidationError, ValueError) as error:
        raise _config_error(path, str(error)) from error


def _config_error(path: Path, message: str) -> ConfigError:
    """Translate msgspec's ``Expected `int`, got `str` - at `$.pool.block``` into an error that begins with the key."""
    text, _, where = message.partition(" - at ")
    key = where.strip("`").removeprefix("$").removeprefix(".")
    if unknown := re.search(r"unknown field `(.+?)`", text):
        key = f"{key}.{unknown[1]}" if key else unknown[1]
        return ConfigError(str(path), key, "no such key; correct its spelling or remove it")
    if missing := re.search(r"missing required field `(.+?)`", text):
        key = f"{key}.{missing[1]}" if key else missing[1]
        return ConfigError(str(path), key, "is required; add it")
    return ConfigError(str(path), key, f"{text[:1].lower()}{text[1:]}; correct the value")
