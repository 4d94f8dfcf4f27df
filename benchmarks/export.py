"""Exported models compared with PyTorch: file sizes, seconds, and differences of the results.

    python -m benchmarks.export [MODEL...] [--repeats 5] [--threads 2] [--json]

For the most likely enhancement of one picture (y1 of 192 x 128 pixels) and for its decoder: PyTorch, the
program of torch.export, and the ONNX file in onnxruntime; medians of interleaved repeats. off: the fraction
of values that differ from PyTorch's (enhancement), or the largest difference divided by the largest value
(decoder).
"""

from __future__ import annotations

import json as encode
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

import selfvae
from benchmarks.measure import medians
from selfvae.export import DecoderPart, Enhancement, write


def measure(part: Enhancement | DecoderPart, repeats: int, threads: int) -> dict[str, Any]:
    """Measure one part: bytes, seconds, off, and the seconds for writing the files."""
    rows, cols = (n // m for n, m in zip((128, 192), part.model.multiples[1], strict=True))
    inputs: dict[str, Tensor] = part.example(1, rows, cols)
    for name, value in inputs.items():
        inputs[name] = (
            torch.randint_like(value, 256) if value.dtype == torch.uint8 else torch.randn_like(value)
        )
    arrays = {name: value.numpy() for name, value in inputs.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = {"onnx": Path(folder) / "a.onnx", "program": Path(folder) / "a.pt2"}
        began = time.perf_counter()
        for file in files.values():
            write(part, file)
        written = time.perf_counter() - began
        sizes = {name: file.stat().st_size for name, file in files.items()}
        session = onnxruntime.InferenceSession(files["onnx"], options, providers=["CPUExecutionProvider"])
        program = torch.export.load(files["program"]).module()
        expected = part(**inputs).numpy()
        found = {"onnx": session.run(None, arrays)[0], "program": program(**inputs).numpy()}
        seconds = medians(
            {
                "torch": lambda: part(**inputs),
                "program": lambda: program(**inputs),
                "onnx": lambda: session.run(None, arrays),
            },
            repeats,
        )
    if expected.dtype == np.uint8:
        off = {name: float(np.mean(out != expected)) for name, out in found.items()}
    else:
        off = {
            name: float(np.abs(out - expected).max() / np.abs(expected).max())
            for name, out in found.items()
        }
    own = sum(p.numel() * p.element_size() for p in part.model.parameters())
    return {"bytes": {"torch": own, **sizes}, "seconds": seconds, "off": off, "writing": written}


def main(
    models: Positional[tuple[str, ...]] = ("photos-x2-v1", "photos-deband-v1"),
    repeats: int = 5,
    threads: int = 2,
    json: bool = False,
) -> None:
    """Measure.

    Args:
        models: folders of trained models, or names of bundled ones.
        repeats: of each, interleaved.
        threads: of torch and of onnxruntime.
        json: print only a JSON object.
    """
    torch.set_num_threads(threads)
    found = {}
    for name in models:
        model = selfvae.load(name)
        for part in (Enhancement(model), DecoderPart(model)):
            found[f"{name}, {type(part).__name__}"] = measure(part, repeats, threads)
    if json:
        print(encode.dumps(found))
        return
    print("| | MB: torch, program, ONNX | seconds: the same | off: program, ONNX |\n|---|---|---|---|")
    for name, row in found.items():
        kinds = ("torch", "program", "onnx")
        sizes = ", ".join(f"{row['bytes'][kind] / 1e6:.2f}" for kind in kinds)
        times = ", ".join(f"{row['seconds'][kind]:.3f}" for kind in kinds)
        print(f"| `{name}` | {sizes} | {times} | {row['off']['program']:.1g}, {row['off']['onnx']:.1g} |")


if __name__ == "__main__":
    tyro.cli(main)
