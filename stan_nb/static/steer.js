// The whole of a small SD3 transformer with its STAN adapter, in the reader's browser: pick a digit and a style, turn latents, draw.
// State: files (name -> path of a safetensors file), bytes (name -> base64, sent by a kernel that was asked), asked (a count),
// words (of the prompts), digits, styles, groups (a style, or the name of a single latent -> layer -> latents), singles (names of
// single latents -> the style that each moves most), factors (of each group), digit, style, seed,
// heads, k, scaling, steps, guidance.

// --- safetensors -> {name: {shape, data: Float32Array}} --------------------------------------------------------------------
function half(h) {
  const sign = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, f = h & 1023;
  return e === 0 ? sign * f * 2 ** -24 : e === 31 ? (f ? NaN : sign * Infinity) : sign * (1 + f / 1024) * 2 ** (e - 15);
}

function tensors(buffer) {
  const view = new DataView(buffer), size = Number(view.getBigUint64(0, true)), found = {};
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  delete about.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(about)) {
    const part = buffer.slice(8 + size + from, 8 + size + to);
    if (dtype !== "F16" && dtype !== "F32") throw new Error(`${name} is ${dtype}, expected F16 or F32`);
    found[name] = { shape, data: dtype === "F32" ? new Float32Array(part) : Float32Array.from(new Uint16Array(part), half) };
  }
  return found;
}

// --- the model. Rows of tokens are arrays of Float32Array ------------------------------------------------------------------
const silu = (v) => v / (1 + Math.exp(-v));
const gelu = (v) => 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3)));

function matrix(weight, bias, x) {
  const [out, wide] = [weight.shape[0], x.length], y = new Float32Array(out);
  for (let o = 0; o < out; o++) {
    let sum = bias ? bias.data[o] : 0;
    for (let i = 0, at = o * wide; i < wide; i++, at++) sum += weight.data[at] * x[i];
    y[o] = sum;
  }
  return y;
}

// y = W0 x + b + scaling * D TopK(E x), each winner multiplied by its factor.
function linear(net, name, x) {
  const y = matrix(net.base[`${name}.weight`], net.base[`${name}.bias`], x), encoder = net.on && net.adapter[`base_model.model.${name}.stan_sae.encoder`];
  if (!encoder) return y;
  const decoder = net.adapter[`base_model.model.${name}.stan_sae.decoder`], z = matrix(encoder, null, x), turned = net.turned[name] ?? {};
  const kept = Array.from(z.keys()).sort((a, b) => Math.abs(z[b]) - Math.abs(z[a]) || a - b).slice(0, net.k);
  for (const j of kept) {
    const value = net.scaling * z[j] * (turned[j] ?? 1);
    if (value) for (let o = 0, at = j * y.length; o < y.length; o++, at++) y[o] += value * decoder.data[at];
  }
  return y;
}

function norm(x) {
  let mean = 0, square = 0;
  for (const v of x) mean += v / x.length;
  for (const v of x) square += (v - mean) ** 2 / x.length;
  const scale = 1 / Math.sqrt(square + 1e-6);
  return x.map((v) => (v - mean) * scale);
}

const part = (v, i, size) => v.subarray(i * size, (i + 1) * size);
const modulated = (x, scale, shift) => norm(x).map((v, i) => v * (1 + scale[i]) + shift[i]);
const added = (x, gate, y) => x.map((v, i) => v + gate[i] * y[i]);
const feed = (net, name, x) => linear(net, `${name}.net.2`, linear(net, `${name}.net.0.proj`, x).map(gelu));

function attention(queries, keys, values, heads) {
  const wide = queries[0].length, each = wide / heads, out = queries.map(() => new Float32Array(wide));
  for (let h = 0; h < heads; h++) {
    queries.forEach((q, a) => {
      const scores = keys.map((key) => { let s = 0; for (let i = h * each; i < (h + 1) * each; i++) s += q[i] * key[i]; return s / Math.sqrt(each); });
      const top = Math.max(...scores), weights = scores.map((s) => Math.exp(s - top)), total = weights.reduce((s, w) => s + w, 0);
      weights.forEach((w, b) => { for (let i = h * each; i < (h + 1) * each; i++) out[a][i] += (w / total) * values[b][i]; });
    });
  }
  return out;
}

