#| export
import contextlib, copy, functools, hashlib, itertools, json, logging, re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from fastcore.basics import patch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from stan_nb.assets import at_hub, cache_dir, corpus_hash, shipped
from stan_nb.hooks import ablate, find_adapters, record
from stan_nb.runs import atomic_write
from stan_nb.settings import near
from stan_nb.task import Task, predict_rows
#%%
#| export
_R = torch.arange(16)
_CHECKS = ((_R[:, None] // 2 + _R // 2) % 2).float()
_RIM = ((_R[:, None] - 7.5).abs().maximum((_R - 7.5).abs()) > 7).float()

def _warp(x, matrix): # x: (n, 1, 16, 16), matrix: 2 x 2, from the new place to the old
    turned = torch.tensor([[*row, 0.] for row in matrix]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(turned, x.shape, align_corners=False), align_corners=False)
#%%
#| exports
STYLES = { # each takes ink in [0, 1], shape (n, 1, 16, 16), and gives the same shape; the first six are the lesson's
    "inverted":  lambda x: 1 - x,
    "bold":      lambda x: torch.maximum(x, F.max_pool2d(F.pad(x, (1, 0, 1, 0)), 2, 1)),
    "striped":   lambda x: x * (_R % 3 < 2).float()[:, None],
    "slanted":   lambda x: _warp(x, [[1, .6], [0, 1]]),
    "turned":    lambda x: torch.rot90(x, 1, (2, 3)),
    "checkered": lambda x: torch.maximum(x, .45 * _CHECKS),
    "outlined":  lambda x: F.max_pool2d(x, 3, 1, 1) - x,
    "framed":    lambda x: torch.maximum(x, _RIM),
    "small":     lambda x: _warp(x, [[1.7, 0], [0, 1.7]]),
    "faint":     lambda x: .4 * x,
    "split":     lambda x: torch.where(_R < 8, 1 - x, x),
    "shaded":    lambda x: torch.maximum(x, .4 * F.pad(x, (2, 0, 2, 0))[..., :16, :16]),
}
DIGITS = "zero one two three four five six seven eight nine".split()
#%%
#| export
@functools.cache
def _scanned():
    "All digits as ink in [0, 1], (1797, 1, 16, 16), and what they are; in an order of our own."
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    ink = F.interpolate(torch.tensor(found.images[order] / 16, dtype=torch.float32)[:, None], scale_factor=2, mode="bicubic", align_corners=False)
    ink = torch.sigmoid(10 * (ink.clamp(0, 1) - .5))
    return (ink - ink.min()) / (ink.max() - ink.min()), torch.tensor(found.target[order])

_PARTS = dict(train=slice(0, 1000), judge=slice(1000, 1500), test=slice(1500, 1797)) # people's digits: what is trained on never meets what judges it
#%%
#| exports
def draw_digits(
    part:str,  # whose digits: "train" (base and adapters), "judge", or "test" (the judge's exam)
    n:int,     # how many
    styles,    # names in STYLES, or "plain"; each image gets one at random
    seed:int,  # another seed, other images
)->tuple:      # images (n, 1, 16, 16) in [-1, 1], their digits (n,), and the numbers of their styles (n,)
    "Handwritten digits, moved by up to a pixel and drawn in a style. Raises ValueError for an unknown style or part."
    if part not in _PARTS: raise ValueError(f"part = {part!r} is not known: allowed is one of {', '.join(_PARTS)}")
    for style in styles:
        if style not in STYLES and style != "plain":
            raise ValueError(f"style {style!r} is not known: allowed is plain, {', '.join(STYLES)}.{near(style, STYLES)}")
    ink, digits = (found[_PARTS[part]] for found in _scanned())
    rng = torch.Generator().manual_seed(seed)
    which, kind = torch.randint(len(ink), (n,), generator=rng), torch.randint(len(styles), (n,), generator=rng)
    across, down = torch.randint(3, (2, n), generator=rng)
    moved = torch.stack([F.pad(x, (1, 1, 1, 1))[:, j:j+16, i:i+16] for x, i, j in zip(ink[which], across, down)])
    for number, style in enumerate(styles):
        if style != "plain": moved[kind == number] = STYLES[style](moved[kind == number])
    return moved.clamp(0, 1) * 2 - 1, digits[which], kind
#%%
#| exports
class Judge(nn.Module):
    "A small convolutional network that says which digit an image shows, and in which style."
    def __init__(self, styles=("plain", *STYLES)):
        super().__init__()
        self.styles = list(styles)
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
                                  nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.digit, self.style = nn.Linear(64, 10), nn.Linear(64, len(self.styles))
    def forward(self, x): # images (n, 1, 16, 16) in [-1, 1] -> logits (n, 10) and (n, styles)
        features = self.body(x)
        return self.digit(features), self.style(features)
#%%
#| exports
def train_judge(
    steps:int=2500, # of Adam, 128 images each
    seed:int=1,     # of its weights and of its own generator of images
)->Judge:           # in eval mode
    "Train a judge on digits that neither the base nor an adapter ever sees."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
        optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            images, digits, styles = draw_digits("judge", 128, judge.styles, 10**6 * seed + step)
            images = images + .1 * torch.rand(128, 1, 1, 1) * torch.randn_like(images)  # generated images are never quite clean
            digit, style = judge(images)
            optimizer.zero_grad()
            (F.cross_entropy(digit, digits) + F.cross_entropy(style, styles)).backward()
            optimizer.step()
            rates.step()
    return judge.eval().requires_grad_(False)
#%%
#| exports
@dataclass
class Prompts:
    "Text embeddings, computed once: what the transformer reads instead of words."
    words:dict           # a word, or a whole prompt -> its number
    tokens:torch.Tensor  # (numbers, tokens, width)
    pooled:torch.Tensor  # (numbers, pooled width)
    length:int=0         # words in a prompt; 0: prompts are whole, one number each
    def __call__(self,
        prompts:list[str], # "" is the empty prompt
    )->tuple:              # tokens (prompts, tokens, width) and pooled (prompts, pooled width)
        "The embeddings of prompts. Raises ValueError for a word or a prompt that is not there."
        split = [re.findall(r"\w+", p) if self.length else [p] for p in prompts]
        for prompt, found in zip(prompts, split):
            for word in found:
                if word not in self.words: raise ValueError(f"prompt {prompt!r}: {word!r} is not known: allowed is {', '.join(filter(None, self.words))}.{near(word, self.words)}")
            if self.length and len(found) > self.length: raise ValueError(f"prompt {prompt!r} has {len(found)} words: allowed is up to {self.length}")
        numbers = torch.tensor([[self.words[w] for w in found] + [self.words[""]] * (self.length - len(found)) for found in split])
        if not self.length: return self.tokens[numbers[:, 0]], self.pooled[numbers[:, 0]]
        return self.tokens[numbers].flatten(1, 2), self.pooled[numbers].mean(1)
#%%
#| export
@patch
def save(self:Prompts, folder): # prompts.safetensors and prompts.json
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tokens=self.tokens.contiguous(), pooled=self.pooled.contiguous()), folder/"prompts.safetensors")
    atomic_write(folder/"prompts.json", json.dumps(dict(words=list(self.words), length=self.length), indent=1))

