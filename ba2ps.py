# SPDX-License-Identifier: MIT
"""Budget-aware adapters with parameter sharing: one frozen network, many domains, a budget each.

The whole method in one file that needs only torch. Copy it, or the section that you want.

    x --> batch-norm of d --> ReLU --> times s_d --> convolution, shared and frozen --> ...

    L_total = L + max(0, lambda_d (mean(s_d) - beta))                           L_B, Eq. 4
                + max(0, lambda_PS (1 - |s_1 & ... & s_N| / (M beta)))          L_PS, Eq. 5

    theta_d     network.switches[domain]    (M,) reals, one per switched input channel
    s_d         binarize(theta_d)           (M,) 1 where theta_d > 0: the channel is read   Eq. 3
    N, M        s.shape                     the number of domains, of switches
    beta        budget                      the share that a domain may have on
    lambda_d    multiplier[domain]          rises while a domain is over its budget
    lambda_PS   sharing                     weight of the sharing loss
    L           cross_entropy               in the training loop, see train.py

  [1] dos Santos et al., Parameter Sharing in Budget-Aware Adapters for Multi-Domain Learning, 2022
  [2] Berriel et al., Budget-Aware Adapters for Multi-Domain Learning (BA2), 2019
  [3] Zagoruyko and Komodakis, Wide Residual Networks, 2016
  [4] Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013
  [5] Molchanov et al., Importance Estimation for Neural Network Pruning, 2019

Equations and tables are those of [1]; Eq. 6, the score S, is in evaluate.py. This file does not
train, read images or print. Grouped convolutions and linear layers get no switches.
"""
import contextlib
import copy
import os
import pickle
import zipfile

import torch
import torch.fx as fx

# -------- 1  Layers: straight-through estimator, switched convolution, a module for each domain ---

nn = torch.nn            # here, so that sections 1 to 3 run under `import copy` and `import torch`
F = torch.nn.functional


class InputError(ValueError):
    """What the user gave cannot be used: one line that says what, and what to do."""


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
    """conv2d(s * x, W), Eq. 2 and 3, for binary s (C_in,) and a frozen W; s * x is not kept."""

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
        wanted = (True, False, False)                   # of x, W, bias: the gradient of x alone
        grad = torch.ops.aten.convolution_backward(     # dL/d(s x), as if every channel were on
            grad, x, weight, None, *ctx.geometry, False, (0, 0), 1, wanted)[0]
        s_grad = None
        if ctx.needs_input_grad[1]:
            dtype = torch.promote_types(x.dtype, torch.float32)
            s_grad = (x * grad).sum((0, 2, 3), dtype=dtype)
        return grad.mul_(s.view(-1, 1, 1)), s_grad, None, None, None, None, None


class SwitchedConv2d(nn.Conv2d):
    """nn.Conv2d that reads only the input channels that are on (Eq. 3)."""

    switches = None     # (C_in,) real numbers, set before forward; None: every channel is read

    def forward(self, x):
        if self.switches is None:
            return super().forward(x)
        s = binarize(self.switches)         # binary in training too
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        zeros = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if trained or not zeros or self.groups > 1 or x.dim() < 4:
            return super().forward(x * s.to(x.dtype).view(-1, 1, 1))     # Eq. 3 as it stands
        geometry = self.stride, self.padding, self.dilation
        return SwitchedConvolution.apply(x, s, self.weight, self.bias, *geometry)


class PerDomain(nn.ModuleDict):
    """{domain: module}. forward runs that of `domain`, which is set before."""

    domain = None

    def forward(self, *inputs):
        if self.domain is None:
            raise InputError("no domain is set: call (or checkpoint) network(images, domain)")
        return self[self.domain](*inputs)


