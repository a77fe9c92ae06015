"""The key of an encrypted SSD tier: 32 bytes from a private file or the environment, shown to nobody."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from tiermem.errors import ConfigError

KEY_VARIABLE = "TIERMEM_SSD_KEY"
KEY_BYTES = 32
KEY_ID_BYTES = 16
MOST_BYTES = 1024
WANTED = f"{KEY_BYTES} bytes, or the same as {2 * KEY_BYTES} hexadecimal digits or in base64"


@dataclass(frozen=True, slots=True, eq=False)
class SecretKey:
    """A key; its text tells which, not what it is."""

    secret: bytes = field(repr=False)

    @property
    def key_id(self) -> bytes:
        """Tells keys apart without telling anything of them."""
        return hmac.digest(self.secret, b"tiermem key id", "sha256")[:KEY_ID_BYTES]

    def __repr__(self) -> str:
        return f"SecretKey(id={self.key_id.hex()})"


def find_key(path: Path | None) -> SecretKey | None:
    """The key in the file at `path`, else the one in the environment, else None.

    Raises
    ------
    ConfigError: the file is not one that only this user or root can read, or what is there is no key. The
        message never repeats what was read.
    """
    if path is not None:
        return _parse(_read(path), f"ssd_key_file={str(path)!r}")
    text = os.environ.get(KEY_VARIABLE)
    return None if text is None else _parse(text.encode(errors="replace"), KEY_VARIABLE)


def _read(path: Path) -> bytes:
    name = f"ssd_key_file={str(path)!r}"
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{name}: must be a regular file")
        if info.st_uid not in (os.geteuid(), 0) or info.st_mode & 0o077:
            raise ConfigError(
                f"{name}: belongs to user {info.st_uid} with mode {stat.S_IMODE(info.st_mode):04o}; must belong "
                f"to user {os.geteuid()} or root, with mode 0600 or less"
            )
        return file.read(MOST_BYTES + 1)


def _parse(data: bytes, name: str) -> SecretKey:
    secret = _decoded(data)
    if secret is None or len(set(secret)) == 1:
        raise ConfigError(f"{name}: holds no key; must hold {WANTED}, chosen at random")
    return SecretKey(secret)


def _decoded(data: bytes) -> bytes | None:
    if len(data) == KEY_BYTES:
        return data
    text = data.strip()
    try:
        if len(text) == 2 * KEY_BYTES:
            return binascii.unhexlify(text)
        secret = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return secret if len(secret) == KEY_BYTES else None
