# SPDX-License-Identifier: MIT
"""Train a backbone on the source, freeze it, and adapt it to every other domain under a budget.

  python train.py                                           # a drawn toy decathlon: a first look
  python train.py --data DIR --backbone backbone.pt --budget 0.25       # the paper, section 4.1
  python train.py --data DIR --backbone backbone.pt --recipe settled    # no domain over budget
  python train.py --data DIR --backbone backbone.pt --sharing 0 --independent         # BA2
  python train.py --data DIR --network resnet18 --recipe settled        # one of torchvision's
  python train.py --data DIR --start-from model.pt --domains NEW        # one comes later

Leaves backbone.pt, model.pt and log.csv in --out, and until it is finished state.pt, from which the
same command with --resume goes on, to the same weights. With `torchrun --nproc_per_node=N train.py`
N processes share each batch. `adapt` is the method.
"""
import argparse
import contextlib
import copy
import csv
import datetime
import hashlib
import itertools
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import ba2ps
from ba2ps import InputError
from evaluate import (MEAN_STD, Images, accuracy, at_least, check_device, domains_of, load_model,
                      predict, progress_line, stop, write_json)


# -------- 1  The method: domains in round robin; cross-entropy + budget + sharing ---------------

def adapt(network, domains, train, val, args, run):
    """Train what `domains` own, all else frozen. train, val: {domain: Images}; no val, no accuracy.

    A run has up to three parts, each of whole epochs. Warm-up: every channel is on, and the mean
    square of the gradient of a switch is measured. Search: the paper's losses move the switches.
    Settled: only batch-norm and classifiers train. Recipe paper has the search alone.
    """
    network.freeze_backbone()
    weights = network.owned_parameters(domains)
    if args.adapt == "all":
        network.requires_grad_(True)
        weights = [p for name, p in network.named_parameters() if not name.startswith("switches.")]
    sgd = torch.optim.SGD(weights, lr=args.lr, momentum=0.9)
    rows = [network.switches[domain] for domain in domains]
    adam = torch.optim.Adam(rows, lr=args.switch_lr, fused=True)
    cost, fixed = ba2ps.costs(network, args.budget_of)                      # (M,), float64
    cost_here = cost.to(rows[0])
    whole = sum(len(kept) for kept in network.kept.values())
    beta = args.budget * whole / len(cost)      # of Eq. 5: M is the backbone's, unpruned
    multiplier = dict.fromkeys(domains, 0.0)                                # lambda_d
    importance = {domain: torch.full_like(cost, 1e-30) for domain in domains}
    order = torch.Generator().manual_seed(args.seed)    # of domains, images, crops and mirroring
    sizes = {domain: len(train[domain]) for domain in domains}
    warmup, settle = turns(args)
    everyone = args.sharing > 0 and args.share_to == "all"
    rank, world = processes()
    progress = progress_line(args.epochs * sum(sizes.values()), "adapt")
    forward = network
    skipped = 0

    parts = network, sgd, adam, order, multiplier, importance
    for epoch in run.epochs(f"adapt {domains}", args.epochs, *parts):
        warming = epoch <= warmup
        settled = epoch > settle
        searching = not warming and not settled
        if settled and forward is network and args.adapt == "switches":
            forward = ba2ps.without_unused(network, domains)
        network.train()
        decay = 0.1 if epoch > round(args.decay_at * args.epochs) else 1.0
        for optimizer, rate in ((sgd, args.lr), (adam, args.switch_lr)):
            for group in optimizer.param_groups:
                group["lr"] = decay * rate
        losses = dict.fromkeys(domains, 0.0)        # means over the epoch, of cross-entropy
        excesses = []                               # L_PS / lambda_PS of each step

        for batch in schedule(args.schedule, sizes, args.batch_size, order):
            # batch: {domain: indices of its images}; several domains if mixed
            loss = 0.0
            size = sum(len(indices) for indices in batch.values())
            for domain, indices in batch.items():
                task = cross_entropy(forward, domain, train[domain], indices, order, args)
                losses[domain] += task.item() / sizes[domain]
                loss = loss + task / size                                   # L
            if searching:
                # without sharing, cut the others off: on a gradient of 0 Adam moves them on
                moving = domains if everyone else list(batch)
                s = ba2ps.binarized(network, moving)                        # (N, M)
                usage = dict(zip(network.domains, s @ cost_here + fixed))
                for domain in batch:                                        # L_B, Eq. 4
                    over = ba2ps.budget_loss(usage[domain], args.budget, multiplier[domain])
                    loss = loss + over / world
                if args.sharing > 0:                                        # L_PS, Eq. 5
                    excess = ba2ps.sharing_loss(s, beta, args.sharing_loss)
                    loss = loss + args.sharing * excess / world
                    excesses.append(excess.item())
            sgd.zero_grad()
            adam.zero_grad()
            loss.backward()
            sum_gradients(network)
            if rank == 0:
                progress(size)
            if not settled and not finite([network.switches[domain].grad for domain in batch]):
                if skipped == 0:
                    print("gradient missing or not finite: such steps are skipped")
                skipped += 1
                continue
            sgd.step()                              # batch-norm, classifiers
            if warming:
                for domain in batch:
                    squares = network.switches[domain].grad.to(cost).square()
                    importance[domain] = 0.999 * importance[domain] + squares
            if searching:
                adam.step()                         # switches
                ba2ps.keep_a_channel(network, moving)
                for domain in batch:
                    multiplier[domain] = ba2ps.next_multiplier(
                        multiplier[domain], usage[domain], args.budget, args.multiplier_lr)
        average_statistics(network, domains)
        report(network, domains, val, args, run, epoch, losses, multiplier, excesses, cost, fixed)
        if epoch == warmup:
            start(network, domains, importance, cost, args.budget - fixed, args)
        if epoch == settle:
            for domain in domains:
                ba2ps.hold_budget(network, domain, cost, args.budget - fixed)

    for domain in domains if args.reestimate_bn else ():
        parts = torch.randperm(sizes[domain], generator=order).split(128)
        batches = (train[domain].batch(part, order, args.device) for part in parts)
        ba2ps.reestimate_batch_norm(network, domain, batches)


