"STAN as a PEFT method, on tiny random models: whatever PEFT, transformers and diffusers do with a method, they do with STAN."
import copy, importlib, json, warnings
from dataclasses import replace

import pytest, torch
from peft import (AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model,
                  set_peft_model_state_dict)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config,
                          T5ForConditionalGeneration, Trainer, TrainingArguments, logging)

import stan_nb.peft as stan_peft
from stan_nb.hooks import ablate, record
from stan_nb.peft import StanConfig, StanLayer, StanModel, check_adapter, fingerprint, from_lora, load_adapter, set_k

logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")


class MLP(nn.Module):
    def __init__(self, width=20):
        super().__init__()
        self.up, self.down = nn.Linear(10, width), nn.Linear(width, 4)

    def forward(self, x): return self.down(torch.relu(self.up(x)))


def mlp(seed=0, width=20):
    torch.manual_seed(seed)
    return MLP(width).eval()


def bert(seed=0, **kw):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    others = dict(max_position_embeddings=32, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    return BertForSequenceClassification(BertConfig(**sizes | others | kw)).eval()


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
                                        intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                                      pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def t5(seed=0):
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2,
                                               decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)).eval()


IDS = torch.arange(3, 33).view(3, 10)
CASES = dict(
    mlp=(mlp, ["up", "down"], lambda m: m(torch.linspace(-1, 1, 30).view(3, 10))),
    bert=(bert, ["query", "value", "dense"], lambda m: m(input_ids=IDS).logits),
    llama=(llama, "all-linear", lambda m: m(input_ids=IDS).logits),
    gpt2=(gpt2, ["c_attn", "c_fc"], lambda m: m(input_ids=IDS).logits),
    t5=(t5, ["q", "v", "wo"], lambda m: m(input_ids=IDS, decoder_input_ids=IDS).logits))


def config(targets=("up",), **kw):
    targets = list(targets) if isinstance(targets, tuple) else targets
    return StanConfig(**dict(num_latents=8, k=2, target_modules=targets) | kw)


@pytest.fixture(params=CASES)
def case(request): return CASES[request.param]


# -- every architecture -----------------------------------------------------------------------------

@torch.no_grad()   # T5's attention bias would need a gradient in the frozen model only, and attention then takes another kernel
def test_starts_as_the_frozen_model_and_disables_to_it(case):
    make, targets, run = case
    frozen = run(make())
    model = get_peft_model(make(), config(targets))
    assert torch.equal(run(model), frozen)
    model = get_peft_model(make(), config(targets, init_weights=False))
    assert not torch.equal(run(model), frozen)
    with model.disable_adapter(): assert torch.equal(run(model), frozen)
    assert torch.equal(run(model.unload()), frozen)


@pytest.mark.parametrize("options", [
    {}, dict(select="relu", encoder_bias=True), dict(select="value", latents_pattern={"(up|query|q_proj|c_attn|q)": 12})])
def test_trains_saves_and_loads_bit_exactly(case, tmp_path, options):
    make, targets, run = case
    model = get_peft_model(make(), config(targets, stan_dropout=.1, **options))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.05)
    model.train()
    for _ in range(2):
        run(model).float().square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    model.eval()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all("stan_sae" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    for load in (lambda: load_adapter(make(), tmp_path), lambda: PeftModel.from_pretrained(make(), tmp_path),
                 lambda: PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)):
        again = load()
        assert torch.equal(run(again), run(model))
        assert not any(p.requires_grad for p in again.parameters())
    assert all(p.requires_grad for n, p in load_adapter(make(), tmp_path, is_trainable=True).named_parameters() if "stan_sae" in n)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_becomes_the_same_stan(case, tmp_path, rslora):
    make, targets, run = case
    torch.manual_seed(1)
    patterns = {} if targets == "all-linear" else dict(rank_pattern={targets[0]: 6}, alpha_pattern={targets[-1]: 5})
    plain = dict(r=4, lora_alpha=3, init_lora_weights=False, target_modules=targets)
    lora = get_peft_model(make(), LoraConfig(use_rslora=rslora, **plain, **patterns)).eval()
    lora.save_pretrained(tmp_path/"lora")
    from_lora(tmp_path/"lora", tmp_path/"stan")
    model = load_adapter(make(), tmp_path/"stan")
    torch.testing.assert_close(run(model), run(lora), rtol=1e-4, atol=1e-5)


