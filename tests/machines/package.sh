#!/bin/bash
# The life of the Debian package on the system that this runs on: installed, set up, upgraded, downgraded, removed, purged,
# with nothing left in the end. In an overlay and a network namespace, so that the system itself stays as it is; without
# systemd running.
#
# usage (root): tests/machines/package.sh PACKAGE.deb        called by `make test-deb`
set -euo pipefail

deb=$(realpath "${@: -1}")
hook=/etc/libvirt/hooks/qemu.d/virt-ports
home=/usr/lib/virt-ports

enter_overlay() {
    local top=/mnt
    mount -t tmpfs tmpfs $top
    mkdir $top/{upper,work,root}
    mount -t overlay overlay -o lowerdir=/,upperdir=$top/upper,workdir=$top/work $top/root
    mount --rbind /dev $top/root/dev
    mount -t proc proc $top/root/proc
    mount -t tmpfs tmpfs $top/root/run
    mkdir -p $top/root/run/lock
    cp "$2" $top/root/run/virt-ports.deb
    cp "$1" $top/root/run/package.sh
    exec chroot $top/root env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
        /run/package.sh --inside /run/virt-ports.deb
}

fail() { echo "package.sh: $*" >&2; exit 1; }

check() {
    local what=$1
    shift
    "$@" || fail "$what: not so: $*"
    echo "ok: $what"
}

# Every file with its kind, mode, owner and size, and those of /etc with their content. The user virt-ports stays, as is
# Debian's practice: its number must not be given to another user, who would then own what it left elsewhere.
listing() {
    local others=(/proc /sys /dev /run /tmp /var/tmp /var/log /var/cache /var/lib/dpkg /src /work /root) prune=() each
    for each in "${others[@]}"; do prune+=(-path "$each" -prune -o); done
    find / "${prune[@]}" ! -type d -printf '%p %y %m %U %G %s %l\n' -o -printf '%p %y %m %U %G\n' |
        grep -vE '^/etc/(passwd|group|shadow|gshadow|subuid|subgid)-? |^/etc/\.pwd\.lock |^/etc/ld\.so\.cache ' | sort
    find /etc -type f ! -name 'passwd*' ! -name 'group*' ! -name '*shadow*' ! -name ld.so.cache -print0 | sort -z |
        xargs -0 sha256sum
}

# A package of another version, whose hook is what stands in a file.
other_version() {
    local version=$1 text=$2 work
    work=$(mktemp -d)
    dpkg-deb -R /run/virt-ports.deb "$work"
    sed -i "s/^Version: .*/Version: $version/" "$work/DEBIAN/control"
    cp "$text" "$work"$home/lib/python3*/site-packages/libvirt_hooks/qemu.py
    dpkg-deb -Znone -b "$work" "/run/$version.deb" >/dev/null
    rm -rf "$work"
}

is_running_hook() { [ "$($hook x check begin - 2>&1 </dev/null)" = "virt-ports: the hook runs" ]; }
# An installed hook has its bytecode at its end.
begins_with() { cmp -n "$(stat -c %s "$1")" $hook "$1"; }
is_alone() { [ "$(ls -A ${hook%/*})" = virt-ports ]; }
is_disabled() { [ -z "$(find /etc/systemd /run/systemd -name 'natd.service' -o -name 'cpmd.service' 2>/dev/null)" ]; }
same() { [ "$1" = "$2" ]; }
shipped() { cat $home/lib/python3*/site-packages/libvirt_hooks/qemu.py; }

