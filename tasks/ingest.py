"""Ingest: bring the source's bytes into ``data/<recipe>/`` and version them in ``data.dvc``.

Idempotent: a snapshot that came from the same bytes is left alone, and versioning unchanged
data is a no-op. Before a snapshot changes, the splits of the rows that are already there are
written down beside the data, so that newcomers never move them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from prefect import get_run_logger, task

from headstart import archives, sources
from headstart.errors import HeadstartError
from headstart.layout import EARLIER_SPLITS, Layout, sha256_of, written_whole
from headstart.recipe import Recipe
from tasks import versioning
from tasks.stage import PATIENT

# What this snapshot was made from: hidden, so that adapters pass over it, and versioned with the data.
ORIGIN = ".source.json"


@task(task_run_name="ingest", **PATIENT)
def ingest(recipe: Recipe, layout: Layout) -> str:
    """Make ``data/<recipe>`` what the recipe's source says; returns "fresh", "restored" or "ran"."""
    return bring(recipe, layout, get_run_logger().info)


def bring(recipe: Recipe, layout: Layout, log: Callable[[str], None]) -> str:
    """The task's body, for callers without Prefect.

    Raises:
        HeadstartError: the source cannot be had, or the snapshot would change while the splits of
            its earlier rows are not at hand.
    """
    with alone(layout, log):
        return brought(recipe, layout, log)


