"Every method at a budget: what is built, what is trained, what is saved, and which folders are refused."
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from course import own_methods
from stan_nb.methods import count_parameters, base_hash, get_method, lora_budget, method_from_settings, spend, target_names, unit_costs
from stan_nb.settings import settings
from stan_nb.sora import gates

HEAD = ["head"]
PEFT = ["stan", "lora", "adalora", "sora"]


class Net(nn.Module):
    "Two blocks of different shapes, a name that ends like another's, and a head."
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.block = nn.ModuleDict(dict(up=nn.Linear(40, 90), down=nn.Linear(90, 40)))
        self.up, self.norm, self.head = nn.Linear(40, 40), nn.LayerNorm(40), nn.Linear(40, 3)
    def forward(self, x): return self.head(self.norm(self.up(x) + self.block["down"](torch.relu(self.block["up"](x)))))


def shake(model):
    "Trained parameters that are not at their start."
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p) * .1)
    return model.eval()


def built(name, budget=None, seed=0, **options):
    method, net = get_method(name, **options), Net(seed)
    return method, method.build(net, "all-linear", budget or lora_budget(net, "all-linear", 4, HEAD), HEAD)


@pytest.mark.parametrize("name, budget", [*((n, b) for n in PEFT for b in (1020, 1700, 2050, 5000)), *((n, b) for n in PEFT if n != "adalora" for b in (815, 1900, 2295))])
def test_budget_is_met(name, budget):
    options = dict(k=2) if name == "stan" else {}
    method, model = built(name, budget, **options)
    assert abs(method.chosen["trainable"] / budget - 1) <= .01
    if name != "adalora": assert count_parameters(model, HEAD)["adapter"] == method.chosen.get("starts_with", method.chosen["trainable"])
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} if name == "lora" else {2.}
    assert {round(s, 6) for s in scales} == {2.}


def test_encoder_bias_is_counted():
    method, model = built("stan", 2140, k=2, encoder_bias=True)
    assert count_parameters(model, HEAD)["adapter"] == method.chosen["trainable"] and abs(method.chosen["off_by"]) <= .01


@pytest.mark.parametrize("name", PEFT)
def test_budget_that_cannot_be_met_changes_nothing(name):
    net = Net()
    before = {n: type(m) for n, m in net.named_modules()}
    with pytest.raises(ValueError, match="cannot be met within 1%: the nearest are"): get_method(name).build(net, "all-linear", 100, HEAD)
    with pytest.raises(ValueError, match="matches no module"): get_method(name).build(net, ["upp"], 1000, HEAD)
    assert {n: type(m) for n, m in net.named_modules()} == before and all(p.requires_grad for p in net.parameters())


def test_k_above_the_latents_changes_nothing():
    net = Net()
    with pytest.raises(ValueError, match="k = 8 is more than the 4 latents"): get_method("stan", k=8).build(net, "all-linear", 4 * 340, HEAD)
    assert isinstance(net.up, nn.Linear)


def test_spend_is_exact_about_what_is_near():
    costs = dict(a=130, b=130, c=43)
    reachable = sorted({303 * n + 130 * i + 43 * j for n in range(1, 4) for i in range(3) for j in range(2)})
    for budget in range(303, 1000, 7):
        near = min(abs(r - budget) for r in reachable)
        if near <= .01 * budget: assert abs(sum(costs[n] * u for n, u in spend(costs, budget).items()) - budget) <= .01 * budget
        else:
            with pytest.raises(ValueError, match=f"{max(r for r in reachable if r < budget)} and {min(r for r in reachable if r > budget)}"): spend(costs, budget)


@pytest.mark.parametrize("targets, expected", [
    ("all-linear", ["block.up", "block.down", "up"]), (["all-linear"], ["block.up", "block.down", "up"]), (["down"], ["block.down"]),
    (["up"], ["block.up", "up"]), (["block.up"], ["block.up"]), ("down", ["block.down"]), ("down, block.up", ["block.up", "block.down"])])
def test_targets(targets, expected): assert target_names(Net(), targets, HEAD) == expected


@pytest.mark.parametrize("name", ["lora", "stan"])
def test_only_the_targets_are_adapted(name):
    for targets in (["block.up"], ["up"], "all-linear"):
        net = Net()
        names = target_names(net, targets, HEAD)
        method = get_method(name, **(dict(k=1) if name == "stan" else {}))
        model = method.build(net, targets, 3 * sum(unit_costs(net, names).values()), HEAD)
        adapted = {n.removeprefix("base_model.model.").rsplit(".base_layer", 1)[0] for n, _ in model.named_modules() if n.endswith("base_layer")}
        assert adapted == set(names)


