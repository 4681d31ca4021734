"""Fine-tuning: the one loop in which a backbone and its head are trained together.

Goes in: a classifier, packed rows and their labels. Comes out: the same classifier with the weights of its
best epoch, and the history of the run. Everything random is a function of the seed and of the step or row at
hand, so a run that was killed continues from its last checkpoint to the same bits. Never looks at test rows.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from math import ceil, inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from numpy.typing import NDArray
from torch import Tensor, nn

from headstart import activations, alignment, augmentation, devices, environment, packs, schedules
from headstart.activations import SWEEP, Activations
from headstart.errors import HeadstartError
from headstart.heads import Singles
from headstart.metrics import (
    LOWER_IS_BETTER,
    OF_ROWS,
    Floats,
    Ints,
    fewest_groups,
    gains,
    groups_by_class,
    levels,
    scores,
)
from headstart.progress import bar
from headstart.recipe import Train

if TYPE_CHECKING:
    from headstart.checkpoints import Checkpoint, Checkpoints
    from headstart.classifiers import Classifier
    from headstart.packs import Pack, Rows

SECONDS_BETWEEN = 60.0  # checkpoints at least
RESAMPLES = 1000  # of the validation groups
SURE = 0.95  # that an earlier epoch is better than the last, if it is to be kept
SHARE_OF_TIME = 0.05  # that checkpoints may take
NAMED_WEIGHT = 0.3  # of the classes that rows are given by their centres; that of Liang et al. 2020
TOKENS_DROPPED = 0.15  # of a text that is changed much
TRIAL = 8  # rows that show whether a network runs without its frozen layers
BAD_ROWS = "bad_rows.csv"
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
log = logging.getLogger(__name__)


@dataclass
class Labels:
    """What every row of a manifest should be, and how much it counts; ``name`` writes into the arrays."""

    truth: Ints  # [n]
    targets: Floats  # [n, classes], each row a distribution
    weights: Floats  # [n]
    ids: Sequence[str]  # [n]
    groups: Sequence[str]  # [n]

    def name(self, rows: Rows, classes: Ints) -> None:
        """From now on, take these rows for rows of these classes."""
        self.truth[rows] = classes
        self.targets[rows] = np.eye(self.targets.shape[1])[classes]


@dataclass
class History:
    """What happened: a line per step and a line per epoch, and the clock, which no two runs agree on."""

    steps: list[dict[str, float]] = field(
        default_factory=list
    )  # step, epoch, loss, accuracy, learning_rate, ...
    epochs: list[dict[str, float]] = field(default_factory=list)  # epoch, step, and the validation scores
    clock: list[dict[str, float]] = field(default_factory=list)  # epoch, seconds, rows_per_second, ...
    chosen: int = 0  # the epoch that is kept; 0 is before the first


def precision_of(choices: Train, network: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype that a step computes in.

    On a CPU depthwise convolutions are slower backwards in bfloat16 than in float32, by 1.7 times for
    EfficientNet-Lite0.
    """
    if choices.precision != "auto":
        dtype: torch.dtype = getattr(torch, choices.precision)
        return dtype
    depthwise = any(
        isinstance(module, nn.Conv2d)
        and module.groups > 1
        and any(p.requires_grad for p in module.parameters())
        for module in network.modules()
    )
    fast = torch.bfloat16 in devices.fast_dtypes(device)
    return torch.bfloat16 if fast and not (depthwise and device.type == "cpu") else torch.float32


