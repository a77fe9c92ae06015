"""Vault: what an encrypted store keeps besides a store: seals of its pages, and memory for what is on its way.

Pages are encrypted into this memory and written from there, while the next ones are encrypted; there is as much of
it as was reserved, and who finds none waits for the oldest writes. Reads arrive where they are wanted, and are
decrypted there.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tiermem.cipher import Bytes, Seal, StoreCipher
from tiermem.cipher_key import SecretKey
from tiermem.errors import TransferError
from tiermem.layout import PageLayout
from tiermem.store_transfer import PART_BYTES, Int64s, StoreTransfer

NUM_BUFFERS = 4
"""Parts of transfers that are on their way to the disk at once."""


class Vault:
    """Encrypts what goes to the slots of one store, decrypts what comes back. Single-threaded."""

    def __init__(self, key: SecretKey, layout: PageLayout) -> None:
        self._cipher = StoreCipher(key, layout)
        self._layout = layout
        self._filling: dict[int, Seal] = {}
        self._known: dict[int, Seal] = {}
        size = max(PART_BYTES // layout.slot_bytes, 1) * layout.slot_bytes
        self._buffers = [mmap.mmap(-1, size) for _ in range(NUM_BUFFERS)]
        for buffer in self._buffers:  # touched now, not while pages are waiting
            np.frombuffer(buffer, dtype=np.uint8)[:: mmap.PAGESIZE] = 0
        self._users: list[StoreTransfer | None] = [None] * NUM_BUFFERS
        self.staging_bytes = size * NUM_BUFFERS

    @property
    def key_id(self) -> bytes:
        """Which key it is."""
        return self._cipher.key_id

    def close(self) -> None:
        """End the threads; nothing may be in flight."""
        self._cipher.close()

    # ---- to the disk -------------------------------------------------------------------------------

    def encrypt_pages(self, transfer: StoreTransfer, slots: Int64s, addresses: Int64s) -> Int64s:
        """Encrypt a part of `transfer`: pages for `slots`; where they are to be written from.

        Raises
        ------
        TransferError: earlier writes did not end in time.
        """
        sources = self._take(transfer, len(slots), self._layout.slot_bytes)
        seals = self._cipher.new_seals(len(slots))
        self._cipher.encrypt(seals, range(self._layout.num_layers), addresses, sources)
        self._filling.update(zip(slots.tolist(), seals, strict=True))
        return sources

    def encrypt_layer(
        self, transfer: StoreTransfer, slots: Int64s, layer: int, addresses: Int64s
    ) -> Int64s:
        """Encrypt one layer of pages that are being filled; as `encrypt_pages`.

        A page whose layer was written before starts anew: nothing is encrypted twice with one seal.
        """
        sources = self._take(transfer, len(slots), self._layout.layer_bytes)
        seals = []
        for slot in slots.tolist():
            seal = self._filling.get(slot)
            if seal is None or seal.tags[layer].any():
                (seal,) = self._cipher.new_seals(1)
                self._filling[slot] = seal
            seals.append(seal)
        self._cipher.encrypt(seals, range(layer, layer + 1), addresses, sources)
        return sources

    def seal_trailers(self, raw: Bytes, slots: Int64s) -> None:
        """Encrypt the trailers of pages that were written, or whose seals are known, in place.

        Raises
        ------
        TransferError: a page lacks layers.
        """
        seals = []
        for slot in slots.tolist():
            known = self._known.pop(slot, None)
            seal = self._filling.pop(slot, known)
            if seal is None or not seal.tags.any(axis=1).all():
                raise TransferError(
                    f"slot {slot} of the SSD tier: not all of its layers were written"
                )
            seals.append(seal)
        self._cipher.seal_trailers(raw, seals)

    # ---- from the disk -----------------------------------------------------------------------------

    def open_trailers(self, raw: Bytes) -> tuple[NDArray[np.uint64], list[Seal | None]]:
        """The checksums in trailers, and their seals; None for one that this key did not make."""
        return self._cipher.open_trailers(raw)

    def known(self, slot: int) -> Seal | None:
        """The seal of what is in `slot`, if it was kept."""
        return self._known.get(slot)

    def know(self, slot: int, seal: Seal | None) -> None:
        """Keep the seal of what is in `slot`, for its slices."""
        if seal is not None:
            self._known[slot] = seal

    def decrypt_pages(self, seals: Sequence[Seal | None], addresses: Int64s) -> NDArray[np.bool_]:
        """Decrypt pages where they lie; which are what was encrypted with these seals."""
        return self._cipher.decrypt(list(seals), range(self._layout.num_layers), addresses)

    def decrypt_layer(self, slots: Int64s, layer: int, addresses: Int64s) -> NDArray[np.bool_]:
        """Decrypt one layer of the pages in `slots`, whose seals are known, where it lies."""
        seals = [self._known.get(slot) for slot in slots.tolist()]
        return self._cipher.decrypt(seals, range(layer, layer + 1), addresses)

    # ---- inside ------------------------------------------------------------------------------------

    def _take(self, transfer: StoreTransfer, count: int, stride: int) -> Int64s:
        """Memory for `count` pieces until `transfer` has ended."""
        assert count * stride <= len(self._buffers[0])
        place = self._free_place()
        if place is None:
            oldest = self._users[0]
            assert oldest is not None
            oldest.wait()
            place = self._free_place()
            assert place is not None
        # the longest unused first, so that the first one is the oldest
        self._buffers.append(self._buffers.pop(place))
        self._users.append(self._users.pop(place))
        self._users[-1] = transfer
        base = np.frombuffer(self._buffers[-1], dtype=np.uint8).ctypes.data
        return base + np.arange(count, dtype=np.int64) * stride

    def _free_place(self) -> int | None:
        for place, user in enumerate(self._users):
            if user is None or user.has_ended:
                return place
        return None
