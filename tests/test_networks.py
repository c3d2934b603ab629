# SPDX-License-Identifier: MIT
"""Networks of others: what add_switches keeps and refuses, what is pruned, files, scripts, README's loop."""
import argparse
import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision import models

import ba2ps
import prune
import train
from conftest import ROOT

SMALL = {  # of a few blocks, which only their owner can build
    "DenseNet": lambda: models.DenseNet(8, (3, 3), 16, 2, 0.5, 6),
    "MobileNetV2": lambda: models.MobileNetV2(6, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
    "ShuffleNetV2": lambda: models.ShuffleNetV2([2, 1, 1], [8, 16, 32, 32, 64], 6),
    "RegNet": lambda: models.RegNet(models.regnet.BlockParams.from_init_params(5, 16, 16.0, 2.0, 8, 0.25), 6),
    "MobileNetV3": lambda: models.MobileNetV3(
        [models.mobilenetv3.InvertedResidualConfig(*row, 1, 1) for row in (
            (16, 3, 16, 16, True, "RE", 2), (16, 5, 40, 24, True, "HS", 2), (24, 3, 64, 24, False, "HS", 1))],
        32, 6),
    "EfficientNet": lambda: models.EfficientNet(
        [models.efficientnet.MBConvConfig(*row) for row in ((1, 3, 1, 16, 16, 1), (6, 3, 2, 16, 24, 2))], 0.2,
        num_classes=6)}


def build(name, number=6):
    return SMALL[name]() if name in SMALL else models.get_model(name, num_classes=number)


@torch.no_grad()
def randomised(net, share=0.4, seed=0):
    """`net` in float64 and eval mode; batch-norm keeps activations where they have a slope; the domains of
    `net` have the same random share of the channels on."""
    draw = torch.Generator().manual_seed(seed)
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        for key, (low, high) in {"weight": (0.05, 0.1), "bias": (1, 2), "running_var": (0.5, 2)}.items():
            if getattr(norm, key) is not None:
                getattr(norm, key).uniform_(low, high, generator=draw)
    for layer in ba2ps.switched_layers(net).values():
        on = torch.rand(layer.in_channels, generator=draw) < share
        on[torch.randint(len(on), (), generator=draw)] = True
        for switches in layer.switches.values():
            switches.copy_(on.double() - 0.5)
    return net.double().eval()


def macs_that_matter(net, domain, size):
    """Share of the MACs of `net` that pruning could leave, by gradients: of every convolution the filters
    that a logit depends on, times the input channels that are on."""
    net, seen, whole, left = copy.deepcopy(net).requires_grad_(False), {}, 0, 0
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda conv, x, y: seen.setdefault(conv, y).requires_grad_().retain_grad())
    logits = net(torch.randn(2, 3, size, size).double(), domain)
    (logits * torch.randn_like(logits)).sum().backward()
    for conv in convs:
        used = int((seen[conv].grad != 0).any(0).flatten(1).any(1).sum())
        on = conv.read(domain).sum() if isinstance(conv, ba2ps.SwitchedConv2d) else conv.weight.shape[1]
        each = seen[conv][0, 0].numel() * conv.weight[0, 0].numel()
        whole, left = whole + each * conv.weight[:, :, 0, 0].numel(), left + each * used * int(on)
    return left / whole


