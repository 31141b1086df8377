"""kg.py: the task is a table of facts and the grid of all paths through it.

A knowledge graph here is *functional*: a head h and a relation r have one tail at most. Two facts that meet,
(h, r1) -> b and (b, r2) -> t, make a **path**, which a model reads as three tokens, (h, r1, r2). Under a causal mask
the state at r1 has seen (h, r1) alone, so its answer is the fact (1-hop: b); that at r2 is the composition (2-hop: t).

A share of the *facts* is set aside as OOD: trained as facts, like all others, but used by no trained composition [1].
The two-hop paths fall into five sets:

    train, id              both facts ID; among the paths trained, held out
    ood                    both facts OOD: the test of systematic composition, "OOD" without a suffix
    ood_first, ood_second  only the first, only the second fact is OOD

A `regime` trains some compositions of one OOD fact with an ID one after all, never one of two OOD facts [2]. A worked
example, which the tests run:

>>> graph = from_table([[1, 2], [2, -1], [0, -1]])        # 3 entities, 2 relations; -1: there is no such fact
>>> paths = split(graph, ood_fraction=0, train_fraction=1, seed=0)
>>> paths.facts.tolist()                                  # head, relation, tail
[[0, 0, 1], [0, 1, 2], [1, 0, 2], [2, 0, 0]]
>>> paths.tokens.tolist()                                 # relation r is token n_entities + r
[[0, 3, 3], [0, 4, 3], [1, 3, 3], [2, 3, 3], [2, 3, 4]]
>>> paths.one_hop.tolist(), paths.two_hop.tolist()
([1, 2, 2, 0, 0], [2, 0, 0, 1, 2])

Glossary: n_entities — E, n_relations — R, facts of a graph [E, R] (tail or -1), n_facts — F, n_paths — P.
Left out: several tails per head and relation, paths of three hops and more, natural language.

[1] Wang, Yue, Su, Sun 2024, Grokked Transformers are Implicit Reasoners, arXiv 2405.15071 (ID and OOD facts).
[2] He et al. 2026, Is Grokking Worthwhile?, arXiv 2601.09049 (regimes).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

REGIMES = {"natural": [], "first-hop": ["ood_first"], "second-hop": ["ood_second"],
           "both-hops": ["ood_first", "ood_second"]}

# --- Graphs -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class KnowledgeGraph:
    """A functional knowledge graph: `facts[h, r]` is the tail of head h under relation r, or -1."""
    facts: Tensor                       # [n_entities, n_relations], long
    entities: list[str]
    relations: list[str]
    notes: list[str] = field(default_factory=list)      # what was merged or left out when the graph was read

    n_entities = property(lambda self: len(self.entities))
    n_relations = property(lambda self: len(self.relations))

def from_table(facts) -> KnowledgeGraph:
    """A graph from its table [n_entities, n_relations] of tails (-1: none), with names e0, e1, ... and r0, r1, ..."""
    facts = torch.as_tensor(facts, dtype=torch.long)
    if facts.dim() != 2 or facts.numel() == 0 or facts.min() < -1 or facts.max() >= len(facts):
        raise ValueError(f"facts must be [n_entities, n_relations], tails -1..n_entities-1, got {list(facts.shape)}")
    return KnowledgeGraph(facts, [f"e{i}" for i in range(len(facts))], [f"r{i}" for i in range(facts.shape[1])])

def synthetic(n_entities: int, n_relations: int, seed: int, out_degree: int | None = None,
              arithmetic: int = 0) -> KnowledgeGraph:
    """A random functional graph: each tail is uniform over the *other* entities, the same on every platform. Every
    entity has `out_degree` outgoing facts, under relations drawn without replacement (default: all of them). The first
    `arithmetic` relations are tail = (head + c) mod n_entities, each with its own c > 0. ValueError on bad sizes."""
    out_degree = n_relations if out_degree is None else out_degree
    if n_entities < 2 or not 1 <= out_degree <= n_relations or not 0 <= arithmetic <= n_relations:
        raise ValueError("a synthetic graph needs 2 entities, 1 relation, an out-degree of 1..n_relations, got "
                         f"{n_entities} entities, {n_relations} relations, {arithmetic} of them arithmetic")
    generator = torch.Generator().manual_seed(4 * seed)      # streams of a seed: graph, split, weights, batches
    tails = torch.randint(n_entities - 1, (n_entities, n_relations), generator=generator)
    tails += tails >= torch.arange(n_entities)[:, None]                          # skip the head itself
    rank = torch.rand(n_entities, n_relations, generator=generator).argsort(1).argsort(1)
    shift = torch.randint(1, n_entities, (arithmetic,), generator=generator)
    tails[:, :arithmetic] = (torch.arange(n_entities)[:, None] + shift) % n_entities
    return from_table(torch.where(rank < out_degree, tails, -1))

def from_triples(path) -> KnowledgeGraph:
    """Read a UTF-8 file of lines `head <tab> relation <tab> tail`; blank lines and lines that begin with # are skipped.
    Repeated triples are merged; a head and relation with several tails keep none, since which is right cannot be known;
    both are counted in `notes`. Raises ValueError with the line number for a malformed line, OSError from the file."""
    tails, n_lines, n_triples = {}, 0, 0                # {(head, relation): its tails}, in the order of the file
    refuse = lambda why: ValueError(f"{path}:{n_lines}: {why}")
    with open(path, "rb") as file:
        for n_lines, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if n_lines == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise refuse(f"not UTF-8 text ({error.reason}); save the file as UTF-8") from None
            if not line.strip() or line.startswith("#"):
                continue
            fields = [part.strip() for part in line.split("\t")]
            if len(fields) != 3 or not all(fields):
                raise refuse(f"expected head<tab>relation<tab>tail, got {len(fields)} field(s): {line.strip()[:60]!r}")
            tails.setdefault((fields[0], fields[1]), set()).add(fields[2])
            n_triples += 1
    kept = [(head, relation, next(iter(t))) for (head, relation), t in tails.items() if len(t) == 1]
    if not kept:
        raise refuse(f"the file ends, and no usable triple ({n_triples} read; questions with several tails keep none)")
    n_distinct, n_ambiguous = sum(map(len, tails.values())), len(tails) - len(kept)
    notes = [f"{n_triples - n_distinct} repeated triples were merged"] * (n_triples > n_distinct) + [
        f"{n_ambiguous} questions have several tails: {n_distinct - len(kept)} triples left out"] * (n_ambiguous > 0)
    entity = {name: i for i, name in enumerate(dict.fromkeys(name for h, _, t in kept for name in (h, t)))}
    relation = {name: i for i, name in enumerate(dict.fromkeys(r for _, r, _ in kept))}
    heads, columns, tails = torch.tensor([(entity[h], relation[r], entity[t]) for h, r, t in kept]).T
    facts = torch.full((len(entity), len(relation)), -1)
    facts[heads, columns] = tails
    if not (facts[tails] >= 0).any():
        raise refuse("the file ends, and no two-hop path in it: no tail is also a head")
    return KnowledgeGraph(facts, [*entity], [*relation], notes)

# --- Paths and splits -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Paths:
    """All paths, fact by fact. A fact with no fact after it has one row: two_hop -100, third token its own relation."""
    facts: Tensor                       # [n_facts, 3]: head, relation, tail; sorted by head, then relation
    tokens: Tensor                      # [n_paths, 3]: h, n_entities + r1, n_entities + r2
    one_hop: Tensor                     # [n_paths]: the tail of (h, r1)
    two_hop: Tensor                     # [n_paths]: the tail of (one_hop, r2), -100 where there is none
    first: Tensor                       # [n_paths]: row in `facts` of the first hop
    second: Tensor                      # [n_paths]: row in `facts` of the second hop, -1 where there is none
    ood_fact: Tensor                    # [n_facts], bool: kept out of every trained composition
    masks: dict[str, Tensor]            # name: bool [n_paths], the five sets above

    def __post_init__(self):
        sets = [mask.long() for name, mask in self.masks.items() if name not in ("exceptions", "validation")]
        if (sum(sets) > 1).any():
            raise ValueError("a composition is in two sets, so that one that is trained may be asked as a test")

    def to(self, device) -> "Paths":
        masks = {name: mask.to(device) for name, mask in self.masks.items()}
        return Paths(**{name: masks if name == "masks" else value.to(device) for name, value in vars(self).items()})

def split(graph: KnowledgeGraph, ood_fraction: float, train_fraction: float, seed: int,
          regime: str = "natural", augment: float = 0.0) -> Paths:
    """List every path of the graph and divide the two-hop ones into train / id / ood / ood_first / ood_second.
    `ood_fraction` of the facts are OOD, `train_fraction` of the paths with two ID facts are trained (both rounded to
    whole numbers), and of the sets that the `regime` names the share `augment`. Cost and memory are linear in the
    number of paths, so sparse graphs stay small. Raises ValueError where no path would be trained."""
    if not 0 <= ood_fraction < 1 or not 0 < train_fraction <= 1 or not 0 <= augment <= 1:
        raise ValueError("ood_fraction must be in [0, 1), train_fraction in (0, 1], augment in [0, 1], got "
                         f"{ood_fraction}, {train_fraction}, {augment}")
    generator, n_entities = torch.Generator().manual_seed(4 * seed + 1), graph.n_entities
    head, relation = (graph.facts >= 0).nonzero(as_tuple=True)
    tail, n_facts = graph.facts[head, relation], len(head)
    ood_fact = torch.zeros(n_facts, dtype=torch.bool)
    ood_fact[torch.randperm(n_facts, generator=generator)[:round(ood_fraction * n_facts)]] = True
    # The facts are sorted by head, so those that leave an entity are a slice: fact i continues with each fact in the
    # slice of its tail, or has one row of its own where that slice is empty.
    out_degree = torch.bincount(head, minlength=n_entities)
    slice_start = out_degree.cumsum(0) - out_degree
    n_rows = out_degree[tail].clamp(min=1)
    first = torch.repeat_interleave(torch.arange(n_facts), n_rows)
    place = torch.arange(len(first)) - (n_rows.cumsum(0) - n_rows)[first]        # 0, 1, ... within the rows of a fact
    has_second = out_degree[tail[first]] > 0
    second = torch.where(has_second, slice_start[tail[first]] + place, -1)
    next_relation = torch.where(has_second, relation[second], relation[first])
    tokens = torch.stack([head[first], n_entities + relation[first], n_entities + next_relation], 1)
    two_hop = torch.where(has_second, tail[second], -100)
    ood1, ood2 = ood_fact[first] & has_second, ood_fact[second] & has_second
    both_id = (has_second & ~ood1 & ~ood2).nonzero().flatten()
    train = torch.zeros(len(first), dtype=torch.bool)
    train[both_id[torch.randperm(len(both_id), generator=generator)[:round(train_fraction * len(both_id))]]] = True
    if not train.any():
        raise ValueError(f"no two-hop path is left for training ({len(both_id)} of {int(has_second.sum())} have two ID "
                         f"facts); lower ood_fraction {ood_fraction} or raise train_fraction {train_fraction}")
    masks = {"train": train, "id": has_second & ~ood1 & ~ood2 & ~train, "ood": ood1 & ood2,
             "ood_first": ood1 & ~ood2, "ood_second": ood2 & ~ood1}
    for name in REGIMES[regime]:
        rows = masks[name].nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)[:round(augment * len(rows))]]
        train[rows], masks[name][rows] = True, False
    return Paths(torch.stack([head, relation, tail], 1), tokens, tail[first], two_hop, first, second, ood_fact, masks)

def with_exceptions(paths: Paths, share: float, n_entities: int, seed: int) -> Paths:
    """A `share` of the trained paths answered wrong in `two_hop`, each by one fixed other entity, uniformly drawn.
    New masks: `exceptions`, part of `train`, and `validation`, a random fifth of all paths, exceptions or not."""
    if not 0 <= share < 1:
        raise ValueError(f"the share of trained compositions with a wrong answer must be in [0, 1), got {share}")
    generator = torch.Generator().manual_seed(2**62 + seed)
    exceptions, train = torch.zeros_like(paths.masks["train"]), paths.masks["train"].nonzero().flatten()
    exceptions[train[torch.randperm(len(train), generator=generator)[:round(share * len(train))]]] = True
    wrong = (paths.two_hop + torch.randint(1, n_entities, exceptions.shape, generator=generator)) % n_entities
    masks = {"exceptions": exceptions, "validation": torch.rand(exceptions.shape, generator=generator) < 0.2}
    return replace(paths, two_hop=torch.where(exceptions, wrong, paths.two_hop), masks=paths.masks | masks)
