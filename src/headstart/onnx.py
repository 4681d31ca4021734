"""ONNX: a version of the registry as one file that needs neither PyTorch nor this library.

Goes in: a loaded version. Comes out: an ``.onnx`` file with normalisation, backbone, head and softmax, and
beside that of a text model its tokenizer. Never leaves a file whose answers have not been compared with
PyTorch's.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart import backbones
from headstart.errors import HeadstartError
from headstart.layout import Layout, room_for_file, unwritable_named
from headstart.models import Version
from headstart.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from headstart.features import Item, Tapped
    from headstart.heads import Head

NAMES = {"image": ("pixels",), "text": ("ids", "mask")}
TOLERANCE = 1e-4  # of a probability
EXAMPLES = 16
BATCHES = (1, 2, 5, EXAMPLES)  # rows at a time: a size that was fixed by mistake is found out


def export(version: Version, output: Path, examples: Sequence[Item] = ()) -> Path:
    """Write the version as ONNX, in float32, and compare it with PyTorch before it takes its place.

    Inputs are ``pixels``, uint8 [n, side, side, 3], upright and squeezed to the square; or ``ids`` and
    ``mask``, int64 [n, tokens], as the ``tokenizer.json`` beside the file makes them, which is told how to
    cut and to pad. The output is ``probabilities``, float32 [n, classes]. The file's metadata hold the
    classes in order, what each decision costs, and where the model comes from.

    Args:
        version: that ``models.load`` gave.
        output: a name that ends in ``.onnx``.
        examples: rows to compare on; by default noise, or sentences of made-up words.

    Returns:
        ``output``.

    Raises:
        HeadstartError: the network cannot be written as ONNX or does not say the same there; an example
            cannot be read; another ``tokenizer.json`` lies there; the output is a folder or lies below a
            file; or the disk is full or not writable.
    """
    from headstart.features import Tapped

    if output.suffix != ".onnx":
        raise HeadstartError("an ONNX file's name ends in .onnx", where=str(output), do="name it so")
    extractor, head = version.model.extractor, version.model.head
    # Afresh: the network that serves may compute in bfloat16 or on a GPU, or have its attention exchanged.
    network, spec = backbones.load(extractor.weights)
    tapped = Tapped(network, spec, extractor.options.layers, extractor.options.views).eval()
    tokenizer, beside = _tokenizer(version), output.with_name("tokenizer.json")
    with unwritable_named(output):
        if tokenizer is not None and beside.exists() and beside.read_bytes() != tokenizer:
            # Put in its place, ours would be read with whatever model that one belongs to.
            raise HeadstartError(
                "another tokenizer.json lies here, which a model beside it may need",
                where=str(beside),
                do=f"name another folder, as in --output FOLDER/{output.name}, or delete what nobody needs",
            )
        room_for_file(output)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            written = Path(folder) / output.name
            with _in_words(spec.architecture):
                program = _traced(tapped, head, version)
                program.model.metadata_props.update(_described(version))
                program.save(written, external_data=False)
            _compare(written, tapped, version, examples or _made_up(spec.modality))
            if tokenizer is not None:
                vocabulary = Path(folder) / beside.name
                vocabulary.write_bytes(tokenizer)
                vocabulary.replace(beside)
            written.replace(output)
    return output


def examples(recipe: Recipe, layout: Layout) -> list[Item]:
    """Rows of the project to compare on, spread over its manifest; none if they are not on this machine."""
    import pandas as pd

    manifest = layout.manifest / "manifest.parquet"
    if not manifest.exists():
        return []
    column = "text" if recipe.modality == "text" else "path"
    values = pd.read_parquet(manifest, columns=[column])[column]
    chosen = values.iloc[np.unique(np.linspace(0, len(values) - 1, EXAMPLES).astype(int))].tolist()
    if column == "text":
        return list(chosen)
    return [layout.raw / name for name in chosen if (layout.raw / name).exists()]


def _traced(tapped: Tapped, head: Head, version: Version) -> Any:
    """The backbone with its head and a softmax, as ONNX, for any number of rows and of tokens."""
    import torch
    from torch import nn

    from headstart.features import blank_rows

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tapped = tapped
            for name, array in vars(head).items():
                self.register_buffer(name, torch.from_numpy(array))

        def forward(self, first: Tensor, mask: Tensor | None = None) -> Tensor:
            standardised = (self.tapped(first, mask) - self.mean) / self.scale
            return torch.softmax(standardised @ self.weight.T + self.bias, dim=1)

    extractor = version.model.extractor
    # Each a tensor of its own: of one that is given twice the tracer makes one input.
    blank = tuple(tensor.clone() for tensor in blank_rows(extractor.spec, extractor.options))
    axes = {0: "rows", 1: "tokens"} if extractor.spec.modality == "text" else {0: "rows"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # two inputs share their axes, as they should
        return torch.onnx.export(
            Classifier().eval(),
            blank,
            input_names=NAMES[extractor.spec.modality],
            output_names=["probabilities"],
            dynamic_shapes=tuple({i: torch.export.Dim(a) for i, a in axes.items()} for _ in blank),
            dynamo=True,
            verbose=False,
        )


def _described(version: Version) -> dict[str, str]:
    """What whoever uses the file has to know, as texts; numbers and lists as JSON."""
    from headstart.features import side_of

    model, extractor = version.model, version.model.extractor
    spec = extractor.spec
    known: dict[str, Any] = {
        **version.tags,  # before what is known: anybody may add a tag, of any name
        "classes": model.classes,
        "costs": model.decision.costs,
        "abstain": model.decision.abstain,
        "model": version.name,
        "version": version.version,
        "run_id": version.run_id,
        "backbone": f"{spec.library}:{spec.architecture}",
        "backbone_source": spec.source,
        "backbone_licence": spec.licence,
    }
    if spec.modality == "image":
        known |= {
            "side": side_of(spec, extractor.options),
            "interpolation": spec.preprocessing["interpolation"],
        }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}


def _tokenizer(version: Version) -> bytes | None:
    """The tokenizer.json of a text model, told to cut and to pad as the model expects."""
    from tokenizers import Tokenizer

    extractor = version.model.extractor
    if extractor.spec.modality != "text":
        return None
    cutter = Tokenizer.from_file(str(extractor.weights / "tokenizer.json"))
    cutter.enable_truncation(min(extractor.options.max_tokens, extractor.spec.preprocessing["max_tokens"]))
    padding = extractor.padding
    cutter.enable_padding(pad_id=padding, pad_token=cutter.id_to_token(padding) or "[PAD]")
    written: str = cutter.to_str(pretty=True)
    return written.encode()


def _compare(written: Path, tapped: nn.Module, version: Version, items: Sequence[Item]) -> None:
    """Raise HeadstartError unless the file says what PyTorch says, in batches of several sizes."""
    import onnxruntime
    import torch

    extractor, head = version.model.extractor, version.model.head
    with _in_words(extractor.spec.architecture):
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    reader = extractor.reader(items)
    for size in BATCHES:
        arrays = reader.read(np.arange(size) % len(items))
        with torch.inference_mode():
            expected = head.probabilities(tapped(*map(torch.from_numpy, arrays)).numpy())
        with _in_words(extractor.spec.architecture):
            names = NAMES[extractor.spec.modality]
            found: NDArray[np.float32] = session.run(None, dict(zip(names, arrays, strict=True)))[0]
        if found.shape != expected.shape or not (np.abs(found - expected) <= TOLERANCE).all():
            apart = np.abs(found - expected).max() if found.shape == expected.shape else 1.0
            raise HeadstartError(
                f"as ONNX {extractor.spec.architecture} does not say what it says in PyTorch",
                where=f"{size} rows at a time, probabilities differ by up to {apart:.2g}",
                do="serve it with PyTorch; a newer onnxruntime or onnxscript may help",
            )


def _made_up(modality: str) -> list[Item]:
    """Items that no model has seen, the same every time: noise, or sentences of 1 to 16 times 10 words."""
    from PIL import Image

    chance = np.random.default_rng(0)
    if modality == "text":
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        return [
            " ".join("".join(chance.choice(letters, chance.integers(1, 9))) for _ in range(1 + 10 * number))
            for number in range(EXAMPLES)
        ]
    pictures: list[Item] = []
    for number in range(EXAMPLES):
        noise = chance.normal(16 * number, 8 + 4 * number, (64 + number, 64, 3)).clip(0, 255)
        sink = io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(sink, format="PNG")
        pictures.append(sink.getvalue())
    return pictures


@contextmanager
def _in_words(architecture: str) -> Iterator[None]:
    """Turn whatever the tools raise on a network that they cannot take into words."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise HeadstartError(
            f"{architecture} cannot be written as ONNX",
            table=str(error).splitlines()[:3],
            do="serve it with PyTorch; a newer onnxscript may help",
        ) from error
