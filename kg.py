"""kg.py: the task is a table of facts and the grid of all paths through it.

A knowledge graph here is *functional*: a head h and a relation r have one tail at most. Two facts
that meet, (h, r1) -> b and (b, r2) -> t, make a **path**, which a model reads as three tokens,
(h, r1, r2). Under a causal mask the state at r1 has seen (h, r1) alone, so its answer is the fact
(1-hop: b); the answer at r2 is the composition (2-hop: t).

A share of the *facts* is set aside as OOD: trained as facts, like all others, but used by no
trained composition [1]. The two-hop paths fall into five sets:

    train, id              both facts ID; among the paths trained, held out
    ood                    both facts OOD: the test of composing, "OOD" without a suffix
    ood_first, ood_second  only the first, only the second fact is OOD

When a fact is edited, what must follow is a matter of the graph too: **probes** are the questions
whose answers an edit must change (compositions that begin with the fact: hop 1; that end in it:
hop 2) and those whose answers it must leave alone. A worked example, which the tests run:

>>> graph = from_table([[1, 2], [2, -1], [0, -1]])  # 3 entities, 2 relations; -1: no such fact
>>> paths = split(graph, ood_fraction=0, train_fraction=1, seed=0)
>>> paths.facts.tolist()  # head, relation, tail
[[0, 0, 1], [0, 1, 2], [1, 0, 2], [2, 0, 0]]
>>> paths.tokens.tolist()  # relation r is token n_entities + r
[[0, 3, 3], [0, 4, 3], [1, 3, 3], [2, 3, 3], [2, 3, 4]]
>>> paths.one_hop.tolist(), paths.two_hop.tolist()
([1, 2, 2, 0, 0], [2, 0, 0, 1, 2])

Glossary: n_entities - E, n_relations - R, facts of a graph [E, R] (tail or -1), n_facts - F,
n_paths - P. Left out: several tails per head and relation, paths of three hops and more.

[1] Wang, Yue, Su, Sun 2024, Grokked Transformers are Implicit Reasoners, arXiv 2405.15071.
[2] Merullo et al. 2025, arXiv 2510.24256 (exceptions: training answers that are wrong).
"""

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

SPLITS = ("train", "id", "ood", "ood_first", "ood_second")


# --- Graphs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnowledgeGraph:
    """A functional knowledge graph: `facts[h, r]` is the tail of head h under relation r, or -1."""

    facts: Tensor  # [n_entities, n_relations], long
    entities: list[str]
    relations: list[str]
    notes: list[str] = field(default_factory=list)  # what was merged or left out in reading

    n_entities = property(lambda self: len(self.entities))
    n_relations = property(lambda self: len(self.relations))


def from_table(facts) -> KnowledgeGraph:
    """A graph from its table [n_entities, n_relations] of tails (-1: none), with names e0, e1, ...
    and r0, r1, ... Raises ValueError for a table of another shape or with unknown tails."""
    facts = torch.as_tensor(facts, dtype=torch.long)
    if facts.dim() != 2 or facts.numel() == 0 or facts.min() < -1 or facts.max() >= len(facts):
        raise ValueError(
            "facts must be [n_entities, n_relations] with tails in -1..n_entities-1, "
            f"got shape {list(facts.shape)}"
        )
    n_entities, n_relations = facts.shape
    entities = [f"e{i}" for i in range(n_entities)]
    relations = [f"r{i}" for i in range(n_relations)]
    return KnowledgeGraph(facts, entities, relations)


