"""Is grokking worthwhile? Inference paths before compositions are learnt, after, and at the end.

After He et al. 2026 [1] and Wang et al. 2024 [2]. Training keeps the weights of four moments: the
last evaluation with facts >= 0.99 and train < 0.3 ("facts": they are known, and hardly composed),
the last with train < 0.9 ("before"), the first with train >= 0.99 ("memorized"), the "end". For ID
and OOD compositions apart, these are taken apart by

    lens      at every state and token: does it read as the bridge, the answer, the second relation?
    tracing   causal, with the model's own answers (a clean state into a run with one other token);
              the maps of a moment and of the end are correlated
    swaps     of the stream at r1 with that of a query with the same r2: whole, only its part in the
              plane of both bridges' embeddings (what the lens sees), or only the rest; over all
              pairs of queries, and over those of which both are answered right

and what waiting buys: edits, and what EK-FAC leaves. A run is called fake grokking where OOD >= 0.9
while the visible swap redirects less than half as many OOD answers as ID ones.

    python -m studies.circuits --arch all --seeds 5 --eval-every 50 --out runs/circuits
    python -m studies.circuits --arch dense --regime both-hops --augment 0.5 --out runs/both-hops

--regime trains that share of the compositions of an OOD fact with an ID one, as first hop, as
second or both. A run takes 6 minutes on one core. Writes "circuits" into results.json.

[1] He et al. 2026, arXiv 2601.09049.   [2] Wang et al. 2024, arXiv 2405.15071.
"""

import sys
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature
import edit as editing
import kg
import minedit
from minedit import Run, share_of
from models import Config, Model, states
from studies import controls
from studies.training import Moments, check_edits, require_compositions
from studies.when import random_plane, span, state_entry

REGIMES = {
    "natural": [],
    "first-hop": ["ood_first"],
    "second-hop": ["ood_second"],
    "both-hops": ["ood_first", "ood_second"],
}
USED = 0.5  # where the bridge is used, the visible swap redirects this share of what it does in ID

# --- Regimes --------------------------------------------------------------------------------------


