# SPDX-License-Identifier: MIT
"""Budget-aware adapters with parameter sharing: one frozen backbone, many image domains, a budget for each.

The whole method in one file that needs only torch; copy it, or the class you want, into your project.

A backbone is trained on a source domain and frozen. Every other domain owns one switch per input channel of every
convolution, its batch-norm and its classifier; a budget loss keeps the share of switches that are on under beta, a
sharing loss makes the domains switch on the same channels, and what no domain reads is pruned:

    relu(bn_d(x)) --[* 1[s_d > 0]]--> conv(frozen W) --> ...            d: the domain, an argument of forward

    L = cross-entropy + max(0, lambda_d (mean(s_d) - beta)) + max(0, lambda_PS (1 - |s_1 & ... & s_N| / (M beta)))

References
  [1] dos Santos et al., Parameter Sharing in Budget-Aware Adapters for Multi-Domain Learning, BMVC 2022 ("the paper")
  [2] Berriel et al., Budget-Aware Adapters for Multi-Domain Learning (BA2), ICCV 2019
  [3] Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016
  [4] Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons (straight-through), 2013
"""
import copy
import math
import operator
import os
import pickle
import warnings
import zipfile

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

FORMAT = "ba2ps-1"  # first entry of every checkpoint; raised when an old one can no longer be read


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that names it and says what to do."""

    def __init__(self, message):  # it quotes files: no name of theirs may break the line or colour the terminal
        super().__init__("".join(letter if letter.isprintable() else " " for letter in str(message)))


# ---------------------------------------------------------------------------------------------------------------------
# the switch and the layers a domain owns a part of

def _is_on(switches, widths):
    """1[s > 0] of (..., sum of widths), in float, and 1 for the strongest of a layer, `widths` wide, that would be off."""
    return (switches > 0).to(switches.dtype)


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, switches, widths):
        return (switches > 0).to(switches.dtype) if widths is None else _is_on(switches, widths)

    @staticmethod
    def backward(ctx, grad):
        return grad, None  # straight through, also where the switch is off: that is how a channel comes back


def binarize(switches, widths=None):
    """1[s > 0] forward, identity backward (the straight-through estimator of [4]), also for switches that are off.

    Any shape and float dtype; exactly 0 is off. widths: those of layers that lie side by side in the last dimension, of
    which each then has its strongest switch on.
    """
    return _Binarize.apply(switches, widths)


def _channel_dot(a, b):
    """(a * b).sum((0, 2, 3)) of two (B, C, H, W), in one pass: batch-norm's backward has a kernel for it, 2 to 4 times as fast."""
    return (a * b).sum((0, 2, 3))


class _SwitchedConvolution(torch.autograd.Function):
    """conv2d of the channels of x that are on. Autograd's own would keep the masked x besides x and, with the mask on the
    weight, compute the gradient of a frozen weight; this one keeps x alone, and gives the switches one number a channel."""
    @staticmethod
    def forward(ctx, x, switches, weight, bias, *geometry):  # x: (B, C_in, H, W), switches: (C_in,), real
        on = _is_on(switches, [len(switches)])
        ctx.save_for_backward(x, on, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight * on.view(1, -1, 1, 1), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, on, weight = ctx.saved_tensors
        mask, (to_x, to_switches, *to_own) = on.view(1, -1, 1, 1).to(grad.dtype), ctx.needs_input_grad[:4]
        x_grad, weight_grad, bias_grad = _convolution_backward(  # with every channel on
            grad, x.to(grad.dtype), weight.to(grad.dtype), ctx.geometry, [to_x or to_switches, *to_own])
        # straight through
        switches_grad = _channel_dot(x_grad, x.to(grad.dtype)).to(on.dtype) if to_switches else None
        x_grad = x_grad.mul_(mask).to(x.dtype) if to_x else None
        weight_grad = weight_grad.mul_(mask).to(weight.dtype) if to_own[0] else None
        return x_grad, switches_grad, weight_grad, bias_grad, None, None, None


def _convolution_backward(grad, x, weight, geometry, wanted):
    """Gradients of x, weight and bias, as far as `wanted` (three bools); of x only the shape counts if weight is not."""
    return torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *geometry, False, [0, 0], 1, wanted)