def turns(args):
    """(last epoch of the warm-up, last epoch before the switches settle)."""
    if args.adapt != "switches":
        return 0, 0                         # settled all along
    warmup = 0
    settle = args.epochs + 1                # never
    if args.warmup:
        warmup = max(1, round(args.warmup * args.epochs))
    if args.settle:
        settle = max(1, round(args.settle * args.epochs))
    return warmup, settle


def start(network, domains, importance, cost, room, args):
    """Start the switches of `domains`.

    In the pool a domain's own importance decides, outside of it the sum over all domains.
    """
    shares = {}
    for domain in network.domains:      # an untrained one's importance is what it reads
        value = importance.get(domain, ba2ps.read(network, domain).double())
        shares[domain] = value / value.sum()
    total = sum(shares.values())
    even = args.even * room             # of every layer's channels
    pool = ba2ps.pooled(network, total, 1.0 if args.independent else args.pool, even)
    lift = (total / cost).max()         # puts the pool above all the rest
    for domain in domains:
        value = torch.where(pool, shares[domain] + lift * cost, total)
        ba2ps.start_switches(network, domain, value, cost, room, args.spread, even)


def finite(tensors):
    return all(tensor is not None and bool(tensor.isfinite().all()) for tensor in tensors)


def cross_entropy(network, domain, images, indices, order, args):
    """The sum over this process's rows of a batch."""
    rank, number = processes()
    first = len(indices) * rank // number
    last = len(indices) * (rank + 1) // number
    # without a row it takes one at weight 0, so that all processes have gradients to sum
    rows = slice(first, max(last, first + 1))
    x, y = images.batch(indices, order, args.device, rows)      # (B, C, S, S), (B,)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        logits = network(x, domain)
    loss = F.cross_entropy(logits.float(), y, reduction="sum")
    if not loss.isfinite():
        raise InputError(f"the loss of {domain} is {loss.item()}: lower --lr or --switch-lr")
    return loss if last > first else 0 * loss


