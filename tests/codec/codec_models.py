"""Models, pictures and golden files that the tests of the codec share."""

import functools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import selfvae
from selfvae.codec import (
    Codec,
    chains,
    picture,
    tables,
)
from selfvae.codec.ans import ANSCoder
from selfvae.codec.float64.quantization import SideInformation
from selfvae.data.metadata import Metadata
from selfvae.hub import frozen

GOLDEN = Path(__file__).parents[1] / "golden"


def fixed(name: str = "selfvae-halve", **options: Any) -> selfvae.SelfVAE:
    """A small model whose weights are the same on every machine: multiples of 1/1000."""
    how = {"image_shape": (3, 16, 16), "width": 0.06, "components": 3, "latents": "none", **options}
    model = selfvae.build(name, "tiny", **how)
    for i, (key, value) in enumerate(sorted(model.state_dict().items())):
        if key.endswith("initialised"):
            value.fill_(True)
            continue
        n = torch.arange(value.numel()).view(value.shape) * 7919 + 104729 * (i + 1)
        value.copy_((n % 1009 - 504) / 1000 * (0.3 if key.endswith("gain") else 1.0))
    return model


def bits(model: selfvae.SelfVAE, x: Tensor) -> float:
    """The negative ELBO in bits per image, from one draw."""
    with torch.no_grad():
        return -model(x).elbo.mean().item() / math.log(2)


def gaussian(name: str = "selfvae", prior: str = "flow", **options: Any) -> selfvae.SelfVAE:
    """A fixed model with Gaussian latents."""
    how = {"latent_channels": 2, "width": 0.03, "backbone": "residual", **options}
    return fixed(name, latents="all", prior=prior, **how)


@functools.cache
def cached_codec(which: str) -> Codec:
    """A codec without latents ("halve") or with Gaussian ones ("gaussian")."""
    return Codec({"halve": fixed, "gaussian": gaussian}[which]())


def mean_bits(model: selfvae.SelfVAE, x: Tensor, draws: int = 16) -> float:
    """The negative ELBO in bits per image, as a mean over draws."""
    torch.manual_seed(0)
    return sum(bits(model, x) for _ in range(draws)) / draws


def golden_tables() -> list[np.ndarray]:
    return [
        tables.weight_table(), tables.inverse_table(), *tables._tail_table("logistic"),
        *tables._tail_table("normal"), tables.ratio_table(),
    ]  # fmt: skip


_RESIDUAL = {"width": 0.03, "backbone": "residual"}
_DENSE = {"width": 0.03, "depth": 0.4, "backbone": "dense", "inner_elu": True}

# name: model and picture's size; "wide" has more positions than are coded at once, and several tiles
GOLDEN_FILES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "colour": ({}, (3, 13, 9)),
    "grey": ({}, (1, 13, 9)),
    "one-pixel": ({}, (3, 1, 1)),
    "wide": ({}, (3, 100, 500)),
    "quincunx": ({"name": "selfvae-quincunx", "shared": True}, (3, 13, 9)),
    "means": ({"name": "selfvae", "transforms": ("mean2",), **_DENSE}, (3, 9, 9)),
    "greyscale": ({"name": "selfvae", "transforms": ("grey",), **_DENSE}, (3, 9, 9)),
    "bits": ({"name": "selfvae", "transforms": ("bits3",), **_DENSE}, (3, 9, 9)),
    "raw": ({"name": "srvae", **_DENSE}, (3, 9, 9)),
    "latents": (
        {"name": "selfvae", "latents": "all", "posterior": "uniform", "prior": "logistic", **_DENSE},
        (3, 9, 9),
    ),
    "flow": ({"name": "selfvae", "latents": "all", "prior": "flow", **_DENSE}, (3, 21, 30)),
    "flow-plain": ({"name": "vae", "latents": "all", "prior": "flow", **_DENSE}, (3, 1, 1)),
    "mixture": (
        {"name": "selfvae-mean-3lvl", "latents": "all", "prior": "mog-local", **_DENSE}, (3, 21, 30),
    ),
    "mixture-whole": (
        {"name": "vae", "latents": "all", "prior": "mog", "prior_components": 10, **_DENSE}, (3, 15, 16),
    ),
    # written when their priors were called "flow" and "mog"
    "residual-flow": (
        {"name": "selfvae", "latents": "all", "prior": "flow-residual", **_RESIDUAL}, (3, 21, 30),
    ),
    "residual-flow-plain": (
        {"name": "vae", "latents": "all", "prior": "flow-residual", **_RESIDUAL}, (3, 1, 1),
    ),
    "residual-mixture": (
        {"name": "selfvae-mean-3lvl", "latents": "all", "prior": "mog-local", **_RESIDUAL}, (3, 21, 30),
    ),
}  # fmt: skip
VERSION_1 = {"colour", "grey", "one-pixel", "wide"}  # the other models came later


