// A latent is turned up and down: what happens to an answer, and to answers that should stay as they are.
// State: curves (name -> rows of `stan_nb.causes.dose_response`, all with the same doses), at (which dose), curve (which of them), target (what the probability is of), samples (name -> a text for each dose; may be empty).

function panel(parent, title, series, doses, at, top) {
  const box = draw(parent, "div", { style: "flex:1 1 17rem;min-width:0" }), low = doses[0], high = doses[doses.length - 1];
  draw(box, "div", { style: "font-weight:600;font-size:13px" }, title);
  const svg = draw(box, "svg", { viewBox: "0 0 340 176", role: "img", style: "max-width:100%;height:auto;display:block", "aria-label": `${title}: ${series.map(([name, values]) => `${name} ${values[at].toFixed(3)}`).join(", ")}` });
  const x = (dose) => 40 + (290 * (dose - low)) / (high - low || 1), y = (value) => 150 - (138 * value) / (top || 1);
  for (const share of [0, 0.5, 1]) {
    draw(svg, "line", { x1: 40, x2: 330, y1: y(share * top), y2: y(share * top), stroke: INK, "stroke-opacity": 0.25 });
    draw(svg, "text", { x: 35, y: y(share * top) + 4, "text-anchor": "end", "font-size": 11, fill: "currentColor" }, String(Number((share * top).toPrecision(2))));
  }
  for (const dose of [low, ...(low < 1 && high > 1 ? [1] : []), high]) draw(svg, "text", { x: x(dose), y: 168, "text-anchor": "middle", "font-size": 11, fill: "currentColor" }, dose);
  draw(svg, "line", { x1: x(doses[at]), x2: x(doses[at]), y1: 8, y2: 150, stroke: "currentColor", "stroke-width": 1.2 });
  for (const [name, values, colour, dash] of series) {
    draw(svg, "path", { d: values.map((value, i) => `${i ? "L" : "M"}${x(doses[i])} ${y(value)}`).join(""), fill: "none", stroke: colour, "stroke-width": 2.2, "stroke-dasharray": dash });
    values.forEach((value, i) => draw(svg, "circle", { cx: x(doses[i]), cy: y(value), r: i === at ? 5 : 2.6, fill: colour }));
  }
  if (series.length > 1) for (const [name, , colour, dash] of series) draw(box, "span", { style: `font-size:12px;margin-right:1rem;border-bottom:2px ${dash === "none" ? "solid" : "dashed"} ${colour}` }, name);
}

function render({ model, el }) {
  const root = frame(el), controls = row(root), first = Object.values(model.get("curves"))[0], handle = slider(controls, model, "at", "dose", 0, first.length - 1);
  const picker = draw(draw(controls, "label", {}, "latent "), "select", { style: "font:inherit" });
  for (const name of Object.keys(model.get("curves"))) draw(picker, "option", { value: name }, name);
  picker.addEventListener("change", () => put(model, "curve", picker.value));
  const panels = row(root), said = draw(root, "output", { style: "display:block;font-variant-numeric:tabular-nums" }), text = draw(root, "pre", { style: "white-space:pre-wrap;margin:.3rem 0 0;background:none;color:inherit;font-size:13px" });
  follow(model, ["at", "curve"], () => {
    const [curves, at, name, target, samples] = ["curves", "at", "curve", "target", "samples"].map((key) => model.get(key)), rows = curves[name], doses = rows.map((r) => r.dose);
    [handle.value, picker.value] = [at, name];
    handle.setAttribute("aria-valuetext", `times ${doses[at]}`);
    const top = (key) => Math.max(...Object.values(curves).flat().map((r) => r[key] ?? 0));
    panels.replaceChildren();
    panel(panels, target, [["probability", rows.map((r) => r.probability), POSITIVE, "none"]], doses, at, 1);
    const kl = [["the inputs that are steered", rows.map((r) => r.kl), POSITIVE, "none"]];
    if ("kl_elsewhere" in rows[0]) kl.push(["other inputs", rows.map((r) => r.kl_elsewhere), NEGATIVE, "5 3"]);
    panel(panels, "answers moved (KL, nats)", kl, doses, at, Math.max(top("kl"), top("kl_elsewhere")));
    const r = rows[at];
    said.textContent = `${name} × ${doses[at]}: ${target} ${r.probability.toFixed(3)} · KL ${Math.max(0, r.kl).toFixed(3)}${"kl_elsewhere" in r ? ` · elsewhere ${Math.max(0, r.kl_elsewhere).toFixed(3)}` : ""}`;
    text.textContent = (samples[name] || [])[at] || "";
  });
}

export default { render };
