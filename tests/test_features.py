"""One pass over every row: the vectors of a plain forward pass, however often the pass was killed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
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

from headstart import devices, environment, features, images, packs, precision, texts, validation
from headstart.backbones import Spec
from headstart.errors import HeadstartError
from headstart.features import Extractor, Packed, Tapped, arithmetic_for
from headstart.fetching import fetch
from headstart.layout import Layout, sha256_of
from headstart.precision import Arithmetic
from headstart.recipe import Features, Recipe
from tests import cached, examples

Vectors = np.ndarray[Any, np.dtype[np.float32]]
ROOT = Path(__file__).parents[1]
SIDE = 32
THINGS = examples.THINGS
# Of many lengths, from nothing to more than the network has places for.
TEXTS = [" ".join([THINGS[i % 10], *(examples.GOOD * (i % 13))][: i * 7 % 90]) for i in range(40)]


@pytest.fixture(autouse=True)
def on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    held = [(layout.raw / name).read_bytes() if column == "path" else name.encode() for name in content]
    table["digest"] = [hashlib.sha256(data).hexdigest() for data in held]
    table.to_parquet(layout.manifest / "manifest.parquet", index=False)


def image_case(root: Path, rows: int = 20, seed: int = 0) -> Layout:
    """Pictures, their manifest and a backbone."""
    layout = Layout(root, "case")
    examples.write_images(layout.raw, rows // 2, side=40)
    paths = sorted(path.relative_to(layout.raw).as_posix() for path in layout.raw.rglob("*.png"))
    manifest(layout, "path", paths)
    (layout.manifest / "report.json").write_text(json.dumps({"modes": {"RGB": rows}}))
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
    arithmetic = arithmetic_for(layout.weights, options, lambda extractor, rows: extractor.reader([]), 0)
    return Extractor(layout.weights, options, arithmetic, compiled)


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


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("layers", [None, ["blocks.2", "conv_stem"]])
def test_views_are_averaged(count: int, layers: list[str] | None, tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    options = image_recipe(tmp_path, layers=layers).features
    for path in pictures(layout):  # of the size wanted: resizing rounds a turned picture otherwise
        Image.open(path).convert("RGB").resize((SIDE, SIDE)).save(path)
    pixels = np.stack([np.array(Image.open(path)) for path in pictures(layout)])
    symmetries = [np.rot90(side, k, (1, 2)) for k in range(4) for side in (pixels, pixels[:, :, ::-1])]
    alone = extractor(layout, options)
    vectors = []
    for number, symmetry in enumerate(symmetries[:count]):
        paths = [tmp_path / f"{number}-{row}.png" for row in range(len(pixels))]
        for path, picture in zip(paths, symmetry, strict=True):
            Image.fromarray(np.ascontiguousarray(picture)).save(path)
        vectors.append(alone(paths))
    assert all(np.abs(vectors[0] - other).max() > 1e-3 for other in vectors[1:])
    found = extractor(layout, options.model_copy(update={"views": count}))(pictures(layout))
    assert found == pytest.approx(np.mean(vectors, axis=0), abs=1e-3)


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


def test_a_broken_encoding_is_mended_whoever_asks(tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    broken, sound = "a film \u00e2\u20ac\u201c splendid", "a film \u2013 splendid"
    raw = [
        texts.tokenise([text], layout.weights / "tokenizer.json", 16).ids.tolist() for text in (broken, sound)
    ]
    assert raw[0] != raw[1]
    one, two = extractor(layout, text_recipe(tmp_path).features)([broken, sound])
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


def short_of_memory(extract: Extractor, fits: int) -> list[int]:
    """Let the network have memory for so many rows, in the words of Apple's GPUs; sizes that it was given."""
    given: list[int] = []

    def limit(module: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        given.append(len(tensors[0]))
        if len(tensors[0]) > fits:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 7 GiB, other allocations: 2 GiB)")

    extract.network.register_forward_pre_hook(limit)
    return given


