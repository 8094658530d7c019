"""Pretrain the small Llama that comes with the package, from nothing but the Python standard library on this machine: about 10 CPU minutes in two parts.

    python benchmarks/pretrain_lm.py --out runs/lm                                               # config, tokenizer, weights in fp16, record.json
    python benchmarks/pretrain_lm.py --start runs/lm --seed 1 --steps 1200 --length 96 --lr 3e-3 --source 6  # writes stan_nb/data/models/tiny-llama

A third of every batch is the library's own source (code, comments, docstrings with their doctests), the rest are exercises in doctest form: variables,
copying, small sums and lists, all drawn at random; of these only what follows from the text before it is learnt. Whole modules are kept out of training; the loss on them is what "forgetting" is measured with.
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


# exercises: lists of (text, whether it follows from what stands before it); only what follows is learnt

NAMES = "a b c d n m k x y z xs ys items words total count size width left right value data result old new price parts rows".split()
WORDS = ("apple pear book pen box card coin shell cup key plate stone ticket egg letter marble flower stamp bottle button red blue green old new small big long "
         "Anna Ben Clara David Emma Frank Grace Henry Iris Jack has gives finds buys takes loses gets more each left there are in the a of and to from with how many "
         "does now needs sells eats keeps holds days boxes bags rows shelf").split()

def number(rng): return rng.randint(0, 20) if rng.random() < .7 else rng.randint(0, 60)

def a_sum(rng):
    "Two numbers, a sign, and what it gives."
    sign = rng.choice("+-*")
    if sign == "*": a, b = rng.randint(2, 9), rng.randint(2, 9)
    else: a, b = number(rng), rng.randint(0, 20)
    if sign == "-": a, b = max(a, b), min(a, b)
    return a, sign, b, dict(zip("+-*", (a + b, a - b, a * b)))[sign]

def variables(rng):
    names = rng.sample(NAMES, rng.randint(2, 4))
    values = [number(rng) if rng.random() < .6 else rng.choice(WORDS) for _ in names]
    parts = [("".join(f">>> {n} = {v!r}\n" for n, v in zip(names, values)), False)]
    for i in rng.sample(range(len(names)), len(names)): parts += [(f">>> {names[i]}\n", False), (f"{values[i]!r}\n", True)]
    return parts

def copying(rng):
    text = " ".join(rng.choice(WORDS) if rng.random() < .7 else str(number(rng)) for _ in range(rng.randint(3, 16)))
    if rng.random() < .3: return [(f"# {text}\n>>> numbers\n", False), (f"{[int(word) for word in text.split() if word.isdigit()]}\n", True)]
    return [(f">>> s = '{text}'\n>>> s\n", False), (f"'{text}'\n", True)] if rng.random() < .5 else [(f"# {text}\n", False), (f"# {text}\n", True)]

def sums(rng):
    parts = []
    for _ in range(3):
        (a, sign, b, value), (n, m) = a_sum(rng), rng.sample(NAMES, 2)
        kind = rng.randrange(3)
        if kind == 0: parts += [(f">>> {a} {sign} {b}\n", False), (f"{value}\n", True)]
        if kind == 1: parts += [(f"{a} {sign} {b} =", False), (f" {value}\n", True)]
        if kind == 2: parts += [(f">>> {n} = {a}\n>>> {m} = {b}\n>>> {n} {sign} {m}\n", False), (f"{value}\n", True)]
    return parts

def lists(rng):
    name, xs = rng.choice(NAMES), [rng.randint(0, 9) for _ in range(rng.randint(2, 4))]
    expression = rng.choice(("max({})", "min({})", "len({})", "sum({})", "{}[0]", "{}[-1]", "sorted({})")).format(name)
    return [(f">>> {name} = {xs}\n>>> ", False), (f"{expression}\n{eval(expression, {name: xs})!r}\n", True)]

def exercises(rng, characters):
    "Exercises one after the other, until there is enough text."
    found, size = [], 0
    while size < characters:
        found.append(rng.choice((variables, copying, copying, sums, sums, lists))(rng))
        size += sum(len(text) for text, _ in found[-1])
    return found


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

def encode(tokenizer, rows):
    "One stream of token numbers with an end after each row, and the same stream with -100 where nothing can be learnt."
    parts = [part for row in rows for part in ([(row, True)] if isinstance(row, str) else row)]
    ends = [i for row in rows for i in ([True] if isinstance(row, str) else [False] * (len(row) - 1) + [True])]
    ids, labels = [], []
    for tokens, (_, scored), end in zip(tokenizer([text for text, _ in parts], add_special_tokens=False, verbose=False)["input_ids"], parts, ends):
        tokens = tokens + [tokenizer.eos_token_id] * end
        ids += tokens
        labels += tokens if scored else [-100] * len(tokens)
    return torch.tensor(ids), torch.tensor(labels)

def windows(stream, starts, length=128):
    return [torch.stack([part[s:s + length] for s in starts]) for part in stream]

def loss_of(model, ids, labels): return model(input_ids=ids, labels=labels, use_cache=False).loss

@torch.no_grad()
def loss_on(model, stream, length=128, rows=64):
    "Nats a token on evenly spread windows."
    return loss_of(model, *windows(stream, np.linspace(0, len(stream[0]) - length, rows).astype(int), length)).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="stan_nb/data/models/tiny-llama")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", type=int, default=3, help="one row in so many is source, the rest are exercises")
    parser.add_argument("--start", default="", help="go on from this folder, with fresh exercises")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    rng, pick, began = random.Random(args.seed), np.random.default_rng(args.seed), time.process_time()

    train, held = library_text()
    practice = exercises(rng, 3_000_000)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start) if args.start else train_tokenizer([*train, *("".join(text for text, _ in row) for row in practice[:20000])], 1024)
    source, drill, kept = (encode(tokenizer, part) for part in (train, practice, held))
    drill_kept = encode(tokenizer, exercises(random.Random(-1), 60_000))
    print(f"{len(source[0]):,} tokens of source, {len(drill[0]):,} of exercises, {len(kept[0]):,} held out; {time.process_time() - began:.0f} CPU s", flush=True)

    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256,
                         tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.), bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32) if args.start else LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(.9, .95), weight_decay=.05)
    for step in range(1, args.steps + 1):
        rate = min(step / 100, .5 * (1 + math.cos(math.pi * step / args.steps)) + .02)
        for group in optimizer.param_groups: group["lr"] = args.lr * rate
        loss = 0.
        for stream, rows in ((source, args.batch // args.source), (drill, args.batch - args.batch // args.source)):
            loss = loss + loss_of(model, *windows(stream, pick.integers(0, len(stream[0]) - args.length, size=rows), args.length)) / 2
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
    former = json.loads((Path(args.start)/"record.json").read_text()) if args.start else dict(commands=[], seconds=0)
    record = dict(commands=[*former["commands"], " ".join(["python", "benchmarks/pretrain_lm.py", *sys.argv[1:]])], python=sys.version.split()[0], torch=torch.__version__, parameters=count,
                  seconds=former["seconds"] + round(time.process_time() - began), source=round(loss_on(model, kept), 4), exercises=round(loss_on(model, drill_kept), 4))
    (out/"record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


if __name__ == "__main__": main()
