"""Launching: one training in several processes that share its batches.

Goes in: a recipe's path and a number of processes. Comes out: the stage, run by all of them together through
torchrun's agent. Never trains by itself.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from headstart import devices, environment
from headstart.errors import HeadstartError
from headstart.stages import ERROR_FILE

LAST = 20  # lines of a process's own words that an error quotes


def train(recipe: Path, processes: int) -> None:
    """Run the stage ``train`` in so many processes of this machine.

    Raises:
        HeadstartError: the first that a process ended with.
    """
    # Not `accelerate launch`, which starts a single process on a CPU, whatever number it is given.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # tells all of it again
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        told = Path(folder) / "error.json"
        # The first process speaks to the terminal; of the others, that echo it, the words are kept.
        others: dict[int, Std] = dict.fromkeys(range(1, processes), Std.ALL)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="headstart",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",  # not by this machine's name, which may lead nowhere
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=others),
        )
        # The cores are shared out: each process of its own accord would take them all.
        threads = {"OMP_NUM_THREADS": str(max(1, environment.cores() // processes))}
        if os.environ.get("OMP_NUM_THREADS") != str(environment.cores()):  # no wish: see keep_to_quota
            threads |= os.environ
        given = os.environ | threads | {ERROR_FILE: str(told)}
        command = ["-m", "headstart.cli", "stage", "train", str(recipe)]
        before = dict(os.environ)
        os.environ.update(given)
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            if told.exists():
                raise HeadstartError(**json.loads(told.read_text(encoding="utf-8"))) from None
            rank, failure = error.get_first_failure()
            said = [line for log in Path(folder).rglob(f"{rank}/stderr.log") for line in _lines(log)]
            raise HeadstartError(
                f"training in {processes} processes ended with {failure.exitcode}",
                where=f"process {rank}",
                table=said[-LAST:],
                do=f"read what is printed above, or set {devices.PROCESSES}=1",
            ) from None
        finally:
            os.environ.clear()
            os.environ.update(before)


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()
