#!/bin/sh
# Called by udhcpc when the lease changes; the facts are in the environment.
case "$1" in
deconfig)
    ip addr flush dev "$interface"
    ip link set "$interface" up
    ;;
bound | renew)
    ip addr flush dev "$interface"
    ip addr add "$ip/${mask:-24}" dev "$interface"
    [ -n "$router" ] && ip route replace default via "${router%% *}"
    [ -n "$dns" ] && echo "nameserver ${dns%% *}" >/etc/resolv.conf
    ;;
esac
