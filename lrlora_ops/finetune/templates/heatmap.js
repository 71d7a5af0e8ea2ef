// Heatmaps of layers by modules or experts, whose cells are read with the pointer or the arrow keys.
const dark = matchMedia("(prefers-color-scheme: dark)");
const EDGE = 12; // for what of the last column's name stands out

function shade(what, level) {
  const table = DATA.colors[what][dark.matches ? "dark" : "light"];
  return table[Math.round(Math.min(1, Math.max(0, level)) * (table.length - 1))];
}

function inkOn(color) {
  const [red, green, blue] = [1, 3, 5].map(at => parseInt(color.slice(at, at + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

function sizes(map, room, least) {
  const label = 14 + 7 * Math.max(5, ...map.rows.map(name => name.length));
  const longestOf = names => Math.max(...names.map(name => name.length));
  let names = map.columns.map(column => column.name);
  const wanted = map.kind === "module" ? Math.max(40, 7 * longestOf(names) + 10) : 30;
  const width = Math.max(least, Math.min(wanted, (room - label - EDGE) / map.columns.length));
  const height = Math.max(8, Math.min(26, (map.kind === "module" ? 720 : 480) / map.rows.length));
  if (7 * longestOf(names) > width) names = names.map(name => name.replace(/_proj$/, ""));
  return {
    label,
    width,
    height,
    names,
    slant: map.kind === "module" && 7 * longestOf(names) > width,
    longest: longestOf(names),
  };
}

// most: the top of the scale; power: below 1 tells small values apart; tell(box, row, column) fills the tooltip.
// Returns what paints values: rows of numbers, or of null where nothing is known.
function heatmap(parent, { map, title, what, most, power = 1, show, unit, tell, room, least = 6 }) {
  const panel = put(parent, "div", { class: "panel" });
  put(panel, "h3", {}, title);
  const { label, width, height, names, slant, longest } = sizes(map, room, least);
  const head = (map.kind === "module" ? 20 : 0) + (slant ? 12 + 5 * longest : 20);
  const [across, down] = [label + width * map.columns.length + (slant ? 30 : EDGE), head + height * map.rows.length + 2];
  const svg = put(put(panel, "div", { class: "scroll" }), "svg", {
    width: across,
    height: down,
    role: "img",
    tabindex: 0,
    "aria-label": `${title}; arrow keys read the cells`,
  });
  columnNames(svg, map, { label, width, head, names, slant });
  const rowStep = Math.ceil(14 / height);
  map.rows.forEach((name, row) => {
    if (row % rowStep === 0)
      put(svg, "text", { x: label - 8, y: head + height * (row + 0.5) + 4, "text-anchor": "end" }, name);
  });
  const numbers = height >= 15 && width >= 7.2 * Math.max(show(most).length, show(most / 20).length) + 2;
  const cells = map.cells.map((places, row) =>
    places.map((place, column) =>
      cell(svg, place, label + width * column, head + height * row, width, height, numbers),
    ),
  );
  const chosen = put(svg, "rect", { class: "chosen", width, height, visibility: "hidden" });
  scale(panel, what, "0", show(most), unit);

  function paint(values) {
    cells.forEach((line, row) =>
      line.forEach((own, column) => {
        if (!own) return;
        const value = values[row][column],
          known = value !== null && value !== undefined;
        const color = known ? shade(what, (value / (most || 1)) ** power) : "";
        own.box.setAttribute("class", known ? "" : "void");
        own.box.setAttribute("fill", color);
        if (own.text) {
          own.text.textContent = known ? show(value) : "";
          own.text.setAttribute("style", known ? `fill:${inkOn(color)}` : "");
        }
      }),
    );
  }
  reading(svg, map, { chosen, label, head, width, height, tell });
  return paint;
}

function cell(svg, place, x, y, width, height, numbers) {
  if (place === null) return null;
  const gap = width > 12 ? 1 : 0.4;
  const box = put(svg, "rect", { x, y, width: width - gap, height: height - gap, rx: width > 20 ? 2 : 0 });
  if (!numbers) return { box };
  return {
    box,
    text: put(svg, "text", { class: "number", x: x + width / 2, y: y + height / 2 + 4, "text-anchor": "middle" }),
  };
}

function columnNames(svg, map, { label, width, head, names, slant }) {
  let first = 0;
  map.columns.forEach((column, index) => {
    const every = map.kind === "module" ? 1 : Math.ceil((7 * names.at(-1).length + 8) / width),
      x = label + width * (index + 0.5);
    const place = slant
      ? { x: x - 3, y: head - 7, transform: `rotate(-35 ${x - 3} ${head - 7})` }
      : { x, y: head - 6, "text-anchor": "middle" };
    if (index % every === 0) put(svg, "text", place, names[index]);
    const last = index + 1 === map.columns.length || map.columns[index + 1].part !== column.part;
    if (map.kind !== "module" || !last) return;
    put(
      svg,
      "text",
      { class: "value", x: label + (width * (first + index + 1)) / 2, y: 12, "text-anchor": "middle" },
      column.part,
    );
    put(svg, "line", {
      class: "axis",
      x1: label + width * first + 3,
      x2: label + width * (index + 1) - 4,
      y1: 18,
      y2: 18,
    });
    first = index + 1;
  });
}

function scale(panel, what, low, high, unit) {
  const box = put(panel, "div", { class: "scale" });
  const colors = Array.from({ length: 12 }, (_, index) => shade(what, index / 11));
  put(box, "span", {}, low);
  put(box, "i", { style: `background:linear-gradient(90deg,${colors.join(",")})` });
  put(box, "span", {}, `${high} ${unit}`);
}

function reading(svg, map, { chosen, label, head, width, height, tell }) {
  let at = [0, 0];
  function read(row, column, x, y) {
    if ((map.cells[row]?.[column] ?? null) === null) return forget();
    at = [row, column];
    chosen.setAttribute("x", label + width * column);
    chosen.setAttribute("y", head + height * row);
    chosen.setAttribute("visibility", "visible");
    showTooltip(x, y, box => tell(box, row, column));
  }
  function forget() {
    chosen.setAttribute("visibility", "hidden");
    hideTooltip();
  }
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    read(
      Math.floor((event.clientY - box.top - head) / height),
      Math.floor((event.clientX - box.left - label) / width),
      event.clientX,
      event.clientY,
    );
  });
  svg.addEventListener("pointerleave", forget);
  svg.addEventListener("blur", forget);
  svg.addEventListener("keydown", event => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const row = Math.min(map.rows.length - 1, Math.max(0, at[0] + move[0]));
    const column = Math.min(map.columns.length - 1, Math.max(0, at[1] + move[1])),
      box = svg.getBoundingClientRect();
    read(row, column, box.left + label + width * (column + 0.5), box.top + head + height * (row + 0.5));
  });
}
