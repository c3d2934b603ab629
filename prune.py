# SPDX-License-Identifier: MIT
"""Take out of a trained network what none of its domains uses, for good.

  python prune.py runs/beta0.25/model.pt --out pruned.pt                       # for all adapted domains
  python prune.py runs/beta0.25/model.pt --out signs.pt --domains gtsrb svhn   # for two: smaller still
  python prune.py runs/beta0.25/model.pt --out gtsrb.pt --domain gtsrb         # for one, as a dense network
  python prune.py runs/beta0.25/model.pt --export gtsrb.pt2 --domain gtsrb     # which runs with torch alone

The pruned checkpoint gives the same logits and is evaluated like any other (evaluate.py). It no longer serves
the source, which needs the whole backbone, unless --keep-source keeps that. Of a checkpoint that serves one
domain load_dense makes a plain, dense network. Params are everything but the classifiers, relative to the
backbone: as in Table 2 of the paper, where input channels alone are pruned, and as stored, where filters are
too. MACs are those of the convolutions. Latency is measured here and now, of backbone and dense networks.
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
from torch.utils.flop_counter import FlopCounterMode

import ba2ps


# -------- dense networks ------------------------------------------------------------------------------------

def arrange(network, read, graph, live, made):
    """{node: (C,) rank of its channels} for ba2ps.cut, such that layers find what they read side by side.

    A slice is nearly free, a gather is not. Channels are sorted by who reads them, the last reader first, as
    in a reflected Gray code: what each of the last two reads is then one run, and so is what is read from any
    point on. Nodes that an addition, a Select or a channelwise operation ties have one order. What joins
    channels or convolves them in groups keeps the order that it has.
    """
    tied = {}  # node: (root, whose channels these are, (C,) the position there of each of its own)
    for node in [node for node in graph.nodes if live[node].dim()]:
        its, places = made.get(node, {}), [tied[operand] for operand in made.get(node, ()) if operand in tied]
        if its and all((at >= 0).all() for at in its.values()):
            root, at = max(places, key=lambda place: len(live[place[0]]), default=(None, None))
            for other, own in places:  # what a convolution adds to a stream takes the stream's order
                if other is not root and len(live[other]) == len(at):
                    at_root = at[own.argsort()]
                    tied |= {n: (root, at_root[its]) for n, (r, its) in tied.items() if r is other}
            first, at = next(iter(its.items()))
            if first in tied:
                tied[node] = tied[first][0], tied[first][1][at]
        elif getattr(ba2ps.layer_of(network, node), "groups", 0) == 1:
            tied[node] = node, torch.arange(len(live[node]))
    readers = {root: [] for root, _ in tied.values()}  # root: [(C,) what a node reads of it], the last first
    for node in reversed(graph.nodes):
        for operand, mask in ba2ps.reads(network, node, live[node], read, made).items():
            if operand in tied:
                root, at = tied[operand]
                its = torch.zeros_like(live[root])
                its[at[mask]] = True
                if not its.all() and not any(its.equal(other) for other in readers[root]):
                    readers[root].append(its)
    ranks = {}
    for root, masks in readers.items():
        code = torch.stack([~live[root], *masks]).cumsum(0).T % 2  # (C, 1 + readers), Gray code to binary
        ranks[root] = torch.tensor(sorted(range(len(code)), key=code.tolist().__getitem__)).argsort()
    joined = {tied[operand][0] for node in graph.nodes if node.target is torch.cat
              for operand in ba2ps.operands_of(node) if operand in tied}
    return {node: ranks[root][at] for node, (root, at) in tied.items() if root not in joined}


FRESH = (torch.conv2d, torch.addcmul, torch.relu_, "add_")  # whose result dense lets its only reader change


@torch.no_grad()
def dense(network, domain=None):
    """A plain network that serves `domain` alone, for inference: forward(x), x (B, 3, H, W) -> (B, classes).

    It has the domain's own channels, not those of all domains. Batch-norm is folded into the convolution
    before it; where there is none it becomes an addcmul. Convolutions are functions, not modules: at batch 1
    the calls are a good part of the time. All run in channels-last but those that read the image, in NCHW,
    which for three channels is five times as fast. domain: default, the last one.
    """
    [domain] = ba2ps.served(network, [domain or list(network.classifiers)[-1]])
    network = copy.deepcopy(network).eval()
    read = {name: layer.read(domain) for name, layer in ba2ps.switched_layers(network).items()}
    small = ba2ps.cut(network, [domain], read, lambda *found: arrange(network, read, *found))
    graph, parts, new = fx.Graph(), {}, {}

    def part(name, value):
        parts[name] = nn.Parameter(value, requires_grad=False)
        return graph.get_attr(name)

    for node in [node for node in small.graph.nodes if node.target != "domain"]:
        layer, operands = ba2ps.layer_of(small, node), ba2ps.operands_of(node)
        name = str(node.target).replace(".", "_")  # flat: every dot is a look-up at every call
        mine = [operand for operand in operands if len(operand.users) == 1 and new[operand].target in FRESH]
        whole = [operand for operand in mine if node.target is operator.add  # shapes of before the cut
                 and operand.meta["value"].shape == node.meta["value"].shape]
        x = new[operands[0]] if operands else None
        if isinstance(layer, ba2ps.DomainBatchNorm2d) and layer[domain].track_running_stats:
            norm = layer[domain]
            scale = (norm.weight if norm.affine else 1) / (norm.running_var + norm.eps).sqrt()
            shift = (norm.bias if norm.affine else 0) - norm.running_mean * scale
            if mine and x.target is torch.conv2d:
                if x.args[2] is None:
                    with graph.inserting_before(x):
                        x.update_arg(2, part(f"{name}_bias", torch.zeros_like(shift)))
                parts[x.args[1].target].mul_(scale.view(-1, 1, 1, 1))
                parts[x.args[2].target].mul_(scale).add_(shift)
                new[node] = x
            else:
                ones = [1] * (node.meta["value"].dim() - 2)
                shift, scale = shift.view(-1, *ones), scale.view(-1, *ones)
                args = part(f"{name}_shift", shift), x, part(f"{name}_scale", scale)
                new[node] = graph.call_function(torch.addcmul, args)
        elif isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
            form = torch.contiguous_format if x.op == "placeholder" else torch.channels_last
            weight = part(f"{name}_weight", layer.weight.contiguous(memory_format=form))
            bias = None if layer.bias is None else part(f"{name}_bias", layer.bias)
            args = x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
            new[node] = graph.call_function(torch.conv2d, args)
        elif node.target is operator.add and len(operands) == 2 and whole:
            args = new[whole[-1]], new[operands[whole[-1] is operands[0]]]
            new[node] = graph.call_method("add_", args)
        elif mine and (node.target in (nn.functional.relu, torch.relu, "relu") or isinstance(layer, nn.ReLU)):
            new[node] = graph.call_function(torch.relu_, (x,))
        elif isinstance(layer, ba2ps.Select) and (layer.index.diff() == 1).all():
            new[node] = graph.call_function(torch.narrow, (x, 1, int(layer.index[0]), len(layer.index)))
        elif layer is not None:
            parts[name] = layer[domain] if isinstance(layer, ba2ps.DomainModules) else layer
            args = [word for word in node.args if getattr(word, "target", None) != "domain"]
            new[node] = graph.call_module(name, *fx.node.map_arg((tuple(args), node.kwargs), new.get))
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(small)
            new[node] = part(name, value) if isinstance(value, torch.Tensor) else False  # in training
        else:
            new[node] = graph.node_copy(node, new.get)
            if node.target == "view":
                new[node].target = "reshape"  # channels-last has other strides
    for node in graph.find_nodes(op="call_function", target=torch.conv2d):
        if node.args[0].op == "placeholder":
            with graph.inserting_after(node):
                rest = graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
            node.replace_all_uses_with(rest, lambda user: user is not rest)
    return fx.GraphModule(parts, graph).eval().requires_grad_(False)


def specialise(network):
    """`dense` for every domain that `network` serves, in one module with its forward(x, domain).

    Each runs at its own complexity, not the union's, but holds weights of its own: batch-norm is in them.
    """
    return ba2ps.DomainModules({domain: dense(network, domain) for domain in network.classifiers}).eval()


def load_dense(path):
    """(dense network, facts) of a checkpoint that serves one domain, as prune.py --domain writes it."""
    network, facts = ba2ps.load(path)
    if len(network.classifiers) != 1:
        raise ba2ps.InputError(f"{path} serves more domains than one: prune it with prune.py --domain NAME")
    return dense(network), facts


# -------- what they cost ------------------------------------------------------------------------------------

def stored_params(network):
    """Memory of a network as the file of a pruned one stores it, relative to the backbone's convolutions.

    The weights that are left, four floats a row and domain of batch-norm, a bit a switch of the backbone.
    """
    shared = ba2ps.shared_layers(network).values()
    weights = sum(p.numel() for module in shared for p in module.parameters(recurse=False))
    rows = sum(norm.num_features for norms in network.modules()
               if isinstance(norms, ba2ps.DomainBatchNorm2d) for norm in norms.values())
    bits = sum(on.numel() for on in ba2ps.masks(network).values())
    return (weights + 4 * rows + bits / 32) / sum(ba2ps.table(network).values())


@torch.no_grad()
def dense_macs(model, image_size):
    """Multiply-accumulates of the convolutions of a dense network for one crop."""
    with FlopCounterMode(display=False) as counter:
        model(next(model.parameters()).new_zeros(1, 3, image_size, image_size))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution] // 2


@torch.no_grad()
def latency(network, models, batch_size, image_size, seconds=0.25, device="cpu"):
    """Milliseconds of one forward pass: [of the backbone of `network`, *of each dense network of `models`].

    Medians of interleaved repeats, at least three; the backbone is timed in its faster memory format.
    """
    x, runs = torch.randn(batch_size, network.image[0], image_size, image_size, device=device), []
    for form in (torch.contiguous_format, torch.channels_last):
        backbone = ba2ps.build(network.name, network.options, "any").eval().to(device, memory_format=form)
        words = ["any"] if isinstance(backbone, ba2ps.WideResNet) else []
        runs.append((backbone, x.contiguous(memory_format=form), *words))
    runs += [(model.to(device), x) for model in models]
    times, end = [[] for _ in runs], time.perf_counter() + seconds * len(runs)
    while len(times[0]) < 4 or time.perf_counter() < end:
        for (model, *inputs), its in zip(runs, times):
            start = time.perf_counter()
            model(*inputs)
            if x.is_cuda:
                torch.cuda.synchronize()
            its.append(1e3 * (time.perf_counter() - start))
    nchw, channels_last, *rest = [statistics.median(its[1:]) for its in times]  # the first round warms up
    return [min(nchw, channels_last), *rest]


def show_layers(before, after, image_size):
    """Channels per layer, then params and MACs, before and after."""
    left, both = ba2ps.switched_layers(after), f"{'before':>12}{'after':>12}"
    print(f"{'':24}{'input channels':^24}{'filters':^24}\n{'':24}{both}{both}")
    for name, conv in ba2ps.switched_layers(before).items():
        print(f"{name:24}{conv.in_channels:12}{left[name].in_channels:12}{conv.out_channels:12}"
              f"{left[name].out_channels:12}")
    print(f"\n{'relative to the backbone':34}{both}")
    for what, share in (("params as the paper counts them", ba2ps.params),
                        ("params as stored", lambda net, domains: stored_params(net)),
                        ("MACs as the paper counts them", lambda net, domains: ba2ps.share(
                            net, domains, "macs", image_size))):
        print(f"{what:34}" + "".join(f"{share(net, list(net.classifiers)):12.3f}" for net in (before, after)))


def show_domains(network, models, image_size, measured):
    """What each domain's dense network keeps, costs and takes; models: {domain: dense network}."""
    width, backbone = max(map(len, [*models, "one domain alone"])), ba2ps.macs(network, None, image_size)
    latencies = f"{'latency, batch 1 (ms)':>30}{'latency, batch 32 (ms)':>32}" if measured else ""
    print(f"\n{'one domain alone':{width}}  channels     MACs   params{latencies}", flush=True)
    taken = [latency(network, models.values(), size, image_size) for size in (1, 32)] if measured else []
    for place, (domain, model) in enumerate(models.items(), 1):
        on = torch.cat(list(ba2ps.masks(network, [domain]).values()), 1)
        params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifiers"))
        cells = [f"   {its[0]:9.2f} -> {its[place]:7.2f} {its[0] / its[place]:5.1f}x" for its in taken]
        macs, params = dense_macs(model, image_size) / backbone, params / sum(ba2ps.table(network).values())
        print(f"{domain:{width}}{on.sum():6}/{on.numel():<5}{macs:7.3f}{params:9.3f}{''.join(cells)}")


