"""Check every Triton kernel on a GPU, then time STAN beside LoRA: one command, under 8 minutes on an H100-class card.

    python benchmarks/gpu.py             # writes benchmarks/results/<device>.json
    python benchmarks/gpu.py --dry       # the same code on tiny tensors without a GPU (TRITON_INTERPRET=1): does the script run?

Checks: the sets, values and gradients of every path against the formula in float64, for float32, float16 and bfloat16, eager, compiled, under
autocast, with deterministic algorithms on and off. Times: CUDA events, medians over rotating inputs, taken in turns; "floor" is what reading and
writing the bytes that must move takes at the memory bandwidth that a copy reaches on this card. "LoRA in place" is the control: LoRA's products added in place.
"""
import argparse, itertools, os, re, statistics, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from stan_nb import kernels
from stan_nb.runs import save_results
from stan_nb.settings import Table
from stan_nb.topk import SELECTS, set_backend, sparse_adapt, topk_indices

HERE = Path(__file__).parent


# checks

def judge(x, E, D, b, k, select, out, G):
    "In float64, for the sets that the pre-activations in x's dtype choose."
    indices = topk_indices(F.linear(x, E, b), k, select)
    x, E, D, b, out = inputs = [t.detach().double().requires_grad_() for t in (x, E, D, b, out)]
    values = F.linear(x, E, b).gather(-1, indices)
    if select == "relu": values = values.relu()
    y = out + .7 * torch.zeros(len(x), len(E), dtype=torch.float64, device=x.device).scatter(-1, indices, values) @ D
    return y, torch.autograd.grad(y, inputs, G.double()), indices


def check(n, m, k, d, dtype, select, device, run):
    "Largest error of result and gradients, relative to the largest entry, over the tokens whose set is not on the edge of rounding."
    new = lambda *s: torch.randn(*s, device=device)
    x, E, D, b, out, G = new(n, d), new(m, d) / d**.5, new(m, d), new(m) / 9, new(n, d), new(n, d)
    x, E, b = x.round(), (E * 8).round() / 8, (b * 8).round() / 8          # sums of few small integers are exact in every order and dtype
    x, E, D, b, out, G = (t.to(dtype) for t in (x, E, D, b, out, G))
    expected, grads, _ = judge(x, E, D, b, k, select, out, G)
    inputs = [t.requires_grad_() for t in (x, E, D, b, out)]
    y = run(x, E, D, k, .7, select, b, out)
    errors = []
    for got, want in zip((y, *torch.autograd.grad(y, inputs, G)), (expected, *grads)):
        errors.append(((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-9)).item())
    return max(errors)


def checks(device, sizes):
    limit = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
    halves = (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float16,)
    compiled = torch.compile(sparse_adapt, dynamic=True) if device == "cuda" else None
    rows = []
    for (n, m, k, d), dtype, select, mode in itertools.product(sizes, (torch.float32, *halves), SELECTS, ("eager", "compiled", "deterministic")):
        if (mode == "compiled" and (compiled is None or select != "abs")) or (mode == "deterministic" and select != "abs"): continue
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(mode == "deterministic", warn_only=True)
        with set_backend("triton"): error = check(n, m, k, d, dtype, select, device, compiled if mode == "compiled" else sparse_adapt)
        torch.use_deterministic_algorithms(False)
        rows.append(dict(what="check", shape=f"n={n} m={m} k={k} d={d}", how=f"{str(dtype)[6:]} {select} {mode}", error=error, ok=error < limit[dtype]))
    return rows


# times

def timed(call, device):
    "Seconds of one call on the device."
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def compare(calls, device, rounds, many=1):
    "{name: (median seconds, [ratios to the first])}, taken in turns."
    times = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            seconds = timed(lambda: [calls[name]() for _ in range(many)], device) / many
            if number >= 2: times[name].append(seconds)
    first = next(iter(times.values()))
    return {name: (statistics.median(t), sorted(a / b for a, b in zip(t, first))) for name, t in times.items()}


