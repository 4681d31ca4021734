"""Fine-tuning against the plain loops of the tutorials, a timm-style loop and the Trainer of transformers.

Run it with `make bench-finetune`, after `make demo` has brought data and weights. Every way runs in a process
of its own, one after the other, on the same rows and from the same weights. The clock starts when the imports
are done and counts everything from there: reading files, for ours also the pass that packs them, measuring on
the validation rows after each epoch. `python benchmarks/finetune.py races` measures one part alone, and
`throughput` the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from results import keep, known
from torch import nn

from headstart import backbones, devices, environment, examples, features, finetuning, fitting, packs
from headstart import recipe as recipes
from headstart.fetching import fetch
from headstart.layout import Layout
from headstart.validation import validate

ROOT = environment.project_root(Path(__file__).parent)
PICTURES, SENTENCES, MANY_SENTENCES = 192, 1_000, 4_000  # to train on
JUDGES = {PICTURES: 192, SENTENCES: 1_000, MANY_SENTENCES: 3_800}  # to validate
RESNET_GFLOP = 3 * 2 * 1.82  # of a step, per picture of 224 pixels: forward, and twice that backward
Curve = list[tuple[float, float]]  # seconds, validation accuracy


class Stopwatch:
    """Validation accuracy over time."""

    def __init__(self) -> None:
        self.began, self.curve = time.monotonic(), Curve()

    def note(self, accuracy: float) -> None:
        """One more point of the curve."""
        self.curve.append((time.monotonic() - self.began, accuracy))


def project(folder: Path, name: str, train: int, val: int) -> tuple[recipes.Recipe, Layout]:
    """A recipe with so many of its rows, its weights in place and nothing else."""
    chosen = recipes.load(ROOT / "recipes" / f"{name}.yaml")
    layout = Layout(folder, name)
    layout.raw.parent.mkdir(parents=True)
    layout.raw.symlink_to(ROOT / "data" / name.removesuffix("-tuned"))
    validate(chosen, layout)
    fetch(chosen, layout)
    path = layout.manifest / "manifest.parquet"
    rows = pd.read_parquet(path)
    parts = [
        rows[rows["split"] == split].sample(n=count, random_state=0)
        for split, count in (("train", train), ("val", val))
    ]
    pd.concat(parts).sort_index().to_parquet(path, index=False)
    return chosen, layout


def ours(chosen: recipes.Recipe, layout: Layout) -> Curve:
    """What `headstart run` does from the manifest on."""
    watch = Stopwatch()
    features.features(chosen, layout)
    rows = examples.load(chosen, layout)
    tuning, _ = fitting.begin(chosen, layout, rows, rows.rows("train"), rows.rows("val"))
    judge = tuning._judge

    def noted(epoch: int) -> None:
        judge(epoch)
        watch.note(tuning.history.epochs[-1]["accuracy"])

    tuning._judge = noted  # type: ignore[method-assign]
    tuning.run()
    return watch.curve


def classes(layout: Layout, chosen: recipes.Recipe) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and validation rows, with the class as a number."""
    rows = pd.read_parquet(layout.manifest / "manifest.parquet")
    rows["class"] = pd.Index(chosen.validate_.classes or []).get_indexer(rows["label"])
    return rows[rows["split"] == "train"], rows[rows["split"] == "val"]


class Files(torch.utils.data.Dataset[Any]):
    """Pictures as the tutorials read them."""

    def __init__(self, layout: Layout, rows: pd.DataFrame, transform: Callable[[Any], torch.Tensor]) -> None:
        self.paths, self.classes = [layout.raw / path for path in rows["path"]], rows["class"].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.open(self.paths[row]).convert("RGB")), self.classes[row]


def loaders(layout: Layout, chosen: recipes.Recipe, spec: backbones.Spec) -> list[Any]:
    """Batches of 32 of training and validation pictures, decoded by two workers."""
    from torchvision import transforms

    normal = transforms.Normalize(spec.preprocessing["mean"], spec.preprocessing["std"])
    augment = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    plain = [transforms.Resize(256), transforms.CenterCrop(224)]
    return [
        torch.utils.data.DataLoader(
            Files(layout, rows, transforms.Compose([*steps, transforms.ToTensor(), normal])),
            batch_size=32,
            shuffle=steps is augment,
            num_workers=2,
        )
        for rows, steps in zip(classes(layout, chosen), (augment, plain), strict=True)
    ]


def right(network: nn.Module, batches: Any) -> float:
    """Accuracy, as the tutorials count it."""
    network.eval()
    with torch.no_grad():
        found = [(network(x).argmax(dim=1) == y).float() for x, y in batches]
    network.train()
    return float(torch.cat(found).mean())


