"""Is grokking worthwhile for new facts? What is composed with facts that are added by fine-tuning.

After He et al. 2026, arXiv 2601.09049, who add 2000 facts to 40 000: here, too, a twentieth as many
as there are, between entities and relations that the model knows, at questions that had no answer
(so the graph must leave some: --out-degree below --relations). All facts, old and new, and the old
compositions are trained on, from scratch, from the weights that had memorized and from the last
ones; compositions with a new fact never are. The old fact beside a new one is ID: it was composed
in training. With the recipe's rates and weight decay ("transfer"), and with a tenth of them
("transfer_gentle"), not from scratch, which would want more steps.

    python -m studies.transfer --arch all --seeds 5 --out-degree 19 --eval-every 50 --out runs/new

Writes "transfer" and "transfer_gentle" into results.json; a run takes 6 minutes on one core.
"""

import copy
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

import kg
import minedit
from minedit import Run, require
from studies.training import Moments, further, positive, require_compositions

KINDS = ("new->old", "old->new", "new->new")  # first fact -> second
RATES = {"transfer": 1.0, "transfer_gentle": 0.1}  # {entry of results.json: share of the rates}
NEW = 0.05  # new facts for each old one

# --- The larger graph -----------------------------------------------------------------------------


def questions_without_answer(run: Run) -> Tensor:
    """[n, 2]: head, no clone, and relation."""
    graph = run.task.graph
    return (graph.facts[: graph.n_answers] < 0).nonzero()


def with_new_facts(run: Run) -> kg.KnowledgeGraph:
    """The run's graph with NEW facts for each old one, each with any tail but its head."""
    graph, generator = run.task.graph, run.stream()
    missing = questions_without_answer(run)
    n = max(1, round(NEW * len(run.paths.facts)))
    head, relation = missing[torch.randperm(len(missing), generator=generator)[:n]].T
    tail = torch.randint(graph.n_answers - 1, (len(head),), generator=generator)
    tail += tail >= head  # skip the head itself
    return replace(graph, facts=graph.facts.index_put((head, relation), tail))


def grown(run: Run) -> Run:
    """The run in its graph `with_new_facts`; the masks of its paths are the old sets, and KINDS."""
    graph = with_new_facts(run)
    # all paths: the sets that they are split into are replaced below
    paths = kg.split(graph, ood_fraction=0, train_fraction=1, seed=0, most_paths=2**62)
    head, relation, _ = paths.facts.T
    is_new = (run.task.graph.facts < 0)[head, relation]
    is_id = ~is_new
    is_id[~is_new] = ~run.paths.ood_fact.cpu()  # old facts keep their order

    composed = paths.second >= 0
    first_new, second_new = is_new[paths.first], is_new[paths.second] & composed
    first_id, second_id = is_id[paths.first], is_id[paths.second] & composed
    first_id = first_id & paths.real[paths.first]  # clones are not asked
    masks = {
        "new->old": first_new & second_id,
        "old->new": first_id & second_new,
        "new->new": first_new & second_new,
    }
    is_old = composed & ~first_new & ~second_new
    for name, mask in run.paths.masks.items():
        masks[name] = torch.zeros_like(composed)
        masks[name][is_old] = mask[run.paths.second >= 0].cpu()  # and old paths theirs

    child = copy.copy(run)
    child.task = run.task._replace(graph=graph)
    child.paths = replace(paths, masks=masks).to(run.device)
    return child


# --- Training on ----------------------------------------------------------------------------------


def with_rates(recipe: minedit.Recipe, share: float) -> minedit.Recipe:
    """The recipe with a share of its rates and of its weight decay."""
    scaled = {name: share * getattr(recipe, name) for name in ("lr", "muon_lr", "weight_decay")}
    return replace(recipe, **scaled)


def transfer_stage(run: Run, moments: dict, steps: int, share: float) -> dict:
    """{start: accuracies after `steps` more steps, and the curve to them}, with a `share` of the
    recipe's rates and weight decay. moments: {name: (record, weights)}."""
    child = grown(run)
    child.recipe = with_rates(run.recipe, share)
    n = {kind: int(child.paths.masks[kind].sum()) for kind in KINDS}
    n_new = len(child.paths.facts) - len(run.paths.facts)
    print(f"\n{n_new} new facts; compositions with them: {minedit.listed(n)}")
    print(f"{share:g} of the recipe's rates and weight decay")
    starts = {}
    if share == 1:
        starts["scratch"] = child.fresh().model.state_dict()
    for name in ("memorized", "end"):
        if name in moments:
            _, weights = moments[name]
            starts[name] = weights
    at = sorted({*range(0, steps, max(1, steps // 12)), steps})
    found = {}
    for name, start in starts.items():
        curve = []
        for moment in further(child, start, at, 0):
            accuracy = minedit.accuracy(moment.average, child.paths)
            curve.append({"step": moment.steps} | accuracy)
        entry = curve[-1] | {"from": name, "n": n, "curve": curve}
        entry["step_facts"] = minedit.first_step(curve, one_hop=0.99)
        for kind in KINDS:
            entry[f"step_{kind}"] = minedit.first_step(curve, **{kind: 0.9})
        found[name] = entry
    print(transfer_table(found))
    return found


def transfer_table(found: dict[str, dict]) -> str:
    rows = [("from", *KINDS, "OOD", "facts", "facts at step")]
    for name, entry in found.items():
        shares = (minedit.cell(entry[key]) for key in (*KINDS, "ood", "one_hop"))
        rows.append((name, *shares, minedit.cell(entry["step_facts"], "d")))
    return (
        f"\n{minedit.table(rows)}\n"
        "compositions first fact -> second, none of them trained; OOD: the old ones; facts: all,\n"
        "and the step at which 0.99 of them are known"
    )


# --- Command line ---------------------------------------------------------------------------------


def check_new_facts(run: Run):
    """UserError where none can be added, or where not all paths of the old ones are listed."""
    full = "every question has an answer, so that no fact can be added"
    message = f"{run.folder}: {full}; train with --out-degree below --relations"
    require(len(questions_without_answer(run)) > 0, message)
    head, _, tail = run.paths.facts.T
    out_degree = torch.bincount(head, minlength=run.task.graph.n_entities)
    n_paths = int(out_degree[tail].clamp(min=1).sum())  # a fact that ends nowhere has one row
    drawn = f"{len(run.paths.tokens)} of {n_paths} paths were drawn"
    message = f"{run.folder}: {drawn}; train with --most-paths {n_paths}"
    require(len(run.paths.tokens) == n_paths, message)


def command(args):
    require_compositions(args)
    runs = minedit.prepare(args, check=check_new_facts)
    kept = {run: Moments(run) for run in runs}
    for run, moments in kept.items():
        minedit.trained_model(run, args, moments)
        for name, share in RATES.items():
            began = time.perf_counter()
            found = transfer_stage(run, moments.found, args.transfer_steps, share)
            run.add_results(name, found, began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.transfer", __doc__.split("\n\n")[0])
    parser.add_argument("--transfer-steps", type=positive, default=600, help="from each start")
    quick = minedit.QUICK | dict(label_noise=0.0, memorize=0, out_degree=3, transfer_steps=20)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": quick}))


if __name__ == "__main__":
    sys.exit(main())
