"""Encryption of the SSD tier at rest: AES-256-GCM, each layer of a page on its own, the trailer with them.

Every write of a page draws 96 random bits, from which (by HMAC-SHA256 with the store's key) comes a key of its
own that encrypts only that write: neither a crash nor a clock that goes back makes a nonce used twice. Under that
key the message of layer l has the nonce (l, 0), the trailer's has (2^32 - 1, generation).

What is encrypted is the page and the checksums of its layers. What else the trailer says (provenance, position,
generation) is authenticated with them, as are the tags of the layers. Checksums are of the plain text: they are
compared after decryption.
"""

from __future__ import annotations

import ctypes
import hmac
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiermem.cipher_key import SecretKey
from tiermem.errors import ConfigError
from tiermem.layout import MAX_LAYERS, PageLayout
from tiermem.store_format import TRAILER

CIPHER_NAME = "AES-256-GCM"
CIPHER_NUMBER = 1
"""In a trailer."""
NONCE_BYTES, TAG_BYTES = 12, 16
TAG_WORDS = TAG_BYTES // 8
MOST_LAYERS = MAX_LAYERS // (1 + TAG_WORDS)
"""Whose checksums and tags have room in a trailer."""
MAX_THREADS = 4
SCRATCH_BYTES = 256 << 10

_TRAILER_NONCE = 2**32 - 1
_NONCE = struct.Struct(">IQ")
_HEAD_BYTES = TRAILER.fields["cipher_tag"][1] if TRAILER.fields else 0

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Seal:
    """Of one write of a page: the random bits that its key comes from, and the tag of each layer, (layers, 16)."""

    nonce: bytes
    tags: Bytes


