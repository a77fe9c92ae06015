// Asynchronous reads and writes between files and memory.
//
// An engine knows files, offsets, addresses and lengths; what they mean is its caller's business.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "tiermem/block_file.h"
#include "tiermem/file_ops.h"

namespace tiermem {

// Names one submitted batch; never reused by the same engine, never 0.
using Ticket = std::uint64_t;

enum class EngineKind {
  automatic,  // io_uring where the kernel allows it, else threads
  io_uring,   // the kernel's own queues, by raw system calls; one thread of ours for each ring
  threads,    // worker threads with preadv and pwritev
};

enum class IoDirection { read, write };

enum class IoStatus {
  pending,  // operations are queued or in flight: their memory is not the caller's yet
  ok,       // every byte was moved
  failed,   // one operation failed; none is in flight; which bytes were moved is not known
};

struct IoResult {
  IoStatus status = IoStatus::pending;
  int error = 0;        // errno of the first operation that failed, else 0
  std::string message;  // names that operation, its offset, length and file, else empty
};

// Operation i moves lengths[i] bytes between offset offsets[i] of the file and memory at
// addresses[i]. With tails, tail_length more bytes that lie in the file directly behind those are
// moved to or from tail_addresses[i] by the same operation.
//
// REQUIRES, checked: all arrays of equal size (tail_addresses may be empty: no tails, tail_length
// 0); offsets and lengths such that the operation lies within the file's size_bytes; lengths at
// least 1; addresses not 0.
// REQUIRES, not checked: the memory stays valid until the ticket is ok or failed.
struct IoBatch {
  std::span<const std::int64_t> offsets;
  std::span<const std::int64_t> addresses;
  std::span<const std::int64_t> lengths;
  std::span<const std::int64_t> tail_addresses = {};
  std::int64_t tail_length = 0;
};

// Counted since construction, over all tickets, in operations of the batches, however they were cut
// and joined; in_flight counts operations that have not ended, queued ones too. reads and writes
// count operations that ended well; errors counts transfers that failed.
struct IoCounters {
  std::uint64_t bytes_read = 0;
  std::uint64_t bytes_written = 0;
  std::uint64_t reads = 0;
  std::uint64_t writes = 0;
  std::uint64_t errors = 0;
  std::uint64_t in_flight = 0;
};

inline constexpr std::int64_t kDefaultPieceBytes = std::int64_t{1} << 20;

struct IoEngineOptions {
  EngineKind kind = EngineKind::automatic;
  std::int64_t queue_depth = 64;  // io_uring: transfers in the kernel at once, 1 to 4,096
  std::int64_t num_threads = 4;   // threads: transfers under way at once, 1 to 256
  std::int64_t num_rings = 1;     // io_uring: rings that share the depth, a thread each, 1 to 16
  // Wanted size of one transfer, a multiple of kDirectAlignment up to 1 GiB.
  std::int64_t piece_bytes = kDefaultPieceBytes;
  std::shared_ptr<FileOps> file_ops = {};  // for tests: what threads call in place of the system
};

// How much of a range was registered, and why it was not all of it.
struct Registration {
  std::uint64_t bytes = 0;
  int error = 0;  // errno that ended it (ENOMEM: the limit of locked memory), else 0
};

// Transfers. The operations of a batch are put into the order of their offsets and made transfers:
// one larger than piece_bytes is cut into transfers of piece_bytes, the last of half of that to one
// and a half; neighbours, where the next begins at the byte at which one ends and both or none may
// be direct, are joined into one transfer of up to 1.25 piece_bytes.
//
// Ordering. A read that waits starts before every write that waits, but one write starts after
// kReadsPerWrite reads, so that none waits for ever. Otherwise transfers start in the order of
// their submission. They end in any order. Nothing orders two operations on the same bytes, of one
// ticket or of several.
//
// Direct and buffered. A transfer bypasses the page cache if the file has a direct descriptor and
// its offset, lengths and addresses are all multiples of kDirectAlignment; else it goes through the
// page cache. Mixing both on one range is coherent only while they do not overlap in time: the
// caller has at most one operation in flight on a range of a file.
//
// Failures. A transfer that moved fewer bytes than asked continues where it stopped. A read that
// meets the end of the file fails with ENODATA. EINTR and EAGAIN are retried. Any other error fails
// the ticket; its transfers that have not started by then never do. Whether a ticket is ok or
// failed, all its operations have ended: the memory is the caller's again.
//
// Threads. One thread submits and registers. The other functions may be called from any thread.
// Worker threads of the engine do the rest: what was queued goes on while nobody polls.
class IoEngine {
 public:
  IoEngine() = default;
  IoEngine(const IoEngine&) = delete;
  IoEngine& operator=(const IoEngine&) = delete;