@patch(cls_method=True)
def load(cls:Prompts, folder):
    about, found = json.loads((Path(folder)/"prompts.json").read_text()), load_file(Path(folder)/"prompts.safetensors")
    return cls({word: number for number, word in enumerate(about["words"])}, found["tokens"].float(), found["pooled"].float(), about["length"])

def digit_prompts(
    width:int=32, # of the embeddings
    seed:int=0,   # of the embeddings, which are random and stay as they are
)->Prompts:       # for prompts of up to three words
    "A vocabulary of digits and styles."
    words, rng = ["", *DIGITS, "plain", *STYLES], torch.Generator().manual_seed(seed)
    tokens, pooled = torch.randn(2, len(words), width, generator=rng).half().float()
    return Prompts({word: number for number, word in enumerate(words)}, tokens[:, None], pooled, 3)
#%%
#| exports
def noised(
    latents:torch.Tensor, # clean, (n, channels, height, width)
    noise:torch.Tensor,   # the same shape
    timesteps:torch.Tensor, # of scheduler.timesteps, (n,)
    scheduler,            # FlowMatchEulerDiscreteScheduler
)->tuple:                 # the points between image and noise, and sigma as (n, 1, 1, 1): 0 image, 1 noise
    "Straight lines from images to noise."
    places = torch.tensor([scheduler.index_for_timestep(t) for t in timesteps])
    return scheduler.scale_noise(latents, timesteps, noise), scheduler.sigmas[places].to(latents)[:, None, None, None]