@pytest.mark.parametrize("name", ["resnet18", *SMALL])
def test_a_network_of_torchvision_is_trained_pruned_dense_and_stored(name, tmp_path):
    options = {"num_classes": 6}
    net = ba2ps.add_switches(build(name), {"a": 3, "b": 4}, "photos", 64, name, options)
    net, x = randomised(net), torch.randn(2, 3, 64, 64).double()
    net.freeze_backbone()
    before, net = copy.deepcopy(net), net.train()
    switches = ba2ps.Switches(net, ["a"], 0.6, sharing=0)
    sgd = torch.optim.SGD(net.owned_parameters(["a"]), 1e-3)
    adam = torch.optim.Adam(switches.parameters(), 1e-3)
    switches.begin(["a"], 0.0)
    (F.cross_entropy(net(x, "a"), torch.tensor([0, 1])) + switches.loss(["a"])).backward()
    sgd.step(), switches.step(adam, ["a"])
    with torch.no_grad():
        for domain in net.eval().classifiers:  # nobody else has changed, in any bit
            assert torch.equal(net(x, domain), before(x, domain)) == (domain != "a")
        small = ba2ps.prune(before)
        one = prune.dense(small, "a")
        for its in (small(x, "a"), one(x)):
            assert (its - before(x, "a")).abs().max() < 1e-10 * its.abs().max()
        torch.save(one, tmp_path / "one.pt")
        assert torch.equal(torch.load(tmp_path / "one.pt", weights_only=False)(x), one(x))
        left = prune.dense_macs(one, 64) / prune.dense_macs(prune.dense(before, "photos"), 64)
        for stored in (small, before):
            ba2ps.save(tmp_path / "m.pt", stored.float())
            again, _ = ba2ps.load(tmp_path / "m.pt", build(name) if name in SMALL else None)
            assert torch.equal(again.eval()(x.float(), "a"), stored(x.float(), "a"))
    could = macs_that_matter(before.double(), "a", 64)
    assert could - 1e-9 < left < could + 0.01


class AddFirst(nn.Module):
    def forward(self, x):
        return x + x[:, :1]


class Net(nn.Module):
    """Two convolutions and a classifier with `body` between them, and layers that it may call."""

    def __init__(self, body=lambda net, x: x, channels=3, before=lambda x: x, end=lambda logits, x: logits):
        super().__init__()
        self.stem, self.a = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)
        self.norm, self.relu, self.drop = nn.BatchNorm2d(8), nn.ReLU(True), nn.Dropout(0.5, inplace=True)
        self.hidden, self.flat, self.group = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)
        self.bare, self.one, self.last = nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 1, 1), nn.Linear(8, 5)
        self.up, self.path = nn.ConvTranspose2d(8, 8, 2), torchvision.ops.StochasticDepth(0.5, "row")
        self.fresh, self.wide = nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(9, 8, 1)
        self.drawn = nn.InstanceNorm2d(8, track_running_stats=True)
        self.scale, self.offset = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(1, 8, 1, 1))
        self.body, self.before, self.end, self.add = body, before, end, AddFirst()

    def forward(self, x):
        logits = self.last(self.body(self, self.norm(self.a(self.stem(self.before(x))))).mean((2, 3)))
        return self.end(logits, x)


class Auxiliary(Net):
    def forward(self, x):
        x = self.norm(self.a(self.stem(x)))
        aux = self.hidden(self.path(x).mean((2, 3))) if self.training else None
        logits = self.last(self.drop(x).mean((2, 3)))
        return (logits, aux) if self.training else logits