# -------- 2  Networks: a plain WRN-28, and MultiDomain, which adapts any network (Eq. 1) ----------

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
    """WRN-depth-widen_factor [3]; WRN-28-4 is the paper's backbone.

    Three groups of (depth - 4) / 6 blocks. Each halves the resolution; in [3] the first does not.
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
NORMS = nn.modules.batchnorm._NormBase      # batch or instance norm, maybe with statistics


class MultiDomain(nn.Module):
    """A frozen network that serves many domains, and what each of them owns (Eq. 1).

    backbone: a plain, trained network, (B, C, S, S) -> (B, classes), which is copied. nn.Conv2d
    become SwitchedConv2d, except those with as many input channels as the image; batch-norms and
    the last nn.Linear become PerDomain; the rest is shared, and its own forward runs.
    domains: {name: number of classes}. source: the backbone's own domain, without switches.

    switches: {domain: (M,) parameter}: one switch per input channel, layer after layer.
    layers: names of the SwitchedConv2d, in that order. owned: names of the PerDomain, `classifier`
    among them. kept: {layer: (C_in,) bool}, what pruning left. channels: C; image_size: S.

    InputError for a convolution or norm called twice or never, and for what is shared but changes
    in training. One thread runs at a time.
    """

    def __init__(self, backbone, domains={}, source="imagenet", image_size=224):
        super().__init__()
        check_name(source)
        self.name = str(vars(backbone).get("name", type(backbone).__name__))
        self.options = None                 # torchvision's get_model builds the backbone from it
        self.source = source
        self.image_size = image_size
        self.pruned = False
        self.training = backbone.training
        self.backbone = copy.deepcopy(backbone)
        keep_tensors(self.backbone)
        called, self.channels = layers_called(self.backbone, self.name, image_size)
        self.classifier = called[-1]
        self.whole = {}                     # {shared parameter: its size before pruning}
        self.norm_channels = 0
        for name in called[:-1]:
            if isinstance(self.layer(name), NORMS):
                self.norm_channels += self.layer(name).num_features
                continue
            for key, parameter in self.layer(name).named_parameters(recurse=False):
                self.whole[f"{name}.{key}".lstrip(".")] = parameter.numel()
        self.give_parts([self.layer(name) for name in called])
        self.owned = []
        self.kept = {}
        for name, module in self.backbone.named_modules():
            if isinstance(module, PerDomain):
                self.owned.append(name)
            elif isinstance(module, SwitchedConv2d):
                self.kept[name] = torch.ones(module.in_channels, dtype=torch.bool, device="cpu")
        self.layers = list(self.kept)
        if not self.layers:
            raise InputError(f"{self.name} has no nn.Conv2d that reads another layer's channels")
        self.switches = nn.ParameterDict()
        for domain, number in domains.items():
            self.add_domain(domain, number)

    def give_parts(self, called):
        """Turn layers into SwitchedConv2d and PerDomain, in place."""
        convs = [layer for layer in called if isinstance(layer, nn.Conv2d)]
        names = list(self.backbone.named_modules(remove_duplicate=False))
        for layer in called:
            if isinstance(layer, NORMS) or layer is called[-1]:
                part = PerDomain({self.source: layer})
                part.training = layer.training
                for name, module in names:  # it may have several
                    if module is layer:
                        self.backbone.set_submodule(name, part)
            elif is_conv(layer) and layer.groups == 1:
                if layer.in_channels != convs[0].in_channels:       # the first one reads the image
                    layer.__class__ = SwitchedConv2d

    def layer(self, name):
        module = self.backbone
        for part in name.split(".") if name else ():
            module = module._modules[part]          # get_submodule takes ten times as long
        return module

    def parts(self):
        return [self.layer(name) for name in self.owned]

    @property
    def classes(self):
        """{domain: number of classes}, the source's too."""
        linears = self.layer(self.classifier)
        return {domain: linear.out_features for domain, linear in linears.items()}

    @property
    def domains(self):
        return [domain for domain in self.classes if domain != self.source]

    def add_domain(self, domain, num_classes):
        """Switches at 1e-3, a new classifier, copies of the first domain's batch-norms."""
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
        """Of the batch-norms and classifiers of `domains` (default: all adapted)."""
        result = []
        for domain in served(self, domains):
            for part in self.parts():
                result.extend(part[domain].parameters())
        return result

    def freeze_backbone(self):
        """Train only what the adapted domains own."""
        self.requires_grad_(False)
        for parameter in (*self.switches.values(), *self.owned_parameters()):
            parameter.requires_grad_(True)

    def __call__(self, images, domain):
        if torch.compiler.is_compiling():
            return super().__call__(images, domain)
        with LOCK:                          # layers hold one domain at a time
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
            for layer in layers:            # deepcopy refuses tensors with a graph
                layer.switches = None
        return logits if isinstance(logits, torch.Tensor) else logits[0]    # no auxiliary logits


def served(network, domains=None):
    """`domains` as a list (default: all adapted); InputError unless all of them are served."""
    domains = network.domains if domains is None else domains
    if isinstance(domains, str) or not set(domains) <= set(network.classes):
        raise InputError(f"{domains!r} is no list of domains out of {', '.join(network.classes)}")
    return list(domains)


