#!/bin/bash
# Take the package that debian/deb.sh built through its life (tests/machines/package.sh), on its own release. Needs root.
#
# usage: debian/test.sh RELEASE
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
release=${1:?usage: debian/test.sh RELEASE}

if [ "$release" = "$(. /etc/os-release && echo "$VERSION_CODENAME")" ]; then
    exec "$repository/tests/machines/package.sh" "$repository/build/deb/$release"/virt-ports_*.deb
fi
"$repository/tests/machines/chroot.sh" "$release" bash -euc '
    package=$(echo build/deb/virt-ports_*.deb)
    depends=$(dpkg-deb -f "$package" Depends)
    apt-get -q -y --no-install-recommends satisfy "$depends" >/dev/null ||
        { apt-get update -q; DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends satisfy "$depends"; }
    tests/machines/package.sh "$package"'
