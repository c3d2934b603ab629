# SPDX-License-Identifier: MIT
"""Train a backbone on the source domain, freeze it, and adapt it to every other domain under a budget.

  python train.py --depth 10 --widen-factor 2 --image-size 32                        # draws a toy decathlon: no data needed
  python train.py --data decathlon --backbone backbone.pt --budget 0.25               # the paper, section 4.1
  python train.py --data decathlon --backbone backbone.pt --budget 0.25 --recipe held        # never over budget, all share
  python train.py --data decathlon --backbone backbone.pt --budget 0.25 --sharing 0 --independent            # BA2

Leaves backbone.pt, model.pt and log.csv in --out, and until it is finished state.pt: after a crash, Ctrl-C or SIGTERM the
same command with --resume goes on, to the same weights. `torchrun --nproc_per_node=N train.py ...` shares each batch among
N GPUs, or N processes on the CPU. `adapt` below is the method, and every other experiment of the paper.
"""
import argparse
import copy
import csv
import datetime
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

import ba2ps
from ba2ps import InputError
from evaluate import (Images, accuracy, check_device, data_flags, data_options, describe, load_model, predict,
                      progress_line, stop, training_batch, write_json)

# ---------------------------------------------------------------------------------------------------------------------
# the method: domains in round robin; cross-entropy + budget + sharing; two optimizers and a multiplier per domain

def adapt(network, domains, facts, train, val, args, state, phase, name="adapt"):
    """Train what `domains` own, all else frozen. train, val: {domain: Images}, val[domain] None for no accuracy.

    phase: which training of this run it is, 1, 2, ...; with it `state` knows from where to go on. name: of it, in the log.
    """
    network.freeze_backbone()
    if args.adapt == "all":
        network.requires_grad_(True)
    weights = [p for name, p in network.named_parameters() if p.requires_grad and ".switches." not in name]
    layers = ba2ps.switched_layers(network).values()
    widths, switches = [layer.in_channels for layer in layers], ba2ps.join_switches(network, domains)
    gradients = {domain: joined.grad for domain, joined in switches.items()}                     # (M,) each
    switches_of_layers = [layer.switches[domain] for layer in layers for domain in domains]      # parts of `switches`
    weight_optimizer = torch.optim.SGD(weights, lr=args.lr, momentum=0.9)
    switch_optimizer = torch.optim.Adam(switches.values(), lr=args.switch_lr, fused=True)
    optimizers = {"weights": weight_optimizer, **({"switches": switch_optimizer} if args.adapt == "switches" else {})}
    rates = {f"rate of {owned}": torch.optim.lr_scheduler.MultiStepLR(optimizer, [args.milestone], gamma=0.1)
             for owned, optimizer in optimizers.items()}
    scaler = loss_scaler(args)
    multipliers = {domain: ba2ps.KKTMultiplier(args.multiplier_lr) for domain in domains}
    learned = args.sharing == "learned"
    sharing = ba2ps.KKTMultiplier(args.multiplier_lr if learned else 0, 0 if learned else args.sharing)  # lambda_PS
    order = torch.Generator().manual_seed(args.seed)  # of domains, images, crops and mirroring
    parts = {**optimizers, **rates, "scale of the loss": scaler, "lambda_PS": sharing,
             **{f"lambda of {d}": multipliers[d] for d in domains}}
    start, first, plan, losses = state.enter(phase, network, domains, order, parts)
    number = processes()[1]  # each adds its share of the loss
    shares = sharing.value or sharing.lr  # whether there is a sharing loss at all
    forward = compiled(network, domains) if args.compile else network
    progress = counter((args.epochs + 1 - start) * sum(len(train[domain]) for domain in domains), name)

    for epoch in range(start, args.epochs + 1):
        network.train()
        if plan is None:
            losses = dict.fromkeys(domains, 0.0)
            plan = schedule(args.schedule, {domain: len(train[domain]) for domain in domains}, args.batch_size, order)
        feeds = {domain: train[domain].batches([own_rows(part[domain]) for part in plan[first:] if domain in part])
                 for domain in domains}
        # part: {domain: indices of its images}, of one domain or, mixed, of several
        for step, part in enumerate(plan[first:], first):
            done, then = ((epoch - 1 + k / len(plan)) / args.epochs for k in (step, step + 1))  # before this step, after it
            budget = args.budget + (1 - args.budget) * max(0.0, 1 - then / args.shrink) if args.shrink else args.budget
            settled = args.adapt != "switches" or done >= args.settle
            for parameter in switches_of_layers:
                parameter.requires_grad_(not settled)

            loss, size, tasks = 0.0, sum(map(len, part.values())), []
            for domain, indices in part.items():
                items, record = next(feeds[domain]), facts["domains"][domain]
                x, y = own_crops(items, len(indices), record, order, args)                   # (B, 3, S, S), (B,)
                with autocast(args):
                    logits = forward(x, domain)
                task = F.cross_entropy(logits.float(), y, reduction="sum")
                loss = loss + task / size
                tasks.append(task.item())
            # settled, what follows would add constants
            own = [] if settled else ba2ps.binarize(torch.stack([switches[d] for d in part]), widths)  # (of the batch, M)
            costs = torch.full((sum(widths),), 1 / sum(widths))
            if len(own):
                every = ba2ps.binarize(torch.stack([
                    switches[d] if d in part or (shares and args.share_to == "all") else switches[d].detach()
                    for d in domains]), widths)
                used = dict(zip(domains, every @ costs))
            for domain, s in zip(part, own):
                # held, the usage is beta and the hinge would be flat; but its price has to go on working through Adam, which
                # moves a switch by the price over the size of its gradients: so it is the unimportant ones that go off
                price = multipliers[domain].value
                loss = loss + (price * s.mean() if args.hold else F.relu(price * (used[domain] - budget))) / number
            if shares and not settled:
                s = every
                loss = loss + ba2ps.sharing_loss(s, budget, sharing.value, args.sharing_loss) / number
                sharing.update(max(0.0, ba2ps.sharing_excess(s.detach(), budget, args.sharing_loss).item()), 0)
            weight_optimizer.zero_grad()
            for domain, joined in switches.items():
                # without sharing the other domains get no gradient at all: a zero one would let Adam's momentum move them
                moved = domain in part or shares and args.share_to == "all"
                joined.grad = gradients[domain].zero_() if moved and not settled else None
            scaler.scale(loss).backward()
            loss, *tasks = add_up([*weights, *switches.values()], [loss.item(), *tasks], state)
            if not math.isfinite(loss):
                broken = [domain for domain, task in zip(part, tasks) if not math.isfinite(task)]
                raise InputError(f"the loss of {', '.join(broken or part)} is {loss} in epoch {epoch}, step {step + 1}: "
                                 "lower --lr or --switch-lr; the last good checkpoint stays")
            for domain, task in zip(part, tasks):
                losses[domain] += task / len(train[domain])
            scaler.step(weight_optimizer)
            if not settled:
                for group in switch_optimizer.param_groups if args.settle < math.inf else ():
                    group["lr"] = args.switch_lr * (1 - done / args.settle)
                scaler.step(switch_optimizer)
                with torch.no_grad():
                    for d in domains if (shares and args.share_to == "all") else part:
                        for p in switches[d].data.split(widths):
                            if p.max() <= 0:
                                p[p.argmax()] = 1e-6
                for domain, s in zip(part, own):  # held, it counts where the usage would go
                    multipliers[domain].update(ba2ps.usage(network, domain) if args.hold else used[domain].item(), budget)
                if args.common:
                    ba2ps.share_switches(network, domains)
                for domain in domains if args.hold and budget < 1 else ():
                    ba2ps.hold_budget(network, domain, budget)
            scaler.update()
            progress(size)
            state.step_done(epoch, step + 1, plan, losses)
        state.save(epoch, len(plan), [], losses)  # before validation, which may take long
        first, plan = 0, None
        for rate in rates.values():
            rate.step()
        report(network, domains, facts, val, args, state, name, epoch, losses, multipliers)

    if not args.bn_as_trained:
        for domain in domains:
            record, shuffled = facts["domains"][domain], torch.randperm(len(train[domain]), generator=order).split(128)
            feed = train[domain].batches([own_rows(part) for part in shuffled])
            ba2ps.reestimate_batch_norm(network, domain, (
                own_crops(items, len(part), record, order, args)[0]
                for items, part in zip(feed, shuffled) if not state.stopped()))
        say("batch-norm statistics re-estimated for the final switches:")
        report(network, domains, facts, val, args, state, name, "final", losses, multipliers)
    facts.setdefault("multipliers", {}).update({domain: multipliers[domain].state_dict() for domain in domains})


