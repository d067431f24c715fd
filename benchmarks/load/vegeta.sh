#!/bin/sh
# A constant rate over three regions with Vegeta; exits with 1 when there is anything but 200 and 429, or nothing at all.
#
#   make demo                       three regions on this machine, or give the Envoys' addresses in URLS
#   benchmarks/load/vegeta.sh
#
# The environment may have URLS (separated by spaces), RATE (a second, over all), DURATION and AGENTS.
# Vegeta: go install github.com/tsenart/vegeta/v12@latest
set -eu

urls="${URLS:-http://127.0.0.1:10001 http://127.0.0.1:10002 http://127.0.0.1:10003}"
rate="${RATE:-500}"
duration="${DURATION:-10s}"
agents="${AGENTS:-100}"

results=$(mktemp)
trap 'rm -f "$results"' EXIT

# Vegeta goes through its targets in turn: region by region, agent by agent.
agent=1
while [ "$agent" -le "$agents" ]; do
    for url in $urls; do
        echo "GET $url/rate?agent=agent-$agent"
    done
    agent=$((agent + 1))
done | vegeta attack -rate "$rate" -duration "$duration" -timeout 5s >"$results"

vegeta report "$results"
vegeta report -type json "$results" | python3 -c '
import json, sys
codes = json.load(sys.stdin)["status_codes"]
others = {code: count for code, count in codes.items() if code not in ("200", "429")}
if others or not codes.get("200"):
    sys.exit(f"expected 200 and 429 alone, got {codes}")
'
