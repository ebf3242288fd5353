#!/bin/bash
# Make a root of chroot.sh a machine of `make test-kernels`: the release's kernel in /kernel, its modules for networks,
# and the test environment in /src/.venv. Run inside the root by image.py.
set -euo pipefail

# The package of the kernel is unpacked and not installed: it would bring an initramfs of its own.
apt-get update -q
image=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p')
(cd /root && apt-get download -q "$image" && dpkg-deb -x linux-image-*.deb /kernel)
# Where /lib is a link the package may have either.
from=$(echo /kernel/{usr/,}lib/modules/*/kernel | tr ' ' '\n' | grep -v '\*')
to=/usr/lib/modules/$(basename "$(dirname "$from")")
mkdir -p "$to/kernel/drivers/net"
cp -r "$from"/{net,lib,crypto} "$to/kernel/"
cp "$from"/drivers/net/*.ko* "$to/kernel/drivers/net/"
cp "$from"/../modules.{order,builtin,builtin.modinfo} "$to/"
# Unpacking takes an emulated processor longer than reading.
find "$to" -name '*.ko.xz' -exec xz -d {} +
depmod "${to##*/}"
cp /kernel/boot/vmlinuz-* /vmlinuz

# The lock without lint tools and what other tests need. libvirt-python would need a compiler; here is no libvirtd.
python3 -m venv .venv
grep -vE '^(ansible-core|grafana_foundation_sdk|grimp|libvirt-python|mkdocs|mypy|ruff)=' requirements.lock >/root/lock
.venv/bin/pip install --quiet --no-deps -r /root/lock

# What is left stays in the machine's memory.
rm -rf /kernel /root/* /root/.cache /var/cache/* /var/lib/apt /usr/share/{doc,man,locale,info}
find /src -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
