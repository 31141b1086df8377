"""Do edits that are made together propagate? Between Niu 2026 [1] and Meng et al. 2022 [2].

The papers edit one fact and ask what follows, or thousands and ask for these facts alone. Here 1 to
300 facts are edited in one update, at the site of --edit (C as it is), in the models that compose;
then all compositions are asked, of which some begin with an edited fact (hop 1), some end with one
(hop 2), and some do both:

    memit     with a prototype, a value sought by gradient, or one sought as for mass edits, whose
              change is at most as long as the old value ("short"); lam is chosen for each number of
              edits, on as many other facts: that by which most follows, where at most 1.5 % of the
              others move
    emmet     every value exactly, where there is a solution
    rome      one fact after another

    python -m studies.many --arch all --seeds 3 --out runs/many    # 14 minutes a run

Small numbers of edits are tried in several groups of different facts. A composition counts if it
was answered right before, if its answer changes, if the facts on its way are known or edited, and
those of them that are edited have their new answers. Moved are known facts, and compositions right
before, that have no edited fact on their way. Writes "many" into results.json.

[1] Niu 2026, arXiv 2606.20737.   [2] Meng et al. 2022, MEMIT, arXiv 2210.07229.
"""

import sys
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import edit as editing
import kg
import minedit
from minedit import MOST_MOVED, Run, share_followed, share_of
from models import Model
from studies.training import require_compositions, trained

COUNTS = (1, 3, 10, 30, 100, 300)  # facts in one update
MOST_GROUPS = 8  # of as many facts each
LAMBDAS = (0.1, 1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)
KINDS = [("memit", "prototype"), ("memit", "gradient"), ("memit", "short")]
KINDS += [("emmet", "prototype"), ("rome", "prototype")]


class Hits(NamedTuple):
    """Of the questions of each kind [m], bool: whether the answer is right or, of the last two,
    whether it has moved."""

    direct: Tensor  # edited facts
    hop1: Tensor  # compositions that begin with one
    hop2: Tensor  # compositions that end with one
    both: Tensor  # compositions that do both
    facts: Tensor  # other facts
    compositions: Tensor  # compositions without an edited fact


def hits_of(
    paths: kg.Paths,
    known: minedit.Known,
    fact: Tensor,
    new: Tensor,
    answers: tuple[Tensor, Tensor],
) -> Hits:
    """What the edited model answers, `answers` to all facts [n_facts] and to all paths [n_paths],
    where the facts `fact` [n] should now have the tails `new` [n]."""
    one_hop, two_hop = answers
    relation = paths.facts[:, 1]
    tail = paths.facts[:, 2].index_copy(0, fact, new)  # after the edits
    is_edited = torch.zeros_like(known.facts).index_fill(0, fact, True)
    is_sound = torch.where(is_edited, one_hop == tail, known.facts)

    first, old_second = paths.first, paths.second
    second = kg.fact_rows(paths, new)[tail[first], relation[old_second]]  # after the edits
    right = two_hop == tail[second]
    asked = known.asked & known.right  # of two facts: there is an old second one
    counts = asked & (second >= 0) & (tail[second] != paths.two_hop)
    counts &= is_sound[first] & is_sound[second]
    counts &= (old_second != first) & (second != first)  # not one fact twice
    begins, ends = is_edited[first], is_edited[second]
    others = asked & ~begins & ~is_edited[old_second]
    return Hits(
        direct=(one_hop == tail)[fact],
        hop1=right[counts & begins & ~ends],
        hop2=right[counts & ~begins & ends],
        both=right[counts & begins & ends],
        facts=(one_hop != known.one_hop)[known.facts & ~is_edited],
        compositions=(two_hop != known.two_hop)[others],
    )


@dataclass
class ManyEntry:
    """Edits of n facts in one update, in `groups` updates of different facts."""

    method: str
    target: str
    n: int
    groups: int
    lam: float | None
    direct: float | None
    hop1: float | None
    hop2: float | None
    both: float | None
    unrelated_one_hop_moved: float | None
    unrelated_two_hop_moved: float | None
    probes: dict[str, int]


