# SPDX-License-Identifier: MIT
"""The benchmark: data (the Visual Decathlon or folders), crops and scores, the paper's Tables 1, 2, 3 and 7.

  python evaluate.py MODEL                                # on the val split of what it was trained on
  python evaluate.py MODEL --data DIR --split test --results r.json             # for the challenge's server
  python evaluate.py MODEL --picture channels.png                               # who uses which channel
  python evaluate.py --compare MODEL MODEL [--data DIR] [--picture betas.png]   # what they prune in common

The source is served by the untouched backbone: it takes no part in budget, sharing, sparsity or params.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import functional as TF

import ba2ps
warnings.filterwarnings("ignore", module="PIL")  # a broken image is an InputError, of one line

# -------- the ten domains of the Visual Decathlon (Rebuffi, Bilen and Vedaldi, NeurIPS 2017) ----------------

MEAN_STD = {  # channel means and deviations that others use; grey domains have one of each
    "aircraft": ([.4798, .5107, .5344], [.2107, .2051, .2373]),
    "cifar100": ([.5071, .4867, .4408], [.2675, .2565, .2761]),
    "daimlerpedcls": ([.482] * 3, [.2361] * 3), "dtd": ([.5270, .4703, .4240], [.2523, .2409, .2499]),
    "gtsrb": ([.3392, .3118, .3205], [.2756, .2658, .2709]),
    "imagenet12": ([.485, .456, .406], [.229, .224, .225]),
    "omniglot": ([.081] * 3, [.2705] * 3), "svhn": ([.4377, .4438, .4728], [.198, .201, .197]),
    "ucf101": ([.4995, .4988, .4998], [.109, .1081, .1068]),
    "vgg-flowers": ([.4341, .3831, .2971], [.2851, .2384, .2640])}
NO_MIRROR = {"dtd", "gtsrb", "omniglot", "svhn"}  # trained without mirroring, so five crops (section 4.1)
# accuracy (%) of full fine-tuning on test: the reference of S
FINE_TUNED = {"imagenet12": 59.87, "aircraft": 60.34, "cifar100": 82.12, "daimlerpedcls": 92.82, "dtd": 55.53,
              "gtsrb": 97.53, "vgg-flowers": 81.41, "omniglot": 87.69, "svhn": 96.55, "ucf101": 51.20}


# -------- annotations and images ----------------------------------------------------------------------------

def check(right, message):
    if not right:
        raise ba2ps.InputError(message)


def domains_of(root):
    """The sorted names of the domains with a train split in `root`, in either layout."""
    files, folders = Path(root, "annotations").glob("[!.]*_train.json"), Path(root).glob("[!.]*/train")
    names = ([path.name.removesuffix("_train.json") for path in files] if Path(root, "annotations").is_dir()
             else [path.parent.name for path in folders if path.is_dir()])
    check(names, f"{root} {'has no domains' if Path(root).is_dir() else 'is no directory'}: give one with "
                 "annotations/DOMAIN_train.json and data/, or with DOMAIN/train/CLASS/*.jpg")
    return sorted(names)


class Images:
    """The images of a domain in one or several splits, resized to a shorter side of 9/8 `image_size`.

    Item i is (uint8 tensor (3, h, w), label), -1 in a split without labels. A split is decoded once, into a
    file below ROOT/cache or `cache`, named by the images' names, sizes and times, and memory-mapped.
    record: what a checkpoint remembers of the domain; default: of the first split, with mean and std those of
    MEAN_STD or, by decode(), measured. no_mirror: domains without mirroring, besides NO_MIRROR."""

    def __init__(self, root, domain, splits, image_size, record=None, no_mirror=(), cache=None):
        self.domain, self.crop, self.side, self.record = domain, image_size, round(image_size * 9 / 8), record
        self.paths, self.ids, self.labels, self.parts, self.places = [], [], [], [], []
        root = os.path.realpath(root)
        own = f"{os.path.basename(root)}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
        for split in splits:
            self.add(root, split, Path(cache, own) if cache else Path(root, "cache"))
        self.record = {**self.record, "mirror": self.record["mirror"] and domain not in no_mirror}
        self.labelled = -1 not in self.labels
        check(cache or os.access(root, os.W_OK), f"{root} cannot be written: give --cache DIR")

    def add(self, root, split, folder):
        """Read a split. Labels are by category ids, which number the classes of train if it is folders."""
        path = Path(root, "annotations", f"{self.domain}_{split}.json")
        if split == "test" and not path.exists():  # the release has no labels of it
            path = path.with_name(f"{self.domain}_test_stripped.json")
        key = "category_ids"  # what must be as in training
        if not path.parent.is_dir():
            domains_of(root)  # refuses a root that has neither layout
            path, key = Path(root, self.domain, split), "classes"
        with ba2ps.reading(path):
            content = (self.folders(path.parent, split) if key == "classes" else
                       json.loads(path.read_text("utf-8")))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            classes = dict(sorted((c["id"], str(c["name"])) for c in content["categories"]))
            labels = {a["image_id"]: a["category_id"] for a in content.get("annotations", ())}
            check(0 < len(names) == len(content["images"]), "it lists no images, or an image's id twice")
            check(len(classes) == len(content["categories"]), "it lists a category's id twice")
            for number, name in names.items():
                check(labels.get(number) in classes or "annotations" not in content, f"{name}: no category")
                check(name[0] != "/" and ".." not in name.split("/"), f"{name!r} lies outside {root}")
        mean, std = MEAN_STD.get(self.domain, (None, None))
        found = {"classes": [*classes.values()], "category_ids": [*classes], "mean": mean, "std": std,
                 "mirror": self.domain not in NO_MIRROR}
        self.record = self.record or found
        check(found[key] == self.record[key], f"{path}: the categories are not those of training")
        paths = [os.path.join(root, name) for name in names.values()]
        stats = [os.path.exists(path) and (os.path.getsize(path), os.path.getmtime(path)) for path in paths]
        digest = hashlib.sha256(repr([*zip(names.values(), stats)]).encode()).hexdigest()[:16]
        self.parts.append((folder / f"{self.domain}-{split}-{self.side}-{digest}.pixels", paths))
        self.paths, self.ids = self.paths + paths, self.ids + list(names)
        position = {category: k for k, category in enumerate(classes)}
        self.labels += [position.get(labels.get(number), -1) for number in names]

    def folders(self, home, split):
        """What annotations would say of DOMAIN/SPLIT/CLASS/*.jpg. The classes are those of train, by name.
        Without val, a fixed tenth of each class of train is val. A test without classes has no labels."""
        classes = sorted(path.name for path in (home / "train").iterdir() if path.is_dir())
        classes = [name for name in classes if name[0] != "."]
        held_out = split != "test" and not (home / "val").is_dir()
        folder, kept, seen = home / ("train" if held_out else split), {}, {}
        for path in sorted(Path(place, file) for place, _, files in os.walk(folder, followlinks=True)
                           for file in files if is_image_file(file)):
            kind, *rest = path.relative_to(folder).parts  # class, ..., file
            if not any(part[0] == "." for part in (kind, *rest)):
                seen[kind] = seen.get(kind, 0) + 1
                if not held_out or (seen[kind] % 10 == 5) == (split == "val"):
                    kept[path.relative_to(home.parent).as_posix()] = kind if rest else None
        if held_out and split == "val":
            print(f"{home.name}: no val folder, {len(kept)} of {sum(seen.values())} images are held out")
        labelled = {name: kind for name, kind in kept.items() if kind}
        content = {"images": [{"id": name, "file_name": name} for name in labelled or kept],
                   "categories": [{"id": k, "name": name} for k, name in enumerate(classes)]}
        if labelled:
            content["annotations"] = [{"image_id": name, "category_id": [*classes, kind].index(kind)}
                                      for name, kind in labelled.items()]
        return content

    def decode(self, workers=0):
        """Map the pixels, after decoding, in so many processes, what is not in the cache. Returns self."""
        if not self.places:
            self.places = sum([map_pixels(file, len(paths)) or self.write(file, paths, workers)
                               for file, paths in self.parts], [])
            if self.record["mean"] is None:
                self.record["mean"], self.record["std"] = self.statistics()
        return self

    def write(self, file, paths, workers):
        """Decode images into `file`: the pixels of all end to end, then their (h, w) as int32."""
        sizes, progress = [], progress_line(len(paths), f"decoding {self.domain}")
        loader = torch.utils.data.DataLoader(
            paths, None, collate_fn=self.read, num_workers=min(workers, len(paths) // 256),
            generator=torch.Generator())  # its own: a run draws the same whether the cache is there or not
        with ba2ps.writing(file) as part:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as out:
                for pixels in loader:
                    out.write(pixels)
                    sizes.append(pixels.shape[1:])
                    progress(1)
                out.write(np.array(sizes, np.int32))
        for other in {*file.parent.glob(f"{file.name.rpartition('-')[0]}-*.pixels")} - {file}:
            other.unlink(missing_ok=True)  # made from images that have changed since
        return map_pixels(file, len(paths))

    def read(self, path):
        """uint8 (3, h, w) of an image file, turned as it is stored: what EXIF says of a JPEG is ignored."""
        with ba2ps.reading(path), Image.open(path) as image:
            return np.array(TF.resize(image.convert("RGB"), self.side)).transpose(2, 0, 1).copy()

    def statistics(self):
        """Channel means and deviations, of 5,000 images: that pins a mean to about 0.001."""
        sums = torch.zeros(3, 3, dtype=torch.float64)
        for i in range(0, len(self), max(1, len(self) // 5000)):
            flat = self[i][0].flatten(1).double() / 255
            sums += torch.stack([flat.sum(1), flat.square().sum(1), torch.full((3,), flat.shape[1])])
        mean, square = sums[:2] / sums[2]
        return mean.tolist(), (square - mean.square()).clamp(min=1e-4).sqrt().tolist()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        pixels, start, height, width = self.decode().places[i]
        return pixels[start:start + 3 * height * width].view(3, height, width), self.labels[i]

    def batch(self, indices, order, device="cpu", own=slice(None)):
        """Random crops of the images `indices`, half of them mirrored, and labels: (B, 3, S, S) float, (B,).
        own: the rows that are wanted. Numbers are drawn from `order` for all, the same in every process."""
        drawn, size = torch.rand(len(indices), 3, generator=order).double().tolist(), self.crop
        rows = [(int(i), *numbers) for i, numbers in zip(indices, drawn)][own]
        crops = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        for crop, (i, down, right, flip) in zip(crops, rows):
            image, _ = self[i]
            top, left = int(down * (image.shape[1] - size + 1)), int(right * (image.shape[2] - size + 1))
            image = image[:, top:top + size, left:left + size]
            crop.copy_(image.flip(2) if flip < 0.5 and self.record["mirror"] else image)
        labels = torch.tensor([self.labels[i] for i, *_ in rows], dtype=torch.long, device=device)
        return self.normalise(crops, device), labels

    def normalise(self, crops, device):
        """uint8 crops (B, 3, S, S) -> float on `device`, with the channel statistics of the domain."""
        mean, std = (torch.tensor(self.record[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
        return crops.to(device).float().div_(255).sub_(mean).div_(std)


def map_pixels(file, number):
    """[(all bytes, start, height, width)] of images, mapped; None if `file` is not there or not whole."""
    if not file.exists() or file.stat().st_size < 8 * number:
        return None
    pixels = torch.from_numpy(np.memmap(file, np.uint8, "c"))  # copied on writing: torch wants to write
    sizes = np.frombuffer(pixels[-8 * number:].numpy().tobytes(), np.int32).reshape(number, 2).astype(int)
    lengths = 3 * sizes.prod(1)
    if sizes.min() > 0 and lengths.sum() + 8 * number == len(pixels):
        return [(pixels, *at) for at in zip((lengths.cumsum() - lengths).tolist(), *sizes.T.tolist())]


# -------- test crops and predictions ------------------------------------------------------------------------

@torch.no_grad()
def predict(network, domain, images, crops=None, batch_size=32, device="cpu", progress=lambda number: None):
    """Class probabilities (n, classes), the mean over 1, 5 or 10 crops (default: 10, 5 without mirroring)."""
    crops, size, result = crops or (10 if images.record["mirror"] else 5), [images.crop] * 2, []
    cut = {1: lambda image, size: [TF.center_crop(image, size)], 5: TF.five_crop, 10: TF.ten_crop}[crops]
    network.eval()
    for indices in torch.arange(len(images)).split(batch_size):
        total = 0
        for crop in zip(*[cut(images[i][0], size) for i in indices.tolist()]):
            x = images.normalise(torch.stack(crop), device)         # (B, 3, S, S), the same crop of each
            total = total + network(x, domain).softmax(1) / crops   # (B, classes)
        result.append(total.cpu())
        progress(len(indices))
    return torch.cat(result)


def accuracy(probabilities, images):
    """Share of right predictions, in %."""
    return 100 * (probabilities.argmax(1) == torch.tensor(images.labels)).double().mean().item()


# -------- scores --------------------------------------------------------------------------------------------

def s_score(accuracies, baseline):
    """S = sum over domains of 1000 (max(0, E_max - E) / E_max)^2, E_max twice the baseline's error (Eq. 6).
    accuracies, baseline: {domain: %}. 1000 is perfection in one domain, 250 as good as the baseline."""
    worst = {domain: 2 * (100 - baseline[domain]) for domain in accuracies}
    return sum(1000 * max(0, 1 - (100 - value) / worst[domain]) ** 2 for domain, value in accuracies.items())


def measure(network, facts, accuracies, split, baseline=FINE_TUNED):
    """What `--json` writes. accuracies: {domain: %}, empty for a split without labels. S needs the accuracy
    and the baseline of every adapted domain; the source counts if it has both."""
    budget, of, source, number = facts["budget"], facts["budget_of"], network.source, len(network.domains)
    usage, macs = (ba2ps.usage(network, what, facts["image_size"]) for what in (of, "macs"))
    (sparsity, sparsity_all), params = ba2ps.sparsity(network), ba2ps.params(network)
    rows = {domain: {"accuracy": accuracies.get(domain), "usage": usage[domain], "sparsity": sparsity[domain],
                     "complexity": macs[domain]} for domain in network.domains}
    complexity, mean, with_source, s = sum(macs.values()) / number, None, None, None
    if rows.keys() <= accuracies.keys():
        mean = sum(accuracies[domain] for domain in rows) / number
        with_source = sum(accuracies.values()) / (number + 1) if source in accuracies else None
        if rows.keys() <= baseline.keys():
            s = s_score({domain: accuracies[domain] for domain in accuracies if domain in baseline}, baseline)
    told = [f"{key} {flag}" for key, flag in facts["arguments"].items() if flag not in (0, "intersection")
            and key in ("recipe", "budget_of", "sharing", "sharing_loss", "independent")]
    return {"budget": budget, "budget_of": of, "split": split, "training": ", ".join(told), "domains": rows,
            "over_budget": [domain for domain in rows if budget and usage[domain] > budget + 1e-6],
            "mean_accuracy": mean, "s_score": s, "s_o": s and s / complexity, "s_p": s and s / params,
            "complexity": complexity, "complexity_with_source": (complexity * number + 1) / (number + 1),
            "params": params, "sparsity_all": sparsity_all, "source": source,
            "source_accuracy": accuracies.get(source), "mean_accuracy_with_source": with_source}


def compare(models, reports):
    """What `--json` writes of models {path: (network, facts)} and reports {path: of measure}: with Table 3,
    the mean over layers of the share of channels that no domain of a pair, or of all models, uses. It is at
    most 1 - beta if budgets are of layers."""
    masks, shared = {path: ba2ps.masks(network) for path, (network, _) in models.items()}, []
    keys = "budget", "budget_of", "training", "mean_accuracy", "sparsity_all", "params"
    rows = [{"model": path, **{key: report[key] for key in keys}} for path, report in reports.items()]
    for group in [[a, b] for i, a in enumerate(rows) for b in rows[i + 1:]] + [rows] * (len(rows) > 2):
        budgets, paths = [row["budget"] for row in group], [row["model"] for row in group]
        off = [~torch.cat([masks[path][name] for path in paths]).any(0) for name in masks[paths[0]]]
        shared.append({"models": paths, "budgets": budgets,
                       "shared_sparsity": sum(layer.double().mean().item() for layer in off) / len(off),
                       "max_shared_sparsity": None if None in budgets else 1 - max(budgets)})
    return {"split": next(iter(reports.values()))["split"], "models": rows, "shared": shared}


# -------- pictures: 1800 pixels wide, to be read at half of that; the colours differ in lightness too -------

USED = {"on in all domains": "#08306b", "on in several": "#4a90c8", "on in this one alone": "#a6d3f2",
        "off here, on in others": "#e6e6e6", "off in all: pruned": "#e69f00"}


def write_picture(path, draw, *content):
    """draw(figure, *content) and write it to `path`, all of it or nothing."""
    with ba2ps.reading("matplotlib"):
        from matplotlib import figure, style  # not pyplot: that would look for a display
    looks = ["default", "tableau-colorblind10", {"font.size": 8, "text.parse_math": False}]
    with ba2ps.writing(path) as part, style.context(looks):
        drawing = figure.Figure((9, 3.7), 200, layout="constrained")
        draw(drawing, *content)
        drawing.savefig(part, format="png")


def draw_channels(figure, report, network):
    """A strip of one size for each layer: domains from the top, channels from the most used to the pruned."""
    from matplotlib import colors, patches
    layers, domains, of = ba2ps.masks(network), report["domains"].items(), report["budget_of"]
    layers = sorted(layers.items(), key=lambda layer: [part.zfill(9) for part in layer[0].split(".")])
    colours = colors.ListedColormap([*USED.values()])
    rows = math.ceil(len(layers) / 3)
    figure.set_size_inches(9, 1.2 + rows * (0.35 + 0.03 * len(domains)))
    title = (f"{network.name}, budget {report['budget']}, {report['training']}; "
             f"sparsity all {report['sparsity_all']:.1%}, params {report['params']:.3f}; columns: channels, "
             f"most used first, and how many are left; rows: domains, from the top, and their share of {of}: "
             + ", ".join(f"{domain} {row['usage']:.3f}" for domain, row in domains))
    figure.suptitle(textwrap.fill(title, 150), x=0.01, ha="left", size=8)
    strips = figure.subplots(rows, 3, squeeze=False).T.flatten()
    for axes in strips[len(layers):]:
        axes.remove()
    for axes, (name, on) in zip(strips, layers):
        on = torch.tensor(sorted(on.T.tolist(), key=lambda used: (sum(used), used), reverse=True)).T  # (N, C)
        count = on.sum(0).expand_as(on)
        kind = torch.where(on, 1 + (count == 1).int(), 3 + (count == 0).int())
        kind[on & (count == len(on))] = 0
        axes.imshow(kind.numpy(), colours, vmin=0, vmax=4, aspect="auto", interpolation="nearest")
        axes.set_ylabel(f"{name}  {on.any(0).sum()}/{on.shape[1]}", rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[], frame_on=False)
    legend = [patches.Patch(color=colour, label=says) for says, colour in USED.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=5, frameon=False)


def draw_betas(figure, report, _=None):
    """Accuracy (without it, sparsity all) and params against beta, a line for each way of training."""
    rows, (left, right) = report["models"], figure.subplots(1, 2)
    key = "sparsity_all" if None in [row["mean_accuracy"] for row in rows] else "mean_accuracy"
    for axes, key in ((left, key), (right, "params")):
        for i, group in enumerate(dict.fromkeys(row["training"] for row in rows)):
            points = sorted((row["budget"], row[key]) for row in rows if row["training"] == group)
            means = {x: np.mean([y for beta, y in points if beta == x]) for x, _ in points}  # of seeds
            axes.plot(*zip(*means.items()), f"C{i}")
            axes.plot(*zip(*points), f"C{i}{'osD^vP'[i % 6]}", label=group or "models")
        axes.set(title=key.replace("_", " "), xlabel="budget β", xlim=(0, 1.03))
        axes.grid(alpha=0.4)
        if key == "sparsity_all":
            axes.plot([0, 1], [1, 0], "--", color="grey", label="ideal, 1 − β")
    right.set_ylim(0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


# -------- the script ----------------------------------------------------------------------------------------

def load_model(path):
    """ba2ps.load, with checks of what the scripts need to know of a model."""
    network, facts = ba2ps.load(path)
    with ba2ps.reading(path):
        facts = {"budget": None, "budget_of": "layers", "arguments": {}, **facts}
        for domain, linear in network.classifiers.items():
            record = facts["domains"][domain]
            numbers = torch.tensor([record["mean"], record["std"]]).view(2, 3)
            check(numbers.isfinite().all() and numbers[1].min() > 0 and record["mirror"] in (True, False) and
                  len(record["classes"]) == len({*record["category_ids"]}) == linear.out_features,
                  f"no usable record of {domain}")
        check(0 < (facts["budget"] or 1) <= 1 and 0 < facts["image_size"] < 4097, "no usable size or budget")
    return network, facts


def write_json(path, content):
    with ba2ps.writing(path) as part:
        Path(part).write_text(json.dumps(content, indent=1), "utf-8")


def progress_line(total, what):
    """A function that counts images and every 10 s says how many are done and how long the rest takes."""
    done, start, shown = 0, time.time(), time.time()
    def progress(number):
        nonlocal done, shown
        done, now = done + number, time.time()
        if now - shown > 10:
            shown, left = now, (now - start) / done * (total - done) / 60
            print(f"{what}: {done}/{total} images, {left:.1f} min left", file=sys.stderr, flush=True)
    return progress


def check_device(device):
    with ba2ps.reading(f"--device {device}"):
        torch.empty(0, device=device)


def at_least(least, most=10**9):
    """An argparse type: a number of the kind of `least`, from least to most."""
    def number(word):
        if not least <= type(least)(word) <= most:
            raise argparse.ArgumentTypeError(f"{word} is out of range, give {least:g} to {most:g}")
        return type(least)(word)
    return number


def stop(message):
    line = repr(str(message).strip().rpartition("InputError: ")[2])[1:-1]  # no worker's traceback, one line
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def show(rows):
    """Print dicts of the same keys as a table."""
    rows = [[f"{cell:.3f}" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in row]
            for row in (rows[0], *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("   ".join(map(str.ljust, row, widths)).rstrip())


def evaluate(path, network, facts, args):
    """({domain: accuracy in %}, rows of the challenge's results file) of one model on args.split."""
    accuracies, results, data, cache = {}, [], args.data, args.cache
    if data is None:
        data, cache = str(facts["arguments"].get("data")), cache or facts["arguments"].get("cache")
        check(os.path.isdir(data), f"{path} was trained on {data}, which is not there: give --data DIR")
    sets = {domain: Images(data, domain, [args.split], facts["image_size"], facts["domains"][domain],
                           args.no_mirror, cache).decode(args.workers)
            for domain in (network.domains if args.skip_source or args.compare else network.classifiers)}
    progress = progress_line(sum(map(len, sets.values())), f"evaluating {path}")
    network.to(args.device)
    for domain, images in sets.items():
        probabilities = predict(network, domain, images, args.crops, args.batch_size, args.device, progress)
        if images.labelled:
            accuracies[domain] = accuracy(probabilities, images)
        results += [{"image_id": number, "category_id": images.record["category_ids"][label]}
                    for number, label in zip(images.ids, probabilities.argmax(1).tolist())]
    return accuracies, results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = stop, parser.add_argument
    add("model", nargs="?", help="checkpoint of train.py or prune.py")
    add("--compare", nargs="+", default=[], metavar="MODEL", help="two or more; accuracies only with --data")
    add("--data", metavar="DIR", help="a Visual Decathlon root, or DOMAIN/train/CLASS/*.jpg (or the trained)")
    add("--cache", metavar="DIR", help="of decoded images, 4 kB each at 32 pixels (default: ROOT/cache)")
    add("--workers", type=at_least(0), default=2, help="processes that decode images the first time")
    add("--split", default="val", choices=["train", "val", "test"])
    add("--crops", type=int, choices=[1, 5, 10], help="default: 10, or 5 for domains without mirroring")
    add("--no-mirror", nargs="+", default=[], metavar="NAME", help="domains with five crops")
    add("--skip-source", action="store_true", help="not the source domain, say where ImageNet is missing")
    add("--baseline", metavar="FILE", help="{domain: accuracy of full fine-tuning in %%}, for S")
    add("--json", metavar="FILE", help="write all measures")
    add("--results", metavar="FILE", help="write the challenge's results file")
    add("--picture", metavar="FILE.png", help="who uses which channel (without --data, --json and --results\n"
        "nothing is evaluated); with --compare accuracy (without --data, sparsity) and params")
    add("--batch-size", type=at_least(1), default=32, help="images, each with all its crops")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check_device(args.device)
    paths, reports, baseline, results = [args.model] * bool(args.model) + args.compare, {}, FINE_TUNED, []
    check(len({*paths}) > bool(args.compare) and not (args.compare and args.results),
          "give a model, or two or more after --compare (without --results)")
    check((args.picture or ".png").endswith(".png"), f"--picture {args.picture}: give a name in .png")
    if args.baseline:
        with ba2ps.reading(args.baseline):
            baseline = {**FINE_TUNED, **json.loads(Path(args.baseline).read_text("utf-8"))}
            check(all(0 <= value < 100 for value in baseline.values()), "give {domain: 0 to below 100 (%)}")
    models = {path: load_model(path) for path in paths}
    for path, (network, facts) in models.items():
        check(network.domains, f"{path} is a backbone without adapted domains: give train.py's model.pt")
        check({*args.no_mirror} <= {*network.classifiers}, f"--no-mirror: {path} has no {args.no_mirror}")
        check(facts["budget"] or not args.compare or not args.picture, f"--picture: {path} has no budget")
    kinds = {network.name for network, _ in models.values()}
    check(len(kinds) == 1, f"--compare needs models of one kind: these are {' and '.join(sorted(kinds))}")
    idle = not args.data and (args.compare or args.picture and not args.json and not args.results)
    for path, (network, facts) in models.items():
        accuracies, results = ({}, []) if idle else evaluate(path, network, facts, args)
        reports[path] = report = measure(network, facts, accuracies, None if idle else args.split, baseline)
    if args.compare:
        report = compare(models, reports)
        show(report["models"])
        show([{**row, "models": " & ".join(row["models"])} for row in report["shared"]])
    else:
        print(f"{paths[0]} on {report['split']}, budget {report['budget']} of {report['budget_of']}")
        show([{"": domain, **row} for domain, row in report["domains"].items()])
        show([{"": key, " ": row} for key, row in report.items() if key != "domains" and row is not None])
    for file, content in ((args.results, results), (args.json, report)):
        if file:
            write_json(file, content)
    if args.picture:
        write_picture(args.picture, draw_betas if args.compare else draw_channels, report, network)


if __name__ == "__main__":
    try:
        main()
    except ba2ps.InputError as error:
        stop(error)
