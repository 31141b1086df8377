"""edit.py: a linear layer is an associative memory; an edit is a small closed-form change of it.

A layer W [d_out, d_in] that is handed a key k returns the value W k. To change what it returns for one key and, as far
as possible, nothing else, add a rank-one matrix. Two of them differ in the direction that must recognise the key:

    row    dW = r e_j^T / k_j                  j: the entry of k of largest magnitude. One column of W, one slot [1]
    ROME   dW = r (P k)^T / (k^T P k)          P = C^-1, C: second moment of ordinary keys, to keep their values [2]

with r = v* - W k, what is missing from the wanted value v*. For n keys at once, the rows of K, and n residuals, of R:

    EMMET      dW = R^T (K P K^T)^-1 K P              P = C^-1. Every value is written exactly; ROME is n = 1 [5]
    MEMIT      dW = R^T (K P K^T + lam I)^-1 K P      P = C^-1. Least squares: lam weighs ordinary values against R [4]
    AlphaEdit  dW = R^T (K P K^T + lam I)^-1 K P      P projects on the null space of C, which holds no ordinary key [6]

v* is the mean value that the layer returns for known facts with the wanted answer (prototype: closed form end to end),
or r comes by gradient descent on -log p(wanted answer) of the model with the edit in place (gradient) [2].

    >>> W, C = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([1., 4.], dtype=torch.float64))
    >>> k, v = torch.tensor([1., 2.], dtype=torch.float64), torch.tensor([1., 6.], dtype=torch.float64)
    >>> rome_update(W, C, k, v)                # v - W k = (0, 4), C^-1 k = (1, 1/2), k^T C^-1 k = 2
    tensor([[0., 0.],
            [2., 1.]], dtype=torch.float64)
    >>> row_update(k, v - W @ k)               # the largest entry of k is k_1 = 2
    tensor([[0., 0.],
            [0., 2.]], dtype=torch.float64)
    >>> K = torch.tensor([[1., 2.], [1., -2.]], dtype=torch.float64)
    >>> R = torch.tensor([[0., 2.], [2., 0.]], dtype=torch.float64)
    >>> emmet_update(K, R, C)                  # K C^-1 = [[1, 1/2], [1, -1/2]], K C^-1 K^T = 2 I: R^T K C^-1 / 2
    tensor([[ 1.0000, -0.5000],
            [ 1.0000,  0.5000]], dtype=torch.float64)
    >>> memit_update(K, R, C, lam=2.0)         # R^T K C^-1 / (2 + 2): half of each residual is written
    tensor([[ 0.5000, -0.2500],
            [ 0.5000,  0.2500]], dtype=torch.float64)

K: keys [n, d_in]; R: residuals [n, d_out]; C: `second_moment` E[k k^T] [d_in, d_in]; lam: its weight. A **site** is an
`nn.Linear` by name and the number of its call in a forward pass. The file needs torch alone, and any model called as
`model(tokens) -> logits [batch, token, answers]`. Left out: biases, several keys averaged for one fact as in [2].

[1] Niu 2026, 2606.20737 (the single-row edit).   [2] Meng et al. 2022, ROME, 2202.05262, equation 2.
[3] Gupta et al. 2024, 2403.07175: two different keys in one ROME update make disabling edits; here there is one.
[4] Meng 2022, MEMIT, 2210.07229, eq. 14.   [5] Gupta 2024, EMMET, 2403.14236.   [6] Fang 2024, AlphaEdit, 2410.02355.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- The closed forms: float64 inside, the result in the dtype of the weights -----------------------------------------
def double(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its device has none (MPS)."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)

def cast(update: Tensor, like: Tensor) -> Tensor:
    """A float64 matrix in the dtype and on the device of `like`; ValueError where rounding loses it."""
    result = update.to(like.device, like.dtype)
    error, size = (double(result).to(update.device) - update).abs().max(), update.abs().max()
    kind = torch.finfo(like.dtype if like.is_floating_point() else update.dtype)
    if not error <= 4 * kind.eps * size + kind.tiny:
        raise ValueError(f"a matrix with entries up to {size:.3g} does not fit {like.dtype}: off by {error:.3g}")
    return result

def second_moment(K: Tensor) -> Tensor:
    """C = mean over the rows of k k^T, uncentred: [..., d_in] -> [d_in, d_in], float64 ([2], below equation 2)."""
    if K.dim() < 2 or K.shape[:-1].numel() == 0 or not K.isfinite().all():
        raise ValueError(f"keys must be finite and [n, d_in] with n >= 1, got shape {list(K.shape)}")
    K = double(K.flatten(0, -2))
    return K.T @ K / len(K)

def check_batch(K: Tensor, R: Tensor, C: Tensor | None = None, W: Tensor | None = None, lam=1.0, carried=None):
    """ValueError that names the shapes that clash, or the first request whose key or residual cannot be used."""
    if K.dim() != 2 or R.dim() != 2 or len(K) != len(R) or not len(K):
        raise ValueError(f"keys must be [n, d_in] and residuals or values [n, d_out] for n >= 1 requests, vectors for "
                         f"one alone, got {list(K.shape)} and {list(R.shape)}")
    for name, matrix, height in ("C", C, K.shape[1]), ("W", W, R.shape[1]), ("carried", carried, K.shape[1]):
        if matrix is not None and matrix.shape != (height, K.shape[1]):
            raise ValueError(f"{name} must be [{height}, {K.shape[1]}] to fit the requests, got {list(matrix.shape)}")
    if C is not None and (not C.isfinite().all() or not C.diagonal().sum() > 0):
        raise ValueError("C must be finite with a positive trace: the second moment of ordinary keys")
    if not 0 < lam < float("inf"):
        raise ValueError(f"lam must be positive, got {lam}; emmet_update writes every value exactly")
    for bad, why in (~K.isfinite().all(1), "its key holds a value that is not finite"), \
                    (~R.isfinite().all(1), "its residual or value holds a value that is not finite"), \
                    ((K == 0).all(1), "a key of zeros cannot be edited: the layer returns 0 whatever its weights"):
        if bad.any():
            raise ValueError(f"request {int(bad.nonzero()[0])}: {why}")

def row_direction(K: Tensor) -> Tensor:
    """u = e_j / k_j with j = argmax |k_j|, for every row of K [n, d_in]; u k = 1."""
    K = double(K)
    j = K.abs().argmax(-1, keepdim=True)
    return torch.zeros_like(K).scatter(-1, j, 1 / K.gather(-1, j))

def rome_direction(C: Tensor, K: Tensor, diagnostics: dict | None = None, lam: float = 0.0) -> Tensor:
    """u = C^-1 k / (k^T C^-1 k + lam) for the rows of K [n, d_in]: ROME, u k = 1, and with lam MEMIT of one request."""
    K, B = double(K), inverse_factor(C, diagnostics)
    U = K @ B @ B.T                                                              # C^-1 k as rows
    return U / ((U * K).sum(-1, keepdim=True) + lam)

def inverse_factor(C: Tensor, diagnostics: dict | None = None) -> Tensor:
    """B = L^-T where C = L L^T (Cholesky): B B^T = C^-1. Where C is numerically singular (dead, dependent inputs), only
    there, a ridge of 1e-8 trace(C) / d_in is added; `diagnostics["ridge"]` records it."""
    C, ridge = double(C), 0.0
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    L, failed = torch.linalg.cholesky_ex(C)
    pivots = L.diagonal().square()
    if failed or not pivots.min() > len(C) * torch.finfo(C.dtype).eps * pivots.max():
        ridge = 1e-8 * float(C.diagonal().mean())
        L, failed = torch.linalg.cholesky_ex(C + ridge * identity)
        if failed:
            raise ValueError("C has a negative eigenvalue, so that it is no second moment")
    if diagnostics is not None:
        diagnostics["ridge"] = ridge
    return torch.linalg.solve_triangular(L.T, identity, upper=True)

def row_update(k: Tensor, r: Tensor, diagnostics: dict | None = None) -> Tensor:
    """dW [d_out, d_in] that changes one column, at the entry of k [d_in] of largest magnitude, so that dW k = r [d_out]
    [1]. Raises ValueError for a bad request (`check_batch`)."""
    check_batch(k[None], r[None])
    return finish(torch.outer(double(r), row_direction(k[None])[0]), k[None], r[None], r, None, diagnostics)

def rome_update(W: Tensor, C: Tensor, k: Tensor, v: Tensor, diagnostics: dict | None = None) -> Tensor:
    """dW = (v - W k) (C^-1 k)^T / (k^T C^-1 k), so that (W + dW) k = v: ROME [2], equation 2, with one key [3].
    W [d_out, d_in], C [d_in, d_in], k [d_in], v [d_out] -> dW [d_out, d_in]: of all with v at k the one that changes
    ordinary values least. `diagnostics`: `inverse_factor`, `finish`. ValueError for a bad request: `check_batch`."""
    check_batch(k[None], v[None], C, W)
    r = double(v) - double(W) @ double(k)
    return finish(torch.outer(r, rome_direction(C, k[None], diagnostics)[0]), k[None], r[None], W, W, diagnostics)

def rome_sequence(W: Tensor, C: Tensor, K: Tensor, V: Tensor, diagnostics: dict | None = None) -> Tensor:
    """ROME for one request after another, each on the weight that the last one left: the sum of the updates. Only the
    last is sure to hold. As `rome_update`, with K [n, d_in], which stay as they are, and V [n, d_out]."""
    check_batch(K, V, C, W)
    U, now = rome_direction(C, K, diagnostics), double(W).clone()
    for k, v, u in zip(double(K), double(V), U):
        now.addr_(v - now @ k, u)
    return finish(now - double(W), K, double(V) - double(K) @ double(W).T, W, W, diagnostics)

def finish(dW: Tensor, K: Tensor, R: Tensor, like: Tensor, W: Tensor | None, diagnostics: dict | None) -> Tensor:
    """dW in the dtype and on the device of `like`. `diagnostics` gets, of what is returned, rounding included,
    "residual_left" [n], |r - dW k| of each request, and, with W at hand, "relative_norm", |dW| / |W|."""
    dW = cast(dW, like)
    if diagnostics is not None:
        diagnostics["residual_left"] = (double(R) - double(K) @ double(dW).T).norm(dim=-1)
        if W is not None:
            diagnostics["relative_norm"] = float(double(dW).norm() / double(W).norm())
    return dW

# --- Many facts in one update: dW = R^T (K P K^T + lam I)^-1 K P ------------------------------------------------------
def emmet_update(K: Tensor, R: Tensor, C: Tensor, *, W: Tensor | None = None, diagnostics=None) -> Tensor:
    """dW = R^T (K C^-1 K^T)^-1 K C^-1, so that dW k = r for every request: EMMET [5], ROME for n facts at once.
    K [n, d_in], R [n, d_out], C [d_in, d_in] -> dW [d_out, d_in]. Raises ValueError for a bad request, for keys that
    coincide and for more requests than the keys have rank. `diagnostics` and W: see `solve`."""
    check_batch(K, R, C, W)
    if len(K) > K.shape[1]:
        raise ValueError(f"{len(K)} requests exceed the rank of their keys, at most {K.shape[1]}; use memit_update")
    return solve(K, R, inverse_factor(C, diagnostics), 0.0, "dual", W, diagnostics)

def memit_update(K: Tensor, R: Tensor, C: Tensor, lam: float, *, form: str | None = None, carried: Tensor | None = None,
                 W: Tensor | None = None, diagnostics: dict | None = None) -> Tensor:
    """dW = R^T K (lam C + K^T K)^-1, the minimum of sum |r - dW k|^2 + lam E |dW k_ordinary|^2: MEMIT [4], eq. 14.
    K [n, d_in], R [n, d_out], C [d_in, d_in], lam > 0 -> dW [d_out, d_in]. C is a mean: all ordinary keys together
    weigh as much as lam requests. Keys may coincide. `form`, `diagnostics`, W: see `solve`. With `carried` = K_p^T K_p
    [d_in, d_in] of all earlier keys, added to lam C, and residuals on the edited W, batches add up to one batch."""
    check_batch(K, R, C, W, lam, carried)
    C = double(C) + (0 if carried is None else double(carried) / lam)
    return solve(K, R, inverse_factor(C, diagnostics), lam, form, W, diagnostics)

def alphaedit_update(K: Tensor, R: Tensor, C: Tensor, lam: float, *, threshold: float = 1e-2, W: Tensor | None = None,
                     diagnostics=None) -> Tensor:
    """dW = R^T K P (P K^T K P + lam I)^-1 with P the projection on the null space of C: AlphaEdit [6], for one batch.
    K [n, d_in], R [n, d_out], C [d_in, d_in] -> dW [d_out, d_in]; lam > 0 in squared lengths of a key (the paper: 1).
    The null space is that of eigenvalues of C below bound = threshold * trace(C) / d_in (the paper: 1e-2), so that over
    ordinary keys E |dW k|^2 <= bound * |dW|^2; diagnostics["null_space"] is its dimension. The paper's term for earlier
    edits is left out. Raises ValueError where it is empty and for a bad request. For the rest see `solve`."""
    check_batch(K, R, C, W, lam)
    eigenvalues, eigenvectors = torch.linalg.eigh(double(C))
    share = eigenvalues / eigenvalues.mean()
    U = eigenvectors[:, share < threshold]                                       # P = U U^T
    if not U.shape[1]:
        raise ValueError(f"the null space of C is empty: its smallest eigenvalue is {share[0]:.3g} of the mean, above "
                         f"{threshold:.3g}; raise the threshold or use memit_update")
    if diagnostics is not None:
        diagnostics |= {"null_space": U.shape[1], "ridge": 0.0}
    return solve(K, R, U, lam, None, W, diagnostics)

def solve(K: Tensor, R: Tensor, B: Tensor, lam: float, form: str | None, W: Tensor | None, diagnostics) -> Tensor:
    """dW = R^T (K P K^T + lam I)^-1 K P with P = B B^T, B [d_in, m], for the keys X = K B [n, m]:
        dual     dW^T = B X^T (X X^T + lam I)^-1 R              a system of size n
        primal   dW^T = B (X^T X + lam I)^-1 X^T R              a system of size m; form=None: the smaller one
    With B = L^-T the primal matrix is L^-1 (lam C + K^T K) L^-T: the wide spectrum of C is in B alone. `diagnostics`
    gets, beside "ridge" of `inverse_factor` and what `finish` measures,
        condition            condition number of the system solved
        residual_predicted   [n] norms of the rows of lam (K P K^T + lam I)^-1 R, what is left in exact arithmetic
        largest_cosine       largest |cosine| between the directions P k of two requests"""
    if form not in (None, "primal", "dual"):
        raise ValueError(f"form must be 'primal', 'dual' or None for the smaller system, got {form!r}")
    X, residuals = double(K) @ B, double(R)
    dual = form == "dual" or form is None and len(X) <= X.shape[1]
    system = X @ X.T if dual else X.T @ X
    system.diagonal().add_(lam)
    L, failed = torch.linalg.cholesky_ex(system)
    if failed or (L.diagonal().square() <= max(X.shape) * torch.finfo(L.dtype).eps * system.diagonal()).any():
        if lam:
            most = X.square().sum(1).max()                                       # k^T P k
            raise ValueError(f"lam {lam:.3g} is lost in rounding beside k^T P k, {most:.3g} at most; raise it")
        cosine, i, j = largest_cosine(X)
        why = f"requests {i} and {j} have the same key up to a factor" if cosine > 1 - 1e-12 else \
            f"the rank of the keys is less than {len(X)}, their number"
        raise ValueError(f"{why}, so that not every value can be written; use memit_update or leave a request out")
    if dual:
        solved = torch.cholesky_solve(residuals, L)
        Y, left = X.T @ solved, lam * solved
    else:
        Y = torch.cholesky_solve(X.T @ residuals, L)
        left = residuals - X @ Y                                                 # lam (X X^T + lam I)^-1 R by Woodbury
    if diagnostics is not None:
        eigenvalues = torch.linalg.eigvalsh(system).abs()
        diagnostics |= {"condition": float(eigenvalues.max() / eigenvalues.min()),
                        "residual_predicted": left.norm(dim=-1), "largest_cosine": largest_cosine(X @ B.T)[0]}
    return finish((B @ Y).T, K, R, R, W, diagnostics)

def largest_cosine(U: Tensor, chunk: int = 512) -> tuple[float, int, int]:
    """The largest |cosine| between two rows of U [n, d], and which two: (0.0, 0, 0) where there is one row."""
    U = U / U.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(U.dtype).tiny)
    best = 0.0, 0, 0
    for start in range(0, len(U), chunk):
        value, place = (U[start:start + chunk] @ U[start:].T).abs_().triu_(1).flatten().max(0)       # each pair once
        i, j = divmod(int(place), len(U) - start)
        best = max(best, (float(value), start + i, start + j))
    return best

# --- Putting an edit into a model -------------------------------------------------------------------------------------
@torch.no_grad()
def apply_edit(model: nn.Module, updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add updates {layer name: dW} to the weights for good; returns the old weights, for `restore`. ValueError, and no
    change, where an update is not finite, not of the weight's shape, or the sum does not fit the weight's dtype."""
    old = {}
    try:
        for name, dW in updates.items():
            W = model.get_submodule(name).weight
            if W.shape != dW.shape or not dW.isfinite().all():
                raise ValueError(f"the update of {name} must be finite and {list(W.shape)}, got {list(dW.shape)}")
            old[name] = W.detach().clone()
            W.copy_(cast(double(W) + double(dW).to(double(W).device), W))
    except Exception:
        restore(model, old)
        raise
    return old

