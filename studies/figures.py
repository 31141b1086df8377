"""Figures of many runs as SVG files: those of the pages, or all of a folder. Needs matplotlib.

    python -m studies.pages --plot                                       # results/figures
    python -m studies.report results/main --plot --out runs/figures      # what a folder has

A figure is a function: it gathers the values of all runs, a value a run, into panels, and says how
these are drawn: as lines with their names at the ends, as bars with their names in them, or as tiles
with the numbers in them. Means over runs; their range is a band or a stroke.
"""

import io
import re
import statistics
from collections import defaultdict
from pathlib import Path

from minedit import UserError
from models import Config, states
from studies.runs import Group, all_entries, at_moments, kind_of_edit, lookup

# Okabe and Ito's colours, which colour-blind readers can tell apart; a mark and a dash for each
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
MARKS = "os^Dv*PX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 3)), (0, (3, 1)), (0, (7, 2)))
HOPS = {"direct": "edited fact", "hop1": "hop 1", "hop2": "hop 2"}


class Panels:
    """{panel: {line: {x: [a value for each run]}}}, in the order in which they are added."""

    def __init__(self):
        self.values = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))

    def add(self, panel: str, line: str, x, value: float | None):
        if value is not None:
            self.values[panel][line][str(x)].append(value)

    def add_all(self, panel: str, labels: dict[str, str], x, entry: dict):
        """Of an entry, a value for each line {key: its label}."""
        for key, label in labels.items():
            self.add(panel, label, x, entry.get(key))

    def lines(self) -> list[str]:
        """The names of all lines: one has the same style in all panels."""
        names = {}
        for panel in self.values.values():
            names |= dict.fromkeys(panel)
        return list(names)

    def n_runs(self, panel: str) -> str:
        """Runs behind a point: "5", or "1 to 5"."""
        counts = set()
        for values in self.values[panel].values():
            counts |= {len(found) for found in values.values()}
        few, many = min(counts), max(counts)
        return str(many) if few == many else f"{few} to {many}"


# --- Three kinds of figure ------------------------------------------------------------------------


