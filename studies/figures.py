"""Figures of many runs as SVG files, for `python -m studies.report DIR --plot`. Needs matplotlib.

A figure is a function: it gathers the values of all runs, a value a run, into panels of lines, and
says how these are drawn: the mean over runs with their range.
"""

import statistics
from collections import defaultdict
from pathlib import Path

import torch

from minedit import UserError
from studies.runs import Group, lookup

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

    def lines(self) -> list[str]:
        """The names of all lines: one has the same style in all panels."""
        names = {}
        for panel in self.values.values():
            names |= dict.fromkeys(panel)
        return list(names)


def draw_lines(
    panels: Panels, xlabel: str, joined: bool, columns: int = 4, ylabel: str = "share of answers"
):
    """A matplotlib Figure: means as marks, their range as a band (joined) or a bar. Numbers on the
    x axis ascend."""
    from matplotlib.figure import Figure

    columns = min(len(panels.values), columns)
    n_rows = -(-len(panels.values) // columns)
    figure = Figure((2.7 * columns + 0.6, 2.8 * n_rows + 0.5), layout="constrained")
    names = panels.lines()
    drawn = {}
    for place, (title, lines) in enumerate(panels.values.items()):
        ax = figure.add_subplot(n_rows, columns, place + 1)
        ticks = {}
        for values in lines.values():
            ticks |= dict.fromkeys(values)
        ticks = sorted(ticks, key=int) if all(map(str.isdigit, ticks)) else list(ticks)
        n_runs = 1
        for name, values in lines.items():
            values = {tick: values[tick] for tick in ticks if tick in values}
            i = names.index(name)
            shift = 0 if joined else 0.6 * ((i + 0.5) / len(names) - 0.5)
            x = [ticks.index(tick) + shift for tick in values]
            middle = [statistics.fmean(found) for found in values.values()]
            low = [min(found) for found in values.values()]
            high = [max(found) for found in values.values()]
            n_runs = max(n_runs, *(len(found) for found in values.values()))
            style = {"color": COLOURS[i % 8], "marker": MARKS[i % 8], "ms": 4, "lw": 1}
            (drawn[name],) = ax.plot(x, middle, ls=DASHES[i % 8] if joined else "", **style)
            if joined:
                ax.fill_between(x, low, high, color=COLOURS[i % 8], alpha=0.2)
            else:
                ax.vlines(x, low, high, color=COLOURS[i % 8])
        label_ticks(ax, ticks)
        ax.set(title=f"{title} (n = {n_runs})", xlabel=xlabel, ylim=(-0.04, 1.04))
        if place % columns == 0:
            ax.set_ylabel(ylabel)
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4)
    return figure


