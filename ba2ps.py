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
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

FORMAT = "ba2ps-1"  # first entry of every checkpoint; raised when an old one can no longer be read


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that names it and says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# the switch and the layers a domain owns a part of

class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, switches):
        return (switches > 0).to(switches.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad  # straight through, also where the switch is off: that is how a channel comes back


def binarize(switches):
    """1[s > 0] forward, identity backward (the straight-through estimator of [4]), also for switches that are off.

    Any shape and float dtype; exactly 0 is off.
    """
    return _Binarize.apply(switches)


class SwitchedConv2d(nn.Conv2d):
    """A frozen convolution in which every domain switches input channels on and off (Eq. 3 of the paper).

    Takes nn.Conv2d's arguments (groups=1 only) and `domains`, the names to start with. forward(x, domain) masks the
    input, x: (B, C_in, H, W), not the weight: autograd then computes no gradient for the frozen weight, only one
    number per channel. A domain without switches here (the source) reads every channel.

    switches: nn.ParameterDict, domain -> (C_in,) real switches, which start at `start`. At least one channel of a
    domain is always on: with none above 0 it is the largest, so that no layer cuts the network in two.
    """

    def __init__(self, in_channels, out_channels, kernel_size, *args, domains=(), start=1e-3, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        if self.groups != 1:
            raise ValueError("SwitchedConv2d needs groups=1: a switch is one input channel of every filter")
        self.total_channels = in_channels  # of the backbone; in_channels shrinks when the layer is pruned
        self.start = start
        self.switches = nn.ParameterDict()
        self.register_buffer("kept", None)  # (in_channels,) positions in the incoming tensor, once pruned
        for domain in domains:
            self.add_domain(domain)

    def add_domain(self, domain):
        self.switches[domain] = nn.Parameter(torch.full((self.in_channels,), self.start, device=self.weight.device))

    def binary_switches(self, domains):
        """The 0/1 switches of `domains` (a list of names), with the straight-through gradient: (len(domains), C_in)."""
        switches = torch.stack([self.switches[domain] for domain in domains])  # (N, C_in)
        strongest = (switches == switches.amax(dim=1, keepdim=True)) & (switches <= 0)
        return binarize(switches) + strongest  # adds 1 only where the whole layer would be off

    def forward(self, x, domain=None):
        if self.kept is not None:
            x = x.index_select(1, self.kept)  # (B, C_kept, H, W)
        if domain in self.switches:
            x = x * self.binary_switches([domain]).view(1, -1, 1, 1)
        return super().forward(x)

    def prune(self, kept):
        """Keep only the input channels at the positions `kept` (int64, ascending), of the weight and of every domain."""
        self.weight = nn.Parameter(self.weight.detach()[:, kept].clone(), requires_grad=self.weight.requires_grad)
        for domain, switches in self.switches.items():
            self.switches[domain] = nn.Parameter(switches.detach()[kept].clone())
        self.kept = kept.clone() if self.kept is None else self.kept[kept]
        self.in_channels = len(kept)


class DomainBatchNorm2d(nn.ModuleDict):
    """One nn.BatchNorm2d per domain, affine and running statistics; forward(x, domain), x: (B, C, H, W)."""

    def __init__(self, num_features, domains=()):
        super().__init__({domain: nn.BatchNorm2d(num_features) for domain in domains})

    def add_domain(self, domain, like):
        """A new domain's batch-norm starts as a copy of that of the domain `like`."""
        self[domain] = copy.deepcopy(self[like]).requires_grad_(True)

    def forward(self, x, domain):
        return self[domain](x)


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
        out = F.relu(self.bn1(x, domain))
        if self.shortcut is not None:
            x = self.shortcut(out, domain)
        out = F.relu(self.bn2(self.conv1(out, domain), domain))
        return x + self.conv2(out, domain)


class WideResNet(nn.Module):
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
        self.classifiers = nn.ModuleDict({source: nn.Linear(planes[3], num_classes)})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def domains(self):
        """The adapted domains, in the order they came; the source is not among them."""
        return [domain for domain in self.classifiers if domain != self.source]

    def add_domain(self, domain, num_classes):
        """Give `domain` its own switches, batch-norm (a copy of the source's) and a fresh linear classifier."""
        check_name(domain)
        if domain in self.classifiers:
            raise InputError(f"domain {domain} is there already: give each domain once, and not the source")
        for module in self.modules():
            if isinstance(module, SwitchedConv2d):
                module.add_domain(domain)
            elif isinstance(module, DomainBatchNorm2d):
                module.add_domain(domain, like=self.source)
        width = self.classifiers[self.source].in_features
        self.classifiers[domain] = nn.Linear(width, num_classes).to(self.conv1.weight.device)

    def remove_domain(self, domain):
        """Forget what `domain` owns; with the source gone the network serves the adapted domains only."""
        for module in self.modules():
            if isinstance(module, SwitchedConv2d) and domain in module.switches:
                del module.switches[domain]
            elif isinstance(module, DomainBatchNorm2d):
                del module[domain]
        del self.classifiers[domain]

    def freeze_backbone(self):
        """Stop the gradient of all that is shared (the convolutions) and of all that is the source's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.requires_grad_(False)
            elif isinstance(module, DomainBatchNorm2d):
                module[self.source].requires_grad_(False)
        self.classifiers[self.source].requires_grad_(False)

    def forward(self, x, domain):
        if domain not in self.classifiers:
            raise InputError(f"unknown domain {domain}: this network serves {', '.join(self.classifiers)}")
        x = self.conv1(x)                           # (B, 16, H, W)
        for block in (*self.block1, *self.block2, *self.block3):
            x = block(x, domain)                    # ... (B, 64 * widen_factor, H/8, W/8)
        x = F.relu(self.bn1(x, domain))
        x = x.mean(dim=(2, 3))                      # (B, 64 * widen_factor)
        return self.classifiers[domain](x)          # (B, classes)


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
    return torch.cat([layer.binary_switches(domains) for layer in switched_layers(network).values()], dim=1)


def budget_loss(switches, budget, multiplier):
    """max(0, lambda_d (mean(s_d) - beta)) (section 3.1).

    switches: (M,) the binary switches of one domain; budget: beta, in (0, 1]; multiplier: lambda_d, a number >= 0.
    """
    return F.relu(multiplier * (switches.mean() - budget))


def sharing_loss(switches, budget, weight=1.0):
    """max(0, lambda_PS (1 - |s_1 & ... & s_N| / (M beta))) (Eq. 5).

    switches: (N, M) the binary switches of all domains, none detached: with the other domains detached the paper saw
    no sharing at all (supplement A). The intersection is the sum over switches of the product over domains.
    """
    intersection = switches.prod(dim=0).sum()
    return F.relu(weight * (1 - intersection / (switches.shape[1] * budget)))


class KKTMultiplier:
    """lambda_d of the budget loss: 0 while the constraint holds, raised while it is broken (section 3.1).

    update(usage, budget) is one step of projected gradient ascent on lambda (usage - budget), with the rate `lr`. It
    has to rise slowly: all switches start equal and Adam moves each by about its rate per step, so a budget term that
    outweighs the cross-entropy sends them through zero together.
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
    layers = switched_layers(network).values()
    return sum(layer.binary_switches([domain]).sum().item() for layer in layers) / _total(layers)


@torch.no_grad()
def intersection(network, domains=None):
    """Share of all M switches that are on in every one of `domains` (default: all adapted ones)."""
    layers = switched_layers(network).values()
    return sum(layer.binary_switches(domains or network.domains).amin(0).sum().item() for layer in layers) / _total(layers)


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
    backbone = kept = 0
    for module in network.modules():
        if isinstance(module, SwitchedConv2d):
            union = module.total_channels
            if len(adapted) == len(domains):
                union = int(module.binary_switches(domains).amax(0).sum())
            kernel = module.weight[:, 0].numel()  # the weights that read one input channel
            backbone += kernel * module.total_channels
            kept += kernel * union + union * len(adapted) / 32
        elif isinstance(module, nn.Conv2d):
            backbone += module.weight.numel()
            kept += module.weight.numel()
        elif isinstance(module, DomainBatchNorm2d):
            kept += 4 * sum(module[domain].num_features for domain in domains)
    return kept / backbone


@torch.no_grad()
def macs(network, domains=None, image_size=64):
    """Multiply-accumulates of the convolutions for one image_size x image_size crop and the input channels that
    `domains` read: [domain] is that domain's complexity, all of them what a pruned network runs, None the backbone's.

    Counted with THOP (`pip install thop`) on plain nn.Conv2d layers: THOP looks layers up by exact type, and counts a
    subclass of nn.Conv2d as zero. Batch-norm (0.3% of WRN-28-4) and classifiers are left out.
    """
    from thop import profile
    seen = []  # (convolution, shape of what it reads), in the order of the forward pass
    hooks = [module.register_forward_pre_hook(lambda conv, inputs: seen.append((conv, inputs[0].shape)))
             for module in network.modules() if isinstance(module, nn.Conv2d)]
    first = next(network.parameters())
    network(torch.zeros(1, 3, image_size, image_size, device=first.device, dtype=first.dtype),
            next(iter(network.classifiers)))
    for hook in hooks:
        hook.remove()
    count = 0
    for conv, (_, _, height, width) in seen:
        channels = conv.in_channels
        if isinstance(conv, SwitchedConv2d):
            channels = int(conv.binary_switches(domains).amax(0).sum()) if domains else conv.total_channels
        plain = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                          bias=conv.bias is not None)
        count += profile(plain, (torch.zeros(1, channels, height, width),), verbose=False)[0]
    return int(count)


def _total(layers):
    return sum(layer.total_channels for layer in layers)


# ---------------------------------------------------------------------------------------------------------------------
# pruning and checkpoints

def prune(network, domains=None):
    """A smaller copy of `network` for `domains` (default: all adapted ones), with the same logits for each of them.

    Of every convolution, the input channels that none of `domains` reads are gone, with their switches; what is left
    of the input is gathered. The source domain is no longer served: it would need the whole backbone.
    """
    domains = list(domains or network.domains)
    if not domains:
        raise InputError("nothing to prune: the network has no adapted domain, only a backbone")
    for domain in domains:
        if domain not in network.domains:
            raise InputError(f"cannot keep domain {domain}: choose among {', '.join(network.domains)}")
    network = copy.deepcopy(network)
    for domain in [domain for domain in network.classifiers if domain not in domains]:
        network.remove_domain(domain)
    for layer in switched_layers(network).values():
        layer.prune(layer.binary_switches(domains).amax(0).nonzero().flatten())
    return network


def save(path, network, **facts):
    """Write `network` and `facts` (numbers, strings, lists, dicts, tensors) to `path`, all of it or nothing."""
    checkpoint = {"format": FORMAT, "depth": network.depth, "widen_factor": network.widen_factor,
                  "source": network.source,
                  "num_classes": {domain: linear.out_features for domain, linear in network.classifiers.items()},
                  "state": {name: value.cpu() for name, value in network.state_dict().items()}, **facts}
    part = f"{path}.part"
    try:
        torch.save(checkpoint, part)
        os.replace(part, path)  # in one piece: a reader sees the old file or the new one
    except (OSError, RuntimeError) as error:
        if os.path.isfile(part):
            os.remove(part)
        raise InputError(f"cannot write {path}: {_first_line(error)}") from None


def load(path):
    """(network, facts) of a checkpoint that save wrote, on the CPU; never runs code from the file (weights_only)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except Exception as error:  # torch's reader raises nearly anything on bytes that are no checkpoint
        raise InputError(f"{path} is not a readable checkpoint: {_first_line(error)}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path} is a checkpoint of something else: expected one that train.py or prune.py wrote")
    try:
        num_classes, state = checkpoint.pop("num_classes"), checkpoint.pop("state")
        source = checkpoint.pop("source")
        network = WideResNet(checkpoint.pop("depth"), checkpoint.pop("widen_factor"), source, num_classes.get(source, 1))
        for domain, number in num_classes.items():
            if domain != source:
                network.add_domain(domain, number)
        if source not in num_classes:
            network.remove_domain(source)
        for name, layer in switched_layers(network).items():
            if f"{name}.kept" in state:
                layer.prune(state[f"{name}.kept"])
        network.load_state_dict(state)
    except (KeyError, AttributeError, TypeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or of another architecture: {_first_line(error)}") from None
    return network, checkpoint


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
