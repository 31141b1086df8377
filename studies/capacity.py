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


class CapacityStudy:
    """MEMIT of many facts of one model, its targets sought once."""

    def __init__(self, run: Run, model: Model, batch: int):
        self.mass = MassStudy(run, model, batch)
        self.plan = self.mass.plan
        self.sought, self.seconds = {}, {}
        for name in ("requests", "others"):
            began = time.perf_counter()
            wanted = getattr(self.plan, name)
            self.sought[name], _ = self.mass.targets(wanted, "gradient")
            self.seconds[name] = (time.perf_counter() - began) / len(wanted)

    def edit(self, name: str, n: int, lam: float, spared: Tensor) -> CapacityEntry:
        """One update of the first n of the plan's "requests" or "others"."""
        at, requests = self.mass.at, getattr(self.plan, name)[:n]
        r, notes = self.sought[name][:n], {}
        began = time.perf_counter()
        W = at.layer.weight.detach()
        dW = minedit.memit(at.C, at.keys[requests.fact], r, lam, W=W, diagnostics=notes)
        seconds = time.perf_counter() - began
        found = MassEntry("memit", "gradient", lam, n)
        self.mass.score(found, requests, {at.name: dW}, spared)
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
            gather_seconds=round(self.mass.gathered, 2),
            target_seconds=round(n * self.seconds[name], 2),
            solve_seconds=round(seconds, 2),
        )


def capacity_stage(run: Run, model: Model, counts: tuple[int, ...], batch: int) -> dict:
    study = CapacityStudy(run, model, batch)
    largest = len(study.plan.requests)
    minedit.require(largest >= 5, f"{2 * largest} facts can be edited: too few, 10 at least")
    sweep, edits = [], []
    for n in sorted({min(n, largest) for n in counts}):
        m = min(n, len(study.plan.others))
        tried = [study.edit("others", m, lam, study.mass.choosing) for lam in LAMBDAS]
        chosen = max(tried, key=lambda entry: entry.score)
        sweep += tried
        edits.append(study.edit("requests", n, chosen.lam, study.mass.scored))
    print("\n" + minedit.record_table(edits, COLUMNS, LEGEND))
    return {
        "facts": len(study.mass.queries),
        "known": int(study.mass.known.sum()),
        "sweep": [asdict(entry) for entry in sweep],
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
