# SPDX-License-Identifier: MIT
"""The method against computations of another kind: loops, float64, by hand, finite differences."""
import copy
import itertools
import math
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ba2ps

SOURCE = Path(ba2ps.__file__).read_text(encoding="utf-8")
SECTIONS = re.split(r"(?m)^# -+ +\d  .*$", SOURCE)              # at the banners
NORMS = nn.modules.batchnorm._NormBase
approx = pytest.approx
cases = pytest.mark.parametrize
close = torch.testing.assert_close
grad = torch.autograd.grad


@torch.no_grad()
def randomised(net, on=0.5):
    """`net` in eval, with random switches and norms, so that nothing is equal by accident."""
    for norm in net.modules():
        if isinstance(norm, NORMS) and norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
        if isinstance(norm, NORMS) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    for domain in net.domains:
        net.switches[domain].uniform_(on - 1, on)
        for part in parts_of(net, domain).values():
            part[torch.randint(len(part), ())] = 1              # no layer without a channel
    net.freeze_backbone()
    return net.eval()


def network(domains=2, depth=10, width=1, on=0.5):
    """A small WRN with `domains` domains, d0 with 5 classes, d1 with 6, ..."""
    classes = {f"d{i}": 5 + i for i in range(domains)}
    net = ba2ps.MultiDomain(ba2ps.WideResNet(depth, width, 7), classes, "source", 16)
    return randomised(net, on)


def images(number=4, size=16):
    return torch.randn(number, 3, size, size)


def parts_of(net, domain):
    """{layer: the switches that `domain` has in it}, views of its row."""
    widths = [net.layer(name).in_channels for name in net.layers]
    return dict(zip(net.layers, net.switches[domain].split(widths)))


def channels_on(net, domain, least=0):
    """{(layer, channel): its real switch} of those above `least`."""
    result = {}
    for name, part in parts_of(net, domain).items():
        for c, value in enumerate(part.tolist()):
            if value > least:
                result[name, c] = value
    return result


def changed(net, before):
    """The names of what differs from `before`, a copy."""
    old = before.state_dict()
    return {name for name, value in net.state_dict().items() if not torch.equal(value, old[name])}


def refused(*texts):
    """An InputError of one line that has each of `texts` in it."""
    ahead = "".join(rf"(?=.*{re.escape(str(text))})" for text in texts)
    return pytest.raises(ba2ps.InputError, match=rf"\A{ahead}[^\n\x1b]+\Z")


def straight_through(switches):
    return (switches > 0).to(switches.dtype) + switches - switches.detach()


def plain(net, x, domain, train=False):
    """The logits of a WideResNet as the papers write them, with operations of autograd alone."""
    switches = {}
    if domain != net.source:
        for name, part in parts_of(net, domain).items():
            switches[net.layer(name)] = straight_through(part)

    def norm_relu(norms, x):
        norm = norms[domain]
        statistics = (None, None) if train else (norm.running_mean, norm.running_var)
        return F.relu(F.batch_norm(x, *statistics, norm.weight, norm.bias, train))

    def conv(layer, x):
        if layer in switches:
            x = x * switches[layer].view(-1, 1, 1)
        return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)

    wrn = net.backbone
    x = conv(wrn.conv1, x)
    for block in (*wrn.block1, *wrn.block2, *wrn.block3):
        out = norm_relu(block.bn1, x)
        if block.shortcut is not None:
            x = conv(block.shortcut, out)
        out = norm_relu(block.bn2, conv(block.conv1, out))
        x = x + conv(block.conv2, out)
    x = norm_relu(wrn.bn1, x)
    return wrn.fc[domain](x.mean((2, 3)))


def costs_by_hand(net, of, size=16):
    """({layer: what a channel costs}, the share of the stem) of a WRN that is not pruned."""
    stem = {"params": 3 * 16 * 9, "macs": 3 * 16 * 9 * size ** 2}.get(of, 0)
    each = {}
    total = stem
    for name in net.layers:
        conv = net.layer(name)
        side = math.ceil(size / 2 ** int(name[5]))  # block1 works at half the size, block3 at 1/8
        weights = conv.out_channels * conv.kernel_size[0] ** 2          # of a channel
        each[name] = {"layers": 1 / conv.in_channels, "channels": 1, "params": weights,
                      "macs": weights * side ** 2}[of]
        total += each[name] * conv.in_channels
    return {name: value / total for name, value in each.items()}, stem / total


