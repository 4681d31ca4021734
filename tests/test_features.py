"""One pass over every row: the vectors of a plain forward pass, however often the pass was killed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModel

from headstart import devices, features, texts
from headstart.errors import HeadstartError
from headstart.features import Extractor, arithmetic_for
from headstart.fetching import fetch
from headstart.layout import Layout, sha256_of
from headstart.recipe import Features, Recipe
from tests import cached, examples

Vectors = np.ndarray[Any, np.dtype[np.float32]]
ROOT = Path(__file__).parents[1]
SIDE = 32
THINGS = examples.THINGS
# Of many lengths, from nothing to more than the network has places for.
TEXTS = [" ".join([THINGS[i % 10], *(examples.GOOD * (i % 13))][: i * 7 % 90]) for i in range(40)]


@pytest.fixture(autouse=True)
def on_the_cpu(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.DEVICE, "cpu")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def efficientnet(seed: int = 0) -> Any:
    """timm's smallest network, whose vectors tell one picture from another."""
    torch.manual_seed(seed)
    network = timm.create_model("test_efficientnet", pretrained=False)
    network.train()
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(16, 3, SIDE, SIDE))  # BatchNorm's statistics come to fit the weights
    return network.eval()


def image_recipe(root: Path, **options: Any) -> Recipe:
    source = f"file:{root / 'inbox/weights.safetensors'}"
    return cached.recipe(
        validate={"adapter": "image_folder"},
        fetch={"backbone": "timm:test_efficientnet", "source": source},
        features={"image_size": SIDE, "precision": "float32"} | options,
    )


def text_recipe(root: Path, **options: Any) -> Recipe:
    return cached.recipe(
        fetch={"backbone": "transformers:bert", "source": f"file:{root / 'inbox/bert'}"},
        features={"precision": "float32"} | options,
    )


def manifest(layout: Layout, column: str, content: Sequence[str]) -> None:
    layout.manifest.mkdir(parents=True, exist_ok=True)
    table = cached.manifest(len(content)).rename(columns={"text": column}).assign(**{column: content})
    table.to_parquet(layout.manifest / "manifest.parquet", index=False)


