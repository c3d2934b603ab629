# SPDX-License-Identifier: MIT
"""evaluate.py: scores, crops, images, reports and bad input."""
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import ba2ps
import evaluate
from ba2ps import InputError

TEN = list(evaluate.FINE_TUNED)
OURS = [56.872, 33.633, 67.890, 95.281, 44.894, 98.147, 75.053, 87.381, 96.074, 43.008]
FACTS = {"budget": 0.5, "budget_of": "layers", "image_size": 32, "arguments": {}}


def save_noise(path, size=(40, 36)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path, "PNG")


@pytest.fixture
def folders(tmp_path):
    """Three grey images in every DOMAIN/SPLIT/CLASS, lighter from class to class."""
    for k, kind in enumerate(["cat", "dog", "emu"]):
        for split in ("train", "val", "test"):
            home = tmp_path / f"root/animals/{split}/{kind}"
            home.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 36), (40 + 80 * k + i,) * 3).save(home / f"{i}.png")
    return tmp_path / "root"


@pytest.fixture
def annotated(folders):
    """The same with annotations, of which test has no labels; ids in another order than names."""
    ids = {"dog": 27, "cat": 17, "emu": 7}
    (folders / "annotations").mkdir()
    for split in ("train", "val", "test"):
        rows = [{"id": number, "name": name} for name, number in ids.items()]
        content = {"images": [], "annotations": [], "categories": rows}
        paths = sorted(folders.glob(f"animals/{split}/*/*"), reverse=True)
        for k, path in enumerate(paths, 100):
            name = path.relative_to(folders).as_posix()
            content["images"].append({"id": k, "file_name": name})
            content["annotations"].append({"image_id": k, "category_id": ids[path.parent.name]})
        if split == "test":
            del content["annotations"]
            split = "test_stripped"
        (folders / f"annotations/animals_{split}.json").write_text(json.dumps(content))
    return folders


def images_of(root, *splits, size=32, **options):
    return evaluate.Images(root, "animals", splits or ["train"], size, **options)


def pixels_of(images):
    items = [images[i] for i in range(len(images))]
    return [(tuple(pixels.shape), pixels.numpy().tobytes(), label) for pixels, label in items]


def by_hand(classes=3, width=1, source="shapes", **used):
    """A network in which domain d uses the channels used[d](C) of a layer of C."""
    backbone = ba2ps.WideResNet(10, width, classes)
    network = ba2ps.MultiDomain(backbone, dict.fromkeys(used, 3), source, 32)
    for domain, chosen in used.items():
        rows = []
        for layer in ba2ps.switched_layers(network).values():
            rows.append(torch.full((layer.in_channels,), -1.0))
            rows[-1][list(chosen(layer.in_channels))] = 1.0
        network.switches[domain].data = torch.cat(rows)
    return network.eval()


def saved(path, network, data=None):
    """`path`, of a checkpoint with the records of the images in `data`, or made up."""
    records = {}
    for domain in network.classes:
        records[domain] = {"classes": [*"abc"], "category_ids": [1, 2, 3], "mean": [.5] * 3,
                           "std": [.3] * 3, "mirror": False}
        if data:
            records[domain] = evaluate.Images(data, domain, ["train"], 32).decode().record
    arguments = {"data": str(data), "cache": f"{path}s"}
    ba2ps.save(path, network, **{**FACTS, "domains": records, "arguments": arguments})
    return path


