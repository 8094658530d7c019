"""How long STAN takes beside PEFT's LoRA with as many parameters, on this CPU: what `make bench` prints.

    python benchmarks/cpu.py                       # every table, under 6 minutes on 2 cores; writes stan_nb/data/results/speed_cpu.json
    python benchmarks/cpu.py --tables adapter decode --out /tmp/speed.json

One thread. Every number is a ratio of CPU times measured in turns in one process (medians; in brackets the quartiles). Inputs rotate, since a
repeated batch flatters the selection. "LoRA in place" is the control: LoRA's products, added in place without temporaries; what STAN gains beyond it is
sparsity. "floor" is the frozen layer or model without any adapter: no adapter can be below. glibc returns large buffers to the system at every call unless
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ are raised; then every temporary costs page faults, which LoRA has more of. The tables are measured
with raised thresholds, in a process of its own, and the first one with the default, too.
"""
import argparse, copy, itertools, json, os, subprocess, sys, tempfile, time, warnings
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from stan_nb import kernels
from stan_nb.measure import compare_speed
from stan_nb.runs import save_results
from stan_nb.settings import Table
from stan_nb.topk import set_backend, sparse_adapt

OUT = Path(__file__).parent.parent/"stan_nb"/"data"/"results"/"speed_cpu.json"
SIZES, WIDE = [(16, 4), (64, 8), (1024, 16)], [(16, 4), (64, 8), (256, 16)]
RAISED = {name: str(1 << 32) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}
TURNS = 4                                                    # inputs that take turns


def with_backend(name, function):
    def call():
        with set_backend(name): function()
    return call


def row(table, shape, pass_, rows, first="PEFT LoRA"):
    "One line of a table: the ratios of what was measured."
    ratios = {r["name"]: r["ratio"] for r in rows if r["name"] != first}
    spread = {r["name"]: [r["low"], r["high"]] for r in rows if r["name"] != first}
    return dict(table=table, shape=shape, what=pass_, lora_ms=rows[0]["ms"], ratios=ratios, spread=spread)


# the adapter alone

def adapter_rows(backends, rounds, widths=((768, 1024), (768, 2048), (2048, 1024))):
    for (d, n), (m, k) in itertools.product(widths, SIZES):
        xs = itertools.cycle([(torch.randn(n, d).requires_grad_(), torch.randn(n, d)) for _ in range(TURNS)])
        A, B = (torch.randn(m, d) / d**.5).requires_grad_(), (torch.randn(d, m) / d**.5).requires_grad_()
        Bt, G = B.detach().T.contiguous().requires_grad_(), torch.randn(n, d)
        lora = lambda x, out: out + F.linear(F.linear(x, A), B) * 2.
        fused = lambda x, out: sparse_adapt(x, A, Bt, m, 2., out=out, inplace=True)     # all latents kept: that is LoRA
        stan = lambda x, out: sparse_adapt(x, A, Bt, k, 2., out=out, inplace=True)
        def forward(f):
            def call():
                with torch.no_grad(): f(*next(xs))
            return call
        def both(f, parameters):
            def call():
                x, out = next(xs)
                torch.autograd.grad(f(x, out), (x, *parameters), G)
            return call
        for what, calls in (("forward", {"PEFT LoRA": forward(lora), "LoRA in place": forward(fused), **{f"STAN {b}": with_backend(b, forward(stan)) for b in backends}}),
                            ("forward + backward", {"PEFT LoRA": both(lora, (A, B)), "LoRA in place": both(fused, (A, Bt)),
                                                    **{f"STAN {b}": with_backend(b, both(stan, (A, Bt))) for b in backends}})):
            yield row("adapter", f"d={d} N={n} ({m}, {k})", what, compare_speed(calls, rounds))


# a whole layer, a whole model, through PEFT

def adapted(model, targets, m, k):
    "The model with LoRA and with STAN, as PEFT makes them; decoders are not zero, or nothing would happen."
    import peft
    from stan_nb.peft import StanConfig
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=m, lora_alpha=2 * m, target_modules=targets))
    stan = peft.get_peft_model(copy.deepcopy(model), StanConfig(num_latents=m, k=k, alpha=2 * k, target_modules=targets, init_weights=False))
    for name, p in lora.named_parameters():
        if "lora_B" in name: nn.init.normal_(p, std=.02)
    return lora, stan


