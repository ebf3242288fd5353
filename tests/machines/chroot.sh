#!/bin/bash
# Run a command in another release of Debian, on this machine's kernel: a root made by mmdebstrap, with the committed
# state of this repository in /src. Not part of `make test`: it downloads a release.
#
# usage (root): tests/machines/chroot.sh RELEASE [COMMAND ...]        for example: chroot.sh trixie make test
#
# Without a command: a shell. The root is made at the first call and kept, with .venv and build of an earlier run, in
# $DEBIAN_ROOTS (default /var/tmp/virt-ports-debian); $DEBIAN_PACKAGES are those it begins with. Everything that the command starts ends with it: the command runs
# in mount and process namespaces of its own. Its network is this machine's, so do not run two labs at once.
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
release=${1:?usage: chroot.sh RELEASE [COMMAND ...]}
shift
root=${DEBIAN_ROOTS:-/var/tmp/virt-ports-debian}/$release

# While the root is made, no time goes to what nobody reads there, or to waiting for the disk. An initramfs, if one gets
# made, is for a virtio disk: it boots in a quarter of the time in an emulated machine.
prepare='
    printf "%s\n" force-unsafe-io "path-exclude=/usr/share/doc/*" "path-exclude=/usr/share/man/*" \
        "path-exclude=/usr/share/locale/*" >"$1/etc/dpkg/dpkg.cfg.d/while-made"
    mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
    printf "MODULES=list\nCOMPRESS=lz4\n" >"$1/etc/initramfs-tools/conf.d/virtio"
    printf "%s\n" virtio_pci virtio_blk ext4 >"$1/usr/share/initramfs-tools/modules.d/virtio"'

make_root() {
    command -v mmdebstrap >/dev/null || { echo "chroot.sh: install mmdebstrap first" >&2; exit 1; }
    rm -rf "$root.partial"
    mmdebstrap --variant=minbase --include="${DEBIAN_PACKAGES:-ca-certificates,make,git}" \
        --essential-hook="$prepare" "$release" "$root.partial"
    rm "$root.partial/etc/dpkg/dpkg.cfg.d/while-made"
    mv "$root.partial" "$root"
}

# What apt and pip need to reach the network the way this machine does.
copy_configuration() {
    local file
    for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt /etc/pip.conf /etc/xdg/pip; do
        if [ -e "$file" ]; then
            mkdir -p "$root$(dirname "$file")"
            cp -rL "$file" "$root$(dirname "$file")"
        fi
    done
}

copy_repository() {
    mkdir -p "$root/src"
    find "$root/src" -mindepth 1 -maxdepth 1 ! -name .venv ! -name build -exec rm -rf {} +
    git -c safe.directory="$repository" -C "$repository" archive HEAD | tar -x -C "$root/src"
}

# The first process of the namespaces. It makes the root theirs (a chroot would not do: nsenter leaves it again), and
# waits for the command while it reaps what the command's daemons leave.
enter_root() {
    local root=$1
    shift
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    mkdir "$root/run/lock" "$root/run/before"
    cd "$root"
    pivot_root . run/before
    cd /
    umount -l /run/before
    rmdir /run/before
    cd /src
    "$@" <&0 &
    wait $!
}

# One command at a time in a root: the next one waits.
mkdir -p "${root%/*}"
exec 9>"$root.lock"
flock 9
[ -d "$root" ] || make_root
copy_configuration
copy_repository
[ $# -gt 0 ] || set -- bash -i
mapfile -t pip < <(env | grep '^PIP_' || true)
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
    TERM="${TERM:-dumb}" "${pip[@]}" \
    unshare --mount --propagation=private --pid --fork --kill-child \
    bash -euc "$(declare -f enter_root); enter_root \"\$@\"" bash "$root" "$@"
