"""Features: one pass of the frozen backbone over every row.

Goes in: the manifest, the raw images or texts, and the backbone. Comes out: ``features/<recipe>/``, an array
that training maps into memory, beside it, if the recipe says so, the pixels or tokens that the backbone was
given. A killed run continues where it was. Never reads a label.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from math import ceil, inf, prod
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
import torch._inductor.config
from numpy.typing import NDArray
from torch import Tensor, nn

from headstart import (
    augmentation,
    backbones,
    devices,
    earlier,
    environment,
    images,
    mojibake,
    packs,
    precision,
    texts,
)
from headstart.errors import HeadstartError, unmade
from headstart.layout import Layout, sha256_of, unwritable_named, written_whole
from headstart.packs import Pack, Rows, Sentences
from headstart.precision import Arithmetic
from headstart.progress import bar
from headstart.recipe import Features, Recipe

Item = str | bytes | Path
Form = tuple[tuple[int, ...], str]  # shape and dtype of an array

# Whose code decides what a row's vectors are. Of the others that the stage uses, `layout` and `earlier` move
# files about, and what `recipe` says is in the options.
MODULES = (
    "attention",
    "augmentation",
    "backbones",
    "devices",
    "features",
    "images",
    "mojibake",
    "packs",
    "precision",
    "texts",
)
# On a CPU a batch should stay in its caches, on a GPU it should fill it.
IMAGES_PER_BATCH = {"cpu": 8}
TOKENS_PER_BATCH = {"cpu": 4096}
ON_A_GPU = {"images": 256, "tokens": 65_536}
# torch.compile takes 5 to 15 s to start. It repays that after about so many rows, as `make bench-features`
# shows; the rule looks at rows and not at a clock, so that the same data give the same bytes.
COMPILE_FROM = {"image": 4_000, "text": 50_000}
FEWEST_TOKENS = 64  # of a batch; of 10 alone MiniLM's products in float32 add up in another order
READ_AHEAD = 1 << 31  # bytes; a GPU's batches are large, and its host may have a hundred cores to fill them
SAMPLE = 128  # rows that decide on the arithmetic: half of them to calibrate it, half to judge it
ROWS_PER_SHARD = 2_000  # some 10 s of work: the most that a kill costs
log = logging.getLogger(__name__)


class Reader(Protocol):
    """What one kind of item needs to become batches."""

    batches: list[Rows]
    smallest: int  # rows that a compiled network is at least given: other sizes would compile anew

    def read(self, rows: Rows) -> tuple[NDArray[Any], ...]:
        """The arrays of one batch, each [rows, ...]."""
        ...


class Images:
    """Reader of images: uint8 [rows, side, side, 3]."""

    def __init__(
        self, items: Sequence[Path | bytes], spec: backbones.Spec, options: Features, on: str
    ) -> None:
        self.items = items
        self.side = side_of(spec, options)
        self.interpolation = spec.preprocessing["interpolation"]
        self.smallest = IMAGES_PER_BATCH.get(on, ON_A_GPU["images"])
        self.batches = packs.cut(np.arange(len(items)), self.smallest)

    def apart(self, rows: Rows) -> list[Rows]:
        """These rows in batches in which no row's vector depends on the others, if they are filled up."""
        return packs.cut(rows, self.smallest)

    def least(self, rows: Rows) -> int:
        """Rows that a batch has to be filled up to for that."""
        return self.smallest

    def read(self, rows: Rows) -> tuple[NDArray[np.uint8]]:
        """Pixels of one batch."""
        pixels = np.empty((len(rows), self.side, self.side, 3), np.uint8)
        for place, row in enumerate(rows):
            images.read(self.items[row], self.side, self.interpolation, pixels[place])
        return (pixels,)


