// What test_browser.py measures in a page; it leaves the results in an element with the id found.
const found = { theme: !document.querySelector(".theme").hidden };
const wide = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
const rgb = (text) => {
  const numbers = text.match(/[\d.]+/g).map(Number);
  const scale = text.startsWith("color(") ? 255 : 1;
  return [...numbers.slice(0, 3).map((x) => x * scale), numbers.length > 3 ? numbers[3] : 1];
};
const over = (top, below) => top.slice(0, 3).map((x, i) => x * top[3] + below[i] * (1 - top[3]));
const ground = (element) => {
  if (!element) return [255, 255, 255];
  const own = rgb(getComputedStyle(element).backgroundColor);
  return own[3] === 1 ? own : over(own, ground(element.parentElement));
};
const light = (color) => color.slice(0, 3).map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
// The lowest contrast of any text that is shown, and of any line of a chart with what is behind it.
const lowest = () => {
  let worst = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest("svg") ? element.tagName !== "text" : ![...element.childNodes].some((x) => x.nodeType === 3 && x.data.trim())) continue;
    if (!element.getClientRects().length || getComputedStyle(element).visibility === "hidden" || element.tagName === "SCRIPT" || element.matches(".skip")) continue;
    const style = getComputedStyle(element);
    const behind = ground(element.closest("svg") ? element.closest("svg").parentElement : element);
    const seen = contrast(over(rgb(element.closest("svg") ? style.fill : style.color), behind), behind);
    if (seen < worst[0]) worst = [seen, `${element.tagName}.${element.getAttribute("class")} ${element.textContent.slice(0, 30)}`];
  }
  return worst;
};
const lines = () => Math.min(...[...document.querySelectorAll("svg .line:not(.faint)")].map((line) =>
  contrast(rgb(getComputedStyle(line).stroke), ground(line.closest("figure, ul, div")))));
const key = (element, name) => element.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
found.wide = wide();
for (const theme of ["light", "dark"]) {
  document.querySelector(".theme").click();
  for (const input of document.querySelectorAll(".by input")) { input.click(); found[`${theme} ${input.value}`] = lowest(); }
  found[theme] = lowest();
  found[`${theme} lines`] = lines();
  found[`${theme} scheme`] = getComputedStyle(document.documentElement).colorScheme;
}
const chart = document.querySelector("svg.chart");
const readout = chart.nextElementSibling;
found.last = readout.textContent;
const box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * 0.15, clientY: box.top + 50 }));
found.hovered = readout.textContent;
found.cursor = chart.querySelectorAll(".cursor circle").length;
chart.dispatchEvent(new PointerEvent("pointerleave"));
found.left = readout.textContent;
chart.focus();
key(chart, "Home");
found.first = readout.textContent;
const heat = document.querySelector(".heat");
const tokens = [...heat.querySelectorAll(".t")];
const numbers = heat.querySelector(".numbers dl");
tokens[2].dispatchEvent(new PointerEvent("pointerenter"));
found.token = numbers.textContent;
tokens[0].focus();
key(tokens[0], "ArrowRight");
found.focused = tokens.indexOf(document.activeElement);
found.selected = tokens.findIndex((token) => token.getAttribute("aria-selected") === "true");
found.stops = heat.querySelectorAll('.t[tabindex="0"]').length;
found.by = heat.dataset.by;
found.names = [...document.querySelectorAll("svg.chart, img, button, summary")].every((x) => (x.getAttribute("aria-label") || x.alt || x.textContent).trim());
found.hacked = window.hacked || 0;
const pre = document.createElement("pre");
pre.id = "found";
pre.textContent = JSON.stringify(found);
document.body.append(pre);
