# SPDX-License-Identifier: MIT
"""Take out of a trained network what none of its domains uses, for good.

  python prune.py runs/beta0.25/model.pt --out pruned.pt                            # for all adapted domains
  python prune.py runs/beta0.25/model.pt --out signs.pt --domains gtsrb svhn        # for two of them: smaller still
  python prune.py runs/beta0.25/model.pt --out gtsrb.pt --domain gtsrb              # for one, as a plain dense network
  python prune.py runs/beta0.25/model.pt --export gtsrb.pt2 --domain gtsrb          # which runs with torch alone

The pruned checkpoint gives the same logits and is evaluated like any other (evaluate.py). It no longer serves the source
domain, which needs the whole backbone, unless --keep-source keeps that. With --domain the checkpoint also says how the
dense network is built, which ba2ps.load_dense does. Params are everything but the classifiers, relative to the backbone:
as in the paper's Table 2, where input channels alone are pruned, and as stored, where filters are as well. MACs are those
of the convolutions. Latency is measured here and now, of the untouched backbone and of each domain's dense network.
"""
import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings

import torch
import torch.nn as nn

import ba2ps
from ba2ps import InputError


@torch.no_grad()
def latency(models, batch_size, image_size, seconds=1.0):
    """[(milliseconds, memory format)] of one forward(x) of each model, each in its own fastest memory format.

    The median of interleaved repeats, for about so many seconds in all but at least three times.
    """
    images, runs = torch.randn(batch_size, 3, image_size, image_size), []
    for number, model in enumerate(models):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            copied, x = copy.deepcopy(model).to(memory_format=memory_format), images.contiguous(memory_format=memory_format)
            copied(x)
            runs.append((number, memory_format, copied, x, []))
    end = time.perf_counter() + seconds
    while len(runs[0][-1]) < 3 or time.perf_counter() < end:
        for _, _, model, x, times in runs:
            times.append(_milliseconds(model, x))
    medians = [(number, statistics.median(times), memory_format) for number, memory_format, _, _, times in runs]
    return [min((row[1:] for row in medians if row[0] == number), key=lambda row: row[0]) for number in range(len(models))]


def _milliseconds(model, x):
    start = time.perf_counter()
    model(x)
    return 1e3 * (time.perf_counter() - start)


class Backbone(ba2ps.WideResNet):
    """The backbone of `network`, untouched, forward(x); its weights are random, time does not depend on them."""

    def __init__(self, network):
        super().__init__(network.depth, network.widen_factor, "backbone", 10)
        self.eval()

    def forward(self, x):
        return super().forward(x, "backbone")


def show_layers(before, after, image_size):
    """Channels per layer, then params and MACs, before and after."""
    whole, left = ba2ps.switched_layers(before), ba2ps.switched_layers(after)
    print(f"{'':24}{'input channels':^24}{'filters':^24}\n{'':24}{'before':>12}{'after':>12}{'before':>12}{'after':>12}")
    for name in whole:
        numbers = [(layers[name].in_channels, layers[name].out_channels) for layers in (whole, left)]
        print(f"{name:24}{numbers[0][0]:12}{numbers[1][0]:12}{numbers[0][1]:12}{numbers[1][1]:12}")

    print(f"\n{'relative to the backbone':34}{'before':>12}{'after':>12}")
    served = [list(network.classifiers) for network in (before, after)]
    paper = [ba2ps.params(network, domains) for network, domains in zip((before, after), served)]
    print(f"{'params as the paper counts them':34}{paper[0]:12.3f}{paper[1]:12.3f}")
    print(f"{'params as stored':34}{ba2ps.stored_params(before):12.3f}{ba2ps.stored_params(after):12.3f}")
    backbone = ba2ps.macs(after, None, image_size)
    macs = [ba2ps.macs(network, domains, image_size) / backbone for network, domains in zip((before, after), served)]
    print(f"{'MACs as the paper counts them':34}{macs[0]:12.3f}{macs[1]:12.3f}")


def show_domains(network, dense, image_size, measured):
    """What each domain's dense network keeps, costs and takes; `dense`: {domain: network}."""
    layers, width = ba2ps.switched_layers(network).values(), max(map(len, [*dense, "one domain alone"]))
    backbone, total = ba2ps.macs(network, None, image_size), sum(layer.total_channels for layer in layers)
    latencies = f"{'latency, batch 1 (ms)':>30}{'latency, batch 32 (ms)':>32}" if measured else ""
    print(f"\n{'one domain alone':{width}}  channels     MACs   params{latencies}")
    for domain, model in dense.items():
        convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        channels = sum(conv.in_channels for conv in convs[1:])  # not of the stem
        params = sum(p.numel() for conv in convs for p in conv.parameters()) + sum(b.numel() for b in model.buffers())
        cells = ""
        for batch_size in (1, 32) if measured else ():
            (whole, _), (own, _) = latency([Backbone(network), model], batch_size, image_size)
            cells += f"   {whole:9.2f} -> {own:7.2f} {whole / own:5.1f}x"
        print(f"{domain:{width}}{channels:6}/{total:<5}{ba2ps.macs(model, None, image_size) / backbone:7.3f}"
              f"{params / ba2ps.backbone_params(network):9.3f}{cells}")


