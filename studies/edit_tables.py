"""Tables of training and of edits, one at a time or many at once, for studies/report.py.

A table is a function of groups of runs, with its legend in it; a row is the mean over runs that
differ in the seed alone.
"""

import itertools
import math
from collections import Counter

from minedit import cell, mean
from studies.runs import (
    Group,
    Table,
    entries_at,
    kind_of_edit,
    lookup,
    mean_table,
    named,
    same,
    table_of,
)

# --- Training, edits one at a time ----------------------------------------------------------------


def headline_table(groups: list[Group]) -> Table | None:
    rows = [("arch", "seeds", "OOD (lowest)", "hop 1", "hop 2 (lowest)", "facts moved")]
    for group in groups:
        edits = [run["edit"] for run in group.runs]
        if not any(edits):
            continue
        ood = mean([run["accuracy"]["ood"] for run in group.runs], lowest=True)
        hop1 = mean([edit.get("hop1") for edit in edits])
        hop2 = mean([edit.get("hop2") for edit in edits], lowest=True)
        moved = mean([edit.get("unrelated_one_hop_moved") for edit in edits])
        rows.append((group.name, len(group.runs), ood, hop1, hop2, moved))
    legend = """\
edits: ROME, prototype, a-priori site. OOD: accuracy on compositions of facts in no trained one"""
    return table_of(rows, legend)


def accuracy_table(groups: list[Group]) -> Table | None:
    shares = ("1-hop", "train", "ID", "OOD (lowest)", "paths", "guess", "first", "second")
    rows = [("arch", "runs", *shares, "grokked at", "s")]
    for group in groups:
        runs = group.runs
        row = [group.name, len(runs)]
        for name in ("one_hop", "train", "id", "ood"):
            row.append(mean([r["accuracy"][name] for r in runs], lowest=name == "ood"))
        row.append(sum(r["n_paths"]["ood"] for r in runs))
        row.append(mean([lookup(r, "most_frequent_tail.ood") for r in runs]))
        for name in ("ood_first", "ood_second"):
            row.append(mean([r["accuracy"][name] for r in runs]))
        for name in ("grokked_at", "seconds"):
            row.append(mean([r[name] for r in runs], ".0f"))
        rows.append(tuple(row))
    legend = """\
means; paths: OOD, of all runs; guess: OOD, the second relation's most frequent tail alone; first,
second: only this hop OOD; grokked at: train 0.99 and OOD 0.9 (-: never)"""
    return table_of(rows, legend)


SITE = same("rule", "site", "pass", "method", "target")
HOPS = {"direct": "direct", "hop1": "hop 1", "hop2": "hop 2"}
MOVED = {"unrelated_one_hop_moved": "facts", "unrelated_two_hop_moved": "comps."}


def edits_of(run: dict) -> list[dict]:
    """With a word on whether an entry's site is the one that was fixed beforehand."""
    return [entry | {"rule": "yes" if entry["a_priori"] else "no"} for entry in run["edits"]]


def edits_table(groups: list[Group]) -> Table | None:
    more = {"same_row_moved": "row", "distance": "far", "length": "length"}
    legend = """\
direct: edits whose question has the new answer. hop 1, hop 2: compositions with the edited fact
first, second, that get what now follows, among edits with direct success. facts, comps., row: other
facts, compositions of them, facts of the same largest key entry, whose answer moved. near: gradient
pulled to stored values; short: as for mass edits. far: of the value written from the nearest one, in
their mean length; length: |r| in lengths of the value that it changes.
rule: whether this is the site that was fixed before any edit was scored"""
    return mean_table(groups, edits_of, SITE, HOPS | MOVED | more, legend, ("hop1", "hop2"))


def neighbours_table(groups: list[Group]) -> Table | None:
    def entries(run: dict) -> list[dict]:
        return [e for e in edits_of(run) if "same_subject_moved" in e]

    shares = {
        "same_subject_moved": "head",
        "same_relation_moved": "relation",
        "facts_per_row": "on row",
        "overlap_hop2": "cosine",
    }
    legend = """\
head, relation: share that moved of the facts with it; on row: facts; cosine: of its key, hop 2's"""
    return mean_table(groups, entries, SITE, shares, legend)


def when_table(groups: list[Group]) -> Table | None:
    legend = """\
pass: whose key and prototype make the edit (ROME), the a-priori one first. acts: always, or at some
calls of the layer (call t: pass t). Hops: among edits with direct success when they always act."""
    return mean_table(groups, entries_at("when.written"), same("pass", "acts"), HOPS, legend)


def held_table(groups: list[Group]) -> Table | None:
    shares = {}
    for name, head in HOPS.items():
        shares[name] = head
        shares[f"{name}_random"] = f"{head} random"
    legend = """\
the edit at the a-priori site, always acting: share of its right answers that stay right while the
stream after a pass (at r1; hop 2: r2) is held as unedited in the answers' plane or a random one."""
    return mean_table(groups, entries_at("when.held"), same("after"), shares, legend)


