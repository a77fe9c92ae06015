"""Types of the native core. Arrays are one-dimensional, C-contiguous NumPy arrays on the CPU.

Arguments of another dtype, rank or stride raise ``TypeError``; nothing is cast silently.
"""

import enum
import os
from collections.abc import Sequence
from typing import Final, final

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
UInt32s = npt.NDArray[np.uint32]
UInt8s = npt.NDArray[np.uint8]

# -- Page table -----------------------------------------------------------------------------------

NO_SLOT: Final[int]
"""The slot of an ABSENT copy, -1."""

class Tier(enum.IntEnum):
    """Where a copy can be, highest first. The methods below take these or plain ints 0 to 2."""

    GPU = 0
    RAM = 1
    SSD = 2

class CopyState(enum.IntEnum):
    """What `PageTable.states` answers."""

    ABSENT = 0
    FILLING = 1
    VALID = 2

@final
class TierCounts:
    """Slots of one tier by what they are used for; everything but `slots` adds up to `slots`."""

    @property
    def slots(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def filling(self) -> int: ...
    @property
    def droppable(self) -> int: ...
    @property
    def redundant(self) -> int: ...
    @property
    def dirty(self) -> int: ...
    @property
    def pinned(self) -> int:
        """VALID and pinned; a pinned FILLING copy counts as filling."""

    @property
    def open(self) -> int:
        """VALID, open and not pinned."""

@final
class PageTable:
    """Which page has a copy where, and what may be dropped.

    A page id is ``generation << 32 | index``, never 0 or negative; ids of pages that died are
    stale and never name a new page. A copy is ABSENT, FILLING or VALID; a VALID one is pinned,
    open, or in one of three LRU lists: droppable (clean, or unreferenced in the lowest tier),
    redundant (a VALID copy in a higher tier exists), dirty. Copies join the MRU end of their list
    when they are unpinned, touched, or change lists.

    Every call takes a batch, is O(1) a page, and either does all it is asked or raises and changes
    nothing. Calls that may end a page's life return the ids that died, in order of death. One
    thread owns a table.

    Raises
    ------
    InvariantError: a stale id, or a state that does not allow the call (see each method).
    ValueError: a tier, count or number of slots out of range.
    TypeError: an array of the wrong dtype, rank or stride.
    """

    def __init__(self, gpu: int, ram: int, ssd: int) -> None:
        """Slots per tier, in pages. 0 is legal, not for all; the last with slots is the lowest."""

    # Life of a page
    def create(self, count: int) -> Int64s:
        """New open pages without a copy, refs 1 each."""

    def create_stored(self, tier: int, slots: Int64s) -> Int64s:
        """Sealed, published, unreferenced pages, VALID in these free slots; oldest first."""

    def add_ref(self, ids: Int64s) -> None:
        """One more sequence refers to each page. Refused for a dying page."""

    def release(self, ids: Int64s) -> Int64s:
        """One sequence less refers to each; give the tail of a sequence first. Returns the dead.

        At refs 0 an unpublished page dies, as soon as no copy is pinned or FILLING; a published one
        goes to the MRU end of its lists.
        """

    def publish(self, ids: Int64s) -> None:
        """The prefix index names these pages: sealed, not published, not lost, not dying."""

    def unpublish(self, ids: Int64s) -> Int64s:
        """It does no longer; unreferenced pages die as in `release`. Returns the dead."""

    def seal(self, ids: Int64s) -> None:
        """Open pages, VALID in the GPU tier, become read-only."""

    def reopen(self, ids: Int64s) -> None:
        """Sealed pages become writable: refs 1, not published or lost, VALID in GPU alone."""

    def mark_lost(self, ids: Int64s) -> None:
        """The bytes of these pages are gone; the mark stays until the page dies."""

    # Life of a copy
    def reserve(self, ids: Int64s, tier: int) -> Int64s:
        """ABSENT to FILLING; returns the slots, lowest free first. All or nothing.

        Refused for a dying page, and for an open page that has a copy in any tier.
        """

    def commit(self, ids: Int64s, tier: int) -> Int64s:
        """FILLING to VALID; seals an open page below the GPU tier. Returns the dead."""

    def abort(self, ids: Int64s, tier: int) -> Int64s:
        """FILLING and unpinned to ABSENT. Returns the dead."""

    def drop(self, ids: Int64s, tier: int) -> None:
        """VALID and unpinned to ABSENT. Refused for the last VALID copy of a page."""

    def discard(self, ids: Int64s, tier: int) -> Int64s:
        """VALID and unpinned to ABSENT. Returns the dead.

        Even the last: a page that is referred to is then lost, another dies.
        """

    def pin(self, ids: Int64s, tier: int) -> None:
        """Holds VALID or FILLING copies in place; pins count."""

    def unpin(self, ids: Int64s, tier: int) -> Int64s:
        """Ends one pin of each. Returns the dead: dying pages that this pin held."""

    # Choice of victims
    def touch(self, ids: Int64s) -> None:
        """Moves the copies of each page to the MRU end of their lists, in every tier."""

    def evict(self, tier: int, count: int) -> tuple[Int64s, Int64s]:
        """Drops up to `count` droppable copies, coldest first: (dropped, the dead of them)."""

    def evict_redundant(self, tier: int, count: int) -> tuple[Int64s, Int64s]:
        """Drops up to `count` redundant copies, coldest first: (dropped, dead); none dies."""

    def coldest_dirty(self, tier: int, count: int) -> Int64s:
        """Up to `count` pages from the cold end of the dirty list. Changes nothing."""

    # Questions
    def slots(self, ids: Int64s, tier: int) -> Int64s:
        """Slots of VALID and FILLING copies, `NO_SLOT` for ABSENT."""

    def states(self, ids: Int64s, tier: int) -> UInt8s:
        """`CopyState` of each copy."""

    def pins(self, ids: Int64s, tier: int) -> Int64s: ...
    def refs(self, ids: Int64s) -> Int64s: ...
    def has_pins(self, ids: Int64s) -> Bools:
        """Whether a copy in any tier is pinned."""

    def is_sealed(self, ids: Int64s) -> Bools: ...
    def is_published(self, ids: Int64s) -> Bools: ...
    def is_lost(self, ids: Int64s) -> Bools: ...
    def alive(self, ids: Int64s) -> Bools:
        """Whether each number names a page, dying ones included. Raises nothing for stale ids."""

    def counts(self, tier: int) -> TierCounts: ...
    def check(self) -> None:
        """Verifies every invariant by brute force, O(pages + slots); raises `InvariantError`."""

    @property
    def num_pages(self) -> int:
        """Pages alive, dying ones included."""

    @property
    def lowest_tier(self) -> Tier: ...

# -- Prefix index ---------------------------------------------------------------------------------

@final
class PrefixIndex:
    """Pages of tokens by content: chain hash to page id, and back.

    The key of a page is SHA-256 over its parent (the key of the page before, for a first page a
    root) and its token ids as little-endian uint32. Every entry is a first page, position 0, or
    follows a page that is in the index too, and goes when that one goes. Hashes are 32 bytes; many
    of them are (n, 32) uint8. One thread owns an index.

    Raises
    ------
    ValueError: a token outside 0 to 2**32 - 1, a hash that is not 32 bytes, a number out of range.
    InvariantError: a call that contradicts the index; it has changed nothing.
    TypeError: an array of the wrong dtype, rank or stride.
    """

    def __init__(self, page_tokens: int) -> None:
        """Tokens per page, at least 1."""

    @staticmethod
    def root_hash(parts: Sequence[bytes]) -> bytes:
        """SHA-256 over a tag, then each part after its length as little-endian uint64.

        The tag is the 32 bytes ``b"tiermem prefix root, version 1"`` and two zeros. Different lists
        of parts have different roots, however their bytes are divided.
        """

    def chain(self, parent: bytes, tokens: Int64s | UInt32s) -> UInt8s:
        """The key of each whole page of `tokens`, (n, 32); what is left at the end is not hashed."""

    def insert(self, parent: bytes, key: bytes, page: int, position: int) -> bool:
        """Whether `page` is now what `key` names.

        It is not if the key is taken, or if `position` is not 0 and the page before is not in the
        index. ``InvariantError``: the page has a name; a position that is not 0 after a root or one
        more than that of the page before.
        """

    def insert_many(
        self, parents: UInt8s, keys: UInt8s, pages: Int64s, positions: Int64s
    ) -> Int64s:
        """Inserts the entries of a store that is reopened, in any order.

        Parents and keys may be columns of wider rows.

        Returns the pages that were not taken: a key that was taken, no page before them, or a wrong
        position. ``InvariantError``: a page that has a name, or is given twice.
        """

    def remove(self, pages: Int64s) -> tuple[Int64s, UInt8s]:
        """Takes pages out, and all that follow them.

        Returns all that went, each after its followers, and their keys (n, 32).

        Pages without a name are passed over.
        """

    def match(self, keys: UInt8s) -> Int64s:
        """The pages of the longest prefix of a chain of keys (n, 32) that is in the index."""

    def contains(self, key: bytes) -> bool: ...
    def names(self, pages: Int64s) -> tuple[UInt8s, UInt8s, Int64s, Bools]:
        """What pages are called: keys (n, 32), parents (n, 32), positions, and which have a name.

        Keys, parents and positions of a page without a name are zeros.
        """

    def keys(self, pages: Int64s) -> UInt8s:
        """Keys (n, 32). ``InvariantError``: a page without a name."""

    def pages(self) -> Int64s:
        """Every page of the index, each before the pages that follow it."""

    def raise_parents(self, last_use: Int64s) -> bool:
        """Raise entries of `last_use`, by the lower half of a page's id, so that no page was used longer ago than
        one that follows it; whether anything changed.

        ``ValueError``: it is too short for a page of the index.
        """

    @property
    def size(self) -> int:
        """How many pages have a name."""

    @property
    def page_tokens(self) -> int: ...

# -- Files and I/O --------------------------------------------------------------------------------

class FileCall(enum.Enum):
    """System calls that `FaultOps` can disturb."""

    READ = 0
    WRITE = 1
    ALLOCATE = 2
    SYNC = 3

@final
class FaultOps:
    """Plans which system calls fail, are short or hang: for tests of what is above the engine.

    Calls are counted per kind from 1; `first` and `count` say which. Where several faults name one
    call, the one planned last counts. Reads and writes are seen with `EngineKind.THREADS` only. May be
    used from any thread, also while calls are under way.
    """

    def __init__(self) -> None: ...
    def fail(self, call: FileCall, first: int, error: int, count: int = 1) -> None:
        """They fail with the errno `error`, moving nothing."""

    def shorten(self, call: FileCall, first: int, num_bytes: int, count: int = 1) -> None:
        """They move at most `num_bytes`; 0 is the end of the file. Reads and writes only."""

    def hold(self, call: FileCall, first: int, count: int = 1) -> None:
        """They hang until `release`, then go on."""

    def release(self) -> None:
        """Let every held call go on and forget every `hold`."""

    def wait_held(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` calls are held at once; False when `timeout_s` is over first."""

    def num_calls(self, call: FileCall) -> int: ...

class OpenMode(enum.Enum):
    """What opening a file may change."""

    READ_ONLY = 0
    """The file must be there; nothing about it changes."""
    EXISTING = 1
    """The file must be there, and long enough."""
    CREATE = 2
    """Made if absent, grown to the wanted size if shorter, never shrunk."""

@final
class BlockFile:
    """One preallocated file of bytes, reachable past the page cache and through it.

    Opens `path` (text, bytes or a path object), itself no symbolic link and a regular file, with
    mode 0600 if it is made. With `CREATE` every byte that is added is allocated on the disk, and a
    file that was there keeps its bytes; with the other modes `size_bytes` is the least it must have.

    Raises OSError with errno and filename: ENOSPC if the free space does not suffice (the file is
    then as it was before), ENODATA if the file is shorter than `size_bytes`, ELOOP for a symbolic
    link, EINVAL for anything but a regular file, FileNotFoundError and so on. ValueError: a negative
    `size_bytes`, or 0 with `CREATE`.

    Not to be used by two threads at once. A context manager that closes.
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        size_bytes: int,
        mode: OpenMode,
        *,
        faults: FaultOps | None = None,
    ) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def size_bytes(self) -> int:
        """Length of the file; every operation must lie below it."""

    @property
    def is_direct(self) -> bool:
        """Whether aligned operations bypass the page cache."""

    @property
    def is_closed(self) -> bool: ...
    @property
    def allocated_bytes(self) -> int:
        """Bytes the file takes on the disk, as `du` counts them. Raises OSError."""

    def sync(self) -> None:
        """Return when every write that completed before would survive a loss of power.

        Raises OSError: some of those writes may then be lost, also if a later sync succeeds.
        Releases the GIL.
        """

    def resize(self, size_bytes: int) -> None:
        """Grow the file, allocating what is added, or cut it off. No operation may be in flight.

        Raises OSError (ENOSPC and others; nothing changed) and ValueError for less than 1 byte.
        """

    def close(self) -> None:
        """Let go of the file; operations in flight keep it until they end. Idempotent."""

    def __enter__(self) -> BlockFile: ...
    def __exit__(self, *exception: object) -> None: ...

class EngineKind(enum.Enum):
    """How an `IoEngine` moves bytes."""

    AUTO = 0
    """io_uring where the kernel allows it, else threads."""
    IO_URING = 1
    THREADS = 2

class IoStatus(enum.Enum):
    """What became of a ticket."""

    PENDING = 0
    """Operations are queued or in flight: their memory is not the caller's yet."""
    OK = 1
    """Every byte was moved."""
    FAILED = 2
    """An operation failed and none is in flight; which bytes were moved is not known."""

@final
class IoResult:
    """Status of a ticket; for FAILED the first operation's errno and a text that names it."""

    @property
    def status(self) -> IoStatus: ...
    @property
    def errno(self) -> int:
        """0 unless FAILED. ENODATA: the file ended before the read did."""

    @property
    def message(self) -> str: ...

@final
class IoCounters:
    """Counted since construction, in operations as they were submitted.

    `reads` and `writes` ended well; `errors` are transfers that failed.
    """

    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def reads(self) -> int: ...
    @property
    def writes(self) -> int: ...
    @property
    def errors(self) -> int: ...
    @property
    def in_flight(self) -> int:
        """Operations that have not ended, queued ones too."""

@final
class IoEngine:
    """Asynchronous reads and writes between files and memory.

    Parameters: `queue_depth`, transfers in the kernel at once with io_uring, 1 to 4,096; `num_rings`,
    rings that share them, a thread each, 1 to 16; `num_threads`, transfers under way at once with
    threads, 1 to 256; `piece_bytes`, the wanted size of a transfer, a multiple of 4,096 up to 1 GiB;
    `faults`, for tests, only with THREADS. Raises ValueError for other values and OSError if `kind`
    cannot be had.

    Transfers: the operations of a batch are put into the order of their offsets; long ones are cut
    into transfers of `piece_bytes`, neighbours in the file are joined into transfers of up to 1.25
    of it.

    Ordering: a read that waits starts before every write that waits, but after 16 reads one write
    does; otherwise transfers start in the order of their submission. They end in any order. Nothing
    orders two operations on the same bytes. A transfer takes direct I/O if the file has it and its
    offset, lengths and addresses are multiples of 4,096, else the page cache; so the caller has at
    most one operation in flight on a range of a file.

    Failures: a transfer that moved fewer bytes than asked is continued; a read that meets the end
    of the file fails. When one transfer of a ticket fails, those that have not started never do.

    Threads: one thread submits and registers; the other functions may be called from any. Threads of
    the engine move the bytes: what was queued goes on while nobody polls.
    A context manager that closes and raises TimeoutError if something is still in flight.
    """

    def __init__(
        self,
        kind: EngineKind = ...,
        queue_depth: int = 64,
        num_threads: int = 4,
        num_rings: int = 1,
        piece_bytes: int = 1048576,
        *,
        faults: FaultOps | None = None,
    ) -> None: ...
    @property
    def kind(self) -> EngineKind:
        """The kind in use: IO_URING or THREADS."""

    def submit_read(
        self,
        file: BlockFile,
        offsets: Int64s,
        addresses: Int64s,
        lengths: Int64s,
        tail_addresses: Int64s | None = None,
        tail_length: int = 0,
    ) -> int:
        """Queue a batch and return its ticket, waiting for no operation.

        Operation i moves lengths[i] bytes from offsets[i] of the file to addresses[i], and the
        `tail_length` bytes behind them to tail_addresses[i]. The memory must stay valid until the
        ticket is OK or FAILED; the arrays and the file need not.

        Raises ValueError for arrays of different sizes, an operation beyond the file's
        `size_bytes`, a length below 1 or an address 0; OSError (EBADF) for a closed file;
        RuntimeError after `close`. Nothing was queued then.
        """

    def submit_write(
        self,
        file: BlockFile,
        offsets: Int64s,
        addresses: Int64s,
        lengths: Int64s,
        tail_addresses: Int64s | None = None,
        tail_length: int = 0,
    ) -> int:
        """As `submit_read`, from memory to the file. Durable only after `BlockFile.sync`."""

    def poll(self, ticket: int) -> IoResult:
        """What became of a ticket; kept until `forget`. Raises ValueError for an unknown ticket."""

    def wait(self, ticket: int, timeout_s: float | None = None) -> IoResult:
        """As `poll`, but wait for the end; PENDING when `timeout_s` is over. Releases the GIL."""

    def forget(self, ticket: int) -> None:
        """Drop the result of a ticket; of a pending one as soon as it ends. Raises as `poll`."""

    def register_memory(self, address: int, num_bytes: int) -> tuple[int, int]:
        """Let the kernel pin this memory once instead of for every transfer (io_uring).

        Returns how many bytes from `address` on were registered and the errno that ended it, else 0:
        (0, 0) with threads, which have nothing to register, ENOMEM at the limit of locked memory.
        The memory must stay mapped until `unregister_memory` or until the engine is closed.
        Raises ValueError for values below 1.
        """

    def unregister_memory(self, address: int, num_bytes: int) -> None:
        """Undo every `register_memory` whose range begins within this one, with nothing in flight there."""

    def close(self, timeout_s: float | None = 30.0) -> bool:
        """Refuse new batches and wait until nothing is in flight: True. May be called again.

        When `timeout_s` is over first, operations that have not started are cancelled (ECANCELED);
        False if one is still in flight then: its memory must stay valid for the life of the process.
        """

    def counters(self) -> IoCounters: ...
    def __enter__(self) -> IoEngine: ...
    def __exit__(self, *exception: object) -> None: ...

class IoDirection(enum.Enum):
    """Which way bytes go."""

    READ = 0
    WRITE = 1

def raw_disk_rate(
    file: BlockFile,
    address: int,
    num_bytes: int,
    *,
    direction: IoDirection,
    kind: EngineKind,
    num_at_once: int,
    piece_bytes: int,
    seconds: float,
) -> float:
    """Bytes a second of a plain loop over a file: the ceiling that an `IoEngine` is measured against.

    `num_at_once` threads with pread or pwrite, or one io_uring of that depth, move pieces in the order
    of their offsets between the file and `num_bytes` of memory, used in turns, for `seconds`. Direct I/O
    if the file has it. What the memory holds afterwards means nothing. Raises OSError for a transfer that
    fails or is short, and where io_uring is refused; ValueError for numbers that cannot be. Releases the
    GIL.
    """

# -- Checksum -------------------------------------------------------------------------------------

class ChecksumPath(enum.Enum):
    """Which instructions compute a checksum; the result is the same."""

    AUTO = 0
    PORTABLE = 1
    AVX2 = 2
    AVX512 = 3

def checksum_path_supported(path: ChecksumPath) -> bool: ...
def checksum(address: int, num_bytes: int, path: ChecksumPath = ...) -> int:
    """Return the 64-bit checksum of memory (specified in `native/include/tiermem/checksum.h`).

    Raises ValueError for a negative size, a null address or an unsupported path. The three
    functions release the GIL.
    """

def checksum_slices(
    address: int, slice_bytes: int, num_slices: int, path: ChecksumPath = ...
) -> npt.NDArray[np.uint64]:
    """Return the checksums of consecutive slices, shape (num_slices,). Raises as `checksum`."""

def checksum_pages(
    addresses: Int64s, slice_bytes: int, num_slices: int, path: ChecksumPath = ...
) -> npt.NDArray[np.uint64]:
    """Return the checksums of each page's slices, shape (len(addresses), num_slices).

    Raises as `checksum`.
    """

def checksum_tables() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return key and multiplier of the specification, 128 numbers each."""

# -- Copies ---------------------------------------------------------------------------------------

NUM_COPY_SIZES: Final[int]
"""Sizes that a table of methods tells apart: 2^i to 2^(i+1) - 1 bytes, the last without end."""
NUM_COPY_RUNS: Final[int]
"""Lengths of runs that it tells apart, likewise."""

class StreamOwner(enum.Enum):
    """Whose stream copies are given to: batches and staging are for the device's own alone."""

    DEVICE = 0
    OTHER = 1

@final
class CopyCalls:
    """Addresses of the driver's functions; `copy_batch` may be 0."""

    def __init__(
        self, *, copy: int, copy_batch: int, launch: int, record: int, query: int, wait: int
    ) -> None: ...

@final
class CopyKernel:
    """A kernel's handle and how it is launched; without a handle there is none."""

    def __init__(
        self, *, function: int = 0, blocks: int = 0, threads: int = 0, shared_bytes: int = 0
    ) -> None: ...

@final
class CopyKernels:
    """A kernel for any pieces, and one for addresses and sizes that are multiples of 16."""

    def __init__(self, *, any: CopyKernel, aligned: CopyKernel) -> None: ...  # noqa: A002

@final
class CopyStaging:
    """A ring of stages in device memory, the stream of its kernels, and 2 × stages + 1 events."""

    def __init__(
        self,
        *,
        address: int = 0,
        stage_bytes: int = 0,
        stream: int = 0,
        events: Sequence[int] = (),
    ) -> None: ...

@final
class CopyEngine:
    """Gives batches of copies to a GPU's driver; see `native/include/tiermem/copy_engine.h`.

    Directions: 0 host to device, 1 device to host, 2 within the device. Methods: 0 single calls,
    1 batches, 2 runs through staging, 3 a kernel. Two numbers are for host to device and back.
    """

    def __init__(
        self,
        calls: CopyCalls,
        *,
        link: CopyKernels,
        spread: CopyKernels,
        staging: tuple[CopyStaging, CopyStaging],
        last: tuple[int, int],
        pieces_per_call: int,
    ) -> None: ...
    def choose(self, direction: int, busy: bool, methods: UInt8s) -> None:
        """Set the method for each size and length of runs, (NUM_COPY_SIZES × NUM_COPY_RUNS,).

        `busy`: while the opposite direction has copies in flight.
        """

    def set_borders(self, borders: Int64s) -> None:
        """Set the ascending addresses over which no copy may reach."""

    def warm_up(self, stream: int) -> tuple[str, int] | None:
        """Give `stream` every kernel once, without pieces; the answer is as `submit`'s."""

    def submit(
        self,
        direction: int,
        dst: Int64s,
        src: Int64s,
        num_bytes: Int64s,
        stream: int,
        owner: StreamOwner,
    ) -> tuple[str, int] | None:
        """Give `stream` the pieces; the refused call's name and CUDA's code, or None.

        Releases the GIL. Raises ValueError for lengths that differ or a piece below 1 byte.
        """  # fmt: skip

@final
class MemoryReader:
    """Reads host memory with `num_threads` threads, as fast as it goes: a ceiling of attention on the CPU."""

    def __init__(self, num_threads: int) -> None: ...
    def sum(self, address: int, num_bytes: int) -> int:
        """The sum of all 64-bit words, modulo 2^64; both arguments are multiples of 64. Without the GIL."""

class MemoryToucher:
    """Sets memory to one value with threads of its own, from the first byte on.

    The memory must stay mapped until `stop` has returned or the object is gone.
    """

    def __init__(self, address: int, num_bytes: int, *, value: int, num_threads: int) -> None: ...
    def wait(self, num_bytes: int) -> None:
        """Wait, without the GIL, until the first `num_bytes` bytes are set."""

    def stop(self) -> None:
        """End the threads after what they are doing."""

def move_pieces(dst: Int64s, src: Int64s, num_bytes: Int64s, num_threads: int) -> None:
    """Copy within host memory: dst[i] receives num_bytes[i] bytes of src[i]. Releases the GIL.

    The pieces have no order and must not overlap. Large batches are shared by up to `num_threads`
    threads. Raises ValueError for lengths that differ, a piece below 1 byte, no thread.
    """

# -- Launches -------------------------------------------------------------------------------------

@final
class LaunchCalls:
    """Addresses of the driver's cuLaunchKernelEx, cuCtxGetCurrent, cuCtxSetCurrent, cuGetErrorString."""

    def __init__(
        self, *, launch: int, get_context: int, set_context: int, error_string: int
    ) -> None: ...

@final
class KernelLaunch:
    """A kernel with its grid and its parameters in place; see `native/include/tiermem/kernel_launch.h`.

    Its first `num_changing` parameters are of 64 bits and given at each launch; `fixed` are the
    bytes of the others, 4, 8 or 128 (a tensor map) of each. `context` is the one that `function` is
    loaded in. `early`: it may start while the kernel before it on its stream still runs.

    Raises ValueError for a parameter of another size, or more than 64 of them.
    """

    def __init__(
        self,
        calls: LaunchCalls,
        *,
        name: str,
        function: int,
        context: int,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        early: bool,
        num_changing: int,
        fixed: list[bytes],
    ) -> None: ...
    def launch(self, stream: int, *numbers: int) -> None:
        """Launch on `stream`, whichever context is the thread's current one.

        Releases the GIL; any number of threads may launch at once. Raises RuntimeError with CUDA's
        code and words when the driver refuses, ValueError for another count than `num_changing`,
        TypeError for what is no int from 0 to 2^64 - 1.
        """

# -- Attention on the CPU -------------------------------------------------------------------------

class FloatType(enum.Enum):
    """What stored, query and output items are."""

    FLOAT16 = 0
    BFLOAT16 = 1
    FLOAT32 = 2

class AttentionInstructions(enum.Enum):
    """Which instructions compute attention."""

    AUTO = 0
    """The widest that this processor has."""
    PORTABLE = 1
    AVX2 = 2
    """With FMA and F16C."""
    AVX512 = 3
    AMX = 4
    """With bfloat16, beside AVX-512BW; many query lines over half precision go by its tiles."""

def attention_instructions_supported(instructions: AttentionInstructions) -> bool: ...

@final
class CpuAttention:
    """Attention over pages in host memory, in place; see `native/include/tiermem/cpu_attention.h`.

    `num_threads` counts the thread that calls `attend`; `cpus` are what the others are bound to, one
    each, or none. They keep their CPUs for `spin_s` seconds after a call, in case that another comes
    soon. Raises ValueError for no thread, another number of cpus, instructions that this processor
    lacks, or `spin_s` not from 0 to 1, OSError for a thread that cannot be had or bound.
    """

    def __init__(
        self,
        num_threads: int,
        *,
        cpus: Sequence[int] = ...,
        instructions: AttentionInstructions = ...,
        spin_s: float = ...,
    ) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def instructions(self) -> AttentionInstructions:
        """Those in use: never AUTO."""

    def attend(
        self,
        *,
        kv_type: FloatType,
        num_kv_heads: int,
        page_tokens: int,
        head_dim: int,
        slices: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int32] | None,
        num_pages: npt.NDArray[np.int32],
        kv_end: npt.NDArray[np.int32],
        row_starts: npt.NDArray[np.int32],
        q_start: npt.NDArray[np.int32],
        q: int,
        row_stride: int,
        head_stride: int,
        num_heads: int,
        scale: float,
        window: int | None,
        out: int,
        out_type: FloatType,
        lse: int,
        page_lse: int | None = None,
    ) -> None:
        """Attend; done on return. Releases the GIL. One call at a time; others wait for it.

        `slices` (B, pages) are addresses of the pages' layer slices and `starts`, of the same shape,
        the positions of their first tokens; the other arrays are as in PagedTables. `q`, `out` and
        `lse` are addresses, strides count items, and the output is contiguous.
        `page_lse`, if any, is the address of (rows, num_heads, pages) float32: the log-sum-exp over each
        page's tokens alone, -inf where the row sees none.

        Raises ValueError for shapes that do not fit, and for a page that a row sees whose address
        is 0.
        """

class AttentionStatus(enum.Enum):
    """How far a job of an AttentionQueue is."""

    PENDING = 0
    DONE = 1
    FAILED = 2
    """Its result is NaN."""

@final
class AttentionOutcome:
    """What became of a job."""

    @property
    def status(self) -> AttentionStatus: ...
    @property
    def message(self) -> str:
        """Why it failed, else empty."""

    @property
    def waited_s(self) -> float:
        """From when it was due, all jobs before it ended, until its queries had arrived."""

    @property
    def attended_s(self) -> float:
        """From then to its end."""

    @property
    def bytes_read(self) -> int:
        """Of K and V that some row sees, each once; 0 if the queries never came."""

    @property
    def is_reading(self) -> bool:
        """A thread may still read flag, queries and pages of this failed job: they must stay mapped."""

@final
class AttentionCounters:
    """Since construction; bytes and times of what is done."""

    @property
    def submitted(self) -> int: ...
    @property
    def done(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def waited_s(self) -> float: ...
    @property
    def attended_s(self) -> float: ...

@final
class AttentionQueue:
    """Attention that begins when its queries are there and ends by a flag.

    See `native/include/tiermem/attention_queue.h`. No thread of it ever needs the GIL. `num_threads`,
    `cpus` and `instructions` as CpuAttention, which it owns. Threads keep their CPUs for `spin_s` seconds:
    one while it waits for queries, the others after a job, of which at most one second. Raises as
    CpuAttention, and ValueError for a capacity of 0, a deadline not above 0 and a negative `spin_s`. When
    it is collected, what has not ended fails, which may take a second.
    """

    def __init__(
        self,
        num_threads: int,
        *,
        cpus: Sequence[int] = ...,
        instructions: AttentionInstructions = ...,
        capacity: int = ...,
        deadline_s: float = ...,
        spin_s: float = ...,
    ) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def instructions(self) -> AttentionInstructions: ...
    def submit(
        self,
        *,
        kv_type: FloatType,
        num_kv_heads: int,
        page_tokens: int,
        head_dim: int,
        slices: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int32] | None,
        num_pages: npt.NDArray[np.int32],
        kv_end: npt.NDArray[np.int32],
        row_starts: npt.NDArray[np.int32],
        q_start: npt.NDArray[np.int32],
        q: int,
        row_stride: int,
        head_stride: int,
        num_heads: int,
        scale: float,
        window: int | None,
        out: int,
        out_type: FloatType,
        lse: int,
        ready: tuple[int, int],
        done: tuple[int, int],
        page_lse: int | None = None,
    ) -> int:
        """Queue a job and return its ticket at once. Releases the GIL; copies the arrays.

        Arguments as CpuAttention.attend. `ready` and `done` are the address of a 32-bit word and a
        value: the job begins when the word `ready` has reached its value (as CU_STREAM_WAIT_VALUE_GEQ
        compares), and `done` is set to its value when the result is there, or is NaN for good.

        Raises ValueError as `attend`, and for flags that are no words; RuntimeError if `capacity` jobs
        have not ended, while attention overruns its deadline, and after `close`.
        """

    def poll(self, ticket: int) -> AttentionOutcome:
        """What became of a job; not PENDING once its `done` was seen.

        Raises ValueError for a ticket that was not given out or was forgotten.
        """

    def cancel(self, ticket: int) -> None:
        """The job's queries will not come: it fails in its turn, without waiting. Raises as `poll`."""

    def forget(self, ticket: int) -> None:
        """Drop what is known of a job, which runs all the same. Raises as `poll`."""

    def counters(self) -> AttentionCounters: ...
    def close(self, timeout_s: float) -> bool:
        """Refuse new jobs and wait, without the GIL, until all have ended; fail what has not by then.

        False if a thread still reads for one of them a second after `timeout_s`: its pages and
        queries must then stay mapped. May be called again.
        """

def read_lmdb(
    descriptor: int, most_bytes: int, kind: bytes, row_bytes: int
) -> tuple[UInt8s, list[tuple[bytes, bytes]], str]:
    """All records of an LMDB data file (version 0.9, one table), read by pread and verified in every offset.

    Another process may write it meanwhile: what is returned is one state of it.

    Parameters
    ----------
    descriptor: of the open file.
    most_bytes: a longer file is damaged.
    kind, row_bytes: records whose key starts with this byte and whose key and value are so long together, and end
        in the CRC-32 of all before, are rows.

    Returns
    -------
    The rows, (n, row_bytes), ascending by key; the other records; and what is damaged, empty for a sound file:
    then there are no records.

    Raises
    ------
    OSError: it cannot be read.
    """
