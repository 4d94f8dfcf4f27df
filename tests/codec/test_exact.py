"""Integer networks give the same numbers however they are evaluated."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_models import INTEGER, WIDE, integer, integer_codec, shaped
from torch import Tensor

import selfvae
from selfvae import compiled, hub
from selfvae.codec import Codec, exact
from selfvae.codec.exact import ExactNetwork
from selfvae.level import Level
from selfvae.nn.integer import IntegerActivation, IntegerConv
from selfvae.nn.networks import Shared


def contexts(model: selfvae.SelfVAE, n: int = 1, side: int = 48) -> list[tuple[Level, Tensor]]:
    """Each level with its context, for n pictures."""
    spec = model.spec
    x = torch.randint(0, spec.num_values, (n, spec.channels, side, side + 16), dtype=torch.uint8)
    ys = model.pyramid(x)
    return [
        (level, level.context(up)) for level, up in zip(model.levels, [*ys[1:], ys[-1][:, :0]], strict=True)
    ]


def in_steps(level: Level, out: Tensor) -> np.ndarray:
    """A network's outputs in steps of their grids: (P, B, h, w)."""
    scale = ExactNetwork(level.decoder)._scale
    return (out.detach() * scale.to(out.dtype)).transpose(0, 1).cpu().numpy()


@torch.no_grad()
def reference(level: Level, context: Tensor) -> np.ndarray:
    """What the decoder itself computes in float32, in steps: (P, B, h, w)."""
    out = in_steps(level, level.decoder(context, None))
    assert (out == np.rint(out)).all()
    return out


