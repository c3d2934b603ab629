# SPDX-License-Identifier: MIT
"""train.py, prune.py and evaluate.py as a user runs them, on a few drawn images; and what they say to bad input."""
import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import ba2ps
from test_evaluate import write_domain

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--depth", "10", "--widen-factor", "1", "--image-size", "32", "--device", "cpu", "--workers", "0"]


def run(script, *words, capsys):
    """Exit code, standard output and standard error of one script, run in this process."""
    code, argv = 0, sys.argv
    sys.argv = [script, *map(str, words)]
    capsys.readouterr()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = argv
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("decathlon")
    for i, domain in enumerate(["animals", "birds", "cars"]):
        write_domain(root, domain, ("one", "two", "three")[:2 + i % 2], per_class=6, first_id=10_000 * i, seed=i)
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """One run for all tests that only look: a hundred steps, enough for the budget to switch channels off."""
    out, words = tmp_path_factory.mktemp("run"), sys.argv
    sys.argv = ["train.py", "--data", str(data), "--source", "animals", *SMALL, "--backbone-epochs", "1", "--epochs", "25",
                "--milestone", "20", "--batch-size", "4", "--lr", "1e-2", "--switch-lr", "1e-3", "--budget", "0.5",
                "--multiplier-lr", "1", "--no-mirror", "cars", "--out", str(out)]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        sys.argv = words
    return out


def test_train_leaves_a_log_and_two_checkpoints(trained):
    network, facts = ba2ps.load(trained / "model.pt")
    assert network.domains == ["birds", "cars"] and network.source == "animals"
    assert facts["budget"] == 0.5 and facts["image_size"] == 32 and facts["arguments"]["lr"] == 1e-2
    assert [facts["domains"][d]["mirror"] for d in ("animals", "birds", "cars")] == [True, True, False]
    assert facts["domains"]["cars"]["category_ids"] == [20007, 20017] and set(facts["multipliers"]) == {"birds", "cars"}
    rows = list(csv.DictReader(open(trained / "log.csv")))
    assert [r["epoch"] for r in rows if r["domain"] == "cars"] == [*map(str, range(1, 26)), "final"]
    assert all(0 <= float(r["val_accuracy"]) <= 100 for r in rows)
    for domain in network.domains:  # the last row tells of the network that was saved
        last = [r for r in rows if r["domain"] == domain][-1]
        assert float(last["usage"]) == pytest.approx(ba2ps.usage(network, domain), abs=1e-5)
        assert float(last["sparsity_all"]) == pytest.approx(ba2ps.sparsity(network)[1], abs=1e-5)
        assert 0.4 < ba2ps.usage(network, domain) < 0.55  # without the budget loss it is 0.60 and 0.68


def test_the_frozen_backbone_is_bit_identical_after_training(trained):
    backbone, _ = ba2ps.load(trained / "backbone.pt")
    network, _ = ba2ps.load(trained / "model.pt")
    assert backbone.domains == []
    state = network.state_dict()
    for name, value in backbone.state_dict().items():
        assert torch.equal(state[name], value), name
    own = [name for name in state if ".birds." in name and "running" not in name and "num_batches" not in name]
    moved = [name for name in own if name.endswith(".weight") and not torch.equal(
        state[name], state.get(name.replace(".birds.", ".animals."), torch.zeros(0)))]
    assert moved  # while what the domain owns has learned


def test_train_prune_evaluate_give_one_answer(data, trained, tmp_path, capsys):
    reports = {}
    code, out, err = run("prune.py", trained / "model.pt", "--out", tmp_path / "pruned.pt", capsys=capsys)
    assert code == 0, err
    assert "block3.0.conv2" in out and "params" in out and "MACs" in out
    assert (tmp_path / "pruned.pt").stat().st_size < (trained / "model.pt").stat().st_size
    for name, path in (("masked", trained / "model.pt"), ("pruned", tmp_path / "pruned.pt")):
        code, out, err = run("evaluate.py", path, "--data", data, "--json", tmp_path / f"{name}.json", capsys=capsys)
        assert code == 0, err
        assert "S is left out" in out and "birds" in out and "cars" in out
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
    code, out, err = run("prune.py", trained / "model.pt", "--out", tmp_path / "k.pt", "--keep-source", "--no-latency",
                         capsys=capsys)
    assert code == 0 and "keeps the whole backbone" in out, err
    code, _, err = run("evaluate.py", tmp_path / "k.pt", "--data", data, "--json", tmp_path / "k.json", capsys=capsys)
    assert code == 0 and json.loads((tmp_path / "k.json").read_text()) == reports["masked"], err
    masked, pruned = reports["masked"], reports["pruned"]
    assert {"budget", "split", "domains", "mean_accuracy", "s_score", "s_o", "s_p", "complexity", "complexity_with_source",
            "params", "sparsity_all"} <= masked.keys()
    assert list(masked["domains"]) == ["birds", "cars"]
    assert all({"accuracy", "sparsity", "usage", "complexity"} == row.keys() for row in masked["domains"].values())
    assert masked["source_accuracy"] is not None and pruned["source_accuracy"] is None
    for key in ("domains", "mean_accuracy", "complexity", "params", "sparsity_all", "budget"):
        assert masked[key] == pruned[key], key
    assert masked["mean_accuracy"] == pytest.approx(sum(r["accuracy"] for r in masked["domains"].values()) / 2)


