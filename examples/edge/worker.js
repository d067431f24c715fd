// An edge function, in the form that Cloudflare Workers have: before a request goes on to the origin it asks the nearest
// sidecar, over HTTP. The sidecars of all regions share the limit, so it is the same limit at every edge.
//
// Settings (wrangler.toml):
//   SIDECARS     JSON: continent -> where a sidecar can be asked there; "*" for all others
//   ASK_MS       how long it may take; then what FAIL says
//   FAIL         "open": the request goes on when nobody answers. "closed": it gets 503
//   EDGE_TOKEN   a secret that the proxy before the sidecar wants to see

export default {
  async fetch(request, env) {
    const answer = await ask(request, env);
    if (answer === null && env.FAIL === "closed") {
      return new Response("The rate limit could not be checked.\n", { status: 503, headers: { "retry-after": "1" } });
    }
    const told = answer?.responseHeadersToAdd ?? [];
    if (answer?.overallCode === "OVER_LIMIT") {
      const body = answer.rawBody ? atob(answer.rawBody) : "Too many requests.\n";
      return withHeaders(new Response(body, { status: 429 }), told);
    }
    return withHeaders(await fetch(request), told);
  },
};

// The rate limit service's answer (RateLimitResponse in JSON); null when there is none in time.
async function ask(request, env) {
  const sidecars = JSON.parse(env.SIDECARS);
  const nearest = sidecars[request.cf?.continent] ?? sidecars["*"];
  try {
    const response = await fetch(`${nearest}/json`, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: `Bearer ${env.EDGE_TOKEN}` },
      body: JSON.stringify({ domain: "edge", descriptors: descriptorsOf(request) }),
      signal: AbortSignal.timeout(Number(env.ASK_MS)),
    });
    // The client has made the question one that cannot be answered.
    if (response.status === 400) {
      return { overallCode: "OVER_LIMIT" };
    }
    // 429 has an answer in it, too.
    return response.ok || response.status === 429 ? await response.json() : null;
  } catch {
    return null;
  }
}

// What is limited. The address comes from the edge itself: clients cannot choose it, as they could a header.
function descriptorsOf(request) {
  const address = networkOf(request.headers.get("cf-connecting-ip") ?? "unknown");
  const descriptors = [{ entries: [{ key: "address", value: address }] }];
  // Clients choose the key: the first counts, and no more of it than a key has. A question too large gets no answer.
  const keys = (request.headers.get("x-api-key") ?? "").split(",").map((key) => key.trim().slice(0, 256).toWellFormed());
  const key = keys.find((key) => key !== "");
  if (key) {
    descriptors.push({ entries: [{ key: "api_key", value: key }] });
  }
  return descriptors;
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

function withHeaders(response, told) {
  const changed = new Response(response.body, response);
  for (const header of told) {
    changed.headers.set(header.key, header.value);
  }
  return changed;
}
