// TopK on one token: k moves, the losing latents go out, and the output (here two numbers) goes where the winners write.
// State: z (num_latents numbers), rows (num_latents pairs: each latent's write direction), k, select ("abs", "value", "relu").

// The winners, best first; ties go to the lower index, as in stan_nb.topk.
function winners(z, k, select) {
  const score = select === "abs" ? Math.abs : (value) => value;
  return z.map((_, j) => j).sort((a, b) => score(z[b]) - score(z[a]) || a - b).slice(0, k);
}

function choose(n, k) {
  let sets = 1;
  for (let i = 1; i <= k; i++) sets = (sets * (n - k + i)) / i;
  return Math.round(sets).toLocaleString("en");
}

function bars(svg, z, kept) {
  const width = 440 / z.length, most = Math.max(...z.map(Math.abs)) || 1;
  z.forEach((value, j) => {
    const height = Math.max(1.5, (82 * Math.abs(value)) / most), colour = value >= 0 ? POSITIVE : NEGATIVE, on = kept.includes(j);
    draw(svg, "rect", { x: j * width + 2, width: width - 4, y: value >= 0 ? 95 - height : 95, height, rx: 1.5,
      fill: on ? colour : "none", stroke: on ? colour : INK, "stroke-dasharray": on ? "none" : "2 2" });
    draw(svg, "text", { x: (j + 0.5) * width, y: 196, "text-anchor": "middle", "font-size": 11, fill: "currentColor",
      "font-weight": on ? 700 : 400 }, j);
  });
  draw(svg, "line", { x1: 0, x2: 440, y1: 95, y2: 95, stroke: INK });
}

// The winners' contributions, tip to tail; the ring is where all latents together lead. Returns the output.
function path(svg, z, rows, kept, relu) {
  const value = (j) => (relu ? Math.max(0, z[j]) : z[j]);
  const walk = (js) => js.map((_, i) => [0, 1].map((side) => js.slice(0, i + 1).reduce((sum, j) => sum + value(j) * rows[j][side], 0)));
  const all = walk(winners(z, z.length, relu ? "relu" : "abs")), ends = walk(kept);
  const reach = Math.max(1e-9, ...[...all, ...ends].flat().map(Math.abs)), at = ([x, y]) => [110 + (95 * x) / reach, 100 - (88 * y) / reach];
  for (const [x1, y1, x2, y2] of [[10, 100, 210, 100], [110, 8, 110, 192]]) draw(svg, "line", { x1, y1, x2, y2, stroke: INK, "stroke-width": 0.7 });
  let from = at([0, 0]);
  ends.forEach((end, i) => {
    const to = at(end);
    draw(svg, "line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], stroke: z[kept[i]] >= 0 ? POSITIVE : NEGATIVE, "stroke-width": 2.2 });
    from = to;
  });
  const [x, y] = at(all[all.length - 1]);
  draw(svg, "circle", { cx: x, cy: y, r: 7, fill: "none", stroke: INK, "stroke-width": 1.6 });
  draw(svg, "circle", { cx: from[0], cy: from[1], r: 4.5, fill: "currentColor" });
  return ends[ends.length - 1];
}

function render({ model, el }) {
  const root = frame(el), controls = row(root), handle = slider(controls, model, "k", "latents kept, k", 1, model.get("z").length);
  const rule = draw(draw(controls, "label", {}, "rule "), "select", { style: "font:inherit" });
  for (const name of ["abs", "value", "relu"]) draw(rule, "option", { value: name }, name);
  rule.addEventListener("change", () => put(model, "select", rule.value));
  const pictures = row(root);
  const [left, right] = [[440, "2 1 17rem"], [220, "1 1 9rem"]].map(([width, flex]) =>
    draw(pictures, "svg", { viewBox: `0 0 ${width} 200`, role: "img", style: `flex:${flex};max-width:100%;height:auto` }));
  const said = draw(root, "output", { style: "display:block;font-variant-numeric:tabular-nums" });
  follow(model, ["z", "rows", "k", "select"], () => {
    const [z, rows, k, select] = ["z", "rows", "k", "select"].map((name) => model.get(name)), kept = winners(z, k, select);
    [handle.value, rule.value] = [k, select];
    left.replaceChildren();
    right.replaceChildren();
    bars(left, z, kept);
    const end = path(right, z, rows, kept, select === "relu").map((value) => value.toFixed(2)).join(", ");
    const size = (js) => js.reduce((sum, j) => sum + Math.abs(z[j]), 0), share = Math.round((100 * size(kept)) / (size(z.map((_, j) => j)) || 1));
    left.setAttribute("aria-label", `${z.length} latents as bars; kept: ${[...kept].sort((a, b) => a - b).join(", ")}`);
    right.setAttribute("aria-label", `the output moves to (${end}); a ring marks where all latents together lead`);
    said.textContent = `k = ${k} of ${z.length}: one of ${choose(z.length, k)} sets · ${share}% of Σ|z| · output (${end})`;
  });
}

export default { render };
