# SPDX-License-Identifier: MIT
"""Images of every kind and condition, the cache of their pixels, and what the scripts say to damaged files."""
import copy
import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import ba2ps
import evaluate
from ba2ps import InputError
from test_evaluate import write_domain
from test_scripts import SMALL, data, run, trained  # noqa: F401  (fixtures)


@pytest.fixture
def root(tmp_path):
    return write_domain(tmp_path / "root")


def images_of(root, **options):
    return evaluate.Images(root, "animals", ["train"], 32, **options)


def edit(root, change, name="animals_train"):
    path = root / f"annotations/{name}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- crops: gathered all at once, as if cut one by one ----------------------------------------------------------------

SIZES = [(36, 36), (36, 41), (47, 36), (36, 36), (36, 90), (37, 39)]


def pictures():
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in SIZES]


@pytest.mark.parametrize("mirror", [True, False])
def test_random_crops_are_those_that_are_cut_one_by_one(mirror):
    images, one, all_at_once = pictures() * 20, torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for _ in range(3):
        expected = []
        for image, (down, right, flip) in zip(images, torch.rand(len(images), 3, generator=one).tolist()):
            top, left = int(down * (image.shape[1] - 32 + 1)), int(right * (image.shape[2] - 32 + 1))
            crop = image[:, top:top + 32, left:left + 32]
            expected.append(crop.flip(2) if mirror and flip < 0.5 else crop)
        assert torch.equal(evaluate.random_crops(images, 32, mirror, all_at_once), torch.stack(expected))
    assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=all_at_once))


@pytest.mark.parametrize("number, reference", [(1, lambda image: (TF.center_crop(image, [32, 32]),)),
                                               (5, lambda image: TF.five_crop(image, [32, 32])),
                                               (10, lambda image: TF.ten_crop(image, [32, 32]))])
def test_test_crops_are_torchvisions(number, reference):
    images = pictures()
    expected = torch.stack([torch.stack(reference(image)) for image in images])
    assert torch.equal(evaluate.test_crops(images, 32, number), expected)


# --- the cache --------------------------------------------------------------------------------------------------------

def forbid(monkeypatch):
    monkeypatch.setattr(evaluate.Decoder, "__getitem__", lambda self, i: pytest.fail("an image is decoded"))


def pixels(images):
    return [(image.clone(), label) for image, label in next(images.batches([range(len(images))]))]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) and i == j for (x, i), (y, j) in zip(a, b))


def test_the_second_time_nothing_is_decoded(root, monkeypatch):
    first = pixels(images_of(root))
    forbid(monkeypatch)
    assert same(pixels(images_of(root)), first)
    both = evaluate.Images(root, "animals", ["train", "train"], 32)  # a cache for each split
    assert same(pixels(both), first + first)
    assert sorted(path.name for path in (root / "cache").iterdir()) == ["animals-train-36.pixels"]


def test_memory_the_cache_and_worker_processes_give_the_same_pixels(tmp_path, monkeypatch):
    root, domain = tmp_path, "animals"
    write_domain(root, domain, per_class=90)  # enough for a worker process
    paths = [path for path in (root / f"data/{domain}/train").glob("*/*")]
    for i, path in enumerate(paths):
        Image.effect_noise((36 + i % 3, 40 - i % 5), 60).convert("RGB").save(path)
    inside = pixels(images_of(root, cache=False))
    assert not (root / "cache").exists()
    images = images_of(root, cache=root / "elsewhere").decode(workers=1)
    assert same(pixels(images), inside) and len(inside) == 270
    forbid(monkeypatch)
    assert same(pixels(images_of(root, cache=root / "elsewhere")), inside)
    for path, (picture, _) in zip(images.paths[:9], inside):
        assert torch.equal(picture, TF.pil_to_tensor(TF.resize(Image.open(path), 36)))


