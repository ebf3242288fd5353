#!/bin/bash
# Build the package for the release of Debian that this runs on, from the source tree in the current folder, and judge it
# with lintian. Called by debian/deb.sh; needs root, to install what is missing to build.
#
# usage: debian/build.sh FOLDER      the package goes there; downloaded and built wheels are kept in FOLDER/wheels
set -euo pipefail

out=$(realpath -m "${1:?usage: debian/build.sh FOLDER}")
. /etc/os-release

install_missing() {
    if ! dpkg-checkbuilddeps 2>/dev/null || ! command -v lintian >/dev/null; then
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends dpkg-dev lintian
        DEBIAN_FRONTEND=noninteractive apt-get build-dep -q -y --no-install-recommends ./
    fi
}

# A release's package is newer than that of the release before, so that an upgrade of Debian upgrades it, too.
write_changelog_entry() {
    local version stamp
    version=$(dpkg-parsechangelog -S Version)+deb$VERSION_ID
    stamp=$(date -R -u -d "$(dpkg-parsechangelog -S Date) + 1 second")
    printf 'virt-ports (%s) %s; urgency=medium\n\n  * Built for Debian %s.\n\n -- %s  %s\n\n' "$version" \
        "$VERSION_CODENAME" "$VERSION_ID" "$(dpkg-parsechangelog -S Maintainer)" "$stamp" >debian/changelog.new
    cat debian/changelog >>debian/changelog.new
    mv debian/changelog.new debian/changelog
}

install_missing >&2
mkdir -p "$out"
# Short: what a shebang names is limited.
work=$(mktemp -d /tmp/deb.XXXXXX)
trap 'rm -rf "$work"' EXIT
cp -a . "$work/tree"
cd "$work/tree"
rm -rf build .venv
write_changelog_entry
WHEELS="$out/wheels" dpkg-buildpackage --build=binary --no-sign --jobs=auto >"$out/build.log" 2>&1 ||
    { tail -n 40 "$out/build.log" >&2; exit 1; }
rm -f "$out"/virt-ports*.deb "$out"/virt_ports-*.whl
mv "$work"/*.deb "$out/"
# The very wheel that is in the package, for the other road (tests/machines/package.sh).
cp debian/own/virt_ports-*.whl requirements.lock "$out/"
lintian --fail-on error --tag-display-limit 0 --allow-root "$out"/virt-ports_*.deb
