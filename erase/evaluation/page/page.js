"use strict";
(() => {
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not(.long)")) details.open = true;
  });

  const viewer = document.getElementById("viewer");
  if (!viewer) return;
  const image = document.createElement("img");
  const caption = viewer.querySelector("figcaption");
  document.getElementById("hint").hidden = false;
  let shown = null; // the button whose picture is enlarged

  function show(button) {
    if (!button) return;
    shown = button;
    const picture = button.querySelector("img");
    image.src = picture.src;
    viewer.querySelector("figure").prepend(image);
    image.alt = picture.alt;
    image.classList.toggle("small", picture.classList.contains("small"));
    caption.textContent = picture.alt;
    if (!viewer.open) viewer.showModal();
  }

  // Across: another seed of the same model. Down: the same seed of another model; after the last comes the first.
  function go(across, down) {
    const cell = shown.closest("td");
    const rows = [...cell.closest("tbody").rows];
    const row = rows[(rows.indexOf(cell.parentElement) + down + rows.length) % rows.length];
    const next = row.cells[cell.cellIndex + across];
    show(next && next.querySelector("button.pic"));
  }

  for (const button of document.querySelectorAll("button.pic")) button.addEventListener("click", () => show(button));
  image.addEventListener("click", () => go(0, 1));
  for (const button of viewer.querySelectorAll("[data-across]"))
    button.addEventListener("click", () => go(Number(button.dataset.across), 0));
  viewer.querySelector("[data-down]").addEventListener("click", () => go(0, 1));
  viewer.querySelector("[data-close]").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close(); // beside the picture
  });
  viewer.addEventListener("close", () => shown.focus());
  viewer.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    go(...step);
  });
})();
