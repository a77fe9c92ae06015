// The copy engine against a driver whose streams run in random order: right bytes at the right
// time, by every method, and nothing lost when the driver refuses.
#include "tiermem/copy_engine.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "simulated_driver.h"

using namespace tiermem;
using tiermem_test::SimulatedDriver;

namespace {

constexpr std::size_t kSlots = 300;
constexpr std::size_t kSlotBytes = 96;
constexpr CopyDirection kUp = CopyDirection::HostToDevice, kDown = CopyDirection::DeviceToHost,
                        kWithin = CopyDirection::DeviceToDevice;
constexpr CopyMethod kMethods[] = {CopyMethod::Single, CopyMethod::Batch, CopyMethod::Runs,
                                   CopyMethod::Kernel};
constexpr StreamHandle kStreams[] = {0x10, 0x20};

using Bytes = std::vector<std::uint8_t>;
using Numbers = std::vector<std::int64_t>;

CopyChoices always(CopyMethod method) {
  CopyChoices choices;
  for (auto& row : choices.methods) row.fill(method);
  return choices;
}

struct World {
  explicit World(std::uint64_t seed, bool has_batches = true, bool has_kernel = true)
      : random(seed), driver(seed), engine(calls(has_batches), parts(has_kernel)) {
    for (Bytes* memory : {&host, &device}) {
      for (auto& byte : *memory) byte = static_cast<std::uint8_t>(random());
    }
  }

  CopyCalls calls(bool has_batches) const {
    CopyCalls found = driver.calls();
    if (!has_batches) found.copy_batch = 0;
    return found;
  }

  CopyParts parts(bool has_kernel) {
    CopyParts parts;
    parts.pieces_per_call = 7;
    parts.last = {0x501, 0x502};
    if (!has_kernel) return parts;
    parts.link = {{0x6, 16, 1024, 0}, {0x7, 4, 32, 1 << 16}};
    parts.spread = {{0x8, 32, 512, 0}, {}};
    for (std::size_t i = 0; i < 2; ++i) {
      const auto address = reinterpret_cast<std::uint64_t>(staging.data()) + i * 4096;
      parts.staging[i] = {address, 2048, 0x900 + i, {}};
      for (std::size_t event = 0; event < 5; ++event) {
        parts.staging[i].events.push_back(0x600 + 16 * i + event);
      }
    }
    return parts;
  }

  void choose_all(CopyMethod method) {
    for (const CopyDirection direction : {kUp, kDown, kWithin}) {
      for (const bool busy : {false, true}) engine.choose(direction, busy, always(method));
    }
  }

  void choose_at_random() {
    for (const CopyDirection direction : {kUp, kDown, kWithin}) {
      for (const bool busy : {false, true}) {
        CopyChoices choices;
        for (auto& row : choices.methods) {
          for (auto& method : row) method = kMethods[random() % 4];
        }
        engine.choose(direction, busy, choices);
      }
    }
  }

  std::uint64_t below(std::uint64_t end) { return random() % end; }

  std::mt19937_64 random;
  Bytes host = Bytes(kSlots * kSlotBytes), device = Bytes(2 * kSlots * kSlotBytes);
  Bytes staging = Bytes(8192);
  SimulatedDriver driver;
  CopyEngine engine;
};

std::int64_t address(const Bytes& memory, std::size_t slot) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory.data())) +
         static_cast<std::int64_t>(slot * kSlotBytes);
}

// Slots in ascending, descending or random order, in stretches of neighbours or not.
std::vector<std::size_t> some_slots(World& world, std::size_t count, std::size_t end) {
  std::vector<std::size_t> slots(end);
  std::iota(slots.begin(), slots.end(), std::size_t{0});
  const std::size_t stretch = 1 + world.below(40);
  if (world.below(4) > 0) {
    for (std::size_t i = 0; i + stretch <= end; i += stretch) {
      const std::size_t j = world.below(end / stretch) * stretch;
      std::swap_ranges(slots.begin() + i, slots.begin() + i + stretch, slots.begin() + j);
    }
  }
  slots.resize(count);
  if (world.below(4) == 0) std::reverse(slots.begin(), slots.end());
  return slots;
}

struct Batch {
  Numbers dst, src, bytes;
};

