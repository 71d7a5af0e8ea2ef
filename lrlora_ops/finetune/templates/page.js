// The page: all runs in a table and two charts, and what the switch chooses in full.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const byId = id => document.getElementById(id);
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const max = values => values.reduce((most, value) => Math.max(most, value ?? 0), 0);
let current = 0, playing = null;

function lead() {
  const started = RUNS.map(run => run.summary.started.slice(0, 16).replace("T", " ")).sort()[0];
  const machines = [...new Set(RUNS.map(run => run.summary.machine))];
  byId("lead").textContent = `${RUNS.length} run${RUNS.length > 1 ? "s" : ""}, started ${started} UTC · ${machines.join("; ")}`;
}

function runsTable() {
  const texts = [...new Set(RUNS.flatMap(run => Object.keys(run.summary.before)))];
  const columns = [
    ["run", null],
    ["mean rank (lowest to highest)", run => `${short(run.rank[1])} (${run.rank[0]} to ${run.rank[2]})`],
    ["adapter parameters", run => (run.parameters === null ? "–" : count(run.parameters))],
    ...texts.map(text => [`bits per byte, ${text}`, run => run.bits[text], run => run.before[text]]),
    ["training time", run => duration(run.seconds)],
    ["tokens per second", run => (run.speed === null ? "–" : count(run.speed))],
    ["held, start to end", run => (run.held ? `${bytes(run.held[0])} to ${bytes(run.held[1])}` : "–")],
    ...(RUNS.some(run => run.summary.gpu) ? [["GPU peak", run => (run.gpu ? bytes(run.gpu) : "–")]] : []),
  ];
  const table = put(byId("table"), "table"), head = put(put(table, "thead"), "tr"), body = put(table, "tbody");
  for (const [name] of columns) put(head, "th", { scope: "col" }, name);
  RUNS.forEach((run, index) => {
    const row = put(body, "tr", RUNS.length > 1 ? { tabindex: 0 } : {}), name = put(row, "th", { scope: "row" });
    put(name, "span", { class: "swatch", style: `background:${seriesColor(index)}` });
    name.append(run.label);
    if (!run.summary.ended) put(name, "span", { class: "state" }, `not ended: ${count(run.summary.done)} of ${count(run.summary.steps)} steps`);
    for (const [, value, before] of columns.slice(1)) before ? bitsCell(row, run.summary, value, before) : put(row, "td", {}, value(run.summary));
    row.addEventListener("click", () => choose(index));
    row.addEventListener("keydown", event => event.key === "Enter" && choose(index));
  });
}

// The best of a text is bold, as far as three digits tell.
function bitsCell(row, run, value, before) {
  const three = own => (own === undefined ? "–" : own.toFixed(3));
  const all = RUNS.map(other => value(other.summary)).filter(own => own !== undefined).map(three).sort();
  const best = RUNS.length > 1 && all[0] === three(value(run)) && all[0] !== all.at(-1);
  const cell = put(row, "td", best ? { class: "best" } : {});
  if (before(run) !== undefined) put(cell, "small", {}, `${three(before(run))} → `);
  cell.append(three(value(run)));
}

function overview() {
  const line = (run, index) => ({ name: run.label, color: seriesColor(index) });
  lineChart(byId("overview"), { title: "Training loss, smoothed", unit: "nats per token", show: value => value.toFixed(3), series: RUNS.map((run, index) => ({ ...line(run, index), points: averaged(run.loss), faint: run.loss })) });
  lineChart(byId("overview"), {
    title: "Rank: mean, band from lowest to highest", unit: "rank", fromZero: true,
    series: RUNS.map((run, index) => ({ ...line(run, index), dash: seriesDash(index), ...spreadOverTime(run) })),
  });
}

// Means over a twentieth of the run, at most, that ends there.
function averaged(points) {
  const most = Math.ceil(points.length / 20);
  return points.map(([step], at) => [step, mean(points.slice(Math.max(0, at + 1 - most), at + 1).map(([, loss]) => loss))]);
}

// The last ranks of all runs, on one scale.
function sideBySide() {
  if (RUNS.length === 1) return;
  const box = put(byId("all"), "div", { class: "panels" }), most = max(RUNS.map(highest)), room = Math.min(350, byId("all").clientWidth);
  for (const run of RUNS) for (const map of run.maps) {
    const last = run.snapshots.length - 1, values = map.cells.map(row => row.map(place => (place === null ? null : run.snapshots[last].ranks[place])));
    const tell = (tip, row, column) => tellCell(tip, run, map, row, column, last);
    heatmap(box, { map, title: `${run.label}: rank by layer and ${map.kind}`, what: "rank", most, show: count, unit: "", tell, room, least: 3 })(values);
  }
}

