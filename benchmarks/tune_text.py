"""The same search for every method on the embedded text task: learning rate x scaling, then the head's learning rate, then more seeds.

Scored on the valid split (cut from train by module); the test split is never touched.
Resumable: what stands in the results file is not run again.

    python benchmarks/tune_text.py                 # about 20 minutes of two cores; stop and start it as you like
    python benchmarks/tune_text.py --minutes 10    # stop after the run that passes 10 minutes
"""
import argparse, time
from datasets import DatasetDict
from pathlib import Path
import torch
from stan_nb.methods import lora_budget, method_from_settings
from stan_nb.runs import load_results, save_results
from stan_nb.settings import settings
from stan_nb.text import TextTask
from stan_nb.train import fit, seed_all

OUT = Path(__file__).parent.parent/"stan_nb"/"data"/"results"/"text_tuning.json"
VARIANTS = {"lora": dict(method="lora"), "stan k=4": dict(method="stan", k=4), "stan k=8": dict(method="stan", k=8)}
GRID = {1.: (2e-3, 1e-3, 4e-3), 4.: (2e-3, 1e-3, 5e-4), 16.: (1e-3, 5e-4, 2.5e-4)} # scaling: learning rates; a larger scale wants a smaller rate
HEAD_RATES, SEEDS = (2e-3, 2e-2), (100, 101) # not those of the demo
GRID_HEAD_RATE = 1e-2 # while lr and scaling are searched
KEYS = ("stage", "variant", "lr", "scaling", "head_lr", "seed")


def grid():
    "Stage 1: learning rate x scaling, and the head alone."
    for lrs in zip(*GRID.values()):
        for scaling, lr in zip(GRID, lrs):
            for variant in VARIANTS: yield dict(stage="grid", variant=variant, lr=lr, scaling=scaling, head_lr=GRID_HEAD_RATE, seed=SEEDS[0])
    for lr in (*HEAD_RATES, GRID_HEAD_RATE): yield dict(stage="grid", variant="head", lr=lr, scaling=1., head_lr=lr, seed=SEEDS[0])


def ranked(rows, variant):
    "The variant's configurations that were run with the first seed, best first; equal scores: the smaller rate."
    own = [row for row in rows if row["variant"] == variant and row["seed"] == SEEDS[0]]
    return sorted(own, key=lambda row: (-row["accuracy"], row["lr"], row["scaling"]))


def refine(rows):
    "Stage 2: the head's learning rate at the best of stage 1. Stage 3: the two best of each variant with another seed."
    for variant in VARIANTS:
        best = ranked([row for row in rows if row["stage"] == "grid"], variant)[0]
        for rate in HEAD_RATES: yield {key: best[key] for key in KEYS} | dict(stage="head", head_lr=rate)
    for seed in SEEDS[1:]:
        for variant in VARIANTS:
            for row in ranked([row for row in rows if row["stage"] != "seeds"], variant)[:2]:
                yield {key: row[key] for key in KEYS} | dict(stage="seeds", seed=seed)


def run_one(config):
    "Train one configuration; its scores on valid."
    method = VARIANTS.get(config["variant"], dict(method="head"))
    chosen = settings("text", **method, **{key: config[key] for key in ("lr", "scaling", "head_lr", "seed")})
    task = TextTask(chosen)
    data = task.load_data()
    data = DatasetDict(train=data["train"], valid=data["valid"], test=data["valid"].select(range(64)))   # not the real test split
    model, method = task.build_model(), method_from_settings(chosen)
    targets, head = task.targets(model), task.head(model)
    seed_all(chosen.seed)
    model = method.build(model, targets, lora_budget(model, targets, chosen.rank, head), head)
    try: found = fit(task, model, method, chosen, data=data, progress=False)
    except FloatingPointError as error: return dict(accuracy=.5, diverged=str(error), corpus_hash=task.corpus_hash)
    more = {key: found[key] for key in ("trainable", "steps", "seconds")}
    return dict(accuracy=found["valid"]["accuracy"], corpus_hash=task.corpus_hash) | more


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=600, help="stop after the run that passes this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, start = load_results(args.out)["rows"] if args.out.exists() else [], time.time()
    for plan in (lambda: grid(), lambda: refine(rows)):
        for config in list(plan()):
            if any(all(row[key] == config[key] for key in KEYS) for row in rows): continue
            rows.append(config | run_one(config))
            save_results(args.out, rows, "python benchmarks/tune_text.py", list(SEEDS), settings("text").to_dict(), rows[-1]["corpus_hash"],
                         split="valid", tried={name: sum(row["variant"] == name for row in rows) for name in (*VARIANTS, "head")})
            print(config | dict(accuracy=round(rows[-1]["accuracy"], 4), seconds=rows[-1].get("seconds")), flush=True)
            if time.time() - start > 60 * args.minutes: return


if __name__ == "__main__": main()
