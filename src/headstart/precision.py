"""Precision: the coarsest arithmetic in which a frozen network still says what it says in float32.

Goes in: a network in float32 and a few batches of what it will see. Comes out: an ``Arithmetic``, and the
network converted to it. Never changes weights on the disk, and never looks at a label.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from headstart import devices

# Vectors of one row in two arithmetics agree if the cosine between them is at least this.
AGREEMENT = 0.9993
# So many of the first layers are tried in float32. Early on a picture is nearly constant and its differences
# are what counts: weights that should add up to zero no longer do when rounded. Later layers bear rounding.
FIRST_LAYERS = (0, 1, 2, 3, 4, 6, 10, 20)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Arithmetic:
    """How a network computes: in one dtype throughout, but for some layers and some biases.

    Args:
        dtype: name of a torch dtype.
        exact: names of layers that stay in float32.
        biases: by layer, float32 biases in place of the network's own. Rounding weights moves what a layer
            returns by the same amount for almost any input; its bias can take that back (Nagel et al. 2019,
            "Data-free quantization through weight equalization and bias correction").
    """

    dtype: str = "float32"
    exact: tuple[str, ...] = ()
    biases: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        from safetensors.torch import save_file

        # One entry: safetensors writes several in an order of its own, a new one each time.
        said = {"arithmetic": json.dumps({"dtype": self.dtype, "exact": self.exact})}
        save_file({name: bias.contiguous() for name, bias in self.biases.items()}, path, metadata=said)

    @classmethod
    def load(cls, path: Path) -> Arithmetic:
        """Read what ``save`` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["arithmetic"])
            biases = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        return cls(said["dtype"], tuple(said["exact"]), biases)


def choose(
    network: nn.Module,
    dtypes: Sequence[torch.dtype],
    calibration: Inputs,
    check: Inputs,
) -> Arithmetic:
    """The first of the ``dtypes``, with the fewest exceptions, that agrees with float32 on every row checked.

    Args:
        network: float32, folded; maps a batch to vectors [rows, dim]; it is not changed.
        dtypes: fastest first.
        calibration: one batch, to measure by how much biases have to be corrected.
        check: another batch, to judge by.
    """
    with torch.inference_mode():
        expected = _vectors(network, check)
        layers, means = _layer_means(network, calibration)
        for dtype in dtypes:
            name = devices.name_of(dtype)
            if _agree(expected, _vectors(converted(copy.deepcopy(network), Arithmetic(name)), check)):
                return Arithmetic(name)
            for first in (n for n in FIRST_LAYERS if n < len(layers)):
                exact = Arithmetic(name, tuple(layers[:first]))
                found = converted(copy.deepcopy(network), exact)
                arithmetic = Arithmetic(name, exact.exact, _corrected(found, calibration, means, exact))
                if _agree(expected, _vectors(found, check)):
                    return arithmetic
    return Arithmetic()


def converted(network: nn.Module, arithmetic: Arithmetic) -> nn.Module:
    """The network itself, computing as ``arithmetic`` says; each layer casts its input to its own dtype."""
    dtype = getattr(torch, arithmetic.dtype)
    if dtype == torch.float32:
        return network
    for name, module in network.named_modules():
        if name not in arithmetic.exact:
            for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                own.data = own.data.to(dtype) if own.is_floating_point() else own.data
        if name in arithmetic.biases:
            module.bias = nn.Parameter(arithmetic.biases[name].to(dtype), requires_grad=False)
        if next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(_cast)
    return network


def folded(network: nn.Module, example: Tensor) -> nn.Module:
    """The network with every BatchNorm that directly follows a convolution multiplied into it.

    A compiler can then fuse a convolution with its activation, and nothing is rounded between a convolution
    and its BatchNorm. Where nothing can be folded the network itself is returned.
    """
    named = pairs(network, example)
    return fold(network, named).requires_grad_(False) if named else network


def pairs(network: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of each convolution and of the BatchNorm that gets its output, seen by running ``example``.

    Should a convolution feed something else too, folding would change what the network says: then none.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    found: list[tuple[str, str]] = []

    def after(name: str, output: Tensor) -> None:
        made[id(output)] = (name, output)  # kept, so that no other tensor gets the same id

    def before(name: str, given: Any) -> None:
        if id(given[0]) in made:
            found.append((made[id(given[0])][0], name))

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hook = module.register_forward_hook(lambda m, given, output, name=name: after(name, output))
            handles.append(hook)
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(lambda m, given, name=name: before(name, given)))
    with torch.inference_mode():
        network(example)
    for handle in handles:
        handle.remove()
    with torch.inference_mode():
        same = torch.allclose(network(example), fold(network, found)(example), rtol=1e-3, atol=1e-4)
    return found if same else []


