"""Checkpoints: what was saved comes back bit for bit, and no kill, damage or full disk takes the last one."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from headstart.checkpoints import Checkpoint, Checkpoints

# Asked by line, a process with nothing else in it forks one that saves step after step until it is killed:
# from outside, or by itself at the Nth file that it opens, renames or removes.
SAVERS = """
import json, os, signal, sys
from pathlib import Path
import safetensors.torch, torch
from headstart.checkpoints import Checkpoints

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    asked = json.loads(line)
    if pid := os.fork():
        print(pid, flush=True)
        continue
    signal.alarm(20)
    checkpoints, events = Checkpoints(Path(asked["folder"])), 0

    def hook(event, arguments):
        global events
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}:
            events += 1
            if events == asked["killed_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    if asked["killed_at"]:
        sys.addaudithook(hook)
    for step in range(asked["first"], asked["first"] + asked["steps"]):
        tensors = {"weight": torch.full((asked["size"],), float(step)), "step": torch.tensor(step)}
        checkpoints.save(step, tensors, {"step": step, "history": list(range(step))})
    os._exit(0)
"""
Saver = Callable[..., int]


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    """Starts a process that saves; returns its id."""
    with subprocess.Popen(
        [sys.executable, "-c", SAVERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:

        def start(folder: Path, first: int, steps: int, **options: int) -> int:
            asked = {"folder": str(folder), "first": first, "steps": steps}
            asked |= {"size": 1000, "killed_at": 0} | options
            assert parent.stdin and parent.stdout
            print(json.dumps(asked), file=parent.stdin, flush=True)
            return int(parent.stdout.readline())

        yield start
        assert parent.stdin
        parent.stdin.close()


def gone(pid: int) -> None:
    """Wait for the end of a process."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.001)
    raise TimeoutError(f"process {pid} goes on")


def state(step: int, size: int = 100) -> dict[str, Tensor]:
    return {"weight": torch.full((size,), float(step)), "step": torch.tensor(step)}


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        assert checkpoints.save(step, state(step), {"step": step})
    return checkpoints


def whole(checkpoint: Checkpoint | None) -> int:
    """The step of a checkpoint, all parts of which are from that step."""
    assert checkpoint is not None
    step = checkpoint.step
    assert checkpoint.notes["step"] == step
    assert checkpoint.tensors["step"].item() == step
    assert (checkpoint.tensors["weight"] == step).all()
    return step


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


def pairs(*steps: int) -> list[str]:
    return [f"step-{step:07}.{ending}" for step in steps for ending in ("json", "safetensors")]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return caplog.messages


def same_bits(a: Tensor, b: Tensor) -> bool:
    def bits(tensor: Tensor) -> list[int]:
        tensor = tensor.detach().contiguous()
        return list(bytes(tensor.reshape(-1).view(torch.uint8).tolist())) if tensor.numel() else []

    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


# What comes back


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
    ids=str,
)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(6, 35, generator=torch.Generator().manual_seed(0)) * 10
    if dtype.is_floating_point:
        values[0, :4] = torch.tensor([math.nan, -math.inf, -0.0, 1e-42])
    matrix = values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)
    matrix[1] = 0
    tensors = {
        "matrix": matrix,
        "number": matrix[2, 3].clone(),
        "nothing": matrix[:0].clone(),
        "turned": matrix.clone().T,
        "every other": matrix.clone()[:, ::2],
    }
    checkpoints = Checkpoints(tmp_path / "kept")
    assert checkpoints.save(7, tensors, {})
    found = checkpoints.latest()
    assert found is not None
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(found.tensors[name], tensor), name
    assert found.tensors["number"].shape == ()


