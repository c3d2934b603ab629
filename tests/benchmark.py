# SPDX-License-Identifier: MIT
"""What it costs, as ratios measured side by side in one run.

  python tests/benchmark.py inference     # pruned WRN-28-4: nine domains, 64 px
  python tests/benchmark.py training      # time and memory of a step
  python tests/benchmark.py data          # reading images, beside WRN-28-1 at 32 px

inference: params as stored; how much faster one domain's dense network is than the backbone in its
faster memory format, as a share of what MACs promise. All domains have the same, random masks.

training: a step of `adapt` in train.py, batch 32, ten domains. Beside it: the frozen network's,
where every channel is read; full fine-tuning; one with settled switches, masks at 0.25 that all
domains share; and the floor, where the first batch-norm alone trains. Medians of interleaved
repeats, each kind in its faster memory format. Memory: the peak of a process of its own for each
kind, over what it had before; also without what glibc's heap keeps of freed tensors.

data: the share of an epoch that goes into batches from a warm cache; ten crops over ten forward
passes; and the memory of a domain of a million images, without the mapped cache (a sparse file).
"""
import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ba2ps
import evaluate
import prune


def timed(function, device="cpu"):
    """Seconds that function() takes, on a GPU until it has finished."""
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def show(what, value, unit="", most=None, least=None, more=""):
    """Print a line, with a star where the bar is missed."""
    bar = ""
    if most:
        bar = f"{' *' if value > most else ''} (at most {most}{unit})"
    if least:
        bar = f"{' *' if value < least else ''} (at least {least}{unit})"
    print(f"{what:33}{value:8.3f}{unit}{bar}", more, flush=True)


def adapted(name, size, number):
    """A network for `number` domains and the source, of ten classes each."""
    torch.manual_seed(0)
    plain = ba2ps.build(name, {"num_classes": 10}, 10)
    domains = {f"d{i}": 10 for i in range(number)}
    return ba2ps.MultiDomain(plain, domains, "source", size)


@torch.no_grad()
def mask_alike(network, share):
    """Random masks, the same for all domains, with this share of each layer on."""
    parts = []
    for layer in ba2ps.switched_layers(network).values():
        part = torch.full((layer.in_channels,), -1e-3)
        part[torch.randperm(len(part))[:round(share * len(part))]] = 1e-3
        parts.append(part)
    for row in network.switches.values():
        row.copy_(torch.cat(parts))


# -------- inference

STORED = {0.25: 0.165, 0.5: 0.40, 0.75: 0.69}   # {channels on: most params as stored}
SPEED = {32: 0.78, 1: 0.50}                     # {batch size: least share of the promise}


def inference(args):
    for share, most in STORED.items():
        network = adapted("WRN-28-4", 64, 9).eval()
        mask_alike(network, share)
        small = ba2ps.prune(network)
        model = prune.dense(small, "d0")
        promise = ba2ps.macs(network) / prune.dense_macs(model, 64)
        stored = prune.stored_params(small)
        show(f"channels {share}: params as stored", stored, most=most, more=f"MACs / {promise:.2f}")
        if share > 0.5:
            continue                        # it promises too little to measure
        for size, least in SPEED.items():
            seconds = args.seconds / 3      # three networks: dense, the backbone in two formats
            whole, own = prune.latency(network, [model], size, 64, seconds, args.device)
            gain = whole / own
            more = f"{gain:.2f}x"
            show(f"   batch {size}: of the promise", gain / promise, least=least, more=more)


# -------- training

CASES = (  # network, image size, most over the frozen network's step
    ("WRN-28-4", 64, 1.10),
    ("WRN-28-2", 32, None),     # so small that the losses weigh more
    ("resnet18", 64, 1.10),
    ("mobilenet_v2", 64, 1.10))
KINDS = "switches", "frozen", "fine-tuning", "settled", "floor"
FORMATS = {"channels-last": torch.channels_last, "NCHW": torch.contiguous_format}
BUDGET = 0.5


def step_of(kind, name, size, form, device):
    """A function that takes one training step of this kind."""
    network = adapted(name, size, 10)
    domains = network.domains
    network.freeze_backbone()
    network.to(device, memory_format=FORMATS[form]).train()
    x = torch.randn(32, 3, size, size, device=device).contiguous(memory_format=FORMATS[form])
    y = torch.randint(10, (32,), device=device)
    forward = network
    weights = network.owned_parameters()
    if kind == "switches":
        adam = torch.optim.Adam(network.switches.values(), lr=1e-4, fused=True)
        cost, fixed = ba2ps.costs(network)
        cost = cost.to(x)
        multiplier = {"d0": 0.0}
    elif kind == "settled":
        mask_alike(network, 0.25)
        network.switches.requires_grad_(False)
        forward = ba2ps.without_unused(network, domains)
    else:
        network.switches.clear()            # without switches every channel is read
    if kind == "fine-tuning":
        weights = network.requires_grad_(True).parameters()
    if kind == "floor":
        network.requires_grad_(False)
        weights = network.parts()[0].requires_grad_(True).parameters()
    sgd = torch.optim.SGD(weights, lr=1e-3, momentum=0.9)

    def step():                             # as in train.adapt
        task = F.cross_entropy(forward(x, "d0"), y, reduction="sum")
        loss = task / len(y)
        if kind == "switches":
            s = ba2ps.binarized(network, domains)
            usage = dict(zip(domains, s @ cost + fixed))
            loss = loss + ba2ps.budget_loss(usage["d0"], BUDGET, multiplier["d0"])
            excess = ba2ps.sharing_loss(s, BUDGET)
            loss = loss + excess
            excess.item()                   # for the log
            adam.zero_grad()
        task.item()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        if kind == "switches":
            assert network.switches["d0"].grad.isfinite().all()
            adam.step()
            ba2ps.keep_a_channel(network, domains)
            multiplier["d0"] = ba2ps.next_multiplier(multiplier["d0"], usage["d0"], BUDGET)

    return step


