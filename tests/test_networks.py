# SPDX-License-Identifier: MIT
"""Networks of others: gradients, what is kept, pruned, stored and refused; and many at random."""
import copy
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import ba2ps
import prune
import tests.efficientnet_lite0      # registers it with torchvision
from tests.test_ba2ps import (
    NORMS, cases, channels_on, close, grad, parts_of, randomised, refused, straight_through)

def by_hand(net, backbone, domain):
    """A copy of `backbone` with what `domain` owns; hooks multiply what convolutions read."""
    its = copy.deepcopy(backbone).double().requires_grad_(False).train(net.training)
    for name in net.owned:
        its.set_submodule(name, net.layer(name)[domain])
    for name, part in parts_of(net, domain).items() if domain in net.switches else ():
        s = straight_through(part).view(-1, 1, 1)
        its.get_submodule(name).register_forward_pre_hook(lambda conv, x, s=s: x[0] * s)
    return its


@cases("make", [
    lambda: ba2ps.WideResNet(10, 1), models.resnet18, models.mobilenet_v3_small,
    lambda: models.DenseNet(8, (3, 3), 16)])
def test_gradients_of_the_whole_loss_by_hand(make):
    backbone = make()
    net = ba2ps.MultiDomain(backbone, {"a": 3, "b": 4}, "photos", 32)
    randomised(net, 0.7).double().train()
    images = dict(zip("ab", torch.randn(2, 4, 3, 32, 32).double()))
    y = torch.arange(4) % 3
    multiplier = {"a": 2.0, "b": 0.7}

    torch.manual_seed(1)                    # dropout
    cost, _ = ba2ps.costs(net)
    s = ba2ps.binarized(net)
    loss = 0.3 * ba2ps.sharing_loss(s, 0.8)
    for domain, usage in zip(net.domains, s @ cost):
        loss = loss + F.cross_entropy(net(images[domain], domain), y)
        loss = loss + ba2ps.budget_loss(usage, 0.2, multiplier[domain])
    loss.backward()

    torch.manual_seed(1)
    on = {domain: (row > 0).double() for domain, row in net.switches.items()}
    most = 0.8 * len(on["a"])
    total = 0.3 * (1 - float(on["a"] @ on["b"]) / most)
    for domain, other in ("ab", "ba"):
        owned = [net.switches[domain], *net.owned_parameters([domain])]
        part = F.cross_entropy(by_hand(net, backbone, domain)(images[domain]), y)
        hand = list(grad(part, owned))
        layers = parts_of(net, domain).values()
        shares = [torch.ones_like(layer) / len(layer) / len(layers) for layer in layers]
        share = torch.cat(shares)
        hand[0] = hand[0] + multiplier[domain] * share          # Eq. 4
        hand[0] = hand[0] - 0.3 * on[other] / most              # Eq. 5
        close([p.grad for p in owned], hand, rtol=1e-10, atol=1e-10)
        total += part.item() + multiplier[domain] * (float(share @ on[domain]) - 0.2)
    assert loss.item() == pytest.approx(total, rel=1e-10)


def stored_and_loaded(net, x, backbone, path):
    """Equal to the bit."""
    ba2ps.save(path, net, state="fact")
    again, facts = ba2ps.load(path, backbone)
    assert facts == {"state": "fact"}
    for domain in net.classes:
        assert torch.equal(again.eval()(x, domain), net(x, domain))


class Net(nn.Module):
    """Two convolutions and a classifier with `body` between them, and the layers that it calls."""

    def __init__(self, body=lambda net, x: x, channels=3, end=lambda logits: logits, **layers):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 5)
        self.body = body
        self.end = end
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        x = self.norm(self.a(self.stem((x - 0.45) / 0.22)))
        return self.end(self.last(self.body(self, x).mean((2, 3))))


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Auxiliary(Net):
    def forward(self, x):
        x = self.norm(self.a(self.stem(x)))
        logits = self.last(x.mean((2, 3)))
        return (logits, self.head(self.body(self, x).mean((2, 3)))) if self.training else logits


