"use strict";
// State is one object; every change goes through choose(), which redraws what depends on it.

const content = JSON.parse(document.getElementById("content").textContent);
const byId = (id) => document.getElementById(id);
const state = { column: 0, which: "0", layer: null, head: null, run: 0, prompt: 0,
                shade: "attention", token: null, sort: null, descending: true };
const unpacked = new Map();
const nonce = document.currentScript.nonce;
let plotly = null;

// ---- small things -------------------------------------------------------------------------

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text; // never markup
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function number(value, digits = 3, sign = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const text = value.toFixed(digits).replace("-", "−");
  return sign && value > 0 ? "+" + text : text;
}

const first = () => content.runs[0];
const signed = (name) => content.columns.find((column) => column.name === name)?.signed ?? false;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const indexOf = (run, layer, head) =>
  run.layers.indexOf(layer) * run.heads.length + run.heads.indexOf(head);
const valueOf = (run, name, layer, head) =>
  name in run.columns ? run.columns[name][indexOf(run, layer, head)] : null;

async function decompressed(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// ---- prompts ------------------------------------------------------------------------------

async function promptOf(run, index) {
  const key = `prompt-${run}-${index}`;
  if (!unpacked.has(key)) {
    const buffer = await decompressed(byId(key).textContent);
    const length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    let start = 4 + length;
    for (const array of Object.values(header.arrays)) {
      const size = array.shape.reduce((a, b) => a * b, 1);
      array.values = new Int16Array(buffer.slice(start, start + 2 * size));
      start += 2 * size;
    }
    unpacked.set(key, header);
  }
  return unpacked.get(key);
}

// Return the chosen head's row in the arrays; -1 if it is not included.
function rowOf(run) {
  const held = content.runs[run].held.heads;
  return held === null
    ? indexOf(content.runs[run], state.layer, state.head)
    : held.findIndex(([layer, head]) => layer === state.layer && head === state.head);
}

// Return a function that gives the chosen head's value by name, position and label, or null.
function reader(run, header) {
  const row = rowOf(run);
  return (name, position, label = 0) => {
    const array = header.arrays[name];
    if (!array || row < 0) return null;
    const width = array.shape[2] ?? 1;
    const raw = array.values[(row * array.shape[1] + position) * width + label];
    return raw === -32768 ? null : raw * array.steps[row];
  };
}

// Number of digits: as many as are stored for the chosen head, at most three.
function digitsOf(header, name) {
  const step = header.arrays[name]?.steps[rowOf(state.run)] ?? 0.001;
  return Math.min(3, Math.max(0, Math.round(-Math.log10(step))));
}

function visible(token) {
  return token.replace(/\n/g, "↵\n").replace(/\t/g, "→\t")
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, "▯");
}

async function drawPrompt() {
  const run = content.runs[state.run];
  const about = run.prompts[state.prompt];
  byId("token-detail").replaceChildren();
  for (const one of document.querySelectorAll(".prompt-only")) one.hidden = !about;
  if (!about) {
    byId("answer").textContent = "There is no prompt to look at in this run.";
    drawScores([], null);
    return;
  }
  const chosen = `${state.layer}.${state.head}.${state.run}.${state.prompt}`;
  const header = await promptOf(state.run, state.prompt);
  if (chosen !== `${state.layer}.${state.head}.${state.run}.${state.prompt}`) return;
  const read = reader(state.run, header);
  byId("answer").textContent = answerText(about, run, read);
  fillShades(header, about);
  const [name, label] = state.shade.split("/");
  const shown = header.tokens.map((_, i) => read(name, i, +(label ?? 0)));
  const most = Math.max(...shown.map((x) => Math.abs(x ?? 0)), 1e-9);
  const spans = header.tokens.map((token, i) => {
    const span = element("span", visible(token), { "data-position": i });
    if (header.roles[i] === "query") span.classList.add("query");
    if (shown[i] !== null)
      span.style.background = `rgba(var(${shown[i] < 0 ? "--below" : "--above"}), ${0.85 * Math.abs(shown[i]) / most})`;
    span.title = detail(header, about, read, i);
    return span;
  });
  for (const [i] of header.named) {
    spans[i].classList.add("named");
    if (header.classes[i] !== about.query_class) spans[i].classList.add("other");
  }
  byId("legend").textContent = legend(header, about);
  const place = byId("tokens"), before = place.scrollTop, shownNow = `${state.run}.${state.prompt}`;
  place.replaceChildren(...spans);
  // Scroll a new prompt to its end, where the query is; keep the position of an old one.
  place.scrollTop = place.dataset.shown === shownNow ? before : place.scrollHeight;
  place.dataset.shown = shownNow;
  state.token = null;
  drawPositions(header, about, read);
}

