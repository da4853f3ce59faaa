// Sorting and searching the table of brains. Without this script the page shows the same, unsorted.
(() => {
  "use strict";
  const table = document.querySelector("table[data-sortable]");
  if (!table) return;
  const body = table.tBodies[0];

  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = Number(text.replace("\u2212", "-"));
    return text !== "" && Number.isFinite(number) ? number : text;
  };
  const compare = (a, b) => {
    const numbers = typeof a === "number" && typeof b === "number";
    if (numbers) return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b);
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => compare(value(a, column), value(b, column)) * (down ? -1 : 1));
      body.append(...rows);
    });
  });

  const search = document.createElement("input");
  search.type = "search";
  search.className = "search";
  search.placeholder = "Search brains";
  search.setAttribute("aria-label", "Search brains");
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(search);
})();
