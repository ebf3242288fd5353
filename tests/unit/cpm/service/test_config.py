"""Settings from TOML: every mistake is an error with file, key and remedy."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import msgspec
import pytest

from cpm.protocol.errors import ConfigError
from cpm.service import config


class Pool(msgspec.Struct, forbid_unknown_fields=True):
    network: IPv4Network
    size: int = 4


class Example(msgspec.Struct, forbid_unknown_fields=True):
    address: IPv4Address
    pool: Pool | None = None


def loaded(tmp_path: Path, text: str) -> Example:
    file = tmp_path / "x.toml"
    file.write_text(text)
    return config.load(file, Example)


def test_addresses_and_networks_are_values(tmp_path: Path) -> None:
    text = 'address = "203.0.113.1"\n[pool]\nnetwork = "100.64.0.0/10"\n'
    assert loaded(tmp_path, text) == Example(IPv4Address("203.0.113.1"), Pool(IPv4Network("100.64.0.0/10")))


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("", "address", "is required; add it"),
        ('address = "203.0.113.1"\nname = 1', "name", "no such key; correct its spelling or remove it"),
        ('address = "203.0.113.1"\n[pool]\n', "pool.network", "is required; add it"),
        (
            'address = "203.0.113.1"\n[pool]\nnetwork = "100.64.0.0/10"\nsize = "big"',
            "pool.size",
            "expected `int`, got `str`; correct the value",
        ),
    ],
)
def test_a_mistake_names_key_and_remedy(tmp_path: Path, text: str, key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    assert caught.value.args == (str(tmp_path / "x.toml"), key, remedy)


def test_a_value_that_is_no_address_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, 'address = "here"')
    assert caught.value.key == "address"


@pytest.mark.parametrize("content", [b"address", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named_without_a_key(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(file, Example)
    assert (caught.value.file, caught.value.key) == (str(file), "")


@pytest.mark.parametrize(("text", "words"), [
    ("address = " + "[" * 3000, "nested too deeply"),
    ("x = " + "9" * 5000, "thousands of digits"),
    ("#" * 65537, "longer than 65,536 characters"),
    ("x = inf", "infinite"),
    ("x = [-nan]", "infinite"),
    ("x = 1e400", "infinite"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_to_its_end_is_a_mistake(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loaded(tmp_path, text)


@pytest.mark.parametrize("value", ["7", "true", "[]", "{}", "1979-05-27"])
def test_an_address_that_is_no_text_is_a_mistake(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, f"address = {value}\n")
    assert caught.value.key == "address"


def test_a_missing_file_is_named_without_a_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "none.toml", Example)
    assert (caught.value.file, caught.value.key) == (str(tmp_path / "none.toml"), "")