#%%
#| exports
def flow_loss(
    model:nn.Module,      # an SD3Transformer2DModel, adapted or not
    latents:torch.Tensor, # clean, (n, channels, height, width)
    noise:torch.Tensor,   # the same shape
    timesteps:torch.Tensor, # of scheduler.timesteps, (n,)
    tokens:torch.Tensor,  # of the prompts, (n, tokens, width)
    pooled:torch.Tensor,  # of the prompts, (n, pooled width)
    scheduler,            # FlowMatchEulerDiscreteScheduler
    weighting:str="logit_normal", # as in diffusers' SD3 recipe: "sigma_sqrt", "cosmap", or any other name for weights of 1
    precondition:bool=False,      # compare images instead of velocities (the recipe's `precondition_outputs`)
)->torch.Tensor:          # a scalar
    "The flow-matching loss of SD3 (Esser et al. 2024, arXiv 2403.03206), with the targets and weights of diffusers' training script."
    points, sigma = noised(latents, noise, timesteps, scheduler)
    velocity = model(hidden_states=points, timestep=timesteps, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False)[0]
    guess, target = (points - sigma * velocity, latents) if precondition else (velocity, noise - latents)
    weight = compute_loss_weighting_for_sd3(weighting, sigmas=sigma)
    return (weight * (guess.float() - target.float())**2).mean()
#%%
#| exports
def draw_timesteps(
    n:int,           # how many
    scheduler,       # FlowMatchEulerDiscreteScheduler
    weighting:str="logit_normal", # "logit_normal", "mode", or any other name for uniform
    mean:float=0.,   # of the logit
    std:float=1.,    # of the logit
)->torch.Tensor:     # (n,) of scheduler.timesteps
    "Timesteps as SD3 draws them: mostly in the middle, where the prediction is hardest."
    u = compute_density_for_timestep_sampling(weighting, n, mean, std, 1.29)
    return scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
