"""edit.py: a linear layer is an associative memory; an edit is a small closed-form change of it.

A layer W [d_out, d_in] that is handed a key k returns the value W k. To change what it returns for
one key and, as far as possible, nothing else, add a rank-one matrix r u^T with u k = 1. The row
edit and ROME differ in u, which must recognise the key:

    row    dW = r e_j^T / k_j             j = argmax |k_j|. One column of W, one slot [1]
    ROME   dW = r (P k)^T / (k^T P k)     P = C^-1, C: second moment of the layer's usual keys [2]

with r = v* - W k, what is missing from the wanted value v*. For n keys at once, the rows of K, and
n residuals, the rows of R:

    EMMET      dW = R^T (K P K^T)^-1 K P            P = C^-1: every value exactly; ROME is n = 1 [5]
    MEMIT      dW = R^T (K P K^T + lam I)^-1 K P    P = C^-1: least squares, lam weighs C [4]
    AlphaEdit  dW = R^T (K P K^T + lam I)^-1 K P    P projects on the null space of C [6]

Each `..._update` checks what it is about to return against what it promises. The wanted value v* is
the mean value that the layer returns for known facts with the wanted answer (prototype: closed form
end to end), or r comes by gradient descent on -log p(wanted answer) of the model with the edit in
place (gradient) [2].

    >>> W, C = torch.eye(2).double(), torch.diag(torch.tensor([1.0, 4.0])).double()
    >>> k, v = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 6.0]).double()
    >>> rome_update(W, C, k, v)  # v - W k = (0, 4), C^-1 k = (1, 1/2), k^T C^-1 k = 2
    tensor([[0., 0.],
            [2., 1.]], dtype=torch.float64)
    >>> row_update(k, v - W @ k)  # the largest entry of k is k_1 = 2
    tensor([[0., 0.],
            [0., 2.]], dtype=torch.float64)
    >>> K, R = torch.tensor([[1.0, 2], [1, -2]]).double(), torch.tensor([[0.0, 2], [2, 0]]).double()
    >>> emmet_update(K, R, C)  # K C^-1 = [[1, 1/2], [1, -1/2]], K C^-1 K^T = 2 I: R^T K C^-1 / 2
    tensor([[ 1.0000, -0.5000],
            [ 1.0000,  0.5000]], dtype=torch.float64)
    >>> memit_update(K, R, C, lam=2.0)  # R^T K C^-1 / (2 + 2): half of each residual is written
    tensor([[ 0.5000, -0.2500],
            [ 0.5000,  0.2500]], dtype=torch.float64)

K: keys [n, d_in]; R: residuals [n, d_out]; C: `second_moment` E[k k^T] [d_in, d_in]; lam: its
weight. A **site** is a linear layer by name and the number of its call in a forward pass. The file
needs torch alone, and any model called as `model(tokens) -> logits [batch, token, answers]`
(`Adapted` makes others so). Layers are `nn.Linear` or anything that maps by a 2-D weight, either
way round; W and dW are [d_out, d_in] throughout, and values are without the bias. A weight in
bfloat16 keeps two digits, so that of a small edit a part is lost where it is added:
diagnostics["residual_left"] of an update that is handed W tells how much.

[1] Niu 2026, arXiv 2606.20737 (the single-row edit).
[2] Meng et al. 2022, ROME, arXiv 2202.05262, equation 2.
[3] Gupta et al. 2024, arXiv 2403.07175: two different keys in one ROME update make disabling edits;
    here there is one.
[4] Meng et al. 2022, MEMIT, arXiv 2210.07229, equation 14.
[5] Gupta et al. 2024, EMMET, arXiv 2403.14236.   [6] Fang et al. 2024, AlphaEdit, arXiv 2410.02355.
"""

from collections.abc import Collection
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- One fact: float64 inside, the result in the dtype of the weights or residuals ---------------