@cases("frozen", [True, False])
@cases("shape", [(3, 6, 8, 9), (1, 6, 5, 5), (0, 6, 8, 9)])     # masks W, x, x
@cases("arguments", [
    {"stride": 2, "padding": 1}, {"padding": (0, 2), "dilation": (2, 1), "bias": False},
    {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"groups": 2}])
def test_a_switched_convolution_by_hand(arguments, shape, frozen):
    layer = ba2ps.SwitchedConv2d(6, 4, 3, **arguments).double().requires_grad_(not frozen)
    conv = nn.Conv2d(6, 4, 3, **arguments).double()
    conv.weight, conv.bias = layer.weight, layer.bias
    x = torch.randn(shape).double().requires_grad_()
    close(layer(x), conv(x))                # without switches
    layer.switches = torch.tensor([0.5, -0.5, 0.0, 1e-8, -1e-8, 0.2]).double().requires_grad_()
    out = layer(x)
    expected = conv(x * torch.tensor([1, 0, 0, 1, 0, 1]).view(-1, 1, 1))
    close(out, expected)
    cotangent = torch.randn_like(out)
    inputs = [x] if frozen else [x, *conv.parameters()]
    s_grad, *mine = grad(out, [layer.switches, *inputs], cotangent)
    close(mine, list(grad(expected, inputs, cotangent)))
    for c in range(6):      # straight through: what channel c alone adds, whether it is on or off
        one = F.one_hot(torch.tensor(c), 6).view(-1, 1, 1)
        alone = conv(x * one) - conv(x * 0)
        close(s_grad[c], (alone * cotangent).sum(), rtol=1e-10, atol=1e-10)


TOY = """
torch.manual_seed(0)
layers = []
for before in (3, 16, 16):
    layers += [nn.Conv2d(before, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)]
net = MultiDomain(nn.Sequential(*layers), {"rows": 2, "columns": 2}, "source", 8)
net.train().freeze_backbone()
cost = torch.full((32,), 1 / 32, dtype=torch.double)
for domain in net.domains:
    start_switches(net, domain, torch.rand(32), cost, 0.9)
sgd = torch.optim.SGD(net.owned_parameters(), 0.1, 0.9)
adam = torch.optim.Adam(net.switches.parameters(), 1e-3)
multiplier = dict.fromkeys(net.domains, 0.0)
y = torch.arange(32) % 2
for step in range(120):
    for domain in net.domains:
        lines = torch.randn(32, 3, 8, 1) * y.view(-1, 1, 1, 1)
        x = (lines if domain == "rows" else lines.mT) + torch.randn(32, 3, 8, 8) / 2
        logits = net(x, domain)
        s = binarized(net)
        usage = dict(zip(net.domains, s.mean(dim=1)))[domain]
        loss = F.cross_entropy(logits, y) + 0.1 * sharing_loss(s, 0.5)
        loss = loss + budget_loss(usage, 0.5, multiplier[domain])
        sgd.zero_grad()
        adam.zero_grad()
        loss.backward()
        sgd.step()
        adam.step()
        keep_a_channel(net, net.domains)
        multiplier[domain] = next_multiplier(multiplier[domain], usage, 0.5)
        if step == 80:
            assert multiplier[domain] > 0 and usage < 0.8, (multiplier, usage)
            hold_budget(net, domain, cost, 0.5)
        right = (logits.argmax(1) == y).double().mean()
        assert step < 119 or right > 0.85 and usage <= 0.6, (right, usage)
import sys
source = sys.stdin.read()
before = set(sys.modules)
opened = []
import ba2ps
print({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
sys.addaudithook(lambda event, args: event == "open" and opened.append(args))
exec(source, {"__name__": "again"})
print(opened)"""


def test_sections_1_to_3_train_alone_and_an_import_opens_and_prints_nothing():
    code = "import copy\nimport torch\n" + "".join(SECTIONS[1:4]) + TOY
    run = subprocess.run([sys.executable, "-c", code], input=SOURCE, capture_output=True,
                         cwd=Path(ba2ps.__file__).parent, text=True, encoding="utf-8")
    assert run.stdout + run.stderr == "{'ba2ps'}\n[]\n"