def test_the_largest_whole_numbers_come_back(tmp_path: Path) -> None:
    numbers = torch.tensor([2**63 - 1, -(2**63), 2**53 + 1])
    checkpoints = Checkpoints(tmp_path / "kept")
    assert checkpoints.save(1, {"numbers": numbers}, {})
    found = checkpoints.latest()
    assert found is not None
    assert found.tensors["numbers"].tolist() == numbers.tolist()


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    network = torch.nn.Linear(3, 3)
    tensors = {
        "whole": base,
        "again": base,
        "rows": base.view(3, 4),
        "part": base[4:8],
        "tied": network.weight,
        "tied too": network.weight.T,
        "alone": torch.arange(20.0)[5:9],
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    checkpoints = Checkpoints(tmp_path / "kept")
    assert checkpoints.save(1, tensors, {})
    found = checkpoints.latest()
    assert found is not None
    for name, tensor in before.items():
        assert same_bits(found.tensors[name], tensor), name
    found.tensors["whole"].zero_()
    assert same_bits(found.tensors["again"], before["again"])
    assert same_bits(base, before["whole"])


def test_training_on_from_what_came_back_does_not_change_the_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "kept", 3)
    found = checkpoints.latest()
    assert found is not None
    found.tensors["weight"].add_(1)
    assert whole(checkpoints.latest()) == 3


def test_notes_come_back(tmp_path: Path) -> None:
    notes = {
        "loss": [0.1, 1e-300, math.inf, -math.inf, math.nan],
        "epochs": [{"epoch": 1, "name": "Zürich", "best": None, "done": True}],
        "sha256": "not that of the file",
        "step": 2**60 + 1,
    }
    checkpoints = Checkpoints(tmp_path / "kept")
    assert checkpoints.save(1, state(1), notes)
    found = checkpoints.latest()
    assert found is not None
    assert math.isnan(found.notes["loss"].pop())
    assert math.isnan(notes["loss"].pop())  # type: ignore[attr-defined]
    assert found.notes == notes


def test_where_nothing_was_saved_there_is_none_and_nothing_to_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "kept")
    assert checkpoints.latest() is None
    assert not (tmp_path / "kept").exists()
    assert warnings(caplog) == []


# How many


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2, 9, 11, 12)
    assert names(tmp_path) == sorted(pairs(11, 12))
    assert whole(checkpoints.latest()) == 12


def test_steps_are_ordered_as_numbers_even_when_they_outgrow_their_names(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 9_999_999, 10_000_000, 123_456_789)
    assert names(tmp_path) == sorted(pairs(10_000_000, 123_456_789))
    assert whole(checkpoints.latest()) == 123_456_789


def test_what_was_just_saved_is_never_too_old(tmp_path: Path) -> None:
    saved(tmp_path, 50, 60)
    saved(tmp_path, 10)
    assert pairs(10)[0] in names(tmp_path)


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    assert checkpoints.save(2, {"other": torch.ones(3)}, {"second": True})
    found = checkpoints.latest()
    assert found is not None
    assert (list(found.tensors), found.notes) == (["other"], {"second": True})
    assert names(tmp_path) == pairs(1, 2)


# Kills


def test_killed_at_every_file_it_touches_a_save_leaves_the_one_before_or_itself(
    tmp_path: Path, saver: Saver, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "two", 0, 1)
    steps: list[int] = []
    for number in range(1, 200):
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(tmp_path / "two", folder)
        gone(saver(folder, first=2, steps=1, killed_at=number))
        complete = names(folder) == sorted(pairs(1, 2))
        checkpoints = Checkpoints(folder)
        steps.append(whole(checkpoints.latest()))
        if number % 2:  # what the kill left, latest or the next save removes
            assert set(names(folder)) <= {*pairs(0), *pairs(1), *pairs(2)}
        assert checkpoints.save(3, state(3), {"step": 3})
        assert names(folder) == sorted(pairs(steps[-1], 3))
        if complete:
            break
    assert complete
    assert steps == sorted(steps)  # once it is there, it stays
    assert steps.count(1) > 5
    assert steps.count(2) > 1  # one of them with step 0 not yet removed
    assert warnings(caplog) == []


