// The page: all runs in a table and two charts, and what the switch chooses in full.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const byId = id => document.getElementById(id);
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const max = values => values.reduce((most, value) => Math.max(most, value ?? 0), 0);
let current = 0;
let playing = null;

function lead() {
  const started = RUNS.map(run => run.summary.started.slice(0, 16).replace("T", " ")).sort()[0];
  const machines = [...new Set(RUNS.map(run => run.summary.machine))];
  byId("lead").textContent =
    `${RUNS.length} run${RUNS.length > 1 ? "s" : ""}, started ${started} UTC · ${machines.join("; ")}`;
}

function runsTable() {
  const texts = [...new Set(RUNS.flatMap(run => Object.keys(run.summary.before)))];
  const evaluated = [...new Set(RUNS.flatMap(run => Object.keys(run.summary.heldOut)))];
  const columns = [
    ["run", null],
    ["mean rank (lowest to highest)", run => `${short(run.rank[1])} (${run.rank[0]} to ${run.rank[2]})`],
    ...(RUNS.some(run => run.summary.stable)
      ? [
          [
            "mean stable rank",
            run => (run.stable ? `${short(run.stable[1])} (${short(run.stable[0])} to ${short(run.stable[2])})` : "–"),
          ],
        ]
      : []),
    ["adapter parameters", run => (run.parameters === null ? "–" : count(run.parameters))],
    ...texts.map(text => [`bits per byte, ${text}`, run => run.bits[text], run => run.before[text]]),
    ...evaluated.map(name => [
      `held-out loss, ${name}`,
      run => run.heldOut[name]?.at(-1),
      run => (run.heldOut[name]?.length > 1 ? run.heldOut[name][0] : undefined),
    ]),
    ["training time", run => duration(run.seconds)],
    ["tokens per second", run => (run.speed === null ? "–" : count(run.speed))],
    ...(RUNS.some(run => run.summary.held)
      ? [["held, start to end", run => (run.held ? `${bytes(run.held[0])} to ${bytes(run.held[1])}` : "–")]]
      : []),
    ...(RUNS.some(run => run.summary.gpu) ? [["GPU peak", run => (run.gpu ? bytes(run.gpu) : "–")]] : []),
  ];
  const table = put(byId("table"), "table"),
    head = put(put(table, "thead"), "tr"),
    body = put(table, "tbody");
  for (const [name] of columns) put(head, "th", { scope: "col" }, name);
  RUNS.forEach((run, index) => {
    const row = put(body, "tr", RUNS.length > 1 ? { tabindex: 0 } : {}),
      name = put(row, "th", { scope: "row" });
    put(name, "span", { class: "swatch", style: `background:${seriesColor(index)}` });
    name.append(run.label);
    if (!run.summary.ended)
      put(
        name,
        "span",
        { class: "state" },
        `not ended: ${count(run.summary.done)} of ${count(run.summary.steps)} steps`,
      );
    for (const [, value, before] of columns.slice(1))
      before ? lossCell(row, run.summary, value, before) : put(row, "td", {}, value(run.summary));
    row.addEventListener("click", () => choose(index));
    row.addEventListener("keydown", event => event.key === "Enter" && choose(index));
  });
}

// The best of what was held out is bold, as far as three digits tell.
function lossCell(row, run, value, before) {
  const three = own => (own === undefined ? "–" : own.toFixed(3));
  const all = RUNS.map(other => value(other.summary))
    .filter(own => own !== undefined)
    .map(three)
    .sort();
  const best = RUNS.length > 1 && all[0] === three(value(run)) && all[0] !== all.at(-1);
  const cell = put(row, "td", best ? { class: "best" } : {});
  if (before(run) !== undefined) put(cell, "small", {}, `${three(before(run))} → `);
  cell.append(three(value(run)));
}

function overview() {
  const line = (run, index) => ({ name: run.label, color: seriesColor(index) });
  lineChart(byId("overview"), {
    title: "Training loss, smoothed",
    unit: "nats per token",
    show: value => value.toFixed(3),
    series: RUNS.map((run, index) => ({ ...line(run, index), points: averaged(run.loss), faint: run.loss })),
  });
  for (const [what, word] of Object.entries(WORD)) {
    if (!RUNS.some(run => places(run, what).length)) continue;
    const over = (run, index) => ({ ...line(run, index), dash: seriesDash(index), ...spreadOverTime(run, what) });
    lineChart(byId("overview"), {
      title: `${word}: mean, band from lowest to highest`,
      unit: what,
      fromZero: true,
      series: RUNS.map(over).filter((_, index) => places(RUNS[index], what).length),
    });
  }
}

// Means over a twentieth of the run, at most, that ends there.
function averaged(points) {
  const most = Math.ceil(points.length / 20);
  return points.map(([step], at) => [
    step,
    mean(points.slice(Math.max(0, at + 1 - most), at + 1).map(([, loss]) => loss)),
  ]);
}

// The last ranks of all runs, on one scale.
function sideBySide() {
  if (RUNS.length === 1) return;
  const box = put(byId("all"), "div", { class: "panels" }),
    room = Math.min(350, byId("all").clientWidth);
  for (const run of RUNS)
    for (const map of run.maps) {
      const last = run.snapshots.length - 1,
        ranks = ranksOf(run, last, map.what),
        values = map.cells.map(row => row.map(place => (place === null ? null : ranks[place])));
      const tell = (tip, row, column) => tellCell(tip, run, map, row, column, last);
      heatmap(box, {
        map,
        title: `${run.label}: ${map.what} by layer and ${map.kind}`,
        what: "rank",
        most: max(RUNS.map(other => highest(other, map.what))),
        show: shown[map.what],
        unit: "",
        tell,
        room,
        least: 3,
      })(values);
    }
}

function spreadOverTime(run, what) {
  const own = places(run, what);
  if (!run.summary.done || !own.length) return { points: [] };
  const band = run.snapshots.map(({ step }, index) => {
    const ranks = own.map(place => ranksOf(run, index, what)[place]);
    return [step, ranks.reduce((least, rank) => Math.min(least, rank)), max(ranks), mean(ranks)];
  });
  return { points: band.map(([step, , , average]) => [step, average]), band };
}

function runSwitch() {
  RUNS.forEach((run, index) =>
    put(byId("switch"), "button", { type: "button" }, run.label).addEventListener("click", () => choose(index)),
  );
}

function choose(index) {
  current = index;
  clearInterval(playing);
  playing = null;
  hideTooltip();
  byId("switch")
    .querySelectorAll("button")
    .forEach((button, at) => button.setAttribute("aria-pressed", at === index));
  if (RUNS.length > 1)
    byId("table")
      .querySelectorAll("tbody tr")
      .forEach((row, at) => row.setAttribute("aria-selected", at === index));
  for (const id of ["time", "maps", "growth", "cost"]) byId(id).replaceChildren();
  const run = RUNS[index];
  byId("ranks-title").textContent = `Ranks of ${run.label}`;
  byId("method").textContent = `${run.summary.method}, from ${run.summary.directory}`;
  ranks(run);
  growth(run);
  cost(run);
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
