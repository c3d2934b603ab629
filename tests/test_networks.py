# SPDX-License-Identifier: MIT
"""Networks of others: what add_switches keeps or refuses, what pruning leaves of them, files, README's script."""
import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import ba2ps
import prune
from conftest import ROOT

NAMES = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0",
         "regnet_y_400mf", "DenseNet")


def build(name):
    if name == "DenseNet":  # a small one, which only its owner can build
        return torchvision.models.DenseNet(8, (3, 3), 16, 2, 0.5, 6)
    return torchvision.models.get_model(name, num_classes=6)


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
    """Share of the MACs of `net` that pruning could leave, by gradients: of every convolution the filters that
    some logit depends on, times the input channels that are on."""
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


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_torchvision_is_trained_pruned_dense_and_stored(name, tmp_path):
    options = {"num_classes": 6}
    net = ba2ps.add_switches(build(name), {"a": 3, "b": 4}, "photos", 64, name, options)
    net, x = randomised(net), torch.randn(2, 3, 64, 64).double()
    net.freeze_backbone()
    before, net = copy.deepcopy(net), net.train()
    switches = ba2ps.Switches(net, ["a"], 0.6, sharing=0)
    sgd, adam = torch.optim.SGD(net.owned_parameters(["a"]), 1e-3), torch.optim.Adam(switches.parameters(), 1e-3)
    switches.begin(["a"], 0.0)
    (F.cross_entropy(net(x, "a"), torch.tensor([0, 1])) + switches.loss(["a"])).backward()
    sgd.step(), switches.step(adam, ["a"])
    with torch.no_grad():
        for domain in net.eval().classifiers:  # nobody else has changed, in any bit
            assert torch.equal(net(x, domain), before(x, domain)) == (domain != "a")
        small = ba2ps.prune(before)
        one = prune.dense(small, "a")
        for its in (small(x, "a"), one(x), prune.dense(before, "a")(x)):
            assert (its - before(x, "a")).abs().max() < 1e-10 * its.abs().max()
        left = prune.dense_macs(one, 64) / prune.dense_macs(prune.dense(before, "photos"), 64)
        for stored in (small, before):
            ba2ps.save(tmp_path / "m.pt", stored.float())
            again, _ = ba2ps.load(tmp_path / "m.pt", build(name) if name == "DenseNet" else None)
            assert torch.equal(again.eval()(x.float(), "a"), stored(x.float(), "a"))
    could = macs_that_matter(before.double(), "a", 64)
    assert could - 1e-9 < left < could + {"regnet_y_400mf": 0.045}.get(name, 0.01)  # there groups go whole


class Net(nn.Module):
    """Two convolutions and a classifier with `body` between them, and layers that it may call."""

    def __init__(self, body=lambda net, x: x, channels=3, before=lambda x: x, end=lambda logits, x: logits):
        super().__init__()
        self.stem, self.norm, self.a = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.b, self.relu, self.drop = nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)
        self.hidden, self.flat, self.group = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)
        self.bare, self.one, self.last = nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 1, 1), nn.Linear(8, 5)
        self.up, self.path = nn.ConvTranspose2d(8, 8, 2), torchvision.ops.StochasticDepth(0.5, "row")
        self.fresh, self.scale = nn.BatchNorm2d(8, track_running_stats=False), nn.Parameter(torch.rand(8, 1, 1))
        self.drawn, self.wide = nn.InstanceNorm2d(8, track_running_stats=True), nn.Conv2d(9, 8, 1)
        self.body, self.before, self.end = body, before, end

    def forward(self, x):
        logits = self.last(self.body(self, self.norm(self.a(self.stem(self.before(x))))).mean((2, 3)))
        return self.end(logits, x)


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
    "a parameter of its own": Net(lambda n, x: n.b(n.scale * x)),
    "moved channels": Net(lambda n, x: n.wide(torch.cat([x[:, 3:], shuffle(x).chunk(2, 1)[1]], 1))),
    "grey images": Net(lambda n, x: n.b(x), channels=1), "log-probabilities": Net(end=lambda y, x: y.log_softmax(1))}


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
    everything = sum(p.numel() for name, p in plain.named_parameters() if not name.startswith("last"))
    shared = sum(ba2ps.table(net).values())
    assert shared <= everything and ba2ps.usage(small, "params") == ba2ps.usage(net, "params")


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


def test_networks_without_a_classifier_or_batch_norm_say_so():
    for name in ("squeezenet1_1", "vit_b_16"):
        with pytest.raises(ba2ps.InputError, match="needs"):
            ba2ps.add_switches(torchvision.models.get_model(name), {}, "photos", 224)
    with pytest.warns(UserWarning, match="no batch-norm"):
        ba2ps.add_switches(with_layer(Net(), "norm", nn.Identity()), {}, "photos", 16)