def refine(network, domains, facts, train, val, args, state, phase, out):
    """Train batch-norm and classifiers on in what is left of the network once it is pruned, into refined.pt.

    The switches stay as they are: the network computes what the whole one would, at the complexity of what is read.
    """
    small = ba2ps.prune(network, domains).to(args.device, memory_format=memory_format(args))
    share_batch_norm(small)
    rest = argparse.Namespace(**{**vars(args), "adapt": "classifier", "epochs": args.refine,
                                 "milestone": max(1, 3 * args.refine // 4)})  # 45 of 60 in the paper
    adapt(small, domains, {**facts, "multipliers": {}}, train, val, rest, state, phase, "refine")
    if processes()[0] == 0:
        ba2ps.save(out / "refined.pt", small, **{**facts, "domains": {domain: facts["domains"][domain] for domain in domains}})
    say(f"saved {out / 'refined.pt'}, pruned: it no longer serves {args.source}")


def fine_tune(network, domains, facts, train, val, args, state, out):
    """A network of its own for every domain, all weights trained: {domain}.pt, and their accuracies, the baseline of S."""
    baseline = state.baseline
    for phase, domain in enumerate(domains, 1):
        if phase < state.phase:
            continue
        alone, record = copy.deepcopy(network), facts["domains"][domain]
        torch.manual_seed(args.seed)
        alone.add_domain(domain, len(record["classes"]))
        adapt(alone, [domain], facts, train, val, args, state, phase)
        if processes()[0]:
            continue
        baseline[domain] = accuracy(predict(alone, domain, record, val[domain], None, 32, args.device), val[domain])
        alone.remove_domain(args.source)  # its weights are no longer the backbone's
        ba2ps.save(out / f"{domain}.pt", alone, **{**facts, "domains": {domain: record}, "budget": 1.0, "arguments": vars(args)})
        print(f"saved {out / domain}.pt: {baseline[domain]:.2f}% on val")
    if processes()[0] == 0:
        write_json(out / "baseline.json", baseline)
    state.finish()
    say(f"saved {out / 'baseline.json'}; next: python evaluate.py MODEL --data {args.data} --baseline {out / 'baseline.json'}")


def schedule(name, sizes, batch_size, order):
    """The steps of one epoch, in which every image is seen once: a list of {domain: indices of its images}.

    epoch: an epoch of each domain, in random order; batch: a batch of one domain after that of another, spread evenly
    over the epoch; mixed: batches drawn from all domains together (supplement A). sizes: {domain: number of images}.
    """
    images = {domain: torch.randperm(size, generator=order) for domain, size in sizes.items()}
    if name == "mixed":
        everything = [(domain, i) for domain in sizes for i in range(sizes[domain])]
        steps = []
        for batch in torch.randperm(len(everything), generator=order).split(batch_size):
            steps.append({})
            for domain, i in sorted(everything[j] for j in batch):
                steps[-1].setdefault(domain, []).append(i)
        return steps
    batches = {domain: [{domain: part.tolist()} for part in images[domain].split(batch_size)] for domain in sizes}
    if name == "epoch":
        turns = [list(sizes)[i] for i in torch.randperm(len(sizes), generator=order)]
        return [batch for domain in turns for batch in batches[domain]]
    when = [((i + 0.5) / len(batches[domain]), k, batch) for k, domain in enumerate(sizes)
            for i, batch in enumerate(batches[domain])]
    return [batch for _, _, batch in sorted(when, key=lambda entry: entry[:2])]


def autocast(args):
    """What --precision says, for the forward pass; losses, switches and optimizers stay in float32."""
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(args.device).type, dtype, enabled=args.precision != "fp32")


def loss_scaler(args):
    """Of fp16, whose small gradients would be 0; it does nothing in other precisions."""
    return torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")


def memory_format(args):
    return torch.channels_last if args.channels_last else torch.contiguous_format


def compiled(network, domains):
    """torch.compile of network, compiled anew for every domain, for its parameters: with its switches trained and settled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(domains) + 4)
    return torch.compile(network)


def report(network, domains, facts, val, args, state, name, epoch, losses, multipliers):
    """One line on the screen and a row per domain in the log; accuracies are those of the centre crop."""
    if processes()[0]:
        return
    shared, (_, sparsity_all) = ba2ps.intersection(network, domains), ba2ps.sparsity(network, domains)
    cells = []
    for domain in domains:
        on, correct = ba2ps.usage(network, domain), validate(network, facts, val, domain, args, state)
        cells.append(f"{domain} {losses[domain]:.2f} {'-' if correct is None else format(correct, '.1f')}% on {on:.2f}")
        state.log.row(phase=name, epoch=epoch, domain=domain, loss=losses[domain], val_accuracy=correct, usage=on,
                      intersection=shared, sparsity_all=sparsity_all, multiplier=multipliers[domain].value)
    largest = max(multipliers.values(), key=lambda multiplier: multiplier.value).value
    print(f"{name} epoch {epoch} | {' | '.join(cells)} | intersection {shared:.2f} | sparsity all {sparsity_all:.2f} | "
          f"multiplier up to {largest:.2f}", flush=True)


def validate(network, facts, val, domain, args, state):
    """Accuracy (%) of the centre crop on val, None where val is trained on, and in all processes but the first."""
    if val.get(domain) is None or processes()[0]:
        return None
    return accuracy(predict(network, domain, facts["domains"][domain], val[domain], 1, 128, args.device,
                            lambda number: state.stopped()), val[domain])


# ---------------------------------------------------------------------------------------------------------------------
# the backbone

def train_backbone(network, facts, train, val, args, state):
    """Train all weights on the source: SGD with Nesterov momentum, weight decay 5e-4, one-cycle rate up to 0.1, batch 64."""
    source, record = network.source, facts["domains"][network.source]
    steps = max(1, args.backbone_epochs * math.ceil(len(train) / 64))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    scaler = loss_scaler(args)
    order = torch.Generator().manual_seed(args.seed)
    start, first, plan, losses = state.enter(0, network, [source], order,
                                             {"weights": optimizer, "rate": schedule, "scale of the loss": scaler})
    forward = compiled(network, [source]) if args.compile else network
    progress = counter((args.backbone_epochs + 1 - start) * len(train), "backbone")
    for epoch in range(start, args.backbone_epochs + 1):
        network.train()
        if plan is None:
            losses, plan = {source: 0.0}, torch.randperm(len(train), generator=order).split(64)
        for step, items in enumerate(train.batches([own_rows(part) for part in plan[first:]]), first):
            size = len(plan[step])
            x, y = own_crops(items, size, record, order, args)
            with autocast(args):
                logits = forward(x, source)
            loss = F.cross_entropy(logits.float(), y) if items else 0 * logits.sum()
            optimizer.zero_grad()
            scaler.scale(loss * (len(items) / size)).backward()
            total, = add_up(network.parameters(), [loss.item() * len(items)], state)
            if not math.isfinite(total):
                raise InputError(f"the loss of {source} is {total / size} in epoch {epoch} of the backbone, step {step + 1}: "
                                 "check its images and labels; the last good checkpoint stays")
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            losses[source] += total / len(train)
            progress(size)
            state.step_done(epoch, step + 1, plan, losses)
        state.save(epoch, len(plan), [], losses)
        first, plan = 0, None
        correct = validate(network, facts, val, source, args, state)
        say(f"backbone epoch {epoch} | {source} loss {losses[source]:.3f} | "
            f"val {'-' if correct is None else format(correct, '.1f')}%")
        state.log.row(phase="backbone", epoch=epoch, domain=source, loss=losses[source], val_accuracy=correct)


# ---------------------------------------------------------------------------------------------------------------------
# several processes: each has the whole network and the same generator, takes its share of every batch, and steps alike

def processes():
    """(the number of this process, how many there are); the first is 0, and writes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait():
    if processes()[1] > 1:
        dist.barrier()


def counter(total, what):
    """progress_line of the first process; the others count in silence."""
    return progress_line(total, what) if processes()[0] == 0 else lambda number: None


def say(line):
    if processes()[0] == 0:
        print(line, flush=True)


def own_rows(indices):
    """The part of a batch that this process takes: consecutive rows, none where there are more processes than rows."""
    rank, number = processes()
    return indices[len(indices) * rank // number:len(indices) * (rank + 1) // number]


def own_crops(items, size, record, order, args):
    """training_batch of this process's items of a batch of `size`, cropped and mirrored as one process alone would."""
    rank, number = processes()
    before = size * rank // number
    torch.rand(before, 3, generator=order)  # what random_crops draws for the rows of the others
    if items:
        batch = training_batch(items, args.image_size, record, order, args.device)
    else:
        batch = (torch.zeros(0, 3, args.image_size, args.image_size, device=args.device),
                 torch.zeros(0, dtype=torch.long, device=args.device))
    torch.rand(size - before - len(items), 3, generator=order)
    return batch


def add_up(parameters, numbers, state):
    """Sum gradients, numbers and the wish to stop over the processes, in one all_reduce; returns the numbers.

    Of 4 bytes for each parameter that has a gradient, which is the same ones everywhere, and for each number.
    """
    if processes()[1] == 1:
        return numbers
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    rest = gradients[0].new_tensor([*numbers, float(state.signal or 0)])
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), rest])
    dist.all_reduce(flat)
    *sums, rest = flat.split([*map(torch.numel, gradients), len(rest)])
    for gradient, total in zip(gradients, sums):
        gradient.copy_(total.view(gradient.shape))
    *numbers, asked = rest.tolist()
    state.asked = bool(asked)
    return numbers


