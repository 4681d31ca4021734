"""Weights from anywhere become one folder that computes what the published network computed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetModel,
)

from headstart import backbones, texts
from headstart.errors import HeadstartError
from headstart.fetching import fetch
from headstart.heads import Head
from headstart.layout import Layout, sha256_of
from headstart.recipe import Features
from headstart.source_free import Inherited
from tests import cached, examples, tuning
from tests.servers import Loopback, serving

State = dict[str, torch.Tensor]
TIMM = "timm:test_efficientnet"


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HEADSTART_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))


def efficientnet() -> Any:
    """timm's smallest network with weights and statistics that tell every tensor from every other."""
    network = timm.create_model("test_efficientnet", pretrained=False)
    return lively(network)


def lively(network: Any) -> Any:
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
        elif value.ndim == 1:
            value.uniform_(0.5, 1.5)
    return network.eval()


def layout(root: Path) -> Layout:
    return Layout(root, "case")


def fetched(root: Path, backbone: str, source: Path | str, **block: Any) -> Layout:
    """Fetch from a file or folder, or from a whole source."""
    source = f"file:{source}" if isinstance(source, Path) else source
    fetch(cached.recipe(fetch={"backbone": backbone, "source": source} | block), layout(root))
    return layout(root)


def refused(root: Path, backbone: str, source: Path | str, **block: Any) -> HeadstartError:
    """The error of a fetch that must fail and leave nothing behind."""
    with pytest.raises(HeadstartError) as caught:
        fetched(root, backbone, source, **block)
    folder = layout(root).weights.parent
    assert not folder.exists() or not list(folder.iterdir())
    assert caught.value.do
    return caught.value


def spec(found: Layout) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((found.weights / "spec.json").read_text())
    return content


def saved(root: Path, content: Any, name: str = "weights.pth", **options: Any) -> Path:
    """What torch.save makes of it."""
    root.mkdir(parents=True, exist_ok=True)
    torch.save(content, root / name, **options)
    return root / name


def computes(found: Layout, network: Any, side: int = 64) -> bool:
    """The fetched backbone gives exactly what this timm network gives before its classifier."""
    picture = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    network.reset_classifier(0)
    with torch.inference_mode():
        return torch.equal(backbones.load(found.weights)[0](picture), network(picture))


# Networks for images


