# SPDX-License-Identifier: MIT
"""Pruning: the same logits with less, for any masks and networks; files, exports, copies."""
import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

import ba2ps
import prune


@torch.no_grad()
def network(domains=2, backbone=None, share=0.4, kind="own", size=16):
    """Random batch-norm, float64, and about this share of the switches on."""
    names = {f"d{i}": 5 + i for i in range(domains)}
    net = ba2ps.MultiDomain(backbone or ba2ps.WideResNet(10, 1, 7), names, "source", size)
    for norm in norms(net):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        for parameter in norm.parameters():
            parameter.uniform_(-1, 1)
    channel = torch.arange(sum(ba2ps.widths(net)))
    draw = torch.rand(1 if kind == "identical" else domains, len(channel)).expand(domains, -1)
    for i, domain in enumerate(names):
        row = share - draw[i]
        if kind == "disjoint":
            row[channel % domains != i] = -1
        net.switches[domain].copy_(row)
        ba2ps.keep_a_channel(net, [domain])
    return net.double().eval()


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def convs(net):
    modules = net.layer("").named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Conv2d)}


def channels(net):
    return {name: (conv.in_channels, conv.out_channels) for name, conv in convs(net).items()}


@torch.no_grad()
def assert_same(small, net, domains):
    """`small`, which is dense if it takes images alone, has the logits of `net`."""
    x = torch.randn(2, net.channels, 25, 39).to(next(net.parameters()))
    bound = 1e-10 if x.dtype == torch.double else 1e-5
    for domain in domains:
        expected = net(x, domain)
        logits = small(x, domain) if isinstance(small, ba2ps.MultiDomain) else small(x)
        assert (logits - expected).abs().max() <= bound * expected.abs().max(), domain


@pytest.mark.parametrize("kind, share", [
    ("own", 0), ("own", 0.3), ("identical", 0.3), ("disjoint", 0.6), ("identical", 1.0)])
def test_pruned_and_dense_networks_have_the_same_logits(kind, share):
    net = network(3, ba2ps.WideResNet(16, 1, 7), share, kind)
    small = ba2ps.prune(net)
    assert_same(small, net, net.domains)
    for domain in net.domains:
        assert_same(prune.dense(small, domain), net, [domain])
    again = ba2ps.prune(small, ["d2"])      # in two steps as in one
    assert_same(again, net, ["d2"])
    assert channels(again) == channels(ba2ps.prune(net, ["d2"]))


@torch.no_grad()
def test_exactly_what_cannot_change_any_logit_is_gone():
    net = network(share=0.2)
    for norm in norms(net):                 # no ReLU is shut for all inputs: what is read matters
        norm.weight.mul_(0.1)
        norm.bias.add_(30)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    for domains in (["d0", "d1"], ["d1"]):
        expected = [net(x, domain) for domain in domains]

        def matters(part):
            before = part.clone()
            part += torch.randn_like(part)
            logits = [net(x, domain) for domain in domains]
            part.copy_(before)
            return not all(map(torch.equal, logits, expected))

        for name, left in channels(ba2ps.prune(net, domains)).items():
            weight = net.layer(name).weight
            assert left == (sum(map(matters, weight.transpose(0, 1))),
                            sum(map(matters, weight))), name


