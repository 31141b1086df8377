"""models.py: the 2x2 grid is two booleans on one model.

                   feed-forward per block    one memory shared by every block
    `depth` blocks      dense                     dense+mem
    one block, looped   loop                      lmc (looped, with memory), after Niu 2026 [1]

Each of `depth` passes over the residual stream x is x <- x + attention(norm(x)), then x <- x + store(norm(x)). Without
`loop` each pass has a block of its own, with it one block is applied again and again; without `memory` the store is the
block's own feed-forward, with it one store is shared by the whole model (norm, query, keys and values), as in Memory
Layers at Scale [2]. A looped feed-forward is shared by the passes too: what it lacks is the query matrix. Both stores
are a sparse address of positive numbers, then an `nn.Linear` whose columns hold what is stored there: these,
`feed_forward.down` and `memory.values`, are the edit sites of edit.py.

Glossary: x [batch, token, d_model]; slots — rows of the memory, N in [1]; blocks — blocks per pass (1; more make a
group that is looped or stacked as a whole). Left out: dropout, biases, key-value caches, mixed precision.
Reconstruction: only the abstracts of [1] could be read; sizes, addressing and normalisation are our choice (README).

[1] Niu 2026, Repeated Shared Access Enables Grokking, arXiv 2606.20737.   [2] Berges et al. 2024, arXiv 2412.09764.
[3] Su et al. 2021, RoFormer (rotary positions), arXiv 2104.09864.   [4] So et al. 2021, Primer (ReLU^2), 2109.08668.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHS = {"dense": {"loop": False, "memory": False}, "loop": {"loop": True, "memory": False},
         "dense+mem": {"loop": False, "memory": True}, "lmc": {"loop": True, "memory": True}}

def option(default, help: str):
    """A field of a dataclass that is an option of the command line."""
    return field(default=default, metadata={"help": help})

@dataclass(frozen=True)
class Config:
    """Sizes of a model; also the legend of the shape comments below. Raises ValueError naming the values that clash."""
    n_entities: int = 50
    n_relations: int = 20
    aliases: bool = False           # every relation has a second token, n_relations after the first
    loop: bool = True               # one group of blocks applied `depth` times, instead of `depth` groups
    memory: bool = True             # one shared memory in place of every block's feed-forward
    feed_forward: bool = False      # in a memory cell: keep the private feed-forward beside the memory
    d_model: int = option(64, "width of the residual stream")
    n_heads: int = option(4, "attention heads")
    depth: int = option(3, "passes")
    blocks: int = option(1, "blocks per pass")
    d_ff: int = option(1024, "width of a private feed-forward")
    ff_top_k: int = option(64, "units of it that one token may use, 0: all")
    slots: int = option(1024, "rows of the shared memory")
    top_k: int = option(64, "slots that one read may use")
    addressing: str = option("groups", "groups: the best of each of top_k groups; topk: the top_k best; plain: unfused")

    def __post_init__(self):
        for name in ("n_entities", "n_relations", "d_model", "n_heads", "depth", "blocks", "d_ff", "slots", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model must be a multiple of 2 * n_heads, got {self.d_model} and {self.n_heads}")
        if self.addressing not in ("groups", "topk", "plain"):
            raise ValueError(f"addressing must be 'groups', 'topk' or 'plain', got {self.addressing!r}")
        used = [("slots", "top_k")] * self.memory + [("d_ff", "ff_top_k")] * (self.feed_forward or not self.memory)
        for width, k in used:
            n, n_kept = getattr(self, width), getattr(self, k)
            if not 0 <= n_kept <= n or (n_kept and self.addressing == "groups" and n % n_kept):
                raise ValueError(f"{width} must be at least {k}, for 'groups' a multiple of it, got {n} and {n_kept}")

# --- Parts ------------------------------------------------------------------------------------------------------------
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions [3]: the pair (x_i, x_{i + d/2}) is turned by the angle position * frequency_i."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_heads, d = config.n_heads, config.d_model
        self.norm = nn.RMSNorm(d, elementwise_affine=False)
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)     # [batch, head, token, d_head]
                   for part in (self.query, self.key, self.value))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                   # [batch, head, token, token]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))               # [batch, token, d_model]

class SquaredWinners(torch.autograd.Function):
    """kept^2 with kept = score where score >= best, else 0. Autograd's own formulas take twice the time on a CPU."""
    @staticmethod
    def forward(ctx, scores: Tensor, best: Tensor) -> Tensor:
        kept = torch.where(scores >= best, scores, 0)
        ctx.save_for_backward(kept)
        return kept.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return torch.mul(grad, ctx.saved_tensors[0]).mul_(2), None

