"""What can be removed from a trained adapter: one style of six, by latents, by LoRA's own directions, by a supervised direction.

    python benchmarks/diffusion_styles.py --out stan_nb/data/results/diffusion_styles.json

Takes the tuned settings of stan_nb/data/results/diffusion_methods.json and its three seeds; runs that are in runs/cache are not run twice. For every seed and every
style a threshold is chosen on questions with noise of their own (the calibration); what is stored was measured on other questions. Rows that are finished are kept in
runs/cache, too, so a run that was stopped goes on where it was; `--seeds 2,1,0` only changes the order.
"""
import json, sys, tempfile
from pathlib import Path

import torch
from peft import PeftModel

from stan_nb.diffusion import DiffusionTask
from stan_nb.forget import own_latents, without_direction
from stan_nb.hooks import ablate
from stan_nb.peft import from_lora
from stan_nb.protocol import run_key, run_once
from stan_nb.runs import atomic_write, load_results, save_results
from stan_nb.settings import Settings
from stan_nb.steering import latent_means, removal

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


def ways_of(method, model, stats, style):
    "What is tried, by kind: (threshold, how to switch) pairs."
    found = {f"{method} latents": [(share, lambda share=share: ablate(model, own_latents(stats, style, share))) for share in SHARES if own_latents(stats, style, share)]
             or [(1., lambda: ablate(model, {}))]}
    if method == "lora": found["lora supervised direction"] = [(share, lambda share=share: without_direction(model, stats, style, share)) for share in LAYERS]
    return found


def row_of(task, model, stats, style, seed, kind, ways):
    "One row of the results."
    share, switched, _ = choose(task, model, stats, style, ways)
    got = removal(task, model, style, switched(), copies=2, first=7 * 10**5)
    count = sum(map(len, own_latents(stats, style, share).values())) if "latents" in kind else None
    return dict(seed=seed, way=kind, style=task.styles[style], share=share, latents=count, removed=got["removed"], lost=got["lost"], lost_aligned=got["lost_aligned"], had=float(got["before"][0]))


def main():
    torch.set_num_threads(1)
    said = lambda name, default: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
    out = said("--out", "stan_nb/data/results/diffusion_styles.json")
    methods = load_results("diffusion_methods")
    rows, chosen = [], {}
    seeds = [int(seed) for seed in said("--seeds", ",".join(map(str, sorted({row["seed"] for row in methods["rows"] if row["stage"] == "test"})))).split(",")]
    for seed in seeds:
        for method in ("stan", "lora"):
            wanted = chosen[method] = Settings.from_dict(methods["settings"][method]).replace(seed=seed)
            task, model = opened(wanted, methods["corpus_hash"])
            stats = latent_means(task, model)
            for style in range(len(task.styles)):
                for kind, ways in ways_of(method, model, stats, style).items():
                    kept = CACHE / f"styles-{run_key(wanted, True, methods['corpus_hash'])}-{style}-{kind.replace(' ', '-')}.json"
                    if not kept.exists(): atomic_write(kept, json.dumps(row_of(task, model, stats, style, seed, kind, ways)))
                    rows.append(json.loads(kept.read_text()))
                    print(rows[-1], flush=True)
    rows.sort(key=lambda row: row["seed"])
    seeds.sort()
    more = dict(note="removed: share of the style's accuracy that is gone; lost: points of style accuracy that the other five lost")
    save_results(out, rows, f"python benchmarks/diffusion_styles.py --out {out}", seeds, chosen, methods["corpus_hash"], **more)


if __name__ == "__main__": main()
