"""The papers' networks: parameters and FLOPs of every part, beside the published ones.

    python -m benchmarks.networks

FLOPs count multiplications and additions of convolutions, forward, for one image of 32 x 32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import selfvae
from benchmarks.measure import flop_count

__all__ = ["PUBLISHED", "costs"]

# parameters and GFLOP; the sums are given with fewer digits
PUBLISHED: dict[str, dict[str, tuple[int, float]]] = {
    "vae": {
        "encoder": (10_414_802, 1.825), "decoder": (12_449_686, 3.929), "prior": (11_411_876, 0.648),
        "all": (34_280_000, 6.40),
    },
    "srvae": {
        "encoder": (3_027_986, 0.573), "prior": (6_428_516, 0.857), "decoder": (10_115_140, 10.907),
        "top encoder": (3_934_912, 0.672), "top decoder": (4_354_140, 0.639),
        "top prior": (11_411_876, 0.648), "all": (39_270_000, 14.30),
    },
}  # fmt: skip


def costs(name: str) -> dict[str, tuple[int, float]]:
    """Return parameters and GFLOP of each part of a preset at size `paper`, and of all together."""
    with torch.device("meta"):
        model = selfvae.build(name, "paper").requires_grad_(False)
    model.to_empty(device="cpu")
    top, found = len(model.levels) - 1, dict[str, tuple[int, float]]()
    y, z = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, 8, 8)
    for k, level in enumerate(model.levels):
        small = y[:, :0] if k == top else y[..., ::2, ::2]
        prior = level.prior_net.flow if k == top else level.prior_net
        parts: dict[str, tuple[nn.Module, Callable[..., object], tuple[Tensor, ...]]] = {
            "encoder": (level.encoder, level.encoder, (y,)),
            "decoder": (level.decoder, level.decoder, (y[:, :0] if k == top else y, z)),
            "prior": (level.prior_net, prior, (z,) if k == top else (small, z)),
        }
        for part, (module, call, inputs) in parts.items():
            count = sum(p.numel() for p in module.parameters())
            found[("top " if 0 < k == top else "") + part] = count, flop_count(partial(call, *inputs)) / 1e9
        y = small
    found["all"] = sum(n for n, _ in found.values()), sum(flop for _, flop in found.values())
    return found


def main() -> None:
    print(f"{'model':8}{'part':14}{'parameters':>14}{'published':>14}{'GFLOP':>10}{'published':>12}")
    for name, published in PUBLISHED.items():
        for part, (n, flop) in costs(name).items():
            n_then, flop_then = published[part]
            print(f"{name:8}{part:14}{n:14,}{n_then:14,}{flop:10.3f}{flop_then:12.3f}")


if __name__ == "__main__":
    main()
