// How operations become transfers, in which order those start, and which memory is registered.
#include <array>
#include <cstring>
#include <map>
#include <thread>

#include "../src/io_plan.h"
#include "../src/io_queue.h"
#include "../src/registered_memory.h"
#include "check.h"
#include "io_support.h"
#include "tiermem/fault_ops.h"

namespace {

using tiermem::BlockFile;
using tiermem::EngineKind;
using tiermem::FaultOps;
using tiermem::FileCall;
using tiermem::IoDirection;
using tiermem::IoEngine;
using tiermem::IoOperation;
using tiermem::IoPlan;
using tiermem::IoQueue;
using tiermem::IoStatus;
using tiermem::OpenMode;
using tiermem::RegisteredMemory;
using tiermem::Ticket;
using namespace tiermem_test;

constexpr std::array kKinds = {EngineKind::io_uring, EngineKind::threads};
constexpr std::size_t kSlots = 96;
constexpr std::size_t kPieceBytes = 4 * kPage;
constexpr std::size_t kRounds = 5;

const BlockFile::Descriptors& no_files() {
  static const auto files = std::make_shared<BlockFile::Descriptors>();
  return *files;
}

IoPlan plan(const Batch& batch, std::size_t piece_bytes = kPieceBytes) {
  return plan_transfers(1, IoDirection::read, no_files(), batch.view(), piece_bytes);
}

std::size_t bytes_of(const IoOperation& transfer) {
  std::size_t bytes = 0;
  for (const iovec& segment : transfer.segments()) bytes += segment.iov_len;
  return bytes;
}

void test_neighbours_are_joined_up_to_a_quarter_above_a_piece() {
  Batch batch;
  for (const std::size_t page : {5, 3, 4, 2, 6, 9}) {
    batch.add(page * kPage, static_cast<std::int64_t>((100 - 2 * page) * kPage), kPage);
  }
  const IoPlan made = plan(batch);
  CHECK(made.transfers.size() == 2);
  CHECK(made.transfers[0].offset() == 2 * kPage && bytes_of(made.transfers[0]) == 5 * kPage);
  CHECK(made.transfers[0].segments().size() == 5 && made.transfers[0].share().num_operations == 5);
  CHECK(made.transfers[1].offset() == 9 * kPage && made.transfers[1].share().num_operations == 1);
  CHECK(made.num_pieces.empty());
}

void test_neighbours_in_memory_too_become_one_segment() {
  Batch batch;
  for (const std::size_t page : {1, 2, 3}) {
    batch.add(page * kPage, static_cast<std::int64_t>((10 + page) * kPage), kPage);
  }
  const IoPlan made = plan(batch);
  CHECK(made.transfers.size() == 1 && made.transfers[0].segments().size() == 1);
  CHECK(made.transfers[0].segments()[0].iov_len == 3 * kPage);
}

void test_an_unaligned_neighbour_stays_apart() {
  Batch batch;
  batch.add(0, kPage, kPage);
  batch.add(kPage, 3 * kPage + 512, kPage);
  batch.add(2 * kPage, 5 * kPage, kPage);
  CHECK(plan(batch).transfers.size() == 3);
}

void test_the_last_piece_is_half_to_one_and_a_half() {
  for (std::size_t pages = 1; pages <= 40; ++pages) {
    for (const std::size_t tail : {std::size_t{0}, kPage}) {
      Batch batch = one(7 * kPage, 100 * kPage, pages * kPage);
      if (tail > 0) {
        batch.tail_addresses.push_back(1000 * kPage);
        batch.tail_length = static_cast<std::int64_t>(tail);
      }
      const IoPlan made = plan(batch);
      std::size_t end = 7 * kPage;
      for (std::size_t i = 0; i < made.transfers.size(); ++i) {
        const IoOperation& piece = made.transfers[i];
        const bool is_last = i + 1 == made.transfers.size();
        CHECK(piece.offset() == end);
        CHECK(is_last ? 2 * bytes_of(piece) >= kPieceBytes || i == 0
                      : bytes_of(piece) == kPieceBytes);
        CHECK(2 * bytes_of(piece) < 3 * kPieceBytes);
        end += bytes_of(piece);
      }
      CHECK(end == 7 * kPage + pages * kPage + tail);
      const bool is_cut = made.transfers.size() > 1;
      CHECK(made.num_pieces.size() == (is_cut ? 1 : 0));
      CHECK(!is_cut || made.num_pieces[0] == made.transfers.size());
    }
  }
}

// Whatever the batch, each byte of the file belongs to the byte of memory that the batch named.
// Compared every 4 bytes: cuts lie at multiples of that.
void test_random_plans_cover_every_byte_once() {
  std::mt19937_64 random(11);
  for (int round = 0; round < 40; ++round) {
    const std::size_t step = random() % 3 == 0 ? 100 : kPage;
    const bool has_tails = random() % 2 == 0;
    Batch batch;
    std::map<std::uint64_t, std::uint64_t> wanted;  // file byte -> memory byte, per 4 bytes
    std::size_t offset = 0;
    std::uint64_t memory = 1 << 20;
    if (has_tails) batch.tail_length = static_cast<std::int64_t>(step);
    for (int i = 0; i < 30; ++i) {
      offset += random() % 2 * step;
      memory += random() % 2 * step;
      const std::size_t length = step * (1 + random() % 12);
      const auto tail = static_cast<std::uint64_t>((std::uint64_t{1} << 40) + i * 2 * step);
      batch.add(offset, static_cast<std::int64_t>(memory), length);
      for (std::size_t at = 0; at < length; at += 4) wanted[offset + at] = memory + at;
      offset += length;
      memory += length;
      if (!has_tails) continue;
      batch.tail_addresses.push_back(static_cast<std::int64_t>(tail));
      for (std::size_t at = 0; at < step; at += 4) wanted[offset + at] = tail + at;
      offset += step;
    }
    std::vector<std::size_t> order(batch.offsets.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    Batch shuffled;
    shuffled.tail_length = batch.tail_length;
    for (const std::size_t i : order) {
      shuffled.offsets.push_back(batch.offsets[i]);
      shuffled.addresses.push_back(batch.addresses[i]);
      shuffled.lengths.push_back(batch.lengths[i]);
      if (has_tails) shuffled.tail_addresses.push_back(batch.tail_addresses[i]);
    }
    const IoPlan made = plan(shuffled);
    std::map<std::uint64_t, std::uint64_t> found;
    std::uint64_t operations = made.num_pieces.size();
    std::uint64_t num_doubled = 0;
    for (const IoOperation& transfer : made.transfers) {
      std::uint64_t at = transfer.offset();
      operations += transfer.share().num_operations;
      for (const iovec& segment : transfer.segments()) {
        const auto base = reinterpret_cast<std::uintptr_t>(segment.iov_base);
        for (std::size_t i = 0; i < segment.iov_len; i += 4) {
          num_doubled += !found.emplace(at + i, base + i).second;
        }
        at += segment.iov_len;
      }
    }
    CHECK(found == wanted);
    CHECK(num_doubled == 0);
    CHECK(operations == batch.offsets.size());
  }
}

std::vector<IoOperation> transfers(IoDirection direction, std::size_t count) {
  std::vector<IoOperation> made;
  for (std::size_t i = 0; i < count; ++i) {
    made.emplace_back(1, direction, no_files(), i, std::vector<iovec>{{nullptr, 1}},
                      tiermem::IoShare{});
  }
  return made;
}

void test_reads_go_first_and_writes_go_on() {
  constexpr unsigned kTurn = IoEngine::kReadsPerWrite;
  IoQueue queue;
  queue.push(transfers(IoDirection::write, 3));
  CHECK(queue.pop().direction() == IoDirection::write);
  queue.push(transfers(IoDirection::read, 3 * kTurn));
  for (unsigned i = 0; i < 2 * (kTurn + 1); ++i) {
    const IoOperation next = queue.pop();
    const bool is_writes_turn = i % (kTurn + 1) == kTurn;
    CHECK((next.direction() == IoDirection::write) == is_writes_turn);
  }
  for (unsigned i = 0; i < kTurn; ++i) CHECK(queue.pop().direction() == IoDirection::read);
  CHECK(queue.empty());
}

void test_registered_ranges_are_found_whole() {
  RegisteredMemory memory(2);
  memory.add(1000, 500, *memory.free_number());
  memory.add(1500, 100, *memory.free_number());
  CHECK(!memory.free_number());
  CHECK(memory.find(1000, 500) == 0U && memory.find(1499, 1) == 0U);
  CHECK(memory.find(1500, 100) == 1U);
  CHECK(!memory.find(999, 1) && !memory.find(1499, 2) && !memory.find(1600, 1));
  CHECK(!memory.find(1000, 501) && !memory.find(1550, UINT64_MAX));
  CHECK(memory.remove(1001, 100).empty());
  CHECK(memory.remove(900, 101) == std::vector<std::uint32_t>{0});
  CHECK(!memory.find(1000, 1) && memory.find(1500, 1) == 1U);
  CHECK(memory.free_number() == 0U);
}

// A thread hangs in a write; the reads that are queued after many writes start before those.
void test_a_read_overtakes_queued_writes() {
  const TemporaryPath path("overtake");
  const auto faults = std::make_shared<FaultOps>();
  const auto file = BlockFile::open(path.get(), 64 * kPage, OpenMode::create);
  tiermem::IoEngineOptions options;
  options.kind = EngineKind::threads;
  options.num_threads = 1;
  options.piece_bytes = kPage;
  options.file_ops = faults;
  const auto engine = tiermem::make_io_engine(options);
  const Memory memory(64 * kPage);
  Batch writes;
  for (std::size_t i = 0; i < 20; ++i) writes.add(2 * i * kPage, memory.address(), kPage);
  faults->hold(FileCall::write, 1);
  faults->hold(FileCall::write, 2);
  const Ticket writing = engine->submit(IoDirection::write, *file, writes.view());
  CHECK(faults->wait_held(1, kWaitS));
  const auto range = one(50 * kPage, memory.address(kPage), kPage);
  const Ticket reading = engine->submit(IoDirection::read, *file, range.view());
  faults->release();
  CHECK(engine->wait(reading, kWaitS).status == IoStatus::ok);
  CHECK(engine->wait(writing, kWaitS).status == IoStatus::ok);
  CHECK(memory.is_all(std::byte{0}, kPage, 2 * kPage));
}

// One place in the kernel: a hanging read of a pipe keeps it, a file read overtakes the writes.
void test_a_read_overtakes_queued_writes_of_io_uring() {
  const auto engine = make_engine(EngineKind::io_uring, 1, kPage);
  if (!engine) return;
  const TemporaryPath path("overtake-uring");
  const auto file = BlockFile::open(path.get(), 64 * kPage, OpenMode::create);
  Pipe held = make_pipe();
  Pipe later = make_pipe();
  const auto holder = BlockFile::adopt({}, std::move(held.read_end), kPage, "pipe");
  const auto waiter = BlockFile::adopt({}, std::move(later.read_end), kPage, "pipe");
  const Memory memory(8 * kPage);
  engine->submit(IoDirection::read, *holder, one(0, memory.address(), 1).view());
  Batch writes;
  for (std::size_t i = 0; i < 20; ++i) writes.add(2 * i * kPage, memory.address(kPage), kPage);
  const Ticket writing = engine->submit(IoDirection::write, *file, writes.view());
  const Ticket reading =
      engine->submit(IoDirection::read, *waiter, one(0, memory.address(4 * kPage), 1).view());
  CHECK(::write(held.write_end.get(), "a", 1) == 1);
  // The second pipe's read took the place: no write can have started.
  CHECK(engine->wait(writing, 0.05).status == IoStatus::pending);
  CHECK(engine->counters().writes == 0 && engine->counters().bytes_written == 0);
  CHECK(::write(later.write_end.get(), "b", 1) == 1);
  CHECK(engine->wait(reading, kWaitS).status == IoStatus::ok);
  CHECK(engine->wait(writing, kWaitS).status == IoStatus::ok);
}

struct World {
  Memory memory;
  Memory tails;
  std::vector<std::byte> file;
};

// Random batches of slots with and without tails against an oracle; joined, cut and registered.
void test_random_batches(EngineKind kind, std::int64_t num_rings, std::int64_t piece_bytes,
                         const std::shared_ptr<FaultOps>& faults) {
  constexpr std::size_t kSlotBytes = 5 * kPage;
  constexpr std::size_t kStride = kSlotBytes + kPage;
  tiermem::IoEngineOptions options;
  options.kind = kind;
  options.queue_depth = 6;
  options.num_rings = num_rings;
  options.num_threads = 3;
  options.piece_bytes = piece_bytes;
  options.file_ops = faults;
  if (kind == EngineKind::io_uring && !make_engine(kind)) return;
  const auto engine = tiermem::make_io_engine(options);
  const TemporaryPath path("random");
  const auto file = BlockFile::open(path.get(), kSlots * kStride, OpenMode::create);
  std::mt19937_64 random(static_cast<std::uint64_t>(piece_bytes));
  World world{Memory(kSlots * kSlotBytes), Memory(kSlots * kPage), {}};
  world.file.resize(kSlots * kStride);
  const auto half = static_cast<std::int64_t>(world.memory.size() / 2);
  const auto registered = engine->register_memory(world.memory.address(), half);
  CHECK(kind == EngineKind::threads ? registered.bytes == 0 && registered.error == 0
                                    : registered.bytes == world.memory.size() / 2 ||
                                          registered.error != 0);
  std::array<std::size_t, kSlots> slots;
  for (std::size_t i = 0; i < kSlots; ++i) slots[i] = i;
  for (std::size_t round = 0; round < kRounds; ++round) {
    if (faults) {
      for (int i = 0; i < 30; ++i) {
        const FileCall call = random() % 2 == 0 ? FileCall::read : FileCall::write;
        const std::uint64_t at = faults->num_calls(call) + 1 + random() % 150;
        if (random() % 3 == 0) {
          faults->fail(call, at, random() % 2 == 0 ? EINTR : EAGAIN);
        } else {
          faults->shorten(call, at, 1 + random() % (3 * kPage));
        }
      }
    }
    world.memory.fill(random);
    world.tails.fill(random);
    std::shuffle(slots.begin(), slots.end(), random);
    const std::size_t count = 1 + random() % kSlots;
    const bool has_tails = random() % 3 != 0;
    Batch batch;
    if (has_tails) batch.tail_length = kPage;
    for (std::size_t i = 0; i < count; ++i) {
      batch.add(slots[i] * kStride, world.memory.address(i * kSlotBytes), kSlotBytes);
      if (has_tails) batch.tail_addresses.push_back(world.tails.address(i * kPage));
      std::byte* place = world.file.data() + slots[i] * kStride;
      std::memcpy(place, &world.memory[i * kSlotBytes], kSlotBytes);
      if (has_tails) std::memcpy(place + kSlotBytes, &world.tails[i * kPage], kPage);
    }
    const Ticket writing = engine->submit(IoDirection::write, *file, batch.view());
    CHECK(engine->wait(writing, kWaitS).status == IoStatus::ok);
    engine->forget(writing);
    // Back in another order into other places, two tickets at once.
    world.memory.poison();
    world.tails.poison();
    std::array<Batch, 2> reads;
    std::shuffle(slots.begin(), slots.end(), random);
    for (std::size_t i = 0; i < kSlots; ++i) {
      Batch& read = reads[i % 2];
      read.tail_length = kPage;
      read.add(slots[i] * kStride, world.memory.address(i * kSlotBytes), kSlotBytes);
      read.tail_addresses.push_back(world.tails.address(i * kPage));
    }
    std::array<Ticket, 2> tickets;
    for (std::size_t i = 0; i < 2; ++i) {
      tickets[i] = engine->submit(IoDirection::read, *file, reads[i].view());
    }
    for (const Ticket ticket : tickets) CHECK(engine->wait(ticket, kWaitS).status == IoStatus::ok);
    for (std::size_t i = 0; i < kSlots; ++i) {
      const std::byte* place = world.file.data() + slots[i] * kStride;
      CHECK(std::memcmp(&world.memory[i * kSlotBytes], place, kSlotBytes) == 0);
      CHECK(std::memcmp(&world.tails[i * kPage], place + kSlotBytes, kPage) == 0);
    }
    if (round == kRounds / 2) {
      engine->unregister_memory(world.memory.address(),
                                static_cast<std::int64_t>(world.memory.size()));
    }
  }
  const auto counters = engine->counters();
  CHECK(counters.in_flight == 0 && counters.errors == 0);
  CHECK(counters.reads == kRounds * kSlots);
  CHECK(counters.bytes_read == kRounds * kSlots * kStride);
  CHECK(engine->close(kWaitS));
}

// A piece of a cut operation fails: the ticket does, the operation counts as neither good nor left.
void test_a_failed_piece_fails_its_operation() {
  const TemporaryPath path("piece");
  const auto faults = std::make_shared<FaultOps>();
  const auto file = BlockFile::open(path.get(), 64 * kPage, OpenMode::create);
  tiermem::IoEngineOptions options;
  options.kind = EngineKind::threads;
  options.num_threads = 2;
  options.piece_bytes = kPieceBytes;
  options.file_ops = faults;
  const auto engine = tiermem::make_io_engine(options);
  const Memory memory(64 * kPage);
  for (std::uint64_t call = 1; call <= 8; ++call) {
    faults->fail(FileCall::read, faults->num_calls(FileCall::read) + call, EIO);
    Batch batch = one(0, memory.address(), 8 * kPieceBytes);
    batch.add(40 * kPage, memory.address(40 * kPage), kPage);
    const Ticket ticket = engine->submit(IoDirection::read, *file, batch.view());
    const auto result = engine->wait(ticket, kWaitS);
    CHECK(result.status == IoStatus::failed && result.error == EIO);
    CHECK(engine->counters().in_flight == 0);
    CHECK(engine->counters().errors == call);
    CHECK(engine->counters().reads <= call);  // the second operation at most
  }
}

void test_memory_that_cannot_be() {
  for (const EngineKind kind : kKinds) {
    const auto engine = make_engine(kind);
    if (!engine) continue;
    for (const std::int64_t bad : {-1, 0}) {
      CHECK_THROWS(std::invalid_argument, engine->register_memory(bad, 10));
      CHECK_THROWS(std::invalid_argument, engine->register_memory(10, bad));
      CHECK_THROWS(std::invalid_argument, engine->unregister_memory(10, bad));
    }
    // An address that no process has mapped.
    const auto done = engine->register_memory(kPage, kPage);
    CHECK(done.bytes == 0 && (kind == EngineKind::threads || done.error != 0));
  }
}

}  // namespace

int main() {
  test_neighbours_are_joined_up_to_a_quarter_above_a_piece();
  test_neighbours_in_memory_too_become_one_segment();
  test_an_unaligned_neighbour_stays_apart();
  test_the_last_piece_is_half_to_one_and_a_half();
  test_random_plans_cover_every_byte_once();
  test_reads_go_first_and_writes_go_on();
  test_registered_ranges_are_found_whole();
  test_a_read_overtakes_queued_writes();
  test_a_read_overtakes_queued_writes_of_io_uring();
  for (const std::int64_t pages : {1, 2, 4, 16, 64}) {
    const auto piece = static_cast<std::int64_t>(pages * kPage);
    test_random_batches(EngineKind::io_uring, 1, piece, nullptr);
    test_random_batches(EngineKind::io_uring, 3, piece, nullptr);
    test_random_batches(EngineKind::threads, 1, piece, std::make_shared<FaultOps>());
  }
  test_a_failed_piece_fails_its_operation();
  test_memory_that_cannot_be();
  return tiermem_test::report("io_transfers");
}
