"""Moments of a training, and training on from them: for circuits, relearning and transfer."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import kg
import minedit
from minedit import Run, Training
from models import Model


def positive(text: str) -> int:
    """Of the command line: a number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def require_compositions(args):
    """UserError where facts alone are to be trained."""
    minedit.require(args.branches > 0, "the study is about compositions; give --branches above 0")


def check_edits(run: Run):
    """UserError where no fact can be edited; for `minedit.prepare`."""
    fact, _, _ = kg.draw_edits(run.paths, 1, run.stream())
    minedit.require(len(fact) > 0, "no fact can be edited: every relation has one tail only")


def trained(args, **options) -> Iterator[tuple[Run, Model]]:
    """Each run that was asked for, with its model, trained or loaded; `options`: see
    `minedit.prepare`, which checks all before any is trained."""
    for run in minedit.prepare(args, **options):
        yield run, minedit.trained_model(run, args)


def moments_due(run: Run) -> dict[str, int]:
    """{moment: its step} of the training so far, as far as there is such an evaluation: "facts",
    the last with facts >= 0.99 and train < 0.3; "before", the last with train < 0.9; "memorized",
    the first with train >= 0.99, which ends the search for these two; "end", once finished."""
    due = {}
    for record in run.history:
        fitted = record["train"] or 0.0
        if record["one_hop"] >= 0.99 and fitted < 0.3:
            due["facts"] = record["step"]
        if fitted >= 0.99:
            due["memorized"] = record["step"]
            break
        if fitted < 0.9:
            due["before"] = record["step"]
    if run.finished:
        due["end"] = run.step
    return due


class Moments:
    """The averaged weights at the moments of a training (`moments_due`), kept beside its
    checkpoint. UserError where some are due and were not kept: a training, or a part of it, without
    this study."""

    def __init__(self, run: Run):
        self.run, self.file = run, run.folder / "moments.pt"
        self.found = {}  # name: (the evaluation's record, weights)
        if run.step and self.file.exists():
            state = torch.load(self.file, weights_only=True)
            if run.lengthened(state["identity"]) == run.identity:  # else of a run now replaced
                self.found = state["moments"]
        missing = []
        for name, step in moments_due(run).items():
            # a kept one may be ahead of the checkpoint, which is written after it
            if name not in self.found or self.found[name][0]["step"] < step:
                missing.append(name)
        if missing:
            raise minedit.UserError(
                f"{run.folder}: was trained without this study, so that its moments are not kept "
                f"({', '.join(missing)}); use --retrain or another --out"
            )

    def __call__(self, training: Training, record: dict):
        """Called at every evaluation, when the record is the last of the run's history."""
        names = [name for name, step in moments_due(self.run).items() if step == record["step"]]
        for name in names:
            weights = training.average.state_dict()
            self.found[name] = (record, {key: p.cpu().clone() for key, p in weights.items()})
        if names:
            state = {"identity": self.run.identity, "moments": self.found}
            minedit.write_atomically(self.file, lambda file: torch.save(state, file))


class Moment(NamedTuple):
    """A model after some further steps."""

    steps: int
    model: Model  # as trained
    average: Model  # its moving average


def further(run: Run, weights: dict[str, Tensor], at: list[int], first: int) -> Iterator[Moment]:
    """Train on from `weights` under the run's recipe, from step `first` of it, optimizers anew;
    yields the model after each number of steps in `at`, ascending: one model, trained on after it
    was looked at."""
    training = run.fresh()
    training.model.load_state_dict(weights)
    training.average.load_state_dict(weights)
    batches = run.make_batches(run.paths, run.recipe, training.generator)
    step = first
    for n_steps in at:
        while step < first + n_steps:
            training.step(batches, run.recipe.at(step), step)
            step += 1
        yield Moment(n_steps, training.model, training.average)
