# SPDX-License-Identifier: MIT
"""The method: switches, layers, losses, costs, pruning, checkpoints, each against a computation of another kind."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ba2ps

ROOT = Path(__file__).resolve().parent.parent


def network(domains=3, depth=10, widen_factor=1, share_on=0.5, source_classes=7):
    """A small network whose batch-norm statistics and switches are random, so that nothing is equal by accident."""
    net = ba2ps.WideResNet(depth, widen_factor, "source", source_classes)
    for i in range(domains):
        net.add_domain(f"d{i}", 5 + i)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, ba2ps.SwitchedConv2d):
            for switches in module.switches.values():
                switches.data = share_on - torch.rand_like(switches)
    net.freeze_backbone()
    return net.eval()


# --- switches and layers ---------------------------------------------------------------------------------------------

def test_binarize_is_a_threshold_forward_and_the_identity_backward():
    s = torch.tensor([[-1.0, 0.0, 1e-8], [2.0, -1e-8, 1e-3]], requires_grad=True)
    out = ba2ps.binarize(s)
    assert out.tolist() == [[0, 0, 1], [1, 0, 1]]
    grad = torch.randn(2, 3)
    out.backward(grad)
    assert torch.equal(s.grad, grad)


def test_switched_conv_reads_only_what_is_on_and_every_switch_has_its_gradient():
    layer = ba2ps.SwitchedConv2d(4, 3, 3, 2, 1, domains=["a", "b"]).double()
    layer.weight.requires_grad_(False)
    assert all(torch.equal(s, torch.full((4,), 1e-3).double()) for s in layer.switches.values())
    layer.switches["a"].data = torch.tensor([0.5, -0.5, 0.0, 0.1]).double()
    x, cotangent = torch.randn(2, 4, 7, 9).double(), torch.randn(2, 3, 4, 5).double()
    out = layer(x, "a")
    # independent: a convolution of channels 0 and 3 alone
    expected = F.conv2d(x[:, [0, 3]], layer.weight[:, [0, 3]], layer.bias, 2, 1)
    torch.testing.assert_close(out, expected)
    out.backward(cotangent)
    for c in range(4):  # d out / d s_c is what channel c alone adds, on or off
        alone = F.conv2d(x[:, c:c + 1], layer.weight[:, c:c + 1], None, 2, 1)
        torch.testing.assert_close(layer.switches["a"].grad[c], (alone * cotangent).sum())
    assert layer.switches["b"].grad is None and layer.weight.grad is None
    torch.testing.assert_close(layer(x, "source"), F.conv2d(x, layer.weight, layer.bias, 2, 1))


@pytest.mark.parametrize("arguments", [
    {}, {"stride": 2, "padding": 1}, {"padding": (0, 2), "dilation": (2, 1), "bias": False}, {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_a_switched_conv_are_those_of_masking_its_input(arguments, layout):
    """Of the input, weight and bias where somebody trains them, against autograd's own; nothing large is kept but the input."""
    layer = ba2ps.SwitchedConv2d(6, 5, 3, domains=["a"], **arguments).double().to(memory_format=layout)
    layer.switches["a"].data = torch.randn(6).double()
    x = torch.randn(3, 6, 8, 9).double().to(memory_format=layout).requires_grad_()
    on = (layer.switches["a"] > 0).double().requires_grad_()
    wanted = [x, *layer.parameters()]
    plain = torch.nn.Conv2d(6, 5, 3, **arguments).double()
    plain.weight, plain.bias = layer.weight, layer.bias
    expected = plain(x * on[:, None, None])
    cotangent = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, [on if p is layer.switches["a"] else p for p in wanted], cotangent)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x, "a")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, wanted, cotangent), grads)
    if layer.padding_mode == "zeros" and layer.padding != "same":
        assert {t.data_ptr() for t in kept if t.numel() >= x.numel()} == {x.data_ptr()}
    layer.requires_grad_(False)  # settled, and frozen
    out = layer(x, "a")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, [x], cotangent), grads[:1])