// The names of the user's spans, in their order.
const spanNames = (header) =>
  [...new Set(header.named.map(([i]) => header.roles[i]).filter((role) => role !== "label"))];

function legend(header, about) {
  const labels = header.named.some(([i]) => header.roles[i] === "label") ? ["label positions"] : [];
  const marked = [...labels, ...spanNames(header)].join(", ");
  const dotted = about.query_class ? "; a dotted line marks those of another class than the query's" : "";
  return ["Darker: more (orange above 0, blue below).", marked && `Underlined: ${marked}${dotted}.`,
          "Arrow keys go from token to token."].filter(Boolean).join(" ");
}

function fillShades(header, about) {
  const known = [["attention", "attention"], ["score", "QK score"], ["score_content", "content part of the score"],
    ...about.labels.map((label, i) => [`label_logit/${i}`, `OV label logit of ${label}`])]
    .filter(([name]) => name.split("/")[0] in header.arrays);
  if (!known.some(([name]) => name === state.shade)) state.shade = known[0]?.[0] ?? "attention";
  byId("shade").replaceChildren(...known.map(([name, words]) => element("option", words, { value: name })));
  byId("shade").value = state.shade;
}

// Move from token to token with the keyboard.
function moveToken(event) {
  const spans = byId("tokens").children, by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || !spans.length) return;
  event.preventDefault();
  spans[state.token]?.classList.remove("at");
  state.token = state.token === null ? spans.length - 1 : Math.min(spans.length - 1, Math.max(0, state.token + by));
  spans[state.token].classList.add("at");
  spans[state.token].scrollIntoView({ block: "nearest" });
  byId("token-detail").textContent = spans[state.token].title;
}

function answerText(about, run, read) {
  const answer = about.answer, own = (answer.answers ?? []).map((text) => JSON.stringify(text));
  const asked = about.query_class ? `The query's class is ${about.query_class}; ` : "";
  const words = [`${asked}${rightText(about)} is right.`];
  if (answer.labels) {
    const values = answer.logit ?? answer.logprob;  // answers of several tokens have no logit
    const listed = answer.labels.map((x, i) => [x, own[i], number(values[i], 2)].filter(Boolean).join(" "));
    const what = answer.logit ? "logits" : "log-probabilities";
    words.push(`The model says ${JSON.stringify(answer.top_token)} (${what}: ${listed.join(", ")}).`);
  }
  if (run.held.heads !== null && !run.held.heads.some(([x, y]) => x === state.layer && y === state.head))
    words.push(`Of head ${state.layer}.${state.head} this page holds no positions; open the run ` +
               `and use run.tt.head(${state.layer}, ${state.head}).`);
  return words.join(" ");
}

// The right answer: a label, or the prompt's own text in quotes.
function rightText(about) {
  const { answers = [], labels = [] } = about.answer;
  return answers.length ? JSON.stringify(answers[labels.indexOf(about.gold)]) : about.gold;
}

function detail(header, about, read, i) {
  const parts = [`${header.positions[i]} ${header.roles[i]}`];
  if (header.classes[i]) parts.push(`${header.classes[i]}, ${header.labelTexts[i]}`);
  const attention = read("attention", i), score = read("score", i), content_ = read("score_content", i);
  const part = read("score_position", i);
  if (attention !== null) parts.push(`attention ${number(attention)}`);
  if (score !== null) parts.push(`score ${number(score, digitsOf(header, "score"))}`);
  if (content_ !== null) {
    parts.push(`content ${number(content_, digitsOf(header, "score_content"))}`);
    parts.push(`position ${number(part, digitsOf(header, "score_position"))}`);
  }
  const digits = digitsOf(header, "label_logit");
  about.labels.forEach((label, j) => {
    const logit = read("label_logit", i, j);
    if (logit !== null) parts.push(`OV ${label} ${number(logit, digits)}`);
  });
  const top = header.tops[`${state.layer}.${state.head}`]?.[i];
  if (top) parts.push(`OV top token ${JSON.stringify(top)}`);
  return parts.join("; ");
}

