"""Validate: raw files become a manifest, or a table of reasons why not.

Goes in: ``data/<recipe>/``, the source's files and the batches that came after. Comes out:
``manifest/<recipe>/`` with usable rows in group-safe, stable splits, rows left out, texts repaired, and
counts. Either all rules hold or nothing is written. A row is never dropped silently.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headstart import adapters, batches, duplicates, environment, images, progress, schemas, splits
from headstart.errors import HeadstartError
from headstart.layout import EARLIER_SPLITS, HIDDEN, Layout, written_whole
from headstart.recipe import Recipe, Validate

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
COLUMNS = ["id", "label", "confidence", "weight", "domain", "group", "split", "digest", "batch"]
OPTIONAL = ["id", "domain", "group", "split", "left_out", "original", "place"]
REPEATS = "repeats a row of a more protected split"
ALIEN = "of a domain that is neither source nor target"
TIES = "repeats earlier rows of another split"
SHOWN_PER_RULE = 20
PICTURES_AT_ONCE = 1000
# Of a 16-bit picture the upper eight bits count. Cameras and scanners with 8 or 12 bits fill files of 16 from
# below: values that all end below an eighth of the range leave at most 32 of 256 greys. One picture may be
# that dark; if all of them are, hardly anything in them would be seen.
DEEPEST, LOW_RANGE = 65535, 1 << 13
# A class is far off in a split if its rows differ by more than a quarter, and by more than 5, from what
# the class's share of all rows would give.
FAR_OFF, FAR_OFF_ROWS = 0.25, 5


def validate(recipe: Recipe, layout: Layout) -> None:
    """Write ``manifest/<recipe>/`` as docs/reference/files.md describes it.

    Raises:
        HeadstartError: a rule is broken; the table shows at most 20 rows a rule, and all of them are
            in ``.headstart/<recipe>/failures.parquet``.
    """
    options = recipe.validate_
    frame = completed(batches.everything(layout, options))
    frame = labelled_late(frame, batches.late_labels(layout))
    frame, truth = _put_aside(frame, options)
    usable = frame["left_out"].isna().to_numpy()
    kept = frame[usable].reset_index(drop=True)
    if kept.empty:
        raise HeadstartError(
            "no row is usable",
            where=str(layout.raw),
            table=[f"{n} rows: {reason}" for reason, n in frame["left_out"].value_counts().items()],
            do="check the data and the adapter",
        )
    content = _Content.of(kept, layout.raw, options)
    broken = [schemas.failures(kept, options), _spelt_twice(kept["label"], options), content.broken]
    _refuse(pd.concat(broken), layout)
    kept["digest"] = content.digests
    code = pd.factorize(pd.Series(content.keys))[0]
    pairs = content.pairs(code, near=options.near_duplicates)
    counts = {name: len(found) for name, found in pairs.items()}
    counts["duplicates_with_another_label"] = _contradictions(kept["label"], pairs["duplicate_pairs"])

    kept, repeated = _in_splits(
        kept, code, np.concatenate(list(pairs.values())), options, _earlier(layout, kept)
    )
    classes = options.classes or sorted(set(kept["label"]) - {HIDDEN})
    _refuse(schemas.split_failures(kept, options, classes), layout)
    kept = _given_back(kept, truth, options)

    left_out = pd.concat([frame[~usable], repeated])[["id", "left_out", content.column]]
    left_out = left_out.rename(columns={"left_out": "reason", content.column: "value"})
    repaired = frame.loc[frame["original"].notna(), ["id", "original", content.column]]
    repaired = repaired.rename(columns={"original": "before", content.column: "after"})
    manifest = kept[[COLUMNS[0], content.column, *COLUMNS[1:]]]
    report = {
        "rows": len(manifest),
        "by_split": _counts(manifest, "split"),
        "by_split_and_label": _counts(manifest, "split", "label"),
        "by_split_and_domain": _counts(manifest, "split", "domain"),
        "far_off": _far_off(manifest),
        "left_out": _counts(left_out, "reason"),
        "repaired": len(repaired),
        "groups": int(manifest["group"].nunique()),
        **counts,
        **content.told,
    }
    _write(layout, {"manifest": manifest, "left_out": left_out, "repaired": repaired}, truth, report)


def _write(
    layout: Layout, tables: dict[str, pd.DataFrame], truth: pd.DataFrame, report: dict[str, Any]
) -> None:
    """Write the tables, each sorted by id and then by all else, the labels put aside, and the report."""
    manifest = tables["manifest"]
    with written_whole(layout.truth) as folder:
        truth = truth[truth["id"].isin(manifest["id"])].sort_values("id", ignore_index=True)
        truth.astype("str").to_parquet(folder / "labels.parquet", index=False)
    with written_whole(layout.manifest) as folder:
        for name, table in tables.items():
            typed = table.astype({c: "float32" if c in ("confidence", "weight") else "str" for c in table})
            # Ids are unique among the usable rows alone.
            by = ["id"] if name == "manifest" else [str(column) for column in typed]
            typed.sort_values(by, ignore_index=True).to_parquet(folder / f"{name}.parquet", index=False)
        (folder / "report.json").write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def completed(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the source and of batches with every optional column filled in, and strings as strings."""
    content = "text" if "text" in frame else "path"
    filled = pd.DataFrame({"batch": frame["batch"]}, index=frame.index)
    for column in ("label", content, *OPTIONAL):
        values = frame[column].tolist() if column in frame else [None] * len(frame)
        as_text = str if column in {content, "original"} else adapters.as_text
        strings = [None if pd.isna(value) else as_text(value) for value in values]
        filled[column] = pd.Series(strings, dtype="str", index=frame.index)
    filled["label"] = filled["label"].replace("", None)  # in a manifest that is a label put aside
    unlabelled = filled["label"].isna() & filled["left_out"].isna() & (filled["batch"] != "")
    # Of the source this is a fault, of a batch it is not.
    filled.loc[unlabelled, "left_out"] = adapters.NO_LABEL
    filled["domain"] = filled["domain"].replace("", None).fillna("all")
    filled["id"] = filled["id"].replace("", None)
    filled["place"] = filled["id"].fillna(filled["place"])
    if filled["id"].isna().any():
        filled["id"] = filled["id"].fillna(filled["path"] if content == "path" else _content_ids(filled))
        filled["place"] = filled["place"].fillna(filled["id"])
    # Apart from the names that are given, lest row 7 joins group 7.
    alone = filled["id"] if filled["group"].isna().all() else "row " + filled["id"]
    filled["group"] = filled["group"].replace("", None).fillna(alone)
    some = filled.groupby("batch")["split"].transform("count") > 0
    filled.loc[some & filled["split"].isna(), "split"] = "none"
    for column in ("confidence", "weight"):
        given = pd.to_numeric(frame[column], errors="coerce") if column in frame else 1.0
        filled[column] = pd.Series(given, index=frame.index, dtype="float64")
    return filled