def address(scores: Tensor, top_k: int, addressing: str) -> Tensor:
    """relu(score)^2 [4] where a score wins its place, 0 elsewhere: [..., width] -> [..., width]. Ties aside, the top_k
    largest win, or the best of each of top_k groups (far cheaper), entry j in group j % top_k; top_k = 0 keeps all."""
    if not top_k:
        return scores.relu().square()
    if addressing == "plain":                                # as "topk", as one would write it first: for --bench
        return scores.relu().square() * (scores >= scores.topk(top_k).values[..., -1:])
    if addressing == "topk":
        rivals, best = scores, scores.detach().topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    else:
        rivals = scores.unflatten(-1, (-1, top_k))                               # [..., width / top_k, top_k]
        best = rivals.detach().amax(-2, keepdim=True)
    return SquaredWinners.apply(rivals, best.clamp(min=0)).view_as(scores)

class FeedForward(nn.Module):
    """down(address(up(norm(x)))): a store owned by one block."""
    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.addressing = config.ff_top_k, config.addressing
        self.norm = nn.RMSNorm(config.d_model, elementwise_affine=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(address(self.up(self.norm(x)), self.top_k, self.addressing))

class SharedMemory(nn.Module):
    """values(address(keys(query(norm(x))))): a store owned by the model and read by every block."""
    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.addressing = config.top_k, config.addressing
        self.norm = nn.RMSNorm(config.d_model, elementwise_affine=False)
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.keys = nn.Linear(config.d_model, config.slots, bias=False)
        self.values = nn.Linear(config.slots, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.values(address(self.keys(self.query(self.norm(x))), self.top_k, self.addressing))

class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config) if config.feed_forward or not config.memory else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor, memory: SharedMemory | None) -> Tensor:
        x = x + self.attention(x, cos, sin, hidden)
        reads = [store(x) for store in (memory, self.feed_forward) if store is not None]
        return x + sum(reads[1:], reads[0])

# --- The model --------------------------------------------------------------------------------------------------------
class Model(nn.Module):
    """A causal transformer over entity and relation tokens that answers with an entity at every token."""
    def __init__(self, config: Config, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_entities + config.n_relations * (1 + config.aliases), config.d_model)
        self.memory = SharedMemory(config) if config.memory else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks * (1 if config.loop else config.depth)))
        self.norm = nn.RMSNorm(config.d_model, elementwise_affine=False)
        for name, module in self.named_modules():            # N(0, 1 / d_in), five times smaller where it writes to x
            if isinstance(module, nn.Linear):
                writes = name.endswith(("attention.out", "feed_forward.down", "memory.values"))
                nn.init.normal_(module.weight, 0, (0.2 if writes else 1) * module.in_features ** -0.5, generator)
        nn.init.normal_(self.embedding.weight, 0, 0.1, generator)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens [batch, token] -> logits over entities [batch, token, n_entities].
        A token sees itself and the tokens at earlier `positions` [token] (default 0, 1, 2, ...: causal attention), so
        that (h, r1, r2, r2', r2'') at positions (0, 1, 2, 2, 2) is three paths whose common prefix is computed once."""
        config = self.config
        positions = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
        d_head = config.d_model // config.n_heads
        frequency = 10000.0 ** -(torch.arange(0, d_head, 2, device=tokens.device) / d_head)
        angle = positions[:, None] * frequency                                   # [token, d_head / 2]
        cos, sin = angle.cos(), angle.sin()
        hidden = (positions[:, None] <= positions).fill_diagonal_(False)         # [token, token]
        x = self.embedding(tokens)                                               # [batch, token, d_model]
        for block in [*self.blocks] * (config.depth if config.loop else 1):
            x = block(x, cos, sin, hidden, self.memory)
        return F.linear(self.norm(x), self.embedding.weight[:config.n_entities])

def count_parameters(config: Config) -> int:
    with torch.device("meta"):                               # shapes, no memory
        return sum(p.numel() for p in Model(config).parameters())

def flops_per_path(config: Config, n_tokens: int = 3) -> int:
    """Multiply-adds of the matrix products in one forward pass, counted as two FLOPs each:
        2 T [depth * blocks * (4 d^2 + 2 T d + store) + d E]     with T tokens, d = d_model, E = n_entities;
    store = 2 d * d_ff for a feed-forward, d^2 + 2 d * slots for a memory read, their sum where a block has both.

    >>> flops_per_path(Config(n_entities=10, d_model=8, n_heads=2, depth=2, memory=False, d_ff=16, ff_top_k=4))
    7200"""
    d = config.d_model                                       # by hand: 2*3 * (2*1 * (4*64 + 2*3*8 + 2*8*16) + 8*10)
    store = (d * d + 2 * d * config.slots) * config.memory
    store += 2 * d * config.d_ff * (config.feed_forward or not config.memory)
    per_token = config.depth * config.blocks * (4 * d * d + 2 * n_tokens * d + store) + d * config.n_entities
    return 2 * n_tokens * per_token
