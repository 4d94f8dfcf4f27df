"""Writes the golden files anew: only for a new version of the format."""

import json
import sys
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_codec import GOLDEN, fixed

from selfvae.codec import Codec, fingerprint, lattice

if __name__ == "__main__":  # pytest looks into every module for examples
    i = torch.arange(3 * 13 * 9).view(1, 3, 13, 9)
    pictures = {
        "colour": (i * 3 + (i * 7919 % 17)) % 256,
        "grey": (i[:, :1] * 5 + (i[:, :1] * 104729 % 11)) % 256,
        "one-pixel": i[:, :, :1, :1] * 2 + 7,
    }
    codec, sums = Codec(fixed()), {"fingerprint": fingerprint(fixed()).hex()}
    for name, x in pictures.items():
        (GOLDEN / f"{name}.svae").write_bytes(codec.compress(x.byte()))
        sums[name] = [list(x.shape), zlib.crc32(x.byte().numpy().tobytes())]
    (GOLDEN / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    tables = [lattice._weight_table(), lattice._inverse_table(), *lattice._tail_table()]
    (GOLDEN / "tables.json").write_text(
        json.dumps([zlib.crc32(t.astype("<i8").tobytes()) for t in tables]) + "\n"
    )