  // Without an earlier close(), closes and waits kDestructorTimeoutS for what is in flight. What is
  // in flight even then is left to its worker thread, which ends by itself when it ends.
  virtual ~IoEngine() = default;
  static constexpr double kDestructorTimeoutS = 30.0;
  static constexpr unsigned kReadsPerWrite = 16;

  // The kind in use: io_uring or threads.
  virtual EngineKind kind() const noexcept = 0;

  // Queues a batch and returns without waiting for any operation, however many there are. A batch
  // without operations is ok at once. io_uring may hold a file that was closed until a later batch
  // ends or the engine is destroyed.
  // Throws std::invalid_argument for a batch that breaks IoBatch's requirements, FileError (EBADF)
  // for a closed file, std::logic_error after close(), std::system_error if the kernel's queue
  // broke down; nothing was queued then.
  virtual Ticket submit(IoDirection direction, const BlockFile& file, const IoBatch& batch) = 0;

  // What became of a ticket. Results are kept until forget(). Never blocks on I/O.
  // Throws std::invalid_argument for a ticket that was not given out or was forgotten.
  virtual IoResult poll(Ticket ticket) = 0;

  // As poll(), but waits until the ticket is ok or failed, or timeout_s seconds (infinity: for
  // ever) are over: then it is pending. Throws as poll().
  virtual IoResult wait(Ticket ticket, double timeout_s) = 0;

  // Drops the result of a ticket; of a pending one as soon as it ends. Throws as poll().
  virtual void forget(Ticket ticket) = 0;

  // Lets the kernel look up and pin this memory once instead of for every transfer: io_uring, in
  // pieces of up to 1 GiB, as far as the kernel and the limit of locked memory allow; threads have
  // nothing to register. Transfers to and from any memory work without it.
  // REQUIRES: the memory stays mapped until unregister_memory() or close(); the range overlaps no
  // registered one. Throws std::invalid_argument for address or bytes below 1.
  virtual Registration register_memory(std::int64_t address, std::int64_t bytes) = 0;

  // Undoes every register_memory() whose range begins within [address, address + bytes).
  // REQUIRES: no operation in flight from or to it.
  virtual void unregister_memory(std::int64_t address, std::int64_t bytes) = 0;

  // Refuses new batches, waits until nothing is in flight, and ends the worker threads: true. When timeout_s is over first,
  // operations that have not started are cancelled (ECANCELED), and if one is still in flight then:
  // false. The caller must then keep that memory for the life of the process.
  // Results can still be asked for. May be called again.
  virtual bool close(double timeout_s) = 0;

  // Never blocks, also while another thread waits.
  virtual IoCounters counters() const noexcept = 0;
};

// REQUIRES: file_ops only with EngineKind::threads; io_uring has no such seam.
// Throws std::invalid_argument for options out of range, std::system_error if `kind` cannot be had
// (io_uring: ENOSYS, EPERM where the kernel or a container refuses it).
std::unique_ptr<IoEngine> make_io_engine(const IoEngineOptions& options = {});

}  // namespace tiermem
