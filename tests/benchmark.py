# SPDX-License-Identifier: MIT
"""What the project promises, measured: no test, for time depends on the machine; figures are ratios.

  python tests/benchmark.py inference   # size and speed of pruned WRN-28-4: nine domains, 64 px
  python tests/benchmark.py training    # a step with switches beside the frozen backbone's and fine-tuning's
  python tests/benchmark.py data        # what reading images costs beside WRN-28-1 at 32 px

inference: params as stored, and the speed-up of one domain's dense network over the backbone in its faster
memory format, as a share of what the ratio of MACs promises. Random masks, the same for all domains.

training: a step of batch 32 with switches, budget and sharing loss over ten domains and both optimizers, as
train.py takes it; the same once the switches have settled, with random masks at 0.25 that all domains share;
the same step of the frozen backbone without switches; full fine-tuning; and the floor, one forward and one
input-gradient pass of the frozen backbone. Medians of interleaved repeats, each in its faster memory format.
The rate of the convolutions is held against that of a large matrix product. Peak memory is that of a process
of its own for each kind of step, less what it was before the first.

data: the share of an epoch that goes into batches once the cache is warm, batch 32; images/s from the cache
over images/s decoded; ten crops over ten forward passes of one crop each, already on the device; and the
memory that a domain of a million images takes, the cache a sparse file: Anonymous of /proc/self/smaps_rollup,
what the process cannot give back, for pages of the mapped cache are the system's.
"""
import argparse
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
import prune

FORMATS = {torch.channels_last: "channels-last", torch.contiguous_format: "NCHW"}


def timed(function, device="cpu"):
    """Seconds that function() takes, on a GPU until it has finished."""
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def show(what, value, unit, most, more=""):
    """One line, with a star where the bar is missed. most: the bar, negative for a least; None: no bar."""
    bar = ""
    if most is not None:
        missed = value > most if most > 0 else value < -most
        bar = f"{' *'[missed]} (at {'most' if most > 0 else 'least'} {abs(most)}{unit})"
    print(f"{what:34}{value:8.3f}{unit}{bar}{f'; {more}' if more else ''}", flush=True)


@torch.no_grad()
def mask_alike(net, usage):
    """Random masks with this share of each layer's channels on, the same for all domains."""
    for layer in ba2ps.switched_layers(net).values():
        on = torch.zeros(layer.in_channels)
        on[torch.randperm(layer.in_channels)[:round(usage * layer.in_channels)]] = 1
        for domain in net.domains:
            layer.switches[domain].copy_(1e-3 * (2 * on - 1))


# -------- inference -----------------------------------------------------------------------------------------

STORED = {0.25: 0.165, 0.5: 0.40, 0.75: 0.69}  # usage -> params as stored, at most
SPEED = {32: 0.75, 1: 0.50}  # batch size -> share of the promise, at least, at usage 0.25 and 0.5


@torch.no_grad()
def masked(usage, domains=9):
    """WRN-28-4 with random masks, the same for all domains, and batch-norm as if trained."""
    torch.manual_seed(0)
    net = ba2ps.WideResNet(28, 4, "source", 10)
    for i in range(domains):
        net.add_domain(f"d{i}", 10)
    mask_alike(net, usage)
    for norm in [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, std=0.3)
    return net.eval()


def inference(args):
    for usage, most in STORED.items():
        net = masked(usage)
        small = ba2ps.prune(net)
        model = prune.dense(small, "d0")
        stored, promise = prune.stored_params(small), ba2ps.macs(net) / prune.dense_macs(model, 64)
        show(f"usage {usage:.2f}: params as stored", stored, "", most,
             f"as the paper counts {ba2ps.params(small):.3f}; MACs / {promise:.2f}")
        for batch_size, least in SPEED.items() if usage < 0.75 else ():
            whole, own = prune.latency(net, [model], batch_size, 64, args.seconds / 3, args.device)
            show(f"   batch {batch_size}: share of the promise", whole / own / promise, "", -least,
                 f"{own:.2f} ms, {whole / own:.2f} x the backbone")


# -------- training ------------------------------------------------------------------------------------------

KINDS = ("switches", "no sharing loss", "settled", "no switches", "fine-tuning", "floor")


