"""curvature.py: memorized and shared structure sit at different ends of the curvature spectrum.

The curvature of the loss in the weights W [d_out, d_in] of a linear layer is, approximately, a
Kronecker product of the second moments of its inputs a and of the gradients g at its outputs
(K-FAC [2]):

    A = E[a a^T] = U_A diag(mu) U_A^T     G = E[g g^T] = U_G diag(lambda) U_G^T     Fisher ~ G (x) A

Directions that many inputs share have much curvature, those of single memorized examples little.
The edit of [1] rotates W into both eigenbases and keeps the pairs of directions that hold a share
`keep` of the curvature mass:

    B = U_G^T W U_A          mass_ij = lambda_i mu_j          W' = U_G (B * M) U_A^T

M is 1 on the pairs of most mass until their sum reaches keep * sum(lambda) * sum(mu), the crossing
pair included; how large B_ij is plays no part. (A is what edit.py calls C.) EK-FAC [3] puts the
exact diagonal of the Fisher in the same basis in the place of lambda_i mu_j: E (u_i^T D v_j)^2, D
the gradient of one example's loss in W.

    >>> A = torch.diag(torch.tensor([3.0, 1.0])).double()
    >>> G = torch.diag(torch.tensor([2.0, 1.0])).double()
    >>> keep_mask(A, G, 0.75)  # eigenvalues ascending: masses [[1, 3], [2, 6]], 6 + 3 = 0.75 * 12
    tensor([[False,  True],
            [False,  True]])
    >>> ablate(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), A, G, 0.75)  # 3 belongs to the first input
    tensor([[1., 0.],
            [3., 0.]])

A [d_in, d_in] and G [d_out, d_out] are uncentred second moments, or `eigen` of them, so that a
sweep decomposes once; masses and mask [d_out, d_in] are in the eigenbasis, eigenvalues ascending. A
**position** is a row that a linear layer is handed: a token, anew in each call of a loop. Any model
called as `model(inputs) -> logits [..., classes]` will do. Left out: biases, convolutions.

[1] Merullo et al. 2025, From Memorization to Reasoning, arXiv 2510.24256.
[2] Martens & Grosse 2015, arXiv 1503.05671; several positions: Eschenhagen et al. 2023, 2311.00636.
[3] George et al. 2018, EK-FAC, arXiv 1806.03884.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

# --- The edit: float64 inside, the result in the dtype of the weights -----------------------------


class Eigen(NamedTuple):
    """U diag(values) U^T, U the vectors; float64."""

    values: Tensor  # [d] ascending, none negative
    vectors: Tensor  # [d, d] in columns


def double(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its device has none (MPS)."""
    device = "cpu" if x.device.type == "mps" else x.device
    return x.detach().to(device, torch.float64)


def eigen(factor: Tensor | Eigen) -> Eigen:
    """The eigendecomposition of A or G, in float64. ValueError where it is no second moment."""
    if isinstance(factor, Eigen):
        return factor
    M = double(factor)
    if M.dim() != 2 or M.shape[0] != M.shape[1] or not M.isfinite().all():
        raise ValueError(f"a factor must be finite and [d, d], got shape {list(M.shape)}")
    values, vectors = torch.linalg.eigh(M)
    slack = 1e-3 * M.abs().max()  # float32 sums are rounded
    if slack == 0 or (M - M.T).abs().max() > slack or values[0] < -slack:
        found = f"its eigenvalues run from {values[0]:.3g} to {values[-1]:.3g}"
        raise ValueError(
            "a factor must be symmetric, not zero, with no negative eigenvalue (a dead layer's is "
            f"zero: leave it out); {found}"
        )
    return Eigen(values.clamp(min=0), vectors)


