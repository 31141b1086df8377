"""What a GPU makes of it: one check of a few minutes that writes gpu.json, part by part.

    grok      seconds and steps until OOD >= 0.9, LMC from nothing, evaluations included: eager, and
              with the step as a CUDA graph, of one seed and of five side by side
    step      ms of a training step: eager, torch.compile, and as a CUDA graph
    seeds     loss and gradient of five seeds, one after another and as one model (torch.func)
    memit     10 000 edits in one update: C, solve, check; random keys of 2048 dimensions
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
from torch import Tensor, nn

import edit as editing
import minedit
from minedit import Run, Training
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


class GraphedTraining:
    """minedit.Training whose whole step (forward, backward, both optimizers, the average) is one
    CUDA graph, replayed on a stream of its own: one launch where there were a thousand. The batch
    is drawn outside and copied in; rates and the weight of the average are tensors, set before each
    replay. The arithmetic is that of Training.step."""

    def __init__(self, run: Run, seed: int):
        self.run, recipe = run, run.recipe
        self.training = Training(run.config, recipe, seed, run.device)
        self.stream = torch.cuda.Stream()
        self.scalars = torch.zeros(3, device=run.device)  # rate of AdamW, of Muon; 1 - keep
        model = self.training.model
        self.adam = torch.optim.AdamW(
            [model.embedding.weight],
            lr=self.scalars[0],
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
            capturable=True,
        )
        self.hidden = self.training.muon.param_groups[0]["params"]
        self.momenta = [torch.zeros_like(p) for p in self.hidden]
        self.batches = run.make_batches(run.paths, recipe, self.training.generator)
        self.tokens, self.positions, self.answers = self.batches.draw()
        self.loss = None
        start = {name: p.clone() for name, p in model.state_dict().items()}
        with torch.cuda.stream(self.stream):
            for _ in range(3):  # allocates what the graph is to reuse; all rates are 0
                self.compute()
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.compute()
        self.restart(seed, start)

    def restart(self, seed: int, weights: dict[str, Tensor]):
        """Step 0 again: the warm-up has moved moments and the stream of batches."""
        self.training.model.load_state_dict(weights)
        self.training.average.load_state_dict(weights)
        for m in self.momenta:
            m.zero_()
        for state in self.adam.state.values():
            for value in state.values():
                value.zero_()
        self.training.generator.manual_seed(4 * seed + 3)

    def compute(self):
        """What the graph holds."""
        recipe, model = self.run.recipe, self.training.model
        model.zero_grad(set_to_none=True)
        self.loss = minedit.loss_of(model(self.tokens, self.positions), self.answers, recipe)
        self.loss.backward()
        self.adam.step()
        with torch.no_grad():
            for p, m in zip(self.hidden, self.momenta):
                m.lerp_(p.grad, 1 - recipe.momentum)
                update = minedit.equal_rows(minedit.orthogonalize(p.grad.lerp(m, recipe.momentum)))
                p.mul_(1 - self.scalars[1] * recipe.weight_decay)
                p.sub_(update * self.scalars[1] * max(1, p.shape[0] / p.shape[1]) ** 0.5)
            for mean, p in zip(self.training.average.parameters(), model.parameters()):
                mean.lerp_(p, self.scalars[2])

    def step(self, step: int):
        """Step number `step`, queued on the stream."""
        recipe = self.run.recipe
        rate = min(1.0, (step + 1) / max(1, recipe.warmup))
        keep = min(recipe.ema, (step + 1) / (step + 10))
        with torch.cuda.stream(self.stream):
            tokens, _, answers = self.batches.draw()
            self.tokens.copy_(tokens)
            self.answers.copy_(answers)
            self.scalars[0].fill_(recipe.lr * rate)
            self.scalars[1].fill_(recipe.muon_lr * rate)
            self.scalars[2].fill_(1 - keep)
            self.graph.replay()


def grok_graphed(run: Run, n_seeds: int, every: int = 50) -> dict:
    """As `grok`, by CUDA graphs, n seeds side by side, each on a stream; to the last one's end."""
    if run.device.type != "cuda":
        return {"skipped": "CUDA graphs need a GPU"}
    began = synchronized(run.device)
    trainings = [GraphedTraining(run, seed) for seed in range(n_seeds)]
    captured = round(synchronized(run.device) - began, 2)
    curve, grokked = [], [False] * n_seeds
    for step in range(run.recipe.steps):
        for graphed in trainings:
            graphed.step(step)
        if (step + 1) % every:
            continue
        torch.cuda.synchronize()
        found = [minedit.accuracy(graphed.training.average, run.paths) for graphed in trainings]
        grokked = [a["train"] >= 0.99 and (a["ood"] or 0) >= 0.9 for a in found]
        seconds = round(synchronized(run.device) - began, 2)
        curve.append({"step": step + 1, "seconds": seconds, "ood": [a["ood"] for a in found]})
        if all(grokked):
            break
    return {"grokked": grokked, "capture_seconds": captured, "last": curve[-1], "curve": curve}


def graphed_step(run: Run):
    """The step of a GraphedTraining, waited for."""
    graphed = GraphedTraining(run, run.seed)

    def task():
        graphed.step(run.recipe.warmup)
        graphed.stream.synchronize()

    return task


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
    found["cuda_graph"] = median_ms(graphed_step(run), run.device)
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
    """Seconds of n edits of random keys, C of 2 d_in ordinary ones included."""
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
        minedit.spectrum_of(run, model, batches, names)
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
        "grok_graphed": lambda: grok_graphed(run, 1),
        "grok_graphed_five_seeds": lambda: grok_graphed(run, 5),
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
