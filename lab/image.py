"""
The tiny guest: a Debian cloud kernel, an initramfs with busybox, the real QEMU guest agent and ``conngen``.

Built once into ``build/guest/<hash of the recipe>/`` (4 seconds and three downloaded packages, none of which is
installed) and used from there by every lab. It boots in two seconds without hardware virtualization:

- the kernel is unpacked to its ELF image, which QEMU enters directly (PVH) instead of running the decompressor;
- the initramfs is not compressed, 9 MB of it;
- the agent's libraries are those of this machine, so agent and libraries are of one distribution.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.errors import CommandFailed, LabError
from lab.shell import run

RECIPE = Path(__file__).parent / "guest"
CACHE = Path(__file__).parents[1] / "build" / "guest"

# In the order of dependence: virtio needs virtio_ring. Those that are built into the kernel are left out.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("failover", "net_failover", "virtio_net", "virtio_console"),
)
_DIRECTORIES = ("bin", "sbin", "etc", "proc", "sys", "dev", "run", "tmp", "var", "lib/modules", "lib64", "usr/sbin")


@dataclass(frozen=True, slots=True)
class GuestImage:
    """Kernel and initramfs of a real guest, and the traffic generator for light guests and other namespaces."""

    kernel: Path
    initramfs: Path
    conngen: Path


def guest_image() -> GuestImage:
    """
    Return the guest image, building it first when the recipe has changed or never ran here.

    :raise LabError: When the machine is not x86-64, a package cannot be downloaded or a tool fails.
    """
    target = CACHE / _recipe_hash()
    if not target.exists():
        _build(target)
    return GuestImage(target / "vmlinux", target / "initramfs.cpio", target / "conngen")


def is_built() -> bool:
    """Whether :func:`guest_image` will return without building."""
    return (CACHE / _recipe_hash()).exists()


def _recipe_hash() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(RECIPE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(target: Path) -> None:
    if os.uname().machine != "x86_64":
        raise LabError(f"real guests need an x86-64 machine, this is {os.uname().machine}: use light guests here")
    CACHE.mkdir(parents=True, exist_ok=True)
    # Built in a scratch directory and renamed when complete: the target is never incomplete, even with parallel builds.
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as scratch:
        packages = Path(scratch) / "packages"
        packages.mkdir()
        root = Path(scratch) / "root"
        result = Path(scratch) / "result"
        result.mkdir()
        _unpack_packages(packages)
        _extract_kernel(next((packages / "boot").glob("vmlinuz-*")), result / "vmlinux")
        _compile_conngen(result / "conngen")
        _fill_root(root, packages, result / "conngen")
        _write_cpio(root, result / "initramfs.cpio")
        _publish(result, target)


def _unpack_packages(into: Path) -> None:
    downloads = CACHE / "downloads"
    if not downloads.exists():
        _download(downloads)
    for package in downloads.glob("*.deb"):
        run("dpkg", "-x", package, into)


def _download(downloads: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="downloading-") as scratch:
        complete = Path(scratch) / "complete"
        complete.mkdir()
        try:
            _apt_download(complete)
        except LabError:
            # The package lists are missing or old.
            run("apt-get", "update", "-q")
            _apt_download(complete)
        _publish(complete, downloads)


def _publish(complete: Path, target: Path) -> None:
    """Give a directory its final name, unless another build has done so."""
    try:
        complete.rename(target)
    except OSError:
        if not target.exists():
            raise


def _apt_download(directory: Path) -> None:
    listing = run("apt-cache", "depends", "linux-image-cloud-amd64")
    kernel = re.search(r"Depends: (linux-image-\S+)", listing)
    if kernel is None:
        raise LabError("apt knows no linux-image-cloud-amd64; enable Debian's main archive in /etc/apt/sources.list")
    packages = (kernel[1], "qemu-guest-agent", "busybox-static")
    # apt-get downloads into the directory it runs in.
    run("env", f"--chdir={directory}", "apt-get", "download", "-q", *packages)


def _extract_kernel(compressed: Path, kernel: Path) -> None:
    """Find the compressed ELF image inside a bzImage, as the kernel's scripts/extract-vmlinux does."""
    data = compressed.read_bytes()
    for magic, unpack in _COMPRESSIONS:
        for match in re.finditer(re.escape(magic), data):
            try:
                image = unpack(data[match.start() :])
            except (lzma.LZMAError, zlib.error):
                continue
            if image.startswith(b"\x7fELF"):
                kernel.write_bytes(image)
                return
    raise LabError(f"no ELF image in {compressed.name}; is it a Linux kernel?")


