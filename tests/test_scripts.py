# SPDX-License-Identifier: MIT
"""README's loop and the scripts together: folders, networks of torchvision, a later domain."""
import argparse
import hashlib
import re

import pytest
import torch
import torchvision
from torchvision import models

import ba2ps
import train
from tests.conftest import ROOT

X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of noisy images of two colours, of three domains."""
    root = tmp_path_factory.mktemp("photos")
    noise = torch.Generator().manual_seed(0)
    for domain in ("photos", "signs", "digits"):
        for split in ("train", "val", "test"):
            for label in range(2):
                folder = root / domain / split / f"class {label}"
                folder.mkdir(parents=True)
                for i in range(4):
                    pixels = torch.randint(64, (3, 40, 40), generator=noise) + 150 * label
                    torchvision.utils.save_image(pixels / 255, folder / f"{i}.png")
    return root


@pytest.fixture
def run(script):
    def run(name, *words):
        code, out, err = script(name, *words)
        assert code == 0, err
        return out
    return run


def half(name, weights=None, num_classes=2):
    """Half of a resnet18."""
    return models.ResNet(models.resnet.BasicBlock, [1] * 4, num_classes)


def test_a_network_of_torchvision_folders_and_a_later_domain(photos, tmp_path, run, monkeypatch):
    monkeypatch.setattr(models, "get_model", half)
    weights = tmp_path / "w.pt"
    state = {f"module.{key}": value for key, value in half("").state_dict().items()}
    torch.save({"state_dict": state}, weights)
    common = "--epochs 1 --batch-size 4 --recipe settled --budget 0.5 --lr 0.01".split()
    common = ["--data", photos, *common]
    given = ["--network", "resnet18", "--weights", weights, "--source", "photos"]
    given += ["--image-size", 32]
    run("train.py", *common, *given, "--domains", "signs", "--out", tmp_path / "first")
    model = tmp_path / "first/model.pt"
    small = tmp_path / "small.pt"
    network, _ = ba2ps.load(model)
    assert (network.name, network.domains) == ("resnet18", ["signs"])
    assert network.layer("conv1").weight.equal(state["module.conv1.weight"])
    assert "signs" in run("prune.py", model, "--out", small, "--no-latency")
    for place, start in enumerate((model, small)):      # finished, pruned or not
        later = tmp_path / f"later{place}/model.pt"
        given = ["--start-from", start, "--domains", "digits", "--out", later.parent]
        run("train.py", *common, *given)
        both, known = ba2ps.load(later)
        assert both.domains == ["signs", "digits"] and set(both.domains) <= set(known["domains"])
        before = ba2ps.load(start)[0].eval()
        assert torch.equal(both.eval()(X, "signs"), before(X, "signs"))
        assert both.pruned == (start == small)
        assert ba2ps.usage(both, "channels")["digits"] <= 0.5 + 1e-9
        last = (later.parent / "log.csv").read_text().splitlines()[-1].split(",")
        assert float(last[8]) == pytest.approx(1 - float(last[6]), abs=1e-5)  # pruned is off
        for on in ba2ps.masks(both).values():           # it chose among the channels that are left
            assert not both.pruned or bool((on[0] | ~on[1]).all())
    assert "digits" in run("evaluate.py", later, "--skip-source")
    assert str(later) in run("evaluate.py", "--compare", model, later)
    run("prune.py", later, "--out", tmp_path / "again.pt", "--no-latency")
    again, _ = ba2ps.load(tmp_path / "again.pt")
    torch.testing.assert_close(again.eval()(X, "digits"), both(X, "digits"))


@pytest.mark.parametrize("words, named", [
    ("--network squeezenet1_0 --weights none", "nn.Linear"), ("--network resnet19", "resnet19"),
    ("--network resnet18 --weights no.pt", "no.pt"), ("--weights no.pt", "--weights"),
    ("--network WRN-10-x", "WRN-10-x"), ("--domains cats", "cats")])
def test_bad_networks_are_named_and_nothing_is_written(words, named, photos, tmp_path, refused):
    common = "--data", photos, "--source", "photos", "--image-size", 32, "--out", tmp_path / "run"
    refused("train.py", *common, *words.split(), named=named)
    assert not (tmp_path / "run").exists()


def test_default_weights_are_those_of_torchvision(tmp_path, monkeypatch):
    plain = models.shufflenet_v2_x0_5()
    url = models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(plain.state_dict(), tmp_path / "hub/checkpoints" / url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", None)
    args = argparse.Namespace(
        network="shufflenet_v2_x0_5", weights="DEFAULT", source="photos", image_size=64)
    network, records = train.pretrained(args)
    assert network.options == {"num_classes": 1000} and len(records["photos"]["classes"]) == 1000
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(network.eval()(x, "photos"), plain.eval()(x))


def test_googlenets_own_files_scale_their_images(tmp_path, monkeypatch):
    plain = models.googlenet(num_classes=5, init_weights=False)
    path = tmp_path / "w.pt"
    torch.save(plain.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    args = argparse.Namespace(network="googlenet", weights=path, source="photos", image_size=64)
    for url, scaled in (("other-1234.pth", False), (f"googlenet-{digest}.pth", True)):
        known = [argparse.Namespace(url=url)]       # of torchvision's files
        monkeypatch.setattr(models, "get_model_weights", lambda name: known)
        network, _ = train.pretrained(args)
        options = {"transform_input": scaled, "aux_logits": True, "num_classes": 5}
        assert network.options == options and network.backbone.transform_input == scaled


def test_the_loop_of_the_readme_as_printed(photos, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert "range(20)" in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    plain = models.resnet18()
    monkeypatch.setattr(models, "resnet18", lambda weights=None: plain)     # nothing is fetched
    step = ba2ps.next_multiplier
    moved = []

    def listen(multiplier, usage, budget):
        moved.append((multiplier, usage.item()))
        return step(multiplier, usage, budget)
    monkeypatch.setattr(ba2ps, "next_multiplier", listen)
    space = {}
    exec(code.replace("range(20)", "range(2)").replace("224", "64"), space)
    assert moved[-1][0] > 0 and moved[0][1] > 0.99      # Eq. 4 is at work
    small = space["small"].eval()
    x = torch.randn(2, 3, 64, 64)
    assert all(use <= 0.5 + 1e-9 for use in ba2ps.usage(small).values())
    again, _ = ba2ps.load("small.pt", backbone=plain)
    program = torch.export.load("signs.pt2").module()
    for logits in (again.eval()(x, "signs"), program(x), space["signs"](x)):
        torch.testing.assert_close(logits, small(x, "signs"), rtol=1e-4, atol=1e-4)
