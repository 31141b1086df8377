"""kg.py: the task is a table of facts and the grid of all paths through it.

A knowledge graph here is *functional*: a head h and a relation r have one tail at most. Two facts
that meet, (h, r1) -> b and (b, r2) -> t, make a **path**, which a model reads as three tokens,
(h, r1, r2). Under a causal mask the state at r1 has seen (h, r1) alone, so its answer is the fact
(1-hop: b); the answer at r2 is the composition (2-hop: t).

A share of the *facts* is set aside as OOD: trained as facts, like all others, but used by no
trained composition [1]. The two-hop paths fall into five sets:

    train, id              both facts ID: the trained paths, and those held out
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

Left out: questions with several right answers (`from_triples` can number them), paths of three hops
and more.

[1] Wang, Yue, Su, Sun 2024, Grokked Transformers are Implicit Reasoners, arXiv 2405.15071.
[2] Merullo et al. 2025, arXiv 2510.24256 (exceptions: training answers that are wrong).
[3] Abramov et al. 2025, Grokking in the Wild, arXiv 2504.20752 (synthetic facts beside real ones).
"""

import gzip
import unicodedata
import zlib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SPLITS = ("train", "id", "ood", "ood_first", "ood_second")

MOST_ENTRIES = 2**27  # of a table of facts, 1 GiB

# Streams of random numbers of a seed s: 4 s graph (of seed 0 also the order of numbered tails and
# clones), 4 s + 1 split, 4 s + 2 weights, 4 s + 3 batches, -s - 1 the stages of minedit.py; and,
# far from these:
SAMPLED, CONTINUED, WRONG = 2**58, 2**59, 2**62  # + s: `sampled`, `list_paths`, `with_exceptions`


# --- Graphs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KnowledgeGraph:
    """A functional knowledge graph: `facts[h, r]` is the tail of head h under relation r, or -1."""

    facts: Tensor  # [n_entities, n_relations], long
    entities: list[str]
    relations: list[str]
    notes: list[str] = field(default_factory=list)  # what was merged or left out in reading
    n_real: int | None = None  # entities from here on are clones; None: there are none

    @property
    def n_entities(self) -> int:
        return len(self.entities)

    @property
    def n_relations(self) -> int:
        return len(self.relations)

    @property
    def n_answers(self) -> int:
        """Entities that can be a tail: all but clones."""
        return self.n_real or len(self.entities)


def from_table(facts) -> KnowledgeGraph:
    """A graph from its table [n_entities, n_relations] of tails (-1: none), with names e0, e1, ...
    and r0, r1, ... Raises ValueError for a table of another shape or with unknown tails."""
    facts = torch.as_tensor(facts, dtype=torch.long)
    if facts.dim() != 2 or facts.numel() == 0:
        raise ValueError(f"facts must be [n_entities, n_relations], got shape {list(facts.shape)}")
    if facts.min() < -1 or facts.max() >= len(facts):
        found = f"{int(facts.min())}..{int(facts.max())}"
        raise ValueError(f"tails must be in -1..{len(facts) - 1}, the entities, got {found}")
    n_entities, n_relations = facts.shape
    entities = [f"e{i}" for i in range(n_entities)]
    relations = [f"r{i}" for i in range(n_relations)]
    return KnowledgeGraph(facts, entities, relations)


def composes(facts: Tensor) -> bool:
    """Whether two facts of a table [n_entities, n_relations] meet."""
    is_head = (facts >= 0).any(1)  # [n_entities]
    return bool(is_head[facts[facts >= 0]].any())


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
    check_entries(n_entities, n_relations)
    generator = torch.Generator().manual_seed(4 * seed)
    tails = torch.randint(n_entities - 1, (n_entities, n_relations), generator=generator)
    tails += tails >= torch.arange(n_entities)[:, None]  # skip the head itself
    order = torch.rand(n_entities, n_relations, generator=generator).argsort(1)
    rank = order.argsort(1)  # a random permutation in each row
    return from_table(torch.where(rank < out_degree, tails, -1))


