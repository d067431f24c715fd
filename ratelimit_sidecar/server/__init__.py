"""Front ends: they carry unary gRPC calls to handlers, and know nothing of what the handlers do."""
