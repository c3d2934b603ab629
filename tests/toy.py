# SPDX-License-Identifier: MIT
"""The toy decathlon: five domains drawn from a seed, laid out as the Visual Decathlon; shapes is the source.

  python tests/toy.py DIR          # 6,471 images with a shorter side of 36 pixels; DIR must not exist
"""
import json
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 72  # images are drawn at this size and shrunk to 36 pixels


def corners(n, inner):
    """n points on the unit circle and n between them at radius `inner`: a star, a polygon, a disc."""
    k = np.arange(2 * n + 1)
    return np.stack([np.sin(np.pi * k / n), -np.cos(np.pi * k / n)], 1) * np.where(k % 2, inner, 1)[:, None]


DISC, ARM, QUARTER = corners(20, 1), np.array([(-.3, -1), (.3, -1), (.3, -.3)]), np.array([[0, 1], [-1, 0]])
FORMS = {"disc": DISC, "triangle": corners(3, .5), "square": corners(4, .5 ** .5),
         "hexagon": corners(6, .75 ** .5), "star": corners(5, .42), "ring": np.r_[DISC, .55 * DISC[::-1]],
         "crescent": np.r_[DISC[:21], DISC[20::-1] * [.35, 1]] - [.5, 0],
         "cross": np.concatenate([ARM @ np.linalg.matrix_power(QUARTER, k) for k in range(4)])}
SYMBOLS = {"bar": np.array([(-1, -.3), (1, -.3), (1, .3), (-1, .3)]), "cross": FORMS["cross"],
           "arrow": np.array([(0, -1), (.9, 0), (.3, 0), (.3, 1), (-.3, 1), (-.3, 0), (-.9, 0)])}
TEXTURES = {  # range of the period in pixels, and the value at (u, v) in periods; None: noise of that grain
    "fine stripes": (3, 5, lambda u, v: np.sin(6.28 * u) / 2),
    "broad stripes": (5.5, 9, lambda u, v: np.sin(6.28 * u) / 2),
    "checks": (5, 10, lambda u, v: (np.floor(u) + np.floor(v)) % 2 - .5),
    "dots": (5, 10, lambda u, v: (np.hypot(u % 1 - .5, v % 1 - .5) < .33) - .5),
    "bricks": (5, 10, lambda u, v: ((v % 1 < .2) | ((u / 2 + np.floor(v) % 2 / 2) % 1 < .1)) - .5),
    "grid": (5, 10, lambda u, v: ((u % 1 < .2) | (v % 1 < .2)) - .5),
    "rings": (5, 10, lambda u, v: np.sin(6.28 * np.hypot(u, v)) / 2),
    "waves": (5, 10, lambda u, v: np.sin(6.28 * (v + .4 * np.sin(3.14 * u))) / 2),
    "zigzags": (5, 10, lambda u, v: np.sin(6.28 * (v + 1.2 * abs(u / 2 % 1 - .5))) / 2),
    "fine grain": (1.5, 3, None), "coarse grain": (3, 5.5, None)}
SEVEN = ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"]
SEGMENTS = {"a": (-1, -2, 1, -2), "b": (1, -2, 1, 0), "c": (1, 0, 1, 2), "d": (-1, 2, 1, 2),
            "e": (-1, 0, -1, 2), "f": (-1, -2, -1, 0), "g": (-1, 0, 1, 0)}