def with_regime(paths: kg.Paths, regime: str, share: float, seed: int) -> kg.Paths:
    """The paths with a `share` of the sets that the regime names trained; compositions of two OOD
    facts never are. ValueError for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"--augment must be in [0, 1], got {share}")
    # what kg.split drew (but for clones) is drawn and dropped, so that no order is used twice
    generator = torch.Generator().manual_seed(4 * seed + 1)
    both_id = int((paths.masks["train"] | paths.masks["id"]).sum())
    torch.randperm(len(paths.facts), generator=generator)
    torch.randperm(both_id, generator=generator)
    masks = dict(paths.masks)
    for name in REGIMES[regime]:
        added = kg.random_share(masks[name], share, generator)
        masks["train"] = masks["train"] | added
        masks[name] = masks[name] & ~added
    return replace(paths, masks=masks)


def make_task(args, seed: int, graph: kg.KnowledgeGraph | None) -> minedit.Task:
    task = minedit.make_task(args, seed, graph)
    if args.regime == "natural":
        return task
    paths = with_regime(task.paths, args.regime, args.augment, seed)
    data = task.data | {"regime": args.regime, "augment": args.augment}
    return task._replace(paths=paths, data=data)


# --- One inference path ---------------------------------------------------------------------------


@torch.no_grad()
def lens(
    model: Model, tokens: Tensor, wanted: Tensor, sites: list[tuple[str, int]], words: Tensor
) -> tuple[Tensor, Tensor]:
    """Logit lens: rank (0: the first; ties count against it) and probability, each [site, token,
    n], of wanted [n] among `words` [m, d], for each (module, call)."""
    ranks, probabilities = [], []
    for name, call in sites:
        state = editing.at_call(model, name, call, tokens)[1]  # [n, token, d]
        logits = F.linear(model.norm(state), words)  # [n, token, m]
        index = wanted[:, None, None].expand(-1, logits.shape[1], 1)
        mine = logits.gather(-1, index)  # [n, token, 1]
        ranks.append((logits >= mine).sum(-1).T - 1)
        probabilities.append((mine[..., 0] - logits.logsumexp(-1)).exp().T)
    return torch.stack(ranks), torch.stack(probabilities)


@torch.no_grad()
def swapped(
    model: nn.Module,
    tokens: Tensor,
    other: Tensor,
    site: tuple[str, int],
    token: int,
    basis: Tensor | None = None,
) -> Tensor:
    """The answers [n] to `tokens` with the state at a token of the prompts `other` [n, token], with
    a basis [n, d, k] the part in its span alone."""
    state = editing.at_call(model, *site, other)[1][:, token]
    with editing.interchange(model, *site, token, state, basis):
        return model(tokens)[:, -1].argmax(-1)


def complement(basis: Tensor) -> Tensor:
    """Orthonormal basis [batch, d, d - k] of what is orthogonal to a basis [batch, d, k]."""
    return torch.linalg.qr(basis, mode="complete").Q[..., basis.shape[-1] :]


class Traced(NamedTuple):
    """Causal tracing with one token replaced, prompt by prompt."""

    back: Tensor  # [site, token, n], float64: whether the model's own answer is back
    changed: Tensor  # [n], bool, on the CPU as `back`: whether replacing the token changed it


@dataclass
class InferencePath:
    """What a set of compositions is answered by, at most 300 of them. Where a share is of the
    stream after a block, the largest over all blocks but the last is kept."""

    n: int = 0
    right: float | None = None
    lens: dict = field(default_factory=dict)  # {word: {"first", "rank", "p"}: [site][token]}
    bridge: float | None = None  # the lens at r1 has the bridge first of all entities
    answer: float | None = None
    relation: float | None = None  # the lens at r2 has the second relation first
    unread: float | None = None  # of what is right: the bridge is first in none of these passes
    trace: dict = field(default_factory=dict)  # {token replaced: share back, [site][token]}
    swap: list = field(default_factory=list)  # of each block: {part: share redirected}
    whole: float | None = None
    visible: float | None = None
    rest: float | None = None
    random: float | None = None
    n_swap: int = 0
    whole_right: float | None = None  # of the pairs of which both queries are answered right
    visible_right: float | None = None
    n_right: int = 0

    def entry(self) -> dict:
        if not self.n:
            return {"n": 0, "lens": {}, "swap": []}
        return dict(vars(self))


def places(config: Config) -> tuple[list[tuple[str, int]], list[int]]:
    """(module, call) of every state; and which of them are the stream after a block, but for the
    last one, from which the answer is read."""
    every = states(config)
    sites = [(state.module, state.call) for state in every]
    streams = [i for i, state in enumerate(every) if state.part == "stream"]
    return sites, streams[:-1]


def inference_path(run: Run, model: Model, queries: str) -> tuple[InferencePath, dict[int, Traced]]:
    """Of the compositions of a set, and the tracing by the token that is replaced."""
    generator, paths = run.stream(), run.paths
    rows = paths.masks[queries].nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=generator).to(run.device)[:300]]
    path = InferencePath(n=len(rows))
    if len(rows) == 0:
        return path, {}
    sites, streams = places(run.config)
    read_with_lens(path, run, model, rows, sites, streams)
    traced = trace_paths(run, model, queries, sites, generator)
    for place, found in traced.items():
        if found.changed.any():
            path.trace[place] = found.back[:, :, found.changed].mean(-1).tolist()
    swap_bridges(path, run, model, rows, sites, streams, generator)
    return path, traced


def read_with_lens(
    path: InferencePath, run: Run, model: Model, rows: Tensor, sites: list, streams: list[int]
):
    """Fill in what is right, and the lens of bridge, answer and second relation."""
    paths, E = run.paths, model.embedding.weight
    n, n_relations = run.task.graph.n_entities, run.task.graph.n_relations
    tokens, bridge, answer = paths.tokens[rows], paths.one_hop[rows], paths.two_hop[rows]
    entities, relations = E[:n], E[n : n + n_relations]
    words = {
        "bridge": (bridge, entities),
        "answer": (answer, entities),
        "relation": (tokens[:, 2] - n, relations),
    }
    ranks = {}
    for name, (wanted, vocabulary) in words.items():
        ranks[name], p = lens(model, tokens, wanted, sites, vocabulary)  # [site, token, n]
        path.lens[name] = {
            "first": (ranks[name] == 0).double().mean(-1).tolist(),
            "rank": (ranks[name] + 1.0).mean(-1).tolist(),
            "p": p.mean(-1).tolist(),
        }
    is_right = minedit.last_answers(model, tokens) == answer
    path.right = share_of(is_right)
    if not streams:
        return
    path.bridge = max(path.lens["bridge"]["first"][i][1] for i in streams)  # at r1
    path.answer = max(path.lens["answer"]["first"][i][2] for i in streams)  # at r2
    path.relation = max(path.lens["relation"]["first"][i][2] for i in streams)
    is_read = (ranks["bridge"][streams, 1] == 0).any(0)  # [n]
    path.unread = share_of(~is_read[is_right])


def trace_paths(
    run: Run, model: Model, queries: str, sites: list, generator: torch.Generator
) -> dict[int, Traced]:
    """Causal tracing of prompts of the set; corrupted ones are any that differ in one token."""
    paths = run.paths
    composed = paths.second >= 0
    tokens, answers = paths.tokens[composed], paths.two_hop[composed]
    mine = paths.masks[queries][composed]
    found = {}
    for place in range(3):
        clean, other = editing.prompt_pairs(tokens, answers, place, 200, generator, mine)
        if len(clean) == 0:
            continue
        own = minedit.last_answers(model, tokens[clean])
        now = minedit.last_answers(model, tokens[other])
        back = editing.trace(model, tokens[clean], tokens[other], own, sites).back
        found[place] = Traced(back, (own != now).cpu())
    return found


def swap_bridges(
    path: InferencePath,
    run: Run,
    model: Model,
    rows: Tensor,
    sites: list,
    streams: list[int],
    generator: torch.Generator,
):
    """Fill in the swaps, between queries that share r2, of the stream at r1."""
    paths, E = run.paths, model.embedding.weight
    tokens, bridge, answer = paths.tokens[rows], paths.one_hop[rows], paths.two_hop[rows]
    one, other = editing.prompt_pairs(tokens[:, 1:], answer, 0, 200, generator)
    if len(one) == 0:
        return
    seen = span(E[bridge[one]], E[bridge[other]])
    random = random_plane(len(one), E, generator)
    parts = {"whole": None, "visible": seen, "rest": complement(seen), "random": random}
    is_right = minedit.last_answers(model, tokens) == answer
    both = is_right[one] & is_right[other]
    path.n_swap, path.n_right = len(one), int(both.sum())
    if not streams:
        return
    for i in streams:
        shares = {}
        for part, basis in parts.items():
            answers = swapped(model, tokens[one], tokens[other], sites[i], 1, basis)
            follows = answers == answer[other]
            shares[part] = share_of(follows)
            if path.n_right and part in ("whole", "visible"):
                shares[f"{part}_right"] = share_of(follows[both])
        path.swap.append(shares)
    for part in path.swap[0]:
        setattr(path, part, max(swap[part] for swap in path.swap))


# --- Are two paths the same? ----------------------------------------------------------------------


class Same(NamedTuple):
    """Pearson correlation of two tracing maps, and its 95 % bootstrap interval over prompts."""

    n: int  # prompts
    r: float
    low: float
    high: float


def same_paths(run: Run, one: dict[int, Traced], other: dict[int, Traced]) -> Same | None:
    """Over the prompts that count in both. Left out are states that say nothing: at tokens before
    the one that is replaced, which are the same in both runs; in the last block at tokens before
    r2, which nothing reads; and the last of all, which is the answer."""
    n_parts = len({state.part for state in states(run.config)})  # of a block
    pairs = []  # of two maps [free state, n], a pair for each token replaced
    for place in sorted(one.keys() & other.keys()):
        both = one[place].changed & other[place].changed
        if not both.any():
            continue
        free = torch.ones_like(one[place].back[:, :, 0], dtype=torch.bool)
        free[:, :place] = False
        free[-n_parts:, :2] = False
        free[-1] = False
        pairs.append((one[place].back[free][:, both], other[place].back[free][:, both]))
    if not pairs:
        return None
    generator = run.stream()
    drawn = sorted(correlation(drawn_anew(pairs, generator)) for _ in range(1000))
    n = sum(a.shape[1] for a, _ in pairs)
    return Same(n, correlation(pairs), low=drawn[24], high=drawn[975])


def drawn_anew(
    pairs: list[tuple[Tensor, Tensor]], generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """A bootstrap sample: of each pair of maps [state, n] n prompts, drawn with replacement."""
    sample = []
    for a, b in pairs:
        n = a.shape[1]
        prompts = torch.randint(n, (n,), generator=generator)
        sample.append((a[:, prompts], b[:, prompts]))
    return sample


def correlation(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Of the two maps, each its means over prompts, all pairs in a row; 0 where one is constant."""
    one = torch.cat([a.mean(1) for a, _ in pairs])
    other = torch.cat([b.mean(1) for _, b in pairs])
    return torch.corrcoef(torch.stack([one, other]))[0, 1].nan_to_num().item()


