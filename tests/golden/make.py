"""Writes the golden files again: only for a new version of the format.

python -m tests.golden.make 2: of models whose networks are in float64; 3: of integer models; 4: an archive
of an integer model. (The archives of format 3 cannot be written any more.)
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # pytest imports every module to look for doctests
    sys.path.insert(0, str(Path(__file__).parents[1] / "codec"))
    from codec_models import (
        GOLDEN,
        GOLDEN_3,
        GOLDEN_FILES,
        fixed,
        golden_3,
        golden_album,
        golden_album_4,
        golden_codec,
        golden_picture,
        golden_tables,
        integer_codec,
        saved_golden,
        uniform_words,
        write_golden_3,
    )

    from selfvae import hub
    from selfvae.codec import fingerprint, pack
    from selfvae.codec.ans import ANSCoder
    from selfvae.codec.container import VERSION

    if sys.argv[1:] == ["3"]:
        folder = GOLDEN / "3"
        folder.mkdir(exist_ok=True)
        checks: dict[str, object] = {}
        for name in GOLDEN_3:
            x = golden_3(name)
            (folder / f"{name}.svae").write_bytes(write_golden_3(name))
            checks[name] = [list(x.shape), zlib.crc32(x.numpy().tobytes())]
        hub.save(saved_golden(), folder / "model")
        checks["model"] = [fingerprint(saved_golden()).hex(), hub.known_answer(saved_golden())]
        (folder / "checksums.json").write_text(json.dumps(checks) + "\n")
    elif sys.argv[1:] == ["4"]:
        folder = GOLDEN / "4"
        folder.mkdir(exist_ok=True)
        (folder / "shared.svaes").write_bytes(pack(integer_codec(), golden_album_4(), block=8))
    elif sys.argv[1:] == ["2"]:
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
        sums_of_tables = [zlib.crc32(t.astype("<i8").tobytes()) for t in golden_tables()]
        (GOLDEN / "tables.json").write_text(json.dumps(sums_of_tables) + "\n")
    else:
        sys.exit(__doc__)
