# SPDX-License-Identifier: MIT
"""train.py on a few drawn images: the method, what it leaves, kills, processes, bad input."""
import copy
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import get_model

import ba2ps
import evaluate
import train
from tests import toy
from tests.test_ba2ps import plain

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
DOMAINS = ["strokes", "textures"]           # 9 images each: two batches of 4, and one image
TINY = """--source shapes --network WRN-10-1 --image-size 16 --epochs 4 --batch-size 4 --lr 1e-2
    --workers 0 --device cpu"""
FAST = "--switch-lr 4e-4 --multiplier-lr 3 "
WHOLE = FAST + "--backbone-epochs 2"
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def main(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        train.main()


@pytest.fixture(scope="module")
def words(decathlon):
    return ["--data", decathlon, *TINY.split()]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    main(*words, *WHOLE.split(), "--out", out)
    return out


@pytest.fixture
def learn(words, run, tmp_path):
    """A function: train with these flags, in the folder of this name; gives (network, facts)."""
    def learn(name, flags="", given=None):
        given = given or f"--backbone {run}/backbone.pt"
        main(*words, *given.split(), *flags.split(), "--out", tmp_path / name)
        return ba2ps.load(tmp_path / name / "model.pt")
    return learn


def kinds(one, other, *domains):
    """The last parts of the names of all that differs, or of what differs in `domains`."""
    one = one.state_dict()
    other = other.state_dict()
    result = set()
    for name, value in one.items():
        inside = not domains or set(domains) & set(name.split("."))
        if inside and not value.equal(other[name]):
            result.add(name.split(".")[-1])
    return result


def log_of(out):
    head, *rows = [line.split(",") for line in (out / "log.csv").read_text("utf-8").splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_run_leaves_two_checkpoints_and_a_log(run, decathlon):
    assert sorted(os.listdir(run)) == ["backbone.pt", "log.csv", "model.pt"]
    network, facts = ba2ps.load(run / "model.pt")
    assert network.domains == DOMAINS
    assert (facts["budget"], facts["budget_of"]) == (0.5, "layers")
    expected = {"data": str(decathlon), "recipe": "paper", "sharing": 1.0, "cache": None}
    assert facts["arguments"].items() >= expected.items()
    for domain in ("shapes", *DOMAINS):
        images = evaluate.Images(decathlon, domain, ["train"], 16).decode()
        assert facts["domains"][domain] == images.record
    rows = log_of(run)
    named = [f"{row['phase']} {row['epoch']} {row['domain']}" for row in rows]
    adapted = [f"adapt {epoch} {domain}" for epoch in range(1, 5) for domain in DOMAINS]
    assert named == ["backbone 1 shapes", "backbone 2 shapes", *adapted]
    cost, _ = ba2ps.costs(network)
    both = ba2ps.read(network, "strokes") & ba2ps.read(network, "textures")
    for domain, row in zip(DOMAINS, rows[-2:]):     # of the network that was saved
        images = evaluate.Images(decathlon, domain, ["val"], 16, facts["domains"][domain])
        right = evaluate.accuracy(evaluate.predict(network, domain, images, 1), images)
        columns = "val_accuracy", "usage", "intersection", "sparsity_all"
        logged = [float(row[name]) for name in columns]
        usage = ba2ps.usage(network)[domain]
        shared = float(cost @ both.double())
        expected = right, usage, shared, ba2ps.sparsity(network)[1]
        assert logged == pytest.approx(expected, abs=1e-4)
        assert 0.2 < usage < 0.9
        assert row["measure"] == "layers"
    for name in ("loss", "multiplier", "sharing_loss", "intersection"):     # all are at work
        assert len({row[name] for row in rows[2:]}) > 2


def test_the_backbone_and_the_logits_of_the_source_are_bit_identical_after_training(run):
    backbone, _ = ba2ps.load(run / "backbone.pt")
    network, _ = ba2ps.load(run / "model.pt")
    state = network.state_dict()
    assert backbone.domains == []
    for name, value in backbone.state_dict().items():
        assert value.equal(state[name])
    x = torch.randn(5, 3, 16, 16)
    assert network.eval()(x, "shapes").equal(backbone.eval()(x, "shapes"))
    for domain in DOMAINS:      # while of what the domains own every kind has moved
        backbone.add_domain(domain, 3)
        assert kinds(network, backbone, domain) == {"weight", "bias", domain} | STATISTICS


@pytest.mark.parametrize("flags, budget, sharing, everyone", [
    ("", 0.5, 1, True), ("--sharing 0", 0.5, 0, False), ("", 0.9, 1, True),
    ("--share-to current", 0.9, 1, False)])
def test_two_epochs_are_those_of_a_plain_loop(
        flags, budget, sharing, everyone, run, learn, decathlon):
    """Sections 3 and 4.1 anew; everyone: whether a step moves the switches of all domains."""
    order = torch.Generator().manual_seed(1)
    net, _ = ba2ps.load(run / "backbone.pt")
    adam = {}
    images = {}
    for d in DOMAINS:
        torch.manual_seed(1)
        net.add_domain(d, 3)
        adam[d] = torch.optim.Adam([net.switches[d]], 4e-4)
        images[d] = evaluate.Images(decathlon, d, ["train"], 16)
    widths = [net.layer(name).in_channels for name in net.layers]
    own = [p for name, p in net.named_parameters() if name.split(".")[-2] in DOMAINS]
    sgd = torch.optim.SGD(own, 1e-2, momentum=0.9)
    multiplier = dict.fromkeys(DOMAINS, 0.0)
    for _ in (1, 2):
        batches = {d: torch.randperm(9, generator=order).split(4) for d in DOMAINS}
        for k in torch.randperm(2, generator=order):
            d = DOMAINS[k]
            for part in batches[d]:
                x, y = images[d].batch(part.tolist(), order)
                on = {}
                for name in DOMAINS:
                    row = net.switches[name]
                    on[name] = (row > 0).float() + row - row.detach()
                usage = torch.stack([s.mean() for s in on[d].split(widths)]).mean()
                excess = F.relu(1 - (on["strokes"] * on["textures"]).mean() / budget)
                loss = F.relu(multiplier[d] * (usage - budget)) + sharing * excess
                loss = loss + F.cross_entropy(plain(net, x, d, True), y)
                net.zero_grad()
                loss.backward()
                sgd.step()
                for moved in DOMAINS if everyone else [d]:
                    adam[moved].step()
                multiplier[d] = max(0.0, multiplier[d] + 3 * (usage.item() - budget))
        for optimizer in (sgd, *adam.values()):
            optimizer.param_groups[0]["lr"] *= 0.1
    flags += f" --seed 1 --epochs 2 --decay-at 0.5 --budget {budget}"
    network, _ = learn("run", FAST + flags)
    torch.testing.assert_close([*network.parameters()], [*net.parameters()], rtol=0, atol=1e-5)
    assert ba2ps.usage(network) == ba2ps.usage(net)
    assert ba2ps.usage(net)["strokes"] < 0.99


def test_every_way_of_training_is_another_one_and_a_seed_gives_it_again(learn):
    flags = "--budget 0.9 --switch-lr 1e-3 --epochs 2 --"
    ways = ["sharing 0", "sharing-loss union", "sharing-loss jaccard", "share-to current",
            "schedule batch", "schedule mixed", "multiplier-lr 9", "decay-at 0.5", "sharing 2",
            "seed 1", "seed 1", "seed 0", "sharing 1", "independent --sharing 0"]
    ends = {}
    for number, way in enumerate(ways):
        ends[number], _ = learn(str(number), flags + way)
    alike = []
    for i, k in itertools.combinations(ends, 2):
        if not kinds(ends[i], ends[k]) & set(DOMAINS):
            alike.append((ways[i], ways[k]))
            assert not kinds(ends[i], ends[k])
    assert alike == [("seed 1", "seed 1"), ("seed 0", "sharing 1")]
    for domain in DOMAINS:      # each alone
        alone, _ = learn(domain, f"{flags}sharing 0 --domains {domain}")
        assert not kinds(alone, ends[13], domain) - {domain}
        torch.testing.assert_close(alone.switches[domain], ends[13].switches[domain])


@pytest.mark.parametrize("name", ["epoch", "batch", "mixed"])
def test_every_schedule_shows_every_image_once_an_epoch(name):
    sizes = {"a": 21, "b": 8, "c": 3}
    plan = train.schedule(name, sizes, 4, torch.Generator().manual_seed(1))
    assert plan != train.schedule(name, sizes, 4, torch.Generator().manual_seed(2))
    seen = [(domain, i) for step in plan for domain, images in step.items() for i in images]
    assert sorted(seen) == [(domain, i) for domain, size in sizes.items() for i in range(size)]
    assert max(sum(map(len, step.values())) for step in plan) == 4
    turns = "".join(min(step) if len(step) == 1 else "*" for step in plan)
    runs = len([*itertools.groupby(turns)])
    right = {"epoch": runs == 3, "batch": turns == "aabacaaba", "mixed": len(turns) == 8}
    assert right[name]


@pytest.mark.parametrize("of, pool, epochs", [
    ("channels", 1, 5), ("params", 0, 5), ("macs", 0, 2), ("layers", "0.5 --even 0.6", 3)])
def test_settled_no_domain_is_over_budget_and_batch_norm_trains_on(
        of, pool, epochs, learn, tmp_path, monkeypatch):
    ends = []
    report = train.report

    def listen(network, *rest):
        ends.append(copy.deepcopy(network))
        report(network, *rest)
    monkeypatch.setattr(train, "report", listen)
    network, facts = learn("run", f"--recipe settled --budget-of {of} --budget 0.4 "
                                  f"--pool {pool} --epochs {epochs} --spread 1e-4")
    settled = {2: 1, 3: 1, 5: 2}[epochs]                # reports before the switches stay
    rows = log_of(tmp_path / "run")
    for domain, usage in ba2ps.usage(network, of).items():
        assert usage < 0.4 + 1e-9
        logged = [float(row["usage"]) for row in rows if row["domain"] == domain]
        assert logged[0] == pytest.approx(1)            # the warm-up
        assert logged[settled:] == pytest.approx([usage] * (epochs - settled), rel=1e-5)
    if epochs == 5:
        warm, searched, first, _, last = ends
        assert set(DOMAINS) < kinds(warm, searched)
        moved = {"weight", "bias", "running_mean", "running_var"}
        assert kinds(first, last) - {"num_batches_tracked"} == moved
        assert not kinds(last, network)


def test_importance_is_the_decayed_mean_square_of_the_gradients_of_the_warm_up(learn, monkeypatch):
    seen = []
    given = []
    finite = train.finite
    begin = ba2ps.start_switches

    def look(gradients):
        if isinstance(gradients, list):         # of a step
            seen.append(gradients[0].double())
        return finite(gradients)

    def listen(network, domain, importance, *rest):
        given.append(importance)
        begin(network, domain, importance, *rest)
    monkeypatch.setattr(train, "finite", look)
    monkeypatch.setattr(ba2ps, "start_switches", listen)
    learn("run", "--domains strokes --epochs 3 --warmup 1 --pool 0")
    for decay, right in ((0.999, True), (1.0, False)):
        mean = 0.0
        for gradient in seen:
            mean = decay * mean + gradient.square()
        assert torch.allclose(given[0], mean / mean.sum(), rtol=1e-5, atol=0) == right


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_said_once(learn, monkeypatch, capsys):
    def spoil(network):
        network.switches["strokes"].grad[3] = torch.inf
    monkeypatch.setattr(train, "sum_gradients", spoil)
    network, _ = learn("run", "--domains strokes --epochs 1")
    network.add_domain("fresh", 3)
    assert capsys.readouterr().out.count("such steps are skipped") == 1
    assert network.switches["strokes"].equal(network.switches["fresh"])
    for name in network.owned:
        if name != network.classifier:
            norms = network.layer(name)
            assert norms["strokes"].weight.equal(norms["fresh"].weight)


def test_flags_go_before_the_toys_and_the_recipes_which_are_printed_first(
        script, monkeypatch, capsys):
    for name in ("train.py", "evaluate.py", "prune.py"):
        assert "show this help" in script(name, "--help")[1]
    toys = {"source": "shapes", "network": "WRN-10-2", "image_size": 32, "epochs": 40, "lr": 0.1,
            "recipe": "settled", "warmup": 0.2, "settle": 0.4, "budget_of": "channels"}
    paper = {"budget_of": "layers", "warmup": 0.0, "settle": None, "batch_size": 32, "lr": 1e-3}
    for words, expected in {
            "": toys, "--network WRN-16-2": toys | {"network": "WRN-16-2"}, "--data d": paper,
            "--data d --settle 0.3 --recipe settled": {"settle": 0.3, "lr": 0.1, "warmup": 0.2},
            }.items():
        monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
        args = train.parse()
        assert vars(args).items() >= expected.items()
        line = f"recipe {args.recipe}: --budget-of {args.budget_of} --warmup {args.warmup} "
        assert capsys.readouterr().out.startswith(line)


def test_the_classifier_alone_leaves_every_channel_on(learn, tmp_path):
    network, facts = learn("run", "--adapt classifier --splits train val --epochs 1")
    assert "budget" not in facts
    assert min(ba2ps.usage(network).values()) == pytest.approx(1)
    for domain in DOMAINS:
        assert network.switches[domain].eq(1e-3).all()
    norm = network.layer("bn1")["strokes"]
    assert norm.num_batches_tracked == 4 + 4    # the source's, and batches of 9 + 6 images
    assert {row["val_accuracy"] for row in log_of(tmp_path / "run")} == {""}    # val is trained on


def test_full_fine_tuning_gives_a_network_for_each_domain_and_a_baseline(
        words, run, script, tmp_path):
    main(*words, "--adapt", "all", "--backbone", run / "backbone.pt", "--out", tmp_path)
    table = tmp_path / "baseline.json"
    report = tmp_path / "report.json"
    backbone, _ = ba2ps.load(run / "backbone.pt")
    for domain, accuracy in json.loads(table.read_text()).items():
        network, _ = ba2ps.load(tmp_path / f"{domain}.pt")
        assert list(network.classes) == [domain]
        assert not network.layer("conv1").weight.equal(backbone.layer("conv1").weight)
        script("evaluate.py", tmp_path / f"{domain}.pt", "--baseline", table, "--json", report)
        found = json.loads(report.read_text())
        assert found.items() >= {"mean_accuracy": accuracy, "s_score": 250}.items()


def test_going_on_from_a_model_takes_over_what_its_domains_own(run, learn):
    first, facts = ba2ps.load(run / "model.pt")
    given = f"--start-from {run}/model.pt --lr 0 --switch-lr 0"
    still, _ = learn("still", given=given)
    one, one_facts = learn("one", "--domains textures", given)
    assert kinds(first, still) == STATISTICS
    assert kinds(first, one, "textures") == STATISTICS
    assert not kinds(first, one, "strokes")     # which stays
    assert one_facts["domains"] == facts["domains"]


def test_bf16_and_statistics_estimated_anew(learn):
    ends = []
    for i, flags in enumerate(("", "--precision bf16", "--reestimate-bn")):
        network, _ = learn(str(i), f"--epochs 2 --lr 1e-3 --switch-lr 1e-5 {flags}")
        ends.append(network.eval())
    usual, bf16, new = ends
    x = torch.ones(1, 3, 16, 16)
    one = usual(x, "strokes")
    gap = (one - bf16(x, "strokes")).abs().max()
    assert 0 < gap < 0.05 * one.abs().max()
    assert kinds(usual, new) == STATISTICS
    assert not kinds(usual, new, "shapes")


def test_a_finished_model_is_never_replaced(words, run, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*words, "--backbone", run / "backbone.pt", "--epochs", 1]
    for _ in range(3):
        main(*words)
    name = "shapes-paper-0.5-0"
    assert sorted(os.listdir("runs")) == [name, f"{name}-2", f"{name}-3"]
    refused("train.py", *words, "--out", f"runs/{name}", named="has a finished model.pt")
    refused("train.py", *words[:-4], "--backbone-epochs", 0, "--out", run, named="finished")


def test_what_would_fail_in_the_end_fails_before_training(words, refused, tmp_path, monkeypatch):
    """shapes has 65 images: the last batch is one, which batch-norm refuses on a 1 x 1 map."""
    monkeypatch.setattr(torch.optim, "SGD", None)
    words = [*words, "--network", "mobilenet_v3_small", "--weights", "none", "--image-size", 32]
    refused("train.py", *words, "--out", tmp_path / "run", named="a last batch of 1 ")
    assert os.listdir(tmp_path / "run") == []


def test_weights_from_a_file(words, tmp_path):
    plain = get_model("mobilenet_v3_small", num_classes=7)
    state = {f"module.{name}": value for name, value in plain.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    main(*words[:2], *"--epochs 1 --workers 0 --device cpu --image-size 64 --batch-size 9".split(),
         "--domains", "strokes", "--network", "mobilenet_v3_small",
         "--weights", tmp_path / "weights.pt", "--out", tmp_path / "run")
    network, facts = evaluate.load_model(tmp_path / "run/model.pt")
    assert len(facts["domains"]["imagenet"]["classes"]) == 7
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network.eval()(x, "imagenet"), plain.eval()(x))


SERVER = multiprocessing.get_context("forkserver")      # its children have no threads of this one
SERVER.set_forkserver_preload(["torch._dynamo", "torchvision.transforms.functional", "pytest"])
RUNS = {    # all phases, recipes, schedules and kinds of training
    "paper": WHOLE, "all": "--adapt all --backbone-epochs 2", "dropout": WHOLE,
    "backbone": "--epochs 0 --backbone-epochs 10",
    "settled": "--backbone RUN/backbone.pt --recipe settled --schedule mixed --reestimate-bn",
    "independent": "--start-from RUN/model.pt --independent --sharing 0 --schedule batch"}


def work(words, prepare, *arguments):
    """In a process of its own: train.py, after prepare(*arguments); the last word is --out."""
    sys.stdout = sys.stderr = open(words[-1].with_suffix(".txt"), "a", buffering=1)
    torch.set_num_threads(1)
    prepare(*arguments)
    main(*words)


def kill_at(number, dropout):
    """Kill this process at the `number`-th of its steps, half-written files, and moves of files."""
    forward = ba2ps.BasicBlock.forward
    if dropout:
        ba2ps.BasicBlock.forward = lambda block, x: F.dropout(forward(block, x), .2, block.training)
    calls = itertools.count()
    for owner, name in ((torch.optim.SGD, "step"), (torch, "save"), (os, "replace")):
        def ticking(*args, function=getattr(owner, name), name=name):
            if name == "save":
                function(*args)
            if next(calls) == number:
                if name == "save":
                    os.truncate(args[1], 1000)
                os.kill(os.getpid(), 9)             # SIGKILL
            return function(*args) if name != "save" else None
        setattr(owner, name, ticking)


def left(out):
    """{file: its text, or weights and facts} of what a run leaves, but --data and --out."""
    files = {}
    for path in out.iterdir():
        if path.suffix == ".pt":
            network, facts = ba2ps.load(path)
            facts["arguments"] |= {"data": None, "out": None}
            weights = {name: value.tolist() for name, value in network.state_dict().items()}
            files[path.name] = facts, weights
        else:
            files[path.name] = path.read_text("utf-8")
    return files


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_moment_and_resumed_is_as_if_never_killed(name, words, run, script, tmp_path):
    out = tmp_path / "run"
    more = RUNS[name].replace("RUN", str(run)).split()
    words = [*words, *more, "--resume", "--out"]
    order = torch.Generator().manual_seed(len(name))
    moments = torch.randint(12, 18, (2,), generator=order).tolist()
    codes = []
    for folder, number in (("whole", -1), *(("run", moment) for moment in moments), ("run", -1)):
        arguments = [*words, tmp_path / folder], kill_at, number, name == "dropout"
        process = SERVER.Process(target=work, args=arguments)
        process.start()
        process.join()
        codes.append(process.exitcode)
    printed = (tmp_path / "run.txt").read_text()
    assert codes == [0, -9, -9, 0], printed
    assert "going on from" in printed
    assert left(out) == left(tmp_path / "whole")
    assert ("model.pt" in left(out)) == (name not in ("all", "backbone"))
    assert not [*out.glob("*.part"), *out.glob("state.pt")]
    assert "finished" in script("train.py", *words, out)[1]


@pytest.mark.parametrize("owner, name, number, error, named, kept", [
    (torch.optim.SGD, "step", 18, KeyboardInterrupt(), "command with --resume", ("adapt", 2)),
    (torch, "save", 6, RuntimeError("enforce fail\nNo space left"), "run/state.pt", ("adapt", 1)),
    (torch, "save", 9, OSError("No space left"), "run/model.pt", ("adapt", 4)),
    (os, "replace", 10, OSError("No space left"), "run/log.csv", ("adapt", 1)),
    (F, "cross_entropy", 4, None, "the loss of shapes is nan", ("backbone", 1)),
    (F, "cross_entropy", 18, None, "is nan: lower --lr", ("adapt", 2))])
def test_a_run_that_breaks_says_so_in_one_line_and_goes_on_as_if_it_had_not(
        owner, name, number, error, named, kept, words, run, refused, tmp_path, monkeypatch):
    function = getattr(owner, name)
    calls = itertools.count(1)
    out = tmp_path / "run"
    words = [*words, *WHOLE.split(), "--out", out]

    def broken(*args, **kwargs):
        breaks = next(calls) == number
        result = None if breaks and name == "replace" else function(*args, **kwargs)
        if breaks and error:
            raise error
        return float("nan") * result if breaks else result
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        refused("train.py", *words, named=named)
    assert not [*out.glob("*.part"), *out.glob("model.pt")]
    state = torch.load(out / "state.pt", weights_only=True)
    assert (state["phase"].split()[0], state["epoch"]) == kept
    assert log_of(out)
    main(*words, "--resume")
    assert left(out) == left(run)


def test_what_cannot_be_resumed_is_refused_and_left_as_it_is(
        words, run, refused, tmp_path, monkeypatch):
    data = shutil.copytree(words[1], tmp_path / "moved")
    out = tmp_path / "run"
    state = out / "state.pt"
    words = [*words, *WHOLE.split(), "--out", out]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "report", lambda *args: 1 / (3 - args[5]))     # in the third epoch
        main(*words)
    kept = {path: path.read_bytes() for path in out.iterdir()}
    refused("train.py", *words, named=f"{state} is an unfinished run's: give --resume")
    for flag in ("--seed 1", "--lr 1", "--domains strokes", "--settle 1", "--budget-of macs"):
        named = f"written with {flag.split()[0]} "
        refused("train.py", *words, "--resume", *flag.split(), named=named)
    for damaged in (b"", b"text", kept[state][:1000], (run / "model.pt").read_bytes()):
        state.write_bytes(damaged)
        refused("train.py", *words, "--resume", named=state)
    state.write_bytes(kept[state])
    path = data / "annotations/strokes_train.json"
    text = path.read_text()
    path.write_text(text.replace("character 2", "renamed"))
    refused("train.py", *words, "--resume", "--data", data, named="images of strokes train")
    path.write_text(text)
    assert kept == {path: path.read_bytes() for path in out.iterdir()}
    (out / "model.pt.77.part").write_text("of a run that was killed")
    (out / "mine.part").write_text("of somebody else")
    main(*words, "--resume", "--data", data)
    assert left(out).keys() == left(run).keys() | {"mine.part"}
    assert left(out)["model.pt"] == left(run)["model.pt"]


def join(rank, number, port, halves):
    """Be one of torchrun's processes, and keep its weights; halves: a batch has equal halves."""
    batch = evaluate.Images.batch

    def doubled(images, indices, order, device="cpu", own=slice(None)):
        half = len(indices) // 2 if halves else 0
        rows = [*range(half), *range(half), *range(2 * half, len(indices))]
        return tuple(part[rows][own] for part in batch(images, indices, order))

    def save_model(run, name, network, **facts):
        ba2ps.save(f"{run.out}/{name}{rank}", network)
    evaluate.Images.batch = doubled
    train.Run.save_model = save_model
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=number, RANK=str(rank))