# -------- the script ----------------------------------------------------------------------------------------

def export(path, model, known):
    """Write a dense network with torch.export, for any batch size, and in it `known` as ba2ps.json."""
    image = torch.zeros(2, 3, known["image_size"], known["image_size"])
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with ba2ps.writing(path) as part, open(part, "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it wonders at channels-last weights
        torch.export.save(program, file, extra_files={"ba2ps.json": json.dumps(known)})


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.error = stop
    add = flags.add_argument
    add("model", help="model.pt of train.py, or a pruned checkpoint")
    add("--out", metavar="FILE", help="where to write the pruned checkpoint")
    add("--domains", nargs="+", metavar="NAME", help="domains to keep (default: every adapted one)")
    add("--keep-source", action="store_true", help="keep what the source needs: all of the backbone")
    add("--domain", metavar="NAME", help="keep this one, as a dense network")
    add("--export", metavar="FILE", help="write that dense network with torch.export (.pt2)")
    add("--no-latency", action="store_true", help="do not measure how long the networks take")
    args = flags.parse_args()
    if not args.out and not args.export:
        stop("nothing to write: give --out FILE, or --domain NAME and --export FILE")
    if args.domain and (args.domains or args.keep_source) or args.export and not args.domain:
        stop("--domain keeps one network: it goes with --export, but not with --domains or --keep-source")
    network, facts = ba2ps.load(args.model)
    with ba2ps.reading(args.model):
        pruned = ba2ps.prune(network, [args.domain] if args.domain else args.domains, args.keep_source)
        models = {domain: dense(pruned, domain) for domain in pruned.classifiers}
        facts["domains"] = {domain: facts["domains"][domain] for domain in models}
        known = {"domain": args.domain, "image_size": facts["image_size"], "output": "logits (B, classes)",
                 "input": "float (B, 3, image_size, image_size): RGB / 255, minus mean, over std",
                 **facts["domains"].get(args.domain, {})}
    if args.export:
        export(args.export, models[args.domain], known)
    if args.out:
        ba2ps.save(args.out, pruned, **facts)

    show_layers(network, pruned, facts["image_size"])
    if args.keep_source:
        print(f"\nthe source {network.source} keeps the whole backbone; params as stored without it are "
              f"{stored_params(ba2ps.prune(network, args.domains)):.3f}")
    show_domains(pruned, models, facts["image_size"], not args.no_latency)
    if args.out:
        before, after = os.path.getsize(args.model) / 1e6, os.path.getsize(args.out) / 1e6
        print(f"\n{args.model} {before:.2f} MB -> {args.out} {after:.2f} MB (classifiers included), "
              f"serving {', '.join(models)}")
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
