"""Pretrain the small LLaVA that comes with the package, from nothing but drawn scenes: about 4 CPU minutes.

    python benchmarks/pretrain_llava.py            # writes stan_nb/data/models/tiny-llava: config, weights in fp16, processor, record.json
    python benchmarks/pretrain_llava.py --score    # scores what is there

It learns to see: what stands where, where something is, how many things there are, whether something is there, and captions. It is never asked what colour a shape
has, what shape a colour has, or how many things are alike: these questions, made of words that it knows, are left to the adapters.
"""
import argparse, json, math, sys, time
from pathlib import Path
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                          PreTrainedTokenizerFast)
from stan_nb.scenes import HUES, PLACES, SHAPES, SIDE, mixed, paint

FOLDER = Path(__file__).resolve().parent.parent / "stan_nb" / "data" / "models" / "tiny-llava"
WORDS = ("<pad>", "<end>", "<unk>", "<image>", *HUES, *SHAPES, "top", "bottom", "left", "right", *"01234", "yes", "no", *"what colour shape where how many is are there at describe".split())
VOCABULARY = 48
TEMPLATE = ("{% for message in messages %}{% if message['role'] == 'user' %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}"
            "{% else %}{% for part in message['content'] %} {{ part['text'] }} <end> {% endfor %}{% endif %}{% endfor %}")


def make_processor():
    "Words in small letters; articles, question marks and the plural's s are left out."
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[?.,!]"), " "), normalizers.Replace(Regex(r"\b(the|an?|ones?|of)\b"), " "),
                                                 normalizers.Replace(Regex(r"(?<=circle|square|triangle)s\b|(?<=cross)es\b"), ""), normalizers.Replace(Regex(r"\bcolor"), "colour")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", additional_special_tokens=["<image>"],
                                    model_max_length=256, padding_side="left", clean_up_tokenization_spaces=False)
    images = CLIPImageProcessorPil(size=dict(height=SIDE, width=SIDE), crop_size=dict(height=SIDE, width=SIDE), image_mean=[.5] * 3, image_std=[.5] * 3)
    return LlavaProcessor(image_processor=images, tokenizer=words, patch_size=8, num_additional_image_tokens=1, vision_feature_select_strategy="default", chat_template=TEMPLATE)

def make_config():
    vision = CLIPVisionConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=8, projection_dim=96)
    text = LlamaConfig(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256,
                       initializer_range=.06, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=WORDS.index("<image>"), image_seq_length=16, vision_feature_layer=-1,
                       vision_feature_select_strategy="default", tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None)


# questions

CHANCES = dict(describe=.28, what_colour=.12, what_shape=.12, where_colour=.14, where_shape=.14, how_many=.06, is_colour=.07, is_shape=.07)

def question(kind, colours, shapes, rng):
    "A question about a scene and its answer, or None where there is none."
    cells = [i for i in range(4) if colours[i] >= 0]
    words = dict(colour=[list(HUES)[c] if c >= 0 else "" for c in colours], shape=[SHAPES[s] if s >= 0 else "" for s in shapes])
    at, pick = cells[rng.integers(len(cells))], (lambda options: options[rng.integers(len(options))])
    if kind == "describe": return "describe", " ".join(f"{words['colour'][i]} {words['shape'][i]} {PLACES[i]}" for i in cells)
    if kind == "how_many": return "how many are there", str(len(cells))
    what, of = kind.split("_")
    names = words[of]
    if what == "what": return f"what {of} is at {PLACES[at]}", names[at]
    if what == "where":
        once = [i for i in cells if names.count(names[i]) == 1]
        if not once: return None
        at = pick(once)
        return f"where is {names[at]}", PLACES[at]
    there, every = sorted(set(names) - {""}), list(HUES if of == "colour" else SHAPES)
    missing = [name for name in every if name not in there]
    if rng.random() < .5 or not missing: return f"is there {pick(there)}", "yes"
    return f"is there {pick(missing)}", "no"

def free_scenes(n, rng):
    "One to four objects, nothing asked for."
    empty = rng.random((n, 4)).argsort(1).argsort(1) >= rng.integers(1, 5, n)[:, None]
    return (np.where(empty, -1, mixed(n, count, rng)) for count in (len(HUES), len(SHAPES)))

