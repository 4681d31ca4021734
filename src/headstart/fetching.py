"""Fetch: pretrained weights in whatever form their publisher gives them become ``weights/<recipe>/``.

Goes in: a recipe's ``fetch`` block. Comes out: the backbone's tensors under the names of its architecture, as
safetensors, with their spec. Never unpickles anything but tensors, and those only after their sha256 was
checked. Knows nothing about the data.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart import archives, backbones, sources
from headstart.errors import HeadstartError
from headstart.layout import REGISTERED, Layout, registered_parts, sha256_of, written_whole
from headstart.recipe import Fetch, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

WRAPPERS = ("state_dict", "model", "model_state_dict")  # where published checkpoints keep their tensors
TENSORS = (".safetensors", ".pth", ".pt", ".bin")
# What tokenizers were stored as before tokenizer.json.
VOCABULARIES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# BatchNorm's counts of batches: older files lack them, and inference never reads them.
COUNTER = "num_batches_tracked"
UNLIMITED = 1 << 30  # tokens
log = logging.getLogger(__name__)


def fetch(recipe: Recipe, layout: Layout) -> None:
    """Write ``weights/<recipe>/`` as docs/reference/files.md describes it.

    Raises:
        HeadstartError: the source cannot be had or read, or its tensors are not those of the
            architecture that the recipe names.
    """
    chosen = recipe.fetch
    library, architecture = chosen.library, chosen.architecture
    uri, member = sources.split_fragment(chosen.source)
    if library != "transformers":
        whole = backbones.build(library, architecture)  # a misspelt name costs no download
    downloaded = sources.fetch(uri, chosen.sha256)
    digest = sources.digest_of(downloaded)
    with written_whole(layout.weights) as target:
        unpacked = target / ".published"
        unpacked.mkdir()
        published = archives.place(downloaded, member, unpacked)
        if (published / "MLmodel").is_file():
            _from_champion(published, chosen, digest, target)
            shutil.rmtree(unpacked)
            return
        if library == "transformers":
            state, facts = _from_hub_folder(architecture, published, chosen, target)
        else:
            state, facts = _from_tensors(whole, _read(published, chosen, digest), chosen)
        shutil.rmtree(unpacked)
        _save(state, target / "weights.safetensors")
        spec = backbones.Spec(
            library=library,
            architecture=architecture,
            modality=recipe.modality,
            source=sources.redacted(chosen.source),
            source_sha256=digest,
            sha256=sha256_of(target / "weights.safetensors"),
            licence=chosen.licence,
            **facts,
        )
        spec.write(target)


def _from_champion(published: Path, chosen: Fetch, digest: str, target: Path) -> None:
    """The backbone of a registered model, and in ``registered/`` its head and what goes with it."""
    try:
        parts = registered_parts(published)
        spec = backbones.Spec.read(parts["backbone"])
        (target / REGISTERED).mkdir()
        for part in ("head", "model", "features"):
            shutil.copy(parts[part], target / REGISTERED / f"{part}{parts[part].suffix}")
    except (KeyError, OSError) as error:
        what, do = "this is no model that headstart registered", "take the folder of one from the registry"
        raise _error(chosen, what, [f"{type(error).__name__}: {error}"], do) from None
    if f"{spec.library}:{spec.architecture}" != chosen.backbone:
        do = f"write `backbone: {spec.library}:{spec.architecture}` under fetch"
        raise _error(chosen, "the registered model has another backbone", [], do)
    # Where that model itself went on from another, the other's head lies there too.
    ignored = shutil.ignore_patterns(REGISTERED)
    shutil.copytree(parts["backbone"], target, dirs_exist_ok=True, ignore=ignored)
    replace(
        spec,
        source=sources.redacted(chosen.source),
        source_sha256=digest,
        licence=chosen.licence or spec.licence,
    ).write(target)


def _from_tensors(whole: nn.Module, published: State, chosen: Fetch) -> tuple[State, dict[str, Any]]:
    """State of an image network, and what its spec says."""
    import torch

    library, architecture = chosen.library, chosen.architecture
    own = whole.state_dict()
    backbone = backbones.without_classifier(library, whole)
    state = _matched(published, own, backbone.state_dict().keys(), chosen)
    backbone.load_state_dict(state)
    preprocessing = _preprocessing(library, architecture, backbone, chosen)
    side = preprocessing["image_size"]
    dim = _dim(chosen, backbone, torch.zeros(1, 3, side, side))
    return state, {"dim": dim, "preprocessing": preprocessing}


def _preprocessing(library: str, architecture: str, network: Any, chosen: Fetch) -> dict[str, Any]:
    """What the network expects its pixels to be like; the recipe has the last word on mean and std."""
    if library == "timm":
        config = network.pretrained_cfg
        size, interpolation = config["input_size"][-1], config["interpolation"]
        mean, std = config["mean"], config["std"]
    else:
        from torchvision import models

        # One architecture may have weights for several sizes: those that the source names decide.
        kind, _, name = chosen.source.partition("#")[0].partition(":")
        if kind == "torchvision":
            transform = models.get_weight(name).transforms()
        else:
            transform = models.get_model_weights(architecture).DEFAULT.transforms()
        size = getattr(network, "image_size", transform.crop_size[0])  # a ViT takes one size only
        interpolation = transform.interpolation.value
        mean, std = transform.mean, transform.std
    return {
        "image_size": int(size),
        "interpolation": interpolation,
        "mean": list(chosen.mean or mean),
        "std": list(chosen.std or std),
    }


def _dim(chosen: Fetch, network: nn.Module, *image: Tensor, **text: Tensor) -> int:
    """Dimensions of the vectors that a network gives, seen by running it once."""
    import torch

    try:
        with torch.inference_mode():
            output = network.eval()(*image, **text)
        shape = output.shape if isinstance(output, torch.Tensor) else output[0][:, 0].shape
        _, dim = shape
    except Exception as error:  # networks that want other inputs, or give other outputs
        what = f"{chosen.backbone} does not turn each row into one vector"
        raise _error(chosen, what, [str(error)], "take another architecture as backbone") from error
    return int(dim)


def _read(published: Path, chosen: Fetch, digest: str) -> State:
    """The tensors of a file, by name."""
    if published.is_dir():
        found = sorted(path for path in published.rglob("*") if path.suffix in TENSORS)
        if len(found) != 1:
            table = [str(path.relative_to(published)) for path in found] or ["no file of tensors here"]
            do = "name the file after `#` in fetch.source"
            raise _error(chosen, "the weights must be one file", table, do)
        published = found[0]
    do = "fetch.source must lead to safetensors, or to a PyTorch state dict of plain tensors"
    if published.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: State = load_file(published)
            return state
        except SafetensorError as error:
            raise _error(chosen, "the weights cannot be read", [str(error)], do) from error
    import torch

    # torchvision's own files carry their digest in their names, which `sources` has checked.
    if chosen.sha256 is None and not chosen.source.startswith("torchvision:"):
        raise _error(
            chosen,
            "a pickled file of weights is opened only if the recipe pins its sha256",
            [published.name],
            f"add `sha256: {digest}` under fetch, if that is the file you mean",
        )
    try:
        content = torch.load(published, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes on a damaged file
        # Its message would have the user switch the protection off.
        alien = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds {alien[1]}, not only tensors" if alien else "it is damaged, or not from torch.save"
        raise _error(chosen, "the weights cannot be read", [why], do) from error
    for wrapper in WRAPPERS:
        content = content.get(wrapper, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise _error(chosen, "the weights cannot be read", ["it holds more than named tensors"], do)
    return content


def _matched(published: State, own: State, wanted: Iterable[str], chosen: Fetch) -> State:
    """The tensors that ``wanted`` names, found by name or, failing that, by their place in the order.

    A publisher who wrote the same architecture in other words still lists the same tensors in the same
    order: that is accepted only if number, shapes and roles (weight, bias, running mean ...) all agree.
    """
    needed = [name for name in own if name in set(wanted) and not name.endswith(COUNTER)]
    ours = [name for name in own if not name.endswith(COUNTER)]
    theirs = {name: tensor for name, tensor in published.items() if not name.endswith(COUNTER)}
    found = _unprefixed(theirs, needed, chosen)
    if missing := [name for name in needed if name not in found]:
        names = needed if len(theirs) == len(needed) else ours  # without the classifier, or with it
        same = len(theirs) == len(names) and all(
            a.rpartition(".")[2] == b.rpartition(".")[2] and (tensor.shape == own[b].shape or b not in needed)
            for (a, tensor), b in zip(theirs.items(), names, strict=True)
        )
        if not same:
            raise _mismatch(chosen, "missing in the weights", missing)
        found = dict(zip(names, theirs.values(), strict=True))
    wrong = [
        f"{name}: {_kind(found[name])}, the architecture has {_kind(own[name])}"
        for name in needed
        if found[name].shape != own[name].shape
        or found[name].is_floating_point() != own[name].is_floating_point()
    ]
    if wrong:
        raise _mismatch(chosen, "of another shape or kind", wrong)
    return {name: found.get(name, own[name]) for name in own if name in set(wanted)}


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _unprefixed(published: State, needed: list[str], chosen: Fetch) -> State:
    """The tensors under the architecture's own names, less what a wrapper has put before them."""
    landmark = max(needed, key=len)  # hardly the end of another name
    best: dict[str, State] = {}
    for prefix in [name.removesuffix(landmark) for name in published if name.endswith(landmark)]:
        bare = {
            name.removeprefix(prefix): tensor for name, tensor in published.items() if name.startswith(prefix)
        }
        if all(name in bare for name in needed):
            best[prefix] = bare
    if len(best) > 1:
        what = f"the weights hold {chosen.backbone} more than once"
        raise _error(chosen, what, [f"under {prefix!r}" for prefix in best], "save the one you mean alone")
    return next(iter(best.values()), published)


