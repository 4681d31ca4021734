"""Backbones: pretrained networks without their classifier, built from safetensors and a spec.

Goes in: a folder that the stage ``fetch`` wrote. Comes out: a network in evaluation mode. Never fetches
anything, and knows nothing about the data.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headstart.errors import HeadstartError

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]


# Whose versions decide what a backbone makes of a row, beside PyTorch's: its network's, and its reader's.
PACKAGES = {
    "timm": ("pillow", "timm", "torchvision"),
    "torchvision": ("pillow", "torchvision"),
    "transformers": ("ftfy", "tokenizers", "transformers"),
}


@dataclass(frozen=True)
class Spec:
    """What ``spec.json`` says of a backbone; preprocessing belongs to the backbone, never to a loop."""

    library: Literal["timm", "torchvision", "transformers"]
    architecture: str
    modality: Literal["image", "text"]
    dim: int  # of the pooled output
    preprocessing: dict[str, Any]
    source: str
    source_sha256: str | None  # of the downloaded file
    sha256: str  # of weights.safetensors
    licence: str | None

    @classmethod
    def read(cls, weights: Path) -> Spec:
        """The spec in a folder that ``fetch`` wrote.

        Raises:
            HeadstartError: there is none, or one that another version of headstart wrote.
        """
        path = weights / "spec.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise _bad("the backbone is missing", path) from None
        except (TypeError, ValueError) as error:
            raise _bad("the backbone's description cannot be read", path, str(error)) from error

    def write(self, weights: Path) -> None:
        """Write what ``read`` reads."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        (weights / "spec.json").write_text(text, encoding="utf-8")


def padding(network: nn.Module) -> int:
    """Id of the token that fills up what is shorter than its batch; 0 where the network has no opinion."""
    return getattr(getattr(network, "config", None), "pad_token_id", None) or 0


def _bad(what: str, path: Path, *lines: str) -> HeadstartError:
    return HeadstartError(
        what, where=str(path), table=lines, do=f"run `dvc repro --force fetch@{path.parent.name}`"
    )


def load(weights: Path) -> tuple[nn.Module, Spec]:
    """The network of a folder that ``fetch`` wrote, float32, in evaluation mode, without gradients.

    An image network maps float [n, 3, side, side] to its pooled output [n, dim]; a text network is the
    ``transformers`` model itself.

    Raises:
        HeadstartError: the files are missing or damaged, or not those of the architecture as installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    spec = Spec.read(weights)
    path = weights / "weights.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _bad("the backbone's weights cannot be read", path, str(error)) from error
    if spec.library == "transformers":
        model = transformer(weights)
    else:
        model = without_classifier(spec.library, build(spec.library, spec.architecture))
    try:
        absent = model.load_state_dict(state, strict=False).missing_keys
        # A pooler, where the architecture has one, is trained for another task and is not kept.
        fatal = [name for name in absent if not (spec.modality == "text" and name.startswith("pooler."))]
    except RuntimeError as error:  # other shapes
        fatal = str(error).splitlines()[1:]
    if fatal:
        what = f"the installed {spec.library} builds another {spec.architecture} than the weights are for"
        raise _bad(what, path, *fatal[:5])
    return model.eval().requires_grad_(False), spec


def build(library: str, architecture: str) -> nn.Module:
    """The whole architecture with random weights.

    Raises:
        HeadstartError: the library has none of this name. Only names are looked up: the libraries would
            themselves take some for an address on the network.
    """
    if library == "timm":
        import timm

        known, name = timm.list_models(), architecture.partition(".")[0]  # it may end in .tag
        if name in known:
            try:
                network: nn.Module = timm.create_model(architecture, pretrained=False)
                return network
            except RuntimeError:  # no such tag
                known = timm.list_pretrained(f"{name}.*")
    else:
        from torchvision import models

        known = models.list_models(module=models)  # classifiers alone
        if architecture in known:
            network = models.get_model(architecture, weights=None)
            if hasattr(network, "transform_input"):  # GoogLeNet and Inception: on with pretrained weights
                network.transform_input = True  # type: ignore[assignment]
            return network
    raise HeadstartError(
        f"{library} has no architecture {architecture!r}",
        where="fetch.backbone",
        table=[f"did you mean {name}?" for name in get_close_matches(architecture, known, n=3)],
        do="take one of its names",
    )


def without_classifier(library: str, network: nn.Module) -> nn.Module:
    """The network with its last layer taken off, so that it returns what the classifier would be given.

    In training as well: what else learned to classify is taken off too.

    Raises:
        HeadstartError: its last layer is not a linear one.
    """
    from torch import nn

    if library == "timm":
        network.reset_classifier(0)  # type: ignore[operator]
        return network
    # GoogLeNet and Inception in training give what their auxiliary classifiers say as well.
    for name, off in (("aux_logits", False), ("aux1", None), ("aux2", None), ("AuxLogits", None)):
        if hasattr(network, name):
            setattr(network, name, off)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:  # SqueezeNet
        what = f"{type(network).__name__} has no linear classifier to take off"
        raise HeadstartError(what, where="fetch.backbone", do="take another architecture")
    parent, _, child = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network


def transformer(folder: Path) -> nn.Module:
    """The architecture of a config.json, float32 with random weights.

    Raises:
        HeadstartError: transformers does not know it. Code that comes with a model is never run.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        network: nn.Module = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # a config may say anything
        raise HeadstartError(
            "transformers cannot build what config.json describes",
            where="config.json",
            table=str(error).splitlines()[:2],
            do="take a model of an architecture that transformers itself holds",
        ) from error
    return network
