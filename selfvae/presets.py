"""The models by name and size: the papers' and ours. One configuration describes a model completely."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from selfvae.distributions.pixels import param_count, param_grid
from selfvae.distributions.priors import (
    TOP_PRIORS,
    AutoregressivePrior,
    FlowPrior,
    MixturePrior,
    ResidualFlowPrior,
)
from selfvae.hints import unknown
from selfvae.level import Level
from selfvae.model import SelfVAE
from selfvae.nn.autoregressive import AutoregressiveDecoder, GroupNet
from selfvae.nn.layers import ACTIVATIONS, BACKBONES
from selfvae.nn.networks import HEAD_SCALE, Branch, Constant, Decoder, Encoder, PriorNet, Shared, SubPixel
from selfvae.transforms import (
    BicubicDownscale,
    BitDepth,
    Chain,
    Checkerboard,
    GaussianBlur,
    Greyscale,
    ImageSpec,
    Jpeg,
    MeanDownscale,
    Null,
    Sketch,
    Subsample,
    Subsampling,
    Transform,
)

__all__ = [
    "FORMAT",
    "PRESETS",
    "TRANSFORMS",
    "ModelConfig",
    "build",
    "configure",
    "from_config",
    "transform",
]

FORMAT = 2  # of configurations, in folders and checkpoints

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    **{f"mean{n}": lambda n=n: MeanDownscale(n) for n in (2, 3, 4)},  # type: ignore[misc]
    "mean1x2": lambda: MeanDownscale(1, 2),
    "mean2x1": lambda: MeanDownscale(2, 1),
    **{f"bicubic{n}": lambda n=n: BicubicDownscale(n) for n in (2, 3, 4)},  # type: ignore[misc]
    **{f"subsample{n}": lambda n=n: Subsample(n) for n in (2, 3, 4)},  # type: ignore[misc]
    "columns": lambda: Subsample(1, 2),
    "rows": lambda: Subsample(2, 1),
    "checkerboard": Checkerboard,
    "staggered": lambda: Subsample(2, 1, staggered=True),
    **{f"bits{n}": lambda n=n: BitDepth(n) for n in range(1, 8)},  # type: ignore[misc]
    "grey": Greyscale,
    "blur": GaussianBlur,
    "sketch": Sketch,
    **{f"jpeg{n}": lambda n=n: Jpeg(n) for n in (50, 75, 90)},  # type: ignore[misc]
}


def transform(name: str) -> Transform:
    """Return the transform of that name; "+" joins several to one, e.g. "grey+mean2"."""
    if name in ("halve", "quincunx"):
        raise ValueError(f"{name!r} is a complete chain of transforms and cannot be combined with others")
    parts = [_choose(part, TRANSFORMS, "transform")() for part in name.split("+")]
    return parts[0] if len(parts) == 1 else Chain(*parts)


def _choose(name: str, table: Mapping[str, Any], kind: str) -> Any:
    if name in table:
        return table[name]
    raise ValueError(unknown(kind, name, table))


# names that fields had in model folders and checkpoints of format 1
FORMER_FIELDS = {"levels": "num_values", "anchored": "residual_mean"}


@dataclass(frozen=True)
class ModelConfig:
    """The structure of a model, as JSON-able settings.

    Args:
        name: The preset from which the settings came.
        image_shape: Channels, height and width in pixels. The networks accept any height and width that the
            strides divide; this size determines how often the encoders halve and how long a chain is.
        num_values: Values per channel of x, 256 for 8 bits.
        transforms: Names of d_1..d_K (see `TRANSFORMS`). As the only name, "halve" means a chain of
            "columns" and "rows" in turn, down to 4 x 4, and "quincunx" one of "checkerboard" and
            "staggered", down to 2 x 2 (about 4 x 4 with latents or from odd sides); both halve the longer
            side first where it is at least twice the other.
        prior: Of the top latent: "normal"; "mog", a mixture over the whole latent, for one image size;
            "mog-local", a mixture at each position; "flow", RealNVP with dense blocks; "flow-residual",
            RealNVP with residual networks; "flow-autoregressive", whose positions depend on those before
            them; "logistic", with a uniform posterior.
        posterior: Of all latents: "normal", or "uniform", whose latents are coded as integers.
        latents: Levels that have a latent: "all", "top" or "none".
        latent_channels: Channels of each latent.
        consistent: Truncate each likelihood to the images that map to the image above.
        residual_mean: Add the transform's estimate to the mean of each component.
        coefficients: Channel coefficients act on values, "raw" (PixelCNN++), or on residuals, "residual".
        components: Number of logistics in a mixture.
        prior_components: Number of Gaussians of the "mog" prior.
        backbone: "dense", as published, or "residual".
        inner_elu: In dense blocks, put an ELU between the two convolutions of a step and inside the
            attention. (The thesis has it, the configuration published with the paper does not.)
        activation: Of residual networks without latents: "elu", "clipped_relu" or "hard_elu".
        kernels: Kernel sizes of these networks: of the first convolution, of each layer, of the last one.
        depthwise: Make the convolutions of their layers depthwise.
        integer: Compute the networks in whole numbers (see `nn.integer`), which compression uses; needs
            latents="none", backbone="residual", depthwise=False.
        shared: Levels with the same transform share one decoder; needs latents="none", backbone="residual".
        subpixel: Decoders work on the grid of the smaller image above, and predict all pixels of a block at
            once (sub-pixel convolution); needs latents="none", integer=false.
        autoregressive: Kernel size, 3, 5, 7 .. 31, of the masked convolutions by which a pixel sees those
            before it: at the top, on levels that keep pixels and on those with sub-pixel decoders. 1: on
            levels that model several pixels per block, a pixel sees the earlier groups, that is, those at
            other places in their blocks, on all sides; with sub-pixel decoders, these follow each other
            like the colours of a checkerboard. 0: pixels are independent given the image above, but for
            what it leaves possible. Needs backbone="residual", integer=false, and with sub-pixel decoders
            consistent=true and block means.
        width: Factor on the numbers of channels.
        depth: Factor on the numbers of steps per block.
        level_width: In residual decoders, factor on the number of channels for each halving of the grid
            from level to level, up to 3 times in all; 2 gives coarse levels as much arithmetic as fine
            ones.
        level_depth: The same for the number of layers.
        top_width: Factor on all numbers of channels of the coarsest level.
        top_autoregressive: Kernel size of the coarsest level's masked convolution, odd and from 3 to 31; 0:
            as `autoregressive`.

    Raises:
        ValueError: A setting is out of range or does not fit another; the message names it.
    """

    name: str = "vae"
    image_shape: tuple[int, int, int] = (3, 32, 32)
    num_values: int = 256
    transforms: tuple[str, ...] = ()
    prior: Literal[
        "normal", "mog", "mog-local", "flow", "flow-residual", "flow-autoregressive", "logistic"
    ] = "flow"
    posterior: Literal["normal", "uniform"] = "normal"
    latents: Literal["all", "top", "none"] = "all"
    latent_channels: int = 16
    consistent: bool = False
    residual_mean: bool = False
    coefficients: Literal["raw", "residual"] = "raw"
    components: int = 10
    prior_components: int = 1000
    backbone: Literal["dense", "residual"] = "dense"
    inner_elu: bool = False
    activation: Literal["elu", "clipped_relu", "hard_elu"] = "elu"
    kernels: tuple[int, int, int] = (3, 3, 3)
    depthwise: bool = False
    integer: bool = False
    shared: bool = False
    subpixel: bool = False
    autoregressive: int = 0
    width: float = 1.0
    depth: float = 1.0
    level_width: float = 1.0
    level_depth: float = 0.5
    top_width: float = 1.0
    top_autoregressive: int = 0

    def __post_init__(self) -> None:
        try:
            shape = tuple(int(n) for n in self.image_shape)
        except (TypeError, OverflowError):
            shape = ()
        if len(shape) != 3 or not 1 <= shape[0] <= 4 or not 4 <= min(shape[1:]) <= max(shape[1:]) <= 65_536:
            raise ValueError(
                "image_shape must be (channels, height, width) with 1 to 4 channels and 4 x 4 to 65536 x "
                f"65536 pixels; got {self.image_shape!r}"
            )
        object.__setattr__(self, "image_shape", shape)
        names = [self.transforms] if isinstance(self.transforms, str) else self.transforms
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"transforms must be names; got {self.transforms!r}")
        object.__setattr__(self, "transforms", tuple(names))
        for field, known in (
            ("prior", TOP_PRIORS),
            ("posterior", ("normal", "uniform")),
            ("latents", ("all", "top", "none")),
            ("coefficients", ("raw", "residual")),
            ("backbone", BACKBONES),
            ("activation", ACTIVATIONS),
        ):
            if not isinstance(getattr(self, field), str) or getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}; got {getattr(self, field)!r}")
        if self.latents != "none" and (self.posterior == "uniform") != (self.prior == "logistic"):
            raise ValueError(
                "posterior=uniform and prior=logistic go together; got "
                f"posterior={self.posterior}, prior={self.prior}"
            )
        kernels = self.kernels
        if (
            not isinstance(kernels, Sequence)
            or len(kernels) != 3
            or any(k not in (1, 3, 5, 7) for k in kernels)
        ):
            raise ValueError(f"kernels must be three sizes of 1, 3, 5 or 7; got {kernels!r}")
        object.__setattr__(self, "kernels", tuple(kernels))
        for field, kinds, most in (  # more than any model needs: a file could ask for any memory
            ("width", (int, float), 64), ("depth", (int, float), 64), ("level_width", (int, float), 2),
            ("level_depth", (int, float), 1), ("top_width", (int, float), 64),
            ("latent_channels", int, 4096), ("components", int, 256), ("prior_components", int, 65_536),
            ("num_values", int, 256),
        ):  # fmt: skip
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
                kind = "whole number" if kinds is int else "number"
                raise ValueError(f"{field} must be a positive {kind} of at most {most}; got {value!r}")
        for field in (
            "consistent",
            "residual_mean",
            "shared",
            "inner_elu",
            "depthwise",
            "integer",
            "subpixel",
        ):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false; got {getattr(self, field)!r}")
        if self.shared and (self.latents != "none" or self.backbone != "residual"):
            raise ValueError(
                "shared=true needs latents=none and backbone=residual; got "
                f"latents={self.latents}, backbone={self.backbone}"
            )

        if self.integer and (self.latents != "none" or self.backbone != "residual" or self.depthwise):
            raise ValueError(
                "integer=true needs latents=none, backbone=residual and depthwise=false; got "
                f"latents={self.latents}, backbone={self.backbone}, depthwise={self.depthwise}"
            )

        if isinstance(self.autoregressive, bool) or self.autoregressive not in (0, *range(1, 32, 2)):
            raise ValueError(
                f"autoregressive must be 0 or an odd number up to 31; got {self.autoregressive!r}"
            )
        if isinstance(self.top_autoregressive, bool) or self.top_autoregressive not in (
            0,
            *range(3, 32, 2),
        ):
            raise ValueError(
                "top_autoregressive must be 0 or an odd number from 3 to 31; "
                f"got {self.top_autoregressive!r}"
            )
        if max(self.autoregressive, self.top_autoregressive) and (
            self.integer or self.backbone != "residual"
        ):
            raise ValueError(
                "autoregressive needs backbone=residual and integer=false; got "
                f"backbone={self.backbone}, integer={self.integer}"
            )

        if self.subpixel and (self.latents != "none" or self.integer):
            raise ValueError(
                "subpixel=true needs latents=none and integer=false; got "
                f"latents={self.latents}, integer={self.integer}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-able dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], version: int = FORMAT) -> ModelConfig:
        """Return the settings in a dictionary that `to_dict` made, also with former names of fields.

        Args:
            config: Settings by name.
            version: Of the format in which they were written. In version 1 "flow" means "flow-residual" and
                "mog" means "mog-local".

        Raises:
            TypeError: It is not a mapping.
            ValueError: A setting is unknown or wrong, or the model has the dense networks of version 1,
                which were replaced.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"a model's configuration must map names to values; got {config!r}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        config = {FORMER_FIELDS.get(key, key): value for key, value in config.items()}
        for key in config:
            _choose(key, known, "model option")
        if version > 1:
            return cls(**config)
        if config.get("backbone", "dense") == "dense":
            raise ValueError(
                "dense networks of format 1 have been replaced by the papers': train the model again"
            )
        prior = config.get("prior", "flow")
        return cls(**{**config, "prior": _SINCE_2.get(prior, prior)})


