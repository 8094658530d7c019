"Properties of topk, layer and hooks that cross their modules, for any shape and value hypothesis thinks of."
import copy, math, pickle, shutil, subprocess, sys
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from stan_nb import hooks
from stan_nb.layer import StanAdapter, StanLinear, adapt, adapter_state_dict, load_adapter_state_dict, named_adapters, unadapt
from stan_nb.topk import SELECTS, decode, sparse_adapt, topk_indices, topk_latents, topk_mask

quick = settings(max_examples=40, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 20), st.integers(1, 20)).map(lambda mk: (max(mk), min(mk))) # (num_latents, k)
shapes = st.lists(st.integers(0, 4), max_size=3)
floats = [math.nan, math.inf, -math.inf, 0., -0., 1., -1., 1e-45, 65504., -2.5]

def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, adapter in named_adapters(model): adapter.decoder.data = torch.randn(adapter.decoder.shape, generator=generator).to(adapter.decoder)
    return model

def mlp(): return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 5)))

# topk

@quick
@given(st.lists(st.sampled_from(floats), min_size=1, max_size=40), st.data(), st.sampled_from(SELECTS),
       st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_order_is_a_stable_sort(values, data, select, dtype):
    z, k = torch.tensor(values, dtype=dtype), data.draw(st.integers(1, len(values)))
    rank = z.abs() if select == "abs" else z
    expected = sorted(range(len(values)), key=lambda i: (not rank[i].isnan(), 0. if rank[i].isnan() else -rank[i].item(), i))[:k]
    assert topk_indices(z, k, select).tolist() == expected
    assert topk_mask(z, k, select).sum() == k
    chosen, indices = topk_latents(z, k, select)
    assert chosen.isnan().sum() == min(k, int(z.isnan().sum()))            # a NaN is never left out, nor hidden by ReLU

@quick
@given(sizes, shapes, st.sampled_from(SELECTS), st.booleans(), st.integers(0, 99))
def test_op_is_the_dense_formula_with_its_gradients(size, shape, select, bias, seed):
    (m, k), generator = size, torch.Generator().manual_seed(seed)
    new = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_()
    x, E, D, b, out = new(*shape, 7), new(m, 7), new(m, 5), new(m) if bias else None, new(*shape, 5)
    z = x @ E.T + (0 if b is None else b)
    kept = torch.where(topk_mask(z, k, select), z.relu() if select == "relu" else z, 0.)
    expected, got = out + .3 * (kept @ D), sparse_adapt(x, E, D, k, .3, select, b, out)
    torch.testing.assert_close(got, expected)
    inputs = [t for t in (x, E, D, b, out) if t is not None]
    G = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, e in zip(torch.autograd.grad(got, inputs, G), torch.autograd.grad(expected, inputs, G)): torch.testing.assert_close(a, e)

def test_decode_adds_a_latent_that_occurs_twice():
    D = torch.randn(4, 3)
    torch.testing.assert_close(decode(torch.tensor([1., 2.]), torch.tensor([3, 3]), D), 3 * D[3])

def test_half_precision_sums_gradients_in_float32():
    torch.manual_seed(0)
    E, D, x = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4096, 8)
    half = [t.bfloat16().requires_grad_() for t in (E, D)]
    full = [t.detach().float().requires_grad_() for t in half]
    for tensors, inputs in ((half, x.bfloat16()), (full, x.bfloat16().float())): sparse_adapt(inputs, *tensors, 4, 1.).sum().backward()
    error = (half[1].grad.float() - full[1].grad).norm() / full[1].grad.norm()
    assert error < .02, error

# layer

