"""Tables, claims and figures out of many runs, wherever they were computed.

    python -m studies.report results/main                 # every table of the runs in or below it
    python -m studies.report results --claims             # the papers' claims beside ours
    python -m studies.report results/main --plot --out runs/figures

A row is the mean over runs that differ in the seed alone. A table is a function below, with its
legend in it; studies/claims.py has the claims, studies/figures.py the figures.
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import minedit
from minedit import cell, mean, require
from studies import gpt2
from studies.all import HERE
from studies.claims import Results, claims_table, read_claims, summary_table
from studies.runs import (
    MOMENTS,
    Group,
    Table,
    at_moments,
    entries_at,
    kind_of_edit,
    lookup,
    mean_table,
    named,
    read_groups,
    same,
    table_of,
)
from studies.times import times_table
from studies.transfer import RATES

# --- Tables: training and edits -------------------------------------------------------------------


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
    legend = "edits: ROME, prototype, a-priori site. OOD: accuracy on compositions of facts in no"
    return table_of(rows, f"{legend} trained one")


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
    shares = HOPS | MOVED
    shares |= {"same_row_moved": "row", "distance": "far", "length": "length"}
    legend = """\
direct: edits whose question has the new answer. hop 1, hop 2: compositions with the edited fact
first, second, that get what now follows, among edits with direct success. facts, comps., row: other
facts, compositions of them, facts of the same largest key entry, whose answer moved. near: gradient
pulled to stored values; short: as for mass edits. far: of the value written from the nearest one, in
their mean length; length: |r| in lengths of the value that it changes.
rule: whether this is the site that was fixed before any edit was scored"""
    return mean_table(groups, edits_of, SITE, shares, legend, ("hop1", "hop2"))


def neighbours_table(groups: list[Group]) -> Table | None:
    def entries(run: dict) -> list[dict]:
        return [e for e in edits_of(run) if "same_subject_moved" in e]

    shares = {"same_subject_moved": "head", "same_relation_moved": "relation"}
    shares |= {"facts_per_row": "on row", "overlap_hop2": "cosine"}
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
        shares |= {name: head, f"{name}_random": f"{head} random"}
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
    legend = "prototype, a-priori site, on what all four cells know. p: exact two-sided "
    return table_of(rows, f"{legend}Mann-Whitney, hop 2")


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


# --- Tables: mass edits ---------------------------------------------------------------------------

SCORES = {"efficacy": "eff", "paraphrase": "para", "specificity": "spec", "score": "score"}
SCORES |= {"new_likelier": "ES", "new_likelier_paraphrase": "PS", "own_likelier": "NS"}
SCORES |= {"paper_score": "as papers"}


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
    shares = settings | SCORES
    shares |= dict(condition="cond", residual_left="left", residual_predicted="pred")
    shares |= {"largest_cosine": "cos", "relative_norm": "norm", "seconds": "s"}
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
    shares = {"lam": "lam"} | SCORES
    shares |= dict(residual_left="left", residual_predicted="pred", relative_norm="norm")
    shares |= dict(gather_seconds="C s", target_seconds="target s", solve_seconds="solve s")
    legend = """\
MEMIT of n facts in one update. eff: new answers; para: by the relation's other name; spec: other
facts that keep their answers; score: harmonic mean, percent; as papers: that of ES, PS, the new
answer likelier than the old, and NS, that of an unedited fact of the relation likelier than the
new; left: mean |r - dW k| / |r|, pred: predicted; norm: |dW| / |W|; seconds for keys and C,
targets, the solution"""
    lowest = ("score", "paraphrase")
    entries = entries_at("capacity.edits")
    return mean_table(groups, entries, same("slots", "n"), shares, legend, lowest)


def sequence_table(groups: list[Group]) -> Table | None:
    shares = dict(lam="lam", first="first", efficacy="eff", paraphrase="para", specificity="spec")
    shares |= dict(score="score", relative_norm="norm")
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


# --- Tables: shrinkage of C, edits made together --------------------------------------------------


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
    shares = {"lam": "lam"} | HOPS | {"both": "both"} | MOVED
    legend = """\
