# SPDX-License-Identifier: MIT
"""Train a backbone on the source domain, freeze it, and adapt it to every other domain under a budget.

  python train.py --depth 10 --widen-factor 2 --image-size 32                        # draws a toy decathlon: no data needed
  python train.py --data decathlon --backbone backbone.pt --budget 0.25               # the paper, section 4.1
  python train.py --data decathlon --backbone backbone.pt --budget 0.25 --sharing 0   # BA2, all domains simultaneously

Leaves backbone.pt, model.pt and log.csv in --out. `adapt` below is the method.
"""
import argparse
import csv
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import ba2ps
from ba2ps import InputError
from evaluate import Images, accuracy, describe, normalise, predict, progress_line, random_crops, stop

# ---------------------------------------------------------------------------------------------------------------------
# the method: domains in round robin; cross-entropy + budget + sharing; two optimizers and a multiplier per domain

def adapt(network, facts, train, val, args, log):
    """Train what the domains of `network` own, all else frozen. train, val: {domain: Images}, val None for no accuracy."""
    domains, device = network.domains, args.device
    network.freeze_backbone()
    owned = {name: p for name, p in network.named_parameters() if p.requires_grad}
    switches = [p for name, p in owned.items() if ".switches." in name]
    weights = [p for name, p in owned.items() if ".switches." not in name]  # batch-norm and classifiers
    weight_optimizer = torch.optim.SGD(weights, lr=args.lr, momentum=0.9)
    switch_optimizer = torch.optim.Adam(switches, lr=args.switch_lr)
    schedules = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [args.milestone], gamma=0.1)
                 for optimizer in (weight_optimizer, switch_optimizer)]
    multipliers = {domain: ba2ps.KKTMultiplier(args.multiplier_lr) for domain in domains}
    order = torch.Generator().manual_seed(args.seed)  # of domains, images, crops and mirroring
    progress = progress_line(args.epochs * sum(map(len, train.values())), "adapting")

    losses = dict.fromkeys(domains, math.nan)
    for epoch in range(1, args.epochs + 1):
        losses = dict.fromkeys(domains, 0.0)
        for turn in torch.randperm(len(domains), generator=order).tolist():  # an epoch of each domain, in random order
            domain = domains[turn]
            record, images = facts["domains"][domain], train[domain]
            network.train()
            for items in images.batches(torch.randperm(len(images), generator=order).tolist(), args.batch_size, args.workers):
                crops = random_crops([image for image, _ in items], args.image_size, record["mirror"], order)
                x = normalise(crops, record, device)                                         # (B, 3, S, S)
                y = torch.tensor([label for _, label in items], device=device)               # (B,)

                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.precision == "bf16"):
                    logits = network(x, domain)
                task = F.cross_entropy(logits.float(), y)
                # without sharing the other domains get no gradient at all: a zero one would let Adam's momentum move them
                together = domains if args.sharing else [domain]
                s = ba2ps.binary_switches(network, together)                                 # (N, M)
                own = s[together.index(domain)]                                              # (M,)
                loss = (task + ba2ps.budget_loss(own, args.budget, multipliers[domain].value)
                        + ba2ps.sharing_loss(s, args.budget, args.sharing))
                if not math.isfinite(loss.item()):
                    raise InputError(f"the loss of {domain} is {loss.item()} in epoch {epoch}: lower --lr or --switch-lr")

                weight_optimizer.zero_grad()
                switch_optimizer.zero_grad()
                loss.backward()
                weight_optimizer.step()
                switch_optimizer.step()
                multipliers[domain].update(own.mean().item(), args.budget)
                losses[domain] += task.item() * len(items) / len(images)
                progress(len(items))
        for schedule in schedules:
            schedule.step()
        report(network, facts, val, args, log, epoch, losses, multipliers)

    if not args.bn_as_trained:
        for domain in domains:
            record, images = facts["domains"][domain], train[domain]
            shuffled = torch.randperm(len(images), generator=order).tolist()
            ba2ps.reestimate_batch_norm(network, domain, (
                normalise(random_crops([i for i, _ in items], args.image_size, record["mirror"], order), record, device)
                for items in images.batches(shuffled, 128, args.workers)))
        print("batch-norm statistics re-estimated for the final switches:")
        report(network, facts, val, args, log, "final", losses, multipliers)
    facts["multipliers"] = {domain: multiplier.state_dict() for domain, multiplier in multipliers.items()}


