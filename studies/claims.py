"""What the papers claim, beside what the runs say.

results/claims.tsv has a line for each claim: the paper's figure, the range accepted, the cells that
it is about, the folder of runs that answers it, where our figure stands in results.json, and where
its number of queries. The verdict follows from the figures alone.
"""

import math
import operator
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minedit import cell
from models import ARCHS
from studies.runs import Table, lookup, read_run, table_of


@dataclass
class Claim:
    """A line of results/claims.tsv."""

    text: str
    theirs: str
    low: str  # of the range accepted; "-" for what cannot be tested here
    high: str
    cells: str  # names of cells; "-": not testable here
    runs: str  # their folder below the results, with {} for the cell and without the seed
    figure: str  # a place in results.json, or two with - or / between
    queries: str  # the place of the number of queries, "-" where it is a mean over runs


def read_claims(file: Path) -> list[Claim]:
    return [Claim(*line.split("\t")) for line in file.read_text().splitlines()[1:]]


def figure_at(run: dict, place: str) -> float | None:
    """What stands at a place; a step that never came is infinite."""
    value = lookup(run, place)
    return math.inf if value is None and place.startswith("step_") else value


def figure_of(run: dict, figure: str) -> float | None:
    """Our figure for a claim, None where the run has none."""
    first, *rest = figure.split()
    value = figure_at(run, first)
    if not rest:
        return value
    sign, second = rest
    other = figure_at(run, second)
    if value is None or other in (None, math.inf) or (sign == "/" and other == 0):
        return None
    return {"-": operator.sub, "/": operator.truediv}[sign](value, other)


@dataclass
class Tested:
    """What the runs of one cell say of a claim."""

    values: list[float]
    counts: list[int | None]  # queries


class Results:
    """A folder of results in the layout of studies/all.py, of which a run is read once."""

    def __init__(self, folder: Path):
        self.folder, self.read = folder, {}

    def runs(self, name: str) -> list[dict]:
        """Those of all seeds."""
        found = []
        for file in sorted(self.folder.glob(f"{name}-seed*/results.json")):
            if file not in self.read:
                self.read[file] = read_run(file)
            found.append(self.read[file])
        return found


def tested_by(claim: Claim, results: Results) -> dict[str, Tested]:
    """{cell: its figures}, where there are any."""
    found = {}
    for arch in claim.cells.split():
        tested = Tested([], [])
        for run in results.runs(claim.runs.format(arch)):
            value = figure_of(run, claim.figure)
            if value is not None:
                tested.values.append(value)
                tested.counts.append(lookup(run, claim.queries))
        if tested.values:
            found[arch] = tested
    return found


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


class Verdict(NamedTuple):
    """A line of the table of claims."""

    text: str
    theirs: str
    arch: str
    ours: str  # the pooled share, or the mean over runs
    interval: str
    n: str  # queries of all runs
    verdict: str


def verdict_of(claim: Claim, arch: str, tested: Tested) -> Verdict:
    """Ours beside theirs; whether it is in the range that is accepted, with "?" where the interval
    crosses an end of the range."""
    values, counts = tested.values, tested.counts
    n = None
    ours = statistics.fmean(values)
    ends = list(values)
    if all(counts):
        n = sum(counts)
        ours = sum(value * count for value, count in zip(values, counts)) / n
        ends += wilson(ours, n)
    low, high = float(claim.low), float(claim.high)
    verdict = "agrees" if low <= ours <= high else "differs"
    crosses = min(ends) < low <= max(ends) or min(ends) <= high < max(ends)
    if crosses or (n is None and len(values) < 2):
        verdict += " ?"
    interval = f"{cell(min(ends))}..{cell(max(ends))}"
    return Verdict(claim.text, claim.theirs, arch, cell(ours), interval, cell(n, "d"), verdict)


def summary_table(claims: list[Claim], results: Results) -> Table | None:
    """All claims on one screen: ours in each cell, and whether it is in the range accepted."""
    marks = {"agrees": " +", "differs": " -"}
    rows = [("claim", "theirs", *ARCHS)]
    for claim in claims:
        tested = tested_by(claim, results)
        row = [claim.text, claim.theirs]
        for arch in ARCHS:
            if arch in tested:
                found = verdict_of(claim, arch, tested[arch])
                row.append(found.ours + marks.get(found.verdict, " ?"))
            elif arch in claim.cells.split():
                row.append("no run")
            else:
                row.append("-" if claim.cells == "-" else "")
        rows.append(tuple(row))
    legend = """\
+: in the range of results/claims.tsv; -: not; ?: the interval crosses its border, or one run;
- alone: cannot be tested here"""
    return table_of(rows, legend)


def claims_table(claims: list[Claim], results: Results) -> Table | None:
    rows = [("claim", "theirs", "", "ours", "interval", "n", "")]
    for claim in claims:
        tested = tested_by(claim, results)
        if not tested:
            verdict = "not testable here" if claim.cells == "-" else "no figure"
            rows.append(Verdict(claim.text, claim.theirs, "-", "-", "-", "-", verdict))
        for arch, found in tested.items():
            rows.append(verdict_of(claim, arch, found))
    legend = """\
n: queries of all runs; -: a mean over the runs. interval: 95 % (Wilson) and the runs' range.
agrees: in the range of claims.tsv; ?: the interval crosses its border, or is of one run."""
    return table_of(rows, legend)