def _mismatch(chosen: Fetch, what: str, lines: list[str]) -> HeadstartError:
    return _error(
        chosen,
        f"the weights are not those of {chosen.backbone}",
        [f"{what}:", *(f"  {line}" for line in lines[:5])],
        "name the architecture that these weights were trained as in fetch.backbone",
    )


def _error(chosen: Fetch, what: str, table: Sequence[str], do: str) -> HeadstartError:
    lines = [line[:150] for text in table for line in text.splitlines()[:2]]
    return HeadstartError(what, where=sources.redacted(chosen.source), table=lines, do=do)


def _from_hub_folder(
    architecture: str, published: Path, chosen: Fetch, target: Path
) -> tuple[State, dict[str, Any]]:
    """State of a text network from a model repository's files; its config and tokenizer go along."""
    import torch

    kind = _json(published / "config.json", chosen).get("model_type")
    if kind != architecture:
        what = f"the weights are not those of {chosen.backbone}"
        do = f"write `backbone: transformers:{kind}` under fetch" if kind else "take a transformers model"
        raise _error(chosen, what, [f"config.json says model_type: {kind}"], do)
    if not any(published.glob("*.safetensors")):
        raise _error(
            chosen,
            "the model has no safetensors",
            sorted(path.name for path in published.iterdir())[:10],
            "take a revision that holds them; pickled weights of a hub are not opened",
        )
    network = _transformer(published, chosen)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("pooler.")}
    shutil.copy(published / "config.json", target / "config.json")
    longest = _copy_tokenizer(published, target, chosen)
    two = torch.ones(1, 2, dtype=torch.int64)
    return state, {
        "dim": _dim(chosen, network, input_ids=two, attention_mask=two),
        "preprocessing": {
            "max_tokens": min(longest, _positions(network)),
            "pooling": _pooling(published, chosen),
        },
    }


