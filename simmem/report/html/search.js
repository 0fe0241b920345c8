// The page of a search: cells to filter and sort, a plan's details where one is opened.

const broken = (cell) => cell.violations.length > 0;
const statusOf = (cell) => (cell.status === "infeasible" && !broken(cell) ? "infeasible, as expected" : cell.status);
const heldBytes = (cell) => (isNumber(cell.figures.held_bytes) ? cell.figures.held_bytes : null);
const predicted = (key) => (cell) => (cell.plan ? cell.plan.predicted[key] : null);
// label, what is sorted by, what is shown, kind
const COLUMNS = [
  ["Cell", (cell) => cell.id, null, ""],
  ["Status", (cell) => (broken(cell) ? 0 : cell.status === "pass" ? 2 : 1), null, ""],
  ["Policy", (cell) => (cell.plan ? `${cell.plan.policy.name}, ${cell.plan.weights}` : null), (v) => name(v), ""],
  ["A token", predicted("token_latency_s"), seconds, "n"],
  ["Tokens/s", predicted("tokens_per_s"), (v) => rate(v).replace(" tokens/s", ""), "n"],
  ["First token", predicted("first_token_s"), seconds, "n"],
  ["Held", heldBytes, bytes, "n"],
];
const cells = data.cells.map((cell, index) => ({
  ...cell, index,
  text: [cell.id, cell.plan ? cell.plan.policy.name : "", cell.infeasible || "", ...cell.violations.map((v) => `${v.limit} ${v.cause}`),
    ...cell.changes].join("\n").toLowerCase(),
}));
const view = {column: null, down: false, words: "", status: "", device: "", model: "", policy: ""};
const LIMITS = {max_latency: "s", min_tokens_per_s: "tokens_per_s", max_dram: "bytes", max_energy: "joule"};

// --- details of a cell -----------------------------------------------------------------------------------------------

function details(cell) {
  const p = cell.plan;
  const limits = Object.entries(cell.limits).map(([limit, value]) => `${limit} ${LIMITS[limit] ? quantity(value, LIMITS[limit]) : share(value, 3)}`);
  return [
    cell.violations.length ? table("What it breaks", [["Limit"], ["Why", "long"]], cell.violations.map((v) => [v.limit, name(v.cause)])) : null,
    cell.changes.length ? el("p", null, el("b", null, "Since the baseline: "), name(cell.changes.join("; "))) : null,
    el("p", {class: "small soft"}, `Expected: ${cell.expect}. Limits: ${limits.join(", ") || "none"}.`),
    p === null ? el("p", null, name(cell.infeasible || "no plan")) : [
      facts([
        ["A " + p.words.step, seconds(p.predicted.token_latency_s), `90 % ${p.predicted.token_latency_interval_s.map(seconds).join(" to ")}`],
        ["While decoding", rate(p.predicted.decode_tokens_per_s)], ["First token after", seconds(p.predicted.first_token_s)],
        ["Loading", seconds(p.predicted.load_s)], ["Bound", seconds(p.bound.token_latency_s), p.bound.resource],
        ["Quality", p.words.quality], ["Weakest figure", p.evidence.weakest_kind],
        ["Search gap", p.evidence.search_gap === null ? "not computed" : share(p.evidence.search_gap, 3)], ["Trace", p.trace ? name(p.trace) : "none"],
      ]),
      el("p", null, el("b", null, name(p.policy.name), `, ${p.words.weights}: `), Object.entries(p.policy.knobs).map(([key, v]) => `${key} ${knobValue(key, v)}`).join(", ")),
      el("ul", {class: "small"}, p.why.map((reason) => el("li", null, name(`${reason}.`)))),
      el("div", {class: "two"}, el("div", null, residencyTable(p.residency), memoryTable(p.memory)),
        el("div", null, breakdownTable(p.predicted.breakdown_s, p.predicted.token_latency_s, data.parts),
          p.baselines.length ? table("Other policies here", [["Policy"], ["A token", "n"], ["This plan is", "n"]],
            p.baselines.map((b) => [name(b.policy + (b.set_aside ? " (set aside)" : "")), seconds(b.token_latency_s), `× ${digitsOf(b.speedup, 3)} as fast`])) : null))]];
}

// --- the table -------------------------------------------------------------------------------------------------------

