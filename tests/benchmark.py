# SPDX-License-Identifier: MIT
"""What the project promises, measured: no test, for time depends on the machine; figures are ratios.

  python tests/benchmark.py inference     # size and speed of pruned WRN-28-4: nine domains, shared random masks, 64 px
  python tests/benchmark.py training      # a step with switches beside one without, one of fine-tuning, and the least there is
  python tests/benchmark.py recipes       # what an image costs BA2, the search of recipe held, and --refine after it
  python tests/benchmark.py data          # what reading images costs beside WRN-28-1 at 32 px, and what a million of them

inference: params as stored, and the speed-up of one domain's dense network over the backbone in its own fastest memory
format, as a share of what the ratio of MACs promises. Eager mode; --compile adds torch.compile, apart. With the package
torch-pruning installed, the same backbone pruned by it to the same channels where it can (it has no gathers: the
residual stream is one width per group, so block inputs stay as wide as the stream) is timed next to ours.

training: a step of batch 32 with switches, budget and sharing loss over ten domains, both optimizers; the same step of the
frozen backbone without switches; full fine-tuning; and the floor, one forward and one input-gradient pass of the frozen
backbone. Medians of interleaved repeats, each in its own faster memory format. What the sharing loss takes is the difference to
the same step without it. The rate of the convolutions is held against that of a large matrix product. Peak memory is that of
a process of its own for each kind of step, less what it was before the first.

recipes: train.py's steps with one thread, WRN-28-2 at 32 px, four domains, random masks that the domains share: BA2 with batch 32
and 16; held with batch 16 until its switches have settled; the pruned network with batch 16. From these, the epochs of --refine
that after three epochs of search take as long as fifteen of BA2.

data: the share of an epoch that goes into batches once the cache is warm, batch 32; images/s from the cache over images/s
decoded; the evaluation of ten crops over ten forward passes of one crop each, already on the device; and the memory that a
domain of a million images takes, the cache a sparse file. Medians of repeats side by side. Memory is Anonymous of
/proc/self/smaps_rollup, what the process cannot give back: pages of the mapped cache are the system's.
"""
import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ba2ps
import evaluate
from prune import Backbone, latency

STORED = {0.25: 0.25, 0.5: 0.46, 0.75: 0.73}  # at most
SPEED = {32: 0.70, 1: 0.50}  # at least, of the MAC ratio, at usage 0.25 and 0.5; batch size -> share


def masked(usage, domains=9, seed=0, widen_factor=4):
    """WRN-28 with random masks, the same for all domains, and batch-norm as if trained."""
    torch.manual_seed(seed)
    net = ba2ps.WideResNet(28, widen_factor, "source", 10)
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


KINDS = ("switches", "no sharing loss", "no switches", "fine-tuning", "floor")


def step_of(kind, widen_factor, size, memory_format, domains=10):
    """A function that does one training step of this kind, batch 32."""
    torch.manual_seed(0)
    net = ba2ps.WideResNet(28, widen_factor, "source", 10)
    names = [f"d{i}" for i in range(domains)]
    for name in names:
        net.add_domain(name, 10)
    if kind in ("no switches", "fine-tuning", "floor"):
        for layer in ba2ps.switched_layers(net).values():
            layer.switches.clear()
    net.freeze_backbone()
    if kind == "fine-tuning":
        net.requires_grad_(True)
    if kind == "floor":
        net.requires_grad_(False)
    net.to(memory_format=memory_format).train()
    x = torch.randn(32, 3, size, size).to(memory_format=memory_format).requires_grad_(kind == "floor")
    y = torch.randint(10, (32,))
    layers = ba2ps.switched_layers(net).values()
    switches = [] if kind in ("no switches", "fine-tuning", "floor") else list(ba2ps.join_switches(net, names).values())
    moved, widths = switches if kind == "switches" else switches[:1], [layer.in_channels for layer in layers]
    for joined in switches[len(moved):]:
        joined.grad = None  # as in train.py without sharing: Adam leaves the others alone
    weights = [p for name, p in net.named_parameters() if p.requires_grad and ".switches." not in name]
    optimizers = [torch.optim.SGD(weights, lr=1e-3, momentum=0.9)] if weights else []
    optimizers += [torch.optim.Adam(switches, lr=1e-4, fused=True)] if switches else []

    def step():
        loss = F.cross_entropy(net(x, "d0"), y)
        if switches:
            s = ba2ps.binarize(torch.stack(moved), widths)
            loss = loss + ba2ps.budget_loss(s[0], 0.5, 1.0)
            if kind == "switches":
                loss = loss + ba2ps.sharing_loss(s, 0.5)
            for joined in moved:
                joined.grad.zero_()
        for optimizer in optimizers[:1]:  # of the weights
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        x.grad = None
    return step