def double(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its device has none (MPS)."""
    device = "cpu" if x.device.type == "mps" else x.device
    return x.detach().to(device, torch.float64)


def row_direction(K: Tensor) -> Tensor:
    """u = e_j / k_j with j = argmax |k_j|, for every row of K [n, d_in]; u k = 1."""
    K = double(K)
    j = K.abs().argmax(-1, keepdim=True)
    return torch.zeros_like(K).scatter(-1, j, 1 / K.gather(-1, j))


def row_update(k: Tensor, r: Tensor, diagnostics: dict | None = None) -> Tensor:
    """dW [d_out, d_in] that changes one column, at the entry of k [d_in] of largest magnitude, so
    that dW k = r [d_out] [1]. Raises ValueError for a bad request (`check_requests`)."""
    K, R = k[None], r[None]
    check_requests(K, R)
    dW = torch.outer(double(r), row_direction(K)[0])
    check_values(dW, K, R)
    return finish(dW, r, K, R, None, diagnostics)


def second_moment(K: Tensor) -> Tensor:
    """C = mean over the rows of k k^T, uncentred: [..., d_in] -> [d_in, d_in], float64 ([2], below
    equation 2). Raises ValueError where there is no key or one that is not finite."""
    return add_gram(None, K) / K.shape[:-1].numel()


class Whitening(NamedTuple):
    """C + ridge I = L L^T. With keys in whitened coordinates, X = K L^-T, ordinary ones have the
    second moment I and K C^-1 K^T = X X^T: the wide spectrum of C is in L alone. No inverse is
    formed."""

    C: Tensor  # [d_in, d_in], without the ridge
    L: Tensor  # [d_in, d_in], lower triangular
    ridge: float

    def keys(self, K: Tensor) -> Tensor:
        """X = K L^-T [n, d_in] of the keys K [n, d_in]."""
        return torch.linalg.solve_triangular(self.L, double(K).T, upper=False).T

    def back(self, Y: Tensor) -> Tensor:
        """L^-T Y [d_in, m]."""
        return torch.linalg.solve_triangular(self.L.T, Y, upper=True)

    def directions(self, X: Tensor) -> Tensor:
        """C^-1 k as rows [n, d_in], of whitened keys X [n, d_in]."""
        return self.back(X.T).T


def whiten(C: Tensor | Whitening) -> Whitening:
    """By Cholesky, once for all updates that are handed the result for C. Where C is numerically
    singular (dead or dependent inputs), only there, a ridge of 1e-8 trace(C) / d_in is added to its
    diagonal. Raises ValueError where C is no second moment: not symmetric, a negative eigenvalue,
    all zeros, NaN."""
    if isinstance(C, Whitening):
        return C
    C = double(C)
    check_symmetric(C)
    if not torch.equal(C, C.T):
        C = (C + C.T) / 2  # Cholesky reads one triangle, the check of an update reads both
    for ridge in ridges(C):
        shifted = C
        if ridge:
            shifted = C.clone()
            shifted.diagonal().add_(ridge)
        L, failed = torch.linalg.cholesky_ex(shifted)
        if not failed and (ridge or not is_singular(L)):
            return Whitening(C, L, ridge)
    raise ValueError("C is no second moment: an eigenvalue is negative, or all are 0 or not finite")


def check_symmetric(C: Tensor):
    """ValueError unless C [d_in, d_in] is its own transpose, up to the rounding of float32 sums."""
    if not (C - C.T).abs().max() <= 1e-3 * C.abs().max():
        raise ValueError("C must be symmetric and finite: the second moment E[k k^T] of keys")


def rome_direction(white: Whitening, K: Tensor, lam: float = 0.0) -> Tensor:
    """u = C^-1 k / (k^T C^-1 k + lam) for the rows of K [n, d_in]: ROME, where u k = 1, and with a
    lam MEMIT of one request."""
    K = double(K)
    U = white.directions(white.keys(K))
    return U / ((U * K).sum(-1, keepdim=True) + lam)


def rome_update(
    W: Tensor, C: Tensor | Whitening, k: Tensor, v: Tensor, diagnostics: dict | None = None
) -> Tensor:
    """dW = (v - W k) (C^-1 k)^T / (k^T C^-1 k), so that (W + dW) k = v: ROME [2], equation 2, with
    one key [3]. W [d_out, d_in], C [d_in, d_in], k [d_in], v [d_out] -> dW [d_out, d_in]: of all
    that write v at k the one that changes ordinary values least. `diagnostics` gets the ridge and
    `outcome`. Raises ValueError for a bad request (`check_requests`)."""
    check_requests(k[None], v[None], C, W)
    white = whiten(C)
    r = double(v) - double(W) @ double(k)
    K, R = k[None], r[None]
    dW = torch.outer(r, rome_direction(white, K)[0])
    check_values(dW, K, R)
    return finish(dW, W, K, R, W, diagnostics, ridge=white.ridge)


def rome_sequence(
    W: Tensor, C: Tensor | Whitening, K: Tensor, V: Tensor, diagnostics: dict | None = None
) -> Tensor:
    """ROME for one request after another, each on the weight that the last one left: the sum of the
    updates. Only the last is sure to hold. As `rome_update`, with K [n, d_in] and V [n, d_out]."""
    check_requests(K, V, C, W)
    white = whiten(C)
    K, V, before = double(K), double(V), double(W)
    now = before.clone()
    for keys, values in zip(K.split(1024), V.split(1024)):
        for k, v, u in zip(keys, values, rome_direction(white, keys)):
            now.addr_(v - now @ k, u)  # W <- W + (v - W k) u^T
    dW, R = now - before, V - K @ before.T
    check_values(dW, K, R, first=len(K) - 1)
    return finish(dW, W, K, R, W, diagnostics, ridge=white.ridge)


# --- Many facts in one update: dW = R^T (K P K^T + lam I)^-1 K P ----------------------------------


def emmet_update(
    K: Tensor,
    R: Tensor,
    C: Tensor | Whitening,
    *,
    W: Tensor | None = None,
    diagnostics: dict | None = None,
) -> Tensor:
    """dW = R^T (K C^-1 K^T)^-1 K C^-1, so that dW k = r for every request: EMMET [5], ROME for n
    facts at once. K [n, d_in], R [n, d_out], C [d_in, d_in] -> dW [d_out, d_in]. Raises ValueError
    for a bad request, for keys that coincide or nearly depend on each other, and for more requests
    than the keys have rank. `diagnostics` gets ridge, `outcome` (of W, if given) and `diagnose`."""
    check_requests(K, R, C, W)
    n, d_in = K.shape
    if n > d_in:
        raise ValueError(
            f"{n} requests exceed the rank of their keys, at most {d_in}; use memit_update"
        )
    white = whiten(C)
    X = white.keys(K)  # X X^T = K C^-1 K^T
    Z = solve_gram(X, 0.0, double(R))  # X X^T Z = R
    dW = white.back(X.T @ Z).T
    check_values(dW, K, R, X)
    dW = finish(dW, R, K, R, W, diagnostics, ridge=white.ridge)
    if diagnostics is not None:
        diagnostics |= diagnose(R, X, white.directions(X), lam=0.0, dual=True)
    return dW


def memit_update(
    K: Tensor,
    R: Tensor,
    C: Tensor | Whitening,
    lam: float,
    *,
    form: str | None = None,
    carried: Tensor | None = None,
    W: Tensor | None = None,
    diagnostics: dict | None = None,
) -> Tensor:
    """dW = R^T K (lam C + K^T K)^-1, the minimum of sum |r - dW k|^2 + lam E |dW k_ordinary|^2:
    MEMIT [4], equation 14. K [n, d_in], R [n, d_out], C [d_in, d_in], lam > 0 -> dW [d_out, d_in].
    C is a mean: all ordinary keys together weigh as much as lam requests. Keys may coincide. `form`
    is "dual", "primal" or None, the smaller system, with keys in whitened coordinates; or "direct",
    the equation as it stands, for wide layers and a C that is symmetric to the last digit
    (`direct_update`). `carried`, K_p^T K_p [d_in, d_in] of all keys written before, is added to
    lam C: with residuals on W as edited so far, batches one after another add up to the update of
    all at once. Raises ValueError for a bad request. `diagnostics` gets the ridge, `outcome` (of W,
    if given) and, but for "direct", `diagnose`."""
    if form not in (None, "primal", "dual", "direct"):
        raise ValueError(
            f"form must be 'primal', 'dual', 'direct' or None for the smaller system, got {form!r}"
        )
    check_requests(K, R, C, W, lam, carried)
    if carried is not None:
        C = torch.add(moment_of(C), double(carried), alpha=1 / lam)
    if form == "direct":
        return direct_update(K, R, moment_of(C), lam, W, diagnostics)
    white = whiten(C)
    X = white.keys(K)  # whitened: lam C + K^T K = L (lam I + X^T X) L^T
    dual = is_dual(X) if form is None else form == "dual"
    dW = white.back(least_squares(X, double(R), lam, dual)).T
    check_normal_equations(dW, K, R, white.C, lam, white.ridge)
    dW = finish(dW, R, K, R, W, diagnostics, ridge=white.ridge)
    if diagnostics is not None:
        diagnostics |= diagnose(R, X, white.directions(X), lam, dual)
    return dW


def direct_update(
    K: Tensor, R: Tensor, C: Tensor, lam: float, W: Tensor | None, diagnostics: dict | None
) -> Tensor:
    """`memit_update` by Cholesky of A = lam C + K^T K itself and one step of refinement: d_in^3 / 3
    operations and one matrix [d_in, d_in] beside C; whitening costs about four times as much. It
    loses the digits of A's condition; what is left is checked. Of the diagnostics "ridge" and
    `outcome`: the others would cost more than the update."""
    L, ridge = factored(K, C, lam)
    K = sparse(K)
    rhs = K.T @ double(R)  # [d_in, d_out]
    Y = solve_factored(L, rhs)  # dW^T = (lam C + K^T K)^-1 K^T R
    left = rhs - lam * (C @ Y + ridge * Y) - K.T @ (K @ Y)
    Y = Y + solve_factored(L, left)
    dW = Y.T
    check_normal_equations(dW, K, R, C, lam, ridge)
    return finish(dW, R, K, R, W, diagnostics, ridge=ridge)


def alphaedit_update(
    K: Tensor,
    R: Tensor,
    C: Tensor,
    lam: float,
    *,
    threshold: float = 1e-2,
    absolute: bool = False,
    spectrum: tuple[Tensor, Tensor] | None = None,
    W: Tensor | None = None,
    diagnostics: dict | None = None,
) -> Tensor:
    """dW = R^T K P (P K^T K P + lam I)^-1 with P the projection on the null space of C: AlphaEdit
    [6], for one batch. K [n, d_in], R [n, d_out], C [d_in, d_in] -> dW [d_out, d_in]; lam > 0 in
    squared lengths of a key. The null space is that of eigenvalues of C below bound = threshold *
    trace(C) / d_in (ours) or, `absolute`, below the threshold itself (the paper's code); over
    ordinary keys E |dW k|^2 <= bound * |dW|^2. diagnostics["null_space"] is its dimension.
    `spectrum`: what torch.linalg.eigh returns for C, eigenvalues ascending, where several updates
    share it. The paper's term for earlier edits is left out. Raises ValueError where the null space
    is empty and for a bad request. `diagnostics` gets `outcome` (of W, if given) and `diagnose`,
    too."""
    check_requests(K, R, C, W, lam)
    if spectrum is None:
        check_symmetric(double(C))
        spectrum = torch.linalg.eigh(double(C))
    eigenvalues, eigenvectors = double(spectrum[0]), double(spectrum[1])
    check_shape("the matrix of eigenvectors", eigenvectors, *C.shape)
    check_shape("the row of eigenvalues", eigenvalues[None], 1, len(C))
    bound = threshold if absolute else threshold * float(eigenvalues.mean())
    U = eigenvectors[:, eigenvalues < bound]  # P = U U^T  [d_in, m]
    if U.shape[1] == 0:
        raise ValueError(
            f"the null space of C is empty: its smallest eigenvalue is {eigenvalues[0]:.3g}, not "
            f"below {bound:.3g}; raise the threshold or use memit_update"
        )
    X = sparse(K) @ U  # K P = X U^T
    dual = is_dual(X)
    dW = (U @ least_squares(X, double(R), lam, dual)).T
    check_normal_equations(dW @ U, X, R, None, lam)
    dW = finish(dW, R, K, R, W, diagnostics, ridge=0.0, null_space=U.shape[1])
    if diagnostics is not None:
        diagnostics |= diagnose(R, X, X @ U.T, lam, dual)
    return dW


# --- The linear algebra of the updates -----------------------------------------------------------


SPARSE = 32  # keys are used as sparse ones where 1 in so many entries, at most, is not 0


def add_gram(total: Tensor | None, K: Tensor) -> Tensor:
    """total + K^T K for keys K [..., d_in], in place where there is a total, float64; of sparse
    keys by the entries alone that are not 0. Raises ValueError as `second_moment`."""
    if K.dim() < 2 or K.numel() == 0:
        raise ValueError(f"keys must be [n, d_in] with n >= 1, got shape {list(K.shape)}")
    K = K.flatten(0, -2)
    if not all(part.isfinite().all() for part in K.split(1024)):
        raise ValueError("keys must be finite; look for inf or nan in weights and inputs")
    if total is None:
        total = double(K[:1]).new_zeros(K.shape[1], K.shape[1])
    most = max(int(part.count_nonzero(1).max()) for part in K.split(1024))
    if SPARSE * most <= K.shape[1]:
        return add_sparse_gram(total, K, most)
    K = double(K)
    return total.addmm_(K.T, K)


def add_sparse_gram(total: Tensor, K: Tensor, m: int) -> Tensor:
    """`add_gram` where at most m entries of a key of K [n, d_in] are not 0 (64 winners of 2048
    slots or more), by the products of these: m^2 a key, not d_in^2."""
    in_rows = total if total.is_contiguous() else total.mT  # K^T K is symmetric
    flat = in_rows.view(-1)
    chunk = max(1, min(1024, 2**22 // max(1, m) ** 2))  # 32 MiB of products
    for part in K.split(chunk):
        is_entry = (part != 0).byte()
        place = is_entry.topk(m).indices  # [key, m], all entries that are not 0
        value = double(part.gather(1, place))
        place = place.to(total.device)
        products = value[:, :, None] * value[:, None]  # [key, m, m]
        where = place[:, :, None] * len(total) + place[:, None]
        flat.index_add_(0, where.flatten(), products.flatten())
    return total


def sparse(K: Tensor) -> Tensor:
    """The keys K [n, d_in] in float64, for products with matrices: as a sparse tensor where they
    are sparse."""
    K = K.detach().to(double(K[:1]).device)
    return double(K.to_sparse() if SPARSE * K.count_nonzero() <= K.numel() else K)


def moment_of(C: Tensor | Whitening) -> Tensor:
    return C.C if isinstance(C, Whitening) else double(C)


def is_singular(L: Tensor) -> bool:
    """Whether L L^T is numerically singular, by the pivots of its factorisation."""
    pivots = L.diagonal().square()
    # not a <= b, so that NaN counts, too (as in the checks below)
    return not pivots.min() > len(L) * torch.finfo(L.dtype).eps * pivots.max()


def ridges(C: Tensor) -> list[float]:
    """What to try on the diagonal of C: 0, then 1e-8 of its mean; the latter alone where an entry
    of the diagonal is 0, since no factorisation can then succeed without."""
    ridge = 1e-8 * float(C.diagonal().mean())
    return [0.0, ridge] if C.diagonal().all() else [ridge]


def factored(K: Tensor, C: Tensor, lam: float) -> tuple[Tensor, float]:
    """The Cholesky factor of lam C + K^T K, and the ridge of C that it took, as in `whiten`."""
    for ridge in ridges(C):
        A = None  # frees the matrix of a first trial before the next one is made
        A = add_gram(lam * C, K).mT  # in columns, as LAPACK has it: no copy is made
        A.diagonal().add_(lam * ridge)
        failed = torch.zeros((), dtype=torch.int32, device=A.device)
        torch.linalg.cholesky_ex(A, out=(A, failed))  # in place: A may fill half of the memory
        if not failed and (ridge or not is_singular(A)):
            return A, ridge
    raise ValueError("lam C + K^T K has a negative eigenvalue, so that C is no second moment")


def solve_factored(L: Tensor, rhs: Tensor) -> Tensor:
    """(L L^T)^-1 rhs, without the copy of L that torch.cholesky_solve makes."""
    half = torch.linalg.solve_triangular(L, rhs, upper=False)
    return torch.linalg.solve_triangular(L.mT, half, upper=True)


def is_dual(X: Tensor) -> bool:
    """Whether the dual system, of the size of the number of requests, is the smaller one."""
    return X.shape[0] <= X.shape[1]


def solve_gram(X: Tensor, lam: float, rhs: Tensor) -> Tensor:
    """Z with (X X^T + lam I) Z = rhs, by Cholesky and, where that is off by more than PROMISE, one
    step of iterative refinement. What is left is measured on X (X^T Z), which rounds less than the
    product X X^T does. Raises ValueError with the reason where the system is numerically
    singular."""
    gram = X @ X.T
    gram.diagonal().add_(lam)
    L, failed = torch.linalg.cholesky_ex(gram)
    lost = L.diagonal().square() <= max(X.shape) * torch.finfo(L.dtype).eps * gram.diagonal()
    if failed or lost.any():
        raise ValueError(why_singular(X, lam))
    Z = torch.cholesky_solve(rhs, L)
    left = rhs - X @ (X.T @ Z) - lam * Z
    if left.norm() > PROMISE * rhs.norm():
        Z = Z + torch.cholesky_solve(left, L)
    return Z


def least_squares(X: Tensor, R: Tensor, lam: float, dual: bool) -> Tensor:
    """Y [d, d_out], the minimum of |R - X Y|^2 + lam |Y|^2, by the dual system, of the size of the
    number of requests, or the primal one, of the size of a key. X [n, d], R [n, d_out]."""
    if not dual:  # Y = (X^T X + lam I)^-1 X^T R
        return solve_gram(X.T, lam, X.T @ R)
    Y = X.T @ solve_gram(X, lam, R)  # Y = X^T (X X^T + lam I)^-1 R
    left = X.T @ (R - X @ Y) - lam * Y
    if left.norm() > 1e-3 * PROMISE * (X.T @ R).norm():
        # one step of refinement, by (X^T X + lam I)^-1 = (I - X^T (X X^T + lam I)^-1 X) / lam
        Y = Y + (left - X.T @ solve_gram(X, lam, X @ left)) / lam
    return Y


# --- What an update promises, and why it may not hold ---------------------------------------------

PROMISE = 1e-7  # in float64, relative to the residuals; a rounded update: sqrt(eps) of its dtype


def check_requests(
    K: Tensor,
    R: Tensor,
    C: Tensor | Whitening | None = None,
    W: Tensor | None = None,
    lam: float | None = None,
    carried: Tensor | None = None,
):
    """ValueError that names the shapes that clash, or the first request that cannot be used. None:
    what the method does not have."""
    if K.dim() != 2 or R.dim() != 2 or len(K) != len(R) or len(K) == 0:
        raise ValueError(
            "keys must be [n, d_in] and residuals or values [n, d_out] for n >= 1 requests, "
            f"vectors for one alone, got {list(K.shape)} and {list(R.shape)}"
        )
    d_in, d_out = K.shape[1], R.shape[1]
    C = C.C if isinstance(C, Whitening) else C
    check_shape("C", C, d_in, d_in)
    check_shape("W", W, d_out, d_in)
    check_shape("carried", carried, d_in, d_in)
    if carried is not None and not carried.isfinite().all():
        raise ValueError("carried must be finite: the sum of k k^T over earlier keys")
    if C is not None and not (C.isfinite().all() and double(C.diagonal()).sum() > 0):
        raise ValueError("C must be finite with a positive trace: the second moment of keys")
    if lam is not None and not 0 < lam < float("inf"):
        raise ValueError(
            f"lam must be positive, got {lam}; emmet_update writes every value exactly"
        )
    check_each(K.isfinite().all(1), "its key holds a value that is not finite")
    check_each(R.isfinite().all(1), "its residual or value holds a value that is not finite")
    check_each((K != 0).any(1), "its key is zero, for which W k is 0 whatever W is; leave it out")


def check_shape(name: str, matrix: Tensor | None, height: int, width: int):
    if matrix is not None and matrix.shape != (height, width):
        raise ValueError(f"{name} must be [{height}, {width}], got {list(matrix.shape)}")


def check_each(good: Tensor, why: str):
    """ValueError with the reason and the first request that is not `good` [n]."""
    if not good.all():
        raise ValueError(f"request {int((~good).nonzero()[0])}: {why}")


def check_values(dW: Tensor, K: Tensor, R: Tensor, X: Tensor | None = None, first: int = 0):
    """ValueError unless dW k = r for every request from the `first` on, up to PROMISE of the mean
    |r| of all. X: the whitened keys, which tell why."""
    left = (double(R) - double(K) @ dW.T).norm(dim=-1)[first:]
    size = double(R).norm(dim=-1).mean()
    if not left.max() <= PROMISE * size:
        why = "C is too ill-conditioned for its key" if X is None else why_singular(X, 0.0)
        which = first + int(left.argmax())
        raise ValueError(f"request {which} is not written to {PROMISE:g}: {why}")


def check_normal_equations(
    dW: Tensor, K: Tensor, R: Tensor, C: Tensor | None, lam: float, ridge: float = 0.0
):
    """ValueError unless dW (lam (C + ridge I) + K^T K) = R^T K, up to PROMISE of its right-hand
    side; C None: I. K may be a sparse tensor."""
    K, R = double(K), double(R)
    wanted = (K.T @ R).T  # [d_out, d_in]
    ordinary = dW if C is None else dW @ C
    left = wanted - lam * (ordinary + ridge * dW) - (K.T @ (K @ dW.T)).T
    if not left.norm() <= PROMISE * wanted.norm():
        raise ValueError(
            f"the update solves its equations to {left.norm() / wanted.norm():.2g} only, not to "
            f"{PROMISE:g}: C is too ill-conditioned, or lam {lam:.3g} too small or too large"
        )


def rounded(dW: Tensor, like: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """dW in the dtype and on the device of `like`. ValueError where it does not fit, or where
    rounding changes what it writes for a request by more than sqrt(eps) of the mean |r|."""
    result = cast(dW, like)
    change = (double(K) @ (double(result).to(dW.device) - dW).T).norm(dim=-1)
    size = double(R).norm(dim=-1).mean()
    if not change.max() <= torch.finfo(result.dtype).eps ** 0.5 * size:
        raise ValueError(
            f"request {int(change.argmax())}: rounding the update to {result.dtype} changes what "
            f"it writes by {float(change.max() / size):.2g} of the residual; use a wider dtype"
        )
    return result


def cast(matrix: Tensor, like: Tensor) -> Tensor:
    """A float64 matrix in the dtype and on the device of `like`; ValueError where that loses it."""
    dtype = like.dtype if like.is_floating_point() else matrix.dtype
    result = matrix.to(like.device, dtype)
    error = (double(result).to(matrix.device) - matrix).abs().max()
    size = matrix.abs().max()
    kind = torch.finfo(dtype)
    if not error <= 4 * kind.eps * size + kind.tiny:
        raise ValueError(
            f"a matrix with entries up to {size:.3g} does not fit {dtype}: off by {error:.3g}"
        )
    return result


def why_singular(X: Tensor, lam: float) -> str:
    """What makes X X^T + lam I numerically singular, X [n, d]; rows are requests if lam = 0."""
    if lam:
        trace = float(X.square().sum())
        return f"lam {lam:.3g} is lost in rounding beside K P K^T, of trace {trace:.3g}; raise it"
    remedy = "not every value can be written; use memit_update or leave a request out"
    cosine, i, j = largest_cosine(X)
    if cosine > 1 - 1e-12:
        return f"requests {i} and {j} have the same key up to a factor, so that {remedy}"
    return (
        f"the rank of the keys is, to rounding, less than {len(X)}, their number, so that {remedy}"
    )


def outcome(dW: Tensor, K: Tensor, R: Tensor, W: Tensor | None = None) -> dict:
    """Of the update as it is returned: "residual_left" [n], |r - dW k| of each request. With W at
    hand dW is first replaced by what arrives in it, W + dW rounded as W is, less W, and there is
    "relative_norm", |dW| / |W|. K may be a sparse tensor."""
    written, found = double(dW), {}
    if W is not None:
        before = double(W)
        found["relative_norm"] = float(written.norm() / before.norm())
        written = double(cast(before + written.to(before.device), W)) - before
    left = double(R) - double(K) @ written.T
    return {"residual_left": left.norm(dim=-1)} | found


def finish(
    dW: Tensor, like: Tensor, K: Tensor, R: Tensor, W: Tensor | None, notes: dict | None, **more
) -> Tensor:
    """dW `rounded` as `like`; `notes`, where they are asked for, get its `outcome` and `more`."""
    dW = rounded(dW, like, K, R)
    if notes is not None:
        notes |= outcome(dW, K, R, W) | more
    return dW


def diagnose(R: Tensor, X: Tensor, directions: Tensor, lam: float, dual: bool) -> dict:
    """Of the system that was solved, K P K^T + lam I = X X^T + lam I or, not dual, X^T X + lam I
    (R [n, d_out], X [n, d]; the directions [n, d_in] are P k):
    "condition"            condition number of the system solved
    "residual_predicted"   [n] norms of the rows of lam (K P K^T + lam I)^-1 R: what must be left
    "largest_cosine"       largest |cosine| between the directions P k of two requests"""
    system = X @ X.T if dual else X.T @ X
    system.diagonal().add_(lam)
    eigenvalues = torch.linalg.eigvalsh(system).abs()
    if dual:
        left = lam * solve_gram(X, lam, double(R))
    else:  # by Woodbury's identity: R - X (X^T X + lam I)^-1 X^T R
        left = double(R) - X @ solve_gram(X.T, lam, X.T @ double(R))
    return {
        "condition": float(eigenvalues.max() / eigenvalues.min()),
        "residual_predicted": left.norm(dim=-1),
        "largest_cosine": largest_cosine(directions)[0],
    }


def largest_cosine(U: Tensor, chunk: int = 512) -> tuple[float, int, int]:
    """The largest |cosine| between two rows of U [n, d], and which two; (0.0, 0, 0) for n = 1."""
    U = U / U.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(U.dtype).tiny)
    best = (0.0, 0, 0)
    for start in range(0, len(U), chunk):
        cosines = (U[start : start + chunk] @ U[start:].T).abs_().triu_(1)  # each pair once
        value, place = cosines.flatten().max(0)
        i, j = divmod(int(place), len(U) - start)
        best = max(best, (float(value), start + i, start + j))
    return best


# --- Models of others -----------------------------------------------------------------------------


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
    """The layer of that name, which way round it is found by asking it. ValueError where there is
    none, where it is no linear layer, where its weight is computed, so that what is written there
    would be lost, where another module uses it too, or where it is not finite."""
    root = model.get_submodule("")  # of an `Adapted` the model within, whose names these are
    try:
        module = root.get_submodule(name)
    except AttributeError:
        names = [n for n, module in root.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(f"{name} is no layer of the model; such are {names[:8]}") from None
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"{name} has no weight [d_out, d_in] among its parameters; a weight that is computed "
            "(weight_norm, pruning, ...) has to be made a parameter before it can be edited"
        )
    if not weight.isfinite().all():
        raise ValueError(f"the weight of {name} holds a value that is not finite")
    for other, user in root.named_modules():
        if user is not module and any(same_memory(p, weight) for p in user._parameters.values()):
            raise ValueError(
                f"{name} shares its weight with {other}: an edit would change both; give one of "
                "them a copy first"
            )
    with evaluation_mode(module):
        for matrix in (weight, weight.mT):
            layer = Layer(module, weight, matrix)
            if layer.returns(any_input(layer)):
                return layer
    raise ValueError(f"{name} is no linear layer: it does not map what it is handed by its weight")


def same_memory(p: Tensor | None, weight: Tensor | None) -> bool:
    """Whether a parameter is the weight, or lies in the same place."""
    if p is None or weight is None:
        return False
    return p is weight or p.data_ptr() == weight.data_ptr() != 0


class Adapted(nn.Module):
    """Any model as it is called here, adapted(tokens) -> logits, by call(model, tokens); names of
    layers are the model's own: Adapted(gpt2, lambda m, t: m(input_ids=t, attention_mask=t != PAD)).
    """

    def __init__(self, model: nn.Module, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, tokens: Tensor):
        return self.call(self.model, tokens)

    def get_submodule(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)


def logits_of(output) -> Tensor:
    """The logits [batch, token, answers] of what a model returns: a tensor, an object with
    `.logits`, or a tuple or list that begins with them. TypeError for anything else."""
    found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        kind = (
            f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        )
        raise TypeError(
            "the model must return logits [batch, token, answers], a tuple that begins with them "
            f"or an object with .logits, not {kind}; use edit.Adapted"
        )
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


# --- Putting an edit into a model -----------------------------------------------------------------


@torch.no_grad()
def apply_edit(model: nn.Module, updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add updates {layer name: dW [d_out, d_in]} to the weights for good; returns the old weights,
    for `restore`. ValueError, and no change, where an update is not finite, not of the weight's
    shape, or the sum does not fit the weight's dtype; where the layer, asked afterwards, does not
    return what was written."""
    old = {}
    try:
        for name, dW in updates.items():
            layer = layer_of(model, name)
            W = layer.matrix
            check_shape(f"the update of {name}", dW, *W.shape)
            if not dW.isfinite().all():
                raise ValueError(f"the update of {name} holds a value that is not finite")
            old[name] = layer.weight.detach().clone()
            # asked for the longest row of dW, an input that dW changes: an old weight would show
            row = double(dW[dW.norm(dim=1).argmax()])
            x = (row / row.abs().max().clamp(min=torch.finfo(row.dtype).tiny)).to(W)
            before = double(W)
            new = cast(before + double(dW).to(before.device), W)
            with evaluation_mode(layer.module):
                is_returned = layer.write(new, x)
            if not is_returned:
                raise ValueError(f"{name} does not return what was written to its weight")
    except BaseException:
        restore(model, old)
        raise
    return old


@torch.no_grad()
def restore(model: nn.Module, old: dict[str, Tensor]):
    """Put back the weights that `apply_edit` returned, bit for bit."""
    for name, weight in reversed(old.items()):  # two names may mean one layer
        model.get_submodule(name).weight.copy_(weight)
    torch.clear_autocast_cache()


@contextmanager
def edited(model: nn.Module, updates: dict[str, Tensor]):
    """`with edited(model, {"memory.values": dW}):` edited inside; bit for bit the old model after
    it, whether the body raised or not."""
    old = apply_edit(model, updates)
    try:
        yield model
    finally:
        restore(model, old)


@contextmanager
def intervene(module: nn.Module, change, calls: Collection[int] | None = None):
    """Inside, the module returns change(input, output), or its own output where that is None, at
    all its calls or at the `calls` given, counted from 0 at the start of the `with` block, which
    then is for one forward pass. Of a module that returns a tuple (a block of GPT-2) the output is
    the first of it. ValueError, at the end, where it had no such call."""
    n_calls = 0

    def hook(_, arguments, keywords, output):
        nonlocal n_calls
        n_calls += 1
        if calls is not None and n_calls - 1 not in calls:
            return None
        first, *others = output if isinstance(output, tuple) else (output,)
        changed = change((*arguments, *keywords.values())[0], first)
        if changed is None or not isinstance(output, tuple):
            return changed
        return (changed, *others)

    with module.register_forward_hook(hook, with_kwargs=True):
        yield
    for call in calls or []:
        check_call(type(module).__name__, call, n_calls)


def rank_one(layer: nn.Module, u: Tensor, r: Tensor, calls: Collection[int] | None = None):
    """Inside, example b of a batch sees its own edit, W + r_b u_b^T, at every call of the layer or
    at the `calls` given (see `intervene`), and W is untouched: u [batch, d_in], r [batch, d_out].
    """

    def change(k, value):  # (W + r u^T) k = W k + r (u k)
        along = torch.einsum("bti,bi->bt", k.to(u), u)
        return value + (along[..., None] * r[:, None]).to(value)

    return intervene(layer, change, calls)


def added(
    layer: nn.Module, r: Tensor, calls: Collection[int] | None, position: Tensor | None = None
):
    """Inside, r_b is added to what the layer returns for example b at its last token, or at its
    `position` [batch], at the `calls` given (see `intervene`): r [batch, d_out]."""

    def change(_, value):
        row = torch.arange(len(value), device=value.device)
        place = torch.full_like(row, value.shape[1] - 1) if position is None else position
        return value.index_put((row, place), r.to(value), accumulate=True)

    return intervene(layer, change, calls)


# --- Reading keys and values ----------------------------------------------------------------------


@torch.no_grad()
def record(model: nn.Module, module: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output (of a layer: keys and values), each [call, batch, token, d], of all calls of
    the module on the tokens. Raises ValueError where it is never called, or where its calls are
    handed different shapes."""
    check_gradients()
    inputs, outputs = [], []

    def keep(key, value):
        inputs.append(key.clone())  # the model may overwrite it
        outputs.append(value.clone())

    with evaluation_mode(model), intervene(module, keep):
        model(tokens)
    if not inputs:
        raise ValueError(
            "the layer is not called when the model reads these tokens (a compiled model does not "
            "tell: use the one that it was made from)"
        )
    shapes = sorted({tuple(key.shape) for key in inputs})
    if len(shapes) > 1:
        raise ValueError(
            f"the layer is handed {shapes} by its calls; each must read all tokens (switch a cache "
            "of keys and values off)"
        )
    return torch.stack(inputs), torch.stack(outputs)


def at_call(model: nn.Module, name: str, call: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output, each [batch, token, d], of the module `name` at one of its calls. Raises
    ValueError where there is no such call."""
    inputs, outputs = record(model, model.get_submodule(name), tokens)
    check_call(name, call, len(inputs))
    return inputs[call], outputs[call]


def check_call(layer: str, call: int, n_calls: int):
    """ValueError unless the layer has a call of that number in a forward pass."""
    if not 0 <= call < n_calls:
        raise ValueError(
            f"{layer} is called {n_calls} time(s) in a forward pass, so there is no call {call}"
        )


def last_token(
    model: nn.Module,
    name: str,
    call: int,
    tokens: Tensor,
    chunk: int = 1024,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `at_call`, at the last token alone, or at the `position` [n] of each prompt: input [n,
    d_in] and output [n, d_out]."""
    if position is None:
        position = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    inputs, outputs = [], []
    for part, place in zip(tokens.split(chunk), position.split(chunk)):
        key, value = at_call(model, name, call, part)
        if key.dim() != 3 or key.shape[:2] != part.shape:
            raise ValueError(f"{name} must be handed [batch, token, d], got {list(key.shape)}")
        row = torch.arange(len(part), device=part.device)
        inputs.append(key[row, place])
        outputs.append(value[row, place])
    return torch.cat(inputs), torch.cat(outputs)


@dataclass
class Moment:
    """C of a layer over several inputs, chunk by chunk: every token counts the same."""

    model: nn.Module
    layer: nn.Module
    chunk: int = 1024
    pad: int | None = None  # a token that does not count
    total: Tensor | None = None  # [d_in, d_in], sum of k k^T
    n: int = 0  # of these keys

    def add(self, tokens: Tensor, call: int | None = None) -> "Moment":
        """Count the keys of tokens [n, token], at one call of the layer or (None) at every call."""
        for part in tokens.split(self.chunk):
            keys, _ = record(self.model, self.layer, part)  # [call, batch, token, d_in]
            if call is not None:
                check_call(type(self.layer).__name__, call, len(keys))
                keys = keys[call : call + 1]
            if self.pad is not None:
                keys = keys[:, part != self.pad]  # [call, token, d_in]
            keys = keys.flatten(0, -2)
            if len(keys):  # else a chunk of padding
                self.total = add_gram(self.total, keys)
                self.n += len(keys)
        return self

    def mean(self) -> Tensor:
        """C [d_in, d_in]. ValueError where no token counts."""
        if not self.n:
            raise ValueError("no token counts: C is a mean over keys")
        return self.total / self.n


# --- Requests and their target values -------------------------------------------------------------


@dataclass
class Requests:
    """n facts to be changed; the query of a fact is answered at its last token."""

    fact: Tensor  # [n] row in the queries that a site is gathered for
    tokens: Tensor  # [n, token] the query
    old: Tensor  # [n] the answer now
    new: Tensor  # [n] the answer wanted
    targets: Tensor | None = None  # [n, token] an answer of several tokens: see `prompts`
    position: Tensor | None = None  # [n] of the token at which the key is read; None: the last

    def __getitem__(self, rows) -> "Requests":
        targets = None if self.targets is None else self.targets[rows]
        position = None if self.position is None else self.position[rows]
        four = (self.fact[rows], self.tokens[rows], self.old[rows], self.new[rows])
        return Requests(*four, targets, position)

    def __len__(self) -> int:
        return len(self.fact)

    def check_distinct(self):
        """ValueError that names both requests where two are for one fact, which cannot have two
        answers at once."""
        first = {}
        for j, fact in enumerate(self.fact.tolist()):
            if fact in first:
                raise ValueError(
                    f"requests {first[fact]} and {j} change the same fact, {fact}; leave one out"
                )
            first[fact] = j


class Prompts(NamedTuple):
    """Prompts of several lengths, each followed by its answer, as a model learns to read them."""

    tokens: Tensor  # [n, token]
    position: Tensor  # [n] of the token whose key stands for the fact
    targets: Tensor  # [n, token] the answer, each token where it is to be answered, -100 elsewhere


def prompts(
    texts: list[list[int]],
    answers: list[list[int]],
    pad: int,
    subject: list[int] | None = None,
    side: str = "right",
) -> Prompts:
    """Prompts and answers, lists of tokens, with padding on a side. `subject`: the place of each
    prompt's last subject token, where ROME reads the key [2]; None: the prompt's last token. With
    padding on the left the model must be told the positions too, or it counts the padding."""
    if not texts:
        raise ValueError("there is no prompt")
    if len(answers) != len(texts):
        raise ValueError(f"there are {len(answers)} answers for {len(texts)} prompts")
    if subject is not None and len(subject) != len(texts):
        raise ValueError(f"there are {len(subject)} subjects for {len(texts)} prompts")
    for i, (text, answer) in enumerate(zip(texts, answers)):
        place = 0 if subject is None else subject[i]
        if not text or not answer or not 0 <= place < len(text):
            raise ValueError(f"prompt {i}: it needs tokens, an answer and a subject within it")
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    width = max(len(text) + len(answer) - 1 for text, answer in zip(texts, answers))
    tokens = torch.full((len(texts), width), pad)
    targets = torch.full((len(texts), width), -100)
    position = torch.zeros(len(texts), dtype=torch.long)
    for i, (text, answer) in enumerate(zip(texts, answers)):
        read = text + answer[:-1]  # the last token of an answer is answered, not read
        start = 0 if side == "right" else width - len(read)
        tokens[i, start : start + len(read)] = torch.tensor(read)
        first = start + len(text) - 1  # here the answer begins
        targets[i, first : first + len(answer)] = torch.tensor(answer)
        position[i] = first if subject is None else start + subject[i]
    return Prompts(tokens, position, targets)


@dataclass
class Site:
    """What an edit needs to know of one layer at one call: gathered once, used by every method."""

    name: str  # of the layer
    call: int  # which of its calls within a forward pass, from 0
    layer: nn.Module
    C: Tensor  # [d_in, d_in] second moment of ordinary keys
    keys: Tensor  # [n_facts, d_in] at the last token of each fact's query
    values: Tensor  # [n_facts, d_out], W k, without a bias
    shrink: float = 0.0  # what C was shrunk by, see `shrunk`


def shrunk(at: Site, shrink: float) -> Site:
    """The site with C + shrink * mean eigenvalue * I for C, towards a multiple of the identity
    (Ledoit & Wolf 2004): the edit recognises keys that are *near* its own too. From shrink 0 (ROME)
    towards infinity (the least change of W) locality is traded for what follows from the fact; few
    keys for many dimensions need more. For MEMIT it raises lam as well: trace(C) grows by the
    factor 1 + shrink. Raises ValueError where shrink is negative or the site is shrunk."""
    if not 0 <= shrink < float("inf") or at.shrink:
        raise ValueError(f"shrink an unshrunk site by 0 or more, got {shrink} after {at.shrink}")
    identity = torch.eye(len(at.C), dtype=at.C.dtype, device=at.C.device)
    return replace(at, C=at.C + shrink * at.C.diagonal().mean() * identity, shrink=shrink)


def site(
    model: nn.Module,
    name: str,
    call: int,
    queries: Tensor,
    ordinary: Tensor | None = None,
    *,
    position: Tensor | None = None,
    phrasings: Collection[tuple[Tensor, Tensor | None]] = (),
    pad: int | None = None,
    chunk: int = 1024,
) -> Site:
    """Gather a site: `queries` [n_facts, token] ask for each fact, `ordinary` [n, token] are more
    inputs, with values to keep. C is the mean of k k^T over every token of the queries at all calls
    of the layer, since an edit acts at all of them, and of `ordinary` at this call alone: at others
    these may read the edited fact again, as they should. The token `pad` does not count. Keys are
    read at the last token or at `position` [n_facts]; with other `phrasings` of the facts, (tokens,
    position) each, a key is the mean over all, and the value that of this very key. `chunk`: how
    many inputs are read at a time."""
    layer = layer_of(model, name)
    with evaluation_mode(layer.module):
        has_bias = bool(layer.asked(any_input(layer))[1].any())
    keys, values = last_token(model, name, call, queries, chunk, position)
    if phrasings:
        others = [last_token(model, name, call, t, chunk, place)[0] for t, place in phrasings]
        keys = torch.stack([keys, *others]).mean(0)
    if phrasings or has_bias:  # else the outputs are W k
        values = keys.to(layer.matrix) @ layer.matrix.detach().mT
    moment = Moment(model, layer.module, chunk, pad).add(queries)
    if ordinary is not None:
        moment.add(ordinary, call)
    return Site(name, call, layer.module, moment.mean(), keys, values)


def direction(method: str, at: Site, requests: Requests, lam: float = 1.0) -> Tensor:
    """u [n, d_in] of each request; its edit is W + r u^T. method: "row", "rome" or "memit" (of one
    request, see `rome_direction`), in the dtype of the keys, float32 at least. For a key of zeros
    u is 0, an edit that fails. Unlike the updates, u is returned unchecked."""
    if method not in ("row", "rome", "memit"):
        raise ValueError(f"method must be 'row', 'rome' or 'memit', got {method!r}")
    keys = at.keys[requests.fact]
    alive = (keys != 0).any(-1)
    u = torch.zeros_like(keys, dtype=torch.promote_types(keys.dtype, torch.float32))
    if not alive.any():
        return u
    if method == "row":
        u[alive] = row_direction(keys[alive]).to(u)
    else:
        weight = lam if method == "memit" else 0.0
        u[alive] = rome_direction(whiten(at.C), keys[alive], weight).to(u)
    return u


def prototype_residual(
    at: Site, requests: Requests, answers: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:
    """r = v* - W k [n, d_out] with v* of ours, the mean value over the other known facts (`known`
    [n_facts], bool) with the wanted answer, among `answers` [n_facts]; and which requests have such
    a fact [n]: r is 0 for the others."""
    wide = torch.promote_types(at.values.dtype, torch.float32)  # in float16 sums overflow
    values = at.values.to(wide)
    n_facts, d_out = values.shape
    _, number = torch.cat([answers, requests.new]).unique(return_inverse=True)
    answer, wanted = number[:n_facts], number[n_facts:]  # numbered from 0 without gaps
    n_answers = int(number.max()) + 1
    sums = values.new_zeros(n_answers, d_out).index_add(0, answer[known], values[known])
    counts = torch.bincount(answer[known], minlength=n_answers)  # [answer]
    own = known[requests.fact] & (answer[requests.fact] == wanted)  # the fact itself is no other
    own_value = torch.where(own[:, None], values[requests.fact], 0)
    total = sums[wanted] - own_value
    n_others = counts[wanted] - own.long()
    has_one = n_others > 0
    mean = total / n_others.clamp(min=1)[:, None]
    return torch.where(has_one[:, None], mean - values[requests.fact], 0), has_one


def gradient_residual(
    model: nn.Module,
    at: Site,
    requests: Requests,
    u: Tensor | None,
    *,
    steps: int = 40,
    lr: float = 0.1,
    decay: float = 1e-3,
    clamp: float = 4.0,
    batch: int | None = None,
    penalty=None,
    diagnostics: dict | None = None,
) -> Tensor:
    """r [n, d_out] that minimises -log p(wanted answer) + decay |r|^2 / |v0|^2, |r| <= clamp |v0|,
    by Adam on r in units of |v0|; v0 = W k. (After [2] and [4], whose code has |r| for |r|^2, a KL
    term, and of an answer of several tokens the mean of their -log p, not the sum.) The model runs
    with W + r u^T at every call of the layer, as after the edit, or, where u is None, with r added
    to what the layer returns at the site's call and the request's token alone, as MEMIT's code does
    (`added`), which needs neither C nor keys; each request for itself, `batch` at a time (None:
    all). A penalty adds penalty(v0 + r, |v0|), of [batch, d_out] and [batch, 1], to the summed
    loss. diagnostics: "probability" [n] of the wanted answer with r in place, "reached" [n] whether
    it is answered."""
    check_gradients()
    search = {"steps": steps, "lr": lr, "decay": decay, "clamp": clamp, "penalty": penalty}
    wide = torch.promote_types(at.values.dtype, torch.float32)  # sought in float32 at least
    usual = at.values.float().norm(dim=-1).mean()
    if not usual > 0 and len(requests):
        raise ValueError(f"{at.name} returns zeros for every fact: a change has no scale")
    residuals, found = [], []
    rows = torch.arange(len(requests), device=at.values.device)
    for i in rows.split(batch or max(1, len(rows))):
        mine = requests[i]
        v0 = at.values[mine.fact].to(wide)
        size = v0.norm(dim=-1, keepdim=True)
        size = torch.where(size > 0, size, usual)  # the site may return nothing for a fact
        if u is None:
            placed = partial(added, at.layer, calls=[at.call], position=mine.position)
        else:
            placed = partial(rank_one, at.layer, u[i])
        residuals.append(sought(model, mine, placed, v0, size, **search))
        if diagnostics is not None:
            with evaluation_mode(model), torch.no_grad(), placed(residuals[-1]):
                found.append(answered(logits_of(model(mine.tokens)), mine))
    if diagnostics is not None:
        losses, reached = map(torch.cat, zip(*found))
        diagnostics |= {"probability": (-losses).exp(), "reached": reached}
    return torch.cat(residuals)


def sought(
    model: nn.Module,
    requests: Requests,
    placed,
    v0: Tensor,
    size: Tensor,
    *,
    steps: int,
    lr: float,
    decay: float,
    clamp: float,
    penalty,
) -> Tensor:
    """r [n, d_out] of `gradient_residual`, of requests that are sought at once: inside
    `placed(r)` the model runs with r in place; v0 [n, d_out], size [n, 1] = |v0|."""
    scaled = torch.zeros_like(v0, requires_grad=True)  # r in units of |v0|
    optimizer = torch.optim.Adam([scaled], lr=lr)
    with evaluation_mode(model), torch.enable_grad():
        for step in range(steps):
            with placed(scaled * size):
                loss = answered(logits_of(model(requests.tokens)), requests)[0].sum()
            if step == 0:
                check_gradient(loss, scaled)
            loss = loss + decay * scaled.square().sum()
            if penalty is not None:
                loss = loss + penalty(v0 + scaled * size, size)
            scaled.grad = torch.autograd.grad(loss, scaled)[0]
            optimizer.step()
            length = scaled.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
            scaled.data *= (clamp / length).clamp(max=1)
    return (scaled * size).detach()


def check_gradient(loss: Tensor, x: Tensor):
    """ValueError where the loss does not depend on x, as far as autograd can tell."""
    found = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
    if found is None or not found.isfinite().all():
        raise ValueError(
            "the loss of the wanted answers has no (finite) gradient to what the layer returns: is "
            "it checkpointed (use_reentrant), detached, or in a dtype that overflows?"
        )


def answered(logits: Tensor, requests: Requests) -> tuple[Tensor, Tensor]:
    """-log p of each wanted answer [n], all of its tokens, and whether it is what the model answers
    [n], bool."""
    if requests.targets is None:
        logits, targets = logits[:, -1:], requests.new[:, None]
    else:
        targets = requests.targets
    wide = torch.promote_types(logits.dtype, torch.float32)
    flat = logits.flatten(0, 1).to(wide)
    loss = F.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets).sum(1)
    return loss, ((logits.argmax(-1) == targets) | (targets == -100)).all(1)


@torch.no_grad()
def answers_under_edits(
    model: nn.Module,
    layer: nn.Module,
    u: Tensor,
    r: Tensor,
    edit: Tensor,
    tokens: Tensor,
    calls: Collection[int] | None = None,
    chunk: int = 512,
) -> Tensor:
    """The model's answers [m] to questions tokens [m, token], each asked with its own edit in
    place: W + r u^T of row edit [m] in u [n, d_in], r [n, d_out] (`calls`: see `rank_one`)."""
    answers = []
    with evaluation_mode(model):
        for i, part in zip(edit.split(chunk), tokens.split(chunk)):
            with rank_one(layer, u[i], r[i], calls):
                answers.append(logits_of(model(part))[:, -1].argmax(-1))
    return torch.cat(answers)


# --- MEMIT over several layers --------------------------------------------------------------------


def memit_layers(
    model: nn.Module,
    sites: list[tuple[str, int]],
    requests: Requests,
    r: Tensor,
    lam: float,
    ordinary: Tensor,
    stream: tuple[str, int],
    diagnostics: dict | None = None,
    *,
    pad: int | None = None,
) -> dict[str, Tensor]:
    """MEMIT over several sites [4], (layer name, call) in the order of the forward pass: {layer
    name: dW}, for `edited`. `stream` (module name, call) reads the residual stream after all sites:
    its input at the requests' positions should change by r [n, d_out]. Site after site, with the
    edits so far in place, what is missing there, divided by the number of sites left, is written by
    `memit_update` for the keys as they now are, but for keys of zeros; C is that of the model as it
    came, over `ordinary` [n, token] but for `pad`, at the site's call, the one at which it is
    written. diagnostics[name, call]: of `memit_update`. ValueError for two requests for one fact.
    In a loop dW sums what is written at each call, but acts at all of them: more sites need not
    bring the stream nearer."""
    requests.check_distinct()
    moments = []
    for name, call in sites:
        moment = Moment(model, model.get_submodule(name), pad=pad)
        moments.append(moment.add(ordinary, call).mean())

    def handed(name: str, call: int) -> Tensor:
        return last_token(model, name, call, requests.tokens, position=requests.position)[0]

    wanted = handed(*stream) + r
    updates, carried = {}, {}  # of each layer: dW, and K^T K of the keys that it was written for
    with ExitStack() as edits:
        for i, (name, call) in enumerate(sites):
            missing = wanted - handed(*stream)
            share = missing / (len(sites) - i)  # r_l = (wanted - now) / (layers left) [4]
            keys = handed(name, call)
            alive = (keys != 0).any(-1)
            if not alive.any():
                continue
            notes = None if diagnostics is None else diagnostics.setdefault((name, call), {})
            dW = memit_update(
                keys[alive],
                share[alive],
                moments[i],
                lam,
                carried=carried.get(name),
                W=layer_of(model, name).matrix,
                diagnostics=notes,
            )
            edits.enter_context(edited(model, {name: dW}))
            updates[name] = updates[name] + dW if name in updates else dW
            carried[name] = add_gram(carried.get(name), keys)
    return updates


# --- Causal tracing: which state carries an answer ------------------------------------------------
# A state is what a module, by name, returns at one of its calls, at one token. What it carries
# shows when it is interchanged between two runs [2]; that these differ in one token is after Wang
# et al. 2024, arXiv 2405.15071.


def prompt_pairs(
    tokens: Tensor,
    answers: Tensor,
    place: int,
    n: int,
    generator: torch.Generator,
    clean_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows (clean [m], corrupted [m]), m <= n, of random pairs in tokens [P, token] that differ at
    `place` alone and in answers [P]; the first of each is in the mask clean_rows [P], if given. No
    row is in two pairs: they can be counted, and drawn anew in a bootstrap. generator: a CPU one.
    """
    others = tokens.clone()
    others[:, place] = 0  # in every row, so that the other tokens alone tell rows apart
    context = others.unique(dim=0, return_inverse=True)[1]  # [P]: equal where the others are
    order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
    order = order[context[order].argsort(stable=True)]  # same context: neighbours, in random order
    group = context[order]
    size = torch.bincount(context)
    begin = size.cumsum(0) - size  # [context] its first place in the order
    rank = torch.arange(len(order), device=order.device) - begin[group]  # 0, 1, ... in each group
    clean, other = order[:-1], order[1:]
    begins_pair = rank[:-1] % 2 == 0  # in each group places 0 and 1 are a pair, 2 and 3, ...
    same_group = group[:-1] == group[1:]
    usable = begins_pair & same_group & (answers[clean] != answers[other])
    if clean_rows is not None:
        usable &= clean_rows[clean]
    pairs = usable.nonzero().flatten()
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:n].to(pairs.device)]
    return clean[pairs], other[pairs]


def interchange(
    model: nn.Module, name: str, call: int, token: int, other: Tensor, basis: Tensor | None = None
):
    """Inside, for one forward pass, the state (name, call, token) is that of another run, other
    [batch, d]; with basis B [batch, d, k] of orthonormal columns only its component in their span
    is: x <- x + B B^T (x_other - x)."""

    def change(_, x):
        new = other  # [batch, d]
        if basis is not None:
            mine = x[:, token]
            apart = (other.to(basis) - mine.to(basis))[..., None]  # [batch, d, 1]
            new = mine + (basis @ (basis.mT @ apart))[..., 0]  # x + B B^T (x_other - x)
        return x.select_scatter(new.to(x), 1, token)

    return intervene(model.get_submodule(name), change, calls=[call])


class Traced(NamedTuple):
    """Of each site, token and prompt [site, token, n], float64, what restoring one state does."""

    back: Tensor  # 1 where the answer of the clean run is back, else 0
    rise: Tensor  # of its probability


@torch.no_grad()
def trace(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    answer: Tensor,
    sites: list[tuple[str, int]],
) -> Traced:
    """Causal tracing: the corrupted run with one state of the clean run, for each (name, call) of
    `sites` and each token. clean, corrupted [n, token]; answer [n] of the clean run, at the last
    token. Raises ValueError where there are no pairs or a site is not called."""
    if clean.shape != corrupted.shape or len(clean) == 0:
        raise ValueError(
            "prompts must pair up, one pair at least, "
            f"got {list(clean.shape)} and {list(corrupted.shape)}"
        )
    n, n_tokens = clean.shape
    back = torch.zeros(len(sites), n_tokens, n, dtype=torch.float64)
    rise = torch.zeros_like(back)
    with evaluation_mode(model):
        before = probability(logits_of(model(corrupted))[:, -1], answer)
    for i, (name, call) in enumerate(sites):
        state = at_call(model, name, call, clean)[1]  # [n, token, d]
        for token in range(n_tokens):
            swap = interchange(model, name, call, token, state[:, token])
            with evaluation_mode(model), swap:
                logits = logits_of(model(corrupted))[:, -1]
            back[i, token] = logits.argmax(-1) == answer
            rise[i, token] = probability(logits, answer) - before
    return Traced(back, rise)


def probability(logits: Tensor, answer: Tensor) -> Tensor:
    """[n] of answer [n] under logits [n, answers], in float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).softmax(-1).gather(-1, answer[:, None])[:, 0]
