#!/bin/bash
# PID 1 of one libvirt host: makes the machine around itself private, then reaps orphans (qemu, dnsmasq) until killed.
# Runs inside network, mount, uts and pid namespaces of its own; lab/node.py starts it.
# usage: node-init.sh NAME NODE_DIRECTORY LAB_DIRECTORY      writes "ready" to descriptor 3
set -eu
name=$1 node=$2 lab=$3

hostname "$name"
# /sys/class/net must show this network namespace. That this hides the cgroups is fine: libvirt does without.
mount -t sysfs sysfs /sys

# Both are below /run, which is about to be covered.
mount --bind "$lab" /mnt
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p "$lab" /run/host-etc /run/lock /run/libvirt
mount --bind /mnt "$lab"
umount /mnt

mount --bind /etc /run/host-etc # what lab/node.py left as it is links here
mount --bind "$node/etc" /etc
mount --bind "$node/run-libvirt" /run/libvirt
for directory in var/lib/libvirt var/log/libvirt var/cache/libvirt; do
    mount --bind "$node/$directory" "/$directory"
done

# A /dev without kvm. Guests run under software emulation everywhere, so that the lab is the same on every machine,
# and a /dev/kvm that cannot be used makes libvirt probe QEMU again and again, seconds at a time.
mkdir /run/dev
mount -t tmpfs -o mode=755 tmpfs /run/dev
mkdir /run/dev/{pts,shm,net,mqueue}
for device in null zero full random urandom tty net/tun; do
    touch "/run/dev/$device"
    mount --bind "/dev/$device" "/run/dev/$device"
done
ln -s /proc/self/fd /run/dev/fd
ln -s pts/ptmx /run/dev/ptmx
[ -S /dev/log ] && touch /run/dev/log && mount --bind /dev/log /run/dev/log
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts /run/dev/pts
mount -t tmpfs tmpfs /run/dev/shm
mount --move /run/dev /dev

echo ready >&3
exec 3>&-
trap 'exit 0' TERM
while :; do
    sleep 86400 &
    wait $! || true
done
