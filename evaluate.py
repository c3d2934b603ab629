# SPDX-License-Identifier: MIT
"""The benchmark: scores, ten crops, images and tables.

  python evaluate.py MODEL                                  # on val of what it was trained on
  python evaluate.py MODEL --split test --results r.json    # for the challenge's server
  python evaluate.py --compare MODEL MODEL                  # what they prune in common (Table 3)

The source, served by the untouched backbone, has no part in budget, sharing, sparsity and params.
"""
import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections import Counter
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import functional as TF

import ba2ps

warnings.filterwarnings("ignore", module="PIL")  # a broken image is an InputError, of one line

# -------- 1  Scores, crops and predictions; the ten domains (Rebuffi et al., NeurIPS 2017)

FINE_TUNED = {  # accuracy (%) of full fine-tuning on test: the baseline of S
    "imagenet12": 59.87, "aircraft": 60.34, "cifar100": 82.12, "daimlerpedcls": 92.82,
    "dtd": 55.53, "gtsrb": 97.53, "vgg-flowers": 81.41, "omniglot": 87.69, "svhn": 96.55,
    "ucf101": 51.20}
MEAN_STD = {  # channel means and deviations that others use; other domains are measured
    "aircraft": ([.4798, .5107, .5344], [.2107, .2051, .2373]),
    "cifar100": ([.5071, .4867, .4408], [.2675, .2565, .2761]),
    "daimlerpedcls": ([.482] * 3, [.2361] * 3),
    "dtd": ([.5270, .4703, .4240], [.2523, .2409, .2499]),
    "gtsrb": ([.3392, .3118, .3205], [.2756, .2658, .2709]),
    "imagenet12": ([.485, .456, .406], [.229, .224, .225]),
    "omniglot": ([.081] * 3, [.2705] * 3),
    "svhn": ([.4377, .4438, .4728], [.198, .201, .197]),
    "ucf101": ([.4995, .4988, .4998], [.109, .1081, .1068]),
    "vgg-flowers": ([.4341, .3831, .2971], [.2851, .2384, .2640])}
NO_MIRROR = {"dtd", "gtsrb", "omniglot", "svhn"}  # trained without mirroring, so five crops


def s_score(accuracies, baseline):
    """S = sum over domains of 1000 (max(0, E_max - E) / E_max)^2 (Eq. 6), from {domain: %}."""
    score = 0.0
    for domain, value in accuracies.items():
        worst = 2 * (100 - baseline[domain])  # E_max, so a domain at its baseline counts 250
        score += 1000 * max(0, 1 - (100 - value) / worst) ** 2
    return score


def accuracy(probabilities, images):
    """Share of right predictions, in %."""
    right = probabilities.argmax(1) == torch.tensor(images.labels)
    return 100 * right.double().mean().item()


@torch.no_grad()
def predict(network, domain, images, crops=None, batch_size=32, device="cpu",
            progress=lambda number: None):
    """Class probabilities (n, classes), the mean over `crops` crops: 1, 5 or 10."""
    crops = crops or (10 if images.record["mirror"] else 5)
    cut = {1: lambda image, size: [TF.center_crop(image, size)], 5: TF.five_crop, 10: TF.ten_crop}
    result = []
    network.eval()
    for indices in torch.arange(len(images)).split(batch_size):
        cuts = [cut[crops](images[i][0], [images.crop] * 2) for i in indices.tolist()]
        total = 0
        for crop in zip(*cuts):  # the same crop of each image
            x = images.normalise(torch.stack(crop), device)  # (B, C, S, S)
            total = total + network(x, domain).softmax(1) / crops  # (B, classes)
        result.append(total.cpu())
        progress(len(indices))
    return torch.cat(result)


