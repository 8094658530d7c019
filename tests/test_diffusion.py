"Styles for a diffusion transformer: the base that comes with the package, the loss beside diffusers' own, the full-scale section with a toy pipeline."
import json, shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from datasets import ClassLabel, Dataset, Features, Image as ImageColumn, Value
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
from stan_nb.pictures import DIGITS, STYLES, Prompts, clip_vectors, digit_rows, dino_vectors, draw_digits, find_images, image_folder, load_judge, pipeline_prompts
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


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_pictures_than_styles(n): assert len(draw_digits("train", n, list(STYLES), n)[0]) == n


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


# --- the full-scale section, with a toy pipeline in the hub's layout: nothing but the path is another ------------------------

def letters(folder):
    "A CLIP tokenizer that knows the letters."
    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", *map(chr, range(97, 123)), *(chr(c) + "</w>" for c in range(97, 123))]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77), len(words)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "Everything the hub would give: a pipeline, a CLIP and a DINOv2, with random weights; and two folders of pictures."
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    tokenizer, size = letters(folder / "letters")
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=size, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    seen = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**text)) for _ in range(2)]
    transformer = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16,
                                        joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=8)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4,
                        sample_size=16, scaling_factor=1.5, shift_factor=.06, use_quant_conv=False, use_post_quant_conv=False)
    StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.), vae=vae, text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1],
                             tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None).save_pretrained(folder / "sd3")
    CLIPModel(CLIPConfig(text_config=text, vision_config=dict(seen, projection_dim=16), projection_dim=16)).save_pretrained(folder / "clip")
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**{k: v for k, v in seen.items() if k != "intermediate_size"})).save_pretrained(folder / "dino")
    BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder / "dino")
    for style, colour in dict(red=(220, 30, 30), blue=(30, 30, 220)).items():
        (folder / "pictures" / style).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40 + 9 * i, 30), colour).save(folder / "pictures" / style / f"{i}.png")
            (folder / "pictures" / style / f"{i}.txt").write_text(f"{'a field' if i % 2 else 'a sky'}\n")
    made = [(Image.new("RGB", (40 + 9 * i, 30), colour), style, "a field" if i % 2 else "a sky") for style, colour in enumerate(((30, 30, 220), (220, 30, 30))) for i in range(4)]
    columns = Features(image=ImageColumn(), style=ClassLabel(names=["blue", "red"]), caption=Value("string"))
    Dataset.from_dict(dict(zip(columns, map(list, zip(*made)))), features=columns).to_parquet(folder / "set" / "data" / "train-00000-of-00001.parquet")
    for style in ("blue", "red"): shutil.copytree(folder / "pictures" / style, folder / "tree" / "train" / style, ignore=shutil.ignore_patterns("*.txt"))
    return folder


@pytest.fixture
def wanted(hub, monkeypatch):
    monkeypatch.setenv("STAN_CACHE", str(hub / "cache"))
    return settings("diffusion", "paper", backbone=str(hub / "sd3"), data=str(hub / "pictures"), precision="no", rank=2, k=2, max_steps=4, grad_accum=1, lr=1e-2,
                    **{"opt.size": 16, "opt.steps": 2, "opt.dtype": "float32", "opt.clip": str(hub / "clip"), "opt.dino": str(hub / "dino")})


@pytest.mark.parametrize("method", ["lora", "stan"])
def test_the_paper_section_runs_as_it_is(wanted, tmp_path, method):
    result = train_run(wanted.replace(method=method), tmp_path / "run", progress=False)
    assert result["metric"] == "clip_i" and set(result["test"]) == {"clip_t", "clip_i", "dino"} and all(-1 <= v <= 1 for v in result["test"].values())
    task, model = DiffusionTask.from_run(tmp_path / "run")
    assert task.styles == ["blue", "red"] and "a field in the style of red" in task.prompts.words
    data = task.load_data()
    assert evaluate(task, model, data["test"], progress=False) == pytest.approx(result["test"], abs=1e-4)
    assert task.decode(task.latents).shape == task.images.shape == (8, 3, 16, 16)
    sheet = task.preview({method: model})
    assert sheet.get_yticklabels()[0].get_text() == "blue"