def new_figure(panels: Panels, columns: int, width: float, height: float):
    """A matplotlib Figure, and for each panel its axes, with a title."""
    from matplotlib.figure import Figure

    columns = min(len(panels.values), columns)
    n_rows = -(-len(panels.values) // columns)
    figure = Figure((width * columns + 0.6, height * n_rows + 0.2), layout="constrained")
    axes = {}
    for place, panel in enumerate(panels.values):
        axes[panel] = figure.add_subplot(n_rows, columns, place + 1)
        axes[panel].set_title(f"{panel} (n = {panels.n_runs(panel)})")
    return figure, axes


def ticks_of(lines: dict[str, dict[str, list[float]]]) -> list[str]:
    """What is on the x axis of a panel: whole numbers going up; shares (with a decimal point) going
    down, since of a mass all is kept first; words as they were added."""
    ticks = {}
    for values in lines.values():
        ticks |= dict.fromkeys(values)
    try:
        return sorted(ticks, key=float, reverse=any("." in tick for tick in ticks))
    except ValueError:
        return list(ticks)


def draw_lines(panels: Panels, xlabel: str, ylabel: str = "share of answers", columns: int = 4):
    """Means as marks on a line, their range as a band; the lines' names to the right, as high as
    their last points, in the last panel of a row that has the line."""
    figure, axes = new_figure(panels, columns, 2.9, 2.8)
    names = panels.lines()
    titles = list(panels.values)
    for place, (panel, lines) in enumerate(panels.values.items()):
        ax, ticks = axes[panel], ticks_of(lines)
        to_the_right = titles[place + 1 : (place // columns + 1) * columns]
        ends = {}
        for name, values in lines.items():
            i = names.index(name) % 8
            found = [values[tick] for tick in ticks if tick in values]
            x = [ticks.index(tick) for tick in ticks if tick in values]
            middle = [statistics.fmean(several) for several in found]
            style = {"color": COLOURS[i], "marker": MARKS[i], "ms": 4, "lw": 1.2}
            ax.plot(x, middle, ls=DASHES[i], **style)
            low, high = [min(several) for several in found], [max(several) for several in found]
            ax.fill_between(x, low, high, color=COLOURS[i], alpha=0.15, lw=0)
            if not any(name in panels.values[title] for title in to_the_right):
                ends[name] = (middle[-1], COLOURS[i])
        label_ticks(ax, ticks)
        ax.set(xlabel=xlabel, ylim=(-0.04, 1.04))
        if place % columns == 0:
            ax.set_ylabel(ylabel)
        label_ends(ax, len(ticks) - 1, ends)
    return figure


def label_ticks(ax, ticks: list[str]):
    """Every tick where they are few, every few where they are many; upright if long."""
    every = -(-len(ticks) // 10) if all(tick.isdigit() for tick in ticks) else 1
    is_long = len(" ".join(ticks[::every])) > 27
    ax.set_xticks(range(0, len(ticks), every), ticks[::every], rotation=90 if is_long else 0)


def label_ends(ax, x: float, ends: dict[str, tuple[float, str]], gap: float = 0.075):
    """The names of lines beside x, {name: (y, colour)}. Those that would overlap are moved apart:
    each is `gap` below the one above it, at least."""
    above = 1.1
    heights = {}
    for name in sorted(ends, key=lambda name: -ends[name][0]):
        heights[name] = above = min(ends[name][0], above - gap)
    below = -0.1
    for name in reversed(heights):  # where they were moved out of the panel, up again
        heights[name] = below = max(heights[name], below + gap)
    for name, (_, colour) in ends.items():
        place = {"va": "center", "fontsize": 8, "annotation_clip": False}
        place |= {"xytext": (12, 0), "textcoords": "offset points"}
        ax.annotate(name, (x, heights[name]), color=colour, **place)


def draw_bars(panels: Panels, columns: int = 4):
    """A group of bars for each line, with their names in them, their means above and their range."""
    figure, axes = new_figure(panels, columns, 0.4 + 1.15 * len(panels.lines()), 2.9)
    for panel, lines in panels.values.items():
        ax, bars = axes[panel], ticks_of(lines)
        for place, values in enumerate(lines.values()):
            for i, bar in enumerate(bars):
                if bar in values:
                    at = place + 0.8 * ((i + 0.5) / len(bars) - 0.5)
                    draw_bar(ax, at, 0.8 / len(bars), bar, values[bar], COLOURS[1 + i])
        ax.set_xticks(range(len(lines)), lines)
        ax.set(ylim=(0, 1.1), ylabel="share of answers")
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_bar(ax, at: float, width: float, name: str, found: list[float], colour: str):
    """One bar of the mean; its name stands in it where it is high enough."""
    mean = statistics.fmean(found)
    ax.bar(at, mean, width, color=colour)
    ax.vlines(at, min(found), max(found), color="black", lw=1)
    ax.annotate(f"{mean:.2f}", (at, max(found) + 0.02), ha="center", fontsize=7)
    inside = mean > 0.5
    place = (at, 0.03 if inside else max(found) + 0.1)
    label = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 8}
    ax.annotate(name, place, color="white" if inside else colour, **label)


def draw_tiles(panels: Panels, xlabel: str = "", columns: int = 4, numbers: bool = True):
    """A row of tiles for each line, from white (0) to black (1), with the means in them. The names
    of the rows stand where they are not those of the panel to the left."""
    n_ticks = max(len(ticks_of(lines)) for lines in panels.values.values())
    width = (0.37 if numbers else 0.2) * n_ticks + 0.05 * max(map(len, panels.lines()))
    height = 0.28 * max(map(len, panels.values.values())) + 1.0
    figure, axes = new_figure(panels, columns, width, height)
    named = []
    for place, (panel, lines) in enumerate(panels.values.items()):
        ax, ticks, rows = axes[panel], ticks_of(lines), list(lines)
        for row, values in enumerate(lines.values()):
            for column, tick in enumerate(ticks):
                if tick in values:
                    draw_tile(ax, column, row, statistics.fmean(values[tick]), numbers)
        ax.set(xlim=(-0.5, len(ticks) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel)
        is_named = rows != named or place % columns == 0
        ax.set_yticks(range(len(rows)), rows if is_named else [""] * len(rows))
        ax.set_xticks(range(len(ticks)), ticks, rotation=90)
        named = rows
    return figure


def draw_tile(ax, column: int, row: int, mean: float, number: bool):
    from matplotlib.patches import Rectangle

    if mean < 0.005 and not number:
        return  # white on white
    grey = str(1 - 0.9 * min(max(mean, 0), 1))
    corner = (column - 0.5, row - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, facecolor=grey, edgecolor="white", lw=0.5))
    if number:
        place = {"ha": "center", "va": "center", "fontsize": 7}
        ax.annotate(f"{mean:.2f}", (column, row), color="white" if mean > 0.5 else "black", **place)


# --- The figures ----------------------------------------------------------------------------------


def grokking(groups: list[Group]):
    """Accuracy against training steps, a panel for each cell."""
    panels = Panels()
    labels = {"one_hop": "facts", "train": "trained", "id": "held out (ID)", "ood": "OOD"}
    for group, record in all_entries(groups, "history"):
        panels.add_all(group.name, labels, record["step"], record)
    return draw_lines(panels, "training step") if panels.values else None


def edits(groups: list[Group]):
    """What follows an edit, by cell: ROME, prototype, a-priori site."""
    panels = Panels()
    for group in groups:
        for run in group.runs:
            for key, label in HOPS.items():
                panels.add("right after one edit", group.name, label, run["edit"].get(key))
    return draw_bars(panels) if panels.values else None


def when(groups: list[Group]):
    """The same by the pass that an edit is made for, and the calls at which it acts."""
    panels = Panels()
    for group in groups:
        for run in group.runs:
            written = lookup(run, "when.written") or []
            for entry in sorted(written, key=lambda e: e["pass"]):
                row = f"for pass {entry['pass']}, {entry['acts']}"
                for key, label in HOPS.items():
                    panels.add(group.name, row, label, entry[key])
    return draw_tiles(panels) if panels.values else None


def locate(groups: list[Group]):
    """Causal tracing: the share of prompts whose answer is back, from white to black; a row for
    each state that is restored, a column for each token replaced and restored."""
    panels = Panels()
    for group in groups:
        for run in group.runs:
            restored = states(Config(**run["config"]["model"]))
            for effect in lookup(run, "locate.effects") or []:
                for state, shares in zip(restored, effect["top1"] or []):
                    row = f"{state.at_pass} {state.part}"
                    for word, share in zip(("h", "r1", "r2"), shares):
                        column = f"{effect['query'][:4]}: {effect['corrupted']}, {word}"
                        panels.add(group.name, row, column, share)
    xlabel = "question: token replaced, restored"
    return draw_tiles(panels, xlabel, numbers=False) if panels.values else None


def early(groups: list[Group]):
    """OOD composition and edits at the moments of a training: which of them comes first?"""
    panels = Panels()
    labels = {"id": "composes ID", "ood": "composes OOD", "hop1": "edits: hop 1"}
    labels |= {"hop2": "edits: hop 2"}
    for group in groups:
        for run in group.runs:
            for moment, entry in at_moments(run, "worth").items():
                panels.add_all(group.name, labels, moment, entry)
    return draw_lines(panels, "weights") if panels.values else None


def covers(groups: list[Group]):
    """What follows edits with a prototype, and what moves, by what C covers."""
    panels = Panels()
    labels = HOPS | {"unrelated_one_hop_moved": "facts moved"}
    labels |= {"unrelated_two_hop_moved": "comps. moved"}
    for group, entry in all_entries(groups, "second_moment"):
        if entry["target"] == "prototype":
            for key, label in labels.items():
                panels.add(group.name, entry["covers"], label, entry[key])
    return draw_tiles(panels) if panels.values else None


def paths(groups: list[Group]):
    """Inference paths of ID and OOD compositions at the moments of a training."""
    panels = Panels()
    keys = ("right", "bridge", "relation", "whole", "visible", "rest")
    for group in groups:
        for run in group.runs:
            for queries in ("id", "ood"):
                for moment, entry in at_moments(run, queries).items():
                    row = f"{queries.upper()} {moment}"
                    for key in keys:
                        panels.add(group.name, row, key, entry.get(key))
    return draw_tiles(panels) if panels.values else None


def many(groups: list[Group]):
    """What follows of edits made in one update, against their number; a panel for each cell."""
    panels = Panels()
    labels = HOPS | {"both": "both edited", "unrelated_one_hop_moved": "facts moved"}
    for group, entry in all_entries(groups, "many"):
        if (entry["method"], entry["target"]) == ("memit", "prototype"):
            panels.add_all(group.name, labels, entry["n"], entry)
    return draw_lines(panels, "facts edited at once") if panels.values else None


def mass(groups: list[Group]):
    """Score against the number of edits, a panel for each cell, a line for each method."""
    panels = Panels()
    for group, entry in all_entries(groups, "mass.edits"):
        if entry.get("score") is not None:
            score = entry["score"] / 100
            panels.add(group.name, kind_of_edit(entry), entry["n"], score)
    return draw_lines(panels, "facts edited at once", "score / 100") if panels.values else None


def capacity(groups: list[Group]):
    """Score of n edits in one update against the slots of the store; a panel for each cell."""
    panels = Panels()
    for group, entry in all_entries(groups, "capacity.edits"):
        if entry["score"] is not None:
            score = entry["score"] / 100
            panels.add(group.arch, f"{entry['n']} facts", entry["slots"], score)
    return draw_lines(panels, "slots of the store", "score / 100") if panels.values else None


def sequence(groups: list[Group]):
    """What is left of the first batch of edits, and of other facts, against the facts edited; two
    panels for each store."""
    panels = Panels()
    for group, entry in all_entries(groups, "sequence"):
        way, n = entry["way"], entry["n"]
        panels.add(f"{group.name}, first batch", way, n, entry["first"])
        panels.add(f"{group.name}, other facts", way, n, entry["specificity"])
    return draw_lines(panels, "facts edited so far") if panels.values else None


def retention(groups: list[Group]):
    """What is left of each kind of question, against the curvature mass that is kept."""
    panels = Panels()
    labels = {"recited": "exceptions recited", "true": "exceptions right", "rare": "rare facts"}
    labels |= {"arithmetic": "arithmetic", "open_book": "open book", "id": "ID"}
    for group, entry in all_entries(groups, "ablate.sweep"):
        panels.add_all(group.name, labels, entry["keep"], entry)
    return draw_lines(panels, "share of mass kept") if panels.values else None


def exceptions(groups: list[Group]):
    """The same where the attention alone is ablated by K-FAC (minedit.py --ablate), and by the
    activations' factor alone; of several shares of exceptions the largest."""
    panels = Panels()
    labels = {"recited": "exceptions recited", "true": "exceptions right", "one_hop": "facts"}
    labels |= {"id": "ID", "ood": "OOD"}
    noise = {group.name: lookup(group.runs[0], "config.recipe.label_noise") for group in groups}
    shown = [group for group in groups if noise[group.name] == max(noise.values())]
    for group, entry in all_entries(shown, "exceptions"):
        if entry["method"] != "ekfac":
            panels.add_all(group.name, labels, entry["keep"], entry)
    for group, entry in all_entries(shown, "attention"):
        if entry["method"] == "activations":
            panels.add(group.name, "right, activations", entry["keep"], entry["true"])
    return draw_lines(panels, "share of mass kept") if panels.values else None


def mean_of(entries: list[dict], key: str) -> float:
    """Over the entries that have it; NaN, which is not drawn, where none has."""
    values = [entry[key] for entry in entries if entry[key] is not None]
    return statistics.fmean(values) if values else float("nan")


def tradeoff(groups: list[Group]):
    """What follows an edit against what moves that should not, along the shrinkage of C: a panel
    for each hop, a line for each cell and key; means over runs."""
    from matplotlib.figure import Figure

    lines = defaultdict(lambda: defaultdict(list))  # {(cell, key): {s: [entry of a run]}}
    for group, entry in all_entries(groups, "tradeoff"):
        lines[group.name, entry["key"]][entry["shrink"]].append(entry)
    if not lines:
        return None
    figure = Figure((8.0, 3.8), layout="constrained")
    first, second = figure.subplots(1, 2, sharey=True)
    for hop, ax in (("hop1", first), ("hop2", second)):
        for i, ((cell, key), by_shrink) in enumerate(lines.items()):
            moved, follows = [], []
            for entries in by_shrink.values():
                moved.append(100 * mean_of(entries, "unrelated_one_hop_moved"))
                follows.append(mean_of(entries, hop))
            of_cell = i // 2 % 8  # a cell has two lines, its own key and the contexts'
            style = {"color": COLOURS[of_cell], "marker": MARKS[of_cell], "ms": 4, "lw": 1}
            dash = "-" if key == "own" else ":"
            ax.plot(moved, follows, ls=dash, label=f"{cell}, {key} key", **style)
            for shrink, x, y in zip(by_shrink, moved, follows):
                if key == "own" and shrink in (0.0, 0.1, 1.0, 10.0):
                    label = {"fontsize": 7, "xytext": (2, -9), "textcoords": "offset points"}
                    ax.annotate(f"{shrink:g}", (x, y), **label)
        ax.set(title=f"{HOPS[hop]}; at the marks: s", xlabel="other facts moved, percent")
    first.set_ylabel("share right, of edits that succeed")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


FIGURES = (grokking, edits, when, locate, early, covers, paths, many, mass, capacity, sequence)
FIGURES += (retention, exceptions, tradeoff)
SHOWN = {  # {folder of runs: the figures of it that README.md and FINDINGS.md show}
    "edits": (grokking, edits),
    "main": (when, locate, covers),
    "circuits": (early, paths),
    "many": (many,),
    "mass": (mass,),
    "capacity": (capacity, sequence),
    "ablate": (retention,),
    "exceptions": (exceptions,),
    "countries": (tradeoff,),
}


def write_svg(figure, file: Path):
    """With coordinates, which stand in quotes, cut to hundredths of a point: finer ones cannot be
    seen. Numbers in the text are left as they are."""

    def cut(attribute: re.Match) -> str:
        return re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0])

    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    file.write_text(re.sub(r'"[^"]*"', cut, drawn.getvalue()))


def draw(groups: list[Group], out: Path, figures: tuple = FIGURES):
    """Every one of the figures that the runs have results for, into `out`."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError(
            "--plot: matplotlib is not installed; pip install matplotlib, or leave --plot out"
        ) from None
    out.mkdir(parents=True, exist_ok=True)
    style = {"svg.fonttype": "none", "svg.hashsalt": "minedit", "font.size": 9}
    style["font.sans-serif"] = "DejaVu Sans"
    for make in figures:
        with rc_context(style):
            figure = make(groups)
            if figure is None:
                print(f"{make.__name__}: not drawn, no run has results for it")
                continue
            file = out / f"{make.__name__}.svg"
            write_svg(figure, file)
        print(file)