def _transformer(published: Path, chosen: Fetch) -> Any:
    """The network with its weights, by transformers' own rules for the names of older and other versions."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as chatter

    loud, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)  # it would show the classifiers that are left away, line by line
    chatter.disable_progress_bar()
    try:
        network, report = AutoModel.from_pretrained(
            published,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except Exception as error:  # a config may say anything
        what = "transformers cannot load this model"
        do = "take a model of an architecture that transformers itself holds"
        raise _error(chosen, what, [f"{type(error).__name__}: {error}"], do) from error
    finally:
        chatter.set_verbosity(loud)
        if bars:
            chatter.enable_progress_bar()
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
        raise _mismatch(chosen, "missing in the weights", missing)
    if wrong := sorted(report["mismatched_keys"]):
        lines = [f"{name}: {tuple(theirs)}, config.json says {tuple(ours)}" for name, theirs, ours in wrong]
        raise _mismatch(chosen, "of another shape", lines)
    return network


def _positions(network: Any) -> int:
    """The most tokens that a network tells apart; RoBERTa and its kin begin to count after the padding."""
    from torch import nn

    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in network.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    most = getattr(network.config, "max_position_embeddings", None) or 512
    return int(min(tables or [most if most > 0 else UNLIMITED]))  # XLNet says -1


def _copy_tokenizer(published: Path, target: Path, chosen: Fetch) -> int:
    """tokenizer.json as it is, or made from an older vocabulary; returns the most tokens it is meant for."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    made = target / "tokenizer.json"
    settings = published / "tokenizer_config.json"
    try:
        if (published / "tokenizer.json").is_file():
            shutil.copy(published / "tokenizer.json", made)
        elif any((published / name).is_file() for name in VOCABULARIES):
            AutoTokenizer.from_pretrained(
                published, local_files_only=True, trust_remote_code=False
            ).backend_tokenizer.save(str(made))
        else:  # transformers would make one without a vocabulary
            raise FileNotFoundError(f"none of tokenizer.json, {', '.join(VOCABULARIES)}")
        Tokenizer.from_file(str(made))
    except Exception as error:  # the tokenizers raise plain ones
        what = "the model has no tokenizer that can be read"
        raise _error(chosen, what, [str(error)], "take a model with a tokenizer.json") from error
    longest = _json(settings, chosen).get("model_max_length") if settings.is_file() else None
    return int(longest or UNLIMITED)


def _pooling(published: Path, chosen: Fetch) -> str:
    """How token vectors become one: what a sentence model says of itself, else their mean.

    The pooler of a BERT was trained to tell whether two sentences follow each other; with the network frozen,
    the mean of the tokens tells more about a text (Reimers & Gurevych 2019).
    """
    path = published / "1_Pooling" / "config.json"
    told = _json(path, chosen) if path.is_file() else {}
    if told.get("pooling_mode_cls_token"):
        return "cls"
    if told and not told.get("pooling_mode_mean_tokens"):
        log.warning("%s pools tokens in a way that headstart does not; taking their mean", chosen.backbone)
    return "mean"


def _json(path: Path, chosen: Fetch) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError) as error:
        what = f"the model has no {path.name} that can be read"
        do = "fetch.source must lead to a folder with config.json, model.safetensors and a tokenizer"
        raise _error(chosen, what, [type(error).__name__], do) from error


def _save(state: State, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path)
