// The page of a plan.

const plan = data.plan, what = data.what_if, p = plan.predicted, words = data.words;
const byRate = plan.objective === "throughput";
const step = words.step;

// --- the answer ------------------------------------------------------------------------------------------------------

const held = (used) => Object.entries(used).filter(([tier]) => tier !== data.device.storage).map(([tier, n]) => `${bytes(n)} ${tier}`).join(", ");
const usedBytes = (memory) => Object.fromEntries(Object.entries(memory).map(([tier, use]) => [tier, use.used_bytes]));
const heldSum = (memory) => Object.entries(memory).reduce((sum, [tier, use]) => sum + (tier === data.device.storage ? 0 : use.used_bytes), 0);

// The interval as a bar between its ends, the prediction and the bound as marks on one axis of time.
const gauge = picture(`${seconds(p.token_latency_s)} a ${step}, 90 % interval ${p.token_latency_interval_s.map(seconds).join(" to ")}, ` +
  `bound ${seconds(plan.bound.token_latency_s)}`, (width) => {
  const [low, high] = p.token_latency_interval_s;
  const end = 1.05 * Math.max(high, p.token_latency_s);
  const x = (value) => 4 + (width - 8) * value / end;
  const marks = ticks(0, end, width < 500 ? 4 : 8);
  const bound = x(plan.bound.token_latency_s);
  return svg("svg", {width, height: 66, viewBox: `0 0 ${width} 66`},
    marks.map((at) => [svg("line", {x1: x(at), x2: x(at), y1: 18, y2: 46, class: "axis"}),
      label(x(at), 61, seconds(at), {class: "soft", "text-anchor": at === 0 ? "start" : x(at) > width - 20 ? "end" : "middle"})]),
    svg("rect", {x: x(low), y: 26, width: Math.max(x(high) - x(low), 1), height: 14, rx: 3, class: "k-transfer"}),
    svg("line", {x1: x(p.token_latency_s), x2: x(p.token_latency_s), y1: 20, y2: 46, class: "ink"}),
    svg("line", {x1: bound, x2: bound, y1: 16, y2: 46, class: "none"}),
    label(bound, 11, `bound ${seconds(plan.bound.token_latency_s)}`, {class: "soft",
      "text-anchor": bound < 70 ? "start" : bound > width - 70 ? "end" : "middle"}));
});

const caveat = el("p", {class: plan.evidence.weakest_kind === "estimated" ? "caveat" : "caveat calm", role: "note"}, words.caveat);
const drift = what.base_s / p.token_latency_s - 1;
const stale = Math.abs(drift) < 1e-6 ? null : el("p", {class: "caveat", role: "note"},
  `The plan says ${seconds(p.token_latency_s)}; predicted for this page it is ${seconds(what.base_s)} (${change(drift)}): the device, ` +
  "the model, the trace or simmem itself is not what it was. What-ifs and the timeline are of now, everything else is of then.");

const answer = section("answer", "The answer",
  el("p", {class: "soft"}, name(plan.policy.name), ", ", words.weights),
  byRate
    ? el("p", {class: "big"}, rate(p.tokens_per_s), el("small", null, ` prompt included; ${seconds(p.token_latency_s)} a ${step}`))
    : el("p", {class: "big"}, seconds(p.token_latency_s), el("small", null, ` a ${step}`)),
  el("p", null, `90 % interval ${p.token_latency_interval_s.map(seconds).join(" to ")}`),
  gauge,
  facts([
    ["While decoding", rate(p.decode_tokens_per_s)],
    ["Prompt included", rate(p.tokens_per_s)],
    ["First token after", seconds(p.first_token_s)],
    ["Loading", seconds(p.load_s)],
    ["Slowest tokens", seconds(p.token_latency_percentiles_s.p99), "99 of 100 are faster"],
    ["Held in memory", held(usedBytes(plan.memory))],
    ["Energy a token", p.energy_j_per_token === null ? "no sourced figure" : quantity(p.energy_j_per_token, "joule")],
    ["Times the bound", `× ${digitsOf(p.token_latency_s / plan.bound.token_latency_s, 3)}`, plan.bound.resource],
  ]),
  el("p", null, "Quality: ", words.quality),
  el("h3", null, "Why"),
  el("ul", null, plan.why.map((reason) => el("li", null, name(`${reason}.`)))));