function spreadOverTime(run) {
  if (!run.summary.done) return { points: [] };
  return {
    points: run.snapshots.map(own => [own.step, mean(own.ranks)]),
    band: run.snapshots.map(own => [own.step, own.ranks.reduce((least, rank) => Math.min(least, rank)), max(own.ranks)]),
  };
}

function runSwitch() {
  RUNS.forEach((run, index) => put(byId("switch"), "button", { type: "button" }, run.label).addEventListener("click", () => choose(index)));
}

function choose(index) {
  current = index;
  clearInterval(playing);
  playing = null;
  hideTooltip();
  byId("switch").querySelectorAll("button").forEach((button, at) => button.setAttribute("aria-pressed", at === index));
  if (RUNS.length > 1) byId("table").querySelectorAll("tbody tr").forEach((row, at) => row.setAttribute("aria-selected", at === index));
  for (const id of ["time", "maps", "growth", "cost"]) byId(id).replaceChildren();
  const run = RUNS[index];
  byId("ranks-title").textContent = `Ranks of ${run.label}`;
  byId("method").textContent = `${run.summary.method}, from ${run.summary.directory}`;
  ranks(run);
  growth(run);
  cost(run);
}

function ranks(run) {
  const paints = run.maps.flatMap(map => panels(run, map));
  const last = run.snapshots.length - 1;
  const paint = at => paints.forEach(own => own(at));
  if (last > 0) timeControl(run, paint);
  else put(byId("time"), "p", { class: "empty" }, "No step was recorded yet: these are the ranks before training.");
  paint(last);
}

function timeControl(run, paint) {
  const box = put(byId("time"), "div", { class: "time" }), last = run.snapshots.length - 1;
  const play = put(box, "button", { type: "button", "aria-pressed": false }, "Play");
  const slider = put(box, "input", { type: "range", min: 0, max: last, value: last, "aria-label": "optimizer step" });
  const shown = put(box, "output");
  const show = () => {
    shown.textContent = `after step ${count(run.snapshots[slider.value].step)} of ${count(run.summary.steps)}`;
    paint(+slider.value);
  };
  const stop = () => {
    clearInterval(playing);
    playing = null;
    play.textContent = "Play";
  };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (playing) return stop();
    if (+slider.value === last) slider.value = 0;
    play.textContent = "Pause";
    playing = setInterval(() => {
      slider.value = +slider.value + 1;
      show();
      if (+slider.value === last) stop();
    }, Math.max(40, 4000 / last));
  });
  show();
}

// Rank, the share of each text's rows, sensitivity; returns what paints a snapshot.
function panels(run, map) {
  const box = put(byId("maps"), "div", { class: "panels" }), room = Math.max(220, byId("maps").clientWidth);
  const shown = { at: run.snapshots.length - 1 };
  const common = { map, room, tell: (tip, row, column) => tellCell(tip, run, map, row, column, shown.at) };
  const spread = values => map.cells.map(row => row.map(place => (place === null || !values ? null : values[place])));
  const paintRank = heatmap(box, { ...common, title: `Rank by layer and ${map.kind}`, what: "rank", most: highest(run), show: count, unit: "" });
  const texts = Object.entries(map.shares), mostShare = max(texts.flatMap(([, rows]) => rows.map(max)));
  for (const [text, rows] of texts) {
    const title = `Share of rows by routing, ${text}`;
    heatmap(box, { ...common, title, what: "share", most: mostShare, power: 0.5, show: value => (100 * value).toFixed(0), unit: "% of the layer's rows" })(rows);
  }
  const paints = [index => { shown.at = index; paintRank(spread(run.snapshots[index].ranks)); }];
  const mostSensitive = max(run.snapshots.map((_, index) => max(sensitivityShares(run, index) ?? [])));
  if (mostSensitive) {
    const paint = heatmap(box, { ...common, title: "Sensitivity: what of the loss hangs on it", what: "sensitivity", most: mostSensitive, power: 0.5, show: value => (100 * value).toFixed(value >= 0.0995 ? 0 : mostSensitive >= 0.05 ? 1 : 2), unit: "% of all" });
    paints.push(index => paint(spread(sensitivityShares(run, index))));
  }
  return paints;
}

const highest = run => max(run.snapshots.map(own => max(own.ranks)));

function sensitivityShares(run, index) {
  const values = run.snapshots[index].sensitivity, sum = (values ?? []).reduce((all, value) => all + (value ?? 0), 0);
  return sum ? values.map(value => (value === null ? null : value / sum)) : null;
}

