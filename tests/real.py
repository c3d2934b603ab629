# SPDX-License-Identifier: MIT
"""Images like those behind RESULTS.md, from sets that torchvision downloads (some 600 MB).

  python tests/real.py DIR DOWNLOADS    # DIR must not exist

It writes DIR/DOMAIN/train, val, test/CLASS/*.jpg with a shorter side of 72 pixels. CIFAR-10 is the
source. German traffic signs: every third frame, a whole track in one split. Omniglot: the 136
characters of five alphabets. Digits: MNIST. SVHN stands where RESULTS.md has sign-language digits,
which torchvision does not have. What is taken is drawn from a seed.
"""
import random
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import resize

COUNTS = {  # images of a class at most, for val, test and train
    "cifar10": (100, 200, 1000),
    "gtsrb": (10, 20, 80),
    "omniglot": (3, 5, 12),
    "digits": (100, 200, 300),
    "svhn": (30, 54, 120)}
OTHERS = {"cifar10": datasets.CIFAR10, "digits": datasets.MNIST, "svhn": datasets.SVHN}
ALPHABETS = ["Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"]


def entries(domain, downloads):
    """Each image as (class, group, image or its file); a group is not split."""
    if domain == "gtsrb":
        datasets.GTSRB(downloads, "train", download=True)
        folder = Path(downloads, "gtsrb/GTSRB/Training")
        for file in sorted(folder.glob("*/*.ppm")):
            track, frame = file.stem.split("_")
            if int(frame) % 3 == 0:
                yield file.parent.name, track, file
    elif domain == "omniglot":
        datasets.Omniglot(downloads, background=True, download=True)
        folder = Path(downloads, "omniglot-py/images_background")
        for file in sorted(folder.glob("*/*/*.png")):
            alphabet, character = file.parts[-3:-1]
            if alphabet in ALPHABETS:
                yield f"{alphabet}-{character}", file.stem, file
    else:
        images = OTHERS[domain](downloads, download=True)
        for i, (image, label) in enumerate(images):
            yield str(label), i, image


def save(images, folder):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        if isinstance(image, Path):
            image = Image.open(image)
        resize(image.convert("RGB"), 72).save(folder / f"{i:04}.jpg", quality=95)


def build(out, downloads):
    """Write the five domains to `out`."""
    if Path(out).exists():
        sys.exit(f"{out} is there already: give another DIR")
    for domain, counts in COUNTS.items():
        classes = defaultdict(lambda: defaultdict(list))
        for label, group, image in entries(domain, downloads):
            classes[label][group].append(image)
        draw = random.Random(0)
        for label, groups in classes.items():
            order = list(groups)
            draw.shuffle(order)
            for split, count in zip(("val", "test", "train"), counts):
                images = []
                while order and len(images) < count:
                    images += groups[order.pop()]
                save(images, Path(out, domain, split, label))
        print(f"{domain}: {len(classes)} classes in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    build(*sys.argv[1:])
