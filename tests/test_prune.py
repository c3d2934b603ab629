# SPDX-License-Identifier: MIT
"""Pruning: the same logits with less, for any masks and other networks; files, dense networks, exports."""
import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ba2ps
import prune

SHAPES = (2, 3, 16, 16), (1, 3, 25, 39)


def network(domains=2, depth=10, widen_factor=1, share=0.4, kind="own"):
    net = ba2ps.WideResNet(depth, widen_factor, "source", 7)
    for i in range(domains):
        net.add_domain(f"d{i}", 5 + i)
    return randomised(net, share, kind)


@torch.no_grad()
def randomised(net, share, kind="own"):
    """`net` in eval mode, with random batch-norm, and a random share of the switches of every layer on."""
    for norm in modules(net, nn.BatchNorm2d).values():
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    number = len(net.domains)
    for layer in ba2ps.switched_layers(net).values():
        draw = torch.rand(number, layer.in_channels)
        draw[range(number), range(number)] = 0  # at least one channel each
        on = (draw[:1].expand_as(draw) if kind == "identical" else draw) <= share
        if kind == "disjoint":
            on &= torch.arange(layer.in_channels) % number == torch.arange(number)[:, None]
        for domain, mask in zip(net.domains, on):
            layer.switches[domain].copy_(mask.float() - 0.5)
    return net.eval()


def modules(net, kind):
    return {name: module for name, module in net.named_modules() if isinstance(module, kind)}


def channels(net):
    return {name: (conv.in_channels, conv.out_channels) for name, conv in modules(net, nn.Conv2d).items()}


def size(net, kind=nn.Conv2d):
    """Parameters of all layers of this kind, switches left out."""
    return sum(p.numel() for module in modules(net, kind).values() for p in module.parameters(recurse=False))


@torch.no_grad()
def assert_same(small, net, domains, shapes=SHAPES):
    """The logits of `small` are those of `net`: to 1e-5, or in float64 to 1e-10."""
    dtype, many = next(net.parameters()).dtype, isinstance(small, (ba2ps.MultiDomain, ba2ps.DomainModules))
    for x in [torch.randn(shape, dtype=dtype) for shape in shapes]:
        for domain in domains:
            expected, bound = net(x, domain), {torch.float: 1e-5, torch.double: 1e-10}[dtype]
            error = ((small(x, domain) if many else small(x)) - expected).abs().max()
            assert error <= bound * max(1, expected.abs().max()), (domain, x.shape, error)


@pytest.mark.parametrize("kind, share, dtype", [
    ("own", 0, torch.double),  # one channel a layer
    ("own", 0.3, torch.float), ("identical", 0.3, torch.double),
    ("disjoint", 0.6, torch.double), ("identical", 1.0, torch.float)])
def test_pruned_and_dense_networks_give_the_logits_of_the_masked_one(kind, share, dtype):
    net = network(3, 16, 1, share, kind).to(dtype)
    small = ba2ps.prune(net)
    assert_same(small, net, net.domains)
    assert_same(prune.specialise(small), net, net.domains)
    assert_same(prune.dense(net, "d1"), net, ["d1"])  # without pruning first
    again = ba2ps.prune(small, ["d2"])
    assert_same(again, net, ["d2"])
    assert channels(again) == channels(ba2ps.prune(net, ["d2"]))  # in two steps as in one
    for name, on in ba2ps.masks(net, ["d2"]).items():
        assert torch.equal(ba2ps.masks(again)[name], on)


@torch.no_grad()
def brute_force(net, domains):
    """{convolution: (input channels, filters)} whose change, alone, changes some domain's logits."""
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    expected = [net(x, domain) for domain in domains]

    def matters(part):
        before = part.clone()
        part += torch.randn_like(part)
        changed = any(not torch.equal(net(x, domain), logits) for domain, logits in zip(domains, expected))
        part.copy_(before)
        return changed
    return {name: (sum(map(matters, conv.weight.transpose(0, 1))), sum(map(matters, conv.weight)))
            for name, conv in modules(net, nn.Conv2d).items()}