def torchrun(number, words, halves=False):
    """[the network that each process ends with] after training in so many."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = str(number), str(free.getsockname()[1]), halves
    processes = []
    for rank in range(number):
        processes.append(SERVER.Process(target=work, args=(words, join, rank, *world)))
        processes[-1].start()
    for process in processes:
        process.join()
    printed = words[-1].with_suffix(".txt").read_text()
    assert not any(process.exitcode for process in processes), printed
    assert printed.count("recipe ") == 1            # the first one speaks for all
    return [ba2ps.load(f"{words[-1]}/model.pt{rank}")[0] for rank in range(number)]


@pytest.mark.parametrize("flags", [FAST, "--recipe settled", "--adapt classifier"])
def test_two_processes_end_alike_and_follow_one(flags, words, run, tmp_path):
    """Of the last batch, a single image, one process gets none. Steps are those of one process if
    batch-norm finds the same statistics in both halves of a batch."""
    words = [*words, "--epochs", 2, *flags.split()]
    mixed = [*words, "--schedule", "mixed", "--backbone-epochs", 1]
    one, other = torchrun(2, [*mixed, "--out", tmp_path / "run"])
    assert not kinds(one, other)
    words += ["--backbone", run / "backbone.pt", "--out"]
    alone, = torchrun(1, [*words, tmp_path / "1"], halves=True)
    one, other = torchrun(2, [*words, tmp_path / "2"], halves=True)
    assert not kinds(one, other)
    torch.testing.assert_close([*one.parameters()], [*alone.parameters()], rtol=0, atol=1e-5)


BAD = """--budget 1.5|--budget nan|--budget half|--budget-of flops|--image-size 8|--batch-size 0
--batch-size 4.5|--epochs -1|--decay-at 2|--backbone-epochs -1|--lr -1|--lr inf|--switch-lr -1
--multiplier-lr -1|--sharing learned|--sharing-loss dice|--share-to none|--schedule random
--settle 2|--settle 0|--recipe cake|--adapt none|--precision fp16|--splits test|--splits
--seed 1e3|--seed 99999999999999999999|--device toaster|--device cuda:99|--workers -1|--domains
--domains shapes|--domains strokes strokes|--no-mirror plants|--milestone 3|--out text|--warmup 2
--spread 0|--source a --backbone backbone.pt|--image-size 32 --backbone backbone.pt
--network WRN-16-1 --backbone backbone.pt|--backbone pruned.pt|--backbone model.pt
--independent|--weights DEFAULT|--settle 0.1 --warmup 0.8|--adapt all --splits val
--start-from model.pt --adapt all|--backbone backbone.pt --start-from model.pt
--backbone-epochs 3 --backbone backbone.pt|--weights none --start-from model.pt
--switch-lr 1 --adapt classifier|--budget 0.5 --adapt all|--sharing 1 --epochs 0
--share-to all --sharing 0|--sharing-loss union --sharing 0|--pool 0.3|--even 0.5|--spread 0.1
--pool 0.3 --warmup 0.5 --independent --sharing 0|--multiplier-lr 1 --warmup 0.5 --settle 0.5"""
VALUES = """--budget 0.01|--budget 0|--network WRN-11-1|--network WRN-4-1|--network WRN-10-0
--network WRN-10|--weights none --network nothing|--data nowhere|--data text|--cache text|word
--backbone text|--backbone missing.pt|--domains plants|--source plants
--start-from backbone.pt"""          # the last word is named


@pytest.fixture(scope="module")
def odd(run, tmp_path_factory):
    """A folder with files that train.py cannot use, or not for every flag."""
    odd = shutil.copytree(run, tmp_path_factory.mktemp("odd") / "files")
    network, facts = ba2ps.load(run / "model.pt")
    ba2ps.save(odd / "pruned.pt", ba2ps.prune(network), **facts)
    (odd / "text").write_text("no checkpoint")
    return odd


@pytest.mark.parametrize("case", f"{BAD}|{VALUES}".replace("\n", "|").split("|"))
def test_bad_input_gets_one_line_and_nothing_is_written(case, words, odd, refused, monkeypatch):
    monkeypatch.chdir(odd)
    said = case.split()
    named = said[-1] if case in VALUES else said[0]
    refused("train.py", *words, "--out", "run", *said, named=named)
    files = sorted(path.name for path in odd.rglob("*") if path.is_file())
    assert files == ["backbone.pt", "log.csv", "model.pt", "pruned.pt", "text"]


def test_the_first_command_draws_the_toy_and_trains_on_it(tmp_path, monkeypatch, capsys):
    small = {domain: (*parts[:3], (1, 1, 1)) for domain, parts in toy.TOY.items()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "TOY", small)
    monkeypatch.setattr(train, "train_backbone", lambda *args: None)
    monkeypatch.setattr(train, "adapt", lambda *args: None)
    main()
    main()      # the second time it is there
    assert capsys.readouterr().out.count("drawing") == 1
    assert sorted(os.listdir("runs")) == ["first", "first-2", "toy"]
    network, facts = ba2ps.load("runs/first/model.pt")
    assert (network.source, network.name, network.image_size) == ("shapes", "WRN-10-2", 32)
    assert network.domains == ["digits", "signs", "strokes", "textures"]
    mirrored = [domain for domain, record in facts["domains"].items() if record["mirror"]]
    assert mirrored == ["shapes", "textures"]