def clip(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def unlike(rng, colour):
    """Of three random RGB colours the one furthest from `colour`."""
    return max(rng.uniform(0, 255, (3, 3)), key=lambda other: abs(other - colour).mean())


def cloud(rng, width, height, cell):
    """Smooth noise in [-0.5, 0.5]: a coarse random grid, enlarged."""
    grid = rng.integers(0, 256, (height // cell + 2, width // cell + 2), dtype=np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC), np.float32) / 255 - .5


def affine(rng, turn, skew):
    """A random 2 x 2 matrix for row vectors: stretch and shear, then a rotation by at most `turn` radians."""
    a, s = rng.uniform(-turn, turn), np.exp(rng.uniform(-skew, skew))
    stretch, c, d = np.array([[s, rng.uniform(-skew, skew)], [0, 1 / s]]), np.cos(a), np.sin(a)
    return stretch @ [[c, d], [-d, c]]


def texture(rng, name, width=SIDE, height=SIDE):
    """The named pattern in [-0.5, 0.5] at a random angle, scale and phase, slightly warped."""
    low, high, value = TEXTURES[name]
    period, a = 2 * rng.uniform(low, high), rng.uniform(0, np.pi)
    if value is None:
        return cloud(rng, width, height, round(period))
    x, y = (np.arange(width) - width / 2) / period, (np.arange(height)[:, None] - height / 2) / period
    return value(*(z + rng.uniform(-.5, .5) + rng.uniform(0, .7) * cloud(rng, width, height, 24)
                   for z in (np.cos(a) * x + np.sin(a) * y, np.cos(a) * y - np.sin(a) * x)))


def backdrop(rng, colour, lines):
    """A canvas of about this colour: a ramp, clouds and stray lines."""
    x, a = np.linspace(-50, 50, SIDE), rng.uniform(0, 2 * np.pi)
    light = rng.random() * (np.cos(a) * x + np.sin(a) * x[:, None])
    light = light + rng.uniform(20, 120) * cloud(rng, SIDE, SIDE, 12)
    image = Image.fromarray(clip(colour + light[..., None] * rng.uniform(.5, 1.2, 3)))
    for _ in range(rng.integers(lines + 1)):
        ends, colour = rng.uniform(0, SIDE, 4).tolist(), tuple(clip(rng.uniform(0, 255, 3)))
        ImageDraw.Draw(image).line(ends, colour, int(rng.integers(1, 6)))
    return image


def draw_shape(rng, label, fixed):
    ground, mask = rng.uniform(0, 255, 3), Image.new("L", (SIDE, SIDE))
    fill, image = unlike(rng, ground), backdrop(rng, ground, 4)
    body = fill + 60 * cloud(rng, SIDE, SIDE, 16)[..., None]
    if label % 2:
        pattern = texture(rng, ("broad stripes", "fine stripes", "checks", "dots")[rng.integers(4)])
        body = body + (unlike(rng, fill) - fill) * (pattern[..., None] + .5)
    form = list(FORMS.values())[label // 2]
    points = SIDE * (form @ affine(rng, np.pi, .15) * rng.uniform(.22, .42) + rng.uniform(.38, .62, 2))
    ImageDraw.Draw(mask).polygon(points.ravel().tolist(), 255)  # even-odd: a ring keeps its hole
    image.paste(Image.fromarray(clip(body)), mask=mask)
    return image


def draw_stroke(rng, label, fixed):
    paper, ink, width = (int(v) for v in rng.integers((225, 0, 3), (256, 90, 7)))
    image = Image.new("RGB", (SIDE, SIDE), (paper,) * 3)
    frame, shift = affine(rng, .35, .27) * rng.uniform(.3, .42), rng.uniform(.43, .57, 2)
    for _ in range(fixed.integers(2, 4)):  # the same strokes for every image of the class, in another hand
        points = fixed.uniform(-1, 1, (fixed.integers(3, 5), 2))
        points = SIDE * ((points + rng.normal(0, .13, points.shape)) @ frame + shift)
        ImageDraw.Draw(image).line(points.ravel().tolist(), (ink,) * 3, width, joint="curve")
    return image


def draw_texture(rng, label, fixed):
    width, height = ((72, 72), (72, 88), (88, 72), (96, 72))[rng.integers(4)]
    first, value = rng.uniform(0, 255, 3), .5 + texture(rng, list(TEXTURES)[label], width, height)
    value = value + rng.uniform(0, .8) * cloud(rng, width, height, 20)
    return Image.fromarray(clip(first + rng.uniform(.4, 1) * (unlike(rng, first) - first) * value[..., None]))


def draw_sign(rng, label, fixed):
    plate, symbol = FORMS[("disc", "triangle", "square")[label // 6]], list(SYMBOLS.values())[label % 3]
    rim = ((200, 30, 40), (30, 70, 190))[label // 3 % 2]
    image, light = backdrop(rng, rng.uniform(30, 225, 3), 6), rng.uniform(.35, 1.15)
    frame, shift = affine(rng, .3, .22) * rng.uniform(.25, .42), rng.uniform(.42, .58, 2)
    for points, colour in ((plate, rim), (plate * .7, (235, 235, 225)), (symbol * .36, (25, 25, 30))):
        colour = tuple(clip(light * (colour + rng.normal(0, 25, 3))))
        ImageDraw.Draw(image).polygon((SIDE * (points @ frame + shift)).ravel().tolist(), colour)
    if rng.random() < .4:  # seen from afar
        image = image.resize([int(rng.integers(11, 20))] * 2, Image.BOX).resize((SIDE, SIDE), Image.BICUBIC)
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0, 2.5)))


def glyph(rng, digit):
    """A mask of the digit, upright: the built-in font, its outline, the bitmap font, seven segments."""
    font, width, mask, mid = rng.integers(4), int(rng.integers(4)), Image.new("L", (SIDE, SIDE)), SIDE // 2
    draw = ImageDraw.Draw(mask)
    if font < 2:
        for colour, stroke in ((255, width + 2 * font), (0, 0))[:font + 1]:
            draw.text((mid, mid), str(digit), colour, ImageFont.load_default(56), "mm", stroke_width=stroke)
    elif font == 2:
        draw.text((0, 0), str(digit), 255, ImageFont.load_default_imagefont())
        mask = mask.transform(mask.size, Image.AFFINE, (.2, 0, 3 - mid / 5, 0, .2, 5.5 - mid / 5))
    else:
        for segment in SEVEN[digit]:
            draw.line((.9 * 12 * np.array(SEGMENTS[segment]) + mid).tolist(), 255, width + 4)
    return mask


def draw_digit(rng, label, fixed):
    ground = rng.uniform(0, 255, 3)
    image, ink = backdrop(rng, ground, 3), unlike(rng, ground)
    for other in (True, True, False):  # parts of two other digits at the edges, then the digit itself
        edge = rng.choice((-1, 1), 2) * rng.permutation([rng.uniform(.5, .62), rng.uniform(0, .5)])
        frame = affine(rng, .3, .22) * rng.uniform(.85, 1.3)  # PIL maps from the result back to the mask
        x, y = SIDE / 2 - frame @ (SIDE * (.5 + (edge if other else rng.uniform(-.08, .08, 2))))
        mask = glyph(rng, rng.integers(10) if other else label)
        mask = mask.transform((SIDE, SIDE), Image.AFFINE, (*frame[0], x, *frame[1], y), Image.BILINEAR)
        image.paste(tuple(clip(ink + rng.normal(0, 15, 3))), mask=mask)
    return image


FILLS, PLATES, RIMS = ("plain", "patterned"), ("disc", "triangle", "diamond"), ("red", "blue")
TOY = {  # how an image is drawn, its grain, the classes, images per class in train, val and test
    "shapes": (draw_shape, 12, [f"{fill} {name}" for name in FORMS for fill in FILLS], (125, 20, 20)),
    "strokes": (draw_stroke, 5, [f"character {c + 1}" for c in range(24)], (20, 6, 10)),
    "textures": (draw_texture, 18, list(TEXTURES), (40, 12, 15)),
    "signs": (draw_sign, 18, [f"{p} {r} {s}" for p in PLATES for r in RIMS for s in SYMBOLS], (35, 10, 15)),
    "digits": (draw_digit, 12, [f"digit {c}" for c in range(10)], (70, 20, 25))}


def draw_toy(root, seed=0):
    """Draw it all under `root`, which must not exist; a seed gives the same images with the same Pillow."""
    part = Path(f"{root}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    (part / "annotations").mkdir(parents=True)
    splits = enumerate(("train", "val", "test_stripped"), 1)
    for (k, domain), (s, split) in product(enumerate(TOY, 1), splits):
        draw, grain, classes, counts = TOY[domain]
        ids, images, annotations = [k * 10**6 + c + 1 for c in range(len(classes))], [], []
        todo = np.random.default_rng((seed, k, s)).permutation(list(np.ndindex(len(classes), counts[s - 1])))
        for number, (c, i) in enumerate(todo.tolist(), k * 10**7 + s * 10**6 + 1):
            rng, fixed = np.random.default_rng((seed, k, c, s, i)), np.random.default_rng((seed, k, c))
            x = np.asarray(draw(rng, c, fixed).reduce(2), np.float32)
            x = x + rng.uniform(0, grain) * rng.standard_normal(x.shape, np.float32)
            image = Image.fromarray(clip(x))
            name = f"data/{domain}/{'test' if s == 3 else f'{split}/{c + 1:04d}'}/{number}.jpg"
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(part / name, quality=90)
            images.append({"id": number, "file_name": name, "width": image.width, "height": image.height})
            annotations.append({"id": number, "image_id": number, "category_id": ids[c]})
        content = {"images": images, "categories": [
            {"id": ids[c], "name": name, "supercategory": domain} for c, name in enumerate(classes)]}
        content |= {"annotations": annotations} if s < 3 else {}  # the release keeps those of test to itself
        (part / "annotations" / f"{domain}_{split}.json").write_text(json.dumps(content))
    part.replace(root)


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python tests/toy.py DIR, which must not exist")
    draw_toy(sys.argv[1])