def test_mixed_batch(case):
    make, targets, run = case
    torch.manual_seed(0)
    model = get_peft_model(make(), config(targets, init_weights=False), "one")
    model.add_adapter("two", config(targets, num_latents=16, k=5, init_weights=False))
    rows = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        rows[name] = run(model)
    with model.disable_adapter(): rows["__base__"] = run(model)
    model.eval()
    names = ["two", "__base__", "one"]
    got = run(lambda *a, **kw: model(*a, **kw, adapter_names=names))
    torch.testing.assert_close(got, torch.stack([rows[n][i] for i, n in enumerate(names)]), rtol=1e-5, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="non-existing adapter.*three"): run(lambda *a, **kw: model(*a, **kw, adapter_names=["three"] * 3))
    model.train()
    with pytest.raises(ValueError, match="training mode"): run(lambda *a, **kw: model(*a, **kw, adapter_names=names))


@pytest.mark.parametrize("make", [llama, t5])
def test_mixed_batch_with_beams(make):
    torch.manual_seed(0)
    model = get_peft_model(make(), StanConfig(init_weights=False, alpha=200), "one")   # default targets of the architecture
    model.add_adapter("two", StanConfig(init_weights=False, alpha=200))
    model.eval()
    kw = dict(input_ids=IDS, num_beams=2, max_new_tokens=4, do_sample=False)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = model.generate(**kw)
    mixed = model.generate(**kw, adapter_names=["one", "two", "one"])
    width = min(mixed.shape[1], *(a.shape[1] for a in alone.values()))
    for i, name in enumerate(["one", "two", "one"]): assert torch.equal(mixed[i, :width], alone[name][i, :width])


# -- several adapters, and what belongs to an adapter -----------------------------------------------

def test_adapters_switch_add_up_and_are_deleted(tmp_path):
    run = CASES["mlp"][2]
    model = get_peft_model(mlp(), config(init_weights=False), "one")
    only_one = run(model)
    model.add_adapter("two", config(("up", "down"), init_weights=False))
    assert torch.equal(run(model), only_one)
    model.set_adapter("two")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"two"}
    model.base_model.set_adapter(["one", "two"])
    layer, x = model.base_model.model.up, torch.randn(5, 10)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), layer.stan_sae["one"](x) + layer.stan_sae["two"](x))
    model.set_adapter("one")
    model.save_pretrained(tmp_path)   # the active one and the other, a folder each
    assert torch.equal(run(load_adapter(mlp(), tmp_path/"one")), only_one)
    model.delete_adapter("two")
    assert torch.equal(run(model), only_one) and "two" not in str(model)
    with pytest.raises(ValueError, match="'one' already"): load_adapter(model, tmp_path/"one", "one")
    load_adapter(model, tmp_path/"two", "again")
    assert model.active_adapters == ["one"] and torch.equal(run(model), only_one)


def test_modules_to_save(tmp_path):
    run = CASES["bert"][2]
    model = get_peft_model(bert(), config(["query"], task_type="SEQ_CLS"))
    nn.init.ones_(model.base_model.model.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load_adapter(bert(), tmp_path)), run(model))
    state = load_file(tmp_path/"adapter_model.safetensors")
    save_file({n: t for n, t in state.items() if not n.endswith("classifier.weight")}, tmp_path/"adapter_model.safetensors")
    with pytest.raises(ValueError, match="misses classifier.weight"): load_adapter(bert(), tmp_path)
    save_file(state, tmp_path/"adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(2, 16\), this model's is \(5, 16\)"):
        load_adapter(bert(num_labels=5), tmp_path)