@torch.no_grad()
def restore(model: nn.Module, old: dict[str, Tensor]):
    """Put back the weights that `apply_edit` returned, bit for bit."""
    for name, weight in reversed(old.items()):                                   # two names may mean one layer
        model.get_submodule(name).weight.copy_(weight)

@contextmanager
def edit(model: nn.Module, updates: dict[str, Tensor]):
    """`with edit(model, {"memory.values": dW}):` edited inside; bit for bit the old model after, body raised or not."""
    old = apply_edit(model, updates)
    try:
        yield model
    finally:
        restore(model, old)

@contextmanager
def intervene(module: nn.Module, change, calls=None):
    """Inside, the module returns change(input, output), or its own output where that is None, at all its calls or at
    the `calls` given, counted from 0 at the start of the `with` block, which then is for one forward pass."""
    numbers = iter(range(10**9))                                                 # of the calls
    hook = lambda _, inputs, output: change(inputs[0], output) if calls is None or next(numbers) in calls else None
    with module.register_forward_hook(hook):
        yield

def rank_one(layer: nn.Linear, u: Tensor, r: Tensor, calls=None):
    """Inside, example b of a batch sees its own edit, W + r_b u_b^T, at every call of the layer or at the `calls` given
    (see `intervene`), and W is untouched: u [batch, d_in], r [batch, d_out]."""
    return intervene(layer, lambda k, value: value + torch.einsum("bti,bi->bt", k, u)[..., None] * r[:, None], calls)

