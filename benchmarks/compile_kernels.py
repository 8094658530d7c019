"""Compile every Triton kernel for cards that are not here, and read from the machine code what it costs: no GPU is needed.

    python benchmarks/compile_kernels.py                 # a table, and stan_nb/data/results/kernels_compiled.json
    python benchmarks/compile_kernels.py --check         # the same checks, nothing written: what the tests run

Fails on a spill, on more shared memory than the card has, on a cubin over 200 KB, on a compilation over 10 s of CPU time, and where the bytes that the
code loads and stores are more than 5% off those that the algorithm has to move.
"""
import argparse, multiprocessing, os, re, subprocess, sys, tempfile, warnings
os.environ.pop("TRITON_INTERPRET", None)
from collections import namedtuple
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stan_nb import kernels
from stan_nb.runs import save_results
from stan_nb.settings import Table

OUT = Path(__file__).parent.parent/"stan_nb"/"data"/"results"/"kernels_compiled.json"
TOOLS = Path(triton.__file__).parent/"backends"/"nvidia"/"bin"
SHARED = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}        # bytes of shared memory a block can have (CUDA C++ Programming Guide, compute capabilities)
LIMITS = dict(cubin=200_000, seconds=10., off=.05)
Job = namedtuple("Job", "name kernel types constants warps stages trips load store cards")
D = 4096                                                     # width at which bytes are counted


