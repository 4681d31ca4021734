from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from headstart import devices, environment
from headstart.errors import HeadstartError


def test_without_a_wish_there_is_always_a_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.DEVICE, raising=False)
    found = devices.device()
    assert torch.ones(2, device=found).sum().item() == 2
    if not torch.accelerator.is_available():
        assert found == torch.device("cpu")


@pytest.mark.parametrize("wish", ["cpu", "cpu:0"])
def test_the_device_wished_for_is_the_one_taken(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.DEVICE, wish)
    assert devices.device() == torch.device(wish)


@pytest.mark.parametrize("wish", ["gpu", "CPU", "cuda:99", "xla", "hpu", "xpu:99", "meta", " "])
def test_a_device_that_is_not_here_is_named_with_those_to_choose_from(
    wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.DEVICE, wish)
    with pytest.raises(HeadstartError, match="there is no device") as caught:
        devices.device()
    assert repr(wish) in caught.value.what
    assert caught.value.where == devices.DEVICE
    assert "cpu, cuda or mps" in caught.value.do


def test_arithmetics_go_by_the_names_that_recipes_use() -> None:
    assert [devices.name_of(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [
        "bfloat16",
        "float16",
        "float32",
    ]


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, [torch.bfloat16]),
        ({"amx_bf16": False, "avx512_bf16": True}, [torch.bfloat16]),
        ({"amx_bf16": False, "avx512_bf16": False}, []),
        ({"architecture": "aarch64"}, []),
    ],
)
def test_a_processor_is_fast_in_bfloat16_only_if_it_multiplies_it(
    able: dict[str, object], expected: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert devices.fast_dtypes(torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("native", "expected"), [(True, [torch.bfloat16, torch.float16]), (False, [torch.float16])]
)
def test_a_gpu_is_asked_for_real_bfloat16_and_not_for_imitation(
    native: bool, expected: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert devices.fast_dtypes(torch.device("cuda")) == expected


def test_hardware_that_nobody_knows_is_left_with_float32() -> None:
    assert devices.fast_dtypes(torch.device("mps")) == []


@pytest.mark.parametrize("wish", ["0", "-1", "two", "1.5", " ", "2 "])
def test_a_number_of_processes_that_is_none_is_named(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.PROCESSES, wish)
    with pytest.raises(HeadstartError, match="is no number of processes") as caught:
        devices.processes()
    assert repr(wish) in caught.value.what
    assert caught.value.where == devices.PROCESSES


@pytest.mark.parametrize(("wish", "expected"), [("1", 1), ("12", 12)])
def test_as_many_processes_train_as_are_wished_for(
    wish: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.PROCESSES, wish)
    assert devices.processes() == expected


def test_several_processes_do_not_each_train_the_same_model_on_a_device_they_cannot_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "device", lambda: torch.device("mps"))
    monkeypatch.setenv(devices.PROCESSES, "1")
    assert devices.processes() == 1
    monkeypatch.setenv(devices.PROCESSES, "2")
    with pytest.raises(HeadstartError, match="cannot share mps") as caught:
        devices.processes()
    assert devices.DEVICE in str(caught.value.do)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("400000 100000", 4), ("150000 100000", 2), ("10000 100000", 1), ("max 100000", 64), (None, 64)],
)
def test_a_container_has_the_cores_of_its_quota_and_not_those_of_its_host(
    quota: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if quota:
        environment.CPU_LIMIT.write_text(f"{quota}\n")
    assert environment.cores() == expected
    environment.keep_to_quota()
    assert os.environ.get("OMP_NUM_THREADS") == (None if expected == 64 else str(expected))
    os.environ["OMP_NUM_THREADS"] = "3"
    environment.keep_to_quota()
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_process_that_is_bound_to_some_cores_counts_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert environment.cores() == 2


@pytest.mark.parametrize(("on", "gpus", "expected"), [("cpu", 4, 1), ("cuda", 4, 4), ("cuda:1", 4, 1)])
def test_without_a_wish_each_gpu_gets_a_process(
    on: str, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(devices.PROCESSES, raising=False)
    monkeypatch.setattr(devices, "device", lambda: torch.device(on))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert devices.processes() == expected