@quick
@given(sizes, shapes, st.sampled_from(SELECTS), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_identity_at_the_start_in_every_dtype(size, shape, select, bias, dtype):
    base = nn.Linear(6, 5, dtype=dtype)
    layer, x = StanLinear(base, *size, select=select, encoder_bias=bias), torch.randn(*shape, 6).to(dtype)
    assert torch.equal(layer(x), base(x)) and layer(x).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(layer(x), base(x))
    all_half = layer.to(torch.bfloat16)                                    # adapter and base together
    assert torch.equal(all_half(x.bfloat16()), base(x.bfloat16()))

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_trains_in_half_precision(dtype, autocast):
    layer = randomised(StanLinear(nn.Linear(6, 5, dtype=torch.float32 if autocast else dtype), 8, 2))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast): y = layer(torch.randn(3, 6).to(torch.float32 if autocast else dtype))
    assert y.dtype == dtype
    y.float().pow(2).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() and p.grad.dtype == torch.float32 for p in layer.adapter.parameters())
    assert layer.weight.grad is None

@quick
@given(st.integers(1, 12), st.floats(.1, 50), st.integers(0, 99))
def test_keeping_all_latents_is_peft_lora(r, alpha, seed):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(9, 7))
    lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"]))
    stan = adapt(base, "0", num_latents=r, k=r, alpha=alpha, select="abs")
    A, B = (getattr(lora.base_model.model[0], name)["default"].weight for name in ("lora_A", "lora_B"))
    nn.init.normal_(B)
    stan[0].adapter.encoder.data, stan[0].adapter.decoder.data = A.data.clone(), B.data.T.clone()
    x = torch.randn(4, 3, 9)
    torch.testing.assert_close(stan(x), lora(x), rtol=1e-4, atol=1e-4)
    stan(x).sin().sum().backward()
    lora(x).sin().sum().backward()
    torch.testing.assert_close(stan[0].adapter.encoder.grad, A.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stan[0].adapter.decoder.grad, B.grad.T, rtol=1e-3, atol=1e-3)

def test_dropout_acts_in_training_only():
    layer, x = randomised(StanLinear(nn.Linear(6, 5), 8, 2, dropout=.5)), torch.randn(50, 6)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))

@pytest.mark.parametrize("bad", [dict(k=65), dict(k=0), dict(num_latents=0), dict(num_latents=4), dict(alpha=math.nan), dict(alpha=math.inf), dict(alpha=0.),
                                 dict(dropout=1.), dict(dropout=-.1), dict(dropout=math.nan), dict(select="top"), dict(k=2.5), dict(latents=3)])
def test_bad_options_change_nothing(bad):
    model = mlp()
    with pytest.raises((ValueError, TypeError)): adapt(model, "all-linear", **bad)
    assert not list(named_adapters(model)) and all(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize("bad, words", [
    (dict(k=2.5), r"k must be a whole number in 1\.\.64 \(num_latents\), got 2\.5"), (dict(k="8"), r"k must be .* got '8'"), (dict(k=True), "k must be .* got True"),
    (dict(num_latents="64"), "num_latents must be a whole number >= 1, got '64'"), (dict(alpha="x"), "alpha must be a finite number > 0, got 'x'"),
    (dict(alpha=True), "alpha must be"), (dict(dropout="x"), "dropout must be a number, 0 <= dropout < 1, got 'x'"),
    (dict(kk=8), "adapt has no option 'kk': allowed is num_latents, k, alpha, select, dropout, encoder_bias"), (dict(r=8), "Did you mean num_latents"),
    (dict(lora_alpha=8), "Did you mean alpha")])
def test_options_of_a_wrong_type_or_name_are_named(bad, words):
    model = mlp()
    with pytest.raises(TypeError, match=words): adapt(model, "all-linear", **bad)
    if set(bad) <= {"k", "num_latents", "alpha", "dropout"}:
        with pytest.raises(TypeError, match=words): StanLinear(nn.Linear(4, 4), **bad)
    assert not list(named_adapters(model)) and all(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize("model, targets, error, words", [
    (mlp(), [0], TypeError, r"targets must be a name .* got \[0\]"), (mlp(), None, TypeError, "targets must be a name .* got None"), (mlp(), 3, TypeError, "got 3"),
    (nn.Linear(4, 4), "all-linear", ValueError, "model is a single Linear, .*StanLinear"), (nn.Sequential(nn.ReLU()), "all-linear", ValueError, "got 'all-linear'; the model has 0"),
    ("bert", "query", TypeError, "model must be an nn.Module, got 'bert'")])
def test_what_cannot_be_adapted_is_named(model, targets, error, words):
    with pytest.raises(error, match=words): adapt(model, targets)

@pytest.mark.parametrize("targets, words", [("^1$", "matches only ReLU"), ("2.2", "2.0"), (["0", "ghost"], "'ghost' matches no layer"), ([], "at least one"), ("*", "nor a regular")])
def test_bad_targets_change_nothing(targets, words):
    model = mlp()
    with pytest.raises(ValueError, match=words): adapt(model, targets)
    assert not list(named_adapters(model)) and all(p.requires_grad for p in model.parameters())

def test_attention_is_left_alone_and_fused_paths_are_off_while_adapted():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True), 2).eval()
    randomised(adapt(model, "all-linear", num_latents=4, k=2))
    assert [n for n, _ in named_adapters(model)] == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    x = torch.randn(2, 5, 8)
    with torch.no_grad(): fused = model(x)
    torch.testing.assert_close(fused, copy.deepcopy(model).train()(x), rtol=1e-3, atol=1e-3) # training never takes the fused path
    unadapt(model)
    assert model.use_nested_tensor and all(layer.activation_relu_or_gelu for layer in model.layers)

