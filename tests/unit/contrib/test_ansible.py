"""The Ansible role, by a real ansible-playbook: it installs into a folder, and changes nothing the second time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONTRIB = Path(__file__).parents[3] / "contrib/ansible"
BIN = Path(sys.executable).parent
PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  roles:
    - role: virt_ports
      virt_ports_command: {command}
      virt_ports_start: false
      virt_ports_options: [--root, {root}, --uplink, eth0, --underlay-address, 172.30.0.11, --name, srv1]
"""


def ansible(playbook: Path, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "ANSIBLE_ROLES_PATH": str(CONTRIB / "roles"),
        "ANSIBLE_HOME": str(home),
        "ANSIBLE_LOCAL_TEMP": str(home),
        "ANSIBLE_REMOTE_TEMP": str(home),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
        "LC_ALL": "C.UTF-8",
    }
    command = [str(BIN / "ansible-playbook"), str(playbook), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def test_the_example_is_a_playbook(tmp_path: Path) -> None:
    done = ansible(CONTRIB / "site.yml", tmp_path, "--syntax-check")
    assert done.returncode == 0, done.stderr


def test_it_installs_once_and_in_check_mode_not_at_all(root: Path, tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAY.format(command=BIN / "virt-ports", root=root))
    for options, changed in ((("--check",), 1), ((), 1), ((), 0), (("--check",), 0)):
        done = ansible(playbook, tmp_path, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"changed={changed}" in done.stdout, done.stdout
        assert (root / "etc/virt-ports/natd.toml").exists() == ("--check" not in options or changed == 0)
        assert ("virt-ports node approve srv1" in done.stdout) == bool(changed)
    settings = json.loads(
        subprocess.run(
            [BIN / "virt-ports", "config", "check", "-o", "json", root / "etc/virt-ports/natd.toml"],
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    assert settings


def test_an_option_that_is_wrong_fails_the_play(root: Path, tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAY.format(command=BIN / "virt-ports", root=root).replace("172.30.0.11", "nowhere"))
    done = ansible(playbook, tmp_path)
    assert done.returncode != 0
    assert "nowhere" in done.stdout
    assert not (root / "etc/virt-ports").exists()
