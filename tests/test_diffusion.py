"Styles for a diffusion transformer: the base that comes with the package, the loss beside diffusers' own, the full-scale section with a toy pipeline."
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from hypothesis import given, settings as limits, strategies as st
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionConfig,
                          BitImageProcessor, Dinov2Config, Dinov2Model)

from stan_nb.assets import shipped
from stan_nb.cli import main
from stan_nb.diffusion import DiffusionTask, draw_timesteps, flow_loss, sample
from stan_nb.methods import method_from_settings
from stan_nb.pictures import DIGITS, STYLES, Prompts, clip_vectors, digit_rows, dino_vectors, draw_digits, image_folder, load_judge, pipeline_prompts
from stan_nb.runs import Run
from stan_nb.settings import settings
from stan_nb.task import evaluate, predict_rows, take
from stan_nb.train import fit, seed_all, train_run

BASE = shipped("models/digits-sd3")
RECORDED = json.loads((BASE / "scores.json").read_text())


@pytest.fixture(scope="module")
def task():
    torch.set_num_threads(1)
    return DiffusionTask(settings("diffusion"))


@pytest.fixture(scope="module")
def base(task): return task.build_model().eval()


@pytest.fixture(scope="module")
def data(task): return task.load_data()


# --- what comes with the package ------------------------------------------------------------------------------------------

def test_the_base_is_small_and_in_the_hubs_layout():
    assert sum(p.stat().st_size for p in BASE.rglob("*") if p.is_file()) < 4e6
    stored = load_file(BASE / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert {p.name for p in BASE.iterdir()} == {"transformer", "scheduler", "prompts", "judge", "scores.json"}


def test_the_base_scores_as_recorded(task, base):
    asked = [f"{digit} {style}" for digit in DIGITS for style in ("plain", "inverted") for _ in range(20)]
    noise = torch.randn(len(asked), 1, 16, 16, generator=torch.Generator().manual_seed(7))
    images = sample(base, task.scheduler, noise, task.prompts(asked), task.prompts([""]))
    digit, style = (logits.argmax(-1) for logits in load_judge()(images))
    assert abs((digit == torch.arange(10).repeat_interleave(40)).float().mean().item() - RECORDED["base_digit"]) <= .01
    assert abs((style == 0).float().mean().item() - RECORDED["base_plain"]) <= .01


def test_the_judge_scores_as_recorded():
    judge = load_judge()
    exam, digits, styles = draw_digits("test", 2000, judge.styles, 3)
    digit, style = (logits.argmax(-1) for logits in judge(exam))
    assert abs((digit == digits).float().mean().item() - RECORDED["judge_digit"]) <= .005
    assert abs((style == styles).float().mean().item() - RECORDED["judge_style"]) <= .005


# --- pictures and questions -----------------------------------------------------------------------------------------------

@limits(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), unseen=st.integers(0, 9))
def test_no_pair_is_both_shown_and_unseen(n, unseen):
    styles = list(STYLES)[:n]
    images, rows = digit_rows(styles, 150, unseen)
    pairs = {split: {(r["style"], r["digit"]) for r in found} for split, found in rows.items()}
    assert len(images) == len(rows["train"]) == 150 and [r["image"] for r in rows["train"]] == list(range(150))
    never = pairs.get("unseen", set())
    assert not never & pairs["train"] and pairs["test"] | never == {(s, d) for s in styles for d in range(10)}
    assert all(sum(s == style for s, _ in never) == unseen for style in styles)
    seeds = [r["seed"] for split in ("valid", "test", "unseen", "neutral") for r in rows.get(split, [])]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("style", ["plain", *STYLES])
def test_each_style_is_told_apart(style):
    judge = load_judge()
    images, _, _ = draw_digits("test", 200, [style], 11)
    assert (judge(images)[1].argmax(-1) == judge.styles.index(style)).float().mean() > .9
    assert -1 <= images.min() and images.max() <= 1


# --- loss and scheduler, beside diffusers' ---------------------------------------------------------------------------------

