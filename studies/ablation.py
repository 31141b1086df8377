"""Exceptions out of a model by curvature, and what goes with them. After Merullo et al. 2025 [1].

Trains on a richer mixture than the core: a tenth of the trained compositions have a fixed wrong
answer (exceptions), some relations are arithmetic (tail = head + c), facts are drawn with Zipf
frequencies, and open-book prompts hold the fact that they ask for. The last steps are gentle, until
the exceptions are recited. Then the model is ablated by K-FAC, EK-FAC and every control
(studies/controls.py); nothing tells these which paths are exceptions. Only their strengths, one for
each kind of layer, are chosen by paths: by the exceptions and the held-out paths among a fifth of
all paths. The other four fifths, all facts and all open-book prompts are scored. Further:

    tasks        what is kept of each kind of question, beside the paper's figures
    sweep        K-FAC in all linear layers, one share of mass kept for all
    relearning   how soon further training brings back the exceptions that were lost, beside how soon
                 other wrong answers to these questions are learnt from the same weights
    images       a vision transformer with wrong labels (studies/images.py), in Dense's runs

    python -m studies.ablation --arch all --seeds 5 --out runs/ablation    # 10 to 20 minutes a run

Writes "ablation" into results.json.

[1] Merullo et al. 2025, arXiv 2510.24256.
"""

import copy
import itertools
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import curvature
import kg
import minedit
from kg import SPLITS
from minedit import Run, share_of
from models import Model
from studies.controls import Comparison, Outcome, compare, edited, learned_mask, outcome
from studies.controls import search, shares_of
from studies.images import images_stage
from studies.training import further

KEEPS = (0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.87, 0.8, 0.7, 0.5)
LEARNED_KEEPS = (0.99, 0.95)  # share of a layer's weights that a learned mask keeps
FORGET_WEIGHTS = (0.03, 0.1, 0.3)  # of the loss on exceptions against that on the mixture
RELEARNING = (0, 10, 20, 40, 80, 160, 320, 640)  # further steps
REMOVED = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
GROUPS = {  # layers that take one strength, by the ends of their names
    "q+k": ("attention.query", "attention.key"),
    "v+out": ("attention.value", "attention.out"),
    "address": ("up", "memory.query", "keys"),
    "store": ("down", "memory.values"),
}
PAPER = {  # percent of a 7B model's accuracy that is kept [1]
    "recited": "3-16 (recitation)",
    "rare": "22 (company CEO)",
    "frequent": "74-86 (closed book)",
    "arithmetic": "66-74",
    "open_book": "93-99",
    "id": "95-106 (logic)",
    "ood": "95-106 (logic)",
}

# --- The mixture ----------------------------------------------------------------------------------


def arithmetic_graph(graph: kg.KnowledgeGraph, n: int, seed: int) -> kg.KnowledgeGraph:
    """The synthetic graph of a seed with tail = (head + c) mod n_entities in its first n relations,
    each with a c > 0 of its own, wherever it has a fact. ValueError for more relations than such
    c."""
    E = graph.n_entities
    if n >= E:
        raise ValueError(f"--arithmetic must be below the number of entities, {E}, got {n}")
    generator = torch.Generator().manual_seed(2**60 + seed)
    shift = 1 + torch.randperm(E - 1, generator=generator)[:n]
    facts = graph.facts.clone()
    sums = (torch.arange(E)[:, None] + shift) % E  # [n_entities, n]
    facts[:, :n] = torch.where(facts[:, :n] >= 0, sums, -1)
    return replace(graph, facts=facts)


def zipf_weights(n_facts: int, exponent: float, seed: int) -> Tensor:
    """i^-exponent [n_facts] for ranks i = 1, 2, ... in random order."""
    order = torch.randperm(n_facts, generator=torch.Generator().manual_seed(2**61 + seed))
    return (order + 1.0) ** -exponent


def fact_weights(run: Run, exponent: float) -> Tensor:
    """`zipf_weights` of the facts of a run, on its device."""
    return zipf_weights(len(run.paths.facts), exponent, run.seed).to(run.device)