def synthetic(
    n_entities: int, n_relations: int, seed: int, out_degree: int | None = None
) -> KnowledgeGraph:
    """A random functional graph: each tail is uniform over the *other* entities, the same on every
    platform. Every entity has `out_degree` outgoing facts, under relations drawn without
    replacement (None: all of them). Raises ValueError on bad sizes."""
    if out_degree is None:
        out_degree = n_relations
    if n_entities < 2 or not 1 <= out_degree <= n_relations:
        raise ValueError(
            "a synthetic graph needs 2 entities, 1 relation and an out-degree of 1..n_relations, "
            f"got {n_entities} entities, {n_relations} relations, out-degree {out_degree}"
        )
    # Streams of a seed s: 4s graph, 4s+1 split, 4s+2 weights, 4s+3 batches, others far from these.
    generator = torch.Generator().manual_seed(4 * seed)
    tails = torch.randint(n_entities - 1, (n_entities, n_relations), generator=generator)
    tails += tails >= torch.arange(n_entities)[:, None]  # skip the head itself
    order = torch.rand(n_entities, n_relations, generator=generator).argsort(1)
    rank = order.argsort(1)  # a random permutation in each row
    return from_table(torch.where(rank < out_degree, tails, -1))


def read_triples(path) -> tuple[dict[tuple[str, str], set[str]], int]:
    """The tails of each (head, relation) in a UTF-8 file of lines `head <tab> relation <tab> tail`,
    in the order of the file, and how many triples it has; blank lines and lines that begin with #
    are skipped. Raises ValueError with the line number for a malformed line, OSError."""
    tails = {}
    n_triples = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 text ({error.reason}); save the file as UTF-8"
                ) from None
            if not line.strip() or line.startswith("#"):
                continue
            parts = [part.strip() for part in line.split("\t")]
            if len(parts) != 3 or not all(parts):
                raise ValueError(
                    f"{path}:{number}: expected head<tab>relation<tab>tail, got {len(parts)} "
                    f"field(s): {line.strip()[:60]!r}"
                )
            head, relation, tail = parts
            tails.setdefault((head, relation), set()).add(tail)
            n_triples += 1
    return tails, n_triples


def from_triples(path) -> KnowledgeGraph:
    """Read a file of triples (see `read_triples`). Repeated ones are merged; a head and relation
    with several tails keep none, since which is right cannot be known; both are counted in `notes`.
    Raises ValueError where nothing usable is left, OSError from the file."""
    tails, n_triples = read_triples(path)
    kept = [(h, r, next(iter(t))) for (h, r), t in tails.items() if len(t) == 1]
    if not kept:
        raise ValueError(
            f"{path}: no usable triple ({n_triples} read; questions with several tails keep none)"
        )
    n_distinct = sum(len(t) for t in tails.values())
    n_ambiguous = len(tails) - len(kept)
    notes = []
    if n_triples > n_distinct:
        notes.append(f"{n_triples - n_distinct} repeated triples were merged")
    if n_ambiguous:
        n_left_out = n_distinct - len(kept)
        notes.append(f"{n_ambiguous} questions have several tails: {n_left_out} triples left out")

    entity, relation = {}, {}  # names in order of appearance: their numbers
    rows = []
    for h, r, t in kept:
        head = entity.setdefault(h, len(entity))
        tail = entity.setdefault(t, len(entity))
        rows.append((head, relation.setdefault(r, len(relation)), tail))
    heads, columns, tails = torch.tensor(rows).T
    facts = torch.full((len(entity), len(relation)), -1)
    facts[heads, columns] = tails
    if not (facts[tails] >= 0).any():
        raise ValueError(f"{path}: no two-hop path in it: no tail is also a head")
    return KnowledgeGraph(facts, list(entity), list(relation), notes)


