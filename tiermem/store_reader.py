"""StoreReader: looks into a store without owning it: reads, and never makes, changes or locks anything.

The store may be closed, or in use by a process that writes to it meanwhile. What the index says is one state of
it; which page a slot holds is told by its trailer alone.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tiermem import _core
from tiermem.cipher import StoreCipher
from tiermem.cipher_key import find_key
from tiermem.errors import ConfigError, CorruptPageError
from tiermem.index_image import INDEX_FILE, IndexImage, read_image
from tiermem.layout import PageLayout
from tiermem.private_files import PrivateDirectory
from tiermem.store_content import StoreContent
from tiermem.store_format import MAX_HEADER_BYTES, TRAILER_BYTES, header_key_id, header_layout

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_DIRECTORY = _READ | os.O_DIRECTORY
LOCKS = Path("/proc/locks")
MAX_LOCKS_BYTES = 1 << 24


class StoreReader:
    """The store in the directory `path`.

    layout: of every page in it. slot_stride: bytes of one slot with its trailer. num_slots: whole slots in
    the slot file when the reader was made. key_id: of an encrypted store, else "". cipher: decrypts its pages
    where the environment has the key; else None.

    Raises
    ------
    ConfigError: there is no directory, it is a symbolic link or another user's, no store is in it, or one of
        another format version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory = _open(path)
        try:
            self.layout, self.key_id = self._read_header()
            self.slot_stride = self.layout.slot_bytes + TRAILER_BYTES
            self.slots = self._open_slots()
        except BaseException:
            self._directory.close()
            raise
        self.num_slots = self.slots.size_bytes // self.slot_stride
        self.cipher = self._find_cipher()

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store; a second call does nothing."""
        self.slots.close()
        self._directory.close()
        if self.cipher is not None:
            self.cipher.close()

    @property
    def directory(self) -> PrivateDirectory:
        """The directory, open."""
        return self._directory

    # ---- the index ---------------------------------------------------------------------------------

    def content(self) -> StoreContent:
        """What the index says now. Raises as `image`."""
        return StoreContent.of(self.image())

    def image(self) -> IndexImage:
        """Every record of the index as it is now.

        Raises
        ------
        CorruptPageError: the index is damaged, or missing, or a process wrote to it all the time.
        """
        descriptor = self._open_index()
        try:
            image = read_image(descriptor)
        finally:
            os.close(descriptor)
        if image.damage:
            raise CorruptPageError(f"{self.path / 'index' / INDEX_FILE}: {image.damage}")
        return image

    def _open_index(self) -> int:
        where = self.path / "index"
        try:
            inner = os.open("index", _DIRECTORY, dir_fd=self._directory.descriptor)
            try:
                return _open_file(INDEX_FILE, inner, where / INDEX_FILE)
            finally:
                os.close(inner)
        except (OSError, ConfigError) as error:
            raise CorruptPageError(f"{where}: the index cannot be read: {error}") from error

    # ---- who has it ----------------------------------------------------------------------------------

    def owner_pid(self) -> int | None:
        """The process that has the store open; None where there is none, or the system does not tell."""
        try:
            info = os.stat("lock", dir_fd=self._directory.descriptor, follow_symlinks=False)
            with LOCKS.open("rb") as file:
                lines = file.read(MAX_LOCKS_BYTES).decode("ascii", "replace").splitlines()
        except OSError:
            return None
        place = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
        for line in lines:
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == place and words[4].isdigit():
                return int(words[4])
        return None

    # ---- inside ------------------------------------------------------------------------------------

    @property
    def can_read_pages(self) -> bool:
        """Whether what is in the pages can be told: not without the key of an encrypted store."""
        return not self.key_id or self.cipher is not None

    def _find_cipher(self) -> StoreCipher | None:
        key = find_key(None) if self.key_id else None
        if key is None or key.key_id.hex() != self.key_id:
            return None
        return StoreCipher(key, self.layout)

    def _read_header(self) -> tuple[PageLayout, str]:
        place = self._directory.descriptor
        try:
            header = _open_file("header.json", place, self.path / "header.json")
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path}: no tiermem store: there is no header.json in it; give the directory that was "
                f"ssd_path or --ssd-path"
            ) from None
        with os.fdopen(header, "rb") as file:
            text = file.read(MAX_HEADER_BYTES)
        return header_layout(str(self.path), text), header_key_id(text)

    def _open_slots(self) -> _core.BlockFile:
        os.close(_open_file("slots", self._directory.descriptor, self.path / "slots"))
        return _core.BlockFile(self._directory.reach("slots"), 0, _core.OpenMode.READ_ONLY)


def _open(path: Path) -> PrivateDirectory:
    try:
        return PrivateDirectory.open(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such directory") from None
    except PermissionError as error:
        raise ConfigError(f"{path}: {error.strerror}: run this as the user who owns it") from None


def _open_file(name: str, place: int, path: Path) -> int:
    """A descriptor of the regular file `name` in the directory `place`; ConfigError if it is anything else."""
    try:
        descriptor = os.open(name, _READ, dir_fd=place)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path}: is a symbolic link, which is not followed") from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ConfigError(f"{path}: must be a regular file")
