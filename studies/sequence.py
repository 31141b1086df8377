"""One update of 10 000 facts, or ten of a thousand? What is left of the first edits after the last.

MEMIT writes n facts in one update; who edits again and again writes a batch at a time. With K_p^T K_p
of all earlier keys added to lam C, and residuals on the weight as it is, batches with given values add
up to one batch (`edit.memit_update`). In practice neither holds: a library forgets the earlier keys,
and the wanted values are sought anew on the edited model. Here 10 000 facts are edited in ten batches

    carried     earlier keys count, the wanted values are those of the unedited model
    forgotten   earlier keys do not count, the same values
    anew        earlier keys count, values sought on the model as it is

and after each batch all facts so far and those of the first batch are asked, and others that are
never edited. lam is that of one update of all, chosen on 8000 other facts as in `studies.capacity`.

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
from studies.mass_edit import MassEntry, MassStudy, TwoNames, make_task
from studies.training import trained

WAYS = ("carried", "forgotten", "anew")


@dataclass
class SequenceEntry:
    """The state after one of the batches."""

    way: str
    batch: int  # from 1
    n: int  # facts edited so far
    lam: float
    first: float  # share of the first batch's facts that have their new answer still
    efficacy: float  # the same of all facts so far
    paraphrase: float  # by the relation's other name
    specificity: float
    score: float  # harmonic mean of the last three, in percent
    relative_norm: float  # |dW| / |W| of all updates so far


def in_batches(study: MassStudy, way: str, size: int, lam: float) -> list[SequenceEntry]:
    """All requests of the study, `size` at a time."""
    at, W, entries = study.at, study.weight.clone(), []
    sought = (
        None if way == "anew" else study.residual("requests", len(study.requests), "gradient")[0]
    )
    dW, carried = torch.zeros_like(W), None
    with ExitStack() as edits:
        for start in range(0, len(study.requests), size):
            batch = study.requests[start : start + size]
            K = at.keys[batch.fact]
            if way == "anew":
                asked = (at, batch, "gradient", study.known, study.batch)
                r, _ = minedit.mass_residual(study.run, study.model, *asked)
            else:  # v - (W + dW) k
                r = sought[start : start + size] - K @ dW.T
            update = minedit.memit(at.C, K, r, lam, carried=carried)
            if way != "forgotten":
                carried = editing.add_gram(carried, K)
            edits.enter_context(editing.edited(study.model, {at.name: update}))
            dW += update

            so_far = study.requests[: start + len(batch)]
            found = MassEntry("memit", "gradient", lam, len(so_far))
            study.score(found, so_far, {}, study.scored)
            first = study.requests[:size]
            kept = minedit.last_answers(study.model, first.tokens) == first.new
            entry = SequenceEntry(
                way=way,
                batch=len(entries) + 1,
                n=len(so_far),
                lam=lam,
                first=share_of(kept),
                efficacy=found.efficacy,
                paraphrase=found.paraphrase,
                specificity=found.specificity,
                score=found.score,
                relative_norm=float(dW.norm() / W.norm()),
            )
            entries.append(entry)
    return entries


def sequence_stage(run: Run, model: Model, n: int, n_batches: int, batch: int) -> list[dict]:
    study = MassStudy(run, model, batch, n)
    n = len(study.requests)
    minedit.require(n >= n_batches, f"--batches {n_batches}: only {n} facts are edited")
    lam = max(capacity.sweep(study, n), key=lambda entry: entry.score).lam
    entries = []
    for way in WAYS:
        entries += in_batches(study, way, -(-n // n_batches), lam)
    print("\n" + minedit.record_table(entries, COLUMNS, LEGEND))
    return [asdict(entry) for entry in entries]


COLUMNS = dict(way="batches", batch="batch", n="facts", lam="lam", first="first", efficacy="eff")
COLUMNS |= dict(paraphrase="para", specificity="spec", score="score", relative_norm="norm")
LEGEND = """\
first: facts of the first batch that have their new answer still; eff: all facts so far; para: by the
relation's other name; spec: facts never edited that keep their answers; score: harmonic mean of these
three, percent; norm: |dW| / |W|"""


def command(args):
    for run, model in trained(args, make_task=make_task, make_batches=TwoNames):
        began = time.perf_counter()
        stage = sequence_stage(run, model, args.facts, args.batches, args.edit_batch)
        run.add_results("sequence", stage, began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.sequence", __doc__.split("\n\n")[0])
    parser.add_argument(
        "--facts", type=int, default=10_000, help="to be edited, half of all at most"
    )
    parser.add_argument("--batches", type=int, default=10, help="one after another")
    parser.set_defaults(**minedit.MASS)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
