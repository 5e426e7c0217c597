"""Two hosts on one machine: network namespaces that a virtual cable joins, and `torchrun` on both."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

INTERFACE = "link0"
PROCESSES_A_HOST = 2
_PORT = 29500


class Unavailable(RuntimeError):
    """This machine does not let its user make network namespaces."""


class Host:
    """One end of the cable.

    Args:
        number: 0 or 1; the first one's first process is rank 0.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.namespace = f"dpzero-{os.getpid()}-{number}"
        self.address = f"10.213.0.{number + 1}"

    def start(self, output: Path, script: str, *arguments: object, hidden: Path | None = None) -> subprocess.Popen[str]:
        """This host's part of a launch over both.

        Args:
            output: a file for what its processes print.
            script: the program.
            arguments: the program's.
            hidden: a folder whose content on disk this host does not see: it has an empty one of its own there.
        """
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={self.number}"]
        command += [f"--nproc-per-node={PROCESSES_A_HOST}", f"--master-addr={Host(0).address}"]
        command += [f"--master-port={_PORT}", script, *map(str, arguments)]
        inside = ["ip", "netns", "exec", self.namespace]
        if hidden is not None:
            # The namespace has mounts of its own, which end with its last process.
            inside += ["sh", "-c", f"mount -t tmpfs none '{hidden}' && exec \"$@\"", "sh"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment |= {"GLOO_SOCKET_IFNAME": INTERFACE, "TP_SOCKET_IFNAME": INTERFACE}
        with output.open("w") as file:
            return subprocess.Popen([*inside, *command], env=environment, stdout=file, stderr=file, text=True)

    def kill(self) -> None:
        """Ends all its processes by SIGKILL, its launcher among them: the power is off."""
        for process in _ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Within the block nothing arrives on either host, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")
        try:
            yield
        finally:
            _ip("-n", self.namespace, "link", "set", INTERFACE, "up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them; afterwards their processes have ended and they are gone.

    Raises:
        Unavailable: they cannot be made here.
    """
    hosts = Host(0), Host(1)
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        ends = [["name", INTERFACE, "netns", host.namespace] for host in hosts]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/30", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            if shutil.which("ip") and host.namespace in _ip("netns", "list"):
                host.kill()
                _ip("netns", "delete", host.namespace)


def wait_for(condition: Path | Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Returns when a file is there, or when processes have ended.

    Raises:
        TimeoutError: they are not, after `seconds`.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition.exists() if isinstance(condition, Path) else all(p.poll() is not None for p in condition):
            return
        time.sleep(0.05)
    raise TimeoutError(f"still waiting after {seconds} s")


def _ip(*arguments: str) -> str:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Unavailable("iproute2's `ip` is not installed") from None
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"`ip {' '.join(arguments)}`: {error.stderr.strip()}") from None
    return done.stdout