_SINCE_2 = {"flow": "flow-residual", "mog": "mog-local"}  # priors by their names in format 1

_OURS: dict[str, Any] = {"consistent": True, "residual_mean": True, "coefficients": "residual"}
_CHAIN: dict[str, Any] = {"latents": "none", "backbone": "residual", **_OURS}

PRESETS: dict[str, dict[str, Any]] = {
    "vae-normal": {"prior": "normal"},
    "vae-mog": {"prior": "mog"},
    "vae": {"prior": "flow"},
    "srvae": {"transforms": ("bicubic2",)},
    "selfvae-sketch": {"transforms": ("sketch",)},
    "selfvae-3lvl": {"transforms": ("bicubic2", "bicubic2")},
    "selfvae": {"transforms": ("mean2",), **_OURS},
    "selfvae-mean-3lvl": {"transforms": ("mean2", "mean2"), **_OURS},
    "selfvae-grey": {"transforms": ("grey",), **_OURS},
    "selfvae-bits": {"transforms": ("bits3",), **_OURS},
    "selfvae-halve": {"transforms": ("halve",), **_CHAIN},
    "selfvae-quincunx": {"transforms": ("quincunx",), **_CHAIN},
}

SIZES: dict[str, dict[str, float]] = {
    "tiny": {"width": 0.1, "depth": 0.5, "prior_components": 100},
    "small": {"width": 0.375, "depth": 1.0},
    "paper": {"width": 1.0, "depth": 1.0},
}
# the papers' networks, whose growth doubles, for about the same number of parameters
_DENSE_SIZES = {"tiny": {"width": 0.08, "depth": 0.4}, "small": {"width": 0.33}, "paper": {}}


