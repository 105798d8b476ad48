// Threads for one call. They come from the OpenMP runtime that torch has loaded, where there is one: its idle workers
// spin for milliseconds after every torch operation, and threads of our own would share their cores with them.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace kf {

class Team {
 public:
  // Every member sets the same size before its first barrier.
  void set_size(int size) { size_.store(size, std::memory_order_relaxed); }
  int size() const { return size_.load(std::memory_order_relaxed); }

  // Blocks until every member has called it: spins for some microseconds, then sleeps.
  void barrier();

 private:
  std::atomic<int> size_{1};
  std::atomic<int> waiting_{0};
  std::atomic<int64_t> round_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Hands out 0, 1, 2, ...: which thread runs which index never changes a result, only who computes it.
class Counter {
 public:
  void reset() { next_.store(0, std::memory_order_relaxed); }
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
};

// Calls body(data, member, team) on at most `threads` threads, the caller being member 0. The body must not throw.
void run_team_raw(int threads, void (*body)(void* data, int member, Team& team), void* data);

template <class Body>
void run_team(int threads, Body&& body) {
  run_team_raw(threads, [](void* data, int member, Team& team) { (*static_cast<Body*>(data))(member, team); }, &body);
}

// Where the threads come from: "libgomp.so.1 of torch", for example, or "std::thread".
const char* thread_source();

// As many threads as the work is worth: one for each `grain` units, at most `limit`.
inline int worthwhile_threads(double work, double grain, int limit) {
  const double wanted = work / grain;
  if (!(wanted > 1.0) || limit <= 1) return 1;
  return wanted >= limit ? limit : static_cast<int>(wanted);
}

}  // namespace kf
