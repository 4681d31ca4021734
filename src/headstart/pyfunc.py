"""The registered model as MLflow loads it: a backbone, a head, and nothing pickled.

Goes in: rows with ``text``, or with ``image`` (the bytes of a file) or ``path``. Comes out: per row
the ``label`` and a probability ``p:<class>`` for each class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from headstart.heads import Head
from headstart.recipe import Features

if TYPE_CHECKING:
    from headstart.features import Extractor


class Classifier(PythonModel):  # type: ignore[misc]
    """Backbone and head, loaded once, applied to data frames."""

    extractor: Extractor
    head: Head
    classes: list[str]

    def load_context(self, context: Any) -> None:
        """Load the backbone and the head from the model's own files."""
        from headstart import devices
        from headstart.features import Extractor
        from headstart.precision import Arithmetic

        parts = {name: Path(path) for name, path in context.artifacts.items()}
        options = Features.model_validate_json(parts["features"].read_text(encoding="utf-8"))
        arithmetic = Arithmetic.load(parts["arithmetic"])
        if arithmetic.dtype not in map(devices.name_of, devices.fast_dtypes(devices.device())):
            arithmetic = Arithmetic()  # this machine would only imitate it; float32 says the same
        self.extractor = Extractor(parts["backbone"], options, arithmetic)
        self.head = Head.load(parts["head"])
        self.classes = json.loads(parts["model"].read_text(encoding="utf-8"))["classes"]

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Label and class probabilities of each row, in the order of the rows."""
        probabilities = self.head.probabilities(self.extractor(_items(model_input)))
        table = pd.DataFrame(probabilities, columns=[f"p:{name}" for name in self.classes])
        table.insert(0, "label", [self.classes[best] for best in np.argmax(probabilities, axis=1)])
        return table


def _items(rows: pd.DataFrame) -> list[Any]:
    """The one thing to classify in each row: a text, an image's bytes, or a path to an image."""
    columns = [name for name in ("text", "image", "path") if name in rows]
    items = []
    for position, row in enumerate(rows[columns].itertuples(index=False)):
        given = [value for value in row if isinstance(value, str | bytes)]
        if len(given) != 1:
            raise mlflow.exceptions.MlflowException.invalid_parameter_value(
                f"row {position} needs exactly one of text, image or path"
            )
        items.append(Path(given[0]) if "path" in columns and isinstance(given[0], str) else given[0])
    return items


set_model(Classifier())
