#include "tiermem/io_engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <thread>

#include "check.h"
#include "io_support.h"

namespace {

using tiermem::BlockFile;
using tiermem::EngineKind;
using tiermem::FileDescriptor;
using tiermem::IoDirection;
using tiermem::IoEngine;
using tiermem::IoResult;
using tiermem::IoStatus;
using tiermem::OpenMode;
using tiermem::Ticket;
using namespace tiermem_test;

constexpr std::array kKinds = {EngineKind::io_uring, EngineKind::threads};
constexpr std::size_t kFileBytes = std::size_t{1} << 20;

IoResult run(IoEngine& engine, IoDirection direction, const BlockFile& file, const Batch& batch) {
  const Ticket ticket = engine.submit(direction, file, batch.view());
  IoResult result = engine.wait(ticket, kWaitS);
  engine.forget(ticket);
  return result;
}

// Disjoint ranges of `step` bytes' granularity; memory lies at the file's offsets.
Batch random_batch(std::mt19937_64& random, const Memory& memory, std::size_t step) {
  Batch batch;
  std::size_t offset = step * (random() % 8);
  while (true) {
    const std::size_t length = step * (1 + random() % 16);
    if (offset + length > memory.size()) return batch;
    batch.add(offset, memory.address(offset), length);
    offset += length + step * (random() % 8);
  }
}

void test_round_trips(EngineKind kind) {
  const auto engine = make_engine(kind);
  if (!engine) return;
  const TemporaryPath path("round");
  const auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  std::mt19937_64 random(3);
  std::vector<std::byte> expected(kFileBytes);
  for (int round = 0; round < 10; ++round) {
    Memory memory(kFileBytes);
    memory.fill(random);
    Batch batch = random_batch(random, memory, round % 2 == 0 ? kPage : 37);
    CHECK(run(*engine, IoDirection::write, *file, batch).status == IoStatus::ok);
    for (std::size_t i = 0; i < batch.offsets.size(); ++i) {
      const auto offset = static_cast<std::size_t>(batch.offsets[i]);
      std::memcpy(&expected[offset], &memory[offset], static_cast<std::size_t>(batch.lengths[i]));
    }
    memory.poison();
    batch = random_batch(random, memory, round % 2 == 0 ? 29 : kPage);
    CHECK(run(*engine, IoDirection::read, *file, batch).status == IoStatus::ok);
    std::vector<std::byte> wanted(kFileBytes, kPoison);
    for (std::size_t i = 0; i < batch.offsets.size(); ++i) {
      const auto offset = static_cast<std::size_t>(batch.offsets[i]);
      std::memcpy(&wanted[offset], &expected[offset], static_cast<std::size_t>(batch.lengths[i]));
    }
    CHECK(std::memcmp(wanted.data(), memory.data(), kFileBytes) == 0);
  }
  CHECK(engine->close(kWaitS));
}

// A full device takes no byte: the real ENOSPC of a write.
void test_a_full_device_fails_the_write(EngineKind kind) {
  const auto engine = make_engine(kind, 1, kPage);
  if (!engine) return;
  FileDescriptor full(::open("/dev/full", O_RDWR | O_CLOEXEC));
  CHECK(static_cast<bool>(full));
  const auto file = BlockFile::adopt({}, std::move(full), kFileBytes, "/dev/full");
  const Memory memory(2 * kPage);
  Batch batch;
  for (std::size_t i = 0; i < 20; ++i) batch.add(i * kPage, memory.address(i % 2 * kPage), kPage);
  const IoResult result = run(*engine, IoDirection::write, *file, batch);
  CHECK(result.status == IoStatus::failed);
  CHECK(result.error == ENOSPC);
  CHECK(result.message.starts_with("write of 4096 bytes at offset "));
  CHECK(result.message.find("of /dev/full failed after 0 bytes") != std::string::npos);
  // What had not started by then never did: one operation at a time here, three with threads.
  CHECK(engine->counters().errors <= (kind == EngineKind::io_uring ? 1 : 3));
  CHECK(engine->counters().in_flight == 0);
}

void test_descriptors_that_cannot_be_read_fail(EngineKind kind) {
  const auto engine = make_engine(kind);
  if (!engine) return;
  Pipe pipe = make_pipe();
  const auto file = BlockFile::adopt({}, std::move(pipe.write_end), kFileBytes, "pipe");
  const Memory memory(kPage);
  const IoResult result = run(*engine, IoDirection::read, *file, one(0, memory.address(), kPage));
  CHECK(result.status == IoStatus::failed);
  CHECK(result.error == EBADF || result.error == ESPIPE);
  CHECK(memory.is_all(kPoison, 0, kPage));
}

// The two descriptors lead to different files here, which tells the one that was taken.
void test_aligned_operations_alone_take_the_direct_descriptor(EngineKind kind) {
  const auto engine = make_engine(kind);
  if (!engine) return;
  const TemporaryPath direct_path("direct");
  const TemporaryPath buffered_path("buffered");
  BlockFile::open(direct_path.get(), kFileBytes, OpenMode::create);
  BlockFile::open(buffered_path.get(), kFileBytes, OpenMode::create);
  const auto open = [](const TemporaryPath& path) {
    return FileDescriptor(::open(path.get().c_str(), O_RDWR | O_CLOEXEC));
  };
  const auto file = BlockFile::adopt(open(direct_path), open(buffered_path), kFileBytes, "two");
  const auto direct = BlockFile::adopt({}, open(direct_path), kFileBytes, "direct");

  struct Case {
    std::size_t offset, address, length, tail_address, tail_length;
    bool is_direct;
  };
  const Case cases[] = {
      {0, 0, kPage, 0, 0, true},          {kPage, kPage, 2 * kPage, 0, 0, true},
      {512, 0, kPage, 0, 0, false},       {0, 512, kPage, 0, 0, false},
      {0, 0, kPage - 512, 0, 0, false},   {kPage, 0, 1, 0, 0, false},
      {0, 0, kPage, kPage, kPage, true},  {0, 0, kPage, kPage + 512, kPage, false},
      {0, 0, kPage, kPage, 512, false},   {0, 0, kPage - 512, kPage, kPage + 512, false},
  };
  Memory memory(8 * kPage);
  for (const Case& c : cases) {
    const std::size_t length = c.length + c.tail_length;
    memory.poison();
    Batch batch = one(c.offset, memory.address(c.address), c.length);
    if (c.tail_length > 0) {
      batch.tail_addresses.push_back(memory.address(c.tail_address));
      batch.tail_length = static_cast<std::int64_t>(c.tail_length);
    }
    CHECK(run(*engine, IoDirection::write, *file, batch).status == IoStatus::ok);
    const Batch all = one(c.offset, memory.address(), length);
    CHECK(run(*engine, IoDirection::read, *direct, all).status == IoStatus::ok);
    CHECK(memory.is_all(c.is_direct ? kPoison : std::byte{0}, 0, length));
    std::fill(memory.data(), memory.data() + memory.size(), std::byte{0});
    CHECK(run(*engine, IoDirection::write, *direct, all).status == IoStatus::ok);
  }
}

// A file system may take O_DIRECT at open and refuse every such transfer: EINVAL, as here, where
// the direct descriptor is a file of the kernel that wants a number and is offered none.
void test_a_refused_direct_transfer_goes_through_the_page_cache(EngineKind kind) {
  const auto engine = make_engine(kind);
  if (!engine) return;
  const TemporaryPath path("refused");
  const auto real = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  const auto file = BlockFile::adopt(
      FileDescriptor(::open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC)),
      FileDescriptor(::open(path.get().c_str(), O_RDWR | O_CLOEXEC)), kFileBytes, path.get());
  CHECK(file->is_direct());
  Memory memory(4 * kPage);
  const Batch batch = one(kPage, memory.address(), memory.size());
  CHECK(run(*engine, IoDirection::write, *file, batch).status == IoStatus::ok);
  std::fill(memory.data(), memory.data() + memory.size(), std::byte{0});
  CHECK(run(*engine, IoDirection::read, *real, batch).status == IoStatus::ok);
  CHECK(memory.is_all(kPoison, 0, memory.size()));
  CHECK(engine->counters().errors == 0);
}

