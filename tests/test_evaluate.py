# SPDX-License-Identifier: MIT
"""evaluate.py: published scores, files, the cache, crops, what is reported and drawn, and bad input."""
import functools
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import ba2ps
import evaluate
import toy
from ba2ps import InputError

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
TEN = "imagenet12 aircraft cifar100 daimlerpedcls dtd gtsrb vgg-flowers omniglot svhn ucf101".split()
OURS = {  # Table 1: accuracies on test in the order of TEN, mean, S; Table 2: complexity, params, S_O, S_P
    1.00: ([56.872, 37.294, 80.200, 95.046, 57.926, 98.599, 84.615, 83.820, 95.993, 45.837],
           73.620, 2512, 0.837, 1.03, 3001, 2438),
    0.75: ([56.872, 42.574, 75.280, 94.959, 56.064, 98.551, 82.810, 87.234, 95.970, 44.674],
           73.499, 2444, 0.645, 0.921, 3789, 2654),
    0.50: ([56.872, 42.094, 73.690, 96.760, 51.277, 98.678, 81.444, 87.123, 96.047, 45.414],
           72.940, 2552, 0.447, 0.783, 5709, 3259),
    0.25: ([56.872, 33.633, 67.890, 95.281, 44.894, 98.147, 75.053, 87.381, 96.074, 43.008],
           69.823, 1942, 0.238, 0.531, 8159, 3657)}
FACTS = {"image_size": 32, "budget": 0.5, "budget_of": "layers", "arguments": {}}
ODD = [None, True, -1, 0, 1.5, 10**30, float("nan"), "", "x", "../x", "a\nb", "\0", "\ud800", [], {}, [1, 2]]


def draw(root, counts=(2, 2, 2)):
    """A domain whose classes can be read off its grey images; ids are not in the order of folders."""
    def grey(rng, label, fixed):
        return Image.new("RGB", (72, 72), (40 + 80 * label,) * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "TOY", {"animals": (grey, 0, ["cat", "dog", "emu"], counts)})
        toy.draw_toy(root)
    for path in (root / "annotations").iterdir():
        path.write_text(re.sub(r"\b100000(.)\b", lambda m: str((7, 17, 27)[int(m[1]) % 3]), path.read_text()))
    return root


@pytest.fixture
def root(tmp_path):
    return draw(tmp_path / "root")


def images_of(root, *splits, size=32, **options):
    return evaluate.Images(root, "animals", splits or ["train"], size, **options)


def pixels_of(images):
    return [(*images[i][0].shape, images[i][0].numpy().tobytes(), images[i][1]) for i in range(len(images))]


def edit(root, change):
    path = root / "annotations/animals_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def by_hand(classes=3, source="shapes", widen_factor=1, **used):
    """A network in which domain d uses the channels used[d](C) of a layer of C, its switches +-1."""
    network = ba2ps.WideResNet(10, widen_factor, source, classes)
    for domain, chosen in used.items():
        network.add_domain(domain, 3)
        for layer in ba2ps.switched_layers(network).values():
            layer.switches[domain].data.fill_(-1)[list(chosen(layer.in_channels))] = 1
    return network


