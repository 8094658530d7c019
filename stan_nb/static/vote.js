// A blind comparison: two pictures, left or right, by key or by button. Which run drew which is not known here.
// State: pairs (left picture, right picture, what was asked), votes ("left", "right" or "tie", one for each pair that was judged).
function render({ model, el }) {
  const root = frame(el), asked = draw(root, "p", { style: "margin:.2rem 0" }), pictures = row(root), buttons = row(root), status = draw(root, "div", { role: "status", style: "font-size:13px" });
  root.tabIndex = 0;
  const vote = (choice) => { const votes = model.get("votes"); if (votes.length < model.get("pairs").length) put(model, "votes", [...votes, choice]); };
  const undo = () => put(model, "votes", model.get("votes").slice(0, -1));
  const images = ["left", "right"].map((side) => {
    const image = draw(pictures, "img", { alt: `${side} picture`, style: "width:160px;height:160px;object-fit:contain;image-rendering:pixelated;border:1px solid #767676;cursor:pointer" });
    image.addEventListener("click", () => vote(side));
    return image;
  });
  for (const [text, act] of [["← left", () => vote("left")], ["↓ no difference", () => vote("tie")], ["right →", () => vote("right")], ["⌫ take back", undo]]) {
    draw(buttons, "button", { type: "button" }, text).addEventListener("click", act);
  }
  root.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowDown: () => vote("tie"), Backspace: undo }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  follow(model, ["votes", "pairs"], () => {
    const pairs = model.get("pairs"), done = model.get("votes").length, now = pairs[Math.min(done, pairs.length - 1)];
    images.forEach((image, i) => { image.src = now[i]; image.style.visibility = done < pairs.length ? "visible" : "hidden"; });
    asked.textContent = done < pairs.length ? `Which one is rather “${now[2]}”?` : "All pairs are judged. Thank you.";
    status.textContent = `${done} of ${pairs.length}; keys: ← → ↓ and backspace`;
  });
}

export default { render };
