"""Recipes: every choice of one use case, in one strict YAML file.

Goes in: a YAML file whose blocks bear the names of the stages. Comes out: a frozen
``Recipe``. A key that does not exist is an error naming the nearest one that does.
Reads nothing but the recipe itself.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from headstart.errors import HeadstartError

Sha256 = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class Block(BaseModel):
    """A block of a recipe: immutable, and no key but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Ingest(Block):
    """Where the raw data come from."""

    source: str
    """One URI: ``file:``, ``https:``, ``pip:``, ``hf:`` or any fsspec URL. After ``#``, the
    file or folder wanted inside an archive."""
    sha256: str | None = Sha256
    """Digest of the downloaded file. Without it, the first fetch prints the line to add."""


class Splits(Block):
    """Share of the rows in each split; the three sum to 1."""

    train: float = Field(default=0.6, gt=0, lt=1)
    """Rows that the model learns from."""
    val: float = Field(default=0.2, gt=0, lt=1)
    """Rows that choose settings, such as the regularisation."""
    test: float = Field(default=0.2, gt=0, lt=1)
    """Rows that only ``evaluate`` sees."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> Splits:
        if abs(self.train + self.val + self.test - 1) > 1e-9:
            raise ValueError(f"train, val and test sum to {self.train + self.val + self.test:g}, not 1")
        return self


class Columns(Block):
    """Names of the columns in a table; only ``text`` and ``label`` must exist."""

    text: str = "text"
    """What is classified."""
    label: str = "label"
    """The class."""
    id: str | None = None
    """A unique name for the row; made from the content if there is none."""
    domain: str | None = None
    """Where the row comes from: site, channel, camera."""
    group: str | None = None
    """Rows that share a group are never split apart."""
    split: str | None = None
    """``train``, ``val`` or ``test``, if the data decide that themselves."""


class Validate(Block):
    """How raw files become rows, and what makes them fit to train on."""

    adapter: str
    """``image_folder``, ``table``, ``elpv``, ``vader``, or your own ``module:function``."""
    columns: Columns = Columns()
    """Column names for the ``table`` adapter."""
    classes: list[str] | None = Field(default=None, min_length=2)
    """The labels allowed; by default every label found."""
    splits: Splits = Splits()
    """Shares of train, val and test."""
    seed: int = 0
    """Decides which groups go to which split."""
    min_rows_per_class: int = Field(default=5, ge=1)
    """Fewest rows of a class in each split."""
    min_image_side: int = Field(default=32, ge=1)
    """Smallest width or height of an image, in pixels."""
    near_duplicates: bool = True
    """Keep near-duplicates in one group, not only exact ones."""


class Fetch(Block):
    """Which pretrained backbone, and where its weights come from."""

    backbone: str = Field(pattern=r"^(timm|torchvision|transformers):.+$")
    """Library and architecture, such as ``timm:tf_efficientnet_lite0``."""
    source: str
    """URI of the weights: ``pip:``, ``hf:``, ``torchvision:``, ``https:``, ``file:``."""
    sha256: str | None = Sha256
    """Digest of the downloaded file."""
    licence: str | None = None
    """Licence of the weights, carried into the model's own files."""
    mean: list[float] | None = Field(default=None, min_length=3, max_length=3)
    """Channel means of the pixels in 0..1, where they differ from the architecture's own."""
    std: list[float] | None = Field(default=None, min_length=3, max_length=3)
    """Channel standard deviations, likewise."""


class Features(Block):
    """How the frozen backbone turns rows into vectors."""

    layers: list[str] | None = Field(default=None, min_length=1)
    """Layers to tap: each one's average over positions, concatenated. By default the backbone's own
    pooled output."""
    image_size: int | None = Field(default=None, ge=32)
    """Side in pixels of the square that images are resized to; by default the backbone's own."""
    max_tokens: int = Field(default=128, ge=8)
    """Texts are cut after this many tokens."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic of the forward pass; ``auto`` takes the fastest that the hardware has and that agrees with
    float32 on a sample of the rows."""
    compile: bool | None = None
    """Use torch.compile; by default only when there are rows enough to repay its start-up."""


