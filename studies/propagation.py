"""Where is a fact, when is it written, and what follows when it is edited? After Niu 2026 [1].

Three parts, in the cells and at the sizes that the training options name:

    edits   every store and pass, by ROME, MEMIT and the single-row edit, with a prototype or a
            sought value; all stores at once, and in Dense both copies of the fact; neighbours that
            moved; and, separately, scores on the questions that all cells of a seed answer right
    locate  causal tracing of facts and compositions: which state carries the answer [2]
    when    edits that act at some calls of their layer alone; and the answer held as it was, our
            reading of the interchange of a held answer subspace in [1]

    python -m studies.propagation --arch all --seeds 5 --out runs/propagation    # 4 minutes a run

Writes "propagation", "locate" and "when" into results.json. The site is chosen before anything is
scored, and the shrinkage of C there, by edits of other facts, for the edits of every site
(minedit.site_for_edits).

[1] Niu 2026, arXiv 2606.20737.   [2] Meng et al. 2022, ROME, arXiv 2202.05262.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import edit as editing
import kg
import minedit
from minedit import Run, share_of
from models import Model, State, stores
from studies.shrinkage import most_alike, set_apart
from studies.training import check_edits, require_compositions
from studies.when import locate_stage, when_stage

# --- Edits at every site --------------------------------------------------------------------------


class Case(NamedTuple):
    """What is edited and asked of one model, the same at every site."""

    known: minedit.Known
    requests: editing.Requests
    probes: minedit.EditProbes
    shared: tuple[kg.Probes, kg.Probes] | None  # hop 1, hop 2 on what all four cells answer right
    chosen: minedit.APriori
    shrink: float  # of C, at every site


def make_case(
    run: Run,
    model: Model,
    n_edits: int,
    common: tuple[Tensor, Tensor] | None,
    shrink: float | str = 0.0,
) -> Case:
    """`common`: the facts and paths that all cells of the seed answer right, if they are known.
    `shrink`: see `minedit.site_for_edits`."""
    paths, generator = run.paths, run.stream()
    known = minedit.what_is_known(model, paths)
    fact, new, _ = kg.draw_edits(paths, n_edits, generator)
    probes = minedit.edit_probes(paths, known, fact, new, 100, generator)
    shared = None
    if common is not None:
        hop1, _ = kg.hop1_probes(paths, fact, new, *common, known.asked)
        hop2, _ = kg.hop2_probes(paths, fact, new, *common, known.asked)
        shared = (hop1, hop2)
    chosen, at, _ = minedit.site_for_edits(run, model, known, fact, shrink)
    requests = minedit.requests_for(paths, fact, new)
    return Case(known, requests, probes, shared, chosen, at.shrink)


def gather(run: Run, model: Model, case: Case, site: State) -> editing.Site:
    """Keys, values and C at a site, C shrunk as for all edits of this case."""
    return editing.shrunk(minedit.gather(run, model, site), case.shrink)


def distance_to_values(values: Tensor, v: Tensor, chunk: int = 1024) -> Tensor:
    """[n]: how far each row of v [n, d_out] is from the nearest row of `values` [m, d_out]; which
    one that is takes no part in the gradient."""
    nearest = [torch.cdist(part, values).argmin(1) for part in v.detach().split(chunk)]
    return (v - values[torch.cat(nearest)]).norm(dim=-1)


def near_residual(
    model: Model, at: editing.Site, requests: editing.Requests, u: Tensor, known: Tensor
) -> Tensor:
    """As editing.gradient_residual, pulled towards the values that the store holds for `known`
    facts: the loss gets |v0 + r - the nearest|^2 / |v0|^2."""
    stored = at.values[known]

    def pull(value: Tensor, size: Tensor) -> Tensor:
        return (distance_to_values(stored, value) / size[:, 0]).square().sum()

    return editing.gradient_residual(model, at, requests, u, penalty=pull)


def address_overlap(
    model: nn.Module, at: editing.Site, requests: editing.Requests, probe: kg.Probes
) -> float | None:
    """Cosine of the edited fact's key and a composition's at its last token, the largest over the
    layer's calls: mean over the probes."""
    if len(probe.edit) == 0:
        return None
    _, cosines = most_alike(model, at, requests, probe)
    return float(cosines.mean())


def kinds_of_edit(at_chosen_site: bool) -> list[tuple[str, str]]:
    """(method, target) of what is tried at a site; "short" and "near" at the one chosen."""
    kinds = [("rome", "prototype"), ("rome", "gradient")]
    if at_chosen_site:
        kinds += [("rome", "short"), ("rome", "near")]
    return kinds + [("memit", "prototype"), ("row", "prototype"), ("row", "gradient")]


