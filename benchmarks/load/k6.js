// 5,000 requests a second over three regions, for a minute: 95 % within 300 ms, and nothing but 200 and 429.
//
//   make demo                    three regions on this machine, or give the Envoys' addresses in URLS
//   k6 run benchmarks/load/k6.js
//
// The environment may have URLS (comma-separated), RATE (a second, over all), DURATION and AGENTS.
// On two cores, with everything on them, ask for less: RATE=500.

import http from 'k6/http';
import { check } from 'k6';
import { Counter } from 'k6/metrics';

const urls = (__ENV.URLS || 'http://127.0.0.1:10001,http://127.0.0.1:10002,http://127.0.0.1:10003').split(',');
const rate = Number(__ENV.RATE || 5000);
const duration = __ENV.DURATION || '1m';
const agents = Number(__ENV.AGENTS || 1000);

const allowed = new Counter('allowed');
const denied = new Counter('denied');

// A denial is an answer, not a failure.
http.setResponseCallback(http.expectedStatuses(200, 429));

function region(url) {
  return {
    executor: 'constant-arrival-rate',
    exec: 'ask',
    rate: Math.ceil(rate / urls.length),
    timeUnit: '1s',
    duration: duration,
    preAllocatedVUs: 100,
    maxVUs: 1000,
    env: { URL: url },
    tags: { region: url },
  };
}

export const options = {
  discardResponseBodies: true,
  scenarios: Object.fromEntries(urls.map((url, index) => [`region_${index + 1}`, region(url)])),
  thresholds: {
    http_req_duration: ['p(95)<300'],
    http_req_failed: ['rate<0.001'],
    checks: ['rate>0.999'],
    // A load that the machine could not send says nothing about the servers.
    dropped_iterations: ['count<1'],
  },
};

export function ask() {
  const agent = Math.floor(Math.random() * agents);
  const answer = http.get(`${__ENV.URL}/rate?agent=agent-${agent}`, { tags: { name: '/rate' } });
  check(answer, { 'is allowed or denied': (got) => got.status === 200 || got.status === 429 });
  (answer.status === 429 ? denied : allowed).add(1);
}
