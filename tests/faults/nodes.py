"""Machines of a cluster as network namespaces of this one, whose links can be cut."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

# Name of the link in every node: names are free in each namespace.
_LINK = "node"
_PORT = 29511
_NETWORK = 0x40000000  # CLONE_NEWNET


def are_possible() -> bool:
    """Whether this process may make network namespaces."""
    return shutil.which("ip") is not None and os.geteuid() == 0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Nodes:
    """Network namespaces that a switch connects; a context manager that makes and removes them.

    Args:
        count: Number of nodes. Node 0 has the address of the launcher.
    """

    def __init__(self, count: int):
        self.names = [f"layersmith-{os.getpid()}-{rank}" for rank in range(count)]
        self._switch = f"layersmith-{os.getpid()}-switch"

    def __enter__(self) -> Nodes:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        for name in (self._switch, *self.names):
            _ip("netns", "add", name)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for rank, name in enumerate(self.names):
            port = ("peer", "name", f"port{rank}", "netns", self._switch)
            _ip("link", "add", _LINK, "netns", name, "type", "veth", *port)
            _ip("-n", self._switch, "link", "set", f"port{rank}", "master", "switch")
            _ip("-n", name, "addr", "add", f"10.231.7.{rank + 1}/24", "dev", _LINK)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", _LINK, "up")
            self.mend(rank)

    def __exit__(self, *_: object) -> None:
        for name in (self._switch, *self.names):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self, rank: int) -> None:
        """Cut a node off from all others."""
        _ip("-n", self._switch, "link", "set", f"port{rank}", "down")

    def mend(self, rank: int) -> None:
        """Connect a node to the others."""
        _ip("-n", self._switch, "link", "set", f"port{rank}", "up")

    def environment(self, rank: int, world_size: int) -> dict[str, str]:
        """What a launcher sets for a process on a node."""
        of_group = {"WORLD_SIZE": world_size, "MASTER_ADDR": "10.231.7.1", "MASTER_PORT": _PORT, "RANK": rank}
        return {name: str(value) for name, value in of_group.items()} | {"GLOO_SOCKET_IFNAME": _LINK}

    def enter(self, rank: int) -> None:
        """Move this process, which has one thread, to a node."""
        with open(f"/run/netns/{self.names[rank]}", "rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NETWORK):
                raise OSError(ctypes.get_errno(), "setns")