n facts in one update. hop 1, hop 2, both: compositions that begin, that end with an edited fact, or
both, now right; facts, comps.: others whose answer moved"""
    return mean_table(groups, entries_at("many"), words, shares, legend, ("hop1", "hop2"))


# --- Tables: ablation -----------------------------------------------------------------------------

REMAINING = {"removed": "removed", "recited": "recited", "true": "true", "one_hop": "1-hop"}
REMAINING |= {"train": "train", "id": "ID", "ood": "OOD", "open_book": "book"}
WITHOUT_BOOK = {name: head for name, head in REMAINING.items() if name != "open_book"}


def ablation_table(groups: list[Group]) -> Table | None:
    def entries(run: dict) -> list[dict]:
        return (lookup(run, "ablate.entries") or []) + (lookup(run, "ablate.sweep") or [])

    legend = """\
recited, true: exceptions answered as trained, and right; train: other trained; book: open book.
matched: strengths of its own choice in q+k, v+out, address, store (highest true - recited of other
paths); as many components (parts), as large a change (norm) as kfac or ekfac; one keep (alike)."""
    return mean_table(groups, entries, same("method", "matched"), REMAINING, legend, ("true",))


def controls_table(groups: list[Group]) -> Table | None:
    """The better of K-FAC and EK-FAC against each control, run by run: a seed's runs are pairs."""
    rows = [("arch", "control", "matched", "true", "lowest", "highest", "ahead in", "ID", "book")]
    for group in groups:
        found = {}  # {(control, matched): [differences of a run]}
        for run in group.runs:
            chosen = lookup(run, "ablate.chosen")
            for entry in lookup(run, "ablate.entries") or []:
                if entry["method"] not in ("before", "kfac", "ekfac"):
                    kind = (entry["method"], entry.get("matched") or "")
                    gain = {key: chosen[key] - entry[key] for key in ("true", "id", "open_book")}
                    found.setdefault(kind, []).append(gain)
        for kind, gains in found.items():
            true = [gain["true"] for gain in gains]
            row = [group.name, *kind, mean(true), cell(min(true)), cell(max(true))]
            row.append(f"{sum(x > 0 for x in true)} of {len(true)}")
            for key in ("id", "open_book"):
                row.append(mean([gain[key] for gain in gains]))
            rows.append(tuple(row))
    legend = """\
what the better of K-FAC and EK-FAC has more than a control: of exceptions answered right after all
(mean, lowest, highest run, runs in which it is ahead), of ID and open-book answers; matched: above"""
    return table_of(rows, legend)


def exceptions_table(groups: list[Group]) -> Table | None:
    """Of `minedit.py --ablate`, what the model composed before it memorized, and the controls."""
    words = {"method": "method", "keep": "keep"}
    legend = """\
attention layers alone, one share of the mass for all, controls with as large a change of each as
kfac; recited, true: exceptions answered as trained, and right; train: other trained paths; learnt:
before the last, gentle steps"""

    def entries(run: dict) -> list[dict]:
        found = lookup(run, "exceptions") or []
        if found:
            recipe = run["config"]["recipe"]
            learnt = recipe["steps"] - recipe["memorize"]
            earlier = [record for record in run["history"] if record["step"] <= learnt]
            for record in earlier[-1:]:  # its "train" counts the exceptions, too
                found = [record | {"method": "learnt", "train": None}, *found]
        controls = lookup(run, "attention") or []
        return found + [entry for entry in controls if entry["method"] != "kfac"]

    return mean_table(groups, entries, words, WITHOUT_BOOK, legend, ("true", "id"))


def best_table(groups: list[Group]) -> Table | None:
    """Of `exceptions_table`, every method at a share that spares what is composed."""
    legend = """\
of a method's shares the one at which most exceptions are right while 0.99 of ID is kept, run by run
and by what is shown here, for all methods alike"""

    def entries(run: dict) -> list[dict]:
        by_method = {}
        for entry in (lookup(run, "exceptions") or []) + (lookup(run, "attention") or []):
            by_method.setdefault(entry["method"], []).append(entry)
        found = []
        for several in by_method.values():
            kept = [e for e in several if e["id"] >= 0.99 * by_method["before"][0]["id"]]
            if kept:
                found.append(max(kept, key=lambda e: e["true"]))
        return found

    return mean_table(groups, entries, same("method"), WITHOUT_BOOK, legend, ("true",))