def adapted_names(model): return {n for n, m in model.base_model.model.named_modules() if isinstance(m, StanLayer)}


def test_where_it_goes():
    def names(**kw): return adapted_names(get_peft_model(llama(), StanConfig(**kw)))
    linear = {n for n, m in llama().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert names(target_modules="all-linear") == linear
    assert names(target_modules="all-linear", exclude_modules=["q_proj"]) == {n for n in linear if not n.endswith("q_proj")}
    assert names(target_modules=["q_proj"], layers_to_transform=[0, 2]) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)}
    assert names(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers") == {"model.layers.1.self_attn.q_proj"}
    assert names(target_modules=r".*\.1\.mlp\.(up|down)_proj") == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    assert names() == {n for n in linear if n.endswith(("q_proj", "v_proj"))}                       # LoRA's defaults


def test_patterns():
    model = get_peft_model(llama(), config(["q_proj", "v_proj"], latents_pattern={"layers.0.self_attn.q_proj": 16}, k_pattern={"q_proj": 4},
                                           alpha_pattern={"^model.layers.1.self_attn.v_proj": 2}))
    got = {n: m.stan_sae["default"] for n, m in model.base_model.model.named_modules() if isinstance(m, StanLayer)}
    assert {(n[13:14], n[-6:], a.num_latents, a.k, a.alpha) for n, a in got.items()} == {
        ("0", "q_proj", 16, 4, 16.), ("1", "q_proj", 8, 4, 16.), ("2", "q_proj", 8, 4, 16.),
        ("0", "v_proj", 8, 2, 16.), ("1", "v_proj", 8, 2, 2.), ("2", "v_proj", 8, 2, 16.)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    x = torch.randn(3, 10).to(dtype)
    model = get_peft_model(mlp().to(dtype), config(init_weights=False))
    adapter = model.base_model.model.up.stan_sae["default"]
    assert adapter.encoder.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and model(x).dtype == dtype
    model = get_peft_model(mlp().to(dtype), config(init_weights=False), autocast_adapter_dtype=False)
    assert model.base_model.model.up.stan_sae["default"].encoder.dtype == dtype and model(x).dtype == dtype
    model = get_peft_model(mlp(), config(init_weights=False))
    with torch.autocast("cpu", dtype=torch.bfloat16): assert model(torch.randn(3, 10)).dtype == torch.bfloat16


def test_hooks_work_in_a_peft_model():
    model, x = get_peft_model(mlp(), config(init_weights=False)), torch.randn(3, 10)
    before = model(x)
    with record(model) as seen: model(x)
    assert [v[0][0].shape for v in seen.values()] == [(3, 2)]
    with ablate(model, list(range(8))), torch.no_grad(): off = model(x)
    with model.disable_adapter(): torch.testing.assert_close(off, model(x))
    assert torch.equal(model(x), before)


def test_compiles_without_graph_breaks():
    model, x = get_peft_model(mlp(), config(("up", "down"), init_weights=False)), torch.randn(3, 10)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    def gradients(checkpointing):
        model = get_peft_model(llama(), config("all-linear", init_weights=False, task_type="CAUSAL_LM")).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(0); plain = gradients(False)
    torch.manual_seed(0); again = gradients(True)
    for name, grad in plain.items(): torch.testing.assert_close(again[name], grad)


def test_trainer_resumes_to_the_same_weights(tmp_path):
    data = [dict(input_ids=[3 + (7*i + j) % 40 for j in range(8)], labels=i % 2) for i in range(16)]

    def train(where, resume=None):
        torch.manual_seed(0)
        model = get_peft_model(bert(), config(["query", "value"], task_type="SEQ_CLS", stan_dropout=.1))
        args = TrainingArguments(where, per_device_train_batch_size=4, max_steps=8, save_steps=4, learning_rate=1e-2, report_to=[],
                                 use_cpu=True, seed=0, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False)
        trainer = Trainer(model, args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return get_peft_model_state_dict(model)
    whole = train(tmp_path/"a")
    resumed = train(tmp_path/"b", resume=str(tmp_path/"a"/"checkpoint-4"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)


# -- other libraries' ways in -----------------------------------------------------------------------

def test_transformers_add_save_load(tmp_path):
    run = CASES["bert"][2]
    model = bert()
    frozen = run(model)
    model.add_adapter(config(["query", "value"], init_weights=False), "mine")
    adapted = run(model)
    model.disable_adapters()
    assert torch.equal(run(model), frozen) and not torch.equal(adapted, frozen)
    model.enable_adapters()
    set_k(model, 1, "mine")
    adapted = run(model)
    model.save_pretrained(tmp_path)
    again = bert()
    again.load_adapter(tmp_path, "theirs")
    assert torch.equal(run(again), adapted) and again.active_adapters() == ["theirs"]
    assert torch.equal(run(load_adapter(bert(), tmp_path)), adapted)      # one format for both


def test_diffusers_adapters_and_scales():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8).eval()
    inputs = dict(hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 3, 16),
                  pooled_projections=torch.randn(1, 16), timestep=torch.tensor([5]))

    @torch.no_grad()
    def run(**kw): return model(**inputs, **kw).sample
    frozen = run()
    for name in ("ink", "chalk"): model.add_adapter(config(["to_q", "to_v"], init_weights=False), name)
    model.set_adapter("ink")
    ink = run()
    assert not torch.equal(ink, frozen)
    torch.testing.assert_close(run(joint_attention_kwargs=dict(scale=0.)), frozen)     # scale_layer, unscale_layer
    assert torch.equal(run(), ink)
    model.set_adapters(["ink", "chalk"], [1., 0.])
    torch.testing.assert_close(run(), ink)
    model.set_adapters(["ink", "chalk"], [.5, .5])
    assert not torch.allclose(run(), ink)
    model.set_adapters("ink")
    torch.testing.assert_close(run(), ink)
    model.delete_adapters("chalk")
    model.disable_adapters()
    torch.testing.assert_close(run(), frozen)


def test_low_level_injection():
    model = inject_adapter_in_model(config(init_weights=False), mlp())
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(config(("down",)), mlp(), state_dict=state)        # the tensors say where, not the config
    assert {n for n, m in other.named_modules() if isinstance(m, StanLayer)} == {"up"}


# -- refusals: nothing may change -------------------------------------------------------------------

def same_modules(a, b): return [(n, type(m)) for n, m in a.named_modules()] == [(n, type(m)) for n, m in b.named_modules()]


def test_merge_is_refused_before_anything_happens():
    model = get_peft_model(mlp(), config(init_weights=False))
    before = copy.deepcopy(model.state_dict())
    layer = model.base_model.model.up
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True), layer.merge,
                  lambda: layer.get_delta_weight("default")):
        with pytest.raises(ValueError, match="cannot be merged"): merge()
    model.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("bad, message", [
    (dict(num_latents=0), "num_latents must be a whole number >= 1, got 0"), (dict(num_latents="8"), "whole number"),
    (dict(k=0), "k must be a whole number >= 1"), (dict(k=9), r"1\.\.8 \(num_latents\), got 9"), (dict(k=2.5), "whole number"),
    (dict(k=True), "whole number"), (dict(alpha=0), "alpha must be a finite number > 0"), (dict(alpha=float("nan")), "got nan"),
    (dict(alpha=float("inf")), "got inf"), (dict(alpha=None), "got None"), (dict(stan_dropout=1.), "stan_dropout < 1"),
    (dict(stan_dropout=-.1), "stan_dropout"), (dict(stan_dropout=float("nan")), "stan_dropout"),
    (dict(select="max"), "select must be one of"), (dict(k_pattern={"up": 0}), r"k_pattern\['up'\]"),
    (dict(k_pattern={"up": 9}), "k_pattern"), (dict(k_pattern=[2]), "k_pattern must be a dict"),
    (dict(latents_pattern={"(": 2}), "regular expression"), (dict(alpha_pattern={"up": float("nan")}), "alpha_pattern"),
    (dict(target_modules="up", layers_to_transform=[0]), "layers_to_transform"), (dict(layers_pattern="layers"), "layers_pattern"),
    (dict(task_type="POETRY"), "Invalid task type"), (dict(r=8), r"'r'\. Did you mean num_latents \(and k\)"), (dict(lora_alpha=8), "Did you mean alpha"),
    (dict(lora_dropout=.1), "Did you mean stan_dropout"), (dict(num_latent=8), "Did you mean num_latents.* Allowed are")])
