import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import selfvae
from selfvae import hub, presets
from selfvae.cli import main
from selfvae.data import sources
from selfvae.files import write_atomic, write_tensors
from selfvae.nn.precision import resolve
from selfvae.training.checkpoint import take_weights
from selfvae.training.config import TrainConfig
from selfvae.training.guard import Guard
from selfvae.training.loop import _loss, prepare, train
from selfvae.training.optim import make_optimizer

CONFIG = selfvae.ModelConfig(
    name="selfvae", image_shape=(3, 8, 8), transforms=("mean2",), prior="mog", consistent=True,
    components=2, latent_channels=2, width=0.05, depth=0.3,
)  # fmt: skip
SHARED = presets.configure("selfvae-quincunx", "tiny", (3, 8, 8), width=0.05, components=2, shared=True)


@pytest.fixture
def images(tmp_path: Path) -> sources.Dataset:
    coarse = torch.rand(60, 3, 2, 2)
    smooth = torch.nn.functional.interpolate(coarse, 8, mode="bilinear")
    np.save(tmp_path / "smooth.npy", (255 * smooth).to(torch.uint8).numpy())
    return sources.load(tmp_path / "smooth.npy")


def settings(**changes: object) -> TrainConfig:
    base = {"steps": 8, "batch_size": 8, "log_every": 2, "eval_every": 4, "checkpoint_every": 4,
            "eval_images": 4, "warmup": 2, "precision": "32-true"}  # fmt: skip
    return TrainConfig(**{**base, **changes})  # type: ignore[arg-type]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "checkpoint.safetensors"), load_file(other / "checkpoint.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_lowers_the_bound_and_writes_everything(tmp_path: Path, images: sources.Dataset) -> None:
    out = tmp_path / "run"
    often = {"eval_every": 20, "checkpoint_every": 20}
    model = train(CONFIG, images, out, settings(steps=60, lr=0.01, **often), quiet=True)
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(2, 61, 2))
    curve = [float(row["bits_per_dim"]) for row in rows]
    assert sum(curve[-5:]) / 5 < sum(curve[:5]) / 5 - 0.2
    evaluated = [row["step"] for row in rows if row["val_bits_per_dim"]]
    assert evaluated == ["20", "40", "60"]
    assert {"re0", "kl0", "re1", "kl1", "seconds", "grad_norm"} <= set(rows[0])
    assert (out / "samples" / "0000060.png").exists()
    saved = selfvae.load(out)
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(FileExistsError, match="--resume"):
        train(CONFIG, images, out, settings(), quiet=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(CONFIG, images, tmp_path / "none", settings(), resume=True, quiet=True)


@pytest.mark.parametrize(
    ("optimizer", "config"),
    [
        ("adamax", CONFIG),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("adamw", CONFIG), ("muon", CONFIG))),
        ("muon", SHARED),
    ],
)
def test_resuming_makes_the_same_steps(
    tmp_path: Path, images: sources.Dataset, optimizer: str, config: selfvae.ModelConfig
) -> None:
    six, three = (settings(steps=n, optimizer=optimizer, eval_every=3) for n in (6, 3))
    train(config, images, tmp_path / "straight", six, quiet=True)
    train(config, images, tmp_path / "twice", three, quiet=True)
    train(config, images, tmp_path / "twice", six, resume=True, quiet=True)
    assert same_weights(tmp_path / "straight", tmp_path / "twice")