// io_uring reads a pipe like a file: a read of an empty one hangs, and a byte is a short read.
void test_a_hanging_read_is_waited_for_and_given_up() {
  const auto engine = make_engine(EngineKind::io_uring, 1);
  if (!engine) return;
  Pipe pipe = make_pipe();
  const auto file = BlockFile::adopt({}, std::move(pipe.read_end), kFileBytes, "pipe");
  const Memory memory(2 * kPage);
  const Ticket hanging =
      engine->submit(IoDirection::read, *file, one(0, memory.address(), 3).view());
  const Ticket queued =
      engine->submit(IoDirection::read, *file, one(0, memory.address(kPage), 1).view());
  CHECK(engine->poll(hanging).status == IoStatus::pending);
  CHECK(engine->wait(hanging, 0.02).status == IoStatus::pending);
  CHECK(engine->counters().in_flight == 2);
  CHECK(!engine->close(0.02));
  CHECK(engine->poll(queued).error == ECANCELED);
  CHECK_THROWS(std::logic_error, engine->submit(IoDirection::read, *file, {}));
  CHECK(::write(pipe.write_end.get(), "a", 1) == 1);
  CHECK(engine->wait(hanging, 0.02).status == IoStatus::pending);
  CHECK(::write(pipe.write_end.get(), "bc", 2) == 2);
  CHECK(engine->wait(hanging, kWaitS).status == IoStatus::ok);
  CHECK(std::memcmp(memory.data(), "abc", 3) == 0);
  CHECK(memory.is_all(kPoison, 3, memory.size()));
  CHECK(engine->close(0));
  CHECK(engine->counters().bytes_read == 3);
}