// --- what if ---------------------------------------------------------------------------------------------------------

const tiers = [...new Set(what.budgets.map((budget) => budget.tier).filter(Boolean))];
const PLAN = {budget: 0, knob: 0, factor: Math.max(what.factors.indexOf(1), 0)};
const now = {tier: tiers[0], ...PLAN};
const ofTier = (tier) => what.budgets.map((budget, index) => ({budget, index}))
  .filter(({budget}) => budget.tier === tier || budget.tier === "")
  .sort((a, b) => a.budget.budget_bytes[tier] - b.budget.budget_bytes[tier]);
const pointAt = ({budget, knob, factor}) => (what.budgets[budget].points[knob] || [])[factor] || null;
const basePoint = pointAt(PLAN);
const valueOf = (value) => (what.knob_dimension ? quantity(value, what.knob_dimension) : setting(value));

const beyond = (budget, tier) => budget.budget_bytes[tier] > data.device.capacity_bytes[tier];
const budgetWords = (budget, tier) => bytes(budget.budget_bytes[tier]) +
  (budget.tier === "" ? ", this plan's" : beyond(budget, tier) ? ", more than the device has" : "");
const factorWords = (factor) => (factor === 1 ? "as it is" : `× ${setting(factor)}`);

// A slider with its name, what it is at, and the curve along it; `values` are what its places stand for.
function slider(id, title, n, read, write, say, curve) {
  const out = el("output", {id: `${id}-value`, for: id});
  const input = el("input", {type: "range", id, min: 0, max: n - 1, step: 1, input: () => { write(Number(input.value)); update(); }});
  const chart = picture(`${title}: time of a ${step} at each point`, curve);
  const part = el("div", {class: "control"}, el("label", {for: id}, title, ": ", out), input, chart);
  part.redraw = () => {
    input.value = read();
    out.replaceChildren(say());
    input.setAttribute("aria-valuetext", say());
    chart.redraw();
  };
  return part;
}
const along = (places, valueAt) => places.map((place) => {
  const point = pointAt({...now, ...place});
  const isPlan = ["budget", "knob", "factor"].every((key) => ({...now, ...place})[key] === PLAN[key]);
  const isNow = ["budget", "knob", "factor"].every((key) => ({...now, ...place})[key] === now[key]);
  return {
    x: valueAt(place), y: point ? point.token_latency_s : null, kind: isNow ? "now" : isPlan ? "plan" : "",
    text: point ? seconds(point.token_latency_s) : whyNone({...now, ...place}),
    pick: point ? () => { Object.assign(now, place); update(); } : null,
  };
});
function whyNone({budget, knob}) {
  const one = what.budgets[budget];
  if (one.policy === null) return one.notes.join("; ");
  if (knob && one.policy !== plan.policy.name) return `${one.policy} has no ${what.knob}`;
  return "does not fit";
}

const memoryPlaces = () => ofTier(now.tier).map(({index}) => ({budget: index}));
// Where all weights fit, no plan that leaves neurons out is recommended, however fast: more memory may then seem to cost.
// Such plans stand beside the curve; they were run with every link as it is.
const besides = () => (now.factor !== PLAN.factor || now.knob ? [] : ofTier(now.tier).map(({budget}) => budget).filter((one) => one.aside));
const asideWords = ({aside, policy, points}) => `all weights fit, so nothing is left out any more: ${policy} takes ` +
  `${seconds(points[0][PLAN.factor].token_latency_s)}. ${aside.policy} would take ${seconds(aside.token_latency_s)} and leave neurons out; ` +
  `--policy ${aside.policy} asks for it`;
