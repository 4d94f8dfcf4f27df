"""Writes the golden files anew: only for a new version of the format."""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # pytest looks into every module for examples
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_codec import (
        GOLDEN,
        GOLDEN_FILES,
        fixed,
        golden_album,
        golden_codec,
        golden_picture,
        golden_tables,
        uniform_words,
    )

    from selfvae.codec import fingerprint, pack
    from selfvae.codec.ans import ANSCoder
    from selfvae.codec.container import VERSION

    folder = GOLDEN / str(VERSION)
    folder.mkdir(exist_ok=True)
    sums = {"fingerprint": fingerprint(fixed()).hex()}
    for name, (_, shape) in GOLDEN_FILES.items():
        x = golden_picture(shape)
        (folder / f"{name}.svae").write_bytes(golden_codec(name).compress(x))
        sums[name] = [list(x.shape), zlib.crc32(x.numpy().tobytes())]
    album = golden_album(600)
    (folder / "all.svaes").write_bytes(pack(golden_codec("colour"), album, block=600))
    for prefix in ("", "residual-"):
        archive = pack(golden_codec(f"{prefix}flow"), album[:10])
        (folder / f"{prefix}drawn.svaes").write_bytes(archive)
    sums["archive"] = [[name, zlib.crc32(x.contiguous().numpy().tobytes())] for name, x in album]
    encoder, p = ANSCoder(), (np.arange(20_000, dtype=np.int64) * 104729) % ((1 << 24) - 1) + 1
    encoder.bits(p, np.arange(20_000) * 7919 % 16_777_259 < p)
    encoder.push()
    sums["words"] = zlib.crc32(encoder.words().astype("<u4").tobytes())
    sums["uniform"] = uniform_words()
    (GOLDEN / "checksums.json").write_text(json.dumps(sums) + "\n")
    checks = [zlib.crc32(t.astype("<i8").tobytes()) for t in golden_tables()]
    (GOLDEN / "tables.json").write_text(json.dumps(checks) + "\n")
