"""The command line. Every heavy import stands inside a command, so ``--help`` answers at once."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart import __version__, environment
from headstart.errors import HeadstartError
from headstart.stages import ERROR_FILE

if TYPE_CHECKING:
    from headstart.features import Item
    from headstart.layout import Layout
    from headstart.recipe import Recipe

app = typer.Typer(
    help="A new head on a pretrained start: transfer learning that retrains itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[str, typer.Argument(help="A registered model; by default named like its recipe.")]
RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as recipes/sentiment.yaml.")]


def main() -> None:
    """Entry point: runs a command; an error that the user can mend is printed, not traced."""
    # Nearly all that is loaded stays: to walk through it again for each quarter more is a tenth of a start.
    gc.set_threshold(*gc.get_threshold()[:2], 1000)
    try:
        app()
    except HeadstartError as error:
        told = os.environ.get(ERROR_FILE)  # whoever set it prints what is in it, once
        if not told or not Path(told).exists():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the same command continues where it can", file=sys.stderr)
        sys.exit(130)
    finally:
        # At its end Python would walk through all that is alive: more than a second with Prefect loaded.
        gc.freeze()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"headstart {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no chatter.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    if quiet:
        os.environ["HEADSTART_QUIET"] = "1"
    environment.keep_to_quota()  # before torch is loaded, which counts the cores once
    for chatty in ("alembic", "dvc", "httpx", "mlflow", "timm"):
        logging.getLogger(chatty).setLevel("WARNING")


def _opened(path: Path) -> tuple[Recipe, Layout]:
    """The recipe and the folders of its project, which becomes the working directory."""
    from headstart.layout import Layout
    from headstart.recipe import load

    chosen = load(path)
    root = environment.project_root(path.parent)
    if path.resolve() != (root / "recipes" / path.name).resolve():
        raise HeadstartError(
            "a recipe lies in its project's folder recipes/",
            where=str(path),
            do=f"move it to {root / 'recipes'}, where dvc.yaml looks for it",
        )
    environment.prepare(root)
    os.chdir(root)
    return chosen, Layout(root, chosen.name)


def _log_plainly() -> None:
    """Messages alone, for commands without Prefect; with it, Prefect's own format says which task speaks."""
    level = "WARNING" if environment.quiet() else "INFO"
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)


@app.command()
def run(
    recipes: Annotated[list[Path], typer.Argument(help="One or more recipes, run in turn.")],
    force: Annotated[bool, typer.Option("--force", help="Run every stage, stale or not.")] = False,
) -> None:
    """From raw data to a judged model: take in new data, run what is stale, register, promote, report.

    What is already up to date is not done again.
    """
    # Every recipe's mistakes are found before the first one runs for an hour.
    opened = [_opened(path) for path in [path.resolve() for path in recipes]]
    if len({layout.root for _, layout in opened}) > 1:
        raise HeadstartError("the recipes belong to different projects", do="run each project on its own")
    from headstart import temporary

    server = None if temporary.configured(Path.cwd()) else temporary.Server()
    from flows.retrain import retrain

    if server:
        for needed in ("dvc.repo.reproduce", "mlflow.store.tracking.sqlalchemy_store"):
            importlib.import_module(needed)  # while the server does the same
        server.wait()
    outcomes = [retrain(recipe=chosen.name, force=force) for chosen, _ in opened]
    logging.getLogger("prefect").setLevel("WARNING")  # the outcome is the last line, not a server's farewell
    for outcome in outcomes:
        print(outcome)


@app.command()
def ingest(recipe: RecipePath) -> None:
    """Bring the raw data into data/ and version them: what `dvc repro` needs to start from."""
    _log_plainly()
    chosen, layout = _opened(recipe)
    from tasks.ingest import bring

    print(f"data/{chosen.name}: {bring(chosen, layout, logging.getLogger('headstart').info)}")


