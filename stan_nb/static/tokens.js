// A text shaded by one latent; which latent is chosen from a list, or by a token: a click offers the latents that fire on it.
// State: tokens (strings, with a space in front where one belongs), values (for each latent of `latents` a number for each token), latents (their names), at (which of them), token (the token that was asked, or -1), title.

function render({ model, el }) {
  const root = frame(el), controls = row(root), label = draw(controls, "label", { style: "display:flex;gap:.6rem;align-items:center" }, "latent ");
  const picker = draw(label, "select", { style: "font:inherit" }), buttons = [["◀", "previous latent", -1], ["▶", "next latent", 1]];
  model.get("latents").forEach((name, i) => draw(picker, "option", { value: i }, name));
  picker.addEventListener("change", () => put(model, "at", Number(picker.value)));
  for (const [sign, name, step] of buttons) {
    draw(controls, "button", { type: "button", "aria-label": name, style: "font:inherit;padding:0 .6rem" }, sign)
      .addEventListener("click", () => { const n = model.get("latents").length; put(model, "at", (model.get("at") + step + n) % n); });
  }
  const text = draw(root, "div", { style: "line-height:2.1;font-size:15px;margin:.6rem 0;overflow-wrap:anywhere;white-space:pre-wrap" });
  const asked = row(root), said = draw(root, "output", { style: "display:block;font-variant-numeric:tabular-nums" });
  follow(model, ["at", "token"], () => {
    const [tokens, values, latents, at, token] = ["tokens", "values", "latents", "at", "token"].map((name) => model.get(name));
    const now = values[at] || [], most = Math.max(...now.map(Math.abs)) || 1, on = now.filter((value) => value).length;
    const focused = text.contains(document.activeElement) ? document.activeElement.dataset.token : null;
    picker.value = at;
    text.replaceChildren();
    tokens.forEach((word, i) => {
      const piece = draw(text, "span", { role: "button", tabindex: 0, "data-token": i, "aria-pressed": i === token, title: `${word.trim()} ${now[i] ? now[i].toFixed(2) : "silent"}`,
        style: `cursor:pointer;padding:1px 0;border-radius:3px;${shade(now[i], most)}${i === token ? ";outline:2px solid currentColor" : ""}` }, word.replace(/\n/g, "⏎"));
      const ask = () => put(model, "token", i === model.get("token") ? -1 : i);
      piece.addEventListener("click", ask);
      piece.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); ask(); } });
    });
    if (focused !== null) text.children[focused].focus();
    asked.replaceChildren();
    if (token >= 0) {
      const here = latents.map((_, j) => j).filter((j) => values[j][token]).sort((a, b) => Math.abs(values[b][token]) - Math.abs(values[a][token])).slice(0, 12);
      draw(asked, "span", {}, `on “${tokens[token].trim()}” fire:`);
      for (const j of here) draw(asked, "button", { type: "button", style: `font:inherit;padding:0 .5rem${j === at ? ";font-weight:700" : ""}` }, `${latents[j]} ${values[j][token].toFixed(2)}`).addEventListener("click", () => put(model, "at", j));
      if (!here.length) draw(asked, "span", {}, "none of these");
    }
    const best = now.reduce((top, value, i) => (Math.abs(value) > Math.abs(now[top]) ? i : top), 0);
    said.textContent = `${latents[at]} fires on ${on} of ${tokens.length} tokens${on ? `, strongest on “${tokens[best].trim()}” (${now[best].toFixed(2)})` : ""} · press a token to see what fires on it`;
  });
}

export default { render };