def measure(network, facts, accuracies, split, baseline=FINE_TUNED):
    """What --json writes. accuracies: {domain: %}, empty for a split without labels. S needs
    accuracy and baseline of every adapted domain; the source counts if it has both."""
    budget = facts["budget"]
    usage = ba2ps.usage(network, facts["budget_of"])
    macs = ba2ps.usage(network, "macs")
    sparsity, sparsity_all = ba2ps.sparsity(network)
    rows = {}
    over = []
    for domain in network.domains:
        rows[domain] = {"accuracy": accuracies.get(domain), "usage": usage[domain],
                        "sparsity": sparsity[domain], "complexity": macs[domain]}
        if budget and usage[domain] > budget + 1e-6:  # by a switch, not by rounding
            over.append(domain)

    mean = s = None
    if rows.keys() <= accuracies.keys():
        mean = sum(accuracies[domain] for domain in rows) / len(rows)
        if rows.keys() <= baseline.keys():
            s = s_score({k: v for k, v in accuracies.items() if k in baseline}, baseline)
    source = accuracies.get(network.source)
    with_source = None
    if mean is not None and source is not None:
        with_source = (mean * len(rows) + source) / (len(rows) + 1)
    complexity = sum(macs.values()) / len(macs)
    params = ba2ps.params(network)
    return {
        "split": split, "budget": budget, "budget_of": facts["budget_of"], "domains": rows,
        "over_budget": over, "mean_accuracy": mean, "s_score": s, "s_o": s and s / complexity,
        "s_p": s and s / params, "complexity": complexity,
        "complexity_with_source": (sum(macs.values()) + 1) / (len(macs) + 1), "params": params,
        "sparsity_all": sparsity_all, "source": network.source, "source_accuracy": source,
        "mean_accuracy_with_source": with_source}


def compare(models):
    """Rows of Table 3: the share of a layer's channels that no domain of a model, of a pair, or of
    all models uses, the mean over layers; at most 1 - the largest budget, if budgets are of layers.
    models: {path: (network, facts)}."""
    masks = {path: ba2ps.masks(network) for path, (network, _) in models.items()}
    rows = []
    for number in sorted({1, 2, len(masks)}):
        for group in combinations(masks, number):
            off = []
            for layer in masks[group[0]]:
                on = torch.cat([masks[path][layer] for path in group])  # (domains of all, C)
                off.append(1 - on.any(0).double().mean().item())
            budgets = [models[path][1]["budget"] for path in group]
            rows.append({"models": " & ".join(group), "budgets": budgets,
                         "shared_sparsity": sum(off) / len(off),
                         "max_shared_sparsity": None if None in budgets else 1 - max(budgets)})
    return rows


# -------- 2  Reading images

def check(right, message):
    if not right:
        raise ba2ps.InputError(message)


def domains_of(root):
    """The sorted names of the domains with a train split in `root`, in either layout."""
    files = Path(root, "annotations").glob("[!.]*_train.json")
    names = [path.name.removesuffix("_train.json") for path in files]
    if not Path(root, "annotations").is_dir():
        folders = Path(root).glob("[!.]*/train")
        names = [path.parent.name for path in folders if path.is_dir()]
    check(names, f"{root} has no domains: it needs annotations/DOMAIN_train.json, or "
                 "DOMAIN/train/CLASS/*.jpg")
    return sorted(names)


def read_annotations(path):
    """A split from its file in COCO's format: {image id: file name}, {category id: name}, {image
    id: category id} (empty without labels) and {reason: number of things left out}."""
    content = json.loads(path.read_text("utf-8-sig"))
    names = {image["id"]: str(image["file_name"]) for image in content["images"]}
    classes = {category["id"]: str(category["name"]) for category in content["categories"]}
    check(len(names) == len(content["images"]), "it lists an image's id twice")
    check(len(classes) == len(content["categories"]), "it lists a category's id twice")
    labels = {}
    for row in content.get("annotations", ()):
        number = row["image_id"]
        known = labels.setdefault(number, row["category_id"])
        check(known == row["category_id"], f"{names.get(number)}: two categories")
    for number, name in names.items():
        check("annotations" not in content or labels.get(number) in classes, f"{name}: no category")
        inside = not os.path.isabs(name) and ".." not in Path(name).parts
        check(inside, f"{name}: lies outside the root")
    return names, dict(sorted(classes.items())), labels, {}