def shared_edits(groups: list[Group], method: str) -> dict[str, dict[int, dict]]:
    """{cell: {seed: its entry of edits by the method}}, of a cell's largest group, where there are
    figures on what all cells answer right."""
    by_arch = {}
    for group in groups:
        found = {}
        for run in group.runs:
            edit = lookup(run, f"edits[a_priori=True,method={method},target=prototype]") or {}
            if edit.get("hop2_shared") is not None:
                found[run["seed"]] = edit
        if len(found) > len(by_arch.get(group.arch, {})):
            by_arch[group.arch] = found
    return by_arch


def seeds_table(groups: list[Group]) -> Table | None:
    """Hop 1 and hop 2 seed by seed, on what all cells answer right; by ROME and by the single-row
    edit."""
    by_method = {method: shared_edits(groups, method) for method in ("rome", "row")}
    cells = list(dict.fromkeys(itertools.chain(*by_method.values())))
    if len(cells) < 2:
        return None
    several = [f"{hop}, seed by seed" for hop in ("hop 1", "hop 2")]
    rows = [("arch", "method", *several, *(f"p v {arch}" for arch in cells))]
    for method, by_arch in by_method.items():
        hop2 = {}
        for arch, edits in by_arch.items():
            hop2[arch] = [edit["hop2_shared"] for edit in edits.values()]
        for arch, edits in by_arch.items():
            row = [arch, method, " ".join(cell(edit["hop1_shared"]) for edit in edits.values())]
            row.append(" ".join(cell(share) for share in hop2[arch]))
            for other in cells:
                is_other = other in hop2 and other != arch
                row.append(cell(mann_whitney(hop2[arch], hop2[other])) if is_other else "")
            rows.append(tuple(row))
    legend = """\
prototype, a-priori site, on what all four cells know. p: exact two-sided Mann-Whitney, hop 2"""
    return table_of(rows, legend)


def paired_table(groups: list[Group]) -> Table | None:
    """Hop 2 of ROME on what all cells know: differences between two cells of one seed, which share
    graph, split and requests, so that seeds are pairs."""
    by_arch = shared_edits(groups, "rome")
    rows = [("cells", "seeds", "mean difference", "lowest", "highest", "first ahead in")]
    for one, other in itertools.combinations(by_arch, 2):
        differences = []
        for seed in by_arch[one].keys() & by_arch[other].keys():
            ahead = by_arch[one][seed]["hop2_shared"] - by_arch[other][seed]["hop2_shared"]
            differences.append(ahead)
        if differences:
            row = [f"{one} - {other}", len(differences), mean(differences)]
            row += [cell(min(differences)), cell(max(differences))]
            rows.append((*row, sum(d > 0 for d in differences)))
    legend = "hop 2 seed by seed: the cells of a seed share graph, split and requests"
    return table_of(rows, legend)


def mann_whitney(x: list[float], y: list[float]) -> float:
    """Exact two-sided p of the rank sum of x among x and y: mid-ranks for ties, all divisions
    counted."""
    both = [*x, *y]
    rank = {v: sum(w < v for w in both) + (both.count(v) + 1) / 2 for v in both}
    ways = Counter({(0, 0.0): 1})  # {(m, sum): choices of m values whose ranks have this sum}
    for v in both:
        with_v = Counter()
        for (m, total), n in ways.items():
            if m < len(x):
                with_v[m + 1, total + rank[v]] += n
        ways += with_v
    expected = len(x) * (len(both) + 1) / 2
    found = abs(sum(rank[v] for v in x) - expected)
    far = 0
    for (m, total), n in ways.items():
        if m == len(x) and abs(total - expected) >= found:
            far += n
    return far / math.comb(len(both), len(x))


# --- Mass edits -----------------------------------------------------------------------------------

SCORES = {
    "efficacy": "eff",
    "paraphrase": "para",
    "specificity": "spec",
    "score": "score",
    "new_likelier": "ES",
    "new_likelier_paraphrase": "PS",
    "own_likelier": "NS",
    "paper_score": "as papers",
}
LEFT = {"residual_left": "left", "residual_predicted": "pred"}


def scores_table(groups: list[Group]) -> Table | None:
    """Of peers by number of edits, MEMIT with all targets."""
    legend = "score by number of edits (more: below), each at the strength chosen on other facts"
    return by_number(groups, "score", legend)


def paper_scores_table(groups: list[Group]) -> Table | None:
    legend = "score as the papers count it, by number of edits: an answer likelier than one other"
    return by_number(groups, "paper_score", legend)


def by_number(groups: list[Group], score: str, legend: str) -> Table | None:
    def entries(run: dict) -> list[dict]:
        kinds = {}  # {method: {n: score}}
        for e in lookup(run, "mass.edits") or []:
            kinds.setdefault(kind_of_edit(e), {})[str(e["n"])] = e.get(score)
        return named(kinds)

    shares = same("1", "10", "100", "316", "1000", "3162", "10000")
    return mean_table(groups, entries, {"at": "at"}, shares, legend)


