from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from headstart.card import card
from headstart.layout import Layout
from headstart.metrics import METRICS
from headstart.recipe import Recipe
from tests import cached

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EXPECTED = """\
---
base_model: an-owner/a-model
library_name: mlflow
license: other
license_name: apache-2.0-and-cc-by-nc-sa-4.0
pipeline_tag: text-classification
tags:
- headstart
- feature_extraction
- bert
model-index:
- name: case
  results:
  - task:
      type: text-classification
    dataset:
      name: case
      type: case
      split: test
    metrics:
    - type: accuracy
      value: 0.9
      name: accuracy
    - type: balanced_accuracy
      value: 0.9
      name: balanced accuracy
    - type: f1
      value: 0.9
      name: macro F1
    - type: roc_auc
      value: 0.9
      name: AUROC
  - task:
      type: text-classification
    dataset:
      name: case, east
      type: case
      config: east
      split: test
    metrics:
    - type: accuracy
      value: 0.9
      name: accuracy
  - task:
      type: text-classification
    dataset:
      name: case, west
      type: case
      config: west
      split: test
    metrics:
    - type: accuracy
      value: 0.7
      name: accuracy
---

# case

## Intended use

Names the class of texts of the domains east and west: no and yes.

Not for texts of another kind, nor for classes that are not in this list: it names one of them whatever it \
is given. Where a mistake harms somebody, a person should look at what it says.

## Data and licences

1,000 rows in 500 groups (600 train, 200 val, 200 test); rows of one group are in one split.

| | source | licence |
|---|---|---|
| data | `file:anything` | CC BY-NC-SA 4.0 |
| pretrained weights | `hf:an-owner/a-model@0123456789abcdef0123456789abcdef01234567` | Apache-2.0 |

Both licences bear on the model.

## Method

Backbone: bert of transformers. The backbone is frozen; a linear head is trained on its features. \
Probabilities are calibrated on validation rows, by a temperature of 1.50. It names the class that is \
expected to cost least, not always the likeliest.

## Metrics

On 200 test rows in 100 groups, with 95% intervals that resample whole groups.

| metric | test |
|---|---|
| accuracy | 0.900 (0.850-0.950) |
| balanced accuracy | 0.900 (0.850-0.950) |
| macro F1 | 0.900 (0.850-0.950) |
| AUROC | 0.900 (0.850-0.950) |
| log-loss | 0.900 (0.850-0.950) |
| calibration error | 0.900 (0.850-0.950) |
| accuracy of always naming the commonest class | 0.600 |

| domain | rows | accuracy | balanced accuracy | AUROC | commonest class |
|---|---|---|---|---|---|
| east | 150 | 0.900 (0.850-0.950) | 0.900 (0.850-0.950) | 0.900 (0.850-0.950) | 0.600 |
| west | 50 | 0.700 (0.650-0.750) | 0.700 (0.650-0.750) | 0.700 (0.650-0.750) | 0.600 |

## Limits

- Fewer than 20 groups: west. The intervals there are rough.
- It is weakest on west: an accuracy of 0.700.
- Nothing is known of other domains than east and west.
- Stated probabilities are off by 0.900 on average on rows like these, and by more on others.
- It has not seen what was left out of the data: neutral.
- It reads the first 128 tokens of a text.
- It abstains, with an empty label, where the class that it would name has a probability below 0.6.

## How to load it

```sh
headstart predict case texts.csv
```

```python
import mlflow, pandas as pd

model = mlflow.pyfunc.load_model("models:/case@champion")
model.predict(pd.DataFrame({"text": ["What a fine start."]}))
```

## Lineage

- data in DVC, md5: `41e2.dir`
- manifest, sha256: `aaaa`
- backbone, sha256: `bbbb`
- train block, sha256: `cccc`
- seed: 3
"""


def measured(value: float, rows: int, groups: int) -> dict[str, Any]:
    """As ``evaluate`` writes it."""
    interval = {"value": value, "low": round(value - 0.05, 3), "high": round(value + 0.05, 3)}
    return dict.fromkeys(METRICS, interval) | {"rows": rows, "groups": groups, "majority": 0.6}


METRICS_FOUND: dict[str, Any] = {
    "val": measured(0.9, 200, 100),
    "test": measured(0.9, 200, 100),
    "test_by_domain": {"east": measured(0.9, 150, 90), "west": measured(0.7, 50, 10)},
}


