"SoRA as a PEFT method, on tiny random models: gates reach exact zero, pruning changes nothing but the size, merging works, and nothing is half done."
import json

import pytest, torch
from hypothesis import given, strategies as st
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, save_as_lora
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, logging

from stan_nb.peft import StanConfig, StanLayer
from stan_nb.sora import SoraConfig, SoraLayer, gate_penalty, gates, official_threshold, prox_step, prune, soft_threshold, sora_layers

logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(10, 20), nn.Linear(20, 4)

    def forward(self, x): return self.down(torch.relu(self.up(x)))


def seeded(make):
    def again(seed=0):
        torch.manual_seed(seed)
        return make().eval()
    return again


mlp = seeded(MLP)
bert = seeded(lambda: BertForSequenceClassification(BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32,
    hidden_dropout_prob=0., attention_probs_dropout_prob=0.)))
llama = seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                    num_key_value_heads=2, intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)))
gpt2 = seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)))
IDS = torch.arange(3, 33).view(3, 10)
CASES = dict(
    mlp=(mlp, ["up", "down"], lambda m: m(torch.linspace(-1, 1, 30).view(3, 10))),
    bert=(bert, ["query", "value", "dense"], lambda m: m(input_ids=IDS).logits),
    llama=(llama, "all-linear", lambda m: m(input_ids=IDS).logits),
    gpt2=(gpt2, ["c_attn", "c_fc"], lambda m: m(input_ids=IDS).logits))       # Conv1D


@pytest.fixture(params=CASES)
def case(request): return CASES[request.param]


def config(targets=("up",), **kw): return SoraConfig(**dict(r=6, target_modules=list(targets) if isinstance(targets, tuple) else targets, init_weights=False) | kw)


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- the threshold ----------------------------------------------------------------------------------

numbers, thresholds = st.floats(-4, 4, width=32), st.floats(0, 2, width=32)


@given(numbers, numbers, thresholds)
def test_soft_threshold(a, b, xi):
    one, two = (soft_threshold(torch.tensor([v]), xi).item() for v in (a, b))
    assert (one == 0) == (abs(torch.tensor(a).item()) <= torch.tensor(xi).item()) and one * a >= 0 and abs(one) <= abs(a)
    assert abs(one - two) <= abs(a - b) + 1e-6                                    # proximal operators never move points apart


@given(numbers, thresholds.filter(lambda xi: xi > 1e-3))
def test_official_threshold_is_the_three_assignments(v, xi):
    v, xi = torch.tensor([v], dtype=torch.float64), float(xi)
    expected = v.clone()
    expected[expected > xi] -= xi
    expected[expected < -xi] += xi
    expected[expected.abs() < xi] = 0.
    if float(v.abs()) != xi: assert torch.equal(official_threshold(v, xi).abs(), expected.abs())


# -- gates ------------------------------------------------------------------------------------------

def train(model, run, weight=.1, xi=.02, steps=40, prox="soft"):
    "Pull everything to a constant, gates to zero."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.)
    model.train()
    for _ in range(steps):
        ((run(model) - 1).square().mean() + weight * gate_penalty(model)).backward()
        optimizer.step(), optimizer.zero_grad()
        prox_step(model, xi, prox)
    return model.eval()


@torch.no_grad()
def test_starts_as_the_frozen_model_and_disables_to_it(case):
    make, targets, run = case
    frozen = run(make())
    assert torch.equal(run(get_peft_model(make(), config(targets, init_weights=True))), frozen)
    model = get_peft_model(make(), config(targets))
    assert not torch.equal(run(model), frozen)
    with model.disable_adapter(): assert torch.equal(run(model), frozen)
    assert torch.equal(run(model.unload()), frozen)


@pytest.mark.parametrize("prox", ["soft", "official"])
def test_gates_reach_exact_zero_and_a_penalty_alone_does_not(case, prox):
    make, targets, run = case
    torch.manual_seed(1)
    plain = train(get_peft_model(make(), config(targets)), run, weight=10., xi=0., steps=60)
    assert all((gate != 0).all() for gate in gates(plain).values())
    torch.manual_seed(1)
    model = train(get_peft_model(make(), config(targets)), run, prox=prox)
    every = torch.cat([gate.detach() for gate in gates(model).values()])
    assert 0 < int((every == 0).sum()) < len(every)


