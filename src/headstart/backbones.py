"""Backbones: pretrained networks without their classifier, built from safetensors and a spec.

Goes in: a folder that the stage ``fetch`` wrote. Comes out: a network in evaluation mode. Never fetches
anything, and knows nothing about the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headstart.errors import HeadstartError

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]


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
            HeadstartError: there is none.
        """
        try:
            return cls(**json.loads((weights / "spec.json").read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise HeadstartError(
                "the backbone is missing",
                where=str(error.filename),
                do=f"run `dvc repro fetch@{weights.name}`",
            ) from None


def load(weights: Path) -> tuple[nn.Module, Spec]:
    """The network of a folder that ``fetch`` wrote, float32, in evaluation mode, without gradients.

    An image network maps float [n, 3, side, side] to its pooled output [n, dim]; a text network is the
    ``transformers`` model itself.
    """
    from safetensors.torch import load_file

    spec = Spec.read(weights)
    state = load_file(weights / "weights.safetensors")
    if spec.library == "transformers":
        model = transformer(weights)
        # A pooler, where the architecture has one, is trained for another task and is not kept.
        absent = model.load_state_dict(state, strict=False).missing_keys
        fatal = [name for name in absent if not name.startswith("pooler.")]
    else:
        model = without_classifier(spec.library, build(spec.library, spec.architecture))
        fatal = model.load_state_dict(state, strict=False).missing_keys
    if fatal:
        raise HeadstartError(
            f"the installed {spec.library} builds another {spec.architecture} than the weights are for",
            where=str(weights),
            table=fatal[:5],
            do=f"install what requirements.lock names, or run `dvc repro -f fetch@{weights.name}`",
        )
    return model.eval().requires_grad_(False), spec


def build(library: str, architecture: str) -> nn.Module:
    """The whole architecture with random weights."""
    try:
        if library == "timm":
            import timm

            network: nn.Module = timm.create_model(architecture, pretrained=False)
        else:
            import torchvision

            network = torchvision.models.get_model(architecture, weights=None)
    except (RuntimeError, ValueError) as error:  # what the two libraries raise for an unknown name
        raise HeadstartError(
            f"{library} has no architecture {architecture!r}",
            where="fetch.backbone",
            table=_similar(library, architecture),
            do="take one of its names",
        ) from error
    return network


def _similar(library: str, architecture: str) -> list[str]:
    import difflib

    if library == "timm":
        import timm

        known = timm.list_models()
    else:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
    near = difflib.get_close_matches(architecture, known, n=3)
    return [f"did you mean {name}?" for name in near]


def without_classifier(library: str, network: nn.Module) -> nn.Module:
    """The network with its last layer taken off, so that it returns what the classifier would be given."""
    from torch import nn

    if library == "timm":
        network.reset_classifier(0)  # type: ignore[operator]
        return network
    name = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network


def transformer(folder: Path) -> nn.Module:
    """The architecture of a config.json with random weights."""
    from transformers import AutoConfig, AutoModel

    network: nn.Module = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return network
