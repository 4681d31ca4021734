"""Feature extraction against the plain way: fp32, eager, batch 32, text padded to 128 tokens.

Run it with `make bench-features`, after `make demo` has brought data and weights. Both ways start from the
same files and sentences and end with the same vectors (the smallest cosine between them is printed); they
take turns, so that a machine that slows down slows both. Start-up, paid once per run, is shown apart.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image
from results import keep
from safetensors.torch import save_file
from tokenizers import Tokenizer

from headstart import backbones, environment
from headstart.features import Extractor, arithmetic_for
from headstart.fetching import fetch
from headstart.layout import Layout
from headstart.recipe import Features, Recipe

BATCH, TOKENS, ROUNDS = 32, 128, 3
PICTURES, SENTENCES = 320, 4096
ROOT = environment.project_root(Path(__file__).parent)
Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Plain:
    """The plain way: a few lines, as tutorials have them."""

    def __init__(self, weights: Path) -> None:
        self.network, self.spec = backbones.load(weights)
        if self.spec.modality == "text":
            self.tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
            self.tokenizer.enable_truncation(TOKENS)
            self.tokenizer.enable_padding(length=TOKENS)

    def read(self, items: list[Any]) -> list[tuple[torch.Tensor, ...]]:
        """Batches of what the network takes."""
        parts = [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
        if self.spec.modality == "image":
            return [(torch.stack([self.picture(path) for path in part]),) for part in parts]
        encoded = [self.tokenizer.encode_batch(part) for part in parts]
        return [
            (torch.tensor([e.ids for e in part]), torch.tensor([e.attention_mask for e in part]))
            for part in encoded
        ]

    def picture(self, path: Path) -> torch.Tensor:
        """One picture as normalised float32 [3, side, side]."""
        said = self.spec.preprocessing
        side, filter_ = said["image_size"], Image.Resampling[said["interpolation"].upper()]
        pixels = np.array(Image.open(path).convert("RGB").resize((side, side), filter_))
        mean, std = (torch.tensor(said[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        """Vectors of one batch."""
        with torch.inference_mode():
            if self.spec.modality == "image":
                return self.network(*batch)
            ids, mask = batch
            tokens = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
            return (tokens * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def __call__(self, items: list[Any]) -> Vectors:
        """Vectors of all items."""
        return torch.cat([self.forward(*batch) for batch in self.read(items)]).numpy()


def resnet18(folder: Path) -> Path:
    """A ResNet-18 with random weights, through the project's own door."""
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18().state_dict(), folder / "resnet18.safetensors")
    recipe = Recipe.model_validate(
        {
            "ingest": {"source": "file:none"},
            "validate": {"adapter": "image_folder"},
            "fetch": {"backbone": "torchvision:resnet18", "source": f"file:{folder}/resnet18.safetensors"},
            "features": {},
            "train": {},
            "evaluate": {},
        }
    )
    layout = Layout(folder, "resnet18")
    fetch(recipe, layout)
    return layout.weights


def compare(name: str, weights: Path, items: list[Any]) -> dict[str, Any]:
    """Rows per second of each way: from files or sentences to vectors, and of the network alone."""
    start = time.perf_counter()
    options = Features(max_tokens=TOKENS)
    arithmetic = arithmetic_for(
        weights, options, lambda extractor, rows: extractor.reader([items[row] for row in rows]), len(items)
    )
    ours = Extractor(weights, options, arithmetic, compiled=True)
    ours(items)
    first = time.perf_counter() - start
    plain, eager = Plain(weights), Extractor(weights, options, arithmetic)
    reader = ours.reader(items)
    ready = {
        "plain": plain.read(items),
        "eager": [ours.tensors(reader.read(rows)) for rows in reader.batches],
        "ours": [ours.tensors(reader.read(rows)) for rows in reader.batches],
    }
    seconds: dict[str, list[float]] = {}
    vectors = {}
    for _ in range(ROUNDS):
        for way, extract in {"plain": plain, "eager": eager, "ours": ours}.items():
            start = time.perf_counter()
            vectors[way] = extract(items)
            seconds.setdefault(way, []).append(time.perf_counter() - start)
            start = time.perf_counter()
            for batch in ready[way]:
                extract.forward(*batch)
            seconds.setdefault(f"{way} network", []).append(time.perf_counter() - start)
    a, b = vectors["plain"], vectors["ours"]
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {
        "backbone": name,
        "rows": len(items),
        "arithmetic": arithmetic.dtype,
        **{f"{way} rows/s": len(items) / statistics.median(found) for way, found in seconds.items()},
        "speedup": ratio(seconds["plain network"], seconds["ours network"]),
        "end to end speedup": ratio(seconds["plain"], seconds["ours"]),
        "start-up s": first - statistics.median(seconds["ours"]),
        "cosine": float(cosine.min()),
    }


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    pictures = sorted((ROOT / "data/solar-cells/images").glob("*.png"))[::8][:PICTURES]
    manifest = ROOT / "manifest/sentiment/manifest.parquet"
    if not pictures or not manifest.exists():
        raise SystemExit("there are no data yet: run `make demo` first")
    sentences = pd.read_parquet(manifest)["text"].sample(SENTENCES, random_state=0).tolist()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            compare("efficientnet_lite0", ROOT / "weights/solar-cells", pictures),
            compare("resnet18", resnet18(Path(folder)), pictures),
            compare("minilm", ROOT / "weights/sentiment", sentences),
        ]
    print(
        f"{torch.get_num_threads()} threads, {ROUNDS} rounds, medians. network: without reading and resizing "
        "files or cutting texts;\neager: ours without torch.compile; cosine: the smallest of any row.\n"
    )
    table = pd.DataFrame(rows).set_index("backbone").T
    print(table.to_string(float_format="{:.4g}".format))
    figures = {
        f"{row['backbone']}_{re.sub('[^a-z]+', '_', column)}": round(value, 4)
        for row in rows
        for column, value in row.items()
        if isinstance(value, float)
    }
    keep("features", figures)


if __name__ == "__main__":
    main()
