"""edit.py: a linear layer is an associative memory; an edit is a small closed-form change of it.

A layer W [d_out, d_in] that is handed a key k returns the value W k. To change what it returns for one key and, as far as
possible, nothing else, add a rank-one matrix. Two of them differ in the direction that must recognise the key:

    row    dW = r e_j^T / k_j                  j: the entry of k of largest magnitude. One column of W, one slot [1]
    ROME   dW = r (C^-1 k)^T / (k^T C^-1 k)    C: second moment of ordinary keys, so that those keep their values [2]

with r = v* - W k, what is missing from the wanted value v*. Where v* comes from is a choice of its own:

    prototype   the mean value that the layer returns for known facts with the wanted answer: closed form end to end
    gradient    r by gradient descent on -log p(wanted answer) of the model with the edit in place [2]

An edited fact should change the answers that follow from it and no others; the lower half of the file asks for both.

    >>> W, C = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([1., 4.], dtype=torch.float64))
    >>> k, v = torch.tensor([1., 2.], dtype=torch.float64), torch.tensor([1., 6.], dtype=torch.float64)
    >>> rome_update(W, C, k, v)                # v - W k = (0, 4), C^-1 k = (1, 1/2), k^T C^-1 k = 2
    tensor([[0., 0.],
            [2., 1.]], dtype=torch.float64)
    >>> row_update(k, v - W @ k)               # the largest entry of k is k_1 = 2
    tensor([[0., 0.],
            [0., 2.]], dtype=torch.float64)

Glossary: K — keys [n, d_in], one a row; R — residuals [n, d_out]; C — `second_moment` E[k k^T] [d_in, d_in]; a **site** is
an `nn.Linear` by name and the number of its call within one forward pass (a loop calls the same layer several times).
The file needs torch alone. It works on any model called as `model(tokens) -> logits [batch, token, answers]`.
Left out: several facts in one update (MEMIT, EMMET), biases (they are no part of a key).

[1] Niu 2026, arXiv 2606.20737 (the single-row edit).   [2] Meng et al. 2022, ROME, arXiv 2202.05262, equation 2.
[3] Gupta et al. 2024, arXiv 2403.07175: two different keys in one ROME update make disabling edits; here there is one.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ---------------------------------------------------------------------------------------------------------------------
# The closed forms: float64 inside, the result in the dtype of the weights
# ---------------------------------------------------------------------------------------------------------------------

def double(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its device has none (MPS)."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def cast(update: Tensor, like: Tensor) -> Tensor:
    """A float64 update in the dtype and on the device of `like`; ValueError where rounding loses it."""
    result = update.to(like.device, like.dtype)
    error, size = (double(result).to(update.device) - update).norm(), update.norm()
    if not error <= 4 * torch.finfo(like.dtype).eps * size + torch.finfo(like.dtype).tiny:
        raise ValueError(f"an update of norm {size:.3g} does not fit {like.dtype}: the cast is off by {error:.3g}")
    return result


def second_moment(K: Tensor) -> Tensor:
    """C = mean over the rows of k k^T, uncentred: [..., d_in] -> [d_in, d_in], float64 ([2], below equation 2)."""
    if K.dim() < 2 or K.shape[:-1].numel() == 0 or not K.isfinite().all():
        raise ValueError(f"keys must be finite and [n, d_in] with n >= 1, got shape {list(K.shape)}")
    K = double(K.flatten(0, -2))
    return K.T @ K / len(K)


def check_request(name: str, vector: Tensor, size: int):
    if vector.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(vector.shape)}")
    if not vector.isfinite().all():
        raise ValueError(f"{name} holds a value that is not finite")


def row_direction(K: Tensor) -> Tensor:
    """u = e_j / k_j with j = argmax |k_j|, for every row of K [n, d_in]; u k = 1."""
    K = double(K)
    j = K.abs().argmax(-1, keepdim=True)
    if (K.gather(-1, j) == 0).any():
        raise ValueError("a key of zeros cannot be edited: the layer returns nothing for it, whatever its weights")
    return torch.zeros_like(K).scatter(-1, j, 1 / K.gather(-1, j))


def rome_direction(C: Tensor, K: Tensor, diagnostics: dict | None = None) -> Tensor:
    """u = C^-1 k / (k^T C^-1 k) for every row of K [n, d_in]; u k = 1. One factorisation of C serves all rows.

    C is solved as given. Only where it is numerically singular (dead or dependent inputs) a ridge of 1e-8 trace(C) / d_in
    is added; `diagnostics["ridge"]` records it, 0.0 where there is none.
    """
    C, K = double(C), double(K)
    d_in = K.shape[-1]
    if C.shape != (d_in, d_in):
        raise ValueError(f"C must have shape [{d_in}, {d_in}] to fit keys of {d_in}, got {list(C.shape)}")
    if not C.isfinite().all() or not C.diagonal().sum() > 0:
        raise ValueError("C must be finite with a positive trace: the second moment of ordinary keys")
    if (K == 0).all(-1).any():
        raise ValueError("a key of zeros cannot be edited: the layer returns nothing for it, whatever its weights")
    L, failed = torch.linalg.cholesky_ex(C)
    pivots, ridge = L.diagonal().square(), 0.0
    if failed or not pivots.min() > d_in * torch.finfo(C.dtype).eps * pivots.max():
        ridge = 1e-8 * float(C.diagonal().mean())
        L = torch.linalg.cholesky(C + ridge * torch.eye(d_in, dtype=C.dtype, device=C.device))
    if diagnostics is not None:
        diagnostics["ridge"] = ridge
    U = torch.cholesky_solve(K.T, L).T                                           # C^-1 k as rows
    return U / (U * K).sum(-1, keepdim=True)


def row_update(k: Tensor, r: Tensor) -> Tensor:
    """dW [d_out, d_in] that changes one column, k's entry of largest magnitude, so that dW k = r [1].

    k [d_in], r [d_out]. Raises ValueError on shapes that do not fit, values that are not finite and a key of zeros."""
    check_request("the key k", k, k.shape[-1] if k.dim() else 1)
    check_request("the residual r", r, r.shape[-1] if r.dim() else 1)
    return cast(torch.outer(double(r), row_direction(k[None])[0]), r)


def rome_update(W: Tensor, C: Tensor, k: Tensor, v: Tensor, diagnostics: dict | None = None) -> Tensor:
    """dW = (v - W k) (C^-1 k)^T / (k^T C^-1 k), so that (W + dW) k = v: ROME [2], equation 2, with one key [3].

    W [d_out, d_in], C [d_in, d_in], k [d_in], v [d_out] -> dW [d_out, d_in]. Of all matrices that put v at k, W + dW is
    the one that changes the values of ordinary keys least, in the mean square. `diagnostics`: see `rome_direction`.
    Raises ValueError on shapes that do not fit, values that are not finite and a key of zeros.
    """
    check_request("the key k", k, W.shape[1])
    check_request("the value v", v, W.shape[0])
    residual = double(v) - double(W) @ double(k)
    return cast(torch.outer(residual, rome_direction(C, k[None], diagnostics)[0]), W)


# ---------------------------------------------------------------------------------------------------------------------
# Putting an edit into a model
# ---------------------------------------------------------------------------------------------------------------------

def apply_edit(model: nn.Module, updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add updates {layer name: dW} to the weights for good; returns the old weights, for `restore`.

    An edited layer says so: `layer.edited` is ||dW|| / ||W||. Nothing is changed where any request is bad (ValueError)."""
    layers = {name: model.get_submodule(name) for name in updates}
    for name, dW in updates.items():
        if layers[name].weight.shape != dW.shape or not dW.isfinite().all():
            raise ValueError(f"the update of {name} must be finite and {list(layers[name].weight.shape)}, "
                             f"got {list(dW.shape)}")
    old = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        for name, dW in updates.items():
            layers[name].weight += dW.to(old[name])
            layers[name].edited = float(dW.norm() / old[name].norm())
    return old


