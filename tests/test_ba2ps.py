# SPDX-License-Identifier: MIT
"""The method against computations of another kind: loops, float64, counts by hand, finite differences."""
import collections
import copy
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ba2ps

SOURCE = Path(ba2ps.__file__).read_text()
HEAD, *SECTIONS = re.split(r"(?m)^# -+\s(?:# )?\d  .*$", SOURCE)  # at the banners
approx, close = pytest.approx, torch.testing.assert_close


def network(domains=2, depth=10, widen_factor=1, on=0.5, module=ba2ps):
    """A small network with random switches and statistics, so that nothing is equal by accident; in eval."""
    net = module.WideResNet(depth, widen_factor, "source", 7)
    for i in range(domains):
        net.add_domain(f"d{i}", 5 + i)
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    for s in [s for layer in module.switched_layers(net).values() for s in layer.switches.values()]:
        s.data = on - torch.rand_like(s)
        s.data[torch.randint(len(s), ())] = 1  # no layer without a channel
    net.freeze_backbone()
    return net.eval()


def graph_network():
    """What add_switches makes, with layers that stay shared: GroupNorm and a hidden Linear."""
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3, 2), nn.BatchNorm2d(6),
              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 9), nn.Linear(9, 5)]
    return ba2ps.add_switches(nn.Sequential(*layers).eval(), {"d0": 2, "d1": 3}, "source", 20)


def switches_of(net, domain):
    return {name: layer.switches[domain] for name, layer in ba2ps.switched_layers(net).items()}


def channels_on(net, domain):
    """{(layer, channel): its real switch} of those that are on."""
    parts = {name: switches.tolist() for name, switches in switches_of(net, domain).items()}
    return {(name, c): value for name, part in parts.items() for c, value in enumerate(part) if value > 0}


def changed(net, before):
    old = before.state_dict()  # of a copy of `net`
    return {name for name, value in net.state_dict().items() if not torch.equal(value, old[name])}


