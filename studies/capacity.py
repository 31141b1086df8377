"""How many edits does a store hold? Score against slots and edits, after Meng et al. 2022 [1].

MEMIT writes n facts in one update of a layer of d_in inputs. Of each residual it leaves
lam (K C^-1 K^T + lam I)^-1 r, which grows as n comes near d_in: GPT-J, in which 10 000 edits hold
[1], has 16 384. Here the models of `studies.mass_edit` (20 000 facts, every relation under two
names) have stores of 2048 to 16 384 slots, of which one read uses 64; 1000, 3162 and 10 000 facts
are edited in one update of the first read of the first store, by MEMIT with the gradient's target.
lam is chosen for each store and number of edits, on as many other facts (8000 at most) and by the
specificity of facts that are not scored; no request is dropped.

    python -m studies.capacity --arch lmc --seeds 3 --out runs/capacity-16384
    python -m studies.capacity --arch lmc --slots 8192 --d-ff 8192 --seeds 3 --out runs/capacity-8192

Writes "capacity" into results.json.

[1] Meng et al. 2022, MEMIT, arXiv 2210.07229.
"""

import sys
import time
from dataclasses import asdict, dataclass

from torch import Tensor

import minedit
from minedit import Run
from models import Model
from studies.mass_edit import MassEntry, MassStudy, TwoNames, make_task
from studies.training import trained

COUNTS = (1000, 3162, 10_000)
LAMBDAS = (300, 1000, 3000, 10_000)


@dataclass
class CapacityEntry:
    """What one update of n facts did, in a store of `slots`."""

    slots: int
    n: int
    lam: float
    efficacy: float
    paraphrase: float
    specificity: float
    score: float  # harmonic mean, in percent
    residual_left: float  # mean |r - dW k| / |r|
    residual_predicted: float  # the same, by the identity
    relative_norm: float  # |dW| / |W|
    gather_seconds: float  # keys, values and C
    target_seconds: float
    solve_seconds: float


def update(study: MassStudy, whose: str, n: int, lam: float, spared: Tensor) -> CapacityEntry:
    """One update of the first n of the study's "requests" or "others"."""
    requests, notes = getattr(study, whose)[:n], {}
    r, _, target_seconds = study.residual(whose, n, "gradient")
    K, W = study.at.keys[requests.fact], study.weight
    began = time.perf_counter()
    dW = minedit.memit(study.at.C, K, r, lam, W=W, diagnostics=notes)
    seconds = time.perf_counter() - began
    found = MassEntry("memit", "gradient", lam, n)
    study.score(found, requests, {study.at.name: dW}, spared)
    size = r.double().norm(dim=-1).clamp(min=1e-12)
    return CapacityEntry(
        slots=W.shape[1],
        n=n,
        lam=lam,
        efficacy=found.efficacy,
        paraphrase=found.paraphrase,
        specificity=found.specificity,
        score=found.score,
        residual_left=float((notes["residual_left"] / size).mean()),
        residual_predicted=float((notes["residual_predicted"] / size).mean()),
        relative_norm=notes["relative_norm"],
        gather_seconds=round(study.gathered, 2),
        target_seconds=round(target_seconds, 2),
        solve_seconds=round(seconds, 2),
    )


def sweep(study: MassStudy, n: int) -> list[CapacityEntry]:
    """Every lam, on as many facts that are not scored."""
    m = min(n, len(study.others))
    return [update(study, "others", m, lam, study.choosing) for lam in LAMBDAS]


def capacity_stage(run: Run, model: Model, counts: tuple[int, ...], batch: int) -> dict:
    study = MassStudy(run, model, batch, max(counts))
    swept, edits = [], []
    for n in sorted({min(n, len(study.requests)) for n in counts}):
        tried = sweep(study, n)
        chosen = max(tried, key=lambda entry: entry.score)
        swept += tried
        edits.append(update(study, "requests", n, chosen.lam, study.scored))
    print("\n" + minedit.record_table(edits, COLUMNS, LEGEND))
    return {
        "facts": len(study.queries),
        "known": int(study.known.sum()),
        "sweep": [asdict(entry) for entry in swept],
        "edits": [asdict(entry) for entry in edits],
    }


COLUMNS = dict(slots="slots", n="facts", lam="lam", efficacy="eff", paraphrase="para")
COLUMNS |= dict(specificity="spec", score="score", residual_left="left")
COLUMNS |= dict(residual_predicted="pred", relative_norm="norm", gather_seconds="C s")
COLUMNS |= dict(target_seconds="target s", solve_seconds="solve s")
LEGEND = """\
eff: new answers; para: by the relation's other name; spec: other facts that keep their answers;
score: harmonic mean, percent; left: mean |r - dW k| / |r|, pred: predicted; norm: |dW| / |W|"""


def command(args):
    for run, model in trained(args, make_task=make_task, make_batches=TwoNames):
        began = time.perf_counter()
        entry = capacity_stage(run, model, args.counts, args.edit_batch)
        run.add_results("capacity", entry, began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.capacity", __doc__.split("\n\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="edits in one update")
    parser.set_defaults(**minedit.MASS)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
