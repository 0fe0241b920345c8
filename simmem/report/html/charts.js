// Pictures that are drawn as wide as their place, and again when that changes.

// A place for a picture; `redraw` draws it now.
function picture(label, draw) {
  const place = el("div", {class: "picture", role: "img", "aria-label": label});
  let width = 0;
  place.redraw = () => {
    if (place.clientWidth > 0) {
      width = place.clientWidth;
      place.replaceChildren(draw(width));
    }
  };
  new ResizeObserver(() => { if (place.clientWidth !== width) place.redraw(); }).observe(place);
  return place;
}

// Round places on an axis from low to high, about so many.
function ticks(low, high, about) {
  const raw = (high - low) / Math.max(about, 1);
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * size).find((k) => k >= raw);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + 1e-9 * step; at += step) found.push(at);
  return found;
}
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const k of [1, 2, 5]) {
      const at = k * 10 ** power;
      if (at >= low * 0.999 && at <= high * 1.001) found.push(at);
    }
  }
  return found;
}

// A scale from values to pixels, logarithmic where values are far apart.
function scale(values, from, to, {zero = true, log = null} = {}) {
  let low = Math.min(...values), high = Math.max(...values);
  const logarithmic = log === null ? low > 0 && high > 5 * low : log;
  if (logarithmic) {
    low /= 1.15; high *= 1.15;
    const span = Math.log(high / low) || 1;
    const place = (value) => from + (to - from) * Math.log(value / low) / span;
    return {place, ticks: () => {
      const all = logTicks(low, high);
      return all.length > 7 ? all.filter((at) => String(at.toPrecision(1)).startsWith("1")) : all;
    }};
  }
  if (zero) low = 0;
  high += 0.08 * (high - low) || 1;
  if (!zero) low -= 0.08 * (high - low);
  return {place: (value) => from + (to - from) * (value - low) / (high - low), ticks: () => ticks(low, high, 5)};
}

// Times on an axis, with as many digits as tell them apart.
function timesOf(marks) {
  const words = (digits) => marks.map((at) => quantity(Math.abs(at) < 1e-15 ? 0 : at, "s", digits));
  const digits = [3, 4, 5, 6].find((n) => new Set(words(n)).size === marks.length) || 6;
  return words(digits);
}

const label = (x, y, text, attributes) => svg("text", {x, y, ...attributes}, text);

// The bars of a decode step, a lane for each stream. What was read for this step before it began stands, paler, where the
// reads for the next one begin.
function lanes(step, width, names) {
  const streams = Object.keys(step.busy_s);
  const low = 1e9 * step.from_s, high = 1e9 * step.to_s, token = 1e9 * step.token_s;
  const lane = 42, top = 4, bottom = top + lane * streams.length;
  const x = (ns) => width * (ns - low) / Math.max(high - low, 1);
  const bars = [];
  for (let at = 0; at < step.ops.length; at += 5) {
    const [stream, kind, layer, start, length] = step.ops.slice(at, at + 5);
    const row = streams.indexOf(data.streams[stream]);
    const [what, part] = data.kinds[kind];
    for (const [begin, paler] of [[start, false], [start + token, true]]) {
      const left = Math.max(begin, paler ? low : Math.max(low, 0)), right = Math.min(begin + length, high);
      if (right <= left || (paler && start >= 0)) continue;
      const wide = x(right) - x(left);
      const y = top + lane * row + 15;
      bars.push(svg("rect", {
        x: x(left).toFixed(2), y, width: Math.max(wide - (wide > 6 ? 1 : 0), 0.7).toFixed(2), height: 21,
        class: `k-${part}${paler ? " paler" : ""}`,
      }, svg("title", null, `${what}, ${layer >= 0 ? `layer ${layer}, ` : ""}${seconds(start / 1e9)} + ${seconds(length / 1e9)}`
        + (paler ? ", for the next step" : ""))));
      if (names && wide > 7.5 * what.length + 6) {
        const dark = ["memory", "transfer", "predictor", "wait", "draft"].includes(part);
        bars.push(label((x(left) + x(right)) / 2, y + 15, what, {class: `onbar${dark ? " dark" : ""}`, "text-anchor": "middle"}));
      }
    }
  }
  const marks = ticks(step.from_s, step.to_s, width < 500 ? 4 : 8), times = timesOf(marks);
  return svg("svg", {width, height: bottom + 24, viewBox: `0 0 ${width} ${bottom + 24}`},
    marks.map((at, index) => [svg("line", {x1: x(1e9 * at), x2: x(1e9 * at), y1: top, y2: bottom, class: "axis"}),
      label(Math.min(Math.max(x(1e9 * at), 1), width - 1), bottom + 16, times[index], {
        class: "soft", "text-anchor": x(1e9 * at) < 25 ? "start" : x(1e9 * at) > width - 25 ? "end" : "middle"})]),
    streams.map((stream, row) => label(0, top + lane * row + 11, `${stream}, ${share(step.busy_s[stream] / step.token_s)} busy`)),
    bars);
}
function kindsIn(steps) {
  const parts = new Set();
  for (const step of steps) for (let at = 0; at < step.ops.length; at += 5) parts.add(data.kinds[step.ops[at + 1]][1]);
  return PARTS.filter((part) => parts.has(part));
}

