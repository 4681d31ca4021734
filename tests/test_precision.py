from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headstart import precision
from headstart.precision import Arithmetic, choose, converted, folded


class Network(nn.Module):
    """Convolutions with BatchNorm that sees only small differences between nearly constant pictures."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [3, *[16] * depth]
        self.layers = nn.Sequential()
        for i, (before, after) in enumerate(pairwise(widths)):
            self.layers.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(after))
            if i < depth - 1:
                self.layers.append(nn.ReLU())
        self.train()
        with torch.no_grad():
            for _ in range(20):
                self(pictures(32))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x).mean(dim=(2, 3))
        return found


def pictures(count: int, seed: int | None = None) -> Tensor:
    chance = torch.Generator().manual_seed(seed) if seed is not None else None
    return 1 + 0.02 * torch.randn(count, 3, 16, 16, generator=chance)


def worst(expected: Tensor, found: Tensor) -> float:
    return float(torch.cosine_similarity(expected, found.float(), dim=1).min())


def test_folding_leaves_no_batchnorm_and_the_same_vectors() -> None:
    network, x = Network(), pictures(8, 1)
    simple = folded(network, pictures(1, 0))
    assert not [module for module in simple.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    torch.testing.assert_close(simple(x), network(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_unfolding_gives_the_names_of_the_network_and_its_outputs(bias: bool) -> None:
    network = Network()
    if bias:
        for module in network.layers:
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.randn(16), requires_grad=False)
    for module in network.layers:
        if isinstance(module, nn.BatchNorm2d):
            for factors in (module.weight, module.bias):
                factors.data = torch.randn(16)
    x = pictures(8, 1)
    found = precision.pairs(network, x)
    assert len(found) == 4
    state = precision.unfolded(precision.fold(network, found).state_dict(), network, found)
    again = Network()
    again.layers = copy.deepcopy(network.layers)
    for value in again.state_dict().values():
        value.fill_(3)  # all of it has to come from what is unfolded
    again.load_state_dict(state)
    assert state.keys() == network.state_dict().keys()
    torch.testing.assert_close(again(x), network(x), rtol=1e-3, atol=1e-4)


def test_a_convolution_that_feeds_something_else_too_is_not_folded() -> None:
    class Both(Network):
        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[0](x)
            return torch.cat([self.layers[1](first), first], dim=1).mean(dim=(2, 3))

    network = Both()
    assert folded(network, pictures(1, 0)) is network


def test_a_network_without_batchnorm_is_left_alone() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    assert folded(network, pictures(1, 0)) is network


def test_layers_that_stay_exact_keep_every_bit_of_their_weights() -> None:
    simple = folded(Network(), pictures(1, 0))
    names = [name for name, module in simple.named_modules() if isinstance(module, nn.Conv2d)]
    coarse = converted(copy.deepcopy(simple), Arithmetic("bfloat16", tuple(names[:2])))
    for name in names:
        before, after = (network.get_submodule(name).weight for network in (simple, coarse))
        assert torch.equal(before, after) == (name in names[:2])
        assert after.dtype == (torch.float32 if name in names[:2] else torch.bfloat16)
    assert coarse(pictures(4, 1)).dtype == torch.bfloat16


def test_corrected_biases_bring_bfloat16_nearer_to_float32() -> None:
    simple = folded(Network(), pictures(1, 0))
    calibration, x = (pictures(32, 1),), pictures(32, 2)
    _, means = precision._layer_means(simple, calibration)
    plain = converted(copy.deepcopy(simple), Arithmetic("bfloat16"))
    better = converted(copy.deepcopy(simple), Arithmetic("bfloat16"))
    biases = precision._corrected(better, calibration, means, Arithmetic("bfloat16"))
    assert worst(simple(x), better(x)) > worst(simple(x), plain(x))
    again = converted(copy.deepcopy(simple), Arithmetic("bfloat16", (), biases))
    assert torch.equal(again(x), better(x))


def test_what_is_chosen_agrees_on_every_row_that_was_checked() -> None:
    simple = folded(Network(), pictures(1, 0))
    check = (pictures(32, 3),)
    chosen = choose(simple, [torch.bfloat16], (pictures(32, 1),), check)
    coarse = converted(copy.deepcopy(simple), chosen)
    assert worst(simple(*check), coarse(*check)) >= precision.AGREEMENT


def test_where_nothing_coarse_agrees_float32_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "AGREEMENT", 2)
    simple = folded(Network(), pictures(1, 0))
    x = (pictures(8, 1),)
    assert choose(simple, [torch.bfloat16, torch.float16], x, x) == Arithmetic()


def test_values_that_float16_cannot_hold_agree_with_nothing() -> None:
    class Large(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = super().forward(x) * 1e6
            return found

    network, x = Large(4, 4), (torch.rand(8, 4) + 1,)
    assert choose(network, [torch.float16], x, x) == Arithmetic()


def test_the_same_arithmetic_is_the_same_bytes_and_comes_back(tmp_path: Path) -> None:
    given = Arithmetic("bfloat16", ("a", "b"), {"c": torch.rand(5), "d": torch.rand(3)})
    for name in ("one", "two"):
        given.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = Arithmetic.load(tmp_path / "one")
    assert (found.dtype, found.exact) == (given.dtype, given.exact)
    assert all(torch.equal(found.biases[name], bias) for name, bias in given.biases.items())


def test_token_ids_are_never_cast() -> None:
    network = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    found = converted(network, Arithmetic("bfloat16"))(torch.tensor([[1, 2]]))
    assert found.dtype == torch.bfloat16
