// Elements, numbers as text, scales, and the tooltip.
const NS = "http://www.w3.org/2000/svg";

function put(parent, name, attributes = {}, text) {
  const svg = name === "svg" || parent.namespaceURI === NS;
  const made = svg ? document.createElementNS(NS, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

const seriesColor = index => `var(--c${index % 6})`;
const seriesDash = index => ["", "9 4", "3 3", "12 3 3 3"][index % 4];
const count = value => Math.round(value).toLocaleString("en");
const short = value => (value === null || value === undefined ? "–" : String(+value.toPrecision(3)));
const percent = value => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;

function bytes(value) {
  const [unit, size] = [
    ["GB", 1e9],
    ["MB", 1e6],
    ["kB", 1e3],
  ].find(([, size]) => value >= size) ?? ["B", 1];
  return `${short(value / size)} ${unit}`;
}

function milliseconds(value) {
  return value >= 1000 ? `${short(value / 1000)} s` : value >= 1 ? `${short(value)} ms` : `${short(1000 * value)} µs`;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60
    ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function ticks(low, high, wanted = 5) {
  const rough = (high - low || 1) / wanted,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++)
    found.push(+(k * step).toPrecision(12));
  return found;
}

const tooltip = document.getElementById("tooltip");

function showTooltip(x, y, fill) {
  tooltip.replaceChildren();
  fill(tooltip);
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - width - 12 : x + 16;
  const top = y + 16 + height > innerHeight ? y - height - 12 : y + 16;
  tooltip.style.left = `${Math.max(4, left)}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
}

const hideTooltip = () => {
  tooltip.hidden = true;
};

function tooltipRow(parent, name, value, color) {
  const row = put(parent, "div", { class: "row" }),
    label = put(row, "span");
  if (color) put(label, "span", { class: "swatch", style: `background:${color}` });
  label.append(name);
  put(row, "span", {}, value);
}
