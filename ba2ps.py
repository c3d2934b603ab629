# SPDX-License-Identifier: MIT
"""Budget-aware adapters with parameter sharing: one frozen backbone, many image domains, a budget for each.

The whole method in one file that needs only torch; copy it, or the section that you want, into your project.

    relu(bn_d(x)) --[* 1[s_d > 0]]--> conv(frozen W) --> ...        d: the domain, an argument of forward

    L = cross-entropy + max(0, lambda_d (mean(s_d) - beta))
                      + max(0, lambda_PS (1 - |s_1 & ... & s_N| / (M beta)))

  [1] dos Santos et al., Parameter Sharing in Budget-Aware Adapters for Multi-Domain Learning, BMVC 2022
  [2] Berriel et al., Budget-Aware Adapters for Multi-Domain Learning (BA2), ICCV 2019
  [3] Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016
  [4] Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013
Equations and tables are those of [1], "the paper". Eq. 6, the score S, is in evaluate.py.
"""
import contextlib
import copy
import inspect
import math
import operator
import os
import warnings
import zipfile

import torch
import torch.fx as fx

# -------- 1  The switch and the layers that a domain owns a part of (Eq. 2 and 3) ---------------------------

nn, F = torch.nn, torch.nn.functional  # here, so that this section alone runs under `import torch`


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that names it and says what to do."""


class Binarize(torch.autograd.Function):
    """1[s > 0] forward, identity backward: the straight-through estimator [4]. Exactly 0 is off."""

    @staticmethod
    def forward(ctx, switches):
        return (switches > 0).to(switches.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad  # also where the switch is off: that is how a channel comes back


binarize = Binarize.apply


class SwitchedConv2d(nn.Conv2d):
    """A frozen convolution in which every domain switches input channels on and off (Eq. 3).
    Takes the arguments of nn.Conv2d (groups=1) and `domains`, the names to start with. forward(x, domain)
    reads the channels of x (B, C_in, H, W) that `domain` has on; one without switches here (the source) reads
    all. switches: {domain: (C_in,) real switches}, which start at 1e-3."""

    def __init__(self, in_channels, out_channels, kernel_size, *args, domains=(), **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        if self.groups != 1:
            raise ValueError("SwitchedConv2d needs groups=1: a switch is one input channel of every filter")
        self.switches = nn.ParameterDict()
        self.kept = torch.ones(in_channels, dtype=torch.bool, device="cpu")  # what pruning left
        for domain in domains:
            self.add_domain(domain)

    def add_domain(self, domain, start=1e-3):
        self.switches[domain] = nn.Parameter(self.weight.new_full((self.in_channels,), start))

    def read(self, domain):
        """(C_in,) bool, on the CPU: the channels that `domain` reads; one without switches reads all."""
        return self.switches[domain].detach().cpu() > 0 if domain in self.switches else self.kept[self.kept]

    def forward(self, x, domain=None):
        if domain in self.switches:
            x = x * binarize(self.switches[domain]).to(x.dtype).view(-1, 1, 1)
        return super().forward(x)


class DomainModules(nn.ModuleDict):
    """One module per domain; forward(x, domain) runs that of `domain`."""

    def forward(self, x, domain):
        if domain not in self:
            raise InputError(f"unknown domain {domain}: this network serves {', '.join(self)}")
        return self[domain](x)


class DomainBatchNorm2d(DomainModules):
    """One batch-norm per domain, affine and running statistics; forward(x, domain), x: (B, C, H, W)."""

    def __init__(self, num_features, domains=()):
        super().__init__({domain: nn.BatchNorm2d(num_features) for domain in domains})
        self.features = num_features  # of the backbone

    def add_domain(self, domain, like):
        """A new domain's batch-norm starts as a copy of that of the domain `like`."""
        norm, state = self[like], self[like].state_dict()
        self[domain] = type(norm)(norm.num_features, norm.eps, norm.momentum, norm.affine,
                                  norm.track_running_stats).to(next(iter(state.values()), None))
        self[domain].train(norm.training).load_state_dict(state)


class DomainLinear(DomainModules):
    """One nn.Linear per domain, the classifiers; forward(x, domain), (B, C) -> (B, classes of the domain)."""

    def add_domain(self, domain, num_classes):
        like = next(iter(self.values()))
        self[domain] = nn.Linear(like.in_features, num_classes).to(like.weight)


# -------- 2  The network (Eq. 1): what is shared and frozen, and what a domain owns -------------------------

class MultiDomain:
    """A mix-in for a module with a DomainLinear. source: the domain that the backbone was trained on; name,
    options: what load builds the backbone from; image: (channels, size) of images that it can read."""

    options, image, pruned = None, (3, 64), False

    @property
    def classifiers(self):
        return next(module for module in self.modules() if isinstance(module, DomainLinear))

    @property
    def domains(self):
        """The adapted domains, in the order in which they came; the source is not among them."""
        return [domain for domain in self.classifiers if domain != self.source]

    def parts(self):
        """The dictionaries whose entry [domain] is what a domain owns: switches, batch-norm, classifier."""
        return [module.switches if isinstance(module, SwitchedConv2d) else module for module in self.modules()
                if isinstance(module, (SwitchedConv2d, DomainModules))]

    def add_domain(self, domain, num_classes):
        """Give `domain` its switches, a fresh linear classifier and a copy of the source's batch-norm, or,
        if the source is pruned away, of the first domain's."""
        if domain in self.classifiers:
            raise InputError(f"domain {domain} is there already: give each domain once, and not the source")
        like = self.source if self.source in self.classifiers else self.domains[0]
        if not domain or "." in domain or any(hasattr(part, domain) for part in self.parts()):
            raise InputError(f"domain name {domain!r} cannot name a part of a torch module: rename it")
        for module in self.modules():
            if isinstance(module, SwitchedConv2d):
                module.add_domain(domain)
            elif isinstance(module, DomainBatchNorm2d):
                module.add_domain(domain, like)
            elif isinstance(module, DomainLinear):
                module.add_domain(domain, num_classes)

    def remove_domain(self, domain):
        served(self, [domain])
        for part in [part for part in self.parts() if domain in part]:
            del part[domain]

    def owned_parameters(self, domains=None):
        """Those of the batch-norm and classifiers of `domains` (default: all adapted ones), for SGD."""
        return [p for module in self.modules() if isinstance(module, DomainModules)
                for domain in served(self, domains) for p in module[domain].parameters()]

    def freeze_backbone(self):
        """Stop the gradient of all that no adapted domain owns: what is shared, and what is the source's."""
        self.requires_grad_(False)
        for part in self.parts():
            for domain in [domain for domain in self.domains if domain in part]:
                part[domain].requires_grad_(True)


