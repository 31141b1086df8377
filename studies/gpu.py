"""What a GPU makes of it: one check of a few minutes that writes gpu.json, part by part.

    grok      seconds and steps until OOD >= 0.9, LMC from nothing, evaluations included
    step      ms of a training step: eager, torch.compile, and as a CUDA graph
    seeds     loss and gradient of five seeds, one after another and as one model (torch.func)
    memit     10 000 edits in one update: C, solve, check; random keys of the mass-edit size
    kfac      factors, eigenbases and EK-FAC masses of all layers of the LMC

    python -m studies.gpu --device cuda --out results        # under eight minutes
    python -m studies.gpu --quick --device cpu --out /tmp/x  # what of it a CPU can do

A part that fails is recorded with its error; the others go on.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature
import edit as editing
import minedit
from minedit import Run
from studies.bench import in_turns, make_run, plain_formulation


def synchronized(device: torch.device) -> float:
    """The time, when the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_ms(task, device: torch.device, n: int = 50) -> float:
    """Of n calls one after another, after five that do not count."""
    for _ in range(5):
        task()
    seconds = []
    for _ in range(n):
        began = synchronized(device)
        task()
        seconds.append(synchronized(device) - began)
    return round(1000 * statistics.median(seconds), 3)


def grok(run: Run, every: int = 50) -> dict:
    """Train until train >= 0.99 and OOD >= 0.9, or to the end of the budget."""
    training = run.fresh()
    batches = run.make_batches(run.paths, run.recipe, training.generator)
    curve, grokked, began = [], False, synchronized(run.device)
    for step in range(run.recipe.steps):
        training.step(batches, run.recipe, step)
        if (step + 1) % every == 0:
            found = minedit.accuracy(training.average, run.paths)
            seconds = round(synchronized(run.device) - began, 2)
            curve.append({"step": step + 1, "seconds": seconds, **found})
            grokked = found["train"] >= 0.99 and (found["ood"] or 0) >= 0.9
            if grokked:
                break
    return {"grokked": grokked, "last": curve[-1], "curve": curve}


def captured_step(run: Run):
    """A whole step as a CUDA graph: forward, backward, both optimizers, the average. The batch is
    drawn outside and copied in; rates are those after the warm-up."""
    training, recipe = run.fresh(), run.recipe
    training.adam = torch.optim.AdamW(
        [training.model.embedding.weight],
        lr=recipe.lr,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        capturable=True,
    )
    training.muon.param_groups[0].update(lr=recipe.muon_lr, weight_decay=recipe.weight_decay)
    batches = run.make_batches(run.paths, recipe, training.generator)
    tokens, positions, answers = batches.draw()

    def step():
        training.adam.zero_grad(set_to_none=True)
        training.muon.zero_grad(set_to_none=True)
        loss = minedit.loss_of(training.model(tokens, positions), answers, recipe)
        loss.backward()
        training.adam.step()
        training.muon.step()
        with torch.no_grad():
            for mean, p in zip(training.average.parameters(), training.model.parameters()):
                mean.lerp_(p, 1 - recipe.ema)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay():
        new_tokens, _, new_answers = batches.draw()
        tokens.copy_(new_tokens)
        answers.copy_(new_answers)
        graph.replay()

    return replay


def eager_step(run: Run, compiled: str | None = None):
    """A step of training; `compiled`: the mode of torch.compile for its forward pass."""
    training = run.fresh()
    batches = run.make_batches(run.paths, run.recipe, training.generator)
    forward = training.model
    if compiled is not None:
        forward = torch.compile(training.model, mode=compiled)
    return lambda: training.step(batches, run.recipe, run.recipe.warmup, forward)


def step_times(run: Run) -> dict:
    found = {"eager": median_ms(eager_step(run), run.device)}
    if run.device.type != "cuda":
        return found | {"skipped": "torch.compile and CUDA graphs are timed on a GPU alone"}
    found["cuda_graph"] = median_ms(captured_step(run), run.device)
    for mode in ("default", "reduce-overhead"):
        began = time.perf_counter()
        task = eager_step(run, mode)
        found[f"compile_{mode}"] = median_ms(task, run.device)
        found[f"compile_{mode}_seconds"] = round(time.perf_counter() - began, 1)
    return found