def layer_rows(backends, rounds):
    for (d, n), (m, k) in itertools.product([(768, 1), (768, 16), (768, 512), (768, 2048), (2048, 512)], SIZES):
        base = nn.Sequential(nn.Linear(d, d)).requires_grad_(False)
        lora, stan = adapted(base, ["0"], m, k)
        xs, G = itertools.cycle([torch.randn(n, d) for _ in range(TURNS)]), torch.randn(n, d)
        many = max(1, 200 // n)
        def forward(model):
            def call():
                with torch.no_grad():
                    for _ in range(many): model(next(xs))
            return call
        def step(model):
            parameters = [p for p in model.parameters() if p.requires_grad]
            def call():
                x = next(xs).requires_grad_()
                torch.autograd.grad(model(x), [x, *parameters], G)
            return call
        calls = {"PEFT LoRA": forward(lora), "floor": forward(base), **{f"STAN {b}": with_backend(b, forward(stan)) for b in backends}}
        yield row("layer", f"d={d} N={n} ({m}, {k})", "forward", compare_speed(calls, rounds))
        if n < 512: continue
        calls = {"PEFT LoRA": step(lora), "floor": step(base), **{f"STAN {b}": with_backend(b, step(stan)) for b in backends}}
        yield row("layer", f"d={d} N={n} ({m}, {k})", "training step", compare_speed(calls, rounds))


def encoder():
    "A BERT with the sizes of all-MiniLM-L6-v2, not trained: only its speed counts here."
    from transformers import BertConfig, BertModel
    model = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=2000), add_pooling_layer=False)
    return model, ["query", "key", "value", "dense"], 2000


def llama():
    "A Llama of width 512 with 4 layers, not trained."
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8))
    return model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 2000


