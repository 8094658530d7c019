"""What it takes to collect the latents of a million tokens and to page through them: time and memory, for `40_latents`.

    python benchmarks/latents.py          # a few minutes on one thread; writes stan_nb/data/results/latents_million.json

The tiny Llama with an adapter of 4,096 latents (16 active, random weights: what is measured does not depend on what it learnt) on one layer; questions of
lesson 31, over and over. Each part runs in one process, one after the other; memory is what it added to the process at its peak (the model and the data
were there before). Collecting is measured twice: as it is, and with glibc told to give large blocks back at once: the difference is memory that the allocator
keeps between the pieces of a record. "pages" makes the page of each of the 4,096 latents.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from stan_nb.assets import shipped
from stan_nb.browser import packed
from stan_nb.explorers import features
from stan_nb.hooks import find_adapters
from stan_nb.latents import collect
from stan_nb.layer import adapt
from stan_nb.runs import PeakMemory, save_results
from stan_nb.task import Task

GIVES_BACK = dict(MALLOC_MMAP_THRESHOLD_="262144", MALLOC_TRIM_THRESHOLD_="262144")
OUT = Path(__file__).parent.parent/"stan_nb"/"data"/"results"/"latents_million.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--collect-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task, _ = Task.from_run(shipped("runs/math_code-expressions"))
    model, rows, table = task.build_model(), task.load_data()["train"], []
    adapt(model, ["layers.1.mlp.down_proj"], num_latents=args.latents, k=args.k)
    layer, adapter = next(iter(find_adapters(model).items()))
    torch.nn.init.normal_(adapter.decoder, std=.02)
    each = sum(int(task.collate([rows[i]])["attention_mask"].sum()) for i in range(200)) / 200
    rows = rows.select([i % len(rows) for i in range(int(1.01 * args.tokens / each))])
    def measured(part, what):
        start, cpu = time.perf_counter(), time.process_time()
        with PeakMemory() as memory: found = what()
        table.append(dict(seed=0, part=part, seconds=round(time.process_time() - cpu, 2), wall_seconds=round(time.perf_counter() - start, 2), added_mib=round(memory.added, 1)))
        print(json.dumps(table[-1]), flush=True)
        return found
    with tempfile.TemporaryDirectory() as place:
        collect(task, model, rows.select(range(64)), Path(place)/"warm", progress=False)
        store = measured("collect, large blocks given back" if args.collect_only else "collect", lambda: collect(task, model, rows, Path(place)/"record", progress=False))
        if args.collect_only: return
        mib = sum(f.stat().st_size for f in store.path.iterdir()) / 2**20
        measured("read every file once", lambda: sum(len(values) for _, values, _ in store.chunks(layer)))
        measured("density", lambda: store.density(layer))
        measured("tops of all latents", lambda: store.tops(layer, 10))
        measured("pages of all latents", lambda: sum(1 for _ in features(store, layer, task, model, rows)))
        measured("pages, packed for the browser", lambda: sum(map(len, packed(features(store, layer, task, model, rows))[2])))
    again = [sys.executable, __file__, "--collect-only", *(f"--{name}={getattr(args, name)}" for name in ("tokens", "latents", "k"))]
    table.insert(1, json.loads(subprocess.run(again, env=os.environ | GIVES_BACK, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    save_results(args.out, table, "python benchmarks/latents.py --out stan_nb/data/results/latents_million.json", [0], dict(threads=1, num_latents=args.latents, k=args.k, chunk=1 << 16, batch_size=32), tokens=len(store), record_mib=round(mib, 1), files=len(store.sizes))


if __name__ == "__main__": main()
