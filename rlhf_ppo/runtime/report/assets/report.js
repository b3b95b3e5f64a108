"use strict";
(() => {
  const NAMES = { kl: "KL", logprob: "log-prob", weight: "whitened" };
  const make = (name, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(name), properties);
    node.append(...children);
    return node;
  };

  // Theme: automatic, light, dark. Storage may be refused for files.
  const root = document.documentElement;
  const button = document.querySelector(".theme");
  const themes = ["automatic", "light", "dark"];
  let theme = "automatic";
  try { theme = localStorage.getItem("report-theme") || theme; } catch { /* no storage here */ }
  const paint = () => {
    if (theme === "automatic") delete root.dataset.theme; else root.dataset.theme = theme;
    button.querySelector("span").textContent = theme;
  };
  if (button) {
    if (!themes.includes(theme)) theme = "automatic";
    button.hidden = false;
    button.addEventListener("click", () => {
      theme = themes[(themes.indexOf(theme) + 1) % themes.length];
      try { localStorage.setItem("report-theme", theme); } catch { /* no storage here */ }
      paint();
    });
    paint();
  }

  // Charts: the numbers at the pointer, or at the arrow keys.
  const SVG = "http://www.w3.org/2000/svg";
  const shape = (name, attributes) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  for (const svg of document.querySelectorAll("svg.chart")) {
    const { x: xLabel, lines, plane } = JSON.parse(svg.dataset.read);
    const cursor = svg.querySelector(".cursor");
    const readout = svg.nextElementSibling;
    const all = lines.flatMap((line) => line.points.map((point) => ({ line, point })));
    const stops = [...new Set(all.map(({ point }) => point[0]))].sort((a, b) => a - b);
    let at = null;
    const nearest = (items, distance) => items.reduce((best, item) => (distance(item) < distance(best) ? item : best));
    const show = (chosen) => {
      cursor.replaceChildren();
      const first = chosen[0].point;
      if (!plane) cursor.append(shape("line", { x1: first[0], x2: first[0], y1: 10, y2: 176 }));
      for (const { line, point } of chosen) cursor.append(shape("circle", { class: `s${line.look}`, cx: point[0], cy: point[1], r: 4 }));
      const parts = chosen.map(({ line, point }) => (lines.length > 1 ? `${line.label} ` : "") + point[3]);
      readout.replaceChildren(make("b", { textContent: parts.join(" · ") }), ` at ${first[2]} ${xLabel}`);
    };
    const showAt = (place) => {
      at = nearest(stops, (stop) => Math.abs(stop - place));
      show(lines.map((line) => ({ line, point: nearest(line.points, (point) => Math.abs(point[0] - at)) }))
        .filter(({ point }) => Math.abs(point[0] - at) < 12));
    };
    const last = () => showAt(stops[stops.length - 1]);
    const rest = () => { last(); cursor.replaceChildren(); at = null; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * 360;
      const y = (event.clientY - box.top) / box.height * 210;
      if (plane) show([nearest(all, ({ point }) => Math.hypot(point[0] - x, point[1] - y))]); else showAt(x);
    });
    svg.addEventListener("pointerleave", rest);
    svg.addEventListener("blur", rest);
    let step = stops.length - 1;
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0, End: stops.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      step = Math.min(Math.max(moves[event.key], 0), stops.length - 1);
      if (plane) show([all.find(({ point }) => point[0] === stops[step])]); else showAt(stops[step]);
    });
    rest();
    readout.setAttribute("aria-live", "polite");
  }

  // Heat views: colours by the chosen number; all numbers of the token under the pointer or in focus.
  for (const heat of document.querySelectorAll(".heat")) {
    const data = JSON.parse(heat.dataset.heat);
    const tokens = [...heat.querySelectorAll(".t")];
    const list = heat.querySelector(".numbers dl");
    let focused = 0;
    const fill = (i) => {
      const token = tokens[i];
      const rows = data.names.map((name, k) => [NAMES[name] || name, data.rows[i][k]]);
      if (token.classList.contains("clipped")) rows.push(["clip range", "outside"]);
      if (token.classList.contains("dead")) rows.push(["gradient", "none"]);
      if (data.ends.length && data.ends[i]) rows.push(["episode", data.ends[i]]);
      list.replaceChildren(make("dt", { className: "token", textContent: `${data.positions[i]}: ${JSON.stringify(token.textContent)}` }));
      for (const [name, value] of rows) list.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
    };
    const read = (i) => {
      fill(i);
      for (const other of heat.querySelectorAll('.t[aria-selected="true"]')) other.setAttribute("aria-selected", "false");
      tokens[i].setAttribute("aria-selected", "true");
    };
    if (tokens.length) fill(0);
    heat.querySelector(".numbers").setAttribute("aria-live", "polite");
    const focus = (i) => {
      tokens[focused].tabIndex = -1;
      focused = Math.min(Math.max(i, 0), tokens.length - 1);
      tokens[focused].tabIndex = 0;
      tokens[focused].focus();
    };
    tokens.forEach((token, i) => {
      token.addEventListener("pointerenter", () => read(i));
      token.addEventListener("focus", () => read(i));
      token.addEventListener("click", () => focus(i));
    });
    heat.querySelector(".tokens").addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: focused - 1, ArrowRight: focused + 1, Home: 0, End: tokens.length - 1, ArrowUp: focused - 10, ArrowDown: focused + 10 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      focus(moves[event.key]);
    });
    for (const input of heat.querySelectorAll(".by input")) {
      input.addEventListener("change", () => {
        heat.dataset.by = input.value;
        heat.querySelector(".scale .middle").textContent = input.parentElement.textContent;
        tokens.forEach((token, i) => {
          const h = data.heats[input.value][i];
          token.style.setProperty("--h", `${Math.abs(h) * 100}%`);
          token.classList.toggle("p", h > 0);
          token.classList.toggle("n", h <= 0);
        });
      });
    }
  }
})();
