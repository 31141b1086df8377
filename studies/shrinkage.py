"""How much should C be shrunk, and is a key averaged over contexts better? On a user's triples.

On a real graph a few hundred or thousand facts are read through as many slots: C is all but
singular, and ROME's C^-1 k recognises the one key that it was given, not the same fact's key as a
composition reads it. Two remedies, at every shrinkage of C (edit.shrunk), for edits by ROME with a
prototype at the site of --edit:

    own        the key with which the fact's own question reads the store
    contexts   the mean of it and of the keys with which known compositions that end in the fact
               read it, half of them and 8 at most; these are not among the probes, of either key
               [1, 2]

    python -m studies.shrinkage --triples FILE.tsv --tails numbered --seeds 3 --out runs/mine

Writes "tradeoff" into results.json; a minute a run beside the training. The curve is of the facts
that --edit scores, with fewer compositions: it shows what --shrink auto, which chooses on other
facts, could have reached.

[1] Meng et al. 2022, ROME, arXiv 2202.05262, section 3.1: a key over random prefixes.
[2] Gupta et al. 2024, arXiv 2403.07175: key and residual of one and the same key, as here.
"""

import sys
import time
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import edit as editing
import kg
import minedit
from minedit import EditRecord, Run
from models import Model
from studies.training import check_edits, require_compositions, trained

SHRINKS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MOST_CONTEXTS = 8  # compositions whose keys are averaged, of an edit


class Contexts(NamedTuple):
    """Compositions that lend their keys to the edited facts, and the probes without them."""

    lent: kg.Probes
    probes: minedit.EditProbes


def set_apart(probes: minedit.EditProbes, generator: torch.Generator) -> Contexts:
    """Of the hop 2 probes of each edit a random half, at most MOST_CONTEXTS, lend their keys; the
    others stay probes."""
    edit = probes.hop2.edit
    is_lent = torch.zeros_like(edit, dtype=torch.bool)
    for one in edit.unique():
        mine = (edit == one).nonzero().flatten()
        order = torch.randperm(len(mine), generator=generator).to(mine.device)
        n_lent = min(len(mine) // 2, MOST_CONTEXTS)
        is_lent[mine[order[:n_lent]]] = True
    lent = kg.Probes(*(column[is_lent] for column in probes.hop2))
    kept = kg.Probes(*(column[~is_lent] for column in probes.hop2))
    return Contexts(lent, probes._replace(hop2=kept))


def mean_keys(
    model: Model, at: editing.Site, requests: editing.Requests, lent: kg.Probes
) -> editing.Site:
    """The site with, for every edited fact, the mean of its own key and of those with which the
    compositions `lent` read it: at their last token, at the call of the layer whose key is most
    like the fact's own; and with the value of this very mean key (of which prototypes are made, too).
    """
    total = at.keys[requests.fact].clone()
    count = torch.ones(len(total), 1, dtype=total.dtype, device=total.device)
    for edit, tokens in zip(lent.edit.split(512), lent.tokens.split(512)):
        keys, _ = editing.record(model, at.layer, tokens)  # [call, m, token, d_in]
        keys = keys[:, :, -1]
        alike = F.cosine_similarity(keys, at.keys[requests.fact[edit]], dim=-1)  # [call, m]
        rows = torch.arange(len(edit), device=edit.device)
        total.index_add_(0, edit, keys[alike.argmax(0), rows])
        count.index_add_(0, edit, torch.ones_like(count[edit]))
    mean = total / count
    keys = at.keys.index_copy(0, requests.fact, mean)
    weight = at.layer.weight.detach()  # [d_out, d_in]
    values = at.values.index_copy(0, requests.fact, mean @ weight.T)
    return replace(at, keys=keys, values=values)


def tradeoff(run: Run, model: Model, n_edits: int) -> list[dict]:
    """What edits of `n_edits` facts do at every shrinkage, with either key: an entry each."""
    paths, generator = run.paths, run.stream()
    known = minedit.what_is_known(model, paths)
    fact, new, _ = kg.draw_edits(paths, n_edits, generator)
    probes = minedit.edit_probes(paths, known, fact, new, 100, generator)
    lent, probes = set_apart(probes, generator)
    requests = minedit.requests_for(paths, fact, new)
    chosen = minedit.a_priori_site(model, paths, fact, known.facts, run.stream()).site
    own = minedit.gather(run, model, chosen)
    sites = {"own": own, "contexts": mean_keys(model, own, requests, lent)}
    entries = []
    for shrink in SHRINKS:
        for key, at in sites.items():
            there = editing.shrunk(at, shrink)
            edits = minedit.make_edits(model, paths, known.facts, requests, there, chosen.at_pass)
            record: EditRecord = minedit.score(model, edits, probes)
            entries.append({"key": key} | record.entry())
    return entries


COLUMNS = dict(key="key", shrink="shrink", direct="edited fact", hop1="hop 1", hop2="hop 2")
COLUMNS |= dict(unrelated_one_hop_moved="moved: facts", unrelated_two_hop_moved="compositions")


def tradeoff_table(entries: list[dict]) -> str:
    rows = [tuple(COLUMNS.values())]
    for entry in entries:
        shown = entry | {"shrink": f"{entry['shrink']:g}"}
        values = (shown[name] for name in COLUMNS)
        rows.append([x if isinstance(x, str) else minedit.cell(x) for x in values])
    return minedit.table(rows)


def study(run: Run, model: Model, n_edits: int):
    print(f"\n{run.arch}, seed {run.seed}: ROME, prototype, by shrinkage of C and key:\n")
    began = time.perf_counter()
    entries = tradeoff(run, model, n_edits)
    print(tradeoff_table(entries))
    run.add_results("tradeoff", entries, began)


def command(args):
    require_compositions(args)
    for run, model in trained(args, check=check_edits):
        study(run, model, args.n_edits)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.shrinkage", __doc__.split("\n\n")[0])
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
