"""What should C cover? ROME leaves alone what C, the second moment of a layer's usual keys, covers.

An edited weight acts at every call of its layer, and every kind of input comes by. Edits by ROME at
the site of --edit, of the same facts, with C over:

    here         what --edit takes, without shrinkage: the paths at the call that is edited, and the
                 facts' own questions at every call
    paths        the paths at the call that is edited
    questions    the facts' questions at every call
    all          paths and questions at every call, those among them at which a composition is to
                 notice the edit
    nothing      C = I, the smallest change of the weight
    half         as here, of half of the entities as heads; what moves is then asked of the other
                 half alone, which C has not seen (elsewhere C covers all that is asked)

    python -m studies.second_moment --arch all --seeds 5 --out runs/main    # half a minute a run

Writes "second_moment" into results.json. None of them is chosen here: what C covers was decided on
other seeds (results/RECIPE.md).
"""

import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

import edit as editing
import kg
import minedit
from minedit import Run
from models import Model
from studies.propagation import make_case
from studies.training import check_edits, require_compositions, trained

TARGETS = ("prototype", "gradient")


def is_covered(run: Run) -> Tensor:
    """Of each entity, whether "half" covers what begins with it."""
    n = run.task.graph.n_entities
    return (torch.randperm(n, generator=run.stream()) < n // 2).to(run.device)


def not_covered(probes: kg.Probes, covered: Tensor) -> kg.Probes:
    """Those that begin with other entities."""
    return probes.where(~covered[probes.tokens[:, 0]])


def moments(run: Run, model: Model, at: editing.Site) -> dict[str, Tensor]:
    """{what C covers: C [d_in, d_in]}."""
    questions, paths = run.paths.queries, run.ordinary()
    covered = is_covered(run)
    some_questions, some_paths = questions[covered[questions[:, 0]]], paths[covered[paths[:, 0]]]

    def empty() -> editing.Moment:
        return editing.Moment(model, at.layer)

    return {
        "here": at.C,
        "paths": empty().add(paths, at.call).mean(),
        "questions": empty().add(questions).mean(),
        "all": empty().add(questions).add(paths).mean(),
        "nothing": torch.eye(len(at.C)).to(at.C),
        "half": empty().add(some_questions).add(some_paths, at.call).mean(),
    }


def second_moment_stage(run: Run, model: Model, n_edits: int) -> list[dict]:
    """An entry for each C and each target, of edits of the same facts."""
    case = make_case(run, model, n_edits, None)
    site, known, requests = case.chosen.site, case.known.facts, case.requests
    at = minedit.gather(run, model, site)
    covered = is_covered(run)
    beyond = case.probes._replace(
        facts=not_covered(case.probes.facts, covered),
        compositions=not_covered(case.probes.compositions, covered),
    )
    entries = []
    for covers, C in moments(run, model, at).items():
        there = replace(at, C=C)
        probes = beyond if covers == "half" else case.probes
        for target in TARGETS:
            edits = minedit.make_edits(
                model, run.paths, known, requests, there, site.at_pass, "rome", target
            )
            record = minedit.score(model, edits, probes)
            entries.append({"covers": covers} | record.entry())
    return entries


COLUMNS = dict(covers="C covers", target="target", direct="edited fact", hop1="hop 1", hop2="hop 2")
COLUMNS |= dict(unrelated_one_hop_moved="moved: facts", unrelated_two_hop_moved="compositions")


def command(args):
    require_compositions(args)
    for run, model in trained(args, check=check_edits):
        print(f"\n{run.arch}, seed {run.seed}: ROME, by what C covers:\n")
        began = time.perf_counter()
        entries = second_moment_stage(run, model, args.n_edits)
        print(minedit.entry_table(entries, COLUMNS))
        run.add_results("second_moment", entries, began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.second_moment", __doc__.split("\n\n")[0])
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
