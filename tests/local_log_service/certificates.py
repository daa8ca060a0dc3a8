"""Certificates for HTTPS, made on the fly by a certificate authority of the service's own."""

import ssl
from typing import Tuple

import trustme


def create(endpoint_host: str) -> Tuple[ssl.SSLContext, bytes]:
    """Return a server's TLS context for ``*.<endpoint_host>`` and the CA certificate to trust (PEM)."""
    authority = trustme.CA(organization_name="Local Log Service")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("*." + endpoint_host, endpoint_host).configure_cert(context)
    return context, authority.cert_pem.bytes()