def refused(text=""):
    """An InputError of one line that has `text` in it."""
    return pytest.raises(ba2ps.InputError, match=rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z")


def plain(net, x, domain, train=False):
    """The logits of a WideResNet as the papers write them, with operations of autograd alone."""
    def norm_relu(norms, x):
        norm = norms[domain]
        statistics = (None, None) if train else (norm.running_mean, norm.running_var)
        return F.relu(F.batch_norm(x, *statistics, norm.weight, norm.bias, train))
    def conv(layer, x):
        if domain != net.source:
            s = layer.switches[domain]  # straight-through: binary forward, the identity backward
            x = x * ((s > 0).to(s.dtype) + (s - s.detach()))[:, None, None]
        return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
    x = F.conv2d(x, net.conv1.weight, None, 1, 1)
    for block in itertools.chain(net.block1, net.block2, net.block3):
        out = norm_relu(block.bn1, x)
        x = x if block.shortcut is None else conv(block.shortcut, out)
        x = x + conv(block.conv2, norm_relu(block.bn2, conv(block.conv1, out)))
    return net.classifiers[domain](norm_relu(net.bn1, x).mean((2, 3)))


def costs_by_hand(net, of, size=32):
    """({layer: what a channel costs}, the share of the stem) of a network that is not pruned."""
    each, stem = {}, {"params": 3 * 16 * 9, "macs": 3 * 16 * 9 * size ** 2}.get(of, 0)
    for name, layer in ba2ps.switched_layers(net).items():
        side = math.ceil(size / 2 ** int(name[5]))  # block1 works at half the resolution, block3 at an eighth
        k = layer.out_channels * layer.kernel_size[0] ** 2  # weights of a channel
        each[name] = {"layers": 1 / layer.in_channels, "channels": 1, "params": k, "macs": k * side ** 2}[of]
    total = stem + sum(each[name] * layer.in_channels for name, layer in ba2ps.switched_layers(net).items())
    return {name: value / total for name, value in each.items()}, stem / total


@pytest.mark.parametrize("batch, frozen", [(3, True), (3, False), (0, True)])
@pytest.mark.parametrize("arguments", [
    {"stride": 2, "padding": 1}, {"padding": (0, 2), "dilation": (2, 1), "bias": False}, {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"}])
def test_a_switched_convolution_by_hand(arguments, batch, frozen):
    conv = nn.Conv2d(6, 5, 3, **arguments)
    layer = ba2ps.SwitchedConv2d(6, 5, 3, domains=["a", "b"], **arguments)
    assert layer.switches["b"].tolist() == approx([1e-3] * 6)
    layer.double().weight.requires_grad_(not frozen)
    conv.weight, conv.bias = layer.weight, layer.bias
    layer.switches["a"].data = torch.tensor([0.5, -0.5, 0.0, 1e-8, -1e-8, 0.2]).double()
    x, on = torch.randn(batch, 6, 8, 9).double(), torch.tensor([1, 0, 0, 1, 0, 1])
    out, expected = layer(x.requires_grad_(), "a"), conv(x * on[:, None, None])
    close(out, expected), close(layer(x, "source"), conv(x))
    inputs, cotangent = [x, *(p for p in conv.parameters() if p.requires_grad)], torch.randn_like(out)
    close(*(torch.autograd.grad(y, inputs, cotangent, retain_graph=True) for y in (out, expected)))
    out.backward(cotangent)
    for c in range(6):  # straight through: d out / d s_c is what channel c alone adds, on or off
        alone = conv(F.one_hot(torch.tensor(c), 6).view(-1, 1, 1) * x) - conv(0 * x)
        close(layer.switches["a"].grad[c], (alone * cotangent).sum(), rtol=1e-10, atol=1e-10)
    assert layer.switches["b"].grad is None and (layer.weight.grad is None) == frozen


def test_section_1_runs_alone_and_the_module_imports_torch_alone_and_opens_and_prints_nothing():
    code = "import torch\n" + SECTIONS[0] + """
conv, norm = SwitchedConv2d(3, 4, 3, domains=["a"]), DomainBatchNorm2d(3, ["a"])
head = DomainLinear({"a": nn.Linear(4, 5)})
norm.add_domain("b", like="a"), conv.add_domain("b"), head.add_domain("b", 2)
head(conv(norm(torch.randn(2, 3, 5, 5), "b"), "b").mean((2, 3)), "b").sum().backward()
import sys
before, source, opened = set(sys.modules), sys.stdin.read(), []
import ba2ps
print({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
sys.addaudithook(lambda event, args: event == "open" and opened.append(args))
exec(source, {"__name__": "again"})
print(conv.switches["b"].grad.shape, opened)"""
    run = subprocess.run([sys.executable, "-c", code], input=SOURCE, cwd=Path(ba2ps.__file__).parent,
                         capture_output=True, text=True)
    assert len(SECTIONS) == 8 and run.stdout + run.stderr == "{'ba2ps'}\ntorch.Size([3]) []\n"


def test_wrn_28_4_has_the_published_shape_and_the_papers_params():
    net, weights = ba2ps.WideResNet(), 3 * 16 * 9  # the stem, and of each group
    for before, after in ((16, 64), (64, 128), (128, 256)):  # a block with its shortcut, and three more
        weights += 9 * before * after + 9 * after * after + before * after + 3 * 2 * 9 * after * after
    assert sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d)) == weights == 5_839_280
    assert sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)) == 3600
    assert sum(m.in_channels for m in ba2ps.switched_layers(net).values()) == 3552  # 3,555 with the stem
    for i in range(10):
        net.add_domain(f"d{i}", 10)
    by_hand = (weights + 10 * 4 * 3600 + 10 * 3552 / 32) / weights
    assert ba2ps.params(net) == approx(by_hand) == approx(1.025, abs=5e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("change", ["nothing", "eval", "trained", "source", "bfloat16"])
def test_the_network_is_that_of_the_papers_without_section_8_too(change, layout):
    """Pre-activation blocks as in Zagoruyko's, with a mask on what a convolution reads."""
    slow, states, domain = type(ba2ps)("slow"), [], "source" if change == "source" else "d1"
    exec(HEAD + "".join(SECTIONS[:-1]), vars(slow))
    for module in (slow, ba2ps):
        torch.manual_seed(1)
        net = network(depth=16, module=module).train(change != "eval").to(memory_format=layout)
        net.to(torch.float32 if change == "bfloat16" else torch.float64)
        if change in ("trained", "source"):
            net.requires_grad_(True)
        trained = [p for p in net.parameters() if p.requires_grad]
        x = torch.randn(4, 3, 15, 16).to(net.conv1.weight).to(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, change == "bfloat16"):
            out = net(x, domain), plain(net, x, domain, change != "eval")
        grads = [torch.autograd.grad(y.square().sum(), trained, allow_unused=True) for y in out]
        close(*out), close(*grads) if change != "bfloat16" else None
        states.append(net.state_dict())
    close(*states)
    net.block1[0].bn2[domain].__class__ = type("Other", (nn.BatchNorm2d,), {"forward": lambda norm, x: 0 * x})
    assert not torch.equal(net(x, domain), out[0])  # as nn.SyncBatchNorm must not be left out


@pytest.mark.parametrize("make", [network, graph_network])
def test_what_no_domain_owns_is_frozen_and_a_batch_touches_its_own_domain(make):
    net, x = make(), torch.randn(4, 3, 20, 20)
    logits = net(x, "source")
    net.add_domain("d2", 3)
    for norms in [m for m in net.modules() if isinstance(m, ba2ps.DomainBatchNorm2d)]:
        assert not norms["d2"].training
        close(norms["d2"].state_dict(), norms["source"].state_dict())
    net.train().freeze_backbone()
    before = copy.deepcopy(net)
    net(x, "d2").sum().backward()
    for name, p in net.named_parameters():
        assert p.requires_grad == (not {"d0", "d1", "d2"}.isdisjoint(name.split("."))), name
        assert (p.grad is not None) == ("d2" in name.split(".")), name
    assert changed(net, before) == {n for n in net.state_dict() if "d2.running" in n or "d2.num" in n}
    assert torch.equal(net.eval()(x, "source"), logits)


@pytest.mark.parametrize("make", [
    *(lambda name=name: network().add_domain(name, 3) for name in ("d0", "source", "", "a.b", "keys")),
    lambda: ba2ps.WideResNet(27), lambda: network()(torch.zeros(1, 3, 16, 16), "d7"),
    lambda: ba2ps.prune(network(0)),
    lambda: ba2ps.costs(network(), "flops"), lambda: ba2ps.load("none.pt"), lambda: ba2ps.load("/")])
def test_what_cannot_be_is_refused_in_one_line(make):
    with refused():
        make()
    with pytest.raises(ValueError, match="groups"):
        ba2ps.SwitchedConv2d(4, 4, 3, groups=2)


@pytest.mark.parametrize("form", ["intersection", "union", "jaccard"])
def test_losses_by_hand_and_by_finite_differences(form):
    def by_hand(s):
        both = sum(s[0][i] * s[1][i] * s[2][i] for i in range(12))
        either = sum(1 - (1 - s[0][i]) * (1 - s[1][i]) * (1 - s[2][i]) for i in range(12))
        return {"intersection": 1 - both / 6, "union": either / 6 - 1, "jaccard": 1 - both / either}[form]
    for s in (torch.rand(3, 12).double(), torch.rand(3, 12).double().round()):  # smooth, binary
        ba2ps.sharing_loss(s.requires_grad_(), 0.5, form).backward()  # reaches all domains, also what is off
        assert ba2ps.sharing_loss(s, 0.5, form).item() == approx(by_hand(s.tolist()))
        for k, i in itertools.product(range(3), range(12)):
            up, down = s.tolist(), s.tolist()
            up[k][i] += 1e-6
            down[k][i] -= 1e-6
            assert s.grad[k, i].item() == approx((by_hand(up) - by_hand(down)) / 2e-6, abs=1e-8)
    assert ba2ps.sharing_loss(torch.full((3, 12), float(form != "union")), 0.5, form).item() == 0  # enough
    usage = torch.tensor([0.75, 0.25], requires_grad=True)
    losses = ba2ps.budget_loss(usage, 0.5, 3.0)
    assert losses.tolist() == [0.75, 0] and torch.autograd.grad(losses.sum(), usage)[0].tolist() == [3, 0]


def test_rows_are_the_layers_switches():
    net = network()
    before, switches = copy.deepcopy(net), ba2ps.Switches(net, ["d0", "d1"], 0.5)
    rows, restore = switches.parameters(), lambda: net.load_state_dict(before.state_dict(), assign=True)
    assert not changed(net, before)
    for move in (net.cpu, net.double, net.float, restore):
        move()
        other = copy.deepcopy(net)
        switches.begin(["d0"], 0.0)
        assert not changed(net, other) and rows == switches.parameters()  # what an optimizer has
        for domain, row in zip(net.domains, rows):
            parts, copies = (list(switches_of(n, domain).values()) for n in (net, other))
            row.data.mul_(-2), parts[-1].data.fill_(3)
            assert torch.equal(row, torch.cat(parts)) and not torch.equal(row, torch.cat(copies))


@pytest.mark.parametrize("of, sharing, form, share_to", [
    ("channels", 0, "intersection", "all"), ("layers", 1.0, "intersection", "all"),
    ("macs", 0.7, "intersection", "current"), ("params", "learned", "intersection", "all"),
    ("channels", 2.0, "jaccard", "all"), ("layers", "learned", "union", "current")])
def test_steps_are_those_of_adam_on_every_layers_switches(of, sharing, form, share_to):
    net = network(on=0.8).double().train()
    other, x, y = copy.deepcopy(net), torch.randn(6, 3, 16, 16).double(), torch.arange(6) % 5
    switches = ba2ps.Switches(net, net.domains, 0.4, of, 32, sharing, form, share_to, 0.5)
    adam = torch.optim.Adam(switches.parameters(), 0.05)
    parts, (each, fixed) = {d: switches_of(other, d) for d in net.domains}, costs_by_hand(other, of)
    plain_adam = torch.optim.Adam([s for domain in parts for s in parts[domain].values()], 0.05)
    price, (weight, learned) = {"d0": 0.0, "d1": 0.0}, (0.0, 0.5) if sharing == "learned" else (sharing, 0.0)
    for step, batch in enumerate((["d0"], ["d1"], ["d1", "d0"], ["d1"], ["d0"], ["d1"], ["d1"], ["d1"])):
        for name, n in itertools.product(each, (net, other) if step == 3 else ()):
            switches_of(n, "d1")[name].data.fill_(-1)[0] = 1  # d1 comes under its budget
        switches.begin(batch, step / 10)
        loss = switches.loss(batch) + sum(F.cross_entropy(net(x, domain), y) for domain in batch)
        adam.zero_grad(step % 3), net.zero_grad() if step % 2 else None
        loss.backward()
        switches.step(adam, batch)
        s = {d: {name: (part > 0) + (part - part.detach()) for name, part in parts[d].items()} for d in parts}
        a, b = (torch.cat([part.detach() if share_to == "current" and d not in batch else part
                           for part in s[d].values()]) for d in s)
        both, either, most = (a * b).sum(), (a + b - a * b).sum(), 0.4 * len(a)
        excess = {"intersection": 1 - both / most, "union": either / most - 1}.get(form, 1 - both / either)
        loss = weight * max(excess, 0 * excess) if sharing else 0
        weight += learned * max(0, excess.item())
        for d in batch:
            use = fixed + sum(each[name] * part.sum() for name, part in s[d].items())
            loss = loss + F.cross_entropy(plain(other, x, d, True), y) + max(price[d] * (use - 0.4), 0 * use)
            price[d] = max(0, price[d] + 0.5 * (use.item() - 0.4))
        plain_adam.zero_grad()
        loss.backward()
        plain_adam.step()
        close({d: switches_of(net, d) for d in parts}, parts, rtol=0, atol=1e-9)
        assert switches.prices == approx(price) and switches.sharing == approx(weight)
        assert step == 6 or (price["d1"] > 0) == (0 < step < 6)  # it rises, and from step 3 on falls to 0


@pytest.mark.parametrize("make", [lambda net: net, lambda net: ba2ps.prune(net, ["d0", "d1"])])
def test_a_domain_that_comes_later_shares_with_those_that_stay(make):
    net = make(network(3, on=0.7).double()).train()
    net.remove_domain("d2") if "d2" in net.domains else None
    net.add_domain("new", 4)
    for part in switches_of(net, "new").values():
        part.data.uniform_(-1, 1)
    before, whole = copy.deepcopy(net), sum(len(layer.kept) for layer in ba2ps.switched_layers(net).values())
    switches = ba2ps.Switches(net, ["new"], 0.9, sharing=2.0)
    switches.begin(["new"], 0.0)
    both = len(set.intersection(*({*channels_on(net, domain)} for domain in net.domains)))
    assert switches.loss(["new"]).item() == approx(2 * (1 - both / (0.9 * whole)))  # of the backbone's M
    switches.loss(["new"]).backward()
    switches.step(torch.optim.Adam(switches.parameters(), 0.01), ["new"])
    moved = changed(net, before)
    assert moved and all(name.endswith(".new") for name in moved)
    shared = {d: torch.cat([*switches_of(before, d).values()]) > 0 for d in ("d0", "d1")}
    up = torch.cat([*switches_of(net, "new").values()]) > torch.cat([*switches_of(before, "new").values()])
    assert torch.equal(up, shared["d0"] & shared["d1"])  # towards what all others have on


@pytest.mark.parametrize("values", [torch.arange(-32.0, 0), -torch.ones(32), torch.zeros(32)])
def test_a_layer_whose_switches_all_fall_below_zero_keeps_exactly_one(values):
    net = network()
    switches, mine = ba2ps.Switches(net, net.domains, 0.9), net.block2[0].conv2.switches["d0"]
    mine.data.copy_(values)
    before = copy.deepcopy(net)
    switches.begin(["d0"], 0.0), switches.loss(["d0"])
    switches.step(torch.optim.Adam(switches.parameters(), 0.0), ["d0"])
    on = mine > 0
    assert on.sum() == 1 and values[on] == values.max() and torch.equal(mine[~on], values[~on])
    assert changed(net, before) == {"block2.0.conv2.switches.d0"}


@pytest.mark.parametrize("of", ba2ps.BUDGETS)
@pytest.mark.parametrize("budget", [0.2, 0.8])
def test_settled_switches_hold_the_budget_and_only_the_least_go_off(of, budget):
    net, x, expected = network(depth=16, on=0.95).train(), torch.randn(4, 3, 16, 16), {}
    net.block3[1].conv1.switches["d0"].data.mul_(1e-6)  # of which all would go off
    each, fixed = costs_by_hand(net, of)
    for domain in net.domains:
        expected[domain] = on = channels_on(net, domain)
        strongest = [(name, int(part.argmax())) for name, part in switches_of(net, domain).items()]
        for key in sorted(set(on).difference(strongest), key=on.get):
            if fixed + math.fsum(each[name] for name, _ in on) > budget + 1e-9:
                del on[key]
    before, switches = copy.deepcopy(net), ba2ps.Switches(net, net.domains, budget, of, 32, settle=0.5)
    sgd = torch.optim.SGD([p for name, p in net.named_parameters() if ".d0." in name], 0.1)
    switches.begin(["d0"], 0.499)
    assert not changed(net, before)
    for done in (0.5, 0.9):
        switches.begin(["d0"], done)
        for domain, use in ba2ps.usage(net, of, 32).items():
            assert channels_on(net, domain) == expected[domain] and use <= budget + 1e-9
        before = copy.deepcopy(net)
        (F.cross_entropy(net(x, "d0"), torch.arange(4)) + switches.loss(["d0"])).backward()
        sgd.step(), switches.step(torch.optim.Adam(switches.parameters(), 1e-2), ["d0"])
        assert changed(net, before) == {name for name in net.state_dict() if ".d0." in name}  # no switch


@pytest.mark.parametrize("of", ba2ps.BUDGETS)
def test_budgets_from_a_channel_a_layer_to_1_and_equal_switches(of):
    net = network()
    each, fixed = costs_by_hand(net, of)
    least, parts = fixed + sum(each.values()), switches_of(net, "d0")
    for budget in (least * 0.999, 1.001, 0.0, -1.0, math.nan):
        with refused(f"{least:.4f}"):
            ba2ps.Switches(net, net.domains, budget, of, 32)
    strongest = {(name, int(part.argmax())) for name, part in parts.items()}
    ba2ps.Switches(net, ["d0"], least * 1.001, of, 32, settle=0.0)
    assert set(channels_on(net, "d0")) == strongest
    for budget in (1.0, 0.5, 0.25):
        for part in parts.values():
            part.data.fill_(1)
        ba2ps.Switches(net, ["d0"], budget, of, 32, settle=0.0)  # all alike, and yet not one too many is off
        assert budget - max(each.values()) + 1e-9 < ba2ps.usage(net, of, 32)["d0"] <= budget + 1e-9


@pytest.mark.parametrize("of, sharing", [("macs", 0.5), ("channels", 1.0), ("layers", 0.0)])
def test_ranked_by_gradients_what_the_loss_feels_least_goes_off(of, sharing):
    net, trained = network(3, on=1.5), [f"d{i}" for i in range(2)]
    for switches in switches_of(net, "d2").values():  # of a domain that trained as it is
        switches.data -= 1.2 * (switches < switches.max())
    switches = ba2ps.Switches(net, trained, 0.4, of, 32, sharing, settle=0.5, rank="gradients")
    before, square = copy.deepcopy(net), {domain: collections.Counter() for domain in trained}
    for domain in ["d0", "d1", "d0", "d0"]:
        switches.begin([domain], 0.4)
        assert switches.loss([domain]) == 0
        for name, part in switches_of(net, domain).items():
            part.grad = torch.randn_like(part)
            for c, grad in enumerate(part.grad.tolist()):
                square[domain][name, c] = 0.999 * square[domain][name, c] + grad ** 2
        switches.step(torch.optim.Adam(switches.parameters(), 1.0), [domain])
    assert not changed(net, before)
    state = switches.state_dict()
    for domain, squares in square.items():  # rounded to float32, as gradients are
        close(state["importance"][domain], torch.tensor([*squares.values()]).double(), rtol=1e-5, atol=0)
    switches = ba2ps.Switches(net, trained, 0.4, of, 32, sharing, settle=0.5, rank="gradients")
    switches.load_state_dict(state)
    switches.begin(["d0"], 0.5)
    (each, fixed), third = costs_by_hand(net, of), channels_on(net, "d2")
    felt = {domain: {key: value / sum(square[domain].values()) for key, value in square[domain].items()}
            for domain in trained}
    for own, other in (trained, trained[::-1]):
        worth = {key: (felt[own][key] + sharing * felt[other][key] + sharing * (key in third) / len(third))
                 / each[key[0]] for key in felt[own]}
        strongest = {max((key for key in worth if key[0] == name), key=worth.get) for name in each}
        on = set(worth)
        for key in sorted(set(worth) - strongest, key=worth.get):
            if fixed + math.fsum(each[name] for name, _ in on) > 0.4 + 1e-9:
                on.remove(key)
        assert set(channels_on(net, own)) == on
    assert channels_on(net, "d2") == third


def test_reestimated_statistics_are_those_of_all_images():
    net, images, seen = network(depth=16).double(), torch.randn(12, 3, 16, 16).double(), {}
    before = copy.deepcopy(net)
    for module in [m for m in net.modules() if isinstance(m, ba2ps.DomainBatchNorm2d)]:
        module.register_forward_pre_hook(lambda m, inputs: seen.setdefault(m, []).append(inputs[0]))
    ba2ps.reestimate_batch_norm(net, "d0", [(x, None) for x in images.split(4)])
    for module, inputs in seen.items():
        x = torch.stack(inputs).transpose(1, 2).flatten(2)  # (batches, C, values)
        close(module["d0"].running_mean, x.mean((0, 2))), close(module["d0"].running_var, x.var(2).mean(0))
    assert changed(net, before) == {n for n in net.state_dict() if "d0.running" in n or "d0.num" in n}
    assert len(seen) == 13 and all(module["d0"].momentum == 0.1 for module in seen)


def test_costs_by_loops_masked_and_pruned():
    net, size = network(3, 10, 2, on=0.3), 33
    on = {domain: channels_on(net, domain) for domain in net.domains}
    norms = sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)) // 4  # of a domain
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    hand = {of: costs_by_hand(net, of, size) for of in ba2ps.BUDGETS}
    whole = 16 * 27 * size ** 2 / hand["macs"][1]  # MACs of the stem over their share
    for of, (each, fixed) in hand.items():
        assert ba2ps.costs(net, of, size) == (approx(each), approx(fixed))
    kept = ba2ps.prune(net, keep_source=True)
    def left(of, *domains):
        return hand[of][1] + sum(hand[of][0][name] for name, _ in set().union(*map(on.get, domains)))
    for domains in (["d0"], ["d2", "d0"], ["d0", "d1", "d2"]):
        own = len(domains) * (4 * norms + len(set().union(*map(on.get, domains))) / 32)
        for small in (net, ba2ps.prune(net, domains), kept):
            assert ba2ps.sparsity(small, domains)[0] == approx({d: 1 - left("layers", d) for d in domains})
            assert ba2ps.sparsity(small, domains)[1] == approx(1 - left("layers", *domains))  # Table 7
            assert ba2ps.params(small, domains) == approx(left("params", *domains) + own / weights)
            assert ba2ps.macs(small, domains, size) == round(left("macs", *domains) * whole)  # with the stem
            assert ba2ps.macs(small, None, size) == round(whole)
            for of in ba2ps.BUDGETS:
                assert ba2ps.usage(small, of, size, domains) == approx({d: left(of, d) for d in domains})
    assert ba2ps.params(net, ["source"]) == approx(1 + 4 * norms / weights)


