"""1 to 10 000 facts in one update: MEMIT against every peer. After Meng et al. 2022 [1].

Trains a model of 20 000 facts (facts alone, no compositions), every relation under two names, and
edits up to half of them at the first read of its first store, by

    memit, emmet, alphaedit   in closed form, for all facts at once
    rome                      one fact after another
    finetune                  constrained fine-tuning, Adam with a bound on every entry of dW

with a value for each fact that is a prototype, sought by gradient with our settings, or sought with
those of the official code [1] ("official"; its KL term is left out: it keeps what the model says of
the bare subject, at whose token nothing is edited here). "alphaedit-official" has the threshold
(2e-2, absolute) and ridge (10) of its code [2]. Strengths (lam of MEMIT, threshold of AlphaEdit,
bound of the fine-tuning) are chosen for each number of edits, on as many other facts (100 at least)
and by facts that are not scored; no request is dropped. In Dense, MEMIT is also spread over several
blocks. Scored are efficacy (new answer), paraphrase (by the relation's other name), specificity
(1000 facts that are never edited) and their harmonic mean.

    python -m studies.mass_edit --arch all --seeds 4 --out runs/mass    # 15 to 40 minutes a run

Writes "mass" into results.json. Left out: MEND, which needs a hypernetwork.

[1] Meng et al. 2022, MEMIT, arXiv 2210.07229.   [2] Fang et al. 2024, AlphaEdit, arXiv 2410.02355.
"""

import itertools
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit as editing
import minedit
from minedit import Run, share_of
from models import Model, stores
from studies.training import trained

LAMBDAS = (1, 3, 10, 30, 100, 300, 1000, 3000)  # of MEMIT
THRESHOLDS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of AlphaEdit, times the mean eigenvalue of C
BOUNDS = (0.03, 0.1, 0.3, 0.5, 1.0)  # of the fine-tuning, times the rms of W
COUNTS = (1, 3, 10, 32, 100, 316, 1000, 3162, 10_000)
TARGETS = ("prototype", "gradient", "official")

# --- The task: every relation has two names -------------------------------------------------------


class TwoNames(minedit.FactBatches):
    """Batches in which half of the relations are asked for by their other token, R later."""

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        tokens, positions, answers = super().draw()
        relations = tokens[:, 1:]
        other = torch.randint(2, relations.shape, generator=self.generator, device=self.device)
        tokens[:, 1:] += self.n_relations * other
        return tokens, positions, answers

    @property
    def n_relations(self) -> int:
        return int(self.paths.facts[:, 1].max()) + 1


def make_task(args, seed: int, graph) -> minedit.Task:
    task = minedit.make_task(args, seed, graph)
    return task._replace(data=task.data | {"aliases": True}, n_relations=2 * task.n_relations)


# --- Methods --------------------------------------------------------------------------------------


def finetune_update(
    model: nn.Module, layer: nn.Linear, requests: editing.Requests, bound: float, batch: int
) -> Tensor:
    """dW by 25 steps of Adam on -log p(wanted answer), no entry above bound * rms(W): the
    constrained fine-tuning of Meng et al. 2022 (ROME), at a rate that can reach the bound in five
    steps."""
    W, n = layer.weight.detach(), len(requests)
    limit = bound * float(W.square().mean().sqrt())
    dW = torch.zeros_like(W, requires_grad=True)
    optimizer = torch.optim.Adam([dW], lr=limit / 5)

    def changed(key, value):
        return value + key @ dW.T

    with editing.intervene(layer, changed):
        for _ in range(25):
            for i in torch.arange(n, device=W.device).split(batch):
                logits = model(requests.tokens[i])[:, -1]
                loss = F.cross_entropy(logits, requests.new[i], reduction="sum") / n
                loss.backward(inputs=[dW])
            optimizer.step()
            optimizer.zero_grad()
            dW.data.clamp_(-limit, limit)
    return dW.detach()


