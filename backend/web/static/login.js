// The key goes to the server once, which answers with a cookie that no script can read.
document.getElementById("key").focus();
document.getElementById("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const said = event.target.querySelector(".refusal");
  said.textContent = "";
  try {
    const body = JSON.stringify({ key: document.getElementById("key").value });
    const answer = await fetch("/login", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (answer.ok) {
      const next = new URLSearchParams(location.search).get("next") ?? "/";
      // A path of this server alone: "//host" would lead elsewhere.
      location.assign(/^\/(?![/\\])/.test(next) ? next : "/");
    } else {
      said.textContent = (await answer.json()).detail;
    }
  } catch {
    said.textContent = "The server does not answer.";
  }
});
