"""What the papers claim, beside what the runs say.

results/claims.tsv has a line for each claim: the paper's figure, the range accepted, the cells and
the kind of training that it is about, where our figure stands in results.json, and where its number
of queries. The verdict follows from the figures alone.
"""

import math
import operator
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

from minedit import cell
from models import ARCHS, Config
from studies.runs import Group, Table, lookup, table_of


@dataclass
class Claim:
    """A line of results/claims.tsv."""

    text: str
    theirs: str
    low: str  # of the range accepted; "-" for what cannot be tested here
    high: str
    cells: str  # names of cells; "-": not testable here
    trained: str  # the kind of training, see `kind_of`
    figure: str  # a place in results.json, or two with - or / between
    queries: str  # the place of the number of queries, "-" where it is a mean over runs


def read_claims(file: Path) -> list[Claim]:
    return [Claim(*line.split("\t")) for line in file.read_text().splitlines()[1:]]


def kind_of(group: Group) -> str:
    """The kind of training of a group: regime, share trained, and what else differs from the task
    of the 2x2 table: words, and the model's sizes as name=value."""
    config = group.runs[0]["config"]
    data, recipe, model = config["data"], config["recipe"], config["model"]
    words = [data.get("regime", "natural"), data.get("augment", 0), data["train_fraction"]]
    if "sha256" in data:
        words.append("triples")
    if recipe.get("label_noise"):
        words.append(f"noise={recipe['label_noise']:g}")
    sizes = []
    for f in fields(Config):
        if f.metadata or f.name == "feed_forward":
            value = model.get(f.name) or 0
            if value != (f.default or 0):
                sizes.append(f"{f.name}={value}")
    store = model["slots"] if model["memory"] else model["d_ff"]
    if store >= 16384:  # GPT-J's width, for mass edits
        sizes = ["wide"]
    return " ".join(str(word) for word in words + sizes)


def figure_of(run: dict, figure: str) -> float | None:
    """Our figure for a claim, None where the run has none."""
    first, *rest = figure.split()
    value = lookup(run, first)
    if not rest:
        return value
    sign, second = rest
    other = lookup(run, second)
    if value is None or other is None or (sign == "/" and other == 0):
        return None
    return {"-": operator.sub, "/": operator.truediv}[sign](value, other)


@dataclass
class Tested:
    """What the runs of one cell say of a claim."""

    values: list[float]
    counts: list[int | None]  # queries


def tested_by(claim: Claim, groups: list[Group]) -> dict[str, Tested]:
    """{cell: the figures of its group with most runs of this kind}"""
    found = {}
    for group in groups:
        if group.arch not in claim.cells.split() or kind_of(group) != claim.trained:
            continue
        tested = Tested([], [])
        for run in group.runs:
            value = figure_of(run, claim.figure)
            if value is not None:
                tested.values.append(value)
                tested.counts.append(lookup(run, claim.queries))
        if len(tested.values) > len(found.get(group.arch, Tested([], [])).values):
            found[group.arch] = tested
    return found


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def verdict_row(claim: Claim, arch: str, tested: Tested) -> tuple:
    """Ours beside theirs: the pooled share, or the mean over runs; its interval; whether it is in
    the range that is accepted."""
    values, n = tested.values, None
    ours, ends = statistics.fmean(values), list(values)
    if all(tested.counts):
        n = sum(tested.counts)
        ours = sum(value * count for value, count in zip(values, tested.counts)) / n
        ends += wilson(ours, n)
    low, high = min(ends), max(ends)
    within = [float(claim.low) <= x <= float(claim.high) for x in (ours, low, high)]
    verdict = "agrees" if within[0] else "differs"
    if len(set(within)) > 1 or (n is None and len(values) < 2):
        verdict += " ?"
    interval = f"{cell(low)}..{cell(high)}"
    return (claim.text, claim.theirs, arch, cell(ours), interval, cell(n, "d"), verdict)


def summary_table(claims: list[Claim], groups: list[Group]) -> Table | None:
    """All claims on one screen: ours in each cell, and whether it is in the range accepted."""
    rows = [("claim", "theirs", *ARCHS)]
    for claim in claims:
        tested = tested_by(claim, groups)
        row = [claim.text, claim.theirs]
        for arch in ARCHS:
            if arch not in tested:
                row.append("" if tested else "-")
                continue
            *_, ours, _, _, verdict = verdict_row(claim, arch, tested[arch])
            row.append(ours + {"agrees": " +", "differs": " -"}.get(verdict, " ?"))
        rows.append(tuple(row))
    legend = "+: in the range of results/claims.tsv; -: not; ?: the interval crosses its border, or"
    return table_of(rows, f"{legend} one run")


def claims_table(claims: list[Claim], groups: list[Group]) -> Table | None:
    rows = [("claim", "theirs", "", "ours", "interval", "n", "")]
    for claim in claims:
        tested = tested_by(claim, groups)
        if not tested:
            verdict = "not testable here" if claim.cells == "-" else "no figure"
            rows.append((claim.text, claim.theirs, *"----", verdict))
        for arch, found in tested.items():
            rows.append(verdict_row(claim, arch, found))
    legend = """\
n: queries of all runs; -: a mean over the runs. interval: 95 % (Wilson) and the runs' range.
agrees: in the range of claims.tsv; ?: the interval crosses its border, or is of one run."""
    return table_of(rows, legend)
