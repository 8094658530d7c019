"Every fast path of sparse_adapt against one judge: the sets that topk_indices chooses, everything else by the formula in float64."
import copy, math, os, shutil, subprocess, sys
from importlib.util import find_spec
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from course import ROOT
from stan_nb import kernels
from stan_nb.layer import StanAdapter, StanLinear, adapt, gives_away, named_adapters
from stan_nb.runs import load_results
from stan_nb.topk import BACKENDS, SELECTS, explain, reference_adapt, set_backend, sparse_adapt, topk_indices

quick = settings(max_examples=60, deadline=None, derandomize=True)
thorough = settings(max_examples=600, deadline=None, derandomize=True)
EXACT = ["cpu"] + ["cpp"] * bool(shutil.which("c++") and shutil.which("ninja"))    # float64, too, and NaN spreads as the formula says
PATHS = EXACT + ["triton"] * (find_spec("triton") is not None)                       # interpreted, see conftest.py; on a GPU compiled
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

def judge(x, E, D, b, k, scale, select, out, G):
    "Result and gradients of x, E, D, b, out in float64, for the sets that the float32 (or lower) pre-activations choose."
    indices = topk_indices(F.linear(x, E, b), k, select)
    inputs = [None if t is None else t.detach().double().requires_grad_() for t in (x, E, D, b, out)]
    x, E, D, b, out = inputs
    values = F.linear(x, E, b).gather(-1, indices)
    if select == "relu": values = values.relu()
    y = scale * torch.zeros(*values.shape[:-1], len(E), dtype=torch.float64).scatter(-1, indices, values) @ D
    if out is not None: y = y + out
    given = [t for t in inputs if t is not None]
    return y,[torch.zeros_like(t) if g is None else g for t, g in zip(given, torch.autograd.grad(y, given, G.double(), allow_unused=True))]

def near(got, expected, dtype=torch.float32, slack=1.):
    "Equal up to rounding, measured by the size of the whole."
    scale = expected.abs().max().item() if expected.numel() else 0.
    eps = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * slack
    assert_close(got.double(), expected, rtol=eps, atol=eps * max(scale, 1e-30))

def make(seed, n, m, d_in, d_out, kind="normal", dtype=torch.float32, bias=False, lead=None):
    new = lambda *s: torch.randn(*s, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    x, E, D, b, out, G = new(n, d_in), new(m, d_in), new(m, d_out), new(m), new(n, d_out), new(n, d_out)
    if kind == "ties": x, E, b = x.round(), E.round(), b.round()
    if kind == "skewed": E[: max(1, m // 8)] *= 30
    if kind == "huge": x, D = x * 1e12, D * 1e12
    if kind == "empty rows": x[::2] = 0
    if kind == "equal rows": E[:] = E[:1]
    x, E, D, b, out, G = (t.to(dtype) for t in (x, E, D, b, out, G))
    if lead: x, out, G = (t.reshape(*lead, t.shape[-1]) for t in (x, out, G))
    return x,E,D,b if bias else None,out,G

def check(path, x, E, D, b, k, scale, select, out, G, inplace=False, slack=1.):
    expected, grads = judge(x, E, D, b, k, scale, select, out, G)
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in (x, E, D, b, out)]
    x, E, D, b, out = inputs
    given = [t for t in inputs if t is not None]
    with set_backend(path):
        fresh = out if out is None or not inplace else out * 1
        y = sparse_adapt(x, E, D, k, scale, select, b, fresh, inplace=inplace)
        assert y.dtype == (x if out is None else out).dtype and y.shape == expected.shape
        near(y.detach(), expected.detach(), x.dtype, slack)
        for g, e, t in zip(torch.autograd.grad(y, given, G), grads, given):
            assert g.dtype == t.dtype
            near(g, e, x.dtype, slack)
        with torch.no_grad():
            again = sparse_adapt(x, E, D, k, scale, select, b, None if out is None else out.clone(), inplace=inplace)
            near(again, expected.detach(), x.dtype, slack)

# the grid

sizes = st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 70)).map(lambda t: (t[0], t[1], min(t[1], t[2]))) # n, m, k
kinds = st.sampled_from(["normal", "ties", "skewed", "empty rows", "equal rows"])
grid = given(sizes, st.integers(1, 40), st.integers(1, 40), kinds, st.sampled_from(SELECTS), st.booleans(), st.sampled_from(["out", "none", "inplace"]), st.integers(0, 999))