def test_a_layer_used_twice_gets_one_adapter():
    shared = nn.Linear(6, 6)
    model = adapt(nn.Sequential(shared, nn.ReLU(), shared), "all-linear", num_latents=4, k=2)
    assert model[0] is model[2] and len(list(named_adapters(model))) == 1
    assert unadapt(model)[0] is shared and model[2] is shared

def test_unadapt_restores_what_trained():
    model = mlp()
    model[0].weight.requires_grad_(False)
    former = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in unadapt(adapt(model, "0")).named_parameters()} == former

@quick
@given(sizes, st.booleans(), st.integers(0, 99))
def test_state_round_trip(size, bias, seed):
    new = lambda: adapt(copy.deepcopy(base), "all-linear", num_latents=size[0], k=size[1], encoder_bias=bias)
    base, x = mlp(), torch.randn(3, 12)
    one, two = randomised(new(), seed), new()
    load_adapter_state_dict(two, adapter_state_dict(one))
    assert torch.equal(one(x), two(x)) and set(adapter_state_dict(one)) <= {f"{n}.{t}" for n in ("0", "2.0", "2.1") for t in ("encoder", "decoder", "encoder_bias")}
    assert torch.equal(pickle.loads(pickle.dumps(one))(x), one(x)) and torch.equal(copy.deepcopy(one)(x), one(x))

def test_real_architectures_without_importing_them():
    transformers = pytest.importorskip("transformers")
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=16)).eval()
    ids = torch.arange(8).view(2, 4)
    before = gpt(ids).logits
    adapt(gpt, "all-linear", num_latents=6, k=2)
    assert torch.equal(gpt(ids).logits, before)
    assert {n.rsplit(".", 1)[-1] for n, _ in named_adapters(gpt)} == {"c_attn", "c_proj", "c_fc"}       # Conv1D, and not lm_head
    assert not torch.equal(randomised(gpt)(ids).logits, before) and torch.equal(unadapt(gpt)(ids).logits, before)

# hooks

actions = st.sampled_from(["record", "ablate", "clamp", "scale", "inject"])
def enter(action, model, latent):
    value = {"clamp": (3.,), "scale": (-2.,), "inject": (1.5,)}.get(action, ())
    return hooks.record(model) if action == "record" else getattr(hooks, action)(model, latent, *value)

@quick
@given(sizes, st.lists(actions, min_size=1, max_size=4), st.integers(0, 19), st.booleans(), st.sampled_from(SELECTS))
def test_any_nest_of_hooks_leaves_no_trace(size, nest, latent, explode, select):
    model, x = randomised(adapt(mlp(), "all-linear", num_latents=size[0], k=size[1], select=select)), torch.randn(2, 3, 12)
    before = model(x)
    def inside(rest):
        if not rest:
            assert model(x).shape == before.shape
            if explode: raise KeyboardInterrupt
        else:
            with enter(rest[0], model, latent % size[0]): inside(rest[1:])
    try: inside(nest)
    except KeyboardInterrupt: assert explode
    assert torch.equal(model(x), before) and not any(a.latent_hooks for _, a in named_adapters(model))

