"""How long do the commands of the README take, from nothing, and how much memory?

    python -m studies.times --out results           # 20 minutes on two idle cores
    python -m studies.times --only quick edit       # these alone; what else is known is kept

One after another, each in a process and a folder of its own, with torch's default number of threads.
Writes times.json: {name: what it took}. Nothing else may run meanwhile, or the times mean little.
Linux and macOS.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import minedit
from studies.all import HERE
from studies.runs import Table, table_of

COMMANDS = {  # of python
    "quick": "minedit.py --quick --out {out}",
    "edit": "minedit.py --arch lmc --edit --out {out}",
    "mass-edit": "minedit.py --mass-edit --out {out}",
    "ablate": "minedit.py --arch loop --ablate --out {out}",
    "triples": "minedit.py --triples results/countries.tsv --clones 3 --reciprocal --edit --out {out}",
    "tests": "-m pytest -q test_all.py studies/test_studies.py",
}


@dataclass
class Took:
    """What one command took."""

    command: str
    seconds: float
    peak_mib: int  # of the process and its children, the largest
    stages: dict[str, float]  # seconds of training and of what came after, as results.json has them
    version: str
    threads: int
    processor: str
    torch: str


def stages_of(folder: Path) -> dict[str, float]:
    """{stage: seconds} of the run in a folder; {} where none or several were made."""
    files = list(folder.rglob("results.json"))
    if len(files) != 1:
        return {}
    results = json.loads(files[0].read_text())
    found = {"training": results["seconds"]}
    for key, value in results.items():
        if key.endswith("_seconds"):
            found[key.removesuffix("_seconds")] = value
    return found


def took(command: str) -> Took:
    """Run a command of python and wait for it; UserError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = shlex.split(command.format(out=shlex.quote(folder)))
        began = time.perf_counter()
        with tempfile.TemporaryFile("w+") as output:
            options = {"stdout": output, "stderr": output, "cwd": HERE}
            process = subprocess.Popen([sys.executable, *words], **options)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            said = output.read().splitlines() or [""]
        seconds = time.perf_counter() - began
        if process.returncode:
            raise minedit.UserError(f"python {command} failed: {said[-1]}", status=1)
        stages = stages_of(Path(folder))
    return Took(
        command="python " + command.replace(" --out {out}", ""),
        seconds=round(seconds, 1),
        peak_mib=minedit.mebibytes(usage.ru_maxrss),
        stages=stages,
        version=str(minedit.version()),
        threads=torch.get_num_threads(),
        processor=platform.machine(),
        torch=torch.__version__,
    )


def times_table(files: list[dict[str, dict]]) -> Table | None:
    """Of times.json, the only file."""
    rows = [("command", "seconds", "MiB", "of it")]
    machines = {}
    for entry in files[0].values():
        stages = ", ".join(f"{name} {s:.0f} s" for name, s in entry["stages"].items())
        rows.append((entry["command"], f"{entry['seconds']:.0f}", entry["peak_mib"], stages))
        machine = f"{entry['threads']} threads, {entry['processor']}, torch {entry['torch']}"
        machines[machine] = None
    return table_of(rows, "; ".join(machines))


def command(args):
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "times.json"
    found = minedit.read_json(file, "remove it") if file.exists() else {}
    for name in args.only or COMMANDS:
        found[name] = asdict(took(COMMANDS[name]))
        minedit.write_atomically(file, found)
        print(f"{name}: {found[name]['seconds']:.0f} s", flush=True)
    print(f"\n{times_table([found])}")


def main(argv: list[str] | None = None) -> int:
    parser = minedit.Parser("python -m studies.times", allow_abbrev=False)
    parser.description = __doc__.split("\n\n")[0]
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), help="these commands alone")
    parser.add_argument("--out", type=Path, default=Path("runs/times"), help="where times.json is")
    return minedit.guarded(command, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