def walk(folder, above, left_out):
    """(path, real path) of the files below a folder, sorted. above: the real paths of the folders
    around it; a link to one of them would list the same images again, and is not followed."""
    real_folder = os.path.realpath(folder)
    if real_folder in above:
        left_out["links to a folder above"] += 1
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] == ".":
            left_out["hidden"] += 1
        elif entry.is_dir():
            yield from walk(entry.path, above | {real_folder}, left_out)
        else:
            real = os.path.join(real_folder, entry.name)
            yield Path(entry.path), os.path.realpath(real) if entry.is_symlink() else real


def held_out(names):
    """The tenth of a class that is val where there is no val folder. A hash of its name decides on
    a file, so that it stays when others come. Of 5 files at least one is val, and never all."""
    ranked = sorted((hashlib.sha256(os.fsencode(name)).digest(), name) for name in names)
    number = sum(digest[0] < 26 for digest, _ in ranked)  # of 256
    number = max(number, len(ranked) >= 5)
    return {name for _, name in ranked[:min(number, len(ranked) - 1)]}


def read_folders(root, path):
    """A split of DOMAIN/SPLIT/CLASS/*.jpg, as read_annotations gives it. The classes are those of
    train, by name; file names are ids. A test split without class folders has no labels."""
    train = path.with_name("train")
    classes = sorted(path.name for path in train.glob("[!.]*") if path.is_dir())
    no_val = path.name != "test" and not path.with_name("val").is_dir()
    folder = train if no_val else path
    above = {str(path) for path in Path(os.path.realpath(folder)).parents}
    left_out = Counter()
    files = {kind: [] for kind in classes}
    class_of = {}  # {real path: class}
    loose = []
    for file, real in walk(folder, above, left_out):
        name = file.relative_to(root).as_posix()
        kind, *rest = file.relative_to(folder).parts
        if not is_image_file(file.name):
            left_out[f"no image by its ending {file.suffix}"] += 1
        elif not rest:
            loose.append(name)
        elif real in class_of:
            check(class_of[real] == kind, f"{name}: two categories, {class_of[real]} and {kind}")
            left_out["linked twice"] += 1
        else:
            check(kind in files, f"{name}: no category {kind} in train")
            files[kind].append(name)
            class_of[real] = kind

    if path.name == "test" and not class_of:
        return {name: name for name in loose}, dict(enumerate(classes)), {}, left_out
    if loose:
        left_out["outside the class folders"] = len(loose)
    labels = {}
    for number, kind in enumerate(classes):
        val = held_out(files[kind]) if no_val else ()
        for name in files[kind]:
            if no_val and (name in val) != (path.name == "val"):
                left_out["in train" if path.name == "val" else "held out as val"] += 1
            else:
                labels[name] = number
    return {name: name for name in labels}, dict(enumerate(classes)), labels, left_out


