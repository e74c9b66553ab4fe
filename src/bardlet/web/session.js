// Signing in: by the link that `bardlet serve` prints, or by the key.

/** Send JSON to /session. Return null if it went well, else the reason. */
export async function session(method, body) {
  try {
    const answer = await fetch("/session", { method, body: body && JSON.stringify(body),
      headers: body ? { "Content-Type": "application/json" } : {} });
    if (answer.ok) return null;
    return (await answer.json()).error.message;
  } catch {
    return "The server does not answer; it may have stopped.";
  }
}

/** Exchange the token in the address for a session, if there is one. Return [signed in, message]. */
export async function begin() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    history.replaceState(null, "", location.pathname); // out of the address before anything else happens
    const reason = await session("POST", { token });
    if (!reason) return [true, "You are signed in."];
    return [!(await session("GET")), reason]; // a link that was used before, by this browser
  }
  const reason = await session("GET");
  return [!reason, reason ? "Sign in to go on." : "You are signed in."];
}