def edit_site(run: Run, model: Model, case: Case, site: State) -> list[dict]:
    """The entries of all kinds of edit at one site."""
    paths, known, requests = run.paths, case.known, case.requests
    at = gather(run, model, case, site)
    head, relation, _ = paths.facts.T
    row = at.keys.abs().argmax(-1)  # the slot of the key's largest entry
    groups = {"same_subject": head, "same_relation": relation, "same_row": row}
    neighbours = {
        name: kg.neighbours(paths, requests.fact, group, known.one_hop)
        for name, group in groups.items()
    }
    stored = at.values[known.facts] if known.facts.any() else at.values
    mean_length = at.values.norm(dim=-1).mean()
    v0 = at.values[requests.fact]  # [n, d_out]
    own_length = v0.norm(dim=-1).clamp(min=1e-12)
    is_chosen = site == case.chosen.site
    of_site = {
        "a_priori": is_chosen,
        "ridge": editing.whiten(at.C).ridge,
        "overlap_hop2": address_overlap(model, at, requests, case.probes.hop2),
        "facts_per_row": 1 + len(neighbours["same_row"].edit) / len(requests),
    }
    entries = []
    for method, target in kinds_of_edit(is_chosen and bool(known.facts.any())):
        edits = edits_of_kind(run, model, case, at, site.at_pass, method, target)
        record = minedit.score(model, edits, case.probes)
        entry = record.entry() | of_site
        for name, probes in neighbours.items():
            moved = minedit.ask(model, edits, probes) != probes.answer
            entry[f"{name}_moved"] = share_of(moved)
        if case.shared is not None:
            entry |= score_shared(model, edits, case)
        distance = distance_to_values(stored, v0 + edits.r)
        entry["distance"] = float((distance / mean_length).mean())
        entry["length"] = float((edits.r.norm(dim=-1) / own_length).mean())
        entry["gradient_for_want_of_a_prototype"] = edits.n_fallbacks
        entries.append(entry)
    return entries


def edit_every_store(run: Run, model: Model, case: Case) -> dict | None:
    """The entry of edits by ROME with a prototype in all stores at once, each with the key and the
    value of its first read; None for a model with one store."""
    first_reads = {}
    for state in stores(run.config):
        first_reads.setdefault(state.module, state)
    if len(first_reads) < 2:
        return None
    several = [rome_edits(run, model, case, site) for site in first_reads.values()]
    return entry_of_several(model, several, case.probes, "every store")


def edit_both_copies(run: Run, model: Model, case: Case) -> dict | None:
    """Without sharing, a fact seems to be held twice: where its own question finds it, and in the
    last store, where compositions look for it as second hop, under other keys. The entry of edits
    of both; the compositions that lend the second copy its key are not asked. None for the cells
    that share, and where there is one store."""
    if run.config.loop or run.config.memory or len(stores(run.config)) == 1:
        return None
    lent, probes = set_apart(case.probes, run.stream())
    first = rome_edits(run, model, case, site_of_first_copy(run, case))
    second = edit_second_copy(run, model, case, lent)
    return entry_of_several(model, [first, second], probes, "both copies")


def site_of_first_copy(run: Run, case: Case) -> State:
    """The chosen site; where that is the last store, the one before it with the largest effect."""
    *earlier, last = stores(run.config)
    if case.chosen.site != last:
        return case.chosen.site
    effects = case.chosen.effects[:-1]
    return earlier[effects.index(max(effects))]


def rome_edits(run: Run, model: Model, case: Case, site: State) -> minedit.Edits:
    """By ROME with a prototype at one site."""
    at = gather(run, model, case, site)
    return minedit.make_edits(model, run.paths, case.known.facts, case.requests, at, site.at_pass)


def entry_of_several(
    model: Model, several: list[minedit.Edits], probes: minedit.EditProbes, name: str
) -> dict:
    """The entry of edits made in several layers at once."""
    answers = partial(ask_under_all, model, several)
    entry = minedit.record_of(several[0], probes, answers).entry()
    return entry | {"site": name, "pass": None, "a_priori": False}


def edit_second_copy(run: Run, model: Model, case: Case, lent: kg.Probes) -> minedit.Edits:
    """Edits by ROME at the last store. The key: the mean of those of the `lent` compositions that
    end in the fact, its own where none was lent. The value: the mean of those of compositions that
    are answered by the wanted tail; where there are none, nothing is changed."""
    site = stores(run.config)[-1]
    paths, known, requests = run.paths, case.known, case.requests
    at = gather(run, model, case, site)
    keys = at.keys.clone()
    lent_keys, _ = editing.last_token(model, site.module, site.call, lent.tokens)
    for edit in lent.edit.unique():
        keys[requests.fact[edit]] = lent_keys[lent.edit == edit].mean(0)
    at = replace(at, keys=keys)

    is_answered = known.right & known.asked & (paths.second >= 0)
    answers = paths.two_hop[is_answered]
    _, values = editing.last_token(model, site.module, site.call, paths.tokens[is_answered])
    W = at.layer.weight.detach()
    r = W.new_zeros(len(requests), W.shape[0])
    for i, new in enumerate(requests.new.tolist()):
        alike = values[answers == new]
        if len(alike):
            r[i] = alike.mean(0) - W @ keys[requests.fact[i]]
    u = editing.direction("rome", at, requests)
    return minedit.Edits(at, site.at_pass, "rome", "prototype", u, r)


