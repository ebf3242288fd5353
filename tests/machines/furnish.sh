#!/bin/bash
# Make a root of chroot.sh a machine that boots: settings, and no traces of how it was made. Run inside the root
# by image.py.
set -euo pipefail

echo srv1 >/etc/hostname
printf '127.0.0.1 localhost\n203.0.113.10 srv1\n' >/etc/hosts
printf 'nameserver 203.0.113.1\n' >/etc/resolv.conf
cat >/etc/network/interfaces <<INTERFACES
auto lo
iface lo inet loopback

auto ens3
iface ens3 inet static
    address 203.0.113.10/24
    gateway 203.0.113.1
INTERFACES
# The journal stays after a reboot, and is on the console should the machine not come up.
mkdir -p /var/log/journal

# Tests start these one by one. The timers would run at random times.
systemctl disable --quiet firewalld ufw docker docker.socket containerd nftables
systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer \
    systemd-timesyncd.service logrotate.timer
systemctl enable --quiet qemu-guest-agent || true
# Debian 12 starts the agent by udev, and blocks nothing.
rm -f /etc/default/qemu-guest-agent

# Machines install no packages of the archive: without its lists apt needs seconds, not half a minute.
rm -rf /src /root/.cache /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /var/lib/apt/lists/*