@pytest.mark.parametrize("change", ["touched", "rewritten", "added", "another order", "larger"])
def test_the_cache_knows_when_its_source_changed(root, change):
    def write(path, colour, side, time_ns):
        Image.new("RGB", (side, side), (colour, 2, 3)).save(path, "BMP")
        os.utime(path, ns=(time_ns, time_ns))
    for i, path in enumerate(images_of(root).paths):
        write(path, i, 36, 7)  # all of one size and time
    before, size = pixels(images_of(root)), 32
    if change == "touched":
        write(path, 99, 36, 8)
    elif change == "rewritten":
        write(path, 99, 40, 7)
    elif change == "added":
        Image.new("RGB", (36, 36), (1, 2, 3)).save(root / "new.png")
        edit(root, lambda c: (c["images"].insert(0, {"id": 99, "file_name": "new.png"}),
                              c["annotations"].append({"image_id": 99, "category_id": 7})))
    elif change == "another order":
        edit(root, lambda c: c["images"].reverse())
    else:
        size = 64
    after = pixels(evaluate.Images(root, "animals", ["train"], size))
    fresh = pixels(evaluate.Images(root, "animals", ["train"], size, cache=False))
    assert same(after, fresh) and not same(after, before)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100], lambda b: b"", lambda b: b + b"\0",
                                    lambda b: b[:-8] + struct.pack("q", 2**60), lambda b: b[:-8] + struct.pack("q", -1),
                                    lambda b: b[:-136] + b"\xff" * 96 + b[-40:]],
                         ids=["cut", "cut short", "empty", "longer", "many", "few", "sizes"])
def test_a_damaged_cache_is_made_anew(root, damage):
    before, file = pixels(images_of(root)), root / "cache/animals-train-36.pixels"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(pixels(images_of(root)), before) and file.read_bytes() == whole


def test_a_build_that_is_stopped_or_killed_leaves_nothing_that_is_taken_for_whole(root, monkeypatch):
    decode, seen = evaluate.Decoder.__getitem__, []

    def stopped(self, i):
        seen.extend((root / "cache").iterdir())
        if i == 7:
            raise KeyboardInterrupt
        return decode(self, i)
    monkeypatch.setattr(evaluate.Decoder, "__getitem__", stopped)
    with pytest.raises(KeyboardInterrupt):
        images_of(root).decode()
    assert {path.suffix for path in seen} == {".part"} and not list((root / "cache").iterdir())
    monkeypatch.undo()
    killed = root / "cache/animals-train-36.pixels.1.part"
    killed.write_bytes(b"half")
    fresh = root / "cache/animals-train-36.pixels.2.part"  # another process is at it
    fresh.write_bytes(b"half")
    os.utime(killed, (0, 0))
    assert same(pixels(images_of(root)), pixels(images_of(root, cache=False)))
    assert not killed.exists() and fresh.exists()


def test_a_worker_process_that_dies_and_a_full_disk_get_one_line(tmp_path, monkeypatch):
    write_domain(tmp_path, per_class=90)
    if torch.multiprocessing.get_start_method() == "fork":  # else the process does not see the patch
        monkeypatch.setattr(evaluate.Decoder, "__getitem__", lambda self, i: os._exit(9))
        with pytest.raises(InputError, match="fewer --workers") as error:
            images_of(tmp_path).decode(workers=1)
        assert str(error.value).isprintable()
        monkeypatch.undo()

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(evaluate, "write_pixels", full)
    with pytest.raises(InputError, match="--cache .*choose another or none.*No space left"):
        images_of(tmp_path).decode()
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_goes_beside_the_data_or_to_the_users_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert evaluate.cache_folder(tmp_path) == tmp_path / "cache"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    one, other = evaluate.cache_folder(tmp_path / "a/root"), evaluate.cache_folder(tmp_path / "b/root")
    assert one != other and one.parent == other.parent == tmp_path / "home/ba2ps"
    assert evaluate.cache_folder(tmp_path, tmp_path / "chosen").parent == tmp_path / "chosen"


def test_a_run_is_the_same_with_a_cold_a_warm_and_no_cache(data, tmp_path, capsys):  # noqa: F811
    states = []
    for name, cache in (("cold", tmp_path / "c"), ("warm", tmp_path / "c"), ("none", "none")):
        code, _, err = run("train.py", "--data", data, "--source", "animals", *SMALL, "--backbone-epochs", "1", "--epochs",
                           "1", "--batch-size", "4", "--out", tmp_path / name, "--cache", cache, capsys=capsys)
        assert code == 0, err
        states.append(ba2ps.load(tmp_path / name / "model.pt")[0].state_dict())
    assert all(torch.equal(value, state[name]) for state in states[1:] for name, value in states[0].items())
    assert len(list((tmp_path / "c").glob("*/*.pixels"))) == 6  # three domains, train and val


# --- images -----------------------------------------------------------------------------------------------------------

RAMP = (np.arange(36 * 36).reshape(36, 36) * 50).astype(np.uint16)  # to 64,750
GREY = (RAMP >> 8).astype(np.uint8)


def colours(mode):
    return lambda path: Image.new("RGB", (36, 36), (250, 20, 90)).convert(mode).save(path, "TIFF")


