"""Controls for an ablation by curvature: as many components, or as large a change, by other rules.

    kfac, random             U_G, U_A by lambda_i mu_j; two random bases with the same scores
    activations, gradients   I, U_A by mu_j (G = I); U_G, I by lambda_i (A = I)
    svd, magnitude           singular vectors by singular values; I, I by |W_ij|
    learned                  a mask of weights learned on examples, after BalancedSubnet [1], not it

and the comparison of all of them with K-FAC and EK-FAC, each at strengths of its own choice, and at
the strength of the better of the two.

[1] Sakarvadia et al. 2024, Mitigating Memorization in Language Models, arXiv 2410.02159.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvature import (
    Eigen,
    Spectrum,
    ablate,
    ablated,
    counted,
    double,
    eigen,
    evaluation_mode,
    keep_mask,
    layer_of,
    mask_of,
    project,
)
from minedit import share_of

# kfac and ekfac have a share of mass to keep, the others a share of the norm to remove
KEEPING = ("kfac", "ekfac")
CONTROLS = ("svd", "random", "activations", "gradients", "magnitude")


def random_orthogonal(d: int, generator: torch.Generator | None = None) -> Tensor:
    """[d, d], float64, uniform over rotations and reflections: Q of a Gaussian matrix Q R, the
    diagonal of R made positive."""
    device = generator.device if generator else None
    empty = torch.empty(d, d, dtype=torch.float64, device=device)
    return nn.init.orthogonal_(empty, generator=generator)


def without(factor: Eigen) -> Eigen:
    """The basis of the coordinates, all directions alike."""
    values = torch.ones_like(factor.values)
    return Eigen(values, torch.eye(len(values)).to(factor.vectors))


def randomized(factor: Eigen, generator: torch.Generator | None) -> Eigen:
    """The same eigenvalues in a random basis."""
    basis = random_orthogonal(len(factor.values), generator)
    return Eigen(factor.values, basis.to(factor.vectors))


def scored_bases(
    name: str, W: Tensor, A: Eigen, G: Eigen, generator: torch.Generator | None
) -> tuple[Eigen, Eigen, Tensor]:
    """The bases of a control, of the inputs and of the outputs, and the scores [d_out, d_in] of the
    components of W in them: the highest are kept."""
    if name == "svd":
        U, S, Vh = torch.linalg.svd(double(W), full_matrices=False)
        return Eigen(S, Vh.T), Eigen(S, U), S.square().diag()  # s_i^2 of u_i v_i^T, 0 of others
    if name == "magnitude":
        return without(A), without(G), double(W).abs()
    if name == "random":
        G = randomized(G, generator)
        A = randomized(A, generator)
    elif name == "activations":
        G = without(G)
    elif name == "gradients":
        A = without(A)
    elif name != "kfac":
        raise ValueError(
            f"no control {name!r}; use kfac, random, activations, gradients, svd or magnitude"
        )
    return A, G, torch.outer(G.values, A.values)


def control(
    name: str,
    W: Tensor,
    A: Tensor | Eigen,
    G: Tensor | Eigen,
    kept: int | None = None,
    generator: torch.Generator | None = None,
    removed: float | None = None,
) -> Tensor:
    """W' [d_out, d_in] with `kept` components of W, or as few as leave |W - W'| <= removed |W|; the
    names are those of the module's docstring. ValueError for both or neither, or out of range."""
    A, G, scores = scored_bases(name, W, eigen(A), eigen(G), generator)
    order = scores.flatten().argsort(descending=True, stable=True)
    n = min(W.shape) if name == "svd" else W.numel()
    if kept is None and removed is not None and 0 <= removed < 1:
        kept = n_within(removed, G.vectors.T @ double(W) @ A.vectors, order)
    elif kept is None or removed is not None or not 0 <= kept <= n:
        raise ValueError(
            f"pass either kept in 0..{n} for {name!r}, or removed in [0, 1); "
            f"got {kept} and {removed}"
        )
    return project(W, A, G, mask_of(order[:kept], scores))


def n_within(removed: float, B: Tensor, order: Tensor) -> int:
    """How few of the entries of B, the first in `order`, leave |W - W'| <= removed |W|."""
    last_first = B.square().flatten()[order].flip(0)
    lost = last_first.cumsum(0)  # |W - W'|^2 without the last 1, 2, ... of them
    allowed = (removed + 1e-12) ** 2 * lost[-1]
    return len(order) - int((lost <= allowed).sum())


