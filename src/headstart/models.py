"""Models: a version of the registry, loaded, that names the class of whatever it is given.

Goes in: the files that ``register`` logged. Comes out: labels and probabilities. Knows the registry's names
and aliases only to load from it, and never changes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from headstart.calibration import Decision
from headstart.errors import HeadstartError
from headstart.heads import Head
from headstart.layout import Layout, registered_parts, written_whole
from headstart.metrics import Floats
from headstart.recipe import Features, Recipe

if TYPE_CHECKING:
    from headstart.features import Extractor, Item
    from headstart.precision import Arithmetic

ABSTAINED = ""  # in the place of a label


class Answers(NamedTuple):
    """What a model says of some rows."""

    labels: list[str]  # ``ABSTAINED`` where it does not know
    probabilities: Floats  # float64 [rows, classes]


@dataclass(frozen=True)
class Model:
    """A backbone, a head and a rule that decides, loaded once."""

    extractor: Extractor
    head: Head
    decision: Decision
    classes: list[str]

    @classmethod
    def read(cls, parts: Mapping[str, Path]) -> Model:
        """From the parts that ``parts_of`` names: backbone, head, model, features, arithmetic."""
        from headstart.features import Extractor

        options = Features.model_validate_json(parts["features"].read_text(encoding="utf-8"))
        described = json.loads(parts["model"].read_text(encoding="utf-8"))
        return cls(
            extractor=Extractor(parts["backbone"], options, arithmetic_here(parts["arithmetic"])),
            head=Head.load(parts["head"]),
            decision=Decision.of(described),
            classes=described["classes"],
        )

    @property
    def modality(self) -> Literal["image", "text"]:
        """What it reads."""
        return self.extractor.spec.modality

    def __call__(self, items: Sequence[Item]) -> Answers:
        """What it says of each item: a text, an image's bytes, or the path of an image.

        Raises:
            HeadstartError: an item that is none of what it reads, or an image that cannot be decoded.
        """
        return self.answers(self.head.probabilities(self.extractor(items)))

    def answers(self, probabilities: Floats) -> Answers:
        """Labels for probabilities, float64 [rows, classes]."""
        named, sure = self.decision.named(probabilities), self.decision.sure(probabilities)
        return Answers(
            [self.classes[c] if said else ABSTAINED for c, said in zip(named, sure, strict=True)],
            probabilities,
        )


def arithmetic_here(path: Path) -> Arithmetic:
    """How a network computes on this machine, by the file that says how it did where it was trained."""
    from headstart import devices
    from headstart.precision import Arithmetic

    found = Arithmetic.load(path)
    if found.dtype in map(devices.name_of, devices.fast_dtypes(devices.device())):
        return found
    return Arithmetic()  # this machine would only imitate it; float32 says the same


def parts_of(recipe: Recipe, layout: Layout, folder: Path) -> dict[str, Path]:
    """The parts of the model in the tree; the recipe's choice of features is written to ``folder``."""
    trained, arithmetic = layout.model / "backbone", layout.model / "arithmetic.safetensors"
    choices = folder / "features.json"
    choices.write_text(recipe.features.model_dump_json(), encoding="utf-8")
    return {
        "backbone": trained if trained.is_dir() else layout.weights,
        "head": layout.model / "head.safetensors",
        "model": layout.model / "model.json",
        "features": choices,
        "arithmetic": arithmetic if arithmetic.exists() else layout.features / "arithmetic.safetensors",
    }


@dataclass(frozen=True)
class Version:
    """A version of the registry whose files are on this machine."""

    name: str
    version: str
    run_id: str
    tags: dict[str, str]
    folder: Path  # of the MLflow model
    model: Model

    @property
    def size(self) -> int:
        """Bytes of the files that it predicts with."""
        return sum(file.stat().st_size for file in (self.folder / "artifacts").rglob("*") if file.is_file())


def load(name: str, which: str = "champion") -> Version:
    """A version by its number or by its alias.

    Files of a store on this machine are read where they lie; those of another are copied to the cache once.

    Raises:
        HeadstartError: there is no such model, version or alias, or the store cannot be reached.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    from headstart import stores

    title = f"{name} {'version ' if which.isdecimal() else ''}{which}"
    with stores.asked(f"{title} cannot be had"):
        client = mlflow.MlflowClient()
        try:
            if which.isdecimal():
                found = client.get_model_version(name, which)
            else:
                found = client.get_model_version_by_alias(name, which)
        except MlflowException as error:
            if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                raise
            raise HeadstartError(
                f"the registry has no {title}",
                where=stores.address(),
                table=str(error).splitlines()[:3],
                do="`headstart models` lists what there is",
            ) from None
        uri = client.get_model_version_download_uri(name, str(found.version))
        folder = stores.files(name, str(found.version), uri)
    try:
        read = Model.read(registered_parts(folder))
    except (KeyError, FileNotFoundError) as error:
        raise HeadstartError(
            f"{title} is no model that headstart registered",
            where=str(folder),
            table=[f"{type(error).__name__}: {error}"],
            do="`headstart models` lists what there is",
        ) from None
    return Version(name, str(found.version), found.run_id, dict(found.tags), folder, read)


def export(version: Version, target: Path) -> Path:
    """Copy the folder that MLflow loads a version from, and return where it is.

    Raises:
        HeadstartError: something is there already, or the disk is full or not writable.
    """
    if target.exists():
        raise HeadstartError("there is something already", where=str(target), do="name another place")
    with written_whole(target) as folder:
        shutil.copytree(version.folder, folder, dirs_exist_ok=True)
    return target
