"""Label maps of a folder of images, computed once by a segmentation network, for any number of jobs.

    python examples/label_maps.py --segmentation deeplab --plugin deeplab.py --images ~/photos --out ~/labelled
    python -m jobs.label --labeler netdissect --model squeezenet1_0/imagenet --probe ~/labelled --storage ~/run

The folder that it writes has the layout of CamVid: ``images`` leads to the images, ``labels`` holds a number for every
pixel, ``classes.csv`` says what the numbers mean. docs/labelers.md compares it with ``jobs.label --segmentation``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from milan_ray.errors import UnreadableImage
from milan_ray.models.segmentation import find_segmenter
from milan_ray.plugins import load_plugins
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.probe.segmented import Segments


def label_map(maps: dict[str, np.ndarray], numbers: dict[str, int], size: tuple[int, int]) -> np.ndarray:
    """Numbers of the concepts at each position, uint16 (H, W); 0 where there is none.

    Args:
        maps: Concept → bool (H, W).
        numbers: Concept → number; new concepts are added.
        size: (H, W) of an image without concepts.

    Raises:
        ValueError: Two concepts overlap: a label map holds one number per pixel.
    """
    shown = np.zeros(next(iter(maps.values())).shape if maps else size, np.uint16)
    for concept, where in sorted(maps.items()):
        if shown[where].any():
            raise ValueError(f"{concept} overlaps another concept")
        shown[where] = numbers.setdefault(concept, len(numbers) + 1)
    return shown


def write_label_maps(network: Segments, images: Path, out: Path) -> dict[str, int]:
    """Writes the folder.

    Args:
        network: The segmentation network.
        images: Folder of images.
        out: Folder to write.

    Returns:
        Concept → number.
    """
    probe, numbers = FolderProbe([images]), dict[str, int]()
    (out / "labels").mkdir(parents=True)
    (out / "images").symlink_to(images, target_is_directory=True)
    for ref in image_refs(probe.manifest()):
        try:
            image = probe.read(ref).image
        except UnreadableImage as error:
            print(f"{ref.path} is left out: {error}")
            continue
        file = (out / "labels" / ref.path).with_suffix(".png")
        if file.exists():
            raise SystemExit(f"two images are called {file.stem}: rename one, since both would have one label map.")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            numbered = label_map(network.maps(image), numbers, (image.height, image.width))
        except ValueError as error:
            raise SystemExit(f"{ref.path}: {error}: use jobs.label --segmentation.") from error
        Image.fromarray(numbered).save(file)
    lines = [f"{number},{concept}" for concept, number in numbers.items()]
    (out / "classes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return numbers


def main() -> None:
    """Writes the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segmentation", required=True, help="as of jobs.label")
    parser.add_argument("--plugin", action="append", default=[])
    for name in ("images", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    args = parser.parse_args()
    load_plugins(args.plugin)
    images, out = (path.expanduser().absolute() for path in (args.images, args.out))
    if out.exists():
        raise SystemExit(f"{out} is there already: remove it, or name another folder.")
    numbers = write_label_maps(find_segmenter(args.segmentation), images, out)
    print(f"{out}: {len(numbers)} concepts: {', '.join(sorted(numbers))}")


if __name__ == "__main__":
    main()