def schedule(name, sizes, batch_size, order):
    """The steps of one epoch, every image once: [{domain: indices}, ...].

    epoch: an epoch of each domain, in random order; batch: a batch of one domain after another's,
    spread out; mixed: batches drawn from all domains (supplement A). sizes: {domain: images}.
    """
    images = {domain: torch.randperm(size, generator=order) for domain, size in sizes.items()}
    steps = []
    if name == "mixed":
        everything = [(domain, i) for domain in sizes for i in range(sizes[domain])]
        for part in torch.randperm(len(everything), generator=order).split(batch_size):
            steps.append({})
            for domain, i in sorted(everything[j] for j in part):
                steps[-1].setdefault(domain, []).append(i)
        return steps
    domains = list(sizes)
    if name == "epoch":
        domains = [domains[i] for i in torch.randperm(len(sizes), generator=order)]
    for place, domain in enumerate(domains):
        parts = images[domain].split(batch_size)
        for i, part in enumerate(parts):
            when = (i + 0.5) / len(parts) if name == "batch" else 0.0
            steps.append((when, place, {domain: part.tolist()}))
    steps.sort(key=lambda step: step[:2])
    return [step for _, _, step in steps]


def report(network, domains, val, args, run, epoch, losses, multiplier, excesses, cost, fixed):
    """A row per domain in the log. Usage, intersection, sparsity: shares of `measure`."""
    total = torch.tensor(list(losses.values()), device=args.device)
    if processes()[1] > 1:
        dist.all_reduce(total)
    on = torch.stack([ba2ps.read(network, domain) for domain in domains]).double()      # (N, M)
    for domain, loss, row in zip(domains, total.tolist(), on):
        run.log(phase="adapt", epoch=epoch, domain=domain, loss=loss,
                val_accuracy=validate(network, domain, val, args),
                measure=args.budget_of,
                usage=fixed + float(row @ cost),
                intersection=fixed + float(on.amin(dim=0) @ cost),
                sparsity_all=max(0.0, round(1 - fixed - float(on.amax(dim=0) @ cost), 9)),
                multiplier=multiplier[domain],
                sharing_loss=sum(excesses) / len(excesses) if excesses else None)


def validate(network, domain, val, args):
    """Accuracy (%) of the centre crop on val; None if val is trained on."""
    if domain not in val or processes()[0]:
        return None
    return accuracy(predict(network, domain, val[domain], 1, 128, args.device), val[domain])


# -------- 2  The backbone, and the reference: a network of its own for every domain -------------

BACKBONE_BATCH = 64


def train_backbone(network, train, val, args, run):
    """Train all weights on the source: SGD with Nesterov momentum, weight decay, one-cycle rate."""
    source = network.source
    images = train[source]
    epochs = args.backbone_epochs
    sgd = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = max(1, epochs * math.ceil(len(images) / BACKBONE_BATCH))
    rate = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.1, total_steps=steps)
    order = torch.Generator().manual_seed(args.seed)
    progress = progress_line(epochs * len(images), "backbone")
    for epoch in run.epochs("backbone", epochs, network, sgd, rate, order):
        network.train()
        total = 0.0
        for indices in torch.randperm(len(images), generator=order).split(BACKBONE_BATCH):
            loss = cross_entropy(network, source, images, indices, order, args) / len(indices)
            total += loss.item() * len(indices) / len(images)
            sgd.zero_grad()
            loss.backward()
            sum_gradients(network)
            sgd.step()
            rate.step()
            progress(len(indices))
        average_statistics(network, [source])
        run.log(phase="backbone", epoch=epoch, domain=source, loss=total,
                val_accuracy=validate(network, source, val, args))


def fine_tune(network, domains, train, val, args, run, facts):
    """Train all weights of a network for each domain: DOMAIN.pt, and baseline.json for S."""
    baseline = {}
    for domain in domains:
        alone = copy.deepcopy(network)
        path = run.out / f"{domain}.pt"
        record = train[domain].record
        if f"adapt {[domain]}" in run.finished:
            alone = load_model(path)[0].to(args.device)
        else:
            torch.manual_seed(args.seed)
            alone.add_domain(domain, len(record["classes"]))
            adapt(alone, [domain], train, val, args, run)
            alone.remove_domain(args.source)    # its weights are no longer the backbone's
            run.save_model(path.name, alone, domains={domain: record}, **facts)
        probabilities = predict(alone, domain, val[domain], None, 32, args.device)
        baseline[domain] = accuracy(probabilities, val[domain])
        print(f"{domain}: {baseline[domain]:.2f}% on val")
    if processes()[0] == 0:
        write_json(run.out / "baseline.json", baseline, indent=1)
    print(f"next: python evaluate.py MODEL --baseline {run.out / 'baseline.json'}")


# -------- 3  Several processes: each has the network, takes its rows of a batch, and steps alike --

