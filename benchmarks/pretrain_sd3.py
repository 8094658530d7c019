"""The small base of the diffusion lesson, made from nothing: an SD3 transformer that draws plain digits, and the judge that scores it.

    python benchmarks/pretrain_sd3.py            about 10 minutes on one core; writes stan_nb/data/models/digits-sd3
    python benchmarks/pretrain_sd3.py --score    scores what is there

The base is told a digit and a style, and learns that styles mean nothing: every prompt is drawn plain. What they mean is left to the adapters.
"""
import json, sys, time
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from stan_nb.diffusion import draw_timesteps, flow_loss, sample
from stan_nb.pictures import DIGITS, STYLES, Judge, Prompts, digit_prompts, draw_digits, train_judge
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).resolve().parent.parent / "stan_nb" / "data" / "models" / "digits-sd3"
SHAPE = dict(sample_size=16, patch_size=4, in_channels=1, out_channels=1, num_layers=4, num_attention_heads=4, attention_head_dim=16, caption_projection_dim=64,
             joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=4)
STEPS, BATCH, RATE, NULL = int(sys.argv[sys.argv.index("--steps") + 1]) if "--steps" in sys.argv else 4000, 64, 2e-3, .1


def pretrain(prompts, scheduler):
    "The transformer, as a running mean of its weights."
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SHAPE)
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.998))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(.9, .99), weight_decay=0.)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=.05)
    names, start, losses = ["plain", *STYLES], time.process_time(), []
    for step in range(1, STEPS + 1):
        images, digits, _ = draw_digits("train", BATCH, ["plain"], step)
        said = [" ".join([DIGITS[d], names[s], names[z] if two else ""]) if keep else "" for d, s, z, two, keep in
                zip(digits, *torch.randint(len(names), (2, BATCH)), torch.rand(BATCH) < .2, torch.rand(BATCH) > NULL)]
        loss = flow_loss(model, images, torch.randn_like(images), draw_timesteps(BATCH, scheduler), *prompts(said), scheduler)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        rates.step()
        mean.update_parameters(model)
        losses.append(loss.item())
        if step % 200 == 0: print(f"step {step}: loss {sum(losses[-200:]) / 200:.4f}, {time.process_time() - start:.0f} CPU-s", flush=True)
    return mean.module


@torch.no_grad()
def scores(model, judge, prompts, scheduler, n=20):
    "How often the judge sees the digit that was asked for, drawn plain; and how well the judge knows digits of people it has never seen."
    asked = [f"{digit} {style}" for digit in DIGITS for style in ("plain", "inverted") for _ in range(n)]
    images = sample(model, scheduler, torch.randn(len(asked), 1, 16, 16, generator=torch.Generator().manual_seed(7)), prompts(asked), prompts([""]))
    digit, style = (logits.argmax(-1) for logits in judge(images))
    right = digit == torch.arange(10).repeat_interleave(2 * n)
    exam, digits, styles = draw_digits("test", 2000, judge.styles, 3)
    seen = [logits.argmax(-1) for logits in judge(exam)]
    return dict(base_digit=right.float().mean().item(), base_plain=(style == 0).float().mean().item(),
                judge_digit=(seen[0] == digits).float().mean().item(), judge_style=(seen[1] == styles).float().mean().item())


def main():
    torch.set_num_threads(1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.)
    if "--score" not in sys.argv:
        prompts = digit_prompts()
        if "--judge" not in sys.argv:
            model = pretrain(prompts, scheduler).half()
            model.save_pretrained(FOLDER / "transformer")
        prompts.save(FOLDER / "prompts")
        scheduler.save_pretrained(FOLDER / "scheduler")
        (FOLDER / "judge").mkdir(exist_ok=True)
        save_file({name: tensor.half().contiguous() for name, tensor in train_judge().state_dict().items()}, FOLDER / "judge" / "judge.safetensors")
    model = SD3Transformer2DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32).eval()
    judge = Judge()
    judge.load_state_dict({name: t.float() for name, t in load_file(FOLDER / "judge" / "judge.safetensors").items()})
    found = scores(model, judge.eval(), Prompts.load(FOLDER / "prompts"), scheduler)
    print(found)
    if "--score" not in sys.argv: (FOLDER / "scores.json").write_text(json.dumps(dict(made_by="python benchmarks/pretrain_sd3.py", **found), indent=1) + "\n")


if __name__ == "__main__": main()