def select_job(m, k, fused, dtype="bf16"):
    "One program of `_select_kernel`: its tile, and the bytes it has to load and store."
    BN, BM, BD, warps, stages = kernels._tile(4096, m, D, fused)
    size = 4 if dtype == "fp32" else 2
    types = dict(x=f"*{dtype}", encoder=f"*{dtype}", bias=f"*{dtype}", state="*i64", values=f"*{dtype}", indices="*i16", kept=f"*{dtype}",
                 n="i32", m="i32", d="i32", first="i32")
    constants = dict(LOWEST=kernels._LOWEST, HIGHEST=kernels._HIGHEST, K=k, SLOTS=kernels._power(k), ABS=True, RELU=False, BN=BN, BM=BM, BD=BD,
                     FUSED=fused, BIAS=False, KEPT=True, RESUME=False, LAST=True)
    blocks, steps = -(-m // BM), D // BD
    load = blocks * (BN + BM) * D * size if fused else BN * m * size
    return Job(f"{'encode + select' if fused else 'select'} {m}, {k}{' fp32' * (dtype == 'fp32')}", "_select_kernel", types, constants, warps, stages,
               [blocks, steps] if fused else [blocks], load, BN * k * (2 * size + 2), (80, 90) if fused else (75, 80, 90))


def jobs():
    for m, k in ((16, 4), (32, 4), (64, 8), (128, 8), (256, 16), (16384, 32)): yield select_job(m, k, True)
    for m, k in ((16, 4), (64, 8), (256, 16), (1024, 32)): yield select_job(m, k, False)
    yield select_job(64, 8, False, "fp32")
    row = dict(values="*bf16", indices="*i16", table="*bf16", n="i32", d="i32", scale="fp32")
    for k in (8, 32):
        yield Job(f"write, k = {k}", "_write_kernel", dict(y="*bf16") | row, dict(K=k, BD=1024, ADD=True), 4, 1, [k], 2 * 1024 * (k + 1) + 4 * k, 2 * 1024, (75, 80, 90))
        BD = min(512, 4096 // k)
        yield Job(f"dots, k = {k}", "_dots_kernel", dict(dz="*fp32", G="*bf16") | row, dict(K=k, SLOTS=k, BD=BD, RELU=False), 4, 1, [D // BD],
                  2 * D * (k + 1) + 2 * k, 4 * k, (75, 80, 90))
    pairs = dict(sums="*fp32", rows="*bf16", values="*bf16", latents="*i32", order="*i32", starts="*i32", pairs="i32", d="i32", scale="fp32")
    for split in (True, False):
        yield Job(f"collect, {'64 pairs' if split else 'a latent of 64'}", "_collect_kernel", pairs, dict(K=32, SEGMENT=64, BD=1024, SPLIT=split), 4, 1,
                  [64], 64 * (2 * 1024 + 10), 4 * 1024, (75, 80, 90))


def compile_job(job, card):
    "The compiled kernel and the seconds of CPU time it took, the assembler's included: they do not grow on a busy machine. Pointers, widths and counts are multiples of 16, as at run time."
    fn = triton.JITFunction(getattr(getattr(kernels, job.kernel), "fn", getattr(kernels, job.kernel)))
    types = {name: "constexpr" if name in job.constants else (t.replace("bf16", "fp16") if card < 80 else t) for name, t in job.types.items()}
    names = [p for p in fn.arg_names]
    types = {name: types.get(name, "constexpr") for name in names}
    whole = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*") or name in ("m", "d", "n")}
    start = sum(os.times()[:4])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        done = triton.compile(ASTSource(fn, types, job.constants, whole), target=GPUTarget("cuda", card, 32), options=dict(num_warps=job.warps, num_stages=job.stages))
        return done, sum(os.times()[:4]) - start


# reading PTX

def loops(lines):
    "[(first, last)] of every loop: from a label to the jump back to it; outer before inner."
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$L\w+):", line))}
    found = {}
    for i, line in enumerate(lines):
        m = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if m and labels.get(m[1], i) < i: found[labels[m[1]]] = i
    return sorted(found.items(), key=lambda span: (span[0], -span[1]))


def by_thread(lines):
    "The registers whose value depends on the thread, so that a load through them is another address in each thread."
    moves = []
    for line in lines:
        m = re.match(r"(?:@!?%\w+ )?([\w.:]+)\s+(\{[^}]*\}|[%\w|]+)\s*,(.*);", line)
        if m and not m[1].startswith("st"): moves.append((set(re.findall(r"%\w+", m[2])), set(re.findall(r"%[\w.]+", m[3]))))
    tainted, size = {"%tid.x"}, 0
    while size != len(tainted):
        size = len(tainted)
        for into, sources in moves:
            if sources & tainted: tainted |= into
    return tainted


BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


def moved(ptx, threads, trips):
    "(loaded, stored): bytes a program moves. A load through an address that is the same in all threads counts once."
    lines = [l.strip() for l in ptx.splitlines()]
    spans, tainted, total = loops(lines), by_thread(lines), dict(load=0, store=0)
    memory = [i for i, l in enumerate(lines) if re.search(r"\b(ld\.global|st\.global|cp\.async\.c[ag]|(atom|red)\S*\.add)", l)]
    spans = [span for span in spans if any(span[0] <= i <= span[1] for i in memory)]
    inner = any("cp.async" in lines[i] for i in memory)
    for i in memory:
        line, times, depth = lines[i], 1, 0
        for span, n in zip(spans, trips):
            if span[0] <= i <= span[1]: times, depth = times * n, depth + 1
        if "cp.async" in line:
            if depth < len(trips): continue                  # the pipeline's start: the last turns of the loop load nothing in return
            total["load"] += int(re.search(r", (?:0x)?(\w+)(?:, %\w+)?;", line)[1], 16) * threads * times
            continue
        vector, bits = re.search(r"\.v(\d)", line), re.search(r"\.[bfus](\d+)\b", line)
        size = int(vector[1] if vector else 1) * BYTES[bits[1]]
        address = re.search(r"\[\s*(%\w+)", line)[1]
        kind = "load" if line.split()[0].startswith("ld") or " ld." in line else "store"
        if kind == "store" and ("atom" in line or "red" in line) and depth: continue          # adds when the latent changes: at most once a latent
        if kind == "store" and depth and "st.global" in line: times = 1
        total[kind] += size * (threads if address in tainted else 1) * times
    return total["load"], total["store"]


def measure(job, card):
    "A row of the table."
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    kernels._load_triton()
    done, seconds = compile_job(job, card)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(done.asm["cubin"])
        f.flush()
        usage = subprocess.run([TOOLS/"cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS/"nvdisasm", "-c", f.name], capture_output=True, text=True, check=True).stdout
    number = lambda name: int(re.search(rf"{name}:(\d+)", usage)[1])
    load, store = moved(done.asm["ptx"], 32 * job.warps, job.trips)
    off = abs((load + store) / (job.load + job.store) - 1)    # of both: threads that hold copies of a small result are counted, though they store nothing
    return dict(kernel=job.name, card=f"sm_{card}", registers=number("REG"), spilled=number("STACK") + number("LOCAL"), shared=done.metadata.shared,
                instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)), tensor=len(re.findall(r"HMMA|HGMMA", sass)), cubin=len(done.asm["cubin"]),
                seconds=round(seconds, 2), loads=load, must_load=job.load, stores=store, must_store=job.store, off=round(off, 4))


def complaints(row):
    card = int(row["card"][3:])
    if row["spilled"]: yield f"spills {row['spilled']} bytes"
    if row["shared"] > SHARED[card]: yield f"needs {row['shared']} bytes of shared memory, the card has {SHARED[card]}"
    if row["cubin"] > LIMITS["cubin"]: yield f"its cubin has {row['cubin']} bytes"
    if row["seconds"] > LIMITS["seconds"]: yield f"took {row['seconds']} s to compile"
    if row["off"] > LIMITS["off"]: yield f"loads {row['loads']} and stores {row['stores']} bytes, the algorithm {row['must_load']} and {row['must_store']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = Table(pool.starmap(measure, [(job, card) for job in jobs() for card in job.cards], chunksize=4))
    print(rows)
    bad = [f"{row['kernel']} on {row['card']} {why}" for row in rows for why in complaints(row)]
    if not args.check and not bad:
        save_results(args.out, [row | dict(seed=0) for row in rows], "python benchmarks/compile_kernels.py --out stan_nb/data/results/kernels_compiled.json", [0],
                     dict(width=D, limits=LIMITS, shared=SHARED), triton=triton.__version__)
    if bad: sys.exit("\n".join(bad))


if __name__ == "__main__": main()