class Train(Block):
    """How the model is built."""

    method: Literal["feature_extraction"] = "feature_extraction"
    """``feature_extraction``: the backbone stays frozen, a linear head is trained on its features."""
    seed: int = 0
    """Seed of everything random in training."""
    class_weight: Literal["balanced"] | None = None
    """``balanced`` weighs classes by their inverse frequency."""
    l2: list[float] = Field(default=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], min_length=1)
    """L2 penalties to try; validation log-loss chooses."""


class Evaluate(Block):
    """How sure the numbers are."""

    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples of the groups."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Coverage of each interval."""


class Register(Block):
    """What the registry calls the model."""

    name: str | None = None
    """Registered model name; by default the recipe's own name."""


class Recipe(Block):
    """All choices of one use case. A block for each stage, in the order they run."""

    _name: str = PrivateAttr(default="")
    ingest: Ingest
    validate_: Validate = Field(alias="validate")
    fetch: Fetch
    features: Features
    train: Train
    evaluate: Evaluate
    register_: Register = Field(default=Register(), alias="register")

    @property
    def name(self) -> str:
        """The stem of the recipe's file."""
        return self._name

    @property
    def modality(self) -> Literal["image", "text"]:
        """What the backbone reads."""
        return "text" if self.fetch.backbone.startswith("transformers:") else "image"

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        return self.register_.name or self.name


def load(path: Path | str) -> Recipe:
    """Read one recipe.

    Args:
        path: a YAML file; its stem, in lower-case letters, digits and hyphens, is the name.

    Raises:
        HeadstartError: no such file, not YAML, an unknown key, a missing block or a bad value;
            every fault of the file in one table.
    """
    path = Path(path)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", path.stem):
        raise HeadstartError(
            f"{path.stem!r} cannot be a recipe's name",
            where=str(path),
            do="use lower-case letters, digits and hyphens",
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(file.stem for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise HeadstartError(
            "no such recipe",
            where=str(path),
            do=_nearest(path.stem, known) or f"recipes here: {', '.join(known) or 'none'}",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HeadstartError(
            "the recipe is not valid YAML",
            where=str(path),
            table=str(error).splitlines(),
            do="mend the line named above",
        ) from None
    if not isinstance(content, dict):
        raise HeadstartError("the recipe is empty", where=str(path), do="start from one in recipes/")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise HeadstartError(
            "the recipe has mistakes",
            where=str(path),
            table=[_explain(fault) for fault in error.errors()],
            do="docs/reference/recipe.md lists every key",
        ) from None
    recipe._name = path.stem
    return recipe


def json_schema() -> dict[str, Any]:
    """The published JSON schema of a recipe, for editors and other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


def _explain(fault: Any) -> str:
    """One pydantic fault as one line: the key, what is wrong, and the nearest valid key."""
    *parents, key = [str(part) for part in fault["loc"]]
    dotted = ".".join([*parents, key])
    if fault["type"] == "extra_forbidden":
        return f"{dotted}: no such key. {_nearest(key, _keys_of(parents))}".rstrip()
    if fault["type"] == "missing" and not parents:
        return f"{dotted}: this block is missing; write `{dotted}: {{}}` to take its defaults"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message[0].lower()}{message[1:]}; got {fault['input']!r:.60}"


def _keys_of(parents: list[str]) -> list[str]:
    """The valid keys of the block that ``parents`` leads to."""
    block: type[BaseModel] = Recipe
    for parent in parents:
        for name, field in block.model_fields.items():
            if parent == (field.alias or name) and isinstance(field.annotation, type):
                block = field.annotation
    return [field.alias or name for name, field in block.model_fields.items()]


def _nearest(wrong: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else ""