def run_grid(path, size, d_in, d_out, kind, select, bias, out, seed, dtype=torch.float32):
    n, m, k = size
    x, E, D, b, o, G = make(seed, n, m, d_in, d_out, kind, dtype, bias)
    check(path, x, E, D, b, k, .7, select, None if out == "none" else o, G, out == "inplace")

@pytest.mark.parametrize("path", EXACT)
@quick
@grid
def test_values_and_gradients(path, size, d_in, d_out, kind, select, bias, out, seed): run_grid(path, size, d_in, d_out, kind, select, bias, out, seed)

@pytest.mark.slow
@pytest.mark.parametrize("path", EXACT)
@thorough
@grid
def test_values_and_gradients_often(path, size, d_in, d_out, kind, select, bias, out, seed): run_grid(path, size, d_in, d_out, kind, select, bias, out, seed)

@pytest.mark.parametrize("path", EXACT)
@settings(max_examples=25, deadline=None, derandomize=True)
@grid
def test_values_and_gradients_in_double(path, size, d_in, d_out, kind, select, bias, out, seed):
    run_grid(path, size, d_in, d_out, kind, select, bias, out, seed, torch.float64)

@pytest.mark.parametrize("path", EXACT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=25, deadline=None, derandomize=True)
@grid
def test_values_and_gradients_in_half(path, dtype, size, d_in, d_out, kind, select, bias, out, seed):
    run_grid(path, size, d_in, d_out, kind, select, bias, out, seed, dtype)

@pytest.mark.parametrize("path", EXACT)
@pytest.mark.parametrize("n, m, k", [(33, 16, 4), (700, 16, 4), (700, 64, 8), (600, 300, 16), (40, 1024, 16), (300, 1024, 16), (5, 3000, 32), (3, 40000, 8), (1, 64, 8), (2, 64, 1), (70, 64, 64)])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_every_branch_of_the_dispatcher(path, n, m, k, kind): check(path, *make(1, n, m, 24, 40, kind)[:4], k, 2., "abs", *make(1, n, m, 24, 40, kind)[4:])

TRITON = pytest.mark.skipif("triton" not in PATHS, reason="triton is not installed")