def switched_layers(network):
    """{name: SwitchedConv2d}, in the order of a row of switches."""
    return {name: network.layer(name) for name in network.layers}


def widths(network):
    """The number of switches of each layer: row.split(widths(network))."""
    return [layer.in_channels for layer in switched_layers(network).values()]


def check_name(domain):
    """InputError unless `domain` can name a part of a torch module."""
    taken = hasattr(PerDomain(), str(domain)) or hasattr(nn.ParameterDict(), str(domain))
    if taken or not domain or not isinstance(domain, str) or "." in domain:
        raise InputError(f"{domain!r} cannot name a part of a torch module: rename the domain")


def is_conv(layer):
    """Whether it is a plain convolution, not a subclass or parametrized."""
    plain = type(layer) in (nn.Conv2d, SwitchedConv2d)
    return plain and isinstance(layer.weight, nn.Parameter)


def keep_tensors(backbone):
    """Make plain tensors of modules buffers, so they move and are saved."""
    for module in backbone.modules():
        for name, value in [*vars(module).items(), *module.named_buffers(recurse=False)]:
            if type(value) is torch.Tensor:
                vars(module).pop(name, None)
                module.register_buffer(name, value)


@torch.no_grad()
def layers_called(backbone, name, image_size):
    """([names of the modules as evaluation calls them, the linear layer of the logits last],
    channels of the images): from a run of a copy in each mode."""
    sizes = [layer.in_channels for layer in backbone.modules() if isinstance(layer, nn.Conv2d)]
    channels = 1 if 1 in sizes and 3 not in sizes else 3
    images = torch.rand(2, channels, image_size, image_size, generator=torch.Generator("cpu"))
    images = images.to(next(backbone.parameters()))
    trial = copy.deepcopy(backbone)
    order = []
    for key, module in trial.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, key=key: order.append(key))
    try:
        with torch.random.fork_rng():       # the caller's random numbers stay the same
            trial.train()(images)
            trained = set(order)
            order.clear()
            logits = trial.eval()(images)
    except Exception as error:
        raise InputError(f"{name} cannot run on {image_size} pixels: {one_line(error)}") from None
    modules = dict(backbone.named_modules())
    kinds = [key for key in modules if isinstance(modules[key], (nn.Conv2d, NORMS))]
    last = [key for key in order if isinstance(modules[key], nn.Linear)][-1:]
    if not last or getattr(logits, "shape", None) != (2, modules[last[0]].out_features):
        raise InputError(f"{name} needs an nn.Linear at its end that makes its output, logits")
    for key in kinds + last:
        if order.count(key) > 1:
            raise InputError(f"{name}: {key} is called twice: use a layer for each call")
        if key not in trained.union(order):
            raise InputError(f"{name}: {key} is never called: take it out of the network")
    after = dict(trial.named_buffers())
    for key, value in backbone.named_buffers():
        if key.rpartition(".")[0] not in kinds and not torch.equal(value, after[key]):
            raise InputError(f"{name}: {key} changes in training, but all domains share it")
    order.remove(last[0])
    return order + last, channels


def one_line(error):
    words = " ".join(str(error).replace("\x1b[1m", "").replace("\x1b[0m", "").split())
    return f"{type(error).__name__}: {words:.300}"


# -------- 3  The losses (Eq. 4, 5), the multiplier's step, floor, start and budget of switches ----

def binarized(network, moving=None):
    """s, (N, M): the binary switches of all domains.

    moving: the domains that get a gradient, by default all; a gradient of 0 would not do, since
    Adam's momentum moves on.
    """
    rows = []
    for domain in network.domains:
        row = network.switches[domain]
        rows.append(row if moving is None or domain in moving else row.detach())
    return binarize(torch.stack(rows))


def budget_loss(usage, budget, multiplier):
    """L_B = max(0, lambda_d (usage - beta)) of one domain (Eq. 4); usage: e.g. mean(s_d)."""
    return F.relu(multiplier * (usage - budget))