# kills itself without warning in the middle of step 13
_KILLED = """
import os, signal, sys
from selfvae.cli import main
from selfvae.training.guard import Guard
step, calls = Guard.__call__, []
def killed(self, grads):
    calls.append(1)
    if len(calls) == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, grads)
Guard.__call__ = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """20 steps straight against 12, kill -9, resume to 20, by the command line."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", random.integers(0, 256, (64, 3, 8, 8), dtype=np.uint8))
    flags = [
        "train", "--model", "selfvae", "--size", "tiny",
        "--options", "width=0.05", "depth=0.3", "components=2", "prior=mog", "--steps", "20",
        "--data", str(tmp_path / "x.npy"), "--batch-size", "4", "--checkpoint-every", "5",
        "--eval-every", "10", "--eval-images", "4", "--log-every", "10",
    ]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main([*flags, "--out", str(straight)]) == 0
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *flags, "--out", killed], capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert _state(killed)["step"] == 10
    assert main(["train", "--resume", "--out", str(killed)]) == 0
    one, other = (
        load_file(straight / "checkpoint.safetensors"),
        load_file(killed / "checkpoint.safetensors"),
    )
    assert all(torch.equal(one[k], other[k]) for k in one)
    steps = [row["step"] for row in csv.DictReader((killed / "log.csv").open())]
    assert steps == ["10", "20"]


def test_interrupt_saves(tmp_path: Path, images: sources.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Guard.__call__
    calls = []

    def interrupted(self, grads):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, grads)

    monkeypatch.setattr(Guard, "__call__", interrupted)
    train(CONFIG, images, tmp_path / "a", settings(), quiet=True)
    assert len(calls) == 3
    train(CONFIG, images, tmp_path / "a", settings(), resume=True, quiet=True)
    monkeypatch.setattr(Guard, "__call__", step)
    train(CONFIG, images, tmp_path / "b", settings(), quiet=True)
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_nan_gradient_changes_little_and_is_counted(
    tmp_path: Path, images: sources.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Guard.__call__
    calls = []

    def broken(self, grads):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) in (3, 4):
            grads[0].fill_(float("nan"))
        return step(self, grads)

    monkeypatch.setattr(Guard, "__call__", broken)
    model = train(CONFIG, images, tmp_path / "a", settings(), quiet=True)
    assert all(p.isfinite().all() for p in model.parameters())
    last = list(csv.DictReader((tmp_path / "a" / "log.csv").open()))[-1]
    assert last["dropped"] == "2"


def test_the_guard_cannot_lock_up() -> None:
    guard = Guard(TrainConfig(clip_factor=2.0, skip_factor=20.0), torch.device("cpu"))

    def norm_after(norm: float) -> float:
        grad = torch.full((4,), norm / 2)
        guard([grad])
        return grad.norm().item()

    for _ in range(50):
        assert norm_after(1.0) == pytest.approx(1.0)
    assert norm_after(5.0) == pytest.approx(2.0, rel=1e-3)  # shortened
    assert norm_after(1e6) == 0.0  # dropped
    assert norm_after(float("inf")) == norm_after(float("nan")) == 0.0
    accepted = [norm_after(1e6) > 0 for _ in range(200)]
    assert not accepted[0] and accepted[-1]
    assert guard.dropped_in_a_row.item() == 0


def test_hopeless_runs_end_with_a_message(
    tmp_path: Path, images: sources.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hopeless(self, grads):  # type: ignore[no-untyped-def]
        self.dropped_in_a_row.fill_(1000)
        return torch.tensor(float("nan"))

    monkeypatch.setattr(Guard, "__call__", hopeless)
    with pytest.raises(FloatingPointError, match="lower --lr"):
        train(CONFIG, images, tmp_path / "a", settings(), quiet=True)
    assert (tmp_path / "a" / "checkpoint.safetensors").exists()


def test_accumulation_gives_the_whole_batchs_gradient(tmp_path: Path, images: sources.Dataset) -> None:
    halve = presets.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05).config  # no noise in it
    for parts in (1, 4):
        config = settings(grad_accum=parts, steps=3, flip=False, translate=0, optimizer="adamw")
        train(halve, images, tmp_path / str(parts), config, quiet=True)
    one, four = (load_file(tmp_path / p / "model.safetensors") for p in "14")
    assert all(torch.allclose(one[k].float(), four[k].float(), atol=2e-4) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [pytest.param("dense", marks=pytest.mark.slow), "residual"])