function drawPositions(header, about, read) {
  const tops = header.tops[`${state.layer}.${state.head}`];
  const place = spanNames(header).length ? "place" : "label", classes = about.query_class ? ["class"] : [];
  const head = ["position", place, ...classes, "attention", "score", "content", "position part",
                ...about.labels.map((label) => `OV ${label}`), ...(tops ? ["OV top token"] : [])];
  const isText = (i) => [place, "class", "OV top token"].includes(head[i]);
  byId("positions").closest(".scroll").hidden = !header.named.length;
  byId("positions").caption.textContent = place === "place" ? "Named positions" : "Label positions";
  const row = element("tr");
  row.append(...head.map((x, i) => element("th", x, { scope: "col", class: isText(i) ? "text" : "" })));
  byId("positions").querySelector("thead").replaceChildren(row);
  const digits = digitsOf(header, "score");
  byId("positions").querySelector("tbody").replaceChildren(...header.named.map(([i, name]) => {
    const score = read("score", i), content_ = read("score_content", i);
    const cells = [
      header.positions[i], name, ...(about.query_class ? [header.classes[i]] : []), number(read("attention", i)),
      number(score, digits), number(content_, digitsOf(header, "score_content")),
      number(read("score_position", i), digitsOf(header, "score_position")),
      ...about.labels.map((_, j) => number(read("label_logit", i, j), digitsOf(header, "label_logit"))),
      ...(tops ? [visible(tops[i])] : []),
    ];
    const made = element("tr", null, { class: sameClass(header, about, i) ? "same" : "" });
    made.append(...cells.map((x, j) => element("td", x, { class: isText(j) ? "text" : "" })));
    return made;
  }));
  drawScores(header.named.map(([i, name]) => ({
    name: `${header.positions[i]} ${name}`,
    content: read("score_content", i), score: read("score", i), position: read("score_position", i),
    same: sameClass(header, about, i),
  })), about);
}

const sameClass = (header, about, i) => Boolean(about.query_class) && header.classes[i] === about.query_class;

// ---- drawings -----------------------------------------------------------------------------

function layout(extra = {}) {
  const ink = colour("--ink"), line = colour("--line");
  const axis = { color: ink, gridcolor: line, zerolinecolor: line, fixedrange: true };
  const { xaxis = {}, yaxis = {}, ...rest } = extra;
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink },
           margin: { l: 55, r: 15, t: 40, b: 45 }, xaxis: { ...axis, ...xaxis },
           yaxis: { ...axis, ...yaxis }, showlegend: false, dragmode: false, ...rest };
}

const settings = { responsive: true, displayModeBar: false };

// Draw a plot; a click on a point of its first trace chooses that head.
function draw(id, traces, extra, headOf) {
  plotly.react(id, traces, layout(extra), settings);
  if (!headOf || byId(id).dataset.listens) return;
  byId(id).dataset.listens = "yes";
  byId(id).on("plotly_click", ({ points }) => {
    const point = points.find((one) => one.curveNumber === 0);
    if (point) choose(headOf(point));
  });
}

const tick = (list) => [1, 2, 5, 10, 20].find((by) => list.length / by <= 8) ?? 50;

function columnValues() {
  const { name, centre } = content.columns[state.column];
  const [a, b] = content.runs.map((run) => run.columns[name] ?? []);
  if (state.which !== "difference") return { values: content.runs[+state.which].columns[name] ?? [], centre };
  return { values: a.map((x, i) => x === null || b[i] == null ? null : x - b[i]), centre: 0 };
}

