"""Networks for other runtimes: the enhancement path and the decoders, by torch.export and as ONNX files.

What is exported takes up to 4096 images of any height and width that the model's networks divide (up to
4096 times) and draws nothing: modes alone.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from selfvae.files import write_atomic
from selfvae.level import Level
from selfvae.model import SelfVAE
from selfvae.operations import check_computed, enhance

__all__ = ["DecoderPart", "Enhancement", "to_onnx", "to_program", "write"]

_MOST = 4096  # images, and blocks of the networks along a side


class Enhancement(nn.Module):
    """y = y[k], uint8 (B, c, h, w) -> the likeliest x, uint8 (B, C, H, W): `enhance` at temperature 0.

    h and w are multiples of `model.multiples[k]`.
    """

    output = "x"

    def __init__(self, model: SelfVAE, k: int = 1) -> None:
        super().__init__()
        check_computed(model, k)
        self.model, self.k = model, k

    def forward(self, y: Tensor) -> Tensor:
        return enhance(self.model, y, self.k, temperature=0.0)

    def example(self, n: int = 2, rows: int = 6, cols: int = 8) -> dict[str, Tensor]:
        """Inputs by name: n images of so many multiples."""
        return {"y": _image(self.model, self.k, n, rows, cols)}

    def free(self) -> dict[str, dict[int, Any]]:
        """Which dimensions of the inputs are free."""
        return {"y": _free(self.model.multiples[self.k])}


class DecoderPart(nn.Module):
    """y_up = y[k+1] and z = z[k] -> the parameters of p(y[k] given them), as `PixelMixture` takes them.

    y_up is uint8 (B, c, h, w), z float (B, Z, h', w'), left out where the level has none. Returns
    (B, P, h'', w''), at y[k]'s resolution, or one position a block where y[k+1] keeps pixels of y[k].
    """

    output = "params"

    def __init__(self, model: SelfVAE, k: int = 0) -> None:
        super().__init__()
        if not 0 <= k < len(model.levels) - 1:
            raise ValueError(f"the level must be 0 to {len(model.levels) - 2} for this model; got {k}")
        self.model, self.k = model, k
        self.level: Level = model.levels[k]

    def forward(self, y_up: Tensor, z: Tensor | None = None) -> Tensor:
        out: Tensor = self.level.decoder(self.level.context(y_up), z)
        return out

    def example(self, n: int = 2, rows: int = 6, cols: int = 8) -> dict[str, Tensor]:
        """Inputs by name: n images of so many multiples."""
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


def _image(model: SelfVAE, k: int, n: int, rows: int, cols: int) -> Tensor:
    height, width = model.multiples[k]
    shape = n, model.levels[k].spec.channels, rows * height, cols * width
    return torch.zeros(shape, dtype=torch.uint8, device=model.device)


def _free(multiples: Any) -> dict[int, Any]:
    rows, cols = multiples
    high, wide = Dim("rows", max=_MOST), Dim("cols", max=_MOST)
    return {0: Dim("n", max=_MOST), 2: rows * high, 3: cols * wide}


def to_program(part: Enhancement | DecoderPart) -> ExportedProgram:
    """The part as a program of `torch.export`."""
    with torch.no_grad():
        return torch.export.export(part.eval(), (), part.example(), dynamic_shapes=part.free())


def to_onnx(part: Enhancement | DecoderPart, path: str | Path) -> None:
    """Write the part as an ONNX file, weights inside; inputs and outputs have the part's names.

    Raises ImportError where the packages are missing: `pip install 'selfvae[export]'`.
    """
    try:
        import onnx  # noqa: F401 (torch.onnx tells less)
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError("ONNX files need onnx: pip install 'selfvae[export]'") from None
    program = torch.onnx.export(
        to_program(part), dynamo=True, verbose=False,
        input_names=list(part.example()), output_names=[part.output],
    )  # fmt: skip
    assert program is not None
    write_atomic(Path(path), program.model_proto.SerializeToString())


def write(part: Enhancement | DecoderPart, path: Path) -> None:
    """`to_onnx` for a path that ends in .onnx, `to_program` for .pt2."""
    if path.suffix == ".onnx":
        to_onnx(part, path)
    elif path.suffix == ".pt2":
        out = io.BytesIO()
        torch.export.save(to_program(part), out)
        write_atomic(path, out.getvalue())
    else:
        raise ValueError(f"an exported model ends in .onnx or .pt2; got {path.name!r}")
