"""Pretrain the small Llama that comes with the package, from nothing but the Python standard library on this machine: about 5 CPU minutes.

    python benchmarks/pretrain_lm.py             # writes stan_nb/data/models/tiny-llama: config, tokenizer, weights in fp16, record.json
    python benchmarks/pretrain_lm.py --steps 20 --out /tmp/lm    # does the script run?

Half of every batch is the library's own source (code, comments, docstrings with their doctests), half are exercises in doctest form: variables,
copying, small sums and lists, all drawn at random. Whole modules are kept out of training; the loss on them is what "forgetting" is measured with.
"""
import argparse, json, math, random, sys, time
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from stan_nb.math_code_data import library_text

END, PAD = "<|end|>", "<|pad|>"


# exercises

NAMES = "a b c d n m k x y z xs ys items words total count size width left right value data result old new price parts rows".split()
WORDS = ("apple pear book pen box card coin shell cup key plate stone ticket egg letter marble flower stamp bottle button red blue green old new small big long "
         "Anna Ben Clara David Emma Frank Grace Henry Iris Jack has gives finds buys takes loses gets more each left there are in the a of and to from with how many "
         "does now needs sells eats keeps holds days boxes bags rows shelf").split()

def number(rng): return rng.randint(0, 9) if rng.random() < .4 else rng.randint(0, 60)

def sum_of(rng):
    "An operation on two small numbers, and its value."
    sign = rng.choice("+-*")
    if sign == "*": a, b = rng.randint(1, 12), rng.randint(1, 12)
    else: a, b = number(rng), number(rng)
    if sign == "-": a, b = max(a, b), min(a, b)
    return f"{a} {sign} {b}", a + b if sign == "+" else a - b if sign == "-" else a * b

def variables(rng):
    names = rng.sample(NAMES, rng.randint(2, 3))
    values = [number(rng) if rng.random() < .7 else rng.choice(WORDS) for _ in names]
    lines = [f">>> {n} = {v!r}" for n, v in zip(names, values)]
    for i in rng.sample(range(len(names)), len(names)): lines += [f">>> {names[i]}", repr(values[i])]
    return lines

def copying(rng):
    text = " ".join(rng.choice(WORDS) if rng.random() < .8 else str(number(rng)) for _ in range(rng.randint(2, 7)))
    kind = rng.randrange(4)
    if kind == 0: return [f">>> s = '{text}'", ">>> s", f"'{text}'"]
    if kind == 1: return [f">>> print('{text}')", text]
    if kind == 2: return [f"# {text}", f'"""{text}"""']
    found = [word for word in text.split() if word.isdigit()]
    return [f">>> [w for w in '{text}'.split() if w.isdigit()]", repr(found)]

def sums(rng):
    kind = rng.randrange(4)
    if kind == 0: return [line for _ in range(3) for line, in [[f">>> {e}\n{v}"] for e, v in [sum_of(rng)]]]
    if kind == 1: return [f"{e} = {v}" for e, v in (sum_of(rng) for _ in range(3))]
    if kind == 2: return [f"# {e} = {v}" for e, v in (sum_of(rng) for _ in range(2))]
    (e, v), (n, m) = sum_of(rng), rng.sample(NAMES, 2)
    a, sign, b = e.split()
    return [f">>> {n} = {a}", f">>> {m} = {b}", f">>> {n} {sign} {m}", str(v)]

def lists(rng):
    name, xs = rng.choice(NAMES), [rng.randint(0, 9) for _ in range(rng.randint(2, 4))]
    lines, n = [f">>> {name} = {xs}"], rng.randint(1, 9)
    for _ in range(rng.randint(1, 2)):
        call = rng.choice(("max({})", "min({})", "len({})", "sum({})", "{}[0]", "{}[-1]", "sorted({})"))
        if call != "sorted({})" and rng.random() < .5: call += rng.choice((f" + {n}", f" * {n}", f" - {n}"))
        expression = call.format(name)
        lines += [f">>> {expression}", repr(eval(expression, {name: xs}))]
    return lines

def exercises(rng, characters):
    "Exercises one after the other, until there is enough text."
    parts, size = [], 0
    while size < characters:
        parts.append("\n".join(rng.choice((variables, copying, copying, sums, sums, lists))(rng)) + "\n")
        size += len(parts[-1])
    return parts


# tokenizer and model

def train_tokenizer(texts, size):
    "Byte-level BPE; digits stand alone, so that a number is spelt."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d|\n+|[^\S\n]*[^\s\d]+|[^\S\n]+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=[END, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                             show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, padding_side="right", model_max_length=256,
                                   clean_up_tokenization_spaces=False)

def encode(tokenizer, parts):
    "One stream of token numbers, an end after each part."
    ids = [i for row in tokenizer(parts, add_special_tokens=False)["input_ids"] for i in (*row, tokenizer.eos_token_id)]
    return torch.tensor(ids, dtype=torch.long)

def windows(stream, rng, rows, length):
    starts = rng.integers(0, len(stream) - length, size=rows)
    return torch.stack([stream[s:s + length] for s in starts])

@torch.no_grad()
def loss_on(model, stream, length=128, rows=64):
    "Nats a token on evenly spread windows."
    starts = np.linspace(0, len(stream) - length, rows).astype(int)
    batch = torch.stack([stream[s:s + length] for s in starts])
    return model(input_ids=batch, labels=batch).loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="stan_nb/data/models/tiny-llama")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    rng, pick, began = random.Random(args.seed), np.random.default_rng(args.seed), time.process_time()

    train, held = library_text()
    practice = exercises(rng, 3_000_000)
    tokenizer = train_tokenizer([*train, *practice[:20000]], 1024)
    source, drill, kept = (encode(tokenizer, part) for part in (train, practice, held))
    drill_kept = encode(tokenizer, exercises(random.Random(args.seed + 1), 60_000))
    print(f"{len(source):,} tokens of source, {len(drill):,} of exercises, {len(kept):,} held out; {time.process_time() - began:.0f} CPU s", flush=True)

    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256,
                         tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.), bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(.9, .95), weight_decay=.05)
    for step in range(1, args.steps + 1):
        rate = min(step / 100, .5 * (1 + math.cos(math.pi * step / args.steps)) + .02)
        for group in optimizer.param_groups: group["lr"] = args.lr * rate
        batch = torch.cat([windows(source, pick, args.batch // 2, args.length), windows(drill, pick, args.batch - args.batch // 2, args.length)])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        if step % 200 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f}, held-out source {loss_on(model, kept):.3f}, exercises {loss_on(model, drill_kept):.3f}, "
                  f"{time.process_time() - began:.0f} CPU s", flush=True)

    out = Path(args.out)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    record = dict(command=" ".join(["python", "benchmarks/pretrain_lm.py", *sys.argv[1:]]), python=sys.version.split()[0], torch=torch.__version__, parameters=count,
                  seconds=round(time.process_time() - began), source=round(loss_on(model, kept), 4), exercises=round(loss_on(model, drill_kept), 4))
    (out/"record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


if __name__ == "__main__": main()