def ask_under_all(
    model: Model, several: list[minedit.Edits], probes: kg.Probes, chunk: int = 512
) -> Tensor:
    """minedit.ask with the probe's edit in several layers at once."""
    answers = []
    for i, tokens in zip(probes.edit.split(chunk), probes.tokens.split(chunk)):
        with torch.no_grad(), ExitStack() as edits:
            for one in several:
                edits.enter_context(editing.rank_one(one.at.layer, one.u[i], one.r[i]))
            answers.append(model(tokens)[:, -1].argmax(-1))
    return torch.cat(answers)


def edits_of_kind(
    run: Run, model: Model, case: Case, at: editing.Site, at_pass: int, method: str, target: str
) -> minedit.Edits:
    """As minedit.make_edits, with two targets besides: "near", a gradient's that is pulled to the
    store's values, and "short", which is sought as for mass edits, as long as the value at most."""
    known, requests = case.known.facts, case.requests
    if target not in ("near", "short"):
        return minedit.make_edits(model, run.paths, known, requests, at, at_pass, method, target)
    u = editing.direction(method, at, requests)
    if target == "near":
        r = near_residual(model, at, requests, u, known)
    else:
        r, _ = minedit.mass_residual(run, model, at, requests, "gradient", known, len(requests))
    return minedit.Edits(at, at_pass, method, target, u, r)


def score_shared(model: Model, edits: minedit.Edits, case: Case) -> dict:
    """Hop 1 and hop 2 on what all cells answer right."""
    direct = case.probes.direct
    success = minedit.ask(model, edits, direct) == direct.answer
    found = {}
    for name, probes in zip(("hop1_shared", "hop2_shared"), case.shared):
        right = minedit.ask(model, edits, probes) == probes.answer
        right = right[success[probes.edit]]
        found |= {name: share_of(right), f"probes_{name}": len(right)}
    return found


EDIT_COLUMNS = {"site": "site", "pass": "pass", "method": "method", "target": "target"}
EDIT_COLUMNS |= dict(direct="direct", hop1="hop 1", hop2="hop 2")
EDIT_COLUMNS |= dict(unrelated_one_hop_moved="facts", unrelated_two_hop_moved="comps.")
EDIT_COLUMNS |= dict(same_row_moved="row", distance="far", length="length")
EDIT_LEGEND = """\
direct: edited facts with the new answer; hop 1, hop 2: compositions that begin, that end with one,
now right. facts, comps., row: other facts, other compositions, facts of the same largest key entry
that moved. near: sought near stored values; short: as for mass edits; far: from the nearest value, in
their mean length; length: |r| in lengths of the value that it changes"""


def edits_stage(run: Run, model: Model, case: Case) -> dict:
    """Every store and pass, by every kind of edit."""
    entries = []
    for site in stores(run.config):
        entries += edit_site(run, model, case, site)
    for of_several in (edit_every_store, edit_both_copies):
        entry = of_several(run, model, case)
        if entry is not None:
            entries.append(entry)
    left_out = minedit.listed(case.probes.left_out)
    print(f"\nedits of {len(case.requests)} facts; left out: {left_out}")
    print(f"{minedit.entry_table(entries, EDIT_COLUMNS)}\n{EDIT_LEGEND}")
    return {"edits": entries, "left_out": case.probes.left_out}


# --- Command line ---------------------------------------------------------------------------------


def study(run: Run, model: Model, args, common: tuple[Tensor, Tensor] | None):
    """All three parts for one trained model."""
    print(f"\n{run.arch}, seed {run.seed}:")
    began = time.perf_counter()
    case = make_case(run, model, args.n_edits, common, shrink="auto")
    site = case.chosen.site
    run.results["a_priori"] = {"site": site.module, "call": site.call, "pass": site.at_pass}
    run.results["a_priori"] |= {"effects": case.chosen.effects, "n": case.chosen.n}
    run.add_results("propagation", edits_stage(run, model, case), began)
    began = time.perf_counter()
    run.add_results("locate", locate_stage(run, model, case.known, args.n_edits), began)
    began = time.perf_counter()
    found = when_stage(run, model, case.known, args.n_edits, case.shrink)
    run.add_results("when", found, began)


def command(args):
    require_compositions(args)
    runs = minedit.prepare(args, check=check_edits)
    for seed in dict.fromkeys(run.seed for run in runs):
        models = {}
        for run in runs:
            if run.seed == seed:
                models[run] = minedit.trained_model(run, args)
        common = known_to_all(models) if args.arch == "all" else None
        for run, model in models.items():
            study(run, model, args, common)


def known_to_all(models: dict[Run, Model]) -> tuple[Tensor, Tensor]:
    """The facts [n_facts] and the paths [n_paths], bool, that all models of a seed answer right."""
    known = [minedit.what_is_known(model, run.paths) for run, model in models.items()]
    facts = torch.stack([of_one.facts for of_one in known]).all(0)
    right = torch.stack([of_one.right for of_one in known]).all(0)
    return facts, right


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.propagation", __doc__.split("\n\n")[0])
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
