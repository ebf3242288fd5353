#!/bin/bash
# The life of the Debian package on the system that this runs on: installed, set up, upgraded, downgraded, removed, purged,
# with nothing left in the end. Beside it the other road, pipx from Debian with the wheel that is in the package, which has to
# end in the same state. In an overlay and a network namespace, so that the system itself stays as it is; without systemd
# running.
#
# usage (root): tests/machines/package.sh PACKAGE.deb [PART ...]      called by `make test-deb`
#
# Parts: story and downgrades, which are the default, and two_roads. For that one the wheel, the lock and the libraries' wheels
# are beside the package, as debian/build.sh leaves them; it needs the network, and takes minutes more.
set -euo pipefail

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
    mkdir -p $top/root/run/{lock,upper,lower}
    mount --bind $top/upper $top/root/run/upper
    mount --bind / $top/root/run/lower
    cp "$2" $top/root/run/virt-ports.deb
    cp "$1" "${1%/*}/two_roads.py" $top/root/run/
    local inside=(chroot $top/root env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
        DEBIAN_FRONTEND=noninteractive)
    mapfile -t pip < <(env | grep '^PIP_' || true)
    [[ " ${*:3} " != *" two_roads "* ]] || "${inside[@]}" "${pip[@]}" /run/package.sh --with-network "${2%/*}"
    exec unshare --net "${inside[@]}" /run/package.sh --inside "${@:3}"
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

# A package of another version, in whose libraries a command has changed something. It runs in their folder.
other_version() {
    local version=$1 work
    shift
    work=$(mktemp -d)
    dpkg-deb -R /run/virt-ports.deb "$work"
    sed -i "s/^Version: .*/Version: $version/" "$work/DEBIAN/control"
    # Its bytecode is read without a look at the text.
    (cd "$work"$home/lib/python3*/site-packages && "$@" &&
        find . -path '*/__pycache__/*' \( -name 'schema.*' -o -name 'messages.*' -o -name 'qemu.*' \) -delete)
    dpkg-deb -Znone -b "$work" "/run/$version.deb" >/dev/null
    rm -rf "$work"
}
with_hook() { cp "$1" libvirt_hooks/qemu.py; }
# A schema that this version does not know.
with_newer_schema() {
    printf 'MIGRATIONS = (*MIGRATIONS, lambda database: database.execute("CREATE TABLE of_a_newer_version (x)"))\n' \
        >>cpm/ledger/schema.py
}
with_newer_protocol() { sed -i -E 's/^(PROTOCOL = )([0-9]+)$/\1\2 + 1/' cpm/protocol/messages.py; }

dpkg_i() { dpkg -i "$1" >/run/log 2>&1 || { cat /run/log; fail "does not install: $1"; }; }

# Start a daemon as its unit does, as far as the ledger and the socket are concerned, and wait until it answers.
start_cpmd() {
    install -d -o virt-ports -g virt-ports -m 0750 /run/virt-ports /var/lib/virt-ports
    setpriv --reuid virt-ports --regid virt-ports --clear-groups "$home/bin/cpmd" >/run/cpmd.log 2>&1 &
    cpmd=$!
    for _ in $(seq 600); do
        virt-ports status >/dev/null 2>&1 && return 0
        kill -0 $cpmd 2>/dev/null || return 1
        sleep 0.2
    done
    cat /run/cpmd.log
    fail "cpmd does not answer"
}
stop_cpmd() { kill $cpmd && wait $cpmd; }
# Whatever it is, it ends.
end() { kill "$1" 2>/dev/null || true; wait "$1" 2>/dev/null || true; }
addresses() { virt-ports pool list -o json | /usr/bin/python3 -c 'import json, sys; print(*(each["address"] for each in json.load(sys.stdin)))'; }

is_running_hook() { [ "$($hook x check begin - 2>&1 </dev/null)" = "virt-ports: the hook runs" ]; }
# An installed hook has its bytecode at its end.
begins_with() { cmp -n "$(stat -c %s "$1")" $hook "$1"; }
is_alone() { [ "$(ls -A ${hook%/*})" = virt-ports ]; }
is_disabled() { [ -z "$(find /etc/systemd /run/systemd -name 'natd.service' -o -name 'cpmd.service' 2>/dev/null)" ]; }
# Each Python that is started reads from files what it does not have to compile.
without_bytecode() {
    $home/bin/python -v -c "import cpm.cli.main, cpm.daemon, natctl.daemon" 2>&1 | grep "^# code object from '.*\.py'" || true
}
same() { [ "$1" = "$2" ]; }
shipped() { cat $home/lib/python3*/site-packages/libvirt_hooks/qemu.py; }