def report(network, facts, val, args, log, epoch, losses, multipliers):
    """One line on the screen and a row per domain in the log; accuracies are those of the centre crop."""
    shared, (_, sparsity_all) = ba2ps.intersection(network), ba2ps.sparsity(network)
    cells = []
    for domain in network.domains:
        on, correct = ba2ps.usage(network, domain), validate(network, facts, val, domain, args)
        cells.append(f"{domain} {losses[domain]:.2f} {'-' if correct is None else format(correct, '.1f')}% on {on:.2f}")
        log.row(phase="adapt", epoch=epoch, domain=domain, loss=losses[domain], val_accuracy=correct, usage=on,
                intersection=shared, sparsity_all=sparsity_all, multiplier=multipliers[domain].value)
    largest = max(multipliers.values(), key=lambda multiplier: multiplier.value).value
    print(f"epoch {epoch} | {' | '.join(cells)} | intersection {shared:.2f} | sparsity all {sparsity_all:.2f} | "
          f"multiplier up to {largest:.2f}", flush=True)


def validate(network, facts, val, domain, args):
    """Accuracy (%) of the centre crop on val, None where val is trained on."""
    if val.get(domain) is None:
        return None
    return accuracy(predict(network, domain, facts["domains"][domain], val[domain], 1, 128, args.device, args.workers),
                    val[domain])


# ---------------------------------------------------------------------------------------------------------------------
# the backbone

def train_backbone(network, facts, train, val, args, log):
    """Train all weights on the source: SGD with Nesterov momentum, weight decay 5e-4, one-cycle rate up to 0.1, batch 64."""
    source, record = network.source, facts["domains"][network.source]
    steps = args.backbone_epochs * math.ceil(len(train) / 64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    order = torch.Generator().manual_seed(args.seed)
    progress = progress_line(args.backbone_epochs * len(train), "backbone")
    for epoch in range(1, args.backbone_epochs + 1):
        network.train()
        total = 0.0
        for items in train.batches(torch.randperm(len(train), generator=order).tolist(), 64, args.workers):
            crops = random_crops([image for image, _ in items], args.image_size, record["mirror"], order)
            y = torch.tensor([label for _, label in items], device=args.device)
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
                logits = network(normalise(crops, record, args.device), source)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(items) / len(train)
            progress(len(items))
        if not math.isfinite(total):
            raise InputError(f"the loss of the backbone is {total} in epoch {epoch}: nothing was written")
        correct = validate(network, facts, val, source, args)
        print(f"backbone epoch {epoch} | {source} loss {total:.3f} | "
              f"val {'-' if correct is None else format(correct, '.1f')}%", flush=True)
        log.row(phase="backbone", epoch=epoch, domain=source, loss=total, val_accuracy=correct)


class Log:
    """log.csv: a row per epoch and domain, on disk as soon as it is written."""
    COLUMNS = ("phase", "epoch", "domain", "loss", "val_accuracy", "usage", "intersection", "sparsity_all", "multiplier")

    def __init__(self, path):
        self.file = open(path, "w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)
        self.writer.writeheader()

    def row(self, **cells):
        self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in cells.items()})
        self.file.flush()


# ---------------------------------------------------------------------------------------------------------------------
# the script

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    add = parser.add_argument
    add("--data", metavar="DIR", help="a Visual Decathlon root (annotations/, data/); none: a toy decathlon is drawn")
    add("--source", metavar="NAME", help="the backbone's domain (default: imagenet12; of the toy, shapes)")
    add("--domains", nargs="+", metavar="NAME", help="domains to adapt to (default: every other annotated one)")
    add("--splits", nargs="+", default=["train"], choices=["train", "val"], help="what is trained on")
    add("--no-mirror", nargs="+", default=[], metavar="NAME", help="domains trained without mirroring, besides the paper's four")
    add("--backbone", metavar="FILE", help="a backbone.pt to use instead of training one")
    add("--backbone-epochs", type=int, default=30, metavar="N")
    add("--depth", type=int, default=28)
    add("--widen-factor", type=int, default=4)
    add("--image-size", type=int, default=64, help="of the crop; images are resized to 9/8 of it")
    add("--budget", type=float, default=0.5, help="beta: largest share of the switches that a domain may have on")
    add("--sharing", type=float, default=1.0, help="lambda_PS; 0 is BA2")
    add("--epochs", type=int, default=60)
    add("--milestone", type=int, default=45, help="epoch after which both rates are divided by 10")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-3, help="SGD, of batch-norm and classifiers")
    add("--switch-lr", type=float, default=1e-4, help="Adam, of the switches")
    add("--multiplier-lr", type=float, default=0.02, help="step of the KKT multiplier, times the excess over the budget")
    add("--bn-as-trained", action="store_true", help="do not re-estimate batch-norm statistics for the final switches")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=2, help="processes that decode domains too large to be kept in memory")
    add("--out", metavar="DIR", help="default: runs/{source}-beta{budget}-sharing{sharing}-seed{seed}")
    args = parser.parse_args()
    if not 0 < args.budget <= 1:
        raise InputError(f"--budget {args.budget:g} is outside (0, 1]: it is the share of switches a domain may have on")
    for flag, least in (("sharing", 0), ("lr", 0), ("switch_lr", 0), ("multiplier_lr", 0), ("backbone_epochs", 0),
                        ("epochs", 0), ("milestone", 1), ("batch_size", 1), ("image_size", 16), ("workers", 0)):
        if not least <= getattr(args, flag) < math.inf:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range: give {least} or more")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    return args


