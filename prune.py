# SPDX-License-Identifier: MIT
"""Take out of a trained network what none of its domains uses.

  python prune.py runs/first/model.pt --out small.pt                      # all adapted domains
  python prune.py runs/first/model.pt --out two.pt --domains gtsrb svhn   # two: smaller still
  python prune.py runs/first/model.pt --out one.pt --domain gtsrb         # for load_dense
  python prune.py runs/first/model.pt --export one.pt2 --domain gtsrb     # needs torch alone

The logits stay the same. The source needs the whole backbone: --keep-source. Params are relative
to the backbone, without classifiers: as in Table 2 of the paper, where input channels alone are
pruned, and as stored, where filters are too.
"""
import argparse
import copy
import json
import operator
import os
import statistics
import sys
import time
import warnings

import torch
import torch.fx as fx
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.flop_counter import FlopCounterMode

import ba2ps

# -------- dense networks --------

@torch.no_grad()
def dense(network, domain=None):
    """A plain network for `domain` alone (default: the last one): (B, C, H, W) -> (B, classes).

    For inference: batch-norm is folded into the convolution before it, and convolutions are
    functions in channels-last. InputError if the logits are not the same.
    """
    [domain] = ba2ps.served(network, [domain or list(network.classes)[-1]])
    small, _ = ba2ps.cut(network, [domain], ba2ps.channels_of(network, [domain]))
    graph = ba2ps.trace(small.eval())
    for node in list(graph.nodes):
        if isinstance(ba2ps.layer_of(small, node), ba2ps.PerDomain):
            node.target = f"{node.target}.{domain}"
            fold(small, node)
    for node in list(graph.nodes):
        quicken(small, node)
    parts = {}                              # at names without dots: each is a look-up
    for node in graph.nodes:
        node.meta.clear()
        if node.op in ("call_module", "get_attr"):
            parts[f"part_{node.name}"] = operator.attrgetter(node.target)(small.backbone)
            node.target = f"part_{node.name}"
    model = fx.GraphModule(parts, graph).eval().requires_grad_(False)
    model.meta["channels"] = network.channels

    x = black(model, 2, network.image_size)
    x += torch.arange(x.numel()).sin().view(x.shape).to(x)
    logits = copy.deepcopy(network).eval()(x, domain)
    near = 3 * torch.finfo(x.dtype).eps ** 0.5 * logits.abs().max()
    if not (model(x) - logits).abs().max() <= near:
        raise ba2ps.InputError(f"{network.name}: {domain} has other logits when it is dense")
    return model


def fold(network, node):
    """Put a batch-norm into the convolution before it, or else make an addcmul of it."""
    norm = ba2ps.layer_of(network, node)
    if type(norm) is not nn.BatchNorm2d or norm.running_var is None:
        return                              # a subclass may do more
    rest = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    x = node.args[0]
    conv = ba2ps.layer_of(network, x)
    if ba2ps.is_conv(conv) and len(x.users) == 1:
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *rest)
        node.replace_all_uses_with(x)
        node.graph.erase_node(node)
    else:
        ones = torch.ones_like(norm.running_var).view(-1, 1, 1)
        norm.weight, shift = fuse_conv_bn_weights(ones, None, *rest)
        norm.bias = nn.Parameter(shift.view(-1, 1, 1))
        become(node, torch.addcmul, tensor(node, "bias"), x, tensor(node, "weight"))


def quicken(network, node):
    """Let a node do the same in less time."""
    layer = ba2ps.layer_of(network, node)
    mine = [one for one in node.all_input_nodes if one.meta.get("fresh") and len(one.users) == 1]
    if ba2ps.is_conv(layer) and layer.padding_mode == "zeros":
        x = node.args[0]
        if x.op != "placeholder":           # for an image NCHW is faster
            layer.to(memory_format=torch.channels_last)
        bias = None if layer.bias is None else tensor(node, "bias")
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        become(node, torch.conv2d, x, tensor(node, "weight"), bias, *geometry)
    elif mine and (type(layer) is nn.ReLU or node.target in (nn.functional.relu, torch.relu)):
        become(node, torch.relu_, mine[0])
    elif node.target is operator.add and len(node.all_input_nodes) == 2:
        whole = [one for one in mine if one.meta["value"].shape == node.meta["value"].shape]
        if whole:
            become(node, operator.iadd, whole[0], node.args[node.args[0] is whole[0]])
    elif isinstance(layer, ba2ps.Select) and (layer.index.diff() == 1).all():
        if all(node not in user.meta.get("written", ()) for user in node.users):
            become(node, torch.narrow, node.args[0], 1, int(layer.index[0]), len(layer.index))
    elif node.op == "call_method" and node.target == "view":
        node.target = "reshape"             # channels-last has other strides