def test_a_name_that_ends_like_a_norm():
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))      # "0" is a Linear, "1.0" is a LayerNorm
    method = get_method("lora")
    model = method.build(net, "all-linear", 2 * 32, [])
    assert method.chosen["trainable"] == 64 and model(torch.ones(1, 8)).shape == (1, 8)


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D
    net = nn.Sequential(Conv1D(12, 8))
    for name in PEFT:
        method = get_method(name, **(dict(k=2) if name == "stan" else {}))
        assert method.build(nn.Sequential(Conv1D(12, 8)), "all-linear", 5 * 20)(torch.ones(1, 8)).shape == (1, 12) and method.chosen["trainable"] == 100
    assert unit_costs(net, ["0"]) == {"0": 20}


@pytest.mark.parametrize("name", own_methods())
def test_start_is_the_frozen_model(name):
    x = torch.randn(5, 40)
    reference = Net().eval()
    _, model = built(name)
    assert torch.equal(model.eval()(x), reference(x))


@pytest.mark.parametrize("name", own_methods())
def test_save_load(name, tmp_path):
    method, model = built(name)
    shake(model)
    method.save(model, tmp_path)
    other = get_method(name)
    loaded = other.load(Net(), tmp_path, "all-linear", HEAD).eval()
    x = torch.randn(5, 40)
    assert torch.equal(loaded(x), model(x)) and other.chosen == method.chosen
    assert {p.name for p in tmp_path.iterdir()} == ({"method.json", "adapter_model.safetensors", "adapter_config.json"} if name in PEFT else {"method.json", "weights.safetensors"})


def damaged(folder, kind, weights):
    "Do one harm to an adapter folder."
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    if kind == "truncated": weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty": weights.write_bytes(b"")
    elif kind == "missing": weights.unlink()
    elif kind == "nan": save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, weights)
    elif kind == "inf": save_file(tensors | {name: torch.full_like(tensors[name], torch.inf)}, weights)
    elif kind == "shape": save_file(tensors | {name: torch.cat([tensors[name]] * 2)}, weights)
    elif kind == "less": save_file({n: t for n, t in tensors.items() if n != name}, weights)
    elif kind == "more": save_file(tensors | {"stranger": torch.ones(3)}, weights)
    elif kind == "record": (folder / "method.json").write_text("{")
    elif kind == "half record": (folder / "method.json").write_text("{}")


@pytest.mark.parametrize("name", own_methods())
@pytest.mark.parametrize("kind", ["truncated", "empty", "missing", "nan", "inf", "shape", "less", "more", "record", "half record", "folder", "base", "config"])
def test_refused_before_anything_changes(name, kind, tmp_path):
    method, model = built(name)
    method.save(shake(model), tmp_path)
    weights = tmp_path / ("adapter_model.safetensors" if name in PEFT else "weights.safetensors")
    damaged(tmp_path, kind, weights)
    if kind == "config":
        if name not in PEFT: return
        (tmp_path / "adapter_config.json").write_text("{")
    net = Net(seed=1 if kind == "base" else 0)
    state, types = {n: t.clone() for n, t in net.state_dict().items()}, {n: type(m) for n, m in net.named_modules()}
    with pytest.raises((ValueError, FileNotFoundError)) as error: get_method(name).load(net, tmp_path / "nowhere" if kind == "folder" else tmp_path, "all-linear", HEAD)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    said = dict(truncated="damaged", empty="damaged", missing="does not exist", nan="NaN", inf="infinity", shape="shape", less="lacks", more="no place", record="damaged",
                base="another base model", folder="does not exist")
    assert said.get(kind, "") in str(error.value)
    assert {n: type(m) for n, m in net.named_modules()} == types and all(torch.equal(t, state[n]) for n, t in net.state_dict().items())


def test_a_folder_of_another_method_is_refused(tmp_path):
    method, model = built("lora")
    method.save(model, tmp_path)
    with pytest.raises(ValueError, match="holds a lora adapter, not stan"): get_method("stan").load(Net(), tmp_path, "all-linear", HEAD)


def test_base_hash_survives_half_precision_and_ignores_the_head():
    net = Net()
    print_ = base_hash(net, HEAD)
    with torch.no_grad(): net.head.weight.add_(1)
    assert base_hash(net, HEAD) == print_ == base_hash(net.to(torch.bfloat16), HEAD)
    assert base_hash(Net(seed=1), HEAD) != print_


