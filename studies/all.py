"""Every run behind the tables of results/, by one command.

    python -m studies.all --list                    # what is left, and how long it takes
    python -m studies.all --jobs 2                  # run it, two processes of one thread each
    python -m studies.all --jobs 8 --part 3/10      # the third of ten parts: a job array's index
    python -m studies.all main circuits             # these folders alone

A job is what one process computes, one run or the four cells of a seed. Runs are made in --work
(runs/all), where a killed one goes on from its last evaluation; of a finished one the three small
files are copied, with rounded numbers, into --results, where `--list` and `python -m
studies.report` look for it. So parts that ran on several machines are put together by copying their
results/. A run that names a commit is done, whichever that is; `--list` names the commits of all.
UMLS is not in this repository: its runs want --umls FILE. What is no run of a seed, the figures of
speed and of GPT-2, has commands of its own: studies.bench, studies.gpu, studies.gpt2.
"""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import minedit
from minedit import UserError, require
from models import ARCHS

HERE = Path(__file__).parent.parent
CELLS = tuple(ARCHS)
SIZES = {  # variants of the loop and of the LMC
    "loop-blocks2": "--arch loop --blocks 2",
    "loop-blocks3": "--arch loop --blocks 3",
    "loop-depth2": "--arch loop --depth 2",
    "loop-depth4": "--arch loop --depth 4",
    "loop-relu256": "--arch loop --ff-top-k 0 --d-ff 256",
    "loop-relu1024": "--arch loop --ff-top-k 0",
    "loop-gelu256": "--arch loop --ff-top-k 0 --d-ff 256 --addressing gelu",
    "lmc-ff": "--arch lmc --feed-forward",
    "lmc-slots128": "--arch lmc --slots 128 --top-k 8",
    "lmc-slots13-ff": "--arch lmc --slots 13 --top-k 1 --feed-forward",
}
REGIMES = {  # of the training compositions
    "first-hop": "--regime first-hop --augment 0.5",
    "second-hop": "--regime second-hop --augment 0.5",
    "both-hops": "--regime both-hops --augment 0.5",
    "second-hop-share0.1": "--regime second-hop --augment 0.1",
    "second-hop-all": "--regime second-hop --augment 1",
    "phi18": "--train-fraction 1",
    "phi7": "--train-fraction 0.4",
    "phi4": "--train-fraction 0.2",
}


class Job(NamedTuple):
    """What one process computes, by one command or several one after another."""

    group: str  # the folder of its table
    name: str
    out: str  # --out of its commands, below --work: the folder of the run, or of several
    folders: tuple[str, ...]  # of its runs, below --work and --results
    commands: tuple[str, ...]  # arguments of python, one after another
    wants: tuple[str, ...]  # entries of each results.json when it is done
    minutes: float  # on one thread of a small machine


def four_cells(seeds: int) -> list[Job]:
    """The 2x2 of each seed in one process, since it asks what all four cells answer right."""
    jobs = []
    for seed in range(seeds):
        folders = tuple(f"main/{arch}-seed{seed}" for arch in CELLS)
        studies = ("-m studies.propagation", "-m studies.second_moment")
        commands = tuple(f"{study} --arch all --seed {seed}" for study in studies)
        wants = ("propagation", "locate", "when", "second_moment")
        jobs.append(Job("main", f"main-seed{seed}", "main", folders, commands, wants, 12))
    return jobs


def each(
    group: str, runs: dict[str, str], seeds: int, commands: list[str], wants: str, minutes: float
) -> list[Job]:
    """A job for each of `runs` {name: options} and seed; its commands get the run's options."""
    jobs = []
    for name, options in runs.items():
        for seed in range(seeds):
            whole = tuple(f"{command} {options} --seed {seed}" for command in commands)
            folder = f"{group}/{name}-seed{seed}"
            job = Job(group, folder, folder, (folder,), whole, tuple(wants.split()), minutes)
            jobs.append(job)
    return jobs


def every_cell(options: str = "", name: str = "") -> dict[str, str]:
    """{name of the run: its options}, for the four cells."""
    return {f"{arch}{name}": f"--arch {arch} {options}".strip() for arch in CELLS}


def capacities() -> list[Job]:
    """Stores of several widths. All peers of MEMIT in one of 8192 slots; in the widest, where 10 000
    edits hold, those that need no eigendecomposition of C, LMC. Batches one after another where all
    hold and where they do not, LMC."""
    peers = "-m studies.mass_edit --counts 10000"
    few_peers = f"{peers} --methods memit emmet rome finetune"
    sequence = "-m studies.sequence"
    jobs = []
    for slots, arch, commands, wants, minutes in (
        (2048, "lmc", [], "capacity", 3),
        (2048, "dense", [], "capacity", 3),
        (4096, "lmc", [sequence], "capacity sequence", 14),
        (4096, "dense", [], "capacity", 6),
        (8192, "lmc", [peers], "capacity mass", 45),
        (8192, "dense", [peers], "capacity mass", 45),
        (16384, "lmc", [few_peers, sequence], "capacity mass sequence", 110),
        (16384, "dense", [], "capacity", 25),
    ):
        runs = {f"{arch}-{slots}": f"--arch {arch} --slots {slots} --d-ff {slots}"}
        jobs += each("capacity", runs, 3, ["-m studies.capacity", *commands], wants, minutes)
    return jobs


