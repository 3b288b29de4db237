// The filters are in the address, #source=...&min=0.2&max=0.9&dropped=..., so a view can be sent.
const form = document.forms.filters, rows = [...document.querySelectorAll("article")];
function show() {
  const { source, min, max, dropped } = Object.fromEntries(new FormData(form));
  let shown = 0;
  for (const row of rows) {
    const { trained, dropped: reason } = row.dataset;
    const fate = { "": true, no: !reason, any: !!reason }[dropped] ?? reason === dropped;
    const share = trained >= +min && trained <= +(max || 1);
    row.hidden = !(fate && share && (!source || source === row.dataset.source));
    shown += !row.hidden;
  }
  form.elements.shown.value = `${shown} of ${rows.length} rows`;
}
function read() {
  form.reset();
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (form.elements[name]) form.elements[name].value = value;
  show();
}
form.addEventListener("input", () => {
  show();
  const wanted = [...new FormData(form)].filter(([, value]) => value !== "");
  history.replaceState(null, "", "#" + new URLSearchParams(wanted));
});
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", read);
read();