# --- Paths and splits -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Paths:
    """All paths, fact by fact. A fact with no fact after it has one row: two_hop -100, third token
    its own relation."""

    facts: Tensor  # [n_facts, 3]: head, relation, tail; sorted by head, then relation
    queries: Tensor  # [n_facts, 2]: h, n_entities + r
    tokens: Tensor  # [n_paths, 3]: h, n_entities + r1, n_entities + r2
    one_hop: Tensor  # [n_paths]: the tail of (h, r1)
    two_hop: Tensor  # [n_paths]: the tail of (one_hop, r2), -100 where there is none
    first: Tensor  # [n_paths]: row in `facts` of the first hop
    second: Tensor  # [n_paths]: row in `facts` of the second hop, -1 where there is none
    ood_fact: Tensor  # [n_facts], bool: kept out of every trained composition
    real: Tensor  # [n_facts], bool: not of a clone, so that it may be asked and edited
    masks: dict[str, Tensor]  # name: bool [n_paths], the five sets of SPLITS and others

    def __post_init__(self):
        n_sets = sum(self.masks[name].long() for name in SPLITS)
        if (n_sets > 1).any():
            raise ValueError(
                "a composition is in two sets, so that one that is trained may be asked as a test"
            )

    @property
    def is_exception(self) -> Tensor:
        """[n_paths], bool: trained with a wrong answer (`with_exceptions`)."""
        return self.masks.get("exceptions", torch.zeros_like(self.masks["train"]))

    @property
    def true_two_hop(self) -> Tensor:
        """[n_paths]: the tail of the second fact, of exceptions (`with_exceptions`) too; -100 where
        there is none."""
        return torch.where(self.second >= 0, self.facts[self.second, 2], -100)

    def to(self, device) -> "Paths":
        masks = {name: mask.to(device) for name, mask in self.masks.items()}
        names = [column.name for column in fields(self) if column.name != "masks"]
        columns = {name: getattr(self, name).to(device) for name in names}
        return Paths(**columns, masks=masks)


def split(
    graph: KnowledgeGraph,
    ood_fraction: float,
    train_fraction: float,
    seed: int,
    most_paths: int = 1_000_000,
) -> Paths:
    """List every path of the graph and divide the two-hop ones into train / id / ood / ood_first /
    ood_second. `ood_fraction` of the facts are OOD, `train_fraction` of the paths with two ID facts
    are trained (both rounded to whole numbers). Paths of clones are trained, not asked. Cost and
    memory are linear in the number of paths; where there are more than `most_paths`, every fact
    keeps m continuations at most, as many as fit, one at least (`list_paths`). Raises ValueError
    for a share out of range, and where no path would be trained."""
    if not 0 <= ood_fraction < 1 or not 0 < train_fraction <= 1:
        raise ValueError(
            "ood_fraction must be in [0, 1) and train_fraction in (0, 1], "
            f"got {ood_fraction} and {train_fraction}"
        )
    generator = torch.Generator().manual_seed(4 * seed + 1)
    head, relation = (graph.facts >= 0).nonzero(as_tuple=True)  # sorted by head, then relation
    tail = graph.facts[head, relation]
    ood_fact = random_share(torch.ones_like(head, dtype=torch.bool), ood_fraction, generator)

    if not composes(graph.facts):
        raise ValueError("the graph has no two-hop path: no tail is the head of a fact")
    first, second = list_paths(head, tail, graph.n_entities, most_paths, seed)
    composed = second >= 0
    # second = -1 where there is none: what is read there, of the last fact, is put aside
    next_relation = torch.where(composed, relation[second], relation[first])
    first_token = graph.n_entities + relation[first]
    tokens = torch.stack([head[first], first_token, graph.n_entities + next_relation], 1)
    two_hop = torch.where(composed, tail[second], -100)

    ood1 = ood_fact[first] & composed
    ood2 = ood_fact[second] & composed
    both_id = composed & ~ood1 & ~ood2
    train = random_share(both_id, train_fraction, generator)
    if not train.any():
        raise ValueError(
            f"no two-hop path is left for training ({int(both_id.sum())} of {int(composed.sum())} "
            f"have two ID facts); lower ood_fraction {ood_fraction} or raise train_fraction "
            f"{train_fraction}"
        )
    real = head < graph.n_answers  # clones are numbered last
    asked = composed & real[first]
    masks = sets_of(asked, ood1, ood2, train)
    facts = torch.stack([head, relation, tail], 1)
    queries = torch.stack([head, graph.n_entities + relation], 1)
    return Paths(
        facts=facts,
        queries=queries,
        tokens=tokens,
        one_hop=tail[first],
        two_hop=two_hop,
        first=first,
        second=second,
        ood_fact=ood_fact,
        real=real,
        masks=masks,
    )