def test_wrn_28_4_has_the_published_shape_and_the_papers_params():
    wrn = ba2ps.WideResNet()
    weights = 3 * 16 * 9                    # the stem
    for a, b in ((16, 64), (64, 128), (128, 256)):          # a block with a shortcut, three more
        weights += 9 * a * b + 9 * b * b + a * b + 3 * 2 * 9 * b * b
    sizes = dict.fromkeys([nn.Conv2d, nn.BatchNorm2d, nn.Linear], 0)
    for module in wrn.modules():
        if type(module) in sizes:
            sizes[type(module)] += module.weight.numel()
    assert [*sizes.values(), weights] == [5_839_280, 3600, 256_000, 5_839_280]
    net = ba2ps.MultiDomain(wrn, {f"d{i}": 10 for i in range(10)}, image_size=32)
    for row in net.switches.values():
        close(row.detach(), torch.full((3552,), 1e-3))          # 3,555 with the stem
    by_hand = (weights + 10 * 4 * 3600 + 10 * 3552 / 32) / weights
    assert ba2ps.params(net) == approx(by_hand) == approx(1.025, abs=5e-4)


@cases("change", ["train", "eval", "trained", "bfloat16"])
def test_the_network_is_that_of_the_papers(change):
    """Pre-activation blocks as in Zagoruyko's, with a mask on what a convolution reads."""
    net = network(depth=16).train(change != "eval").to(memory_format=torch.channels_last)
    low = change == "bfloat16"
    net.to(torch.float32 if low else torch.float64)
    if change == "trained":
        net.requires_grad_(True)
    x = torch.randn(4, 3, 15, 16).to(net.layer("conv1").weight)
    with torch.autocast("cpu", torch.bfloat16, low):
        outputs = net(x, "d1"), plain(net, x, "d1", change != "eval")
    close(*outputs, rtol=0.05 if low else 1e-9, atol=0.05 if low else 1e-9)
    trained = [net.switches["d1"]] if low else [p for p in net.parameters() if p.requires_grad]
    mine, hand = (grad(out.square().sum(), trained, allow_unused=True) for out in outputs)
    if low:
        assert torch.cosine_similarity(mine[0], hand[0], dim=0) > 0.99
    else:
        close(mine, hand)


def test_a_batch_touches_its_own_domain_alone():
    net = network()
    x = images()
    logits = net(x, "source")
    net.add_domain("d2", 3)
    net.train().freeze_backbone()
    before = copy.deepcopy(net)
    net(x, "d2").sum().backward()
    owned = set(map(id, net.owned_parameters(["d2"])))
    for name, p in net.named_parameters():
        mine = "d2" in name.split(".")
        assert p.requires_grad == (mine or ".d0" in name or ".d1" in name), name
        assert (p.grad is not None) == mine, name
        assert (id(p) in owned) == (mine and "switches" not in name), name
    statistics = re.compile(r".*d2\.(running|num).*")
    assert changed(net, before) == set(filter(statistics.match, net.state_dict()))
    assert torch.equal(net.eval()(x, "source"), logits)
    net.remove_domain("d2")
    assert net.state_dict().keys() == network().state_dict().keys()


@cases("make", [
    *(lambda name=name: network().add_domain(name, 3)
      for name in ("d0", "source", "", "a.b", "keys", 3)),
    lambda: ba2ps.WideResNet(27), lambda: network()(images(), "d7"),
    lambda: ba2ps.params(network(), "d0"), lambda: ba2ps.prune(network(), ["d0", "d7"]),
    lambda: ba2ps.prune(network(0)), lambda: ba2ps.costs(network(), "flops"),
    lambda: ba2ps.load("none.pt"), lambda: ba2ps.load("/")])
def test_what_cannot_be_is_refused_in_one_line(make):
    with refused():
        make()