def test_a_batch_that_does_not_fit_into_memory_is_computed_in_parts_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = image_case(tmp_path)
    options = image_recipe(tmp_path).features
    expected = extractor(layout, options)(pictures(layout)[:16])
    extract = extractor(layout, options)
    given = short_of_memory(extract, fits=3)
    with caplog.at_level(logging.WARNING):
        found = extract(pictures(layout)[:16])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert given == [8, 4, *[2] * 8]
    assert "out of memory on cpu: going on with 2 rows at a time" in caplog.text


def test_a_row_that_does_not_fit_into_memory_says_what_makes_it_smaller(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    extract = extractor(layout, image_recipe(tmp_path).features)
    short_of_memory(extract, fits=0)
    with pytest.raises(HeadstartError, match="a row does not fit into memory") as caught:
        extract(pictures(layout)[:8])
    assert "features.image_size" in str(caught.value.do)


def test_a_gpu_is_read_ahead_for_by_bytes_whatever_the_number_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []

    class Large:
        smallest = 1

        def __init__(self) -> None:
            self.batches = [np.array([i]) for i in range(40)]

        def read(self, rows: Any) -> tuple[Any, ...]:
            started.append(int(rows[0]))
            return (np.zeros(1000, np.uint8),)

    monkeypatch.setattr(environment, "cores", lambda: 64)
    monkeypatch.setattr(features, "READ_AHEAD", 4000)
    large = Large()
    for place, (rows, _) in enumerate(features._read(large, large.batches, overlap=True)):
        assert rows[0] == place
        assert len(started) <= place + 1 + 4 + 1
    assert len(started) == 40


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


@pytest.mark.parametrize("layer", ["pooler", "pooler.dense"])
def test_a_pooler_that_has_no_weights_is_an_error(layer: str, tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    error = refused(text_recipe(tmp_path, layers=["encoder.layer.0", layer]), layout)
    assert error.what == f"the weights of {layer} are not kept: a pooler is trained for another task"
    assert "last layer of the encoder" in error.do


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
    shutil.rmtree(layout.work / "extracted")
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
        for batch in whole(self, *args):
            if killed_after is not None and done >= killed_after:
                raise Killed
            done += len(batch[0])
            yield batch

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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "one")]
    died = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not layout.features.exists()
    assert run(monkeypatch, image_recipe(tmp_path / "one"), layout) == 60 - 3 * ROWS
    assert contents(layout.features) == contents(twin.features)
    assert not (layout.work / "features").exists()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_pass_killed_again_and_again_ends_with_the_same_bytes(
    kind: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(features.TOKENS_PER_BATCH, "cpu", 200)
    make, choose = (image_case, image_recipe) if kind == "images" else (text_case, text_recipe)
    layout, twin = make(tmp_path / "one"), make(tmp_path / "two")
    rows = run(monkeypatch, choose(tmp_path / "two", packed=packed), twin)
    for _ in range(2):
        run(monkeypatch, choose(tmp_path / "one", packed=packed), layout, killed_after=ROWS)
    assert 0 < run(monkeypatch, choose(tmp_path / "one", packed=packed), layout) <= rows - ROWS
    assert contents(layout.features) == contents(twin.features)


@pytest.mark.parametrize(
    "change",
    ["weights", "preprocessing", "size", "layers", "precision", "packed", "manifest", "device", "torch"],
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
        case "packed":
            options = {"packed": True}
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


def grown(kind: str, root: Path, packed: bool, rows: int) -> tuple[Layout, Recipe]:
    """The first so many rows of a case, those of a batch behind the first ten, in the order of their ids."""
    make, choose = (image_case, image_recipe) if kind == "images" else (text_case, text_recipe)
    layout = make(root)
    path = layout.manifest / "manifest.parquet"
    table = pd.read_parquet(path).head(20).sample(frac=1, random_state=0, ignore_index=True)
    table["batch"] = np.where(table.index < 10, "", "new")
    table.head(rows).sort_values("id").to_parquet(path, index=False)
    return layout, choose(root, packed=packed)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_of_rows_that_come_and_go_only_new_ones_are_looked_at(
    kind: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, recipe = grown(kind, tmp_path / "one", packed, 11)
    assert run(monkeypatch, recipe, layout) == 11
    for rows, looked_at in ((20, 9), (15, 0), (20, 5)):
        before = contents(layout.features)
        grown(kind, tmp_path / "one", packed, rows)
        killed = looked_at > ROWS
        if killed:
            shutil.rmtree(layout.features)  # as DVC does before it runs a stage
            run(monkeypatch, recipe, layout, killed_after=4)
        found = run(monkeypatch, recipe, layout)
        assert found == looked_at or (killed and found < looked_at)
        assert contents(layout.features) != before
        twin, other = grown(kind, tmp_path / f"{rows} anew", packed, rows)
        if not twin.features.exists():
            assert run(monkeypatch, other, twin) == rows
        assert contents(layout.features) == contents(twin.features)


def test_rows_are_looked_at_anew_when_the_way_has_changed_or_what_was_kept_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = image_case(tmp_path)
    run(monkeypatch, image_recipe(tmp_path), layout)
    assert run(monkeypatch, image_recipe(tmp_path), layout) == 0
    assert run(monkeypatch, image_recipe(tmp_path, layers=["conv_head"]), layout) == 20
    assert run(monkeypatch, image_recipe(tmp_path), layout) == 20
    with monkeypatch.context() as upgraded:
        upgraded.setattr("headstart.features.version", lambda package: f"newer {package}")
        assert run(monkeypatch, image_recipe(tmp_path), layout) == 20
    assert run(monkeypatch, image_recipe(tmp_path), layout) == 20
    whole = contents(layout.features)
    kept = layout.work / "extracted/features.npy"
    kept.unlink()
    kept.write_bytes(whole["features.npy"][:500])
    assert run(monkeypatch, image_recipe(tmp_path), layout) == 20
    assert contents(layout.features) == whole
    for name in ("digests.npy", "features.npy"):  # as a power failure leaves them
        (layout.work / "extracted" / name).unlink()
        (layout.work / "extracted" / name).touch()
        assert run(monkeypatch, image_recipe(tmp_path), layout) == 20
    save_file(efficientnet(seed=1).state_dict(), tmp_path / "inbox/weights.safetensors")
    fetch(image_recipe(tmp_path), layout)
    assert run(monkeypatch, image_recipe(tmp_path), layout) == 20


def test_where_there_are_no_hard_links_every_row_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*paths: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    layout = image_case(tmp_path)
    assert [run(monkeypatch, image_recipe(tmp_path), layout) for _ in range(2)] == [20, 20]
    assert not (layout.work / "extracted").exists()


def test_what_arithmetic_is_taken_does_not_depend_on_rows_that_came_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, recipe = grown("images", tmp_path, packed=False, rows=20)
    seen: list[int] = []

    def noted(*given: Any) -> Arithmetic:
        *_, rows = given
        seen.append(rows)
        return Arithmetic()

    monkeypatch.setattr(features, "arithmetic_for", noted)
    features.features(recipe, layout)
    assert seen == [10]


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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-B", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "there is no room for the features" in done.stdout, done.stderr
    assert not layout.features.exists()
    assert not [file for file in layout.work.rglob("*") if file.is_file()]
    features.features(image_recipe(tmp_path), layout)


# What is packed

GREY = ["1", "L", "LA", "I;16"]
# Modes of the pictures, and how many channels are worth keeping of them.
MIXTURES = [(GREY, 1), (["L", "RGB"], 3), (["RGB"], 3), (["L", "P"], 3)]


def validated_case(root: Path, modes: Sequence[str]) -> Layout:
    """Pictures of these modes in turn, with the manifest and the report that ``validate`` writes."""
    layout = image_case(root)
    for i, path in enumerate(pictures(layout)):
        mode, picture = modes[i % len(modes)], Image.open(path).convert("RGB")
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        elif mode == "LA":
            picture = Image.merge("LA", [picture.convert("L"), Image.new("L", picture.size, 99)])
        else:
            picture = picture.convert(mode)
        picture.save(path)
    block = {"adapter": "image_folder", "min_rows_per_class": 1, "near_duplicates": False}
    validation.validate(cached.recipe(validate=block), layout)
    return layout


def decoded(layout: Layout) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What is read from each file, uint8 [n, side, side, 3]."""
    found = np.empty((len(pictures(layout)), SIDE, SIDE, 3), np.uint8)
    for path, into in zip(pictures(layout), found, strict=True):
        images.read(path, SIDE, "bicubic", into)
    return found


def without(described: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key not in keys}


@pytest.mark.parametrize(("modes", "channels"), MIXTURES)
def test_packed_pictures_are_those_that_the_files_hold(
    modes: list[str], channels: int, tmp_path: Path
) -> None:
    layout = validated_case(tmp_path, modes)
    features.features(image_recipe(tmp_path), layout)
    unpacked = contents(layout.features)
    assert set(unpacked) == {"features.npy", "ids.parquet", "arithmetic.safetensors", "features.json"}
    features.features(image_recipe(tmp_path, packed=True), layout)
    packed = contents(layout.features)
    assert set(packed) == {*unpacked, "pixels.npy"}
    found = np.load(layout.features / "pixels.npy", mmap_mode="r")
    assert isinstance(found, np.memmap)
    assert found.dtype == np.uint8
    assert found.shape == (20, SIDE, SIDE, channels)
    assert (found == decoded(layout)).all()  # of grey pictures all three channels
    before, after = json.loads(unpacked["features.json"]), json.loads(packed["features.json"])
    assert after == before | {"packed": True, "channels": channels}
    assert not {"packed", "channels"} & set(before)
    assert without(packed, "pixels.npy", "features.json") == without(unpacked, "features.json")


def test_packed_texts_are_their_tokens(tmp_path: Path) -> None:
    layout = text_case(tmp_path)
    features.features(text_recipe(tmp_path, max_tokens=20), layout)
    unpacked = contents(layout.features)
    assert set(unpacked) == {"features.npy", "ids.parquet", "arithmetic.safetensors", "features.json"}
    features.features(text_recipe(tmp_path, max_tokens=20, packed=True), layout)
    packed = contents(layout.features)
    assert set(packed) == {*unpacked, "tokens.npy", "bounds.npy"}
    expected = texts.tokenise(TEXTS, layout.weights / "tokenizer.json", 20)
    tokens, bounds = (np.load(layout.features / f"{name}.npy") for name in ("tokens", "bounds"))
    assert tokens.dtype == np.int32
    assert bounds.dtype == np.int64
    assert np.array_equal(tokens, expected.ids)
    assert np.array_equal(bounds, expected.bounds)
    before, after = json.loads(unpacked["features.json"]), json.loads(packed["features.json"])
    assert after == before | {"packed": True}
    added = ("tokens.npy", "bounds.npy", "features.json")
    assert without(packed, *added) == without(unpacked, "features.json")


def test_a_picture_is_decoded_once_to_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = image_case(tmp_path)
    decode, asked = images.read, []

    def counted(item: Any, *args: Any) -> None:
        asked.append(item)
        decode(item, *args)

    monkeypatch.setattr(images, "read", counted)
    features.features(image_recipe(tmp_path, packed=True), layout)
    assert sorted(asked) == sorted(pictures(layout))


def test_a_shard_counts_as_done_when_all_its_arrays_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = image_case(tmp_path)
    safe: set[str] = set()
    journalled = []
    flush = np.memmap.flush

    def flushed(array: Any) -> None:
        flush(array)
        safe.add(Path(array.filename).name)

    def synced(file: int) -> None:
        journalled.append(set(safe))
        safe.clear()

    monkeypatch.setattr(np.memmap, "flush", flushed)
    monkeypatch.setattr(os, "fsync", synced)
    run(monkeypatch, image_recipe(tmp_path, packed=True), layout)
    assert journalled == [{"features.npy", "pixels.npy"}] * 3  # 20 rows in shards of 8


def test_work_that_has_lost_an_array_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, twin = image_case(tmp_path / "one"), image_case(tmp_path / "two")
    run(monkeypatch, image_recipe(tmp_path / "two", packed=True), twin)
    recipe = image_recipe(tmp_path / "one", packed=True)
    run(monkeypatch, recipe, layout, killed_after=2 * ROWS)
    (lost,) = (layout.work / "features").glob("*/pixels.npy")
    lost.unlink()
    assert run(monkeypatch, recipe, layout, killed_after=0) == 0
    assert run(monkeypatch, recipe, layout) == 20  # what the journal said before counts no more
    assert contents(layout.features) == contents(twin.features)


@pytest.mark.parametrize(("kind", "room"), [("images", 50_000), ("texts", 4_000)])
def test_room_for_what_is_packed_is_taken_before_the_pass(
    kind: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Vectors fit: 20 x 256 or 40 x 32 of them at 2 bytes. Pixels and tokens do not.
    make, choose = (image_case, image_recipe) if kind == "images" else (text_case, text_recipe)
    layout = make(tmp_path)
    monkeypatch.setattr(Extractor, "run", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        error = refused(choose(tmp_path, packed=True), layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "there is no room for the features" in error.what
    assert not [file for file in layout.work.rglob("*") if file.is_file()]


def test_pictures_without_a_report_cannot_be_packed(tmp_path: Path) -> None:
    layout = image_case(tmp_path)
    (layout.manifest / "report.json").unlink()
    error = refused(image_recipe(tmp_path, packed=True), layout)
    assert error.where.endswith("report.json")
    assert "validate@case" in error.do


@pytest.mark.parametrize("modes", [GREY, ["RGB"]])
def test_packed_pictures_have_the_vectors_of_their_files(modes: list[str], tmp_path: Path) -> None:
    layout = validated_case(tmp_path, modes)
    recipe = image_recipe(tmp_path, packed=True)
    features.features(recipe, layout)
    extract = extractor(layout, recipe.features)
    pack = packs.load(layout, "image", extract.padding)
    items = pictures(layout)
    for rows in (np.arange(20), np.array([13, 2, 19, 4, 3, 0, 7, 11, 5])):
        reader, files = Packed(pack, rows, "cpu"), extract.reader([items[row] for row in rows])
        assert [batch.tolist() for batch in reader.batches] == [batch.tolist() for batch in files.batches]
        assert reader.smallest == files.smallest
        (one,), (two,) = reader.read(np.array([1, 0])), files.read(np.array([1, 0]))
        assert np.array_equal(one, two)
        assert one.flags.c_contiguous
        expected = extract([items[row] for row in rows])
        assert distinct(expected)
        assert np.array_equal(extract.read(reader), expected)
        stored = np.load(layout.features / "features.npy")[rows]
        assert np.array_equal(expected.astype(np.float16), stored) or len(rows) < 20  # in other batches
        assert stored.astype(np.float32) == pytest.approx(expected, abs=2e-3, rel=2e-3)


def test_packed_texts_have_the_vectors_of_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(features.TOKENS_PER_BATCH, "cpu", 200)
    layout = text_case(tmp_path)
    recipe = text_recipe(tmp_path, packed=True)
    features.features(recipe, layout)
    extract = extractor(layout, recipe.features)
    pack = packs.load(layout, "text", extract.padding)
    for rows in (np.arange(40), np.array([13, 2, 39, 4, 3, 0, 27, 11, 5])):
        reader, plain = Packed(pack, rows, "cpu"), extract.reader([TEXTS[row] for row in rows])
        assert len(reader.batches) > 1
        assert [batch.tolist() for batch in reader.batches] == [batch.tolist() for batch in plain.batches]
        assert reader.smallest == plain.smallest
        expected = extract([TEXTS[row] for row in rows])
        assert distinct(np.unique(expected.round(4), axis=0))  # some of the texts are equal
        assert np.array_equal(extract.read(reader), expected)
        stored = np.load(layout.features / "features.npy")[rows].astype(np.float32)
        assert stored == pytest.approx(expected, abs=2e-3, rel=2e-3)


def test_packed_rows_choose_an_arithmetic_by_the_same_sample_as_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = validated_case(tmp_path, GREY)
    features.features(image_recipe(tmp_path, packed=True), layout)
    samples: list[Any] = []

    def choose(network: Any, dtypes: Any, calibration: Any, check: Any) -> Arithmetic:
        samples.append([*calibration, *check])
        return Arithmetic()

    monkeypatch.setattr(precision, "choose", choose)
    monkeypatch.setattr(devices, "fast_dtypes", lambda device: [torch.bfloat16])
    monkeypatch.setattr(features, "SAMPLE", 10)
    recipe = image_recipe(tmp_path, precision="auto")
    features.features(recipe, layout)
    features.features(image_recipe(tmp_path, packed=True), layout)  # asks nobody
    pack = packs.load(layout, "image", 0)
    arithmetic_for(
        layout.weights,
        recipe.features,
        lambda extractor, rows: Packed(pack, rows, extractor.device.type),
        20,
    )
    of_files, of_pack = samples
    assert [len(part) for part in of_files] == [5, 5]
    assert all(torch.equal(one, two) for one, two in zip(of_files, of_pack, strict=True))
    every_other = torch.from_numpy(decoded(layout)[[0, 4, 8, 12, 16]])  # of rows 0 to 19, ten
    assert torch.equal(of_files[0], every_other)


# What a network is shown


def tapped(network: torch.nn.Module) -> Tapped:
    said = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    spec = Spec("timm", "flat", "image", 3, said, "made up", None, "", None)
    return Tapped(network, spec, None)


class Shown(torch.nn.Module):
    """Returns what it is given, and remembers how that lay in memory."""

    given: torch.Tensor

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.given = pixels
        return pixels


def test_grey_pixels_are_shown_as_three_equal_channels() -> None:
    grey = torch.arange(256, dtype=torch.uint8).reshape(4, 8, 8, 1)
    shown = Shown()
    for dtype in (torch.uint8, torch.float32):
        found = tapped(shown)(grey.to(dtype))
        assert shown.given.is_contiguous(memory_format=torch.channels_last)
        assert found.shape == (4, 3, 8, 8)
        assert torch.equal(found, tapped(shown)(grey.to(dtype).repeat(1, 1, 1, 3)))


def test_pixels_may_be_fractions() -> None:
    chance = torch.Generator().manual_seed(0)
    pixels = 255 * torch.rand(2, 8, 8, 3, generator=chance)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    expected = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(tapped(Shown())(pixels), expected, rtol=1e-5, atol=1e-5)
    whole = pixels.to(torch.uint8)
    assert torch.equal(tapped(Shown())(whole), tapped(Shown())(whole.float()))


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


def test_on_apples_gpus_nothing_is_compiled_of_its_own_accord(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 10**12
    assert features.compile_from("image") < features.compile_from("text") < most
    monkeypatch.setattr(devices, "device", lambda: torch.device("mps"))
    assert min(features.compile_from("image"), features.compile_from("text")) > most


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
@pytest.mark.parametrize("layers", [pytest.param(None, marks=pytest.mark.long), ["blocks.2", "conv_head"]])
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


@pytest.mark.long
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