def norm_relu_conv(norm, conv, x, domain):
    """conv(relu(norm(x))) of a BasicBlock, x: (B, C_in, H, W)."""
    return conv(F.relu(norm(x, domain)), domain)


class BasicBlock(nn.Module):
    """The pre-activation block of [3]."""

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
    """WRN-depth-widen_factor [3] for many domains; WRN-28-4 is the paper's backbone (64/128/256 channels).
    depth = 6n + 4 gives three groups of n blocks, each group halves the resolution. More domains than the
    source come with add_domain. forward(images, domain): (B, 3, H, W) -> logits (B, classes of the domain),
    any H and W. All convolutions but the stem, whose input is the image, have switches."""

    def __init__(self, depth=28, widen_factor=4, source="imagenet12", num_classes=1000):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen_factor < 1:
            raise InputError(f"WRN-{depth}-{widen_factor}: take a depth of 10, 16, 22, ... and a width")
        self.name, self.source = f"WRN-{depth}-{widen_factor}", source
        planes = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]

        def group(in_planes, out_planes):
            blocks = [BasicBlock(in_planes, out_planes, 2, source)]
            blocks += [BasicBlock(out_planes, out_planes, 1, source) for _ in range((depth - 4) // 6 - 1)]
            return nn.ModuleList(blocks)

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


class Tracer(fx.Tracer):
    """Follows a forward. What it hands on of self.training is asked anew at every call; what it decides by
    it is decided as in evaluation."""

    def trace(self, root, concrete_args=None):
        nn.Module.training = property(lambda module: self.create_proxy("get_attr", "training", (), {}))
        try:
            return super().trace(root, concrete_args)
        finally:
            del nn.Module.training  # every module has its own again

    def to_bool(self, proxy):
        return False if proxy.node.target == "training" else super().to_bool(proxy)

    def is_leaf_module(self, module, name):
        own = isinstance(module, (SwitchedConv2d, DomainModules, Select))
        bare = not [*module.children(), *module.parameters(), *module.buffers()]  # as stochastic depth
        return own or bare or super().is_leaf_module(module, name)


class GraphNetwork(MultiDomain, fx.GraphModule):
    """A network of many domains given by its graph, what add_switches and prune return."""

    def __init__(self, modules, graph, like, pruned):
        super().__init__(modules, graph)
        self.source, self.name, self.options, self.image = like.source, like.name, like.options, like.image
        self.pruned = pruned  # whether channels are gone
        self.train(like.training)

    def __deepcopy__(self, memo):  # GraphModule's own forgets the attributes
        return GraphNetwork(super().__deepcopy__(memo), copy.deepcopy(self.graph), self, self.pruned)


def add_switches(network, domains, source="imagenet", image_size=224, name=None, options=None):
    """A copy of a plain, trained `network` (of torch.nn layers, such as torchvision's) with switches.
    Every nn.Conv2d but those that read the image becomes a SwitchedConv2d, every batch-norm a
    DomainBatchNorm2d, the last nn.Linear the DomainLinear; all else is shared and frozen, also grouped
    convolutions. Without batch-norm a domain owns switches and classifier alone; a warning says so. domains:
    {name: number of classes}. Its forward, which torch.fx must be able to follow, becomes forward(x, domain).
    InputError unless it gives `source` what `network` gives, on random images of `image_size`.
    name, options: what torchvision's get_model builds its like from; without, load needs the network."""
    kind, plain, network = type(network).__name__, network, copy.deepcopy(network)
    try:
        graph = Tracer().trace(network)
    except Exception as error:
        raise InputError(f"{kind}: torch.fx cannot follow its forward: {one_line(error)}") from None
    write_out_of_place(network, graph)
    parts = {node.target: operator.attrgetter(node.target)(network) for node in graph.nodes
             if node.op in ("call_module", "get_attr")}
    learned = [node.target for node in graph.nodes
               if node.op == "call_module" and [*parts[node.target].parameters()]]
    for key, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and type(layer) is not nn.Conv2d or learned.count(key) > 1:
            raise InputError(f"{kind}: {key} is called twice or is a subclass of nn.Conv2d: every call needs "
                             "a plain layer of its own")
    image = next(iter(graph.nodes))
    with graph.inserting_after(image):
        domain = graph.placeholder("domain")
    raw, stems = {image}, []  # raw: what is made of the image by no layer but batch-norm
    for node in [node for node in graph.nodes if node is not domain]:
        key, layer = node.target, layer_of(network, node)
        is_conv, is_norm = isinstance(layer, nn.Conv2d), isinstance(layer, nn.modules.batchnorm._BatchNorm)
        reads_image = raw.issuperset(node.all_input_nodes)
        if reads_image and (is_norm or key not in learned):
            raw.add(node)
        if is_conv and reads_image:
            stems.append(layer)
        elif is_conv and layer.groups == 1:
            parts[key] = SwitchedConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                layer.dilation, bias=layer.bias is not None, padding_mode=layer.padding_mode, device="meta")
            parts[key].weight, parts[key].bias = layer.weight, layer.bias
        elif is_norm:
            parts[key] = DomainBatchNorm2d(layer.num_features)
            parts[key][source] = layer
        elif isinstance(layer, nn.Linear) and key == learned[-1]:
            parts[key] = DomainLinear({source: layer})
        if isinstance(parts.get(key), (SwitchedConv2d, DomainModules)):
            node.args = (*node.args, domain)
    kinds = {type(part) for part in parts.values()}
    if not {SwitchedConv2d, DomainLinear} <= kinds:
        raise InputError(f"{kind} needs an nn.Conv2d that reads another layer's channels, for switches, and "
                         "an nn.Linear at its end, for classifiers")
    if DomainBatchNorm2d not in kinds:
        warnings.warn(f"{kind} has no batch-norm: a domain owns its switches and its classifier alone")
    network.name, network.options, network.source = name or kind, options, source
    network.image = stems[0].in_channels if stems else 3, image_size
    result = GraphNetwork(parts, graph, network, False)
    try:
        select_moves(result)
        check_source(plain, result)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{kind} cannot run on {image_size} pixels: {one_line(error)}") from None
    for new, number in domains.items():
        result.add_domain(new, number)
    return result


def write_out_of_place(network, graph):
    """Let no node change what it reads: what reads that later reads what the node yields instead. Pruning may
    copy channels in between, or make what is written into a part of something larger."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        layer, name, call = layer_of(network, node), getattr(node.target, "__name__", node.target), None
        if node.op == "call_function" and getattr(node.target, "__module__", None) == F.__name__:
            call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        if getattr(layer, "inplace", False):
            layer.inplace = False
        elif call and call.arguments.get("inplace"):
            call.arguments["inplace"] = False
            node.args, node.kwargs = call.args, call.kwargs
        elif node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
            node.target = getattr(operator, name[1:])
        elif node.op == "call_method" and name[-1] == "_":
            node.target = name[:-1]
        elif node.op == "call_function" and name[-1] == "_":
            node.target = getattr(F, name[:-1])
        else:
            continue
        node.args[0].replace_all_uses_with(node, lambda user: place[user] > place[node])


class Recorder(fx.Interpreter):
    """Keeps in node.meta["value"] what a node yields on the meta device: a shape, or a number."""

    def run_node(self, node):
        node.meta["value"] = super().run_node(node)
        return node.meta["value"]


def record(network, graph):
    """Record `graph` for images that `network` can read; returns the copy that ran, in eval mode."""
    (channels, size), meta = network.image, copy.deepcopy(network).to("meta").eval()
    images = next(meta.parameters()).new_zeros(2, channels, size, size)
    Recorder(meta, graph=graph).run(images, next(iter(network.classifiers)))
    return meta


def compute(network, node, values):
    """What `node`, which holds no weights, makes of `values`, a function of its operands."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return (layer_of(network, node) or node.target)(*args, **kwargs)


def select_moves(network):
    """Replace what only moves channels (a chunk, a slice, a shuffle by views) by a Select of them. They are
    found by numbering the values of a tensor: the numbers that come out tell which channels these are."""
    graph, numbers = network.graph, {}  # {node: (root, which values of the root it has)}
    record(network, graph)
    for node in list(graph.nodes):
        value, inputs = node.meta["value"], [operand for operand in operands_of(node) if operand in numbers]
        if isinstance(value, torch.Tensor):
            numbers[node] = node, -1 - torch.arange(value.numel(), dtype=torch.double).view(value.shape)
        if len(inputs) != 1 or node.op not in ("call_function", "call_method"):
            continue
        root, before = numbers[inputs[0]]
        moved = compute(network, node, lambda n: before if n is inputs[0] else n.meta["value"])
        if isinstance(moved, (tuple, list)):
            numbers[node] = root, moved
        if not isinstance(moved, torch.Tensor) or moved.max() >= 0 or (moved % 1).any() or (
                len(moved.unique()) < moved.numel()):
            continue  # other than values of the root, each once, come out: it computes
        if node.target != "contiguous" and isinstance(before, torch.Tensor) and torch.equal(moved, before):
            continue  # as dropout in evaluation
        numbers[node], whole = (root, moved), numbers[root][1]
        if moved.dim() > 1 and moved[:, 0].shape == whole[:, 0].shape:
            place = {number: c for c, number in enumerate(whole[0].view(whole.shape[1], -1)[:, 0].tolist())}
            firsts = moved[0].reshape(moved.shape[1], -1)[:, 0].tolist()
            index = torch.tensor([place.get(number, 0) for number in firsts])
            if moved.equal(whole[:, index]):
                network.add_module(f"select_{len(numbers)}", Select(index, len(place), network))
                with graph.inserting_after(node):
                    chosen = graph.call_module(f"select_{len(numbers)}", (root,))
                node.replace_all_uses_with(chosen)
                numbers[chosen], chosen.meta["value"] = numbers[node], value
    graph.eliminate_dead_code()
    network.recompile()


@torch.no_grad()
def check_source(plain, network):
    """InputError, with the layer where it begins, unless the source gets what `plain` computes, in training
    too, and unless all that changes in training without a gradient is a domain's own."""
    (channels, size), weight = network.image, next(plain.parameters())
    images, state = torch.randn(2, channels, size, size).to(weight), network.state_dict()
    for mode in ("evaluation", "training") if not weight.is_meta else ():
        seen = []
        for net, words in ((plain, ()), (network, (network.source,))):
            net, its = copy.deepcopy(net).train(mode == "training"), {}
            for name, module in net.named_modules():
                def keep(module, inputs, y, name=name, its=its):
                    its.setdefault(name, copy.deepcopy(y))
                module.register_forward_hook(keep)
                if isinstance(getattr(module, "p", None), float):  # of dropout: auxiliary ones draw as well
                    module.p = 0.0
            with torch.random.fork_rng():
                torch.manual_seed(0)
                net(images, *words)
            seen.append(its)
        for name, ours in seen[1].items():
            theirs = seen[0].get(name, ours)
            if mode == "training" and isinstance(theirs, tuple) and not name:
                theirs = theirs[0]  # auxiliary classifiers are left out
            tensors = isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
            if not (tensors and torch.allclose(ours, theirs, 1e-3, 1e-4 * theirs.abs().max().item(), True)
                    or name and type(ours) is type(theirs) is tuple):  # as of attention
                name = name or "its output, logits,"
                raise InputError(f"{network.name}: {name} is not the same with switches, in {mode}: does "
                                 "something write into what it reads, or branch in training?")
        for name, value in net.state_dict().items():
            if network.source not in name.split(".") and not torch.equal(value, state[name]):
                raise InputError(f"{network.name}: {name} changes in training, but all domains share it")


# -------- 3  The losses (Eq. 4 and 5); cross-entropy, the third term, is in the training loop ---------------

def budget_loss(usage, budget, price):
    """L_B = max(0, lambda_d (usage - beta)) of one domain (Eq. 4, section 3.1).
    usage: scalar, the share of the switches that are on; budget: beta, in (0, 1]; price: lambda_d, from 0."""
    return F.relu(price * (usage - budget))


def sharing_loss(switches, budget, form="intersection"):
    """L_PS / lambda_PS = max(0, excess), for domains that do not use the same channels; the excess by `form`:

        intersection    1 - |s_1 & ... & s_N| / (M beta)               (Eq. 5)
        union           |s_1 or ... or s_N| / (M beta) - 1             (our reading of the journal version,
        jaccard         1 - |s_1 & ... & s_N| / |s_1 or ... or s_N|     arXiv 2309.11464)

    switches: (N, M) binary, of all domains, none detached: with the others detached the paper saw no sharing
    (supplement A). The intersection is the sum over switches of the product over domains."""
    both, either = switches.prod(dim=0).sum(), (1 - (1 - switches).prod(dim=0)).sum()
    most = switches.shape[1] * budget
    excess = {"intersection": 1 - both / most, "union": either / most - 1, "jaccard": 1 - both / either}
    return F.relu(excess[form])


# -------- 4  Switches: what is trained by the losses and held to the budget ---------------------------------

def switched_layers(network):
    """{name: SwitchedConv2d} of all of them, in the order in which they were registered."""
    return {name: module for name, module in network.named_modules() if isinstance(module, SwitchedConv2d)}


class Switches:
    """The real switches of `domains`, their prices and their budget, for a training loop like this:

        adam = torch.optim.Adam(switches.parameters(), lr=1e-4)
        switches.begin(batch, done)                # the domains of this step, the share of the run so far
        loss = cross_entropy + switches.loss(batch)
        loss.backward()
        switches.step(adam, batch)

    rows: {domain: (M,) parameter}, of which the layers' switches are views: an optimizer and the losses see
    one tensor, where WRN-28 has 27 layers. The layers' gradients are their own until `step` adds them.
    budget: beta, in the measure `of` (see costs). sharing: lambda_PS, 0 for none (BA2), or "learned": raised
    while the domains share too little. Other domains of the network count in the sharing loss, and stay as
    they are. form: see sharing_loss. share_to: "current": the sharing loss moves the batch's domains alone.
    rate: step of the prices. settle: share of the run after which every domain's least switches go off until
    its budget holds, and no switch moves any more; None: never. rank: which are the least. "switches": those
    of least value. "gradients": every switch is on until then, without losses, and its importance is the mean
    square of its gradient (Molchanov et al., CVPR 2019); least is least importance for the domain, plus
    lambda_PS times that for each other domain, per cost."""

    def __init__(self, network, domains, budget, of="channels", image_size=None, sharing=1.0,
                 form="intersection", share_to="all", rate=0.3, settle=None, rank="switches"):
        self.domains, self.budget, self.form, self.rate = served(network, domains), budget, form, rate
        self.settle, self.learned = math.inf if settle is None else settle, sharing == "learned"
        self.everyone = share_to == "all" and sharing != 0                # whether L_PS moves all domains
        self.sharing = 0.0 if self.learned else sharing                   # lambda_PS
        self.prices = dict.fromkeys(self.domains, 0.0)                    # lambda_d
        layers, (each, self.fixed) = switched_layers(network), costs(network, of, image_size)
        self.layers, self.widths = list(layers.values()), [layer.in_channels for layer in layers.values()]
        # costs and importance stay on the CPU: not every device has float64
        self.costs = torch.cat([torch.full((width,), each[name], dtype=torch.double)
                                for name, width in zip(layers, self.widths)])  # (M,)
        least = sum(each.values()) + self.fixed
        if not least <= budget <= 1:
            raise InputError(f"budget {budget:g} of {of}: give {least:.4f} (a channel in each layer) to 1")
        if network.source in self.domains:
            raise InputError(f"the source {network.source} has no switches: leave it out")
        self.whole = sum(len(layer.kept) for layer in layers.values())    # M of the backbone, in Eq. 5
        self.others = [torch.cat([layer.read(domain) for layer in self.layers])
                       for domain in network.domains if domain not in self.domains]
        self.rows = {domain: nn.Parameter(torch.empty(0)) for domain in self.domains}
        self.settled, self.measuring = False, rank == "gradients" and settle is not None
        self.importance = {domain: torch.full_like(self.costs, 1e-30) for domain in self.domains}
        self.begin([], 0.0)

    def parameters(self):
        return list(self.rows.values())

    def begin(self, batch, done):
        """Before a step on images of the domains `batch`; done: the share of the run that is over, 0 to 1."""
        for domain, row in self.rows.items():
            parts = [layer.switches[domain] for layer in self.layers]
            if parts[0].data_ptr() != row.data_ptr():  # at first, and when the network has moved to a device
                row.data = torch.cat([part.detach() for part in parts])
                for part, view in zip(parts, row.data.split(self.widths)):
                    part.data = view
            if done >= self.settle and not self.settled:
                self.hold(domain)
                for part in parts:
                    part.requires_grad_(False)
        self.settled = done >= self.settle
        self.moving = [domain for domain in self.domains if self.everyone or domain in batch]

    def loss(self, batch):
        """L_B of the domains `batch` + L_PS (Eq. 4 and 5), a scalar; 0 once the switches have settled."""
        if self.settled or self.measuring:
            return 0.0
        s = binarize(torch.stack([row if domain in self.moving else row.detach()
                                  for domain, row in self.rows.items()]))  # (N, M)
        usage = dict(zip(self.domains, s @ self.costs.to(s) + self.fixed))  # N scalars
        self.usage = {domain: usage[domain].item() for domain in batch}
        loss = sum(budget_loss(usage[domain], self.budget, self.prices[domain]) for domain in batch)
        if self.learned or self.sharing > 0:
            everyone = torch.cat([s, torch.stack(self.others).to(s)]) if self.others else s
            excess = sharing_loss(everyone, self.budget * self.whole / s.shape[1], self.form)
            loss = loss + self.sharing * excess
            self.sharing += self.learned * self.rate * excess.item()
        return loss

    @torch.no_grad()
    def step(self, optimizer, batch):
        """After backward: step the optimizer (Adam, of the rows), then the prices of the domains `batch`.
        A price is the KKT multiplier of section 3.1: price += rate (usage - beta), never below 0. It has to
        rise slowly: all switches start alike and Adam moves each by about its rate, so a budget term that
        outweighs the cross-entropy sends them through zero together."""
        if self.settled:
            return
        for domain in batch:
            parts, row = [layer.switches[domain] for layer in self.layers], self.rows[domain]
            grads = torch.cat([torch.zeros_like(part) if part.grad is None else part.grad for part in parts])
            row.grad = grads if row.grad is None else row.grad + grads
            for part in parts:
                part.grad = None
            if self.measuring:
                self.importance[domain] = 0.999 * self.importance[domain] + row.grad.cpu() ** 2
                row.grad = None
        if self.measuring:
            return
        optimizer.step()
        optimizer.zero_grad()  # to None: Adam's momentum does not move the domains of other batches
        moved = torch.stack([self.rows[domain] for domain in self.moving])                           # (N, M)
        strongest = torch.stack([layer.amax(1) for layer in moved.split(self.widths, 1)], 1)         # (N, L)
        for n, layer in (strongest <= 0).nonzero().tolist():  # no layer may cut a domain's network in two
            part = self.rows[self.moving[n]].split(self.widths)[layer]
            part[part.argmax()] = 1e-6
        for domain, use in self.usage.items():
            self.prices[domain] = max(0.0, self.prices[domain] + self.rate * (use - self.budget))

    @torch.no_grad()
    def hold(self, domain):
        """Switch off the least switches of `domain` until its budget holds, not the strongest of a layer."""
        row = values = self.rows[domain].cpu()
        if self.measuring:
            own, *rest = [part / part.sum() for part in (
                self.importance[domain], *self.importance.values(), *self.others)]
            values = ((1 - self.sharing) * own + self.sharing * sum(rest)) / self.costs
        values = torch.where(row > 0, values, -math.inf)
        for layer in values.split(self.widths):
            layer[layer.argmax()] = math.inf
        order = values.argsort()  # the least first
        order = order[values[order].isfinite()]
        over = (self.costs * (row > 0)).sum() + self.fixed - self.budget
        before = self.costs[order].cumsum(0) - self.costs[order]
        self.rows[domain][order[before < over - 1e-9]] = 0

    def state_dict(self):
        return {"prices": self.prices, "sharing": self.sharing, "importance": self.importance}

    def load_state_dict(self, state):
        self.prices, self.sharing = dict(state["prices"]), state["sharing"]
        self.importance = dict(state["importance"])


@torch.no_grad()
def reestimate_batch_norm(network, domain, batches):
    """Set the running statistics of `domain` to the mean over `batches` (of images, labels, as a DataLoader
    gives them) for the switches as they stand; the network is in training mode then. While switches move,
    running statistics describe a network that is gone (EagleEye, ECCV 2020)."""
    served(network, [domain])
    norms = [module[domain] for module in network.train().modules() if isinstance(module, DomainBatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
    for images, _ in batches:
        network(images, domain)
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum


# -------- 5  What it costs: read from the masks and from one table of the backbone's layers -----------------

BUDGETS = ("layers", "channels", "macs", "params")


def served(network, domains=None):
    """`domains` as a list, default all adapted ones; InputError unless the network serves each of them."""
    domains = network.domains if domains is None else domains
    if isinstance(domains, str) or not set(domains) <= set(network.classifiers):
        raise InputError(f"{domains!r} is not a list of domains out of {', '.join(network.classifiers)}")
    return list(domains)


def masks(network, domains=None):
    """{layer: (N, C) bool, on the CPU}: which of the backbone's C input channels each of `domains` reads.
    domains: default all adapted ones; the source, if it is named, reads all. What is pruned away is off."""
    domains, result = served(network, domains), {}
    for name, layer in switched_layers(network).items():
        result[name] = torch.zeros(len(domains), len(layer.kept), dtype=torch.bool)
        for row, domain in zip(result[name], domains):
            row[layer.kept] = layer.read(domain)
    return result


def shared_layers(network):
    """{name: module} of all that no domain owns."""
    owned = {module for part in network.parts() for module in part.modules()}
    return {name: module for name, module in network.named_modules() if module not in owned}


def table(network, image_size=None):
    """{layer: its weights in the backbone} for every layer that the domains share, biases and the like under
    names of their own; with image_size {layer: its MACs for a crop}, counted by THOP."""
    whole, operations = {}, {}
    for name, module in shared_layers(network).items():
        own = {key: p.numel() for key, p in module.named_parameters(recurse=False)}
        for key, number in getattr(module, "whole", own).items():
            whole[name if key == "weight" else f"{name}.{key}"] = number
    if image_size is None:
        return whole
    network = copy.deepcopy(network).to("meta")  # THOP changes modes and buffers
    from thop import profile  # which needs setuptools from Python 3.12 on
    from thop.vision.basic_hooks import count_convNd, count_linear
    names = {module: name for name, module in shared_layers(network).items()}

    def count(layer, inputs, output):
        if layer in names:
            (count_linear if isinstance(layer, nn.Linear) else count_convNd)(layer, inputs, output)
            operations[names[layer]] = int(layer.total_ops) * whole[names[layer]] // layer.weight.numel()
    channels, first = network.image[0], next(network.parameters())
    inputs = first.new_zeros(1, channels, image_size, image_size), next(iter(network.classifiers))
    kinds = SwitchedConv2d, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear
    profile(network, inputs, dict.fromkeys(kinds, count), verbose=False)  # one it does not know has no MACs
    return operations


def costs(network, of="layers", image_size=None):
    """({layer: what one of its switches costs}, the share that no switch governs): all of it together is 1.
    of: layers, 1 / (L C_l), the paper's: usage is 1 - the sparsity of Table 7; channels, 1 / M; macs, params:
    what a channel brings of the convolutions' MACs or weights, of which the stem's are always there."""
    widths = {name: len(layer.kept) for name, layer in switched_layers(network).items()}
    if of not in BUDGETS:
        raise InputError(f"budget of {of!r}: choose among {', '.join(BUDGETS)}")
    whole = {"layers": dict.fromkeys(widths, 1), "channels": widths}.get(of)
    whole = whole or table(network, (image_size or network.image[1]) if of == "macs" else None)
    total = sum(whole.values())
    return ({name: whole[name] / total / width for name, width in widths.items()},
            sum(value for name, value in whole.items() if name not in widths) / total)


def share(network, domains=None, of="layers", image_size=None):
    """Share of the backbone, in the measure `of`, left with the channels that any of `domains` reads."""
    each, fixed = costs(network, of, image_size)
    return fixed + sum(each[name] * int(on.any(0).sum()) for name, on in masks(network, domains).items())


def usage(network, of="layers", image_size=None, domains=None):
    """{domain: share in the measure `of` that it has on}, what is held against the budget."""
    each, fixed = costs(network, of, image_size)
    use = fixed + sum(each[name] * on.sum(1).double() for name, on in masks(network, domains).items())
    return dict(zip(served(network, domains), use.tolist()))


def sparsity(network, domains=None):
    """({domain: share off}, share off in all domains): means over layers, as in Table 7."""
    on = usage(network, domains=domains) | {None: share(network, domains)}
    off = {domain: max(0.0, 1 - use) for domain, use in on.items()}
    return off, off.pop(None)


def params(network, domains=None):
    """Memory that `domains` need, relative to the backbone (Table 2), without the channels that none reads.
    Everything but classifiers: weights, four floats (weight, bias, mean, variance) per batch-norm channel and
    domain, 32 bits a float, 1 bit a switch. The backbone is the shared layers alone: WRN-28-4 with ten
    domains and every switch on is at 1.025. The source counts only if it is named, and keeps every channel.
    """
    domains = served(network, domains) or [network.source]
    norms = sum(module.features for module in network.modules() if isinstance(module, DomainBatchNorm2d))
    switches = sum(int(on.any(0).sum()) for on in masks(network, domains).values())
    own = 4 * norms * len(domains) + switches / 32 * sum(domain != network.source for domain in domains)
    return share(network, domains, "params") + own / sum(table(network).values())


def macs(network, domains=None, image_size=None):
    """Multiply-accumulates of the shared layers for one crop, with the input channels that `domains` read.
    [domain]: the complexity of that domain; None: the backbone's. As in the paper every filter counts;
    batch-norm (0.3% of WRN-28-4) and classifiers do not."""
    read = {} if domains is None else masks(network, domains)
    return round(sum(value * (read[name].any(0).double().mean().item() if name in read else 1)
                     for name, value in table(network, image_size or network.image[1]).items()))


# -------- 6  Pruning: from the last layer back to the first, who reads which channel ------------------------

class Select(nn.Module):
    """The channels `index` (C_out,) of x: (B, C_in, H, W) -> (B, C_out, H, W), where `network` is."""

    def __init__(self, index, in_channels, network):
        super().__init__()
        self.in_channels, device = in_channels, next(network.parameters()).device
        index = index.to("cpu" if device.type == "meta" else device)  # on meta there would be no numbers
        self.register_buffer("index", index, persistent=False)

    def forward(self, x):
        if x.is_contiguous():
            return x.index_select(1, self.index)
        pixels = x.permute(0, 2, 3, 1)  # channels-last, where index_select would hand back NCHW
        chosen = pixels.flatten(0, 2).index_select(1, self.index)  # (B * H * W, C_out)
        return chosen.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


ALL = torch.tensor(True)  # a mask of all channels, however many


def operands_of(node):
    return [operand for operand in node.all_input_nodes if operand.target not in ("domain", "training")]


def layer_of(network, node):
    """The module that `node` calls, or None."""
    return network.get_submodule(node.target) if node.op == "call_module" else None


def width(node):
    """Number of channels of what `node` yields, (B, C, ...); None if it is something else."""
    value = node.meta["value"]
    return value.shape[1] if isinstance(value, torch.Tensor) and value.dim() > 1 else None


def follows(network, node, operand):
    """Whether `node` makes channel c of channel c of `operand` and of no other, of half of them too. It is
    tried: where a channel is not a number, what is made of it must not be one, and the rest must."""
    for channels in {width(operand), (width(operand) + 1) // 2}:
        bits = torch.arange(channels) >> torch.arange(channels.bit_length())[:, None] & 1 > 0
        codes = torch.cat([bits, ~bits])  # (B, C): some row tells any two channels apart

        def values(n):
            if width(n) is None:
                return n.meta["value"]
            own = channels if width(n) == width(operand) else width(n)
            x = torch.ones(len(codes), own, *n.meta["value"].shape[2:])
            if n is operand:
                x[codes] = math.nan
            return x
        try:
            made = compute(network, node, values).isnan()
        except (AttributeError, RuntimeError, TypeError):  # it wants another number of channels
            return False
        if made.shape[:2] != codes.shape or not made.reshape(*codes.shape, -1).any(2).equal(codes):
            return False
    return True


def channels_of(network, graph):
    """{node: {operand: (C,) the channel of it that channel c of the node is made of, or -1}}, for the nodes
    that go with fewer channels too: Select, torch.cat, batch-norm, depthwise convolutions, and what holds no
    weights if it is found to by trying. What else they read has one channel."""
    found, meta = {}, record(network, graph)
    for node in graph.nodes:
        layer, operands, own = layer_of(network, node), operands_of(node), torch.arange(width(node) or 0)
        if isinstance(layer, Select):
            found[node] = {operands[0]: layer.index.cpu()}
        elif node.target is torch.cat and (*node.args[1:], *node.kwargs.values()) == (1,) and (
                operands == list(node.args[0])):
            sides = own.split([width(operand) for operand in operands])
            found[node] = {operand: torch.where(torch.isin(own, side), own - side[0], -1)
                           for operand, side in zip(operands, sides)}
        elif isinstance(layer, DomainBatchNorm2d) or (
                isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels):
            found[node] = {operands[0]: own}
        elif node.op.startswith("call") and not (layer and [*layer.parameters()]) and (
                all(width(n) for n in (node, *operands))):
            same = [o for o in operands if width(o) == width(node) and follows(meta, node, o)]
            if same and all(o in same or width(o) == 1 for o in operands):
                found[node] = dict.fromkeys(same, own)
    return found


def reads(network, node, live, read, made):
    """{operand: mask (C,) of the channels that `node` reads if its own channels `live` are read, or ALL}."""
    layer, operands = layer_of(network, node), operands_of(node)
    if node in made and live.dim():
        return dict.fromkeys(operands, ALL) | {
            operand: torch.isin(torch.arange(width(operand)), at[live]) for operand, at in made[node].items()}
    if isinstance(layer, SwitchedConv2d):
        return {operands[0]: read[node.target]}
    if isinstance(layer, DomainLinear):
        return {operands[0]: torch.ones(width(operands[0]), dtype=torch.bool)}
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        groups = live.expand(layer.out_channels).view(layer.groups, -1).any(1)
        return {operands[0]: groups.repeat_interleave(layer.in_channels // layer.groups)}
    return dict.fromkeys(operands, ALL)


def liveness(network, graph, read):
    """({node: mask (C,) of its channels that anyone reads, or ALL if it cannot be cut}, channels_of).
    read: {switched layer: (C_in,) bool, what it reads}."""
    live, made = {}, channels_of(network, graph)
    for node in reversed(graph.nodes):
        layer = layer_of(network, node)
        if node not in live or not (node in made or isinstance(layer, nn.Conv2d)):
            live[node] = ALL
        elif live[node].dim():
            live[node][0] |= not live[node].any()  # a layer that nobody reads keeps a channel
            if getattr(layer, "groups", 1) > 1:  # groups go whole, or all keep as many filters
                groups = live[node].view(layer.groups, -1).int()
                most = groups.argsort(dim=1, descending=True, stable=True)[:, :groups.sum(1).max()]
                there = groups.any(1, keepdim=True).expand_as(most)
                live[node] = groups.bool().scatter(1, most, there).flatten()
        for operand, mask in reads(network, node, live[node], read, made).items():
            before = live.get(operand, ~ALL)
            live[operand] = before | mask if mask.dim() and (before.dim() or not before) else ALL
    for node in graph.nodes:  # one Select after torch.cat is faster than one for each of its operands
        if node.target is torch.cat and node in made and live[node].dim():
            live[node] = torch.cat([live[operand].expand(width(operand)) for operand in made[node]])
    return live, made


@torch.no_grad()
def cut(network, domains, read, arrange=lambda graph, live, made: {}):
    """A copy of `network` for `domains`, in which every layer has the channels left that are read; see
    liveness. arrange(...): {node: (C,) rank of its channels}, their order in the copy; default, as it is."""
    old, graph, modules, new = Tracer().trace(network), fx.Graph(), {}, {}
    live, made = liveness(network, old, read)
    ranks = arrange(old, live, made)

    def order(node, mask):
        """Where `mask` (C,) is true, in the order of the channels of the copy of `node`: int64."""
        at = mask.nonzero().flatten()
        return at[ranks[node][at].argsort()] if node in ranks else at

    def take(operand, wanted):
        """The copy of `operand`, and after it a Select, unless it yields just the channels `wanted`."""
        left = order(operand, live[operand].expand(width(operand)))
        if torch.equal(wanted, left):
            return new[operand]
        place = torch.zeros(width(operand), dtype=torch.long).scatter(0, left, torch.arange(len(left)))
        name = f"select_{len(modules)}"
        modules[name] = Select(place[wanted], len(left), network)
        return graph.call_module(name, (new[operand],))

    for node in old.nodes:
        layer, taken, wanted = copy.deepcopy(layer_of(network, node)), {}, slice(None)
        its = order(node, live[node].expand(width(node))) if width(node) else wanted  # what is left of it
        for operand, mask in reads(network, node, live[node], read, made).items():
            if mask.dim() or isinstance(layer, Select):
                wanted = order(operand, mask)
                if node in made:
                    wanted = made[node][operand][its]
                elif getattr(layer, "groups", 1) > 1:
                    wanted = mask.nonzero().flatten()  # filter by filter as they were
                if (wanted >= 0).any():
                    taken[operand] = take(operand, wanted[wanted >= 0])
        if isinstance(layer, Select):
            new[node] = taken[node.args[0]]
        elif node.target is torch.cat and taken:
            new[node] = graph.call_function(torch.cat, ([*taken.values()], 1))
        else:
            if isinstance(layer, nn.Conv2d):
                cut_conv(layer, wanted, its)
            elif isinstance(layer, DomainBatchNorm2d):
                for norm in layer.values():
                    layer.rows = torch.arange(norm.num_features)[wanted]  # in `network`
                    for rows in [rows for rows in (*norm.parameters(), *norm.buffers()) if rows.dim()]:
                        rows.data = rows.data[wanted]
                        norm.num_features = len(rows)
            elif isinstance(layer, DomainLinear):
                for linear in layer.values():
                    linear.weight = nn.Parameter(linear.weight[:, wanted])
            if node.op in ("call_module", "get_attr"):
                modules[node.target] = layer or operator.attrgetter(node.target)(network)
            new[node] = graph.node_copy(node, (new | taken).get)
    pruned = GraphNetwork(modules, graph, network, True)
    for domain in [domain for domain in pruned.classifiers if domain not in domains]:
        pruned.remove_domain(domain)
    return pruned


def cut_conv(conv, channels, filters):
    """Keep the input channels and the filters at these positions (int64, or a slice), in place."""
    conv.whole = getattr(conv, "whole", {name: p.numel() for name, p in conv.named_parameters(recurse=False)})
    if isinstance(conv, SwitchedConv2d):
        kept, conv.kept = conv.kept.nonzero().flatten(), torch.zeros_like(conv.kept)
        conv.kept[kept[channels]] = True
        for domain, switches in conv.switches.items():
            conv.switches[domain] = nn.Parameter(switches[channels])
    weight = conv.weight[filters][:, channels if conv.groups == 1 else slice(None)].contiguous()
    conv.in_channels = len(torch.arange(conv.in_channels)[channels])
    conv.groups, conv.out_channels = conv.in_channels // weight.shape[1], len(weight)
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias[filters], requires_grad=conv.bias.requires_grad)


def prune(network, domains=None, keep_source=False):
    """A smaller copy of `network` for `domains` (default: all adapted ones), with the same logits for each.
    A channel stays if any of `domains` reads it, then or later: gone are the input channels that no switch
    lets through and the filters that nobody reads, with their batch-norm and part of the residual stream.
    Where a layer reads less than the one before it yields, a Select gathers it. Works for all that torch.fx
    can trace, pruned networks too. The source is served no more, unless keep_source: all of it stays then."""
    domains = served(network, domains)
    if not set(domains) - {network.source}:
        raise InputError("nothing to prune: the network has no adapted domain, only a backbone")
    domains = served(network, [network.source]) + domains if keep_source else domains
    layers, on = switched_layers(network), masks(network, domains)
    for name in layers:
        if not on[name].any(1).all():
            raise InputError(f"a domain has no channel on in {name}: every layer needs one")
    return cut(network, domains, {name: on[name].any(0)[layer.kept] for name, layer in layers.items()})


def without_unused(network, domains):
    """A function (x, domain) -> logits with which to train `network` once the switches of `domains` settled:
    its logits, gradients and running statistics, computed without the channels that none of them reads."""
    small, whole = prune(network, domains).train(), network.state_dict(keep_vars=True)
    rows = {f"{name}.{key}": getattr(layer, "rows", torch.arange(len(value))).to(value.device)
            for name, layer in small.named_modules() if isinstance(layer, DomainModules)
            for key, value in layer.state_dict().items() if value.dim()}

    def forward(x, domain):
        own = {name: whole[name][row] for name, row in rows.items() if f".{domain}." in name}
        logits = torch.func.functional_call(small, own, (x, domain))
        for name, value in own.items():
            if not isinstance(whole[name], nn.Parameter):  # a running statistic
                whole[name][rows[name]] = value
        return logits

    return forward


# -------- 7  Files ------------------------------------------------------------------------------------------

FORMAT = "ba2ps-3"  # the first entry of every checkpoint


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


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
    """Gives the name of a file beside `path`, which is moved there at the end: all of it or nothing."""
    part = f"{path}.{os.getpid()}.part"  # two processes may be at it
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise InputError(f"cannot write {path}: {one_line(error)}") from None
    finally:
        if os.path.isfile(part):
            os.remove(part)


def save(path, network, **facts):
    """Write `network` and `facts` (numbers, strings, lists, dicts, tensors) to `path`, all of it or nothing.
    Of a pruned network: what is left in one tensor, and for switches the masks, from which load builds it."""
    state = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    if network.pruned:
        state = {"all": torch.cat([value.flatten() for name, value in state.items()
                                   if value.is_floating_point() and ".switches." not in name])}
        facts["kept"] = {name: layer.kept for name, layer in switched_layers(network).items()}
        facts["masks"] = masks(network)
    facts |= {"format": FORMAT, "name": network.name, "options": network.options, "image": network.image,
              "state": state, "source": network.source,
              "num_classes": {domain: linear.out_features for domain, linear in network.classifiers.items()}}
    with writing(path) as part:
        torch.save(facts, part)


def build(name, options, source="any", num_classes=1):
    """The backbone that name and options of a network tell: a WideResNet, or a plain one of torchvision."""
    if name.startswith("WRN-"):
        depth, width = map(int, name.split("-")[1:])
        return WideResNet(depth, width, source, num_classes)
    if options is None:
        raise InputError(f"holds a {name} of one's own: give load one, load(path, backbone={name}(...))")
    from torchvision.models import get_model
    return get_model(name, weights=None, **options)


def load(path, backbone=None):
    """(network, facts) of a checkpoint that save wrote, on the CPU; InputError for anything else.
    backbone: the plain network that add_switches was given, of any weights; not needed for a WideResNet and
    for those of torchvision that train.py makes. No code in the file is run (weights_only=True), and its
    checksums are compared."""
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        facts = torch.load(path, map_location="cpu", weights_only=True)
        if facts.pop("format", None) != FORMAT:
            raise ValueError("no checkpoint of this version: give one of train.py or prune.py")
        name, options, image, classes, source, state = (
            facts.pop(key) for key in ("name", "options", "image", "num_classes", "source", "state"))
        kept, on = facts.pop("kept", None), facts.pop("masks", None)
        domains = [domain for domain in classes if domain != source]
        network = copy.deepcopy(backbone) or build(name, options, source, classes.get(source, 1))
        network.to("meta")
        if not isinstance(network, WideResNet):
            network = add_switches(network, {}, source, image[1], name, options)
        for domain in domains:
            network.add_domain(domain, classes[domain])
        if kept:
            for layer_name, layer in switched_layers(network).items():
                for domain, row in zip(domains, on[layer_name], strict=True):
                    layer.switches[domain] = nn.Parameter(1e-3 * (2.0 * row.view_as(layer.kept) - 1))
            network = cut(network, list(classes), kept)
            left = network.state_dict()
            floats = {name: value for name, value in left.items()
                      if value.is_meta and value.is_floating_point()}
            parts = state["all"].split([value.numel() for value in floats.values()])
            state = {name: torch.zeros_like(value, device="cpu") if value.is_meta else value
                     for name, value in left.items()}
            state |= {name: part.view_as(value).clone() for part, (name, value) in zip(parts, floats.items())}
        elif source not in classes:
            network.remove_domain(source)
        wanted = network.state_dict()
        for name in state.keys() & wanted.keys():
            state[name] = state[name].to(wanted[name].dtype)
            if not state[name].isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
        network.load_state_dict(state, assign=True)
    return network, facts


# -------- 8  The same in 2/3 of the memory: norm, ReLU and convolution as one; all works without it ---------

class NormReluConvolution(torch.autograd.Function):
    """conv(relu(norm(x))), batch-norm with the statistics of the batch.
    A switch multiplies y = relu(gamma x^ + beta). With d = dL/dy of all channels on, 0 where y is, its
    gradient is sum(y d) = gamma sum(x^ d) + beta sum(d), and these sums are those of batch-norm's backward
    pass. That y is not kept, only where it is above 0: a byte instead of four."""

    @staticmethod
    def forward(ctx, x, gamma, beta, switches, norm, weight, *geometry):
        y, *saved = torch.native_batch_norm(
            x, gamma, beta, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps)
        norm.num_batches_tracked.add_(1)
        on = (switches > 0).to(weight.dtype)
        ctx.save_for_backward(x, y.relu_().bool(), gamma, beta, on, weight, *saved)
        ctx.rest = norm.eps, geometry
        return F.conv2d(y, weight * on.view(1, -1, 1, 1), None, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, positive, gamma, beta, on, weight, *saved = ctx.saved_tensors
        eps, geometry = ctx.rest
        d = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, False, [0, 0], 1, [True, False, False])[0]
        x_grad, gamma_grad, beta_grad = torch.ops.aten.native_batch_norm_backward(
            d.mul_(positive), x, gamma * on, None, None, *saved, True, eps, [True, True, True])
        switches_grad = torch.addcmul(gamma * gamma_grad, beta, beta_grad)  # straight through: all are on
        return x_grad, gamma_grad.mul_(on), beta_grad.mul_(on), switches_grad, None, None, None, None, None


def fused_norm_relu_conv(norm, conv, x, domain, plain=norm_relu_conv):
    """norm_relu_conv as one function where what `domain` owns is trained in full precision, else as three."""
    if not (isinstance(x, torch.Tensor) and torch.is_grad_enabled() and domain in conv.switches
            and norm[domain].training and type(norm[domain]) is nn.BatchNorm2d
            and not conv.weight.requires_grad and not torch.is_autocast_enabled(x.device.type)):
        return plain(norm, conv, x, domain)
    return NormReluConvolution.apply(x, norm[domain].weight, norm[domain].bias, conv.switches[domain],
                                     norm[domain], conv.weight, conv.stride, conv.padding, conv.dilation)


norm_relu_conv = fused_norm_relu_conv
