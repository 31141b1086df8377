"""Do exceptions leave the attention by curvature alone? The core's --ablate beside its controls.

Trains as `minedit.py --ablate` does, ablates the attention layers by K-FAC at the same shares of
the mass, and then by every control of studies/controls.py with as large a change of each layer,
|W - W'| / |W|, as K-FAC's. After Merullo et al. 2025, arXiv 2510.24256, and what its reviewers
asked for.

    python -m studies.attention --arch lmc --seeds 3 --out runs/exceptions

Writes "attention" into results.json; a run takes 4 minutes on one core.
"""

import sys
import time
from dataclasses import asdict

import minedit
from minedit import AblationRecord, Run
from models import Model
from studies.ablation import check_exceptions, require_exceptions
from studies.controls import CONTROLS, change_of, edited
from studies.training import trained


def attention_stage(run: Run, model: Model, keeps: tuple[float, ...]) -> list[AblationRecord]:
    names = minedit.attention_layers(model)
    batches = run.make_batches(run.paths, run.recipe, run.stream(run.device))
    spectrum = minedit.spectrum_of(run, model, batches.mixture(25), names)
    records = []
    for keep in keeps:
        by_curvature = edited(model, "kfac", spectrum, names, keep)
        records.append(minedit.ablation_record(model, run.paths, by_curvature, "kfac", keep))
        change = {name: change_of(model, name, W) for name, W in by_curvature.items()}
        for method in CONTROLS:
            weights = {}
            for name in names:
                weights |= edited(model, method, spectrum, [name], change[name], run.stream())
            records.append(minedit.ablation_record(model, run.paths, weights, method, keep))
    print(f"\n{minedit.record_table(records, minedit.ABLATION_COLUMNS, minedit.ABLATION_LEGEND)}")
    return records


def command(args):
    require_exceptions(args)
    keeps = minedit.KEEPS[::3] if args.quick else minedit.KEEPS
    for run, model in trained(args, check=check_exceptions):
        began = time.perf_counter()
        records = attention_stage(run, model, keeps)
        run.add_results("attention", [asdict(record) for record in records], began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.attention", __doc__.split("\n\n")[0])
    parser.set_defaults(**minedit.ABLATE)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
