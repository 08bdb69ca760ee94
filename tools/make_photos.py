"""Make folders of real photos to fine-tune on, from the Debian package tuxpaint-stamps-default (GPL-2).

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    python tools/make_photos.py stamps/usr/share/tuxpaint/stamps photos --seed 0

The package has photos of single animals, plants and things that were cut out of their background. Each file is another
photo, so no photo is in two folders. FOLDER/photos has class folders, with `--images` photos each, drawn with the
seed; FOLDER/rest has the photos that were not drawn, to test on. They stand on white, or with `--background FOLDER` on
random crops of the pictures in that folder, which say nothing of the class.
"""

import argparse
import random
from pathlib import Path

from PIL import Image

CLASSES = {
    "bird": ["animals/birds"],
    "flower": ["plants/flowers"],
    "mammal": ["animals/mammals", "animals/marsupials"],
}
DRAWN = {"cartoon", "teddy_bear", "edward_bear", "hedgehog", "kangaroo-sil", "tux", "pengwin"}  # not photos
SIZE = 320  # pixels of the longer side


def photos(stamps: Path, folders: list[str]) -> list[Path]:
    """The photos below `folders`, by name; no drawings, and no mirrored copies."""
    files = [file for folder in folders for file in (stamps / folder).rglob("*") if file.suffix in (".png", ".jpg")]
    is_drawn = [DRAWN & {file.stem, *file.parts} or file.stem.endswith("_mirror") for file in files]
    chosen = [file for file, drawn in zip(files, is_drawn, strict=True) if not drawn and is_photo(file)]
    return sorted(chosen, key=lambda file: file.relative_to(stamps).as_posix())


def is_photo(file: Path) -> bool:
    """Whether a picture has as many colours as a photo; drawings have few."""
    with Image.open(file) as image:
        small = image.convert("RGBA").resize((64, 64))
    return len({pixel[:3] for pixel in small.get_flattened_data() if pixel[3] == 255}) > 300


def on_background(file: Path, backgrounds: list[Path], draw: random.Random) -> Image.Image:
    """A cut-out photo on white, or on a random square of a random background."""
    with Image.open(file) as image:
        stamp = image.convert("RGBA")
    stamp.thumbnail((SIZE, SIZE))
    below = Image.new("RGBA", stamp.size, "white")
    if backgrounds:
        with Image.open(draw.choice(backgrounds)) as image:
            whole = image.convert("RGB")
        side = draw.randint(min(whole.size) // 2, min(whole.size))
        left, top = draw.randint(0, whole.width - side), draw.randint(0, whole.height - side)
        below = whole.crop((left, top, left + side, top + side)).resize(stamp.size).convert("RGBA")
    below.alpha_composite(stamp)
    return below.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path, help="usr/share/tuxpaint/stamps of the package")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--images", type=int, default=20, help="photos of each class; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="which photos are drawn; default: 0")
    parser.add_argument("--background", type=Path, help="a folder of pictures to put the photos on; default: white")
    options = parser.parse_args()
    backgrounds = sorted(file for file in (options.background or Path()).glob("*.*") if options.background)
    draw = random.Random(options.seed)
    for name, folders in CLASSES.items():
        files = photos(options.stamps, folders)
        draw.shuffle(files)
        for part, chosen in (("photos", files[: options.images]), ("rest", files[options.images :])):
            target = options.out / part / name
            target.mkdir(parents=True)
            for file in chosen:
                on_background(file, backgrounds, draw).save(target / f"{file.parent.name}-{file.stem}.jpg", quality=90)
        print(f"{name}: {len(files)} photos, {min(len(files), options.images)} of them in {options.out / 'photos'}")


if __name__ == "__main__":
    main()