def test_killed_at_random_moments_a_run_always_has_a_whole_checkpoint(
    tmp_path: Path, saver: Saver, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 1)
    chance, last, interrupted = random.Random(0), 1, 0
    for attempt in range(200):  # until one at least was in the middle of writing
        if attempt >= 20 and interrupted:
            break
        pid = saver(tmp_path, first=last + 1, steps=10_000, size=250_000)
        time.sleep(chance.uniform(0.005, 0.1))
        os.kill(pid, signal.SIGKILL)
        gone(pid)
        interrupted += any(not name.startswith("step-") for name in names(tmp_path))
        step = whole(checkpoints.latest())
        assert step >= last
        steps = sorted(int(name[5:12]) for name in names(tmp_path) if name.endswith(".json"))
        assert names(tmp_path) == pairs(*steps)
        last = step
    assert last > 1
    assert interrupted
    saved(tmp_path, last + 1)
    assert names(tmp_path) == pairs(last, last + 1)
    assert warnings(caplog) == []


def test_tensors_whose_json_never_came_are_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / pairs(2)[0]).unlink()
    assert whole(checkpoints.latest()) == 1
    assert names(tmp_path) == pairs(1)
    assert warnings(caplog) == []


# Damage


def cut_short(data: Path, told: Path) -> None:
    os.truncate(data, data.stat().st_size - 1)


def emptied(data: Path, told: Path) -> None:
    os.truncate(data, 0)


def one_bit_flipped(data: Path, told: Path) -> None:
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)


def taken_away(data: Path, told: Path) -> None:
    data.unlink()


def no_safetensors(data: Path, told: Path) -> None:
    """With the right sha256: it was damaged before."""
    from headstart.layout import sha256_of

    data.write_bytes(b"\xff" * 100)
    told.write_text(json.dumps(json.loads(told.read_text()) | {"sha256": sha256_of(data)}))


def garbage(data: Path, told: Path) -> None:
    told.write_bytes(bytes(range(256)))