function drawMap() {
  if (!plotly || !content.columns.length) return;
  const run = first(), { values, centre } = columnValues();
  byId("map").hidden = !values.some((value) => value !== null);
  const lacking = content.runs.filter((one) => !(content.columns[state.column].name in one.columns));
  byId("map-note").textContent = byId("map").hidden
    ? `There is no such number in ${lacking.map((one) => one.name).join(" and ") || "this run"}.` : "";
  if (byId("map").hidden) return;
  const width = run.heads.length;
  const z = run.heads.map((_, j) => run.layers.map((_, i) => values[i * width + j] ?? null));
  const bound = Math.max(...values.map((x) => x === null ? 0 : Math.abs(x - centre)), 1e-9);
  const marked = content.runs[state.which === "difference" ? 0 : +state.which].marked;
  const title = content.columns[state.column].title;
  const square = (points, size, colour_, width_) => ({
    type: "scatter", mode: "markers", hoverinfo: "skip", x: points.map((p) => p[0]), y: points.map((p) => p[1]),
    marker: { symbol: "square-open", size, color: colour_, line: { width: width_ } } });
  const size = Math.max(6, Math.min(16, byId("map").clientWidth / (run.layers.length + 6)));
  draw("map", [
    { type: "heatmap", x: run.layers, y: run.heads, z, zmin: centre - bound, zmax: centre + bound,
      colorscale: "RdBu", hoverongaps: false, xgap: 1, ygap: 1,
      hovertemplate: "head %{x}.%{y}: %{z:.3f}<extra></extra>", colorbar: { thickness: 12, len: 0.9 } },
    square(marked, size, "#000000", 1.5),
    square([[state.layer, state.head]], size + 5, "#009E73", 3.5),
  ], { title: { text: title, font: { size: 14 } }, xaxis: { title: { text: "layer" }, showgrid: false, dtick: tick(run.layers) },
       yaxis: { title: { text: "head" }, showgrid: false, dtick: tick(run.heads) } }, ({ x, y }) => ({ layer: x, head: y }));
}

function drawTowers() {
  if (!plotly) return;
  const compare = content.runs.length > 1;
  const name = content.columns[state.column]?.name;
  const run = compare ? first() : content.runs[0];
  const x = compare ? run.columns[name] : run.columns.qk_auc;
  const y = compare ? content.runs[1].columns[name] : run.columns.ov_auc;
  const anything = x && y && x.some((value, i) => value !== null && y[i] !== null);
  byId("towers").hidden = !anything;
  if (!anything) return;
  const heads = run.layers.flatMap((layer) => run.heads.map((head) => [layer, head]));
  const drop = run.columns.margin_drop;
  const most = drop ? Math.max(...drop.map((v) => Math.abs(v ?? 0)), 1e-9) : 1;
  const size = heads.map((_, i) => drop ? 5 + 20 * Math.sqrt(Math.abs(drop[i] ?? 0) / most) : 7);
  const marked = new Set(run.marked.map(String));
  const shades = heads.map((head) => marked.has(String(head)) ? "#D55E00" : "#8a8a8a");
  const chosen = indexOf(run, state.layer, state.head);
  const titles = compare ? [plain(`${run.name}: ${content.columns[state.column].title}`), plain(content.runs[1].name)]
    : ["QK AUC: finds the query's class", "OV AUC: says the label"];
  const names = heads.map((head) => head.join("."));
  draw("towers", [
    { type: "scatter", mode: "markers", x, y, text: names, customdata: heads,
      hovertemplate: "head %{text}: %{x:.3f}, %{y:.3f}<extra></extra>",
      marker: { size, color: shades, opacity: 0.8, line: { width: 0 } } },
    { type: "scatter", mode: "markers+text", x: [x[chosen]], y: [y[chosen]], text: [names[chosen]],
      textposition: "top center", hoverinfo: "skip",
      marker: { symbol: "circle-open", size: 20, color: "#009E73", line: { width: 3 } } },
  ], { title: { text: compare ? "Two runs" : "Two towers; size: effect", font: { size: 14 } },
       xaxis: { title: { text: titles[0] } }, yaxis: { title: { text: titles[1] } } },
  ({ customdata: [layer, head] }) => ({ layer, head }));
}