def mass_table(groups: list[Group]) -> Table | None:
    settings = same("strength", "threshold")

    def entries(run: dict) -> list[dict]:
        found = []
        for part in ("sweep", "edits", "layers"):
            for entry in lookup(run, f"mass.{part}") or []:
                setting = [entry[name] for name in settings if name in entry]
                tried = " ".join(str(x) for x in setting) if part == "sweep" else None
                found.append(entry | {"of": part, "tried": tried})
        return found

    words = same("of", "method", "target", "n", "tried", "blocks")
    sizes = {"largest_cosine": "cos", "relative_norm": "norm", "seconds": "s"}
    shares = settings | SCORES | {"condition": "cond"} | LEFT | sizes
    legend = """\
n: edits at once. strength: lam of MEMIT, ridge of AlphaEdit, bound of the fine-tuning; threshold:
of AlphaEdit; means over runs (tried: those to choose from, on other facts). eff: new answers; para:
by the relation's other token. spec: other facts that keep theirs. score: harmonic mean in percent
(-: no solution). as papers: that of ES, PS, the new answer likelier than the old, and NS, that of
an unedited fact of the relation likelier than the new. cond: of the system. left: mean
|r - dW k| / |r|, pred: predicted. cos: largest of two directions. norm: |dW| / |W|. s: seconds,
with targets and C."""
    return mean_table(groups, entries, words, shares, legend, ("score", "paraphrase"))


def capacity_table(groups: list[Group]) -> Table | None:
    seconds = {"gather_seconds": "C s", "target_seconds": "target s", "solve_seconds": "solve s"}
    shares = {"lam": "lam"} | SCORES | LEFT | {"relative_norm": "norm"} | seconds
    legend = """\
MEMIT of n facts in one update. eff: new answers; para: by the relation's other name; spec: other
facts that keep their answers; score: harmonic mean, percent; as papers: that of ES, PS, the new
answer likelier than the old, and NS, that of an unedited fact of the relation likelier than the
new; left: mean |r - dW k| / |r|, pred: predicted; norm: |dW| / |W|; seconds for keys and C,
targets, the solution (in stores of 4096 slots and fewer without whitening C, which is done once)"""
    lowest = ("score", "paraphrase")
    entries = entries_at("capacity.edits")
    return mean_table(groups, entries, same("slots", "n"), shares, legend, lowest)


def sequence_table(groups: list[Group]) -> Table | None:
    shares = {
        "lam": "lam",
        "first": "first",
        "efficacy": "eff",
        "paraphrase": "para",
        "specificity": "spec",
        "score": "score",
        "relative_norm": "norm",
    }
    legend = """\
MEMIT, one batch after another. carried: earlier keys count, values of the unedited model; forgotten:
they do not; anew: they do, values of the model as it is. n: facts so far; first: those of the first
batch that have their new answer still; eff, para, spec, score: of all so far, as above"""

    def entries(run: dict) -> list[dict]:
        found = lookup(run, "sequence") or []
        last = max((entry["batch"] for entry in found), default=0)
        return [entry for entry in found if entry["batch"] in (1, 2, 5, last)]

    words = {"way": "batches", "batch": "batch", "n": "n"}
    return mean_table(groups, entries, words, shares, legend, ("first", "score"))


# --- Shrinkage of C, edits made together ----------------------------------------------------------


def tradeoff_table(groups: list[Group]) -> Table | None:
    legend = """\
ROME, prototype, C shrunk by s. key: the fact's own, or its mean with those of compositions that
end in the fact (contexts), which are not asked; facts, comps.: others whose answer moved"""
    words = {"key": "key", "shrink": "s"}
    return mean_table(groups, entries_at("tradeoff"), words, HOPS | MOVED, legend)


def second_moment_table(groups: list[Group]) -> Table | None:
    legend = """\
ROME by what C covers; here: paths at the call edited, questions at all calls; all: both at all
calls; nothing: C = I; half: here, of half of the heads. facts, comps.: others whose answer moved,
with half those that begin with other heads"""
    words = {"covers": "C covers", "target": "target"}
    entries = entries_at("second_moment")
    return mean_table(groups, entries, words, HOPS | MOVED, legend, ("hop1", "hop2"))


def many_table(groups: list[Group]) -> Table | None:
    words = same("method", "target", "n")
    shares = {"lam": "lam"} | HOPS | same("both") | MOVED
    legend = """\
n facts in one update. hop 1, hop 2, both: compositions that begin, that end with an edited fact, or
both, now right; facts, comps.: others whose answer moved"""
    return mean_table(groups, entries_at("many"), words, shares, legend, ("hop1", "hop2"))


TABLES = [headline_table, accuracy_table, edits_table, neighbours_table, when_table, held_table]
TABLES += [seeds_table, paired_table]
TABLES += [capacity_table, sequence_table, scores_table, paper_scores_table, mass_table]
TABLES += [tradeoff_table, second_moment_table, many_table]
