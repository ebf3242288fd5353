#!/bin/bash
# Run a command under the kernel of another release of Debian: a virtual machine with a copy of the root that chroot.sh
# makes, and this repository in /src. Without network. QEMU emulates the processor, as in the lab, on every machine:
# everything takes about ten times as long, a boot about 40 seconds. Not part of `make test`.
#
# usage (root): tests/machines/vm.sh RELEASE COMMAND ...     for example: vm.sh trixie .venv/bin/pytest -q tests/netns
#
# The command must find all it needs in the root: run chroot.sh RELEASE make setup first. Ends with its exit status.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
release=${1:?usage: vm.sh RELEASE COMMAND ...}
shift
[ $# -gt 0 ] || { echo "vm.sh: which command?" >&2; exit 2; }
root=${DEBIAN_ROOTS:-/var/tmp/virt-ports-debian}/$release
packages="linux-image-amd64 initramfs-tools udev"
scratch=$(mktemp -d -p "${root%/*}" vm.XXXXXX)
trap 'rm -rf "$scratch"' EXIT

"$here/chroot.sh" "$release" bash -euc "dpkg-query -W $packages >/dev/null 2>&1 || {
    apt-get update -q; DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages; }"
kernel=$(ls "$root"/boot/vmlinuz-* | sort -V | tail -n 1)

# The first process of the machine; the last line that it prints is the command's exit status.
cat >"$root/src/build/vm-init" <<INIT
#!/bin/bash
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
modprobe -a tun br_netfilter
hostname "$release"
ip link set lo up
cd /src
set -o pipefail
setsid ${*@Q} </dev/null 2>&1 | cat
echo "vm.sh: status \$?"
echo o >/proc/sysrq-trigger
sleep 60
INIT
chmod +x "$root/src/build/vm-init"
mke2fs -q -F -t ext4 -d "$root" "$scratch/disk" "$(($(du -sm "$root" | cut -f 1) + 2048))M" >"$scratch/mke2fs"
qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 4G -nographic -no-reboot -nic none \
    -kernel "$kernel" -initrd "${kernel/vmlinuz/initrd.img}" \
    -drive file="$scratch/disk",format=raw,if=virtio,cache=unsafe \
    -append "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off init=/src/build/vm-init" </dev/null |
    tr -d '\r' | tee "$scratch/console"
status=$(sed -n 's/.*vm\.sh: status //p' "$scratch/console" | tail -n 1)
exit "${status:-1}"