def test_scores_of_the_paper(monkeypatch):
    used = dict.fromkeys(TEN[1:], lambda width: range(width // 4))
    network = by_hand(source=TEN[0], **used)
    usage = dict.fromkeys(TEN[1:], 0.238)  # Table 2
    monkeypatch.setattr(ba2ps, "usage", lambda *rest, **more: usage)
    monkeypatch.setattr(ba2ps, "params", lambda *rest: 0.531)
    report = evaluate.measure(network, FACTS, dict(zip(TEN, OURS)), "test")
    assert report["s_score"] == pytest.approx(1942, abs=0.5)  # Table 1
    assert report["s_o"] == pytest.approx(8159, rel=2e-3)  # the paper divides rounded figures
    assert report["s_p"] == pytest.approx(3657, rel=2e-3)
    assert report["mean_accuracy"] == pytest.approx(sum(OURS[1:]) / 9)
    assert report["mean_accuracy_with_source"] == pytest.approx(69.823, abs=1e-3)  # Table 1
    assert report["complexity_with_source"] == pytest.approx((9 * 0.238 + 1) / 10)
    alone = evaluate.measure(network, FACTS, dict(zip(TEN[1:], OURS[1:])), "test")
    assert alone["s_score"] < 1800
    assert evaluate.measure(network, FACTS, dict(zip(TEN, OURS)), "test", {})["s_score"] is None
    for more, over in ((-1e-4, TEN[1:]), (-1e-7, [])):  # by a switch, not by rounding
        facts = {**FACTS, "budget": 0.238 + more}
        assert evaluate.measure(network, facts, {}, "test")["over_budget"] == over
    assert evaluate.s_score({"a": 70.0, "b": 100.0}, {"a": 90.0, "b": 90.0}) == 1000


class Given(evaluate.Images):
    def __init__(self, mirror=True, augment=None):
        self.domain = "given"
        self.crop = 32
        self.augment = augment
        self.channels = 3
        self.record = {"mean": [.1, .2, .3], "std": [.5, .6, .7], "mirror": mirror}
        sizes = [(36, 36), (36, 41), (47, 36), (36, 90), (37, 39)] * 2
        self.paths = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
        self.places = [(image.flatten(), 0, *image.shape[1:]) for image in self.paths]
        self.labels = list(range(10))


def normalised(crop):
    rows = zip(crop.float(), (.1, .2, .3), (.5, .6, .7))
    return torch.stack([(row / 255 - mean) / std for row, mean, std in rows])


@pytest.mark.parametrize("crops, mirror", [(None, True), (None, False), (1, True), (10, False)])
def test_predictions_are_means_over_torchvisions_crops(crops, mirror):
    class Network(torch.nn.Module):
        def forward(self, x, domain):
            assert domain == "animals" and not self.training
            return 3 * x[:, :, 0, 0] + x[:, :, 5, 9]

    images = Given(mirror)
    counted = []
    got = evaluate.predict(Network(), "animals", images, crops, 4, progress=counted.append)
    for image, probabilities in zip(images.paths, got, strict=True):
        cut = {1: [TF.center_crop(image, 32)], 5: TF.five_crop(image, 32),
               10: TF.ten_crop(image, 32)}[crops or (10 if mirror else 5)]
        x = torch.stack([normalised(crop) for crop in cut])
        expected = Network().eval()(x, "animals").softmax(1).mean(0)
        torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=0)
    images.labels = [y + (i > 2) for i, y in enumerate(got.argmax(1).tolist())]
    assert counted == [4, 4, 2] and evaluate.accuracy(got, images) == pytest.approx(30)


@pytest.mark.parametrize("mirror", [True, False])
def test_random_crops_are_those_cut_one_by_one(mirror):
    images = Given(mirror)
    one, *orders = [torch.Generator().manual_seed(5) for _ in range(4)]
    for indices in (torch.arange(10), [7, 3, 3]):
        expected = [torch.zeros(3, 32, 32)]
        for i, numbers in zip(indices, torch.rand(len(indices), 3, generator=one).tolist()):
            image, _ = images[int(i)]
            top = int(numbers[0] * (image.shape[1] - 32 + 1))
            left = int(numbers[1] * (image.shape[2] - 32 + 1))
            crop = image[:, top:top + 32, left:left + 32]
            expected.append(normalised(crop.flip(2) if mirror and numbers[2] < 0.5 else crop))
        for order, own in zip(orders, (slice(None), slice(2, 10), slice(1, 1))):
            x, y = images.batch(indices, order, "cpu", own)
            assert torch.equal(x, torch.stack(expected)[1:][own])
            assert y.tolist() == [int(i) for i in indices][own] and y.dtype == torch.long
            assert order.get_state().equal(one.get_state())


def test_augment_replaces_crop_and_mirror():
    def noisy(image, generator):
        image //= 2  # must not reach the cache
        noise = torch.randint(0, 9, (3, 32, 32), dtype=torch.uint8, generator=generator)
        return image[:, 2:34, 1:33] + noise

    images = Given(augment=noisy)
    one, two, three = [torch.Generator().manual_seed(5) for _ in range(3)]
    x, _ = images.batch([4, 4], one)
    assert torch.equal(x[1:], images.batch([4, 4], two, own=slice(1, 2))[0])  # another process
    Given().batch([4, 4], three)
    assert one.get_state().equal(three.get_state()) and not x[0].equal(x[1])
    noise = x[0] - normalised(images.paths[4][:, 2:34, 1:33] // 2)
    assert (noise > 0).float().mean() > 0.8 and noise.max() < 0.1
    for wrong in (images.paths[0][:, :32, :32] / 255, images.paths[0][:1, :32, :32]):
        with pytest.raises(InputError, match="augment of given gives torch"):
            Given(augment=lambda *rest: wrong).batch([0], one)


def test_labels_come_from_category_ids(annotated, capsys, monkeypatch):
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="ascii": read(path, encoding))
    path = annotated / "annotations/animals_train.json"
    path.write_text(path.read_text().replace('"emu"', '"straße"'), "utf-8")  # in any locale
    images = images_of(annotated, "train", "val")
    assert images.record["classes"] == ["straße", "cat", "dog"]
    assert images.record["category_ids"] == [7, 17, 27]
    assert images.labelled and images.ids == [*range(100, 109)] * 2
    for i in range(18):
        pixels, label = images[i]
        assert (int(pixels[0, 0, 0]) - 40) // 80 == [2, 0, 1][label]
    assert capsys.readouterr().out == "animals train: 9 images\nanimals val: 9 images\n"
    test = images_of(annotated, "test", record=images.record)
    assert not test.labelled and test[8][1] == -1
    with pytest.raises(InputError, match="animals_val.json: the categories are not those"):
        images_of(annotated, "val", record={**images.record, "category_ids": [7, 17, 28]})


@pytest.mark.parametrize("change, said", [
    (lambda c: c["images"].clear(), "no images"),
    (lambda c: c["annotations"].pop(), "train/cat/0.png: no category"),
    (lambda c: c["images"].append(c["images"][0]), "image's id twice"),
    (lambda c: c["categories"].append({"id": 7, "name": "again"}), "category's id twice"),
    (lambda c: c["annotations"][0].update(category_id=99), "train/emu/2.png: no category"),
    (lambda c: c["annotations"].append({"image_id": 100, "category_id": 17}),
     "train/emu/2.png: two categories"),
    (lambda c: c["images"][0].update(file_name="../a.png"), "a.png: lies outside"),
    (lambda c: c["images"][0].update(file_name="animals/gone.png"), "animals/gone.png is missing")])
def test_unusable_annotations_are_named(change, said, annotated):
    path = annotated / "annotations/animals_train.json"
    content = json.loads(path.read_text())
    content["annotations"].append(content["annotations"][0])  # no contradiction
    path.write_text("\ufeff" + json.dumps(content), "utf-8")  # as Windows begins a file
    assert len(images_of(annotated)) == 9
    content["annotations"].pop()
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        images_of(annotated)


def test_folders_have_the_classes_of_train(folders):
    images = images_of(folders)
    assert images.record["classes"] == ["cat", "dog", "emu"]
    assert images.record["category_ids"] == [0, 1, 2]
    assert images.ids == [path.removeprefix(f"{folders}/") for path in images.paths]
    shutil.rmtree(folders / "animals/test", ignore_errors=True)
    shutil.copytree(folders / "animals/train/dog", folders / "animals/test")
    test = images_of(folders, "test")  # without class folders
    assert not test.labelled and len(test) == len(os.listdir(folders / "animals/test"))
    shutil.rmtree(folders / "animals/val/cat")
    assert images_of(folders, "val").labels == [1, 1, 1, 2, 2, 2]
    with pytest.raises(InputError, match="animals/val: the categories are not those of training"):
        images_of(folders, "val", record={**images.record, "classes": [*"abc"]})
    (folders / "animals/val/dog").rename(folders / "animals/val/gnu")
    with pytest.raises(InputError, match="val/gnu/0.png: no category gnu"):
        images_of(folders, "val")
    with pytest.raises(InputError, match="root/fish/val is missing"):
        evaluate.Images(folders, "fish", ["val"], 32)
    with pytest.raises(InputError, match="no has no domains"):
        evaluate.domains_of(folders / "no")
    assert evaluate.domains_of(folders) == ["animals"]


def test_one_line_says_what_is_left_out(folders, capsys):
    home = folders / "animals/train"
    for name in ("cat/a.gif", "cat/b.gif", "cat/.x.png", "y.png"):
        (home / name).write_text("no image")
    (home / ".checkpoints").mkdir()
    for path in (home / "dog").iterdir():
        path.unlink()
    for _ in range(2):  # also when it is in the cache
        assert images_of(folders).decode().labels == [0, 0, 0, 2, 2, 2]
        line, = capsys.readouterr().out.splitlines()
        assert line.startswith("animals train: 6 images; ")
        assert {*line.split("; ")[1:]} == {
            "2 left out: no image by its ending .gif", "2 left out: hidden",
            "1 left out: outside the class folders", "1 classes without images: 'dog'"}
    images_of(folders, "val").decode()
    images_of(folders, "val")
    assert capsys.readouterr().out == "animals val: 9 images\n"  # once


def test_a_real_path_counts_once(folders, capsys):
    home = folders / "animals/train"
    expected = images_of(folders).ids
    (home / "emu").rename(folders / "elsewhere")
    (home / "emu").symlink_to(folders / "elsewhere")
    for name, target in (("up", home), ("around", folders), ("here", home / "cat")):
        (home / "cat" / name).symlink_to(target)
    (folders / "elsewhere/back").symlink_to(home)
    (home / "dog/again.png").symlink_to(home / "dog/0.png")
    capsys.readouterr()
    assert images_of(folders).ids == expected
    out = capsys.readouterr().out
    assert "4 left out: links to a folder above" in out and "1 left out: linked twice" in out
    (home / "emu/z.png").symlink_to(home / "dog/0.png")
    with pytest.raises(InputError, match="train/emu/z.png: two categories, dog and emu"):
        images_of(folders)


def test_without_val_a_tenth_is_held_out(folders, capsys):
    home = folders / "animals/train"
    shutil.rmtree(home.parent / "val")
    for i in range(230):
        save_noise(home / f"cat/{i}.png", (3, 3))
    train = images_of(folders).ids
    val = images_of(folders, "val").ids
    assert f"{len(train)} left out: in train" in capsys.readouterr().out
    assert images_of(folders, "train", "val").ids == train + val
    assert len({*train, *val}) == len(train + val) == 236
    assert 10 <= sum("/cat/" in name for name in val) <= 35
    for k in range(20):
        assert 1 <= len(evaluate.held_out([f"{k}/{i}" for i in range(5)])) <= 4
    for i in range(0, 230, 9):
        (home / f"cat/{i}.png").unlink()
    assert {*images_of(folders).ids} < {*train} and {*images_of(folders, "val").ids} <= {*val}


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK"])
def test_images_are_read_as_they_are_stored(mode, folders):
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown turned by 90 degrees
    image = Image.effect_noise((100, 51), 60).convert("RGB").convert(mode)
    plain = image.convert("RGB")
    if mode in ("LA", "RGBA"):
        image.putalpha(0)  # what is transparent keeps its colour
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    path = images_of(folders).paths[4]
    image.save(path, "JPEG" if mode == "CMYK" else "PNG", exif=exif, **options)
    if mode == "CMYK":
        plain = Image.open(path).convert("RGB")
    expected = TF.pil_to_tensor(TF.resize(plain, 72))  # (3, 72, 141)
    assert torch.equal(images_of(folders, size=64)[4][0], expected)


@pytest.mark.parametrize("channels", [3, 1])
def test_sixteen_bits_are_scaled(channels, folders):
    path = images_of(folders).paths[4]
    values = np.arange(36 * 40).reshape(36, 40) * 45
    Image.fromarray(values.astype(np.uint16)).save(path, "PNG")
    pixels, _ = images_of(folders, channels=channels)[4]
    np.testing.assert_array_equal(pixels, np.stack([values >> 8] * channels))
    for kind in (np.int32, np.float32):
        Image.fromarray(values.astype(kind)).save(path, "TIFF")
        with pytest.raises(InputError, match=f"{path}: mode [IF], not of 8 bits"):
            images_of(folders, channels=channels).decode()


def test_grey_images_of_one_channel(folders, monkeypatch):
    save_noise(images_of(folders).paths[0])
    images = images_of(folders, channels=1)
    expected = np.asarray(Image.open(images.paths[0]).convert("L"))
    np.testing.assert_array_equal(images[0][0], expected[None])
    record = images.record
    assert len(record["mean"]) == len(record["std"]) == 1
    images = images_of(folders, "val", record=record)  # which knows
    assert images.batch([0, 1], torch.Generator())[0].shape == (2, 1, 32, 32)
    network = SimpleNamespace(channels=1, classes={"animals": 3})
    facts = {"domains": {"animals": record}}
    monkeypatch.setattr(ba2ps, "load", lambda path: (network, facts))
    assert evaluate.load_model("grey.pt")[1]["budget_of"] == "layers"


def test_domains_measure_their_channel_statistics(folders):
    paths = images_of(folders).paths
    save_noise(paths[0])
    record = images_of(folders).decode().record
    pixels = [np.asarray(Image.open(path)).reshape(-1, 3) for path in paths]
    values = np.concatenate(pixels) / 255
    np.testing.assert_allclose(record["mean"], values.mean(0), atol=1e-6)
    np.testing.assert_allclose(record["std"], values.std(0), atol=1e-6)
    images = images_of(folders, "val", record=record, no_mirror=["animals"])
    assert images.record == {**record, "mirror": False}


@pytest.mark.parametrize("side, seconds", [(36, 8), (40, 7)])
def test_what_is_decoded_is_kept_until_its_images_change(folders, side, seconds, monkeypatch):
    path = images_of(folders).paths[2]
    Image.new("RGB", (36, 36)).save(path, "BMP")
    os.utime(path, (7, 7))
    before = pixels_of(images_of(folders))
    file, = (folders / "cache").iterdir()
    assert re.fullmatch("animals-train-36x3-[0-9a-f]{16}.pixels", file.name)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "read_image", lambda *rest, **options: pytest.fail("decoded"))
        images = images_of(folders, "train", "train")  # a file for each split
        assert pixels_of(images) == before + before
    with open(file, "r+b") as mapped:
        mapped.write(b"\x07")
    assert images[0][0][0, 0, 0] == 7
    images_of(folders, size=64).decode()
    assert file.exists()
    Image.new("RGB", (36, side), (9, 2, 3)).save(path, "BMP")
    os.utime(path, (seconds, seconds))
    after = pixels_of(images_of(folders))
    assert after == pixels_of(images_of(folders, cache=folders / "new")) != before
    assert not file.exists() and list((folders / "new").glob("root-*"))
    [kept] = (folders / "new").rglob("*.pixels")
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(ba2ps.InputError, match=r"pixels: .*remove it"):
        images_of(folders, cache=folders / "new").decode()