def sets_of(asked: Tensor, ood1: Tensor, ood2: Tensor, train: Tensor) -> dict[str, Tensor]:
    """{name of SPLITS: mask [n_paths]}: those trained, and others asked, by which facts are OOD."""
    return {
        "train": train,
        "id": asked & ~ood1 & ~ood2 & ~train,
        "ood": asked & ood1 & ood2,
        "ood_first": asked & ood1 & ~ood2,
        "ood_second": asked & ood2 & ~ood1,
    }


def random_share(mask: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A mask [n] with a random `share` of the True entries of `mask`, rounded to a whole number."""
    rows = mask.nonzero().flatten()
    order = torch.randperm(len(rows), generator=generator)
    drawn = torch.zeros_like(mask)
    drawn[rows[order[: round(share * len(rows))]]] = True
    return drawn


def list_paths(
    head: Tensor, tail: Tensor, n_entities: int, most: int, seed: int
) -> tuple[Tensor, Tensor]:
    """First and second fact of every path, for facts sorted by head. The facts that leave an entity
    are a slice of the list: fact i continues with each fact in the slice of its tail, or has one
    row of its own, with second = -1, where that slice is empty. Of more than `most` paths each fact
    keeps m at most, the same m for all and 1 at least, evenly spread over its slice from a random
    one on."""
    out_degree = torch.bincount(head, minlength=n_entities)
    slice_start = out_degree.cumsum(0) - out_degree
    n_all = out_degree[tail].clamp(min=1)  # rows of each fact
    n_rows = n_all.clamp(max=continuations(n_all, most))
    first = torch.repeat_interleave(torch.arange(len(head)), n_rows)
    first_row = n_rows.cumsum(0) - n_rows  # of each fact
    place = torch.arange(len(first)) - first_row[first]  # 0, 1, ... within the rows of a fact
    if int(n_all.sum()) > len(first):
        generator = torch.Generator().manual_seed(CONTINUED + seed)
        start = (torch.rand(len(head), generator=generator) * n_all).long()  # of each fact
        evenly = place * n_all[first] // n_rows[first]  # over its slice
        place = (start[first] + evenly) % n_all[first]
    composed = out_degree[tail[first]] > 0
    second = torch.where(composed, slice_start[tail[first]] + place, -1)
    return first, second


def continuations(n_rows: Tensor, most: int) -> int:
    """The largest m, 1 at least, with sum(min(n_rows, m)) <= most."""
    low, high = 1, int(n_rows.max())
    while low < high:
        middle = (low + high + 1) // 2
        if int(n_rows.clamp(max=middle).sum()) <= most:
            low = middle
        else:
            high = middle - 1
    return low


def most_frequent_tail(paths: Paths) -> dict[str, float | None]:
    """The baseline of each set of SPLITS: the share of its paths that are answered by the most
    frequent tail of their second relation, whatever they begin with; None for an empty set."""
    relation, tail = paths.facts[:, 1], paths.facts[:, 2]
    best = torch.full((int(relation.max()) + 1,), -1, device=tail.device)
    for r in relation.unique().tolist():
        count = torch.bincount(tail[relation == r])
        best[r] = (count == count.max()).nonzero()[-1]  # of several the last entity
    guess = best[relation[paths.second]]
    found = {}
    for name in SPLITS:
        rows = paths.masks[name]
        found[name] = (guess == paths.two_hop)[rows].double().mean().item() if rows.any() else None
    return found


def with_exceptions(paths: Paths, share: float, n_answers: int, seed: int) -> Paths:
    """The paths, of which a `share` of the trained ones get a wrong `two_hop`: one fixed other one
    of the n_answers entities (no clone) each, uniformly drawn [2]. New masks: `exceptions`, part of
    `train`, and `validation`, a random fifth of all paths, exceptions or not. Raises ValueError for
    a share outside [0, 1), and where there is no other answer."""
    if not 0 <= share < 1 or n_answers < 2:
        raise ValueError(
            "the share of trained compositions with a wrong answer must be in [0, 1), of 2 answers "
            f"or more, got {share} of {n_answers}"
        )
    generator = torch.Generator().manual_seed(WRONG + seed)
    exceptions = random_share(paths.masks["train"], share, generator)
    shift = torch.randint(1, n_answers, exceptions.shape, generator=generator)
    wrong = (paths.two_hop + shift) % n_answers
    validation = torch.rand(exceptions.shape, generator=generator) < 0.2
    two_hop = torch.where(exceptions, wrong, paths.two_hop)
    masks = paths.masks | {"exceptions": exceptions, "validation": validation}
    return replace(paths, two_hop=two_hop, masks=masks)


def sampled(paths: Paths, most: int, seed: int) -> Paths:
    """About `most` of the paths, those of first facts chosen at random (of a small `most` it may be
    none), or all where they are no more; `facts` stays whole."""
    if len(paths.first) <= most:
        return paths
    generator = torch.Generator().manual_seed(SAMPLED + seed)
    noise = torch.rand(len(paths.facts), generator=generator)
    rows = (noise < most / len(paths.first))[paths.first.cpu()].to(paths.first.device)
    names = ("tokens", "one_hop", "two_hop", "first", "second")
    kept = {name: getattr(paths, name)[rows] for name in names}
    return replace(paths, **kept, masks={name: mask[rows] for name, mask in paths.masks.items()})


# --- The probes of an edit ------------------------------------------------------------------------
# n edits are given by `fact` [n], rows of paths.facts, and `new` [n], the tails that they get.


class Probes(NamedTuple):
    """m questions, each to the model with one of the edits; answered at the last token."""

    edit: Tensor  # [m] which edit
    tokens: Tensor  # [m, token]
    answer: Tensor  # [m]
    path: Tensor | None = None  # [m] which path, of compositions that begin or end with the fact

    def where(self, keep: Tensor) -> "Probes":
        """Those that are True in keep [m]."""
        path = None if self.path is None else self.path[keep]
        return Probes(self.edit[keep], self.tokens[keep], self.answer[keep], path)


class Candidates(NamedTuple):
    """Compositions that an edit should change."""

    probes: Probes  # those that can be asked
    left_out: dict[str, int]  # {reason: how many cannot}


class Drawn(NamedTuple):
    """Edits at random."""

    fact: Tensor  # [n]
    new: Tensor  # [n]
    n_fixed: int  # ID facts that cannot be edited: their relation has one tail only


def draw_edits(paths: Paths, n: int, generator: torch.Generator) -> Drawn:
    """n random ID facts to edit, fewer where there are not so many. The new tail is another tail of
    the fact's relation, one that the head has under no relation, so that confusing two of its facts
    is no success; where there is none, any other."""
    facts = paths.facts.cpu()
    id_facts = (paths.real & ~paths.ood_fact).cpu().nonzero().flatten()
    of_head, of_relation = tails_by(facts, 0), tails_by(facts, 1)
    editable = [i for i in id_facts.tolist() if len(of_relation[int(facts[i, 1])]) > 1]
    order = torch.randperm(len(editable), generator=generator)[:n]
    fact = torch.tensor(editable, dtype=torch.long)[order]
    chosen = []
    for head, relation, old in facts[fact].tolist():
        tails = of_relation[relation]
        others = tails[~torch.isin(tails, of_head[head])]
        if len(others) == 0:
            others = tails[tails != old]
        chosen.append(others[torch.randint(len(others), (1,), generator=generator)].item())
    new = torch.tensor(chosen, dtype=torch.long)
    device = paths.facts.device
    return Drawn(fact.to(device), new.to(device), len(id_facts) - len(editable))


def tails_by(facts: Tensor, column: int) -> dict[int, Tensor]:
    """{head or relation, by the column: its tails, each once} of facts [n, 3]."""
    tails = {}
    for x in facts[:, column].unique().tolist():
        tails[x] = facts[facts[:, column] == x, 2].unique()
    return tails


def questions(paths: Paths, fact: Tensor, new: Tensor) -> Probes:
    """The edited facts themselves, each asked under its own edit."""
    return Probes(torch.arange(len(fact), device=fact.device), paths.queries[fact], new)


def fact_rows(paths: Paths, new: Tensor) -> Tensor:
    """The row in `facts` of each (head, relation), -1 where there is no such fact: [entity,
    relation], for all entities of the facts and of `new`."""
    head, relation, tail = paths.facts.T
    n_entities = int(torch.cat([head, tail, new]).max()) + 1
    rows = torch.full((n_entities, int(relation.max()) + 1), -1, device=head.device)
    rows[head, relation] = torch.arange(len(head), device=head.device)
    return rows


def hop1_probes(
    paths: Paths, fact: Tensor, new: Tensor, known: Tensor, right: Tensor, asked: Tensor
) -> Candidates:
    """Compositions (h, r1, r2) that begin with an edited fact (h, r1): they must now answer with
    the tail of (new tail, r2). known [n_facts], bool: facts that may be the other hop (in --edit
    the ID ones that the model knows); right [n_paths]: paths that it answered right before; asked
    [n_paths]: the paths to draw from. Memory: n * n_paths, bool."""
    _, relation, tail = paths.facts.T
    begins = paths.first == fact[:, None]  # [n, n_paths]
    edit, path = (begins & (paths.second >= 0) & asked).nonzero(as_tuple=True)
    # the second hop, after the edit; -1: no such fact, left out by `usable` whatever is read there
    other = fact_rows(paths, new)[new[edit], relation[paths.second[path]]]
    twice = (paths.second[path] == fact[edit]) | (other == fact[edit])
    return usable(paths, edit, path, other, tail[other], twice, known, right)


def hop2_probes(
    paths: Paths, fact: Tensor, new: Tensor, known: Tensor, right: Tensor, asked: Tensor
) -> Candidates:
    """Compositions (g, s, r) that end in an edited fact (h, r), where (g, s) -> h: they must now
    answer with the new tail. Arguments and results as of `hop1_probes`."""
    ends = paths.second == fact[:, None]  # [n, n_paths]
    edit, path = (ends & asked).nonzero(as_tuple=True)
    other = paths.first[path]
    twice = other == fact[edit]
    return usable(paths, edit, path, other, new[edit], twice, known, right)


def usable(
    paths: Paths,
    edit: Tensor,
    path: Tensor,
    other: Tensor,
    answer: Tensor,
    twice: Tensor,
    known: Tensor,
    right: Tensor,
) -> Candidates:
    """Of m compositions (edit, path, answer) those that can be asked, and how many cannot, each by
    the first reason that holds. other [m]: the row of the path's other fact after the edit, -1
    where there is none; twice [m], bool: the edited fact is at both hops."""
    reasons = {
        "edited fact twice": twice,
        "other fact unknown or OOD": (other < 0) | ~known[other],
        "answer unchanged": answer == paths.two_hop[path],
        "wrong before": ~right[path],
    }
    left_out = {}
    keep = torch.ones_like(twice)
    for reason, out in reasons.items():
        left_out[reason] = int((keep & out).sum())
        keep &= ~out
    path = path[keep]
    return Candidates(Probes(edit[keep], paths.tokens[path], answer[keep], path), left_out)


def random_rows(rows: Tensor, n_edits: int, n: int, generator: torch.Generator) -> Tensor:
    """For each of n_edits, n of the rows, at random and without repetition: [n_edits, n], or all of
    them where they are fewer."""
    if n_edits == 0:
        return rows.new_zeros(0, n)
    place = [torch.randperm(len(rows), generator=generator)[:n] for _ in range(n_edits)]
    return rows[torch.stack(place).to(rows.device)]


def unrelated_facts(
    paths: Paths, fact: Tensor, answers: Tensor, n: int, generator: torch.Generator
) -> Probes:
    """For each edit at most n other facts, whose answers are the model's own before, `answers`
    [n_facts]."""
    every = paths.real.nonzero().flatten()
    drawn = random_rows(every, len(fact), n, generator)  # [n_edits, n]
    keep = drawn != fact[:, None]
    return Probes(keep.nonzero()[:, 0], paths.queries[drawn[keep]], answers[drawn[keep]])


def unrelated_paths(
    paths: Paths, fact: Tensor, answers: Tensor, asked: Tensor, n: int, generator: torch.Generator
) -> Probes:
    """For each edit at most n of the paths `asked` that use its fact at no hop, whose answers are
    the model's own before, `answers` [n_paths]."""
    drawn = random_rows(asked.nonzero().flatten(), len(fact), n, generator)  # [n_edits, n]
    keep = (paths.first[drawn] != fact[:, None]) & (paths.second[drawn] != fact[:, None])
    return Probes(keep.nonzero()[:, 0], paths.tokens[drawn[keep]], answers[drawn[keep]])


def neighbours(paths: Paths, fact: Tensor, group: Tensor, answers: Tensor) -> Probes:
    """The other facts of each edited fact's group, group [n_facts] (its head, its relation, ...),
    whose answers are the model's own before, `answers` [n_facts]."""
    edit, row = (group[fact][:, None] == group).nonzero(as_tuple=True)
    keep = row != fact[edit]
    return Probes(edit[keep], paths.queries[row[keep]], answers[row[keep]])


# --- Graphs from files of triples -----------------------------------------------------------------


class Triples(NamedTuple):
    """What files of triples hold."""

    tails: dict[tuple[str, str], set[str]]  # {(head, relation): tails}, in the order of the files
    n: int  # triples read
    notes: list[str]


HEADERS = {("head", "tail"), ("subject", "object"), ("source", "target"), ("h", "t"), ("s", "o")}


def read_triples(*files) -> Triples:
    """Lines `head <tab> relation <tab> tail` of UTF-8 files (.gz: compressed). Blank lines, lines
    that begin with # and a header (a first line as in HEADERS) are skipped; names are brought to
    Unicode's composed form (NFC). Raises ValueError with file and line number for a malformed line;
    OSError where a file cannot be read."""
    tails, notes, n, n_comments = {}, [], 0, 0
    for path in map(Path, files):
        begun = False  # whether a triple or a header has been read
        for number, raw in enumerate(lines_of(path), 1):
            line = decoded(raw, f"{path}:{number}")
            if not line.strip():
                continue
            parts = [unicodedata.normalize("NFC", part.strip()) for part in line.split("\t")]
            if line.startswith("#"):
                if len(parts) == 3:
                    n_comments += 1
                continue
            wrong = what_is_wrong(line, parts)
            if wrong:
                raise ValueError(
                    f"{path}:{number}: expected head<tab>relation<tab>tail and a line end, got "
                    f"{wrong}: {line.strip()[:60]!r}"
                )
            is_header = not begun and (parts[0].lower(), parts[2].lower()) in HEADERS
            begun = True
            if is_header:
                notes.append(f"{path}: its first line is a header: skipped")
                continue
            head, relation, tail = parts
            tails.setdefault((head, relation), set()).add(tail)
            n += 1
    n_repeated = n - sum(len(t) for t in tails.values())
    if n_repeated:
        notes.append(f"{n_repeated} repeated triples were merged")
    if n_comments:
        notes.append(f"{n_comments} lines that begin with # look like triples: skipped")
    alike = near_duplicates(tails)
    if alike:
        names = ", ".join(alike[:3])
        notes.append(f"{len(alike)} pairs of names differ in case, blanks or quotes alone: {names}")
    return Triples(tails, n, notes)


def what_is_wrong(line: str, parts: list[str]) -> str | None:
    """Of a line and its fields; None where it is a triple."""
    if len(parts) != 3:
        return f"{len(parts)} field(s)"
    if not all(parts):
        return "an empty field"
    if not {"\0", "\r"}.isdisjoint(line.strip()):
        return "a NUL or a carriage return within the line"
    return None


def lines_of(path: Path) -> list[bytes]:
    """The lines of a file, decompressed if it is a .gz; ValueError where that fails."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged, or not compressed by gzip ({error})") from None
    return content.split(b"\n")


def decoded(raw: bytes, where: str) -> str:
    """A line of a file; ValueError where it is no UTF-8 text."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None


def near_duplicates(tails: dict[tuple[str, str], set[str]]) -> list[str]:
    """Pairs of names of entities, "a / b", that look alike."""
    names = dict.fromkeys(head for head, _ in tails)
    for some in tails.values():
        names |= dict.fromkeys(sorted(some))
    first, found = {}, []
    for name in names:
        visible = "".join(c for c in name if unicodedata.category(c) != "Cf")  # no zero-width ones
        plain = " ".join(visible.strip("\"'").casefold().split())
        if plain in first:
            found.append(f"{first[plain]!r} / {name!r}")
        first.setdefault(plain, name)
    return found


def from_triples(
    *files,
    tails: str = "drop",
    most_tails: int = 4,
    order: str = "random",
    reciprocal: bool = False,
    clones: int = 0,
) -> KnowledgeGraph:
    """A graph out of files of triples (see `read_triples`). `tails` says what becomes of a head and
    relation with several of them:

    "drop"      all are left out, since which is right cannot be known
    "numbered"  the first `most_tails` become facts of relations r#1, r#2, ...: the graph is
                functional, and a question names the number

    order: that of numbered tails, "random" (by a fixed seed) or "sorted"; sorted, each r#k has few
    tails, so that many compositions can be guessed from their second relation alone. reciprocal:
    for each (h, r, t) also (t, r^-1, h). clones: so many synthetic copies of every entity that has
    facts, see `with_clones`: more compositions for each fact [3]. `notes` of the graph count what
    was merged, numbered, left out, added. Raises ValueError for bad options, malformed files, or
    where nothing usable is left; OSError from the files."""
    if tails not in ("drop", "numbered") or order not in ("random", "sorted") or most_tails < 1:
        raise ValueError(
            "tails are 'drop' or 'numbered', in 'random' or 'sorted' order, most_tails at least 1, "
            f"got {tails!r}, {order!r}, {most_tails}"
        )
    if clones < 0:
        raise ValueError(f"clones must be 0 or more, got {clones}")
    if not files:
        raise ValueError("there is no file of triples to read")
    read = read_triples(*files)
    notes = list(read.notes)
    questions = {question: sorted(found) for question, found in read.tails.items()}
    if reciprocal:
        for question, heads in reciprocals(questions).items():
            questions[question] = sorted({*questions.get(question, []), *heads})
    if tails == "numbered":
        kept = numbered(questions, most_tails, order, notes)
    else:
        kept = [(h, r, t[0]) for (h, r), t in questions.items() if len(t) == 1]
        n_several = len(questions) - len(kept)
        if n_several:
            n_left_out = sum(len(t) for t in questions.values()) - len(kept)
            notes.append(
                f"{n_several} questions have several tails: {n_left_out} triples left out "
                "(numbered tails keep them)"
            )
    names = ", ".join(map(str, files))
    if not kept:
        raise ValueError(
            f"{names}: no usable triple ({read.n} read; questions with several tails keep none)"
        )
    graph = from_facts(kept, notes)
    if not composes(graph.facts):
        raise ValueError(f"{names}: no two-hop path in it: no tail is also a head")
    return with_clones(graph, clones) if clones else graph


def reciprocals(questions: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], list[str]]:
    """{(t, r^-1): every h} of the triples (h, r, t)."""
    found = {}
    for (head, relation), tails in questions.items():
        for tail in tails:
            found.setdefault((tail, f"{relation}^-1"), []).append(head)
    return found