function drawScores(rows, about) {
  const place = byId("scores");
  place.hidden = !rows.some((row) => row.score !== null);
  if (place.hidden || !plotly) return;
  const x = rows.map((_, i) => i), split = rows.every((row) => row.content !== null);
  const trace = (name, values, shade, pattern) => ({ type: "bar", name, x, y: values,
    marker: { color: shade, pattern: { shape: pattern } }, hovertemplate: `${name} %{y:.3f}<extra></extra>` });
  const traces = split
    ? [trace("content", rows.map((r) => r.content), "#0072B2", ""),
       trace("position", rows.map((r) => r.position), "#E69F00", "/")]
    : [trace("score", rows.map((r) => r.score), "#0072B2", "")];
  const marks = rows.map((row) => plain(row.same ? row.name + " ●" : row.name));
  draw("scores", traces, { barmode: "relative", showlegend: true,
    legend: { orientation: "h", y: 1.2 }, title: { text: "" },
    xaxis: { tickvals: x, ticktext: marks, tickangle: -90, showgrid: false, automargin: true }, margin: { l: 55, r: 15, t: 20, b: 90 },
    yaxis: { title: { text: split ? "QK score, by part" : "QK score" } } });
  const dot = about.query_class ? ` a dot marks class ${about.query_class};` : "";
  place.setAttribute("aria-label",
    `QK scores of ${rows.length} named positions;${dot} the table below holds the same numbers`);
}

const towers = { q: ["#0072B2", "into q"], k: ["#D55E00", "into k"], v: ["#009E73", "into v"],
                 answer: ["#8a8a8a", "into the answer"] };

function drawCircuit() {
  const circuit = content.runs[state.run].circuit;
  byId("circuit-part").hidden = !circuit;
  if (!circuit) return;
  const { nodes, edges } = circuit, name = `${state.layer}.${state.head}`;
  const touches = ({ source, target }) => [source, target].some((i) => nodes[i].name === name);
  const anything = edges.some(touches);
  fillEdges(circuit, touches);
  if (!plotly) return;
  const most = Math.max(...edges.map(({ effect }) => Math.abs(effect)), 1e-9);
  const shapes = edges.map((edge) => {
    const { x: x0, y: y0 } = nodes[edge.source], { x: x1, y: y1 } = nodes[edge.target];
    return { type: "line", layer: "below", x0, y0, x1, y1, opacity: !anything || touches(edge) ? 0.85 : 0.15,
             line: { color: towers[edge.tower][0], width: 0.6 + 5 * Math.abs(edge.effect) / most,
                     dash: edge.effect > 0 ? "solid" : "dash" } };
  });
  const middle = (edge, key) => (nodes[edge.source][key] + nodes[edge.target][key]) / 2;
  const ticks = (list) => ({ tickvals: list.map(([at]) => at), ticktext: list.map(([, words]) => plain(words)),
                             showgrid: false, zeroline: false });
  draw("circuit", [
    { type: "scatter", mode: "markers+text", x: nodes.map(({ x }) => x), y: nodes.map(({ y }) => y),
      text: nodes.map((node) => plain(node.name)), customdata: nodes.map(({ head }) => head), textfont: { size: 10 },
      hovertemplate: "%{text}<extra></extra>",
      marker: { size: nodes.map((node) => node.head ? 26 : 34), color: colour("--panel"), opacity: 1,
                line: { color: nodes.map((node) => node.name === name ? "#009E73" : "#8a8a8a"),
                        width: nodes.map((node) => node.name === name ? 3 : 1) } } },
    { type: "scatter", mode: "markers", x: edges.map((edge) => middle(edge, "x")), y: edges.map((edge) => middle(edge, "y")),
      text: edges.map((edge) => plain(edgeText(circuit, edge))), hovertemplate: "%{text}<extra></extra>",
      marker: { size: 7, color: edges.map(({ tower }) => towers[tower][0]), opacity: 0.35 } },
  ], { shapes, title: { text: "" }, margin: { l: 85, r: 15, t: 10, b: 40 }, xaxis: ticks(circuit.columns),
       yaxis: { ...ticks(circuit.layers), title: { text: "layer" } } },
  ({ customdata }) => customdata ? { layer: customdata[0], head: customdata[1] } : {});
}