def tensor(node, name):
    with node.graph.inserting_before(node):
        return node.graph.get_attr(f"{node.target}.{name}")


def become(node, function, *args):
    node.op = "call_function"
    node.target = function
    node.args = args
    node.kwargs = {}
    node.meta["fresh"] = function is not torch.narrow       # its only reader may change it


def load_dense(path, backbone=None):
    """(dense network, facts) of a checkpoint that serves one domain."""
    network, facts = ba2ps.load(path, backbone)
    if len(network.classes) != 1:
        raise ba2ps.InputError(f"{path} serves more domains than one: prune it with --domain")
    return dense(network), facts


# -------- what they cost --------

def stored_params(network):
    """Memory as a file holds it, relative to the backbone; four floats a row of batch-norm."""
    weights = sum(network.layer("").get_parameter(name).numel() for name in network.whole)
    rows = 0
    for part in network.parts():
        rows += sum(norm.num_features for norm in part.values() if isinstance(norm, ba2ps.NORMS))
    bits = len(network.domains) * sum(map(len, network.kept.values()))
    return (weights + 4 * rows + bits / 32) / sum(network.whole.values())


def black(model, number, size):
    """Black images for a dense network; a pickled one loses its C and gets 3."""
    channels = getattr(model, "meta", {}).get("channels", 3)
    return next(model.parameters()).new_zeros(number, channels, size, size)


@torch.no_grad()
def dense_macs(model, image_size):
    """Multiply-accumulates of the convolutions for one crop."""
    with FlopCounterMode(display=False) as counter:
        model(black(model, 1, image_size))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution] // 2


@torch.no_grad()
def latency(network, models, batch_size, image_size, seconds=0.25, device="cpu"):
    """[ms of a pass of the backbone in its faster memory format, *those of dense `models`]."""
    x = torch.randn(batch_size, network.channels, image_size, image_size, device=device)
    runs = [(model.to(device), x) for model in models]
    for form in (torch.contiguous_format, torch.channels_last):
        backbone = ba2ps.build(network.name, network.options).eval()
        runs.append((backbone.to(device, memory_format=form), x.contiguous(memory_format=form)))
    times = [[] for _ in runs]
    end = time.perf_counter() + seconds * len(runs)
    while len(times[0]) < 4 or time.perf_counter() < end:   # the first round warms up
        for (model, images), taken in zip(runs, times):
            start = time.perf_counter()
            model(images)
            if x.is_cuda:
                torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - start))
    *rest, nchw, channels_last = [statistics.median(taken[1:]) for taken in times]
    return [min(nchw, channels_last), *rest]


def show_layers(before, after):
    both = f"{'before':>12}{'after':>12}"
    print(f"{'':24}{'input channels':^24}{'filters':^24}\n{'':24}{both}{both}")
    for name, old in ba2ps.switched_layers(before).items():
        new = after.layer(name)
        print(f"{name:24}{old.in_channels:12}{new.in_channels:12}"
              f"{old.out_channels:12}{new.out_channels:12}")
    print(f"\n{'relative to the backbone':34}{both}")
    rows = {"params as the paper counts them": lambda net: ba2ps.params(net, net.classes),
            "params as stored": stored_params,
            "MACs as the paper counts them": lambda net: ba2ps.share(net, net.classes, "macs")}
    for name, share in rows.items():
        print(f"{name:34}{share(before):12.3f}{share(after):12.3f}")