@app.command()
def receive(recipe: RecipePath) -> None:
    """Take new batches from the inbox into data/ and version them; a bad one is rejected with its reasons."""
    _log_plainly()
    chosen, layout = _opened(recipe)
    from tasks.receive import take

    def rejected(name: str, reasons: HeadstartError) -> None:
        print(f"error: {reasons}", file=sys.stderr)

    received = take(chosen, layout, logging.getLogger("headstart").info, rejected, wait=True)
    print(received)
    raise typer.Exit(int(bool(received.rejected)))


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="validate, fetch, features, train or evaluate.")],
    recipe: RecipePath,
) -> None:
    """Run one stage, whether or not it is stale: what dvc.yaml calls."""
    from headstart import stages

    _log_plainly()
    stages.run(name, *_opened(recipe))


@app.command()
def evaluate_protocol(
    recipe: RecipePath,
    folds: Annotated[int, typer.Option(min=2, help="Folds of the cross-validation.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, with other folds where groups allow.")] = 1,
    random_folds: Annotated[
        bool, typer.Option("--random-folds", help="Ignore groups: leaks; only to compare with papers.")
    ] = False,
) -> None:
    """Cross-validate a recipe on all its rows: mean and interval over group-safe folds."""
    from headstart import protocols

    _log_plainly()
    chosen, layout = _opened(recipe)
    rows = protocols.cross_validate(chosen, layout, folds, seeds, random_folds)
    print(protocols.format_table(rows))


@app.command()
def evaluate_adaptation(
    recipe: RecipePath,
    folds: Annotated[int, typer.Option(min=2, help="Parts of each target that are held out in turn.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, with other folds where groups allow.")] = 1,
) -> None:
    """Adapt from every domain to every other as if that had no labels: what it gains, what was expected."""
    from headstart import protocols

    _log_plainly()
    chosen, layout = _opened(recipe)
    print(protocols.format_pairs(protocols.adapt_each_pair(chosen, layout, folds, seeds)))


@app.command()
def find_learning_rate(
    recipe: RecipePath,
    steps: Annotated[int, typer.Option(min=10, help="Steps to try, each at a higher rate.")] = 100,
) -> None:
    """Try rising learning rates on a recipe that fine-tunes: suggests one, and plots loss over rate."""
    from headstart import examples, fitting, rates

    _log_plainly()
    chosen, layout = _opened(recipe)
    if chosen.train.method != "fine_tune":
        raise HeadstartError("nothing here learns at a rate", where="train.method", do="set it to fine_tune")
    rows = examples.load(chosen, layout)
    tuning, _ = fitting.begin(chosen, layout, rows, rows.rows("train"), rows.rows("val"))
    table = rates.sweep(tuning, steps=steps)
    layout.work.mkdir(parents=True, exist_ok=True)
    picture = layout.work / "learning_rate.png"
    rates.plot(table, picture)
    found = rates.keys(tuning, rates.suggested(table))
    said = ", ".join(f"train.{name}: {rate:.1e}" for name, rate in found.items())
    print(f"{said}, see {picture.relative_to(layout.root)}")


@app.command()
def models(
    name: Annotated[str, typer.Argument(help="A registered model; without it, all are listed.")] = "",
    history: Annotated[bool, typer.Option("--history", help="Every decision, oldest first.")] = False,
) -> None:
    """The versions of a model: aliases, quality, data and the latest decision about each."""
    from headstart import promotion

    _anywhere()
    client = promotion.opened()
    if not name:
        lines: list[dict[str, object]] = [
            {"model": model, "champion": promotion.champion_of(client, model) or "none"}
            for model in promotion.models(client)
        ]
        print(_columns(lines) if lines else "no model is registered yet")
    elif history:
        promotion.newest(client, name)  # or there is no such model
        for entry in promotion.history(client, name):
            print(f"{entry.number:>4}  version {entry.version}  {entry}  [{entry.by}]")
    else:
        print(_columns(promotion.table(client, name)))


