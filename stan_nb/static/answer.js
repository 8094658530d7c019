// An answer as it is written: its tokens, and the latents of one layer that fired when the marked token was chosen.
// State: tokens (strings), values (a row of num_latents numbers for each token), at (the marked token), layer (a name).

function shown(token) { return token.replace(/\n/g, "↵\n"); }

function bars(svg, values) {
  const width = 440 / Math.max(1, values.length), most = Math.max(...values.map(Math.abs)) || 1;
  values.forEach((value, j) => {
    const height = (50 * Math.abs(value)) / most;
    if (value) draw(svg, "rect", { x: j * width + 2, width: width - 4, y: value > 0 ? 58 - height : 58, height, rx: 1.5, fill: value > 0 ? POSITIVE : NEGATIVE });
    draw(svg, "text", { x: (j + 0.5) * width, y: 126, "text-anchor": "middle", "font-size": 11, fill: "currentColor", "font-weight": value ? 700 : 400 }, j);
  });
  draw(svg, "line", { x1: 0, x2: 440, y1: 58, y2: 58, stroke: INK });
}

function render({ model, el }) {
  const root = frame(el), handle = slider(row(root), model, "at", "token", 0, 0);
  const text = draw(root, "div", { style: "white-space:pre-wrap;font:14px/1.7 ui-monospace,monospace;min-height:3.4em" });
  const svg = draw(root, "svg", { viewBox: "0 0 440 130", role: "img", style: "max-width:100%;height:auto" });
  const said = draw(root, "output", { style: "display:block;font-variant-numeric:tabular-nums" });
  follow(model, ["tokens", "values", "at"], () => {
    const [tokens, values, layer] = ["tokens", "values", "layer"].map((name) => model.get(name)), at = Math.min(model.get("at"), tokens.length - 1);
    handle.max = Math.max(0, tokens.length - 1);
    handle.value = Math.max(0, at);
    text.replaceChildren();
    tokens.forEach((token, i) => draw(text, "span", i === at ? { style: `outline:2px solid ${POSITIVE};border-radius:2px` } : {}, shown(token)));
    svg.replaceChildren();
    const now = at >= 0 && values[at] ? values[at] : [], on = now.map((value, j) => [j, value]).filter(([, value]) => value);
    bars(svg, now);
    svg.setAttribute("aria-label", `latents of ${layer} at this token: ${on.map(([j]) => j).join(", ") || "none"}`);
    said.textContent = at < 0 ? "nothing is written yet" : `token ${at + 1} of ${tokens.length} · ${on.map(([j, value]) => `#${j} ${value.toFixed(2)}`).join(" · ")}`;
  });
}

export default { render };
