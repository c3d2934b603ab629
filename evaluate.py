# SPDX-License-Identifier: MIT
"""The benchmark: the Visual Decathlon's files, crops and scores, the paper's Tables 1 and 2 for one model, 3 for several.

  python evaluate.py runs/beta0.5/model.pt --data decathlon                             # val: accuracy, S, cost
  python evaluate.py runs/beta0.5/model.pt --data decathlon --split test --results r.json   # for the challenge's server
  python evaluate.py runs/beta0.5/model.pt --picture channels.png                       # who uses which channel
  python evaluate.py --compare runs/*/model.pt [--data decathlon] [--picture betas.png] # what they prune in common

Measures as in the paper: accuracy in %, averaged over 5 or 10 crops; S of Eq. 6; complexity and params relative to the
backbone; sparsity as in Table 7. The source domain is served by the untouched backbone and takes no part in budget,
sharing, sparsity or params: it is reported apart.
"""
import argparse
import hashlib
import io
import itertools
import json
import os
import stat
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF

import ba2ps
from ba2ps import InputError

# ---------------------------------------------------------------------------------------------------------------------
# the ten domains of the Visual Decathlon (Rebuffi, Bilen and Vedaldi, NeurIPS 2017)

MEAN_STD = {  # channel means and deviations that others use; grey domains have one of each
    "aircraft": ([.4798, .5107, .5344], [.2107, .2051, .2373]),
    "cifar100": ([.5071, .4867, .4408], [.2675, .2565, .2761]),
    "daimlerpedcls": ([.482] * 3, [.2361] * 3),
    "dtd": ([.5270, .4703, .4240], [.2523, .2409, .2499]),
    "gtsrb": ([.3392, .3118, .3205], [.2756, .2658, .2709]),
    "imagenet12": ([.485, .456, .406], [.229, .224, .225]),
    "omniglot": ([.081] * 3, [.2705] * 3),
    "svhn": ([.4377, .4438, .4728], [.198, .201, .197]),
    "ucf101": ([.4995, .4988, .4998], [.109, .1081, .1068]),
    "vgg-flowers": ([.4341, .3831, .2971], [.2851, .2384, .2640]),
}
NO_MIRROR = {"dtd", "gtsrb", "omniglot", "svhn"}  # trained without mirroring, five crops at test time (section 4.1)
FINE_TUNED = {  # accuracy (%) of full fine-tuning on test: the reference of S
    "imagenet12": 59.87, "aircraft": 60.34, "cifar100": 82.12, "daimlerpedcls": 92.82, "dtd": 55.53, "gtsrb": 97.53,
    "vgg-flowers": 81.41, "omniglot": 87.69, "svhn": 96.55, "ucf101": 51.20}


def read_annotations(root, domain, split):
    """One annotation file of the release, split train, val or test (test falls back on {domain}_test_stripped.json).

    Returns (file names relative to the root, image ids, category ids or None without labels, {category id: name}), all
    from `categories` and `annotations`, never from the order of folders. InputError names what is missing or wrong.
    """
    folder = Path(root) / "annotations"
    if not folder.is_dir():
        raise InputError(f"{root} is no Visual Decathlon root: it has no folder annotations")
    path = folder / f"{domain}_{split}.json"
    if split == "test" and not path.exists():
        path = folder / f"{domain}_test_stripped.json"
    if path.parent != folder:
        raise InputError(f"{domain!r} is no domain of {root}: its name is a path")

    def known(value, kind, what):
        if type(value) is not kind:
            raise InputError(f"annotation file {path} is not laid out as the release's: {what} is {value!r:.40}")
        return value

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {known(c["id"], int, "a category's id"): str(c["name"]) for c in content["categories"]}
        paths = [known(image["file_name"], str, "a file_name") for image in content["images"]]
        ids = [known(image["id"], int, "an image's id") for image in content["images"]]
        labels = {} if "annotations" in content else None
        for annotation in content.get("annotations", ()):
            image_id = known(annotation["image_id"], int, "an annotation's image_id")
            category_id = known(annotation["category_id"], int, "an annotation's category_id")
            if labels.setdefault(image_id, category_id) != category_id:
                raise InputError(f"annotation file {path}: image {image_id} is given two categories, "
                                 f"{labels[image_id]} and {category_id}: keep one")
        repeated = len(names) < len(content["categories"])
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"annotation file {path} is missing: is {domain} a domain of {root}, {split} a split?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"annotation file {path} is not readable JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"annotation file {path} is not laid out as the release's: {error!r}") from None
    if not paths:
        raise InputError(f"annotation file {path} lists no images: choose another split")
    if not names:
        raise InputError(f"annotation file {path} has no categories")
    if repeated or len(set(ids)) < len(ids):
        what = "category" if repeated else "image"
        raise InputError(f"annotation file {path} gives an id to more than one {what}: number them anew")
    for name in paths:
        if os.path.isabs(name) or ".." in name and os.path.normpath(name).split(os.sep)[0] == "..":
            raise InputError(f"annotation file {path}: image {name} lies outside {root}: give names relative to it")
    if labels is not None:
        for image_id, name in zip(ids, paths):
            if labels.get(image_id) not in names:
                raise InputError(f"annotation file {path}: image {name} has no annotation with a known category")
        labels = [labels[image_id] for image_id in ids]
    return paths, ids, labels, dict(sorted(names.items()))


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")  # not EPS: Pillow runs Ghostscript