def shuffle(x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def conv(channels=8, out=8):
    return nn.Conv2d(channels, out, 1)


KEPT = {
    "a shortcut reads what a ReLU left": Net(
        lambda n, x: x + n.b(n.r(x)), b=conv(), r=nn.ReLU(True)),
    "or what a method of a view left": Net(lambda n, x: x.view(x.shape).relu_() + n.b(x), b=conv()),
    "hidden layers": Net(
        lambda n, x: n.flat(n.hidden(n.b(n.up(n.group(x))).mean((2, 3))))[..., None, None],
        b=conv(), up=nn.ConvTranspose2d(8, 8, 2), group=nn.GroupNorm(2, 8),
        hidden=nn.Linear(8, 8), flat=nn.BatchNorm1d(8)),
    "dropout": Net(
        lambda n, x: F.dropout(n.b(n.drop(n.path(x))), 0.5, n.training), b=conv(),
        drop=nn.Dropout(0.5, inplace=True), path=torchvision.ops.StochasticDepth(0.5, "row")),
    "attention that broadcasts": Net(
        lambda n, x: n.b(x + n.one(x) * x.mean(1, keepdim=True)), b=conv(), one=conv(8, 1)),
    "moved channels": Net(
        lambda n, x: n.wide(torch.cat([x[:, 3:], shuffle(x).chunk(2, 1)[1]], 1)), wide=conv(9)),
    "grey images": Net(lambda n, x: n.b(x), channels=1, b=conv()),
    "a branch on training": Net(lambda n, x: n.b(x + 1 if n.training else x), b=conv()),
    "subclasses": Net(lambda n, x: n.b(n.c(x)), b=Standardised(8, 8, 1),
                      c=parametrizations.weight_norm(conv())),
    "auxiliary classifiers": Auxiliary(lambda n, x: n.b(x), b=conv(), head=nn.Linear(8, 2))}


INVERTED = models.mobilenetv3.InvertedResidualConfig
REGNET = models.regnet.BlockParams.from_init_params(5, 16, 16.0, 2.0, 8, 0.25)
KEPT |= {   # torchvision's, of a few blocks
    "ResNet": models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], 6),
    "DenseNet": models.DenseNet(8, (3, 3), 16, 2, 0.5, 6),
    "MobileNetV2": models.MobileNetV2(6, 0.5, [[1, 16, 1, 1], [6, 24, 2, 2]]),
    "ShuffleNetV2": models.ShuffleNetV2([2, 1, 1], [8, 16, 32, 32, 64], 6),
    "RegNet": models.RegNet(REGNET, 6),
    "MobileNetV3": models.MobileNetV3(
        [INVERTED(16, 3, 16, 16, True, "RE", 2, 1, 1), INVERTED(16, 5, 40, 24, True, "HS", 2, 1, 1),
         INVERTED(24, 3, 64, 24, False, "HS", 1, 1, 1)], 32, 6),
    "EfficientNet": models.EfficientNet(
        [models.efficientnet.MBConvConfig(6, 3, 2, 16, 24, 2)], 0.2, num_classes=6)}


@cases("kind", KEPT)
def test_the_source_is_that_of_the_plain_network_and_pruning_is_exact(kind, tmp_path):
    plain = copy.deepcopy(KEPT[kind]).double()
    size = 16 if isinstance(plain, Net) else 32
    net = ba2ps.MultiDomain(plain, {"a": 3, "b": 4}, "photos", size)
    x = torch.randn(4, 1 if kind == "grey images" else 3, size, size).double()
    for training in (False, True, False):
        outputs = []
        for run in (plain.train(training), lambda x: net.train(training)(x, "photos")):
            torch.manual_seed(0)
            out = run(x)
            outputs.append(out[0] if isinstance(out, tuple) else out)
        assert torch.equal(*outputs)
    randomised(net, 0.4)
    net.switches["a"].data.copy_(net.switches["b"])
    small = ba2ps.prune(net)
    for logits in (small(x, "b"), prune.dense(small, "b")(x)):
        close(logits, net(x, "b"), rtol=1e-9, atol=1e-9)
    on = {name: int((part > 0).sum()) for name, part in parts_of(net, "b").items()}
    assert {name: small.layer(name).in_channels for name in small.layers} == on
    weights = []
    for its in (small, net):
        convs = [m for m in its.modules() if isinstance(m, nn.Conv2d)]
        weights.append(sum(conv.weight.numel() for conv in convs))
        stored_and_loaded(its, x, KEPT[kind], tmp_path / "m.pt")
    assert weights[0] < (0.5 if kind.endswith("Net") else 0.8) * weights[1]     # filters go, too
    assert ba2ps.usage(small, "params") == pytest.approx(ba2ps.usage(net, "params"))
    assert ba2ps.macs(small) == ba2ps.macs(net)


