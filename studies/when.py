"""Which states carry an answer, and when must an edit be there? Two parts of studies/propagation.py.

    locate  causal tracing of facts and compositions [2]
    when    edits that act at some calls of their layer alone; and the answer held as it was, our
            reading of the interchange of a held answer subspace in [1]

[1] Niu 2026, arXiv 2606.20737.   [2] Meng et al. 2022, ROME, arXiv 2202.05262.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import edit as editing
import kg
import minedit
from minedit import Run, share_of
from models import Model, State, states, stores

# --- Locate: which state carries the answer -------------------------------------------------------


def locate_stage(run: Run, model: Model, known: minedit.Known, n_edits: int) -> dict:
    """Causal tracing of known ID facts and of known compositions of them."""
    generator, paths = run.stream(), run.paths
    kg.draw_edits(paths, n_edits, generator)  # the prompts are drawn after the edits
    traced = states(run.config)
    sites = [(state.module, state.call) for state in traced]
    right = known.right & known.asked
    asked = {
        "fact": (paths.queries[known.facts], paths.facts[known.facts, 2]),
        "composition": (paths.tokens[right], paths.two_hop[right]),
    }
    effects = []
    for query, (tokens, answers) in asked.items():
        for place in range(tokens.shape[1]):
            clean, other = editing.prompt_pairs(tokens, answers, place, 200, generator)
            top1 = rise = None
            if len(clean):
                found = editing.trace(model, tokens[clean], tokens[other], answers[clean], sites)
                top1, rise = found.back.mean(-1).tolist(), found.rise.mean(-1).tolist()
            effect = {"query": query, "corrupted": ("h", "r1", "r2")[place], "n": len(clean)}
            effects.append(effect | {"top1": top1, "rise": rise})
    print(locate_table(traced, effects))
    return {"effects": effects, "states": [state_entry(state) for state in traced]}


def state_entry(state: State) -> dict:
    return {
        "pass": state.at_pass,
        "part": state.part,
        "module": state.module,
        "call": state.call,
    }


def locate_table(traced: list[State], effects: list[dict]) -> str:
    """A row for each state, a column for each question and token replaced."""
    head = [f"{e['query'][:4]}: {e['corrupted']}" for e in effects]
    rows = [("pass", "state", *head)]
    for i, state in enumerate(traced):
        cells = []
        for e in effects:
            shares = e["top1"][i] if e["top1"] else []
            cells.append(" ".join(f"{100 * share:3.0f}" for share in shares) or "-")
        rows.append((state.at_pass, state.part, *cells))
    return (
        f"\n{minedit.table(rows)}\n"
        "percent of prompts whose answer is back: the token named was replaced, a state restored\n"
        "at each token of the question in turn"
    )


# --- When: edits that act at some calls alone, and answers held as they were ----------------------


class Written(NamedTuple):
    """An edit made for one call of a layer, acting at some."""

    site: str
    call: int
    at_pass: int
    acts: str  # "always", "from call 1", "only call 1", ...
    direct: float | None
    hop1: float | None  # among edits that succeed when they always act
    hop2: float | None


def actions(n_calls: int) -> dict[str, list[int] | None]:
    """At which of a layer's calls an edit acts."""
    found = {"always": None}
    for t in range(1, n_calls):
        found[f"from call {t}"] = list(range(t, n_calls))
    for t in range(n_calls):
        found[f"only call {t}"] = [t]
    return found


def when_stage(run: Run, model: Model, known: minedit.Known, n_edits: int, shrink: float) -> dict:
    """Edits, C shrunk, that act at some calls of their layer alone; then the first of them with its
    answer held as it was."""
    generator, paths, config = run.stream(), run.paths, run.config
    fact, new, _ = kg.draw_edits(paths, n_edits, generator)
    requests = minedit.requests_for(paths, fact, new)
    asked = (known.facts, known.right, known.asked)
    probes = {
        "direct": kg.questions(paths, fact, new),
        "hop1": kg.hop1_probes(paths, fact, new, *asked)[0],
        "hop2": kg.hop2_probes(paths, fact, new, *asked)[0],
    }
    chosen = minedit.a_priori_site(model, paths, fact, known.facts, run.stream()).site
    is_shared = config.loop or config.memory  # one layer, called in every pass; else one a block
    sites = [s for s in stores(config) if s.module == chosen.module or not is_shared]
    sites.sort(key=lambda site: site != chosen)  # the chosen one first
    written, held = [], None
    for site in sites:
        at = editing.shrunk(minedit.gather(run, model, site), shrink)
        edits = minedit.make_edits(model, paths, known.facts, requests, at, site.at_pass)
        n_calls = len(sites) if is_shared and site == chosen else 0  # 0: "always" alone
        hits = {}
        for acts, calls in actions(n_calls).items():
            hits[acts] = {
                name: minedit.ask(model, edits, probe, calls) == probe.answer
                for name, probe in probes.items()
            }
        success = hits["always"]["direct"]
        for acts, hit in hits.items():
            hop1 = hit["hop1"][success[probes["hop1"].edit]]
            hop2 = hit["hop2"][success[probes["hop2"].edit]]
            shares = (share_of(hit["direct"]), share_of(hop1), share_of(hop2))
            written.append(Written(site.module, site.call, site.at_pass, acts, *shares))
        if site == chosen:
            held = hold(run, model, edits, requests, probes, hits["always"], generator)
    counts = {name: len(probe.edit) for name, probe in probes.items()}
    print(when_table(written, held))
    entries = [w._asdict() | {"pass": w.at_pass} for w in written]
    return {"probes": counts, "written": entries, "held": held}


