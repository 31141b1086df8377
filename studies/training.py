"""Moments of a training, and training on from them: for circuits, relearning and transfer."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import minedit
from minedit import Run, Training
from models import Model


class Moments:
    """The averaged weights at three moments of a training, kept beside its checkpoint."""

    def __init__(self, run: Run):
        self.run, self.file = run, run.folder / "moments.pt"
        self.found = {}  # name: (the evaluation's record, weights)
        if run.step and self.file.exists():
            self.found = torch.load(self.file, weights_only=True)
        if run.finished and "end" not in self.found:
            raise minedit.UserError(
                f"{run.folder}: was trained without this study, so that its moments are not kept; "
                "use --retrain or another --out"
            )

    def __call__(self, training: Training, record: dict):
        """Called at every evaluation."""
        early = "memorized" not in self.found
        fitted = record["train"] or 0.0
        names = []
        if early and fitted < 0.9:
            names.append("before")
        if early and fitted >= 0.99:
            names.append("memorized")
        if self.run.finished:
            names.append("end")
        for name in names:
            weights = training.average.state_dict()
            self.found[name] = (record, {key: p.cpu().clone() for key, p in weights.items()})
        if names:
            minedit.write_atomically(self.file, lambda file: torch.save(self.found, file))


class Moment(NamedTuple):
    """A model after some further steps."""

    steps: int
    model: Model  # as trained
    average: Model  # its moving average


def further(run: Run, weights: dict[str, Tensor], at: list[int], first: int) -> Iterator[Moment]:
    """Train on from `weights` under the run's recipe, from step `first` of it, optimizers anew;
    yields the model after each number of steps in `at`, ascending."""
    training = run.fresh()
    training.model.load_state_dict(weights)
    training.average.load_state_dict(weights)
    batches = run.make_batches(run.paths, run.recipe, training.generator)
    for step in range(max(at) + 1):
        if step in at:
            yield Moment(step, training.model, training.average)
        training.step(batches, run.recipe.at(first + step), first + step)