# --- What waiting buys ----------------------------------------------------------------------------


def worth_of(run: Run, model: Model, n_edits: int) -> dict:
    """Edits (ROME, prototype, a-priori site, C as it is), and ID accuracy after EK-FAC at 0.99."""
    paths, known = run.paths, minedit.what_is_known(model, run.paths)
    fact, new, _ = kg.draw_edits(paths, n_edits, run.stream())
    probes = minedit.edit_probes(paths, known, fact, new, 0, run.stream())
    requests = minedit.requests_for(paths, fact, new)
    site = minedit.a_priori_site(model, paths, fact, known.facts, run.stream()).site
    at = minedit.gather(run, model, site)
    edits = minedit.make_edits(model, paths, known.facts, requests, at, site.at_pass)
    record = minedit.score(model, edits, probes)
    fields = ("n", "direct", "hop1", "probes_hop1", "hop2", "probes_hop2", "site")
    worth = {name: getattr(record, name) for name in fields}

    layers = minedit.linear_layers(model)
    batches = run.make_batches(paths, run.recipe, run.stream(run.device))
    spectrum = minedit.spectrum_of(run, model, batches.mixture(10), layers)
    with curvature.ablated(model, controls.edited(model, "ekfac", spectrum, layers, 0.99)):
        worth["ablated"] = minedit.accuracy(model, paths)["id"]
    return worth