def build(
    name: str,
    size: str = "small",
    image_shape: tuple[int, int, int] = (3, 32, 32),
    **overrides: Any,
) -> SelfVAE:
    """Build a new model, with weights drawn from torch's global random state.

    Args:
        name: a preset (see `PRESETS`).
        size: "tiny" (under 0.5 M parameters), "small" (about 5 M) or "paper".
        image_shape: channels, height, width.
        overrides: any field of `ModelConfig`. With backbone="residual" a flow prior has residual
            couplings unless a prior is named.

    Returns:
        The model, in training mode on the CPU. Before its first use `model.initialise(x)` sets the scale of
        its layers from a batch x; training does so by itself.

    Raises:
        ValueError: The name, the size or an option is unknown, or a transform does not fit the images.
    """
    return from_config(configure(name, size, image_shape, **overrides))


def configure(
    name: str,
    size: str = "small",
    image_shape: tuple[int, int, int] = (3, 32, 32),
    **overrides: Any,
) -> ModelConfig:
    """Return the configuration of the model that `build` makes; arguments and errors as there."""
    preset, scale = _choose(name, PRESETS, "model"), _choose(size, SIZES, "size")
    options = {**preset, **scale, **overrides, "name": name, "image_shape": image_shape}
    if options.get("backbone", "dense") == "dense":
        options = {**options, **_DENSE_SIZES[size], **overrides}
    elif options["backbone"] == "residual" and options.get("prior", "flow") == "flow":
        options["prior"] = overrides.get("prior", "flow-residual")
    if options.get("prior") != "mog" and "prior_components" not in overrides:
        options.pop("prior_components", None)
    return ModelConfig.from_dict(options)