def main():
    args = parse()
    torch.manual_seed(args.seed)
    if args.data is None:
        args.data = "runs/toy"
        if not os.path.isdir(args.data):
            print(f"no --data: drawing a toy decathlon in {args.data}")
            draw_toy(args.data)
        args.source = args.source or "shapes"
        args.no_mirror = args.no_mirror or ["strokes", "signs", "digits"]

    # the network: a backbone that is given, or a new one
    if args.backbone:
        network, facts = ba2ps.load(args.backbone)
        if network.domains or network.source not in network.classifiers:
            raise InputError(f"--backbone {args.backbone} is an adapted model: give the backbone.pt of its run")
        for flag, value in (("source", network.source), ("depth", network.depth), ("widen_factor", network.widen_factor),
                            ("image_size", facts["image_size"])):
            if getattr(args, flag) not in (None, value):
                raise InputError(f"--backbone {args.backbone} has --{flag.replace('_', '-')} {value}, not "
                                 f"{getattr(args, flag)}: give the same, or another backbone")
        args.source = network.source
    else:
        args.source = args.source or "imagenet12"
        record = describe(args.data, args.source, args.image_size, args.no_mirror)
        network = ba2ps.WideResNet(args.depth, args.widen_factor, args.source, len(record["classes"]))
        facts = {"image_size": args.image_size, "domains": {args.source: record}}

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
    train, val = {}, {}
    for domain in domains if args.backbone else [args.source, *domains]:
        ba2ps.check_name(domain)
        if domain != args.source:
            facts["domains"][domain] = describe(args.data, domain, args.image_size, args.no_mirror)
        ids = facts["domains"][domain]["category_ids"]
        train[domain] = Images(args.data, domain, args.splits, args.image_size, ids)
        val[domain] = None if "val" in args.splits else Images(args.data, domain, ["val"], args.image_size, ids)
        for images in filter(None, (train[domain], val[domain])):
            if not images.labelled:
                raise InputError(f"{domain} has no labels in split {' '.join(images.splits)}: training needs them")
    out = Path(args.out or f"runs/{args.source}-beta{args.budget:g}-sharing{args.sharing:g}-seed{args.seed}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.csv")
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}") from None

    print(f"WRN-{network.depth}-{network.widen_factor}, source {args.source}, on {args.device}; adapting to "
          f"{', '.join(domains)} at beta = {args.budget:g}, lambda_PS = {args.sharing:g}; writing to {out}", flush=True)
    network.to(args.device, memory_format=torch.channels_last)
    if not args.backbone:
        source_facts = {**facts, "domains": {args.source: facts["domains"][args.source]}, "arguments": vars(args)}
        train_backbone(network, facts, train.pop(args.source), val, args, log)
        ba2ps.save(out / "backbone.pt", network, **source_facts)
    for domain in domains:
        network.add_domain(domain, len(facts["domains"][domain]["classes"]))
    adapt(network, facts, train, val, args, log)
    facts.update(budget=args.budget, arguments=vars(args))
    ba2ps.save(out / "model.pt", network, **facts)
    print(f"saved {out / 'model.pt'}; next: python evaluate.py {out / 'model.pt'} --data {args.data}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        stop(error)
    except KeyboardInterrupt:
        stop("stopped; nothing was saved since the last line that says so")