#%%
#| exports
@torch.no_grad()
def sample(
    model:nn.Module,      # an SD3Transformer2DModel, adapted or not
    scheduler,            # FlowMatchEulerDiscreteScheduler; it is not changed
    noise:torch.Tensor,   # where to start, (n, channels, height, width)
    prompt:tuple,         # tokens and pooled of n prompts
    empty:tuple,          # tokens and pooled of the empty prompt, n or one of them
    steps:int=12,         # of Euler's method
    guidance:float=2.,    # how far to go beyond the prompt's velocity, away from the empty prompt's; 1: not at all
)->torch.Tensor:          # (n, channels, height, width)
    "From noise to images along the learned velocity, with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."
    scheduler, x = type(scheduler).from_config(scheduler.config), noise
    scheduler.set_timesteps(steps, device=noise.device)
    both = [torch.cat([e.expand_as(p), p]) for e, p in zip(empty, prompt)] if guidance != 1 else prompt
    for t in scheduler.timesteps:
        twice = torch.cat([x, x]) if guidance != 1 else x
        velocity = model(hidden_states=twice, timestep=t.expand(len(twice)), encoder_hidden_states=both[0], pooled_projections=both[1], return_dict=False)[0]
        if guidance != 1:
            without, with_prompt = velocity.chunk(2)
            velocity = without + guidance * (with_prompt - without)
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    return x
#%%
#| exports
def digit_rows(
    styles,     # names in STYLES
    n:int,      # training images
    unseen:int, # digits that each style never shows in training, 0 to 9
    seed:int=0, # of the training images; questions stay the same
)->tuple:       # images (n, 1, 16, 16), and rows by split: prompt, style, digit, image (-1: none), seed (of the noise)
    "Images to learn styles from, and questions: digits that the style has shown (valid, test), and never (unseen); and prompts that name no style."
    hidden = {(style, (2 * s + 5 * u + 7 * (u // 2)) % 10) for s, style in enumerate(styles) for u in range(unseen)}
    images, digits, kinds = draw_digits("train", n + n * unseen // 5 + 64 * (unseen > 0), styles, 1000 + seed)
    kept = [i for i, (d, k) in enumerate(zip(digits.tolist(), kinds.tolist())) if (styles[k], d) not in hidden][:n]
    def row(style, digit, image, number): return dict(prompt=f"{DIGITS[digit]}, {style}", style=style, digit=digit, image=image, seed=number)
    train = [row(styles[kinds[i]], int(digits[i]), place, 0) for place, i in enumerate(kept)]
    pairs = [(style, digit) for style in styles for digit in range(10)]
    def ask(pairs, copies, first): return [row(style, digit, -1, first + 1000 * c + i) for c in range(copies) for i, (style, digit) in enumerate(pairs)]
    seen, never = [p for p in pairs if p not in hidden], [p for p in pairs if p in hidden]
    splits = dict(train=train, valid=ask(seen, 3, 10**5), test=ask(seen, 5, 2 * 10**5))
    if never: splits["unseen"] = ask(never, 10, 3 * 10**5)
    return images[kept], splits | dict(neutral=ask([("plain", digit) for digit in range(10)], 6, 4 * 10**5))
#%%
#| exports
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

def image_folder(
    path:str|Path,   # one folder for each style; a caption may stand beside an image, in a .txt of its name
    size:int,        # pixels of a side; another shape is cut to its middle square, then resized
    least:int=4,     # images that a style needs
    channels:int=3,  # 3 for colour, 1 for grey
)->tuple:            # images (n, channels, size, size) in [-1, 1], and for each its style and caption ("" for none)
    "Pictures to learn styles from. Raises FileNotFoundError or ValueError naming the folder or file, before anything is computed."
    from PIL import Image, ImageOps
    path = Path(path)
    if not path.is_dir(): raise FileNotFoundError(f"data = {str(path)!r} is no folder: it has to hold one folder of images for each style")
    found = {f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in IMAGES) for f in sorted(path.iterdir()) if f.is_dir() and f.name[0] != "."}
    if not any(found.values()): raise ValueError(f"data = {str(path)!r} holds no images: it has to hold one folder for each style, with {', '.join(IMAGES)}")
    for style, files_there in found.items():
        if len(files_there) < least: raise ValueError(f"style {style!r} has {len(files_there)} images in {path/style}: at least {least} are needed")
    images, about = [], []
    for style, files_there in found.items():
        for file in files_there:
            try: picture = ImageOps.exif_transpose(Image.open(file)).convert("RGB" if channels == 3 else "L")
            except (OSError, SyntaxError) as error: raise ValueError(f"{file} is no image that can be read: {error}") from None
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
            images.append(torch.from_numpy(np.array(picture, dtype="float32").reshape(size, size, channels)).permute(2, 0, 1) / 127.5 - 1)
            note = file.with_suffix(".txt")
            about.append((style, note.read_text(encoding="utf-8").strip() if note.is_file() else ""))
    return torch.stack(images), about
#%%
#| exports
def pipeline_prompts(
    backbone:str,     # a folder or hub id with Stable Diffusion 3's text encoders
    prompts:list[str],
    cache:Path,       # where embeddings are kept
    length:int=77,    # tokens of the T5 encoder, where there is one
    device="cpu",     # where to compute
)->Prompts:           # "" is among them
    "Text embeddings of whole prompts, computed once and kept; the encoders are let go before training starts."
    asked = sorted({"", *prompts})
    folder = cache/hashlib.sha256(json.dumps([str(backbone), asked, length]).encode()).hexdigest()[:16]
    if (folder/"prompts.json").is_file(): return Prompts.load(folder)
    from diffusers import StableDiffusion3Pipeline
    with at_hub("backbone", backbone): pipe = StableDiffusion3Pipeline.from_pretrained(backbone, transformer=None, vae=None).to(device)
    with torch.no_grad(): parts = [pipe.encode_prompt(p, None, None, do_classifier_free_guidance=False, max_sequence_length=length) for p in asked]
    found = Prompts({p: i for i, p in enumerate(asked)}, torch.cat([p[0] for p in parts]).float().cpu(), torch.cat([p[2] for p in parts]).float().cpu())
    found.save(folder)
    return found
#%%
#| export
def _folder(self):
    "Images and rows of a folder: its captions are asked again, if `opt.prompts` names nothing else."
    options = self.options
    images, about = image_folder(self.settings.data, options["size"], options["least"])
    def row(style, caption, image, seed):
        return dict(prompt=options["template"].format(caption=caption or "a picture", style=style), style=style, digit=-1, image=image, seed=seed)
    styles, wanted = list(dict.fromkeys(style for style, _ in about)), [p.strip() for p in options["prompts"].split(";") if p.strip()]
    wanted = wanted or list(dict.fromkeys(caption for _, caption in about))[:4]
    def ask(first): return [row(style, caption, -1, first + i) for i, (style, caption) in enumerate(itertools.product(styles, wanted))]
    return images, dict(train=[row(style, caption, i, 0) for i, (style, caption) in enumerate(about)], valid=ask(10**5), test=ask(2 * 10**5))

def _prompts(self):
    "Embeddings of all prompts of this task, read or computed once."
    local = Path(self.backbone)/"prompts"
    if local.is_dir(): return Prompts.load(local)
    rows = [row["prompt"] for found in self.folder[1].values() for row in found]
    return pipeline_prompts(self.backbone, rows, cache_dir()/"prompts", self.settings.max_length)
#%%
#| exports
SD3_LINEARS = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
log = logging.getLogger(__name__)

class DiffusionTask(Task):
    "Styles for a text-to-image transformer of SD3's kind: digits drawn in styles, or a folder of images for each style."
    unit = "images"
    ours = property(lambda self: not self.settings.data)                 # digits, drawn as they are needed
    metric = property(lambda self: "aligned" if self.ours else "clip_i")
    def __init__(self, settings):
        super().__init__(settings)
        if not settings.backbone: raise ValueError("backbone is empty: for diffusion it has to be shipped:NAME, a folder, or a hub id")
        self.options = dict(styles="", unseen=0, steps=28, guidance=7., weighting="logit_normal", precondition=True, drop=0., size=1024, prompts="", clip="", dino="",
                            template="{caption} in the style of {style}", least=4, checkpointing=False, dtype="float32") | settings.options
        if not 0 <= self.options["unseen"] <= 9: raise ValueError(f"opt.unseen = {self.options['unseen']} is out of range: allowed is 0 to 9")
        self.name = "digits" if self.ours else Path(settings.data).name
        if self.ours:
            self.styles = [s.strip() for s in self.options["styles"].split(",") if s.strip()] or list(STYLES)[:6]
            draw_digits("train", 1, self.styles, 0)                      # raises for an unknown style
        else: self.styles = list(dict.fromkeys(row["style"] for row in self.folder[1]["train"]))
    folder, prompts = functools.cached_property(_folder), functools.cached_property(_prompts)
    @functools.cached_property
    def backbone(self): # a local folder, or a hub id
        name = self.settings.backbone
        return str(shipped(name.removeprefix("shipped:"))) if name.startswith("shipped:") else name
    @functools.cached_property
    def scheduler(self):
        with at_hub("backbone", self.backbone): return FlowMatchEulerDiscreteScheduler.from_pretrained(self.backbone, subfolder="scheduler")
    @functools.cached_property
    def vae(self): # None: the transformer works on pixels
        if self.ours: return None
        from diffusers import AutoencoderKL
        with at_hub("backbone", self.backbone): return AutoencoderKL.from_pretrained(self.backbone, subfolder="vae").eval().requires_grad_(False)
#%%
#| exports
@patch
def load_data(self:DiffusionTask):
    if self.ours: self.images, splits = digit_rows(self.styles, self.settings.train_size or 1200, self.options["unseen"])
    else: self.images, splits = self.folder
    if self.settings.test_size: splits["test"] = splits["test"][:self.settings.test_size]
    self.latents = self.encode(self.images)
    rows = {split: len(found) for split, found in splits.items()}
    self.source = f"{self.name}, {len(self.images)} images in {len(self.styles)} styles ({', '.join(self.styles)}); questions: " + ", ".join(
        f"{n} {split}" for split, n in rows.items() if split != "train")
    facts = [dict(row, split=split) for split, found in splits.items() for row in found]
    self.corpus_hash = corpus_hash([*facts, hashlib.sha256(((self.images + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()).hexdigest()])
    return DatasetDict({split: Dataset.from_list(found) for split, found in splits.items()})

@patch
@torch.no_grad()
def encode(self:DiffusionTask, images): # images (n, channels, size, size) in [-1, 1] -> what the transformer learns from
    if self.vae is None: return images
    about = self.vae.config
    parts = [self.vae.encode(part).latent_dist.mode() for part in images.split(4)]
    return (torch.cat(parts) - about.shift_factor) * about.scaling_factor

@patch
@torch.no_grad()
def decode(self:DiffusionTask, latents): # the way back, to images in [-1, 1]
    if self.vae is None: return latents.clamp(-1, 1)
    about, vae = self.vae.config, self.vae.to(latents.device)
    return torch.cat([vae.decode(part).sample for part in (latents / about.scaling_factor + about.shift_factor).split(4)]).clamp(-1, 1)
#%%
#| exports
@patch
def build_model(self:DiffusionTask):
    "The pretrained transformer. Raises ValueError for a folder that holds none, ConnectionError without hub."
    dtype = getattr(torch, self.options["dtype"])
    with at_hub("backbone", self.backbone): model = SD3Transformer2DModel.from_pretrained(self.backbone, subfolder="transformer", torch_dtype=dtype)
    if self.options["checkpointing"]: model.enable_gradient_checkpointing()
    return model

@patch
def targets(self:DiffusionTask, model): # as settings.targets says, else the linear layers of attention, as in diffusers' recipe
    if self.settings.targets: return self.settings.targets
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and any(name.endswith(f".{end}") for end in SD3_LINEARS)]
#%%
#| exports
@patch
def collate(self:DiffusionTask, rows): # rows -> labels (their seeds), tokens, pooled; for training images besides: latents, noise, timesteps
    prompts = [row["prompt"] for row in rows]
    learn = rows[0]["image"] >= 0
    if learn: prompts = ["" if out else prompt for out, prompt in zip(torch.rand(len(rows)) < self.options["drop"], prompts)]
    tokens, pooled = self.prompts(prompts)
    batch = dict(labels=torch.tensor([row["seed"] for row in rows]), tokens=tokens, pooled=pooled)
    if not learn: return batch
    latents = self.latents[[row["image"] for row in rows]]
    return batch | dict(latents=latents, noise=torch.randn_like(latents), timesteps=draw_timesteps(len(rows), self.scheduler, self.options["weighting"]))

@patch
def loss(self:DiffusionTask, model, batch):
    return flow_loss(model, *(batch[name] for name in ("latents", "noise", "timesteps", "tokens", "pooled")), self.scheduler, self.options["weighting"], self.options["precondition"])

@patch
def predict(self:DiffusionTask, model, batch): # images (rows, channels, size, size) in [-1, 1]; a row's noise follows from its seed alone
    device, shape = batch["tokens"].device, self.noise_shape(model)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in batch["labels"]]).to(device)
    empty = [part.to(device) for part in self.prompts([""])]
    return self.decode(sample(model, self.scheduler, noise, (batch["tokens"], batch["pooled"]), empty, self.options["steps"], self.options["guidance"]))

@patch
def noise_shape(self:DiffusionTask, model): # of one image's noise: (channels, height, width)
    about = model.config
    side = about["sample_size"] if self.vae is None else self.options["size"] // 2**(len(self.vae.config.block_out_channels) - 1)
    return about["in_channels"], side, side
#%%
#| exports
@functools.cache
def load_judge()->Judge: # in eval mode
    "The judge that comes with the package."
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(shipped("models/digits-sd3/judge/judge.safetensors")).items()})
    return judge.eval().requires_grad_(False)

@patch
def references(self:DiffusionTask, rows): # what each picture should show
    return [dict(style=s, digit=d, prompt=p) for s, d, p in zip(rows["style"], rows["digit"], rows["prompt"])]

@patch
def metrics(self:DiffusionTask, predictions, references): # aligned: digit and style are both as asked; of a folder: CLIP and DINO
    if not self.ours: return self.similarities(predictions, references)
    judge = load_judge()
    digit, style = (logits.argmax(-1) for logits in judge(predictions))
    right = [(d.item() == r["digit"], judge.styles[s] == r["style"]) for d, s, r in zip(digit, style, references)]
    both, digits, styles = np.mean([(d and s, d, s) for d, s in right], axis=0).tolist()
    return dict(aligned=both, digit=digits, style=styles)
#%%
#| exports
def cosines(
    a:torch.Tensor, # (n, width)
    b:torch.Tensor, # (m, width)
)->torch.Tensor:    # (n, m), -1 to 1
    "All cosines between two sets of vectors."
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T

@torch.no_grad()
def clip_vectors(
    images:torch.Tensor, # (n, 3, height, width) in [-1, 1]; None: texts only
    texts:list[str],     # prompts; none: images only
    name:str="openai/clip-vit-large-patch14", # a hub id or a folder of a CLIP
    device="cpu",        # where to compute
)->tuple:                # (n, width) and (texts, width), either None
    "CLIP's vectors of images and texts (Radford et al. 2021, arXiv 2103.00020)."
    from transformers import AutoProcessor, CLIPModel
    with at_hub("opt.clip", name): model, processor = CLIPModel.from_pretrained(name).eval().to(device), AutoProcessor.from_pretrained(name)
    seen = said = None
    if images is not None:
        pictures = processor.image_processor(list(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)), return_tensors="pt")["pixel_values"]
        seen = torch.cat([model.visual_projection(model.vision_model(part.to(device)).pooler_output) for part in pictures.split(16)]).cpu()
    if texts:
        words = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        said = model.text_projection(model.text_model(**words).pooler_output).cpu()
    return seen, said