class Mixture(minedit.Batches):
    """Facts drawn in proportion to `weights` [n_facts], with replacement (None: all alike, each
    once at most), and n_open_book prompts (h, r, t', h, r) -> t' beside them, t' any entity."""

    def __init__(
        self,
        paths: kg.Paths,
        recipe: minedit.Recipe,
        generator: torch.Generator,
        weights: Tensor | None = None,
        n_open_book: int = 0,
        n_entities: int = 0,
    ):
        super().__init__(paths, recipe, generator)
        self.weights, self.n_open_book, self.n_entities = weights, n_open_book, n_entities

    def draw_facts(self) -> Tensor:
        if self.weights is None:
            return super().draw_facts()
        n = self.recipe.batch
        return torch.multinomial(self.weights, n, replacement=True, generator=self.generator)

    def integers(self, high: int, n: int) -> Tensor:
        return torch.randint(high, (n,), generator=self.generator, device=self.device)

    def open_book(self, n: int) -> tuple[Tensor, Tensor]:
        """Prompts [n, 5] and their answers [n]: only the prompt says which."""
        query = self.queries[self.integers(len(self.queries), n)]
        told = self.integers(self.n_entities, n)
        return torch.cat([query, told[:, None], query], 1), told

    def loss(self, forward, recipe: minedit.Recipe) -> Tensor:
        loss = super().loss(forward, recipe)
        if not self.n_open_book:
            return loss
        tokens, told = self.open_book(self.n_open_book)
        logits = forward(tokens)[:, -1]
        book = F.cross_entropy(logits, told, label_smoothing=recipe.label_smoothing)
        return loss + book / (recipe.one_hop_weight + 1)  # weighs as much as the compositions do

    def mixture(self, n_steps: int) -> list[tuple[Tensor, Tensor]]:
        found = []
        for _ in range(n_steps):
            found += super().mixture(1)
            if self.n_open_book:
                tokens, told = self.open_book(self.n_open_book)
                found.append((tokens, F.pad(told[:, None], (4, 0), value=-100)))
        return found


def make_task(args, seed: int, graph: kg.KnowledgeGraph | None) -> minedit.Task:
    task = minedit.make_task(args, seed, graph)
    if args.arithmetic:
        graph = arithmetic_graph(task.graph, args.arithmetic, seed)
        task = task._replace(graph=graph, paths=minedit.paths_of(args, graph, seed))
    options = {"arithmetic": args.arithmetic, "zipf": args.zipf, "open_book": args.open_book}
    return task._replace(data=task.data | options)


# --- What is asked --------------------------------------------------------------------------------


class Questions:
    """What a model is asked before and after an ablation: {name: (mask, right answers)}."""

    def __init__(self, run: Run, batches: Mixture, weights: Tensor, n_arithmetic: int):
        paths, exceptions = run.paths, run.paths.masks["exceptions"]
        true, tails = paths.true_two_hop, paths.facts[:, 2]
        self.run = run
        self.prompts, self.told = batches.open_book(500)
        self.paths = {"recited": (exceptions, paths.two_hop), "true": (exceptions, true)}
        for name in SPLITS:
            self.paths[name] = (paths.masks[name] & ~exceptions, true)
        self.scored = ~paths.masks["validation"]
        self.choosing = self.draw_choosing()
        arithmetic = paths.facts[:, 1] < n_arithmetic
        rank = weights.argsort(stable=True).argsort() / len(weights)  # 0: the least frequent
        self.facts = {
            "one_hop": (torch.ones_like(arithmetic), tails),
            "arithmetic": (arithmetic, tails),
            "rare": ((rank < 0.2) & ~arithmetic, tails),
            "frequent": ((rank >= 0.8) & ~arithmetic, tails),
        }
        self.before = None  # what the unedited model answers of the choosing paths

    def draw_choosing(self) -> Tensor:
        """The paths by which strengths are chosen: of those that are not scored at most 150
        exceptions and 150 of each held-out set, at random."""
        rows = []
        for name in ("recited", *SPLITS[1:]):
            mine = (self.paths[name][0] & ~self.scored).nonzero().flatten()
            order = torch.randperm(len(mine), generator=self.run.stream()).to(mine.device)
            rows.append(mine[order[:150]])
        return torch.cat(rows)

    def measure(self, model: Model) -> dict[str, float | None]:
        one_hop, two_hop = minedit.predict(model, self.run.paths)
        found = shares_of(self.paths, two_hop[self.scored], self.scored)
        found |= shares_of(self.facts, one_hop, slice(None))
        book = minedit.last_answers(model, self.prompts) == self.told
        return found | {"open_book": share_of(book)}

    def chosen_by(self, model: Model) -> dict[str, float]:
        answers = minedit.last_answers(model, self.run.paths.tokens[self.choosing])
        found = shares_of(self.paths, answers, self.choosing)
        return {name: share or 0.0 for name, share in found.items()}

    def value(self, model: Model) -> float:
        """true - recited of the choosing paths, less ten times the held-out accuracy that is lost
        against `before`, beyond 0.02."""
        found = self.chosen_by(model)
        held_out = SPLITS[1:]
        lost = sum(max(0.0, self.before[name] - found[name]) for name in held_out) / len(held_out)
        return found["true"] - found["recited"] - 10 * max(0.0, lost - 0.02)


