"""What `51_efficiency` shows: ways to adapt a model beside each other, what changes with the sizes, and how fast this machine is at all.

    python benchmarks/efficiency.py          # about 10 minutes; writes stan_nb/data/results/efficiency.json

One thread, CPU time, in turns, rotating inputs, glibc's malloc thresholds raised (see benchmarks/cpu.py, which also has the default ones).
"""
import argparse, copy, itertools, os, resource, subprocess, sys, time, warnings
from pathlib import Path
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import torch
import torch.nn.functional as F
from torch import nn
from cpu import RAISED, TURNS, adapted, encoder, llama
from stan_nb import kernels
from stan_nb.measure import compare_speed, efficiency_table
from stan_nb.methods import get_method, lora_budget
from stan_nb.runs import save_results
from stan_nb.topk import sparse_adapt

OUT = HERE.parent/"stan_nb"/"data"/"results"/"efficiency.json"
RANK, K, WIDE, WIDE_K = 16, 4, 1536, 32
SAME_WORK = (WIDE + 5 * WIDE_K) // 6                          # the rank at which LoRA's training step has as many multiply-adds: 6 r = m + 5 k


def narrow():
    "name -> how to build it, at the parameters of LoRA with rank 16."
    import peft
    from stan_nb.peft import StanConfig
    stan = lambda m, k: lambda model, targets: peft.get_peft_model(model, StanConfig(num_latents=m, k=k, alpha=2 * k, target_modules=targets, init_weights=False))
    lora = lambda r, **more: lambda model, targets: peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **more))
    return {"LoRA (PEFT)": lora(RANK), "frozen": lambda model, targets: model, "LoRA in place": stan(RANK, RANK), "STAN": stan(RANK, K), "DoRA": lora(RANK, use_dora=True),
            "AdaLoRA": lambda model, targets: get_method("adalora").build(model, targets, lora_budget(model, targets, RANK))}


def wide():
    "A dictionary of 1,536 latents, and LoRA with as many parameters and with as many multiply-adds."
    import peft
    from stan_nb.peft import StanConfig
    lora = lambda r: lambda model, targets: peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets))
    return {"LoRA, same parameters": lora(WIDE), "frozen": lambda model, targets: model, "LoRA, same multiply-adds": lora(SAME_WORK),
            "STAN wide": lambda model, targets: peft.get_peft_model(model, StanConfig(num_latents=WIDE, k=WIDE_K, alpha=2 * WIDE_K, target_modules=targets, init_weights=False))}


def build(make, how):
    torch.manual_seed(0)
    model, targets, words = make()
    return how(model.requires_grad_(False), targets), words


def loss(out): return (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean()


def model_rows(rounds):
    for name, make in (("MiniLM", encoder), ("Llama, width 512", llama)):
        for regime, methods in (("narrow", narrow()), ("wide", wide())):
            models = {method: build(make, how)[0] for method, how in methods.items()}
            batch = dict(input_ids=torch.randint(0, 2000, (16, 64)))
            for row in efficiency_table(models, batch, loss, tokens=1024, rounds=rounds):
                peak = subprocess.run([sys.executable, __file__, "--peak", name, regime, row["model"]], capture_output=True, text=True, check=True).stdout
                yield dict(table="models", base=name, regime=regime) | row | dict(peak_mib=float(peak))


def peak(name, regime, method):
    "Resident memory of a process that does nothing but train this, at its highest: MiB above what it was with the model built."
    model, words = build(dict(zip(("MiniLM", "Llama, width 512"), (encoder, llama)))[name], {"narrow": narrow, "wide": wide}[regime]()[method])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for _ in range(3):
        out = loss(model.train()(input_ids=torch.randint(0, words, (16, 64))))
        if out.requires_grad: out.backward()
        model.zero_grad()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)


# how it changes with the sizes

def adapter_ratio(d, n, m, k, rounds):
    "{what: {name: ratio to PEFT's LoRA}} of the adapter alone."
    xs = itertools.cycle([(torch.randn(n, d).requires_grad_(), torch.randn(n, d)) for _ in range(TURNS)])
    A, B = (torch.randn(m, d) / d**.5).requires_grad_(), (torch.randn(d, m) / d**.5).requires_grad_()
    Bt, G, many = B.detach().T.contiguous().requires_grad_(), torch.randn(n, d), max(1, 64 // n)
    ways = {"PEFT LoRA": (lambda x, out: out + F.linear(F.linear(x, A), B) * 2., (A, B)), "LoRA in place": (lambda x, out: sparse_adapt(x, A, Bt, m, 2., out=out, inplace=True), (A, Bt)),
            "STAN": (lambda x, out: sparse_adapt(x, A, Bt, k, 2., out=out, inplace=True), (A, Bt))}
    def forward(f):
        def call():
            with torch.no_grad():
                for _ in range(many): f(*next(xs))
        return call
    def both(f, parameters):
        def call():
            for _ in range(many):
                x, out = next(xs)
                torch.autograd.grad(f(x, out), (x, *parameters), G)
        return call
    return {"forward": compare_speed({name: forward(f) for name, (f, p) in ways.items()}, rounds), "forward + backward": compare_speed({name: both(f, p) for name, (f, p) in ways.items()}, rounds)}


def sweep_rows(rounds):
    d, n, m, k = 768, 1024, 64, 8
    plans = {"latents": [(d, n, m, max(1, m // 8)) for m in (8, 16, 32, 64, 128, 256, 512, 1024, 2048)], "k": [(d, n, m, k) for k in (1, 2, 4, 8, 16, 32, 48)],
             "tokens": [(d, n, m, k) for n in (1, 4, 16, 64, 256, 1024, 4096)], "width": [(d, n, m, k) for d in (128, 256, 512, 1024, 2048)]}
    for along, points in plans.items():
        for point in points:
            for what, rows in adapter_ratio(*point, rounds).items():
                for row in rows: yield dict(table="sweep", along=along, what=what) | dict(zip(("d", "n", "m", "k"), point)) | {name: row[name] for name in ("name", "ms", "ratio", "low", "high")}


def machine_row():
    "Multiply-adds and bytes that this machine gets through, in a second of one thread."
    n, d, m, k = 2048, 768, 64, 8
    x, E, out, z = torch.randn(n, d), torch.randn(m, d), torch.randn(n, d), torch.randn(n, m)
    indices = kernels.choose(z, k, "abs")
    values = z.gather(1, indices.long())
    calls = {"dense": lambda: torch.mm(x, E.T), "sparse": lambda: kernels._add_product(out, kernels._starts(n, k), indices.view(-1), values.view(-1), E), "copy": lambda: out.copy_(x)}
    ms = {row["name"]: row["ms"] for row in compare_speed(calls, 21)}
    return dict(table="machine", dense=n * d * m / ms["dense"] * 1000, sparse=n * d * k / ms["sparse"] * 1000, bytes=8 * n * d / ms["copy"] * 1000)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in RAISED.items()):
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | RAISED).returncode)  # glibc reads them when a process starts
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.peak: return peak(*args.peak)
    start, rows = time.time(), [machine_row()]
    for part in (model_rows, sweep_rows):
        rows += part(args.rounds)
        print(f"{part.__name__}: {time.time() - start:.0f} s", flush=True)
    save_results(args.out, [row | dict(seed=0) for row in rows], "python benchmarks/efficiency.py", [0],
                 dict(threads=1, rounds=args.rounds, raised=RAISED, rank=RANK, k=K, wide=WIDE, wide_k=WIDE_K, same_work=SAME_WORK, batch=[16, 64]), seconds=round(time.time() - start))


if __name__ == "__main__": main()