# --- Paths and splits -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """All paths, fact by fact. A fact with no fact after it has one row: two_hop -100, third token
    its own relation."""

    facts: Tensor  # [n_facts, 3]: head, relation, tail; sorted by head, then relation
    tokens: Tensor  # [n_paths, 3]: h, n_entities + r1, n_entities + r2
    one_hop: Tensor  # [n_paths]: the tail of (h, r1)
    two_hop: Tensor  # [n_paths]: the tail of (one_hop, r2), -100 where there is none
    first: Tensor  # [n_paths]: row in `facts` of the first hop
    second: Tensor  # [n_paths]: row in `facts` of the second hop, -1 where there is none
    ood_fact: Tensor  # [n_facts], bool: kept out of every trained composition
    masks: dict[str, Tensor]  # name: bool [n_paths], the five sets of SPLITS and others

    def __post_init__(self):
        n_sets = sum(self.masks[name].long() for name in SPLITS)
        if (n_sets > 1).any():
            raise ValueError(
                "a composition is in two sets, so that one that is trained may be asked as a test"
            )

    @property
    def queries(self) -> Tensor:
        """[n_facts, 2]: head and relation token of each fact, in the order of `facts`."""
        n_rows = torch.bincount(self.first)
        return self.tokens[n_rows.cumsum(0) - n_rows, :2]

    def to(self, device) -> "Paths":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.type is Tensor}
        masks = {name: mask.to(device) for name, mask in self.masks.items()}
        return Paths(**moved, masks=masks)


def split(graph: KnowledgeGraph, ood_fraction: float, train_fraction: float, seed: int) -> Paths:
    """List every path of the graph and divide the two-hop ones into train / id / ood / ood_first /
    ood_second. `ood_fraction` of the facts are OOD, `train_fraction` of the paths with two ID facts
    are trained (both rounded to whole numbers). Cost and memory are linear in the number of paths,
    so sparse graphs stay small. Raises ValueError where no path would be trained."""
    if not 0 <= ood_fraction < 1 or not 0 < train_fraction <= 1:
        raise ValueError(
            "ood_fraction must be in [0, 1) and train_fraction in (0, 1], "
            f"got {ood_fraction} and {train_fraction}"
        )
    generator = torch.Generator().manual_seed(4 * seed + 1)
    head, relation = (graph.facts >= 0).nonzero(as_tuple=True)  # sorted by head, then relation
    tail = graph.facts[head, relation]
    n_facts = len(head)
    ood_fact = torch.zeros(n_facts, dtype=torch.bool)
    ood_fact[torch.randperm(n_facts, generator=generator)[: round(ood_fraction * n_facts)]] = True

    first, second = list_paths(head, tail, graph.n_entities)
    composed = second >= 0
    next_relation = torch.where(composed, relation[second], relation[first])
    first_token = graph.n_entities + relation[first]
    tokens = torch.stack([head[first], first_token, graph.n_entities + next_relation], 1)
    two_hop = torch.where(composed, tail[second], -100)

    ood1 = ood_fact[first] & composed
    ood2 = ood_fact[second] & composed
    both_id = (composed & ~ood1 & ~ood2).nonzero().flatten()
    order = torch.randperm(len(both_id), generator=generator)
    train = torch.zeros(len(first), dtype=torch.bool)
    train[both_id[order[: round(train_fraction * len(both_id))]]] = True
    if not train.any():
        raise ValueError(
            f"no two-hop path is left for training ({len(both_id)} of {int(composed.sum())} have "
            f"two ID facts); lower ood_fraction {ood_fraction} or raise train_fraction "
            f"{train_fraction}"
        )
    masks = {
        "train": train,
        "id": composed & ~ood1 & ~ood2 & ~train,
        "ood": ood1 & ood2,
        "ood_first": ood1 & ~ood2,
        "ood_second": ood2 & ~ood1,
    }
    facts = torch.stack([head, relation, tail], 1)
    return Paths(facts, tokens, tail[first], two_hop, first, second, ood_fact, masks)


def list_paths(head: Tensor, tail: Tensor, n_entities: int) -> tuple[Tensor, Tensor]:
    """First and second fact of every path, for facts sorted by head. The facts that leave an entity
    are a slice of the list: fact i continues with each fact in the slice of its tail, or has one
    row of its own, with second = -1, where that slice is empty."""
    out_degree = torch.bincount(head, minlength=n_entities)
    slice_start = out_degree.cumsum(0) - out_degree
    n_rows = out_degree[tail].clamp(min=1)  # of each fact
    first = torch.repeat_interleave(torch.arange(len(head)), n_rows)
    first_row = n_rows.cumsum(0) - n_rows  # of each fact
    place = torch.arange(len(first)) - first_row[first]  # 0, 1, ... within the rows of a fact
    composed = out_degree[tail[first]] > 0
    second = torch.where(composed, slice_start[tail[first]] + place, -1)
    return first, second


def with_exceptions(paths: Paths, share: float, n_entities: int, seed: int) -> Paths:
    """The paths with a `share` of the trained ones answered wrong in `two_hop`, each by one fixed
    other entity, uniformly drawn [2]. New masks: `exceptions`, part of `train`, and `validation`, a
    random fifth of all paths, exceptions or not. Raises ValueError for a share outside [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(
            f"the share of trained compositions with a wrong answer must be in [0, 1), got {share}"
        )
    generator = torch.Generator().manual_seed(2**62 + seed)
    train = paths.masks["train"].nonzero().flatten()
    order = torch.randperm(len(train), generator=generator)
    exceptions = torch.zeros_like(paths.masks["train"])
    exceptions[train[order[: round(share * len(train))]]] = True
    shift = torch.randint(1, n_entities, exceptions.shape, generator=generator)
    wrong = (paths.two_hop + shift) % n_entities
    validation = torch.rand(exceptions.shape, generator=generator) < 0.2
    two_hop = torch.where(exceptions, wrong, paths.two_hop)
    masks = paths.masks | {"exceptions": exceptions, "validation": validation}
    return replace(paths, two_hop=two_hop, masks=masks)


# --- The probes of an edit ------------------------------------------------------------------------
# n edits are given by `fact` [n], rows of paths.facts, and `new` [n], the tails that they get.


class Probes(NamedTuple):
    """m questions, each to the model with one of the edits; answered at the last token."""

    edit: Tensor  # [m] which edit
    tokens: Tensor  # [m, token]
    answer: Tensor  # [m]


def draw_edits(paths: Paths, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """(fact [n], new [n], n_fixed): n random ID facts, fewer where there are not so many, each with
    a new tail out of the other tails of its relation; n_fixed ID facts have no other tail."""
    facts = paths.facts.cpu()
    id_facts = (~paths.ood_fact.cpu()).nonzero().flatten()
    tails = {r: facts[facts[:, 1] == r, 2].unique() for r in facts[:, 1].unique().tolist()}
    editable = [i for i in id_facts.tolist() if len(tails[int(facts[i, 1])]) > 1]
    order = torch.randperm(len(editable), generator=generator)[:n]
    fact = torch.tensor(editable, dtype=torch.long)[order]
    new = []
    for _, relation, old in facts[fact].tolist():
        others = tails[relation][tails[relation] != old]
        new.append(others[torch.randint(len(others), (1,), generator=generator)].item())
    new = torch.tensor(new, dtype=torch.long)
    return fact.to(paths.facts.device), new.to(paths.facts.device), len(id_facts) - len(editable)


def questions(paths: Paths, fact: Tensor, new: Tensor) -> Probes:
    """The edited facts themselves, each asked under its own edit."""
    return Probes(torch.arange(len(fact), device=fact.device), paths.queries[fact], new)


def hop1_probes(
    paths: Paths, fact: Tensor, new: Tensor, known: Tensor, right: Tensor, asked: Tensor
) -> tuple[Probes, Counter]:
    """Compositions (h, r1, r2) that begin with an edited fact (h, r1): they must now answer with
    the tail of (new tail, r2). known [n_facts], bool: facts that the model knows; right [n_paths]:
    paths that it answered right before; asked [n_paths]: the paths to draw from. The second result
    counts by reason the paths that cannot be asked."""
    head, relation, tail = paths.facts.T
    n_entities = int(torch.cat([head, tail, new]).max()) + 1
    row_of = torch.full((n_entities, int(relation.max()) + 1), -1, device=head.device)
    row_of[head, relation] = torch.arange(len(head), device=head.device)  # -1: no such fact

    begins = paths.first == fact[:, None]  # [n, n_paths]
    edit, path = (begins & (paths.second >= 0) & asked).nonzero(as_tuple=True)
    other = row_of[new[edit], relation[paths.second[path]]]  # the second hop, after the edit
    twice = (paths.second[path] == fact[edit]) | (other == fact[edit])
    return _usable(paths, edit, path, other, tail[other], twice, known, right)


def hop2_probes(
    paths: Paths, fact: Tensor, new: Tensor, known: Tensor, right: Tensor, asked: Tensor
) -> tuple[Probes, Counter]:
    """Compositions (g, s, r) that end in an edited fact (h, r), where (g, s) -> h: they must now
    answer with the new tail. Arguments and results as of `hop1_probes`."""
    ends = paths.second == fact[:, None]  # [n, n_paths]
    edit, path = (ends & (paths.second >= 0) & asked).nonzero(as_tuple=True)
    other = paths.first[path]
    twice = other == fact[edit]
    return _usable(paths, edit, path, other, new[edit], twice, known, right)


def _usable(
    paths: Paths,
    edit: Tensor,
    path: Tensor,
    other: Tensor,
    answer: Tensor,
    twice: Tensor,
    known: Tensor,
    right: Tensor,
) -> tuple[Probes, Counter]:
    """The probes (edit, path, answer) whose answer the edit changes and shows; `other` is the row
    of the fact, beside the edited one, that the path uses after the edit."""
    reasons = {
        "edited fact twice": twice,
        "other fact unknown or OOD": (other < 0) | ~known[other],
        "answer unchanged": answer == paths.two_hop[path],
        "wrong before": ~right[path],
    }
    left_out = Counter()
    keep = torch.ones_like(twice)
    for reason, out in reasons.items():
        left_out[reason] = int((keep & out).sum())
        keep &= ~out
    return Probes(edit[keep], paths.tokens[path[keep]], answer[keep]), left_out


def _random_rows(rows: Tensor, n_edits: int, n: int, generator: torch.Generator) -> Tensor:
    """For each of n_edits, n of the rows, at random and without repetition: [n_edits, n]."""
    place = torch.rand(n_edits, len(rows), generator=generator).argsort(1)[:, :n]
    return rows[place.to(rows.device)]


def unrelated_facts(
    paths: Paths, fact: Tensor, one_hop: Tensor, n: int, generator: torch.Generator
) -> Probes:
    """For each edit at most n other facts; the answer is the model's own before, one_hop [F]."""
    every = torch.arange(len(paths.facts), device=fact.device)
    drawn = _random_rows(every, len(fact), n, generator)  # [n_edits, n]
    keep = drawn != fact[:, None]
    return Probes(keep.nonzero()[:, 0], paths.queries[drawn[keep]], one_hop[drawn[keep]])


def unrelated_paths(
    paths: Paths, fact: Tensor, two_hop: Tensor, asked: Tensor, n: int, generator: torch.Generator
) -> Probes:
    """For each edit at most n of the paths `asked` that use its fact at no hop; the answer is the
    model's own before, two_hop [n_paths]."""
    drawn = _random_rows(asked.nonzero().flatten(), len(fact), n, generator)  # [n_edits, n]
    keep = (paths.first[drawn] != fact[:, None]) & (paths.second[drawn] != fact[:, None])
    return Probes(keep.nonzero()[:, 0], paths.tokens[drawn[keep]], two_hop[drawn[keep]])


def neighbours(paths: Paths, fact: Tensor, group: Tensor, one_hop: Tensor) -> Probes:
    """The other facts of each edited fact's group, group [n_facts] (its head, its relation, ...);
    the answer is the model's own before, one_hop [n_facts]."""
    edit, row = (group[fact][:, None] == group).nonzero(as_tuple=True)
    keep = row != fact[edit]
    return Probes(edit[keep], paths.queries[row[keep]], one_hop[row[keep]])