@pytest.mark.parametrize("arguments", [{"padding": 1, "bias": False}, {"stride": 2, "dilation": (2, 1)}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("trained", [True, False])
def test_batch_norm_relu_and_a_switched_conv_in_one_are_the_three(arguments, layout, trained):
    """Against autograd's own, with a mask on what the convolution reads; a float and a byte are kept of each activation."""
    torch.manual_seed(3)
    layer = ba2ps.SwitchedConv2d(6, 5, 3, domains=["a", "b"], **arguments).double().to(memory_format=layout)
    norms = ba2ps.DomainBatchNorm2d(6, ["a", "b"]).double()
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        for parameter in norms.parameters():
            parameter.uniform_(-1, 1)
        layer.switches["a"].copy_(torch.tensor([0.3, -0.2, 0.1, 0, -0.1, 0.2]))
        layer.switches["b"].copy_(-torch.rand(6))  # of which the strongest is on
    for domain, on in (("a", [1, 0, 1, 0, 0, 1]), ("b", (layer.switches["b"] == layer.switches["b"].max()).tolist())):
        x = torch.randn(4, 6, 8, 9).double().to(memory_format=layout).requires_grad_()
        on, norm, switches = torch.tensor(on).double().requires_grad_(), norms[domain], layer.switches[domain]
        switches.requires_grad_(trained)
        wanted = [x, norm.weight, norm.bias, *([switches] if trained else []), *([layer.bias] if layer.bias is not None else [])]
        y = F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, True)) * on[:, None, None]
        expected = F.conv2d(y, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
        cotangent = torch.randn_like(expected)
        grads = torch.autograd.grad(expected, [on if p is switches else p for p in wanted], cotangent)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = ba2ps.norm_relu_conv(norms, layer, x, domain)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, wanted, cotangent), grads)
        large = [t for t in kept if t.numel() == x.numel()]
        assert len(large) == 2 and large[0].data_ptr() == x.data_ptr() and large[1].element_size() == 1
        torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.transpose(0, 1).flatten(1).var(1))
        assert norm.num_batches_tracked == 1


def test_where_they_cannot_be_one_the_three_run(monkeypatch):
    """Without training, under autocast, of the source, with trained weights: one function would be wrong, or lose something."""
    class Never:
        apply = None
    layer, norms = ba2ps.SwitchedConv2d(6, 5, 3, domains=["a"]), ba2ps.DomainBatchNorm2d(6, ["a", "source"])
    x = torch.randn(2, 6, 5, 5)
    monkeypatch.setattr(ba2ps, "_NormReluConvolution", Never)

    def one(domain="a"):
        try:
            return ba2ps.norm_relu_conv(norms, layer, x, domain) is None
        except TypeError:  # None was called
            return True
    assert not one()  # its weights are trained
    layer.weight.requires_grad_(False)
    assert one() and not one("source")
    with torch.no_grad():
        assert not one()
    with torch.autocast("cpu", torch.bfloat16):
        assert not one()
    norms["a"].momentum = None
    assert not one()
    norms["a"].momentum = 0.1
    norms["a"].eval()
    assert not one()
    norms["a"] = type("OtherBatchNorm2d", (nn.BatchNorm2d,), {})(6)
    assert not one()


def test_joined_switches_are_the_layers_and_so_are_their_gradients():
    net = network(2).train()
    before = {(name, d): s.detach().clone() for name, layer in ba2ps.switched_layers(net).items() for d, s in layer.switches.items()}
    apart, widths = network(2).train(), [layer.in_channels for layer in ba2ps.switched_layers(net).values()]
    apart.load_state_dict(net.state_dict())
    joined, x = ba2ps.join_switches(net, net.domains), torch.randn(4, 3, 16, 16)
    for name, layer in ba2ps.switched_layers(net).items():
        assert all(torch.equal(s, before[name, d]) for d, s in layer.switches.items())
    one = torch.optim.Adam(joined.values(), 1e-2)
    many = torch.optim.Adam([p for name, p in apart.named_parameters() if ".switches." in name], 1e-2)
    for _ in range(2):  # the task's gradient comes layer by layer, that of the losses all at once
        s = ba2ps.binarize(torch.stack(list(joined.values())), widths)
        assert torch.equal(s, ba2ps.binary_switches(net, net.domains))
        for value in joined.values():
            value.grad.zero_()
        (net(x, "d0").square().sum() + ba2ps.sharing_loss(s, 0.3)).backward()
        one.step()
        many.zero_grad()
        (apart(x, "d0").square().sum() + ba2ps.sharing_loss(ba2ps.binary_switches(apart, apart.domains), 0.3)).backward()
        many.step()
        for (name, layer), other in zip(ba2ps.switched_layers(net).items(), ba2ps.switched_layers(apart).values()):
            for d in net.domains:
                torch.testing.assert_close(layer.switches[d], other.switches[d], msg=name)
                assert not torch.equal(layer.switches[d], before[name, d])