def test_exactly_what_cannot_change_any_logit_is_gone():
    net = network(2, share=0.2).double()
    for norm in modules(net, nn.BatchNorm2d).values():
        norm.weight.data.mul_(0.1)  # no ReLU is shut for all inputs: what is read does matter
        norm.bias.data.add_(30)
    for domains in (["d0", "d1"], ["d1"]):
        assert channels(ba2ps.prune(net, domains)) == brute_force(net, domains)


class Odd(nn.Module):
    """What the pass does not know reads all: a product, a concatenation, a grouped convolution, a view."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.grouped, self.bn, self.c = nn.Conv2d(8, 8, 1, groups=4), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.relu, self.drop, self.norm = nn.ReLU(inplace=True), nn.Dropout(), nn.BatchNorm2d(8)
        self.d, self.e = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 8, 1)
        self.f, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = self.stem(x)
        z = self.b(torch.cat([self.a(x) * x.sigmoid(), x], 1))
        x = self.c(F.relu(self.bn(self.grouped(z))))
        y = self.drop(x)        # in eval mode the same tensor
        y = self.d(F.relu(y))   # must not be written into: x is read again
        y += self.norm(x)       # not to be folded into c either
        y = self.e(self.relu(z + y + x))  # z is whole, and in the order that it had
        y = self.f(y.mean((2, 3), keepdim=True)) + y  # nor may the sum be written into a single pixel
        return self.head(F.adaptive_avg_pool2d(y, 2).view(-1, 32))  # in channels-last there is no such view


def test_operations_unknown_to_the_pass_are_left_whole():
    for share in (0.9, 0.5, 0.25):
        net = ba2ps.add_switches(Odd().eval().double(), {"a": 3, "b": 4}, "photos", 16)
        small = ba2ps.prune(randomised(net, share))
        for pruned in (small, prune.specialise(small)):
            assert_same(pruned, net, net.domains)
        assert_same(prune.dense(net, "photos"), net, ["photos"])
    assert small.get_submodule("d").in_channels < 8 == small.get_submodule("e").out_channels


def test_the_dense_network_is_plain_and_has_only_the_domains_own_channels():
    net = network(2, 10, 2)
    for given in (net, ba2ps.prune(net)):
        model = prune.dense(given, "d1")
        assert [type(module) for module in model.children()] == [nn.Linear]  # what is read is a slice
        weights = {name: p for name, p in model.named_parameters() if p.dim() == 4}
        assert not any(p.requires_grad for p in model.parameters())
        for name, on in ba2ps.masks(net, ["d1"]).items():
            assert weights[f"{name.replace('.', '_')}_weight"].shape[1] == on.sum()
    sides = {name: 32 >> (int(name[5]) if name.startswith("block") else 0) for name in weights}
    assert prune.dense_macs(model, 32) == sum(p.numel() * sides[name]**2 for name, p in weights.items())


class Dropping(ba2ps.WideResNet):
    def forward(self, x, domain):
        return super().forward(F.dropout(x, 0.5, self.training), domain)


def test_a_network_in_training_mode_becomes_dense_as_it_is_evaluated():
    net = Dropping(10, 1, "source", 7)
    model = prune.dense(net.train())
    assert_same(model, net.eval(), ["source"])


@pytest.mark.parametrize("kind", ["own", "identical"])
def test_training_without_unused_channels_gives_the_same_weights_and_statistics(kind):
    trained, whole = ["d0", "d1"], network(3, share=0.3, kind=kind).double().train()
    whole.freeze_backbone()
    quick = copy.deepcopy(whole)
    for net, forward in ((whole, whole), (quick, ba2ps.without_unused(quick, trained))):
        sgd, draw = torch.optim.SGD(net.owned_parameters(trained), 0.1, momentum=0.9), torch.manual_seed(1)
        for domain, classes in [("d0", 5), ("d1", 6)] * 3:
            x, y = torch.randn(4, 3, 16, 16, dtype=torch.double), torch.randint(classes, (4,))
            sgd.zero_grad()
            F.cross_entropy(forward(x, domain), y).backward()
            sgd.step()
    for (name, p), value in zip(whole.named_parameters(), quick.parameters()):
        assert torch.allclose(p, value, rtol=1e-9, atol=1e-12), name
    assert_same(quick.eval(), whole.eval(), whole.domains)
    with FlopCounterMode(display=False) as of_whole:
        whole(x, domain)
    with FlopCounterMode(display=False) as of_quick:
        forward(x, domain)
    assert of_quick.get_total_flops() < 0.7 * of_whole.get_total_flops()


def test_stored_params_by_a_loop():
    net = network(2, 16)
    small = ba2ps.prune(net)
    floats = size(small) + 2 * size(small, nn.BatchNorm2d)  # running statistics too
    bits = sum(p.numel() for name, p in net.named_parameters() if "switches" in name)
    assert prune.stored_params(small) == pytest.approx((floats + bits / 32) / size(net))


def test_the_file_is_as_large_as_stored_params_and_classifiers(tmp_path):
    net = network(9, 22, 4, 0.25, "identical")
    small = ba2ps.prune(net)
    ba2ps.save(tmp_path / "m.pt", small)
    floats = prune.stored_params(small) * size(net) + size(small, nn.Linear)
    assert 0.98 < (tmp_path / "m.pt").stat().st_size / (4 * floats) < 1.05
    loaded, _ = ba2ps.load(tmp_path / "m.pt")
    assert prune.stored_params(loaded) == prune.stored_params(small)
    assert_same(loaded.eval(), net, ["d0", "d8"], SHAPES[1:])


def test_the_source_is_kept_on_request_and_costs_the_backbone(tmp_path):
    net = network(2, share=0.2)
    kept = ba2ps.prune(net, ["d0"], keep_source=True)
    assert prune.stored_params(kept) > 1 > prune.stored_params(ba2ps.prune(net, ["d0"]))
    ba2ps.save(tmp_path / "m.pt", kept)
    loaded = ba2ps.load(tmp_path / "m.pt")[0].eval()
    assert loaded.domains == ["d0"] and set(loaded.classifiers) == {"source", "d0"}
    assert_same(loaded, net, ["source", "d0"])
    assert_same(prune.specialise(loaded), net, ["d0", "source", "d0"])
    assert channels(ba2ps.prune(loaded)) == channels(ba2ps.prune(net, ["d0"]))  # and may still go later
    with pytest.raises(ba2ps.InputError, match="d1"):
        prune.dense(kept, "d1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(path, network) of a checkpoint as train.py writes it."""
    torch.manual_seed(0)
    net, path = network(2), tmp_path_factory.mktemp("model") / "model.pt"
    records = {domain: {"classes": [f"class {c}" for c in range(linear.out_features)], "mean": [.4, .5, .6]}
               for domain, linear in net.classifiers.items()}
    for name, each in {"model": net, "backbone": network(0), "pruned": ba2ps.prune(net, ["d1"])}.items():
        ba2ps.save(path.with_name(f"{name}.pt"), each, image_size=32, domains=records)
    ba2ps.save(path.with_name("factless.pt"), net, image_size=32)
    content = path.read_bytes()
    at = content.index(net.conv1.weight.data.numpy().tobytes())
    path.with_name("flipped.pt").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
    whole = torch.load(path.with_name("pruned.pt"), weights_only=True)
    for part, name in (("state", "all"), ("masks", "block1.0.conv1")):
        damaged = {**whole, part: {**whole[part], name: whole[part][name][..., 1:]}}
        torch.save(damaged, path.with_name(f"{part}.pt"))
    return path, net