def peak_of(kind, widen_factor, size, memory_format):
    """Bytes that three steps add to the peak of a process of its own, which a small step has made import what it needs."""
    words = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import benchmark, torch; " \
            f"benchmark.step_of({kind!r}, 1, 16, {memory_format})(); " \
            f"step = benchmark.step_of({kind!r}, {widen_factor}, {size}, {memory_format}); before = benchmark.peak(); " \
            "[step() for _ in range(3)]; print(benchmark.peak() - before)"
    return int(subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout)


def training(args):
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32, batch 32; * a bar that is missed")
    formats = {torch.channels_last: "channels-last", torch.contiguous_format: "NCHW"}
    for widen_factor, size in ((4, 64), (2, 32)):
        steps = {(kind, form): step_of(kind, widen_factor, size, form) for kind in KINDS for form in formats}
        times = {key: [] for key in steps}
        for step in steps.values():
            step()
        end = time.time() + args.seconds * len(KINDS)
        while time.time() < end or len(times["floor", torch.channels_last]) < 3:
            for key, step in steps.items():
                times[key].append(timed(step))
        best = {kind: min(formats, key=lambda form: statistics.median(times[kind, form])) for kind in KINDS}

        def ratio(kind, other):
            return statistics.median(a / b for a, b in zip(times[kind, best[kind]], times[other, best[other]]))

        a = torch.randn(1536, 1536)
        rate = 1536**3 / statistics.median(timed(lambda: a @ a) for _ in range(15))
        macs = 2 * 32 * ba2ps.macs(ba2ps.WideResNet(28, widen_factor, "source", 10), None, size)  # forward, and back to x
        spent = statistics.median(times["switches", best["switches"]])
        print(f"WRN-28-{widen_factor}, {size} px: {1e3 * spent:.0f} ms a step with switches, {formats[best['switches']]}")
        show("   over no switches", ratio("switches", "no switches"), "x", 1.05, "")
        show("   over full fine-tuning", ratio("switches", "fine-tuning"), "x", 0.70, "")
        show("   the sharing loss, of a step", 100 * (1 - 1 / ratio("switches", "no sharing loss")), "%", 2, "ten domains")
        show("   the floor, of a step", 100 / ratio("switches", "floor"), "%", None, "forward and input gradient alone")
        show("   of the matrix-product rate", 100 * macs / spent / rate, "%", None, f"{2e-9 * rate:.0f} GFLOP/s")
        memory = {kind: peak_of(kind, widen_factor, size, best[kind]) for kind in ("switches", "no switches", "fine-tuning")}
        show("   peak memory over no switches", memory["switches"] / memory["no switches"], "x", 1.05,
             f"{memory['switches'] / 1e6:.0f} MB")
        show("   peak memory over fine-tuning", memory["switches"] / memory["fine-tuning"], "x", 0.75, "")