def plain_image(chosen: recipes.Recipe, layout: Layout) -> Curve:
    """The ResNet loop of the tutorials with this backbone: SGD, 25 epochs, a tenth of the rate every 7."""
    watch = Stopwatch()
    network, spec = backbones.load(layout.weights)
    network = nn.Sequential(network.requires_grad_(True), nn.Linear(spec.dim, 2)).train()
    batches, held_out = loaders(layout, chosen, spec)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    for _ in range(25):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        scheduler.step()
        watch.note(right(network, held_out))
    return watch.curve


def timm_image(chosen: recipes.Recipe, layout: Layout) -> Curve:
    """A loop of timm's parts at its best here: float32, channels last, AdamW, cosine, running mean, flips."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    watch = Stopwatch()
    network, spec = backbones.load(layout.weights)
    network = nn.Sequential(network.requires_grad_(True), nn.Linear(spec.dim, 2)).train()
    network = network.to(memory_format=torch.channels_last)
    batches, held_out = loaders(layout, chosen, spec)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.75)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=10, warmup_epochs=1, warmup_lr=1e-6
    )
    mean = ModelEmaV3(network, decay=0.98, use_warmup=True)
    step = 0
    for epoch in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                network(x.contiguous(memory_format=torch.channels_last)), y
            ).backward()
            optimizer.step()
            step += 1
            mean.update(network, step=step)
        scheduler.step(epoch + 1)
        watch.note(right(mean.module, held_out))
    return watch.curve


def padded(layout: Layout, chosen: recipes.Recipe) -> Iterator[tuple[torch.Tensor, ...]]:
    """Ids, mask and class of the training and the validation rows, filled up to 128 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(layout.weights / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128)
    for rows in classes(layout, chosen):
        encoded = tokenizer.encode_batch(rows["text"].tolist())
        ids, mask = (
            torch.tensor([getattr(one, name) for one in encoded]) for name in ("ids", "attention_mask")
        )
        yield ids, mask, torch.tensor(rows["class"].to_numpy())


