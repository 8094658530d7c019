"""What `51_efficiency` shows: ways to adapt a model beside each other, what changes with the sizes, and how fast this machine is at all.

    python benchmarks/efficiency.py          # about 10 minutes on a quiet machine; writes stan_nb/data/results/efficiency.json
    python benchmarks/efficiency.py --tables machine sweep        # these anew, the rest of the file stays as it is

One thread, CPU time with wall time beside it, in turns, rotating inputs, glibc's malloc thresholds raised (see benchmarks/cpu.py, which also has the
default ones). "no adapter" lets gradients pass through and learns nothing: no adapter can be faster. "LoRA in place" is the control: LoRA's products
without PEFT's temporaries. Peak memory is that of a process that does nothing else,
above what it held with the model built.
"""
import argparse, itertools, os, re, subprocess, sys, time, warnings
from pathlib import Path
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import peft
import torch
import torch.nn.functional as F
from cpu import RAISED, TURNS, encoder, llama
from stan_nb import kernels
from stan_nb.measure import compare_speed, efficiency_table
from stan_nb.methods import get_method, lora_budget
from stan_nb.peft import StanConfig
from stan_nb.runs import commit, load_results, save_results
from stan_nb.topk import sparse_adapt

OUT = HERE.parent/"stan_nb"/"data"/"results"/"efficiency.json"
RANK, K, WIDE, WIDE_K = 16, 4, 1536, 32
BASES = {"MiniLM": encoder, "Llama, width 512": llama}
SAME_WORK = (WIDE + 5 * WIDE_K) // 6                          # the rank at which LoRA's training step has as many multiply-adds: 6 r = m + 5 k


def passed(model, targets):
    "No adapter: gradients pass through the model as they would with one, and nothing is learned."
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    return model


def stan(m, k): return lambda model, targets: peft.get_peft_model(model, StanConfig(num_latents=m, k=k, alpha=2 * k, target_modules=targets, init_weights=False))


def lora(r, **more): return lambda model, targets: peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **more))


def narrow():
    "name -> how to build it, at the parameters of LoRA with rank 16."
    return {"LoRA (PEFT)": lora(RANK), "no adapter": passed, "LoRA in place": stan(RANK, RANK), "STAN": stan(RANK, K), "DoRA": lora(RANK, use_dora=True),
            "AdaLoRA": lambda model, targets: get_method("adalora").build(model, targets, lora_budget(model, targets, RANK))}


def wide():
    "A dictionary of 1,536 latents, and LoRA with as many parameters and with as many multiply-adds."
    return {"LoRA, same parameters": lora(WIDE), "no adapter": passed, "LoRA, same multiply-adds": lora(SAME_WORK), "LoRA in place, same parameters": stan(WIDE, WIDE),
            "STAN wide": stan(WIDE, WIDE_K)}


def build(make, how):
    torch.manual_seed(0)
    model, targets, words = make()
    return how(model.requires_grad_(False), targets), words