def model_rows(backends, rounds):
    for name, make in (("MiniLM", encoder), ("Llama", llama)):
        torch.manual_seed(0)
        model, targets, words = make()
        batches = itertools.cycle([torch.randint(0, words, (16, 64)) for _ in range(TURNS)])
        for m, k in WIDE:
            lora, stan = adapted(model.requires_grad_(False), targets, m, k)
            free = copy.deepcopy(model)                      # what training would cost if the adapter were free: gradients pass through, nothing is learned
            free.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
            def step(trained):
                for p in trained.parameters(): p.grad = None
                def call():
                    out = trained(input_ids=next(batches))
                    (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean().backward()
                return call
            calls = {"PEFT LoRA": step(lora), "floor": step(free), **{f"STAN {b}": with_backend(b, step(stan)) for b in backends}}
            yield row("model", f"{name} ({m}, {k})", "training, 1,024 tokens", compare_speed(calls, max(5, rounds - 2)))


def decode_rows(backends, rounds):
    torch.manual_seed(0)
    model, targets, words = llama()
    prompts = itertools.cycle([torch.randint(0, words, (1, 16)) for _ in range(TURNS)])
    for m, k in WIDE:
        lora, stan = adapted(model.requires_grad_(False), targets, m, k)
        def generate(chosen):
            chosen.eval()
            def call():
                with torch.no_grad(): chosen.generate(input_ids=next(prompts), max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
            return call
        calls = {"PEFT LoRA": generate(lora), "floor": generate(model), **{f"STAN {b}": with_backend(b, generate(stan)) for b in backends}}
        yield row("decode", f"Llama ({m}, {k})", "16 tokens, greedy", compare_speed(calls, rounds))


# memory, the compiler, the dispatcher

def kept(call):
    "Bytes that autograd keeps, each storage once, the parameters not counted."
    storages = {}
    def pack(t):
        if not isinstance(t, nn.Parameter): storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): call()
    return sum(storages.values())


def memory_rows(backends, rounds):
    n, d = 1024, 768
    for m, k in SIZES:
        lora, stan = adapted(nn.Sequential(nn.Linear(d, d)).requires_grad_(False), ["0"], m, k)
        x = torch.randn(n, d)
        sizes = [kept(lambda: model(x)) for model in (lora, stan)]
        yield dict(table="memory", shape=f"d={d} N={n} ({m}, {k})", what="bytes kept for backward", lora_ms=sizes[0], ratios={"STAN cpu": sizes[1] / sizes[0]}, spread={})


def compiled_rows(backends, rounds):
    d, n = 768, 1024
    for m, k in SIZES[:2]:
        lora, stan = adapted(nn.Sequential(nn.Linear(d, d)).requires_grad_(False), ["0"], m, k)
        xs, G = itertools.cycle([torch.randn(n, d) for _ in range(TURNS)]), torch.randn(n, d)
        def step(model):
            parameters, run = [p for p in model.parameters() if p.requires_grad], torch.compile(model.base_model.model[0])
            def call():
                x = next(xs).requires_grad_()
                torch.autograd.grad(run(x), [x, *parameters], G)
            return call
        yield row("compiled", f"d={d} N={n} ({m}, {k})", "training step", compare_speed({"PEFT LoRA": step(lora), "STAN auto": step(stan)}, rounds))


def dispatcher_rows(backends, rounds):
    "The chosen way beside the others, on three shapes."
    for n, d, m, k in ((2048, 768, 16, 4), (2048, 768, 64, 8), (1024, 768, 1024, 16)):
        xs = itertools.cycle([(torch.randn(n, d), torch.randn(n, d)) for _ in range(TURNS)])
        E, D, G = torch.randn(m, d) / d**.5, torch.randn(m, d) / d**.5, torch.randn(n, d)
        def way(few=None, limit=None, mkl=None, choose=None):
            def call():
                x, out = next(xs)
                former = kernels._few_skipped, kernels.MKL, kernels.choose
                kernels._few_skipped, kernels.MKL, kernels.choose = few or former[0], former[1] if mkl is None else mkl, choose or former[2]
                try:
                    values, indices = kernels.cpu_forward(x, E, D, None, out, k, 2., "abs")
                    kernels.cpu_backward(G, x, E, D, values, indices, 2., False, (1, 1, 1, 0))
                finally: kernels._few_skipped, kernels.MKL, kernels.choose = former
            return call
        by_topk = lambda z, k, select: z.abs().topk(k, dim=-1, sorted=False).indices.int()
        calls = {"chosen": way(), "dense": way(few=lambda m, k: True), "sparse": way(few=lambda m, k: False), "embedding_bag": way(few=lambda m, k: False, mkl=False),
                 "torch.topk": way(choose=by_topk)}
        rows = compare_speed(calls, rounds)
        best = min(r["ratio"] for r in rows)
        yield row("dispatcher", f"d={d} N={n} ({m}, {k})", f"chosen / best {1 / best:.2f}", rows, "chosen")


TABLES = dict(adapter=adapter_rows, layer=layer_rows, model=model_rows, decode=decode_rows, memory=memory_rows, compiled=compiled_rows, dispatcher=dispatcher_rows)
TITLES = dict(adapter="the adapter alone", layer="a linear layer with its adapter, through PEFT", model="training a whole model, through PEFT (CPU time of a step; tokens/s are its inverse)",
              decode="generating text, through PEFT", memory="bytes kept for backward", compiled="under torch.compile", dispatcher="other ways / the chosen one (must not be far below 1)")


def show(rows):
    for table in dict.fromkeys(r["table"] for r in rows):
        for malloc in dict.fromkeys(r["malloc"] for r in rows if r["table"] == table):
            print(f"\n{TITLES[table]}: time / PEFT LoRA's, malloc thresholds {malloc}" if table not in ("dispatcher", "memory") else f"\n{TITLES[table]}")
            lines = Table()
            for r in rows:
                if r["table"] != table or r["malloc"] != malloc: continue
                cells = {n: f"{v:.2f}" + (f" [{r['spread'][n][0]:.2f}, {r['spread'][n][1]:.2f}]" if n in r["spread"] else "") for n, v in r["ratios"].items()}
                lines.append({"shape": r["shape"], "": r["what"], "LoRA": f"{r['lora_ms']:,.3f} ms" if table != "memory" else f"{r['lora_ms']:,} B"} | cells)
            print(lines, flush=True)


def run(tables, rounds, malloc, out):
    "Measure in this process and leave the rows in a file."
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try: backends = ["cpu", "cpp"] if set_backend("cpp").__exit__() is None else []
    except RuntimeError as error: backends = print("no C++ backend:", str(error)[:200]) or ["cpu"]
    rows = []
    for table in tables:
        start = time.time()
        for r in TABLES[table](backends, rounds): rows.append(r | dict(malloc=malloc, seed=0))
        print(f"{table}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    Path(out).write_text(json.dumps(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure: return run(args.tables, args.rounds, args.measure, args.out)
    rows, start = [], time.time()
    for malloc, tables, env in (("raised", args.tables, os.environ | RAISED), ("default", [t for t in args.tables if t == "adapter"], {n: v for n, v in os.environ.items() if n not in RAISED})):
        if not tables: continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--measure", malloc, "--rounds", str(args.rounds), "--out", f"{folder}/rows.json", "--tables", *tables]
            subprocess.run(command, env=env, check=True)
            rows += json.loads(Path(folder, "rows.json").read_text())
    show(rows)
    print(f"\n{time.time() - start:.0f} s, torch {torch.__version__}, one thread")
    save_results(args.out, rows, "python benchmarks/cpu.py --out stan_nb/data/results/speed_cpu.json", [0], dict(threads=1, rounds=args.rounds, raised=RAISED), seconds=round(time.time() - start))


if __name__ == "__main__": main()
