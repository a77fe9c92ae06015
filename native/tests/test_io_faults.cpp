#include "tiermem/fault_ops.h"

#include <sys/stat.h>

#include <cstring>
#include <thread>

#include "check.h"
#include "io_support.h"

namespace {

using tiermem::BlockFile;
using tiermem::EngineKind;
using tiermem::FaultOps;
using tiermem::FileCall;
using tiermem::IoDirection;
using tiermem::IoEngine;
using tiermem::IoStatus;
using tiermem::OpenMode;
using tiermem::Ticket;
using namespace tiermem_test;

constexpr std::size_t kSlotBytes = 3 * kPage;
constexpr std::size_t kTailBytes = kPage;
constexpr std::size_t kNumSlots = 64;
constexpr std::uint64_t kGrownBytes = std::uint64_t{8} << 20;
constexpr std::size_t kFileBytes = kNumSlots * (kSlotBytes + kTailBytes);

std::unique_ptr<IoEngine> make_faulty(const std::shared_ptr<FaultOps>& faults,
                                      std::int64_t num_threads,
                                      std::int64_t piece_bytes = kPage) {
  tiermem::IoEngineOptions options;
  options.piece_bytes = piece_bytes;
  options.kind = EngineKind::threads;
  options.num_threads = num_threads;
  options.file_ops = faults;
  return tiermem::make_io_engine(options);
}

Batch slots_with_tails(const Memory& slots, const Memory& tails) {
  Batch batch;
  batch.tail_length = kTailBytes;
  for (std::size_t i = 0; i < kNumSlots; ++i) {
    batch.add(i * (kSlotBytes + kTailBytes), slots.address(i * kSlotBytes), kSlotBytes);
    batch.tail_addresses.push_back(tails.address(i * kTailBytes));
  }
  return batch;
}

void plan_harmless_faults(FaultOps& faults, std::mt19937_64& random) {
  for (const FileCall call : {FileCall::read, FileCall::write}) {
    for (int i = 0; i < 60; ++i) {
      const std::uint64_t first = faults.num_calls(call) + 1 + random() % 200;
      switch (random() % 4) {
        case 0: faults.fail(call, first, EINTR); break;
        case 1: faults.fail(call, first, EAGAIN); break;
        case 2: faults.shorten(call, first, 1 + random() % (kSlotBytes + kTailBytes)); break;
        case 3: faults.shorten(call, first, kPage * (1 + random() % 3)); break;
      }
    }
  }
}

void test_interrupted_and_short_transfers_move_every_byte() {
  const TemporaryPath path("storm");
  const auto faults = std::make_shared<FaultOps>();
  const auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  const auto engine = make_faulty(faults, 4);
  std::mt19937_64 random(17);
  for (int round = 0; round < 20; ++round) {
    Memory slots(kNumSlots * kSlotBytes);
    Memory tails(kNumSlots * kTailBytes);
    slots.fill(random);
    tails.fill(random);
    const std::vector<std::byte> slots_before(slots.data(), slots.data() + slots.size());
    const std::vector<std::byte> tails_before(tails.data(), tails.data() + tails.size());
    const Batch batch = slots_with_tails(slots, tails);
    plan_harmless_faults(*faults, random);
    Ticket ticket = engine->submit(IoDirection::write, *file, batch.view());
    CHECK(engine->wait(ticket, kWaitS).status == IoStatus::ok);
    // Tails lie behind their slots: one read takes both.
    Memory both(kFileBytes);
    ticket = engine->submit(IoDirection::read, *file, one(0, both.address(), kFileBytes).view());
    CHECK(engine->wait(ticket, kWaitS).status == IoStatus::ok);
    for (std::size_t i = 0; i < kNumSlots; ++i) {
      const std::byte* place = both.data() + i * (kSlotBytes + kTailBytes);
      CHECK(std::memcmp(place, &slots[i * kSlotBytes], kSlotBytes) == 0);
      CHECK(std::memcmp(place + kSlotBytes, &tails[i * kTailBytes], kTailBytes) == 0);
    }
    slots.poison();
    tails.poison();
    ticket = engine->submit(IoDirection::read, *file, batch.view());
    CHECK(engine->wait(ticket, kWaitS).status == IoStatus::ok);
    CHECK(std::memcmp(slots.data(), slots_before.data(), slots.size()) == 0);
    CHECK(std::memcmp(tails.data(), tails_before.data(), tails.size()) == 0);
  }
  const auto counters = engine->counters();
  CHECK(counters.bytes_read == 2 * 20 * kFileBytes);
  CHECK(counters.bytes_written == 20 * kFileBytes);
  CHECK(counters.reads == 20 * (kNumSlots + 1));
  CHECK(counters.errors == 0);
}

void test_failures_among_many_threads_leave_nothing_in_flight() {
  const TemporaryPath path("failures");
  const auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  for (std::uint64_t first = 1; first <= 2 * kNumSlots; first += 7) {
    const auto faults = std::make_shared<FaultOps>();
    faults->fail(FileCall::read, first, EIO);
    const auto engine = make_faulty(faults, 4);
    const Memory slots[] = {Memory(kNumSlots * kSlotBytes), Memory(kNumSlots * kSlotBytes)};
    const Memory tails[] = {Memory(kNumSlots * kTailBytes), Memory(kNumSlots * kTailBytes)};
    Ticket tickets[2] = {};
    for (std::size_t i = 0; i < 2; ++i) {
      const Batch batch = slots_with_tails(slots[i], tails[i]);
      tickets[i] = engine->submit(IoDirection::read, *file, batch.view());
    }
    int num_failed = 0;
    for (const Ticket ticket : tickets) {
      const auto result = engine->wait(ticket, kWaitS);
      CHECK(result.status == (result.error == 0 ? IoStatus::ok : IoStatus::failed));
      num_failed += result.error == EIO;
    }
    CHECK(num_failed == 1);
    CHECK(engine->counters().in_flight == 0);
    CHECK(engine->counters().errors == 1);
  }
}

void test_the_second_operation_runs_while_the_first_hangs() {
  const TemporaryPath path("hang");
  const auto faults = std::make_shared<FaultOps>();
  const auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  const auto engine = make_faulty(faults, 2);
  const Memory memory(2 * kPage);
  faults->hold(FileCall::read, 1);
  const Ticket hanging =
      engine->submit(IoDirection::read, *file, one(0, memory.address(), kPage).view());
  CHECK(faults->wait_held(1, kWaitS));
  const Ticket free =
      engine->submit(IoDirection::read, *file, one(kPage, memory.address(kPage), kPage).view());
  CHECK(engine->wait(free, kWaitS).status == IoStatus::ok);
  CHECK(engine->wait(hanging, 0.02).status == IoStatus::pending);
  CHECK(memory.is_all(kPoison, 0, kPage));
  std::thread releaser([&] { faults->release(); });
  CHECK(engine->wait(hanging, kWaitS).status == IoStatus::ok);
  releaser.join();
  CHECK(memory.is_all(std::byte{0}, 0, 2 * kPage));
}

// The ticket has failed, but one of its operations still uses the memory and the file.
void test_a_failed_ticket_is_pending_while_an_operation_hangs() {
  const TemporaryPath path("both");
  const auto faults = std::make_shared<FaultOps>();
  auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  const auto engine = make_faulty(faults, 2);
  const Memory memory(2 * kPage);
  faults->hold(FileCall::read, 1);
  faults->fail(FileCall::read, 2, EIO);
  Batch batch = one(0, memory.address(), kPage);
  batch.add(kPage, memory.address(kPage), kPage);
  const Ticket ticket = engine->submit(IoDirection::read, *file, batch.view());
  file.reset();
  CHECK(faults->wait_held(1, kWaitS));
  while (engine->counters().in_flight > 1) std::this_thread::yield();
  CHECK(engine->poll(ticket).status == IoStatus::pending);
  CHECK(engine->wait(ticket, 0.02).status == IoStatus::pending);
  faults->release();
  CHECK(engine->wait(ticket, kWaitS).error == EIO);
  CHECK(memory.is_all(std::byte{0}, 0, kPage) != memory.is_all(std::byte{0}, kPage, 2 * kPage));
}

void test_destruction_leaves_a_hanging_worker_behind() {
  const TemporaryPath path("detach");
  const auto faults = std::make_shared<FaultOps>();
  const auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  const Memory memory(2 * kPage);
  auto engine = make_faulty(faults, 1);
  faults->hold(FileCall::write, 1);
  engine->submit(IoDirection::write, *file, one(0, memory.address(), kPage).view());
  const Ticket queued =
      engine->submit(IoDirection::write, *file, one(kPage, memory.address(kPage), kPage).view());
  CHECK(faults->wait_held(1, kWaitS));
  CHECK(!engine->close(0.01));
  CHECK(engine->poll(queued).error == ECANCELED);
  CHECK(engine->counters().in_flight == 1);
  engine.reset();  // returns at once
  CHECK(faults->num_calls(FileCall::write) == 1);
  // The worker ends by itself: it holds the last reference to the faults besides this one.
  const std::weak_ptr<FaultOps> watched = faults;
  faults->release();
  while (watched.use_count() > 1) std::this_thread::yield();
  const auto synchronised = watched.lock();  // acquires what the worker did before it let go
  CHECK(faults->num_calls(FileCall::write) == 1);
}

std::uint64_t size_on_disk(const std::string& path) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0 ? static_cast<std::uint64_t>(info.st_size) : ~0ull;
}