def test_the_results_file_of_a_split_without_labels(data, trained, tmp_path, capsys):
    code, out, err = run("evaluate.py", trained / "model.pt", "--data", data, "--split", "test", "--crops", "1",
                         "--results", tmp_path / "results.json", "--json", tmp_path / "r.json", capsys=capsys)
    assert code == 0 and "no labels" in out, err
    results = json.loads((tmp_path / "results.json").read_text())
    images = {domain: json.loads((data / f"annotations/{domain}_test_stripped.json").read_text())["images"]
              for domain in ("animals", "birds", "cars")}
    assert {r["image_id"] for r in results} == {i["id"] for rows in images.values() for i in rows}
    for r in results:  # domain k has categories 10,000 k + 7, 17, 27
        assert set(r) == {"image_id", "category_id"} and r["category_id"] // 10_000 == r["image_id"] // 10_000
        assert r["category_id"] % 10_000 in (7, 17, 27)
    assert json.loads((tmp_path / "r.json").read_text())["mean_accuracy"] is None


def test_a_baseline_file_gives_s(data, trained, tmp_path, capsys):
    (tmp_path / "b.json").write_text('{"birds": 50, "cars": 50}')
    code, _, err = run("evaluate.py", trained / "model.pt", "--data", data, "--baseline", tmp_path / "b.json",
                       "--json", tmp_path / "r.json", capsys=capsys)
    report = json.loads((tmp_path / "r.json").read_text())
    expected = sum(1000 * (row["accuracy"] / 100) ** 2 for row in report["domains"].values())  # E_max is 1
    assert code == 0 and report["s_score"] == pytest.approx(expected), err
    assert report["s_o"] == pytest.approx(expected / report["complexity"])
    assert report["s_p"] == pytest.approx(expected / report["params"])


@pytest.mark.parametrize("extra", [[], ["--sharing", "0"]])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(data, trained, tmp_path, capsys, extra):
    states = []
    for i, seed in enumerate((3, 3, 4)):
        code, _, err = run("train.py", "--data", data, "--backbone", trained / "backbone.pt", *SMALL, "--epochs", "2",
                           "--batch-size", "4", "--seed", seed, "--out", tmp_path / str(i), *extra, capsys=capsys)
        assert code == 0, err
        states.append(ba2ps.load(tmp_path / str(i) / "model.pt")[0].state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_sharing_moves_the_switches_of_all_domains_and_without_it_only_ones_own(data, trained, tmp_path, capsys, monkeypatch):
    """Train on one domain of two: the intersection pulls at the other as well, BA2 does not touch it."""
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.zeros(n, dtype=torch.long))  # always birds
    for sharing, moved in ((1, True), (0, False)):
        code, _, err = run("train.py", "--data", data, "--backbone", trained / "backbone.pt", *SMALL, "--epochs", "6",
                           "--batch-size", "4", "--switch-lr", "1e-3", "--budget", "1", "--sharing", sharing,
                           "--out", tmp_path / str(sharing), "--domains", "birds", "cars", "--bn-as-trained", capsys=capsys)
        assert code == 0, err
        layers = ba2ps.switched_layers(ba2ps.load(tmp_path / str(sharing) / "model.pt")[0]).values()
        own, other = (torch.cat([layer.switches[d].detach() for layer in layers]) for d in ("birds", "cars"))
        assert (own != 1e-3).any()
        assert bool((other != torch.tensor(1e-3)).any()) == moved


