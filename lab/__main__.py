"""``python -m lab``: the command behind the make targets ``lab-*``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from lab import demo, image
from lab.errors import LabError
from lab.lab import DEFAULT_NAME, Lab
from lab.sites import CLUSTER, SITES


def main(arguments: list[str] | None = None) -> int:
    """Run one command. :return: Exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        site = SITES.get(getattr(options, "site", None) or "")
        lab = Lab(options.lab, site=site, with_daemons=not getattr(options, "bare", False))
        options.call(lab, options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab", description="A virt-ports site on this machine. Needs root.")
    parser.add_argument(
        "--lab",
        default=os.environ.get("LAB") or DEFAULT_NAME,
        metavar="NAME",
        help=f"which lab (default: $LAB, else {DEFAULT_NAME}); labs with different names can run at once",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, call: Callable[[Lab, argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(call=call)
        return command

    up = add("up", _up, "bring the lab up")
    _add_site(up)
    up.add_argument("--bare", action="store_true", help="machines, libvirtds and guests only: no cpmd, no natd")
    add("down", _down, "remove everything of the lab, also after a crash")
    _add_site(add("demo", _demo, "one real VM from its start to its last freed port, in a lab of its own"))
    add("image", _image, "build the guest image if it is not there")
    add("status", _status, "show the machines, daemons and guests")
    for name, call, text in (("guest", _guest, "start a light guest"), ("vm", _vm, "start a real QEMU guest")):
        command = add(name, call, text)
        command.add_argument("name")
        command.add_argument("--host", help="which host (default: the first)")
    add("guest-rm", _guest_rm, "remove a light guest").add_argument("name")
    add("vm-rm", _vm_rm, "shut a real guest down and remove it").add_argument("name")
    command = add("exec", _exec, "run a command on a machine or in a light guest")
    command.add_argument("node")
    command.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND …")
    return parser


def _add_site(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--site",
        choices=SITES,
        help="; ".join(f"{site.name}: {site.summary}" for site in SITES.values()) + f" (default: {CLUSTER.name})",
    )


def _say(step: str, seconds: float) -> None:
    print(f"{step:<50} {seconds:6.2f} s", flush=True)


def _up(lab: Lab, _options: argparse.Namespace) -> None:
    begin = time.monotonic()
    if not lab.up(_say):
        broken = lab.broken_parts()
        print(f"lab {lab.name} is up already" + (f", but not running: {', '.join(broken)}" if broken else ""))
        return
    _say(f"lab {lab.name} is up", time.monotonic() - begin)
    which = "" if lab.name == DEFAULT_NAME else f" LAB={lab.name}"
    socket = "" if lab.name == DEFAULT_NAME else f" --socket {lab.socket}"
    guest = f"make lab-guest NAME=a HOST={lab.site.hosts[0]}{which}"
    print(f"next: {guest}; .venv/bin/virt-ports list{socket}; make lab-down{which}")


def _down(lab: Lab, _options: argparse.Namespace) -> None:
    print(f"lab {lab.name} is down" if lab.down(_say) else f"lab {lab.name} was not up")


def _status(lab: Lab, _options: argparse.Namespace) -> None:
    if not lab.is_up:
        print(f"lab {lab.name} is down")
        return
    broken = lab.broken_parts()
    print(f"lab {lab.name} is up as site {lab.site.name}: {lab.site.summary}")
    print(f"files and logs in {lab.state}, operators' socket {lab.socket}")
    print(f"not running: {', '.join(broken)}" if broken else "everything runs")
    for node in lab.site.namespaces:
        print(f"  {node:<10} namespace {lab.namespace(node)}")
    for guest in lab.guests():
        print(
            f"  {guest.name:<10} {guest.kind} guest on {guest.host}, {guest.address or 'address by DHCP'}, {guest.uuid}"
        )


def _image(_lab: Lab, _options: argparse.Namespace) -> None:
    if image.is_built():
        return
    begin = time.monotonic()
    image.guest_image()
    _say("guest image built", time.monotonic() - begin)


def _demo(_lab: Lab, options: argparse.Namespace) -> None:
    demo.demo(SITES[options.site or CLUSTER.name])


def _guest(lab: Lab, options: argparse.Namespace) -> None:
    host = options.host or lab.site.hosts[0]
    guest = lab.add_guest(options.name, host)
    print(f"{guest.name} runs on {host}, {guest.address}; run commands in it: ip netns exec {guest.namespace} …")


def _vm(lab: Lab, options: argparse.Namespace) -> None:
    begin = time.monotonic()
    host = options.host or lab.site.hosts[0]
    vm = lab.add_vm(options.name, host)
    _say(f"{vm.name} started by libvirt on {host}", time.monotonic() - begin)
    vm.wait_ready()
    _say(f"{vm.name} is ready", time.monotonic() - begin)


def _guest_rm(lab: Lab, options: argparse.Namespace) -> None:
    lab.remove_guest(options.name)
    print(f"{options.name} is removed")


def _vm_rm(lab: Lab, options: argparse.Namespace) -> None:
    vm = lab.vm(options.name)
    try:
        vm.shut_down()
    except LabError as error:
        print(f"lab: {error}; it is switched off instead", file=sys.stderr)
    lab.remove_vm(options.name)
    print(f"{options.name} is removed")


def _exec(lab: Lab, options: argparse.Namespace) -> None:
    argv = lab.command(options.node, *(options.argv or ["bash"]))
    # The traffic generator is on the PATH.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{lab.conngen.parent}"
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        raise LabError(f"cannot run {argv[0]}: {error.strerror}; run `make setup`") from error


if __name__ == "__main__":
    sys.exit(main())