@app.command()
def promote(
    name: ModelName,
    version: Annotated[str, typer.Argument(help="By default the candidate.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Without proof; needs --because.")] = False,
    because: Annotated[str, typer.Option(help="Why, for the history.")] = "",
) -> None:
    """Make a version the champion, if it is shown to be better than the one there is.

    Exits with 1 if it is not champion after that.
    """
    from headstart import promotion, trials

    _log_plainly()
    _anywhere()
    if not force:
        decided = trials.decide(*_recipe_of(name), version or None)
        print(decided)
        raise typer.Exit(int(decided.champion != decided.version))
    if not because:
        raise HeadstartError(
            "a promotion without proof needs a reason", do='add --because "...", which the history keeps'
        )
    client = promotion.opened()
    newest = str(promotion.newest(client, name).version)
    chosen = version or promotion.aliases(client, name).get(promotion.CANDIDATE, newest)
    promotion.tags(client, name, chosen)  # or there is no such version
    promotion.crown(client, name, chosen, [because], forced=True)
    print(f"{name} version {chosen} is champion, by force: {because}")


@app.command()
def rollback(
    name: ModelName,
    because: Annotated[str, typer.Option(help="Why, for the history.")] = "undone by hand",
) -> None:
    """Make the previous champion the champion again."""
    from headstart import promotion

    _anywhere()
    client = promotion.opened()
    promotion.newest(client, name)  # or there is no such model
    undone = promotion.rollback(client, name, because)
    print(f"{name}: {undone.reasons[-1]}, version {undone.version} was rolled back")


@app.command()
def compare(
    name: ModelName,
    first: Annotated[str, typer.Argument(help="A version or an alias.")],
    second: Annotated[str, typer.Argument(help="Another, to compare with.")],
) -> None:
    """Ask two versions the current test rows, and judge the first against the second. Changes nothing."""
    from headstart import promotion, trials

    _anywhere()
    recipe, layout = _recipe_of(name)
    aliases = promotion.aliases(promotion.opened(), name)
    verdict = trials.compare(recipe, layout, aliases.get(first, first), aliases.get(second, second))
    if verdict is None:
        raise HeadstartError("no test row has a label to judge by", where=str(layout.truth))
    for check in verdict.checks:
        print(f"{'holds' if check.passed else 'fails'}  {check.rule}: {check.words}")
    if verdict.by_domain:
        print(_columns([{"domain": d, "gain": f"{gain:+.3f}"} for d, gain in verdict.by_domain.items()]))
    would = "would be promoted" if verdict.promoted else "would not be promoted"
    print(f"{name} {first} {would} over {second}")


@app.command()
def predict(  # noqa: PLR0917  # by name, on the command line
    name: ModelName,
    inputs: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, tables, or - for lines from standard input."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="A .csv, .jsonl or .parquet file; without it, CSV is printed.")
    ] = None,
    version: Annotated[str, typer.Option(help="A version or an alias.")] = "champion",
    column: Annotated[
        str | None, typer.Option(help="Of tables: what to look at; by default text, or image, or path.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows read, answered and written at a time.")
    ] = None,
) -> None:
    """Label and probabilities of every row, however many there are; a row that cannot be read says why."""
    _anywhere()
    from headstart import models, scoring

    done = scoring.score(models.load(name, version), inputs, output, column, batch)
    if done.errors or not environment.quiet():
        print(done, file=sys.stderr)


@app.command()
def monitor(
    recipe: RecipePath,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders, patterns or tables; by default the batches that came since."),
    ] = None,
) -> None:
    """Compare recent rows with those that the champion knows: is there drift? Changes no model."""
    here = Path.cwd()
    chosen, layout = _opened(recipe)
    from headstart import drift_report, monitoring

    given = [os.path.join(here, each) for each in inputs or ()]  # noqa: PTH118  # a pattern is no path
    found = monitoring.monitor(chosen, layout, given)
    if isinstance(found, str):
        print(found)
        return
    page = drift_report.write(chosen, layout, found)
    monitoring.log(chosen, layout, found, page)
    print(f"{found}\nsee {page}")


