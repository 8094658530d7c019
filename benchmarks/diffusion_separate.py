"""One adapter for six styles, or six adapters, one for each style, that have no more parameters together.

    python benchmarks/diffusion_separate.py --out stan_nb/data/results/diffusion_separate.json

The one adapter is that of stan_nb/data/results/diffusion_methods.json: 16 ranks or latents in each layer. The six share the same 16 as 3, 3, 3, 3, 2, 2, and the two
that get 2 are others at each seed. They also share the 400 steps (67 each), see the pictures of their own style alone, and are asked the same questions. STAN keeps 4
of 16 latents for all, and 1 of 2 or 3 for each. Learning rate and scaling are chosen from the same six settings, on the same seed, on valid, anew. In a third way each
adapter trains for 400 steps, six times as much in all, with the learning rate and scaling that were chosen for 400 steps. What is finished is kept in runs/cache.
"""
import itertools, json, sys
from pathlib import Path

import numpy as np
import torch

from stan_nb.diffusion import DiffusionTask
from stan_nb.methods import count_parameters, lora_budget, method_from_settings
from stan_nb.protocol import run_key, run_once
from stan_nb.runs import atomic_write, load_results, save_results
from stan_nb.settings import Settings
from stan_nb.task import evaluate
from stan_nb.train import fit, seed_all

CACHE = Path("runs/cache")
GRID = list(itertools.product((5e-3, 1e-2, 2e-2), (1., 4.)))


def rank_of(style, seed): return 2 if (style - 2 * seed) % 6 > 3 else 3


def alone(task, data, wanted, style, look):
    "Train an adapter on one style's pictures; its scores on that style's questions."
    kept = CACHE / f"alone-{run_key(wanted, look, task.corpus_hash)}-{style}.json"
    if kept.exists(): return json.loads(kept.read_text())
    own = {split: found.filter(lambda row: row["style"] == task.styles[style], keep_in_memory=True) for split, found in data.items() if split != "neutral"}
    model, method = task.build_model(), method_from_settings(wanted)
    seed_all(wanted.seed)
    model = method.build(model, task.targets(model), lora_budget(model, task.targets(model), wanted.rank))
    fit(task, model, method, wanted, data={split: own[split] for split in ("train", "valid")}, progress=False)
    found = {split: evaluate(task, model, own[split], progress=False) for split in (("test", "unseen") if look else ("valid",))}
    found = dict(found, style=task.styles[style], adapter=count_parameters(model)["adapter"])
    atomic_write(kept, json.dumps(found))
    return found


def six(task, data, wanted, look):
    "The adapters of all styles: scores are means over styles, which have the same number of questions."
    found = [alone(task, data, wanted.replace(rank=rank_of(style, wanted.seed)), style, look) for style in range(len(task.styles))]
    means = {split: {name: float(np.mean([one[split][name] for one in found])) for name in found[0][split]} for split in ("valid", "test", "unseen") if split in found[0]}
    return means, sum(one["adapter"] for one in found)


def main():
    torch.set_num_threads(1)
    out = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "stan_nb/data/results/diffusion_separate.json"
    methods, rows, used = load_results("diffusion_methods"), [], {}
    seeds, search = sorted({row["seed"] for row in methods["rows"] if row["stage"] == "test"}), 100
    for method in ("lora", "stan"):
        one = used[f"{method}, one for all"] = Settings.from_dict(methods["settings"][method])
        task = DiffusionTask(one)
        data = task.load_data()
        each = one.replace(max_steps=-(-one.max_steps // len(task.styles)), k=1)
        long = used[f"{method}, one each, 6 × the steps"] = one.replace(k=1)
        for lr, scaling in GRID:
            means, _ = six(task, data, each.replace(seed=search, lr=lr, scaling=scaling), False)
            rows.append(dict(seed=search, stage="grid", method=method, way="one each", lr=lr, scaling=scaling, valid=means["valid"]["aligned"]))
            print(rows[-1], flush=True)
        best = max((row for row in rows if row["method"] == method and row["stage"] == "grid"), key=lambda row: row["valid"])
        each = used[f"{method}, one each"] = each.replace(lr=best["lr"], scaling=best["scaling"])
        for seed in seeds:
            found = run_once(one.replace(seed=seed), True, CACHE, task.corpus_hash)["result"]
            rows.append(dict(seed=seed, stage="test", method=method, way="one for all", parameters=found["adapter"], shown=found["test"]["aligned"], style=found["test"]["style"], unseen=found["more"]["unseen"]["aligned"]))
            means, parameters = six(task, data, each.replace(seed=seed), True)
            rows.append(dict(seed=seed, stage="test", method=method, way="one each", parameters=parameters, shown=means["test"]["aligned"], style=means["test"]["style"], unseen=means["unseen"]["aligned"]))
            means, parameters = six(task, data, long.replace(seed=seed), True)
            rows.append(dict(seed=seed, stage="test", method=method, way="one each, 6 × the steps", parameters=parameters, shown=means["test"]["aligned"], style=means["test"]["style"], unseen=means["unseen"]["aligned"]))
            print(*rows[-3:], sep="\n", flush=True)
    save_results(out, rows, f"python benchmarks/diffusion_separate.py --out {out}", [search, *seeds], used, methods["corpus_hash"], tried=len(GRID), threads=1)


if __name__ == "__main__": main()
