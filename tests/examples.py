"""Small data and small pretrained backbones, made on the spot: real formats, seconds of work."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from headstart.layout import Layout
    from headstart.recipe import Recipe

GOOD = ["splendid", "a delight", "warm and clever", "truly lovely", "bright", "a joy to watch"]
BAD = ["dreadful", "a bore", "cold and dull", "truly awful", "bleak", "a pain to watch"]
THINGS = ["film", "phone", "novel", "lamp", "song", "coat", "plan", "soup", "train", "garden"]


def write_texts(path: Path, rows: int = 240, seed: int = 0, start: int = 0) -> None:
    """A CSV of ``body``, ``mood`` and ``shop`` with a plain signal; row i depends on i and seed only."""
    lines = ["body,mood,shop"]
    for i in range(start, start + rows):
        chance = random.Random(f"{seed}-{i}")
        mood = ("happy", "unhappy")[i % 2]
        words = chance.choice(GOOD if mood == "happy" else BAD)
        tail = " ".join(chance.sample(THINGS, 4))
        lines.append(
            f"the {chance.choice(THINGS)} number {i} was {words} next to {tail},{mood},{'ab'[i // 2 % 2]}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_images(folder: Path, per_class: int = 30, side: int = 48, seed: int = 0) -> None:
    """Class folders ``dark`` and ``light`` of noisy PNGs."""
    import numpy as np
    from PIL import Image

    for level, name in ((70, "dark"), (180, "light")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            noise = np.random.default_rng([seed, level, i]).normal(level, 40, (side, side, 3))
            Image.fromarray(noise.clip(0, 255).astype("uint8")).save(folder / name / f"{i:03}.png")


def write_bert(folder: Path) -> None:
    """A BERT of 2 layers and 32 dimensions with random weights, in the layout of a model repository."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = " ".join([*GOOD, *BAD, *THINGS, "the number was next to"]).split()
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted(set(words)),
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)


def write_efficientnet(path: Path) -> None:
    """Random weights of timm's smallest EfficientNet as safetensors."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model("test_efficientnet", pretrained=False).state_dict(), path)


def write_recipe(path: Path, **blocks: object) -> None:
    """A recipe from its blocks (JSON is YAML)."""
    defaults: dict[str, object] = {"features": {}, "train": {}, "evaluate": {}}
    path.write_text(
        "\n".join(f"{key}: {json.dumps(value)}" for key, value in (defaults | blocks).items()) + "\n"
    )


def recipe_of_the_readme(name: str, backbone: str, source: str) -> str:
    """A recipe as the README shows it, with weights from elsewhere: its own come from a package index."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = re.search(rf"^```yaml\n(# headstart run recipes/{name}\.yaml\n.*?)^```$", readme, re.M | re.S)
    assert shown
    fetch = f"fetch:\n  backbone: {backbone}\n  source: {source}\n"
    text, count = re.subn(r"^fetch:\n(  .*\n)+", fetch, shown[1], flags=re.M)
    assert count == 1
    return text


def write_text_project(root: Path, name: str = "moods", rows: int = 240) -> None:
    """Data, backbone and recipe of a small text classification."""
    write_texts(root / "start" / f"{name}.csv", rows)
    write_bert(root / "start" / "bert")
    write_recipe(
        root / "recipes" / f"{name}.yaml",
        ingest={"source": f"file:start/{name}.csv"},
        validate={"adapter": "table", "columns": {"text": "body", "label": "mood", "domain": "shop"}},
        fetch={"backbone": "transformers:bert", "source": "file:start/bert"},
    )


def write_image_project(root: Path, name: str = "photos", per_class: int = 30) -> None:
    """Data, backbone and recipe of a small image classification."""
    write_images(root / "start" / name, per_class)
    write_efficientnet(root / "start" / "efficientnet.safetensors")
    write_recipe(
        root / "recipes" / f"{name}.yaml",
        ingest={"source": f"file:start/{name}"},
        validate={"adapter": "image_folder"},
        fetch={"backbone": "timm:test_efficientnet", "source": "file:start/efficientnet.safetensors"},
        features={"image_size": 64},
    )


def write_cameras_project(root: Path, name: str = "cameras", **train: object) -> None:
    """Pictures of two cameras, of which the second is paler, and a recipe that adapts to it."""
    for camera in ("old", "new"):
        write_images(root / "start" / name / camera, 40, seed=int(camera == "new"))
    for path in (root / "start" / name / "new").rglob("*.png"):
        _fade(path)
    write_efficientnet(root / "start" / "efficientnet.safetensors")
    write_recipe(
        root / "recipes" / f"{name}.yaml",
        ingest={"source": f"file:start/{name}"},
        validate={"adapter": "tests.examples:cameras", "target_domain": "new", "near_duplicates": False},
        fetch={"backbone": "timm:test_efficientnet", "source": "file:start/efficientnet.safetensors"},
        features={"image_size": 32, "packed": True, "precision": "float32"},
        train={"method": "domain_adaptation", "tune": True, "frozen_below": 0, "epochs": 2, "batch": 8}
        | train,
    )


def cameras(raw: Path, options: object) -> pd.DataFrame:
    """An adapter: a folder for each camera, with class folders in it."""
    import pandas as pd

    paths = sorted(path.relative_to(raw) for path in raw.rglob("*.png"))  # .../camera/class/file
    rows = [(str(path), path.parts[-2], path.parts[-3]) for path in paths]
    return pd.DataFrame(rows, columns=["path", "label", "domain"])


def _fade(path: Path) -> None:
    from PIL import Image

    Image.open(path).point(lambda value: 100 + value // 3).save(path)


def prepared(root: Path, name: str) -> tuple[Recipe, Layout]:
    """One of these projects, run in this process up to training; the working folder must be its root."""
    from headstart import recipe as recipes
    from headstart import stages
    from headstart.layout import Layout

    recipe, layout = recipes.load(root / "recipes" / f"{name}.yaml"), Layout(root, name)
    layout.raw.mkdir(parents=True)
    start = root / recipe.ingest.source.removeprefix("file:")
    (shutil.copytree if start.is_dir() else shutil.copy2)(start, layout.raw / start.name)
    for stage in ("validate", "fetch", "features"):
        stages.run(stage, recipe, layout)
    return recipe, layout