// Whole slots or a part of each, from `from` to `to`.
Batch some_batch(World& world, const Bytes& to, std::size_t to_first, const Bytes& from) {
  const std::size_t count = 1 + world.below(kSlots);
  const auto dst = some_slots(world, count, kSlots), src = some_slots(world, count, kSlots);
  const bool is_mixed = world.below(3) == 0;
  const std::int64_t width = world.below(2) ? kSlotBytes : 1 + world.below(kSlotBytes);
  Batch batch;
  for (std::size_t i = 0; i < count; ++i) {
    batch.dst.push_back(address(to, to_first + dst[i]));
    batch.src.push_back(address(from, src[i]));
    batch.bytes.push_back(is_mixed ? 1 + world.below(kSlotBytes) : width);
  }
  return batch;
}

void submit(World& world, CopyDirection direction, const Batch& batch, StreamHandle stream,
            StreamOwner owner = StreamOwner::Device) {
  world.engine.submit(direction, batch.dst, batch.src, batch.bytes, stream, owner);
}

std::uint8_t& byte_at(std::int64_t address) {
  return *reinterpret_cast<std::uint8_t*>(static_cast<std::uintptr_t>(address));
}

// Checks in `stream`, when everything given to it has run, that destinations equal sources.
void check_behind(World& world, const Batch& batch, StreamHandle stream) {
  world.driver.give(stream, [&world, batch] {
    bool equal = true;
    for (std::size_t i = 0; i < batch.dst.size(); ++i) {
      for (std::int64_t k = 0; k < batch.bytes[i]; ++k) {
        equal &= byte_at(batch.dst[i] + k) == byte_at(batch.src[i] + k);
      }
    }
    CHECK(equal);
  });
}

// Up, then the same places down to poisoned host memory and up elsewhere, in one stream; the other
// direction at work in another stream.
void test_every_batch_is_there_when_its_stream_goes_on() {
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    World world(seed);
    seed % 5 < 4 ? world.choose_all(kMethods[seed % 5]) : world.choose_at_random();
    Bytes other(world.host.size()), beside(world.device);
    for (int round = 0; round < 4; ++round) {
      const StreamHandle stream = kStreams[world.below(2)];
      const Batch up = some_batch(world, world.device, kSlots, world.host);
      submit(world, kUp, up, stream);
      check_behind(world, up, stream);
      Batch down = up;
      std::swap(down.dst, down.src);
      submit(world, kDown, down, stream);
      check_behind(world, down, stream);
      CHECK(world.driver.run_all());
    }
    const Batch up = some_batch(world, world.device, kSlots, world.host);
    const Batch down = some_batch(world, other, 0, beside);
    submit(world, kUp, up, kStreams[0]);
    submit(world, kDown, down, kStreams[1]);
    const Batch again = some_batch(world, world.device, 0, other);
    world.driver.give(kStreams[1], [&other] { std::fill(other.begin(), other.end(), 7); });
    submit(world, kUp, again, kStreams[1]);
    check_behind(world, up, kStreams[0]);
    check_behind(world, again, kStreams[1]);
    CHECK(world.driver.run_all());
  }
}

void test_nothing_but_the_pieces_is_written() {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    World world(seed);
    world.choose_at_random();
    const Batch batch = some_batch(world, world.device, kSlots, world.host);
    Bytes wanted = world.device;
    for (std::size_t i = 0; i < batch.dst.size(); ++i) {
      const auto offset = static_cast<std::size_t>(batch.dst[i] - address(world.device, 0));
      for (std::int64_t k = 0; k < batch.bytes[i]; ++k) {
        wanted[offset + k] = byte_at(batch.src[i] + k);
      }
    }
    submit(world, kUp, batch, kStreams[0]);
    CHECK(world.driver.run_all());
    CHECK(world.device == wanted);
  }
}

void test_within_the_device() {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    World world(seed);
    world.choose_all(kMethods[seed % 4]);
    Bytes from(world.device);
    const Batch batch = some_batch(world, world.device, 0, from);
    submit(world, kWithin, batch, kStreams[0]);
    check_behind(world, batch, kStreams[0]);
    CHECK(world.driver.run_all());
    CHECK(world.driver.counts["wait"] == 0);
  }
}