class Odd(nn.Module):
    """Operations that are not known, in place; names that meet; tensors of all kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1, bias=False))
        self.conv_1 = nn.Conv2d(8, 8, 1)
        self.conv_1_weight = nn.Parameter(torch.randn(8, 1, 1))
        self.relu = nn.GELU()               # it is none
        self.grouped = nn.Conv2d(8, 8, 1, groups=4)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.d = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.e = nn.Conv2d(8, 8, 1)
        self.last = nn.Sequential(nn.PReLU(8), nn.GroupNorm(2, 8), nn.ReLU(inplace=True))
        self.fc = weight_norm(nn.Linear(32, 5))
        self.register_buffer("order", torch.randperm(8))
        self.register_buffer("gate", torch.rand(8, 1, 1) > 0.5)
        self.register_buffer("shift", torch.rand(8, 1, 1).half(), persistent=False)
        self.scale = torch.rand(8, 1, 1)    # an attribute

    def forward(self, x):
        x = self.stem(F.dropout(x, 0.5, self.training))
        z = self.conv[1](torch.cat([self.conv[0](x) * x.sigmoid(), self.relu(x)], 1))
        x = self.conv_1(F.relu(self.bn(self.grouped(z)))) * self.conv_1_weight
        y = F.dropout(x, 0.5, self.training)    # in eval mode the same tensor
        y = self.d(F.relu(y))                   # so this must not write: x is read again
        y += self.norm(x)
        y = self.e(F.relu(z + y + x, inplace=True))
        y = self.last(y)[:, self.order] * self.scale + self.shift
        y = torch.where(self.gate, y, y + torch.tensor([0.25]))
        return self.fc(F.adaptive_avg_pool2d(y, 2).view(-1, 32))    # no view in channels-last


@pytest.mark.parametrize("share", [0.9, 0.25])
def test_what_is_not_known_is_left_whole_and_tensors_survive(share, tmp_path):
    backbone = Odd()
    net = network(2, backbone, share).train()
    small = ba2ps.prune(net, ["d0"])
    ba2ps.save(tmp_path / "m.pt", small)
    model, _ = prune.load_dense(tmp_path / "m.pt", backbone)
    source = prune.dense(net, "source")
    assert small.layer("e").out_channels == 8
    assert share == 0.9 or small.layer("d").in_channels < 8
    for its in (small.eval(), model, copy.deepcopy(model)):
        assert_same(its, net.eval(), ["d0"])
    assert_same(source, net, ["source"])
    assert prune.dense_macs(model, 16) > 0


def test_the_dense_network_has_only_the_domains_own_channels(tmp_path):
    net = network(backbone=ba2ps.WideResNet(10, 2, 7))
    model = prune.dense(ba2ps.prune(net), "d1")
    assert {type(module) for module in model.children()} <= {nn.Linear, ba2ps.Select}
    macs = 32 * 32 * model.part_conv1_weight.numel()
    for name, on in ba2ps.masks(net, ["d1"]).items():
        weight = getattr(model, f"part_{name.replace('.', '_')}_weight")
        assert weight.shape[1] == on.sum()
        macs += weight.numel() * (32 >> int(name[5])) ** 2      # the side in block1, 2, 3
    assert prune.dense_macs(model, 32) == macs
    torch.save(model, tmp_path / "m.pt")
    assert_same(torch.load(tmp_path / "m.pt", weights_only=False), net, ["d1"])


@pytest.mark.parametrize("kind", ["own", "identical"])
def test_training_without_unused_channels_is_the_same(kind):
    whole = network(3, share=0.3, kind=kind).train()
    whole.freeze_backbone()
    quick = copy.deepcopy(whole)
    flops = []
    for net, run in ((whole, whole), (quick, ba2ps.without_unused(quick, ["d0", "d1"]))):
        sgd = torch.optim.SGD(net.owned_parameters(["d0", "d1"]), 0.1, momentum=0.9)
        torch.manual_seed(1)
        for domain in ["d0", "d1"] * 3:
            x = torch.randn(4, 3, 16, 16, dtype=torch.double)
            sgd.zero_grad()
            with FlopCounterMode(display=False) as counter:
                F.cross_entropy(run(x, domain), torch.randint(5, (4,))).backward()
            sgd.step()
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.7 * flops[0]
    for (name, p), value in zip(whole.named_parameters(), quick.parameters()):
        assert torch.allclose(p, value, rtol=1e-9, atol=1e-12), name
    assert_same(quick.eval(), whole.eval(), whole.domains)


def test_a_pruned_network_is_copied_like_any_module():
    net = network(2).train()
    net.layer("block2").eval()
    small = ba2ps.prune(net)
    order = [name for name, _ in net.layer("").named_parameters() if ".source." not in name]
    copies = [small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))]
    calls = []
    small.layer("block1.0.conv1").register_forward_hook(lambda *_: calls.append(1))
    copies.append(copy.deepcopy(copy.deepcopy(small)))
    x = torch.randn(2, 3, 16, 16).double()
    for its in copies:
        assert its.layer("block1").training and not its.layer("block2").training
        assert [name for name, _ in its.layer("").named_parameters()] == order
        assert torch.equal(its(x, "d1"), small(x, "d1"))
    assert len(calls) == len(copies) + 2    # of the first, once more for itself, and of the last


def test_stored_params_and_the_size_of_the_file(tmp_path):
    net = network(9, ba2ps.WideResNet(22, 4, 7), 0.25, "identical").float()
    small = ba2ps.prune(net)
    floats = 9 * sum(map(len, net.kept.values())) / 32
    floats += sum(conv.weight.numel() for conv in convs(small).values())
    floats += sum(4 * norm.num_features for norm in norms(small))
    whole = sum(conv.weight.numel() for conv in convs(net).values())
    assert prune.stored_params(small) == pytest.approx(floats / whole)
    ba2ps.save(tmp_path / "m.pt", small)
    floats += sum(p.numel() for p in small.layer("fc").parameters())
    assert 0.98 < (tmp_path / "m.pt").stat().st_size / (4 * floats) < 1.15      # names


def test_the_source_is_kept_on_request_and_may_still_go_later(tmp_path):
    net = network(share=0.2)
    alone = ba2ps.prune(net, ["d0"])
    ba2ps.save(tmp_path / "m.pt", ba2ps.prune(net, ["d0"], keep_source=True))
    kept = ba2ps.load(tmp_path / "m.pt")[0].eval()
    assert prune.stored_params(kept) > 1 > prune.stored_params(alone)
    assert_same(kept, net, ["source", "d0"])
    assert channels(ba2ps.prune(kept)) == channels(alone)
    with pytest.raises(ba2ps.InputError, match="d1"):
        prune.dense(kept, "d1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(path, network) of a checkpoint as train.py writes it; others lie beside it."""
    net = network(size=32).float()
    path = tmp_path_factory.mktemp("model") / "model.pt"
    records = {domain: {"classes": "abcdefg"[:number]} for domain, number in net.classes.items()}
    ba2ps.save(path, net, domains=records)
    ba2ps.save(path.with_name("backbone.pt"), network(0), domains=records)
    ba2ps.save(path.with_name("pruned.pt"), ba2ps.prune(net, ["d1"]), domains=records)
    ba2ps.save(path.with_name("factless.pt"), net)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.with_name("flipped.pt").write_bytes(content)
    return path, net