@pytest.mark.parametrize("which", INTEGER)
def test_the_fast_network_computes_what_the_decoder_does(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = integer(**INTEGER[which])
    for level, context in contexts(model, 2):
        expected, network = reference(level, context), ExactNetwork(level.decoder)
        for plain in (False, True):
            monkeypatch.setattr(compiled, "PLAIN", plain)
            found = network(context)
            assert found.dtype == np.int16 and np.array_equal(found, expected)


@pytest.mark.parametrize("cached", [1 << 20, 100, 1])
def test_parts_of_images_give_what_whole_ones_do(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole images, several rows or one row at a time: borders between parts leave no trace."""
    monkeypatch.setattr(exact, "_CACHED", cached)
    monkeypatch.setattr(exact, "_TALL", 1)
    for level, context in contexts(integer(**WIDE), 3):
        assert np.array_equal(ExactNetwork(level.decoder)(context), reference(level, context))


@pytest.mark.slow
@torch.no_grad()
def test_the_same_numbers_however_they_are_computed() -> None:
    """Wider numbers, threads, batches, memory layouts, with oneDNN and without."""
    model = integer(**WIDE)
    for level, context in contexts(model, 4):
        if not context.shape[1]:
            continue
        expected = reference(level, context)
        assert len(np.unique(expected)) > 200
        network = ExactNetwork(level.decoder)
        laid_out = context.contiguous(memory_format=torch.channels_last)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for dnn in (True, False):
                with torch.backends.mkldnn.flags(enabled=dnn):
                    for n in (1, 2, 4):
                        for x in (context, laid_out):
                            assert np.array_equal(network(x[:n]), expected[:, :n])
                            assert np.array_equal(reference(level, x[:n]), expected[:, :n])
        torch.set_num_threads(1)
        wide = copy.deepcopy(level).double().decoder(context.double(), None)
        assert np.array_equal(in_steps(level, wide), expected)


@torch.no_grad()
def test_convolutions_of_bytes_are_refused_where_sums_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As processors do that add two products in 16 bits."""
    level, context = contexts(integer(**WIDE))[0]
    convolution = exact._ByteConvolution.__call__

    def cut(self: exact._ByteConvolution, x: np.ndarray, margin: int = 0) -> np.ndarray:
        return convolution(self, x, margin).clip(-32768, 32767)

    expected = reference(level, context)
    monkeypatch.setattr(exact._ByteConvolution, "__call__", cut)
    assert np.array_equal(ExactNetwork(level.decoder)(context), expected)


@torch.no_grad()
@pytest.mark.parametrize("spread", [20.0, 45.0, 90.0])
def test_two_products_of_neighbours_fit_in_16_bits(spread: float) -> None:
    """In the order of `_paired`, whatever the weights; and the sums stay the same."""
    torch.manual_seed(0)
    convs = [IntegerConv(24, 16), IntegerConv(24, 16, 1)]
    for conv in convs:
        conv.direction.copy_((torch.randn_like(conv.direction) * spread).clamp(-127, 127))
        conv.direction[:, 0, 0, 0] = 127
    order = exact._paired(convs)
    assert len(order) % 8 == 0 and sorted(set(order.tolist()) - {-1}) == list(range(24))
    for conv in convs:
        before, after = exact._Kernel.of(conv), exact._Kernel.of(conv, inputs=order)
        for sign in (1, -1):
            pairs = (sign * after.whole).clamp(min=0).unflatten(1, (-1, 2)).sum(2)
            assert 255 * int(pairs.max()) <= 32767
        found = torch.zeros(16, 25, *before.whole.shape[2:]).index_add(1, order % 25, after.whole)
        assert torch.equal(found[:, :24], before.whole) and not found[:, 24].any()


@torch.no_grad()
def test_orders_of_channels_change_no_output() -> None:
    for level, context in contexts(integer(**WIDE)):
        network = ExactNetwork(level.decoder)
        if not context.shape[1]:
            continue
        inner = level.decoder.decoder if isinstance(level.decoder, Shared) else level.decoder
        twice = torch.tensor([*reversed(range(len(inner.joint[0].bias))), 0, 2, -1, -1])
        network._assemble(inner, [twice, *[twice] * len(network._layers)])
        assert np.array_equal(network(context), reference(level, context))


def test_a_sum_beyond_float32_is_not_convolved_as_bytes() -> None:
    torch.manual_seed(0)
    act, found = exact._Activation(IntegerActivation("elu")), []
    for wide in (32, 600):
        conv = IntegerConv(wide, 4)
        with torch.no_grad():
            conv.direction.fill_(1.0)  # all weights are the largest
            found.append(exact._ByteConvolution(exact._Kernel.of(conv), act, 256.0)._fits)
    assert found == [True, False]


_SCRIPT = """
import sys, torch
sys.path.insert(0, "tests/codec")
from codec_models import shaped
import selfvae
from selfvae import hub
from selfvae.codec import Codec
model = selfvae.load(sys.argv[1])
codec = Codec(model)
data = codec.chain.encode(shaped(codec, 50, 60))
print(hub.known_answer(hub.frozen(model)), hub.fingerprint(model).hex(), *(part.hex() for _, part in data))
"""


@pytest.mark.slow
def test_the_same_files_with_other_instructions(tmp_path: Path) -> None:
    hub.save(integer(**WIDE), tmp_path / "model")
    found = {}
    for name, env in {
        "all": {},
        "SSE4.1": {
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        },
        "AVX": {"ONEDNN_MAX_CPU_ISA": "AVX", "ATEN_CPU_CAPABILITY": "default"},
        "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        # 8 significant bits hold every weight and every activation
        "bfloat16": {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"},
    }.items():
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(tmp_path / "model")], env={**os.environ, **env},
            cwd=Path(__file__).parents[2], capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout.split()
    assert all(one == found["all"] for one in found.values())
    assert found["all"][0] == hub.known_answer(hub.load(tmp_path / "model"))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("which", ["wide", *INTEGER])
def test_a_gpu_and_a_cpu_write_the_same_files(which: str) -> None:
    """With all that makes the GPU's float32 inexact allowed elsewhere in the process."""
    model = integer(**(WIDE if which == "wide" else INTEGER[which]))
    here = Codec(model)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        there = Codec(integer(**(WIDE if which == "wide" else INTEGER[which])).cuda())
        for size in ((70, 90), (3, 5), (200, 300)):
            x = shaped(here, *size)
            data = [codec.chain.encode(x) for codec in (here, there) if codec.chain]
            assert data[0] == data[1]
            file = there.compress(x.cuda())
            assert torch.equal(here.decompress(file), x)
            assert torch.equal(there.decompress(here.compress(x)), x)
        answers = []
        for codec in (here, there):
            codec.model.answer = hub.known_answer(hub.frozen(model))
            answers.append(Codec(codec.model).fingerprint)  # which checks the answer
        assert answers == [here.fingerprint] * 2
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        torch.backends.cudnn.benchmark = False


def test_inexact_arithmetic_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that rounds its sums to bfloat16 gives another answer."""
    from selfvae.codec import chains, exact
    from selfvae.codec.container import CodecError

    model = integer(**WIDE)
    model.answer = hub.known_answer(model)
    Codec(model)
    monkeypatch.setattr(chains, "_CHECKED", set())
    plain = exact.F.conv2d

    def rounded(x: Tensor, weight: Tensor, *args: object, **how: object) -> Tensor:
        return plain(x, weight, *args, **how).bfloat16().float()  # type: ignore[arg-type]

    monkeypatch.setattr(exact.F, "conv2d", rounded)
    with pytest.raises(CodecError, match="does not compute the networks exactly"):
        Codec(model)


def test_a_setting_for_faster_products_changes_no_file() -> None:
    chain = integer_codec().chain
    assert chain is not None
    x = shaped(integer_codec(), 64, 64)
    data = chain.encode(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert chain.encode(x) == data
    finally:
        torch.set_float32_matmul_precision(before)