void test_batches_are_cut_and_neighbours_joined() {
  World world(1);
  world.choose_all(CopyMethod::Batch);
  Batch batch;
  for (std::size_t i = 0; i < 40; ++i) {
    batch.dst.push_back(address(world.device, 2 * i));
    batch.src.push_back(address(world.host, i));
    batch.bytes.push_back(kSlotBytes);
  }
  submit(world, kUp, batch, kStreams[0]);
  CHECK(world.driver.batch_sizes == std::vector<std::size_t>{7, 7, 7, 7, 7, 5});
  for (std::size_t i = 0; i < 40; ++i) batch.dst[i] = address(world.device, i);
  submit(world, kUp, batch, kStreams[0]);
  CHECK(world.driver.batch_sizes.size() == 6);
  CHECK(world.driver.counts["copy"] == 1);
}

void test_neighbours_in_host_memory_are_one_dma_each_stage() {
  World world(1);
  world.choose_all(CopyMethod::Runs);
  Batch batch;
  for (std::size_t i = 0; i < 40; ++i) {
    batch.dst.push_back(address(world.device, (i * 7) % 40));
    batch.src.push_back(address(world.host, i));
    batch.bytes.push_back(kSlotBytes);
  }
  submit(world, kUp, batch, kStreams[0]);
  check_behind(world, batch, kStreams[0]);
  CHECK(world.driver.run_all());
  CHECK(world.driver.counts["copy"] == 2);  // 21 pieces fit into a stage
  CHECK(world.driver.counts["launch"] == 2);
}

// The first calls are small, so that bytes move soon; then they are as large as they may be.
void test_calls_grow() {
  World world(10);
  CopyParts parts = world.parts(true);
  parts.pieces_per_call = 100;
  CopyEngine engine(world.calls(true), parts);
  Batch batch;
  for (std::size_t i = 0; i < kSlots; ++i) {
    batch.dst.push_back(address(world.device, (i * 7) % kSlots));
    batch.src.push_back(address(world.host, i));
    batch.bytes.push_back(kSlotBytes);
  }
  engine.choose(kUp, false, always(CopyMethod::Batch));
  engine.submit(kUp, batch.dst, batch.src, batch.bytes, kStreams[0], StreamOwner::Device);
  CHECK(world.driver.batch_sizes == std::vector<std::size_t>{16, 32, 64, 100, 88});
  engine.choose(kUp, true, always(CopyMethod::Kernel));
  engine.choose(kUp, false, always(CopyMethod::Kernel));
  engine.submit(kUp, batch.dst, batch.src, batch.bytes, kStreams[0], StreamOwner::Device);
  CHECK(world.driver.counts["launch"] == 2);  // 64, then 236 of up to 256
  CHECK(world.driver.run_all());
}

// Nothing reaches over a border: the driver would refuse it.
void test_borders_cut_every_copy() {
  for (const CopyMethod method : kMethods) {
    World world(8);
    world.choose_all(method);
    const auto middle = static_cast<std::uint64_t>(address(world.host, kSlots / 2)) + 5;
    world.engine.set_borders({middle});
    world.driver.forbid(middle);
    Batch batch;
    for (std::size_t i = 0; i < kSlots; ++i) {
      batch.dst.push_back(address(world.device, i));
      batch.src.push_back(address(world.host, i));
      batch.bytes.push_back(kSlotBytes);
    }
    submit(world, kUp, batch, kStreams[0]);
    check_behind(world, batch, kStreams[0]);
    CHECK(world.driver.run_all());
  }
}

void test_aligned_pieces_get_the_kernel_for_them() {
  World world(9);
  world.choose_all(CopyMethod::Kernel);
  const std::int64_t host = (address(world.host, 0) + 15) / 16 * 16;
  const std::int64_t device = (address(world.device, 0) + 15) / 16 * 16;
  const auto launched = [&](std::int64_t dst, std::int64_t src, std::int64_t bytes) {
    world.driver.counts.clear();
    submit(world, kUp, {{dst, dst + 4096}, {src, src + 8192}, {bytes, 64}}, kStreams[0]);
    CHECK(world.driver.counts["launch"] == 1);
    return world.driver.counts["launch aligned"];
  };
  CHECK(launched(device, host, 48) == 1);
  CHECK(launched(device + 1, host, 48) == 0);
  CHECK(launched(device, host + 8, 48) == 0);
  CHECK(launched(device, host, 47) == 0);
  CHECK(launched(device, host, 48) == 1);
  CHECK(world.driver.run_all());
}