class Editor:
    """Edits of one model at one site, of 2 n requests at most, with targets made once for all."""

    def __init__(self, run: Run, model: Model, n: int):
        paths, generator = run.paths, run.stream()
        self.model, self.paths = model, paths
        self.known = minedit.what_is_known(model, paths)
        fact, new, _ = kg.draw_edits(paths, 2 * n, generator)
        self.requests = minedit.requests_for(paths, fact, new)
        site = minedit.a_priori_site(model, paths, fact, self.known.facts, run.stream()).site
        self.at = minedit.gather(run, model, site)
        at, requests, known = self.at, self.requests, self.known.facts
        u = editing.direction("rome", at, requests)
        self.R = {}  # {target: [n_requests, d_out]}
        for target in ("prototype", "gradient"):
            self.R[target], _ = minedit.residual(model, paths, at, requests, u, target, known)
        self.R["short"], _ = minedit.mass_residual(
            run, model, at, requests, "gradient", known, batch=len(requests)
        )

    def update(self, method: str, target: str, rows: slice, lam: float | None) -> Tensor:
        """dW of the requests `rows`; ValueError where there is no solution."""
        W = self.at.layer.weight.detach()
        K, R, C = self.at.keys[self.requests.fact[rows]], self.R[target][rows], self.at.C
        alive = (K != 0).any(1)  # the edit of a key of zeros fails
        if not alive.any():
            return torch.zeros_like(W)
        K, R = K[alive], R[alive]
        if method == "memit":
            return editing.memit_update(K, R, C, lam)
        if method == "emmet":
            return editing.emmet_update(K, R, C)
        return editing.rome_sequence(W, C, K, K @ W.T + R)

    def entry(
        self, method: str, target: str, groups: list[slice], lam: float | None
    ) -> ManyEntry | None:
        """What the updates of several groups of requests do; None where one has no solution."""
        found = []  # Hits of each group
        for group in groups:
            try:
                dW = self.update(method, target, group, lam)
            except ValueError:
                return None
            mine = self.requests[group]
            with editing.edited(self.model, {self.at.name: dW}):
                answers = minedit.predict(self.model, self.paths)
            found.append(hits_of(self.paths, self.known, mine.fact, mine.new, answers))
        hits = Hits(*map(torch.cat, zip(*found)))
        n = len(self.requests[groups[0]])
        shares = [share_of(hit) for hit in hits]
        probes = {name: len(getattr(hits, name)) for name in ("direct", "hop1", "hop2", "both")}
        return ManyEntry(method, target, n, len(groups), lam, *shares, probes)

    def chosen_lam(self, target: str, groups: list[slice]) -> float:
        """The lam of LAMBDAS at which most follows of edits of these requests while at most
        MOST_MOVED of the other facts move; if none qualifies, the one that moves fewest."""
        tried = [self.entry("memit", target, groups, lam) for lam in LAMBDAS]
        solved = [entry for entry in tried if entry is not None]
        if not solved:
            return LAMBDAS[-1]
        allowed = [entry for entry in solved if moved(entry) <= MOST_MOVED]
        if allowed:
            return max(allowed, key=share_followed).lam
        return min(solved, key=moved).lam


def moved(entry: ManyEntry) -> float:
    return entry.unrelated_one_hop_moved or 0.0


def groups_of(n: int, first: int, end: int) -> list[slice]:
    """Groups of n requests among first, ..., end - 1: as many as there are, MOST_GROUPS at most."""
    n_groups = min((end - first) // n, MOST_GROUPS)
    return [slice(first + i * n, first + (i + 1) * n) for i in range(n_groups)]


def many_stage(run: Run, model: Model) -> list[ManyEntry]:
    """The first half of the requests is scored, by the other half lam is chosen."""
    editor = Editor(run, model, COUNTS[-1])
    n_requests = len(editor.requests)
    half = n_requests // 2
    minedit.require(half > 0, "fewer than two facts can be edited")
    entries = []
    for n in sorted({min(n, half) for n in COUNTS}):
        scored, others = groups_of(n, 0, half), groups_of(n, half, n_requests)
        for method, target in KINDS:
            lam = editor.chosen_lam(target, others) if method == "memit" else None
            entry = editor.entry(method, target, scored, lam)
            if entry is not None:
                entries.append(entry)
    return entries


COLUMNS = dict(method="method", target="target", n="at once", lam="lam", direct="edited fact")
COLUMNS |= dict(hop1="hop 1", hop2="hop 2", both="both", unrelated_one_hop_moved="moved: facts")
COLUMNS |= dict(unrelated_two_hop_moved="compositions")
LEGEND = """\
hop 1, hop 2, both: compositions that begin, that end with an edited fact, or both, now right
moved: answers about other facts, and to compositions without edited facts, that changed"""


def study(run: Run, model: Model):
    print(f"\n{run.arch}, seed {run.seed}: facts edited in one update:\n")
    began = time.perf_counter()
    entries = many_stage(run, model)
    print(minedit.record_table(entries, COLUMNS, LEGEND))
    run.add_results("many", [asdict(entry) for entry in entries], began)


def command(args):
    require_compositions(args)
    for run, model in trained(args):
        study(run, model)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.many", __doc__.split("\n\n")[0])
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": minedit.QUICK}))


if __name__ == "__main__":
    sys.exit(main())
