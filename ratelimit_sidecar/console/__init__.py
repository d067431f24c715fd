"""The admin HTTP server: metrics, health and what the sidecar knows, for people and their tools. It changes nothing."""