// The kernel gives up on what a thread submitted when the thread ends; the engine does not.
void test_operations_outlive_the_thread_that_submitted_them() {
  const auto engine = make_engine(EngineKind::io_uring);
  if (!engine) return;
  Pipe pipe = make_pipe();
  const auto file = BlockFile::adopt({}, std::move(pipe.read_end), kFileBytes, "pipe");
  const Memory memory(kPage);
  Ticket ticket = 0;
  std::thread([&] {
    ticket = engine->submit(IoDirection::read, *file, one(0, memory.address(), 3).view());
  }).join();
  CHECK(engine->wait(ticket, 0.02).status == IoStatus::pending);
  CHECK(::write(pipe.write_end.get(), "abc", 3) == 3);
  CHECK(engine->wait(ticket, kWaitS).status == IoStatus::ok);
  CHECK(std::memcmp(memory.data(), "abc", 3) == 0);
}

// The writer's end closes in the middle of a read: the end of the file, not success.
void test_a_stream_that_ends_early_fails() {
  const auto engine = make_engine(EngineKind::io_uring);
  if (!engine) return;
  Pipe pipe = make_pipe();
  const auto file = BlockFile::adopt({}, std::move(pipe.read_end), kFileBytes, "pipe");
  const Memory memory(kPage);
  CHECK(::write(pipe.write_end.get(), "abc", 3) == 3);
  pipe.write_end = FileDescriptor();
  const IoResult result = run(*engine, IoDirection::read, *file, one(0, memory.address(), 4));
  CHECK(result.status == IoStatus::failed);
  CHECK(result.error == ENODATA);
  CHECK(result.message.find("after 3 bytes: end of file") != std::string::npos);
}

void test_destruction_leaves_a_hanging_read_behind() {
  Pipe pipe = make_pipe();
  auto file = BlockFile::adopt({}, std::move(pipe.read_end), kFileBytes, "pipe");
  auto memory = std::make_unique<Memory>(kPage);
  bool is_hanging = false;  // a read that no thread had begun when the engine was closed does not
  for (int i = 0; i < 100 && !is_hanging; ++i) {
    auto engine = make_engine(EngineKind::io_uring);
    if (!engine) return;
    const Ticket ticket =
        engine->submit(IoDirection::read, *file, one(0, memory->address(), 3).view());
    CHECK(engine->wait(ticket, 0.02).status == IoStatus::pending);
    is_hanging = !engine->close(0.01);
  }
  CHECK(is_hanging);
  file.reset();
  // The read is still there, with its descriptor and its ring: it takes the bytes when they come.
  CHECK(::write(pipe.write_end.get(), "abc", 3) == 3);
  const std::atomic_ref first((*memory)[0]);
  for (int i = 0; i < 1'000'000 && first.load() == kPoison; ++i) std::this_thread::yield();
  CHECK(std::memcmp(memory->data(), "abc", 3) == 0);
}

void test_a_file_closed_early_stays_open_for_its_operations(EngineKind kind) {
  auto engine = make_engine(kind, 2, kPage);
  if (!engine) return;
  const TemporaryPath path("early");
  auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  const Memory memory(kFileBytes);
  Batch batch;
  for (std::size_t offset = 0; offset < kFileBytes; offset += kPage) {
    batch.add(offset, memory.address(offset), kPage);
  }
  const Ticket ticket = engine->submit(IoDirection::write, *file, batch.view());
  file->close();
  CHECK_THROWS(tiermem::FileError, engine->submit(IoDirection::read, *file, {}));
  file.reset();
  CHECK(engine->wait(ticket, kWaitS).status == IoStatus::ok);
  engine->submit(IoDirection::read,
                 *BlockFile::open(path.get(), kFileBytes, OpenMode::read_only), batch.view());
  engine.reset();  // waits: the memory is freed after this
}