@pytest.mark.parametrize("name", own_methods())
def test_groups_hold_each_trained_parameter_once(name):
    method, model = built(name)
    groups = method.param_groups(model, lr=1e-3, head_lr=1e-2, weight_decay=.1)
    held = [p for group in groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in held}) == len(held) == len(trained) and all(p.requires_grad for p in held)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rate[id(p)] for n, p in model.named_parameters() if id(p) in rate and ".head." in f".{n}"} == {1e-2}
    assert all(group["weight_decay"] == (.1 if p.ndim > 1 else 0) for group in groups for p in group["params"])


def test_adalora_keeps_what_the_budget_buys():
    method, model = built("adalora", 2040)
    method.prepare(model, 30)
    optimizer = torch.optim.AdamW(method.param_groups(model, 1e-2))
    x, y = torch.randn(64, 40), torch.randint(3, (64,))
    for step in range(1, 31):
        (nn.functional.cross_entropy(model(x), y) + method.penalty(model)).backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
        assert method.settled(step) == (step >= 15)
    alive = sum(int((m.lora_E["default"] != 0).sum()) for m in model.modules() if hasattr(m, "lora_E"))
    assert alive == method.chosen["ranks"] < method.chosen["init_rank"] * 3


def test_adalora_needs_two_steps():
    method, model = built("adalora")
    with pytest.raises(ValueError, match="at least 2 steps"): method.prepare(model, 1)


def test_sora_starts_at_the_budget_and_says_what_is_left(tmp_path):
    method, model = built("sora", 2040, xi=5e-3)
    lora = built("lora", 2040)[0]
    assert (method.chosen["rank"], method.chosen["trainable"]) == (lora.chosen["rank"], lora.chosen["trainable"])
    assert method.chosen["starts_with"] == count_parameters(model, HEAD)["adapter"] == method.chosen["trainable"] + method.chosen["ranks"]
    groups = method.param_groups(model, lr=1e-2, weight_decay=.1)
    own = [group for group in groups if {id(p) for p in group["params"]} & {id(g) for g in gates(model).values()}]
    assert len(own) == 1 and len(own[0]["params"]) == 3 and own[0]["weight_decay"] == 0 and own[0]["lr"] == 1e-2     # alone, and never decayed
    method.prepare(model, 60)
    optimizer = torch.optim.AdamW(groups)
    x, y = torch.randn(64, 40), torch.randint(3, (64,))
    for step in range(1, 61):
        (nn.functional.cross_entropy(model(x), y) + method.penalty(model)).backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    alive, before = sum(int(g.count_nonzero()) for g in gates(model).values()), model(x)
    method.finish(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert 0 < method.chosen["ranks_left"] == alive < method.chosen["ranks"]
    assert method.chosen["kept"] == count_parameters(model, HEAD)["adapter"] - alive < method.chosen["trainable"]
    method.save(model, tmp_path)
    other = get_method("sora")
    assert torch.equal(other.load(Net(), tmp_path, "all-linear", HEAD).eval()(x), model.eval()(x)) and other.chosen == method.chosen


def test_sora_pulls_a_gate_as_hard_in_a_small_model_as_in_a_large_one():
    pulls = []
    for budget in (1020, 5100):
        method, model = built("sora", budget, pull=.25)
        method.penalty(model).backward()
        pulls += [g.grad.abs() for g in gates(model).values()]
    torch.testing.assert_close(torch.cat(pulls), torch.full_like(torch.cat(pulls), .25))
    assert built("sora", pull=0.)[0].penalty(None) is None


def test_names_and_options():
    with pytest.raises(ValueError, match="Did you mean 'lora'"): get_method("lorra")
    with pytest.raises(TypeError, match="lora has no option 'k'"): get_method("lora", k=3)
    for name, options in (("stan", dict(k=0)), ("stan", dict(select="most")), ("lora", dict(scaling=float("nan"))), ("lora", dict(dropout=1.)), ("adalora", dict(start=1.)),
                          ("sora", dict(xi=-1.)), ("sora", dict(pull=float("inf"))), ("sora", dict(prox="hard"))):
        with pytest.raises(ValueError, match=f"{list(options)[0]}.* (allowed is|must be one of)"): get_method(name, **options)
    method = method_from_settings(settings("toy", k=3, scaling=4., method="stan", dropout=.1, encoder_bias=True, select="relu"))
    assert (method.k, method.scaling, method.dropout, method.encoder_bias, method.select) == (3, 4., .1, True, "relu")
    assert method_from_settings(settings("toy", method="sora", xi=.01)).xi == .01
    for rank in (0, -1):
        with pytest.raises(ValueError, match="rank = "): lora_budget(Net(), "all-linear", rank)
