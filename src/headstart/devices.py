"""Devices: what this machine computes on, and in which arithmetic.

Goes in: the machine, ``HEADSTART_DEVICE``, and a recipe's wish. Comes out: a torch device and a dtype. Never
moves or runs anything.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from headstart.errors import HeadstartError

if TYPE_CHECKING:
    import torch

DEVICE = "HEADSTART_DEVICE"


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


def dtype(precision: str, on: torch.device) -> torch.dtype:
    """The arithmetic of a forward pass; ``auto`` takes bfloat16 where the hardware multiplies it faster.

    On a CPU that is one with matrix units (AMX) or dot products (AVX512-BF16); others would only imitate it.

    Args:
        precision: ``auto``, ``bfloat16`` or ``float32``.
        on: the device that will compute.
    """
    import torch

    if precision != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]
    if on.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif on.type == "cpu":
        able = torch.cpu.get_capabilities()
        fast = bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32