def tree(
    root: Path,
    classes: tuple[str, str] = ("no", "yes"),
    labels: tuple[str, ...] | None = None,
    **weights: Any,
) -> Layout:
    """What the card reads of a project."""
    layout = Layout(root, "case")
    for folder in (layout.model, layout.weights, layout.manifest, layout.truth):
        folder.mkdir(parents=True)
    model = {
        "classes": classes,
        "temperature": 1.5,
        "decision": {"costs": [[0, 1], [3, 0]], "abstain": 0.6},
        "stamps": {"data": "aaaa", "backbone": "bbbb", "recipe": "cccc", "seed": 3},
    }
    (layout.model / "model.json").write_text(json.dumps(model))
    rows = pd.DataFrame({"id": ["a", "b"], "split": ["val", "test"], "label": labels or classes})
    rows = rows.assign(domain="east", group=rows["id"], **{f"p:{name}": 0.5 for name in classes})
    rows.to_parquet(layout.model / "predictions.parquet")
    pd.DataFrame({"id": [], "label": []}, dtype="str").to_parquet(layout.truth / "labels.parquet")
    spec = {"library": "transformers", "architecture": "bert", "licence": "Apache-2.0"}
    spec |= {"source": f"hf:an-owner/a-model@{COMMIT}"} | weights
    (layout.weights / "spec.json").write_text(json.dumps(spec))
    splits = {"train": 600, "val": 200, "test": 200}
    found = {"rows": 1000, "groups": 500, "by_split": splits, "left_out": {"neutral": 50}}
    (layout.manifest / "report.json").write_text(json.dumps(found))
    deps = f"    deps:\n    - {{path: data/{layout.recipe}, md5: 41e2.dir}}\n"
    (root / "dvc.lock").write_text(f"stages:\n  validate@{layout.recipe}:\n{deps}")
    return layout


def recipe(**blocks: Any) -> Recipe:
    return cached.recipe(**{"ingest": {"source": "file:anything", "licence": "CC BY-NC-SA 4.0"}} | blocks)


def test_the_whole_card_says_what_it_should(tmp_path: Path) -> None:
    assert card(recipe(), tree(tmp_path), METRICS_FOUND) == EXPECTED


def test_the_hub_can_read_the_card(tmp_path: Path) -> None:
    read = ModelCard(card(recipe(), tree(tmp_path), METRICS_FOUND)).data
    assert (read.base_model, read.pipeline_tag) == ("an-owner/a-model", "text-classification")
    assert read.eval_results is not None
    assert {(each.dataset_config, each.metric_type) for each in read.eval_results} == {
        *((None, metric) for metric in ("accuracy", "balanced_accuracy", "f1", "roc_auc")),
        ("east", "accuracy"),
        ("west", "accuracy"),
    }


@pytest.mark.parametrize(
    ("of_data", "of_weights", "named", "other"),
    [
        ("MIT", "MIT", "mit", None),
        (None, "BSD-3-Clause", "bsd-3-clause", None),
        ("CC BY 4.0", None, "cc-by-4.0", None),
        ("MIT", "Apache-2.0", "other", "apache-2.0-and-mit"),
        (None, None, None, None),
    ],
)
def test_the_licence_is_the_one_that_there_is_or_both(
    of_data: str | None, of_weights: str | None, named: str | None, other: str | None, tmp_path: Path
) -> None:
    chosen = recipe(ingest={"source": "file:anything", "licence": of_data})
    read = ModelCard(card(chosen, tree(tmp_path, licence=of_weights), METRICS_FOUND)).data
    assert (read.license, read.license_name) == (named, other)


def test_weights_that_are_not_of_the_hub_name_no_base_model(tmp_path: Path) -> None:
    text = card(recipe(), tree(tmp_path, source="pip:some-package==1.0#model"), METRICS_FOUND)
    assert ModelCard(text).data.base_model is None
    assert "`pip:some-package==1.0#model`" in text


def test_a_card_carries_no_secret(tmp_path: Path) -> None:
    chosen = recipe(ingest={"source": "https://user:password@example.com/data.zip"})
    text = card(chosen, tree(tmp_path), METRICS_FOUND)
    assert "example.com/data.zip" in text
    assert "password" not in text


def test_names_from_the_data_are_neither_markdown_nor_html(tmp_path: Path) -> None:
    layout = tree(tmp_path, classes=("<script>", "*bold*|\n# heading"))
    text = card(recipe(), layout, METRICS_FOUND)
    assert "\\<script\\>" in text
    assert "\\*bold\\*\\| \\# heading" in text


def test_a_model_that_is_not_shown_to_be_better_than_the_commonest_class_says_so(tmp_path: Path) -> None:
    poor = METRICS_FOUND | {"test": measured(0.62, 200, 100)}
    said = card(recipe(), tree(tmp_path), poor)
    assert "not shown to be better than always naming the commonest class." in said


@pytest.mark.parametrize(("groups", "shown"), [(2, False), (5, False), (6, True)])
def test_a_handful_of_groups_does_not_show_that_a_model_is_better(
    groups: int, shown: bool, tmp_path: Path
) -> None:
    said = card(recipe(), tree(tmp_path), METRICS_FOUND | {"test": measured(0.9, 200, groups)})
    assert ("commonest class: fewer than 6 groups of test rows cannot show it" in said) != shown
    assert ("not shown" in said) != shown


def test_without_labels_of_the_target_no_result_is_claimed(tmp_path: Path) -> None:
    chosen = recipe(
        validate={"adapter": "table", "target_domain": "west"}, train={"method": "domain_adaptation"}
    )
    layout = tree(tmp_path)
    rows = pd.read_parquet(layout.model / "predictions.parquet")
    hidden = rows.assign(id=["c", "d"], label="", domain="west")
    pd.concat([rows, hidden]).to_parquet(layout.model / "predictions.parquet")
    text = card(chosen, layout, METRICS_FOUND)
    assert "Too few labels of the target domain, west, are known" in text
    assert ModelCard(text).data.eval_results is None