def golden_checksums() -> dict[str, Any]:
    return json.loads((GOLDEN / "checksums.json").read_text())


@functools.cache
def golden_codec(name: str) -> Codec:
    return Codec(fixed(**GOLDEN_FILES[name][0]))


def golden_picture(shape: tuple[int, int, int]) -> Tensor:
    """Ramps with a little noise that is the same on every machine, uint8 (1, C, H, W)."""
    channels, height, width = shape
    i = torch.arange(channels * height * width).view(1, *shape)
    return ((i % width) + (i // width % height) * 2 + i * 7919 % 17).remainder(256).byte()


def golden_album(n: int) -> list[tuple[str, Tensor]]:
    return [(f"{i}.png", golden_picture((3, 4, 5 + i // 500)).roll(i, 3)) for i in range(n)]


def uniform_words() -> int:
    stack, i = ANSCoder(), np.arange(20_000, dtype=np.int64)
    sizes = np.array([2, 3, 13, 17, 75, 223_635, 1 << 18])[i % 7]
    stack.uniform(sizes, i * 7919 % sizes)
    stack.push()
    words = stack.words()
    assert np.array_equal(ANSCoder(words).uniform(sizes), i * 7919 % sizes)
    return zlib.crc32(words.astype("<u4").tobytes())


def snapped(x: Tensor, latents: str = "none") -> np.ndarray:
    """All values that are rounded when x is coded by a model of the usual width, in grid steps."""
    seen: list[np.ndarray] = []
    plain = SideInformation.quantize

    def keep(self: SideInformation, value: np.ndarray, at: int | None = None) -> np.ndarray:
        seen.append(np.broadcast_to(value, value.shape).ravel().copy())
        return plain(self, value, at)

    if latents == "none":
        codec = Codec(fixed(width=0.25, image_shape=(3, 32, 32)))
    else:
        codec = Codec(gaussian(width=0.1, image_shape=(3, 32, 32), backbone="dense"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideInformation, "quantize", keep)
        codec.push(x, ANSCoder())
    return np.concatenate(seen)


def mixed_album(picture: Tensor) -> list[tuple[str, Tensor]]:
    """Ten pictures: some alike in size, some grey, one of a pixel."""
    album = [(f"deep/{i}.png", (picture.int() + i).clamp(max=255).byte()) for i in range(6)]
    album.insert(2, ("grey.png", picture[:, :1]))
    album += [("small.jpg", picture[:, :, :5, :7]), ("one.png", picture[:, :, :1, :1])]
    return [*album, ("grey small.png", picture[:, :1, :5, :7])]


# --- integer models -----------------------------------------------------------------------------------

# name: how the model is built; small, but with every kind of support, of groups and of parameters
INTEGER: dict[str, dict[str, Any]] = {
    "quincunx": {"name": "selfvae-quincunx", "shared": True},
    "halve": {"name": "selfvae-halve", "components": 2},
    "grey-picture": {"name": "selfvae-quincunx", "image_shape": (1, 16, 16), "shared": True},
    "raw": {
        "name": "selfvae-halve",
        "coefficients": "raw",
        "residual_mean": False,
        "activation": "hard_elu",
    },
    "few-values": {"name": "selfvae-halve", "num_values": 13, "activation": "clipped_relu"},
    "means": {"name": "selfvae", "transforms": ("mean2", "mean2")},
    "greyscale": {"name": "selfvae", "transforms": ("grey", "mean2")},
    "bits": {"name": "selfvae", "transforms": ("bits3",)},
    "unrelated": {"name": "selfvae", "transforms": ("mean2",), "consistent": False},
    "one-level": {"name": "vae"},
}  # fmt: skip

# more channels, as oneDNN's faster convolutions need
WIDE = {"name": "selfvae-quincunx", "shared": True, "width": 0.3, "depth": 0.2, "image_shape": (3, 8, 8)}


def integer(name: str = "selfvae-halve", **options: Any) -> selfvae.SelfVAE:
    """A small integer model whose weights are the same everywhere: whole numbers over powers of 2."""
    how = {
        "image_shape": (3, 16, 16), "width": 0.04, "depth": 0.2, "components": 3, "latents": "none",
        "backbone": "residual", **options,
    }  # fmt: skip
    model = selfvae.build(name, "tiny", **how, integer=True)

    def whole(i: int, like: Tensor) -> Tensor:
        n = torch.arange(like.numel()).view(like.shape) * 7919 + 104729 * (i + 1)
        return (n % 255 - 127).to(like.dtype)

    named = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for i, (key, value) in enumerate(sorted(named)):
            if key.endswith("initialised"):
                value.fill_(True)
            elif key.endswith("direction"):
                fan_in = value[0].numel()
                value.copy_(whole(i, value) * 2.0 ** -(7 + math.ceil(math.log2(fan_in) / 2)))
                named_gain = dict(named)[key.removesuffix("direction") + "gain"]
                named_gain.copy_(value.double().square().sum((1, 2, 3)).sqrt())
            elif key.endswith("log_step"):
                value.fill_(-4.0 - i % 3)
            elif key.endswith(("bias", "code")):
                value.copy_(whole(i, value) / 256)
            elif key.endswith("params"):
                value.copy_(whole(i, value) / 64)
    return frozen(model).eval()


@functools.cache
def integer_codec(which: str = "quincunx") -> Codec:
    """The codec of one of the models in `INTEGER`."""
    return Codec(integer(**INTEGER[which]))


def photo_like(height: int, width: int, channels: int = 3, num_values: int = 256, seed: int = 0) -> Tensor:
    """Ramps, edges and noise, uint8 (1, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    base = 100 + 60 * torch.sin(rows / 9) + 40 * torch.cos(cols / 7) + 50 * ((rows + cols) % 40 > 25)
    noise = 3 * torch.randn(channels, height, width, generator=generator)
    x = base + 12 * torch.arange(channels).view(-1, 1, 1) + noise
    return (x.clamp(0, 255) * (num_values / 256)).floor().byte()[None]


def shaped(codec: Codec, height: int, width: int, seed: int = 0) -> Tensor:
    """`photo_like` of a codec's channels and values."""
    spec = codec.model.spec
    return photo_like(height, width, spec.channels, spec.num_values, seed)


def coded_always(codec: Codec, x: Tensor, metadata: Metadata | None = None) -> bytes:
    """A file with the model's parts, even where WebP is smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "_clearly_smaller", lambda *_: True)
        return codec.compress(x, metadata=metadata)


# name: the model in `INTEGER`, channels, height and width; "bands" has several bands in its finest
# levels; it was written before there were corrections
GOLDEN_3: dict[str, tuple[str, tuple[int, int, int]]] = {
    **{which: (which, (1 if which == "grey-picture" else 3, 9, 11)) for which in INTEGER},
    "alpha": ("quincunx", (4, 21, 30)),
    "grey-alpha": ("grey-picture", (2, 7, 5)),
    "one-pixel": ("halve", (3, 1, 1)),
    "bands": ("grey-picture", (1, 110, 300)),
    "corrected": ("quincunx", (3, 110, 100)),
    "stored": ("halve", (3, 1, 40)),
}
GOLDEN_METADATA = Metadata(b"profile", b"II*\0exif", b"<xmp/>", (("Title", "猫"),))
GOLDEN_ARCHIVES = {"colour": ("quincunx", 3, 12), "grey": ("grey-picture", 1, 3)}


def golden_3(name: str) -> Tensor:
    """The picture in a golden file of format 3."""
    which, (channels, height, width) = GOLDEN_3[name]
    i = torch.arange(channels * height * width).view(1, channels, height, width)
    x = (i % width) + (i // width % height) + i * 7919 % 5
    if name == "bands":
        return (x % 2 + 90).byte()  # few bits
    if name == "stored":
        return torch.full_like(x, 7).byte()  # as WebP
    return (x % integer_codec(which).model.spec.num_values).byte()


def write_golden_3(name: str) -> bytes:
    """A golden file of format 3, as this version writes it."""
    codec, x = integer_codec(GOLDEN_3[name][0]), golden_3(name)
    if name == "stored":
        return codec.compress(x)
    if name == "bands":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chains, "_WORTH", 1 << 40)
            return coded_always(codec, x)
    return coded_always(codec, x, GOLDEN_METADATA if x.shape[1] % 2 == 0 else None)


def golden_album_3(channels: int, n: int) -> list[tuple[str, Tensor]]:
    x = golden_picture((3, 4, 5))[:, :channels]
    return [(f"{i}.png", x.roll(i, 3)[:, :, : 4 - i // 8]) for i in range(n)]


def golden_album_4() -> list[tuple[str, Tensor]]:
    """Small pictures, which share corrections, and a large one, which has its own."""
    x = golden_3("corrected")
    small = [(f"{i}.png", x[:, :, i : i + 24, : 20 + i // 16]) for i in range(24)]
    large = (torch.arange(3 * 256 * 258).view(1, 3, 256, 258) % 258 // 64).byte()
    return [*small, ("large.png", large)]


def saved_golden() -> selfvae.SelfVAE:
    """The model that is kept as a folder beside the files."""
    how: dict[str, Any] = {"image_shape": (1, 8, 8), "width": 0.01, "components": 2}
    return integer("selfvae", transforms=("mean2",), **how)