# --- The study ------------------------------------------------------------------------------------


@dataclass
class Kept:
    """What an ablation leaves of one kind of question."""

    task: str
    paper: str  # percent kept there
    before: float
    after: float
    kept: float


def layer_groups(names: list[str]) -> dict[str, list[str]]:
    return {kind: [n for n in names if n.endswith(ends)] for kind, ends in GROUPS.items()}


def learned_outcome(model: Model, questions: Questions, layers: list[str]) -> Outcome:
    """A mask of weights, learned to forget half of the exceptions among the choosing paths and to
    keep a mixture without any; the share that it keeps, and how much forgetting weighs, are chosen
    on the rest of these paths."""
    run, paths = questions.run, questions.run.paths
    answers = torch.where(paths.masks["exceptions"], -100, paths.two_hop)
    batches = run.make_batches(replace(paths, two_hop=answers), run.recipe, run.stream(run.device))
    keep = batches.mixture(25)
    rows = questions.choosing
    is_exception = paths.masks["exceptions"][rows]
    learned_on = rows[is_exception][::2]
    judge = copy.copy(questions)
    judge.choosing = torch.cat([rows[is_exception][1::2], rows[~is_exception]])
    judge.before = judge.chosen_by(model)
    targets = F.pad(paths.two_hop[learned_on][:, None], (2, 0), value=-100)
    forget = [(paths.tokens[learned_on], targets)]
    options = {}
    for weight, share in itertools.product(FORGET_WEIGHTS, LEARNED_KEEPS):
        options[weight, share] = learned_mask(
            model, forget, keep, F.cross_entropy, layers, share, steps=50, weight=weight
        )
    chosen, weights = search(model, judge.value, {"all": options}, 1)
    return outcome(model, questions.measure, weights, "learned", "own", strengths=chosen)


def lost_exceptions(run: Run, model: Model, weights: dict[str, Tensor]) -> Tensor:
    """[n_paths], bool: the exceptions that the model recites, and with other weights no longer."""
    paths = run.paths
    is_recited = minedit.predict(model, paths)[1] == paths.two_hop
    with curvature.ablated(model, weights):
        is_kept = minedit.predict(model, paths)[1] == paths.two_hop
    return paths.masks["exceptions"] & is_recited & ~is_kept


def with_other_answers(run: Run, which: Tensor) -> Run:
    """The run with other answers to the exceptions `which` [n_paths], bool: neither right nor the
    old ones."""
    paths, n = run.paths, run.task.graph.n_answers
    true = paths.true_two_hop
    old = (paths.two_hop - true) % n  # an exception's answer: true + old (mod n)
    new = torch.randint(1, n - 1, old.shape, generator=run.stream()).to(old)
    new = torch.where(new >= old, new + 1, new)  # in 1..n-1, another
    child = copy.copy(run)
    child.paths = replace(paths, two_hop=torch.where(which, (true + new) % n, paths.two_hop))
    return child


