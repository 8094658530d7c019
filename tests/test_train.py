"A run that is killed, interrupted, or out of room ends as if nothing had happened; two processes train one model."
import errno, json, os, random, resource, signal, socket, subprocess, sys, time

import pytest
import torch

import stan_nb.train as train
from course import own_methods
from stan_nb.methods import method_from_settings, lora_budget
from stan_nb.runs import Run
from stan_nb.settings import settings
from stan_nb.sora import gates
from stan_nb.task import Task, ToyTask, evaluate
from stan_nb.train import fit, make_plan, seed_all, train_run

CHILD = """
import sys
from stan_nb.settings import settings
from stan_nb.train import train_run
train_run(settings("toy", method=sys.argv[2], xi=4e-3, eval_every=20, epochs=3), sys.argv[1], resume=True, save_every=0., progress=False)
"""


def left(path):
    "What a run left: log, adapter tensors, scores."
    run = Run.open(path)
    result = {name: run.info["result"][name] for name in ("test", "valid", "best_step", "steps", "trainable")}
    return run.history(), {p.name: p.read_bytes() for p in run.adapter.glob("*.safetensors")}, result


def start(settings, task=None):
    "A toy model, ready for `fit`."
    task = task or ToyTask(settings)
    model, method = task.build_model(), method_from_settings(settings)
    seed_all(settings.seed)
    return task, method.build(model, "all-linear", lora_budget(model, "all-linear", settings.rank, ["head"]), ["head"]), method


def trained(model): return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def kill_and_resume(path, method, kills):
    "Start the child again and again, and kill it somewhere in the middle each time."
    chance = random.Random(method)
    for number in range(kills):
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", CHILD, str(path), method])
        log, target = path / "metrics.jsonl", (number + 1) * 96 // (kills + 1)
        while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= target): time.sleep(.001)
        time.sleep(chance.random() * .02)
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL, "the child ended before it was killed"
    assert "result" not in Run.open(path).info


@pytest.mark.parametrize("method, kills", [("stan", 2), ("sora", 2), pytest.param("adalora", 20, marks=pytest.mark.slow), pytest.param("sora", 20, marks=pytest.mark.slow), pytest.param("stan", 20, marks=pytest.mark.slow)])
def test_kill_and_resume(method, kills, tmp_path):
    kill_and_resume(tmp_path / "killed", method, kills)
    experiment = settings("toy", method=method, xi=4e-3, eval_every=20, epochs=3)
    train_run(experiment, tmp_path / "killed", resume=True, progress=False)
    train_run(experiment, tmp_path / "whole", progress=False)
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


@pytest.mark.parametrize("method", own_methods())
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupt_and_resume(method, number, tmp_path, monkeypatch):
    experiment = settings("toy", method=method, xi=4e-3, eval_every=15, epochs=2, dropout=.1, grad_accum=2, train_size=1000)
    train_run(experiment, tmp_path / "whole", progress=False)
    step_itself = train.train_step

    def step(task, model, method, step, *rest):
        if step == 11: os.kill(os.getpid(), number)
        return step_itself(task, model, method, step, *rest)
    former = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="stopped at step 11 of 16; .*--resume"):
        patch.setattr(train, "train_step", step)
        train_run(experiment, tmp_path / "cut", progress=False)
    assert signal.getsignal(number) == former
    train_run(experiment, tmp_path / "cut", resume=True, progress=False)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_the_best_model_is_kept(tmp_path):
    experiment = settings("toy", lr=.3, eval_every=4, epochs=2)
    task, model, method = start(experiment)
    run = Run.create(tmp_path / "run", experiment)
    result = fit(task, model, method, experiment, run, progress=False)
    scores = {row["step"]: row["valid_accuracy"] for row in run.history() if "valid_accuracy" in row}
    assert result["valid"]["accuracy"] == max(scores.values()) == scores[result["best_step"]] and result["best_step"] < result["steps"]
    assert evaluate(task, model, task.load_data()["valid"], progress=False) == result["valid"]


