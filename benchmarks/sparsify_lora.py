"""From LoRA to a quarter of the latents: what it costs in exact match, over seeds, with the fine-tune chosen on validation rows.

    python benchmarks/sparsify_lora.py --out stan_nb/data/results/math_code_words_sparsify.json

Takes the LoRA that was tuned for the word problems (stan_nb/data/results/math_code_words.json) and its seeds; LoRA runs that are in runs/cache are not run twice.
The fine-tune's learning rate is chosen with another seed. `stan-nb verify` passes over the file: its rows are no plain runs. Each fine-tune has a control: the same steps with all latents active.
"""
import sys, tempfile
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel

from stan_nb.hooks import record
from stan_nb.math_code import MathCodeTask
from stan_nb.methods import method_from_settings
from stan_nb.peft import from_lora, set_k
from stan_nb.protocol import run_key, run_once
from stan_nb.runs import load_results, save_results
from stan_nb.settings import Settings
from stan_nb.task import predict_rows
from stan_nb.train import fit

CACHE, K, STEPS, TUNED_ON, RATES = Path("runs/cache"), 2, 75, 100, (3., 1., .3, .1) # half of LoRA's 150 steps; rates as a share of LoRA's


def dead_share(task, model, rows):
    "Share of all latents that fire on fewer than one in a hundred of these tokens."
    batch = task.prompts([row["prompt"] + row["answer"] for row in rows])
    with record(model) as kept, torch.no_grad(): model(**batch)
    real, dead = batch["attention_mask"].flatten().bool(), []
    for values, indices in (calls[-1] for calls in kept.values()):
        fires = torch.zeros(real.numel(), 8).scatter(1, indices.flatten(0, -2), (values.flatten(0, -2) != 0).float())[real]
        dead += (fires.mean(0) < .01).tolist()
    return fmean(dead)


def main():
    torch.set_num_threads(1)
    out = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "stan_nb/data/results/math_code_words_sparsify.json"
    words = load_results("math_code_words")
    lora = Settings.from_dict(words["settings"]["lora"])
    seeds = sorted({row["seed"] for row in words["rows"] if row["stage"] == "test"})
    task = MathCodeTask(lora)
    data, rows = task.load_data(), []

    def tuned(adapter, k, seed, rate, scored):
        "Fine-tune the imported LoRA while k falls to `k` over the first half of the steps; its scores."
        wanted = lora.replace(method="stan", k=k, anneal=.5 if k < lora.rank else 0., lr=rate * lora.lr, max_steps=STEPS, seed=seed)
        model, method = PeftModel.from_pretrained(task.build_model(), str(adapter), is_trainable=True), method_from_settings(wanted)
        fit(task, model, method, wanted, data={split: data[split] for split in ("train", "valid")}, progress=False)
        return score(set_k(model, k), scored), dead_share(task, model, [data["valid"][i] for i in range(50)])

    def score(model, split): return task.metrics(predict_rows(task, model.eval(), data[split], progress=False), task.references(data[split]))["exact_match"]
    def note(**row):
        rows.append(row)
        print(row, flush=True)

    def imported(seed, into):
        "A LoRA of this seed as a STAN adapter with every latent active."
        wanted = lora.replace(seed=seed)
        run_once(wanted, True, CACHE, words["corpus_hash"])
        from_lora(CACHE/run_key(wanted, True, words["corpus_hash"])/"adapter", into)
        return into

    with tempfile.TemporaryDirectory() as folder:
        adapter = imported(TUNED_ON, Path(folder)/"tuned")
        for k in (K, lora.rank):
            for rate in RATES: note(stage="grid", variant=f"k = {k}", rate=rate, seed=TUNED_ON, exact_match=tuned(adapter, k, TUNED_ON, rate, "valid")[0])
        best = {k: max((row for row in rows if row["variant"] == f"k = {k}"), key=lambda row: row["exact_match"])["rate"] for k in (K, lora.rank)}
        for seed in seeds:
            adapter = imported(seed, Path(folder)/str(seed))
            model = PeftModel.from_pretrained(task.build_model(), str(adapter))
            note(stage="test", variant="LoRA", seed=seed, exact_match=score(model, "test"))
            note(stage="test", variant=f"k = {K}, not trained", seed=seed, exact_match=score(set_k(model, K), "test"))
            for k in (K, lora.rank):
                found, dead = tuned(adapter, k, seed, best[k], "test")
                note(stage="test", variant=f"k = {k}", rate=best[k], seed=seed, exact_match=found, dead=dead)
    save_results(out, rows, f"python benchmarks/sparsify_lora.py --out {out}", [TUNED_ON, *seeds], lora, words["corpus_hash"], against="LoRA",
                 tuned={f"k = {k}": dict(rate=rate) for k, rate in best.items()}, threads=1, steps=STEPS)


if __name__ == "__main__": main()