@TRITON
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from([1, 3, 66]), st.integers(1, 90), st.data(), st.integers(1, 40), st.integers(1, 40), kinds, st.sampled_from(SELECTS), st.booleans(),
       st.sampled_from(["out", "none", "inplace"]), st.integers(0, 999), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_triton_values_and_gradients(n, m, data, d_in, d_out, kind, select, bias, out, seed, dtype):
    k = data.draw(st.sampled_from([1, 2, m // 2 + 1, m])) if m > 1 else 1
    x, E, D, b, o, G = make(seed, n, m, d_in, d_out, kind, dtype, bias)
    check("triton", x, E, D, b, min(k, m), .7, select, None if out == "none" else o, G, out == "inplace", slack=4.)

@TRITON
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("n, m, k, dtype", [(7, 300, 4, torch.float32), (7, 300, 2, torch.float16), (66, 200, 5, torch.float16), (3, 300, 2, torch.float32),
                                            (1, 64, 8, torch.float32), (70, 130, 1, torch.float32)])
def test_every_kernel(n, m, k, dtype, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        for kind in ("skewed", "ties"): check("triton", *make(1, n, m, 24, 40, kind, dtype)[:4], k, 2., "abs", *make(1, n, m, 24, 40, kind, dtype)[4:], slack=4.)
    finally: torch.use_deterministic_algorithms(False)

@TRITON
def test_thousands_of_latents_in_chunks(monkeypatch):
    "The running best goes through memory from chunk to chunk: here 64 latents at a time."
    monkeypatch.setattr(kernels, "_CHUNK", 64)
    for kind in ("normal", "ties"): check("triton", *make(1, 3, 300, 24, 40, kind)[:4], 2, 2., "abs", *make(1, 3, 300, 24, 40, kind)[4:])

@TRITON
def test_a_fused_encode_over_many_blocks():
    "The form for thousands of latents: the pre-activations of 64 at a time exist, in registers."
    torch.manual_seed(0)
    x, E, b = torch.randn(130, 40).half(), torch.randn(300, 40).half(), torch.randn(300).half()
    kernels._load_triton()
    values, indices, kept = kernels._triton_select(x, E, b, 7, "abs", True, True)
    z = F.linear(x.float(), E.float(), b.float()).half()
    expected = topk_indices(z, 7)
    assert (indices.long().sort(-1).values == expected.sort(-1).values).all(1).float().mean() > .95      # another order of sums rounds otherwise
    assert_close(values.sort(-1).values, z.gather(1, indices.long()).sort(-1).values, rtol=2e-3, atol=2e-3)
    assert torch.equal(kept.gather(1, indices.long()), values) and (kept != 0).sum() == values.numel()

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lead", [(6,), (2, 3), (1, 2, 3), (6, 1)])
def test_leading_shapes(path, lead):
    x, E, D, b, out, G = make(2, 6, 20, 7, 9, bias=True, lead=lead)
    check(path, x, E, D, b, 3, .5, "abs", out, G)

@pytest.mark.parametrize("path", PATHS)
def test_strides_do_not_matter(path):
    x, E, D, b, out, G = make(3, 40, 20, 8, 10, bias=True)
    expected, grads = judge(x, E, D, b, 3, .5, "abs", out, G)
    stretch = lambda t: torch.stack([t, t], -1)[..., 0] if t.ndim == 1 else t.T.contiguous().T
    with set_backend(path):
        for inplace in (False, True):
            inputs = [stretch(t).requires_grad_() for t in (x, E, D, b)]
            o = (out * 1).T.contiguous().T.requires_grad_()
            y = sparse_adapt(*inputs[:3], 3, .5, "abs", inputs[3], o * 1, inplace=inplace)
            near(y.detach(), expected.detach())
            for g, e in zip(torch.autograd.grad(y, [*inputs, o], stretch(G)), grads): near(g, e)
        y = sparse_adapt(*inputs[:3], 3, .5, "abs", inputs[3])
        (g,) = torch.autograd.grad(y.sum(), inputs[2])        # an expanded gradient has stride 0
        near(g, judge(x, E, D, b, 3, .5, "abs", None, torch.ones_like(out))[1][2])

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,)])
def test_nothing_and_a_single_vector(path, shape):
    E, D = torch.randn(5, 7).requires_grad_(), torch.randn(5, 4).requires_grad_()
    x = torch.randn(shape).requires_grad_()
    with set_backend(path):
        y = sparse_adapt(x, E, D, 2, 1., out=torch.ones(*shape[:-1], 4))
        assert y.shape == (*shape[:-1], 4)
        y.sum().backward()
    assert x.grad.shape == x.shape and E.grad.isfinite().all() and D.grad.isfinite().all()

# values that are not numbers

floats = [math.nan, -math.nan, math.inf, -math.inf, 0., -0., 1., -1., 1e-45, 3e38, -2.5, 1 + 2**-22, 1.]

@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([3, 8, 20, 300]), st.sampled_from(SELECTS), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_the_same_sets_for_any_floats(data, m, select, dtype):
    z = torch.tensor([data.draw(st.lists(st.sampled_from(floats), min_size=m, max_size=m)) for _ in range(3)]).to(dtype)
    k = data.draw(st.integers(1, m - 1))
    got = kernels.choose(z if dtype == torch.float64 else z.float(), k, select)
    assert torch.equal(got.long().sort(-1).values, topk_indices(z, k, select).sort(-1).values)

@pytest.mark.parametrize("path", EXACT)
@pytest.mark.parametrize("where", ["x", "decoder", "encoder", "gradient", "out"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n, m, k", [(1, 16, 4), (40, 16, 4), (40, 64, 8), (40, 256, 8), (40, 16, 16)])
def test_a_bad_number_reaches_what_the_formula_says_and_nothing_else(path, where, bad, n, m, k):
    x, E, D, b, out, G = make(4, n, m, 12, 10)
    dict(x=x, decoder=D, encoder=E, gradient=G, out=out)[where][-1, 3] = bad
    z = F.linear(x, E)
    indices = topk_indices(z, k)
    v, dz = z.gather(1, indices), (G[:, None] * D[indices]).sum(-1)
    collect = lambda values, rows: torch.zeros(m, rows.shape[1]).index_add_(0, indices.flatten(), (values[..., None] * rows[:, None]).flatten(0, 1))
    expected = reference_adapt(x, E, D, k, 1., out=out),(dz[..., None] * E[indices]).sum(1),collect(dz, x),collect(v, G)
    inputs = [t.clone().requires_grad_() for t in (x, E, D)]
    with set_backend(path):
        y = sparse_adapt(*inputs, k, 1., out=out)
        got = y.detach(),*torch.autograd.grad(y, inputs, G)
    for e, g in zip(expected, got): assert torch.equal(e.isfinite(), g.isfinite())

# autograd

@pytest.mark.parametrize("path", EXACT)
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("k", [1, 2, 6])
def test_gradcheck(path, select, k):
    x, E, D, b, out, G = make(5, 4, 6, 5, 3, dtype=torch.float64, bias=True)
    inputs = [t.requires_grad_() for t in (x, E, D, b, out)]
    with set_backend(path):
        assert torch.autograd.gradcheck(lambda x, E, D, b, o: sparse_adapt(x, E, D, k, .7, select, b, o), inputs)
        assert torch.autograd.gradcheck(lambda x, E, D, b, o: sparse_adapt(x, E, D, k, .7, select, b, o * 2, inplace=True), inputs)

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("needs", [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1), (0, 1, 1, 0, 0), (0, 0, 0, 0, 0)])
@pytest.mark.parametrize("m, k", [(16, 4), (300, 8), (6, 6)])
def test_only_what_is_asked_for(path, needs, m, k):
    x, E, D, b, out, G = make(6, 40, m, 12, 10, bias=True)
    grads = judge(x, E, D, b, k, .7, "relu", out, G)[1]
    inputs = [t.requires_grad_(bool(n)) for t, n in zip((x, E, D, b, out), needs)]
    with set_backend(path): y = sparse_adapt(x, E, D, k, .7, "relu", b, out)
    assert y.requires_grad == any(needs)
    if any(needs): y.backward(G)
    for t, g, n in zip(inputs, grads, needs):
        assert (t.grad is not None) == bool(n)
        if n: near(t.grad, g)

def test_no_second_derivative_is_an_error():
    x, E, D, b, out, G = make(7, 40, 16, 12, 10)
    E.requires_grad_(), D.requires_grad_()
    (g,) = torch.autograd.grad(sparse_adapt(x, E, D, 4, 1.).pow(2).sum(), E, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()

def saved_bytes(call):
    "Bytes of what autograd keeps, each storage once."
    kept = {}
    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): y = call()
    return sum(kept.values()), y

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m, k", [(16, 4), (64, 8), (1024, 16)])
@pytest.mark.parametrize("d", [64, 768])
def test_bytes_kept_for_backward(path, m, k, d):
    n, x, E, D = 64, torch.randn(64, d).requires_grad_(), torch.randn(m, d).requires_grad_(), torch.randn(m, d).requires_grad_()
    out = torch.randn(n, d)
    with set_backend(path): ours, y = saved_bytes(lambda: sparse_adapt(x, E, D, k, 1., out=out))
    parameters = 2 * m * d * 4
    assert ours == 4 * n * d + (6 if path == "triton" else 8) * n * k + parameters        # x, and k values and indices a token: nothing of size n * m
    lora, y = saved_bytes(lambda: out + F.linear(F.linear(x, E), D.T.contiguous().detach().requires_grad_()) * 1.)
    assert ours <= lora

# in place, and who else looks at the output

def wrapped(**options):
    torch.manual_seed(0)
    layer = StanLinear(nn.Linear(12, 10), 16, 4, **options)
    nn.init.normal_(layer.adapter.decoder)
    return layer

@pytest.mark.parametrize("lead", [(7,), (2, 7)])
@pytest.mark.parametrize("needs_x", [False, True])
def test_the_layer_adds_in_place_and_gradients_are_right(lead, needs_x):
    layer, x = wrapped(), torch.randn(*lead, 12, requires_grad=needs_x)
    y = layer(x)
    assert y._version > 0 and not y._is_view()                                          # added in place, and no view of anything
    y.relu_().pow(2).sum().backward()                                                  # which may be changed in place again
    got = [p.grad for p in layer.adapter.parameters()] + [x.grad] * needs_x
    twin, x2 = copy.deepcopy(layer), x.detach().clone().requires_grad_(needs_x)
    twin.zero_grad()
    with set_backend("reference"): twin(x2).relu().pow(2).sum().backward()
    for g, e in zip(got, [p.grad for p in twin.adapter.parameters()] + [x2.grad] * needs_x): assert_close(g, e, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook", "global"])
def test_a_hook_on_the_frozen_layer_keeps_what_it_saw(register):
    layer, x, seen = wrapped(), torch.randn(7, 12, requires_grad=True), []
    keep = lambda module, inputs, output: seen.append(output) if module is layer.base_layer else None
    handle = (nn.modules.module.register_module_forward_hook(keep) if register == "global" else getattr(layer.base_layer, register)(keep))
    try:
        assert not gives_away(layer.base_layer)
        y = layer(x)
        if register != "register_full_backward_hook": assert torch.equal(seen[0], F.linear(x, layer.weight, layer.bias)) and not torch.equal(y, seen[0])
        y.sum().backward()
    finally: handle.remove()
    assert gives_away(layer.base_layer) and layer.adapter.encoder.grad.any()

class Keeps(nn.Linear):
    "A layer that remembers its output."
    def forward(self, x):
        self.last = super().forward(x)
        return self.last

@pytest.mark.parametrize("kind", ["subclass", "replaced forward"])
def test_a_layer_that_keeps_its_output_is_left_alone(kind):
    base = Keeps(12, 10) if kind == "subclass" else nn.Linear(12, 10)
    if kind != "subclass":
        former = base.forward
        def forward(x):
            base.last = former(x)
            return base.last
        base.forward = forward                                                          # as accelerate does it
    layer, x = StanLinear(base, 16, 4), torch.randn(7, 12)
    nn.init.normal_(layer.adapter.decoder)
    y = layer(x)
    assert torch.equal(base.last, F.linear(x, base.weight, base.bias)) and not torch.equal(y, base.last)

def test_what_autograd_saved_is_never_overwritten_silently():
    x, E, D, b, out, G = make(8, 7, 16, 12, 10)
    w = torch.randn(7, 10, requires_grad=True)
    saved = w.sigmoid()                                                                 # sigmoid keeps its result
    y = sparse_adapt(x, E.requires_grad_(), D.requires_grad_(), 4, 1., out=saved, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): y.sum().backward()
    with pytest.raises(ValueError, match="leaf"): sparse_adapt(x, E, D, 4, 1., out=w, inplace=True)

@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint
    model = nn.Sequential(*[StanLinear(nn.Linear(12, 12), 16, 4) for _ in range(3)])
    for _, a in named_adapters(model): nn.init.normal_(a.decoder, std=.1)
    x = torch.randn(5, 12, requires_grad=True)
    expected = torch.autograd.grad(model(x).pow(2).sum(), list(p for p in model.parameters() if p.requires_grad))
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    for p, e in zip((p for p in model.parameters() if p.requires_grad), expected): assert torch.equal(p.grad, e)

def test_several_adapters_on_one_layer():
    peft, stan = pytest.importorskip("peft"), pytest.importorskip("stan_nb.peft")
    config = stan.StanConfig(num_latents=16, k=4, target_modules=["0"], init_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), config, "a")
    model.add_adapter("b", config)
    layer, x = model.base_model.model[0], torch.randn(7, 12, requires_grad=True)
    base = layer.base_layer(x).detach()
    alone = {}
    for name in ("a", "b"):
        layer.set_adapter(name)
        alone[name] = layer(x).detach() - base
    layer.set_adapter(["a", "b"])
    y = layer(x)
    assert_close(y.detach(), base + alone["a"] + alone["b"], rtol=1e-5, atol=1e-5)
    y.pow(2).sum().backward()
    got = x.grad.clone()
    x.grad = None
    with set_backend("reference"): layer(x).pow(2).sum().backward()
    assert_close(got, x.grad, rtol=1e-4, atol=1e-4)

def test_hooks_and_the_fused_op_agree():
    layer, x = wrapped(encoder_bias=True, select="relu"), torch.randn(7, 12)
    fused = layer(x)
    layer.adapter.latent_hooks.append(lambda adapter, values, indices: (values, indices))
    assert_close(layer(x), fused, rtol=1e-5, atol=1e-5)

# autocast, dropout, compile, transforms, determinism

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(path, inside):
    x, E, D, b, out, G = make(9, 40, 32, 24, 20, bias=True)
    with set_backend(path), torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = [t.clone().requires_grad_() for t in (x, E, D, b, out)]
        y = sparse_adapt(*inputs[:3], 4, .5, "abs", inputs[3], inputs[4])
        if inside: grads = torch.autograd.grad(y, inputs, G)
    if not inside: grads = torch.autograd.grad(y, inputs, G)
    half = [t.bfloat16() for t in (x, E, b)]
    expected, wanted = judge(half[0], half[1], D, half[2], 4, .5, "abs", out, G)
    near(y.detach(), expected.detach(), torch.bfloat16)
    for g, e, t in zip(grads, wanted, inputs):
        assert g.dtype == t.dtype == torch.float32
        near(g, e, torch.bfloat16)

def test_dropout_is_the_same_for_all():
    layer, x, results = wrapped(dropout=.5), torch.randn(50, 12), {}
    for path in ("reference", *PATHS):
        torch.manual_seed(3)
        layer.zero_grad()
        with set_backend(path): layer(x).pow(2).sum().backward()
        results[path] = [p.grad.clone() for p in layer.adapter.parameters()]
    for path in PATHS: assert_close(results[path], results["reference"], rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("m, k", [(16, 4), (64, 8), (6, 6)])
@pytest.mark.parametrize("select, bias, autocast", [("abs", False, False), ("relu", True, False), ("value", False, True)])
def test_compiled_is_eager(m, k, select, bias, autocast):
    torch.compiler.reset()
    layer = StanLinear(nn.Linear(12, 10), m, k, select=select, encoder_bias=bias)
    nn.init.normal_(layer.adapter.decoder)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (33, 5, 9):                                                               # the sizes become dynamic
        x = torch.randn(n, 12, requires_grad=True)
        results = []
        for f in (layer, compiled):
            layer.zero_grad()
            x.grad = None
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast): y = f(x)
            y.float().pow(2).sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in layer.adapter.parameters())])
        for a, b in zip(*results): assert_close(a, b, rtol=1e-4, atol=1e-4 if not autocast else 3e-2)
    with torch.no_grad(): assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()

