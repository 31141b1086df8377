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
facts, could have reached (it tries 30, too; the curve ends at 10).

[1] Meng et al. 2022, ROME, arXiv 2202.05262, section 3.1: a key over random prefixes.
[2] Gupta et al. 2024, arXiv 2403.07175: key and residual of one and the same key, as here.
"""

import sys
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit as editing
import kg
import minedit
from minedit import Run
from models import Model
from studies.training import check_edits, require_compositions, trained

SHRINKS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MOST_CONTEXTS = 8  # compositions whose keys are averaged, of an edit


def set_apart(
    probes: minedit.EditProbes, generator: torch.Generator
) -> tuple[kg.Probes, minedit.EditProbes]:
    """Of the hop 2 probes of each edit a random half, at most MOST_CONTEXTS, to lend their keys;
    and the probes without these."""
    edit = probes.hop2.edit
    is_lent = torch.zeros_like(edit, dtype=torch.bool)
    for one in edit.unique():
        mine = (edit == one).nonzero().flatten()
        order = torch.randperm(len(mine), generator=generator).to(mine.device)
        n_lent = min(len(mine) // 2, MOST_CONTEXTS)
        is_lent[mine[order[:n_lent]]] = True
    return probes.hop2.where(is_lent), probes._replace(hop2=probes.hop2.where(~is_lent))


def most_alike(
    model: nn.Module, at: editing.Site, requests: editing.Requests, probes: kg.Probes
) -> tuple[Tensor, Tensor]:
    """Of the keys with which probes read the layer at their last token, in each of its calls, the
    one most like the key of the edited fact [m, d_in], and the cosine of the two [m]."""
    keys, cosines = [], []
    for edit, tokens in zip(probes.edit.split(512), probes.tokens.split(512)):
        read, _ = editing.record(model, at.layer, tokens)  # [call, m, token, d_in]
        read = read[:, :, -1]
        own = at.keys[requests.fact[edit]]
        cosine, call = F.cosine_similarity(read, own, dim=-1).max(0)
        keys.append(read[call, torch.arange(len(edit), device=edit.device)])
        cosines.append(cosine)
    return torch.cat(keys), torch.cat(cosines)


def mean_keys(
    model: Model, at: editing.Site, requests: editing.Requests, lent: kg.Probes
) -> editing.Site:
    """The site with, for every edited fact, the mean of its own key and of those with which the
    compositions `lent` read it (`most_alike`), and the value of this mean key, of which prototypes
    are made too."""
    keys, _ = most_alike(model, at, requests, lent)
    total = at.keys[requests.fact].index_add(0, lent.edit, keys)  # [n, d_in]
    count = 1 + torch.bincount(lent.edit, minlength=len(requests))
    mean = total / count[:, None]
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
            record = minedit.score(model, edits, probes)
            entries.append({"key": key} | record.entry())
    return entries


COLUMNS = dict(key="key", shrink="shrink", direct="edited fact", hop1="hop 1", hop2="hop 2")
COLUMNS |= dict(unrelated_one_hop_moved="moved: facts", unrelated_two_hop_moved="compositions")


def tradeoff_table(entries: list[dict]) -> str:
    shown = [entry | {"shrink": f"{entry['shrink']:g}"} for entry in entries]
    return minedit.entry_table(shown, COLUMNS)


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