def test_what_sora_saves_is_what_was_scored(tmp_path):
    experiment = settings("toy", method="sora", rank=8, xi=4e-3, lr=.03)
    result = train_run(experiment, tmp_path / "run", progress=False)
    chosen = Run.open(tmp_path / "run").info["chosen"]
    assert 0 < chosen["ranks_left"] < chosen["ranks"] == 16 and chosen["kept"] < chosen["trainable"] == 8 * (48 + 64)
    assert result["adapter"] == chosen["starts_with"]                             # what was trained, not what is left of it
    task, model = Task.from_run(tmp_path / "run")
    assert sum(len(gate) for gate in gates(model).values()) == chosen["ranks_left"]
    assert evaluate(task, model, task.load_data()["test"], progress=False) == result["test"]


def test_evaluation_does_not_change_training(tmp_path):
    logs = []
    for every in (0, 3):
        experiment = settings("toy", eval_every=every, max_steps=10, dropout=.2)
        task, model, method = start(experiment)
        run = Run.create(tmp_path / str(every), experiment)
        fit(task, model, method, experiment, run, progress=False)
        logs.append([(row["step"], row["loss"], row["norm"]) for row in run.history()])
    assert logs[0] == logs[1] and len(logs[0]) == 10


@pytest.mark.parametrize("rows", [100, 96])
def test_accumulated_gradients_equal_a_large_batch(rows):
    models = []
    for batch_size, grad_accum in ((40, 1), (10, 4)):
        experiment = settings("toy", method="full", batch_size=batch_size, grad_accum=grad_accum, train_size=rows, epochs=2)
        task, model, method = start(experiment)
        assert fit(task, model, method, experiment, progress=False)["steps"] == 6
        models.append(trained(model))
    for name in models[0]: torch.testing.assert_close(models[0][name], models[1][name], rtol=1e-4, atol=1e-5)


class Breaks(ToyTask):
    "A toy whose loss is not a number at one step."
    seen, at, value = 0, 9, float("nan")
    def loss(self, model, batch):
        self.seen += 1
        return super().loss(model, batch) * (self.value if self.seen == self.at else 1.)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_and_changes_nothing(value, tmp_path):
    experiment = settings("toy", eval_every=4, max_steps=20)
    task, model, method = start(experiment, Breaks(experiment))
    task.value = value
    run = Run.create(tmp_path / "run", experiment)
    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step 9 .*the checkpoint of step 8 is in"): fit(task, model, method, experiment, run, progress=False)
    assert all(torch.isfinite(p).all() for p in trained(model).values())
    again, model, method = start(experiment)
    result = fit(again, model, method, experiment, run, resume=True, progress=False)
    plain, other, method = start(experiment)
    assert fit(plain, other, method, experiment, progress=False)["test"] == result["test"] and same(trained(model), trained(other))


def test_a_huge_learning_rate_stops_too():
    experiment = settings("toy", method="full", lr=1e30, clip=0., warmup=0.)
    task, model, method = start(experiment)
    with pytest.raises(FloatingPointError, match="Try a lower lr"): fit(task, model, method, experiment, progress=False)


def test_full_disk_leaves_the_former_checkpoint(tmp_path):
    experiment = settings("toy", eval_every=5, max_steps=10)
    run = Run.create(tmp_path / "run", experiment)
    task, model, method = start(experiment)
    files = lambda: {p.name: p.read_bytes() for p in sorted((run.checkpoints / "last").iterdir())}
    step_itself, limits, former = train.train_step, resource.getrlimit(resource.RLIMIT_FSIZE), {}

    def step(task, model, method, step, *rest):
        if step == 8:
            former.update(files())
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))      # no file may grow beyond 4 KiB from here on
        return step_itself(task, model, method, step, *rest)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(train, "train_step", step)
        try: fit(task, model, method, experiment, run, progress=False)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files() == former and list(run.checkpoints.iterdir()) == [run.checkpoints / "last"]
    again, model, method = start(experiment)
    assert fit(again, model, method, experiment, run, resume=True, progress=False)["steps"] == 10


@pytest.mark.parametrize("name", ["trained.safetensors", "state.pt"])
def test_damaged_checkpoint(name, tmp_path):
    experiment = settings("toy", max_steps=4)
    run = Run.create(tmp_path / "run", experiment)
    task, model, method = start(experiment)
    fit(task, model, method, experiment, run, progress=False)
    file = run.checkpoints / "last" / name
    file.write_bytes(file.read_bytes()[:-50])
    task, model, method = start(experiment)
    before = trained(model)
    with pytest.raises(ValueError, match=f"{name} is damaged"): fit(task, model, method, experiment, run, resume=True, progress=False)
    assert same(before, trained(model))