def palette(path):
    picture = Image.new("P", (36, 36), 1)
    picture.putpalette([0, 0, 0, 250, 20, 90])
    picture.save(path, "PNG", transparency=b"\0\x80")


def animated(path):
    frames = [Image.new("P", (36, 36), i) for i in range(3)]
    for frame in frames:
        frame.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def turned(path):
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown turned by 90 degrees
    picture = np.zeros((36, 36, 3), np.uint8)
    picture[:18] = 200
    Image.fromarray(picture).save(path, "PNG", exif=exif)


def transparent(path):
    picture = Image.new("RGBA", (36, 36), (250, 20, 90, 0))
    picture.save(path, "PNG")


GOOD = {  # how an image is written, and its pixels (3, 36, 36)
    "16-bit grey png": (lambda path: Image.fromarray(RAMP).save(path, "PNG"), GREY),
    "16-bit grey tiff": (lambda path: Image.fromarray(RAMP).save(path, "TIFF"), GREY),
    "16-bit grey, big-endian": (lambda path: Image.fromarray(RAMP.astype(">u2")).save(path, "TIFF"), GREY),
    "16-bit grey pgm": (lambda path: path.write_bytes(b"P5 36 36 65535\n" + RAMP.astype(">u2").tobytes()), GREY),
    "8-bit grey": (lambda path: Image.fromarray(GREY).save(path, "PNG"), GREY),
    "black and white": (lambda path: Image.new("1", (36, 36), 1).save(path, "PNG"), np.full((36, 36), 255)),
    "CMYK": (colours("CMYK"), (250, 20, 90)), "palette": (palette, (250, 20, 90)), "alpha": (transparent, (250, 20, 90)),
    "animated": (animated, (200, 0, 0)),
    "EXIF orientation": (turned, np.where(np.arange(36)[:, None] < 18, 200, 0) * np.ones((1, 36), int)),
    "misnamed": (lambda path: Image.new("RGB", (36, 36), (1, 2, 3)).save(path, "BMP"), (1, 2, 3)),
}


@pytest.mark.parametrize("kind", GOOD)
def test_images_of_every_kind_are_read_as_rgb(kind, root):
    write, expected = GOOD[kind]
    images = images_of(root)
    write((root / images.paths[5]))
    image = pixels(images_of(root))[5][0]
    assert image.shape == (3, 36, 36) and image.dtype == torch.uint8
    expected = np.array(expected).reshape(3, 1, 1) if isinstance(expected, tuple) else expected
    assert np.array_equal(image.numpy(), np.broadcast_to(expected, (3, 36, 36)))