def recipe(model, latents, noise, index, tokens, pooled, scheduler, weighting, precondition):
    "The loss as diffusers' train_dreambooth_lora_sd3.py states it, written down anew."
    t = scheduler.timesteps[index]
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1. - sigma) * latents + sigma * noise
    guess = model(hidden_states=noisy, timestep=t, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False)[0]
    target = noise - latents
    if precondition: guess, target = guess * (-sigma) + noisy, latents
    weight = {"sigma_sqrt": sigma**-2., "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(weighting, torch.ones_like(sigma))
    return torch.mean((weight.float() * (guess.float() - target.float())**2).reshape(len(target), -1), 1).mean()


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("weighting", ["logit_normal", "sigma_sqrt", "cosmap", "none"])
def test_the_loss_is_the_recipes(task, base, data, weighting, precondition):
    seed_all(0)
    batch = task.collate(take(data["train"], range(8)))
    index = torch.tensor([3, 100, 250, 400, 550, 700, 850, 990])
    parts = [batch[name] for name in ("latents", "noise")], [batch[name] for name in ("tokens", "pooled")]
    with torch.no_grad():
        ours = flow_loss(base, *parts[0], task.scheduler.timesteps[index], *parts[1], task.scheduler, weighting, precondition)
        theirs = recipe(base, *parts[0], index, *parts[1], task.scheduler, weighting, precondition)
    torch.testing.assert_close(ours, theirs)


@limits(max_examples=20, deadline=None)
@given(steps=st.integers(1, 30), shift=st.floats(1., 5.), seed=st.integers(0, 99))
def test_the_scheduler_goes_there_and_back(steps, shift, seed):
    rng = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, 1, 1, 4, 4, generator=rng)

    class Knows(torch.nn.Module):
        def forward(self, hidden_states, **other): return ((noise - image).expand_as(hidden_states),)
    none = torch.zeros(1, 1, 1), torch.zeros(1, 1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(sample(Knows(), scheduler, noise, none, none, steps, 3.), image, atol=1e-4, rtol=1e-4)


def test_timesteps_lie_in_the_middle(task):
    seed_all(0)
    drawn = {name: draw_timesteps(4000, task.scheduler, name) / 1000 for name in ("logit_normal", "uniform")}
    inside = {name: ((s > .25) & (s < .75)).float().mean().item() for name, s in drawn.items()}
    assert inside["logit_normal"] == pytest.approx(.728, abs=.03) and inside["uniform"] == pytest.approx(.5, abs=.03)


# --- training --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A short run of each method, through the command line."
    folder, extra = tmp_path_factory.mktemp("runs"), ["--max-steps", "60", "--test-size", "24", "--opt.styles", "bold,striped", "--opt.unseen", "0", "--train-size", "300"]
    assert main(["train", "diffusion", "--method", "lora", "--out", str(folder / "lora"), *extra]) == 0
    assert main(["train", "diffusion", "--method", "stan", "--out", str(folder / "stan"), "--beside", str(folder / "lora"), *extra]) == 0
    return folder


def test_the_loss_falls(runs):
    for method in ("lora", "stan"):
        losses = [row["loss"] for row in Run.open(runs / method).history()]
        assert np.mean(losses[-15:]) < .8 * np.mean(losses[:5]), method


def test_both_methods_pay_the_same(runs):
    count = [Run.open(runs / m).info["result"]["trainable"] for m in ("lora", "stan")]
    assert count[0] == count[1]


def test_the_contact_sheet(runs):
    picture = Image.open(runs / "stan" / "figures" / "preview.png").convert("RGBA")
    assert picture.width > 1.5 * picture.height and len(set(picture.resize((64, 32)).getdata())) > 20


def test_off_is_the_base_and_the_same_seed_the_same_picture(runs, base):
    task, model = DiffusionTask.from_run(runs / "stan")
    rows = task.load_data()["test"].select(range(6))
    first = predict_rows(task, model, rows, progress=False)
    assert torch.equal(first, predict_rows(task, model, rows, progress=False))
    torch.testing.assert_close(first[2:4], predict_rows(task, model, rows.select([2, 3]), progress=False), atol=1e-3, rtol=0)   # in other company, too
    with model.disable_adapter(): off = predict_rows(task, model, rows, progress=False)
    assert torch.equal(off, predict_rows(task, base, rows, progress=False)) and not torch.equal(first, off)
    moved = rows.map(lambda row: dict(seed=row["seed"] + 1))
    assert not torch.equal(first, predict_rows(task, model, moved, progress=False))


def test_full_fine_tuning_learns_a_style(base):
    "Not only the loss: after 60 steps of everything the pictures change sides."
    chosen = settings("diffusion", method="full", lr=1e-3, max_steps=60, train_size=300, test_size=16, **{"opt.styles": "inverted", "opt.unseen": 0})
    task, method = DiffusionTask(chosen), method_from_settings(chosen)
    found = task.load_data()
    before = evaluate(task, base, found["test"], progress=False)
    model = method.build(task.build_model(), None)
    fit(task, model, method, chosen, data={split: found[split] for split in ("train", "valid")}, progress=False)
    assert before["style"] < .1 and evaluate(task, model, found["test"], progress=False)["style"] > .8
