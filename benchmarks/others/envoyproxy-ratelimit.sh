#!/bin/sh
# envoyproxy/ratelimit with a Redis on a unix socket, with the rule that benchmarks.compare needs, on 127.0.0.1:8081.
#
#   benchmarks/others/envoyproxy-ratelimit.sh &
#   make benchmark BENCHMARK="compare ratelimit=127.0.0.1:8081@PID"
#
# It needs Go and redis-server. FOLDER has its configuration and Redis' socket. Redis is to be ended, too.
set -eu

folder="${FOLDER:-/tmp/ratelimit}"
go install github.com/envoyproxy/ratelimit/src/service_cmd@v1.4.1-0.20260122083618-3fb702589d36
mkdir -p "$folder/config"
cat >"$folder/config/benchmark.yaml" <<'YAML'
{domain: benchmark, descriptors: [{key: tenant, rate_limit: {unit: minute, requests_per_unit: 100000000}}]}
YAML
rm -f "$folder/redis.sock"
redis-server --port 0 --unixsocket "$folder/redis.sock" --save '' --appendonly no &
until [ -S "$folder/redis.sock" ]; do sleep 0.1; done
export HOST=127.0.0.1 PORT=8080 GRPC_HOST=127.0.0.1 GRPC_PORT=8081 DEBUG_HOST=127.0.0.1 DEBUG_PORT=6070 LOG_LEVEL=error
export RUNTIME_ROOT="$folder" RUNTIME_SUBDIRECTORY='' RUNTIME_APPDIRECTORY=config RUNTIME_WATCH_ROOT=false
export USE_STATSD=false DISABLE_STATS=true REDIS_SOCKET_TYPE=unix REDIS_URL="$folder/redis.sock"
exec "$(go env GOPATH)/bin/service_cmd"