def test_prune_changes_nothing_but_the_size(case, tmp_path):
    make, targets, run = case
    torch.manual_seed(1)
    model = train(get_peft_model(make(), config(targets)), run)
    before, alive = run(model), {n: int(gate.count_nonzero()) for n, gate in gates(model).items()}
    model.save_pretrained(tmp_path/"whole")
    assert prune(model) == alive == {n: len(gate) for n, gate in gates(model).items()}
    close(run(model), before)
    model.save_pretrained(tmp_path/"pruned")
    size = {name: (tmp_path/name/"adapter_model.safetensors").stat().st_size for name in ("whole", "pruned")}
    entries = {name: sum(t.numel() for t in load_file(tmp_path/name/"adapter_model.safetensors").values()) for name in size}
    assert size["pruned"] < size["whole"] and entries["pruned"] == sum(p.numel() for n, p in model.named_parameters() if "sora_gated" in n) < entries["whole"]
    assert all(p.requires_grad for n, p in model.named_parameters() if "sora_gated" in n)
    for load in (lambda: PeftModel.from_pretrained(make(), tmp_path/"pruned"), lambda: PeftModel.from_pretrained(make(), tmp_path/"pruned", low_cpu_mem_usage=True)):
        again = load()
        assert torch.equal(run(again), run(model)) and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(run(PeftModel.from_pretrained(make(), tmp_path/"whole")), before)
    again = run(model)
    assert prune(model) == alive and torch.equal(run(model), again)                # a second time there is nothing left to do


def test_prune_to_nothing(tmp_path):
    run, model = CASES["mlp"][2], get_peft_model(mlp(), config(("up", "down")))
    assert prox_step(model, 100.) == 0 and prune(model) == dict(up=0, down=0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path)
    assert torch.equal(run(again), run(mlp())) and torch.equal(run(again.merge_and_unload()), run(mlp()))


def test_the_penalty_pulls_every_gate_alike():
    model = get_peft_model(mlp(), config(("up", "down")))
    gate_penalty(model).backward()
    for gate in gates(model).values(): close(gate.grad, gate.detach().sign() / 12)


# -- merging, several adapters, other libraries -----------------------------------------------------

@torch.no_grad()
def test_merge_and_unmerge(case):
    make, targets, run = case
    model = get_peft_model(make(), config(targets))
    adapted, frozen = run(model), run(make())
    model.merge_adapter()
    close(run(model), adapted)
    with pytest.raises(ValueError, match="unmerge before pruning"): prune(model)
    model.unmerge_adapter()
    close(run(model), adapted)
    model.merge_adapter()
    with model.disable_adapter(): close(run(model), frozen)                         # unmerges first
    close(run(model), adapted)
    merged = model.merge_and_unload(safe_merge=True)
    close(run(merged), adapted)
    assert not any(isinstance(m, SoraLayer) for m in merged.modules())


def test_a_safe_merge_refuses_nan():
    model = get_peft_model(mlp(), config())
    with torch.no_grad(): model.base_model.model.up.sora_gated["default"].A[0, 0] = torch.nan
    before = model.base_model.model.up.weight.clone()
    with pytest.raises(ValueError, match="holds NaN or infinity and was not merged"): model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.up.weight, before) and not model.base_model.model.up.merged


def test_adapters_switch_add_up_and_are_deleted(tmp_path):
    run, x = CASES["mlp"][2], torch.randn(5, 10)
    model = get_peft_model(mlp(), config(), "one")
    only_one = run(model)
    model.add_adapter("two", config(("up", "down"), r=3))
    assert torch.equal(run(model), only_one)
    model.set_adapter("two")
    assert {n.split(".sora_gated.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"two"}
    model.base_model.set_adapter(["one", "two"])
    layer = model.base_model.model.up
    close(layer(x) - layer.base_layer(x), sum(layer.sora_gated[n](x, torch.zeros(5, 20)) for n in ("one", "two")))
    model.set_adapter("one")
    with torch.no_grad(): gates(model, "two")["up"][:2] = 0.
    assert prune(model, "two") == dict(up=1, down=3) and len(gates(model, "one")["up"]) == 6
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(mlp(), tmp_path/"one")), only_one)
    model.set_adapter("two")
    assert torch.equal(run(PeftModel.from_pretrained(mlp(), tmp_path/"two")), run(model))
    model.delete_adapter("two")
    assert torch.equal(run(model), only_one)
    with pytest.raises(ValueError, match="no SoRA adapter 'two'"): gates(model, "two")


def test_modules_to_save(tmp_path):
    run = CASES["bert"][2]
    model = get_peft_model(bert(), config(["query"], task_type="SEQ_CLS"))
    nn.init.ones_(model.base_model.model.classifier.modules_to_save["default"].weight)
    prox_step(model, .5)
    prune(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(bert(), tmp_path)), run(model))


def test_becomes_a_lora(case, tmp_path):
    make, targets, run = case
    model = get_peft_model(make(), config(targets))
    prox_step(model, .3)
    prune(model)
    save_as_lora(tmp_path, model, rank=.999999)
    torch.testing.assert_close(run(PeftModel.from_pretrained(make(), tmp_path)), run(model), rtol=1e-2, atol=1e-2)


