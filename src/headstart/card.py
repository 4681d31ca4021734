"""The model card: what a model is for, what it is worth, and where it must not be trusted.

Goes in: a recipe, its outputs, and the metrics of ``evaluate``. Comes out: the text of a Hugging Face model
card, Markdown under YAML. Never measures anything, and never uploads.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from headstart import evaluation, registry, sources
from headstart.calibration import Decision
from headstart.layout import Layout
from headstart.recipe import Recipe

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# As the hub calls what is measured.
HUB_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "macro_f1": "f1",
    "auroc": "roc_auc",
}
METHODS = {
    "feature_extraction": "The backbone is frozen; a linear head is trained on its features.",
    "fine_tune": "The backbone is trained together with a linear head.",
    "domain_adaptation": "A linear head is fitted for the domain {target}, whose labels are not used, from "
    "the labels of other domains.",
    "source_free": "A registered model went on learning from rows of the domain {target}, without a label "
    "and without the rows that it had learned from.",
}


def card(recipe: Recipe, layout: Layout, metrics: dict[str, Any]) -> str:
    """The card of the model in the tree.

    Args:
        recipe: of the model.
        layout: where its outputs lie: ``model.json``, ``spec.json``, the manifest's ``report.json``.
        metrics: the content of ``metrics.json``.
    """
    model = json.loads((layout.model / "model.json").read_text(encoding="utf-8"))
    spec = json.loads((layout.weights / "spec.json").read_text(encoding="utf-8"))
    found = json.loads((layout.manifest / "report.json").read_text(encoding="utf-8"))
    blind = evaluation.predictions(layout.model, layout.truth)[2]
    parts = [
        f"# {recipe.name}",
        *_use(recipe, model["classes"], metrics),
        *_data(recipe, spec, found),
        *_method(recipe, spec, model),
        *_figures(recipe, metrics, blind),
        *_limits(recipe, model, metrics, found, blind),
        *_loading(recipe),
        *_lineage(layout, model),
    ]
    head = _front_matter(recipe, spec, metrics, blind)
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _front_matter(
    recipe: Recipe, spec: dict[str, Any], metrics: dict[str, Any], blind: bool
) -> ModelCardData:
    """What the hub files the model under. A base model is named only if the hub has it."""
    from huggingface_hub import ModelCardData

    source = re.fullmatch(r"hf:(.+)@[0-9a-f]{40}", spec["source"])
    known = {_slug(licence): None for licence in (spec["licence"], recipe.ingest.licence) if licence}
    several = len(known) > 1
    return ModelCardData(
        license="other" if several else next(iter(known), None),
        license_name="-and-".join(known) if several else None,
        base_model=source[1] if source else None,
        pipeline_tag=_task(recipe),
        library_name="mlflow",
        tags=["headstart", recipe.train.method, spec["architecture"]],
        model_name=recipe.model_name,
        eval_results=None if blind else _results(recipe, metrics),
    )


def _slug(licence: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")


def _task(recipe: Recipe) -> str:
    return f"{recipe.modality}-classification"


def _results(recipe: Recipe, metrics: dict[str, Any]) -> list[EvalResult]:
    """The test metrics, and each domain's accuracy."""
    from huggingface_hub import EvalResult

    domains = metrics["test_by_domain"]
    measured = [(None, metric, metrics["test"][metric]) for metric in HUB_METRICS]
    if len(domains) > 1:
        measured += [(domain, "accuracy", m["accuracy"]) for domain, m in domains.items()]
    return [
        EvalResult(
            task_type=_task(recipe),
            dataset_type=recipe.name,
            dataset_name=recipe.name if domain is None else f"{recipe.name}, {domain}",
            dataset_config=domain,
            dataset_split="test",
            metric_type=HUB_METRICS[metric],
            metric_name=evaluation.TITLES[metric],
            metric_value=value["value"],
        )
        for domain, metric, value in measured
        if value["value"] is not None
    ]


def _use(recipe: Recipe, classes: list[str], metrics: dict[str, Any]) -> list[str]:
    domains = list(metrics["test_by_domain"])
    where = f" of the domain {_listed(domains)}" if len(domains) == 1 and domains != ["all"] else ""
    where = f" of the domains {_listed(domains)}" if len(domains) > 1 else where
    return [
        "## Intended use",
        f"Names the class of {recipe.modality}s{where}: {_listed(classes)}.",
        f"Not for {recipe.modality}s of another kind, nor for classes that are not in this list: it names "
        "one of them whatever it is given. Where a mistake harms somebody, a person should look at what "
        "it says.",
    ]


def _data(recipe: Recipe, spec: dict[str, Any], found: dict[str, Any]) -> list[str]:
    splits = ", ".join(f"{found['by_split'].get(split, 0):,} {split}" for split in ("train", "val", "test"))
    return [
        "## Data and licences",
        f"{found['rows']:,} rows in {found['groups']:,} groups ({splits}); rows of one group are in one "
        "split.",
        "| | source | licence |\n|---|---|---|\n"
        f"| data | `{sources.redacted(recipe.ingest.source)}` | {recipe.ingest.licence or 'not stated'} |\n"
        f"| pretrained weights | `{sources.redacted(spec['source'])}` | {spec['licence'] or 'not stated'} |",
        "Both licences bear on the model.",
    ]


