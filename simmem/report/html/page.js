// What all pages share: elements made of text alone (nothing that a document says is ever read as HTML), and numbers
// as simmem prints them.

const data = JSON.parse(document.getElementById("data").textContent);

const SVG = "http://www.w3.org/2000/svg";

function build(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name, value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== "") made.append(child instanceof Node ? child : String(child));
  }
  return made;
}

// el("p", {class: "soft"}, "text", el("b", null, "more")); a function as attribute listens to the event of that name.
const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);
// A name from a document, which may be written in another direction.
const name = (text) => el("bdi", null, text);

// --- numbers ---------------------------------------------------------------------------------------------------------

const LARGE = [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3], ["", 1]];
const SMALL = [["", 1], ["m", 1e-3], ["µ", 1e-6], ["n", 1e-9], ["p", 1e-12]];
const UNITS = {
  bytes: "B", bytes_per_s: "B/s", flop_per_s: "FLOP/s", s: "s", joule_per_byte: "J/B", joule_per_flop: "J/FLOP", watt: "W",
  joule: "J", tokens_per_s: "token/s", count: "",
};

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const digitsOf = (value, digits) => String(Number(value.toPrecision(digits)));

// A value in SI units as simmem prints it: so many significant digits, a decimal prefix; ratios as per cent.
function quantity(value, dimension, digits = 3) {
  if (!isNumber(value)) return "unknown";
  if (dimension === "ratio" || dimension === "share") return `${(100 * value).toFixed(Math.max(digits - 2, 0))} %`;
  const unit = UNITS[dimension] || "";
  if (value === 0) return `0 ${unit}`.trim();
  const ladder = dimension === "s" || dimension.startsWith("joule") ? SMALL : LARGE;
  // Rounded first: 999.99 MB is 1 GB.
  const rounded = Math.abs(Number(value.toPrecision(digits)));
  const [prefix, scale] = ladder.find(([, size]) => rounded >= size) || ladder[ladder.length - 1];
  const number = value / scale;
  const text = Math.abs(number) < 10 ** digits ? digitsOf(number, digits) : number.toFixed(0);
  return `${text} ${prefix}${unit}`.trim();
}
const seconds = (value) => quantity(value, "s");
const bytes = (value) => quantity(value, "bytes");
const share = (value, digits = 2) => quantity(value, "ratio", digits);
const rate = (value) => (isNumber(value) ? `${value < 999.5 ? digitsOf(value, 3) : digitsOf(value, 4)} tokens/s` : "unknown");
function change(value, digits = 1) {
  const text = (100 * Math.abs(value)).toFixed(digits);
  return `${Number(text) === 0 ? "±" : value < 0 ? "−" : "+"}${text} %`;
}
function setting(value) {
  if (Array.isArray(value)) return value.map(setting).join(", ");
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value);
}
// A knob's value as a person reads it: bytes with their unit.
const knobValue = (key, value) => (key.endsWith("_bytes") && isNumber(value) ? bytes(value) : setting(value));

// --- parts that pages share ------------------------------------------------------------------------------------------

// columns: [label, kind]; kind "n" is a number, "bar" a picture, "long" a text that may wrap. The first cell of a row is
// its heading. rows: arrays of cells, with `row.kind` as class.
function table(caption, columns, rows) {
  const kinds = columns.map((column) => column[1] || "");
  return el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": caption},
    el("table", null, el("caption", null, caption),
      el("thead", null, el("tr", null, columns.map(([label, kind]) => el("th", {scope: "col", class: kind || null}, label)))),
      el("tbody", null, rows.map((row) => el("tr", {class: row.kind || null}, row.map((cell, index) =>
        el(index ? "td" : "th", {class: kinds[index] || null, scope: index ? null : "row"}, cell)))))));
}
function marked(row, kind) {
  row.kind = kind;
  return row;
}
function facts(pairs) {
  return el("dl", {class: "facts"}, pairs.filter(Boolean).map(([label, value, beside]) =>
    el("div", null, el("dt", null, label), el("dd", null, value, beside ? el("small", null, ` ${beside}`) : null))));
}
// A bar of shares from the left, [share of the whole, class]; the track is what is left.
function bar(parts, label) {
  let at = 0;
  return svg("svg", {class: "bar", role: label ? "img" : null, "aria-label": label, "aria-hidden": label ? null : "true"},
    svg("rect", {width: "100%", height: "100%", class: "k-track", rx: 2}),
    parts.map(([part, kind]) => {
      const width = Math.max(Math.min(part, 1 - at), 0);
      const rect = svg("rect", {x: `${100 * at}%`, width: `${100 * width}%`, height: "100%", class: kind});
      at += width;
      return rect;
    }));
}
// From the middle: to the left what falls, to the right what grows.
function changeBar(value, most, kind) {
  const half = most > 0 ? 50 * Math.min(Math.abs(value) / most, 1) : 0;
  return svg("svg", {class: "bar", "aria-hidden": "true"},
    svg("rect", {x: `${value < 0 ? 50 - half : 50}%`, width: `${half}%`, height: "100%", class: kind}),
    svg("line", {x1: "50%", x2: "50%", y1: 0, y2: "100%", class: "axis"}));
}
const PARTS = ["io", "transfer", "memory", "compute", "predictor", "draft", "sync", "wait"];
const swatch = (kind, paler) => svg("svg", {class: "swatch", width: 11, height: 11, "aria-hidden": "true"},
  svg("rect", {width: 11, height: 11, rx: 2, class: `k-${kind}${paler ? " paler" : ""}`}));
const partsOf = (breakdown) => PARTS.filter((part) => breakdown[part] > 0);
function legend(parts, words, more) {
  return el("ul", {class: "legend"}, parts.map((part) => el("li", null, swatch(part), words[part])), more || null);
}

function residencyTable(residency) {
  return table("What lives where", [["Tensors"], ["Tier"], ["Bytes", "n"]],
    residency.map((one) => [name(one.tensors), name(one.tier), bytes(one.bytes)]));
}
function memoryTable(memory) {
  return table("Memory against what the process may hold",
    [["Tier"], ["Used", "n"], ["Budget", "n"], ["Share", "n"], ["", "bar"]],
    Object.entries(memory).map(([tier, use]) => {
      const part = use.used_bytes / use.budget_bytes;
      return [name(tier), bytes(use.used_bytes), bytes(use.budget_bytes), share(part), bar([[part, "k-plain"]])];
    }));
}
function breakdownTable(breakdown, total, words) {
  const parts = partsOf(breakdown).sort((a, b) => breakdown[b] - breakdown[a]);
  return table("Where the time of a token goes, along its critical path", [["Part"], ["Time", "n"], ["Share", "n"], ["", "bar"]],
    parts.map((part) => [[swatch(part), words[part]], seconds(breakdown[part]), share(breakdown[part] / total),
      bar([[breakdown[part] / total, `k-${part}`]])]));
}
function show(...parts) {
  const main = document.getElementById("main");
  main.replaceChildren(...parts.filter(Boolean));
  document.title = data.title;
}
const section = (id, title, ...body) =>
  el("section", {id, "aria-labelledby": `${id}-title`}, el("h2", {id: `${id}-title`}, title), body);
const madeBy = (what) => el("p", {class: "soft small"},
  `${what} by simmem ${data.simmem} from `, name(data.file), ". Nothing here was fetched, and nothing is sent.");