void test_large_batches_fill_many_tables_and_stages() {
  constexpr std::size_t kMany = 10000;
  for (const CopyMethod method : kMethods) {
    World world(2);
    world.choose_all(method);
    Bytes from(kMany * 16), to(kMany * 16);
    for (auto& byte : from) byte = static_cast<std::uint8_t>(world.random());
    std::vector<std::size_t> order(kMany);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::shuffle(order.begin(), order.end(), world.random);
    Batch batch;
    for (std::size_t i = 0; i < kMany; ++i) {
      batch.dst.push_back(address(to, 0) + static_cast<std::int64_t>(16 * order[i]));
      batch.src.push_back(address(from, 0) + static_cast<std::int64_t>(16 * i));
      batch.bytes.push_back(16);
    }
    submit(world, kUp, batch, kStreams[0]);
    check_behind(world, batch, kStreams[0]);
    CHECK(world.driver.run_all());
  }
}

void test_foreign_streams_get_no_batches_and_no_staging() {
  for (const CopyMethod method : kMethods) {
    World world(3);
    world.choose_all(method);
    const Batch batch = some_batch(world, world.device, 0, world.host);
    submit(world, kUp, batch, 0x1, StreamOwner::Other);
    check_behind(world, batch, 0x1);
    CHECK(world.driver.run_all());
    auto& counts = world.driver.counts;
    CHECK(counts["copy_batch"] + counts["record"] + counts["query"] + counts["wait"] == 0);
  }
}

void test_what_is_missing_is_done_without() {
  for (const CopyMethod method : kMethods) {
    World world(4, false, false);
    world.choose_all(method);
    const Batch batch = some_batch(world, world.device, 0, world.host);
    submit(world, kUp, batch, kStreams[0]);
    check_behind(world, batch, kStreams[0]);
    CHECK(world.driver.run_all());
    CHECK(world.driver.counts["copy_batch"] + world.driver.counts["launch"] == 0);
  }
}

void test_the_other_direction_in_flight_is_noticed() {
  World world(5);
  world.engine.choose(kUp, false, always(CopyMethod::Batch));
  world.engine.choose(kUp, true, always(CopyMethod::Kernel));
  world.engine.choose(kDown, false, always(CopyMethod::Batch));
  const Batch up = some_batch(world, world.device, 0, world.host);
  submit(world, kUp, up, kStreams[0]);
  CHECK(world.driver.counts["launch"] == 0);
  Bytes other(world.host.size());
  submit(world, kDown, some_batch(world, other, 0, world.device), kStreams[1]);
  submit(world, kUp, up, kStreams[0]);
  CHECK(world.driver.counts["launch"] > 0);
  CHECK(world.driver.run_all());
  world.driver.counts.clear();
  submit(world, kUp, up, kStreams[0]);
  CHECK(world.driver.counts["launch"] == 0);
}

// Every call of a submission fails once: the refusal names it, what was given runs to its end, and
// the engine goes on as if nothing had been.
void test_every_refusal() {
  for (const CopyMethod method : kMethods) {
    for (const CopyDirection direction : {kUp, kDown}) {
      for (int ahead = 0;; ++ahead) {
        World world(6);
        world.choose_all(method);
        Bytes other(world.host.size());
        const Batch batch = direction == kUp ? some_batch(world, world.device, 0, world.host)
                                             : some_batch(world, other, 0, world.device);
        world.driver.fail_after(ahead);
        bool refused = false;
        try {
          submit(world, direction, batch, kStreams[0]);
        } catch (const CopyRefused& refusal) {
          refused = true;
          CHECK(refusal.code() == SimulatedDriver::kFailure);
          CHECK(std::string(refusal.what()).starts_with("cu"));
        }
        CHECK(world.driver.run_all());
        if (!refused) break;
        submit(world, direction, batch, kStreams[0]);
        check_behind(world, batch, kStreams[0]);
        CHECK(world.driver.run_all());
      }
    }
  }
}

}  // namespace

int main() {
  test_every_batch_is_there_when_its_stream_goes_on();
  test_nothing_but_the_pieces_is_written();
  test_within_the_device();
  test_batches_are_cut_and_neighbours_joined();
  test_neighbours_in_host_memory_are_one_dma_each_stage();
  test_calls_grow();
  test_borders_cut_every_copy();
  test_aligned_pieces_get_the_kernel_for_them();
  test_large_batches_fill_many_tables_and_stages();
  test_foreign_streams_get_no_batches_and_no_staging();
  test_what_is_missing_is_done_without();
  test_the_other_direction_in_flight_is_noticed();
  test_every_refusal();
  return tiermem_test::report("test_copy_engine");
}