class Pooled(nn.Module):
    """A transformer, the mean of its tokens, dropout and a linear layer."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.network, spec = backbones.load(weights)
        self.network.requires_grad_(True)
        self.drop, self.linear = nn.Dropout(0.3), nn.Linear(spec.dim, 2)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        """Logits, or loss and logits, as Trainer wants them."""
        tokens = self.network(input_ids=input_ids, attention_mask=attention_mask)[0]
        logits = self.linear(self.drop(features.averaged(tokens, attention_mask)))
        return (
            logits
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def plain_text(chosen: recipes.Recipe, layout: Layout) -> Curve:
    """The BERT loop of the tutorials with this backbone: Adam 2e-5, 3 epochs, 128 tokens, dropout 0.3."""
    watch = Stopwatch()
    network = Pooled(layout.weights).train()
    (ids, mask, truth), (val_ids, val_mask, val_truth) = padded(layout, chosen)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-5)
    for _ in range(3):
        for rows in torch.randperm(len(truth)).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(ids[rows], mask[rows]), truth[rows]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            parts = zip(val_ids.split(64), val_mask.split(64), strict=True)
            found = torch.cat([network(*part).argmax(dim=1) for part in parts])
        network.train()
        watch.note(float((found == val_truth).float().mean()))
    return watch.curve


def trainer_text(chosen: recipes.Recipe, layout: Layout) -> Curve:
    """The Trainer of transformers at its best: bfloat16 where fast, batches of one length, fused AdamW."""
    from transformers import DataCollatorWithPadding as Collator
    from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

    watch = Stopwatch()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(layout.weights / "tokenizer.json"), pad_token="[PAD]", model_max_length=128
    )
    parts = []
    for rows in classes(layout, chosen):
        encoded = tokenizer(rows["text"].tolist(), truncation=True)
        parts.append(
            [
                {"input_ids": i, "attention_mask": m, "labels": c, "length": len(i)}
                for i, m, c in zip(
                    encoded["input_ids"], encoded["attention_mask"], rows["class"], strict=True
                )
            ]
        )

    class Noted(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
            watch.note(metrics["eval_accuracy"])

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(axis=1) == found.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.05,
            bf16=torch.bfloat16 in devices.fast_dtypes(torch.device("cpu")),
            use_cpu=True,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=0,
        )

        class Collated(Collator):  # type: ignore[misc]
            def __call__(self, rows: Any) -> Any:
                return super().__call__([{k: v for k, v in row.items() if k != "length"} for row in rows])

        Trainer(
            Pooled(layout.weights),
            arguments,
            data_collator=Collated(tokenizer),
            train_dataset=parts[0],
            eval_dataset=parts[1],
            compute_metrics=accuracy,
            callbacks=[Noted()],
        ).train()
    return watch.curve


def slowed(chosen: recipes.Recipe, kind: str, without: str) -> recipes.Recipe:
    """The recipe with what it can leave out left out; what is no choice of a recipe is put aside here."""
    if "frozen" in kind:
        chosen = chosen.training(freeze="layer3", augment=recipes.Augment())
    if without == "bfloat16":
        chosen = chosen.training(precision="float32")
    if without == "frozen prefix":
        chosen = chosen.training(freeze=None)
    if without == "folded BatchNorm":
        features.foldable = lambda network, layers: False
    if without == "kept memory":
        devices.keep_memory = lambda: None
    if without == "fused optimizer":
        made = finetuning._optimizer

        def slower(*given: Any) -> torch.optim.Optimizer:
            optimizer = made(*given)
            for group in optimizer.param_groups:
                group["fused"] = False
            return optimizer

        finetuning._optimizer = slower
    return chosen


def steps(chosen: recipes.Recipe, layout: Layout, kind: str, without: str) -> float:
    """Rows per second of our steps, one of the things that make them fast left out."""
    chosen = slowed(chosen, kind, without)
    if not (layout.features / "features.npy").exists():
        features.features(chosen, layout)
    known = examples.load(chosen, layout)
    tuning, _ = fitting.begin(chosen, layout, known, known.rows("train"), known.rows("val"))
    if without == "texts of one length":
        pack: Any = tuning.pack
        type(pack).order = packs.Pixels.order
    if without == "channels last":
        tuning.classifier.to(memory_format=torch.contiguous_format)
        network = tuning.classifier.tapped.network
        network.register_forward_pre_hook(lambda m, given: (given[0].contiguous(),))
    if without == "packed pixels":
        read = features.Extractor(layout.weights, chosen.features, features.Arithmetic()).reader
        files = read([layout.raw / path for path in known.manifest["path"]])
        object.__setattr__(tuning, "pack", Decoding(tuning.pack, files))
    if without != "kept activations":
        tuning.keep_activations()
    if without == COMPILED:
        tuning.model = torch.compile(tuning.model, dynamic=chosen.modality == "text")
    batches = tuning.order(0)
    for rows in batches[:4]:
        tuning.learn(rows, 0, 1.0)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 8:
        rows = batches[(4 + count) % len(batches)]
        tuning.learn(rows, 0, 1.0)
        count += 1
    return count * chosen.train.batch / (time.monotonic() - began)


class Decoding:
    """A pack that reads files each time."""

    def __init__(self, pack: Any, reader: features.Reader) -> None:
        self.order, self.sweep, self.batch = pack.order, pack.sweep, reader.read


def plain_steps(chosen: recipes.Recipe, layout: Layout) -> float:
    """Rows per second of the plain loop's steps, pictures decoded already."""
    network, spec = backbones.load(layout.weights)
    network = nn.Sequential(network.requires_grad_(True), nn.Linear(spec.dim, 2)).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    x, y = torch.randn(32, 3, 224, 224), torch.arange(32) % 2

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    step()
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 10:
        step()
        count += 1
    return 32 * count / (time.monotonic() - began)


def resnet(chosen: recipes.Recipe, layout: Layout) -> recipes.Recipe:
    """The recipe of the solar cells with a ResNet-18 of random weights, trained whole."""
    import torchvision
    from safetensors.torch import save_file

    path = layout.root / "resnet18.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(torchvision.models.resnet18().state_dict(), path)
    made = chosen.fetch.model_copy(
        update={
            "backbone": "torchvision:resnet18",
            "source": f"file:{path}",
            "sha256": None,
            "mean": None,
            "std": None,
        }
    )
    chosen = chosen.training(freeze=None).model_copy(
        update={"fetch": made, "features": chosen.features.model_copy(update={"layers": None})}
    )
    other = Layout(layout.root, "resnet18")
    if not other.weights.exists():
        other.raw.symlink_to(layout.raw.resolve())
        fetch(chosen, other)
        other.manifest.parent.mkdir(parents=True, exist_ok=True)
        other.manifest.symlink_to(layout.manifest)
    return chosen


COMPILED = "nothing, and with torch.compile"
ABLATIONS = {
    "ResNet-18": [
        "",
        "bfloat16",
        "channels last",
        "folded BatchNorm",
        "kept memory",
        "fused optimizer",
        "packed pixels",
        COMPILED,
    ],
    "ResNet-18 frozen up to layer3": ["", "kept activations"],
    "EfficientNet-Lite0": [
        "",
        "frozen prefix",
        "folded BatchNorm",
        "channels last",
        "kept memory",
        "fused optimizer",
        COMPILED,
    ],
    "MiniLM": ["", "bfloat16", "texts of one length", "kept memory", "fused optimizer", COMPILED],
}