def plan(umls: Path | None) -> list[Job]:
    """All jobs, in the order in which they are run."""
    circuits = "-m studies.circuits --eval-every 50"
    jobs = each("edits", every_cell(), 5, ["minedit.py --edit"], "edits", 2)
    jobs += four_cells(5)
    jobs += each("many", every_cell(), 3, ["-m studies.many"], "many", 14)
    jobs += each("circuits", every_cell(), 5, [circuits], "circuits", 6)
    sparse = every_cell("--out-degree 19")
    transfer = "-m studies.transfer --eval-every 50"
    jobs += each("transfer", sparse, 5, [transfer], "transfer transfer_gentle", 6)
    jobs += each("ablate", every_cell(), 5, ["-m studies.ablation"], "ablation", 18)
    exceptions = every_cell() | every_cell("--label-noise 0.02", "-few")
    both = ["minedit.py --ablate", "-m studies.attention"]
    jobs += each("exceptions", exceptions, 3, both, "ablate attention", 4)
    narrow = {arch: f"--arch {arch} --slots 2048 --d-ff 2048" for arch in ("dense", "lmc")}
    jobs += each("mass", narrow, 5, ["-m studies.mass_edit"], "mass", 25)
    jobs += capacities()
    spread = "-m studies.mass_edit --counts 1000 10000 --methods memit"
    runs = {"dense-4x4096": "--arch dense --depth 4 --d-ff 4096"}
    jobs += each("spread", runs, 3, [spread], "mass", 70)
    jobs += each("variants", SIZES, 3, ["-m studies.propagation"], "propagation", 4)
    for regime, options in REGIMES.items():
        runs = every_cell(options, f"-{regime}")
        jobs += each("regimes", runs, 3, [circuits], "circuits", 4)
    real = ["minedit.py --edit", "-m studies.shrinkage"]
    countries = "--triples results/countries.tsv"
    runs = {"lmc": f"{countries} --clones 3 --reciprocal", "lmc-plain": countries}
    jobs += each("countries", runs, 3, real, "edits tradeoff", 8)
    if umls is not None:
        options = f"--triples {shlex.quote(str(umls))} --tails numbered"
        runs = every_cell(options)
        runs["lmc-sorted"] = f"--arch lmc {options} --tail-order sorted"
        dense = {"dense": runs.pop("dense")}  # where else than at one site?
        everywhere = [*real, "-m studies.propagation"]
        jobs += each("umls", dense, 3, everywhere, "edits tradeoff propagation", 14)
        jobs += each("umls", runs, 3, real, "edits tradeoff", 9)
    return jobs


# --- What is done ---------------------------------------------------------------------------------


def version_of(folder: str, results: Path) -> str | None:
    """The commit by which a run was made ("None" outside a checkout); None where there is no run or
    an early one, which does not say."""
    file = results / folder / "config.json"
    if not file.exists():
        return None
    environment = minedit.read_json(file, "remove it").get("environment", {})
    return str(environment["version"]) if "version" in environment else None


def is_done(job: Job, results: Path) -> bool:
    """Whether all its runs are there, with all their entries, of a commit that they name."""
    for folder in job.folders:
        file = results / folder / "results.json"
        if not file.exists() or version_of(folder, results) is None:
            return False
        if not set(job.wants) <= minedit.read_json(file, "remove it").keys():
            return False
    return True


