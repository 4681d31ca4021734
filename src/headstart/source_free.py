"""Source-free: a registered model goes on learning from rows without labels, far from those it learned from.

Goes in: the backbone and head that ``fetch`` took from a registered model, and packed rows of the target
domain. Comes out: the same model, tuned to the target. For when the source's rows may not travel, or are
gone. Never sees a label, nor a row of the source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headstart.errors import HeadstartError
from headstart.heads import Head
from headstart.layout import REGISTERED
from headstart.metrics import Floats
from headstart.recipe import Features


@dataclass(frozen=True)
class Inherited:
    """What a registered model brings along, besides its backbone."""

    head: Head
    classes: list[str]
    options: Features  # of the vectors that the head takes
    shares: Floats  # float64 [classes], in which it names rows like those it learned from

    @classmethod
    def read(cls, weights: Path) -> Inherited:
        """From the folder that ``fetch`` wrote.

        Raises:
            HeadstartError: the backbone in it is not that of a registered model.
        """
        folder = weights / REGISTERED
        if not folder.is_dir():
            raise HeadstartError(
                "there is no model to go on from",
                where="train.source_free",
                do="let fetch.source lead to the folder of a registered model; see docs/how-to/adapt.md",
            )
        said: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        classes = said["classes"]
        uniform = [1 / len(classes)] * len(classes)  # what the papers expect; older models do not say
        return cls(
            Head.load(folder / "head.safetensors"),
            classes,
            Features.model_validate_json((folder / "features.json").read_text(encoding="utf-8")),
            np.array(said.get("shares", uniform), np.float64),
        )

    def check(self, options: Features, classes: list[str] | None) -> None:
        """Refuse a recipe that gives the head other vectors than it takes, or other classes.

        Raises:
            HeadstartError: naming every key that differs.
        """
        wanted = {
            name: getattr(self.options, name) for name in ("layers", "image_size", "max_tokens", "views")
        }
        differing = [
            f"features.{name}: {getattr(options, name)}, the model has {value}"
            for name, value in wanted.items()
            if getattr(options, name) != value
        ]
        if classes is not None and classes != self.classes:
            differing.append(
                f"validate.classes: {', '.join(classes)}, the model has {', '.join(self.classes)}"
            )
        if differing:
            raise HeadstartError(
                "the recipe does not fit the registered model that it goes on from",
                where="train.source_free",
                table=differing,
                do="take these from the recipe of that model",
            )