# --- The study ------------------------------------------------------------------------------------


def circuits_stage(run: Run, moments: Moments, n_edits: int) -> dict:
    """All moments, ID and OOD apart."""
    found, traced = {"id": {}, "ood": {}}, {"id": {}, "ood": {}}
    worth = {}
    for moment, (record, weights) in moments.found.items():
        then = Model(run.config).to(run.device).requires_grad_(False)
        then.load_state_dict(weights)
        for queries in ("id", "ood"):
            found[queries][moment], traced[queries][moment] = inference_path(run, then, queries)
        accuracy = {name: record[name] for name in ("step", "one_hop", "train", "id", "ood")}
        worth[moment] = accuracy | worth_of(run, then, n_edits)
    same = {}
    for queries, maps in traced.items():
        same[queries] = {}
        for moment in maps:
            if moment == "end":
                continue
            pair = same_paths(run, maps[moment], maps["end"])
            if pair is not None:
                same[queries][moment] = pair._asdict()
    fake = is_fake(run.history[-1]["ood"], found["id"]["end"], found["ood"]["end"])
    print(paths_table(found))
    print(worth_table(worth, same))
    print(f"fake grokking (OOD >= 0.9, visible swap below {USED} of that of ID): {fake}")
    return {
        "states": [state_entry(state) for state in states(run.config)],
        "id": {moment: path.entry() for moment, path in found["id"].items()},
        "ood": {moment: path.entry() for moment, path in found["ood"].items()},
        "worth": worth,
        "same": same,
        "fake": fake,
    }


