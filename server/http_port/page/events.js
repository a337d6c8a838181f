// Asks this server for server-sent events, with the key of this tab, and says what to do about errors.

const KEY = "jaxserve-key";

/** A request that failed; the message says what to do. */
export class Problem extends Error {
  constructor(message, status, retrySeconds = null) {
    super(message);
    Object.assign(this, { status, retrySeconds });
  }
}

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

/** Keeps the key until the tab is closed; "" forgets it. */
export function useKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** Yields {event, data} of a response's server-sent events. Throws Problem, or AbortError. */
export async function* openEvents(path, options = {}) {
  const headers = { accept: "text/event-stream" };
  if (options.body) headers["content-type"] = "application/json";
  // With a key of its own, a request carries no password that the browser may have for this server.
  if (key()) headers.authorization = `Bearer ${key()}`;
  const credentials = key() ? "omit" : "same-origin";
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it running? Start it with: python -m jaxserve.server", 0);
  }
  if (!response.ok) throw await problemOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", event = "", data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("event:")) event = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield { event, data: data.join("\n") };
          event = "";
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Problem) throw error;
    throw new Problem("The connection to the server broke off. Is it still running?", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function problemOf(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? (typeof body.detail === "string" ? body.detail : "");
  } catch {
    said = "";
  }
  const retry = Number(response.headers.get("retry-after")) || null;
  const again = retry ? ` Try again in ${retry} s.` : "";
  switch (response.status) {
    case 401: return new Problem(key()
      ? "The server does not know this API key. Enter another with the button “API key”."
      : "This server needs an API key. Enter it with the button “API key”.", 401);
    case 403: return new Problem(said || "This API key may not do that.", 403);
    case 404: return new Problem(said || "This server has no such route. Is a proxy between it and this page?", 404);
    case 429: return new Problem((said || "The server has as many requests as it takes.") + again, 429, retry);
    case 503: return new Problem((said || "The server is starting or ending.") + again, 503, retry);
    default: return new Problem(said || `The server answers ${response.status}; its log says why.`, response.status, retry);
  }
}
