"""Networks of whole numbers: on their grids, exact in float32, and trainable."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_models import INTEGER, WIDE, integer, photo_like
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import selfvae
from selfvae import hub
from selfvae.codec import Codec, CodecError, chains
from selfvae.data import sources
from selfvae.nn.integer import (
    LINES,
    IntegerActivation,
    IntegerConv,
    check_exact,
    choose_steps,
    freeze,
    round_to,
)
from selfvae.nn.networks import Constant, Decoder
from selfvae.presets import from_config
from selfvae.training.config import TrainConfig
from selfvae.training.loop import train


def initialised(**options: object) -> tuple[selfvae.SelfVAE, Tensor]:
    """A new integer model, as training begins with it, and a batch."""
    x = photo_like(32, 32)
    batch = torch.cat([x[:, :, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)])
    how = {"width": 0.04, "depth": 0.2, "components": 3, "image_shape": (3, 16, 16), "shared": True}
    model = selfvae.build("selfvae-quincunx", "tiny", **{"integer": True, **how, **options})
    model.initialise(batch)
    return model, batch


def bits_per_dim(model: selfvae.SelfVAE, x: Tensor) -> Tensor:
    loss: Tensor = -model(x).elbo.mean() / (x[0].numel() * np.log(2))
    return loss


def is_whole(x: Tensor) -> bool:
    return bool((x == x.round()).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-8, 9), st.sampled_from([1, 3]), st.booleans())
def test_weights_are_whole_numbers_of_7_bits(seed: int, size: float, kernel: int, power: bool) -> None:
    torch.manual_seed(seed)
    conv = IntegerConv(5, 6, kernel)
    with torch.no_grad():
        conv.gain.copy_(torch.randn(6) * 2**size)
        if power:  # the largest weight is a power of two, within a rounding error or exactly
            conv.direction.zero_()
            conv.direction[:, 0, 0, 0] = 1.0
            conv.gain.copy_(
                2 ** torch.randint(-9, 9, (6,)).float() * (1 + torch.randint(-1, 2, (6,)) * 6e-8)
            )
        weight = conv.weight()
        n = weight * conv.weight_scale(weight)
        assert is_whole(n) and n.abs().max() <= 127 and n.abs().amax((1, 2, 3)).min() >= 63
        assert is_whole(conv(torch.randn(2, 5, 7, 7)) * 256)
        # the kernel is as rounded as it needs to be, and its error at most half a step
        plain = super(IntegerConv, conv)._normalised()
        assert ((weight - plain).abs() <= 0.5 / conv.weight_scale(plain) * 1.01).all()


def test_freezing_changes_no_output_and_twice_is_once() -> None:
    model, x = initialised()
    for _ in range(2):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            scores = model.eval()(x).elbo
            freeze(model)
            assert torch.equal(model(x).elbo, scores)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    once = hub.frozen(initialised()[0])
    assert hub.fingerprint(once) == hub.fingerprint(hub.frozen(once))


def test_a_norm_that_is_computed_otherwise_gives_the_same_weights() -> None:
    """Machines may add squares in another order: the rounded kernel must come back all the same."""
    model = hub.frozen(initialised(shared=False)[0])
    for conv in [m for m in model.modules() if isinstance(m, IntegerConv)]:
        with torch.no_grad():
            weight = conv.weight().clone()
            for error in (-4, -1, 1, 4):
                other = copy.deepcopy(conv)
                other.gain.mul_(1 + error * 2.0**-23)
                assert torch.equal(other.weight(), weight)


@pytest.mark.parametrize("name", LINES)
def test_activations(name: str) -> None:
    act, x = IntegerActivation(name), torch.arange(-4096, 8193) / 256
    with torch.no_grad():
        for j in range(3, 8):
            act.log_step.fill_(-j)
            out = act(x)
            low, high = act.bounds()
            assert is_whole(out * 2**j) and (out.diff() >= 0).all()
            assert out.min() == low and out.max() <= high and len(out.unique()) <= 256
            plain = {"elu": torch.nn.functional.elu, "clipped_relu": torch.relu}.get(
                name, lambda x: x.clamp(min=-1)
            )
            # lines for ELU, a step, and a limit
            off = (out - plain(x).clamp(max=high)).abs().max()
            assert off <= (0.021 if name == "elu" else 0) + 2.0**-j
        act.log_step.fill_(-99.0)
        assert act.step == 2.0**-7


@pytest.mark.parametrize("name", LINES)
def test_gradients_of_activations(name: str) -> None:
    """By the input nearly those of the smooth function, by the step the error of rounding."""
    act = IntegerActivation(name)
    x = (torch.arange(-2048, 2049) / 256).requires_grad_()
    with torch.no_grad():
        act.log_step.fill_(-6)
    out, grad = act(x), torch.linspace(-1, 1, len(x))
    out.backward(grad)
    value = torch.stack([x, *(x * slope + offset / 256 for slope, offset in LINES[name])]).amax(0)
    inside = value < act.bounds()[1]
    smooth = {"elu": x.exp().clamp(max=1), "hard_elu": (x > -1).float(), "clipped_relu": (x > 0).float()}
    assert x.grad is not None and act.log_step.grad is not None
    assert torch.allclose(x.grad, grad * smooth[name] * inside, atol=0.022)
    assert inside.any() and not inside.all()
    steps = torch.where(inside, (out - value) * 64, torch.tensor(255.0))
    expected = (grad * steps).sum() / 64 * math.log(2) / math.sqrt(256 * len(x))
    assert torch.isclose(act.log_step.grad, expected, rtol=1e-4)


def test_mixed_precision_rounds_gradients_only() -> None:
    conv = IntegerConv(16, 8)
    x = ((torch.randn(2, 16, 8, 8) * 64).round() / 64).clamp(-1, 2).requires_grad_()
    found = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = conv(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *conv.parameters()])
        found.append((out, gradients))
    assert torch.equal(found[0][0], found[1][0])
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert two.dtype == torch.float32 and (one - two).norm() < 0.01 * one.norm()
    assert not torch.equal(found[0][1][0], found[1][1][0])


def test_rounding_is_half_to_even_with_a_straight_gradient() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, 2.25], requires_grad=True)
    out = round_to(x, torch.tensor(1.0))
    assert out.tolist() == [0, 2, 0, 2]
    out.backward(torch.tensor([1.0, 2, 3, 4]))
    assert x.grad is not None and x.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("which", INTEGER)
def test_outputs_lie_on_the_grids_of_the_likelihood(which: str) -> None:
    model = integer(**INTEGER[which])
    ys = model.pyramid(torch.randint(0, model.spec.num_values, (1, model.spec.channels, 32, 32)).byte())
    for level, up in zip(model.levels, [*ys[1:], ys[-1][:, :0]], strict=True):
        inner = getattr(level.decoder, "decoder", level.decoder)
        head = inner if isinstance(inner, Constant) else inner.head
        with torch.no_grad():
            steps = level.decoder(level.context(up), None) * head.scale.view(-1, 1, 1)
        assert is_whole(steps) and (steps.abs() <= (head.limit * head.scale).view(-1, 1, 1)).all()
        assert steps.abs().max() < 2**15


def _decoder(model: selfvae.SelfVAE) -> Decoder:
    decoder = model.levels[0].decoder
    inner = getattr(decoder, "decoder", decoder)
    assert isinstance(inner, Decoder)
    return inner


def test_what_may_be_inexact_is_refused_by_name() -> None:
    model = integer(**WIDE)
    check_exact(_decoder(model))
    names = [name for name, m in _decoder(model).named_modules() if isinstance(m, IntegerConv)]
    assert len(names) > 4
    for name in names:
        large = copy.deepcopy(model)
        with torch.no_grad():
            layer = _decoder(large).get_submodule(name)
            layer.gain *= 2.0**18  # type: ignore[operator]
        with pytest.raises(ValueError, match="fewer channels, or smaller weights") as error:
            check_exact(_decoder(large))
        assert str(error.value).startswith(f"{name}: ")
        with pytest.raises(
            ValueError, match=rf"the network of y0 cannot be used for files: (decoder\.)?{name}: "
        ):
            Codec(large)
    wide = integer(image_shape=(3, 4, 4), name="selfvae", transforms=("mean2",), width=4.0, depth=0.1)
    with pytest.raises(ValueError, match="fewer channels"):
        check_exact(_decoder(wide))


def test_the_bound_of_a_sum_is_not_too_small() -> None:
    """No input within the bounds reaches more than `check_exact` says: tried with the worst one."""
    conv = IntegerConv(4, 1, 1)
    with torch.no_grad():
        conv.direction.copy_(torch.tensor([127.0, -127, 127, -127]).view(1, 4, 1, 1))
        conv.gain.copy_(conv.direction.double().square().sum().sqrt())
        act = IntegerActivation("elu")
        worst = torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1, 1) * act.bounds()[1]
        reached = float(conv(worst.clamp(min=act.bounds()[0])).abs())
        assert reached <= float(conv.weight().abs().sum()) * act.bounds()[1]


def test_gradients_are_finite_and_training_lowers_the_loss() -> None:
    model, x = initialised()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = bits_per_dim(model, x)
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
        losses.append(loss.item())
        optimizer.step()
    moved = [p.grad for name, p in model.named_parameters() if name.endswith("log_step")]
    assert any(float(grad.abs()) > 0 for grad in moved if grad is not None)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_training_resumed_makes_the_same_steps(tmp_path: Path) -> None:
    pictures = (
        photo_like(64, 64).unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    )
    np.save(tmp_path / "x.npy", pictures.contiguous().numpy())
    images, config = sources.load(tmp_path / "x.npy"), initialised()[0].config
    six, three = (
        TrainConfig(batch_size=4, steps=n, warmup=2, eval_every=3, checkpoint_every=3, eval_images=2)
        for n in (6, 3)
    )
    train(config, images, tmp_path / "straight", six, quiet=True)
    train(config, images, tmp_path / "twice", three, quiet=True)
    train(config, images, tmp_path / "twice", six, resume=True, quiet=True)
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("straight", "twice"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    saved = selfvae.load(tmp_path / "straight")
    assert saved.answer == hub.known_answer(saved)


def test_an_integer_model_starts_from_float_weights() -> None:
    """Its weights are then the float ones, rounded; its steps are chosen on data."""
    from selfvae.training.checkpoint import take_weights

    plain, x = initialised(integer=False)
    model = from_config(dataclasses.replace(plain.config, integer=True))
    take_weights(model, plain)
    own, given = hub.unique_state_dict(model), hub.unique_state_dict(plain)
    assert all(torch.equal(own[name], value) for name, value in given.items())
    steps = [m for m in model.modules() if isinstance(m, IntegerActivation)]
    assert steps and not any(m.initialised for m in steps)
    model.initialise(x)
    assert all(m.initialised for m in steps)
    assert all(torch.equal(own[name], value) for name, value in given.items())
    with torch.no_grad():
        float_score, score = (float(bits_per_dim(m.eval(), x)) for m in (plain, model))
    assert abs(score - float_score) < 0.1
    with pytest.raises(ValueError, match="the weights to start from do not fit"):
        take_weights(plain, model)


@torch.no_grad()
def check_no_step_is_better(model: selfvae.SelfVAE, x: Tensor) -> None:
    least = float(bits_per_dim(model, x))
    for step in [m.log_step for m in model.modules() if isinstance(m, IntegerActivation)]:
        kept = float(step)
        assert kept in (-7, -6, -5, -4, -3)
        for other in (max(-7, kept - 1), min(-3, kept + 1)):
            step.fill_(other)
            assert float(bits_per_dim(model, x)) >= least - 1e-6
        step.fill_(kept)


def test_steps_are_chosen_by_the_loss() -> None:
    model, x = initialised()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, IntegerActivation):
                module.log_step.fill_(-3)
        before = float(bits_per_dim(model, x))
        after = choose_steps(model, lambda: float(bits_per_dim(model, x)))
        assert after == float(bits_per_dim(model, x)) < before
    check_no_step_is_better(model, x)


def test_training_from_float_weights_chooses_the_steps(tmp_path: Path) -> None:
    plain, x = initialised(integer=False)
    np.save(tmp_path / "x.npy", x[:1].repeat(40, 1, 1, 1).numpy())
    config = dataclasses.replace(plain.config, integer=True)
    still = TrainConfig(batch_size=4, steps=1, lr=1e-30, min_lr=0, ema=0, eval_images=1)
    images = sources.load(tmp_path / "x.npy")
    check_no_step_is_better(
        train(config, images, tmp_path / "run", still, init_from=plain, quiet=True), x[:1]
    )


@pytest.mark.parametrize("half", [False, True])
def test_saved_and_loaded_is_the_same_model(half: bool, tmp_path: Path) -> None:
    model, x = initialised()
    hub.save(model, tmp_path, half=half)
    back = hub.load(tmp_path)
    if not half:
        assert hub.fingerprint(back) == hub.fingerprint(model)
        with torch.no_grad():
            assert torch.equal(back(x).elbo, model.eval()(x).elbo)
    assert back.answer == hub.known_answer(hub.frozen(back)) is not None
    hub.save(back, tmp_path / "again")
    assert hub.fingerprint(hub.load(tmp_path / "again")) == hub.fingerprint(back)
    Codec(back)  # which checks the answer


def test_files_of_integer_models_are_small(tmp_path: Path) -> None:
    """Whole numbers over powers of two are written in float16 where they fit."""
    model, _ = initialised(width=0.3)
    hub.save(model, tmp_path)
    parameters = sum(p.numel() for p in hub.unique_state_dict(model).values())
    assert (tmp_path / "model.safetensors").stat().st_size < 2.4 * parameters


def test_a_wrong_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "_CHECKED", set())  # a model is checked once in a process
    hub.save(initialised()[0], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    right, config["answer"] = config["answer"], "0123456789abcdef"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CodecError, match=f"{right} instead of 0123456789abcdef"):
        Codec(hub.load(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_the_same_integers(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    from selfvae.export import DecoderPart, to_onnx

    part = DecoderPart(integer(**INTEGER["quincunx"]), 0)
    to_onnx(part, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for size in ((1, 3, 5), (2, 7, 4)):
        y = torch.randint(0, 256, part.example(*size)["y_up"].shape, dtype=torch.uint8)
        with torch.no_grad():
            expected = part(y).numpy()
        (found,) = session.run(None, {"y_up": y.numpy()})
        assert np.array_equal(found, expected)