def test_bad_options(bad, message):
    with pytest.raises((ValueError, TypeError), match=message): StanConfig(**dict(num_latents=8, k=2) | bad)


@pytest.mark.parametrize("bad, message", [
    (dict(target_modules=["upp"]), r"not found in the base model.*Near names: up\."),
    (dict(target_modules="u.."), "Near names: down, up"),
    (dict(target_modules=["up", "down"], latents_pattern={"down": 1}), "down: k must be in 1..1"),
    (dict(target_modules=None), "specify `target_modules`"),
    (dict(target_modules=["up"], exclude_modules=["up"]), "excluded")])
def test_bad_targets(bad, message):
    model = mlp()
    with pytest.raises(ValueError, match=message): get_peft_model(model, StanConfig(**dict(num_latents=8, k=2) | bad))
    assert same_modules(model, mlp()) and all(p.requires_grad for p in model.parameters())
    adapted = get_peft_model(mlp(), config())
    before = str(adapted)
    with pytest.raises(ValueError, match=message): adapted.add_adapter("two", StanConfig(**dict(num_latents=8, k=2) | bad))
    assert str(adapted) == before and list(adapted.peft_config) == ["default"]


def test_a_newer_file_s_fields_are_passed_over(tmp_path):
    "PEFT drops what an older version does not know, with a warning; it recognises our error by its words."
    config().save_pretrained(tmp_path)
    file = tmp_path/"adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"): assert StanConfig.from_pretrained(tmp_path).num_latents == config().num_latents
    assert copy.deepcopy(config()) == config()