int error_of_opening(const std::string& path, const std::shared_ptr<FaultOps>& faults) {
  try {
    BlockFile::open(path, kGrownBytes, OpenMode::create, faults);
  } catch (const tiermem::FileError& error) {
    return error.code().value();
  }
  return 0;
}

void test_growth_that_fails_is_undone() {
  const TemporaryPath path("grow");
  for (const bool makes_file : {true, false}) {
    const std::uint64_t before = makes_file ? ~0ull : kPage;
    if (!makes_file) BlockFile::open(path.get(), kPage, OpenMode::create);
    const auto faults = std::make_shared<FaultOps>();
    faults->fail(FileCall::allocate, 1, EINTR);  // repeated
    faults->fail(FileCall::allocate, 2, ENOSPC);
    CHECK(error_of_opening(path.get(), faults) == ENOSPC);
    CHECK(size_on_disk(path.get()) == before);
    faults->fail(FileCall::allocate, 3, EOPNOTSUPP);  // then zeros are written
    faults->fail(FileCall::write, 1, EINTR);
    faults->fail(FileCall::write, 4, EDQUOT);
    CHECK(error_of_opening(path.get(), faults) == EDQUOT);
    CHECK(size_on_disk(path.get()) == before);
    CHECK(error_of_opening(path.get(), faults) == 0);
    CHECK(size_on_disk(path.get()) == kGrownBytes);
    ::unlink(path.get().c_str());
  }
}

}  // namespace

int main() {
  test_interrupted_and_short_transfers_move_every_byte();
  test_failures_among_many_threads_leave_nothing_in_flight();
  test_the_second_operation_runs_while_the_first_hangs();
  test_a_failed_ticket_is_pending_while_an_operation_hangs();
  test_destruction_leaves_a_hanging_worker_behind();
  test_growth_that_fails_is_undone();
  return tiermem_test::report("io_faults");
}