def export(path, model, record, domain, image_size):
    """Write `model` with torch.export, batch size dynamic; what a user needs to know travels in the file ba2ps.json."""
    known = {"domain": domain, "image_size": image_size, "mean": record["mean"], "std": record["std"],
             "classes": record["classes"], "category_ids": record["category_ids"],
             "input": "float (B, 3, image_size, image_size): RGB / 255, minus mean, over std",
             "output": "logits (B, classes)"}
    program = torch.export.export(model, (torch.zeros(2, 3, image_size, image_size),),
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))

    def write(part):
        with open(part, "wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it wonders at channels-last weights
            torch.export.save(program, file, extra_files={"ba2ps.json": json.dumps(known)})
    ba2ps.write_whole(path, write)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    parser.add_argument("model", help="model.pt of train.py, or a pruned checkpoint")
    parser.add_argument("--out", metavar="FILE", help="where to write the pruned checkpoint")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="domains to keep (default: every adapted one)")
    parser.add_argument("--keep-source", action="store_true", help="keep what the source needs: all of the backbone")
    parser.add_argument("--domain", metavar="NAME", help="keep this one, as a dense network")
    parser.add_argument("--round-to", type=int, default=1, metavar="N", help="fill its channels up to a multiple of N")
    parser.add_argument("--export", metavar="FILE", help="write that dense network with torch.export (.pt2)")
    parser.add_argument("--no-latency", action="store_true", help="do not measure how long the networks take")
    args = parser.parse_args()
    if not args.out and not args.export:
        raise InputError("nothing to write: give --out FILE, or --domain NAME and --export FILE")
    if args.domain and (args.domains or args.keep_source):
        raise InputError("--domain keeps one domain alone: leave out --domains and --keep-source")
    if (args.export or args.round_to != 1) and not args.domain:
        raise InputError("--export and --round-to are for one dense network: add --domain NAME")
    if not 1 <= args.round_to <= 256:
        raise InputError(f"--round-to {args.round_to} is out of range: take 1 to 256")
    for path in filter(None, (args.out, args.export)):
        if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"cannot write {path}: {'it is a directory' if os.path.isdir(path) else 'no such directory'}")

    network, facts = ba2ps.load(args.model)
    ba2ps.check_facts(args.model, network, facts)
    network.eval()
    try:
        pruned = ba2ps.prune(network, [args.domain] if args.domain else args.domains, args.keep_source)
    except InputError as error:
        raise InputError(f"{args.model}: {error}") from None
    facts["domains"] = {domain: facts["domains"][domain] for domain in pruned.classifiers}
    facts.pop("dense", None)  # of the network that is pruned further
    size, measured = facts["image_size"], not args.no_latency
    dense = {domain: ba2ps.dense(pruned, domain, args.round_to) for domain in pruned.classifiers}
    if args.domain:
        model = dense[args.domain]
        memory_format = latency([model], 32, size, 0)[0][1] if measured else torch.channels_last
        model.to(memory_format=memory_format)
        facts["dense"] = {"round_to": args.round_to, "channels_last": memory_format is torch.channels_last}
    if args.export:
        export(args.export, model, facts["domains"][args.domain], args.domain, size)
    if args.out:
        ba2ps.save(args.out, pruned, **facts)

    show_layers(network, pruned, size)
    if args.keep_source:
        without = ba2ps.prune(network, args.domains)
        print(f"\nkeeping the source {network.source} keeps the whole backbone: params as stored "
              f"{ba2ps.stored_params(pruned):.3f}, against {ba2ps.stored_params(without):.3f} without it")
    show_domains(pruned, dense, size, measured)
    print()
    if args.out:
        before, after = os.path.getsize(args.model) / 1e6, os.path.getsize(args.out) / 1e6
        print(f"{args.model} {before:.2f} MB -> {args.out} {after:.2f} MB (classifiers included), "
              f"serving {', '.join(pruned.classifiers)}")
    if args.domain:
        print(f"dense, in {'channels-last' if facts['dense']['channels_last'] else 'NCHW'}: "
              + " and ".join([f"ba2ps.load_dense({args.out!r})"] * bool(args.out)
                             + [f"torch.export.load({args.export!r}).module()"] * bool(args.export)))


def stop(message):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        stop(error)
