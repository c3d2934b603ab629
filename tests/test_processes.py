# SPDX-License-Identifier: MIT
"""Several processes, as torchrun starts them, against one: on the CPU, with gloo."""
import os
import runpy
import shutil
import signal
import socket
import sys
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import ba2ps
import evaluate
from test_evaluate import write_domain
from test_scripts import ROOT, SMALL

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not dist.is_gloo_available(), reason="needs fork and gloo")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("decathlon")
    for i, domain in enumerate(["animals", "birds", "cars"]):
        write_domain(root, domain, ("one", "two", "three")[:2 + i % 2], per_class=7, first_id=10_000 * i, seed=i)
    random = np.random.default_rng(0)
    for path in sorted(root.glob("data/*/*/**/*.jpg")):  # of one colour, batch-norm would divide rounding errors by nearly 0
        Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((36, 36), Image.BICUBIC).save(path)
    return root


def processes(number, work):
    """Call work(rank) in `number` forked processes that find in their environment what torchrun puts there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(number):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=str(port))
                torch.set_num_threads(1)
                work(rank)
                code = 0
            except SystemExit as stopped:
                code = stopped.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def train(number, *words, prepare=lambda: None):
    """Exit codes of `number` processes that run train.py with these words."""
    def work(rank):
        prepare()
        sys.argv = ["train.py", *map(str, words)]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return processes(number, work)


def without_augmentation():
    crops = evaluate.random_crops
    evaluate.random_crops = lambda images, size, mirror, generator, *device: (
        crops(images, size, mirror, generator, *device), evaluate.test_crops(images, size, 1, *device)[:, 0])[1]


@pytest.mark.parametrize("words, augmented", [
    (["--distinct"], False), (["--recipe", "held", "--sharing", "1", "--schedule", "mixed", "--refine", "1"], True)], ids=["paper", "held"])
def test_two_processes_follow_one(words, augmented, data, tmp_path):
    """The backbone, then fifty steps of adapting, the last batch of an epoch a single image; with the same crops, too.

    Switches that start alike come to 0 together in the tenth step of Adam, and rounding decides: hence --distinct.
    """
    states = []
    for number in (1, 2):
        out = tmp_path / str(number)
        codes = train(number, "--data", data, "--source", "animals", *SMALL, "--backbone-epochs", "1", "--epochs", "5",
                      "--batch-size", "4", "--budget", "0.5", *words, "--out", out,
                      prepare=lambda: None if augmented else without_augmentation())
        assert codes == [0] * number
        states.append({(path.name, name): value for path in (out / "model.pt", out / "refined.pt") if path.exists()
                       for name, value in ba2ps.load(path)[0].state_dict().items()})
    assert ("--refine" in words) == any(file == "refined.pt" for file, _ in states[0])
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=0, atol=1e-4), name


def test_batch_norm_over_processes_is_that_of_the_whole_batch(tmp_path):
    """Outputs, gradients and running statistics, for shares of 5, 0 and 3 images."""
    shared = runpy.run_path(str(ROOT / "train.py"))["SharedBatchNorm2d"]
    generator = torch.Generator().manual_seed(0)
    x, grad = (3 + torch.randn(8, 4, 5, 5, generator=generator) for _ in range(2))
    whole, x_whole = torch.nn.BatchNorm2d(4), x.clone().requires_grad_()
    rows = [slice(0, 5), slice(5, 5), slice(5, 8)]

    def norm_of(norm, part, upstream):
        torch.nn.init.constant_(norm.weight, 1.5)
        out = norm(part)
        out.backward(upstream)
        return [out, part.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]

    def work(rank):
        dist.init_process_group("gloo")
        part = x[rows[rank]].clone().requires_grad_()
        torch.save([t.detach() for t in norm_of(shared(4), part, grad[rows[rank]])], tmp_path / str(rank))
    assert processes(3, work) == [0, 0, 0]
    got, expected = [torch.load(tmp_path / str(rank)) for rank in range(3)], norm_of(whole, x_whole, grad)
    for i in range(2):
        assert torch.allclose(torch.cat([g[i] for g in got]), expected[i], atol=1e-5)
    for i in (2, 3):
        assert torch.allclose(sum(g[i] for g in got), expected[i], atol=1e-3)
    for i in (4, 5):
        assert all(torch.allclose(g[i], expected[i], atol=1e-5) for g in got)


def test_a_signal_to_one_process_stops_all_and_all_go_on(data, tmp_path, capfd):
    """SIGTERM comes to the second process only; three processes have batches of two, one goes without images."""
    words = ["--data", data, "--source", "animals", *SMALL, "--backbone-epochs", "1", "--epochs", "1", "--batch-size", "2",
             "--domains", "birds", "--schedule", "mixed"]
    assert train(3, *words, "--out", tmp_path / "whole") == [0, 0, 0]
    calls = 0

    def send():
        if os.environ["RANK"] == "1":
            step = torch.optim.SGD.step

            def counted(optimizer, *args):
                nonlocal calls
                calls += 1
                if calls == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(optimizer, *args)
            torch.optim.SGD.step = counted
    capfd.readouterr()
    assert train(3, *words, "--out", tmp_path / "run", prepare=send) == [143] * 3
    error = capfd.readouterr().err
    assert [line for line in error.splitlines() if "stopped by" in line] == error.splitlines()[-1:], error
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert train(1, *words, "--out", tmp_path / "alone", "--resume") == [0]  # another number of processes goes on as well
    assert train(3, *words, "--out", tmp_path / "run", "--resume") == [0, 0, 0]
    one, other = (ba2ps.load(tmp_path / name / "model.pt")[0].state_dict() for name in ("whole", "run"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "run/log.csv").read_text()
