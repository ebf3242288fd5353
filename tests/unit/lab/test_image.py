"""What the guest image takes from Debian's packages, as the releases lay them out."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from lab import image
from lab.errors import LabError

MODULE = b"\x7fELF module"


def _kernel(packages: Path, *, below: str, suffix: str, built_in: tuple[str, ...] = ()) -> None:
    kernel = packages / below / "lib/modules/6.0-cloud-amd64"
    (kernel / "kernel/drivers").mkdir(parents=True)
    (kernel / "modules.builtin").write_text("".join(f"kernel/drivers/virtio/{name}.ko\n" for name in built_in))
    for name in set(image.MODULES) - set(built_in):
        data = lzma.compress(MODULE) if suffix == ".ko.xz" else MODULE
        (kernel / f"kernel/drivers/{name}{suffix}").write_bytes(data)


@pytest.mark.parametrize(("below", "suffix"), [(".", ".ko"), ("usr", ".ko.xz")], ids=["12", "13"])
def test_modules_are_found_and_unpacked(tmp_path: Path, below: str, suffix: str) -> None:
    _kernel(tmp_path / "packages", below=below, suffix=suffix)
    image._copy_modules(tmp_path / "packages", tmp_path)
    assert (tmp_path / "order").read_text().split() == list(image.MODULES)
    assert all((tmp_path / f"{name}.ko").read_bytes() == MODULE for name in image.MODULES)


def test_modules_that_are_built_into_the_kernel_are_left_out(tmp_path: Path) -> None:
    _kernel(tmp_path / "packages", below="usr", suffix=".ko.xz", built_in=("virtio", "virtio_ring"))
    image._copy_modules(tmp_path / "packages", tmp_path)
    assert (tmp_path / "order").read_text().split() == [
        name for name in image.MODULES if name not in {"virtio", "virtio_ring"}
    ]
    assert not (tmp_path / "virtio.ko").exists()


def test_a_module_that_is_nowhere_is_named(tmp_path: Path) -> None:
    _kernel(tmp_path / "packages", below="usr", suffix=".ko.zst")
    with pytest.raises(LabError, match="has no module virtio_ring"):
        image._copy_modules(tmp_path / "packages", tmp_path)