def _spelt_twice(labels: pd.Series, options: Validate) -> pd.DataFrame:
    """A failure for each class that is a whole number, and elsewhere the same number with a fraction.

    Tables of texts hold both where one of them was written by a program that turns a column with a gap into
    floats.
    """
    names = set() if options.classes else set(labels.dropna())  # the recipe says what is a class
    twice = sorted(name for name in names if re.fullmatch(r"-?\d+\.0", name) and name[:-2] in names)
    do = "write it in one way, or name all classes in `validate: classes:`"
    cases = [("one_spelling", "", f"{name[:-2]} and {name}", do) for name in twice]
    return pd.DataFrame(cases, columns=schemas.COLUMNS)


def named(frame: pd.DataFrame, labels: pd.DataFrame) -> list[list[int]]:
    """Positions of the rows that each ``id`` names: the row's own, or else its path within its batch.

    What an id named when it came it names for ever: where labels have a column ``after``, the batches of rows
    that were there by then, rows of others are not looked at.
    """
    whole, within = defaultdict(list), defaultdict(list)
    of_row = frame["batch"].tolist()
    for i, (row, batch) in enumerate(zip(frame["id"], of_row, strict=True)):
        whole[row].append(i)
        if batch:
            within[row.removeprefix(f".batches/{batch}/")].append(i)
    found = []
    after = labels["after"].tolist() if "after" in labels else [None] * len(labels)
    lists = {id(there): there for there in after}  # the labels of one batch share theirs
    among = {key: {"", *(of_row if there is None else there)} for key, there in lists.items()}
    for name, there in zip(labels["id"], after, strict=True):
        both = ([i for i in rows.get(name, []) if of_row[i] in among[id(there)]] for rows in (whole, within))
        found.append(next(filter(None, both), []))
    return found