story() {
    local before after
    before=$(listing)

    dpkg -i /run/virt-ports.deb >/run/log 2>&1 || { cat /run/log; fail "does not install"; }
    check "the command runs" test "$(virt-ports --version)" = "virt-ports ${version%+*}"
    check "the daemons run" eval "$home/bin/cpmd --help >/dev/null && $home/bin/natd --help >/dev/null"
    check "no unit is enabled" is_disabled
    check "no hook before an install" test ! -e $hook
    check "the user exists" eval "getent passwd virt-ports >/dev/null"
    check "bytecode exists, for users who cannot write it" test -z "$(without_bytecode)"

    virt-ports install --role host,edge,manager >/run/said
    check "units, user and directories come from the package" test "$(grep -c '^not needed /etc/' /run/said)" = 4
    check "the hook runs" is_running_hook
    check "nothing else is in its folder" is_alone
    echo "# mine" >>/etc/virt-ports/natd.toml
    mkdir -p /var/lib/virt-ports /var/lib/virt-ports-natd /run/virt-ports
    echo ledger >/var/lib/virt-ports/ledger.db

    { shipped; echo "# newer"; } >/run/hook.newer
    other_version "$version+1" with_hook /run/hook.newer
    dpkg -i "/run/$version+1.deb" >/run/log 2>&1 || { cat /run/log; fail "does not upgrade"; }
    check "an upgrade brings its hook" begins_with /run/hook.newer
    check "which runs" is_running_hook
    check "with its bytecode" grep -q '^# bytecode ' $hook
    check "nothing else is in its folder" is_alone
    check "and restarts the daemons that run" test "$(grep -c '_dh_action=restart' /var/lib/dpkg/info/virt-ports.postinst)" = 2
    check "configuration stays" grep -q '^# mine' /etc/virt-ports/natd.toml

    dpkg -i /run/virt-ports.deb >/run/log 2>&1 || { cat /run/log; fail "does not downgrade"; }
    check "a downgrade brings its hook" begins_with $home/lib/python3*/site-packages/libvirt_hooks/qemu.py

    echo 'raise SystemExit(3)' >/run/hook.broken  # no program for the shell
    other_version "$version+2" with_hook /run/hook.broken
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

    mkdir -p /etc/virt-ports/pki
    echo key >/etc/virt-ports/pki/ca.key
    dpkg -P virt-ports >/run/log 2>&1 || { cat /run/log; fail "is not purged"; }
    check "purged: the ledger stays" test "$(cat /var/lib/virt-ports/ledger.db)" = ledger
    check "so does the key of the authority, alone" test "$(find /etc/virt-ports -type f)" = /etc/virt-ports/pki/ca.key
    check "and the operator is told of both" \
        grep -q 'kept, because they cannot be made again: /var/lib/virt-ports /etc/virt-ports/pki;' /run/log

    dpkg_i /run/virt-ports.deb
    rm -rf /etc/virt-ports/pki
    virt-ports uninstall --yes >/run/said
    check "uninstalled: the ledger is asked about, and goes" test ! -e /var/lib/virt-ports
    dpkg -P virt-ports >/run/log 2>&1 || { cat /run/log; fail "is not purged"; }
    check "purged after that: nothing is left to tell" test -z "$(grep kept /run/log)"
    after=$(listing)
    [ "$before" = "$after" ] || { diff <(echo "$before") <(echo "$after") | head -40; fail "purged: the system is not as it was before"; }
    echo "ok: purged: every file is as before"
}

# "Downgrades within one schema and protocol, otherwise refuses and names restore."
downgrades() {
    dpkg_i /run/virt-ports.deb
    virt-ports install --role manager --name manager >/run/said
    start_cpmd || fail "cpmd does not start: $(cat /run/cpmd.log)"
    virt-ports pool add 203.0.113.1 >/dev/null
    virt-ports backup /run/before.db >/dev/null

    other_version "$version+1" true
    stop_cpmd
    dpkg_i "/run/$version+1.deb"
    start_cpmd || fail "a newer cpmd does not start: $(cat /run/cpmd.log)"
    virt-ports pool add 203.0.113.2 >/dev/null
    stop_cpmd
    dpkg_i /run/virt-ports.deb
    start_cpmd || fail "downgraded, cpmd does not start: $(cat /run/cpmd.log)"
    check "a downgrade within one schema goes on with the ledger" test "$(addresses)" = "203.0.113.1 203.0.113.2"
    stop_cpmd

    other_version "$version+2" with_newer_schema
    dpkg_i "/run/$version+2.deb"
    start_cpmd || fail "a newer cpmd does not start: $(cat /run/cpmd.log)"
    stop_cpmd
    dpkg_i /run/virt-ports.deb
    cp /var/lib/virt-ports/ledger.db /run/newer.db
    check "downgraded from a newer schema: cpmd does not start" eval '! start_cpmd'
    check "it says why, and names restore" grep -q 'ledger has schema .* with `virt-ports restore`' /run/cpmd.log
    check "and the ledger is as it was" cmp -s /var/lib/virt-ports/ledger.db /run/newer.db
    virt-ports restore /run/before.db >/run/said
    start_cpmd || fail "with the backup, cpmd does not start: $(cat /run/cpmd.log)"
    check "with the backup of before it starts" test "$(addresses)" = 203.0.113.1
    check "and the former ledger is kept" test -e /var/lib/virt-ports/ledger.db.before-restore-1

    # A node that is still of the newer version, beside the downgraded manager.
    other_version "$version+3" with_newer_protocol
    dpkg-deb -x "/run/$version+3.deb" /run/newer
    mkdir -p /run/virt-ports-natd
    printf 'name = "edge1"\nroles = ["edge"]\nunderlay_address = "127.0.0.1"\n[edge]\nuplinks = ["lo"]\n' >/run/natd.toml
    PYTHONPATH=$(echo /run/newer$home/lib/python3*/site-packages) \
        $home/bin/python -c 'from natctl.daemon import main; main()' --config /run/natd.toml >/run/natd.log 2>&1 &
    natd=$!
    for _ in $(seq 300); do grep -qs 'speaks protocol' /run/natd.log && break; sleep 0.2; done
    end $natd
    check "a node of another protocol is refused, and told what to do" grep -q 'speaks protocol .*upgrade the older' /run/natd.log
    stop_cpmd
    virt-ports uninstall --yes --edited >/run/said
    dpkg -P virt-ports >/run/log 2>&1
}