@pytest.mark.parametrize("sharing, to, reached", [(1, "all", 2), (0, "all", 1), (1, "current", 1), ("learned", "all", 2)])
def test_a_step_has_gradients_for_all_domains_or_for_its_own(sharing, to, reached, data, trained, tmp_path, capsys, monkeypatch):
    """BA2: a gradient of zero would still move the other domains' switches, by Adam's momentum."""
    seen, step = set(), torch.optim.Adam.step

    def counted(optimizer, *args):
        seen.add(sum(p.grad is not None for group in optimizer.param_groups for p in group["params"]))
        return step(optimizer, *args)
    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    code, _, err = run("train.py", "--data", data, "--backbone", trained / "backbone.pt", *SMALL, "--epochs", "1",
                       "--sharing", sharing, "--share-to", to, "--out", tmp_path, capsys=capsys)
    assert code == 0 and seen == {reached}, err  # the switches of a domain are one tensor


@pytest.fixture
def adapted(data, trained, tmp_path, capsys):
    """A function that trains two domains for an epoch or more on the backbone of `trained`, and loads the model."""
    def train(name, *words, given="--backbone", file=None):
        code, _, err = run("train.py", "--data", data, given, file or trained / "backbone.pt", *SMALL, "--epochs", "1",
                           "--batch-size", "4", "--lr", "1e-2", "--switch-lr", "1e-3", "--out", tmp_path / name, *words,
                           capsys=capsys)
        assert code == 0, err
        return ba2ps.load(tmp_path / name / "model.pt") if (tmp_path / name / "model.pt").exists() else None
    return train


def owned(network, domain):
    return {name: value for name, value in network.state_dict().items() if domain in name.split(".")}


def test_independent_training_is_that_of_each_domain_alone(adapted):
    both, _ = adapted("both", "--independent", "--sharing", "0")
    alone, _ = adapted("alone", "--domains", "birds", "--sharing", "0")
    cars, _ = adapted("cars", "--domains", "cars", "--sharing", "0")
    together, _ = adapted("together", "--sharing", "0")
    assert both.domains == ["birds", "cars"] and owned(both, "birds")
    assert all(torch.equal(value, owned(both, "birds")[name]) for name, value in owned(alone, "birds").items())
    assert all(torch.equal(value, owned(both, "cars")[name]) for name, value in owned(cars, "cars").items())
    assert any(not torch.equal(value, owned(both, "birds")[name]) for name, value in owned(together, "birds").items())


@pytest.mark.parametrize("words, near", [
    (["--precision", "bf16"], 0.05), (["--precision", "fp16"], 0.01), (["--no-channels-last"], 1e-4), (["--compile"], 1e-4)])
