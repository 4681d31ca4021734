"""Launching: one training in several processes that share its batches.

Goes in: a recipe's path and a number of processes. Comes out: the stage, run by all of them together through
torchrun. Never trains by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from headstart import devices
from headstart.errors import HeadstartError
from headstart.stages import ERROR_FILE


def launched() -> bool:
    """Whether this process is one of several that were started to train together."""
    return "WORLD_SIZE" in os.environ


def train(recipe: Path, processes: int) -> None:
    """Run the stage ``train`` in so many processes of this machine.

    Raises:
        HeadstartError: the one that a process ended with.
    """
    # Not `accelerate launch`, which starts a single process on a CPU, whatever number it is given.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes)]
    command += ["-m", "headstart.cli", "stage", "train", str(recipe)]
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        told = Path(folder) / "error.json"
        told.touch()
        # The cores are shared out: each process of its own accord would take them all.
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        environment = {"OMP_NUM_THREADS": threads} | os.environ | {ERROR_FILE: str(told)}
        done = subprocess.run(command, env=environment, check=False)
        if text := told.read_text(encoding="utf-8"):
            raise HeadstartError(**json.loads(text))
    if done.returncode:
        raise HeadstartError(
            f"training in {processes} processes ended with {done.returncode}",
            where="torchrun",
            do=f"read what it printed above, or set {devices.PROCESSES}=1",
        )