MEASURING = [
    ba2ps.masks, ba2ps.share, ba2ps.params, ba2ps.sparsity, lambda net, domains: ba2ps.macs(net, domains, 32),
    *(lambda net, domains, of=of: ba2ps.usage(net, of, 32, domains) for of in ba2ps.BUDGETS)]


OTHERS = [
    ba2ps.prune, lambda net, domains: ba2ps.Switches(net, domains, 0.5),
    lambda net, d: ba2ps.reestimate_batch_norm(net, d[-1], []), lambda net, d: net.remove_domain(d[-1])]


@pytest.mark.parametrize("make", [network, lambda: ba2ps.prune(network()), graph_network])
def test_measuring_changes_nothing_and_a_misspelt_domain_or_a_string_is_refused_with_the_choices(make):
    def held():  # modes; attributes, and what dictionaries hold (parameters, hooks), by identity
        return [{key: [*value, *map(id, value.values())] if isinstance(value, dict) else id(value)
                 for key, value in vars(module).items()} for module in net.modules()]
    net = make()
    list(net.train().children())[-1].eval()  # a mode of its own
    before, objects = copy.deepcopy(net), held()
    for use in MEASURING + OTHERS:
        for domains in (None, ["d0"]) if use in MEASURING else ():
            use(net, domains)
        for domains in (["d0", "d7"], "d01", "d1"):
            with refused("d0, d1"):
                use(net, domains)
        assert not changed(net, before) and objects == held()