const edgeText = ({ nodes }, { source, target, tower, effect }) =>
  `${nodes[source].name} ${towers[tower][1]} of ${nodes[target].name}: ${number(effect, 3, true)}`
    .replace("into the answer of answer", "into the answer");

function fillEdges({ nodes, edges }, touches) {
  const titles = ["from", "acting at", "to", "acting at", "into"], header = element("tr");
  header.append(...titles.map((x) => element("th", x, { scope: "col", class: "text" })),
                ...["effect", "interval"].map((x) => element("th", x, { scope: "col" })));
  byId("edges").querySelector("thead").replaceChildren(header);
  const rows = [...edges].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  byId("edges").querySelector("tbody").replaceChildren(...rows.map((edge) => {
    const [from, to] = [nodes[edge.source], nodes[edge.target]];
    const made = element("tr", null, touches(edge) ? { class: "same" } : {});
    made.append(...[from.name, from.at, to.name, to.at, edge.tower].map((x) => element("td", x, { class: "text" })),
                element("td", number(edge.effect, 3, true)),
                element("td", `${number(edge.low, 3, true)} to ${number(edge.high, 3, true)}`));
    return made;
  }));
  byId("circuit-legend").textContent = Object.entries({ q: "blue", k: "orange", v: "green", answer: "grey" })
    .filter(([tower]) => edges.some((edge) => edge.tower === tower))
    .map(([tower, shade]) => `${shade}: ${towers[tower][1]}`).join("; ") + ".";
}

// Escape texts, because Plotly interprets a few tags.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// ---- heads: numbers and table -------------------------------------------------------------

// The names of a head's kinds, of each run that has them.
const kindsOf = (layer, head) => content.runs
  .map((run) => [run.kinds[indexOf(run, layer, head)], content.runs.length > 1 ? ` (${run.name})` : ""])
  .filter(([kinds]) => kinds).map(([kinds, whose]) => kinds + whose);

function drawChosen() {
  const kinds = kindsOf(state.layer, state.head).join("; ");
  byId("chosen-title").textContent = `Head ${state.layer}.${state.head}${kinds && ": "}${kinds}`;
  byId("chosen-numbers").replaceChildren(...content.runs.flatMap((run) =>
    content.columns.filter(({ name }) => name in run.columns).map(({ name, title }) => {
      const group = element("div");
      const whose = content.runs.length > 1 ? `${title}, ${run.name}` : title;
      const value = valueOf(run, name, state.layer, state.head);
      group.append(element("dt", whose), element("dd", number(value, 3, signed(name))));
      return group;
    })));
}

function tableColumns() {
  return content.columns.flatMap(({ name, title }) => content.runs.flatMap((run, i) =>
    name in run.columns ? [{ name, run: i, title: content.runs.length > 1 ? `${title}, ${run.name}` : title }] : []));
}

