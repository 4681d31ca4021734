"""Recipes: every choice of one use case, in one strict YAML file.

Goes in: a YAML file whose blocks bear the names of the stages. Comes out: a frozen
``Recipe``. A key that does not exist is an error naming the nearest one that does.
Reads nothing but the recipe itself.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from headstart.errors import HeadstartError

Library = Literal["timm", "torchvision", "transformers"]

Sha256 = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class Block(BaseModel):
    """A block of a recipe: immutable, and no key but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Ingest(Block):
    """Where the raw data come from."""

    source: str
    """One URI: ``file:``, ``https:``, ``pip:`` or any fsspec URL. After ``#``, the file or folder wanted
    inside an archive."""
    sha256: str | None = Sha256
    """Digest of the downloaded file. Without it, the first fetch prints the line to add."""
    licence: str | None = None
    """Licence of the data, carried into the model card."""
    inbox: str | None = None
    """A folder or an fsspec prefix where new batches arrive; by default ``inbox/<recipe>`` in the project."""
    settle: float = Field(default=30, ge=0)
    """Seconds in which nothing of a batch may have changed before it is taken in: half-copied files wait."""


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
    target_domain: str | None = None
    """The domain to adapt to, for `method: domain_adaptation`. Its rows need no labels; those that they have
    are put aside for `evaluate`, and neither training nor any choice sees them."""
    source_domains: list[str] | None = Field(default=None, min_length=1)
    """The domains whose labels are learned from, where there is a `target_domain`; by default all others."""
    target_labels: int = Field(default=0, ge=0)
    """So many rows of the target's training split keep their labels, to be learned from."""
    splits: Splits = Splits()
    """Shares of train, val and test."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides which groups go to which split."""
    min_rows_per_class: int = Field(default=5, ge=1)
    """Fewest rows of a class in each split."""
    min_image_side: int = Field(default=32, ge=1)
    """Smallest width or height of an image, in pixels."""
    near_duplicates: bool = True
    """Keep near-duplicates in one group, not only exact ones."""

    @field_validator("classes")
    @classmethod
    def _named_once(cls, classes: list[str] | None) -> list[str] | None:
        if classes and len(set(classes)) < len(classes):
            raise ValueError("one of them is named twice")
        return classes

    @model_validator(mode="after")
    def _of_a_target(self) -> Validate:
        if self.target_domain is None and (self.source_domains or self.target_labels):
            raise ValueError("source_domains, target_labels: only with a `target_domain`")
        return self


class Fetch(Block):
    """Which pretrained backbone, and where its weights come from."""

    backbone: str = Field(pattern=rf"^({'|'.join(get_args(Library))}):.+$")
    """Library and architecture, such as ``timm:tf_efficientnet_lite0``."""
    source: str
    """URI of the weights: ``pip:``, ``hf:``, ``torchvision:``, ``https:``, ``file:``, or any that fsspec
    knows."""
    sha256: str | None = Sha256
    """Digest of the downloaded file."""
    licence: str | None = None
    """Licence of the weights, carried into the model's own files."""
    mean: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(default=None, min_length=3, max_length=3)
    """Channel means of the pixels in 0..1, where they differ from the architecture's own."""
    std: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(default=None, min_length=3, max_length=3)
    """Channel standard deviations, likewise."""

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _of_pixels_up_to_1(cls, values: Any) -> Any:
        numbers = values if isinstance(values, list) else []
        if any(isinstance(value, int | float) and value > 1 for value in numbers):
            raise ValueError("of pixels in 0..1; divide what is of 0..255 by 255")
        return values

    @property
    def library(self) -> Library:
        """Of the two parts of ``backbone``, the first."""
        return cast("Library", self.backbone.split(":", 1)[0])

    @property
    def architecture(self) -> str:
        """The second."""
        return self.backbone.split(":", 1)[1]


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
    views: Literal[1, 2, 8] = 1
    """Average the vectors of a picture over so many views of it, in training's validation and in serving as
    well: as it is; mirrored left and right, too; in all quarter turns of both, too."""
    packed: bool = False
    """Keep the decoded pixels or the tokens too, which ``fine_tune`` reads again and again."""


