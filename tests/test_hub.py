"""Models on a hub that speaks the Hugging Face hub's protocol, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import selfvae
from selfvae import hub
from selfvae.codec import Codec
from selfvae.presets import ModelConfig

pytest.importorskip("huggingface_hub", reason="the hub needs huggingface_hub")


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: create, commit, list, fetch."""

    files: dict[str, dict[str, bytes]]
    asked: list[str]
    broken = False  # whether it breaks off in the middle of an upload

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.asked.append(f"POST {self.path}")
        if self.headers["Authorization"] != "Bearer hf_right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = (
                f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            )
            self.files.setdefault(name, {})
            self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            asked = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": asked})
        elif self.broken:
            self.connection.close()
        else:
            name = self.path.split("/models/")[1].split("/commit/")[0]
            for line in body.decode().splitlines():
                if json.loads(line)["key"] == "file":
                    file = json.loads(line)["value"]
                    self.files[name][file["path"]] = base64.b64decode(file["content"])
            url = f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}"
            self.answer({"commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].strip("/")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if name not in self.files:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.startswith("api/models/"):
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": "0"}
                for file, data in self.files[name].items()
            ]
            siblings = [{"rfilename": file["path"]} for file in tree]
            about = {"id": name, "sha": "0" * 40, "siblings": siblings}
            self.answer(tree if "/tree/" in path else about)
        else:
            data = self.files[name][path.split("/resolve/")[1].split("/", 1)[1]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.answer(data, ETag=etag, X_Repo_Commit="0" * 40)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Hub]]]:
    kind = type("OneHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()


def run(code: str, address: str, home: Path, token: str = "hf_right") -> subprocess.CompletedProcess[str]:
    """Python, with that hub as the hub."""
    env = {
        "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", f"import selfvae, torch\n{code}"],
        capture_output=True, text=True, timeout=120, env={**os.environ, **env},
    )  # fmt: skip


BUILD = "torch.manual_seed(1); model = selfvae.build('selfvae', 'tiny', width=0.05)\n"


