"""How fast is it, and against what?

In one run, taking turns, so that what disturbs one disturbs all: milliseconds of a training step,
paths per second, the same step in plainer formulations, the share of the FLOP/s that torch's own
products reach here, and how fast evaluation, edits and K-FAC factors are.

    plain    exact top-k and no fused operation, as one would write it first
    rows     and every path a row of its own, in which its fact is computed anew (with --branches 2
             and more; with one path a fact it would be plain)
    gpt2     the same task, sizes and batch through Hugging Face transformers' GPT-2, randomly
             initialised, AdamW (only where transformers is installed)

    python -m studies.bench --out runs/bench                  # 3 minutes on two cores
    python -m studies.bench --device cuda --out results       # and gpu.json, see studies/gpu.py

Writes bench.json. "edits" are MEMIT of 100 random keys with C and the solve, without targets.
"""

import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import curvature
import edit as editing
import minedit
import models
from minedit import Run
from models import ARCHS, stores


def plain_address(scores: Tensor, top_k: int, addressing: str) -> Tensor:
    """models.address with addressing "topk", as one would write it first."""
    if not top_k:
        return scores.relu().square()
    least = scores.topk(top_k).values[..., -1:]
    return scores.relu().square() * (scores >= least)


@contextmanager
def plain_formulation():
    """Inside, every store is addressed by `plain_address`."""
    fast = models.address
    models.address = plain_address
    try:
        yield
    finally:
        models.address = fast


class Rows(minedit.Batches):
    """Batches in which every path is a row of its own."""

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        tokens, positions, answers = super().draw()
        own_tokens, own_answers = [], []
        for i in range(self.recipe.branches):
            own_tokens.append(tokens[:, [0, 1, 2 + i]])
            own_answers.append(answers[:, [0, 1 + i]])
        return torch.cat(own_tokens), positions[:3], torch.cat(own_answers)


# --- Timing ---------------------------------------------------------------------------------------


def in_turns(tasks: dict[str, Callable], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each task in each round, after one round that does not count."""
    seconds = {name: [] for name in tasks}
    for i in range(rounds + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def stepper(run: Run, make_batches=minedit.Batches) -> Callable:
    """One step of training of a run, from its first weights."""
    training = run.fresh()
    batches = make_batches(run.paths, run.recipe, training.generator)
    return lambda: training.step(batches, run.recipe, 0)


def plainly(step: Callable) -> Callable:
    """The step under the plain formulation."""

    def task():
        with plain_formulation():
            step()

    return task


def gpt2_stepper(run: Run) -> Callable | None:
    """A step of the same batch, every path a row, through transformers' GPT-2 with as many layers,
    heads and units as passes, heads and units of the run; None without transformers."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    config = run.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.n_entities + config.n_relations,
            n_positions=8,
            n_embd=config.d_model,
            n_layer=config.n_calls,
            n_head=config.n_heads,
            n_inner=config.d_ff,
            resid_pdrop=0.0,  # as in the run
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).to(run.device)
    optimizer = torch.optim.AdamW(gpt2.parameters(), lr=1e-3)
    batches = Rows(run.paths, run.recipe, torch.Generator(run.device).manual_seed(0))

    def step():
        loss = batches.loss(lambda tokens, _: gpt2(tokens).logits, run.recipe)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Other(NamedTuple):
    """Tasks beside the training step, and the units that one call does."""

    task: Callable
    units: int


def other_tasks(run: Run) -> dict[str, Other]:
    """Evaluation (answers), edits and factors (tokens) of a run's first weights."""
    model, paths = run.fresh().model, run.paths
    name = stores(run.config)[0].module
    W = model.get_submodule(name).weight
    generator = torch.Generator(run.device).manual_seed(0)
    sizes = {"generator": generator, "device": run.device}
    K = torch.randn(100, W.shape[1], **sizes)
    R = torch.randn(100, W.shape[0], **sizes)
    X = torch.randn(2 * W.shape[1], W.shape[1], **sizes)
    gold = paths.facts[:, 2:].expand(-1, 2)
    batches = [(paths.queries, gold)]

    def evaluate():
        minedit.accuracy(model, paths)

    def edit():
        editing.memit_update(K, R, editing.second_moment(X), 1.0)

    def factorize():
        curvature.kronecker_factors(model, batches, F.cross_entropy, [name])

    return {
        "answers": Other(evaluate, len(paths.facts) + len(paths.first)),
        "edits": Other(edit, len(K)),
        "tokens": Other(factorize, paths.queries.numel()),
    }


def peak_rates(run: Run) -> dict[str, float]:
    """FLOP/s of torch's products: of the shape of the store's keys, and of a 1024 square."""
    X = torch.randn(1024, 1024, device=run.device)
    d, n = min(run.config.d_model, 1024), min(run.config.slots, 1024)
    tasks = {"shape": lambda: X[:, :d] @ X[:d, :n], "square": lambda: X @ X}
    seconds = in_turns(tasks, 50)
    flops = {"shape": 2 * 1024 * d * n, "square": 2 * 1024**3}
    return {name: flops[name] / statistics.median(seconds[name]) for name in tasks}


