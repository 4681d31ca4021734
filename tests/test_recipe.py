"""A recipe says only what is meant: a typo never passes, and every fault is named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml

from headstart.adaptation import METHODS
from headstart.errors import HeadstartError
from headstart.recipe import Adaptation, Recipe, json_schema, load

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "recipes").glob("*.yaml"))  # those of a project that grew from this one as well
EXAMPLES = {"bert", "hymenoptera", "sentiment", "sentiment-movies-to-tweets", "sentiment-tuned"} | {
    f"solar-cells{kind}" for kind in ("", "-tuned", "-mono-to-poly", "-poly-to-mono")
}
GOOD = (ROOT / "recipes/sentiment.yaml").read_text(encoding="utf-8")
TUNED_TEXTS = (ROOT / "recipes/sentiment-tuned.yaml").read_text(encoding="utf-8")
TUNED_IMAGES = (ROOT / "recipes/solar-cells-tuned.yaml").read_text(encoding="utf-8")


def tuned(key: str, recipe: str) -> str:
    """A recipe that fine-tunes, with a key more."""
    assert "method: fine_tune\n" in recipe
    return recipe.replace("method: fine_tune\n", f"method: fine_tune\n  {key}\n")


def mistakes(tmp_path: Path, text: str, name: str = "mine.yaml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HeadstartError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_loads_and_an_example_opens_with_the_command_that_runs_it(path: Path) -> None:
    assert load(path).name == path.stem
    if path.stem in EXAMPLES:
        assert path.read_text(encoding="utf-8").startswith(f"# headstart run recipes/{path.name}\n")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_fits_the_published_schema(path: Path) -> None:
    published = json.loads((ROOT / "recipes/recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), published)


def test_the_schema_refuses_what_the_loader_refuses() -> None:
    wrong = yaml.safe_load(GOOD) | {"trian": {}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json_schema())


def test_an_unknown_key_names_the_nearest_valid_one(tmp_path: Path) -> None:
    text = mistakes(tmp_path, GOOD.replace("adapter:", "adaptor:"))
    assert "validate.adaptor: no such key. did you mean 'adapter'?" in text


def test_an_unknown_key_deep_inside_names_the_nearest_valid_one(tmp_path: Path) -> None:
    text = mistakes(tmp_path, GOOD.replace("adapter: vader", "adapter: vader\n  columns: {txt: body}"))
    assert "validate.columns.txt: no such key. did you mean 'text'?" in text


def test_a_missing_block_says_what_to_write(tmp_path: Path) -> None:
    assert "write `evaluate: {}`" in mistakes(tmp_path, GOOD.replace("evaluate: {}", ""))


def test_all_faults_are_shown_together(tmp_path: Path) -> None:
    text = mistakes(
        tmp_path, GOOD.replace("evaluate: {}", "evaluate: {confidence: 2}").replace("source:", "sauce:")
    )
    assert "evaluate.confidence" in text
    assert "ingest.sauce" in text


def test_values_that_nothing_could_be_made_of_are_refused(tmp_path: Path) -> None:
    text = mistakes(tmp_path, GOOD.replace("feature_extraction", "feature_extraction\n  l2: [1, 0]"))
    assert "train.l2.1: input should be greater than 0; got 0" in text
    text = mistakes(tmp_path, GOOD.replace("[negative, positive]", "[a, b, a]"))
    assert "validate.classes: one of them is named twice; got ['a', 'b', 'a']" in text


def test_choices_that_only_a_target_domain_gives_a_meaning_are_refused_without_one(tmp_path: Path) -> None:
    for key in ("source_domains: [movies]", "target_labels: 50"):
        text = mistakes(tmp_path, GOOD.replace("adapter: vader", f"adapter: vader\n  {key}"))
        assert "source_domains, target_labels: only with a `target_domain`" in text


def test_pixels_are_of_0_to_1(tmp_path: Path) -> None:
    given = "mean: [0.5, 0.5, 0.5]"
    assert given in TUNED_IMAGES
    text = mistakes(tmp_path, TUNED_IMAGES.replace(given, "mean: [123.675, 116.28, 103.53]"))
    assert "fetch.mean: of pixels in 0..1; divide what is of 0..255 by 255; got [123.675" in text
    text = mistakes(tmp_path, TUNED_IMAGES.replace(given, "mean: [-0.1, 0.5, 0.5]"))
    assert "fetch.mean.0: input should be greater than or equal to 0" in text
    text = mistakes(tmp_path, TUNED_IMAGES.replace("std: [0.5, 0.5, 0.5]", "std: [0.5, 0, 0.5]"))
    assert "fetch.std.1: input should be greater than 0; got 0" in text


@pytest.mark.parametrize("name", ["shop/moods", "moods:1", "", " ", "."])
def test_a_model_name_that_the_registry_would_refuse_after_training_is_refused_first(
    name: str, tmp_path: Path
) -> None:
    assert "register.name: string should match" in mistakes(tmp_path, f"{GOOD}\nregister: {{name: '{name}'}}")


@pytest.mark.parametrize("cost", ["-1", ".inf", ".nan"])
def test_a_cost_is_a_number_of_at_least_0(cost: str, tmp_path: Path) -> None:
    decide = f"decide: {{costs: {{negative: {{positive: {cost}}}}}}}"
    text = mistakes(tmp_path, GOOD.replace("feature_extraction", f"feature_extraction\n  {decide}"))
    assert "train.decide.costs.negative.positive: input should be" in text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("head_first: false\n  frozen_below: 50", "frozen_below: with `head_first: false`"),
        ("choose_by: last\n  patience: 2", "patience: with `choose_by: last`"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(keys: str, words: str, tmp_path: Path) -> None:
    assert words in mistakes(tmp_path, tuned(keys, TUNED_TEXTS))


def test_splits_that_do_not_sum_to_one_are_refused(tmp_path: Path) -> None:
    text = GOOD.replace("adapter: vader", "adapter: vader\n  splits: {train: 0.9, val: 0.2, test: 0.2}")
    assert "sum to 1.3, not 1" in mistakes(tmp_path, text)


def test_keys_of_fine_tuning_are_refused_where_nothing_is_fine_tuned(tmp_path: Path) -> None:
    train = "method: feature_extraction\n  epochs: 3\n  lora: 4\n  l2: [1.0]"
    text = mistakes(tmp_path, GOOD.replace("method: feature_extraction", train))
    assert "train: epochs, lora: only with `method: fine_tune`" in text


def test_keys_of_fine_tuning_are_refused_where_no_method_is_named(tmp_path: Path) -> None:
    text = mistakes(tmp_path, GOOD.replace("method: feature_extraction", "batch: 8"))
    assert "train: batch: only with `method: fine_tune`" in text


def test_going_on_without_a_source_asks_for_nothing_that_needs_one(tmp_path: Path) -> None:
    text = mistakes(tmp_path, tuned("source_free: entropy", TUNED_TEXTS))
    assert "source_free: only with `method: domain_adaptation`" in text
    train = "method: domain_adaptation\n  source_free: entropy\n  adaptation: coral"
    text = mistakes(tmp_path, GOOD.replace("method: feature_extraction", train))
    assert "source_free: there are no rows of a source" in text


def test_fine_tuning_without_packed_rows_says_what_to_write(tmp_path: Path) -> None:
    text = mistakes(tmp_path, GOOD.replace("feature_extraction", "fine_tune"))
    assert "needs `features: packed: true`" in text


def test_fine_tuning_with_packed_rows_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(tuned("lora: 4", TUNED_TEXTS), encoding="utf-8")
    assert load(path).train.lora == 4


def test_low_rank_additions_are_refused_for_pictures(tmp_path: Path) -> None:
    text = mistakes(tmp_path, tuned("lora: 4", TUNED_IMAGES))
    assert "train.lora: needs a backbone of `transformers`" in text


@pytest.mark.parametrize("key", ["mixup: 0.2", "augment: {horizontal_flip: true}"])
def test_what_is_done_to_pictures_is_refused_for_texts(key: str, tmp_path: Path) -> None:
    text = mistakes(tmp_path, tuned(key, TUNED_TEXTS))
    assert "train.augment, train.mixup: are for pictures, and these are texts" in text


def test_a_malformed_hash_is_refused(tmp_path: Path) -> None:
    assert "ingest.sha256" in mistakes(tmp_path, GOOD.replace("sha256: 5d7c", "sha256: XYZ"))


def test_text_that_is_not_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "line 2" in mistakes(tmp_path, "ingest:\n  source: a: b\n")


def test_a_recipe_means_what_dvc_reads_in_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace("[negative, positive]", "[no, yes]"), encoding="utf-8")
    assert load(path).validate_.classes == ["no", "yes"]
    text = mistakes(tmp_path, GOOD.replace("evaluate: {}", "evaluate: {}\nevaluate: {}"))
    assert 'found duplicate key "evaluate"' in text and "To suppress" not in text
    text = mistakes(tmp_path, GOOD.replace("evaluate: {}", "evaluate: {}\nregister: {name: a:b}"))
    assert "the recipe is not valid YAML" in text


def test_an_empty_recipe_is_refused(tmp_path: Path) -> None:
    assert "empty" in mistakes(tmp_path, "# nothing\n")


def test_a_name_that_mlflow_or_dvc_would_choke_on_is_refused(tmp_path: Path) -> None:
    assert "cannot be a recipe's name" in mistakes(tmp_path, GOOD, name="My Recipe.yaml")


def test_a_missing_recipe_names_the_nearest_one() -> None:
    with pytest.raises(HeadstartError, match="did you mean 'sentiment'"):
        load(ROOT / "recipes/sentimnt.yaml")


def test_texts_have_one_view(tmp_path: Path) -> None:
    text = mistakes(
        tmp_path, tuned("batch: 8", TUNED_TEXTS).replace("packed: true", "packed: true\n  views: 2")
    )
    assert "features.views: is for pictures, and these are texts" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("method: feature_extraction", "method: domain_adaptation"),
        ("adapter: vader", "adapter: vader\n  target_domain: tweets"),
    ],
)
def test_a_target_domain_and_adaptation_go_together(old: str, new: str, tmp_path: Path) -> None:
    assert "a target domain and `domain_adaptation` go together" in mistakes(tmp_path, GOOD.replace(old, new))


def test_a_way_to_adapt_is_refused_where_nothing_is_adapted(tmp_path: Path) -> None:
    text = GOOD.replace("method: feature_extraction", "method: feature_extraction\n  adaptation: coral")
    assert "adaptation, tune: only with `method: domain_adaptation`" in mistakes(tmp_path, text)


def test_every_way_to_adapt_can_be_chosen() -> None:
    assert list(get_args(Adaptation)) == list(METHODS)


@pytest.mark.parametrize(
    ("train", "backbone", "rows"),
    [
        ("method: fine_tune", "timm:resnet18", 100),
        ("method: fine_tune", "transformers:bert", 0),
        ("{method: fine_tune, frozen_below: 8}", "timm:resnet18", 8),
        ("{method: fine_tune, head_first: false}", "timm:resnet18", 0),  # there is no head to keep
        ("{method: feature_extraction}", "timm:resnet18", 0),
    ],
)
def test_few_pictures_keep_the_backbone_frozen(train: str, backbone: str, rows: int) -> None:
    made = Recipe.model_validate(
        {
            "ingest": {"source": "file:photos"},
            "validate": {"adapter": "table"},
            "fetch": {"backbone": backbone, "source": "file:weights"},
            "features": {"packed": True},
            "train": yaml.safe_load(train if train.startswith("{") else f"{{{train}}}"),
            "evaluate": {},
        }
    )
    assert made.frozen_below == rows