def test_activation_checkpointing_makes_the_same_steps_with_less_memory(
    tmp_path: Path, images: sources.Dataset, backbone: str
) -> None:
    model = replace(CONFIG, backbone=backbone, depth=1.0)  # type: ignore[arg-type]
    runs = [settings(activation_checkpointing=on, steps=3) for on in (False, True)]
    for run in runs:
        train(model, images, tmp_path / str(run.activation_checkpointing), run, quiet=True)
    assert same_weights(tmp_path / "False", tmp_path / "True")
    kept = []
    for run in runs:
        net, _ = prepare(presets.from_config(model), Fabric(accelerator="cpu", devices=1), run)
        sizes: list[int] = []

        def note(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            net(images.train.take(range(32)))
        kept.append(sum(sizes))
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "model"), [("adamw", "selfvae-halve"), ("muon", "selfvae-quincunx")])
def test_two_processes_make_the_steps_of_one(tmp_path: Path, optimizer: str, model: str) -> None:
    random = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", random.integers(0, 256, (64, 3, 8, 8), dtype=np.uint8))
    flags = [
        "train", "--model", model, "--size", "tiny", "--options", "width=0.05",
        f"shared={optimizer == 'muon'}", "--steps", "4", "--data", str(tmp_path / "x.npy"),
        "--no-flip", "--translate", "0", "--optimizer", optimizer, "--eval-images", "4",
        "--batch-size", "8", "--precision", "32-true",
    ]  # fmt: skip
    assert main([*flags, "--out", str(tmp_path / "1")]) == 0
    command = [sys.executable, "-m", "selfvae.cli", *flags, "--devices", "2", "--out", tmp_path / "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in "12")
    assert all(torch.allclose(one[k].float(), two[k].float(), atol=2e-4) for k in one)


@pytest.mark.slow
def test_patience_and_the_clock_end_a_run(
    tmp_path: Path, images: sources.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = settings(steps=400, lr=1e-9, min_lr=1e-9, eval_every=1, patience=2)
    train(CONFIG, images, tmp_path / "a", still, quiet=True)
    assert _state(tmp_path / "a")["step"] < 400
    train(CONFIG, images, tmp_path / "b", settings(steps=10**6, max_seconds=0.5), quiet=True)
    assert _state(tmp_path / "b")["seconds"] >= 0.5
    ticks = itertools.count()  # a processor on which a step takes a second
    monkeypatch.setattr("selfvae.training.loop.time.process_time", lambda: next(ticks))
    how = {"steps": 10**6, "max_seconds": 5, "schedule": "cosine", "warmup": 0}
    train(CONFIG, images, tmp_path / "c", settings(**how, clock="cpu"), quiet=True)
    assert _state(tmp_path / "c")["step"] == 5


def _state(out: Path) -> dict[str, float]:
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])  # type: ignore[no-any-return]


