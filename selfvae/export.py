"""Networks for other runtimes: the enhancement path and the decoders, by torch.export and as ONNX files.

What is exported takes up to 4096 images of any height and width that the model's networks divide (up to
4096 times) and does not sample: it computes modes only.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from selfvae.files import write_atomic
from selfvae.level import Level
from selfvae.model import SelfVAE
from selfvae.operations import check_computed, enhance

__all__ = ["DecoderPart", "Enhancement", "check_path", "to_onnx", "to_program", "write"]

_MOST = 4096  # images, and blocks of the networks along a side

Note = Callable[[str], None]


class Enhancement(nn.Module):
    """y = y[k], uint8 (B, c, h, w) -> the most likely x, uint8 (B, C, H, W): `enhance` at temperature 0.

    h and w are multiples of `model.multiples[k]`.
    """

    output = "x"

    def __init__(self, model: SelfVAE, k: int = 1) -> None:
        super().__init__()
        check_computed(model, k)
        _check_order(model, range(k))
        self.model, self.k = model, k

    def forward(self, y: Tensor) -> Tensor:
        return enhance(self.model, y, self.k, temperature=0.0)

    def example(self, n: int = 2, rows: int = 6, cols: int = 8) -> dict[str, Tensor]:
        """Inputs by name: n images of that many multiples."""
        return {"y": _image(self.model, self.k, n, rows, cols)}

    def free(self) -> dict[str, dict[int, Any]]:
        """Which dimensions of the inputs are free."""
        return {"y": _free(self.model.multiples[self.k])}

    def describe(self) -> list[str]:
        """Lines about the inputs and the output."""
        level, (rows, cols) = self.model.levels[self.k], self.model.scale(self.k)
        height, width = self.model.multiples[self.k]
        x = f"(N, {self.model.spec.channels}, {_times(rows, 'H')}, {_times(cols, 'W')})"
        return [
            f"input: y, uint8 (N, {level.spec.channels}, H, W), images y{self.k}; "
            f"{_divides(height, width)}",
            f"output: x, uint8 {x}, the most likely images",
        ]


class DecoderPart(nn.Module):
    """y_up = y[k+1] and z = z[k] -> the parameters of p(y[k] given them), as `PixelMixture` takes them.

    y_up is uint8 (B, c, h, w), z float (B, Z, h', w'), left out where the level has none. Returns
    (B, P, h'', w''), at y[k]'s resolution, or one position per block where y[k+1] keeps pixels of y[k].
    """

    output = "params"

    def __init__(self, model: SelfVAE, k: int = 0) -> None:
        super().__init__()
        if not 0 <= k < len(model.levels) - 1:
            raise ValueError(f"the level must be 0 to {len(model.levels) - 2} for this model; got {k}")
        _check_order(model, [k])
        self.model, self.k = model, k
        self.level: Level = model.levels[k]

    def forward(self, y_up: Tensor, z: Tensor | None = None) -> Tensor:
        out: Tensor = self.level.decoder(self.level.context(y_up), z)
        return out

    def example(self, n: int = 2, rows: int = 6, cols: int = 8) -> dict[str, Tensor]:
        """Inputs by name: n images of that many multiples."""
        y_up = _image(self.model, self.k + 1, n, rows, cols)
        out = {"y_up": y_up}
        if self.level.has_latent:
            size = [a * b for a, b in zip(y_up.shape[2:], self.level.transform.scale, strict=True)]
            shape = n, *self.level.latent_shape(*size)
            out["z"] = torch.zeros(shape, dtype=self.level.dtype, device=self.model.device)
        return out

    def free(self) -> dict[str, dict[int, Any]]:
        """Which dimensions of the inputs are free."""
        found = self.example(1, 1, 1)
        return {name: _free(value.shape[2:]) for name, value in found.items()}

    def describe(self) -> list[str]:
        """Lines about the inputs and the output."""
        found, k = self.example(1, 1, 1), self.k
        channels, height, width = found["y_up"].shape[1:]
        lines = [f"input: y_up, uint8 (N, {channels}, H, W), images y{k + 1}; {_divides(height, width)}"]
        if "z" in found:
            z = found["z"].shape
            rows, cols = _part("H", z[2], height), _part("W", z[3], width)
            kind = str(found["z"].dtype).removeprefix("torch.")
            lines.append(f"input: z, {kind} (N, {z[1]}, {rows}, {cols}), the latent z{k}")
        with torch.no_grad():
            out = self(**found)
        size = f"(N, {out.shape[1]}, {_part('H', out.shape[2], height)}, {_part('W', out.shape[3], width)})"
        kind = str(out.dtype).removeprefix("torch.")
        return [*lines, f"output: params, {kind} {size}, the parameters of the distribution of y{k}"]


def _check_order(model: SelfVAE, levels: Iterable[int]) -> None:
    for k in levels:
        if model.levels[k].autoregressive:
            raise ValueError(
                f"level {k} is autoregressive: its networks run wave by wave, and cannot be exported"
            )


def _image(model: SelfVAE, k: int, n: int, rows: int, cols: int) -> Tensor:
    height, width = model.multiples[k]
    shape = n, model.levels[k].spec.channels, rows * height, cols * width
    return torch.zeros(shape, dtype=torch.uint8, device=model.device)


def _free(multiples: Any) -> dict[int, Any]:
    rows, cols = multiples
    high, wide = Dim("rows", max=_MOST), Dim("cols", max=_MOST)
    return {0: Dim("n", max=_MOST), 2: rows * high, 3: cols * wide}


def _times(n: int, side: str) -> str:
    return side if n == 1 else f"{n}{side}"


def _part(side: str, ours: int, theirs: int) -> str:
    """The length `ours` of something that belongs to a side of length `theirs`."""
    return _times(ours // theirs, side) if ours >= theirs else f"{side}/{theirs // ours}"


def _divides(height: int, width: int) -> str:
    if (height, width) == (1, 1):
        return "any height and width"
    return f"H a multiple of {height}, W of {width}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and reports of torch and onnxscript, which do not concern our users."""
    loggers = [
        logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def to_program(part: Enhancement | DecoderPart) -> ExportedProgram:
    """The part as a program of `torch.export`."""
    with torch.no_grad(), _quiet():
        return torch.export.export(part.eval(), (), part.example(), dynamic_shapes=part.free())


def _silent(text: str) -> None:
    """Say nothing."""


def to_onnx(part: Enhancement | DecoderPart, path: str | Path, note: Note = _silent) -> None:
    """Write the part as an ONNX file, weights inside; inputs and outputs have the part's names.

    note: is told what is done next. Raises ImportError where the packages are missing:
    `pip install 'selfvae[export]'`.
    """
    try:
        import onnx  # noqa: F401 (torch.onnx tells less)
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError("ONNX files need onnx: pip install 'selfvae[export]'") from None
    note("tracing the networks (step 1 of 3)")
    program = to_program(part)
    note("translating them to ONNX (step 2 of 3)")
    with _quiet():
        found = torch.onnx.export(
            program, dynamo=True, verbose=False,
            input_names=list(part.example()), output_names=[part.output],
        )  # fmt: skip
    assert found is not None
    note(f"writing {path} (step 3 of 3)")
    write_atomic(Path(path), found.model_proto.SerializeToString())


def check_path(path: Path) -> None:
    """Raise ValueError unless the path ends as an exported model's does."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path}: an exported model ends in .onnx or .pt2; got {path.suffix!r}")


def write(part: Enhancement | DecoderPart, path: Path, note: Note = _silent) -> None:
    """`to_onnx` for a path that ends in .onnx, `to_program` for .pt2."""
    check_path(path)
    if path.suffix == ".onnx":
        to_onnx(part, path, note)
        return
    note("tracing the networks (step 1 of 2)")
    out = io.BytesIO()
    program = to_program(part)
    note(f"writing {path} (step 2 of 2)")
    with _quiet():
        torch.export.save(program, out)
    write_atomic(path, out.getvalue())