function tellCell(tip, run, map, row, column, index) {
  const place = map.cells[row][column], { part, name } = map.columns[column], snapshot = run.snapshots[index];
  put(tip, "b", {}, map.kind === "module" ? `layer ${map.rows[row]} · ${part === "others" ? "" : `${part}.`}${name}` : `layer ${map.rows[row]} · expert ${name}`);
  tooltipRow(tip, `rank after step ${count(snapshot.step)}`, `${snapshot.ranks[place]} of at most ${run.maxRank}`);
  for (const [text, rows] of Object.entries(map.shares)) tooltipRow(tip, `rows of ${text}`, percent(rows[row][column]));
  const share = sensitivityShares(run, index);
  if (share && share[place] !== null) tooltipRow(tip, "sensitivity", `${snapshot.sensitivity[place].toPrecision(2)} nats, ${percent(share[place])} of all`);
  if (run.snapshots.length > 2) sparkline(tip, run.snapshots.map(own => own.ranks[place]), highest(run), index);
}

function sparkline(tip, values, most, index) {
  const svg = put(tip, "svg", { width: 220, height: 48 }), x = at => 2 + (at / (values.length - 1)) * 190, y = value => 44 - (value / (most || 1)) * 38;
  put(svg, "polyline", { points: values.map((value, at) => `${x(at)},${y(value)}`).join(" "), fill: "none", stroke: "currentColor", "stroke-width": 1.5 });
  put(svg, "circle", { cx: x(index), cy: y(values[index]), r: 3, fill: "currentColor" });
  put(svg, "text", { x: 198, y: y(values.at(-1)) + 4 }, values.at(-1));
}

function growth(run) {
  const series = run.parts.map((part, index) => ({
    name: `${part.name} (${count(part.count)})`, color: seriesColor(run.parts.length > 1 ? index + 3 : current), dash: seriesDash(index),
    points: run.summary.done ? run.snapshots.map((own, at) => [own.step, part.ranks[at][1]]) : [],
    band: run.snapshots.map((own, at) => [own.step, part.ranks[at][0], part.ranks[at][2]]),
  }));
  const names = run.parts.length > 3 ? "the parts of a layer" : run.parts.map(part => part.name).join(" against ");
  const title = `Rank of ${names}: mean, band from lowest to highest`;
  lineChart(byId("growth"), { title, unit: "rank", fromZero: true, series });
  if (run.summary.done) for (const map of run.maps) layersOverTime(run, map);
}

function layersOverTime(run, map) {
  const box = put(byId("growth"), "div"), wanted = 40, last = run.snapshots.length - 1;
  const taken = [...new Set(Array.from({ length: wanted }, (_, index) => Math.round((index / (wanted - 1)) * last)))];
  const of = (ranks, row) => map.cells[row].filter(place => place !== null).map(place => ranks[place]);
  const [word, figure] = map.kind === "expert" ? ["Highest", max] : ["Mean", mean];
  const values = map.rows.map((_, row) => taken.map(index => figure(of(run.snapshots[index].ranks, row))));
  const columns = taken.map(index => ({ part: "", name: count(run.snapshots[index].step) }));
  const tell = (tip, row, column) => {
    put(tip, "b", {}, `layer ${map.rows[row]} after step ${columns[column].name}`);
    tooltipRow(tip, `${word.toLowerCase()} rank`, short(values[row][column]));
  };
  const title = `${word} rank of each layer by optimizer step`;
  heatmap(box, { map: { kind: "time", rows: map.rows, columns, cells: values }, title, what: "rank", most: highest(run), show: value => value.toFixed(map.kind === "expert" ? 0 : 1), unit: "", tell, room: Math.min(560, byId("growth").clientWidth) })(values);
}

function cost(run) {
  const box = byId("cost"), costs = run.costs;
  if (!costs.arms) return put(box, "p", { class: "empty" }, `The sizes of this model's layers are not known: ${costs.reason}`);
  const charts = put(box, "div", { class: "charts" });
  bars(charts, { title: "Memory in a training step", show: bytes, rows: costs.arms.map(arm => ({ name: arm.name, parts: Object.entries(arm.held) })) });
  bars(charts, { title: `Time that adapters add to a step on one ${costs.gpu}, at the least`, show: milliseconds, rows: costs.arms.map(arm => ({ name: arm.name, parts: [["time", arm.milliseconds]] })) });
  put(box, "p", { class: "note" }, `Computed from the last ranks, not measured, for ${count(costs.tokens)} tokens in a step. Saved is what autograd keeps because of the adapters. Times are floors at the datasheet's rates of bandwidth and arithmetic, and routing is taken as even; the frozen layers take ${milliseconds(costs.frozen)}. Padded is a masked LoRA of that rank everywhere.`);
}

function draw() {
  for (const id of ["overview", "all"]) byId(id).replaceChildren();
  overview();
  sideBySide();
  choose(current);
}

lead();
runsTable();
runSwitch();
draw();
dark.addEventListener("change", draw);
let drawnAt = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== drawnAt) draw();
  drawnAt = innerWidth;
});
addEventListener("keydown", event => event.key === "Escape" && hideTooltip());
