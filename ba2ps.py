# SPDX-License-Identifier: MIT
"""Budget-aware adapters with parameter sharing: one frozen network, many domains, a budget each.

The whole method in one file that needs only torch. Copy it, or the section that you want.

    x --> batch-norm of d --> ReLU --> times s_d --> convolution, shared and frozen --> ...

    L_total = L + max(0, lambda_d (mean(s_d) - beta))                           L_B, Eq. 4
                + max(0, lambda_PS (1 - |s_1 & ... & s_N| / (M beta)))          L_PS, Eq. 5

    theta_d     network.switches[domain]    (M,) real numbers, one for each input channel   Eq. 2, 3
    s_d         binarize(theta_d)           (M,) 1 where theta_d > 0: the channel is read   Eq. 3
    N, M        s.shape                     the number of domains, of switches
    beta        budget                      the share that a domain may have on             Eq. 4
    lambda_d    multiplier[domain]          raised while a domain is over its budget        Eq. 4
    lambda_PS   sharing                     weight of the sharing loss                      Eq. 5
    L           cross_entropy               in the training loop, see train.py

  [1] dos Santos et al., Parameter Sharing in Budget-Aware Adapters for Multi-Domain Learning, 2022
  [2] Berriel et al., Budget-Aware Adapters for Multi-Domain Learning (BA2), 2019
  [3] Zagoruyko and Komodakis, Wide Residual Networks, 2016
  [4] Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013
  [5] Molchanov et al., Importance Estimation for Neural Network Pruning, 2019

Equations and tables are those of [1], "the paper"; Eq. 6, the score S, is in evaluate.py. This file
does not train, read images or print. Grouped convolutions and linear layers get no switches.
"""
import contextlib
import copy
import os
import pickle
import zipfile

import torch
import torch.fx as fx

# -------- 1  Layers: straight-through estimator, switched convolution, what a domain has one of ----

nn = torch.nn            # here, so that sections 1 to 3 run under `import copy` and `import torch`
F = torch.nn.functional


class InputError(ValueError):
    """What the user gave cannot be used: one line that names it and says what to do."""