def shuffle(x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


KEPT = {
    "a shortcut reads what a ReLU left": Net(lambda n, x: x + n.b(n.relu(x))),
    "or what F.relu left": Net(lambda n, x: n.b(F.relu(x, inplace=True)) + x),
    "or a method": Net(lambda n, x: n.b(x.relu_()) + x),
    "hidden layers": Net(lambda n, x: n.flat(n.hidden(n.b(n.up(n.group(x))).mean((2, 3))))[..., None, None]),
    "dropout": Net(lambda n, x: F.dropout(n.b(n.drop(n.path(x))), 0.5, n.training)),
    "an operation on the image": Net(lambda n, x: n.b(x), before=lambda x: (x - 0.45) / 0.22),
    "no weights in batch-norm": Net(lambda n, x: n.b(n.bare(x))),
    "no running statistics": Net(lambda n, x: n.b(n.fresh(x))),
    "attention that broadcasts": Net(lambda n, x: n.b(x + n.one(x) * x.mean(1, keepdim=True))),
    "parameters of its own": Net(lambda n, x: n.b(n.scale * x * n.scale[None] + n.offset)),
    "gates": Net(lambda n, x: n.b(x * x.mean((2, 3), keepdim=True).sigmoid().expand_as(x))),
    "moved channels": Net(lambda n, x: n.wide(torch.cat([x[:, 3:], shuffle(x).chunk(2, 1)[1]], 1))),
    "a view of a fixed size": Net(lambda n, x: n.b(x.view(-1, 8, 14, 14))),
    "a channel for all": Net(lambda n, x: n.b(n.add(x))),
    "grey images": Net(lambda n, x: n.b(x), channels=1),
    "log-probabilities": Net(end=lambda logits, x: logits.log_softmax(1))}


@pytest.mark.parametrize("kind", KEPT)
def test_the_source_is_served_as_by_the_plain_network_and_pruning_is_exact(kind):
    plain = KEPT[kind]
    net = ba2ps.add_switches(plain, {"a": 3, "b": 4}, "photos", 16).double()
    plain, x = plain.double(), torch.randn(4, plain.stem.in_channels, 16, 16).double()
    assert "stem" not in ba2ps.switched_layers(net) and "a" in ba2ps.switched_layers(net)
    for training in (False, True, False):
        outputs = []
        for run in (plain.train(training), lambda x: net.train(training)(x, "photos")):
            torch.manual_seed(0)
            outputs += [run(x), run(x)]
        torch.testing.assert_close(outputs[:2], outputs[2:])
        assert torch.equal(outputs[0], outputs[1]) == (not training or kind != "dropout")
    with torch.no_grad():
        small = ba2ps.prune(randomised(net))
        for its in (small, lambda x, domain: prune.dense(small, domain)(x)):
            torch.testing.assert_close(its(x, "b"), net(x, "b"), rtol=1e-10, atol=1e-10)
    assert ba2ps.switched_layers(small)["a"].in_channels < 8
    assert ba2ps.usage(small, "params") == ba2ps.usage(net, "params") and ba2ps.macs(small) == ba2ps.macs(net)


def test_shared_layers_without_switches_count_in_full_and_stay():
    net = randomised(ba2ps.add_switches(KEPT["hidden layers"], {"a": 3}, "photos", 16))
    convs = {"stem": 8 * 3 * 9, "a": 8 * 8 * 9, "b": 8 * 8, "up": 8 * 8 * 4}  # weights
    weights = sum(convs.values()) + 4 * 8 + 2 * 8 + 8 * 8 + 8               # biases, group norm, hidden layer
    macs = (convs["stem"] + convs["a"]) * 14 ** 2 + (convs["b"] + convs["up"]) * 15 ** 2 + 8 * 8
    on = {name: layer.read("a").sum().item() for name, layer in ba2ps.switched_layers(net).items()}
    assert sum(ba2ps.table(net).values()) == weights and ba2ps.macs(net) == macs
    off = sum(convs[name] * (1 - on[name] / 8) for name in on)
    assert ba2ps.usage(net, "params")["a"] == pytest.approx(1 - off / weights)
    small = ba2ps.prune(net)
    left = sum(p.numel() for name, p in small.named_parameters()
               if "switches" not in name and name.split(".")[0] not in ("norm", "flat", "last"))
    rows = sum(small.get_submodule(name)["a"].num_features for name in ("norm", "flat"))
    assert prune.stored_params(small) == pytest.approx((left + 4 * rows + 8 * len(on) / 32) / weights)


def test_a_layer_that_nobody_reads_keeps_a_channel_and_its_place():
    plain = Net(lambda n, x: n.wide(torch.cat([n.one(x), x], 1)))
    net = ba2ps.add_switches(plain, {"a": 3}, "photos", 16).eval()
    net.get_submodule("wide").switches["a"].data[0] = -1  # all that `one` makes
    small, x = ba2ps.prune(net), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(small(x, "a"), net(x, "a"))
    assert ba2ps.masks(small).keys() == ba2ps.masks(net).keys()
    assert ba2ps.sparsity(small) == ba2ps.sparsity(net)


def branch(net, x):
    return x + 1 if net.training else x


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def with_layer(net, name, layer):
    setattr(net, name, layer)
    return net


REFUSED = {
    "b is not the same .* in evaluation": Net(lambda n, x: x.view(x.shape).relu_() + n.b(x)),
    "b is not the same .* in training": Net(lambda n, x: n.b(branch(n, x))),
    "drawn.running_mean changes in training": Net(lambda n, x: n.b(n.drawn(x))),
    "b is called twice": Net(lambda n, x: n.b(n.b(x))),
    "b is called twice or is a subclass": with_layer(Net(lambda n, x: n.b(x)), "b", Standardised(8, 8, 1)),
    "its output, logits": Net(end=lambda logits, x: (logits, x)),
    "torch.fx cannot follow": Net(lambda n, x: n.b(x) if x.sum() > 0 else x),
    "an nn.Linear at its end": with_layer(Net(), "last", nn.Identity()),
    "cannot run on 16 pixels": with_layer(Net(), "last", nn.Linear(9, 5))}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line_with_the_layer(message):
    with pytest.raises(ba2ps.InputError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        ba2ps.add_switches(REFUSED[message], {"a": 3}, "photos", 16)


def test_auxiliary_classifiers_are_left_out_whatever_they_draw():
    net, x = ba2ps.add_switches(Auxiliary(), {"a": 3}, "photos", 16), torch.randn(2, 3, 16, 16)
    assert net.train()(x, "a").shape == net.eval()(x, "a").shape == (2, 3)
    assert not hasattr(net, "hidden")


def test_networks_without_a_classifier_or_batch_norm_say_so():
    for name in ("squeezenet1_1", "vit_b_16"):
        with pytest.raises(ba2ps.InputError, match="needs"):
            ba2ps.add_switches(models.get_model(name), {}, "photos", 224)
    with pytest.warns(UserWarning, match="no batch-norm"):
        ba2ps.add_switches(with_layer(Net(), "norm", nn.Identity()), {}, "photos", 16)


X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of noisy images of two colours, of three domains, and in a file beside a resnet18's weights."""
    root, noise = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for domain, split in ((d, s) for d in ("photos", "signs", "digits") for s in ("train", "val", "test")):
        for label, i in ((label, i) for label in range(2) for i in range(4)):
            path = root / domain / split / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(64, (3, 40, 40), generator=noise) + 150 * label
            torchvision.utils.save_image(pixels / 255, path)
    torch.save(build("resnet18", 2).state_dict(), root.with_suffix(".pt"))
    return root


def test_scripts_take_a_network_of_torchvision_folders_and_a_later_domain(
        photos, tmp_path, script, monkeypatch):
    def half(name, weights=None, num_classes=2):  # of resnet18: half of its blocks
        return models.ResNet(models.resnet.BasicBlock, [1] * 4, num_classes)

    def run(name, *words):
        code, out, err = script(name, *words)
        assert code == 0, err
        return out
    common = ["--data", photos, *"--epochs 1 --batch-size 4 --recipe settled --budget 0.5 --lr 0.01".split()]
    given = "--network", "resnet18", "--weights", tmp_path / "w.pt", "--source", "photos"
    torch.save(half("").state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(models, "get_model", half)
    run("train.py", *common, *given, "--image-size", 32, "--domains", "signs", "--out", tmp_path / "first")
    model, small, later = tmp_path / "first/model.pt", tmp_path / "small.pt", tmp_path / "later/model.pt"
    network, facts = ba2ps.load(model)
    assert (network.name, network.options, network.domains) == ("resnet18", {"num_classes": 2}, ["signs"])
    assert "signs" in run("prune.py", model, "--out", small, "--no-latency")
    for start, first in ((model, network), (small, ba2ps.load(small)[0])):  # finished, pruned or not
        run("train.py", *common, "--start-from", start, "--domains", "digits", "--out", later.parent)
        both, known = ba2ps.load(later)
        assert both.domains == ["signs", "digits"] and known["domains"].keys() >= {*both.domains}
        assert torch.equal(both.eval()(X, "signs"), first.eval()(X, "signs"))  # bit for bit
        assert both.pruned == (start == small) and ba2ps.usage(both, "channels")["digits"] <= 0.5 + 1e-9
        for name, on in ba2ps.masks(both).items():
            assert both.pruned <= bool((on[0] | ~on[1]).all())  # it chose among the channels that are left
    assert "digits" in run("evaluate.py", later, "--skip-source", "--picture", tmp_path / "p.png")
    run("prune.py", later, "--out", tmp_path / "again.pt", "--no-latency")
    again, _ = ba2ps.load(tmp_path / "again.pt")
    torch.testing.assert_close(again.eval()(X, "digits"), both(X, "digits"))
    words = "--start-from", small, "--domains", "digits", "--resume", "--out", later.parent
    assert "nothing to resume" in run("train.py", *common, *words)
    assert str(later) in run("evaluate.py", "--compare", model, later, "--data", photos)


@pytest.mark.parametrize("words, named", [
    (["--network", "squeezenet1_0", "--weights", "none"], "nn.Linear"),
    (["--network", "resnet19"], "--network resnet19"),
    (["--network", "resnet18", "--weights", "no.pt"], "no.pt"), (["--weights", "no.pt"], "--weights"),
    (["--network", "resnet18", "--weights", "OTHER"], "OTHER"), (["--network", "WRN-10-x"], "WRN-10-x"),
    (["--network", "mobilenet_v2", "--weights", "WEIGHTS"], "WEIGHTS"),
    (["--domains", "cats"], "cats")])
def test_bad_networks_and_weights_are_named_and_nothing_is_written(words, named, photos, tmp_path, refused):
    places = {"WEIGHTS": photos.with_suffix(".pt"), "OTHER": photos / "signs/test/class 0/0.png"}
    words = [places.get(word, word) for word in words]
    common = "--data", photos, "--source", "photos", "--image-size", 32, "--out", tmp_path / "run"
    refused("train.py", *common, *words, named=places.get(named, named))
    assert not (tmp_path / "run").exists()


def test_default_weights_are_those_that_torchvision_keeps(tmp_path, monkeypatch):
    plain = models.shufflenet_v2_x0_5()
    url = models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(plain.state_dict(), tmp_path / "hub/checkpoints" / url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", None)
    found, options = train.pretrained(argparse.Namespace(network="shufflenet_v2_x0_5", weights="DEFAULT"))
    assert options == {"num_classes": 1000}
    torch.testing.assert_close(found.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_network_of_ones_own_needs_it_again_and_the_same(tmp_path):
    net, other = ba2ps.add_switches(Net(), {"a": 3}, "photos", 16), Net(channels=1)
    for saved in (net, ba2ps.prune(net)):
        ba2ps.save(tmp_path / "m.pt", saved, note="x")
        for backbone, said in ((None, "backbone=Net"), (other, "m.pt"), (build("resnet18"), "m.pt")):
            with pytest.raises(ba2ps.InputError, match=rf"\A[^\n]*{said}[^\n]*\Z"):
                ba2ps.load(tmp_path / "m.pt", backbone)
        again, facts = ba2ps.load(tmp_path / "m.pt", Net())
        assert facts == {"note": "x"} and torch.equal(again.eval()(X, "a"), saved.eval()(X, "a"))


def test_the_loop_of_the_readme_as_printed(photos, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    plain = models.resnet18()
    monkeypatch.setattr(models, "resnet18", lambda weights=None: plain)  # nothing is fetched here
    assert code.count("\n") <= 35 and "loaders = 20" in code
    space = {}
    exec(code.replace("loaders = 20", "loaders = 2").replace("224", "64"), space)
    small, x = space["small"], torch.randn(2, 3, 64, 64)
    assert all(use <= 0.5 + 1e-9 for use in ba2ps.usage(small, "channels").values())
    again, _ = ba2ps.load("small.pt", backbone=plain)
    program = torch.export.load("signs.pt2").module()
    for its in (again.eval()(x, "signs"), program(x), space["signs"](x)):
        torch.testing.assert_close(its, small.eval()(x, "signs"), rtol=1e-4, atol=1e-4)