const besideNote = el("p", {class: "soft small", id: "memory-beside"});
const controls = [];
if (tiers.length) {
  const tier = tiers.length < 2 ? null : el("div", {class: "control"}, el("label", {for: "tier"}, "Which memory"),
    el("select", {id: "tier", change: (event) => { now.tier = event.target.value; now.budget = 0; rebuild(); }},
      tiers.map((one) => el("option", {value: one}, one))));
  const memory = slider("memory", "Memory that may be held", ofTier(now.tier).length,
    () => ofTier(now.tier).findIndex(({index}) => index === now.budget),
    (at) => { now.budget = ofTier(now.tier)[at].index; },
    () => `${budgetWords(what.budgets[now.budget], now.tier)}${tiers.length < 2 ? "" : ` (${now.tier})`}`,
    (width) => dots(along(memoryPlaces(), (place) => what.budgets[place.budget].budget_bytes[now.tier]), width, {words: bytes,
      beside: besides().map((one) => ({x: one.budget_bytes[now.tier], y: one.aside.token_latency_s, name: one.aside.policy,
        text: `${one.aside.policy}, not recommended here: ${seconds(one.aside.token_latency_s)}`}))}));
  memory.append(besideNote);
  controls.push(tier, memory);
}
if (what.link) {
  controls.push(slider("link", `Bandwidth of ${what.link}`, what.factors.length, () => now.factor, (at) => { now.factor = at; },
    () => factorWords(what.factors[now.factor]),
    (width) => dots(along(what.factors.map((_, index) => ({factor: index})), (place) => what.factors[place.factor]), width,
      {words: (value) => `× ${setting(value)}`, logX: true})));
}
if (what.knob) {
  const choice = el("select", {id: "knob", change: () => { now.knob = Number(choice.value); update(); }},
    what.values.map((value, index) => el("option", {value: index}, value === null ? "as planned" : valueOf(value))));
  const chart = picture(`${what.knob}: time of a ${step} at each value`, (width) => {
    const own = what.budgets[now.budget].knobs[what.knob];
    const valueAt = (place) => (place.knob ? what.values[place.knob] : own);
    const places = what.values.map((_, index) => ({knob: index})).filter((place) => place.knob || (isNumber(own) && !what.values.includes(own)));
    const points = along(places, valueAt);
    if (points.every((point) => point.y === null)) return el("p", {class: "soft small"}, name(`${points[0].text}.`));
    const planned = pointAt({...now, knob: 0});
    return dots(points, width, {words: valueOf, line: planned ? planned.token_latency_s : null});
  });
  const part = el("div", {class: "control"}, el("label", {for: "knob"}, name(what.knob), el("span", {class: "soft"}, ` — ${what.knob_help}`)),
    choice, chart);
  part.redraw = () => {
    const own = what.budgets[now.budget].knobs[what.knob];
    choice.options[0].textContent = own === undefined ? "as planned" : `as planned (${valueOf(own)})`;
    choice.value = String(now.knob);
    chart.redraw();
  };
  controls.push(part);
}

const readout = el("div", {id: "readout"});
const live = el("div", {"aria-live": "polite"});
const closeUp = picture("A part of a decode step at this point", (width) => lanes(pointAt(now).step, width, true));
const reset = el("button", {type: "button", id: "reset", click: () => { Object.assign(now, PLAN); update(); }}, "Back to this plan");

