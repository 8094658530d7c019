// LoRA writes into one plane, STAN into many: the same inputs through both, in three dimensions, to be turned.
// State: lora, stan (points, [x, y, z] each), which (for each point of stan, the number of its plane),
// lora_plane (two directions), stan_planes (two directions for each plane), turn (degrees).
const PLANE_COLOURS = ["#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#767676"];

function orthonormal([a, b]) {
  const dot = (p, q) => p.reduce((sum, v, i) => sum + v * q[i], 0), unit = (p) => { const n = Math.sqrt(dot(p, p)) || 1; return p.map((v) => v / n); };
  const first = unit(a), along = dot(first, b);
  return [first, unit(b.map((v, i) => v - along * first[i]))];
}

// Seen from slightly above; `turn` goes round the vertical axis. Returns [right, up, towards the reader].
function look([x, y, z], turn) {
  const a = (turn * Math.PI) / 180, tilt = 0.4, depth = x * Math.sin(a) + y * Math.cos(a);
  return [x * Math.cos(a) - y * Math.sin(a), z * Math.cos(tilt) + depth * Math.sin(tilt), z * Math.sin(tilt) - depth * Math.cos(tilt)];
}

function scene(svg, planes, points, colour, turn, reach) {
  svg.replaceChildren();
  const at = (p) => { const [u, v] = look(p, turn); return [130 + (112 * u) / reach, 105 - (95 * v) / reach]; };
  planes.forEach((plane, number) => {
    const [a, b] = orthonormal(plane), rim = [];
    for (let i = 0; i < 48; i++) {
      const [c, s] = [Math.cos((i * Math.PI) / 24), Math.sin((i * Math.PI) / 24)];
      rim.push(at(a.map((v, j) => 0.92 * reach * (c * v + s * b[j]))).map((v) => v.toFixed(1)).join(","));
    }
    draw(svg, "polygon", { points: rim.join(" "), fill: colour(number), "fill-opacity": Math.min(0.08, 0.3 / planes.length), stroke: colour(number), "stroke-opacity": 0.6 });
  });
  const far = points.map((p) => ({ ...p, depth: look(p.at, turn)[2] })).sort((p, q) => p.depth - q.depth);
  for (const p of far) { const [cx, cy] = at(p.at); draw(svg, "circle", { cx, cy, r: 3.1, fill: colour(p.plane) }); }
}

function render({ model, el }) {
  const root = frame(el), pictures = row(root), panels = ["LoRA", "STAN"].map((name) => {
    const panel = draw(pictures, "div", { style: "flex:1 1 15rem" });
    draw(panel, "strong", {}, name);
    const svg = draw(panel, "svg", { viewBox: "0 0 260 210", role: "img", style: "width:100%;height:auto;touch-action:pan-y;cursor:grab" });
    return [svg, draw(panel, "div", { style: "font-size:13px" })];
  });
  const handle = slider(row(root), model, "turn", "turn", 0, 360);
  let from = null;
  for (const [svg] of panels) {
    svg.addEventListener("pointerdown", (event) => { from = [event.clientX, model.get("turn")]; svg.setPointerCapture(event.pointerId); });
    svg.addEventListener("pointermove", (event) => { if (from) put(model, "turn", (((from[1] + Math.round(event.clientX - from[0])) % 360) + 360) % 360); });
    for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => { from = null; });
  }
  follow(model, ["lora", "stan", "which", "lora_plane", "stan_planes", "turn"], () => {
    const turn = model.get("turn"), lora = model.get("lora"), stan = model.get("stan"), which = model.get("which"), planes = model.get("stan_planes");
    const reach = Math.max(1e-9, ...[...lora, ...stan].map((p) => Math.hypot(...p)));
    handle.value = turn;
    scene(panels[0][0], [model.get("lora_plane")], lora.map((at) => ({ at, plane: 0 })), () => NEGATIVE, turn, reach);
    scene(panels[1][0], planes, stan.map((at, i) => ({ at, plane: which[i] })), (number) => PLANE_COLOURS[number % PLANE_COLOURS.length], turn, reach);
    panels[0][1].textContent = `${lora.length} inputs, one plane`;
    panels[1][1].textContent = `the same ${stan.length} inputs, ${planes.length} planes`;
    panels.forEach(([svg, text]) => svg.setAttribute("aria-label", `${text.textContent}, seen from ${turn} degrees`));
  });
}

export default { render };