@pytest.mark.parametrize("own", ["", "---\nlibrary_name: other\n---\n# My notes\n\nKeep me.\n", "# No front matter\n"])
def test_a_saved_adapter_says_how_it_is_loaded(tmp_path, own):
    model = get_peft_model(mlp(), config())
    if own: (tmp_path/"README.md").write_text(own)
    for _ in range(2): model.save_pretrained(tmp_path)
    text = (tmp_path/"README.md").read_text()
    assert text.count("# A STAN adapter") == 1 and "load_adapter" in text and "stan_nb" in text.split("# A STAN adapter")[1]
    assert text.startswith("---\n") and text.index("\n---\n") < text.index("# A STAN adapter") < (text.index(own.splitlines()[-1]) if own else len(text))
    model.add_adapter("two", config())
    model.save_pretrained(tmp_path)
    assert "load_adapter" in (tmp_path/"two"/"README.md").read_text()


def test_models_and_folders_that_change_places(tmp_path):
    model = get_peft_model(mlp(), config())
    model.save_pretrained(tmp_path/"a")
    with pytest.raises(TypeError, match="path must be an adapter folder .* got PeftModel"): from_lora(model)
    with pytest.raises(TypeError, match="folder must be an adapter folder"): from_lora(tmp_path/"a", 3)
    with pytest.raises(TypeError, match="model must be the base model"): load_adapter(str(tmp_path/"a"), mlp())
    with pytest.raises(TypeError, match="path must be an adapter folder"): load_adapter(mlp(), model)
    with pytest.raises(TypeError, match="k must be a whole number"): set_k(model, "2")


