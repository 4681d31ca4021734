"""Feature extraction against the plain way: fp32, eager, batch 32, text padded to 128 tokens.

Run it with `make bench-features`, after `make demo` has brought data and weights. Both ways start from the
same files and sentences and end with the same vectors (the smallest cosine between them is printed); they
take turns, so that a machine that slows down slows both. Start-up, which is paid once per run, is shown apart.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer

from headstart import backbones, environment
from headstart.features import Extractor, arithmetic_for
from headstart.fetching import fetch
from headstart.layout import Layout
from headstart.recipe import Features, Recipe

BATCH, TOKENS, ROUNDS = 32, 128, 5
ROOT = environment.project_root(Path(__file__).parent)
RESULTS = Path(__file__).parent / "results"
Vectors = np.ndarray[Any, np.dtype[np.float32]]


def plain_images(weights: Path) -> Callable[[list[Path]], Vectors]:
    network, spec = backbones.load(weights)
    side = spec.preprocessing["image_size"]
    mean, std = (torch.tensor(spec.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    filter_ = Image.Resampling[spec.preprocessing["interpolation"].upper()]

    def load(path: Path) -> torch.Tensor:
        pixels = np.array(Image.open(path).convert("RGB").resize((side, side), filter_))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std

    def extract(paths: list[Path]) -> Vectors:
        with torch.inference_mode():
            parts = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
            return torch.cat([network(torch.stack([load(path) for path in part])) for part in parts]).numpy()

    return extract


def plain_texts(weights: Path) -> Callable[[list[str]], Vectors]:
    network, _ = backbones.load(weights)
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)

    def encode(texts: list[str]) -> torch.Tensor:
        encoded = tokenizer.encode_batch(texts)
        ids = torch.tensor([one.ids for one in encoded])
        mask = torch.tensor([one.attention_mask for one in encoded])
        tokens = network(input_ids=ids, attention_mask=mask).last_hidden_state
        return (tokens * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def extract(texts: list[str]) -> Vectors:
        with torch.inference_mode():
            return torch.cat([encode(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]).numpy()

    return extract


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


def rate(extract: Callable[[list[Any]], Vectors], items: list[Any]) -> tuple[float, Vectors]:
    """Rows per second, and the vectors."""
    start = time.perf_counter()
    vectors = extract(items)
    return len(items) / (time.perf_counter() - start), vectors


def compare(
    name: str, weights: Path, plain: Callable[[list[Any]], Vectors], items: list[Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    options = Features(max_tokens=TOKENS)
    arithmetic = arithmetic_for(weights, options, items)
    ours = Extractor(weights, options, arithmetic, compiled=True)
    ours(items)
    start_up = time.perf_counter() - start - len(items) / rate(ours, items)[0]
    eager = Extractor(weights, options, arithmetic)
    ways = {"plain": plain, "eager": eager, "ours": ours}
    for way in ways.values():
        way(items[:BATCH])
    rates: dict[str, list[float]] = {way: [] for way in ways}
    vectors = {}
    for _ in range(ROUNDS):
        for way, extract in ways.items():
            speed, vectors[way] = rate(extract, items)
            rates[way].append(speed)
    a, b = vectors["plain"], vectors["ours"]
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    speedups = [ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)]
    return {
        "backbone": name,
        **{f"{way} rows/s": statistics.median(found) for way, found in rates.items()},
        "speedup": statistics.median(speedups),
        "start-up s": start_up,
        "cosine": float(cosine.min()),
    }


def main() -> None:
    pictures = sorted((ROOT / "data/solar-cells/images").glob("*.png"))[:320]
    manifest = ROOT / "manifest/sentiment/manifest.parquet"
    if not pictures or not manifest.exists():
        raise SystemExit("there are no data yet: run `make demo` first")
    sentences = pd.read_parquet(manifest)["text"].sample(1024, random_state=0).tolist()
    lite0, minilm = ROOT / "weights/solar-cells", ROOT / "weights/sentiment"
    with tempfile.TemporaryDirectory() as folder:
        resnet = resnet18(Path(folder))
        rows = [
            compare("efficientnet_lite0", lite0, plain_images(lite0), pictures),
            compare("resnet18", resnet, plain_images(resnet), pictures),
            compare("minilm", minilm, plain_texts(minilm), sentences),
        ]
    table = pd.DataFrame(rows)
    print(f"{torch.get_num_threads()} threads, {ROUNDS} rounds, medians; eager: ours without torch.compile\n")
    print(table.to_string(index=False, float_format="{:.4g}".format))
    figures = {
        f"{row['backbone']}_{column.replace(' ', '_').replace('-', '_').replace('/', '_per_')}": round(
            value, 4
        )
        for row in rows
        for column, value in row.items()
        if column != "backbone"
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "features.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