// What a point is: never a guess, and which parts of the plan it holds.
function provenance(budget) {
  const said = [];
  const knobbed = now.knob > 0, scaled = now.factor !== PLAN.factor;
  if (budget.tier) said.push(`Planned anew within ${bytes(budget.budget_bytes[budget.tier])} of ${budget.tier}, ${what.replans}`);
  else said.push("The plan itself");
  if (knobbed) said.push(`with ${what.knob} set to ${valueOf(what.values[now.knob])} and everything else held`);
  if (scaled) {
    said.push(`simulated with the whole throughput curve of ${what.link} × ${setting(what.factors[now.factor])}, ${budget.tier ? "that" : "the"} plan held fixed ` +
      "(planned anew it could only do as well or better)");
  }
  return `${said.join(", ")}.`;
}
function update() {
  const budget = what.budgets[now.budget], point = pointAt(now);
  for (const control of controls) if (control && control.redraw) control.redraw();
  const [first] = besides();
  besideNote.replaceChildren(...(first ? [name(`From ${bytes(first.budget_bytes[now.tier])} on ${asideWords(first)} (dashed circles).`)] : []));
  const changed = ["budget", "knob", "factor"].some((key) => now[key] !== PLAN[key]);
  reset.disabled = !changed;
  if (point === null) {
    live.replaceChildren(el("p", {class: "big", id: "if-latency"}, "—"), el("p", null, name(whyNone(now))));
    readout.replaceChildren(el("p", {class: "soft"}, provenance(budget)));
    closeUp.hidden = true;
    return;
  }
  const than = point.token_latency_s / basePoint.token_latency_s - 1;
  live.replaceChildren(
    el("p", {class: "big", id: "if-latency"}, seconds(point.token_latency_s), el("small", null, ` a ${step} `),
      changed ? el("small", {id: "if-change", class: than < -5e-4 ? "better" : than > 5e-4 ? "worse" : "soft"}, change(than)) : null),
    el("p", {id: "if-what"}, el("b", null, name(budget.policy)), `, ${rate(point.tokens_per_s)} prompt included`));
  const most = Math.max(point.token_latency_s, basePoint.token_latency_s);
  const shares = (one) => partsOf(one.breakdown_s).map((part) => [one.breakdown_s[part] / most, `k-${part}`]);
  const parts = PARTS.filter((part) => point.breakdown_s[part] > 0 || basePoint.breakdown_s[part] > 0);
  readout.replaceChildren(
    facts([
      ["First token after", seconds(point.first_token_s)],
      ["Held in memory", now.knob ? "as its value asks" : held(budget.used_bytes)],
      ...Object.entries(budget.bytes_per_token[now.knob] || {}).filter(([, n]) => n > 0).map(([link, n]) => [`Moved over ${link}`, bytes(n), `a ${step}`]),
      ...Object.entries(budget.knobs).filter(([key]) => key === what.knob && now.knob === 0).map(([key, value]) => [key, knobValue(key, value)]),
    ]),
    el("p", {class: "small"}, "This point"), bar(shares(point), `This point: ${seconds(point.token_latency_s)}`),
    el("p", {class: "small"}, "The plan"), bar(shares(basePoint), `The plan: ${seconds(basePoint.token_latency_s)}`),
    legend(parts, words.parts),
    el("p", {class: "soft", id: "if-how"}, provenance(budget)),
    ...[...budget.notes, ...(besides().includes(budget) ? [asideWords(budget)] : [])].map((note) =>
      el("p", {class: "caveat"}, name(`${note[0].toUpperCase()}${note.slice(1)}.`))));
  closeUp.hidden = false;
  closeUp.redraw();
}
function rebuild() {
  for (const control of controls) {
    const input = control && control.querySelector("#memory");
    if (input) input.max = ofTier(now.tier).length - 1;
  }
  update();
}
const whatIf = section("what-if", "What if",
  el("p", {class: "soft"}, "Every point was planned or simulated when this page was written; nothing is extrapolated. Points carry no interval ",
    "of their own: the same figures make all of them uncertain together, as the answer is. They are means over at most ",
    `${what.tokens} tokens of a trace, the plan's own figure over up to 64`,
    seconds(basePoint.token_latency_s) === seconds(what.base_s) ? "." : `, so it reads ${seconds(basePoint.token_latency_s)} here and ${seconds(what.base_s)} above.`),
  el("div", {class: "whatif"},
    el("div", {class: "now"}, live, reset), el("div", {class: "controls"}, controls),
    el("div", {class: "readout"}, readout, el("h3", null, "Layers in the middle of a step"), closeUp)),
  what.link ? null : el("p", {class: "soft"}, "No plan here moves enough over any link to feel its bandwidth."));