def test_the_tables_and_the_files_of_the_script(model, tmp_path, script):
    path, net = model
    out = tmp_path / "p.pt"
    code, printed, err = script("prune.py", path, "--out", out)
    assert (code, err) == (0, "")
    rows = [line.split() for line in printed.splitlines() if line.count("->") == 2]
    for row, domain in zip(rows, ["d0", "d1"], strict=True):
        on = ba2ps.read(net, domain)
        assert row[:2] == [domain, f"{on.sum()}/{len(on)}"]
    with pytest.raises(ba2ps.InputError, match="--domain"):
        prune.load_dense(out)
    for flags, served in (("--keep-source", ["source", "d0", "d1"]), ("--domain d1", ["d1"])):
        _, printed, _ = script("prune.py", path, "--out", out, "--no-latency", *flags.split())
        small, facts = ba2ps.load(out)
        assert list(facts["domains"]) == list(small.classes) == served
        assert ("whole backbone" if "source" in served else "load_dense") in printed
        stored = f"{prune.stored_params(net):12.3f}{prune.stored_params(small):12.3f}\n"
        assert f"params as stored{stored:>43}" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["p.pt"]
    assert_same(prune.load_dense(out)[0], net, ["d1"])


def test_the_exported_file_runs_with_torch_alone(model, tmp_path, script):
    path, net = model
    words = "--domain", "d1", "--export", tmp_path / "m.pt2", "--no-latency"
    assert script("prune.py", path, *words)[0] == 0
    x = torch.randn(5, 3, 32, 32)
    torch.save(x, tmp_path / "x")
    program = """import sys, torch
x, extra = torch.load("x"), {"ba2ps.json": ""}
model = torch.export.load("m.pt2", extra_files=extra).module()
assert "ba2ps" not in sys.modules
torch.save([extra, model(x), model(x[:1])], "y")"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    extra, *logits = torch.load(tmp_path / "y")
    known = json.loads(extra["ba2ps.json"])
    assert (known["domain"], known["image_size"], known["classes"]) == ("d1", 32, "abcdef")
    for y, images in zip(logits, (x, x[:1])):
        torch.testing.assert_close(y, net(images, "d1"), atol=1e-5, rtol=1e-5)


def branching(block, x, forward=ba2ps.BasicBlock.forward):
    return forward(block, x if x.sum() > 0 else -x)


BAD = """none.pt --out OUT: none.pt
model.pt: --out
model.pt --out .: write
model.pt --out OUT --domain source: nothing to prune
model.pt --out OUT --domain d0 --keep-source: --keep-source
model.pt --domain d0 --export no/m.pt2: no/m.pt2
pruned.pt --out OUT --keep-source: source
backbone.pt --out OUT: backbone.pt
factless.pt --out OUT: factless.pt
flipped.pt --out OUT: flipped.pt"""


@pytest.mark.parametrize("line", [*BAD.splitlines(), "model.pt --out OUT: torch.fx cannot"])
def test_bad_input_gets_one_line_and_exit_code_2(line, model, tmp_path, refused, monkeypatch):
    places = {file.name: file for file in model[0].parent.iterdir()}
    places["OUT"] = tmp_path / "out.pt"
    words, named = line.split(": ")
    if "torch.fx" in named:                 # a branch that depends on the images
        monkeypatch.setattr(ba2ps.BasicBlock, "forward", branching)
    words = [places.get(word, word) for word in words.split()]
    refused("prune.py", "--no-latency", *words, named=named)
    assert not list(tmp_path.iterdir())