def _transforms(config: ModelConfig) -> list[Transform]:
    _, h, w = config.image_shape
    if config.transforms not in (("halve",), ("quincunx",)):
        return [transform(name) for name in config.transforms]
    quincunx = config.transforms == ("quincunx",)
    steps: list[Transform] = []
    while max(h, w) > 4 or (quincunx and config.latents == "none" and (h, w) in ((4, 4), (4, 2), (2, 4))):
        if quincunx and h < 2 * w and w < 2 * h:
            names = ["checkerboard", "staggered"]
        else:
            names = ["columns" if w >= h else "rows"]
        for step in map(transform, names):
            h, w = step.size(h, w)
            steps.append(step)
    return steps


def from_config(config: ModelConfig) -> SelfVAE:
    """Build the model that a configuration describes."""
    c, h, w = config.image_shape
    transforms = [*_transforms(config), Null()]
    specs, sizes = [ImageSpec(c, config.num_values)], [(h, w)]
    for t in transforms:
        specs.append(t.output_spec(specs[-1]))
        sizes.append(t.size(*sizes[-1]))
    plan = _Plan(config, transforms, specs, sizes)
    return SelfVAE([plan.level(k) for k in range(len(transforms))], config)


@dataclass(frozen=True)
class _Part:
    """A part of the papers' networks: growth, steps per block, number of halvings, doublings or blocks."""

    growth: int
    steps: int
    scales: int