// --- when ------------------------------------------------------------------------------------------------------------

const layers = [];
for (let at = 2; at < data.step.ops.length; at += 5) layers.push(data.step.ops[at]);
const firstLayer = Math.min(...layers), lastLayer = Math.max(...layers);
const view = {layer: null};
// From the first op of some layers to the last, of the plan's own step.
function around(layer) {
  let low = Infinity, high = 0;
  const end = 1e9 * data.step.token_s;
  for (let at = 0; at < data.step.ops.length; at += 5) {
    const [, , of, start, length] = data.step.ops.slice(at, at + 5);
    if (of >= layer && of < layer + 2 && start >= 0) {
      low = Math.min(low, start);
      high = Math.max(high, Math.min(start + length, end));
    }
  }
  return high > low ? {...data.step, from_s: low / 1e9, to_s: high / 1e9} : data.step;
}
const zoomOut = el("output", {id: "zoom-value", for: "zoom"});
const whole = picture(`Timeline of a ${step}`, (width) => lanes(data.step, width, false));
const zoomed = picture("Close-up of two layers", (width) => lanes(around(view.layer), width, true));
const zoom = el("input", {type: "range", id: "zoom", min: firstLayer, max: Math.max(lastLayer - 1, firstLayer), step: 1,
  input: () => { lookAt(Number(zoom.value)); }});
function lookAt(layer) {
  view.layer = layer;
  zoom.value = layer;
  const said = lastLayer > firstLayer ? `${layer} and ${Math.min(layer + 1, lastLayer)}` : String(layer);
  zoomOut.replaceChildren(said);
  zoom.setAttribute("aria-valuetext", `layers ${said}`);
  zoomed.redraw();
}
let hasEarly = false;
for (let at = 3; at < data.step.ops.length; at += 5) if (data.step.ops[at] < 0) hasEarly = true;
const timeline = section("timeline", `When: a ${step} in steady state`,
  el("p", {class: "soft"}, data.uses_trace ? "The token of the trace that takes the median time. " : "",
    "Simulated for this page, as ", el("code", null, "simmem simulate --timeline"), " does it."),
  legend(kindsIn([data.step]), words.parts, hasEarly ? el("li", null, swatch("io", true), "paler: read for the next step") : null),
  el("div", {id: "whole"}, whole),
  el("div", {class: "control"}, el("label", {for: "zoom"}, "Close-up of layers ", zoomOut), zoom),
  el("div", {id: "zoomed"}, zoomed),
  table("How busy each stream is", [["Stream"], ["Busy", "n"], ["Share", "n"], ["", "bar"]],
    Object.entries(data.step.busy_s).map(([stream, busy]) => [stream, seconds(busy), share(busy / data.step.token_s),
      bar([[busy / data.step.token_s, "k-plain"]])])));

// --- where, what moves, instead --------------------------------------------------------------------------------------

const moving = Object.entries(p.bytes_per_token).filter(([, amount]) => amount > 0);
const moves = moving.length === 0 ? el("p", null, "Nothing moves: all that a token needs is resident.")
  : table(`What moves, per ${step}`, [["Link"], ["Bytes", "n"], ["Requests", "n"], ["At a time", "n"]],
    moving.map(([link, amount]) => [name(link), bytes(amount), setting(Number((p.requests_per_token[link] || 0).toPrecision(4))),
      p.requests_per_token[link] ? bytes(amount / p.requests_per_token[link]) : "–"]));
const caches = Object.entries(p.cache);
const where = section("where", "What lives where, and what moves",
  el("div", {class: "two"},
    el("div", null, residencyTable(plan.residency)), el("div", null, memoryTable(plan.memory), el("p"), moves,
      caches.length ? table("Caches", [["Cache"], ["Hits", "n"], ["Read a token", "n"]],
        caches.map(([of, cache]) => [name(of), share(cache.hit_ratio, 3), bytes(cache.bytes_per_token)])) : null)),
  breakdownTable(p.breakdown_s, p.token_latency_s, words.parts));