def sharing_loss(s, budget, form="intersection"):
    """L_PS / lambda_PS for s (N, M), binary, of all domains: max(0, ...) of

        intersection    1 - |s_1 & ... & s_N| / (M beta)                (Eq. 5)
        union           |s_1 or ... or s_N| / (M beta) - 1              (our reading of the journal
        jaccard         1 - |s_1 & ... & s_N| / |s_1 or ... or s_N|     version, arXiv 2309.11464)
    """
    both = s.prod(dim=0).sum()
    either = (1 - (1 - s).prod(dim=0)).sum()
    most = s.shape[1] * budget
    if form == "union":
        return F.relu(either / most - 1)
    if form == "jaccard":
        return F.relu(1 - both / either)
    if form == "intersection":
        return F.relu(1 - both / most)
    raise InputError(f"sharing loss of form {form!r}: give intersection, union or jaccard")


def next_multiplier(multiplier, usage, budget, rate=0.3):
    """max(0, lambda_d + rate (usage - beta)), for the next step (section 3.1).

    If it rises fast, the budget loss outweighs the cross-entropy and all switches go off together.
    """
    usage = usage.item() if isinstance(usage, torch.Tensor) else usage
    return max(0.0, multiplier + rate * (usage - budget))


@torch.no_grad()
def keep_a_channel(network, domains):
    """Where a domain has no channel on in a layer, switch its strongest one on."""
    rows = torch.stack([network.switches[domain] for domain in domains])                 # (N, M)
    strongest = [part.amax(dim=1) for part in rows.split(widths(network), dim=1)]
    for n, layer in (torch.stack(strongest, dim=1) <= 0).nonzero().tolist():
        part = network.switches[domains[n]].split(widths(network))[layer]
        part[part.argmax()] = 1e-6


def ranked(network, value, even=0.0):
    """(M,) positions, highest `value` first, after the best of each layer: this share, or one."""
    first = torch.zeros(len(value), dtype=torch.bool)
    for layer, part in zip(value.split(widths(network)), first.split(widths(network))):
        part[layer.topk(max(1, int(even * len(layer)))).indices] = True
    order = value.argsort(descending=True)
    return torch.cat([order[first[order]], order[~first[order]]])


def pooled(network, importance, room, even=0.0):
    """(M,) bool: a pool of channels, those worth most per parameter, that fits into `room`.

    importance: (M,), summed over domains; room: share of the backbone's parameters; even: see
    start_switches.
    """
    cost, fixed = costs(network, "params")
    order = ranked(network, importance / cost, even)
    pool = torch.zeros(len(cost), dtype=torch.bool)
    pool[order[cost[order].cumsum(0) <= room - fixed + 1e-9]] = True
    return pool


@torch.no_grad()
def start_switches(network, domain, importance, cost, room, spread=1e-1, even=0.0):
    """Start the switches of `domain` in the order of importance per cost, before the search.

    They fall evenly from `spread` to -spread; as many are positive as fit into `room`, first the
    best of each layer: a share `even` of its channels, or one. importance: (M,), the mean square of
    a switch's gradient [5]; cost: (M,), see costs; room: budget - fixed (see costs), enough for a
    channel in each layer.
    """
    order = ranked(network, importance / cost, even)
    number = int((cost[order].cumsum(0) <= room + 1e-9).sum())
    on = torch.linspace(spread, 0, number + 1)[:-1]
    off = torch.linspace(0, -spread, len(order) - number + 1)[1:]
    row = network.switches[domain]
    row[order] = torch.cat([on, off]).to(row)


@torch.no_grad()
def hold_budget(network, domain, cost, room):
    """Turn the lowest switches of `domain` off until the rest fits into `room`."""
    row = network.switches[domain]
    value = torch.where(row > 0, row, -torch.inf).to("cpu", torch.double)
    order = ranked(network, value)
    over = order[cost[order].cumsum(0) > room + 1e-9]
    row[over[value[over] > 0]] = 0


# -------- 4  Cost relative to the backbone, from masks and a table; batch-norm statistics -------

BUDGETS = ("layers", "channels", "macs", "params")


def read(network, *domains):
    """(M,) bool, on the CPU: which channels any of `domains` reads; the source reads all."""
    on = torch.zeros(sum(widths(network)), dtype=torch.bool)
    for domain in domains:
        if domain in network.switches:
            on |= network.switches[domain].detach().cpu() > 0
        else:
            on[:] = True
    return on


def masks(network, domains=None):
    """{layer: (N, C) bool, on the CPU}: which of the backbone's input channels `domains` read."""
    domains = served(network, domains)
    result = {}
    for name, kept in network.kept.items():
        result[name] = torch.zeros(len(domains), len(kept), dtype=torch.bool)
    for n, domain in enumerate(domains):
        for name, row in zip(network.layers, read(network, domain).split(widths(network))):
            result[name][n, network.kept[name]] = row
    return result