def recipe_step_of(kind, budget):
    """A function that does one step of `kind`: BA2, BA2 16 (its batch), search or refine, as train.py does it."""
    net = masked(budget, domains=4, widen_factor=2)
    net = ba2ps.prune(net) if kind == "refine" else net
    net.freeze_backbone()
    net.to(memory_format=torch.channels_last).train()
    x = torch.randn(32 if kind == "BA2" else 16, 3, 32, 32).to(memory_format=torch.channels_last)
    y, layers = torch.randint(10, (len(x),)), ba2ps.switched_layers(net).values()
    joined, widths = ba2ps.join_switches(net, net.domains), [layer.in_channels for layer in layers]
    own = joined["d0"]
    for layer in layers:
        for switches in layer.switches.values():
            switches.requires_grad_(kind != "refine")
    trained = [p for name, p in net.named_parameters() if p.requires_grad and ".switches." not in name]
    weights = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    adam = torch.optim.Adam(joined.values(), lr=0.0, fused=True)  # the masks stay what they are
    for domain in net.domains[1:]:
        joined[domain].grad = None

    def step():
        loss = F.cross_entropy(net(x, "d0"), y)
        if kind != "refine":
            own.grad.zero_()
            loss = loss + ba2ps.budget_loss(ba2ps.binarize(own[None], widths)[0], budget / 2, 0.1)
        weights.zero_grad()
        loss.backward()
        weights.step()
        if kind != "refine":
            adam.step()
        if kind == "search":
            ba2ps.usage(net, "d0")
            ba2ps.share_switches(net, net.domains)
            for domain in net.domains:
                ba2ps.hold_budget(net, domain, budget)
    return step


def recipes(args):
    torch.set_num_threads(1)
    kinds = [(kind, budget) for budget in (0.25, 0.5) for kind in ("BA2", "BA2 16", "search", "refine")]
    steps, times = {key: recipe_step_of(*key) for key in kinds}, {key: [] for key in kinds}
    for step in steps.values():
        step()
    end = time.time() + args.seconds * len(kinds)
    while time.time() < end:
        for key, step in steps.items():
            times[key].append(timed(step) / (32 if key[0] == "BA2" else 16))
    print(f"1 thread, torch {torch.__version__}, float32, WRN-28-2, 32 px")
    for budget in (0.25, 0.5):
        whole, half, search, refine = (statistics.median(times[kind, budget]) for kind in ("BA2", "BA2 16", "search", "refine"))
        print(f"beta = {budget}: {1e3 * whole:.2f} ms an image of BA2; batch 16 {half / whole:.2f} times that, search "
              f"{search / whole:.2f}, --refine {refine / whole:.2f}; as long as 15 epochs of BA2 take 3 and --refine "
              f"{(15 * whole - 3 * search) / refine:.1f}, of BA2 with batch 16 {(15 * half - 3 * search) / refine:.1f}")


