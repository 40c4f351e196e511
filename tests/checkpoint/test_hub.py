"""`hf://` names: huggingface_hub itself, fetching from a hub on this machine."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastjepa.checkpoint import write_encoder, write_huggingface
from fastjepa.checkpoint.encoder_sizes import parse_sizes
from fastjepa.model import Encoder

SIZES: dict[str, Any] = {
    "width": 24, "depth": 2, "heads": 2, "mlp_width": 48, "levels": [0, 1], "patch": 16,
    "tubelet": 2, "interpolate_rope": False, "rope": "tiled", "generation": "2",
}  # fmt: skip
COMMIT = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    """Serves `/OWNER/NAME/resolve/REVISION/FILE` from a folder, as the hub does."""

    def __init__(self, *arguments: Any, folder: Path) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        _, owner, name, _, _, *rest = self.path.split("/")
        file = self.folder.joinpath(owner, name, *rest)
        found = file.is_file()
        content = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if found:
            self.send_header("ETag", f'"{abs(hash(content)):x}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load(name: str, hub: str, home: Path) -> str:
    """The origin of what a fresh process loads, or its error."""
    code = (
        "import sys, fastjepa\n"
        "try: print(fastjepa.load(sys.argv[1]).origin)\n"
        "except ValueError as error: print(error)"
    )
    return run_python(hub, home, "-c", code, name)


def run_python(hub: str, home: Path, *arguments: str) -> str:
    """What a fresh Python writes that knows this hub alone."""
    run = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False,
        env={
            "PATH": "", "PYTHONPATH": ":".join(sys.path), "HF_ENDPOINT": hub,
            "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
        },
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_model_in_one_file_or_several_and_a_single_file(tmp_path: Path, hub: str) -> None:
    torch.manual_seed(0)
    state, sizes = Encoder(**SIZES).state_dict(), parse_sizes(SIZES, "")
    one, several = tmp_path / "hub" / "me" / "one", tmp_path / "hub" / "me" / "several"
    write_huggingface(one, state, sizes)
    write_encoder(one / "own.safetensors", state, sizes)
    write_huggingface(several, state, sizes)
    tensors = load_file(several / "model.safetensors")
    (several / "model.safetensors").unlink()
    index = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(index.values()):
        save_file({n: t for n, t in tensors.items() if index[n] == file}, several / file)
    (several / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model = "V-JEPA 2, 2 blocks of 24, a Hugging Face VJEPA2Model"
    assert load("hf://me/one", hub, tmp_path / "home") == model
    assert load("hf://me/several", hub, tmp_path / "home") == model
    found = load("hf://me/one/own.safetensors", hub, tmp_path / "home")
    assert found == "V-JEPA 2, 2 blocks of 24, an exported file"


def test_commands_take_names_of_the_hub(tmp_path: Path, hub: str) -> None:
    state, sizes = Encoder(**SIZES).state_dict(), parse_sizes(SIZES, "")
    write_huggingface(tmp_path / "hub" / "me" / "one", state, sizes)
    Image.new("RGB", (40, 32), "teal").save(tmp_path / "a.png")
    out = tmp_path / "out"
    for command, *rest in (
        ("models",),
        ("features", str(tmp_path / "a.png"), "--size", "32", "--out", str(out)),
        ("explore", str(tmp_path / "a.png"), "--size", "32", "--out", str(out / "a.html")),
        ("export", "--to", "safetensors", "--out", str(out / "encoder.safetensors")),
    ):
        words = [command, "hf://me/one", *rest]
        run_python(hub, tmp_path / "home", "-m", "fastjepa.cli", *words)
    written = {path.name for path in out.iterdir()}
    assert written == {"a.safetensors", "a.html", "encoder.safetensors", "encoder.md"}


def test_what_the_hub_does_not_have_is_named(tmp_path: Path, hub: str) -> None:
    found = load("hf://me/one/none.safetensors", hub, tmp_path / "home")
    assert found.startswith("hf://me/one/none.safetensors: cannot be fetched: ")
    found = load("hf://me", hub, tmp_path / "home")
    assert found == "hf://me: expected hf://OWNER/NAME or hf://OWNER/NAME/FILE"