class Images:
    """The images of a domain in one or several splits, resized to a shorter side of 9/8 image_size.

    Item i is (uint8 tensor (C, h, w), label), the label -1 in a split without labels.
    record: what a checkpoint remembers of the domain; default: of the first split, with mean and
    std of MEAN_STD, or measured by decode(). no_mirror: domains without mirroring, besides
    NO_MIRROR. cache: folder for the decoded images (default: ROOT/cache). channels: 3, or 1 for
    grey, unless a record says it.
    augment: what batch() calls in place of the random crop and mirror, (uint8 tensor (C, h, w),
    torch.Generator) -> uint8 tensor (C, image_size, image_size).
    """

    def __init__(self, root, domain, splits, image_size, record=None, no_mirror=(), cache=None,
                 augment=None, channels=3):
        self.domain = domain
        self.crop = image_size
        self.side = round(image_size * 9 / 8)
        self.augment = augment
        self.record = record
        self.channels = len(record["mean"]) if record and record["mean"] else channels
        self.paths = []
        self.ids = []
        self.labels = []
        self.parts = []  # of each split the file of its pixels, and the paths
        self.places = []  # once decoded: what map_pixels gives
        root = os.path.realpath(root)
        own = f"{os.path.basename(root)}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
        folder = Path(cache, own) if cache else Path(root, "cache")
        for split in splits:
            self.add(root, split, folder)
        mirror = self.record["mirror"] and domain not in no_mirror
        self.record = {**self.record, "mirror": mirror}
        self.labelled = -1 not in self.labels

    def add(self, root, split, folder):
        """List a split. A line is printed if it is new, or if something of it is left out."""
        path = Path(root, "annotations", f"{self.domain}_{split}.json")
        annotated = path.parent.is_dir()
        if not annotated:
            path = Path(root, self.domain, split)
        elif split == "test" and not path.exists():  # the release has no labels of it
            path = path.with_name(f"{self.domain}_test_stripped.json")
        with ba2ps.reading(path):
            names, classes, labels, left_out = (
                read_annotations(path) if annotated else read_folders(root, path))
        notes = [f"{number} left out: {reason}" for reason, number in left_out.items()]
        empty = sorted(classes.keys() - {labels.get(number) for number in names})
        if labels and empty:
            first = ", ".join(ascii(classes[category]) for category in empty[:3])
            more = ", ..." if len(empty) > 3 else ""
            notes.append(f"{len(empty)} classes without images: {first}{more}")
        check(names, "; ".join([f"{path} lists no images", *notes]))

        mean, std = MEAN_STD.get(self.domain, (None, None)) if self.channels == 3 else (None, None)
        record = {"classes": [*classes.values()], "category_ids": [*classes],
                  "mean": mean, "std": std, "mirror": self.domain not in NO_MIRROR}
        self.record = self.record or record
        key = "category_ids" if annotated else "classes"  # must be as in training
        check(record[key] == self.record[key], f"{path}: the categories are not those of training")
        position = {category: k for k, category in enumerate(classes)}
        paths = []
        digest = hashlib.sha256()
        for number, name in names.items():
            paths.append(os.path.join(root, name))
            with ba2ps.reading(paths[-1]):
                stat = os.stat(paths[-1])
            digest.update(f"{name!r} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            self.labels.append(position[labels[number]] if labels else -1)
        self.paths += paths
        self.ids += names
        kind = f"{self.domain}-{split}-{self.side}x{self.channels}"
        file = folder / f"{kind}-{digest.hexdigest()[:16]}.pixels"
        self.parts.append((file, paths))
        if notes or not file.exists():
            print("; ".join([f"{self.domain} {split}: {len(names)} images", *notes]), flush=True)

    def decode(self, workers=0):
        """Decode, in so many processes, what is not in the cache; map the pixels; return self."""
        if not self.places:
            places = []
            for file, paths in self.parts:
                if not file.exists():
                    self.write(file, paths, workers)
                with ba2ps.reading(file):
                    places += map_pixels(file, len(paths), self.channels)
            self.places = places
            if self.record["mean"] is None:
                self.record["mean"], self.record["std"] = self.statistics()
        return self

    def write(self, file, paths, workers):
        """Decode images into `file`: the pixels of all, then their (h, w) as int32."""
        read = partial(read_image, side=self.side, channels=self.channels)
        loader = torch.utils.data.DataLoader(
            paths, None, collate_fn=read, num_workers=min(workers, len(paths) // 256),
            generator=torch.Generator())  # a run draws the same with and without a cache
        progress = progress_line(len(paths), f"decoding {self.domain}")
        sizes = []
        with ba2ps.writing(file) as part:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as out:
                for pixels in loader:
                    out.write(pixels)
                    sizes.append(pixels.shape[1:])
                    progress(1)
                out.write(np.array(sizes, np.int32))
        for other in set(file.parent.glob(f"{file.stem[:-16]}*.pixels")) - {file}:
            other.unlink(missing_ok=True)  # made from images that have changed since

    def statistics(self):
        """Mean and deviation of each channel, of 5,000 images: a mean is right to about 0.001."""
        total = squares = number = 0
        for i in range(0, len(self), max(1, len(self) // 5000)):
            flat = self[i][0].flatten(1).double() / 255
            total = total + flat.sum(1)
            squares = squares + flat.square().sum(1)
            number += flat.shape[1]
        mean = total / number
        variance = squares / number - mean.square()
        return mean.tolist(), variance.clamp(min=1e-4).sqrt().tolist()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        pixels, start, height, width = self.decode().places[i]
        stop = start + self.channels * height * width
        return pixels[start:stop].view(self.channels, height, width), self.labels[i]

    def batch(self, indices, order, device="cpu", own=slice(None)):
        """Random crops of the images `indices`, half of them mirrored: (B, C, S, S), labels (B,).
        own: the rows that are wanted. Numbers are drawn for all rows, so that processes agree."""
        drawn = torch.rand(len(indices), 3, generator=order).double().tolist()
        rows = list(zip(map(int, indices), drawn))[own]
        size = self.crop
        crops = torch.empty(len(rows), self.channels, size, size, dtype=torch.uint8)
        for crop, (i, (down, right, flip)) in zip(crops, rows):
            image, _ = self[i]
            if self.augment:
                generator = torch.Generator().manual_seed(int(down * 2**24))
                image = self.augment(image.clone(), generator)  # the cache stays as it is
                check(image.dtype == crop.dtype and image.shape == crop.shape,
                      f"augment of {self.domain} gives {image.dtype} {tuple(image.shape)}")
            else:
                top = int(down * (image.shape[1] - size + 1))
                left = int(right * (image.shape[2] - size + 1))
                image = image[:, top:top + size, left:left + size]
                if flip < 0.5 and self.record["mirror"]:
                    image = image.flip(2)
            crop.copy_(image)
        labels = torch.tensor([self.labels[i] for i, _ in rows], dtype=torch.long, device=device)
        return self.normalise(crops, device), labels

    def normalise(self, crops, device):
        """uint8 crops (B, C, S, S) -> float on `device`, with the domain's channel statistics."""
        mean = torch.tensor(self.record["mean"], device=device).view(-1, 1, 1)
        std = torch.tensor(self.record["std"], device=device).view(-1, 1, 1)
        return crops.to(device).float().div_(255).sub_(mean).div_(std)


def read_image(path, side, channels):
    """uint8 (C, h, w) of an image file, with a shorter side of `side`.

    It is PIL's convert of the first frame: what is transparent has the colour stored under it, and
    EXIF turns no JPEG or PNG. Of 16 bits grey the upper 8 are kept; more, or floats, are refused.
    """
    with ba2ps.reading(path), Image.open(path) as image:
        if image.mode.startswith("I;16"):  # convert would make them white
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        check(image.mode not in ("I", "F"), f"mode {image.mode}, not of 8 bits a channel")
        image = TF.resize(image.convert("L" if channels == 1 else "RGB"), side)
        pixels = np.array(image).reshape(*image.size[::-1], channels)
        return pixels.transpose(2, 0, 1).copy()


def map_pixels(file, number, channels):
    """[(all bytes, start, height, width)] of the images in a file of Images.write, mapped."""
    pixels = torch.from_numpy(np.memmap(file, np.uint8, "c"))  # torch wants it writable
    sizes = pixels[-8 * number:].clone().view(torch.int32).view(number, 2).tolist()
    places = []
    start = 0
    for height, width in sizes:
        places.append((pixels, start, height, width))
        start += channels * height * width
    check(start + 8 * number == len(pixels), "damaged: remove it, it is made anew")
    return places


# -------- 3  Tables and pictures

def show(rows):
    """Print dicts of the same keys as a table."""
    table = [list(rows[0])]
    for row in rows:
        table.append([f"{v:.3f}" if type(v) is float else str(v) for v in row.values()])
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("   ".join(map(str.ljust, cells, widths)).rstrip())


def draw_channels(path, network):
    """A picture of each layer: a row for each domain, a column for each channel, the most used ones
    first. Blue is on, grey is off, orange is off in all domains: pruned."""
    layers = ba2ps.masks(network)
    high = 8 * len(network.domains) + 8  # pixels for a layer
    picture = Image.new("RGB", (1200, 30 + high * len(layers)), "white")
    pen = ImageDraw.Draw(picture)
    rows = ", ".join(network.domains)
    pen.text((10, 8), f"{network.name}; rows: {rows}; blue: on, grey: off, orange: pruned", "black")
    top = 30
    for name, on in layers.items():
        columns = sorted(on.T.tolist(), key=lambda used: (-sum(used), used))
        on = torch.tensor(columns).T  # (domains, C)
        kinds = torch.where(on, 0, torch.where(on.any(0), 1, 2))  # places in the palette
        strip = Image.fromarray(kinds.byte().numpy(), "P")
        strip.putpalette([8, 48, 107, 208, 208, 208, 230, 159, 0])
        picture.paste(strip.resize((990, high - 8)), (200, top))
        pen.text((10, top), f"{name} {on.any(0).sum()}/{on.shape[1]}", "black")
        top += high
    with ba2ps.writing(path) as part:
        picture.save(part, "PNG")


# -------- 4  The script, and what train.py uses too

def load_model(path):
    """ba2ps.load, with checks of what the scripts need to know of a model."""
    network, facts = ba2ps.load(path)
    facts = {"budget": None, "budget_of": "layers", "arguments": {}, **facts}
    with ba2ps.reading(path):
        check("domains" in facts, "no classes and channel means of its domains: train.py adds them")
        for domain, number in network.classes.items():
            record = facts["domains"][domain]
            numbers = torch.tensor([record["mean"], record["std"]]).view(2, network.channels)
            check(numbers.isfinite().all() and numbers[1].min() > 0 and
                  len(record["classes"]) == len(set(record["category_ids"])) == number and
                  record["mirror"] in (0, 1), f"no usable record of {domain}")
    return network, facts


def write_json(path, content, **form):
    with ba2ps.writing(path) as part:
        Path(part).write_text(json.dumps(content, **form), "utf-8")


def progress_line(total, what):
    """A function that counts images, and says every 10 s how long the rest takes."""
    start = shown = time.time()
    done = 0

    def progress(number):
        nonlocal done, shown
        done += number
        now = time.time()
        if now - shown > 10:
            shown = now
            left = (now - start) * (total / done - 1) / 60
            print(f"{what}: {done}/{total}, {left:.1f} min left", file=sys.stderr, flush=True)
    return progress


def check_device(device):
    with ba2ps.reading(f"--device {device}"):
        torch.empty(0, device=device)


def at_least(least, most=10**9):
    """An argparse type: a number of the kind of `least`, from least to most."""
    def number(word):
        value = type(least)(word)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{word} is out of range: {least:g} to {most:g}")
        return value
    return number


def stop(message):
    """End the script with one line, without a worker's traceback."""
    text = str(message).strip().rpartition("InputError: ")[2]
    print(f"{Path(sys.argv[0]).name}: {repr(text)[1:-1]}", file=sys.stderr)
    sys.exit(2)


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="checkpoint of train.py or prune.py")
    add("--compare", action="store_true", help="what several models prune in common")
    add("--data", help="root of the images (default: those of its training)")
    add("--cache", help="folder of decoded images (default: in --data)")
    add("--workers", type=at_least(0), default=2, help="processes that decode images")
    add("--split", default="val", choices=["train", "val", "test"])
    add("--crops", type=int, choices=[1, 5, 10], help="default: 10, or 5 without mirroring")
    add("--skip-source", action="store_true", help="where ImageNet is missing")
    add("--baseline", help="a file: {domain: accuracy of full fine-tuning in %%}, for S")
    add("--json", help="a file for all measures")
    add("--results", help="a file for the challenge's server")
    add("--picture", help="a PNG of who uses which channel; alone it evaluates nothing")
    add("--batch-size", type=at_least(1), default=32)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check((len(set(args.models)) > 1) == args.compare, "one model, or --compare and several")
    for flag in ("data", "crops", "baseline", "results", "picture"):
        check(not args.compare or not getattr(args, flag), f"--{flag} does nothing with --compare")
    for file in (args.json, args.results, args.picture):
        check(not file or Path(file).parent.is_dir(), f"cannot write {file}: no such folder")
    check_device(args.device)
    return args


def evaluate(path, network, facts, args):
    """{domain: accuracy in %} on args.split; writes args.results."""
    trained = {} if args.data else facts["arguments"]
    data = args.data or trained.get("data")
    check(data and os.path.isdir(data), f"{path}: no images in {data}: give --data")
    sets = {}
    for domain in network.domains if args.skip_source else network.classes:
        images = Images(data, domain, [args.split], network.image_size, facts["domains"][domain],
                        cache=args.cache or trained.get("cache"))
        sets[domain] = images.decode(args.workers)
    progress = progress_line(sum(map(len, sets.values())), f"evaluating {path}")
    network.to(args.device)
    accuracies = {}
    results = []
    for domain, images in sets.items():
        probabilities = predict(network, domain, images, args.crops, args.batch_size, args.device,
                                progress)
        if images.labelled:
            accuracies[domain] = accuracy(probabilities, images)
        for number, label in zip(images.ids, probabilities.argmax(1).tolist()):
            category = images.record["category_ids"][label]
            results.append({"image_id": number, "category_id": category})
    if args.results:
        write_json(args.results, results, separators=(",", ":"))
    return accuracies


def main():
    args = parse()
    baseline = FINE_TUNED
    if args.baseline:
        with ba2ps.reading(args.baseline):
            baseline = baseline | json.loads(Path(args.baseline).read_text("utf-8-sig"))
            check(max(baseline.values()) < 100, "give {domain: accuracy in %, below 100}")
    models = {path: load_model(path) for path in args.models}
    for path, (network, _) in models.items():
        check(network.domains, f"{path} is a backbone without adapted domains: give a model.pt")
    kinds = sorted({network.name for network, _ in models.values()})
    check(len(kinds) == 1, f"--compare needs models of one kind, not {' and '.join(kinds)}")

    print("sparsity: share of channels that is off, mean over layers")
    if args.compare:
        report = compare(models)
        show(report)
    else:
        (path, (network, facts)), = models.items()
        if args.picture:
            draw_channels(args.picture, network)
        idle = args.picture and not args.json and not args.results
        accuracies = {} if idle else evaluate(path, network, facts, args)
        report = measure(network, facts, accuracies, args.split, baseline)
        print(f"usage: share of {report['budget_of']} that is on, budget {report['budget']}")
        show([{path: domain, **row} for domain, row in report["domains"].items()])
        known = {key: value for key, value in report.items() if value is not None}
        show([{"": key, " ": value} for key, value in known.items() if key != "domains"])
    if args.json:
        write_json(args.json, report, indent=1)


if __name__ == "__main__":
    try:
        main()
    except ba2ps.InputError as error:
        stop(error)