@torch.no_grad()
def record(model: nn.Module, module: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output (of a layer: keys and values), each [call, batch, token, d], of all calls on the tokens."""
    calls = []
    with intervene(module, lambda key, value: calls.append((key, value))):       # returns None: nothing changes
        model(tokens)
    if not calls:
        raise ValueError("the layer is not called when the model reads these tokens, so it holds nothing of them")
    return tuple(map(torch.stack, zip(*calls)))

def at_call(model: nn.Module, name: str, call: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output, each [batch, token, d], of the module `name` at one of its calls."""
    inputs, outputs = record(model, model.get_submodule(name), tokens)
    if not 0 <= call < len(inputs):
        raise ValueError(f"{name} is called {len(inputs)} time(s) in a forward pass, so there is no call {call}")
    return inputs[call], outputs[call]

def last_token(model: nn.Module, name: str, call: int, tokens: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """As `at_call`, at the last token alone: input [n, d_in] and output [n, d_out]."""
    parts = [[x[:, -1].clone() for x in at_call(model, name, call, part)] for part in tokens.split(chunk)]
    return tuple(map(torch.cat, zip(*parts)))

def key_second_moment(model: nn.Module, layer: nn.Linear, *inputs: tuple, chunk: int = 1024) -> Tensor:
    """C of a layer over the keys of each (tokens [n, token], call), None: every call; every token counts the same."""
    total, n = 0, 0
    for part, call in ((part, call) for tokens, call in inputs for part in tokens.split(chunk)):
        K = record(model, layer, part)[0][slice(None) if call is None else slice(call, call + 1)].flatten(0, -2)
        total, n = total + second_moment(K) * len(K), n + len(K)
    return total / n

# --- Requests and their target values ---------------------------------------------------------------------------------
@dataclass
class Requests:
    """n facts to be changed; the query of a fact is read at its last token."""
    fact: Tensor                        # [n] row in the list of facts
    tokens: Tensor                      # [n, token] the query
    old: Tensor                         # [n] the answer now
    new: Tensor                         # [n] the answer wanted

    def __getitem__(self, rows) -> "Requests":
        return Requests(*(x[rows] for x in vars(self).values()))

    def questions(self) -> "Probes":
        """The queries themselves, each asked of its own edit."""
        return Probes(torch.arange(len(self.fact), device=self.fact.device), self.tokens, self.new)

    def check_distinct(self):
        """ValueError that names both requests where two are for one fact, which cannot have two answers at once."""
        first = {}
        for j, fact in enumerate(self.fact.tolist()):
            if first.setdefault(fact, j) != j:
                raise ValueError(f"requests {first[fact]} and {j} change the same fact, {fact}; leave one out")

@dataclass
class Site:
    """What an edit needs to know of one layer at one call: gathered once, used by every method and target."""
    name: str                           # of the nn.Linear
    call: int                           # which of its calls within a forward pass, from 0
    layer: nn.Linear
    C: Tensor                           # [d_in, d_in] second moment of ordinary keys
    keys: Tensor                        # [n_facts, d_in] at the last token of each fact's query
    values: Tensor                      # [n_facts, d_out]

def site(model: nn.Module, name: str, call: int, queries: Tensor, ordinary: Tensor | None = None) -> Site:
    """Gather a site: `queries` [n_facts, token] ask for each fact, `ordinary` [n, token] are more inputs, with values
    to keep. C pools the keys of these at this call and of the queries at every call, at all of which an edit acts."""
    layer, more = model.get_submodule(name), [] if ordinary is None else [(ordinary, call)]
    keys, values = last_token(model, name, call, queries)
    return Site(name, call, layer, key_second_moment(model, layer, (queries, None), *more), keys, values)

def direction(method: str, at: Site, requests: Requests, diagnostics: dict | None = None, lam: float = 1.0) -> Tensor:
    """u [n, d_in] of each request; its edit is W + r u^T. method: "row", "rome" or "memit" (of one request, lam as in
    `rome_direction`). For a key of zeros u is 0, an edit that fails."""
    keys = at.keys[requests.fact]
    u, alive = torch.zeros_like(keys), (keys != 0).any(-1)
    if alive.any():
        K = keys[alive]
        U = row_direction(K) if method == "row" else rome_direction(at.C, K, diagnostics, lam * (method == "memit"))
        u[alive] = U.to(keys)
    return u

def prototype_residual(at: Site, requests: Requests, tails: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """r = v* - W k [n, d_out], v* the mean value over the other known facts (`known` [n_facts], bool) with the wanted
    answer in `tails` [n_facts]; and which requests have such a fact [n]: r is 0 for the others."""
    fact, (_, row) = requests.fact, torch.cat([tails, requests.new]).unique(return_inverse=True)
    answer, wanted = row.split([len(tails), len(fact)])                          # numbered from 0 without gaps
    values = torch.cat([at.values, torch.ones_like(at.values[:, :1])], 1)        # [n_facts, d_out + 1], the 1 counts
    total = values.new_zeros(int(row.max()) + 1, values.shape[1]).index_add(0, answer[known], values[known])
    others = total[wanted] - values[fact] * (known[fact] & (answer[fact] == wanted))[:, None]
    has_one, mean = others[:, -1] > 0, others[:, :-1] / others[:, -1:].clamp(min=1)
    return (mean - at.values[fact]) * has_one[:, None], has_one

def distance_to_values(values: Tensor, v: Tensor, chunk: int = 1024) -> Tensor:
    """[n]: how far each row of v [n, d_out] is from the nearest row of `values` [m, d_out], such as a store's own."""
    nearest = torch.cat([torch.cdist(part, values).argmin(1) for part in v.detach().split(chunk)])
    return (v - values[nearest]).norm(dim=-1)

def gradient_residual(model: nn.Module, at: Site, requests: Requests, u: Tensor, steps: int = 40, lr=0.1, decay=1e-3,
                      clamp=4.0, batch: int | None = None, near: Tensor | None = None, pull=1.0) -> Tensor:
    """r [n, d_out] that minimises -log p(wanted answer) + decay |r|^2 / |v0|^2, |r| <= clamp |v0|, by Adam; v0 = W k.
    The model runs with W + r u^T at every call of the layer, as after the edit; each request for itself, `batch` at a
    time (None: all). With `near` [m, d_out], values stored, the loss gets pull * |v0 + r - the nearest|^2 / |v0|^2."""
    parts, usual = [], at.values.norm(dim=-1).mean()
    for i in torch.arange(len(u), device=u.device).split(batch or max(1, len(u))):
        v0 = at.values[requests.fact[i]]
        size = v0.norm(dim=-1, keepdim=True)
        size = torch.where(size > 0, size, usual)                                # the site may return nothing
        scaled = torch.zeros_like(v0, requires_grad=True)                        # r in units of |v0|
        optimizer = torch.optim.Adam([scaled], lr=lr)
        for _ in range(steps):
            with rank_one(at.layer, u[i], scaled * size):
                loss = F.cross_entropy(model(requests.tokens[i])[:, -1], requests.new[i], reduction="sum")
            loss = loss + decay * scaled.square().sum()
            if near is not None:
                loss = loss + pull * (distance_to_values(near, v0 + scaled * size) / size[:, 0]).square().sum()
            scaled.grad, = torch.autograd.grad(loss, scaled)
            optimizer.step()
            scaled.data *= (clamp / scaled.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        parts.append((scaled * size).detach())
    return torch.cat(parts)

def finetune_update(model: nn.Module, layer: nn.Linear, requests: Requests, bound: float, batch=None) -> Tensor:
    """dW by 25 steps of Adam on -log p(wanted answer), no entry above bound * rms(W): the constrained fine-tuning that
    [2] compares with, at a rate that can reach the bound in five steps."""
    W, n = layer.weight.detach(), len(requests.new)
    limit = bound * float(W.square().mean().sqrt())
    dW = torch.zeros_like(W, requires_grad=True)
    optimizer = torch.optim.Adam([dW], lr=limit / 5)
    with intervene(layer, lambda key, value: value + key @ dW.T):
        for _ in range(25):
            for i in torch.arange(n, device=W.device).split(batch or max(1, n)):
                loss = F.cross_entropy(model(requests.tokens[i])[:, -1], requests.new[i], reduction="sum") / n
                loss.backward(inputs=[dW])
            optimizer.step()
            optimizer.zero_grad()
            dW.data.clamp_(-limit, limit)
    return dW.detach()

def memit_layers(model: nn.Module, sites: list[tuple[str, int]], requests: Requests, r: Tensor, lam: float,
                 ordinary: Tensor, stream: tuple[str, int], diagnostics: dict | None = None) -> dict[str, Tensor]:
    """MEMIT over several sites [4], (layer name, call) in the order of the forward pass: {layer name: dW}, for `edit`.
    `stream` (module name, call) reads the residual stream after all sites: its input at the last token should change by
    r [n, d_out]. Site after site, with the edits so far in place, what is missing there, divided by the number of sites
    left, is written by `memit_update` for the keys as they now are, but for keys of zeros; C is that of the model as it
    came, over `ordinary` [n, token]. diagnostics[name, call]: see `solve`. ValueError for two requests for one fact.
    In a loop dW sums what is written at each call, but acts at all: more sites need not bring the stream nearer."""
    requests.check_distinct()
    moments = [key_second_moment(model, model.get_submodule(name), (ordinary, call)) for name, call in sites]
    wanted = last_token(model, *stream, requests.tokens)[0] + r
    updates, carried = {}, {}
    with ExitStack() as edits:
        for i, (name, call) in enumerate(sites):
            share = (wanted - last_token(model, *stream, requests.tokens)[0]) / (len(sites) - i)
            keys = last_token(model, name, call, requests.tokens)[0]
            alive = (keys != 0).any(-1)
            if alive.any():
                notes = None if diagnostics is None else diagnostics.setdefault((name, call), {})
                dW = memit_update(keys[alive], share[alive], moments[i], lam, carried=carried.get(name),
                                  W=model.get_submodule(name).weight, diagnostics=notes)
                edits.enter_context(edit(model, {name: dW}))
                updates[name] = updates.get(name, 0) + dW
                carried[name] = carried.get(name, 0) + double(keys).T @ double(keys)
    return updates

# --- What an edit did: the fact, what follows from it, and everything else --------------------------------------------
@dataclass
class Probes:
    """m questions, each to the model with one of the edits; the answer is read at the last token."""
    edit: Tensor                        # [m] row in the requests
    tokens: Tensor                      # [m, token]
    answer: Tensor                      # [m]

def propagation_probes(requests: Requests, paths, known: Tensor, right: Tensor, asked: Tensor) -> tuple[dict, dict]:
    """Probes whose answer an edit must change: compositions with the edited fact first ("hop1"), or second ("hop2").
    paths: has facts [n_facts, 3] (head, relation, tail; sorted), tokens [n_paths, 3], two_hop, first, second [n_paths],
    as in kg.py. known [n_facts]; right [n_paths]: answered right before; asked [n_paths]: the paths to draw from. Those
    left out are counted by reason in the second result; the other fact is the one that the path uses after the edit."""
    head, relation, tail = paths.facts.T
    row_of = torch.full((int(max(head.max(), tail.max())) + 1, int(relation.max()) + 1), -1, device=head.device)
    row_of[head, relation] = torch.arange(len(head), device=head.device)         # fact of (head, relation), -1: none
    probes, left_out = {}, {"edited fact twice": 0, "answer unchanged": 0, "wrong before": 0, "other fact unknown": 0}
    for name, hop in ("hop1", paths.first), ("hop2", paths.second):
        i, path = ((hop == requests.fact[:, None]) & (paths.second >= 0) & asked).nonzero(as_tuple=True)
        fact, answer, other = requests.fact[i], requests.new[i], paths.first[path]           # hop2: (g, s) -> h, then r
        twice = other == fact
        if name == "hop1":                                                       # (h, r1, r2): now via the new tail
            other = row_of[answer, relation[paths.second[path]]]
            answer, twice = tail[other], (paths.second[path] == fact) | (other == fact)
        keep = torch.ones_like(twice)
        for reason, out in ("edited fact twice", twice), ("other fact unknown", (other < 0) | ~known[other]), \
                           ("answer unchanged", answer == paths.two_hop[path]), ("wrong before", ~right[path]):
            left_out[reason] += int((keep & out).sum())
            keep &= ~out
        probes[name] = Probes(i[keep], paths.tokens[path[keep]], answer[keep])
    return probes, left_out

def queries(paths) -> Tensor:
    """[n_facts, 2]: head and relation token of each fact, in the order of `paths.facts`."""
    n_rows = torch.bincount(paths.first)
    return paths.tokens[n_rows.cumsum(0) - n_rows, :2]

def unrelated_probes(requests: Requests, paths, one_hop: Tensor, two_hop: Tensor, asked: Tensor, n: int,
                     generator: torch.Generator) -> dict[str, Probes]:
    """Per edit n facts and n of the paths in `asked`, with the edited fact at no hop; the answer is the model's own
    before the edit (one_hop [n_facts], two_hop [n_paths])."""
    device, probes = paths.facts.device, {}
    facts, edited = torch.arange(len(paths.facts), device=device), requests.fact[:, None]
    for name, rows, hops, tokens, answer in ("unrelated_one_hop", facts, [facts], queries(paths), one_hop), (
            "unrelated_two_hop", asked.nonzero().flatten(), [paths.first, paths.second], paths.tokens, two_hop):
        place = torch.rand(len(edited), len(rows), generator=generator).argsort(1)[:, :n].to(device)
        drawn = rows[place]                                                      # [request, n]
        keep = torch.stack([hop[drawn] != edited for hop in hops]).all(0)
        probes[name] = Probes(keep.nonzero()[:, 0], tokens[drawn[keep]], answer[drawn[keep]])
    return probes

def neighbour_probes(requests: Requests, at: Site, paths, one_hop: Tensor) -> dict[str, Probes]:
    """Other facts near an edited one: with its head ("same_subject"), its relation ("same_relation"), or the place of
    its largest key entry, on the row that the row edit changes ("same_row")."""
    probes, (head, relation, _) = {}, paths.facts.T
    for name, group in ("same_subject", head), ("same_relation", relation), ("same_row", at.keys.abs().argmax(-1)):
        i, row = (group[requests.fact][:, None] == group).nonzero(as_tuple=True)
        keep = row != requests.fact[i]
        probes[name] = Probes(i[keep], queries(paths)[row[keep]], one_hop[row[keep]])
    return probes

def address_overlap(model: nn.Module, at: Site, requests: Requests, probe: Probes, chunk: int = 512) -> float | None:
    """Cosine of the edited fact's key and a composition's, at its last token: largest over calls, mean of probes."""
    cosines = []
    for i, tokens in zip(probe.edit.split(chunk), probe.tokens.split(chunk)):
        keys = record(model, at.layer, tokens)[0][:, :, -1]                      # [call, m, d_in]
        cosines.append(F.cosine_similarity(keys, at.keys[requests.fact[i]], dim=-1).amax(0))
    return float(torch.cat(cosines).mean()) if len(probe.edit) else None

@torch.no_grad()
def answers(model: nn.Module, at: Site, u: Tensor, r: Tensor, probes: Probes, chunk=512, calls=None, held=()) -> Tensor:
    """Answers [m] to the probes, each with its own edit, W + r u^T (at `calls`: `rank_one`). held = (name, call, token,
    basis [m, d, k]): in the span, this state stays as without the edit, our reading of [1]'s held answer subspace."""
    parts = []
    for rows in torch.arange(len(probes.edit), device=u.device).split(chunk):
        i, tokens = probes.edit[rows], probes.tokens[rows]
        with ExitStack() as inside:
            if held:
                name, call, token, basis = held
                before = at_call(model, name, call, tokens)[1][:, token]
                inside.enter_context(interchange(model, name, call, token, before, basis[rows]))
            inside.enter_context(rank_one(at.layer, u[i], r[i], calls))
            parts.append(model(tokens)[:, -1].argmax(-1))
    return torch.cat(parts)

def share_of(hit: Tensor) -> float | None:
    """Share of True in hit [n]; None where there is nothing to count."""
    return int(hit.sum()) / len(hit) if len(hit) else None

def score(model: nn.Module, at: Site, requests: Requests, u: Tensor, r: Tensor, probes: dict[str, Probes]) -> dict:
    """Shares of all edits, None where nothing was asked. direct: edits whose own query has the new answer. Of `probes`:
    hop*, right answers after edits with direct success (`probes_hop*` of them); <name>_moved, others that differ."""
    success = answers(model, at, u, r, requests.questions()) == requests.new
    result = {"n": len(success), "direct": share_of(success)}
    for name, probe in probes.items():
        hit, hop = answers(model, at, u, r, probe) == probe.answer, name.startswith("hop")
        hit = hit[success[probe.edit]] if hop else ~hit
        result |= {name: share_of(hit), f"probes_{name}": len(hit)} if hop else {f"{name}_moved": share_of(hit)}
    return result

# --- Locate: which state carries an answer ----------------------------------------------------------------------------
# A state is what a module, by name, returns at one of its calls, at one token. What it carries shows when it is
# interchanged between two runs [2]; that the other run differs in one token is after Wang et al. 2024, 2405.15071.

def interchange(model: nn.Module, name: str, call: int, token: int, other: Tensor, basis: Tensor | None = None):
    """Inside, for one forward pass, the state (name, call, token) is that of another run, other [batch, d]; with basis
    [batch, d, k] of orthonormal columns only its component in their span is, x <- x + B B^T (x_other - x)."""
    def change(_, x):
        mine = x[:, token]                                                       # [batch, d]
        new = other if basis is None else mine + (basis @ (basis.mT @ (other - mine)[..., None]))[..., 0]
        return torch.cat([x[:, :token], new[:, None], x[:, token + 1:]], 1)
    return intervene(model.get_submodule(name), change, calls=[call])

@torch.no_grad()
def trace(model: nn.Module, clean: Tensor, corrupted: Tensor, answer: Tensor, sites: list, each: bool = False):
    """Causal tracing: the corrupted run with one state of the clean run, for each (name, call) of `sites` and token.
    clean, corrupted [n, token]; answer [n] of the clean run, at the last token. Returns whether it is back and the rise
    of its probability: means [site, token], with `each` [site, token, n]. ValueError: no pairs, a site not called."""
    if clean.shape != corrupted.shape or not len(clean):
        raise ValueError(f"prompts must pair up, one pair at least, got {list(clean.shape)}, {list(corrupted.shape)}")
    probability = lambda logits: logits.softmax(-1).gather(-1, answer[:, None])[:, 0]
    before = probability(model(corrupted)[:, -1])
    back, rise = torch.zeros(2, len(sites), *clean.T.shape, dtype=torch.float64)
    for i, (name, call) in enumerate(sites):
        for token, value in enumerate(at_call(model, name, call, clean)[1].unbind(1)):
            with interchange(model, name, call, token, value):
                logits = model(corrupted)[:, -1]
            back[i, token] = logits.argmax(-1) == answer
            rise[i, token] = probability(logits) - before
    return (back, rise) if each else (back.mean(-1), rise.mean(-1))

@torch.no_grad()
def lens(model: nn.Module, tokens: Tensor, wanted: Tensor, sites: list, unembed) -> tuple[Tensor, Tensor]:
    """Logit lens: rank (0: the first; ties count against it) and probability, each [site, token, n], of wanted [n] in
    the logits that the function unembed makes of a state [n, token, d], for each (name, call) of `sites`."""
    found = []
    for name, call in sites:
        logits = unembed(at_call(model, name, call, tokens)[1])
        mine = logits.gather(-1, wanted[:, None, None].expand(-1, logits.shape[1], 1))
        found.append(((logits >= mine).sum(-1).T - 1, (mine[..., 0] - logits.logsumexp(-1)).exp().T))
    return tuple(map(torch.stack, zip(*found)))

@torch.no_grad()
def swapped(model: nn.Module, tokens: Tensor, other: Tensor, name: str, call: int, token: int, basis=None) -> Tensor:
    """The answers [n] to `tokens` with the state (name, call, token) of the prompts `other` [n, token], with a basis
    [n, d, k] the part in its span alone (see `interchange`)."""
    with interchange(model, name, call, token, at_call(model, name, call, other)[1][:, token], basis):
        return model(tokens)[:, -1].argmax(-1)

def span(*vectors: Tensor) -> Tensor:
    """Orthonormal basis [batch, d, k] of the span of k vectors [batch, d] each."""
    return torch.linalg.qr(torch.stack(vectors, -1)).Q

def complement(basis: Tensor) -> Tensor:
    """Orthonormal basis [batch, d, d - k] of what is orthogonal to a basis [batch, d, k]."""
    return torch.linalg.qr(basis, mode="complete").Q[..., basis.shape[-1]:]
