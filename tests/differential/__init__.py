"""The sidecar beside the real envoyproxy/ratelimit and its Redis: random rules and requests, each answer compared."""