def test_one_target_of_several_that_misses_is_mentioned():
    with pytest.warns(UserWarning, match="'dwn' matched no module. Near names: down"): get_peft_model(mlp(), config(("up", "dwn")))


def test_modules_that_cannot_be_adapted():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mha, self.emb, self.conv = nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)
    refused = dict(out_proj="reads its weight without calling it", mha="got MultiheadAttention", emb="got Embedding", conv="got Conv1d")
    for target, why in refused.items():
        model = Odd()
        with pytest.raises(ValueError, match=why): get_peft_model(model, StanConfig(target_modules=["first", target]))
        assert same_modules(model, Odd())
    assert adapted_names(get_peft_model(Odd(), StanConfig(target_modules="all-linear"))) == {"first"}


def test_the_fused_path_of_torch_s_encoder_is_switched_off():
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        frozen = base(x)
        model = get_peft_model(base, StanConfig(num_latents=8, k=2, target_modules=["linear1"], init_weights=False))
        adapted = model(x)
        assert not torch.allclose(adapted, frozen)
        torch.testing.assert_close(model.unload()(x), frozen)
    assert base.use_nested_tensor or not hasattr(base, "use_nested_tensor")


@pytest.fixture
def folder(tmp_path):
    get_peft_model(bert(), config(["query", "value"], init_weights=False)).save_pretrained(tmp_path/"good")
    return tmp_path/"good"


def damage(folder, kind):
    file = folder/"adapter_model.safetensors"
    state = load_file(file)
    name = sorted(state)[0]
    if kind == "truncated": file.write_bytes(file.read_bytes()[:1500])
    elif kind == "empty": file.write_bytes(b"")
    elif kind == "config": (folder/"adapter_config.json").write_text('{"peft_type": "STAN", ')
    elif kind == "no file": file.unlink()
    else: save_file(dict(
        shape=state | {name: state[name][:4].clone()}, wide=state | {name: torch.zeros(8, 99)},
        nan=state | {name: state[name] * float("nan")}, inf=state | {name: state[name] / 0},
        tensor={n: t for n, t in state.items() if n != name}, layer={n: t for n, t in state.items() if "layer.1" not in n},
        stranger=state | {name.replace("layer.0", "layer.7"): state[name].clone()}, none={"other": state[name]})[kind], file)


@pytest.mark.parametrize("kind, message", dict(
    truncated="truncated or damaged", empty="truncated or damaged", shape="expected 8 rows", wide="99 features", nan="NaN or inf",
    inf="NaN or inf", tensor="holds encoder; expected", layer="misses the tensors of 2 layers", stranger="holds decoder; expected",
    none="no STAN tensors").items())
def test_damaged_folders(folder, kind, message):
    damage(folder, kind)
    for load in (load_adapter, PeftModel.from_pretrained):
        model = bert()
        with pytest.raises(ValueError, match=message): load(model, folder)
        assert same_modules(model, bert()) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=message): load_adapter(bert(), folder, is_trainable=True)
    adapted = get_peft_model(bert(), config(["key"], init_weights=False))
    before, state = str(adapted), copy.deepcopy(adapted.state_dict())
    with pytest.raises(ValueError, match=message): adapted.load_adapter(folder, "two")
    assert str(adapted) == before and all(torch.equal(t, state[n]) for n, t in adapted.state_dict().items())