def retention_table(groups: list[Group]) -> Table | None:
    legend = """\
rare, frequent: fifth of the facts drawn least, most often. paper: percent kept in a 7B model"""
    shares = same("before", "after", "kept")
    words = same("at", "paper")
    return mean_table(groups, lambda r: named(lookup(r, "ablate.tasks")), words, shares, legend)


def relearning_table(groups: list[Group]) -> Table | None:
    def entries(run: dict) -> list[dict]:
        found = []
        for answers, curve in (lookup(run, "ablate.relearning") or {}).items():
            found += [entry | {"of": answers} for entry in curve]
        return found

    legend = """\
after further steps of training of the ablated model with the old exceptions, and with other wrong
answers to those that were lost. lost: of the lost ones, those that get the answer that is trained"""
    shares = {"lost": "lost"} | REMAINING
    return mean_table(groups, entries, same("of", "step"), shares, legend, ("lost",))


def vision_table(groups: list[Group]) -> Table | None:
    shares = same("memorized", "true", "validation")
    words = same("method", "matched")
    legend = """\
a vision transformer. memorized, true: images with a wrong label, answered so, and right"""
    return mean_table(groups, entries_at("ablate.vision"), words, shares, legend, ("true",))


# --- Tables: circuits -----------------------------------------------------------------------------


def paths_table(groups: list[Group]) -> Table | None:
    def entries(run: dict) -> list[dict]:
        found = []
        for queries in ("id", "ood"):
            for entry in named(at_moments(run, queries)):
                if (entry.get("n_right") or 0) < 20:
                    entry = entry | {"visible_right": None}
                found.append(entry | {"of": queries})
        return found

    shares = same("right", "bridge", "unread", "relation", "whole", "visible", "rest", "random")
    shares |= {"visible_right": "of right"}
    legend = """\
right: accuracy; else shares, the largest over passes (but the last). bridge: the lens at r1 has the
bridge first of all entities; unread: of what is right, the bridge first nowhere; relation: at r2,
the second one. whole, visible, rest, random: with the stream at r1 of a query with the same r2, its
part in (out of) the plane of both bridges, or in a random plane, its answer; of right: visible, of
the pairs of queries that are both answered right, where a run has 20 of them."""
    return mean_table(groups, entries, same("of", "at"), shares, legend, ("visible",))


def same_table(groups: list[Group]) -> Table | None:
    legend = """\
r: correlation of the tracing maps of a moment and of the end, mean of the runs; bounds: of the runs'
95 % bootstrap intervals over prompts (each run's own), lowest and highest; n: prompts a run"""
    rows = [("arch", "of", "at", "n", "r", "lowest bound", "highest bound")]
    for group in groups:
        for queries, moment in itertools.product(("id", "ood"), MOMENTS[:-1]):
            found = [lookup(run, f"circuits.same.{queries}.{moment}") for run in group.runs]
            found = [entry for entry in found if entry]
            if found:
                row = [group.name, queries, moment, mean([e["n"] for e in found], ".0f")]
                row.append(mean([e["r"] for e in found]))
                row += [cell(min(e["low"] for e in found)), cell(max(e["high"] for e in found))]
                rows.append(tuple(row))
    return table_of(rows, legend)


def worth_table(groups: list[Group]) -> Table | None:
    shares = {"step": "step", "id": "ID", "ood": "OOD"} | HOPS | {"ablated": "ablated"}
    legend = """\
direct, hops: ROME, prototype, a-priori site. ablated: ID accuracy after EK-FAC with keep 0.99"""
    lowest = ("hop1", "hop2")

    def entries(run: dict) -> list[dict]:
        return named(at_moments(run, "worth"))

    return mean_table(groups, entries, {"at": "at"}, shares, legend, lowest)


def transfer_table(groups: list[Group]) -> Table | None:
    shares = same("new->old", "old->new", "new->new")
    shares |= {"ood": "OOD", "one_hop": "facts", "step_facts": "at"}
    legend = """\
compositions first fact -> second, none trained; OOD: the old set; facts: all, and step of 0.99"""
    lowest = ("new->old", "old->new")

    def entries(run: dict) -> list[dict]:
        found = []
        for name, share in RATES.items():
            for entry in (run.get(name) or {}).values():
                found.append(entry | {"rates": f"{share:g}"})
        return found

    words = {"rates": "rates", "from": "from"}
    return mean_table(groups, entries, words, shares, legend, lowest)