def test_workers_give_the_same_pixels(tmp_path, capsys):
    root = tmp_path / "root"
    for i in range(260):  # enough for a worker process
        save_noise(root / f"animals/train/cat/{i:03}.png", (40 - i % 5, 36 + i % 3))
    (root / "animals/val").mkdir()
    before = torch.get_rng_state()
    one, other = [pixels_of(images_of(root, cache=tmp_path / f"{n}").decode(n)) for n in (0, 1)]
    assert one == other and len(one) == 260 and before.equal(torch.get_rng_state())
    path = root / "animals/train/cat/077.png"
    path.write_bytes(b"")
    with pytest.raises(InputError) as error:
        images_of(root).decode(1)
    with pytest.raises(SystemExit):
        evaluate.stop(error.value)
    assert capsys.readouterr().err.split(": ")[1] == f"{path} cannot be read"


@pytest.mark.parametrize("odd", [None, True, -1, 10**30, "", "a\nb", "\0", "\ud800", [], {}])
@pytest.mark.parametrize("part, key", [("images", "file_name"), ("annotations", "category_id")])
def test_odd_values_are_refused_in_one_line(part, key, odd, annotated, capsys):
    path = annotated / "annotations/animals_train.json"
    content = json.loads(path.read_text())
    content[part][0][key] = odd
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        images_of(annotated).decode()
    with pytest.raises(SystemExit, match="2"):
        evaluate.stop(error.value)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable() and str(annotated) in said