def test_pruning_leaves_the_network_as_it_is_and_refuses_an_empty_layer():
    net = network(3)
    before, two = copy.deepcopy(net), ba2ps.prune(net, ["d0", "d2"])
    assert two.domains == ["d0", "d2"] and not changed(net, before)
    net.block1[0].conv1.switches["d1"].data.fill_(-1)
    with refused("block1.0.conv1"):
        ba2ps.prune(net)


@pytest.mark.parametrize("make, real", [
    (lambda net: net, True), (lambda net: net.remove_domain("source") or net, True), (ba2ps.prune, False),
    (lambda net: ba2ps.prune(net, keep_source=True), False),
    (lambda net: ba2ps.prune(ba2ps.prune(net, ["d0", "d1"]), ["d1"]), False)])
def test_a_file_gives_back_the_network_and_the_facts(tmp_path, make, real):
    net, path = make(network(3, 16)), tmp_path / "m.pt"
    facts = {"budget": 0.25, "domains": {"d0": {"mean": [0.1, 0.2, 0.3], "classes": ["a"]}}, "of": None}
    ba2ps.save(path, net, **facts)
    loaded, found = ba2ps.load(path)
    assert (found, loaded.source, list(loaded.classifiers)) == (facts, "source", list(net.classifiers))
    for domain, x in itertools.product(net.classifiers, (torch.randn(2, 3, 16, 16), torch.randn(1, 3, 9, 7))):
        assert torch.equal(loaded.eval()(x, domain), net(x, domain))
    close(ba2ps.masks(loaded), ba2ps.masks(net))
    names = torch.load(path, weights_only=True)["state"]
    assert any("switches" in name for name in names) == real


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    net, path = network(1), tmp_path / "m.pt"
    ba2ps.save(path, net)
    old = path.read_bytes()
    with refused(tmp_path / "no" / "m.pt"):
        ba2ps.save(tmp_path / "no" / "m.pt", net)
    for error in (OSError("No space left on device"), RuntimeError("PytorchStreamWriter failed\nwriting")):
        def full(content, part, error=error):
            Path(part).write_bytes(b"half")
            raise error
        monkeypatch.setattr(torch, "save", full)
        with refused(path):
            ba2ps.save(path, net)
        assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", [lambda net: net, ba2ps.prune])