class AllReduce(torch.autograd.Function):
    """The sum over the processes, of the gradient too (torch's own differentiable all_reduce is deprecated from 2.14 on)."""
    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.forward(ctx, grad)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with the statistics of all processes' images; nn.SyncBatchNorm does that too, but on GPUs only.

    x: (B, C, H, W), B may differ between processes and be 0. The sums with the count, then the squared deviations are added
    up: C + 1 and C floats, and as many again for their gradients.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        values = x.float()
        sums = AllReduce.apply(torch.cat([values.sum((0, 2, 3)), values.new_tensor([values.numel() / values.shape[1]])]))
        count, mean = sums[-1].detach(), (sums[:-1] / sums[-1].detach())[:, None, None]
        variance = AllReduce.apply((values - mean).square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.flatten(), momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((values - mean) * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_batch_norm(network):
    """Make the statistics of every batch-norm those of all processes, if there are several."""
    for module in network.modules():
        if isinstance(module, ba2ps.DomainBatchNorm2d) and processes()[1] > 1:
            for domain, norm in module.items():
                shared = nn.SyncBatchNorm if norm.weight.is_cuda else SharedBatchNorm2d
                module[domain] = shared(norm.num_features).to(norm.weight)
                module[domain].load_state_dict(norm.state_dict())


def join_processes(args):
    """Become one of torchrun's processes, if it started this one: NCCL on GPUs, one for each, gloo on the CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    kind = torch.device(args.device).type
    if kind == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    # hours: the others wait while the first one validates
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))


# ---------------------------------------------------------------------------------------------------------------------
# what is on the disk while a run goes on

def write_once(path, write):
    """ba2ps.write_whole by the first of the processes."""
    if processes()[0] == 0:
        ba2ps.write_whole(path, write)


class Log:
    """log.csv: a row per epoch and domain, on disk as soon as it is written. text: what a resumed run begins with."""
    COLUMNS = ("phase", "epoch", "domain", "loss", "val_accuracy", "usage", "intersection", "sparsity_all", "multiplier")

    def __init__(self, path, text=""):
        self.path, self.text = path, io.StringIO(newline="")
        self.writer = csv.DictWriter(self.text, self.COLUMNS)
        if text:
            self.text.write(text)
        else:
            self.writer.writeheader()
        self.write()

    def row(self, **cells):
        self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in cells.items()})
        self.write()

    def write(self):  # whole, the few rows that there are: neither a kill nor a full disk leaves half a row
        write_once(self.path, lambda part: Path(part).write_text(self.text.getvalue(), "utf-8", newline=""))


class State:
    """state.pt in --out: what an unfinished run needs to go on as if nothing had happened; removed when it is finished.

    Written before the first step, after the steps of every epoch, and after the step that is running when SIGTERM or
    Ctrl-C comes (`with state:` catches them; a second one ends at once). It holds the network, all that has a state of its
    own (optimizers, rates, multipliers, `order`), the epoch, the step, the plan of the epoch and its losses so far, and
    log.csv. Not torch's own generator: nothing that counts is drawn from it once a network has been initialised.

    phase: the training that is running or, read back, the one to go on with: 0 the backbone, n the n-th call of adapt.
    """
    FORMAT = "ba2ps-state-2"
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, out, args, facts, images, resume):
        """Reads state.pt if there is one and checks it against args and images, {domain: number of training images}."""
        self.path, self.args, self.facts, self.images = out / "state.pt", args, facts, images
        self.phase, self.baseline, self.stored, self.signal, self.handlers, self.pid = 0, {}, None, None, {}, os.getpid()
        self.asked = False  # whether a signal has come to any of the processes
        if self.path.exists():
            if not resume:
                raise InputError(f"--out {out} holds an unfinished run: give --resume to go on with it, or remove "
                                 f"{self.path}")
            self.stored = self.read()
            check_arguments(args, self.stored["arguments"], self.path)
            for domain, number in images.items():
                then, now = self.stored["facts"]["domains"].get(domain, {}), facts["domains"][domain]
                if number != self.stored["images"].get(domain) or then.get("category_ids") != now["category_ids"]:
                    raise InputError(f"--data {args.data}: {domain} has other images or categories than when {self.path} "
                                     "was written: give the same data")
            facts.update(self.stored["facts"])
            self.phase, self.baseline = self.stored["phase"], self.stored["baseline"]
        self.log = Log(out / "log.csv", self.stored["log"] if self.stored else "")

    def read(self):
        try:
            stored = torch.load(self.path, map_location="cpu", weights_only=True)
            if stored["format"] == self.FORMAT:
                return stored
        except Exception as error:  # torch's reader raises nearly anything on bytes that are no checkpoint
            raise InputError(f"{self.path} cannot be read ({type(error).__name__}): remove it to start from the "
                             "beginning") from None
        raise InputError(f"{self.path} is of another version of train.py: remove it to start from the beginning")

    def enter(self, phase, network, domains, order, parts):
        """(epoch, step, plan, losses) to begin `phase` with: 1, 0, None and zeros, or those of state.pt, which is then put
        back into network, order (a torch.Generator) and parts, {name: what has a state_dict}."""
        self.phase, self.network, self.order, self.parts = phase, network, order, parts
        stored, self.stored = self.stored, None
        if stored is None:
            start = 1, 0, None, dict.fromkeys(domains, 0.0)
            self.save(*start)
            return start
        try:
            network.load_state_dict(stored["network"])
            order.set_state(stored["order"])
            for name, part in parts.items():
                part.load_state_dict(stored["parts"][name])
            start = stored["epoch"], stored["step"], stored["plan"], stored["losses"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path} is damaged ({type(error).__name__}): remove it to start from the "
                             "beginning") from None
        say(f"going on from {self.path}: epoch {start[0]}, after step {start[1]}")
        return start

    def save(self, epoch, step, plan, losses):
        """step: how many of the epoch are done. With all of them done the plan is no longer needed and may be []."""
        weights = self.network.state_dict()
        for name, value in weights.items():
            if not value.isfinite().all():
                raise InputError(f"{name} is not finite after step {step} of epoch {epoch}: lower --lr or --switch-lr; the "
                                 "last good checkpoint stays")
        content = {"format": self.FORMAT, "arguments": vars(self.args), "facts": self.facts, "images": self.images,
                   "baseline": self.baseline, "log": self.log.text.getvalue(), "phase": self.phase, "epoch": epoch,
                   "step": step, "plan": plan, "losses": losses, "network": weights, "order": self.order.get_state(),
                   "parts": {name: part.state_dict() for name, part in self.parts.items()}}
        write_once(self.path, lambda part: torch.save(content, part))

    def step_done(self, epoch, step, plan, losses):
        if self.asked or self.signal and processes()[1] == 1:
            self.save(epoch, step, plan, losses)
            self.signal = self.signal or signal.SIGTERM  # it came to another process
            self.stopped(f" in epoch {epoch}, after step {step}")

    def stopped(self, when=""):
        """False; where a signal has come, the end of the run: a line that says how to go on, and 128 + its number."""
        if not self.signal:
            return False
        go_on = shlex.join([word for word in sys.argv if word != "--resume"] + ["--resume"])
        rank, number = processes()
        if rank == 0:
            command = "python" if number == 1 else f"torchrun --nproc_per_node={number}"
            print(f"{Path(sys.argv[0]).name}: stopped by {self.signal.name}{when}; to go on: {command} {go_on}",
                  file=sys.stderr, flush=True)
        sys.exit(128 + self.signal)

    def finish(self):
        if processes()[0] == 0:
            self.path.unlink()

    def __enter__(self):
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as in a job that nohup or a shell has put in the background
                self.handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if os.getpid() != self.pid:
            return  # Ctrl-C reaches the processes that decode images too, and the step that is running waits for them
        self.signal = signal.Signals(number)
        for number in self.handlers:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def check_arguments(args, before, path):
    """InputError that names the first flag that differs from `before`, unless it has no say in the weights."""
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        if name not in ("data", "cache", "workers", "device", "out") and before.get(name, value) != value:
            raise InputError(f"--resume: {path} was written with --{flag} {before[name]}, not {value}: give the same, or "
                             "another --out")


def only_run(out):
    """A file that this process holds locked until it ends, however it ends; InputError where another one does."""
    file = open(out / ".lock", "a")
    try:
        if fcntl:  # without it (Windows) nobody is refused
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its workers do not inherit it
    except (BlockingIOError, PermissionError):
        raise InputError(f"--out {out}: another run is writing there: wait for its end, or give another --out") from None
    except OSError:
        pass  # a file system that cannot lock
    return file


# ---------------------------------------------------------------------------------------------------------------------
# the script

def number_or_learned(word):
    return word if word == "learned" else float(word)


RECIPES = {  # the flags that --recipe sets; one that is given goes first
    "paper": {},
    "held": {"sharing": 0.0, "schedule": "batch", "hold": True, "shrink": 0.05, "common": True, "settle": 0.15,
             "distinct": True, "multiplier_lr": 1.0, "batch_size": 16}}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    add = parser.add_argument
    add("--data", metavar="DIR", help="a Visual Decathlon root (annotations/, data/); none: a toy decathlon is drawn")
    add("--source", metavar="NAME", help="the backbone's domain (default: imagenet12; of the toy, shapes)")
    add("--domains", nargs="+", metavar="NAME", help="domains to adapt to (default: every other annotated one)")
    add("--splits", nargs="+", default=["train"], choices=["train", "val"], help="what is trained on")
    add("--no-mirror", nargs="+", default=[], metavar="NAME", help="domains trained without mirroring, besides the four")
    add("--backbone", metavar="FILE", help="a backbone.pt to use instead of training one")
    add("--backbone-epochs", type=int, default=30, metavar="N")
    add("--depth", type=int, default=28)
    add("--widen-factor", type=int, default=4)
    add("--image-size", type=int, default=64, help="of the crop; images are resized to 9/8 of it")
    add("--budget", type=float, default=0.5, help="beta: largest share of the switches that a domain may have on")
    add("--sharing", type=number_or_learned, default=1.0, metavar="LAMBDA",
        help="lambda_PS; 0 is BA2; learned: raised while the domains share too little, like lambda_d of the budget")
    add("--sharing-loss", default="intersection", choices=["intersection", "union", "jaccard"])
    add("--share-to", default="all", choices=["all", "current"], help="whose switches get the sharing loss's gradient")
    add("--schedule", default="epoch", choices=["epoch", "batch", "mixed"],
        help="an epoch of each domain, one batch of each, or mixed batches")
    add("--independent", action="store_true", help="train every domain alone: with --sharing 0, BA2 as published")
    add("--adapt", default="switches", choices=["switches", "classifier", "all"],
        help="classifier: batch-norm and classifier alone, all channels on; all: fine-tune a network per domain")
    add("--start-from", metavar="MODEL", help="a model.pt to go on from: its switches, batch-norm and classifiers")
    add("--hold", action="store_true", help="shift the switches after every step so that the budget is used and never broken")
    add("--shrink", type=float, default=0.0, metavar="SHARE", help="of the epochs in which the budget goes from 1 to beta")
    add("--common", action="store_true", help="one set of switches for all domains, the mean of theirs after every step")
    add("--settle", type=float, default=math.inf, metavar="SHARE", help="of the epochs after which the switches stay as they "
        "are; until then their rate falls to 0")
    add("--distinct", action="store_true", help="start switches in proportion to the norm of their weights, not all equal")
    add("--epochs", type=int, default=60)
    add("--milestone", type=int, default=45, help="epoch after which both rates are divided by 10")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-3, help="SGD, of batch-norm and classifiers")
    add("--switch-lr", type=float, default=1e-4, help="Adam, of the switches")
    add("--refine", type=int, default=0, metavar="N",
        help="epochs more of batch-norm and classifiers once the network is pruned, into refined.pt")
    add("--recipe", default="paper", choices=list(RECIPES),
        help="held: " + " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in RECIPES["held"].items()))
    add("--multiplier-lr", type=float, default=0.3, help="step of the KKT multiplier, times the excess over the budget")
    add("--bn-as-trained", action="store_true", help="do not re-estimate batch-norm statistics for the final switches")
    add("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="bf16, fp16: autocast")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="the memory format of images and network")
    add("--compile", action="store_true", help="torch.compile, once for every domain: it pays in long runs only")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    data_flags(parser)
    add("--resume", action="store_true", help="go on with the unfinished run in --out; without one there, start it")
    add("--out", metavar="DIR", help="default: runs/{source}-{every flag of the method that is not the paper's}")
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].recipe])
    args = parser.parse_args()
    if args.adapt != "switches":
        args.budget, args.sharing, args.hold = 1.0, 0.0, False  # every channel is on
    if not 0 < args.budget <= 1:
        raise InputError(f"--budget {args.budget:g} is outside (0, 1]: it is the share of switches a domain may have on")
    for flag, least, most in (
            ("sharing", 0, math.inf), ("lr", 0, math.inf), ("switch_lr", 0, math.inf), ("multiplier_lr", 0, math.inf),
            ("backbone_epochs", 0, math.inf), ("epochs", 0, math.inf), ("refine", 0, math.inf), ("milestone", 1, math.inf),
            ("workers", 0, math.inf), ("batch_size", 1, math.inf), ("image_size", 16, math.inf)):
        value = getattr(args, flag)
        if value != "learned" and not (least <= value <= most and math.isfinite(value)):
            raise InputError(f"--{flag.replace('_', '-')} {value} is out of range: give {least} "
                             f"{'or more' if most == math.inf else f'to {most}'}")
    if not (0 <= args.shrink <= min(args.settle, 1) and args.settle > 0):
        raise InputError(f"--shrink {args.shrink:g} and --settle {args.settle:g}: give shares of the epochs, the second above 0 "
                         "and not below the first, or the switches settle over budget")
    if args.refine and args.adapt != "switches":
        raise InputError(f"--refine {args.refine} goes on with a pruned network, but --adapt {args.adapt} prunes nothing: leave "
                         "it out")
    if args.independent and args.sharing:
        raise InputError(f"--independent trains every domain alone, --sharing {args.sharing} needs all: give --sharing 0")
    if args.backbone and args.start_from:
        raise InputError("--backbone and --start-from: give one, a model holds its backbone")
    if args.adapt == "all" and (args.start_from or "val" in args.splits):
        raise InputError("--adapt all starts from a --backbone and measures its baseline on val: leave out "
                         f"{'--start-from' if args.start_from else '--splits val'}")
    check_device(args.device)
    if args.compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise InputError("--compile needs a C++ compiler, and there is none: install one, or leave it out")
    return args


def run_name(args):
    """A directory of its own for every experiment: source, budget, sharing, seed and what differs from the paper's recipe."""
    words = [args.source, f"beta{args.budget:g}", f"sharing{args.sharing}"]
    words += [args.recipe] * (args.recipe != "paper") + [f"adapt-{args.adapt}"] * (args.adapt != "switches")
    given = RECIPES[args.recipe]
    for flag, usual in (("sharing_loss", "intersection"), ("share_to", "all"), ("schedule", "epoch"), ("independent", False),
                        ("start_from", None), ("hold", False), ("shrink", 0.0), ("common", False), ("settle", math.inf),
                        ("distinct", False), ("refine", 0)):
        value = getattr(args, flag)
        if value != given.get(flag, usual):
            words.append(flag.replace("_", "-") + ("" if value is True else str(value).replace("/", "_")))
    return "-".join([*words, f"seed{args.seed}"])


def last_file(args, domains):
    """The name of the file that a run writes when it is finished."""
    return "refined.pt" if args.refine else "model.pt" if args.adapt != "all" else f"{domains[-1]}.pt"


def main():
    args = parse()
    join_processes(args)
    torch.manual_seed(args.seed)
    if args.data is None:
        args.data = "runs/toy"
        if not os.path.isdir(args.data) and processes()[0] == 0:
            print(f"no --data: drawing a toy decathlon in {args.data}")
            draw_toy(args.data)
        wait()
        args.source = args.source or "shapes"
        args.no_mirror = args.no_mirror or ["strokes", "signs", "digits"]

    # the network: a backbone or a model that is given, or a new one
    given, flag = (args.backbone, "--backbone") if args.backbone else (args.start_from, "--start-from")
    if given:
        network, facts = load_model(given)
        if args.backbone and (network.domains or network.source not in network.classifiers):
            raise InputError(f"--backbone {given} is an adapted model: give the backbone.pt of its run, or --start-from")
        if args.start_from and (not network.domains or network.source not in network.classifiers
                                or not all(layer.kept.all() for layer in ba2ps.switched_layers(network).values())):
            raise InputError(f"--start-from {given} is a backbone or pruned: give the model.pt of a run of train.py")
        for name, value in (("source", network.source), ("depth", network.depth), ("widen_factor", network.widen_factor),
                            ("image_size", facts["image_size"])):
            if getattr(args, name) not in (None, value):
                raise InputError(f"{flag} {given} has --{name.replace('_', '-')} {value}, not "
                                 f"{getattr(args, name)}: give the same, or another {flag}")
        args.source = network.source
    else:
        args.source = args.source or "imagenet12"
        facts = {"image_size": args.image_size, "domains": {}}

    # the data: everything is looked at before the first step is taken
    annotated = sorted(path.name[:-len("_train.json")] for path in Path(args.data, "annotations").glob("*_train.json"))
    domains = args.domains or [domain for domain in annotated if domain != args.source]
    if not domains:
        raise InputError(f"{args.data} has no domain to adapt to besides {args.source}: is it a Visual Decathlon root?")
    unknown = set(args.no_mirror) - {*domains, *annotated, args.source}
    if unknown:
        raise InputError(f"--no-mirror {' '.join(sorted(unknown))}: no such domain in {args.data}")
    if len({*domains, args.source}) <= len(domains):
        raise InputError(f"--domains {' '.join(domains)}: give each once, and not the source {args.source}")
    options = data_options(args)
    train, val = {}, {}
    for domain in domains if given else [args.source, *domains]:
        ba2ps.check_name(domain)
        ids = facts["domains"][domain]["category_ids"] if domain in facts["domains"] else None
        train[domain] = Images(args.data, domain, args.splits, args.image_size, ids, **options)
        ids = train[domain].category_ids
        val[domain] = None if "val" in args.splits else Images(args.data, domain, ["val"], args.image_size, ids, **options)
        for images in filter(None, (train[domain], val[domain])):
            if not images.labelled:
                raise InputError(f"{domain} has no labels in split {' '.join(images.splits)}: training needs them")
    if not given:
        network = ba2ps.WideResNet(args.depth, args.widen_factor, args.source, len(train[args.source].classes))
    layers = ba2ps.switched_layers(network).values()
    least = len(layers) / sum(layer.total_channels for layer in layers)
    if args.budget < least:
        raise InputError(f"--budget {args.budget:g} is below one channel per layer, {least:.4f} of this network: give more")
    if processes()[0]:
        wait()  # the first process decodes, the others map what it has cached
    for domain in train:
        for images in filter(None, (train[domain], val[domain])):
            images.decode(args.workers)
        if domain not in facts["domains"]:
            facts["domains"][domain] = describe(train[domain], args.no_mirror)
    if processes()[0] == 0:
        wait()
    out = Path(args.out or "runs/" + run_name(args))
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = only_run(out) if processes()[0] == 0 else None  # noqa: F841, it lives as long as main
        names = ["state.pt", "log.csv", "backbone.pt", "model.pt", "refined.pt", "baseline.json",
                 *(f"{domain}.pt" for domain in domains)]
        for left in [file for name in names for file in out.glob(f"{name}.*.part")] if lock else []:
            left.unlink()  # by a run that was killed while it wrote
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}") from None
    resume = vars(args).pop("resume")  # how it came about is no property of a model
    last = out / last_file(args, domains)
    if resume and not (out / "state.pt").exists():
        if last.exists():
            check_arguments(args, ba2ps.load(last)[1].get("arguments", {}), last)
            say(f"nothing to resume: the run in {out} is finished, {last} is there")
            return
        say(f"nothing to resume in {out}: starting from the beginning")
    state = State(out, args, facts, {domain: len(images) for domain, images in train.items()}, resume)
    wait()  # until all have looked for state.pt

    say(f"WRN-{network.depth}-{network.widen_factor}, source {args.source}, on {args.device}; adapting to "
        f"{', '.join(domains)} at beta = {args.budget:g}, lambda_PS = {args.sharing}; writing to {out}")
    network.to(args.device, memory_format=memory_format(args))
    share_batch_norm(network)
    with state:
        train_all(network, domains, facts, train, val, args, state, out, backbone=not given)


def train_all(network, domains, facts, train, val, args, state, out, backbone):
    """The phases of a run, of which those before state.phase are done; backbone: whether that is trained first."""
    if backbone and state.phase:
        network.load_state_dict(ba2ps.load(out / "backbone.pt")[0].state_dict())
    elif backbone:
        source_facts = {**facts, "domains": {args.source: facts["domains"][args.source]}, "arguments": vars(args)}
        train_backbone(network, facts, train[args.source], val, args, state)
        if processes()[0] == 0:
            ba2ps.save(out / "backbone.pt", network, **source_facts)
    for domain in set(network.domains) - set(domains):
        network.remove_domain(domain)
    facts["domains"] = {domain: facts["domains"][domain] for domain in (args.source, *domains)}
    if args.adapt == "all":
        return fine_tune(network, domains, facts, train, val, args, state, out)
    for domain in domains:
        if domain not in network.domains:
            torch.manual_seed(args.seed)  # a domain starts alike whatever other domains there are
            network.add_domain(domain, len(facts["domains"][domain]["classes"]))
            if args.distinct:
                ba2ps.distinct_switches(network, [domain])
    groups = [[domain] for domain in domains] if args.independent else [domains]
    if state.phase > len(groups):
        network = ba2ps.load(out / "model.pt")[0].to(args.device)
    else:
        for phase, group in enumerate(groups, 1):
            if phase >= state.phase:
                adapt(network, group, facts, train, val, args, state, phase)
        facts.update(budget=args.budget, arguments=vars(args))
        if processes()[0] == 0:
            ba2ps.save(out / "model.pt", network, **facts)
        wait()
    if args.refine:
        refine(network, domains, facts, train, val, args, state, len(groups) + 1, out)
    state.finish()
    say(f"saved {out / 'model.pt'}; next: python evaluate.py {out / last_file(args, domains)} --data {args.data}")


# ---------------------------------------------------------------------------------------------------------------------
# the toy decathlon: five domains drawn from a seed, laid out as the release is, so that one reader serves both

SIDE = 72  # images are drawn at this size and shrunk to 36 pixels


def corners(n, inner):
    """n points on the unit circle and n between them at radius `inner`: a star, a polygon, a disc."""
    angle = np.pi * np.arange(2 * n + 1) / n
    return np.stack([np.sin(angle), -np.cos(angle)], 1) * np.where(np.arange(2 * n + 1) % 2, inner, 1)[:, None]


DISC, QUARTER = corners(20, 1), np.array([[0, 1], [-1, 0]])
FORMS = {"disc": DISC, "triangle": corners(3, .5), "square": corners(4, .5 ** .5), "hexagon": corners(6, .75 ** .5),
         "star": corners(5, .42), "ring": np.concatenate([DISC, .55 * DISC[::-1]]),
         "crescent": np.concatenate([DISC[:21], DISC[20::-1] * [.35, 1]]) - [.5, 0],
         "cross": np.concatenate([np.array([(-.3, -1), (.3, -1), (.3, -.3)]) @ np.linalg.matrix_power(QUARTER, k)
                                  for k in range(4)])}
SYMBOLS = {"bar": np.array([(-1, -.3), (1, -.3), (1, .3), (-1, .3)]), "cross": FORMS["cross"],
           "arrow": np.array([(0, -1), (.9, 0), (.3, 0), (.3, 1), (-.3, 1), (-.3, 0), (-.9, 0)])}
TEXTURES = {  # range of the period in pixels, and the value at (u, v) in periods; None: noise of that grain
    "fine stripes": (3, 5, lambda u, v: np.sin(6.28 * u) / 2), "broad stripes": (5.5, 9, lambda u, v: np.sin(6.28 * u) / 2),
    "checks": (5, 10, lambda u, v: (np.floor(u) + np.floor(v)) % 2 - .5),
    "dots": (5, 10, lambda u, v: (np.hypot(u % 1 - .5, v % 1 - .5) < .33) - .5),
    "bricks": (5, 10, lambda u, v: ((v % 1 < .2) | ((u / 2 + np.floor(v) % 2 / 2) % 1 < .1)) - .5),
    "grid": (5, 10, lambda u, v: ((u % 1 < .2) | (v % 1 < .2)) - .5),
    "rings": (5, 10, lambda u, v: np.sin(6.28 * np.hypot(u, v)) / 2),
    "waves": (5, 10, lambda u, v: np.sin(6.28 * (v + .4 * np.sin(3.14 * u))) / 2),
    "zigzags": (5, 10, lambda u, v: np.sin(6.28 * (v + 1.2 * abs(u / 2 % 1 - .5))) / 2),
    "fine grain": (1.5, 3, None), "coarse grain": (3, 5.5, None)}
SEVEN = ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"]
SEGMENTS = {"a": (-1, -2, 1, -2), "b": (1, -2, 1, 0), "c": (1, 0, 1, 2), "d": (-1, 2, 1, 2), "e": (-1, 0, -1, 2),
            "f": (-1, -2, -1, 0), "g": (-1, 0, 1, 0)}


def to_image(values):
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def tint(colour):
    return tuple(int(c) for c in np.clip(colour, 0, 255))


def unlike(rng, colour):
    """Of three random RGB colours the one furthest from `colour`."""
    return max(rng.uniform(0, 255, (3, 3)), key=lambda other: abs(other - colour).mean())


def cloud(rng, width, height, cell):
    """Smooth noise in [-0.5, 0.5]: a coarse random grid, enlarged."""
    grid = rng.integers(0, 256, (height // cell + 2, width // cell + 2), dtype=np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC), np.float32) / 255 - .5


def affine(rng, turn, skew):
    """A random 2 x 2 matrix for row vectors: stretch and shear, then a rotation by at most `turn` radians."""
    a, s = rng.uniform(-turn, turn), np.exp(rng.uniform(-skew, skew))
    return np.array([[s, rng.uniform(-skew, skew)], [0, 1 / s]]) @ [[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]


def texture(rng, name, width, height):
    """The named pattern in [-0.5, 0.5] at a random angle, scale and phase, slightly warped."""
    low, high, value = TEXTURES[name]
    period, a = 2 * rng.uniform(low, high), rng.uniform(0, np.pi)
    if value is None:
        return cloud(rng, width, height, round(period))
    x, y = (np.arange(width) - width / 2) / period, (np.arange(height)[:, None] - height / 2) / period
    return value(*(z + rng.uniform(-.5, .5) + rng.uniform(0, .7) * cloud(rng, width, height, 24)
                   for z in (np.cos(a) * x + np.sin(a) * y, np.cos(a) * y - np.sin(a) * x)))


def backdrop(rng, colour, lines):
    """A canvas of about this colour: a ramp, clouds and stray lines."""
    x, a = np.linspace(-50, 50, SIDE), rng.uniform(0, 2 * np.pi)
    light = rng.random() * (np.cos(a) * x + np.sin(a) * x[:, None]) + rng.uniform(20, 120) * cloud(rng, SIDE, SIDE, 12)
    image = to_image(colour + light[..., None] * rng.uniform(.5, 1.2, 3))
    for _ in range(rng.integers(lines + 1)):
        ImageDraw.Draw(image).line(rng.uniform(0, SIDE, 4).tolist(), tint(rng.uniform(0, 255, 3)), int(rng.integers(1, 6)))
    return image


def polygon(image, points, colour):
    ImageDraw.Draw(image).polygon((SIDE * points).ravel().tolist(), colour)  # even-odd: a ring keeps its hole


def draw_shape(rng, label, fixed):
    ground, mask = rng.uniform(0, 255, 3), Image.new("L", (SIDE, SIDE))
    fill, image = unlike(rng, ground), backdrop(rng, ground, 4)
    body = fill + 60 * cloud(rng, SIDE, SIDE, 16)[..., None]
    if label % 2:
        pattern = texture(rng, ("broad stripes", "fine stripes", "checks", "dots")[rng.integers(4)], SIDE, SIDE)
        body = body + (unlike(rng, fill) - fill) * (pattern[..., None] + .5)
    form = list(FORMS.values())[label // 2]
    polygon(mask, form @ affine(rng, np.pi, .15) * rng.uniform(.22, .42) + rng.uniform(.38, .62, 2), 255)
    image.paste(to_image(body), mask=mask)
    return image


def draw_stroke(rng, label, fixed):
    paper, ink, width = (int(v) for v in rng.integers((225, 0, 3), (256, 90, 7)))
    image = Image.new("RGB", (SIDE, SIDE), (paper,) * 3)
    frame, shift = affine(rng, .35, .27) * rng.uniform(.3, .42), rng.uniform(.43, .57, 2)
    for _ in range(fixed.integers(2, 4)):  # the same strokes for every image of the class, in another hand
        points = fixed.uniform(-1, 1, (fixed.integers(3, 5), 2))
        points = SIDE * ((points + rng.normal(0, .13, points.shape)) @ frame + shift)
        ImageDraw.Draw(image).line(points.ravel().tolist(), (ink,) * 3, width, joint="curve")
    return image


def draw_texture(rng, label, fixed):
    width, height = ((72, 72), (72, 88), (88, 72), (96, 72))[rng.integers(4)]
    first = rng.uniform(0, 255, 3)
    value = .5 + texture(rng, list(TEXTURES)[label], width, height) + rng.uniform(0, .8) * cloud(rng, width, height, 20)
    return to_image(first + rng.uniform(.4, 1) * (unlike(rng, first) - first) * value[..., None])


def draw_sign(rng, label, fixed):
    plate, symbol = FORMS[("disc", "triangle", "square")[label // 6]], list(SYMBOLS.values())[label % 3]
    rim = ((200, 30, 40), (30, 70, 190))[label // 3 % 2]
    image, light = backdrop(rng, rng.uniform(30, 225, 3), 6), rng.uniform(.35, 1.15)
    frame, shift = affine(rng, .3, .22) * rng.uniform(.25, .42), rng.uniform(.42, .58, 2)
    for points, colour in ((plate, rim), (plate * .7, (235, 235, 225)), (symbol * .36, (25, 25, 30))):
        polygon(image, points @ frame + shift, tint(light * (colour + rng.normal(0, 25, 3))))
    if rng.random() < .4:  # seen from afar
        image = image.resize([int(rng.integers(11, 20))] * 2, Image.BOX).resize((SIDE, SIDE), Image.BICUBIC)
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0, 2.5)))


def glyph(rng, digit):
    """A mask of the digit, upright in the middle: the built-in font, its outline, the bitmap font, seven segments."""
    font, width, mask = rng.integers(4), int(rng.integers(4)), Image.new("L", (SIDE, SIDE))
    draw, middle = ImageDraw.Draw(mask), SIDE // 2
    if font < 2:
        for colour, stroke in ((255, width + 2 * font), (0, 0))[:font + 1]:
            draw.text((middle, middle), str(digit), colour, ImageFont.load_default(56), "mm", stroke_width=stroke)
    elif font == 2:
        draw.text((0, 0), str(digit), 255, ImageFont.load_default_imagefont())
        mask = mask.transform(mask.size, Image.AFFINE, (.2, 0, 3 - middle / 5, 0, .2, 5.5 - middle / 5))  # 5 x, centred
    else:
        for segment in SEVEN[digit]:
            draw.line((.9 * 12 * np.array(SEGMENTS[segment]) + middle).tolist(), 255, width + 4)
    return mask


def draw_digit(rng, label, fixed):
    ground = rng.uniform(0, 255, 3)
    image, ink = backdrop(rng, ground, 3), unlike(rng, ground)
    for other in (True, True, False):  # parts of two other digits at the edges, then the digit itself
        edge = rng.choice((-1, 1), 2) * rng.permutation([rng.uniform(.5, .62), rng.uniform(0, .5)])
        frame = affine(rng, .3, .22) * rng.uniform(.85, 1.3)  # PIL maps from the result back to the mask
        origin = SIDE / 2 - frame @ (SIDE * (.5 + (edge if other else rng.uniform(-.08, .08, 2))))
        mask = glyph(rng, rng.integers(10) if other else label)
        mask = mask.transform((SIDE, SIDE), Image.AFFINE, (*frame[0], origin[0], *frame[1], origin[1]), Image.BILINEAR)
        image.paste(tint(ink + rng.normal(0, 15, 3)), mask=mask)
    return image


TOY = {  # how an image is drawn, its grain, the classes, images per class in train, val and test; the first is the source
    "shapes": (draw_shape, 12, [f"{fill} {form}" for form in FORMS for fill in ("plain", "patterned")], (125, 20, 20)),
    "strokes": (draw_stroke, 5, [f"character {c + 1}" for c in range(24)], (20, 6, 10)),
    "textures": (draw_texture, 18, list(TEXTURES), (40, 12, 15)),
    "signs": (draw_sign, 18, [f"{plate} {rim} {symbol}" for plate in ("disc", "triangle", "diamond")
                              for rim in ("red", "blue") for symbol in SYMBOLS], (35, 10, 15)),
    "digits": (draw_digit, 12, [f"digit {c}" for c in range(10)], (70, 20, 25)),
}


def draw_toy(root, seed=0):
    """Draw the toy decathlon under `root`, which must not exist; a seed gives the same images with the same Pillow."""
    part = Path(f"{root}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    (part / "annotations").mkdir(parents=True)
    for k, (domain, (draw, grain, classes, counts)) in enumerate(TOY.items(), 1):
        categories = [{"id": k * 10**6 + c + 1, "name": name, "supercategory": domain} for c, name in enumerate(classes)]
        for s, (split, count) in enumerate(zip(("train", "val", "test_stripped"), counts), 1):
            # shuffled, so that a test image's number does not tell its class
            todo = np.random.default_rng((seed, k, s)).permutation(list(np.ndindex(len(classes), count))).tolist()
            content = {"images": [], "categories": categories, "annotations": []}
            for number, (c, i) in enumerate(todo, k * 10**7 + s * 10**6 + 1):
                rng, fixed = np.random.default_rng((seed, k, c, s, i)), np.random.default_rng((seed, k, c))
                pixels = np.asarray(draw(rng, c, fixed).reduce(2), np.float32)
                image = to_image(pixels + rng.uniform(0, grain) * rng.standard_normal(pixels.shape, np.float32))
                folder = "test" if s == 3 else f"{split}/{c + 1:04d}"
                path = part / "data" / domain / folder / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, quality=90)
                content["images"].append({"id": number, "file_name": path.relative_to(part).as_posix(),
                                          "width": image.width, "height": image.height})
                content["annotations"].append({"id": number, "image_id": number, "category_id": categories[c]["id"]})
            if s == 3:
                del content["annotations"]  # as in the release: only a results file tells
            (part / "annotations" / f"{domain}_{split}.json").write_text(json.dumps(content))
    os.replace(part, root)


if __name__ == "__main__":
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        stop(error)
    except KeyboardInterrupt:
        stop("stopped before the first step: nothing was written")