def test_incomplete_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"): load_adapter(bert(), tmp_path/"nowhere")
    damage(folder, "no file")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"): load_adapter(bert(), folder)
    damage_config = folder/"adapter_config.json"
    options = json.loads(damage_config.read_text())
    damage_config.write_text(json.dumps(options | {"k": 99}))
    (folder/"adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="k must be in"): load_adapter(bert(), folder)
    damage_config.write_text("{")
    with pytest.raises(ValueError, match="truncated or damaged"): load_adapter(bert(), folder)
    damage_config.write_text(json.dumps(options | {"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="a LORA adapter, expected STAN"): load_adapter(bert(), folder)


@pytest.mark.parametrize("other, message", [
    (dict(hidden_size=32), "of another base model"), (dict(num_hidden_layers=3), "misses the tensors of 2 layers"),
    (dict(num_hidden_layers=1), "this model does not adapt")])
def test_another_base_model(folder, other, message):
    for load in (load_adapter, PeftModel.from_pretrained, lambda *a: PeftModel.from_pretrained(*a, is_trainable=True)):
        model = bert(**other)
        with pytest.raises(ValueError, match=message): load(model, folder)
        assert same_modules(model, bert(**other))


def test_the_same_shape_with_other_weights(folder):
    model = bert(seed=1)
    with pytest.raises(ValueError, match="trained on other base weights"): load_adapter(model, folder)
    assert same_modules(model, bert())
    with pytest.warns(UserWarning, match="other base weights"): PeftModel.from_pretrained(bert(seed=1), folder)
    load_adapter(bert(seed=1), folder, check_base=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapter(bert().bfloat16(), folder)                                # rounding is not another model
    assert fingerprint(bert().to("meta"), ["bert.pooler.dense"]) == [None]


def test_loading_over_a_live_adapter_is_checked_first(folder):
    model = get_peft_model(bert(), config(["query", "value"], init_weights=False))
    before = copy.deepcopy(model.state_dict())
    state = load_file(folder/"adapter_model.safetensors")
    poisoned, halved = {n: t * float("nan") for n, t in state.items()}, {n: t[:4].clone() for n, t in state.items()}
    for bad in (poisoned, halved, dict(list(state.items())[:-1])):
        with pytest.raises(ValueError): set_peft_model_state_dict(model, bad)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    set_peft_model_state_dict(model, state)


# -- LoRA, k, configs -------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (dict(use_dora=True), "use_dora"), (dict(bias="all"), "bias='all'"), (dict(lora_bias=True), "lora_bias"),
    (dict(init_lora_weights="pissa"), "changed the base weights"), (dict(init_lora_weights="olora"), "changed the base weights")])
def test_loras_that_are_more_than_lora(tmp_path, options, message):
    get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up"], **options)).save_pretrained(tmp_path/"lora")
    with pytest.raises(ValueError, match=message): from_lora(tmp_path/"lora", tmp_path/"stan")
    assert not (tmp_path/"stan").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["lora"]


def test_other_adapters_are_no_lora(tmp_path):
    get_peft_model(mlp(), AdaLoraConfig(target_modules=["up"], total_step=10)).save_pretrained(tmp_path/"ada")
    with pytest.raises(ValueError, match="ADALORA adapter, expected LORA"): from_lora(tmp_path/"ada")
    get_peft_model(gpt2(), LoraConfig(target_modules=["wte"])).save_pretrained(tmp_path/"emb")
    with pytest.raises(ValueError, match="only LoRA on linear layers"): from_lora(tmp_path/"emb")
    with pytest.raises(FileNotFoundError): from_lora(tmp_path/"nowhere")


@pytest.mark.parametrize("kind, message", dict(
    truncated="truncated", nan="NaN or inf", inf="NaN or inf", tensor="no matching pair", shape="no matching pair").items())
def test_damaged_loras(tmp_path, kind, message):
    get_peft_model(bert(), LoraConfig(r=8, target_modules=["query", "value"], init_lora_weights=False)).save_pretrained(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(ValueError, match=message): from_lora(tmp_path)


def test_lora_with_a_trained_head(tmp_path):
    lora = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], init_lora_weights=False)).eval()
    nn.init.ones_(lora.base_model.model.classifier.modules_to_save["default"].weight)
    lora.save_pretrained(tmp_path/"lora")
    from_lora(tmp_path/"lora", tmp_path/"stan")
    run = CASES["bert"][2]
    torch.testing.assert_close(run(load_adapter(bert(), tmp_path/"stan")), run(lora), rtol=1e-4, atol=1e-5)


def test_set_k(tmp_path):
    run = CASES["mlp"][2]
    options = dict(k=6, alpha=12, latents_pattern={"up": 16}, k_pattern={"up": 12}, init_weights=False)
    model = get_peft_model(mlp(), config(("up", "down"), **options))
    set_k(model, 3)
    adapters = [m.stan_sae["default"] for m in model.modules() if isinstance(m, StanLayer)]
    assert [(a.k, round(a.scaling, 6)) for a in adapters] == [(3, 1.), (3, 2.)]        # up was 12/12, down 12/6
    model.save_pretrained(tmp_path)
    again = load_adapter(mlp(), tmp_path)
    assert torch.equal(run(again), run(model)) and again.peft_config["default"].k == 3
    set_k(model, 6, keep_scaling=False)
    assert [round(a.scaling, 6) for a in adapters] == [.5, 1.]
    before = run(model)
    for bad in (0, 9, 2.5):
        with pytest.raises((ValueError, TypeError)): set_k(model, bad)
    assert torch.equal(run(model), before)
    with pytest.raises(ValueError, match="'other'"): set_k(model, 2, "other")


def test_the_config_survives_json(tmp_path):
    one = config(("up", "down"), latents_pattern={"up": 4}, alpha_pattern={"up": 2.}, exclude_modules=["x", "a"], modules_to_save=["head"])
    one.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == one == StanConfig.from_pretrained(tmp_path) == replace(one)
    assert json.loads((tmp_path/"adapter_config.json").read_text())["target_modules"] == ["down", "up"]


def test_running_the_cell_again_is_safe():
    "A second definition of the classes takes over everywhere; the first one's modules keep working."
    old = get_peft_model(mlp(), config(init_weights=False))
    before = CASES["mlp"][2](old)
    tables = [stan_peft, *(getattr(stan_peft, name) for name in vars(stan_peft) if name.startswith("PEFT_TYPE_TO_"))]
    kept = [dict(vars(table) if table is stan_peft else table) for table in tables]
    try:
        new = importlib.reload(stan_peft)
        model = get_peft_model(mlp(), new.StanConfig(num_latents=8, k=2, target_modules=["up"], init_weights=False))
        model.add_adapter("two", new.StanConfig(num_latents=8, k=2, target_modules=["up"], init_weights=False))
        assert type(model.base_model) is new.StanModel is not StanModel
        model.set_adapter("two")
        assert model.base_model.model.up.active_adapters == ["two"]
        assert torch.equal(CASES["mlp"][2](old), before)
    finally:                                     # module and tables get back what this file and others imported from them
        for table, former in zip(tables, kept): (vars(table) if table is stan_peft else table).update(former)


@pytest.mark.parametrize("pattern", [dict(latents_pattern={"upp": 6}), dict(k_pattern={"upp": 1, "down": 1})])
def test_pattern_keys_that_fit_nothing_are_named(pattern):
    with pytest.warns(RuntimeWarning, match="'upp' matched no adapted layer") as caught: get_peft_model(mlp(), config(("up", "down"), **pattern))
    assert not any("'down'" in str(w.message) for w in caught)


def test_input_casting_can_be_switched_off_as_diffusers_does():
    from peft.helpers import disable_input_dtype_casting
    model, run = get_peft_model(mlp(), config(init_weights=False)), CASES["mlp"][2]
    before = run(model)
    with disable_input_dtype_casting(model): assert torch.equal(run(model), before)
    assert all(m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, StanLayer))
