"Interference: the task of many skills and the routed rival, beyond the lesson. The module is imported late: it registers a method, and other files ask which there are."
import importlib.util, json, math

import pytest
import torch
from torch import nn

from course import ROOT
from stan_nb.runs import load_results
from stan_nb.settings import settings, task_names

RESULTS = sorted((ROOT/"stan_nb"/"data"/"results").glob("interference_*.json"))


@pytest.fixture(scope="module")
def room():
    from stan_nb import interference
    return interference


def test_tasks_are_those_of_the_settings(room):
    assert set(task_names("many")) == set(room.Many.kinds)
    from stan_nb.task import get_task
    assert get_task("many") is room.Many


@pytest.mark.parametrize("name", ["digits", "strings", "modules"])
def test_skills_conflict_and_splits_are_apart(room, name):
    task = room.Many(settings("many", task=name, **{"opt.skills": 8}))
    data = task.load_data()
    again = room.Many(settings("many", task=name, **{"opt.skills": 8}))
    again.load_data()
    assert task.corpus_hash == again.corpus_hash
    assert set(data["train"]["skill"]) == set(data["test"]["skill"]) == set(range(8))
    other = room.Many(settings("many", task=name, **{"opt.skills": 4}))
    other.load_data()
    assert other.corpus_hash != task.corpus_hash
    if name == "digits": assert not set(data["train"]["image"]) & set(data["valid"]["image"]) | set(data["valid"]["image"]) & set(data["test"]["image"])
    if name == "modules":
        assert not set(data["train"]["pair"]) & set(data["test"]["pair"])
        classes = {}
        for row in data["train"]: classes.setdefault(row["pair"], set()).add(row["label"])
        assert sum(len(found) > 1 for found in classes.values()) > .9 * len(classes)           # the same sentence, other classes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(40, 60), nn.Linear(60, 40), nn.Linear(40, 3)
    def forward(self, x): return self.head(self.b(self.a(x).relu()))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_routed_costs_what_lora_costs_and_learns(room, k):
    from stan_nb.methods import lora_budget
    model = Net()
    budget = lora_budget(model, ["a", "b"], 16)
    method = room.Routed(k=k)
    method.build(model, ["a", "b"], budget, ["head"])
    assert abs(method.chosen["off_by"]) <= .01 and {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"down", "up", "router", "weight", "bias"}
    x = torch.randn(64, 40)
    assert torch.equal(model(x), Net()(x))
    assert ((model.a.gates(x) > 0).sum(-1) == k).all()
    optimizer, first = torch.optim.Adam(method.param_groups(model, 1e-2)), None
    y = (x[:, 0] > 0).long()
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2 and model.a.router.grad.abs().sum() > 0


def test_routed_saved_loaded_and_refused(room, tmp_path):
    from safetensors.torch import load_file, save_file
    model, method = Net(), room.Routed()
    method.build(model, ["a", "b"], 3200, ["head"])
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p)) if p.requires_grad else None
    method.save(model, tmp_path)
    x = torch.randn(5, 40)
    assert torch.equal(room.Routed().load(Net(), tmp_path, ["a", "b"], ["head"])(x), model(x))
    tensors = load_file(tmp_path/"weights.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "a.up"}, tmp_path/"weights.safetensors")
    net = Net()
    with pytest.raises(ValueError, match="lacks 1 tensors"): room.Routed().load(net, tmp_path, ["a", "b"], ["head"])
    assert isinstance(net.a, nn.Linear)                                                      # nothing was changed
    with pytest.raises(ValueError, match="the routers alone"): room.Routed().build(Net(), ["a", "b"], 800, ["head"])
    with pytest.raises(ValueError, match=r"k = 9 is out of range for routed"): room.Routed(k=9)


def test_every_kind_trains_and_opens_again(room, tmp_path):
    from stan_nb.task import evaluate
    from stan_nb.train import train_run
    for name, method in (("digits", "stan"), ("strings", "routed")):
        wanted = settings("many", task=name, method=method, max_steps=3, eval_every=0, **{"opt.skills": 2})
        found = train_run(wanted, tmp_path/name, progress=False)
        task, model = room.Many.from_run(tmp_path/name)
        assert evaluate(task, model, task.load_data()["test"], progress=False)["accuracy"] == pytest.approx(found["test"]["accuracy"])


def law(lora, stan):
    "A results file whose methods lose this much accuracy, and take this many times the steps, per doubling."
    rows = [dict(stage="test", method_label=label, seed=seed, skills=m, every=1, accuracy=.9 - loss * math.log2(m) + .001 * ((seed * m) % 3), curve=[0.] * round(8 * 2**(factor * math.log2(m))) + [1.])
            for label, (loss, factor) in dict(lora=lora, stan=stan).items() for seed in range(5) for m in (1, 2, 4, 8)]
    return dict(rows=rows, target=.5, methods=["lora", "stan"])


def test_verdicts_follow_the_numbers(room):
    better = room.verdict(law((.1, 1.), (.05, .5)))
    assert all("less interference than LoRA" in line and "the aim is met" in line for line in better) and len(better) == 2
    worse = room.verdict(law((.05, .5), (.1, 1.)))
    assert all("more interference than LoRA" in line and "not met" in line for line in worse)
    assert "no difference is shown" in room.verdict(law((.1, 1.), (.1, 1.)))[0]
    close = room.verdict(law((.1, 1.), (.09, .9)))[0]
    assert "less interference" in close and "not met" in close


def test_the_protocol_is_the_script_s(room):
    spec = importlib.util.spec_from_file_location("benchmark", ROOT/"benchmarks"/"interference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert set(script.PLANS) == set(room.Many.kinds)
    for path in RESULTS:                                                                     # what is amended is added at the end: older files hold the beginning
        found, plan = load_results(path.stem), script.PLANS[path.stem.removeprefix("interference_")]
        assert script.__doc__.split("\n\n", 2)[2].strip().startswith(found["protocol"]) and found["grid"] == plan["grid"] and found["target"] == plan["target"]
        tested = [row for row in found["rows"] if row["stage"] == "test"]
        assert len(tested) == len(script.SEEDS) * len(plan["skills"]) * len(plan["methods"]) and len(room.verdict(found)) == 2 * (len(plan["methods"]) - 1)