# `pipx install` as docs/how-to/install.md has it, with Debian's pipx; the libraries' wheels are those of the package.
with_network() {
    local folder=$1
    { apt-get install -q -y --no-install-recommends pipx || { apt-get update -q && apt-get install -q -y --no-install-recommends pipx; }; } \
        >/run/log 2>&1 || { cat /run/log; fail "no pipx"; }
    PIPX_HOME=/opt/virt-ports PIPX_BIN_DIR=/usr/local/bin pipx install \
        --pip-args="--find-links $folder/wheels --constraint $folder/requirements.lock" "$folder"/virt_ports-*.whl >/run/log 2>&1 ||
        { cat /run/log; fail "pipx does not install the wheel"; }
    rm -rf /root/.cache /root/.local
}

two_roads() {
    local compare=(/usr/bin/python3 /run/two_roads.py) roles=(--role "host,edge,manager" --name srv1)
    "${compare[@]}" snapshot /run/before.json
    dpkg_i /run/virt-ports.deb
    /usr/bin/virt-ports install "${roles[@]}" >/run/said
    "${compare[@]}" snapshot /run/deb.json
    /usr/bin/virt-ports uninstall --yes >/run/said
    dpkg -P virt-ports >/run/log 2>&1
    userdel virt-ports
    "${compare[@]}" snapshot /run/between.json
    "${compare[@]}" left /run/before.json /run/between.json || fail "the package left something"

    local command=/usr/local/bin/virt-ports
    check "the command of pipx runs" test "$($command --version)" = "virt-ports ${version%+*}"
    $command install "${roles[@]}" --dry-run >/run/said
    check "a dry run says what it would do" grep -q '^would create /etc/systemd/system/natd.service' /run/said
    "${compare[@]}" snapshot /run/dry.json
    check "and does nothing" "${compare[@]}" left /run/between.json /run/dry.json
    $command install "${roles[@]}" >/run/said
    check "the hook runs" is_running_hook
    # The first of the steps that it leaves to the operator; the package does it by itself.
    check "the user and the directories are a step for the operator" grep -q 'systemd-sysusers virt-ports.conf' /run/said
    systemd-sysusers virt-ports.conf 2>/run/log
    systemd-tmpfiles --create virt-ports.conf
    check "the daemons run" eval "/opt/virt-ports/venvs/virt-ports/bin/cpmd --check && /opt/virt-ports/venvs/virt-ports/bin/natd --help >/dev/null"
    "${compare[@]}" snapshot /run/pipx.json
    "${compare[@]}" compare /run/before.json /run/deb.json /run/pipx.json || fail "the two roads end in different states"
    echo "ok: both roads end in the same state"
    $command uninstall --yes >/run/said
    userdel virt-ports
    "${compare[@]}" snapshot /run/after.json
    check "uninstalled: nothing is left" "${compare[@]}" left /run/before.json /run/after.json
}

case "$1" in
    --with-network) with_network "$2" ;;
    --inside)
        version=$(dpkg-deb -f /run/virt-ports.deb Version)
        shift
        [ $# -gt 0 ] || set -- story downgrades
        for part in "$@"; do "$part"; done
        ;;
    *) exec unshare --mount --propagation=private --pid --fork --kill-child \
        bash -euc "$(declare -f enter_overlay); enter_overlay \"\$@\"" bash "$(realpath "$0")" "$(realpath "$1")" "${@:2}" ;;
esac