def test_damaged_files_end_in_one_line_that_names_the_file_and_run_no_code(tmp_path, make):
    net, path = make(network()), tmp_path / "m.pt"
    ba2ps.save(path, net)
    raw, held, weights = path.read_bytes(), torch.load(path, weights_only=True), net.conv1.weight.data.numpy()
    for i, at in enumerate(torch.randint(len(raw), (36,)).tolist()):  # a bit of weights, cut short, any bit
        at = at if i % 3 else raw.index(weights.tobytes()) + at % weights.nbytes
        flipped = raw[:at] + bytes([raw[at] ^ 1 << i % 8]) + raw[at + 1:]
        path.write_bytes(raw[:at] if i % 3 == 1 else flipped)
        try:
            loaded, facts = ba2ps.load(path)  # only if it is a bit that no one reads, of padding or a date
            assert i % 3 == 2 and not facts and all("switches" in name for name in changed(loaded, net)), at
        except ba2ps.InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    runs_code = type("RunsCode", (), {"__reduce__": lambda self: (Path.touch, (tmp_path / "ran",))})()
    keys = ("format", "source", "num_classes", "name", "state")
    wrong = [[1], runs_code, *({k: v for k, v in held.items() if k != key} for key in keys)]
    wrong += [held | {key: value} for key in keys for value in (None, 3.5, 11, [1], {}, runs_code)]
    name = "all" if net.pruned else "bn1.d1.running_var"
    var = held["state"][name]
    for value in (None, "x", var[1:], var[None], var / 0, var * math.nan):
        wrong.append(held | {"state": held["state"] | {name: value}})
    for value, key in itertools.product((None, torch.ones(2, 15) > 0), ("masks", "kept") * net.pruned):
        wrong.append(held | {key: held[key] | {"block1.0.conv1": value}})
    for content in wrong:
        torch.save(content, path)
        with refused(path):
            ba2ps.load(path)
    assert not (tmp_path / "ran").exists()