def numbered(
    questions: dict[tuple[str, str], list[str]], most: int, order: str, notes: list[str]
) -> list[tuple[str, str, str]]:
    """Facts (head, relation#k, tail) of at most `most` tails a question."""
    generator = torch.Generator().manual_seed(0)
    place = {}  # {question: the order of its tails}, whatever the order of the files
    for question in sorted(questions):
        n = len(questions[question])
        shuffled = torch.randperm(n, generator=generator).tolist()
        place[question] = shuffled if order == "random" else range(n)
    facts = []
    for (head, relation), tails in questions.items():
        for k, i in enumerate(place[head, relation][:most], 1):
            facts.append((head, f"{relation}#{k}", tails[i]))
    n_later = len(facts) - len(questions)
    n_left_out = sum(len(tails) for tails in questions.values()) - len(facts)
    if n_later or n_left_out:
        notes.append(
            f"{n_later} triples are tails number 2 to {most}, of relations r#2, ...; "
            f"{n_left_out} beyond are left out"
        )
    return facts


def check_entries(n_entities: int, n_relations: int):
    """ValueError where a table of facts would have more than MOST_ENTRIES."""
    if n_entities * n_relations > MOST_ENTRIES:
        raise ValueError(
            f"{n_entities} entities and {n_relations} relations are too many for a table of "
            f"facts of {MOST_ENTRIES} at most; are head, relation and tail of a file in this order?"
        )