// Dots joined by a thin line that only guides the eye; points: {x, y, text, kind, pick}, y null where there is none.
// `beside` are points of something else at some of the same places, drawn paler and with a name: {x, y, text, name}.
function dots(points, width, {height = 150, logX = false, words, yUnit = seconds, line = null, beside = []}) {
  const left = 52, right = width - 14, top = 10, bottom = height - 26;
  points = [...points].sort((a, b) => a.x - b.x);
  const known = points.filter((point) => point.y !== null);
  const ys = scale([...[...known, ...beside].map((point) => point.y), ...(line === null ? [] : [line])], bottom, top);
  const xs = scale(points.map((point) => point.x), left + 10, right, {zero: false, log: logX});
  const ordered = known.map((point) => `${xs.place(point.x).toFixed(1)},${ys.place(point.y).toFixed(1)}`);
  let last = -Infinity;
  return svg("svg", {width, height, viewBox: `0 0 ${width} ${height}`},
    ys.ticks().map((at) => [svg("line", {x1: left, x2: right, y1: ys.place(at), y2: ys.place(at), class: "axis"}),
      label(left - 6, ys.place(at) + 4, yUnit(at), {class: "soft", "text-anchor": "end"})]),
    line === null ? null : svg("line", {x1: left, x2: right, y1: ys.place(line), y2: ys.place(line), class: "guide"}),
    svg("polyline", {points: ordered.join(" "), class: "guide"}),
    beside.map((point, index) => [
      svg("circle", {cx: xs.place(point.x), cy: ys.place(point.y), r: 5, class: "beside"}, svg("title", null, point.text)),
      index ? null : label(xs.place(point.x) - 9, ys.place(point.y) + 4, point.name, {class: "soft", "text-anchor": "end"})]),
    points.map((point) => {
      const x = xs.place(point.x), said = words(point.x);
      const free = x - last > 3.3 * (said.length + 4) + 8;
      if (free) last = x + 3.3 * said.length;
      const click = point.pick ? {click: point.pick} : null;
      return [free ? label(x, height - 8, said, {class: "soft", "text-anchor": "middle"}) : null,
        point.y === null
          ? svg("path", {d: `M${x - 4},${bottom - 9}l8,8m0,-8l-8,8`, class: "none"}, svg("title", null, point.text))
          : svg("circle", {cx: x, cy: ys.place(point.y), r: point.kind === "now" ? 7 : 5, class: `dot ${point.kind}`, ...click},
            svg("title", null, point.text))];
    }));
}