class Augment(Block):
    """What may happen to a picture in training without changing its label. All of it is off by default."""

    horizontal_flip: bool = False
    """Mirror left and right, half of the time."""
    vertical_flip: bool = False
    """Mirror top and bottom, half of the time."""
    quarter_turns: bool = False
    """Turn by 0, 90, 180 or 270 degrees."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Smallest share of the area that a random crop keeps; 1 crops nothing."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Multiply all values by a factor between 1 - this and 1 + this."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Stretch the values about the picture's mean by a factor between 1 - this and 1 + this."""


Adaptation = Literal[
    "source_only",
    "standardisation",
    "coral",
    "optimal_transport",
    "subspace_alignment",
    "importance_weighting",
    "information_maximisation",
    "minimum_class_confusion",
    "unmoved_class_confusion",
    "self_training",
    "standardised_self_training",
    "consensus",
]


Alignment = Literal[
    "domain_adversarial",
    "conditional_adversarial",
    "deep_coral",
    "mmd",
    "joint_mmd",
    "class_confusion",
    "information_maximisation",
    "consistency",
]


SourceFree = Literal["hypothesis_transfer", "entropy"]


class Decide(Block):
    """Which class to name, given the probabilities. By default the likeliest."""

    metric: Literal["accuracy", "balanced_accuracy", "macro_f1"] | None = None
    """Move the threshold to where this is best on the validation rows."""
    costs: dict[str, dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]] | None = None
    """What a mistake costs: by true class, then by the class named. A mistake that is not listed costs 1; the
    class that is expected to cost least is named."""
    abstain: float | None = Field(default=None, gt=0, lt=1)
    """Name no class where the probability of the one to name is below this: the label stays empty."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Decide:
        if self.metric and self.costs:
            raise ValueError("metric, costs: one of them says what is best, not both")
        return self


class Train(Block):
    """How the model is built. The keys from ``head_first`` on are those of training the backbone."""

    method: Literal["feature_extraction", "fine_tune", "domain_adaptation"] = "feature_extraction"
    """``feature_extraction``: the backbone stays frozen, a linear head is trained on its features.
    ``fine_tune``: the backbone is trained as well. ``domain_adaptation``: the head is fitted for
    `validate.target_domain`, from the labels of the other domains."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of everything random in training."""
    class_weight: Literal["balanced"] | None = None
    """``balanced`` weighs classes by their inverse frequency."""
    l2: list[Annotated[float, Field(gt=0)]] = Field(
        default=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], min_length=1
    )
    """L2 penalties to try; validation log-loss chooses."""
    decide: Decide = Decide()
    """Which class to name, given the probabilities."""
    adaptation: Adaptation | None = None
    """How `domain_adaptation` adapts the head; by default what the shift between the domains asks for."""
    tune: bool = False
    """Fine-tune the backbone on the source domains before `domain_adaptation` adapts the head."""
    alignment: Alignment | None = None
    """What ``tune`` adds to the loss of each step, on as many rows of the target as of the source, so that
    the backbone learns to see both alike."""
    alignment_weight: float = Field(default=1.0, ge=0)
    """Factor of that part of the loss."""
    target_statistics: bool = False
    """After ``tune``, read the target's rows with BatchNorm statistics of their own, and publish these
    (AdaBN, Li et al. 2016). For networks that have BatchNorm."""
    teach: bool = False
    """After ``tune`` and adapting, tune anew with the target's rows too, labelled as the adapted head names
    them, its doubts included."""
    source_free: SourceFree | None = None
    """Go on from a registered model that `fetch` brings, with unlabelled rows of the target alone. Its head
    stays. ``hypothesis_transfer`` trains its backbone (SHOT, Liang et al. 2020), ``entropy`` the scales and
    shifts of its normalisation (TENT, Wang et al. 2021)."""
    head_first: bool = True
    """Start from the head that fits the frozen features best, instead of a random one."""
    frozen_below: int | None = Field(default=None, ge=0)
    """With fewer training rows of a class, keep that head and the frozen backbone; by default below
    100 for images and 0 for texts."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the training rows."""
    budget: float | None = Field(default=None, gt=0)
    """Minutes of training at most; the schedule ends with them. What it reaches depends on the machine."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many epochs without a better one."""
    choose_by: Literal["log_loss", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "last"] = "auroc"
    """What an earlier epoch than the last must surely be better at, on the validation rows, to be kept
    instead; ``last`` keeps the last one in any case."""
    batch: int = Field(default=32, ge=1)
    """Rows per step, over all processes together."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """``sgd`` has a momentum of 0.9."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Of the backbone's last layers; by default 1e-3 for images and 1e-4 for texts."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Of the head; by default that of the backbone's last layers."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Each layer learns this much slower than the one after it; by default 0.8 for images, 1 for texts."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of weights alone: biases and normalisation are left free."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How learning rates fall: to nothing along half a cosine, to a tenth every 7 epochs, or not at all."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which learning rates rise from nothing."""
    clip: float | None = Field(default=1.0, gt=0)
    """Longest gradient; a longer one is shortened to it; null for any length."""
    freeze: str | None = None
    """Keep the backbone as it is up to this layer, and with it."""
    gradual: bool = False
    """Unfreeze one more layer each epoch, from the last one down (Howard & Ruder 2018)."""
    lora: int | None = Field(default=None, ge=1)
    """Train low-rank additions of this rank to the linear layers, instead of the layers (Hu et al. 2021).
    For ``transformers``."""
    batch_norm: Literal["frozen", "updated"] = "frozen"
    """Keep the statistics of BatchNorm that the backbone came with, or let every batch change them. A row
    alone has none: one that is left over joins the batch before it."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the head's inputs that are left out at each step."""
    backbone_dropout: float | None = Field(default=0.0, ge=0, lt=1)
    """Share left out by the backbone's own dropout layers; 0 also keeps whole branches (stochastic depth),
    which drop out as they came otherwise; null for what it came with."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread over all classes."""
    mixup: float = Field(default=0.0, ge=0)
    """Blend pairs of pictures and of labels, in a proportion drawn from Beta(this, this); 0 blends none."""
    ema: float | None = Field(default=0.98, gt=0, lt=1)
    """Judge and keep a running mean of the weights, of which each step keeps this share; null for the weights
    themselves."""
    augment: Augment = Augment()
    """What may happen to a picture."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of a step; ``auto`` takes bfloat16 where the machine is fast in it."""

    @model_validator(mode="after")
    def _of_one_method(self) -> Train:
        if (self.adaptation or self.tune) and self.method != "domain_adaptation":
            raise ValueError("adaptation, tune: only with `method: domain_adaptation`")
        if self.alignment and (not self.tune or self.mixup):
            raise ValueError("alignment: only with `tune: true`, and without mixup")
        if (self.teach or self.target_statistics) and not self.tune:
            raise ValueError("teach, target_statistics: only with `tune: true`")
        if self.source_free and (self.adaptation or self.tune or self.mixup):
            raise ValueError("source_free: there are no rows of a source for adaptation, tune or mixup")
        if self.source_free and self.method != "domain_adaptation":
            raise ValueError("source_free: only with `method: domain_adaptation`")
        if self.decide.metric and self.method == "domain_adaptation":
            raise ValueError("decide.metric: the validation rows are not of the target domain")
        if self.frozen_below and not self.head_first:
            raise ValueError("frozen_below: with `head_first: false` there is no head to keep")
        if self.patience and self.choose_by == "last":
            raise ValueError("patience: with `choose_by: last` no epoch is better than the last")
        of_all = {"method", "seed", "class_weight", "l2", "decide", "adaptation", "tune", "source_free"}
        alien = self.model_fields_set - of_all
        if alien and not self.trains_backbone:
            raise ValueError(
                f"{', '.join(sorted(alien))}: only with `method: fine_tune`, `tune: true` or `source_free`"
            )
        return self

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone is trained too, for which packed rows are needed."""
        return self.method == "fine_tune" or self.tune or self.source_free is not None

    @property
    def follows_batches(self) -> bool:
        """Whether BatchNorm standardises by the batch at hand, and its statistics follow."""
        return self.batch_norm == "updated" or self.source_free == "entropy"

    @property
    def needs_one_process(self) -> list[str]:
        """The keys that ask for one: they compare domains, read or label rows anew, or follow batches."""
        asking = {
            "alignment": self.alignment,
            "teach": self.teach,
            "target_statistics": self.target_statistics,
            "source_free": self.source_free,
            "batch_norm": self.batch_norm == "updated",
        }
        return [name for name, asks in asking.items() if asks]


class Evaluate(Block):
    """How sure the numbers are."""

    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples of the groups."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Coverage of each interval."""