def test_efficientnet_lite0_has_its_published_size_and_torchvision_knows_it():
    net = models.get_model("efficientnet_lite0", num_classes=1000).eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_652_008
    with FlopCounterMode(display=False) as counter:
        logits = net(torch.zeros(1, 3, 224, 224))
    assert logits.shape == (1, 1000)
    assert counter.get_total_flops() / 2 == pytest.approx(0.4e9, rel=0.05)


def test_what_torch_fx_cannot_follow_is_trained_and_stored_and_prune_names_it(tmp_path):
    plain = Net(lambda n, x: n.b(x) if x.sum() > 0 else n.b(-x), b=conv())
    net = randomised(ba2ps.MultiDomain(plain, {"a": 3}, "photos", 16))
    x = torch.randn(4, 3, 16, 16)
    assert grad(net(x, "a").sum(), net.switches["a"])[0].abs().sum() > 0
    stored_and_loaded(net, x, plain, tmp_path / "m.pt")
    for other, said in ((None, "backbone=Net"), (Net(), "m.pt")):
        with refused(said):
            ba2ps.load(tmp_path / "m.pt", other)
    with refused("Net", "torch.fx cannot follow"):
        ba2ps.prune(net)
    net.backbone.body = lambda n, x: n.b(F.dropout(x))      # draws random numbers in evaluation too
    with refused("Net", "a has other logits"):
        ba2ps.prune(net)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = torch.zeros(())

    def forward(self, x):
        self.seen += self.training
        return x


REFUSED = {
    "b is called twice": Net(lambda n, x: n.b(n.b(x)), b=conv()),
    "n is called twice": Net(lambda n, x: n.n(n.n(x)), n=nn.BatchNorm2d(8)),
    "last is called twice": Net(lambda n, x: n.last(x.mean((2, 3)))[..., None, None],
                                last=nn.Linear(8, 8)),
    "b is never called": Net(b=conv()),
    "n is never called": Net(n=nn.BatchNorm2d(8)),
    "c.seen changes in training": Net(lambda n, x: n.c(x), c=Counts()),
    "its output, logits": Net(end=lambda logits: (logits, logits)),
    "needs an nn.Linear at its end": Net(last=nn.Identity()),
    "cannot run on 16 pixels": Net(last=nn.Linear(9, 5)),
    "reads another layer's channels": nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))}


@cases("message", REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line_with_the_layer(message):
    with refused(message):
        ba2ps.MultiDomain(REFUSED[message], {"a": 3}, "photos", 16)


def test_shared_layers_without_switches_count_in_full():
    net = randomised(ba2ps.MultiDomain(KEPT["hidden layers"], {"a": 3}, "photos", 16))
    convs = {"stem": 8 * 3 * 9, "a": 8 * 8 * 9, "b": 8 * 8, "up": 8 * 8 * 4}            # weights
    weights = sum(convs.values()) + 4 * 8 + 2 * 8 + 8 * 8 + 8       # biases, group norm, hidden
    left = weights
    for name, part in parts_of(net, "a").items():
        left -= convs[name] * (part <= 0).double().mean().item()
    assert ba2ps.usage(net, "params")["a"] == pytest.approx(left / weights)
    macs = (convs["stem"] + convs["a"]) * 14 ** 2 + (convs["b"] + convs["up"]) * 15 ** 2 + 8 * 8
    assert ba2ps.macs(net) == macs
    grey = ba2ps.MultiDomain(KEPT["grey images"], {"a": 3}, "photos", 16)
    assert ba2ps.macs(grey) == (8 * 9 + 8 * 8 * 9 + 8 * 8) * 14 ** 2


NAMES = ["conv", "conv_1", "a", "a_1", "select", "select_1", "x", "relu", "_tensor_constant0",
         "code", "backbone", "name", "kept", "switches", "images", "graph", "domain", "source",
         "add", "meta"]
DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16,
          torch.bfloat16, torch.float32, torch.float64]


class Times(nn.Module):
    """Multiplies by a tensor: a buffer, saved or not, an attribute, made in forward."""

    def __init__(self, draw, channels):
        super().__init__()
        self.kind = draw.choice(["buffer", "unsaved", "attribute", "forward", "order"])
        self.values = [[[draw.randint(0, 3)]] for _ in range(channels)]
        value = torch.tensor(self.values, dtype=draw.choice(DTYPES))
        if self.kind == "order":
            value = torch.randperm(channels)
        if self.kind in ("order", "attribute"):
            self.value = value
        else:
            self.register_buffer("value", value, persistent=self.kind == "buffer")

    def forward(self, x):
        if self.kind == "order":
            return x[:, self.value]
        value = torch.tensor(self.values) if self.kind == "forward" else self.value
        if value.dtype == torch.bool:
            return torch.where(value, x, 0.5)
        return x * value.to(x.dtype)


