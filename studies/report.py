"""Tables, claims and figures out of many runs, wherever they were computed.

    python -m studies.report results/main                 # every table of the runs in or below it
    python -m studies.report results --claims             # the papers' claims beside ours
    python -m studies.report results/main --plot --out runs/figures

A row is the mean over runs that differ in the seed alone. The tables are in studies/edit_tables.py
and studies/circuit_tables.py, the claims in studies/claims.py, the figures in studies/figures.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import minedit
from minedit import require
from studies import circuit_tables, edit_tables, gpt2
from studies.all import HERE
from studies.claims import Results, claims_table, read_claims, summary_table
from studies.runs import Group, Table, read_groups
from studies.times import times_table

TABLES = [*edit_tables.TABLES, *circuit_tables.TABLES]


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
