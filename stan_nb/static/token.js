// One token on its way: encoder, TopK, decoder, sum.
// State: x (d_in), encoder (num_latents rows of d_in), decoder (num_latents rows of d_out), frozen (d_out: the frozen layer's output), k, scale, step (0 to 4).
const STEPS = [
  "A token arrives: x, one number for each input feature. The frozen layer has already answered.",
  "Encoder: each row of E is compared with x; the results are the pre-activations z, one a latent.",
  "TopK: the k largest |z| win. The others are zero from here on, and so are their gradients.",
  "Decoder: each winner writes its own row of D, as strongly as its z says.",
  "Sum: the written rows, times the scale, are added to the frozen layer's output.",
];

function cells(svg, table, x, y, size, most, on) {
  table.forEach((line, i) => line.forEach((value, j) => {
    const opacity = on(i) ? 0.12 + 0.88 * Math.min(1, Math.abs(value) / most) : 0;
    draw(svg, "rect", { x: x + j * size, y: y + i * size, width: size - 1.5, height: size - 1.5, rx: 1.5, stroke: INK, "stroke-width": 0.5,
      "stroke-opacity": on(i) ? 1 : 0.35, fill: value >= 0 ? POSITIVE : NEGATIVE, "fill-opacity": opacity });
  }));
}

function title(svg, text, x) { draw(svg, "text", { x, y: 12, "font-size": 12, "text-anchor": "middle", fill: "currentColor" }, text); }

function picture(svg, model) {
  const [x, encoder, decoder, frozen, k, scale, step] = ["x", "encoder", "decoder", "frozen", "k", "scale", "step"].map((name) => model.get(name));
  const z = encoder.map((line) => line.reduce((sum, e, i) => sum + e * x[i], 0));
  const kept = z.map((_, j) => j).sort((a, b) => Math.abs(z[b]) - Math.abs(z[a]) || a - b).slice(0, k);
  const update = frozen.map((_, i) => scale * kept.reduce((sum, j) => sum + z[j] * decoder[j][i], 0)), y = frozen.map((v, i) => v + update[i]);
  const size = 15, top = 22, most = (rows) => Math.max(1e-9, ...rows.flat().map(Math.abs)), wins = (j) => step < 2 || kept.includes(j);
  const column = (values) => values.map((v) => [v]), down = (values) => top + (size * (z.length - values.length)) / 2;
  svg.replaceChildren();
  const width = { E: size * x.length, D: size * frozen.length };
  let at = 4;
  title(svg, "x", at + size / 2);
  cells(svg, column(x), at, down(x), size, most([x]), () => true);
  at += size + 26;
  title(svg, "E", at + width.E / 2);
  cells(svg, encoder, at, top, size, most(encoder), (j) => step >= 1 && wins(j));
  at += width.E + 22;
  title(svg, "z", at + size / 2);
  cells(svg, column(z), at, top, size, most([z]), (j) => step >= 1 && wins(j));
  if (step >= 2) kept.forEach((j) => draw(svg, "rect", { x: at - 2.5, y: top + j * size - 2, width: size + 3.5, height: size + 2.5, fill: "none", stroke: "currentColor", "stroke-width": 1.6 }));
  at += size + 22;
  title(svg, "D", at + width.D / 2);
  cells(svg, decoder, at, top, size, most(decoder), (j) => step >= 3 && kept.includes(j));
  at += width.D + 30;
  [["update", update, step >= 4], ["W₀x", frozen, true], ["y", y, step >= 4]].forEach(([name, values, on], i) => {
    title(svg, name, at + size / 2);
    cells(svg, column(values), at, down(values), size, most([update, frozen, y]), () => on);
    if (i < 2) draw(svg, "text", { x: at + size + 15, y: top + (size * z.length) / 2 + 4, "text-anchor": "middle", "font-size": 15, fill: "currentColor" }, i ? "=" : "+");
    at += size + 30;
  });
  svg.setAttribute("viewBox", `0 0 ${at} ${top + size * z.length + 4}`);
  svg.setAttribute("aria-label", `step ${step} of 4: ${STEPS[step]}${step >= 2 ? ` Winners: ${[...kept].sort((a, b) => a - b).join(", ")}.` : ""}`);
}

function render({ model, el }) {
  const root = frame(el), svg = draw(root, "svg", { role: "img", style: "width:100%;height:auto" }), controls = row(root);
  const button = draw(controls, "button", { type: "button", style: "font:inherit;padding:.15rem .8rem;cursor:pointer" }, "play"), handle = slider(controls, model, "step", "step", 0, 4);
  const said = draw(root, "output", { style: "display:block;min-height:3em" });
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  button.addEventListener("click", () => {
    if (timer) return stop();
    button.textContent = "pause";
    if (model.get("step") === 4) put(model, "step", 0);
    timer = setInterval(() => { put(model, "step", model.get("step") + 1); if (model.get("step") >= 4) stop(); }, 1600);
  });
  handle.addEventListener("input", stop);
  follow(model, ["x", "encoder", "decoder", "frozen", "k", "scale", "step"], () => {
    handle.value = model.get("step");
    picture(svg, model);
    said.textContent = STEPS[model.get("step")];
  });
  return stop;
}

export default { render };