def channels_of(network, domains):
    """{layer: (C_in,) bool}: which of its channels any of `domains` reads."""
    for domain in domains:
        for name, on in zip(network.layers, read(network, domain).split(widths(network))):
            if not on.any():
                raise InputError(f"{domain} has no channel on in {name}: every layer needs one")
    return dict(zip(network.layers, read(network, *domains).split(widths(network))))


def table(network, image_size=None):
    """{shared layer: number of weights before pruning}; with image_size MACs per crop (THOP)."""
    whole = {name.removesuffix(".weight"): number for name, number in network.whole.items()}
    if image_size is None:
        return whole
    from thop import profile                                    # needs setuptools on Python 3.12
    from thop.vision.basic_hooks import count_convNd, count_linear
    network = copy.deepcopy(network)                            # THOP leaves buffers in it
    names = {module: name for name, module in network.backbone.named_modules()}
    operations = {}

    def count(layer, inputs, output):
        name = names[layer]
        if name in whole:                                       # a classifier is not
            rule = count_linear if isinstance(layer, nn.Linear) else count_convNd
            rule(layer, inputs, output)
            operations[name] = whole[name] * int(layer.total_ops) // layer.weight.numel()

    images = torch.zeros(1, network.channels, image_size, image_size)
    crop = images.to(next(network.parameters())), next(iter(network.classes))
    kinds = SwitchedConv2d, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear
    profile(network, crop, dict.fromkeys(kinds, count), verbose=False)      # by exact type
    return operations


def costs(network, of="layers", image_size=None):
    """(cost of each switch, (M,) float64; cost without a switch). They add up to 1 unpruned.

    of: layers, the paper's, 1 / (number of layers * C): usage is 1 - the sparsity of Table 7;
    channels, 1 / M; macs, params: a channel's share of those of the shared layers.
    """
    if of not in BUDGETS:
        raise InputError(f"budget of {of!r}: choose among {', '.join(BUDGETS)}")
    if of == "macs":
        whole = table(network, image_size or network.image_size)
    elif of == "params":
        whole = table(network)
    else:
        whole = {name: len(kept) if of == "channels" else 1 for name, kept in network.kept.items()}
    total = sum(whole.values())
    cost = []
    for name, kept in network.kept.items():
        each = whole[name] / total / len(kept)
        cost.append(torch.full((int(kept.sum()),), each, dtype=torch.double))
    governed = sum(whole[name] for name in network.layers)
    return torch.cat(cost), (total - governed) / total


def share(network, domains=None, of="layers", image_size=None):
    """Share of the backbone that any of `domains` reads; of: see costs."""
    cost, fixed = costs(network, of, image_size)
    return fixed + float(cost @ read(network, *served(network, domains)).double())


def usage(network, of="layers", image_size=None, domains=None):
    """{domain: share of the backbone that it reads}, to compare with the budget."""
    cost, fixed = costs(network, of, image_size)
    domains = served(network, domains)
    return {domain: fixed + float(cost @ read(network, domain).double()) for domain in domains}


def sparsity(network, domains=None):
    """({domain: share off}, share off in all): means over layers, as in Table 7."""
    off = {domain: max(0.0, 1 - use) for domain, use in usage(network, domains=domains).items()}
    return off, max(0.0, 1 - share(network, domains))


def params(network, domains=None):
    """Memory that `domains` need, relative to the shared layers (Table 2).

    Weights that any of them reads and four numbers per batch-norm channel and domain, of 32 bits; 1
    bit a switch; no classifiers.
    """
    domains = served(network, domains) or [network.source]
    adapted = set(domains) - {network.source}
    bits = int(read(network, *domains).sum()) * len(adapted)
    own = 4 * network.norm_channels * len(domains) + bits / 32
    return share(network, domains, "params") + own / sum(network.whole.values())


def macs(network, domains=None, image_size=None):
    """Multiply-accumulates of the shared layers for one crop, with every filter, as in the paper.

    domains: with the channels that they read; None: of the backbone.
    """
    operations = table(network, image_size or network.image_size)
    if domains is not None:
        on = read(network, *served(network, domains)).split(widths(network))
        for name, part in zip(network.layers, on):
            operations[name] *= int(part.sum()) / len(network.kept[name])
    return round(sum(operations.values()))


