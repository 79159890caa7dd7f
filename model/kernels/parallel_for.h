// Loops of CPU kernels on XLA's own thread pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace halfmoon {

// Calls body(0) ... body(count - 1), in the caller and in up to `threads - 1` others. The caller works too and waits
// only for calls that have begun, so it cannot deadlock in a pool whose other threads are busy.
inline void ParallelFor(xla::ffi::ThreadPool& pool, int threads, int count, std::function<void(int)> body) {
  struct State {
    std::function<void(int)> body;
    std::atomic<int> next{0};
    std::mutex mutex;
    std::condition_variable done;
    int count, finished = 0;
  };
  auto state = std::make_shared<State>();
  state->body = std::move(body);
  state->count = count;
  const auto work = [state] {
    int finished = 0;
    for (int i; (i = state->next.fetch_add(1)) < state->count; ++finished) state->body(i);
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    state->finished += finished;
    if (state->finished == state->count) state->done.notify_one();
  };
  for (int t = 1; t < std::min(threads, count); ++t) {
    auto helper = work;
    pool.Schedule(std::move(helper));
  }
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->done.wait(lock, [&] { return state->finished == state->count; });
}

}  // namespace halfmoon
