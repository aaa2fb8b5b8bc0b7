"""A picture of some units of a real network with their descriptions, from photographs that anybody may show.

    pip install scikit-image scikit-learn matplotlib
    python examples/picture_of_units.py --model alexnet/imagenet --weights alexnet.pth --decoder own \
        --units held.csv --storage ~/run --out units.jpg

The probe is tiles of the photographs that these packages bring. Of the units in the file of columns layer and unit,
each layer's highest score is drawn and one more at random, by ``--seed``; none is chosen by its looks.
docs/photographs.md says how the picture of README.md was made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

from milan_ray import cli
from milan_ray.labelers.milan import MILAN
from milan_ray.library.run_directory import RunExemplars, Unit
from milan_ray.models.folders import packaged_folder
from milan_ray.storage import Storage

PHOTOGRAPHS = {
    "skimage": [f"data/{name}" for name in (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
        "gravel.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg", "text.png",
    )],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}  # fmt: skip
"""Package → photographs in it. China (danielbuechele) and flower (vultilion) are CC BY 2.0, the others CC0 or free of
copyright."""

CUTS = (1, 2, 3, 4, 5)
"""A photograph is cut into squares of its shorter side, then of a half of it, a third, …"""

SMALLEST = 64
"""Pixels of a tile's side at least."""

SIDE, SHOWN, LINE = 88, 5, 24
"""Of the picture: pixels of an exemplar, exemplars per unit, pixels of a line of text."""

HEADS = ("highest score of the layer", "drawn at random")
"""Of the columns."""


def write_tiles(folder: Path) -> int:
    """Cuts the photographs into tiles that do not overlap at one size; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for package, names in PHOTOGRAPHS.items():
        place = packaged_folder(package)
        if place is None:
            raise SystemExit(f"{package} is not installed: pip install scikit-image scikit-learn matplotlib")
        for file in (place / name for name in names):
            photograph = Image.open(file).convert("RGB")
            for cut in CUTS:
                side = min(photograph.size) // cut
                if cut > 1 and side < SMALLEST:
                    break
                for top in range(0, photograph.height - side + 1, side):
                    for left in range(0, photograph.width - side + 1, side):
                        tile = photograph.crop((left, top, left + side, top + side))
                        tile.save(folder / f"{file.stem}-{cut}-{top}-{left}.png")
                        count += 1
    return count


def choose_units(described: pl.DataFrame, seed: int) -> list[tuple[str, int]]:
    """Chooses two units of each layer: the one whose description scores highest, then one of the others at random.

    Args:
        described: Columns layer, unit, score.
        seed: Of the draw.
    """
    rng, chosen = np.random.default_rng(seed), list[tuple[str, int]]()
    ranked = described.sort("layer", "score", "unit", descending=[False, True, False])
    for (layer,), of_layer in ranked.group_by("layer", maintain_order=True):
        best, *others = of_layer["unit"].to_list()
        drawn = [int(rng.choice(sorted(others)))] if others else []
        chosen += [(str(layer), unit) for unit in (best, *drawn)]
    return chosen


def draw(units: list[Unit]) -> Image.Image:
    """Draws two units a row: their first exemplars, darkened outside the masks, above the descriptions."""
    width, height, gap = SIDE * SHOWN, SIDE + LINE, 12
    rows = -(-len(units) // len(HEADS))
    size = (len(HEADS) * width + gap, LINE + rows * (height + gap) - gap)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for column, head in enumerate(HEADS):
        pen.text((column * (width + gap), 2), head, fill="gray", font_size=14)
    for place, unit in enumerate(units):
        left, top = place % len(HEADS) * (width + gap), LINE + place // len(HEADS) * (height + gap)
        for number, pixels in enumerate(unit.masked_images(0.7)[:SHOWN]):
            shown = Image.fromarray((pixels * 255).round().astype(np.uint8).transpose(1, 2, 0))
            picture.paste(shown.resize((SIDE - 2, SIDE - 2), Image.Resampling.LANCZOS), (left + number * SIDE, top))
        pen.text((left, top + SIDE), unit.description or "", fill="black", font_size=16)
        name = f"{unit.layer} {unit.unit}"
        pen.text((left + width - 2, top + SIDE + 3), name, fill="gray", font_size=12, anchor="ra")
    return picture


def main() -> None:
    """Cuts, dissects, describes, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "decoder", "units", "storage", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--encoder-weights")
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument("--beam-size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    candidates = pl.read_csv(args.units, columns=["layer", "unit"], schema_overrides={"layer": pl.String})
    tiles = Path(args.storage) / "tiles"
    print(f"{write_tiles(tiles)} tiles in {tiles}")
    command = ["describe", "--model", args.model, "--decoder", args.decoder, "--probe", str(tiles)]
    command += ["--layers", *sorted(candidates["layer"].unique()), "--no-report", "--storage", args.storage]
    for name in ("weights", "encoder_weights", "beam_size"):
        value = getattr(args, name)
        command += [f"--{name.replace('_', '-')}", value] if value else []
    command += [word for plugin in args.plugin for word in ("--plugin", plugin)]
    if cli.main(command):
        raise SystemExit(1)
    run = RunExemplars(Storage(args.storage), args.model)
    described = run.descriptions.filter(labeler=MILAN).join(candidates.unique(), on=["layer", "unit"])
    chosen = choose_units(described, args.seed)
    picture = draw([run.lookup(layer, unit) for layer, unit in chosen])
    picture.save(args.out, quality=80)
    print(f"{args.out}: {len(chosen)} units, {Path(args.out).stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