function matches(cell) {
  const status = view.status === "" || (view.status === "broken" ? broken(cell) : view.status === cell.status);
  return status && (view.device === "" || cell.device === view.device) && (view.model === "" || cell.model === view.model)
    && (view.policy === "" || (cell.plan !== null && cell.plan.policy.name === view.policy))
    && view.words.toLowerCase().split(/\s+/).every((word) => cell.text.includes(word));
}
// Cells without a value stand last, whichever way it is sorted.
function ordered(found) {
  if (view.column === null) return found;
  const value = COLUMNS[view.column][1], sign = view.down ? -1 : 1;
  return [...found].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index;
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || a.index - b.index;
  });
}
const opened = new Set();
function rowsOf(cell) {
  const isOpen = opened.has(cell.index), id = `cell-${cell.index}`;
  const button = el("button", {type: "button", class: "open", "aria-expanded": String(isOpen), "aria-controls": isOpen ? id : null,
    click: () => { if (isOpen) opened.delete(cell.index); else opened.add(cell.index); fill(cell.index); }}, name(cell.id));
  const cause = cell.violations.length && !isOpen ? el("div", {class: "small soft"}, name(cell.violations.map((v) => `${v.limit}: ${v.cause}`).join("; "))) : null;
  const chip = el("span", {class: `chip ${broken(cell) ? "worse" : cell.status === "pass" ? "better" : "soft"}`}, statusOf(cell));
  const row = el("tr", {class: "cell", role: "row"}, el("th", {scope: "row", role: "rowheader"}, button, cause),
    el("td", {role: "cell", "data-label": "Status"}, chip), COLUMNS.slice(2).map(([title, value, said, kind]) => {
      const v = value(cell);
      return el("td", {class: kind || null, role: "cell", "data-label": title}, v === null ? "–" : said(v));
    }));
  return isOpen ? [row, el("tr", {id, role: "row"}, el("td", {colspan: COLUMNS.length, class: "details", role: "cell"}, details(cell)))] : [row];
}
const body = el("tbody", {role: "rowgroup"});
const count = el("p", {class: "soft", role: "status", id: "count"});
function fill(focused) {
  const found = ordered(cells.filter(matches));
  body.replaceChildren(...found.flatMap(rowsOf));
  count.replaceChildren(`${found.length} of ${cells.length} cells shown`);
  headings.forEach((heading, index) => heading.setAttribute("aria-sort",
    view.column !== index ? "none" : view.down ? "descending" : "ascending"));
  if (focused !== undefined) {
    const at = found.findIndex((cell) => cell.index === focused);
    const row = body.querySelectorAll("tr.cell")[at];
    if (row) row.querySelector("button").focus();
  }
}
const headings = COLUMNS.map(([title, , , kind], index) => el("th", {scope: "col", role: "columnheader", class: kind || null, "aria-sort": "none"},
  el("button", {type: "button", click: () => {
    view.down = view.column === index && !view.down;
    view.column = index;
    fill();
  }}, title)));

function filter(key, title, values) {
  const choices = [...new Set(values)].sort();
  if (choices.length < 2) return null;
  const select = el("select", {id: `filter-${key}`, change: () => { view[key] = select.value; fill(); }},
    el("option", {value: ""}, "all"), choices.map((one) => el("option", {value: one}, one)));
  return el("div", null, el("label", {for: select.id}, title), select);
}
const words = el("input", {type: "search", id: "filter-words", autocomplete: "off", input: () => { view.words = words.value; fill(); }});
const filters = el("form", {class: "filters", submit: (event) => event.preventDefault(), role: "search"},
  el("div", {class: "wide"}, el("label", {for: "filter-words"}, "Words in a cell's name, its policy or what it breaks"), words),
  filter("status", "Status", [...cells.map((cell) => cell.status), ...(cells.some(broken) ? ["broken"] : [])]),
  filter("device", "Device", cells.map((cell) => cell.device)),
  filter("model", "Model", cells.map((cell) => cell.model)),
  filter("policy", "Policy", cells.filter((cell) => cell.plan).map((cell) => cell.plan.policy.name)));

show(el("header", null, el("h1", null, name(data.title)),
  el("p", {class: "big"}, el("small", {class: cells.some(broken) ? "worse" : "better"}, data.verdict)),
  data.against ? el("p", null, "Against the baseline ", name(data.against), ".") : null,
  data.notes.length ? el("ul", {class: "small"}, data.notes.map((note) => el("li", null, name(note)))) : null),
section("cells", "Cells", filters, count,
  el("div", {class: "scroll cells", tabindex: "0", role: "region", "aria-label": "Cells"},
    el("table", {role: "table"}, el("caption", null, "A cell's name opens its plan; a heading sorts."), el("thead", {role: "rowgroup"}, el("tr", {role: "row"}, headings)), body))),
el("footer", null, madeBy(`Searched by simmem ${data.made_by}; written`)));
fill();