function block(net, name, image, text, state) {
  const size = image[0].length, a = linear(net, `${name}.norm1.linear`, state), c = linear(net, `${name}.norm1_context.linear`, state);
  const last = c.length === 2 * size;                      // the last block only reads the text
  const x = image.map((row) => modulated(row, part(a, 1, size), part(a, 0, size)));
  const y = text.map((row) => (last ? modulated(row, part(c, 0, size), part(c, 1, size)) : modulated(row, part(c, 1, size), part(c, 0, size))));
  const both = (own, other) => [...x.map((row) => linear(net, `${name}.attn.${own}`, row)), ...y.map((row) => linear(net, `${name}.attn.${other}`, row))];
  const seen = attention(both("to_q", "add_q_proj"), both("to_k", "add_k_proj"), both("to_v", "add_v_proj"), net.heads);
  image = image.map((row, i) => added(row, part(a, 2, size), linear(net, `${name}.attn.to_out.0`, seen[i])));
  image = image.map((row) => added(row, part(a, 5, size), feed(net, `${name}.ff`, modulated(row, part(a, 4, size), part(a, 3, size)))));
  if (last) return [image, text];
  text = text.map((row, i) => added(row, part(c, 2, size), linear(net, `${name}.attn.to_add_out`, seen[x.length + i])));
  return [image, text.map((row) => added(row, part(c, 5, size), feed(net, `${name}.ff_context`, modulated(row, part(c, 4, size), part(c, 3, size)))))];
}

// The velocity at `pixels` (a square, row by row) and time t (0..1000) for a prompt {tokens, pooled}.
function velocity(net, pixels, t, prompt) {
  const kernel = net.base["pos_embed.proj.weight"], patch = kernel.shape[2], side = Math.sqrt(pixels.length), across = side / patch, image = [];
  const grid = net.base["pos_embed.pos_embed"], full = Math.sqrt(grid.shape[1]), first = (full - across) / 2, size = kernel.shape[0];
  for (let r = 0; r < across; r++) {
    for (let c = 0; c < across; c++) {
      const cut = new Float32Array(patch * patch);
      for (let i = 0; i < cut.length; i++) cut[i] = pixels[(r * patch + Math.floor(i / patch)) * side + c * patch + (i % patch)];
      const place = part(grid.data, (first + r) * full + first + c, size);
      image.push(matrix(kernel, net.base["pos_embed.proj.bias"], cut).map((v, i) => v + place[i]));
    }
  }
  const waves = new Float32Array(256);
  for (let i = 0; i < 128; i++) { const angle = t * Math.exp((-Math.log(10000) * i) / 128); waves[i] = Math.cos(angle); waves[128 + i] = Math.sin(angle); }
  const two = (name, x) => linear(net, `time_text_embed.${name}.linear_2`, linear(net, `time_text_embed.${name}.linear_1`, x).map(silu));
  const about = two("text_embedder", prompt.pooled), state = two("timestep_embedder", waves).map((v, i) => silu(v + about[i]));
  let now = image, text = prompt.tokens.map((row) => linear(net, "context_embedder", row));
  for (let b = 0; `transformer_blocks.${b}.attn.to_q.weight` in net.base; b++) [now, text] = block(net, `transformer_blocks.${b}`, now, text, state);
  const end = linear(net, "norm_out.linear", state), out = new Float32Array(pixels.length);
  now.forEach((row, n) => {
    const cut = linear(net, "proj_out", modulated(row, part(end, 0, size), part(end, 1, size)));
    for (let i = 0; i < cut.length; i++) out[(Math.floor(n / across) * patch + Math.floor(i / patch)) * side + (n % across) * patch + (i % patch)] = cut[i];
  });
  return out;
}

// The words of a prompt, filled up to three with the empty word; pooled is their mean.
function embed(net, words) {
  const numbers = [...words, "", "", ""].slice(0, 3).map((word) => net.words.indexOf(word)), { tokens, pooled } = net.prompts, size = pooled.shape[1];
  const rows = (table) => numbers.map((n) => part(table.data, n, size));
  return { tokens: rows(tokens), pooled: rows(pooled)[0].map((_, i) => rows(pooled).reduce((sum, row) => sum + row[i] / 3, 0)) };
}

// From noise to a picture: Euler's method along the guided velocity.
function generate(net, words, noise, steps, guidance) {
  const prompt = embed(net, words), empty = embed(net, []);
  let x = Float32Array.from(noise);
  for (let i = 0; i < steps; i++) {
    const at = (n) => (n >= steps ? 0 : steps === 1 ? 1 : 1 - ((1 - 0.001) * n) / (steps - 1));
    const [asked, without] = [velocity(net, x, 1000 * at(i), prompt), velocity(net, x, 1000 * at(i), empty)];
    x = x.map((v, j) => v + (at(i + 1) - at(i)) * (without[j] + guidance * (asked[j] - without[j])));
  }
  return x;
}