# for images of 32 x 32: a VAE's only level, and the top and the other level of a model with two; the parts
# of the latter: q(z|x); z on its way to x, and then with y; p(z|y, u): y, u, and these together
# Source: Gatopoulos & Tomczak 2020, the configuration published with it
_PAPERS: dict[str, dict[str, _Part]] = {
    "only": {"encoder": _Part(16, 8, 2), "decoder": _Part(128, 6, 2)},
    "top": {"encoder": _Part(64, 3, 1), "decoder": _Part(128, 4, 1)},
    "inner": {
        "encoder": _Part(16, 4, 2),
        "decoder": _Part(64, 8, 2),
        "joint": _Part(64, 5, 3),
        "prior y": _Part(32, 5, 1),
        "prior u": _Part(64, 3, 3),
        "prior": _Part(64, 3, 3),
    },
}
_WIDEST = 3  # most by which `level_width` multiplies channels
_BETWEEN = 16  # channels of y's and u's branches of p(z|y, u)


@dataclass(frozen=True)
class _Plan:
    """Turns a configuration into levels, with the papers' growths and steps, scaled."""

    config: ModelConfig
    transforms: list[Transform]
    specs: list[ImageSpec]
    sizes: list[tuple[int, int]]
    shared: dict[tuple[str, ImageSpec], tuple[Decoder, list[GroupNet]]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def top(self) -> int:
        return len(self.transforms) - 1

    @property
    def dense(self) -> bool:
        return self.config.backbone == "dense"

    def has_latent(self, k: int) -> bool:
        return self.config.latents == "all" or (self.config.latents == "top" and k == self.top)

    def parts(self, k: int) -> dict[str, _Part]:
        """Return the papers' numbers for level k."""
        return _PAPERS["inner" if k < self.top else "top" if self.top else "only"]

    def downs(self, k: int) -> int:
        """Return how often level k's encoder halves y[k]: to 8 x 8, but at least once, at most 3 times."""
        return max(1, min(3, int(math.log2(min(self.sizes[k]) / 8))))

    def grid(self, k: int) -> float:
        """Return the side of a square with as many positions as the grid of level k's decoder."""
        keeps = self.keeps(k)
        return math.sqrt(math.prod(self.sizes[k]) / math.prod(keeps.block if keeps else (1, 1)))

    def keeps(self, k: int) -> Subsampling | None:
        """Return level k's transform if the level models only the pixels that it drops."""
        t = self.transforms[k]
        return t if self.config.consistent and isinstance(t, Subsampling) else None

    def wide(self, channels: float) -> int:
        """Scale the papers' number of channels, to a multiple of 4."""
        return max(4, round(channels * self.config.width / 4) * 4)

    def deep(self, steps: float) -> int:
        """Scale the papers' number of steps."""
        return max(1, round(steps * self.config.depth))

    def branch(
        self,
        part: _Part,
        resize: Literal["flat", "down", "up"] = "flat",
        scales: int | None = None,
        *,
        extra: int = 0,
        stem: int = 64,
        out: int = 0,
        kernel: int = 1,
    ) -> Branch:
        """A part as it is built: its number of scales may be another than the papers'.

        Dense: growths are such that models of 64 x 64 have as many parameters as the papers say. Others:
        with a stem, and without a convolution at the end.

        extra: halvings beyond the papers'; each doubles the channels once more and takes from the growth.
        """
        scales = part.scales if scales is None else scales
        growth = part.growth * (0.75 if self.dense and resize == "up" else 0.5) ** max(0, extra)
        steps = self.deep(part.steps)
        if not self.dense:
            plain = self.config.latents != "none"
            options: dict[str, Any] = {"stem": self.wide(stem), "backbone": self.config.backbone}
            if not plain:
                options |= {
                    "activation": self.config.activation,
                    "kernels": self.config.kernels[:2],
                    "depthwise": self.config.depthwise,
                    "integer": self.config.integer,
                }
            return Branch(self.wide(growth), steps, scales, resize, **options)
        growth *= 0.85 if self.top > 1 else 1.0
        options = {"last": resize == "down", "out": out, "kernel": kernel}
        return Branch(self.wide(growth), steps, scales, resize, inner_elu=self.config.inner_elu, **options)

    def level(self, k: int) -> Level:
        config, latent = self.config, self.has_latent(k)
        if k == self.top and config.top_width != 1:
            wider = dataclasses.replace(config, width=config.width * config.top_width, top_width=1.0)
            return dataclasses.replace(self, config=wider).level(k)
        return Level(
            self.specs[k],
            self.transforms[k],
            self._decoder(k),
            self._encoder(k) if latent else None,
            self._prior(k) if latent else None,
            consistent=config.consistent,
            residual_mean=config.residual_mean and k < self.top,
            rounded=config.posterior == "uniform",
            coefficients=config.coefficients,
            subpixel=self.subpixel(k),
        )

    def subpixel(self, k: int) -> bool:
        """Whether level k's decoder predicts all pixels of a block at once."""
        return self.config.subpixel and not self.keeps(k) and self.transforms[k].scale != (1, 1)

    def _encoder(self, k: int) -> Encoder:
        part, downs = self.parts(k)["encoder"], self.downs(k)
        branch = self.branch(part, "down", downs, extra=downs - part.scales)
        channels, latent = self.specs[k].channels, self.config.latent_channels
        return Encoder(channels, latent, branch, kernel=1 if self.dense else 3)

    def _decoder(self, k: int) -> nn.Module:
        config, spec, up = self.config, self.specs[k], self.specs[k + 1]
        t, is_top, keeps = self.transforms[k], k == self.top, self.keeps(k)
        scale, kept = (keeps.block, len(keeps.kept)) if keeps else ((1, 1), 0)
        own, groups = param_count(spec.channels, config.components), math.prod(scale) - kept
        params, head_scale = own * groups, HEAD_SCALE
        autoregressive = self.autoregressive(k)
        if autoregressive:
            if self.subpixel(k) and not (config.consistent and isinstance(t, MeanDownscale)):
                raise ValueError(
                    "autoregressive and subpixel=true together need consistent=true and block means; got "
                    f"consistent={config.consistent}, {t}"
                )
            groups = math.prod(t.scale) if self.subpixel(k) else groups
            params, head_scale = self.channels(k) * groups, 1.0
        elif keeps and config.residual_mean:
            params += keeps.weights(spec)
        grid = param_grid(spec.channels, config.components, groups, params) if config.integer else None
        if is_top and not self.has_latent(k):
            constant = Constant(params, grid)
            return AutoregressiveDecoder(constant, self._groups(k, 1)) if autoregressive else constant
        context = 0 if is_top else up.channels * kept if keeps else spec.channels
        if config.shared and not is_top:
            if (str(t), spec) not in self.shared:
                body = self.branch(_Part(256, 12, 1), stem=256)
                decoder = Decoder(
                    context + Shared.PLANES, 0, params, None, body, config.kernels[2], grid, head_scale
                )
                self.shared[str(t), spec] = decoder, self._groups(k, groups) if autoregressive else []
            decoder, nets = self.shared[str(t), spec]
            return AutoregressiveDecoder(Shared(decoder), nets) if autoregressive else Shared(decoder)
        if autoregressive:
            context = up.channels * max(1, kept)
        elif self.subpixel(k):
            context, params = up.channels, params * math.prod(t.scale)
        joint: Branch | None = None
        if not is_top and self.dense:
            joint = self.branch(self.parts(k)["joint"])
        elif not is_top:
            layers = 12 * config.level_depth ** self.halvings(k)
            joint = self.branch(_Part(256, round(layers), 1), stem=256)
            if not self.dense:
                joint = dataclasses.replace(joint, growth=self.channels(k), stem=self.channels(k))
        latent = config.latent_channels if self.has_latent(k) else 0
        z = self._z_branch(k, scale, 0 if is_top else params) if latent else None
        decoder = Decoder(
            context, latent, params, z, joint, 1 if self.dense and not is_top else config.kernels[2], grid,
            head_scale,
        )  # fmt: skip
        if autoregressive:
            return AutoregressiveDecoder(decoder, self._groups(k, groups))
        return SubPixel(decoder, t.scale) if self.subpixel(k) else decoder

    def autoregressive(self, k: int) -> bool:
        """Whether level k's pixels depend on those before them."""
        keeps = self.keeps(k)
        if self.kernel(k) == 1:  # a group sees those before it only: there must be several
            return self.subpixel(k) or (keeps is not None and math.prod(keeps.block) - len(keeps.kept) > 1)
        here = k == self.top or keeps is not None or self.subpixel(k)
        return here and self.kernel(k) > 0

    def kernel(self, k: int) -> int:
        """Return the size of level k's masked convolutions; 1: none."""
        top = self.config.top_autoregressive if k == self.top else 0
        return top or self.config.autoregressive

    def halvings(self, k: int) -> float:
        """Return how often the grid of level k's decoder is halved, in height and width, from level 0's."""
        return max(0.0, math.log2(self.grid(0) / self.grid(k)))

    def channels(self, k: int) -> int:
        """Return the channels of level k's residual decoder."""
        if self.config.shared:
            return self.wide(256)
        return self.wide(256 * min(_WIDEST, self.config.level_width ** self.halvings(k)))

    def _groups(self, k: int, groups: int) -> list[GroupNet]:
        channels, width = self.specs[k].channels, self.channels(k)
        params, steps = param_count(channels, self.config.components), self.deep(4)
        return [GroupNet(channels, g, width, params, self.kernel(k), steps) for g in range(groups)]

    def _z_branch(self, k: int, scale: tuple[int, int], out: int) -> Branch:
        part, downs = self.parts(k)["decoder"], self.downs(k)
        ups, stem = downs - round(math.log2(min(scale))), 128 if k == self.top else 64
        return self.branch(part, "up", ups, extra=downs - part.scales, stem=stem, out=out, kernel=3)

    def _prior(self, k: int) -> nn.Module:
        config, stride = self.config, 2 ** self.downs(k)
        if k == self.top:
            return self._top_prior(config.latent_channels, stride)
        parts = self.parts(k)
        above = any(self.has_latent(j) for j in range(k + 1, self.top + 1))
        rows, cols = self.transforms[k].scale
        halvings = self.downs(k) - round(math.log2(max(rows, cols)))
        extra, between = halvings - parts["prior y"].scales, self.wide(_BETWEEN)
        return PriorNet(
            self.specs[k + 1].channels,
            config.latent_channels if above else 0,
            config.latent_channels,
            y=self.branch(parts["prior y"], "down", halvings, extra=extra, stem=32, out=between),
            z=self.branch(parts["prior u"], out=between),
            joint=self.branch(parts["prior"]),
            ratio=(rows / stride, cols / stride),
            kernel=1 if self.dense else 3,
        )

    def _top_prior(self, latent: int, stride: int) -> nn.Module:
        config, (height, width) = self.config, self.sizes[self.top]
        if config.prior == "flow":
            return FlowPrior(latent, stride, self.wide(64), self.deep(5), config.inner_elu)
        if config.prior == "flow-residual":
            return ResidualFlowPrior(latent, stride, self.wide(64), self.deep(5))
        if config.prior == "flow-autoregressive":
            return AutoregressivePrior(latent, stride, self.wide(256), self.deep(4))
        if config.prior == "mog":
            size = -(-height // stride), -(-width // stride)
            return MixturePrior(latent, stride, size, config.prior_components)
        return TOP_PRIORS[config.prior](latent, stride)