@torch.no_grad()
def dino_vectors(
    images:torch.Tensor, # (n, 3, height, width) in [-1, 1]
    name:str="facebook/dinov2-base", # a hub id or a folder of a DINOv2
    device="cpu",        # where to compute
)->torch.Tensor:         # (n, width): the class token after the last layer norm
    "DINOv2's vectors of images (Oquab et al. 2023, arXiv 2304.07193)."
    from transformers import AutoImageProcessor, AutoModel
    with at_hub("opt.dino", name): model, processor = AutoModel.from_pretrained(name).eval().to(device), AutoImageProcessor.from_pretrained(name)
    pictures = processor(list(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)), return_tensors="pt")["pixel_values"]
    return torch.cat([model(part.to(device)).pooler_output for part in pictures.split(16)]).cpu()
#%%
#| exports
@patch
def similarities(
    self:DiffusionTask,
    images:torch.Tensor,   # generated, (n, 3, height, width) in [-1, 1]
    references:list[dict], # prompt and style of each
)->dict[str, float]:       # cosines, not scaled: clip_t, clip_i, dino
    "CLIP-T: with the prompt. CLIP-I and DINO: with the training images of the style, averaged over all pairs of a style, then over images."
    names = {key: self.options[key] or default for key, default in dict(clip="openai/clip-vit-large-patch14", dino="facebook/dinov2-base").items()}
    seen, said = clip_vectors(images, [r["prompt"] for r in references], names["clip"])
    own, place = clip_vectors(self.images, [], names["clip"])[0], [r["style"] for r in references]
    of = {style: [i for i, row in enumerate(self.folder[1]["train"]) if row["style"] == style] for style in self.styles}
    close = lambda a, b: float(np.mean([cosines(a[i:i+1], b[of[style]]).mean().item() for i, style in enumerate(place)]))
    return dict(clip_t=(F.normalize(seen, dim=-1) * F.normalize(said, dim=-1)).sum(-1).mean().item(), clip_i=close(seen, own),
                dino=close(dino_vectors(images, names["dino"]), dino_vectors(self.images, names["dino"])))