def test_the_table_and_the_files_of_the_script(model, tmp_path, script):
    path, net = model
    out, one = tmp_path / "p.pt", tmp_path / "d.pt"
    code, printed, err = script("prune.py", path, "--out", out)
    rows = {line.split()[0]: line for line in printed.splitlines() if line.count("->") == 2}
    assert code == 0 and not err and rows.keys() == {"d0", "d1"}
    for domain, row in rows.items():
        on = torch.cat(list(ba2ps.masks(net, [domain]).values()), 1)
        assert row.split()[1] == f"{on.sum()}/{on.numel()}" and row.count("x") == 2
    with pytest.raises(ba2ps.InputError, match="--domain"):
        prune.load_dense(out)
    for words, served in (("", "d0 d1"), ("--keep-source", "d0 d1 source"), ("--domains d0", "d0")):
        code, printed, err = script("prune.py", path, "--out", out, "--no-latency", *words.split())
        assert (code, "latency" in printed, "whole backbone" in printed) == (0, False, "source" in served)
        small, facts = ba2ps.load(out)
        assert set(facts["domains"]) == set(small.classifiers) == set(served.split())
        assert_same(small.eval(), net, served.split())
        stored = f"{'params as stored':34}{prune.stored_params(net):12.3f}{prune.stored_params(small):12.3f}"
        assert stored in printed.splitlines()
    code, printed, err = script("prune.py", path, "--domain", "d1", "--out", one, "--no-latency")
    assert code == 0 and f"prune.load_dense({str(one)!r})" in printed and len([*tmp_path.iterdir()]) == 2
    assert_same(prune.load_dense(one)[0], net, ["d1"])


