"""One update of 10 000 facts, or ten of a thousand? What is left of the first edits after the last.

MEMIT writes n facts in one update; who edits again and again writes a batch at a time. With K_p^T
K_p of all earlier keys added to lam C, and residuals on the weight as it is, batches with given
values add up to one batch (`edit.memit_update`). In practice neither holds: a library forgets the
earlier keys, and the wanted values are sought anew on the edited model. Here 10 000 facts are
edited in ten batches

    carried     earlier keys count, the wanted values are those of the unedited model
    forgotten   earlier keys do not count, the same values
    anew        earlier keys count, values sought on the model as it is (a change is at most as long
                as the unedited value, still)

and after each batch all facts so far and those of the first batch are asked, and others that are
never edited. lam is that of one update of all, chosen on 8000 other facts as in `studies.capacity`:
the second and third way might do better with one of their own.

    python -m studies.sequence --arch lmc --seeds 3 --out runs/sequence

Writes "sequence" into results.json.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch

import edit as editing
import minedit
from minedit import Run, share_of
from models import Model
from studies import capacity
from studies.mass_edit import MassStudy, best
from studies.mass_task import Scores, trained_runs
from studies.training import positive

WAYS = ("carried", "forgotten", "anew")


@dataclass
class SequenceEntry(Scores):
    """The state after one of the batches; scores are of all facts so far."""

    way: str
    batch: int  # from 1
    n: int  # facts edited so far
    lam: float
    first: float  # share of the first batch's facts that have their new answer still
    relative_norm: float | None = None  # |dW| / |W| of all updates so far


def in_batches(study: MassStudy, way: str, n_batches: int, lam: float) -> list[SequenceEntry]:
    """All requests that are scored, in batches."""
    at, model, requests = study.at, study.model, study.scoring.requests
    W = study.weight.clone()  # before all edits
    dW = torch.zeros_like(W)  # of all batches so far
    carried = None  # K^T K of their keys
    sought = study.residual(study.scoring, len(requests), "gradient")[0]
    rows = torch.arange(len(requests)).tensor_split(n_batches)
    first = requests[rows[0]]
    entries = []
    with ExitStack() as edits:
        for mine in rows:
            K = at.keys[requests.fact[mine]]
            if way == "anew":  # what the model as it is lacks
                r, _ = study.mass_residual(at, requests[mine], "gradient", study.known)
            else:  # v* - (W + dW) k
                r = sought[mine] - K @ dW.T
            alive = (K != 0).any(1)
            K, r = K[alive], r[alive]
            update = torch.zeros_like(W)
            if len(K):
                update = minedit.memit(K, r, at.C, lam, carried=carried)
                if way != "forgotten":
                    carried = editing.add_gram(carried, K)
            edits.enter_context(editing.edited(model, {at.name: update}))
            dW += update

            n = int(mine[-1]) + 1
            kept = minedit.last_answers(model, first.tokens) == first.new
            entry = SequenceEntry(way, len(entries) + 1, n, lam, first=share_of(kept))
            study.score(entry, requests[:n], {}, study.scoring)
            entry.relative_norm = float(dW.norm() / W.norm())
            entries.append(entry)
    return entries


def sequence_stage(run: Run, model: Model, n: int, n_batches: int, batch: int) -> list[dict]:
    study = MassStudy(run, model, batch, n)
    n_batches = min(n_batches, len(study.scoring.requests))
    lam = best(capacity.sweep(study, len(study.scoring.requests))).lam
    entries = []
    for way in WAYS:
        entries += in_batches(study, way, n_batches, lam)
    print("\n" + minedit.record_table(entries, COLUMNS, LEGEND))
    return [asdict(entry) for entry in entries]


COLUMNS = dict(way="batches", batch="batch", n="facts", lam="lam", first="first", efficacy="eff")
COLUMNS |= dict(paraphrase="para", specificity="spec", score="score", relative_norm="norm")
LEGEND = """\
first: facts of the first batch that have their new answer still; eff: all facts so far; para: by the
relation's other name; spec: facts never edited that keep their answers; score: harmonic mean of these
three, percent; norm: |dW| / |W|"""


def command(args):
    for run, model in trained_runs(args):
        began = time.perf_counter()
        stage = sequence_stage(run, model, args.facts, args.batches, args.edit_batch)
        run.add_results("sequence", stage, began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.sequence", __doc__.split("\n\n")[0])
    parser.add_argument(
        "--facts", type=positive, default=10_000, help="to be edited, half of all at most"
    )
    parser.add_argument("--batches", type=positive, default=10, help="one after another")
    parser.set_defaults(**minedit.MASS)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