def from_facts(facts: list[tuple[str, str, str]], notes: list[str]) -> KnowledgeGraph:
    """A graph out of (head, relation, tail) by name, one tail for each head and relation.
    ValueError where its table would have more than MOST_ENTRIES."""
    entity, relation = {}, {}  # names in order of appearance: their numbers
    rows = []
    for h, r, t in facts:
        head = entity.setdefault(h, len(entity))
        tail = entity.setdefault(t, len(entity))
        rows.append((head, relation.setdefault(r, len(relation)), tail))
    check_entries(len(entity), len(relation))
    heads, columns, tails = torch.tensor(rows).T
    table = torch.full((len(entity), len(relation)), -1)
    table[heads, columns] = tails
    return KnowledgeGraph(table, list(entity), list(relation), notes)


def with_clones(graph: KnowledgeGraph, n: int, seed: int = 0) -> KnowledgeGraph:
    """The graph with n clones of every entity that has facts: the same relations, each tail drawn
    from the tails of its relation. ValueError where an entity is named as a clone would be, or
    where there are too many."""
    generator = torch.Generator().manual_seed(seed)
    head, relation = (graph.facts >= 0).nonzero(as_tuple=True)
    tail = graph.facts[head, relation]
    heads, row = head.unique(return_inverse=True)  # row [n_facts]: of its head in `heads`
    check_entries(graph.n_entities + n * len(heads), graph.n_relations)
    tables, names = [graph.facts], list(graph.entities)
    for i in range(1, n + 1):
        table = torch.full((len(heads), graph.n_relations), -1)
        for r in relation.unique().tolist():
            rows = row[relation == r]
            tails = tail[relation == r]
            drawn = torch.randint(len(tails), (len(rows),), generator=generator)
            table[rows, r] = tails[drawn]
        tables.append(table)
        names += [f"{graph.entities[h]}~{i}" for h in heads.tolist()]
    taken = set(graph.entities).intersection(names[graph.n_entities :])
    if taken:
        raise ValueError(
            f"clones are named a~1, a~2, ..., but there is a {min(taken)!r}: rename it"
        )
    notes = graph.notes + [f"{n * len(head)} facts of {n * len(heads)} synthetic clones added"]
    return KnowledgeGraph(torch.cat(tables), names, graph.relations, notes, graph.n_entities)