def rounded(value):
    """Of what JSON can hold: its floats to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [rounded(x) for x in value]
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return value


UNUSED = ("lens", "trace", "swap", "curve", "states", "rise")  # no table or figure is made of these
UNUSED_OF_SWEEPS = (  # of a strength that was tried the scores are kept
    "site pass condition residual_left residual_predicted largest_cosine relative_norm ridge "
    "null_space fallbacks seconds new_likelier new_likelier_paraphrase own_likelier paper_score"
).split()


def without(found: dict, names) -> dict:
    return {key: value for key, value in found.items() if key not in names}


def used(found: dict) -> dict:
    """An object of a JSON file as it is read, without what no table or figure is made of."""
    found = without(found, UNUSED)
    if "sweep" in found:
        found["sweep"] = [without(entry, UNUSED_OF_SWEEPS) for entry in found["sweep"]]
    return found


def in_lines(content: dict) -> bytes:
    """As JSON, a line for each entry."""
    lines = []
    for key, value in content.items():
        lines.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def collect(folder: Path, to: Path):
    """Copy what the report reads of a run."""
    to.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "results.json"):
        content = json.loads((folder / name).read_text(), object_hook=used)
        minedit.write_atomically(to / name, in_lines(rounded(content)))
    lines = (folder / "log.jsonl").read_text().splitlines()
    log = "".join(json.dumps(rounded(json.loads(line))) + "\n" for line in lines)
    minedit.write_atomically(to / "log.jsonl", log.encode())


# --- Running --------------------------------------------------------------------------------------


class Work:
    """Runs jobs side by side, and says what is left after each."""

    def __init__(self, jobs: list[Job], work: Path, results: Path, n_jobs: int):
        self.jobs, self.work, self.results, self.n_jobs = jobs, work, results, n_jobs
        self.left = sum(job.minutes for job in jobs)
        self.failed = []
        self.lock = threading.Lock()

    def run(self):
        with ThreadPoolExecutor(self.n_jobs) as pool:
            list(pool.map(self.run_job, self.jobs))
        if self.failed:
            raise UserError(f"{len(self.failed)} jobs failed: {', '.join(self.failed)}", status=1)

    def run_job(self, job: Job):
        began = time.perf_counter()
        out = self.work / job.out
        out.mkdir(parents=True, exist_ok=True)
        log = self.work / "logs" / f"{job.name.replace('/', '-')}.txt"
        log.parent.mkdir(exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "a") as output:
            for command in job.commands:
                words = [sys.executable, *shlex.split(command), "--out", str(out), "--resume"]
                options = {"stdout": output, "stderr": output, "env": environment, "cwd": HERE}
                status = subprocess.run(words, **options).returncode
                if status:
                    break
        with self.lock:
            self.left -= job.minutes
            minutes = (time.perf_counter() - began) / 60
            left = f"{self.left / self.n_jobs:.0f} minutes to go"
            if status:
                self.failed.append(str(log))
                print(f"{job.name}: failed, see {log}; {left}", flush=True)
                return
            for folder in job.folders:
                collect(self.work / folder, self.results / folder)
            print(f"{job.name}: {minutes:.1f} minutes; {left}", flush=True)


def overview(jobs: list[Job], results: Path, n_jobs: int) -> str:
    """A row for each folder of tables; the time that is left, and the commits of what is done."""
    done = [job for job in jobs if is_done(job, results)]
    rows = [("folder", "jobs", "done", "minutes left")]
    total = 0
    for group in dict.fromkeys(job.group for job in jobs):
        members = [job for job in jobs if job.group == group]
        left = [job for job in members if job not in done]
        minutes = sum(job.minutes for job in left)
        rows.append((group, len(members), len(members) - len(left), f"{minutes:.0f}"))
        total += minutes
    made_by = {version_of(job.folders[0], results) for job in done}
    return (
        f"{minedit.table(rows)}\nminutes on one thread; in all {total / 60 / n_jobs:.1f} hours with "
        f"--jobs {n_jobs}\ncommits of what is done: {', '.join(sorted(made_by)) or '-'}"
    )


# --- Command line ---------------------------------------------------------------------------------


def part_of(jobs: list[Job], part: str) -> list[Job]:
    """Those of part "i/n", every n-th from the i-th on; UserError for another form."""
    message = f"--part {part}: give i/n with 1 <= i <= n, such as 3/10"
    i, slash, n = part.partition("/")
    require(slash and i.isdigit() and n.isdigit(), message)
    require(1 <= int(i) <= int(n), message)
    return jobs[int(i) - 1 :: int(n)]


def command(args):
    require(args.jobs >= 1, f"--jobs {args.jobs}: must be at least 1")
    if args.umls is not None:
        require(args.umls.exists(), f"--umls {args.umls}: there is no such file")
        args.umls = args.umls.resolve()
    jobs = plan(args.umls)
    known = list(dict.fromkeys(job.group for job in jobs))
    for group in args.groups:
        require(group in known, f"{group}: no folder of the plan; it has {', '.join(known)}")
    wanted = args.groups or known
    jobs = part_of([job for job in jobs if job.group in wanted], args.part)
    if args.list:
        print(overview(jobs, args.results, args.jobs))
        return
    left = [job for job in jobs if not is_done(job, args.results)]
    print(f"{len(jobs) - len(left)} of {len(jobs)} jobs are done")
    Work(left, args.work.resolve(), args.results.resolve(), args.jobs).run()


def main(argv: list[str] | None = None) -> int:
    parser = minedit.Parser("python -m studies.all", allow_abbrev=False)
    parser.description = __doc__.split("\n\n")[0]
    parser.add_argument("groups", nargs="*", help="folders of tables, all without one")
    parser.add_argument("--list", action="store_true", help="what is left to run, and stop")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (1)")
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n parts of the jobs")
    parser.add_argument("--work", type=Path, default=Path("runs/all"), help="where runs are made")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where they are kept")
    parser.add_argument("--umls", type=Path, help="triples of UMLS, for the runs on it")
    return minedit.guarded(command, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
