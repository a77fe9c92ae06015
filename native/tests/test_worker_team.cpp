#include "tiermem/worker_team.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "check.h"

using namespace tiermem;

namespace {

void every_unit_is_done_once() {
  for (std::size_t threads = 1; threads <= 5; ++threads) {
    WorkerTeam team(threads);
    CHECK(team.num_threads() == threads);
    for (const std::size_t units : {0, 1, 2, 7, 1000}) {
      std::vector<int> done(units, 0);  // no atomics: run() makes what units wrote visible
      team.run(units, [&](std::size_t i) { ++done[i]; });
      for (const int times : done) CHECK(times == 1);
    }
  }
}

void jobs_follow_each_other_quickly(double spin_s) {
  WorkerTeam team(3, {}, spin_s);
  std::size_t sum = 0;
  for (int job = 0; job < 2000; ++job) {
    std::size_t parts[4] = {};
    team.run(4, [&](std::size_t i) { parts[i] = i; });
    for (const std::size_t part : parts) sum += part;
  }
  CHECK(sum == 2000 * 6);
}

void workers_take_part() {
  WorkerTeam team(2);
  // Each of the two units waits for the other one: they end only in two threads.
  std::atomic<int> arrived = 0;
  team.run(2, [&](std::size_t) {
    arrived.fetch_add(1);
    arrived.notify_all();
    for (int seen = arrived.load(); seen < 2; seen = arrived.load()) arrived.wait(seen);
  });
  CHECK(arrived.load() == 2);
}

void an_exception_reaches_the_caller() {
  for (std::size_t threads = 1; threads <= 3; ++threads) {
    WorkerTeam team(threads);
    for (int round = 0; round < 20; ++round) {
      std::atomic<int> done = 0;
      std::string text;
      try {
        team.run(100, [&](std::size_t i) {
          if (i == 30) throw std::runtime_error("unit 30");
          done.fetch_add(1);
        });
      } catch (const std::runtime_error& error) {
        text = error.what();
      }
      CHECK(text == "unit 30");
      CHECK(done.load() >= 30 && done.load() < 100);
      std::atomic<int> again = 0;
      team.run(10, [&](std::size_t) { again.fetch_add(1); });
      CHECK(again.load() == 10);
    }
  }
}

// The exception comes from a worker: the caller's unit waits until the other one has thrown.
void a_worker_that_throws() {
  WorkerTeam team(2);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> thrown = false;
  const auto unit = [&](std::size_t) {
    if (std::this_thread::get_id() == caller) {
      thrown.wait(false);
      return;
    }
    thrown.store(true);
    thrown.notify_all();
    throw std::logic_error("worker");
  };
  CHECK_THROWS(std::logic_error, team.run(2, unit));
  CHECK(thrown.load());
}

void several_callers() {
  WorkerTeam team(3);
  std::vector<std::thread> callers;
  std::atomic<int> done = 0;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int job = 0; job < 50; ++job) team.run(5, [&](std::size_t) { done.fetch_add(1); });
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(done.load() == 3 * 50 * 5);
}

void workers_are_bound_to_their_cpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  CHECK(sched_getaffinity(0, sizeof(allowed), &allowed) == 0);
  int cpu = 0;
  while (!CPU_ISSET(cpu, &allowed)) ++cpu;
  WorkerTeam team(2, {cpu});
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> found = -1;
  team.run(2, [&](std::size_t) {
    if (std::this_thread::get_id() == caller) {
      found.wait(-1);
      return;
    }
    cpu_set_t mine;
    CPU_ZERO(&mine);
    sched_getaffinity(0, sizeof(mine), &mine);
    found.store(CPU_COUNT(&mine) == 1 && CPU_ISSET(cpu, &mine) ? 1 : 0);
    found.notify_all();
  });
  CHECK(found.load() == 1);
}

// A child has none of the threads: its caller does all units, and the team ends without them.
void a_forked_child_works_alone() {
  auto team = std::make_unique<WorkerTeam>(3);
  team->run(10, [](std::size_t) {});
  const pid_t child = fork();
  if (child == 0) {
    std::size_t done = 0;
    team->run(10, [&](std::size_t) { ++done; });
    team.reset();
    _exit(done == 10 ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  team->run(10, [](std::size_t) {});
}

void wrong_arguments() {
  CHECK_THROWS(std::invalid_argument, WorkerTeam(0));
  CHECK_THROWS(std::invalid_argument, WorkerTeam(3, {0}));
  CHECK_THROWS(std::invalid_argument, WorkerTeam(2, {}, -0.1));
  CHECK_THROWS(std::invalid_argument, WorkerTeam(2, {}, 1.5));
  CHECK_THROWS(std::system_error, WorkerTeam(2, {-1}));
  CHECK_THROWS(std::system_error, WorkerTeam(2, {1 << 20}));
}

}  // namespace

int main() {
  every_unit_is_done_once();
  jobs_follow_each_other_quickly(0.0);
  jobs_follow_each_other_quickly(0.0002);
  workers_take_part();
  an_exception_reaches_the_caller();
  a_worker_that_throws();
  several_callers();
  workers_are_bound_to_their_cpus();
  a_forked_child_works_alone();
  wrong_arguments();
  return tiermem_test::report("worker_team");
}