story() {
    local before after
    version=$(dpkg-deb -f /run/virt-ports.deb Version)
    before=$(listing)

    dpkg -i /run/virt-ports.deb >/run/log 2>&1 || { cat /run/log; fail "does not install"; }
    check "the command runs" test "$(virt-ports --version)" = "virt-ports ${version%+*}"
    check "the daemons run" eval "$home/bin/cpmd --help >/dev/null && $home/bin/natd --help >/dev/null"
    check "no unit is enabled" is_disabled
    check "no hook before an install" test ! -e $hook
    check "the user exists" eval "getent passwd virt-ports >/dev/null"
    check "bytecode exists, for users who cannot write it" test -n "$(find $home -name 'main.cpython-*.pyc')"

    virt-ports install --role host,edge,manager >/run/said
    check "units, user and directories come from the package" test "$(grep -c '^not needed /etc/' /run/said)" = 4
    check "the hook runs" is_running_hook
    check "nothing else is in its folder" is_alone
    echo "# mine" >>/etc/virt-ports/natd.toml
    mkdir -p /var/lib/virt-ports /var/lib/virt-ports-natd /run/virt-ports
    echo ledger >/var/lib/virt-ports/ledger.db

    { shipped; echo "# newer"; } >/run/hook.newer
    other_version "$version+1" /run/hook.newer
    dpkg -i "/run/$version+1.deb" >/run/log 2>&1 || { cat /run/log; fail "does not upgrade"; }
    check "an upgrade brings its hook" begins_with /run/hook.newer
    check "which runs" is_running_hook
    check "with its bytecode" grep -q '^# bytecode ' $hook
    check "nothing else is in its folder" is_alone
    check "and restarts the daemons that run" test "$(grep -c '_dh_action=restart' /var/lib/dpkg/info/virt-ports.postinst)" = 2
    check "configuration stays" grep -q '^# mine' /etc/virt-ports/natd.toml

    dpkg -i /run/virt-ports.deb >/run/log 2>&1 || { cat /run/log; fail "does not downgrade"; }
    check "a downgrade brings its hook" begins_with $home/lib/python3*/site-packages/libvirt_hooks/qemu.py

    echo 'raise SystemExit(3)' >/run/hook.broken  # Python for py3compile, no program for the shell
    other_version "$version+2" /run/hook.broken
    dpkg -i "/run/$version+2.deb" >/run/log 2>&1 || { cat /run/log; fail "does not upgrade"; }
    check "a hook that does not run is taken away" test ! -e $hook
    check "and the operator is told" grep -q "NOT installed $hook" /run/log
    dpkg -i /run/virt-ports.deb >/run/log 2>&1
    virt-ports install --role host,edge,manager >/run/said
    check "the hook is back" is_running_hook

    virt-ports uninstall --yes --edited --keep-ledger >/run/said
    check "uninstalled: no file of the install is left, nor our tables" \
        test ! -e $hook -a ! -e /etc/virt-ports -a -z "$(grep -E 'table|route|rule' /run/said)"
    check "the ledger, which was to be kept, is" test -e /var/lib/virt-ports/ledger.db
    virt-ports install --role host,edge,manager >/run/said

    mkdir -p /run/virt-ports-natd
    echo '{"ip_forward": ["0", "1"]}' >/run/virt-ports-natd/settings-before.json
    touch /run/virt-ports-natd/natd.sock
    dpkg -r virt-ports >/run/log 2>&1 || { cat /run/log; fail "is not removed"; }
    check "removed: what the kernel's settings were is still known" \
        test "$(ls -A /run/virt-ports-natd)" = settings-before.json -a ! -e /run/virt-ports
    check "no hook" test ! -e $hook
    check "no program" test ! -e /usr/bin/virt-ports -a ! -e $home
    check "configuration" test -e /etc/virt-ports/natd.toml
    check "and ledger stay" test -e /var/lib/virt-ports/ledger.db

    dpkg -i /run/virt-ports.deb >/run/log 2>&1
    check "installed again: no hook before an install" test ! -e $hook
    virt-ports install --role host,edge,manager >/run/said
    echo "# mine" >>$hook
    dpkg -r virt-ports >/run/log 2>&1
    check "removed: an edited hook is moved" grep -q '^# mine' /etc/virt-ports/hook.edited
    check "and cannot be executed" test ! -x /etc/virt-ports/hook.edited -a ! -e $hook

    dpkg -P virt-ports >/run/log 2>&1 || { cat /run/log; fail "is not purged"; }
    after=$(listing)
    [ "$before" = "$after" ] || { diff <(echo "$before") <(echo "$after") | head -40; fail "purged: the system is not as it was before"; }
    echo "ok: purged: every file is as before"
}

case "$1" in
    --inside) deb=$2 && story ;;
    *) exec unshare --mount --net --propagation=private --pid --fork --kill-child \
        bash -euc "$(declare -f enter_overlay); enter_overlay \"\$@\"" bash "$(realpath "$0")" "$deb" ;;
esac