const value = (latency, tokens) => (byRate && tokens ? 1 / tokens : latency);
const rivals = [
  {policy: `${plan.policy.name} (this plan)`, weights: plan.workload.weights, latency: p.token_latency_s, tokens: p.tokens_per_s, kind: "this"},
  ...plan.baselines.map((b) => ({policy: b.policy + (b.set_aside ? " (set aside: drops work it need not)" : ""), weights: plan.workload.weights,
    latency: b.token_latency_s, tokens: b.tokens_per_s, kind: b.set_aside ? "faded" : ""})),
  ...plan.alternatives.map((a) => ({policy: a.policy, weights: a.weights, latency: a.predicted.token_latency_s, tokens: a.predicted.tokens_per_s, kind: ""})),
].sort((a, b) => value(a.latency, a.tokens) - value(b.latency, b.tokens));
const slowest = Math.max(...rivals.map((one) => one.latency));
const compared = section("compared", "Compared with",
  table("Other policies at the same precision and budget, and the best of other precisions",
    [["Policy"], ["Weights"], [`Time of a ${step}`, "n"], ...(byRate ? [["Tokens/s", "n"]] : []), ["This plan is", "n"], ["", "bar"]],
    [...rivals.map((one) => marked([name(one.policy), one.weights, seconds(one.latency), ...(byRate ? [one.tokens ? rate(one.tokens) : "–"] : []),
      one.kind === "this" ? "" : byRate && one.tokens ? `× ${digitsOf(p.tokens_per_s / one.tokens, 3)}` : `× ${digitsOf(one.latency / p.token_latency_s, 3)} as fast`,
      bar([[one.latency / slowest, one.kind === "this" ? "k-plain" : "k-wait"]])], one.kind)),
    marked([`bound: no plan beats it (${plan.bound.resource})`, plan.workload.weights, seconds(plan.bound.token_latency_s), ...(byRate ? [""] : []), "",
      bar([[plan.bound.token_latency_s / slowest, "k-wait"]])], "faded")]),
  plan.pareto.length < 2 ? null : [
    el("h3", null, "Less memory, more time"),
    picture(`Front of memory and time, ${plan.pareto.length} plans; the table below has the same figures`, (width) => dots(
      plan.pareto.map((a) => ({x: heldSum(a.memory), y: a.predicted.token_latency_s,
        kind: a.policy === plan.policy.name && a.weights === plan.workload.weights && a.predicted.token_latency_s === p.token_latency_s ? "plan" : "",
        text: `${a.policy}, ${a.weights}: ${seconds(a.predicted.token_latency_s)}, ${bytes(heldSum(a.memory))}`})), width, {words: bytes, height: 190})),
    table("Plans that nothing beats in both memory and time",
      [["Policy"], ["Weights"], [`Time of a ${step}`, "n"], ["90 % interval", "n"], ["Held", "n"], ["Knobs", "long"]],
      plan.pareto.map((a) => [name(a.policy), a.weights, seconds(a.predicted.token_latency_s), a.predicted.token_latency_interval_s.map(seconds).join(" to "),
        bytes(heldSum(a.memory)), el("span", {class: "small soft"}, Object.entries(a.knobs).map(([key, v]) => `${key} ${knobValue(key, v)}`).join(", "))]))]);

// --- what it depends on ----------------------------------------------------------------------------------------------

const felt = (s) => (s.tokens_per_s_change === null ? s.token_latency_change : s.tokens_per_s_change);
const most = Math.max(...plan.sensitivity.map((s) => Math.abs(felt(s))), 0);
const depends = plan.sensitivity.length === 0 ? null : section("depends", "What it depends on",
  table(`Change of ${byRate ? "tokens a second" : `the time of a ${step}`} with one figure changed; the plan held fixed, unless it says replanned`,
    [["Figure"], ["Changed by", "n"], ["Result", "n"], ["", "bar"], [""]],
    plan.sensitivity.map((s) => [el("code", null, s.figure), change(s.change, 0), change(felt(s)),
      changeBar(felt(s), most, (felt(s) < 0) !== byRate ? "k-good" : "k-bad"), s.replanned ? "replanned" : ""])));

