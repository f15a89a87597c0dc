// The page: what is chosen, drawn and said. Text goes in as text, never as markup.

(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const layers = page.layers.map(points.unpack);
  const find = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const THEMES = ["automatic", "light", "dark"];
  const BINS = 24;
  const MOST_ROWS = 400;
  const MOST_POINTS = 20000;
  const [height, width] = page.size;
  const margin = [0.08 * height, 0.08 * width]; // room for what is read outside
  const state = { layer: layers.length - 1, depth: 1, group: 0, cell: [0, 0], plain: false, held: false };
  const known = new Map(); // what is computed once for a layer and group
  let announcing = 0;

  const shown = (value) => (Math.abs(value) < 0.005 ? "0" : value.toFixed(2).replace(/\.?0+$/, ""));
  const pair = (at) => `(${shown(at[0])}, ${shown(at[1])})`;
  const current = () => layers[state.layer];
  const chain = () => layers.slice(state.layer - state.depth + 1, state.layer + 1);

  // Through how many layers the output of one may be followed: three, as in the paper, unless kernels are large.
  function deepest(index) {
    let count = layers[index].first.length;
    let depth = 1;
    while (depth < Math.min(3, index + 1) && (count *= layers[index - depth].first.length) <= MOST_POINTS) depth += 1;
    return depth;
  }

  function make(parent, name, text, attributes = {}) {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  }

  function makeDrawn(parent, name, attributes) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  }

  function set(element, attributes) {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  }

  // -- what is drawn on the image ------------------------------------------------------------------------------------

  // One pixel of the screen, in pixels of the image.
  const unit = () => 1 / (find("drawing").getScreenCTM()?.a || 1);

  function circles(parent, many, draw) {
    while (parent.childElementCount > many.length) parent.lastElementChild.remove();
    while (parent.childElementCount < many.length) makeDrawn(parent, "circle", {});
    many.forEach((point, index) => draw(parent.children[index], point));
  }

  function drawPoints(found, still) {
    const radius = (found.points.length <= 9 ? 4.5 : found.points.length <= 81 ? 3.5 : 2.5) * unit();
    const strongest = points.extent(found.points.map((point) => Math.abs(point.weight)))[1];
    circles(find("moved"), found.points, (circle, { at, weight }) => set(circle, {
      cx: at[1], cy: at[0], r: radius, opacity: points.opacity(weight, strongest).toFixed(3),
      class: weight < 0 ? "negative" : "positive",
    }));
    circles(find("still"), still ? still.points : [], (circle, { at }) => set(circle, { cx: at[1], cy: at[0], r: radius }));
  }

  function drawCell() {
    const layer = current();
    const [y, x] = points.toImage(state.cell, layer.outGrid);
    const [high, wide] = [layer.outGrid[0][0], layer.outGrid[1][0]];
    set(find("cell"), { x: x - wide / 2, y: y - high / 2, width: wide, height: high });
    const arm = 9 * unit();
    find("cross").setAttribute("d", `M${x - arm} ${y}H${x + arm}M${x} ${y - arm}V${y + arm}`);
  }

  // -- what is said --------------------------------------------------------------------------------------------------

  function say(found) {
    const layer = current();
    const counted = `${found.points.length} ${found.points.length === 1 ? "point" : "points"}`;
    const through = state.depth === 1 ? "one layer" : `${state.depth} layers`;
    const parts = [
      `Output pixel ${pair(state.cell)} of ${layer.name}, at ${pair(points.toImage(state.cell, layer.outGrid))} of the image, `
      + `reads ${counted} through ${through}`,
    ];
    if (found.points.length) {
      const range = (value) => points.extent(found.points.map(value)).map(shown).join(" to ");
      const outside = found.points.filter(({ at }) => at[0] <= -1 || at[1] <= -1 || at[0] >= height || at[1] >= width).length;
      parts.push(`rows ${range((point) => point.at[0])}, columns ${range((point) => point.at[1])}`);
      parts.push(`modulation ${range((point) => point.weight)}`);
      if (outside) parts.push(`${outside} outside of the image`);
    }
    if (found.lost) parts.push(`${found.lost} outside of a map in between, followed no further`);
    const text = `${parts.join("; ")}.`;
    find("reading").textContent = state.held ? `${text} Held: click again to let go.` : text;
    clearTimeout(announcing); // a reader is told where the pixel has come to rest
    announcing = setTimeout(() => { find("announced").textContent = text; }, 400);
  }

  function knownOf(layer) {
    const key = `${layers.indexOf(layer)} ${state.group % layer.groups}`;
    if (!known.has(key)) {
      const sorted = points.lengths(layer, state.group);
      known.set(key, { sorted, mean: points.meanDilation(layer, state.group, layer.kernel ? points.allCells(layer) : []) });
    }
    return known.get(key);
  }

  function drawHistogram(parent, layer, sorted) {
    const { counts, largest } = points.histogram(sorted, BINS);
    const label = `Histogram of ${sorted.length} lengths of offsets from 0 to ${shown(largest)} pixels: `
      + `half are at most ${shown(points.quantile(sorted, 0.5))}, 95 % at most ${shown(points.quantile(sorted, 0.95))}`;
    const drawing = makeDrawn(parent, "svg", {
      viewBox: "0 0 240 60", class: "histogram", role: "img", "aria-label": label, preserveAspectRatio: "none",
    });
    const most = Math.max(...counts);
    counts.forEach((count, index) => makeDrawn(drawing, "rect", {
      x: index * (240 / BINS) + 0.5, width: 240 / BINS - 1, height: (58 * count) / most, y: 60 - (58 * count) / most,
    }));
    const axis = make(parent, "p", undefined, { class: "axis", "aria-hidden": "true" });
    for (const value of [0, largest / 2, largest]) make(axis, "span", shown(value));
  }

  function tellOfLayers(found) {
    const parent = find("layers");
    parent.replaceChildren();
    make(parent, "h2", state.depth === 1 ? "The layer" : "The layers, from the image on");
    chain().forEach((layer, index) => {
      const { sorted, mean } = knownOf(layer);
      const card = make(parent, "article");
      make(card, "h3", layer.name);
      const list = make(card, "dl");
      const line = (term, text) => {
        const row = make(list, "div");
        make(row, "dt", term);
        make(row, "dd", text);
      };
      line("Kind", layer.kind);
      line("Map", `${layer.map.join(" × ")}, reads ${layer.input.join(" × ")}`);
      line("Samples", `${layer.first.length}${layer.shared ? ", the same for all outputs" : ""}`
        + `${layer.groups > 1 ? `, group ${state.group % layer.groups + 1} of ${layer.groups}` : ""}`);
      const here = points.meanDilation(layer, state.group, found.cells[index] ?? []);
      if (mean !== null) {
        line(index === state.depth - 1 ? "Effective dilation here" : "Effective dilation where read", here === null ? "none" : shown(here));
        line("of the whole map", shown(mean));
        line("of the plain grid", shown(points.dilation(layer, 0, [0, 0], false)));
      }
      line("Offsets", `half ≤ ${shown(points.quantile(sorted, 0.5))}, longest ${shown(sorted[sorted.length - 1])} pixels`);
      line("Stored to", `${(layer.offset.step / 2).toPrecision(1)} pixel`);
      drawHistogram(card, layer, sorted);
    });
  }

  function listTaps() {
    const body = find("rows");
    body.replaceChildren();
    if (!find("taps").open) return;
    const layer = current();
    const all = points.taps(layer, state.group, state.cell);
    find("caption").textContent = `${layer.name}, in pixels of its input (${layer.input.join(" × ")})`
      + (all.length > MOST_ROWS ? `; the first ${MOST_ROWS} of ${all.length}` : "");
    all.slice(0, MOST_ROWS).forEach((tap, index) => {
      const row = make(body, "tr");
      const name = layer.kernel ? `${Math.floor(index / layer.kernel[1])}, ${index % layer.kernel[1]}` : String(index);
      make(row, "th", name, { scope: "row" });
      for (const at of [tap.offset, tap.position, points.toImage(tap.position, layer.grid)]) make(row, "td", pair(at));
      make(row, "td", shown(tap.weight));
    });
  }

  function update() {
    const found = points.follow(chain(), state.group, state.cell);
    drawPoints(found, state.plain ? points.follow(chain(), state.group, state.cell, false) : null);
    drawCell();
    say(found);
    tellOfLayers(found);
    listTaps();
    [find("row").value, find("column").value] = state.cell;
  }

  // -- what is chosen ------------------------------------------------------------------------------------------------

  function options(select, names, chosen) {
    select.replaceChildren();
    names.forEach((name, index) => make(select, "option", name, { value: index }));
    select.value = String(chosen);
    select.disabled = names.length < 2;
  }

  function chooseLayer(index) {
    const at = points.toImage(state.cell, current().outGrid);
    state.layer = index;
    state.depth = Math.min(state.depth, deepest(index));
    const layer = current();
    const groups = Math.max(...chain().map((item) => item.groups));
    state.group = Math.min(state.group, groups - 1);
    options(find("layer"), layers.map((item) => item.name), index);
    options(find("depth"), ["1 layer", "2 layers", "3 layers"].slice(0, deepest(index)), state.depth - 1);
    options(find("group"), Array.from({ length: groups }, (_, i) => `${i + 1} of ${groups}`), state.group);
    find("row").max = layer.map[0] - 1;
    find("column").max = layer.map[1] - 1;
    moveTo(points.cellOf(at, layer));
  }

  function moveTo(cell) {
    state.cell = points.clamped(cell, current().map);
    update();
  }

  function pointed(event) {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(find("drawing").getScreenCTM().inverse());
    const cell = points.clamped(points.cellOf([y, x], current()), current().map);
    if (cell[0] !== state.cell[0] || cell[1] !== state.cell[1]) moveTo(cell);
  }

  function pressed(event) {
    const far = event.shiftKey ? 5 : 1;
    const steps = { ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far], ArrowRight: [0, far],
      Home: [0, -Infinity], End: [0, Infinity] };
    const step = steps[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    moveTo(state.cell.map((value, axis) => value + step[axis]));
  }

  function listen() {
    const figure = find("figure");
    figure.addEventListener("pointermove", (event) => { if (!state.held) pointed(event); });
    figure.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse") state.held = !state.held; // a finger that is lifted points at nothing else
      pointed(event);
      update();
    });
    figure.addEventListener("keydown", pressed);
    find("layer").addEventListener("change", (event) => chooseLayer(Number(event.target.value)));
    find("depth").addEventListener("change", (event) => { state.depth = Number(event.target.value) + 1; chooseLayer(state.layer); });
    find("group").addEventListener("change", (event) => { state.group = Number(event.target.value); update(); });
    find("plain").addEventListener("change", (event) => { state.plain = event.target.checked; update(); });
    ["row", "column"].forEach((id, axis) => find(id).addEventListener("change", (event) => {
      const value = Number.parseInt(event.target.value, 10);
      moveTo(state.cell.map((old, i) => (i === axis && Number.isFinite(value) ? value : old)));
    }));
    find("controls").addEventListener("submit", (event) => event.preventDefault());
    find("taps").addEventListener("toggle", listTaps);
    find("theme").addEventListener("click", () => {
      const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "automatic") + 1) % THEMES.length];
      document.documentElement.dataset.theme = next;
      find("theme").textContent = `Theme: ${next}`;
    });
    new ResizeObserver(update).observe(figure);
  }

  set(find("drawing"), { viewBox: [-0.5 - margin[1], -0.5 - margin[0], width + 2 * margin[1], height + 2 * margin[0]].join(" ") });
  set(find("picture"), { x: -0.5, y: -0.5, width, height, href: page.picture, preserveAspectRatio: "none" });
  state.depth = deepest(state.layer);
  state.cell = points.clamped(points.cellOf([(height - 1) / 2, (width - 1) / 2], current()), current().map);
  chooseLayer(state.layer);
  listen();
})();
