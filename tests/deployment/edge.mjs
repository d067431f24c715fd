// Runs examples/edge/worker.js in Cloudflare's local runtime.
//
//     node edge.mjs MINIFLARE SETTINGS
//
// MINIFLARE is the package's folder, SETTINGS JSON: worker, host, port, upstream, continent, bindings. GET on /cdn-cgi/* is
// the runtime's own; all else goes through the worker to the upstream. It ends with its standard input.
import { createRequire } from "node:module";

const [packages, given] = process.argv.slice(2);
const { Miniflare } = createRequire(`${packages}/`)("miniflare");
const { worker, host, port, upstream, continent, bindings } = JSON.parse(given);

const runtime = new Miniflare({
  scriptPath: worker,
  modules: true,
  compatibilityDate: "2026-01-01",
  cf: { continent },
  host,
  port,
  upstream,
  bindings,
});
await runtime.ready;
console.log("ready");
process.stdin.resume();
process.stdin.on("end", () => runtime.dispose());
