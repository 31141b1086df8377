"""1 to 10 000 facts in one update: MEMIT against every peer. After Meng et al. 2022 [1].

Trains a model of 20 000 facts (facts alone, no compositions), every relation under two names, and
edits up to half of them at the first read of its first store, by

    memit, emmet, alphaedit   in closed form, for all facts at once
    rome                      one fact after another, with values sought on the unedited model
    finetune                  constrained fine-tuning, Adam with a bound on every entry of dW

with a value for each fact that is a prototype, sought by gradient with our settings, or sought with
the numbers of the official code [1] ("official"; its KL term is left out: it keeps what the model
says of the bare subject, at whose token nothing is edited here). Our search changes a value by at
most its own length, the official one by 0.75 of that of the stream after the block. MEMIT is scored
with all three, every peer with the one that suits it best. "alphaedit-official" has the threshold
(2e-2, absolute) and ridge (10) of its code [2]; ours are chosen, and relative to the mean
eigenvalue of C and to the mean squared length of a key. The code of EMMET adds 0.1 to what is
inverted, in units of a MEMIT with lam = 10 000: that is MEMIT with lam = 1000, so that EMMET is
here as in its paper.

Strengths (lam of MEMIT, threshold and ridge of AlphaEdit, bound of the fine-tuning) and targets are
chosen for each number of edits, on as many other facts (100 at least, 8000 at most) and by facts
that are not scored: the most careful that comes within half a point of the best. No request is
dropped. In Dense, MEMIT is also spread over blocks that are fixed beforehand: the first, the last,
all of them (in stores of 4096 units at most). Scored are efficacy (new answer), paraphrase (by the
relation's other name), specificity (1000 facts that are never edited) and their harmonic mean; and
the same as the papers count, where an answer need not be given, but be likelier than one other: the
new one than the old, and for facts of the same relation that are never edited theirs than the new.
(The neighbours of CounterFact have the edited fact's old answer, too, which is harder; here a fact
drawn from the relation has it once in a thousand.)

    python -m studies.mass_edit --arch all --slots 2048 --d-ff 2048 --seeds 3 --out runs/mass
    python -m studies.mass_edit --counts 10000 --methods memit emmet rome finetune --out runs/peers
    python -m studies.mass_edit --arch dense --depth 4 --d-ff 4096 --methods memit --out runs/spread

The first takes 15 to 40 minutes a run, the second, in a store of 16,384 slots, 45 minutes on one
thread and 10 GiB; AlphaEdit would want an eigendecomposition of a matrix of this size there. Writes
"mass" into results.json. Left out: MEND, which needs a hypernetwork.

[1] Meng et al. 2022, MEMIT, arXiv 2210.07229.   [2] Fang et al. 2024, AlphaEdit, arXiv 2410.02355.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import edit as editing
import minedit
from minedit import Run
from models import Model, stores
from studies.mass_task import Group, MassTask, Scores, trained_runs
from studies.peers import finetune_update, official_residual
from studies.training import positive

COUNTS = (1, 10, 100, 316, 1000, 3162, 10_000)
TARGETS = ("prototype", "gradient", "official")
STRENGTHS = {  # the most careful first
    "memit": (30_000, 10_000, 3000, 1000, 300, 100, 10),  # lam
    # ridge, times the mean squared length of a key; threshold, times the mean eigenvalue of C
    "alphaedit": tuple(itertools.product((1.0, 0.3, 0.1, 0.03), (0.3, 1.0, 3.0))),
    "alphaedit-official": ((10.0, 2e-2),),  # both absolute
    "emmet": (0.0,),  # it has none
    "rome": (0.0,),
    "finetune": (0.1, 0.3, 0.5, 0.7, 1.0, 2.0),  # bound, times the rms of W
}
NEARLY = 0.5  # points of the score below the best at which a more careful strength is taken


@dataclass
class MassEntry(Scores):
    """What one update of n facts did; None where there is no such figure."""

    method: str
    target: str
    strength: float  # of AlphaEdit its ridge
    n: int
    site: str | None = None
    at_pass: int | None = None
    threshold: float | None = None  # of AlphaEdit
    blocks: str | None = None  # of MEMIT spread over blocks
    condition: float | None = None
    residual_left: float | None = None  # mean |r - dW k| / |r|
    residual_predicted: float | None = None
    largest_cosine: float | None = None
    relative_norm: float | None = None
    ridge: float | None = None
    null_space: int | None = None
    fallbacks: int | None = None  # facts without a prototype, sought instead
    seconds: float | None = None  # targets and C included

    @property
    def setting(self) -> float | tuple[float, float]:
        """Of STRENGTHS."""
        return self.strength if self.threshold is None else (self.strength, self.threshold)

    def entry(self) -> dict:
        """As written to results.json: without what there is none of."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        if self.at_pass is not None:
            found["pass"] = found.pop("at_pass")
        return found


