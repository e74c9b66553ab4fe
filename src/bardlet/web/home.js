// The page in place of one that needs a signed-in browser.

import { begin, session } from "./session.js";

const part = (id) => document.getElementById(id);

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

show(...await begin());