def test_the_compiled_ops_are_well_formed():
    x, E, D, b, out, G = make(10, 20, 16, 12, 10, bias=True)
    for t in (x, E, D, b): t.requires_grad_()
    torch.library.opcheck(kernels._update, (x, E, D, b, 4, .5, "abs"))
    torch.library.opcheck(kernels._update, (x, E, D, None, 16, .5, "relu"))

def test_transforms_and_other_tensors_take_the_reference():
    E, D, x = torch.randn(16, 12), torch.randn(16, 10), torch.randn(7, 12)
    f = lambda x: sparse_adapt(x, E, D, 4, 1.).pow(2).sum()
    leaf = x.clone().requires_grad_()
    assert_close(torch.func.grad(f)(x), torch.autograd.grad(f(leaf), leaf)[0], rtol=1e-4, atol=1e-4)
    with set_backend("cpu"), pytest.raises(RuntimeError, match="torch.func"): torch.func.grad(f)(x)
    class Marked(torch.Tensor): pass
    assert_close(sparse_adapt(x.as_subclass(Marked), E, D, 4, 1.).as_subclass(torch.Tensor), reference_adapt(x, E, D, 4, 1.))
    with set_backend("cpu"), pytest.raises(RuntimeError, match="subclasses"): sparse_adapt(x.as_subclass(Marked), E, D, 4, 1.)
    assert sparse_adapt(x.to("meta"), E.to("meta"), D.to("meta"), 4, 1.).device.type == "meta"
    with set_backend("cpu"), pytest.raises(RuntimeError, match="meta"): sparse_adapt(x.to("meta"), E.to("meta"), D.to("meta"), 4, 1.)

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m, k", [(16, 4), (64, 8), (512, 4)])
def test_runs_repeat_bit_for_bit(path, m, k):
    x, E, D, b, out, G = make(11, 20 if path == "triton" else 700, m, 64, 48, "skewed")
    def run():
        inputs = [t.clone().requires_grad_() for t in (x, E, D)]
        with set_backend(path): y = sparse_adapt(*inputs, k, 1., out=out)
        return [y.detach(), *torch.autograd.grad(y, inputs, G)]
    torch.use_deterministic_algorithms(True)
    try: first = run()
    finally: torch.use_deterministic_algorithms(False)
    for _ in range(3):
        for a, b in zip(first, run()): assert torch.equal(a, b)