def loss(out): return (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean()


def model_rows(rounds):
    for name, make in BASES.items():
        for regime, methods in (("narrow", narrow()), ("wide", wide())):
            models = {method: build(make, how)[0] for method, how in methods.items()}
            batches = [dict(input_ids=torch.randint(0, 2000, (16, 64))) for _ in range(TURNS)]
            for row in efficiency_table(models, batches, loss, tokens=1024, rounds=max(5, rounds - 2)): yield dict(base=name, regime=regime) | row


def peak_rows(rounds):
    "Each in a process of its own."
    for name, (regime, methods) in itertools.product(BASES, (("narrow", narrow()), ("wide", wide()))):
        for method in methods:
            done = subprocess.run([sys.executable, __file__, "--peak", name, regime, method], capture_output=True, text=True, check=True)
            yield dict(base=name, regime=regime, model=method, peak_mib=float(done.stdout))


def resident(what):
    "VmRSS (now) or VmHWM (highest) of this process in MiB. getrusage would count the memory of the process that started this one, too."
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak(name, regime, method):
    "Print the highest resident memory of two training steps, in MiB above what it was with the model built."
    model, words = build(BASES[name], {"narrow": narrow, "wide": wide}[regime]()[method])
    Path("/proc/self/clear_refs").write_text("5")            # forget the highest so far
    before = resident("VmRSS")
    for _ in range(2):
        loss(model.train()(input_ids=torch.randint(0, words, (16, 64)))).backward()
        model.zero_grad()
    print(resident("VmHWM") - before)


# how it changes with the sizes

def adapter_times(d, n, m, k, rounds):
    "{forward, forward + backward: rows of `compare_speed`} for the adapter alone, milliseconds of one call."
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
    times = {"forward": compare_speed({name: forward(f) for name, (f, p) in ways.items()}, rounds), "forward + backward": compare_speed({name: both(f, p) for name, (f, p) in ways.items()}, rounds)}
    return {what: [row | {clock: row[clock] / many for clock in ("ms", "wall_ms")} for row in rows] for what, rows in times.items()}


def sweep_rows(rounds):
    d, n, m, k = 768, 1024, 64, 8
    plans = {"latents": [(d, n, m, k) for m in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)], "both": [(d, n, m, m // 8) for m in (8, 16, 32, 64, 128, 256, 512, 1024, 2048)], "k": [(d, n, m, k) for k in (1, 2, 4, 8, 16, 32, 48)],
             "tokens": [(d, n, m, k) for n in (1, 4, 16, 64, 256, 1024, 4096)], "width": [(d, n, m, k) for d in (128, 256, 512, 1024, 2048)]}
    for along, points in plans.items():
        for point in points:
            for what, rows in adapter_times(*point, rounds).items():
                for row in rows: yield dict(along=along, what=what) | dict(zip(("d", "n", "m", "k"), point)) | {name: row[name] for name in ("name", "ms", "wall_ms", "ratio", "low", "high")}


def machine_rows(rounds):
    "What this machine gets through in a second of one thread: dense and sparse multiply-adds, latents to choose from, bytes; and the seconds that calls with next to no work take."
    n, d, m, k = 1024, 768, 64, 8
    xs, zs = (itertools.cycle([torch.randn(*shape) for _ in range(TURNS)]) for shape in ((n, d), (n, m)))
    E, out, z = torch.randn(m, d), torch.randn(n, d), next(zs)
    indices = kernels.choose(z, k, "abs")
    values = z.gather(1, indices.long())
    tiny, A, few = torch.randn(1, 16), torch.randn(8, 16), range(100)
    def stan():
        with torch.no_grad():
            for _ in few: sparse_adapt(tiny, A, A, 2, 2., out=tiny.clone(), inplace=True)
    def lora():
        with torch.no_grad():
            for _ in few: tiny + F.linear(F.linear(tiny, A), A.T) * 2.
    calls = {"dense": lambda: torch.mm(next(xs), E.T), "sparse": lambda: kernels._add_product(out, kernels._starts(n, k), indices.view(-1), values.view(-1), E),
             "select": lambda: kernels.choose(next(zs), k, "abs"), "copy": lambda: out.copy_(next(xs)), "stan": stan, "lora": lora}
    s = {row["name"]: row["ms"] / 1000 for row in compare_speed(calls, 41)}
    yield dict(dense=n * d * m / s["dense"], sparse=n * d * k / s["sparse"], select=n * m / s["select"], bytes=8 * n * d / s["copy"],
                stan_call=s["stan"] / len(few), lora_call=s["lora"] / len(few))


TABLES = dict(machine=machine_rows, sweep=sweep_rows, peak=peak_rows, models=model_rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in RAISED.items()):
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | RAISED).returncode)  # glibc reads them when a process starts
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.peak: return peak(*args.peak)
    rows, made = [], {}
    if len(args.tables) < len(TABLES):
        former = load_results(args.out)
        rows, made = [row for row in former["rows"] if row["table"] not in args.tables], {table: how for table, how in former["made"].items() if table not in args.tables}
    for table in args.tables:
        start = time.time()
        rows += [dict(table=table, seed=0) | row for row in TABLES[table](args.rounds)]
        made[table] = dict(commit=commit(), seconds=round(time.time() - start))
        print(table, made[table], flush=True)
    save_results(args.out, rows, "python benchmarks/efficiency.py --out stan_nb/data/results/efficiency.json", [0],
                 dict(threads=1, rounds=args.rounds, raised=RAISED, rank=RANK, k=K, wide=WIDE, wide_k=WIDE_K, same_work=SAME_WORK, batch=[16, 64]), made=made)


if __name__ == "__main__": main()
