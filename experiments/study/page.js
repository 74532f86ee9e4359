"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const AXES = [
    ["rounds", "round", "", 0],
    ["seconds", "seconds in rounds", "s", 1],
    ["multiply-adds", "multiply-adds", "", 2],
    ["bytes", "bytes sent", "B", 3],
    ["image-gradients", "image-gradients", "", 4],
  ];
  const MEASURES = [["server", "server accuracy"], ["local", "local accuracy"]];
  const MEAN = 5, STD = 6; // places in a point, after the axes
  const DASHES = ["", "7 4", "2 3", "9 3 2 3"]; // eight colours each
  const state = { x: 0, y: 0, hidden: new Set() };
  const tip = document.getElementById("tip");
  const redraws = [];

  /* Elements. What a study calls its methods is only ever text here. */
  function make(name, attributes = {}, ...inside) {
    const drawn = ["svg", "g", "line", "path", "circle", "text"].includes(name);
    const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...inside);
    return node;
  }
  const colour = (line) => `color: var(--c${line % 8})`;
  const dash = (line) => DASHES[Math.floor(line / 8) % DASHES.length];
  const percent = (value, digits = 1) => (100 * value).toFixed(digits);
  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  const seeds = (list) => `${list.length === 1 ? "seed" : "seeds"} ${list.join(", ")}`;

  function quantity(value, unit) {
    if (unit === "s") return value >= 7200 ? `${trim((value / 3600).toFixed(2))} h` : `${trim(value.toFixed(value < 100 ? 1 : 0))} s`;
    for (const [factor, prefix] of [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= factor && (unit || state.x > 1 || factor > 1e3)) return `${trim((value / factor).toPrecision(3))} ${prefix}${unit}`;
    return trim(value.toFixed(value % 1 ? 2 : 0)) + (unit ? ` ${unit}` : "");
  }

  function ticks(low, high, about) {
    const rough = (high - low) / about || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const found = [];
    for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) found.push(place * step);
    return found;
  }

  /* The tip that a chart, or a number in a table, shows. */
  function show(text, left, top) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), wide = document.documentElement.clientWidth;
    tip.style.left = `${Math.max(8, Math.min(left + 12, wide - box.width - 8))}px`;
    tip.style.top = `${top - box.height - 10 < 8 ? top + 16 : top - box.height - 10}px`;
  }
  const hide = () => { tip.hidden = true; };
  for (const node of document.querySelectorAll("[title]")) {
    const text = node.title, there = () => { const box = node.getBoundingClientRect(); show(text, box.left - 12, box.top); };
    node.setAttribute("aria-label", `${node.textContent}: ${text}`);
    node.setAttribute("role", "note");
    node.removeAttribute("title"); // else the browser shows it too
    for (const name of ["pointerenter", "focus", "click"]) node.addEventListener(name, there);
    for (const name of ["pointerleave", "blur"]) node.addEventListener(name, hide);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("scroll", hide, { passive: true });

  /* Axes: y in percent, x as it comes -> where a value is on the picture. */
  function frame(svg, { wide, high, left, top, x, y, name, unit, above, ends = true }) {
    const right = wide - 14, bottom = high - (ends ? 40 : 12);
    const at = {
      x: (value) => left + ((value - x[0]) / (x[1] - x[0] || 1)) * (right - left),
      y: (value) => bottom - ((value - y[0]) / (y[1] - y[0] || 1)) * (bottom - top),
      bottom, right,
    };
    for (const value of ticks(y[0], y[1], 5)) {
      const place = at.y(value);
      svg.append(make("line", { class: "rule", x1: left, x2: right, y1: place, y2: place }));
      svg.append(make("text", { x: left - 8, y: place + 4, "text-anchor": "end" }, above.percent ? trim(percent(value, 2)) : trim(value.toFixed(2))));
    }
    svg.append(make("text", { x: 4, y: 12 }, above.text));
    svg.append(make("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    if (!ends) return at;
    for (const value of ticks(x[0], x[1], Math.max(3, Math.min(8, (right - left) / 75)))) {
      const place = at.x(value);
      svg.append(make("line", { class: "axis", x1: place, x2: place, y1: bottom, y2: bottom + 4 }));
      svg.append(make("text", { x: place, y: bottom + 17, "text-anchor": "middle" }, quantity(value, unit)));
    }
    svg.append(make("text", { x: right, y: bottom + 34, "text-anchor": "end" }, name));
    return at;
  }

  function range(values, least) {
    let low = Math.min(...values), high = Math.max(...values);
    if (high - low < least) { const middle = (low + high) / 2; low = middle - least / 2; high = middle + least / 2; }
    return [low - (high - low) * 0.04, high + (high - low) * 0.04];
  }

  /* Learning curves. */
  function drawChart(chart, box, note) {
    const measure = MEASURES[state.y][0], [, name, unit, axis] = AXES[state.x];
    const shown = chart.lines.filter((line) => !state.hidden.has(line.line));
    const without = shown.filter((line) => !line[measure].length).map((line) => data.lines[line.line]);
    note.textContent = without.length ? `No ${MEASURES[state.y][1]} while it trains: ${without.join(", ")}.` : "";
    const runs = shown.flatMap((line) => line[measure].map((segment) => ({ line: line.line, ...segment })));
    const wide = Math.max(260, Math.floor(box.clientWidth)), high = wide < 480 ? 270 : 330;
    const svg = make("svg", { viewBox: `0 0 ${wide} ${high}`, height: high, tabindex: 0, role: "img" });
    svg.setAttribute("aria-label", `${chart.head}: ${MEASURES[state.y][1]} over ${name}, ${new Set(runs.map((run) => run.line)).size} methods; arrow keys walk along them`);
    box.replaceChildren(svg);
    const points = runs.flatMap((run) => run.points);
    if (!points.length) {
      svg.append(make("text", { x: wide / 2, y: high / 2, "text-anchor": "middle" }, shown.length ? "Nothing was measured." : "All methods are hidden."));
      return;
    }
    const around = points.flatMap((p) => [p[MEAN], Math.max(0, p[MEAN] - (p[STD] || 0)), Math.min(1, p[MEAN] + (p[STD] || 0))]);
    const y = range(around, 0.05);
    const at = frame(svg, {
      wide, high, left: 44, top: 24, x: [0, Math.max(...points.map((p) => p[axis])) || 1], y: [Math.max(0, y[0]), Math.min(1, y[1])],
      name, unit, above: { text: `${MEASURES[state.y][1]}, %`, percent: true },
    });
    const path = (list) => list.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
    const edge = (p, sign) => [at.x(p[axis]), at.y(Math.min(1, Math.max(0, p[MEAN] + sign * (p[STD] || 0))))];
    const bands = make("g"), curves = make("g"), all = [];
    for (const run of runs) {
      const group = { style: colour(run.line) }, alone = run.points.length === 1;
      if (run.points.some((p) => p[STD] !== null) && !alone)
        bands.append(make("path", { ...group, class: "band", d: `${path([...run.points.map((p) => edge(p, 1)), ...run.points.map((p) => edge(p, -1)).reverse()])}Z` }));
      curves.append(make("path", { ...group, class: "curve", "stroke-dasharray": dash(run.line), d: path(run.points.map((p) => [at.x(p[axis]), at.y(p[MEAN])])) }));
      for (const p of run.points) {
        const [px, py] = [at.x(p[axis]), at.y(p[MEAN])];
        all.push({ run, p, px, py });
        if (alone && p[STD] !== null) curves.append(make("line", { ...group, class: "whisker", x1: px, x2: px, y1: edge(p, 1)[1], y2: edge(p, -1)[1] }));
        if (alone) curves.append(make("circle", { ...group, class: "dot", cx: px, cy: py, r: 4 }));
      }
    }
    const mark = make("circle", { class: "mark", r: 5, visibility: "hidden" });
    svg.append(bands, curves, mark);

    const anew = new Set(runs.filter((run) => run.phase > 0).map((run) => run.line));
    function point(found) {
      const { run, p, px, py } = found;
      mark.setAttribute("cx", px); mark.setAttribute("cy", py); mark.setAttribute("visibility", "visible");
      mark.setAttribute("style", colour(run.line));
      const where = axis ? `round ${p[0]}, ${quantity(p[axis], unit)}${unit ? "" : ` ${name}`}` : `round ${p[0]}`;
      const value = `${MEASURES[state.y][1]} ${percent(p[MEAN])} %${p[STD] === null ? "" : ` ± ${percent(p[STD])}`}`;
      const phase = anew.has(run.line) ? `\ntraining ${run.phase + 1}` : "";
      const box = svg.getBoundingClientRect();
      show(`${data.lines[run.line]}\n${where}\n${value}\n${seeds(run.seeds)}${phase}`, box.left + (px * box.width) / wide, box.top + (py * box.height) / high);
    }
    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const px = ((event.clientX - box.left) * wide) / box.width, py = ((event.clientY - box.top) * high) / box.height;
      let best = null, least = 60 ** 2;
      for (const one of all) {
        const far = (one.px - px) ** 2 + (one.py - py) ** 2;
        if (far < least) { least = far; best = one; }
      }
      current = best;
      if (best) point(best); else leave();
    }
    let current = null;
    function leave() { mark.setAttribute("visibility", "hidden"); hide(); }
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const lines = [...new Set(runs.map((run) => run.line))];
      const line = current ? lines[(lines.indexOf(current.run.line) + step[0] + lines.length) % lines.length] : lines[0];
      const mine = all.filter((one) => one.run.line === line);
      if (!current) current = mine[mine.length - 1];
      else if (step[0]) current = mine.reduce((a, b) => (Math.abs(a.px - current.px) <= Math.abs(b.px - current.px) ? a : b));
      else current = mine[Math.max(0, Math.min(mine.length - 1, mine.indexOf(current) + step[1]))];
      point(current);
    });
  }

  function choice(label, names, key) {
    const row = make("div", {});
    names.forEach((name, place) => {
      const button = make("button", { type: "button", class: "pick", "aria-pressed": place === state[key] }, name);
      button.addEventListener("click", () => {
        state[key] = place;
        row.querySelectorAll("button").forEach((other, i) => other.setAttribute("aria-pressed", i === place));
        redraw();
      });
      row.append(button);
    });
    return make("div", { class: "choice", role: "group", "aria-label": label }, make("span", {}, label), row);
  }

  function legend() {
    const row = make("div", {}), buttons = [];
    data.lines.forEach((name, line) => {
      const sample = make("svg", { width: 28, height: 10, "aria-hidden": "true", style: colour(line) },
        make("line", { class: "curve", x1: 1, x2: 27, y1: 5, y2: 5, "stroke-dasharray": dash(line) }));
      const button = make("button", { type: "button", class: "key", "aria-pressed": true, "aria-label": `Show ${name}` }, sample, name);
      button.addEventListener("click", () => set([line], state.hidden.has(line)));
      buttons.push([line, button]);
      row.append(button);
    });
    function set(lines, visible) {
      for (const line of lines) if (visible) state.hidden.delete(line); else state.hidden.add(line);
      for (const [line, button] of buttons) button.setAttribute("aria-pressed", !state.hidden.has(line));
      redraw();
    }
    for (const [name, visible] of [["All", true], ["None", false]]) {
      const button = make("button", { type: "button", "aria-label": `${name} of the methods` }, name);
      button.addEventListener("click", () => set(buttons.map(([line]) => line), visible));
      row.append(button);
    }
    return make("div", { class: "choice", role: "group", "aria-label": "Methods shown" }, make("span", {}, "Methods"), row);
  }

  const redraw = () => { hide(); for (const draw of redraws) draw(); };
  const place = document.getElementById("charts");
  if (place) {
    const controls = make("div", { class: "controls" }, choice("Horizontal", AXES.map((axis) => axis[0]), "x"), choice("Vertical", MEASURES.map((one) => one[1]), "y"), legend());
    const grid = make("div", { class: "grid-of-charts" });
    place.append(controls, grid);
    for (const chart of data.charts) {
      const box = make("div"), note = make("p", { class: "note" });
      grid.append(make("div", { class: "chart" }, make("h3", {}, chart.head), box, note));
      redraws.push(() => drawChart(chart, box, note));
    }
    let width = 0;
    new ResizeObserver(() => { if (grid.clientWidth !== width) { width = grid.clientWidth; redraw(); } }).observe(grid);
    width = grid.clientWidth;
    redraw();
  }

  /* Prune events: accuracy before and after above, operations alive below, and the numbers. */
  function drawEvents(box, events) {
    const wide = Math.max(260, Math.floor(box.clientWidth)), plot = make("div", { class: "events" });
    const done = events.filter(([, before, after, , off]) => !off && before !== null && after !== null);
    const alive = events.filter(([, , , ops]) => ops !== null);
    box.append(plot);
    const width = Math.min(wide, 736), rounds = [0, Math.max(...events.map(([round]) => round)) * 1.03];
    const axes = { wide: width, left: 44, top: 24, x: rounds, unit: "", name: "round" };
    if (done.length) {
      const high = alive.length ? 170 : 210, svg = make("svg", { viewBox: `0 0 ${width} ${high}`, height: high, role: "img", "aria-label": "Accuracy before and after each event; the table has the numbers" });
      const y = range(done.flatMap(([, before, after]) => [before, after]), 0.05);
      const at = frame(svg, { ...axes, high, y: [Math.max(0, y[0]), Math.min(1, y[1])], above: { text: "server accuracy, %: ○ before, ● after", percent: true }, ends: !alive.length });
      for (const [round, before, after] of done) {
        const group = { style: colour(before > after ? 0 : 1) };
        svg.append(make("line", { ...group, class: "whisker", x1: at.x(round), x2: at.x(round), y1: at.y(before), y2: at.y(after) }));
        svg.append(make("circle", { ...group, class: "hollow", cx: at.x(round), cy: at.y(before), r: 5 }));
        svg.append(make("circle", { ...group, class: "dot", cx: at.x(round), cy: at.y(after), r: 3 }));
      }
      plot.append(svg);
    }
    if (alive.length) {
      const high = 150, svg = make("svg", { viewBox: `0 0 ${width} ${high}`, height: high, role: "img", "aria-label": "Operations alive at each event; the table has the numbers" });
      const at = frame(svg, { ...axes, high, y: [0, Math.max(...alive.map(([, , , ops]) => ops)) * 1.05 || 1], above: { text: "operations alive" } });
      let path = "";
      for (const [round, , , ops] of alive) path += path ? `H${at.x(round)}V${at.y(ops)}` : `M${at.x(round)} ${at.y(ops)}`;
      svg.append(make("path", { class: "curve", style: colour(1), d: path }));
      for (const [round, , , ops, off] of alive) svg.append(make("circle", { class: off ? "hollow" : "dot", style: colour(1), cx: at.x(round), cy: at.y(ops), r: 3 }));
      plot.append(svg);
    }
    const head = make("tr"), body = make("tbody");
    for (const name of ["round", "before, %", "after, %", "change, points", "operations alive", ""]) head.append(make("th", { scope: "col" }, name));
    for (const [round, before, after, ops, off] of events) {
      const known = !off && before !== null && after !== null, row = make("tr");
      const cells = [before === null ? "-" : percent(before), after === null ? "-" : percent(after), "-", ops === null ? "-" : `${ops}`, off ? "put off" : ""];
      if (known) cells[2] = (after >= before ? "+" : "−") + percent(Math.abs(after - before), 2);
      row.append(make("th", { scope: "row" }, `${round}`), ...cells.map((text) => make("td", {}, text)));
      body.append(row);
    }
    box.append(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Prune events" }, make("table", {}, make("thead", {}, head), body)));
  }
  for (const one of document.querySelectorAll("details[data-run]"))
    one.addEventListener("toggle", () => {
      if (!one.open || one.children.length > 1) return; // drawn when it is first opened
      const box = make("div");
      one.append(box);
      drawEvents(box, data.events[Number(one.dataset.run)]);
    });
})();
