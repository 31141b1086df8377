"""What studies/mass_edit.py compares MEMIT with that is no closed form of edit.py: targets as its
official code seeks them, and constrained fine-tuning.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import edit as editing


def finetune_update(
    model: nn.Module, name: str, requests: editing.Requests, bound: float, batch: int
) -> Tensor:
    """dW of the layer `name` by Adam on -log p(wanted answer), no entry above bound * rms(W), until
    the mean loss is below 0.01, 45 steps at most: the constrained fine-tuning of Meng et al. 2022
    (ROME), which ends so, at a rate that can reach the bound in 15 steps."""
    weight = f"{name}.weight"
    W, n = model.get_parameter(weight).detach(), len(requests)
    limit = bound * float(W.square().mean().sqrt())
    dW = torch.zeros_like(W, requires_grad=True)
    optimizer = torch.optim.Adam([dW], lr=limit / 15)
    for _ in range(45):
        mean_loss = 0.0
        for i in torch.arange(n, device=W.device).split(batch):
            logits = functional_call(model, {weight: W + dW}, requests.tokens[i])[:, -1]
            loss = F.cross_entropy(logits, requests.new[i], reduction="sum") / n
            loss.backward(inputs=[dW])
            mean_loss += loss.item()
        if mean_loss < 0.01:
            break
        optimizer.step()
        optimizer.zero_grad()
        dW.data.clamp_(-limit, limit)
    return dW.detach()


def official_residual(
    model: nn.Module, at: editing.Site, stream: Tensor, requests: editing.Requests, batch: int
) -> Tensor:
    """r [n, d_out] with the numbers of MEMIT's code for GPT-J: Adam at 0.5 on r itself, added to
    what the store returns at the last token, 24 steps or until a request's loss, -log p(wanted
    answer) + 0.5 |r| / |h|^2, is below 0.05; |r| <= 0.75 |h|. h: the fact's row of `stream`, what
    the block leaves in the stream [facts, d_out]. `batch` requests at a time, each for itself."""
    store = model.get_submodule(at.name.rpartition(".")[0])  # as in minedit.mass_residual
    parts = []
    for i in torch.arange(len(requests), device=stream.device).split(batch):
        size = stream[requests.fact[i]].norm(dim=-1, keepdim=True).clamp(min=1e-12)  # |h|
        r = torch.zeros(len(i), stream.shape[1], requires_grad=True, device=size.device)
        optimizer = torch.optim.Adam([r], lr=0.5)

        for _ in range(24):
            with editing.added(store, r, [at.call]):
                logits = model(requests.tokens[i])[:, -1]
            answer_loss = F.cross_entropy(logits, requests.new[i], reduction="none")
            length = (r.square().sum(-1, keepdim=True) + 1e-12).sqrt()
            loss = answer_loss + (0.5 * length / size**2)[:, 0]
            is_done = (loss < 0.05)[:, None]
            if is_done.all():
                break
            (r.grad,) = torch.autograd.grad(loss.sum(), r)
            before = r.detach().clone()
            optimizer.step()
            length = r.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
            r.data *= (0.75 * size / length).clamp(max=1)
            r.data = torch.where(is_done, before, r.data)  # a request that is done stays as it is
        parts.append(r.detach())
    return torch.cat(parts)