def official_residual(
    model: nn.Module, at: editing.Site, requests: editing.Requests, batch: int
) -> Tensor:
    """r [n, d_out] with the settings of MEMIT's code for GPT-J: Adam at 0.5 on r itself, added to
    the layer's value at the last token, 25 steps or until a request's loss is below 0.05; loss =
    -log p(wanted answer) + 0.5 |r| / |v0|^2; |r| <= 0.75 |v0|."""
    parts = []
    for i in torch.arange(len(requests), device=at.values.device).split(batch):
        v0 = at.values[requests.fact[i]].norm(dim=-1, keepdim=True).clamp(min=1e-12)
        r = torch.zeros(len(i), at.values.shape[1], requires_grad=True, device=v0.device)
        optimizer = torch.optim.Adam([r], lr=0.5)

        for _ in range(25):
            with editing.added(at.layer, r, [at.call]):
                logits = model(requests.tokens[i])[:, -1]
            loss = F.cross_entropy(logits, requests.new[i], reduction="none")
            length = (r.square().sum(-1, keepdim=True) + 1e-12).sqrt()
            loss = loss + (0.5 * length / v0**2)[:, 0]
            is_done = (loss < 0.05)[:, None]
            if is_done.all():
                break
            (r.grad,) = torch.autograd.grad(loss.sum(), r)
            kept = r.detach().clone()
            optimizer.step()
            length = r.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
            r.data *= (0.75 * v0 / length).clamp(max=1)
            r.data = torch.where(is_done, kept, r.data)
        parts.append(r.detach())
    return torch.cat(parts)


def closed_form(
    method: str,
    W: Tensor,
    C: editing.Whitening,
    K: Tensor,
    r: Tensor,
    strength: float,
    notes: dict | None,
) -> Tensor:
    """dW of all requests, keys K [n, d_in] and residuals r [n, d_out]."""
    if method == "memit":
        return minedit.memit(C, K, r, strength, W=W, diagnostics=notes)
    if method == "emmet":
        return editing.emmet_update(K, r, C, W=W, diagnostics=notes)
    if method.startswith("alphaedit"):
        is_official = method == "alphaedit-official"
        options = {"threshold": strength, "absolute": is_official, "W": W, "diagnostics": notes}
        return editing.alphaedit_update(K, r, C.C, 10.0 if is_official else 1.0, **options)
    return editing.rome_sequence(W, C, K, K @ W.T + r, notes)