class Binarize(torch.autograd.Function):
    """1[theta > 0] forward, the identity backward: the straight-through estimator [4]. 0 is off."""

    @staticmethod
    def forward(ctx, switches):
        return (switches > 0).to(switches.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad      # also where a switch is off: that is how a channel comes back


binarize = Binarize.apply


class SwitchedConvolution(torch.autograd.Function):
    """conv2d(s * x, W) for binary s (C_in,) and a frozen W (Eq. 3).

    The same as with autograd, but s * x is not kept in memory: the backward pass needs x alone.
    """

    @staticmethod
    def forward(ctx, x, s, weight, bias, *geometry):
        if torch.is_autocast_enabled(x.device.type):    # autocast does not reach the backward pass
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            weight = weight.to(dtype)
        s = s.to(weight.dtype)
        ctx.save_for_backward(x, s, weight)
        ctx.geometry = geometry                         # stride, padding, dilation
        if x.numel() < weight.numel():                  # mask the smaller of the two
            return F.conv2d(x * s.view(-1, 1, 1), weight, bias, *geometry)
        return F.conv2d(x, weight * s.view(1, -1, 1, 1), bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, s, weight = ctx.saved_tensors
        wanted = (True, False, False)                   # of input, weight and bias: the input alone
        grad = torch.ops.aten.convolution_backward(     # dL/d(s x), as if every channel were on
            grad, x, weight, None, *ctx.geometry, False, (0, 0), 1, wanted)[0]
        s_grad = None
        if ctx.needs_input_grad[1]:
            dtype = torch.promote_types(x.dtype, torch.float32)
            s_grad = (x * grad).sum((0, 2, 3), dtype=dtype)
        return grad.mul_(s.view(-1, 1, 1)), s_grad, None, None, None, None, None


class SwitchedConv2d(nn.Conv2d):
    """nn.Conv2d that reads only the input channels that are on (Eq. 3), with the same arguments.

    switches: (C_in,) real numbers, set before forward; None: every channel is read.
    """

    switches = None

    def forward(self, x):
        if self.switches is None:
            return super().forward(x)
        s = binarize(self.switches)
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        zeros = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if trained or not zeros or self.groups > 1 or x.dim() < 4:
            return super().forward(x * s.to(x.dtype).view(-1, 1, 1))
        geometry = self.stride, self.padding, self.dilation
        return SwitchedConvolution.apply(x, s, self.weight, self.bias, *geometry)


class PerDomain(nn.ModuleDict):
    """One module for each domain: {domain: module}. forward runs that of the domain at work.

    domain: set before forward; InputError where it is None, as in a part that is run on its own.
    """

    domain = None

    def forward(self, *inputs):
        if self.domain is None:
            raise InputError("no domain is at work: call, and checkpoint, network(images, domain)")
        return self[self.domain](*inputs)


# -------- 2  Networks: a plain WRN-28, and MultiDomain, which adapts any network (Eq. 1) -----------

class BasicBlock(nn.Module):
    """The pre-activation block of [3]."""

    def __init__(self, in_planes, out_planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, 1, 1, bias=False)
        self.shortcut = None
        if in_planes != out_planes or stride != 1:
            self.shortcut = nn.Conv2d(in_planes, out_planes, 1, stride, 0, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        return x + self.conv2(out)


class WideResNet(nn.Module):
    """WRN-depth-widen_factor [3], an ordinary network; WRN-28-4 is the paper's backbone.

    (B, 3, H, W) -> (B, num_classes). Three groups of (depth - 4) / 6 blocks, of 16, 32 and 64 times
    widen_factor channels. Each halves the resolution, the first one too (unlike Zagoruyko's).
    """

    def __init__(self, depth=28, widen_factor=4, num_classes=1000):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen_factor < 1:
            raise InputError(f"WRN-{depth}-{widen_factor}: give a depth of 10, 16, ... and a width")
        self.name = f"WRN-{depth}-{widen_factor}"
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = self.group(16, 16 * widen_factor, blocks)
        self.block2 = self.group(16 * widen_factor, 32 * widen_factor, blocks)
        self.block3 = self.group(32 * widen_factor, 64 * widen_factor, blocks)
        self.bn1 = nn.BatchNorm2d(64 * widen_factor)
        self.fc = nn.Linear(64 * widen_factor, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def group(in_planes, out_planes, number):
        blocks = [BasicBlock(in_planes, out_planes, 2)]
        for _ in range(number - 1):
            blocks.append(BasicBlock(out_planes, out_planes, 1))
        return nn.Sequential(*blocks)

    def forward(self, x):
        x = self.conv1(x)                   # (B, 16, H, W)
        x = self.block1(x)                  # (B, 16 * widen_factor, H / 2, W / 2)
        x = self.block2(x)                  # (B, 32 * widen_factor, H / 4, W / 4)
        x = self.block3(x)                  # (B, 64 * widen_factor, H / 8, W / 8)
        x = F.relu(self.bn1(x))
        return self.fc(x.mean(dim=(2, 3)))  # (B, num_classes)


import threading         # here for the same reason as nn and F
LOCK = threading.RLock()
NORMS = nn.modules.batchnorm._NormBase      # of batch and instance: they may have statistics


class MultiDomain(nn.Module):
    """A frozen network that serves many domains, and what each of them owns (Eq. 1).

    backbone: a plain, trained network, (B, C, S, S) -> (B, classes). A copy of it keeps its forward.
    Its nn.Conv2d become SwitchedConv2d, but those that read the image; its batch-norms and its last
    nn.Linear become PerDomain; all else is shared. domains: {name: number of classes}. source: the
    domain that it was trained on, without switches. image_size: S.

    switches: {domain: (M,) parameter}, for any optimizer. layers: names of the convolutions, in the
    order of a row. owned: names of the PerDomain modules, with `classifier` among them. kept:
    {layer: (C,) bool}, channels that pruning left. channels: C.

    InputError, by its name, for a convolution or norm that is called twice or never, and for what
    changes in training though all domains share it. Threads that call networks take turns.
    """

    def __init__(self, backbone, domains={}, source="imagenet", image_size=224):
        super().__init__()
        check_name(source)
        self.name = str(vars(backbone).get("name", type(backbone).__name__))
        self.options = None                 # what torchvision's get_model builds the backbone from
        self.source = source
        self.image_size = image_size
        self.pruned = False
        self.training = backbone.training
        self.backbone = copy.deepcopy(backbone)
        keep_tensors(self.backbone)
        called, self.channels = layers_called(self.backbone, self.name, image_size)
        self.classifier = called[-1]
        self.give_parts([self.layer(name) for name in called])
        modules = dict(self.backbone.named_modules())
        self.layers = [name for name in modules if isinstance(modules[name], SwitchedConv2d)]
        self.owned = [name for name in modules if isinstance(modules[name], PerDomain)]
        if not self.layers:
            raise InputError(f"{self.name} has no nn.Conv2d that reads another layer's channels")
        self.kept = {}
        for name in self.layers:
            self.kept[name] = torch.ones(modules[name].in_channels, dtype=torch.bool, device="cpu")
        self.whole = {}                     # {shared parameter: its size before pruning}
        for name, parameter in self.backbone.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0]
            if owner in called and owner.rpartition(".")[0] not in self.owned:
                self.whole[name] = parameter.numel()
        norms = [part[source] for part in self.parts() if part is not modules[self.classifier]]
        self.norm_channels = sum(norm.num_features for norm in norms)
        self.switches = nn.ParameterDict()
        for domain, number in domains.items():
            self.add_domain(domain, number)

    def give_parts(self, called):
        """Turn the layers that are called into switched and per-domain ones, in place."""
        convs = [layer for layer in called if isinstance(layer, nn.Conv2d)]
        for conv in convs:                  # the first one reads the image
            if is_conv(conv) and conv.groups == 1 and conv.in_channels != convs[0].in_channels:
                conv.__class__ = SwitchedConv2d
        parts = {}
        for layer in called:
            if isinstance(layer, NORMS) or layer is called[-1]:
                parts[layer] = PerDomain({self.source: layer})
                parts[layer].training = layer.training
        for parent in list(self.backbone.modules()):
            for name, layer in list(parent._modules.items()):
                if layer in parts and not isinstance(parent, PerDomain):
                    setattr(parent, name, parts[layer])

    def layer(self, name):
        """The module of the backbone that has this name."""
        return self.backbone.get_submodule(name)

    def parts(self):
        """The PerDomain modules: batch-norms and classifiers."""
        return [self.layer(name) for name in self.owned]

    @property
    def classes(self):
        """{domain: number of classes} of all domains that are served, the source among them."""
        linears = self.layer(self.classifier)
        return {domain: linear.out_features for domain, linear in linears.items()}

    @property
    def domains(self):
        """The adapted domains, in the order in which they came; the source is not among them."""
        return [domain for domain in self.classes if domain != self.source]

    def add_domain(self, domain, num_classes):
        """Switches at 1e-3, a fresh classifier, and a copy of the source's batch-norms, or of the
        first domain's where the source is pruned away."""
        check_name(domain)
        if domain in self.classes or domain == self.source:
            raise InputError(f"domain {domain} is there already: give each one once")
        like = next(iter(self.classes))
        weight = self.layer(self.layers[0]).weight
        self.switches[domain] = nn.Parameter(weight.new_full((sum(widths(self)),), 1e-3))
        for name, part in zip(self.owned, self.parts()):
            if name == self.classifier:
                fresh = nn.Linear(part[like].in_features, num_classes)
                part[domain] = fresh.to(weight).train(part[like].training)
            else:
                part[domain] = copy.deepcopy(part[like]).requires_grad_(True)

    def remove_domain(self, domain):
        served(self, [domain])
        if domain in self.switches:         # the source has none
            del self.switches[domain]
        for part in self.parts():
            del part[domain]

    def owned_parameters(self, domains=None):
        """Those of the batch-norms and classifiers of `domains` (default: all adapted ones)."""
        result = []
        for domain in served(self, domains):
            for part in self.parts():
                result.extend(part[domain].parameters())
        return result

    def freeze_backbone(self):
        """Stop the gradient of all that no adapted domain owns."""
        self.requires_grad_(False)
        for parameter in (*self.switches.values(), *self.owned_parameters()):
            parameter.requires_grad_(True)

    def __call__(self, images, domain):
        if torch.compiler.is_compiling():
            return super().__call__(images, domain)
        with LOCK:                          # the layers know one domain at work
            return super().__call__(images, domain)

    def forward(self, images, domain):
        """Logits (B, classes of `domain`) of images (B, channels, S, S)."""
        served(self, [domain])
        layers = list(switched_layers(self).values())
        parts = self.parts()
        try:
            for part in parts:
                part.domain = domain
            if domain in self.switches:
                rows = self.switches[domain].split([layer.in_channels for layer in layers])
                for layer, row in zip(layers, rows):
                    layer.switches = row
            logits = self.backbone(images)
        finally:
            for part in parts:
                part.domain = None
            for layer in layers:            # tensors with a gradient cannot be copied
                layer.switches = None
        return logits if isinstance(logits, torch.Tensor) else logits[0]    # no auxiliary logits


def served(network, domains=None):
    """`domains` as a list, default all adapted ones; InputError unless each of them is served."""
    domains = network.domains if domains is None else domains
    if isinstance(domains, str) or not set(domains) <= set(network.classes):
        raise InputError(f"{domains!r} is no list of domains out of {', '.join(network.classes)}")
    return list(domains)


def switched_layers(network):
    """{name: SwitchedConv2d}, in the order in which a row of switches has them."""
    return {name: network.layer(name) for name in network.layers}


def widths(network):
    """[number of switches of each layer], as a row is split."""
    return [layer.in_channels for layer in switched_layers(network).values()]


def check_name(domain):
    """InputError unless `domain` can name a part of a torch module."""
    taken = hasattr(PerDomain(), str(domain)) or hasattr(nn.ParameterDict(), str(domain))
    if taken or not domain or not isinstance(domain, str) or "." in domain:
        raise InputError(f"domain name {domain!r} cannot name a part of a torch module: rename it")


def is_conv(layer):
    """Whether it is a plain convolution, with a parameter as its weight."""
    plain = type(layer) in (nn.Conv2d, SwitchedConv2d)
    return plain and isinstance(layer.weight, nn.Parameter)


def keep_tensors(backbone):
    """Make persistent buffers of the tensors that modules have: so they move and are saved."""
    for module in backbone.modules():
        for name, value in [*vars(module).items(), *module.named_buffers(recurse=False)]:
            if type(value) is torch.Tensor:
                vars(module).pop(name, None)
                module.register_buffer(name, value)


def layers_called(backbone, name, image_size):
    """(names of the modules in the order in which evaluation calls them, at the end the linear layer
    of the logits; channels of the images), from a run on random images in each mode."""
    for channels in (3, 1):
        images = torch.rand(2, channels, image_size, image_size, generator=torch.Generator("cpu"))
        try:
            called, _, logits = watch(backbone, images, training=False)
            trained, after, _ = watch(backbone, images, training=True)
            break
        except Exception as error:
            problem = one_line(error) if channels == 3 else problem
    else:
        raise InputError(f"{name} cannot run on {image_size} pixels: {problem}")
    modules = dict(backbone.named_modules())
    kinds = [layer for layer in modules if isinstance(modules[layer], (nn.Conv2d, NORMS))]
    last = [layer for layer in called if isinstance(modules[layer], nn.Linear)][-1:]
    if not last or getattr(logits, "shape", None) != (2, modules[last[0]].out_features):
        raise InputError(f"{name} needs an nn.Linear at its end that makes its output, logits")
    for layer in kinds + last:
        if called.count(layer) > 1:
            raise InputError(f"{name}: {layer} is called twice: each call needs a layer of its own")
        if layer not in called + trained:
            raise InputError(f"{name}: {layer} is never called: take it out of the network")
    for key, value in backbone.named_buffers():
        if key.rpartition(".")[0] not in kinds and not torch.equal(value, after[key]):
            raise InputError(f"{name}: {key} changes in training, but all domains share it")
    called.remove(last[0])
    return called + last, channels


@torch.no_grad()
def watch(backbone, images, training):
    """(names of the modules at each of their calls, buffers afterwards, output) of a copy."""
    trial = copy.deepcopy(backbone).train(training)
    order = []
    for name, module in trial.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: order.append(name))
    with torch.random.fork_rng():           # whoever asks draws the same random numbers afterwards
        output = trial(images.to(next(backbone.parameters())))
    return order, dict(trial.named_buffers()), output


def one_line(error):
    words = " ".join(str(error).replace("\x1b[1m", "").replace("\x1b[0m", "").split())
    return f"{type(error).__name__}: {words:.300}"


# -------- 3  The losses (Eq. 4, 5), the multiplier's step, the floor, start and budget of switches -

def binarized(network, moving=None):
    """s, (N, M): the binary switches of all adapted domains, in the order of network.domains.

    moving: the domains that get a gradient (default: all). The others get none, since a gradient of
    0 would still let Adam's momentum move them.
    """
    rows = []
    for domain in network.domains:
        row = network.switches[domain]
        rows.append(row if moving is None or domain in moving else row.detach())
    return binarize(torch.stack(rows))


def budget_loss(usage, budget, multiplier):
    """L_B = max(0, lambda_d (usage - beta)) of one domain (Eq. 4, section 3.1).

    usage: scalar, mean(s_d) or another share that is on; multiplier: lambda_d, 0 or more.
    """
    return F.relu(multiplier * (usage - budget))


def sharing_loss(s, budget, form="intersection"):
    """L_PS / lambda_PS = max(0, excess), for domains that do not use the same channels; by `form`:

        intersection    1 - |s_1 & ... & s_N| / (M beta)               (Eq. 5)
        union           |s_1 or ... or s_N| / (M beta) - 1             (our reading of the journal
        jaccard         1 - |s_1 & ... & s_N| / |s_1 or ... or s_N|     version, arXiv 2309.11464)

    s: (N, M) binary, of all domains. The intersection is the sum over switches of the product over
    domains. With the other domains detached the paper saw no sharing (supplement A).
    """
    both = s.prod(dim=0).sum()
    either = (1 - (1 - s).prod(dim=0)).sum()
    most = s.shape[1] * budget
    if form == "union":
        return F.relu(either / most - 1)
    if form == "jaccard":
        return F.relu(1 - both / either)
    return F.relu(1 - both / most)


def next_multiplier(multiplier, usage, budget, rate=0.3):
    """lambda_d + rate (usage - beta), never below 0: after a step, for the next one (section 3.1).

    It has to rise slowly. All switches start alike and Adam moves each by about its rate: a budget
    loss that outweighs the cross-entropy sends them through zero together.
    """
    usage = usage.item() if isinstance(usage, torch.Tensor) else usage
    return max(0.0, multiplier + rate * (usage - budget))


@torch.no_grad()
def keep_a_channel(network, domains):
    """In a layer where one of `domains` has no channel on, switch its strongest one on."""
    rows = torch.stack([network.switches[domain] for domain in domains])                 # (N, M)
    strongest = [part.amax(dim=1) for part in rows.split(widths(network), dim=1)]
    for n, layer in (torch.stack(strongest, dim=1) <= 0).nonzero().tolist():
        part = network.switches[domains[n]].split(widths(network))[layer]
        part[part.argmax()] = 1e-6


def ranked(network, value):
    """(M,) positions of the switches: the best of each layer, then the rest, by `value`."""
    value = value.clone()
    for layer in value.split(widths(network)):
        layer[layer.argmax()] = torch.inf
    return value.argsort().flip(0)


@torch.no_grad()
def start_switches(network, domain, importance, cost, room, spread=1e-2):
    """Give the switches of `domain` values in the order of importance per cost, before the search.

    As many are positive as the budget has room for, one in each layer first. Values fall evenly
    from `spread` to 0 and on to -spread: the best of those that are off lie just below 0.
    importance: (M,), as the mean square of a switch's gradient [5]; cost: (M,), see costs; room: the
    budget less the share that no switch governs, enough for a channel in each layer.
    """
    order = ranked(network, importance / cost)
    number = int((cost[order].cumsum(0) <= room + 1e-9).sum())
    on = torch.linspace(spread, 0, number + 1)[:-1]
    off = torch.linspace(0, -spread, len(order) - number + 1)[1:]
    row = network.switches[domain]
    row[order.to(row.device)] = torch.cat([on, off]).to(row)


@torch.no_grad()
def hold_budget(network, domain, cost, room):
    """Switch the least switches of `domain` off until its budget holds; cost, room: as above."""
    row = network.switches[domain]
    value = torch.where(row > 0, row, -torch.inf).to("cpu", torch.double)
    order = ranked(network, value)
    over = order[cost[order].cumsum(0) > room + 1e-9]
    row[over[value[over] > 0].to(row.device)] = 0


# -------- 4  What it costs, relative to the backbone: from masks and one table of its layers -------

BUDGETS = ("layers", "channels", "macs", "params")


def read(network, domain):
    """(M,) bool, on the CPU: the switches that `domain` has on. The source reads all."""
    if domain not in network.switches:
        return torch.ones(sum(widths(network)), dtype=torch.bool)
    return network.switches[domain].detach().cpu() > 0


def masks(network, domains=None):
    """{layer: (N, C) bool, on the CPU}: which of the backbone's C input channels `domains` read.

    domains: default all adapted ones; the source reads all. What is pruned away is off.
    """
    domains = served(network, domains)
    result = {}
    for name, kept in network.kept.items():
        result[name] = torch.zeros(len(domains), len(kept), dtype=torch.bool)
    for n, domain in enumerate(domains):
        for name, row in zip(network.layers, read(network, domain).split(widths(network))):
            result[name][n, network.kept[name]] = row
    return result


def table(network, image_size=None):
    """{shared layer: its weights in the backbone}; biases have names of their own.

    With image_size {shared layer: its MACs for a crop}, by THOP. What pruning took counts too.
    """
    whole = {name.removesuffix(".weight"): number for name, number in network.whole.items()}
    if image_size is None:
        return whole
    from thop import profile                                    # needs setuptools on Python 3.12
    from thop.vision.basic_hooks import count_convNd, count_linear
    network = copy.deepcopy(network)                            # THOP leaves buffers in it
    names = {module: name for name, module in network.backbone.named_modules()}
    operations = {}

    def count(layer, inputs, output):
        if names[layer] in whole:                               # a classifier is not
            (count_linear if isinstance(layer, nn.Linear) else count_convNd)(layer, inputs, output)
            pruned = whole[names[layer]] / layer.weight.numel()
            operations[names[layer]] = round(int(layer.total_ops) * pruned)

    first = next(network.backbone.parameters())
    images = first.new_zeros(1, network.channels, image_size, image_size)
    kinds = SwitchedConv2d, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear
    domain = next(iter(network.classes))
    profile(network, (images, domain), dict.fromkeys(kinds, count), verbose=False)  # by exact type
    return operations


def costs(network, of="layers", image_size=None):
    """((M,) float64, what each switch costs; the share that no switch governs): all together is 1.

    of: layers, the paper's, 1 / (number of layers * C): usage is 1 - the sparsity of Table 7;
    channels, 1 / M; macs, params: a channel's share of the MACs or weights of the shared layers.
    """
    if of not in BUDGETS:
        raise InputError(f"budget of {of!r}: choose among {', '.join(BUDGETS)}")
    if of == "layers":
        whole = dict.fromkeys(network.layers, 1)
    elif of == "channels":
        whole = {name: len(kept) for name, kept in network.kept.items()}
    elif of == "macs":
        whole = table(network, image_size or network.image_size)
    else:
        whole = table(network)
    total = sum(whole.values())
    cost = []
    for name, kept in network.kept.items():
        each = whole[name] / total / len(kept)
        cost.append(torch.full((int(kept.sum()),), each, dtype=torch.double))
    governed = sum(whole[name] for name in network.layers)
    return torch.cat(cost), (total - governed) / total


def share(network, domains=None, of="layers", image_size=None):
    """Share of the backbone, in the measure `of`, that any of `domains` reads."""
    cost, fixed = costs(network, of, image_size)
    on = torch.stack([read(network, domain) for domain in served(network, domains)])
    return fixed + float(cost @ on.any(dim=0).double())


def usage(network, of="layers", image_size=None, domains=None):
    """{domain: share in the measure `of` that it has on}, what is held against the budget."""
    cost, fixed = costs(network, of, image_size)
    domains = served(network, domains)
    return {domain: fixed + float(cost @ read(network, domain).double()) for domain in domains}


def sparsity(network, domains=None):
    """({domain: share off}, share off in all domains): means over layers, as in Table 7."""
    off = {domain: max(0.0, 1 - use) for domain, use in usage(network, domains=domains).items()}
    return off, max(0.0, 1 - share(network, domains))


def params(network, domains=None):
    """Memory that `domains` need, relative to the backbone (Table 2), without what none of them reads.

    All but classifiers: weights, four floats (weight, bias, mean, variance) per batch-norm channel
    and domain, 32 bits a float, 1 bit a switch. The backbone is the shared layers alone: WRN-28-4 with
    ten domains and every switch on is at 1.025. The source counts only if it is named.
    """
    domains = served(network, domains) or [network.source]
    adapted = [domain for domain in domains if domain != network.source]
    channels = sum(int(mask.any(dim=0).sum()) for mask in masks(network, domains).values())
    own = 4 * network.norm_channels * len(domains) + channels / 32 * len(adapted)
    return share(network, domains, "params") + own / sum(network.whole.values())


def macs(network, domains=None, image_size=None):
    """Multiply-accumulates of the shared layers for one crop, with the channels that `domains` read.

    [domain]: of that domain; None: of the backbone. Every filter counts, as in the paper; batch-norm
    (0.3% of WRN-28-4) and classifiers do not.
    """
    operations = table(network, image_size or network.image_size)
    if domains is not None:
        for name, mask in masks(network, domains).items():
            operations[name] *= mask.any(dim=0).double().mean().item()
    return round(sum(operations.values()))


@torch.no_grad()
def reestimate_batch_norm(network, domain, batches):
    """Set the running statistics of `domain` to the mean over `batches`, for the switches it has now.

    batches: of (images, labels), as a DataLoader gives them. While switches move, statistics describe
    a network that is gone (EagleEye, ECCV 2020). They stay if something is raised, InputError for no
    batch among it. Modes are restored.
    """
    served(network, [domain])
    norms = [part[domain] for part in network.parts()]
    norms = [norm for norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    before = [(copy.deepcopy(norm.state_dict()), norm.momentum) for norm in norms]
    modes = [(module, module.training) for module in network.modules()]
    done = 0
    try:
        network.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None            # torch's cumulative average
        for images, _ in batches:
            network(images, domain)
            done += 1
        if not done:
            raise InputError(f"no batch of {domain} to re-estimate its batch-norm from")
    except BaseException:
        for norm, (state, _) in zip(norms, before):
            norm.load_state_dict(state)
        raise
    finally:
        for norm, (_, momentum) in zip(norms, before):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training


# -------- 5  Pruning: from the last layer back to the first, who reads which channel ----------------

class Select(nn.Module):
    """The channels `index` of x: (B, C, ...) -> (B, len(index), ...)."""

    def __init__(self, index):
        super().__init__()
        self.register_buffer("index", index, persistent=False)

    def forward(self, x):
        if x.dim() < 4 or x.is_contiguous():
            return x.index_select(1, self.index)
        pixels = x.permute(0, 2, 3, 1)      # channels-last, where index_select would give NCHW
        chosen = pixels.flatten(0, 2).index_select(1, self.index)
        return chosen.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


class Value(str):
    """In the steps of a Pruned, the name of what another step yields."""


class Pruned(nn.Module):
    """What is left of a backbone: its modules and attributes, and its forward as a list of steps."""

    def __init__(self, backbone, graph):
        super().__init__()
        vars(self).update(vars(backbone))
        self._steps = []                    # (name, kind, target, args, kwargs, what is used no more)
        needed = set()
        for node in reversed(graph.nodes):
            args, kwargs = replace((node.args, node.kwargs), fx.Node, lambda one: Value(one.name))
            done = [one.name for one in node.all_input_nodes if one not in needed]
            needed.update(node.all_input_nodes)
            self._steps.insert(0, (node.name, node.op, node.target, args, kwargs, done))

    def forward(self, images):
        values = {}
        for name, kind, target, args, kwargs, done in self._steps:
            args, kwargs = replace((args, kwargs), Value, values.get)
            if kind == "placeholder":
                values[name] = images
            elif kind == "get_attr":
                parent, _, last = target.rpartition(".")
                values[name] = getattr(self.get_submodule(parent), last)
            elif kind == "call_module":
                values[name] = self.get_submodule(target)(*args, **kwargs)
            elif kind == "call_method":
                values[name] = getattr(args[0], target)(*args[1:], **kwargs)
            elif kind == "call_function":
                values[name] = target(*args, **kwargs)
            else:                           # output
                return args[0]
            for one in done:
                del values[one]


def replace(argument, kind, by):
    """`argument` with by(one) in place of each `one` of this kind in it."""
    if isinstance(argument, kind):
        return by(argument)
    if isinstance(argument, (tuple, list)):
        parts = [replace(part, kind, by) for part in argument]
        return tuple(parts) if isinstance(argument, tuple) else parts
    if isinstance(argument, dict):
        return {key: replace(part, kind, by) for key, part in argument.items()}
    if isinstance(argument, slice):
        return slice(*replace((argument.start, argument.stop, argument.step), kind, by))
    return argument


class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        own = isinstance(module, (SwitchedConv2d, PerDomain, Select))
        bare = not [*module.children(), *module.parameters(), *module.buffers()]
        return own or bare or super().is_leaf_module(module, name)


class Recorder(fx.Interpreter):
    """Keeps in node.meta what a node yields, and the operands that it writes into."""

    def run_node(self, node):
        values = [self.env[operand] for operand in node.all_input_nodes]
        before = [getattr(value, "_version", 0) for value in values]
        node.meta["value"] = super().run_node(node)
        node.meta["written"] = []
        for operand, value, version in zip(node.all_input_nodes, values, before):
            if getattr(value, "_version", 0) > version:
                node.meta["written"].append(operand)
        return node.meta["value"]


@torch.no_grad()
def trace(network):
    """The graph of the backbone's forward, run once; InputError if torch.fx cannot follow it.

    What writes into a tensor that is read again later writes into a copy of it: pruning may put a
    Select in between.
    """
    size = 2, network.channels, network.image_size, network.image_size
    try:
        known = list(vars(network.backbone))
        graph = Tracer().trace(network.backbone)
        keep_constants(network.backbone, graph, known)
        for part in network.parts():
            part.domain = next(iter(part))
        Recorder(network.backbone, graph=graph).run(next(network.parameters()).new_zeros(size))
    except Exception as error:
        problem = f"torch.fx cannot follow its forward: {one_line(error)}"
        raise InputError(f"{network.name}: {problem}") from None
    finally:
        for part in network.parts():
            part.domain = None
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in place:
        for operand in node.meta["written"]:
            later = [user for user in operand.users if place.get(user, 0) > place[node]]
            if later:
                with graph.inserting_before(node):
                    clone = graph.call_method("clone", (operand,))
                clone.meta["value"] = operand.meta["value"]
                node.replace_input_with(operand, clone)
                operand.replace_all_uses_with(node, lambda user: user in later)
    return graph


def keep_constants(backbone, graph, known):
    """Make buffers, under names that do not depend on earlier traces, of the tensors that forward makes."""
    for name in [name for name in vars(backbone) if name not in known]:
        constant = free_name(backbone, "constant")
        backbone.register_buffer(constant, vars(backbone).pop(name))
        for node in graph.nodes:
            if node.op == "get_attr" and node.target == name:
                node.target = constant


def free_name(module, name):
    """`name`, or the first of name_1, name_2, ... that nothing in `module` has."""
    number = 0
    free = name
    while hasattr(module, free):
        number += 1
        free = f"{name}_{number}"
    return free


def layer_of(network, node):
    """The module that `node` calls, or None."""
    return network.layer(node.target) if node.op == "call_module" else None


def width(node):
    """Number of channels of what `node` yields, (B, C, ...); 0 if it is something else."""
    value = node.meta["value"]
    return value.shape[1] if isinstance(value, torch.Tensor) and value.dim() > 1 else 0


def channelwise(network, node, operand):
    """Whether `node`, without weights, makes channel c of channel c of `operand` and of no other.

    It is tried, with half as many channels too. Where a channel is not a number, what is made of it
    must not be one, and the rest must.
    """
    for channels in {width(operand), (width(operand) + 1) // 2}:
        bits = torch.arange(channels) >> torch.arange(channels.bit_length())[:, None] & 1 > 0
        codes = torch.cat([bits, ~bits])    # (B, channels): some row tells any two apart

        def value(other):
            own = channels if width(other) == width(operand) else width(other)
            x = torch.ones(len(codes), own, *other.meta["value"].shape[2:])
            if other is operand:
                x[codes] = torch.nan
            return x

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        try:
            if node.op == "call_method":
                made = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                made = (layer_of(network, node) or node.target)(*args, **kwargs)
            off = made.isnan().view(*codes.shape, -1).any(dim=2)
        except Exception:                   # it wants another number of channels
            return False
        if made.shape[:2] != codes.shape or not off.equal(codes):
            return False
    return True


def sources(network, node):
    """{operand: (C,) the channel of it that channel c of `node` is made of, or -1}; {} if unknown.

    Known is what works with fewer channels too: torch.cat, Select, norms, and what holds no weights
    and is found to be channelwise. Operands that are not named have one channel, for all.
    """
    layer = layer_of(network, node)
    operands = node.all_input_nodes
    own = torch.arange(width(node))
    if isinstance(layer, Select):
        return {operands[0]: layer.index.cpu()}
    if isinstance(layer, PerDomain) and node.target != network.classifier:
        return {operands[0]: own}
    if not node.op.startswith("call") or not all(width(one) for one in (node, *operands)):
        return {}
    if node.target is torch.cat:
        at = {}
        start = 0
        for operand in operands:
            inside = (own >= start) & (own < start + width(operand))
            at[operand] = torch.where(inside, own - start, -1)
            start += width(operand)
        dim = [*node.args[1:], *node.kwargs.values()]
        return at if dim == [1] and operands == list(node.args[0]) else {}
    if layer is not None and [*layer.parameters(), *layer.buffers()]:
        return {}
    same = [one for one in operands if width(one) == width(node) and channelwise(network, node, one)]
    if any(one not in same and width(one) > 1 for one in operands):
        return {}
    return dict.fromkeys(same, own)


def wanted(network, node, made, live, channels_read):
    """{operand: (K,) int64, the channels of it that `node` reads, in the order in which it does}.

    made: of `sources`; live: (C,) bool, the channels of `node` that anyone reads.
    """
    layer = layer_of(network, node)
    result = {operand: torch.arange(width(operand)) for operand in node.all_input_nodes}
    for operand, at in made.items():
        result[operand] = at[live][at[live] >= 0]
    if isinstance(layer, SwitchedConv2d):
        result[node.all_input_nodes[0]] = channels_read[node.target].nonzero().flatten()
    elif is_conv(layer) and layer.groups > 1:
        groups = live.view(layer.groups, -1).any(dim=1)
        each = layer.in_channels // layer.groups
        result[node.all_input_nodes[0]] = groups.repeat_interleave(each).nonzero().flatten()
    return result


def liveness(network, graph, channels_read):
    """({node: (C,) bool, its channels that anyone reads}, {node: what it reads, see wanted}, made).

    A node whose channels cannot be followed reads and keeps all of them: less is pruned, nothing is
    wrong. channels_read: {switched layer: (C_in,) bool}.
    """
    made = {node: sources(network, node) for node in graph.nodes}
    live = {node: torch.zeros(width(node), dtype=torch.bool) for node in graph.nodes}
    reads = {}
    for node in reversed(graph.nodes):
        layer = layer_of(network, node)
        if not made[node] and not is_conv(layer):
            live[node][:] = True
        if not live[node].any():
            live[node][:1] = True           # a layer that nobody reads keeps a channel
        if is_conv(layer) and layer.groups > 1:
            groups = live[node].view(layer.groups, -1)
            groups |= groups.any(dim=1, keepdim=True)       # whole groups go
        reads[node] = wanted(network, node, made[node], live[node], channels_read)
        for operand, channels in reads[node].items():
            live[operand][channels] = True
    for node in graph.nodes:                # one Select after torch.cat, not one for each operand
        if node.target is torch.cat and made[node]:
            live[node] = torch.cat([live[operand] for operand in made[node]])
            reads[node] = wanted(network, node, made[node], live[node], channels_read)
    return live, reads, made


@contextlib.contextmanager
def alone():
    """While no network runs in another thread: torch.fx changes nn.Module when it traces."""
    with LOCK:
        yield


@alone()
@torch.no_grad()
def cut(network, domains, channels_read):
    """(a copy of `network` for `domains` with the channels that are read, {norm: its rows left}).

    channels_read: {switched layer: (C_in,) bool}, of what `network` has now.
    """
    small = copy.deepcopy(network).eval()
    graph = trace(small)
    live, reads, made = liveness(small, graph, channels_read)
    device = next(network.parameters()).device
    rows = {}
    for node, operands in reads.items():
        layer = layer_of(small, node)
        for operand, channels in operands.items():
            left = live[operand].nonzero().flatten()
            if not torch.equal(channels, left):             # it reads less than there is
                select = free_name(small.backbone, "select")
                index = torch.searchsorted(left, channels).to(device)
                small.backbone.add_module(select, Select(index))
                with graph.inserting_before(node):
                    chosen = graph.call_module(select, (operand,))
                node.replace_input_with(operand, chosen)
        if isinstance(layer, Select):                       # of an earlier pruning
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            delattr(small.backbone, node.target)
        elif is_conv(layer):
            cut_conv(layer, next(iter(operands.values())), live[node])
        elif isinstance(layer, PerDomain) and made[node]:
            rows[node.target] = next(iter(operands.values()))
            for norm in layer.values():
                cut_norm(norm, rows[node.target])
    left = torch.cat([channels_read[name] for name in small.layers])
    for domain, row in small.switches.items():
        small.switches[domain] = nn.Parameter(row[left.to(device)], row.requires_grad)
    for name, kept in small.kept.items():
        kept[kept.clone()] = channels_read[name]
    for domain in set(small.classes) - set(domains):
        small.remove_domain(domain)
    small.backbone = Pruned(small.backbone, graph)
    small.pruned = True
    modes = {name: module.training for name, module in network.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, network.training)
    return small, rows


def cut_conv(conv, channels, live):
    """Keep the input channels (K,) and the filters that are live (C_out,), in place."""
    weight = conv.weight[live.to(conv.weight.device)]
    if conv.groups == 1:
        weight = weight[:, channels.to(weight.device)]
    conv.in_channels = len(channels)
    conv.out_channels = len(weight)
    conv.groups = len(channels) // weight.shape[1]
    conv.weight = nn.Parameter(weight.contiguous(), conv.weight.requires_grad)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias[live.to(weight.device)], conv.bias.requires_grad)


def cut_norm(norm, rows):
    """Keep these rows (K,) of all that a norm has for each channel, in place."""
    norm.num_features = len(rows)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.dim():                    # the number of batches has none
            tensor.data = tensor.data[rows.to(tensor.device)]


@alone()
def prune(network, domains=None, keep_source=False):
    """A smaller copy of `network` for `domains` (default: all adapted), with the same logits.

    Gone are the input channels that none of `domains` reads and the filters that nobody reads then,
    with their batch-norm and part of the residual stream. Where a layer reads less than there is, a
    Select gathers it. The forward is that of evaluation. The source is served no more, unless
    keep_source: all of it stays then. InputError if torch.fx cannot follow the forward, and, by the
    domain's name, if logits for random images differ.
    """
    domains = served(network, domains)
    if not set(domains) - {network.source}:
        raise InputError("nothing to prune: the network has no adapted domain, only a backbone")
    if keep_source:
        domains = served(network, [network.source, *domains])
    small, _ = cut(network, domains, channels_of(network, domains))
    before = copy.deepcopy(network).eval()
    after = copy.deepcopy(small).eval()
    size = 2, network.channels, network.image_size, network.image_size
    images = torch.randn(size, generator=torch.Generator("cpu")).to(next(network.parameters()))
    for domain in domains:
        logits = before(images, domain).detach()
        near = 3 * torch.finfo(logits.dtype).eps ** 0.5
        most = near * logits.abs().max().item()
        if not torch.allclose(after(images, domain), logits, near, most, equal_nan=True):
            raise InputError(f"{network.name}: {domain} has other logits when it is pruned")
    return small


def channels_of(network, domains):
    """{layer: (C_in,) bool}: which of the channels that are left any of `domains` reads."""
    result = {}
    for name, mask in masks(network, domains).items():
        if not mask.any(dim=1).all():
            raise InputError(f"a domain has no channel on in {name}: every layer needs one")
        result[name] = mask.any(dim=0)[network.kept[name]]
    return result


def without_unused(network, domains):
    """A function (x, domain) -> logits with which to train `network` once its switches stay.

    Logits, gradients and running statistics are those of `network`, without computing the channels
    that none of `domains` reads. Where torch.fx cannot follow the forward it is `network` itself.
    """
    try:
        small, rows = cut(network, domains, channels_of(network, domains))
    except InputError:
        return network
    small.train().requires_grad_(False)
    owned = {domain: [] for domain in domains}      # (name in small, tensor, the rows of it left)
    for name in small.owned:
        for domain in domains:
            prefix = f"backbone.{name}.{domain}."
            for key, value in network.layer(name)[domain].state_dict(keep_vars=True).items():
                at = rows[name].to(value.device) if value.dim() and name in rows else ...
                owned[domain].append((prefix + key, value, at))

    def forward(x, domain):
        own = {key: value[at] for key, value, at in owned[domain]}
        logits = torch.func.functional_call(small, own, (x, domain))
        for key, value, at in owned[domain]:
            if not isinstance(value, nn.Parameter):         # a running statistic
                value[at] = own[key]
        return logits

    return forward


# -------- 6  Files ----------------------------------------------------------------------------------

FORMAT = "ba2ps-4"      # of every checkpoint


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong inside is an InputError of one line that names `path`."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None


@contextlib.contextmanager
def writing(path):
    """Gives the name of a file beside `path`, which is moved there at the end: all or nothing."""
    part = f"{path}.{os.getpid()}.part"     # two processes may be at it
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # of torch's writer, on a full disk
        raise InputError(f"cannot write {path}: {one_line(error)}") from None
    finally:
        if os.path.isfile(part):
            os.remove(part)


def plain(fact):
    """`fact` as load can read it: numpy's numbers and arrays become Python's, paths strings."""
    if isinstance(fact, dict):
        return {key: plain(value) for key, value in fact.items()}
    if isinstance(fact, (list, tuple)):
        return type(fact)(map(plain, fact))
    if isinstance(fact, os.PathLike):
        return os.fspath(fact)
    if hasattr(fact, "tolist") and not isinstance(fact, torch.Tensor):
        return fact.tolist()
    return fact


def save(path, network, /, **facts):
    """Write `network` and `facts` (numbers, strings, lists, dicts, tensors) to `path`: all or nothing.

    The file is a dictionary: "state", a state_dict by name, "kept", {layer: (C,) bool, the channels
    that pruning left}, "facts", and what load builds the network from. It is read back before it is
    moved to `path`; InputError if that fails.
    """
    state = network.state_dict()                    # with the versions of modules that it holds
    for name, value in state.items():
        if isinstance(value, torch.Tensor):         # not what a module adds by get_extra_state
            state[name] = value.detach().cpu()
    content = {"format": FORMAT, "name": network.name, "options": network.options,
               "image_size": network.image_size, "source": network.source,
               "classes": network.classes, "pruned": network.pruned, "kept": network.kept,
               "state": state, "facts": plain(facts)}
    with writing(path) as part:
        try:
            torch.save(content, part)
            torch.load(part, weights_only=True)
        except (AttributeError, TypeError, pickle.PickleError) as error:
            raise InputError(f"{path}: facts that load cannot read: {one_line(error)}") from None


def build(name, options=None, num_classes=1):
    """A backbone by its name: WRN-DEPTH-WIDTH, or torchvision's, with options of get_model."""
    if name.startswith("WRN-"):
        _, depth, width = name.split("-")
        return WideResNet(int(depth), int(width), num_classes)
    if options is None:
        raise InputError(f"holds a {name} of one's own: load(path, backbone={name}(...))")
    from torchvision.models import get_model
    return get_model(name, weights=None, **options)


def load(path, backbone=None):
    """(network, facts) of a checkpoint that save wrote, on the CPU; InputError for anything else.

    backbone: the plain network that MultiDomain was given, of any weights; not needed for WideResNet
    and for those of torchvision that train.py makes. No code in the file is run, its checksums are
    compared. A pruned network is an empty one, pruned to the same channels and filled.
    """
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.get("format") != FORMAT:
            raise ValueError("no checkpoint of this version: give one of train.py or prune.py")
        name, source, classes = content["name"], content["source"], content["classes"]
        backbone = backbone or build(name, content["options"], classes.get(source, 1))
        network = MultiDomain(backbone, {}, source, content["image_size"])
        network.name = name
        network.options = content["options"]
        for domain, number in classes.items():
            if domain != source:
                network.add_domain(domain, number)
        if content["pruned"]:
            network, _ = cut(network, list(classes), content["kept"])
        elif source not in classes:
            network.remove_domain(source)
        network.load_state_dict(content["state"], assign=True)
        for key, parameter in network.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{key} holds numbers that are not finite")
        return network, content["facts"]
