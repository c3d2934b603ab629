# SPDX-License-Identifier: MIT
"""train.py on a few drawn images: the method, what it leaves, kills, processes, bad input; and the toy."""
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
from PIL import Image

import ba2ps
import evaluate
import toy
import train
from test_ba2ps import plain

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
DOMAINS = ["strokes", "textures"]  # 9 images each: two batches of 4, and one image
TINY = """--source shapes --network WRN-10-1 --image-size 16 --backbone-epochs 2 --epochs 4
    --milestone 3 --batch-size 4 --lr 1e-2 --switch-lr 4e-4 --multiplier-lr 3 --workers 0 --device cpu"""
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
    main(*words, "--out", out)
    return out


@pytest.fixture
def learn(words, run, tmp_path):
    """A function that trains with these flags besides TINY, in the folder of this name: (network, facts)."""
    def learn(name, flags="", given=f"--backbone {run}/backbone.pt"):
        main(*words, *given.split(), *flags.split(), "--out", tmp_path / name)
        return ba2ps.load(tmp_path / name / "model.pt")
    return learn


def kinds(one, other, *domains):
    """The last parts of the names of all that differs between two networks, or in what `domains` own."""
    one, other = one.state_dict(), other.state_dict()
    names = {name for name in one if not domains or {*domains} & {*name.split(".")}}
    return {name.split(".")[-1] for name in names if not one[name].equal(other[name])}


def log_of(out):
    head, *rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_run_leaves_two_checkpoints_and_a_log(run, decathlon):
    assert sorted(os.listdir(run)) == ["backbone.pt", "log.csv", "model.pt"]
    network, facts = ba2ps.load(run / "model.pt")
    assert network.domains == DOMAINS and network.source == "shapes"
    assert (facts["budget"], facts["budget_of"], facts["image_size"]) == (0.5, "layers", 16)
    flags = {"data": str(decathlon), "recipe": "paper", "sharing": 1.0, "independent": False, "cache": None}
    assert facts["arguments"].items() >= (flags | {"sharing_loss": "intersection"}).items()
    measured = [evaluate.Images(decathlon, domain, ["train"], 16).decode() for domain in ("shapes", *DOMAINS)]
    assert facts["domains"] == {images.domain: images.record for images in measured}
    rows = log_of(run)
    named = [f"{row['phase']} {row['epoch']} {row['domain']}" for row in rows]
    adapted = [f"adapt {epoch} {domain}" for epoch in range(1, 5) for domain in DOMAINS]
    assert named == ["backbone 1 shapes", "backbone 2 shapes", *adapted]
    shared = torch.cat([on.all(0) for on in ba2ps.masks(network).values()]).double().mean().item()
    for domain, row in zip(DOMAINS, rows[-2:]):  # the last rows tell of the network that was saved
        images = evaluate.Images(decathlon, domain, ["val"], 16, facts["domains"][domain])
        right = evaluate.accuracy(evaluate.predict(network, domain, images, 1), images)
        logged = [float(row[key]) for key in ("val_accuracy", "usage", "intersection", "sparsity_all")]
        expected = right, ba2ps.usage(network)[domain], shared, ba2ps.sparsity(network)[1]
        assert logged == pytest.approx(expected, abs=1e-4) and 0.2 < logged[1] < 0.9
        assert 0.5 < float(row["loss"]) < 2 and float(row["multiplier"]) > 0


def test_the_backbone_and_the_logits_of_the_source_are_bit_identical_after_training(run):
    backbone, network = (ba2ps.load(run / name)[0] for name in ("backbone.pt", "model.pt"))
    state, x = network.state_dict(), torch.randn(5, 3, 16, 16)
    assert backbone.domains == [] and all(v.equal(state[name]) for name, v in backbone.state_dict().items())
    assert network.eval()(x, "shapes").equal(backbone.eval()(x, "shapes"))
    for domain in DOMAINS:  # while of what the domains own every kind has moved
        backbone.add_domain(domain, 3)
        assert kinds(network, backbone, domain) == {"weight", "bias", domain} | STATISTICS


@pytest.mark.parametrize("flags, budget, sharing, everyone", [
    ("", 0.5, 1, True), ("--sharing 0", 0.5, 0, False), ("", 0.9, 1, True),
    ("--share-to current", 0.9, 1, False), ("--sharing learned", 0.9, 0, True)])