def test_a_switched_conv_takes_a_batch_of_none():
    layer = ba2ps.SwitchedConv2d(3, 2, 1, domains=["a"])
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    layer(x, "a").sum().backward()
    assert x.grad.shape == x.shape and layer.switches["a"].grad.tolist() == [0, 0, 0]


def test_the_strongest_channel_stays_on_and_keeps_its_gradient():
    layer = ba2ps.SwitchedConv2d(3, 2, 1, domains=["a", "b"])
    layer.switches["a"].data = torch.tensor([-0.3, -0.1, -0.2])
    on = layer.binary_switches(["a", "b"])
    assert on.tolist() == [[0, 1, 0], [1, 1, 1]]
    on[0].sum().backward()
    assert layer.switches["a"].grad.tolist() == [1, 1, 1]


def test_grouped_convolutions_are_refused():
    with pytest.raises(ValueError, match="groups"):
        ba2ps.SwitchedConv2d(4, 4, 3, groups=2)


def test_a_batch_of_one_domain_leaves_the_batch_norm_of_the_others_alone():
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(4, 3, 32, 32), "d1").sum().backward()
    for name, value in net.state_dict().items():
        mine = ".d1." in name and ("running" in name or "num_batches" in name)
        assert torch.equal(value, before[name]) != mine, name
    for name, p in net.named_parameters():
        assert (p.grad is not None) == ("d1" in name.split(".")), name  # and no gradient for what is not d1's


def test_wrn_28_4_has_the_published_shape():
    net = ba2ps.WideResNet()
    weights = 3 * 16 * 9  # by hand: the stem, then per group the first block with its shortcut and three more
    for before, after in ((16, 64), (64, 128), (128, 256)):
        weights += 9 * before * after + 9 * after * after + before * after + 3 * 2 * 9 * after * after
    assert sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d)) == weights == 5_839_280
    assert sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)) == 3600
    assert sum(layer.total_channels for layer in ba2ps.switched_layers(net).values()) == 3552  # 3,555 with the stem
    sizes = []
    for group in (net.block1, net.block2, net.block3):
        group[-1].register_forward_hook(lambda module, inputs, out: sizes.append(tuple(out.shape[1:])))
    net.eval()
    assert net(torch.randn(1, 3, 64, 64), "imagenet12").shape == (1, 1000)
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert net(torch.randn(1, 3, 33, 47), "imagenet12").shape == (1, 1000)


def test_the_block_is_the_pre_activation_block_of_wide_resnets():
    net = network(1)
    block, x = net.block2[0], torch.randn(2, 16, 8, 8)
    a = F.relu(block.bn1["source"](x))
    main = F.conv2d(F.relu(block.bn2["source"](F.conv2d(a, block.conv1.weight, None, 2, 1))), block.conv2.weight, None, 1, 1)
    torch.testing.assert_close(block(x, "source"), F.conv2d(a, block.shortcut.weight, None, 2) + main)
    for block, x in ((net.block1[0].train(), x), (net.block2[0].train(), torch.randn(2, 16, 8, 8))):  # as they are trained

        def switched(layer, x, stride):
            on = layer.switches["d0"] > 0
            return F.conv2d(x[:, on], layer.weight[:, on], None, stride, layer.padding)

        def normed(norm, x):
            return F.relu(F.batch_norm(x, None, None, norm["d0"].weight, norm["d0"].bias, True))
        a, stride = normed(block.bn1, x), block.conv1.stride
        main = switched(block.conv2, normed(block.bn2, switched(block.conv1, a, stride)), 1)
        expected = main + (switched(block.shortcut, a, stride) if block.shortcut is not None else x)
        torch.testing.assert_close(block(x, "d0"), expected)


def test_the_source_runs_the_untouched_backbone_whatever_domains_are_added():
    torch.manual_seed(1)
    plain = ba2ps.WideResNet(10, 1, "source", 7).eval()
    x = torch.randn(2, 3, 32, 32)
    before = plain(x, "source")
    plain.add_domain("other", 3)
    for layer in ba2ps.switched_layers(plain).values():
        layer.switches["other"].data.fill_(-1)
    assert torch.equal(plain(x, "source"), before)