@torch.no_grad()
def reestimate_batch_norm(network, domain, batches):
    """Set the running statistics of `domain` to their mean over `batches` of (images, labels).

    The old ones fit other switches (EagleEye, ECCV 2020).
    """
    served(network, [domain])
    trial = copy.deepcopy(network).train()          # an exception leaves `network` as it was
    for part in trial.parts():
        if isinstance(part[domain], nn.modules.batchnorm._BatchNorm):
            part[domain].reset_running_stats()
            part[domain].momentum = None            # torch's cumulative average
    done = 0
    for done, (images, _) in enumerate(batches, 1):
        trial(images, domain)
    if not done:
        raise InputError(f"no batch of {domain} to re-estimate its batch-norm from")
    for part, measured in zip(network.parts(), trial.parts()):
        part[domain].load_state_dict(measured[domain].state_dict())


# -------- 5  Pruning: who reads which channel, from the last layer to the first --------------

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


class Code:
    """The function that torch.fx writes for a graph; copies and pickles compile it anew."""

    def __init__(self, source, names):
        self.source = source
        self.names = {}
        for name, value in names.items():
            if not isinstance(value, type(torch)):  # modules cannot be copied
                self.names[name] = value
        scope = {"torch": torch, **self.names}
        exec(self.source, scope)
        self.function = scope["forward"]

    def __reduce__(self):
        return Code, (self.source, self.names)


class Pruned(nn.Module):
    """A pruned backbone, whose forward is the code of a graph."""

    def forward(self, images):
        return self._pruned.function(self, images)


class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        own = isinstance(module, (SwitchedConv2d, PerDomain, Select))
        bare = not [*module.children(), *module.parameters(), *module.buffers()]
        return own or bare or super().is_leaf_module(module, name)

    def create_arg(self, value):
        if type(value) is torch.Tensor and all(value is not one for one in self.root.buffers()):
            self.root.register_buffer(free_name(self.root, "constant"), value)     # in forward
        return super().create_arg(value)


class Recorder(fx.Interpreter):
    """Keeps in node.meta a node's value, and the operands it writes to."""

    def run_node(self, node):
        before = {}
        for operand in node.all_input_nodes:
            before[operand] = getattr(self.env[operand], "_version", 0)
        node.meta["value"] = super().run_node(node)
        node.meta["written"] = []
        for operand, version in before.items():
            if getattr(self.env[operand], "_version", 0) > version:
                node.meta["written"].append(operand)
        return node.meta["value"]


@torch.no_grad()
def trace(network):
    """The graph of the backbone's forward, run once; InputError if torch.fx cannot follow it.

    A node that writes to a tensor read later gets a copy: a Select may come between.
    """
    size = 2, network.channels, network.image_size, network.image_size
    try:
        graph = Tracer().trace(network.backbone)
        for part in network.parts():
            part.domain = next(iter(part))
        Recorder(network.backbone, graph=graph).run(next(network.parameters()).new_zeros(size))
    except Exception as error:
        raise InputError(f"torch.fx cannot follow {network.name}: {one_line(error)}") from None
    finally:
        for part in network.parts():
            part.domain = None
    nodes = list(graph.nodes)
    for number, node in enumerate(nodes):
        for operand in node.meta["written"]:
            later = set(operand.users).intersection(nodes[number + 1:])
            if later:
                with graph.inserting_before(node):
                    clone = graph.call_method("clone", (operand,))
                clone.meta["value"] = operand.meta["value"]
                node.replace_input_with(operand, clone)
                operand.replace_all_uses_with(node, lambda user: user in later)
    return graph


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


def positions(mask):
    return mask.nonzero().flatten()


def concatenates(node):
    dim = [*node.args[1:], *node.kwargs.values()]
    return node.target is torch.cat and dim == [1] and node.all_input_nodes == list(node.args[0])