def write_images(root, number, listed=None):
    """A domain `noise` of so many JPEGs with a shorter side of 72 pixels, listed again and again up to `listed`."""
    rng, folder = np.random.default_rng(0), Path(root, "data")
    folder.mkdir()
    for i in range(number):
        picture = rng.integers(0, 256, (9, 9 + i % 4, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((72 + 8 * (i % 4), 72)).save(folder / f"{i}.jpg")
    numbers = range(listed or number)
    content = {"images": [{"id": i, "file_name": f"data/{i % number}.jpg", "width": 72, "height": 72} for i in numbers],
               "categories": [{"id": c, "name": str(c)} for c in range(10)],
               "annotations": [{"id": i, "image_id": i, "category_id": i % 10} for i in numbers]}
    Path(root, "annotations").mkdir()
    Path(root, "annotations/noise_train.json").write_text(json.dumps(content))
    return root


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def data(args):
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; * a bar that is missed")
    with tempfile.TemporaryDirectory() as root:
        images = evaluate.Images(write_images(root, 2048), "noise", ["train"], 32).decode()
        net = ba2ps.WideResNet(28, 1, "noise", 10)
        record, order = evaluate.describe(images), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        shares, waits = [], []
        for _ in range(args.repeats):
            batches = images.batches(torch.randperm(len(images), generator=order).split(32))
            waited, start = 0.0, time.perf_counter()
            for _ in range(len(images) // 32):
                begin = time.perf_counter()
                x, y = evaluate.training_batch(next(batches), 32, record, order, "cpu")
                waited += time.perf_counter() - begin
                optimizer.zero_grad()
                F.cross_entropy(net(x, "noise"), y).backward()
                optimizer.step()
            shares.append(waited / (time.perf_counter() - start))
            waits.append(1e3 * waited / (len(images) // 32))
        show("batches, share of an epoch", 100 * statistics.median(shares), "%", 5,
             f"{statistics.median(waits):.2f} ms a batch of 32")

        decoder, speeds = evaluate.Decoder(images.paths, images.side), []
        for _ in range(args.repeats):
            some = torch.randperm(len(images))[:512].tolist()
            speeds.append((512 / timed(lambda: [images[i] for i in some]), 512 / timed(lambda: [decoder[i] for i in some])))
        cached, decoded = map(statistics.median, zip(*speeds))
        show("images from the cache / decoded", statistics.median(a / b for a, b in speeds), "x", None,
             f"{cached:,.0f} and {decoded:,.0f} images/s, one process")

        some = copy.copy(images)
        some.places, ratios = images.places[:64], []
        plain = torch.randn(32, 3, 32, 32)
        for _ in range(4 * args.repeats):
            ours = timed(lambda: evaluate.predict(net, "noise", record, some, 10, 32))
            with torch.no_grad():
                ratios.append(ours / timed(lambda: [net(plain, "noise") for _ in range(10 * len(some) // 32)]))
        show("ten crops / ten forward passes", statistics.median(ratios), "x", 1.1, "")

    with tempfile.TemporaryDirectory() as root:
        write_images(root, 1000, args.images)
        before = anonymous()
        images, largest = evaluate.Images(root, "noise", ["train"], 64), peak()
        listed, (file, digest, number) = anonymous(), images.parts[0]
        sizes = np.full((2, number), images.side, np.int32)
        file.parent.mkdir()
        with open(file, "wb") as whole:
            whole.seek(3 * int(sizes[0].astype(np.int64) @ sizes[1]))
            whole.write(sizes.tobytes() + digest + np.int64(number).tobytes())
        del sizes
        images.decode()
        for batch in images.batches(torch.randperm(number)[:32 * 500].split(32)):
            evaluate.random_crops([image for image, _ in batch], 64, True, torch.Generator())
        pixels = file.stat().st_size
        used, listed = ((bytes_ - before) / 1e6 for bytes_ in (anonymous(), listed))
        print(f"a domain of {number:,} images: {pixels / 1e9:.1f} GB of pixels; {used:.0f} MB of memory after 500 batches at "
              f"64 pixels,\n   {listed:.0f} of them for its list; {largest / 1e6:.0f} MB at most, while JSON is read")


def show(what, value, unit, most, more):
    missed = "" if most is None else f" (at most {most}{unit})" if value <= most else f"* (at most {most}{unit})"
    print(f"{what:34}{value:8.2f}{unit}{missed}{f'; {more}' if more else ''}", flush=True)


def anonymous():
    """Bytes of memory of this process that no file stands behind (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])


def peak():
    """The most memory that this process has had (Linux; ru_maxrss would be that of the process it was forked from)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["inference", "training", "recipes", "data"])
    parser.add_argument("--seconds", type=float, default=20, help="of interleaved repeats, for each batch size or kind of step")
    parser.add_argument("--round-to", type=int, default=1, metavar="N")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--repeats", type=int, default=5, help="of data")
    parser.add_argument("--images", type=int, default=10**6, help="of data's large domain")
    args = parser.parse_args()
    {"inference": inference, "training": training, "recipes": recipes, "data": data}[args.what](args)


if __name__ == "__main__":
    main()