@pytest.mark.parametrize("budget", OURS)
def test_scores_of_the_papers_rows(budget, monkeypatch):
    accuracies, mean, s, complexity, params, s_o, s_p = OURS[budget]
    network = by_hand(source=TEN[0], **{domain: lambda c: range(c // 2) for domain in TEN[1:]})
    monkeypatch.setattr(ba2ps, "usage", lambda *rest, **domains: dict.fromkeys(TEN[1:], complexity))
    monkeypatch.setattr(ba2ps, "params", lambda network: params)
    report = evaluate.measure(network, FACTS, dict(zip(TEN, accuracies)), "test")
    assert report["s_score"] == pytest.approx(s, abs=0.5)
    # the paper divides rounded figures; 1942 / 0.238 and 2512 / 1.03 are known to no more than three digits
    assert report["s_o"] == pytest.approx(s_o, rel=2e-3) and report["s_p"] == pytest.approx(s_p, rel=2e-3)
    assert report["complexity"] == pytest.approx(complexity)
    assert report["complexity_with_source"] == pytest.approx(0.9 * complexity + 0.1)
    assert report["mean_accuracy_with_source"] == pytest.approx(mean, abs=1e-3)
    assert report["mean_accuracy"] == pytest.approx(sum(accuracies[1:]) / 9)
    alone = evaluate.measure(network, FACTS, dict(zip(TEN[1:], accuracies[1:])), "test")
    assert alone["s_score"] < s - 200 and alone["mean_accuracy_with_source"] is None
    for more, over in ((-1e-4, TEN[1:]), (-1e-7, []), (1e-4, [])):  # by a switch, not by rounding
        report = evaluate.measure(network, FACTS | {"budget": min(1, complexity + more)}, {}, "test")
        assert report["over_budget"] == over
    assert evaluate.s_score({"a": 70.0, "b": 100.0}, {"a": 90.0, "b": 90.0}) == pytest.approx(1000)


def test_labels_come_from_category_ids_whatever_the_folders_and_the_order(root):
    images = images_of(root, "train", "val")
    assert images.record["classes"] == ["emu", "cat", "dog"] and images.record["category_ids"] == [7, 17, 27]
    assert images.labelled and len(images) == 12
    for i, path in enumerate(images.paths):
        assert (images[i][0][0, 0, 0] - 30) // 80 == [2, 0, 1][images[i][1]] and str(images.ids[i]) in path
    test = images_of(root, "test", record=images.record)
    assert not test.labelled and test[0][1] == -1 and len(test.ids) == 6
    with pytest.raises(InputError, match="animals_val.json: the categories are not those"):
        images_of(root, "val", record={**images.record, "category_ids": [7, 17, 28]})


def in_folders(root, counts):
    """A root of folders of linked images, those of draw(root, counts)."""
    folders = draw(root, counts).with_name("folders")
    for images in (images_of(root, split) for split in ("train", "val", "test")):
        for path, label in zip(images.paths, images.labels):
            kind = images.record["classes"][label] if images.labelled else ""
            place = folders / "animals" / path.split("/")[-3 if kind else -2] / kind
            place.mkdir(parents=True, exist_ok=True)
            (place / Path(path).name).symlink_to(path)
    shutil.move(folders / "animals/train/emu", root / "emu")
    (folders / "animals/train/emu").symlink_to(root / "emu")
    for name in ("cat/.x.jpg", "cat/notes.txt", ".checkpoints/x.jpg"):
        (folders / "animals/train" / name).parent.mkdir(exist_ok=True)
        (folders / "animals/train" / name).write_text("no image")
    return folders


def test_folders_give_the_images_of_annotations_with_classes_by_name(root, tmp_path):
    folders = in_folders(tmp_path / "other", (2, 2, 2))
    def known(images):
        return {Path(path).name: (pixels, images.labelled and images.record["classes"][label])
                for path, (*pixels, label) in zip(images.paths, pixels_of(images))}
    for split in ("train", "val", "test"):
        images = images_of(folders, split)
        assert known(images) == known(images_of(tmp_path / "other", split)) and len(images) == 6
        assert images.record | {"classes": ["cat", "dog", "emu"], "category_ids": [0, 1, 2]} == images.record
        assert images.ids == [path.removeprefix(f"{folders}/") for path in images.paths]
    with pytest.raises(InputError, match="animals/val: the categories are not those of training"):
        images_of(folders, "val", record={**images.record, "classes": ["cat", "dog", "fox"]})
    shutil.move(folders / "animals/val/emu", folders / "animals/test/emu")  # with class folders
    assert images_of(folders, "test").labels == [2, 2] and images_of(folders, "val").labels == [0, 0, 1, 1]
    assert evaluate.domains_of(folders) == evaluate.domains_of(root) == ["animals"]
    shutil.move(folders / "animals/val/dog", folders / "animals/val/gnu")
    for place, domain, said in (
            (folders, "animals", "val/gnu/.*: no category"), (folders, "fish", "folders/fish/val is missing"),
            (tmp_path / "no", "animals", "no is no directory: give one with annotations/DOMAIN_train.json")):
        with pytest.raises(InputError, match=said):
            evaluate.Images(place, domain, ["val"], 32)


def test_without_a_val_folder_the_same_tenth_of_each_class_is_held_out(tmp_path, capsys):
    folders = in_folders(tmp_path / "root", (16, 1, 1))
    whole = images_of(folders).ids
    shutil.rmtree(folders / "animals/val")
    train, val, both = (images_of(folders, *splits) for splits in (["train"], ["val"], ["train", "val"]))
    assert val.ids == [whole[i] for i in (4, 14, 20, 30, 36, 46)] and val.labels == [0, 0, 1, 1, 2, 2]
    assert both.ids == train.ids + val.ids and sorted(both.ids) == sorted(whole)
    assert capsys.readouterr().out == 2 * "animals: no val folder, 6 of 48 images are held out\n"


@pytest.mark.parametrize("change, said", [
    (lambda c: c["images"].clear(), "no images"), (lambda c: c["annotations"].pop(), "no category"),
    (lambda c: c["images"].append(dict(c["images"][0])), "image's id twice"),
    (lambda c: c["categories"].append({"id": 7, "name": "again"}), "category's id twice"),
    (lambda c: c["annotations"][0].update(category_id=99), "no category"),
    (lambda c: c["images"][0].update(file_name="/etc/hostname"), "lies outside"),
    (lambda c: c["images"][0].update(file_name="data/../../secret.jpg"), "lies outside")])
def test_annotations_that_cannot_be_used_are_named(change, said, root):
    edit(root, change)
    with pytest.raises(InputError, match=f"animals_train.json.*{said}"):
        images_of(root)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "RGB"])
def test_images_are_read_as_rgb_turned_as_they_are_stored_and_resized_by_torchvision(mode, root):
    image, exif = Image.effect_noise((100, 51), 60).convert("RGB").convert(mode), Image.Exif()
    exif[0x112] = 6  # to be shown turned by 90 degrees
    image.save(images_of(root).paths[4], "PNG", exif=exif)
    expected = TF.pil_to_tensor(TF.resize(image.convert("RGB"), 72))  # (3, 72, 141)
    assert torch.equal(images_of(root, size=64)[4][0], expected)


def test_other_domains_measure_their_channel_statistics_and_the_ten_have_theirs(root):
    paths = images_of(root).paths
    Image.effect_noise((36, 40), 60).convert("RGB").save(paths[0], "PNG")
    record = images_of(root).decode().record
    values = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in paths]) / 255
    np.testing.assert_allclose([record["mean"], record["std"]], [values.mean(0), values.std(0)], atol=1e-6)
    assert images_of(root, record=record, no_mirror=["animals"]).record == record | {"mirror": False}
    (root / "annotations/animals_val.json").rename(root / "annotations/dtd_val.json")
    dtd = evaluate.Images(root, "dtd", ["val"], 32).decode().record
    assert (dtd["mean"], dtd["std"], dtd["mirror"]) == ([.5270, .4703, .4240], [.2523, .2409, .2499], False)


