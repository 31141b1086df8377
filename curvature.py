"""curvature.py: memorized and shared structure sit at different ends of the curvature spectrum.

The curvature of the loss in the weights W [d_out, d_in] of a linear layer is, approximately, a Kronecker product of the
second moments of its inputs a and of the gradients g at its outputs (K-FAC [2]):

    A = E[a a^T] = U_A diag(mu) U_A^T        G = E[g g^T] = U_G diag(lambda) U_G^T        Fisher block ~ G (x) A

Directions that many inputs share have much curvature, those of single memorized examples little. The edit of [1]
rotates W into both eigenbases and keeps the pairs of directions that hold a share `keep` of the curvature mass:

    C = U_G^T W U_A        mass_ij = lambda_i mu_j        W' = U_G (C * M) U_A^T

M is 1 on the pairs of most mass until their sum reaches keep * sum(lambda) * sum(mu), the crossing pair included; how
large C_ij is plays no part. EK-FAC [3] puts the means of (u_i^T g)^2 (v_j^T a)^2, measured in the same basis, with
u_i, v_j columns of U_G, U_A, in the place of lambda_i mu_j.

    >>> A, G = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([3., 1.], [2., 1.]))
    >>> keep_mask(A, G, 0.75)                  # eigenvalues ascending: masses [[1, 3], [2, 6]], 6 + 3 = 0.75 * 12
    tensor([[False,  True],
            [False,  True]])
    >>> ablate(torch.tensor([[1., 2.], [3., 4.]]), A, G, 0.75)                   # 3 belongs to the first input
    tensor([[1., 0.],
            [3., 0.]])

A [d_in, d_in] and G [d_out, d_out] are uncentred second moments, or `eigen` of them, so that a sweep decomposes once;
masses and mask [d_out, d_in] are in the eigenbasis, eigenvalues ascending. A **position** is a row that an `nn.Linear`
is handed: a token, anew in each call of a loop. Any model called as `model(inputs) -> logits [..., classes]` will do;
only `ablated` changes it. Left out: biases, convolutions, K-FAC-reduce, dropout, batch statistics (`model.eval()`).

[1] Merullo et al. 2025, From Memorization to Reasoning in the Spectrum of Loss Curvature, arXiv 2510.24256.
[2] Martens & Grosse 2015, arXiv 1503.05671; "expand" to several positions: Eschenhagen et al. 2023, arXiv 2311.00636.
[3] George et al. 2018, EK-FAC, arXiv 1806.03884.          [4] Sakarvadia et al. 2024, BalancedSubnet, arXiv 2410.02159.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

# --- Factors ----------------------------------------------------------------------------------------------------------
def linear(model: nn.Module, name: str) -> nn.Linear:
    """The layer of that name; ValueError for an unknown name, TypeError for a module of another kind."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(modules.get(name), nn.Linear):
        names = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
        raise [ValueError, TypeError][name in modules](f"{name!r} is no nn.Linear of the model; such are {names[:8]}")
    return modules[name]

@contextmanager
def evaluation_mode(model: nn.Module):
    """Inside, no dropout, no running statistics, and gradients can be taken; after, every module has its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.enable_grad():
            yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode

def counted(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and targets [N], both flattened, without those whose target is -100."""
    if logits.shape[:-1].numel() != targets.numel():
        raise ValueError(f"logits {list(logits.shape)} must have one row for each of the targets {list(targets.shape)}")
    counts = targets.flatten() != -100
    return logits.reshape(len(counts), -1)[counts], targets.flatten()[counts]

def position_pairs(model: nn.Module, inputs, targets: Tensor, loss, layers: list[str], labels: str,
                   generator: torch.Generator | None, positions: str) -> list[tuple[str, Tensor, Tensor]]:
    """(name, a [n, d_in], g [n, d_out]) of each call of each layer, for one batch: see `kronecker_factors`."""
    calls = []
    def watch(name, _, arguments, output):                   # g is the gradient at a zero that is added to the output
        zero = torch.zeros_like(output, requires_grad=True)
        calls.append((name, arguments[0].detach().clone(), zero))                # the model may overwrite its input
        return output + zero
    with ExitStack() as undo:
        for name in layers:
            undo.enter_context(linear(model, name).register_forward_hook(partial(watch, name)))
        output = model(inputs)
    logits, gold = counted(output, targets)
    probability, gradients = logits.detach().softmax(-1), [torch.zeros_like(zero) for _, _, zero in calls]
    if not probability.isfinite().all():
        raise ValueError("the logits are not finite; look for inf or nan in the weights and inputs of the model")
    if calls and len(logits):
        if labels == "sampled":
            probability = probability.to(generator.device if generator else logits.device)
            gold = torch.multinomial(probability, 1, generator=generator)[:, 0].to(logits.device)
        value = len(logits) * loss(logits, gold)             # loss = 1/N sum_n loss_n, and g is the gradient of the sum
        gradients = torch.autograd.grad(value, [zero for _, _, zero in calls], materialize_grads=True)
    counts = (targets != -100).view(output.shape[:-1]) if positions == "counted" else slice(None)
    return [(name, a[counts].flatten(0, -2), g[counts].flatten(0, -2)) for (name, a, _), g in zip(calls, gradients)]

