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
  const shown = { at: run.snapshots.length - 1 };
  const common = { map, room, tell: (tip, row, column) => tellCell(tip, run, map, row, column, shown.at) };
  const spread = values => map.cells.map(row => row.map(place => (place === null || !values ? null : values[place])));
  const paintRank = heatmap(box, {
    ...common,
    title: `Rank by layer and ${map.kind}`,
    what: "rank",
    most: highest(run),
    show: count,
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
      shown.at = index;
      paintRank(spread(run.snapshots[index].ranks));
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

const highest = run => max(run.snapshots.map(own => max(own.ranks)));

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
  tooltipRow(tip, `rank after step ${count(snapshot.step)}`, `${snapshot.ranks[place]} of at most ${run.maxRank}`);
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
      run.snapshots.map(own => own.ranks[place]),
      highest(run),
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
  const series = run.parts.map((part, index) => ({
    name: `${part.name} (${count(part.count)})`,
    color: seriesColor(run.parts.length > 1 ? index + 3 : current),
    dash: seriesDash(index),
    points: run.summary.done ? run.snapshots.map((own, at) => [own.step, part.ranks[at][1]]) : [],
    band: run.snapshots.map((own, at) => [own.step, part.ranks[at][0], part.ranks[at][2]]),
  }));
  const names = run.parts.length > 3 ? "the parts of a layer" : run.parts.map(part => part.name).join(" against ");
  const title = `Rank of ${names}: mean, band from lowest to highest`;
  lineChart(byId("growth"), { title, unit: "rank", fromZero: true, series });
  if (run.summary.done) for (const map of run.maps) layersOverTime(run, map);
}

function layersOverTime(run, map) {
  const box = put(byId("growth"), "div"),
    wanted = 40,
    last = run.snapshots.length - 1;
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
  heatmap(box, {
    map: { kind: "time", rows: map.rows, columns, cells: values },
    title,
    what: "rank",
    most: highest(run),
    show: value => value.toFixed(map.kind === "expert" ? 0 : 1),
    unit: "",
    tell,
    room: Math.min(560, byId("growth").clientWidth),
  })(values);
}

function cost(run) {
  const box = byId("cost"),
    costs = run.costs;
  if (!costs.arms)
    return put(box, "p", { class: "empty" }, `The sizes of this model's layers are not known: ${costs.reason}`);
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
    ].join(" "),
  );
}
