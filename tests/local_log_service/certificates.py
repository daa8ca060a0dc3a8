"""Certificates for HTTPS, made on the fly by a certificate authority of the service's own."""

import ssl

import trustme


class Certificates:
    """The certificates of one service, which outlive its restarts.

    Attributes:
        context: the server's TLS context for ``*.<endpoint_host>``; what it presents may be changed at any time.
        authority: the CA certificate to trust (PEM).
        other_authority: the one that vouches for what else may be presented (PEM).
    """

    def __init__(self, endpoint_host: str) -> None:
        names = ("*." + endpoint_host, endpoint_host)
        trusted = trustme.CA(organization_name="Local Log Service")
        self._trusted = trusted.issue_cert(*names)
        other = trustme.CA(organization_name="Somebody Else")
        self._untrusted = other.issue_cert(*names)
        self.authority: bytes = trusted.cert_pem.bytes()
        self.other_authority: bytes = other.cert_pem.bytes()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.present(True)

    def present(self, trusted: bool) -> None:
        """Present a certificate to new connections that ``authority`` vouches for, or one that it doesn't."""
        (self._trusted if trusted else self._untrusted).configure_cert(self.context)