def test_the_second_time_nothing_is_decoded_and_pixels_are_mapped(root, tmp_path, monkeypatch):
    first, other = pixels_of(images_of(root)), draw(tmp_path / "other/root")
    file, = (root / "cache").iterdir()
    assert re.fullmatch("animals-train-36-[0-9a-f]{16}.pixels", file.name) and file.stat().st_size == 23_376
    images_of(root, cache=tmp_path / "elsewhere").decode()
    images_of(other, cache=tmp_path / "elsewhere").decode()  # every root has its own folder there
    assert len([*(tmp_path / "elsewhere").glob("root-*/*")]) == 2 and not (other / "cache").exists()
    monkeypatch.setattr(evaluate.Images, "read", lambda self, path: pytest.fail("an image is decoded"))
    assert pixels_of(images_of(root, cache=tmp_path / "elsewhere")) == first
    assert pixels_of(images := images_of(root, "train", "train")) == first + first  # a file for each split
    with open(file, "r+b") as mapped:
        mapped.write(b"\x07")
    assert images[0][0][0, 0, 0] == 7


def test_worker_processes_give_the_same_pixels_and_leave_the_runs_randomness_alone(tmp_path, capsys):
    root = draw(tmp_path / "root", (90, 1, 1))  # enough for a worker process
    for i, path in enumerate(images_of(root).paths):
        Image.new("RGB", (36 + i % 3, 40 - i % 5), (i % 256, 3 * i % 256, 7)).save(path)
    before = torch.get_rng_state()
    one, other = (pixels_of(images_of(root, cache=tmp_path / f"{n}").decode(n)) for n in (0, 1))
    assert one == other and len(one) == 270 and before.equal(torch.get_rng_state())
    with open(images_of(root).paths[77], "wb"), pytest.raises(InputError) as error:
        images_of(root).decode(1)
    with pytest.raises(SystemExit):
        evaluate.stop(error.value)
    assert capsys.readouterr().err.split(": ")[1] == f"{images_of(root).paths[77]} cannot be read"


