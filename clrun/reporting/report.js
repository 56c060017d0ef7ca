"use strict";
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? null : cell.dataset.v;
  };
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };
  const sort = (head) => {
    const table = head.closest("table");
    const body = table.tBodies[0];
    const heads = [...head.parentNode.cells];
    const column = heads.indexOf(head);
    const rows = [...body.rows];
    const numeric = rows.every((row) => !Number.isNaN(Number(value(row, column))));
    const before = head.getAttribute("aria-sort");
    const next = before === "descending" ? "ascending" : before === "ascending" || numeric ? "descending" : "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", next);
    rows.sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return next === "ascending" ? compare(x, y) : compare(y, x);
    });
    body.append(...rows);
  };

  const tip = document.getElementById("tip");
  const cellOf = (map, event) => {
    const matrix = JSON.parse(map.dataset.m);
    const names = JSON.parse(map.dataset.n);
    const box = map.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * matrix.length);
    const column = Math.floor(((event.clientX - box.left) / box.width) * matrix.length);
    const found = (matrix[row] || [])[column];
    if (found === undefined) return "";
    const shown = found === null ? "not evaluated" : (found / 10).toFixed(1);
    return `${shown}: ${names[column]}, after learning ${names[row]}`;
  };
  const show = (event) => {
    const map = event.target.closest("[data-m]");
    const mark = event.target.closest("[data-t]");
    const said = map ? cellOf(map, event) : mark ? mark.dataset.t : "";
    tip.hidden = !said;
    if (!said) return;
    tip.textContent = said;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 6);
    const top = event.clientY + 18 + box.height < innerHeight ? event.clientY + 18 : event.clientY - box.height - 12;
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${top}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.to) {
      document.body.dataset.setting = button.dataset.to;
      for (const other of button.parentNode.children) other.setAttribute("aria-pressed", String(other === button));
    } else if (button.parentNode.tagName === "TH") sort(button.parentNode);
  });
})();