class Beside(nn.Module):
    """A parameter beside a layer, under a name that a flat network might give to its own."""

    def __init__(self, channels):
        super().__init__()
        self.a = conv(channels, channels)
        self.a_weight = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x):
        return self.a(x) * self.a_weight


class Join(nn.Module):
    """x + f(x), or both beside each other, or f(f(x))."""

    def __init__(self, kind, body):
        super().__init__()
        self.kind = kind
        self.body = body

    def forward(self, x):
        once = self.body(x)
        if self.kind == "twice":
            return self.body(once)
        return x + once if self.kind == "add" else torch.cat([x, once], 1)


def sample(draw, c, depth):
    """(a layer at random that reads c channels, the number of channels that it makes)"""
    bias = draw.random() < 0.5
    kind = draw.randrange(10)
    if kind < 2:
        out = draw.choice([4, 6, 8])
        stride = draw.choice([1, 2]) if depth else 1
        return nn.Conv2d(c, out, 3, stride, 1, bias=bias), out
    if kind == 2:
        return nn.Conv2d(c, 2 * c, 3, padding=1, groups=draw.choice([2, c]), bias=bias), 2 * c
    if kind == 3:
        return Beside(c), c
    if kind == 4:
        return Times(draw, c), c
    if kind < 7:
        return draw.choice([
            nn.BatchNorm2d(c), nn.BatchNorm2d(c, affine=False), nn.GroupNorm(2, c),
            nn.BatchNorm2d(c, track_running_stats=False), nn.InstanceNorm2d(c, affine=True),
            nn.InstanceNorm2d(c, track_running_stats=True)]), c
    if kind == 7 or not depth:
        return draw.choice([
            nn.ReLU(True), nn.PReLU(c), nn.Dropout(0.1), nn.Identity(), nn.AvgPool2d(3, 1, 1)]), c
    body, out = sample(draw, c, 0)
    kind = draw.choice(["add", "cat", "twice"]) if out == c else "cat"
    return Join(kind, body), c + out if kind == "cat" else c


class Sampled(nn.Module):
    """A network at random."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)]
        channels = 8
        for _ in range(draw.randint(2, 6)):
            layer, channels = sample(draw, channels, 1)
            layers.append(layer)
        self.order = draw.sample(NAMES, len(layers))
        for name, layer in zip(self.order, layers):
            if draw.random() < 0.3:         # its name has a dot and a digit: conv.1 beside conv_1
                layer = nn.Sequential(nn.Identity(), layer)
            self.add_module(name, layer)
        self.empty = draw.choice([nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList])()
        self.last = nn.Linear(channels, 5, bias=draw.random() < 0.5)
        if draw.random() < 0.3:
            self.last = parametrizations.weight_norm(self.last)

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return self.last(x.mean((2, 3)))


def check(seed, path):
    """Adapted, pruned, dense, saved, loaded: equal, or refused by the layer's name."""
    torch.manual_seed(seed)
    plain = Sampled(seed).double().eval()
    x = torch.randn(2, 3, 10, 10).double()
    for name, join in plain.named_modules():
        twice = isinstance(join, Join) and join.kind == "twice"
        if twice and any(isinstance(layer, (nn.Conv2d, NORMS)) for layer in join.modules()):
            with refused(f"{name}.body", "is called twice"):
                ba2ps.MultiDomain(plain, {"a": 3, "b": 2}, "photos", 10)
            return 0
    net = ba2ps.MultiDomain(plain, {"a": 3, "b": 2}, "photos", 10)
    assert torch.equal(net(x, "photos"), plain(x))
    small = ba2ps.prune(randomised(net))
    expected = net(x, "b")
    near = 1e-9 * expected.abs().max().item()
    for logits in (small(x, "b"), prune.dense(small, "b")(x)):
        close(logits, expected, rtol=1e-9, atol=near)
    stored_and_loaded(small if seed % 4 else net, x, Sampled(seed), path)
    return 1


def test_networks_at_random_give_the_same_or_are_refused_by_name(tmp_path):
    assert 150 < sum(check(seed, tmp_path / "m.pt") for seed in range(200)) < 200
