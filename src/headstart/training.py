"""Train: from features to a model, its predictions, and stamps of what it was made from.

Goes in: the manifest, the cached features of a frozen backbone and, for fine-tuning, the packed rows. Comes
out: ``head.safetensors``, ``model.json``, ``predictions.parquet``, and the backbone if it was trained. Never
measures itself on the test rows, which take no part in any choice: they are only predicted.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart import domains, environment, fitting, launching, stamps
from headstart.calibration import Decision, decision, temperature
from headstart.examples import Examples, load
from headstart.fitting import Calibrated, Fitted
from headstart.layout import Layout, written_whole
from headstart.metrics import Floats
from headstart.packs import Rows
from headstart.recipe import Recipe, Train


def train(recipe: Recipe, layout: Layout) -> None:
    """Write ``model/R/`` from ``manifest/R/``, ``features/R/`` and ``weights/R/``.

    The model that the validation rows chose is the one that is kept. It is not fitted again on train and
    validation together: the validation rows would stop being rows that the model has not seen, and
    whatever is chosen on them later (a threshold, a calibration) would be chosen on its own training data.

    Raises:
        HeadstartError: files are missing or of different runs, features are not finite, a class has no
            rows to learn from, or fine-tuning cannot go on.
    """
    if recipe.train.trains_backbone:
        from headstart import devices

        alone = environment.launched() or recipe.train.needs_one_process
        if not alone and (processes := devices.processes()) > 1:
            launching.train(Path("recipes") / f"{layout.recipe}.yaml", processes)
            return
    stamped = stamps.take(recipe, layout)  # first: a choice edited from here on is not what was used
    examples = load(recipe, layout)
    if recipe.train.decide.costs is not None:  # a misspelt class is to be known before hours of training
        _rule(recipe.train, examples, np.empty(0, np.int64), np.empty((0, len(examples.classes))))
    key = stamps.key(stamped)
    fitted = fit(recipe, layout, examples, examples.rows("train"), examples.rows("val"), key=key)
    if fitted is None:
        return  # one of several processes; the first of them publishes
    held_out = np.flatnonzero(examples.manifest["split"].isin(["val", "test"]))
    with written_whole(layout.model) as folder:
        probabilities = fitted.publish(folder, held_out)
        rule = _rule(recipe.train, examples, held_out, probabilities)
        model = {
            "method": recipe.train.method,
            "classes": examples.classes,
            **fitted.said,
            **(_unadapted(recipe) if isinstance(fitted, Calibrated) else {}),
            **_shares(examples, held_out, probabilities),
            "decision": asdict(rule),
            "stamps": stamped,
        }
        (folder / "model.json").write_text(
            json.dumps(model, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        predictions = examples.manifest.iloc[held_out][["id", "split", "label", "domain", "group"]]
        columns = {f"p:{name}": probabilities[:, i] for i, name in enumerate(examples.classes)}
        predictions = predictions.reset_index(drop=True).assign(**columns)
        predictions.to_parquet(folder / "predictions.parquet", index=False)
    # Checkpoints, of killed runs with other choices too: nobody comes back for them.
    for folder in (layout.work / "train").glob("*/"):
        shutil.rmtree(folder, ignore_errors=True)


def fit(
    recipe: Recipe, layout: Layout, examples: Examples, train: Rows, val: Rows, *, key: str | None = None
) -> Fitted | None:
    """The model that the recipe's method builds from the rows ``train``, with what the rows ``val`` choose.

    Domain adaptation without any row of its target is the source's model.

    Args:
        recipe: its ``train`` block says how.
        layout: where the backbone and the packed rows lie.
        examples: every row.
        train: positions of the rows to learn from.
        val: positions of the rows that choose.
        key: a name for the run; a killed run of the same name is continued.

    Returns:
        The model; None in all but the first of several processes.

    Raises:
        HeadstartError: as for ``train``.
    """
    if recipe.train.source_free:
        return domains.freed(recipe, layout, examples, key=key)
    of_target = (examples.manifest["domain"] == recipe.validate_.target_domain).to_numpy()
    train, known = train[~of_target[train]], train[of_target[train]]
    if of_target.any():
        domains.check(examples, train, val)
    source = fitting.source_of(recipe, layout, examples, train, val, key=key)
    if source is None:
        return None
    if not of_target.any():
        return Calibrated(source, temperature(examples.truth[val], source.of_val))
    model = domains.adapted(recipe.train, source, train, val, known)
    if not recipe.train.teach:
        return model
    return domains.taught(recipe, layout, examples, model, np.concatenate([train, known]), val, key=key)


def _rule(choices: Train, examples: Examples, held_out: Rows, probabilities: Floats) -> Decision:
    """The decision rule that the validation rows choose.

    Of a model made for a target domain they can choose none: they are of other domains.
    """
    val = _labelled_val(examples, held_out)
    if choices.method == "domain_adaptation":
        val[:] = False
    return decision(examples.truth[held_out[val]], probabilities[val], examples.classes, choices.decide)


def _shares(examples: Examples, held_out: Rows, probabilities: Floats) -> dict[str, list[float]]:
    """What model.json tells of the shares in which the source's validation rows are named.

    Where classes are weighed, or confused, they are not those of the labels.
    """
    val = _labelled_val(examples, held_out)
    if not val.any():
        return {}
    return {"shares": [round(float(share), 4) for share in probabilities[val].mean(axis=0)]}


def _labelled_val(examples: Examples, held_out: Rows) -> NDArray[np.bool_]:
    """Which of these rows are validation rows with a label."""
    mask: NDArray[np.bool_] = np.isin(held_out, examples.rows("val"))
    return mask


def _unadapted(recipe: Recipe) -> dict[str, Any]:
    """What model.json tells of a model that should be adapted, and could not be yet."""
    if recipe.train.method != "domain_adaptation":
        return {}
    reason = f"no row of {recipe.validate_.target_domain} has come yet, so there was nothing to adapt to"
    return {"adaptation": None, "reason": reason}
