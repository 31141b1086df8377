"""The task of mass edits, and what is asked after one: for mass_edit, capacity and sequence.

20 000 facts alone, no compositions, every relation under two names, so that an edit by the one can
be asked for by the other. Up to half of the facts are edited. Of 2000 that never are, one half
tells the specificity of these edits, the other that of edits of still other facts, by which
strengths are chosen.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import edit as editing
import kg
import minedit
from minedit import Run, share_of
from models import Model
from studies.training import trained

# --- Every relation has two names -----------------------------------------------------------------


class TwoNames(minedit.FactBatches):
    """Batches in which half of the relations, at random, are asked for by their other token."""

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        tokens, positions, answers = super().draw()
        relations = tokens[:, 1:]
        other = torch.randint(2, relations.shape, generator=self.generator, device=self.device)
        tokens[:, 1:] += self.n_relations * other
        return tokens, positions, answers

    @cached_property
    def n_relations(self) -> int:
        return n_relations(self.paths)


def n_relations(paths: kg.Paths) -> int:
    """By which a relation's other token is larger than its own."""
    return int(paths.facts[:, 1].max()) + 1


def make_task(args, seed: int, graph) -> minedit.Task:
    minedit.require(
        args.branches == 0, f"--branches {args.branches}: facts alone are trained here, 0"
    )
    task = minedit.make_task(args, seed, graph)
    return task._replace(data=task.data | {"aliases": True}, n_relations=2 * task.n_relations)


def trained_runs(args) -> Iterator[tuple[Run, Model]]:
    """Each run that was asked for, on relations of two names, with its model."""
    return trained(args, check=check_plan, make_task=make_task, make_batches=TwoNames)


def check_plan(run: Run):
    """UserError where too few facts can be edited."""
    n = len(minedit.mass_plan(run.paths, run.stream()).requests)
    minedit.require(n >= 5, f"{run.folder}: fewer than 10 facts can be edited; use a larger graph")


# --- What is asked --------------------------------------------------------------------------------

NEIGHBOURS = 10  # facts asked beside a request, as in CounterFact (Meng et al. 2022, 2202.05262)


class Group(NamedTuple):
    """Facts that are edited, and other facts that tell the specificity."""

    name: str
    requests: editing.Requests
    spared: Tensor

    def largest(self, n: int) -> int:
        return min(n, len(self.requests))


@dataclass(kw_only=True)
class Scores:
    """What is answered after an update; None where there is no such figure."""

    infeasible: str | None = None  # why there is no solution
    efficacy: float | None = None  # requests with their new answer
    paraphrase: float | None = None  # the same, asked by the relation's other name
    specificity: float | None = None  # facts never edited that keep their answers
    score: float | None = None  # harmonic mean of the three, in percent
    # nearly as the papers count (see studies/mass_edit.py): the new answer is likelier than the old
    # one, by either name, and for a fact of the same relation that is never edited its own than the
    # new one of the request
    new_likelier: float | None = None
    new_likelier_paraphrase: float | None = None
    own_likelier: float | None = None
    paper_score: float | None = None


@torch.no_grad()
def compared(model: Model, tokens: Tensor, wanted: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the answer to each of the queries [n, token] is the one wanted [n], and whether this
    one is likelier than the other [n]."""
    is_answer, is_likelier = [], []
    for part, one, two in zip(tokens.split(4096), wanted.split(4096), other.split(4096)):
        logits = model(part)[:, -1]
        is_answer.append(logits.argmax(-1) == one)
        is_likelier.append((logits.gather(1, one[:, None]) > logits.gather(1, two[:, None]))[:, 0])
    return torch.cat(is_answer), torch.cat(is_likelier)


def percent(*shares: float) -> float:
    """The harmonic mean, in percent; next to 0 where one is 0."""
    return 100 * statistics.harmonic_mean([max(share, 1e-9) for share in shares])


class MassTask:
    """A model, the facts to edit, and what it is asked before and after. `most`: the largest number
    of edits."""

    def __init__(self, run: Run, model: Model, most: int):
        self.run, self.model = run, model
        self.queries = run.paths.queries
        self.second_name = torch.tensor([0, n_relations(run.paths)], device=run.device)
        self.before = minedit.last_answers(model, self.queries)
        self.known = self.before == run.paths.facts[:, 2]
        plan = minedit.mass_plan(run.paths, run.stream())
        others = plan.others[: max(most, 100)]
        self.choosing = Group("choosing", others, plan.spared[::2])
        self.scoring = Group("scoring", plan.requests[:most], plan.spared[1::2])

    def score(
        self, entry: Scores, requests: editing.Requests, updates: dict[str, Tensor], group: Group
    ):
        """Asks the edited model for the requests, by both names, and for what the group spares."""
        renamed = requests.tokens + self.second_name
        request, other = self.neighbours(requests, group)
        own_tail, new_tail = self.run.paths.facts[other, 2], requests.new[request]
        with editing.edited(self.model, updates):
            new, likelier = compared(self.model, requests.tokens, requests.new, requests.old)
            again, likelier_again = compared(self.model, renamed, requests.new, requests.old)
            _, own = compared(self.model, self.queries[other], own_tail, new_tail)
            now = minedit.last_answers(self.model, self.queries[group.spared])
        entry.efficacy, entry.paraphrase = share_of(new), share_of(again)
        entry.specificity = share_of(now == self.before[group.spared])
        entry.score = percent(entry.efficacy, entry.paraphrase, entry.specificity)
        entry.new_likelier = share_of(likelier)
        entry.new_likelier_paraphrase = share_of(likelier_again)
        entry.own_likelier = share_of(own) or 0.0
        shares = (entry.new_likelier, entry.new_likelier_paraphrase, entry.own_likelier)
        entry.paper_score = percent(*shares)

    def neighbours(self, requests: editing.Requests, group: Group) -> tuple[Tensor, Tensor]:
        """(request [m], fact [m]): for each request NEIGHBOURS facts that the group spares (of more
        than a thousand requests one each), of its relation where there are so many, whose tail is
        not its new one; the same ones in every call."""
        facts, n = self.run.paths.facts, len(requests)
        n_each = min(NEIGHBOURS if n <= 1000 else 1, len(group.spared))
        is_alike = facts[group.spared, 1] == facts[requests.fact, 1][:, None]  # [n, n_spared]
        is_new = facts[group.spared, 2] == requests.new[:, None]
        noise = torch.rand(is_alike.shape, generator=self.run.stream()).to(is_alike.device)
        # of the relation: in [1, 2), others: in [0, 1), with the new tail: below 0
        priority = noise + is_alike.float() - 3 * is_new.float()
        chosen = priority.topk(n_each).indices
        request = torch.arange(n, device=chosen.device).repeat_interleave(n_each)
        fact = group.spared[chosen.flatten()]
        is_usable = facts[fact, 2] != requests.new[request]
        return request[is_usable], fact[is_usable]