class Problem(NamedTuple):
    """The first n requests of a group, with a target: what an update is asked to do."""

    requests: editing.Requests
    K: Tensor  # [n_alive, d_in]
    r: Tensor  # [n_alive, d_out]; a key of zeros cannot be edited: such a request fails
    fallbacks: int  # requests without a prototype, sought instead
    seconds: float  # of the targets


class Decomposed(NamedTuple):
    """C as an update is handed it."""

    by: Callable | None  # editing.whiten or torch.linalg.eigh; None: as it is
    what: Tensor | editing.Whitening | tuple[Tensor, Tensor]
    seconds: float


def best(entries: list):
    """The first entry, of the most careful strength, within NEARLY of the highest score; one
    without a solution scores 0."""
    highest = max(entry.score or 0 for entry in entries)
    return next(entry for entry in entries if (entry.score or 0) >= highest - NEARLY)


class MassStudy(MassTask):
    """Many facts of a model in one update, and what becomes of these and of other facts. Strengths
    are chosen by the group `choosing` alone. `most`: the largest number of edits."""

    def __init__(self, run: Run, model: Model, batch: int, most: int):
        super().__init__(run, model, most)
        self.batch = batch
        self.site = stores(run.config)[0]
        began = time.perf_counter()
        self.at = editing.site(model, self.site.module, self.site.call, self.queries)
        self.gathered = time.perf_counter() - began  # seconds for keys, values and C
        self.weight = self.at.layer.weight.detach()
        self.is_wide = self.weight.shape[1] > minedit.WIDE
        self.sought = {}  # {(group, target): (r of all its requests, seconds for one)}
        self.swept = {}  # {(method, number of facts, target): [MassEntry]}
        self.made = None  # Decomposed, of the last method that asked for it

    # Targets

    def residual(self, group: Group, n: int, target: str) -> tuple[Tensor, int, float]:
        """r [n, d_out] of the first n requests, how many have no prototype, and seconds. What is
        sought for each request by itself is sought once, for all n."""
        if target == "prototype":  # other facts with the wanted answer: they depend on n
            began, requests = time.perf_counter(), group.requests[:n]
            others = self.known.index_fill(0, requests.fact, False)
            r, n_fallbacks = self.mass_residual(self.at, requests, target, others)
            return r, n_fallbacks, time.perf_counter() - began
        key = (group.name, target)
        if key not in self.sought:
            began = time.perf_counter()
            r = self.seek(group.requests, target)
            self.sought[key] = r, (time.perf_counter() - began) / len(r)
        r, each = self.sought[key]
        return r[:n], 0, n * each

    def seek(self, requests: editing.Requests, target: str) -> Tensor:
        """r [n, d_out], each request for itself: "gradient", "official", or the name of a block of
        Dense, for what the stream after it lacks."""
        if target == "official":
            stream = self.stream_after("blocks.0")  # which reads the first store first
            return official_residual(self.model, self.at, stream, requests, self.batch)
        at = self.at if target == "gradient" else self.after(target)
        r, _ = self.mass_residual(at, requests, "gradient", self.known)
        return r

    def mass_residual(
        self, at: editing.Site, requests: editing.Requests, target: str, known: Tensor
    ) -> tuple[Tensor, int]:
        return minedit.mass_residual(self.run, self.model, at, requests, target, known, self.batch)

    def stream_after(self, block: str) -> Tensor:
        """The stream after a block's first call, at each fact's last token [facts, d_out]."""
        return editing.last_token(self.model, block, 0, self.queries)[1]

    def after(self, block: str) -> editing.Site:
        """The stream after a block of Dense, as in [1]: what its store returns is added to it, and
        a change is measured by the whole stream, of which a late store returns a small part."""
        name = f"{block}.feed_forward.down"
        layer, values = self.model.get_submodule(name), self.stream_after(block)
        C, keys = None, None  # which the search does not read
        return editing.Site(name, 0, layer, C, keys, values)

    def problem(self, group: Group, n: int, target: str) -> Problem:
        requests = group.requests[:n]
        r, n_fallbacks, seconds = self.residual(group, n, target)
        K = self.at.keys[requests.fact]
        alive = (K != 0).any(1)
        return Problem(requests, K[alive], r[alive], n_fallbacks, seconds)

    # Updates

    def decomposed(self, method: str) -> Decomposed:
        """What a method is handed for C. The last one is kept for the next update, and that one
        alone, since a matrix [d_in, d_in] of a wide store fills 2 GiB."""
        if method == "memit" and self.is_wide:  # its equation is solved as it stands
            return Decomposed(None, self.at.C, 0.0)
        by = torch.linalg.eigh if method.startswith("alphaedit") else editing.whiten
        if self.made is None or self.made.by is not by:
            self.made = None  # frees the last one before the next is made
            began = time.perf_counter()
            what = by(editing.double(self.at.C))
            self.made = Decomposed(by, what, time.perf_counter() - began)
            if by is editing.whiten:
                self.at = replace(self.at, C=what.C)  # with the ridge, if any: one matrix, not two
        return self.made

    def whitening(self) -> editing.Whitening:
        return self.decomposed("emmet").what

    def closed_form(
        self, method: str, K: Tensor, r: Tensor, strength, notes: dict | None = None
    ) -> Tensor:
        """dW of all requests, keys K [n, d_in] and residuals r [n, d_out], by a strength of
        STRENGTHS. Without notes, and but for "rome", r may be those of several targets side by
        side [n, targets * d_out]; dW has the rows of all of them then."""
        if len(K) == 0:
            return torch.zeros(r.shape[1], K.shape[1], device=K.device)
        C, W = self.decomposed(method).what, self.weight
        options = {} if notes is None else {"W": W, "diagnostics": notes}
        if method == "memit":
            return minedit.memit(K, r, C, strength, **options)
        if method == "emmet":
            return editing.emmet_update(K, r, C, **options)
        if method == "rome":
            return editing.rome_sequence(W, C, K, K @ W.T + r, notes)
        ridge, threshold = strength
        absolute = method == "alphaedit-official"
        if not absolute:
            ridge *= float(self.at.C.diagonal().sum())  # trace(C) = E |k|^2
        options |= {"threshold": threshold, "absolute": absolute, "spectrum": C}
        return editing.alphaedit_update(K, r, self.at.C, ridge, **options)

    def entry(self, method: str, target: str, strength, n: int) -> MassEntry:
        threshold = None
        if method.startswith("alphaedit"):
            strength, threshold = strength
        name, at_pass = self.at.name, self.site.at_pass
        return MassEntry(method, target, strength, n, name, at_pass, threshold)

    def sweep(self, method: str, m: int, target: str) -> list[MassEntry]:
        """Every strength of a method on m facts that are not scored."""
        if (method, m, target) not in self.swept:
            if method == "finetune":
                found = [self.finetuned(self.choosing, m, bound) for bound in STRENGTHS[method]]
                self.swept[method, m, target] = found
            elif method == "rome":  # its update is handed the values of one target
                self.sweep_targets(method, m, (target,))
            else:
                self.sweep_targets(method, m, TARGETS)
        return self.swept[method, m, target]

    def sweep_targets(self, method: str, m: int, targets: tuple[str, ...]):
        """Every strength for these targets. A closed form is linear in r: it is solved once for all
        of them, side by side."""
        problems = [self.problem(self.choosing, m, target) for target in targets]
        requests, K = problems[0].requests, problems[0].K
        r = torch.cat([problem.r for problem in problems], 1)  # [n_alive, targets * d_out]
        d_out = len(self.weight)
        for target in targets:
            self.swept[method, m, target] = []
        for strength in STRENGTHS[method]:
            entries = [self.entry(method, target, strength, m) for target in targets]
            try:
                dW = self.closed_form(method, K, r, strength)
            except ValueError as error:  # an empty null space, ...
                for entry in entries:
                    entry.infeasible = str(error)
            else:
                for entry, part in zip(entries, dW.split(d_out)):
                    self.score(entry, requests, {self.at.name: part}, self.choosing)
            for entry in entries:
                self.swept[method, m, entry.target].append(entry)

    def chosen(self, method: str, n: int, target: str) -> MassEntry:
        """The best of the strengths, on as many facts that are not scored."""
        return best(self.sweep(method, self.choosing.largest(max(n, 100)), target))

    def target(self, method: str, n: int) -> str:
        """The one that suits the method best, on these facts."""
        if method == "finetune":  # it seeks the answers themselves
            return "gradient"
        return max(TARGETS, key=lambda target: self.chosen(method, n, target).score or 0)

    def edit(self, method: str, n: int, target: str) -> MassEntry:
        """One update of the first n requests, at the strength chosen for this number."""
        strength = self.chosen(method, n, target).setting
        if method == "finetune":
            return self.finetuned(self.scoring, n, strength)
        return self.updated(method, n, target, strength)

    def updated(self, method: str, n: int, target: str, strength) -> MassEntry:
        """One update of the first n requests by a closed form of this strength, timed."""
        entry = self.entry(method, target, strength, n)
        problem = self.problem(self.scoring, n, target)
        entry.fallbacks = problem.fallbacks
        try:
            decomposing = self.decomposed(method).seconds
            began = time.perf_counter()
            dW = self.closed_form(method, problem.K, problem.r, strength)
        except ValueError as error:  # more facts than rank, an empty null space, ...
            entry.infeasible = str(error)
            return entry
        solving = time.perf_counter() - began
        entry.seconds = round(self.gathered + problem.seconds + decomposing + solving, 3)
        self.score(entry, problem.requests, {self.at.name: dW}, self.scoring)
        if len(problem.K):
            self.diagnose(entry, problem, dW)
        return entry

    def diagnose(self, entry: MassEntry, problem: Problem, dW: Tensor):
        """What the update leaves of r, and how large it is; in a narrow store also its condition
        and cosines, by a second solution, since `seconds` are those of the first alone."""
        notes = editing.outcome(dW, problem.K, problem.r, self.weight)
        if not self.is_wide:
            self.closed_form(entry.method, problem.K, problem.r, entry.setting, notes)
        for name, value in notes.items():
            if name.startswith("residual"):
                value = minedit.mean_relative(value, problem.r)
            setattr(entry, name, value)

    def finetuned(self, group: Group, n: int, bound: float) -> MassEntry:
        requests = group.requests[:n]
        entry = self.entry("finetune", "gradient", bound, n)
        began = time.perf_counter()
        dW = finetune_update(self.model, self.at.name, requests, bound, self.batch)
        entry.seconds = round(time.perf_counter() - began, 3)
        self.score(entry, requests, {self.at.name: dW}, group)
        return entry

    def over_blocks(self, first: int, last: int, group: Group, n: int, lam: float) -> MassEntry:
        """MEMIT over the blocks first..last of Dense; r is what the stream after them lacks."""
        requests = group.requests[:n]
        r, _, seconds = self.residual(group, n, f"blocks.{last}")
        is_last = last + 1 == len(self.model.blocks)
        stream = ("norm" if is_last else f"blocks.{last + 1}.attention", 0)  # what reads it next
        sites = [(f"blocks.{i}.feed_forward.down", 0) for i in range(first, last + 1)]
        entry = MassEntry("memit", "gradient", lam, n, blocks=f"{first}-{last}")
        began = time.perf_counter()
        try:
            updates = editing.memit_layers(
                self.model, sites, requests, r, lam, self.queries, stream
            )
        except ValueError as error:
            entry.infeasible = str(error)
            return entry
        entry.seconds = round(seconds + time.perf_counter() - began, 3)
        self.score(entry, requests, updates, group)
        return entry