@dataclass
class MassEntry:
    """What one update of n facts did; None where there is no such figure."""

    method: str
    target: str
    strength: float
    n: int
    site: str | None = None
    at_pass: int | None = None
    blocks: str | None = None  # of MEMIT spread over blocks
    infeasible: str | None = None  # why there is no solution
    efficacy: float | None = None
    paraphrase: float | None = None
    specificity: float | None = None
    score: float | None = None
    condition: float | None = None
    residual_left: float | None = None  # mean |r - dW k| / |r|
    residual_predicted: float | None = None
    largest_cosine: float | None = None
    relative_norm: float | None = None
    ridge: float | None = None
    null_space: int | None = None
    fallbacks: int | None = None  # facts without a prototype, sought instead
    seconds: float | None = None  # targets and C included

    def entry(self) -> dict:
        """As written to results.json: without what there is none of."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        if self.at_pass is not None:
            found["pass"] = found.pop("at_pass")
        return found


class MassStudy:
    """Many facts of a model in one update, and what becomes of these and of other facts."""

    def __init__(self, run: Run, model: Model, batch: int):
        self.run, self.model, self.batch = run, model, batch
        self.queries, self.tails = run.paths.queries, run.paths.facts[:, 2]
        self.site = stores(run.config)[0]
        began = time.perf_counter()
        self.at = editing.site(model, self.site.module, self.site.call, self.queries)
        self.gathered = time.perf_counter() - began  # seconds for keys, values and C
        self.before = minedit.last_answers(model, self.queries)
        self.known = self.before == self.tails
        self.plan = minedit.mass_plan(run.paths, run.stream())
        self.choosing, self.scored = self.plan.spared[::2], self.plan.spared[1::2]

    @cached_property
    def white(self) -> editing.Whitening:
        return editing.whiten(self.at.C)

    def targets(self, requests: editing.Requests, target: str) -> tuple[Tensor, int]:
        """r [n, d_out], and how many have no prototype."""
        if target == "official":
            return official_residual(self.model, self.at, requests, self.batch), 0
        others = self.known.index_fill(0, requests.fact, False)  # these are the prototypes
        asked = (self.at, requests, target, others, self.batch)
        return minedit.mass_residual(self.run, self.model, *asked)

    def each(
        self,
        requests: editing.Requests,
        target: str,
        kinds: list[tuple[str, float]],
        spared: Tensor,
    ) -> list[MassEntry]:
        """One update of all requests by each (method, strength); the targets are sought once. The
        facts `spared` tell the specificity."""
        began = time.perf_counter()
        r, n_fallbacks = self.targets(requests, target)
        sought = self.gathered + time.perf_counter() - began
        entries = []
        for method, strength in kinds:
            if method == "finetune":
                entries.append(self.finetuned(requests, strength, spared))
            else:
                entry = MassEntry(method, target, strength, len(requests), self.at.name)
                self.solve(entry, requests, r, sought, spared)
                entry.fallbacks = n_fallbacks
                entries.append(entry)
        return entries

    def finetuned(self, requests: editing.Requests, bound: float, spared: Tensor) -> MassEntry:
        began = time.perf_counter()
        dW = finetune_update(self.model, self.at.layer, requests, bound, self.batch)
        entry = MassEntry("finetune", "gradient", bound, len(requests), self.at.name)
        entry.at_pass = self.site.at_pass
        entry.seconds = round(time.perf_counter() - began, 3)
        self.score(entry, requests, {self.at.name: dW}, spared)
        return entry

    def solve(
        self,
        entry: MassEntry,
        requests: editing.Requests,
        r: Tensor,
        sought: float,
        spared: Tensor,
    ):
        """Fill in the entry of a closed form; `sought`: the seconds of its targets and C."""
        K, entry.at_pass = self.at.keys[requests.fact], self.site.at_pass
        W = self.at.layer.weight.detach()
        began = time.perf_counter()
        try:
            dW = closed_form(entry.method, W, self.white, K, r, entry.strength, None)
        except ValueError as error:  # more facts than rank, an empty null space, ...
            entry.infeasible = str(error)
            return
        entry.seconds = round(time.perf_counter() - began + sought, 3)
        self.score(entry, requests, {self.at.name: dW}, spared)
        if spared is self.scored:  # once more, for the diagnostics
            notes = {}
            closed_form(entry.method, W, self.white, K, r, entry.strength, notes)
            size = r.double().norm(dim=-1).clamp(min=1e-12)
            for name, value in notes.items():
                if name.startswith("residual"):
                    value = float((value / size).mean())
                setattr(entry, name, value)

    def choose(self, m: int) -> list[MassEntry]:
        """Every strength of every method that has one, on m facts that are not scored."""
        others = self.plan.others[:m]
        memit = [("memit", lam) for lam in LAMBDAS]
        alphaedit = [("alphaedit", threshold) for threshold in THRESHOLDS]
        tuned = [("finetune", bound) for bound in BOUNDS]
        sweep = self.each(others, "prototype", memit + alphaedit, self.choosing)
        sweep += self.each(others, "gradient", memit + alphaedit + tuned, self.choosing)
        return sweep + self.each(others, "official", memit, self.choosing)

    def over_blocks(
        self, first: int, last: int, requests: editing.Requests, lam: float
    ) -> MassEntry:
        """MEMIT over the blocks first..last of Dense, the residual, a prototype, asked of the
        stream after them."""
        model, began = self.model, time.perf_counter()
        is_last = last + 1 == len(model.blocks)
        stream = ("norm" if is_last else f"blocks.{last + 1}.attention", 0)
        values, _ = editing.last_token(model, *stream, self.queries)
        after = editing.Site("stream", 0, None, None, None, values)
        others = self.known.index_fill(0, requests.fact, False)
        r, _ = editing.prototype_residual(after, requests, self.tails, others)
        sites = [(f"blocks.{i}.feed_forward.down", 0) for i in range(first, last + 1)]
        updates = editing.memit_layers(model, sites, requests, r, lam, self.queries, stream)
        entry = MassEntry("memit", "prototype", lam, len(requests), blocks=f"{first}-{last}")
        entry.seconds = round(time.perf_counter() - began, 3)
        self.score(entry, requests, updates, self.scored)
        return entry

    def score(
        self,
        entry: MassEntry,
        requests: editing.Requests,
        updates: dict[str, Tensor],
        spared: Tensor,
    ):
        """Ask the model with the updates; no request is left out."""
        n_names = self.run.config.n_relations // 2
        renamed = requests.tokens + torch.tensor([0, n_names], device=self.run.device)
        with editing.edited(self.model, updates):
            new = minedit.last_answers(self.model, requests.tokens) == requests.new
            again = minedit.last_answers(self.model, renamed) == requests.new
            kept = minedit.last_answers(self.model, self.queries[spared]) == self.before[spared]
        entry.efficacy, entry.paraphrase = share_of(new), share_of(again)
        entry.specificity = share_of(kept)
        shares = (entry.efficacy, entry.paraphrase, entry.specificity)
        entry.score = 100 * statistics.harmonic_mean([max(share, 1e-9) for share in shares])


def best(sweep: list[MassEntry], method: str, target: str) -> MassEntry:
    """The entry of highest score; a strength without a solution scores 0."""
    mine = [e for e in sweep if (e.method, e.target) == (method, target)]
    return max(mine, key=lambda e: e.score or 0)


def methods_for(target: str, sweep: list[MassEntry]) -> list[tuple[str, float]]:
    """(method, strength) of what is tried with a target: MEMIT, and with the one that suits it best
    its peers too."""
    kinds = [("memit", best(sweep, "memit", target).strength)]
    suits = max(TARGETS, key=lambda kind: best(sweep, "memit", kind).score or 0)
    if target != suits:
        return kinds
    own = suits if suits != "official" else "gradient"  # AlphaEdit is not swept with this
    kinds += [("emmet", 0.0), ("rome", 0.0), ("alphaedit-official", 2e-2)]
    kinds.append(("alphaedit", best(sweep, "alphaedit", own).strength))
    return kinds + [("finetune", best(sweep, "finetune", "gradient").strength)]


def mass_stage(run: Run, model: Model, batch: int) -> dict:
    """All methods at all numbers of edits, each at the strength chosen for this number."""
    study = MassStudy(run, model, batch)
    plan, largest = study.plan, len(study.plan.requests)
    minedit.require(largest >= 5, f"{2 * largest} facts can be edited: too few, 10 at least")
    print(
        f"\nup to {largest} of {len(study.queries)} facts in one update, {int(study.known.sum())} "
        f"known before, at {study.at.name}; {len(plan.others)} others to choose strengths on"
    )
    sweeps, edits, layers = {}, [], []
    for n in sorted({min(n, largest) for n in COUNTS}):
        m = min(max(n, 100), len(plan.others))
        if m not in sweeps:
            sweeps[m] = study.choose(m)
        for target in TARGETS:
            kinds = methods_for(target, sweeps[m])
            edits += study.each(plan.requests[:n], target, kinds, study.scored)
    if run.arch == "dense":
        requests = plan.requests[:1000]
        lam = best(sweeps[min(1000, m)], "memit", "prototype").strength
        for last in range(len(model.blocks)):
            for first in range(last + 1):
                layers.append(study.over_blocks(first, last, requests, lam))
    edits.sort(key=lambda e: (e.method != "memit", e.method, e.target))
    print(mass_table(edits + layers))
    scores = {}
    for e in edits:
        name = f"{e.method}_{e.n}"
        scores[name] = max(scores.get(name, 0), e.score or 0)
    return {
        "facts": len(study.queries),
        "sweep": [e.entry() for e in itertools.chain(*sweeps.values())],
        "edits": [e.entry() for e in edits],
        "layers": [e.entry() for e in layers],
        "scores": scores,
    }


COLUMNS = dict(method="method", target="target", strength="strength", n="facts")
COLUMNS |= dict(efficacy="eff", paraphrase="para", specificity="spec", score="score")
COLUMNS |= dict(condition="cond", residual_left="left", residual_predicted="pred")
COLUMNS |= dict(relative_norm="norm", seconds="s")
LEGEND = """\
strength: lam of MEMIT, threshold of AlphaEdit, bound of the fine-tuning. eff: new answers; para: by
the relation's other name; spec: other facts that keep their answers; score: harmonic mean, percent.
cond: of the system solved; left: mean |r - dW k| / |r|, pred: predicted; norm: |dW| / |W|"""


def mass_table(entries: list[MassEntry]) -> str:
    return "\n" + minedit.record_table(entries, COLUMNS, LEGEND)


def command(args):
    for run, model in trained(args, make_task=make_task, make_batches=TwoNames):
        began = time.perf_counter()
        run.add_results("mass", mass_stage(run, model, args.edit_batch), began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.mass_edit", __doc__.split("\n\n")[0])
    parser.set_defaults(**minedit.MASS)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