def channelwise(network, node, operand):
    """Whether `node` has no weights and its channel c depends on channel c of `operand` alone.

    Tested with half as many channels, NaN in some: NaN must stay in those.
    """
    layer = layer_of(network, node)
    if node.op == "output" or layer is not None and [*layer.parameters(), *layer.buffers()]:
        return False
    if width(node) != width(operand) or not all(map(width, node.all_input_nodes)):
        return False
    channels = (width(operand) + 1) // 2
    bits = torch.arange(channels) >> torch.arange(channels.bit_length())[:, None] & 1 > 0
    codes = torch.cat([bits, ~bits])        # (B, channels): some row tells any two apart
    if len(codes) == channels:
        codes = torch.cat([codes, codes])   # or a parameter of (C, 1, 1) would fit the batch
    trial = fx.Interpreter(network.backbone, garbage_collect_values=False, graph=node.graph)
    for other in node.all_input_nodes:
        own = channels if width(other) == width(operand) else width(other)
        trial.env[other] = torch.ones(len(codes), own, *other.meta["value"].shape[2:])
    trial.env[operand][codes] = torch.nan
    try:
        made = trial.run_node(node)
        off = made.isnan().view(*codes.shape, -1).any(dim=2)
    except Exception:                       # it wants another number of channels
        return False
    return made.shape[:2] == codes.shape and off.equal(codes)


def reads(network, node, live, channels_read):
    """{operand: (K,) int64, the channels of it that `node` reads to make its `live` (C,) ones}.

    Sets more of `live` where channels only go together. A node that cannot be followed reads and
    makes all channels: less is pruned, nothing is wrong.
    """
    layer = layer_of(network, node)
    operands = node.all_input_nodes
    everything = {operand: torch.arange(width(operand)) for operand in operands}
    if not live.any():
        live[:1] = True                     # what nobody reads keeps a channel
    if isinstance(layer, SwitchedConv2d):
        return {operands[0]: positions(channels_read[node.target])}
    if is_conv(layer) and layer.groups == 1:
        return everything                   # it reads the image
    if is_conv(layer):
        groups = live.view(layer.groups, -1)
        groups |= groups.any(dim=1, keepdim=True)           # whole groups go
        each = layer.in_channels // layer.groups
        return {operands[0]: positions(groups[:, 0].repeat_interleave(each))}
    if isinstance(layer, Select):
        return {operands[0]: layer.index.cpu()[live]}
    if isinstance(layer, PerDomain) and node.target != network.classifier:
        return {operands[0]: positions(live)}
    if concatenates(node):
        parts = live.split([width(operand) for operand in operands])
        return dict(zip(operands, map(positions, parts)))
    same = [operand for operand in operands if channelwise(network, node, operand)]
    if same and all(operand in same or width(operand) == 1 for operand in operands):
        return everything | dict.fromkeys(same, positions(live))
    live[:] = True
    return everything


def liveness(network, graph, channels_read):
    """({node: (C,) bool, channels that are read}, {node: reads(node)})."""
    live = {node: torch.zeros(width(node), dtype=torch.bool) for node in graph.nodes}
    read_by = {}
    for node in reversed(graph.nodes):
        read_by[node] = reads(network, node, live[node], channels_read)
        for operand, channels in read_by[node].items():
            live[operand][channels] = True
    for node in graph.nodes:                # one Select after torch.cat, not one for each operand
        if concatenates(node):
            live[node] = torch.cat([live[operand] for operand in node.args[0]])
            read_by[node] = {operand: positions(live[operand]) for operand in node.args[0]}
    return live, read_by


@contextlib.contextmanager
def alone():
    """No other thread runs a network: torch.fx patches nn.Module while it traces."""
    with LOCK:
        yield


@alone()
@torch.no_grad()
def cut(network, domains, channels_read):
    """(a cut copy for `domains`, {norm: rows left}); channels_read: as channels_of gives it."""
    small = copy.deepcopy(network).eval()
    graph = trace(small)
    live, read_by = liveness(small, graph, channels_read)
    device = next(network.parameters()).device
    rows = {}
    for node, operands in read_by.items():
        layer = layer_of(small, node)
        for operand, channels in operands.items():
            left = positions(live[operand])
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
        elif isinstance(layer, PerDomain) and node.target != small.classifier:
            rows[node.target] = next(iter(operands.values()))
            for norm in layer.values():
                cut_norm(norm, rows[node.target])
    left = torch.cat([channels_read[name] for name in small.layers])
    for domain, row in small.switches.items():
        small.switches[domain] = nn.Parameter(row[left], row.requires_grad)
    for name, kept in small.kept.items():
        kept[kept.clone()] = channels_read[name]
    for domain in set(small.classes) - set(domains):
        small.remove_domain(domain)
    code = graph.python_code("self")
    small.backbone.__class__ = Pruned
    small.backbone._pruned = Code(code.src, code.globals)
    small.pruned = True
    modes = {name: module.training for name, module in network.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, network.training)
    return small, rows


