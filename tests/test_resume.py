# SPDX-License-Identifier: MIT
"""A run that is killed, stopped, out of disk or out of numbers: what is left, and going on from it bit for bit."""
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import ba2ps
from test_evaluate import write_domain
from test_scripts import ROOT, SMALL

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests kill forked processes")
FAST = [*SMALL, "--backbone-epochs", "2", "--epochs", "2", "--milestone", "1", "--batch-size", "4", "--lr", "1e-2", "--switch-lr",
        "1e-3", "--multiplier-lr", "1", "--budget", "0.5"]
RUNS = {  # all phases, recipes, schedules and kinds of training
    "paper": ["--source", "animals", "--sharing", "learned"],
    "held": ["--backbone", "RUN/backbone.pt", "--recipe", "held", "--schedule", "mixed", "--refine", "2"],
    "independent": ["--start-from", "RUN/model.pt", "--independent", "--sharing", "0", "--schedule", "batch", "--precision", "fp16"],
    "all": ["--source", "animals", "--adapt", "all"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("decathlon")
    for i, domain in enumerate(["animals", "birds", "cars"]):
        write_domain(root, domain, ("one", "two", "three")[:2 + i % 2], per_class=3 if i else 33, first_id=10_000 * i, seed=i)
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    code, printed = child(["--data", data, *FAST, "--source", "animals", "--epochs", "1", "--out", out])
    assert code == 0, printed
    return out


def words_of(name, data, trained, out):
    return ["--data", data, *FAST, *(word.replace("RUN", str(trained)) for word in RUNS[name]), "--out", out]


def child(words, prepare=lambda: None):
    """train.py in a forked process: (exit code, or minus the signal that ended it, and all that it printed).

    prepare: called in it beforehand, to break something.
    """
    log = Path(words[words.index("--out") + 1]).with_suffix(".txt")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
            torch.set_num_threads(1)
            sys.argv = ["train.py", *map(str, words)]
            prepare()
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            sys.setprofile(None)
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, log.read_text()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, act, total=None):
    """Call act() at the number-th call of a Python or C function since the first checkpoint was begun; total: a file for
    the number of calls there were in the end."""
    def prepare():
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            if calls or event == "call" and frame.f_code.co_name == "write_whole" and "state.pt" in str(frame.f_locals["path"]):
                calls += 1
                if calls == number:
                    act()
            if event == "c_call" and argument is os._exit and total:
                total.write_text(str(calls))
        sys.setprofile(count)
    return prepare


def at_file(function, number, suffix, act):
    """Replace `function` ("save" of torch, "replace" of os): act(real, *arguments) at its number-th call for such a file."""
    def prepare():
        module = {"save": torch, "replace": os}[function]
        real, calls = getattr(module, function), 0

        def replaced(first, second, *rest):
            nonlocal calls
            calls += suffix in str(second)
            return act(real, first, second) if calls == number and suffix in str(second) else real(first, second, *rest)
        setattr(module, function, replaced)
    return prepare


def at_step(number, act):
    def prepare():
        real, calls = torch.optim.SGD.step, 0

        def step(optimizer, *args):
            nonlocal calls
            calls += 1
            if calls == number:
                act()
            return real(optimizer, *args)
        torch.optim.SGD.step = step
    return prepare


def left(out):
    """{name of a file: its weights, or its text}, of everything a finished run leaves."""
    files = {path.name: path for path in out.iterdir() if path.name != ".lock"}
    return {name: ba2ps.load(path) if path.suffix == ".pt" else path.read_text() for name, path in sorted(files.items())}


def same(one, other):
    """Both are what `left` gives, and equal in every bit, but for --out."""
    if one.keys() != other.keys():
        return False
    for name, content in one.items():
        if not name.endswith(".pt"):
            if content != other[name]:
                return False
            continue
        (network, facts), (network_2, facts_2) = content, other[name]
        state, state_2 = network.state_dict(), network_2.state_dict()
        if list(state) != list(state_2) or not all(torch.equal(value, state_2[key]) for key, value in state.items()):
            return False
        for f in (facts, facts_2):
            f["arguments"] = {**f["arguments"], "out": None}
        if facts != facts_2:
            return False
    return True


@pytest.fixture(scope="module")
def whole(data, trained, tmp_path_factory):
    """A function: what the run of that name leaves if nothing happens to it, and how many calls it makes."""
    done = {}

    def of(name):
        if name not in done:
            out = tmp_path_factory.mktemp(name) / "run"
            code, printed = child(words_of(name, data, trained, out), at_call(-1, kill, out.parent / "calls"))
            assert code == 0, printed
            done[name] = left(out), int((out.parent / "calls").read_text())
        return done[name]
    return of


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_moment_and_resumed_is_as_if_never_killed(name, data, trained, whole, tmp_path):
    """Five kills of each run, one after the other, each at a random call of a Python or C function: twenty moments."""
    expected, calls = whole(name)
    moments, words, kills = random.Random(name), words_of(name, data, trained, tmp_path / "run"), 0
    for k in range(5):
        code, printed = child(words + ["--resume"] * (k > 0), at_call(moments.randrange(1, calls // 4), kill))
        assert code == -signal.SIGKILL, printed
    code, printed = child([*words, "--resume"])
    assert code == 0 and "going on from" in printed, printed
    assert same(left(tmp_path / "run"), expected)


def half(real, content, path):
    real(content, path)
    os.truncate(path, os.path.getsize(path) // 2)
    kill()


def test_killed_in_the_middle_of_a_write(data, trained, whole, tmp_path):
    """Of state.pt, of log.csv, of a checkpoint; before it is moved into its place and after that."""
    words = words_of("paper", data, trained, tmp_path / "run")
    for number, breaking in enumerate((
            at_file("save", 1, "state.pt", half), at_file("save", 3, "state.pt", half),
            at_file("replace", 3, "log.csv", lambda *call: kill()), at_file("replace", 1, "backbone.pt", lambda *call: kill()),
            at_file("replace", 2, "state.pt", lambda real, a, b: (real(a, b), kill())),
            at_file("replace", 1, "model.pt", lambda real, a, b: (real(a, b), kill())))):
        code, printed = child([*words, "--resume"], breaking)
        assert code == -signal.SIGKILL and "starting from the beginning" in printed or number > 1, printed
    code, printed = child([*words, "--resume"])
    assert code == 0 and same(left(tmp_path / "run"), whole("paper")[0]), printed


def test_signals_save_the_step_and_say_how_to_go_on(data, trained, whole, tmp_path):
    words, out = words_of("paper", data, trained, tmp_path / "run"), tmp_path / "run"

    def send(number):
        return lambda *call: os.kill(os.getpid(), number)
    for breaking, code, where in (
            (at_step(1, send(signal.SIGTERM)), 143, "stopped by SIGTERM in epoch 1, after step 1"),
            (at_step(5, send(signal.SIGINT)), 130, "stopped by SIGINT in epoch 1, after step 2"),
            (at_file("replace", 2, "log.csv", lambda real, a, b: (real(a, b), send(signal.SIGTERM)())), 143, "stopped by SIGTERM")):
        stopped, printed = child([*words, "--resume"], breaking)
        last = printed.splitlines()[-1]
        assert stopped == code and last.startswith("train.py: ") and where in last, printed
        assert shlex.split(last.split("python ", 1)[1])[1:] == [*map(str, words), "--resume"]
    code, printed = child(words)
    assert code == 2 and printed.count("\n") == 1 and "--resume" in printed and "state.pt" in printed, printed
    code, printed = child([*words, "--resume"])
    assert code == 0 and same(left(out), whole("paper")[0]), printed


def test_a_second_signal_ends_at_once(data, trained, tmp_path):
    words = words_of("held", data, trained, tmp_path / "run")

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert child(words, at_step(2, twice))[0] == -signal.SIGINT


def test_processes_of_their_own(data, trained, whole, tmp_path):
    """SIGTERM, then SIGKILL, from outside and whenever they come."""
    words, out = words_of("independent", data, trained, tmp_path / "run"), tmp_path / "run"
    for wait, number, code in ((1, signal.SIGTERM, 143), (2, signal.SIGKILL, -9)):
        before = None
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, words), "--resume"], text=True,
                                   stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None:  # until it has written state.pt
            stat = (out / "state.pt").stat().st_mtime_ns if (out / "state.pt").exists() else None
            if before is not None and stat != before or before is None and stat is not None and wait == 1:
                break
            before = stat
            time.sleep(0.002)
        process.send_signal(number)
        error = process.communicate()[1]
        assert process.returncode == code and "Traceback" not in error, error
    code, printed = child([*words, "--resume"])
    assert code == 0 and same(left(out), whole("independent")[0]), printed


def test_what_cannot_be_resumed_is_refused_in_one_line(data, trained, tmp_path):
    out = tmp_path / "run"
    words = words_of("held", data, trained, out)
    code, printed = child([*words, "--resume"], at_step(3, kill))
    assert code == -signal.SIGKILL
    kept = (out / "state.pt").read_bytes(), (out / "log.csv").read_bytes()

    def refused(words, *named):
        code, printed = child(words)
        assert code == 2 and printed.count("\n") == 1 and all(name in printed for name in named), printed
    refused([*words, "--resume", "--seed", "1"], "--seed 0, not 1")
    refused([*words, "--resume", "--domains", "birds"], "--domains")
    shutil.copytree(data, tmp_path / "other")
    write_domain(tmp_path / "other", "birds", ("one", "two", "three"), per_class=4, first_id=10_000, seed=1)
    refused([*words, "--resume", "--data", tmp_path / "other"], "birds", "--data")
    assert kept == ((out / "state.pt").read_bytes(), (out / "log.csv").read_bytes())
    (out / "state.pt").write_bytes(kept[0][:1000])
    refused([*words, "--resume"], "state.pt", "remove it")
    (out / "state.pt").write_bytes(kept[0])
    shutil.copytree(data, tmp_path / "moved")
    words[1] = tmp_path / "moved"
    code, printed = child([*words, "--resume"])
    assert code == 0 and not (out / "state.pt").exists(), printed
    written = (out / "model.pt").stat().st_mtime_ns
    code, printed = child([*words, "--resume"])
    assert code == 0 and "finished" in printed and (out / "model.pt").stat().st_mtime_ns == written
    refused([*words, "--resume", "--seed", "1"], "--seed 0, not 1", "refined.pt")


def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(data, trained, whole, tmp_path):
    out, words = tmp_path / "run", words_of("held", data, trained, tmp_path / "run")
    assert child(words, at_step(5, kill))[0] == -signal.SIGKILL
    kept = (out / "state.pt").read_bytes(), (out / "log.csv").read_bytes()

    def full(real, a, b):
        raise OSError(28, "No space left on device")
    for breaking, named in ((lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)), "state.pt"),
                            (at_file("replace", 2, "log.csv", full), "log.csv")):
        code, printed = child([*words, "--resume"], breaking)
        lines = [line for line in printed.splitlines() if line.startswith("train.py: ")]
        assert code == 2 and len(lines) == 1 and named in lines[0] and "Traceback" not in printed, printed
        assert kept[1].startswith((out / "log.csv").read_bytes())  # whole rows
        assert not list(out.glob("*.part")) and not (out / "model.pt").exists()
        if named == "state.pt":
            assert (out / "state.pt").read_bytes() == kept[0]
    code, printed = child([*words, "--resume"])
    assert code == 0 and same(left(out), whole("held")[0]), printed


@pytest.mark.parametrize("name, number, value, named", [
    ("paper", 1, "nan", ["animals is nan", "epoch 1 of the backbone, step 2"]), ("held", 5, "inf", ["is inf in epoch 1, step"])])
def test_a_loss_that_is_not_finite_touches_no_weight(name, number, value, named, data, trained, tmp_path):
    """The step before it is the last that either optimizer takes; the state before that epoch stays."""
    def prepare():
        real, calls, step = torch.nn.functional.cross_entropy, 0, torch.optim.SGD.step

        def loss(*args):
            nonlocal calls
            calls += 1
            return real(*args) * (float(value) if calls > number else 1)

        def counted(optimizer, *args):
            assert calls <= number
            return step(optimizer, *args)
        torch.nn.functional.cross_entropy, torch.optim.SGD.step = loss, counted
    out = tmp_path / "run"
    code, printed = child(words_of(name, data, trained, out), prepare)
    last = printed.splitlines()[-1]
    assert code == 2 and all(word in last for word in named) and "Traceback" not in printed, printed
    assert name == "paper" or re.search("the loss of (birds|cars|birds, cars) is", last)
    assert torch.load(out / "state.pt", weights_only=True)["epoch"] == 1 and not (out / "model.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(data, trained, tmp_path):
    def prepare():
        step = torch.optim.SGD.step

        def broken(optimizer, *args):
            step(optimizer, *args)
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))
        torch.optim.SGD.step = broken
        torch.nn.functional.cross_entropy = lambda logits, y: 0 * logits.nan_to_num().sum()
    code, printed = child(words_of("held", data, trained, tmp_path / "run"), prepare)
    assert code == 2 and "is not finite after step" in printed.splitlines()[-1], printed
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["network"].values()) and state["step"] == 0


def test_two_runs_into_one_directory_the_second_is_refused(data, trained, tmp_path):
    words, out = words_of("held", data, trained, tmp_path / "run"), tmp_path / "run"
    read, write = os.pipe()
    first = os.fork()
    if first == 0:  # a run that hangs in its third step
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        child_words = ["train.py", *map(str, words)]
        sys.argv = child_words
        torch.set_num_threads(1)
        at_step(3, lambda: (os.write(write, b"."), time.sleep(600)))()
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        finally:
            os._exit(1)
    os.close(write)
    try:
        assert os.read(read, 1) == b"."
        before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
        code, printed = child([*words, "--resume"])
        assert code == 2 and printed.count("\n") == 1 and "another run" in printed and str(out) in printed, printed
        assert before == sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    code, printed = child([*words, "--resume"])
    assert code == 0, printed


def test_no_epochs_at_all_still_give_the_checkpoints(data, trained, tmp_path):
    out = tmp_path / "run"
    code, printed = child([*words_of("paper", data, trained, out), "--backbone-epochs", "0", "--epochs", "0"])
    assert code == 0 and sorted(left(out)) == ["backbone.pt", "log.csv", "model.pt"], printed
