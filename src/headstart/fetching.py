"""Fetch: pretrained weights in whatever form their publisher gives them become ``weights/<recipe>/``.

Goes in: a recipe's ``fetch`` block. Comes out: the backbone's tensors under the names of its architecture, as
safetensors, with their spec. Never unpickles anything but tensors, and those only after their sha256 was
checked. Knows nothing about the data.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart import archives, backbones, sources
from headstart.errors import HeadstartError
from headstart.layout import Layout, sha256_of, written_whole
from headstart.recipe import Fetch, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

# Where published checkpoints keep their tensors, and what they put before each name.
WRAPPERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "bert.", "roberta.", "distilbert.")
TENSORS = (".safetensors", ".pth", ".pt", ".bin")


def fetch(recipe: Recipe, layout: Layout) -> None:
    """Write ``weights/<recipe>/`` as docs/reference/files.md describes it.

    Raises:
        HeadstartError: the source cannot be had or read, or its tensors are not those of the
            architecture that the recipe names.
    """
    chosen = recipe.fetch
    library, architecture = chosen.backbone.split(":", 1)
    uri, member = sources.split_fragment(chosen.source)
    downloaded = sources.fetch(uri, chosen.sha256)
    with written_whole(layout.weights) as target:
        unpacked = target / ".published"
        unpacked.mkdir()
        published = archives.extract(downloaded, member, unpacked)
        make = _from_hub_folder if library == "transformers" else _from_tensors
        state, facts = make(architecture, published, chosen, target)
        shutil.rmtree(unpacked)
        _save(state, target / "weights.safetensors")
        spec = backbones.Spec(
            library=library,  # type: ignore[arg-type]  # the recipe's schema allows these three only
            architecture=architecture,
            modality=recipe.modality,
            source=sources.redacted(chosen.source),
            source_sha256=sources.digest_of(downloaded),
            sha256=sha256_of(target / "weights.safetensors"),
            licence=chosen.licence,
            **facts,
        )
        text = json.dumps(dataclasses.asdict(spec), indent=2, ensure_ascii=False) + "\n"
        (target / "spec.json").write_text(text, encoding="utf-8")


def _from_tensors(
    architecture: str, published: Path, chosen: Fetch, target: Path
) -> tuple[State, dict[str, Any]]:
    """State of an image network from one file of tensors, and what its spec says."""
    import torch

    library = chosen.backbone.split(":", 1)[0]
    whole = backbones.build(library, architecture)
    own = whole.state_dict()
    backbone = backbones.without_classifier(library, whole)
    wanted = backbone.state_dict()
    state = _matched(_read(published, chosen), own, set(wanted), chosen)
    backbone.load_state_dict(state)
    preprocessing = _preprocessing(library, architecture, backbone)
    preprocessing |= {key: value for key in ("mean", "std") if (value := getattr(chosen, key))}
    side = preprocessing["image_size"]
    with torch.inference_mode():
        dim = backbone.eval()(torch.zeros(1, 3, side, side)).shape[1]
    return state, {"dim": dim, "preprocessing": preprocessing}


def _preprocessing(library: str, architecture: str, network: Any) -> dict[str, Any]:
    if library == "timm":
        config = network.pretrained_cfg
        return {
            "image_size": int(config["input_size"][-1]),
            "interpolation": config["interpolation"],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
        }
    import torchvision

    transform = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
    return {
        "image_size": int(transform.crop_size[0]),
        "interpolation": transform.interpolation.value,
        "mean": list(transform.mean),
        "std": list(transform.std),
    }


def _read(published: Path, chosen: Fetch) -> State:
    """The tensors of a file, by name."""
    if published.is_dir():
        found = sorted(path for path in published.rglob("*") if path.suffix in TENSORS)
        if len(found) != 1:
            raise HeadstartError(
                "the weights must be one file",
                where=chosen.source,
                table=[str(path.relative_to(published)) for path in found] or ["no file of tensors here"],
                do="name the file after `#` in fetch.source",
            )
        published = found[0]
    if published.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: State = load_file(published)
            return state
        except SafetensorError as error:
            raise _unreadable(chosen, error) from error
    import pickle

    import torch

    # torchvision's own files carry their digest in their names, which `sources` has checked.
    if chosen.sha256 is None and not chosen.source.startswith("torchvision:"):
        raise HeadstartError(
            "a pickled file of weights is opened only if the recipe pins its sha256",
            where=chosen.source,
            do=f"add `sha256: {sha256_of(published)}` under fetch, if that is the file you mean",
        )
    try:
        content = torch.load(published, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise _unreadable(chosen, error) from error
    for wrapper in WRAPPERS:
        content = content.get(wrapper, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise _unreadable(chosen, "it holds more than named tensors")
    return content


def _unreadable(chosen: Fetch, why: object) -> HeadstartError:
    return HeadstartError(
        "the weights cannot be read",
        where=chosen.source,
        table=str(why).splitlines()[:2],
        do="fetch.source must lead to safetensors, or to a PyTorch state dict of plain tensors",
    )


def _matched(published: State, own: State, wanted: set[str], chosen: Fetch) -> State:
    """The tensors that ``wanted`` names, found by name or, failing that, by their place in the order.

    A publisher who wrote the same architecture in other words still lists the same tensors in the same
    order: that is accepted only if number, shapes and roles (weight, bias, running mean ...) all agree.
    """
    bare = _unprefixed(published, wanted)
    if wanted <= {*bare, *_counters(wanted)}:
        found = {name: bare.get(name, own[name]) for name in wanted}
    else:
        theirs = {name: tensor for name, tensor in published.items() if name not in _counters(published)}
        ours = [name for name in own if name not in _counters(own)]
        same = len(theirs) == len(ours) and all(
            a.rpartition(".")[2] == b.rpartition(".")[2] and (tensor.shape == own[b].shape or b not in wanted)
            for (a, tensor), b in zip(theirs.items(), ours, strict=True)
        )
        if not same:
            raise _mismatch(chosen, sorted(wanted - set(bare))[:5], "missing in the weights")
        by_place = dict(zip(ours, theirs.values(), strict=True))
        found = {name: by_place.get(name, own[name]) for name in wanted}
    wrong = [
        f"{name}: {tuple(found[name].shape)}, the architecture has {tuple(own[name].shape)}"
        for name in sorted(wanted)
        if found[name].shape != own[name].shape
    ]
    if wrong:
        raise _mismatch(chosen, wrong[:5], "of another shape")
    return {name: found[name] for name in own if name in wanted}


def _unprefixed(published: State, wanted: set[str]) -> State:
    """The tensors under names without a wrapper's prefix, whichever prefix leaves most names known."""
    candidates = [published] + [
        {name.removeprefix(prefix): tensor for name, tensor in published.items()} for prefix in PREFIXES
    ]
    return max(candidates, key=lambda state: len(wanted & set(state)))