def test_the_exported_file_runs_in_a_fresh_interpreter_with_torch_alone(model, tmp_path, script):
    path, net = model
    words = "--domain", "d1", "--export", tmp_path / "m.pt2", "--no-latency"
    code, printed, err = script("prune.py", path, *words)
    assert code == 0 and not err and "m.pt2').module()" in printed
    torch.save(torch.randn(5, 3, 32, 32), tmp_path / "x.pt")
    program = ("import sys, torch; extra = {'ba2ps.json': ''}; x = torch.load('x.pt')\n"
               "model = torch.export.load('m.pt2', extra_files=extra).module(); print(extra['ba2ps.json'])\n"
               "torch.save([model(x), model(x[:1])], 'y.pt'); assert 'ba2ps' not in sys.modules")
    out = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    known, x = json.loads(out.stdout), torch.load(tmp_path / "x.pt")
    assert known["domain"] == "d1" and known["image_size"] == 32
    assert known["classes"] == [f"class {c}" for c in range(6)] and known["mean"] == [.4, .5, .6]
    for y, images in zip(torch.load(tmp_path / "y.pt"), (x, x[:1])):
        torch.testing.assert_close(y, net(images, "d1"), atol=1e-5, rtol=1e-5)


BAD = """none.pt --out OUT: none.pt; MODEL: --out; MODEL --out OUT --rounds 8: --rounds; MODEL --out .: write
MODEL --out OUT --domains plants: plants; MODEL --out OUT --domain source: nothing to prune
MODEL --out OUT --domain d0 --keep-source: --keep-source; MODEL --out OUT --export OUT2: --domain
MODEL --out OUT --domain d0 --export no/m.pt2: no/m.pt2; MODEL --out no/m: no/m; state.pt --out OUT: state.pt
pruned.pt --out OUT --domains d0: d0; pruned.pt --out OUT --keep-source: source; masks.pt --out OUT: masks.pt
backbone.pt --out OUT: backbone.pt; factless.pt --out OUT: factless.pt; flipped.pt --out OUT: flipped.pt"""


@pytest.mark.parametrize("line", BAD.replace("\n", "; ").split("; "))
def test_bad_input_gets_one_line_and_exit_code_2(line, model, tmp_path, refused):
    places = {path.name: path for path in model[0].parent.iterdir()}
    places |= {"MODEL": model[0], "OUT": tmp_path / "out.pt", "OUT2": tmp_path / "out.pt2"}
    words, named = line.split(": ")
    refused("prune.py", "--no-latency", *[places.get(word, word) for word in words.split()], named=named)
    assert not list(tmp_path.iterdir())