# choosing

def test_backends_by_name():
    x, E, D = torch.randn(7, 12), torch.randn(16, 12), torch.randn(16, 10)
    with pytest.raises(ValueError, match="'auto', 'reference', 'cpu', 'cpp', 'triton'"): set_backend("fast")
    assert set_backend.current == "auto" and explain(x, E, D, 4).startswith("cpu: ")
    with set_backend("reference"): assert explain(x, E, D, 4) == "reference"
    for bad in (dict(k=17), dict(k=0), dict(select="top")):
        with pytest.raises(ValueError): sparse_adapt(x, E, D, **{"k": 4, "scale": 1.} | bad)
    with torch.no_grad():
        for wrong in (torch.randn(2, 6), torch.randn(4, 24)):
            for inplace in (False, True):
                with pytest.raises(RuntimeError): sparse_adapt(wrong, E, D, 4, 1., out=torch.zeros(len(wrong), 10), inplace=inplace)
    layer = wrapped()
    assert layer.adapter.explain(x) == explain(x, layer.adapter.encoder, layer.adapter.decoder, 4)

def test_loading_stays_lazy():
    code = ("import sys, torch, stan_nb.layer as l; assert 'stan_nb.kernels' not in sys.modules; l.StanLinear(torch.nn.Linear(4, 4), 8, 2)(torch.randn(3, 4));"
            "assert 'stan_nb.kernels' in sys.modules and 'triton' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)

def test_without_mkl_the_answers_are_the_same(monkeypatch):
    x, E, D, b, out, G = make(12, 700, 64, 24, 20)
    results = []
    for mkl in (kernels.MKL, False):
        monkeypatch.setattr(kernels, "MKL", mkl)
        inputs = [t.clone().requires_grad_() for t in (x, E, D)]
        y = sparse_adapt(*inputs, 4, 1., out=out)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, G)])
    for a, b in zip(*results): assert_close(a, b, rtol=1e-4, atol=1e-3)