class Texts:
    """Reader of texts: token ids and mask, int64 [rows, longest]."""

    smallest = 2  # one row alone would be compiled as a case of its own

    def __init__(self, items: Sequence[str], tokenizer: Path, most: int, padding: int, on: str) -> None:
        self.padding = padding
        self.tokens = texts.tokenise(items, tokenizer, most)
        self.budget = TOKENS_PER_BATCH.get(on, ON_A_GPU["tokens"])
        self.batches = texts.batches(self.tokens.lengths, self.budget)

    def apart(self, rows: Rows) -> list[Rows]:
        """These rows in batches in which no row's vector depends on the others, if they are filled up."""
        return texts.of_one_length(self.tokens.lengths, rows, self.budget)

    def least(self, rows: Rows) -> int:
        """Rows that a batch has to be filled up to for that."""
        return max(self.smallest, ceil(FEWEST_TOKENS / max(1, int(self.tokens.lengths[rows[0]]))))

    def read(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask of one batch."""
        return self.tokens.padded(rows, self.padding)


class Packed:
    """Reader of rows that are packed: what ``Images`` and ``Texts`` read, without decoding or tokenising.

    Args:
        pack: all rows.
        rows: positions of those wanted; the reader's own rows count from 0.
        on: the type of the device.
    """

    def __init__(self, pack: Pack, rows: Rows, on: str) -> None:
        self.pack, self.rows = pack, rows
        if isinstance(pack, Sentences):
            self.smallest = Texts.smallest
            budget = TOKENS_PER_BATCH.get(on, ON_A_GPU["tokens"])
            self.batches = texts.batches(pack.tokens.lengths[rows], budget)
        else:
            self.smallest = IMAGES_PER_BATCH.get(on, ON_A_GPU["images"])
            self.batches = packs.cut(np.arange(len(rows)), self.smallest)

    def read(self, rows: Rows) -> tuple[NDArray[Any], ...]:
        """The arrays of one batch, pixels in three channels."""
        arrays = self.pack.batch(self.rows[rows])
        if isinstance(self.pack, Sentences):
            return arrays
        return (np.repeat(arrays[0], 3 // arrays[0].shape[-1], axis=-1),)


class Tapped(nn.Module):
    """A backbone behind its own preprocessing, that returns float32 [n, dim] of the layers wanted.

    Images come in as uint8 or float32 [n, side, side, 3], 0 to 255, or [n, side, side, 1] if they are grey;
    texts as ids and mask, int64 [n, tokens] each. Except in training mode, images are looked at in several
    ways if ``views`` says so.

    Raises:
        HeadstartError: a layer that the network does not have, or of which ``fetch`` keeps no weights.
    """

    def __init__(
        self, network: nn.Module, spec: backbones.Spec, layers: Sequence[str] | None, views: int = 1
    ) -> None:
        super().__init__()
        self.network, self.layers, self.views = network, layers, views
        self.pooling = spec.preprocessing.get("pooling")
        # Numbers and not buffers, so that no conversion of the network rounds them.
        self.mean, self.std = spec.preprocessing.get("mean"), spec.preprocessing.get("std")
        self.caught: dict[str, Tensor] = {}  # float32 [n, channels] of each layer wanted
        self.mask: Tensor | None = None
        known = dict(network.named_modules())
        if unknown := [name for name in layers or () if name not in known]:
            raise HeadstartError(
                f"{spec.architecture} has no layer {', '.join(unknown)}",
                where="features.layers",
                table=[f"did you mean {near}?" for near in get_close_matches(unknown[0], known, n=3)],
                do=f"its outermost layers are {', '.join(name for name, _ in network.named_children())}",
            )
        for name in layers or ():
            if spec.modality == "text" and f"{name}.".startswith("pooler."):
                raise HeadstartError(
                    f"the weights of {name} are not kept: a pooler is trained for another task",
                    where="features.layers",
                    do="name the last layer of the encoder, or leave features.layers out",
                )
            known[name].register_forward_hook(partial(self._catch, name))

    def _catch(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        # At once: what follows may change it in place. Of a layer that runs twice, the first time counts.
        first = output if isinstance(output, Tensor) else output[0]
        self.caught.setdefault(name, averaged(first, self.mask))
        # A compiler leaves out by itself what nobody asks for.
        if len(self.caught) == len(self.layers or ()) and not torch.compiler.is_compiling():
            raise _Enough

    def forward(self, first: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors of one batch."""
        if self.views == 1 or self.training:
            return self._seen(first, mask)
        parts = [self._seen(view, mask) for view in augmentation.views(first, self.views)]
        return torch.stack(parts).mean(dim=0)

    def _seen(self, first: Tensor, mask: Tensor | None) -> Tensor:
        if self.layers is None:
            return self._pooled(first, mask).float()
        self.mask = mask
        self.caught.clear()
        with contextlib.suppress(_Enough):
            self._pooled(first, mask)
        return torch.cat([self.caught.pop(name) for name in self.layers], dim=1)

    def _pooled(self, first: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            pixels = first.permute(0, 3, 1, 2).float()  # whose memory has the channels last already
            mean, std = (255 * pixels.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
            scaled = (pixels - mean) / std  # grey becomes three channels, and forgets their order in memory
            image: Tensor = self.network(scaled.contiguous(memory_format=torch.channels_last))
            return image
        tokens: Tensor = self.network(input_ids=first, attention_mask=mask)[0]
        return tokens[:, 0] if self.pooling == "cls" else averaged(tokens, mask)


class _Enough(Exception):  # noqa: N818  # it is no error
    """Every layer wanted has been reached."""


class Extractor:
    """A frozen backbone that turns items into vectors.

    Args:
        weights: a folder that ``fetch`` wrote.
        options: which layers to tap, and at what size.
        arithmetic: how to compute.
        compiled: use torch.compile; where that fails, as without a C++ compiler, the network runs as it is.

    Raises:
        HeadstartError: the backbone is missing, has no such layers, or does not take images of this size.
    """

    def __init__(
        self, weights: Path, options: Features, arithmetic: Arithmetic, compiled: bool = False
    ) -> None:
        self.weights, self.options = weights, options
        self.lock = Lock()  # a served model may be asked from several threads; hooks leave tensors on the way
        self.device = devices.device()
        network, self.spec = backbones.load(weights)
        self.padding = backbones.padding(network)
        if self.spec.modality == "image":
            side = side_of(self.spec, options)
            if foldable(network, options.layers):
                with self._options_named():
                    network = precision.folded(network, torch.zeros(1, 3, side, side))
            network = network.to(memory_format=torch.channels_last)
        tapped = Tapped(network, self.spec, options.layers, options.views).eval()
        self.network = precision.converted(tapped, arithmetic).to(self.device)
        self.compiled = None
        self.most = sys.maxsize  # rows that fit into the device's memory together, as far as is known
        self.dim = self._tried()
        if compiled:
            if self.spec.modality == "text" and self.device.type == "cpu":
                from headstart import attention

                attention.shorten(network)
            # Lays weights out for the CPU's matrix units, and fuses each layer with what follows it. Set for
            # the process: as an option of torch.compile (2.14) it is taken and does nothing.
            torch._inductor.config.freezing = True
            self.compiled = torch.compile(self.network, dynamic=self.spec.modality == "text")

    def _tried(self) -> int:
        """Dimensions of the vectors, from two blank rows: options that do not fit fail at once."""
        with self._options_named():
            blank = blank_rows(self.spec, self.options)
            _, dim = self.forward(*(tensor.to(self.device) for tensor in blank)).shape
        return int(dim)

    @contextlib.contextmanager
    def _options_named(self) -> Iterator[None]:
        """Turn a failure of the network on its first inputs into words."""
        try:
            yield
        except Exception as error:  # whatever the network's own code raises
            raise HeadstartError(
                f"{self.spec.architecture} does not run with these options",
                where="features",
                table=[f"layers: {self.options.layers}, image_size: {self.options.image_size}", _line(error)],
                do="take other features.layers or another features.image_size, or leave them out",
            ) from error

    def reader(self, items: Sequence[Item]) -> Images | Texts:
        """The items in batches, in an order that depends on nothing but them.

        Raises:
            HeadstartError: an item that is none of what the backbone reads.
        """
        text = self.spec.modality == "text"
        if aliens := [item for item in items if isinstance(item, str) != text]:
            raise HeadstartError(
                f"{self.spec.architecture} reads {self.spec.modality}s, not what is in these rows",
                where=f"{aliens[0]!r:.100}",
                do="give the model what it was trained on",
            )
        if text:
            most = min(self.options.max_tokens, self.spec.preprocessing["max_tokens"])
            written = [mojibake.mended(item) for item in items]  # type: ignore[arg-type]
            return Texts(written, self.weights / "tokenizer.json", most, self.padding, self.device.type)
        return Images(items, self.spec, self.options, self.device.type)  # type: ignore[arg-type]

    def __call__(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """float32 [items, dim], in the order of the items."""
        return self.read(self.reader(items))

    def read(self, reader: Reader) -> NDArray[np.float32]:
        """float32 [rows, dim] of all that a reader has."""
        found = np.empty((sum(map(len, reader.batches)), self.dim), np.float32)
        for rows, _, vectors in self.run(reader, reader.batches):
            found[rows] = vectors
        return found

    def run(
        self, reader: Reader, batches: Sequence[Rows], least: Callable[[Rows], int] | None = None
    ) -> Iterator[tuple[Rows, tuple[NDArray[Any], ...], NDArray[np.float32]]]:
        """Rows, what was read of them, and their vectors, float32 [rows, dim], batch by batch.

        For the network, a batch of fewer rows than ``least`` says is filled up.

        A GPU computes while the cores read on. On a CPU both want the same cores, and each waits for
        the other at every layer; there the cores read a few batches together, then compute them together.
        """
        for rows, arrays in _read(reader, batches, overlap=self.device.type != "cpu"):
            wanted = max(least(rows) if least else 0, 0 if self.compiled is None else reader.smallest)
            tensors = self.tensors([_filled(array, wanted) for array in arrays])
            yield rows, arrays, self.forward(*tensors)[: len(rows)].cpu().numpy()

    def tensors(self, arrays: Sequence[NDArray[Any]]) -> tuple[Tensor, ...]:
        """What a reader has read, on the device."""
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)

    def forward(self, *tensors: Tensor) -> Tensor:
        """float32 [n, dim] of one batch that is on the device; in parts once one did not fit into its memory.

        Raises:
            HeadstartError: a single row does not fit.
        """
        while True:
            rows = min(self.most, len(tensors[0]))
            try:
                parts = zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
                found = [self._part(*part) for part in parts]
                return found[0] if len(found) == 1 else torch.cat(found)
            except RuntimeError as error:
                if not devices.out_of_memory(error):
                    raise
                if rows < 2:
                    raise HeadstartError(
                        "a row does not fit into memory",
                        where=str(self.device),
                        do="lower features.image_size or features.max_tokens, or set HEADSTART_DEVICE=cpu",
                    ) from None
            self.most = rows // 2
            log.warning("out of memory on %s: going on with %d rows at a time", self.device, self.most)
            devices.empty_cache(self.device)

    def _part(self, *tensors: Tensor) -> Tensor:
        with self.lock, torch.inference_mode():
            if self.compiled is not None:
                try:
                    compiled: Tensor = self.compiled(*tensors)
                    return compiled
                except Exception as error:
                    if devices.out_of_memory(error):
                        raise
                    log.warning("torch.compile does not work here, running without it: %s", _line(error))
                    self.compiled = None
            plain: Tensor = self.network(*tensors)
            return plain


def features(recipe: Recipe, layout: Layout) -> None:
    """Write ``features/<recipe>/`` as docs/reference/files.md describes it.

    Rows that the last pass has seen are copied from what it found, if nothing but the rows has changed: a
    batch of new rows costs what it holds. The bytes are those of a pass over all rows.

    Disk: the arrays once, in ``.headstart/<recipe>/`` until they are whole, and those of the last pass.
    Memory: the network, a few batches, and of texts the tokens.

    Raises:
        HeadstartError: the manifest or the backbone is missing, or they do not fit together; a layer does not
            exist, an image cannot be read, a vector is not finite, or the disk is full.
    """
    devices.keep_memory()
    table, items, digest = _rows(recipe, layout)
    wanted = recipe.features.compile
    compiled = len(items) >= compile_from(recipe.modality) if wanted is None else wanted
    # Rows that come later must not change how those of before are computed.
    first = np.flatnonzero(table["batch"] == "")
    if not len(first):
        first = np.arange(len(items))
    arithmetic = arithmetic_for(
        layout.weights,
        recipe.features,
        lambda extractor, rows: extractor.reader([items[first[row]] for row in rows]),
        len(first),
    )
    extractor = Extractor(layout.weights, recipe.features, arithmetic, compiled)
    described = {
        "layers": recipe.features.layers,
        "precision": arithmetic.dtype,
        "exact_layers": list(arithmetic.exact),
        "backbone_sha256": extractor.spec.sha256,
        "dim": extractor.dim,
    }
    channels = _channels(layout) if recipe.features.packed and recipe.modality == "image" else None
    if recipe.features.packed:
        described["packed"] = True
    if channels:
        described["channels"] = channels
    made = _digest(extractor, arithmetic, described | {"compiled": compiled})
    names = ["features", "pixels"] if channels else ["features"]
    digests = table["digest"].to_numpy().astype("S64")
    kept = layout.work / "extracted"
    known = earlier.read(kept, made, digests, names)
    if len(known.here):
        log.info("%d of %d rows are known from the last pass", len(known.here), len(items))
    described |= {"rows": len(items), "manifest_sha256": digest}
    named = f"{made} {digest}".encode() + known.here.tobytes()
    work = layout.work / "features" / hashlib.sha256(named).hexdigest()[:16]
    with unwritable_named(layout.features):
        _extract(extractor, items, work, channels, known)
    with written_whole(layout.features) as folder:
        table[["id"]].to_parquet(folder / "ids.parquet", index=False)
        text = json.dumps(described, indent=2, sort_keys=True) + "\n"
        (folder / "features.json").write_text(text, encoding="utf-8")
        arithmetic.save(folder / "arithmetic.safetensors")
        for array in sorted(work.glob("*.npy"), reverse=True):
            shutil.move(array, folder / array.name)  # the last steps: what fails before can be repeated
    shutil.rmtree(layout.work / "features", ignore_errors=True)
    earlier.keep(kept, made, digests, [layout.features / f"{name}.npy" for name in names])


def arithmetic_for(
    weights: Path, options: Features, sampled: Callable[[Extractor, Rows], Reader], rows: int
) -> Arithmetic:
    """What the recipe says, or the fastest arithmetic that agrees with float32 on a sample of the rows.

    Args:
        weights: the backbone's folder.
        options: the recipe's ``features`` block.
        sampled: gives a reader of some of the rows.
        rows: how many there are.
    """
    if options.precision != "auto":
        return Arithmetic(options.precision)
    exact = Extractor(weights, options, Arithmetic())
    dtypes = devices.fast_dtypes(exact.device)
    if not dtypes or not rows:
        return Arithmetic()
    sample = sampled(exact, np.unique(np.linspace(0, rows - 1, SAMPLE).astype(np.int64)))
    places = np.sort(np.concatenate(sample.batches))
    calibration, check = (
        exact.tensors(sample.read(part))
        for part in (places[::2], places[1::2] if len(places) > 1 else places)
    )
    return precision.choose(exact.network, dtypes, calibration, check)


def _rows(recipe: Recipe, layout: Layout) -> tuple[Any, list[Item], str]:
    """The manifest, items in the same order, and its digest."""
    import pandas as pd

    path = layout.manifest / "manifest.parquet"
    column = "text" if recipe.modality == "text" else "path"
    try:
        digest = sha256_of(path)
        table = pd.read_parquet(path)
    except FileNotFoundError as error:
        raise unmade("there is no manifest", error, layout.recipe, "validate") from None
    if column not in table:
        raise HeadstartError(
            f"{recipe.fetch.backbone} reads {recipe.modality}s, but the rows hold none",
            where=str(path),
            do="take a backbone for this kind of data in fetch.backbone, or another validate.adapter",
        )
    content = table[column].tolist()
    return table, content if column == "text" else [layout.raw / name for name in content], digest


def _extract(
    extractor: Extractor, items: Sequence[Item], folder: Path, channels: int | None, known: earlier.Earlier
) -> None:
    """Write whole arrays, ``features.npy`` and what is packed; continues what a killed run has left.

    Every finished shard is on the disk before the journal names it, so a kill costs one shard. The files have
    their full size from the start: a disk that is too small is found out at once.

    Args:
        extractor: the backbone.
        items: what to look at.
        folder: for these arrays alone; its siblings are of work that nobody will go on with, and are deleted.
        channels: of pictures, if they are packed.
        known: rows that need not be looked at.
    """
    journal = folder / "shards"
    for other in set(folder.parent.glob("*")) - {folder}:
        shutil.rmtree(other, ignore_errors=True)
    reader = extractor.reader(items)
    shards = _shards(reader.apart(np.setdiff1d(np.arange(len(items)), known.here)))
    forms: dict[str, Form] = {"features": ((len(items), extractor.dim), "<f2")}
    packed: dict[str, NDArray[Any]] = {}  # that is known before the pass
    if extractor.options.packed and isinstance(reader, Texts):
        packed = {"tokens": reader.tokens.ids, "bounds": reader.tokens.bounds}
        forms |= {"tokens": (packed["tokens"].shape, "<i4"), "bounds": (packed["bounds"].shape, "<i8")}
    elif channels:
        side = side_of(extractor.spec, extractor.options)
        forms["pixels"] = (len(items), side, side, channels), "|u1"
    paths = {name: folder / f"{name}.npy" for name in forms}
    done = _journalled(journal) if all(path.exists() for path in paths.values()) else set()
    if done:
        log.info("continuing after %d of %d shards", len(done), len(shards))
    rows_done = len(known.here) + sum(len(rows) for shard in done for rows in shards[shard])
    with bar(total=len(items), initial=rows_done, desc="extracting features", unit=" rows") as progress:
        if not done:
            journal.unlink(missing_ok=True)
            _allocate(folder, forms)
        targets: dict[str, Any] = {name: np.load(path, mmap_mode="r+") for name, path in paths.items()}
        for name, array in packed.items():
            targets[name][:] = array
        if not done:
            known.copy(targets, ROWS_PER_SHARD)
        for number in sorted(set(range(len(shards))) - done):
            for rows, arrays, vectors in extractor.run(reader, shards[number], reader.least):
                targets["features"][rows] = _halved(vectors, items, rows)
                if "pixels" in targets:
                    targets["pixels"][rows] = arrays[0][..., :channels]
                progress.update(len(rows))
            for target in targets.values():
                target.flush()
            with journal.open("a", encoding="ascii") as file:
                file.write(f"{number}\n")
                file.flush()
                os.fsync(file.fileno())


def _digest(extractor: Extractor, arithmetic: Arithmetic, key: dict[str, Any]) -> str:
    """A name for a way to make arrays: all that a row's part of them depends on, but the row."""
    files = [Path(__file__).with_name(f"{name}.py") for name in MODULES]
    files += sorted(extractor.weights.glob("*.json"))  # spec.json holds the digest of the weights
    content = [sha256_of(file) for file in files]
    biases = [(name, bias.cpu().numpy().tobytes().hex()) for name, bias in sorted(arithmetic.biases.items())]
    machine = [extractor.device.type, torch.__version__]
    machine += [version(package) for package in backbones.PACKAGES[extractor.spec.library]]
    text = json.dumps([key, extractor.options.model_dump(), content, biases, machine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _halved(vectors: NDArray[np.float32], items: Sequence[Item], rows: Rows) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = vectors.astype(np.float16)
    finite = np.isfinite(half).all(axis=1)
    if not finite.all():
        raise HeadstartError(
            "the backbone gives values that are not finite, or above 65,504, the most that float16 holds",
            where=f"{str(items[rows[np.argmin(finite)]])!r:.100}",
            do="take other features.layers; if there are none, the weights are damaged",
        )
    return half


def _shards(batches: Sequence[Rows]) -> list[list[Rows]]:
    """Batches in runs of about ``ROWS_PER_SHARD`` rows."""
    ends = np.cumsum([len(rows) for rows in batches])
    numbers = (ends - 1) // ROWS_PER_SHARD
    return [[batches[i] for i in np.flatnonzero(numbers == n).tolist()] for n in np.unique(numbers)]


def _journalled(journal: Path) -> set[int]:
    """Numbers of the finished shards; a last line that was cut short does not count, and is taken off."""
    if not journal.exists():
        return set()
    lines = journal.read_text(encoding="ascii")
    whole = lines.rfind("\n") + 1
    os.truncate(journal, whole)
    return {int(line) for line in lines[:whole].split()}


def _channels(layout: Layout) -> int:
    """Channels worth keeping of the recipe's pictures: one if all of them are grey."""
    path = layout.manifest / "report.json"
    try:
        modes = json.loads(path.read_text(encoding="utf-8"))["modes"]
    except FileNotFoundError:
        raise HeadstartError(
            "there is no report on the pictures",
            where=str(path),
            do=f"run `dvc repro validate@{layout.recipe}`",
        ) from None
    return 1 if all(mode in {"1", "L", "LA"} or mode.startswith("I") for mode in modes) else 3


def _allocate(folder: Path, forms: dict[str, Form]) -> None:
    """New .npy files with all their bytes written: sparse ones would die of a full disk by signal."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: np.dtype(dtype).itemsize * prod(shape) for name, (shape, dtype) in forms.items()}
    zeros = bytes(1 << 20)
    try:
        for name, (shape, dtype) in forms.items():
            with (folder / f"{name}.npy").open("wb") as file:
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for left in range(sizes[name], 0, -len(zeros)):
                    file.write(zeros[:left])
    except OSError as error:
        for name in forms:
            (folder / f"{name}.npy").unlink(missing_ok=True)
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        raise HeadstartError(
            f"there is no room for the features: {error.strerror}",
            where=str(folder),
            do=f"free {sum(sizes.values()) / 1e9:.2g} GB there, then run the same command again",
        ) from error


def _read(
    reader: Reader, batches: Sequence[Rows], overlap: bool
) -> Iterator[tuple[Rows, tuple[NDArray[Any], ...]]]:
    """Each batch with its arrays, read by as many threads as there are cores: decoding needs no lock.

    With ``overlap`` the next few batches are read while the caller works on one; without, never meanwhile.
    """
    threads = environment.cores()
    most = 4 * threads
    with ThreadPoolExecutor(threads) as pool:
        if not overlap:
            for start in range(0, len(batches), most):
                together = batches[start : start + most]
                yield from zip(together, list(pool.map(reader.read, together)), strict=True)
            return
        waiting: deque[tuple[Rows, Future[tuple[NDArray[Any], ...]]]] = deque()
        ahead = 1  # until the first batch has shown how large they are
        for rows in batches:
            waiting.append((rows, pool.submit(reader.read, rows)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                arrays = future.result()
                ahead = min(most, max(2, READ_AHEAD // sum(array.nbytes for array in arrays)))
                yield first, arrays
        for first, future in waiting:
            yield first, future.result()


def _filled(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """The array with its last row repeated until there are at least so many."""
    short = rows - len(array)
    return np.concatenate([array, np.repeat(array[-1:], short, axis=0)]) if short > 0 else array


def compile_from(modality: str) -> float:
    """Rows from which on torch.compile repays its start.

    On Apple's GPUs it has computed something else without a word (issues 169738 and 170360 of PyTorch): there
    it takes a recipe that asks for it.
    """
    return inf if devices.device().type == "mps" else COMPILE_FROM[modality]


def foldable(network: nn.Module, layers: Sequence[str] | None) -> bool:
    """Whether no layer wanted is a convolution or a BatchNorm, or inside of one: those change by folding."""
    folding = [
        f"{name}."
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    return not any(f"{layer}.".startswith(tuple(folding)) for layer in layers or ())


def blank_rows(spec: backbones.Spec, options: Features) -> tuple[Tensor, ...]:
    """Two rows that say nothing, as a network takes them: they show which layers run, and how wide."""
    if spec.modality == "text":
        return (torch.ones(2, 2, dtype=torch.int64),) * 2
    side = side_of(spec, options)
    return (torch.zeros(2, side, side, 3, dtype=torch.uint8),)


def side_of(spec: backbones.Spec, options: Features) -> int:
    """Pixels of the square that images are resized to."""
    return int(options.image_size or spec.preprocessing["image_size"])


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def averaged(output: Tensor, mask: Tensor | None) -> Tensor:
    """float32 [n, c]: mean over the positions of [n, c, h, w], [n, tokens, c] or [n, c], padding aside.

    Some networks, such as Swin, have [n, h, w, c] inside: all images are squares, which tells the two apart.
    """
    output = output.float()
    if output.ndim == 4:
        return output.mean(dim=(2, 3) if output.shape[2] == output.shape[3] else (1, 2))
    if output.ndim == 3 and mask is not None:
        weights = mask.unsqueeze(-1).float()
        return (output * weights).sum(dim=1) / weights.sum(dim=1)
    return output.mean(dim=1) if output.ndim == 3 else output
