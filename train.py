# SPDX-License-Identifier: MIT
"""Train a backbone on the source domain, freeze it, and adapt it to every other domain under a budget.

  python train.py                                   # a drawn toy decathlon, small settings: a first look
  python train.py --data DIR --backbone backbone.pt --budget 0.25                    # the paper, section 4.1
  python train.py --data DIR --backbone backbone.pt --budget 0.25 --recipe settled   # never over budget
  python train.py --data DIR --backbone backbone.pt --budget 0.25 --sharing 0 --independent          # BA2
  python train.py --data DIR --network resnet18 --budget 0.25 --recipe settled         # one of torchvision's
  python train.py --data DIR --start-from model.pt --domains NEW --budget 0.25      # one that comes later

Leaves backbone.pt, model.pt and log.csv in --out, and until it is finished state.pt, written at the end of
every epoch: the same command with --resume goes on from there, to the same weights. With `torchrun
--nproc_per_node=N train.py ...` N processes share each batch. `adapt` is the method, and every experiment.
"""
import argparse
import copy
import csv
import datetime
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import ba2ps
from ba2ps import InputError
from evaluate import (MEAN_STD, Images, accuracy, at_least, check_device, domains_of, load_model, predict,
                      progress_line, stop, write_json)


# -------- the method: domains in round robin; cross-entropy + budget + sharing ------------------------------

def adapt(network, domains, train, val, args, run):
    """Train what `domains` own, all else frozen. train, val: {domain: Images}, val {} for no accuracy."""
    network.freeze_backbone()
    if args.adapt == "all":
        network.requires_grad_(True)
    switches = ba2ps.Switches(
        network, domains, args.budget, args.budget_of, args.image_size, args.sharing, args.sharing_loss,
        args.share_to, args.multiplier_lr, args.settle, args.rank)
    weights = network.owned_parameters(domains)
    if args.adapt == "all":
        weights = [p for p in network.parameters() if p.requires_grad]  # the switches are held by now
    sgd = torch.optim.SGD(weights, lr=args.lr, momentum=0.9)
    adam = torch.optim.Adam(switches.parameters(), lr=args.switch_lr, fused=True)
    order = torch.Generator().manual_seed(args.seed)  # of domains, images, crops and mirroring
    sizes = {domain: len(train[domain]) for domain in domains}
    progress, forward = progress_line(args.epochs * sum(sizes.values()), "adapt"), network

    for epoch in run.epochs(f"adapt {domains}", args.epochs, network, switches, sgd, adam, order):
        network.train()
        for optimizer, rate in ((sgd, args.lr), (adam, args.switch_lr)):
            optimizer.param_groups[0]["lr"] = rate if epoch <= args.milestone else 0.1 * rate
        losses = dict.fromkeys(domains, 0.0)
        plan = schedule(args.schedule, sizes, args.batch_size, order)
        for step, batch in enumerate(plan):  # {domain: indices of its images}; several domains if mixed
            switches.begin(batch, (epoch - 1 + step / len(plan)) / args.epochs)
            if switches.settled and forward is network and args.adapt == "switches":
                forward = ba2ps.without_unused(network, domains)
            loss, size = switches.loss(batch), sum(map(len, batch.values()))
            for domain, indices in batch.items():
                task = cross_entropy(forward, domain, train[domain], indices, order, args)
                losses[domain] += task.item() / sizes[domain]
                loss = loss + task / size
            sgd.zero_grad()
            loss.backward()
            sum_gradients(network)
            sgd.step()                                # batch-norm, classifiers
            switches.step(adam, batch)                # switches, then the prices lambda_d
            progress(size)
        average_statistics(network, domains)
        report(network, domains, val, args, run, epoch, losses, switches)

    for domain in domains if not args.bn_as_trained else ():
        parts = torch.randperm(sizes[domain], generator=order).split(128)
        ba2ps.reestimate_batch_norm(
            network, domain, (train[domain].batch(part, order, args.device) for part in parts))


