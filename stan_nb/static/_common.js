// What every picture needs. It is put in front of each of them, so that a picture is one module.
const POSITIVE = "#d55e00", NEGATIVE = "#0072b2", INK = "#767676";
const SVG = new Set(["svg", "rect", "line", "path", "polygon", "circle", "text", "g", "title"]);

// A new element below `parent`.
function draw(parent, tag, attributes = {}, text = "") {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== "") node.textContent = text;
  return parent.appendChild(node);
}

// The frame of a picture. Notebooks take the arrow keys for themselves unless they are told not to.
function frame(el) {
  el.setAttribute("data-lm-suppress-shortcuts", "true");
  el.addEventListener("keydown", (event) => event.stopPropagation());
  return draw(el, "div", { style: "font:14px/1.5 system-ui,sans-serif;max-width:46rem;color:inherit;background:none" });
}

function row(parent) { return draw(parent, "div", { style: "display:flex;flex-wrap:wrap;gap:.5rem 1.2rem;align-items:center" }); }

// A slider with its label, tied to one name of the model's state.
function slider(parent, model, name, text, min, max) {
  const label = draw(parent, "label", { style: "display:flex;gap:.6rem;align-items:center;flex:1 1 15rem" });
  draw(label, "span", {}, text);
  const input = draw(label, "input", { type: "range", min, max, step: 1, style: "flex:1;min-width:6rem" });
  input.addEventListener("input", () => put(model, name, Number(input.value)));
  return input;
}

function put(model, name, value) { model.set(name, value); model.save_changes(); }

// Show now, and again whenever one of the names changes.
function follow(model, names, show) {
  for (const name of names) model.on(`change:${name}`, show);
  show();
}

// The style of a word shaded by a value: a ground, and a line below whose kind is the sign and whose thickness is the strength (as `stan_nb.viz.token_heatmap`).
function shade(value, most) {
  if (!value) return "border-bottom:3px solid transparent";
  const colour = value > 0 ? "213,94,0" : "0,114,178", size = Math.min(1, Math.abs(value) / most);
  return `background:rgba(${colour},${(0.1 + 0.52 * size).toFixed(2)});border-bottom:${Math.max(1, Math.round(3 * size))}px ${value > 0 ? "solid" : "dotted"} rgb(${colour})`;
}
