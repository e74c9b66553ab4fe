// The first page of the server: signs a browser in, by the link that `bardlet serve` prints or by the key.

const part = (id) => document.getElementById(id);

/** Send JSON to /session. Return null if it went well, else the reason. */
async function session(method, body) {
  try {
    const answer = await fetch("/session", { method, body: body && JSON.stringify(body),
      headers: body ? { "Content-Type": "application/json" } : {} });
    if (answer.ok) return null;
    return (await answer.json()).error.message;
  } catch {
    return "The server does not answer; it may have stopped.";
  }
}

/** Show that the browser is signed in, or the form for that. */
function show(signedIn, message) {
  part("sign-in").hidden = signedIn;
  part("links").hidden = !signedIn;
  part("status").textContent = message;
}

part("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const reason = await session("POST", { key: part("key").value });
  part("key").value = "";
  show(!reason, reason ?? "You are signed in.");
  if (!reason && location.pathname !== "/") location.reload(); // the page that was asked for
});

part("sign-out").addEventListener("click", async () => {
  const reason = await session("DELETE");
  show(Boolean(reason), reason ?? "You are signed out.");
});

const token = new URLSearchParams(location.hash.slice(1)).get("token");
if (token) {
  history.replaceState(null, "", location.pathname); // out of the address before anything else happens
  const reason = await session("POST", { token });
  show(!reason, reason ?? "You are signed in.");
} else {
  const reason = await session("GET");
  show(!reason, reason ? "Sign in to go on." : "You are signed in.");
}