def learned_mask(
    model: nn.Module,
    forget: list,
    others: list,
    loss,
    layers,
    share: float,
    steps: int = 200,
    lr: float = 0.02,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """{name: W' [d_out, d_in]} with the share in (0, 1] of each layer's weights of highest learned
    scores s, top(s). Adam minimises loss(others) - weight * loss(forget) with weights W * top(s),
    from s = |W| / max |W|; the gradient takes top(s) for s. forget, others: lists of batches."""
    if not 0 < share <= 1 or not forget or not others:
        raise ValueError(
            "share must be in (0, 1], both lists not empty; "
            f"got {share}, {len(forget)}, {len(others)}"
        )
    weights = {name: layer_of(model, name).matrix.detach() for name in layers}
    scores = {}
    for name, W in weights.items():
        largest = W.abs().max().clamp(min=1e-30)
        scores[name] = (W.abs() / largest).requires_grad_()
    optimizer = torch.optim.Adam(scores.values(), lr=lr)

    def loss_on(inputs, targets) -> Tensor:
        masked = {}
        for name, s in scores.items():
            passing = top(s, share) + s - s.detach()  # the value of top(s), the gradient of s
            masked[f"{name}.weight".lstrip(".")] = weights[name] * passing
        logits = torch.func.functional_call(model, masked, (inputs,))
        return loss(*counted(logits, targets))

    with evaluation_mode(model), torch.enable_grad():
        for step in range(steps):
            value = loss_on(*others[step % len(others)])
            value = value - weight * loss_on(*forget[step % len(forget)])
            if not value.isfinite():
                raise ValueError(
                    f"the loss is {value:.3g} at step {step}; does each batch have a target that "
                    "counts?"
                )
            gradients = torch.autograd.grad(value, list(scores.values()))
            for s, gradient in zip(scores.values(), gradients):
                s.grad = gradient
            optimizer.step()
    return {name: weights[name] * top(s, share) for name, s in scores.items()}


def top(s: Tensor, share: float) -> Tensor:
    """1 at the share of entries of s that are largest, else 0."""
    order = s.detach().flatten().argsort(descending=True)
    return mask_of(order[: round(share * s.numel())], s).to(s)


# --- The comparison -------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What is left of a model with other weights."""

    method: str
    matched: str | None  # how its strength was set: "own" choice, "parts", "norm", "alike 0.9"
    removed: float  # |W - W'| / |W|, over all layers that are changed
    shares: dict[str, float | None]  # of right answers, by kind of question
    strengths: dict | None = None  # {group of layers: strength}
    value: float | None = None  # by which strengths are chosen
    keep: float | None = None

    def entry(self) -> dict:
        found = {"method": self.method, "removed": self.removed}
        for name in ("matched", "strengths", "value", "keep"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found | self.shares


def shares_of(sets: dict, answers: Tensor, rows) -> dict[str, float | None]:
    """Of right answers to the questions `rows`, in each of the sets {name: (mask, right answers)}
    of all questions."""
    found = {}
    for name, (mask, right) in sets.items():
        found[name] = share_of((answers == right[rows])[mask[rows]])
    return found


def norm_of(matrices) -> float:
    return float(sum(double(x).square().sum() for x in matrices)) ** 0.5


def change_of(model: nn.Module, name: str, W: Tensor) -> float:
    """|W - W'| / |W| of one layer, for new weights W'; below 1, as controls want it."""
    old = layer_of(model, name).matrix.detach()
    return min(0.999, ((old - W).norm() / old.norm()).item())


def outcome(
    model: nn.Module,
    measure: Callable,
    weights: dict[str, Tensor],
    method: str,
    matched: str | None = None,
    value: Callable | None = None,
    **more,
) -> Outcome:
    """measure(model) {name: share} and value(model) of the model with these weights."""
    removed = 0.0
    if weights:
        old = {name: layer_of(model, name).matrix.detach() for name in weights}
        removed = norm_of(old[name] - weights[name] for name in old) / norm_of(old.values())
    with ablated(model, weights):
        worth = value(model) if value else None
        return Outcome(method, matched, removed, measure(model), value=worth, **more)


def edited(
    model: nn.Module,
    method: str,
    spectrum: Spectrum,
    layers,
    strength: float,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """{name: W'}: by kfac or ekfac with keep = strength, by a control |W - W'| = strength |W|."""
    found = {}
    for name in layers:
        W, (A, G) = layer_of(model, name).matrix.detach(), spectrum.factors[name]
        if method == "kfac":
            found[name] = ablate(W, A, G, strength)
        elif method == "ekfac":
            found[name] = ablate(W, A, G, strength, spectrum.masses[name])
        else:
            found[name] = control(method, W, A, G, removed=strength, generator=generator)
    return found


def together(options: dict, chosen: dict) -> dict[str, Tensor]:
    """The weights {name: W'} of a choice {group: strength}, None: the group is left alone."""
    weights = {}
    for group, strength in chosen.items():
        if strength is not None:
            weights |= options[group][strength]
    return weights


def search(
    model: nn.Module, value: Callable, options: dict[str, dict], rounds: int = 2
) -> tuple[dict, dict[str, Tensor]]:
    """({group: strength}, {name: W'}) by coordinate ascent on value(model): one group of layers
    after another takes its best strength with the others. options: {group: {strength: {name: W'}}};
    None leaves a group alone, but not all of them."""
    chosen = dict.fromkeys(options)
    for _ in range(rounds):
        for group in options:
            best = float("-inf")
            candidates = [chosen | {group: strength} for strength in (None, *options[group])]
            for candidate in candidates:
                weights = together(options, candidate)
                if not weights:
                    continue
                with ablated(model, weights):
                    worth = value(model)
                if worth > best:
                    best, chosen = worth, candidate
    return chosen, together(options, chosen)


@dataclass
class Comparison:
    best: Outcome  # the better of kfac and ekfac
    weights: dict[str, Tensor]  # its weights
    outcomes: list[Outcome]  # all; the first is the model before


def compare(
    model: nn.Module,
    measure: Callable,
    value: Callable,
    spectrum: Spectrum,
    groups: dict[str, list[str]],
    keeps,
    removed,
    generator: torch.Generator,
    controls=CONTROLS,
) -> Comparison:
    """Every method at the strengths that `search` finds for it, `keeps` or shares `removed` of the
    norm; then controls in the layers of the better of kfac and ekfac with as many components in
    each ("parts"; not svd, which has too few) or as large a change ("norm")."""
    before = outcome(model, measure, {}, "before", value=value)
    own, weights_of = {}, {}
    for method in (*KEEPING, *controls):
        strengths = keeps if method in KEEPING else removed
        options = {}
        for group, layers in groups.items():
            options[group] = {
                s: edited(model, method, spectrum, layers, s, generator) for s in strengths
            }
        chosen, weights = search(model, value, options)
        weights_of[method] = weights
        own[method] = outcome(model, measure, weights, method, "own", value, strengths=chosen)
    best = max((own[method] for method in KEEPING), key=lambda o: o.value)
    weights = weights_of[best.method]
    outcomes = [before, *own.values()]
    for kind, settings in matching(model, best, weights, spectrum, groups).items():
        for name in controls:
            if (kind, name) == ("parts", "svd"):
                continue
            new = {}
            for layer, setting in settings.items():
                W = layer_of(model, layer).matrix.detach()
                A, G = spectrum.factors[layer]
                new[layer] = control(name, W, A, G, generator=generator, **setting)
            outcomes.append(outcome(model, measure, new, name, kind, value))
    return Comparison(best, weights, outcomes)


def matching(
    model: nn.Module,
    best: Outcome,
    weights: dict[str, Tensor],
    spectrum: Spectrum,
    groups: dict[str, list[str]],
) -> dict[str, dict[str, dict]]:
    """{"parts" or "norm": {layer: what `control` is to match}} of the better method's weights."""
    found = {"parts": {}, "norm": {}}
    for group, layers in groups.items():
        for name in layers:
            if name not in weights:
                continue
            masses = spectrum.masses[name] if best.method == "ekfac" else None
            mask = keep_mask(*spectrum.factors[name], best.strengths[group], masses)
            found["parts"][name] = {"kept": int(mask.sum())}
            found["norm"][name] = {"removed": change_of(model, name, weights[name])}
    return found