def faster_step(kind, name, size, device):
    """(step, memory format): the faster one of two."""
    steps = {}
    taken = {}
    for form in FORMATS:
        steps[form] = step_of(kind, name, size, form, device)
        steps[form]()                       # warms up
        taken[form] = min(timed(steps[form], device) for _ in range(3))
    form = min(taken, key=taken.get)
    return steps[form], form


def memory(file, name):
    """Bytes of this process (Linux)."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])


def added_peak(kind, name, size, device, form):
    """Bytes that three steps need at most, of this process or of the GPU."""
    step_of(kind, "WRN-10-1", 16, form, device)()       # loads all code
    step = step_of(kind, name, size, form, device)
    cuda = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if cuda else memory("status", "VmRSS")
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated() if cuda else memory("status", "VmHWM")) - before


def peak_ratio(*case, forms):
    """Peak of a step with switches over that of the frozen network."""
    peaks = []
    for kind in KINDS[:2]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks.append(pool.submit(added_peak, kind, *case, forms[kind]).result())
    return peaks[0] / peaks[1]


def training(args):
    for name, size, most in CASES:
        steps = {}
        forms = {}
        for kind in KINDS:
            steps[kind], forms[kind] = faster_step(kind, name, size, args.device)
        times = {kind: [] for kind in KINDS}
        end = time.perf_counter() + args.seconds * len(KINDS)
        while time.perf_counter() < end or len(times["floor"]) < 3:
            for kind, step in steps.items():
                times[kind].append(timed(step, args.device))

        def ratio(kind, other):
            pairs = zip(times[kind], times[other])
            return statistics.median(a / b for a, b in pairs)

        spent = 1e3 * statistics.median(times["switches"])
        print(f"{name}, {size} px: {spent:.0f} ms a step, {forms['switches']}")
        show("   over the frozen network's", ratio("switches", "frozen"), "x", most)
        show("   over full fine-tuning's", ratio("switches", "fine-tuning"), "x")
        show("   once settled, of a step", ratio("settled", "switches"), "x")
        show("   the floor, of a step", ratio("floor", "switches"), "x")
        case = name, size, args.device
        show("   peak memory over the frozen's", peak_ratio(*case, forms=forms), "x", 1.10)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"      # of processes to come
        show("   the same, without the heap's", peak_ratio(*case, forms=forms), "x", 1.10)
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


# -------- data

def write_images(root, number):
    """A domain: one file of 72 pixels, listed so many times."""
    Image.effect_noise((96, 72), 50).save(f"{root}/noise.jpg")
    ids = range(number)
    content = {
        "images": [{"id": i, "file_name": "noise.jpg"} for i in ids],
        "categories": [{"id": i, "name": str(i)} for i in range(10)],
        "annotations": [{"id": i, "image_id": i, "category_id": i % 10} for i in ids]}
    Path(root, "annotations").mkdir()
    Path(root, "annotations/noise_train.json").write_text(json.dumps(content))


def small_domain(root, repeats, device):
    write_images(root, 2048)
    images = evaluate.Images(root, "noise", ["train"], 32).decode()
    network = adapted("WRN-28-1", 32, 0).to(device)
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    plan = torch.randperm(len(images)).split(32)
    x, y = images.batch(plan[0], torch.default_generator, device)

    def read():
        for indices in plan:
            images.batch(indices, torch.default_generator, device)

    def train():
        for _ in plan:
            sgd.zero_grad()
            F.cross_entropy(network(x, "source"), y).backward()
            sgd.step()

    @torch.no_grad()
    def forward():                          # ten crops of two batches
        for _ in range(20):
            network(x, "source")

    def crops():
        evaluate.predict(network, "source", images, 10, 32, device)

    network.train()
    ratios = [timed(read, device) / timed(train, device) for _ in range(repeats)]
    share = statistics.median(ratio / (1 + ratio) for ratio in ratios)
    show("batches, of an epoch", 100 * share, "%", 5)
    del images.paths[64:]
    ratios = [timed(crops, device) / timed(forward, device) for _ in range(repeats)]
    show("ten crops / ten forward passes", statistics.median(ratios), "x", 1.1)


def large_domain(root):
    write_images(root, 10**6)
    before = memory("smaps_rollup", "Anonymous")
    images = evaluate.Images(root, "noise", ["train"], 64)
    file, _ = images.parts[0]
    file.parent.mkdir()
    with open(file, "wb") as cache:         # every image black
        cache.seek(3 * images.side**2 * len(images))
        sizes = torch.full((len(images), 2), images.side, dtype=torch.int32)
        cache.write(sizes.numpy())
    for indices in torch.randperm(len(images))[:500 * 32].split(32):
        images.batch(indices, torch.default_generator)
    used = (memory("smaps_rollup", "Anonymous") - before) / 1e6
    show("memory of a million images", used, " MB")


def data(args):
    with tempfile.TemporaryDirectory() as root:
        small_domain(root, args.repeats, args.device)
    with tempfile.TemporaryDirectory() as root:
        large_domain(root)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parts = {"inference": inference, "training": training, "data": data}
    add = flags.add_argument
    add("what", choices=parts)
    add("--seconds", type=float, default=20, help="of repeats, a batch size or kind of step")
    add("--repeats", type=int, default=5, help="of data")
    add("--device", default="cpu", help="cpu or cuda")
    args = flags.parse_args()
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; * missed")
    parts[args.what](args)


if __name__ == "__main__":
    main()