def restore(model: nn.Module, old: dict[str, Tensor]):
    """Put back the weights that `apply_edit` returned, bit for bit."""
    with torch.no_grad():
        for name, weight in old.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(weight)
            layer.__dict__.pop("edited", None)


@contextmanager
def edit(model: nn.Module, updates: dict[str, Tensor]):
    """`with edit(model, {"memory.values": dW}):` the model is edited inside, and bit for bit the old one after,
    whether or not the body raises."""
    old = apply_edit(model, updates)
    try:
        yield model
    finally:
        restore(model, old)


@contextmanager
def intervene(module: nn.Module, change, calls=None):
    """Inside, the module returns change(input, output) at the `calls` given, None: at all. They are counted from 0 at the
    start of the `with` block, so that where calls are given each block is for one forward pass."""
    n_calls = 0

    def hook(_, inputs, output):
        nonlocal n_calls
        n_calls += 1
        return change(inputs[0], output) if calls is None or n_calls - 1 in calls else output

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def rank_one(layer: nn.Linear, u: Tensor, r: Tensor, calls=None):
    """Every example of the batch sees its own edit, W + r_b u_b^T: u [batch, d_in], r [batch, d_out]. An edit of the weights
    acts at every call of the layer; with `calls` it acts at those alone (see `intervene`).

    The layer's input is [batch, token, d_in]. W is untouched. As many edits as the batch is long are tried out, or trained, in one forward pass."""
    return intervene(layer, lambda key, value: value + torch.einsum("bti,bi->bt", key, u)[..., None] * r[:, None], calls)


