"""The admin HTTP server: metrics, health, rules, and what the sidecar knows, for people and their tools."""
