"""Images with wrong labels: the ablation on another kind of model, after Merullo et al. 2025, part
of studies/ablation.py.

A vision transformer of two blocks learns eight shapes with a tenth of the labels wrong; after 24
passes it has memorized most of these. Then its feed-forward layers are ablated by curvature and by
controls.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature
from studies.controls import Outcome, compare, shares_of

BOUNDS = ("svd", "random", "activations")  # the controls here


def shapes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n noisy images of eight shapes, as patches of 4 x 4 pixels with their places [n, 16, 32]; the
    shapes [n]."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    r = draw(3.5, 6)  # radius, in pixels
    pixel = torch.arange(16.0)
    u = (pixel[None, None, :] - 7.5 - draw(-1, 1) * (7.5 - r)) / r  # [n, 1, 16]
    v = (pixel[None, :, None] - 7.5 - draw(-1, 1) * (7.5 - r)) / r  # [n, 16, 1]
    far, near = u.abs().maximum(v.abs()), u.abs().minimum(v.abs())
    ring = (u**2 + v**2).sqrt()
    diagonal = (u - v).abs().minimum((u + v).abs())
    kinds = [
        ring < 1,  # disc
        (ring < 1) & (ring > 0.6),  # ring
        far < 0.85,  # square
        (far < 0.95) & (far > 0.5),  # frame
        u.abs() + v.abs() < 1,  # diamond
        (near < 0.3) & (far < 1),  # plus
        (u.abs() < (v + 1) / 2) & (v < 0.9),  # triangle
        (diagonal < 0.4) & (far < 0.9),  # cross
    ]
    kinds = torch.stack(kinds, 1)  # [n, 8, 16, 16]
    kind = torch.randint(8, (n,), generator=generator)
    noise = 0.15 * torch.randn(n, 16, 16, generator=generator)
    images = kinds[torch.arange(n), kind] + noise
    patches = F.unfold(images[:, None], 4, stride=4).mT  # [n, 16, 16]
    return torch.cat([patches, torch.eye(16).expand(n, 16, 16)], 2), kind


def vision_transformer(generator: torch.Generator) -> nn.Module:
    """[n, 16, 32] patches with their places -> [n, 8] logits."""
    options = dict(d_model=64, nhead=4, dim_feedforward=256, dropout=0.0, activation="gelu")
    options |= dict(batch_first=True, norm_first=True)
    blocks = [nn.TransformerEncoderLayer(**options) for _ in range(2)]
    mean = [nn.AvgPool2d((16, 1)), nn.Flatten()]  # over the 16 patches
    model = nn.Sequential(nn.Linear(32, 64), *blocks, *mean, nn.Linear(64, 8))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p, generator=generator)
        elif name.endswith("bias"):  # PyTorch draws them from a stream that has no seed here
            nn.init.zeros_(p)
    return model


def images_stage(
    n: int, generator: torch.Generator, make_generator, keeps, removed
) -> list[Outcome]:
    """n trained images, n held out; on the CPU. A fifth of all chooses strengths, the rest is
    scored: memorized labels, true labels of the same images, held-out images."""
    model = vision_transformer(generator)
    images, true = shapes(2 * n, generator)  # the second half is not trained
    row = torch.arange(2 * n)
    is_wrong, chooses = row < n // 10, row % 5 == 0
    shift = torch.randint(1, 8, (2 * n,), generator=generator)
    labels = torch.where(is_wrong, (true + shift) % 8, true)
    sets = {
        "memorized": (is_wrong, labels),
        "true": (is_wrong, true),
        "validation": (row >= n, true),
    }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(24 * n // 100):  # about 24 passes over the images
        rows = torch.randperm(n, generator=generator)[:100]
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.1).backward()
        optimizer.step()

    @torch.no_grad()
    def measure(model: nn.Module, rows: Tensor = ~chooses) -> dict[str, float | None]:
        return shares_of(sets, model(images[rows]).argmax(-1), rows)

    held = measure(model, chooses)["validation"]

    def value(model: nn.Module) -> float:
        found = measure(model, chooses)
        lost = max(0, 0.98 * held - found["validation"])
        return found["true"] - found["memorized"] - 10 * lost

    names = ["1.linear1", "1.linear2", "2.linear1", "2.linear2"]
    groups = {name: [name] for name in names}  # a strength each
    batches = list(zip(images[:n].split(250), labels[:n].split(250)))
    spectrum = curvature.spectrum(model, batches, F.cross_entropy, names, make_generator)
    found = compare(
        model, measure, value, spectrum, groups, keeps, removed, make_generator(), controls=BOUNDS
    )
    return found.outcomes