def _method(recipe: Recipe, spec: dict[str, Any], model: dict[str, Any]) -> list[str]:
    method: str = recipe.train.method
    if model.get("adaptation", "") is None:
        method = "fine_tune" if recipe.train.tune else "feature_extraction"
    elif recipe.train.source_free:
        method = "source_free"
    words = [
        f"Backbone: {spec['architecture']} of {spec['library']}.",
        METHODS[method].format(target=_plain(recipe.validate_.target_domain or "")),
    ]
    if model.get("adaptation", "") is None:
        words.append(f"It is not adapted to another domain: {model['reason']}.")
    elif recipe.train.tune:
        words.append("The backbone was fine-tuned on the source domains first.")
    if model.get("adaptation"):
        words.append(f"Adapted by `{model['adaptation']}`: {model['reason']}.")
    if (heat := model.get("temperature", 1.0)) != 1:
        words.append(f"Probabilities are calibrated on validation rows, by a temperature of {heat:.2f}.")
    decision = Decision.of(model)
    if decision.costs != Decision.likeliest(len(model["classes"])).costs:
        words.append("It names the class that is expected to cost least, not always the likeliest.")
    return ["## Method", " ".join(words)]


def _figures(recipe: Recipe, metrics: dict[str, Any], blind: bool) -> list[str]:
    test = metrics["test"]
    warning = [evaluation.UNKNOWN.format(recipe.validate_.target_domain)] if blind else []
    overall = [f"| {title} | {_measured(test[metric])} |" for metric, title in evaluation.TITLES.items()]
    domains = [
        f"| {_plain(name)} | {m['rows']:,} | {_measured(m['accuracy'])} "
        f"| {_measured(m['balanced_accuracy'])} | {_measured(m['auroc'])} | {m['majority']:.3f} |"
        for name, m in metrics["test_by_domain"].items()
    ]
    return [
        "## Metrics",
        *warning,
        f"On {test['rows']:,} test rows in {test['groups']:,} groups, with {recipe.evaluate.confidence:.0%} "
        "intervals that resample whole groups.",
        "\n".join(
            [
                "| metric | test |",
                "|---|---|",
                *overall,
                f"| accuracy of always naming the commonest class | {test['majority']:.3f} |",
            ]
        ),
        "\n".join(
            [
                "| domain | rows | accuracy | balanced accuracy | AUROC | commonest class |",
                "|---|---|---|---|---|---|",
                *domains,
            ]
        ),
    ]


def _limits(
    recipe: Recipe, model: dict[str, Any], metrics: dict[str, Any], found: dict[str, Any], blind: bool
) -> list[str]:
    test, domains = metrics["test"], metrics["test_by_domain"]
    confidence = recipe.evaluate.confidence
    lines = []
    if not evaluation.beats_the_commonest(test, confidence):
        fewest = evaluation.fewest_to_show(confidence)
        why = f": fewer than {fewest} groups of test rows cannot show it" if test["groups"] < fewest else ""
        lines.append(f"It is not shown to be better than always naming the commonest class{why}.")
    if few := [
        name for name, m in {"the test rows": test, **domains}.items() if m["groups"] < evaluation.FEW_GROUPS
    ]:
        lines.append(
            f"Fewer than {evaluation.FEW_GROUPS} groups: {_listed(few)}. The intervals there are rough."
        )
    worst = min(domains, key=lambda name: domains[name]["accuracy"]["value"])
    if len(domains) > 1:
        lines.append(
            f"It is weakest on {_plain(worst)}: an accuracy of {domains[worst]['accuracy']['value']:.3f}."
        )
    if domains and list(domains) != ["all"]:
        lines.append(f"Nothing is known of other domains than {_listed(list(domains))}.")
    if recipe.validate_.target_domain and not blind:
        lines.append(
            "No label of the target domain chose anything; the figures above are measured with them."
        )
    lines.append(
        f"Stated probabilities are off by {test['ece']['value']:.3f} on average on rows like these, and by "
        "more on others."
    )
    lines += [
        f"It has not seen what was left out of the data: {_plain(reason)}." for reason in found["left_out"]
    ]
    if recipe.modality == "text":
        lines.append(f"It reads the first {recipe.features.max_tokens} tokens of a text.")
    if (least := Decision.of(model).abstain) is not None:
        lines.append(
            "It abstains, with an empty label, where the class that it would name has a probability below "
            f"{least:g}."
        )
    return ["## Limits", "\n".join(f"- {line}" for line in lines)]


def _loading(recipe: Recipe) -> list[str]:
    name, column = recipe.model_name, recipe.modality
    given = '"What a fine start."' if column == "text" else 'open("picture.jpg", "rb").read()'
    return [
        "## How to load it",
        f"```sh\nheadstart predict {name} {'texts.csv' if column == 'text' else 'pictures/'}\n```",
        "```python\nimport mlflow, pandas as pd\n\n"
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
        f'model.predict(pd.DataFrame({{"{column}": [{given}]}}))\n```',
    ]


def _lineage(layout: Layout, model: dict[str, Any]) -> list[str]:
    tags = registry.lineage(layout, model)
    dirty = ", with changes that are not committed" if tags["headstart.git_dirty"] == "true" else ""
    told = {
        "git commit": f"`{commit}`{dirty}" if (commit := tags["headstart.git_commit"]) else None,
        "data in DVC, md5": _code(tags.get("headstart.dvc_data")),
        "manifest, sha256": _code(tags.get("headstart.data")),
        "backbone, sha256": _code(tags.get("headstart.backbone")),
        "train block, sha256": _code(tags.get("headstart.recipe")),
        "seed": str(model["stamps"]["seed"]),
    }
    return ["## Lineage", "\n".join(f"- {name}: {said}" for name, said in told.items() if said)]


def _code(text: str | None) -> str | None:
    return text and f"`{text}`"


def _measured(metric: dict[str, float | None]) -> str:
    if metric["value"] is None:
        return "-"
    if metric["low"] is None or metric["high"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} ({metric['low']:.3f}-{metric['high']:.3f})"


def _listed(names: list[str]) -> str:
    names = [_plain(name) for name in names]
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _plain(name: str) -> str:
    """A user's name as text: neither Markdown nor HTML, and in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(name.split()))