def test_two_epochs_are_those_of_a_plain_loop(flags, budget, sharing, everyone, run, learn, decathlon):
    """Sections 3 and 4.1 written down anew; everyone: whether a step moves the switches of all domains."""
    order, net = torch.Generator().manual_seed(1), ba2ps.load(run / "backbone.pt")[0]
    for d in DOMAINS:
        torch.manual_seed(1)
        net.add_domain(d, 3)
    switches = {d: [layer.switches[d] for layer in ba2ps.switched_layers(net).values()] for d in DOMAINS}
    own = [p for name, p in net.named_parameters() if name.split(".")[-2] in DOMAINS]
    sgd = torch.optim.SGD(own, 1e-2, momentum=0.9)
    adam, price = {d: torch.optim.Adam(switches[d], 4e-4) for d in DOMAINS}, dict.fromkeys(DOMAINS, 0.0)
    for epoch in (1, 2):
        batches = {d: torch.randperm(9, generator=order).split(4) for d in DOMAINS}
        for d in [DOMAINS[k] for k in torch.randperm(2, generator=order)]:
            for part in batches[d]:
                x, y = evaluate.Images(decathlon, d, ["train"], 16).batch(part.tolist(), order)
                on = {d: [(s > 0).float() + (s - s.detach()) for s in switches[d]] for d in DOMAINS}
                usage = sum(s.mean() for s in on[d]) / len(on[d])
                both = sum((s * t).sum() for s, t in zip(*on.values())) / sum(map(len, on[d]))
                excess = F.relu(1 - both / budget)
                loss = F.relu(price[d] * (usage - budget)) + sharing * excess
                loss = loss + F.cross_entropy(plain(net, x, d, True), y)
                net.zero_grad()
                loss.backward()
                sgd.step()
                for moved in DOMAINS if everyone else [d]:
                    adam[moved].step()
                price[d] = max(0.0, price[d] + 3 * (usage.item() - budget))
                sharing += ("learned" in flags) * 3 * excess.item()
        for optimizer in (sgd, *adam.values()):
            optimizer.param_groups[0]["lr"] *= 0.1
    network, _ = learn("run", f"--seed 1 --epochs 2 --milestone 1 --budget {budget} {flags}")
    torch.testing.assert_close([*network.parameters()], [*net.parameters()], rtol=0, atol=1e-5)
    assert ba2ps.usage(network) == ba2ps.usage(net) and ba2ps.usage(net)["strokes"] < 0.99


def test_every_way_of_training_has_switches_of_its_own_and_a_seed_gives_them_again(learn):
    flags = "--budget 0.9 --switch-lr 1e-3 --epochs 2 --"
    ways = ["sharing learned", "sharing 0", "sharing-loss union", "sharing-loss jaccard", "share-to current",
            "schedule batch", "schedule mixed", "multiplier-lr 9", "sharing 1", "seed 1", "seed 1", "seed 0",
            "independent --sharing 0"]
    ends = [learn(way, flags + way)[0] for way in ways]
    alike = [(ways[i], ways[k]) for i, k in itertools.combinations(range(len(ways)), 2)
             if not kinds(ends[i], ends[k]) & {*DOMAINS}]
    assert alike == [("sharing 1", "seed 0"), ("seed 1", "seed 1")]
    assert not kinds(ends[8], ends[11]) and not kinds(ends[9], ends[10])
    for domain in DOMAINS:  # each alone
        assert not kinds(learn(domain, f"{flags}sharing 0 --domains {domain}")[0], ends[12], domain)