@torch.no_grad()
def record(model: nn.Module, layer: nn.Linear, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [call, batch, token, d_in] and values [call, batch, token, d_out] of every call of the layer in one pass."""
    calls = []
    hook = layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0].detach(), output.detach())))
    try:
        model(tokens)
    finally:
        hook.remove()
    if not calls:
        raise ValueError("the layer is not called when the model reads these tokens, so it holds nothing of them")
    return torch.stack([key for key, _ in calls]), torch.stack([value for _, value in calls])


def key_second_moment(model: nn.Module, layer: nn.Linear, tokens: Tensor, chunk: int = 256) -> Tensor:
    """C of a layer over ordinary inputs: every token of `tokens` [n, token] at every call. The weight is the same at
    each call of a loop, so what it does at each of them is to be kept."""
    parts = [second_moment(record(model, layer, part)[0]) * len(part) for part in tokens.split(chunk)]
    return sum(parts) / len(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Requests and their target values
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Requests:
    """n facts to be changed; the query of a fact is read at its last token."""
    fact: Tensor                        # [n] row in the list of facts
    tokens: Tensor                      # [n, token] the query
    old: Tensor                         # [n] the answer now
    new: Tensor                         # [n] the answer wanted


@dataclass
class Site:
    """What an edit needs to know of one layer at one call: gathered once, used by every method and target."""
    name: str                           # of the nn.Linear
    call: int                           # which of its calls within a forward pass, from 0
    layer: nn.Linear
    C: Tensor                           # [d_in, d_in] second moment of ordinary keys over all calls
    keys: Tensor                        # [n_facts, d_in] at the last token of each fact's query
    values: Tensor                      # [n_facts, d_out]


def site(model: nn.Module, name: str, call: int, queries: Tensor, ordinary: Tensor, chunk: int = 1024) -> Site:
    """Gather a site: `queries` [n_facts, token] ask for each fact, `ordinary` [n, token] are inputs whose values to keep."""
    layer = model.get_submodule(name)
    recorded = [record(model, layer, part) for part in queries.split(chunk)]
    if not 0 <= call < len(recorded[0][0]):
        raise ValueError(f"{name} is called {len(recorded[0][0])} time(s) in a forward pass, so there is no call {call}")
    keys, values = (torch.cat([part[i][call, :, -1] for part in recorded]) for i in (0, 1))
    return Site(name, call, layer, key_second_moment(model, layer, ordinary), keys, values)


def direction(method: str, at: Site, requests: Requests, diagnostics: dict | None = None) -> Tensor:
    """u [n, d_in] of each request, for the method "row" or "rome"; an edit is W + r u^T.

    A fact whose key is zero cannot be edited at this site: its u is zero, so that its edit changes nothing and counts as one
    that failed; `diagnostics["zero_keys"]` says how many there are."""
    keys = at.keys[requests.fact]
    alive = (keys != 0).any(-1)
    u = torch.zeros_like(keys)
    if alive.any():
        u[alive] = (row_direction(keys[alive]) if method == "row" else rome_direction(at.C, keys[alive], diagnostics)).to(keys)
    if diagnostics is not None:
        diagnostics["zero_keys"] = int((~alive).sum())
    return u


def prototype_residual(at: Site, requests: Requests, tails: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """r = v* - W k with v* the mean value over the known facts (`known` [n_facts], bool; answers `tails` [n_facts]) whose
    answer is the wanted one. Returns r [n, d_out] and which requests have such a fact [n]; r is 0 for the others."""
    same = (tails[None] == requests.new[:, None]) & known                        # [n, n_facts]
    same[torch.arange(len(same)), requests.fact] = False
    weights = same / same.sum(1, keepdim=True).clamp(min=1)
    has_one = same.any(1)
    return (weights.to(at.values) @ at.values - at.values[requests.fact]) * has_one[:, None], has_one


def gradient_residual(model: nn.Module, at: Site, requests: Requests, u: Tensor, steps: int = 40, lr: float = 0.1,
                      decay: float = 1e-3, clamp: float = 4.0) -> Tensor:
    """r [n, d_out] that minimises -log p(wanted answer) + decay |r|^2 / |v0|^2, with |r| <= clamp |v0| (v0 = W k), by Adam.

    The model runs with W + r u^T at every call of the layer, as it will after the edit: in a loop, what the changed
    weight does at the other passes is part of the loss. All requests are optimised in one batch, each for itself.
    """
    size = at.values[requests.fact].norm(dim=-1, keepdim=True)
    size = torch.where(size > 0, size, at.values.norm(dim=-1).mean())            # the site may return nothing for a fact
    scaled = torch.zeros_like(at.values[requests.fact], requires_grad=True)      # r in units of |v0|
    optimizer = torch.optim.Adam([scaled], lr=lr)
    for _ in range(steps):
        with rank_one(at.layer, u, scaled * size):
            loss = F.cross_entropy(model(requests.tokens)[:, -1], requests.new, reduction="sum")
        scaled.grad, = torch.autograd.grad(loss + decay * scaled.square().sum(), scaled)
        optimizer.step()
        with torch.no_grad():
            scaled *= (clamp / scaled.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return (scaled * size).detach()


# ---------------------------------------------------------------------------------------------------------------------
# What an edit did: the fact, what follows from it, and everything else
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Probes:
    """m questions, each asked of the model that holds one of the edits; the answer is read at the last token."""
    edit: Tensor                        # [m] row in the requests
    tokens: Tensor                      # [m, token]
    answer: Tensor                      # [m]


def propagation_probes(requests: Requests, paths, known: Tensor, right: Tensor, asked: Tensor) \
        -> tuple[dict[str, Probes], dict[str, int]]:
    """Compositions whose answer an edit must change: "hop1" with the edited fact first, "hop2" with it second.

    paths: any object with facts [n_facts, 3] (head, relation, tail; sorted), tokens [n_paths, 3], two_hop, first, second
    [n_paths] as in kg.py. known [n_facts]: the model knows the fact and has seen it in compositions; right [n_paths]: its
    answer is right before the edit; asked [n_paths]: the paths to draw from. Counted in the second result and left out
    are paths that use the edited fact twice, whose right answer stays, that were wrong before, or whose other fact
    (after the edit) does not exist or is not known.
    """
    head, relation, tail = paths.facts.T
    row_of = torch.full((int(max(head.max(), tail.max())) + 1, int(relation.max()) + 1), -1, device=head.device)
    row_of[head, relation] = torch.arange(len(head), device=head.device)         # fact of (head, relation), -1: none
    probes, left_out = {}, {"edited fact twice": 0, "answer unchanged": 0, "wrong before": 0, "other fact unknown": 0}
    for name, hop in ("hop1", paths.first), ("hop2", paths.second):
        i, path = ((hop == requests.fact[:, None]) & (paths.second >= 0) & asked).nonzero(as_tuple=True)
        fact, new = requests.fact[i], requests.new[i]
        if name == "hop1":                                                       # (h, r1, r2): now via the new tail
            other = row_of[new, relation[paths.second[path]]]
            answer = tail[other]
            twice = (paths.second[path] == fact) | (other == fact)
        else:                                                                    # (g, s, r) with (g, s) -> h
            other, answer = paths.first[path], new
            twice = other == fact
        keep = torch.ones_like(twice)
        for reason, out in ("edited fact twice", twice), ("other fact unknown", (other < 0) | ~known[other]), \
                           ("answer unchanged", answer == paths.two_hop[path]), ("wrong before", ~right[path]):
            left_out[reason] += int((keep & out).sum())
            keep &= ~out
        probes[name] = Probes(i[keep], paths.tokens[path[keep]], answer[keep])
    return probes, left_out


def unrelated_probes(requests: Requests, paths, one_hop: Tensor, two_hop: Tensor, asked: Tensor, n: int,
                     generator: torch.Generator) -> dict[str, Probes]:
    """Per edit n facts and n of the paths in `asked`, with the edited fact at no hop; the answer is the model's own before
    the edit (one_hop [n_facts], two_hop [n_paths])."""
    device, probes = paths.facts.device, {}
    for name, rows in ("one_hop", torch.arange(len(paths.facts), device=device)), ("two_hop", asked.nonzero().flatten()):
        place = torch.rand(len(requests.fact), len(rows), generator=generator).argsort(1)[:, :n].flatten().to(device)
        row = rows[place]
        i = torch.arange(len(requests.fact), device=device).repeat_interleave(len(row) // len(requests.fact))
        fact = requests.fact[i]
        if name == "one_hop":
            keep, tokens, answer = row != fact, queries(paths)[row], one_hop[row]
        else:
            keep = (paths.first[row] != fact) & (paths.second[row] != fact)
            tokens, answer = paths.tokens[row], two_hop[row]
        probes[name] = Probes(i[keep], tokens[keep], answer[keep])
    return probes


def same_row_probes(requests: Requests, at: Site, paths, one_hop: Tensor) -> Probes:
    """Other facts whose largest key entry at the site is that of the edited fact: they live on the row that is edited."""
    slot = at.keys.abs().argmax(-1)
    i, row = (slot[requests.fact][:, None] == slot).nonzero(as_tuple=True)
    keep = row != requests.fact[i]
    return Probes(i[keep], queries(paths)[row[keep]], one_hop[row[keep]])


def queries(paths) -> Tensor:
    """[n_facts, 2]: head and relation token of each fact, in the order of `paths.facts`."""
    n_rows = torch.bincount(paths.first)
    return paths.tokens[n_rows.cumsum(0) - n_rows, :2]


@torch.no_grad()
def answers(model: nn.Module, at: Site, u: Tensor, r: Tensor, probes: Probes, chunk: int = 512, calls=None) -> Tensor:
    """The answer [m] to each probe by the model with the probe's own edit, W + r u^T (at `calls`, see `rank_one`)."""
    parts = []
    for i, tokens in zip(probes.edit.split(chunk), probes.tokens.split(chunk)):
        with rank_one(at.layer, u[i], r[i], calls):
            parts.append(model(tokens)[:, -1].argmax(-1))
    return torch.cat(parts) if parts else probes.answer


def score(model: nn.Module, at: Site, requests: Requests, u: Tensor, r: Tensor, probes: dict[str, Probes]) -> dict:
    """Shares in 0..1 over all edits; None where there was nothing to ask.

    direct: edits whose own query now has the new answer. hop1, hop2: probes right after the edit, over the edits with
    direct success (`probes_hop1`, `probes_hop2` of them). *_moved: probes whose answer differs from the one before.
    """
    everyone = torch.arange(len(requests.fact), device=requests.fact.device)
    success = answers(model, at, u, r, Probes(everyone, requests.tokens, requests.new)) == requests.new
    hits = {name: answers(model, at, u, r, probe) == probe.answer for name, probe in probes.items()}
    share = lambda hit: int(hit.sum()) / len(hit) if len(hit) else None
    result = {"n": len(success), "direct": share(success)}
    for name in ("hop1", "hop2"):
        hit = hits[name][success[probes[name].edit]]
        result |= {name: share(hit), f"probes_{name}": len(hit)}
    for name in ("one_hop", "two_hop", "same_row"):
        result[f"{'unrelated_' if name != 'same_row' else ''}{name}_moved"] = share(~hits[name])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Locate: which state carries an answer
# ---------------------------------------------------------------------------------------------------------------------
# A state is what a module, by name, returns at one of its calls, at one token: an attention output, the read of a
# store, or the whole residual stream after a block. What it carries shows when it is interchanged between two runs [2];
# that the other run differs in one token is after Wang et al. 2024, arXiv 2405.15071.

@torch.no_grad()
def state(model: nn.Module, name: str, call: int, tokens: Tensor) -> Tensor:
    """What the module `name` returns at its call number `call` when the model reads the tokens: [batch, token, d]."""
    values = record(model, model.get_submodule(name), tokens)[1]
    if not 0 <= call < len(values):
        raise ValueError(f"{name} is called {len(values)} time(s) in a forward pass, so there is no call {call}")
    return values[call]


def interchange(model: nn.Module, name: str, call: int, token: int, other: Tensor, basis: Tensor | None = None):
    """Inside, for one forward pass, the state (name, call, token) is that of another run, other [batch, d].

    basis [batch, d, k], with orthonormal columns: only the component in their span is, x <- x + B B^T (x_other - x)."""
    def change(_, x):
        mine = x[:, token]                                                       # [batch, d]
        new = other if basis is None else mine + (basis @ (basis.mT @ (other - mine)[..., None]))[..., 0]
        return torch.cat([x[:, :token], new[:, None], x[:, token + 1:]], 1)
    return intervene(model.get_submodule(name), change, calls=[call])


@torch.no_grad()
def trace(model: nn.Module, clean: Tensor, corrupted: Tensor, answer: Tensor, sites: list[tuple[str, int]]) \
        -> tuple[Tensor, Tensor]:
    """Causal tracing: the corrupted run with one state restored from the clean run, for each (name, call) of `sites` and token.

    clean, corrupted [n, token]; answer [n], that of the clean run, read at the last token. Returns the indirect effect in
    two measures, each [site, token]: the share of the prompts that get the clean answer back, and the mean rise of its
    probability. Raises ValueError where the prompts do not pair up or a site is not called."""
    if clean.shape != corrupted.shape or not len(clean):
        raise ValueError(f"clean and corrupted prompts must pair up and be at least one, got shapes {list(clean.shape)} "
                         f"and {list(corrupted.shape)}")
    probability = lambda logits: logits.softmax(-1).gather(-1, answer[:, None]).mean()
    before = probability(model(corrupted)[:, -1])
    share, rise = torch.zeros(2, len(sites), clean.shape[1], dtype=torch.float64)
    for i, (name, call) in enumerate(sites):
        values = state(model, name, call, clean)
        for token in range(clean.shape[1]):
            with interchange(model, name, call, token, values[:, token]):
                logits = model(corrupted)[:, -1]
            share[i, token] = (logits.argmax(-1) == answer).double().mean()
            rise[i, token] = probability(logits) - before
    return share, rise


# ---------------------------------------------------------------------------------------------------------------------
# When it is written
# ---------------------------------------------------------------------------------------------------------------------

def span(*vectors: Tensor) -> Tensor:
    """Orthonormal basis [batch, d, k] of the span of k vectors [batch, d] each."""
    return torch.linalg.qr(torch.stack(vectors, -1)).Q


@torch.no_grad()
def held_answers(model: nn.Module, at: Site, u: Tensor, r: Tensor, probes: Probes, name: str, call: int, token: int,
                 basis: Tensor, chunk: int = 512) -> Tensor:
    """As `answers`, the edit acting at every call, while the state (name, call, token) keeps in the span of basis [m, d, k]
    what it holds without the edit: our reading of the held answer subspace of [1]."""
    parts = []
    for i, tokens, B in zip(probes.edit.split(chunk), probes.tokens.split(chunk), basis.split(chunk)):
        before = state(model, name, call, tokens)[:, token]
        with rank_one(at.layer, u[i], r[i]), interchange(model, name, call, token, before, B):
            parts.append(model(tokens)[:, -1].argmax(-1))
    return torch.cat(parts) if parts else probes.answer