def show_domains(network, models, measured):
    """A row for each of models, {domain: dense network}."""
    width = max(map(len, [*models, "one domain alone"]))
    sizes = (1, 32) if measured else ()
    times = "".join(f"{f'latency, batch {size} (ms)':>30}" for size in sizes)
    print(f"\n{'one domain alone':{width}}  channels     MACs   params{times}", flush=True)
    taken = [latency(network, models.values(), size, network.image_size) for size in sizes]
    total = sum(map(len, network.kept.values()))
    backbone = ba2ps.macs(network)
    for place, (domain, model) in enumerate(models.items(), 1):
        on = int(ba2ps.read(network, domain).sum())
        macs = dense_macs(model, network.image_size) / backbone
        params = -sum(map(torch.numel, network.layer(network.classifier)[domain].parameters()))
        params += sum(map(torch.numel, model.parameters()))
        params /= sum(network.whole.values())
        row = f"{domain:{width}}{on:6}/{total:<5}{macs:7.3f}{params:9.3f}"
        for times in taken:
            row += f"   {times[0]:9.2f} -> {times[place]:7.2f} {times[0] / times[place]:5.1f}x"
        print(row)


# -------- the script --------

def export(path, model, known):
    """Write a dense network with torch.export; known: {"image_size": S, ...}, its ba2ps.json."""
    images = black(model, 2, known["image_size"])
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (images,), dynamic_shapes=(batch,))
    extra = {"ba2ps.json": json.dumps(ba2ps.plain(known))}
    warnings.filterwarnings("ignore", "No complete tensor")     # of channels-last weights
    with ba2ps.writing(path) as part, open(part, "wb") as file:
        torch.export.save(program, file, extra_files=extra)


def parse():
    raw = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flags.error = stop
    add = flags.add_argument
    add("model", help="model.pt of train.py, or a pruned checkpoint")
    add("--out", metavar="FILE", help="where to write the pruned checkpoint")
    add("--domains", nargs="+", metavar="NAME", help="domains to keep (default: all adapted ones)")
    add("--keep-source", action="store_true", help="keep the source: all of the backbone")
    add("--domain", metavar="NAME", help="keep this one, as a dense network")
    add("--export", metavar="FILE", help="write that dense network with torch.export (.pt2)")
    add("--no-latency", action="store_true", help="do not measure how long they take")
    args = flags.parse_args()
    if not args.out and not args.export:
        stop("nothing to write: give --out FILE, or --domain NAME and --export FILE")
    if args.domain and (args.domains or args.keep_source) or args.export and not args.domain:
        stop("--domain keeps one network: it goes with --export, not --domains or --keep-source")
    return args


def main():
    args = parse()
    network, facts = ba2ps.load(args.model)
    with ba2ps.reading(args.model):
        wanted = [args.domain] if args.domain else args.domains
        pruned = ba2ps.prune(network, wanted, args.keep_source)
        models = {domain: dense(pruned, domain) for domain in pruned.classes}
        facts["domains"] = {domain: facts["domains"][domain] for domain in models}
    if args.export:
        known = {"domain": args.domain, "image_size": network.image_size,
                 "input": "float (B, 3, image_size, image_size): RGB / 255, minus mean, over std",
                 "output": "logits (B, classes)", **facts["domains"][args.domain]}
        export(args.export, models[args.domain], known)
    if args.out:
        ba2ps.save(args.out, pruned, **facts)

    show_layers(network, pruned)
    if args.keep_source:
        rest = stored_params(ba2ps.prune(network, args.domains))
        print(f"\nthe source {network.source} keeps the whole backbone; "
              f"params as stored without it are {rest:.3f}")
    show_domains(pruned, models, not args.no_latency)
    if args.out:
        before = os.path.getsize(args.model) / 1e6
        after = os.path.getsize(args.out) / 1e6
        print(f"\n{args.model} {before:.2f} MB -> {args.out} {after:.2f} MB "
              f"(classifiers included), serving {', '.join(models)}")
        if args.domain:
            print(f"dense: prune.load_dense({args.out!r})")
    if args.export:
        print(f"dense: torch.export.load({args.export!r}).module()")


def stop(message):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except ba2ps.InputError as error:
        stop(error)