class _NormReluConvolution(torch.autograd.Function):
    """conv(relu(norm(x))), batch-norm with the statistics of the batch, at the price of the same without switches.

    A switch multiplies y = relu(gamma x^ + beta). With d = dL/dy of all channels on, 0 where y is, its gradient is
    sum(y d) = gamma sum(x^ d) + beta sum(d), and the two sums are those that batch-norm's backward pass needs anyway.
    That y is not kept, only where it is above 0: a byte instead of four.
    """
    @staticmethod
    def forward(ctx, x, gamma, beta, switches, weight, bias, norm, geometry):
        statistics = norm.running_mean, norm.running_var
        y, *saved, kind = torch.ops.aten._batch_norm_impl_index(
            x, gamma, beta, *statistics, True, norm.momentum, norm.eps, torch.backends.cudnn.enabled)
        norm.num_batches_tracked.add_(1)
        on = _is_on(switches, [len(switches)])
        ctx.save_for_backward(x, y.relu_().bool(), gamma, beta, on, weight, *statistics, *saved)
        ctx.rest = geometry, norm.eps, kind
        return F.conv2d(y, weight * on.view(1, -1, 1, 1), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, positive, gamma, beta, on, weight, *statistics, mean, deviation, reserve = ctx.saved_tensors
        geometry, eps, kind = ctx.rest
        d, _, bias_grad = _convolution_backward(grad, x, weight, geometry, [True, False, ctx.needs_input_grad[5]])
        x_grad, gamma_grad, beta_grad = torch.ops.aten._batch_norm_impl_index_backward(
            kind, x, d.mul_(positive), gamma * on, *statistics, mean, deviation, True, eps,
            [ctx.needs_input_grad[0], True, True], reserve)
        switches_grad = torch.addcmul(gamma * gamma_grad, beta, beta_grad)  # straight through: with every channel on
        return x_grad, gamma_grad.mul_(on), beta_grad.mul_(on), switches_grad, None, bias_grad, None, None


def norm_relu_conv(norm, conv, x, domain):
    """conv(relu(norm(x))) of a DomainBatchNorm2d and a SwitchedConv2d, faster where it is trained as one function.

    x: (B, C_in, H, W). No other layer may read what comes between. Hooks of the two do not run when they are one.
    """
    own = norm[domain] if domain in norm else None
    if (domain in conv.switches and isinstance(x, torch.Tensor)  # and no proxy of a tracer
            and type(own) is nn.BatchNorm2d and own.training and own.affine and own.momentum and own.track_running_stats
            and torch.is_grad_enabled() and not conv.weight.requires_grad and conv.pads_zeros
            and not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()):
        return _NormReluConvolution.apply(x, own.weight, own.bias, conv.switches[domain], conv.weight, conv.bias, own,
                                          (conv.stride, conv.padding, conv.dilation))
    return conv(F.relu(norm(x, domain)), domain)


class SwitchedConv2d(nn.Conv2d):
    """A frozen convolution in which every domain switches input channels on and off (Eq. 3 of the paper).

    Takes nn.Conv2d's arguments (groups=1 only) and `domains`, the names to start with. forward(x, domain) reads the channels
    of x: (B, C_in, H, W) that `domain` has on; backward computes no gradient for a frozen weight, only one number per
    channel for the switches. A domain without switches here (the source) reads every channel.

    switches: nn.ParameterDict, domain -> (C_in,) real switches, which start at `start`. At least one channel of a
    domain is always on: with none above 0 it is the largest, so that no layer cuts the network in two.
    """

    def __init__(self, in_channels, out_channels, kernel_size, *args, domains=(), start=1e-3, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        if self.groups != 1:
            raise ValueError("SwitchedConv2d needs groups=1: a switch is one input channel of every filter")
        self.start = start
        self.switches = nn.ParameterDict()
        self.kept = torch.ones(in_channels, dtype=torch.bool)  # which of the backbone's input channels are left
        for domain in domains:
            self.add_domain(domain)

    @property
    def total_channels(self):
        """Input channels of the backbone; in_channels are those left."""
        return len(self.kept)

    @property
    def pads_zeros(self):
        """Whether the padding is numbers of zeros: what convolution_backward takes."""
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

    def add_domain(self, domain):
        self.switches[domain] = nn.Parameter(torch.full((self.in_channels,), self.start, device=self.weight.device))

    def binary_switches(self, domains):
        """The 0/1 switches of `domains` (a list of names), with the straight-through gradient: (len(domains), C_in)."""
        return _Binarize.apply(torch.stack([self.switches[domain] for domain in domains]), [self.in_channels])

    def read(self, domains):
        """(C_in,) bool, on the CPU: the channels that any of `domains` reads; one without switches reads all."""
        if any(domain not in self.switches for domain in domains):
            return torch.ones(self.in_channels, dtype=torch.bool)
        return self.binary_switches(domains).detach().amax(0).bool().cpu()

    def forward(self, x, domain=None):
        if domain not in self.switches:
            return super().forward(x)
        trained = torch.is_grad_enabled() and (self.switches[domain].requires_grad or self.weight.requires_grad)
        if trained and self.pads_zeros:
            return _SwitchedConvolution.apply(x, self.switches[domain], self.weight, self.bias,
                                              self.stride, self.padding, self.dilation)
        if torch.is_grad_enabled() and not trained:  # with the mask on the weight no gradient has to be masked
            on = _is_on(self.switches[domain], [self.in_channels])
            return self._conv_forward(x, self.weight * on.view(1, -1, 1, 1), self.bias)
        return super().forward(x * self.binary_switches([domain]).view(1, -1, 1, 1).to(x.dtype))


class DomainModules(nn.ModuleDict):
    """One module per domain; forward(x, domain) runs that of `domain`."""

    def forward(self, x, domain):
        if domain not in self:
            raise InputError(f"unknown domain {domain}: this network serves {', '.join(self)}")
        return self[domain](x)


class DomainBatchNorm2d(DomainModules):
    """One nn.BatchNorm2d per domain, affine and running statistics; forward(x, domain), x: (B, C, H, W)."""

    def __init__(self, num_features, domains=()):
        super().__init__({domain: nn.BatchNorm2d(num_features) for domain in domains})
        self.total_features = num_features  # of the backbone

    def add_domain(self, domain, like):
        """A new domain's batch-norm starts as a copy of that of the domain `like`."""
        self[domain] = copy.deepcopy(self[like]).requires_grad_(True)


class DomainLinear(DomainModules):
    """The classifiers, one nn.Linear per domain; forward(x, domain), x: (B, C) -> (B, classes of that domain)."""

    def add_domain(self, domain, num_classes):
        like = next(iter(self.values()))
        self[domain] = nn.Linear(like.in_features, num_classes).to(like.weight)


class MultiDomain:
    """What every network of many domains has, whatever its layers; a mix-in for a module with a DomainLinear.

    `source`: the domain the backbone was trained on.
    """

    @property
    def classifiers(self):
        return next(module for module in self.modules() if isinstance(module, DomainLinear))

    @property
    def domains(self):
        """The adapted domains, in the order they came; the source is not among them."""
        return [domain for domain in self.classifiers if domain != self.source]

    def add_domain(self, domain, num_classes):
        """Give `domain` its own switches, batch-norm (a copy of the source's) and a fresh linear classifier."""
        check_name(domain)
        if domain in self.classifiers:
            raise InputError(f"domain {domain} is there already: give each domain once, and not the source")
        if self.source not in self.classifiers:
            raise InputError(f"domain {domain} cannot be added: the source it would start from has been pruned away")
        for module in self.modules():
            if isinstance(module, SwitchedConv2d):
                module.add_domain(domain)
            elif isinstance(module, DomainBatchNorm2d):
                module.add_domain(domain, like=self.source)
            elif isinstance(module, DomainLinear):
                module.add_domain(domain, num_classes)

    def remove_domain(self, domain):
        """Forget what `domain` owns; with the source gone the network serves the adapted domains only."""
        for module in self.modules():
            if isinstance(module, SwitchedConv2d) and domain in module.switches:
                del module.switches[domain]
            elif isinstance(module, DomainModules):
                del module[domain]

    def freeze_backbone(self):
        """Stop the gradient of all that is shared (the convolutions) and of all that is the source's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
            elif isinstance(module, DomainModules) and self.source in module:
                module[self.source].requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# the backbone: a wide residual network [3], pre-activation, every group halving the resolution

class BasicBlock(nn.Module):
    def __init__(self, in_planes, out_planes, stride, source):
        super().__init__()
        self.bn1 = DomainBatchNorm2d(in_planes, [source])
        self.conv1 = SwitchedConv2d(in_planes, out_planes, 3, stride, 1, bias=False)
        self.bn2 = DomainBatchNorm2d(out_planes, [source])
        self.conv2 = SwitchedConv2d(out_planes, out_planes, 3, 1, 1, bias=False)
        self.shortcut = None
        if in_planes != out_planes or stride != 1:
            self.shortcut = SwitchedConv2d(in_planes, out_planes, 1, stride, 0, bias=False)

    def forward(self, x, domain):
        if self.shortcut is None:
            out = norm_relu_conv(self.bn1, self.conv1, x, domain)
        else:
            out = F.relu(self.bn1(x, domain))
            x, out = self.shortcut(out, domain), self.conv1(out, domain)
        return x + norm_relu_conv(self.bn2, self.conv2, out, domain)


class WideResNet(MultiDomain, nn.Module):
    """WRN-depth-widen_factor for many domains; WRN-28-4 is the paper's backbone (64/128/256 channels).

    depth = 6n + 4 gives three groups of n blocks. `source` names the domain the backbone is trained on; more domains
    come with add_domain. forward(images, domain): (B, 3, H, W) -> logits (B, classes of that domain), any H and W.
    The source runs the untouched backbone. All convolutions have switches but the stem, whose input is the image.
    """

    def __init__(self, depth=28, widen_factor=4, source="imagenet12", num_classes=1000):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"depth {depth} is no wide residual network: take 6n + 4 (10, 16, 22, 28, ...)")
        if widen_factor < 1:
            raise InputError(f"widen factor {widen_factor} is too small: take 1 or more")
        check_name(source)
        self.depth, self.widen_factor, self.source = depth, widen_factor, source
        n, planes = (depth - 4) // 6, [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]

        def group(in_planes, out_planes):
            return nn.ModuleList([BasicBlock(in_planes if i == 0 else out_planes, out_planes, 2 if i == 0 else 1, source)
                                  for i in range(n)])

        self.conv1 = nn.Conv2d(3, planes[0], 3, 1, 1, bias=False)
        self.block1 = group(planes[0], planes[1])
        self.block2 = group(planes[1], planes[2])
        self.block3 = group(planes[2], planes[3])
        self.bn1 = DomainBatchNorm2d(planes[3], [source])
        self.classifiers = DomainLinear({source: nn.Linear(planes[3], num_classes)})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x, domain):
        x = self.conv1(x)                           # (B, 16, H, W)
        for block in (*self.block1, *self.block2, *self.block3):
            x = block(x, domain)                    # ... (B, 64 * widen_factor, H/8, W/8)
        x = F.relu(self.bn1(x, domain))
        x = x.mean(dim=(2, 3))                      # (B, 64 * widen_factor)
        return self.classifiers(x, domain)          # (B, classes)


def check_name(domain):
    """InputError unless `domain` can name a part of a torch module (no dots, none of ModuleDict's own names)."""
    try:
        nn.ModuleDict({domain: nn.Identity()})
        nn.ParameterDict({domain: nn.Parameter(torch.zeros(0))})
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"domain name {domain!r} cannot name a part of a torch module: rename it") from None


# ---------------------------------------------------------------------------------------------------------------------
# the losses

def switched_layers(network):
    """{name: SwitchedConv2d} of all of them, in the order in which they were registered."""
    return {name: module for name, module in network.named_modules() if isinstance(module, SwitchedConv2d)}


def binary_switches(network, domains):
    """All M switches of each of `domains`, 0 or 1, with the straight-through gradient: (len(domains), M)."""
    layers = list(switched_layers(network).values())
    switches = torch.stack([torch.cat([layer.switches[domain] for layer in layers]) for domain in domains])  # (N, M)
    return _Binarize.apply(switches, [layer.in_channels for layer in layers])


def join_switches(network, domains):
    """{domain: (M,) parameter}, of which the switches of the layers become parts: views of it, and of its gradient.

    For an optimizer and for losses: one tensor a domain, where WRN-28 has 27, and a step is many short operations. Its
    gradient is there from the beginning, zeros; it is to be filled with zeros again, and not to be replaced.
    """
    layers, joined = list(switched_layers(network).values()), {}
    widths = [layer.in_channels for layer in layers]
    for domain in domains:
        joined[domain] = nn.Parameter(torch.cat([layer.switches[domain].detach() for layer in layers]))
        joined[domain].grad = torch.zeros_like(joined[domain])
        for layer, values, grad in zip(layers, joined[domain].data.split(widths), joined[domain].grad.split(widths)):
            layer.switches[domain].data, layer.switches[domain].grad = values, grad
    return joined


def budget_loss(switches, budget, multiplier):
    """max(0, lambda_d (mean(s_d) - beta)) (section 3.1).

    switches: (M,) the binary switches of one domain; budget: beta, in (0, 1]; multiplier: lambda_d, a number >= 0.
    """
    return F.relu(multiplier * (switches.mean() - budget))


def sharing_loss(switches, budget, weight=1.0, form="intersection"):
    """What the domains lose by not using the same channels: max(0, lambda_PS * excess), the excess by `form`.

        intersection    1 - |s_1 & ... & s_N| / (M beta)                   (Eq. 5)
        union           |s_1 or ... or s_N| / (M beta) - 1                 (the authors' journal version, arXiv 2309.11464)
        jaccard         1 - |s_1 & ... & s_N| / |s_1 or ... or s_N|        (the same)

    switches: (N, M) the binary switches of all domains, none detached: with the other domains detached the paper saw
    no sharing at all (supplement A). The intersection is the sum over switches of the product over domains, the union
    that of 1 - product of 1 - s; a domain's gradient is zero where two others are off, or where another one is on.
    """
    return F.relu(weight * sharing_excess(switches, budget, form))


def sharing_excess(switches, budget, form="intersection"):
    """The bracket of sharing_loss, a scalar: at most 0 where the domains share as much as the budget lets them."""
    if form == "intersection":
        return 1 - switches.prod(dim=0).sum() / (switches.shape[1] * budget)
    union = (1 - (1 - switches).prod(dim=0)).sum()
    if form == "union":
        return union / (switches.shape[1] * budget) - 1
    if form == "jaccard":
        return 1 - switches.prod(dim=0).sum() / union
    raise ValueError(f"sharing loss {form!r} is none of intersection, union, jaccard")


class KKTMultiplier:
    """lambda_d of the budget loss: raised while the constraint is broken, on its way to 0 while it holds (section 3.1).

    update(usage, budget) is one step of projected gradient ascent on lambda (usage - budget), with the rate `lr`. Below
    the budget lambda need not be 0 for the loss to be. It has to rise slowly: all switches start equal and Adam moves
    each by about its rate per step, so a budget term that outweighs the cross-entropy sends them through zero together.
    """

    def __init__(self, lr, value=0.0):
        self.lr, self.value = lr, value

    def update(self, usage, budget):
        self.value = max(0.0, self.value + self.lr * (usage - budget))

    def state_dict(self):
        return {"lr": self.lr, "value": self.value}

    def load_state_dict(self, state):
        self.lr, self.value = state["lr"], state["value"]


@torch.no_grad()
def distinct_switches(network, domains):
    """Scale the real switches of `domains` by the norm of the weights they switch, so that no two of a layer are equal.

    With equal ones Adam, which moves each by about its rate, takes crowds through zero together; and a budget that is
    held exactly needs an order. The norms of a layer are taken relative to their mean.
    """
    for layer in switched_layers(network).values():
        norms = layer.weight.flatten(2).norm(dim=(0, 2))  # (C_in,)
        for domain in domains:
            layer.switches[domain].mul_(norms / norms.mean())


@torch.no_grad()
def share_switches(network, domains):
    """Give all `domains` the mean of their real switches: they use the same channels, and every gradient moves them all.

    Sharing without a loss: the gradient of the intersection (Eq. 5) is zero wherever two domains are off.
    """
    for layer in switched_layers(network).values():
        mean = torch.stack([layer.switches[domain] for domain in domains]).mean(0)
        for domain in domains:
            layer.switches[domain].copy_(mean)


@torch.no_grad()
def hold_budget(network, domain, budget):
    """Shift the real switches of `domain` so that floor(beta M) of them are on, and of the layers at most beta on average.

    The exact form of what the multiplier of the budget loss does slowly: its gradient is the same for every switch, and
    all are shifted by one number here, so that the largest are on. Where these lie in narrow layers the mean over layers,
    that of Table 7's sparsity, is above beta; then a switch also pays for the part of its layer that it is, just enough
    for that mean. The strongest switch of a layer is always on, and counts. Of equal ones the first are on.
    """
    real = [layer.switches[domain] for layer in switched_layers(network).values()]
    widths = [len(switches) for switches in real]
    values, total = torch.cat(real), sum(widths)                                                # (M,)
    rows = nn.utils.rnn.pad_sequence(real, batch_first=True, padding_value=-torch.inf)
    strongest = rows.argmax(1) + torch.tensor([0, *widths[:-1]], device=values.device).cumsum(0)  # one index a layer
    cost = torch.cat([torch.full_like(s, total / len(widths) / len(s)) for s in real])          # mean 1
    number = max(int(budget * total + 1e-6), len(widths))

    def largest(price):
        return (values - price * cost).index_fill(0, strongest, torch.inf).topk(number).indices

    def too_narrow(price):
        return cost[largest(price)].sum() > number + 0.01

    low, high = 0.0, 0.0
    while too_narrow(high) and high < 1e3:
        low, high = high, 2 * high + 1e-4
    for _ in range(8 if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if too_narrow(middle) else (low, middle)
    if too_narrow(high):  # beta is so small that the strongest of the narrow layers are more than it
        high = 0.0
    on = torch.zeros_like(values, dtype=torch.bool).index_fill(0, largest(high), True)
    values -= high * cost
    others = values[on.index_fill(0, strongest, False)]
    off = values[~on]
    if len(off):  # halfway between the last one on and the first one off
        values -= (others.min() + off.max()) / 2 if len(others) else off.max()
    # what rounding, equal values or a weak layer would leave on the wrong side of zero
    values = torch.where(on, values.clamp(min=1e-6), values.clamp(max=0))
    for switches, new in zip(real, values.split(widths)):
        switches.copy_(new)


@torch.no_grad()
def reestimate_batch_norm(network, domain, batches):
    """Set the running statistics of `domain` to the average over `batches` of images, for the switches as they stand.

    The sharing loss moves a domain's switches during every other domain's epoch, its statistics move only in its own:
    in the end they describe a network that is gone. Known as adaptive batch normalization (Li et al., EagleEye, ECCV
    2020) and post-statistics (Yu and Huang, Universally Slimmable Networks, ICCV 2019). The mode is left as it was.
    """
    norms = [module[domain] for module in network.modules() if isinstance(module, DomainBatchNorm2d)]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    for images in batches:
        network(images, domain)
    for norm, (training, momentum) in zip(norms, before):
        norm.momentum = momentum
        norm.train(training)


# ---------------------------------------------------------------------------------------------------------------------
# what it costs

@torch.no_grad()
def usage(network, domain):
    """Share of all M switches of `domain` that are on (theta-bar_d, held against beta); pruned ones count as off."""
    return binary_switches(network, [domain]).sum().item() / _total(switched_layers(network).values())


@torch.no_grad()
def intersection(network, domains=None):
    """Share of all M switches that are on in every one of `domains` (default: all adapted ones)."""
    on = binary_switches(network, domains or network.domains)  # (N, M)
    return on.amin(0).sum().item() / _total(switched_layers(network).values())


@torch.no_grad()
def sparsity(network, domains=None):
    """({domain: share off}, share off in all domains): means over layers, as in Table 7; pruned channels are off."""
    domains = domains or network.domains
    rows = []
    for layer in switched_layers(network).values():
        on = layer.binary_switches(domains)                       # (N, C_in)
        counts = torch.cat([on, on.amax(0, keepdim=True)]).sum(1)  # (N + 1,), the last: the union
        rows.append(1 - counts.double() / layer.total_channels)
    *each, union = torch.stack(rows).mean(0).tolist()
    return dict(zip(domains, each)), union


@torch.no_grad()
def params(network, domains=None):
    """Memory that `domains` need relative to the backbone, as in Table 2: input channels no domain reads are pruned.

    Everything but classifiers: convolutions, four floats (weight, bias, mean, variance) per batch-norm channel and
    domain, 32 bits a float, 1 bit a switch. The backbone is the shared convolutions alone, batch-norm being a domain's
    own, so that WRN-28-4 with ten domains and every switch on is at 1.025. The source counts only if it is named in
    `domains`, and then keeps every channel. The masked and the pruned network give the same figure.
    """
    domains = domains or network.domains or [network.source]
    adapted = [domain for domain in domains if domain != network.source]
    kept = 0
    for module in network.modules():
        if isinstance(module, SwitchedConv2d) and len(adapted) == len(domains):
            union = int(module.read(domains).sum())
            kept += _floats(module, union) + union * len(adapted) / 32
        elif isinstance(module, SwitchedConv2d):
            kept += _floats(module, module.total_channels) + module.total_channels * len(adapted) / 32
        elif isinstance(module, nn.Conv2d):
            kept += _floats(module, module.in_channels)
        elif isinstance(module, DomainBatchNorm2d):
            kept += 4 * module.total_features * len(domains)
    return kept / backbone_params(network)


@torch.no_grad()
def stored_params(network):
    """Memory of `network` as it stands and as save writes it when it is pruned, relative to the backbone.

    Counted as in params, but what is there: the weights, of every domain's batch-norm the rows it needs itself, a bit for
    each switch of the backbone (those that are gone included, so that a file says where its channels come from).
    """
    adapted, convs = network.domains, [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    stored = sum(parameter.numel() for conv in convs for parameter in conv.parameters(recurse=False))
    stored += 4 * sum(len(rows) for domain in network.classifiers for rows in batch_norm_rows(network, domain).values())
    return (stored + len(adapted) * _total(switched_layers(network).values()) / 32) / backbone_params(network)


def _floats(conv, channels):
    """Weights and biases of a convolution that has all of the backbone's filters, with so many input channels."""
    filters = getattr(conv, "total_filters", conv.out_channels)
    return filters * (conv.weight[0, 0].numel() * channels // conv.groups + (conv.bias is not None))


def backbone_params(network):
    """Weights (and biases) of the backbone's convolutions, whatever is left of them: the unit of params."""
    return sum(_floats(module, getattr(module, "total_channels", module.in_channels))
               for module in network.modules() if isinstance(module, nn.Conv2d))


@torch.no_grad()
def macs(network, domains=None, image_size=64):
    """Multiply-accumulates of the convolutions for one image_size x image_size crop and the input channels that
    `domains` read: [domain] is that domain's complexity, all of them what a pruned network runs, None the backbone's.

    Counted with THOP (`pip install thop`) on plain nn.Conv2d layers: THOP looks layers up by exact type, and counts a
    subclass of nn.Conv2d as zero. Batch-norm (0.3% of WRN-28-4) and classifiers are left out. As in the paper every
    filter counts, so that masked and pruned network give the same figure; of a dense network (see `dense`; domains is
    None) it is what runs.
    """
    from thop import profile
    convs = {id(module.weight): module for module in network.modules() if isinstance(module, nn.Conv2d)}
    first = next(network.parameters())
    images = torch.zeros(1, 3, image_size, image_size, device=first.device, dtype=first.dtype)
    with _Convolutions() as calls:
        network(images, next(iter(network.classifiers))) if isinstance(network, MultiDomain) else network(images)
    count = 0
    for weight, (_, _, height, width) in calls.seen:
        conv = convs[id(weight)]
        channels = conv.in_channels
        if isinstance(conv, SwitchedConv2d):
            source = not domains or network.source in domains
            channels = conv.total_channels if source else int(conv.read(domains).sum())
        filters = getattr(conv, "total_filters", conv.out_channels)
        plain = nn.Conv2d(channels, filters, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
                          bias=conv.bias is not None)
        count += profile(plain, (torch.zeros(1, channels, height, width),), verbose=False)[0]
    return int(count)


class _Convolutions(TorchFunctionMode):
    """Notes (weight, shape of what it reads) of every convolution that runs, of a module's or not."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            self.seen.append((args[1], args[0].shape))
        return function(*args, **(kwargs or {}))


def _total(layers):
    return sum(layer.total_channels for layer in layers)


# ---------------------------------------------------------------------------------------------------------------------
# pruning: from the last layer back to the first, who reads which channel; then every layer is cut to what is read

class Select(nn.Module):
    """The channels `index` (C_out,) of x: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, index, in_channels):
        super().__init__()
        self.in_channels = in_channels
        self.register_buffer("index", index, persistent=False)

    def forward(self, x):
        if x.is_contiguous():
            return x.index_select(1, self.index)
        pixels = x.permute(0, 2, 3, 1)  # channels-last: index_select would hand back NCHW, for the next layer to convert
        chosen = pixels.flatten(0, 2).index_select(1, self.index)  # (B * H * W, C_out)
        return chosen.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


class GraphNetwork(MultiDomain, fx.GraphModule):
    """A network of many domains given by its graph, what prune and add_switches return; forward(x, domain)."""

    def __init__(self, modules, graph, source, like):
        super().__init__(modules, graph)
        self.source = source
        self.depth, self.widen_factor = getattr(like, "depth", None), getattr(like, "widen_factor", None)
        self.train(like.training)

    def __deepcopy__(self, memo):  # GraphModule's own forgets the attributes
        modules = {node.target: self.get_submodule(node.target) for node in self.graph.nodes if node.op == "call_module"}
        return GraphNetwork(copy.deepcopy(modules, memo), copy.deepcopy(self.graph), self.source, self)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, (SwitchedConv2d, DomainModules, Select)) or super().is_leaf_module(module, name)


# what makes channel c of its output from channel c of its operands; anything else reads and yields all channels
CHANNELWISE_MODULES = (DomainBatchNorm2d, nn.ReLU, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
CHANNELWISE = (F.relu, F.dropout, torch.relu, operator.add, operator.iadd, torch.add, "relu", "add")
ALL = torch.tensor(True)  # a mask of all channels, however many


def _operands(node):
    return [operand for operand in node.all_input_nodes if (operand.op, operand.target) != ("placeholder", "domain")]


def _layer(network, node):
    """The module that `node` calls, or None."""
    return network.get_submodule(node.target) if node.op == "call_module" else None


def _reads(node, layer, live, domains):
    """Bool mask of the channels that `node` reads of its operands when the channels `live` of its own are read."""
    if isinstance(layer, SwitchedConv2d):
        return layer.read(domains)
    if isinstance(layer, DomainLinear):
        return torch.ones(next(iter(layer.values())).in_features, dtype=torch.bool)
    if isinstance(layer, Select):
        chosen = layer.index[live.expand(len(layer.index))]
        return torch.zeros(layer.in_channels, dtype=torch.bool).index_fill_(0, chosen, True)
    if layer is None:
        pooled = node.target == "mean" and node.kwargs.get("dim", node.args[1:] and node.args[1]) == (2, 3)
        known = pooled or node.target in CHANNELWISE
        return live if known and all(operand.op != "get_attr" for operand in _operands(node)) else ALL
    return live if isinstance(layer, CHANNELWISE_MODULES) else ALL


def liveness(network, graph, domains):
    """{node: bool mask (C,) of its channels that anyone reads when `domains` are served}, or ALL."""
    live = {}
    for node in reversed(graph.nodes):
        live.setdefault(node, ALL)
        layer = _layer(network, node)
        for operand in _operands(node):
            live[operand] = live.get(operand, ~ALL) | _reads(node, layer, live[node], domains)
    return live


def _arrange(network, graph, live, domains):
    """{node: (C,) rank of its channels}, the same for all nodes tied by an addition, a Select or a channelwise operation.

    What a layer reads should lie side by side: a slice is free, or nearly so, a gather is not. Channels are sorted by who
    reads them, the last reader first, in the order of a reflected Gray code: the sets of the last two readers are then a
    run each, and so is, at any point, what is read from there on.
    """
    reads = {node: _reads(node, _layer(network, node), live[node], domains) for node in graph.nodes}
    tied = {}  # node -> (the node that its channels are those of, (C,) the position there of each of its own)
    for node in graph.nodes:
        operands = [operand for operand in _operands(node) if operand in tied]
        layer = _layer(network, node)
        if isinstance(layer, Select) and operands:
            root, at = tied[operands[0]]
            tied[node] = root, at[layer.index]
        elif reads[node] is live[node] and operands:
            root, at = tied[node] = max((tied[operand] for operand in operands), key=lambda place: len(live[place[0]]))
            for other, own in [tied[operand] for operand in operands]:  # a convolution's result takes the order of the stream
                if other is not root and len(live[other]) == len(own) == len(at):
                    tied.update({n: (root, at[own.argsort()[its]]) for n, (r, its) in tied.items() if r is other})
        elif live[node].dim():
            tied[node] = node, torch.arange(len(live[node]))
    masks = {}  # root -> who reads what of it, the last reader first
    for node in reversed(graph.nodes):
        for root, at in [tied[operand] for operand in _operands(node) if operand in tied and reads[node].dim()]:
            mask = torch.zeros(len(live[root]), dtype=torch.bool).index_fill_(0, at[reads[node]], True)
            masks.setdefault(root, []).append(mask)
    ranks = {}
    for root, its in masks.items():
        blocks = [torch.arange(len(live[root]))]
        for mask in its:
            inside, halves = False, []
            for block in blocks:  # each is split in two, and begins with the kind that the one before it ended with
                for kind in (inside, not inside):
                    half = block[mask[block] == kind]
                    if len(half):
                        halves.append(half)
                        inside = kind
            blocks = halves
        ranks[root] = torch.cat(blocks).argsort()
    return {node: ranks[root][at] for node, (root, at) in tied.items() if root in ranks}


@torch.no_grad()
def _cut(network, domains, arrange=False, round_to=1):
    """A copy of `network` in which every layer has the channels left that `domains` read, and owns nothing else.

    arrange: choose the order of channels, so that few of them have to be gathered. round_to: fill up their number to a
    multiple of it, with channels whose weights are zero.
    """
    old, graph, modules = _Tracer().trace(network), fx.Graph(), {}
    live = liveness(network, old, domains)
    ranks = _arrange(network, old, live, domains) if arrange else {}
    new = {}  # node -> (its copy, which of its channels that yields: int64 positions, -1 for a filling; None for all)

    def positions(mask, node):
        at = mask.nonzero().flatten()
        at = at[ranks[node][at].argsort()] if node in ranks else at
        return F.pad(at, (0, -len(at) % round_to), value=-1)

    def take(operand, wanted, total):
        """The copy of `operand`, followed by a Select unless that yields just the channels `wanted` (None: all `total`)."""
        node, left = new[operand]
        if wanted is None and left is None:
            return node
        wanted = torch.arange(int((left >= 0).sum())) if wanted is None else wanted
        left = torch.arange(total) if left is None else left
        if torch.equal(wanted, left):
            return node
        place = torch.zeros(max(int(wanted.max()), int(left.max())) + 1, dtype=torch.long)
        place[left[left >= 0]] = torch.arange(len(left))[left >= 0]
        index = place[wanted[wanted >= 0]]
        filling = (index[-1] + 1 + torch.arange(len(wanted) - len(index))) % len(left)  # any; these prolong the last run
        name = f"select_{len(modules)}"
        modules[name] = Select(torch.cat([index, filling]), len(left))
        return graph.call_module(name, (node,))

    for node in old.nodes:
        layer = copy.deepcopy(_layer(network, node))
        if node.target in modules and next(layer.parameters(), None) is not None:
            raise ValueError(f"{node.target} is called twice: pruning needs a layer of its own for every call")
        if isinstance(layer, Select):
            yields = positions(live[node].expand(len(layer.index)), node)
            new[node] = take(node.args[0], torch.where(yields < 0, yields, layer.index[yields]), layer.in_channels), yields
            continue
        read = _reads(node, layer, live[node], domains)
        wanted = positions(read, _operands(node)[0]) if read.dim() else None
        operands = {operand: take(operand, wanted, read.numel()) for operand in _operands(node)}
        yields = wanted if read is live[node] else None
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            yields = positions(live[node].expand(layer.out_channels), node)
            cut_conv(layer, wanted, yields)
        elif isinstance(layer, DomainBatchNorm2d) and wanted is not None:
            cut_batch_norm(layer, wanted)
        elif isinstance(layer, DomainLinear):
            for linear in layer.values():
                linear.weight = nn.Parameter(_rows(linear.weight.mT, wanted).mT.contiguous())
        if node.op == "call_module":
            modules[node.target] = layer
        new[node] = graph.node_copy(node, lambda n: operands.get(n, new[n][0])), yields
    pruned = GraphNetwork(modules, graph, network.source, network)
    for domain in [domain for domain in pruned.classifiers if domain not in domains]:
        pruned.remove_domain(domain)
    return pruned


def _rows(tensor, at, filling=0.0):
    """The rows of `tensor` at these positions; `filling` for -1."""
    rows = tensor.detach()[at.clamp(min=0).to(tensor.device)]
    rows[(at < 0).to(tensor.device)] = filling
    return rows


def cut_conv(conv, channels, filters):
    """Keep the input channels and filters at these positions (int64; -1: new ones of zeros), in place; None: all."""
    conv.total_filters = getattr(conv, "total_filters", conv.out_channels)  # of the backbone
    weight = _rows(conv.weight, filters)
    if channels is not None:
        weight = _rows(weight.transpose(0, 1), channels).transpose(0, 1)
        conv.kept = torch.zeros_like(conv.kept).index_fill_(0, conv.kept.nonzero().flatten()[channels[channels >= 0]], True)
        for domain, switches in conv.switches.items():
            conv.switches[domain] = nn.Parameter(_rows(switches, channels, filling=1.0))
    conv.weight = nn.Parameter(weight.contiguous(), requires_grad=conv.weight.requires_grad)
    if conv.bias is not None:
        conv.bias = nn.Parameter(_rows(conv.bias, filters), requires_grad=conv.bias.requires_grad)
    conv.out_channels, conv.in_channels = weight.shape[:2]


def cut_batch_norm(norms, channels):
    """Keep the rows at these positions (int64; -1: one that yields 0) of every domain's batch-norm, in place."""
    for norm in norms.values():
        for name, rows in [*norm.named_parameters(), *norm.named_buffers()]:
            if rows.dim():
                rows.data = _rows(rows, channels, filling=float(name == "running_var"))
        norm.num_features = len(channels)


def _add_into(own, other):
    """own + other, written into `own` where that has the shape of the sum; nobody else sees it."""
    return own.add_(other) if own.shape == other.shape else own + other


@torch.no_grad()
def dense(network, domain=None, round_to=1):
    """A plain network that serves `domain` alone, forward(x), for inference: nn.Conv2d, nn.Linear, and torch functions.

    It has the domain's own channels, not those of all domains. Batch-norm is folded into the convolution before it; one
    with none before it becomes an addcmul. Channels are ordered so that many layers find what they read side by side, as a
    slice; the residual connections all do. round_to fills the number of channels up to a multiple of it, with zeros.
    domain: default, the last one, the only one of a network pruned to it.
    """
    domain = domain or list(network.classifiers)[-1]
    if domain not in network.classifiers:
        raise InputError(f"no domain {domain}: choose among {', '.join(network.classifiers)}")
    cut = _cut(copy.deepcopy(network).eval(), [domain], arrange=True, round_to=round_to)
    graph, layers, new = fx.Graph(), {}, {}
    for node in cut.graph.nodes:
        layer = _layer(cut, node)
        name = node.target.replace(".", "_") if layer is not None else None  # flat: every dot is a look-up at every call
        x = new.get(node.args[0]) if node.args else None
        alone = x is not None and len(node.args[0].users) == 1
        convs = [name for name, made in layers.items() if isinstance(made, nn.Conv2d)]
        into = [operand for operand in _operands(node) if len(operand.users) == 1 and new[operand].target in convs]
        if node.target == "domain":
            continue
        if isinstance(layer, Select):
            first, number = int(layer.index[0]), len(layer.index)
            if torch.equal(layer.index, torch.arange(first, first + number)):
                new[node] = graph.call_function(torch.narrow, (x, 1, first, number))
            else:
                layers[name], new[node] = layer, graph.call_module(name, (x,))
        elif isinstance(layer, DomainBatchNorm2d):
            norm = layer[domain]
            if x.target in convs and alone:
                layers[x.target] = nn.utils.fuse_conv_bn_eval(layers[x.target], norm)
                new[node] = x
                continue
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            layers[f"{name}_scale"] = scale.view(-1, 1, 1)
            layers[f"{name}_shift"] = (norm.bias - norm.running_mean * scale).view(-1, 1, 1)
            shift, scale = (graph.get_attr(f"{name}_{part}") for part in ("shift", "scale"))
            new[node] = graph.call_function(torch.addcmul, (shift, x, scale))
        elif isinstance(layer, nn.Conv2d):
            plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                              layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode)
            plain.weight, plain.bias = layer.weight, layer.bias
            layers[name], new[node] = plain.eval(), graph.call_module(name, (x,))
        elif node.op == "call_module":
            layers[name] = layer[domain] if isinstance(layer, DomainModules) else layer
            new[node] = graph.call_module(name, (x,))
        elif node.target is operator.add and into and len(_operands(node)) == 2:
            own, other = into[-1], node.args[node.args[0] is into[-1]]
            new[node] = graph.call_function(_add_into, (new[own], new[other]))
        elif node.target is F.relu and alone and (x.target in (torch.addcmul, _add_into) or x.target in convs):
            new[node] = graph.call_function(torch.relu_, (x,))  # nobody else sees the new tensor that x is
        else:
            new[node] = graph.node_copy(node, new.get)
    convs = {name: conv for name, conv in layers.items() if isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros"}
    # functions, not modules: at batch 1 the calls of modules are a good part of the time
    for node in [node for node in graph.nodes if node.target in convs]:
        conv = convs[node.target]
        with graph.inserting_before(node):
            weight = graph.get_attr(f"{node.target}_weight")
            bias = None if conv.bias is None else graph.get_attr(f"{node.target}_bias")
            node.replace_all_uses_with(graph.call_function(
                torch.conv2d, (node.args[0], weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)))
        graph.erase_node(node)
    parts = {f"{name}_{part}": value for name, conv in convs.items() for part, value in conv.named_parameters()}
    model = fx.GraphModule({**layers, **parts}, graph)
    for name, conv in convs.items():
        setattr(model, name, conv)  # still layers, for those who look for them
    return model.eval().requires_grad_(False)


def specialise(network, round_to=1):
    """`dense` for every domain that `network` serves, in one module with its forward(x, domain).

    Going from one domain to another is a look-up, nothing is copied, and each runs at its own complexity, not the union's.
    The price is memory: every domain holds its own weights, batch-norm being folded into them.
    """
    return DomainModules({domain: dense(network, domain, round_to) for domain in network.classifiers}).eval()


def prune(network, domains=None, keep_source=False):
    """A smaller copy of `network` for `domains` (default: all adapted ones), with the same logits for each of them.

    A channel stays if any of `domains` reads it, then or later: input channels that no switch lets through are gone, so
    are the filters (with their batch-norm rows, and the share of the residual stream) whose output nobody reads. Where a
    layer reads less than the one before it yields, a Select gathers it. Any network of SwitchedConv2d,
    DomainBatchNorm2d and DomainLinear that torch.fx can trace is pruned this way, a pruned one as well.

    The source is no longer served, unless keep_source: it reads every channel, so that all of the backbone stays.
    """
    domains = list(domains or network.domains)
    if not domains:
        raise InputError("nothing to prune: the network has no adapted domain, only a backbone")
    for domain in domains:
        if domain not in network.domains:
            raise InputError(f"cannot keep domain {domain}: choose among {', '.join(network.domains)}")
    if keep_source and network.source not in network.classifiers:
        raise InputError(f"cannot keep the source {network.source}: it has been pruned away")
    return _cut(network, [network.source] * keep_source + domains)


def add_switches(network, domains, source="imagenet", start=1e-3):
    """A copy of a plain, trained `network` (of torch.nn layers, such as torchvision's) with switches for `domains`.

    Every nn.Conv2d but those that read the image becomes a SwitchedConv2d, every nn.BatchNorm2d a DomainBatchNorm2d and
    the last nn.Linear the DomainLinear; grouped convolutions stay plain. domains: {name: number of classes}. Returns a
    network with forward(x, domain) that torch.fx.symbolic_trace must be able to follow; the source runs it untouched.
    """
    graph = _Tracer().trace(network)
    modules = {node.target: copy.deepcopy(network.get_submodule(node.target))
               for node in graph.nodes if node.op == "call_module"}
    image = next(iter(graph.nodes))
    with graph.inserting_after(image):
        domain = graph.placeholder("domain")
    last = [name for name, module in modules.items() if isinstance(module, nn.Linear)][-1]
    for node in graph.nodes:
        layer = modules.get(node.target) if node.op == "call_module" else None
        if node.target is operator.iadd:  # not in place: what it writes into may become a slice of something larger
            node.target = operator.add
        elif isinstance(layer, nn.ReLU):
            layer.inplace = False
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and image not in node.all_input_nodes:
            switched = SwitchedConv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                                      layer.dilation, bias=layer.bias is not None, padding_mode=layer.padding_mode,
                                      start=start)
            switched.weight, switched.bias = layer.weight, layer.bias
            modules[node.target] = switched
        elif isinstance(layer, nn.BatchNorm2d):
            modules[node.target] = DomainBatchNorm2d(layer.num_features)
            modules[node.target][source] = layer
        elif node.target == last:
            modules[node.target] = DomainLinear({source: layer})
        else:
            continue
        node.args = (*node.args, domain)
    result = GraphNetwork(modules, graph, source, network)
    for name, number in domains.items():
        result.add_domain(name, number)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def batch_norm_rows(network, domain):
    """{name of a batch-norm: positions (int64) of the rows that `domain` needs}; the others serve other domains."""
    graph = _Tracer().trace(network)
    live = liveness(network, graph, [domain])
    modules = {node: network.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    return {node.target: live[node].expand(module[domain].num_features).nonzero().flatten()
            for node, module in modules.items() if isinstance(module, DomainBatchNorm2d)}


def _pack(network):
    """What a pruned network is made of: {name: tensor}, switches as bits, no row that its domain does not need."""
    norms = [name for name, module in network.named_modules() if isinstance(module, DomainBatchNorm2d)]
    state = {name: parameter for name, parameter in network.named_parameters()
             if ".switches." not in name and ".".join(name.split(".")[:-2]) not in norms}
    for domain in network.classifiers:
        rows = [getattr(network.get_submodule(name)[domain], part)[at]
                for name, at in batch_norm_rows(network, domain).items() for part in BATCH_NORM]
        state[f"batch-norm {domain}"] = torch.cat(rows)
    for domain in network.domains:
        bits = []
        for _, layer in sorted(switched_layers(network).items()):
            bits.append(torch.zeros(layer.total_channels, dtype=torch.bool))
            bits[-1][layer.kept] = layer.read([domain])
        state[f"bits {domain}"] = pack_bits(torch.cat(bits))
    return state


def _unpack(network, state):
    """The pruned network of `state`, from `network`, the architecture with all its channels, on the meta device."""
    layers = [layer for _, layer in sorted(switched_layers(network).items())]
    for domain in network.domains:
        bits = unpack_bits(state[f"bits {domain}"], _total(layers)).split([layer.total_channels for layer in layers])
        for layer, on in zip(layers, bits):
            layer.switches[domain] = nn.Parameter(layer.start * (2.0 * on - 1))
    network = _cut(network, list(network.classifiers))
    for domain in network.classifiers:
        rows = batch_norm_rows(network, domain)
        packed, number = state[f"batch-norm {domain}"], len(BATCH_NORM) * sum(map(len, rows.values()))
        if packed.shape != (number,) or packed.dtype != torch.float32:
            raise ValueError(f"the batch-norm of {domain} has {packed.numel()} numbers, not {number}")
        for name, at in rows.items():
            norm = network.get_submodule(name)[domain].to_empty(device="cpu")
            norm.reset_parameters()  # the rows of other domains' channels: any number that is one
            for part in BATCH_NORM:
                getattr(norm, part).data[at] = packed[:len(at)]
                packed = packed[len(at):]
    weights = {name: value for name, value in state.items() if not name.startswith(("bits ", "batch-norm "))}
    unexpected = _assign(network, weights)
    missing = [name for name in _pack(network) if name not in state]
    if unexpected or missing:
        raise ValueError(f"it lacks {missing[0]}" if missing else f"{unexpected[0]} has no place in the network")
    return network


def _assign(network, state):
    """Make the tensors of `state` those of `network`, whatever its device; returns the names that it has no place for.

    ValueError names the first that does not fit.
    """
    for name, value in network.state_dict().items():
        given = state.get(name, value)
        if given.shape != value.shape or given.dtype != value.dtype:
            raise ValueError(f"{name} is {tuple(given.shape)} {given.dtype}, not {tuple(value.shape)} {value.dtype}")
    contiguous = {name: value.contiguous() for name, value in state.items()}
    return network.load_state_dict(contiguous, strict=False, assign=True).unexpected_keys


BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def pack_bits(on):
    """(n,) bool -> (ceil(n / 8),) uint8, the first bit the lowest."""
    return (F.pad(on, (0, -len(on) % 8)).view(-1, 8) * 2 ** torch.arange(8)).sum(1).to(torch.uint8)


def unpack_bits(packed, number):
    """The inverse of pack_bits: (number,) bool."""
    return (packed[:, None] >> torch.arange(8) & 1).flatten()[:number].bool()


def save(path, network, **facts):
    """Write `network` and `facts` (numbers, strings, lists, dicts, tensors) to `path`, all of it or nothing.

    Of a pruned network only what remains is written, and of its switches whether they are on.
    """
    pruned = isinstance(network, GraphNetwork)
    if network.depth is None:
        raise ValueError("save is for WideResNet, pruned or not: load would not know how to build another network")
    state = _pack(network) if pruned else network.state_dict()
    checkpoint = {"format": FORMAT, "depth": network.depth, "widen_factor": network.widen_factor,
                  "source": network.source, "pruned": pruned,
                  "num_classes": {domain: linear.out_features for domain, linear in network.classifiers.items()},
                  "state": {name: value.detach().cpu() for name, value in state.items()}, **facts}
    write_whole(path, lambda part: torch.save(checkpoint, part))


def write_whole(path, write):
    """write(name) a file beside `path`, then move it there: all of it or nothing. InputError where that cannot be done."""
    part = f"{path}.{os.getpid()}.part"  # two processes may be at it
    try:
        write(part)
        os.replace(part, path)  # in one piece: a reader sees the old file or the new one
    except (OSError, RuntimeError) as error:
        # torch's writer counts bytes and does not say why some are missing
        reason = _first_line(error) if isinstance(error, OSError) else f"is the disk full? ({_first_line(error)})"
        raise InputError(f"cannot write {path}: {reason}") from None
    finally:  # also of what was stopped by hand
        if os.path.isfile(part):
            os.remove(part)


def load(path):
    """(network, facts) of a checkpoint that save wrote, on the CPU.

    Nothing in the file is run, and nothing made room for that the file does not hold: the sizes it names are compared
    with its tensors on the meta device first. Anything else than what save writes is an InputError.
    """
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path} is a checkpoint of something else: expected one that train.py or prune.py wrote")
    try:
        num_classes, state, source = (checkpoint.pop(key) for key in ("num_classes", "state", "source"))
        depth, widen_factor = checkpoint.pop("depth"), checkpoint.pop("widen_factor")
        pruned, size = checkpoint.pop("pruned", False), os.path.getsize(path)
        if not all(type(number) is int and number > 0 for number in (depth, widen_factor, *num_classes.values())):
            raise ValueError("depth, widen factor and classes must be whole numbers from 1")
        _check_tensors(state, size)
        if depth * (1 if pruned else len(num_classes)) > len(state):  # so many convolutions, so many tensors of switches
            raise ValueError(f"{len(state)} tensors are too few for depth {depth} and {len(num_classes)} domains")
        with torch.device("meta"):
            network = WideResNet(depth, widen_factor, source, num_classes.get(source, 1))
        layers = switched_layers(network).values()
        channels = _total(layers)
        if channels > 8 * size:
            raise ValueError(f"it is too small for the {channels} input channels of its layers")
        for layer in layers:
            layer.kept = torch.ones(layer.in_channels, dtype=torch.bool)
        for domain, number in num_classes.items():
            if domain != source:
                if pruned and (state[f"bits {domain}"].shape, state[f"bits {domain}"].dtype) != (
                        (math.ceil(channels / 8),), torch.uint8):
                    raise ValueError(f"the switches of {domain} are not {channels} bits")
                network.add_domain(domain, number)
        if source not in num_classes:
            network.remove_domain(source)
        if pruned:
            network = _unpack(network, state)
        else:
            missing, unexpected = network.state_dict().keys() - state.keys(), _assign(network, state)
            if missing or unexpected:
                raise ValueError(f"it lacks {min(missing)}" if missing else f"{unexpected[0]} has no place in the network")
    except KeyError as error:
        raise InputError(f"{path} is damaged: it lacks {error}") from None
    except (AttributeError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or of another architecture: {_first_line(error)}") from None
    return network, checkpoint


def _read(path):
    """What torch.load finds in `path`, if that is a plain archive; InputError otherwise."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("constants.pkl") for entry in entries):  # torch before 2.6 would run it
            raise pickle.UnpicklingError
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its tensors are compressed, and may be of any size")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path} is not a readable checkpoint: it is cut off or holds more than tensors, numbers, strings, "
                         "lists and dicts; code is never run") from None
    except Exception as error:  # torch's reader raises nearly anything on bytes that are no checkpoint
        raise InputError(f"{path} is not a readable checkpoint: {_first_line(error)}") from None


def _check_tensors(state, size):
    """ValueError unless `state` is {name: dense tensor of finite numbers}, all of it together at most `size` bytes."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided \
                or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
    if sum(value.numel() * value.element_size() for value in state.values()) > size:  # a view can claim more than there is
        raise ValueError("its tensors claim more numbers than it holds")
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def check_facts(path, network, facts):
    """InputError unless `facts` say of every domain that `network` serves what train.py writes: classes and images."""
    records = facts.get("domains")
    if "image_size" not in facts or not isinstance(records, dict) or not set(network.classifiers) <= records.keys():
        raise InputError(f"{path} does not say what its images are like: give a checkpoint of train.py or prune.py")

    def numbers(values, length):
        return isinstance(values, (list, tuple)) and len(values) == length and all(
            type(value) in (int, float) and math.isfinite(value) for value in values)

    def distinct(values, kind, length):
        return isinstance(values, list) and len(values) == length and all(type(value) is kind for value in values) and (
            kind is str or len(set(values)) == length)

    for domain, linear in network.classifiers.items():
        record, length = records[domain], linear.out_features
        record = record if isinstance(record, dict) else {}
        for key, right in (("classes", distinct(record.get("classes"), str, length)),
                           ("category_ids", distinct(record.get("category_ids"), int, length)),
                           ("mean", numbers(record.get("mean"), 3)),
                           ("std", numbers(record.get("std"), 3) and min(record["std"]) > 0),
                           ("mirror", type(record.get("mirror")) is bool)):
            if not right:
                raise InputError(f"{path} is damaged: what it says of {domain} has no usable {key}")
    budget, size, multipliers = facts.get("budget"), facts["image_size"], facts.get("multipliers", {})
    if type(size) is not int or not 16 <= size <= 4096:
        raise InputError(f"{path} is damaged: its image size {size} is not a whole number from 16 to 4096")
    if budget is not None and not (type(budget) in (int, float) and 0 < budget <= 1):
        raise InputError(f"{path} is damaged: its budget {budget} is outside (0, 1]")
    if not isinstance(multipliers, dict):
        raise InputError(f"{path} is damaged: its multipliers are not one for each domain")


def load_dense(path):
    """(dense network, facts) of a checkpoint that prune.py --domain wrote: forward(x), in the memory format chosen then."""
    network, facts = load(path)
    form = facts.get("dense")
    if form is None:
        raise InputError(f"{path} is not for one domain: write it with prune.py --domain NAME")
    if not isinstance(form, dict) or type(form.get("round_to")) is not int or not 1 <= form["round_to"] <= 256 or type(
            form.get("channels_last")) is not bool:
        raise InputError(f"{path} is damaged: it does not say how its dense network is built")
    model = dense(network, round_to=form["round_to"])
    return model.to(memory_format=torch.channels_last if form["channels_last"] else torch.contiguous_format), facts


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
