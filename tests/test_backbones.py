from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart import backbones
from headstart.errors import HeadstartError
from headstart.fetching import fetch
from headstart.layout import Layout
from tests import cached, examples


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def image_weights(root: Path) -> Path:
    examples.write_efficientnet(root / "inbox/weights.safetensors")
    source = {
        "backbone": "timm:test_efficientnet",
        "source": f"file:{root / 'inbox' / 'weights.safetensors'}",
    }
    layout = Layout(root, "case")
    fetch(cached.recipe(fetch=source), layout)
    return layout.weights


def text_weights(root: Path) -> Path:
    examples.write_bert(root / "inbox/bert")
    layout = Layout(root, "case")
    source = {"backbone": "transformers:bert", "source": f"file:{root / 'inbox/bert'}"}
    fetch(cached.recipe(fetch=source), layout)
    return layout.weights


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(weights: Path) -> HeadstartError:
    with pytest.raises(HeadstartError) as caught:
        backbones.load(weights)
    return caught.value


def test_a_backbone_is_frozen_in_evaluation_mode_and_in_float32(tmp_path: Path) -> None:
    for place, make in (("image", image_weights), ("text", text_weights)):
        network, _ = backbones.load(make(tmp_path / place))
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_weights_kept_in_half_precision_compute_in_float32(tmp_path: Path) -> None:
    weights = text_weights(tmp_path)
    edit(weights / "config.json", dtype="bfloat16")
    halves = {name: value.bfloat16() for name, value in load_file(weights / "weights.safetensors").items()}
    save_file(halves, weights / "weights.safetensors")
    network, _ = backbones.load(weights)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    name = "encoder.layer.0.output.dense.weight"
    assert (network.get_parameter(name) == halves[name].float()).all()


def test_an_image_network_gives_what_its_classifier_was_given(tmp_path: Path) -> None:
    network, spec = backbones.load(image_weights(tmp_path))
    whole = backbones.build("timm", "test_efficientnet").eval()
    whole.load_state_dict(load_file(tmp_path / "inbox/weights.safetensors"))
    given: list[torch.Tensor] = []
    whole.get_submodule("classifier").register_forward_hook(
        lambda module, inputs, output: given.extend(inputs)
    )
    picture = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        whole(picture)
        vectors = network(picture)
    assert vectors.shape == (2, spec.dim) == (2, 256)
    assert torch.equal(vectors, given[0])


def test_a_backbone_that_was_never_fetched_says_what_to_run(tmp_path: Path) -> None:
    error = refused(tmp_path / "weights/case")
    assert error.what == "the backbone is missing"
    assert "fetch@case" in error.do


@pytest.mark.parametrize("content", ["", "[]", '{"library": "timm"}', '{"a": 1}'])
def test_a_description_of_another_making_says_what_to_run(content: str, tmp_path: Path) -> None:
    weights = image_weights(tmp_path)
    (weights / "spec.json").write_text(content)
    error = refused(weights)
    assert "description" in error.what
    assert error.where == str(weights / "spec.json")
    assert "fetch@case" in error.do


@pytest.mark.parametrize("damage", ["gone", "cut short", "other names", "other shapes"])
def test_weights_that_do_not_fit_say_what_to_run(damage: str, tmp_path: Path) -> None:
    weights = image_weights(tmp_path)
    path = weights / "weights.safetensors"
    state = load_file(path)
    match damage:
        case "gone":
            path.unlink()
        case "cut short":
            path.write_bytes(path.read_bytes()[:1000])
        case "other names":
            save_file({f"other.{name}": value for name, value in state.items()}, path)
        case "other shapes":
            save_file(
                {name: value[:1].clone() if value.ndim else value for name, value in state.items()}, path
            )
    error = refused(weights)
    assert error.where == str(path)
    assert "fetch@case" in error.do
    if damage.startswith("other"):
        assert "builds another test_efficientnet" in error.what
        assert "conv_stem.weight" in str(error)


