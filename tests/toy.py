# SPDX-License-Identifier: MIT
"""The toy decathlon, laid out as the Visual Decathlon: five domains, of which shapes is the source.

  python tests/toy.py DIR  # 6,471 images with a shorter side of 36 pixels; DIR must not exist
"""
import json
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageFont
from PIL.ImageDraw import Draw

SIDE = 72  # of an image, before it is halved
SQUARE = (SIDE, SIDE)
SPLITS = ["train", "val", "test_stripped"]


def corners(n, inner):
    """n points on the unit circle and n between them at radius `inner`."""
    k = np.arange(2 * n + 1)
    angle = np.pi * k / n
    circle = np.stack([np.sin(angle), -np.cos(angle)], 1)
    return circle * np.where(k % 2, inner, 1)[:, None]


DISC = corners(20, 1)
CROSS = np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                  (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)])
FORMS = {
    "disc": DISC, "triangle": corners(3, .5), "square": corners(4, .5 ** .5),
    "hexagon": corners(6, .75 ** .5), "star": corners(5, .42),
    "ring": np.r_[DISC, .55 * DISC[::-1]],
    "crescent": np.r_[DISC[:21], DISC[20::-1] * [.35, 1]] - [.5, 0], "cross": CROSS}
SYMBOLS = {
    "bar": np.array([(-1, -.3), (1, -.3), (1, .3), (-1, .3)]), "cross": CROSS,
    "arrow": np.array([(0, -1), (.9, 0), (.3, 0), (.3, 1), (-.3, 1), (-.3, 0), (-.9, 0)])}
SEGMENTS = {  # of a seven-segment display; SEVEN: those of each digit
    "a": (-1, -2, 1, -2), "b": (1, -2, 1, 0), "c": (1, 0, 1, 2), "d": (-1, 2, 1, 2),
    "e": (-1, 0, -1, 2), "f": (-1, -2, -1, 0), "g": (-1, 0, 1, 0)}
SEVEN = ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"]


def sine(z):
    return np.sin(6.28 * z) / 2


TEXTURES = {  # range of the period, value at (u, v) in periods; None: noise of that grain
    "fine stripes": (3, 5, lambda u, v: sine(u)),
    "broad stripes": (5.5, 9, lambda u, v: sine(u)),
    "checks": (5, 10, lambda u, v: (np.floor(u) + np.floor(v)) % 2 - .5),
    "dots": (5, 10, lambda u, v: (np.hypot(u % 1 - .5, v % 1 - .5) < .33) - .5),
    "bricks": (5, 10, lambda u, v: ((v % 1 < .2) | ((u + np.floor(v) % 2) / 2 % 1 < .1)) - .5),
    "grid": (5, 10, lambda u, v: ((u % 1 < .2) | (v % 1 < .2)) - .5),
    "rings": (5, 10, lambda u, v: sine(np.hypot(u, v))),
    "waves": (5, 10, lambda u, v: sine(v + .4 * np.sin(3.14 * u))),
    "zigzags": (5, 10, lambda u, v: sine(v + 1.2 * abs(u / 2 % 1 - .5))),
    "fine grain": (1.5, 3, None), "coarse grain": (3, 5.5, None)}


def clip(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def unlike(rng, colour):
    """The furthest from `colour` of three random RGB colours."""
    return max(rng.uniform(0, 255, (3, 3)), key=lambda other: abs(other - colour).mean())


def cloud(rng, cell, size=SQUARE):
    """Smooth noise in [-0.5, 0.5]: a random grid, enlarged."""
    width, height = size
    shape = (height // cell + 2, width // cell + 2)
    grid = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    return np.asarray(grid.resize(size), np.float32) / 255 - .5


def affine(rng, turn, skew):
    """A random matrix for row vectors: stretch, shear and a turn, in radians."""
    angle = rng.uniform(-turn, turn)
    stretch = np.exp(rng.uniform(-skew, skew))
    shear = rng.uniform(-skew, skew)
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[stretch, shear], [0, 1 / stretch]]) @ [[c, s], [-s, c]]


def texture(rng, name, size=SQUARE):
    """The named pattern in [-0.5, 0.5] at random angle, scale and phase, warped."""
    low, high, value = TEXTURES[name]
    period = 2 * rng.uniform(low, high)
    angle = rng.uniform(0, np.pi)
    if value is None:
        return cloud(rng, round(period), size)
    width, height = size
    x = (np.arange(width) - width / 2) / period
    y = (np.arange(height)[:, None] - height / 2) / period
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    return value(*[z + rng.uniform(-.5, .5) + rng.uniform(0, .7) * cloud(rng, 24, size)
                   for z in (u, v)])