@pytest.mark.parametrize("make", [lambda: ba2ps.WideResNet(27), lambda: ba2ps.WideResNet(10, 0),
                                  lambda: ba2ps.WideResNet(10, 1, "a.b"), lambda: network().add_domain("d0", 3),
                                  lambda: network().add_domain("keys", 3), lambda: network().add_domain("source", 3),
                                  lambda: network()(torch.zeros(1, 3, 32, 32), "d7")])
def test_what_cannot_be_is_refused(make):
    with pytest.raises(ba2ps.InputError) as error:
        make()
    assert "\n" not in str(error.value)


# --- losses ----------------------------------------------------------------------------------------------------------

def test_budget_loss_and_its_gradient_by_hand():
    s = torch.tensor([1.0, 1, 1, 0], requires_grad=True)
    loss = ba2ps.budget_loss(s, 0.5, 3.0)
    assert loss.item() == pytest.approx(3 * (0.75 - 0.5))
    loss.backward()
    assert s.grad.tolist() == [0.75] * 4  # lambda / M
    s.grad = None
    under = ba2ps.budget_loss(s, 0.8, 3.0)
    under.backward()
    assert under.item() == 0 and s.grad.tolist() == [0] * 4


@pytest.mark.parametrize("form", ["intersection", "union", "jaccard"])
def test_sharing_loss_against_a_loop_and_finite_differences_of_its_relaxed_form(form):
    s = torch.rand(3, 6, dtype=torch.float64).requires_grad_()  # the loss is smooth in s before it is made binary
    value = ba2ps.sharing_loss(s, 0.25, 0.7, form)
    inner = sum(s[0, i] * s[1, i] * s[2, i] for i in range(6)).item()
    outer = sum(1 - (1 - s[0, i]) * (1 - s[1, i]) * (1 - s[2, i]) for i in range(6)).item()
    excess = {"intersection": 1 - inner / (6 * 0.25), "union": outer / (6 * 0.25) - 1, "jaccard": 1 - inner / outer}[form]
    assert value.item() == pytest.approx(0.7 * excess) and excess > 0
    value.backward()
    for k in range(3):
        for i in range(6):
            up, down = s.detach().clone(), s.detach().clone()
            up[k, i] += 1e-6
            down[k, i] -= 1e-6
            slope = (ba2ps.sharing_loss(up, 0.25, 0.7, form) - ba2ps.sharing_loss(down, 0.25, 0.7, form)) / 2e-6
            assert s.grad[k, i].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-9)


def test_sharing_loss_counts_the_intersection_and_reaches_all_domains():
    s = torch.tensor([[1.0, 1, 1, 0], [1, 0, 1, 0]], requires_grad=True)
    loss = ba2ps.sharing_loss(s, 0.75)
    assert loss.item() == pytest.approx(1 - 2 / 3)
    loss.backward()
    # a switch is pulled up where the other domain is on, by 1 / (M beta); nothing pulls where the other is off
    torch.testing.assert_close(s.grad, -torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 0]]) / 3)
    assert ba2ps.sharing_loss(s, 0.5).item() == 0  # the intersection fills the budget


def test_union_and_jaccard_of_binary_switches_are_counts_and_no_more_than_needed_is_asked():
    s = torch.tensor([[1.0, 1, 1, 0], [1, 0, 1, 0]])
    assert ba2ps.sharing_loss(s, 0.5, 1.0, "union").item() == pytest.approx(3 / 2 - 1)
    assert ba2ps.sharing_loss(s, 0.75, 1.0, "union").item() == 0  # the union is within the budget
    assert ba2ps.sharing_loss(s, 0.5, 1.0, "jaccard").item() == pytest.approx(1 - 2 / 3)
    with pytest.raises(ValueError, match="'both' is none of"):
        ba2ps.sharing_loss(s, 0.5, 1.0, "both")


def test_losses_through_the_network_reach_switches_that_are_off():
    net = network(2)
    s = ba2ps.binary_switches(net, net.domains)
    # per group conv1, conv2 and, where width or resolution changes, the shortcut: all of depth 10's three blocks
    assert s.shape == (2, (16 + 16 + 16) + (16 + 32 + 16) + (32 + 64 + 32))
    ba2ps.budget_loss(s[0], 0.1, 2.0).backward()
    total = s.shape[1]
    for layer in ba2ps.switched_layers(net).values():
        torch.testing.assert_close(layer.switches["d0"].grad, torch.full((layer.total_channels,), 2.0 / total))


