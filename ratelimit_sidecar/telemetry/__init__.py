"""What the sidecar says of itself: metrics, traces, logs. It reads the other parts and changes none of them."""