def backdrop(rng, colour, lines):
    """A canvas of about this colour: a ramp, clouds and stray lines."""
    x = np.linspace(-50, 50, SIDE)
    angle = rng.uniform(0, 2 * np.pi)
    light = rng.random() * (np.cos(angle) * x + np.sin(angle) * x[:, None])
    light += rng.uniform(20, 120) * cloud(rng, 12)
    image = Image.fromarray(clip(colour + light[..., None] * rng.uniform(.5, 1.2, 3)))
    for _ in range(rng.integers(lines + 1)):
        ends = rng.uniform(0, SIDE, 4).tolist()
        colour = tuple(clip(rng.uniform(0, 255, 3)))
        Draw(image).line(ends, colour, int(rng.integers(1, 6)))
    return image


# One function for each domain. `fixed` draws the same for each image of a class.
def draw_shape(rng, label, fixed):
    ground = rng.uniform(0, 255, 3)
    fill = unlike(rng, ground)
    image = backdrop(rng, ground, 4)
    body = fill + 60 * cloud(rng, 16)[..., None]
    if label % 2:  # the patterned classes
        name = ("broad stripes", "fine stripes", "checks", "dots")[rng.integers(4)]
        value = texture(rng, name)[..., None] + .5
        body += (unlike(rng, fill) - fill) * value
    form = list(FORMS.values())[label // 2]
    points = form @ affine(rng, np.pi, .15) * rng.uniform(.22, .42)
    points = SIDE * (points + rng.uniform(.38, .62, 2))
    mask = Image.new("L", SQUARE)
    Draw(mask).polygon(points.ravel().tolist(), 255)  # even-odd: a ring keeps its hole
    image.paste(Image.fromarray(clip(body)), mask=mask)
    return image


def draw_stroke(rng, label, fixed):
    paper, ink, width = rng.integers((225, 0, 3), (256, 90, 7)).tolist()
    image = Image.new("RGB", SQUARE, (paper,) * 3)
    frame = affine(rng, .35, .27) * rng.uniform(.3, .42)
    shift = rng.uniform(.43, .57, 2)
    for _ in range(fixed.integers(2, 4)):  # the class's strokes in another hand
        points = fixed.uniform(-1, 1, (fixed.integers(3, 5), 2))
        points += rng.normal(0, .13, points.shape)
        points = SIDE * (points @ frame + shift)
        Draw(image).line(points.ravel().tolist(), (ink,) * 3, width, joint="curve")
    return image


def draw_texture(rng, label, fixed):
    size = ((72, 72), (72, 88), (88, 72), (96, 72))[rng.integers(4)]
    first = rng.uniform(0, 255, 3)
    value = .5 + texture(rng, list(TEXTURES)[label], size)
    value += rng.uniform(0, .8) * cloud(rng, 20, size)
    change = rng.uniform(.4, 1) * (unlike(rng, first) - first)
    return Image.fromarray(clip(first + change * value[..., None]))


def draw_sign(rng, label, fixed):
    plate = FORMS[("disc", "triangle", "square")[label // 6]]
    rim = ((200, 30, 40), (30, 70, 190))[label // 3 % 2]
    symbol = list(SYMBOLS.values())[label % 3]
    image = backdrop(rng, rng.uniform(30, 225, 3), 6)
    light = rng.uniform(.35, 1.15)
    frame = affine(rng, .3, .22) * rng.uniform(.25, .42)
    shift = rng.uniform(.42, .58, 2)
    layers = [(plate, rim), (plate * .7, (235, 235, 225)), (symbol * .36, (25, 25, 30))]
    for points, colour in layers:
        ink = tuple(clip(light * (colour + rng.normal(0, 25, 3))))
        points = SIDE * (points @ frame + shift)
        Draw(image).polygon(points.ravel().tolist(), ink)
    if rng.random() < .4:  # seen from afar
        side = int(rng.integers(11, 20))
        image = image.resize((side, side), Image.BOX).resize(SQUARE)
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0, 2.5)))


def glyph(rng, digit):
    """A mask of the digit: a font, its outline, a bitmap font or seven segments."""
    kind = int(rng.integers(4))
    width = int(rng.integers(4))
    mid = SIDE // 2
    mask = Image.new("L", SQUARE)
    draw = Draw(mask)
    if kind < 2:
        font = ImageFont.load_default(56)
        draw.text((mid, mid), str(digit), 255, font, "mm", stroke_width=width + 2 * kind)
        if kind == 1:
            draw.text((mid, mid), str(digit), 0, font, "mm")  # leaves the outline
    elif kind == 2:  # 6 x 11 pixels, enlarged five times
        draw.text((0, 0), str(digit), 255, ImageFont.load_default_imagefont())
        mask = mask.transform(SQUARE, Image.AFFINE, (.2, 0, 3 - mid / 5, 0, .2, 5.5 - mid / 5))
    else:
        for segment in SEVEN[digit]:
            draw.line((10.8 * np.array(SEGMENTS[segment]) + mid).tolist(), 255, width + 4)
    return mask


def draw_digit(rng, label, fixed):
    ground = rng.uniform(0, 255, 3)
    image = backdrop(rng, ground, 3)
    ink = unlike(rng, ground)
    for last in (False, False, True):  # parts of two others at the edges, then the digit
        signs = rng.choice((-1, 1), 2)
        centre = signs * rng.permutation([rng.uniform(.5, .62), rng.uniform(0, .5)])
        frame = affine(rng, .3, .22) * rng.uniform(.85, 1.3)
        if last:
            centre = rng.uniform(-.08, .08, 2)
        x, y = SIDE / 2 - frame @ (SIDE * (.5 + centre))  # PIL maps from the result to the mask
        mask = glyph(rng, label if last else rng.integers(10))
        mask = mask.transform(SQUARE, Image.AFFINE, (*frame[0], x, *frame[1], y), Image.BILINEAR)
        image.paste(tuple(clip(ink + rng.normal(0, 15, 3))), mask=mask)
    return image


SHAPES = [f"{fill} {form}" for form in FORMS for fill in ("plain", "patterned")]
SIGNS = product(("disc", "triangle", "diamond"), ("red", "blue"), SYMBOLS)
TOY = {  # how to draw, grain, classes, images per class in train, val and test
    "shapes": (draw_shape, 12, SHAPES, (125, 20, 20)),
    "strokes": (draw_stroke, 5, [f"character {c + 1}" for c in range(24)], (20, 6, 10)),
    "textures": (draw_texture, 18, list(TEXTURES), (40, 12, 15)),
    "signs": (draw_sign, 18, [*map(" ".join, SIGNS)], (35, 10, 15)),
    "digits": (draw_digit, 12, [f"digit {c}" for c in range(10)], (70, 20, 25))}


def draw_split(root, domain, split, seed):
    """Draw one split of a domain in random order, and its annotations."""
    draw, grain, classes, counts = TOY[domain]
    k = list(TOY).index(domain) + 1
    s = SPLITS.index(split) + 1
    todo = list(np.ndindex(len(classes), counts[s - 1]))
    todo = np.random.default_rng((seed, k, s)).permutation(todo).tolist()
    first = k * 10**6 + 1
    images = []
    annotations = []
    for number, (c, i) in enumerate(todo, k * 10**7 + s * 10**6 + 1):
        rng = np.random.default_rng((seed, k, c, s, i))
        fixed = np.random.default_rng((seed, k, c))
        x = np.asarray(draw(rng, c, fixed).reduce(2), np.float32)
        x += rng.uniform(0, grain) * rng.standard_normal(x.shape, np.float32)
        image = Image.fromarray(clip(x))
        folder = "test" if s == 3 else f"{split}/{c + 1:04d}"
        name = f"data/{domain}/{folder}/{number}.jpg"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name, quality=90)
        width, height = image.size
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        annotations.append({"id": number, "image_id": number, "category_id": first + c})
    content = {"images": images, "categories": [
        {"id": i, "name": name, "supercategory": domain} for i, name in enumerate(classes, first)]}
    if s < 3:  # the release keeps those of test
        content["annotations"] = annotations
    (root / f"annotations/{domain}_{split}.json").write_text(json.dumps(content))


def draw_toy(root, seed=0):
    """Draw it under `root`, which must not exist; with one Pillow a seed gives one toy."""
    part = Path(f"{root}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a stopped run
    (part / "annotations").mkdir(parents=True)
    for domain, split in product(TOY, SPLITS):
        draw_split(part, domain, split, seed)
    part.replace(root)


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python tests/toy.py DIR, which must not exist")
    draw_toy(sys.argv[1])