class Register(Block):
    """What the registry calls the model."""

    name: str | None = Field(default=None, pattern=r"^[^/:]*[^/:.\s][^/:]*$")
    """Registered model name, without ``/`` and ``:``; by default the recipe's own name."""


class Promote(Block):
    """What a new model must show before it replaces the champion, both judged on the same test rows."""

    metric: Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc"] = "accuracy"
    """What better means."""
    min_gain: float = Field(default=0.0, ge=0, lt=1)
    """The gain must be shown to be larger than this."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of models that are no better, at most 1 minus this share is promoted by luck."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """No model below this is promoted, not even the first."""
    no_domain_worse_than: float | None = Field(default=None, ge=0, lt=1)
    """In no domain may the metric fall by more than this."""
    max_latency_ratio: float | None = Field(default=None, gt=0)
    """Seconds per row, over those of the champion on the same machine."""
    max_size: float | None = Field(default=None, gt=0)
    """Megabytes of the model's files."""


class Monitor(Block):
    """When recent rows count as drifted from those that the champion knows."""

    level: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance of an alarm while nothing has drifted, over all tests of one batch together."""
    rows: int = Field(default=1000, ge=50)
    """At most so many rows of a batch, and of what the champion knows, are compared."""
    permutations: int = Field(default=1000, ge=100)
    """Permutations of each test."""


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
    promote: Promote = Promote()
    monitor: Monitor = Monitor()

    @model_validator(mode="after")
    def _fit_together(self) -> Recipe:
        adapting = self.train.method == "domain_adaptation"
        if adapting != (self.validate_.target_domain is not None):
            raise ValueError(
                "validate.target_domain, train.method: a target domain and `domain_adaptation` go together"
            )
        if self.train.source_free and (self.validate_.source_domains or self.validate_.target_labels):
            raise ValueError(
                "validate.source_domains, validate.target_labels: `train: source_free` learns from no label"
            )
        if self.train.trains_backbone and not self.features.packed:
            chosen = {"tune: true": self.train.tune, "source_free": self.train.source_free}
            wants = next((key for key, value in chosen.items() if value), "method: fine_tune")
            raise ValueError(f"features.packed: `train: {wants}` needs `features: packed: true`")
        if self.train.lora and self.modality == "image":
            raise ValueError("train.lora: needs a backbone of `transformers`")
        if self.modality == "text" and self.features.views > 1:
            raise ValueError("features.views: is for pictures, and these are texts")
        if self.modality == "text" and (self.train.mixup or self.train.augment != Augment()):
            raise ValueError("train.augment, train.mixup: are for pictures, and these are texts")
        return self

    @property
    def name(self) -> str:
        """The stem of the recipe's file."""
        return self._name

    @property
    def modality(self) -> Literal["image", "text"]:
        """What the backbone reads."""
        return "text" if self.fetch.library == "transformers" else "image"

    @property
    def frozen_below(self) -> int:
        """Training rows of a class below which ``fine_tune`` keeps the backbone as it is."""
        train = self.train
        if train.method != "fine_tune" or not train.head_first:
            return 0
        if train.frozen_below is not None:
            return train.frozen_below
        return 100 if self.modality == "image" else 0

    def training(self, **choices: Any) -> Recipe:
        """The same recipe with other choices in its ``train`` block."""
        return self.model_copy(update={"train": self.train.model_copy(update=choices)})

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
        # As DVC reads it, which compares the blocks: a parser of YAML 1.1 takes a class `no` for false.
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(file.stem for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise HeadstartError(
            "no such recipe",
            where=str(path),
            do=_nearest(path.stem, known) or f"recipes here: {', '.join(known) or 'none'}",
        ) from None
    except (YAMLError, ValueError) as error:  # as of a day that the calendar does not have
        raise HeadstartError(
            "the recipe is not valid YAML",
            where=str(path),
            table=str(error).partition("\n\n")[0].splitlines(),
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
    if not fault["loc"]:  # of the recipe as a whole: the message names the keys
        return str(fault["msg"]).removeprefix("Value error, ")
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