function drawTable() {
  const run = first(), columns = tableColumns();
  if (state.sort === null && columns.length) state.sort = 0;
  const marked = content.runs.map((one) => new Set(one.marked.map(String)));
  const wanted = byId("search").value.trim().toLowerCase();
  let rows = run.layers.flatMap((layer) => run.heads.map((head) => {
    const whose = content.runs.filter((_, i) => marked[i].has(String([layer, head])));
    const marks = !whose.length ? [] : content.runs.length > 1
      ? [`in-context, ${whose.map((one) => one.name).join(" and ")}`] : ["in-context"];
    return { layer, head, name: `${layer}.${head}`, mark: [...marks, ...kindsOf(layer, head)].join("; "),
             values: columns.map((c) => valueOf(content.runs[c.run], c.name, layer, head)) };
  }));
  rows = rows.filter((row) => row.name === wanted || row.name.startsWith(wanted)
    || (wanted && row.mark.toLowerCase().includes(wanted)));
  const direction = state.descending ? -1 : 1;
  const key = (row) => state.sort === -1 ? row.layer * 1e4 + row.head : row.values[state.sort];
  if (state.sort !== null) rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null); // missing ones last
    return direction * (x - y);
  });
  const titles = [["head", -1], ...columns.map((c, i) => [c.title, i])];
  const header = element("tr");
  header.append(...titles.map(([title, i]) => {
    const sorted = state.sort === i ? (state.descending ? "descending" : "ascending") : "none";
    const cell = element("th", null, { scope: "col", "aria-sort": sorted });
    const arrow = sorted === "none" ? "" : state.descending ? " ▼" : " ▲";
    const button = element("button", title + arrow, { type: "button", "data-sort": i });
    cell.append(button);
    return cell;
  }));
  const kinds = content.runs.some((one) => one.kinds.length) ? "kinds" : "chosen as";
  header.firstChild.after(element("th", kinds, { class: "text", scope: "col" }));
  byId("heads").querySelector("thead").replaceChildren(header);
  byId("heads").querySelector("tbody").replaceChildren(...rows.map((row) => {
    const made = element("tr", null, { "data-head": row.name });
    const cell = element("th", null, { scope: "row" });
    cell.append(element("button", row.name, { type: "button" }));
    made.append(cell, element("td", row.mark, { class: "text" }),
                ...row.values.map((x, i) => element("td", number(x, 3, signed(columns[i].name)))));
    return made;
  }));
  byId("found").textContent = `${rows.length} of ${run.layers.length * run.heads.length} heads`;
  markRow();
}

function markRow() {
  for (const row of byId("heads").querySelectorAll("tbody tr"))
    row.classList.toggle("chosen", row.dataset.head === `${state.layer}.${state.head}`);
}

function drawComparison() {
  const place = byId("comparison");
  if (!content.comparison.length) return;
  const table = element("table"), header = element("tr");
  header.append(...["number", "rank correlation over heads", "strongest heads in common"]
    .map((x) => element("th", x, { scope: "col" })));
  table.append(element("caption", `${content.runs[0].name} and ${content.runs[1].name}`), header);
  if (content.differences) place.before(element("p", content.differences, { class: "note" }));
  for (const row of content.comparison) {
    const made = element("tr");
    made.append(element("th", row.title, { scope: "row" }), element("td", number(row.correlation)),
                element("td", `${row.shared} of ${row.of}`));
    table.append(made);
  }
  const scroll = element("div", null, { class: "scroll", tabindex: 0, role: "region", "aria-label": "Comparison" });
  scroll.append(table);
  place.replaceChildren(scroll);
}

// ---- changes ------------------------------------------------------------------------------

function choose(change) {
  Object.assign(state, change);
  const changed = new Set(Object.keys(change));
  if (changed.has("run")) fillPrompts();
  byId("prompt-run").value = state.run;
  byId("column").value = state.column;
  const headChanged = changed.has("layer") || changed.has("head");
  if (headChanged) { drawChosen(); markRow(); }
  if (headChanged || changed.has("column") || changed.has("which")) { drawMap(); drawTowers(); }
  if (headChanged || changed.has("run")) drawCircuit();
  if (headChanged || ["run", "prompt", "shade"].some((name) => changed.has(name))) drawPrompt();
  byId("prompt").value = state.prompt;
  const shown = content.runs[state.run].prompts[state.prompt]?.number ?? 0;
  const whose = content.runs.length > 1 ? `&run=${state.run}` : "";
  const hash = `#head=${state.layer}.${state.head}&prompt=${shown}${whose}`;
  try { history.replaceState(null, "", hash); } catch { /* forbidden on some origins */ }
}

function fillPrompts() {
  const prompts = content.runs[state.run].prompts;
  byId("prompt").replaceChildren(...prompts.map((one, i) => {
    const right = one.answer.labels ? (one.answer.correct ? ", right" : ", wrong") : "";
    const asked = [one.query_class, rightText(one)].filter(Boolean).join(", ");
    return element("option", `${one.number}: ${asked}${right}`, { value: i });
  }));
  state.prompt = Math.min(state.prompt, Math.max(0, prompts.length - 1));
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").setAttribute("aria-pressed", String(name === "dark"));
  drawMap(); drawTowers(); drawCircuit(); drawPrompt();
}