def _unpacker(tool: str) -> Callable[[bytes], bytes]:
    def unpack(data: bytes) -> bytes:
        # Data behind the image makes the tool fail after it has written all of the image.
        done = subprocess.run([tool, "-dc"], input=data, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        return done.stdout

    return unpack


_COMPRESSIONS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x02\x21\x4c\x18", _unpacker("lz4")),
    (b"\x28\xb5\x2f\xfd", _unpacker("zstd")),
    (b"\xfd7zXZ\x00", lambda data: lzma.LZMADecompressor().decompress(data)),
    (b"\x1f\x8b\x08", lambda data: zlib.decompressobj(31).decompress(data)),
)


def _compile_conngen(program: Path) -> None:
    run("gcc", "-O2", "-Wall", "-static", "-s", "-o", program, RECIPE / "conngen.c")


def _fill_root(root: Path, packages: Path, conngen: Path) -> None:
    for directory in _DIRECTORIES:
        (root / directory).mkdir(parents=True)
    (root / "var/run").symlink_to("../run")
    (root / "bin/sh").symlink_to("busybox")
    shutil.copy2(_package_path(packages, "bin/busybox"), root / "bin/busybox")
    shutil.copy2(conngen, root / "bin/conngen")
    shutil.copy2(RECIPE / "init", root / "init")
    shutil.copy2(RECIPE / "udhcpc.sh", root / "etc/udhcpc.sh")
    shutil.copy2(RECIPE / "shutdown", root / "sbin/shutdown")
    shutil.copy2(packages / "usr/sbin/qemu-ga", root / "usr/sbin/qemu-ga")
    for library in re.findall(r"=> (/\S+)", run("ldd", root / "usr/sbin/qemu-ga")):
        shutil.copy2(library, root / "lib")
    shutil.copy2("/lib64/ld-linux-x86-64.so.2", root / "lib64")
    _copy_modules(packages, root / "lib/modules")


def _copy_modules(packages: Path, directory: Path) -> None:
    """Copy :data:`MODULES`, uncompressed, less those that are built into the kernel; ``order`` lists what is copied."""
    (kernel,) = _package_path(packages, "lib/modules").iterdir()
    built_in = {Path(line).stem for line in (kernel / "modules.builtin").read_text().splitlines()}
    modules = [module for module in MODULES if module not in built_in]
    for module in modules:
        (directory / f"{module}.ko").write_bytes(_module(kernel, module))
    (directory / "order").write_text("".join(f"{module}\n" for module in modules))


def _module(kernel: Path, name: str) -> bytes:
    """Return a kernel module, which Debian compresses since release 13."""
    for path in kernel.rglob(f"{name}.ko*"):
        data = path.read_bytes()
        if path.suffix == ".ko":
            return data
        if path.suffix == ".xz":
            return lzma.decompress(data)
    raise LabError(f"{kernel.name} has no module {name}; is it a Debian kernel?")


def _package_path(packages: Path, path: str) -> Path:
    """Return where a file of the unpacked packages is: below /usr since Debian 13."""
    merged = packages / "usr" / path
    return merged if merged.exists() else packages / path


def _write_cpio(root: Path, archive: Path) -> None:
    """Write the initramfs; with all times at 0, so that the same content gives the same file."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    for name in names:
        os.utime(root / name, (0, 0), follow_symlinks=False)
    try:
        run(
            *("env", f"--chdir={root}", "cpio", "--create", "--format=newc", "--quiet", "--owner=0:0"),
            *("--file", archive),
            stdin="".join(f"{name}\n" for name in names),
        )
    except CommandFailed as error:
        raise LabError(f"cannot write the guest's initramfs: {error}; is the disk full?") from error