def _counters(names: Any) -> set[str]:
    """BatchNorm's counts of batches: older files lack them, and inference never reads them."""
    return {name for name in names if name.endswith("num_batches_tracked")}


def _mismatch(chosen: Fetch, lines: list[str], what: str) -> HeadstartError:
    return HeadstartError(
        f"the weights are not those of {chosen.backbone}",
        where=chosen.source,
        table=[f"{what}:", *(f"  {line}" for line in lines)],
        do="name the architecture that these weights were trained as in fetch.backbone",
    )


def _from_hub_folder(
    architecture: str, published: Path, chosen: Fetch, target: Path
) -> tuple[State, dict[str, Any]]:
    """State of a text network from a model repository's files; its config and tokenizer go along."""
    config = _json(published / "config.json", chosen)
    if config.get("model_type") != architecture:
        raise HeadstartError(
            f"the weights are not those of {chosen.backbone}",
            where=f"{chosen.source}, config.json",
            do=f"write `backbone: transformers:{config.get('model_type')}` under fetch",
        )
    if not (published / "model.safetensors").is_file():
        raise HeadstartError(
            "the model has no safetensors",
            where=chosen.source,
            table=sorted(path.name for path in published.iterdir())[:10],
            do="take a revision that holds model.safetensors; pickled weights of a hub are not opened",
        )
    shutil.copy(published / "config.json", target / "config.json")
    _copy_tokenizer(published, target, chosen)
    wanted = {name for name in backbones.transformer(target).state_dict() if not name.startswith("pooler.")}
    from safetensors.torch import load_file

    own = backbones.transformer(target).state_dict()
    state = _matched(load_file(published / "model.safetensors"), own, wanted, chosen)
    tokenizer = published / "tokenizer_config.json"
    limits = [config.get("max_position_embeddings", 512)]
    if tokenizer.is_file():
        limits.append(_json(tokenizer, chosen).get("model_max_length", limits[0]))
    preprocessing = {"max_tokens": int(min(limits)), "pooling": _pooling(published, chosen)}
    return state, {"dim": int(config["hidden_size"]), "preprocessing": preprocessing}


def _copy_tokenizer(published: Path, target: Path, chosen: Fetch) -> None:
    """tokenizer.json as it is, or made from an older vocabulary file."""
    if (published / "tokenizer.json").is_file():
        shutil.copy(published / "tokenizer.json", target / "tokenizer.json")
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(published, local_files_only=True)
        tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"))
    except (OSError, ValueError, AttributeError) as error:
        raise HeadstartError(
            "the model has no tokenizer that can be read",
            where=chosen.source,
            table=str(error).splitlines()[:2],
            do="take a model with a tokenizer.json",
        ) from error


def _pooling(published: Path, chosen: Fetch) -> str:
    """How token vectors become one: what a sentence model says of itself, else their mean.

    The pooler of a BERT was trained to tell whether two sentences follow each other; with the network frozen,
    the mean of the tokens tells more about a text (Reimers & Gurevych 2019).
    """
    path = published / "1_Pooling" / "config.json"
    return "cls" if path.is_file() and _json(path, chosen).get("pooling_mode_cls_token") else "mean"


def _json(path: Path, chosen: Fetch) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError) as error:
        raise HeadstartError(
            f"the model has no {path.name} that can be read",
            where=chosen.source,
            do="fetch.source must lead to a folder with config.json, model.safetensors and a tokenizer",
        ) from error
    return content


def _save(state: State, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path)