def regimes_table(groups: list[Group]) -> Table | None:
    words = {"config.data.regime": "regime", "config.data.augment": "augment"}
    words |= {"config.data.train_fraction": "train_fraction"}
    shares = {"step_train": "train at", "step_id": "ID at", "step_ood": "OOD at"}
    shares |= {"accuracy.ood": "OOD", "circuits.ood.end.bridge": "bridge"}
    shares |= {"circuits.ood.end.visible": "visible", "circuits.fake": "fake"}
    legend = """\
at: steps to 0.99, 0.99, 0.9. bridge, visible: OOD queries, end. fake: OOD >= 0.9, visible
less than half of that of ID queries"""
    lowest = ("circuits.ood.end.visible",)

    def entries(run: dict) -> list[dict]:
        return [run] if "circuits" in run else []

    return mean_table(groups, entries, words, shares, legend, lowest)


TABLES = [headline_table, accuracy_table, edits_table, neighbours_table, when_table, held_table]
TABLES += [tradeoff_table, second_moment_table, many_table]
TABLES += [capacity_table, sequence_table, scores_table, paper_scores_table, mass_table]
TABLES += [ablation_table, controls_table, exceptions_table, best_table]
TABLES += [retention_table, relearning_table]
TABLES += [vision_table, paths_table, same_table, worth_table, transfer_table, regimes_table]
TABLES += [seeds_table, paired_table]


def of_files(
    pattern: str, make: Callable[[list[dict]], Table | None]
) -> Callable[[Path], Table | None]:
    """The table of what stands in such files of a folder; None where there is none."""

    def found(folder: Path) -> Table | None:
        read = [minedit.read_json(file, "remove it") for file in sorted(folder.glob(pattern))]
        return make(read) if read else None

    return found


FILES = {  # tables of what is no run
    "times": of_files("times.json", times_table),
    "gpt2_edits": of_files("gpt2*.json", gpt2.edits_table),
    "gpt2_ablation": of_files("gpt2*.json", gpt2.ablation_table),
}


ENTRIES = ("edits", "locate", "when", "second_moment", "many", "tradeoff", "mass", "capacity")
ENTRIES += ("sequence", "ablate", "exceptions", "circuits", "transfer")


def report(groups: list[Group]):
    """Every table that the runs have figures for, and what was not run."""
    for make in TABLES:
        made = make(groups)
        if made is not None:
            print(f"\n{made}")
    runs = []
    for group in groups:
        runs += group.runs
    absent = []
    for key in ENTRIES:
        n = sum(not run.get(key) for run in runs)
        if n:
            absent.append(f"{key} {n}")
    print(f"\nnot run, of {len(runs)} runs: {', '.join(absent) or 'nothing'}")


# --- Command line ---------------------------------------------------------------------------------


def command(args):
    if args.claims:
        require(len(args.folders) == 1, "--claims: give one folder, in the layout of results/")
        known = read_claims(HERE / "results" / "claims.tsv")
        results = Results(args.folders[0])
        print(f"{summary_table(known, results)}\n\n{claims_table(known, results)}")
        return
    other = []
    for find in FILES.values():
        made = [find(folder) for folder in args.folders]
        other += [str(table) for table in made if table is not None]
    if other and not any(list(folder.rglob("results.json")) for folder in args.folders):
        print("\n\n".join(other))  # no run
        return
    groups = read_groups(args.folders)
    report(groups)
    print("".join(f"\n{text}\n" for text in other), end="")
    if args.plot:
        from studies import figures

        figures.draw(groups, args.out or args.folders[0])


def main(argv: list[str] | None = None) -> int:
    parser = minedit.Parser("python -m studies.report", allow_abbrev=False)
    parser.description = __doc__.split("\n\n")[0]
    parser.add_argument("folders", type=Path, nargs="+", help="runs in or below them")
    parser.add_argument("--claims", action="store_true", help="the papers' claims beside ours")
    parser.add_argument("--plot", action="store_true", help="draw the figures too (matplotlib)")
    parser.add_argument("--out", type=Path, help="folder of the figures (the first of the runs')")
    return minedit.guarded(command, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