def flat(net, domain):
    return torch.cat([layer.switches[domain].detach().clone() for layer in ba2ps.switched_layers(net).values()])


@pytest.mark.parametrize("budget", [0.05, 0.25, 0.5, 0.977, 1.0])
def test_a_held_budget_keeps_the_largest_switches_and_the_strongest_of_each_layer(budget):
    net = network(2, share_on=0.3)
    layers = list(ba2ps.switched_layers(net).values())
    for layer in layers:
        layer.switches["d0"].data += layer.in_channels / 100  # wide layers first: the mean over layers is below beta
    layers[2].switches["d0"].data -= 5  # would be switched off whole
    before = [layer.switches["d0"].detach().clone() for layer in layers]
    other = [layer.switches["d1"].detach().clone() for layer in layers]
    ba2ps.hold_budget(net, "d0", budget)
    total = sum(map(len, before))
    # independent: the first of every layer, then by value one after the other
    chosen = {(k, int(values.argmax())) for k, values in enumerate(before)}
    rest = sorted(((float(v), k, i) for k, values in enumerate(before) for i, v in enumerate(values)), reverse=True)
    for _, k, i in rest:
        if len(chosen) < int(budget * total + 1e-6):
            chosen.add((k, i))
    on = {(k, i) for k, layer in enumerate(layers) for i in layer.binary_switches(["d0"])[0].nonzero()[:, 0].tolist()}
    assert on == chosen and len(on) == int(budget * total + 1e-6) and ba2ps.usage(net, "d0") <= budget
    shifts = torch.cat([layer.switches["d0"].detach() - b for layer, b in zip(layers, before)])
    shifts = shifts[flat(net, "d0") != 1e-6]  # but for the strongest of a layer that would be off
    assert budget == 1 or len(shifts) >= total - len(layers) and (shifts - shifts[-1]).abs().max() < 1e-5  # one number for all
    assert all(torch.equal(layer.switches["d1"], o) for layer, o in zip(layers, other))


def flat(net, domain):
    return torch.cat([layer.switches[domain].detach().clone() for layer in ba2ps.switched_layers(net).values()])


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75])
def test_a_held_budget_holds_for_the_mean_over_layers_too(budget):
    net = network(1, 16)
    layers = list(ba2ps.switched_layers(net).values())
    for layer in layers:
        layer.switches["d0"].data += 10 / layer.in_channels  # narrow layers first: their mean would be far above beta
    before = [layer.switches["d0"].detach().clone() for layer in layers]
    ba2ps.hold_budget(net, "d0", budget)
    total = sum(map(len, before))
    assert ba2ps.usage(net, "d0") == int(budget * total + 1e-6) / total
    shares = [layer.binary_switches(["d0"]).mean().item() for layer in layers]
    assert budget - 0.02 < sum(shares) / len(shares) <= budget
    for layer, old in zip(layers, before):  # within a layer the largest are on
        on = layer.binary_switches(["d0"])[0].bool()
        assert on.all() or not on.any() or old[on].min() > old[~on].max()


def test_equal_switches_are_held_too():
    net = ba2ps.WideResNet(10, 1, "source", 3)
    net.add_domain("d", 3)
    for budget in (0.75, 0.5, 0.25, 0.6):
        ba2ps.hold_budget(net, "d", budget)
        assert ba2ps.usage(net, "d") == int(240 * budget + 1e-6) / 240
    switches = flat(net, "d")
    ba2ps.hold_budget(net, "d", 0.6)
    assert (flat(net, "d") - switches).abs().max() < 2e-6  # nothing moves that is held already


def test_distinct_switches_are_those_of_the_filters_norms():
    net = ba2ps.WideResNet(10, 1, "source", 3)
    net.add_domain("d", 3)
    layer = net.block2[0].conv1
    ba2ps.distinct_switches(net, ["d"])
    norms = [sum(float(w) ** 2 for w in layer.weight.detach()[:, c].flatten()) ** 0.5 for c in range(layer.in_channels)]
    mean = sum(norms) / len(norms)
    assert layer.switches["d"].tolist() == pytest.approx([1e-3 * n / mean for n in norms], rel=1e-5)


def test_shared_switches_are_the_mean_of_those_named():
    net = network(3)
    before = {domain: flat(net, domain) for domain in net.domains}
    ba2ps.share_switches(net, ["d0", "d2"])
    torch.testing.assert_close(flat(net, "d0"), (before["d0"] + before["d2"]) / 2)
    assert torch.equal(flat(net, "d0"), flat(net, "d2")) and torch.equal(flat(net, "d1"), before["d1"])