function step(by) {
  const n = content.runs[state.run].prompts.length;
  if (n) choose({ prompt: (state.prompt + by + n) % n });
}

function arrows(event) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  const run = first(), within = (list, value, by) =>
    list[Math.min(list.length - 1, Math.max(0, list.indexOf(value) + by))];
  choose({ layer: within(run.layers, state.layer, move[0]), head: within(run.heads, state.head, move[1]) });
}

function listen() {
  byId("theme").addEventListener("click", () =>
    theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  byId("column").addEventListener("change", (event) => choose({ column: +event.target.value }));
  byId("which").addEventListener("change", (event) => choose({ which: event.target.value }));
  byId("prompt-run").addEventListener("change", (event) => choose({ run: +event.target.value }));
  byId("prompt").addEventListener("change", (event) => choose({ prompt: +event.target.value }));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("map").addEventListener("keydown", arrows);
  byId("tokens").addEventListener("keydown", moveToken);
  byId("shade").addEventListener("change", (event) => choose({ shade: event.target.value }));
  byId("search").addEventListener("input", drawTable);
  byId("tokens").addEventListener("mouseover", (event) => {
    if (event.target.dataset.position) byId("token-detail").textContent = event.target.title;
  });
  byId("heads").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.sort !== undefined) {
      const sort = +button.dataset.sort;
      state.descending = state.sort === sort ? !state.descending : sort !== -1;
      state.sort = sort;
      drawTable();
      byId("heads").querySelector(`[data-sort="${sort}"]`).focus();
    } else {
      const [layer, head] = button.closest("tr").dataset.head.split(".").map(Number);
      choose({ layer, head });
    }
  });
}

// Return the first state: from the address, else the first marked head, else the first head.
function beginning() {
  const asked = new URLSearchParams(location.hash.slice(1)), run = first();
  const number_ = content.runs.length > 1 && asked.get("run") === "1" ? 1 : 0;
  const [layer, head] = /^\d+\.\d+$/.test(asked.get("head") ?? "") ? asked.get("head").split(".").map(Number) : [];
  const known = run.layers.includes(layer) && run.heads.includes(head);
  const [l, h] = known ? [layer, head] : run.marked[0] ?? [run.layers[0], run.heads[0]];
  const place = content.runs[number_].prompts.findIndex((one) => String(one.number) === asked.get("prompt"));
  const column = Math.max(0, content.columns.findIndex(({ name }) => name in run.columns));
  return { layer: l, head: h, run: number_, prompt: Math.max(0, place), column };
}

async function start() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
  byId("column").replaceChildren(...content.columns.map(({ title }, i) => element("option", title, { value: i })));
  const runs = content.runs.map((run, i) => [run.name, String(i)]);
  const maps = runs.length > 1 ? [...runs, [`${runs[0][0]} less ${runs[1][0]}`, "difference"]] : runs;
  byId("which").replaceChildren(...maps.map(([name, value]) => element("option", name, { value })));
  byId("prompt-run").replaceChildren(...runs.map(([name, value]) => element("option", name, { value })));
  for (const id of ["which-label", "prompt-run-label"]) byId(id).hidden = runs.length < 2;
  listen();
  drawComparison();
  if (!first().layers.length) {
    for (const id of ["map-title", "chosen-title", "table-title"]) byId(id).closest("section").hidden = true;
    return;
  }
  drawTable();
  choose(beginning());
  window.addEventListener("hashchange", () => choose(beginning()));
  if (!("DecompressionStream" in window)) {
    byId("answer").textContent = "This browser is too old to unpack the prompts (it lacks DecompressionStream).";
    return;
  }
  const script = document.createElement("script");
  script.nonce = nonce;
  script.textContent = new TextDecoder().decode(await decompressed(byId("plotly").textContent));
  document.head.append(script);
  plotly = window.Plotly;
  drawMap(); drawTowers(); drawCircuit(); await drawPrompt();
  // The size of the marks depends on the size of the map.
  new ResizeObserver(() => drawMap()).observe(byId("map"));
  document.body.dataset.ready = "yes";
}

start();