def hold(
    run: Run,
    model: Model,
    edits: minedit.Edits,
    requests: editing.Requests,
    probes: dict[str, kg.Probes],
    right: dict[str, Tensor],
    generator: torch.Generator,
) -> list[dict]:
    """An entry for the stream after each pass: of the probes that are answered `right` under the
    edit, the share that still are when the stream at r1 (hop 2: at r2) is held as it is without the
    edit, in the plane of the old and the new answer's embeddings, or in a random plane."""
    E = model.embedding.weight
    entries = []
    streams = [state for state in states(run.config) if state.part == "stream"]
    for state in streams[run.config.blocks - 1 :: run.config.blocks]:
        entry = {"after": state.at_pass, "module": state.module, "call": state.call}
        for name, probe in probes.items():
            token = 2 if name == "hop2" else 1
            old, new = E[requests.old[probe.edit]], E[requests.new[probe.edit]]
            random = random_plane(len(probe.edit), E, generator)
            counted = right[name] & right["direct"][probe.edit]
            for key, plane in ((name, span(old, new)), (f"{name}_random", random)):
                answers = held_answers(model, edits, probe, state, token, plane)
                entry[key] = share_of((answers == probe.answer)[counted])
        entries.append(entry)
    return entries


def span(*vectors: Tensor) -> Tensor:
    """Orthonormal basis [batch, d, k] of the span of k vectors [batch, d] each."""
    return torch.linalg.qr(torch.stack(vectors, -1)).Q


def random_plane(n: int, E: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal bases [n, d, 2] of n random planes, in the space of the rows of E [m, d]."""
    return span(*torch.randn(2, n, E.shape[1], generator=generator).to(E))


@torch.no_grad()
def held_answers(
    model: Model,
    edits: minedit.Edits,
    probe: kg.Probes,
    state: State,
    token: int,
    basis: Tensor,
    chunk: int = 512,
) -> Tensor:
    """Answers [m] to the probes under their edits, with the state at a token, in the span of basis
    [m, d, k], as it is without the edit."""
    answers = []
    for i, tokens, part in zip(
        probe.edit.split(chunk), probe.tokens.split(chunk), basis.split(chunk)
    ):
        before = editing.at_call(model, state.module, state.call, tokens)[1][:, token]
        held = editing.interchange(model, state.module, state.call, token, before, part)
        with held, editing.rank_one(edits.at.layer, edits.u[i], edits.r[i]):
            answers.append(model(tokens)[:, -1].argmax(-1))
    return torch.cat(answers)


def when_table(written: list[Written], held: list[dict]) -> str:
    rows = [("made for pass", "acts", "direct", "hop 1", "hop 2")]
    for w in written:
        rows.append((w.at_pass, w.acts, *map(minedit.cell, (w.direct, w.hop1, w.hop2))))
    names = [name for name in held[0] if name not in ("after", "module", "call")]
    other = [("held after pass", *(name.replace("_", " ") for name in names))]
    for entry in held:
        other.append((entry["after"], *(minedit.cell(entry[name]) for name in names)))
    return (
        f"\n{minedit.table(rows)}\n"
        "edits by ROME with the key and prototype of a pass, that of --edit first; acts: at which\n"
        "calls of the layer. hop 1, hop 2: among edits that succeed when they always act\n"
        f"\n{minedit.table(other)}\n"
        "share of right answers under the first of these edits that stay right while the stream\n"
        "after a pass is held as unedited in the plane of old and new answer, or in a random one"
    )