def step_of(kind, widen_factor, size, form, device, domains=10):
    """A function that does one training step of this kind, batch 32, in the memory format `form`."""
    torch.manual_seed(0)
    net, names = ba2ps.WideResNet(28, widen_factor, "source", 10), [f"d{i}" for i in range(domains)]
    for name in names:
        net.add_domain(name, 10)
    net.freeze_backbone()
    if kind in ("fine-tuning", "floor"):
        net.requires_grad_(kind == "fine-tuning")
    net.to(device, memory_format=form).train()
    x = torch.randn(32, 3, size, size, device=device).contiguous(memory_format=form)
    x.requires_grad_(kind == "floor")
    y, batch = torch.randint(10, (32,), device=device), {names[0]: range(32)}
    forward = net
    if kind in KINDS[:3]:
        if kind == "settled":
            mask_alike(net, 0.25)
        switches = ba2ps.Switches(net, names, 0.5, sharing=float(kind == "switches"),
                                  settle=0.0 if kind == "settled" else None)
        if switches.settled:
            forward = ba2ps.without_unused(net, names)
        adam = torch.optim.Adam(switches.parameters(), lr=1e-4, fused=True)
    else:
        for layer in ba2ps.switched_layers(net).values():
            layer.switches.clear()
    weights = [p for name, p in net.named_parameters() if p.requires_grad and ".switches." not in name]
    sgd = torch.optim.SGD(weights, lr=1e-3, momentum=0.9) if weights else None

    def step():
        loss = 0.0
        if kind in KINDS[:3]:
            switches.begin(batch, 0.0)
            loss = switches.loss(batch)
        task = F.cross_entropy(forward(x, names[0]), y, reduction="sum")
        task.item()  # the loop sums them up
        loss = loss + task / len(y)
        if sgd:
            sgd.zero_grad()
        loss.backward()
        if sgd:
            sgd.step()
        if kind in KINDS[:3]:
            switches.step(adam, batch)
        x.grad = None
    return step


def peak(device="cpu"):
    """The most bytes so far: of this process (ru_maxrss would be its parent's), or of the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return memory("status", "VmHWM")


def memory(file, name):
    """Bytes of this process (Linux)."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak_of(kind, widen_factor, size, form, device):
    """Bytes that three steps add to the peak of a process of its own, after a small step that imports all."""
    words = f"""import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); import benchmark
benchmark.step_of({kind!r}, 1, 16, {form}, {device!r})()
step = benchmark.step_of({kind!r}, {widen_factor}, {size}, {form}, {device!r})
before = benchmark.peak({device!r})
print([step() for _ in range(3)] and benchmark.peak({device!r}) - before)"""
    return int(subprocess.run([sys.executable, "-c", words], stdout=subprocess.PIPE, check=True).stdout)


def training(args):
    for widen_factor, size in ((4, 64), (2, 32)):
        steps = {(kind, form): step_of(kind, widen_factor, size, form, args.device)
                 for kind in KINDS for form in FORMATS}
        times = {key: [] for key in steps}
        for step in steps.values():
            step()
        end = time.time() + args.seconds * len(KINDS)
        while time.time() < end or len(times["floor", torch.channels_last]) < 3:
            for key, step in steps.items():
                times[key].append(timed(step, args.device))
        best = {kind: min(FORMATS, key=lambda form: statistics.median(times[kind, form])) for kind in KINDS}

        def ratio(kind, other):
            pairs = zip(times[kind, best[kind]], times[other, best[other]])
            return statistics.median(a / b for a, b in pairs)

        a = torch.randn(1536, 1536, device=args.device)
        rate = 1536**3 / statistics.median(timed(lambda: a @ a, args.device) for _ in range(15))
        macs = 2 * 32 * ba2ps.macs(ba2ps.WideResNet(28, widen_factor), None, size)  # forward and back to x
        spent = statistics.median(times["switches", best["switches"]])
        print(f"WRN-28-{widen_factor}, {size} px: {1e3 * spent:.0f} ms a step with switches, "
              f"{FORMATS[best['switches']]}")
        show("   over no switches", ratio("switches", "no switches"), "x", 1.05)
        show("   over full fine-tuning", ratio("switches", "fine-tuning"), "x", 0.72)
        show("   once settled at 0.25", ratio("settled", "switches"), "x", None)
        show("   the sharing loss, of a step", 100 - 100 / ratio("switches", "no sharing loss"), "%", 2)
        show("   the floor, of a step", 100 / ratio("switches", "floor"), "%", None)
        show("   of the matrix-product rate", 100 * macs / spent / rate, "%", None,
             f"{2e-9 * rate:.0f} GFLOP/s")
        own, frozen, tuned = (peak_of(kind, widen_factor, size, best[kind], args.device)
                              for kind in ("switches", "no switches", "fine-tuning"))
        show("   peak memory over no switches", own / frozen, "x", 1.05, f"{own / 1e6:.0f} MB")
        show("   peak memory over fine-tuning", own / tuned, "x", 0.75)