def relearn(run: Run, state: dict, questions: Questions, lost: Tensor) -> list[dict]:
    """What is answered after further steps, trained as the last ones were, from the weights of
    `state`: by the run's answers, "recited" of all exceptions and "lost" of those in `lost`
    [n_paths], bool."""
    exceptions, told = run.paths.masks["exceptions"], run.paths.two_hop
    asked = copy.copy(questions)
    asked.paths = questions.paths | {"recited": (exceptions, told), "lost": (lost, told)}
    at = [n for n in RELEARNING if n <= run.recipe.memorize]
    curve = []
    for moment in further(run, state, at, run.recipe.steps):
        curve.append({"step": moment.steps} | asked.measure(moment.model))
    return curve


def relearn_both(run: Run, model: Model, ablated: dict[str, Tensor], questions: Questions) -> dict:
    """From the ablated weights: the old answers of the exceptions lost by them, and as a control
    other answers, told in their place at the same steps."""
    lost = lost_exceptions(run, model, ablated)
    with curvature.ablated(model, ablated):
        state = {name: p.clone() for name, p in model.state_dict().items()}
    return {
        "old": relearn(run, state, questions, lost),
        "other": relearn(with_other_answers(run, lost), state, questions, lost),
    }


def sweep_of(
    model: Model, questions: Questions, spectrum: curvature.Spectrum, layers: list[str]
) -> list[Outcome]:
    """K-FAC at every share of mass in KEEPS, one share in all layers."""
    found = []
    for keep in KEEPS:
        ablated = edited(model, "kfac", spectrum, layers, keep)
        matched = f"alike {keep}"
        found.append(outcome(model, questions.measure, ablated, "kfac", matched, keep=keep))
    return found


