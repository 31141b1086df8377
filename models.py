"""models.py: the 2x2 grid is two booleans on one model.

                       feed-forward per block    one memory shared by every block
    a stack of blocks       dense                     dense+mem
    one block, looped       loop                      lmc (looped, with memory), after Niu 2026 [1]

Each of `depth` passes over the residual stream x is x <- x + attention(norm(x)), then
x <- x + store(norm(x)), the work of one block (or of several, one after another: `blocks`). Without
`loop` each pass has blocks of its own; without `memory` the store is the block's own feed-forward,
with it one store is shared by the whole model: query, keys and values, as in [2]. (A looped
feed-forward is shared too: what it lacks is the query matrix.) The store is an address (sparse and
positive, unless an option says otherwise), then an `nn.Linear` whose columns hold what is stored
there: `feed_forward.down` and `memory.values`, the edit sites of edit.py.

Glossary: x [batch, token, d_model]; slots - rows of `keys`, columns of `values`, N in [1]. Left
out: dropout, biases and caches. Only the abstracts of [1] could be read: sizes, addressing and
norms are our choice.

[1] Niu 2026, Repeated Shared Access, arXiv 2606.20737.   [2] Berges et al. 2024, arXiv 2412.09764.
[3] Su et al. 2021, rotary positions, arXiv 2104.09864.   [4] So et al. 2021, ReLU^2, 2109.08668.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHS = {
    "dense": {"loop": False, "memory": False},
    "loop": {"loop": True, "memory": False},
    "dense+mem": {"loop": False, "memory": True},
    "lmc": {"loop": True, "memory": True},
}


def option(default, help: str):
    """A field of a dataclass that is an option of the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Sizes of a model, the legend of the shapes below. ValueError names the values that clash."""

    n_entities: int = 50
    n_relations: int = 20
    loop: bool = True  # one group of blocks applied `depth` times, instead of `depth` groups
    memory: bool = True  # one shared memory in place of every block's feed-forward
    feed_forward: bool = False  # in a memory cell: keep the private feed-forward beside the memory
    d_model: int = option(64, "width of the residual stream")
    n_heads: int = option(4, "attention heads")
    depth: int = option(3, "passes")
    blocks: int = option(1, "blocks per pass")
    d_ff: int = option(1024, "width of a private feed-forward")
    ff_top_k: int = option(64, "units of it that one token may use, 0: all")
    slots: int = option(1024, "rows of the shared memory")
    top_k: int = option(64, "slots that one read may use, 0: all")
    addressing: str = option("groups", "groups: best of each of top_k; topk: top_k best; gelu: all")

    def __post_init__(self):
        sizes = ["n_entities", "n_relations", "d_model", "n_heads", "depth", "blocks", "d_ff"]
        for name in [*sizes, "slots"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % (2 * self.n_heads):
            clash = f"{self.d_model} and {self.n_heads}"
            raise ValueError(f"d_model must be a multiple of 2 * n_heads, got {clash}")
        if self.addressing not in ("groups", "topk", "gelu"):
            raise ValueError(f"addressing is groups, topk or gelu, got {self.addressing!r}")
        if self.memory:
            self._check_winners("slots", "top_k")
        if self.private:
            self._check_winners("d_ff", "ff_top_k")

    def _check_winners(self, width: str, top_k: str):
        n, k = getattr(self, width), getattr(self, top_k)
        fits = 0 <= k <= n
        if self.addressing == "groups" and k > 0:
            fits = fits and n % k == 0
        if not fits:
            wanted = f"in 0..{width}, for 'groups' a divisor of it"
            raise ValueError(f"{top_k} must be {wanted}, got {k} of {n}")

    @property
    def n_calls(self) -> int:
        """Calls of a block in a forward pass."""
        return self.depth * self.blocks

    @property
    def n_blocks(self) -> int:
        """Blocks with weights of their own."""
        return self.blocks if self.loop else self.n_calls

    @property
    def private(self) -> bool:
        """Whether every block has a feed-forward of its own."""
        return self.feed_forward or not self.memory


# --- Parts ----------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions [3]: the pair (x_i, x_{i + d/2}) is turned by position * frequency_i."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """out(softmax(q k^T / sqrt(d_head)) v) of norm(x), head by head, q and k rotated by their
    positions: x [batch, token, d_model] -> the same. cos, sin [token, d_head / 2]; masked
    [token, token], bool: what a token (row) does not see."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.norm = nn.RMSNorm(d, elementwise_affine=False)
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[batch, token, d_model] -> [batch, head, token, d_head]"""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masked: Tensor) -> Tensor:
        x = self.norm(x)
        q = rotate(self.heads(self.query(x)), cos, sin)
        k = rotate(self.heads(self.key(x)), cos, sin)
        v = self.heads(self.value(x))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [batch, head, token, token]
        weights = scores.masked_fill(masked, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))  # [batch, token, d_model]


def address(scores: Tensor, top_k: int, addressing: str) -> Tensor:
    """relu(score)^2 [4] of the scores that win, 0 of the others: [..., width] -> [..., width].
    "topk": the top_k largest win. "groups", far cheaper: the largest of each of top_k groups wins,
    score j being in group j % top_k. Of equal scores all win. top_k = 0: all win. "gelu":
    gelu(score) of all."""
    if addressing == "gelu":
        return F.gelu(scores)
    if not top_k:
        return scores.relu().square()
    if addressing == "topk":
        rivals = scores
        best = scores.detach().topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    else:
        rivals = scores.unflatten(-1, (-1, top_k))  # [..., width / top_k, top_k]
        best = rivals.detach().amax(-2, keepdim=True)
    return SquaredWinners.apply(rivals, best.clamp(min=0)).view_as(scores)


class SquaredWinners(torch.autograd.Function):
    """kept^2, kept = score where score >= best (best >= 0), else 0; in half the time of autograd's
    formulas."""

    @staticmethod
    def forward(ctx, scores: Tensor, best: Tensor) -> Tensor:
        kept = torch.where(scores >= best, scores, 0)
        ctx.save_for_backward(kept)
        return kept.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return torch.mul(grad, ctx.saved_tensors[0]).mul_(2), None  # d(kept^2) = 2 kept


class ReadWinners(torch.autograd.Function):
    """values(address(keys(x), top_k, "groups")) of x [n, d_in] for keys K [slots, d_in] and values
    V [d_out, slots]. Every slot has its score, but only the values of the winners are read; of
    equal scores the first wins, not all. A third of the time in a wide store.

    j_ng: the slot that wins group g for x_n, with the score s_ng = relu(K[j_ng] x_n).
    y_n = sum_g s_ng^2 V[:, j_ng], and for grad = d loss / d y:
    ds_ng = 2 s_ng grad_n V[:, j_ng],           dx_n = sum_g ds_ng K[j_ng],
    dK[j] = sum of ds_ng x_n over j_ng = j,     dV[:, j] = sum of s_ng^2 grad_n over j_ng = j."""

    @staticmethod
    def forward(ctx, x: Tensor, K: Tensor, V: Tensor, top_k: int) -> Tensor:
        rivals = (x @ K.T).unflatten(-1, (-1, top_k))  # [n, slots / top_k, top_k]
        best, place = rivals.max(-2)
        score = best.clamp(min=0)  # s [n, top_k]
        slot = place * top_k + torch.arange(top_k, device=x.device)  # j [n, top_k]
        ctx.save_for_backward(x, K, V, score, slot)
        # y_n = sum_g s_ng^2 V[:, j_ng]
        return F.embedding_bag(slot, V.T, per_sample_weights=score.square(), mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, K, V, score, slot = ctx.saved_tensors
        # ds_ng = 2 s_ng grad_n V[:, j_ng]
        read = F.embedding(slot, V.T)  # V[:, j_ng]: [n, top_k, d_out]
        d_score = 2 * score * (read @ grad[:, :, None])[:, :, 0]
        # dx_n = sum_g ds_ng K[j_ng]
        dx = F.embedding_bag(slot, K, per_sample_weights=d_score, mode="sum")
        row = torch.arange(len(x), device=x.device)[:, None].expand_as(slot)
        index = torch.stack([slot.flatten(), row.flatten()])
        sizes = (len(K), len(x))
        dK, dV = None, None
        if ctx.needs_input_grad[1]:
            dK = at_winners(index, d_score, sizes) @ x
        if ctx.needs_input_grad[2]:
            dV = (at_winners(index, score.square(), sizes) @ grad).T
        return dx, dK, dV, None


def at_winners(index: Tensor, weight: Tensor, sizes: tuple[int, int]) -> Tensor:
    """A sparse matrix [slots, n]: weight [n, top_k] at the winners, index [2, n * top_k], else 0."""
    return torch.sparse_coo_tensor(index, weight.flatten(), sizes, check_invariants=False)


def is_wide(width: int, top_k: int, addressing: str) -> bool:
    """Whether ReadWinners pays: 64 slots and more for each winner."""
    return addressing == "groups" and top_k > 0 and width >= 64 * top_k


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer does nothing but x W^T, and has no hooks of its own."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    heard = any(getattr(layer, name) for name in hooks)
    return type(layer) is nn.Linear and layer.bias is None and not heard


def read_store(
    x: Tensor, keys: nn.Linear, values: nn.Linear, top_k: int, addressing: str
) -> Tensor:
    """values(address(keys(x))): [..., d_in] -> [..., d_out]. Of a wide store by ReadWinners (where
    scores are equal, the first alone is read), which wants plain layers, no autocast, and a device
    with sparse products."""
    device = x.device.type
    can_be_sparse = device not in ("mps", "meta") and not torch.is_autocast_enabled(device)
    is_usual = can_be_sparse and is_plain(keys) and is_plain(values)
    if is_usual and is_wide(values.in_features, top_k, addressing):
        read = ReadWinners.apply(x.flatten(0, -2), keys.weight, values.weight, top_k)
        return read.unflatten(0, x.shape[:-1])
    return values(address(keys(x), top_k, addressing))


class FeedForward(nn.Module):
    """down(address(up(norm(x)))): a store owned by one block."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.addressing = config.ff_top_k, config.addressing
        self.norm = nn.RMSNorm(config.d_model, elementwise_affine=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return read_store(self.norm(x), self.up, self.down, self.top_k, self.addressing)


class SharedMemory(nn.Module):
    """values(address(keys(query(norm(x))))): a store owned by the model, read by every block."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.addressing = config.top_k, config.addressing
        self.norm = nn.RMSNorm(config.d_model, elementwise_affine=False)
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.keys = nn.Linear(config.d_model, config.slots, bias=False)
        self.values = nn.Linear(config.slots, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.query(self.norm(x))
        return read_store(x, self.keys, self.values, self.top_k, self.addressing)


class Block(nn.Module):
    """x <- x + attention(x), then x <- x + store(x): the memory, the feed-forward, or both."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config) if config.private else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, masked: Tensor, memory: SharedMemory | None
    ) -> Tensor:
        x = x + self.attention(x, cos, sin, masked)
        if memory is None:
            return x + self.feed_forward(x)
        if self.feed_forward is None:
            return x + memory(x)
        return x + (memory(x) + self.feed_forward(x))


