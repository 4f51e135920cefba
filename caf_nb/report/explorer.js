// The front end of caf_nb.report.explorer: no library, no network.
const make = (tag, text = "", attributes = {}) => {
  const node = document.createElement(tag);
  node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

const choice = (model, name, label, titles, value) => {
  const box = make("label", label + " "), select = make("select", "", { "aria-label": label });
  titles.forEach((title, i) => select.append(make("option", title, { value: value(title, i) })));
  select.value = String(model.get(name));
  select.onchange = () => { model.set(name, typeof model.get(name) === "number" ? Number(select.value) : select.value); model.save_changes(); };
  box.append(select);
  return box;
};

const load = source => new Promise(done => { const image = new Image(); image.onload = () => done(image); image.src = source; });

function render({ model, el }) {
  const root = make("div", "", { class: "caf-explorer", style: "font:13px sans-serif;max-width:900px" });
  const bar = make("div", "", { style: "display:flex;gap:12px;flex-wrap:wrap;align-items:center;margin-bottom:6px" });
  const views = ["side by side", "wipe", "difference"], view = make("select", "", { "aria-label": "View" });
  views.forEach(title => view.append(make("option", title)));
  const tick = make("label", " detections"), box = make("input", "", { type: "checkbox" });
  tick.prepend(box);
  box.onchange = () => { model.set("boxes", box.checked); model.save_changes(); };
  bar.append(choice(model, "pair", "Pair", model.get("pairs"), (_, i) => i), choice(model, "method", "Method", model.get("methods"), title => title), view, tick);
  const presets = make("div", "", { style: "display:flex;gap:6px;flex-wrap:wrap;margin-bottom:6px" });
  const stage = make("div", "", { style: "position:relative;overflow:auto;max-height:560px" });
  const canvas = make("canvas", "", { role: "img", "aria-label": "pictures", style: "cursor:zoom-in;image-rendering:pixelated" });
  const cut = make("input", "", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Wipe", style: "display:none;width:260px" });
  const status = make("div", "", { class: "caf-status", style: "margin:4px 0" });
  const sliders = make("div", "", { style: "display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:2px 14px" });
  stage.append(canvas);
  let zoom = 2;
  canvas.onclick = () => { zoom = zoom === 2 ? 5 : 2; canvas.style.cursor = zoom === 2 ? "zoom-in" : "zoom-out"; draw(); };

  const inputs = model.get("terms").map(([letter, name], i) => {
    const line = make("label", "", { style: "min-width:0;display:flex;align-items:center;gap:6px" });
    const input = make("input", "", { type: "range", min: 0, max: 1000, "aria-label": name, style: "flex:1;min-width:0" });
    const number = make("span", "", { style: "width:2.5em;text-align:right" });
    input.oninput = () => { number.textContent = (input.value / 1000).toFixed(2); };
    input.onchange = () => {
      model.set("weights", inputs.map(slider => slider.input.value / 1000));
      model.save_changes();
      status.textContent = "training ...";
    };
    line.append(make("span", `${letter} ${name}`, { style: "width:8.5em;flex:none" }), input, number);
    sliders.append(line);
    return { input, number };
  });
  const place = () => model.get("weights").forEach((weight, i) => {
    inputs[i].input.value = Math.round(weight * 1000);
    inputs[i].number.textContent = weight.toFixed(2);
  });
  for (const [title, weights] of Object.entries(model.get("presets"))) {
    const button = make("button", title);
    button.onclick = () => { model.set("weights", weights); model.save_changes(); status.textContent = "training ..."; };
    presets.append(button);
  }

  async function draw() {
    const shown = model.get("images"), titles = Object.keys(shown);
    if (!titles.length) return;
    const [infrared, visible, fused] = await Promise.all(titles.map(title => load(shown[title])));
    const w = fused.width, h = fused.height, pen = canvas.getContext("2d"), beside = view.value === "side by side";
    canvas.width = beside ? 3 * w + 8 : w;
    canvas.height = h;
    canvas.style.width = `${canvas.width * zoom}px`;
    if (beside) [infrared, visible, fused].forEach((image, i) => pen.drawImage(image, i * (w + 4), 0));
    else {
      pen.drawImage(visible, 0, 0);
      const x = Math.round(w * cut.value / 100);
      if (view.value === "wipe") pen.drawImage(fused, x, 0, w - x, h, x, 0, w - x, h);
      else { pen.globalCompositeOperation = "difference"; pen.drawImage(fused, 0, 0); pen.globalCompositeOperation = "source-over"; }
    }
    cut.style.display = view.value === "wipe" ? "block" : "none";
    const metrics = Object.entries(model.get("metrics")).map(([name, value]) => `${name} ${value.toFixed(2)}`).join("   ");
    status.textContent = `${model.get("status")}   ${metrics}`;
  }
  view.onchange = draw;
  cut.oninput = draw;
  model.on("change:images", draw);
  model.on("change:metrics", draw);
  model.on("change:status", draw);
  model.on("change:weights", place);
  place();
  draw();
  root.append(bar, presets, stage, cut, status, sliders);
  el.append(root);
}
export default { render };
