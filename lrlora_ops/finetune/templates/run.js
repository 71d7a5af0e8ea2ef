// What the switch chooses: ranks by layer with a slider through the steps, growth, cost.
function ranks(run) {
  const paints = run.maps.flatMap(map => panels(run, map));
  const last = run.snapshots.length - 1;
  const paint = at => paints.forEach(own => own(at));
  if (last > 0) timeControl(run, paint);
  else put(byId("time"), "p", { class: "empty" }, "No step was recorded yet: these are the ranks before training.");
  paint(last);
}

function timeControl(run, paint) {
  const box = put(byId("time"), "div", { class: "time" }),
    last = run.snapshots.length - 1;
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
  slider.addEventListener("input", () => {
    stop();
    show();
  });
  play.addEventListener("click", () => {
    if (playing) return stop();
    if (+slider.value === last) slider.value = 0;
    play.textContent = "Pause";
    playing = setInterval(
      () => {
        slider.value = +slider.value + 1;
        show();
        if (+slider.value === last) stop();
      },
      Math.max(40, 4000 / last),
    );
  });
  show();
}

// Rank, the share of each text's rows, sensitivity; returns what paints a snapshot.
function panels(run, map) {
  const box = put(byId("maps"), "div", { class: "panels" }),
    room = Math.max(220, byId("maps").clientWidth);
  const painted = { at: run.snapshots.length - 1 };
  const common = { map, room, tell: (tip, row, column) => tellCell(tip, run, map, row, column, painted.at) };
  const spread = values => map.cells.map(row => row.map(place => (place === null || !values ? null : values[place])));
  const paintRank = heatmap(box, {
    ...common,
    title: `${WORD[map.what]} by layer and ${map.kind}`,
    what: "rank",
    most: highest(run, map.what),
    show: shown[map.what],
    unit: "",
  });
  const texts = Object.entries(map.shares),
    mostShare = max(texts.flatMap(([, rows]) => rows.map(max)));
  for (const [text, rows] of texts) {
    const title = `Share of rows by routing, ${text}`;
    heatmap(box, {
      ...common,
      title,
      what: "share",
      most: mostShare,
      power: 0.5,
      show: value => (100 * value).toFixed(0),
      unit: "% of the layer's rows",
    })(rows);
  }
  const paints = [
    index => {
      painted.at = index;
      paintRank(spread(ranksOf(run, index, map.what)));
    },
  ];
  const mostSensitive = max(run.snapshots.map((_, index) => max(sensitivityShares(run, index) ?? [])));
  if (mostSensitive) {
    const paint = heatmap(box, {
      ...common,
      title: "Sensitivity: what of the loss hangs on it",
      what: "sensitivity",
      most: mostSensitive,
      power: 0.5,
      show: value => (100 * value).toFixed(value >= 0.0995 ? 0 : mostSensitive >= 0.05 ? 1 : 2),
      unit: "% of all",
    });
    paints.push(index => paint(spread(sensitivityShares(run, index))));
  }
  return paints;
}

// What the numbers of a map are, and how they are shown: live ranks, or what SincUpdate has in their place.
const WORD = { rank: "Rank", "stable rank": "Stable rank" };
const shown = { rank: count, "stable rank": value => value.toFixed(1) };
const ranksOf = (run, index, what) => run.snapshots[index][what === "rank" ? "ranks" : "stable_ranks"];
const places = (run, what) =>
  run.maps
    .filter(map => map.what === what)
    .flatMap(map => map.cells.flat())
    .filter(place => place !== null);
function highest(run, what) {
  const own = places(run, what);
  return max(run.snapshots.map((_, index) => max(own.map(place => ranksOf(run, index, what)[place]))));
}

function sensitivityShares(run, index) {
  const values = run.snapshots[index].sensitivity,
    sum = (values ?? []).reduce((all, value) => all + (value ?? 0), 0);
  return sum ? values.map(value => (value === null ? null : value / sum)) : null;
}

function tellCell(tip, run, map, row, column, index) {
  const place = map.cells[row][column],
    { part, name } = map.columns[column],
    snapshot = run.snapshots[index];
  put(
    tip,
    "b",
    {},
    map.kind === "module"
      ? `layer ${map.rows[row]} · ${part === "others" ? "" : `${part}.`}${name}`
      : `layer ${map.rows[row]} · expert ${name}`,
  );
  const rank = ranksOf(run, index, map.what)[place],
    limit = map.what === "rank" ? ` of at most ${run.maxRank}` : "";
  tooltipRow(tip, `${map.what} after step ${count(snapshot.step)}`, `${rank}${limit}`);
  for (const [text, rows] of Object.entries(map.shares)) tooltipRow(tip, `rows of ${text}`, percent(rows[row][column]));
  const share = sensitivityShares(run, index);
  if (share && share[place] !== null)
    tooltipRow(
      tip,
      "sensitivity",
      `${snapshot.sensitivity[place].toPrecision(2)} nats, ${percent(share[place])} of all`,
    );
  if (run.snapshots.length > 2)
    sparkline(
      tip,
      run.snapshots.map((_, at) => ranksOf(run, at, map.what)[place]),
      highest(run, map.what),
      index,
    );
}

