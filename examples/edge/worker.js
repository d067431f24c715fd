// An edge function, in the form that Cloudflare Workers have: before a request goes on to the origin it asks the nearest
// sidecar, through the Envoy before it. The sidecars of all regions share the limit, so it is the same limit at every edge.
//
// Settings (wrangler.toml):
//   SIDECARS     JSON: continent -> where a sidecar can be asked there; "*" for all others
//   ASK_MS       how long it may take; then what FAIL says
//   FAIL         "open": the request goes on when nobody answers. "closed": it gets 503
//   EDGE_TOKEN   a secret that the Envoy before the sidecar wants to see

// What callers are told of their limit.
const TOLD = ["ratelimit-policy", "ratelimit", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "retry-after"];

export default {
  async fetch(request, env) {
    const answer = await ask(request, env);
    if (answer === null) {
      return env.FAIL === "closed"
        ? new Response("The rate limit could not be checked.\n", { status: 503, headers: { "retry-after": "1" } })
        : fetch(request);
    }
    const response = answer.passes ? await fetch(request) : new Response(answer.body, { status: 429 });
    return withHeaders(response, answer.headers);
  },
};

// Null when there is no answer in time.
async function ask(request, env) {
  const sidecars = JSON.parse(env.SIDECARS);
  const nearest = sidecars[request.cf?.continent] ?? sidecars["*"];
  try {
    const answer = await fetch(`${nearest}/ask`, {
      method: "POST",
      headers: { authorization: `Bearer ${env.EDGE_TOKEN}`, ...whatIsLimited(request) },
      signal: AbortSignal.timeout(Number(env.ASK_MS)),
    });
    const body = (await answer.text()) || "Too many requests.\n";
    // 400 and 431: the client has made the question one that cannot be answered.
    const isAnswer = [200, 400, 429, 431].includes(answer.status);
    return isAnswer ? { passes: answer.ok, body, headers: answer.headers } : null;
  } catch {
    return null;
  }
}

// Of which the rules make descriptors. The address comes from the edge itself: clients cannot choose it, as they could a
// header.
function whatIsLimited(request) {
  const headers = { "x-edge-address": networkOf(request.headers.get("cf-connecting-ip") ?? "unknown") };
  // Clients choose the key: the first counts, and no more of it than a key has.
  const keys = (request.headers.get("x-api-key") ?? "").split(",").map((key) => key.trim().slice(0, 256).toWellFormed());
  const key = keys.find((key) => key !== "");
  if (key) {
    headers["x-edge-key"] = encodeURIComponent(key);
  }
  return headers;
}

// Whoever has one IPv6 address has all of its /64.
function networkOf(address) {
  if (!address.includes(":")) {
    return address;
  }
  const [before, after] = address.split("::").map((part) => part.split(":").filter((group) => group !== ""));
  const groups = after === undefined ? before : [...before, ...Array(8 - before.length - after.length).fill("0"), ...after];
  return `${groups.slice(0, 4).join(":")}::/64`;
}

function withHeaders(response, headers) {
  const changed = new Response(response.body, response);
  for (const name of TOLD) {
    const value = headers.get(name);
    if (value !== null) {
      changed.headers.set(name, value);
    }
  }
  return changed;
}