@quick
@given(sizes, st.integers(0, 19), st.floats(-5, 5), st.integers(0, 99))
def test_inject_adds_one_row_of_the_decoder(size, latent, value, seed):
    layer, latent = randomised(StanLinear(nn.Linear(6, 5), *size), seed), latent % size[0]
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed))
    with hooks.inject(layer, latent, value), hooks.record(layer) as seen: y = layer(x)
    torch.testing.assert_close(y, layer(x) + layer.adapter.scaling * value * layer.adapter.decoder[latent], rtol=1e-4, atol=1e-4)
    values, indices = seen["adapter"][0]
    assert ((indices == latent) & (values != 0)).sum(-1).max() <= 1         # one latent is never counted twice

def test_hooks_reach_peft_style_containers_and_keep_gradients():
    model = nn.Module()
    model.query = nn.Module()
    model.query.stan_sae = nn.ModuleDict({"default": StanAdapter(4, 4, 6, 2)})
    with hooks.record(model, "query") as seen, hooks.scale(model, range(6), 2.): model.query.stan_sae["default"](torch.randn(3, 4)).sum().backward()
    assert list(seen) == ["query.stan_sae.default"] and model.query.stan_sae["default"].decoder.grad.any()

# compile, imports, devices

@pytest.mark.parametrize("select, bias, autocast, hooked", [("abs", False, False, False), ("relu", True, False, False), ("value", False, True, False), ("abs", False, False, True)])
def test_compiles_in_one_graph(select, bias, autocast, hooked):
    torch.compiler.reset()
    model, x = randomised(adapt(mlp(), "all-linear", num_latents=6, k=2, select=select, encoder_bias=bias)), torch.randn(4, 12)
    context = hooks.ablate(model, [1, 2]) if hooked else torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with context:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        compiled(x).float().sum().backward()
    assert all(a.encoder.grad.any() for _, a in named_adapters(model))
    torch.compiler.reset()

@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="inductor needs a C++ compiler")
def test_compiles_to_machine_code():
    torch.compiler.reset()
    layer, x = randomised(StanLinear(nn.Linear(12, 10), 16, 4)), torch.randn(8, 12)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()

def test_import_is_light():
    heavy = ["transformers", "datasets", "peft", "diffusers", "triton", "matplotlib", "sklearn", "pandas"]
    code = ("import time, torch, sys; start, before = time.perf_counter(), set(sys.modules); import stan_nb.layer, stan_nb.hooks;"
            "print(time.perf_counter() - start, *(set(sys.modules) - before))")
    spent, *names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {n.split(".")[0] for n in names} & set(heavy), names
    assert float(spent) < .05, f"{spent} s over import torch"
    loaded = subprocess.run([sys.executable, "-X", "importtime", "-c", "import stan_nb.layer"], capture_output=True, text=True, check=True).stderr
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in loaded.splitlines()}
    assert not imported & {"transformers", "datasets", "peft", "diffusers", "triton", "matplotlib"}

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype):
    torch.manual_seed(0)
    z = torch.randint(-4, 5, (64, 32)).to(dtype)
    for select in SELECTS: assert torch.equal(topk_indices(z.cuda(), 5, select).cpu(), topk_indices(z, 5, select))
    values, indices = topk_latents(torch.randn(64, 32).to(dtype), 5)
    D = torch.randn(32, 16).to(dtype)
    torch.testing.assert_close(decode(values.cuda(), indices.cuda(), D.cuda()).cpu(), decode(values, indices, D))
    layer = randomised(StanLinear(nn.Linear(12, 10, dtype=dtype), 16, 4)).cuda()
    layer(torch.randn(8, 12, device="cuda", dtype=dtype)).float().sum().backward()
    assert layer.adapter.encoder.grad.isfinite().all() and layer.adapter.decoder.grad.any()
