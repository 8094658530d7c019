"Deleting a skill: nothing is lost, nothing is changed by mistake, and what is said is what is so."
import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from stan_nb.forget import as_latents, forget, moments, own_latents, trade, without_direction
from stan_nb.hooks import ablate, find_adapters
from stan_nb.interference import Many
from stan_nb.layer import adapt
from stan_nb.settings import settings
from stan_nb.task import evaluate, take
from stan_nb.train import train_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two runs of three skills, short ones."
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("forget")
    for method in ("stan", "lora"):
        train_run(settings("many", task="digits", method=method, k=4, lr=3e-3, scaling=4, max_steps=300, seed=0, **{"opt.skills": 3}), path/method, progress=False)
    return path


@pytest.fixture
def opened(folder): return Many.from_run(folder/"stan")


def parts(task, split="valid", skill=0):
    rows = task.load_data()[split]
    return tuple(rows.select([i for i, s in enumerate(rows["skill"]) if (s == skill) == same]) for same in (True, False))


def tensors(model): return {name: t.clone() for name, t in model.state_dict().items()}
def same(model, before): return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_report_is_what_one_measures_again_and_undo_is_exact(opened):
    task, model = opened
    own, rest = parts(task)
    before = tensors(model)
    gone = forget(task, model, own, rest, limit=.1)
    assert gone.latents and not same(model, before)
    for rows, key in ((own, "skill"), (rest, "keep")):
        held = rows.select(np.random.default_rng(0).permutation(len(rows))[1::2])
        assert evaluate(task, model, held, progress=False)["accuracy"] == pytest.approx(gone.cost[key])
    gone.undo(model)
    assert same(model, before)


def test_it_is_the_ablation_made_lasting(opened):
    task, model = opened
    own, rest = parts(task)
    batch = task.collate(take(rest, range(32)))
    gone = forget(task, model, own, rest, limit=.5)
    assert gone.latents
    changed = task.predict(model, batch)
    gone.undo(model)
    with ablate(model, gone.latents): assert torch.allclose(task.predict(model, batch), changed, atol=1e-5)


def test_a_saved_adapter_forgets_the_same(opened, tmp_path):
    task, model = opened
    own, rest = parts(task)
    gone = forget(task, model, own, rest, limit=.1)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path/"adapter_model.safetensors")
    layer, latents = next(iter(gone.latents.items()))
    rows = next(t for name, t in saved.items() if name.endswith("decoder") and layer.split(".stan_sae")[0] in name)
    assert not rows[latents].any() and rows.any()


@pytest.mark.parametrize("change, says", [(dict(limit=1.), "limit = 1.0"), (dict(limit=-.1), "limit = -0.1"), (dict(shares=()), "shares"), (dict(shares=(.5, 1.)), "shares"),
                                          (dict(skill_data=3), "skill_data has 3 rows"), (dict(keep_data=0), "keep_data has 0 rows")])
def test_bad_input_changes_nothing(opened, change, says):
    task, model = opened
    own, rest = parts(task)
    before = tensors(model)
    given = dict(skill_data=own, keep_data=rest) | {name: (own if name == "skill_data" else rest).select(range(n)) if name.endswith("data") else n for name, n in change.items()}
    with pytest.raises(ValueError, match=says): forget(task, model, **given)
    assert same(model, before)


def test_a_skill_that_the_adapter_lacks_is_refused(opened):
    task, model = opened
    own, rest = parts(task)
    with torch.no_grad():
        for adapter in find_adapters(model).values(): adapter.decoder.zero_()
    before = tensors(model)
    with pytest.raises(ValueError, match="does not have this skill"): forget(task, model, own, rest)
    assert same(model, before)


def test_singular_directions_of_a_layer_narrower_than_the_rank(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(12, 3)).requires_grad_(False)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    lora.save_pretrained(tmp_path/"lora")
    x = torch.randn(5, 12)
    with torch.no_grad(): assert torch.allclose(as_latents(base, tmp_path/"lora", tmp_path/"stan", True)(x), lora.eval()(x), atol=1e-5)