def labelled_late(frame: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """The rows with labels that came in batches of their own; a row that is gone needs none."""
    if labels.empty:
        return frame
    known, left_out = frame["label"].tolist(), frame["left_out"].tolist()
    for rows, label in zip(named(frame, labels), labels["label"], strict=True):
        if len(rows) == 1 and pd.isna(known[rows[0]]):
            known[rows[0]] = label
            if left_out[rows[0]] == adapters.NO_LABEL:
                left_out[rows[0]] = None
    columns = {"label": known, "left_out": left_out}
    return frame.assign(**{name: pd.Series(said, dtype="str") for name, said in columns.items()})


def _given_back(kept: pd.DataFrame, truth: pd.DataFrame, options: Validate) -> pd.DataFrame:
    """The rows with so many labels of the target's training rows as the recipe asks for.

    A hash decides which, so that more of them are a superset.
    """
    labels = dict(zip(truth["id"], truth["label"], strict=True))
    could = kept.loc[(kept["split"] == "train") & kept["id"].isin(truth["id"]), "id"]
    order = sorted(could, key=lambda name: hashlib.sha256(f"{options.seed}-{name}".encode()).digest())
    given = kept["id"].isin(order[: options.target_labels])
    return kept.assign(label=kept["label"].mask(given, kept["id"].map(labels)))


def _put_aside(frame: pd.DataFrame, options: Validate) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows without the target domain's labels, and a table of those: ``id``, ``label``.

    Whatever else would tell of a label goes with it: the raters' doubt, and a weight made from it.
    """
    target = options.target_domain
    if target is None:
        return frame, pd.DataFrame({"id": [], "label": []}, dtype="str")
    names = sorted(set(frame["domain"]))
    sources = options.source_domains or [name for name in names if name != target]
    # Where the recipe names the sources, rows of the target may be yet to come.
    needed = {*sources} if options.source_domains else {target, *sources}
    if unknown := sorted(needed - set(names)):
        raise HeadstartError(
            f"no row is of the domain {', '.join(unknown)}",
            where="validate.target_domain, validate.source_domains",
            do=f"domains here: {', '.join(names)}",
        )
    if target in sources:
        raise HeadstartError(
            f"{target} is both source and target",
            where="validate.source_domains",
            do="name a domain on one side only",
        )
    frame = frame.copy()
    alien = ~frame["domain"].isin([target, *sources]) & frame["left_out"].isna()
    frame.loc[alien, "left_out"] = ALIEN
    hidden = (frame["domain"] == target) & (
        frame["left_out"].isna() | (frame["left_out"] == adapters.NO_LABEL)
    )
    truth = frame.loc[hidden & frame["label"].notna(), ["id", "label"]]
    usable = frame["domain"].isin(sources) & frame["left_out"].isna()
    classes = options.classes or set(frame.loc[usable, "label"].dropna())
    if classes and (strange := sorted(set(truth["label"]) - set(classes))):
        raise HeadstartError(
            f"labels that are no class: {', '.join(strange)}",
            where=f"rows of the domain {target}",
            do="correct these labels, or add them to validate.classes",
        )
    frame.loc[hidden, ["label", "confidence", "weight", "left_out"]] = HIDDEN, 1.0, 1.0, None
    return frame, truth


def _content_ids(frame: pd.DataFrame) -> pd.Series:
    """An id from the row's own content: a row inserted above it does not change it.

    The label is not part of it, so that a corrected label leaves a row in its split. Rows with the same
    content are numbered in the order they came, and within a batch in the order of what else they say.
    """
    keys = frame["domain"] + "\0" + frame["text"].fillna("")
    base = keys.map(lambda key: hashlib.blake2b(key.encode(), digest_size=8).hexdigest())
    came = pd.factorize(frame["batch"])[0]
    repeated = frame.assign(base=base, came=came)[base.duplicated(keep=False)]
    number = repeated.sort_values(["base", "came", "label", "group", "split"]).groupby("base").cumcount()
    number = number[number > 0] + 1
    base.loc[number.index] += "-" + number.astype(str)
    return base


@dataclass(frozen=True)
class _Content:
    """What rows hold: texts, or pictures."""

    column: str
    digests: list[str]  # hex sha256
    keys: list[str]  # the same for what counts as the same
    broken: pd.DataFrame  # failures
    thumbnails: np.ndarray | None = None  # of pictures
    told: dict[str, object] = field(default_factory=dict)  # in the report

    @classmethod
    def of(cls, rows: pd.DataFrame, raw: Path, options: Validate) -> _Content:
        """Look at all of them."""
        if "text" in rows:
            texts = rows["text"].fillna("").tolist()
            digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
            keys = [duplicates.normalised(text) for text in texts]
            return cls("text", digests, keys, pd.DataFrame(columns=schemas.COLUMNS))
        seen = look_at(raw, rows["path"].fillna("").tolist(), options.min_image_side)
        told: dict[str, object] = {"modes": seen.modes, "first_frame_only": seen.animated}
        return cls("path", seen.digests, seen.digests, seen.broken, seen.thumbnails, told)

    def pairs(self, code: Ints, *, near: bool) -> dict[str, duplicates.Pairs]:
        """Rows that are the same, and those that are nearly so; ``code`` is the same for the same content."""
        found = {"duplicate_pairs": duplicates.exact(self.keys)}
        if near:
            alike = (
                duplicates.near_texts(self.keys)
                if self.thumbnails is None
                else duplicates.near_pictures(self.thumbnails)
            )
            found["near_duplicate_pairs"] = alike[code[alike[:, 0]] != code[alike[:, 1]]]
        return found


def _contradictions(labels: pd.Series, pairs: duplicates.Pairs) -> int:
    """How many of these pairs have two labels that are known and differ."""
    label = labels.to_numpy()
    first, second = label[pairs[:, 0]], label[pairs[:, 1]]
    return int(((first != HIDDEN) & (second != HIDDEN) & (first != second)).sum())


@dataclass
class Pictures:
    """What opening every picture once has shown, in the order of the rows."""

    digests: list[str]
    thumbnails: np.ndarray  # uint8 [n, 32, 32]
    broken: pd.DataFrame
    modes: dict[str, int]
    animated: int  # pictures of several frames, of which the first counts


def look_at(raw: Path, paths: list[str], min_side: int) -> Pictures:
    """Open every picture, once; of 16-bit ones the range that all of them use is looked at as well."""
    side = duplicates.THUMBNAIL
    thumbnails = np.zeros((len(paths), side, side), np.uint8)
    digests: list[str] = []
    broken = []
    deep: list[int] = []  # largest values of pictures with 16 bits
    modes: Counter[str] = Counter()
    animated = 0
    with (
        ThreadPoolExecutor(environment.cores()) as pool,  # Pillow decodes without the interpreter's lock
        progress.bar(total=len(paths), desc="checking images", unit="images") as shown,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pillow's, of large pictures and odd palettes: both are fine
        for start in range(0, len(paths), PICTURES_AT_ONCE):
            batch = paths[start : start + PICTURES_AT_ONCE]
            looks = pool.map(lambda path: _look(raw / path, min_side), batch)
            for i, (path, look) in enumerate(zip(batch, looks, strict=True), start):
                shown.update()
                if isinstance(look, Look):
                    thumbnails[i] = look.thumbnail
                    modes[look.mode] += 1
                    animated += look.frames > 1
                    deep += [] if look.largest is None else [look.largest]
                else:
                    broken.append((look[0], path, *look[1:]))
                digests.append(look.digest if isinstance(look, Look) else "")
    if deep and (largest := max(deep)) < LOW_RANGE:
        factor = (DEEPEST + 1) >> max(8, largest.bit_length())
        found = f"values of {len(deep)} 16-bit pictures end at {largest} of {DEEPEST}"
        broken.append(
            ("full_range", "", found, f"save them with 8 bits, or multiply their values by {factor}")
        )
    table = pd.DataFrame(broken, columns=schemas.COLUMNS)
    return Pictures(digests, thumbnails, table, dict(sorted(modes.items())), animated)


@dataclass
class Look:
    """One sound picture."""

    digest: str
    thumbnail: np.ndarray
    mode: str
    frames: int
    largest: int | None = None  # value, if it has 16 bits


def _look(path: Path, min_side: int) -> Look | tuple[str, str, str]:
    """Digest and thumbnail of a picture; or the rule that it breaks, the value, and what to do."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        data = path.read_bytes()
    except OSError as error:
        return "file_exists", str(error.strerror).lower(), "add the file, or delete its row"
    replace = "replace or delete the file"
    try:
        with images.opened(data) as image:
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            image.load()
            if min(image.size) < min_side:
                size = f"{image.width} x {image.height}"
                return "large_enough", size, f"at least {min_side} pixels a side"
            if mode == "F":  # nothing says which number is white
                return "known_mode", f"mode {mode}", "save the picture with 8 or 16 bits a channel"
            upright, largest = ImageOps.exif_transpose(image), None
            if mode.startswith("I"):  # 16 bits: Pillow itself would make everything above 255 white
                values = np.asarray(upright).astype(np.int64).clip(0, DEEPEST)
                largest = int(values.max())
                upright = Image.fromarray((values >> 8).astype(np.uint8))
            side = duplicates.THUMBNAIL
            grey = upright.convert("RGB").convert("L").resize((side, side), Image.Resampling.BILINEAR)
            return Look(hashlib.sha256(data).hexdigest(), np.asarray(grey), mode, frames, largest)
    except UnidentifiedImageError:
        return "decodes", f"not a picture ({len(data)} bytes)", replace
    except Exception as error:  # decoders raise what they like on a damaged file
        return "decodes", f"{error or type(error).__name__}"[:80], replace


def _earlier(layout: Layout, kept: pd.DataFrame) -> dict[str, str]:
    """Splits that rows had in the snapshots before this one.

    A row whose id is unknown, as of a picture that was moved to another class, has the most protected split
    that its content had under ids that are gone. A batch never moves an earlier row: there a group that is
    known goes before.
    """
    file = layout.raw / EARLIER_SPLITS
    if not file.exists():
        return {}
    table = pd.read_parquet(file)
    earlier = dict(zip(table["id"], table["split"], strict=True))
    if "digest" not in table:  # written by an older version
        return earlier
    gone = table[~table["id"].isin(kept["id"])].dropna(subset="digest")
    gone = gone.sort_values("split", key=lambda split: split.map(splits.PROTECTED), kind="stable")
    of_content = dict(zip(gone["digest"], gone["split"], strict=True))  # the last one counts
    known = kept["id"].isin(earlier)
    joins = (kept["batch"] != "") & kept["group"].isin(kept.loc[known, "group"])
    moved = kept[~known & ~joins & kept["digest"].isin(of_content)]
    return earlier | dict(zip(moved["id"], moved["digest"].map(of_content), strict=True))


def _in_splits(
    kept: pd.DataFrame, code: Ints, pairs: duplicates.Pairs, options: Validate, earlier: dict[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows with groups merged over duplicates and a split each, and rows left out for their sake.

    Splits that the data themselves give stay as they are; a row that repeats one in a more protected
    split is left out, so that what the test measures is not what training has seen. Of a source with only
    train and val, val is the held-out test, and validation rows are cut from train: a set that training
    looks at cannot also be the judge. With train alone, nothing is given. A batch gives what it names, and
    never moves an earlier row: its rows join the groups that they belong to, and what would tie two splits
    together is left out. What was held out once is not trained on because a batch says so.

    Args:
        kept: rows, in the order they came.
        code: int64 [rows], the same for the same content.
        pairs: rows that are the same, each with the first, or nearly so, the first of each content.
        options: says in what shares splits are dealt.
        earlier: splits of rows that were there before.
    """
    came, group = pd.factorize(kept["batch"])[0], pd.factorize(kept["group"])[0]
    batch = (kept["batch"] != "").to_numpy()
    given = kept["split"].copy()
    if not (given[~batch] == "test").any():
        given[~batch & (given == "val")] = "test"
    judged = np.where(batch, given.notna(), (given[~batch] == "test").any())
    # A group that came before has a split.
    fixed = judged & (came == pd.Series(came).groupby(group).transform("min").to_numpy())
    held = kept["id"].map(earlier).map(splits.PROTECTED) > given.map(splits.PROTECTED)
    fixed &= ~(batch & held.groupby(group).transform("any").to_numpy())

    own = np.where(fixed, given, kept["id"].map(earlier))
    rank = np.array([splits.PROTECTED.get(split, -1) for split in own])
    dropped = came > 0
    if came.any() or fixed.any():
        facts = _Known(came, code, group, rank, fixed)
        gone = _repeats(facts, pairs)
        pairs = _handed_on(pairs, code, gone)
        dropped = gone | _dropped(facts, pairs)
    reason = np.where(came > 0, TIES, REPEATS)[dropped]
    left_out = kept[dropped].assign(left_out=reason)
    still = ~dropped[pairs].any(axis=1)
    renumbered = np.cumsum(~dropped) - 1
    kept = kept.assign(split=given.where(fixed))[~dropped].reset_index(drop=True)
    kept = kept.assign(group=duplicates.merge(kept["group"], renumbered[pairs[still]]))

    train = kept["split"] == "train"
    source = kept["batch"] == ""
    pool = train & source & (not kept.loc[source, "split"].eq("val").any())
    if pool.any():
        share = options.splits.val / (options.splits.train + options.splits.val)
        learned = set(kept.loc[train & ~pool, "group"])
        open_to = dict.fromkeys(kept.loc[pool & kept["group"].isin(learned), "id"], "train")
        open_to |= {row: split for row, split in earlier.items() if split != "test"}
        kept.loc[pool, "split"] = splits.assign(
            kept[pool], {"train": 1 - share, "val": share}, options.seed, open_to
        )
        cut = set(kept.loc[pool & (kept["split"] == "val"), "group"])
        kept.loc[train & kept["group"].isin(cut), "split"] = "val"
    free = kept["split"].isna()
    if free.any():
        known = earlier | dict(kept.loc[~free, ["id", "split"]].to_numpy())
        dealt = splits.assign(kept, options.splits.model_dump(), options.seed, known)
        kept["split"] = kept["split"].fillna(dealt)
    return kept, left_out


@dataclass(frozen=True)
class _Known:
    """What is known of rows, in the order they came, before they are dealt into splits; [rows] each."""

    came: Ints  # in which batch, ascending; 0 is the source
    code: Ints  # the same for the same content
    group: Ints
    rank: Ints  # of the split that a row has, or -1
    fixed: Bools  # whether the data themselves give that split


def _repeats(known: _Known, pairs: duplicates.Pairs) -> Bools:
    """Which rows repeat one whose split is more protected, where the data gave both theirs together.

    The most protected come first, as a row that goes is repeated by nothing any more.
    """
    code, rank = known.code, known.rank
    gone, near = np.zeros(len(code), bool), np.unique(code[pairs], axis=0)
    near = near[near[:, 0] != near[:, 1]]
    rows = np.flatnonzero(known.fixed)
    rows = rows[np.argsort(known.came[rows], kind="stable")]
    marked = np.zeros(code.max() + 1, bool)  # by content; all unmarked again after each use
    for here in np.split(rows, np.flatnonzero(np.diff(known.came[rows])) + 1):
        marked[code[here]] = True
        alike = near[marked[near].all(axis=1)]
        marked[code[here]] = False
        for level in np.unique(rank[here])[::-1]:
            held = code[here[~gone[here] & (rank[here] == level)]]
            marked[held] = True
            reached = np.concatenate([held, *(one[marked[other]] for one, other in (alike.T, alike.T[::-1]))])
            marked[reached] = True
            gone[here[(rank[here] < level) & marked[code[here]]]] = True
            marked[reached] = False
    return gone


def _handed_on(pairs: duplicates.Pairs, code: Ints, gone: Bools) -> duplicates.Pairs:
    """The pairs without the rows that are ``gone``: the first that is left of a content stands for it."""
    first = np.full(code.max() + 1, -1)
    left = np.flatnonzero(~gone)[::-1]
    first[code[left]] = left
    moved = np.where(gone[pairs], first[code[pairs]], pairs)
    moved = moved[(moved >= 0).all(axis=1) & (moved[:, 0] != moved[:, 1])]
    ordered: duplicates.Pairs = np.unique(np.sort(moved, axis=1), axis=0)
    return ordered


def _dropped(known: _Known, pairs: duplicates.Pairs) -> Bools:
    """Which rows would tie groups of different splits together; bool [rows].

    Groups are joined pair by pair, in the order the rows came. Of a pair whose groups have different splits
    already, the less protected row goes if both were given theirs together, and else the later one, and with
    it whatever repeats it. Rows of the source whose splits were dealt are left to ``splits.assign``.
    """
    came, group, rank, fixed = known.came, known.group, known.rank, known.fixed
    split = np.full(group.max() + 1, -1)
    np.maximum.at(split, group, rank)
    joined = list(range(len(split)))

    def root(code: int) -> int:
        while joined[code] != code:
            joined[code] = code = joined[joined[code]]
        return code

    dropped = np.zeros(len(came), bool)
    for first, second in pairs[np.lexsort(pairs.T)]:
        if dropped[first] or dropped[second]:
            dropped[second] |= bool(came[second]) and known.code[first] == known.code[second]
            continue
        a, b = root(group[first]), root(group[second])
        if min(split[a], split[b]) >= 0 and split[a] != split[b]:
            if fixed[first] and fixed[second] and came[first] == came[second]:
                dropped[first if rank[first] < rank[second] else second] = True
                continue
            if came[second]:
                dropped[second] = True
                continue
        split[a] = max(split[a], split[b])
        joined[b] = a
    return dropped


def _counts(frame: pd.DataFrame, *columns: str) -> dict[str, int]:
    sizes = frame.groupby(list(columns)).size().reset_index()
    return {"/".join(key): int(n) for *key, n in sizes.to_numpy()}


def _far_off(manifest: pd.DataFrame) -> list[str]:
    """Where a class's share of a split is far from its share of the whole, in words."""
    counts = pd.crosstab(manifest["split"], manifest["label"])
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / len(manifest)
    off = np.abs(counts.to_numpy() - expected)
    far = (off > FAR_OFF * expected) & (off > FAR_OFF_ROWS)
    return [
        f"{counts.index[i]}: {counts.iloc[i, j]} rows of {counts.columns[j]}, {expected[i, j]:.0f} expected"
        for i, j in np.argwhere(far)
    ]


def _refuse(failures: pd.DataFrame, layout: Layout) -> None:
    """Raise if there are failures, with a readable table and the full list as a file."""
    if failures.empty:
        return
    failures = failures.astype("str").sort_values("rule", kind="stable", ignore_index=True)
    path = layout.work / "failures.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    failures.to_parquet(path.with_suffix(".partial"), index=False)
    path.with_suffix(".partial").replace(path)
    raise HeadstartError(
        "the data are not fit to train on",
        where=f"data/{layout.recipe}; every failure: {path}",
        table=shown(failures),
        do="mend the data at their source and run again; nothing was written",
    )


def shown(failures: pd.DataFrame) -> list[str]:
    """Lines of a table: each rule, and at most 20 cases of it."""
    table = []
    for rule, cases in failures.groupby("rule", sort=True):
        table.append(f"{rule}: {len(cases)} failure{'s' if len(cases) > 1 else ''}; {cases['do'].iloc[0]}")
        for case in cases[["id", "value"]].head(SHOWN_PER_RULE).to_numpy():
            # One line a case, whatever the value holds.
            table.append("  " + ": ".join(f"{' '.join(part.split()):.60}" for part in case if part))
        if len(cases) > SHOWN_PER_RULE:
            table.append(f"  ... and {len(cases) - SHOWN_PER_RULE} more")
    return table