def is_fake(accuracy: float | None, of_id: InferencePath, of_ood: InferencePath) -> bool | None:
    """Whether OOD compositions are answered, but less by the bridge than ID ones; None where one of
    these was not asked."""
    if of_id.visible is None or of_ood.visible is None:
        return None
    return accuracy >= 0.9 and of_ood.visible < USED * of_id.visible


def paths_table(found: dict[str, dict[str, InferencePath]]) -> str:
    names = ("right", "bridge", "relation", "whole", "visible", "rest", "random")
    names += ("whole_right", "visible_right")
    rows = [("compositions", "when", *(name.replace("_", ", ") for name in names))]
    for queries, by_moment in found.items():
        for moment, path in by_moment.items():
            rows.append((queries, moment, *(minedit.cell(getattr(path, n)) for n in names)))
    return (
        f"\n{minedit.table(rows)}\n"
        "right: accuracy; bridge, relation: the lens at r1 (r2) has the bridge (second relation)\n"
        "first; whole, visible, rest, random: answers that follow a swap of the stream at r1 with\n"
        "that of a query of the same r2: all of it, the plane of both bridges, the rest, a random\n"
        "plane; right: of the pairs that are both answered right; the largest over passes, the\n"
        "last left out"
    )


def worth_table(worth: dict[str, dict], same: dict[str, dict]) -> str:
    names = ("one_hop", "id", "ood", "direct", "hop1", "hop2", "ablated")
    rows = [("when", "step", "facts", "ID", "OOD", "direct", "hop 1", "hop 2", "ablated")]
    for moment, entry in worth.items():
        rows.append((moment, entry["step"], *(minedit.cell(entry[name]) for name in names)))
    text = (
        f"\n{minedit.table(rows)}\n"
        "direct, hop 1, hop 2: edits (ROME, prototype); ablated: ID accuracy after EK-FAC at 0.99"
    )
    for queries, by_moment in same.items():
        for moment, pair in by_moment.items():
            text += (
                f"\ntracing maps of {queries}, {moment} against end: r = {pair['r']:.3f} "
                f"({pair['low']:.3f} to {pair['high']:.3f}, {pair['n']} prompts)"
            )
    return text


# --- Command line ---------------------------------------------------------------------------------


def command(args):
    require_compositions(args)
    is_natural = args.regime == "natural"
    given = f"--augment {args.augment:g} with --regime {args.regime}"
    message = f"{given}: a share above 0 is for the regimes other than natural, which need one"
    minedit.require(is_natural == (args.augment == 0), message)
    runs = minedit.prepare(args, make_task, check=check_edits)
    kept = {run: Moments(run) for run in runs}
    for run, moments in kept.items():
        minedit.trained_model(run, args, moments)
        began = time.perf_counter()
        run.add_results("circuits", circuits_stage(run, moments, args.n_edits), began)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.training_parser("python -m studies.circuits", __doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "--regime", choices=list(REGIMES), default="natural", help="OOD facts composed with ID ones"
    )
    add("--augment", type=float, default=0.0, help="share of the regime's compositions: trained")
    quick = minedit.QUICK | dict(label_noise=0.0, memorize=0)
    return minedit.guarded(command, minedit.parse(parser, argv, {"quick": quick}))


if __name__ == "__main__":
    sys.exit(main())
