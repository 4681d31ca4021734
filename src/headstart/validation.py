"""Validate: raw files become a manifest, or a table of reasons why not.

Goes in: ``data/<recipe>/``. Comes out: ``manifest/<recipe>/`` with usable rows in group-safe, stable
splits, rows left out, texts repaired, and counts. Either all rules hold or nothing is written. A row
is never dropped silently.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from headstart import adapters, duplicates, progress, schemas, splits
from headstart.errors import HeadstartError
from headstart.layout import Layout, written_whole
from headstart.recipe import Recipe, Validate

EARLIER_SPLITS = ".splits.parquet"
COLUMNS = ["id", "label", "confidence", "weight", "domain", "group", "split", "digest"]
SHOWN_PER_RULE = 20
DECODERS = 2  # Pillow decodes without holding the interpreter's lock


def validate(recipe: Recipe, layout: Layout) -> None:
    """Write ``manifest/<recipe>/`` as docs/reference/files.md describes it.

    Raises:
        HeadstartError: a rule is broken; the table shows at most 20 rows a rule, and all of them are
            in ``.headstart/<recipe>/failures.parquet``.
    """
    options = recipe.validate_
    frame = _completed(adapters.read(layout.raw, options))
    content = "text" if "text" in frame else "path"
    if content == "path":
        thumbnails, broken = _pictures(layout.raw, frame, options)
        _refuse(broken, layout)
        keys = frame["digest"]
    else:
        frame["digest"] = frame["text"].map(lambda text: hashlib.sha256(text.encode()).hexdigest())
        keys = frame["text"].map(duplicates.normalised)
    usable = frame["left_out"].isna().to_numpy()
    kept = frame[usable].reset_index(drop=True)
    if kept.empty:
        raise HeadstartError(
            "no row is usable", where=str(layout.raw), table=_reasons(frame), do="check the data and the adapter"
        )
    _refuse(schemas.failures(kept, options), layout)

    pairs = {"duplicate_pairs": duplicates.exact(keys[usable].tolist())}
    if options.near_duplicates:
        near = (
            duplicates.near_texts(kept["text"].tolist())
            if content == "text"
            else duplicates.near_pictures(thumbnails[usable])
        )
        pairs["near_duplicate_pairs"] = near
    kept, repeated = _in_splits(kept, np.concatenate(list(pairs.values())), options, layout)
    classes = options.classes or sorted(set(kept["label"]))
    _refuse(schemas.split_failures(kept, options, classes), layout)

    left_out = pd.concat([frame[~usable], repeated])[["id", "left_out", content]]
    left_out = left_out.rename(columns={"left_out": "reason", content: "value"}).sort_values("id")
    mended = frame[frame["original"].notna()] if content == "text" else frame.iloc[:0].assign(text="")
    repaired = mended[["id", "original", "text"]].rename(columns={"original": "before", "text": "after"})
    manifest = kept[[COLUMNS[0], content, *COLUMNS[1:]]].sort_values("id")
    manifest = manifest.astype({"confidence": "float32", "weight": "float32"})
    report = {
        "rows": len(manifest),
        "by_split": _counts(manifest, ["split"]),
        "by_split_and_label": _counts(manifest, ["split", "label"]),
        "by_split_and_domain": _counts(manifest, ["split", "domain"]),
        "left_out": {str(reason): int(n) for reason, n in left_out["reason"].value_counts().sort_index().items()},
        "repaired": len(repaired),
        "groups": int(manifest["group"].nunique()),
        **{name: len(found) for name, found in pairs.items()},
    }
    with written_whole(layout.manifest) as folder:
        tables = {"manifest": manifest, "left_out": left_out, "repaired": repaired.sort_values("id")}
        for name, table in tables.items():
            table.reset_index(drop=True).to_parquet(folder / f"{name}.parquet", index=False)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _completed(frame: pd.DataFrame) -> pd.DataFrame:
    """The adapter's frame with every optional column filled in."""
    filled = frame.copy()
    if "id" not in filled:
        filled["id"] = filled["path"] if "path" in filled else _content_ids(filled)
    for column in ("left_out", "original", "split"):
        if column not in filled:
            filled[column] = None
    filled["split"] = filled["split"].astype(object).where(filled["split"].notna(), None)
    domain = filled["domain"] if "domain" in filled else pd.Series(None, index=filled.index, dtype=object)
    filled["domain"] = domain.astype(object).where(domain.notna() & (domain != ""), "all").astype(str)
    group = filled["group"] if "group" in filled else pd.Series(None, index=filled.index, dtype=object)
    filled["group"] = group.astype(object).where(group.notna() & (group != ""), filled["id"]).astype(str)
    for column in ("confidence", "weight"):
        filled[column] = filled[column].astype(float) if column in filled else 1.0
    filled["digest"] = ""
    return filled


def _content_ids(frame: pd.DataFrame) -> pd.Series:
    """An id from the row's own content: a row inserted above it does not change it."""
    domain = frame["domain"].fillna("").astype(str) if "domain" in frame else ""
    keys = domain + "\0" + frame["text"]
    base = keys.map(lambda key: hashlib.blake2b(key.encode(), digest_size=8).hexdigest())
    repeat = base.groupby(base).cumcount()
    return base + repeat.map(lambda n: f"-{n + 1}" if n else "")


