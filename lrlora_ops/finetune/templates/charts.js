// Line charts with a cursor that reads them, and bars.
const HEIGHT = 270,
  LEFT = 52,
  RIGHT = 22,
  TOP = 10,
  BOTTOM = 42;

// series: [{ name, color, dash, points: [[x, y]], faint: the same, behind them, band: [[x, low, high]] }]
function lineChart(parent, { title, unit, series, fromZero, show = short }) {
  const figure = put(parent, "div", { class: "chart" });
  put(figure, "h3", {}, title);
  const drawn = series.filter(line => line.points.length);
  if (!drawn.length) return put(figure, "p", { class: "empty" }, "No step was recorded yet.");
  if (series.length > 1) legend(figure, series);
  const xs = drawn.flatMap(line => line.points.map(([x]) => x));
  const ys = drawn.flatMap(line => [
    ...[...line.points, ...(line.faint ?? [])].map(([, y]) => y),
    ...(line.band ?? []).flatMap(([, low, high]) => [low, high]),
  ]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [fromZero ? 0 : Math.min(...ys), Math.max(...ys)];
  if (!fromZero) y0 -= 0.05 * (y1 - y0 || 1);
  y1 += 0.05 * (y1 - y0 || 1);
  const width = Math.max(260, figure.clientWidth);
  const x = value => LEFT + ((value - x0) / (x1 - x0 || 1)) * (width - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const svg = put(figure, "svg", { width, height: HEIGHT, role: "img", "aria-label": `${title}, ${unit}, by step` });
  axes(svg, width, x, y, ticks(x0, x1, width / 90).filter(Number.isInteger), ticks(y0, y1), unit);
  for (const line of drawn) {
    const up = (line.band ?? []).map(([step, , high]) => `${x(step)},${y(high)}`);
    const down = (line.band ?? []).map(([step, low]) => `${x(step)},${y(low)}`).reverse();
    if (up.length)
      put(svg, "polygon", { points: [...up, ...down].join(" "), style: `fill:${line.color}`, opacity: 0.13 });
  }
  const path = points => points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ");
  for (const { faint, color } of drawn)
    if (faint) put(svg, "polyline", { points: path(faint), fill: "none", style: `stroke:${color}`, opacity: 0.25 });
  for (const { points, color, dash } of drawn) {
    put(svg, "polyline", {
      points: path(points),
      fill: "none",
      style: `stroke:${color}`,
      "stroke-width": 2,
      "stroke-dasharray": dash ?? "",
      "stroke-linejoin": "round",
    });
  }
  cursor(svg, drawn, width, x, x0, x1, show);
}

function legend(parent, series) {
  const box = put(parent, "div", { class: "legend" });
  for (const line of series) {
    const entry = put(box, "span");
    put(entry, "span", { class: "swatch", style: `background:${line.color}` });
    entry.append(line.name);
  }
}

function axes(svg, width, x, y, xTicks, yTicks, unit) {
  const bottom = HEIGHT - BOTTOM;
  for (const value of yTicks) {
    put(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) });
    put(svg, "text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, value.toLocaleString("en"));
  }
  put(svg, "line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom });
  for (const value of xTicks)
    put(svg, "text", { x: x(value), y: bottom + 17, "text-anchor": "middle" }, value.toLocaleString("en"));
  put(svg, "text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "optimizer step");
  put(
    svg,
    "text",
    { x: 13, y: (TOP + bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 13 ${(TOP + bottom) / 2})` },
    unit,
  );
}

function cursor(svg, series, width, x, x0, x1, show) {
  const line = put(svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const nearest = (points, step) =>
    points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  svg.addEventListener("pointermove", event => {
    const at = (event.clientX - svg.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT);
    const step = nearest(series[0].points, x0 + Math.min(1, Math.max(0, at)) * (x1 - x0))[0];
    for (const side of ["x1", "x2"]) line.setAttribute(side, x(step));
    line.setAttribute("visibility", "visible");
    showTooltip(event.clientX, event.clientY, box => {
      put(box, "b", {}, `step ${count(step)}`);
      for (const own of series) {
        const [, value] = nearest(own.points, step),
          band = own.band && nearest(own.band, step);
        tooltipRow(
          box,
          own.name,
          band ? `${show(value)} (${short(band[1])} to ${short(band[2])})` : show(value),
          own.color,
        );
      }
    });
  });
  svg.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    hideTooltip();
  });
}

// rows: [{ name, parts: [[name, value]] }]; the parts of a row stand on each other
function bars(parent, { title, rows, show }) {
  const figure = put(parent, "div", { class: "chart" });
  put(figure, "h3", {}, title);
  const total = row => row.parts.reduce((sum, [, value]) => sum + value, 0);
  const names = rows[0].parts.map(([name]) => name);
  if (names.length > 1)
    legend(
      figure,
      names.map((name, index) => ({ name, color: seriesColor(index) })),
    );
  const most = Math.max(...rows.map(total)) || 1,
    room = Math.max(260, figure.clientWidth);
  const svg = put(figure, "svg", { width: room, height: 46 * rows.length, role: "img", "aria-label": title });
  rows.forEach((row, index) => {
    const top = 46 * index;
    let left = 0;
    put(svg, "text", { class: "value", x: 0, y: top + 14 }, row.name);
    row.parts.forEach(([name, value], part) => {
      const width = (value / most) * (room - 90);
      const bar = put(svg, "rect", { x: left, y: top + 20, width, height: 16, style: `fill:${seriesColor(part)}` });
      bar.addEventListener("pointermove", event =>
        showTooltip(event.clientX, event.clientY, box => {
          put(box, "b", {}, row.name);
          row.parts.forEach(([own, size], at) => tooltipRow(box, own, show(size), seriesColor(at)));
          if (row.parts.length > 1) tooltipRow(box, "sum", show(total(row)));
        }),
      );
      bar.addEventListener("pointerleave", hideTooltip);
      left += width;
    });
    put(svg, "text", { class: "value", x: left + 8, y: top + 33 }, show(total(row)));
  });
}