def cut_conv(conv, channels, live):
    """Keep the input channels (K,) and the filters that are live, (C_out,) bool."""
    weight = conv.weight[live]
    if conv.groups == 1:
        weight = weight[:, channels]
    conv.in_channels = len(channels)
    conv.out_channels = len(weight)
    conv.groups = len(channels) // weight.shape[1]
    conv.weight = nn.Parameter(weight.contiguous(), conv.weight.requires_grad)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias[live], conv.bias.requires_grad)


def cut_norm(norm, rows):
    """Keep the channels `rows` (K,)."""
    norm.num_features = len(rows)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.dim():                    # num_batches_tracked has none
            tensor.data = tensor.data[rows]


@alone()
def prune(network, domains=None, keep_source=False):
    """A smaller copy of `network` for `domains` (default: all adapted), with the same logits.

    Without the channels that none of them reads, for evaluation. keep_source: all of the source
    stays. InputError if torch.fx cannot follow the forward or the logits of random images differ.
    """
    domains = served(network, domains)
    if not set(domains) - {network.source}:
        raise InputError("nothing to prune: give a domain that is not the source")
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


def without_unused(network, domains):
    """A function (x, domain) -> logits, to train `network` once its switches are fixed.

    It skips channels that no domain reads; `network` itself if torch.fx cannot follow it.
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


# -------- 6  Files --------------------------------------------------------------------------------

FORMAT = "ba2ps-4"      # of every checkpoint


@contextlib.contextmanager
def reading(path):
    """Turn any exception inside into a one-line InputError that names `path`."""
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
    """Yield a temporary name that is moved to `path` at the end: all or nothing."""
    part = f"{path}.{os.getpid()}.part"     # two processes may write
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # of torch's writer, on a full disk
        raise InputError(f"cannot write {path}: {one_line(error)}") from None
    finally:
        if os.path.isfile(part):
            os.remove(part)


def plain(fact):
    """`fact` as load can read it: numpy to Python, paths to strings."""
    if isinstance(fact, dict):
        return {key: plain(value) for key, value in fact.items()}
    if isinstance(fact, (list, tuple)):
        parts = [plain(part) for part in fact]
        return parts if isinstance(fact, list) else tuple(parts)
    if isinstance(fact, os.PathLike):
        return os.fspath(fact)
    if hasattr(fact, "tolist") and not isinstance(fact, torch.Tensor):
        return fact.tolist()
    return fact


def save(path, network, /, **facts):
    """Write `network` and `facts` (numbers, strings, lists, dicts, tensors) to `path`.

    All or nothing: InputError if load could not read it. The file is a dictionary with a state_dict
    in "state" and what load builds the network from.
    """
    state = network.state_dict()                    # with its modules' version metadata
    for name, value in state.items():
        if isinstance(value, torch.Tensor):         # not what a module adds by get_extra_state
            state[name] = value.detach().cpu().contiguous()     # the format decides on last bits
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
    """A backbone by its name: WRN-DEPTH-WIDTH, or torchvision's, with options for get_model."""
    if name.startswith("WRN-"):
        _, depth, width = name.split("-")
        return WideResNet(int(depth), int(width), num_classes)
    if options is None:
        raise InputError(f"holds your own {name}: load(path, backbone={name}(...))")
    from torchvision.models import get_model
    return get_model(name, weights=None, **options)


def load(path, backbone=None):
    """(network, facts) of a checkpoint that save wrote, on the CPU; InputError for anything else.

    backbone: the plain network that MultiDomain was given, of any weights; not needed for what
    train.py makes.
    """
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.get("format") != FORMAT:
            raise ValueError("no checkpoint of this version: give one of train.py or prune.py")
        source = content["source"]
        domains = dict(content["classes"])
        number = domains.pop(source, None)
        backbone = backbone or build(content["name"], content["options"], number or 1)
        network = MultiDomain(backbone, domains, source, content["image_size"])
        network.name = content["name"]
        network.options = content["options"]
        if content["pruned"]:
            network, _ = cut(network, list(content["classes"]), content["kept"])
        elif number is None:
            network.remove_domain(source)
        network.load_state_dict(content["state"], assign=True)
        for key, parameter in network.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{key} holds numbers that are not finite")
        return network, content["facts"]