@pytest.mark.parametrize("name", ["epoch", "batch", "mixed"])
def test_every_schedule_shows_every_image_once_an_epoch(name):
    sizes = {"a": 21, "b": 8, "c": 3}
    plan, other = (train.schedule(name, sizes, 4, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    seen = sorted((domain, i) for step in plan for domain, images in step.items() for i in images)
    assert plan != other and seen == [(domain, i) for domain, size in sizes.items() for i in range(size)]
    assert max(sum(map(len, step.values())) for step in plan) == 4
    turns = "".join(min(step) if len(step) == 1 else "*" for step in plan)
    runs = len([*itertools.groupby(turns)])
    assert {"epoch": runs == 3, "batch": turns == "aabacaaba", "mixed": len(turns) == 8}[name]


@pytest.mark.parametrize("of, rank", [
    ("channels", "gradients"), ("params", "gradients"), ("macs", "switches")])
def test_settled_no_domain_is_over_budget_and_batch_norm_trains_on(of, rank, learn, tmp_path, monkeypatch):
    ends, report = [], train.report
    monkeypatch.setattr(train, "report", lambda network, *rest: (
        ends.append(copy.deepcopy(network)), report(network, *rest)))
    network, facts = learn("run", f"""--recipe settled --settle 0.5 --budget-of {of} --budget 0.4
                           --milestone 4 --rank {rank} --switch-lr 1e-4 --multiplier-lr 0.1""")
    each, _ = ba2ps.costs(network, of, 16)
    logged = [float(row["usage"]) for row in log_of(tmp_path / "run")]
    for domain, final in enumerate(ba2ps.usage(network, of, 16).values()):
        assert 0.4 - max(each.values()) < final < 0.4 + 1e-9 and facts["budget_of"] == of
        assert min(logged[:4]) > 0.6 and logged[domain + 4::2] == pytest.approx([final] * 2, rel=1e-5)
    counter = {"num_batches_tracked"}  # of batch-norm, without meaning at a fixed momentum
    assert kinds(*ends[:2]) - kinds(*ends[2:]) == counter | ({*DOMAINS} if rank == "switches" else set())
    assert kinds(*ends[2:]) == {"weight", "bias"} | STATISTICS - counter and not kinds(ends[3], network)


def test_without_data_the_toys_settings_and_flags_before_recipes_and_help(script, monkeypatch):
    first = {"data": None, "source": "shapes", "no_mirror": ["strokes", "signs", "digits"],
             "network": "WRN-10-2", "image_size": 32, "epochs": 40, "milestone": 30, "lr": 0.1,
             "rank": "gradients", "recipe": "settled", "batch_size": 16, "settle": 0.2, "switch_lr": 3e-4,
             "budget_of": "channels"}
    for name in ("train.py", "evaluate.py", "prune.py"):
        assert "show this help" in script(name, "--help")[1]
    for words, expected in {
            "": first, "--network WRN-16-2": first | {"network": "WRN-16-2"},
            "--data d --settle 0.1 --budget-of macs --recipe settled": {"budget_of": "macs", "settle": 0.1,
                                                                        "lr": 0.1},
            "--data d": {"budget_of": "layers", "settle": None, "batch_size": 32, "lr": 1e-3}}.items():
        monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
        assert vars(train.parse()).items() >= expected.items()


def test_the_classifier_alone_leaves_every_channel_on_and_training_on_val_no_accuracy(learn, tmp_path):
    network, facts = learn("run", "--adapt classifier --budget 0.25 --splits train val --epochs 1")
    assert facts["budget"] == 1 and min(ba2ps.usage(network).values()) == pytest.approx(1)
    assert all(s.eq(1e-3).all() for name, s in network.named_parameters() if ".switches." in name)
    assert network.bn1["strokes"].num_batches_tracked == 4 + 4  # the source's, and batches of 9 + 6 images
    assert {row["val_accuracy"] for row in log_of(tmp_path / "run")} == {""}


def test_full_fine_tuning_gives_a_network_for_each_domain_and_a_baseline(words, run, script, tmp_path):
    main(*words, "--adapt", "all", "--backbone", run / "backbone.pt", "--out", tmp_path)
    table, report = tmp_path / "baseline.json", tmp_path / "report.json"
    backbone = ba2ps.load(run / "backbone.pt")[0].conv1.weight
    for domain, accuracy in json.loads(table.read_text()).items():
        network, _ = ba2ps.load(tmp_path / f"{domain}.pt")
        assert [*network.classifiers] == [domain] and not network.conv1.weight.equal(backbone)
        script("evaluate.py", tmp_path / f"{domain}.pt", "--baseline", table, "--json", report)
        assert json.loads(report.read_text()).items() >= {"mean_accuracy": accuracy, "s_score": 250}.items()


def test_going_on_from_a_model_takes_over_what_its_domains_own(run, learn):
    (first, facts), given = ba2ps.load(run / "model.pt"), f"--start-from {run}/model.pt --lr 0 --switch-lr 0"
    (still, _), (one, one_facts) = learn("still", given=given), learn("one", "--domains textures", given)
    assert kinds(first, still) == STATISTICS
    assert kinds(first, one, "textures") == STATISTICS and not kinds(first, one, "strokes")  # which stays
    assert one_facts["domains"] == facts["domains"]


def test_bf16_and_statistics_estimated_anew(learn):
    usual, bf16, new = (learn(str(i), f"--epochs 2 --lr 1e-3 --switch-lr 1e-5 {flags}")[0].eval()
                        for i, flags in enumerate(("", "--precision bf16", "--no-bn-as-trained")))
    one, other = (network(torch.ones(1, 3, 16, 16), "strokes") for network in (usual, bf16))
    assert 0 < (one - other).abs().max() < 0.05 * one.abs().max() and kinds(usual, new) == STATISTICS
    norm, x, seen = new.bn1["strokes"], torch.randn(8, 3, 16, 16), []
    norm.register_forward_pre_hook(lambda norm, args: seen.append(args[0].transpose(0, 1).flatten(1)))
    ba2ps.reestimate_batch_norm(new, "strokes", [(x[:4], None), (x[4:], None)])
    assert not kinds(usual, new, "shapes")
    torch.testing.assert_close(norm.running_mean, torch.cat(seen, 1).mean(1))
    torch.testing.assert_close(norm.running_var, sum(part.var(1) for part in seen) / 2)


SERVER = multiprocessing.get_context("forkserver")  # its children have none of the threads of this process
SERVER.set_forkserver_preload(["torch._dynamo", "torchvision.transforms.functional", "pytest"])
RUNS = {  # all phases, recipes, schedules and kinds of training
    "paper": "--sharing learned", "all": "--adapt all", "backbone": "--epochs 0 --backbone-epochs 10",
    "settled": "--backbone RUN/backbone.pt --recipe settled --schedule mixed --no-bn-as-trained",
    "independent": "--start-from RUN/model.pt --independent --sharing 0 --schedule batch --no-bn-as-trained"}


def work(words, prepare, *arguments):
    """In a process of its own: train.py, after prepare(*arguments); the last of `words` is --out."""
    sys.stdout = sys.stderr = open(words[-1].with_suffix(".txt"), "a", buffering=1)
    torch.set_num_threads(1)
    prepare(*arguments)
    main(*words)


def kill_at(number):
    """Kill this process at the `number`-th of its steps, half-written files, and moves of files."""
    calls = itertools.count()
    for owner, name in ((torch.optim.SGD, "step"), (torch, "save"), (os, "replace")):
        def ticking(*args, function=getattr(owner, name), name=name):
            if name == "save":
                function(*args)
                os.truncate(args[1], 1000)
            if next(calls) == number:
                os.kill(os.getpid(), 9)  # SIGKILL
            return function(*args)
        setattr(owner, name, ticking)


def left(out):
    """{file: its text, or weights and facts} of all that a finished run leaves, but --data and --out."""
    files = {path.name: path.read_text() for path in out.iterdir() if path.suffix != ".pt"}
    for path in out.glob("*.pt"):
        network, facts = ba2ps.load(path)
        facts["arguments"] |= {"data": None, "out": None}
        files[path.name] = facts, {name: value.tolist() for name, value in network.state_dict().items()}
    return files


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_moment_and_resumed_is_as_if_never_killed(name, words, run, script, tmp_path):
    words, out = [*words, *RUNS[name].replace("RUN", str(run)).split(), "--resume", "--out"], tmp_path / "run"
    moments, codes = torch.randint(25, (3,)).tolist(), []
    for folder, number in (("whole", -1), *(("run", moment) for moment in moments), ("run", -1)):
        process = SERVER.Process(target=work, args=([*words, tmp_path / folder], kill_at, number))
        process.start()
        process.join()
        codes.append(process.exitcode)
    printed = (tmp_path / "run.txt").read_text()
    assert codes == [0, -9, -9, -9, 0] and "going on from" in printed, printed
    assert left(out) == left(tmp_path / "whole")
    assert ("model.pt" in left(out)) == (name not in ("all", "backbone")) and "state.pt" not in left(out)
    assert "finished" in script("train.py", *words, out)[1]


@pytest.mark.parametrize("owner, name, number, error, named, kept", [
    (torch.optim.SGD, "step", 18, KeyboardInterrupt(), "the same command with --resume", ("adapt", 2)),
    (torch, "save", 5, RuntimeError("enforce fail\nNo space left"), "run/state.pt", ("adapt", 1)),
    (torch, "save", 8, OSError("No space left"), "run/model.pt", ("adapt", 4)),
    (os, "replace", 9, OSError("No space left"), "run/log.csv", ("adapt", 1)),
    (F, "cross_entropy", 4, None, "the loss of shapes is nan", ("backbone", 1)),
    (F, "cross_entropy", 18, None, "is nan: lower --lr", ("adapt", 2))])
def test_a_run_that_breaks_says_so_in_one_line_and_goes_on_as_if_it_had_not(
        owner, name, number, error, named, kept, words, run, refused, tmp_path, monkeypatch):
    function, calls, out = getattr(owner, name), itertools.count(1), tmp_path / "run"
    def broken(*args, **kwargs):
        breaks = next(calls) == number
        result = None if breaks and name == "replace" else function(*args, **kwargs)
        if breaks and error:
            raise error
        return float("nan") * result if breaks else result
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        refused("train.py", *words, "--out", out, named=named)
    assert not [*out.glob("*.part"), *out.glob("model.pt")]
    state = torch.load(out / "state.pt", weights_only=True)
    assert (state["phase"].split()[0], state["epoch"]) == kept and log_of(out)
    main(*words, "--resume", "--out", out)
    assert left(out) == left(run)


def test_what_cannot_be_resumed_is_refused_and_left_as_it_is(words, run, refused, tmp_path, monkeypatch):
    out, state = tmp_path / "run", tmp_path / "run/state.pt"
    words = [*words, "--out", out]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "report", lambda *args: 1 / (3 - args[5]))  # in the third epoch
        main(*words)
    kept = {path: path.read_bytes() for path in out.iterdir()}
    refused("train.py", *words, named=f"--resume, or remove {state}")
    for flag in ("--seed 1", "--lr 1", "--domains strokes", "--sharing 0", "--settle 0", "--budget-of macs"):
        refused("train.py", *words, "--resume", *flag.split(), named=f"written with {flag.split()[0]} ")
    for damaged in (b"", b"text", kept[state][:1000], kept[state][:-1000], (run / "model.pt").read_bytes()):
        state.write_bytes(damaged)
        refused("train.py", *words, "--resume", named=state)
    state.write_bytes(kept[state])
    assert kept == {path: path.read_bytes() for path in out.iterdir()}
    (out / "model.pt.77.part").write_text("of a run that was killed")
    main(*words, "--resume", "--data", shutil.copytree(words[1], tmp_path / "moved"))
    assert left(out).keys() == left(run).keys() and left(out)["model.pt"] == left(run)["model.pt"]


def join(rank, number, port, halves):
    """Be one of torchrun's processes, and keep its weights; halves: both halves of a batch are alike."""
    def batch(images, indices, order, device="cpu", own=slice(None), batch=evaluate.Images.batch):
        half = len(indices) // 2 if halves else 0
        rows = [*range(half), *range(half), *range(2 * half, len(indices))]
        return tuple(part[rows][own] for part in batch(images, indices, order))
    evaluate.Images.batch = batch
    train.Run.save_model = lambda run, path, network, **facts: ba2ps.save(f"{path}{rank}", network)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=number, RANK=rank)