def test_automatic_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, expected in (({}, "32-true"), ({"avx512_bf16": True}, "bf16-mixed")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert resolve("auto", "cpu") == expected
    assert resolve("32-true", "cpu") == "32-true" and resolve("auto", "mps") == "32-true"


def test_learning_rates() -> None:
    papers = TrainConfig(warmup=0)
    assert papers.rate(0) == 0.002 and papers.rate(10**9) == 0.0001
    cosine = TrainConfig(schedule="cosine", steps=100, warmup=10)
    assert cosine.rate(0) == pytest.approx(0.0002) and cosine.rate(100) == pytest.approx(0.0001)
    clock = TrainConfig(schedule="cosine", steps=10**6, max_seconds=10, warmup=0)
    assert clock.rate(5, 10.0) == pytest.approx(0.0001)


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
def test_no_rate_is_above_lr(schedule: str) -> None:
    """Also where lr is below the papers' floor; a floor of one's own above it is refused."""
    for lr in (1e-12, 1e-5, 1e-3, 0.03):
        rates = [
            TrainConfig(lr=lr, schedule=schedule, steps=100, warmup=0).rate(step)  # type: ignore[arg-type]
            for step in range(101)
        ]
        assert rates[0] == pytest.approx(lr, rel=1e-3) and rates == sorted(rates, reverse=True)
    with pytest.raises(ValueError, match=r"min_lr must be 0 to lr, 1e-05; got 0\.0001"):
        TrainConfig(lr=1e-5, min_lr=1e-4)


def test_warm_up_takes_a_tenth_at_most() -> None:
    """Of the steps, or of the time."""
    few = TrainConfig(steps=50)
    assert [few.rate(step) for step in (0, 4)] == pytest.approx([0.002 / 5, 0.002], rel=1e-4)
    assert TrainConfig(steps=3).rate(0) == 0.002
    assert TrainConfig(steps=10**6).rate(9) == pytest.approx(0.0002, rel=1e-4)
    timed = TrainConfig(steps=10**6, max_seconds=180)
    assert timed.rate(4, 17.9) < 0.002 and timed.rate(4, 18.0) == pytest.approx(0.002, rel=1e-4)
    assert timed.rate(9, 1.0) == pytest.approx(0.0002, rel=1e-4)


def test_weights_decay_only_if_asked_for(tmp_path: Path, images: sources.Dataset) -> None:
    """Without gradients a step of AdamW changes nothing, or takes lr * weight_decay of a weight away."""
    for decay in (0.0, 0.1):
        config = settings(optimizer="adamw", weight_decay=decay, warmup=0, lr=0.01)
        optimizer = make_optimizer([weight := torch.nn.Parameter(torch.ones(3))], config)
        weight.grad = torch.zeros(3)
        optimizer.step()
        assert torch.allclose(weight, torch.full((3,), 1 - 0.01 * decay), rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="weight_decay goes with optimizer adamw; got adamax"):
        settings(weight_decay=0.1)


def test_a_run_whose_time_is_spent_is_not_resumed(tmp_path: Path, images: sources.Dataset) -> None:
    timed = settings(steps=10**6, max_seconds=0.3)
    train(CONFIG, images, tmp_path, timed, quiet=True)
    before = _state(tmp_path)
    with pytest.raises(
        ValueError, match=r"has been trained for .* s of 0\.3 s \(wall clock\).*raise max_seconds"
    ):
        train(CONFIG, images, tmp_path, timed, resume=True, quiet=True)
    assert _state(tmp_path) == before
    more = settings(steps=int(before["step"]) + 1, max_seconds=1000)
    train(CONFIG, images, tmp_path, more, resume=True, quiet=True)
    assert _state(tmp_path)["step"] == before["step"] + 1


def test_levels_are_trained_apart(tmp_path: Path, images: sources.Dataset) -> None:
    """A run of the coarse levels, then one of the fine levels, make the steps of one run of all."""
    config = replace(SHARED, shared=False)
    never = {"clip_factor": 1e9, "skip_factor": 1e9}  # the norm of all levels would tie them together
    run = partial(train, config, images, quiet=True)
    whole = run(tmp_path / "whole", settings(**never))
    top = len(whole.levels) - 1
    coarse = run(tmp_path / "coarse", settings(**never, levels=(2, top)))
    joined = run(tmp_path / "joined", settings(**never, levels=(0, 1)), init_from=coarse)
    for name, value in whole.state_dict().items():
        assert torch.equal(joined.state_dict()[name], value), name
        fine = name.startswith(("levels.0.", "levels.1."))
        assert fine or torch.equal(coarse.state_dict()[name], value), name
    row = next(csv.DictReader((tmp_path / "coarse" / "log.csv").open()))
    assert float(row["re0"]) == 0 < float(row["re2"])
    terms = whole(images.validation.take(range(2)), levels=(2, top))
    assert float(terms.re[1].sum()) == 0 < float(terms.re[2].sum())
    picture = np.asarray(Image.open(tmp_path / "coarse" / "samples" / "0000008.png"))
    assert max(picture.shape[:2]) < 8 * 8  # of the images at level 2, not of those at level 0
    with pytest.raises(ValueError, match=f"levels must lie between 0 and {top}"):
        run(tmp_path / "wrong", settings(levels=(0, top + 1)))
    with pytest.raises(ValueError, match="levels needs a model of at most one latent"):
        train(CONFIG, images, tmp_path / "wrong", settings(levels=(0, 0)), quiet=True)
    with pytest.raises(ValueError, match="finest and the coarsest"):
        settings(levels=(3, 2))


def test_a_latent_at_the_top_is_trained_apart(tmp_path: Path, images: sources.Dataset) -> None:
    config = replace(SHARED, shared=False, latents="top", prior="normal")
    run = partial(train, config, images, quiet=True)
    top = len(presets.from_config(config).levels) - 1
    coarse = run(tmp_path / "coarse", settings(levels=(top, top)))
    fine = run(tmp_path / "fine", settings(levels=(0, top - 1)), init_from=coarse)
    own, before = fine.state_dict(), coarse.state_dict()
    changed = {name.split(".")[1] for name in own if not torch.equal(own[name], before[name])}
    assert changed == {str(k) for k in range(top)}
    for folder, trained in (("coarse", True), ("fine", False)):
        row = next(csv.DictReader((tmp_path / folder / "log.csv").open()))
        assert (float(row[f"kl{top}"]) != 0) == trained == (float(row["re0"]) == 0)


def test_kl_weight_and_free_bits() -> None:
    terms = selfvae.Terms((torch.tensor([10.0]),), (torch.tensor([4.0]),))
    bit = float(np.log(2))
    assert _loss(terms, 1, TrainConfig(), 0).item() == pytest.approx(14 / bit)
    assert _loss(terms, 1, TrainConfig(kl_warmup=4), 0).item() == pytest.approx(11 / bit)
    assert _loss(terms, 1, TrainConfig(free_bits=10 / bit), 0).item() == pytest.approx(20 / bit)


def test_the_weight_of_the_error() -> None:
    terms = selfvae.Terms((torch.tensor([10.0]),), (torch.tensor([0.0]),), (torch.tensor([3.0]),))
    bit = float(np.log(2))
    assert _loss(terms, 1, TrainConfig(l1_weight=0.5), 0).item() == pytest.approx(10 / bit + 1.5)


def test_wrong_settings() -> None:
    for wrong in ({"steps": 0}, {"ema": 1.0}, {"grad_accum": 3}, {"warmup": -1}, {"schedule": "linear"},
                  {"clock": "sun"}):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            TrainConfig(**wrong)  # type: ignore[arg-type]


def test_save_and_load_give_identical_bytes(tmp_path: Path) -> None:
    model = selfvae.build("srvae", "tiny", (3, 16, 16), width=0.06)
    model.initialise(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
    selfvae.save(model, tmp_path / "a")
    selfvae.save(selfvae.load(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    selfvae.save(model, tmp_path / "half", half=True)
    size, small = ((tmp_path / d / "model.safetensors").stat().st_size for d in ("a", "half"))
    assert small < 0.7 * size
    for a, b in zip(model.parameters(), selfvae.load(tmp_path / "half").parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_loading_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        selfvae.load(tmp_path)
    model = selfvae.build("vae-normal", "tiny", (3, 16, 16), width=0.06)
    selfvae.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(ValueError, match="got .*'format': 99"):
        selfvae.load(tmp_path)


@pytest.mark.parametrize("run", ["1/adamax", "1/muon"])
def test_old_checkpoints_go_on(run: str, tmp_path: Path) -> None:
    """A folder of runs for every format, written when it was new and never again."""
    shutil.copytree(Path(__file__).parents[1] / "golden/checkpoints" / run, tmp_path / "run")
    np.save(tmp_path / "x.npy", np.arange(40 * 3 * 64, dtype=np.uint8).reshape(40, 3, 8, 8))
    before = selfvae.load(tmp_path / "run")
    flags = ["--out", str(tmp_path / "run"), "--data", str(tmp_path / "x.npy"), "--steps", "3"]
    assert main(["train", "--resume", *flags]) == 0
    assert _state(tmp_path / "run")["step"] == 3
    after = selfvae.load(tmp_path / "run")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_later_checkpoints_are_refused(tmp_path: Path, images: sources.Dataset) -> None:
    train(CONFIG, images, tmp_path, settings(steps=1), quiet=True)
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "checkpoint.safetensors", {**file.metadata(), "format": "99"})
    with pytest.raises(ValueError, match="has format 99; this version of selfvae goes on from 1 to 2"):
        train(CONFIG, images, tmp_path, settings(steps=2), resume=True, quiet=True)
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        train(CONFIG, images, tmp_path, settings(steps=2), resume=True, quiet=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged"):
        train(CONFIG, images, tmp_path, settings(steps=2), resume=True, quiet=True)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    tmp_path: Path, images: sources.Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(steps=2, checkpoint_every=1)
    straight = replace(config, steps=3)
    train(CONFIG, images, tmp_path / "straight", straight, quiet=True)
    train(CONFIG, images, tmp_path / "whole", config, quiet=True)
    for damage in ("flipped", "cut", "missing", "state"):
        out = tmp_path / damage
        shutil.copytree(tmp_path / "whole", out)
        last = out / "checkpoint.safetensors"
        data = bytearray(last.read_bytes())
        if damage == "flipped":  # a bit of a weight
            data[-5] ^= 16
        elif damage == "cut":
            data = data[: len(data) // 2]
        elif damage == "state":  # what the header says of steps and scores
            data = bytearray(bytes(data).replace(b'\\"step\\": 2', b'\\"step\\": 1'))
        assert damage == "missing" or data != last.read_bytes()
        last.unlink() if damage == "missing" else last.write_bytes(data)
        caplog.clear()
        train(CONFIG, images, out, straight, resume=True, quiet=True)
        assert "going on from the one before" in caplog.text
        assert ("no checkpoint" if damage == "missing" else "is damaged") in caplog.text
        assert _state(out)["step"] == 3
        assert same_weights(tmp_path / "straight", out)
    for name in ("checkpoint.safetensors", "checkpoint-previous.safetensors"):
        (out / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is damaged .*: begin another run"):
        train(CONFIG, images, out, replace(config, steps=4), resume=True, quiet=True)


def test_nothing_is_half_written(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "a", "not bytes")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_files_are_written_by_several_at_once(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: write_tensors(tmp_path / "a", {"a": torch.tensor(i)}), range(40)))
    finally:
        os.umask(umask)
    assert load_file(tmp_path / "a")["a"] in range(40) and len(list(tmp_path.iterdir())) == 1
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.slow
def test_commands(tmp_path: Path, images: sources.Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    flags = [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--eval-images",
        "4",
        "--options",
        "width=0.05",
        "depth=0.3",
    ]
    source = str(tmp_path / "smooth.npy")
    assert (
        main(["train", "--out", run, "--model", "srvae", "--size", "tiny", "--data", source, *flags]) == 0
    )
    assert main(["train", "--out", run, "--resume", "--steps", "4"]) == 0
    assert _state(Path(run))["step"] == 4
    capsys.readouterr()
    assert main(["eval", run, "--data", source, "--iwae-samples", "3", "--limit", "5", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 5 and scores["iwae_draws"] == 3 and len(scores["re_nats"]) == 2
    total = -(sum(scores["re_nats"]) + sum(scores["kl_nats"]))
    assert scores["elbo_nats"] == pytest.approx(total, rel=1e-5)
    assert scores["bits_per_dim"] == pytest.approx(-total / np.log(2) / 192, rel=1e-5)
    assert main(["generate", run, "--n", "4", "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").stat().st_size > 100
    capsys.readouterr()
    assert main(["info", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transforms"] == ["bicubic2"]


def test_yaml_settings_and_flags_over_them(tmp_path: Path, images: sources.Dataset) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: vae-normal\nsize: tiny\ndata: {tmp_path / 'smooth.npy'}\nsteps: 50\nbatch_size: 4\n"
        "options: [width=0.05]\neval_images: 2\nflip: false\n"
    )
    out = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(out), "--steps", "2"]) == 0
    assert _state(out)["step"] == 2
    assert "flip: false" in (out / "train.yaml").read_text()


def test_another_model_is_not_resumed(tmp_path: Path, images: sources.Dataset) -> None:
    train(CONFIG, images, tmp_path / "a", settings(steps=2), quiet=True)
    other = presets.build("selfvae", "tiny", (3, 8, 8)).config
    with pytest.raises(ValueError, match="of another model"):
        train(other, images, tmp_path / "a", settings(steps=4), resume=True, quiet=True)


def test_a_run_starts_from_a_trained_model(tmp_path: Path, images: sources.Dataset) -> None:
    """Its weights and settings; what it was trained with stays behind, and --resume needs it no more."""
    before, after, source = tmp_path / "before", tmp_path / "after", tmp_path / "smooth.npy"
    train(CONFIG, images, before, settings(steps=8), quiet=True)
    weights = {k: v.clone() for k, v in hub.unique_state_dict(selfvae.load(before)).items()}
    steps = ["--out", str(after), "--ema", "0", "--lr", "1e-12", "--warmup", "0", "--eval-images", "2"]
    assert main(["train", "--init-from", str(before), "--data", str(source), *steps, "--steps", "1"]) == 0
    same = hub.unique_state_dict(selfvae.load(after))
    assert all(torch.allclose(v, same[k], atol=1e-6) for k, v in weights.items())
    assert selfvae.load(after).config == CONFIG
    changed = [*steps[2:], "--out", str(tmp_path / "changed"), "--options", "consistent=false"]
    command = ["train", "--init-from", str(before), "--data", str(source), *changed, "--steps", "1"]
    assert main(command) == 0
    config = selfvae.load(tmp_path / "changed").config
    assert config == replace(CONFIG, consistent=False) and config != CONFIG
    shutil.rmtree(before)
    assert main(["train", "--resume", "--out", str(after), "--steps", "2"]) == 0
    assert _state(after)["step"] == 2


@pytest.mark.parametrize("autoregressive", [0, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_a_wider_model_begins_at_a_narrower_one(
    tmp_path: Path, images: sources.Dataset, autoregressive: int, shared: bool
) -> None:
    start = replace(SHARED, autoregressive=autoregressive, shared=shared, level_width=1.5)
    narrow = presets.from_config(start)
    x = images.train.take(range(8))
    narrow.initialise(x)
    wide = presets.from_config(replace(start, width=0.12, level_width=1.2))
    wide.initialise(x)
    take_weights(wide, narrow)
    count = [sum(p.numel() for p in model.parameters()) for model in (narrow, wide)]
    assert count[1] > 2 * count[0]
    assert torch.allclose(wide.eval()(x).elbo, narrow.eval()(x).elbo, atol=1e-3)
    wide.train()(x).elbo.sum().backward()  # the further channels can be learnt
    directions = [p.grad for name, p in wide.named_parameters() if name.endswith("direction")]
    assert all(g is not None and (g != 0).flatten(1).any(1).float().mean() > 0.2 for g in directions)
    run = train(wide.config, images, tmp_path, settings(steps=1), init_from=narrow, quiet=True)
    assert run.config.width == 0.12
    if not shared:  # wider on fine levels, narrower on coarse ones
        with pytest.raises(ValueError, match="do not fit.*'level_width'"):
            take_weights(presets.from_config(replace(wide.config, width=0.14, level_width=0.5)), wide)


def test_a_model_with_another_top_begins_with_the_finest_levels(
    tmp_path: Path, images: sources.Dataset
) -> None:
    """A shorter chain with a latent at its top, whose networks may be wider."""
    long = replace(SHARED, shared=False, autoregressive=3)
    start = presets.from_config(long)
    x = images.train.take(range(8))
    start.initialise(x)
    top = {"transforms": ("checkerboard", "staggered"), "latents": "top", "prior": "normal"}
    short = replace(long, **top, top_width=2.0, top_autoregressive=7)
    found = presets.from_config(short)
    found.initialise(x)
    take_weights(found, start)
    ours, theirs = found.eval()(x), start.eval()(x)
    assert all(torch.equal(a, b) for a, b in zip(ours.re[:2], theirs.re[:2], strict=True))
    assert not torch.equal(ours.re[2], theirs.re[2]) and (ours.kl[2] != 0).all()
    size = [sum(p.numel() for p in presets.from_config(c).levels[2].parameters())
            for c in (replace(short, top_width=1.0), short)]  # fmt: skip
    assert size[1] > 2 * size[0]
    kept = hub.unique_state_dict(start)
    config = settings(steps=1, levels=(2, 2), ema=0.0)
    run = hub.unique_state_dict(train(short, images, tmp_path, config, init_from=start, quiet=True))
    assert all(torch.equal(v, run[k]) for k, v in kept.items() if k.startswith(("levels.0.", "levels.1.")))
    with pytest.raises(ValueError, match="do not fit.*'width'"):
        take_weights(presets.from_config(replace(short, width=0.14)), start)


def test_a_mixture_prior_begins_at_the_posteriors(tmp_path: Path, images: sources.Dataset) -> None:
    """In exchange for another prior; one with as many components as the start's is kept."""
    top = {"transforms": ("checkerboard", "staggered"), "latents": "top", "prior": "normal"}
    config = replace(SHARED, shared=False, **top)
    start = presets.from_config(config)
    x = images.train.take(range(32))
    start.initialise(x)
    mixed = replace(config, prior="mog", prior_components=4)
    still = settings(steps=1, lr=1e-30, ema=0.0)
    fitted = train(mixed, images, tmp_path / "a", still, init_from=start, quiet=True)
    random = presets.from_config(mixed).eval()
    take_weights(random, start)
    kl, other = (model(x).kl[-1].mean().item() for model in (fitted, random))
    assert kl < 0.9 * other
    again = train(mixed, images, tmp_path / "b", replace(still, seed=1), init_from=fitted, quiet=True)
    one, two = (hub.unique_state_dict(model) for model in (fitted, again))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_weights_to_start_from_must_fit(
    tmp_path: Path, images: sources.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    other = presets.build("selfvae", "tiny", (3, 8, 8))
    with pytest.raises(ValueError, match=r"do not fit.*'width'"):
        train(CONFIG, images, tmp_path / "a", settings(), init_from=other, quiet=True)
    assert not (tmp_path / "a" / "checkpoint.safetensors").exists()
    wrong = ["--init-from", "cifar10-2m-v1", "--model", "vae", "--out", str(tmp_path / "b")]
    assert main(["train", *wrong, "--data", str(tmp_path / "smooth.npy")]) == 2
    assert "leave out --model" in capsys.readouterr().err


def test_resume_finds_its_settings_however_out_is_written(tmp_path: Path, images: sources.Dataset) -> None:
    out, source = tmp_path / "run", tmp_path / "smooth.npy"
    assert main(["train", f"--out={out}", "--model=vae-normal", "--size=tiny", f"--data={source}",
                 "--options", "width=0.05", "--steps=1", "--eval-images=2"]) == 0  # fmt: skip
    assert main(["train", "--resume", f"--out={out}", "--steps=2"]) == 0
    assert selfvae.load(out).config.name == "vae-normal" and _state(out)["step"] == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("width=wide", "width must be a positive number of at most 64; got 'wide'"),
        ("latent_channels=2.5", "latent_channels must be a positive whole number"),
        ("name=x", "KEY=VALUE"),
        ("consistent", "KEY=VALUE"),
        ("consistent=1", "consistent must be true or false"),
        ("num_values=16", "the model has 16 levels"),
    ],
)
def test_wrong_model_options(
    option: str, message: str, tmp_path: Path, images: sources.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "x"), "--data", str(tmp_path / "smooth.npy"), "--options", option]
    assert main(["train", "--size", "tiny", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    selfvae.save(selfvae.build("vae-normal", "tiny", (3, 16, 16), width=0.06), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        selfvae.load(tmp_path)


def test_command_errors_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert main(["train", "--out", str(tmp_path / "x"), "--model", "srvea"]) == 2
    error = capsys.readouterr().err
    assert "config.json is missing" in error and "did you mean 'srvae'" in error
    assert not (tmp_path / "x").exists()