def cross_entropy(network, domain, images, indices, order, args):
    """Its sum over the rows of a batch that this process takes; 0 without any."""
    rank, number = processes()
    own = slice(len(indices) * rank // number, len(indices) * (rank + 1) // number)
    x, y = images.batch(indices, order, args.device, own)  # (B, 3, S, S), (B,)
    if not len(x) and not x.is_cuda:  # on a GPU the batch-norm of the others waits for this process
        return torch.zeros((), requires_grad=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        logits = network(x, domain)
    loss = F.cross_entropy(logits.float(), y, reduction="sum")
    if not loss.isfinite():
        raise InputError(f"the loss of {domain} is {loss.item()}: lower --lr or --switch-lr, see its images")
    return loss


def schedule(name, sizes, batch_size, order):
    """The steps of one epoch, in which every image is seen once: a list of {domain: indices of its images}.
    epoch: an epoch of each domain, in random order; batch: a batch of one domain after another's, spread out;
    mixed: batches drawn from all domains together (supplement A). sizes: {domain: number of images}."""
    images = {domain: torch.randperm(size, generator=order) for domain, size in sizes.items()}
    if name == "mixed":
        everything = [(domain, i) for domain in sizes for i in range(sizes[domain])]
        steps = []
        for batch in torch.randperm(len(everything), generator=order).split(batch_size):
            steps.append({})
            for domain, i in sorted(everything[j] for j in batch):
                steps[-1].setdefault(domain, []).append(i)
        return steps
    batches = {domain: [{domain: part.tolist()} for part in order.split(batch_size)]
               for domain, order in images.items()}
    if name == "epoch":
        turns = [list(sizes)[i] for i in torch.randperm(len(sizes), generator=order)]
        return [batch for domain in turns for batch in batches[domain]]
    when = [((i + 0.5) / len(batches[domain]), k, batch) for k, domain in enumerate(sizes)
            for i, batch in enumerate(batches[domain])]
    return [batch for _, _, batch in sorted(when, key=lambda entry: entry[:2])]


def report(network, domains, val, args, run, epoch, losses, switches):
    """One line on the screen and a row per domain in the log; accuracies are those of the centre crop."""
    total = torch.tensor(list(losses.values()), device=args.device)
    if processes()[1] > 1:
        dist.all_reduce(total)
    if processes()[0]:
        return
    usage = ba2ps.usage(network, args.budget_of, args.image_size, domains)
    shared = torch.cat([on.all(0) for on in ba2ps.masks(network, domains).values()]).double().mean().item()
    sparsity, cells = ba2ps.sparsity(network, domains)[1], []
    for domain, loss in zip(domains, total.tolist()):
        correct = validate(network, domain, val, args)
        cells.append(f"{domain} {loss:.2f} {percent(correct)} on {usage[domain]:.2f}")
        price = switches.prices[domain]
        run.log("adapt", epoch, domain, loss, correct, usage[domain], shared, sparsity, price)
    print(f"epoch {epoch} | {' | '.join(cells)} | intersection {shared:.2f} | sparsity all {sparsity:.2f} | "
          f"multiplier up to {max(switches.prices.values()):.2f}", flush=True)


def percent(value):
    return "-" if value is None else f"{value:.1f}%"


def validate(network, domain, val, args):
    """Accuracy (%) of the centre crop on val, None where val is trained on."""
    if domain in val:
        return accuracy(predict(network, domain, val[domain], 1, 128, args.device), val[domain])


# -------- the backbone, and the reference: a network of its own for every domain ----------------------------

def train_backbone(network, train, val, args, run):
    """Train all weights on the source: SGD with Nesterov momentum, weight decay, one-cycle rate up to 0.1."""
    source, images, number = network.source, train[network.source], args.backbone_epochs
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = max(1, number * math.ceil(len(images) / 64))
    rate = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.1, total_steps=steps)
    order = torch.Generator().manual_seed(args.seed)
    progress = progress_line(number * len(images), "backbone")
    for epoch in run.epochs("backbone", number, network, sgd, rate, order):
        network.train()
        total = 0.0
        for indices in torch.randperm(len(images), generator=order).split(64):
            loss = cross_entropy(network, source, images, indices, order, args) / len(indices)
            total += loss.item() * len(indices) / len(images)
            sgd.zero_grad()
            loss.backward()
            sum_gradients(network)
            sgd.step()
            rate.step()
            progress(len(indices))
        average_statistics(network, [source])
        if processes()[0] == 0:
            correct = validate(network, source, val, args)
            print(f"backbone epoch {epoch} | {source} {total:.3f} {percent(correct)}", flush=True)
            run.log("backbone", epoch, source, total, correct)


def fine_tune(network, domains, train, val, args, run, facts):
    """Train all weights of a network of its own for every domain: {domain}.pt, and baseline.json for S."""
    baseline = {}
    for domain in domains:
        alone, path, record = copy.deepcopy(network), run.out / f"{domain}.pt", train[domain].record
        if f"adapt {[domain]}" in run.finished:
            alone = load_model(path)[0].to(args.device)
        else:
            torch.manual_seed(args.seed)
            alone.add_domain(domain, len(record["classes"]))
            adapt(alone, [domain], train, val, args, run)
            alone.remove_domain(args.source)  # its weights are no longer the backbone's
            run.save_model(path, alone, **{**facts, "domains": {domain: record}})
        baseline[domain] = accuracy(predict(alone, domain, val[domain], None, 32, args.device), val[domain])
        print(f"saved {path}: {baseline[domain]:.2f}% on val")
    if processes()[0] == 0:
        write_json(run.out / "baseline.json", baseline)
    print(f"next: python evaluate.py MODEL --baseline {run.out / 'baseline.json'}")


# -------- several processes: each has the whole network, takes its rows of every batch, and steps alike -----

def processes():
    """(the number of this process, how many there are); the first is 0, and writes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_gradients(network):
    """Add up the gradients of the processes; those of the switches' losses are in rows, alike in each."""
    if processes()[1] > 1:
        parameters = list(network.parameters())
        there = parameters[0].new_tensor([float(p.grad is not None) for p in parameters])
        dist.all_reduce(there)  # a process without an image of a domain has no gradient of what it owns
        for p in [p for p, number in zip(parameters, there.tolist()) if number]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def average_statistics(network, domains):
    """Give all processes the mean of their running statistics; on GPUs nn.SyncBatchNorm has made them one."""
    norms = [module[domain] for module in network.modules() if isinstance(module, ba2ps.DomainBatchNorm2d)
             for domain in domains if processes()[1] > 1]
    for buffer in [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]:
        dist.all_reduce(buffer)
        buffer /= processes()[1]


def join_processes(args):
    """Become one of torchrun's processes, if it started this one: NCCL and a GPU each, or gloo on the CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = torch.device(args.device).type == "cuda"
        if cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        patience = datetime.timedelta(hours=12)  # the others wait while the first one decodes
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
        if processes()[0]:
            sys.stdout = open(os.devnull, "w")  # the first one speaks for all


# -------- what a run leaves on the disk ---------------------------------------------------------------------

class Run:
    """The files of a run in `out`. state.pt is what an unfinished run needs to go on as if it never stopped.
    It is written at the end of every epoch and removed at the end of the run: a kill costs an epoch at most.
    A run has phases, one for each call of `epochs`; those that are over when it goes on yield no epochs."""

    COLUMNS = "phase epoch domain loss val_accuracy usage intersection sparsity_all multiplier".split()

    def __init__(self, out, args):
        self.out, self.path, self.stored, self.finished, self.rows = out, out / "state.pt", None, [], []
        self.arguments = {name: value for name, value in vars(args).items() if name != "resume"}
        for left in out.glob("*.part") if processes()[0] == 0 else ():
            left.unlink()  # by a run that was killed while it wrote
        if self.path.exists():
            if not args.resume:
                raise InputError(f"--out {out} holds an unfinished run: give --resume, or remove {self.path}")
            with ba2ps.reading(self.path):
                self.stored = torch.load(self.path, map_location="cpu", weights_only=True)
                self.finished, self.rows = self.stored["finished"], self.stored["rows"]
                then = self.stored["arguments"]
            for name, value in self.arguments.items():
                if name not in ("data", "cache", "workers", "device", "out") and then.get(name) != value:
                    raise InputError(f"--resume: {self.path} was written with --{name.replace('_', '-')} "
                                     f"{then.get(name)}, not {value}: give the same, or another --out")

    def epochs(self, phase, number, network, *parts):
        """The epochs up to `number` that are still to do; network and parts get back what they held."""
        if phase in self.finished:
            return
        first = 1
        if self.stored is not None and self.stored["phase"] == phase:
            with ba2ps.reading(self.path):
                for part, state in zip((network, *parts), self.stored["parts"], strict=True):
                    (part.set_state if isinstance(part, torch.Generator) else part.load_state_dict)(state)
                first = self.stored["epoch"] + 1
            print(f"going on from {self.path}: {phase}, epoch {first}")
        for epoch in range(first, number + 1):
            yield epoch
            if processes()[0] == 0:
                if not all(value.isfinite().all() for value in network.state_dict().values()):
                    raise InputError(f"weights are not finite after epoch {epoch}: lower --lr or --switch-lr")
                states = [part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
                          for part in (network, *parts)]
                with ba2ps.writing(self.path) as part:
                    torch.save({"phase": phase, "epoch": epoch, "parts": states, "finished": self.finished,
                                "rows": self.rows, "arguments": self.arguments}, part)
        self.finished.append(phase)

    def log(self, *cells):
        """Add a row to log.csv, which is written whole: neither a kill nor a full disk leaves half a row."""
        cells = [*cells, *[None] * (len(self.COLUMNS) - len(cells))]
        self.rows.append([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells])
        with ba2ps.writing(self.out / "log.csv") as part, open(part, "w", newline="") as file:
            csv.writer(file).writerows([self.COLUMNS, *self.rows])

    def save_model(self, path, network, **facts):
        if processes()[0] == 0:
            ba2ps.save(path, network, arguments=self.arguments, **facts)


# -------- the script ----------------------------------------------------------------------------------------

RECIPES = {  # the flags that --recipe sets; one that is given goes first
    "paper": {"budget_of": "layers"},
    "settled": {"budget_of": "channels", "settle": 0.2, "rank": "gradients", "batch_size": 16, "lr": 1e-1}}
TOY = {"source": "shapes", "no_mirror": ["strokes", "signs", "digits"], "network": "WRN-10-2",
       "image_size": 32, "backbone_epochs": 30, "epochs": 40, "milestone": 30, "lr": 1e-1, "switch_lr": 3e-4,
       "recipe": "settled", "out": "runs/first"}


def parse():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = stop
    add, rate = parser.add_argument, at_least(0.0)
    add("--data", metavar="DIR", help="a Visual Decathlon root (annotations/, data/), or folders, "
        "DOMAIN/train/CLASS/*.jpg; none: a toy is drawn")
    add("--cache", metavar="DIR", help="where decoded images are kept (default: ROOT/cache)")
    add("--workers", type=at_least(0), default=2, help="processes that decode images the first time")
    add("--source", metavar="NAME", help="the backbone's domain (default: imagenet12)")
    add("--domains", nargs="+", metavar="NAME", help="domains to adapt to (default: all others)")
    add("--splits", nargs="+", default=["train"], choices=["train", "val"], help="what is trained on")
    add("--no-mirror", nargs="+", default=[], metavar="NAME", help="besides the paper's four")
    add("--backbone", metavar="FILE", help="a backbone.pt to use instead of training one")
    add("--start-from", metavar="MODEL", help="a model.pt, pruned or not, to go on from: --domains are "
        "trained on, or added, and its others stay as they are")
    add("--network", metavar="NAME", help="of a new backbone: torchvision's, or WRN-DEPTH-WIDTH, default "
        "WRN-28-4")
    add("--weights", metavar="FILE", help="of a network of torchvision: a state_dict; none: they are "
        "trained on the source; DEFAULT, the default: its own")
    add("--backbone-epochs", type=at_least(0), default=30)
    add("--image-size", type=at_least(16), help="of the crop, default 64, or 224 for torchvision's networks; "
        "images are resized to 9/8 of it")
    add("--recipe", default="paper", choices=list(RECIPES), help="paper: as published, --budget-of layers; "
        "settled: no domain over budget, --budget-of channels --settle 0.2 --rank gradients, and for fewer "
        "images than the Decathlon's --batch-size 16 --lr 0.1")
    add("--budget", type=at_least(0.0, 1.0), default=0.5, help="beta: what a domain may have on")
    add("--budget-of", choices=ba2ps.BUDGETS, help="its measure: mean share over layers, share of channels, "
        "of multiply-accumulates, of weights")
    add("--sharing", type=lambda word: word if word == "learned" else rate(word), default=1.0,
        metavar="LAMBDA", help="lambda_PS; 0 is BA2; learned: raised while the domains share too little")
    add("--sharing-loss", default="intersection", choices=["intersection", "union", "jaccard"])
    add("--share-to", default="all", choices=["all", "current"], help="whose switches the sharing loss moves")
    add("--schedule", default="epoch", choices=["epoch", "batch", "mixed"], help="what a domain's turn is")
    add("--independent", action="store_true", help="every domain alone: with --sharing 0, BA2 as published")
    add("--adapt", default="switches", choices=["switches", "classifier", "all"],
        help="classifier: batch-norm and classifier, all channels on; all: a fine-tuned network a domain")
    add("--settle", type=at_least(0.0, 1.0), metavar="SHARE", help="of the epochs, after which each domain's "
        "least switches go off until its budget holds, and the switches stay (default: never)")
    add("--rank", default="switches", choices=["switches", "gradients"], help="what tells the least at "
        "--settle: the switches, trained until then; or the mean square of their gradients, all being on")
    add("--epochs", type=at_least(0), default=60, help="0: the backbone alone")
    add("--milestone", type=at_least(1), default=45, help="epoch after which both rates are divided by 10")
    add("--batch-size", type=at_least(1), default=32)
    add("--lr", type=rate, default=1e-3, help="SGD, of batch-norm and classifiers")
    add("--switch-lr", type=rate, default=1e-4, help="Adam, of the switches")
    add("--multiplier-lr", type=rate, default=0.3, help="step of lambda_d, times the excess over the budget")
    add("--bn-as-trained", action=argparse.BooleanOptionalAction, default=True,
        help="--no-bn-as-trained: new batch-norm statistics for the final switches")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast")
    add("--seed", type=at_least(0, 2 ** 32), default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="go on with the unfinished run in --out, if there is one")
    add("--out", metavar="DIR", help="default: runs/SOURCE-RECIPE-BUDGET-SEED")
    if parser.parse_known_args()[0].data is None:
        parser.set_defaults(**TOY)
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].recipe])
    args = parser.parse_args()
    if args.rank == "gradients" and args.settle is None:
        raise InputError("--rank gradients: give --settle, the share of the epochs that measures them")
    if args.adapt != "switches":
        args.budget, args.sharing, args.settle = 1.0, 0.0, 0.0  # every channel is on
    if args.independent and args.sharing:
        raise InputError(f"--independent trains every domain alone: --sharing {args.sharing} must be 0")
    if args.start_from and (args.backbone or args.adapt == "all"):
        raise InputError("--start-from holds a backbone and switches: leave out --backbone and --adapt all")
    if args.adapt == "all" and "val" in args.splits:
        raise InputError("--adapt all measures its baseline on val: leave out --splits val")
    check_device(args.device)
    return args


def pretrained(args):
    """A torchvision network with --weights, and the options with which get_model builds its like."""
    from torchvision.models import get_model, get_model_weights
    with ba2ps.reading(f"--network {args.network} --weights {args.weights}"):
        if args.weights == "DEFAULT":
            plain = get_model(args.network, weights="DEFAULT")
            options = {"num_classes": len(get_model_weights(args.network).DEFAULT.meta["categories"])}
            its = ("aux_logits", "transform_input")  # of GoogLeNet and Inception
            return plain, options | {key: getattr(plain, key) for key in its if hasattr(plain, key)}
        state = torch.load(args.weights, map_location="cpu", weights_only=True)
        options = {"num_classes": [len(value) for value in state.values() if value.dim() == 2][-1]}
        plain = get_model(args.network, weights=None, **options)
        plain.load_state_dict(state)
        return plain, options


def main():
    args = parse()
    join_processes(args)
    torch.manual_seed(args.seed)
    if processes()[0]:
        dist.barrier()  # the first process draws and decodes, the others find it done
    if args.data is None:
        args.data = "runs/toy"
        if not os.path.isdir(args.data):
            print(f"no --data: drawing a toy decathlon in {args.data}")
            sys.path.append(str(Path(__file__).parent / "tests"))
            from toy import draw_toy
            draw_toy(args.data)
    args.data = os.path.abspath(args.data)

    given, network, records, options = args.backbone or args.start_from, None, {}, {"num_classes": 0}
    usual = {"network": "WRN-28-4", "weights": None, "source": "imagenet12", "image_size": 64}
    if not (args.network or "WRN-").startswith("WRN-"):
        usual |= {"weights": "DEFAULT", "source": "imagenet", "image_size": 224}
    if given:
        network, facts = load_model(given)
        if bool(network.domains) == bool(args.backbone):
            raise InputError(f"{given}: --backbone takes backbone.pt, --start-from a model.pt")
        records = facts["domains"]
        usual = {"network": network.name, "weights": None, "source": network.source,
                 "image_size": facts["image_size"]}
    if args.weights and usual["weights"] is None:
        raise InputError(f"--weights {args.weights}: they are for a new --network of torchvision")
    for name, value in usual.items():
        wanted = vars(args)[name]
        vars(args)[name] = value if wanted is None else wanted
        if given and vars(args)[name] != value:
            raise InputError(f"--{name.replace('_', '-')} {wanted}: {given} has {value}")

    # everything is looked at before the first step is taken
    annotated = domains_of(args.data)
    domains = args.domains or [domain for domain in annotated if domain != args.source]
    if not domains or len({*domains, args.source}) <= len(domains):
        raise InputError(f"--domains {' '.join(domains)}: name some of {args.data} once, not {args.source}")
    if set(args.no_mirror) - {*domains, *annotated, args.source}:
        raise InputError(f"--no-mirror {' '.join(args.no_mirror)}: no such domains in {args.data}")
    train, val = {}, {}
    if args.weights not in (None, "none"):
        network, options = pretrained(args)
    to_train, numbers = network is None, range(options["num_classes"])
    for domain in [args.source] * (to_train or not given and args.source in annotated) + domains:
        for sets, splits in ((train, args.splits), (val, ["val"] if "val" not in args.splits else [])):
            record = train[domain].record if sets is val else records.get(domain)
            if splits:
                sets[domain] = Images(
                    args.data, domain, splits, args.image_size, record, args.no_mirror, args.cache)
                if not sets[domain].labelled:
                    raise InputError(f"{domain} has no labels in {' '.join(splits)}: training needs them")
                sets[domain].decode(args.workers)
    if numbers and args.source in train and len(train[args.source].record["classes"]) != len(numbers):
        raise InputError(f"--weights {args.weights} has {len(numbers)} classes, other than {args.source}")
    if to_train:
        options = {"num_classes": len(train[args.source].record["classes"])}
        with ba2ps.reading(f"--network {args.network}"):
            network = ba2ps.build(args.network, options, args.source, **options)
    if not isinstance(network, ba2ps.MultiDomain):
        network = ba2ps.add_switches(network, {}, args.source, args.image_size, args.network, options)
    ba2ps.Switches(network, [], args.budget, args.budget_of, args.image_size)  # refuses what cannot be held
    args.out = args.out or f"runs/{args.source}-{args.recipe}-{args.budget:g}-{args.seed}"
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}") from None
    run = Run(out, args)
    if processes()[1] > 1 and processes()[0] == 0:
        dist.barrier()
    last = "backbone.pt" if not args.epochs else "baseline.json" if args.adapt == "all" else "model.pt"
    if args.resume and run.stored is None and (out / last).exists():
        return print(f"nothing to resume: the run in {out} is finished, {out / last} is there")

    print(f"{network.name}, source {args.source}, on {args.device}; "
        f"{', '.join(domains)} at beta = {args.budget:g} of {args.budget_of}; writing to {out}")
    if processes()[1] > 1 and args.device.startswith("cuda"):
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(args.device, memory_format=torch.channels_last)
    mean, std = MEAN_STD.get(args.source, MEAN_STD["imagenet12"])
    records = {args.source: {"classes": [*map(str, numbers)], "category_ids": [*numbers], "mean": mean,
                             "std": std, "mirror": True}} | records | {
        domain: images.record for domain, images in train.items()}
    if to_train and "backbone" in run.finished:
        network.load_state_dict(ba2ps.load(out / "backbone.pt")[0].state_dict())
    elif to_train:
        train_backbone(network, train, val, args, run)
        known = {args.source: records[args.source]}
        run.save_model(out / "backbone.pt", network, image_size=args.image_size, domains=known)
    facts = {name: vars(args)[name] for name in ("image_size", "budget", "budget_of")} | {"domains": records}
    if args.epochs and args.adapt == "all":
        fine_tune(network, domains, train, val, args, run, facts)
    elif args.epochs:
        for domain in [domain for domain in domains if domain not in network.domains]:
            torch.manual_seed(args.seed)  # a domain starts alike whatever other domains there are
            network.add_domain(domain, len(records[domain]["classes"]))
        for group in [[domain] for domain in domains] if args.independent else [domains]:
            adapt(network, group, train, val, args, run)
        run.save_model(out / "model.pt", network, **facts)
        print(f"saved {out / 'model.pt'}; next: python evaluate.py {out / 'model.pt'}")
    if processes()[0] == 0:
        run.path.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        stop(error)
    except KeyboardInterrupt:
        stop("stopped; the same command with --resume goes on from the end of the last epoch")