class Decoder(Dataset):
    """Item i is (height, width, bytes of an RGB image (3, height, width)), the shorter side resized to `side`.

    Greys of 16 bits keep their upper 8, transparency is dropped, of an animation the first frame is taken, and an
    image stays turned as it is stored, whatever its EXIF orientation. One that cannot be read is an InputError, returned:
    raised in a worker process it would arrive wrapped in its traceback.
    """

    def __init__(self, paths, side):
        self.paths, self.side = paths, side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, about what it could make sense of
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(self.paths[i], formats=FORMATS) as image:
                    pixels = np.array(TF.resize(self.rgb(image), self.side))
        except UnidentifiedImageError:
            return InputError(f"image {self.paths[i]} cannot be read: it is no image that Pillow knows")
        except Exception as error:  # Pillow's readers raise nearly anything on bytes that are no image
            return InputError(f"image {self.paths[i]} cannot be read: {error or type(error).__name__}")
        return *pixels.shape[:2], pixels.transpose(2, 0, 1).tobytes()

    def rgb(self, image):
        (short, long), most = sorted(image.size), Image.MAX_IMAGE_PIXELS or float("inf")
        if short < 1:
            raise ValueError("it has no pixels")
        if self.side * self.side * long > most * short:
            raise ValueError(f"it is too long and narrow, {image.size[0]} x {image.size[1]} pixels")
        if image.mode.startswith("I"):  # convert clips at 255
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("its values need more than 16 bits")
            return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise ValueError("its values are floating-point numbers, of no known range")
        return image.convert("RGB")