def keep_mask(
    A: Tensor | Eigen, G: Tensor | Eigen, keep: float, masses: Tensor | None = None
) -> Tensor:
    """M, bool [d_out, d_in]: the pairs of most mass, lambda_i mu_j [1] or `masses`, as many as it
    takes to reach the share `keep` in (0, 1] of the sum, the crossing one included; 1 keeps every
    pair, those of zero mass too."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share of the curvature mass in (0, 1], got {keep}")
    product = torch.outer(eigen(G).values, eigen(A).values)  # lambda_i mu_j
    masses = product if masses is None else double(masses).to(product.device)
    if masses.shape != product.shape:
        raise ValueError(f"masses must be {list(product.shape)}, got {list(masses.shape)}")
    if not masses.isfinite().all() or masses.min() < 0:
        raise ValueError("masses must be finite and not negative")
    if not masses.any():
        raise ValueError("masses must not all be zero")
    if keep == 1:
        return torch.ones_like(masses, dtype=torch.bool)
    values, order = masses.flatten().sort(descending=True, stable=True)
    reached = values.cumsum(0)
    enough = keep * reached[-1] * (1 - 1e-12)  # rounding must not decide: 3 of 10 equal are 0.3
    n_kept = int((reached < enough).sum()) + 1
    return mask_of(order[:n_kept], masses)


def mask_of(chosen: Tensor, like: Tensor) -> Tensor:
    """bool, in the shape of `like`: True at the flat indices `chosen`."""
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[chosen] = True
    return mask.view(like.shape)


def project(W: Tensor, A: Eigen, G: Eigen, mask: Tensor) -> Tensor:
    """U_G ((U_G^T W U_A) * M) U_A^T, in the dtype and on the device of W."""
    shape = (len(G.vectors), len(A.vectors))
    if W.shape != shape:
        raise ValueError(f"W must be {list(shape)} to fit G and A, got {list(W.shape)}")
    if not W.isfinite().all():
        raise ValueError("W holds a value that is not finite")
    B = G.vectors.T @ double(W) @ A.vectors
    return (G.vectors @ (B * mask) @ A.vectors.T).to(W)


def ablate(
    W: Tensor, A: Tensor | Eigen, G: Tensor | Eigen, keep: float, masses: Tensor | None = None
) -> Tensor:
    """W' = U_G (B * M) U_A^T [d_out, d_in], B = U_G^T W U_A, M = keep_mask(A, G, keep, masses): the
    edit of [1]; keep 1 returns W up to rounding. ValueError on what does not fit, is not finite or
    all zero, and on keep outside (0, 1]."""
    A, G = eigen(A), eigen(G)
    return project(W, A, G, keep_mask(A, G, keep, masses))


# --- Positions: the inputs of a layer, and the gradients at its outputs ---------------------------


def counted(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and targets [N], both flattened, without those whose target is -100."""
    if logits.shape[:-1].numel() != targets.numel():
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"logits must have one row for each of the targets, got {shapes}")
    counts = targets.flatten() != -100
    return logits.flatten(0, -2)[counts], targets.flatten()[counts]


class Call(NamedTuple):
    """What one call of a layer is handed in one batch, and the gradient at what it returns."""

    name: str
    a: Tensor  # [..., d_in]
    g: Tensor  # [..., d_out], of the sum of the losses; 0 where no loss depends on a position


class Recorded(NamedTuple):
    """All calls in one batch, in order."""

    calls: list[Call]
    counts: Tensor  # bool, in the shape of the logits without classes: targets that are not -100
    n_examples: int