@cases("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_any_optimizer_trains_with_a_scaler_accumulation_and_rates_by_domain(make):
    net = network().double()                # eval: a batch in halves is the whole
    x = images().double()
    rows = [p for name, p in net.named_parameters() if name.startswith("switches.")]
    assert [*map(id, rows)] == [*map(id, net.switches.parameters())]
    hand = copy.deepcopy(rows)
    hand[0].grad, = grad(plain(net, x, "d0").square().sum(), rows[0])
    scaler = torch.amp.GradScaler("cpu")
    for half in x.split(2):
        scaler.scale(net(half, "d0").square().sum()).backward()
    mine, other = (make([{"params": [a], "lr": 0.5}, {"params": [b]}]) for a, b in (rows, hand))
    scaler.step(mine)
    other.step()
    close(rows, hand)


CALLS = []


def count(module, inputs, output):
    CALLS.append(module)


@cases("make", [network, lambda: ba2ps.prune(network())])
def test_a_network_is_an_ordinary_module(make, tmp_path):
    net = make().train()
    x = images()
    net.layer("block1.0.conv1").register_forward_hook(count)
    CALLS.clear()
    net(x, "d0").sum().backward()           # it has gradients when it is copied
    net.eval()(x, "d0")
    assert len(CALLS) == 2                  # as often in training as in evaluation
    net.train().layer("block2.0.bn1").eval()
    torch.save(net, tmp_path / "net.pt")
    read = torch.load(tmp_path / "net.pt", weights_only=False)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    pickled = pickle.loads(pickle.dumps(net))
    for its in (copy.deepcopy(copy.deepcopy(net)), pickled, averaged.module, read):
        assert [*dict(its.named_parameters())] == [*dict(net.named_parameters())]
        for module, old in zip(its.modules(), net.modules(), strict=True):
            assert module.training == old.training
            assert type(module).__name__ == type(old).__name__
            assert len(module._forward_hooks) == len(old._forward_hooks)
            assert vars(module).keys() == vars(old).keys()
        assert not changed(its, net)
        assert torch.equal(its.eval()(x, "d0"), copy.deepcopy(net).eval()(x, "d0"))
        its.switches["d0"].data.neg_()
        assert changed(its, net) == {"switches.d0"}             # a copy shares nothing


def test_pruning_keeps_modes_and_the_network_and_refuses_an_empty_layer():
    net = network(3).train()
    net.layer("block2.0.bn1").eval()
    before = [str(vars(module)) for module in net.modules()]
    two = ba2ps.prune(net, ["d0", "d2"])
    for use in (ba2ps.masks, ba2ps.params, ba2ps.macs, ba2ps.usage):    # measuring changes nothing
        use(net)
    assert [str(vars(module)) for module in net.modules()] == before
    for name, module in two.named_modules():
        assert module.training == ("block2.0.bn1" not in name), name
    parts_of(net, "d1")["block1.0.conv1"].data.fill_(-1)
    with refused("block1.0.conv1"):
        ba2ps.prune(net)


def test_threads_get_their_own_domain_and_may_prune_at_once():
    net = network(3)
    x = images(2)
    expected = {domain: net(x, domain) for domain in net.classes}
    with ThreadPoolExecutor(4) as pool:
        jobs = []
        for domain in net.domains * 8:
            jobs.append((domain, pool.submit(lambda d: ba2ps.prune(net, [d])(x, d), domain)))
            jobs.append((domain, pool.submit(net, x, domain)))
            jobs.append(("source", pool.submit(net, x, "source")))
        for domain, job in jobs:
            close(job.result(), expected[domain])


def test_checkpointing_the_call_gives_the_same_gradients():
    net = network().double()
    x = images(2).double()
    row = net.switches["d0"]
    out = checkpoint(net, x, "d0", use_reentrant=False)
    net(x, "d1")                            # another domain between the two passes
    close(grad(out.square().sum(), row), grad(plain(net, x, "d0").square().sum(), row))


def test_compile_breaks_at_no_layer_and_gives_the_same():
    net = network().train()
    x = images()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    close(*(grad(run(x, "d0").square().sum(), net.switches["d0"]) for run in (compiled, net)))


@cases("form", ["intersection", "union", "jaccard"])
def test_the_sharing_loss_by_hand_and_by_finite_differences(form):
    s = (torch.rand(3, 12) > 0.3).double().requires_grad_()
    sets = [{i for i in range(12) if row[i]} for row in s.tolist()]
    both = len(set.intersection(*sets))
    either = len(set.union(*sets))
    excess = {"intersection": 1 - both / 6, "union": either / 6 - 1, "jaccard": 1 - both / either}
    assert 0 < both < 6 < either
    assert ba2ps.sharing_loss(s, 0.5, form).item() == approx(excess[form])
    for point in (s, torch.rand(3, 12).double().requires_grad_()):      # also of what is off
        assert torch.autograd.gradcheck(lambda s: ba2ps.sharing_loss(s, 0.5, form), point)
    assert ba2ps.sharing_loss(torch.full((3, 12), float(form != "union")), 0.5, form).item() == 0


def test_the_budget_loss_and_the_multiplier_by_hand():
    usage = torch.tensor([0.75, 0.25], requires_grad=True)
    losses = ba2ps.budget_loss(usage, 0.5, 3.0)
    assert losses.tolist() == [0.75, 0]
    assert grad(losses.sum(), usage)[0].tolist() == [3, 0]
    assert ba2ps.next_multiplier(0.0, usage[0], 0.5, 2.0) == 0.5
    assert ba2ps.next_multiplier(1.0, 0.25, 0.5, 2.0) == 0.5
    assert ba2ps.next_multiplier(0.25, 0.25, 0.5, 2.0) == 0


def test_binarized_moves_the_domains_that_are_named():
    net = network(3)
    s = ba2ps.binarized(net, moving=["d1"])
    assert s.tolist() == [[float(value > 0) for value in row] for row in net.switches.values()]
    s.sum().backward()
    assert net.switches["d1"].grad.tolist() == [1] * s.shape[1]
    assert net.switches["d0"].grad is None  # not a zero: Adam's momentum would move it


@cases("values", [torch.arange(-32.0, 0), torch.zeros(32)])
def test_a_layer_whose_switches_all_fall_below_zero_keeps_exactly_one(values):
    net = network()
    for domain in net.domains:
        parts_of(net, domain)["block2.0.conv2"].data.copy_(values)
    before = copy.deepcopy(net)
    ba2ps.keep_a_channel(net, ["d1"])
    on = parts_of(net, "d1")["block2.0.conv2"] > 0
    assert on.sum() == 1 and values[on] == values.max()
    assert (net.switches["d1"] != before.switches["d1"]).sum() == 1
    assert changed(net, before) == {"switches.d1"}


def best(score, each, room, even=0.0):
    """(the best of each layer, those with the next highest scores that there is room for)"""
    first = set()
    for name in each:
        layer = sorted((key for key in score if key[0] == name), key=score.get)
        first |= set(layer[-max(1, int(even * len(layer))):])
    left = room + 1e-9 - sum(each[name] for name, _ in first)
    on = set()
    for key in sorted(set(score) - first, key=score.get, reverse=True):
        left -= each[key[0]]
        if left < 0:
            break
        on.add(key)
    return first, on


@cases("of", ba2ps.BUDGETS)
@cases("budget", [0.3, 0.8])
def test_a_start_and_a_held_budget_by_hand(of, budget):
    net = network(on=0.95)
    each, fixed = costs_by_hand(net, of)
    cost, _ = ba2ps.costs(net, of)

    before = channels_on(net, "d0", -2)
    first, on = best(channels_on(net, "d0"), each, budget - fixed)
    ba2ps.hold_budget(net, "d0", cost, budget - fixed)
    for key, value in channels_on(net, "d0", -2).items():
        assert value == before[key] or key not in first | on and value == 0
    assert set(channels_on(net, "d0")) == first | on
    net.switches["d0"].data.fill_(1)        # all alike: not one too many goes off
    ba2ps.hold_budget(net, "d0", cost, budget - fixed)
    assert budget - max(each.values()) + 1e-9 < ba2ps.usage(net, of)["d0"] <= budget + 1e-9

    importance = torch.rand(len(cost)).double()
    worth = {key: value / each[key[0]] for key, value in zip(before, importance.tolist())}
    for even in (0.2, 0.0):
        first, on = best(worth, each, budget - fixed, even)
        ba2ps.start_switches(net, "d0", importance, cost, budget - fixed, 0.5, even)
        row = channels_on(net, "d0", -2)
        assert set(channels_on(net, "d0")) == first | on
        order = sorted(row, key=row.get, reverse=True)
        assert set(order[:len(first)]) == first
        assert order[len(first):] == sorted(set(row) - first, key=worth.get, reverse=True)
        assert (row[order[0]], row[order[-1]]) == (0.5, -0.5)
    steps = np.diff([row[key] for key in order])    # evenly down to 0, and evenly from there
    number = len(first | on)
    assert steps[:number - 1] == approx(-0.5 / number, abs=1e-6)
    assert steps[number:] == approx(-0.5 / (len(row) - number), abs=1e-6)


def test_a_pool_by_hand():
    net = network()
    each, fixed = costs_by_hand(net, "params")
    importance = torch.rand(sum(ba2ps.widths(net))).double()
    keys = list(channels_on(net, "d0", -2))
    worth = {key: value / each[key[0]] for key, value in zip(keys, importance.tolist())}
    for room, even in ((0.3, 0.2), (0.7, 0.0), (1.0, 0.5)):
        first, on = best(worth, each, room - fixed, even)
        pool = ba2ps.pooled(net, importance, room, even).tolist()
        assert {key for key, inside in zip(keys, pool) if inside} == first | on
    assert all(pool) and not ba2ps.pooled(net, importance, 0.0).any()


def raising():
    yield images(), None
    raise KeyboardInterrupt


@cases("batches, error", [
    (list(zip(torch.randn(3, 4, 3, 16, 16), "abc")), None), ([], ba2ps.InputError),
    (raising(), KeyboardInterrupt)])
def test_reestimated_statistics_by_hand_or_as_before(batches, error):
    net = network(depth=16).train()
    net.layer("block2.0.bn1").eval()
    net.layer("bn1")["d0"].momentum = 0.3
    before = copy.deepcopy(net)
    seen = {name: [] for name in net.owned[:-1]}
    for name in seen:
        net.layer(name).register_forward_pre_hook(lambda m, x, name=name: seen[name].append(x[0]))
    if error:
        with pytest.raises(error):
            ba2ps.reestimate_batch_norm(net, "d0", batches)
        assert not changed(net, before)
    else:
        ba2ps.reestimate_batch_norm(net, "d0", batches)
        assert len(changed(net, before)) == 3 * len(seen) == 39
        for name, inputs in seen.items():
            x = torch.stack(inputs).transpose(1, 2).flatten(2)  # (batches, C, values)
            close(net.layer(name)["d0"].running_mean, x.mean((0, 2)), rtol=1e-4, atol=1e-4)
            close(net.layer(name)["d0"].running_var, x.var(2).mean(0), rtol=1e-4, atol=1e-4)
    for module, old in zip(net.modules(), before.modules()):
        assert module.training == old.training
        assert getattr(module, "momentum", 0) == getattr(old, "momentum", 0)


def test_costs_by_loops_masked_and_pruned():
    net = network(3, 10, 2, on=0.3)
    size = 33
    on = {domain: channels_on(net, domain) for domain in net.domains}
    norms = sum(net.layer(name)["d0"].num_features for name in net.owned[:-1])
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    hand = {of: costs_by_hand(net, of, size) for of in ba2ps.BUDGETS}
    whole = 16 * 27 * size ** 2 / hand["macs"][1]               # MACs of the stem over their share
    for of, (each, fixed) in hand.items():
        cost, share = ba2ps.costs(net, of, size)
        by_hand = [each[name] for name, _ in channels_on(net, "d0", -2)]
        assert (cost.tolist(), share) == (approx(by_hand), approx(fixed))

    kept = ba2ps.prune(net, keep_source=True)
    for domains in (["d0"], ["d2", "d0"], ["d0", "d1", "d2"]):
        union = set().union(*(on[domain] for domain in domains))

        def left(of, own=union):
            return hand[of][1] + sum(hand[of][0][name] for name, _ in own)

        own = len(domains) * (4 * norms + len(union) / 32)
        for its in (net, ba2ps.prune(net, domains), kept):
            off = {domain: 1 - left("layers", on[domain]) for domain in domains}
            table_7 = approx(off), approx(1 - left("layers"))
            assert ba2ps.sparsity(its, domains) == table_7
            assert ba2ps.params(its, domains) == approx(left("params") + own / weights)
            assert ba2ps.macs(its, domains, size) == round(left("macs") * whole)
            assert ba2ps.macs(its, None, size) == round(whole)
            for of in ba2ps.BUDGETS:
                uses = {domain: left(of, on[domain]) for domain in domains}
                assert ba2ps.usage(its, of, size, domains) == approx(uses)
    assert ba2ps.params(net, ["source"]) == approx(1 + 4 * norms / weights)


def test_a_domain_that_comes_after_pruning_has_the_channels_that_are_left():
    net = network(2, on=0.6)
    each, fixed = costs_by_hand(net, "params")
    small = ba2ps.prune(net)
    small.add_domain("new", 4)
    union = (net.switches["d0"] > 0) | (net.switches["d1"] > 0)
    assert small.switches["new"].shape == (int(union.sum()),)
    randomised(small)                       # new switches and norms, for all
    use = fixed + sum(each[name] for name, _ in channels_on(small, "new"))
    assert ba2ps.usage(small, "params")["new"] == approx(use)
    x = images()
    close(ba2ps.prune(small, ["new"])(x, "new"), small(x, "new"), rtol=1e-4, atol=1e-4)


def without_source(net):
    net.remove_domain("source")
    return net


def twice(net):
    return ba2ps.prune(ba2ps.prune(net, ["d0", "d1"]), ["d1"])


def with_source(net):
    return ba2ps.prune(net, keep_source=True)


FACTS = {"state": 1, "name": "x", "kept": {}, "format": 2, "facts": [0], "path": "a",
         "network": None, "where": Path("b"), "grid": {(1, 2): 3}, "n": np.int64(3),
         "ok": np.bool_(True), "x": np.arange(2), "pair": (1, np.float64(0.5))}
READ = FACTS | {"where": "b", "n": 3, "ok": True, "x": [0, 1], "pair": (1, 0.5)}


@cases("make", [copy.deepcopy, without_source, ba2ps.prune, with_source, twice])
def test_a_file_gives_back_the_network_and_the_facts(tmp_path, make):
    net = make(network(3))
    ba2ps.save(tmp_path / "m.pt", net, **FACTS)
    loaded, found = ba2ps.load(tmp_path / "m.pt")
    assert found == READ
    assert (loaded.source, loaded.classes, loaded.name) == ("source", net.classes, "WRN-10-1")
    for domain, size in itertools.product(net.classes, (16, 9)):
        x = images(2, size)
        assert torch.equal(loaded.eval()(x, domain), net(x, domain))
    assert not changed(loaded, net)
    close(ba2ps.masks(loaded), ba2ps.masks(net))
    held = torch.load(tmp_path / "m.pt", weights_only=True)     # named, whoever reads it
    assert held["state"].keys() == net.state_dict().keys()


class Fact:
    """What torch.load(weights_only=True) does not read, for it runs code when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_what_cannot_be_written_or_read_leaves_the_old_file(tmp_path, monkeypatch):
    def full(content, part):
        Path(part).write_bytes(b"half")
        raise error

    net = network(1)
    path = tmp_path / "m.pt"
    ba2ps.save(path, net)
    old = path.read_bytes()
    for fact in (Fact(), [Fact()], Fact, lambda: 0):
        with refused(path):
            ba2ps.save(path, net, note=fact)
    for error in (OSError("No space left on device"), RuntimeError("PytorchStreamWriter\nfailed")):
        monkeypatch.setattr(torch, "save", full)
        with refused(path):
            ba2ps.save(path, net)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@cases("make", [copy.deepcopy, ba2ps.prune])
def test_damaged_files_are_named_in_one_line_and_run_no_code(tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = make(network())
    ba2ps.save("m.pt", net)
    raw = Path("m.pt").read_bytes()
    held = torch.load("m.pt", weights_only=True)
    start = raw.index(net.layer("conv1").weight.data.numpy().tobytes())
    for at in range(0, 1000, 99):
        bit = bytes([raw[start + at] ^ 1 << at % 8])
        for damaged in (raw[:start + at] + bit + raw[start + at + 1:], raw[:at * len(raw) // 1000]):
            Path("m.pt").write_bytes(damaged)
            with refused("m.pt"):
                ba2ps.load("m.pt")
    name = next(name for name in held["state"] if name.endswith("bn1.d1.weight"))
    weight = held["state"][name]
    wrong = [[1], Fact(), {}, held | {"kept": dict.fromkeys(held["kept"]), "pruned": True}]
    for value in (None, "x", weight[1:], weight / 0):
        wrong.append(held | {"state": held["state"] | {name: value}})
    for key in ("format", "source", "classes", "name", "state", "image_size"):
        wrong += [held | {key: value} for value in ([3.5], {"a": "b"}, Fact())]
        wrong.append({other: value for other, value in held.items() if other != key})
    for content in wrong:
        torch.save(content, "m.pt")
        with refused("m.pt"):
            ba2ps.load("m.pt")
    assert not Path("ran").exists()