def test_precision_memory_format_and_compile_train_the_same_network(words, near, adapted, monkeypatch):
    """At a rate at which an epoch does not yet multiply rounding errors; the logits, relative to the largest.

    Compiled without generating code, which takes a minute here and needs a compiler.
    """
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or real(network, backend="aot_eager"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    slow = ["--lr", "1e-3", "--switch-lr", "1e-5", "--domains", "birds"]
    usual, other = (adapted(name, *slow, *more)[0].eval() for name, more in (("usual", []), ("other", words)))
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = usual(x, "birds"), other(x, "birds")
    assert (one - two).abs().max() < near * one.abs().max()
    assert "--precision" not in words or not torch.equal(one, two)
    assert len(compiled) == (words == ["--compile"])


def test_refining_goes_on_from_the_pruned_model_with_its_switches_as_they_are(adapted, tmp_path, recwarn):
    """No epoch of it would give prune's network; an epoch moves batch-norm and classifiers, no switch and no convolution."""
    whole, before = adapted("run", "--recipe", "held", "--budget", "0.25", "--refine", "1", "--no-mirror", "cars")
    refined, facts = ba2ps.load(tmp_path / "run/refined.pt")
    assert not [str(warning.message) for warning in recwarn if "lr_scheduler" in str(warning.message)]
    assert facts["multipliers"] == before["multipliers"]
    pruned = ba2ps.prune(whole)
    assert refined.domains == whole.domains and refined.source not in refined.classifiers
    assert set(facts["domains"]) == set(whole.domains) and facts["budget"] == 0.25
    assert ba2ps.usage(refined, "birds") == ba2ps.usage(whole, "birds") and ba2ps.macs(refined) == ba2ps.macs(pruned)
    assert torch.equal(ba2ps.binary_switches(refined, whole.domains), ba2ps.binary_switches(pruned, whole.domains))
    moved = {name for name, value in refined.state_dict().items() if not torch.equal(value, pruned.state_dict()[name])}
    assert not moved & {f"{name}.weight" for name, module in pruned.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert {f"classifiers.{domain}.weight" for domain in whole.domains} <= moved
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows if row.startswith("refine")] == [
        ["refine", epoch, domain] for epoch in ("1", "final") for domain in ("birds", "cars")]


def test_sharing_with_the_current_domain_alone_is_not_ba2(adapted):
    """The gradient of the intersection keeps switches on in the batch's domain too, if in that alone: see that it arrives."""
    def usage(name, *words):
        network, _ = adapted(name, *words, "--budget", "1", "--epochs", "4", "--bn-as-trained", "--lr", "0")
        return [ba2ps.usage(network, domain) for domain in ("birds", "cars")]
    ba2, current = usage("ba2", "--sharing", "0"), usage("current", "--sharing", "100", "--share-to", "current")
    assert all(shared > alone + 0.05 for shared, alone in zip(current, ba2))


@pytest.mark.parametrize("schedule", ["batch", "mixed"])
def test_other_schedules_and_forms_train(adapted, schedule):
    usual, _ = adapted("usual", "--budget", "0.25")
    other, facts = adapted("other", "--budget", "0.25", "--schedule", schedule, "--sharing-loss", "jaccard")
    assert facts["arguments"]["schedule"] == schedule
    assert any(not torch.equal(a, b) for a, b in zip(usual.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("name", ["epoch", "batch", "mixed"])
def test_every_schedule_shows_every_image_once_an_epoch(name):
    import train
    sizes = {"a": 21, "b": 8, "c": 3}
    plan = train.schedule(name, sizes, 4, torch.Generator().manual_seed(1))
    seen = sorted((domain, i) for step in plan for domain, images in step.items() for i in images)
    assert seen == [(domain, i) for domain, size in sizes.items() for i in range(size)]
    assert max(sum(map(len, step.values())) for step in plan) == 4
    turns = [next(iter(step)) for step in plan]
    if name == "mixed":
        assert len(plan) == 8 and any(len(step) > 1 for step in plan)
    elif name == "epoch":
        assert len(plan) == 6 + 2 + 1 and sum(a != b for a, b in zip(turns, turns[1:])) == 2
    else:
        assert len(plan) == 6 + 2 + 1 and turns.index("c") == 4
        positions = [i for i, domain in enumerate(turns) if domain == "b"]
        assert positions[0] < 4 < positions[1]  # spread over the epoch, not one after the other
    assert plan != train.schedule(name, sizes, 4, torch.Generator().manual_seed(2))


def test_the_classifier_baseline_leaves_every_channel_on(adapted, data, tmp_path, capsys):
    network, facts = adapted("classifier", "--adapt", "classifier", "--budget", "0.25")
    assert facts["budget"] == 1
    for layer in ba2ps.switched_layers(network).values():
        assert torch.equal(layer.switches["birds"], torch.full_like(layer.switches["birds"], 1e-3))


def test_full_fine_tuning_gives_a_network_for_each_domain_and_a_baseline(adapted, trained, data, tmp_path, capsys):
    adapted("tuned", "--adapt", "all")
    baseline = json.loads((tmp_path / "tuned" / "baseline.json").read_text())
    backbone = ba2ps.load(trained / "backbone.pt")[0].state_dict()
    networks = {domain: ba2ps.load(tmp_path / "tuned" / f"{domain}.pt")[0] for domain in ("birds", "cars")}
    weights = [backbone["block2.0.conv1.weight"], *(n.state_dict()["block2.0.conv1.weight"] for n in networks.values())]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    for domain, network in networks.items():
        assert network.domains == [domain] and list(network.classifiers) == [domain]
        code, out, err = run("evaluate.py", tmp_path / "tuned" / f"{domain}.pt", "--data", data, "--json",
                             tmp_path / "r.json", "--device", "cpu", "--workers", "0", capsys=capsys)
        assert code == 0, err
        assert json.loads((tmp_path / "r.json").read_text())["mean_accuracy"] == pytest.approx(baseline[domain])


def test_going_on_from_a_model_takes_over_what_its_domains_own(adapted, tmp_path):
    first, facts = adapted("first", "--budget", "0.75")
    model = tmp_path / "first" / "model.pt"
    same, _ = adapted("same", "--epochs", "0", "--bn-as-trained", given="--start-from", file=model)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in first.state_dict().items())
    one, one_facts = adapted("one", "--domains", "cars", "--budget", "0.5", given="--start-from", file=model)
    assert one.domains == ["cars"] and one_facts["budget"] == 0.5 and set(one_facts["domains"]) == {"animals", "cars"}
    assert one_facts["domains"]["cars"] == facts["domains"]["cars"]


@pytest.mark.parametrize("words", [["--budget", "0.25"], ["--budget", "0.6", "--seed", "1"], ["--budget", "0.25", "--independent", "--sharing", "0"],
                                   ["--budget", "0.3", "--schedule", "mixed", "--epochs", "4"],
                                   ["--budget", "0.75", "--epochs", "1", "--batch-size", "99", "--schedule", "mixed"]])
def test_the_held_recipe_never_breaks_the_budget_and_uses_it(adapted, words):
    network, facts = adapted("held", "--recipe", "held", "--epochs", "3", *words)
    usages = [ba2ps.usage(network, domain) for domain in network.domains]
    assert all(0.97 * facts["budget"] <= usage <= facts["budget"] for usage in usages), usages
    if "--independent" not in words:
        assert ba2ps.sparsity(network)[1] >= 0.95 * (1 - facts["budget"])


def test_train_and_val_together_leave_no_val_accuracy(data, trained, tmp_path, capsys):
    code, out, err = run("train.py", "--data", data, "--backbone", trained / "backbone.pt", *SMALL, "--epochs", "1",
                         "--splits", "train", "val", "--out", tmp_path, "--precision", "bf16", capsys=capsys)
    assert code == 0 and "-%" in out.replace("birds", ""), err
    assert all(row["val_accuracy"] == "" for row in csv.DictReader(open(tmp_path / "log.csv")))


# --- bad input: one line on standard error, exit code 2, nothing written ---------------------------------------------

BAD = [  # script, words, what the line must name
    ("train.py", ["--data", "nowhere"], "nowhere"),
    ("train.py", ["--data", "DATA", "--source", "plants"], "plants_train.json"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--domains", "birds", "plants"], "plants_train.json"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--domains", "animals"], "--domains"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--no-mirror", "plants"], "--no-mirror plants"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--budget", "0"], "--budget 0"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--budget", "1.5"], "--budget 1.5"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--budget", "nan"], "--budget nan"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--budget", "half"], "--budget"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--depth", "11"], "depth 11"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--batch-size", "0"], "--batch-size"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--device", "toaster"], "--device toaster"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--splits", "test"], "--splits"),
    ("train.py", ["--data", "DATA", "--backbone", "none.pt"], "none.pt"),
    ("train.py", ["--data", "DATA", "--backbone", "TEXT"], "text.pt"),
    ("train.py", ["--data", "DATA", "--backbone", "RUN/model.pt"], "adapted model"),
    ("train.py", ["--data", "DATA", "--backbone", "RUN/backbone.pt", "--widen-factor", "2"], "--widen-factor"),
    ("train.py", ["--data", "DATA", "--backbone", "RUN/backbone.pt", "--out", "TEXT"], "--out"),
    ("train.py", ["--data", "DATA", "--start-from", "RUN/backbone.pt"], "--start-from"),
    ("train.py", ["--data", "DATA", "--start-from", "PRUNED"], "pruned.pt"),
    ("train.py", ["--data", "DATA", "--backbone", "RUN/backbone.pt", "--start-from", "RUN/model.pt"], "give one"),
    ("train.py", ["--data", "DATA", "--start-from", "RUN/model.pt", "--adapt", "all"], "--start-from"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--independent"], "--sharing 0"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--sharing", "some"], "--sharing"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--sharing", "-1"], "--sharing -1"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--shrink", "0.8", "--settle", "0.5"], "--settle 0.5"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--settle", "0"], "--settle 0"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--budget", "0.01"], "--budget 0.01"),
    ("train.py", ["--data", "DATA", "--source", "animals", "--recipe", "cake"], "--recipe"),
    ("train.py", ["--data", "CUT", "--source", "animals"], "cannot be read"),
    ("train.py", ["--data", "GONE", "--source", "animals"], "is missing"),
    ("evaluate.py", ["none.pt", "--data", "DATA"], "none.pt"),
    ("evaluate.py", ["TEXT", "--data", "DATA"], "text.pt"),
    ("evaluate.py", ["FOREIGN", "--data", "DATA"], "foreign.pt"),
    ("evaluate.py", ["RUN/backbone.pt", "--data", "DATA"], "backbone"),
    ("evaluate.py", ["BARE", "--data", "DATA"], "bare.pt"),
    ("evaluate.py", ["RUN/model.pt", "--data", "nowhere"], "nowhere"),
    ("evaluate.py", ["RUN/model.pt", "--data", "CUT"], "cannot be read"),
    ("evaluate.py", ["RUN/model.pt", "--data", "OTHER"], "categories"),
    ("evaluate.py", ["RUN/model.pt", "--data", "DATA", "--no-mirror", "plants"], "plants"),
    ("evaluate.py", ["RUN/model.pt", "--data", "DATA", "--baseline", "TEXT"], "text.pt"),
    ("evaluate.py", ["RUN/model.pt", "--data", "DATA", "--json", "no/where.json"], "no/where.json"),
    ("evaluate.py", ["RUN/model.pt", "--data", "DATA", "--split", "all"], "--split"),
    ("evaluate.py", ["RUN/model.pt", "--data", "DATA", "--device", "toaster"], "--device toaster"),
    ("evaluate.py", [], "no model"),
    ("evaluate.py", ["RUN/model.pt"], "--data"),
    ("evaluate.py", ["--compare", "RUN/model.pt"], "two or more"),
    ("evaluate.py", ["--compare", "RUN/model.pt", "RUN/model.pt"], "two or more"),
    ("evaluate.py", ["RUN/model.pt", "--compare", "RUN/model.pt", "none.pt"], "outside --compare"),
    ("evaluate.py", ["--compare", "RUN/model.pt", "none.pt"], "none.pt"),
    ("evaluate.py", ["--compare", "RUN/model.pt", "RUN/backbone.pt"], "backbone.pt is a backbone"),
    ("evaluate.py", ["--compare", "RUN/model.pt", "none.pt", "--results", "r.json"], "--results r.json"),
    ("evaluate.py", ["RUN/model.pt", "--picture", "p.png", "--json", "r.json"], "--json r.json needs --data"),
    ("evaluate.py", ["RUN/model.pt", "--picture", "p.jpg"], "p.jpg"),
    ("evaluate.py", ["RUN/model.pt", "--picture", "no/where.png"], "no/where.png"),
    ("evaluate.py", ["RUN/backbone.pt", "--picture", "p.png"], "backbone"),
    ("prune.py", ["none.pt", "--out", "OUT"], "none.pt"),
    ("prune.py", ["FOREIGN", "--out", "OUT"], "foreign.pt"),
    ("prune.py", ["RUN/backbone.pt", "--out", "OUT"], "backbone"),
    ("prune.py", ["RUN/model.pt", "--out", "OUT", "--domains", "plants"], "plants"),
    ("prune.py", ["RUN/model.pt", "--out", "OUT", "--domains", "animals"], "animals"),
    ("prune.py", ["RUN/model.pt", "--out", "no/where.pt"], "no/where.pt"),
]


