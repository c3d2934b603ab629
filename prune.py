# SPDX-License-Identifier: MIT
"""Take out of a trained network what none of its domains uses, for good.

  python prune.py runs/beta0.25/model.pt --out pruned.pt                            # for all adapted domains
  python prune.py runs/beta0.25/model.pt --out signs.pt --domains gtsrb svhn        # for two of them: smaller still

The pruned checkpoint gives the same logits and is evaluated like any other (evaluate.py). It no longer serves the
source domain, which would need the whole backbone. Params are counted as in the paper's Table 2 (everything but the
classifiers), MACs are those of the convolutions as they now stand, which all kept domains pass through.
"""
import argparse
import os
import sys

import ba2ps
from ba2ps import InputError


def show(before, after, image_size):
    """Channels per layer, then params and MACs, before and after."""
    whole, left = ba2ps.switched_layers(before), ba2ps.switched_layers(after)
    print(f"{'input channels of':24}{'before':>12}{'after':>12}")
    for name, layer in left.items():
        bar = "#" * round(40 * layer.in_channels / layer.total_channels)
        print(f"{name:24}{whole[name].in_channels:12}{layer.in_channels:12}  {bar}")
    print(f"{'all':24}{sum(layer.in_channels for layer in whole.values()):12}"
          f"{sum(layer.in_channels for layer in left.values()):12}\n")

    # a network that still serves its source runs every channel
    read = None if before.source in before.classifiers else before.domains
    backbone = ba2ps.macs(after, None, image_size)
    print(f"{'relative to the backbone':24}{'before':>12}{'after':>12}")
    print(f"{'params':24}{ba2ps.params(before, list(before.classifiers)):12.3f}{ba2ps.params(after):12.3f}")
    print(f"{'MACs of the network':24}{ba2ps.macs(before, read, image_size) / backbone:12.3f}"
          f"{ba2ps.macs(after, after.domains, image_size) / backbone:12.3f}")
    for domain in after.domains:
        print(f"  read by {domain:14}{'':12}{ba2ps.macs(after, [domain], image_size) / backbone:12.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    parser.add_argument("model", help="model.pt of train.py, or a pruned checkpoint")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the pruned checkpoint")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="domains to keep (default: every adapted one)")
    args = parser.parse_args()

    network, facts = ba2ps.load(args.model)
    try:
        pruned = ba2ps.prune(network, args.domains)
    except InputError as error:
        raise InputError(f"{args.model}: {error}") from None
    facts["domains"] = {domain: facts["domains"][domain] for domain in pruned.domains}
    ba2ps.save(args.out, pruned, **facts)
    show(network, pruned, facts["image_size"])
    print(f"\n{args.model} {os.path.getsize(args.model) / 1e6:.2f} MB -> {args.out} {os.path.getsize(args.out) / 1e6:.2f} MB "
          f"(classifiers included), serving {', '.join(pruned.domains)}")


def stop(message):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        stop(error)
