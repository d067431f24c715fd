"""TLS of listeners for Envoy: certificate, key and, to ask clients for a certificate, the authority of theirs."""

from __future__ import annotations

import ssl


class ServerCertificate:
    context: ssl.SSLContext

    def load(self) -> None: ...

    async def keep_read(self) -> None: ...