// --- what it rests on ------------------------------------------------------------------------------------------------

const e = plan.evidence;
const figureRow = (f) => [el("code", null, f.key), f.dimension === "ratio" || f.dimension === "count" ? setting(f.value) : quantity(f.value, f.dimension, 4),
  f.range.map((v) => (f.dimension === "ratio" || f.dimension === "count" ? setting(Number(v.toPrecision(3))) : quantity(v, f.dimension))).join(" to "), f.kind, name(f.source)];
const FIGURES = [["Figure"], ["Value", "n"], ["90 % range", "n"], ["Kind"], ["Source", "long"]];
const used = data.device.figures.filter((f) => f.used), others = data.device.figures.filter((f) => !f.used);
const evidence = section("evidence", "What it rests on",
  facts([
    ["Weakest figure", e.weakest_kind],
    ["Search gap", e.search_gap === null ? "not computed for this objective" : share(e.search_gap, 3), e.search_gap === 0 ? "proved best of all tried" : ""],
    e.placement_gap === null ? null : ["Placement gap", share(e.placement_gap, 3), "another placement is at most so much faster"],
    ["Engine", e.engine],
    ["Cost model", e.cost_model, e.extrapolating ? "beyond what it was fitted on" : ""],
    e.measured ? ["Measured here", `${e.measured.figures} of ${e.measured.of} figures`, `spread ±${e.measured.spread.map((s) => share(s)).join(" to ±")}`] : null,
    ["Trace", data.trace ? [data.trace.kind === "synthetic" ? "SYNTHETIC " : "captured ", name(data.trace.name)] : "none"],
    ["Model", name(data.model.title)],
    ["Workload", `${plan.workload.prompt_tokens} prompt tokens, ${plan.workload.new_tokens} new, batch ${plan.workload.batch}`],
    ["Objective", plan.objective],
    plan.engine ? ["Software stack", plan.engine] : null,
  ]),
  table("Knobs of this plan", [["Knob"], ["Value", "long"]], Object.entries(plan.policy.knobs).map(([key, v]) => [name(key), knobValue(key, v)])),
  data.trace ? el("p", {class: "small"}, el("b", null, "Trace: "), name(`${data.trace.criterion} ${data.trace.text}`)) : null,
  el("p", {class: "small"}, el("b", null, "Shapes of the model: "), name(data.model.source)),
  data.device.notes.map((note) => el("p", {class: "small"}, el("b", null, "Device: "), name(note))),
  el("details", {open: used.length < 9}, el("summary", null, `Figures of ${data.device.name} that this plan rests on, with their sources (${used.length})`),
    table("Figures of the units, memories and links that this plan uses", FIGURES, used.map(figureRow))),
  others.length === 0 ? null : el("details", null, el("summary", null, `The other figures of the device (${others.length})`),
    table("Figures that this plan does not touch", FIGURES, others.map(figureRow))));

// --- the page --------------------------------------------------------------------------------------------------------

const parts = [answer, whatIf, timeline, where, compared, depends, evidence].filter(Boolean);
show(el("header", null, el("h1", null, name(plan.model), " on ", name(data.device.title)),
  el("p", {class: "soft"}, `${plan.workload.prompt_tokens} prompt tokens, ${plan.workload.new_tokens} new, batch ${plan.workload.batch}`,
    plan.workload.draft_length ? `, ${plan.workload.draft_length} drafted by ${plan.workload.draft} for each step` : ""),
  caveat, stale,
  el("nav", {"aria-label": "Parts of this page"}, el("ul", null, parts.map((part) =>
    el("li", null, el("a", {href: `#${part.id}`}, part.querySelector("h2").textContent.split(":")[0])))))),
  ...parts, el("footer", null, madeBy("Written")));
lookAt(Math.floor((firstLayer + lastLayer) / 2));
rebuild();