def half_written(data: Path, told: Path) -> None:
    os.truncate(told, told.stat().st_size // 2)


def of_another_kind(data: Path, told: Path) -> None:
    told.write_text("[1, 2]")


def incomplete(data: Path, told: Path) -> None:
    told.write_text('{"step": 2, "notes": {}}')


DATA_DAMAGE = [cut_short, emptied, one_bit_flipped, taken_away, no_safetensors]
JSON_DAMAGE = [garbage, half_written, of_another_kind, incomplete]


@pytest.mark.parametrize("damage", DATA_DAMAGE + JSON_DAMAGE)
def test_a_damaged_one_is_named_and_removed_and_the_one_before_is_taken(
    damage: Callable[[Path, Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    told, data = (tmp_path / name for name in pairs(2))
    damage(data, told)
    assert whole(checkpoints.latest()) == 1
    (warning,) = warnings(caplog)
    assert str(told if damage in JSON_DAMAGE else data) in warning
    assert warning.endswith("; continuing from step 1")
    assert names(tmp_path) == pairs(1)
    caplog.clear()
    assert whole(checkpoints.latest()) == 1
    assert warnings(caplog) == []


def test_where_all_are_damaged_training_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    one_bit_flipped(tmp_path / pairs(1)[1], tmp_path / pairs(1)[0])
    garbage(tmp_path / pairs(2)[1], tmp_path / pairs(2)[0])
    assert checkpoints.latest() is None
    second, first = warnings(caplog)
    assert "step-0000002" in second
    assert "step-0000001" in first
    assert all(warning.endswith("; starting anew") for warning in (first, second))
    assert names(tmp_path) == []


def test_one_that_cannot_be_read_just_now_is_not_thrown_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1, 2)

    def read_text(path: Path, *args: Any, **options: Any) -> str:
        if path.name == pairs(2)[0]:
            raise OSError(5, "Input/output error", str(path))
        return path.read_bytes().decode()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        assert whole(checkpoints.latest()) == 1
    (warning,) = warnings(caplog)
    assert "Input/output error" in warning
    assert whole(checkpoints.latest()) == 2


# Disks


@contextmanager
def room_for_files_of(size: int) -> Iterator[None]:
    """For this process; what a full disk does to a file, at a size of our choice."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "notes"),
    [(50_000, {}), (100, {"history": list(range(50_000))})],
    ids=["the tensors", "the JSON"],
)
def test_on_a_full_disk_the_one_before_is_kept_and_training_goes_on(
    size: int, notes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 0, 1)
    with room_for_files_of(100_000):
        assert not checkpoints.save(2, state(2, size), notes)
    (warning,) = warnings(caplog)
    assert f"could not save the checkpoint of step 2 in {tmp_path}" in warning
    assert "File too large" in warning
    assert warning.endswith("; the one of step 1 is kept")
    assert names(tmp_path) == sorted(pairs(0, 1))
    assert whole(checkpoints.latest()) == 1
    assert checkpoints.save(3, state(3, size), notes)
    assert names(tmp_path) == sorted(pairs(1, 3))


def test_a_full_disk_at_the_first_save_is_said_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path / "kept")
    with room_for_files_of(100_000):
        assert not checkpoints.save(1, state(1, 50_000), {})
    (warning,) = warnings(caplog)
    assert warning.endswith("; there is none before")
    assert names(tmp_path / "kept") == []
    assert checkpoints.latest() is None


@pytest.mark.parametrize("room", range(10))
def test_wherever_the_disk_fails_no_save_ends_the_training(
    room: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 0, 1)
    calls = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > room:
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "write_text", "replace"):
            patch.setattr(Path, name, failing(getattr(Path, name)))
        patch.setattr(os, "fsync", failing(os.fsync))
        done = checkpoints.save(2, state(2), {"step": 2})
    # mkdir, fsync, write_text, fsync, replace, replace; then the fsync of the folder, which is not vital.
    assert done == (room >= 6)
    assert len(warnings(caplog)) == (not done)
    assert names(tmp_path) == sorted(pairs(1, 2) if done else pairs(0, 1))
    assert whole(checkpoints.latest()) == (2 if done else 1)


def test_in_a_read_only_folder_the_one_before_is_kept(tmp_path: Path) -> None:
    saved(tmp_path / "kept", 1)
    script = (
        "import sys, torch; from pathlib import Path; from headstart.checkpoints import Checkpoints\n"
        "checkpoints = Checkpoints(Path(sys.argv[1]))\n"
        "print(checkpoints.save(2, {'a': torch.ones(3)}, {}), checkpoints.latest().step)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "kept")]
    if os.geteuid() == 0:  # whom modes do not stop, unless a capability is given up
        if not shutil.which("setpriv"):
            pytest.skip("root writes anywhere")
        without = "-dac_override"
        command = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}", *command]
    (tmp_path / "kept").chmod(0o555)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        (tmp_path / "kept").chmod(0o755)
    assert done.stdout == "False 1\n", done.stderr
    assert "Permission denied" in done.stderr
    assert "the one of step 1 is kept" in done.stderr
    assert names(tmp_path / "kept") == pairs(1)


def test_a_file_in_the_place_of_the_folder_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kept").write_text("mine")
    assert not Checkpoints(tmp_path / "kept").save(1, state(1), {})
    assert len(warnings(caplog)) == 1
    assert (tmp_path / "kept").read_text() == "mine"


# The caller's mistakes


@pytest.mark.parametrize(
    ("tensors", "notes", "error"),
    [
        ({"a": torch.ones(2)}, {"tensor": torch.ones(2)}, TypeError),
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}, KeyError),
    ],
)
def test_a_mistake_is_not_taken_for_a_full_disk(
    tensors: dict[str, Tensor], notes: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(error):
        checkpoints.save(2, tensors, notes)
    assert names(tmp_path) == pairs(1)
    assert whole(checkpoints.latest()) == 1


def test_what_safetensors_refuses_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)

    def save_file(*args: object) -> None:  # as for names of 100 MB and more
        raise SafetensorError("Error while serializing: header too large")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(SafetensorError, match="header too large"):
        checkpoints.save(2, state(2), {})
    assert names(tmp_path) == pairs(1)