@pytest.mark.parametrize("change", ["time", "size", "order", "crop"])
def test_the_cache_is_made_anew_when_its_source_changed_and_the_old_one_goes(root, change):
    def write(path, colour, side, seconds):
        Image.new("RGB", (side, side), (colour, 2, 3)).save(path, "BMP")
        os.utime(path, (seconds, seconds))
    paths = images_of(root).paths
    for i, path in enumerate(paths):
        write(path, i, 36, 7)  # all of one size and time
    before, size = pixels_of(images_of(root)), 64 if change == "crop" else 32
    old, = (root / "cache").iterdir()
    if change == "order":
        edit(root, lambda c: c["images"].reverse())
    elif change != "crop":
        write(paths[2], 99, *((36, 8) if change == "time" else (40, 7)))
    after, fresh = (pixels_of(images_of(root, size=size, cache=place)) for place in (None, root / "fresh"))
    assert after == fresh != before and old.exists() == (change == "crop")


@pytest.mark.parametrize("damage", [
    lambda b: b[:-1], lambda b: b[:40], lambda b: b"", lambda b: b + b"\0",
    lambda b: b[:-8] + np.int32([-36, -36]).tobytes()])
def test_a_damaged_cache_is_made_anew(root, damage):
    before, (file,) = pixels_of(images_of(root)), [*(root / "cache").iterdir()]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert pixels_of(images_of(root)) == before and file.read_bytes() == whole


def test_a_stopped_build_leaves_nothing_and_a_root_that_cannot_be_written_needs_a_flag(root, monkeypatch):
    read, seen = evaluate.Images.read, []
    def stopped(self, path):
        seen.extend((root / "cache").iterdir())
        if len(seen) == 4:
            raise KeyboardInterrupt
        return read(self, path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate.Images, "read", stopped)
        images_of(root).decode()
    assert {path.suffix for path in seen} == {".part"} and not [*(root / "cache").iterdir()]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    images_of(root, cache=root / "elsewhere")
    with pytest.raises(InputError, match="root cannot be written: give --cache DIR"):
        images_of(root)