def png(width, height, rows=b""):
    """A PNG that claims this size."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def narrow(path):
    Image.new("L", (1, 90_000)).save(path, "PNG")


def directory(path):
    path.unlink()
    path.mkdir()


BROKEN = {  # how a file is broken, and what is said of it
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "truncated"),
    "header only": (lambda path: path.write_bytes(path.read_bytes()[:20]), "no image that Pillow knows"),
    "empty": (lambda path: path.write_bytes(b""), "no image that Pillow knows"),
    "text": (lambda path: path.write_text("a cat\nand\na dog"), "no image that Pillow knows"),
    "zero pixels": (lambda path: path.write_bytes(b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\0;"), "no (pixels|image)"),
    "huge": (lambda path: path.write_bytes(png(10_000, 10_000)), "decompression bomb"),
    "enormous": (lambda path: path.write_bytes(png(60_000, 60_000)), "decompression bomb"),
    "long and narrow": (narrow, "too long and narrow, 1 x 90000"),
    "floating-point": (lambda path: Image.new("F", (36, 36), 0.5).save(path, "TIFF"), "floating-point"),
    "32 bits": (lambda path: Image.new("I", (36, 36), 2**20).save(path, "TIFF"), "more than 16 bits"),
    "PostScript": (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 36 36\n%%EndComments\n"),
                   "no image that Pillow knows"),
    "directory": (directory, "is missing"),
    "gone": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_named_or_left_out_and_counted(kind, root, capsys, recwarn):
    damage, said = BROKEN[kind]
    victim = images_of(root, cache=False).paths[5]
    damage(root / victim)
    for _ in range(2):
        with pytest.raises(InputError, match=said) as error:
            images_of(root).decode()
        assert "\n" not in str(error.value) and victim in str(error.value) and "animals" in str(error.value)
    for _ in range(2):  # from a cold and a warm cache
        images = images_of(root, skip_broken=True)
        assert len(images) == 11 and images.skipped == 1 and victim not in images.paths
        assert len(images.ids) == len(images.labels) == 11 and images.labelled
        for image, label in pixels(images):
            assert round((image.float().mean().item() - 40) / 80) == label  # still the right ones
        assert "1 of 12 images of train cannot be read" in capsys.readouterr().out
    with pytest.raises(InputError, match=said):  # what was left out once is not forgotten
        images_of(root).decode()
    assert not recwarn.list


def test_an_image_that_is_mended_is_read_again(root, monkeypatch):
    whole = pixels(images_of(root, cache=False))
    read = evaluate.Decoder.__getitem__
    monkeypatch.setattr(evaluate.Decoder, "__getitem__", lambda self, i: read(self, i) if i != 3 else InputError("no room"))
    assert len(images_of(root, skip_broken=True)) == 11
    monkeypatch.undo()
    assert same(pixels(images_of(root)), whole)


def test_no_image_that_can_be_read_is_an_error_all_the_same(root):
    for path in images_of(root, cache=False).paths:
        (root / path).write_bytes(b"")
    with pytest.raises(InputError, match="none of the 12 images of animals"):
        images_of(root, skip_broken=True).decode()
    shutil.rmtree(root / "data")
    with pytest.raises(InputError, match="all 12 images of animals are missing"):
        images_of(root, skip_broken=True)


def test_skip_broken_in_the_scripts(trained, tmp_path, capsys):  # noqa: F811
    for i, domain in enumerate(["animals", "birds", "cars"]):
        write_domain(tmp_path, domain, ("one", "two", "three")[:2 + i % 2], 6, 10_000 * i, seed=i)
    for split in ("train", "val"):
        next((tmp_path / "data/birds" / split).glob("*/*")).write_bytes(b"\xff\xd8 cut")
    common = ["--data", tmp_path, "--workers", "0", "--device", "cpu"]
    code, out, err = run("evaluate.py", trained / "model.pt", *common, "--skip-broken", capsys=capsys)
    assert code == 0 and "birds: 1 of 18 images of val cannot be read" in out and ", 41 images" in out, err
    code, out, err = run("evaluate.py", trained / "model.pt", *common, "--skip-broken", "--results", tmp_path / "r.json",
                         capsys=capsys)
    assert code == 2 and err.count("\n") == 1 and "--results" in err and "birds" in err
    assert not (tmp_path / "r.json").exists()
    for splits, number in ((["train"], "1 of 18 images of train"), (["train", "val"], "2 of 36 images of train and val")):
        words = [*SMALL, "--backbone", trained / "backbone.pt", "--epochs", "1", "--splits", *splits]
        words += ["--out", tmp_path / "run"]
        code, out, err = run("train.py", *common, *words, capsys=capsys)
        assert code == 2 and err.count("\n") == 1 and "--skip-broken" in err
        code, out, err = run("train.py", *common, *words, "--skip-broken", capsys=capsys)
        assert code == 0 and number in out, err


@pytest.mark.parametrize("words, said", [(["--workers", "-1"], "--workers -1"), (["--batch-size", "0"], "--batch-size 0"),
                                         (["--cache", "FILE"], "--cache")])
def test_flags_of_the_data_are_checked(words, said, root, data, trained, tmp_path, capsys):  # noqa: F811
    (tmp_path / "file").write_text("")
    words = [tmp_path / "file" if word == "FILE" else word for word in words]
    for script in (["train.py", "--backbone", trained / "backbone.pt", *SMALL, "--out", tmp_path / "run"],
                   ["evaluate.py", trained / "model.pt"]):
        code, _, err = run(*script, "--data", data, *words, capsys=capsys)
        assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- annotations ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, said", [
    (lambda c: c["categories"].append({"id": 7, "name": "again"}), "an id to more than one category"),
    (lambda c: c["images"].append(dict(c["images"][0])), "an id to more than one image"),
    (lambda c: c["annotations"].extend({**c["annotations"][0], "category_id": i} for i in (7, 17)), "given two categories"),
    (lambda c: c["annotations"][0].update(category_id=-1), "no annotation with a known category"),
    (lambda c: c["annotations"][0].update(image_id=-5), "no annotation with a known category"),
    (lambda c: c["annotations"][0].update(category_id=[7]), r"category_id is \[7\]"),
    (lambda c: c["annotations"][0].update(category_id="7"), "category_id is '7'"),
    (lambda c: c["images"][0].update(id=None), "id is None"),
    (lambda c: c["images"][0].update(id=1.5), "id is 1.5"),
    (lambda c: c["images"][0].update(file_name=7), "file_name is 7"),
    (lambda c: c["images"][0].pop("file_name"), "file_name"),
    (lambda c: c["images"][0].pop("id"), "'id'"),
    (lambda c: c["annotations"][0].pop("image_id"), "image_id"),
    (lambda c: c["categories"][0].pop("name"), "name"),
    (lambda c: c["categories"].clear(), "no categories"),
    (lambda c: c.update(annotations=None), "not laid out"),
    (lambda c: c.update(images={"a": 1}), "not laid out"),
    (lambda c: c["images"][0].update(file_name="/etc/hostname"), "lies outside"),
    (lambda c: c["images"][0].update(file_name="../secret.jpg"), "lies outside"),
    (lambda c: c["images"][0].update(file_name="data/../../secret.jpg"), "lies outside"),
    (lambda c: c["images"][0].update(file_name="a\0b"), "is missing"),
    (lambda c: c["images"][0].update(file_name="a\nb\u001b[31m"), "is missing"),
    (lambda c: c["images"][0].update(file_name="\ud800"), "is missing"),
    (lambda c: c["images"][0].update(file_name=""), "is missing"),
])
def test_annotations_that_cannot_be_used_are_named_in_one_line(change, said, root):
    (root.parent / "secret.jpg").write_bytes((root / images_of(root).paths[0]).read_bytes())
    edit(root, change)
    with pytest.raises(InputError, match=said) as error:
        images_of(root)
    assert str(error.value).isprintable() and "animals" in str(error.value)


@pytest.mark.parametrize("change", [
    lambda c: c["annotations"].append(dict(c["annotations"][0])),  # the same category twice
    lambda c: c["annotations"].append({"id": -3, "image_id": 10**40, "category_id": -1}),  # of an image that is not listed
    lambda c: [image.update(width=-1, height=0) for image in c["images"]],  # never read
    lambda c: [annotation.pop("id") for annotation in c["annotations"]],
    lambda c: [image.update(file_name="data/../" + image["file_name"]) for image in c["images"]],
])
def test_annotations_that_can_be_used_are(change, root):
    before = pixels(images_of(root))
    edit(root, change)
    assert same(pixels(images_of(root)), before)


def test_json_that_is_none_and_domains_that_are_paths(root):
    path = root / "annotations/animals_train.json"
    for content in (b"[" * 100_000, b"\xff\xfe", b"", b"9" * 5000, b"null"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="animals_train.json is not") as error:
            images_of(root)
        assert "\n" not in str(error.value)
    for domain in ("../animals", "a/b", "/animals"):
        with pytest.raises(InputError, match="is no domain"):
            evaluate.Images(root, domain, ["test"], 32)


# --- checkpoints ------------------------------------------------------------------------------------------------------

class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def stem(checkpoint, weight):
    checkpoint["state"]["conv1.weight"] = weight


def first(state, start):
    return next(name for name in state if name.startswith(start))


TAMPERED = {  # which checkpoint, what is done to it, what is said
    "code": ("model", lambda c: c.update(note=Code()), "code is never run"),
    "depth": ("model", lambda c: c.update(depth=10**9), "too few for depth"),
    "depth of another": ("model", lambda c: c.update(depth=16), "damaged"),
    "depth, pruned": ("pruned", lambda c: c.update(depth=10**9), "too few for depth"),
    "depth, a string": ("model", lambda c: c.update(depth="10"), "whole numbers"),
    "depth, true": ("model", lambda c: c.update(depth=True), "whole numbers"),
    "width": ("model", lambda c: c.update(widen_factor=10**9), "damaged"),
    "width, large": ("model", lambda c: c.update(widen_factor=10**5), "input channels"),
    "width, pruned": ("pruned", lambda c: c.update(widen_factor=30_000), "damaged"),
    "width, pruned, with bits for it": ("pruned", lambda c: widen(c, 3000), "damaged"),
    "width, negative": ("pruned", lambda c: c.update(widen_factor=-4), "whole numbers"),
    "classes": ("model", lambda c: c["num_classes"].update(birds=10**12), "damaged"),
    "classes, pruned": ("pruned", lambda c: c["num_classes"].update(birds=10**12), "damaged"),
    "classes, none": ("model", lambda c: c["num_classes"].update(birds=0), "whole numbers"),
    "a domain too many": ("model", lambda c: c["num_classes"].update(fish=3), "fish"),
    "a domain too many, pruned": ("pruned", lambda c: c["num_classes"].update(fish=3), "bits fish"),
    "domains, many": ("model", lambda c: c["num_classes"].update({f"d{i}": 2 for i in range(10**5)}), "too few"),
    "domains that are numbers": ("model", lambda c: c.update(num_classes={1: 3}), "damaged"),
    "domains that are lines": ("model", lambda c: c.update(source="a\nb"), "damaged"),
    "a source that is a list": ("model", lambda c: c.update(source=["animals"]), "damaged"),
    "no state": ("model", lambda c: c.pop("state"), "lacks 'state'"),
    "a state that is a list": ("model", lambda c: c.update(state=[1, 2]), "damaged"),
    "a state of numbers": ("model", lambda c: c["state"].update({first(c["state"], "conv1"): 3.0}), "no plain tensor"),
    "a missing weight": ("model", lambda c: c["state"].pop("conv1.weight"), "lacks conv1.weight"),
    "a missing weight, pruned": ("pruned", lambda c: c["state"].pop("conv1.weight"), "lacks conv1.weight"),
    "one more weight": ("model", lambda c: c["state"].update(more=torch.zeros(3)), "more has no place"),
    "one more weight, pruned": ("pruned", lambda c: c["state"].update(more=torch.zeros(3)), "more has no place"),
    "a weight of another shape": ("model", lambda c: stem(c, torch.zeros(16, 3, 5, 5)), "conv1.weight is"),
    "a weight of another kind": ("model", lambda c: stem(c, torch.zeros(16, 3, 3, 3).long()), "int64"),
    "a weight that is no number": ("model", lambda c: c["state"]["conv1.weight"].fill_(torch.nan), "not finite"),
    "a sparse weight": ("model", lambda c: stem(c, torch.zeros(2, 2).to_sparse()), "no plain tensor"),
    "a weight without end": ("model", lambda c: stem(c, torch.zeros(1).expand(10**6, 10**6)), "more numbers"),
    "a weight on no device": ("model", lambda c: stem(c, torch.zeros(9, device="meta")), "damaged|readable"),
    "too many bits": ("pruned", lambda c: c["state"].update({"bits birds": torch.zeros(5000, dtype=torch.uint8)}), "bits"),
    "bits of another kind": ("pruned", lambda c: c["state"].update({"bits birds": torch.zeros(40)}), "bits"),
    "all bits": ("pruned", lambda c: c["state"]["bits birds"].fill_(255), "damaged"),
    "batch-norm": ("pruned", lambda c: c["state"].update({"batch-norm birds": torch.zeros(1)}), "batch-norm of birds"),
    "format": ("model", lambda c: c.update(format="ba2ps-2"), "something else"),
}


def widen(checkpoint, factor):
    """Claims a backbone of gigabytes, and holds bits for its switches."""
    with torch.device("meta"):
        net = ba2ps.WideResNet(10, factor, "s", 1)
    number = sum(layer.in_channels for layer in ba2ps.switched_layers(net).values())
    bits = torch.zeros((number + 7) // 8, dtype=torch.uint8)
    bits[0] = 1
    checkpoint.update(widen_factor=factor)
    checkpoint["state"].update({name: bits.clone() for name in checkpoint["state"] if name.startswith("bits")})


@pytest.fixture(scope="module")
def checkpoints(trained, tmp_path_factory):  # noqa: F811
    """{name: path} of one of each kind."""
    network, facts = ba2ps.load(trained / "model.pt")
    folder = tmp_path_factory.mktemp("checkpoints")
    ba2ps.save(folder / "pruned.pt", ba2ps.prune(network), **facts)
    ba2ps.save(folder / "dense.pt", ba2ps.prune(network, ["cars"]), **facts, dense={"round_to": 1, "channels_last": False})
    return {"model": trained / "model.pt", "backbone": trained / "backbone.pt", "pruned": folder / "pruned.pt",
            "dense": folder / "dense.pt"}


def memory():
    """Bytes of memory at the highest point so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("kind", TAMPERED)