// Normal numbers that follow from a seed.
function normals(seed, n) {
  let s = (seed * 2654435761 + 12345) >>> 0;
  const uniform = () => { s = (s + 0x6d2b79f5) >>> 0; let t = Math.imul(s ^ (s >>> 15), 1 | s); t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t; return ((t ^ (t >>> 14)) >>> 0) / 4294967296; };
  return Float32Array.from({ length: n }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}

function network(model, buffers) {
  const { tokens, pooled } = tensors(buffers.prompts), own = (name) => model.get(name);
  return { base: tensors(buffers.base), adapter: tensors(buffers.adapter), prompts: { tokens, pooled }, words: own("words"), heads: own("heads"), k: own("k"), scaling: own("scaling"), on: true, turned: {} };
}

// Each latent's factor, from the factors of the styles it belongs to.
function turn(groups, factors) {
  const turned = {};
  for (const [style, layers] of Object.entries(groups)) {
    for (const [layer, latents] of Object.entries(layers)) for (const j of latents) (turned[layer] ??= {})[j] = (turned[layer][j] ?? 1) * (factors[style] ?? 1);
  }
  return turned;
}

// A page fetches the files that lie beside this module; a notebook asks its kernel.
async function buffers(model) {
  if (import.meta.url.startsWith("http")) {
    const fetched = await Promise.all(Object.entries(model.get("files")).map(async ([name, path]) => {
      const answer = await fetch(new URL(`data/${path}`, import.meta.url));
      if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
      return [name, await answer.arrayBuffer()];
    }));
    return Object.fromEntries(fetched);
  }
  const arrived = new Promise((done) => model.on("change:bytes", done));
  put(model, "asked", model.get("asked") + 1);
  await arrived;
  return Object.fromEntries(Object.entries(model.get("bytes")).map(([name, text]) => [name, Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer]));
}

function paint(canvas, pixels) {
  const picture = canvas.getContext("2d").createImageData(16, 16);
  pixels.forEach((v, i) => picture.data.set([...Array(3).fill(Math.round(127.5 * (Math.max(-1, Math.min(1, v)) + 1))), 255], 4 * i));
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function choice(parent, model, name, text, options) {
  const label = draw(parent, "label", {}, `${text} `), select = draw(label, "select");
  for (const option of options) draw(select, "option", { value: option }, option);
  select.value = model.get(name);
  select.addEventListener("change", () => put(model, name, select.value));
}

function render({ model, el }) {
  const root = frame(el), top = row(root), words = row(root), pictures = row(root), sliders = draw(root, "div"), status = draw(root, "div", { role: "status", style: "font-size:13px;min-height:1.5em" });
  let net = null, waiting = false;
  const button = draw(top, "button", { type: "button" }, "Load the model (1.4 MB)");
  choice(words, model, "digit", "digit", model.get("digits"));
  choice(words, model, "style", "style in the prompt", ["plain", ...model.get("styles")]);
  const seed = draw(draw(words, "label", {}, "noise "), "input", { type: "number", min: 0, max: 9999, value: model.get("seed"), style: "width:5rem" });
  seed.addEventListener("input", () => put(model, "seed", Number(seed.value)));
  const canvases = ["adapter off", "adapter on"].map((name) => {
    const box = draw(pictures, "figure", { style: "margin:.4rem 0;text-align:center;font-size:13px" });
    const canvas = draw(box, "canvas", { width: 16, height: 16, role: "img", "aria-label": name, style: "width:144px;height:144px;image-rendering:pixelated;border:1px solid #767676" });
    draw(box, "figcaption", {}, name);
    return canvas;
  });
  const turner = (name, text, max) => {
    const line = draw(sliders, "label", { style: "display:flex;gap:.6rem;align-items:center;max-width:34rem;font-size:13px" });
    draw(line, "span", { style: "flex:0 0 19rem" }, text);
    const input = draw(line, "input", { type: "range", min: 0, max, step: 0.25, value: model.get("factors")[name], style: "flex:1;min-width:5rem" }), shown = draw(line, "output", {}, `× ${input.value}`);
    input.addEventListener("input", () => { shown.textContent = `× ${input.value}`; put(model, "factors", { ...model.get("factors"), [name]: Number(input.value) }); });
  };
  for (const style of model.get("styles")) turner(style, `latents of ${style}`, 2);
  for (const [name, style] of Object.entries(model.get("singles"))) turner(name, `${name} (moves ${style})`, 4);
  const show = () => {
    if (!net || waiting) return;
    waiting = true;
    status.textContent = "drawing …";
    setTimeout(() => {
      waiting = false;
      const began = performance.now(), noise = normals(model.get("seed"), 256), asked = [model.get("digit"), model.get("style")];
      net.turned = turn(model.get("groups"), model.get("factors"));
      [false, true].forEach((on, i) => { net.on = on; paint(canvases[i], generate(net, asked, noise, model.get("steps"), model.get("guidance"))); });
      status.textContent = `“${asked.join(", ")}”, ${model.get("steps")} steps, ${((performance.now() - began) / 1000).toFixed(1)} s`;
    }, 20);
  };
  button.addEventListener("click", async () => {
    if (net) return show();
    button.disabled = true;
    status.textContent = "loading …";
    try { net = network(model, await buffers(model)); button.textContent = "Draw again"; show(); }
    catch (error) { status.textContent = `The model could not be loaded: ${error.message}`; }
    button.disabled = false;
  });
  for (const name of ["digit", "style", "seed", "factors"]) model.on(`change:${name}`, show);
}

export { generate, network, tensors, turn, velocity, embed };
export default { render };