class Given(evaluate.Images):
    def __init__(self, mirror):
        self.paths = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
                      for h, w in [(36, 36), (36, 41), (47, 36), (36, 90), (37, 39)] * 2]
        self.record = {"mean": [.1, .2, .3], "std": [.5, .6, .7], "mirror": mirror}
        self.places = [(image.flatten(), 0, *image.shape[1:]) for image in self.paths]
        self.crop, self.labels = 32, [*range(10)]


def normalised(crop):
    return torch.stack([(row / 255 - m) / s for row, m, s in zip(crop.float(), (.1, .2, .3), (.5, .6, .7))])


@pytest.mark.parametrize("mirror", [True, False])
def test_random_crops_are_those_that_are_cut_one_by_one_also_by_several_processes(mirror):
    images, one, *orders = Given(mirror), *(torch.Generator().manual_seed(5) for _ in range(5))
    for indices in (torch.arange(10), torch.tensor([7, 3, 3]), [4]):
        expected = []
        for i, (down, right, flip) in zip(indices, torch.rand(len(indices), 3, generator=one).tolist()):
            image = images[int(i)][0]
            top, left = int(down * (image.shape[1] - 32 + 1)), int(right * (image.shape[2] - 32 + 1))
            crop = image[:, top:top + 32, left:left + 32]
            expected.append(normalised(crop.flip(2) if mirror and flip < 0.5 else crop))
        for order, own in zip(orders, (slice(None), slice(0, 2), slice(2, 10), slice(1, 1))):
            x, y = images.batch(indices, order, "cpu", own)
            assert torch.equal(x, torch.stack([torch.zeros(3, 32, 32), *expected])[1:][own])
            assert y.tolist() == [int(i) for i in indices][own] and y.dtype == torch.long
            assert torch.equal(order.get_state(), one.get_state())


@pytest.mark.parametrize("crops, mirror", [(None, True), (None, False), (1, True), (5, True), (10, False)])
def test_predictions_average_the_probabilities_of_torchvisions_crops(crops, mirror):
    class Network(torch.nn.Module):
        def forward(self, x, domain):
            assert domain == "animals" and not self.training
            return 3 * x[:, :, 0, 0] + x[:, :, 5, 9]
    images, counted = Given(mirror), []
    got = evaluate.predict(Network(), "animals", images, crops, 4, progress=counted.append)
    for image, probabilities in zip(images.paths, got, strict=True):
        cut = {1: [TF.center_crop(image, 32)], 5: TF.five_crop(image, 32), 10: TF.ten_crop(image, 32)}
        x = torch.stack([normalised(crop) for crop in cut[crops or (10 if mirror else 5)]])
        expected = torch.softmax(3 * x[:, :, 0, 0] + x[:, :, 5, 9], 1).mean(0)
        torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=0)
    images.labels = [y + (i > 2) for i, y in enumerate(got.argmax(1).tolist())]
    assert counted == [4, 4, 2] and evaluate.accuracy(got, images) == pytest.approx(30)


def written(path, network, data=None, **facts):
    """network saved to `path`, with the records of the images in `data` or made up."""
    made_up = {"classes": [*"abc"], "category_ids": [1, 2, 3], "mean": [.5] * 3, "std": [.3] * 3, "mirror": 0}
    records = {domain: evaluate.Images(data, domain, ["train"], 32).decode().record if data else made_up
               for domain in network.classifiers}
    arguments = {"data": str(data), "cache": f"{path}s", "recipe": "paper", "independent": False}
    ba2ps.save(path, network, **{**FACTS, "domains": records, "arguments": arguments, **facts})
    return path


