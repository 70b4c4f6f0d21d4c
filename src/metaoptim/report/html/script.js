"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const store = { get() { try { return localStorage.getItem("theme"); } catch { return null; } },
                  set(value) { try { localStorage.setItem("theme", value); } catch { /* a file may not remember */ } } };
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
  if (["dark", "light"].includes(store.get())) root.dataset.theme = store.get();
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; store.set(root.dataset.theme); label(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();

  for (const chart of document.querySelectorAll(".chart")) {
    const told = JSON.parse(chart.dataset.hover), tip = chart.querySelector(".tip");
    let at = -1;
    const drawing = () => [...chart.querySelectorAll("[data-spots]")].find((one) => one.offsetParent);
    const places = (one) => one.dataset.spots ? one.dataset.spots.split(" ").map((spot) => spot.split(",").map(Number)) : [];
    const hide = () => { tip.hidden = true; at = -1; for (const line of chart.querySelectorAll(".cross")) line.classList.remove("on"); };
    const show = (i) => {
      const one = drawing(), spots = places(one);
      if (!spots.length) return;
      at = Math.min(Math.max(i, 0), spots.length - 1);
      const [x, y] = spots[at], [head, rows] = told[at], svg = one.firstElementChild, line = svg.querySelector(".cross");
      const zoom = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      tip.replaceChildren();
      tip.append(Object.assign(document.createElement("b"), { textContent: head }));
      for (const [colour, name, value] of rows) {
        const row = Object.assign(document.createElement("span"), { className: `row ${colour}` });
        row.append(document.createElement("i"), `${name ? `${name} ` : ""}`, Object.assign(document.createElement("em"), { textContent: value }));
        tip.append(row);
      }
      tip.hidden = false;
      line.classList.toggle("on", y === undefined);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      const room = chart.clientWidth - tip.offsetWidth, left = x * zoom + 14;
      tip.style.left = `${Math.max(0, left > room ? Math.min(x * zoom - tip.offsetWidth - 14, room) : left)}px`;
      const tall = tip.offsetHeight + 6, above = chart.getBoundingClientRect().top > tall ? -tall : chart.clientHeight + 6;
      tip.style.top = `${y === undefined ? above : Math.max(0, y * zoom - tall - 6)}px`;
    };
    chart.addEventListener("pointermove", (event) => {
      const one = drawing(), svg = one.firstElementChild, box = svg.getBoundingClientRect();
      const zoom = box.width / svg.viewBox.baseVal.width, x = (event.clientX - box.left) / zoom, y = (event.clientY - box.top) / zoom;
      const far = ([a, b]) => b === undefined ? Math.abs(a - x) : Math.hypot(a - x, b - y);
      const all = places(one).map(far), near = all.indexOf(Math.min(...all));
      if (near !== at) show(near);
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: told.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }
})();
