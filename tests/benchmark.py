# SPDX-License-Identifier: MIT
"""What the project promises, measured: no test, for time depends on the machine; figures are ratios.

  python tests/benchmark.py inference     # size and speed of pruned WRN-28-4: nine domains, shared random masks, 64 px

inference: params as stored, and the speed-up of one domain's dense network over the backbone in its own fastest memory
format, as a share of what the ratio of MACs promises. Eager mode; --compile adds torch.compile, apart. With the package
torch-pruning installed, the same backbone pruned by it to the same channels where it can (it has no gathers: the
residual stream is one width per group, so block inputs stay as wide as the stream) is timed next to ours.
"""
import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ba2ps
from prune import Backbone, latency

STORED = {0.25: 0.25, 0.5: 0.46, 0.75: 0.73}  # at most
SPEED = {32: 0.70, 1: 0.50}  # at least, of the MAC ratio, at usage 0.25 and 0.5; batch size -> share


def masked(usage, domains=9, seed=0):
    """WRN-28-4 with random masks, the same for all domains, and batch-norm as if trained."""
    torch.manual_seed(seed)
    net = ba2ps.WideResNet(28, 4, "source", 10)
    for i in range(domains):
        net.add_domain(f"d{i}", 10)
    for layer in ba2ps.switched_layers(net).values():
        on = torch.zeros(layer.in_channels)
        on[torch.randperm(layer.in_channels)[:round(usage * layer.in_channels)]] = 1
        for domain in net.domains:
            layer.switches[domain].data = 1e-3 * (2 * on - 1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return net.eval()


def plain(net):
    """The backbone as ordinary layers, which is what torch-pruning knows."""
    graph, layers, new = torch.fx.Graph(), {}, {}
    for node in ba2ps._Tracer().trace(net).nodes:
        if node.op == "call_module":
            layer = copy.deepcopy(net.get_submodule(node.target))
            if isinstance(layer, ba2ps.DomainModules):
                layer = layer[net.source]
            elif isinstance(layer, nn.Conv2d):
                conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                                 bias=False)
                conv.weight = layer.weight
                layer = conv
            layers[node.target], new[node] = layer, graph.call_module(node.target, (new[node.args[0]],))
        elif node.target != "domain":
            new[node] = graph.node_copy(node, new.get)
    return torch.fx.GraphModule(layers, graph).eval()


def torch_pruned(net, model):
    """The backbone pruned by torch-pruning: inside every block the widths of ours, the stream as wide as ours is."""
    import torch_pruning
    theirs = plain(net)
    example = torch.randn(1, 3, 64, 64)
    ours = {name: getattr(model, name.replace(".", "_")) for name, conv in net.named_modules() if isinstance(conv, nn.Conv2d)}
    for name, conv in list(theirs.named_modules()):
        if isinstance(conv, nn.Conv2d) and (name.endswith("conv1") or name.endswith("shortcut")):
            graph = torch_pruning.DependencyGraph().build_dependency(theirs, example_inputs=example)
            surplus = list(range(ours[name].out_channels, conv.out_channels))
            if surplus:
                graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, idxs=surplus).prune()
    return theirs


@torch.no_grad()
def inference(args):
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32; ratios, * a bar that is missed")
    backbone = None
    for usage, most in STORED.items():
        net = masked(usage)
        backbone = backbone or Backbone(net)
        small = ba2ps.prune(net)
        stored, model = ba2ps.stored_params(small), ba2ps.dense(small, "d0", args.round_to)
        promise = ba2ps.macs(net) / ba2ps.macs(model)
        print(f"usage {usage:.2f}   params as stored {stored:.3f}{' ' if stored <= most else '*'} (at most {most}), as the "
              f"paper counts {ba2ps.params(small):.3f}; MACs / {promise:.2f}", flush=True)
        if usage not in (0.25, 0.5):
            continue
        models = {"dense": model}
        try:
            with torch.enable_grad():
                models["torch-pruning"] = torch_pruned(net, model)
        except ImportError:
            pass
        if args.compile:
            models["dense, compiled"], models["backbone, compiled"] = torch.compile(model), torch.compile(Backbone(net))
        for batch_size, share in SPEED.items():
            (whole, form), *rest = latency([backbone, *models.values()], batch_size, 64, args.seconds)
            for (name, other), (time, memory_format) in zip(models.items(), rest):
                missed = name == "dense" and whole / time / promise < share
                macs = "" if name != "torch-pruning" else f", its MACs / {ba2ps.macs(net) / ba2ps.macs(other):.2f}"
                print(f"   batch {batch_size:2}   {name:18} {whole / time:6.2f} x the backbone, {whole / time / promise:.2f}"
                      f"{'*' if missed else ' '}of the promise{f' (at least {share:.2f})' if name == 'dense' else ''}; "
                      f"{_name(memory_format)} against {_name(form)}{macs}", flush=True)


def _name(memory_format):
    return "channels-last" if memory_format is torch.channels_last else "NCHW"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["inference"])
    parser.add_argument("--seconds", type=float, default=20, help="of interleaved repeats, for each batch size")
    parser.add_argument("--round-to", type=int, default=1, metavar="N")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    args = parser.parse_args()
    {"inference": inference}[args.what](args)


if __name__ == "__main__":
    main()