def label_ticks(ax, ticks: list[str]):
    """Every tick where they are few, every few where they are many; upright if short."""
    every = -(-len(ticks) // 10) if all(tick.isdigit() for tick in ticks) else 1
    is_long = len("".join(ticks[::every])) > 24
    ax.set_xticks(range(0, len(ticks), every), ticks[::every], rotation=90 if is_long else 0)


# --- The figures ----------------------------------------------------------------------------------


def grokking(groups: list[Group]):
    """Accuracy against training steps, a panel for each cell."""
    panels = Panels()
    labels = {"one_hop": "facts", "train": "trained", "id": "held out (ID)", "ood": "OOD"}
    for group in groups:
        for run in group.runs:
            for record in run["history"]:
                for key, label in labels.items():
                    panels.add(group.name, label, record["step"], record[key])
    return draw_lines(panels, "training step", joined=True) if panels.values else None


def propagation(groups: list[Group]):
    """What follows an edit, by cell: ROME, prototype, a-priori site."""
    panels = Panels()
    for group in groups:
        for run in group.runs:
            for key, label in HOPS.items():
                panels.add("right answers after one edit", label, group.name, run["edit"].get(key))
    if not panels.values:
        return None
    figure = draw_lines(panels, "", joined=False)
    figure.set_size_inches(5.2, 3.2)
    return figure


def when(groups: list[Group]):
    """The same by the pass that an edit is made for, and the calls at which it acts."""
    panels = Panels()
    for group in groups:
        for run in group.runs:
            written = lookup(run, "when.written") or []
            for entry in sorted(written, key=lambda e: e["pass"]):
                for key, label in HOPS.items():
                    x = f"{entry['pass']}, {entry['acts']}"
                    panels.add(group.name, label, x, entry[key])
    xlabel = "made for pass, acting"
    return draw_lines(panels, xlabel, joined=False) if panels.values else None


def mass(groups: list[Group]):
    """Efficacy, paraphrase and specificity against the number of edits."""
    panels = Panels()
    for group in groups:
        for key in ("efficacy", "paraphrase", "specificity"):
            for run in group.runs:
                for entry in lookup(run, "mass.edits") or []:
                    line = f"{entry['method']}, {entry['target']}"
                    panels.add(f"{group.name}, {key}", line, entry["n"], entry.get(key))
    xlabel = "facts edited at once"
    return draw_lines(panels, xlabel, joined=True, columns=3) if panels.values else None


def paths(groups: list[Group]):
    """Inference paths of ID and OOD compositions at three moments of a training."""
    panels = Panels()
    for group in groups:
        for run in group.runs:
            for queries in ("id", "ood"):
                for moment, entry in (lookup(run, f"circuits.{queries}") or {}).items():
                    for key in ("right", "bridge", "relation", "whole", "visible", "rest"):
                        x = f"{queries.upper()} {moment}"
                        panels.add(group.name, key, x, entry.get(key))
    return draw_lines(panels, "asked, when", joined=False) if panels.values else None


def retention(groups: list[Group]):
    """What is left of each kind of question, against the curvature mass that is kept."""
    panels = Panels()
    labels = {"recited": "exceptions recited", "true": "exceptions right", "rare": "rare facts"}
    labels |= {"frequent": "frequent facts", "arithmetic": "arithmetic", "open_book": "open book"}
    labels |= {"id": "ID", "ood": "OOD"}
    for group in groups:
        for run in group.runs:
            for entry in lookup(run, "ablate.sweep") or []:
                for key, label in labels.items():
                    panels.add(group.name, label, entry["keep"], entry.get(key))
    xlabel = "share of mass kept"
    return draw_lines(panels, xlabel, joined=True) if panels.values else None


def locate(groups: list[Group]):
    """Causal tracing: the share of prompts whose answer is back, from white to black; a row for
    each state that is restored, a column for each token replaced and restored."""
    from matplotlib.figure import Figure

    maps = {group.name: tracing_map(group) for group in groups}
    maps = {name: found for name, found in maps.items() if found is not None}
    if not maps:
        return None
    columns = min(2, len(maps))
    n_rows = -(-len(maps) // columns)
    figure = Figure((4.8 * columns + 0.6, 2.9 * n_rows), layout="constrained")
    for place, (title, (states, heads, shares)) in enumerate(maps.items()):
        ax = figure.add_subplot(n_rows, columns, place + 1)
        extent = (-0.5, len(heads) - 0.5, len(states) - 0.5, -0.5)
        grey = shares.kron(torch.ones(9, 9)).numpy()  # 9 x 9 pixels a cell: no viewer blurs them
        options = {"interpolation": "none", "aspect": "auto", "extent": extent}
        ax.imshow(grey, "Greys", vmin=0, vmax=1, **options)
        ax.set_yticks(range(len(states)), states)
        ax.set_xticks(range(len(heads)), heads, rotation=90)
        ax.set(title=title, xlabel="question: token replaced, token restored")
    return figure


def tracing_map(group: Group):
    """(states, heads of columns, mean shares [state, column]) of a group, None without tracing."""
    maps, states, heads = [], [], []
    for run in group.runs:
        found = lookup(run, "locate")
        if not found:
            continue
        states = [f"{state['pass']} {state['part']}" for state in found["states"]]
        heads, blocks = [], []
        for effect in found["effects"]:
            if not effect["top1"]:
                continue
            block = torch.tensor(effect["top1"])  # [state, token]
            blocks.append(block)
            for word in ("h", "r1", "r2")[: block.shape[1]]:
                heads.append(f"{effect['query'][:4]}: {effect['corrupted']}, {word}")
        if blocks:
            maps.append(torch.cat(blocks, 1))
    if not maps:
        return None
    return states, heads, torch.stack(maps).mean(0)


def mean_of(entries: list[dict], key: str) -> float:
    """Over the entries that have it; NaN, which is not drawn, where none has."""
    values = [entry[key] for entry in entries if entry[key] is not None]
    return statistics.fmean(values) if values else float("nan")


def tradeoff(groups: list[Group]):
    """What follows an edit against what moves that should not, along the shrinkage of C: a panel
    for each hop, a line for each cell and key; means over runs."""
    from matplotlib.figure import Figure

    lines = defaultdict(lambda: defaultdict(list))  # {(cell, key): {s: [entry of a run]}}
    for group in groups:
        for run in group.runs:
            for entry in lookup(run, "tradeoff") or []:
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
                follows.append(mean_of(entries, "direct") * mean_of(entries, hop))
            style = {"color": COLOURS[i // 2 % 8], "marker": MARKS[i // 2 % 8], "ms": 4, "lw": 1}
            dash = "-" if key == "own" else ":"
            ax.plot(moved, follows, ls=dash, label=f"{cell}, {key} key", **style)
            for shrink, x, y in zip(by_shrink, moved, follows):
                if key == "own" and shrink in (0.0, 0.1, 1.0, 10.0):
                    label = {"fontsize": 7, "xytext": (2, -9), "textcoords": "offset points"}
                    ax.annotate(f"{shrink:g}", (x, y), **label)
        ax.set(title=f"{HOPS[hop]}; at the marks: s", xlabel="other facts moved, percent")
    first.set_ylabel("edited fact x hop: share right")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def many(groups: list[Group]):
    """What follows of edits made in one update, against their number; a panel for each cell."""
    panels = Panels()
    labels = HOPS | {"both": "both hops edited"}
    for group in groups:
        for run in group.runs:
            for entry in lookup(run, "many") or []:
                if (entry["method"], entry["target"]) == ("memit", "prototype"):
                    for key, label in labels.items():
                        panels.add(group.name, label, entry["n"], entry[key])
                    moved = entry["unrelated_one_hop_moved"]
                    panels.add(group.name, "other facts moved", entry["n"], moved)
    xlabel = "facts edited at once"
    return draw_lines(panels, xlabel, joined=True) if panels.values else None


def capacity(groups: list[Group]):
    """Score of n edits in one update against the slots of the store; a panel for each cell."""
    panels = Panels()
    for group in groups:
        for run in group.runs:
            for entry in lookup(run, "capacity.edits") or []:
                if entry["score"] is not None:
                    score = entry["score"] / 100
                    panels.add(group.arch, f"{entry['n']} facts", entry["slots"], score)
    options = {"joined": True, "ylabel": "score / 100"}
    return draw_lines(panels, "slots of the store", **options) if panels.values else None


def sequence(groups: list[Group]):
    """What is left of the first batch of edits, and of all so far, against the facts edited."""
    panels = Panels()
    for group in groups:
        for run in group.runs:
            for entry in lookup(run, "sequence") or []:
                way, n = entry["way"], entry["n"]
                panels.add(group.arch, f"first batch, {way}", n, entry["first"])
                if way != "forgotten":
                    panels.add(group.arch, f"others kept, {way}", n, entry["specificity"])
    return draw_lines(panels, "facts edited so far", joined=True) if panels.values else None


FIGURES = (grokking, propagation, when, locate, mass, paths, retention, tradeoff, many, capacity)
FIGURES += (sequence,)


def draw(groups: list[Group], out: Path):
    """Every figure that the runs have results for, into `out`."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError(
            "--plot: matplotlib is not installed; pip install matplotlib, or leave --plot out"
        ) from None
    out.mkdir(parents=True, exist_ok=True)
    style = {"svg.fonttype": "none", "svg.hashsalt": "minedit", "font.size": 9}
    style["font.sans-serif"] = "DejaVu Sans"
    for make in FIGURES:
        with rc_context(style):
            figure = make(groups)
            if figure is None:
                print(f"{make.__name__}: not drawn, no run has results for it")
                continue
            file = out / f"{make.__name__}.svg"
            figure.savefig(file, metadata={"Date": None})
        print(file)
