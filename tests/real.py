# SPDX-License-Identifier: MIT
"""Images of the make behind RESULTS.md, from the sets that torchvision downloads (some 600 MB).

  python tests/real.py DIR DOWNLOADS          # DIR/DOMAIN/train, val, test/CLASS/*.jpg; DIR must not exist

CIFAR-10 is the source. German traffic signs: every third frame, and all frames of a track in one split.
Omniglot: the 136 characters of five alphabets. Digits: MNIST. SVHN stands where RESULTS.md has sign-language
digits, which torchvision does not have. The shorter side has 72 pixels; what is taken is drawn from a seed.
"""
import random
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import resize

COUNTS = {  # images of a class at most, for val, test and train
    "cifar10": (100, 200, 1000), "gtsrb": (10, 20, 80), "omniglot": (3, 5, 12), "digits": (100, 200, 300),
    "svhn": (30, 54, 120)}
ALPHABETS = "Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"


def entries(domain, downloads):
    """[(class, group, image or its file)] of a set; what is of one group goes to one split."""
    if domain == "gtsrb":
        datasets.GTSRB(downloads, "train", download=True)
        files = Path(downloads, "gtsrb/GTSRB/Training").glob("*/*.ppm")  # CLASS/TRACK_FRAME.ppm
        return [(file.parent.name, file.stem[:5], file) for file in sorted(files)
                if int(file.stem[6:]) % 3 == 0]
    if domain == "omniglot":
        datasets.Omniglot(downloads, background=True, download=True)
        files = Path(downloads, "omniglot-py/images_background").glob("*/*/*.png")
        return [("-".join(file.parts[-3:-1]), file.stem, file) for file in sorted(files)
                if file.parts[-3] in ALPHABETS]
    of = {"cifar10": datasets.CIFAR10, "digits": datasets.MNIST, "svhn": datasets.SVHN}[domain]
    return [(str(label), i, image) for i, (image, label) in enumerate(of(downloads, download=True))]


def build(out, downloads):
    """Write the five domains to `out`."""
    if Path(out).exists():
        sys.exit(f"{out} is there already: give another DIR")
    for domain, counts in COUNTS.items():
        classes, draw = defaultdict(lambda: defaultdict(list)), random.Random(0)
        for label, group, image in entries(domain, downloads):
            classes[label][group].append(image)
        for label, groups in classes.items():
            order = list(groups)
            draw.shuffle(order)
            for split, count in zip(("val", "test", "train"), counts):
                images, folder = [], Path(out, domain, split, label)
                folder.mkdir(parents=True)
                while order and len(images) < count:
                    images += groups[order.pop()]
                for i, image in enumerate(images):
                    image = Image.open(image) if isinstance(image, Path) else image
                    resize(image.convert("RGB"), 72).save(folder / f"{i:04}.jpg", quality=95)
        print(f"{domain}: {len(classes)} classes in {out}")


if __name__ == "__main__":
    build(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
