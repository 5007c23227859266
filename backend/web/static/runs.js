// Which runs are picked for a comparison.
const button = document.getElementById("compare");
const picked = () => [...document.querySelectorAll(".pick:checked")].map((box) => box.value);
function show() {
  const count = picked().length;
  button.disabled = count < 2 || count > 20;
  button.textContent = count > 20 ? "Compare: at most 20" : count ? `Compare ${count}` : "Compare";
}
document.addEventListener("change", show);
document.addEventListener("htmx:afterSwap", show);
button.addEventListener("click", () => {
  location.assign(`/runs/compare?${picked().map((id) => `id=${encodeURIComponent(id)}`).join("&")}`);
});
show();
