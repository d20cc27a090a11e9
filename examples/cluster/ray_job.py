"""Run a command of layersmith on a Ray cluster, with one process on each GPU.

    ray job submit --working-dir . -- python ray_job.py --processes 8 compress PARENT RUN --data TEXT --params 0.7

The folders must be on a file system that all nodes share. On a cluster without GPUs, ``--cpus 4`` gives each process
four cores. The same command resumes an interrupted run. The exit status is that of the first process that failed.
"""

import argparse
import os
import socket
import subprocess
import sys

import ray


class Process:
    """One process of the command, where Ray places it."""

    def address(self) -> tuple[str, int]:
        """The address of this node and a port that is free on it."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, command: list[str], rank: int, processes: int, address: str, port: int) -> int:
        # Ray shows each process its own GPU only, so that it is number 0 here.
        group = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "MASTER_ADDR": address, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in group.items()}
        return subprocess.run([sys.executable, "-m", "layersmith", *command], env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--cpus", type=int, help="cores for each process, which then gets no GPU")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command and arguments of layersmith")
    args = parser.parse_args()
    ray.init()
    resources = {"num_gpus": 1} if args.cpus is None else {"num_cpus": args.cpus}
    processes = [ray.remote(Process).options(**resources).remote() for _ in range(args.processes)]
    address, port = ray.get(processes[0].address.remote())
    running = [p.run.remote(args.command, rank, args.processes, address, port) for rank, p in enumerate(processes)]
    return next((status for status in ray.get(running) if status), 0)


if __name__ == "__main__":
    sys.exit(main())