def image_case(root: Path, rows: int = 20, seed: int = 0) -> Layout:
    """Pictures, their manifest and a backbone."""
    layout = Layout(root, "case")
    examples.write_images(layout.raw, rows // 2, side=40)
    paths = sorted(path.relative_to(layout.raw).as_posix() for path in layout.raw.rglob("*.png"))
    manifest(layout, "path", paths)
    (root / "inbox").mkdir(parents=True, exist_ok=True)
    save_file(efficientnet(seed).state_dict(), root / "inbox/weights.safetensors")
    fetch(image_recipe(root), layout)
    return layout


def text_case(root: Path) -> Layout:
    """Texts, their manifest and a backbone."""
    layout = Layout(root, "case")
    manifest(layout, "text", TEXTS)
    examples.write_bert(root / "inbox/bert")
    fetch(text_recipe(root), layout)
    return layout


def extractor(layout: Layout, options: Features, compiled: bool = False) -> Extractor:
    """What the stage extracts with; a recipe that leaves the arithmetic open gets float32."""
    return Extractor(layout.weights, options, arithmetic_for(layout.weights, options, []), compiled)


def pictures(layout: Layout) -> list[Path]:
    return [layout.raw / name for name in pd.read_parquet(layout.manifest / "manifest.parquet")["path"]]


def plain_images(paths: list[Path], side: int = SIDE, network: Any = None) -> Vectors:
    """What timm gives for each picture, one at a time."""
    if network is None:
        network = efficientnet()
        network.reset_classifier(0)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    vectors = []
    for path in paths:
        pixels = np.array(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
        tensor = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std
        with torch.inference_mode():
            vectors.append(network(tensor[None])[0].numpy())
    return np.stack(vectors)


def plain_texts(root: Path, sentences: Sequence[str], cls: bool = False) -> Vectors:
    """What transformers gives for each text, one at a time and unpadded."""
    network = AutoModel.from_pretrained(root / "inbox/bert").eval()
    tokenizer = Tokenizer.from_file(str(root / "inbox/bert/tokenizer.json"))
    tokenizer.enable_truncation(64)
    vectors = []
    for sentence in sentences:
        with torch.inference_mode():
            tokens = network(torch.tensor([tokenizer.encode(sentence).ids])).last_hidden_state[0]
        vectors.append((tokens[0] if cls else tokens.mean(dim=0)).numpy())
    return np.stack(vectors)


def cosines(a: Vectors, b: Vectors) -> Vectors:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def distinct(vectors: Vectors) -> bool:
    """Rows differ by far more than any tolerance used here."""
    gaps = np.abs(vectors[:, None] - vectors[None]).max(axis=2) + 9 * np.eye(len(vectors))
    return bool(gaps.min() > 0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refused(recipe: Recipe, layout: Layout) -> HeadstartError:
    """The error of a pass that must fail and leave nothing behind."""
    with pytest.raises(HeadstartError) as caught:
        features.features(recipe, layout)
    assert not layout.features.exists()
    assert not list(layout.features.parent.glob(".*"))
    assert caught.value.do
    return caught.value


# The vectors


def test_pictures_have_the_vectors_of_a_plain_forward_pass(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    expected = plain_images(pictures(layout))
    assert distinct(expected)
    found = extractor(layout, image_recipe(tmp_path).features)(pictures(layout))
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-4)


def test_texts_have_the_vectors_of_a_plain_forward_pass_whatever_is_beside_them(tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    expected = plain_texts(tmp_path, TEXTS)
    assert len(set(map(len, TEXTS))) > 20
    found = extractor(layout, text_recipe(tmp_path).features)(TEXTS)
    assert found == pytest.approx(expected, abs=1e-4)  # these alone and unpadded, ours together


def test_bfloat16_points_in_the_same_direction(tmp_path: Path) -> None:
    layout = image_case(tmp_path / "images")
    found = extractor(layout, Features(image_size=SIDE, precision="bfloat16"))(pictures(layout))
    assert cosines(found, plain_images(pictures(layout))).min() >= 0.999
    layout = text_case(tmp_path / "texts")
    found = extractor(layout, Features(precision="bfloat16"))(TEXTS)
    assert cosines(found, plain_texts(tmp_path / "texts", TEXTS)).min() >= 0.999


def test_a_backbone_of_sentences_may_take_its_first_token(tmp_path: Path) -> None:
    text_case(tmp_path)
    (tmp_path / "inbox/bert/1_Pooling").mkdir()
    (tmp_path / "inbox/bert/1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    layout = Layout(tmp_path, "case")
    fetch(text_recipe(tmp_path), layout)
    found = extractor(layout, text_recipe(tmp_path).features)(TEXTS)
    assert found == pytest.approx(plain_texts(tmp_path, TEXTS, cls=True), abs=1e-4)


def test_a_recipe_can_cut_texts_sooner(tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    long = "the film was splendid next to the garden and truly lovely"
    extract = extractor(layout, Features(max_tokens=8, precision="float32"))
    one, two = extract([long, "the film was splendid next to"])
    assert one == pytest.approx(two, abs=1e-5)


def test_tapped_layers_are_the_averages_of_their_outputs(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    network = efficientnet()
    caught: dict[str, list[torch.Tensor]] = {}
    layers = ["blocks.2", "conv_stem", "blocks.4.0"]
    for name in layers:
        network.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: caught.setdefault(name, []).append(output)
        )
    plain_images(pictures(layout), network=network)
    expected = np.hstack([torch.cat(caught[name]).mean(dim=(2, 3)).numpy() for name in layers])
    found = extractor(layout, image_recipe(tmp_path, layers=layers).features)(pictures(layout))
    assert found == pytest.approx(expected, abs=1e-4)


def test_tapped_layers_of_a_text_leave_padding_aside(tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    network = AutoModel.from_pretrained(tmp_path / "inbox/bert").eval()
    tokenizer = Tokenizer.from_file(str(tmp_path / "inbox/bert/tokenizer.json"))
    tokenizer.enable_truncation(64)
    expected = []
    for text in TEXTS:
        with torch.inference_mode():
            ids = torch.tensor([tokenizer.encode(text).ids])
            states = network(ids, output_hidden_states=True).hidden_states
        expected.append(np.concatenate([state[0].mean(dim=0).numpy() for state in (states[1], states[0])]))
    for inner in ("encoder.layer.0", "encoder.layer.0.output.LayerNorm"):
        options = text_recipe(tmp_path, layers=[inner, "embeddings"]).features
        assert extractor(layout, options)(TEXTS) == pytest.approx(np.stack(expected), abs=1e-4)


def test_a_layer_that_returns_more_than_one_thing_counts_by_its_first(tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    found = extractor(layout, text_recipe(tmp_path, layers=["encoder"]).features)(TEXTS)
    assert found == pytest.approx(plain_texts(tmp_path, TEXTS), abs=1e-4)


def test_positions_are_averaged_wherever_a_network_keeps_its_channels() -> None:
    output = torch.randn(2, 5, 4, 4)
    expected = output.mean(dim=(2, 3))
    assert torch.allclose(features.averaged(output, None), expected)
    assert torch.allclose(features.averaged(output.permute(0, 2, 3, 1), None), expected)  # as Swin has it
    assert torch.allclose(features.averaged(output.flatten(2).transpose(1, 2), None), expected)  # as a ViT
    assert torch.equal(features.averaged(expected, None), expected)
    half = features.averaged(output.bfloat16(), None)
    assert half.dtype == torch.float32


def test_vectors_of_a_file_and_of_its_bytes_are_equal(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    extract = extractor(layout, image_recipe(tmp_path).features)
    assert (extract([path.read_bytes() for path in pictures(layout)]) == extract(pictures(layout))).all()


def test_no_items_are_no_rows_of_the_right_width(tmp_path: Path) -> None:
    assert extractor(image_case(tmp_path / "i"), Features())([]).shape == (0, 256)
    assert extractor(text_case(tmp_path / "t"), Features())([]).shape == (0, 32)


def test_several_threads_may_ask_one_extractor(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    layout = image_case(tmp_path)
    extract = extractor(layout, image_recipe(tmp_path, layers=["blocks.2", "blocks.4"]).features)
    alone = [extract([path]) for path in pictures(layout)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: extract([path]), pictures(layout)))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


def test_extracting_leaves_the_callers_gradients_on(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    extract = extractor(layout, image_recipe(tmp_path).features)
    reader = extract.reader(pictures(layout))
    for _ in extract.run(reader, reader.batches):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


# What cannot be extracted


def test_a_layer_that_does_not_exist_names_the_nearest(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    error = refused(image_recipe(tmp_path, layers=["blocks.1", "block.2"]), layout)
    assert error.what == "test_efficientnet has no layer block.2"
    assert "did you mean blocks.2?" in error.table
    assert "conv_stem" in error.do


def test_a_layer_without_part_in_the_output_is_an_error(tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    error = refused(text_recipe(tmp_path, layers=["encoder.layer"]), layout)
    assert "does not run with these options" in error.what
    assert "encoder.layer" in str(error)


def test_a_size_that_the_network_does_not_take_is_an_error_at_once(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    network = timm.create_model("test_vit3", pretrained=False)
    save_file(network.state_dict(), tmp_path / "inbox/vit.safetensors")
    vit = {"backbone": "timm:test_vit3", "source": f"file:{tmp_path / 'inbox/vit.safetensors'}"}
    fetch(cached.recipe(fetch=vit), layout)
    error = refused(cached.recipe(fetch=vit, features={"image_size": 64}), layout)
    assert "does not run with these options" in error.what
    assert "image_size: 64" in str(error)
    found = extractor(layout, Features(precision="float32"))(pictures(layout)[:3])
    network.reset_classifier(0)
    assert found == pytest.approx(plain_images(pictures(layout)[:3], 160, network.eval()), abs=1e-4)


def test_a_network_for_texts_refuses_pictures(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    examples.write_bert(tmp_path / "inbox/bert")
    fetch(text_recipe(tmp_path), layout)
    error = refused(text_recipe(tmp_path), layout)
    assert "transformers:bert reads texts" in error.what
    assert "fetch.backbone" in error.do


def test_a_network_for_pictures_refuses_texts(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    manifest(layout, "text", TEXTS)
    assert "timm:test_efficientnet reads images" in refused(image_recipe(tmp_path), layout).what


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_model_asked_for_the_wrong_thing_says_what_it_reads(kind: str, tmp_path: Path) -> None:
    layout = text_case(tmp_path) if kind == "texts" else image_case(tmp_path)
    extract = extractor(layout, Features(image_size=SIDE))
    right: Any = "a film" if kind == "texts" else pictures(layout)[0]
    for wrong in ("", "text") if kind == "images" else (None, b"bytes", float("nan")):
        with pytest.raises(HeadstartError, match=f"reads {kind}"):
            extract([right, wrong])  # type: ignore[list-item]


def test_what_has_not_been_made_yet_is_named(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    shutil.rmtree(layout.weights)
    assert "fetch@case" in refused(image_recipe(tmp_path), layout).do
    shutil.rmtree(layout.manifest)
    error = refused(image_recipe(tmp_path), layout)
    assert error.what == "there is no manifest"
    assert "validate@case" in error.do


def test_a_picture_deleted_since_validation_is_named(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    gone = pictures(layout)[13]
    gone.unlink()
    error = refused(image_recipe(tmp_path), layout)
    assert error.where == str(gone)


def test_a_vector_that_the_file_cannot_hold_names_its_row(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    state = efficientnet().state_dict()
    state["bn2.weight"] *= 1e9
    save_file(state, tmp_path / "inbox/weights.safetensors")
    fetch(image_recipe(tmp_path), layout)
    error = refused(image_recipe(tmp_path), layout)
    assert "float16" in error.what
    assert ".png" in error.where


# The files


def test_features_are_written_as_the_reference_describes_them(tmp_path: Path) -> None:
    for layout, recipe, expected in (
        (
            one := image_case(tmp_path / "i"),
            image_recipe(tmp_path / "i"),
            plain_images(pictures(one)),
        ),
        (
            text_case(tmp_path / "t"),
            text_recipe(tmp_path / "t"),
            plain_texts(tmp_path / "t", TEXTS),
        ),
    ):
        features.features(recipe, layout)
        assert {"features.npy", "ids.parquet", "features.json"} <= set(contents(layout.features))
        table = pd.read_parquet(layout.manifest / "manifest.parquet")
        ids = pd.read_parquet(layout.features / "ids.parquet")
        assert list(ids) == ["id"]
        assert list(ids["id"]) == list(table["id"])
        array = np.load(layout.features / "features.npy", mmap_mode="r")
        assert isinstance(array, np.memmap)
        assert array.dtype == np.float16
        assert array.flags.c_contiguous
        assert np.asarray(array, np.float32) == pytest.approx(expected, abs=2e-3, rel=2e-3)
        described = json.loads((layout.features / "features.json").read_text())
        assert (
            described
            | {
                "rows": len(table),
                "dim": expected.shape[1],
                "layers": None,
                "precision": "float32",
                "backbone_sha256": sha256_of(layout.weights / "weights.safetensors"),
                "manifest_sha256": sha256_of(layout.manifest / "manifest.parquet"),
            }
            == described
        )
        assert not (layout.work / "features").exists()


def test_row_i_belongs_to_id_i_whatever_the_order_of_the_work(tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    features.features(text_recipe(tmp_path), layout)
    first = np.load(layout.features / "features.npy")
    manifest(layout, "text", TEXTS[::-1])
    features.features(text_recipe(tmp_path), layout)
    assert np.load(layout.features / "features.npy")[::-1] == pytest.approx(first, abs=1e-3)


def test_features_replace_those_of_before_and_a_failure_leaves_them(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    features.features(image_recipe(tmp_path), layout)
    before = contents(layout.features)
    gone = pictures(layout)[0]
    kept = gone.read_bytes()
    gone.unlink()
    with pytest.raises(HeadstartError):
        features.features(image_recipe(tmp_path), layout)
    assert contents(layout.features) == before
    gone.write_bytes(kept)
    features.features(image_recipe(tmp_path, image_size=48), layout)
    assert contents(layout.features)["features.npy"] != before["features.npy"]
    assert contents(layout.features)["ids.parquet"] == before["ids.parquet"]


# Interruptions

ROWS = 8  # a shard, here


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def run(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, layout: Layout, killed_after: int | None = None
) -> int:
    """Extract in shards of 8 rows, perhaps killed after some rows; how many rows were computed."""
    done = 0
    whole = Extractor.run

    def counted(self: Extractor, *args: Any) -> Iterator[Any]:
        nonlocal done
        for rows, vectors in whole(self, *args):
            if killed_after is not None and done >= killed_after:
                raise Killed
            done += len(rows)
            yield rows, vectors

    with monkeypatch.context() as patch:
        patch.setattr(features, "ROWS_PER_SHARD", ROWS)
        patch.setattr(Extractor, "run", counted)
        if killed_after is None:
            features.features(recipe, layout)
        else:
            with pytest.raises(Killed):
                features.features(recipe, layout)
            assert not layout.features.exists()
    return done


def test_a_pass_that_was_killed_continues_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, twin = image_case(tmp_path / "one", 60), image_case(tmp_path / "two", 60)
    run(monkeypatch, image_recipe(tmp_path / "two"), twin)
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from headstart import features; from headstart.layout import Layout\n"
        "from tests.test_features import image_recipe\n"
        "features.ROWS_PER_SHARD, whole, seen = 8, features.Extractor.run, []\n"
        "def run(*args):\n"
        "    for batch in whole(*args):\n"
        "        if len(seen) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        seen.append(batch); yield batch\n"
        "features.Extractor.run = run; root = Path(sys.argv[1])\n"
        "features.features(image_recipe(root), Layout(root, 'case'))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "one")]
    died = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not layout.features.exists()
    assert run(monkeypatch, image_recipe(tmp_path / "one"), layout) == 60 - 3 * ROWS
    assert contents(layout.features) == contents(twin.features)
    assert not (layout.work / "features").exists()


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_pass_killed_again_and_again_ends_with_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(features.TOKENS_PER_BATCH, "cpu", 200)
    make, choose = (image_case, image_recipe) if kind == "images" else (text_case, text_recipe)
    layout, twin = make(tmp_path / "one"), make(tmp_path / "two")
    rows = run(monkeypatch, choose(tmp_path / "two"), twin)
    for _ in range(2):
        run(monkeypatch, choose(tmp_path / "one"), layout, killed_after=ROWS)
    assert 0 < run(monkeypatch, choose(tmp_path / "one"), layout) <= rows - ROWS
    assert contents(layout.features) == contents(twin.features)


@pytest.mark.parametrize(
    "change", ["weights", "preprocessing", "size", "layers", "precision", "manifest", "device", "torch"]
)
def test_work_made_from_something_else_is_not_continued(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = image_case(tmp_path)
    run(monkeypatch, image_recipe(tmp_path), layout, killed_after=2 * ROWS)
    options: dict[str, Any] = {}
    match change:
        case "weights":
            save_file(efficientnet(seed=1).state_dict(), tmp_path / "inbox/weights.safetensors")
            fetch(image_recipe(tmp_path), layout)
        case "preprocessing":
            block = image_recipe(tmp_path).fetch.model_dump() | {"mean": [0.5, 0.5, 0.5]}
            fetch(cached.recipe(fetch=block), layout)
        case "size":
            options = {"image_size": 40}
        case "layers":
            options = {"layers": ["conv_head"]}
        case "precision":
            options = {"precision": "bfloat16"}
        case "manifest":
            manifest(layout, "path", [str(path.relative_to(layout.raw)) for path in pictures(layout)[::-1]])
        case "device":  # another one that computes on the processor, as far as the tensors know
            monkeypatch.setattr(devices, "device", lambda: Device("cuda"))
        case "torch":
            monkeypatch.setattr(torch, "__version__", "3.0.0")
    assert run(monkeypatch, image_recipe(tmp_path, **options), layout) == 20
    assert not (layout.work / "features").exists()


class Device(str):
    """Says that it is a GPU, and is none."""

    __slots__ = ()
    type = "cuda"

    def __new__(cls, _: str) -> Device:
        return super().__new__(cls, "cpu")


def test_a_journal_line_cut_short_by_the_kill_does_not_count_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, twin = image_case(tmp_path / "one", 120), image_case(tmp_path / "two", 120)
    run(monkeypatch, image_recipe(tmp_path / "two"), twin)
    recipe = image_recipe(tmp_path / "one")
    run(monkeypatch, recipe, layout, killed_after=3 * ROWS)  # shards 0, 1 and 2 of 15
    (journal,) = (layout.work / "features").glob("*/shards")
    assert journal.read_text() == "0\n1\n2\n"
    journal.write_text("0\n1\n2\n1")  # of "13", say: the next line must not make "13" of it
    run(monkeypatch, recipe, layout, killed_after=2 * ROWS)
    assert journal.read_text() == "0\n1\n2\n3\n4\n"
    assert run(monkeypatch, recipe, layout) == 120 - 5 * ROWS
    assert contents(layout.features) == contents(twin.features)


def test_a_failure_after_the_pass_costs_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = image_case(tmp_path)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        with pytest.raises(HeadstartError, match="No space left"):
            run(monkeypatch, image_recipe(tmp_path), layout)
    assert run(monkeypatch, image_recipe(tmp_path), layout) == 0
    assert np.load(layout.features / "features.npy").shape == (20, 256)


def test_a_disk_that_is_too_small_is_found_out_before_the_pass_and_left_clean(tmp_path: Path) -> None:
    layout = image_case(tmp_path, 60)  # 60 rows of 256 values of 2 bytes
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from headstart import features; from headstart.errors import HeadstartError\n"
        "from headstart.layout import Layout; from tests.test_features import image_recipe\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); root = Path(sys.argv[1])\n"
        "features.Extractor.run = None\n"
        "try: features.features(image_recipe(root), Layout(root, 'case'))\n"
        "except HeadstartError as error: print(error)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-B", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "there is no room for the features" in done.stdout, done.stderr
    assert not layout.features.exists()
    assert not [file for file in layout.work.rglob("*") if file.is_file()]
    features.features(image_recipe(tmp_path), layout)


# torch.compile


@pytest.mark.parametrize(
    ("rows", "wish", "expected"), [(10, None, True), (8, None, False), (8, True, True), (10, False, False)]
)
def test_rows_alone_decide_about_torch_compile_unless_the_recipe_does(
    rows: int, wish: bool | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = image_case(tmp_path, rows)
    asked: list[dict[str, Any]] = []

    def compile_(network: Any, **options: Any) -> Any:
        asked.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setitem(features.COMPILE_FROM, "image", 10)
    features.features(image_recipe(tmp_path, compile=wish), layout)
    assert bool(asked) == expected


def test_without_a_compiler_the_network_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_(network: Any, **options: Any) -> Callable[..., Any]:
        def fail(*tensors: Any) -> None:
            raise RuntimeError("No working C++ compiler found\nand many more lines")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)
    layout = image_case(tmp_path)
    options = image_recipe(tmp_path).features
    with caplog.at_level(logging.WARNING):
        found = extractor(layout, options, compiled=True)(pictures(layout))
    assert (found == extractor(layout, options)(pictures(layout))).all()
    assert len(caplog.records) == 1  # not once a batch
    assert "No working C++ compiler found" in caplog.text
    assert "many more lines" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, ["blocks.2", "conv_head"]])
def test_a_compiled_image_network_gives_the_same_vectors_and_compiles_once(
    layers: list[str] | None, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    layout = image_case(tmp_path)
    options = image_recipe(tmp_path, layers=layers).features
    torch._dynamo.reset()
    counters.clear()
    extract = extractor(layout, options, compiled=True)
    found = extract(pictures(layout))  # 8, 8, and 4 rows
    assert extract.compiled is not None
    assert counters["stats"]["unique_graphs"] == 1
    extract(pictures(layout)[:1])
    assert counters["stats"]["unique_graphs"] == 1
    assert found == pytest.approx(extractor(layout, options)(pictures(layout)), abs=1e-4)


@pytest.mark.slow
def test_a_compiled_text_network_gives_the_same_vectors_for_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setitem(features.TOKENS_PER_BATCH, "cpu", 300)
    layout = text_case(tmp_path)
    options = text_recipe(tmp_path).features
    torch._dynamo.reset()
    counters.clear()
    extract = extractor(layout, options, compiled=True)
    found = extract(TEXTS)
    assert extract.compiled is not None
    assert len(texts.batches(np.array([len(text.split()) for text in TEXTS]) + 2, 300)) > 3
    assert counters["stats"]["unique_graphs"] <= 2
    assert found == pytest.approx(extractor(layout, options)(TEXTS), abs=1e-4)
