# SPDX-License-Identifier: MIT
"""Pruning: the same logits with less, for any masks and other networks; files, dense networks, exports, bad input."""
import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ba2ps
from ba2ps import InputError
from test_ba2ps import network
from test_scripts import run

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def set_masks(net, kind, share_on, generator):
    """Random masks of all layers: of each domain its own, the same for all, disjoint, or one channel a layer."""
    for layer in ba2ps.switched_layers(net).values():
        draw = torch.rand(len(net.domains), layer.in_channels, generator=generator)
        if kind == "identical":
            draw[:] = draw[0].clone()
        on = draw < share_on
        if kind == "disjoint":
            on &= torch.arange(layer.in_channels) % len(net.domains) == torch.arange(len(net.domains))[:, None]
        if kind == "one channel":
            on = draw == draw.amin(1, keepdim=True)
        for domain, own in zip(net.domains, on):
            layer.switches[domain].data = torch.where(own, 0.1, -draw[0]).to(layer.switches[domain])


def assert_same(small, net, domains, shapes, dtype, call=lambda small, x, domain: small(x, domain)):
    for shape in shapes:
        x = torch.randn(shape, dtype=dtype)
        for domain in domains:
            expected = net(x, domain)
            error = (call(small, x, domain) - expected).abs().max().item()
            assert error <= TOLERANCE[dtype] * max(1, expected.abs().max().item()), (domain, shape, error)


CASES = [("one channel", 0), *((kind, share) for kind in ("own", "identical", "disjoint") for share in (0.05, 0.3, 0.6, 1.0))]


