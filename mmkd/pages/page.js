// Sorting and filtering. The page is complete without it; state is kept in the address, so that a view can be shared.
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    const own = cell.dataset.value ?? cell.textContent.trim();
    return own === "" ? null : isNaN(own) ? own.toLowerCase() : Number(own);
  };
  const toggled = (table, head, column) => {
    const numeric = [...table.tBodies[0].rows].some((row) => typeof value(row, column) === "number");
    const before = head.getAttribute("aria-sort");
    return before ? before === "ascending" : numeric;
  };
  const sort = (table, head, column, down) => {
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].filter((row) => !row.classList.contains("counts"));
    rows.sort((one, other) => {
      const a = value(one, column), b = value(other, column);
      if (a === null || b === null) return (a === null) - (b === null);
      return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  };
  for (const table of document.querySelectorAll("table")) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, head, column, toggled(table, head, column)));
    });
  }
  const filters = document.getElementById("filters");
  if (!filters) return;
  const selects = [...filters.querySelectorAll("select")];
  const apply = () => {
    const { modality, kind } = Object.fromEntries(selects.map((select) => [select.name, select.value]));
    for (const row of document.querySelectorAll("tr[data-scope]")) row.hidden = row.dataset.scope !== modality;
    for (const cell of document.querySelectorAll("th[data-kind], td[data-kind]")) cell.hidden = kind === "" ? "alone" in cell.dataset : cell.dataset.kind !== kind;
    const board = document.getElementById("board");
    const heads = [...board.querySelectorAll("thead th")];
    const first = heads.findIndex((head, column) => column > 0 && !head.hidden);
    sort(board, heads[first], first, true);
    let shown = 0;
    for (const row of document.querySelectorAll("tr[data-modality]")) {
      row.hidden = (modality !== "" && row.dataset.modality !== modality) || (kind !== "" && row.dataset.kind !== kind);
      shown += !row.hidden;
    }
    document.getElementById("shown").textContent = `${shown} tasks shown`;
  };
  const follow = () => {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const select of selects) {
      const own = wanted.get(select.name) ?? "";
      if ([...select.options].some((option) => option.value === own)) select.value = own;
    }
    apply();
  };
  for (const select of selects) {
    select.addEventListener("change", () => {
      const chosen = new URLSearchParams(selects.filter((s) => s.value).map((s) => [s.name, s.value]));
      history.replaceState(null, "", `#${chosen}`);
      apply();
    });
  }
  filters.hidden = false;
  addEventListener("hashchange", follow);
  follow();
})();