def test_the_multiplier_rises_while_the_budget_is_broken_and_its_state_is_kept():
    multiplier = ba2ps.KKTMultiplier(lr=0.1)
    multiplier.update(0.2, 0.25)
    assert multiplier.value == 0
    for _ in range(3):
        multiplier.update(0.75, 0.25)
    assert multiplier.value == pytest.approx(0.15)
    other = ba2ps.KKTMultiplier(lr=1.0)
    other.load_state_dict(multiplier.state_dict())
    other.update(0.35, 0.25)
    assert other.value == pytest.approx(0.16)
    for _ in range(100):
        other.update(0.0, 0.25)
    assert other.value == 0


def test_reestimated_statistics_are_those_of_all_images():
    net = network(1)
    images = torch.randn(12, 3, 32, 32)
    seen = []
    block = net.block1[0]
    block.bn1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    ba2ps.reestimate_batch_norm(net, "d0", images.split(4))
    x = torch.stack(seen).double()  # (batches, 4, C, H, W), before the first batch-norm: the same for any statistics
    torch.testing.assert_close(block.bn1["d0"].running_mean.double(), x.mean((0, 1, 3, 4)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block.bn1["d0"].running_var.double(), x.transpose(1, 2).flatten(2).var(2).mean(0),
                               atol=1e-5, rtol=1e-5)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(".d0." in name for name in changed) and net.training and block.bn1["d0"].momentum == 0.1


# --- costs -----------------------------------------------------------------------------------------------------------

def test_params_of_wrn_28_4_with_ten_domains_are_the_papers():
    net = ba2ps.WideResNet()
    for i in range(10):
        net.add_domain(f"d{i}", 10)
    by_hand = (5_839_280 + 10 * 4 * 3600 + 10 * 3552 / 32) / 5_839_280
    assert ba2ps.params(net) == pytest.approx(by_hand)
    assert ba2ps.params(net) == pytest.approx(1.025, abs=5e-4)


def test_usage_sparsity_intersection_and_params_by_a_loop():
    net = network(3)
    layers = list(ba2ps.switched_layers(net).values())
    on = {d: [[int(v > 0) for v in layer.switches[d].tolist()] for layer in layers] for d in net.domains}
    total = sum(len(row) for row in on["d0"])
    each, together = ba2ps.sparsity(net)
    for d in net.domains:
        assert ba2ps.usage(net, d) == pytest.approx(sum(map(sum, on[d])) / total)
        assert each[d] == pytest.approx(sum(1 - sum(row) / len(row) for row in on[d]) / len(layers))
    union = [[max(c) for c in zip(*(on[d][i] for d in net.domains))] for i in range(len(layers))]
    common = [[min(c) for c in zip(*(on[d][i] for d in net.domains))] for i in range(len(layers))]
    assert together == pytest.approx(sum(1 - sum(row) / len(row) for row in union) / len(layers))
    assert ba2ps.intersection(net) == pytest.approx(sum(map(sum, common)) / total)
    kept = sum(sum(row) * layer.out_channels * layer.kernel_size[0] ** 2 for row, layer in zip(union, layers))
    whole = sum(layer.weight.numel() for layer in layers)
    batch_norm = sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)) // 4  # per domain
    expected = kept + 432 + 3 * 4 * batch_norm + 3 * sum(map(sum, union)) / 32
    assert ba2ps.params(net) == pytest.approx(expected / (whole + 432))


@pytest.mark.parametrize("size", [64, 32])
def test_macs_against_a_hand_count(size):
    pytest.importorskip("thop")
    net = network(2, depth=16, widen_factor=2)
    stem = 3 * 16 * 9 * size * size
    whole, one, both = stem, stem, stem
    for name, layer in ba2ps.switched_layers(net).items():
        side = size >> int(name[5])  # block1 works at half the resolution, block3 at an eighth
        per_channel = layer.out_channels * layer.kernel_size[0] ** 2 * side * side
        whole += layer.total_channels * per_channel
        one += int((layer.switches["d0"] > 0).sum()) * per_channel
        both += int(((layer.switches["d0"] > 0) | (layer.switches["d1"] > 0)).sum()) * per_channel
    assert ba2ps.macs(net, None, size) == whole
    assert ba2ps.macs(net, ["d0"], size) == one
    assert ba2ps.macs(net, ["d0", "d1"], size) == both
    assert ba2ps.macs(ba2ps.prune(net), ["d0"], size) == one


