#!/bin/bash
# Build the Debian package of the committed state of this repository for one release, into build/deb/RELEASE: here if this
# machine runs that release, otherwise in a root of it (tests/machines/chroot.sh). Needs root.
#
# usage: debian/deb.sh RELEASE       bookworm, trixie
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
release=${1:?usage: debian/deb.sh RELEASE}
out=$repository/build/deb/$release
mkdir -p "$out"

if [ "$release" = "$(. /etc/os-release && echo "$VERSION_CODENAME")" ]; then
    tree=$(mktemp -d /tmp/deb.XXXXXX)
    trap 'rm -rf "$tree"' EXIT
    git -c safe.directory="$repository" -C "$repository" archive HEAD | tar -x -C "$tree"
    (cd "$tree" && debian/build.sh "$out")
else
    "$repository/tests/machines/chroot.sh" "$release" debian/build.sh build/deb
    root=${DEBIAN_ROOTS:-/var/tmp/virt-ports-debian}/$release
    mkdir -p "$out"
    rm -f "$out"/*.deb "$out"/*.whl
    cp "$root"/src/build/deb/virt-ports_*.deb "$root"/src/build/deb/virt_ports-*.whl "$root/src/build/deb/build.log" "$out/"
fi
ls -l "$out"/virt-ports_*.deb
