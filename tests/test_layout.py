from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import HeadstartError
from headstart.layout import registered_parts, written_whole


def filled(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_the_place_of_the_one_before_it(tmp_path: Path) -> None:
    target = filled(tmp_path / "data", "old")
    with written_whole(target) as folder:
        filled(folder, "new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["data"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    target = filled(tmp_path / "data", "old")
    with pytest.raises(RuntimeError), written_whole(target) as folder:
        filled(folder, "new")
        raise RuntimeError
    assert names(target) == ["old"]
    assert names(tmp_path) == ["data"]


def test_a_kill_while_the_old_folder_is_deleted_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = filled(tmp_path / "data", *map(str, range(9)))
    delete = shutil.rmtree

    def cut_short(path: Path, **how: Any) -> None:
        if Path(path).exists() and names(Path(path))[:1] == ["0"]:  # as the old one has it
            (Path(path) / "0").unlink()
            os._exit(0)
        delete(path, **how)

    if not (child := os.fork()):
        try:
            monkeypatch.setattr(shutil, "rmtree", cut_short)
            with written_whole(target) as folder:
                filled(folder, "new")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(target) == ["new"]
    with written_whole(target) as folder:  # what was left over is in nobody's way
        filled(folder, "newer")
    assert names(tmp_path) == ["data"]
    assert names(target) == ["newer"]


def test_an_error_between_the_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = filled(tmp_path / "data", "old")
    rename = Path.rename

    def refused(path: Path, to: Path) -> Path:
        if path.name == ".data.partial":
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), written_whole(target) as folder:
        filled(folder, "new")
        patch.setattr(Path, "rename", refused)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["data"]


def test_after_a_kill_between_the_two_renames_the_old_folder_is_back_whole(tmp_path: Path) -> None:
    filled(tmp_path / ".data.old.partial", "old")
    filled(tmp_path / ".data.partial", "new")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "data"):
        assert names(tmp_path / "data") == ["old"]
        raise RuntimeError
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == ["old"]


def test_a_link_or_a_file_gives_way_too(tmp_path: Path) -> None:
    elsewhere, target = filled(tmp_path / "elsewhere", "old"), tmp_path / "data"
    target.symlink_to(elsewhere)
    for name in ("first", "second"):
        with written_whole(target) as folder:
            filled(folder, name)
        assert names(target) == [name]
    shutil.rmtree(target)
    target.write_text("a file")
    with written_whole(target) as folder:
        filled(folder, "third")
    assert names(tmp_path) == ["data", "elsewhere"]
    assert names(elsewhere) == ["old"]


@pytest.mark.parametrize("name", ["a file/data", "a file/of/data"])
def test_a_folder_below_a_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("old")
    with pytest.raises(HeadstartError, match="the output lies below a file"), written_whole(tmp_path / name):
        pass
    assert names(tmp_path) == ["a file"]


def test_what_may_not_be_read_is_not_called_what_could_not_be_written(tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere/secret.csv"
    refusal = PermissionError(13, "Permission denied", str(secret))
    with (
        pytest.raises(HeadstartError, match=r"no permission for secret\.csv"),
        written_whole(tmp_path / "data/case"),
    ):
        raise refusal
    inside = PermissionError(13, "Permission denied", str(tmp_path / "data/.case.partial/x"))
    with (
        pytest.raises(HeadstartError, match="could not write case: Permission denied"),
        written_whole(tmp_path / "data/case"),
    ):
        raise inside


@pytest.mark.parametrize("elsewhere", ["/etc/passwd", "../secret", "artifacts/../../secret"])
def test_a_model_has_all_of_its_parts_in_its_folder(elsewhere: str, tmp_path: Path) -> None:
    told = "flavors: {python_function: {artifacts: {head: {path: %s}}}}\n"
    (tmp_path / "MLmodel").write_text(told % "artifacts/head.safetensors")
    assert registered_parts(tmp_path) == {"head": tmp_path / "artifacts/head.safetensors"}
    (tmp_path / "MLmodel").write_text(told % elsewhere)
    with pytest.raises(HeadstartError, match="head does not lie in its folder") as caught:
        registered_parts(tmp_path)
    assert elsewhere in str(caught.value)