def kronecker_factors(model: nn.Module, batches, loss, layers, labels="sampled", generator=None, dtype=None,
                      positions="all", block=8192, statistics=lambda name, a, g: (a.T @ a, g.T @ g)) -> dict:
    """{name: (A, G)} of nn.Linear layers by name: means over positions of a a^T [d_in, d_in] and g g^T [d_out, d_out].
    batches: pairs (inputs, targets). The logits are flattened to [N, classes], targets of -100 dropped, and
    loss(logits, targets) is a mean over the N that are left; g is the gradient of their sum. labels: "sampled" by
    `generator` from softmax(logits) (the true Fisher), or "gold", the targets themselves (the empirical Fisher).
    positions: "all" rows that the layer is handed, at every call (K-FAC-expand [2]), g = 0 where no loss depends on
    one; or "counted", those alone whose own target counts (that of a whole example for all its rows). `statistics` are
    summed over blocks, in `dtype` (the model's, float32 at least). ValueError on bad input, TypeError on bad names."""
    if labels not in ("sampled", "gold") or positions not in ("all", "counted"):
        raise ValueError(f"labels are 'sampled' or 'gold', positions 'all' or 'counted'; got {labels!r}, {positions!r}")
    if isinstance(layers, str) or not (layers := list(layers)):
        raise TypeError(f"layers must be a list of one or more names of nn.Linear layers, got {layers!r}")
    total, n, n_counted = {}, dict.fromkeys(layers, 0), 0
    with evaluation_mode(model):
        for inputs, targets in batches:
            n_counted += int((targets != -100).sum())
            for name, *pair in position_pairs(model, inputs, targets, loss, list(n), labels, generator, positions):
                wide = dtype or torch.promote_types(pair[0].dtype, torch.float32)
                for a, g in zip(*(x.split(block) for x in pair)):
                    sums = statistics(name, a.to(wide), g.to(wide))
                    total[name] = tuple(x.add_(y) for x, y in zip(total[name], sums)) if name in total else sums
                n[name] += len(pair[0])
    if not n_counted:
        raise ValueError("no batch has a target that counts (not -100); pass a list: an iterator may have been used up")
    for name in n:
        if not n[name]:
            raise ValueError(f"the layer {name!r} is never called on these batches; leave it out")
        if not all(x.isfinite().all() for x in total[name]):
            raise ValueError(f"inputs or gradients of {name!r} are not finite or overflow {total[name][0].dtype}")
    return {name: tuple(x / n[name] for x in total[name]) for name in n}

def corrected_masses(model: nn.Module, batches, loss, factors: dict, **options) -> dict[str, Tensor]:
    """{name: masses [d_out, d_in]}: means over positions of (U_G^T g)^2 (x) (U_A^T a)^2, for lambda_i mu_j: EK-FAC [3].
    A second pass, with the `factors` {name: (A, G)} of the first; the options are those of `kronecker_factors`."""
    factors = {name: (eigen(A), eigen(G)) for name, (A, G) in factors.items()}
    def squares(name, a, g):
        A, G = factors[name]
        return (g @ G.vectors.to(g)).square().T @ (a @ A.vectors.to(a)).square(),
    found = kronecker_factors(model, batches, loss, factors, statistics=squares, **options)
    return {name: masses for name, (masses,) in found.items()}

# --- The edit: float64 inside, the result in the dtype of the weights -------------------------------------------------
class Eigen(NamedTuple):
    values: Tensor                      # [d] ascending, none negative
    vectors: Tensor                     # [d, d] in columns