@contextlib.contextmanager
def alone(layout: Layout, log: Callable[[str], None]) -> Iterator[None]:
    """The right to change ``data/``: one at a time, as all recipes share data.dvc."""
    (layout.root / ".headstart").mkdir(exist_ok=True)
    lock = FileLock(layout.root / ".headstart" / "ingest.lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        log("another run is taking in data: waiting for it to end")
        held = lock.acquire()
    with held:
        versioning.forget_writers(layout.root)
        yield


def brought(recipe: Recipe, layout: Layout, log: Callable[[str], None]) -> str:
    """The same as ``bring``, for whoever has that right already."""
    list_recipe(layout)
    layout.work.mkdir(parents=True, exist_ok=True)
    outcome = "fresh"
    if not layout.raw.exists() and versioning.restore_data(layout.root, recipe.name, log):
        outcome = "restored"
    origin = _origin(recipe, layout)
    if not layout.raw.exists() or not _same(_recorded(layout), origin):
        uri, member = sources.split_fragment(recipe.ingest.source)
        path = sources.fetch(uri, recipe.ingest.sha256)
        if recipe.ingest.sha256 is None and not uri.startswith("file:"):
            log(f"to pin this source, add under ingest: sha256: {sources.digest_of(path)}")
        if layout.batches.exists():
            versioning.version_data(layout.root, recipe.name, log)  # a kill may leave them there alone
        with versioning.writing(layout.root, recipe.name, log), written_whole(layout.raw) as folder:
            earlier = earlier_splits(layout)  # no stage is making others now
            archives.place(path, member, folder)
            if layout.batches.exists():
                shutil.copytree(layout.batches, folder / layout.batches.name)
            if earlier is not None:
                (folder / EARLIER_SPLITS).write_bytes(earlier)
            (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
            if layout.batches.exists():
                unpushed(layout).touch()
        outcome = "ran"
    version(recipe, layout, log)
    return outcome


def version(recipe: Recipe, layout: Layout, log: Callable[[str], None]) -> bool:
    """Version what is in ``data/<recipe>``, and push it if it holds batches; whether it was pushed.

    A source can be fetched again, a batch cannot: a remote is where other machines find it.
    """
    versioning.version_data(layout.root, recipe.name, log)
    if not unpushed(layout).exists():
        return False
    try:
        pushed = versioning.push(layout.root, recipe.name, log)
    except HeadstartError as error:  # no reason to wait with the rest: the next run pushes them
        log(f"the data are versioned here, but not pushed: {error}")
        return False
    unpushed(layout).unlink()
    return pushed


def unpushed(layout: Layout) -> Path:
    """A mark that there are batches which no remote has."""
    return layout.work / "unpushed"


def unmonitored(layout: Layout) -> Path:
    """A mark that there are batches which nobody has compared with what the champion knows."""
    return layout.work / "unmonitored"


def list_recipe(layout: Layout) -> None:
    """Add the recipe to the list in params.yaml that ``dvc.yaml`` is spread over, if it is not there."""
    from ruamel.yaml import YAML  # keeps the file's comments

    path = layout.root / "params.yaml"
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    params = (yaml.load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}
    if not params.get("recipes"):
        params["recipes"] = []
    if layout.recipe not in params["recipes"]:
        params["recipes"].append(layout.recipe)
        partial = path.with_name(".params.yaml.partial")
        with partial.open("w", encoding="utf-8") as file:
            yaml.dump(params, file)
        partial.replace(path)


def _origin(recipe: Recipe, layout: Layout) -> dict[str, str | None]:
    """What the source is, as comparable facts: its URI, and the digest of bytes that may change."""
    uri, _ = sources.split_fragment(recipe.ingest.source)
    origin: dict[str, str | None] = {
        "source": sources.redacted(recipe.ingest.source),  # versioned and shared with the data
        "sha256": recipe.ingest.sha256,
    }
    if uri.startswith("file:"):
        origin["content"] = _digest(sources.fetch(uri, recipe.ingest.sha256), layout)
    elif "//" in uri and {"?", ";"} & set(uri):  # what follows them is redacted
        origin["address"] = sources.address_digest(uri)
    return origin


def _recorded(layout: Layout) -> dict[str, str | None]:
    path = layout.raw / ORIGIN
    recorded: dict[str, str | None] = {}
    return recorded | json.loads(path.read_text(encoding="utf-8")) if path.exists() else recorded


def _same(recorded: dict[str, str | None], origin: dict[str, str | None]) -> bool:
    """Whether a snapshot is from there; older ones say less of a query, or more."""
    if said := recorded.get("source"):
        recorded = recorded | {"source": sources.redacted(said)}
        if "address" in origin and "***" not in said:
            recorded["address"] = sources.address_digest(sources.split_fragment(said)[0])
    return recorded == {name: fact for name, fact in origin.items() if name != "address" or name in recorded}


def _digest(path: Path, layout: Layout) -> str:
    """Sha256 over names and contents; files are read again only when size or time of change differ."""
    state_file = layout.work / "source-state.json"
    state = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # cut short by a kill, it is made again
        state = json.loads(state_file.read_text(encoding="utf-8"))
    fresh: dict[str, list[object]] = {}
    whole = hashlib.sha256()
    for file in _files(path):
        status = file.stat()
        seen = [status.st_size, status.st_mtime_ns]
        known = state.get(str(file))
        digest = known[2] if known and known[:2] == seen else sha256_of(file)
        fresh[str(file)] = [*seen, digest]
        name = file.relative_to(path).as_posix() if file != path else file.name
        whole.update(f"{name}\0{digest}\n".encode("utf-8", "surrogateescape"))  # as the disk has the name
    state_file.parent.mkdir(parents=True, exist_ok=True)
    state_file.write_text(json.dumps(fresh), encoding="utf-8")
    return whole.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    yield from sorted(sources.files_of(path))


def earlier_splits(layout: Layout) -> bytes | None:
    """``id``, ``split`` and ``digest`` of every row so far as Parquet, or None before the first.

    Those of the present manifest, and of rows of earlier ones: what is missing today may be back tomorrow.

    Raises:
        HeadstartError: a snapshot was validated once, but its manifest is not here.
    """
    import pyarrow.parquet as pq

    manifest = layout.manifest / "manifest.parquet"
    lock = layout.root / "dvc.lock"
    validated = lock.exists() and f"validate@{layout.recipe}:" in lock.read_text(encoding="utf-8")
    if validated and not manifest.exists():  # as after a snapshot that was refused
        versioning.restore_stage(layout.root, f"validate@{layout.recipe}")
    kept = layout.raw / EARLIER_SPLITS
    if manifest.exists():
        import pyarrow as pa
        import pyarrow.compute as pc

        table = pq.read_table(manifest, columns=["id", "split", "digest"])
        if kept.exists():
            before = pq.read_table(kept)
            gone = before.filter(pc.invert(pc.is_in(before["id"], table["id"])))
            if gone.num_rows:
                table = pa.concat_tables([table, gone], promote_options="permissive").sort_by("id")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        return bytes(sink.getvalue())
    if validated and layout.raw.exists():
        raise HeadstartError(
            "the data would change, but the splits of the earlier rows are not here",
            where=str(manifest),
            do=f"run `dvc pull validate@{layout.recipe}` or `dvc checkout validate@{layout.recipe}` first",
        )
    return kept.read_bytes() if kept.exists() else None