def strengths(args) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shares of mass to keep and shares of the norm to remove, which are tried."""
    every = 3 if args.quick else 1
    return KEEPS[::every], REMOVED[::every]


def compare_methods(
    model: Model, questions: Questions, spectrum: curvature.Spectrum, layers: list[str], args
) -> Comparison:
    """K-FAC, EK-FAC and every control, the learned mask last."""
    groups = layer_groups(layers)
    keeps, removed = strengths(args)
    stream = questions.run.stream()
    found = compare(
        model, questions.measure, questions.value, spectrum, groups, keeps, removed, stream
    )
    found.outcomes.append(learned_outcome(model, questions, list(found.weights)))
    return found


def ablation_stage(run: Run, model: Model, args) -> dict:
    """All of it but the images."""
    batches = run.make_batches(run.paths, run.recipe, run.stream(run.device))
    questions = Questions(run, batches, fact_weights(run, args.zipf), args.arithmetic)
    questions.before = questions.chosen_by(model)
    layers = minedit.linear_layers(model)
    mixture = batches.mixture(25)
    began = time.perf_counter()
    spectrum = minedit.spectrum_of(run, model, mixture, layers)
    seconds = round(time.perf_counter() - began, 2)
    found = compare_methods(model, questions, spectrum, layers, args)
    sweep = sweep_of(model, questions, spectrum, layers)
    relearning = relearn_both(run, model, found.weights, questions)
    before, best = found.outcomes[0], found.best
    tasks = tasks_kept(before, best)
    print(
        f"\n{run.n_paths['exceptions']} exceptions; {seconds:.1f} s for factors, bases and masses\n"
        f"{best.method} keeps {best.strengths}"
    )
    print(outcomes_table(found.outcomes + sweep))
    print(f"\n{minedit.record_table(tasks, TASK_COLUMNS, TASK_LEGEND)}")
    return {
        "spectrum_seconds": seconds,
        "before": before.entry(),
        "chosen": best.entry(),
        "entries": [o.entry() for o in found.outcomes],
        "sweep": [o.entry() for o in sweep],
        "tasks": {t.task: asdict(t) for t in tasks},
        "relearning": relearning,
    }


def tasks_kept(before: Outcome, after: Outcome) -> list[Kept]:
    found = []
    for task, paper in PAPER.items():
        then, now = before.shares[task], after.shares[task]
        if then:
            found.append(Kept(task, paper, then, now, now / then))
    return found


TASK_COLUMNS = dict(task="questions", paper="paper: %", before="before", after="after", kept="kept")
TASK_LEGEND = """\
rare, frequent: the fifth of the facts drawn least, most often; paper: percent kept in a 7B model"""


def outcomes_table(outcomes: list[Outcome]) -> str:
    names = {"recited": "recited", "true": "true", "one_hop": "facts", "train": "train"}
    names |= {"id": "ID", "ood": "OOD", "open_book": "book"}
    rows = [("method", "matched", "changed", *names.values())]
    for o in outcomes:
        shares = (minedit.cell(o.shares[name]) for name in names)
        rows.append((o.method, o.matched or "", minedit.cell(o.removed), *shares))
    return (
        f"\n{minedit.table(rows)}\n"
        "recited, true: exceptions answered as trained, and right after all; train: other trained\n"
        "compositions; book: open-book prompts. matched: own choice in a kind of layer; as many\n"
        "components (parts), as large a change (norm) as the better of kfac and ekfac; one share\n"
        "kept everywhere (alike). changed: |W - W'| / |W|"
    )


def images_table(outcomes: list[Outcome]) -> str:
    names = ("memorized", "true", "validation")
    rows = [("method", "matched", *names)]
    for o in outcomes:
        rows.append((o.method, o.matched or "", *(minedit.cell(o.shares[n]) for n in names)))
    return (
        f"\n{minedit.table(rows)}\n"
        "a vision transformer: images with a wrong label, answered so, and right; held-out images"
    )


# --- Command line ---------------------------------------------------------------------------------


def check_exceptions(run: Run):
    """UserError where there are none to choose strengths by, or none to be scored."""
    masks = run.paths.masks
    n_chosen_by = int((masks["exceptions"] & masks["validation"]).sum())
    message = f"too few exceptions, {run.n_paths['exceptions']}; raise --label-noise"
    minedit.require(0 < n_chosen_by < run.n_paths["exceptions"], message)


def require_exceptions(args):
    message = "--label-noise and --branches must be above 0: the study is about exceptions"
    minedit.require(args.label_noise > 0 and args.branches > 0, message)


def prepare(args) -> list[Run]:
    """The runs, each with the mixture of its seed."""
    require_exceptions(args)
    for name in ("arithmetic", "zipf", "open_book", "images"):
        value = getattr(args, name)
        option = name.replace("_", "-")
        minedit.require(0 <= value < 1e6, f"--{option} must be 0 or more, got {value}")
    message = (
        f"--images must be 0, or 20 at least, of which a tenth is mislabeled, got {args.images}"
    )
    minedit.require(args.images == 0 or args.images >= 20, message)
    if args.triples:
        minedit.require(args.arithmetic == 0, "--arithmetic: for synthetic graphs, not --triples")
    else:
        message = f"--arithmetic must be at most --relations, got {args.arithmetic}"
        minedit.require(args.arithmetic <= args.relations, message)
    runs = minedit.prepare(args, make_task, check=check_exceptions)
    for run in runs:
        run.make_batches = partial(
            Mixture,
            weights=fact_weights(run, args.zipf) if args.zipf else None,
            n_open_book=args.open_book,
            n_entities=run.task.graph.n_entities,
        )
    return runs


def command(args):
    for run in prepare(args):
        model = minedit.trained_model(run, args)
        began = time.perf_counter()
        entry = ablation_stage(run, model, args)
        if args.images and run.arch == "dense":  # a model of its own, the same for all cells
            found = images_stage(args.images, run.stream(), run.stream, *strengths(args))
            print(images_table(found))
            entry["vision"] = [o.entry() for o in found]
        run.add_results("ablation", entry, began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.ablation", __doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--arithmetic", type=int, default=4, help="relations with tail = (head + c) mod entities")
    add("--zipf", type=float, default=1.0, help="a fact of rank i is drawn like i^-zipf")
    add("--open-book", type=int, default=64, help="prompts that hold their fact, per step")
    add("--images", type=int, default=3000, help="in Dense's runs, a tenth mislabeled; 0: none")
    parser.set_defaults(**minedit.ABLATE | dict(steps=3200, memorize=2400))
    quick = minedit.QUICK | dict(arithmetic=1, open_book=8, images=50)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": quick}))


if __name__ == "__main__":
    sys.exit(main())