def processes():
    """(number of this process, how many there are), from torchrun. The first, 0, alone writes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(args):
    """NCCL and a GPU for each process, or gloo."""
    cuda = args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    patience = datetime.timedelta(hours=12)     # others wait while the first decodes
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)


@contextlib.contextmanager
def first_alone():
    """The first process runs it first; the others find its files. They leave together."""
    rank, number = processes()
    if rank > 0:
        dist.barrier()
    try:
        yield
    finally:        # also on an error: the others meet it too
        if number > 1 and rank == 0:
            dist.barrier()
        if number > 1:
            dist.barrier()


def sum_gradients(network):
    for parameter in network.parameters() if processes()[1] > 1 else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def average_statistics(network, domains):
    """Average running statistics over processes; GPUs use nn.SyncBatchNorm."""
    for part in network.parts() if processes()[1] > 1 else ():
        for domain in domains:
            for buffer in part[domain].buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= processes()[1]


# -------- 4  What a run leaves on the disk --------------------------------------------------------

class Run:
    """The files of a run in `out`. state.pt is all that --resume needs.

    It is written at the end of every epoch and removed at the end of the run: a kill costs an epoch
    at most. A run has phases, one per call of `epochs`; finished phases yield no epochs.
    files: the models it writes. seen: {name: what, besides flags, must be the same on --resume}.
    """

    def __init__(self, out, files, args, seen):
        self.out = out
        self.files = files
        self.path = out / "state.pt"
        self.phase = None       # where it was stopped
        self.finished = []
        self.rows = []          # of log.csv
        self.device = args.device
        self.arguments = {name: value for name, value in vars(args).items() if name != "resume"}
        self.arguments["data"] = os.path.abspath(args.data)
        self.fixed = dict(seen)
        for name, value in self.arguments.items():
            if name not in ("data", "cache", "workers", "device", "out"):
                self.fixed[flag(name)] = value
        self.versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        for part in out.glob("*.part"):         # of a run that was killed while it wrote
            if part.name.rsplit(".", 2)[0] in ("state.pt", "log.csv", *files):
                part.unlink(missing_ok=True)
        if self.path.exists() and not args.resume:
            raise InputError(f"{self.path} is an unfinished run's: give --resume, or remove it")
        if self.path.exists():
            with ba2ps.reading(self.path):
                self.read()

    def read(self):
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, value in self.fixed.items():
            then = state["fixed"].get(name)
            if then != value:
                raise InputError(f"{self.path} was written with {name} {then}, not {value}: "
                                 "give the same, or another --out")
        if state["versions"] != self.versions:
            print(f"going on with {self.versions}, begun with {state['versions']}")
        self.phase = state["phase"]
        self.epoch = state["epoch"]
        self.parts = state["parts"]
        self.finished = state["finished"]
        self.rows = state["rows"]

    def epochs(self, phase, number, *parts):
        """Yield the epochs still to do, up to `number`; restore the state of `parts`."""
        if phase in self.finished:
            return
        parts = [*parts, torch.default_generator]       # dropout draws from it
        if self.device.startswith("cuda"):
            index = torch.device(self.device).index or 0
            parts.append(torch.cuda.default_generators[index])
        first = 1
        if phase == self.phase:
            with ba2ps.reading(self.path):
                for part, state in zip(parts, self.parts):
                    methods(part)[1](state)
            first = self.epoch + 1
            print(f"going on from {self.path}: {phase}, epoch {first}")
        for epoch in range(first, number + 1):
            yield epoch
            if processes()[0] == 0:
                self.write(phase, epoch, parts)
        self.finished.append(phase)

    def write(self, phase, epoch, parts):
        if not finite(parts[0].parameters()):
            raise InputError(f"weights are not finite after epoch {epoch}: lower --lr, --switch-lr")
        state = {"phase": phase, "epoch": epoch, "parts": [methods(part)[0]() for part in parts],
                 "finished": self.finished, "rows": self.rows, "fixed": self.fixed,
                 "versions": self.versions}
        with ba2ps.writing(self.path) as part:
            torch.save(state, part)

    def log(self, **cells):
        """Print a row and add it to log.csv, which is written whole: a kill leaves no half row."""
        if processes()[0]:
            return
        for name, value in cells.items():
            cells[name] = f"{value:.6g}" if isinstance(value, float) else value
        self.rows.append(cells)
        print(", ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
        with ba2ps.writing(self.out / "log.csv") as part:
            with open(part, "w", newline="", encoding="utf-8") as file:
                columns = dict.fromkeys(name for row in self.rows for name in row)
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)

    def save_model(self, name, network, **facts):
        if processes()[0] == 0:
            ba2ps.save(self.out / name, network, arguments=self.arguments, **facts)
        print(f"saved {self.out / name}")


def methods(part):
    """Those that give and take the state of a network, an optimizer, a generator or a dict."""
    if isinstance(part, torch.Generator):
        return part.get_state, part.set_state
    if isinstance(part, dict):
        return part.copy, part.update
    return part.state_dict, part.load_state_dict


# -------- 5  The flags ----------------------------------------------------------------------------

DEFAULTS = {    # of flags that are not given, unless the recipe or the toy has others
    "workers": 2, "splits": ["train"], "no_mirror": [], "backbone_epochs": 30, "budget": 0.5,
    "sharing": 1.0, "sharing_loss": "intersection", "share_to": "all", "schedule": "epoch",
    "adapt": "switches", "spread": 1e-1, "epochs": 60, "decay_at": 0.75,
    "switch_lr": 1e-4, "multiplier_lr": 0.3, "precision": "fp32", "seed": 0,
    "device": "cuda" if torch.cuda.is_available() else "cpu"}
RECIPES = {
    "paper": {
        "budget_of": "layers", "warmup": 0.0, "settle": None, "batch_size": 32, "lr": 1e-3},
    "settled": {
        "budget_of": "channels", "warmup": 0.2, "settle": 0.4, "batch_size": 16, "lr": 1e-1}}
TOY = {
    "data": "runs/toy", "recipe": "settled", "source": "shapes", "network": "WRN-10-2",
    "image_size": 32, "epochs": 40, "switch_lr": 3e-4, "no_mirror": ["strokes", "signs", "digits"]}
SHARING = "sharing_loss", "share_to"
SEARCH = *SHARING, "switch_lr", "multiplier_lr"
START = "pool", "even", "spread"
SWITCHES = *SEARCH, *START, "budget", "sharing", "warmup", "settle", "independent"


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    rate = at_least(0.0)
    share = at_least(0.0, 1.0)
    some = at_least(1e-9, 1.0)

    def add(name, text, type=None, **more):
        default = DEFAULTS.get(name[2:].replace("-", "_"))
        if default is not None:
            text += f" (default: {default})"
        if type is not None:
            more["type"] = type
        parser.add_argument(name, help=text, **more)

    add("--data", "a Visual Decathlon root, or folders DOMAIN/train/CLASS/*.jpg; none: a drawn toy")
    add("--cache", "where decoded images are kept (default: DATA/cache)")
    add("--workers", "processes that decode images", at_least(0))
    add("--source", "the backbone's domain (default: imagenet12)")
    add("--domains", "to adapt to (default: all but --source)", nargs="+")
    add("--splits", "to train on", nargs="+", choices=["train", "val"])
    add("--no-mirror", "domains, besides the paper's four", nargs="+")
    add("--backbone", "a backbone.pt to use instead of training one")
    add("--start-from", "a model.pt to go on from: --domains are trained on, or added, others stay")
    add("--network", "WRN-DEPTH-WIDTH or torchvision's (default: WRN-28-4)")
    add("--weights", "of torchvision's: a file, DEFAULT, or none to train them on the source")
    add("--backbone-epochs", "", at_least(0))
    add("--image-size", "of crops (default: 64, torchvision's 224)", at_least(16))
    add("--recipe", "paper: as published; settled: never over budget", choices=list(RECIPES))
    add("--budget", "beta: the share that a domain may have on", share)
    add("--budget-of", "what it is a share of; layers: mean over them", choices=ba2ps.BUDGETS)
    add("--sharing", "lambda_PS; 0 is BA2", rate)
    add("--sharing-loss", "its form", choices=["intersection", "union", "jaccard"])
    add("--share-to", "who gets its gradient", choices=["all", "current"])
    add("--schedule", "a domain's turn", choices=["epoch", "batch", "mixed"])
    add("--independent", "every domain alone: with --sharing 0, BA2", action="store_true")
    add("--adapt", "what trains; classifier: with batch-norm; all: a network per domain",
        choices=["switches", "classifier", "all"])
    add("--warmup", "share of the epochs that measure importance with every channel on", share)
    add("--pool", "share of the parameters among which every domain chooses its start; "
        "0: all start alike; 1: each with its own (default: --budget)", share)
    add("--even", "share of a domain's budget that starts in all layers alike "
        "(default: 0 for a WRN, else 0.5)", share)
    add("--spread", "largest value a switch starts at", some)
    add("--settle", "share of the epochs after which the budget is held and switches stay", some)
    add("--epochs", "of each domain; 0: the backbone alone", at_least(0))
    add("--decay-at", "share of the epochs after which both rates are divided by 10", share)
    add("--batch-size", "of the domains; the backbone's is 64", at_least(1))
    add("--lr", "SGD, of batch-norm and classifiers", rate)
    add("--switch-lr", "Adam, of the switches", rate)
    add("--multiplier-lr", "step of the multiplier lambda_d", rate)
    add("--reestimate-bn", "batch-norm statistics of the final switches", action="store_true")
    add("--precision", "bf16: autocast", choices=["fp32", "bf16"])
    add("--seed", "", at_least(0, 2 ** 32))
    add("--device", "")
    add("--resume", "go on with the unfinished run in --out", action="store_true")
    add("--out", "folder (default: runs/SOURCE-RECIPE-BUDGET-SEED)")
    args = parser.parse_args()
    given = [name for name, value in vars(args).items() if value is not None and value is not False]
    toy = {} if args.data else TOY
    recipe = args.recipe or toy.get("recipe", "paper")
    for name, value in (DEFAULTS | RECIPES[recipe] | toy | {"recipe": recipe}).items():
        if name not in given:
            setattr(args, name, value)
    if args.pool is None:
        args.pool = args.budget
    refuse_idle(args, given)
    print(f"recipe {recipe}:", *(f"{flag(name)} {vars(args)[name]}" for name in RECIPES[recipe]))
    check_device(args.device)
    return args


def flag(name):
    return f"--{name.replace('_', '-')}"


def refuse_idle(args, given):
    """InputError for a flag without effect, or at odds with another."""
    warmup, settle = turns(args)
    ready = args.backbone or args.start_from
    foreign = not ready and is_foreign(args)
    alone = args.adapt == "all"
    rows = [    # (whether, which, why)
        (args.epochs == 0, SWITCHES, "with --epochs 0 nothing is adapted"),
        (args.adapt != "switches", SWITCHES, f"with --adapt {args.adapt} every channel is on"),
        (alone and "val" in args.splits, ["splits"], "--adapt all is measured on val"),
        (alone, ["start_from"], "--adapt all starts from a backbone"),
        (args.start_from, ["backbone"], "--start-from has one"),
        (ready or (foreign and args.weights != "none"), ["backbone_epochs"], "it is trained"),
        (not foreign, ["weights"], "they are for a --network of torchvision"),
        (args.independent and args.sharing, ["independent"], "it needs --sharing 0"),
        (args.independent, ["pool"], "with --independent every domain starts alone"),
        (not args.sharing, SHARING, "with --sharing 0 there is no sharing loss"),
        (not args.warmup, START, "without --warmup all switches start at 1e-3"),
        (settle < warmup, ["settle", "warmup"], "--settle comes before the end of --warmup"),
        (settle == warmup, SEARCH, "no epoch lies between --warmup and --settle")]
    for there, names, why in rows:
        for name in given:
            if there and name in names:
                raise InputError(f"{flag(name)} cannot be given: {why}")


def is_foreign(args):
    return args.network is not None and not args.network.startswith("WRN-")


# -------- 6  The script ---------------------------------------------------------------------------

def given_network(args):
    """(network or None, {domain: record}); sets the flags that the file decides."""
    path = args.backbone or args.start_from
    network = None
    records = {}
    usual = "WRN-28-4", "imagenet12", 64
    if path:
        network, facts = load_model(path)
        if bool(network.domains) == bool(args.backbone):
            raise InputError(f"{path}: --backbone takes backbone.pt, --start-from a model.pt")
        records = facts["domains"]
        usual = network.name, network.source, network.image_size
    elif is_foreign(args):
        usual = args.network, "imagenet", 224
    for name, value in zip(("network", "source", "image_size"), usual):
        wanted = getattr(args, name) or value
        if path and wanted != value:
            raise InputError(f"{flag(name)} {wanted}: {path} has {value}")
        setattr(args, name, wanted)
    if args.even is None:
        args.even = 0.5 if is_foreign(args) else 0.0
    if is_foreign(args) and not path and args.weights != "none":
        network, records = pretrained(args)
    return network, records


def multi_domain(plain, options, args):
    network = ba2ps.MultiDomain(plain, {}, args.source, args.image_size)
    network.name = args.network
    network.options = options       # load builds it with them
    return network


def pretrained(args):
    """(torchvision's network with --weights, the record of what it was trained on)."""
    models = torchvision.models
    with ba2ps.reading(f"--network {args.network} --weights {args.weights}"):
        options = {}
        if args.weights in (None, "DEFAULT"):
            plain = models.get_model(args.network, weights="DEFAULT")
        else:
            state = torch.load(args.weights, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
            state = {name.removeprefix("module."): value for name, value in state.items()}
            if args.network in ("googlenet", "inception_v3"):
                # torchvision's own files, named by their digest, want images scaled in another way
                digest = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()[:8]
                ready = models.get_model_weights(args.network)
                options["transform_input"] = any(digest in weights.url for weights in ready)
                options["aux_logits"] = any("aux" in name.lower() for name in state)
            number = [len(value) for value in state.values() if value.dim() == 2][-1]
            plain = models.get_model(args.network, weights=None, num_classes=number, **options)
            plain.load_state_dict(state)
        for name in ("aux_logits", "transform_input"):
            if hasattr(plain, name):
                options[name] = getattr(plain, name)
        network = multi_domain(plain, options, args)
    numbers = range(network.classes[args.source])
    options["num_classes"] = len(numbers)
    mean, std = MEAN_STD["imagenet12"]
    record = {"classes": [*map(str, numbers)], "category_ids": [*numbers], "mean": mean, "std": std,
              "mirror": True}
    return network, {args.source: record}


def read_images(args, network, records):
    """(domains to adapt to, train, val: {domain: Images}), decoded."""
    annotated = domains_of(args.data)
    domains = args.domains or [domain for domain in annotated if domain != args.source]
    names = [args.source, *domains]
    if not domains or len(set(names)) < len(names):
        raise InputError(f"--domains {' '.join(domains)}: name some of {args.data} once, "
                         f"not {args.source}")
    if not set(args.no_mirror) <= {*names, *annotated}:
        raise InputError(f"--no-mirror {' '.join(args.no_mirror)}: no such domains in {args.data}")
    train = {}
    val = {}
    for domain in domains if network else names:
        record = records.get(domain)
        for sets, splits in ((train, args.splits), (val, ["val"])):
            if sets is train or "val" not in args.splits:
                images = Images(args.data, domain, splits, args.image_size, record,
                                args.no_mirror, args.cache)
                if not images.labelled:
                    raise InputError(f"{domain} has no labels in {' '.join(splits)}")
                sets[domain] = images.decode(args.workers)
                record = images.record
    return domains, train, val


def rehearse(network, domains, train, args, out):
    """Fail before the run at what would fail at its end; on a copy."""
    trial = copy.deepcopy(network).train()
    least = 2
    for domain, images in train.items():
        size = args.batch_size if domain in domains else BACKBONE_BATCH
        last = (len(images) - 1) % size + 1
        least = min(least, max(1, last // processes()[1]))
        if domain not in trial.classes:
            trial.add_domain(domain, len(images.record["classes"]))
    if args.schedule == "mixed":
        least = 1
    try:
        images = torch.zeros(least, trial.channels, args.image_size, args.image_size)
        trial(images, domains[0]).sum().backward()
    except Exception as error:
        raise InputError(f"a last batch of {least} with --batch-size {args.batch_size} cannot be "
                         f"trained on: {ba2ps.one_line(error)}") from None
    cost, fixed = ba2ps.costs(trial, args.budget_of)
    floor = fixed + sum(float(part[0]) for part in cost.split(ba2ps.widths(trial)))
    if args.adapt == "switches" and args.epochs:
        if args.budget < floor:
            raise InputError(f"--budget {args.budget:g}: a channel in each layer is {floor:.4f} of "
                             f"{args.budget_of}, give that or more")
        ba2ps.hold_budget(trial, domains[0], cost, args.budget - fixed)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        ba2ps.save(f"{folder}/model.pt", trial)
        ba2ps.load(f"{folder}/model.pt")
    try:
        ba2ps.prune(trial, domains[:1])
    except Exception as error:
        print(f"prune.py will not do: {ba2ps.one_line(error)}")


def output_folder(args, files):
    """A folder for `files`. Finished models are never replaced."""
    base = args.out or f"runs/{args.source}-{args.recipe}-{args.budget:g}-{args.seed}"
    if not args.out and args.data == TOY["data"]:
        base = "runs/first"
    out = Path(base)
    for number in itertools.count(2):
        there = [name for name in files if (out / name).exists()]
        following = Path(f"{base}-{number}")
        if not there or args.out or (out / "state.pt").exists():
            break
        if args.resume and not following.exists():
            break
        out = following
    if there and not (out / "state.pt").exists():
        if not args.resume:
            raise InputError(f"--out {out} has a finished {there[-1]}: give another folder")
        if there[-1] == files[-1]:
            print(f"nothing to resume: the run in {out} is finished, {out / there[-1]} is there")
            sys.exit()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}") from None
    return out


def prepare(args):
    """(network, domains, train, val, records, run), checked before the first step."""
    if args.data == TOY["data"] and not os.path.isdir(args.data):
        print(f"no --data: drawing a toy decathlon in {args.data}")
        from tests.toy import draw_toy
        draw_toy(args.data)
    network, records = given_network(args)
    domains, train, val = read_images(args, network, records)
    records |= {domain: images.record for domain, images in train.items()}
    files = ["model.pt"] if args.epochs else []
    if args.epochs and args.adapt == "all":
        files = [*(f"{domain}.pt" for domain in domains), "baseline.json"]
    if network is None:
        files.insert(0, "backbone.pt")
        options = {"num_classes": len(records[args.source]["classes"])}
        with ba2ps.reading(f"--network {args.network}"):
            plain = ba2ps.build(args.network, options, **options)
            network = multi_domain(plain, options, args)
    seen = {}
    for split, sets in (("train", train), ("val", val)):
        for domain, images in sets.items():
            known = repr((images.record["classes"], images.ids)).encode()
            digest = hashlib.sha256(known).hexdigest()[:16]
            seen[f"classes and images of {domain} {split}"] = digest
    out = output_folder(args, files)
    run = Run(out, files, args, seen)
    if processes()[0] == 0 and run.phase is None:
        rehearse(network, domains, train, args, out)
    return network, domains, train, val, records, run


def train_all(network, domains, train, val, records, run, args):
    """The backbone if there is none yet, then the domains."""
    if processes()[1] > 1 and args.device.startswith("cuda"):
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(args.device, memory_format=torch.channels_last)
    facts = {}
    if args.adapt == "switches":
        facts = {"budget": args.budget, "budget_of": args.budget_of}
    if "backbone" in run.finished:
        network.load_state_dict(ba2ps.load(run.out / "backbone.pt")[0].state_dict())
    elif "backbone.pt" in run.files:
        train_backbone(network, train, val, args, run)
        known = {args.source: records[args.source]}
        run.save_model("backbone.pt", network, domains=known)
    if args.epochs and args.adapt == "all":
        fine_tune(network, domains, train, val, args, run, facts)
    elif args.epochs:
        for domain in domains:
            if domain not in network.domains:
                torch.manual_seed(args.seed)    # same start whatever the other domains
                network.add_domain(domain, len(records[domain]["classes"]))
        for group in [[domain] for domain in domains] if args.independent else [domains]:
            adapt(network, group, train, val, args, run)
        run.save_model("model.pt", network, domains=records, **facts)
        print(f"next: python evaluate.py {run.out / 'model.pt'}")
    if processes()[0] == 0:
        run.path.unlink(missing_ok=True)


def main():
    rank, number = processes()
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else None):     # the others are silent
        args = parse()
        if number > 1:
            join_processes(args)
        torch.manual_seed(args.seed)
        with first_alone():
            network, domains, *images, run = prepare(args)
        print(f"{network.name}, source {args.source}, on {args.device}; {', '.join(domains)} at "
              f"beta = {args.budget:g} of {args.budget_of}; writing to {run.out}")
        train_all(network, domains, *images, run, args)
        if number > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        stop(error)
    except KeyboardInterrupt:
        stop("stopped; the same command with --resume goes on from the end of the last epoch")