function sparkline(tip, values, most, index) {
  const svg = put(tip, "svg", { width: 220, height: 48 }),
    x = at => 2 + (at / (values.length - 1)) * 190,
    y = value => 44 - (value / (most || 1)) * 38;
  put(svg, "polyline", {
    points: values.map((value, at) => `${x(at)},${y(value)}`).join(" "),
    fill: "none",
    stroke: "currentColor",
    "stroke-width": 1.5,
  });
  put(svg, "circle", { cx: x(index), cy: y(values[index]), r: 3, fill: "currentColor" });
  put(svg, "text", { x: 198, y: y(values.at(-1)) + 4 }, values.at(-1));
}

function growth(run) {
  for (const what of Object.keys(WORD)) partsOverTime(run, what);
  if (run.summary.done) for (const map of run.maps) layersOverTime(run, map);
}

function partsOverTime(run, what) {
  const parts = run.parts.filter(part => part.what === what);
  if (!parts.length) return;
  const series = parts.map((part, index) => ({
    name: `${part.name} (${count(part.count)})`,
    color: seriesColor(run.parts.length > 1 ? index + 3 : current),
    dash: seriesDash(index),
    points: run.summary.done ? run.snapshots.map((own, at) => [own.step, part.ranks[at][1]]) : [],
    band: run.snapshots.map((own, at) => [own.step, part.ranks[at][0], part.ranks[at][2]]),
  }));
  const names = parts.length > 3 ? "the parts of a layer" : parts.map(part => part.name).join(" against ");
  const title = `${WORD[what]} of ${names}: mean, band from lowest to highest`;
  lineChart(byId("growth"), { title, unit: what, fromZero: true, series });
}

function layersOverTime(run, map) {
  const box = put(byId("growth"), "div"),
    wanted = 40,
    last = run.snapshots.length - 1;
  const taken = [...new Set(Array.from({ length: wanted }, (_, index) => Math.round((index / (wanted - 1)) * last)))];
  const of = (ranks, row) => map.cells[row].filter(place => place !== null).map(place => ranks[place]);
  const [word, figure] = map.kind === "expert" ? ["Highest", max] : ["Mean", mean];
  const values = map.rows.map((_, row) => taken.map(index => figure(of(ranksOf(run, index, map.what), row))));
  const columns = taken.map(index => ({ part: "", name: count(run.snapshots[index].step) }));
  const tell = (tip, row, column) => {
    put(tip, "b", {}, `layer ${map.rows[row]} after step ${columns[column].name}`);
    tooltipRow(tip, `${word.toLowerCase()} ${map.what}`, short(values[row][column]));
  };
  const title = `${word} ${map.what} of each layer by optimizer step`;
  heatmap(box, {
    map: { kind: "time", rows: map.rows, columns, cells: values },
    title,
    what: "rank",
    most: highest(run, map.what),
    show: value => value.toFixed(map.kind === "expert" && map.what === "rank" ? 0 : 1),
    unit: "",
    tell,
    room: Math.min(560, byId("growth").clientWidth),
  })(values);
}

function cost(run) {
  const box = byId("cost"),
    costs = run.costs;
  if (!costs.arms) return put(box, "p", { class: "empty" }, costs.reason);
  const charts = put(box, "div", { class: "charts" });
  bars(charts, {
    title: "Memory in a training step",
    show: bytes,
    rows: costs.arms.map(arm => ({ name: arm.name, parts: Object.entries(arm.held) })),
  });
  bars(charts, {
    title: `Time that adapters add to a step on one ${costs.gpu}, at the least`,
    show: milliseconds,
    rows: costs.arms.map(arm => ({ name: arm.name, parts: [["time", arm.milliseconds]] })),
  });
  put(
    box,
    "p",
    { class: "note" },
    [
      `Computed from the last ranks, not measured, for ${count(costs.tokens)} tokens, forward and backward.`,
      "Saved is what autograd keeps because of the adapters.",
      "Times are floors at the datasheet's rates of bandwidth and arithmetic, and routing is taken as even;",
      `the frozen layers take ${milliseconds(costs.frozen)}. Padded is a masked LoRA of that rank everywhere.`,
      ...(run.maps.some(map => map.what === "stable rank")
        ? ["SincUpdate is not padded; it has a third product beside the frozen two, and makes weights in the buffer, a layer at a time."]
        : []),
    ].join(" "),
  );
}