class Tuning:
    """A run over some rows of a pack.

    Args:
        classifier: trained in place.
        pack: inputs of all rows.
        labels: of all rows.
        train: rows to learn from.
        val: rows that choose the epoch.
        target: rows without labels that ``alignment`` sees.
        shares: of each class, float64 [classes], that ``hypothesis_transfer`` expects rows to be named in.
        checkpoints: where the run is kept; without, a killed run starts anew.
        work: where the ids of a batch go that cannot be learned from.
    """

    def __init__(
        self,
        classifier: Classifier,
        pack: Pack,
        labels: Labels,
        train: Rows,
        val: Rows,
        *,
        target: Rows | None = None,
        shares: Floats | None = None,
        checkpoints: Checkpoints | None = None,
        work: Path | None = None,
    ) -> None:
        self.classifier, self.pack, self.labels = classifier, pack, labels
        self.train_rows, self.val_rows = train, val
        self.target_rows = target if target is not None else train[:0]
        self.choices = choices = classifier.choices
        self.checkpoints, self.work = checkpoints, work
        for name in () if environment.launched() else RANKS:
            os.environ.pop(name, None)  # a platform's own, by which Accelerate would wait for others
        # One process and one device, or as many as torchrun started.
        wanted = devices.device()
        if wanted.type == "cuda" and wanted.index is not None and not environment.launched():
            torch.cuda.set_device(wanted)  # an accelerator alone takes the current one
        self.accelerator = Accelerator(cpu=wanted.type == "cpu", mixed_precision="no")
        self.device = self.accelerator.device
        devices.keep_memory()
        # One row alone has no variance to be standardised by.
        self.least = 2 if any(classifier.following()) else 1  # rows of a batch
        self._check()
        self.dtype = precision_of(choices, classifier, self.device)
        self.model = self.accelerator.prepare_model(classifier)
        self.groups = schedules.groups(
            classifier.trained(), classifier.fresh(), choices, classifier.spec.modality
        )
        self.rates = [group["lr"] for group in self.groups]
        self.optimizer = _optimizer(choices, self.groups)
        self.epochs = choices.epochs
        self.per_epoch = len(packs.cut(train, choices.batch, self.least))
        self.micro = choices.batch  # rows that a process computes at a time
        self.changing = classifier.changing()
        self.mean = {name: value.clone() for name, value in self.changing.items()} if choices.ema else {}
        self.best: dict[str, Tensor] = {name: value.clone() for name, value in self.changing.items()}
        self.history = History()
        self.step, self.elapsed, self.pause = 0, 0.0, SECONDS_BETWEEN
        self.activations: Activations | None = None
        self.target_order: tuple[int, list[Rows]] = (-1, [])
        self.shares = None if shares is None else torch.from_numpy(shares).float().to(self.device)

    def _check(self) -> None:
        """Refuse what cannot be learned in so many processes, or from batches of so few rows."""
        processes, alone = self.accelerator.num_processes, self.choices.needs_one_process
        if processes > 1 and alone:
            raise HeadstartError(
                f"training with {' and '.join(alone)} needs one process, and there are {processes}",
                where=", ".join(f"train.{key}" for key in alone),
                do=f"set {devices.PROCESSES}=1, or leave this out",
            )
        batch = self.choices.batch
        sides = [len(rows) for rows in (self.train_rows, self.target_rows) if len(rows)]
        if min([batch, *sides]) < self.least:
            raise HeadstartError(
                "BatchNorm cannot follow batches of a single row",
                where=f"train.batch: {batch}; {' and '.join(map(str, sides))} rows to learn from",
                do="raise train.batch or add rows; or do without `batch_norm: updated` and `entropy`",
            )

    def run(self) -> History:
        """Train to the end, and leave the classifier with the weights of the epoch chosen.

        Raises:
            HeadstartError: the loss is not a finite number, or a single row does not fit into memory.
        """
        try:
            self.keep_activations()
            return self._run()
        finally:
            self.activations = None

    def keep_activations(self) -> None:
        """Run the frozen layers once for all rows, if what they see is the same in every epoch."""
        alone = self.accelerator.num_processes == 1
        if not (self.work and alone and self.epochs > 1 and activations.constant(self.choices)):
            return
        if not self.classifier.splits():
            return
        rows = np.concatenate([self.train_rows, self.val_rows, self.target_rows])
        try:
            if self._chained(rows[:TRIAL], self.work):
                self.activations = Activations(self.classifier, self.pack, rows, self.dtype, self.work)
            else:
                log.info("the frozen layers run anew in every epoch: the others need more than their output")
        except OSError as error:
            log.warning("the frozen layers run anew in every epoch: %s", error)

    def _chained(self, rows: Rows, work: Path) -> bool:
        """Whether the logits of these rows are the same if the frozen layers do not run.

        Not every network is a chain: a layer may look back past the last frozen one. A vision transformer
        puts a token before those of its patches, in code of its own that runs whatever is known.
        """
        self.classifier.eval()
        with torch.inference_mode():
            plain = self._logits(rows)
            try:
                self.activations = Activations(self.classifier, self.pack, rows, self.dtype, work)
                return torch.allclose(plain, self._logits(rows), rtol=0.01, atol=0.01)
            except OSError:
                raise
            except Exception as error:  # whatever the network's own code raises
                log.debug("the network does not run without its frozen layers: %s", error)
                return False
            finally:
                self.activations = None

    def _run(self) -> History:
        if not self._resumed():
            self._judge(0)
        total = self.epochs * self.per_epoch
        began = saved = time.monotonic()
        before, ordered = self.elapsed, -1
        with bar(total=len(self.train_rows) * self.epochs, desc="fine-tuning", unit=" rows") as progress:
            progress.update(self.step * self.choices.batch)
            while self.step < total and self._share_of_budget() < 1 and not self._patience_lost():
                epoch, place = divmod(self.step, self.per_epoch)
                if epoch != ordered:
                    order, ordered = self.order(epoch), epoch
                    if not place and self.choices.source_free == "hypothesis_transfer":
                        self._name_rows()
                    epoch_began = self.step, time.monotonic(), time.process_time()  # or was taken up
                rows = order[place]
                done = max((self.step + 1) / total, self._share_of_budget())
                line = self.learn(rows, epoch, schedules.factor(self.choices, done, epoch))
                self.step += 1
                self.elapsed = before + time.monotonic() - began
                said = {"loss": f"{line['loss']:.3f}", "accuracy": f"{line['accuracy']:.2f}"}
                progress.set_postfix(said, refresh=False)  # drawn by update, and not at every step
                progress.update(len(rows))
                ended = self.step % self.per_epoch == 0 or self._share_of_budget() >= 1
                if ended:
                    self._judge(epoch + 1)
                    self._note_clock(epoch + 1, *epoch_began)
                if ended or time.monotonic() - saved > self.pause:
                    self._save()
                    saved = time.monotonic()
        self._settle()
        self._load(self.best)
        return self.history

    def probabilities(self, rows: Rows) -> Floats:
        """float64 [rows, classes], in the order of ``rows``, by the weights as they are now."""
        classes = self.classifier.linear.out_features
        found = torch.zeros(len(rows), classes, dtype=torch.float64)
        return self._swept(rows, found, lambda batch: self._logits(batch).cpu().double().softmax(dim=1))

    def vectors(self, rows: Rows) -> Singles:
        """The backbone's features float32 [rows, d], as ``probabilities``; memory: all of them."""
        found = torch.zeros(len(rows), self.classifier.linear.in_features)
        return self._swept(rows, found, lambda batch: self._seen(self.classifier.features, batch).float())

    def _swept(self, rows: Rows, found: Tensor, of: Callable[[Rows], Tensor]) -> NDArray[Any]:
        """Fill ``found``, zeros [rows, ...], with what ``of`` a batch is, and return it on every process."""
        place = np.empty(len(self.labels.truth), np.int64)
        place[rows] = np.arange(len(rows))
        self.classifier.eval()
        with torch.inference_mode():
            # Each process its share; where a row was not computed there are zeros, and they add up.
            first, count = self.accelerator.process_index, self.accelerator.num_processes
            for batch in self.pack.sweep(rows, SWEEP)[first::count]:
                found[place[batch]] = of(batch).cpu()
        result: NDArray[Any] = self._added(found).numpy()
        return result

    def _added(self, found: Tensor) -> Tensor:
        """The sum of a tensor over all processes, from the CPU to the CPU: Apple's GPUs have no float64."""
        if self.accelerator.num_processes == 1:
            return found
        total: Tensor = self.accelerator.reduce(found.to(self.device), "sum")
        return total.cpu()

    def _logits(self, rows: Rows) -> Tensor:
        """float32 [rows, classes], as measured and not as learned from."""
        return self._seen(self.classifier, rows)

    def _seen(self, network: Callable[..., Tensor], rows: Rows) -> Tensor:
        inputs, known = self._inputs(rows)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return network(*inputs, known=known)

    def order(self, epoch: int) -> list[Rows]:
        """The training rows in the batches of one epoch, the first of which is 0."""
        chance = np.random.default_rng([self.choices.seed, epoch])
        order: list[Rows] = self.pack.order(self.train_rows, self.choices.batch, chance, self.least)
        return order

    def learn(self, rows: Rows, epoch: int, factor: float) -> dict[str, float]:
        """One step on a batch that all processes share, at ``factor`` times the base learning rates."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss, right = self._gradients(rows, epoch)
        if self.choices.gradual:
            for group in self.groups:
                if group["depth"] > epoch + 1:
                    # Neither moved nor decayed: an optimizer skips what has no gradient.
                    for parameter in group["params"]:
                        parameter.grad = None
        trained = [p for group in self.groups for p in group["params"] if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(trained, self.choices.clip or inf))
        if not isfinite(loss) or not isfinite(norm):
            raise self._diverged(rows, loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        line = {
            "step": self.step + 1,
            "epoch": epoch + 1,
            "loss": loss,
            "accuracy": right / len(rows),
            "learning_rate": max(self.rates) * factor,
            "gradient_norm": norm,
        }
        self.history.steps.append(line)
        return line

    def _gradients(self, rows: Rows, epoch: int) -> tuple[float, int]:
        """Leave the gradient of the batch's weighted mean loss; return it and how many rows were right.

        What does not fit into a GPU's memory is computed in smaller parts, of which the gradients add up.
        """
        while True:
            try:
                return self._parts(rows, epoch)
            except RuntimeError as error:
                if not devices.out_of_memory(error):
                    raise
                if self.micro <= self.least or self.accelerator.num_processes > 1:
                    raise HeadstartError(
                        "a training step does not fit into memory",
                        where=f"{self.micro} rows on {self.device}",
                        do="lower train.batch or features.image_size, or name more layers in train.freeze",
                    ) from None
            # Here, where nothing of the step that failed is held any more.
            self.optimizer.zero_grad(set_to_none=True)
            devices.empty_cache(self.device)
            self.micro = max(self.least, ceil(min(self.micro, len(rows)) / 2))
            log.warning("out of memory on %s: going on with %d rows at a time", self.device, self.micro)

    def _parts(self, rows: Rows, epoch: int) -> tuple[float, int]:
        """As ``_gradients``: every process computes its share of the batch, in parts of ``micro`` rows."""
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = rows[rank::count]
        taking = 1 if len(mine) else 0  # every process must take part, or the others wait for ever
        mine = mine if taking else rows[:1]
        whole = float(self.labels.weights[rows].sum()) or 1.0
        told = []
        self.model.train()
        torch.manual_seed(seed_of(self.choices.seed, self.step, rank))  # what drops out at this step
        theirs = self._of_target(len(rows), epoch)
        parts, others = (packs.cut(side, self.micro, self.least) for side in (mine, theirs))
        for part, beside in zip_longest(parts, others, fillvalue=theirs[:0]):
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(self.model):
                loss, logits = self._loss(part, beside, epoch, whole, len(mine))
                loss = loss * taking
                # Several processes end up with the mean of their gradients, and the sum is wanted.
                (loss * count).backward()
            truth = torch.from_numpy(self.labels.truth[part]).to(self.device)
            right = (logits.argmax(dim=1) == truth).sum() * taking
            told.append(torch.stack([loss.detach(), right]))
        loss, right = self._added(torch.stack(told).cpu().double().sum(dim=0)).tolist()
        return loss, int(right)

    def _loss(self, part: Rows, beside: Rows, epoch: int, whole: float, count: int) -> tuple[Tensor, Tensor]:
        """What some rows add to the loss of their batch, and their logits [n, classes].

        Args:
            part: rows to learn from.
            beside: rows of the target that ``alignment`` compares them with.
            epoch: pictures look as they do in it.
            whole: weight of all rows of the batch together.
            count: how many of them this process computes.
        """
        inputs, known = self._inputs(part, epoch)
        inputs, targets, weights = self._wanted(part, inputs)
        seen, logits = self._learned_from(inputs, known)
        losses = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
        loss = (weights * losses).sum() / whole
        if self.choices.source_free:
            loss = self._source_free(logits, loss, len(part) / count)
        if len(beside):
            share = self.choices.alignment_weight * len(part) / count
            loss = loss + share * self._alignment(seen, logits, beside, epoch)
        return loss, logits

    def _wanted(self, rows: Rows, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Inputs, targets [n, classes] and weights [n], smoothed and mixed as the recipe says."""
        targets, weights = (
            torch.from_numpy(array[rows]).to(self.device, torch.float32)
            for array in (self.labels.targets, self.labels.weights)
        )
        if self.choices.label_smoothing:
            spread = self.choices.label_smoothing
            targets = targets * (1 - spread) + spread / targets.shape[1]
        if self.choices.mixup:
            pixels, targets, weights = augmentation.mixed(
                inputs[0], targets, weights, self.choices.mixup, self.choices.seed, self.step
            )
            inputs = (pixels,)
        return inputs, targets, weights

    def _learned_from(self, inputs: tuple[Tensor, ...], known: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors and logits of a batch in training."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            both: tuple[Tensor, Tensor] = self.model(*inputs, known=known, both=True)
        return both

    def _of_target(self, count: int, epoch: int) -> Rows:
        """The rows of the target for the step at hand, at most ``count``, in an order new in every epoch."""
        if not len(self.target_rows):
            return self.target_rows
        if epoch != self.target_order[0]:
            chance = np.random.default_rng([self.choices.seed, epoch, 1])
            order = self.pack.order(self.target_rows, self.choices.batch, chance, self.least)
            self.target_order = epoch, order
        order = self.target_order[1]
        return order[self.step % self.per_epoch % len(order)][:count]

    def _alignment(self, vectors: Tensor, logits: Tensor, beside: Rows, epoch: int) -> Tensor:
        """How differently the network sees a batch of the source and these rows of the target."""
        if self.choices.alignment == "consistency":
            with torch.no_grad():
                weak = self._learned_from(*self._inputs(beside, epoch, weak=True))[1]
            strong = self._learned_from(self._changed(beside, epoch), None)[1]
            return alignment.consistency(weak, strong)
        there = self._learned_from(*self._inputs(beside, epoch))
        factor = alignment.ramp(self.step / (self.epochs * self.per_epoch))
        return alignment.between(
            str(self.choices.alignment), (vectors, logits), there, self.classifier.discriminator, factor
        )

    def _source_free(self, logits: Tensor, named: Tensor, share: float) -> Tensor:
        """The loss where nothing but the target is at hand.

        Args:
            logits: [n, classes], of some rows of a batch.
            named: their part of the batch's cross-entropy with the classes that they were given.
            share: of the batch that these rows are.
        """
        if self.shares is None:
            return share * alignment.entropy(logits)
        return share * alignment.information(logits, self.shares) + NAMED_WEIGHT * named

    def _name_rows(self) -> None:
        """Give each row the class whose centre its vector is nearest to, as the weights are now."""
        rows, linear = self.train_rows, self.classifier.linear
        vectors = (
            torch.from_numpy(self.vectors(rows)).to(self.device) - self.classifier.mean
        ) / self.classifier.scale
        with torch.no_grad():
            named = alignment.centroid_labels(vectors, linear(vectors)).cpu().numpy()
        self.labels.name(rows, named)

    def _changed(self, rows: Rows, epoch: int) -> tuple[Tensor, ...]:
        """Pictures changed much, or texts without some of their tokens.

        What frozen layers make of these is never known: what is kept is theirs of the rows unchanged.
        """
        tensors = tuple(torch.from_numpy(array).to(self.device) for array in self.pack.batch(rows))
        if self.classifier.spec.modality == "image":
            strong = augmentation.strong(self.choices.augment)
            return (augmentation.augmented(tensors[0], strong, self.choices.seed, epoch, rows),)
        ids, mask = tensors
        kept = torch.rand(mask.shape, device=mask.device) >= TOKENS_DROPPED
        kept[:, 0] = True  # a text of nothing has no mean
        return ids, mask * kept

    def _inputs(
        self, rows: Rows, epoch: int | None = None, *, weak: bool = False
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What the classifier is given; with an ``epoch``, pictures as they look in it, or as a weak view."""
        if self.activations and self.activations.holds(rows):
            return self.activations.batch(rows)
        tensors = tuple(torch.from_numpy(array).to(self.device) for array in self.pack.batch(rows))
        if epoch is not None and self.classifier.spec.modality == "image":
            augment, seed = self.choices.augment, self.choices.seed
            augment = augmentation.weak(augment) if weak else augment
            tensors = (augmentation.augmented(tensors[0], augment, seed, epoch, rows),)
        return tensors, None

    def _average(self) -> None:
        """Move the running mean of the weights; early on it forgets faster, to keep up."""
        if self.choices.ema is None:
            return
        kept = min(self.choices.ema, (1 + self.step) / (10 + self.step))
        moving = [name for name, value in self.changing.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.mean[name] for name in moving], [self.changing[name] for name in moving], 1 - kept
        )
        for name in self.changing.keys() - set(moving):  # counters
            self.mean[name].copy_(self.changing[name])

    def _judge(self, epoch: int) -> None:
        """Measure the weights on the validation rows, and keep them if they are the best so far."""
        judged = self.mean or self.changing
        if not len(self.val_rows):  # nothing can choose
            self.history.epochs.append({"epoch": epoch, "step": self.step})
            self.history.chosen, self.best = epoch, {name: value.clone() for name, value in judged.items()}
            return
        own = {name: value.clone() for name, value in self.changing.items()}
        self._load(judged)
        found = scores(self.labels.truth[self.val_rows], self.probabilities(self.val_rows))
        self._load(own)
        self.history.epochs.append({"epoch": epoch, "step": self.step, **found})
        wanted = self.choices.choose_by
        earlier = [line for line in self.history.epochs if line["epoch"] == self.history.chosen]
        if wanted == "last" or epoch == 0 or _better(wanted, found[wanted], earlier[0][wanted]):
            self.history.chosen = epoch
            self.best = {name: value.clone() for name, value in judged.items()}
        self._say("epoch %d: %s", epoch, ", ".join(f"{name} {value:.3f}" for name, value in found.items()))

    def _settle(self) -> None:
        """Keep the last epoch after all, unless the one chosen is surely better.

        A few groups of validation rows choose badly among epochs that are much alike. In the last one the
        rates have come down, and it is the same however the validation rows were drawn.

        Of many epochs that are equally good one is better by luck: the risk of keeping it is divided among
        those that could have been chosen (Bonferroni), and the share of resamples that it has to win is
        moved outwards for few groups (see ``metrics.levels``).
        """
        wanted, last = self.choices.choose_by, int(self.history.epochs[-1]["epoch"])
        if wanted == "last" or self.history.chosen == last or self.choices.patience:
            return
        truth, groups = self.labels.truth[self.val_rows], np.asarray(self.labels.groups)[self.val_rows]
        sure = 1 - (1 - SURE) / (len(self.history.epochs) - 1)
        whole = wanted in OF_ROWS  # else no surer than the class that is in the fewest groups
        count = len(np.unique(groups)) if whole else min(groups_by_class(truth, groups).values())
        fewest = fewest_groups(sure)
        judged = {name: value.clone() for name, value in (self.mean or self.changing).items()}
        if count < fewest:
            self._say(
                "%d groups of validation rows cannot show that epoch %d is better than %d: that takes %d",
                *(count, self.history.chosen, last, fewest),
            )
        else:
            self._load(self.best)
            chosen = self.probabilities(self.val_rows)
            self._load(judged)
            final = self.probabilities(self.val_rows)
            gained = gains(truth, chosen, final, groups, wanted=[wanted], resamples=RESAMPLES)[wanted]
            won = gained < 0 if wanted in LOWER_IS_BETTER else gained > 0
            share = float(won.mean())
            least = 1 - levels(2 * sure - 1, count)[0]  # one-sided
            if share >= least:
                return
            self._say(
                "epoch %d is better than %d in %.1f%% of resamples, less than %.1f%%",
                *(self.history.chosen, last, 100 * share, 100 * least),
            )
        self.history.chosen, self.best = last, judged

    def _load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.changing.items():
                value.copy_(tensors[name])

    def _patience_lost(self) -> bool:
        patience = self.choices.patience
        return patience is not None and self.history.epochs[-1]["epoch"] - self.history.chosen >= patience

    def _share_of_budget(self) -> float:
        if self.choices.budget is None:
            return 0.0
        share = torch.tensor(self.elapsed / (60 * self.choices.budget), device=self.device)
        return float(broadcast(share))  # the first process's clock counts for all

    def _diverged(self, rows: Rows, loss: float) -> HeadstartError:
        """The error of a step that cannot be taken; the ids of its rows are kept."""
        ids = [self.labels.ids[row] for row in rows]
        where = f"step {self.step + 1}"
        if self.work is not None:
            self.work.mkdir(parents=True, exist_ok=True)
            path = self.work / BAD_ROWS
            path.write_text("\n".join(["id", *map(str, ids)]) + "\n", encoding="utf-8")
            where += f"; the ids of its rows are in {path}"
        return HeadstartError(
            f"training has diverged: the loss is {loss:g}",
            where=where,
            table=[str(name) for name in ids[:5]] + [f"and {len(ids) - 5} more"] * (len(ids) > 5),
            do="lower train.learning_rate; if it stops at the same rows again, look at these",
        )

    def _note_clock(self, epoch: int, first: int, began: float, worked: float) -> None:
        """Tell of an epoch from step ``first`` on, which began then: of one taken up, what came after."""
        seconds = time.monotonic() - began
        rows = (self.step - first) * self.choices.batch
        unit = 1 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 30)
        line = {
            "epoch": epoch,
            "seconds": seconds,
            "rows_per_second": rows / seconds,
            "cores_busy": (time.process_time() - worked) / seconds,
            "memory_gib": peak,
        }
        if self.device.type == "cuda":
            line["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / (1 << 30)
        self.history.clock.append(line)

    def _save(self) -> None:
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return
        began = time.monotonic()
        self.checkpoints.save(self.step, *self._state())
        self.pause = max(SECONDS_BETWEEN, (time.monotonic() - began) / SHARE_OF_TIME)

    def _resumed(self) -> bool:
        """Take up the last checkpoint, if there is one."""
        checkpoint = self.checkpoints.latest() if self.checkpoints else None
        if checkpoint is None:
            return False
        self._restore(checkpoint)
        self._say("continuing after step %d of %d", self.step, self.epochs * self.per_epoch)
        return True

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a checkpoint keeps: tensors and notes."""
        tensors: dict[str, Tensor] = {}
        for kind, named in (("model", self.changing), ("mean", self.mean), ("best", self.best)):
            tensors |= {f"{kind}.{name}": value for name, value in named.items()}
        for place, parameter in enumerate(self._parameters()):
            state = self.optimizer.state.get(parameter, {})
            tensors |= {
                f"optimizer.{place}.{key}": value for key, value in state.items() if value is not None
            }
        tensors["steps"] = torch.tensor(
            [list(line.values()) for line in self.history.steps], dtype=torch.float64
        )
        if self.choices.source_free:
            tensors["named"] = torch.from_numpy(self.labels.truth[self.train_rows])
        notes = {
            "elapsed": self.elapsed,
            "micro": self.micro,
            "columns": list(self.history.steps[0]),
            "epochs": self.history.epochs,
            "clock": self.history.clock,
            "chosen": self.history.chosen,
        }
        return tensors, notes

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Be what ``_state`` was."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "mean": {}, "best": {}, "optimizer": {}}
        for name, value in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            if kind in parts:
                parts[kind][rest] = value.to(self.device)
        self._load(parts["model"])
        self.mean, self.best = parts["mean"], parts["best"]
        for place, parameter in enumerate(self._parameters()):
            prefix = f"{place}."
            for name, value in parts["optimizer"].items():
                if name.startswith(prefix):
                    # Fused optimizers walk through memory: what goes with a parameter must lie as it does.
                    like = parameter if value.shape == parameter.shape else value
                    state = self.optimizer.state[parameter]
                    state[name.removeprefix(prefix)] = torch.empty_like(like, dtype=value.dtype).copy_(value)
        if self.choices.source_free:
            self.labels.name(self.train_rows, checkpoint.tensors["named"].numpy())
        notes = checkpoint.notes
        steps = [
            dict(zip(notes["columns"], line, strict=True)) for line in checkpoint.tensors["steps"].tolist()
        ]
        for line in steps:
            line |= {name: int(line[name]) for name in ("step", "epoch")}
        self.history = History(steps, notes["epochs"], notes["clock"], notes["chosen"])
        self.step, self.elapsed, self.micro = checkpoint.step, notes["elapsed"], notes["micro"]

    def _say(self, message: str, *values: object) -> None:
        if self.accelerator.is_main_process:
            log.info(message, *values)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.groups for parameter in group["params"])


def seed_of(seed: int, step: int, rank: int = 0) -> int:
    """The seed of what is random within one step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _better(metric: str, found: float, best: float) -> bool:
    """Whether a score beats the best one; an undefined one, as AUROC of a single class, is beaten by any."""
    return not isfinite(best) or (found < best if metric in LOWER_IS_BETTER else found > best)


def _optimizer(choices: Train, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if choices.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    kind = torch.optim.AdamW if choices.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=0.0, fused=True)