@torch.enable_grad()
def record_batch(
    model: nn.Module,
    inputs,
    targets: Tensor,
    loss,
    layers: dict[str, nn.Module],
    labels: str,
    generator: torch.Generator | None,
) -> Recorded:
    """One forward and one backward pass: see `kronecker_factors`."""
    seen = []  # of each call, g: the zero that is added to its output

    def watch(name, _, arguments, keywords, output):
        if not torch.is_grad_enabled():
            raise ValueError(f"{name!r} runs under torch.no_grad: no gradient reaches it")
        zero = torch.zeros_like(output, requires_grad=True)  # g is the gradient at this zero
        a = (*arguments, *keywords.values())[0]
        seen.append(Call(name, a.detach().clone(), zero))  # the model may overwrite a
        return output + zero

    with ExitStack() as undo:
        for name, module in layers.items():
            hook = partial(watch, name)
            undo.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        output = logits_of(model(inputs))
    logits, gold = counted(output, targets)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not logits.detach().softmax(-1).isfinite().all():  # -inf, a class ruled out, is no harm
        raise ValueError("the logits are not finite; look for inf or nan in weights and inputs")
    zeros = [call.g for call in seen]
    gradients = [torch.zeros_like(zero) for zero in zeros]
    if seen and len(logits):
        if labels == "sampled":
            gold = sample_labels(logits, generator)
        total = len(logits) * loss(logits, gold)  # loss = 1/N sum_n loss_n, g is of the sum
        gradients = torch.autograd.grad(total, zeros, materialize_grads=True)
    calls = [call._replace(g=g) for call, g in zip(seen, gradients)]
    n_examples = min(len(targets), len(output))  # one of them may be flattened
    return Recorded(calls, (targets != -100).reshape(output.shape[:-1]), n_examples)


