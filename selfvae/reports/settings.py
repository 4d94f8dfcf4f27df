"""What a report measures; free of torch, so that the command line can explain it at once."""

from __future__ import annotations

from dataclasses import dataclass

from selfvae.nn.precision import Resolved

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        limit: number of images for the ELBO.
        iwae_samples: samples of the latents per image for the importance-weighted bounds, which are also
            computed with 1, 8 and 64; 0: none.
        iwae_limit: number of images for the importance-weighted bounds.
        precision: numbers that the networks compute in; bf16-mixed is faster where the processor has it.
            Likelihoods stay in float32.
        enhance_limit: number of images that are enhanced.
        draws: enhancements of each image.
        ood_limit: number of images of each data set for out-of-distribution detection.
        fid_samples: number of generated images for the sample quality.
        figures: images in a row of the figures; 0: no figures.
        batch_size: images per batch.
        seed: random seed.
    """

    limit: int = 10_000
    iwae_samples: int = 512
    iwae_limit: int = 1000
    precision: Resolved = "32-true"
    enhance_limit: int = 500
    draws: int = 8
    ood_limit: int = 1000
    fid_samples: int = 10_000
    figures: int = 8
    batch_size: int = 64
    seed: int = 0
