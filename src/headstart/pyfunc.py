"""The registered model as MLflow loads it: a backbone, a head, and nothing pickled.

Goes in: rows with ``text``, or with ``image`` (the bytes of a file) or ``path``. Comes out: per row
the ``label``, empty where the model abstains, and a probability ``p:<class>`` for each class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from headstart.models import Model


class Classifier(PythonModel):  # type: ignore[misc]
    """A model, loaded once, applied to data frames."""

    model: Model

    def load_context(self, context: Any) -> None:
        """Load the model from its own files."""
        self.model = Model.read({name: Path(path) for name, path in context.artifacts.items()})

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Label and class probabilities of each row, in the order of the rows."""
        labels, probabilities = self.model(_items(model_input))
        table = pd.DataFrame(probabilities, columns=[f"p:{name}" for name in self.model.classes])
        table.insert(0, "label", labels)
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