# --- pruning and checkpoints -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("share_on", [0.02, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_pruned_network_gives_the_same_logits_with_less(share_on, dtype, tolerance):
    net = network(3, 16, share_on=share_on).to(dtype)
    small = ba2ps.prune(net)
    for shape in ((4, 3, 32, 32), (1, 3, 33, 47)):
        x = torch.randn(shape, dtype=dtype)
        for domain in net.domains:
            expected = net(x, domain)
            assert (small(x, domain) - expected).abs().max() <= tolerance * max(1, expected.abs().max().item())
    for name, layer in ba2ps.switched_layers(net).items():
        read = sum((layer.binary_switches([d])[0] for d in net.domains)) > 0
        assert ba2ps.switched_layers(small)[name].weight.shape[1] == int(read.sum())
    for measure in (ba2ps.params, ba2ps.sparsity, ba2ps.intersection, lambda n: ba2ps.usage(n, "d2")):
        assert measure(small) == pytest.approx(measure(net), rel=1e-6) if not isinstance(measure(net), tuple) else (
            measure(small) == measure(net))


def test_pruning_to_fewer_domains_and_twice():
    net = network(3, share_on=0.4)
    x = torch.randn(2, 3, 32, 32)
    two = ba2ps.prune(net, ["d0", "d2"])
    one = ba2ps.prune(two, ["d2"])
    assert two.domains == ["d0", "d2"] and one.domains == ["d2"]
    assert ba2ps.params(one) < ba2ps.params(two) < ba2ps.params(net)
    torch.testing.assert_close(one(x, "d2"), net(x, "d2"), atol=1e-5, rtol=1e-5)
    numbers = [sum(v.numel() for v in n.state_dict().values()) for n in (net, two, one)]
    assert numbers == sorted(numbers, reverse=True)
    assert net.domains == ["d0", "d1", "d2"] and "source" in net.classifiers  # the original is left alone
    for wrong in (["d1"], ["source"]):
        with pytest.raises(ba2ps.InputError):
            ba2ps.prune(two, wrong)
    with pytest.raises(ba2ps.InputError, match="backbone"):
        ba2ps.prune(network(0))


@pytest.mark.parametrize("pruned", [False, True])
def test_a_checkpoint_gives_back_the_network_and_the_facts(tmp_path, pruned):
    net = network(2)
    net = ba2ps.prune(net) if pruned else net
    facts = {"budget": 0.25, "domains": {"d0": {"mean": [0.1, 0.2, 0.3], "classes": ["a"]}}}
    ba2ps.save(tmp_path / "m.pt", net, **facts)
    loaded, found = ba2ps.load(tmp_path / "m.pt")
    x = torch.randn(2, 3, 32, 32)
    assert found["budget"] == 0.25 and found["domains"] == facts["domains"]
    for domain in net.classifiers:
        assert torch.equal(loaded.eval()(x, domain), net(x, domain))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("/nonexistent-directory/ran"),))


@pytest.mark.parametrize("content", [b"", b"text", {"format": "other"}, {"format": ba2ps.FORMAT}, [1], Malicious(),
                                     {"format": ba2ps.FORMAT, "depth": 10, "widen_factor": 1, "source": "s",
                                      "num_classes": {"s": 3}, "state": {}}])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ba2ps.InputError) as error:
        ba2ps.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_checkpoints_and_unwritable_places_are_named(tmp_path):
    with pytest.raises(ba2ps.InputError, match="no such checkpoint"):
        ba2ps.load(tmp_path / "none.pt")
    with pytest.raises(ba2ps.InputError, match="cannot write"):
        ba2ps.save(tmp_path / "no" / "m.pt", network(1))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    ba2ps.save(path, network(1), budget=0.5)
    old = path.read_bytes()

    def fail(content, part):
        Path(part).write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ba2ps.InputError, match="No space left"):
        ba2ps.save(path, network(1))
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_the_module_needs_torch_alone():
    code = ("import sys\nbefore = set(sys.modules)\nimport torch\nwith_torch = set(sys.modules)\nimport ba2ps\n"
            "new = {m.split('.')[0] for m in set(sys.modules) - with_torch}\n"
            "print(sorted(new - set(sys.stdlib_module_names)))")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['ba2ps']" and not out.stderr