def test_safetensors_become_weights_and_a_description(tmp_path: Path) -> None:
    network = efficientnet()
    path = tmp_path / "published.safetensors"
    save_file(network.state_dict(), path)
    found = fetched(tmp_path, TIMM, path, licence="Apache-2.0")
    assert {file.name for file in found.weights.iterdir()} == {"weights.safetensors", "spec.json"}
    assert spec(found) == {
        "library": "timm",
        "architecture": "test_efficientnet",
        "modality": "image",
        "dim": 256,
        "preprocessing": {
            "image_size": 160,
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "source": f"file:{path}",
        "source_sha256": sha256_of(path),
        "sha256": sha256_of(found.weights / "weights.safetensors"),
        "licence": "Apache-2.0",
    }
    assert not any(name.startswith("classifier") for name in load_file(found.weights / "weights.safetensors"))
    assert computes(found, network)


def registered(root: Path) -> Path:
    """The folder in which MLflow keeps a version, with the parts of a model in it."""
    backbone = tuning.write_weights(root / "artifacts/backbone", "timm", "test_efficientnet")
    described = json.loads((backbone / "spec.json").read_text()) | {"licence": "Apache-2.0"}
    (backbone / "spec.json").write_text(json.dumps(described))
    Head(*(np.ones(shape, np.float32) for shape in ((2, 256), (2,), (256,), (256,)))).save(
        root / "artifacts/head.safetensors"
    )
    said = {"classes": ["no", "yes"], "shares": [0.3, 0.7]}
    (root / "artifacts/model.json").write_text(json.dumps(said))
    (root / "artifacts/features.json").write_text("{}")
    parts = {
        name: {"path": f"artifacts/{file}"}
        for name, file in {
            "backbone": "backbone",
            "head": "head.safetensors",
            "model": "model.json",
            "features": "features.json",
        }.items()
    }
    (root / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": {"artifacts": parts}}}))
    return root


def test_a_registered_model_is_a_backbone_and_brings_its_head(tmp_path: Path) -> None:
    published = registered(tmp_path / "published")
    earlier = published / "artifacts/backbone/registered"  # of the model that this one went on from
    earlier.mkdir()
    (earlier / "model.json").write_text('{"classes": ["other"]}')
    found = fetched(tmp_path, TIMM, published)
    assert spec(found)["source"] == f"file:{published}"
    assert spec(found)["licence"] == "Apache-2.0"
    assert spec(found)["sha256"] == sha256_of(found.weights / "weights.safetensors")
    assert backbones.load(found.weights)[1].architecture == "test_efficientnet"
    brought = Inherited.read(found.weights)
    assert brought.classes == ["no", "yes"]
    assert brought.shares.tolist() == [0.3, 0.7]
    assert brought.head.weight.shape == (2, 256)
    brought.check(Features(), None)
    with pytest.raises(HeadstartError) as caught:
        brought.check(Features(layers=["blocks.1"], views=2), ["yes", "no"])
    assert caught.value.table == [
        "features.layers: ['blocks.1'], the model has None",
        "features.views: 2, the model has 1",
        "validate.classes: yes, no, the model has no, yes",
    ]


def test_a_registered_model_of_another_backbone_names_it(tmp_path: Path) -> None:
    published = registered(tmp_path / "published")
    assert "write `backbone: timm:test_efficientnet`" in refused(tmp_path, "timm:test_resnet", published).do
    (published / "artifacts/head.safetensors").unlink()
    assert "no model that headstart registered" in refused(tmp_path, TIMM, published).what


def test_a_backbone_from_elsewhere_brings_no_head(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="no model to go on from"):
        Inherited.read(tmp_path)


def prefixed(state: State) -> State:
    return {f"module.{name}": value for name, value in state.items()}


def reworded(state: State) -> State:
    """Other names in the same order: what a publisher's own code calls the same network."""
    return {f"layer{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(state.items())}


def uncounted(state: State) -> State:
    """As older versions of torch saved BatchNorm."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def headless(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("classifier")}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state,
        prefixed,
        reworded,
        uncounted,
        headless,
        lambda state: reworded(uncounted(state)),
        lambda state: reworded(headless(state)),
        lambda state: {"state_dict": prefixed(state), "epoch": 7, "optimizer": {"state": [1, 2]}},
        lambda state: {"model": uncounted(state)},
        lambda state: prefixed({f"model.backbone.{name}": value for name, value in state.items()}),
        lambda state: (
            {f"net.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(2)}
        ),
        lambda state: {name: torch.nn.Parameter(value.float()) for name, value in state.items()},
    ],
    ids=[
        "plain",
        "wrapper's prefix",
        "other names",
        "no counters",
        "no classifier",
        "other names, no counters",
        "other names, no classifier",
        "a checkpoint",
        "inside a dict",
        "two prefixes",
        "beside a loss",
        "parameters",
    ],
)
def test_however_a_publisher_packs_a_network_it_computes_the_same(
    change: Callable[[State], Any], tmp_path: Path
) -> None:
    network = efficientnet()
    path = saved(tmp_path, change(network.state_dict()))
    assert computes(fetched(tmp_path, TIMM, path, sha256=sha256_of(path)), network)


def test_a_network_trained_for_other_classes_is_the_same_backbone(tmp_path: Path) -> None:
    for name, change in {"own": dict, "other": reworded}.items():
        network = lively(timm.create_model("test_efficientnet", pretrained=False, num_classes=3))
        path = saved(tmp_path / name, change(network.state_dict()))
        found = fetched(tmp_path / name, TIMM, path, sha256=sha256_of(path))
        assert computes(found, network)


def test_the_old_format_of_torch_is_read(tmp_path: Path) -> None:
    network = efficientnet()
    path = saved(tmp_path, network.state_dict(), _use_new_zipfile_serialization=False)
    assert computes(fetched(tmp_path, TIMM, path, sha256=sha256_of(path)), network)


def test_weights_in_an_archive_are_pinned_by_the_archive(tmp_path: Path) -> None:
    network = efficientnet()
    archive = tmp_path / "published.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(saved(tmp_path, network.state_dict()), "inside/weights.pth")
    source = f"file:{archive}#inside/weights.pth"
    error = refused(tmp_path, TIMM, source)
    assert f"sha256: {sha256_of(archive)}" in error.do  # what it says is what works
    found = fetched(tmp_path, TIMM, source, sha256=sha256_of(archive))
    assert computes(found, network)
    assert spec(found)["source_sha256"] == sha256_of(archive)


def test_the_same_source_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path, reworded(efficientnet().state_dict()))
    examples.write_bert(tmp_path / "bert")
    for backbone, source, pin in (
        (TIMM, path, sha256_of(path)),
        ("transformers:bert", tmp_path / "bert", None),
    ):
        one = fetched(tmp_path / "one", backbone, source, sha256=pin).weights
        two = fetched(tmp_path / "two", backbone, source, sha256=pin).weights
        names = sorted(file.name for file in one.iterdir())
        assert names == sorted(file.name for file in two.iterdir())
        assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_the_recipe_has_the_last_word_on_mean_and_standard_deviation(tmp_path: Path) -> None:
    examples.write_efficientnet(tmp_path / "w.safetensors")
    one = spec(fetched(tmp_path, TIMM, tmp_path / "w.safetensors", mean=[0.5, 0.5, 0.5]))["preprocessing"]
    assert (one["mean"], one["std"]) == ([0.5, 0.5, 0.5], [0.229, 0.224, 0.225])
    two = spec(fetched(tmp_path, TIMM, tmp_path / "w.safetensors", std=[0.1, 0.2, 0.3]))["preprocessing"]
    assert (two["mean"], two["std"]) == ([0.485, 0.456, 0.406], [0.1, 0.2, 0.3])


def test_a_torchvision_network_maps_to_what_its_classifier_was_given(tmp_path: Path) -> None:
    network = lively(torchvision.models.resnet18(weights=None))
    path = saved(tmp_path, network.state_dict())
    found = fetched(tmp_path, "torchvision:resnet18", path, sha256=sha256_of(path))
    assert spec(found)["dim"] == 512
    assert spec(found)["preprocessing"] == {
        "image_size": 224,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    picture = torch.randn(2, 3, 64, 64)
    backbone = backbones.load(found.weights)[0]
    with torch.inference_mode():
        assert torch.equal(network.fc(backbone(picture)), network(picture))


def test_torchvisions_own_weights_need_no_pin_and_bring_their_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    torch.save(lively(torchvision.models.regnet_y_400mf(weights=None)).state_dict(), file)
    content = file.getvalue()
    weights = torchvision.models.RegNet_Y_400MF_Weights.IMAGENET1K_V1.value
    name = f"regnet_y_400mf-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(
        type(weights), "url", property(lambda _: f"https://download.pytorch.org/{name}"), False
    )
    with serving(Loopback({f"/{name}": content})) as server:
        monkeypatch.setenv("HEADSTART_MIRRORS", f"https://download.pytorch.org/={server.url}/")
        source = "torchvision:RegNet_Y_400MF_Weights.IMAGENET1K_V1"
        found = fetched(tmp_path, "torchvision:regnet_y_400mf", source)
    assert spec(found)["dim"] == 440
    assert spec(found)["preprocessing"]["interpolation"] == "bilinear"


def test_credentials_in_a_source_reach_neither_the_files_nor_the_errors(tmp_path: Path) -> None:
    examples.write_efficientnet(tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    files = {"/w.safetensors": content, "/bad.safetensors": content[:100], "/w.pth": b"pickle"}
    with serving(Loopback(files, login="user:hunter2")) as server:
        address = f"http://user:hunter2@{server.host}"
        found = fetched(tmp_path, TIMM, f"{address}/w.safetensors?token=t0ps3cret")
        errors = [
            refused(tmp_path / "new", TIMM, f"{address}/{name}?token=t0ps3cret")
            for name in ("bad.safetensors", "w.pth")
        ]
    for text in [
        *(file.read_bytes().decode("latin-1") for file in found.weights.iterdir()),
        *map(str, errors),
    ]:
        assert "hunter2" not in text
        assert "t0ps3cret" not in text
    assert server.host in spec(found)["source"]


# What is refused


def test_the_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "published.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    error = refused(tmp_path, TIMM, path)
    assert error.what == f"the weights are not those of {TIMM}"
    assert "conv_stem.weight" in str(error)
    assert "num_batches_tracked" not in str(error)


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    state = efficientnet().state_dict()
    state["conv_stem.weight"] = torch.zeros(24, 1, 3, 3)
    save_file(state, tmp_path / "published.safetensors")
    error = refused(tmp_path, TIMM, tmp_path / "published.safetensors")
    assert "conv_stem.weight: (24, 1, 3, 3) float32, the architecture has (24, 3, 3, 3)" in str(error)


def test_quantised_numbers_are_not_taken_for_weights(tmp_path: Path) -> None:
    state = efficientnet().state_dict()
    state["conv_stem.weight"] = torch.zeros_like(state["conv_stem.weight"], dtype=torch.int8)
    save_file(state, tmp_path / "published.safetensors")
    assert "int8" in str(refused(tmp_path, TIMM, tmp_path / "published.safetensors"))


def test_other_names_in_another_order_are_refused(tmp_path: Path) -> None:
    state = reworded(efficientnet().state_dict())
    path = saved(tmp_path, dict(reversed(state.items())))
    assert "not those of" in refused(tmp_path, TIMM, path, sha256=sha256_of(path)).what


def test_a_file_that_holds_the_network_twice_is_refused(tmp_path: Path) -> None:
    state = efficientnet().state_dict()
    both = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in state.items()}
    path = saved(tmp_path, both)
    error = refused(tmp_path, TIMM, path, sha256=sha256_of(path))
    assert "more than once" in error.what
    assert "student" in str(error)
    assert "teacher" in str(error)


def test_an_unknown_architecture_names_the_nearest_before_anything_is_fetched(tmp_path: Path) -> None:
    error = refused(tmp_path, "timm:test_eficientnet", "https://example.invalid/weights.pth")
    assert "did you mean test_efficientnet?" in error.table
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_several_weights_lists_them(tmp_path: Path) -> None:
    examples.write_efficientnet(tmp_path / "published/a.safetensors")
    saved(tmp_path / "published/deep", {}, "b.pth")
    error = refused(tmp_path, TIMM, tmp_path / "published")
    assert list(error.table) == ["a.safetensors", "deep/b.pth"]
    found = fetched(tmp_path, TIMM, f"file:{tmp_path / 'published'}#a.safetensors")
    assert spec(found)["dim"] == 256


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    (tmp_path / "published/README.md").write_text("nothing")
    assert "no file of tensors here" in refused(tmp_path, TIMM, tmp_path / "published").table


def test_a_pickled_file_is_opened_only_if_the_recipe_pins_it(tmp_path: Path) -> None:
    path = saved(tmp_path, efficientnet().state_dict())
    error = refused(tmp_path, TIMM, path)
    assert f"add `sha256: {sha256_of(path)}`" in error.do
    assert spec(fetched(tmp_path, TIMM, path, sha256=sha256_of(path)))["source_sha256"] == sha256_of(path)


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return os.symlink, (".", str(self.trace))


def test_a_pickle_that_runs_code_does_not_run_even_if_it_is_pinned(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    paths = [saved(tmp_path, {"weight": torch.zeros(2), "extra": Trap(trace)})]
    paths.append(tmp_path / "plain.pth")
    paths[1].write_bytes(pickle.dumps(Trap(trace), protocol=2))
    for path in paths:
        error = refused(tmp_path, TIMM, path, sha256=sha256_of(path))
        assert "cannot be read" in error.what
        assert "symlink" in str(error)  # what it would have run
        assert not trace.is_symlink()


def test_a_whole_pickled_module_is_refused_without_advice_to_trust_it(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.nn.Linear(2, 2))
    error = refused(tmp_path, TIMM, path, sha256=sha256_of(path))
    assert "Linear" in str(error)
    assert "weights_only" not in str(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, this is text", b"<!DOCTYPE html><html>", b"PK\x03\x04" + bytes(100), b"\x80\x02."],
)
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(content)
        error = refused(tmp_path, TIMM, tmp_path / name, sha256=hashlib.sha256(content).hexdigest())
        assert "cannot be read" in error.what


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {0: torch.zeros(2)}, torch.zeros(2)])
def test_a_checkpoint_without_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, content)
    assert "more than named tensors" in str(refused(tmp_path, TIMM, path, sha256=sha256_of(path)))


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    save_file(efficientnet().state_dict(), tmp_path / "w.safetensors")
    saved(tmp_path, efficientnet().state_dict(), "w.pth")
    for name in ("w.safetensors", "w.pth"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-100])
        assert "cannot be read" in refused(tmp_path, TIMM, path, sha256=sha256_of(path)).what


def test_a_failed_fetch_leaves_the_old_weights_alone(tmp_path: Path) -> None:
    examples.write_efficientnet(tmp_path / "w.safetensors")
    found = fetched(tmp_path, TIMM, tmp_path / "w.safetensors")
    before = {file.name: file.read_bytes() for file in found.weights.iterdir()}
    (tmp_path / "w.safetensors").write_bytes(b"damaged")
    with pytest.raises(HeadstartError):
        fetched(tmp_path, TIMM, tmp_path / "w.safetensors")
    assert {file.name: file.read_bytes() for file in found.weights.iterdir()} == before


# Networks for texts


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bert(root: Path) -> Path:
    examples.write_bert(root / "published")
    return root / "published"


def sentence(found: Layout, network: Any) -> bool:
    """The fetched backbone gives exactly what this transformers network gives."""
    ids = torch.tensor([[2, 7, 9, 11, 3]])
    with torch.inference_mode():
        ours = backbones.load(found.weights)[0](input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        return torch.equal(ours, network.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))[0])


def test_a_model_repository_becomes_weights_a_tokenizer_and_a_description(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    found = fetched(tmp_path, "transformers:bert", folder, licence="MIT")
    assert {file.name for file in found.weights.iterdir()} == {
        "weights.safetensors",
        "spec.json",
        "config.json",
        "tokenizer.json",
    }
    described = spec(found)
    assert described["modality"] == "text"
    assert described["dim"] == 32
    assert described["preprocessing"] == {"max_tokens": 64, "pooling": "mean"}
    assert described["licence"] == "MIT"
    assert described["sha256"] == sha256_of(found.weights / "weights.safetensors")
    assert (found.weights / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not any(name.startswith("pooler") for name in load_file(found.weights / "weights.safetensors"))
    assert sentence(found, AutoModel.from_pretrained(folder))


def test_a_model_saved_with_another_head_and_the_first_berts_words_is_the_same_backbone(
    tmp_path: Path,
) -> None:
    folder = bert(tmp_path)
    whole = BertForPreTraining.from_pretrained(folder)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in whole.state_dict().items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in old  # as in bert-base-uncased to this day
    save_file({name: value.clone() for name, value in old.items()}, folder / "model.safetensors")
    assert sentence(fetched(tmp_path, "transformers:bert", folder), whole.bert)


def test_weights_are_never_rounded_whatever_precision_the_config_names(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    whole = AutoModel.from_pretrained(folder)
    edit(folder / "config.json", dtype="bfloat16")
    assert sentence(fetched(tmp_path, "transformers:bert", folder), whole)
    whole.bfloat16().save_pretrained(folder)
    assert sentence(fetched(tmp_path, "transformers:bert", folder), whole.float())


def test_weights_in_several_files_are_put_together(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    whole = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert sentence(fetched(tmp_path, "transformers:bert", folder), whole)


def test_a_fetch_is_quiet_about_what_it_leaves_away(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = bert(tmp_path)
    BertForPreTraining.from_pretrained(folder).save_pretrained(folder)
    capfd.readouterr()
    fetched(tmp_path, "transformers:bert", folder)
    assert capfd.readouterr() == ("", "")


def test_a_distilbert_is_understood(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    config = DistilBertConfig(vocab_size=80, dim=24, n_layers=1, n_heads=2, hidden_dim=48)
    DistilBertModel(config).save_pretrained(folder)
    found = fetched(tmp_path, "transformers:distilbert", folder)
    assert spec(found)["dim"] == 24
    assert sentence(found, AutoModel.from_pretrained(folder))


def test_a_roberta_gets_no_more_tokens_than_it_has_places_for(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    config = RobertaConfig(
        vocab_size=80,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=34,
    )
    RobertaModel(config).save_pretrained(folder)
    found = fetched(tmp_path, "transformers:roberta", folder)
    longest = spec(found)["preprocessing"]["max_tokens"]
    assert longest == 32
    network = backbones.load(found.weights)[0]
    ids = torch.full((1, longest), 5)
    with torch.inference_mode():
        assert network(input_ids=ids, attention_mask=torch.ones_like(ids))[0].shape == (1, 32, 24)


def test_an_xlnet_reads_texts_of_any_length(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    config = XLNetConfig(vocab_size=80, d_model=24, n_layer=1, n_head=2, d_inner=48)
    assert config.max_position_embeddings == -1
    XLNetModel(config).save_pretrained(folder)
    found = fetched(tmp_path, "transformers:xlnet", folder)
    longest = spec(found)["preprocessing"]["max_tokens"]
    assert longest >= 2**20
    tokens = texts.tokenise(["a zebra " * 100], found.weights / "tokenizer.json", min(128, longest))
    assert tokens.lengths.tolist() == [128]


def test_the_tokenizers_own_limit_counts_too(tmp_path: Path) -> None:
    edit(bert(tmp_path) / "tokenizer_config.json", model_max_length=20)
    found = fetched(tmp_path, "transformers:bert", tmp_path / "published")
    assert spec(found)["preprocessing"]["max_tokens"] == 20


def test_an_older_tokenizer_that_is_only_a_vocabulary_is_understood(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = sorted(own.get_vocab().items(), key=lambda entry: entry[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in vocabulary))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    made = Tokenizer.from_file(str(fetched(tmp_path, "transformers:bert", folder).weights / "tokenizer.json"))
    for text in ("The film was SPLENDID", "a zebra", ""):
        assert made.encode(text).ids == own.encode(text).ids


@pytest.mark.parametrize(
    ("mode", "pooling"),
    [
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_max_tokens", "mean"),
    ],
)
def test_a_sentence_model_says_how_its_tokens_become_one_vector(
    mode: str, pooling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bert(tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, mode: True}))
    found = fetched(tmp_path, "transformers:bert", folder)
    assert spec(found)["preprocessing"]["pooling"] == pooling
    assert ("taking their mean" in caplog.text) == ("max" in mode)


def without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (without_safetensors, "no safetensors"),
        (without_tokenizer, "no tokenizer that can be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no tokenizer that can be read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("not json"), "no config.json"),
        (lambda folder: edit(folder / "config.json", model_type="roberta"), "backbone: transformers:roberta"),
        (lambda folder: edit(folder / "config.json", model_type=None), "take a transformers model"),
        (
            lambda folder: edit(folder / "config.json", hidden_size=64),
            "LayerNorm.bias: (32,), config.json says (64,)",
        ),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=3), "encoder.layer.2"),
        (lambda folder: edit(folder / "config.json", hidden_act="no such"), "cannot load"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-9]
            ),
            "cannot load",
        ),
    ],
)
def test_a_repository_that_is_no_such_model_is_refused(
    damage: Callable[[Path], object], word: str, tmp_path: Path
) -> None:
    damage(bert(tmp_path))
    assert word in str(refused(tmp_path, "transformers:bert", tmp_path / "published"))


def test_a_file_where_a_repository_should_be_is_refused(tmp_path: Path) -> None:
    shutil.copy(bert(tmp_path) / "model.safetensors", tmp_path / "model.safetensors")
    error = refused(tmp_path, "transformers:bert", tmp_path / "model.safetensors")
    assert "a folder with config.json" in error.do


def test_a_network_that_reads_no_texts_is_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ViTModel(config).save_pretrained(folder)
    error = refused(tmp_path, "transformers:vit", folder)
    assert "does not turn each row into one vector" in error.what