def test_tampered_checkpoints_get_one_line(kind, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    which, change, said = TAMPERED[kind]
    checkpoint = torch.load(checkpoints[which], weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, "tampered.pt")
    before = memory()
    with pytest.raises(InputError, match=said) as error:
        ba2ps.load("tampered.pt")
    assert str(error.value).isprintable() and "tampered.pt" in str(error.value)
    assert memory() - before < 300e6 and os.listdir() == ["tampered.pt"]


def test_archives_that_could_run_code_or_unfold_are_refused_before_they_are_read(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "script.pt")
    torch.save(torch.load(checkpoints["model"], weights_only=True), "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(checkpoints["model"]) as source, zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Code()))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it is read"))
    for name, said in (("script.pt", "code is never run"), ("small.pt", "compressed"), ("old.pt", "not a zip file"),
                       ("pickle.pt", "not a zip file"), (".", "directory")):
        with pytest.raises(InputError, match=said):
            ba2ps.load(name)
    assert not os.path.exists("executed")


RECORDS = {  # what a checkpoint says of a domain, and what is wrong with it
    "mean": [[0.5, 0.5], [0.5] * 4, [0.5, 0.5, float("nan")], "grey", None, [0.5, 0.5, "0.5"]],
    "std": [[0.0, 0.2, 0.2], [-1.0, 1.0, 1.0], [0.2], [float("inf"), 1.0, 1.0], None],
    "category_ids": [[7, 7, 17], [7], ["7", "17"], None, [7, 17, 27, 37], 3],
    "classes": [["a"], "ab", [1, 2], None],
    "mirror": [None, 1, "yes"],
}