@pytest.mark.parametrize("source", ["pictures", "set", "tree"])
def test_the_colab_section_runs_with_other_paths(hub, monkeypatch, tmp_path, source):
    "From a folder for each style, a data set of the hub, and one in the layout imagefolder. Half precision needs a GPU; the rest is as it stands in settings.ini."
    monkeypatch.setenv("STAN_CACHE", str(hub / "cache"))
    names = {"opt.clip": str(hub / "clip"), "opt.dino": str(hub / "dino")}
    section = settings("diffusion", "colab", backbone=str(hub / "sd3"), data=str(hub / source), max_steps=2, rank=4, **names)
    with pytest.raises(ValueError, match="fp16"): train_run(section, tmp_path / "no", progress=False)
    wanted = section.replace(precision="no", **{"opt.dtype": "float32", "opt.size": 16, "opt.steps": 2})
    result = train_run(wanted, tmp_path / "run", progress=False)
    assert set(result["test"]) == {"clip_t", "clip_i", "dino"}
    task, model = DiffusionTask.from_run(tmp_path / "run")
    assert task.styles == ["blue", "red"] and task.load_data()["train"].num_rows == 8 and task.preview({"stan": model}) is not None
    captions = {row["prompt"].split(" in the style")[0] for row in task.load_data()["train"].to_list()}
    assert captions == ({"a picture"} if source == "tree" else {"a sky", "a field"})
    blue = DiffusionTask(wanted.replace(**{"opt.styles": "blue", "opt.least": 2, "opt.most": 3}))
    assert blue.styles == ["blue"] and len(blue.folder[0]) == 3


def test_a_folder_and_a_data_set_of_the_same_pictures(hub):
    of = {name: find_images(str(hub / name), 16) for name in ("pictures", "set", "tree")}
    assert of["pictures"][1] == of["set"][1] and [s for s, _ in of["tree"][1]] == [s for s, _ in of["set"][1]]
    for name in ("set", "tree"): assert torch.equal(of[name][0], of["pictures"][0])


def test_embeddings_without_t5(wanted, hub):
    with_t5 = pipeline_prompts(str(hub / "sd3"), ["a sky"], hub / "cache" / "a")
    without = pipeline_prompts(str(hub / "sd3"), ["a sky"], hub / "cache" / "a", t5=False)
    assert torch.equal(with_t5(["a sky"])[0], without(["a sky"])[0])                # the toy has no T5: nothing to leave out, but a file of its own
    assert len(list((hub / "cache" / "a").iterdir())) == 2


def test_embeddings_are_computed_once(wanted, hub, monkeypatch):
    first = DiffusionTask(wanted)
    tokens, pooled = first.prompts(["a sky in the style of blue", ""])
    assert tokens.shape[-1] == 32 and pooled.shape == (2, 32) and not torch.equal(tokens[0], tokens[1])
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *a, **k: pytest.fail("asked the encoders again"))
    again = DiffusionTask(wanted).prompts(["a sky in the style of blue", ""])
    assert torch.equal(again[0], tokens) and torch.equal(again[1], pooled)
    with pytest.raises(ValueError, match="not known"): first.prompts(["a sky in the style of green"])


@pytest.mark.parametrize("guidance", [1., 4.])
def test_sample_is_what_diffusers_pipeline_draws(wanted, hub, guidance):
    task = DiffusionTask(wanted)
    prompt, empty = task.prompts(["a sky in the style of blue"]), task.prompts([""])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = sample(task.build_model().eval(), task.scheduler, noise, prompt, empty, 5, guidance)
    pipe = StableDiffusion3Pipeline.from_pretrained(hub / "sd3", text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompt_embeds=prompt[0], pooled_prompt_embeds=prompt[1], negative_prompt_embeds=empty[0], negative_pooled_prompt_embeds=empty[1], latents=noise.clone(),
                  num_inference_steps=5, guidance_scale=guidance, height=16, width=16, output_type="latent").images
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_adapter_goes_through_diffusers_and_peft(wanted, tmp_path):
    "LoRA through diffusers' own files, STAN through PEFT's; both inside a transformer without a wrapper."
    for method in ("lora", "stan"): train_run(wanted.replace(method=method), tmp_path / method, progress=False, look=False)
    task, lora = DiffusionTask.from_run(tmp_path / "lora")
    rows = task.load_data()["test"]
    plain = task.build_model().eval()
    off = predict_rows(task, plain, rows, progress=False)
    lora.get_base_model().peft_config = lora.peft_config
    lora.get_base_model().save_lora_adapter(tmp_path / "files", adapter_name="default")
    plain.load_lora_adapter(tmp_path / "files", prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True, adapter_name="styles")
    on = predict_rows(task, lora, rows, progress=False)
    torch.testing.assert_close(predict_rows(task, plain, rows, progress=False), on)
    plain.disable_adapters()
    assert torch.equal(predict_rows(task, plain, rows, progress=False), off) and not torch.equal(on, off)
    stan = DiffusionTask.from_run(tmp_path / "stan")[1]
    again = PeftModel.from_pretrained(task.build_model(), tmp_path / "stan" / "adapter").eval()
    assert torch.equal(predict_rows(task, again, rows, progress=False), predict_rows(task, stan, rows, progress=False))


