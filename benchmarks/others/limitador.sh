#!/bin/sh
# Limitador (https://github.com/Kuadrant/limitador) from its sources, in memory, with the rule that benchmarks.compare
# needs, on 127.0.0.1:8081. Measured was commit 2981b2b, without RocksDB.
#
#   benchmarks/others/limitador.sh &
#   make benchmark BENCHMARK="compare limitador=127.0.0.1:8081@PID --echo"
#
# It needs git, cargo, and Debian's protobuf-compiler, clang and libclang-dev. FOLDER is where it is built.
set -eu

folder="${FOLDER:-/tmp/limitador}"
[ -d "$folder" ] || git clone https://github.com/Kuadrant/limitador "$folder"
cd "$folder"
git checkout --quiet 2981b2b
cargo build --release --manifest-path limitador-server/Cargo.toml
cat >limits.yaml <<'YAML'
- {namespace: benchmark, max_value: 100000000, seconds: 60, conditions: [], variables: ["descriptors[0].tenant"]}
YAML
exec target/release/limitador-server --rls-ip 127.0.0.1 --rls-port 8081 --http-ip 127.0.0.1 --http-port 8080 \
  limits.yaml memory