@pytest.mark.parametrize("key", RECORDS)
def test_what_a_checkpoint_says_of_its_domains_is_checked(key, checkpoints):
    network, facts = ba2ps.load(checkpoints["model"])
    ba2ps.check_facts("model.pt", network, facts)
    for value in RECORDS[key]:
        changed = copy.deepcopy(facts)
        changed["domains"]["birds"][key] = value
        with pytest.raises(InputError, match=f"model.pt.*birds has no usable {key}"):
            ba2ps.check_facts("model.pt", network, changed)


@pytest.mark.parametrize("key, value", [
    ("budget", float("nan")), ("budget", 0), ("budget", 1.1), ("budget", "0.5"), ("budget", True), ("image_size", 10**9),
    ("image_size", 0), ("image_size", 32.0), ("image_size", None), ("domains", {}), ("domains", []), ("domains", None),
    ("multipliers", 3)])
def test_every_script_checks_what_a_checkpoint_says_of_itself(key, value, checkpoints, data, tmp_path, capsys):  # noqa: F811
    network, facts = ba2ps.load(checkpoints["model"])
    ba2ps.save(tmp_path / "m.pt", network, **{**facts, key: value})
    for words in (["evaluate.py", tmp_path / "m.pt", "--data", data],
                  ["prune.py", tmp_path / "m.pt", "--out", tmp_path / "p.pt"],
                  ["train.py", "--start-from", tmp_path / "m.pt", "--data", data, *SMALL, "--out", tmp_path / "run"]):
        code, _, err = run(*words, capsys=capsys)
        assert code == 2 and err.count("\n") == 1 and "m.pt" in err, err
    assert os.listdir(tmp_path) == ["m.pt"]


