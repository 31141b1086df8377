"""How many edits does a store hold? Score against slots and edits, after Meng et al. 2022 [1].

MEMIT writes n facts in one update of a layer of d_in inputs. Of each residual it leaves
lam (K C^-1 K^T + lam I)^-1 r, which grows as n comes near d_in: GPT-J, in which 10 000 edits hold
[1], has 16 384. Here the models of `studies.mass_edit` (20 000 facts, every relation under two
names) have stores of 2048 to 16 384 slots, of which one read uses 64; 1000, 3162 and 10 000 facts
are edited in one update of the first read of the first store, by MEMIT with the gradient's target.
lam is chosen for each store and number of edits, by the score of edits of as many other facts (8000
at most), whose specificity other facts tell, too; no request is dropped.

    python -m studies.capacity --arch lmc --seeds 3 --out runs/capacity-16384
    python -m studies.capacity --arch lmc --slots 8192 --d-ff 8192 --seeds 3 --out runs/capacity

Writes "capacity" into results.json.

[1] Meng et al. 2022, MEMIT, arXiv 2210.07229.
"""

import sys
import time
from dataclasses import asdict, dataclass

import edit as editing
import minedit
from minedit import Run
from models import Model
from studies.mass_edit import MassStudy, best
from studies.mass_task import Group, Scores, trained_runs
from studies.training import positive

COUNTS = (1000, 3162, 10_000)
LAMBDAS = (30_000, 10_000, 3000, 1000, 300)  # the most careful first


@dataclass
class CapacityEntry(Scores):
    """What one update of n facts did, in a store of `slots`; None where there is no such figure."""

    slots: int
    n: int
    lam: float
    residual_left: float | None = None  # mean |r - dW k| / |r|
    residual_predicted: float | None = None  # the same, see `predicted`
    relative_norm: float | None = None  # |dW| / |W|
    gather_seconds: float | None = None  # keys, values and C
    target_seconds: float | None = None
    solve_seconds: float | None = None


def update(study: MassStudy, group: Group, n: int, lam: float) -> CapacityEntry:
    """One update of the first n requests of a group."""
    problem = study.problem(group, n, "gradient")
    entry = CapacityEntry(study.weight.shape[1], n, lam)
    began = time.perf_counter()
    try:
        dW = study.closed_form("memit", problem.K, problem.r, lam)
    except ValueError as error:  # lam is too small or too large for this C
        entry.infeasible = str(error)
        return entry
    entry.solve_seconds = round(time.perf_counter() - began, 2)
    entry.gather_seconds = round(study.gathered, 2)
    entry.target_seconds = round(problem.seconds, 2)
    study.score(entry, problem.requests, {study.at.name: dW}, group)
    found = editing.outcome(dW, problem.K, problem.r, study.weight)
    entry.residual_left = minedit.mean_relative(found["residual_left"], problem.r)
    entry.relative_norm = found["relative_norm"]
    return entry


def predicted(study: MassStudy, n: int, lam: float) -> float:
    """Mean |r - dW k| / |r| of the first n requests as it must be, by a system that the update did
    not solve: the dual one, in whitened coordinates."""
    problem = study.problem(study.scoring, n, "gradient")
    X = study.whitening().keys(problem.K)  # X X^T = K C^-1 K^T
    # R - K dW^T = lam (K C^-1 K^T + lam I)^-1 R
    left = lam * editing.solve_gram(X, lam, editing.double(problem.r))
    return minedit.mean_relative(left.norm(dim=-1), problem.r)


def sweep(study: MassStudy, n: int) -> list[CapacityEntry]:
    """Every lam, on as many facts that are not scored."""
    m = study.choosing.largest(n)
    return [update(study, study.choosing, m, lam) for lam in LAMBDAS]


def capacity_stage(run: Run, model: Model, counts: list[int], batch: int) -> dict:
    study = MassStudy(run, model, batch, max(counts))
    swept, edits = [], []
    for n in sorted({study.scoring.largest(n) for n in counts}):
        tried = sweep(study, n)
        swept += tried
        edits.append(update(study, study.scoring, n, best(tried).lam))
    for entry in edits:
        entry.residual_predicted = predicted(study, entry.n, entry.lam)
    print("\n" + minedit.record_table(edits, COLUMNS, LEGEND))
    return {
        "facts": len(study.queries),
        "known": int(study.known.sum()),
        "sweep": [asdict(entry) for entry in swept],
        "edits": [asdict(entry) for entry in edits],
    }


COLUMNS = dict(slots="slots", n="facts", lam="lam", efficacy="eff", paraphrase="para")
COLUMNS |= dict(specificity="spec", score="score", paper_score="as papers")
COLUMNS |= dict(residual_left="left")
COLUMNS |= dict(residual_predicted="pred", relative_norm="norm", gather_seconds="C s")
COLUMNS |= dict(target_seconds="target s", solve_seconds="solve s")
LEGEND = """\
eff: new answers; para: by the relation's other name; spec: other facts that keep their answers;
score: harmonic mean, percent; as papers: likelier than one other answer is enough; left: mean
|r - dW k| / |r|, pred: predicted; norm: |dW| / |W|"""


def command(args):
    for run, model in trained_runs(args):
        began = time.perf_counter()
        stage = capacity_stage(run, model, args.counts, args.edit_batch)
        run.add_results("capacity", stage, began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.capacity", __doc__.split("\n\n")[0])
    parser.add_argument(
        "--counts", type=positive, nargs="+", default=COUNTS, help="edits in one update"
    )
    parser.set_defaults(**minedit.MASS)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