def test_vectors_of_clip_and_dino(hub):
    images = torch.rand(5, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen, said = clip_vectors(images, ["a sky", "a field of red"], str(hub / "clip"))
    model, processor = CLIPModel.from_pretrained(hub / "clip").eval(), CLIPProcessor.from_pretrained(hub / "clip")
    pictures = [Image.fromarray(((i + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for i in images]
    with torch.no_grad(): out = model(**processor(images=pictures, text=["a sky", "a field of red"], return_tensors="pt", padding=True))
    for ours, theirs in ((seen, out.image_embeds), (said, out.text_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=-1), theirs, atol=1e-5, rtol=1e-4)
    assert dino_vectors(images, str(hub / "dino")).shape == (5, 16)


# --- bad input ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, said", [
    ({"data": "nowhere"}, "'nowhere' is no folder"), ({"opt.styles": "rde"}, "Did you mean 'red'"), ({"opt.least": 5}, "style 'blue' has 4 images"), ({"backbone": ""}, "backbone is empty")])
def test_what_is_wrong_is_said_before_training(wanted, tmp_path, change, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said): train_run(wanted.replace(**change), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, said", [(["--opt.styles", "bold,blod"], "Did you mean 'bold'"), (["--opt.unseen", "11"], "0 to 9"), (["--beside", "nowhere"], "nowhere"),
                                         (["--backbone", "shipped:models/none"], "none")])
def test_the_command_line_says_it_in_one_line(capsys, tmp_path, words, said):
    assert main(["train", "diffusion", "--out", str(tmp_path / "run"), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_folder_without_images(wanted, tmp_path, capsys):
    (tmp_path / "styles" / "red").mkdir(parents=True)
    (tmp_path / "styles" / "red" / "notes.md").write_text("no picture")
    with pytest.raises(ValueError, match="holds no images"): train_run(wanted.replace(data=str(tmp_path / "styles")), tmp_path / "run", progress=False)
    assert main(["train", "diffusion", "--scale", "paper", "--data", str(tmp_path / "styles"), "--out", str(tmp_path / "run"), "--precision", "no"]) == 2
    err = capsys.readouterr().err
    assert "holds no images" in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_file_that_is_no_image(wanted, hub, tmp_path):
    shutil.copytree(hub / "pictures", tmp_path / "styles")
    (tmp_path / "styles" / "red" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="0.png is no image"): train_run(wanted.replace(data=str(tmp_path / "styles")), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_prompt_of_an_unknown_class(task, base):
    with pytest.raises(ValueError, match="'tree' is not known: allowed is .*Did you mean 'three'"): task.prompts(["tree, bold"])
    with pytest.raises(ValueError, match="has 4 words: allowed is up to 3"): task.prompts(["one two three bold"])
    rows = task.load_data()["test"].select([0]).map(lambda row: dict(prompt="dog, bold"))
    with pytest.raises(ValueError, match="'dog' is not known"): predict_rows(task, base, rows, progress=False)


def test_a_model_of_the_hub_needs_pictures(capsys, tmp_path):
    for scale in ("colab", "paper"):
        with pytest.raises(ValueError, match="data is empty"): DiffusionTask(settings("diffusion", scale))
    with pytest.raises(ConnectionError, match="data = 'owner/styles' is not on this machine"): DiffusionTask(settings("diffusion", "colab", data="owner/styles"))


def test_a_backbone_without_a_transformer(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match="backbone"): DiffusionTask(settings("diffusion", backbone=str(tmp_path / "empty"))).build_model()


def test_pictures_of_many_shapes_become_squares(tmp_path):
    (tmp_path / "a").mkdir()
    for i, (size, mode) in enumerate([((64, 16), "RGB"), ((16, 64), "L"), ((5, 5), "RGBA"), ((32, 32), "P")]): Image.new(mode, size).save(tmp_path / "a" / f"{i}.png")
    images, about = image_folder(tmp_path, 16)
    assert images.shape == (4, 3, 16, 16) and about == [("a", "")] * 4
    assert image_folder(tmp_path, 16, channels=1)[0].shape == (4, 1, 16, 16)