def fold(network: nn.Module, named: Sequence[tuple[str, str]]) -> nn.Module:
    """A copy of the network in which these BatchNorms are multiplied into these convolutions."""
    result = copy.deepcopy(network)
    with torch.no_grad():
        for convolution_name, norm_name in named:
            convolution: Any = result.get_submodule(convolution_name)
            norm: Any = result.get_submodule(norm_name)
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, *statistics
            )
            # timm's BatchNorm carries its activation with it.
            result.set_submodule(norm_name, getattr(norm, "act", None) or nn.Identity())
    return result


def unfolded(
    state: dict[str, Tensor], network: nn.Module, named: Sequence[tuple[str, str]]
) -> dict[str, Tensor]:
    """The weights of a folded network under the names that ``network``, which is not folded, has for them.

    Each BatchNorm adds the bias of its convolution, and does nothing else.
    """
    found = {name: state.get(name, value) for name, value in network.state_dict().items()}
    for convolution_name, norm_name in named:
        norm: Any = network.get_submodule(norm_name)
        bias = state[f"{convolution_name}.bias"]
        if f"{convolution_name}.bias" in found:
            found[f"{convolution_name}.bias"] = torch.zeros_like(bias)
        found |= {
            f"{norm_name}.weight": torch.ones_like(bias),
            f"{norm_name}.bias": bias,
            f"{norm_name}.running_mean": torch.zeros_like(bias),
            f"{norm_name}.running_var": torch.full_like(bias, 1 - norm.eps),
        }
    return found


def _vectors(network: nn.Module, inputs: Inputs) -> Tensor:
    """The vectors of a batch, computed in parts that stay in a CPU's caches."""
    parts = zip(*(torch.split(tensor, 8) for tensor in inputs), strict=True)
    return torch.cat([network(*part) for part in parts])


def _agree(expected: Tensor, found: Tensor) -> bool:
    """Whether every row's cosine is large enough; what is not finite agrees with nothing."""
    return bool((torch.cosine_similarity(expected.float(), found.float(), dim=1) >= AGREEMENT).all())


def _layer_means(network: nn.Module, inputs: Inputs) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the layers in the order they run, and the mean of each one's outputs per channel."""
    means: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        means.setdefault(name, _channel_means(module, output))

    with _watched(network, note):
        network(*inputs)
    return list(means), means


def _corrected(
    network: nn.Module,
    inputs: Inputs,
    means: dict[str, Tensor],
    arithmetic: Arithmetic,
) -> dict[str, Tensor]:
    """Biases that give each layer of a converted network its float32 means, set in it and returned.

    One pass: what a corrected layer returns is what the next one sees.
    """
    biases: dict[str, Tensor] = {}

    def correct(name: str, module: Any, output: Tensor) -> Tensor | None:
        if module.bias is None or name in biases or name in arithmetic.exact:
            return None
        error = means[name] - _channel_means(module, output)
        biases[name] = module.bias.float() + error
        module.bias = nn.Parameter(biases[name].to(module.bias.dtype), requires_grad=False)
        shape = [1] * output.ndim
        shape[_channel(module)] = -1
        return (output.float() + error.view(shape)).to(output.dtype)

    with _watched(network, correct):
        network(*inputs)
    return biases


@contextmanager
def _watched(network: nn.Module, hook: Callable[[str, nn.Module, Tensor], Any]) -> Iterator[None]:
    """Call ``hook`` with name, module and output of every layer that runs."""
    handles = [
        module.register_forward_hook(lambda module, given, output, name=name: hook(name, module, output))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _channel_means(module: nn.Module, output: Tensor) -> Tensor:
    """float32 [channels]."""
    return output.float().transpose(_channel(module), -1).flatten(0, -2).mean(dim=0)


def _cast(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first input in the module's own dtype; whole numbers, such as token ids, stay what they are."""
    first, *others = given
    if isinstance(first, Tensor) and first.is_floating_point():
        first = first.to(next(module.parameters(recurse=False)).dtype)
    return (first, *others)