class StoreCipher:
    """Encrypts and decrypts the pages of one store. `close` ends its threads.

    Raises
    ------
    ConfigError: the package cryptography is missing, or the layout has more layers than tags have room.
    """

    def __init__(self, key: SecretKey, layout: PageLayout) -> None:
        if layout.num_layers > MOST_LAYERS:
            raise ConfigError(
                f"num_layers={layout.num_layers}: must be at most {MOST_LAYERS} for an encrypted SSD tier"
            )
        self._ciphers, self._invalid = _library()
        self._key = key
        self._layout = layout
        self._threads = ThreadPoolExecutor(
            min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="tiermem-cipher"
        )

    @property
    def key_id(self) -> bytes:
        """What a store says of its key."""
        return self._key.key_id

    def close(self) -> None:
        """End the threads; nothing may be in progress."""
        self._threads.shutdown()

    # ---- pages -------------------------------------------------------------------------------------

    def new_seals(self, count: int) -> list[Seal]:
        """One for each of `count` pages that are about to be written, without tags."""
        shape = (self._layout.num_layers, TAG_BYTES)
        return [Seal(os.urandom(NONCE_BYTES), np.zeros(shape, np.uint8)) for _ in range(count)]

    def encrypt(self, seals: list[Seal], layers: range, src: Int64s, dst: Int64s) -> None:
        """Encrypt `layers` of pages from `src` to `dst`, where the first of them lies, and enter their tags.

        A layer must be encrypted once only with a seal.
        """

        def one(seal: Seal, src: int, dst: int) -> None:
            key = self._write_key(seal)
            for layer, offset in self._places(layers):
                encryptor = self._gcm(key, layer, 0).encryptor()
                encryptor.update_into(self._view(src + offset), self._view(dst + offset))
                encryptor.finalize()
                seal.tags[layer] = np.frombuffer(encryptor.tag, np.uint8)

        self._each(one, zip(seals, src.tolist(), dst.tolist(), strict=True))

    def decrypt(self, seals: list[Seal | None], layers: range, where: Int64s) -> NDArray[np.bool_]:
        """Decrypt `layers` of pages in place; which of them are what was encrypted with these seals.

        What is not must not be used; a page without a seal never is.
        """

        def one(seal: Seal | None, where: int) -> bool:
            if seal is None:
                return False
            key, scratch = self._write_key(seal), memoryview(bytearray(SCRATCH_BYTES))
            try:
                for layer, offset in self._places(layers):
                    decryptor = self._gcm(key, layer, 0, seal.tags[layer].tobytes()).decryptor()
                    data = self._view(where + offset)
                    for start in range(0, len(data), SCRATCH_BYTES):
                        piece = data[start : start + SCRATCH_BYTES]
                        decryptor.update_into(piece, scratch[: len(piece)])
                        piece[:] = scratch[: len(piece)]
                    decryptor.finalize()
            except self._invalid:
                return False
            return True

        return np.array(self._each(one, zip(seals, where.tolist(), strict=True)), dtype=np.bool_)

    # ---- trailers ----------------------------------------------------------------------------------

    def seal_trailers(self, raw: Bytes, seals: list[Seal]) -> None:
        """Encrypt the checksums in trailers, (pages, 4096), in place, and enter seals, tags and new CRCs."""
        records = raw.view(TRAILER)[:, 0]
        layers = self._layout.num_layers
        for record, row, seal in zip(records, raw, seals, strict=True):
            record["cipher"] = CIPHER_NUMBER
            record["cipher_key"] = np.void(self.key_id)
            record["cipher_nonce"] = np.void(seal.nonce)
            encryptor = self._trailer_gcm(record, seal).encryptor()
            encryptor.authenticate_additional_data(row[:_HEAD_BYTES].tobytes())
            encryptor.authenticate_additional_data(seal.tags.tobytes())
            words = record["checksums"]
            hidden = encryptor.update(words[:layers].tobytes())
            encryptor.finalize()
            words[:layers] = np.frombuffer(hidden, np.uint64)
            words[layers : layers * (1 + TAG_WORDS)] = seal.tags.reshape(-1).view(np.uint64)
            record["cipher_tag"] = np.void(encryptor.tag)
            record["crc"] = zlib.crc32(row[:-4])

    def open_trailers(self, raw: Bytes) -> tuple[NDArray[np.uint64], list[Seal | None]]:
        """The checksums in trailers, (pages, layers), and their seals; None for one that this key did not make."""
        records = np.ascontiguousarray(raw).view(TRAILER)[:, 0]
        sums = np.zeros((len(records), self._layout.num_layers), dtype=np.uint64)
        seals = [
            self._open_trailer(record, row, sums[i])
            for i, (record, row) in enumerate(zip(records, raw, strict=True))
        ]
        return sums, seals

    # ---- inside ------------------------------------------------------------------------------------

    def _open_trailer(self, record: Any, row: Bytes, sums: NDArray[np.uint64]) -> Seal | None:
        if record["cipher"] != CIPHER_NUMBER or record["cipher_key"].tobytes() != self.key_id:
            return None
        layers = self._layout.num_layers
        words = record["checksums"]
        tags = words[layers : layers * (1 + TAG_WORDS)].copy().view(np.uint8)
        seal = Seal(record["cipher_nonce"].tobytes(), tags.reshape(layers, TAG_BYTES))
        decryptor = self._trailer_gcm(record, seal, record["cipher_tag"].tobytes()).decryptor()
        decryptor.authenticate_additional_data(row[:_HEAD_BYTES].tobytes())
        decryptor.authenticate_additional_data(tags.tobytes())
        plain = decryptor.update(words[:layers].tobytes())
        try:
            decryptor.finalize()
        except self._invalid:
            return None
        sums[:] = np.frombuffer(plain, np.uint64)
        return seal

    def _trailer_gcm(self, record: Any, seal: Seal, tag: bytes | None = None) -> Any:
        return self._gcm(self._write_key(seal), _TRAILER_NONCE, int(record["generation"]), tag)

    def _write_key(self, seal: Seal) -> bytes:
        """The key of one write alone."""
        return hmac.digest(self._key.secret, b"tiermem page" + seal.nonce, "sha256")

    def _gcm(self, key: bytes, first: int, second: int, tag: bytes | None = None) -> Any:
        ciphers = self._ciphers
        mode = ciphers.modes.GCM(_NONCE.pack(first, second), tag)
        return ciphers.Cipher(ciphers.algorithms.AES(key), mode)

    def _places(self, layers: range) -> Iterable[tuple[int, int]]:
        """Each layer, and its distance from the first of them."""
        return ((layer, i * self._layout.layer_bytes) for i, layer in enumerate(layers))

    def _view(self, address: int) -> memoryview:
        """A layer's bytes at `address`."""
        kind = ctypes.c_char * self._layout.layer_bytes
        return memoryview(kind.from_address(address)).cast("B")

    def _each(self, one: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """`one` of each, by all threads: the library lets go of the GIL while it encrypts."""
        items = list(arguments)
        if len(items) == 1:
            return [one(*items[0])]
        return list(self._threads.map(lambda item: one(*item), items))


def _library() -> tuple[Any, type[Exception]]:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives import ciphers
        from cryptography.hazmat.primitives.ciphers import algorithms, modes
    except ImportError as error:
        raise ConfigError(
            "an encrypted SSD tier needs the package cryptography: pip install 'tiermem[encryption]'"
        ) from error
    assert algorithms is not None
    assert modes is not None
    return ciphers, InvalidTag
