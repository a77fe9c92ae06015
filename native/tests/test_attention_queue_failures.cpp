// AttentionQueue where something goes wrong: every job ends, and its flag is set.
#include "tiermem/attention_queue.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>

#include "../src/attention_kernel.h"
#include "attention_queue_support.h"
#include "check.h"

using namespace tiermem;
using namespace tiermem_test;

namespace {

void throwing_attend(const UnitTask& task) {
  if (task.kv_head == 1) throw std::runtime_error("head 1");
  kPortableAttention.attend(task);
}

void a_kernel_that_throws() {
  AttentionKernel kernel = kPortableAttention;
  kernel.attend = &throwing_attend;
  AttentionQueue queue(std::make_unique<CpuAttention>(2, kernel));
  for (const FloatType out_type : {FloatType::float16, FloatType::bfloat16, FloatType::float32}) {
    Shape shape;
    shape.out_type = out_type;
    Share bad(shape);
    shape.num_kv_heads = 1;
    Share good(shape);
    bad.ready = good.ready = 1;
    const auto first = queue.submit(bad.job());
    const auto second = queue.submit(good.job());
    CHECK(eventually([&] { return good.is_done(); }));
    CHECK(bad.is_done() && bad.is_nan() && !good.is_nan());
    const AttentionOutcome outcome = queue.poll(first);
    CHECK(outcome.status == AttentionStatus::failed && outcome.message == "head 1");
    CHECK(!outcome.is_reading);
    CHECK(queue.poll(second).status == AttentionStatus::done);
  }
  CHECK(queue.counters().failed == 3 && queue.counters().done == 3);
}

void queries_that_do_not_come() {
  AttentionQueue queue(threads(2), {.deadline_s = 0.3});
  Share late({}), next({});
  const auto first = queue.submit(late.job());
  next.ready = 1;
  const auto second = queue.submit(next.job());
  CHECK(eventually([&] { return next.is_done(); }));
  CHECK(late.is_done() && late.is_nan() && !next.is_nan());
  const AttentionOutcome outcome = queue.poll(first);
  CHECK(outcome.status == AttentionStatus::failed && outcome.bytes_read == 0);
  CHECK(outcome.message == "the queries did not arrive within 0.3 s");
  CHECK(eventually([&] { return !queue.poll(first).is_reading; }));
  CHECK(queue.poll(second).status == AttentionStatus::done);
}

// Cancelled behind a job that waits: it ends in its turn.
void a_cancelled_job() {
  AttentionQueue queue(threads(1));
  Share first({}), second({}), third({});
  third.ready = 1;
  queue.submit(first.job());
  const auto ticket = queue.submit(second.job());
  const auto last = queue.submit(third.job());
  queue.cancel(ticket);
  CHECK(queue.poll(ticket).status == AttentionStatus::pending && !second.is_done());
  raise(first.ready, 1);
  CHECK(eventually([&] { return third.is_done(); }));
  CHECK(first.is_done() && second.is_done() && second.is_nan() && !first.is_nan());
  CHECK(queue.poll(ticket).status == AttentionStatus::failed);
  CHECK(queue.poll(ticket).message == "cancelled");
  queue.cancel(last);
  CHECK(queue.poll(last).status == AttentionStatus::done);
  Share waiting({});
  const auto due = queue.submit(waiting.job());
  queue.cancel(due);
  CHECK(eventually([&] { return waiting.is_done(); }));
  CHECK(waiting.is_nan());
}

// Kernels are plain functions: what holds them is found here.
std::atomic<bool> gate_is_shut = false;
std::atomic<int> num_held = 0;

void held_attend(const UnitTask& task) {
  num_held.fetch_add(1);
  gate_is_shut.wait(true);
  kPortableAttention.attend(task);
}

void held_attend_of_nothing(const UnitTask&) {
  num_held.fetch_add(1);
  gate_is_shut.wait(true);
}

void open_gate() {
  gate_is_shut.store(false);
  gate_is_shut.notify_all();
}

void shut_gate() {
  num_held.store(0);
  gate_is_shut.store(true);
}

void attention_that_hangs() {
  AttentionKernel kernel = kPortableAttention;
  kernel.attend = &held_attend;
  shut_gate();
  Share hung({}), behind({}), refused({}), after({});
  AttentionQueue queue(std::make_unique<CpuAttention>(2, kernel), {.deadline_s = 0.5});
  hung.ready = behind.ready = after.ready = 1;
  const auto first = queue.submit(hung.job());
  const auto second = queue.submit(behind.job());
  CHECK(eventually([&] { return behind.is_done(); }));
  CHECK(num_held.load() > 0 && hung.is_done() && hung.is_nan() && behind.is_nan());
  CHECK(queue.poll(first).message == "the attention did not end within 0.5 s");
  CHECK(queue.poll(first).is_reading && !queue.poll(second).is_reading);
  CHECK(queue.poll(second).message ==
        "the attention of a job before this one did not end within 0.5 s");
  CHECK_THROWS(std::runtime_error, queue.submit(refused.job()));
  open_gate();
  CHECK(eventually([&] { return !queue.poll(first).is_reading; }));
  CHECK(hung.is_nan());  // what came late was dropped
  CHECK(eventually([&] {
    try {
      queue.submit(after.job());
    } catch (const std::runtime_error&) {
      return false;
    }
    return true;
  }));
  CHECK(eventually([&] { return after.is_done(); }));
  CHECK(!after.is_nan() && !refused.is_done());
  CHECK(queue.counters().failed == 2 && queue.counters().done == 1);
}

void closing_fails_what_is_left() {
  AttentionQueue queue(threads(2));
  Share ended({}), waiting({}), queued({});
  ended.ready = 1;
  queue.submit(ended.job());
  const auto second = queue.submit(waiting.job());
  const auto third = queue.submit(queued.job());
  CHECK(eventually([&] { return ended.is_done(); }));
  CHECK(queue.close(0.01));
  CHECK(waiting.is_done() && queued.is_done() && waiting.is_nan() && queued.is_nan());
  CHECK(!ended.is_nan());
  for (const auto ticket : {second, third}) {
    const AttentionOutcome outcome = queue.poll(ticket);
    CHECK(outcome.status == AttentionStatus::failed && !outcome.is_reading);
    CHECK(outcome.message == "the attention queue was closed before the job ended");
  }
  CHECK_THROWS(std::logic_error, queue.submit(ended.job()));
  CHECK(queue.close(0));
  CHECK_THROWS(std::invalid_argument, queue.close(-1));
}

void closing_waits_for_what_comes() {
  AttentionQueue queue(threads(1));
  Share share({});
  queue.submit(share.job());
  std::thread gpu([&] { raise(share.ready, 1); });
  CHECK(queue.close(60));
  gpu.join();
  CHECK(share.is_done() && !share.is_nan());
}

void closing_while_attention_hangs() {
  AttentionKernel kernel = kPortableAttention;
  kernel.attend = &held_attend;
  shut_gate();
  Share hung({}), behind({});
  hung.ready = 1;
  AttentionQueue queue(std::make_unique<CpuAttention>(2, kernel));
  const auto ticket = queue.submit(hung.job());
  queue.submit(behind.job());
  CHECK(eventually([] { return num_held.load() > 0; }));
  const auto start = Clock::now();
  CHECK(!queue.close(0.01));
  CHECK(Clock::now() - start < std::chrono::seconds(20));
  CHECK(hung.is_nan() && behind.is_nan() && hung.is_done() && behind.is_done());
  CHECK(queue.poll(ticket).is_reading);
  open_gate();
  CHECK(queue.close(60));
  CHECK(!queue.poll(ticket).is_reading && hung.is_nan());
}

// Its service thread goes on alone, with what it needs.
void destroying_while_attention_hangs() {
  static AttentionKernel kernel = kPortableAttention;
  kernel.attend = &held_attend_of_nothing;
  shut_gate();
  Share hung({});
  {
    hung.ready = 1;
    AttentionQueue queue(std::make_unique<CpuAttention>(1, kernel));
    queue.submit(hung.job());
    CHECK(eventually([] { return num_held.load() > 0; }));
  }
  CHECK(hung.is_done() && hung.is_nan());
  open_gate();
}

// It has none of the threads, and waits for none.
void a_forked_child() {
  auto queue = std::make_unique<AttentionQueue>(threads(2));
  Share share({}), other({});
  const auto ticket = queue->submit(share.job());
  const pid_t child = fork();
  if (child == 0) {
    CHECK_THROWS(std::logic_error, queue->submit(other.job()));
    CHECK_THROWS(std::logic_error, queue->poll(ticket));
    CHECK_THROWS(std::logic_error, queue->cancel(ticket));
    CHECK_THROWS(std::logic_error, queue->forget(ticket));
    CHECK(queue->close(60));
    queue.reset();
    _exit(tally().num_failures == 0 ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  raise(share.ready, 1);
  CHECK(eventually([&] { return share.is_done(); }));
  CHECK(queue->poll(ticket).status == AttentionStatus::done);
}

}  // namespace

int main() {
  a_kernel_that_throws();
  queries_that_do_not_come();
  a_cancelled_job();
  attention_that_hangs();
  closing_fails_what_is_left();
  closing_waits_for_what_comes();
  closing_while_attention_hangs();
  destroying_while_attention_hangs();
  a_forked_child();
  return report("attention_queue_failures");
}
