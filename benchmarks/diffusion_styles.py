"""What can be removed from a trained adapter: one style of six, by latents, by LoRA's own directions, by a supervised direction.

    python benchmarks/diffusion_styles.py --out stan_nb/data/results/diffusion_styles.json

Takes the tuned settings of stan_nb/data/results/diffusion_methods.json and its three seeds; runs that are in runs/cache are not run twice. For every seed and every
style a threshold is chosen on questions with noise of their own (the calibration); what is stored was measured on other questions.
"""
import sys, tempfile
from pathlib import Path

import torch

from stan_nb.diffusion import DiffusionTask
from stan_nb.hooks import ablate
from stan_nb.peft import from_lora
from stan_nb.protocol import run_key, run_once
from stan_nb.runs import command_line, load_results, save_results
from stan_nb.settings import Settings
from stan_nb.steering import latent_means, own_latents, removal, without_direction
from peft import PeftModel

CACHE, SHARES, LAYERS = Path("runs/cache"), (.25, .3, .35, .4, .45, .5, .6), (.15, .3, .6, 1.)


def opened(wanted, corpus):
    "Task and model of a finished run; a LoRA as the STAN adapter that computes the same, so that its ranks are latents."
    run_once(wanted, True, CACHE, corpus)
    path = CACHE / run_key(wanted, True, corpus)
    task, model = DiffusionTask.from_run(path)
    if wanted.method == "lora":
        folder = Path(tempfile.mkdtemp()) / "as-stan"
        from_lora(path / "adapter", folder)
        model = PeftModel.from_pretrained(task.build_model(), str(folder)).eval()
    return task, model


def choose(task, model, stats, style, ways):
    "The way that removes at least .9 at the least cost to the others, on the calibration questions; else the one that removes most beyond five times that cost."
    before, found = None, []
    for label, switched in ways:
        got = removal(task, model, style, switched(), copies=1, first=6 * 10**5, before=before)
        before = got["before"]
        found.append((label, switched, got))
    enough = [f for f in found if f[2]["removed"] >= .9]
    return min(enough, key=lambda f: f[2]["lost"]) if enough else max(found, key=lambda f: f[2]["removed"] - 5 * max(0, f[2]["lost"]))


def main():
    torch.set_num_threads(1)
    out = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "stan_nb/data/results/diffusion_styles.json"
    methods = load_results("diffusion_methods")
    rows, chosen, seeds = [], {}, sorted({row["seed"] for row in methods["rows"] if row["stage"] == "test"})
    for seed in seeds:
        for method in ("stan", "lora"):
            wanted = Settings.from_dict(methods["settings"][method]).replace(seed=seed)
            chosen[method] = wanted
            task, model = opened(wanted, methods["corpus_hash"])
            stats = latent_means(task, model)
            for style, name in enumerate(task.styles):
                kinds = {f"{method} latents": [(share, lambda share=share: ablate(model, own_latents(stats, style, share))) for share in SHARES if own_latents(stats, style, share)]}
                if method == "lora": kinds["lora supervised direction"] = [(share, lambda share=share: without_direction(model, stats, style, share)) for share in LAYERS]
                for kind, ways in kinds.items():
                    if not ways: ways = [(0., lambda: ablate(model, {}))]
                    share, switched, _ = choose(task, model, stats, style, ways)
                    got = removal(task, model, style, switched(), copies=2, first=7 * 10**5)
                    count = sum(map(len, own_latents(stats, style, share).values())) if "latents" in kind and share else None
                    rows.append(dict(seed=seed, way=kind, style=name, share=share, latents=count, removed=got["removed"], lost=got["lost"], lost_aligned=got["lost_aligned"], had=float(got["before"][0])))
                    print(rows[-1], flush=True)
    more = dict(note="removed: share of the style's accuracy that is gone; lost: points of style accuracy that the other five lost")
    save_results(out, rows, f"python benchmarks/diffusion_styles.py --out {out}", seeds, chosen, methods["corpus_hash"], **more)


if __name__ == "__main__": main()