def bandwidth(device):
    "Bytes a second that a large copy reaches, read and written."
    a = torch.empty(1 << 28 if device == "cuda" else 1 << 16, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(timed(lambda: b.copy_(a), device) for _ in range(10))


def floor_bytes(n, m, k, d, size, training):
    "What must move at least: x read, the output read and written, the adapter read; in training also G, x again, the input's gradient, and the adapter's."
    forward = n * d * size * 3 + min(m, n * k) * d * size + m * d * size
    return forward + (n * d * size * 3 + 4 * m * d * size if training else 0)


def times(device, sizes, rounds):
    speed, dtype = bandwidth(device), torch.bfloat16 if device == "cuda" else torch.float16
    for n, m, k, d in sizes:
        new = lambda *s: torch.randn(*s, device=device).to(dtype)
        xs = itertools.cycle([(new(n, d).requires_grad_(), new(n, d)) for _ in range(4)])
        A, B, G = (new(m, d) / d**.5).requires_grad_(), (new(d, m) / d**.5).requires_grad_(), new(n, d)
        Bt = B.detach().T.contiguous().requires_grad_()
        lora = lambda x, out: out + F.linear(F.linear(x, A), B) * 2.
        fused = lambda x, out: sparse_adapt(x, A, Bt, m, 2., out=out, inplace=True)     # all latents kept: that is LoRA
        stan = lambda x, out: sparse_adapt(x, A, Bt, k, 2., out=out, inplace=True)
        def forward(f):
            def call():
                with torch.no_grad(): f(*next(xs))
            return call
        def step(f, parameters):
            def call():
                x, out = next(xs)
                torch.autograd.grad(f(x, out), (x, *parameters), G)
            return call
        passes = {"forward": {"PEFT LoRA": forward(lora), "LoRA in place": forward(fused), "STAN": forward(stan)}}
        if n > 1: passes["training step"] = {"PEFT LoRA": step(lora, (A, B)), "LoRA in place": step(fused, (A, Bt)), "STAN": step(stan, (A, Bt))}
        for what, calls in passes.items():
            with set_backend("triton"): found = compare(calls, device, rounds, 10 if n == 1 else 1)
            floor = floor_bytes(n, m, k, d, dtype.itemsize, what != "forward") / speed
            for name, (seconds, ratios) in found.items():
                yield dict(what=what, shape=f"N={n} d={d} ({m}, {k})", how=name, ms=1000 * seconds, ratio=statistics.median(ratios), low=ratios[len(ratios) // 4],
                           high=ratios[3 * len(ratios) // 4], floor_ms=1000 * floor, floors=seconds / floor)


def parts(device, sizes, rounds):
    "The ways that the dispatcher has to choose from, alone: what decides its thresholds."
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    for n, m, k, d in sizes:
        new = lambda *s: torch.randn(*s, device=device).to(dtype)
        x, E, D, y = new(n, d), new(m, d) / d**.5, new(m, d) / d**.5, new(n, d)
        kernels._load_triton()
        values, indices, kept = kernels._triton_select(x, E, None, k, "abs", True, False)
        calls = {"cuBLAS, then select": lambda: kernels._triton_select(x, E, None, k, "abs", False, False), "fused encode + select": lambda: kernels._triton_select(x, E, None, k, "abs", False, True),
                 "write: dense product": lambda: y.addmm_(kept, D), "write: gather": lambda: kernels._triton_write(y, values, indices, D, 1., True),
                 "gradients: dense": lambda: kernels._dense_gradients(y, x, E, D, values, indices, 1., False, (True, True, True)),
                 "gradients: gather": lambda: kernels._gathered_gradients(y, x, E, D, values, indices, 1., False, (True, True, True))}
        for name, (seconds, ratios) in compare(calls, device, rounds).items():
            yield dict(what="part", shape=f"N={n} d={d} ({m}, {k})", how=name, ms=1000 * seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny tensors, no GPU")
    parser.add_argument("--out", type=Path, default=HERE/"results")
    args = parser.parse_args()
    if args.dry and os.environ.get("TRITON_INTERPRET") != "1": sys.exit("--dry needs TRITON_INTERPRET=1 in the environment")
    if not args.dry and not torch.cuda.is_available(): sys.exit("there is no CUDA device here; --dry only shows that the script runs")
    device, start = "cpu" if args.dry else "cuda", time.time()
    tested = [(64, 16, 2, 16), (2, 130, 1, 16)] if args.dry else [(1, 64, 8, 256), (70, 16, 4, 512), (512, 64, 8, 512), (200, 256, 16, 256), (300, 1024, 4, 256), (100, 8192, 32, 128)]
    shapes = [(1, 16, 2, 16), (64, 16, 2, 16)] if args.dry else [(4096, 64, 8, 4096), (4096, 1024, 32, 4096), (4096, 16384, 32, 4096), (1, 64, 8, 4096), (1, 1024, 32, 4096)]
    rows = checks(device, tested)
    print(f"{sum(r['ok'] for r in rows)} of {len(rows)} checks passed, largest error {max(r['error'] for r in rows):.1e}", flush=True)
    failed = [r for r in rows if not r["ok"]]
    for r in failed: print("FAILED", r)
    measured = [*times(device, shapes, 1 if args.dry else 21), *parts(device, shapes[-1:] if args.dry else [s for s in shapes if s[0] > 1], 1 if args.dry else 11)]
    for what in ("forward", "training step", "part"): print(f"\n{what}\n{Table({n: v for n, v in r.items() if n != 'what'} for r in measured if r['what'] == what)}")
    name = "dry" if args.dry else re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    args.out.mkdir(parents=True, exist_ok=True)
    save_results(args.out/f"{name}.json", [r | dict(seed=0) for r in rows + measured], "python benchmarks/gpu.py" + " --dry" * args.dry, [0], {}, seconds=round(time.time() - start),
                 gpu=None if args.dry else torch.cuda.get_device_name())
    print(f"\n{time.time() - start:.0f} s; results in {args.out/f'{name}.json'}")
    if failed: sys.exit(f"{len(failed)} checks failed")


if __name__ == "__main__": main()