def spread(study: MassStudy, counts: list[int]) -> tuple[list[MassEntry], list[MassEntry]]:
    """MEMIT over blocks of Dense, at the first block, the last and all: the sweep, the edits."""
    last = len(study.model.blocks) - 1
    sweep, edits = [], []
    for first, end in dict.fromkeys([(0, 0), (last, last), (0, last)]):
        for n in counts:
            m = study.choosing.largest(max(n, 100))
            tried = []
            for lam in STRENGTHS["memit"]:
                tried.append(study.over_blocks(first, end, study.choosing, m, lam))
            lam = best(tried).strength
            edits.append(study.over_blocks(first, end, study.scoring, n, lam))
            sweep += tried
    return sweep, edits


def mass_stage(run: Run, model: Model, counts: list[int], methods: list[str], batch: int) -> dict:
    """All methods at all numbers of edits, each at the strength chosen for this number."""
    study = MassStudy(run, model, batch, max(counts))
    counts = sorted({study.scoring.largest(n) for n in counts})
    print(
        f"\nup to {counts[-1]} of {len(study.queries)} facts in one update, "
        f"{int(study.known.sum())} known before, at {study.at.name}; "
        f"{len(study.choosing.requests)} others to choose strengths on"
    )
    edits, scores, paper_scores = [], {}, {}
    for method in dict.fromkeys(["memit", *methods]):
        for n in counts:
            suits = study.target(method, n)
            targets = TARGETS if method == "memit" else (suits,)
            for target in targets:
                edits.append(study.edit(method, n, target))
                if target == suits:
                    scores[f"{method}_{n}"] = edits[-1].score or 0
                    paper_scores[f"{method}_{n}"] = edits[-1].paper_score or 0
    sweep = list(itertools.chain(*study.swept.values()))
    layers = []
    if run.arch == "dense" and not study.is_wide:
        tried, layers = spread(study, [n for n in counts if n >= 1000] or counts[-1:])
        sweep += tried
    print("\n" + minedit.record_table(edits + layers, COLUMNS, LEGEND))
    return {
        "facts": len(study.queries),
        "sweep": [e.entry() for e in sweep],
        "edits": [e.entry() for e in edits],
        "layers": [e.entry() for e in layers],
        "scores": scores,
        "paper_scores": paper_scores,
    }


