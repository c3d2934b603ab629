# SPDX-License-Identifier: MIT
"""The benchmark: published scores, the release's files, crops, channel statistics, models compared and drawn."""
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ba2ps
import evaluate
from ba2ps import InputError

TEN = ["imagenet12", "aircraft", "cifar100", "daimlerpedcls", "dtd", "gtsrb", "vgg-flowers", "omniglot", "svhn", "ucf101"]
OURS = {  # Table 1 of the paper: accuracies on test in the order of TEN, mean, S
    1.00: ([56.872, 37.294, 80.200, 95.046, 57.926, 98.599, 84.615, 83.820, 95.993, 45.837], 73.620, 2512),
    0.75: ([56.872, 42.574, 75.280, 94.959, 56.064, 98.551, 82.810, 87.234, 95.970, 44.674], 73.499, 2444),
    0.50: ([56.872, 42.094, 73.690, 96.760, 51.277, 98.678, 81.444, 87.123, 96.047, 45.414], 72.940, 2552),
    0.25: ([56.872, 33.633, 67.890, 95.281, 44.894, 98.147, 75.053, 87.381, 96.074, 43.008], 69.823, 1942),
}
TABLE_2 = {1.00: (0.837, 1.03, 3001, 2438), 0.75: (0.645, 0.921, 3789, 2654), 0.50: (0.447, 0.783, 5709, 3259),
           0.25: (0.238, 0.531, 8159, 3657)}  # complexity, params, S_O, S_P


@pytest.mark.parametrize("budget", OURS)
def test_s_of_the_papers_rows(budget):
    accuracies, mean, s = OURS[budget]
    assert sum(accuracies) / 10 == pytest.approx(mean, abs=1e-3)
    assert evaluate.s_score(dict(zip(TEN, accuracies)), evaluate.FINE_TUNED) == pytest.approx(s, abs=0.5)


@pytest.mark.parametrize("budget", TABLE_2)
def test_s_per_operation_and_per_parameter_of_the_papers_rows(budget, monkeypatch):
    complexity, params, s_o, s_p = TABLE_2[budget]
    rows = {d: {"usage": budget, "sparsity": 1 - budget, "complexity": complexity} for d in TEN[1:]}
    monkeypatch.setattr(evaluate, "costs", lambda network, image_size: (rows, 0.0, params))

    class Network:
        source = "imagenet12"
    report, _ = evaluate.measure(Network, {"image_size": 64, "budget": budget}, dict(zip(TEN, OURS[budget][0])), "test")
    # the paper divides rounded figures; 1942 / 0.238 and 2512 / 1.03 are known to no more than three digits
    assert report["s_o"] == pytest.approx(s_o, rel=2e-3) and report["s_p"] == pytest.approx(s_p, rel=2e-3)
    assert report["complexity"] == pytest.approx(complexity)
    assert report["complexity_with_source"] == pytest.approx(0.9 * complexity + 0.1)
    assert report["mean_accuracy_with_source"] == pytest.approx(OURS[budget][1], abs=1e-3)
    assert report["mean_accuracy"] == pytest.approx(sum(OURS[budget][0][1:]) / 9)


def test_a_domain_is_over_budget_by_a_switch_not_by_rounding(monkeypatch, capsys):
    usage = {"a": 0.1 + 0.2, "b": 0.3 + 1 / 3539, "c": 0.25, "d": 0.31}  # the first is 0.30000000000000004
    rows = {d: {"usage": value, "sparsity": 0.7, "complexity": 0.3} for d, value in usage.items()}
    monkeypatch.setattr(evaluate, "costs", lambda network, image_size: (rows, 0.6, 0.4))

    class Network:
        source = "imagenet12"
    for budget, expected, says in ((0.3, ["b", "d"], "2 of 4 domains over budget: b, d"), (0.5, [], "no domain over budget"),
                                   (None, [], None)):
        facts = {"image_size": 64} if budget is None else {"image_size": 64, "budget": budget}
        report, _ = evaluate.measure(Network, facts, {}, "test")
        evaluate.show(report)
        lines = capsys.readouterr().out.splitlines()
        assert report["over_budget"] == expected and (lines[-1] == says or says is None and "over" not in "".join(lines))
        assert [line.split()[0] for line in lines if line.endswith("   over budget")] == expected


