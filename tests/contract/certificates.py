"""Certificates for the tests, made by the openssl program: two authorities, and what they sign."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from trtllm_workers.config.outside import TlsFiles

_DAYS = "2"


class Authority:
    """An authority in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self.ca = folder / "ca.pem"
        self._key = folder / "ca.key"
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", _DAYS, "-subj", "/CN=authority of a test"),
            *("-keyout", str(self._key), "-out", str(self.ca)),
        )

    def signs(self, name: str, alternative: str = "IP:127.0.0.1,DNS:localhost") -> TlsFiles:
        """Return a new certificate for a server or client, beside this authority's own."""
        cert, key, request, extra = (
            self._folder / f"{name}.{end}" for end in ("pem", "key", "csr", "ext")
        )
        extra.write_text(f"subjectAltName={alternative}\n")
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request)),
        )
        self._openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self._key)),
            *("-CAcreateserial", "-days", _DAYS, "-extfile", str(extra), "-out", str(cert)),
        )
        return TlsFiles(self.ca, cert, key)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


def authority(folder: Path) -> Authority:
    """Make an authority, or skip the test where openssl is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl; install it: apt-get install openssl")
    return Authority(folder)
