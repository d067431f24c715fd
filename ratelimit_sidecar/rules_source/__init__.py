"""Where rules come from while the sidecar runs: watched files, or an xDS server. The last good ones stay in force."""