@pytest.mark.parametrize("script, words, named", BAD, ids=[" ".join(words) for _, words, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2(script, words, named, data, trained, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    ba2ps.save(tmp_path / "bare.pt", ba2ps.WideResNet(10, 1, "animals", 3))  # a network that no script wrote
    if "PRUNED" in words:
        network, facts = ba2ps.load(trained / "model.pt")
        ba2ps.save(tmp_path / "pruned.pt", ba2ps.prune(network), **facts)
    places = {"DATA": data, **{name.upper(): tmp_path / f"{name}.pt" for name in ("bare", "text", "foreign", "out", "pruned")}}
    for name in {"CUT", "GONE", "OTHER"} & set(words):
        places[name] = tmp_path / name
        for i, domain in enumerate(["animals", "birds", "cars"]):
            write_domain(tmp_path / name, domain, ("one", "two", "three")[:2 + i % 2], 2, 10_000 * i + (name == "OTHER"))
        for split in ("train", "val"):
            victim = next((tmp_path / name / "data/birds" / split).glob("*/*"))
            if name == "CUT":
                victim.write_bytes(victim.read_bytes()[:100])
            if name == "GONE":
                victim.unlink()
    resolved = [str(places.get(word, word)).replace("RUN/", f"{trained}/") for word in words]
    if script == "train.py":
        resolved = [*SMALL, "--backbone-epochs", "1", "--epochs", "1", "--out", str(tmp_path / "run"), *resolved]
    code, out, err = run(script, *resolved, capsys=capsys)
    lines = [line for line in err.splitlines() if "images, " not in line]  # but for the progress line
    assert code == 2 and len(lines) == 1 and named in lines[0] and lines[0].startswith(f"{script}: "), err
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "out.pt").exists()
    assert not (tmp_path / "run" / "model.pt").exists()
