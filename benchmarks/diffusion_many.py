"""Interference: the same adapter, the same steps, and 2, 6 or 12 styles to keep apart.

    python benchmarks/diffusion_many.py --out stan_nb/data/results/diffusion_many.json

Takes the settings that were tuned for six styles (stan_nb/data/results/diffusion_methods.json) and its seeds; runs that are in runs/cache are not run twice.
"""
import sys
from pathlib import Path

import torch

from stan_nb.diffusion import DiffusionTask
from stan_nb.pictures import STYLES
from stan_nb.protocol import run_once
from stan_nb.runs import load_results, save_results
from stan_nb.settings import Settings


def main():
    torch.set_num_threads(1)
    out = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "stan_nb/data/results/diffusion_many.json"
    methods, rows, corpora, used = load_results("diffusion_methods"), [], {}, {}
    seeds = sorted({row["seed"] for row in methods["rows"] if row["stage"] == "test"})
    for seed in seeds:
        for count in (2, 6, 12):
            for method in ("lora", "stan"):
                wanted = Settings.from_dict(methods["settings"][method]).replace(seed=seed, **{"opt.styles": ",".join(list(STYLES)[:count])})
                if count not in corpora:
                    task = DiffusionTask(wanted)
                    task.load_data()
                    corpora[count] = task.corpus_hash
                result = run_once(wanted, True, Path("runs/cache"), corpora[count])["result"]
                used[f"{method} {count}"] = wanted
                rows.append(dict(seed=seed, variant=f"{method} {count}", method=method, styles=count, corpus_hash=corpora[count], **result["test"], unseen=result["more"]["unseen"]["aligned"], neutral=result["more"]["neutral"]["aligned"]))
                print(rows[-1], flush=True)
    save_results(out, rows, f"python benchmarks/diffusion_many.py --out {out}", seeds, used, corpora[6], metric="aligned", tolerance=.05, threads=1)


if __name__ == "__main__": main()