# -------- data ----------------------------------------------------------------------------------------------

def write_images(root, number, listed=None):
    """A domain `noise` of so many JPEGs, 72 pixels high, listed again and again up to `listed`."""
    rng, folder = np.random.default_rng(0), Path(root, "data")
    folder.mkdir()
    for i in range(number):
        picture = rng.integers(0, 256, (9, 9 + i % 4, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((72 + 8 * (i % 4), 72)).save(folder / f"{i}.jpg")
    numbers = range(listed or number)
    content = {"images": [{"id": i, "file_name": f"data/{i % number}.jpg"} for i in numbers],
               "categories": [{"id": c, "name": str(c)} for c in range(10)],
               "annotations": [{"id": i, "image_id": i, "category_id": i % 10} for i in numbers]}
    Path(root, "annotations").mkdir()
    Path(root, "annotations/noise_train.json").write_text(json.dumps(content))
    return root


def data(args):
    with tempfile.TemporaryDirectory() as root:
        images = evaluate.Images(write_images(root, 2048), "noise", ["train"], 32)
        decoded = len(images) / timed(images.decode)
        net, order = ba2ps.WideResNet(28, 1, "noise", 10).to(args.device), torch.Generator().manual_seed(0)
        sgd = torch.optim.SGD(net.parameters(), lr=0.01)

        def step(x, y):
            sgd.zero_grad()
            F.cross_entropy(net(x, "noise"), y).backward()
            sgd.step()
        shares, waits = [], []
        for _ in range(args.repeats):
            waited = trained = 0.0
            plan = torch.randperm(len(images), generator=order).split(32)
            for indices in plan:
                start = time.perf_counter()
                batch = images.batch(indices, order, args.device)
                waited += time.perf_counter() - start
                trained += timed(lambda: step(*batch), args.device)
            shares.append(waited / (waited + trained))
            waits.append(1e3 * waited / len(plan))
        show("batches, share of an epoch", 100 * statistics.median(shares), "%", 5,
             f"{statistics.median(waits):.2f} ms a batch of 32")

        cached = statistics.median(
            len(images) / timed(lambda: [images[i] for i in torch.randperm(len(images)).tolist()])
            for _ in range(args.repeats))
        show("images from the cache / decoded", cached / decoded, "x", None,
             f"{cached:,.0f} and {decoded:,.0f} images/s, one process")

        images.paths, ratios = images.paths[:64], []
        x = torch.randn(32, 3, 32, 32, device=args.device)
        for _ in range(4 * args.repeats):
            ours = timed(lambda: evaluate.predict(net, "noise", images, 10, 32, args.device), args.device)
            with torch.no_grad():
                ratios.append(ours / timed(lambda: [net(x, "noise") for _ in range(20)], args.device))
        show("ten crops / ten forward passes", statistics.median(ratios), "x", 1.1)

    with tempfile.TemporaryDirectory() as root:
        write_images(root, 1000, args.images)
        before = memory("smaps_rollup", "Anonymous")
        images, largest = evaluate.Images(root, "noise", ["train"], 64), peak()
        listed, file = memory("smaps_rollup", "Anonymous"), images.parts[0][0]
        file.parent.mkdir()
        with open(file, "wb") as whole:  # every image black
            whole.seek(3 * images.side**2 * len(images))
            whole.write(np.full((len(images), 2), images.side, np.int32))
        for indices in torch.randperm(len(images))[:32 * 500].split(32):
            images.batch(indices, order)
        used, listed = ((number - before) / 1e6 for number in (memory("smaps_rollup", "Anonymous"), listed))
        print(f"a domain of {len(images):,} images, {file.stat().st_size / 1e9:.1f} GB: "
              f"{used:.0f} MB of memory after 500 batches at 64 pixels,\n   {listed:.0f} for its list; "
              f"{largest / 1e6:.0f} MB at most, while JSON is read")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("what", choices=["inference", "training", "data"])
    flags.add_argument("--seconds", type=float, default=20, help="of repeats, a batch size or kind of step")
    flags.add_argument("--repeats", type=int, default=5, help="of data")
    flags.add_argument("--images", type=int, default=10**6, help="of data's large domain")
    flags.add_argument("--device", default="cpu", help="cpu or cuda")
    args = flags.parse_args()
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32; "
          "* a bar that is missed")
    {"inference": inference, "training": training, "data": data}[args.what](args)


if __name__ == "__main__":
    main()
