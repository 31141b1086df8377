"""New facts by fine-tuning, and what is composed with them, part of studies/circuits.py.

After He et al. 2026, arXiv 2601.09049: the graph grows by 2/5 more entities and 1/5 more relations,
and a question without a fact gets one as often as the old graph's questions have one. All facts,
old and new, and the old compositions are trained on, from scratch, from the weights that had
memorized and from the last ones; compositions with new facts never are.
With the recipe's rates and weight decay, and with a tenth of them.
"""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kg
import minedit
from minedit import Run
from studies.training import further

KINDS = ("new->old", "old->new", "new->new")  # first fact -> second
RATES = {"transfer": 1.0, "transfer_gentle": 0.1}  # {entry of results.json: share of the rates}


def grown(run: Run) -> Run:
    """The run in the larger graph. Sets by the age of both facts are added to the masks; in
    new->new both heads are new and the second relation is old."""
    old = run.task.graph.facts
    E, R = old.shape
    N, M = E + max(2, 2 * E // 5), R + max(1, R // 5)
    kept = F.pad(old, (0, M - R, 0, N - E), value=-1)
    density = (old >= 0).double().mean()
    is_new = (kept < 0) & (torch.rand(kept.shape, generator=run.stream()) < density)
    fresh = kg.synthetic(N, M, 2**58 + run.seed).facts
    graph = kg.from_table(torch.where(is_new, fresh, kept))

    paths = kg.split(graph, 0, 1, 0)
    composed = paths.second >= 0
    new_fact = is_new[paths.facts[:, 0], paths.facts[:, 1]]
    first, second = new_fact[paths.first], new_fact[paths.second] & composed
    rows = (composed & ~first & ~second).nonzero().flatten()  # the old ones, in their old order
    masks = {}
    for name, mask in run.paths.masks.items():
        was = mask[run.paths.second >= 0].cpu()
        masks[name] = torch.zeros_like(composed).index_copy(0, rows, was)
    new_heads = (paths.tokens[:, 0] >= E) & (paths.one_hop >= E)
    masks["new->old"] = composed & first & ~second
    masks["old->new"] = ~first & second
    masks["new->new"] = first & second & new_heads & (paths.tokens[:, 2] < N + R)

    child = copy.copy(run)
    child.task = run.task._replace(graph=graph, n_relations=M)
    child.paths = replace(paths, masks=masks).to(run.device)
    child.config = replace(run.config, n_entities=N, n_relations=M)
    return child


def with_rates(recipe: minedit.Recipe, share: float) -> minedit.Recipe:
    """The recipe with a share of its rates and of its weight decay."""
    scaled = {name: share * getattr(recipe, name) for name in ("lr", "muon_lr", "weight_decay")}
    return replace(recipe, **scaled)


def transfer_stage(run: Run, moments: dict, steps: int, share: float) -> dict:
    """{start: accuracies at the end, by kind of composition, and the curve to them}, with a share
    of the recipe's rates."""
    child = grown(run)
    child.recipe = with_rates(run.recipe, share)
    E, R = run.task.graph.facts.shape
    n = {kind: int(child.paths.masks[kind].sum()) for kind in KINDS}
    n_new = len(child.paths.facts) - len(run.paths.facts)
    print(f"\n{n_new} new facts; compositions with them: {minedit.listed(n)}")
    print(f"{share:g} of the recipe's rates and weight decay")
    fresh = {name: p.cpu() for name, p in child.fresh().model.state_dict().items()}
    N = child.task.graph.n_entities
    place = torch.tensor([*range(E), *range(N, N + R)])  # of the old tokens among the new

    def enlarged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old weights with fresh embeddings for the new tokens."""
        old = weights["embedding.weight"][: E + R]
        embedding = fresh["embedding.weight"].index_copy(0, place, old)
        return weights | {"embedding.weight": embedding}

    starts = {"scratch": fresh}
    for name, (_, weights) in moments.items():
        if name != "before":
            starts[name] = enlarged(weights)
    at = sorted({*range(0, steps, max(1, steps // 12)), steps})
    found = {}
    for name, start in starts.items():
        curve = []
        for moment in further(child, start, at, 0):
            accuracy = minedit.accuracy(moment.average, child.paths)
            curve.append({"step": moment.steps} | accuracy)
        found[name] = curve[-1] | {"from": name, "n": n, "curve": curve}
        found[name]["step_facts"] = minedit.first_step(curve, one_hop=0.99)
        for kind in KINDS:
            found[name][f"step_{kind}"] = minedit.first_step(curve, **{kind: 0.9})
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