def sample_labels(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Labels [N] from softmax(logits) [N, classes]: with these G is that of the true Fisher."""
    device = logits.device if generator is None else generator.device
    probability = logits.detach().softmax(-1).to(device)
    return torch.multinomial(probability, 1, generator=generator)[:, 0].to(logits.device)


def record_all(
    model: nn.Module,
    batches,
    loss,
    names: list[str],
    labels: str,
    generator: torch.Generator | None,
) -> Iterator[Recorded]:
    """Every batch that is not empty, recorded in evaluation mode; errors of `kronecker_factors`."""
    if labels not in ("sampled", "gold"):
        raise ValueError(f"labels are 'sampled' or 'gold', got {labels!r}")
    check_gradients()
    layers = {name: layer_of(model, name).module for name in names}
    called, n_counted = set(), 0
    with evaluation_mode(model):
        for inputs, targets in batches:
            if not targets.numel():
                continue
            batch = record_batch(model, inputs, targets, loss, layers, labels, generator)
            called |= {call.name for call in batch.calls if call.a.numel()}
            n_counted += int(batch.counts.sum())
            yield batch
    if n_counted == 0:
        raise ValueError("no batch has a target that counts (not -100), or an iterator is used up")
    for name in names:
        if name not in called:
            raise ValueError(f"the layer {name!r} is never called on these batches; leave it out")


def layer_names(layers) -> list[str]:
    """TypeError unless these are names, one at least; without repetitions."""
    names = [] if isinstance(layers, str) else list(dict.fromkeys(layers))
    if not names:
        raise TypeError(f"layers must be a list of names of linear layers, got {layers!r}")
    return names


def check_finite(name: str, x: Tensor):
    if not x.isfinite().all():
        raise ValueError(f"inputs or gradients of {name!r} are not finite or overflow {x.dtype}")


# --- Factors and masses ---------------------------------------------------------------------------


def kronecker_factors(
    model: nn.Module,
    batches,
    loss,
    layers,
    labels: str = "sampled",
    generator: torch.Generator | None = None,
    *,
    positions: str = "all",
    dtype: torch.dtype | None = None,
    block: int = 8192,
) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (A, G)} of linear layers by name: A = E[a a^T] [d_in, d_in], G = E[g g^T] [d_out,
    d_out], means over positions (K-FAC [2], "expand").

    batches: pairs (inputs, targets); a target counts unless it is -100. loss(logits [N, classes],
    targets [N]) is the mean over the N that count; g is the gradient of their sum. labels:
    "sampled" by `generator` from softmax(logits) (the true Fisher), or "gold", the targets
    themselves (the empirical Fisher). positions: "all" that the layer is handed, in every call, or
    "counted", those alone whose own target counts; where there is one target for an example, it
    decides for all positions of the example. Sums are in `dtype` (the model's, float32 at least),
    `block` positions at a time. ValueError on bad input, TypeError on bad names."""
    if positions not in ("all", "counted"):
        raise ValueError(f"positions are 'all' or 'counted', got {positions!r}")
    names = layer_names(layers)
    A, G, n = {}, {}, dict.fromkeys(names, 0)  # sums, and over how many positions
    for batch in record_all(model, batches, loss, names, labels, generator):
        for call in batch.calls:
            a, g = rows_of(call, batch.counts if positions == "counted" else None)
            wide = dtype or torch.promote_types(a.dtype, torch.float32)
            n[call.name] += len(a)
            for part_a, part_g in zip(a.to(wide).split(block), g.to(wide).split(block)):
                with torch.autocast(a.device.type, enabled=False):
                    accumulate(A, call.name, part_a.T @ part_a)
                    accumulate(G, call.name, part_g.T @ part_g)
    for name in A:
        if not n[name]:
            raise ValueError(f"{name!r} is handed no position whose target counts; leave it out")
        check_finite(name, A[name])
        check_finite(name, G[name])
    return {name: (A[name] / n[name], G[name] / n[name]) for name in names}


def rows_of(call: Call, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """a [n, d_in] and g [n, d_out] of a call, at the positions that count; None: at all."""
    a, g = call.a, call.g
    if counts is not None:
        if a.shape[: counts.dim()] != counts.shape:
            raise ValueError(
                f"positions='counted' wants {call.name!r} to be handed {list(counts.shape)} rows, "
                f"as there are targets, got {list(a.shape)}"
            )
        a, g = a[counts], g[counts]
    return a.flatten(0, -2), g.flatten(0, -2)


def accumulate(sums: dict[str, Tensor], name: str, x: Tensor):
    """sums[name] += x, in place; the first x becomes the sum."""
    if name in sums:
        sums[name] += x
    else:
        sums[name] = x


def corrected_masses(
    model: nn.Module,
    batches,
    loss,
    factors: dict,
    labels: str = "sampled",
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """{name: masses [d_out, d_in]} of EK-FAC [3], to take the place of lambda_i mu_j: the mean over
    examples of (u_i^T D v_j)^2, D the gradient of the example's loss in W, u_i, v_j the bases of
    the `factors` {name: (A, G)}. An example is a row of the targets (of the logits, where targets
    are flattened); a layer is to be handed its positions example by example. A second pass over the
    batches; options and errors as of `kronecker_factors`."""
    names = layer_names(factors)
    bases = {name: (eigen(A), eigen(G)) for name, (A, G) in factors.items()}
    sums, n_examples = {}, 0
    for batch in record_all(model, batches, loss, names, labels, generator):
        n = batch.n_examples
        n_examples += n
        for name in names:
            calls = [call for call in batch.calls if call.name == name]
            if calls:
                accumulate(sums, name, summed_masses(calls, *bases[name], n, dtype))
    for name, mass in sums.items():
        check_finite(name, mass)
    return {name: sums[name] / n_examples for name in names}


def summed_masses(
    calls: list[Call], A: Eigen, G: Eigen, n: int, dtype: torch.dtype | None
) -> Tensor:
    """sum over n examples of (u_i^T D v_j)^2 [d_out, d_in], D = sum_s g_s a_s^T over the positions
    of the example in all `calls` of one layer."""
    in_A, in_G = [], []  # of each call [example, position, d]
    with torch.autocast(calls[0].a.device.type, enabled=False):
        for call in calls:
            a, g = by_example(call, n)
            wide = dtype or torch.promote_types(a.dtype, torch.float32)
            in_A.append(a.to(wide) @ A.vectors.to(a.device, wide))  # v_j^T a_s
            in_G.append(g.to(wide) @ G.vectors.to(g.device, wide))  # u_i^T g_s
        return squared_sums(torch.cat(in_A, 1), torch.cat(in_G, 1))


def by_example(call: Call, n: int) -> tuple[Tensor, Tensor]:
    """a [n, position, d_in] and g [n, position, d_out] of a call on n examples."""
    n_rows = call.a.shape[:-1].numel()
    if n_rows % n:
        raise ValueError(
            f"{call.name!r} is handed {n_rows} positions for {n} examples; EK-FAC cannot tell "
            "whose they are: leave the layer out"
        )
    return call.a.reshape(n, -1, call.a.shape[-1]), call.g.reshape(n, -1, call.g.shape[-1])


def squared_sums(a: Tensor, g: Tensor, most: int = 2**24) -> Tensor:
    """sum_n (sum_s g_s a_s^T)^2 [d_out, d_in] for a [n, s, d_in], g [n, s, d_out], by as many
    examples at a time as have `most` entries together, one at least."""
    total = a.new_zeros(g.shape[-1], a.shape[-1])
    chunk = max(1, most // total.numel())
    for a_part, g_part in zip(a.split(chunk), g.split(chunk)):
        total += (g_part.mT @ a_part).square().sum(0)
    return total


class Spectrum(NamedTuple):
    """Factors and masses of several layers, by name."""

    factors: dict  # {name: (eigen A, eigen G)}
    masses: dict[str, Tensor]  # {name: [d_out, d_in]}, of EK-FAC


def spectrum(model: nn.Module, batches, loss, layers, make_generator) -> Spectrum:
    """Factors, decomposed, and EK-FAC's masses. make_generator() is called before each of the two
    passes, so that both sample the same labels."""
    factors = {}
    found = kronecker_factors(model, batches, loss, layers, generator=make_generator())
    for name, (A, G) in found.items():
        factors[name] = (eigen(A), eigen(G))
    masses = corrected_masses(model, batches, loss, factors, generator=make_generator())
    return Spectrum(factors, masses)


# --- Models of others (much of it as in edit.py: each of the two files can be copied alone) -------


class Layer(NamedTuple):
    """A linear layer: it returns x W^T (+ bias), W [d_out, d_in] = weight, or weight^T where it is
    the other way round, as in the `Conv1D` of GPT-2."""

    module: nn.Module
    weight: Tensor  # as the module holds it
    matrix: Tensor  # [d_out, d_in], a view of it

    @torch.no_grad()
    def asked(self, x: Tensor) -> Tensor:
        """What the module returns for x [d_in], and for zeros, its bias: [2, d_out], float64."""
        both = torch.stack([x, torch.zeros_like(x)])[None]  # [batch, token, d_in]
        with torch.autocast(x.device.type, enabled=False):
            return double(self.module.forward(both)[0])

    def returns(self, x: Tensor) -> bool:
        """Whether the module maps x [d_in] by `matrix`, up to rounding."""
        try:
            found, bias = self.asked(x)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it wants another shape
            return False
        wanted = double(self.matrix) @ double(x)
        left = found - bias - wanted
        eps = rounding(x.dtype)
        return bool(left.norm() <= 8 * eps**0.75 * wanted.norm() + 2 * eps * bias.norm())

    @torch.no_grad()
    def write(self, W: Tensor, x: Tensor) -> bool:
        """Put W [d_out, d_in] into the weight; whether what the module returns for x [d_in] then
        changes as it should, up to rounding."""
        before, returned = double(self.matrix).clone(), self.asked(x)[0]
        self.matrix.data.copy_(W)
        torch.clear_autocast_cache()  # of casts of the old weight
        change = self.asked(x)[0] - returned
        wanted = (double(self.matrix) - before) @ double(x)
        slack = 0.1 * wanted.norm() + 2 * rounding(x.dtype) ** 0.75 * returned.norm()
        return bool((change - wanted).norm() <= slack)


def any_input(layer: Layer) -> Tensor:
    """An input of the layer [d_in], the same every time."""
    x = torch.randn(layer.matrix.shape[1], generator=torch.Generator().manual_seed(0))
    return (x / x.abs().max()).to(layer.weight)


def rounding(dtype: torch.dtype) -> float:
    """The relative rounding of products in a dtype; that of bfloat16 for float32 where torch may
    multiply it with fewer digits (TF32)."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.bfloat16
    return torch.finfo(dtype).eps


def layer_of(model: nn.Module, name: str) -> Layer:
    """The layer of that name. ValueError: the name is unknown, the weight is computed, so that what
    is written there would be lost, or another module uses it too. TypeError: no linear layer."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(f"{name!r} is no layer of the model; such are {names[:8]}") from None
    weight = module._parameters.get("weight")
    if weight is None and isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(
            f"the weight of {name!r} is computed (weight_norm, pruning, ...); make it a parameter"
        )
    for other, user in model.named_modules():
        if user is not module and any(same_memory(p, weight) for p in user._parameters.values()):
            raise ValueError(f"{name!r} shares its weight with {other!r}; give one a copy first")
    if weight is not None and weight.dim() == 2:
        if not weight.isfinite().all():
            raise ValueError(f"the weight of {name!r} holds a value that is not finite")
        with evaluation_mode(module):
            for matrix in (weight, weight.mT):
                layer = Layer(module, weight, matrix)
                if layer.returns(any_input(layer)):
                    return layer
    raise TypeError(f"{name!r} is no linear layer: it has no weight that maps what it is handed")


def same_memory(p: Tensor | None, weight: Tensor | None) -> bool:
    """Whether a parameter is the weight, or lies in the same place."""
    if p is None or weight is None:
        return False
    return p is weight or p.data_ptr() == weight.data_ptr() != 0


def logits_of(output) -> Tensor:
    """The logits of what a model returns: a tensor, an object with `.logits`, or a tuple or list
    that begins with them. TypeError for anything else, ValueError for a single class."""
    found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            "the model must return logits [..., classes], a tuple that begins with them or an "
            f"object with .logits, not {type(found).__name__}"
        )
    if found.dim() == 0 or found.shape[-1] < 2:
        raise ValueError(f"logits must be [..., classes >= 2], got {list(found.shape)}")
    return found


@contextmanager
def evaluation_mode(model: nn.Module):
    """Inside, no dropout, and running statistics are used but not updated; after it every module
    has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_gradients():
    """RuntimeError in torch.inference_mode: no gradient reaches a tensor made there, even later."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("no gradient reaches what torch.inference_mode makes: use torch.no_grad")


@contextmanager
def ablated(model: nn.Module, weights: dict[str, Tensor]):
    """`with ablated(model, {"memory.values": W2}):` these weights inside, after it bit for bit the
    old ones. ValueError, and no change, where a weight does not fit or is not finite, or where the
    layer does not return what was written; TypeError where it is no linear layer."""
    layers = {name: layer_of(model, name) for name in weights}
    old = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for name, W in weights.items():
        shape, dtype = layers[name].matrix.shape, layers[name].weight.dtype
        if W.shape != shape:
            raise ValueError(f"the weight of {name!r} must be {list(shape)}, got {list(W.shape)}")
        if not W.to(dtype).isfinite().all():
            raise ValueError(f"the weight of {name!r} holds a value that is not finite in {dtype}")
    try:
        for name, W in weights.items():
            layer = layers[name]
            with evaluation_mode(layer.module):
                is_returned = layer.write(W, any_input(layer))
            if not is_returned:
                raise ValueError(f"{name!r} does not return what was written to its weight")
        yield model
    finally:
        for name, weight in old.items():
            layers[name].weight.data.copy_(weight)
        torch.clear_autocast_cache()