// One thread submits and waits, one polls the same tickets, one reads the counters.
void test_other_threads_may_look(EngineKind kind) {
  const auto engine = make_engine(kind);
  if (!engine) return;
  const TemporaryPath path("threads");
  const auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  const Memory memory(kFileBytes);
  std::atomic<Ticket> newest = 0;
  std::atomic<bool> stop = false;
  std::uint64_t most_in_flight = 0;  // of the counting thread until it is joined
  std::thread poller([&] {
    while (!stop) {
      if (const Ticket ticket = newest; ticket != 0) engine->poll(ticket);
    }
  });
  std::thread counter([&] {
    while (!stop) most_in_flight = std::max(most_in_flight, engine->counters().in_flight);
  });
  for (std::size_t round = 0; round < 50; ++round) {
    Batch batch;
    for (std::size_t i = 0; i < 64; ++i) batch.add(i * 512, memory.address(i * 512), 512);
    const auto direction = round % 2 == 0 ? IoDirection::write : IoDirection::read;
    const Ticket ticket = engine->submit(direction, *file, batch.view());
    newest = ticket;
    CHECK(engine->wait(ticket, kWaitS).status == IoStatus::ok);
  }
  stop = true;
  poller.join();
  counter.join();
  CHECK(most_in_flight <= 64);
}

int ring_of_this_process() {
  for (int fd = 0; fd < 4096; ++fd) {
    std::array<char, 64> name = {};
    const std::string link = "/proc/self/fd/" + std::to_string(fd);
    if (::readlink(link.c_str(), name.data(), name.size() - 1) < 0) continue;
    if (std::strcmp(name.data(), "anon_inode:[io_uring]") == 0) return fd;
  }
  return -1;
}

// The ring is taken away: what was given to it never ends, and what comes later is refused.
void test_a_ring_that_broke_down_is_told() {
  auto engine = make_engine(EngineKind::io_uring);
  if (!engine) return;
  const TemporaryPath path("broken");
  const auto file = BlockFile::open(path.get(), kFileBytes, OpenMode::create);
  const Memory memory(kPage);
  const Batch batch = one(0, memory.address(), kPage);
  CHECK(run(*engine, IoDirection::read, *file, batch).status == IoStatus::ok);
  CHECK(::close(ring_of_this_process()) == 0);
  const Ticket lost = engine->submit(IoDirection::read, *file, batch.view());
  bool is_told = false;
  for (int i = 0; i < 1'000'000 && !is_told; ++i) {
    try {
      engine->forget(engine->submit(IoDirection::read, *file, batch.view()));
      std::this_thread::yield();
    } catch (const std::system_error& error) {
      is_told = error.code().value() == EBADF;
    }
  }
  CHECK(is_told);
  CHECK(engine->wait(lost, 0.01).status == IoStatus::pending);
  CHECK(!engine->close(0.01));
  engine.reset();  // returns at once
}

std::ptrdiff_t num_threads_here() {
  using Entries = std::filesystem::directory_iterator;
  return std::distance(Entries("/proc/self/task"), Entries());
}

// A garbage collector may destroy the engine much later, or in a forked child without its threads.
void test_closing_ends_the_threads(EngineKind kind) {
  const std::ptrdiff_t before = num_threads_here();
  const auto engine = make_engine(kind);
  if (!engine) return;
  CHECK(num_threads_here() > before);
  CHECK(engine->close(kWaitS));
  CHECK(num_threads_here() == before);
  CHECK(engine->close(kWaitS));
}

void test_options_out_of_range() {
  for (const std::int64_t bad : {-1, 0, 5000}) {
    tiermem::IoEngineOptions options;
    options.queue_depth = bad;
    CHECK_THROWS(std::invalid_argument, tiermem::make_io_engine(options));
    options.queue_depth = 8;
    options.num_threads = bad;
    CHECK_THROWS(std::invalid_argument, tiermem::make_io_engine(options));
    options.num_threads = 4;
    options.num_rings = bad;
    CHECK_THROWS(std::invalid_argument, tiermem::make_io_engine(options));
  }
  for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{4097}, std::int64_t{2} << 30}) {
    tiermem::IoEngineOptions options;
    options.piece_bytes = bad;
    CHECK_THROWS(std::invalid_argument, tiermem::make_io_engine(options));
  }
  const auto kind = tiermem::make_io_engine()->kind();
  CHECK(kind == (make_engine(EngineKind::io_uring) ? EngineKind::io_uring : EngineKind::threads));
}

}  // namespace

int main() {
  for (const EngineKind kind : kKinds) {
    test_round_trips(kind);
    test_aligned_operations_alone_take_the_direct_descriptor(kind);
    test_a_full_device_fails_the_write(kind);
    test_descriptors_that_cannot_be_read_fail(kind);
    test_a_refused_direct_transfer_goes_through_the_page_cache(kind);
    test_a_file_closed_early_stays_open_for_its_operations(kind);
    test_other_threads_may_look(kind);
    test_closing_ends_the_threads(kind);
  }
  test_a_hanging_read_is_waited_for_and_given_up();
  test_operations_outlive_the_thread_that_submitted_them();
  test_a_stream_that_ends_early_fails();
  test_destruction_leaves_a_hanging_read_behind();
  test_a_ring_that_broke_down_is_told();
  test_options_out_of_range();
  return tiermem_test::report("io_engine");
}