def test_undo_on_another_model_is_refused(opened, folder):
    task, model = opened
    gone = forget(task, model, *parts(task), limit=.1)
    with pytest.raises(ValueError): gone.undo(task.build_model())


def test_counting_is_repeatable_and_additive_over_rows(opened):
    task, model = opened
    own, _ = parts(task)
    whole, again = (moments(task, model, [own], batch_size=size) for size in (128, 17))
    first, second = (moments(task, model, [own.select(range(a, b))]) for a, b in ((0, 100), (100, len(own))))
    for name, (writes, means, within) in whole.items():
        assert torch.allclose(writes, again[name][0], rtol=1e-4, atol=1e-6) and torch.allclose(within, again[name][2], rtol=1e-3, atol=1e-5)
        share = 100 / len(own)
        assert torch.allclose(writes, share * first[name][0] + (1 - share) * second[name][0], rtol=1e-4, atol=1e-6)


def test_hooks_are_gone_after_an_error(opened):
    task, model = opened
    stats = moments(task, model, parts(task))
    with pytest.raises(RuntimeError, match="mine"):
        with without_direction(model, stats, 0), ablate(model, own_latents(stats, 0, .4)): raise RuntimeError("mine")
    assert not any(adapter.latent_hooks for adapter in find_adapters(model).values())


@pytest.mark.parametrize("singular", [False, True])
def test_a_lora_in_either_basis_computes_the_same(folder, tmp_path, singular):
    task, model = Many.from_run(folder/"lora")
    other = as_latents(task.build_model(), folder/"lora/adapter", tmp_path/"stan", singular)
    batch = task.collate(take(task.load_data()["test"], range(64)))
    with torch.no_grad(): assert torch.allclose(task.predict(model, batch), task.predict(other, batch), atol=1e-4)


def test_a_direction_taken_out_leaves_the_mean_of_the_others(opened):
    task, model = opened
    own, rest = parts(task)
    stats = moments(task, model, [own, rest])
    with without_direction(model, stats, 0): after = moments(task, model, [own, rest])
    first = next(iter(stats))                                                                # later layers see changed inputs
    shift = lambda found: (found[first][1][0] - found[first][1][1]).norm()
    assert shift(after) < .2 * shift(stats)
    assert trade(task, model, own, rest, [ablate(model, {})])[1]["drop"] == 0


class Padded:
    "Two tokens a row, the second one padding; a task of the fewest methods that counting needs."
    def questions(self, rows): return dict(x=torch.tensor([row["x"] for row in rows]), attention_mask=torch.tensor([[1, 0]] * len(rows)))
    def predict(self, model, batch):
        assert not model.training
        return model(batch["x"])


def test_padding_does_not_count_and_the_mode_is_restored():
    torch.manual_seed(0)
    real = torch.randn(6, 1, 8)
    rows = lambda padding: Dataset.from_dict(dict(x=torch.cat([real, padding], 1).tolist()))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    adapt(model, ["0"], num_latents=4, k=2)
    for adapter in find_adapters(model).values(): torch.nn.init.normal_(adapter.decoder)
    model.train()
    one, other = (moments(Padded(), model, [rows(padding)]) for padding in (torch.zeros(6, 1, 8), 100 * torch.randn(6, 1, 8)))
    for name in one: assert all(torch.equal(a, b) for a, b in zip(one[name], other[name])) and one[name][0].any()
    assert model.training


def test_the_frozen_score_is_taken_once(opened, monkeypatch):
    task, model = opened
    own, rest = parts(task)
    seen = []
    monkeypatch.setattr("stan_nb.forget.evaluate", lambda task, model, rows, progress: (seen.append(len(rows)), dict(accuracy=.5))[1])
    found = trade(task, model, own, rest, [ablate(model, {}) for _ in range(3)])
    assert len(found) == 4 and len(seen) == 8