def torchrun(number, words, halves=False):
    """[the network that each process ends with] after training in so many."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = str(number), str(free.getsockname()[1]), halves
    processes = [SERVER.Process(target=work, args=(words, join, str(rank), *world)) for rank in range(number)]
    for call in (SERVER.Process.start, SERVER.Process.join):
        for process in processes:
            call(process)
    assert not any(process.exitcode for process in processes), words[-1].with_suffix(".txt").read_text()
    return [ba2ps.load(f"{words[-1]}/model.pt{rank}")[0] for rank in range(number)]


@pytest.mark.parametrize("flags", ["", "--recipe settled", "--adapt classifier"])
def test_two_processes_end_alike_and_follow_one(flags, words, run, tmp_path):
    """Of the last batch, a single image, the first process gets none. Steps are those of one process where
    batch-norm finds the same statistics in both halves of a batch."""
    words = [*words, "--epochs", 2, *flags.split()]
    one, other = torchrun(2, [*words, "--schedule", "mixed", "--out", tmp_path / "run"])
    assert kinds(one, other) == {"num_batches_tracked"}
    words += ["--backbone", run / "backbone.pt", "--out"]
    alone, = torchrun(1, [*words, tmp_path / "1"], halves=True)
    one, other = torchrun(2, [*words, tmp_path / "2"], halves=True)
    assert kinds(one, other) == {"num_batches_tracked"}
    torch.testing.assert_close([*one.parameters()], [*alone.parameters()], rtol=0, atol=1e-5)


BAD = """--budget 1.5|--budget -0.1|--budget nan|--budget half|--budget-of flops
--image-size 8|--image-size 16.5|--batch-size 0|--batch-size 4.5|--epochs -1|--milestone 0
--backbone-epochs -1|--lr -1|--lr nan|--lr inf|--switch-lr -1|--multiplier-lr -1|--sharing -1|--sharing some
--sharing nan|--sharing-loss dice|--share-to none|--schedule random|--settle 2|--recipe cake|--adapt none
--precision fp16|--splits test|--splits|--seed one|--seed 1e3|--seed 99999999999999999999|--device toaster
--device cuda:99|--workers -1|--domains|--domains shapes|--domains strokes strokes|--no-mirror plants|--hold
--independent|--rank gradients|--adapt all --splits val|--out text|--backbone pruned.pt|--backbone model.pt
--network WRN-16-1 --backbone backbone.pt|--image-size 32 --backbone backbone.pt
--source a --backbone backbone.pt|--start-from model.pt --adapt all
--start-from model.pt --backbone backbone.pt"""
VALUES = """--budget 0.01|--budget 0|--network WRN-11-1|--network WRN-4-1|--network WRN-10-0|--network WRN-10
--data nowhere|--data text|--cache text|--backbone text|word
--backbone missing.pt|--domains plants|--source plants|--start-from backbone.pt"""  # the last word is named


@pytest.fixture(scope="module")
def odd(run, tmp_path_factory):
    """A folder with files that train.py cannot use, or not for every flag."""
    odd = shutil.copytree(run, tmp_path_factory.mktemp("odd") / "files")
    network, facts = ba2ps.load(run / "model.pt")
    ba2ps.save(odd / "pruned.pt", ba2ps.prune(network), **facts)
    (odd / "text").write_text("no checkpoint")
    return odd


@pytest.mark.parametrize("case", f"{BAD}\n{VALUES}".replace("\n", "|").split("|"))
def test_bad_input_gets_one_line_and_nothing_is_written(case, words, odd, refused, monkeypatch):
    monkeypatch.chdir(odd)
    said = case.split()
    refused("train.py", *words, "--out", "run", *said, named=said[-1] if case in VALUES else said[0])
    assert sorted(os.listdir()) == ["backbone.pt", "log.csv", "model.pt", "pruned.pt", "text"]


def test_the_first_command_draws_the_toy_and_trains_on_it(tmp_path, monkeypatch, capsys):
    def grey(rng, label, fixed):
        return Image.new("RGB", (72, 72), (50 * label + 25,) * 3)
    small = {d: (*parts[:3], (1, 1, 1)) for d, parts in toy.TOY.items()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "TOY", small | {"grey": (grey, 5, [*"abcde"], (4, 2, 3))})
    monkeypatch.setattr(train, "train_backbone", lambda *args: None)
    monkeypatch.setattr(train, "adapt", lambda *args: None)
    main()
    main()  # the second time it is there
    assert capsys.readouterr().out.count("drawing") == 1
    network, facts = ba2ps.load("runs/first/model.pt")
    assert (network.source, network.name, facts["image_size"]) == ("shapes", "WRN-10-2", 32)
    assert network.domains == ["digits", "grey", "signs", "strokes", "textures"]
    assert [d for d, record in facts["domains"].items() if record["mirror"]] == ["shapes", "grey", "textures"]
    for split, number in {"train": 20, "val": 10, "test": 15}.items():  # labels are those of the images
        images = evaluate.Images("runs/toy", "grey", [split], 32)
        seen = [int(images[i][0].float().mean().item() // 50) for i in range(number)]
        assert len({*images.ids}) == number == len(images) and images.record["classes"] == [*"abcde"]
        assert images.labels == (seen if split != "test" else [-1] * 15) and seen != sorted(seen)
    toy.draw_toy("again"), toy.draw_toy("other", seed=1)
    one, again, other = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*.jpg")}
                         for root in (tmp_path / "runs/toy", tmp_path / "again", tmp_path / "other"))
    assert one == again and len(one) == 3 * 79 + 45 and not {*one.values()} & {*other.values()}
