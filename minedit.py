"""minedit.py: the story, in the order in which it is told.

Train a small transformer on a knowledge graph until it composes facts it never composed in training (grokking), edit
facts in it in closed form, and see whether what follows from them changes too. The recipe: Muon (the embedding: AdamW),
constant rates, strong weight decay, label smoothing, facts weighed above compositions, a moving average of the weights.
"""

import argparse
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import operator
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import curvature
import edit as editing
import kg
from edit import share_of
from models import ARCHS, Config, Model, count_parameters, flops_per_path, option

SPLITS, ANSWERS = ("train", "id", "ood", "ood_first", "ood_second"), ("one_hop", "train", "id", "ood")
LABELS = dict(zip(("one_hop", *SPLITS), ("1-hop", "train", "ID", "OOD", "first", "second")))
LATE, ENOUGH = {"lr": 5e-4, "muon_lr": 1e-3, "weight_decay": 0.0, "one_hop_weight": 1.0}, 0.85

class UserError(Exception):
    """One line that names the value and the remedy; a second argument is the exit status, 2 (bad input) without it."""

@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for all four cells."""
    steps: int = option(1800, "training steps")
    batch: int = option(256, "facts per step")
    branches: int = option(2, "trained paths of each fact per step, 0: the facts alone are trained")
    one_hop_weight: float = option(2.0, "weight of the 1-hop loss; the 2-hop loss has weight 1")
    lr: float = option(5e-3, "rate of AdamW, for the embedding")
    muon_lr: float = option(1e-2, "rate of Muon, for the hidden matrices")
    momentum: float = option(0.985, "of Muon")
    weight_decay: float = option(1.0, "of both optimizers")
    label_smoothing: float = option(0.2, "of both losses")
    warmup: int = option(100, "steps to the full rate, constant after it")
    ema: float = option(0.99, "moving average of the weights")
    eval_every: int = option(200, "steps between evaluations")
    label_noise: float = option(0.0, "share of the trained compositions that get a fixed wrong answer: exceptions")
    arithmetic: int = option(0, "relations with tail = (head + c) mod entities")
    zipf: float = option(0.0, "a fact of rank i is drawn with probability ~ i^-zipf")
    open_book: int = option(0, "prompts (h, r, t', h, r) -> t' per step, t' any entity")
    memorize: int = option(0, "last steps, under LATE, until ENOUGH of the exceptions are recited")

    def __post_init__(self):
        for name, value in vars(self).items():
            low = int(name in ("steps", "batch", "eval_every"))
            high = 1 if name in ("momentum", "label_smoothing", "ema", "label_noise") else math.inf
            if not low <= value < high:
                raise ValueError(f"{name} must be in [{low}, {high}), got {value}")

# --- Training ---------------------------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Momentum with every singular value of the update made about 1: all directions move at the same rate (Jordan et
    al. 2024). torch.optim.Muon uses bfloat16, which on many CPUs takes 30 times as long: more than all the rest."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(m, group["momentum"]))        # Nesterov
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

def orthogonalize(G: Tensor) -> Tensor:
    """U V^T, nearly, for G = U S V^T: five Newton-Schulz steps X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    if G.shape[0] > G.shape[1]:
        return orthogonalize(G.T).T
    X = G / (G.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X

class Batches:
    """Batches of facts with their trained continuations, drawn on the device without waiting for it, all facts alike or
    in proportion to `frequency`. With `alias`, half of the relations are asked for by their token + `alias`."""

    def __init__(self, paths: kg.Paths, recipe: Recipe, generator: torch.Generator, alias=0, frequency=None):
        self.paths, self.recipe, self.generator, self.alias = paths, recipe, generator, alias
        self.frequency, self.queries = frequency, editing.queries(paths)
        self.rows = paths.masks["train"].nonzero().flatten()
        self.count = torch.bincount(paths.first[self.rows], minlength=len(paths.facts))
        self.start = self.count.cumsum(0) - self.count
        self.positions = torch.tensor([0, 1] + [2] * recipe.branches, device=paths.facts.device)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [batch, 2 + branches], their positions, answers [batch, 1 + branches], -100 where none is trained.
        Each fact comes once at most, with one path from each of `branches` even strata of its trained paths."""
        device, (b, m) = self.rows.device, (self.recipe.batch, self.recipe.branches)
        if self.frequency is None:
            fact = torch.randperm(len(self.count), generator=self.generator, device=device)[:b]
        else:
            fact = torch.multinomial(self.frequency, min(b, len(self.count)), generator=self.generator)
        count = self.count[fact][:, None]                                        # [batch, 1]
        u = torch.arange(m, device=device) + torch.rand(len(fact), m, generator=self.generator, device=device)
        place = (u / m * count).long().minimum(count - 1)
        row = self.rows[(self.start[fact][:, None] + place).clamp(0, len(self.rows) - 1)]    # [batch, branches]
        tokens = torch.cat([self.queries[fact], self.paths.tokens[row, 2]], 1)
        if self.alias:
            tokens[:, 1:] += self.alias * torch.randint(2, tokens[:, 1:].shape, generator=self.generator, device=device)
        answers = [self.paths.facts[fact, 2:], torch.where(count > 0, self.paths.two_hop[row], -100)]
        return tokens, self.positions, torch.cat(answers, 1)

    def mixture(self, n: int, n_entities: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of n steps as they are trained, each path by itself: an exception is one among the rest."""
        found = []
        for tokens, _, answers in (self.draw() for _ in range(n)):
            gold = F.pad(answers, (1, 0), value=-100)
            found += [(tokens[:, [0, 1, 2 + i]], gold[:, [0, 1, 2 + i]]) for i in range(self.recipe.branches)]
            if self.recipe.open_book:
                tokens, told = self.open_book(self.recipe.open_book, n_entities)
                found.append((tokens, F.pad(told[:, None], (4, 0), value=-100)))
        return found

    def open_book(self, n: int, n_entities: int) -> tuple[Tensor, Tensor]:
        """Prompts (h, r, t', h, r) [n, 5] and their answers t' [n], any entity: only the prompt says which."""
        draw = lambda high: torch.randint(high, (n,), generator=self.generator, device=self.rows.device)
        query, told = self.queries[draw(len(self.queries))], draw(n_entities)
        return torch.cat([query, told[:, None], query], 1), told

def loss_of(logits: Tensor, answers: Tensor, recipe: Recipe) -> Tensor:
    """Cross entropy of the facts and of the compositions, each a mean over its own answers, weighted w : 1."""
    w = recipe.one_hop_weight
    loss = lambda x, y: F.cross_entropy(x.flatten(0, -2), y.flatten(), reduction="sum", ignore_index=-100,
                                        label_smoothing=recipe.label_smoothing) / (y >= 0).sum().clamp(min=1)
    return (w * loss(logits[:, 1], answers[:, 0]) + loss(logits[:, 2:], answers[:, 1:])) / (w + 1)

@torch.no_grad()
def predict(model: Model, paths: kg.Paths, chunk: int = 6000) -> tuple[Tensor, Tensor]:
    """The model's answers to every fact [n_facts] and every path [n_paths], `width` paths to one prefix."""
    index = torch.arange(len(paths.first), device=paths.first.device)
    start = paths.first.diff(prepend=paths.first[:1] - 1).nonzero().flatten()    # the first path of each fact
    place = index - start[paths.first]
    width = min(int(place.max()) + 1, 32)
    bundle = (place % width == 0).cumsum(0) - 1                                  # of each path
    rows = torch.full((int(bundle[-1]) + 1, width), -1, device=index.device)     # path, -1: filler
    rows[bundle, place % width] = index
    tokens = torch.cat([paths.tokens[rows[:, 0], :2], paths.tokens[rows, 2]], 1)
    positions = torch.tensor([0, 1] + [2] * width, device=index.device)
    out = torch.cat([model(part, positions).argmax(-1) for part in tokens.split(max(1, chunk // (2 + width)))])
    return out[bundle[start], 1], out[bundle, 2 + place % width]

@torch.no_grad()
def last_answers(model: Model, tokens: Tensor) -> Tensor:
    """The model's answers [n] at the last of the tokens [n, token]."""
    return torch.cat([model(part)[:, -1].argmax(-1) for part in tokens.split(4096)])

def accuracy(model: Model, paths: kg.Paths, compose: bool = True) -> dict[str, float | None]:
    """Share of right answers over all facts and, with `compose`, over each split; None for an empty split."""
    one_hop, two_hop = predict(model, paths) if compose else (last_answers(model, editing.queries(paths)), None)
    return {"one_hop": share_of(one_hop == paths.facts[:, 2])} | {
        name: share_of((two_hop == paths.two_hop)[mask]) if compose else None
        for name, mask in paths.masks.items() if name != "validation"}

def first_step(curve: list[dict], **levels: float) -> int | None:
    """The first step of a curve at which all these shares have reached their levels, None: never."""
    return next((e["step"] for e in curve if all((e[key] or 0) >= level for key, level in levels.items())), None)

class Run:
    """One model in its folder: config.json, log.jsonl, ckpt.pt, results.json."""
    def __init__(self, args, arch: str, seed: int, folder: Path, graph: kg.KnowledgeGraph | None, data: dict):
        self.args, self.arch, self.seed, self.folder, self.device = args, arch, seed, folder, args.device
        self.recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
        self.graph = graph or kg.synthetic(args.entities, args.relations, seed, args.out_degree, args.arithmetic)
        paths = kg.split(self.graph, args.ood_fraction, args.train_fraction, seed, args.regime, args.augment)
        if self.recipe.label_noise:
            paths = kg.with_exceptions(paths, self.recipe.label_noise, self.graph.n_entities, seed)
        rank = torch.randperm(len(paths.facts), generator=torch.Generator().manual_seed(2**62 + seed)) + 1.0
        self.frequency = (rank**-self.recipe.zipf).to(self.device)
        sizes = {"n_entities": self.graph.n_entities, "n_relations": self.graph.n_relations} | ARCHS[arch]
        self.config = Config(**{f.name: sizes.get(f.name, getattr(args, f.name, None)) for f in fields(Config)})
        self.n_paths = {name: int(mask.sum()) for name, mask in paths.masks.items()}
        self.paths = paths.to(self.device)
        self.identity = dict(arch=arch, seed=seed, data=data, model=vars(self.config), recipe=vars(self.recipe))
        self.step, self.history, self.parts = 0, [], None    # of the training; of the checkpoint, where there is one
        self.results, self.environment, self.shared, self.moments = {}, None, None, {}
        named_requests(self, args.edit_fact or [])           # unknown names are refused now
        self.check_folder()

    @property
    def finished(self) -> bool:
        """Ended by the steps or by what is recited of the exceptions; no held-out figure ends a training."""
        late = self.step > max(0, self.recipe.steps - self.recipe.memorize)
        return self.step == self.recipe.steps or late and (self.history[-1].get("exceptions") or 0) >= ENOUGH

    def check_folder(self):
        """Refuse, before any training, a folder that cannot be used or that holds something else; load a checkpoint."""
        out = self.folder
        config, checkpoint, results = (out / name for name in ("config.json", "ckpt.pt", "results.json"))
        refuse = lambda why, remedy="use --retrain or another --out": UserError(f"--out {out}: {why}; {remedy}")
        problem = refuse("cannot be written", "choose another folder")
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
            if all(file.suffix == ".part" for file in out.iterdir()):
                return                                       # empty, but for what an interrupted write has left
            problem = refuse("not a run folder (config.json: none or not the configuration of a run)", "choose another")
            found = json.loads(config.read_text())
            differs = differences({key: found[key] for key in self.identity}, self.identity)
            if self.args.retrain:
                return
            if differs:
                raise refuse(f"holds another run, which differs in {', '.join(differs)}")
            if checkpoint.exists():
                self.load_checkpoint(checkpoint)
            elif results.exists():
                raise refuse("holds results, but no ckpt.pt to go on from")
            if not self.finished and not self.args.resume:
                raise refuse(f"unfinished, at step {self.step} of {self.recipe.steps}", "use --resume or --retrain")
            if self.finished and results.exists():
                problem = UserError(f"{results}: not readable; remove it and run the stages again")
                self.results = json.loads(results.read_text())
                self.environment = self.results["config"]["environment"]         # that of the training
        except (OSError, ValueError, KeyError, TypeError):
            raise problem from None

    def load_checkpoint(self, path: Path):
        """Go on from a checkpoint; UserError unless it is whole and of this run."""
        try:
            state, self.parts = torch.load(path, map_location="cpu", weights_only=True), self.fresh()
            if differences(state["identity"], self.identity) or state["history"][-1]["step"] != state["step"]:
                raise ValueError("it belongs to a run with other settings")
            for name, part in self.parts.items():
                if name != "generator":
                    part.load_state_dict(state[name])
                elif state["device"] == self.device.type:    # the random state of another kind does not fit
                    part.set_state(state[name])
            if any(x.dim() and x.shape != p.shape for name in ("adam", "muon")
                   for p, kept in self.parts[name].state.items() for x in kept.values()):
                raise ValueError("the state of an optimizer does not fit its weights")
            self.step, self.history, self.moments = state["step"], state["history"], state["moments"]
        except Exception as error:                           # unpickling can raise anything
            why = " ".join(str(error).split())[:80] or type(error).__name__
            raise UserError(f"{path}: not a checkpoint of this run ({why}); use --retrain or another --out") from None

    def known(self, model: Model) -> tuple[Tensor, ...]:
        """The model's answers to facts and paths; the ID facts and the paths that it answers right; the ID paths."""
        paths, (one_hop, two_hop) = self.paths, predict(model, self.paths)
        known, asked = (one_hop == paths.facts[:, 2]) & ~paths.ood_fact, paths.masks["train"] | paths.masks["id"]
        return one_hop, two_hop, known, two_hop == paths.two_hop, asked

    def stream(self, device="cpu") -> torch.Generator:
        """Random numbers for the stages, the same for each of them and in all four cells, other than in training."""
        return torch.Generator(device).manual_seed(-self.seed - 1)

    def ordinary(self) -> Tensor:
        """The inputs whose values an edit is to leave alone: every path, or 20 000 of them."""
        tokens = self.paths.tokens
        return tokens[torch.randperm(len(tokens), generator=self.stream())[:20_000].to(self.device)]

    def fresh(self) -> dict:
        """Everything that training changes, at step 0."""
        model = Model(self.config, torch.Generator().manual_seed(4 * self.seed + 2)).to(self.device)
        embedding, *hidden = model.parameters()              # rates and decay of the optimizers are set in each step
        return {"model": model, "average": copy.deepcopy(model).requires_grad_(False),
                "adam": torch.optim.AdamW([embedding], betas=(0.9, 0.98)),
                "muon": Muon(hidden, {"momentum": self.recipe.momentum}),
                "generator": torch.Generator(self.device).manual_seed(4 * self.seed + 3)}

    def batches(self, generator: torch.Generator) -> Batches:
        return Batches(self.paths, self.recipe, generator, self.config.aliases * self.config.n_relations,
                       self.frequency if self.recipe.zipf else None)

    def train(self) -> Model:
        """Train to the end of the budget, from the checkpoint where there is one; returns the averaged model."""
        if not (self.folder / "config.json").exists():       # else not before there is something to replace it
            self.write_config()
        parts, recipe, self.parts = self.parts or self.fresh(), self.recipe, None
        model, seconds = parts["model"], self.history[-1]["seconds"] if self.history else 0.0
        forward, batches = torch.compile(model) if self.args.compile else model, self.batches(parts["generator"])
        total, began = torch.zeros((), device=self.device), time.perf_counter() - seconds
        for step in range(self.step + 1, recipe.steps + 1):
            if self.finished:
                break
            total += self.advance(parts, batches, forward, step - 1)
            if step % recipe.eval_every and step < recipe.steps:
                continue
            loss = total.item() / ((step - 1) % recipe.eval_every + 1)
            if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
                held = f"{self.folder / 'ckpt.pt'} holds step {self.step}; " if self.history else ""
                raise UserError(f"{self.folder}: the loss or a weight is not finite at step {step}; "
                                f"{held}lower --lr or --muon-lr and --retrain", 1)
            total.zero_()
            record = {"step": step, "loss": loss} | accuracy(parts["average"], self.paths, recipe.branches > 0)
            self.step, record["seconds"] = step, round(time.perf_counter() - began, 2)
            self.history.append(record)
            early, fitted = "memorized" not in self.moments, record["train"] or 0.0      # what --circuits compares
            moments = {"before": early and fitted < 0.9, "memorized": early and fitted >= 0.99, "end": self.finished}
            self.moments |= {name: (record, {key: p.cpu().clone() for key, p in parts["average"].state_dict().items()})
                             for name, holds in moments.items() if holds}
            print(progress(record, recipe.steps), flush=True)
            self.checkpoint(parts)
        return parts["average"].eval()

    def advance(self, parts: dict, batches: Batches, forward, step: int) -> Tensor:
        """One step of training; returns the loss."""
        recipe = self.recipe if step < self.recipe.steps - self.recipe.memorize else replace(self.recipe, **LATE)
        tokens, positions, answers = batches.draw()
        loss = loss_of(forward(tokens, positions), answers, recipe)
        if recipe.open_book:                                 # weighs as much as the compositions do
            tokens, told = batches.open_book(recipe.open_book, self.config.n_entities)
            loss = loss + F.cross_entropy(forward(tokens)[:, -1], told, label_smoothing=recipe.label_smoothing) / (
                recipe.one_hop_weight + 1)
        loss.backward()
        rate = min(1.0, (step + 1) / max(1, recipe.warmup))
        for optimizer, lr in (parts["adam"], recipe.lr), (parts["muon"], recipe.muon_lr):
            optimizer.param_groups[0].update(lr=lr * rate, weight_decay=recipe.weight_decay)
            optimizer.step()
            optimizer.zero_grad()
        keep = min(recipe.ema, (step + 1) / (step + 10))                         # the average starts short
        with torch.no_grad():
            for mean, p in zip(parts["average"].parameters(), parts["model"].parameters()):
                mean.lerp_(p, 1 - keep)
        return loss.detach()

    def checkpoint(self, parts: dict):
        state = {"identity": self.identity, "step": self.step, "history": self.history, "moments": self.moments,
                 "device": self.device.type}
        state |= {name: part.get_state() if name == "generator" else part.state_dict() for name, part in parts.items()}
        write_atomically(self.folder / "ckpt.pt", lambda file: torch.save(state, file))
        (self.folder / "results.json").unlink(missing_ok=True)                   # of a run that this one replaces
        self.write_config()
        write_atomically(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.history).encode())

    def write_config(self) -> dict:
        """What determines the training, compared when a folder is met again, and what is only recorded."""
        self.environment = self.environment or {
            "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
            "system": platform.system(), "device": device_name(self.device), "threads": torch.get_num_threads()}
        config = self.identity | {"environment": self.environment, "stages": {
            name: getattr(self.args, name) for name in ("compile", "n_edits", *STAGES)}}
        write_atomically(self.folder / "config.json", config)
        return config

    def summarize(self):
        """The final figures of the training in results.json and on the screen."""
        last = self.history[-1]
        self.results |= {"arch": self.arch, "seed": self.seed, "steps": last["step"], "seconds": last["seconds"],
            "peak_memory_mib": self.results.get("peak_memory_mib") or peak_memory_mib(self.device),
            "parameters": count_parameters(self.config), "flops_per_path": flops_per_path(self.config),
            "accuracy": {key: last[key] for key in LABELS}, "n_facts": len(self.paths.facts), "n_paths": self.n_paths,
            "memorized_at": first_step(self.history, **{"train" if self.recipe.branches else "one_hop": 0.99}),
            "grokked_at": first_step(self.history, train=0.99, ood=0.9), "config": self.write_config()}
        write_atomically(self.folder / "results.json", self.results)
        step = lambda name: f"at step {self.results[name]}" if self.results[name] else "not reached"
        print(f"\n{curve(self.history)}\nmemorized (train >= 0.99) {step('memorized_at')}; grokked (OOD >= 0.9 on "
              f"{self.n_paths['ood']} paths) {step('grokked_at')}; {last['seconds']:.0f} s, "
              f"{self.results['peak_memory_mib']} MiB at most")

# --- Stage: edits -----------------------------------------------------------------------------------------------------
STATE = "pass", "part", "module", "call"
def traced_states(config: Config) -> list[tuple[int, str, str, int]]:
    """(pass, part, module, call) of what each block adds to the stream, and of the stream after it, in order."""
    found, private = [], config.feed_forward or not config.memory
    for i in range(config.depth * config.blocks):
        t, block = i // config.blocks, f"blocks.{i % config.blocks if config.loop else i}"
        call = t * config.loop
        found += [(t, "attention", f"{block}.attention", call)] + [(t, "memory", "memory", i)] * config.memory
        found += [(t, "feed-forward", f"{block}.feed_forward", call)] * private + [(t, "stream", block, call)]
    return found

def edit_sites(config: Config) -> list[tuple[str, int, int]]:
    """(layer, call, pass) of every store, by the nn.Linear whose columns hold what is stored."""
    layer = {"memory": "values", "feed-forward": "down"}
    return [(f"{module}.{layer[part]}", call, p) for p, part, module, call in traced_states(config) if part in layer]

def draw_requests(run: Run, n: int, generator: torch.Generator) -> tuple[editing.Requests, int]:
    """n random ID facts, for each a new tail out of the other tails of its relation; how many have no other tail."""
    facts, id_facts = run.paths.facts.cpu(), (~run.paths.ood_fact.cpu()).nonzero().flatten()
    tails = {r: facts[facts[:, 1] == r, 2].unique() for r in facts[:, 1].unique().tolist()}
    editable = torch.tensor([f for f in id_facts.tolist() if len(tails[int(facts[f, 1])]) > 1], dtype=torch.long)
    fact = editable[torch.randperm(len(editable), generator=generator)[:n]]
    others = (tails[relation][tails[relation] != old] for _, relation, old in facts[fact].tolist())
    new = [rest[torch.randint(len(rest), (1,), generator=generator)].item() for rest in others]
    return make_requests(run, fact, new), len(id_facts) - len(editable)

def make_requests(run: Run, fact: Tensor | list[int], new: list[int]) -> editing.Requests:
    fact, new = (torch.as_tensor(x, dtype=torch.long, device=run.device) for x in (fact, new))
    return editing.Requests(fact, editing.queries(run.paths)[fact], run.paths.facts[fact, 2], new)

def named_requests(run: Run, wanted: list[list[str]]) -> editing.Requests:
    """Requests from names; UserError for a name or a fact that the graph does not have."""
    entities, relations = run.graph.entities, run.graph.relations
    rows = {(entities[h], relations[r]): i for i, (h, r, _) in enumerate(run.paths.facts.tolist())}
    for head, r, tail in wanted:
        for name, known, kind in (head, entities, "entity"), (r, relations, "relation"), (tail, entities, "entity"), \
                                 ((head, r), [*rows], "fact (existing ones can be changed)"):
            if name not in known:
                raise UserError(f"--edit-fact: unknown {kind} {name!r}; the graph has {known[:5]}, ...")
    return make_requests(run, [rows[head, r] for head, r, _ in wanted], [entities.index(tail) for *_, tail in wanted])

def residual(run: Run, model: Model, at: editing.Site, requests: editing.Requests, target: str, known: Tensor,
             u: Tensor | None = None, **options) -> tuple[Tensor, int]:
    """r of each request for the target "prototype", "gradient" or "near" (pulled towards the values of `known` facts);
    how many have no prototype and fall back on the gradient, through edits in the directions u (None: of ROME)."""
    r, has_one = editing.prototype_residual(at, requests, run.paths.facts[:, 2], known & (target == "prototype"))
    if not has_one.all():
        u = editing.direction("rome", at, requests) if u is None else u
        near = at.values[known] if target == "near" else None
        r = torch.where(has_one[:, None], r, editing.gradient_residual(model, at, requests, u, near=near, **options))
    return r, int((~has_one).sum()) * (target == "prototype")

def rome_edits(run: Run, model: Model, name: str, call: int, requests: editing.Requests, known: Tensor) -> tuple:
    """ROME with prototype targets: the site, u and r of the edits W + r u^T, and fallbacks as in `residual`."""
    at = editing.site(model, name, call, editing.queries(run.paths), run.ordinary())
    u = editing.direction("rome", at, requests)
    return at, u, *residual(run, model, at, requests, "prototype", known, u)

HOPS = {"direct": "direct", "hop1": "hop 1", "hop2": "hop 2"}                    # entry of results.json: column
SHARES = HOPS | {"unrelated_one_hop_moved": "facts", "unrelated_two_hop_moved": "comps.", "same_row_moved": "row",
                 "distance": "far"}
COLUMNS = """direct: edits whose question has the new answer. hop 1, hop 2: compositions with the edited fact
first, second, that get what now follows, among edits with direct success. facts, comps., row: other
facts, compositions of them, facts of the same largest key entry, whose answer moved. near: gradient
pulled to stored values. far: of the value written from the nearest of these, in their mean length"""

def edit_stage(run: Run, model: Model):
    """Edit `--n-edits` random ID facts one at a time, at every store and pass, by every method and with both targets.
    What all four cells answer right (`run.shared`) is scored beside what the model itself does."""
    generator, paths, (one_hop, two_hop, known, right, asked) = run.stream(), run.paths, run.known(model)
    requests, n_fixed = draw_requests(run, run.args.n_edits, generator)
    n, entries = len(requests.fact), []
    run.results["edits"] = entries
    print(f"\nedits of {n} ID facts, one at a time; {int(known[requests.fact].sum())} of them known before"
          + f"; {n_fixed} ID facts cannot be edited (their relation has one tail only)" * (n_fixed > 0))
    if not n:
        return
    probes, left_out = editing.propagation_probes(requests, paths, known, right, asked)
    probes |= editing.unrelated_probes(requests, paths, one_hop, two_hop, asked, 100, generator)
    common = editing.propagation_probes(requests, paths, *run.shared, asked)[0] if run.shared else {}
    probes |= {f"{name}_shared": probe for name, probe in common.items()}
    chosen = a_priori_site(run, model, requests, known)
    for site in edit_sites(run.config):
        at = editing.site(model, *site[:2], editing.queries(paths), run.ordinary())
        near = editing.neighbour_probes(requests, at, paths, one_hop)
        stored, length = at.values[known] if known.any() else at.values, at.values.norm(dim=-1).mean()
        store = {"site": at.name, "pass": site[2], "a_priori": site == chosen,
                 "overlap_hop2": editing.address_overlap(model, at, requests, probes["hop2"]),
                 "facts_per_row": 1 + len(near["same_row"].edit) / n}
        both, near_too = ["prototype", "gradient"], ["near"] * (site == chosen and bool(known.any()))
        for method, targets in ("rome", both + near_too), ("memit", both[:1]), ("row", both):
            u = editing.direction(method, at, requests, diagnostics := {})
            for target in targets:
                r, fallbacks = residual(run, model, at, requests, target, known, u)
                distance = editing.distance_to_values(stored, at.values[requests.fact] + r)
                entries.append(store | diagnostics | editing.score(model, at, requests, u, r, probes | near) | {
                    "method": method, "target": target.replace("near", "gradient"), "near": target == "near",
                    "distance": float((distance / length).mean()), "gradient_for_want_of_a_prototype": fallbacks})
    run.results["edit_left_out"] = left_out
    print(f"compositions left out: {listed(left_out)}\nasked: {len(probes['hop1'].edit)} for hop 1, "
          f"{len(probes['hop2'].edit)} for hop 2; wanted tails of no other known fact, by gradient: "
          f"{entries[0]['gradient_for_want_of_a_prototype']} of {n}")
    summary("edits", [[run.results]])

def edit_fact_stage(run: Run, model: Model):
    """Edit facts given by name, one at a time (ROME, a-priori site, prototype); show what the model answers then."""
    paths, requests, (one_hop, _, _, right, _) = run.paths, named_requests(run, run.args.edit_fact), run.known(model)
    known = one_hop == paths.facts[:, 2]                     # here OOD facts count too, and every path is asked
    probes, left_out = editing.propagation_probes(requests, paths, known, right, paths.second >= 0)
    name, call, at_pass = a_priori_site(run, model, requests, known & ~paths.ood_fact)
    at, u, r, fallbacks = rome_edits(run, model, name, call, requests, known)
    print(f"\nROME at {name}, pass {at_pass}, prototype target; left out: {listed(left_out)}"
          + f"; {fallbacks} by gradient, as no other known fact has the wanted tail" * (fallbacks > 0))
    words = lambda *tokens: " ".join((run.graph.entities + run.graph.relations)[token] for token in tokens)
    asked = {"fact": requests.questions(), "first hop": probes["hop1"], "second hop": probes["hop2"]}
    asked = {kind: (ask.edit, ask.tokens, last_answers(model, ask.tokens), editing.answers(model, at, u, r, ask),
                    ask.answer) for kind, ask in asked.items()}
    for i in range(len(requests.fact)):
        rows = [("question", "before", "after", "right now", "")]
        for kind, (edit, *columns) in asked.items():
            found = [(words(*tokens), *map(words, answers), "ok" if answers[1] == answers[2] else "NO")
                     for tokens, *answers in zip(*(x[edit == i].tolist() for x in columns))]
            rows += found[:10] + [(f"-- {kind}: {sum(x[-1] == 'ok' for x in found)} of {len(found)} right", *[""] * 4)]
        print("\n" + table(rows))

# --- Stages: where a fact is, and when it is written ------------------------------------------------------------------
def corruptions(tokens: Tensor, answers: Tensor, place: int, n: int, generator: torch.Generator, clean_rows=None):
    """Rows [n], [n] of at most n random pairs in tokens [m, token] that differ at `place` alone and in answers [m]; the
    first of each pair in the mask `clean_rows` [m], where there is one."""
    rest = torch.cat([tokens[:, :place], tokens[:, place + 1:]], 1).unique(dim=0, return_inverse=True)[1]
    order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
    order = order[rest[order].argsort(stable=True)]          # rows that agree elsewhere are neighbours, in random order
    clean, other = order[:-1], order[1:]
    pairs = (rest[clean] == rest[other]) & (answers[clean] != answers[other])
    pairs = (pairs if clean_rows is None else pairs & clean_rows[clean]).nonzero().flatten()
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:n].to(pairs.device)]
    return clean[pairs], other[pairs]

def a_priori_site(run: Run, model: Model, requests: editing.Requests, known: Tensor) -> tuple[str, int, int]:
    """(layer, call, pass) to edit, fixed before any edit is scored: the first store that is read; in Dense that whose
    output at the last token, restored after the head was corrupted, helps other `known` facts' answers most."""
    sites, paths, effects, clean = edit_sites(run.config), run.paths, None, []
    if not run.config.loop and not run.config.memory:
        apart = known.index_fill(0, requests.fact, False)
        tokens, tails = editing.queries(paths)[apart], paths.facts[apart, 2]
        clean, other = corruptions(tokens, tails, 0, 200, run.stream())
        if len(clean):
            stores = [(name.removesuffix(".down"), call) for name, call, _ in sites]
            effects = editing.trace(model, tokens[clean], tokens[other], tails[clean], stores)[1][:, -1].tolist()
    chosen = sites[effects.index(max(effects)) if effects else 0]
    run.results["a_priori"] = dict(zip(("site", "call", "pass"), chosen)) | {"effects": effects, "n": len(clean)}
    return chosen

TRACED = "percent of prompts whose answer is back: one token corrupted, one state (column: its token) restored"

def locate_stage(run: Run, model: Model):
    """Causal tracing of known ID facts and of known compositions of them: which state carries the answer."""
    generator, paths, (*_, known, right, asked) = run.stream(), run.paths, run.known(model)
    name, call, at_pass = a_priori_site(run, model, draw_requests(run, run.args.n_edits, generator)[0], known)
    states, words, effects = traced_states(run.config), ("h", "r1", "r2"), []
    at_passes, parts, modules, calls = zip(*states)
    columns = [["pass", "", *at_passes, ""], ["corrupted", "restored", *parts, "prompts"]]
    for query, tokens, answers in ("fact", editing.queries(paths)[known], paths.facts[known, 2]), \
                                  ("composition", paths.tokens[right & asked], paths.two_hop[right & asked]):
        for place in range(tokens.shape[1]):
            clean, other = corruptions(tokens, answers, place, 200, generator)
            asks = tokens[clean], tokens[other], answers[clean], [*zip(modules, calls)]
            top1, rise = (x.tolist() for x in editing.trace(model, *asks)) if len(clean) else (None, None)
            cells = ["".join(f"{100 * x:4.0f}" if x else "   ." for x in row) for row in top1 or []]
            effects.append({"query": query, "corrupted": words[place], "n": len(clean), "top1": top1, "rise": rise})
            columns.append([f"{query}: " * (place == 0) + words[place], "".join(
                f"{word:>4}" for word in words[:tokens.shape[1]]), *(cells or ["-"] * len(states)), f"{len(clean):4}"])
    run.results["locate"] = {"effects": effects, "states": [dict(zip(STATE, state)) for state in states]}
    print(f"\ncausal tracing\n{table(list(zip(*columns)))}\n{TRACED}")
    print(f"site for edits, chosen without the edited facts: {name}, call {call} (pass {at_pass})")

WRITTEN = """pass: whose key and prototype make the edit (ROME), that of --locate first. acts: always, or at some
calls of the layer (call t: pass t). Hops: among edits with direct success when they always act."""
HELD = """the edit at the site of --locate, always acting: share of its right answers that stay right while
the stream after a pass (at r1; hop 2: at r2) is held as unedited in the answers' or a random plane."""

def when_stage(run: Run, model: Model):
    """Edits that act at some calls of their layer alone; then the first of them with its answer held as it was."""
    generator, paths, config, (*_, known, right, asked) = run.stream(), run.paths, run.config, run.known(model)
    requests, _ = draw_requests(run, run.args.n_edits, generator)
    probes = {"direct": requests.questions()} | editing.propagation_probes(requests, paths, known, right, asked)[0]
    counts = {key: len(probe.edit) for key, probe in probes.items()}
    when = run.results["when"] = {"probes": counts, "written": []}
    chosen = a_priori_site(run, model, requests, known)
    shared = config.loop or config.memory                    # one layer, called in every pass; else one in every block
    sites = sorted((s for s in edit_sites(config) if s[0] == chosen[0] or not shared), key=lambda s: s != chosen)
    for name, call, at_pass in sites:                        # the chosen one first
        at, u, r, _ = rome_edits(run, model, name, call, requests, known)
        calls, acts = range(len(sites) if shared and "held" not in when else 0), {"always": None}
        acts |= {f"from call {t}": calls[t:] for t in calls[1:]} | {f"only call {t}": [t] for t in calls}
        hits = {label: {key: editing.answers(model, at, u, r, probe, calls=acting) == probe.answer
                        for key, probe in probes.items()} for label, acting in acts.items()}
        success = hits["always"]["direct"]
        for label, hit in hits.items():
            shares = {key: share_of(hit[key][success[probes[key].edit] | (key == "direct")]) for key in probes}
            when["written"].append({"site": name, "call": call, "pass": at_pass, "acts": label} | shares)
        when["held"] = when.get("held") or hold(run, model, at, u, r, requests, probes, hits["always"], generator)
    print(f"\nwhen it is written: edits of {counts['direct']} facts; compositions {counts['hop1']}, {counts['hop2']}")
    summary("when held", [[run.results]])

def hold(run: Run, model: Model, at: editing.Site, u: Tensor, r: Tensor, requests: editing.Requests,
         probes: dict[str, editing.Probes], right: dict[str, Tensor], generator: torch.Generator) -> list[dict]:
    """For the stream after each pass: the share of the probes `right` under the edit that stay so when it is held."""
    E, entries, streams = model.embedding.weight, [], [s for s in traced_states(run.config) if s[1] == "stream"]
    for at_pass, _, module, call in streams[run.config.blocks - 1::run.config.blocks]:
        entries.append({"after": at_pass, "module": module, "call": call})
        for key, probe in probes.items():
            old, new = E[requests.old[probe.edit]], E[requests.new[probe.edit]]
            random = torch.randn(2, len(probe.edit), E.shape[1], generator=generator).to(E)
            for name, plane in (key, editing.span(old, new)), (f"{key}_random", editing.span(*random)):
                now = editing.answers(model, at, u, r, probe, held=(module, call, 1 + (key == "hop2"), plane))
                entries[-1][name] = share_of((now == probe.answer)[right[key] & right["direct"][probe.edit]])
    return entries

# --- Stage: many edits at once ----------------------------------------------------------------------------------------
RATES = {"efficacy": "eff", "paraphrase": "para", "specificity": "spec"}
MASS_COLUMNS = """n: edits at once. strength: lam of MEMIT, threshold of AlphaEdit, bound of the fine-tuning. eff: new
answers; para: by the relation's other token. spec: other facts that keep theirs. score: harmonic
mean in percent (-: no solution). cond: of the system. left: mean |r - dW k| / |r|, pred: predicted.
cos: largest of two directions. norm: |dW| / |W|. s: seconds, with targets and C; ms: per edit."""
CLOSED_FORMS = {
    "memit": lambda C, K, r, lam, **more: editing.memit_update(K, r, C, lam, **more),
    "emmet": lambda C, K, r, _, **more: editing.emmet_update(K, r, C, **more),
    "alphaedit": lambda C, K, r, bound, **more: editing.alphaedit_update(K, r, C, 1.0, threshold=bound, **more),
    "rome": lambda C, K, r, _, W, diagnostics: editing.rome_sequence(W, C, K, K @ W.T + r, diagnostics)}

class MassEdit:
    """Many facts of a model in one update, at its first store and pass, and what becomes of these and other facts."""
    def __init__(self, run: Run, model: Model):
        self.run, self.model, self.tokens, self.tails = run, model, editing.queries(run.paths), run.paths.facts[:, 2]
        self.site, began = edit_sites(run.config)[0], time.perf_counter()
        self.at = editing.site(model, *self.site[:2], self.tokens)               # keys, values and C
        self.gathered = time.perf_counter() - began
        self.before = last_answers(model, self.tokens)
        self.known = self.before == self.tails
        wanted, _ = draw_requests(run, len(self.tokens), run.stream())
        largest, rest = min(10_000, len(wanted.fact) // 2), len(wanted.fact) - min(1000, len(wanted.fact) // 5)
        self.requests, self.tuning, self.spared = wanted[:largest], wanted[rest:], wanted.fact[largest:rest][:2000]

    def each(self, requests: editing.Requests, target: str, asked: list[tuple[str, float]]) -> list[dict]:
        """One edit of all requests by each (method, strength); the residuals, as published, are sought once."""
        began, run, model, at, batch = time.perf_counter(), self.run, self.model, self.at, self.run.args.edit_batch
        others = self.known.index_fill(0, requests.fact, False)                  # these are the prototypes
        r, fallbacks = residual(run, model, at, requests, target, others, batch=batch, steps=25, decay=0.5, clamp=0.75)
        sought = self.gathered + time.perf_counter() - began
        K, W, entries = at.keys[requests.fact], at.layer.weight.detach(), []
        for method, strength in asked:
            closed, began = CLOSED_FORMS.get(method), time.perf_counter()
            entries.append(entry := {"method": method, "target": target if closed else "gradient", "strength": strength,
                                     "n": len(requests.fact), "site": self.site[0], "pass": self.site[2]})
            solve = lambda notes: closed(at.C, K, r, strength, W=W, diagnostics=notes)
            try:
                dW = solve(None) if closed else editing.finetune_update(model, at.layer, requests, strength, batch)
            except ValueError as error:                      # more facts than rank, an empty null space
                entry["infeasible"] = str(error)
                continue
            entry["seconds"] = round(time.perf_counter() - began + (sought if closed else 0), 3)
            if closed:
                solve(entry)                                 # once more, for the diagnostics
                size = r.double().norm(dim=-1).clamp(min=1e-12)
                entry |= {key: float((entry[key] / size).mean()) for key in entry if key.startswith("residual")}
                entry["fallbacks"] = fallbacks
            entry |= self.outcome(requests, {self.site[0]: dW})
        return entries

    def over_blocks(self, first: int, last: int, requests: editing.Requests, lam: float) -> dict:
        """MEMIT over the blocks first..last of Dense, the residual asked of the stream after them."""
        model, began = self.model, time.perf_counter()
        stream = (f"blocks.{last + 1}.attention" if last + 1 < len(model.blocks) else "norm", 0)
        after = editing.Site("stream", 0, None, None, None, editing.last_token(model, *stream, self.tokens)[0])
        r, _ = editing.prototype_residual(after, requests, self.tails, self.known.index_fill(0, requests.fact, False))
        sites = [(f"blocks.{i}.feed_forward.down", 0) for i in range(first, last + 1)]
        updates = editing.memit_layers(model, sites, requests, r, lam, self.tokens, stream)
        return {"method": "memit", "target": "prototype", "blocks": f"{first}-{last}", "n": len(requests.fact),
                "strength": lam, "seconds": round(time.perf_counter() - began, 3)} | self.outcome(requests, updates)

    def outcome(self, requests: editing.Requests, updates: dict[str, Tensor]) -> dict:
        renamed = requests.tokens + torch.tensor([0, self.run.config.n_relations], device=self.run.device)
        with editing.edit(self.model, updates):
            hits = {"efficacy": last_answers(self.model, requests.tokens) == requests.new,
                    "specificity": last_answers(self.model, self.tokens[self.spared]) == self.before[self.spared]}
            if self.run.config.aliases:
                hits["paraphrase"] = last_answers(self.model, renamed) == requests.new
        shares = {key: float(hit.double().mean()) for key, hit in hits.items()}
        return shares | {"score": 100 * len(shares) / sum(1 / max(share, 1e-9) for share in shares.values())}

def mass_edit_stage(run: Run, model: Model):
    """1 to 10 000 facts (at most half of those there are) in one update, by every method, at the first store and pass.
    Strengths, and the target of the peers of MEMIT, are chosen on facts that are not scored afterwards."""
    mass = MassEdit(run, model)
    largest, (name, _, at_pass) = len(mass.requests.fact), mass.site
    if largest < 5:
        return print(f"\n{2 * largest} facts that can be edited are too few for mass edits: 10 at least")
    print(f"\nediting up to {largest} of {len(mass.tokens)} facts at once, {int(mass.known.sum())} of them known, at "
          f"{name}, pass {at_pass}; strengths chosen on {len(mass.tuning.fact)} other facts")
    grid = [("memit", lam) for lam in (1, 3, 10, 30, 100, 300, 1000, 3000)]
    grid += [("alphaedit", threshold) for threshold in (0.01, 0.03, 0.1, 0.3, 1.0)]
    tuned = [("finetune", bound) for bound in (0.03, 0.1, 0.3, 0.5, 1.0)]
    sweep = mass.each(mass.tuning, "prototype", grid) + mass.each(mass.tuning, "gradient", grid + tuned)
    best = lambda *kind: max((e for e in sweep if (e["method"], e["target"]) == kind), key=lambda e: e.get("score", 0))
    target = max(("prototype", "gradient"), key=lambda target: best("memit", target).get("score", 0))
    chosen = lambda *kind: (kind[0], best(*kind)["strength"])
    edits, peers = [], [("emmet", 0.0), ("rome", 0.0), chosen("alphaedit", target), chosen("finetune", "gradient")]
    for n in sorted({min(n, largest) for n in (1, 3, 10, 32, 100, 316, 1000, 3162, 10_000)}):
        for kind in "prototype", "gradient":
            edits += mass.each(mass.requests[:n], kind, [chosen("memit", kind)] + peers * (kind == target))
    layers = [mass.over_blocks(first, last, mass.requests[:1000], chosen("memit", "prototype")[1])
              for last in range(len(model.blocks)) for first in range(last + 1) if run.arch == "dense"]
    scores = {f"{e['method']}_{e['n']}": e.get("score", 0) for e in edits if e["target"] == target}
    run.results["mass"] = dict(facts=len(mass.tokens), sweep=sweep, edits=edits, layers=layers, scores=scores)
    edits.sort(key=lambda e: (e["method"] != "memit", e["method"], e["target"]))
    summary("mass", [[run.results]])

# --- Stage: exceptions and structure in the spectrum of curvature -----------------------------------------------------
GROUPS = {"q+k": ("attention.query", "attention.key"), "v+out": ("attention.value", "attention.out"),
          "address": ("up", "memory.query", "keys"), "store": ("down", "memory.values")}
KEEPS = 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.87, 0.8, 0.7
REMOVED = 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7
TASKS = {"recited": "3-16 (recitation)", "rare": "22 (company CEO)", "frequent": "74-86 (closed book)",
         "arithmetic": "66-74", "open_book": "93-99", "id": "95-106 (logic)", "ood": "95-106 (logic)"}
ABLATED = """recited, true: exceptions answered as trained, and right; train: other trained; book: open book.
matched: strengths of its own choice in q+k, v+out, address, store (highest true - recited of other
paths); as many components (parts), as large a change (norm) as kfac or ekfac; one keep (alike)."""
RETENTION = "rare, frequent: fifth of the facts drawn least, most often. paper: percent kept in a 7B model [10]"
BANDS = "last token's inputs by eighths of A's eigenvectors, largest first, exceptions / clean; norm: length"
REMAINING = {key: LABELS.get(key, key) for key in ("removed", "recited", "true", *ANSWERS)} | {"open_book": "book"}
RELEARNED = "accuracy after further steps of training, of the ablated and of a fresh model"
VISION = "a vision transformer. memorized, true: images with a wrong label, answered so, and right"

class Ablation:
    """What a model of --ablate is asked, and the batches that its curvature is measured on."""
    def __init__(self, run: Run):
        self.run, self.batches, paths, self.before = run, run.batches(run.stream(run.device)), run.paths, None
        self.prompts, self.told = self.batches.open_book(500, run.config.n_entities)
        true = torch.where(paths.second >= 0, paths.facts[paths.second, 2], -100)            # no exceptions
        exceptions, chooses = paths.masks["exceptions"], paths.masks["validation"]
        self.sets = {"recited": (exceptions, paths.two_hop), "true": (exceptions, true)}
        self.sets |= {name: (paths.masks[name] & ~exceptions, true) for name in SPLITS}      # {name: (mask, answers)}
        self.scored, self.rows = ~chooses, torch.cat([                           # the paths by which choices are made
            (self.sets[name][0] & chooses).nonzero().flatten()[:150] for name in ("recited", *SPLITS[1:])])
        arithmetic, tails = paths.facts[:, 1] < run.recipe.arithmetic, paths.facts[:, 2]
        rank = run.frequency.argsort(stable=True).argsort() / len(arithmetic)
        self.facts = {"one_hop": (torch.ones_like(arithmetic), tails), "arithmetic": (arithmetic, tails),
                      "rare": ((rank < 0.2) & ~arithmetic, tails), "frequent": ((rank >= 0.8) & ~arithmetic, tails)}

    def measure(self, model: Model) -> dict[str, float | None]:
        one_hop, two_hop = predict(model, self.run.paths)
        found = shares_of(self.sets, two_hop[self.scored], self.scored) | shares_of(self.facts, one_hop, slice(None))
        return found | {"open_book": share_of(last_answers(model, self.prompts) == self.told)}

    def value(self, model: Model) -> float:
        """true - recited on paths that are not scored, less ten times the loss of held-out accuracy beyond 0.02."""
        found = shares_of(self.sets, last_answers(model, self.run.paths.tokens[self.rows]), self.rows)
        found = {name: share or 0.0 for name, share in found.items()}
        self.before = self.before or found
        lost = sum(max(0.0, self.before[name] - found[name]) for name in SPLITS[1:]) / 4
        return found["true"] - found["recited"] - 10 * max(0.0, lost - 0.02)

def shares_of(sets: dict, answers: Tensor, rows) -> dict[str, float | None]:
    """The share of right answers, of those to the questions `rows`, in each set {name: (mask, right answers)}."""
    return {name: share_of((answers == gold[rows])[mask[rows]]) for name, (mask, gold) in sets.items()}

def spectrum(run: Run, model: nn.Module, batches: list, names: list[str]) -> tuple[dict, dict]:
    """Of layers by name: (eigen A, eigen G), and the masses of EK-FAC; both with the same sampled labels."""
    seeded = lambda: run.stream(next(model.parameters()).device)
    factors = curvature.kronecker_factors(model, batches, F.cross_entropy, names, generator=seeded())
    factors = {name: (curvature.eigen(A), curvature.eigen(G)) for name, (A, G) in factors.items()}
    return factors, curvature.corrected_masses(model, batches, F.cross_entropy, factors, generator=seeded())

def ablate_stage(run: Run, model: Model):
    """Exceptions out of a model by K-FAC and by every control; what else goes with them; how soon they are back."""
    study, paths, exceptions = Ablation(run), run.paths, run.paths.masks["exceptions"]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {kind: [name for name in names if name.endswith(ends)] for kind, ends in GROUPS.items()}
    every = 3 if run.args.quick else 1                       # of the strengths that are tried
    mixture, began = study.batches.mixture(25, run.config.n_entities), time.perf_counter()
    factors, masses = spectrum(run, model, mixture, names)
    seconds = round(time.perf_counter() - began, 2)
    best, after, entries = curvature.compare(model, study.measure, study.value, factors, masses, groups,
                                              KEEPS[::every], REMOVED[::every], run.stream())
    before = entries[0]
    rows, masked = exceptions & ~study.scored, {}
    forget = [(paths.tokens[rows], F.pad(paths.two_hop[rows][:, None], (2, 0), value=-100))]
    for share in (0.99, 0.95, 0.85):
        masked[share] = curvature.learned_mask(model, forget, mixture, F.cross_entropy, [*after], share, steps=50)
    chosen, learned = curvature.search(model, study.value, {"all": masked}, 1)
    entries.append(curvature.outcome(model, study.measure, learned, method="learned", matched="own", strengths=chosen))
    method = best["method"]
    sweep = [curvature.outcome(model, study.measure, curvature.edited(model, method, factors, after, keep, masses),
                               method=method, matched=f"alike {keep}", keep=keep) for keep in KEEPS]
    bands, part = {}, lambda x, A: [*curvature.band_shares(x, A, 8).mean(0).tolist(), float(x.norm(dim=-1).mean())]
    for name in names:
        read = [editing.record(model, model.get_submodule(name), paths.tokens[mask][:2000])[0][:, :, -1].flatten(0, 1)
                for mask in (exceptions, paths.masks["train"] & ~exceptions)]
        odd, clean = (part(x, factors[name][0]) for x in read)
        bands[name] = {"exceptions": odd, "clean": clean} | {
            band: x / y if y else None for band, x, y in zip((*"12345678", "norm"), odd, clean)}
    with curvature.ablated(model, after):
        ablated = relearn(run, model.state_dict(), study, before["recited"])
    fresh = relearn(run, Model(run.config, run.stream()).state_dict(), study, 2, len(ablated))
    tasks = {key: {"paper": paper, "before": before[key], "after": best[key], "kept": best[key] / before[key]}
             for key, paper in TASKS.items() if before[key]}
    run.results["ablate"] = {"spectrum_seconds": seconds, "before": before, "chosen": best, "entries": entries,
                             "sweep": sweep, "bands": bands, "tasks": tasks,
                             "relearning": {"ablated": ablated, "fresh": fresh}}
    print(f"\n{int(exceptions.sum())} exceptions; {seconds:.1f} s for factors, bases and the masses of EK-FAC\n"
          f"{best['method']} keeps {listed({s: kind for kind, s in best['strengths'].items()})}")
    summary("ablation retention bands relearning", [[run.results]])
    if run.args.images and (run.args.arch != "all" or run.arch == "dense"):      # the same beside all four cells
        run.results["ablate"]["vision"] = vision(run)
        summary("vision", [[run.results]])

def further(run: Run, weights: dict, at, first: int):
    """Train on from `weights` at step `first`, optimizers anew; yields (steps, trained, averaged model) `at` some."""
    parts = run.fresh()
    for name in "model", "average":
        parts[name].load_state_dict(weights)
    batches = run.batches(parts["generator"])
    for step in range(max(at) + 1):
        if step in at:
            yield step, parts["model"], parts["average"]
        run.advance(parts, batches, parts["model"], first + step)

def relearn(run: Run, weights: dict, study: Ablation, recited: float, most: int = 20) -> list[dict]:
    """`Ablation.measure` after 0, 10, 20, 40, ... more steps, until as many are `recited` or `most` times."""
    curve, at = [], [step for step in (0, *(10 * 2**i for i in range(20))) if step <= 2 * run.recipe.memorize + 20]
    for step, model, _ in further(run, weights, at, run.recipe.steps):           # trained as in the last steps
        curve.append({"step": step} | study.measure(model))
        if len(curve) == most or curve[-1]["recited"] >= recited:
            break
    return curve

def shapes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n noisy images of eight shapes, as patches of 4 x 4 pixels with their places [n, 16, 16 + 16]; the shapes [n]."""
    draw = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=generator)
    r, pixel = draw(3.5, 6), torch.arange(16.0)
    u, v = ((x - 7.5 - draw(-1, 1) * (7.5 - r)) / r for x in (pixel[None, None, :], pixel[None, :, None]))
    far, near, ring = u.abs().maximum(v.abs()), u.abs().minimum(v.abs()), (u**2 + v**2).sqrt()
    kinds = torch.stack([ring < 1, (ring < 1) & (ring > 0.6), far < 0.85, (far < 0.95) & (far > 0.5),
                         u.abs() + v.abs() < 1, (near < 0.3) & (far < 1), (u.abs() < (v + 1) / 2) & (v < 0.9),
                         ((u - v).abs().minimum((u + v).abs()) < 0.4) & (far < 0.9)], 1)      # [n, 8, 16, 16]
    kind = torch.randint(8, (n,), generator=generator)
    images = kinds[torch.arange(n), kind] + 0.15 * torch.randn(n, 16, 16, generator=generator)
    return torch.cat([F.unfold(images[:, None], 4, stride=4).mT, torch.eye(16).expand(n, 16, 16)], 2), kind

def vision(run: Run) -> list[dict]:
    """A vision transformer with a tenth of its labels wrong, on the CPU, trained to memorize them and ablated."""
    n, generator = run.args.images, run.stream()
    blocks = (nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2))
    model = nn.Sequential(nn.Linear(32, 64), *blocks, nn.AvgPool2d((16, 1)), nn.Flatten(), nn.Linear(64, 8))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p, generator=generator)
        elif name.endswith("bias"):                          # PyTorch draws them from a stream that has no seed here
            nn.init.zeros_(p)
    (images, true), row = shapes(2 * n, generator), torch.arange(2 * n)          # the second half is not trained
    wrong, chooses = row < n // 10, row % 5 == 0
    labels = torch.where(wrong, (true + torch.randint(1, 8, (2 * n,), generator=generator)) % 8, true)
    sets = {"memorized": (wrong, labels), "true": (wrong, true), "validation": (row >= n, true)}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    for rows in (torch.randperm(n, generator=generator)[:100] for _ in range(24 * n // 100)):
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.1).backward()
        optimizer.step()
    measure = torch.no_grad()(lambda m, rows=~chooses: shares_of(sets, m(images[rows]).argmax(-1), rows))
    def value(model, held=measure(model, chooses)["validation"]) -> float:
        found = measure(model, chooses)
        return found["true"] - found["memorized"] - 10 * max(0, 0.98 * held - found["validation"])
    groups = {f"{name} {i}": [f"{i}.{name}"] for i in (1, 2) for name in ("linear1", "linear2")}
    every, batches = 3 if run.args.quick else 1, list(zip(images[:n].split(250), labels[:n].split(250)))
    return curvature.compare(model, measure, value, *spectrum(run, model, batches, sum(groups.values(), [])), groups,
                             KEEPS[::every], REMOVED[::every], run.stream(), ("svd", "random"))[2]

# --- Stages: inference paths before and after grokking, and transfer to new facts -------------------------------------
BRIDGE_USED, PATH_KEYS = 0.5, ("right", "bridge", "relation", "whole", "visible", "rest")
PATHS = """right: accuracy; else shares, the largest over passes (but the last). bridge: the lens at r1 has the
bridge first of all entities; relation: at r2, the second one. whole, visible, rest: with the stream
at r1 of a query with the same r2, or its part in (out of) the plane of both bridges, its answer."""

def inference_path(run: Run, model: Model, queries: str) -> tuple[dict, dict]:
    """Of at most 300 compositions of a set: logit lens, causal tracing, swaps of the stream at r1. And {token replaced:
    (hits [site, token, n] of the tracing by prompt, whether replacing it changes the model's own answer [n])}."""
    generator, paths, E, n = run.stream(), run.paths, model.embedding.weight, run.graph.n_entities
    states, rows = traced_states(run.config), paths.masks[queries].nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=generator).to(run.device)[:300]]
    path, hits, sites = {"n": len(rows), "lens": {}, "swap": []}, {}, [state[2:] for state in states]
    if not len(rows):
        return path, hits
    tokens, bridge, answer = paths.tokens[rows], paths.one_hop[rows], paths.two_hop[rows]
    streams = [i for i, state in enumerate(states) if state[1] == "stream"][:-1]
    path["right"] = share_of(last_answers(model, tokens) == answer)
    for name, wanted, words, token in ("bridge", bridge, E[:n], 1), ("answer", answer, E[:n], 2), \
                                      ("relation", tokens[:, 2] - n, E[n:n + run.graph.n_relations], 2):
        rank, p = editing.lens(model, tokens, wanted, sites, lambda x: F.linear(model.norm(x), words))
        first = (rank == 0).double().mean(-1).tolist()
        path["lens"][name] = {"first": first, "rank": (rank + 1.0).mean(-1).tolist(), "p": p.mean(-1).tolist()}
        path[name] = max(first[i][token] for i in streams) if streams else None
    everything = [x[paths.second >= 0] for x in (paths.tokens, paths.two_hop, paths.masks[queries])]
    for place in range(3):
        clean, other = (everything[0][i] for i in corruptions(*everything[:2], place, 200, generator, everything[2]))
        if len(clean):
            own, now = last_answers(model, clean), last_answers(model, other)
            hits[place] = editing.trace(model, clean, other, own, sites, each=True)[0], own != now
    path["trace"] = {place: back[:, :, changed.cpu()].mean(-1).tolist() for place, (back, changed) in hits.items()
                     if changed.any()}
    one, other = corruptions(tokens[:, 1:], answer, 0, 200, generator)           # pairs that share r2
    seen = editing.span(E[bridge[one]], E[bridge[other]])
    bases = {"whole": None, "visible": seen, "rest": editing.complement(seen),
             "random": editing.span(*torch.randn(2, len(one), E.shape[1], generator=generator).to(E))}
    for i in streams if len(one) else []:
        path["swap"].append({part: share_of(answer[other] == editing.swapped(
            model, tokens[one], tokens[other], *sites[i], 1, basis)) for part, basis in bases.items()})
    return path | {part: max((swap[part] for swap in path["swap"]), default=None) for part in bases} | {
        "n_swap": len(one)}, hits

def same_paths(run: Run, one: dict, other: dict) -> dict | None:
    """Pearson correlation of two tracing maps over the prompts that count in both, with a 95 % bootstrap interval over
    prompts. States that cannot matter are left out: before the token replaced, in the last block before r2, its end."""
    generator, parts, pairs, r = run.stream(), {part for _, part, *_ in traced_states(run.config)}, [], []
    for place in one.keys() & other.keys():
        rows = (one[place][1] & other[place][1]).cpu()
        free = torch.ones_like(one[place][0][:, :, 0], dtype=torch.bool)
        free[:, :place] = free[-len(parts):, :2] = free[-1] = False
        pairs += [[hits[free][:, rows] for hits, _ in (one[place], other[place])]] * bool(rows.any())
    for k in range(1001 if pairs else 0):                    # the first: all prompts, once
        drawn = [torch.randint(len(x.T), (len(x.T),), generator=generator) if k else slice(None) for x, _ in pairs]
        maps = [torch.cat([pair[side][:, i].mean(1) for pair, i in zip(pairs, drawn)]) for side in (0, 1)]
        r.append(torch.corrcoef(torch.stack(maps))[0, 1].nan_to_num().item())
    low, *_, high = sorted(r[1:])[24:976] or (None, None)
    return {"n": sum(len(x.T) for x, _ in pairs), "r": r[0], "low": low, "high": high} if r else None

def circuits_stage(run: Run, model: Model):
    """Inference paths before memorization, after it and at the end, ID and OOD apart; what else these models can do."""
    hits, states = defaultdict(dict), [dict(zip(STATE, state)) for state in traced_states(run.config)]
    found = run.results["circuits"] = {"states": states, "id": {}, "ood": {}, "worth": {}}
    for moment, (record, weights) in run.moments.items():
        then = copy.deepcopy(model)
        then.load_state_dict(weights)
        for queries in "id", "ood":
            found[queries][moment], hits[queries][moment] = inference_path(run, then, queries)
        found["worth"][moment] = {key: record[key] for key in ("step", *ANSWERS)} | later(run, then)
    found["same"] = {name: same_paths(run, by.get("memorized", {}), by["end"]) or {} for name, by in hits.items()}
    used = found["ood"]["end"].get("visible")
    found["fake"] = None if used is None else run.history[-1]["ood"] >= 0.9 and used < BRIDGE_USED
    summary("paths same worth", [[run.results]])
    print(f"\nfake grokking (OOD >= 0.9, less than {BRIDGE_USED} redirected): {found['fake']}")

def later(run: Run, model: Model) -> dict:
    """What a model is worth: edits as of --edit (ROME, prototype, a-priori site), ID accuracy after EK-FAC at 0.99."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    (_, _, *seen), requests = run.known(model), draw_requests(run, run.args.n_edits, run.stream())[0]
    probes = editing.propagation_probes(requests, run.paths, *seen)[0]
    name, call, _ = a_priori_site(run, model, requests, seen[0])
    mixture = run.batches(run.stream(run.device)).mixture(10, run.config.n_entities)
    factors, masses = spectrum(run, model, mixture, names)
    with curvature.ablated(model, curvature.edited(model, "ekfac", factors, names, 0.99, masses)):
        ablated = accuracy(model, run.paths)["id"]
    at, u, r, _ = rome_edits(run, model, name, call, requests, seen[0])
    return editing.score(model, at, requests, u, r, probes) | {"ablated": ablated, "site": name}

def grown(run: Run) -> Run:
    """The run in a graph with 2/5 more entities and 1/5 more relations, with new facts as dense, some of them about old
    entities. Sets by the age of both facts are added; in new->new both heads are new, the second relation is old."""
    old, (E, R), child = run.graph.facts, run.graph.facts.shape, copy.copy(run)
    N, M = E + max(2, 2 * E // 5), R + max(1, R // 5)
    kept = F.pad(old, (0, M - R, 0, N - E), value=-1)
    new = (kept < 0) & (torch.rand(kept.shape, generator=run.stream()) < (old >= 0).double().mean())
    child.graph = kg.from_table(torch.where(new, kg.synthetic(N, M, 2**58 + run.seed).facts, kept))
    paths = kg.split(child.graph, 0, 1, 0)
    composed, is_new = paths.second >= 0, new[tuple(paths.facts[:, :2].T)]
    first, second = is_new[paths.first], is_new[paths.second] & composed
    rows = (composed & ~first & ~second).nonzero().flatten()                     # the old ones, in their old order
    masks = {name: torch.zeros_like(composed).index_copy(0, rows, mask[run.paths.second >= 0].cpu())
             for name, mask in run.paths.masks.items()} | {
        "new->old": composed & first & ~second, "old->new": ~first & second, "new->new": first & second
        & (paths.tokens[:, 0] >= E) & (paths.one_hop >= E) & (paths.tokens[:, 2] < N + R)}
    child.paths = replace(paths, masks=masks).to(run.device)
    child.config, child.recipe = replace(run.config, n_entities=N, n_relations=M), replace(run.recipe, zipf=0.0)
    return child

TRANSFER = "compositions first fact -> second, none trained; OOD: the old set; facts: all, and the step of 0.99"

def transfer_stage(run: Run, model: Model):
    """New facts, trained from scratch, the memorized weights and the last ones; then compositions with them."""
    child, (E, R), steps, found = grown(run), run.graph.facts.shape, run.args.transfer_steps, {}
    n = {kind: int(mask.sum()) for kind, mask in child.paths.masks.items() if "->" in kind}
    print(f"\n{len(child.paths.facts) - len(run.paths.facts)} new facts; compositions with them: {listed(n)}")
    fresh = {name: p.cpu() for name, p in child.fresh()["model"].state_dict().items()}
    place = torch.tensor([*range(E), *range(child.graph.n_entities, child.graph.n_entities + R)])    # of the old tokens
    grow = lambda weights: weights | {"embedding.weight": fresh["embedding.weight"].index_copy(
        0, place, weights["embedding.weight"][:E + R])}
    starts = {"scratch": fresh} | {name: grow(then) for name, (_, then) in run.moments.items() if name != "before"}
    for name, start in starts.items():
        curve = [{"step": step} | accuracy(average, child.paths)
                 for step, _, average in further(child, start, range(0, steps + 1, max(1, steps // 12)), 0)]
        found[name] = curve[-1] | {"from": name, "n": n, "curve": curve, "step_facts": first_step(curve, one_hop=0.99)}
        found[name] |= {f"step_{kind}": first_step(curve, **{kind: 0.9}) for kind in n}
    run.results["transfer"] = found
    summary("transfer", [[run.results]])

# --- Pictures ---------------------------------------------------------------------------------------------------------
FIGURES = {"grokking": "training step", "propagation": "", "when": "edit made for pass, acting", "paths": "asked, when",
           "mass": "facts edited at once", "locate": "question: replaced, restored", "retention": "share of mass kept"}
STYLES = list(zip(("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777"),  # Okabe-Ito
                  "os^Dv*PX", ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 3)), (0, (3, 1)), (0, (7, 2)))))

def points(groups: list[list[dict]]) -> dict:
    """{figure: {panel: {line: {x: values}}}} of all that is drawn, a value for each run."""
    found = {file: defaultdict(lambda: defaultdict(lambda: defaultdict(list))) for file in FIGURES}
    for i, r in ((i, r) for i, runs in enumerate(groups) for r in runs):
        name = groups[i][0].get("name", r["arch"])
        of = lambda place: lookup(r, place) or []
        traced = [e | state | {"word": word, "share": share} for e in of("locate.effects")
                  for state, shares in zip(of("locate.states"), e["top1"] or [])
                  for word, share in zip(("h", "r1", "r2"), shares)]
        swaps = [e | {"of": q, "at": at} for q in ("id", "ood") for at, e in dict(of(f"circuits.{q}")).items()]
        for file, panel, line, x, entries, keys in (
                ("grokking", name, "{key}", "{step}", r["history"], ANSWERS),
                ("propagation", "edits: ROME, prototype", "{key}", name, [r["edit"]], HOPS),
                ("when", name, "{key}", "{pass}, {acts}", sorted(of("when.written"), key=lambda e: e["pass"]), HOPS),
                ("locate", f"tracing, {name}", "{pass} {part}", "{query:.4}: {corrupted}, {word}", traced, ["share"]),
                ("mass", name + ", {key}", "{method}, {target}", "{n}", of("mass.edits"), RATES),
                ("paths", name, "{key}", "{of} {at}", swaps, PATH_KEYS),
                ("retention", f"curvature, {name}", "{key}", "{keep}", of("ablate.sweep"), ("true", *TASKS))):
            for e, key in itertools.product(entries, keys):
                if e.get(key) is not None:
                    values = found[file][panel.format(key=key, **e)][line.format(key=key, **e)]
                    values[x.format(**e)].append(e[key])
    return found

def plot(folders: list[Path], out: Path):
    """Figures of all runs in or below the folders, as SVG files in `out`: the mean over the runs and their range; for
    causal tracing the share of prompts that get their answer back, from white to black. Needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    out.mkdir(parents=True, exist_ok=True)
    style = {"svg.fonttype": "none", "svg.hashsalt": "minedit", "font.size": 9, "font.sans-serif": "DejaVu Sans"}
    for file, panels in points(read_runs(folders)).items():
        print(f"{out / file}.svg" + ": not drawn, no run has results for it" * (not panels))
        tracing, joined = file == "locate", file in ("grokking", "mass", "retention")
        columns = min(len(panels), {"locate": 2, "mass": 3}.get(file, 4))
        rows, names = -(-len(panels) // max(columns, 1)), [*dict.fromkeys(itertools.chain(*panels.values()))]
        with rc_context(style):
            figure = Figure(((4.6 if tracing else 2.6) * columns + 0.8, 2.8 * rows + 0.5), layout="constrained")
            for place, (name, lines) in enumerate(panels.items()):
                ax, ticks = figure.add_subplot(rows, columns, place + 1), [
                    *dict.fromkeys(itertools.chain(*lines.values()))]
                n = max(len(values) for line in lines.values() for values in line.values())
                ax.set(title=f"{name} (n = {n})", xlabel=FIGURES[file])
                ax.set_xticks(range(len(ticks)), ticks, rotation=90 * (len("".join(ticks)) > 24))
                if tracing:                                  # a cell is 9 x 9 pixels, which no viewer blurs
                    grey = torch.tensor([[statistics.fmean(v) for v in line.values()] for line in lines.values()])
                    ax.imshow(grey.kron(torch.ones(9, 9)).numpy(), "Greys", vmin=0, vmax=1, interpolation="none",
                              aspect="auto", extent=(-0.5, len(ticks) - 0.5, len(lines) - 0.5, -0.5))
                    ax.set_yticks(range(len(lines)), lines)
                for line, values in () if tracing else lines.items():                # one style in all panels
                    colour, mark, dash = STYLES[(i := names.index(line)) % len(STYLES)]
                    x = [ticks.index(x) + 0.6 * ((i + 0.5) / len(names) - 0.5) * (not joined) for x in values]
                    y, low, high = ([f(v) for v in values.values()] for f in (statistics.fmean, min, max))
                    ax.plot(x, y, color=colour, marker=mark, ls=dash if joined else "", ms=4, lw=1, label=line)
                    (ax.fill_between if joined else ax.vlines)(x, low, high, color=colour, alpha=0.2 if joined else 1)
                    ax.set(ylim=(-0.04, 1.04), ylabel="share of answers" if place % columns == 0 else None)
            if panels:
                drawn = {line.get_label(): line for ax in figure.axes for line in ax.get_legend_handles_labels()[0]}
                figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=3)
                figure.savefig(out / f"{file}.svg", metadata={"Date": None})

# --- Speed ------------------------------------------------------------------------------------------------------------
SPEED = """ms: a step. plain: times as long with exact top-k, unfused; rows: and every path a row of its own.
shape, square: share of torch's FLOP/s for keys, for a 1024 square. The rest: done per second."""

def in_turns(tasks: dict, rounds: int = 5) -> dict:
    """Seconds of each task in each round; all take turns, so that what disturbs one disturbs all. One trial round."""
    seconds = {name: [] for name in tasks}
    for i, (name, task) in itertools.product(range(rounds + 1), tasks.items()):
        began = time.perf_counter()
        task()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds[name] += [time.perf_counter() - began] * (i > 0)
    return seconds

def apart(tokens: Tensor, positions: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch with every path a row of its own, in which its fact is computed anew."""
    rows = lambda x, n: torch.cat([x[:, [*range(n), i]] for i in range(n, x.shape[1])] or [x])
    return rows(tokens, 2), positions[:3], rows(answers, 1)

def bench_tasks(run: Run, alone: bool = False) -> tuple[dict, dict]:
    """What is timed of a run, {name: function}, and {name: units that one call does}."""
    parts, paths, name, n = run.fresh(), run.paths, edit_sites(run.config)[0][0], run.args.n_edits
    model, batches, facts = parts["model"], run.batches(parts["generator"]), editing.queries(paths)
    batches.draw = (lambda draw=batches.draw: apart(*draw())) if alone else batches.draw
    gold, W = paths.facts[:, 2:].expand(-1, 2), model.get_submodule(name).weight
    K, R, X = (torch.randn(rows, W.shape[dim]).to(W) for rows, dim in ((n, 1), (n, 0), (2 * W.shape[1], 1)))
    tasks = {"step": lambda: run.advance(parts, batches, model, 0), "evaluation": lambda: accuracy(model, paths),
             "edits": lambda: editing.memit_update(K, R, editing.second_moment(X), 1.0),
             "factors": lambda: curvature.kronecker_factors(model, [(facts, gold)], F.cross_entropy, [name])}
    units = run.recipe.batch * run.recipe.branches, len(paths.facts) + len(paths.first), n, facts.numel()
    return tasks, dict(zip(tasks, units))

def memory_of(asked: dict) -> int:
    """Peak MiB of this process, torch included, or of CUDA's allocations, once it has done each task of a run."""
    run = prepare(argparse.Namespace(**asked))[0]
    for task in bench_tasks(run)[0].values():
        task()
    return peak_memory_mib(run.device)

def bench(args, out: Path):
    """Time what the project does, at the sizes asked for and as they grow: tables, and bench.json in `out`."""
    scratch, middle = tempfile.TemporaryDirectory(), statistics.median
    asked = vars(args) | {"arch": "lmc", "seeds": 1, "n_edits": 100, "out": Path(scratch.name)}
    make = lambda **sizes: prepare(argparse.Namespace(**asked | sizes))[0]
    X, d, n = torch.randn(1024, 1024, device=make().device), min(args.d_model, 1024), min(args.slots, 1024)
    s = in_turns({"shape": lambda: X[:, :d] @ X[:d, :n], "square": lambda: X @ X}, 50)
    peak = {"shape": 2048 * d * n / middle(s["shape"]), "square": 2 * 1024**3 / middle(s["square"])}    # FLOP/s
    cells = [("arch", "ms", "paths", "plain", "rows", *peak, "answers", "edits", "tokens")]
    for arch in ARCHS:
        tasks, units = bench_tasks(make(arch=arch))
        s = in_turns(tasks | {name: bench_tasks(make(arch=arch, addressing="plain"), name == "rows")[0]["step"]
                              for name in ("plain", "rows")})
        with FlopCounterMode(display=False) as counter:
            tasks["step"]()
        ms, rates = 1000 * middle(s["step"]), [f"{units[name] / middle(s[name]):.0f}" for name in units]
        ratios = ([x / y for x, y in zip(s[name], s["step"])] for name in ("plain", "rows"))
        cells.append((arch, f"{ms:.1f}", rates[0], *(f"{middle(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios),
                      *(f"{1000 * counter.get_total_flops() / ms / p:.2f}" for p in peak.values()), *rates[1:]))
    growth = [("exponents in", "sizes", *units, "MiB")]      # slope of log seconds, MiB over log size
    for axis, start in ("d_model", args.d_model), ("slots", args.slots), ("entities", args.entities), ("n_edits", 500):
        small, large = start // 2, 2 * start
        s = in_turns({(u, x): task for x in (small, large) for u, task in bench_tasks(make(**{axis: x}))[0].items()}, 3)
        slope = lambda before, after: f"{math.log(after / before, large / small):.2f}" if before else "-"
        with multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver").Pool(1, None, (), 1) as pool:
            mib = pool.map(memory_of, [asked | {axis: x} for x in (small, large)], chunksize=1)
        growth.append((axis.removeprefix("n_"), f"{small} {large}", *(slope(middle(s[u, small]), middle(s[u, large]))
                       for u in units), f"{slope(*mib)} ({mib[0]}-{mib[1]})"))
    step, n_threads = bench_tasks(make())[0]["step"], torch.get_num_threads()
    s = in_turns({n: lambda n=n: (torch.set_num_threads(n), step()) for n in sorted({1, n_threads})})
    threads = [("threads", "ms"), *((n, f"{1000 * middle(s[n]):.1f}") for n in s)]
    with torch.profiler.profile() as profiler:
        step()
    cost = lambda e: e.self_device_time_total if X.is_cuda else e.self_cpu_time_total
    top = sorted(profiler.key_averages(), key=cost, reverse=True)
    share = lambda e: f"{cost(e) / sum(map(cost, top)):.3f}"
    profile = [("operator", "share", "calls"), *((e.key[:50], share(e), e.count) for e in top[:10])]
    results = {"cells": cells, "growth": growth, "threads": threads, "profile": profile, "torch": torch.__version__,
               "peak_flops": peak, "peak_memory_mib": peak_memory_mib(X.device), "device": device_name(X.device)}
    print(table(cells), SPEED, "", table(growth), "", table(threads), "", table(profile), sep="\n")
    print(f"\n{peak['shape'] / 1e9:.0f}, {peak['square'] / 1e9:.0f} GFLOP/s, {results['peak_memory_mib']} MiB at most")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "bench.json", results)

# --- Report -----------------------------------------------------------------------------------------------------------
def table(rows: list[tuple]) -> str:
    """Rows of cells, the first one the header, as aligned columns: text to the left, the rest to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = [not any(c[:1].isdigit() for c in column) and {*column} != {"-"} for _, *column in zip(*rows)]
    line = lambda row: "  ".join(c.ljust(w) if l else c.rjust(w) for c, w, l in zip(row, widths, left)).rstrip()
    return "\n".join([line(rows[0]), "-" * (sum(widths) + 2 * len(widths) - 2)] + [line(row) for row in rows[1:]])

def cell(value, form: str | None = ".3f") -> str:
    """A number, by its size where no form is given; "-" for None."""
    form = form or (".3f" if value is None or abs(value) < 10 else ".1f" if abs(value) < 100 else ".0f")
    return "-" if value is None else format(value, form)

def mean(values: list, form: str = ".3f", lowest: bool = False) -> str:
    """Mean of what was measured, "-" where nothing was; the lowest if asked; of how many, where others have none."""
    found = [v for v in values if v is not None]
    text = cell(sum(found) / len(found) if found else None, form)
    text += f" ({cell(min(found), form)})" if lowest and len(found) > 1 else ""
    return text + f" ({len(found)} of {len(values)})" * (0 < len(found) < len(values))

def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())

ACCURACY = "means; paths: OOD, of all; first, second: only this hop OOD; grokked: train 0.99, OOD 0.9 (-: never)"
SCORES = "score by number of edits (more: below); strength: chosen on other facts (mean; 0: there is none)"
NEIGHBOURS = "head, relation: share that moved of the facts with it. on row: facts. cosine: of key and hop 2's key"
SHARED = "ROME, prototype, a-priori site, on what all four cells know. p: exact two-sided Mann-Whitney, hop 2"

def lookup(r: dict, place: str):
    """What a result holds at "key.key...", None where nothing is."""
    return functools.reduce(lambda found, key: (found or {}).get(key), place.split("."), r)

def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

CLAIMS = """n: queries of all runs; -: a mean over the runs. interval: 95 % (Wilson) and the runs' range.
agrees: in the range of results/claims.tsv; ?: the interval crosses its border, or is of one run."""

def claims(groups: list[list[dict]]):
    """What the papers claim beside ours, cell by cell, of the first group with most runs. results/claims.tsv names our
    figure by its place in a result, or two with - or / between, and the place of the number of queries asked."""
    rows, signs = [("claim", "theirs", "", "ours", "interval", "n", "")], {"-": operator.sub, "/": operator.truediv}
    for line in f.read_text().splitlines()[1:] if (f := Path(__file__).parent / "results/claims.tsv").exists() else []:
        claim, theirs, low, high, cells, trained, figure, count = line.split("\t")
        (one, *then), tested = figure.split(), {}            # {arch: (our figure, queries) of each run}
        for group in groups:
            arch, config, data, found = group[0]["arch"], group[0]["config"], group[0]["config"]["data"], []
            kind = f"{data.get('regime', 'natural')} {data.get('augment', 0)} {data['train_fraction']}"
            kind += " triples" * ("sha256" in data) + " noise" * bool(config["recipe"].get("label_noise"))
            kind += " resized" * any((config["model"].get(f.name) or 0) != (f.default or 0) for f in fields(Config)[5:])
            for r in group if arch in cells.split() and kind == trained else []:
                values = [lookup(r, place) for place in (one, *then[1:])]
                if None not in values and values[1:] != [0]:
                    found.append((signs[then[0]](*values) if then else values[0], lookup(r, count)))
            if len(found) > len(tested.get(arch, [])):
                tested[arch] = found
        rows += [(claim, theirs, *"----", "not testable here" if cells == "-" else "no figure")] * (not tested)
        for arch, found in tested.items():
            values, counts = zip(*found)
            n = sum(counts) if all(counts) else None
            ours = sum(map(operator.mul, values, counts)) / n if n else statistics.fmean(values)
            ends = [f([*values, *(wilson(ours, n) if n else ())]) for f in (min, max)]
            within = [float(low) <= x <= float(high) for x in (ours, *ends)]
            verdict = ("agrees" if within[0] else "differs") + " ?" * (len({*within}) > 1 or not n and len(values) < 2)
            rows.append((claim, theirs, arch, cell(ours), "..".join(map(cell, ends)), cell(n, "d"), verdict))
    print(f"\n{table(rows)}\n{CLAIMS}")

def read_runs(folders: list[Path]) -> list[list[dict]]:
    """All runs in or below the folders, in groups that differ in the seed; what two folders hold of one is merged."""
    groups, root = {}, os.path.commonpath(folders)           # {configuration but for the seed: {seed: result}}
    for file in sorted({file for folder in folders for file in folder.rglob("results.json")}):
        try:
            result = json.loads(file.read_text())
            config = [{k: v for k, v in result["config"][part].items() if v and k != "triples"}     # absent is off
                      for part in ("data", "model", "recipe")]                       # of triples the content counts
            assert result["arch"] in ARCHS and {"accuracy", "n_paths", "grokked_at", "seconds"} <= result.keys()
            assert all({"near", "a_priori"} <= e.keys() for e in result.get("edits", []))    # else of an older version
            group = groups.setdefault(json.dumps(config, sort_keys=True), {})
            result = group[result["seed"]] = {"history": []} | group.get(result["seed"], {}) | result
            if (log := file.with_name("log.jsonl")).exists():                        # the evaluations
                result["history"] = [json.loads(line) for line in log.read_text().splitlines()]
            result["folder"] = os.path.relpath(file.parent, root).partition("-seed")[0]
            for e in lookup(result, "mass.edits") or []:
                of = result["mass"].setdefault("table", {}).setdefault(f"{e['method']}, {e['target']}", {})
                of |= {"strength": e["strength"], str(e["n"]): e.get("score")}
            main = lambda e: e["a_priori"] and (e["method"], e["target"]) == ("rome", "prototype")
            result["edit"] = next(filter(main, result.get("edits", [])), {})
            result |= {f"step_{split}": first_step(result["history"], **{split: level})
                       for split, level in (("train", 0.99), ("id", 0.99), ("ood", 0.9))}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
            raise UserError(f"{file}: not the results of a run; remove it or report another folder") from None
    if not groups:
        raise UserError(f"--report {folders[0]}: no results.json in it or below it; train a run there first")
    found = [[group[seed] for seed in sorted(group)] for group in groups.values()]
    archs = [runs[0]["arch"] for runs in found]
    for first, *_ in found:                                  # beside other groups of its cell one is named by a folder
        first["name"] = first["arch" if archs.count(first["arch"]) == 1 else "folder"]
    return sorted(found, key=lambda runs: list(ARCHS).index(runs[0]["arch"]))

def summary(stages: str, groups: list[list[dict]]):
    """The tables of some stages: means over the runs of each group."""
    text = lambda x: "" if x is None else str(x).replace("feed_forward.down", "ff").replace("feed_forward", "ff")
    several = any(group[1:] for group in groups)
    for places, words, shares, legend in map(TABLES.get, stages.split()):
        header = (name + " (lowest)" * (share in LOWEST and several) for share, name in shares.items())
        rows = [("arch", *(word.split(".")[-1] for word in words), *header)]
        for group in groups:
            found, n = defaultdict(list), defaultdict(int)   # {(place, words): entries}, {place: runs that have some}
            for place, r in itertools.product(places.split(), group):
                entries = [r] if place == "." and "circuits" in r else lookup(r, place) or []
                n[place] += bool(entries)
                for at, e in entries.items() if isinstance(entries, dict) else enumerate(entries):
                    named = e | {"at": at, "of": place.split(".")[-1]} | ({"target": "near"} if e.get("near") else {})
                    found[(place, *(text(lookup(named, word)) for word in words))].append(e)
            rows += [(group[0].get("name", group[0]["arch"]) + f" ({len(es)} of {n[at]})" * (len(es) < n[at]), *key,
                      *(mean([lookup(e, share) for e in es], None, share in LOWEST) for share in shares))
                     for (at, *key), es in found.items()]
        if len(rows) > 1:
            print(f"\n{table(rows)}\n{legend}")

REGIMES = "at: steps to 0.99, 0.99, 0.9. bridge, visible: OOD queries, end. fake: OOD >= 0.9, visible < 0.5"
WORTH = "direct, hops: ROME, prototype, a-priori site. ablated: ID accuracy after EK-FAC with keep 0.99"
SAME = "correlation of the tracing maps, memorized against end, and its 95 % bootstrap interval; n: prompts"
LOWEST = "hop1", "hop2", "true", "visible", "circuits.ood.end.visible", "new->old", "old->new"
same = lambda *keys: dict(zip(keys, keys))
TABLES = {                                                   # of a stage: places in a result, words, {share: column}
    "edits": ("edits", ("site", "pass", "method", "target"), SHARES, COLUMNS),
    "neighbours": ("edits", ("site", "pass", "method", "target"), {"same_subject_moved": "head",
                   "same_relation_moved": "relation", "facts_per_row": "on row", "overlap_hop2": "cosine"}, NEIGHBOURS),
    "when": ("when.written", ("pass", "acts"), HOPS, WRITTEN),
    "held": ("when.held", ("after",), {k + e: e[1:] or x for k, x in HOPS.items() for e in ("", "_random")}, HELD),
    "scores": ("mass.table", ("at",), same("strength", "1", "10", "100", "316", "1000", "3162", "10000"), SCORES),
    "mass": ("mass.sweep mass.edits mass.layers", ("of", "method", "target", "n", "strength", "blocks"), RATES | {
             "score": "score", "condition": "cond", "residual_left": "left", "residual_predicted": "pred",
             "largest_cosine": "cos", "relative_norm": "norm", "seconds": "s"}, MASS_COLUMNS),
    "ablation": ("ablate.entries ablate.sweep", ("method", "matched"), REMAINING, ABLATED),
    "retention": ("ablate.tasks", ("at", "paper"), same("before", "after", "kept"), RETENTION),
    "bands": ("ablate.bands", ("at",), same(*"12345678", "norm"), BANDS),
    "relearning": ("ablate.relearning.ablated ablate.relearning.fresh", ("of", "step"), REMAINING, RELEARNED),
    "vision": ("ablate.vision", ("method", "matched"), same("memorized", "true", "validation"), VISION),
    "paths": ("circuits.id circuits.ood", ("of", "at"), same(*PATH_KEYS), PATHS),
    "same": ("circuits.same", ("at",), same("n", "r", "low", "high"), SAME),
    "worth": ("circuits.worth", ("at",), same("step") | {"id": "ID", "ood": "OOD"} | HOPS | same("ablated"), WORTH),
    "transfer": ("transfer", ("from",), same("new->old", "old->new", "new->new") | {
                 "ood": "OOD", "one_hop": "facts", "step_facts": "at"}, TRANSFER),
    "regimes": (".", ("config.data.regime", "config.data.augment", "config.data.train_fraction"), {
        "step_train": "train at", "step_id": "ID at", "step_ood": "OOD at", "accuracy.ood": "OOD",
        "circuits.ood.end.bridge": "bridge", "circuits.ood.end.visible": "visible", "circuits.fake": "fake"}, REGIMES)}

def report(folders: list[Path]) -> list[list[dict]]:
    """Tables out of many runs, wherever they were computed: accuracy, all edits, hop 2 between the cells."""
    groups = read_runs(folders)
    rows = [("arch", "runs", "1-hop", "train", "ID", "OOD (lowest)", "paths", "first", "second", "grokked at", "s")]
    for runs in groups:
        share = lambda split: mean([r["accuracy"][split] for r in runs], lowest=split == "ood")
        rows.append((runs[0]["name"], len(runs), *map(share, ANSWERS), sum(r["n_paths"]["ood"] for r in runs), *map(
            share, SPLITS[3:]), *(mean([r[key] for r in runs], ".0f") for key in ("grokked_at", "seconds"))))
    print(f"\n{table(rows)}\n{ACCURACY}")
    summary(" ".join(TABLES), groups)
    shared = {}                                              # {arch: (hop 1, hop 2), of each seed of its largest group}
    for group in groups:
        edits = [r["edit"] for r in group if r["edit"].get("hop2_shared") is not None]
        if len(edits) > len(shared.get(group[0]["arch"], [[]])[0]):
            shared[group[0]["arch"]] = [[e[f"hop{hop}_shared"] for e in edits] for hop in (1, 2)]
    if len(shared) > 1:
        rows = [("arch", "hop 1, seed by seed", "hop 2, seed by seed", *(f"p v {arch}" for arch in shared))]
        for arch, (hop1, hop2) in shared.items():
            p = ("" if arch == other else cell(mann_whitney(hop2, y)) for other, (_, y) in shared.items())
            rows.append((arch, " ".join(map(cell, hop1)), " ".join(map(cell, hop2)), *p))
        print(f"\n{table(rows)}\n{SHARED}")
    runs, stages = sum(groups, []), "edits locate when mass ablate circuits transfer".split()
    absent = [f"{key} {n}" for key in stages if (n := sum(key not in r for r in runs))]
    print(f"\nnot run, of {len(runs)} runs: {', '.join(absent) or 'nothing'}")
    return groups

def mann_whitney(x, y) -> float:
    """Exact two-sided p of the rank sum of x among x and y: mid-ranks for ties, all divisions counted."""
    both, ways = [*x, *y], Counter({(0, 0.0): 1})            # {(m, sum): choices of m values whose ranks have this sum}
    rank = {v: sum(w < v for w in both) + (both.count(v) + 1) / 2 for v in both}
    for v in both:
        ways += Counter({(m + 1, total + rank[v]): n for (m, total), n in ways.items() if m < len(x)})
    expected, found = len(x) * (len(both) + 1) / 2, sum(rank[v] for v in x)
    far = sum(n for (m, total), n in ways.items() if m == len(x) and abs(total - expected) >= abs(found - expected))
    return far / math.comb(len(both), len(x))

def progress(record: dict, steps: int) -> str:
    """One line per evaluation."""
    shares = "  ".join(f"{label} {cell(record[name]):^5}" for name, label in LABELS.items())
    left = record["seconds"] / record["step"] * (steps - record["step"])
    return (f"step {record['step']:>{len(str(steps))}}/{steps}  loss {record['loss']:.3f}  {shares}  "
            f"{record['seconds']:4.0f} s, {left:3.0f} s to go")

def curve(history: list[dict]) -> str:
    """Accuracy against steps, one character for each of at most 60 evaluations: tenths, # is 0.99 and above."""
    history = history[::-1][::(len(history) + 59) // 60][::-1]
    mark = lambda share: " " if share is None else "#" if share >= 0.99 else str(int(10 * share))
    lines = [f"{LABELS[name]:>5} |{''.join(mark(r[name]) for r in history)}|" for name in ANSWERS
             if history[-1][name] is not None]
    first, last = history[0]["step"], history[-1]["step"]
    return "\n".join(lines) + f"  accuracy in tenths (#: 0.99 and above), steps {first} to {last}"

# --- Files, machine, command line -------------------------------------------------------------------------------------
def write_atomically(path: Path, content):
    """bytes, a dict as JSON, or what a function writes: at `path` is the old file or the new one, never half of it."""
    part = path.with_name(path.name + ".part")
    content = json.dumps(content, indent=1, allow_nan=False).encode() if isinstance(content, dict) else content
    with open(part, "wb") as file:
        content(file) if callable(content) else file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)

def differences(found: dict, asked: dict) -> list[str]:
    """Settings found on disk that are not those asked for; of the triples the content counts, not the place."""
    flat = lambda d: {(f"{key}." if deep else key) + deep: x for key, value in d.items()
                      for deep, x in (flat(value) if isinstance(value, dict) else {"": value}).items()}
    found, asked = flat(found), flat(asked)                  # what an older run lacks is off
    return [f"{key} ({json.dumps(found.get(key))} there, {json.dumps(asked.get(key))} asked)" for key in asked | found
            if (found.get(key) or 0) != (asked.get(key) or 0) and not key.endswith("triples")]

def peak_memory_mib(device: torch.device) -> int:
    """Peak of the process, or of CUDA's allocations where the model lives there (and on Windows: 0 without CUDA)."""
    if device.type == "cuda" or sys.platform == "win32":
        return torch.cuda.max_memory_allocated() >> 20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)

def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

STAGES = {"edit": edit_stage, "edit_fact": edit_fact_stage, "locate": locate_stage, "when": when_stage,
          "mass_edit": mass_edit_stage, "ablate": ablate_stage, "circuits": circuits_stage, "transfer": transfer_stage}
QUICK = dict.fromkeys(set(STAGES) - {"edit_fact"}, True) | dict(arch="all", entities=12, relations=6, d_model=32,
    d_ff=128, ff_top_k=8, slots=128, top_k=8, depth=2, steps=150, eval_every=50, batch=64, warmup=20, n_edits=8,
    label_noise=0.1, arithmetic=1, zipf=1.0, open_book=8, memorize=20, images=50, transfer_steps=20)
MASS = dict(entities=1000, relations=20, aliases=True, ood_fraction=0.0, branches=0, d_model=128, slots=2048, d_ff=2048,
    depth=2, batch=2048, steps=300, eval_every=25, warmup=50, momentum=0.95, label_smoothing=0.1, weight_decay=0.3)
ABLATE = dict(entities=30, label_noise=0.1, arithmetic=4, zipf=1.0, open_book=64, steps=2400, memorize=1200,
    eval_every=50)
FLAGS = {"resume": "go on with an unfinished run", "retrain": "train again, replacing what the folder holds",
         "compile": "torch.compile the step's forward pass", "aliases": "train every relation under two tokens",
         "plot": "draw the runs as SVG files in --out or beside them", "bench": "time everything and how it grows",
         "quick": "everything at toy size", "feed_forward": "keep private feed-forwards beside the memory"}
VALUES = {"seed": (0, "first seed: graph, split, weights and batches follow from it"), "seeds": (1, "number of seeds"),
          "n_edits": (64, "number of facts for --edit"), "transfer_steps": (600, "steps of --transfer from each start"),
          "edit_batch": (1024, "targets sought at a time"), "images": (3000, "training images of --ablate, 0: none"),
          "entities": (50, "of the synthetic graph"), "relations": (20, "of the synthetic graph"),
          "ood_fraction": (0.1, "of facts: in no trained composition"), "train_fraction": (0.8, "of ID paths: trained"),
          "augment": (0.0, "of the compositions of --regime: trained")}

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("minedit.py", description=__doc__.split("\n\n")[1], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"minedit: {message}; see --help\n")
    add = lambda name, **options: parser.add_argument("--" + name.replace("_", "-"), **options)
    add("arch", choices=[*ARCHS, "all"], default="lmc", help="architecture")
    add("device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("out", type=Path, help="run folder, of several runs its parent; None: runs/<arch>-seed<k>")
    add("report", type=Path, metavar="DIR", help="print the tables of all runs below DIR and stop")
    add("triples", type=Path, metavar="FILE.tsv", help="your own graph: head <tab> relation <tab> tail per line")
    add("edit-fact", nargs=3, action="append", metavar=("HEAD", "RELATION", "NEW_TAIL"), help="stage: edit this fact")
    add("out-degree", type=int, help="facts per entity of the synthetic graph, None: one per relation")
    add("regime", choices=list(kg.REGIMES), default="natural", help="where training composes OOD facts with ID ones")
    stages = {name: "stage: " + stage.__doc__.split("\n")[0] for name, stage in STAGES.items() if name != "edit_fact"}
    for name, text in (stages | FLAGS).items():
        add(name, action="store_true", help=text)
    for name, (default, text) in VALUES.items():
        add(name, type=type(default), default=default, help=text)
    for field in (*fields(Config), *fields(Recipe)):
        if field.metadata:
            add(field.name, type=field.type, default=field.default, **field.metadata)
    return parser

def prepare(args) -> list[Run]:
    """All runs that were asked for, each checked against its folder; UserError before anything is trained."""
    devices = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    for wrong, message in (
            *((getattr(args, name) < 1, f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
              for name in ("seeds", "n_edits", "edit_batch")),
            (args.device not in ("auto", *devices), f"--device {args.device}: none here; use --device auto or cpu"),
            (not 0 <= args.seed < 2**60, f"--seed must be in 0..2^60, got {args.seed}"),
            (args.resume and args.retrain, "--resume goes on with a run and --retrain replaces it; give one of them"),
            (args.circuits and not args.branches, "--circuits looks at compositions; give --branches more than 0"),
            (args.ablate and 0 in (args.label_noise, args.branches), "--ablate needs --label-noise, --branches > 0"),
            (args.triples and any((args.entities, args.relations, args.out_degree, args.arithmetic, args.bench)),
             "--entities, --relations, --out-degree, --arithmetic, --bench: for synthetic graphs, not with --triples"),
            ((args.regime == "natural") != (args.augment == 0), f"--augment {args.augment:g} with --regime "
             f"{args.regime}: a share above 0 is for the regimes other than natural, which need one")):
        if wrong:
            raise UserError(message)
    args.device = torch.device(devices[0] if args.device == "auto" else args.device)
    graph, names = None, ["ood_fraction", "train_fraction"] + ["regime", "augment"] * bool(args.augment)
    data = {name: getattr(args, name) for name in names + ["entities", "relations", "out_degree"] * (not args.triples)}
    if args.triples:
        graph = kg.from_triples(args.triples)
        data |= {"triples": str(args.triples), "sha256": hashlib.sha256(args.triples.read_bytes()).hexdigest()}
        print(f"{args.triples}: {int((graph.facts >= 0).sum())} facts, {graph.n_entities} entities, "
              f"{graph.n_relations} relations" + "".join(f"; {note}" for note in graph.notes))
    archs, seeds = ARCHS if args.arch == "all" else [args.arch], range(args.seed, args.seed + args.seeds)
    parent, alone = args.out or Path("runs/quick" if args.quick else "runs"), args.out and len(archs) * args.seeds == 1
    return [Run(args, arch, seed, args.out if alone else parent / f"{arch}-seed{seed}", graph, data)
            for arch in archs for seed in seeds]

def main(argv: list[str] | None = None) -> int:
    parser, run = build_parser(), None
    args = parser.parse_args(argv)
    quick = QUICK | {"retrain": args.out is None and not args.resume}
    defaults = quick if args.quick else MASS if args.mass_edit else ABLATE if args.ablate else {}
    parser.set_defaults(**defaults | ({"entities": None, "relations": None, "arithmetic": 0} if args.triples else {}))
    args = parser.parse_args(argv)
    try:
        if args.plot and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot: matplotlib is not installed; pip install matplotlib, or leave --plot out")
        try:
            if args.bench:
                bench(args, args.out or Path("runs"))
            runs = [] if args.report or args.bench else prepare(args)
        except (ValueError, MemoryError, RuntimeError) as error:                 # of kg.py, models.py; too large
            raise UserError(str(error).split("\n")[0] or "not enough memory for these sizes") from None
        for seed in dict.fromkeys(run.seed for run in runs):
            models, shared = {}, None
            for run in (run for run in runs if run.seed == seed):
                print(f"\n{run.arch}, seed {run.seed}, on {device_name(run.device)}, in {run.folder}: "
                      f"{count_parameters(run.config):,} parameters, {flops_per_path(run.config):,} FLOPs per path; "
                      f"{len(run.paths.facts)} facts, paths: {listed(run.n_paths)}"
                      + f"\nloaded: trained for {run.step} steps before (--retrain trains again)" * run.finished)
                models[run] = run.train()
                run.summarize()
                if args.edit and args.arch == "all":
                    right = run.known(models[run])[2:4]
                    shared = [mine & others for mine, others in zip(right, shared or right)]
            for (run, model), (name, stage) in itertools.product(models.items(), STAGES.items()):
                if getattr(args, name):
                    print(f"\n{run.arch}, seed {run.seed}:" * (len(models) > 1), end="")
                    run.shared, began = shared, time.perf_counter()
                    stage(run, model)
                    seconds = run.results[f"{name}_seconds"] = round(time.perf_counter() - began, 2)
                    run.results["peak_memory_mib"] = max(run.results["peak_memory_mib"], peak_memory_mib(run.device))
                    write_atomically(run.folder / "results.json", run.results)
                    print(f"{seconds:.0f} s for --{name.replace('_', '-')}")
        folders = [args.report] if args.report else [run.folder for run in runs]
        groups = report(folders) if args.report or len(runs) > 1 else []
        if args.report:
            claims(groups)
        if args.plot and folders:
            plot(folders, args.out or args.report or folders[0].parent)
        return 0
    except KeyboardInterrupt:
        resume = f"; --resume goes on from the last evaluation of {run.folder}" if run else ""
        message, status = "interrupted" + resume, 130
    except OSError as error:
        message, status = f"{error.filename}: {error.strerror}" if error.filename else error, 2
    except UserError as error:
        message, status = (*error.args, 2)[:2]
    print(f"minedit: {message}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
