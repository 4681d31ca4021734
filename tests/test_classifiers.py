"""Classifiers: the same network as extractor and head, before training and after it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth
from transformers import XLMConfig, XLMModel

from headstart import features, packs
from headstart.classifiers import NORMS, Classifier, _drop_out
from headstart.errors import HeadstartError
from headstart.heads import Head
from headstart.layout import sha256_of
from headstart.precision import Arithmetic
from headstart.recipe import Features, Train
from tests import examples, tuning

ROWS = np.arange(0, 24)
OPTIONS = Features(packed=True)
LIBRARIES = {"resnet18": "torchvision", "test_efficientnet": "timm"}


def lively(folder: Path) -> Path:
    """Statistics and factors of BatchNorm as after a training: the initial ones would fold into nothing."""
    chance = torch.Generator().manual_seed(1)
    state = load_file(folder / "weights.safetensors")
    norms = [name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")]
    assert norms
    for norm in norms:
        like = state[f"{norm}.running_mean"]
        state[f"{norm}.running_mean"] = 0.1 * torch.randn(like.shape, generator=chance)
        state[f"{norm}.running_var"] = 0.5 + torch.rand(like.shape, generator=chance)
        state[f"{norm}.weight"] = 0.7 + 0.6 * torch.rand(like.shape, generator=chance)
        state[f"{norm}.bias"] = 0.1 * torch.randn(like.shape, generator=chance)
    save_file(state, folder / "weights.safetensors")
    spec = json.loads((folder / "spec.json").read_text())
    spec["sha256"] = sha256_of(folder / "weights.safetensors")
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module", params=sorted(LIBRARIES))
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return lively(tuning.write_weights(tmp_path_factory.mktemp(name), LIBRARIES[name], name))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively(tuning.write_weights(tmp_path_factory.mktemp("resnet")))


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention takes the weights of layers that it never calls."""
    return tuning.write_weights(tmp_path_factory.mktemp("swin"), "torchvision", "swin_t")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, packs.Sentences]:
    root = tmp_path_factory.mktemp("texts")
    (root / "recipes").mkdir()
    examples.write_text_project(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        weights, pack, _ = tuning.text_case(root)
    return weights, pack


def choices(**keys: Any) -> Train:
    return Train(method="fine_tune", precision="float32", **keys)


def some_head(dim: int) -> Head:
    chance = np.random.default_rng(0)
    parts = [chance.normal(size=size) for size in ((3, dim), 3, dim)] + [chance.uniform(0.5, 2, dim)]
    return Head(*(part.astype(np.float32) for part in parts))


def dim_of(weights: Path) -> int:
    return int(json.loads((weights / "spec.json").read_text())["dim"])


def with_head(weights: Path, given: Train, options: Features = OPTIONS) -> Classifier:
    return Classifier(weights, options, given, 3, some_head(dim_of(weights))).eval()


def said(classifier: Classifier, pack: packs.Pack) -> np.ndarray[Any, Any]:
    """Logits of the classifier, without dropout."""
    classifier.eval()
    with torch.inference_mode():
        logits = classifier(*(torch.from_numpy(array) for array in pack.batch(ROWS)))
    found: np.ndarray[Any, Any] = logits.numpy()
    return found


def served(weights: Path, head: Head, pack: packs.Pack) -> np.ndarray[Any, Any]:
    """Logits of the extractor and the head."""
    extractor = features.Extractor(weights, OPTIONS, Arithmetic())
    return head.logits(extractor.read(features.Packed(pack, ROWS, "cpu")))


def shaken(classifier: Classifier) -> None:
    """Move everything that training moves."""
    chance = torch.Generator().manual_seed(2)
    changing = classifier.changing()
    assert changing
    for name, value in changing.items():
        if not value.is_floating_point():
            value.add_(7)
        elif name.endswith("running_var"):
            value.mul_(0.8 + 0.4 * torch.rand(value.shape, generator=chance))
        else:
            value.add_(0.02 * torch.randn(value.shape, generator=chance))


def assert_saved(classifier: Classifier, pack: packs.Pack, folder: Path) -> None:
    """What is written says what the classifier says after its weights have changed."""
    before = said(classifier, pack)
    shaken(classifier)
    after = said(classifier, pack)
    assert np.abs(after - before).max() > 0.05
    folder.mkdir()
    classifier.save(folder)
    found = served(folder / "backbone", Head.load(folder / "head.safetensors"), pack)
    np.testing.assert_allclose(found, after, rtol=1e-3, atol=1e-4)
    spec, earlier = (
        json.loads((place / "spec.json").read_text()) for place in (folder / "backbone", classifier.weights)
    )
    assert spec["sha256"] == sha256_of(folder / "backbone/weights.safetensors") != earlier["sha256"]
    assert spec | {"sha256": None} == earlier | {"sha256": None}


@pytest.mark.parametrize(("batch_norm", "folds"), [("frozen", True), ("updated", False)])
def test_pictures_get_the_logits_of_extractor_and_head(images: Path, batch_norm: str, folds: bool) -> None:
    classifier = with_head(images, choices(batch_norm=batch_norm))
    pack, _ = tuning.pictures()
    assert bool(classifier.folds) == folds
    assert any(isinstance(module, NORMS) for module in classifier.modules()) != folds
    expected = served(images, some_head(dim_of(images)), pack)
    np.testing.assert_allclose(said(classifier, pack), expected, rtol=1e-3, atol=1e-3)


def test_texts_get_the_logits_of_extractor_and_head(texts: tuple[Path, packs.Sentences]) -> None:
    weights, pack = texts
    expected = served(weights, some_head(dim_of(weights)), pack)
    np.testing.assert_allclose(said(with_head(weights, choices()), pack), expected, rtol=1e-3, atol=1e-4)


def test_the_head_comes_out_as_it_went_in(resnet: Path) -> None:
    found, given = with_head(resnet, choices()).head(), some_head(512)
    assert all(np.array_equal(value, getattr(given, name)) for name, value in vars(found).items())


def test_without_a_head_vectors_are_taken_as_they_are(resnet: Path) -> None:
    head = Classifier(resnet, OPTIONS, choices(), 3).head()
    assert head.weight.shape == (3, 512)
    assert not head.mean.any()
    assert (head.scale == 1).all()


@pytest.mark.parametrize("batch_norm", ["frozen", "updated"])
def test_saved_pictures_backbones_say_what_the_trained_one_says(
    images: Path, batch_norm: str, tmp_path: Path
) -> None:
    pack, _ = tuning.pictures()
    assert_saved(with_head(images, choices(batch_norm=batch_norm)), pack, tmp_path / "saved")
    before, after = (
        load_file(place / "weights.safetensors") for place in (images, tmp_path / "saved/backbone")
    )
    assert {name: v.shape for name, v in before.items()} == {name: v.shape for name, v in after.items()}


def test_a_saved_text_backbone_says_what_the_trained_one_says(
    texts: tuple[Path, packs.Sentences], tmp_path: Path
) -> None:
    weights, pack = texts
    assert_saved(with_head(weights, choices()), pack, tmp_path / "saved")
    written = {file.name for file in (tmp_path / "saved/backbone").iterdir()}
    assert written == {file.name for file in weights.iterdir()} >= {"tokenizer.json", "config.json"}
    for name in written - {"weights.safetensors", "spec.json"}:
        assert (tmp_path / "saved/backbone" / name).read_bytes() == (weights / name).read_bytes()


def test_low_rank_additions_change_nothing_at_first_and_are_all_that_is_trained(
    texts: tuple[Path, packs.Sentences],
) -> None:
    weights, pack = texts
    plain, adapted = with_head(weights, choices()), with_head(weights, choices(lora=2))
    np.testing.assert_allclose(said(adapted, pack), said(plain, pack), rtol=1e-5, atol=1e-6)
    names = [name for name, _ in adapted.trained()]
    assert names
    assert all("lora_" in name for name in names)
    assert {name for name in adapted.changing() if "lora_" not in name} == {"linear.weight", "linear.bias"}
    shapes = [p.shape for name, p in adapted.trained() if "lora_A" in name]
    assert {shape[0] for shape in shapes} == {2}
    network: Any = plain.tapped.network
    linears = [m for m in network.encoder.modules() if isinstance(m, nn.Linear)]
    assert len(shapes) == len(linears)


def test_saved_low_rank_additions_are_in_the_weights(
    texts: tuple[Path, packs.Sentences], tmp_path: Path
) -> None:
    weights, pack = texts
    assert_saved(with_head(weights, choices(lora=2)), pack, tmp_path / "saved")
    written = load_file(tmp_path / "saved/backbone/weights.safetensors")
    known = load_file(weights / "weights.safetensors")
    assert {name for name in known if not name.startswith("pooler.")} == set(written)


def test_low_rank_additions_stay_out_of_what_is_frozen(texts: tuple[Path, packs.Sentences]) -> None:
    adapted = with_head(texts[0], choices(lora=2, freeze="encoder.layer.0"))
    assert {".".join(name.split(".")[:3]) for name, _ in adapted.trained()} == {"encoder.layer.1"}


def test_low_rank_additions_beside_nothing_are_an_error(texts: tuple[Path, packs.Sentences]) -> None:
    with pytest.raises(HeadstartError, match="no linear layer left") as caught:
        with_head(texts[0], choices(lora=2, freeze="encoder"))
    assert "train.freeze" in caught.value.do


def test_freezing_a_layer_that_is_not_there_names_the_nearest(resnet: Path) -> None:
    with pytest.raises(HeadstartError, match="has no layer layer9") as caught:
        with_head(resnet, choices(freeze="layer9"))
    assert caught.value.where == "train.freeze"
    assert "layer4" in str(caught.value)


@pytest.mark.parametrize("batch_norm", ["frozen", "updated"])
def test_exactly_what_is_frozen_is_not_trained(resnet: Path, batch_norm: str) -> None:
    every = [name for name, _ in with_head(resnet, choices(batch_norm=batch_norm)).trained()]
    assert {name.split(".")[0] for name in every} >= {"conv1", "layer1", "layer2", "layer3", "layer4"}
    found = [name for name, _ in with_head(resnet, choices(batch_norm=batch_norm, freeze="layer2")).trained()]
    assert found == [name for name in every if name.startswith(("layer3.", "layer4."))]


@pytest.mark.parametrize(
    ("freeze", "layers", "trained"),
    [
        (None, None, ("features.", "norm.")),
        ("features.5.3", None, ("features.5.4.", "features.5.5.", "features.6.", "features.7.", "norm.")),
        (
            "features.1.0.attn.qkv",
            ["features.1"],
            ("features.1.0.attn.proj.", "features.1.0.norm2.", "features.1.0.mlp.", "features.1.1."),
        ),
    ],
)
def test_weights_are_trained_whoever_multiplies_by_them(
    swin: Path, freeze: str | None, layers: list[str] | None, trained: tuple[str, ...]
) -> None:
    options = Features(packed=True, layers=layers)
    classifier = Classifier(swin, options, choices(freeze=freeze), 3).train()
    every = [name for name, _ in classifier.tapped.network.named_parameters()]
    assert [name for name, _ in classifier.trained()] == [n for n in every if n.startswith(trained)]
    pixels, _ = tuning.pictures()
    classifier(torch.from_numpy(pixels.batch(ROWS[:2])[0])).logsumexp(dim=1).sum().backward()
    assert [name for name, parameter in classifier.trained() if parameter.grad is None] == []


def test_no_branch_of_a_backbone_drops_out_unless_asked(swin: Path) -> None:
    pixels = torch.from_numpy(tuning.pictures()[0].batch(ROWS[:8])[0])
    quiet = Classifier(swin, OPTIONS, choices(dropout=0.0), 3).train()
    assert torch.equal(quiet(pixels), quiet(pixels))
    for share in (None, 0.3):
        lively = Classifier(swin, OPTIONS, choices(backbone_dropout=share, dropout=0.0), 3).train()
        rates = [module.p for module in lively.modules() if isinstance(module, StochasticDepth)]
        assert max(rates) == pytest.approx(0.2)  # as torchvision made it
        assert not torch.equal(lively(pixels), lively(pixels))


def test_whatever_a_library_calls_it_nothing_drops_out() -> None:
    config = XLMConfig(vocab_size=20, emb_dim=8, n_layers=1, n_heads=2)
    text, picture = XLMModel(config).train(), DropPath(0.5)
    ids = torch.arange(3, 15)[None]
    assert not torch.equal(*(text(ids)[0] for _ in range(2)))
    _drop_out(nn.ModuleList([text, picture]), 0.0)
    assert torch.equal(*(text(ids)[0] for _ in range(2)))
    assert picture.drop_prob == 0


def test_a_frozen_layer_that_is_never_called_is_not_waited_for(swin: Path) -> None:
    classifier = Classifier(swin, OPTIONS, choices(freeze="features.1.0.attn.qkv"), 3).eval()
    pixels = torch.from_numpy(tuning.pictures()[0].batch(ROWS[:2])[0])
    assert classifier.frozen_output(pixels).shape[:1] == (2,)


def test_within_a_layer_freezing_goes_up_to_the_part_that_is_named(resnet: Path) -> None:
    classifier = with_head(resnet, choices(batch_norm="updated", freeze="layer4.0"))
    assert {name.split(".")[1] for name, _ in classifier.trained()} == {"1"}


def test_statistics_of_frozen_layers_stay_and_those_of_the_others_move(resnet: Path) -> None:
    classifier = with_head(resnet, choices(batch_norm="updated", freeze="layer2")).train()
    before = {name: value.clone() for name, value in classifier.named_buffers()}
    pack, _ = tuning.pictures()
    classifier(*(torch.from_numpy(array) for array in pack.batch(ROWS)))
    moved = {name for name, value in classifier.named_buffers() if not value.equal(before[name])}
    assert moved == {
        name for name in before if name.startswith(("tapped.network.layer3.", "tapped.network.layer4."))
    }
    assert moved <= set(classifier.changing())


def test_what_is_frozen_is_never_in_training_mode(texts: tuple[Path, packs.Sentences]) -> None:
    classifier = with_head(texts[0], choices(freeze="encoder.layer.0")).train()
    network: Any = classifier.tapped.network
    frozen = [*network.embeddings.modules(), *network.encoder.layer[0].modules()]
    assert not any(module.training for module in frozen)
    trained = [module for module in network.encoder.layer[1].modules() if [*module.parameters()]]
    assert all(module.training for module in (*trained, network.encoder.layer[1].output.dropout))
    assert classifier.dropout.training


@pytest.mark.parametrize("lora", [None, 2])
def test_a_pooler_that_nobody_asks_for_is_not_trained(
    texts: tuple[Path, packs.Sentences], lora: int | None
) -> None:
    classifier = with_head(texts[0], choices(lora=lora))
    assert hasattr(classifier.tapped.network, "pooler")
    names = [name for name, _ in classifier.trained()]
    assert names[-1].startswith("encoder.layer.1.")
    assert not any("pooler" in name for name in (*names, *classifier.changing()))


def test_every_parameter_that_is_trained_gets_a_gradient(texts: tuple[Path, packs.Sentences]) -> None:
    weights, pack = texts
    classifier = with_head(weights, choices()).train()
    classifier(*(torch.from_numpy(array) for array in pack.batch(ROWS))).logsumexp(dim=1).sum().backward()
    assert [name for name, parameter in classifier.trained() if parameter.grad is None] == []


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("dropped", [None, 0.0])
def test_nothing_drops_out_of_frozen_layers_nor_of_any_unless_asked(
    texts: tuple[Path, packs.Sentences], lora: int | None, dropped: float | None
) -> None:
    weights, pack = texts
    frozen = choices(freeze="encoder.layer.0", lora=lora, backbone_dropout=dropped)
    classifier = with_head(weights, frozen).train()
    network: Any = classifier.tapped.network
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for place, kept in seen.items():
        network.encoder.layer[place].register_forward_hook(
            lambda module, given, output, kept=kept: kept.append(
                output if isinstance(output, torch.Tensor) else output[0]
            )
        )
    inputs = [torch.from_numpy(array) for array in pack.batch(ROWS)]
    for _ in range(2):
        classifier(*inputs)
    assert torch.equal(*seen[0])
    assert torch.equal(*seen[1]) == (dropped == 0)
