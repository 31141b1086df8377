"""Reading many runs and making rows of means of them, for studies/report.py and its figures.

Runs that differ in the seed alone are a group; what two folders hold of one run is merged.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import minedit
from minedit import UserError, mean, require, table
from models import ARCHS

# --- Reading runs ---------------------------------------------------------------------------------


@dataclass
class Group:
    """Runs that differ in the seed alone."""

    name: str  # the cell; where it has several groups, their folder
    arch: str
    runs: list[dict]  # by seed


def lookup(result: dict, place: str):
    """What a result holds at "key.key...", None where nothing is; of a list the first entry that has
    some values: "key[name=value,name=value].key"."""
    for key in re.findall(r"\[.*?\]|[^.\[\]]+", place):
        if key.startswith("["):
            wanted = dict(pair.split("=") for pair in key[1:-1].split(","))
            result = first_with(result or [], wanted)
        else:
            result = (result or {}).get(key)
    return result


def first_with(entries: list[dict], wanted: dict[str, str]) -> dict | None:
    for entry in entries:
        if all(str(entry.get(name)) == value for name, value in wanted.items()):
            return entry
    return None


def entries_at(place: str) -> Callable[[dict], list[dict]]:
    """A function of a run: the list of entries that it holds at a place, [] where nothing is."""
    return lambda run: lookup(run, place) or []


def settings_of(result: dict) -> str:
    """What groups a run: its settings but for the seed; what is absent is off, of triples the
    content counts, not the place."""
    found = {}
    for part in ("data", "model", "recipe"):
        for key, value in result["config"][part].items():
            if value and key != "triples":
                found[key] = value
    return json.dumps([result["arch"], found], sort_keys=True)


def whole_lines(lines: list[str]) -> list[dict]:
    """Of a log, of which the last line may be half written."""
    found = [json.loads(line) for line in lines[:-1]]
    try:
        return found + [json.loads(line) for line in lines[-1:]]
    except ValueError:
        return found


def read_run(file: Path) -> dict:
    """A results.json with what stands beside it, in one form whichever program wrote it; UserError
    where it is not one."""
    remedy = "remove it or report another folder"
    result = minedit.read_json(file, remedy)
    expected = {"arch", "seed", "accuracy", "n_paths", "grokked_at", "seconds", "config"}
    require(expected <= result.keys(), f"{file}: not the results of a run; {remedy}")
    try:
        log = file.with_name("log.jsonl")
        lines = log.read_text().splitlines() if log.exists() else []
        result["history"] = whole_lines(lines)
        result["edits"] = lookup(result, "propagation.edits") or result.get("edits", [])
        for entry in result["edits"]:
            entry.setdefault("a_priori", True)
        result["exceptions"] = result.get("ablate")  # of the core; "ablation" is the study's
        result["ablate"] = result.get("ablation")
        result["edit"] = minedit.main_edit(result)
        result["step_train"] = minedit.first_step(result["history"], train=0.99)
        result["step_id"] = minedit.first_step(result["history"], id=0.99)
        result["step_ood"] = minedit.first_step(result["history"], ood=0.9)
        result["settings"] = settings_of(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not the results of a run; {remedy}") from None
    return result


MOMENTS = ("facts", "before", "memorized", "end")  # in order, see training.moments_due


def at_moments(run: dict, name: str) -> dict[str, dict]:
    """{moment: entry} of circuits.NAME, in the order of the moments."""
    found = lookup(run, f"circuits.{name}") or {}
    return {moment: found[moment] for moment in MOMENTS if moment in found}


def kind_of_edit(entry: dict) -> str:
    """Of mass edits the method; of MEMIT, which is run with all of them, its target besides."""
    return f"memit, {entry['target']}" if entry["method"] == "memit" else entry["method"]


def read_groups(folders: list[Path]) -> list[Group]:
    """All runs in or below the folders, in the order of the cells and of their names."""
    folders = [folder.resolve() for folder in folders]
    files = set()
    for folder in folders:
        files |= set(folder.rglob("results.json"))
    require(files, f"{folders[0]}: no results.json in it or below it; train a run there first")
    root = os.path.commonpath(folders)
    found = defaultdict(list)  # {settings: [{seed: result}]}
    for file in sorted(files):
        result = read_run(file)
        result["folder"] = os.path.relpath(file.parent, root).partition("-seed")[0]
        put(result, found[result["settings"]])
    groups = []
    for several in found.values():
        for by_seed in several:
            runs = [by_seed[seed] for seed in sorted(by_seed)]
            groups.append(Group(runs[0]["folder"], runs[0]["arch"], runs))
    name_groups(groups)
    return sorted(groups, key=place_of)


def all_entries(groups: list[Group], place: str) -> Iterator[tuple[Group, dict]]:
    """Each entry of the lists that runs hold at a place, and the group of its run."""
    for group in groups:
        for run in group.runs:
            for entry in lookup(run, place) or []:
                yield group, entry


def place_of(group: Group) -> tuple:
    """To sort by: the cells in their order, then the names, numbers in them by their size."""
    parts = re.split(r"(\d+)", group.name)  # text and number by turns
    parts[1::2] = [int(number) for number in parts[1::2]]
    return list(ARCHS).index(group.arch), parts


def put(result: dict, groups: list[dict[int, dict]]):
    """A result into the first of the groups {seed: result} that has none of its seed, or one of the
    same training, to which it then adds what it holds."""
    seed = result["seed"]
    for by_seed in groups:
        if seed not in by_seed:
            by_seed[seed] = result
            return
        known = by_seed[seed]
        if known["accuracy"] == result["accuracy"]:
            more = {key: value for key, value in result.items() if value or key not in known}
            by_seed[seed] = known | more
            return
    groups.append({seed: result})


def name_groups(groups: list[Group]):
    """A group comes with the name of its folder: that of its cell instead where no cell has two
    groups; and the seeds behind a name that several have."""
    archs = Counter(group.arch for group in groups)
    if max(archs.values()) == 1:
        for group in groups:
            group.name = group.arch
    names = Counter(group.name for group in groups)
    for group in groups:
        if names[group.name] > 1:
            group.name += f", seed {' '.join(str(run['seed']) for run in group.runs)}"


# --- Rows of means --------------------------------------------------------------------------------


class Table(NamedTuple):
    """Rows of cells, the first one the heads of the columns, and what they mean."""

    rows: list[tuple]
    legend: str

    def __str__(self) -> str:
        return f"{table(self.rows)}\n{self.legend}"


def table_of(rows: list[tuple], legend: str) -> Table | None:
    """None where there is nothing but heads."""
    return Table(rows, legend) if len(rows) > 1 else None


def short(value) -> str:
    """The words of a cell, "" for None; a feed-forward store is called ff."""
    text = "" if value is None else str(value)
    return text.replace("feed_forward.down", "ff").replace("feed_forward", "ff")


def named(entries: dict) -> list[dict]:
    """The entries of {name: entry}, with their names as "at"."""
    return [entry | {"at": name} for name, entry in (entries or {}).items()]


def mean_table(
    groups: list[Group],
    entries: Callable[[dict], list[dict]],
    words: dict[str, str],
    shares: dict[str, str],
    legend: str,
    lowest: tuple[str, ...] = (),
) -> Table | None:
    """A row for each group and each kind of entry, by its `words` {place: head}; the means over the
    group's runs of `shares` {place: head}, of those in `lowest` the lowest run too. entries(run)
    lists what a run has. None where no run has any."""
    several = any(len(group.runs) > 1 for group in groups)
    heads = []
    for place, head in shares.items():
        heads.append(f"{head} (lowest)" if place in lowest and several else head)
    rows = [("arch", *words.values(), *heads)]
    for group in groups:
        kinds, n_runs = defaultdict(list), 0
        for run in group.runs:
            found = entries(run)
            n_runs += bool(found)
            for entry in found:
                kinds[tuple(short(lookup(entry, place)) for place in words)].append(entry)
        for kind, alike in kinds.items():
            name = group.name
            if len(alike) < n_runs:
                name += f" ({len(alike)} of {n_runs})"
            row = [name, *kind]
            for place in shares:
                values = [lookup(entry, place) for entry in alike]
                row.append(mean(values, None, place in lowest))
            rows.append(tuple(row))
    return table_of(rows, legend)


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}
