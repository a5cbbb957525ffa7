"""Processes as the hosts of a cluster: they run side by side, and all end well or all are ended."""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import Curves, draw_curves, positive_integer, save
from matplotlib.figure import Figure


def add_host(parser: argparse.ArgumentParser) -> None:
    """Adds what a host has to know, --process, --processes and --address, and where it saves."""
    parser.add_argument("--process", type=int, help="be this host, 0 for the first; default: none")
    parser.add_argument("--processes", type=positive_integer, default=1, help="how many there are")
    parser.add_argument("--address", help="where the first host listens")
    parser.add_argument("--folder", type=Path, help="where hosts save, or have saved")
    parser.add_argument("--save-every", type=positive_integer, default=20, help="so many steps")


def launch_hosts(command: Sequence[str], hosts: int, devices: int, seconds: float = 300) -> None:
    """Runs a script of Python once for each host, and waits for all of them.

    If one fails, or they take too long, the others are killed: left alone, they would wait for it
    in the next exchange, for minutes or for ever.

    Args:
      command: The script and its arguments, to which --process, --processes and --address are
        added: which of the hosts it is, of how many, and where the first of them listens.
      hosts: How many there are.
      devices: How many virtual CPU devices each has.
      seconds: The time limit.

    Raises:
      RuntimeError: If not all of them ended well.
    """
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    settings |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"} if hosts > 1 else {}
    common = [sys.executable, *command, "--processes", str(hosts), "--address", _free_address()]
    deadline, running = time.monotonic() + seconds, []
    try:
        for i in range(hosts):
            host = subprocess.Popen([*common, "--process", str(i)], env={**os.environ, **settings})
            running.append(host)
        # None of a host that runs, 0 of one that ended well.
        while None in (codes := [host.poll() for host in running]) and not any(codes):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{hosts} hosts took longer than {seconds} seconds")
            time.sleep(0.05)
    finally:
        for host in running:
            host.kill()
            host.wait()
    if any(codes):
        raise RuntimeError(f"a host failed, and the others were ended: exit codes {codes}")


def compare(path: Path, title: str, curves: Curves, others: Curves) -> None:
    """Prints how far the same curves of two runs are apart, and draws them as lines and circles.

    Raises:
      SystemExit: If it is more than 1e-5.
    """
    axes = Figure(figsize=(7, 4.5), dpi=150, layout="constrained").subplots()
    draw_curves(axes, curves)
    axes.set(title=title)
    for name, curve in others.items():
        axes.plot(*zip(*curve, strict=True), "o", color="#222222", mfc="none", ms=4)
        off = np.max(np.abs(np.subtract(curve, curves[name])))
        print(f"{name}  last loss {curve[-1][1]:.3f}  largest difference {off:.1e}")
        if not off <= 1e-5:
            raise SystemExit(f"{name}: the losses of one run are not those of the other")
    save(axes.figure, path)


def _free_address() -> str:
    """A port of this machine on which nobody listens yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
