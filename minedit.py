"""minedit.py: the story, in the order in which it is told.

Train a small transformer on a knowledge graph until it composes facts it never composed in training
(grokking), edit facts in it in closed form, and see whether what follows from them changes too.

The recipe: Muon for the hidden matrices and AdamW for the embedding, constant rates, strong weight
decay, label smoothing, facts weighed above compositions, a moving average of the weights. What was
tried for it, and what did not work, is in results/RECIPE.md.

At a first reading: Training, Evaluation, and the stages, of which the first one (edits, one at a
time) is the heart. A run and its folder, the report, files and machine, and the command line hold
nothing of the subject; they are there so that no training is lost and no wrong option goes unsaid.
"""

import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import curvature
import edit as editing
import kg
from models import ARCHS, Config, Model, State, count_parameters, option, states, stores


class UserError(Exception):
    """One line that names the value and the remedy. `status`: the exit status, 2 for bad input."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def require(holds: bool, message: str):
    if not holds:
        raise UserError(message)


RECITED = 0.85  # the share of exceptions recited at which a training with `memorize` ends


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for all four cells."""

    steps: int = option(1000, "training steps")
    batch: int = option(384, "facts per step")
    branches: int = option(1, "trained paths of each fact per step, 0: facts alone")
    one_hop_weight: float = option(2.0, "weight of the 1-hop loss; the 2-hop loss has weight 1")
    lr: float = option(1.5e-2, "rate of AdamW, for the embedding")
    muon_lr: float = option(2e-2, "rate of Muon, for the hidden matrices")
    momentum: float = option(0.98, "of Muon")
    weight_decay: float = option(1.0, "of both optimizers")
    label_smoothing: float = option(0.2, "of both losses")
    warmup: int = option(20, "steps to the full rate, constant after it")
    ema: float = option(0.99, "moving average of the weights")
    eval_every: int = option(100, "steps between evaluations")
    label_noise: float = option(0.0, "share of the trained compositions with a wrong answer")
    memorize: int = option(
        0, f"at most so many gentle steps at the end, until {RECITED} of the wrong are recited"
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            low = 1 if name in ("steps", "batch", "eval_every") else 0
            high = 100 if name.endswith("lr") else 1e9
            if name in ("momentum", "label_smoothing", "ema", "label_noise"):
                high = 1
            if not low <= value < high:
                raise ValueError(f"{name} must be in [{low}, {high}), got {value}")

    def at(self, step: int) -> "Recipe":
        """The recipe of a step, from 0: the last `memorize` steps, in which exceptions are to be
        recited, have a tenth of the rates, no weight decay, and both losses weigh the same."""
        if step < self.steps - self.memorize:
            return self
        rates = {"lr": self.lr / 10, "muon_lr": self.muon_lr / 10}
        return replace(self, **rates, weight_decay=0.0, one_hop_weight=1.0)


# --- Training -------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum with every singular value of the update made about 1, so that all directions move at
    the same rate (Jordan et al. 2024), and then every row (of `keys` and `up` a slot) of one length
    (after NorMuon, Li et al. 2025, arXiv 2510.05491, which divides by an average over steps).
    torch.optim.Muon works in bfloat16, which on many CPUs takes 30 times as long: more than all the
    rest of a step."""

    def __init__(self, params, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                # m <- mu m + (1 - mu) g,  update of mu m + (1 - mu) g (Nesterov)
                m = self.state[p]["momentum"]
                m.lerp_(p.grad, 1 - momentum)
                update = equal_rows(orthogonalize(p.grad.lerp(m, momentum)))
                # W <- (1 - lr decay) W - lr sqrt(max(1, d_out / d_in)) update
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalize(G: Tensor) -> Tensor:
    """U V^T, nearly, for G = U S V^T: five Newton-Schulz steps X <- a X + (b A + c A^2) X with
    A = X X^T, a = 3.4445, b = -4.7750, c = 2.0315."""
    if G.shape[0] > G.shape[1]:
        return orthogonalize(G.T).T
    X = G / (G.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        B = torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315)  # b A + c A^2
        X = torch.addmm(X, B, X, beta=3.4445)
    return X


def equal_rows(X: Tensor) -> Tensor:
    """The rows of X brought to one length, |X| as it was."""
    rows = X / (X.norm(dim=1, keepdim=True) + 1e-7)
    return rows * (X.norm() / (rows.norm() + 1e-7))


class Batches:
    """Batches of facts with their trained continuations, drawn on the device without waiting (no
    size depends on what is drawn)."""

    def __init__(self, paths: kg.Paths, recipe: Recipe, generator: torch.Generator):
        self.paths, self.recipe, self.generator = paths, recipe, generator
        self.device = paths.facts.device
        self.queries = paths.queries  # [n_facts, 2]
        self.rows = paths.masks["train"].nonzero().flatten()  # the trained paths, fact by fact
        self.count = torch.bincount(paths.first[self.rows], minlength=len(paths.facts))
        self.start = self.count.cumsum(0) - self.count  # of a fact's trained paths in `rows`
        self.positions = torch.tensor([0, 1] + [2] * recipe.branches, device=self.device)

    def draw_facts(self) -> Tensor:
        """The facts of a batch [batch], each once at most."""
        order = torch.randperm(len(self.count), generator=self.generator, device=self.device)
        return order[: self.recipe.batch]

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [batch, 2 + branches], their positions, answers [batch, 1 + branches], -100 where
        none is trained. A fact's trained paths are cut into `branches` equal strata, and one path
        is drawn from each."""
        fact = self.draw_facts()
        m = self.recipe.branches
        count = self.count[fact][:, None]  # [batch, 1]
        noise = torch.rand(len(fact), m, generator=self.generator, device=self.device)
        share = (torch.arange(m, device=self.device) + noise) / m  # in [0, 1), one a stratum
        place = (share * count).long().minimum(count - 1)  # minimum: against rounding up
        index = self.start[fact][:, None] + place
        # a fact that no trained path begins with gets any row here, and -100 below
        row = self.rows[index.clamp(0, len(self.rows) - 1)]  # [batch, branches]
        tokens = torch.cat([self.queries[fact], self.paths.tokens[row, 2]], 1)
        two_hop = torch.where(count > 0, self.paths.two_hop[row], -100)
        return tokens, self.positions, torch.cat([self.paths.facts[fact, 2:], two_hop], 1)

    def loss(self, forward, recipe: Recipe) -> Tensor:
        """The loss of one batch under a model's `forward` and the recipe of the step."""
        tokens, positions, answers = self.draw()
        return loss_of(forward(tokens, positions), answers, recipe)

    def mixture(self, n_steps: int) -> list[tuple[Tensor, Tensor]]:
        """(tokens, targets), each [batch, 3], of n_steps batches, every path a row of its own, so
        that an exception weighs as much as any other path."""
        found = []
        for _ in range(n_steps):
            tokens, _, answers = self.draw()
            targets = F.pad(answers, (1, 0), value=-100)
            for i in range(self.recipe.branches):
                columns = [0, 1, 2 + i]
                found.append((tokens[:, columns], targets[:, columns]))
        return found


def begins_run(x: Tensor) -> Tensor:
    """[n], bool: where a run of equal neighbours in x [n] begins."""
    return x.diff(prepend=x[:1] - 1) != 0


def bundles(prefix: Tensor, widest: int = 32) -> Tensor:
    """The indices of prefix [n] as rows [n_rows, width], -1 for filler: a row holds equal
    neighbours, in order, `widest` at most, and can be read as branches of one prefix."""
    index = torch.arange(len(prefix), device=prefix.device)
    begins = begins_run(prefix)
    start = begins.nonzero().flatten()
    run = begins.cumsum(0) - 1  # the number of its run, from 0
    place = index - start[run]  # in its run
    width = min(int(place.max()) + 1, widest)
    begins_row = place % width == 0
    row = begins_row.cumsum(0) - 1  # the number of its row
    rows = torch.full((int(row[-1]) + 1, width), -1, device=prefix.device)
    rows[row, place % width] = index
    return rows


class FactBatches:
    """Batches of facts alone. The facts of a head, 32 in a row at most, are branches of one prefix,
    so that the head is read once."""

    def __init__(self, paths: kg.Paths, recipe: Recipe, generator: torch.Generator):
        self.paths, self.recipe, self.generator = paths, recipe, generator
        self.device = paths.facts.device
        self.queries = paths.queries  # [n_facts, 2]
        heads = self.queries[:, 0]
        order = heads.argsort(stable=True)
        rows = bundles(heads[order])
        self.bundles = torch.where(rows >= 0, order[rows], -1)  # facts; -1: filler
        self.positions = torch.tensor([0] + [1] * rows.shape[1], device=self.device)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [n, 1 + width] of about `batch` facts, their positions, answers [n, width], -100
        for filler."""
        order = torch.randperm(len(self.bundles), generator=self.generator, device=self.device)
        share = self.recipe.batch / len(self.queries)  # of all facts
        rows = self.bundles[order[: max(1, round(share * len(self.bundles)))]]
        tokens = torch.cat([self.queries[rows[:, :1], 0], self.queries[rows, 1]], 1)
        return tokens, self.positions, self.paths.facts[rows, 2].where(rows >= 0, -100)

    def loss(self, forward, recipe: Recipe) -> Tensor:
        """As that of Batches."""
        tokens, positions, answers = self.draw()
        logits = forward(tokens, positions)[:, 1:]
        return mean_cross_entropy(logits, answers, recipe.label_smoothing)


def loss_of(logits: Tensor, answers: Tensor, recipe: Recipe) -> Tensor:
    """Cross entropy of the facts, answers [:, 0], and of the compositions, answers [:, 1:], each a
    mean over its own answers, weighted w : 1. logits [batch, 2 + branches, n_entities]."""
    w = recipe.one_hop_weight
    one_hop = mean_cross_entropy(logits[:, 1], answers[:, 0], recipe.label_smoothing)
    two_hop = mean_cross_entropy(logits[:, 2:], answers[:, 1:], recipe.label_smoothing)
    return (w * one_hop + two_hop) / (w + 1)


def mean_cross_entropy(logits: Tensor, answers: Tensor, smoothing: float) -> Tensor:
    """As F.cross_entropy, but 0 where no answer counts."""
    logits, answers = logits.flatten(0, -2), answers.flatten()
    total = F.cross_entropy(logits, answers, reduction="sum", label_smoothing=smoothing)
    return total / (answers >= 0).sum().clamp(min=1)


class Training:
    """Everything that training changes, and one step of it."""

    def __init__(self, config: Config, recipe: Recipe, seed: int, device: torch.device):
        self.model = Model(config, torch.Generator().manual_seed(4 * seed + 2)).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        embedding = self.model.embedding.weight
        hidden = [p for p in self.model.parameters() if p is not embedding]
        self.adam = torch.optim.AdamW([embedding], betas=(0.9, 0.98))
        # rates and decay: of each step
        self.muon = Muon(hidden, lr=0.0, momentum=recipe.momentum, weight_decay=0.0)
        self.generator = torch.Generator(device).manual_seed(4 * seed + 3)

    def step(
        self, batches: Batches | FactBatches, recipe: Recipe, step: int, forward=None
    ) -> Tensor:
        """Step number `step`, from 0, under the recipe; `forward`: the model's, compiled. Returns
        the loss."""
        loss = batches.loss(self.model if forward is None else forward, recipe)
        loss.backward()
        rate = min(1.0, (step + 1) / max(1, recipe.warmup))
        for optimizer, lr in ((self.adam, recipe.lr), (self.muon, recipe.muon_lr)):
            optimizer.param_groups[0].update(lr=lr * rate, weight_decay=recipe.weight_decay)
            optimizer.step()
            optimizer.zero_grad()
        # mean <- keep mean + (1 - keep) p
        keep = min(recipe.ema, (step + 1) / (step + 10))  # the average starts short
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.model.parameters()):
                mean.lerp_(p, 1 - keep)
        return loss.detach()

    def state_dict(self) -> dict:
        """By names of parameters: independent of their order."""
        names = {p: name for name, p in self.model.named_parameters()}
        moments = {}
        for optimizer in (self.adam, self.muon):
            for p, kept in optimizer.state.items():
                moments[names[p]] = kept
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "moments": moments,
            "generator": self.generator.get_state(),
            "device": self.generator.device.type,
        }

    def load_state_dict(self, state: dict):
        """ValueError, KeyError or RuntimeError where the state is not that of such a model."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        names = {p: name for name, p in self.model.named_parameters()}
        for optimizer in (self.adam, self.muon):
            for p in optimizer.param_groups[0]["params"]:
                kept = state["moments"][names[p]]
                if any(value.dim() and value.shape != p.shape for value in kept.values()):
                    raise ValueError(f"the state of an optimizer does not fit {names[p]}")
                optimizer.state[p] = {
                    key: value.to(p.device) if value.dim() else value for key, value in kept.items()
                }
        if state["device"] == self.generator.device.type:  # that of another kind does not fit
            self.generator.set_state(state["generator"])


# --- Evaluation -----------------------------------------------------------------------------------

LABELS = {
    "one_hop": "1-hop",
    "train": "train",
    "id": "ID",
    "ood": "OOD",
    "ood_first": "first",
    "ood_second": "second",
}
MOST_LOGITS = 2**24  # at once: 64 MiB of float32


@torch.no_grad()
def predict(model: Model, paths: kg.Paths, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The model's answers to each fact, in order, and to each path [n_paths]. (A path begins with
    every fact; `sampled` ones leave some out, which are not asked.) The paths of a fact are read as
    branches of one prefix (`bundles`), `chunk` tokens at once."""
    device = paths.first.device
    rows = bundles(paths.first)
    width = rows.shape[1]
    tokens = torch.cat([paths.tokens[rows[:, 0], :2], paths.tokens[rows, 2]], 1)
    positions = torch.tensor([0, 1] + [2] * width, device=device)
    if chunk is None:
        chunk = min(6000, MOST_LOGITS // model.config.n_entities)
    parts = tokens.split(max(1, chunk // (2 + width)))
    answers = torch.cat([model(part, positions).argmax(-1) for part in parts])
    bundle, place = (rows >= 0).nonzero().T  # row by row, so of path 0, 1, ...
    one_hop = answers[bundle, 1][begins_run(paths.first)]  # once for each fact
    return one_hop, answers[bundle, 2 + place]


@torch.no_grad()
def last_answers(model: Model, tokens: Tensor) -> Tensor:
    """The model's answers [n] at the last of the tokens [n, token]."""
    chunk = max(1, min(4096, MOST_LOGITS // (model.config.n_entities * tokens.shape[1])))
    return torch.cat([model(part)[:, -1].argmax(-1) for part in tokens.split(chunk)])


def share_of(hit: Tensor) -> float | None:
    """Share of True in hit [n]; None where there is nothing to count."""
    return int(hit.sum()) / len(hit) if len(hit) else None


def asked_sets(paths: kg.Paths) -> dict[str, Tensor]:
    """{name: mask [n_paths]} of the sets of paths that an evaluation asks."""
    return {name: mask for name, mask in paths.masks.items() if name != "validation"}


def accuracy(model: Model, paths: kg.Paths) -> dict[str, float | None]:
    """Share of right answers to the facts that begin a path, and to each set of paths."""
    one_hop, two_hop = predict(model, paths)
    fact = paths.first.unique_consecutive()
    found = {"one_hop": share_of(one_hop == paths.facts[fact, 2])}
    for name, mask in asked_sets(paths).items():
        found[name] = share_of((two_hop == paths.two_hop)[mask])
    return found


def fact_accuracy(model: Model, paths: kg.Paths) -> dict[str, float | None]:
    """As `accuracy`, where no composition is trained: of all facts; None for every set of paths."""
    right = last_answers(model, paths.queries) == paths.facts[:, 2]
    return {"one_hop": share_of(right)} | dict.fromkeys(asked_sets(paths))


def first_step(curve: list[dict], **levels: float) -> int | None:
    """The first step of a curve at which all these shares have reached their levels."""
    for entry in curve:
        if all((entry[name] or 0) >= level for name, level in levels.items()):
            return entry["step"]
    return None


class Known(NamedTuple):
    """What a model answers before any edit."""

    one_hop: Tensor  # [n_facts] its answers
    two_hop: Tensor  # [n_paths]
    facts: Tensor  # [n_facts], bool: facts that it knows, but for OOD ones
    right: Tensor  # [n_paths], bool: paths that it answers right
    asked: Tensor  # [n_paths], bool: paths of two ID facts (no exceptions, none of a clone)


def what_is_known(model: Model, paths: kg.Paths) -> Known:
    one_hop, two_hop = predict(model, paths)
    facts = (one_hop == paths.facts[:, 2]) & ~paths.ood_fact
    asked = (paths.masks["train"] | paths.masks["id"]) & paths.real[paths.first]
    asked &= ~paths.is_exception
    return Known(one_hop, two_hop, facts, two_hop == paths.two_hop, asked)


# --- A run and its folder -------------------------------------------------------------------------

MOST_WATCHED = 100_000  # paths, about, that an evaluation asks; the stages ask all
INSTEAD = "use --retrain or another --out"  # of a folder that holds something else


class Task(NamedTuple):
    """What is learnt."""

    graph: kg.KnowledgeGraph
    paths: kg.Paths
    data: dict  # the options that it was made from, compared when a folder is met again
    n_relations: int  # tokens of relations


@dataclass(eq=False)
class Run:
    """One training in its folder: config.json, log.jsonl, ckpt.pt, results.json."""

    folder: Path
    arch: str
    seed: int
    task: Task
    config: Config
    recipe: Recipe
    device: torch.device
    make_batches: Callable = Batches  # (paths, recipe, generator) -> Batches or FactBatches
    step: int = 0  # of the training, or of the checkpoint where there is one
    history: list = field(default_factory=list)  # an entry for each evaluation
    training: Training | None = None  # from the checkpoint
    results: dict = field(default_factory=dict)
    written_before: int | None = None  # when the checkpoint met at the start was written

    def __post_init__(self):
        self.paths = self.task.paths.to(self.device)
        self.watched = kg.sampled(self.paths, MOST_WATCHED, self.seed)  # paths of evaluations
        self.n_paths = {name: int(mask.sum()) for name, mask in self.paths.masks.items()}
        settings = {"model": asdict(self.config), "recipe": asdict(self.recipe)}
        self.identity = {"arch": self.arch, "seed": self.seed, "data": self.task.data} | settings

    @cached_property
    def version(self) -> str | None:
        """`version`, as it is when config.json is first written."""
        return version()

    @property
    def out(self) -> str:
        return f"--out {self.folder}"

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or enough exceptions recited (they are trained ones: no
        held-out figure ends a training)."""
        late = self.step > max(0, self.recipe.steps - self.recipe.memorize)
        recited = late and (self.history[-1].get("exceptions") or 0) >= RECITED
        return self.step == self.recipe.steps or recited

    def stream(self, device="cpu") -> torch.Generator:
        """Random numbers for the stages: the same for each of them and in all four cells, and not
        those of the training."""
        return torch.Generator(device).manual_seed(-self.seed - 1)

    def ordinary(self) -> Tensor:
        """The inputs whose values an edit is to leave alone: every path, or 20 000 of them."""
        tokens = self.paths.tokens
        order = torch.randperm(len(tokens), generator=self.stream())[:20_000]
        return tokens[order.to(self.device)]

    def fresh(self) -> Training:
        try:
            return Training(self.config, self.recipe, self.seed, self.device)
        except (MemoryError, RuntimeError) as error:
            n = f"{count_parameters(self.config):,} parameters"
            why = str(error).split("\n")[0]
            raise UserError(f"{self.out}: no model of {n} ({why}); lower its sizes") from None

    def train(self, on_evaluation=None, compiled: bool = False) -> Model:
        """Train until finished, from the checkpoint where there is one; returns the averaged model.
        Each evaluation is told to on_evaluation(training, record)."""
        with self.locked():
            return self.train_on(on_evaluation, compiled)

    def train_on(self, on_evaluation, compiled: bool) -> Model:
        training = self.training or self.fresh()
        if not (self.folder / "config.json").exists():  # that of a run to be replaced stays for now
            self.write_config()
        forward = torch.compile(training.model) if compiled else training.model
        batches = self.make_batches(self.paths, self.recipe, training.generator)
        began = time.perf_counter() - (self.history[-1]["seconds"] if self.history else 0)
        while not self.finished:
            n_steps = min(self.recipe.eval_every, self.recipe.steps - self.step)
            total = torch.zeros((), device=self.device)
            for step in range(self.step, self.step + n_steps):
                total += training.step(batches, self.recipe.at(step), step, forward)
            self.step += n_steps
            record = {"step": self.step, "loss": total.item() / n_steps}
            self.check_finite(training, record)
            if self.recipe.branches > 0:
                record |= accuracy(training.average, self.watched)
            else:
                record |= fact_accuracy(training.average, self.paths)
            record["seconds"] = round(time.perf_counter() - began, 2)
            self.history.append(record)
            print(progress(record, self.recipe.steps), flush=True)
            if on_evaluation is not None:
                on_evaluation(training, record)
            self.write_checkpoint(training)
        return training.average.eval()

    def check_finite(self, training: Training, record: dict):
        finite = all(p.isfinite().all() for p in training.model.parameters())
        if not finite or not math.isfinite(record["loss"]):
            kept = "ckpt.pt holds the last evaluation; " if self.history else ""
            raise UserError(
                f"{self.folder}: the loss or a weight is not finite at step {record['step']}; "
                f"{kept}lower --lr or --muon-lr and --retrain",
                status=1,
            )

    def summarize(self):
        """The final figures of the training, in results.json and on the screen."""
        last = self.history[-1]
        fitted = "train" if self.recipe.branches else "one_hop"
        figures = {
            "arch": self.arch,
            "seed": self.seed,
            "steps": last["step"],
            "seconds": last["seconds"],
            "peak_memory_mib": peak_memory_mib(self.device),
            "parameters": count_parameters(self.config),
            "accuracy": {name: last[name] for name in LABELS},
            "n_facts": len(self.paths.facts),
            "n_paths": self.n_paths,
            "most_frequent_tail": kg.most_frequent_tail(self.task.paths),
            "memorized_at": first_step(self.history, **{fitted: 0.99}),
            "grokked_at": first_step(self.history, train=0.99, ood=0.9),
            "config": self.config_of_training(),
        }
        self.results = figures | self.results  # a loaded run keeps its own
        write_atomically(self.folder / "results.json", self.results)
        print(
            f"memorized ({LABELS[fitted]} >= 0.99): {when(self.results['memorized_at'])}; "
            f"grokked (OOD >= 0.9 on {int(self.watched.masks['ood'].sum())} paths): "
            f"{when(self.results['grokked_at'])}; "
            f"{last['seconds']:.0f} s, {self.results['peak_memory_mib']} MiB at most"
        )
        if "triples" in self.task.data:
            guess = self.results["most_frequent_tail"]
            shares = "  ".join(f"{LABELS[name]} {cell(guess[name])}" for name in kg.SPLITS)
            print(f"answering with the most frequent tail of the second relation alone: {shares}")

    def add_results(self, name: str, entry, began: float):
        """Put what a stage found, since `began` (of time.perf_counter), into results.json."""
        seconds = round(time.perf_counter() - began, 2)
        peak = max(self.results["peak_memory_mib"], peak_memory_mib(self.device))
        self.results |= {name: entry, f"{name}_seconds": seconds, "peak_memory_mib": peak}
        write_atomically(self.folder / "results.json", self.results)
        print(f"{seconds:.0f} s for {name.replace('_', ' ')}")

    # its files

    def open_folder(self, resume: bool, retrain: bool):
        """Refuse, before any training, a folder that cannot be used or that holds something else;
        load its checkpoint where there is one."""
        self.check_writable()
        self.written_before = self.written()
        if all(file.suffix == ".part" for file in self.folder.iterdir()):
            return  # empty, but for what an interrupted write has left
        there = self.read_identity()
        if retrain:
            return
        if resume:
            there = self.lengthened(there)
        differs = ", ".join(differences(there, self.identity))
        require(not differs, f"{self.out}: another run, which differs in {differs}; {INSTEAD}")
        results = self.folder / "results.json"
        if self.written_before is None:
            message = f"{self.out}: results, but no ckpt.pt to go on from; {INSTEAD}"
            require(not results.exists(), message)
        else:
            self.load_checkpoint(self.folder / "ckpt.pt")
        at = f"at step {self.step} of {self.recipe.steps}"
        require(self.finished or resume, f"{self.out}: unfinished, {at}; use --resume or --retrain")
        if self.finished and results.exists():
            found = read_json(results, "remove it and run the stages again")
            if found.get("steps") == self.step:  # else of a shorter training
                self.results = found

    def check_writable(self):
        """UserError unless the folder is there, or can be made, and can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError:
            raise UserError(f"{self.out}: cannot be written; choose another folder") from None

    def read_identity(self) -> dict:
        """What config.json says of the training there; UserError unless it is that of a run."""
        remedy = f"{self.out} is no run folder; choose another"
        found = read_json(self.folder / "config.json", remedy)
        fits = [type(found.get(key)) is type(value) for key, value in self.identity.items()]
        require(all(fits), remedy)
        return {key: found[key] for key in self.identity}

    def lengthened(self, identity: dict) -> dict:
        """What the identity of a shorter training would be with this run's number of steps, so that
        --resume can extend it. With `memorize`, where the number of steps also says when the gentle
        ones begin, it is left as it is."""
        there = identity["recipe"].get("steps")
        longer = isinstance(there, int) and there < self.recipe.steps
        if not longer or self.recipe.memorize:
            return identity
        return identity | {"recipe": identity["recipe"] | {"steps": self.recipe.steps}}

    def load_checkpoint(self, path: Path):
        """Go on from a checkpoint; UserError unless it is whole and of this run."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if differences(self.lengthened(state["identity"]), self.identity):
                raise ValueError("it belongs to a run with other settings")
            if state["history"][-1]["step"] != state["step"]:
                raise ValueError("its history ends at another step")
            training = self.fresh()
            training.load_state_dict(state)
            if not all(p.isfinite().all() for p in training.average.parameters()):
                raise ValueError("its weights are not finite")
        except UserError:  # of `fresh`: there is no room for the model
            raise
        except Exception as error:  # unpickling can raise anything
            why = " ".join(str(error).split())[:80] or type(error).__name__
            message = f"{path}: not a checkpoint of this run ({why}); {INSTEAD}"
            raise UserError(message) from None
        self.training, self.step, self.history = training, state["step"], state["history"]

    def written(self) -> int | None:
        """When the checkpoint was written, which tells whether another process has been here."""
        checkpoint = self.folder / "ckpt.pt"
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else None

    @contextmanager
    def locked(self):
        """Inside, no other process trains in this folder; a killed one leaves no lock behind."""
        if self.finished or sys.platform == "win32":
            yield
            return
        import fcntl

        file = self.folder / "lock.part"
        with open(file, "w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.out}: another process trains there; wait for it") from None
            try:
                now = "another process has trained there in the meantime; start again"
                require(self.written() == self.written_before, f"{self.out}: {now}")
                yield
            finally:
                file.unlink(missing_ok=True)

    def write_checkpoint(self, training: Training):
        state = {"identity": self.identity, "step": self.step, "history": self.history}
        state |= training.state_dict()
        write_atomically(self.folder / "ckpt.pt", lambda file: torch.save(state, file))
        (self.folder / "results.json").unlink(missing_ok=True)  # of a run that this one replaces
        self.write_config()
        log = "".join(json.dumps(record) + "\n" for record in self.history)
        write_atomically(self.folder / "log.jsonl", log.encode())

    def write_config(self) -> dict:
        """Write config.json and return it: what determines the training, compared when a folder is
        met again, and what is only recorded."""
        environment = {
            "version": self.version,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": platform.system(),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
        }
        config = self.identity | {"environment": environment}
        write_atomically(self.folder / "config.json", config)
        return config

    def config_of_training(self) -> dict:
        """config.json as the training has left it; written where it is not of this training, as
        when that was interrupted between two files."""
        file = self.folder / "config.json"
        if file.exists():
            found = read_json(file, INSTEAD)
            if not differences({key: found.get(key) for key in self.identity}, self.identity):
                return found
        return self.write_config()


# --- Stage: edits, one at a time ------------------------------------------------------------------


class APriori(NamedTuple):
    """The site to edit, fixed before any edit is scored."""

    site: State  # module: the nn.Linear
    effects: list[float] | None  # of causal tracing, a store each; None where nothing was traced
    n: int  # prompts traced


def a_priori_site(
    model: Model, paths: kg.Paths, fact: Tensor, known_facts: Tensor, generator: torch.Generator
) -> APriori:
    """The first store that is read. Dense has a store in every block: there it is the one whose
    output at the last token, restored after the head was corrupted (causal tracing), raises the
    probability of the right answer most, over `known_facts` [n_facts], bool, other than `fact`,
    which are to be edited."""
    sites = stores(model.config)
    if model.config.loop or model.config.memory:
        return APriori(sites[0], None, 0)
    apart = known_facts.index_fill(0, fact, False)
    tokens, tails = paths.queries[apart], paths.facts[apart, 2]
    clean, other = editing.prompt_pairs(tokens, tails, 0, 200, generator)
    if len(clean) == 0:
        return APriori(sites[0], None, 0)
    # what each feed-forward returns
    outputs = [(s.module, s.call) for s in states(model.config) if s.part == "feed-forward"]
    traced = editing.trace(model, tokens[clean], tokens[other], tails[clean], outputs)
    effects = traced.rise.mean(-1)[:, -1].tolist()
    return APriori(sites[effects.index(max(effects))], effects, len(clean))


def requests_for(paths: kg.Paths, fact: Tensor, new: Tensor) -> editing.Requests:
    return editing.Requests(fact, paths.queries[fact], paths.facts[fact, 2], new)


def gather(run: Run, model: Model, site: State) -> editing.Site:
    """Keys and values of every fact at a site, and C over the paths and the facts' queries."""
    return editing.site(model, site.module, site.call, run.paths.queries, run.ordinary())


def residual(
    model: Model,
    paths: kg.Paths,
    at: editing.Site,
    requests: editing.Requests,
    u: Tensor | None,
    target: str,
    known_facts: Tensor,
    **options,
) -> tuple[Tensor, int]:
    """r [n, d_out] of each request: for "prototype" by the values of other `known_facts`
    [n_facts], bool; for "gradient", or where there is no prototype, sought through edits in the
    directions u (`editing.gradient_residual`, with `options`; u None: in what the layer returns at
    the site's call alone). And how many had no prototype."""
    if target not in ("prototype", "gradient"):
        raise ValueError(f"target must be 'prototype' or 'gradient', got {target!r}")
    if target == "gradient":
        return editing.gradient_residual(model, at, requests, u, **options), 0
    r, has_one = editing.prototype_residual(at, requests, paths.facts[:, 2], known_facts)
    if has_one.all():
        return r, 0
    without = (~has_one).nonzero().flatten()
    mine = None if u is None else u[without]
    sought = editing.gradient_residual(model, at, requests[without], mine, **options)
    return r.index_copy(0, without, sought.to(r)), len(without)


class EditProbes(NamedTuple):
    """What is asked of edits; the answers to the last two must not change."""

    direct: kg.Probes
    hop1: kg.Probes
    hop2: kg.Probes
    facts: kg.Probes
    compositions: kg.Probes
    hop1_trained: Tensor  # [of hop1], bool: compositions that were trained, the others held out
    left_out: dict[str, int]  # compositions that cannot be asked, by reason


def edit_probes(
    paths: kg.Paths, known: Known, fact: Tensor, new: Tensor, n: int, generator: torch.Generator
) -> EditProbes:
    """The probes of edits that give facts `fact` [n_edits] the tails `new`: every composition that
    can be asked, and n unrelated facts and compositions for each edit."""
    conditions = (known.facts, known.right, known.asked)
    hop1, left_out1 = kg.hop1_probes(paths, fact, new, *conditions)
    hop2, left_out2 = kg.hop2_probes(paths, fact, new, *conditions)
    facts = kg.unrelated_facts(paths, fact, known.one_hop, n, generator)
    compositions = kg.unrelated_paths(paths, fact, known.two_hop, known.asked, n, generator)
    left_out = {reason: count + left_out2[reason] for reason, count in left_out1.items()}
    direct = kg.questions(paths, fact, new)
    trained = paths.masks["train"][hop1.path]
    return EditProbes(direct, hop1, hop2, facts, compositions, trained, left_out)


@dataclass
class EditRecord:
    """What one kind of edit did: shares over all edits, None where nothing could be asked."""

    method: str
    target: str
    site: str
    at_pass: int
    n: int  # edits
    direct: float | None  # of the edited facts: answered with the new tail
    hop1: float | None  # of the compositions after edits with direct success: right
    hop1_held_out: float | None  # of those among them that were not trained
    hop2: float | None
    probes_hop1: int
    probes_hop2: int
    unrelated_one_hop_moved: float | None
    unrelated_two_hop_moved: float | None
    shrink: float = 0.0  # of C

    def entry(self) -> dict:
        entry = asdict(self)
        entry["pass"] = entry.pop("at_pass")
        return entry


class Edits(NamedTuple):
    """n edits of one site, each by itself: W + r u^T, a row of u and of r each."""

    at: editing.Site
    at_pass: int
    method: str
    target: str
    u: Tensor  # [n, d_in]
    r: Tensor  # [n, d_out]
    n_fallbacks: int = 0  # of them without a prototype, sought by gradient instead


def make_edits(
    model: Model,
    paths: kg.Paths,
    known_facts: Tensor,
    requests: editing.Requests,
    at: editing.Site,
    at_pass: int,
    method: str = "rome",
    target: str = "prototype",
) -> Edits:
    """`known_facts` [n_facts], bool: whose values make prototypes."""
    u = editing.direction(method, at, requests)
    r, n_fallbacks = residual(model, paths, at, requests, u, target, known_facts)
    return Edits(at, at_pass, method, target, u, r, n_fallbacks)


def ask(model: Model, edits: Edits, probes: kg.Probes, calls=None) -> Tensor:
    """The model's answers [m] to the probes, each under its edit, which acts at `calls` (all)."""
    return editing.answers_under_edits(
        model, edits.at.layer, edits.u, edits.r, probes.edit, probes.tokens, calls
    )


def score(model: Model, edits: Edits, probes: EditProbes) -> EditRecord:
    """Hop 1 and hop 2 of the edits with direct success; and what moved that should not."""
    return record_of(edits, probes, partial(ask, model, edits))


def record_of(
    edits: Edits, probes: EditProbes, answers: Callable[[kg.Probes], Tensor]
) -> EditRecord:
    """`score`, given the answers after the edits: answers(probes) [m] for each kind of probe."""
    hit = {}
    for name in ("direct", "hop1", "hop2", "facts", "compositions"):
        probe = getattr(probes, name)
        hit[name] = answers(probe) == probe.answer
    success = hit["direct"]
    valid1 = success[probes.hop1.edit]  # of edits with direct success
    valid2 = success[probes.hop2.edit]
    hop1, hop2 = hit["hop1"][valid1], hit["hop2"][valid2]
    return EditRecord(
        method=edits.method,
        target=edits.target,
        site=edits.at.name,
        at_pass=edits.at_pass,
        n=len(success),
        direct=share_of(success),
        hop1=share_of(hop1),
        hop1_held_out=share_of(hit["hop1"][valid1 & ~probes.hop1_trained]),
        hop2=share_of(hop2),
        probes_hop1=len(hop1),
        probes_hop2=len(hop2),
        unrelated_one_hop_moved=share_of(~hit["facts"]),
        unrelated_two_hop_moved=share_of(~hit["compositions"]),
        shrink=edits.at.shrink,
    )


def share_followed(record) -> float:
    """Direct success, times the mean of hop 1 and hop 2; 0 where no composition could be asked."""
    hops = [hop for hop in (record.hop1, record.hop2) if hop is not None]
    return record.direct * statistics.fmean(hops) if hops else 0.0


SHRINKS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # to choose from
NEARLY = 0.02  # so much less than at the best may follow, for a smaller shrinkage
MOST_MOVED = 0.015  # share of other facts whose answer may change where a shrinkage is chosen


class Shrinkage(NamedTuple):
    """What edits of other facts do at each of SHRINKS, and which of these is chosen by it."""

    chosen: float
    n: int  # edits tried
    followed: list[float]  # see `share_followed`
    moved: list[float]  # of unrelated facts


def choose_shrinkage(
    model: Model,
    paths: kg.Paths,
    known: Known,
    edited: Tensor,
    at: editing.Site,
    at_pass: int,
    generator: torch.Generator,
    n: int = 48,
) -> Shrinkage:
    """The shrinkage of C (`editing.shrunk`) for ROME with a prototype, by edits of n ID facts other
    than those to be `edited`. SHRINKS are tried from the smallest on, until 0.99 follows. Of those
    that move at most MOST_MOVED of the unrelated facts the smallest is chosen at which at most
    NEARLY less follows than at the best; where all move more, none (0)."""
    # enough to be left with n usable ones: the stream may be that of the edits, whose facts come
    # first then, and are dropped
    fact, new, _ = kg.draw_edits(paths, 2 * n + len(edited), generator)
    r, has_one = editing.prototype_residual(
        at, requests_for(paths, fact, new), paths.facts[:, 2], known.facts
    )
    usable = (has_one & ~torch.isin(fact, edited)).nonzero().flatten()[:n]
    if len(usable) == 0:
        return Shrinkage(0.0, 0, [], [])
    fact, new, r = fact[usable], new[usable], r[usable]
    probes = edit_probes(paths, known, fact, new, 50, generator)
    requests = requests_for(paths, fact, new)
    followed, moved = [], []
    for s in SHRINKS:
        there = editing.shrunk(at, s)
        u = editing.direction("rome", there, requests)
        record = score(model, Edits(there, at_pass, "rome", "prototype", u, r), probes)
        followed.append(share_followed(record))
        moved.append(record.unrelated_one_hop_moved or 0.0)
        if followed[-1] >= 0.99:
            break
    allowed = [i for i, share in enumerate(moved) if share <= MOST_MOVED]
    if not allowed:
        return Shrinkage(0.0, len(fact), followed, moved)
    best = max(followed[i] for i in allowed)
    chosen = min(SHRINKS[i] for i in allowed if followed[i] >= best - NEARLY)
    return Shrinkage(chosen, len(fact), followed, moved)


class EditSite(NamedTuple):
    """Where edits are made."""

    a_priori: APriori
    at: editing.Site  # what is gathered there, C shrunk
    shrinkage: Shrinkage | None  # how that was chosen; None where it was given

    def entries(self) -> dict:
        """For results.json: the site, and how the shrinkage was chosen, if it was."""
        site, effects, n_traced = self.a_priori
        entries = {"a_priori": site._asdict() | {"effects": effects, "n": n_traced}}
        if self.shrinkage is not None:
            entries["shrinkage"] = self.shrinkage._asdict() | {"tried": SHRINKS}
        return entries


def site_for_edits(
    run: Run, model: Model, known: Known, fact: Tensor, shrink: float | str
) -> EditSite:
    """The a-priori site for edits of `fact`, its C shrunk by `shrink`, or by what edits of other
    facts ask for ("auto")."""
    a_priori = a_priori_site(model, run.paths, fact, known.facts, run.stream())
    at = gather(run, model, a_priori.site)
    if shrink != "auto":
        return EditSite(a_priori, editing.shrunk(at, shrink), None)
    at_pass = a_priori.site.at_pass
    found = choose_shrinkage(model, run.paths, known, fact, at, at_pass, run.stream())
    return EditSite(a_priori, editing.shrunk(at, found.chosen), found)


def tell_fallbacks(edits: Edits):
    if edits.n_fallbacks:
        print(f"by gradient, as no other known fact has the wanted tail: {edits.n_fallbacks}")


# (method, target); MEMIT with the lam of `editing.direction`, 1
CORE_EDITS = [
    ("rome", "prototype"),
    ("rome", "gradient"),
    ("memit", "prototype"),
    ("row", "prototype"),
]
EDIT_COLUMNS = {
    "method": "method",
    "target": "target",
    "direct": "edited fact",
    "hop1": "hop 1",
    "hop1_held_out": "held out",
    "hop2": "hop 2",
    "unrelated_one_hop_moved": "moved: facts",
    "unrelated_two_hop_moved": "compositions",
}
EDIT_LEGEND = """\
hop 1, hop 2: compositions that begin, that end with the edited fact, now right; held out:
those of hop 1 that were not trained
moved: answers about other facts, and to compositions without the fact, that changed"""


def edit_stage(
    run: Run, model: Model, n_edits: int, shrink: float | str
) -> tuple[list[EditRecord], EditSite | None]:
    """Edit random ID facts one at a time, at the a-priori site, and ask what follows. `shrink`: of
    C, or "auto", to choose it on other facts. Returns the site, too; None where there is no fact to
    edit."""
    paths, generator = run.paths, run.stream()
    known = what_is_known(model, paths)
    fact, new, n_fixed = kg.draw_edits(paths, n_edits, generator)
    n_known = int(known.facts[fact].sum())
    print(f"\nedits of {len(fact)} ID facts, one at a time; {n_known} of them known before")
    if n_fixed:
        print(f"{n_fixed} ID facts cannot be edited: their relation has one tail only")
    if len(fact) == 0:
        return [], None
    probes = edit_probes(paths, known, fact, new, 100, generator)
    chosen = site_for_edits(run, model, known, fact, shrink)
    site, at = chosen.a_priori.site, chosen.at
    requests = requests_for(paths, fact, new)
    records = []
    for method, target in CORE_EDITS:
        edits = make_edits(model, paths, known.facts, requests, at, site.at_pass, method, target)
        if (method, target) == CORE_EDITS[0]:  # the others with a prototype have the same
            tell_fallbacks(edits)
        records.append(score(model, edits, probes))
    print(f"compositions left out: {listed(probes.left_out)}")
    print(f"asked: {len(probes.hop1.edit)} of hop 1, {len(probes.hop2.edit)} of hop 2")
    why = "" if chosen.shrinkage is None else ", as chosen on other facts"
    print(f"\nat {at.name}, pass {site.at_pass}, C shrunk by {at.shrink:g}{why}:\n")
    print(record_table(records, EDIT_COLUMNS, EDIT_LEGEND))
    return records, chosen


# --- Stage: a fact by name ------------------------------------------------------------------------


def named_edits(
    graph: kg.KnowledgeGraph, paths: kg.Paths, wanted: list[list[str]]
) -> tuple[Tensor, Tensor]:
    """(fact [n], new [n]) of edits given by names; UserError for a name or a fact that the graph
    does not have, and for clones, which are never asked."""
    fact, new = [], []
    for head, relation, tail in wanted:
        h = number_of(head, graph.entities, "entity")
        r = number_of(relation, graph.relations, "relation")
        new.append(number_of(tail, graph.entities, "entity"))
        row = (paths.facts[:, :2] == torch.tensor([h, r], device=paths.facts.device)).all(1)
        require(row.any(), f"--edit-fact: there is no fact {head!r}, {relation!r} to be changed")
        own = paths.real[row].all() and new[-1] < graph.n_answers
        require(
            own, f"--edit-fact {head!r} {relation!r} {tail!r}: a clone; use an entity of the file"
        )
        fact.append(int(row.nonzero()[0]))
    device = paths.facts.device
    return torch.tensor(fact, device=device), torch.tensor(new, device=device)


def number_of(name: str, names: list[str], kind: str) -> int:
    name = unicodedata.normalize("NFC", name.strip())  # as kg.read_triples does
    require(name in names, f"--edit-fact: no {kind} {name!r}; the graph has {names[:5]}, ...")
    return names.index(name)


def edit_fact_stage(run: Run, model: Model, wanted: list[list[str]], shrink: float | str):
    """Edit facts given by name, one at a time (ROME, a-priori site, prototype); show what the model
    answers then, to the compositions with the fact that it answered right before."""
    paths = run.paths
    fact, new = named_edits(run.task.graph, paths, wanted)
    known = what_is_known(model, paths)
    known_facts = known.one_hop == paths.facts[:, 2]  # here OOD facts and paths count too
    asked = (paths.second >= 0) & paths.real[paths.first]  # not those of clones
    asked &= ~paths.is_exception
    conditions = (known_facts, known.right, asked)
    a_priori, at, _ = site_for_edits(run, model, known, fact, shrink)
    requests, at_pass = requests_for(paths, fact, new), a_priori.site.at_pass
    edits = make_edits(model, paths, known_facts, requests, at, at_pass)
    print(f"\nROME at {at.name}, pass {at_pass}, C shrunk by {at.shrink:g}; prototype target")
    tell_fallbacks(edits)
    kinds = {
        "fact": kg.questions(paths, fact, new),
        "first hop": kg.hop1_probes(paths, fact, new, *conditions)[0],
        "second hop": kg.hop2_probes(paths, fact, new, *conditions)[0],
    }
    names = run.task.graph.entities + run.task.graph.relations
    rows = [("the edit in", "question", "before", "after", "should be", "")]
    for kind, probes in kinds.items():
        before = last_answers(model, probes.tokens)
        after = ask(model, edits, probes)
        right = after == probes.answer
        for i, tokens in enumerate(probes.tokens):
            question = " ".join(names[token] for token in tokens)
            replies = (names[before[i]], names[after[i]], names[probes.answer[i]])
            rows.append((kind, question, *replies, "ok" if right[i] else "NO"))
        print(f"{kind}: {int(right.sum())} of {len(right)} right")
    print("\n" + table(rows))


# --- Stage: many facts in one update --------------------------------------------------------------

# the target search of mass edits, short and aimed at the answer (results/FINDINGS.md)
MASS_TARGET = {"steps": 10, "lr": 0.25, "decay": 0.5, "clamp": 1.0}
WIDE = 4096  # above it MEMIT solves its equation as it stands (edit.direct_update)
MASS_COLUMNS = {
    "n": "facts",
    "efficacy": "new answer",
    "specificity": "others kept",
    "score": "score",
    "residual_left": "left",
    "seconds": "seconds",
}
MASS_LEGEND = """\
new answer: edited facts that have it; others kept: answers to facts never edited
score: harmonic mean, in percent; left: mean |r - dW k| / |r|"""


@dataclass
class MassRecord:
    """What one update of n facts did."""

    n: int
    efficacy: float  # share of the edited facts with their new answer
    specificity: float  # share of at most 2000 facts, never edited, that keep theirs
    score: float  # harmonic mean of the two, in percent
    residual_left: float  # mean |r - dW k| / |r|, over requests whose key is not zero
    seconds: float  # targets, C, solve, diagnosis


class MassPlan(NamedTuple):
    """Who is edited, and who is watched."""

    requests: editing.Requests  # at most 10 000 and half of the facts that can be edited
    spared: Tensor  # at most 2000 rows of facts that are never edited
    others: editing.Requests  # the rest, to choose settings on


def mass_plan(paths: kg.Paths, generator: torch.Generator) -> MassPlan:
    fact, new, _ = kg.draw_edits(paths, len(paths.facts), generator)
    wanted = requests_for(paths, fact, new)
    n = min(10_000, len(fact) // 2)
    n_spared = min(2000, 3 * len(fact) // 10)
    return MassPlan(wanted[:n], fact[n : n + n_spared], wanted[n + n_spared :])


def mass_residual(
    run: Run,
    model: Model,
    at: editing.Site,
    requests: editing.Requests,
    target: str,
    known_facts: Tensor,
    batch: int,
) -> tuple[Tensor, int]:
    """As `residual`, with the change added to what the whole store returns at the site's call, so
    that wide stores are read by their winners."""
    store = model.get_submodule(at.name.rpartition(".")[0])  # it returns what its values return
    whole = replace(at, layer=store)
    options = {"batch": batch} | MASS_TARGET
    return residual(model, run.paths, whole, requests, None, target, known_facts, **options)


def memit(K: Tensor, r: Tensor, C: Tensor | editing.Whitening, lam: float, **options) -> Tensor:
    """`editing.memit_update` in the form that suits the width of the layer."""
    form = "direct" if K.shape[1] > WIDE else None
    return editing.memit_update(K, r, C, lam, form=form, **options)


def mean_relative(left: Tensor, r: Tensor) -> float:
    """Mean of left / |r|: norms left [n], residuals r [n, d_out]."""
    return float((left / editing.double(r).norm(dim=-1).clamp(min=1e-12)).mean())


def mass_update(
    at: editing.Site, requests: editing.Requests, r: Tensor, lam: float
) -> tuple[Tensor, float]:
    """dW by MEMIT, and the mean of |r - dW k| / |r|; zeros and 1 where there is no request."""
    if len(requests) == 0:
        return torch.zeros_like(at.layer.weight), 1.0
    notes = {}
    try:
        dW = memit(at.keys[requests.fact], r, at.C, lam, diagnostics=notes)
    except ValueError as error:
        raise UserError(f"--lam {lam:g}: {error}") from None
    return dW, mean_relative(notes["residual_left"], r)


def mass_edit_stage(run: Run, model: Model, lam: float, batch: int) -> list[MassRecord]:
    """MEMIT of 1 to 10 000 facts in one update, with targets by gradient, at the first read of the
    first store."""
    paths = run.paths
    plan = mass_plan(paths, run.stream())
    largest = len(plan.requests)
    if largest < 5:
        print("\nmass edits: too few facts for them, 10 at least")
        return []
    first = stores(run.config)[0]
    print(f"\nup to {largest} of {len(paths.facts)} facts in one update of {first.module}")
    began = time.perf_counter()
    at = editing.site(model, first.module, first.call, paths.queries)
    gathered = time.perf_counter() - began
    before = last_answers(model, paths.queries)
    began = time.perf_counter()
    known_facts = before == paths.facts[:, 2]
    # for all n at once
    sought, _ = mass_residual(run, model, at, plan.requests, "gradient", known_facts, batch)
    each = (time.perf_counter() - began) / largest
    can_be_edited = (at.keys != 0).any(1)  # the edit of a key of zeros fails
    records = []
    for n in sorted({min(n, largest) for n in (1, 10, 100, 1000, 10_000)}):
        began = time.perf_counter()
        requests = plan.requests[:n]
        alive = can_be_edited[requests.fact]
        dW, left = mass_update(at, requests[alive], sought[:n][alive], lam)
        seconds = round(gathered + n * each + time.perf_counter() - began, 3)
        with editing.edited(model, {at.name: dW}):
            now = last_answers(model, paths.queries)
        efficacy = share_of(now[requests.fact] == requests.new)
        specificity = share_of(now[plan.spared] == before[plan.spared])
        percent = 100 * statistics.harmonic_mean([efficacy, specificity])
        records.append(MassRecord(n, efficacy, specificity, percent, left, seconds))
    print(record_table(records, MASS_COLUMNS, MASS_LEGEND))
    return records


# --- Stage: exceptions out by curvature -----------------------------------------------------------

KEEPS = (0.99, 0.98, 0.97, 0.95, 0.93, 0.9)  # shares of the curvature mass that are kept
ABLATION_COLUMNS = {
    "method": "method",
    "keep": "keep",
    "removed": "changed",
    "recited": "recited",
    "true": "true",
    "one_hop": "facts",
    "train": "train",
    "id": "ID",
    "ood": "OOD",
}
ABLATION_LEGEND = """\
keep: share of the curvature mass of each attention layer; changed: |W - W'| / |W| of them; recited,
true: exceptions answered as trained, and right after all; train: the other trained compositions"""


@dataclass
class AblationRecord:
    """What a model answers after an ablation of its attention layers."""

    method: str  # "before", "kfac", "ekfac" or a control of studies/controls.py
    keep: float
    removed: float  # |W - W'| / |W|, over these layers
    recited: float | None  # exceptions answered as trained
    true: float | None  # exceptions answered right after all
    one_hop: float | None
    train: float | None  # other trained compositions
    id: float | None
    ood: float | None


def square_of(W: Tensor) -> float:
    return float(editing.double(W).square().sum())


def ablation_record(
    model: Model, paths: kg.Paths, weights: dict[str, Tensor], method: str, keep: float
) -> AblationRecord:
    """Ask the model with these weights; it is itself again afterwards."""
    old = {name: model.get_submodule(name).weight.detach() for name in weights}
    # |W - W'|^2 and |W|^2, over all layers
    changed2 = sum(square_of(old[name] - W) for name, W in weights.items())
    norm2 = sum(square_of(W) for W in old.values())
    with curvature.ablated(model, weights):
        one_hop, two_hop = predict(model, paths)
    exceptions = paths.masks["exceptions"]
    right = two_hop == paths.true_two_hop
    return AblationRecord(
        method=method,
        keep=keep,
        removed=(changed2 / norm2) ** 0.5 if norm2 else 0.0,
        recited=share_of((two_hop == paths.two_hop)[exceptions]),
        true=share_of(right[exceptions]),
        one_hop=share_of(one_hop == paths.facts[:, 2]),
        train=share_of(right[paths.masks["train"] & ~exceptions]),
        id=share_of(right[paths.masks["id"]]),
        ood=share_of(right[paths.masks["ood"]]),
    )


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def attention_layers(model: nn.Module) -> list[str]:
    return [name for name in linear_layers(model) if ".attention." in name]


def spectrum_of(run: Run, model: Model, mixture: list, names: list[str]) -> curvature.Spectrum:
    """Curvature of the layers over batches of (tokens, targets), labels sampled by the run's
    stream."""
    make_generator = partial(run.stream, run.device)
    return curvature.spectrum(model, mixture, F.cross_entropy, names, make_generator)


def ablate_stage(run: Run, model: Model) -> list[AblationRecord]:
    """Take exceptions, which a model was trained to recite, out of it by the curvature of its
    attention layers, K-FAC and EK-FAC; nothing says which paths are exceptions. (Exceptions are
    made in the attention, facts are in the stores: results/RECIPE.md.)"""
    paths = run.paths
    names = attention_layers(model)
    batches = run.make_batches(paths, run.recipe, run.stream(run.device))
    mixture = batches.mixture(25)
    factors, masses = spectrum_of(run, model, mixture, names)
    records = [ablation_record(model, paths, {}, "before", 1.0)]
    for method in ("kfac", "ekfac"):
        for keep in KEEPS:
            weights = {}
            for name in names:
                W = model.get_submodule(name).weight.detach()
                A, G = factors[name]
                mass = masses[name] if method == "ekfac" else None  # None: by the factors
                weights[name] = curvature.ablate(W, A, G, keep, mass)
            records.append(ablation_record(model, paths, weights, method, keep))
    print(f"\n{run.n_paths['exceptions']} exceptions among {run.n_paths['train']} trained paths\n")
    print(record_table(records, ABLATION_COLUMNS, ABLATION_LEGEND))
    return records


# --- Report: one table of many runs ---------------------------------------------------------------


def table(rows: list[tuple]) -> str:
    """Rows of cells, the first one the header, as aligned columns: text to the left, numbers to the
    right."""
    rows = [[str(x) for x in row] for row in rows]
    columns = list(zip(*rows))
    widths = [max(len(x) for x in column) for column in columns]
    numeric = [all(is_number(x) for x in column[1:]) for column in columns]
    lines = []
    for row in rows:
        cells = zip(row, widths, numeric)
        line = "  ".join(x.rjust(w) if right else x.ljust(w) for x, w, right in cells)
        lines.append(line.rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines)


def is_number(text: str) -> bool:
    """Whether it begins as a number does, or is an empty cell ("-", "")."""
    return text in ("-", "") or text.lstrip("-")[:1].isdigit()


def cell(value: float | None, form: str | None = None) -> str:
    """A number, by its size where no form is given; "-" for None."""
    if value is None:
        return "-"
    if form is None:
        form = ".0f"
        if abs(value) < 10:
            form = ".3f"
        elif abs(value) < 100:
            form = ".1f"
    return format(value, form)


def record_table(records: list, columns: dict[str, str], legend: str) -> str:
    """The fields of records that are named in `columns` {field: head}, and the legend."""
    return f"{entry_table([vars(record) for record in records], columns)}\n{legend}"


def entry_table(entries: list[dict], columns: dict[str, str]) -> str:
    """What entries have under the names of `columns` {name: head}; "-" for what they lack."""
    rows = [tuple(columns.values())]
    for entry in entries:
        values = [entry.get(name) for name in columns]
        rows.append([cell(x) if isinstance(x, float) or x is None else x for x in values])
    return table(rows)


def mean(values: list, form: str | None = ".3f", lowest: bool = False) -> str:
    """The mean of what was measured as text, "-" where nothing was; behind it the lowest value, if
    asked, and "(m of n)" where some have none."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    text = cell(statistics.fmean(found), form)
    if lowest and len(found) > 1:
        text += f" ({cell(min(found), form)})"
    if len(found) < len(values):
        text += f" ({len(found)} of {len(values)})"
    return text


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def read_results(folder: Path) -> list[dict]:
    """Every results.json in or below a folder; UserError where there is none or one is damaged."""
    found = []
    for file in sorted(folder.rglob("results.json")):
        remedy = "remove it or report another folder"
        result = read_json(file, remedy)
        expected = {"arch", "seed", "accuracy", "grokked_at", "seconds", "config"}
        parts = {"arch", "data", "model", "recipe"}
        is_run = expected <= result.keys() and isinstance(result["config"], dict)
        is_run = is_run and parts <= result["config"].keys() and result["arch"] in ARCHS
        require(is_run, f"{file}: not the results of a run; {remedy}")
        found.append(result)
    require(found, f"--report {folder}: no results.json in it or below it; train a run first")
    return found


def grouped(results: list[dict]) -> list[list[dict]]:
    """Runs that differ in the seed alone stand together, in the order of the cells."""
    groups = {}
    for result in results:
        config = {part: result["config"][part] for part in ("arch", "data", "model", "recipe")}
        config["data"] = config["data"] | {"triples": None}  # their content counts, not the place
        groups.setdefault(json.dumps(config, sort_keys=True), {})[result["seed"]] = result
    order = list(ARCHS)
    found = [[group[seed] for seed in sorted(group)] for group in groups.values()]
    return sorted(found, key=lambda runs: order.index(runs[0]["arch"]))


def main_edit(result: dict) -> dict:
    """The entry of ROME with a prototype at the a-priori site, {} where there is none."""
    for entry in result.get("edits", []):
        at_site = entry.get("a_priori", True)  # studies.propagation edits other sites, too
        if at_site and (entry["method"], entry["target"]) == ("rome", "prototype"):
            return entry
    return {}


def report(results: list[dict]):
    """Print accuracy and edits of many runs, a row for those that differ in the seed alone; of runs
    that differ in nothing the last counts."""
    head = ("arch", "seeds", "facts", "train", "ID", "OOD (lowest)", "grokked at")
    rows = [(*head, "hop 1", "hop 2 (lowest)", "moved")]
    groups = grouped(results)
    n_left_out = len(results) - sum(len(runs) for runs in groups)
    if n_left_out:
        print(f"{n_left_out} runs have the settings and the seed of another one; the last counts")
    for runs in groups:
        row = [runs[0]["arch"], len(runs)]
        for name in ("one_hop", "train", "id", "ood"):
            row.append(mean([r["accuracy"][name] for r in runs], lowest=name == "ood"))
        row.append(mean([r["grokked_at"] for r in runs], ".0f"))
        edits = [main_edit(r) for r in runs]
        for key in ("hop1", "hop2", "unrelated_one_hop_moved"):
            row.append(mean([e.get(key) for e in edits], lowest=key == "hop2"))
        rows.append(tuple(row))
    print(
        f"\n{table(rows)}\n"
        "accuracy: facts; compositions trained, held out (ID), of facts in no trained one (OOD)\n"
        "grokked at: first evaluation with train >= 0.99, OOD >= 0.9. hop 1, hop 2, moved\n"
        "(facts): as of --edit, ROME with a prototype at the a-priori site"
    )


def progress(record: dict, steps: int) -> str:
    """One line per evaluation."""
    shares = "  ".join(f"{label} {cell(record[name]):^5}" for name, label in LABELS.items())
    left = record["seconds"] / record["step"] * (steps - record["step"])
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  loss {record['loss']:.3f}  {shares}  "
        f"{record['seconds']:4.0f} s, {left:3.0f} s to go"
    )


def when(step: int | None) -> str:
    return "never" if step is None else f"step {step}"


# --- Files and machine ----------------------------------------------------------------------------


def version() -> str | None:
    """The commit of the checkout that this file is in, "-dirty" where a Python file of it was
    changed or added since; None where there is none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    options = {"capture_output": True, "text": True, "check": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "--", "*.py"], **options).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if status else commit


def write_atomically(path: Path, content):
    """bytes, a dict as JSON, or what a function writes: at `path` is the old file or the new one,
    never half of it."""
    part = path.with_name(path.name + ".part")
    if isinstance(content, dict):
        content = json.dumps(content, indent=1, allow_nan=False).encode()
    with open(part, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: Path, remedy: str) -> dict:
    """The object in a JSON file; UserError where it is not there, or no object."""
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise UserError(f"{path}: not a readable JSON object; {remedy}")


def flat(settings: dict, prefix: str = "") -> dict:
    """{"model.depth": 3, ...} of nested settings."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def differences(found: dict, asked: dict) -> list[str]:
    """Settings found on disk that are not those asked for; of triples the content counts, not the
    place; what is absent is off."""
    found, asked = flat(found), flat(asked)
    differ = []
    for key in asked | found:
        there, here = found.get(key) or 0, asked.get(key) or 0
        if there != here and not key.endswith("triples"):
            differ.append(f"{key} ({json.dumps(there)} there, {json.dumps(here)} asked)")
    return differ


def peak_memory_mib(device: torch.device) -> int:
    """Peak of the process, or of CUDA's allocations where the model lives there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    if sys.platform == "win32":
        return 0
    import resource

    return mebibytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def mebibytes(peak: int) -> int:
    """Of a ru_maxrss, which macOS counts in bytes and others in KiB."""
    return peak >> (20 if sys.platform == "darwin" else 10)


def keep_freed_memory():
    """glibc gives a large tensor that is freed back to the system, which clears its pages, one by
    one, for the next tensor: a fifth of the time of --mass-edit. Here it keeps them for the
    process; with another C library nothing changes."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    if not mallopt(m_mmap_threshold, 2**30):  # glibc before 2.35 takes 32 MiB at most
        mallopt(m_mmap_threshold, 2**25)
    mallopt(m_trim_threshold, 2**31 - 1)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def flops_per_path(config: Config) -> int:
    """FLOPs of the matrix products in one forward pass over three tokens, a multiply-add as two; of
    a wide store as if all values were read."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Model(config)(torch.zeros(1, 3, dtype=torch.long))
    return counter.get_total_flops()


# --- Command line ---------------------------------------------------------------------------------

QUICK = {
    "arch": "all",
    "entities": 12,
    "relations": 6,
    "d_model": 32,
    "depth": 2,
    "d_ff": 128,
    "slots": 128,
    "ff_top_k": 8,
    "top_k": 8,
    "steps": 150,
    "eval_every": 50,
    "batch": 64,
    "label_noise": 0.1,
    "memorize": 20,
    "n_edits": 8,
}
# facts alone, in a store that has room for 10 000 edits
MASS = {
    "entities": 1000,
    "ood_fraction": 0.0,
    "d_model": 128,
    "depth": 2,
    "d_ff": 16384,
    "slots": 16384,
    "steps": 200,
    "eval_every": 40,
    "batch": 2000,
    "branches": 0,
    "lr": 0.005,
    "muon_lr": 0.01,
    "momentum": 0.95,
    "weight_decay": 0.3,
    "label_smoothing": 0.1,
    "ema": 0.98,
}
ABLATE = {
    "entities": 30,
    "d_model": 128,
    "label_noise": 0.1,
    "steps": 2000,
    "memorize": 1200,
    "eval_every": 50,
}
# a user's graph: room for two or three times the facts of the synthetic one; batch None: a quarter
# of its facts, see prepare
TRIPLES = {"d_model": 128, "slots": 2048, "d_ff": 2048, "batch": None}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"minedit: {message}; see --help\n")


def training_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options that the core and all studies share."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog, description=description, allow_abbrev=False, formatter_class=formatter)
    add = parser.add_argument
    add("--arch", choices=[*ARCHS, "all"], default="lmc", help="architecture")
    add("--seed", type=int, default=0, help="first seed: graph, split, weights, batches follow")
    add("--seeds", type=int, default=1, help="number of seeds")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--out", type=Path, help="run folder, of several runs its parent (runs/<arch>-seed<k>)")
    add("--resume", action="store_true", help="go on with an unfinished run")
    add("--retrain", action="store_true", help="train again, replacing what the folder holds")
    add("--compile", action="store_true", help="torch.compile the step's forward pass")
    add(
        "--quick",
        action="store_true",
        help="all at toy size; without --out in runs/quick, replaced",
    )
    line = "head <tab> relation <tab> tail"
    triples = f"your graph, one triple per line: {line}"
    add("--triples", type=Path, nargs="+", metavar="FILE", help=triples)
    several = "of a question with several: none is kept, or all as facts of r#1, r#2, ..."
    add("--tails", choices=["drop", "numbered"], default="drop", help=several)
    add("--most-tails", type=int, default=4, help="of a question, with --tails numbered")
    add("--tail-order", choices=["random", "sorted"], default="random", help="of numbered tails")
    add("--reciprocal", action="store_true", help="with (h, r, t) also (t, r^-1, h)")
    add("--clones", type=int, default=0, help="synthetic copies of each entity, with random tails")
    add("--most-paths", type=int, default=1_000_000, help="sampled, if the graph has more")
    add("--entities", type=int, default=50, help="of the synthetic graph")
    add("--relations", type=int, default=20, help="of the synthetic graph")
    add("--out-degree", type=int, help="facts per entity of it; None: one per relation")
    add("--ood-fraction", type=float, default=0.1, help="of facts: in no trained composition")
    add("--train-fraction", type=float, default=0.8, help="of ID paths: trained")
    add("--n-edits", type=int, default=64, help="number of facts for --edit")
    add("--edit-batch", type=int, default=1024, help="targets sought at a time")
    add("--feed-forward", action="store_true", help="keep feed-forwards beside the memory")
    for f in (*fields(Config), *fields(Recipe)):
        if f.metadata:
            name = "--" + f.name.replace("_", "-")
            add(name, type=f.type, default=f.default, help=f.metadata["help"])
    return parser


def shrinkage(text: str) -> float | str:
    """Of C: "auto", or a number from 0."""
    value = text if text == "auto" else float(text)
    if value != "auto" and not 0 <= value <= 1e6:
        raise ValueError
    return value


def core_parser() -> argparse.ArgumentParser:
    parser = training_parser("minedit.py", __doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--edit", action="store_true", help="stage: edit facts one at a time, ask what follows")
    shrink = "C + S * mean eigenvalue * I in edits, or auto: chosen on other facts"
    add("--shrink", type=shrinkage, default="auto", metavar="S", help=shrink)
    names = ("HEAD", "RELATION", "NEW_TAIL")
    add("--edit-fact", nargs=3, action="append", metavar=names, help="stage: edit this fact")
    add("--mass-edit", action="store_true", help="stage: MEMIT, 1 to 10 000 facts in one update")
    add("--lam", type=float, default=3000.0, help="of MEMIT in --mass-edit")
    add("--ablate", action="store_true", help="stage: exceptions out by K-FAC and EK-FAC")
    stop = "print one table of all runs below DIR, and stop"
    add("--report", type=Path, metavar="DIR", help=stop)
    return parser


def parse(parser: argparse.ArgumentParser, argv, presets: dict[str, dict]) -> argparse.Namespace:
    """Arguments, with the defaults of the first of `presets` {flag: defaults} that is asked for."""
    args = parser.parse_args(argv)
    asked = [flag for flag in presets if getattr(args, flag)]
    defaults = presets[asked[0]] if asked else {}
    if args.triples:
        defaults = TRIPLES | defaults | {"entities": None, "relations": None}
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def check_options(args):
    """UserError for options that do not fit together, before any file is touched."""
    for name in ("seeds", "n_edits", "edit_batch", "most_paths"):
        value = getattr(args, name)
        require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
    require(0 <= args.seed < 2**56, f"--seed must be in 0..2^56 - 1, got {args.seed}")
    require(
        not (args.resume and args.retrain), "--resume goes on with a run, --retrain replaces it"
    )
    synthetic = (args.entities, args.relations, args.out_degree)
    require(
        not (args.triples and any(x is not None for x in synthetic)),
        "--entities, --relations, --out-degree: for synthetic graphs, not with --triples",
    )
    of_triples = args.reciprocal or args.clones or args.tails != "drop"
    require(
        bool(args.triples) or not of_triples, "--reciprocal, --clones, --tails: with --triples only"
    )
    for file in args.triples or []:  # what is not there is told when it is read
        message = f"--triples {file}: no regular file, and it is read twice; save it as one"
        require(file.is_file() or file.is_dir() or not file.exists(), message)


def choose_device(name: str) -> torch.device:
    here = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    require(
        name in ("auto", *here), f"--device {name}: not available here; use --device auto or cpu"
    )
    return torch.device(here[0] if name == "auto" else name)


READING = ("tails", "most_tails", "tail_order", "reciprocal", "clones")  # options of --triples


def make_task(args, seed: int, graph: kg.KnowledgeGraph | None) -> Task:
    """The task of a seed: a synthetic graph, or that of the user's triples."""
    names = ("ood_fraction", "train_fraction", "most_paths")
    data = {name: getattr(args, name) for name in names}
    if graph is None:
        graph = kg.synthetic(args.entities, args.relations, seed, args.out_degree)
        for name in ("entities", "relations", "out_degree"):
            data[name] = getattr(args, name)
    else:
        content = hashlib.sha256(b"".join(file.read_bytes() for file in args.triples)).hexdigest()
        data |= {"triples": " ".join(map(str, args.triples)), "sha256": content}
        data |= {name: getattr(args, name) for name in READING}
    return Task(graph, paths_of(args, graph, seed), data, graph.n_relations)


def paths_of(args, graph: kg.KnowledgeGraph, seed: int) -> kg.Paths:
    """The paths of a graph, split, and with exceptions if asked."""
    paths = kg.split(graph, args.ood_fraction, args.train_fraction, seed, args.most_paths)
    if args.label_noise:
        paths = kg.with_exceptions(paths, args.label_noise, graph.n_answers, seed)
    return paths


def read_graph(args) -> kg.KnowledgeGraph:
    graph = kg.from_triples(
        *args.triples,
        tails=args.tails,
        most_tails=args.most_tails,
        order=args.tail_order,
        reciprocal=args.reciprocal,
        clones=args.clones,
    )
    sizes = f"{graph.n_entities} entities, {graph.n_relations} relations"
    files = ", ".join(map(str, args.triples))
    print(f"{files}: {int((graph.facts >= 0).sum())} facts, {sizes}")
    for note in graph.notes:
        print(f"  {note}")
    return graph


def prepare(args, make_task=make_task, make_batches=None, check=None) -> list[Run]:
    """All runs that were asked for, each checked, by check(run) too, and then against its folder;
    UserError before anything is trained. A study may make its own task and batches."""
    check_options(args)
    if make_batches is None:
        make_batches = Batches if args.branches else FactBatches
    try:
        runs = planned_runs(args, make_task, make_batches)
    except (ValueError, MemoryError, RuntimeError) as error:  # of kg.py, models.py; too large
        message = str(error).split("\n")[0] or "not enough memory for these sizes"
        raise UserError(message) from None
    if check is not None:
        for run in runs:
            check(run)
    retrain = args.retrain or (args.quick and args.out is None and not args.resume)
    for run in runs:
        run.open_folder(args.resume, retrain)
    return runs


def planned_runs(args, make_task, make_batches) -> list[Run]:
    """A run for each seed and cell; no folder is touched. ValueError, MemoryError or RuntimeError
    for what cannot be."""
    device = choose_device(args.device)
    graph = read_graph(args) if args.triples else None
    if args.batch is None:  # a quarter of the facts
        args.batch = min(1024, max(384, int((graph.facts >= 0).sum()) // 4))
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        task = make_task(args, seed, graph)
        for arch in archs_of(args):
            config = config_of(args, arch, task)
            count_parameters(config)  # RuntimeError where a size overflows
            folder = folder_of(args, arch, seed)
            runs.append(Run(folder, arch, seed, task, config, recipe, device, make_batches))
    return runs


def archs_of(args) -> list[str]:
    return list(ARCHS) if args.arch == "all" else [args.arch]


def config_of(args, arch: str, task: Task) -> Config:
    """The sizes that were asked for, in a cell."""
    sizes = {f.name: getattr(args, f.name) for f in fields(Config) if f.metadata}
    sizes |= {"n_entities": task.graph.n_entities, "n_relations": task.n_relations}
    return Config(**ARCHS[arch], **sizes, feed_forward=args.feed_forward)


def folder_of(args, arch: str, seed: int) -> Path:
    """--out itself for a single run, a folder in it, or in runs/, for each of several."""
    is_alone = len(archs_of(args)) * args.seeds == 1
    if args.out and is_alone:
        return args.out
    parent = args.out or Path("runs/quick" if args.quick else "runs")
    return parent / f"{arch}-seed{seed}"


def announce(run: Run):
    print(
        f"\n{run.arch}, seed {run.seed}, on {device_name(run.device)}, in {run.folder}: "
        f"{count_parameters(run.config):,} parameters, {flops_per_path(run.config):,} FLOPs per "
        f"path; {len(run.paths.facts)} facts, paths: {listed(run.n_paths)}"
    )
    if len(run.watched.first) < len(run.paths.first):
        print(f"evaluations ask {len(run.watched.first)} of the paths, chosen at random")
    if run.finished:
        print(f"loaded: trained for {run.step} steps before (--retrain trains again)")


def trained_model(run: Run, args, on_evaluation=None) -> Model:
    """The model of a run, trained or loaded; its final figures go to results.json."""
    announce(run)
    model = run.train(on_evaluation, compiled=args.compile)
    run.summarize()
    return model


def guarded(command, *arguments) -> int:
    """Run a command; its exit status, with one line on stderr where it is not 0."""
    keep_freed_memory()
    if hasattr(sys.stdout, "reconfigure"):  # names that stdout cannot encode are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command(*arguments)
        return 0
    except BrokenPipeError:  # of `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted; --resume goes on from the last evaluation", 130
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        status = 2
    except UserError as error:
        message, status = str(error), error.status
    print(f"minedit: {message}", file=sys.stderr)
    return status


def run_stages(run: Run, model: Model, args):
    """The stages that were asked for; the figures of each go to results.json as it ends, but for
    --edit-fact, whose table is for the eye."""
    if args.edit:
        began = time.perf_counter()
        records, chosen = edit_stage(run, model, args.n_edits, args.shrink)
        run.results.pop("shrinkage", None)  # of edits made before
        if chosen is not None:
            run.results |= chosen.entries()
        run.add_results("edits", [record.entry() for record in records], began)
    if args.edit_fact:
        edit_fact_stage(run, model, args.edit_fact, args.shrink)
    if args.mass_edit:
        began = time.perf_counter()
        records = mass_edit_stage(run, model, args.lam, args.edit_batch)
        run.add_results("mass_edit", [asdict(record) for record in records], began)
    if args.ablate:
        began = time.perf_counter()
        records = ablate_stage(run, model)
        run.add_results("ablate", [asdict(record) for record in records], began)


def check_stages(args, run: Run):
    """UserError for stages that have nothing to work on, before any training."""
    if args.ablate:
        message = "--ablate needs --label-noise and --branches above 0"
        require(args.label_noise > 0 and args.branches > 0, message)
        message = f"--label-noise {args.label_noise}: no exception among so few paths; raise it"
        require(run.n_paths["exceptions"] > 0, message)
    require(0 < args.lam < math.inf, f"--lam must be positive and finite, got {args.lam}")
    named_edits(run.task.graph, run.paths, args.edit_fact or [])


def command(args):
    if args.report:
        report(read_results(args.report))
        return
    runs = prepare(args, check=partial(check_stages, args))
    for run in runs:
        model = trained_model(run, args)
        run_stages(run, model, args)
    if len(runs) > 1:
        report([run.results for run in runs])


def main(argv: list[str] | None = None) -> int:
    stages = dict(edit=True, mass_edit=True, ablate=True)
    presets = {"quick": QUICK | stages, "mass_edit": MASS, "ablate": ABLATE}
    return guarded(command, parse(core_parser(), argv, presets))


if __name__ == "__main__":
    sys.exit(main())