def double(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its device has none (MPS)."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)

def eigen(factor: Tensor | Eigen) -> Eigen:
    """The eigendecomposition of A or G, in float64. ValueError where it is no second moment or all zeros."""
    if isinstance(factor, Eigen):
        return factor
    M = double(factor)
    if M.dim() != 2 or M.shape[0] != M.shape[1] or not M.isfinite().all():
        raise ValueError(f"a factor must be finite and [d, d], got shape {list(M.shape)}")
    values, vectors = torch.linalg.eigh(M)
    slack = 1e-3 * M.abs().max()                             # float32 sums are rounded
    if not slack > 0 or (M - M.T).abs().max() > slack or values[0] < -slack:
        raise ValueError(f"a factor must be symmetric, with no negative eigenvalue, and not zero; these are "
                         f"{values[0]:.3g}..{values[-1]:.3g}: leave out a layer that is dead or has no gradient")
    return Eigen(values.clamp(min=0), vectors)

def mask_of(chosen: Tensor, like: Tensor) -> Tensor:
    """bool, in the shape of `like`: True at the flat indices `chosen`."""
    return torch.zeros_like(like, dtype=torch.bool).flatten().index_fill_(0, chosen, True).view(like.shape)

def keep_mask(A: Tensor | Eigen, G: Tensor | Eigen, keep: float, masses: Tensor | None = None) -> Tensor:
    """M, bool [d_out, d_in]: the pairs of most mass, lambda_i mu_j [1] or `masses`, as many as it takes to reach the
    share `keep` in (0, 1] of the sum, the crossing one included; 1 keeps every pair, those of zero mass too."""
    plain = torch.outer(eigen(G).values, eigen(A).values)
    masses = plain if masses is None else double(masses)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share of the curvature mass in (0, 1], got {keep}")
    if masses.shape != plain.shape or not masses.isfinite().all() or (masses < 0).any() or not masses.any():
        raise ValueError(f"masses must be finite, not negative, not zero, {[*plain.shape]}; they are {[*masses.shape]}")
    values, order = masses.flatten().sort(descending=True, stable=True)
    reached = values.cumsum(0)
    enough = keep * reached[-1] * (1 - 1e-12)                # not for rounding to decide: 3 of 10 equal masses are 0.3
    return mask_of(order[:len(order) if keep == 1 else int((reached < enough).sum()) + 1], masses)

def project(W: Tensor, A: Eigen, G: Eigen, mask: Tensor) -> Tensor:
    """U_G ((U_G^T W U_A) * M) U_A^T, in the dtype and on the device of W."""
    if W.shape != (shape := (len(G.vectors), len(A.vectors))) or not W.isfinite().all():
        raise ValueError(f"W must be finite and {list(shape)} to fit G and A, got {list(W.shape)}")
    C = G.vectors.T @ double(W) @ A.vectors
    return (G.vectors @ (C * mask) @ A.vectors.T).to(W)

def ablate(W: Tensor, A: Tensor | Eigen, G: Tensor | Eigen, keep: float, masses: Tensor | None = None) -> Tensor:
    """W' = U_G (C * M) U_A^T [d_out, d_in], C = U_G^T W U_A, M = keep_mask(A, G, keep, masses): the edit of [1]; keep 1
    returns W up to rounding. ValueError on what does not fit, is not finite or all zero, and on keep outside (0, 1]."""
    A, G = eigen(A), eigen(G)
    return project(W, A, G, keep_mask(A, G, keep, masses))

@contextmanager
def ablated(model: nn.Module, weights: dict[str, Tensor]):
    """`with ablated(model, {"memory.values": W2}):` these weights inside, after it bit for bit the old ones."""
    old = {name: linear(model, name).weight.detach().clone() for name in weights}
    for name, W in weights.items():
        if W.shape != old[name].shape or not W.isfinite().all():
            raise ValueError(f"the weight of {name!r} must be finite, {list(old[name].shape)}; got {list(W.shape)}")
    write = lambda new: [linear(model, name).weight.data.copy_(W) for name, W in new.items()]
    try:
        write(weights)
        yield model
    finally:
        write(old)

def band_shares(X: Tensor, A: Tensor | Eigen, n_bands: int) -> Tensor:
    """|U_band^T x| / |x| for inputs X [..., d_in] -> [..., n_bands]: how much of x, whatever its length, lies in each
    band of A's eigenvectors, those of the largest eigenvalues first. The squares add up to 1 (to 0 for x = 0)."""
    U = eigen(A).vectors.flip(1)
    bands = torch.stack([part.norm(dim=-1) for part in (double(X) @ U).tensor_split(n_bands, -1)], -1)
    return bands / double(X).norm(dim=-1, keepdim=True).clamp(min=1e-300)

# --- Controls: as many components, or as large a change, chosen in another way ----------------------------------------
def random_orthogonal(d: int, generator: torch.Generator | None = None) -> Tensor:
    """[d, d], uniform over rotations and reflections: Q of a Gaussian matrix Q R, the diagonal of R made positive."""
    empty = torch.empty(d, d, dtype=torch.float64, device=generator.device if generator else None)
    return nn.init.orthogonal_(empty, generator=generator)

def control(name: str, W: Tensor, A: Tensor | Eigen, G: Tensor | Eigen, kept: int | None = None,
            generator: torch.Generator | None = None, removed: float | None = None) -> Tensor:
    """W' [d_out, d_in] with `kept` components of W, or as few as leave |W - W'| <= removed |W|. The components are the
    entries of U^T W V; those of the highest scores are kept:
        kfac, random             U_G, U_A by lambda_i mu_j; two random bases from `generator` with the same scores
        activations, gradients   I, U_A by mu_j (G = I); U_G, I by lambda_i (A = I)
        svd, magnitude           singular vectors by singular values, min(d_out, d_in) in all; I, I by |W_ij|"""
    A, G = eigen(A), eigen(G)
    identity = lambda M: Eigen(torch.ones_like(M.values), torch.eye(len(M.values)).to(M.vectors))
    random = lambda M: Eigen(M.values, random_orthogonal(len(M.values), generator).to(M.vectors))
    n = min(W.shape) if name == "svd" else W.numel()
    if (kept is None) == (removed is None) or not 0 <= (kept or 0) <= n or not 0 <= (removed or 0) < 1:
        raise ValueError(f"pass either kept in 0..{n} for {name!r}, or removed in [0, 1); got {kept} and {removed}")
    match name:
        case "kfac": pass
        case "random": G, A = random(G), random(A)
        case "activations": G = identity(G)
        case "gradients": A = identity(A)
        case "magnitude": G, A = identity(G), identity(A)
        case "svd":
            U, S, Vh = torch.linalg.svd(double(W), full_matrices=False)
            G, A = Eigen(S, U), Eigen(S, Vh.T)
        case _: raise ValueError(f"no control {name!r}; use kfac, random, activations, gradients, svd or magnitude")
    scores = double(W).abs() if name == "magnitude" else torch.outer(G.values, A.values)
    scores = scores.diag().diag() if name == "svd" else scores                   # s_i^2 u_i v_i^T
    order = scores.flatten().argsort(descending=True, stable=True)
    if kept is None:                                         # |W - W'|^2 without the last, the last two, ... components
        lost = (G.vectors.T @ double(W) @ A.vectors).square().flatten()[order].flip(0).cumsum(0)
        kept = len(order) - int((lost <= (removed + 1e-12) ** 2 * lost[-1]).sum())
    return project(W, A, G, mask_of(order[:kept], scores))

def learned_mask(model: nn.Module, forget, others, loss, layers, share: float, steps=200, lr=0.02, weight=1.0) -> dict:
    """{name: W' [d_out, d_in]} with the share in (0, 1] of each layer's weights of highest learned scores s, top(s).
    Adam minimises loss(others) - weight * loss(forget) with weights W * top(s), from s = |W| / max |W|; the gradient
    takes top(s) for s. forget, others: lists of batches, one of each per step. After BalancedSubnet [4], not it."""
    if not 0 < share <= 1 or not forget or not others:
        raise ValueError(f"share must be in (0, 1], both lists not empty; got {share}, {len(forget)}, {len(others)}")
    weights = {name: linear(model, name).weight.detach() for name in layers}
    scores = {name: (W.abs() / W.abs().max().clamp(min=1e-30)).requires_grad_() for name, W in weights.items()}
    top = lambda s: mask_of(s.detach().flatten().argsort(descending=True)[:round(share * s.numel())], s).to(s)
    optimizer = torch.optim.Adam(scores.values(), lr=lr)
    def loss_on(inputs, targets):
        masked = {f"{name}.weight".lstrip("."): weights[name] * (top(s) + s - s.detach()) for name, s in scores.items()}
        return loss(*counted(torch.func.functional_call(model, masked, (inputs,)), targets))
    with evaluation_mode(model):
        for step in range(steps):
            value = loss_on(*others[step % len(others)]) - weight * loss_on(*forget[step % len(forget)])
            if not value.isfinite():
                raise ValueError(f"the loss is {value:.3g} at step {step}; does each batch have a target that counts?")
            for s, gradient in zip(scores.values(), torch.autograd.grad(value, list(scores.values()))):
                s.grad = gradient
            optimizer.step()
    return {name: weights[name] * top(s) for name, s in scores.items()}

# --- The study: what is lost when components are; `measure(model)` returns {name: share of right answers} -------------
KEEPING = ("kfac", "ekfac")             # have a share to keep; the others, controls, a share of the norm to remove
CONTROLS = ("svd", "random", "activations", "gradients", "magnitude")

def outcome(model: nn.Module, measure, weights: dict[str, Tensor], **label) -> dict:
    """The label, `measure` of the model with these weights, and `removed`: |W - W'| / |W| over all of them."""
    W = {name: linear(model, name).weight.detach() for name in weights}
    norm = lambda parts: float(sum(double(x).square().sum() for x in parts)) ** 0.5
    label["removed"] = norm(W[name] - weights[name] for name in W) / norm(W.values()) if W else 0.0
    with ablated(model, weights):
        return label | measure(model)

def edited(model: nn.Module, method: str, factors: dict, layers, strength: float, masses: dict, generator=None) -> dict:
    """{name: W'}: `ablate` with keep = strength (by `masses` "ekfac"), or a `control` with |W - W'| = strength |W|."""
    W = {name: linear(model, name).weight.detach() for name in layers}
    if method in KEEPING:
        return {n: ablate(W[n], *factors[n], strength, masses[n] if method == "ekfac" else None) for n in W}
    return {n: control(method, W[n], *factors[n], removed=strength, generator=generator) for n in W}

def search(model: nn.Module, value, options: dict[str, dict], rounds: int = 2) -> tuple[dict, dict[str, Tensor]]:
    """({group: strength}, {name: W'}) by coordinate ascent on value(model): one group of layers after another takes its
    best strength with the others. options: {group: {strength: {name: W'}}}; None leaves a group alone, but not all."""
    together = lambda at: {n: W for group, s in at.items() if s is not None for n, W in options[group][s].items()}
    def worth(at):
        with ablated(model, together(at)):
            return value(model) if together(at) else float("-inf")
    chosen = dict.fromkeys(options)
    for group in [*options] * rounds:
        chosen = max([chosen | {group: strength} for strength in (None, *options[group])], key=worth)
    return chosen, together(chosen)

def compare(model: nn.Module, measure, value, factors: dict, masses: dict, groups: dict[str, list[str]], keeps, removed,
            generator: torch.Generator, controls=CONTROLS) -> tuple[dict, dict[str, Tensor], list[dict]]:
    """Every method at the strengths that `search` finds for it, `keeps` or shares `removed` of the norm; then controls
    in the layers of the better of kfac and ekfac with as many components in each ("parts"; not svd, which has too few)
    or as large a change ("norm"). Returns the better one, its {name: W'}, and all outcomes, the first one before."""
    scored = lambda model: {"value": value(model)} | measure(model)
    entries, found = [outcome(model, scored, {}, method="before")], {}
    for method in (*KEEPING, *controls):
        options = {group: {s: edited(model, method, factors, layers, s, masses, generator)
                           for s in (keeps if method in KEEPING else removed)} for group, layers in groups.items()}
        chosen, found[method] = search(model, value, options)
        entries.append(outcome(model, scored, found[method], method=method, matched="own", strengths=chosen))
    best = max(entries[1:1 + len(KEEPING)], key=lambda e: e["value"])
    weights, by = found[best["method"]], masses if best["method"] == "ekfac" else dict.fromkeys(masses)
    W = {name: linear(model, name).weight.detach() for name in weights}
    keep = {name: best["strengths"][group] for group in groups for name in groups[group]}
    same = {"parts": {n: {"kept": int(keep_mask(*factors[n], keep[n], by[n]).sum())} for n in W},
            "norm": {n: {"removed": min(0.999, ((W[n] - weights[n]).norm() / W[n].norm()).item())} for n in W}}
    for matched, method in [(m, name) for m in same for name in controls if (m, name) != ("parts", "svd")]:
        new = {n: control(method, W[n], *factors[n], generator=generator, **same[matched][n]) for n in W}
        entries.append(outcome(model, scored, new, method=method, matched=matched))
    return best, weights, entries