COLUMNS = dict(method="method", target="target", strength="strength", n="facts")
COLUMNS |= dict(efficacy="eff", paraphrase="para", specificity="spec", score="score")
COLUMNS |= dict(paper_score="as papers")
COLUMNS |= dict(condition="cond", residual_left="left", residual_predicted="pred")
COLUMNS |= dict(relative_norm="norm", seconds="s")
LEGEND = """\
strength: lam of MEMIT, ridge of AlphaEdit, bound of the fine-tuning. eff: new answers; para: by the
relation's other name; spec: other facts that keep their answers; score: harmonic mean, percent; as
papers: of the same, where an answer need only be likelier than one other, as the papers count.
cond: of the system solved; left: mean |r - dW k| / |r|, pred: predicted; norm: |dW| / |W|"""


def command(args):
    for run, model in trained_runs(args):
        began = time.perf_counter()
        stage = mass_stage(run, model, args.counts, args.methods, args.edit_batch)
        run.add_results("mass", stage, began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.mass_edit", __doc__.split("\n\n")[0])
    parser.add_argument(
        "--counts", type=positive, nargs="+", default=COUNTS, help="edits in one update"
    )
    known = {"choices": tuple(STRENGTHS), "default": tuple(STRENGTHS)}
    parser.add_argument(
        "--methods", nargs="+", **known, help="MEMIT, which is always run, and peers"
    )
    parser.set_defaults(**minedit.MASS)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
