"""Rates of the convolutions of a dense block: the basis of the lower bounds in NOTES.md.

    python -m benchmarks.rates [--images 32] [--threads 2]

Prints GFLOP/s, the best of eight runs: forward, gradient of the input, gradient of the weights.
"""

from __future__ import annotations

from functools import partial

import torch
import tyro
from torch import Tensor

from benchmarks.measure import Task, seconds

CONVOLUTIONS = ((256, 64, 3), (64, 256, 3), (128, 128, 3), (320, 256, 1))
LAYOUTS = {"plain": torch.contiguous_format, "channels-last": torch.channels_last}


def row(name: str, flops: int, tasks: tuple[Task, ...]) -> None:
    rates = [flops / min(seconds(task) for _ in range(8)) / 1e9 for task in tasks]
    print(f"{name:36}" + "".join(f"{rate:8.0f}" for rate in rates), flush=True)


def gradient(which: int, grad: Tensor, x: Tensor, w: Tensor) -> object:
    """Compute the gradient of the input (0) or the weights (1) of a convolution."""
    mask = [i == which for i in range(3)]
    pad = w.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        grad, x, w, [len(w)], [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, mask
    )


@torch.no_grad()
def main(images: int = 32, threads: int = 2) -> None:
    """Measure.

    Args:
        images: number of images, of 32 x 32 positions.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    positions = images * 32 * 32
    for c, out, k in CONVOLUTIONS:
        for layout, order in LAYOUTS.items():
            x, grad = (torch.randn(images, n, 32, 32).to(memory_format=order) for n in (c, out))
            w = torch.randn(out, c, k, k).to(memory_format=order)
            forward = partial(torch.conv2d, x, w, padding=k // 2)
            tasks = (forward, *(partial(gradient, i, grad, x, w) for i in (0, 1)))
            row(f"{k}x{k}, {c} -> {out}, {layout}", 2 * positions * c * out * k * k, tasks)
    c, out = 320, 256
    x, grad = torch.randn(images, 1024, c), torch.randn(images, 1024, out)
    w, bias = torch.randn(images, out, c), torch.randn(out)
    tasks = (lambda: torch.baddbmm(bias, x, w.mT), lambda: grad @ w, lambda: grad.mT @ x)
    row(f"1x1, {c} -> {out}, batched product", 2 * positions * c * out, tasks)


if __name__ == "__main__":
    tyro.cli(main)