def test_existing_runs(tmp_path):
    experiment, path = settings("toy", max_steps=3), tmp_path / "run"
    first = train_run(experiment, path, progress=False)
    before = left(path)
    with pytest.raises(FileExistsError, match="--resume.*--overwrite"): train_run(experiment, path, progress=False)
    with pytest.raises(ValueError, match="lr was 0.01, is now 0.5"): train_run(experiment.replace(lr=.5), path, resume=True, progress=False)
    with pytest.raises(ValueError, match="exclude each other"): train_run(experiment, path, resume=True, overwrite=True, progress=False)
    assert train_run(experiment, path, resume=True, progress=False) == first and left(path) == before
    assert train_run(experiment.replace(max_steps=2), path, overwrite=True, progress=False)["steps"] == 2
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"): train_run(experiment, tmp_path / "file", progress=False)


@pytest.mark.parametrize("changes, message", [
    (dict(k=9), "k = 9 is more than the 4 latents"), (dict(targets="upp"), "matches no module.*Did you mean 'up'"), (dict(method="lorra"), "Did you mean 'lora'"),
    (dict(precision="fp16", device="cpu"), "needs a CUDA device"), (dict(method="adalora", max_steps=1), "at least 2 steps")])
def test_bad_input_writes_nothing(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message): train_run(settings("toy", **changes), tmp_path / "run", progress=False)
    assert not list(tmp_path.iterdir())


def test_bf16_scores_survive_reloading(tmp_path):
    result = train_run(settings("toy", precision="bf16", max_steps=20), tmp_path / "run", progress=False)
    task, model = Task.from_run(tmp_path / "run")
    assert evaluate(task, model, task.load_data()["test"], progress=False) == result["test"]
    train_run(settings("toy", max_steps=2), tmp_path / "other", progress=False)          # and the next run may have another precision


def test_unfinished_runs_are_no_models(tmp_path):
    Run.create(tmp_path / "run", settings("toy"))
    with pytest.raises(FileNotFoundError, match="has not finished"): Task.from_run(tmp_path / "run")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_once_an_epoch(processes):
    experiment = settings("toy", batch_size=8, grad_accum=2)
    plan, seen = make_plan(100, experiment, processes), []
    for rank in range(processes):
        mine = train.my_batches(plan, experiment, 0, rank)
        assert -(-len(mine) // 2) == plan.per_epoch
        seen += [row for batch in mine for row in batch]
    assert set(seen) == set(range(100)) and (processes > 1 or len(seen) == 100)


TWO = """
import json, os, signal, sys, torch
import torch.distributed as dist
import stan_nb.train as train
from stan_nb.settings import settings
from stan_nb.task import Task
path, rank = sys.argv[1], int(os.environ["RANK"])
experiment = settings("toy", method="lora", batch_size=32, device="cpu", max_steps=12, eval_every=5)
kept, fit_itself, step_itself = [], train.fit, train.train_step
def fit(task, model, *rest):
    result = fit_itself(task, model, *rest)
    kept.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    return result
train.fit = fit
result = train.train_run(experiment, path + "/whole", progress=False)
assert result["processes"] == 2 == dist.get_world_size(), result
for name, mine in kept[0].items():
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both), name
def step(task, model, method, step, *rest):
    if step == 7 and rank == 1: os.kill(os.getpid(), signal.SIGTERM)      # only one of the two is asked to stop
    return step_itself(task, model, method, step, *rest)
train.train_step = step
try: train.train_run(experiment, path + "/cut", progress=False)
except KeyboardInterrupt as stopped: assert "step 7 of 12" in str(stopped), stopped
else: raise AssertionError("was not stopped")
train.train_step = step_itself
again = train.train_run(experiment, path + "/cut", resume=True, progress=False)
assert again["test"] == result["test"] and all(torch.equal(kept[0][n], kept[1][n]) for n in kept[0])
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", str(tmp_path / "two.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert left(tmp_path / "cut") == left(tmp_path / "whole")
    experiment = settings("toy", method="lora", batch_size=64, max_steps=12, eval_every=5)      # one process with batches of twice the size
    train_run(experiment, tmp_path / "one", progress=False)
    for one, two in zip(left(tmp_path / "one")[0], left(tmp_path / "whole")[0]):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4) and one["norm"] == pytest.approx(two["norm"], rel=1e-3)