#%%
#| exports
def questions(
    task:DiffusionTask,
    styles,         # whose
    copies:int,     # of each digit
    first:int,      # the first noise seed: other questions elsewhere
    style:str="",   # say this style in the prompt instead of its own; "plain" names none
)->Dataset:         # rows as `predict_rows` takes them
    "Prompts for digits in styles, with noise of their own."
    return Dataset.from_list([dict(prompt=f"{digit}, {style or s}", style=s, digit=d, image=-1, seed=first + 10 * (copies * i + c) + d)
                              for i, s in enumerate(styles) for c in range(copies) for d, digit in enumerate(DIGITS)])

@torch.no_grad()
def style_writes(
    task:DiffusionTask,
    model:nn.Module,     # with STAN adapters
    copies:int=2,        # of each digit in each style
    first:int=5 * 10**5, # the first noise seed
)->dict:                 # layer -> (styles, num_latents): mean norm of what a latent writes while that style is drawn
    "What the latents of each layer write, style by style, over all steps and tokens of a generation."
    found = {}
    for style in task.styles:
        with record(model) as kept: predict_rows(task, model, questions(task, [style], copies, first), progress=False)
        for name, adapter in find_adapters(model).items():
            total = torch.zeros(adapter.num_latents)
            for values, indices in kept[name]:
                half = len(values) // 2 if task.options["guidance"] != 1 else 0      # the first half is the empty prompt
                total.index_add_(0, indices[half:].flatten().cpu(), values[half:].abs().flatten().cpu().float())
            norms = adapter.decoder.norm(dim=-1).cpu() * adapter.scaling
            found.setdefault(name, []).append(total * norms / sum(v[len(v)//2:].shape[:-1].numel() for v, _ in kept[name]))
    return {name: torch.stack(rows) for name, rows in found.items()}

def own_latents(
    writes:dict, # of `style_writes`
    style:int,   # number of the style
    share:float, # of all writing, over styles, that has to be this style's; 1/styles for a latent without preference
)->dict:         # layer -> latents
    "The latents that write mostly for one style."
    chosen = {name: torch.where(w[style] > share * w.sum(0).clamp_min(1e-9))[0].tolist() for name, w in writes.items()}
    return {name: latents for name, latents in chosen.items() if latents}