# --- The model ------------------------------------------------------------------------------------


class Model(nn.Module):
    """A causal transformer over entities and relations; every token is answered by an entity."""

    def __init__(self, config: Config, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_entities + config.n_relations, config.d_model)
        self.memory = SharedMemory(config) if config.memory else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = nn.RMSNorm(config.d_model, elementwise_affine=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):  # std 1 / sqrt(d_in), a fifth where it writes to x
                writes = name.endswith(("attention.out", "feed_forward.down", "memory.values"))
                std = (0.2 if writes else 1) * module.in_features**-0.5
                nn.init.normal_(module.weight, 0, std, generator)
        nn.init.normal_(self.embedding.weight, 0, 0.1, generator)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens [batch, token] -> logits over entities [batch, token, n_entities].
        A token sees itself and the tokens at earlier `positions` [token] (default 0, 1, 2, ...:
        causal attention), so that (h, r1, r2, r2', r2'') at positions (0, 1, 2, 2, 2) is three
        paths whose common prefix is computed once."""
        config = self.config
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        d_head = config.d_model // config.n_heads
        # angle_ti = position_t frequency_i,  frequency_i = 10000^(-2 i / d_head)
        frequency = 10000.0 ** -(torch.arange(0, d_head, 2, device=tokens.device) / d_head)
        angle = positions[:, None] * frequency  # [token, d_head / 2]
        masked = (positions[:, None] <= positions).fill_diagonal_(False)  # [token, token]
        x = self.embedding(tokens)  # [batch, token, d_model]
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        for i in range(config.n_calls):  # pass i // config.blocks
            block = self.blocks[i % len(self.blocks)]  # looped: the same blocks again
            x = block(x, cos, sin, masked, self.memory)
        return F.linear(self.norm(x), self.embedding.weight[: config.n_entities])


class State(NamedTuple):
    """A tensor of the forward pass: what `module` returns at its call number `call`."""

    at_pass: int  # from 0
    part: str  # "attention", "memory", "feed-forward", or "stream", which a block leaves behind
    module: str
    call: int  # within one forward pass, from 0


def states(config: Config) -> list[State]:
    """What each block adds to the stream and the stream after it, in order."""
    found = []
    for i in range(config.n_calls):
        at_pass = i // config.blocks
        block = f"blocks.{i % config.n_blocks}"
        call = at_pass if config.loop else 0
        found.append(State(at_pass, "attention", f"{block}.attention", call))
        if config.memory:
            found.append(State(at_pass, "memory", "memory", i))
        if config.private:
            found.append(State(at_pass, "feed-forward", f"{block}.feed_forward", call))
        found.append(State(at_pass, "stream", block, call))
    return found


def stores(config: Config) -> list[State]:
    """Every read of a store, in order, by its edit site, the `nn.Linear` that holds the values."""
    layer = {"memory": "values", "feed-forward": "down"}
    return [
        state._replace(module=f"{state.module}.{layer[state.part]}")
        for state in states(config)
        if state.part in layer
    ]


def count_parameters(config: Config) -> int:
    with torch.device("meta"):  # shapes, no memory
        return sum(p.numel() for p in Model(config).parameters())