@app.command()
def export(
    name: ModelName,
    onnx: Annotated[bool, typer.Option("--onnx", help="As ONNX, checked against PyTorch.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="By default NAME-VERSION or NAME.onnx in this folder.")
    ] = None,
    version: Annotated[str, typer.Option(help="A version or an alias.")] = "champion",
) -> None:
    """Write a model as the folder that MLflow loads it from, or as one file for other programs.

    A text model's one file has its tokenizer.json beside it.
    """
    _anywhere()
    from headstart import models

    here, loaded = Path.cwd(), models.load(name, version)  # what follows may go to the project's root
    if onnx:
        from headstart import onnx as form

        examples: list[Item] = []
        with contextlib.suppress(HeadstartError):  # outside of its project, made-up rows are compared
            examples = form.examples(*_recipe_of(name))
        made = form.export(loaded, here / (output or f"{name}.onnx"), examples)
    else:
        made = models.export(loaded, here / (output or f"{name}-{loaded.version}"))
    print(f"{name} version {loaded.version} is exported to {made}")


def _anywhere() -> None:
    """Settings of the project around the working directory; outside of one, the environment alone decides."""
    try:
        root = environment.project_root()
    except HeadstartError:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            raise
        root = Path.cwd()
    environment.prepare(root)


def _recipe_of(model: str) -> tuple[Recipe, Layout]:
    """The recipe that makes a model: its rules, and its test rows."""
    from headstart import recipe

    root = environment.project_root()
    made = [
        file for file in sorted((root / "recipes").glob("*.yaml")) if recipe.load(file).model_name == model
    ]
    if len(made) != 1:
        names = ", ".join(file.name for file in made)
        raise HeadstartError(
            f"{'several recipes make' if made else 'no recipe here makes'} the model {model}",
            where=names or str(root / "recipes"),
            do="a model is judged by the rules and the test rows of its recipe: `register: name:` says whose",
        )
    return _opened(made[0])


def _columns(lines: list[dict[str, object]]) -> str:
    """A table for a terminal."""
    texts = [list(lines[0]), *([_cell(value) for value in line.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in texts
    )


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-" if value is None else str(value)


@app.command()
def serve(
    name: ModelName,
    version: Annotated[str, typer.Option(help="A version or an alias.")] = "champion",
    host: Annotated[str, typer.Option(help="An address; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 5001,
) -> None:
    """A model over HTTP, as `mlflow models serve` has it, with a page to try it on and to see why."""
    _anywhere()
    from headstart import models, serving

    with serving.bound(host, port) as at:
        serving.serve(models.load(name, version), at, host)


@app.command()
def up(
    port: Annotated[int, typer.Option(help="Prefect's, for its page and for runs.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="MLflow's.")] = 5000,
) -> None:
    """Run everything by itself, on this machine: Prefect, MLflow, the deployments and a worker."""
    from headstart import stack

    root = environment.project_root()
    environment.prepare(root)
    stack.up(root, port, mlflow_port, lambda line: print(line, flush=True))


@app.command()
def deploy(
    notify: Annotated[
        str,
        typer.Option(
            envvar="HEADSTART_NOTIFY",
            help="Whom to tell of decisions and failures: an Apprise address, or a webhook. A password in it "
            "is better kept in the variable HEADSTART_NOTIFY: the list of processes shows options to all.",
        ),
    ] = "",
) -> None:
    """Set up what prefect.yaml describes on the configured Prefect server; as often as you like."""
    root = environment.project_root()
    environment.prepare(root)
    os.chdir(root)
    from tasks.deployments import deploy as set_up

    set_up(root, notify, print)


@app.command()
def report(recipe: RecipePath) -> None:
    """Write the report and the model card of what is in the tree now: one page that needs no network."""
    from headstart import registry, report, trials

    _log_plainly()
    chosen, layout = _opened(recipe)
    decided = trials.decided_about(chosen, registry.digest_of(layout))
    print(report.write(chosen, layout, decided.evidence if decided else None))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors and other programs."""
    from headstart.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    main()
