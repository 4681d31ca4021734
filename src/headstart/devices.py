"""Devices: what this machine computes on, and in which arithmetic.

Goes in: the machine and ``HEADSTART_DEVICE``. Comes out: a torch device, and the dtypes that it is fast in.
Never moves or runs anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

from headstart.errors import HeadstartError

if TYPE_CHECKING:
    import torch

DEVICE = "HEADSTART_DEVICE"
PROCESSES = "HEADSTART_PROCESSES"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def device() -> torch.device:
    """The device to compute on: ``HEADSTART_DEVICE`` if it is set, else a GPU, else the CPU.

    Raises:
        HeadstartError: the device wanted is not a device, or not in this machine.
    """
    import torch

    wanted = os.environ.get(DEVICE)
    if not wanted:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        chosen = torch.device(wanted)
        torch.empty(1, device=chosen).cpu()  # which the device `meta` cannot: it has no memory
    except (RuntimeError, AssertionError, ImportError) as error:  # torch built without a backend asserts
        raise HeadstartError(
            f"there is no device {wanted!r} here",
            where=DEVICE,
            table=[str(error).partition("\n")[0][:150]],
            do="set it to cpu, cuda or mps, or leave it unset",
        ) from None
    return chosen


def processes() -> int:
    """Processes that train together: ``HEADSTART_PROCESSES`` if it is set, else one for each GPU.

    Raises:
        HeadstartError: the number wanted is none, or more than can share the device.
    """
    import torch

    wanted = os.environ.get(PROCESSES)
    if not wanted:
        return max(1, torch.cuda.device_count()) if device() == torch.device("cuda") else 1
    if not wanted.isdecimal() or wanted == "0":
        raise HeadstartError(
            f"{wanted!r} is no number of processes", where=PROCESSES, do="set it to 1 or more"
        )
    if int(wanted) > 1 and device().type == "mps":  # each would train, and publish, all by itself
        raise HeadstartError(
            "several processes cannot share mps", where=PROCESSES, do=f"set it to 1, or {DEVICE} to cpu"
        )
    return int(wanted)


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for the next time.

    A network takes and frees hundreds of MB at each step. glibc would give every large block back to the
    system, which clears each page anew: a third of the time of EfficientNet-Lite0 on a CPU, trained or asked.
    Elsewhere nothing happens. For processes of our own: it holds for all that runs in this one.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left: CUDA has an error of its own, Apple's GPUs have words for it."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def empty_cache(on: torch.device) -> None:
    """Give back what PyTorch keeps of a GPU's memory, which may be there in pieces of the wrong size."""
    import torch

    if on.type == "cuda":
        torch.cuda.empty_cache()
    elif on.type == "mps":
        torch.mps.empty_cache()


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def fast_dtypes(on: torch.device) -> list[torch.dtype]:
    """Arithmetics that this device multiplies faster than float32, the fastest first.

    On a CPU that is bfloat16, with matrix units (AMX) or dot products (AVX512-BF16); others would only
    imitate it. float16 gained nothing on any CPU that was measured.
    """
    import torch

    if on.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return [torch.bfloat16, torch.float16] if native else [torch.float16]
    able = torch.cpu.get_capabilities() if on.type == "cpu" else {}
    return [torch.bfloat16] if able.get("amx_bf16") or able.get("avx512_bf16") else []