def measure(way: str, folder: Path) -> Any:
    """One measurement, in a process of its own."""
    torch.manual_seed(0)
    kind, _, rest = way.partition("/")
    image = kind in {"image", "resnet", "EfficientNet-Lite0"} or kind.startswith("ResNet-18")
    name = "solar-cells-tuned" if image else "sentiment-tuned"
    place = folder / ("image" if image else "many" if kind == "many" else "text")
    if not place.exists():
        rows = PICTURES if image else MANY_SENTENCES if kind == "many" else SENTENCES
        project(place, name, rows, JUDGES[rows])
    chosen, layout = recipes.load(ROOT / "recipes" / f"{name}.yaml"), Layout(place, name)
    if kind in {"image", "text", "many"}:
        ways = {
            "ours": ours,
            "plain": plain_image if image else plain_text,
            "timm": timm_image,
            "trainer": trainer_text,
        }
        return ways[rest](chosen, layout)
    if kind == "resnet" or kind.startswith("ResNet-18"):
        chosen = resnet(chosen, layout)
        layout = Layout(place, "resnet18")
    return plain_steps(chosen, layout) if rest == "plain" else steps(chosen, layout, kind, rest)


def reached(curve: Curve, accuracy: float) -> float:
    """Seconds until an accuracy is reached; infinite if it never is."""
    return next((seconds for seconds, found in curve if found >= accuracy), float("inf"))


def races(run: Callable[[str], Any]) -> dict[str, float]:
    """Time to the accuracy that the other way ends with, as a ratio: theirs by ours."""
    figures = {}
    print("| rows | way | final accuracy | seconds in all | seconds to the accuracy of the other |")
    print("|---|---|---|---|---|")
    for kind, other, figure in (
        ("image", "plain", "image_time_to_accuracy_ratio"),
        ("image", "timm", "vs_timm_ratio"),
        ("text", "plain", "text_time_to_accuracy_ratio"),
        ("many", "trainer", "vs_trainer_ratio"),
    ):
        theirs, own = run(f"{kind}/{other}"), run(f"{kind}/ours")
        goal = theirs[-1][1]
        times = reached(theirs, goal), reached(own, goal)
        for label, curve, seconds in ((other, theirs, times[0]), ("ours", own, times[1])):
            print(
                f"| {kind} | {label} | {curve[-1][1]:.3f} | {curve[-1][0]:.0f} | {seconds:.0f} |", flush=True
            )
        figures[figure] = round(times[0] / times[1], 2)
    return figures


def throughput(run: Callable[[str], Any]) -> dict[str, float]:
    """Rows per second of a step, ours and the plain loop's, and ours with one thing left out."""
    figures = {}
    rounds = [(run("resnet/plain"), run("ResNet-18/")) for _ in range(2)]
    plain, fast = (float(np.median([pair[i] for pair in rounds])) for i in (0, 1))
    figures["resnet18_step_speedup"] = round(fast / plain, 2)
    figures["resnet18_rows_per_second"] = round(fast, 1)
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    a @ a
    began = time.monotonic()
    for _ in range(20):
        a @ a
    rate = 20 * 2 * 2048**3 / (time.monotonic() - began) / 1e9
    figures["resnet18_share_of_matmul_rate"] = round(fast * RESNET_GFLOP / rate, 3)
    print(f"\nResNet-18 steps: plain {plain:.1f}, ours {fast:.1f} images/s; bf16 matmul {rate:.0f} GFLOP/s")
    print("\n| network | without | rows/s | slower by |\n|---|---|---|---|")
    for network, left_out in ABLATIONS.items():
        whole = 0.0
        for without in left_out:
            found = run(f"{network}/{without}")
            whole = whole or found
            print(f"| {network} | {without or '-'} | {found:.1f} | {whole / found:.2f} |", flush=True)
            figures[f"{network}, without {without or 'nothing'}"] = round(found, 1)
    return figures


PARTS = {"races": races, "throughput": throughput}


def main(parts: list[str]) -> None:
    """Measure these parts, or all, print their tables and write their figures beside those of the others."""
    figures = known("finetune")
    with tempfile.TemporaryDirectory(prefix="headstart-") as name:

        def run(way: str) -> Any:
            out = Path(name) / "out.json"
            command = [sys.executable, __file__, way, name, str(out)]
            subprocess.run(command, check=True, env={**os.environ, "HEADSTART_QUIET": "1"})
            return json.loads(out.read_text())

        for part in parts or PARTS:
            figures |= PARTS[part](run)
            keep("finetune", figures)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        result = measure(sys.argv[1], Path(sys.argv[2]))
        Path(sys.argv[3]).write_text(json.dumps(result))
    else:
        main(sys.argv[1:])
