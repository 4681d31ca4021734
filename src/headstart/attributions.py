"""Attributions: which words of a text, or which places of an image, speak for a label.

Goes in: a loaded model, texts or images, and a label for each. Comes out: scored words, or a map. Never
changes the model, and never decides what the label is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart import mojibake, texts
from headstart.errors import HeadstartError
from headstart.metrics import Floats

if TYPE_CHECKING:
    from torch import Tensor

    from headstart.features import Item
    from headstart.heads import Singles
    from headstart.models import Model

STEPS = 32  # points of the quadrature: the sum is within 1% of what it should be
TOKENS_PER_BATCH, IMAGES_PER_BATCH = 2048, 8  # through the network at a time, forwards and backwards
BLUR = 1 / 56  # deviation of the blur over a map, as a share of its side: the places of 4 pixels in 224
MARKS = re.escape('!"#$%&()*+,./:;<=>?@[\\]^_`{|}~…—–“”„«»¡¿。，！？、')  # noqa: RUF001
IDEOGRAPHS = "\u2e80-\u9fff\uf900-\ufaff"  # written without blanks between words
WORDS = re.compile(rf"\s+|[{MARKS}]+\s*|[{IDEOGRAPHS}]\s*|[^\s{MARKS}{IDEOGRAPHS}]+\s*")


@dataclass(frozen=True)
class Attribution:
    """What of one item speaks for a label.

    Args:
        label: the class that is spoken for.
        words: of a text: its words in order, with the blanks that follow them, so that joined they are the
            text; and a score from -1, against the label, to 1, for it. The largest is 1 or -1. What lies
            beyond the tokens that the network reads is the last of them, in one piece, with 0.
        map: of an image: float32 [side, side], 0 to 1, large where it matters for the label; the side is
            that of the pixels the network sees.
    """

    label: str
    words: list[tuple[str, float]] = field(default_factory=list)
    map: Singles | None = None


def attribute(model: Model, items: Sequence[Item], labels: Sequence[str]) -> list[Attribution]:
    """What of each item speaks for its label; to ask again and again, keep an ``Explainer``.

    Raises:
        HeadstartError: a label that the model does not know, or an item that it cannot read.
    """
    return Explainer(model)(items, labels)


class Explainer:
    """The model once more, in float32 and with gradients: the one that serves is folded, rounded and without.

    What is explained is a label's logit less the mean of the other labels': of two classes, the log-odds. A
    head is linear, so this is linear in the backbone's vectors.

    **Texts**: integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365; by captum) on the embeddings
    of the tokens, from a text that has padding in place of every word. The scores of all words sum to the
    difference between the two texts.

    **Images**: class activation maps (Zhou et al. 2016, arXiv:1512.04150), of every layer that is tapped. The
    vectors are means over places, so each place has its own share of what the head says: no approximation,
    and one forward pass. Shares count from the mean of the rows that the head was fitted to. On solar cells,
    integrated gradients of the pixels are a speckle over the whole cell; covering one square after the other
    shows squares, after a hundred passes; this shows the crack. A network whose vectors are not means
    over places, such as a vision transformer, gets integrated gradients from a grey picture, blurred.
    """

    def __init__(self, model: Model) -> None:
        import torch

        from headstart import backbones, features

        # Hooks leave tensors on the way; and a picture is large while it is decoded.
        self.model, self.lock = model, Lock()
        extractor, head = model.extractor, model.head
        self.backbone, self.spec = backbones.load(extractor.weights)
        self.layers = extractor.options.layers
        self.cutter: Any = None
        if self.spec.modality == "text":
            from tokenizers import Tokenizer

            self.cutter = Tokenizer.from_file(str(extractor.weights / "tokenizer.json"))
            self.cutter.no_padding()
        self.tapped = features.Tapped(self.backbone, self.spec, self.layers).eval().to(extractor.device)
        others = len(model.classes) - 1
        contrast = np.eye(len(model.classes)) * (1 + 1 / others) - 1 / others
        self.weight, self.bias, self.mean = (
            torch.from_numpy(array.astype(np.float32)).to(extractor.device)
            for array in (contrast @ head.weight / head.scale, contrast @ head.bias, head.mean)
        )

    def __call__(self, items: Sequence[Item], labels: Sequence[str]) -> list[Attribution]:
        """What of each item speaks for its label, in the order of the items."""
        classes, extractor = self.model.classes, self.model.extractor
        if unknown := sorted(set(labels) - set(classes)):
            raise HeadstartError(
                f"the model knows no {', '.join(map(repr, unknown))}",
                do=f"its classes are {', '.join(classes)}",
            )
        found = []
        for item, label in zip(items, labels, strict=True):
            target = classes.index(label)
            with self.lock:
                inputs = extractor.tensors(extractor.reader([item]).read(np.zeros(1, np.int64)))
                if isinstance(item, str):
                    ids, mask = inputs
                    read = mojibake.mended(item)
                    found.append(Attribution(label, words=self._words(read, self.tokens(ids, mask, target))))
                else:
                    found.append(Attribution(label, map=_legible(self.places(inputs[0], target))))
        return found

    def contrasts(self, *inputs: Tensor) -> Tensor:
        """Each logit less the mean of the others, float32 [n, classes], of one batch."""
        contrasts: Tensor = (self.tapped(*inputs) - self.mean) @ self.weight.T + self.bias
        return contrasts

    def tokens(self, ids: Tensor, mask: Tensor, target: int) -> Floats:
        """What each token adds to the contrast of a class, float64 [tokens]; 0 for the marks around a text.

        Args:
            ids: of one text, int64 [1, tokens].
            mask: 1 where there is a token, int64 [1, tokens].
            target: position of the class.
        """
        import torch
        from captum.attr import LayerIntegratedGradients

        marks = torch.tensor(self.cutter.encode("").ids, dtype=ids.dtype, device=ids.device)
        blank = ids.where(torch.isin(ids, marks), self.model.extractor.padding)
        embeddings: Any = self.backbone.get_input_embeddings()  # type: ignore[operator]
        scores = LayerIntegratedGradients(self.contrasts, embeddings).attribute(
            ids,
            blank,
            target,
            additional_forward_args=(mask,),
            n_steps=STEPS,
            internal_batch_size=max(1, TOKENS_PER_BATCH // ids.shape[1]),
        )
        return np.asarray(scores.detach().sum(dim=-1)[0].cpu().double())

    def places(self, pixels: Tensor, target: int) -> Floats:
        """What each place adds to the contrast of a class, float64 [side, side].

        The sum is the contrast without its bias; where gradients are integrated, less that of a grey picture.

        Args:
            pixels: of one image, [1, side, side, 3], 0 to 255.
            target: position of the class.
        """
        import torch
        from captum.attr import IntegratedGradients
        from torch.nn.functional import interpolate

        maps, side = self._maps(pixels), pixels.shape[1]
        if maps is None:
            grey = 255 * torch.tensor(self.spec.preprocessing["mean"]).to(pixels.device).expand_as(pixels)
            gradients = IntegratedGradients(self.contrasts).attribute(
                pixels.float(), grey, target, n_steps=STEPS, internal_batch_size=IMAGES_PER_BATCH
            )
            return np.asarray(gradients.sum(dim=-1)[0].cpu().double())
        shares = torch.zeros(side, side, dtype=torch.float64)  # on the CPU: Apple's GPUs have no float64
        start = 0
        for each in maps:
            channels = slice(start, start := start + each.shape[1])
            share = torch.einsum(
                "chw,c->hw", each[0] - self.mean[channels, None, None], self.weight[target, channels]
            )
            shares += interpolate(share.cpu().double()[None, None], (side, side), mode="bilinear")[0, 0]
        return np.asarray(shares) / side**2

    def _maps(self, pixels: Tensor) -> list[Tensor] | None:
        """The maps float32 [1, channels, h, w] whose means are the vector of an image, if there are such."""
        import torch

        network = dict(self.backbone.named_modules())
        caught: dict[str, Tensor] = {}

        def catch(name: str, module: Any, given: Any, output: Any) -> None:
            # What follows may change a tapped layer's output in place; the last one's is meant as it ends up.
            if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
                caught[name if self.layers else ""] = output.clone() if self.layers else output

        handles = [
            network[name].register_forward_hook(partial(catch, name), prepend=True)
            for name in self.layers or network
        ]
        try:
            with torch.no_grad():
                vectors = self.tapped(pixels)
        finally:
            for handle in handles:
                handle.remove()
        maps = [caught[name].float() for name in self.layers or [""] if name in caught]
        maps = [each if each.shape[2] == each.shape[3] else each.permute(0, 3, 1, 2) for each in maps]
        means = torch.cat([each.mean(dim=(2, 3)) for each in maps], dim=1) if maps else vectors[:, :0]
        exact = means.shape == vectors.shape and torch.allclose(means, vectors, rtol=1e-3, atol=1e-4)
        return maps if exact else None

    def _words(self, text: str, scores: Floats) -> list[tuple[str, float]]:
        """The words of a text, each with the sum of its tokens' scores; what was cut off has 0."""
        self.cutter.no_truncation()
        beginning = texts.beginning(text, len(scores), self.cutter)
        self.cutter.enable_truncation(len(scores))
        offsets = self.cutter.encode(beginning).offsets
        last = max((end for _, end in offsets), default=0)
        # Word by word no further than the network reads: a book has a million of them.
        words = [found[0] for found in takewhile(lambda word: word.start() < last, WORDS.finditer(text))]
        if rest := text[sum(map(len, words)) :]:
            words.append(rest)
        ends = np.cumsum([len(word) for word in words])
        sums = np.zeros(len(words))
        # A token may begin with the blank before its word, but ends where it does.
        for (start, end), score in zip(offsets, scores, strict=False):
            if end > start:
                sums[np.searchsorted(ends, end - 1, side="right")] += score
        largest = np.abs(sums).max(initial=0)
        return [(word, float(score)) for word, score in zip(words, sums / (largest or 1), strict=True)]


def _legible(shares: Floats) -> Singles:
    """Shares as a map for the eye: what speaks for the label, blurred, from 0 to 1."""
    from scipy.ndimage import gaussian_filter

    seen = gaussian_filter(shares, BLUR * len(shares)).clip(0)
    return (seen / (seen.max() or 1)).astype(np.float32)
