"""Tables of ablation and of circuits, for studies/report.py; as studies/edit_tables.py."""

import itertools

from minedit import cell, mean
from studies.edit_tables import HOPS
from studies.runs import (
    MOMENTS,
    Group,
    Table,
    at_moments,
    entries_at,
    lookup,
    mean_table,
    named,
    same,
    table_of,
)
from studies.transfer import RATES

# --- Ablation -------------------------------------------------------------------------------------

WITHOUT_BOOK = {
    "removed": "removed",
    "recited": "recited",
    "true": "true",
    "one_hop": "1-hop",
    "train": "train",
    "id": "ID",
    "ood": "OOD",
}
REMAINING = WITHOUT_BOOK | {"open_book": "book"}


def ablation_table(groups: list[Group]) -> Table | None:
    def entries(run: dict) -> list[dict]:
        return (lookup(run, "ablate.entries") or []) + (lookup(run, "ablate.sweep") or [])

    legend = """\
recited, true: exceptions answered as trained, and right; train: other trained; book: open book.
matched: strengths of its own choice in q+k, v+out, address, store (highest true - recited of other
paths, held-out ones spared); as many components (parts), as large a change (norm) as kfac or ekfac;
one keep (alike)."""
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
    words = same("method", "keep")
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
        if "before" not in by_method:  # studies.attention without minedit.py --ablate
            return []
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


# --- Circuits -------------------------------------------------------------------------------------


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
    shares["visible_right"] = "of right"
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
    kinds = same("new->old", "old->new", "new->new")
    shares = kinds | {"ood": "OOD", "one_hop": "facts", "step_facts": "facts at"}
    shares |= {"step_old->new": "old->new at", "step_new->new": "new->new at"}
    legend = """\
compositions first fact -> second, none trained; OOD: the old set; facts: all
at: step of 0.99 of the facts, of 0.9 of the compositions"""
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
    words = {
        "config.data.regime": "regime",
        "config.data.augment": "augment",
        "config.data.train_fraction": "train_fraction",
    }
    shares = {
        "step_train": "train at",
        "step_id": "ID at",
        "step_ood": "OOD at",
        "accuracy.ood": "OOD",
        "circuits.ood.end.bridge": "bridge",
        "circuits.ood.end.visible": "visible",
        "circuits.id.end.visible": "of ID",
        "circuits.fake": "fake",
    }
    legend = """\
at: steps to 0.99, 0.99, 0.9. bridge, visible: OOD queries, end. of ID: visible, ID queries; fake:
OOD >= 0.9, visible less than half of that of ID queries"""
    lowest = ("circuits.ood.end.visible",)

    def entries(run: dict) -> list[dict]:
        return [run] if "circuits" in run else []

    return mean_table(groups, entries, words, shares, legend, lowest)


TABLES = [ablation_table, controls_table, exceptions_table, best_table]
TABLES += [retention_table, relearning_table, vision_table]
TABLES += [paths_table, same_table, worth_table, transfer_table, regimes_table]