def write_pixels(file, paths, side, digest, workers=0, progress=lambda n: None):
    """Decode images into a binary file: their bytes end to end, (heights, widths) as int32, digest, their number.

    An image that cannot be read gets no bytes and height and width 0. Returns the InputErrors of those.
    """
    sizes, broken = [], []
    try:
        for items in DataLoader(Decoder(paths, side), 64, collate_fn=list, num_workers=min(workers, len(paths) // 256),
                                generator=torch.Generator()):  # its own: a run draws the same, cache or not
            for item in items:
                if isinstance(item, InputError):
                    broken.append(item)
                    item = 0, 0, b""
                sizes.append(item[:2])
                file.write(item[2])
            progress(len(items))
    except RuntimeError as error:
        raise InputError(f"a process that decodes images has died, give fewer --workers: {error}") from None
    file.write(np.array(sizes, np.int32).T.tobytes() + digest + np.int64(len(sizes)).tobytes())
    return broken


def read_pixels(buffer, digest):
    """(bytes, heights, widths) of what write_pixels wrote, uint8 and int32 tensors on `buffer`; None of anything else.

    buffer: (n,) uint8, memory-mapped or not.
    """
    tail = len(digest) + 8
    if len(buffer) < tail or buffer[-tail:-8].numpy().tobytes() != digest:
        return None
    number = int(buffer[-8:].numpy().view(np.int64)[0])
    start = len(buffer) - tail - 8 * number
    if number < 0 or start < 0:
        return None
    sizes = torch.from_numpy(buffer[start:-tail].numpy().copy().view(np.int32)).view(2, number)
    right = (sizes >= 0).all() and 3 * (sizes[0].long() * sizes[1]).sum() == start
    return (buffer[:start], *sizes) if right else None


def cache_folder(root, chosen=None):
    """Where the pixels of a root are kept: below the folder `chosen`, else in the root, else with the user's caches."""
    if chosen is None and os.access(root, os.W_OK):
        return Path(root, "cache")
    base = chosen or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ba2ps")
    full = os.path.realpath(root)
    return Path(base, f"{os.path.basename(full)}-{hashlib.sha256(os.fsencode(full)).hexdigest()[:12]}")


class Images:
    """The images of one domain and of one split or several, resized to a shorter side of 9/8 `image_size`.

    Item i is (uint8 tensor (3, h, w), label), the label -1 in a split without labels. Every image is decoded once, on
    first use or by decode(), into a file of plain pixels for each split, which is memory-mapped: memory holds no more of
    it than the system finds room for, and the next run decodes nothing. The file is made anew when the list of images, or
    the size or time of change of any, is not what it was (an image is looked at with stat alone: to be told of a change
    within one size and one tick of the clock, delete the file).

    category_ids: the classes in the order of the classifier's outputs; default, those of the first split, ascending.
    cache: the folder for those files; None, see cache_folder; False: pixels are decoded into memory, for this run only.
    skip_broken: leave out images that are missing or cannot be read, and count them in `skipped`; else an InputError
    names the first.
    """

    def __init__(self, root, domain, splits, image_size, category_ids=None, cache=None, skip_broken=False):
        self.domain, self.splits, self.side = domain, list(splits), round(image_size * 9 / 8)
        self.crop, self.skip_broken, self.skipped = image_size, skip_broken, 0
        self.paths, self.ids, self.labels = [], [], []
        self.parts, self.buffers = [], None  # of each split: its file, digest and number of images; its pixels
        for split in self.splits:
            names, ids, categories, classes = read_annotations(root, domain, split)
            self.classes = list(classes.values())
            category_ids = list(classes) if category_ids is None else category_ids
            if list(classes) != list(category_ids):
                raise InputError(f"the categories of {domain} in split {split} are not those the network was trained on")
            position = {category_id: label for label, category_id in enumerate(category_ids)}
            digest, missing = hashlib.sha256(b"pixels-1"), 0
            paths = [os.path.join(root, name) for name in names]
            for name, path in zip(names, paths):
                try:
                    status = os.stat(path)
                    size, time_ns = (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, 0)
                except (OSError, ValueError):
                    size, time_ns = -1, 0
                if size < 0 and not skip_broken:
                    raise InputError(f"image {path} of {domain} is missing: unpack the release's {domain}.tar again")
                missing += size < 0
                digest.update(f"{name}\0{size} {time_ns}\0".encode("utf-8", "surrogatepass"))
            if missing == len(names):
                raise InputError(f"all {missing} images of {domain} are missing: unpack the release's {domain}.tar")
            folder = cache_folder(root, cache) if cache is not False else None
            self.parts.append((folder and folder / f"{domain}-{split}-{self.side}.pixels", digest.digest(), len(names)))
            self.paths += paths
            self.ids += ids
            self.labels += [-1] * len(names) if categories is None else [position[c] for c in categories]
        self.category_ids = list(category_ids)
        self.labelled = -1 not in self.labels

    def decode(self, workers=0):
        """Map the pixels, decoding first, in so many processes, what no cache holds. Returns self."""
        if self.buffers is not None:
            return self
        buffers, sizes, begin, first = [], [], 0, []
        for file, digest, number in self.parts:
            paths = self.paths[begin:begin + number]
            found = map_pixels(file, digest) if file else None
            decoder = Decoder(paths, self.side)
            errors = [] if found is None else [decoder[i] for i in (found[1] == 0).nonzero().flatten().tolist()]
            if found is None or not all(isinstance(error, InputError) for error in errors):  # or readable by now
                found, errors = self.build(file, paths, digest, workers)
            if errors and not self.skip_broken:
                raise InputError(f"{errors[0]} (of {self.domain}; --skip-broken goes on without)")
            first = first or errors[:1]
            buffers.append(found[0])
            sizes.append(torch.stack(found[1:]).long())
            begin += number
        heights, widths = torch.cat(sizes, 1)
        ends = torch.cat([(3 * h * w).cumsum(0) for h, w in sizes])
        part = torch.arange(len(sizes)).repeat_interleave(torch.tensor([number for _, _, number in self.parts]))
        self.places = torch.stack([part, ends - 3 * heights * widths, heights, widths], 1)  # (n, 4)
        good = heights > 0
        if not good.any():
            raise InputError(f"none of the {len(good)} images of {self.domain} can be read")
        for name in ("paths", "ids", "labels"):
            setattr(self, name, list(itertools.compress(getattr(self, name), good.tolist())))
        self.places, self.skipped, self.buffers = self.places[good], int((~good).sum()), buffers
        if self.skipped:
            print(f"{self.domain}: {self.skipped} of {len(good)} images of {' and '.join(self.splits)} cannot be read and "
                  f"are left out, the first: {first[0]}")
        return self

    def build(self, file, paths, digest, workers):
        """Decode one split into `file`, or into memory without one: what read_pixels gives, and the InputErrors."""
        progress = progress_line(len(paths), f"decoding {self.domain}")
        if not file:
            memory = io.BytesIO()
            errors = write_pixels(memory, paths, self.side, digest, workers, progress)
            return read_pixels(torch.frombuffer(memory.getbuffer(), dtype=torch.uint8), digest), errors
        errors = []

        def write(part):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                for left in file.parent.glob(f"{file.name}.*.part"):  # by a run that was killed
                    if time.time() - left.stat().st_mtime > 3600:
                        left.unlink()
                with open(part, "wb") as whole:
                    errors.extend(write_pixels(whole, paths, self.side, digest, workers, progress))
            except OSError as error:
                raise InputError(f"--cache {file.parent} cannot be written, choose another or none: {error}") from None
        ba2ps.write_whole(file, write)
        return map_pixels(file, digest), errors

    def __len__(self):
        return len(self.decode().places)

    def __getitem__(self, i):
        part, start, height, width = self.decode().places[i].tolist()
        return self.buffers[part][start:start + 3 * height * width].view(3, height, width), self.labels[i]

    def batches(self, batches):
        """Lists of (uint8 image, label), one for each of `batches`: sequences of indices, tensors too."""
        self.decode()
        for batch in batches:
            yield [self[int(i)] for i in batch]


def map_pixels(file, digest):
    """read_pixels of a file, mapped; None if there is none, or not with this digest."""
    try:
        return read_pixels(torch.from_numpy(np.memmap(file, np.uint8, "c")), digest)  # c: torch wants to be able to write
    except (OSError, ValueError):
        return None


def load_model(path):
    """ba2ps.load, with the facts that evaluating needs."""
    network, facts = ba2ps.load(path)
    ba2ps.check_facts(path, network, facts)
    return network, facts


def load_adapted(path):
    """load_model of a network that has adapted domains."""
    network, facts = load_model(path)
    if not network.domains:
        raise InputError(f"{path} is a backbone without adapted domains: give train.py's model.pt")
    return network, facts


def describe(images, no_mirror=()):
    """What a checkpoint remembers of a domain: classes, category ids, channel means and deviations, mirroring.

    images: those it is trained on.
    """
    domain = images.domain
    if domain in MEAN_STD:
        mean, std = MEAN_STD[domain]
    else:  # measured; 5,000 images pin a mean to about 0.001
        sums = torch.zeros(2, 3, dtype=torch.float64)
        pixels = 0
        for i in range(0, len(images), max(1, len(images) // 5000)):
            flat = images[i][0].flatten(1).double() / 255
            sums += torch.stack([flat.sum(1), flat.square().sum(1)])
            pixels += flat.shape[1]
        mean = sums[0] / pixels
        std = (sums[1] / pixels - mean.square()).clamp(min=1e-4).sqrt().tolist()
        mean = mean.tolist()
    return {"classes": images.classes, "category_ids": images.category_ids, "mean": mean, "std": std,
            "mirror": domain not in NO_MIRROR and domain not in no_mirror}


# ---------------------------------------------------------------------------------------------------------------------
# crops

def cut(images, size, top, left, mirrored, device="cpu"):
    """N crops of each image, gathered on `device`: list of (3, h, w) -> (B, N, 3, size, size).

    top, left: (B, N) int64, their places. mirrored: (B, N) bool.
    """
    flat = torch.cat([image.reshape(-1) for image in images]).to(device)
    height, width = sides(images).to(device).view(2, -1, 1, 1, 1, 1)
    start = (3 * height * width).cumsum(0) - 3 * height * width
    top, left, mirrored = (value.to(device)[:, :, None, None, None] for value in (top, left, mirrored))
    steps = torch.arange(size, device=device)
    row = top + steps[:, None]                                                # (B, N, 1, size, 1)
    column = left + torch.where(mirrored, size - 1 - steps, steps)            # (B, N, 1, 1, size)
    plane = torch.arange(3, device=device)[:, None, None]
    index = start + (plane * height + row) * width + column                   # (B, N, 3, size, size)
    return flat.index_select(0, index.flatten()).view_as(index)  # of torch's ways to gather, by far the fastest on a CPU


def sides(images):
    """(2, B): heights and widths of a list of (3, h, w)."""
    return torch.tensor([image.shape[1:] for image in images]).T


def random_crops(images, size, mirror, generator, device="cpu"):
    """One crop of each image at a random place, mirrored half of the time: list of (3, h, w) -> (B, 3, size, size)."""
    down, right, flip = torch.rand(len(images), 3, generator=generator).double().T[..., None]  # (B, 1) each
    height, width = sides(images)[..., None]
    top, left = (down * (height - size + 1)).long(), (right * (width - size + 1)).long()
    return cut(images, size, top, left, (flip < 0.5) & mirror, device)[:, 0]


def test_crops(images, size, number, device="cpu"):
    """1, 5 or 10 crops of each image: list of (3, h, w) -> (B, number, 3, size, size).

    1: the centre. 5: four corners and the centre. 10: those, and those of the mirrored image (section 4.1).
    """
    down, right = sides(images) - size                                        # (B,) each: the last places
    zero, middle, centre = torch.zeros_like(down), (down / 2).round().long(), (right / 2).round().long()
    top, left = torch.stack([zero, zero, down, down, middle], 1), torch.stack([zero, right, zero, right, centre], 1)
    if number == 1:
        top, left = top[:, 4:], left[:, 4:]
    mirrored = torch.zeros_like(top, dtype=torch.bool)
    if number == 10:
        top, left = torch.cat([top, top], 1), torch.cat([left, right[:, None] - left], 1)
        mirrored = torch.cat([mirrored, ~mirrored], 1)
    return cut(images, size, top, left, mirrored, device)


def normalise(crops, record, device):
    """uint8 crops (..., 3, h, w) -> float on `device`, with the channel statistics of the domain's `record`."""
    mean, std = (torch.tensor(record[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    return crops.to(device).float().div_(255).sub_(mean).div_(std)


def training_batch(items, size, record, generator, device):
    """Random crops, normalised, and labels of a list of (uint8 image, label): (B, 3, size, size), (B,)."""
    crops = random_crops([image for image, _ in items], size, record["mirror"], generator, device)
    return normalise(crops, record, device), torch.tensor([label for _, label in items], device=device)


@torch.no_grad()
def predict(network, domain, record, images, crops=None, batch_size=32, device="cpu", progress=lambda n: None):
    """Class probabilities (len(images), classes) of `domain`, the softmax averaged over the crops of each image.

    crops: 1, 5 or 10; by default the paper's, 10 for a domain that trains with mirroring and 5 for one without.
    """
    crops = crops or (10 if record["mirror"] else 5)
    network.eval()
    out = []
    for items in images.batches(torch.arange(len(images)).split(batch_size)):
        x = normalise(test_crops([image for image, _ in items], images.crop, crops, device), record, device)
        parts = x.flatten(0, 1).split(len(items))  # one forward pass for each crop: ten at once outgrow a CPU's caches
        logits = torch.cat([network(part, domain) for part in parts])     # (B * crops, classes)
        out.append(logits.softmax(1).unflatten(0, (-1, crops)).mean(1).cpu())  # (B, classes)
        progress(len(items))
    return torch.cat(out)


def accuracy(probabilities, images):
    """Share of right predictions, in %."""
    return 100 * (probabilities.argmax(1) == torch.tensor(images.labels)).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# scores

def s_score(accuracies, baseline):
    """S = sum over domains of 1000 (max(0, E_max - E) / E_max)^2, E_max twice the error of `baseline` (Eq. 6).

    accuracies, baseline: {domain: %}. 1000 is perfection in one domain, 250 as good as the baseline.
    """
    score = 0.0
    for domain, value in accuracies.items():
        largest = 2 * (100 - baseline[domain])
        score += 1000 * (max(0.0, largest - (100 - value)) / largest) ** 2
    return score


def read_baseline(path):
    try:
        baseline = json.loads(Path(path).read_text(encoding="utf-8"))
        if all(0 <= value < 100 for value in baseline.values()):
            return baseline
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"--baseline {path} cannot be read: {error}") from None
    raise InputError(f"--baseline {path} must hold {{domain: accuracy in %}}, each at least 0 and below 100")


def costs(network, image_size):
    """(usage, sparsity, complexity) per adapted domain, sparsity "all" and params, as the tables name them."""
    sparsity, sparsity_all = ba2ps.sparsity(network)
    backbone = ba2ps.macs(network, None, image_size)
    rows = {domain: {"usage": ba2ps.usage(network, domain), "sparsity": sparsity[domain],
                     "complexity": ba2ps.macs(network, [domain], image_size) / backbone} for domain in network.domains}
    return rows, sparsity_all, ba2ps.params(network)


def measure(network, facts, accuracies, split, baseline=None):
    """Everything `--json` writes, and a list of remarks; `accuracies`: {domain: %}, empty for a split without labels."""
    remarks = []
    rows, sparsity_all, params = costs(network, facts["image_size"])
    adapted = [accuracies.get(domain) for domain in rows]
    for domain, row in rows.items():
        row["accuracy"] = accuracies.get(domain)
    complexity = sum(row["complexity"] for row in rows.values()) / len(rows)
    budget = facts.get("budget")
    over = [domain for domain, row in rows.items() if budget is not None and row["usage"] > budget + 1e-9]
    report = {"budget": budget, "split": split, "domains": rows, "over_budget": over, "mean_accuracy": None, "s_score": None,
              "s_o": None, "s_p": None, "complexity": complexity,
              "complexity_with_source": (complexity * len(rows) + 1) / (len(rows) + 1), "params": params,
              "sparsity_all": sparsity_all, "source": network.source, "source_accuracy": accuracies.get(network.source),
              "mean_accuracy_with_source": None}
    if None in adapted:
        remarks.append(f"{split} has no labels: no accuracy and no S here")
        return report, remarks
    report["mean_accuracy"] = sum(adapted) / len(adapted)
    if network.source in accuracies:
        report["mean_accuracy_with_source"] = (sum(adapted) + accuracies[network.source]) / (len(adapted) + 1)
    baseline = {**FINE_TUNED, **(baseline or {})}
    missing = [domain for domain in rows if domain not in baseline]
    if missing:
        remarks.append(f"S is left out: it needs the accuracy of full fine-tuning on {', '.join(missing)} (--baseline FILE)")
    else:
        scored = {domain: value for domain, value in accuracies.items() if domain in baseline}
        report["s_score"] = s_score(scored, baseline)
        report["s_o"], report["s_p"] = report["s_score"] / complexity, report["s_score"] / params
        remarks.append(f"S is over {len(scored)} domains, {'with' if network.source in scored else 'without'} the source")
    return report, remarks


@torch.no_grad()
def channels_on(network):
    """{layer: (N, C) bool}, the N adapted domains by the backbone's C input channels: on or not; pruned ones are off."""
    on = {}
    for name, layer in ba2ps.switched_layers(network).items():
        on[name] = torch.zeros(len(network.domains), layer.total_channels, dtype=torch.bool)
        on[name][:, layer.kept] = layer.binary_switches(network.domains).bool().cpu()
    return on


def shared_sparsity(networks):
    """Share of a layer's input channels that no adapted domain of any of `networks` uses, mean over layers (Table 3).

    The networks have the same layers; their weights and their domains may differ. Of one network: its sparsity all.
    """
    models = [channels_on(network) for network in networks]
    used = [torch.cat([on[name] for on in models]).any(0) for name in models[0]]  # of each layer (C,)
    return sum(1 - layer.double().mean().item() for layer in used) / len(used)


def compare(models, accuracies, split=None):
    """The paper's Table 3, for every pair of models and for all together, and what each is by itself: as `--json` writes it.

    models: {path: (network, facts)}; accuracies: {path: mean accuracy in %}, may be empty. The largest shared sparsity
    that budgets allow is 1 - the largest of them. Shares are from 0 to 1.
    """
    rows = [{"model": path, "budget": facts.get("budget"), "training": training(facts),
             "mean_accuracy": accuracies.get(path), "sparsity_all": ba2ps.sparsity(network)[1],
             "params": ba2ps.params(network)}
            for path, (network, facts) in models.items()]
    groups = [*itertools.combinations(rows, 2)] + ([rows] if len(rows) > 2 else [])
    shared = []
    for group in groups:
        budgets = [row["budget"] for row in group]
        shared.append({"models": [row["model"] for row in group], "budgets": budgets,
                       "shared_sparsity": shared_sparsity([models[row["model"]][0] for row in group]),
                       "max_shared_sparsity": None if None in budgets else min(1 - budget for budget in budgets)})
    return {"split": split, "models": rows, "shared": shared}


def training(facts):
    """What tells groups of models apart, in a few words, from the arguments train.py was given; "" if they are unknown."""
    arguments, words = facts.get("arguments") or {}, []
    if "sharing" in arguments:
        without = "switches in common" if arguments.get("common") else "no sharing"
        words.append(f"λ_PS = {arguments['sharing']}" if arguments["sharing"] else without)
    if arguments.get("sharing_loss", "intersection") != "intersection":
        words.append(str(arguments["sharing_loss"]))
    if (arguments.get("recipe") or "paper") != "paper":
        words.append(f"recipe {arguments['recipe']}")
    if arguments.get("independent"):
        words.append("independent")
    return ", ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# pictures: 1800 pixels wide, to be read at half of that; the colours differ in lightness too: all eyes tell them apart

INK, PALE, PRUNABLE = "#222222", "#e6e6e6", "#e69f00"
USED = [  # (colour, what it says of a domain's channel, from how many domains on)
    ("#08306b", "on in all domains", 1), ("#4a90c8", "on in several", 3), ("#a6d3f2", "on in this one alone", 2),
    (PALE, "off here, on in others", 2), (PRUNABLE, "off in all: pruned", 1)]
LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000"]  # Okabe and Ito
MARKERS = "osD^vP"


def check_picture(path):
    """InputError unless a picture can be drawn and `path` is a place for it."""
    if not path.lower().endswith(".png"):
        raise InputError(f"--picture {path} does not end in .png: a PNG is what it writes")
    try:
        import matplotlib.style  # noqa: F401
    except ImportError:
        raise InputError("--picture needs matplotlib: pip install matplotlib") from None


def write_picture(path, draw):
    """draw(figure) and write it to `path`, all of it or nothing."""
    import matplotlib.style
    from matplotlib.figure import Figure  # not pyplot: that would look for a display
    drawn = io.BytesIO()
    with matplotlib.style.context("default"):
        figure = Figure(dpi=200)
        draw(figure)
        figure.savefig(drawn, format="png")
    ba2ps.write_whole(path, lambda part: Path(part).write_bytes(drawn.getvalue()))


def draw_channels(figure, network, facts):
    """A strip per switched layer: domains from top to bottom, channels from the most used to what is pruned.

    All strips have one size, whatever the number of channels: the area in PRUNABLE is sparsity all.
    """
    from matplotlib.patches import Patch
    layers, domains = channels_on(network), network.domains
    blocks = {}
    for name in sorted(layers, key=lambda name: [word.zfill(5) for word in name.split(".")]):
        blocks.setdefault(name.split(".")[0], []).append(name)

    budget = "" if facts.get("budget") is None else f"β = {facts['budget']:g}"
    title = "   ".join(filter(None, [f"WRN-{network.depth}-{network.widen_factor}", budget, training(facts), "sparsity all "
                                     f"{100 * ba2ps.sparsity(network)[1]:.1f}%", f"params {ba2ps.params(network):.3f}"]))
    words = " · ".join(f"{domain}\xa0{ba2ps.usage(network, domain):.3f}" for domain in domains)  # \xa0: not broken in two
    words = textwrap.wrap(f"columns: channels, most used first; rows from the top, with the share that is on: {words}", 145,
                          break_on_hyphens=False)

    width, top, bottom, label, number = 9.0, 0.66 + 0.14 * len(words), 0.4, 0.78, 0.55  # all in inches
    high, longest = max(0.28, 0.055 * len(domains)), max(map(len, blocks.values()))     # of a strip; strips in a column
    gap = 0.1 / high                                                                    # between strips, in their height
    tall = (longest + gap * (longest - 1)) * high
    height = top + tall + bottom
    figure.set_size_inches(width, height)
    figure.text(0.1 / width, 1 - 0.12 / height, title, va="top", size=min(11, 950 / len(title)), weight="bold", color=INK,
                parse_math=False)
    figure.text(0.1 / width, 1 - 0.38 / height, "\n".join(words), va="top", size=8, color=INK, parse_math=False)

    colours = torch.tensor([list(bytes.fromhex(colour[1:])) for colour, _, _ in USED], dtype=torch.uint8)
    wide = width / len(blocks)
    for column, (block, names) in enumerate(blocks.items()):
        left = (column * wide + label) / width
        axes = figure.add_axes([left, bottom / height, (wide - label - number) / width, tall / height])
        for row, name in enumerate(names):
            on = layers[name]                                                # (N, C)
            count = on.sum(0)
            order = sorted(range(on.shape[1]), key=lambda c: (count[c].item(), on[:, c].tolist()), reverse=True)
            on, count = on[:, order], count[order].expand_as(on)
            kind = torch.where(on, 1 + (count == 1).int(), 3 + (count == 0).int())
            kind[on & (count == len(domains))] = 0
            start = row * (1 + gap)
            axes.imshow(colours[kind.long()].numpy(), extent=(0, 1, start + 1, start), aspect="auto",
                        interpolation="nearest")
            axes.text(1.03, start + 0.5, f"{int(on.any(0).sum())}/{on.shape[1]}", va="center", size=8, color=INK)
        axes.set(xlim=(0, 1), ylim=(longest + gap * (longest - 1), 0), xticks=[])
        axes.set_yticks([row * (1 + gap) + 0.5 for row in range(len(names))],
                        [name.partition(".")[2] or name for name in names], size=8, color=INK)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(block, size=9, weight="bold", color=INK, pad=4)
        axes.annotate("left", (1.03, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points", size=8,
                      color=INK)
    figure.legend(handles=[Patch(color=colour, label=says) for colour, says, least in USED if len(domains) >= least],
                  loc="lower center", ncols=len(USED), frameon=False, fontsize=8.5, handlelength=1.3, columnspacing=1.6)


def draw_betas(figure, report):
    """Accuracy (without it, sparsity all) and params against beta, a line for each group of models; of `compare`'s report.

    Where a group has several models of one beta (seeds), its line goes through their mean.
    """
    rows = report["models"]
    known = all(row["mean_accuracy"] is not None for row in rows)
    figure.set_size_inches(9, 3.7)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.21, top=0.92, wspace=0.2)
    for i, group in enumerate(dict.fromkeys(row["training"] for row in rows)):
        for axes, measure in ((left, "mean_accuracy" if known else "sparsity_all"), (right, "params")):
            points = {}
            for row in rows:
                if row["training"] == group:
                    points.setdefault(row["budget"], []).append(row[measure] * (100 if measure == "sparsity_all" else 1))
            style = {"color": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)], "clip_on": False, "zorder": 3}
            budgets = sorted(points)
            axes.plot(budgets, [sum(points[b]) / len(points[b]) for b in budgets], **{**style, "marker": ""}, linewidth=1.8)
            axes.plot(*zip(*[(b, value) for b in budgets for value in points[b]]), **style, linestyle="", markersize=6,
                      label=group or "models")
    if not known:
        left.plot([0, 1], [100, 0], color="#777777", linestyle="--", linewidth=1.3, label="ideal, 1 − β")
    for axes, title in ((left, f"mean accuracy on {report['split']} (%)" if known else
                         "sparsity all: channels no domain uses (%)"), (right, "params (memory, backbone = 1)")):
        axes.set_title(title, size=10, weight="bold", color=INK, loc="left")
        axes.set_xlim(0, 1.03)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.50", "0.75", "1"])
        axes.set_xlabel("budget β", size=9, color=INK)
        axes.tick_params(labelsize=9, colors=INK)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    if not known:
        left.set_ylim(0, 100)
    right.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)


# ---------------------------------------------------------------------------------------------------------------------
# the script

def show(report):
    """The paper's Tables 1 and 7 with a domain a row, and its Table 2."""
    def cell(value, form, width):
        return f"{'-' if value is None else format(value, form):>{width}}"

    budget, width = report["budget"], max([len(d) for d in report["domains"]] + [len(report["source"]) + 9, 14])
    print(f"{'':{width}}  accuracy   channels on   budget   sparsity   complexity")
    for domain, row in report["domains"].items():
        over = domain in report["over_budget"]
        print(f"{domain:{width}}{cell(row['accuracy'], '.2f', 10)}{row['usage']:14.3f}{cell(budget, '.2f', 9)}"
              f"{100 * row['sparsity']:10.1f}%{row['complexity']:13.3f}{'   over budget' if over else ''}")
    print(f"{'mean':{width}}{cell(report['mean_accuracy'], '.2f', 10)}{'':34}{report['complexity']:13.3f}")
    print(f"{'all together':{width}}{'':33}{100 * report['sparsity_all']:10.1f}%   <- channels no domain reads: pruned")
    if report["source_accuracy"] is not None:
        print(f"{report['source'] + ' (source)':{width}}{report['source_accuracy']:10.2f}   "
              f"untouched backbone; mean with it {report['mean_accuracy_with_source']:.2f}")
    print(f"\ncomplexity (MACs, backbone = 1)   {report['complexity']:.3f}   with the source at 1.0: "
          f"{report['complexity_with_source']:.3f}\nparams (memory, backbone = 1)     {report['params']:.3f}")
    if report["s_score"] is not None:
        print(f"S {report['s_score']:.0f}   S_O {report['s_o']:.0f}   S_P {report['s_p']:.0f}")
    if budget is not None:
        over = report["over_budget"]
        number = f"{len(over)} of {len(report['domains'])} domains" if over else "no domain"
        print(f"{number} over budget{': ' if over else ''}{', '.join(over)}")


def write_json(path, content):
    ba2ps.write_whole(path, lambda part: Path(part).write_text(json.dumps(content, indent=1), encoding="utf-8"))


def progress_line(total, what):
    """A function that counts images and keeps one line with ETA on a terminal, or one line every 30 s in a log."""
    start, state = time.time(), {"done": 0, "shown": time.time()}

    def progress(number):
        state["done"] += number
        terminal, now = sys.stderr.isatty(), time.time()
        if now - state["shown"] < (0.5 if terminal else 30):
            return
        state["shown"] = now
        left = (now - start) / state["done"] * (total - state["done"])
        print(f"{what}: {state['done']}/{total} images, {left / 60:.1f} min left" + " " * 10,
              end="\r" if terminal else "\n", file=sys.stderr, flush=True)
    return progress


def check_device(device):
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def data_flags(parser):
    """The flags of everything that reads images; data_options gives them to Images."""
    parser.add_argument("--cache", metavar="DIR", help="where decoded images are kept, 4 kB each at 32 pixels, 16 kB and more "
                        "at 64 (default: ROOT/cache for --data ROOT, or ~/.cache/ba2ps where that cannot be written); "
                        "none: in memory, for this run")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that are missing or cannot be read, "
                        "and count them; accuracies are of the others, and evaluate.py --results, which needs all, refuses")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images the first time")


def data_options(args):
    """The arguments of Images that data_flags sets; InputError for what no image can be read with."""
    for flag, least in (("workers", 0), ("batch_size", 1)):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range: give {least} or more")
    return {"cache": False if args.cache == "none" else args.cache, "skip_broken": args.skip_broken}


def stop(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def show_comparison(report):
    """The paper's Table 3, after what each model is by itself."""
    def percent(value):
        return "-" if value is None else f"{100 * value:.1f}%"

    def beta(value):
        return "-" if value is None else f"{value:.2f}"

    rows, known = report["models"], any(row["mean_accuracy"] is not None for row in report["models"])
    names = short_names([row["model"] for row in rows])
    joined = {id(row): " & ".join(names[path] for path in row["models"]) for row in report["shared"]}
    width = max(map(len, [*joined.values(), *names, "models"]))
    print(f"{'model':{width}}{'beta':>8}{'sparsity all':>15}{'1 - beta':>11}{'params':>9}{'   accuracy' if known else ''}")
    for row in rows:
        most = None if row["budget"] is None else 1 - row["budget"]
        print(f"{row['model']:{width}}{beta(row['budget']):>8}{percent(row['sparsity_all']):>15}{percent(most):>11}"
              f"{row['params']:9.3f}{format(row['mean_accuracy'], '11.2f') if known else ''}")
    betas = [" & ".join(map(beta, row["budgets"])) for row in report["shared"]]
    wide = max(map(len, betas))
    print(f"\n{'models':{width}}   {'beta':{wide}}   shared sparsity   max shared sparsity")
    for row, budgets in zip(report["shared"], betas):
        print(f"{joined[id(row)]:{width}}   {budgets:{wide}}{percent(row['shared_sparsity']):>18}"
              f"{percent(row['max_shared_sparsity']):>22}")


def short_names(paths):
    """{path: the part of it that tells it from the others}: runs/a/model.pt and runs/b/model.pt are a and b."""
    parts = [Path(path).parts for path in paths]
    while len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[1:] for part in parts]
    while len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    return {path: "/".join(part) for path, part in zip(paths, parts)}


def run(network, facts, sets, args, progress):
    """({domain: accuracy in %}, the rows of the challenge's results file) of `network` on `sets`, {domain: Images}."""
    network.to(args.device)
    accuracies, results = {}, []
    for domain, images in sets.items():
        probabilities = predict(network, domain, facts["domains"][domain], images, args.crops, args.batch_size,
                                args.device, progress)
        if images.labelled:
            accuracies[domain] = accuracy(probabilities, images)
        results += [{"image_id": image_id, "category_id": images.category_ids[label]}
                    for image_id, label in zip(images.ids, probabilities.argmax(1).tolist())]
    network.cpu()
    return accuracies, results


def compare_models(args):
    models = {path: load_adapted(path) for path in args.compare}
    first, (like, _) = next(iter(models.items()))
    for path, (network, facts) in models.items():
        layers, expected = ({name: layer.total_channels for name, layer in ba2ps.switched_layers(n).items()}
                            for n in (network, like))
        if layers != expected:
            raise InputError(f"{path} is WRN-{network.depth}-{network.widen_factor} and {first} WRN-{like.depth}-"
                             f"{like.widen_factor}: --compare needs models with the same layers")
        if args.picture and facts.get("budget") is None:
            raise InputError(f"{path} does not say its budget: --picture of several models is against beta")
    check_no_mirror(args, [network for network, _ in models.values()])

    accuracies, sets, opened, options = {}, {}, {}, data_options(args)
    if args.data:
        for path, (network, facts) in models.items():
            sets[path] = {}
            for domain in network.domains:
                record = facts["domains"][domain]
                record["mirror"] = record["mirror"] and domain not in args.no_mirror
                same = (domain, facts["image_size"], *record["category_ids"])
                if same not in opened:  # models share the decoded images
                    opened[same] = Images(args.data, domain, [args.split], facts["image_size"], record["category_ids"],
                                          **options)
                if not opened[same].labelled:
                    raise InputError(f"--split {args.split} has no labels for {domain}: there is no accuracy to compare")
                sets[path][domain] = opened[same]
        for images in opened.values():
            images.decode(args.workers)
        progress = progress_line(sum(len(images) for own in sets.values() for images in own.values()), "evaluating")
        for path, (network, facts) in models.items():
            own, _ = run(network, facts, sets[path], args, progress)
            accuracies[path] = sum(own.values()) / len(own)

    report = compare(models, accuracies, args.split if args.data else None)
    show_comparison(report)
    if args.json:
        write_json(args.json, report)
    if args.picture:
        write_picture(args.picture, lambda figure: draw_betas(figure, report))
        print(f"{'accuracy' if args.data else 'sparsity'} and params against beta in {args.picture}")


def evaluate_model(args):
    network, facts = load_adapted(args.model)
    baseline = read_baseline(args.baseline) if args.baseline else None
    check_no_mirror(args, [network])
    if args.data:
        domains, sets, skipped, options = list(network.domains), {}, [], data_options(args)
        if network.source in network.classifiers and not args.skip_source:
            domains.insert(0, network.source)
        for domain in domains:
            record = facts["domains"][domain]
            record["mirror"] = record["mirror"] and domain not in args.no_mirror
            try:
                sets[domain] = Images(args.data, domain, [args.split], facts["image_size"], record["category_ids"],
                                      **options)
            except InputError as error:
                if domain != network.source:
                    raise
                skipped.append(f"the source {domain} is left out: {error}")  # ImageNet has to be fetched separately
        for domain, images in sets.items():
            if images.decode(args.workers).skipped and args.results:
                raise InputError(f"--results {args.results} needs all images of {domain}, but {images.skipped} cannot be "
                                 "read: mend them, or leave out --results")

        progress = progress_line(sum(len(images) for images in sets.values()), "evaluating")
        accuracies, results = run(network, facts, sets, args, progress)
        report, remarks = measure(network, facts, accuracies, args.split, baseline)
        print(f"{args.model} on {args.split}, {args.crops or '5 or 10'} crops, {len(results)} images")
        show(report)
        for remark in skipped + remarks:
            print(remark)
        if args.json:
            write_json(args.json, report)
        if args.results:
            write_json(args.results, results)
            print(f"{len(results)} predictions for {', '.join(sets)} in {args.results}")
    if args.picture:
        write_picture(args.picture, lambda figure: draw_channels(figure, network, facts))
        print(f"who uses which channel in {args.picture}")


def check_no_mirror(args, networks):
    served = list(dict.fromkeys(domain for network in networks for domain in network.classifiers))
    unknown = set(args.no_mirror) - set(served)
    if unknown:
        raise InputError(f"--no-mirror {' '.join(sorted(unknown))}: the model serves {', '.join(served)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    parser.add_argument("model", nargs="?", help="checkpoint of train.py or prune.py")
    parser.add_argument("--data", help="a Visual Decathlon root (annotations/, data/); --picture and --compare do without")
    parser.add_argument("--split", default="val", choices=["train", "val", "test"])
    parser.add_argument("--crops", type=int, choices=[1, 5, 10], help="default: the paper's, 10, or 5 without mirroring")
    parser.add_argument("--no-mirror", nargs="+", default=[], metavar="NAME", help="domains with five crops")
    parser.add_argument("--skip-source", action="store_true", help="do not evaluate the source domain")
    parser.add_argument("--baseline", metavar="FILE", help="{domain: accuracy of full fine-tuning in %%}, for S")
    parser.add_argument("--compare", nargs="+", metavar="MODEL", help="the paper's Table 3 for several models")
    parser.add_argument("--json", metavar="FILE", help="write all measures")
    parser.add_argument("--results", metavar="FILE", help="write the challenge's results file")
    parser.add_argument("--picture", metavar="FILE.png",
                        help="draw who uses which channel, or with --compare accuracy (sparsity, without --data) and params")
    parser.add_argument("--batch-size", type=int, default=32, help="images, each with all its crops")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    data_flags(parser)
    args = parser.parse_args()
    check_device(args.device)

    if args.compare and args.model:
        raise InputError(f"{args.model} stands outside --compare: give all models after --compare")
    if args.compare and len(set(args.compare)) < 2:
        raise InputError(f"--compare {args.compare[0]} is one model only: give two or more")
    if not args.compare and not args.model:
        raise InputError("no model is given: name a checkpoint of train.py or prune.py, or several after --compare")
    if not args.data and not args.compare and not args.picture:
        raise InputError("--data is missing: give the root of the images (only --picture and --compare do without)")
    for flag in ("--results", "--baseline"):
        path = getattr(args, flag[2:])
        if path and args.compare:
            raise InputError(f"{flag} {path} is for one model: leave it out with --compare")
    for flag in ("--results", "--baseline", "--json"):
        path = getattr(args, flag[2:])
        if path and not args.data and not args.compare:
            raise InputError(f"{flag} {path} needs --data: without it nothing is evaluated")
    for path in filter(None, (args.json, args.results, args.picture)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"cannot write {path}: no such directory")
    if args.picture:
        check_picture(args.picture)
    compare_models(args) if args.compare else evaluate_model(args)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        stop(error)