@pytest.mark.parametrize("form", [{"round_to": 10**9, "channels_last": True}, {"round_to": 0, "channels_last": True}, 3,
                                  {"round_to": 8}, {"round_to": 8.0, "channels_last": True}])
def test_how_a_dense_network_is_built_is_checked(form, checkpoints, tmp_path):
    network, facts = ba2ps.load(checkpoints["dense"])
    ba2ps.save(tmp_path / "d.pt", network, **{**facts, "dense": form})
    with pytest.raises(InputError, match="d.pt is damaged"):
        ba2ps.load_dense(tmp_path / "d.pt")


# --- damaged at random ------------------------------------------------------------------------------------------------

ODD = [None, True, -1, 0, 1, 10**9, 10**30, 0.5, -0.5, float("nan"), float("inf"), "", "x", "../x", "a\nb", "\0", b"x",
       [], [[]], {}, {"a": {}}, [1, 2, 3]]


def containers(value):
    """Every dict and list in a tree of them that is not empty."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] * bool(inner) + [found for each in inner for found in containers(each)]


def tampered(tree, rng):
    """A copy of a tree of dicts, lists and tensors with one to three places changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        container = rng.choice(containers(tree) or [[0]])
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        value = container[key]
        way = rng.randrange(6)
        if isinstance(value, torch.Tensor) and way < 3:
            value = value.reshape(-1)
            container[key] = [value[:len(value) // 2], value.double(), value.expand(50, -1) if len(value) else value][way]
        elif way == 0:
            del container[key]
        elif way == 1 and isinstance(container, list):
            container.append(copy.deepcopy(value))
        elif way == 1 and isinstance(container, dict):
            container[rng.choice(["x", "", "a.b", "bits x", "../x", 3])] = container.pop(key)
        elif way == 2 and isinstance(value, (int, float)):
            container[key] = rng.choice([-value, value + 1, value * 1000, float(value), str(value)])
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def scrambled(content, rng):
    """Bytes cut off, changed, inserted, repeated or zeroed."""
    content, at, length = bytearray(content), rng.randrange(max(1, len(content))), rng.choice([1, 4, 64, 1000])
    way = rng.randrange(5)
    if way == 0:
        del content[at:]
    elif way == 1:
        for _ in range(length):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif way == 2:
        content[at:at] = rng.randbytes(length)
    elif way == 3:
        content[at:at] = content[:length]
    else:
        content[at:at + length] = bytes(len(content[at:at + length]))
    return bytes(content)


class Checked:
    """Runs a script, and holds its answer against the promise: it works, or says one line, and leaves nothing by halves."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys, self.codes = folder, capsys, []

    def __call__(self, script, *words, out):
        def late(number, frame):
            raise TimeoutError(f"{script} hangs")
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, late)
            signal.alarm(60)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            code, _, err = run(script, *words, capsys=self.capsys)
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
        assert code in (0, 2), (script, code)
        written = list(out.rglob("*")) if out.is_dir() else [out] if out.exists() else []
        if code == 2:
            assert err.count("\n") == 1 and err.startswith(f"{script}: ") and err[:-1].isprintable(), err
            assert not [path for path in written if path.suffix in (".pt", ".json")], err
            assert not [w for w in seen if not issubclass(w.category, DeprecationWarning)], [str(w.message) for w in seen]
        assert not list(self.folder.rglob("*.part"))
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        self.codes.append(code)


@pytest.fixture
def checked(tmp_path, capsys):
    before = memory()
    check = Checked(tmp_path, capsys)
    yield check
    assert check.codes.count(2) > len(check.codes) / 4 and memory() - before < 1e9


@pytest.mark.parametrize("seed", range(3))
def test_damaged_checkpoints(seed, checkpoints, data, tmp_path, checked, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    rng, file = random.Random(seed), tmp_path / "c.pt"
    trees = {name: torch.load(path, weights_only=True) for name, path in checkpoints.items()}
    for case in range(45):
        which = rng.choice(list(trees))
        if case % 3:
            torch.save(tampered(trees[which], rng), file)
        else:
            file.write_bytes(scrambled(checkpoints[which].read_bytes(), rng))
        script = rng.choice(["evaluate.py", "prune.py", "train.py"])
        if script == "evaluate.py":
            checked(script, file, "--data", data, "--crops", "1", "--workers", "0", "--device", "cpu",
                    "--json", tmp_path / "out.json", out=tmp_path / "out.json")
        elif script == "prune.py":
            checked(script, file, "--out", tmp_path / "out.pt", "--no-latency", out=tmp_path / "out.pt")
        else:
            checked(script, "--backbone" if which == "backbone" else "--start-from", file, "--data", data, *SMALL,
                    "--epochs", "0", "--bn-as-trained", "--out", tmp_path / "out", out=tmp_path / "out")
        if case % 5 == 0:
            try:
                ba2ps.load_dense(file)
            except InputError as error:
                assert str(error).isprintable()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("what", ["annotations", "images"])
def test_damaged_data(what, trained, tmp_path, checked):  # noqa: F811
    rng, root = random.Random(what), tmp_path / "root"
    for i, domain in enumerate(["animals", "birds", "cars"]):
        write_domain(root, domain, ("one", "two", "three")[:2 + i % 2], 2, 10_000 * i, seed=i)
    for case in range(50):
        split = rng.choice(["train", "val"])
        if what == "images":
            file = rng.choice(sorted((root / "data/birds" / split).glob("*/*")))
        else:
            file = root / f"annotations/birds_{split}.json"
        content = file.read_bytes()
        if what == "annotations" and case % 4:
            file.write_text(json.dumps(tampered(json.loads(content), rng), default=str))
        else:
            file.write_bytes(scrambled(content, rng))
        extra = rng.choice([[], ["--skip-broken"]])
        if split == "val":
            checked("evaluate.py", trained / "model.pt", "--data", root, "--crops", "1", "--workers", "0", "--device", "cpu",
                    "--results", tmp_path / "out.json", *extra, out=tmp_path / "out.json")
        else:
            checked("train.py", "--backbone", trained / "backbone.pt", "--data", root, *SMALL, "--epochs", "0",
                    "--bn-as-trained", "--out", tmp_path / "out", *extra, out=tmp_path / "out")
        file.write_bytes(content)