def test_the_kernels_compile_for_cards_that_are_not_here():
    "Spills, shared memory, size, time and bytes: the script's own limits."
    pytest.importorskip("triton")
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "compile_kernels.py", "--check"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(card in done.stdout for card in ("sm_75", "sm_80", "sm_90"))

def test_the_gpu_script_runs_without_a_gpu(tmp_path):
    "On tiny tensors, interpreted: that its checks pass and its file holds every row."
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py", "--dry", "--out", tmp_path], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("*.json")
    assert {"forward", "training step"} <= {r["what"] for r in load_results(path)["rows"]}


@pytest.mark.parametrize("n", [1, 3, 40, 70, 300])
@pytest.mark.parametrize("m, k", [(4, 1), (16, 3), (16, 4), (60, 2), (100, 5), (1024, 16)])
def test_gradients_cost_no_bit(n, m, k):
    "What is trained, saved and loaded answers exactly as it did: the same bits whether gradients are asked for or not."
    torch.manual_seed(n + m)
    x, E, D, out = torch.randn(n, 24), torch.randn(m, 24), torch.randn(m, 40), torch.randn(n, 40)
    assert torch.equal(sparse_adapt(x, E, D, k, 1.7, out=out), sparse_adapt(x, E.clone().requires_grad_(), D, k, 1.7, out=out))