def test_the_complexity_of_ba2s_own_rows_counts_imagenet_as_one():
    assert (9 * 0.25 + 1) / 10 == pytest.approx(0.325)  # Table 2, BA2 at 0.25


def test_fine_tuning_scores_2500_and_a_domain_beyond_twice_its_error_nothing():
    assert evaluate.s_score(evaluate.FINE_TUNED, evaluate.FINE_TUNED) == pytest.approx(2500)
    assert evaluate.s_score({"a": 70.0, "b": 100.0}, {"a": 90.0, "b": 90.0}) == pytest.approx(1000)


# --- files -----------------------------------------------------------------------------------------------------------

def write_domain(root, domain="animals", names=("cat", "dog", "emu"), per_class=4, first_id=0, size=(36, 36), seed=0):
    """A small domain in the release's layout, whose folders are shuffled against the category ids."""
    rng = random.Random(seed)
    folders = list(range(len(names)))
    rng.shuffle(folders)
    for split in ("train", "val", "test_stripped"):
        images, annotations = [], []
        for c in range(len(names)):
            for _ in range(per_class):
                number = first_id + 1000 * ("train", "val", "test_stripped").index(split) + len(images) + 1
                folder = "test" if split == "test_stripped" else f"{split}/{folders[c]:04d}"
                name = f"data/{domain}/{folder}/{number:06d}.jpg"
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                value = 40 + 80 * c  # the class can be read off the image
                Image.new("RGB", size, (value, value, value)).save(root / name, quality=95)
                images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
                annotations.append({"id": number, "image_id": number, "category_id": first_id + 10 * c + 7})
        rng.shuffle(images)
        rng.shuffle(annotations)
        categories = [{"id": first_id + 10 * c + 7, "name": name, "supercategory": domain} for c, name in enumerate(names)]
        rng.shuffle(categories)
        content = {"images": images, "categories": categories}
        if split != "test_stripped":
            content["annotations"] = annotations
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{domain}_{split}.json").write_text(json.dumps(content))
    return root


def test_labels_come_from_category_ids_whatever_the_folders_and_the_order(tmp_path):
    images = evaluate.Images(write_domain(tmp_path), "animals", ["train", "val"], 32)
    assert images.classes == ["cat", "dog", "emu"] and images.category_ids == [7, 17, 27] and len(images) == 24
    for items in images.batches(torch.arange(24).split(8)):
        for image, label in items:
            assert image.dtype == torch.uint8 and round((image.float().mean().item() - 40) / 80) == label
    test = evaluate.Images(tmp_path, "animals", ["test"], 32, [7, 17, 27])
    assert not test.labelled and test[0][1] == -1 and len(test.ids) == 12


def test_images_are_resized_to_nine_eighths_of_the_crop_with_their_aspect_ratio(tmp_path):
    images = evaluate.Images(write_domain(tmp_path, size=(100, 50)), "animals", ["train"], 64)
    assert images[0][0].shape == (3, 72, 144)


@pytest.mark.parametrize("damage, said", [
    (lambda root: (root / "annotations/animals_train.json").unlink(), "animals_train.json is missing"),
    (lambda root: (root / "annotations/animals_train.json").write_text("{"), "not readable JSON"),
    (lambda root: (root / "annotations/animals_train.json").write_text('{"images": 3}'), "not laid out"),
    (lambda root: (root / "annotations/animals_train.json").write_text("[]"), "not laid out"),
    (lambda root: edit(root, lambda c: c["images"].clear()), "lists no images"),
    (lambda root: edit(root, lambda c: c["annotations"].pop()), "no annotation with a known category"),
    (lambda root: edit(root, lambda c: c["annotations"][0].update(category_id=99)), "no annotation with a known category"),
    (lambda root: next((root / "data/animals/train").glob("*/*")).unlink(), "is missing"),
])
def test_bad_files_are_named_in_one_line(tmp_path, damage, said):
    damage(write_domain(tmp_path))
    with pytest.raises(InputError, match=said) as error:
        evaluate.Images(tmp_path, "animals", ["train"], 32)
    assert "\n" not in str(error.value) and "animals" in str(error.value)