def test_push_and_fetch(server: tuple[str, type[Hub]], tmp_path: Path) -> None:
    """One process does all of it; the request for "mark" separates what it fetches from what it holds."""
    address, kind = server
    files = kind.files["me/mine"] = {"evil.py": b"raise SystemExit(1)", "pytorch_model.bin": b"\x80\x04."}
    others = set(files)
    code = """
import urllib.error, urllib.request
print(selfvae.push_to_hub(model, 'me/mine', {'Data': 'none'}))
x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
scores = []
for model in (model.eval(), selfvae.from_pretrained('me/mine')):
    torch.manual_seed(0)
    scores.append(model(x).elbo)
assert torch.equal(*scores)
try:
    urllib.request.urlopen(ADDRESS + '/mark/mark')
except urllib.error.HTTPError:
    pass
selfvae.from_pretrained('me/mine', offline=True)
"""
    done = run(f"{BUILD}ADDRESS = {address!r}{code}", address, tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == f"{address}/me/mine", done.stderr
    assert {"README.md", "config.json", "model.safetensors"} == {f for f in files if f[0] != "."} - others
    card = files["README.md"].decode()
    assert "## Data\n\nnone" in card and 'from_pretrained("me/mine")' in card
    assert any(path.startswith("GET") and "model.safetensors" in path for path in kind.asked)
    assert not any("evil" in path or "bin" in path for path in kind.asked)
    assert kind.asked[-1] == "GET /mark/mark"  # nothing is asked for offline


@pytest.mark.slow
def test_what_the_hub_lacks_or_refuses(server: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, _ = server
    attempts = """
def attempt(do):
    try:
        do()
    except ValueError as error:
        print(error)

attempt(lambda: selfvae.from_pretrained('me/none'))
attempt(lambda: selfvae.from_pretrained('me/none', offline=True))
attempt(lambda: selfvae.push_to_hub(model, 'me/mine'))
"""
    told = run(BUILD + attempts, address, tmp_path, token="hf_wrong").stdout
    assert "no model me/none on the hub, nor is there such a folder" in told
    assert "no model me/none among what was fetched before" in told
    assert "the hub did not take me/mine" in told and "hf auth login" in told
    done = run(f"{BUILD}selfvae.push_to_hub(model, 'me/mine')", "http://127.0.0.1:9", tmp_path)
    assert "ValueError: the hub did not take me/mine" in done.stderr


@pytest.mark.slow
def test_the_command(server: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, kind = server
    selfvae.save(selfvae.build("vae", "tiny", width=0.05), tmp_path / "run")
    (tmp_path / "run/train.yaml").write_text("model: vae\ndata: /home/me/cats\nsteps: 5\n")
    code = f"from selfvae.cli import main; raise SystemExit(main(['push', '{tmp_path}/run', 'me/cats']))"
    done = run(code, address, tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == f"{address}/me/cats", done.stderr
    text = kind.files["me/cats"]["README.md"].decode()
    assert "data: cats\nsteps: 5" in text and "/home" not in text
    (tmp_path / "pushed").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "pushed" / name).write_bytes(kind.files["me/cats"][name])
    # so that it reads the files of the local one
    own = hub.fingerprint(hub.load(tmp_path / "run"))
    assert hub.fingerprint(hub.load(tmp_path / "pushed")) == own and "ounded" not in text + done.stderr
    # rounded only when asked, and not without a word
    done = run(code.replace("'me/cats'", "'me/cats', '--half'"), address, tmp_path)
    assert done.returncode == 0, done.stderr
    weights = kind.files["me/cats"]["model.safetensors"]
    (tmp_path / "pushed/model.safetensors").write_bytes(weights)
    rounded = hub.fingerprint(hub.load(tmp_path / "pushed"))
    assert rounded != own
    for told in (done.stderr, kind.files["me/cats"]["README.md"].decode()):
        assert f"Rounded to float16; the fingerprint is {rounded.hex()}" in told
        assert f"need the model of fingerprint {own.hex()}" in told
    assert "changes no weight" in hub.about_rounding(hub.load(tmp_path / "pushed"))


@pytest.mark.slow
def test_a_push_that_fails_leaves_nothing_and_is_done_again(
    server: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    """A full disk, and a hub that breaks off; one line each."""
    address, kind = server
    selfvae.save(selfvae.build("vae", "tiny", width=0.05), tmp_path / "run")
    push = f"from selfvae.cli import main; raise SystemExit(main(['push', '{tmp_path}/run', 'me/cats']))"
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    for code, broken, why in ((full, False, "File too large"), ("", True, "the hub did not take me/cats")):
        kind.broken = broken
        done = run(code + push, address, tmp_path)
        assert done.returncode in (1, 2) and why in done.stderr and "Traceback" not in done.stderr
        assert not kind.files.get("me/cats")
    kind.broken = False
    done = run(push, address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in kind.files["me/cats"]


def test_folders_and_shipped_models_need_no_hub(tmp_path: Path) -> None:
    model = selfvae.build("selfvae-halve", "tiny", width=0.05)
    selfvae.save_pretrained(model, tmp_path / "mine", {"Limits": "many"})
    text = (tmp_path / "mine/README.md").read_text()
    assert (
        text.startswith("---\nlibrary_name: selfvae\n") and "# mine" in text and "## Limits\n\nmany" in text
    )
    assert "no latents: its likelihood is exact" in text and "| y6 | 3 channels of 256 values" in text
    loaded = selfvae.from_pretrained(tmp_path / "mine")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert selfvae.from_pretrained("photos-v2").config.name
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        selfvae.from_pretrained("no-such-model")
    with pytest.raises(ValueError, match="OWNER/NAME"):
        hub.push_to_hub(model, "mine")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert hub.find("cifar10-2m-v1") == hub.bundled()["cifar10-2m-v1"]
    model = selfvae.build("selfvae", "tiny", (3, 16, 16), width=0.06)
    for use in (lambda m: hub.save(m, tmp_path / "tiled"), Codec):
        with pytest.raises(ValueError, match="this one is tiled"):
            use(selfvae.tiled(model))
    with pytest.raises(ValueError, match="a tiled model draws"):
        selfvae.tiled(model)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    hub.save(model, tmp_path / "run")
    for text, message in (
        ("{", "is not valid JSON"),
        ('{"format": 1, "model": null}', "describes no model"),
        ('{"format": 2, "model": {"levels": "x"}}', "describes no model: num_values must be"),
        ('{"format": 1, "model": {"prior": "flow"}}', "dense networks of format 1 have been replaced"),
    ):
        (tmp_path / "run/config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            hub.load(tmp_path / "run")


@pytest.mark.parametrize(("then", "now"), [("flow", "flow-residual"), ("mog", "mog-local")])
def test_words_of_format_1(then: str, now: str, tmp_path: Path) -> None:
    """Priors that were renamed: read by their old names, and fingerprints of old models stay."""
    model = selfvae.build("selfvae", "tiny", (3, 16, 16), width=0.06, backbone="residual", prior=now)
    hub.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 2 and config["model"]["prior"] == now
    mark = hub.fingerprint(model)
    former = {"num_values": "levels", "residual_mean": "anchored"}
    old = {former.get(key, key): value for key, value in config["model"].items()}
    old = {key: value for key, value in old.items() if key in FORMAT_1}
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": {**old, "prior": then}}))
    again = hub.load(tmp_path)
    assert isinstance(again.config, ModelConfig) and again.config.prior == now
    assert hub.fingerprint(again) == mark
    # as format 1 hashed it
    hashed = {k: v for k, v in {**old, "prior": then}.items() if (k, v) not in PLAIN}
    found = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode())
    for name, value in sorted(hub.unique_state_dict(model).items()):
        found.update(f"{name} {tuple(value.shape)} ".encode())
        found.update(value.detach().double().numpy().astype("<f8").tobytes())
    assert found.digest()[:8] == mark


PLAIN = (("posterior", "normal"), ("shared", False))
# the fields of a model of format 1; those that came later leave its fingerprint alone
FORMAT_1 = {
    "name", "image_shape", "levels", "transforms", "prior", "posterior", "latents", "latent_channels",
    "consistent", "anchored", "coefficients", "components", "backbone", "shared", "width", "depth",
}  # fmt: skip


def test_options_that_mean_nothing_leave_the_fingerprint_alone() -> None:
    def mark(**options: object) -> bytes:
        torch.manual_seed(0)
        return hub.fingerprint(selfvae.build("selfvae", "tiny", (3, 16, 16), width=0.06, **options))

    residual = mark(backbone="residual")
    assert mark(backbone="residual", inner_elu=False, prior_components=7) == residual
    assert mark(inner_elu=True) != mark()


def test_the_writer_of_a_file_is_found_by_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SELFVAE_MODELS", raising=False)
    loaded: list[str] = []

    def load(folder: Path) -> selfvae.SelfVAE:
        loaded.append(folder.name)
        return whole(folder)

    whole = hub.load
    monkeypatch.setattr(hub, "load", load)
    marks = {name: hub.fingerprint(whole(name)) for name in (hub.PHOTOS, "cifar10-2m-v1")}
    for _ in range(2):  # the codec's usual model first, each once
        assert hub.find_writer(marks[hub.PHOTOS]) == hub.bundled()[hub.PHOTOS]
    assert loaded == [hub.PHOTOS]
    assert hub.find_writer(marks["cifar10-2m-v1"]) == hub.bundled()["cifar10-2m-v1"]
    assert loaded == [hub.PHOTOS, "cifar10-2m-v1"]

    model = selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05)
    mark = hub.fingerprint(model)
    message = (
        f"fingerprint {mark.hex()}, which is none of {hub.PHOTOS}, cifar10-2m-v1, .*SELFVAE_MODELS names"
    )
    with pytest.raises(FileNotFoundError, match=message):
        hub.find_writer(mark)
    monkeypatch.setenv("SELFVAE_MODELS", str(tmp_path / "models"))
    with pytest.raises(FileNotFoundError, match="SELFVAE_MODELS must name a folder of models"):
        hub.find_writer(mark)
    for name in ("broken", "mine"):
        hub.save(model, tmp_path / "models" / name)
    (tmp_path / "models/broken/config.json").write_text("{")
    loaded.clear()
    for _ in range(2):
        assert hub.find_writer(mark) == tmp_path / "models/mine"
    assert loaded == ["broken", "mine", "broken"]
    with pytest.raises(FileNotFoundError, match=r"models/broken \(unreadable: .*is not valid JSON"):
        hub.find_writer(b"12345678")
    # weights that have changed are looked at again, and so is everything without the cache
    hub.save(selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.06), tmp_path / "models/mine")
    (tmp_path / "models/broken/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="is none of"):
        hub.find_writer(mark)
    (tmp_path / "cache/fingerprints.json").write_text("[")
    loaded.clear()
    assert hub.find_writer(marks[hub.PHOTOS]) and loaded == [hub.PHOTOS]


def test_rounding_makes_another_model_and_says_so(tmp_path: Path) -> None:
    model = selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05)
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    model.initialise(x)
    data = Codec(model).compress(x)
    for name, half in (("whole", False), ("half", True)):
        selfvae.save_pretrained(model, tmp_path / name, half=half)
    whole, half = selfvae.load(tmp_path / "whole"), selfvae.load(tmp_path / "half")
    assert torch.equal(Codec(whole).decompress(data), x)
    with pytest.raises(ValueError, match="another model"):
        Codec(half).decompress(data)
    text = (tmp_path / "half/README.md").read_text()
    assert hub.fingerprint(model).hex() in text and hub.fingerprint(half).hex() in text
    assert "Rounded" not in (tmp_path / "whole/README.md").read_text()


def test_what_is_said_about_rounding_an_integer_model_is_so(tmp_path: Path) -> None:
    """Its weights are rounded anyway, before they are written: float16 may change nothing more."""
    options = {"width": 0.1, "backbone": "residual", "integer": True}
    model = selfvae.build("selfvae-halve", "tiny", (3, 8, 8), **options)
    model.initialise(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    hub.save(model, tmp_path, half=True)
    own, pushed = hub.fingerprint(model), hub.fingerprint(hub.load(tmp_path))
    assert f"fingerprint {'stays' if own == pushed else 'is'} {pushed.hex()}" in hub.about_rounding(model)


def test_integer_weights_take_a_byte_each(tmp_path: Path) -> None:
    options = {"width": 0.1, "backbone": "residual", "integer": True}
    model = selfvae.build("selfvae-halve", "tiny", (3, 8, 8), **options)
    model.initialise(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    with torch.no_grad():
        kernels = [value for value in hub.unique_state_dict(model).values() if value.ndim == 4]
        kernels[0][0] = 0  # a channel without weights has no exponent
        kernels[0][1, 0] = -0.0  # the fingerprint tells it from 0.0
    hub.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    kernels = [value for value in stored.values() if value.ndim == 4]
    assert kernels and all(value.dtype == torch.int8 for value in kernels)
    expected = hub.unique_state_dict(hub.frozen(model))
    loaded = hub.unique_state_dict(hub.load(tmp_path))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert hub.fingerprint(hub.load(tmp_path)) == hub.fingerprint(model)
    del stored[next(name for name in stored if name.endswith(".exponents"))]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="exponents is missing"):
        hub.load(tmp_path)
