"""Exporting: one file that says what the model says, to whoever has no PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

from headstart import devices, images, onnx
from headstart.errors import HeadstartError
from headstart.models import Version
from headstart.precision import Arithmetic
from tests import versions
from tests.conftest import isolated

LONG = "the " * 200
TEXTS = [*versions.TEXTS, "bright", "", LONG]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(devices.DEVICE, "cpu")
    monkeypatch.chdir(tmp_path)


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def described(path: Path) -> dict[str, str]:
    found: dict[str, str] = session(path).get_modelmeta().custom_metadata_map
    return found


@pytest.mark.parametrize(
    "options", [{}, {"max_tokens": 16, "layers": ["encoder.layer.0"]}], ids=["", "layer"]
)
def test_an_exported_text_model_says_what_the_model_says(options: dict[str, Any], tmp_path: Path) -> None:
    version = versions.read(versions.write_texts_version(tmp_path, **options))
    path = onnx.export(version, tmp_path / "new/small.onnx", TEXTS)
    assert sorted(file.name for file in path.parent.iterdir()) == ["small.onnx", "tokenizer.json"]
    expected = version.model(TEXTS)
    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    for batch in (TEXTS, TEXTS[:1], TEXTS[-2:]):
        encoded = tokenizer.encode_batch(batch)
        given = {
            "ids": np.array([each.ids for each in encoded], np.int64),
            "mask": np.array([each.attention_mask for each in encoded], np.int64),
        }
        (found,) = session(path).run(["probabilities"], given)
        rows = [TEXTS.index(text) for text in batch]
        assert found.dtype == np.float32
        assert np.abs(found - expected.probabilities[rows]).max() <= 1e-4
        classes = json.loads(described(path)["classes"])
        assert [classes[row.argmax()] for row in found] == [expected.labels[row] for row in rows]
    assert len(set(expected.labels)) == 2


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id=""),
        pytest.param({"views": 2}, id="views"),
        pytest.param({"views": 8}, id="all views", marks=pytest.mark.long),
        pytest.param({"layers": ["blocks.1", "blocks.3"]}, id="layers"),
    ],
)
def test_an_exported_image_model_says_what_the_model_says(options: dict[str, Any], tmp_path: Path) -> None:
    version = versions.read(versions.write_images_version(tmp_path, **options))
    paths = sorted((tmp_path / "images").rglob("*.png"))
    path = onnx.export(version, tmp_path / "small.onnx", list(paths))
    said, expected = described(path), version.model(paths)
    side = json.loads(said["side"])
    pixels = np.empty((len(paths), side, side, 3), np.uint8)
    for row, image in enumerate(paths):
        images.read(image, side, said["interpolation"], pixels[row])
    for size in (1, 3, len(paths)):
        (found,) = session(path).run(["probabilities"], {"pixels": pixels[:size]})
        assert np.abs(found - expected.probabilities[:size]).max() <= 1e-4
        assert [json.loads(said["classes"])[row.argmax()] for row in found] == expected.labels[:size]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return versions.read(versions.write_texts_version(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def exported(texts: Version, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx.export(texts, tmp_path_factory.mktemp("exported") / "small.onnx", TEXTS)


def test_the_file_says_what_it_is_and_how_to_decide(texts: Version, tmp_path: Path) -> None:
    tags = dict.fromkeys(("classes", "costs", "abstain", "model", "version"), "somebody's tag")
    tagged = replace(texts, tags=texts.tags | tags)
    said = described(onnx.export(tagged, tmp_path / "small.onnx"))
    assert json.loads(said["classes"]) == texts.model.classes
    assert json.loads(said["costs"]) == [[0.0, 1.0], [1.0, 0.0]]
    assert json.loads(said["abstain"]) is None
    assert (said["model"], said["version"], said["headstart.digest"]) == ("small", "1", "d")


def test_a_model_that_serves_in_bfloat16_is_exported_in_float32(
    texts: Version, exported: Path, tmp_path: Path
) -> None:
    Arithmetic("bfloat16").save(texts.folder / "artifacts/arithmetic.safetensors")
    try:
        served = versions.read(texts.folder)
        path = onnx.export(served, tmp_path / "small.onnx", TEXTS)
    finally:
        Arithmetic().save(texts.folder / "artifacts/arithmetic.safetensors")
    assert path.read_bytes() == exported.read_bytes()
    assert described(path) == described(exported)


def test_the_file_is_run_without_pytorch_and_without_headstart(exported: Path, tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, onnxruntime\n"
        "from tokenizers import Tokenizer\n"
        "found = Tokenizer.from_file('tokenizer.json').encode_batch(['a delight', 'a bore, truly'])\n"
        "given = {'ids': [f.ids for f in found], 'mask': [f.attention_mask for f in found]}\n"
        "given = {name: np.array(rows) for name, rows in given.items()}\n"
        "print(onnxruntime.InferenceSession('small.onnx').run(None, given)[0].shape)\n"
        "assert not {'torch', 'headstart'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=exported.parent,
        env=isolated(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "(2, 2)\n", done.stderr


def test_a_file_that_does_not_say_the_same_is_never_put_in_place(
    texts: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.onnx").write_text("earlier")
    monkeypatch.setattr(onnx, "TOLERANCE", -1.0)
    with pytest.raises(HeadstartError, match="does not say what it says in PyTorch"):
        onnx.export(texts, tmp_path / "small.onnx", TEXTS)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"small.onnx": "earlier"}


def test_another_models_tokenizer_is_not_replaced(texts: Version, tmp_path: Path) -> None:
    (tmp_path / "moods.onnx").write_text("moods")
    (tmp_path / "tokenizer.json").write_text("of moods")
    with pytest.raises(HeadstartError, match=r"another tokenizer\.json lies here") as caught:
        onnx.export(texts, tmp_path / "small.onnx", TEXTS)
    assert "--output" in caught.value.do
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "moods.onnx": "moods",
        "tokenizer.json": "of moods",
    }


def test_models_with_one_tokenizer_share_it(texts: Version, exported: Path, tmp_path: Path) -> None:
    first, tokenizer = (
        Path(shutil.copy(path, tmp_path)) for path in (exported, exported.with_name("tokenizer.json"))
    )
    second = onnx.export(texts, tmp_path / "second.onnx", TEXTS)
    assert sorted(tmp_path.iterdir()) == [second, first, tokenizer]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("a file/small.onnx", "the output lies below a file"),
        ("a file/of/small.onnx", "the output lies below a file"),
        ("folder.onnx", "the output is a folder"),
    ],
)
def test_an_output_that_cannot_be_a_file_is_refused_before_anything_is_traced(
    output: str, words: str, texts: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("words")
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr(onnx, "_traced", None)
    with pytest.raises(HeadstartError, match=words):
        onnx.export(texts, tmp_path / output)


def test_another_suffix_is_refused(texts: Version, tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match=r"ends in \.onnx"):
        onnx.export(texts, tmp_path / "small.bin")