def turns(colours, shapes, rng, words=32):
    "Questions and answers of one text, a caption last if there is one, as token numbers and labels."
    kinds, ids, labels, asked = list(CHANCES), [], [], set()
    drawn = sorted(rng.choice(len(kinds), 8, p=list(CHANCES.values())), key=lambda kind: kinds[kind] == "describe")
    for kind in drawn:
        found = question(kinds[kind], colours, shapes, rng)
        if found is None or found[0] in asked: continue
        asked.add(found[0])
        prompt, answer = ([WORDS.index(word) for word in part.split()] for part in found)
        answer.append(WORDS.index("<end>"))
        if len(ids) + len(prompt) + len(answer) > words: continue
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
    return ids + [0] * (words - len(ids)), labels + [-100] * (words - len(labels))

def pixels(images): return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

def batch(n, rng):
    colours, shapes = free_scenes(n, rng)
    ids, labels = zip(*(turns(c, s, rng) for c, s in zip(colours.tolist(), shapes.tolist())))
    image = torch.full((n, 16), WORDS.index("<image>"))
    return dict(input_ids=torch.cat([image, torch.tensor(ids)], 1), labels=torch.cat([image * 0 - 100, torch.tensor(labels)], 1), pixel_values=pixels(paint(colours, shapes, rng)))


@torch.no_grad()
def scores(model, n=200):
    "The share of each kind of question, new scenes, one question a text, that is answered word for word."
    found, image = {}, torch.full((1, 16), WORDS.index("<image>"))
    for number, kind in enumerate(CHANCES):
        rng = np.random.default_rng([7, number])
        colours, shapes = free_scenes(n, rng)
        pictures = pixels(paint(colours, shapes, rng))
        rows = [(at, *asked) for at, (c, s) in enumerate(zip(colours.tolist(), shapes.tolist())) if (asked := question(kind, c, s, rng))]
        right = total = 0
        for length in {len(q.split()) for _, q, _ in rows}:                                  # equal lengths need no padding
            part = [row for row in rows if len(row[1].split()) == length]
            ids = torch.cat([image.expand(len(part), -1), torch.tensor([[WORDS.index(word) for word in q.split()] for _, q, _ in part])], 1)
            said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pictures[[at for at, _, _ in part]], max_new_tokens=18, do_sample=False)[:, ids.shape[1]:]
            right += sum(" ".join(WORDS[t] for t in line if WORDS[t] not in ("<end>", "<pad>")) == a for line, (_, _, a) in zip(said.tolist(), part))
            total += len(part)
        found[kind] = round(right / total, 4)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(FOLDER))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", action="store_true", help="score what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out, began = Path(args.out), time.process_time()
    if not args.score:
        torch.manual_seed(args.seed)
        rng, model = np.random.default_rng(args.seed), LlavaForConditionalGeneration(make_config())
        torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=.2)
        optimizer, losses = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.), []
        for step in range(1, args.steps + 1):
            for group in optimizer.param_groups: group["lr"] = args.lr * min(step / 30, .5 * (1 + math.cos(math.pi * step / args.steps)))
            parts = batch(64, rng)
            logits, labels = model(input_ids=parts["input_ids"], pixel_values=parts["pixel_values"], use_cache=False).logits[:, :-1], parts["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            losses.append(loss.item())
            if step % 50 == 0: print(f"step {step}: loss {sum(losses[-50:]) / 50:.3f}, {time.process_time() - began:.0f} CPU s", flush=True)
        model.half().save_pretrained(out)
        make_processor().save_pretrained(out)
        about = out / "processor_config.json"                 # the same image processor with and without torchvision
        about.write_text(about.read_text().replace('"CLIPImageProcessor"', '"CLIPImageProcessorPil"'))
    seconds = round(time.process_time() - began)
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    found = scores(model)
    print(found)
    if args.score: return
    record = dict(command=" ".join(["python", "benchmarks/pretrain_llava.py", *sys.argv[1:]]), python=sys.version.split()[0], torch=torch.__version__,
                  parameters=sum(p.numel() for p in model.parameters()), seconds=seconds, scores=found)
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