@pytest.mark.parametrize(
    ("library", "wrong", "right"),
    [
        ("timm", "test_eficientnet", "test_efficientnet"),
        ("timm", "resnet50.a1_in1m", "resnet50.a1_in1k"),
        ("torchvision", "resnet81", "resnet18"),
        ("torchvision", "mobilenetv3_small", "mobilenet_v3_small"),
    ],
)
def test_an_unknown_architecture_names_the_nearest(library: str, wrong: str, right: str) -> None:
    with pytest.raises(HeadstartError, match=f"{library} has no architecture '{wrong}'") as caught:
        backbones.build(library, wrong)
    assert f"did you mean {right}?" in caught.value.table
    assert caught.value.where == "fetch.backbone"


def test_an_architecture_may_carry_the_tag_of_its_weights() -> None:
    network: Any = backbones.build("timm", "test_efficientnet.r160_in1k")
    assert network.pretrained_cfg["tag"] == "r160_in1k"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("timm", "hf-hub:timm/resnet18.a1_in1k"),
        ("timm", "hf_hub:timm/resnet18.a1_in1k"),
        ("torchvision", "fcn_resnet50"),  # would bring the weights of its inner ResNet
        ("torchvision", "fasterrcnn_resnet50_fpn"),
    ],
)
def test_a_name_that_would_reach_for_the_network_is_unknown(library: str, name: str) -> None:
    with pytest.raises(HeadstartError, match="has no architecture"):
        backbones.build(library, name)


@pytest.mark.parametrize(
    ("architecture", "dim"), [("resnet18", 512), ("mobilenet_v3_small", 1024), ("shufflenet_v2_x0_5", 1024)]
)
def test_the_classifier_of_a_torchvision_network_comes_off(architecture: str, dim: int) -> None:
    network = backbones.without_classifier("torchvision", backbones.build("torchvision", architecture))
    with torch.inference_mode():
        assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, dim)


def test_a_network_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(HeadstartError, match="SqueezeNet has no linear classifier"):
        backbones.without_classifier("torchvision", backbones.build("torchvision", "squeezenet1_1"))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_googlenet_scales_its_pixels_as_it_does_with_torchvisions_own_weights() -> None:
    assert backbones.build("torchvision", "googlenet").transform_input is True


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(
    ("architecture", "side", "dim"), [("googlenet", 32, 1024), ("inception_v3", 75, 2048)]
)
def test_in_training_an_auxiliary_classifier_has_no_say(architecture: str, side: int, dim: int) -> None:
    network = backbones.without_classifier("torchvision", backbones.build("torchvision", architecture))
    assert network.train()(torch.zeros(2, 3, side, side)).shape == (2, dim)
    assert not any("aux" in name.lower() for name in network.state_dict())


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_weights_of_auxiliary_classifiers_are_left_aside(tmp_path: Path) -> None:
    """Published files hold them, as do folders that an earlier version of headstart fetched."""
    published = backbones.build("torchvision", "googlenet").state_dict()
    save_file(published, tmp_path / "googlenet.safetensors")
    source = {"backbone": "torchvision:googlenet", "source": f"file:{tmp_path / 'googlenet.safetensors'}"}
    layout = Layout(tmp_path, "case")
    fetch(cached.recipe(fetch=source), layout)
    kept = load_file(layout.weights / "weights.safetensors")
    assert published.keys() - kept.keys() == {name for name in published if name.startswith(("aux", "fc."))}
    save_file(published, layout.weights / "weights.safetensors")
    found = backbones.load(layout.weights)[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in kept.items())


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "config", [{"model_type": "of-my-own"}, {}, {"model_type": "bert", "num_hidden_layers": "two"}]
)
def test_a_config_that_transformers_does_not_know_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadstartError, match="cannot build") as caught:
        backbones.transformer(tmp_path)
    assert "config.json" in caught.value.where


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadstartError, match="cannot build"):
        backbones.transformer(tmp_path)
    assert not (tmp_path / "ran").exists()