def edit(root, change):
    path = root / "annotations/animals_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_unknown_domains_measure_their_channel_statistics_and_the_ten_have_theirs(tmp_path):
    write_domain(tmp_path)
    write_domain(tmp_path, "dtd", first_id=10_000)

    def describe(domain, *no_mirror):
        return evaluate.describe(evaluate.Images(tmp_path, domain, ["train"], 32), no_mirror)
    record = describe("animals")
    pixels = np.concatenate([np.asarray(Image.open(p)).reshape(-1, 3) for p in (tmp_path / "data/animals/train").glob("*/*")])
    np.testing.assert_allclose(record["mean"], pixels.mean(0) / 255, atol=1e-6)
    np.testing.assert_allclose(record["std"], (pixels / 255).std(0), atol=1e-6)
    assert record["mirror"] and not describe("animals", "animals")["mirror"]
    dtd = describe("dtd")
    assert dtd["mean"] == [.5270, .4703, .4240] and not dtd["mirror"]


# --- crops -----------------------------------------------------------------------------------------------------------

def numbered(height, width):
    """Every pixel holds its row and its column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)


def test_crops_are_the_four_corners_the_centre_and_their_mirror_images():
    image = numbered(36, 44)
    crops = evaluate.test_crops([image], 32, 10)[0]
    assert crops.shape == (10, 3, 32, 32)
    corners = {(0, 0), (0, 12), (4, 0), (4, 12), (2, 6)}
    assert {(int(c[0, 0, 0]), int(c[1, 0, 0])) for c in crops[:5]} == corners
    for crop in crops[:5]:
        assert torch.equal(crop[1, 0].int(), torch.arange(32).int() + int(crop[1, 0, 0]))
    mirrored = {(int(c[0, 0, 0]), int(c[1, 0, -1])) for c in crops[5:]}
    assert mirrored == corners and all(c[1, 0, 0] > c[1, 0, -1] for c in crops[5:])
    assert torch.equal(evaluate.test_crops([image], 32, 5)[0], crops[:5])
    assert torch.equal(evaluate.test_crops([image], 32, 1)[0, 0], image[:, 2:34, 6:38])


def test_random_crops_reach_every_place_and_mirror_half():
    image, order = numbered(36, 38), torch.Generator().manual_seed(0)
    crops = evaluate.random_crops([image] * 2000, 32, True, order).int()
    mirrored = crops[:, 1, 0, 0] > crops[:, 1, 0, 31]
    assert 900 < mirrored.sum() < 1100
    left = torch.minimum(crops[:, 1, 0, 0], crops[:, 1, 0, 31])
    assert {*zip(crops[:, 0, 0, 0].tolist(), left.tolist())} == {(r, c) for r in range(5) for c in range(7)}
    crops = evaluate.random_crops([image] * 50, 32, False, order).int()
    assert (crops[:, 1, 0, 0] < crops[:, 1, 0, 31]).all()


def test_predictions_average_the_probabilities_of_the_crops(tmp_path):
    images = evaluate.Images(write_domain(tmp_path, size=(36, 44)), "animals", ["val"], 32)
    pictures = [(numbered(44, 36) * (i + 1) % 251).to(torch.uint8) for i in range(len(images))]
    for i, picture in enumerate(pictures):
        images[i][0].copy_(picture)
    record = {"mean": [.1, .2, .3], "std": [.5, .6, .7], "mirror": False}

    class Network(torch.nn.Module):
        def forward(self, x, domain):
            return x[:, :, 0, 0] * 3
    got = evaluate.predict(Network(), "animals", record, images, batch_size=5)
    for i in range(len(images)):
        probabilities = []
        for top, left in ((0, 0), (0, 4), (12, 0), (12, 4), (6, 2)):
            pixel = pictures[i][:, top, left].double().numpy() / 255
            logits = 3 * (pixel - record["mean"]) / record["std"]
            probabilities.append(np.exp(logits) / np.exp(logits).sum())
        np.testing.assert_allclose(got[i].numpy(), np.mean(probabilities, 0), atol=1e-5)
    assert evaluate.accuracy(torch.eye(3)[torch.tensor(images.labels)], images) == 100


# --- several models --------------------------------------------------------------------------------------------------

def by_hand(depth=10, widen_factor=1, **used):
    """A network in which domain d uses the channels used[d](C) of a layer of C, its switches +-1."""
    network = ba2ps.WideResNet(depth, widen_factor, "source", 3)
    for domain, chosen in used.items():
        network.add_domain(domain, 3)
        for layer in ba2ps.switched_layers(network).values():
            layer.switches[domain].data.fill_(-1)[list(chosen(layer.in_channels))] = 1
    return network


def written(path, network, **facts):
    domains = {domain: {"classes": ["cat", "dog", "emu"], "category_ids": [7, 17, 27], "mean": [.5] * 3, "std": [.3] * 3,
                        "mirror": False} for domain in network.classifiers}
    path.parent.mkdir(exist_ok=True)
    ba2ps.save(path, network, image_size=32, domains=domains, **facts)
    return path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--device", "cpu", "--workers", "0"])
    evaluate.main()


def three_models():
    """In sixteenths of a layer's channels {0..3}, {2..9}, {5..14}; but in one layer the first has all switches off."""
    a = by_hand(x=lambda c: range(c // 8), y=lambda c: range(c // 8, c // 4))
    b = by_hand(x=lambda c: range(c // 8, 10 * c // 16))
    c = by_hand(y=lambda c: range(5 * c // 16, 15 * c // 16), z=lambda c: [c // 2])
    layer = ba2ps.switched_layers(a)["block2.0.conv2"]
    assert layer.in_channels == 32
    for domain, strongest in (("x", 31), ("y", 30)):
        layer.switches[domain].data.fill_(-1)[strongest] = 0.0
    return {"a": (a, 0.25), "b": (b, 0.5), "c": (c, 0.75)}


def test_table_3_of_models_counted_by_hand(tmp_path, monkeypatch, capsys):
    paths = [written(tmp_path / name / "model.pt", network, budget=beta) for name, (network, beta) in three_models().items()]
    run(monkeypatch, "--compare", *paths, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    # eight layers by sixteenths; in the ninth, of 32 channels, the first model has 30 and 31, the others {4..19}, {10..29}
    expected = [("a", "b", 6 / 16, 14 / 32, 0.5), ("a", "c", 2 / 16, 10 / 32, 0.25), ("b", "c", 3 / 16, 6 / 32, 0.25),
                ("a", "b", "c", 1 / 16, 4 / 32, 0.25)]
    assert len(report["shared"]) == len(expected)
    out = capsys.readouterr().out
    for row, (*names, eight, ninth, most) in zip(report["shared"], expected):
        assert [Path(path).parent.name for path in row["models"]] == names
        assert row["budgets"] == [dict(a=0.25, b=0.5, c=0.75)[name] for name in names]
        assert row["shared_sparsity"] == pytest.approx((8 * eight + ninth) / 9) and row["max_shared_sparsity"] == most
        line = next(line for line in out.splitlines() if line.startswith(" & ".join(names) + "  "))
        assert line.split()[-2:] == [f"{100 * (8 * eight + ninth) / 9:.1f}%", f"{100 * most:.1f}%"]
        assert " & ".join(f"{beta:.2f}" for beta in row["budgets"]) in line
    for row, path, own in zip(report["models"], paths, [(8 * 12 / 16 + 30 / 32) / 9, 8 / 16, 6 / 16]):
        assert row["model"] == str(path) and row["sparsity_all"] == pytest.approx(own) and row["mean_accuracy"] is None
        line = next(line for line in out.splitlines() if line.startswith(str(path)))
        assert line.split()[1:4] == [f"{row['budget']:.2f}", f"{100 * own:.1f}%", f"{100 - 100 * row['budget']:.1f}%"]


def test_two_models_are_one_pair_and_an_unknown_budget_has_no_largest(tmp_path, monkeypatch, capsys):
    models = three_models()
    paths = [written(tmp_path / "a.pt", models["a"][0], budget=0.25), written(tmp_path / "b.pt", models["b"][0])]
    run(monkeypatch, "--compare", *paths, "--json", tmp_path / "r.json")
    shared = json.loads((tmp_path / "r.json").read_text())["shared"]
    assert len(shared) == 1 and shared[0]["max_shared_sparsity"] is None and shared[0]["budgets"] == [0.25, None]
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"


@pytest.mark.parametrize("pruned", ["abc", "b"])
def test_pruned_models_compare_as_masked_ones(pruned, tmp_path, monkeypatch):
    reports = []
    for chosen in ("", pruned):
        paths = [written(tmp_path / f"{name}.pt", ba2ps.prune(network) if name in chosen else network, budget=beta)
                 for name, (network, beta) in three_models().items()]
        run(monkeypatch, "--compare", *paths, "--json", tmp_path / "r.json")
        reports.append(json.loads((tmp_path / "r.json").read_text()))
    assert reports[0] == reports[1]


def test_compared_accuracies_are_those_of_each_model_by_itself(tmp_path, monkeypatch):
    for domain in ("birds", "cars"):
        write_domain(tmp_path, domain)
    used = {"birds": lambda c: range(c // 2), "cars": lambda c: range(c // 4, c)}
    paths = [written(tmp_path / f"{budget}.pt", by_hand(**used), budget=budget) for budget in (0.5, 0.75)]
    expected = []
    for path in paths:
        run(monkeypatch, path, "--data", tmp_path, "--json", tmp_path / "r.json")
        expected.append(json.loads((tmp_path / "r.json").read_text())["mean_accuracy"])
    run(monkeypatch, "--compare", *paths, "--data", tmp_path, "--json", tmp_path / "r.json", "--picture", tmp_path / "p.png")
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["mean_accuracy"] for row in report["models"]] == expected and report["split"] == "val"
    assert Image.open(tmp_path / "p.png").width == 1800
    with pytest.raises(InputError, match="--split test has no labels"):
        run(monkeypatch, "--compare", *paths, "--data", tmp_path, "--split", "test")


def test_models_of_other_layers_are_not_compared(tmp_path, monkeypatch):
    used = {"x": lambda c: range(c // 2)}
    first = written(tmp_path / "first.pt", by_hand(**used), budget=0.5)
    for depth, widen_factor in ((16, 1), (10, 2)):
        other = written(tmp_path / "other.pt", by_hand(depth, widen_factor, **used), budget=0.5)
        with pytest.raises(InputError, match=f"other.pt is WRN-{depth}-{widen_factor} and .*first.pt WRN-10-1"):
            run(monkeypatch, "--compare", first, other)


# --- pictures --------------------------------------------------------------------------------------------------------

def kinds(path):
    """(height, width) of a picture: which of evaluate.USED a pixel has the colour of, -1 for none."""
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    kind = np.full(pixels.shape[:2], -1)
    for i, (colour, _, _) in enumerate(evaluate.USED):
        kind[(pixels == list(bytes.fromhex(colour[1:]))).all(2)] = i
    return kind


def quarter(i):
    return lambda c: range(i * c // 4, (i + 1) * c // 4)


@pytest.mark.parametrize("used, shares", [  # of the area: on in all, in several, in one alone, off here, off in all
    ({"x": quarter(1), "y": quarter(1), "z": quarter(1)}, [1 / 4, 0, 0, 0, 3 / 4]),
    ({"x": quarter(1), "y": quarter(2), "z": quarter(3)}, [0, 0, 1 / 4, 1 / 2, 1 / 4]),
    ({"x": quarter(1), "y": quarter(1), "z": quarter(3)}, [0, 1 / 6, 1 / 12, 1 / 4, 1 / 2]),
    ({"x": quarter(2)}, [1 / 4, 0, 0, 0, 3 / 4])])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_area_of_each_colour_is_the_share_of_channels(used, shares, pruned, tmp_path, monkeypatch, capsys):
    network = by_hand(**used)
    model = written(tmp_path / "model.pt", ba2ps.prune(network) if pruned else network, budget=0.25)
    run(monkeypatch, model, "--picture", tmp_path / "p.png")  # no --data: nothing is evaluated
    assert "p.png" in capsys.readouterr().out
    kind = kinds(tmp_path / "p.png")
    assert kind.shape[1] == 1800 and 300 < kind.shape[0] < 1000
    area = np.bincount(kind[kind >= 0], minlength=5) / (kind >= 0).sum()
    np.testing.assert_allclose(area, shares, atol=0.02)  # the legend has a patch of each
    assert area[4] == pytest.approx(ba2ps.sparsity(network)[1], abs=0.02)


def test_channels_are_drawn_from_the_most_used_to_the_pruned(tmp_path):
    used = {"x": lambda c: [*range(c // 8), *range(c // 4, 3 * c // 8), *range(c // 2, 3 * c // 4)],
            "y": lambda c: [*range(c // 8), *range(c // 2, 3 * c // 4)], "z": lambda c: range(c // 2, 3 * c // 4)}
    network = by_hand(**used)
    evaluate.write_picture(tmp_path / "p.png", lambda figure: evaluate.draw_channels(figure, network, {}))
    kind = kinds(tmp_path / "p.png")
    assert kind.shape[1] == 1800
    row = kind[np.flatnonzero((kind == 0).sum(1) > 50)[5], :600]  # through domain x of the first strip, without a frame
    row = row[row >= 0]
    assert row[np.flatnonzero(np.diff(row, prepend=-1))].tolist() == [0, 1, 2, 4]
    assert np.bincount(row)[[0, 1, 2, 4]] / len(row) == pytest.approx([1 / 4, 1 / 8, 1 / 8, 1 / 2], abs=0.02)


def test_ten_domains_with_long_names_stay_inside_the_picture(tmp_path):
    network = by_hand(28, 1, **{f"{domain}-with-a-name": quarter(i % 4) for i, domain in enumerate(TEN)})
    facts = {"budget": 0.25, "arguments": {"sharing": 1.0, "recipe": "held", "independent": True}}
    evaluate.write_picture(tmp_path / "p.png", lambda figure: evaluate.draw_channels(figure, network, facts))
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] == 1800 and 1000 < pixels.shape[0] < 1600
    assert all((edge == 255).all() for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]))


def lines(**measured):
    """{label: x, y of the markers} of the two panels that draw_betas makes of (beta, training, accuracy, sparsity)."""
    from matplotlib.figure import Figure
    figure = Figure()
    evaluate.draw_betas(figure, {"split": "val", "models": [
        {"budget": budget, "training": training, "mean_accuracy": accuracy, "sparsity_all": sparsity, "params": 1 - sparsity}
        for budget, training, accuracy, sparsity in measured.values()]})
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    return legend, [{line.get_label(): line.get_xydata().tolist() for line in axes.lines
                     if not line.get_label().startswith("_")} for axes in figure.axes], figure


def test_measures_are_drawn_against_beta_a_line_for_each_way_of_training():
    models = {"a": (0.5, "λ_PS = 1.0", 78, 0.46), "b": (0.25, "λ_PS = 1.0", 72, 0.69), "c": (0.25, "no sharing", 75, 0.36),
              "d": (0.25, "λ_PS = 1.0", 70, 0.67)}
    legend, (left, right), figure = lines(**models)
    assert legend == ["λ_PS = 1.0", "no sharing"] and "accuracy on val" in figure.axes[0].get_title("left")
    assert left == {"λ_PS = 1.0": [[0.25, 72], [0.25, 70], [0.5, 78]], "no sharing": [[0.25, 75]]}
    np.testing.assert_allclose(right["λ_PS = 1.0"], [[0.25, 0.31], [0.25, 0.33], [0.5, 0.54]])
    assert [[0.25, 71], [0.5, 78]] in [line.get_xydata().tolist() for line in figure.axes[0].lines]  # through the mean
    legend, (left, _), figure = lines(**{name: (*row[:2], None, row[3]) for name, row in models.items()})
    assert legend == ["λ_PS = 1.0", "no sharing", "ideal, 1 − β"] and "sparsity all" in figure.axes[0].get_title("left")
    assert left["ideal, 1 − β"] == [[0, 100], [1, 0]]
    np.testing.assert_allclose(left["λ_PS = 1.0"], [[0.25, 69], [0.25, 67], [0.5, 46]])


def test_models_are_grouped_by_how_they_were_trained_if_that_is_known(tmp_path, monkeypatch):
    says = {"": {}, "λ_PS = 1.0": {"sharing": 1.0, "lr": 1}, "no sharing": {"sharing": 0.0, "independent": False},
            "no sharing, independent": {"sharing": 0.0, "independent": True},
            "switches in common, recipe held": {"sharing": 0.0, "common": True, "recipe": "held"},
            "λ_PS = 0.5": {"sharing": 0.5, "recipe": "paper", "sharing_loss": "intersection"},
            "λ_PS = learned, union, recipe held": {"sharing": "learned", "recipe": "held", "sharing_loss": "union"}}
    assert all(evaluate.training({"arguments": arguments}) == words for words, arguments in says.items())
    assert evaluate.training({}) == evaluate.training({"arguments": None}) == ""
    facts = [{"budget": 0.25, "arguments": {"sharing": 0.0}}, {"budget": 0.5}]
    paths = [written(tmp_path / f"{i}.pt", by_hand(x=quarter(0)), **known) for i, known in enumerate(facts)]
    run(monkeypatch, "--compare", *paths, "--picture", tmp_path / "p.png", "--json", tmp_path / "r.json")
    assert [row["training"] for row in json.loads((tmp_path / "r.json").read_text())["models"]] == ["no sharing", ""]
    assert (kinds(tmp_path / "p.png").shape) == (740, 1800)
    written(paths[1], by_hand(x=quarter(0)))
    with pytest.raises(InputError, match="1.pt does not say its budget"):
        run(monkeypatch, "--compare", *paths, "--picture", tmp_path / "p.png")


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError])
def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(error, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def savefig(figure, target, **options):
        target.write(b"half") if hasattr(target, "write") else Path(target).write_bytes(b"half")
        raise error("no more")
    monkeypatch.setattr(Figure, "savefig", savefig)
    (tmp_path / "old.png").write_text("the old one")
    for name in ("old.png", "new.png"):
        with pytest.raises((error, InputError)):
            evaluate.write_picture(tmp_path / name, lambda figure: None)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_text() == "the old one"


def test_a_picture_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError("no space left")
    monkeypatch.setattr("os.replace", full)
    (tmp_path / "old.png").write_text("the old one")
    with pytest.raises(InputError, match="cannot write .*old.png: no space left"):
        evaluate.write_picture(tmp_path / "old.png", lambda figure: None)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_text() == "the old one"


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    model = written(tmp_path / "model.pt", by_hand(x=quarter(0)), budget=0.25)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.style", raising=False)
    with pytest.raises(InputError, match="pip install matplotlib"):
        run(monkeypatch, model, "--picture", tmp_path / "p.png")