def seeds_batched(run: Run, n_seeds: int = 5) -> dict:
    """ms of loss and gradient of n seeds. The stores are addressed as written plainly, with exact
    top-k, since vmap has no rule for the fused squaring."""
    models = [minedit.Model(run.config, torch.Generator().manual_seed(i)) for i in range(n_seeds)]
    models = [model.to(run.device) for model in models]
    batches = run.make_batches(run.paths, run.recipe, torch.Generator(run.device).manual_seed(0))
    tokens, positions, answers = batches.draw()
    parameters, buffers = torch.func.stack_module_state(models)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        inputs = (tokens, positions)
        logits = torch.func.functional_call(models[0], (parameters, buffers), inputs)
        return minedit.loss_of(logits, answers, run.recipe)

    gradient = torch.func.vmap(torch.func.grad(loss))

    def together():
        gradient(parameters, buffers)

    def one(model: nn.Module):
        value = minedit.loss_of(model(tokens, positions), answers, run.recipe)
        torch.autograd.grad(value, list(model.parameters()))

    def in_sequence():
        for model in models:
            one(model)

    with plain_formulation():
        return {
            "one": median_ms(lambda: one(models[0]), run.device, 20),
            "in_sequence": median_ms(in_sequence, run.device, 20),
            "together": median_ms(together, run.device, 20),
            "seeds": n_seeds,
        }


def memit(run: Run, n: int, d_in: int, d_out: int) -> dict:
    """Seconds of n edits of random keys, C of as many ordinary ones included."""
    generator = torch.Generator(run.device).manual_seed(0)
    sizes = {"generator": generator, "device": run.device}
    K, X = torch.randn(n, d_in, **sizes), torch.randn(2 * d_in, d_in, **sizes)
    R = torch.randn(n, d_out, **sizes)
    tasks = {
        "second_moment": lambda: editing.second_moment(X),
        "update": lambda: editing.memit_update(K, R, editing.second_moment(X), 300.0),
    }
    seconds = in_turns(tasks, 3)
    return {"n": n, "d_in": d_in} | {k: round(statistics.median(s), 3) for k, s in seconds.items()}


def kfac(run: Run) -> dict:
    """Seconds of factors, eigenbases and EK-FAC masses, over the batches of 25 steps."""
    model = run.fresh().model
    batches = run.make_batches(run.paths, run.recipe, run.stream(run.device)).mixture(25)
    names = minedit.linear_layers(model)
    seconds = []
    for _ in range(3):
        began = synchronized(run.device)
        curvature.spectrum(model, batches, F.cross_entropy, names, lambda: run.stream(run.device))
        seconds.append(synchronized(run.device) - began)
    return {"layers": len(names), "seconds": round(statistics.median(seconds), 3)}


def check(args, file: Path):
    """All parts, each written as soon as it is done."""
    run = make_run(args, "lmc")
    n, d_in, d_out = (200, 64, 16) if args.quick else (10_000, 2048, 128)
    results = {
        "device": minedit.device_name(run.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "model": vars(run.config),
        "recipe": vars(run.recipe),
    }
    parts = {
        "memit": lambda: memit(run, n, d_in, d_out),
        "kfac": lambda: kfac(run),
        "grok": lambda: grok(run),
        "seeds": lambda: seeds_batched(run),
        "step": lambda: step_times(run),
    }
    for name, part in parts.items():
        began = time.perf_counter()
        try:
            results[name] = part()
        except Exception as error:  # recorded, and the rest goes on
            results[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        results[f"{name}_seconds"] = round(time.perf_counter() - began, 1)
        results["peak_memory_mib"] = minedit.peak_memory_mib(run.device)
        minedit.write_atomically(file, results)
        shown = {key: value for key, value in results[name].items() if key != "curve"}
        print(f"{name} ({results[f'{name}_seconds']} s): {shown}", flush=True)


def command(args):
    out = args.out or Path("runs/gpu")
    out.mkdir(parents=True, exist_ok=True)
    check(args, out / "gpu.json")


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.gpu", __doc__.split("\n\n")[0])
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