class Cell(NamedTuple):
    """The figures of one cell; ratios are (median, least, most) times as long as a step."""

    arch: str
    ms: float
    paths_per_second: float
    plain: tuple[float, float, float]
    rows: tuple[float, float, float] | None
    gpt2: tuple[float, float, float] | None
    of_shape: float  # share of the achievable FLOP/s
    of_square: float
    answers_per_second: float
    edits_per_second: float
    tokens_per_second: float


def measure(run: Run, plain_run: Run, peak: dict[str, float]) -> Cell:
    """`plain_run`: the same with addressing "topk"."""
    tasks = {"step": stepper(run)}
    tasks["plain"] = plainly(stepper(plain_run))
    if run.recipe.branches > 1:
        tasks["rows"] = plainly(stepper(plain_run, Rows))
    gpt2 = gpt2_stepper(run)
    if gpt2 is not None:
        tasks["gpt2"] = gpt2
    others = other_tasks(run)
    tasks |= {name: other.task for name, other in others.items()}
    seconds = in_turns(tasks)
    with FlopCounterMode(display=False) as counter:
        tasks["step"]()
    step = statistics.median(seconds["step"])
    rate = counter.get_total_flops() / step
    ratios = {}
    for name in ("plain", "rows", "gpt2"):
        if name in seconds:
            ratios[name] = ratio(seconds[name], seconds["step"])
    n_paths = run.recipe.batch * run.recipe.branches
    speeds = [others[name].units / statistics.median(seconds[name]) for name in others]
    return Cell(
        run.arch,
        1000 * step,
        n_paths / step,
        ratios["plain"],
        ratios.get("rows"),
        ratios.get("gpt2"),
        rate / peak["shape"],
        rate / peak["square"],
        *speeds,
    )


def ratio(seconds: list[float], of: list[float]) -> tuple[float, float, float]:
    """Median, least and most of the quotients, round by round."""
    quotients = [x / y for x, y in zip(seconds, of)]
    return statistics.median(quotients), min(quotients), max(quotients)


def by_threads(run: Run) -> dict[int, float]:
    """Milliseconds of a step with one thread, and with all."""
    n_threads, step = torch.get_num_threads(), stepper(run)
    found = {}
    try:
        for n in sorted({1, n_threads}):
            torch.set_num_threads(n)
            found[n] = 1000 * statistics.median(in_turns({"step": step})["step"])
    finally:
        torch.set_num_threads(n_threads)
    return found


def cells_table(cells: list[Cell]) -> str:
    head = ("arch", "ms", "paths/s", "plain", "rows", "gpt2", "shape", "square")
    rows = [(*head, "answers/s", "edits/s", "tokens/s")]
    for c in cells:
        row = [c.arch, f"{c.ms:.1f}", f"{c.paths_per_second:.0f}"]
        for times in (c.plain, c.rows, c.gpt2):
            row.append("-" if times is None else "{:.2f} ({:.2f}-{:.2f})".format(*times))
        row += [f"{c.of_shape:.2f}", f"{c.of_square:.2f}"]
        speeds = (c.answers_per_second, c.edits_per_second, c.tokens_per_second)
        rows.append((*row, *(f"{speed:.0f}" for speed in speeds)))
    return minedit.table(rows) + (
        "\nms: a step. plain, rows, gpt2: times as long as it (least-most of five rounds)"
        "\nshape, square: share of torch's own FLOP/s in products of that shape, of a 1024 square"
        "\nanswers: evaluation; edits: MEMIT of random keys; tokens: K-FAC factors of one store"
    )


# --- Command line ---------------------------------------------------------------------------------


def make_run(args, arch: str, **changes) -> Run:
    """A run of the training options, in a scratch folder."""
    asked = vars(args) | {"arch": arch, "seeds": 1, "out": Path(tempfile.mkdtemp())} | changes
    return minedit.prepare(type(args)(**asked))[0]


def command(args):
    minedit.require(not args.triples, "--triples: the bench times synthetic graphs")
    minedit.require(args.branches > 0, "--branches must be above 0: the bench times compositions")
    out = args.out or Path("runs/bench")
    out.mkdir(parents=True, exist_ok=True)
    runs = {arch: make_run(args, arch) for arch in ARCHS}
    peak = peak_rates(runs["lmc"])
    cells = []
    for arch, run in runs.items():
        cells.append(measure(run, make_run(args, arch, addressing="topk"), peak))
    print(cells_table(cells))
    if cells[0].gpt2 is None:
        print("gpt2: not timed, transformers is not installed (pip install transformers)")
    threads = by_threads(runs["lmc"])
    for n_threads, ms in threads.items():
        print(f"{n_threads} threads: {ms:.1f} ms a step (lmc)")
    device = runs["lmc"].device
    peak_mib = minedit.peak_memory_mib(device)
    print(f"{peak_mib} MiB at most, on {minedit.device_name(device)}")
    results = {
        "torch": torch.__version__,
        "device": minedit.device_name(device),
        "peak_flops": peak,
        "peak_memory_mib": peak_mib,
        "cells": [cell._asdict() for cell in cells],
        "threads": threads,
    }
    minedit.write_atomically(out / "bench.json", json.loads(json.dumps(results)))
    if device.type == "cuda":
        from studies import gpu

        gpu.check(args, out / "gpu.json")


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.bench", __doc__.split("\n\n")[0])
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