@pytest.mark.parametrize("kind, share_on", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_pruned_and_dense_networks_give_the_logits_of_the_masked_one(kind, share_on, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        net = network(3, (10, 16, 10)[seed], (1, 1, 2)[seed]).to(dtype)
        set_masks(net, kind, share_on, torch.Generator().manual_seed(seed))
        shapes = ((2, 3, 32, 32), (1, 3, 33, 47))
        small = ba2ps.prune(net)
        assert_same(small, net, net.domains, shapes, dtype)
        assert_same(ba2ps.prune(small, ["d2"]), net, ["d2"], shapes[1:], dtype)
        assert_same(ba2ps.prune(net, ["d1"], keep_source=True), net, ["d1", "source"], shapes[1:], dtype)
        assert_same(ba2ps.specialise(small, round_to=(1, 8)[seed % 2]), net, net.domains, shapes, dtype)


def brute_force(net, domains):
    """{convolution: (input channels, filters)} that matter: those whose removal, alone, changes some domain's logits."""
    x, kept = torch.randn(2, 3, 32, 32, dtype=torch.float64), {}
    expected = [net(x, domain) for domain in domains]

    def matters(part):
        before = part.clone()
        part += torch.randn_like(part)
        changed = any(not torch.equal(net(x, domain), logits) for domain, logits in zip(domains, expected))
        part.copy_(before)
        return changed
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            weight = conv.weight.data
            kept[name] = (sum(matters(weight[:, c]) for c in range(weight.shape[1])), sum(map(matters, weight)))
    return kept


@torch.no_grad()
def test_exactly_what_cannot_change_any_logit_is_gone():
    net = network(2, 10, 1, share_on=0.2).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.mul_(0.1)  # no ReLU is shut for all inputs: what is read does matter
            module.bias.add_(30)
    for domains in (["d0", "d1"], ["d1"]):
        small = ba2ps.prune(net, domains)
        left = {name: (conv.in_channels, conv.out_channels) for name, conv in small.named_modules()
                if isinstance(conv, nn.Conv2d)}
        assert left == brute_force(net, domains)
        assert all(norm.num_features == len(norm.running_mean) == len(norm.weight) for norm in small.modules()
                   if isinstance(norm, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
@torch.no_grad()
def test_other_networks_are_pruned_as_exactly(name):
    models = pytest.importorskip("torchvision.models")
    plain = (models.resnet18(num_classes=6) if name == "resnet18" else small_vgg(models)).eval()
    net = ba2ps.add_switches(plain, {"a": 3, "b": 4}, source="photos").eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    for layer in ba2ps.switched_layers(net).values():
        for switches in layer.switches.values():
            switches.data = 0.25 - torch.rand_like(switches)
    x = torch.randn(2, 3, 64, 64)
    trained = copy.deepcopy(plain)
    trained.load_state_dict({key: net.state_dict().get(key, net.state_dict().get(".".join(
        [*key.split(".")[:-1], "photos", key.split(".")[-1]]))) for key in plain.state_dict()})
    torch.testing.assert_close(net(x, "photos"), trained(x))  # the source runs the network it was given
    assert len(ba2ps.switched_layers(net)) == sum(isinstance(m, nn.Conv2d) for m in plain.modules()) - 1
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)
        small, shapes = ba2ps.prune(net), ((2, 3, 64, 64), (1, 3, 33, 47))
        assert_same(small, net, net.domains, shapes, dtype)
        assert_same(ba2ps.specialise(small), net, net.domains, shapes, dtype)
        assert_same(ba2ps.dense(net, "b", round_to=8), net, ["b"], shapes, dtype, lambda small, x, domain: small(x))
    count = [sum(p.numel() for m in n.modules() if isinstance(m, nn.Conv2d) for p in m.parameters(recurse=False))
             for n in (net, small, ba2ps.prune(small, ["b"]))]
    assert count[1] < 0.6 * count[0] and count[2] < 0.6 * count[1]


def small_vgg(models):
    net = models.vgg11_bn(num_classes=6)
    net.avgpool = nn.AdaptiveAvgPool2d((2, 2))  # a narrower head: 120 million weights less
    net.classifier[0], net.classifier[3], net.classifier[6] = nn.Linear(2048, 32), nn.Linear(32, 16), nn.Linear(16, 6)
    return net


class Odd(nn.Module):
    """What the liveness pass does not know reads all: a product, a concatenation, a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.grouped, self.bn = nn.Conv2d(12, 12, 3, groups=4), nn.BatchNorm2d(12)
        self.c, self.relu, self.drop, self.d = nn.Conv2d(12, 8, 1), nn.ReLU(inplace=True), nn.Dropout(), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.a(x) * x.sigmoid(), x], 1)
        x = F.relu(self.bn(self.grouped(self.b(x))))
        x = self.c(x)
        y = self.drop(x)        # in eval mode the same tensor
        y = self.d(F.relu(y))   # must not be written into: x is read again
        y += self.norm(x)       # not to be folded into c either
        y += x
        return self.head(self.relu(y).sum((2, 3)))


@torch.no_grad()
def test_operations_unknown_to_the_pass_are_left_whole():
    for seed in range(5):
        net = ba2ps.add_switches(Odd().eval().double(), {"a": 3, "b": 4}, source="photos").eval()
        set_masks(net, "own", (0.4, 1.0)[seed % 2], torch.Generator().manual_seed(seed))
        small = ba2ps.prune(net)
        assert_same(small, net, net.domains, [(2, 3, 16, 16)], torch.float64)
        assert_same(ba2ps.specialise(small, round_to=8), net, net.domains, [(2, 3, 16, 16)], torch.float64)
    assert small.get_submodule("d").in_channels < 8


# --- the dense network -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_dense_network_is_plain_and_has_only_the_domains_own_channels():
    net = network(2, 16, 2)
    set_masks(net, "disjoint", 1.0, torch.Generator().manual_seed(0))
    model = ba2ps.dense(ba2ps.prune(net), "d1")
    kinds = {type(module) for module in model.modules() if not list(module.children())}
    assert kinds <= {nn.Conv2d, nn.Linear, nn.Module, ba2ps.Select} and not any(p.requires_grad for p in model.parameters())
    convs = {name: conv for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    for name, layer in ba2ps.switched_layers(net).items():
        assert convs[name.replace(".", "_")].in_channels == int(layer.read(["d1"]).sum())
    folded = ba2ps.dense(ba2ps.prune(net), "d1", round_to=8)
    assert all(conv.in_channels % 8 == 0 for name, conv in folded.named_modules()
               if isinstance(conv, nn.Conv2d) and name != "conv1")
    assert all(conv.out_channels % 8 == 0 for conv in folded.modules() if isinstance(conv, nn.Conv2d))


@torch.no_grad()
def test_macs_of_the_dense_network_are_those_it_runs():
    pytest.importorskip("thop")
    net = network(1, 10, 1, share_on=0.4)
    model, by_hand = ba2ps.dense(net, "d0"), 0
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            side = 32 >> (int(name[5]) if name.startswith("block") else 0)
            by_hand += conv.weight.numel() * side * side
    assert ba2ps.macs(model, None, 32) == by_hand < ba2ps.macs(net, ["d0"], 32)


@torch.no_grad()
def test_switching_domains_copies_no_weights_and_gives_each_its_own_complexity():
    net = network(3, share_on=0.3)
    special, x = ba2ps.specialise(net), torch.randn(1, 3, 32, 32)
    before = {name: p.data_ptr() for name, p in special.named_parameters()}
    for domain in ("d0", "d2", "d0"):
        torch.testing.assert_close(special(x, domain), net(x, domain), atol=1e-5, rtol=1e-5)
    assert before == {name: p.data_ptr() for name, p in special.named_parameters()}
    with pytest.raises(InputError, match="d7"):
        special(x, "d7")
    with pytest.raises(InputError, match="d7"):
        ba2ps.dense(net, "d7")


# --- the file --------------------------------------------------------------------------------------------------------

def test_bits_by_hand_and_back():
    on = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.bool)
    assert ba2ps.pack_bits(on).tolist() == [129, 3]
    for n in (1, 8, 9, 3552):
        on = torch.rand(n) < 0.5
        packed = ba2ps.pack_bits(on)
        assert packed.dtype == torch.uint8 and len(packed) == -(-n // 8)
        assert torch.equal(ba2ps.unpack_bits(packed, n), on)


@pytest.mark.parametrize("kind", ["own", "identical", "disjoint"])
@torch.no_grad()
def test_the_file_is_as_large_as_the_stated_params_and_classifiers(tmp_path, kind):
    net = network(9, 22, 4)
    set_masks(net, kind, 0.25, torch.Generator().manual_seed(0))
    small = ba2ps.prune(net)
    ba2ps.save(tmp_path / "m.pt", small)
    floats = ba2ps.stored_params(small) * ba2ps.backbone_params(small)
    floats += sum(p.numel() for p in small.classifiers.parameters())
    assert (tmp_path / "m.pt").stat().st_size == pytest.approx(4 * floats, rel=0.02)
    state = torch.load(tmp_path / "m.pt", weights_only=True)["state"]
    bits = sum(value.numel() for name, value in state.items() if name.startswith("bits"))
    assert bits == 9 * -(-sum(layer.total_channels for layer in ba2ps.switched_layers(net).values()) // 8)
    rows = sum(value.numel() for name, value in state.items() if name.startswith("batch-norm"))
    alone = [ba2ps.prune(small, [domain]) for domain in net.domains]  # what each would need without the others
    assert rows == 4 * sum(m.num_features for n in alone for m in n.modules() if isinstance(m, nn.BatchNorm2d))

    loaded, _ = ba2ps.load(tmp_path / "m.pt")
    for measure in (ba2ps.params, ba2ps.stored_params, ba2ps.sparsity, ba2ps.intersection):
        assert measure(loaded) == measure(small)
    assert_same(loaded.eval(), net, net.domains[:3], [(1, 3, 33, 47)], torch.float32)
    ba2ps.save(tmp_path / "again.pt", ba2ps.prune(loaded, ["d4"]))
    assert_same(ba2ps.load(tmp_path / "again.pt")[0].eval(), net, ["d4"], [(1, 3, 33, 47)], torch.float32)


@torch.no_grad()
def test_stored_params_by_a_loop():
    net = network(2, 16, 1, share_on=0.4)
    small = ba2ps.prune(net)
    floats = sum(m.weight.numel() for m in small.modules() if isinstance(m, nn.Conv2d))
    for domain in net.domains:
        floats += 4 * sum(m.num_features for m in ba2ps.prune(net, [domain]).modules() if isinstance(m, nn.BatchNorm2d))
    floats += 2 * sum(layer.total_channels for layer in ba2ps.switched_layers(net).values()) / 32
    backbone = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    assert ba2ps.stored_params(small) == pytest.approx(floats / backbone)
    assert ba2ps.stored_params(small) < ba2ps.params(small) == pytest.approx(ba2ps.params(net))


@torch.no_grad()
def test_the_source_is_kept_on_request_and_costs_the_backbone(tmp_path):
    net = network(2, share_on=0.2)
    kept = ba2ps.prune(net, ["d0"], keep_source=True)
    assert kept.domains == ["d0"] and set(kept.classifiers) == {"source", "d0"}
    assert ba2ps.stored_params(kept) > 1 > ba2ps.stored_params(ba2ps.prune(net, ["d0"]))
    ba2ps.save(tmp_path / "m.pt", kept)
    loaded = ba2ps.load(tmp_path / "m.pt")[0].eval()
    assert_same(loaded, net, ["source", "d0"], [(1, 3, 33, 47)], torch.float32)
    assert_same(ba2ps.prune(loaded), net, ["d0"], [(1, 3, 33, 47)], torch.float32)  # and may still go later
    with pytest.raises(InputError, match="pruned away"):
        ba2ps.prune(ba2ps.prune(net), keep_source=True)
    with pytest.raises(InputError, match="pruned away"):
        ba2ps.prune(net).add_domain("new", 3)


@torch.no_grad()
def test_a_damaged_pruned_checkpoint_is_refused_in_one_line(tmp_path):
    ba2ps.save(tmp_path / "m.pt", ba2ps.prune(network(1)))
    whole = torch.load(tmp_path / "m.pt", weights_only=True)
    for name, value in whole["state"].items():
        for damaged in ({n: v for n, v in whole["state"].items() if n != name}, {**whole["state"], name: value[:-1]}):
            torch.save({**whole, "state": damaged}, tmp_path / "x.pt")
            with pytest.raises(InputError, match="damaged") as error:
                ba2ps.load(tmp_path / "x.pt")
            assert "\n" not in str(error.value)


# --- prune.py --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(path, network) of a checkpoint as train.py writes it."""
    torch.manual_seed(0)
    net, path = network(2, share_on=0.4), tmp_path_factory.mktemp("model") / "model.pt"
    records = {domain: {"classes": [f"class {c}" for c in range(linear.out_features)], "mirror": True, "std": [.2, .2, .3],
                        "category_ids": list(range(linear.out_features)), "mean": [.4, .5, .6]}
               for domain, linear in net.classifiers.items()}
    ba2ps.save(path, net, budget=0.5, image_size=32, domains=records)
    ba2ps.save(path.parent / "backbone.pt", network(0), image_size=32, domains={})
    ba2ps.save(path.parent / "pruned.pt", ba2ps.prune(net, ["d1"]), image_size=32, domains=records)
    return path, net


@torch.no_grad()
def test_the_table_and_the_files_of_prune(model, tmp_path, capsys):
    pytest.importorskip("thop")
    path, net = model
    code, out, err = run("prune.py", path, "--out", tmp_path / "p.pt", capsys=capsys)
    assert code == 0 and not err, err
    assert "params as the paper counts them" in out and "params as stored" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("d0 ", "d1 "))}
    assert rows.keys() == {"d0", "d1"} and all(row.count("->") == 2 and row.count("x") == 2 for row in rows.values())
    x = torch.randn(2, 3, 32, 32)
    for name, words in (("source", ["--keep-source", "--no-latency"]), ("d0", ["--domains", "d0", "--no-latency"])):
        code, out, err = run("prune.py", path, "--out", tmp_path / "k.pt", *words, capsys=capsys)
        assert code == 0 and "latency" not in out and ("whole backbone" in out) == (name == "source"), err
        torch.testing.assert_close(ba2ps.load(tmp_path / "k.pt")[0].eval()(x, name), net(x, name), atol=1e-5, rtol=1e-5)
    code, out, err = run("prune.py", path, "--domain", "d1", "--round-to", 8, "--out", tmp_path / "d.pt", capsys=capsys)
    assert code == 0 and "load_dense" in out, err
    dense, facts = ba2ps.load_dense(tmp_path / "d.pt")
    torch.testing.assert_close(dense(x), net(x, "d1"), atol=1e-5, rtol=1e-5)
    assert facts["dense"]["round_to"] == 8 and dense.conv1.out_channels % 8 == 0
    with pytest.raises(InputError, match="--domain"):
        ba2ps.load_dense(tmp_path / "p.pt")


@torch.no_grad()
def test_the_exported_file_runs_in_a_fresh_interpreter_with_torch_alone(model, tmp_path, capsys):
    pytest.importorskip("thop")
    path, net = model
    code, _, err = run("prune.py", path, "--domain", "d1", "--export", tmp_path / "d1.pt2", "--no-latency", capsys=capsys)
    assert code == 0, err
    torch.save(torch.randn(5, 3, 32, 32), tmp_path / "x.pt")
    code = ("import json, sys, torch\nextra = {'ba2ps.json': ''}\n"
            "model = torch.export.load('d1.pt2', extra_files=extra).module()\nx = torch.load('x.pt')\n"
            "torch.save([model(x), model(x[:1])], 'y.pt')\nassert not {'ba2ps', 'torchvision'} & set(sys.modules)\n"
            "print(extra['ba2ps.json'])")
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    known, x = json.loads(out.stdout), torch.load(tmp_path / "x.pt")
    assert known["classes"] == [f"class {c}" for c in range(6)] and known["mean"] == [.4, .5, .6]
    assert known["std"] == [.2, .2, .3] and known["image_size"] == 32 and known["domain"] == "d1"
    for y, images in zip(torch.load(tmp_path / "y.pt"), (x, x[:1])):
        assert (y - net(images, "d1")).abs().max() < 1e-5


BAD = [  # words, what the line must name
    (["none.pt", "--out", "OUT"], "none.pt"),
    (["MODEL"], "--out"),
    (["MODEL", "--out", "OUT", "--domains", "plants"], "plants"),
    (["MODEL", "--out", "OUT", "--domain", "plants"], "plants"),
    (["MODEL", "--out", "OUT", "--domains", "source"], "source"),
    (["MODEL", "--out", "OUT", "--domain", "d0", "--domains", "d0"], "--domain"),
    (["MODEL", "--out", "OUT", "--export", "OUT2"], "--domain"),
    (["MODEL", "--out", "OUT", "--round-to", "8"], "--domain"),
    (["MODEL", "--out", "OUT", "--domain", "d0", "--round-to", "0"], "--round-to 0"),
    (["MODEL", "--out", "OUT", "--domain", "d0", "--round-to", "x"], "--round-to"),
    (["MODEL", "--out", "no/where.pt"], "no/where.pt"),
    (["MODEL", "--domain", "d0", "--export", "no/where.pt2"], "no/where.pt2"),
    (["MODEL", "--out", "."], "cannot write ."),
    (["BACKBONE", "--out", "OUT"], "backbone"),
    (["PRUNED", "--out", "OUT", "--domains", "d0"], "d0"),
    (["PRUNED", "--out", "OUT", "--keep-source"], "pruned away"),
]


@pytest.mark.parametrize("words, named", BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2(words, named, model, tmp_path, capsys):
    places = {"MODEL": model[0], "BACKBONE": model[0].parent / "backbone.pt", "PRUNED": model[0].parent / "pruned.pt",
              "OUT": tmp_path / "out.pt", "OUT2": tmp_path / "out.pt2"}
    code, out, err = run("prune.py", *[places.get(word, word) for word in words], capsys=capsys)
    assert code == 2 and err.count("\n") == 1 and named in err and err.startswith("prune.py: "), err
    assert not list(tmp_path.iterdir()) and not out