def test_stan_and_sora_know_each_other_apart(tmp_path):
    get_peft_model(mlp(), config()).save_pretrained(tmp_path/"sora")
    get_peft_model(mlp(), StanConfig(num_latents=8, k=2, target_modules=["up"])).save_pretrained(tmp_path/"stan")
    kinds = {name: {type(m).__mro__[2] for m in PeftModel.from_pretrained(mlp(), tmp_path/name).modules() if isinstance(m, (SoraLayer, StanLayer))} for name in ("sora", "stan")}
    assert kinds == dict(sora={SoraLayer}, stan={StanLayer})


def test_transformers_add_save_load(tmp_path):
    run, model = CASES["bert"][2], bert()
    frozen = run(model)
    model.add_adapter(config(["query", "value"]), "mine")
    prox_step(model, .4, adapter_name="mine")
    prune(model, "mine")
    adapted = run(model)
    model.disable_adapters()
    assert torch.equal(run(model), frozen) and not torch.equal(adapted, frozen)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    again = bert()
    again.load_adapter(tmp_path, "theirs")
    assert torch.equal(run(again), adapted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x = torch.randn(3, 10).to(dtype)
    assert get_peft_model(mlp().to(dtype), config())(x).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16): assert get_peft_model(mlp(), config())(torch.randn(3, 10)).dtype == torch.bfloat16


def test_compiles_without_graph_breaks():
    model, x = get_peft_model(mlp(), config(("up", "down"))), torch.randn(3, 10)
    close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


# -- refusals: nothing may change -------------------------------------------------------------------

@pytest.mark.parametrize("bad, message", [
    (dict(r=0), r"r = 0 is out of range: allowed is \[1, inf\)"), (dict(r=2.5), "r must be a whole number, got 2.5"), (dict(r=True), "whole number"),
    (dict(r="8"), "whole number"), (dict(scaling=0), "scaling = 0 is out of range"), (dict(scaling=float("nan")), "scaling = nan"),
    (dict(sora_dropout=1.), r"sora_dropout = 1.0 is out of range: allowed is \[0, 1\)"), (dict(sora_dropout=None), "must be a number, got None"),
    (dict(rank_pattern={"up": -1}), r"rank_pattern\['up'\] = -1"), (dict(rank_pattern=[2]), "rank_pattern must be a dict")])
def test_bad_options(bad, message):
    with pytest.raises((ValueError, TypeError), match=message): SoraConfig(**bad)


def test_modules_that_cannot_be_adapted():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mha, self.emb, self.conv = nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)
    for target, why in dict(out_proj="reads its weight without calling it", mha="got MultiheadAttention", emb="got Embedding", conv="got Conv1d").items():
        model = Odd()
        with pytest.raises(ValueError, match=why): get_peft_model(model, SoraConfig(target_modules=["first", target]))
        assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in Odd().named_modules()]
    assert set(sora_layers(get_peft_model(Odd(), SoraConfig(target_modules="all-linear")))) == {"first"}


def test_the_fused_path_of_torch_s_encoder_is_switched_off():
    torch.manual_seed(0)
    base, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval(), torch.randn(2, 3, 8)
    with torch.no_grad():
        frozen, flag = base(x), base.layers[0].activation_relu_or_gelu
        model = get_peft_model(base, config(["linear1"]))
        adapted = model(x)
        assert not torch.allclose(adapted, frozen)
        merged = model.merge_and_unload()
        close(merged(x), adapted)
    assert merged.layers[0].activation_relu_or_gelu == flag


def test_a_quantised_weight_is_not_merged_into():
    model = get_peft_model(mlp(), config())
    model.base_model.model.up.base_layer.weight = nn.Parameter(torch.zeros(20, 10, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="uint8 cannot be merged into: it is quantised"): model.merge_adapter()


def test_default_targets_and_patterns():
    names = set(sora_layers(get_peft_model(llama(), SoraConfig())))
    assert {n.rsplit(".", 1)[1] for n in names} == {"q_proj", "v_proj"}                # LoRA's own
    model = get_peft_model(llama(), config(["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2}))
    assert [len(gate) for gate in gates(model).values()] == [6, 2]


def test_the_config_survives_json(tmp_path):
    one = config(("up", "down"), rank_pattern={"^up": 0}, modules_to_save=["head"])
    one.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == one and json.loads((tmp_path/"adapter_config.json").read_text())["target_modules"] == ["down", "up"]


def test_state_dict_holds_the_adapter_only():
    model = get_peft_model(mlp(), config())
    state = get_peft_model_state_dict(model)
    assert {n.rsplit(".", 1)[1] for n in state} == {"A", "B", "gate"} and all(".sora_gated." in n and "default" not in n for n in state)
