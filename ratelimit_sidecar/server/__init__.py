"""Front ends: they carry unary and streaming gRPC calls to handlers, and know nothing of what the handlers do,
but that an answer may come later (`crdt.waiting.PendingDecision`)."""
