"""Make the training images of the recipe digits_in_the_wild: `python tools/make_digits.py OUT`.

OUT/train/0 to 9 has 40,000 PNG files of 32x32 pixels. Half are made from the scans of scikit-learn that the recipe
`digits` trains on, half from the digits of 70 fonts, 30 of them handwriting. Each image has its own size, position,
rotation, shear, bend, stroke width, colours and light. OUT/val has the 360 scans that `digits` holds out, as they are,
and 2,000 images made from these and from four more fonts. No digit is drawn from strokes. The fonts and strokes of
tests/helpers/drawn_digits.py are not here, nor are relatives of its fonts (Bitstream Vera, Times, Helvetica, Courier).

The fonts are those of these Debian 12 packages (apt-get install); a font that is missing is named and ends the command:
fonts-averia-sans-gwf fonts-breip fonts-bwht fonts-cabin fonts-cantarell fonts-comfortaa fonts-dancingscript fonts-dosis
fonts-dustin fonts-ebgaramond fonts-ecolier-court fonts-fantasque-sans fonts-gnutypewriter fonts-inconsolata
fonts-isabella fonts-jetbrains-mono fonts-jura fonts-karla fonts-kaushanscript fonts-kiloji fonts-klee fonts-kristi
fonts-lato fonts-league-spartan fonts-lobster fonts-mononoki fonts-oldstandard fonts-opendyslexic fonts-open-sans
fonts-play fonts-quicksand fonts-roboto-slab fonts-roboto-unhinted fonts-routed-gothic fonts-rufscript fonts-seto
fonts-sil-andika fonts-sil-charis fonts-sil-gentium fonts-sjfonts fonts-staypuft fonts-summersby fonts-tlwg-purisa-otf
fonts-tomsontalks
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eit.config import Data
from eit.data.datasets import DIGITS, open_data

FONTS = Path("/usr/share/fonts")
HANDWRITING = (
    "Breip BecauseWeBuild-Regular BecauseWeConnect-Regular BecauseWeCreate-Regular BecauseWeLearn-Regular "
    "BecauseWeMentor-Regular BecauseWeOrganize-Regular Isabella Kristi TomsonTalks Delphine SteveHand "
    "Domestic_Manners El_Abogado_Loco PenguinAttack KleeOne-Regular KleeOne-SemiBold summersby StayPuft Purisa "
    "Purisa-Bold Purisa-Oblique kiloji_p kiloji_b setofont DancingScript-Regular KaushanScript-Regular lobster "
    "Ecolier-court Dustismo"
)
TYPE = (
    "Andika-Regular Andika-BoldItalic OpenDyslexic-Regular Quicksand-Light Quicksand-Bold Dosis-Book Dosis-ExtraBold "
    "Jura-Regular AveriaSansGWF-Regular AveriaSansGWF-BoldItalic Roboto-Regular Roboto-Black RobotoCondensed-Regular "
    "RobotoSlab-Light RobotoSlab-Bold Lato-Regular Lato-Black Lato-LightItalic OpenSans-Regular OpenSans-CondLight "
    "OpenSans-ExtraBold Cantarell-Regular Cabin-Regular Cabin-BoldItalic EBGaramond12-Regular EBGaramond12-Italic "
    "Gentium-R Gentium-I Inconsolata FantasqueSansMono-Regular mononoki-Regular routed-gothic OldStandard-Regular "
    "OldStandard-Bold GNUTypewriter JetBrainsMono-Regular Karla-Regular LeagueSpartan-Regular LeagueSpartan-Black "
    "Comfortaa-Regular"
)
VALIDATION = "Rufscript010 kiloji Play-Regular CharisSIL-Regular"

GLYPH, INK = 112, 80  # pixels of a mask, and of the longer side of its digit
SIZE, GROUP = 32, 50  # pixels of an image; images that share stroke width and scale


def font_masks(fonts: str) -> tuple[Tensor, Tensor]:
    """Masks (N, 1, GLYPH, GLYPH) in 0..1 of the ten digits of each font, and their labels."""
    names = fonts.split()
    files = {file.stem: file for file in sorted(FONTS.rglob("*.[ot]tf"))}
    if missing := [name for name in names if name not in files]:
        sys.exit(f"no such font below {FONTS}: {', '.join(missing)}; the Debian packages stand at the top of this file")
    masks = []
    for name in names:
        font = ImageFont.truetype(files[name], 150)
        for digit in "0123456789":
            canvas = Image.new("L", (400, 400))
            ImageDraw.Draw(canvas).text((120, 80), digit, fill=255, font=font)
            masks.append(centred(canvas))
    return torch.stack(masks), torch.arange(10).repeat(len(names))


def centred(canvas: Image.Image) -> Tensor:
    """The ink of a picture, as a mask (1, GLYPH, GLYPH)."""
    ink = canvas.crop(canvas.getbbox())
    scale = INK / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BICUBIC)
    mask = Image.new("L", (GLYPH, GLYPH))
    mask.paste(ink, ((GLYPH - ink.width) // 2, (GLYPH - ink.height) // 2))
    return torch.from_numpy(np.array(mask)).float()[None] / 255


def scan_masks(scans: Tensor, sharp: float) -> Tensor:
    """Scans (N, 8, 8) in 0..1 -> masks (N, 1, GLYPH, GLYPH): 0 leaves their soft edges, 12 makes strokes of them."""
    large = F.interpolate(scans[:, None], size=INK, mode="bicubic").clamp(0, 1)
    large = torch.sigmoid((large - 0.42) * sharp) if sharp else large
    return F.pad(large * (large > 0.02), [(GLYPH - INK) // 2] * 4)


class Painter:
    """Makes images from masks, all from one generator of random numbers."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.random)

    def normal(self, std: float, *shape: int) -> Tensor:
        return std * torch.randn(*shape, generator=self.random)

    def paint(self, masks: Tensor) -> Tensor:
        """(B, 1, GLYPH, GLYPH) -> images (B, SIZE, SIZE, 3) uint8."""
        scale = float(self.uniform(0.3, 1.05, 1))  # the digit's longer side, relative to the image
        return self.colour(self.place(self.thicken(masks), scale))

    def thicken(self, masks: Tensor) -> Tensor:
        """Wider or narrower strokes; a digit whose strokes would break, or fill its holes, stays as it is."""
        width = int(torch.randint(-2, 6, (1,), generator=self.random))
        if width >= 0:
            changed = F.max_pool2d(masks, 2 * width + 1, 1, width)
            keep = changed.sum(dim=(1, 2, 3)) < 0.33 * INK**2
        else:
            changed = -F.max_pool2d(-masks, 1 - 2 * width, 1, -width)
            keep = changed.sum(dim=(1, 2, 3)) > 0.55 * masks.sum(dim=(1, 2, 3))
        return torch.where(keep[:, None, None, None], changed, masks)

    def place(self, masks: Tensor, scale: float) -> Tensor:
        """Bend, shear, rotate, stretch, scale and shift -> how much of each pixel is ink, (B, 1, SIZE, SIZE)."""
        count = len(masks)
        shrink = 1 if scale > 0.66 else 2  # without it thin strokes fall between the samples
        masks = F.avg_pool2d(masks, shrink) if shrink > 1 else masks
        angle = self.normal(0.13, count).clamp(-0.35, 0.35)
        stretch = torch.exp(self.normal(0.16, count))
        shear = self.normal(0.15, count).clamp(-0.35, 0.35)
        sizes = scale * self.uniform(0.92, 1.08, count)
        cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(count), torch.ones(count)
        turn = torch.stack((cos, -sin, sin, cos), 1).view(-1, 2, 2)
        skew = torch.stack((one, shear, zero, one), 1).view(-1, 2, 2)
        wide = torch.stack((stretch, zero, zero, 1 / stretch.clamp(min=1)), 1).view(-1, 2, 2)
        linear = wide @ skew @ turn / sizes[:, None, None] * (INK / GLYPH)
        room = (1 - sizes).clamp(min=0.05)[:, None]
        shift = self.uniform(-1, 1, count, 2) * room
        theta = torch.cat((linear, -linear @ shift[:, :, None]), dim=2)
        grid = F.affine_grid(theta, [count, 1, 2 * SIZE, 2 * SIZE], align_corners=False)
        bend = self.normal(1.0, count, 2, 4, 4) * self.uniform(0, 0.075, count, 1, 1, 1)
        bend = F.grid_sample(bend, grid.clamp(-1, 1) * 0.7, mode="bicubic", padding_mode="border", align_corners=False)
        ink = F.grid_sample(masks, grid + bend.permute(0, 2, 3, 1), align_corners=False)
        return F.avg_pool2d(ink, 2)

    def colour(self, ink: Tensor) -> Tensor:
        """Ink on paper: a third plainly black and white, the rest coloured, shaded, ruled, blurred, noisy."""
        count = len(ink)
        light, dark = self.uniform(0.55, 1, count, 3), self.uniform(0, 0.45, count, 3)
        tint = self.uniform(0, 1, count, 1)
        light, dark = (c.mean(1, True) * (1 - tint) + c * tint for c in (light, dark))
        vivid = torch.rand(count, 3, generator=self.random)  # any colour, if it differs enough from the paper
        apart = ((vivid - light) * torch.tensor((0.3, 0.59, 0.11))).sum(1, True).abs() > 0.25
        dark = torch.where(apart & (self.uniform(0, 1, count, 1) < 0.4), vivid, dark)
        plain = self.uniform(0, 1, count, 1) < 0.35
        light, dark = torch.where(plain, 1.0, light), torch.where(plain, 0.0, dark)
        swap = self.uniform(0, 1, count, 1) < 0.5
        paper, pen = (torch.where(swap, a, b)[:, :, None, None] for a, b in ((light, dark), (dark, light)))
        ink = ink * self.uniform(0.75, 1, count, 1, 1, 1) if float(self.uniform(0, 1, 1)) < 0.3 else ink
        rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
        rough = (~plain)[:, :, None, None].float()
        ruled = (self.uniform(0, 1, count, 1, 1, 1) < 0.12) * rough * self.uniform(0.1, 0.45, count, 1, 1, 1)
        pitch, phase = self.uniform(6, 14, count, 1, 1, 1), self.uniform(0, 14, count, 1, 1, 1)
        line = ((torch.arange(SIZE)[:, None].expand(SIZE, SIZE) + phase) % pitch < 1).float()
        image = paper + (pen - paper) * torch.maximum(ink, ruled * line)
        slope = self.normal(0.14, count, 2, 1, 1) * rough
        shade = 1 + slope[:, :1] * rows + slope[:, 1:] * columns - 0.1 * rough * (rows**2 + columns**2)
        image = image * shade
        blurred = F.avg_pool2d(F.pad(image, [1] * 4, mode="replicate"), 3, 1)
        soft = self.uniform(0, 1, count, 1, 1, 1) * (self.uniform(0, 1, count, 1, 1, 1) < 0.35)
        image = image + (blurred - image) * soft
        noise = self.uniform(0, 0.08, count, 1, 1, 1) * rough
        image = image + self.normal(1, count, 3, SIZE, SIZE) * noise
        return (image.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def make(folder: Path, painter: Painter, count: int, sources: list[tuple[float, Tensor, Tensor]]) -> None:
    """Write `count` images: of each source, (share, masks, labels), its share, and of each class as many."""
    for share, masks, labels in sources:
        of_class = [torch.nonzero(labels == digit)[:, 0] for digit in range(10)]
        for _ in range(0, round(count * share), GROUP):
            digits = torch.arange(GROUP) % 10
            picks = [int(torch.randint(len(of_class[d]), (1,), generator=painter.random)) for d in digits.tolist()]
            chosen = torch.stack([of_class[d][p] for d, p in zip(digits.tolist(), picks, strict=True)])
            for pixels, digit in zip(painter.paint(masks[chosen]), digits.tolist(), strict=True):
                save(Image.fromarray(pixels.numpy()), folder, digit)
        print(f"{folder}: {round(count * share)} images of {len(masks)} masks", flush=True)


def save(image: Image.Image, folder: Path, digit: int) -> None:
    own = folder / str(digit)
    own.mkdir(parents=True, exist_ok=True)
    number = counts[own] = counts.get(own, 0) + 1
    image.save(own / f"{number:05d}.png")


counts: dict[Path, int] = {}


def main(out: str) -> None:
    torch.manual_seed(0)
    target = Path(out)
    if target.exists():
        sys.exit(f"{out} exists: give a new folder, or remove it")
    handwriting, typed, validation = (font_masks(fonts) for fonts in (HANDWRITING, TYPE, VALIDATION))
    for number, (split, images) in enumerate(zip(("train", "val"), open_data(Data(root=DIGITS)), strict=True)):
        painter, folder = Painter(number), target / split
        scans = torch.stack([torch.from_numpy(np.array(images.read(i, 1))) for i in range(len(images))]).float() / 255
        labels = torch.tensor(images.labels)
        for index in range(len(images)):
            save(images.read(index, 3).resize((SIZE, SIZE), Image.Resampling.BICUBIC), folder, images.labels[index])
        soft, sharp = ((scan_masks(scans, s), labels) for s in (0, 12))
        if split == "train":
            sources = [(0.08, *soft), (0.37, *sharp), (0.33, *handwriting), (0.22, *typed)]
            make(folder, painter, 40_000 - len(images), sources)
        else:
            make(folder, painter, 2_000, [(0.1, *soft), (0.4, *sharp), (0.5, *validation)])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/make_digits.py OUT")
    main(sys.argv[1])