def _pictures(raw: Path, frame: pd.DataFrame, options: Validate) -> tuple[np.ndarray, pd.DataFrame]:
    """Open every usable picture: digest into the frame, thumbnails uint8 [n, 32, 32], and what is broken."""
    thumbnails = np.zeros((len(frame), duplicates.THUMBNAIL, duplicates.THUMBNAIL), np.uint8)
    digests = [""] * len(frame)
    broken: list[dict[str, str]] = []
    positions = np.flatnonzero(frame["left_out"].isna())
    paths = frame["path"].tolist()

    def look(position: int) -> None:
        found = _look(raw / paths[position], options.min_image_side, thumbnails[position])
        if isinstance(found, dict):
            broken.append({"id": paths[position], **found})
        else:
            digests[position] = found

    with ThreadPoolExecutor(DECODERS) as pool:
        for _ in progress.bar(
            pool.map(look, positions), total=len(positions), desc="checking images", unit="images"
        ):
            pass
    frame["digest"] = digests
    table = pd.DataFrame(sorted(broken, key=lambda b: (b["rule"], b["id"])), columns=["rule", "id", "value", "do"])
    return thumbnails, table


def _look(path: Path, min_side: int, thumbnail: np.ndarray) -> dict[str, str] | str:
    """Digest of a picture's bytes, its thumbnail written in place; or the rule that it breaks."""
    import io

    from PIL import Image

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {"rule": "file_exists", "value": "no such file", "do": "add the file, or delete its row"}
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if min(image.size) < min_side:
                size = f"{image.width} x {image.height}"
                return {"rule": "large_enough", "value": size, "do": f"at least {min_side} pixels a side"}
            side = duplicates.THUMBNAIL
            thumbnail[:] = np.asarray(image.convert("RGB").convert("L").resize((side, side), Image.Resampling.BOX))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return {"rule": "decodes", "value": str(error)[:80], "do": "replace or delete the file"}
    return hashlib.sha256(data).hexdigest()


def _in_splits(
    kept: pd.DataFrame, pairs: duplicates.Pairs, options: Validate, layout: Layout
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows with groups merged over duplicates and a split each, and rows left out for their sake.

    Splits that the data themselves give stay as they are; a row that repeats one in a more protected
    split is left out, so that what the test measures is not what training has seen.
    """
    given = kept["split"]
    if given.isna().all():
        kept = kept.assign(group=duplicates.merge(kept["group"], pairs))
        earlier_file = layout.raw / EARLIER_SPLITS
        earlier = pd.read_parquet(earlier_file).set_index("id")["split"].to_dict() if earlier_file.exists() else {}
        shares = options.splits.model_dump()
        return kept.assign(split=splits.assign(kept, shares, options.seed, earlier)), kept.iloc[:0]
    rank = given.map(splits.PROTECTED).fillna(0).to_numpy(int)
    first, second = pairs[:, 0], pairs[:, 1]
    repeats = np.concatenate([first[rank[first] < rank[second]], second[rank[second] < rank[first]]])
    dropped = np.zeros(len(kept), bool)
    dropped[repeats] = True
    repeated = kept[dropped].assign(left_out="repeats a row of a more protected split")
    still = ~(dropped[first] | dropped[second])
    renumbered = np.cumsum(~dropped) - 1
    kept = kept[~dropped].reset_index(drop=True)
    own_group = kept["group"]
    kept = kept.assign(group=duplicates.merge(own_group, renumbered[pairs[still]]))
    if not (kept["split"] == "val").any():
        pool = kept["split"] == "train"
        share = options.splits.val / (options.splits.train + options.splits.val)
        cut = splits.assign(kept[pool], {"train": 1 - share, "val": share}, options.seed)
        kept.loc[pool, "split"] = cut
    return kept, repeated


def _counts(frame: pd.DataFrame, columns: list[str]) -> dict[str, int]:
    sizes = frame.groupby(columns).size()
    return {"/".join([key] if isinstance(key, str) else key): int(n) for key, n in sizes.items()}


def _reasons(frame: pd.DataFrame) -> list[str]:
    return [f"{n} rows: {reason}" for reason, n in frame["left_out"].value_counts().items()]


def _refuse(failures: pd.DataFrame, layout: Layout) -> None:
    """Raise if there are failures, with a readable table and the full list as a file."""
    if failures.empty:
        return
    path = layout.work / "failures.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    failures.astype(str).to_parquet(path, index=False)
    table = []
    for rule, cases in failures.groupby("rule", sort=True):
        table.append(f"{rule}: {len(cases)} failure{'s' if len(cases) > 1 else ''}; {cases['do'].iloc[0]}")
        table += [f"  {case.id:.60}: {case.value:.60}" for case in cases.head(SHOWN_PER_RULE).itertuples()]
        if len(cases) > SHOWN_PER_RULE:
            table.append(f"  ... and {len(cases) - SHOWN_PER_RULE} more")
    raise HeadstartError(
        "the data are not fit to train on",
        where=f"data/{layout.recipe}; every failure: {path}",
        table=table,
        do="mend the data at their source and run again; nothing was written",
    )