@pytest.fixture(scope="module")
def model(decathlon, tmp_path_factory):
    """A checkpoint of a network that guesses, of the source shapes, of strokes and textures."""
    torch.manual_seed(0)
    network = by_hand(5, strokes=lambda c: range(c // 4, c), textures=lambda c: range(c // 2)).eval()
    for domain, linear in network.classifiers.items():  # all classes alike
        images = evaluate.Images(decathlon, domain, ["val"], 32).decode()
        linear.bias.data -= network(images.batch(range(len(images)), None)[0], domain).mean(0).detach()
    return written(tmp_path_factory.mktemp("model") / "model.pt", network, decathlon)


def run(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--device", "cpu", "--workers", "0"])
        evaluate.main()


def report_of(*words):
    run(*words, "--json", "report.json")
    return json.loads(Path("report.json").read_text())


def test_a_report_is_that_of_its_parts_on_the_data_of_the_training(model, decathlon, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (network, facts), guesses, hits = evaluate.load_model(model), {}, {}
    for domain, record in facts["domains"].items():
        content = json.loads((decathlon / f"annotations/{domain}_val.json").read_text())
        labels = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        for image in content["images"]:
            pixels = TF.pil_to_tensor(TF.resize(Image.open(decathlon / image["file_name"]), 36))
            x = TF.normalize(torch.stack(TF.ten_crop(pixels, 32)) / 255, record["mean"], record["std"])
            guess = record["category_ids"][network.eval()(x, domain).softmax(1).mean(0).argmax()]
            guesses[image["id"]] = guess
            hits.setdefault(domain, []).append(100 * (guess == labels[image["id"]]))
    source, strokes, textures = map(np.mean, hits.values())
    Path("base.json").write_text('{"strokes": 50, "textures": 50}')
    report = report_of(model, "--results", "results.json", "--baseline", "base.json")
    complexity = ba2ps.usage(network, "macs", 32)
    for domain, *row in (("strokes", strokes, .75, .25), ("textures", textures, .5, .5)):
        assert [*report["domains"][domain].values()] == pytest.approx([*row, complexity[domain]])
    assert report["mean_accuracy"] == pytest.approx((strokes + textures) / 2) and strokes != textures
    assert report["mean_accuracy_with_source"] == pytest.approx((strokes + textures + source) / 3)
    assert report["s_score"] == pytest.approx((strokes**2 + textures**2) / 10)  # E_max is 1
    keys = ("budget_of", "source", "over_budget", "source_accuracy", "params")
    assert [report[key] for key in keys] == ["layers", "shapes", ["strokes"], source, ba2ps.params(network)]
    assert Path(f"{model}s").is_dir()  # the cache of the training
    rows = json.loads(Path("results.json").read_text())
    assert {row["image_id"]: row["category_id"] for row in rows} == guesses
    without = report_of(model, "--skip-source", "--data", decathlon)
    assert without["source_accuracy"] is None and without["domains"] == report["domains"]
    test = report_of(model, "--split", "test", "--results", "results.json")
    assert test["mean_accuracy"] is None and len(json.loads(Path("results.json").read_text())) == 11


def test_table_3_counted_by_hand_masked_and_pruned(tmp_path, monkeypatch):
    """In sixteenths of a layer's channels the models use {0..3}, {2..9} and {5..14}."""
    monkeypatch.chdir(tmp_path)
    networks = {"a": by_hand(x=lambda c: range(c // 8), y=lambda c: range(c // 8, c // 4)),
                "b": by_hand(x=lambda c: range(c // 8, 10 * c // 16)),
                "c": by_hand(y=lambda c: range(5 * c // 16, 15 * c // 16), z=lambda c: [c // 2])}
    for domain, channel in (("x", 31), ("y", 30)):  # but in one layer, of 32, the first uses these
        switches = ba2ps.switched_layers(networks["a"])["block2.0.conv2"].switches[domain]
        switches.data.fill_(-1)[channel] = 1
    expected = {"ab": (6, 14, .5), "ac": (2, 10, .25), "bc": (3, 6, .25), "abc": (1, 4, .25)}
    for change in (lambda network: network, ba2ps.prune):
        for (name, network), budget in zip(networks.items(), (.25, .5, .75)):
            written(tmp_path / f"{name}.pt", change(network), budget=budget)
        report = report_of("--compare", "a.pt", "b.pt", "c.pt", "--picture", "p.png")
        assert Image.open("p.png").size == (1800, 740)
        assert ["".join(path[0] for path in row["models"]) for row in report["shared"]] == [*expected]
        for row, (eight, ninth, most) in zip(report["shared"], expected.values()):
            assert row["shared_sparsity"] == pytest.approx((8 * eight / 16 + ninth / 32) / 9)
            assert row["max_shared_sparsity"] == most == 1 - max(row["budgets"])
        assert [row["sparsity_all"] for row in report["models"]] == pytest.approx([37 / 48, 1 / 2, 3 / 8])


@pytest.mark.parametrize("used, shares", [  # the quarters that are used; the areas of USED
    ([1, 1, 1], [1 / 4, 0, 0, 0, 3 / 4]), ([2], [1 / 4, 0, 0, 0, 3 / 4]),
    ([1, 2, 3], [0, 0, 1 / 4, 1 / 2, 1 / 4]), ([3, 1, 1], [0, 1 / 6, 1 / 12, 1 / 4, 1 / 2])])
def test_the_area_of_each_colour_is_the_share_of_channels(used, shares, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *rest: pytest.fail("it is evaluated"))
    network = by_hand(**{f"{TEN[k]}-with-a-long-name": lambda c, i=i: range(i * c // 4, (i + 1) * c // 4)
                         for k, i in enumerate(used)})
    run(written(tmp_path / "model.pt", ba2ps.prune(network)), "--picture", tmp_path / "p.png")
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    colours = [bytes.fromhex(colour[1:]) for colour in evaluate.USED.values()]
    kinds = np.stack([(pixels == [*colour]).all(2) for colour in colours])
    np.testing.assert_allclose(kinds.sum((1, 2)) / kinds.sum(), shares, atol=0.02)  # the legend has some too
    assert pixels.shape[1] == 1800
    assert all((edge == 255).all() for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -7:]))


def test_measures_are_drawn_against_beta_through_the_means_of_seeds():
    from matplotlib.figure import Figure
    models, figure = ((.5, "one", 78), (.25, "one", 72), (.25, "other", 75), (.25, "one", 70)), Figure()
    keys = "budget", "training", "mean_accuracy", "params"
    evaluate.draw_betas(figure, {"models": [dict(zip(keys, (*model, 1))) for model in models]})
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines] == [
        [[.25, 71], [.5, 78]], [[.25, 70], [.25, 72], [.5, 78]], [[.25, 75]], [[.25, 75]]]


@pytest.mark.parametrize("words, named", [
    ("", "give a model"), ("--compare MODEL", "two or more"), ("bare.pt", "bare.pt"), ("gone.pt", "--data"),
    ("odd.pt", "record of strokes"), ("few.pt", "record of strokes"), ("MODEL --baseline MODEL", "model.pt"),
    ("MODEL --json no/r", "no/r"), ("MODEL --workers -1", "--workers"), ("MODEL --cache MODEL", "model"),
    ("MODEL --no-mirror x", "x"), ("MODEL --picture p.jpg", "p.jpg"), ("MODEL --device toaster", "toaster"),
    ("MODEL --data no", "no is no directory: give one with annotations/DOMAIN_train.json and data/, or"),
    ("--compare MODEL wide.pt", "10-1 and WRN-10-2"), ("--compare MODEL gone.pt --results r", "--results")])
def test_bad_flags_and_models_end_in_one_line(words, named, model, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, facts = ba2ps.load(model)
    written(tmp_path / "bare.pt", by_hand())
    written(tmp_path / "wide.pt", by_hand(widen_factor=2, strokes=range))
    ba2ps.save("gone.pt", network, **{**facts, "arguments": {"data": "nowhere"}})
    for name, key, value in (("odd.pt", "std", [1.0, 0.0, 1.0]), ("few.pt", "category_ids", [1, 2])):
        record = facts["domains"]["strokes"] | {key: value}
        ba2ps.save(name, network, **facts | {"domains": facts["domains"] | {"strokes": record}})
    refused("evaluate.py", *[model if word == "MODEL" else word for word in words.split()], named=named)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt"}


@pytest.mark.parametrize("what", ["annotations", "images"])
def test_damaged_files_are_named_in_one_line_or_read(what, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, network, codes = random.Random(what), by_hand(animals=range), []
    network.remove_domain("shapes")
    loaded = evaluate.load_model(written("m.pt", network, root))
    monkeypatch.setattr(evaluate, "load_model", lambda path: loaded)
    monkeypatch.setattr(ba2ps, "table", functools.cache(ba2ps.table))
    files = sorted(root.glob("data/*/train/*/*" if what == "images" else "*/animals_train.json"))
    for _ in range(150):
        file = rng.choice(files)
        whole = file.read_bytes()
        at, tree = rng.randrange(len(whole)), json.loads(whole) if what == "annotations" else None
        if tree and rng.random() < 0.75:
            row = rng.choice([tree, *(row for rows in tree.values() for row in rows)])
            row[rng.choice([*row])] = rng.choice(ODD)
            file.write_text(json.dumps(tree))
        else:
            rest = [b"", whole, rng.randbytes(9) + whole[at + 9:], bytes(99) + whole[at + 99:]]
            file.write_bytes(whole[:at] + rng.choice(rest))
        try:
            run("m.pt", "--split", "train", "--crops", "1", "--results", "r.json")
            Path("r.json").unlink()
        except InputError as error:
            with pytest.raises(SystemExit, match="2"):
                evaluate.stop(error)
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and said[:-1].isprintable() and str(root) in said, said
            codes.append(2)
        assert {path.name for path in tmp_path.iterdir()} <= {"m.pt", "m.pts", "root"}
        assert not [*tmp_path.rglob("*.part")]
        file.write_bytes(whole)
    assert 50 < len(codes) < 150


# -------- real.py: stand-ins for the sets of torchvision, which are not downloaded here ---------------------

def test_real_images_are_of_the_same_make(tmp_path, monkeypatch):
    import real

    def stand_in(*folders, names):
        for folder in folders:
            Path(tmp_path, folder).mkdir(parents=True)
            for i, name in enumerate(names):
                Image.new("RGB", (30, 40), (0, 0, i)).save(Path(tmp_path, folder, name))

    stand_in("gtsrb/GTSRB/Training/00007", names=[f"{i // 30:05}_{i % 30:05}.ppm" for i in range(120)])
    stand_in(*[f"omniglot-py/images_background/{alphabet}/character01" for alphabet in ("Greek", "Avesta")],
             names=[f"0001_{i:02}.png" for i in range(1, 21)])
    images = [(Image.new("L", (32, 32)), i % 10) for i in range(50)]
    for name in ("GTSRB", "Omniglot", "CIFAR10", "MNIST", "SVHN"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", lambda *args, **kwargs: images)
    few = {"cifar10": (1, 2, 9), "digits": (1, 1, 1), "svhn": (2, 2, 1)}
    monkeypatch.setattr(real, "COUNTS", {**real.COUNTS, **few})
    real.build(tmp_path / "data", tmp_path)
    root = tmp_path / "data"
    assert {domain: [len(evaluate.Images(root, domain, [split], 64)) for split in ("val", "test", "train")]
            for domain in evaluate.domains_of(root)} == {
        "cifar10": [10, 20, 20], "gtsrb": [10, 20, 10], "omniglot": [3, 5, 12], "digits": [10, 10, 10],
        "svhn": [20, 20, 10]}
    frames = [np.asarray(Image.open(file)) for file in (root / "gtsrb/val").rglob("*.jpg")]
    assert {frame.shape for frame in frames} == {(96, 72, 3)}
    assert np.ptp([frame[..., 2].mean() for frame in frames]) < 32, "frames of more than one track"