@pytest.fixture(scope="module")
def model(decathlon, tmp_path_factory):
    torch.manual_seed(0)
    network = by_hand(5, strokes=lambda c: range(c // 4, c), textures=lambda c: range(c // 2))
    return saved(tmp_path_factory.mktemp("model") / "model.pt", network, decathlon)


def report_of(*words):
    words = ["evaluate.py", *map(str, words), "--json", "r.json", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        evaluate.main()
    return json.loads(Path("r.json").read_text("utf-8"))


def test_a_report_is_that_of_its_parts(model, decathlon, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network, facts = evaluate.load_model(model)
    guesses = {}
    right = {}
    for domain, record in facts["domains"].items():
        images = evaluate.Images(decathlon, domain, ["val"], 32, record)
        labels = evaluate.predict(network, domain, images, 10).argmax(1).tolist()
        for number, label in zip(images.ids, labels):
            guesses[number] = record["category_ids"][label]
        right[domain] = 100 * np.mean(np.equal(labels, images.labels))
    Path("base.json").write_text('{"strokes": 50, "textures": 50}')
    report = report_of(model, "--results", "results.json", "--baseline", "base.json")
    out = capsys.readouterr().out
    assert "off, mean over layers" in out and "usage: share of layers that is on" in out
    row = [right["strokes"], .75, .25, ba2ps.usage(network, "macs")["strokes"]]
    assert [*report["domains"]["strokes"].values()] == pytest.approx(row)
    assert report["source_accuracy"] == pytest.approx(right["shapes"])
    del right["shapes"]
    assert report["mean_accuracy"] == pytest.approx(sum(right.values()) / 2)
    assert report["s_score"] == pytest.approx(sum(a**2 for a in right.values()) / 10)
    assert report["over_budget"] == ["strokes"] and report["params"] == ba2ps.params(network)
    assert list(Path(f"{model}s").glob("data-*"))  # trained with this cache
    rows = json.loads(Path("results.json").read_text())
    assert {row["image_id"]: row["category_id"] for row in rows} == guesses
    test = report_of(model, "--split", "test", "--skip-source", "--data", decathlon)
    assert test["mean_accuracy"] is None


def test_table_3_counted_by_hand(tmp_path, monkeypatch):
    """In sixteenths of a layer's channels they use {0..3}, {2..9} and {5..14}."""
    monkeypatch.chdir(tmp_path)
    networks = {
        "a": by_hand(x=lambda c: range(c // 8), y=lambda c: range(c // 8, c // 4)),
        "b": by_hand(x=lambda c: range(c // 8, 10 * c // 16)),
        "c": by_hand(y=lambda c: range(5 * c // 16, 15 * c // 16), z=lambda c: [c // 2])}
    expected = {"a": 12, "b": 8, "c": 6, "a & b": 6, "a & c": 2, "b & c": 3, "a & b & c": 1}
    networks["b"] = ba2ps.prune(networks["b"])
    for name, network in networks.items():
        saved(name, network)
    rows = report_of("--compare", *networks)
    assert {row["models"]: 16 * row["shared_sparsity"] for row in rows} == expected
    assert {row["max_shared_sparsity"] for row in rows} == {1 - FACTS["budget"]}


def test_a_picture_shows_shares_of_channels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = by_hand(x=lambda c: range(c // 2), y=lambda c: range(c // 4, c // 2))
    words = ["evaluate.py", str(saved("m.pt", ba2ps.prune(network))), "--picture", "p.png"]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()  # its images are nowhere: nothing is evaluated
    pixels = np.asarray(Image.open("p.png"))[:, 200:]
    colours = (8, 48, 107), (208, 208, 208), (230, 159, 0)  # on, off, off in all
    areas = [(pixels == colour).all(2).mean() for colour in colours]
    np.testing.assert_allclose(np.divide(areas, sum(areas)), [3 / 8, 1 / 8, 1 / 2], atol=0.01)


@pytest.mark.parametrize("words, named", [
    ("--compare MODEL", "--compare and several"), ("bare.pt", "bare.pt"),
    ("--compare MODEL wide.pt", "WRN-10-1 and WRN-10-2"),
    ("--compare MODEL wide.pt --picture p.png", "--picture does nothing"),
    ("gone.pt", "--data"), ("odd.pt", "record of strokes"),
    ("MODEL --baseline full.json", "full.json"), ("MODEL --results no/r", "no/r"),
    ("MODEL --crops 2", "--crops"), ("MODEL --data no", "no images in no")])
def test_bad_flags_end_in_one_line(words, named, model, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, facts = ba2ps.load(model)
    saved("bare.pt", by_hand())
    saved("wide.pt", by_hand(width=2, strokes=range))
    ba2ps.save("gone.pt", network, **{**facts, "arguments": {"data": "nowhere"}})
    Path("full.json").write_text('{"strokes": 100}')
    domains = {**facts["domains"], "strokes": {**facts["domains"]["strokes"], "std": [1, 0, 1]}}
    ba2ps.save("odd.pt", network, **{**facts, "domains": domains})
    before = set(tmp_path.iterdir())
    words = [model if word == "MODEL" else word for word in words.split()]
    refused("evaluate.py", *words, named=named)
    assert set(tmp_path.iterdir()) == before
