"""Classifiers: a backbone and a head as one network that can be trained.

Goes in: the backbone of ``fetch`` and, if there is one, a head fitted to its frozen features. Comes out: a
network from inputs to logits, and, once trained, a backbone folder and a head like those it was made from.
Never sees a label.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart import alignment, backbones, devices, features, precision
from headstart.errors import HeadstartError
from headstart.heads import Head
from headstart.layout import REGISTERED, sha256_of
from headstart.normalisation import NORMS
from headstart.recipe import Features, Train

SCALING = (*NORMS, nn.GroupNorm, nn.LayerNorm)  # they end in a scale and a shift


class Classifier(nn.Module):
    """Logits float32 [n, classes] of a batch: the backbone's vectors, standardised, and a linear head.

    Args:
        weights: a folder that ``fetch`` wrote.
        options: which layers to tap, and at what size.
        choices: what is frozen, and how much is dropped out.
        classes: how many there are.
        head: to start from; without one the head is random and takes the vectors as they are.

    Raises:
        HeadstartError: the backbone is missing, or has no such layers.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, weights: Path, options: Features, choices: Train, classes: int, head: Head | None = None
    ) -> None:
        super().__init__()
        network, self.spec = backbones.load(weights)
        self.weights, self.choices = weights, choices
        self.padding = backbones.padding(network)
        self.folds: list[tuple[str, str]] = []
        network = self._quickened(network, options)
        self.tapped = features.Tapped(network, self.spec, options.layers, options.views)
        called, used, dim = self._probed(features.blank_rows(self.spec, options))
        self.dropout = nn.Dropout(choices.dropout)
        self.linear = nn.Linear(dim, classes)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        if head is not None:
            for own, given in (
                (self.linear.weight, head.weight),
                (self.linear.bias, head.bias),
                (self.mean, head.mean),
                (self.scale, head.scale),
            ):
                own.data = torch.from_numpy(given.copy())
        self.linear.requires_grad_(choices.source_free is None)
        names = [name for name, _ in network.named_modules()]
        last = self._last_frozen(names)
        self.frozen = self._freeze(last, called, used)
        if choices.lora:
            self._adapt(choices.lora, called)
        if choices.source_free == "entropy" and not any(self.trained()):
            raise HeadstartError(
                f"{self.spec.architecture} has no normalisation to train",
                where="train.source_free",
                do="take hypothesis_transfer",
            )
        self.discriminator: alignment.Discriminator | None = None
        if choices.alignment in alignment.ADVERSARIAL:
            conditional = choices.alignment == "conditional_adversarial"
            self.discriminator = alignment.Discriminator(dim, classes=classes if conditional else None)
        self.known: Tensor | None = None
        self.prefix = _outermost(network, set(names[: last + 1]), called, used)
        for module in self.prefix:
            module.forward = partial(self._passed, module.forward)

    def _passed(self, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """What a frozen layer does: nothing, if what the last of them makes of the batch is known."""
        return forward(*given, **named) if self.known is None else self.known

    def splits(self) -> bool:
        """Whether the frozen layers can run apart from the others: once, none but the last tapped."""
        if not self.prefix or self.tapped.views > 1:
            return False
        skipped = {part for module in self.prefix for part in module.modules()} - {self.prefix[-1]}
        network = self.tapped.network
        return not any(network.get_submodule(layer) in skipped for layer in self.tapped.layers or ())

    def frozen_output(self, *inputs: Tensor) -> Tensor:
        """What the last frozen layer makes of a batch."""
        found: list[Any] = []

        def stop(module: nn.Module, given: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        handle = self.prefix[-1].register_forward_hook(stop, prepend=True)
        self.eval()
        try:
            with torch.no_grad(), suppress(_Reached):
                self.tapped(*inputs)
        finally:
            handle.remove()
        output: Tensor = found[0]
        return output

    def _probed(self, blank: tuple[Tensor, ...]) -> tuple[set[nn.Module], set[nn.Parameter], int]:
        """The modules called on the way to the vectors, the parameters these depend on, and their dimensions.

        It ends at the last layer wanted. Neither tells of the other: attention may take the weights of a
        layer that it never calls, and what a pooler returns goes nowhere.
        """
        network, called = self.tapped.network, set[nn.Module]()
        handles = [
            module.register_forward_pre_hook(lambda module, given: called.add(module))
            for module in network.modules()
        ]
        parameters = list(network.requires_grad_(True).parameters())
        vectors = self.tapped(*blank)
        gradients = torch.autograd.grad(vectors.sum(), parameters, allow_unused=True)
        network.requires_grad_(False)
        for handle in handles:
            handle.remove()
        used = {p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        return called, used, vectors.shape[1]

    def _quickened(self, network: nn.Module, options: Features) -> nn.Module:
        """The same network in the form in which it trains fastest."""
        if self.spec.modality == "image":
            network = network.to(memory_format=torch.channels_last)
            side = features.side_of(self.spec, options)
            if not self.choices.follows_batches and features.foldable(network, options.layers):
                # Frozen, it is a multiplication that the convolution before it can do: a fifth of a step.
                self.folds = precision.pairs(network, torch.zeros(1, 3, side, side))
                network = precision.fold(network, self.folds)
        elif devices.device().type == "cpu":
            from headstart import attention  # imports transformers

            attention.shorten(network)
        if self.choices.backbone_dropout is not None:
            _drop_out(network, self.choices.backbone_dropout)
        return network

    def _freeze(self, last: int, called: set[nn.Module], used: set[nn.Parameter]) -> set[nn.Module]:
        """Let all that is used learn, but for what comes up to place ``last``; return what does not learn."""
        # Up to the end of the layer named: networks register their layers in the order they run.
        network, scales_alone = self.tapped.network, self.choices.source_free == "entropy"
        frozen = {module for module in network.modules() if module not in called}
        for place, (_, module) in enumerate(network.named_modules()):
            if place > last and (isinstance(module, SCALING) or not scales_alone):
                for parameter in used.intersection(module.parameters(recurse=False)):
                    parameter.requires_grad_(True)
        for module in network.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                frozen.update(module.modules())  # dropout has no parameters of its own
        return frozen

    def _last_frozen(self, names: list[str]) -> int:
        layer = self.choices.freeze
        if layer is None:
            return -1
        inside = [place for place, name in enumerate(names) if f"{name}.".startswith(f"{layer}.")]
        if not inside:
            raise HeadstartError(
                f"{self.spec.architecture} has no layer {layer}",
                where="train.freeze",
                table=[f"did you mean {near}?" for near in get_close_matches(layer, names, n=3)],
                do="name one of its layers",
            )
        return inside[-1]

    def _adapt(self, rank: int, called: set[nn.Module]) -> None:
        """Put low-rank additions beside the linear layers, and train nothing else of the backbone.

        Not beside those of which only the weights are taken: what stands beside them would never run.
        """
        from peft import LoraConfig, inject_adapter_in_model

        network = self.tapped.network
        wanted = [
            name
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad and module in called
        ]
        if not wanted:
            raise HeadstartError(
                f"{self.spec.architecture} has no linear layer left for low-rank additions",
                where=f"train.lora; train.freeze: {self.choices.freeze}",
                do="name an earlier layer in train.freeze, or leave train.lora out",
            )
        network.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=wanted), network)

    def train(self, mode: bool = True) -> Classifier:
        """Training mode, but for what is frozen: its statistics stay, and nothing of it drops out."""
        super().train(mode)
        for module in self.modules():
            if module in self.frozen or (isinstance(module, NORMS) and not self.choices.follows_batches):
                module.training = False
        return self

    def forward(
        self, *inputs: Tensor, known: Tensor | None = None, both: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of one batch: pixels uint8 or float32 [n, side, side, c]; or ids, mask int64 [n, tokens].

        With ``known``, what ``frozen_output`` made of the batch, the frozen layers do not run. With
        ``both``, the vectors [n, d] as the head takes them come before the logits.
        """
        vectors = (self.features(*inputs, known=known) - self.mean) / self.scale
        logits: Tensor = self.linear(self.dropout(vectors)).float()
        return (vectors, logits) if both else logits

    def features(self, *inputs: Tensor, known: Tensor | None = None) -> Tensor:
        """The backbone's vectors [n, d] of one batch."""
        self.known = known
        try:
            vectors: Tensor = self.tapped(*inputs)
        finally:  # lest every later batch be taken for this one
            self.known = None
        return vectors

    def normalises(self) -> bool:
        """Whether there is a BatchNorm, be it folded."""
        return bool(self.folds) or any(isinstance(module, NORMS) for module in self.modules())

    def fresh(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that did not come with the backbone, and learn at the head's rate."""
        for module in (self.linear, self.discriminator):
            if module is not None:
                yield from (named for named in module.named_parameters() if named[1].requires_grad)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The backbone's parameters that are trained, in the order in which the network runs."""
        return (
            (name, parameter)
            for name, parameter in self.tapped.network.named_parameters()
            if parameter.requires_grad
        )

    def changing(self) -> dict[str, Tensor]:
        """All tensors that training changes, by name: parameters, and statistics that are updated."""
        found: dict[str, Tensor] = {
            name: parameter.data for name, parameter in self.named_parameters() if parameter.requires_grad
        }
        for name, module in self.following():
            found |= {f"{name}.{key}": value for key, value in module.named_buffers()}
        return found

    def following(self) -> Iterator[tuple[str, nn.Module]]:
        """The BatchNorm layers that standardise by the batch at hand, by name."""
        for name, module in self.named_modules() if self.choices.follows_batches else ():
            if isinstance(module, NORMS) and module not in self.frozen:
                yield name, module

    def save(self, folder: Path) -> None:
        """Write ``head.safetensors`` and ``backbone/``, which is like a folder that ``fetch`` wrote."""
        from safetensors.torch import save_file

        network = self.tapped.network
        if self.choices.lora:
            _merge(network)
        state = network.state_dict()
        if self.folds:
            state = precision.unfolded(state, backbones.load(self.weights)[0], self.folds)
        state = {
            name: value.detach().cpu().contiguous()
            for name, value in state.items()
            if not name.startswith("pooler.")
        }
        backbone = folder / "backbone"
        mine = shutil.ignore_patterns("weights.safetensors", REGISTERED)
        shutil.copytree(self.weights, backbone, ignore=mine)
        save_file(state, backbone / "weights.safetensors")
        replace(self.spec, sha256=sha256_of(backbone / "weights.safetensors")).write(backbone)
        self.head().save(folder / "head.safetensors")

    def head(self) -> Head:
        """The head as it is now."""
        parts = (self.linear.weight, self.linear.bias, self.mean, self.scale)
        return Head(*(part.detach().float().cpu().numpy().copy() for part in parts))


def _drop_out(network: nn.Module, share: float) -> None:
    """Let each ``nn.Dropout`` leave out this share; if it is 0, let nothing else drop out either.

    Otherwise what else there is stays as it came: whole branches (``p`` of torchvision's StochasticDepth,
    ``drop_prob`` of timm's DropPath), whose rates grow with depth, and numbers that a network hands to a
    function (``attention_dropout`` of some transformers).
    """
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        elif not share:
            kind = type(module).__name__
            dropping = "Drop" in kind or kind == "StochasticDepth"
            for name, value in list(vars(module).items()):
                if isinstance(value, float) and ("drop" in name or (name == "p" and dropping)):
                    setattr(module, name, 0.0)


class _Reached(Exception):  # noqa: N818  # it is no error
    """The last frozen layer has run."""


def _outermost(
    module: nn.Module,
    frozen: set[str],
    called: set[nn.Module],
    used: set[nn.Parameter],
    inside: str = "",
) -> list[nn.Module]:
    """The largest modules that are called and of which all that is used is frozen, in the order they run."""
    found = []
    for name, child in module.named_children():
        path = f"{inside}{name}"
        parts = {
            f"{path}.{part}".rstrip(".")
            for part, each in child.named_modules()
            if each in called or not used.isdisjoint(each.parameters(recurse=False))
        }
        if child in called and parts <= frozen:
            found.append(child)
        else:
            found += _outermost(child, frozen, called, used, f"{path}.")
    return found


def _merge(network: nn.Module) -> None:
    """Add the low-rank additions to the weights they stand beside, and take them away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            adapted: Any = module
            adapted.merge()
            network.set_submodule(name, adapted.get_base_layer())
