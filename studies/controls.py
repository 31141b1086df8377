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


class Components:
    """W as a sum of components, the entries of G.vectors^T W A.vectors, in the order in which a
    control would keep them."""

    def __init__(self, name: str, W: Tensor, A: Eigen, G: Eigen, generator: torch.Generator | None):
        self.W, self.n = W, W.numel()
        if name == "random":
            G = randomized(G, generator)
            A = randomized(A, generator)
        elif name == "activations":
            G = without(G)
        elif name == "gradients":
            A = without(A)
        elif name == "magnitude":
            G, A = without(G), without(A)
        elif name == "svd":
            U, S, Vh = torch.linalg.svd(double(W), full_matrices=False)
            G, A = Eigen(S, U), Eigen(S, Vh.T)
            self.n = min(W.shape)
        elif name != "kfac":
            raise ValueError(
                f"no control {name!r}; use kfac, random, activations, gradients, svd or magnitude"
            )
        scores = torch.outer(G.values, A.values)
        if name == "magnitude":
            scores = double(W).abs()
        if name == "svd":
            scores = scores.diag().diag()  # s_i^2 of u_i v_i^T, 0 of the others
        self.A, self.G, self.scores = A, G, scores
        self.order = scores.flatten().argsort(descending=True, stable=True)

    def keep(self, n_kept: int) -> Tensor:
        """W' [d_out, d_in] of the first n_kept components."""
        return project(self.W, self.A, self.G, mask_of(self.order[:n_kept], self.scores))

    def fewest(self, removed: float) -> int:
        """How few components leave |W - W'| <= removed |W|."""
        C = self.G.vectors.T @ double(self.W) @ self.A.vectors
        lost = C.square().flatten()[self.order].flip(0).cumsum(0)  # without the last 1, 2, ... ones
        allowed = (removed + 1e-12) ** 2 * lost[-1]
        return len(self.order) - int((lost <= allowed).sum())


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
    components = Components(name, W, eigen(A), eigen(G), generator)
    if kept is not None and removed is None and 0 <= kept <= components.n:
        return components.keep(kept)
    if kept is None and removed is not None and 0 <= removed < 1:
        return components.keep(components.fewest(removed))
    raise ValueError(
        f"pass either kept in 0..{components.n} for {name!r}, or removed in [0, 1); "
        f"got {kept} and {removed}"
    )


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

    with evaluation_mode(model):
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


def norm_of(matrices) -> float:
    return float(sum(double(x).square().sum() for x in matrices)) ** 0.5


def outcome(
    model: nn.Module,
    measure: Callable,
    weights: dict[str, Tensor],
    method: str,
    matched: str | None = None,
    **more,
) -> Outcome:
    """`measure(model)` {name: share} of the model with these weights."""
    removed = 0.0
    if weights:
        old = {name: layer_of(model, name).matrix.detach() for name in weights}
        removed = norm_of(old[name] - weights[name] for name in old) / norm_of(old.values())
    with ablated(model, weights):
        return Outcome(method, matched, removed, measure(model), **more)


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
    outcomes: list[Outcome]  # all, the first one before


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
    outcomes = [outcome(model, measure, {}, "before", value=value(model))]
    weights_of = {}
    for method in (*KEEPING, *controls):
        options = {}
        for group, layers in groups.items():
            strengths = keeps if method in KEEPING else removed
            options[group] = {
                s: edited(model, method, spectrum, layers, s, generator) for s in strengths
            }
        chosen, weights = search(model, value, options)
        weights_of[method] = weights
        with ablated(model, weights):
            worth = value(model)
        outcomes.append(
            outcome(model, measure, weights, method, "own", strengths=chosen, value=worth)
        )
    best = max(outcomes[1 : 1 + len(KEEPING)], key=lambda o: o.value)
    weights = weights_of[best.method]
    matched = matching(model, best, weights, spectrum, groups)
    for kind, settings in matched.items():
        for name in controls:
            if (kind, name) == ("parts", "svd"):
                continue
            new = {}
            for layer, setting in settings.items():
                W = layer_of(model, layer).matrix.detach()
                A, G = spectrum.factors[layer]
                new[layer] = control(name, W, A, G, generator=generator, **setting)
            with ablated(model, new):
                worth = value(model)
            outcomes.append(outcome(model, measure, new, name, kind, value=worth))
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
            W, (A, G) = layer_of(model, name).matrix.detach(), spectrum.factors[name]
            masses = spectrum.masses[name] if best.method == "ekfac" else None
            n_kept = int(keep_mask(A, G, best.strengths[group], masses).sum())
            change = ((W - weights[name]).norm() / W.norm()).item()
            found["parts"][name] = {"kept": n_kept}
            found["norm"][name] = {"removed": min(0.999, change)}
    return found
