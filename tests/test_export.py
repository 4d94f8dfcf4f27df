"""What is exported computes what PyTorch computes, for other sizes than those it was traced with."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import selfvae
from selfvae.cli import main
from selfvae.export import DecoderPart, Enhancement, to_onnx, write

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX files need onnxruntime")
pytest.importorskip("onnxscript", reason="ONNX files need onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = {
    "chain": ("selfvae-quincunx", {"image_shape": (3, 8, 8)}, 1),
    "means": ("selfvae", {"latents": "none", "backbone": "residual"}, 1),
    "latents": ("selfvae-grey", {"prior": "normal", "image_shape": (3, 16, 16)}, 1),
}


def built(name: str) -> tuple[selfvae.SelfVAE, int]:
    preset, options, k = MODELS[name]
    torch.manual_seed(0)
    model = selfvae.build(preset, "tiny", width=0.05, depth=0.1, **options)
    for p in model.parameters():  # trained models are not zero either
        if p.ndim == 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval(), k


def random_like(value: torch.Tensor) -> torch.Tensor:
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, value.shape, dtype=torch.uint8)
    return torch.randn(value.shape)


def run(path: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(inputs)
    (out,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert isinstance(out, np.ndarray)
    return out


# a translation to ONNX takes a minute for these
CHAIN, LATENTS = (pytest.param(name, marks=pytest.mark.slow) for name in ("chain", "latents"))


@pytest.mark.slow
def test_enhancement(tmp_path: Path) -> None:
    """Of a chain; that of means is in docs/share.md, and the networks with latents below."""
    model, k = built("chain")
    part = Enhancement(model, k)
    to_onnx(part, tmp_path / "a.onnx")
    for size in ((1, 3, 5), (3, 7, 4)):
        inputs = {key: random_like(value) for key, value in part.example(*size).items()}
        expected = selfvae.enhance(model, inputs["y"], k, temperature=0.0)
        found = run(tmp_path / "a.onnx", inputs)
        assert found.dtype == np.uint8 and found.shape == expected.shape
        off = np.abs(found.astype(int) - expected.numpy())
        assert np.mean(off > 0) < 0.005  # a value halfway between two levels may go either way


@pytest.mark.parametrize("name", [CHAIN, LATENTS])
def test_decoder(name: str, tmp_path: Path) -> None:
    model, _ = built(name)
    part = DecoderPart(model, 0)
    to_onnx(part, tmp_path / "a.onnx")
    for size in ((1, 3, 5), (3, 7, 4)):
        inputs = {key: random_like(value) for key, value in part.example(*size).items()}
        with torch.no_grad():
            expected = part(**inputs).numpy()
        assert np.allclose(run(tmp_path / "a.onnx", inputs), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.filterwarnings("error")  # torch's warnings would be printed: they must not come out
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selfvae.save(built("means")[0], tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "a.pt2")]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        f"{tmp_path / 'a.pt2'}: {(tmp_path / 'a.pt2').stat().st_size:,} bytes",
        "input: y, uint8 (N, 3, H, W), images y1; any height and width",
        "output: x, uint8 (N, 3, 2H, 2W), the most likely images",
    ]
    assert told.err.splitlines() == [
        "selfvae: tracing the networks (step 1 of 2)",
        f"selfvae: writing {tmp_path / 'a.pt2'} (step 2 of 2)",
    ]
    program = torch.export.load(tmp_path / "a.pt2").module()
    y = torch.randint(0, 256, (1, 3, 9, 5), dtype=torch.uint8)
    model = selfvae.load(tmp_path / "run")
    assert torch.equal(program(y=y), selfvae.enhance(model, y, temperature=0.0))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "b.onnx"), "--what", "decoder"]) == 0
    told = capsys.readouterr()
    assert "input: y_up, uint8 (N, 3, H, W), images y1; any height and width\n" in told.out
    lines = told.err.splitlines()
    assert len(lines) == 3 and lines[1] == "selfvae: translating them to ONNX (step 2 of 3)"
    found = run(tmp_path / "b.onnx", {"y_up": y})
    with torch.no_grad():
        expected = DecoderPart(model, 0)(y).numpy()
    assert found.shape[2:] == (18, 10)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["chain", "latents"])
def test_descriptions_are_right(name: str) -> None:
    """The described shapes, with numbers for N, H and W, are those that come in and out."""
    model, k = built(name)
    for part in (Enhancement(model, k), DecoderPart(model, 0)):
        inputs = {key: random_like(value) for key, value in part.example(2, 3, 5).items()}
        with torch.no_grad():
            values = {**inputs, part.output: part(**inputs)}
        h, w = next(iter(inputs.values())).shape[2:]
        for line in part.describe():
            kind, shape = re.search(r"(\w+), (\w+ \(.*?\))", line).groups()  # type: ignore[union-attr]
            dtype, *sizes = re.sub(r"[(),]", "", shape).split()
            sizes = [re.sub(r"(\d+)([HW])", r"\1*\2", size) for size in sizes]
            found = [eval(size, {"N": 2, "H": h, "W": w}) for size in sizes]
            assert list(values[kind].shape) == found and str(values[kind].dtype) == f"torch.{dtype}", line


def test_wrong_wishes(tmp_path: Path) -> None:
    model, _ = built("means")
    with pytest.raises(ValueError, match=r"ends in \.onnx or \.pt2"):
        write(Enhancement(model), tmp_path / "a.bin")
    for wrong in (lambda: Enhancement(model, 2), lambda: DecoderPart(model, 1)):
        with pytest.raises(ValueError, match="the level must be"):
            wrong()
