"""How do tests reach this machine by ssh? Through a real sshd on loopback, with keys of its own, that ends with the test."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.dist.job import alive, descendants, kill_tree, until

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")
_SEPARATED = Path("/run/sshd")


def skip_without_sshd() -> None:
    if not (SSHD and shutil.which("ssh")):
        pytest.skip("needs openssh-client and openssh-server")
    if os.geteuid() != 0:
        pytest.skip("needs root, as sshd does")
    _SEPARATED.mkdir(mode=0o755, exist_ok=True)  # as its service makes it


@contextmanager
def running_sshd(folder: Path, *hosts: str) -> Iterator[Path]:
    """A configuration for ssh's -F in which all ``hosts`` are this machine. Whom it trusts is all in the folder."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    config = folder / "ssh_config"
    config.write_text(
        f"Host {' '.join(hosts)}\nHostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nIdentityFile {folder}/user_key\n"
        f"IdentitiesOnly yes\nStrictHostKeyChecking yes\nUserKnownHostsFile {folder}/known_hosts\n"
        "GlobalKnownHostsFile /dev/null\n"
    )
    assert SSHD is not None
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
        )
        try:
            until(lambda: _answers(port) or server.poll() is not None, "sshd to answer")
            assert server.poll() is None, (folder / "sshd.log").read_text()
            yield config
        finally:
            sessions = descendants(server.pid)
            kill_tree(server)
            until(lambda: not any(map(alive, sessions)), "its sessions to be gone")


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
